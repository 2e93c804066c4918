"""Waiting for a permit in asyncio.

With another event loop, use the future that ``queue.enqueue`` returns.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from gateway_queue_sync.errors import AcquireTimeout
from gateway_queue_sync.models import US_PER_SECOND, Permit, timeout_seconds
from gateway_queue_sync.queue import GatewayQueue, scheduler_of


async def acquire(
    queue: GatewayQueue, shard_id: int, timeout: float | None = None, *, priority: float = 0.0
) -> Permit:
    """Wait, without blocking the event loop, until the shard may identify, and return its permit.

    No thread waits. A task that is cancelled here leaves the line, and a permit that was granted at that
    moment is given back. If the loop is so busy that the permit is older than the queue's ``margin``
    when it gets here, it is given back, too, and the call waits again at its old position. Send the
    IDENTIFY, or report ``sent()``, before the next ``await``: the age is not checked again.

    Args:
        queue: any queue of this package.
        shard_id: the shard that wants to IDENTIFY, from 0 on.
        timeout: the longest wait in seconds; ``None`` or ``inf`` waits without an end. With 0, it
            can only succeed on a queue in memory, since a shared ledger needs time to answer.
        priority: a head start in seconds, as for ``GatewayQueue.acquire``.

    Raises:
        AcquireTimeout: no permit came in time; nothing was used up.
        SessionLimitExhausted: the limit is used up, and the queue was made to raise then.
        QueueClosed: the queue is closed, or was while waiting.
        TypeError, ValueError: an argument is not a shard id, a timeout or a priority.
        RuntimeError: as ``GatewayQueue.enqueue`` does.
    """
    longest = None if timeout is None else timeout_seconds(timeout)
    loop, scheduler = asyncio.get_running_loop(), scheduler_of(queue)
    deadline = None if longest is None else loop.time() + longest
    asked_us = scheduler.now_us()
    future = queue.enqueue(shard_id, priority=priority)
    try:
        while True:
            await _wait(loop, future, deadline)
            if not future.done():
                raise AcquireTimeout(shard_id, timeout or 0.0)
            permit = future.result()
            if scheduler.is_in_time(permit):
                return permit
            # Join the line at the old position first, because giving the permit back opens the bucket.
            waited = (scheduler.now_us() - asked_us) / US_PER_SECOND
            try:
                future = queue.enqueue(shard_id, priority=priority + waited)
            finally:
                permit.unused()
    except BaseException:
        if not future.cancel():
            future.add_done_callback(_give_back)
        raise


async def _wait(
    loop: asyncio.AbstractEventLoop, future: Future[Permit], deadline: float | None
) -> None:
    """Wait until the future is done or the time is over, without cancelling it."""
    if future.done() or (deadline is not None and deadline <= loop.time()):
        return
    changed = asyncio.Event()

    def done(future: Future[Permit]) -> None:
        try:
            loop.call_soon_threadsafe(changed.set)
        except RuntimeError:  # the loop is closed: nobody will take the permit
            _give_back(future)

    future.add_done_callback(done)
    timer = None if deadline is None else loop.call_at(deadline, changed.set)
    try:
        await changed.wait()
    finally:
        if timer is not None:
            timer.cancel()


def _give_back(future: Future[Permit]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().unused()
