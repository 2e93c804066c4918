"""Waiting: threads and futures that stand in lines for their bucket's next permit.

How it works, in the order in which the code below is read:

- One mutex guards the lines. Each thread that waits has a condition of its own over that mutex.
- A free bucket without a line grants at once (``_at_once``). Anybody else takes a ticket and joins
a line.
- Only the first of a line asks the ledger, and sleeps for as long as it is told; everybody else
sleeps
  until the front is handed to them. Whoever leaves, for whatever reason, wakes who is first then.
- A permit is stamped by the thread that takes it, as the last thing before it returns: first the
line is
  left and the next one woken. If it still took longer than the margin to come back, it is given
  back.
- The futures of ``enqueue`` have tickets like everybody; one thread asks for those that are first.

What must be done outside the mutex (reading the limit anew, logging, observers) is returned by the
code inside it, and done by the thread that got it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol, Self, runtime_checkable

from gateway_queue_sync import forecast, rules
from gateway_queue_sync.clock import MICROSECOND, Clock
from gateway_queue_sync.errors import AcquireTimeout, QueueClosed, SessionLimitExhausted
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
from gateway_queue_sync.lines import Agenda, Lines, PermitFuture, Ticket
from gateway_queue_sync.models import (
    Permit,
    QueueSnapshot,
    Report,
    SessionStartLimit,
    real_number,
    whole_number,
)
from gateway_queue_sync.rules import Denial, Grant, Reason, to_us

if TYPE_CHECKING:
    from gateway_queue_sync.clock import Lock

log = logging.getLogger("gateway_queue_sync")

WhenExhausted = Literal["wait", "raise"]
Refresh = Callable[[], SessionStartLimit]
Errand = Callable[[], object]

_LONGEST_SLEEP_US = int(threading.TIMEOUT_MAX) * MICROSECOND
_PATIENCE_WITH_INTERRUPTS = 100

_forks = 0  # how often this process was forked off


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - one fact about the process
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


@runtime_checkable
class Queue(Protocol):
    """All that a framework needs of a queue. Write your own broker on it."""

    def acquire(self, shard_id: int, timeout: float | None = None) -> Permit:
        """Block until the shard may identify, for at most ``timeout`` seconds; raise if it may not."""


class GatewayQueue:
    """A queue that blocks threads until their shards may identify: what every queue here is.

    Made by its policies (``LocalQueue``, ``LargeBotQueue``, ...), each a choice of ledger. All
    methods may be called from any thread, but not from a signal handler or finalizer that
    interrupts one of them (``RuntimeError``); ``close`` may be called from there, too. As a context
    manager it closes itself at the end.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Clock,
        observer: Observer | None = None,
        refresh: Refresh | None = None,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
    ) -> None:
        if when_exhausted not in ("wait", "raise"):
            raise ValueError(f'when_exhausted must be "wait" or "raise", not {when_exhausted!r}')
        for name, callback in (("observer", observer), ("refresh", refresh)):
            if callback is not None and not callable(callback):
                raise TypeError(f"{name} must be callable, not {type(callback).__name__}")
        self._ledger = ledger
        self._now_us = clock.now_us
        self._condition = clock.condition
        self._observer = observer
        self._refresh = refresh
        self._reserve = whole_number("reserve", reserve)
        self._raises = when_exhausted == "raise"
        # Reentrant, though nothing here re-enters it: Ctrl-C while a Condition over a plain Lock
        # takes it back leaves wait() without it and breaks exclusion (CPython #118433). What would
        # re-enter (a signal handler, a finalizer) is detected, and refused before it sees a
        # half-done state.
        self._mutex: Lock = threading.RLock()
        self._inside: Callable[[], bool] = self._mutex._is_owned  # type: ignore[attr-defined,unused-ignore]
        self._forks = _forks
        self._closed = False
        self._lines = Lines(ledger.max_concurrency)
        self._threads: set[int] = set()  # the threads that stand in lines
        self._refresher: Ticket | None = None  # who reads the limit anew just now
        self._warned_of_period: int | None = None  # the budget whose end was told
        self._futures: set[Ticket] = set()  # the futures that stand in lines
        self._agenda = Agenda()  # when the futures' thread looks at which bucket
        self._bell = clock.condition(self._mutex)  # wakes the futures' thread
        self._server: threading.Thread | None = None  # the futures' thread

    def _start_with(self, limit: SessionStartLimit) -> None:
        """Adopt the limit that a policy was made with, before anybody can wait."""
        self._check_limit(limit)
        self._adopt(limit)

    # --- what users call --------------------------------------------------------------------------

    def acquire(
        self, shard_id: int, timeout: float | None = None, *, priority: float = 0.0
    ) -> Permit:
        """Block until the shard may identify, and return its permit.

        With no permit available the calling thread waits in its bucket's line: first come, first
        served. Waiting costs nothing: a call that times out or is interrupted uses up no permit.

        Args:
            shard_id: the shard that wants to IDENTIFY, from 0 on.
            timeout: the longest wait in seconds; ``None`` or ``inf`` waits for ever, 0 tries once.
            priority: a head start in seconds: the shard counts as having arrived that much earlier
                (a negative one stands back). Nobody starves by it.

        Raises:
            AcquireTimeout: no permit came in time; its ``eta`` says when one would have.
            SessionLimitExhausted: the limit is used up, and the queue was made to raise then.
            QueueClosed: the queue is closed, or was while waiting.
            TypeError, ValueError: an argument is no shard id, no timeout or no priority.
            RuntimeError: called from a signal handler or finalizer that interrupted this queue, or
            in
                a forked child.
        """
        if type(shard_id) is not int or shard_id < 0:
            shard_id = whole_number("shard_id", shard_id)
        if timeout is not None:
            timeout = _patience(timeout)
        priority_us = 0 if priority == 0.0 and type(priority) is float else _head_start(priority)
        permit = self._at_once(shard_id)
        if permit is None:
            ticket = Ticket(shard_id, self._now_us(), priority_us)
            permit = self._wait_for_turn(ticket, timeout)
        return permit

    def try_acquire(self, shard_id: int) -> Permit | None:
        """Return a permit if the shard may identify now, else ``None``; nobody in line is passed.

        Raises:
            SessionLimitExhausted: the limit is used up, and the queue was made to raise then.
            QueueClosed: the queue is closed.
            TypeError, ValueError: ``shard_id`` is no shard id.
            RuntimeError: as ``acquire`` does.
        """
        shard_id = whole_number("shard_id", shard_id)
        permit = self._at_once(shard_id)
        if permit is None:
            with contextlib.suppress(AcquireTimeout):
                permit = self._wait_for_turn(Ticket(shard_id, self._now_us()), 0.0)
        return permit

    def enqueue(self, shard_id: int, *, priority: float = 0.0) -> Future[Permit]:
        """Join the line without a thread, and return the future of the permit.

        On a free bucket the future is done at once. Cancelling it leaves the line and uses up
        nothing; once ``cancel`` says no, the permit is there and must be used or given back
        (``unused``). Callbacks run in the one thread that serves all futures: keep them quick, and
        never block in them on this queue. The future carries ``QueueClosed`` if the queue is closed
        before its turn, and ``SessionLimitExhausted`` if the queue was made to raise that. From
        asyncio::

            permit = await asyncio.wrap_future(queue.enqueue(shard_id))

        Args:
            shard_id: the shard that wants to IDENTIFY, from 0 on.
            priority: a head start in seconds, as for ``acquire``.

        Raises:
            QueueClosed: the queue is closed.
            TypeError, ValueError: an argument is no shard id or no priority.
            RuntimeError: as ``acquire`` does.
        """
        shard_id = whole_number("shard_id", shard_id)
        priority_us = _head_start(priority)
        future = PermitFuture()
        permit = self._at_once(shard_id)
        if permit is not None:
            future.set_running_or_notify_cancel()
            future.set_result(permit)
            return future
        ticket = Ticket(shard_id, self._now_us(), priority_us, future)
        future.on_cancel = partial(self._step_out, ticket, "cancelled")
        try:
            self._join_as_future(ticket)
        except BaseException:
            future.cancel()
            raise
        return future

    def update(self, limit: SessionStartLimit) -> None:
        """Adopt a session start limit, as it is given; who waits for the budget goes on at once.

        Another ``max_concurrency`` puts everybody in the line of their new bucket, in their order;
        every new bucket starts from the latest grant of any old one.

        Raises:
            TypeError: ``limit`` is no ``SessionStartLimit``.
            ValueError: its ``total`` is not more than this queue's reserve.
            QueueClosed: the queue is closed.
            RuntimeError: as ``acquire`` does.
        """
        self._check_limit(limit)
        self._check_thread()
        with self._mutex:
            if self._closed:
                raise QueueClosed
            self._adopt(limit)
        self._tell(LimitUpdated(limit))

    def snapshot(self) -> QueueSnapshot:
        """Return who waits where, until when, and what is left of the budget; works when closed, too.

        Raises:
            RuntimeError: as ``acquire`` does.
        """
        self._check_thread()
        with self._mutex:  # only copying in here: the arithmetic may take long
            now_us = self._now_us()
            outlook = self._outlook(range(self._ledger.max_concurrency))
            tickets = {number: list(line) for number, line in self._lines.by_bucket.items()}
            granted = self._ledger.account()[0].granted
        return forecast.snapshot(outlook, tickets, now_us, granted)

    def close(self) -> None:
        """Grant no more permits: whoever waits gets ``QueueClosed``. Closing again changes nothing."""
        if self._forks != _forks:
            self._closed = True
            return
        if self._inside():  # a signal handler, in the midst of something: right after that, then
            threading.Thread(target=self.close, name="gateway-queue-close").start()
            return
        with self._mutex:
            self._closed = True
            tickets = list(self._lines)
            for ticket in tickets:
                if ticket.future is not None:
                    self._leave(ticket)
                else:
                    self._wake(ticket)
        for ticket in tickets:
            if ticket.future is not None:
                self._fail(ticket, QueueClosed())

    @property
    def closed(self) -> bool:
        """Whether the queue was closed."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        account, _, wall_us = self._ledger.account()
        left = rules.budget(account, wall_us)
        budget = "" if left is None else f" remaining={left.remaining}/{left.total}"
        state = " closed" if self._closed else ""
        waiting = len(self._threads) + len(self._futures)
        return f"<{type(self).__name__} waiting={waiting} granted={account.granted}{budget}{state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: its lines and its account live in "
            f"this process; to share one account over processes use SqliteQueue or RedisQueue"
        )

    # --- at once ----------------------------------------------------------------------------------

    def _at_once(self, shard_id: int) -> Permit | None:
        """Take a permit if the bucket is free and nobody waits for it."""
        if self._forks != _forks or self._inside():
            self._check_thread()
        grant: Grant | Denial | None = None
        try:
            with self._mutex:
                if self._closed:
                    raise QueueClosed
                if self._threads and get_ident() in self._threads:
                    raise _reentered()
                if shard_id % self._ledger.max_concurrency in self._lines.by_bucket:
                    return None
                grant = self._ledger.take(shard_id, self._reserve, self._refresh is not None)
            return self._deliver(grant, 0.0) if isinstance(grant, Grant) else None
        except BaseException:
            if isinstance(grant, Grant):
                self._give_back(grant)
            raise

    def _deliver(self, grant: Grant, waited: float) -> Permit | None:
        """Return the permit, or ``None`` if it took longer than the margin and was given back.

        Outside the mutex. What an observer takes is nobody's gap: the permit is stamped anew after
        it.
        """
        permit = Permit(
            grant.shard_id, grant.bucket, waited, grant.remaining, self._book_report, grant
        )
        fresh = True
        if self._observer is not None:
            self._tell(ShardGranted(grant.shard_id, grant.bucket, waited, grant.remaining))
            with self._mutex:
                fresh = self._ledger.restamp(grant)
        margin_us = self._ledger.margin_us
        if fresh and (not margin_us or self._now_us() - grant.stamp_us <= margin_us):
            return permit
        self._give_back(grant)
        return None

    # --- waiting for a turn -----------------------------------------------------------------------

    def _wait_for_turn(self, ticket: Ticket, timeout: float | None) -> Permit:
        """Stand in line with this thread.

        Every way out without a permit ends in ``_step_out``. It is there twice, for an exception
        that is raised into this thread (Ctrl-C) at the very doorstep of the first.
        """
        if threading.current_thread() is self._server:
            raise RuntimeError("a future's callback must not block on the queue that serves it")
        try:
            try:
                return self._take_turns(ticket, timeout)
            except BaseException as error:
                self._step_out(ticket, _reason_for(error))
                raise
        except BaseException as error:
            self._step_out(ticket, _reason_for(error))
            raise

    def _take_turns(self, ticket: Ticket, timeout: float | None) -> Permit:
        while True:
            turn = self._sleep_until_turn(ticket, timeout)
            if not isinstance(turn, Grant):
                turn()
                continue
            permit = self._deliver(turn, _waited(ticket, turn))
            if permit is not None:
                return permit

    def _sleep_until_turn(self, ticket: Ticket, timeout: float | None) -> Grant | Errand:
        """Sleep until there is a permit, or something to do outside the mutex."""
        with self._mutex:
            try:
                self._join(ticket)
                while True:
                    answer = self._ask(ticket)
                    if isinstance(answer, Grant):
                        return answer
                    errand = self._errand_before_sleep(ticket, answer)
                    sleep_us = _sleep_us(answer)
                    if errand is None and timeout is not None:
                        left_us = ticket.arrived_us + to_us(timeout) - self._now_us()
                        if left_us <= 0:
                            raise AcquireTimeout(ticket.shard_id, timeout, self._eta(ticket))
                        sleep_us = left_us if sleep_us is None else min(sleep_us, left_us)
                    errand = errand or self._announcement(ticket)
                    if errand is not None:
                        return errand
                    if ticket.condition is None:
                        ticket.condition = self._condition(self._mutex)
                    ticket.condition.wait(_timeout(sleep_us))
            finally:
                # wait(), interrupted right after it has let go of the mutex, ends without it.
                if not self._inside():
                    self._mutex.acquire()

    # --- lines: all of these with the mutex held --------------------------------------------------

    def _join(self, ticket: Ticket) -> None:
        """Take the ticket's place in its line, unless it stands there already."""
        if self._closed:
            raise QueueClosed
        if ticket.waiting:
            return
        ticket.grant = None
        if ticket.future is None:
            self._threads.add(get_ident())
        else:
            self._futures.add(ticket)
        self._lines.join(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """Leave the line and hand its front on; harmless when repeated."""
        if ticket.future is None:
            self._threads.discard(get_ident())
        else:
            self._futures.discard(ticket)
            if not self._futures:
                self._bell.notify()  # their thread may go
        self._lines.leave(ticket)
        self._wake(self._lines.first(self._lines.bucket(ticket)))

    def _wake(self, ticket: Ticket | None) -> None:
        """Let the first of a line look whether it may go."""
        if ticket is None:
            return
        if ticket.future is not None:
            self._agenda.set(self._lines.bucket(ticket), rules.NEVER)
            self._bell.notify()
        elif ticket.condition is not None:
            ticket.condition.notify()

    def _wake_all_firsts(self) -> None:
        for ticket in self._lines.firsts():
            self._wake(ticket)

    def _ask(self, ticket: Ticket) -> Grant | Denial | None:
        """Ask the ledger for the ticket's permit if it is the first of its line, else ``None``.

        With a permit it has left its line, the next one is awake, and the stamp is the last thing
        done.
        """
        if self._closed:
            raise QueueClosed
        if self._lines.max_concurrency != self._ledger.max_concurrency:
            self._reline()
        if self._lines.first(self._lines.bucket(ticket)) is not ticket:
            return None
        can_refresh = self._refresh is not None and not ticket.refresh_failed
        answer = self._ledger.take(ticket.shard_id, self._reserve, can_refresh)
        if isinstance(answer, Grant):
            ticket.grant = answer
            self._leave(ticket)
            self._ledger.restamp(answer)
        return answer

    def _errand_before_sleep(self, ticket: Ticket, denial: Denial | None) -> Errand | None:
        """Return what a denial makes the first of a line do outside the mutex, if anything."""
        if denial is None or denial.reason is Reason.WINDOW:
            return None
        if denial.reason is Reason.BUDGET:
            if self._raises:
                raise SessionLimitExhausted(denial.remaining, denial.resets_in_us / MICROSECOND)
            if self._warned_of_period == denial.period:
                return None
            self._warned_of_period = denial.period
            return partial(self._warn_of_end, denial)
        if self._refresher is not None and self._refresher is not ticket:
            return None  # somebody reads the limit anew already, and wakes all firsts afterwards
        self._refresher = ticket
        return partial(self._renew_limit, ticket)

    def _announcement(self, ticket: Ticket) -> Errand | None:
        """Return the telling of an observer, once, that this ticket has to wait."""
        if self._observer is None or ticket.announced:
            return None
        ticket.announced = True
        number = self._lines.bucket(ticket)
        before = self._lines.before(ticket)
        return partial(self._tell, ShardWaiting(ticket.shard_id, number, before, self._eta(ticket)))

    def _reline(self) -> None:
        """Give everybody, in their order, the line of the bucket that is theirs now."""
        self._lines = Lines(self._ledger.max_concurrency, self._lines)

    def _adopt(self, limit: SessionStartLimit) -> None:
        try:
            self._ledger.adopt(limit)
        finally:
            self._reline()
            self._wake_all_firsts()

    def _outlook(self, numbers: Iterable[int]) -> forecast.Outlook:
        account, now_us, wall_us = self._ledger.account()
        return forecast.Outlook(
            window_us=account.window_us,
            period_us=account.period_us,
            reserve=self._reserve,
            ready_in_us={number: rules.ready_in_us(account, number, now_us) for number in numbers},
            budget=rules.budget(account, wall_us),
        )

    def _eta(self, ticket: Ticket) -> float | None:
        """Return in how many seconds the ticket, which stands in its line, should get its permit."""
        lengths = self._lines.lengths()
        before = self._lines.before(ticket)
        in_us = forecast.eta_us(self._outlook(lengths), self._lines.bucket(ticket), before, lengths)
        return None if in_us is None else in_us / MICROSECOND

    # --- errands and ways out: none of these with the mutex held ----------------------------------

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
                        self._refresher = None
                        self._wake_all_firsts()
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
            self._tell(ShardLeft(ticket.shard_id, waited_us / MICROSECOND, reason))

    def _give_back(self, grant: Grant) -> None:
        """Undo a grant that reached nobody."""
        with self._mutex:
            self._return_grant(grant)

    def _return_grant(self, grant: Grant) -> None:
        """Refund a permit and wake whom that helps; with the mutex held."""
        self._ledger.report(grant, Report.UNUSED)
        account = self._ledger.account()[0]
        if account.total is not None and account.remaining == self._reserve + 1:
            self._wake_all_firsts()  # there was nothing left to grant
        else:
            self._wake(self._lines.first(grant.shard_id % self._lines.max_concurrency))

    def _renew_limit(self, ticket: Ticket) -> None:
        """Read the limit anew at a reset; if that fails the last known total counts."""
        limit = None
        try:
            assert self._refresh is not None
            limit = self._refresh()
            self._check_limit(limit)
            if limit.remaining < limit.total:  # if it is used up again, ask not before a second
                soonest = rules.SOONEST_REASK_US / MICROSECOND
                limit = replace(limit, reset_after=max(limit.reset_after, soonest))
        except Exception as error:  # noqa: BLE001 - whatever it is, the queue goes on
            limit = None
            log.warning(
                "could not read the session start limit at its reset (%s: %s); the last known total "
                "counts, and the next permit asks again",
                type(error).__name__,
                error,
            )
        with self._mutex:
            if self._refresher is ticket:
                self._refresher = None
            if limit is None:
                ticket.refresh_failed = True
                self._ledger.refresh_failed()
                self._wake_all_firsts()
            else:
                self._adopt(limit)
        if limit is not None:
            self._tell(LimitUpdated(limit))

    def _warn_of_end(self, denial: Denial) -> None:
        resets_in = denial.resets_in_us / MICROSECOND
        until = datetime.now().astimezone() + timedelta(seconds=resets_in)
        log.warning(
            "the session start limit is used up (%d left, reserve %d): no shard may identify until %s "
            "(in %.0f s)",
            denial.remaining,
            self._reserve,
            until.strftime("%Y-%m-%d %H:%M:%S %Z"),
            resets_in,
        )
        self._tell(BudgetExhausted(denial.remaining, resets_in))

    def _book_report(self, permit: Permit, report: Report) -> None:
        """Book what the holder of a permit says became of it, unless it says so twice."""
        if self._forks != _forks:
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

    def _tell(self, event: Event) -> None:
        if self._observer is None:
            return
        try:
            self._observer(event)
        except Exception:
            log.exception("an observer raised on %r; the queue goes on", event)

    # --- the futures' thread ----------------------------------------------------------------------

    def _join_as_future(self, ticket: Ticket) -> None:
        with self._mutex:
            self._join(ticket)
            if self._lines.first(self._lines.bucket(ticket)) is ticket:
                self._wake(ticket)
            announcement = self._announcement(ticket)
            if self._server is None or not self._server.is_alive():
                self._server = threading.Thread(
                    target=self._serve_futures, name="gateway-queue-futures", daemon=True
                )
                self._server.start()
        if announcement is not None:
            announcement()

    def _serve_futures(self) -> None:
        """Ask for the futures that are first of their lines, until no future stands in any."""
        while (turn := self._sleep_until_future_turn()) is not None:
            ticket, answer = turn
            try:
                if isinstance(answer, Grant):
                    self._fulfil(ticket, answer)
                else:
                    answer()
            except BaseException as error:  # noqa: BLE001 - the future's holder gets it
                self._fail(ticket, error)

    def _sleep_until_future_turn(self) -> tuple[Ticket, Grant | Errand] | None:
        with self._mutex:
            while self._futures:
                now_us, at_us = self._now_us(), self._agenda.next_us
                if at_us is None or at_us > now_us:
                    self._bell.wait(_timeout(None if at_us is None else at_us - now_us))
                    continue
                number = self._agenda.pop()
                ticket = self._lines.first(number)
                if ticket is None or ticket.future is None:
                    continue
                try:
                    answer = self._ask(ticket)
                    if isinstance(answer, Grant):
                        return ticket, answer
                    errand = self._errand_before_sleep(ticket, answer)
                except Exception as error:  # noqa: BLE001 - the future's holder gets it
                    return ticket, partial(self._fail, ticket, error)
                sleep_us = _sleep_us(answer)
                if sleep_us is not None:
                    self._agenda.set(number, now_us + sleep_us)
                if errand is not None:
                    return ticket, errand
            self._server = None
            return None

    def _fulfil(self, ticket: Ticket, grant: Grant) -> None:
        """Hand a permit to its future, unless that was cancelled."""
        assert ticket.future is not None
        if not ticket.claim():
            self._step_out(ticket, "cancelled")
            return
        permit = self._deliver(grant, _waited(ticket, grant))
        if permit is None:
            self._join_as_future(ticket)
        else:
            ticket.grant = ticket.future.on_cancel = None
            ticket.future.set_result(permit)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """Give a future an error instead of a permit."""
        self._step_out(ticket, _reason_for(error))
        if ticket.claim() and ticket.future is not None and not ticket.future.done():
            ticket.future.set_exception(error)

    # --- checks -----------------------------------------------------------------------------------

    def _check_thread(self) -> None:
        if self._forks != _forks:
            raise RuntimeError(
                f"this {type(self).__name__} was made before the process forked: its account "
                "stayed with the parent; to share one over processes use SqliteQueue"
            )
        if self._inside():
            raise _reentered()

    def _check_limit(self, limit: object) -> None:
        if not isinstance(limit, SessionStartLimit):
            raise TypeError(f"a limit must be a SessionStartLimit, not {type(limit).__name__}")
        if limit.total <= self._reserve:
            raise ValueError(f"reserve ({self._reserve}) must be less than total ({limit.total})")


def _reentered() -> RuntimeError:
    return RuntimeError(
        "a signal handler or finalizer called the queue in a thread that is in the midst of a call to "
        "it; let the handler set a flag, or use another thread"
    )


def _patience(timeout: object) -> float | None:
    """Return a timeout in seconds, ``None`` for one that never ends."""
    patience = real_number("timeout", timeout)
    if patience < 0:
        raise ValueError(f"timeout must not be negative, not {patience:g}")
    return patience if patience <= threading.TIMEOUT_MAX else None


def _head_start(priority: object) -> int:
    head_start = real_number("priority", priority)
    if math.isinf(head_start):
        raise ValueError(f"priority must be finite, not {head_start}")
    return to_us(head_start)


def _sleep_us(denial: Denial | None) -> int | None:
    """Return how long a denial lets its ticket sleep; ``None``: until it is woken."""
    return None if denial is None or denial.reason is Reason.RESET else denial.wait_us


def _timeout(sleep_us: int | None) -> float | None:
    """Return what a condition may be asked to sleep, in seconds."""
    return None if sleep_us is None else min(sleep_us, _LONGEST_SLEEP_US) / MICROSECOND


def _waited(ticket: Ticket, grant: Grant) -> float:
    return max(0, grant.stamp_us - ticket.arrived_us) / MICROSECOND


def _reason_for(error: BaseException) -> LeaveReason:
    if isinstance(error, AcquireTimeout):
        return "timeout"
    if isinstance(error, QueueClosed):
        return "closed"
    if isinstance(error, SessionLimitExhausted):
        return "exhausted"
    return "error" if isinstance(error, Exception) else "interrupted"
