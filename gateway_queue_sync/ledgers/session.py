"""One process's conversation with a ledger that processes share: what to send, and what came back.

The scheduler's worker leads it. All methods are called with the scheduler's lock held, except
``log_reach``; the exchange itself is made without the lock.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from gateway_queue_sync import forecast
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.events import Event, LimitUpdated, ShardWaiting
from gateway_queue_sync.ledgers import Answers, RemoteLedger, Request, Wants
from gateway_queue_sync.ledgers.wire import MAX_NUMBER
from gateway_queue_sync.limit_reader import FOREVER_US, LimitReader
from gateway_queue_sync.lines import Lines, Waiter
from gateway_queue_sync.token_bucket import NEVER, US_PER_SECOND

log = logging.getLogger("gateway_queue_sync")

FIRST_PAUSE_US = 50_000  # before a ledger that was out of reach is asked again; doubled each time
MAX_PAUSE_US = 2 * US_PER_SECOND
MANY_FAILURES = 3  # in a row are worth a warning
RECENT_LOOK_US = 1 * US_PER_SECOND  # for which the log goes by what was seen
MAX_POSITION = 1_000  # that is counted for the log alone


class Session:
    """What one process wants of a remote ledger, and what it knows of it.

    Attributes:
        ledger: the ledger.
        wants: what is to be sent next.
        unannounced: those whose waiting was not announced yet: their position has to be asked for.
        failure: why the ledger could not be asked, ``None`` if it could.
        retry_us: when it is asked again then.
        postponed: heads that are asked for only then.
        limit_changed: whether the latest exchange has changed the limit.
    """

    def __init__(self, ledger: RemoteLedger, now_us: Callable[[], int], observed: bool) -> None:
        self.ledger = ledger
        self.wants = Wants()
        self.unannounced: list[Waiter] = []
        self.failure: LedgerError | None = None
        self.retry_us = NEVER
        self.postponed: list[Waiter] = []
        self.limit_changed = False
        self._now_us = now_us
        self._observed = observed
        self._look: Request | None = None  # the latest
        self._events: list[Event] = []
        self._unsent = False  # what could not be sent, and waits in the ledger
        self._failures = 0
        self._failed_us = NEVER
        self._reached = ""  # what is to be logged of that

    def joined(self, waiter: Waiter) -> None:
        """Note that a waiter stands in line; one that only tries is sent as a head alone."""
        if waiter.shard_id > MAX_NUMBER:
            raise ValueError(f"shard_id must be at most {MAX_NUMBER}, not {waiter.shard_id}")
        if not waiter.once:
            self.wants.joined.append(waiter)

    def compose(self, heads: list[Waiter], now_us: int, reader: LimitReader | None) -> Wants | None:
        """Return what is to be sent now, if anything.

        While the ledger is out of reach that is only for those who try once or wait for an answer.
        """
        wants, self.postponed = self.wants, []
        if self.failure is not None and now_us < self.retry_us:
            self.postponed = [head for head in heads if not head.once]
            heads[:] = [head for head in heads if head.once]
            for head in self.postponed:
                head.ask_at_us = self.retry_us
            if not heads and not wants.requests:
                return None
        if self.unannounced:
            wants.requests.append(Request("look"))
        wants.heads = heads
        asked = set(heads)
        wants.joined = [one for one in wants.joined if one.entry is not None and one not in asked]
        if not wants and not self._unsent:
            return None
        slow = reader is None or reader.is_resting(now_us) or reader.is_slow(now_us)
        wants.can_read = not slow
        self.wants = Wants()
        return wants

    @property
    def gives_up(self) -> bool:
        """Whether a closed queue need not try again to send what is left."""
        return self._failures >= MANY_FAILURES

    def wake_us(self) -> int:
        """Return when there is something to send, ``FOREVER_US`` if there is nothing."""
        if not self.wants and not self.unannounced and not self._unsent:
            return FOREVER_US
        return NEVER if self.failure is None or self.wants.requests else self.retry_us

    def note(self, wants: Wants, answers: Answers, now_us: int, lines: Lines) -> None:
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
            self.unannounced.clear()
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

    def log_reach(self) -> None:
        """Log that the ledger is out of reach, or answers again; without the lock."""
        reached, self._reached = self._reached, ""
        if reached:
            log.warning("%s", reached)

    def events(self, lines: Lines, now_us: int, *, looked: bool) -> list[Event]:
        """Return the events to emit, of those who wait by a look just made; a recent one for the log."""
        events, self._events = self._events, []
        look = self._look
        recent = not self._observed and look is not None and now_us - look.at_us <= RECENT_LOOK_US
        if look is None or look.outlook is None or not (looked or recent):
            return events
        waiting, self.unannounced = self.unannounced, []
        for waiter in waiting:
            if waiter.entry is None or waiter.permit is not None or waiter.error is not None:
                continue
            number = waiter.shard_id % look.outlook.max_concurrency
            line = lines.line(waiter)
            here = 0 if line is None else line.position(waiter, MAX_POSITION)
            position = max(look.position(waiter), here)
            total = max(sum(map(len, look.lines.values())), len(lines))
            in_us = forecast.rough_eta_us(
                look.outlook, number, position, len({number, *look.lines}), total
            )
            eta = None if in_us is None else in_us / US_PER_SECOND
            events.append(ShardWaiting(waiter.shard_id, number, position, eta, waiter.number))
        return events

    # --- errors -----------------------------------------------------------------------------------

    def timed_out(self, shard_id: int, timeout: float, *, unanswered: bool) -> LedgerError | None:
        """Return the error of who got no permit in time because the ledger is out of reach."""
        failure = self.failure
        if failure is None and unanswered:
            failure = LedgerError(f"{self.ledger!r} did not answer in time")
        if failure is None:
            return None
        error = LedgerError(f"shard {shard_id} got no permit within {timeout:g} s: {failure}")
        error.__cause__ = failure.__cause__ or TimeoutError()
        return error

    def unanswered(self, request: Request) -> LedgerError:
        """Return the error for a request that was not answered in time."""
        fate = ": it may or may not have been applied" if request.kind == "update" else ""
        error = LedgerError(f"{self.ledger!r} did not answer within 5 s{fate}")
        error.__cause__ = TimeoutError()
        return error
