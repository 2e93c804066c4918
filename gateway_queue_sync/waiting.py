"""How tickets wait: one mutex, lines, and whoever is first asks the ledger.

- One mutex guards the lines. Each thread that waits has a condition of its own over that mutex.
- A free bucket without a line grants at once (``_at_once``). Anybody else takes a ticket and joins a
  line. Only the first of a line asks the ledger, and sleeps for as long as it is told; everybody else
  sleeps until the front is handed to them. Whoever leaves, for whatever reason, wakes who is first then.
- A permit is stamped by the thread that takes it, as the last thing before it returns: first the line
  is left and the next one woken. If it still took longer than the margin to come back, the ticket
  takes its old place again and the permit is given back.

How a ledger is asked is left to two kinds of queue: ``in_memory.py`` asks with the mutex held,
``shared.py`` lets go of it meanwhile. The methods they fill in are abstract here.

What must be done outside the mutex (reading the limit anew, logging, observers) is returned by the code
inside it as an *errand*, and run by the thread that got it. Methods say where they are called: those
between the two rulers with the mutex held, all others without it.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from gateway_queue_sync import journal, rules
from gateway_queue_sync.clock import Clock
from gateway_queue_sync.errors import (
    AcquireTimeout,
    QueueClosed,
    SessionLimitExhausted,
    reentered,
)
from gateway_queue_sync.events import (
    BudgetExhausted,
    Event,
    LeaveReason,
    LimitUpdated,
    Observer,
    PermitReported,
    ShardGranted,
    ShardLeft,
    ShardWaiting,
)
from gateway_queue_sync.ledgers import Ledger
from gateway_queue_sync.lines import Agenda, Lines, Ticket
from gateway_queue_sync.models import Permit, Report, SessionStartLimit
from gateway_queue_sync.rules import MICROSECOND, Budget, Denial, Grant, Reason, to_us

if TYPE_CHECKING:
    from gateway_queue_sync.clock import Lock

log = logging.getLogger("gateway_queue_sync")

Refresh = Callable[[], SessionStartLimit]
Errand = Callable[[], object]

_LONGEST_SLEEP_US = int(threading.TIMEOUT_MAX) * MICROSECOND
_PATIENCE_WITH_INTERRUPTS = 100

forks = 0  # how often this process was forked off


def _count_fork() -> None:
    global forks  # noqa: PLW0603 - one fact about the process
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class Waiting(ABC):
    """The lines of one queue, and all that waits in them."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock,
        observer: Observer | None,
        refresh: Refresh | None,
        reserve: int,
        raises: bool,
    ) -> None:
        self._ledger = ledger
        self._now_us = clock.now_us
        self._condition = clock.condition
        self._observer = observer
        self._refresh = refresh
        self._reserve = reserve
        self._raises = raises
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        """Set up the mutex, and lines in which nobody waits."""
        # Reentrant, though nothing here re-enters it: Ctrl-C while a Condition over a plain Lock
        # takes it back leaves wait() without it and breaks exclusion (CPython #118433). What would
        # re-enter (a signal handler, a finalizer) is detected, and refused before it sees a
        # half-done state.
        self._mutex: Lock = threading.RLock()
        self._inside: Callable[[], bool] = self._mutex._is_owned  # type: ignore[attr-defined,unused-ignore]
        self._forks = forks
        self._lines = Lines(self._ledger.max_concurrency)
        self._threads: set[int] = set()  # the threads that stand in lines
        self._futures: set[Ticket] = set()  # the futures that stand in lines
        self._agenda = Agenda()  # when the futures' thread looks at which bucket
        self._bell = self._condition(self._mutex)  # wakes the futures' thread
        self._begun_waits, self._ended_waits = journal.Few(), journal.Few()  # what the log shows
        self._refresher: Ticket | None = None  # who reads the limit anew just now
        self._told_low = False  # the budget was said to run low, and has not recovered since
        self._told_end_us: int | None = None  # the same of its end: when it resets

    def _check_thread(self) -> None:
        """Refuse whoever would see a half-done state."""
        if self._inside():
            raise reentered()

    def _is_forked(self) -> bool:
        return self._forks != forks

    # --- at once ----------------------------------------------------------------------------------

    @abstractmethod
    def _at_once(self, shard_id: int) -> Permit | Grant | None:
        """Take a permit if the bucket is free and nobody waits for it, and if no ticket is needed.

        A bare ``Grant`` is one that came too late; the ticket that it is put on gives it back.
        """

    def _permit(self, grant: Grant, waited: float) -> Permit:
        return Permit(
            grant.shard_id, grant.bucket, waited, grant.remaining, self._book_report, grant
        )

    def _is_in_time(self, grant: Grant) -> bool:
        """Return whether the permit took no longer than the margin to come back."""
        margin_us = self._ledger.margin_us
        return not margin_us or self._now_us() - grant.stamp_us <= margin_us

    # --- waiting for a turn -----------------------------------------------------------------------

    def _wait_for_turn(self, ticket: Ticket, timeout: float | None) -> Permit:
        """Stand in line with this thread.

        Every way out without a permit ends in ``_step_out``. It is there twice, for an exception
        that is raised into this thread (Ctrl-C) at the very doorstep of the first.
        """
        try:
            try:
                return self._take_turns(ticket, timeout)
            except BaseException as error:
                self._step_out(ticket, reason_for(error))
                raise
        except BaseException as error:
            self._step_out(ticket, reason_for(error))
            raise

    def _take_turns(self, ticket: Ticket, timeout: float | None) -> Permit:
        while True:
            turn = self._sleep_until_turn(ticket, timeout)
            if not isinstance(turn, Grant):
                turn()
                continue
            permit = self._deliver(ticket, turn)
            if permit is not None:
                return permit

    def _sleep_until_turn(self, ticket: Ticket, timeout: float | None) -> Grant | Errand:
        """Sleep until there is a permit, or something to do outside the mutex."""
        with self._mutex:
            try:
                if (
                    self._join(ticket)
                    and timeout is not None
                    and self._left_us(ticket, timeout) < 0
                ):
                    raise self._timed_out(ticket, timeout)
                while True:
                    answer = self._ask(ticket)
                    if isinstance(answer, Grant):
                        return answer
                    errand = self._errand_before_sleep(ticket, answer)
                    if errand is not None:
                        return errand
                    sleep_us = longest_sleep_us(answer)
                    left_us = None
                    if timeout is not None:
                        left_us = self._left_us(ticket, timeout)
                        if left_us <= 0:
                            raise self._timed_out(ticket, timeout)
                        sleep_us = left_us if sleep_us is None else min(sleep_us, left_us)
                    announcement = self._announcement(ticket, left_us)
                    if announcement is not None:
                        return announcement
                    if ticket.condition is None:
                        ticket.condition = self._condition(self._mutex)
                    ticket.condition.wait(as_timeout(sleep_us))
            finally:
                # wait(), interrupted right after it has let go of the mutex, ends without it.
                if not self._inside():
                    self._mutex.acquire()

    def _deliver(self, ticket: Ticket, grant: Grant) -> Permit | None:
        """Return the permit to hand over, or ``None`` if it came too late.

        While an observer or the log is told, the ticket stays first in its line, and the permit is
        stamped after that: what they take is nobody's gap.
        """
        waited = max(0, grant.stamp_us - ticket.arrived_us) / MICROSECOND
        permit = self._permit(grant, waited)
        if self._is_told_of(ticket):
            self._tell_granted(ticket, grant, waited)
            with self._mutex:
                if not self._hand_on(ticket, grant):
                    return None
        return permit if self._is_in_time(grant) else None

    def _is_told_of(self, ticket: Ticket) -> bool:
        """Return whether somebody is told of the ticket's permit."""
        shown = ticket.followed or ticket.unshown is not None or ticket.warning is not None
        return shown or self._observer is not None

    def _tell_granted(self, ticket: Ticket, grant: Grant, waited: float) -> None:
        """Tell it once: a permit that got too late by that is asked for again, and is in time then."""
        if ticket.told:
            return
        ticket.told = True
        event = ShardGranted(grant.shard_id, grant.bucket, waited, grant.remaining)
        if ticket.followed or ticket.unshown is not None:
            journal.granted(event, ticket.unshown or 0)
        if ticket.warning is not None:
            ticket.warning()
        self._tell(event)

    # ----------------------------------------------------------------------------------------------
    # Lines: with the mutex held

    def _join(self, ticket: Ticket) -> bool:
        """Take the ticket's place in its line; return whether it came back with a late permit."""
        if self._closed:
            raise QueueClosed
        if ticket.future is None:
            self._threads.add(threading.get_ident())
        else:
            self._futures.add(ticket)
        if not ticket.waiting:
            self._lines.join(ticket)
        if ticket.grant is None:
            return False
        grant, ticket.grant = ticket.grant, None
        self._return_grant(grant)  # its own place is taken before: nobody passes it by this
        return True

    def _leave(self, ticket: Ticket) -> None:
        """Leave the line and hand its front on; harmless when repeated."""
        if ticket.future is None:
            self._threads.discard(threading.get_ident())
        else:
            self._futures.discard(ticket)
            if not self._futures:
                self._bell.notify()  # their thread may go
        self._lines.leave(ticket)
        self._call_up(self._lines.first(self._lines.bucket(ticket)))

    def _call_up(self, ticket: Ticket | None) -> None:
        """Hand the front of a line to who is first now."""
        self._wake(ticket)

    def _wake(self, ticket: Ticket | None) -> None:
        """Let the first of a line look whether it may go."""
        if ticket is None:
            return
        if ticket.future is not None:
            self._look_at(ticket)
        elif ticket.condition is not None:
            ticket.condition.notify()

    def _look_at(self, ticket: Ticket) -> None:
        """Have the futures' thread look at a future that is the first of its line."""
        self._agenda.set(self._lines.bucket(ticket), rules.NEVER)
        self._bell.notify()

    def _wake_all_firsts(self) -> None:
        for ticket in self._lines.firsts():
            self._wake(ticket)

    @abstractmethod
    def _ask(self, ticket: Ticket) -> Grant | Denial | None:
        """Ask the ledger for the ticket's permit if it is the first of its line, else ``None``.

        May let go of the mutex meanwhile. With a permit, a ticket leaves its line; one that an
        observer or the log is told of, after that.
        """

    def _is_its_turn(self, ticket: Ticket) -> bool:
        """Return whether the ticket is the first of its line, and has nothing yet."""
        if self._closed:
            raise QueueClosed
        self._reline_if_changed()
        first = self._lines.first(self._lines.bucket(ticket))
        return first is ticket and ticket.grant is None

    def _accept(self, ticket: Ticket, grant: Grant) -> None:
        """Put a permit on the ticket that asked for it."""
        ticket.grant = grant
        waited = (grant.stamp_us - ticket.arrived_us) / MICROSECOND
        if journal.is_long(waited) and journal.follows_shards():
            ticket.unshown = self._ended_waits.count(self._now_us())
        if not ticket.told:
            ticket.warning = self._low_budget()
        if not self._is_told_of(ticket):
            self._hand_on(ticket, grant)

    @abstractmethod
    def _hand_on(self, ticket: Ticket, grant: Grant) -> bool:
        """Leave the line with a permit, wake the next one, and stamp the permit last if need be.

        Return whether the permit is still good: new buckets may have been laid out meanwhile.
        """

    def _errand_before_sleep(self, ticket: Ticket, denial: Denial | None) -> Errand | None:
        """Return what a denial makes the first of a line do outside the mutex, if anything."""
        if denial is None or denial.reason is Reason.WINDOW:
            return None
        if denial.reason is Reason.BUDGET:
            told_us, resets_at_us = self._told_end_us, self._now_us() + denial.resets_in_us
            if told_us is None or abs(resets_at_us - told_us) > journal.MOVED * MICROSECOND:
                self._told_end_us = resets_at_us
                return partial(self._tell_end, denial)
            if self._raises:
                raise SessionLimitExhausted(denial.remaining, denial.resets_in_us / MICROSECOND)
            return None
        if self._refresher is not None and self._refresher is not ticket:
            return None  # somebody reads the limit anew already, and wakes all firsts afterwards
        self._refresher = ticket
        return partial(self._renew_limit, ticket, denial)

    def _low_budget(self) -> Errand | None:
        """Return the telling, once until it has well recovered, that the budget runs low.

        A few permits that are given back are no recovery.
        """
        left = self._left()
        if left is None:
            return None
        low_from = journal.low_from(left.total, self._reserve)
        if left.remaining > 2 * low_from - self._reserve:
            self._told_low, self._told_end_us = False, None
        elif left.remaining <= low_from and not self._told_low:
            self._told_low = True
            if left.remaining > self._reserve:
                return partial(journal.low, left, self._reserve)
        return None

    @abstractmethod
    def _left(self) -> Budget | None:
        """Return the budget, as far as is known here."""

    def _announcement(self, ticket: Ticket, left_us: int | None = None) -> Errand | None:
        """Return the telling, once, that this ticket has to wait: an observer, and the log if long.

        Of a ticket that waits no longer than ``left_us`` if that is not long, the log tells nothing.
        """
        if ticket.announced:
            return None
        logs = self._is_for_the_log(left_us)
        if self._observer is None and not logs:
            return None
        ticket.announced = True
        unshown = (
            self._begun_waits.count(self._now_us()) if logs and self._waits_long(ticket) else None
        )
        if self._observer is None and unshown is None:
            return None
        before = self._lines.before(ticket)
        number, eta = self._lines.bucket(ticket), self._eta(ticket, before)
        event = ShardWaiting(ticket.shard_id, number, before, eta)
        return partial(self._tell_waiting, ticket, event, unshown)

    def _is_for_the_log(self, left_us: int | None) -> bool:
        """Return whether the log may be told of one who waits for so long at most."""
        patient = left_us is None or journal.is_long(left_us / MICROSECOND)
        return patient and journal.follows_shards()

    def _waits_long(self, ticket: Ticket) -> bool:
        """Return whether a place in line will wait for long, without looking through the line."""
        enough = int(journal.LONG_WAIT * MICROSECOND) // self._ledger.window_us + 1
        line = self._lines.by_bucket[self._lines.bucket(ticket)]
        before = enough if line.has_before(ticket, enough) else line.before(ticket)
        return journal.is_long(self._eta(ticket, before))

    def _reline_if_changed(self) -> None:
        """Give everybody, in their order, the line of the bucket that is theirs now."""
        if self._lines.max_concurrency != self._ledger.max_concurrency:
            self._lines = Lines(self._ledger.max_concurrency, self._lines)
            self._wake_all_firsts()

    @abstractmethod
    def _return_grant(self, grant: Grant) -> None:
        """Refund a permit and wake whom that helps."""

    @abstractmethod
    def _eta(self, ticket: Ticket, before: int) -> float | None:
        """Return in about how many seconds a place in line should get its permit, at a glance."""

    def _timed_out(self, ticket: Ticket, timeout: float) -> Exception:
        """Return what to raise for a ticket whose timeout has passed."""
        return AcquireTimeout(ticket.shard_id, timeout)

    def _left_us(self, ticket: Ticket, timeout: float) -> int:
        """Return how much of its timeout a ticket has left; negative once that has passed."""
        return ticket.arrived_us + to_us(timeout) - self._now_us()

    # ----------------------------------------------------------------------------------------------
    # Errands and ways out: without the mutex

    def _step_out(self, ticket: Ticket, reason: LeaveReason) -> None:
        """Leave without a permit: give back what was granted, hand the front on, whoever interrupts.

        Repeating it changes nothing; an exception raised into the midst of it makes it start over,
        and goes on its way when all is done.
        """
        told = interrupt = None
        for _ in range(_PATIENCE_WITH_INTERRUPTS):
            try:
                with self._mutex:
                    was_in = ticket.waiting or ticket.grant is not None
                    told = told or (was_in and ticket.announced)
                    if self._refresher is ticket and reason != "cancelled":
                        self._wake_all_firsts()
                        self._refresher = None
                    if ticket.grant is not None:
                        self._return_grant(ticket.grant)
                        ticket.grant = None
                    self._leave(ticket)
                break
            except BaseException as error:  # noqa: BLE001 - raised again below
                interrupt = error
        if interrupt is not None:
            raise interrupt
        if told:
            waited_us = max(0, self._now_us() - ticket.arrived_us)
            event = ShardLeft(ticket.shard_id, waited_us / MICROSECOND, reason)
            if ticket.followed and journal.is_long(event.waited) and reason != "closed":
                journal.left(event)
            self._tell(event)

    def _renew_limit(self, ticket: Ticket, denial: Denial) -> None:
        """Read the limit anew at a reset; if that fails the last known total counts.

        An answer that an ``update`` has overtaken is dropped.
        """
        limit = failure = None
        try:
            assert self._refresh is not None
            limit = self._refresh()
            self._check_limit(limit)
        except Exception as error:  # noqa: BLE001 - whatever it is, the queue goes on
            failure = error
            ticket.trusted_period = denial.period
            counts = self._trust(denial)
        else:
            limit = self._renew(limit, denial)
        with self._mutex:
            self._wake_all_firsts()
            if self._refresher is ticket:
                self._refresher = None
        if failure is None and limit is not None:
            self._tell(LimitUpdated(limit))
        elif failure is not None and counts:
            log.warning(
                "could not read the session start limit at its reset (%s: %s); the last known total "
                "counts, and the next permit asks again",
                type(failure).__name__,
                failure,
            )

    @abstractmethod
    def _renew(self, limit: SessionStartLimit, denial: Denial) -> SessionStartLimit | None:
        """Adopt what was read at the reset that a denial told of; ``None`` if that is overtaken."""

    @abstractmethod
    def _trust(self, denial: Denial) -> bool:
        """Let the last known total count at the reset that a denial told of, unless overtaken."""

    def _check_limit(self, limit: object) -> None:
        rules.check_limit(limit, self._reserve)

    def _book_report(self, permit: Permit, report: Report) -> None:
        """Book what the holder of a permit says became of it, unless it says so twice."""
        if self._is_forked():
            return  # the account in this child is a copy that grants nothing
        self._check_thread()
        with self._mutex:
            before = permit.reported
            news = before is None or (before is Report.SENT and report is Report.REJECTED)
            if news:
                permit.reported = report
                if report is Report.UNUSED:
                    self._return_grant(permit._grant)
                else:
                    self._ledger.report(permit._grant, report)
        if news:
            self._tell(PermitReported(permit.shard_id, permit.bucket, report))
        elif Report.UNUSED in (before, report) and before is not report:
            log.warning("%r was reported %s: that changes nothing now", permit, report.value)

    def _tell_waiting(self, ticket: Ticket, event: ShardWaiting, unshown: int | None) -> None:
        if unshown is not None:
            ticket.followed = True
            journal.waiting(event, unshown)
        self._tell(event)

    def _tell_end(self, denial: Denial) -> None:
        event = BudgetExhausted(denial.remaining, denial.resets_in_us / MICROSECOND)
        journal.used_up(event, self._reserve)
        self._tell(event)

    def _tell(self, event: Event) -> None:
        if self._observer is None:
            return
        try:
            self._observer(event)
        except Exception:
            log.exception("an observer raised on %r; the queue goes on", event)


def longest_sleep_us(denial: Denial | None) -> int | None:
    """Return how long a denial lets its ticket sleep; ``None``: until it is woken."""
    return None if denial is None or denial.reason is Reason.RESET else denial.wait_us


def as_timeout(sleep_us: int | None) -> float | None:
    """Return what a condition may be asked to sleep, in seconds."""
    return None if sleep_us is None else min(sleep_us, _LONGEST_SLEEP_US) / MICROSECOND


def reason_for(error: BaseException) -> LeaveReason:
    """Return in an observer's words why somebody left with this error."""
    if isinstance(error, AcquireTimeout):
        return "timeout"
    if isinstance(error, QueueClosed):
        return "closed"
    if isinstance(error, SessionLimitExhausted):
        return "exhausted"
    return "error" if isinstance(error, Exception) else "interrupted"
