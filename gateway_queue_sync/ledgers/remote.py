"""A shared ledger, as the scheduler of one process uses it.

The scheduler calls a method for each change. Its worker sends one request at a time, without the lock,
and applies the reply. ``Session`` decides what a request contains and what a reply means. All methods
except these are called with the scheduler's lock held: ``open``, ``exchange``, ``update``, ``snapshot``,
``close`` and those for a fork.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, TypeVar

from gateway_queue_sync import process
from gateway_queue_sync.clock import FOREVER_US
from gateway_queue_sync.errors import LedgerError, worker_blocked
from gateway_queue_sync.events import Event, LimitUpdated
from gateway_queue_sync.ledgers.memory import MemoryLedger
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.answers import Answers, SessionSettings
from gateway_queue_sync.ledgers.shared.backend import Backend, Busy, Unreachable
from gateway_queue_sync.ledgers.shared.inquiry import first_reply, seen_in
from gateway_queue_sync.ledgers.shared.messages import MAX_COUNTER, Reply, Request
from gateway_queue_sync.ledgers.shared.session import Session
from gateway_queue_sync.ledgers.shared.stored_lines import NoLines
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.lines import Lines, Waiter
from gateway_queue_sync.log import rejected_often
from gateway_queue_sync.models import (
    US_PER_SECOND,
    Permit,
    QueueSnapshot,
    Report,
    SessionStartLimit,
    check_limit,
    to_us,
)
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.token_bucket import MANY_REJECTIONS, Denial

if TYPE_CHECKING:
    from gateway_queue_sync.scheduler import Scheduler

T = TypeVar("T")

log = logging.getLogger("gateway_queue_sync")

MIN_MARGIN = 0.02  # s
MANY_FAILURES = 3  # in a row, until a WARNING
MAX_BUSY_US = 1_500_000  # until a busy ledger counts as failing
MAX_TRY_US = 500_000  # how long ``timeout=0`` waits for the reply
MAX_LATE_US = 40_000  # how long a waiter waits after its deadline if the reply may still come
MAX_REQUEST_US = 5 * US_PER_SECOND  # how long ``update`` and ``snapshot`` wait for the reply


class _OwnLines:
    """The lines of this process, for its session: without the waiters that have their answer.

    Attributes:
        asked: the waiters in the request, by number; the reply answers them.
    """

    def __init__(self, lines: Lines, asked: dict[int, Waiter]) -> None:
        self._lines = lines
        self.max_concurrency = lines.max_concurrency
        self.asked = asked

    def first_two(self, bucket: int) -> list[Waiter]:
        line = self._lines.by_bucket.get(bucket)
        found = [] if line is None else [one for one in line.first(3) if _still_asks(one)][:2]
        self.asked.update((waiter.number, waiter) for waiter in found)
        return found

    def length(self, bucket: int) -> int:
        line = self._lines.by_bucket.get(bucket)
        return 0 if line is None else len(line)

    def buckets(self) -> Iterable[int]:
        return list(self._lines.by_bucket)


def _still_asks(waiter: Waiter) -> bool:
    answered = waiter.permit is not None or waiter.error is not None
    return not answered and not (waiter.once and waiter.ask_at_us)


class RemoteLedger:
    """An account that processes share, as one of them uses it.

    Args:
        backend: sends requests to the ledger.
        settings: the queue's settings.
        limit: the session start limit to begin with.
        bot: the id of the bot that starts the sessions; empty if unknown.

    Attributes:
        backend: where the ledger is.
        keeps_limit: whether the session start limit is kept, even if it is not known yet.
        should_read: whether the ledger asked this process, when it was opened, to read the limit.
        unseen: waiters without a ``ShardWaiting`` so far, because their position is not known.
    """

    remote: Literal[True] = True
    keeps_limit: Literal[True] = True

    def __init__(
        self, backend: Backend, settings: Settings, limit: SessionStartLimit | None, bot: str = ""
    ) -> None:
        interval_us, margin_us, period_us = settings.timings_us
        self.backend = backend
        self._settings = settings
        self._now_us = settings.clock.now_us
        self._new_condition: Callable[..., threading.Condition] = settings.clock.condition
        self._session = Session(
            SessionSettings(
                interval_us=interval_us,
                margin_us=margin_us,
                period_us=period_us,
                lease_us=to_us(settings.lease),
                reserve=settings.reserve,
                reread_us=0 if settings.reread_after is None else to_us(settings.reread_after),
                bot=bot,
                limit=limit,
            )
        )
        self.should_read = False
        self._begin()
        process.register_ledger(self)

    def _begin(self) -> None:
        self.unseen: list[Waiter] = []
        self._asked: dict[int, Waiter] = {}
        self._waiting_for: list[threading.Condition] = []  # update and snapshot, for a reply
        self._look: tuple[Reply | None, int] = None, 0  # the latest reply; its clock's offset
        self._failures = self._answered_us = 0
        self._failed_us: int | None = None  # since when it has failed
        self._has_uncounted = False  # whether it was logged that more is left than counts
        self._refusal = ""  # why the ledger refuses this process, if that was logged

    def open(self, *, can_read: bool) -> None:
        """Introduce this process to the ledger.

        Raises:
            LedgerError: the ledger cannot be used, or refuses this process; or it cannot be reached and
                ``when_unreachable`` is ``"raise"``. Else that only logs a WARNING.
        """
        lines = NoLines(self.max_concurrency)
        request = self._session.compose(lines, self._now_us(), can_read=can_read)
        assert request is not None
        asked_us = self._now_us()
        try:
            reply = first_reply(self.backend, request)
        except (Unreachable, Busy) as error:
            if self._settings.when_unreachable == "raise":
                raise
            self._session.failed(request, error, self._now_us())
            log.warning("%s; no permit is granted until it can be asked", error)
            self._failures, self._failed_us = MANY_FAILURES, asked_us
            return
        answers = self._session.answered(request, reply, self._now_us())
        if answers.error is not None:
            raise LedgerError(f"{self!r}: {answers.error}")
        self.should_read = answers.read
        for warning in answers.warnings:
            log.warning("%r: %s", self, warning)

    def before_fork(self) -> None:
        """Wait until no request is under way."""
        self.backend.before_fork()

    def after_fork_in_parent(self) -> None:
        """Continue after a fork."""
        self.backend.after_fork_in_parent()

    def begin_in_child(self) -> None:
        """Begin anew in a forked child."""
        self.backend.begin_in_child()
        self._session.reinit()
        self._begin()

    def close(self) -> None:
        """Close the file or the connection."""
        self.backend.close()

    def __repr__(self) -> str:
        return repr(self.backend)

    # --- what is known of the account -------------------------------------------------------------

    @property
    def max_concurrency(self) -> int:
        """How many buckets there are."""
        return self._session.max_concurrency

    @property
    def margin_us(self) -> int:
        """How long after the start of its window a permit may reach its caller."""
        return self._session.margin_us

    @property
    def window_us(self) -> int:
        """The time between two permits of a bucket."""
        return self._session.window_us

    @property
    def granted(self) -> int:
        """How many permits were granted."""
        return self._session.granted

    def budget(self) -> Budget | None:
        """Return what is left of the limit. A reset that is due counts as done."""
        return self._session.budget_at(self._now_us())

    def eta_us(self, number: int, position: int, lines: int, waiting: int) -> int | None:
        """Return in about how many microseconds a position gets its permit, ``None`` if unknown."""
        del lines, waiting  # the ledger's numbers, for all processes, are used
        return self._session.eta_us(number, position, self._now_us())

    # --- what has changed -------------------------------------------------------------------------

    def joined(self, waiter: Waiter) -> None:
        """Note that a waiter has joined its line."""
        if waiter.shard_id > MAX_COUNTER:
            raise ValueError(f"shard_id must be at most {MAX_COUNTER}, not {waiter.shard_id}")
        self.changed(waiter)
        if waiter.once:
            self._session.hurry(self._now_us())

    def changed(self, waiter: Waiter) -> None:
        """Note that a waiter has joined or left, or is the head of its line now."""
        self._session.changed(waiter.shard_id % self.max_concurrency)

    def report(self, permit: Permit, report: Report) -> None:
        """Send a report with the next request."""
        self._session.report(permit, report, self._now_us())
        self._session.changed(permit.shard_id % self.max_concurrency)  # its head may go on

    def interrupted(self) -> None:
        """Prepare to repeat an exchange that an exception has interrupted."""
        self._session.interrupted(self._now_us())

    def read(self, scheduler: Scheduler, limit: SessionStartLimit | None, asked_us: int) -> None:
        """Send a limit that was read with the next request; ``None``: it could not be read."""
        if limit is not None:
            self._session.change_limit(limit, self._now_us(), messages.READ, asked_us)
        scheduler.worker.wake(scheduler)

    def update(self, scheduler: Scheduler, limit: SessionStartLimit) -> None:
        """Replace the limit, and wait for the reply."""
        check(limit, self._settings.reserve)
        change = self._wait(
            scheduler,
            lambda: self._session.change_limit(limit, self._now_us()),
            lambda change: change.done,
            self._session.abandon,
        )
        if change.error is not None:
            raise change.error

    def inquire(self, scheduler: Scheduler) -> LedgerError | None:
        """Ask the ledger for its state soon. Return why it cannot be reached, if that is known."""
        self._session.look()
        scheduler.worker.wake(scheduler)
        failure = self._session.failure
        return failure if isinstance(failure, Unreachable) else None

    def snapshot(self, scheduler: Scheduler) -> QueueSnapshot:
        """Return the snapshot of all processes, after waiting for the reply."""
        before = self._look
        self._wait(
            scheduler,
            self._session.look,
            lambda _: self._look is not before,
            lambda _: LedgerError(f"{self!r} did not answer within 5 s"),
        )
        reply, shift_us = self._look
        assert reply is not None
        own: dict[int, list[messages.Waiter]] = {}
        for number, entries in scheduler.locked(scheduler.lines.copy).items():
            own[number] = [
                messages.Waiter(
                    one.number, one.shard_id, one.arrived_us + shift_us, one.position_us + shift_us
                )
                for _, _, one in entries
            ]
        return seen_in(reply, own, self._settings.reserve)

    def _wait(
        self,
        scheduler: Scheduler,
        ask: Callable[[], T],
        is_done: Callable[[T], bool],
        give_up: Callable[[T], LedgerError],
    ) -> T:
        """Let the worker send what ``ask`` adds, and wait for the reply for 5 seconds at most."""
        if scheduler.worker.is_current():
            raise worker_blocked()
        condition, sent = self._new_condition(scheduler.lock), []

        def wait_for_reply() -> None:
            deadline_us = self._now_us() + MAX_REQUEST_US
            sent.append(ask())
            self._session.hurry(self._now_us())
            self._waiting_for.append(condition)
            try:
                scheduler.worker.start(scheduler)
                while not is_done(sent[0]):
                    left_us = deadline_us - self._now_us()
                    if left_us <= 0:
                        error = give_up(sent[0])
                        error.__cause__ = self._session.failure or TimeoutError()
                        raise error
                    condition.wait(left_us / US_PER_SECOND)
            finally:
                self._waiting_for.remove(condition)

        scheduler.blocking(wait_for_reply)
        return sent[0]

    # --- the exchange -----------------------------------------------------------------------------

    def wake_us(self, *, closed: bool) -> int:
        """Return when there is something to send, ``FOREVER_US`` if there is nothing."""
        if closed and self._failures >= MANY_FAILURES:
            return FOREVER_US  # a closed queue does not repeat its last request
        return self._session.wake_us(self._now_us())

    def has_more_to_send(self) -> bool:
        """Return whether a request has no answer yet, or there are changes for the next one."""
        return self._session.is_in_flight or self._session.wake_us(self._now_us()) < FOREVER_US

    def exchange(self, scheduler: Scheduler, answered: list[Waiter]) -> bool:
        """Send a request, without the lock, and apply the reply. False if there was nothing to do.

        Futures that were answered are added to ``answered``: with a permit, a wait or an error.
        """
        forks = scheduler.forks
        request, events = scheduler.locked(self._compose, scheduler)
        for event in events:
            scheduler.emit(event)
        if scheduler.forks != forks:
            return True  # an observer has forked, and this is the child process
        if request is None:
            self._close_if_done(scheduler)
            return bool(events)
        events = []
        try:
            reply = self.backend.ask(request)
        except Exception as error:  # noqa: BLE001 - after any error of a client it is tried again
            failure = error if isinstance(error, LedgerError) else self._wrapped(error)
            warnings = scheduler.locked(self._failed, scheduler, request, failure)
        else:
            answers, warnings, events = scheduler.locked(
                self._take_in, scheduler, request, reply, answered
            )
            for shard_id in answers.rejected_often:
                rejected_often(MANY_REJECTIONS, shard_id, shard_id % self.max_concurrency)
        for warning in warnings:
            log.warning("%s", warning)
        if scheduler.reader is not None:
            scheduler.reader.log_failure()
        for event in events:
            scheduler.emit(event)
        self._close_if_done(scheduler)
        return True

    def _close_if_done(self, scheduler: Scheduler) -> None:
        """Close the ledger if the queue is closed, and there is nothing more to send."""
        waiting = scheduler.lines.by_bucket
        if scheduler.closed and not waiting and self.wake_us(closed=True) >= FOREVER_US:
            self.backend.close()

    def _wrapped(self, error: Exception) -> LedgerError:
        failure = LedgerError(f"{self!r}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        error.__traceback__ = None
        return failure

    def _compose(self, scheduler: Scheduler) -> tuple[Request | None, list[Event]]:
        """Return the request to send, if any, and the events to emit first."""
        if (
            scheduler.lines.max_concurrency != self.max_concurrency
        ):  # ``limit_changed`` was interrupted
            scheduler.limit_changed()
        now_us, reader = self._now_us(), scheduler.reader
        can_read = reader is not None and reader.can_read(now_us)
        lines = _OwnLines(scheduler.lines, self._asked)
        request = self._session.compose(lines, now_us, can_read=can_read)
        return request, self._waiting_events(scheduler)

    def _failed(self, scheduler: Scheduler, request: Request, error: LedgerError) -> list[str]:
        """Note that an attempt has failed, and wake the heads, which may stop waiting now."""
        now_us = self._now_us()
        self._session.failed(request, error, now_us)
        error.__traceback__ = None  # which refers to the request
        since_us = self._failed_us = now_us if self._failed_us is None else self._failed_us
        for head in scheduler.lines.heads():
            if isinstance(error, Busy) and head.once:
                continue  # it waits a little until the ledger is asked again
            head.ask_at_us = self._session.wake_us(now_us)
            if head.condition is not None:
                head.condition.notify()
        if isinstance(error, Busy) and now_us - since_us < MAX_BUSY_US:
            return []
        self._failures += 1
        if self._failures == MANY_FAILURES:
            return [f"{error}; no permit is granted until it can be asked again"]
        return []

    def _take_in(
        self, scheduler: Scheduler, request: Request, reply: Reply, answered: list[Waiter]
    ) -> tuple[Answers, list[str], list[Event]]:
        """Apply a reply. Return what it means, the warnings to log, and the events to emit."""
        now_us = self._answered_us = self._now_us()
        answers = self._session.answered(request, reply, now_us)
        warnings: list[str] = []
        if self._failures >= MANY_FAILURES and self._failed_us is not None:
            away = (now_us - self._failed_us) / US_PER_SECOND
            warnings = [f"{self!r} answers again, after {away:.1f} s"]
            self._refusal = ""  # if it still refuses this process, that is logged again
        self._failures, self._failed_us = 0, None  # a refusal is an answer, too
        warnings += [f"{self!r}: {warning}" for warning in answers.warnings]
        if answers.error is not None:
            error = LedgerError(f"{self!r}: {answers.error}")
            self._fail(scheduler, error, answers.refused, answered)
            if self._refusal != str(error):
                warnings.append(str(error))
            self._refusal = str(error)
            return answers, warnings, []
        self._refusal = ""
        if answers.limit_changed:
            scheduler.limit_changed()
        events = self._pass_on(scheduler, answers, answered, now_us)
        if answers.look is not None:
            self._look = reply, reply.now_us - request.sent_us
        for condition in self._waiting_for:
            condition.notify()
        if answers.read and scheduler.reader is not None:
            scheduler.reader.read(scheduler, now_us)
        warnings += self._warnings(answers)
        return answers, warnings, events + self._waiting_events(scheduler)

    def _pass_on(
        self, scheduler: Scheduler, answers: Answers, answered: list[Waiter], now_us: int
    ) -> list[Event]:
        """Pass permits and denials to their waiters. A permit whose waiter has left is given back."""
        asked, self._asked = self._asked, {}
        events: list[Event | None] = []
        given: dict[int, Permit | Denial] = {one.waiter: one for one in answers.permits}
        for number, answer in (given | answers.denials).items():
            waiter = asked.get(number)
            if waiter is None or waiter.entry is None or waiter.permit is not None:
                if isinstance(answer, Permit):
                    self.report(answer, Report.UNUSED)
                continue
            waiter.answered = True
            events.append(scheduler.record(waiter, answer, now_us))
            if waiter.future is not None:
                answered.append(waiter)
            elif waiter.condition is not None:
                if isinstance(answer, Permit) and not (
                    scheduler.closed or scheduler.listens(answer)
                ):
                    # Now, so that the next waiter in line need not wait until this thread is awake.
                    scheduler.hand_over(waiter, answer)
                waiter.condition.notify()
        for change in answers.changes:
            if change.applied and change.limit.kind == messages.READ:
                limit = change.limit
                reset_after = limit.reset_after_us / US_PER_SECOND
                values = limit.total, limit.remaining, reset_after, limit.max_concurrency
                events.append(LimitUpdated(SessionStartLimit(*values)))
        return [event for event in events if event is not None]

    def _fail(
        self,
        scheduler: Scheduler,
        error: LedgerError,
        refused: list[int] | None,
        answered: list[Waiter],
    ) -> None:
        """Fail the waiters of a request that the ledger refused, or all waiters."""
        self._asked = {}
        for waiter in scheduler.lines.waiters():
            if refused is None or waiter.number in refused:
                waiter.error = error
                if waiter.future is not None:
                    answered.append(waiter)
                elif waiter.condition is not None:
                    waiter.condition.notify()
        for condition in self._waiting_for:
            condition.notify()

    def _warnings(self, answers: Answers) -> list[str]:
        warnings = []
        reads = any(one.limit.kind == messages.READ for one in answers.changes)
        had_uncounted = self._has_uncounted
        self._has_uncounted = answers.uncounted is not None or (had_uncounted and not reads)
        if self._has_uncounted and not had_uncounted:
            warnings.append(
                f"Discord says that {answers.uncounted} session starts are left. By the count of all "
                "processes it is fewer, and the smaller number counts. update(), or the command "
                "`limit --set`, sets another one"
            )
        return warnings

    def _waiting_events(self, scheduler: Scheduler) -> list[Event]:
        """Return the ``ShardWaiting`` of waiters whose position is known now."""
        waiting, self.unseen = self.unseen, []
        events: list[Event] = []
        for waiter in waiting:
            if waiter.entry is None or waiter.permit is not None or waiter.error is not None:
                continue
            number = waiter.shard_id % self.max_concurrency
            others = self._session.others(number)
            if others is None or (waiter.ask_at_us == 0 and scheduler.lines.is_head(waiter)):
                self.unseen.append(waiter)
                continue
            position = others + scheduler.lines.position(waiter)
            in_us = self._session.eta_us(number, position, self._now_us())
            eta = None if in_us is None else in_us / US_PER_SECOND
            events.append(scheduler.observers.waiting(waiter, number, position, eta))
        return events

    # --- errors -----------------------------------------------------------------------------------

    def patience_us(self, waiter: Waiter) -> int:
        """Return how long a head waits after its deadline, because a reply is under way."""
        if not _still_asks(waiter):
            return 0
        return MAX_TRY_US if waiter.once else MAX_LATE_US

    def timed_out(self, waiter: Waiter, timeout: float, *, is_head: bool) -> LedgerError | None:
        """Return the error of a waiter that got no permit in time because the ledger is out of reach."""
        failure: Exception | None = self._session.failure
        others_answered = self._answered_us > waiter.arrived_us and not waiter.once
        if failure is None and is_head and not (waiter.answered or others_answered):
            failure = LedgerError(f"{self!r} did not answer in time")
        if failure is None:
            return None
        error = LedgerError(
            f"shard {waiter.shard_id} got no permit within {timeout:g} s: {failure}"
        )
        error.__cause__ = failure.__cause__ or TimeoutError()
        return error


def open_ledger(
    make_backend: Callable[[Settings], Backend], limit: SessionStartLimit | None, settings: Settings
) -> RemoteLedger:
    """Open a shared ledger."""
    if settings.margin < MIN_MARGIN:
        raise ValueError(
            f"margin must be at least {MIN_MARGIN} s for a queue shared by processes, not "
            f"{settings.margin:g}"
        )
    if limit is not None:
        check(limit, settings.reserve)
    # A GatewayBot that reads the limit knows which bot starts the sessions.
    bot = getattr(getattr(settings.refresh, "__self__", None), "bot_id", "")
    backend = make_backend(settings)
    ledger = RemoteLedger(backend, settings, limit, bot)
    try:
        ledger.open(can_read=settings.refresh is not None)
        left = ledger.budget()
        if left is not None and left.total <= settings.reserve:
            raise ValueError(
                f"total ({left.total}) must be more than the reserve ({settings.reserve})"
            )
    except BaseException:
        backend.close()
        raise
    return ledger


def check(limit: SessionStartLimit, reserve: int) -> None:
    """Raise ``ValueError`` for a limit that a shared ledger cannot store."""
    check_limit(limit, reserve)
    if limit.total > MAX_COUNTER:
        raise ValueError(
            f"total must be at most {MAX_COUNTER} for a shared queue, not {limit.total}"
        )


Ledger = MemoryLedger | RemoteLedger
