"""The queue that users hold: it checks arguments and passes calls on to the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, Self, runtime_checkable

from gateway_queue_sync.errors import AcquireTimeout
from gateway_queue_sync.ledgers.remote import Ledger
from gateway_queue_sync.models import (
    Permit,
    QueueSnapshot,
    SessionStartLimit,
    check_limit,
    timeout_seconds,
    to_priority_us,
    whole_number,
)
from gateway_queue_sync.scheduler import Scheduler
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.worker import enqueue

NO_PRIORITY = 0.0


@runtime_checkable
class Queue(Protocol):
    """The one method that a framework needs of a queue. Implement it for a queue of your own."""

    def acquire(self, shard_id: int, timeout: float | None = None) -> Permit:
        """Block until the shard may identify, and return its permit. Raise an exception if it may not.

        Args:
            shard_id: the shard that wants to IDENTIFY, from 0 on.
            timeout: the longest wait in seconds; ``None`` waits without an end.
        """


class GatewayQueue:
    """The base class of all queues here: it blocks threads until their shards may identify.

    Use one of its subclasses (``LocalQueue``, ``LargeBotQueue``, ...); each chooses a ledger. Any thread
    may call any method. A signal handler or finalizer that interrupts a call to the queue may only call
    ``close``; other methods raise ``RuntimeError`` there. As a context manager, the queue is closed at
    the end of the block.

    Source of the rules: https://discord.com/developers/docs/topics/gateway (*Rate Limiting*).

    Args:
        make_ledger: returns the ledger that permits are granted by.
        settings: the checked settings.
    """

    def __init__(self, make_ledger: Callable[[Settings], Ledger], settings: Settings) -> None:
        self._settings = settings
        self._scheduler = Scheduler(make_ledger(settings), settings, owner=type(self).__name__)

    # --- permits ----------------------------------------------------------------------------------

    def acquire(
        self, shard_id: int, timeout: float | None = None, *, priority: float = NO_PRIORITY
    ) -> Permit:
        """Block until the shard may identify, and return its permit.

        If there is no permit now, the calling thread waits in the line of the shard's bucket: first
        come, first served. A call that times out or is interrupted uses up nothing.

        Args:
            shard_id: the shard that wants to IDENTIFY, from 0 on.
            timeout: the longest wait in seconds; ``None`` or ``inf`` waits without an end, 0 tries once.
            priority: a head start in seconds: the shard is sorted as if it had arrived that much
                earlier (negative: later). So no shard is passed over again and again. In a shared
                ledger, at most a day of it counts.

        Raises:
            AcquireTimeout: no permit came in time; its ``eta`` says when it would have come.
            SessionLimitExhausted: the limit is used up, and the queue was made to raise then.
            QueueClosed: the queue is closed, or was while waiting.
            LedgerError: the shared ledger could not be reached when the timeout was over.
            TypeError, ValueError: an argument is not a shard id, a timeout or a priority.
            RuntimeError: the call comes from a signal handler or finalizer that interrupted this
                queue, from a callback in the queue's worker, or from a forked child.
        """
        if type(shard_id) is not int or shard_id < 0:
            shard_id = whole_number("shard_id", shard_id)
        if timeout is not None:
            timeout = timeout_seconds(timeout)
        priority_us = 0 if priority is NO_PRIORITY else to_priority_us(priority)
        scheduler = self._scheduler
        forks, permit = scheduler.forks, scheduler.try_free(shard_id)
        if permit is None or permit.reporter is None:
            permit = scheduler.wait(shard_id, timeout, priority_us, permit)
        if scheduler.forks != forks:  # a signal handler forked in here, and this is the child
            raise scheduler.forked()
        return permit

    def try_acquire(self, shard_id: int) -> Permit | None:
        """Return a permit if the shard may identify now, else ``None``. It does not overtake waiters.

        With a shared ledger it waits for one reply, 0.5 seconds at most.

        Raises:
            SessionLimitExhausted: the limit is used up, and the queue was made to raise then.
            QueueClosed: the queue is closed.
            LedgerError: the shared ledger cannot be reached.
            TypeError, ValueError: ``shard_id`` is not a shard id.
            RuntimeError: as ``acquire`` does.
        """
        shard_id = whole_number("shard_id", shard_id)
        try:
            return self.acquire(shard_id, 0.0)
        except AcquireTimeout:
            return None

    def enqueue(self, shard_id: int, *, priority: float = NO_PRIORITY) -> Future[Permit]:
        """Join the line without a thread, and return the future of the permit. Never blocks.

        If the bucket is free and the ledger in memory, the future is done at once. Cancelling the
        future leaves the line and uses up nothing. If ``cancel()`` returns false, the permit was
        granted: use it or call ``unused()``. Callbacks run in the queue's worker, which serves all
        futures, so they must be quick and must not block on this queue. (If the caller cancels, or
        adds a callback to a future that is done, the callback runs in the caller.) The future gets the
        exception ``QueueClosed`` if the queue is closed first, and ``SessionLimitExhausted`` if the
        queue was made to raise that. In asyncio use ``aio.acquire``.

        Args:
            shard_id: the shard that wants to IDENTIFY, from 0 on.
            priority: a head start in seconds, as for ``acquire``.

        Raises:
            QueueClosed: the queue is closed.
            TypeError, ValueError: an argument is not a shard id or a priority.
            RuntimeError: as ``acquire`` does, but an observer may enqueue.
        """
        shard_id = whole_number("shard_id", shard_id)
        priority_us = 0 if priority is NO_PRIORITY else to_priority_us(priority)
        scheduler = self._scheduler
        forks, future = scheduler.forks, enqueue(scheduler, shard_id, priority_us)
        if scheduler.forks != forks:
            raise scheduler.forked()
        return future

    # --- the queue --------------------------------------------------------------------------------

    def update(self, limit: SessionStartLimit) -> None:
        """Replace the session start limit. It applies to those who wait now, too.

        With another ``max_concurrency``, all waiters change to the lines of their new buckets and keep
        their order; each new bucket starts from the latest grant of any old one.

        Raises:
            TypeError: ``limit`` is not a ``SessionStartLimit``.
            ValueError: its ``total`` is not more than this queue's reserve.
            QueueClosed: the queue is closed.
            LedgerError: the shared ledger did not answer within 5 seconds; the limit may or may not
                have been applied.
            RuntimeError: as ``acquire`` does.
        """
        self._scheduler.update(check_limit(limit, self._scheduler.reserve))

    def snapshot(self) -> QueueSnapshot:
        """Return who waits, until when, and what is left of the limit. Works on a closed queue, too.

        Raises:
            LedgerError: the shared ledger did not answer within 5 seconds.
            RuntimeError: as ``acquire`` does.
        """
        return self._scheduler.snapshot()

    def close(self) -> None:
        """Grant no more permits. All who wait in this process get ``QueueClosed``.

        Never blocks: the worker completes the futures and sends outstanding reports. Closing again
        changes nothing.
        """
        self._scheduler.close()

    @property
    def closed(self) -> bool:
        """Whether the queue was closed."""
        return self._scheduler.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        scheduler = self._scheduler
        left = scheduler.ledger.budget()
        limit = "" if left is None else f" remaining={left.remaining}/{left.total}"
        state = " closed" if scheduler.closed else ""
        waiting, granted = len(scheduler.lines), scheduler.ledger.granted
        return f"<{type(self).__name__} waiting={waiting} granted={granted}{limit}{state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: its lines and its account live in "
            f"this process; to share one account over processes use SqliteQueue or RedisQueue"
        )


def scheduler_of(queue: GatewayQueue) -> Scheduler:
    """Return a queue's scheduler, for this package's own use: the broker, status, tests."""
    return queue._scheduler
