"""The worker: the thread of a queue that serves whoever has no thread of its own to wait in.

It completes futures, and it alone asks a ledger that processes share. It starts on demand and ends when
there was nothing to do for some seconds, or when nobody has the queue any more: it holds it weakly.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
import weakref
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
"""How long the worker stays when there is nothing to do."""

MAX_REST_US = 60 * US_PER_SECOND
"""How long it sleeps at most: no sleep gets shorter while the machine is suspended."""

RETRY_US = 1 * US_PER_SECOND


class Worker:
    """Serves the heads of lines that are futures, and with a remote ledger all heads.

    Its methods are called with the scheduler's lock held, except ``emit_later``, ``turn``,
    ``is_current``, ``is_alive`` and ``join``.

    Attributes:
        thread: the worker, ``None`` while there is none.
        futures: those that stand in lines.
        events: what is to be emitted here, because it must not be where it happened.
    """

    def __init__(self, clock: Clock, lock: OwnedLock) -> None:
        self._clock = clock
        self._condition = clock.condition(lock)  # there is something to do
        self.thread: threading.Thread | None = None
        # When to ask, for which bucket and whom: a heap.
        self._due: list[tuple[int, int, int, Waiter]] = []
        self._idle_since_us = clock.now_us()
        self.futures: set[Waiter] = set()
        self.events: list[Event] = []

    def is_current(self) -> bool:
        """Return whether this thread is the worker."""
        return self.thread is threading.current_thread()

    def start(self, scheduler: Scheduler) -> None:
        """Start the thread, if there is none, and wake it."""
        if not self.is_alive():
            self._start(scheduler)
        self._condition.notify()

    def _start(self, scheduler: Scheduler) -> None:
        # Registered first: one whose start was interrupted may run all the same, and then another one
        # takes its place, and it ends.
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
            visit.__exit__(None, None, None)  # the system or the interpreter gives no more threads
            raise

    def wake(self, scheduler: Scheduler) -> None:
        """Wake the worker; if no thread can be started now, the next call tries again."""
        with contextlib.suppress(RuntimeError):
            self.start(scheduler)

    def schedule(self, head: Waiter, bucket: int) -> None:
        """Ask for a head when it may ask; an entry is outdated if its head's time has changed."""
        heapq.heappush(self._due, (head.ask_at_us, bucket, head.number, head))
        self._condition.notify()

    def emit_later(self, scheduler: Scheduler, event: Event) -> None:
        """Have the worker emit an event, after those about the same future that it has emitted."""
        self.events.append(event)
        scheduler.complete(partial(self.wake, scheduler))

    def discard(self, future: Waiter) -> None:
        """Note that a future has left its line."""
        self.futures.discard(future)
        if not self.futures:
            self._condition.notify()  # the thread may end soon

    def is_alive(self) -> bool:
        """Return whether the thread runs."""
        return self.thread is not None and self.thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended; not for one that could not be started."""
        thread = self.thread
        if thread is not None and thread.is_alive():
            thread.join(timeout)

    # --- in its thread ----------------------------------------------------------------------------

    def turn(self, scheduler: Scheduler) -> None:
        """Do what there is to do now."""
        if not self.is_current():
            return
        forks = scheduler.forks
        heads, closing, events = scheduler.locked(self._to_do, scheduler)
        for event in events:
            if scheduler.forks == forks:  # else an observer has forked, and this is the child
                scheduler.emit(event)
        for waiter in closing:
            _fail(scheduler, waiter, QueueClosed(), forks)
        sent = (
            scheduler.remote is not None
            and scheduler.forks == forks
            and scheduler.remote.exchange(scheduler, heads)
        )
        for waiter in heads:
            if waiter.future is not None:
                _serve_future(scheduler, waiter, forks)
        if heads or closing or events or sent:
            self._idle_since_us = scheduler.now_us()

    def _to_do(self, scheduler: Scheduler) -> tuple[list[Waiter], list[Waiter], list[Event]]:
        """Return the heads that are due, each once, the futures to close, and the events to emit."""
        now_us, due = scheduler.now_us(), self._due
        heads: dict[Waiter, int] = {}  # and their buckets, in whose order they ask
        while due and due[0][0] <= now_us:
            at_us, bucket, _, waiter = heapq.heappop(due)
            if _is_due(scheduler, waiter, at_us):
                heads[waiter] = bucket
        events, self.events = self.events, []
        closing = list(self.futures) if scheduler.closed else []
        return sorted(heads, key=heads.__getitem__), closing, events

    def ask_again(self, scheduler: Scheduler) -> None:
        """Ask for all heads in a second: a turn that was to ask for some was interrupted."""
        if scheduler.remote is not None:
            scheduler.remote.interrupted()
        soon_us = scheduler.now_us() + RETRY_US
        for head in scheduler.lines.heads():
            if head.permit is None and (head.future is not None or scheduler.remote is not None):
                head.ask_at_us = max(head.ask_at_us, soon_us)
                scheduler.notify_head(head)

    def rest_us(self, scheduler: Scheduler) -> int | None:
        """Return how long it may sleep, ``None`` to end."""
        if not self.is_current():
            return None
        if self.events or (scheduler.closed and self.futures):
            return 0
        now_us, due = scheduler.now_us(), self._due
        while due and not _is_due(scheduler, due[0][3], due[0][0]):
            heapq.heappop(due)
        wake_us = due[0][0] if due else FOREVER_US
        waiting = bool(self.futures)
        if scheduler.remote is not None:
            wake_us = min(wake_us, scheduler.remote.wake_us(closed=scheduler.closed))
            waiting = bool(scheduler.lines.by_bucket)
        if wake_us < FOREVER_US:
            return max(0, min(wake_us - now_us, MAX_REST_US))
        rest_us = MAX_REST_US if waiting else self._idle_since_us + LINGER_US - now_us
        if scheduler.closed or rest_us <= 0:
            self.thread = None
            return None
        return rest_us


def _is_due(scheduler: Scheduler, waiter: Waiter, at_us: int) -> bool:
    """Return whether this is when the worker asks for the waiter; with the lock held."""
    if waiter.entry is None or waiter.permit is not None or waiter.ask_at_us != at_us:
        return False
    return scheduler.lines.is_head(waiter)


# --- futures --------------------------------------------------------------------------------------


def enqueue(
    scheduler: Scheduler, shard_id: int, priority_us: int, arrived_us: int | None = None
) -> PermitFuture:
    """Return the future of a permit.

    All events about one that waits come from the worker, so that they come in order. If
    ``arrived_us`` is given (by the broker), its permit does, too.
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
            waiter.future = future
            future.on_cancel = partial(_leave_cancelled, scheduler, waiter, scheduler.forks)
            with scheduler.clock.inside():
                scheduler.locked(_join, scheduler, waiter)
    except BaseException:
        # Cancelling leaves the line. If that comes too late, the permit is in the future.
        if not future.cancel() and future.has_permit():
            future.result().unused()
        elif permit is not None and not permit.returned:
            scheduler.complete(partial(scheduler.return_permit, permit))
        raise
    return future


def _join(scheduler: Scheduler, waiter: Waiter) -> None:
    """Stand in line, and have the worker emit that."""
    scheduler.join(waiter)
    event = scheduler.waiting_event(waiter, FOREVER_US)
    if event is not None:
        scheduler.worker.events.append(event)
    if event is not None or not scheduler.worker.is_alive():
        scheduler.worker.start(scheduler)


def _leave_cancelled(
    scheduler: Scheduler, waiter: Waiter, forks: int, future: PermitFuture
) -> None:
    """Take a future that was cancelled out of its line, and notify those who wait for it.

    Harmless when repeated, which completes what was interrupted.
    """
    if scheduler.forks != forks:
        return  # it is a copy of the parent's
    if scheduler.lock.is_held():  # a signal handler: right after what it interrupts
        args = scheduler, waiter, forks, future
        threading.Thread(target=_leave_cancelled, args=args, name="gateway-queue-cancel").start()
        return
    try:
        scheduler.leave(waiter, None)
    finally:
        future.set_running_or_notify_cancel()
    future.on_cancel = None


def _step(scheduler: Scheduler, waiter: Waiter) -> Permit | Event | None:
    """Ask for a future as a thread would, if it still waits; with the lock held.

    It does not ask the future: that takes a lock, which somebody else may hold for long.
    """
    if waiter.future is None:
        return None
    if waiter.entry is None and waiter.permit is not None:  # it was delivered too late
        scheduler.join(waiter)
    answer = scheduler.step(waiter)
    if answer is None and scheduler.remote is None and scheduler.lines.is_head(waiter):
        scheduler.notify_head(waiter)
    return answer


def _serve_future(scheduler: Scheduler, waiter: Waiter, forks: int) -> None:
    """Ask for a future that is the head of its line, and complete it if that has an answer.

    In a child that an observer or a callback has forked meanwhile, the permit is the parent's.
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
    except BaseException as error:  # noqa: BLE001 - the future's holder gets it
        _fail(scheduler, waiter, error, forks)
        return
    future = scheduler.locked(_claim, waiter) if scheduler.forks == forks else None
    if future is None:
        return  # it was cancelled, and ``leave`` has given the permit back
    try:
        _complete(future, answer)
    except BaseException:
        log.exception("a callback of shard %d's future raised; the queue goes on", waiter.shard_id)


def _fail(scheduler: Scheduler, waiter: Waiter, error: BaseException, forks: int) -> None:
    """Complete a future with an error, unless this is a child, and the future its parent's."""
    if scheduler.forks != forks:
        return
    future, waiter.error = waiter.future, None
    try:
        scheduler.leave(waiter, error)
        error.__traceback__ = None  # its frames hold the future
        if future is not None:
            future.on_cancel = None
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
    except BaseException:
        log.exception("a callback of shard %d's future raised; the queue goes on", waiter.shard_id)


def _claim(waiter: Waiter) -> PermitFuture | None:
    """Return a future to be completed with its permit, ``None`` if it has left; with the lock held."""
    future, waiter.future = waiter.future, None
    if future is not None:
        waiter.permit = None  # it is the caller's
    return future


def _complete(future: PermitFuture, permit: Permit) -> None:
    """Complete a future with a permit, or give that back if it is cancelled or interrupted just now."""
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
    """Serve a scheduler for as long as there is something to do, and it exists, in one process."""
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
    """Do what there is to do, then sleep; return whether to go on."""
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
    """Wake a worker whose scheduler nobody has any more, so that it ends."""
    if condition.acquire(blocking=False):
        try:
            with contextlib.suppress(RuntimeError):  # the lock is another one in a forked child
                condition.notify()
        finally:
            condition.release()
