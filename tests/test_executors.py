"""Why futures are better than blocked threads where threads come from a pool."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import recipes
from processes import until

from gateway_queue_sync import LocalQueue, QueueClosed

PATIENCE = 20.0
SHORT = 0.2  # s in which a pool that has a free thread runs something many times over
THREADS = 2


@pytest.fixture
def queue(clock):
    """A queue whose permit of this window is taken."""
    with LocalQueue(clock=clock) as queue:
        queue.acquire(0)
        yield queue


@pytest.fixture
def pool(queue):
    with ThreadPoolExecutor(THREADS) as pool:
        yield pool
        queue.close()  # so that the pool's threads come back


def test_shards_that_wait_in_acquire_starve_the_pool(queue, pool):
    waiting = [pool.submit(queue.acquire, shard_id) for shard_id in range(THREADS)]
    work = pool.submit(int)
    until(lambda: queue.snapshot().waiting == THREADS, "the shards")
    with pytest.raises(TimeoutError):
        work.result(SHORT)
    queue.close()
    assert [type(call.exception(PATIENCE)) for call in waiting] == [QueueClosed] * THREADS
    assert work.result(PATIENCE) == 0


def test_shards_that_wait_as_futures_leave_the_pool_alone(queue, pool, clock):
    started = []
    names = {"queue": queue, "pool": pool, "shards": 100, "start_session": started.append}
    recipes.run("add_done_callback", names)
    assert queue.snapshot().waiting == 100
    assert pool.submit(int).result(PATIENCE) == 0
    for turn in range(3):
        clock.settle(0)
        clock.advance(5.25)
        until(lambda: len(started) == turn + 1, "a session")  # noqa: B023 - called at once
    assert [permit.shard_id for permit in started] == [0, 1, 2]


def test_to_thread_starves_its_loop_and_leaves_a_ghost(queue, pool):
    async def main():
        asyncio.get_running_loop().set_default_executor(pool)
        shards = [asyncio.ensure_future(asyncio.to_thread(queue.acquire, n)) for n in range(2)]
        work = asyncio.ensure_future(asyncio.to_thread(int))
        while queue.snapshot().waiting < THREADS:
            await asyncio.sleep(0)
        done, _ = await asyncio.wait([work], timeout=SHORT)
        assert not done
        for shard in shards:
            shard.cancel()
        await asyncio.wait(shards)
        assert queue.snapshot().waiting == THREADS  # they take permits that nobody uses
        queue.close()
        assert await work == 0

    asyncio.run(main())


def test_wrapped_futures_leave_the_loop_alone_and_no_ghost(queue, pool):
    async def main():
        asyncio.get_running_loop().set_default_executor(pool)
        shards = [asyncio.wrap_future(queue.enqueue(shard_id)) for shard_id in range(100)]
        assert await asyncio.to_thread(int) == 0
        assert queue.snapshot().waiting == 100
        for shard in shards:
            shard.cancel()
        await asyncio.wait(shards)
        assert queue.snapshot().waiting == 0

    before = set(threading.enumerate())
    asyncio.run(main())
    started = {thread.name for thread in set(threading.enumerate()) - before}
    assert started <= {"gateway-queue-worker"}
