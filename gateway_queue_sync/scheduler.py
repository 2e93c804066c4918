"""How threads wait for permits: one lock, the lines, and the wait loop.

- One lock protects the lines. Each thread that waits has its own condition with that lock. Only the head
  of a line asks the ledger. All others sleep until a waiter that leaves wakes the new head.
- A ledger in memory is asked with the lock held: by the thread that is the head, or by the worker if the
  head is a future. A remote ledger is asked by the worker only, without the lock, for all heads at once.
- A permit stays on its waiter, at the head of the line, until it is handed over. Then the waiter leaves
  the line and wakes the new head, and the permit gets its time stamp, as the last step with the lock
  held. A permit that is older than the margin when its waiter gets it is given back, and the waiter
  asks again at the same position.
- A change of the state and its wake-ups are one unit (``OwnedLock.complete``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from functools import partial

from gateway_queue_sync import errors, events, forecast, process
from gateway_queue_sync.clock import FOREVER_US, OwnedLock, start
from gateway_queue_sync.future import PermitFuture
from gateway_queue_sync.ledgers.remote import Ledger
from gateway_queue_sync.limit_reader import LimitReader
from gateway_queue_sync.lines import Lines, Waiter, waiter_numbers
from gateway_queue_sync.log import rejected_often, shards
from gateway_queue_sync.models import (
    US_PER_SECOND,
    Permit,
    QueueSnapshot,
    Report,
    SessionStartLimit,
    to_us,
)
from gateway_queue_sync.observers import Observers, left_event
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.token_bucket import MANY_REJECTIONS, Denial, Reason
from gateway_queue_sync.worker import MAX_SLEEP_US, Worker, close_futures

log = logging.getLogger("gateway_queue_sync")

MAX_POSITION = 100  # from this position on, ``AcquireTimeout`` has no ``eta``


class Scheduler:
    """The lines of one queue, its waiters, and its worker.

    Attributes:
        ledger: grants the permits. It is ``local`` (in memory) or ``remote``; the other is ``None``.
        lock: protects the attributes below. ``locked`` and ``complete`` call a function with it held.
        lines: the waiters.
        worker: serves futures, and a remote ledger.
        closed: whether the queue was closed.
        forks: how many forks lie between the process that made the queue and this one.
    """

    def __init__(self, ledger: Ledger, settings: Settings, owner: str) -> None:
        self.ledger = ledger
        self.local = None if ledger.remote else ledger
        self.remote = ledger if ledger.remote else None
        self.clock = settings.clock
        self.now_us = settings.clock.now_us
        self.reserve = settings.reserve
        self._raises = settings.when_exhausted == "raise"
        self.reader = None if settings.refresh is None else LimitReader(settings)
        self._owner_name = owner
        self.closed = False
        self.forks = 0
        self.observers = Observers(settings, ledger.budget)
        self._observed = settings.observer is not None
        self.lock = OwnedLock()
        self.locked, self.complete = self.lock.run, self.lock.complete
        self.begin()
        process.register(self)
        if self.reader is not None and ledger.should_read:
            self.locked(self.reader.read, self, self.now_us())

    def begin(self) -> None:
        """Begin with empty lines."""
        self._get_ident = threading.get_ident  # looked up now: gevent may have patched it
        self._callers: set[int] = set()  # the threads in a call that may wait
        self.lines = Lines(self.ledger.max_concurrency)
        self.worker = Worker(self.clock, self.lock)

    # --- who may call -----------------------------------------------------------------------------

    def blocking(self, work: Callable[[], None]) -> None:
        """Call ``work``, which waits, with the lock held. No signal handler can call the queue then."""
        ident = self._get_ident()
        with self.clock.inside():
            try:
                self._callers.add(ident)
                self.locked(work)
            finally:
                self._callers.discard(ident)

    def check_caller(self, *, waits: bool) -> None:
        """Raise if this thread is in another call, or if the queue in this process is only a copy."""
        if self.forks and self.remote is None:
            raise self.forked()
        ident = self._get_ident()
        if self.lock.owner == ident or (waits and ident in self._callers):
            raise errors.reentered()

    def forked(self) -> RuntimeError:
        """Return the error for a process that was forked from the one that made the queue."""
        return errors.forked(self._owner_name)

    # --- permits without waiting ------------------------------------------------------------------

    def try_free(self, shard_id: int, *, waits: bool = True) -> Permit | None:
        """Take a permit if the bucket is free and has no waiters. Else the caller must wait.

        A permit without a ``reporter`` is older than the margin. The caller must pass it to ``wait``,
        which gives it back and waits as if it had arrived when the permit was granted.
        """
        ident, lock, local = self._get_ident(), self.lock, self.local
        if lock.owner == ident or self.forks or (self._callers and ident in self._callers):
            self.check_caller(waits=waits)
        permit: Permit | Denial | None = None
        try:
            try:
                lock.acquire()
                lock.owner = ident
                if self.closed:
                    raise errors.QueueClosed
                lines = self.lines
                if local is None or (
                    lines.by_bucket and shard_id % lines.max_concurrency in lines.by_bucket
                ):
                    return None
                now_us = self.now_us()
                if self.reader is not None:
                    self.reader.read_if_due(self, now_us)
                permit = local.take(local.account, shard_id, now_us)
            finally:
                if lock.owner == ident:
                    lock.owner = 0
                try:
                    lock.release()
                except RuntimeError:
                    pass  # as in ``OwnedLock.run``
            if self.reader is not None:
                self.reader.log_failure()
            if type(permit) is not Permit:
                return None
            remaining = permit.remaining
            if self._observed or (
                remaining is not None and remaining <= self.observers.log.grants_up_to
            ):
                self._announce_free_grant(permit, ident)
            margin_us = self.ledger.margin_us
            if not margin_us or self.now_us() - permit.stamp_us <= margin_us:
                permit.reporter = self
            return permit
        except BaseException:
            if isinstance(permit, Permit):
                self.complete(partial(self.return_permit, permit))
                if permit.waiter:  # its event was emitted
                    self.emit(events.ShardLeft(shard_id, 0.0, "interrupted", permit.waiter))
            raise

    def _announce_free_grant(self, permit: Permit, ident: int) -> None:
        permit.waiter = number = next(waiter_numbers)
        shard_id, bucket, remaining = permit.shard_id, permit.bucket, permit.remaining
        outer = ident in self._callers  # an observer may enqueue
        try:
            self._callers.add(ident)
            self.emit(events.ShardGranted(shard_id, bucket, 0.0, remaining, number))
        finally:
            if not outer:
                self._callers.discard(ident)

    def waiter(
        self, shard_id: int, arrived_us: int | None, priority_us: int, late: Permit | None
    ) -> Waiter:
        """Return a new waiter. With a late permit, it counts as arrived when that permit was granted."""
        if arrived_us is None:
            arrived_us = self.now_us() if late is None else late.stamp_us
        waiter = Waiter(shard_id, arrived_us, arrived_us - priority_us)
        waiter.permit = late
        if late is not None and late.waiter:  # its event was emitted
            waiter.number = late.waiter
            self.observers.note_granted(waiter.number)
        return waiter

    # --- threads ----------------------------------------------------------------------------------

    def wait(
        self, shard_id: int, timeout: float | None, priority_us: int, late: Permit | None
    ) -> Permit:
        """Wait in line until the calling thread has a permit. ``late`` is a permit that came too late.

        Every exit without a permit calls ``leave``, and calls it again in case an interrupt came at the
        very beginning of the first call.
        """
        ident, forks = self._get_ident(), self.forks
        waiter = self.waiter(shard_id, None, priority_us, late)
        waiter.once = timeout == 0
        try:
            if self.worker.thread is threading.current_thread() and (timeout != 0 or self.remote):
                raise errors.worker_blocked()
            with self.clock.inside():
                try:
                    while True:
                        answer = self.locked(self._sleep_until_answer, waiter, timeout)
                        if not isinstance(answer, Permit):
                            self.emit(answer)
                        elif self.deliver(waiter, answer):
                            break
                except BaseException as error:
                    self.leave(waiter, error, caller=ident)
                    raise
            self._callers.discard(ident)
            waiter.permit = None
            return answer
        except BaseException as error:
            self.leave(waiter, error, caller=ident)
            if self.forks != forks:  # this is a child, and what it waited for is the parent's
                raise self.forked() from None
            raise

    def _sleep_until_answer(self, waiter: Waiter, timeout: float | None) -> Permit | events.Event:
        """Sleep until there is a permit, or an event to emit without the lock. The lock is held."""
        deadline_us = FOREVER_US if timeout is None else waiter.arrived_us + to_us(timeout)
        remote = self.remote
        if waiter.entry is None:
            late = waiter.permit is not None
            self.join(waiter)
            if late and self.now_us() >= deadline_us:
                raise self._timed_out(waiter, timeout or 0.0)
        while True:
            answer = self.step(waiter)
            if answer is not None:
                return answer
            now_us, is_head = self.now_us(), self.lines.is_head(waiter)
            left_us = deadline_us - now_us
            is_asked = remote is not None and is_head and waiter.ask_at_us <= now_us
            patience_us = remote.patience_us(waiter) if remote is not None and is_asked else 0
            if left_us + patience_us <= 0:
                raise self._timed_out(waiter, timeout or 0.0)
            event = self.waiting_event(waiter, left_us) if self.listens() else None
            if event is not None:
                return event
            left_us += patience_us
            if is_head and remote is None:
                left_us = min(left_us, waiter.ask_at_us - now_us)
            if waiter.condition is None:
                waiter.condition = self.clock.condition(self.lock)
            forever = left_us >= FOREVER_US // 2
            waiter.condition.wait(None if forever else min(left_us, MAX_SLEEP_US) / US_PER_SECOND)

    def _timed_out(self, waiter: Waiter, timeout: float) -> Exception:
        """Return the exception for a waiter whose timeout is over. The lock is held."""
        if self.remote is not None:
            error = self.remote.timed_out(waiter, timeout, is_head=self.lines.is_head(waiter))
            if error is not None:
                return error
        position = self.lines.position(waiter, MAX_POSITION)
        eta = None if position == MAX_POSITION else self._eta(waiter, position)
        return errors.AcquireTimeout(waiter.shard_id, timeout, eta)

    # --- lines: with the lock held ----------------------------------------------------------------

    def join(self, waiter: Waiter) -> None:
        """Add a waiter to its line. If it has a permit, that came too late and is given back."""
        if self.closed:
            raise errors.QueueClosed
        if waiter.future is None:
            self._callers.add(self._get_ident())
        else:
            self.worker.futures.add(waiter)
        self.lines.join(waiter)
        if waiter.permit is not None:  # after joining, so that no other waiter gets it
            permit, waiter.permit, waiter.ask_at_us = waiter.permit, None, 0
            self.return_permit(permit)
        if self.remote is not None:
            self.remote.joined(waiter)
            self.worker.start(self)  # the ledger also counts waiters behind the head
        if self.lines.is_head(waiter):
            self.notify_head(waiter)

    def _remove(self, waiter: Waiter, opens_at_us: int = 0) -> None:
        """Remove a waiter from its line and wake the new head. Idempotent; the only way to leave.

        The new head asks at once, or when its bucket will open, if that is known.
        """
        if waiter in self.worker.futures:
            self.worker.discard(waiter)
        head = self.lines.leave(waiter)
        if head is None:
            return
        if self.remote is None:
            self._ask_again((head,), opens_at_us)
        else:
            # ``ask_at_us`` stays: if this waiter was the head once before, it has its answer already.
            self.notify_head(head)

    def _ask_again(self, heads: Iterable[Waiter], at_us: int = 0) -> None:
        """Let heads ask the ledger again, now or later, because its last answer may be outdated."""
        for head in heads:
            if head.permit is None:
                head.ask_at_us = at_us
                self.notify_head(head)

    def notify_head(self, waiter: Waiter) -> None:
        """Wake the head of a line, or the worker if that asks for it."""
        if self.remote is not None:
            self.remote.changed(waiter)
            self.worker.wake(self)
        elif waiter.future is not None:
            self.worker.schedule(waiter, waiter.shard_id % self.lines.max_concurrency)
        elif waiter.condition is not None:
            waiter.condition.notify()

    def limit_changed(self) -> None:
        """Let all heads ask again. If the number of buckets has changed, make new lines first."""
        if self.ledger.max_concurrency != self.lines.max_concurrency:
            self.lines = Lines(self.ledger.max_concurrency, self.lines.waiters())
        self.observers.log.limit_changed()
        self._ask_again(self.lines.heads())

    def step(self, waiter: Waiter) -> Permit | events.Event | None:
        """Ask for a permit if it is the waiter's turn. Return the permit, or an event to emit first.

        If no observer needs its events, the waiter leaves its line here; else ``deliver`` does that.
        """
        if self.closed:
            raise errors.QueueClosed
        local = self.local
        if local is not None and waiter.permit is None and waiter.error is None:
            now_us = self.now_us()
            if waiter.ask_at_us <= now_us and self.lines.is_head(waiter):
                if self.reader is not None:
                    self.reader.read_if_due(self, now_us)
                answer = local.take(local.account, waiter.shard_id, now_us)
                if answer.__class__ is Permit:  # not isinstance: an interrupt comes after a call
                    waiter.permit = answer
                event = self.record(waiter, answer, now_us)
                if event is not None:
                    return event
        if waiter.error is not None:
            try:
                raise waiter.error
            finally:
                waiter.error = None  # breaks the cycle waiter, error, traceback
        permit = waiter.permit
        if permit is not None and waiter.entry is not None and not self.listens(permit):
            self.hand_over(waiter, permit)
        return permit

    def record(self, waiter: Waiter, answer: Permit | Denial, now_us: int) -> events.Event | None:
        """Store the ledger's answer on the waiter. Return an event to emit, if there is one."""
        if isinstance(answer, Permit):
            granted_us = min(answer.stamp_us, now_us)
            answer.waited = max(0, granted_us - waiter.arrived_us) / US_PER_SECOND
            answer.waiter, answer.reporter = waiter.number, self
            waiter.permit = answer
            return None
        waiter.ask_at_us = now_us + answer.wait_us
        if answer.reason is not Reason.BUDGET:
            return None
        waiter.ask_at_us = now_us + min(answer.wait_us, MAX_SLEEP_US)
        if self._raises:
            resets_in = answer.resets_in_us / US_PER_SECOND
            waiter.error = errors.SessionLimitExhausted(answer.remaining, resets_in)
        return self.observers.exhausted(answer, now_us)

    def hand_over(self, waiter: Waiter, permit: Permit) -> bool:
        """Leave the line with a permit. False if the waiter was in none, or the permit is outdated.

        That is one whose bucket has granted again, or was replaced.
        """
        if self.closed:
            raise errors.QueueClosed
        if waiter.entry is None:
            return False
        local = self.local
        if local is None:
            self._remove(waiter)
            return True
        # The new head cannot have a permit before the window ends. But if the limit is used up, it asks
        # at once, so that observers and callers learn that now.
        was_last = permit.remaining is not None and permit.remaining <= self.reserve
        closed_us = waiter.hold_us + local.account.window_us
        self._remove(waiter, 0 if was_last else self.now_us() + closed_us)
        return local.restamp(local.account, permit, self.now_us(), waiter.hold_us)

    def return_permit(self, permit: Permit) -> None:
        """Give a permit back, and wake the heads that may get one now. Idempotent."""
        self._record_report(permit, Report.UNUSED)
        left = self.ledger.budget()
        if (
            left is not None and left.remaining <= self.reserve + 1
        ):  # it was used up before the refund
            self._ask_again(self.lines.heads())

    def _record_report(self, permit: Permit, report: Report) -> int:
        """Record or send a report. Return how many rejections in a row the bucket has."""
        rejections = 0
        if self.local is not None:
            rejections = self.local.report(permit, report)
        elif self.remote is not None:
            self.remote.report(permit, report)
            self.worker.wake(self)
        head = self.lines.head(permit.shard_id)
        self._ask_again((head,) if head else ())  # its bucket may open earlier now
        return rejections

    def report(self, permit: Permit, report: Report) -> None:
        """Record a report on a permit, and emit its event."""
        event = self.record_report(permit, report)
        if event is not None:
            self.emit(event)

    def record_report(self, permit: Permit, report: Report) -> events.Event | None:
        """Record a report, unless it repeats or contradicts an earlier one. Return the event to emit."""
        if self.forks and self.remote is None:
            return None  # the account in this child is a copy that grants nothing
        self.check_caller(waits=False)
        before, rejections, is_new = permit.reported, 0, False

        def change() -> None:
            nonlocal rejections, is_new
            reported = permit.reported
            if reported is None or (reported is Report.SENT and report is Report.REJECTED):
                if report is not Report.UNUSED:
                    rejections = self._record_report(permit, report)
                is_new, permit.reported = True, report
            if is_new and report is Report.UNUSED:
                self.return_permit(permit)

        self.complete(change)
        if is_new:
            if rejections == MANY_REJECTIONS:
                rejected_often(rejections, permit.shard_id, permit.bucket)
            return events.PermitReported(permit.shard_id, permit.bucket, report, permit.waiter)
        if Report.UNUSED in (before, report) and before is not report:
            log.warning("%r was reported %s: that changes nothing now", permit, report.value)
        return None

    # --- events -----------------------------------------------------------------------------------

    def emit(self, event: events.Event) -> None:
        """Pass an event to the log and to the observer. The lock must not be held."""
        self.observers.emit(event, in_worker=self.worker.is_current())

    def listens(self, permit: Permit | None = None) -> bool:
        """Return whether the log or an observer needs the events of waiters, or of this permit."""
        few = (
            permit is not None
            and permit.remaining is not None
            and (permit.remaining <= self.observers.log.grants_up_to)
        )
        return few or self._observed or shards.isEnabledFor(logging.INFO)

    def waiting_event(self, waiter: Waiter, left_us: int) -> events.Event | None:
        """Return the ``ShardWaiting`` of a waiter, once. The lock is held.

        With a remote ledger the position is not known yet, so the worker emits the event later.
        """
        tries = self.remote is not None and waiter.once
        if tries or not self.observers.follow_wait(waiter, left_us):
            return None
        if self.remote is not None:
            self.remote.unseen.append(waiter)
            self.worker.wake(self)
            return None
        position = self.lines.position(waiter)
        bucket, eta = waiter.shard_id % self.lines.max_concurrency, self._eta(waiter, position)
        return self.observers.waiting(waiter, bucket, position, eta)

    def deliver(self, waiter: Waiter, permit: Permit) -> bool:
        """Emit the event of a permit and hand the permit over. False if the waiter has to ask again."""
        if waiter.entry is not None:
            event = self.locked(self.observers.granted, waiter, permit)
            if event is not None:
                self.emit(event)
            if not self.locked(self.hand_over, waiter, permit):
                return False
        if not self.is_in_time(permit):
            return False
        if self.observers.latest:
            self.observers.forget(waiter.number)
        return True

    def is_in_time(self, permit: Permit) -> bool:
        """Return whether a permit is no older than the margin."""
        margin_us = self.ledger.margin_us
        return not margin_us or self.now_us() - permit.stamp_us <= margin_us

    def leave(
        self, waiter: Waiter, error: BaseException | None, *, caller: int = 0
    ) -> PermitFuture | None:
        """Leave without a permit: because of an error, or (``None``) because a future was cancelled.

        A permit that was granted is given back, and the new head is woken. The future is taken from
        the waiter and returned, so that only the calling thread completes it.
        """
        latest: type[events.Event] | None = None
        future: PermitFuture | None = None

        def change() -> None:
            nonlocal latest, future
            latest = latest or self.observers.forget(waiter.number)
            future, waiter.future = future or waiter.future, None
            if waiter.entry is not None and self.remote is not None:
                self.remote.changed(waiter)
                self.worker.wake(self)
            self._remove(waiter)
            if waiter.permit is not None:
                self.return_permit(waiter.permit)
                waiter.permit = None
            self._callers.discard(caller)

        self.complete(change)
        if latest is not None:
            here = caller or (error is not None and self.worker.is_current())
            emit = self.emit if here else partial(self.worker.emit_later, self)
            emit(left_event(waiter, error, self.now_us()))
        return future

    # --- the queue as a whole ----------------------------------------------------------------------

    def _eta(self, waiter: Waiter, position: int) -> float | None:
        """Return in about how many seconds a waiter at a position gets its permit; the lock is held."""
        number, left = waiter.shard_id % self.lines.max_concurrency, self.ledger.budget()
        reads = self.reader is not None and self.reader.reading
        if reads and left is not None and left.resets_in_us == 0:
            return None  # it depends on the limit that is being read
        waiting = len(self._callers) + len(self.worker.futures)
        in_us = self.ledger.eta_us(number, position, len(self.lines.by_bucket), waiting)
        return None if in_us is None else in_us / US_PER_SECOND

    def snapshot(self) -> QueueSnapshot:
        """Return who waits, until when, and what is left of the limit."""
        local = self.local
        self.check_caller(waits=local is None)
        if local is None:
            assert self.remote is not None
            return self.remote.snapshot(self)
        outlook, entries = self.locked(lambda: (local.outlook(), self.lines.copy()))
        lines = {number: [entry[2] for entry in sorted(line)] for number, line in entries.items()}
        return forecast.snapshot(outlook, lines)  # this may take long, and needs no lock

    def update(self, limit: SessionStartLimit) -> None:
        """Replace the limit."""
        self.check_caller(waits=self.remote is not None)
        if self.closed:
            raise errors.QueueClosed
        if self.remote is not None:
            self.remote.update(self, limit)

        def change() -> None:
            if self.local is not None:
                self.local.adopt(limit)
            if self.reader is not None:
                self.reader.outdated = True
            self.limit_changed()

        self.complete(change)
        self.emit(events.LimitUpdated(limit))

    def close(self) -> None:
        """Grant no more permits. All who wait get ``QueueClosed``.

        A thread of its own completes the futures: the worker may be in a call to the ledger for long.
        """
        if self.forks and self.remote is None:
            self.closed = True
            return
        if self.lock.is_held():  # in a signal handler: close right after the call it interrupts
            threading.Thread(target=self.close, name="gateway-queue-close").start()
            return

        args, no_thread = (self, self.forks), False

        def change() -> None:
            nonlocal no_thread
            self.closed = True
            for waiter in self.lines.waiters():
                if waiter.condition is not None:
                    waiter.condition.notify()
            if self.remote is not None:
                self.worker.wake(self)
            if self.worker.futures:
                name = "gateway-queue-close"
                thread = threading.Thread(target=close_futures, args=args, name=name, daemon=True)
                try:
                    start(thread)
                except RuntimeError:  # no thread can be started now
                    no_thread = True

        self.complete(change)
        if no_thread:
            close_futures(*args)
