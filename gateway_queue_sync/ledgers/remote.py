"""A ledger that processes share, as the scheduler of one process sees it.

The scheduler says what it wants (who joined and left, reports, limits); its worker sends all of that in
one exchange, without the lock, and passes the answers on. ``exchange``, ``update``, ``snapshot``,
``close`` and ``budget`` are called without the scheduler's lock, all other methods with it.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Literal

from gateway_queue_sync import forecast
from gateway_queue_sync.clock import FOREVER_US, Clock
from gateway_queue_sync.errors import LedgerError, worker_blocked
from gateway_queue_sync.events import Event, LimitUpdated
from gateway_queue_sync.forecast import Outlook
from gateway_queue_sync.ledgers import Answers, Exchange, Request, Wants
from gateway_queue_sync.ledgers.memory import MemoryLedger
from gateway_queue_sync.ledgers.wire import MAX_NUMBER
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.lines import Lines, Waiter
from gateway_queue_sync.models import (
    US_PER_SECOND,
    Permit,
    QueueSnapshot,
    Report,
    SessionStartLimit,
)
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.token_bucket import NEVER, Denial, Reason

if TYPE_CHECKING:
    from gateway_queue_sync.scheduler import Scheduler

log = logging.getLogger("gateway_queue_sync")

FIRST_PAUSE_US = 50_000  # before a ledger that was out of reach is asked again; doubled each time
MAX_PAUSE_US = 2 * US_PER_SECOND
MANY_FAILURES = 3  # in a row are worth a warning
RECENT_LOOK_US = 1 * US_PER_SECOND  # for which the log goes by what was seen
MAX_POSITION = 1_000  # that is counted for the log alone
MAX_TRY_US = 500_000  # for one who only tries, until the ledger answers
MAX_LATE_US = 40_000  # after a deadline, for an answer that is on its way
MAX_REQUEST_US = 5 * US_PER_SECOND  # until the ledger answers update and snapshot


class RemoteLedger:
    """What one process wants of a remote ledger, and what it knows of it.

    Attributes:
        ledger: the ledger.
        wants: what is to be sent next.
        unseen: those whose waiting is no event yet: their position has to be asked for.
        failure: why the ledger could not be asked, ``None`` if it could.
        retry_us: when it is asked again then.
        limit_changed: whether the latest exchange has changed the limit.
    """

    remote: Literal[True] = True

    def __init__(self, ledger: Exchange, settings: Settings) -> None:
        self.ledger = ledger
        self._reserve = settings.reserve
        self._clock: Clock = settings.clock
        self._now_us = settings.clock.now_us
        self._observed = settings.observer is not None
        self._begin()

    def _begin(self) -> None:
        self.wants = Wants()
        self.unseen: list[Waiter] = []
        self.failure: LedgerError | None = None
        self.retry_us = NEVER
        self.limit_changed = False
        self._reset: Denial | None = None  # the latest reset at which the limit should be read
        self._opens_us: dict[int, int] = {}  # by bucket, as far as it was answered
        self._answered_us = NEVER
        self._look: Request | None = None  # the latest
        self._events: list[Event] = []
        self._unsent = False  # what could not be sent, and waits in the ledger
        self._failures = 0
        self._failed_us = NEVER
        self._reached = ""  # what is to be logged of that

    def begin_in_child(self) -> None:
        """Be another process from now on: this one was forked."""
        self.ledger.begin_anew()
        self._begin()

    def __repr__(self) -> str:
        return repr(self.ledger)

    def close(self) -> None:
        """Let go of what is held open."""
        self.ledger.close()

    @property
    def max_concurrency(self) -> int:
        """How many buckets there are."""
        return self.ledger.max_concurrency

    @property
    def margin_us(self) -> int:
        """How old a permit may be when it reaches its caller."""
        return self.ledger.margin_us

    @property
    def window_us(self) -> int:
        """How long a bucket rests after a permit."""
        return self.ledger.window_us

    @property
    def granted(self) -> int:
        """How many permits were granted."""
        return self.ledger.granted

    def budget(self) -> Budget:
        """Return what is left of the limit."""
        return self.ledger.budget()

    def outlook(self, number: int) -> Outlook | None:
        """Return what decides when permits of a bucket come, ``None`` if that was not answered yet."""
        opens_us = self._opens_us.get(number)
        if opens_us is None:
            return None
        now_us = self._now_us()
        return Outlook(
            now_us=now_us,
            window_us=self.window_us,
            period_us=self.ledger.period_us,
            reserve=self._reserve,
            max_concurrency=self.max_concurrency,
            ready_in_us={number: max(0, opens_us - now_us)},
            others_ready_in_us=0,
            budget=self.budget(),
            granted=self.granted,
        )

    # --- what is wanted ---------------------------------------------------------------------------

    def joined(self, waiter: Waiter) -> None:
        """Note that a waiter stands in line; one that only tries is sent as a head alone."""
        if waiter.shard_id > MAX_NUMBER:
            raise ValueError(f"shard_id must be at most {MAX_NUMBER}, not {waiter.shard_id}")
        if not waiter.once:
            self.wants.joined.append(waiter)

    def left(self, waiter: Waiter) -> None:
        """Note that a waiter has left its line without a permit."""
        self.wants.left.append(waiter)

    def report(self, permit: Permit, report: Report) -> None:
        """Have it sent what became of a permit."""
        self.wants.reports.append((permit, report, self._now_us()))

    def read(self, scheduler: Scheduler, limit: SessionStartLimit | None) -> None:
        """Have a limit sent that was read at a reset, or that it could not be read."""
        kind: Literal["renew", "trust"] = "trust" if limit is None else "renew"
        if self._reset is not None:
            self.wants.requests.append(Request(kind, limit, self._reset))
            scheduler.worker.wake(scheduler)

    def update(self, scheduler: Scheduler, limit: SessionStartLimit) -> None:
        """Have a limit adopted, and wait for the answer."""
        self._request(scheduler, Request("update", limit))

    def snapshot(self, scheduler: Scheduler) -> QueueSnapshot:
        """Ask who waits where, and wait for the answer."""
        look = self._request(scheduler, Request("look"))
        assert look.outlook is not None
        return forecast.snapshot(look.outlook, look.lines)

    def _request(self, scheduler: Scheduler, request: Request) -> Request:
        """Have the worker send a request, and wait for the answer for 5 seconds at most."""
        if scheduler.worker.is_current():
            raise worker_blocked()
        condition = request.condition = self._clock.condition(scheduler.lock)
        deadline_us = self._now_us() + MAX_REQUEST_US

        def wait() -> None:
            self.wants.requests.append(request)
            scheduler.worker.start(scheduler)
            while not request.done:
                left_us = deadline_us - self._now_us()
                if left_us <= 0:
                    raise self.unanswered(request)
                condition.wait(left_us / US_PER_SECOND)

        scheduler.blocking(wait)
        if request.error is not None:
            raise request.error
        return request

    # --- the exchange -----------------------------------------------------------------------------

    def exchange(self, scheduler: Scheduler, heads: list[Waiter]) -> bool:
        """Ask the ledger, without the lock, and pass its answers on; false if nothing was to be sent."""
        forks = scheduler.forks
        events, wants = scheduler.locked(self._compose, scheduler, heads)
        for event in events:
            scheduler.emit(event)
        if scheduler.forks != forks:
            return True  # an observer has forked, and this is the child: the rest is its parent's
        if wants is None:
            if scheduler.closed and not heads and not events:
                self.ledger.close()
            return bool(events)
        answers = self.ledger.exchange(wants)
        events = scheduler.locked(self._take_in, scheduler, wants, answers)
        self._log_reach()
        if scheduler.reader is not None:
            scheduler.reader.log_failure()
        for event in events:
            scheduler.emit(event)
        return True

    def _compose(
        self, scheduler: Scheduler, heads: list[Waiter]
    ) -> tuple[list[Event], Wants | None]:
        """Return the events to emit, and what is to be sent now, if anything.

        While the ledger is out of reach that is only for those who try once or wait for an answer.
        """
        now_us, wants = self._now_us(), self.wants
        heads[:] = [head for head in heads if head.entry is not None]  # some may have left just now
        events = self._waiting_events(scheduler, now_us, looked=False)
        if self.failure is not None and now_us < self.retry_us:
            for head in heads:
                if not head.once:
                    head.ask_at_us = self.retry_us
                    scheduler.notify_head(head)
            heads[:] = [head for head in heads if head.once]
            if not heads and not wants.requests:
                return events, None
        if self.unseen:
            wants.requests.append(Request("look"))
        wants.heads = list(heads)
        asked = set(heads)
        wants.joined = [one for one in wants.joined if one.entry is not None and one not in asked]
        if not wants and not self._unsent:
            return events, None
        wants.can_read = scheduler.reader is not None and scheduler.reader.can_read(now_us)
        self.wants = Wants()
        return events, wants

    def _take_in(self, scheduler: Scheduler, wants: Wants, answers: Answers) -> list[Event]:
        """Pass the answers on, and return the events to emit."""
        now_us = self._answered_us = self._now_us()
        self._note(wants, answers, now_us, scheduler.lines)
        if self.max_concurrency != scheduler.lines.max_concurrency or self.limit_changed:
            self._opens_us.clear()
            scheduler.limit_changed()
        events = []
        for head in wants.heads:
            event = self._pass_on(scheduler, head, answers.heads.get(head), now_us)
            if event is not None:
                events.append(event)
        looked = any(request.kind == "look" for request in wants.requests)
        return events + self._waiting_events(scheduler, now_us, looked=looked)

    def _pass_on(
        self, scheduler: Scheduler, waiter: Waiter, answer: Permit | Denial | None, now_us: int
    ) -> Event | None:
        """Pass on what was answered to a head, ``None`` if the ledger was out of reach."""
        if answer is None:
            answer = Denial(max(0, self.retry_us - now_us), Reason.WINDOW)
        else:
            self._note_answer(scheduler, waiter, answer, now_us)
        if waiter.entry is None:  # it has left meanwhile
            if isinstance(answer, Permit):
                self.report(answer, Report.UNUSED)
            return None
        event = scheduler.record(waiter, answer, now_us)
        permit = waiter.permit
        if permit is None and waiter.error is None:
            scheduler.notify_head(waiter)
        if waiter.condition is not None:
            if permit is not None and not scheduler.closed and not scheduler.listens(permit):
                scheduler.hand_over(waiter, permit)  # its next need not wait for the thread to wake
            waiter.condition.notify()
        return event

    def _note_answer(
        self, scheduler: Scheduler, waiter: Waiter, answer: Permit | Denial, now_us: int
    ) -> None:
        """Note when the bucket opens, and have the limit read if that is due."""
        if isinstance(answer, Permit):
            self._opens_us[answer.bucket] = answer.stamp_us + self.window_us
            return
        self._opens_us[waiter.shard_id % scheduler.lines.max_concurrency] = now_us + answer.wait_us
        if answer.reason is Reason.RESET:
            self._reset = answer
            if scheduler.reader is not None:
                scheduler.reader.read(scheduler, now_us)

    def wake_us(self, *, closed: bool) -> int:
        """Return when there is something to send, ``FOREVER_US`` if there is nothing."""
        if not self.wants and not self.unseen and not self._unsent:
            return FOREVER_US
        if closed and self._failures >= MANY_FAILURES:
            return FOREVER_US  # a closed queue gives up to send what is left
        return NEVER if self.failure is None or self.wants.requests else self.retry_us

    def _note(self, wants: Wants, answers: Answers, now_us: int, lines: Lines) -> None:
        """Take in what came back."""
        self._note_reach(answers.failure, now_us)
        self._unsent = answers.unsent
        self.limit_changed = False
        if answers.forgotten:
            self.wants.joined = [waiter for waiter in lines.waiters() if not waiter.once]
        for request in wants.requests:
            if not request.done and request.error is None:
                self.wants.requests.append(request)  # the ledger had forgotten who waits here
                continue
            request.done = True
            if request.condition is not None:
                request.condition.notify()
            if request.error is not None:
                self._failed(request)
            elif request.kind == "look":
                self._look = request
            elif request.kind != "trust":  # who waits for a reset goes on waiting for 5 s
                self.limit_changed = True
                if request.kind == "renew" and request.limit is not None:
                    self._events.append(LimitUpdated(request.limit))

    def _failed(self, request: Request) -> None:
        if request.kind == "look":
            self.unseen.clear()
        elif request.kind == "renew":
            self._reached = f"{request.error}; the limit that was read is dropped"

    def _note_reach(self, failure: LedgerError | None, now_us: int) -> None:
        """Note whether the ledger could be asked, and if not, when to try again."""
        if failure is None:
            if self._failures >= MANY_FAILURES:
                away = (now_us - self._failed_us) / US_PER_SECOND
                self._reached = f"{self.ledger!r} answers again, after {away:.1f} s"
            self.failure, self._failures, self.retry_us = None, 0, NEVER
            return
        if self.failure is None:
            self._failed_us = now_us
        self.failure = failure
        if now_us >= self.retry_us:  # those who fail during one pause have failed once
            self._failures += 1
            pause_us = min(MAX_PAUSE_US, FIRST_PAUSE_US << min(self._failures - 1, 16))
            self.retry_us = now_us + int(pause_us * random.uniform(0.5, 1.0))
            if self._failures == MANY_FAILURES:
                self._reached = f"{failure}; no permit is granted until it can be asked again"

    def _log_reach(self) -> None:
        """Log that the ledger is out of reach, or answers again; without the lock."""
        reached, self._reached = self._reached, ""
        if reached:
            log.warning("%s", reached)

    def _waiting_events(self, scheduler: Scheduler, now_us: int, *, looked: bool) -> list[Event]:
        """Return the events to emit, of those who wait by a look just made; a recent one for the log."""
        events, self._events = self._events, []
        look = self._look
        recent = not self._observed and look is not None and now_us - look.at_us <= RECENT_LOOK_US
        if look is None or look.outlook is None or not (looked or recent):
            return events
        lines = scheduler.lines
        waiting, self.unseen = self.unseen, []
        for waiter in waiting:
            if waiter.entry is None or waiter.permit is not None or waiter.error is not None:
                continue
            number = waiter.shard_id % look.outlook.max_concurrency
            position = max(look.position(waiter), lines.position(waiter, MAX_POSITION))
            total = max(sum(map(len, look.lines.values())), len(lines))
            in_us = forecast.eta_us(
                look.outlook, number, position, len({number, *look.lines}), total
            )
            eta = None if in_us is None else in_us / US_PER_SECOND
            events.append(scheduler.observers.waiting(waiter, number, position, eta))
        return events

    # --- errors -----------------------------------------------------------------------------------

    def patience_us(self, waiter: Waiter) -> int:
        """Return for how long a head waits after its deadline: its answer is on the way."""
        return MAX_TRY_US if waiter.once else MAX_LATE_US

    def timed_out(self, waiter: Waiter, timeout: float, *, is_head: bool) -> LedgerError | None:
        """Return the error of who got no permit in time because the ledger is out of reach."""
        failure = self.failure
        answered = self._answered_us > waiter.arrived_us and not waiter.once  # others meanwhile
        if failure is None and waiter.ask_at_us == 0 and is_head and not answered:
            failure = LedgerError(f"{self.ledger!r} did not answer in time")
        if failure is None:
            return None
        error = LedgerError(
            f"shard {waiter.shard_id} got no permit within {timeout:g} s: {failure}"
        )
        error.__cause__ = failure.__cause__ or TimeoutError()
        return error

    def unanswered(self, request: Request) -> LedgerError:
        """Return the error for a request that was not answered in time."""
        fate = ": it may or may not have been applied" if request.kind == "update" else ""
        error = LedgerError(f"{self.ledger!r} did not answer within 5 s{fate}")
        error.__cause__ = TimeoutError()
        return error


Ledger = MemoryLedger | RemoteLedger
