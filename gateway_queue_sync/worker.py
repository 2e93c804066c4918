"""The worker: the one background thread of a queue.

It completes futures, and only it sends requests to a shared ledger. It starts on demand. It ends when it
has had nothing to do for some seconds, or when the queue, to which it has a weak reference, is deleted.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
import weakref
from collections import deque
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from gateway_queue_sync.clock import FOREVER_US, Clock, OwnedLock, start
from gateway_queue_sync.errors import QueueClosed
from gateway_queue_sync.events import Event
from gateway_queue_sync.future import PermitFuture
from gateway_queue_sync.lines import Waiter
from gateway_queue_sync.models import US_PER_SECOND, Permit

if TYPE_CHECKING:
    from gateway_queue_sync.scheduler import Scheduler

log = logging.getLogger("gateway_queue_sync")

LINGER_US = 5 * US_PER_SECOND
"""How long the worker lives without anything to do."""

MAX_SLEEP_US = 60 * US_PER_SECOND
"""The longest sleep: sleeps do not include the time for which the machine is suspended."""

RETRY_US = 1 * US_PER_SECOND


class Worker:
    """Asks the ledger for the heads that are futures; if the ledger is remote, for all heads.

    Its methods are called with the scheduler's lock held, except ``emit_later``, ``turn``,
    ``is_current``, ``is_alive`` and ``join``.

    Attributes:
        thread: the thread, ``None`` if there is none.
        futures: the waiters that are futures.
        events: events to emit in this thread, because they must not be emitted where they happened.
    """

    def __init__(self, clock: Clock, lock: OwnedLock) -> None:
        self._clock = clock
        self._condition = clock.condition(lock)  # notified if there is something to do
        self.thread: threading.Thread | None = None
        self._due: list[tuple[int, int]] = []  # a heap: when to ask for the head of a bucket; which
        self._idle_since_us = clock.now_us()
        self.futures: set[Waiter] = set()
        self.events: deque[Event] = deque()

    def is_current(self) -> bool:
        """Return whether this thread is the worker."""
        return self.thread is threading.current_thread()

    def start(self, scheduler: Scheduler) -> None:
        """Start the thread if there is none, and wake it."""
        if not self.is_alive():
            self._start(scheduler)
        self._condition.notify()

    def _start(self, scheduler: Scheduler) -> None:
        # ``thread`` is set first, because a thread may run even if its start was interrupted. One that
        # finds another thread there ends.
        visit = self._clock.inside(worker=True)
        self.thread = threading.Thread(
            target=_serve,
            args=(
                weakref.ref(scheduler, partial(_wake, self._condition)),
                self._condition,
                visit,
                scheduler.forks,
            ),
            name="gateway-queue-worker",
            daemon=True,
        )
        try:
            start(self.thread)
        except RuntimeError:
            visit.__exit__(None, None, None)  # no thread can be started, so none will leave it
            raise

    def wake(self, scheduler: Scheduler) -> None:
        """Wake the worker; if no thread can be started now, the next call tries again."""
        with contextlib.suppress(RuntimeError):
            self.start(scheduler)

    def schedule(self, head: Waiter, bucket: int) -> None:
        """Plan to ask for a head when it may ask. The plan is outdated if that time has changed."""
        heapq.heappush(self._due, (head.ask_at_us, bucket))
        self._condition.notify()

    def emit_later(self, scheduler: Scheduler, event: Event) -> None:
        """Let the worker emit an event, so that the events of a future keep their order."""
        self.events.append(event)
        scheduler.complete(partial(self.wake, scheduler))

    def discard(self, future: Waiter) -> None:
        """Forget a future that has left its line."""
        self.futures.discard(future)
        if not self.futures:
            self._condition.notify()  # the thread may end soon

    def is_alive(self) -> bool:
        """Return whether the thread runs."""
        return self.thread is not None and self.thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended, if it was started."""
        thread = self.thread
        if thread is not None and thread.is_alive():
            thread.join(timeout)

    # --- in its thread ----------------------------------------------------------------------------

    def turn(self, scheduler: Scheduler) -> None:
        """Do all that is due now."""
        if not self.is_current():
            return
        forks = scheduler.forks
        busy = bool(self.events)
        while self.events:
            scheduler.emit(self.events.popleft())
            if scheduler.forks != forks:
                return  # an observer has forked, and this is the child process
        if scheduler.remote is not None:
            answered: list[Waiter] = []
            busy |= scheduler.remote.exchange(scheduler, answered)
            for waiter in answered:
                _serve_future(scheduler, waiter, forks)
        else:
            while head := scheduler.locked(self._due_head, scheduler):
                busy = True
                _serve_future(scheduler, head, forks)
        if busy:
            self._idle_since_us = scheduler.now_us()

    def _due_head(self, scheduler: Scheduler) -> Waiter | None:
        """Return a head to ask for now, if there is one. It stays planned until it has asked."""
        if self.events:
            return None  # one of them may be the head's, and comes first
        at_us, head = self._next(scheduler)
        return head if at_us <= scheduler.now_us() else None

    def _next(self, scheduler: Scheduler) -> tuple[int, Waiter | None]:
        """Return the next head to ask for, and when. Plans that are outdated are dropped."""
        while self._due:
            at_us, bucket = self._due[0]
            head = scheduler.lines.head(bucket)
            if head and head.future and head.permit is None and head.ask_at_us == at_us:
                return at_us, head
            heapq.heappop(self._due)
        return FOREVER_US, None

    def ask_again(self, scheduler: Scheduler) -> None:
        """Plan to ask a remote ledger for all heads in a second, because a turn was interrupted."""
        if scheduler.remote is None:
            return  # what was planned still is
        scheduler.remote.interrupted()
        soon_us = scheduler.now_us() + RETRY_US
        for head in scheduler.lines.heads():
            if head.permit is None:
                head.ask_at_us = max(head.ask_at_us, soon_us)
                scheduler.notify_head(head)

    def rest_us(self, scheduler: Scheduler) -> int | None:
        """Return how long the thread may sleep; ``None``: it should end."""
        if not self.is_current():
            return None
        if self.events:
            return 0
        now_us, wake_us = scheduler.now_us(), self._next(scheduler)[0]
        waiting = bool(self.futures)
        if scheduler.remote is not None:
            wake_us = min(wake_us, scheduler.remote.wake_us(closed=scheduler.closed))
            waiting = bool(scheduler.lines.by_bucket)
        if wake_us < FOREVER_US:
            return max(0, min(wake_us - now_us, MAX_SLEEP_US))
        rest_us = MAX_SLEEP_US if waiting else self._idle_since_us + LINGER_US - now_us
        if scheduler.closed or rest_us <= 0:
            self.thread = None
            return None
        return rest_us


# --- futures --------------------------------------------------------------------------------------


def enqueue(
    scheduler: Scheduler,
    shard_id: int,
    priority_us: int,
    arrived_us: int | None = None,
    hold_us: int = 0,
) -> PermitFuture:
    """Return the future of a permit.

    The worker emits all events of a future that waits, so that they come in order. If ``arrived_us`` is
    passed (by the broker), the worker completes the future in any case, and its permit may be held.
    """
    future = PermitFuture()
    permit: Permit | None = None
    try:
        if arrived_us is None:
            permit = scheduler.try_free(shard_id, waits=False)
        if permit is not None and permit.reporter is not None:
            _complete(future, permit)
        else:
            scheduler.check_caller(waits=False)
            waiter = scheduler.waiter(shard_id, arrived_us, priority_us, permit)
            waiter.future, waiter.hold_us = future, hold_us
            future.on_cancel = partial(_leave_cancelled, scheduler, waiter, scheduler.forks)
            with scheduler.clock.inside():
                scheduler.locked(_join, scheduler, waiter)
    except BaseException:
        # Cancelling the future leaves the line, or fails if the future has its permit.
        if not future.cancel() and future.has_permit():
            future.result().unused()
        elif permit is not None and not permit.returned:
            scheduler.complete(partial(scheduler.return_permit, permit))
        raise
    return future


def _join(scheduler: Scheduler, waiter: Waiter) -> None:
    """Join the line, and let the worker emit the event."""
    scheduler.join(waiter)
    event = scheduler.waiting_event(waiter, FOREVER_US) if scheduler.listens() else None
    if event is not None:
        scheduler.worker.events.append(event)
    if event is not None or not scheduler.worker.is_alive():
        scheduler.worker.start(scheduler)


def _leave_cancelled(
    scheduler: Scheduler, waiter: Waiter, forks: int, future: PermitFuture
) -> None:
    """Remove a cancelled future from its line, and notify the threads that wait for it.

    If it was interrupted, calling it again completes it.
    """
    if scheduler.forks != forks:
        return  # the future is a copy of the parent's
    if scheduler.lock.is_held():  # in a signal handler: leave right after the call it interrupts
        args = scheduler, waiter, forks, future
        threading.Thread(target=_leave_cancelled, args=args, name="gateway-queue-cancel").start()
        return
    try:
        scheduler.leave(waiter, None)
    finally:
        future.set_running_or_notify_cancel()
    future.on_cancel = None


def _step(scheduler: Scheduler, waiter: Waiter) -> Permit | Event | None:
    """Ask for a future as a thread would, if it still waits. The lock is held.

    This does not check the future itself, whose lock another thread may hold for long.
    """
    if waiter.future is None:
        return None
    if waiter.entry is None and waiter.permit is not None:  # it came too late
        scheduler.join(waiter)
    answer = scheduler.step(waiter)
    if answer is None and scheduler.remote is None and scheduler.lines.is_head(waiter):
        scheduler.notify_head(waiter)
    return answer


def _serve_future(scheduler: Scheduler, waiter: Waiter, forks: int) -> None:
    """Ask for a future that is the head of its line, and complete it if there is an answer.

    If an observer or a callback forks meanwhile, the permit belongs to the parent.
    """
    try:
        while True:
            answer = scheduler.locked(_step, scheduler, waiter)
            if answer is None:
                return
            if not isinstance(answer, Permit):
                scheduler.emit(answer)
            elif scheduler.deliver(waiter, answer):
                break
    except BaseException as error:  # noqa: BLE001 - the future gets it
        _fail(scheduler, waiter, error, forks)
        return
    future = scheduler.locked(_claim, waiter) if scheduler.forks == forks else None
    if future is None:
        return  # it was cancelled, and ``leave`` has given the permit back
    try:
        _complete(future, answer)
    except BaseException:
        log.exception("a callback of shard %d's future raised; the queue goes on", waiter.shard_id)


def close_futures(scheduler: Scheduler, forks: int) -> None:
    """Complete all futures with ``QueueClosed``, after ``close``."""
    for waiter in scheduler.locked(lambda: list(scheduler.worker.futures)):
        _fail(scheduler, waiter, QueueClosed(), forks)


def _fail(scheduler: Scheduler, waiter: Waiter, error: BaseException, forks: int) -> None:
    """Complete a future with an error, unless this is a child process and the future its parent's."""
    if scheduler.forks != forks:
        return
    waiter.error = None
    try:
        future = scheduler.leave(waiter, error)
        error.__traceback__ = None  # its frames hold the future
        if future is not None:
            future.on_cancel = None
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
    except BaseException:
        log.exception("a callback of shard %d's future raised; the queue goes on", waiter.shard_id)


def _claim(waiter: Waiter) -> PermitFuture | None:
    """Take a waiter's future and permit, to complete it; ``None`` if it has left. The lock is held."""
    future, waiter.future = waiter.future, None
    if future is not None:
        waiter.permit = None  # from now on it belongs to the caller
    return future


def _complete(future: PermitFuture, permit: Permit) -> None:
    """Complete a future with a permit. Give the permit back if the future was cancelled just now."""
    try:
        if future.set_running_or_notify_cancel():
            future.on_cancel = None
            future.set_result(permit)
    finally:
        if not future.has_permit():
            permit.unused()


# --- the thread: nothing here keeps a scheduler alive ---------------------------------------------


def _serve(
    ref: weakref.ref[Scheduler],
    condition: threading.Condition,
    visit: AbstractContextManager[object],
    forks: int,
) -> None:
    """Run the worker until there is nothing to do, or the scheduler is deleted, or at a fork."""
    goes_on = True
    with visit:
        while goes_on:
            try:
                goes_on = _serve_or_sleep(ref, condition, forks)
            except BaseException:
                with contextlib.suppress(BaseException):
                    log.exception("the worker of a queue was interrupted; it goes on")


def _serve_or_sleep(
    ref: weakref.ref[Scheduler], condition: threading.Condition, forks: int
) -> bool:
    """Do all that is due, then sleep. Return whether to continue."""
    scheduler = ref()
    if scheduler is None or scheduler.forks != forks:
        return False
    try:
        scheduler.worker.turn(scheduler)
    except BaseException:
        log.exception("the worker of a queue failed; it goes on")
        if scheduler.forks != forks:
            return False
        scheduler.complete(partial(scheduler.worker.ask_again, scheduler))
    if scheduler.forks != forks:
        return False
    try:
        condition.acquire()
        rest_us = scheduler.worker.rest_us(scheduler)
        del scheduler
        if rest_us is None or ref() is None:
            return False
        if rest_us > 0:
            condition.wait(rest_us / US_PER_SECOND)
        return True
    finally:
        try:  # noqa: SIM105 - there must be no call before the release
            condition.release()
        except RuntimeError:
            pass  # as in ``OwnedLock.run``


def _wake(condition: threading.Condition, _: weakref.ref[Scheduler]) -> None:
    """Wake a worker whose scheduler is being deleted, so that it ends."""
    try:
        if condition.acquire(blocking=False):
            condition.notify()
    except RuntimeError:
        pass  # in a forked child the lock is another one
    finally:
        try:  # noqa: SIM105 - there must be no call before the release
            condition.release()
        except RuntimeError:
            pass  # another thread holds it, so the worker is awake
