"""How threads and futures wait: the only lock, the only wait loop, and the worker.

- One lock guards the lines. Each thread that waits has a condition of its own over that lock. Only the
  head of a line asks the ledger; everybody else sleeps until whoever leaves wakes the new head.
- A local ledger is asked under the lock: by the thread that is the head, or for a future by the worker.
  A remote ledger is only asked by the worker, without the lock, for all heads at once.
- A permit stays on its waiter, at the head of the line, until it is handed over: then the waiter leaves
  the line, the next head is woken, and the permit is stamped as the last thing under the lock. One that
  is older than the margin when its waiter has it is given back, and asked for again in the same place.
- Every change of the state and the wake-ups that follow from it are one unit (``_complete``).

Locking: CPython 3.14 may raise an interrupt between taking a lock and entering its ``with`` block
(issue 148874), and ``Condition.wait`` may end without the lock if it is interrupted right after
releasing it. So the lock is taken inside of ``try``, and released in ``finally`` whether or not it is
held. It is never taken by a thread that holds it: its ``owner`` shows a signal handler or a finalizer
that would.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ParamSpec, TypeVar

from gateway_queue_sync import forecast
from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
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
from gateway_queue_sync.ledgers import Answers, Ledger, LocalLedger, Request, Wants
from gateway_queue_sync.ledgers.session import MAX_POSITION, Session
from gateway_queue_sync.limit_reader import FOREVER_US, LimitReader
from gateway_queue_sync.lines import Entry, Lines, PermitFuture, Waiter, waiter_numbers
from gateway_queue_sync.log import Log, rejected_often, shards
from gateway_queue_sync.models import Permit, QueueSnapshot, Report, SessionStartLimit
from gateway_queue_sync.token_bucket import (
    MANY_REJECTIONS,
    US_PER_SECOND,
    Budget,
    Denial,
    Reason,
    check_limit,
    to_us,
)

log = logging.getLogger("gateway_queue_sync")

P = ParamSpec("P")
T = TypeVar("T")

MAX_SLEEP_US = int(threading.TIMEOUT_MAX) * US_PER_SECOND
MAX_RESET_SLEEP_US = (
    60 * US_PER_SECOND
)  # a wait for a reset looks again: the limit may have been read
MAX_INTERRUPTS = 100  # in one change
MAX_TRY_US = 500_000  # for one who only tries, until a remote ledger answers
MAX_LATE_US = 40_000  # after a deadline, for an answer that is on its way
MAX_REQUEST_US = 5 * US_PER_SECOND  # until a remote ledger answers update and snapshot
LINGER_US = (
    5 * US_PER_SECOND
)  # that the worker of a remote ledger stays when there is nothing to do
SAME_END_US = 60 * US_PER_SECOND  # a used-up limit is announced again if its reset moves by more
MAX_EXIT_US = 500_000
MUST_NOT_BLOCK = "a future's callback must not block on the queue that serves it"


class OwnedLock:
    """A reentrant lock that says which thread holds it, also while a condition waits on it.

    Reentrant, because Ctrl-C while a Condition over a plain Lock takes it again leaves ``wait`` without
    it and breaks exclusion (CPython #118433).

    Attributes:
        owner: the thread that holds it; set by who takes it.
    """

    def __init__(self) -> None:
        lock = threading.RLock()
        self.acquire, self.release = lock.acquire, lock.release
        self._lock: Any = lock
        self.owner = 0
        self._get_ident = threading.get_ident

    # What a Condition calls, right after it has noted who waits:

    def _release_save(self) -> object:
        self.owner = 0
        return self._lock._release_save()

    def _acquire_restore(self, state: object) -> None:
        self._lock._acquire_restore(state)
        self.owner = self._get_ident()

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())

    def locked(self) -> bool:
        """Return whether a thread holds it; from 3.14 on a Condition wants it."""
        return self.owner != 0

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class Scheduler:
    """The lines of one queue, all who wait in them, and who serves them.

    Args:
        ledger: grants the permits.
        clock: what tells the time.
        observer: called with each event.
        reserve: session starts never to use up.
        raises: whether to raise when the limit is used up, instead of waiting.
        reader: reads the session start limit, if somebody can.
        owner: what the queue is called in errors.

    Attributes:
        ledger: grants the permits.
        now_us: the queue's clock.
        reserve: session starts never to use up.
        closed: whether the queue was closed.
        forks: how many forks lie between the process that made the queue and this one.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Clock,
        observer: Observer | None,
        reserve: int,
        raises: bool,
        reader: LimitReader | None,
        owner: str,
    ) -> None:
        self.ledger = ledger
        self._local: LocalLedger | None = None if ledger.remote else ledger
        self._clock = clock
        self.now_us = clock.now_us
        self.reserve = reserve
        self._raises = raises
        self._observer = observer
        self._reader = reader
        self._read_due_us = FOREVER_US if reader is None else reader.due_us
        self._updates = 0  # how often a limit was given
        self._owner_name = owner
        self.closed = False
        self.forks = 0
        self._session: Session | None = None
        if ledger.remote:
            self._session = Session(ledger, self.now_us, observer is not None)
        self._log = Log(self.now_us, ledger.budget, reserve)
        self._begin()
        _schedulers.add(self)

    def _begin(self) -> None:
        """Set up the lock, and lines in which nobody waits."""
        self._lock = OwnedLock()
        self._get_ident = (
            threading.get_ident
        )  # looked up now: gevent may have patched it after our import
        self._callers: set[int] = set()  # the threads that are inside a call that may wait
        self._lines = Lines(self.ledger.max_concurrency)
        self._moving: list[Waiter] | None = None  # to the lines of other buckets
        self._futures: set[Waiter] = set()  # those of them that stand in lines
        self._announced: dict[int, type[Event] | None] = {}  # the latest event about each waiter
        self._pending_events: list[Event] = []  # what the worker is to tell
        self._announced_end_us: int | None = None  # when a used-up limit that was announced resets
        self._worker: threading.Thread | None = None
        self._work = self._clock.condition(self._lock)  # there is something for the worker to do
        self._due: list[
            tuple[int, int, int, Waiter]
        ] = []  # when to ask, bucket, and for whom: a heap
        self._idle_since_us = self.now_us()
        if self._session is not None:
            self._session = Session(self._session.ledger, self.now_us, self._observer is not None)

    # --- the lock ---------------------------------------------------------------------------------

    def _locked(self, work: Callable[P, T], *args: P.args, **settings: P.kwargs) -> T:
        """Do something with the lock held.

        Between the beginning of ``finally`` and the release there is no call, and so no interrupt.
        """
        ident = self._get_ident()
        try:
            self._lock.acquire()
            self._lock.owner = ident
            result = work(*args, **settings)
            return result  # noqa: RET504 - an interrupt right after the call is still inside of ``try``
        finally:
            if self._lock.owner == ident:
                self._lock.owner = 0
            try:
                self._lock.release()
            except RuntimeError:
                pass  # an interrupt came before the lock was taken; it goes on from here

    def _complete(self, change: Callable[[], object]) -> None:
        """Make a change of the state and its wake-ups under the lock, whoever interrupts.

        An exception that is raised into the midst makes it start over, and is raised when all is done.
        Repeating a change must do no more than making it once.
        """
        interrupt: BaseException | None = None
        done, left = False, MAX_INTERRUPTS

        def repeat() -> None:  # with the lock held throughout: nobody comes in between
            nonlocal interrupt, done, left
            while not done and left:
                try:
                    change()
                    done = True
                except Exception as error:  # noqa: BLE001 - raised below; most would come again
                    interrupt, left = error, min(left - 1, 1)
                except BaseException as error:  # noqa: BLE001 - raised below
                    interrupt, left = error, left - 1

        while not done and left:
            try:
                self._locked(repeat)
            except BaseException as error:  # noqa: BLE001 - raised below
                interrupt, left = error, left - 1
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                interrupt = (
                    None  # else its traceback would hold this frame, and the frame the error
                )

    def check_caller(self) -> None:
        """Refuse a thread that would see a half-done state, and a process that holds only a copy."""
        if self.forks and self._session is None:
            raise self.forked()
        if self._lock.owner == self._get_ident():
            raise reentered()

    def check_waits(self) -> None:
        """Refuse a call that waits for a remote ledger in the worker, or inside of another call."""
        self.check_caller()
        if self._session is not None:
            if self._is_worker():
                raise RuntimeError(MUST_NOT_BLOCK)
            if self._get_ident() in self._callers:
                raise reentered()

    def _is_worker(self) -> bool:
        return self._worker is threading.current_thread()

    def forked(self) -> RuntimeError:
        """Return the error for a process that was forked from the one that made the queue."""
        return RuntimeError(
            f"this {self._owner_name} was made before the process forked, or the process was forked "
            "inside this call: the permit belongs to the parent; to share a queue over processes use "
            "SqliteQueue"
        )

    # --- permits without waiting ------------------------------------------------------------------

    def try_free(self, shard_id: int) -> Permit | None:
        """Take a permit if the bucket is free and nobody waits for it; else the caller must wait.

        A permit without a ``reporter`` is older than the margin: the caller must wait with it, so that
        it is given back and asked for again in its place.
        """
        ident = self._get_ident()
        if self._lock.owner == ident or self.forks or (self._callers and ident in self._callers):
            self.check_caller()
            if ident in self._callers:
                raise reentered()
        permit: Permit | Denial | None = None
        lock = self._lock
        try:
            try:
                lock.acquire()
                lock.owner = ident
                if self.closed:
                    raise QueueClosed
                lines, local = self._lines, self._local
                if local is None or (
                    lines.by_bucket and shard_id % lines.max_concurrency in lines.by_bucket
                ):
                    return None
                now_us = self.now_us()
                if self._reader is not None:
                    self._read_if_due(now_us)
                permit = local.take(shard_id, now_us)
            finally:
                if lock.owner == ident:
                    lock.owner = 0
                try:
                    lock.release()
                except RuntimeError:
                    pass  # as in _locked
            if type(permit) is not Permit:
                return None
            remaining = permit.remaining
            if self._observer is not None or (
                remaining is not None and remaining <= self._log.grants_up_to
            ):
                self._announce_free_grant(permit, ident)
            margin_us = self.ledger.margin_us
            if not margin_us or self.now_us() - permit.stamp_us <= margin_us:
                if self.forks:
                    raise self.forked()
                permit.reporter = self
            return permit
        except BaseException:
            if isinstance(permit, Permit):
                self._complete(partial(self._return_permit, permit))
            raise

    def _announce_free_grant(self, permit: Permit, ident: int) -> None:
        permit.waiter = next(waiter_numbers)
        try:
            self._callers.add(ident)
            self._emit(
                ShardGranted(permit.shard_id, permit.bucket, 0.0, permit.remaining, permit.waiter)
            )
        finally:
            self._callers.discard(ident)

    def _waiter(
        self,
        shard_id: int,
        priority_us: int,
        future: PermitFuture | None,
        arrived_us: int | None,
        late: Permit | None,
    ) -> Waiter:
        """Return a waiter; one that brings a late permit arrived when that was granted."""
        if arrived_us is None:
            arrived_us = self.now_us() if late is None else late.stamp_us
        waiter = Waiter(shard_id, arrived_us, priority_us, future)
        waiter.permit = late
        if late is not None and late.waiter:  # its permit was announced
            waiter.number = late.waiter
            self._announced[waiter.number] = ShardGranted
        return waiter

    # --- threads ----------------------------------------------------------------------------------

    def wait(
        self,
        shard_id: int,
        timeout: float | None,
        priority_us: int,
        late: Permit | None,
        *,
        explain: bool = True,
    ) -> Permit:
        """Stand in line with the calling thread until it has a permit; it may bring one that was late.

        Every way out without one ends in ``_leave``. It is there twice, for an interrupt at the very
        beginning of the first.
        """
        ident, forks = self._get_ident(), self.forks
        waiter = self._waiter(shard_id, priority_us, None, None, late)
        waiter.once = timeout == 0
        try:
            if self._worker is threading.current_thread() and (timeout != 0 or self._session):
                raise RuntimeError(MUST_NOT_BLOCK)
            self.check_caller()
            with self._clock.inside():
                try:
                    permit = self._wait(waiter, timeout)
                except BaseException as error:
                    if self.forks == forks:
                        self._leave(waiter, reason_for(error), caller=ident)
                    raise
            self._callers.discard(ident)
            waiter.permit = None
            return permit
        except BaseException as error:
            if self.forks == forks:  # else this is a child, which has nothing of its own here
                self._leave(waiter, reason_for(error), caller=ident)
            if explain and isinstance(error, AcquireTimeout) and self._local is not None:
                error.eta = self._eta(waiter)
            raise

    def _wait(self, waiter: Waiter, timeout: float | None) -> Permit:
        forks = self.forks
        while True:
            answer = self._locked(self._sleep_until_answer, waiter, timeout)
            if self.forks != forks:
                raise self.forked()
            if not isinstance(answer, Permit):
                self._emit(answer)
            elif self._deliver(waiter, answer):
                return answer
            if self.forks != forks:
                raise self.forked()

    def _sleep_until_answer(self, waiter: Waiter, timeout: float | None) -> Permit | Event:
        """Sleep until there is a permit, or an event to emit without the lock; with the lock held."""
        deadline_us = FOREVER_US if timeout is None else waiter.arrived_us + to_us(timeout)
        lock = self._lock
        if waiter.entry is None:
            late = waiter.permit is not None
            self._join(waiter)
            if late and self.now_us() >= deadline_us:
                raise self._timed_out(waiter, timeout or 0.0)
        while True:
            answer = self._step(waiter)
            if answer is not None:
                return answer
            now_us, is_head = self.now_us(), self._lines.is_head(waiter)
            left_us = deadline_us - now_us
            if self._session is not None and is_head and waiter.ask_at_us <= now_us:
                left_us += MAX_TRY_US if waiter.once else MAX_LATE_US  # the answer is on its way
            if left_us <= 0:
                assert timeout is not None
                raise self._timed_out(waiter, timeout)
            if self._observer is not None or shards.isEnabledFor(logging.INFO):
                event = self._waiting_event(waiter, deadline_us - now_us)
                if event is not None:
                    return event
            if is_head and self._session is None:
                left_us = min(left_us, waiter.ask_at_us - now_us)
            if waiter.condition is None:
                waiter.condition = self._clock.condition(self._lock)
            if lock is not self._lock:
                raise self.forked()  # a signal handler forked in here, and this is the child
            forever = left_us >= FOREVER_US // 2
            waiter.condition.wait(None if forever else min(left_us, MAX_SLEEP_US) / US_PER_SECOND)

    def _timed_out(self, waiter: Waiter, timeout: float) -> Exception:
        """Return what to raise for a waiter whose time is up, with the lock held."""
        if self._session is not None:
            unanswered = waiter.ask_at_us == 0 and self._lines.is_head(waiter)
            if not waiter.once and self._idle_since_us > waiter.arrived_us:
                unanswered = False  # it has answered others meanwhile
            error = self._session.timed_out(waiter.shard_id, timeout, unanswered=unanswered)
            if error is not None:
                return error
        eta = None if self._local is not None else self._remote_eta(waiter)
        return AcquireTimeout(waiter.shard_id, timeout, eta)

    # --- futures ----------------------------------------------------------------------------------

    def enqueue(
        self, shard_id: int, priority_us: int, arrived_us: int | None = None
    ) -> PermitFuture:
        """Return the future of a permit; one with an arrival of its own leaves all to the worker."""
        future = PermitFuture()
        permit: Permit | None = None
        try:
            if arrived_us is None:
                permit = self.try_free(shard_id)
            if permit is not None and permit.reporter is not None:
                _complete_future(future, permit)
            else:
                emits = arrived_us is None
                waiter = self._waiter(shard_id, priority_us, future, arrived_us, permit)
                future.on_cancel = partial(self._leave_cancelled, waiter, self.forks)
                with self._clock.inside():
                    self._join_future(waiter, emits=emits)
        except BaseException:
            if not future.cancel() and future.done() and future.exception() is None:
                future.result().unused()
            elif permit is not None and not permit.returned:
                self._complete(partial(self._return_permit, permit))
            raise
        return future

    def _join_future(self, waiter: Waiter, *, emits: bool) -> None:
        self.check_caller()
        event = self._locked(self._join_and_announce, waiter, emits)
        if event is not None:
            self._emit(event)

    def _join_and_announce(self, waiter: Waiter, emits: bool) -> Event | None:
        """Stand in line, and return the event to emit; or leave it to the worker."""
        self._join(waiter)
        self._ensure_worker()
        event = self._waiting_event(waiter, FOREVER_US)
        if event is None or emits:
            return event
        self._pending_events.append(event)
        self._work.notify()
        return None

    def _leave_cancelled(self, waiter: Waiter, forks: int) -> None:
        """Take a future that was cancelled out of its line, and notify those who wait for it."""
        if self.forks != forks:
            return  # it is a copy of the parent's
        if (
            self._lock.owner == self._get_ident()
        ):  # a signal handler, inside of something: right after that, then
            threading.Thread(
                target=self._leave_cancelled, args=(waiter, forks), name="gateway-queue-cancel"
            ).start()
            return
        future = self._locked(self._claim, waiter)
        self._leave(waiter, "cancelled")
        if future is not None:
            future.on_cancel = None
            future.set_running_or_notify_cancel()

    def _claim(self, waiter: Waiter) -> PermitFuture | None:
        """Return the future for the caller to complete, ``None`` if somebody else does."""
        future, waiter.future = waiter.future, None
        return future

    # --- lines: with the lock held ----------------------------------------------------------------

    def _join(self, waiter: Waiter) -> None:
        """Stand in line; a permit that the waiter brings along was too late, and is given back."""
        if self.closed:
            raise QueueClosed
        if waiter.future is None:
            self._callers.add(self._get_ident())
        else:
            self._futures.add(waiter)
        self._lines.join(waiter)
        if waiter.permit is not None:  # only now: nobody takes the waiter's turn by this
            permit, waiter.permit, waiter.ask_at_us = waiter.permit, None, 0
            self._return_permit(permit)
        if self._session is not None:
            self._session.joined(waiter)
            self._ensure_worker()
            self._work.notify()  # the ledger learns of those behind the head, too
        if self._lines.is_head(waiter):
            self._notify_head(waiter)

    def _remove(self, waiter: Waiter) -> None:
        """Leave the line and wake its new head; harmless when repeated. Nobody leaves in another way."""
        self._futures.discard(waiter)
        if not self._futures and self._worker is not None:
            self._work.notify()  # it may go
        head = self._lines.leave(waiter)
        if head is not None and head.permit is None:
            head.ask_at_us = 0  # an answer from when it was a head before may be out of date
        self._notify_head(head)

    def _notify_head(self, waiter: Waiter | None) -> None:
        """Wake the head of a line, or the worker that serves it."""
        if waiter is None:
            return
        if waiter.future is not None or self._session is not None:
            bucket = waiter.shard_id % self._lines.max_concurrency
            heapq.heappush(self._due, (waiter.ask_at_us, bucket, waiter.number, waiter))
            self._work.notify()
        elif waiter.condition is not None:
            waiter.condition.notify()

    def _limit_changed(self) -> None:
        """Let all heads ask again, in the lines of the buckets that there are now."""
        if self.ledger.max_concurrency != self._lines.max_concurrency:
            if self._moving is None:
                self._moving = self._lines.waiters()
            self._lines = Lines(self.ledger.max_concurrency, self._moving)
            self._moving = None
        self._log.limit_changed()
        for head in self._lines.heads():
            if head.permit is None:
                head.ask_at_us = 0
                self._notify_head(head)

    def _step(self, waiter: Waiter) -> Permit | Event | None:
        """Ask for the waiter's permit if it is its turn; return the permit, or an event to emit first.

        Unless somebody listens to its events, the waiter has left its line when it gets the permit.
        """
        if self.closed:
            raise QueueClosed
        event = None
        if self._local is not None and waiter.permit is None and waiter.error is None:
            now_us = self.now_us()
            if waiter.ask_at_us <= now_us and self._lines.is_head(waiter):
                if self._reader is not None:
                    self._read_if_due(now_us)
                answer = self._local.take(waiter.shard_id, now_us)
                if answer.__class__ is Permit:  # not isinstance: an interrupt comes after a call
                    waiter.permit = answer
                event = self._book(waiter, answer, now_us)
        if event is not None:
            return event
        if waiter.error is not None:
            try:
                raise waiter.error
            finally:
                waiter.error = None  # else its traceback would hold the waiter, and that the error
        permit = waiter.permit
        if permit is not None and waiter.entry is not None and not self._has_listener(permit):
            self._hand_over(waiter, permit)
        return permit

    def _book(self, waiter: Waiter, answer: Permit | Denial, now_us: int) -> Event | None:
        """Note what the ledger answered to a waiter; return an event to emit, if there is one."""
        if isinstance(answer, Permit):
            answer.waited = max(0, answer.stamp_us - waiter.arrived_us) / US_PER_SECOND
            answer.waiter, answer.reporter = waiter.number, self
            waiter.permit = answer
            return None
        waiter.ask_at_us = now_us + answer.wait_us
        if answer.reason is Reason.RESET:
            self._read_limit(answer)
        if answer.reason is not Reason.BUDGET:
            return None
        waiter.ask_at_us = now_us + min(answer.wait_us, MAX_RESET_SLEEP_US)
        resets_in = answer.resets_in_us / US_PER_SECOND
        if self._raises:
            waiter.error = SessionLimitExhausted(answer.remaining, resets_in)
        ends_us, announced_us = now_us + answer.resets_in_us, self._announced_end_us
        if announced_us is not None and abs(ends_us - announced_us) <= SAME_END_US:
            return None
        self._announced_end_us = ends_us
        return BudgetExhausted(answer.remaining, resets_in)

    def _hand_over(self, waiter: Waiter, permit: Permit) -> bool:
        """Leave the line with a permit; false if it has left, or other buckets were laid out since."""
        if self.closed:
            raise QueueClosed
        if waiter.entry is None:
            return False
        self._remove(waiter)
        return self._local is None or self._local.restamp(permit)

    def _return_permit(self, permit: Permit) -> None:
        """Give a permit back and wake those whom that helps; harmless when repeated."""
        self._book_report(permit, Report.UNUSED)
        left = self.ledger.budget()
        if (
            left is not None and left.remaining <= self.reserve + 1
        ):  # there was nothing left to grant
            heads = self._lines.heads()
        else:
            line = self._lines.by_bucket.get(permit.shard_id % self._lines.max_concurrency)
            head = None if line is None else line.head
            heads = [] if head is None else [head]
        for head in heads:
            if head.permit is None:
                head.ask_at_us = 0
                self._notify_head(head)

    def _book_report(self, permit: Permit, report: Report) -> int:
        """Book a report, or have it sent; return how many rejections in a row the bucket has."""
        if self._local is not None:
            return self._local.report(permit, report)
        assert self._session is not None
        self._session.wants.reports.append((permit, report, self.now_us()))
        self._wake_worker()
        return 0

    def report(self, permit: Permit, report: Report) -> None:
        """Book what the holder of a permit says became of it, unless that was said before."""
        if self.forks and self._session is None:
            return  # the account in this child is a copy that grants nothing
        self.check_caller()
        before, rejections, booked = permit.reported, 0, False

        def change() -> None:
            nonlocal rejections, booked
            reported = permit.reported
            if reported is None or (reported is Report.SENT and report is Report.REJECTED):
                if report is not Report.UNUSED:
                    rejections = self._book_report(permit, report)
                booked, permit.reported = True, report
            if booked and report is Report.UNUSED:
                self._return_permit(permit)

        self._complete(change)
        if booked:
            if rejections == MANY_REJECTIONS:
                rejected_often(rejections, permit.shard_id, permit.bucket)
            self._emit(PermitReported(permit.shard_id, permit.bucket, report, permit.waiter))
        elif Report.UNUSED in (before, report) and before is not report:
            log.warning("%r was reported %s: that changes nothing now", permit, report.value)

    # --- telling ----------------------------------------------------------------------------------

    def _has_listener(self, permit: Permit) -> bool:
        """Return whether somebody listens to the event of a permit."""
        if self._observer is not None or shards.isEnabledFor(logging.INFO):
            return self._observer is not None or self._log.wants_grant(permit)
        return permit.remaining is not None and permit.remaining <= self._log.grants_up_to

    def _waiting_event(self, waiter: Waiter, left_us: int) -> Event | None:
        """Return the event that a waiter waits, once, if somebody listens; with the lock held.

        Where the ledger has to be asked for the position, the worker emits it.
        """
        if waiter.number in self._announced:
            return None
        if self._observer is None and not self._log.follows_waits(left_us):
            return None
        if self._session is not None:
            if waiter.once:
                return None  # it does not wait, it tries
            self._announced[waiter.number] = None  # until the worker emits it
            self._session.unannounced.append(waiter)
            self._work.notify()
            return None
        position = self._position(waiter, None if self._observer else MAX_POSITION)
        eta = self._rough_eta(waiter, position)
        if self._observer is None and not self._log.wants_wait(eta):
            self._announced[waiter.number] = None  # it was looked at
            return None
        self._announced[waiter.number] = ShardWaiting
        bucket = waiter.shard_id % self._lines.max_concurrency
        return ShardWaiting(waiter.shard_id, bucket, position, eta, waiter.number)

    def _emit(self, event: Event) -> None:
        """Pass an event to the log and the observer; without the lock."""
        if isinstance(event, ShardWaiting):
            self._announced[event.waiter] = ShardWaiting
        for observer in (self._log, self._observer):
            if observer is not None:
                try:
                    observer(event)
                except BaseException as error:
                    if not isinstance(error, Exception) and not self._is_worker():
                        raise
                    log.exception("an observer raised on %r; the queue goes on", event)

    def _deliver(self, waiter: Waiter, permit: Permit) -> bool:
        """Tell of a permit and hand it over; false if it has to be asked for again."""
        if waiter.entry is not None:
            if self._announced.get(waiter.number) is not ShardGranted:
                self._announced[waiter.number] = ShardGranted
                self._emit(
                    ShardGranted(
                        permit.shard_id,
                        permit.bucket,
                        permit.waited,
                        permit.remaining,
                        waiter.number,
                    )
                )
            if not self._locked(self._hand_over, waiter, permit):
                return False
        if not self.is_in_time(permit):
            return False
        self._announced.pop(waiter.number, None)
        return True

    def is_in_time(self, permit: Permit) -> bool:
        """Return whether a permit is no older than the margin."""
        margin_us = self.ledger.margin_us
        return not margin_us or self.now_us() - permit.stamp_us <= margin_us

    def _leave(self, waiter: Waiter, reason: LeaveReason, *, caller: int = 0) -> None:
        """Leave without a permit: give back what was granted, wake the new head, tell the observer."""
        announced: type[Event] | None = None

        def change() -> None:
            nonlocal announced
            announced = announced or self._announced.pop(waiter.number, None)
            if waiter.entry is not None and self._session is not None:
                self._session.wants.left.append(waiter)
                self._work.notify()
            self._remove(waiter)
            if waiter.permit is not None:
                self._return_permit(waiter.permit)
                waiter.permit = None
            self._callers.discard(caller)

        self._complete(change)
        if announced is not None:
            waited = max(0, self.now_us() - waiter.arrived_us) / US_PER_SECOND
            self._emit(ShardLeft(waiter.shard_id, waited, reason, waiter.number))

    # --- looking ahead ----------------------------------------------------------------------------

    def _position(self, waiter: Waiter, at_most: int | None = None) -> int:
        line = self._lines.line(waiter)
        if line is None:
            return 0
        head = line.head
        served = head is not None and head is not waiter and head.permit is not None
        return line.position(waiter, at_most) - served

    def _rough_eta(self, waiter: Waiter, position: int) -> float | None:
        """Return in about how many seconds a position should get its permit, at a glance."""
        if self._local is None or self._reads_at_reset():
            return None
        number = waiter.shard_id % self._lines.max_concurrency
        outlook = self._local.outlook(self.reserve, number)
        lines = len(self._lines.by_bucket)
        waiting = len(self._callers) + len(self._futures)
        in_us = forecast.rough_eta_us(outlook, number, position, lines, waiting)
        return None if in_us is None else in_us / US_PER_SECOND

    def _eta(self, waiter: Waiter) -> float | None:
        """Return in how many seconds one who has left would have got its permit, in memory."""
        if self._local is None or self._reads_at_reset():
            return None  # the limit that is being read decides
        position, lengths, outlook = self._locked(self._ahead, waiter, self._local)
        number = waiter.shard_id % outlook.max_concurrency
        lengths[number] = max(lengths.get(number, 0), position + 1)
        in_us = forecast.eta_us(outlook, number, position, lengths)
        return None if in_us is None else in_us / US_PER_SECOND

    def _ahead(
        self, waiter: Waiter, local: LocalLedger
    ) -> tuple[int, dict[int, int], forecast.Outlook]:
        """Copy what decides when one gets its permit; with the lock held."""
        lengths, outlook = self._lines.lengths(), local.outlook(self.reserve)
        return self._position(waiter), lengths, outlook

    def _remote_eta(self, waiter: Waiter) -> float | None:
        """Return in about how many seconds a waiter would get its permit, by what is known here."""
        position = self._position(waiter)
        if self._reads_at_reset():
            return None
        line = self._lines.line(waiter)
        head = waiter if line is None else line.head or waiter
        if head.ask_at_us in (0, FOREVER_US):
            return None
        in_us, left = max(0, head.ask_at_us - self.now_us()), self.ledger.budget()
        if left is not None and left.remaining <= self.reserve:
            in_us = max(in_us, left.resets_in_us)
        return (in_us + position * self.ledger.window_us) / US_PER_SECOND

    def snapshot(self) -> QueueSnapshot:
        """Return who waits where, until when, and what is left of the limit."""
        self.check_waits()
        if self._local is None:
            look = self._ask(Request("look"))
            assert look.outlook is not None
            return forecast.snapshot(look.outlook, look.lines)
        outlook, entries = self._locked(self._copy, self._local)
        lines = {number: [entry[2] for entry in sorted(line)] for number, line in entries.items()}
        return forecast.snapshot(outlook, lines)

    def _copy(self, local: LocalLedger) -> tuple[forecast.Outlook, dict[int, list[Entry]]]:
        """Copy what a snapshot shows; the arithmetic, which may take long, is done without the lock."""
        entries = {
            number: [entry for entry in line.entries() if entry[2].permit is None]
            for number, line in self._lines.by_bucket.items()
        }
        return local.outlook(self.reserve), entries

    def describe(self) -> str:
        """Return the figures of a queue's repr."""
        left: Budget | None = self.ledger.budget()
        limit = "" if left is None else f" remaining={left.remaining}/{left.total}"
        state = " closed" if self.closed else ""
        waiting = len(self._lines)
        return f"waiting={waiting} granted={self.ledger.granted}{limit}{state}"

    # --- the limit --------------------------------------------------------------------------------

    def update(self, limit: SessionStartLimit) -> None:
        """Adopt a limit as it is given."""
        self.check_waits()
        if self.closed:
            raise QueueClosed
        local = self._local
        if local is None:
            self._ask(Request("update", limit))
            self._updates += 1
        else:

            def change() -> None:
                local.adopt(limit)
                self._updates += 1
                self._limit_changed()

            self._complete(change)
        self._emit(LimitUpdated(limit))

    def _reads_at_reset(self) -> bool:
        """Return whether a reset is due whose limit is being read."""
        left = self.ledger.budget()
        reading = self._reader is not None and self._reader.reading
        return reading and left is not None and left.resets_in_us == 0

    def _request(self, request: Request) -> None:
        """Have the worker send a request for which nobody waits; with the lock held."""
        assert self._session is not None
        self._session.wants.requests.append(request)
        self._ensure_worker()
        self._work.notify()

    def _read_if_due(self, now_us: int) -> None:
        """Have the limit of a local ledger read if that is due; with the lock held."""
        if now_us >= self._read_due_us or (self._local and self._local.is_reset_due(now_us)):
            self._read_limit()

    def _read_limit(self, denial: Denial | None = None) -> None:
        """Have the limit read, unless somebody does or it failed a moment ago; with the lock held."""
        reader, now_us = self._reader, self.now_us()
        if reader is None or reader.reading or reader.is_resting(now_us):
            return
        ref, updates = weakref.ref(self), self._updates

        def done(limit: SessionStartLimit | None, error: BaseException | None) -> None:
            scheduler = ref()
            if scheduler is not None:
                scheduler._limit_read(limit, error, now_us, updates, denial)

        reader.start(done, now_us)
        self._read_due_us = reader.due_us

    def _limit_read(
        self,
        limit: SessionStartLimit | None,
        error: BaseException | None,
        sent_us: int,
        updates: int,
        denial: Denial | None,
    ) -> None:
        """Take in a limit that was read, unless an ``update`` is newer; or go on without."""
        reader, local = self._reader, self._local
        assert reader is not None
        try:
            if error is None:
                check_limit(limit, self.reserve)
        except (TypeError, ValueError) as wrong:
            limit, error = None, wrong
        outdated = self._updates != updates
        if error is not None:
            reader.failed(self.now_us(), error, quiet=outdated)
        event = None

        def change() -> None:
            nonlocal event
            if limit is not None:
                confirmed = True
                if local is None:
                    self._request(Request("renew", limit, denial))
                elif not outdated:
                    confirmed = local.read(limit, sent_us)
                    event = LimitUpdated(limit)
                reader.succeeded(self.now_us(), confirmed=confirmed)
            elif local is None:
                self._request(Request("trust", None, denial))
            self._read_due_us = reader.due_us
            if limit is not None:
                self._limit_changed()

        self._complete(change)
        if event is not None:
            self._emit(event)

    # --- the worker -------------------------------------------------------------------------------

    def _ensure_worker(self) -> None:
        """Start the worker, if there is none; with the lock held."""
        if self._worker is not None and self._worker.is_alive():
            return
        # Registered first: one whose start was interrupted may run all the same, and then another one
        # takes its place, and it ends.
        visit = self._clock.inside(worker=True)
        self._worker = threading.Thread(
            target=_serve,
            args=(weakref.ref(self, partial(_wake, self._work)), self._work, visit),
            name="gateway-queue-worker",
            daemon=True,
        )
        try:
            self._worker.start()
        except RuntimeError as error:
            interrupt = error.__context__
            if interrupt is not None and not isinstance(interrupt, Exception):
                raise interrupt from None  # start() waits, and then fails to release a lock (#118433)
            visit.__exit__(None, None, None)  # the system or the interpreter gives no more threads
            raise

    def _wake_worker(self) -> None:
        """Have the worker look what there is to do; if no thread can be started, the next one does."""
        with contextlib.suppress(RuntimeError):
            self._ensure_worker()
        self._work.notify()

    def turn(self) -> bool:
        """Do what there is to do now, in the worker's thread; return whether there was anything."""
        session = self._session
        heads, closing, events, wants = self._locked(self._to_do)
        for waiter in closing:
            self._fail(waiter, QueueClosed())
        for event in events:
            self._emit(event)
        if session is not None and wants is not None:
            self._exchange(session, wants)
        elif session is not None and self.closed and not closing and self._is_worker():
            session.ledger.close()
        for waiter in heads:
            if waiter.future is not None:
                self._serve_future(waiter)
        return bool(heads or closing or wants)

    def _to_do(self) -> tuple[list[Waiter], list[Waiter], list[Event], Wants | None]:
        """Return the heads that are due, the futures to close, events to emit, and what to send."""
        session, wants = self._session, None
        if not self._is_worker():
            return [], [], [], None
        now_us = self.now_us()
        heads = self._due_heads(now_us)
        events, self._pending_events = self._pending_events, []
        if session is not None:
            events += session.events(self._lines, now_us, looked=False)
            wants = session.compose(heads, now_us, self._reader)
            for head in session.postponed:
                self._notify_head(head)
        return heads, list(self._futures) if self.closed else [], events, wants

    def rest_us(self) -> int | None:
        """Return how long the worker may sleep, ``None`` to end; with the lock held."""
        if not self._is_worker():
            return None
        if self._pending_events or (self.closed and self._futures):
            return 0
        now_us, due, session = self.now_us(), self._due, self._session
        while due and not self._is_due_for(due[0][3], due[0][0]):
            heapq.heappop(due)
        wake_us = due[0][0] if due else FOREVER_US
        waiting = bool(self._futures)
        if session is not None:
            wake_us = min(wake_us, session.wake_us())
            waiting = bool(self._lines.by_bucket)
        if self.closed and not waiting and (session is None or session.gives_up):
            wake_us = FOREVER_US
        elif wake_us == FOREVER_US and waiting:
            wake_us = now_us + MAX_RESET_SLEEP_US  # somebody waits behind a thread, or for a reset
        elif wake_us == FOREVER_US and session is not None and not self.closed:
            wake_us = self._idle_since_us + LINGER_US
            if wake_us <= now_us:
                wake_us = FOREVER_US
        if wake_us == FOREVER_US:
            self._worker = None
            return None
        return max(0, wake_us - now_us)

    def _is_due_for(self, waiter: Waiter, at_us: int) -> bool:
        """Return whether this is when the worker asks for the waiter."""
        if waiter.entry is None or waiter.permit is not None or waiter.ask_at_us != at_us:
            return False
        return self._lines.is_head(waiter)

    def _due_heads(self, now_us: int) -> list[Waiter]:
        """Return the heads for which the worker asks now, each once."""
        due = self._due
        heads: dict[Waiter, None] = {}
        while due and due[0][0] <= now_us:
            at_us, _, _, waiter = heapq.heappop(due)
            if self._is_due_for(waiter, at_us):
                heads[waiter] = None
        return list(heads)

    def _serve_future(self, waiter: Waiter) -> None:
        """Ask for a future that is the head of its line, and complete it if that has an answer."""
        late = False
        try:
            while True:
                answer = self._locked(self._step_future, waiter, late=late)
                if answer is None:
                    return
                if not isinstance(answer, Permit):
                    self._emit(answer)
                elif self._deliver(waiter, answer):
                    break
                else:
                    late = True
        except BaseException as error:  # noqa: BLE001 - the future's holder gets it
            self._fail(waiter, error)
            return
        future = self._locked(self._claim, waiter)
        if future is None:
            return  # it was cancelled, and the permit given back
        waiter.permit = None
        try:
            _complete_future(future, answer)
        except BaseException:
            log.exception(
                "a callback of shard %d's future raised; the queue goes on", waiter.shard_id
            )

    def _step_future(self, waiter: Waiter, *, late: bool) -> Permit | Event | None:
        if waiter.future is None or waiter.future.cancelled():
            return None
        if late and waiter.entry is None:
            self._join(waiter)
        answer = self._step(waiter) if waiter.entry or waiter.permit else None
        if answer is None and self._local is not None and self._lines.is_head(waiter):
            self._notify_head(waiter)
        return answer

    def _fail(self, waiter: Waiter, error: BaseException) -> None:
        """Complete a future with an error."""
        future, waiter.error = self._locked(self._claim, waiter), None
        try:
            self._leave(waiter, reason_for(error))
            error.__traceback__ = None  # its frames hold the future
            if future is not None:
                future.on_cancel = None
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
        except BaseException:
            log.exception(
                "a callback of shard %d's future raised; the queue goes on", waiter.shard_id
            )

    # --- a remote ledger: in the worker -----------------------------------------------------------

    def _exchange(self, session: Session, wants: Wants) -> None:
        """Ask the ledger without the lock, and pass its answers on."""
        answers = session.ledger.exchange(wants)
        events = self._locked(self._take_in, session, wants, answers)
        session.log_reach()
        for event in events:
            self._emit(event)

    def _take_in(self, session: Session, wants: Wants, answers: Answers) -> list[Event]:
        """Pass the answers of a remote ledger on, and return the events to emit."""
        now_us = self._idle_since_us = self.now_us()
        session.note(wants, answers, now_us, self._lines)
        if session.ledger.max_concurrency != self._lines.max_concurrency or session.limit_changed:
            self._limit_changed()
        found = [self._pass_on(head, answers.heads.get(head)) for head in wants.heads]
        looked = any(request.kind == "look" for request in wants.requests)
        events = [event for event in found if event is not None]
        return events + session.events(self._lines, now_us, looked=looked)

    def _pass_on(self, waiter: Waiter, answer: Permit | Denial | None) -> Event | None:
        """Pass on what was answered to a head, ``None`` if the ledger was out of reach."""
        assert self._session is not None
        now_us = self.now_us()
        if waiter.entry is None:  # it has left meanwhile
            if isinstance(answer, Permit):
                self._book_report(answer, Report.UNUSED)
            return None
        if answer is None:
            answer = Denial(max(0, self._session.retry_us - now_us), Reason.WINDOW)
        event = self._book(waiter, answer, now_us)
        permit = waiter.permit
        if permit is not None and not self.closed and not self._has_listener(permit):
            self._hand_over(waiter, permit)
        elif permit is None and waiter.error is None:
            self._notify_head(waiter)
        if waiter.condition is not None:
            waiter.condition.notify()
        return event

    def _ask(self, request: Request) -> Request:
        """Have the worker send a request, and wait for the answer for 5 seconds at most."""
        session = self._session
        assert session is not None
        condition = request.condition = self._clock.condition(self._lock)
        deadline_us, ident = self.now_us() + MAX_REQUEST_US, self._get_ident()

        def wait() -> None:
            self._request(request)
            while not request.done:
                left_us = deadline_us - self.now_us()
                if left_us <= 0:
                    raise session.unanswered(request)
                condition.wait(left_us / US_PER_SECOND)

        with self._clock.inside():
            try:
                self._callers.add(ident)
                self._locked(wait)
            finally:
                self._callers.discard(ident)  # no call before it, and so no interrupt
        if request.error is not None:
            raise request.error
        return request

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Grant no more permits: whoever waits gets ``QueueClosed``."""
        if self.forks and self._session is None:
            self.closed = True
            return
        if (
            self._lock.owner == self._get_ident()
        ):  # a signal handler, inside of something: right after that, then
            threading.Thread(target=self.close, name="gateway-queue-close").start()
            return

        def change() -> None:
            self.closed = True
            for waiter in self._lines.waiters():
                if waiter.condition is not None:
                    waiter.condition.notify()
            if self._futures or self._session is not None:
                self._wake_worker()

        self._complete(change)

    def drain(self, deadline_us: int) -> None:
        """Give the worker until then to send what a remote ledger does not know yet."""
        if self._session is None or self._lock.owner == self._get_ident():
            return
        worker = self._worker
        if worker is None or not worker.is_alive():
            self._session.ledger.close()  # it has sent all that there was
            return
        self.close()
        worker.join(max(0, deadline_us - SYSTEM_CLOCK.now_us()) / US_PER_SECOND)

    def begin_in_child(self) -> None:
        """Be another process's queue in a forked child.

        A local account stays with the parent. With a remote ledger nobody waits here: those who did are
        threads of the parent, and the copies of their futures are never done.
        """
        self.forks += 1
        if self._session is not None:
            self._session.ledger.begin_anew()
        if self._reader is not None:
            self._reader.reading = False
        self._begin()


# --- outside of the class: nothing here keeps a scheduler alive -----------------------------------


def _serve(
    ref: weakref.ref[Scheduler], work: threading.Condition, visit: AbstractContextManager[object]
) -> None:
    """Serve a scheduler for as long as there is something to do, and it exists."""
    with visit:
        while (scheduler := ref()) is not None:
            try:
                if scheduler.turn():
                    continue
            except BaseException:
                log.exception("the worker of a queue failed; it goes on")
            try:
                work.acquire()
                rest_us = scheduler.rest_us()
                del scheduler
                if rest_us is None or ref() is None:
                    return
                if rest_us > 0:
                    work.wait(rest_us / US_PER_SECOND)
            finally:
                try:
                    work.release()
                except RuntimeError:
                    pass  # as in Scheduler._locked


def _wake(work: threading.Condition, _: weakref.ref[Scheduler]) -> None:
    """Wake a worker whose scheduler nobody has any more, so that it ends."""
    if work.acquire(blocking=False):
        try:
            work.notify()
        finally:
            work.release()


def _complete_future(future: PermitFuture, permit: Permit) -> None:
    """Complete a future with a permit, or give that back if it is cancelled or interrupted just now."""
    try:
        if future.set_running_or_notify_cancel():
            future.on_cancel = None
            future.set_result(permit)
    finally:
        if future.cancelled() or not future.done():
            permit.unused()


def reason_for(error: BaseException) -> LeaveReason:
    """Return in an observer's words why somebody left with this error."""
    if isinstance(error, AcquireTimeout):
        return "timeout"
    if isinstance(error, QueueClosed):
        return "closed"
    if isinstance(error, SessionLimitExhausted):
        return "exhausted"
    return "error" if isinstance(error, Exception) else "interrupted"


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for scheduler in list(_schedulers):
        scheduler.begin_in_child()


def _at_exit() -> None:
    """Send what remote ledgers do not know yet; half a second at most, and no new thread."""
    deadline_us = SYSTEM_CLOCK.now_us() + MAX_EXIT_US
    for scheduler in list(_schedulers):
        scheduler.drain(deadline_us)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
