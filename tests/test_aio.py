"""Waiting for permits in asyncio: what is cancelled, at whatever moment, costs nothing."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter

import pytest

from gateway_queue_sync import (
    AcquireTimeout,
    LargeBotQueue,
    NoOpQueue,
    QueueClosed,
    SessionLimitExhausted,
    SessionStartLimit,
)
from gateway_queue_sync.aio import acquire

WINDOW, MARGIN = 5.25, 0.25
LIMIT = SessionStartLimit(10, 10, 600.0, 1)
PATIENCE = 20.0

memory = pytest.mark.accounts("memory")


async def until(predicate):
    async with asyncio.timeout(PATIENCE):
        while not predicate():
            await asyncio.sleep(0.001)


def block_until(predicate, clock):
    """Wait in the event loop's thread, so that nothing reaches the loop meanwhile."""
    for _ in range(100_000):
        if predicate():
            return
        clock.settle(0)
    raise AssertionError("it did not come true")


def granted(queue, count):
    return lambda: queue.snapshot().granted == count


def left_alone(queue, remaining):
    """Nobody waits, and this is left of the limit."""

    def is_so():
        snapshot = queue.snapshot()
        return (snapshot.waiting, snapshot.limit.remaining) == (0, remaining)

    return is_so


@pytest.fixture
def queue(account, clock):
    """A queue whose only bucket has just granted: 9 session starts are left."""
    queue = account.large(LIMIT, clock=clock)
    queue.acquire(0)
    yield queue
    queue.close()


def run(main):
    """Run a coroutine that must not take long."""
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


async def waiting_task(queue, **how):
    task = asyncio.ensure_future(acquire(queue, 1, **how))
    await until(lambda: queue.snapshot().waiting == 1)
    return task


# --- permits --------------------------------------------------------------------------------------


def test_a_free_bucket_grants(account, clock):
    queue = account.large(LIMIT, clock=clock)
    assert run(acquire(queue, 3)).shard_id == 3
    queue.close()


def test_the_permit_comes_when_the_bucket_opens(queue, clock):
    async def main():
        task = await waiting_task(queue)
        clock.advance(WINDOW)
        return await task

    assert run(main()).waited == WINDOW


@memory
def test_waiting_takes_no_thread_but_the_worker(queue):
    async def main():
        before = threading.active_count()
        tasks = [asyncio.ensure_future(acquire(queue, shard)) for shard in range(100)]
        await until(lambda: queue.snapshot().waiting == 100)
        assert threading.active_count() <= before + 1
        assert asyncio.get_running_loop()._default_executor is None
        for task in tasks:
            task.cancel()

    run(main())
    assert queue.snapshot().waiting == 0


@memory
def test_priority_is_a_head_start(queue, clock):
    async def main():
        cold = await waiting_task(queue)
        warm = asyncio.ensure_future(acquire(queue, 2, priority=60.0))
        await until(lambda: queue.snapshot().waiting == 2)
        clock.advance(WINDOW)
        await warm
        assert not cold.done()
        cold.cancel()

    run(main())


# --- cancelled ------------------------------------------------------------------------------------


def test_a_task_that_is_cancelled_before_it_starts_asks_for_nothing(queue):
    async def main():
        task = asyncio.ensure_future(acquire(queue, 1))
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    run(main())
    assert queue.snapshot().waiting == 0


def test_a_task_that_is_cancelled_in_line_leaves_it(queue, clock):
    async def main():
        task = await waiting_task(queue)
        task.cancel()
        await asyncio.wait([task])
        await until(left_alone(queue, 9))
        clock.advance(WINDOW)
        assert task.cancelled()

    run(main())
    assert queue.acquire(1).remaining == 8


@pytest.mark.parametrize("iterations", range(5))
def test_a_permit_on_its_way_through_the_loop_is_given_back(queue, clock, iterations):
    """Cancelled so many iterations of the loop after the grant: in the end it has arrived."""

    async def main():
        task = await waiting_task(queue)
        clock.advance(WINDOW)
        block_until(granted(queue, 2), clock)
        for _ in range(iterations):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await until(left_alone(queue, 9 if task.cancelled() else 8))
        return task.cancelled()

    assert run(main()) or iterations > 1


@pytest.mark.parametrize("iterations", range(6))
def test_a_task_that_gives_back_a_late_permit_can_be_cancelled_then(queue, clock, iterations):
    async def main():
        task = await waiting_task(queue)
        clock.advance(WINDOW)
        block_until(granted(queue, 2), clock)
        clock.advance(MARGIN + 0.1)
        for _ in range(iterations):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await until(left_alone(queue, 9 if task.cancelled() else 8))

    run(main())


def test_a_permit_that_comes_while_the_call_is_ended_by_hand_is_given_back(queue, clock):
    """As the interpreter does with a coroutine that nobody awaits any more."""

    async def main():
        call = acquire(queue, 1)
        call.send(None)
        await until(lambda: queue.snapshot().waiting == 1)
        clock.advance(WINDOW)
        block_until(granted(queue, 2), clock)
        call.close()
        await until(left_alone(queue, 9))

    run(main())


def test_a_permit_for_a_loop_that_is_closed_is_given_back(queue, clock):
    loop = asyncio.new_event_loop()
    task = loop.create_task(acquire(queue, 1))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    run(until(lambda: queue.snapshot().waiting == 1))
    clock.advance(WINDOW)
    run(until(granted(queue, 2)))
    run(until(left_alone(queue, 9)))
    task._log_destroy_pending = False
    del task
    gc.collect()
    assert left_alone(queue, 9)()


@memory
def test_thousands_that_are_cancelled_at_random_cost_nothing():
    seed = random.randrange(1 << 32)
    print(f"{seed=}")
    rng, count = random.Random(seed), 2_000
    limit = SessionStartLimit(count, count, 600.0, 64)

    async def main():
        async def one(shard):
            task = asyncio.ensure_future(acquire(queue, shard, priority=rng.uniform(-1, 1)))
            if impatient := rng.random() < 0.75:
                asyncio.get_running_loop().call_later(rng.expovariate(4), task.cancel)
            await asyncio.wait([task])
            return impatient, not task.cancelled()

        return Counter(await asyncio.gather(*map(one, range(count))))

    with LargeBotQueue(limit, interval=0.01, margin=0.03) as queue:
        counted = run(main())
        started = counted[True, True] + counted[False, True]
        assert counted[False, False] == 0
        assert counted[True, False] > 0
        run(until(left_alone(queue, count - started)))


# --- late permits ---------------------------------------------------------------------------------


def test_a_permit_that_a_busy_loop_read_too_late_is_given_back_and_waited_for_again(queue, clock):
    async def main():
        first = await waiting_task(queue)
        clock.advance(1)
        second = asyncio.ensure_future(acquire(queue, 2))
        await until(lambda: queue.snapshot().waiting == 2)
        clock.advance(WINDOW - 1)
        block_until(granted(queue, 2), clock)
        clock.advance(MARGIN + 0.1)
        while not first.done():  # other processes may have to notice that the bucket is open
            await asyncio.sleep(0.002)
            clock.advance(0.01)
        assert (clock.now_us() - first.result().stamp_us) / 1e6 <= MARGIN
        assert not second.done()
        second.cancel()
        await asyncio.wait([second])
        await until(left_alone(queue, 8))

    run(main())


def test_a_queue_that_is_closed_then_gets_the_late_permit_back(queue, clock):
    async def main():
        task = await waiting_task(queue)
        clock.advance(WINDOW)
        block_until(granted(queue, 2), clock)
        clock.advance(MARGIN + 0.1)
        queue.close()
        with pytest.raises(QueueClosed):
            await task
        await until(left_alone(queue, 9))

    run(main())


# --- timeouts and errors --------------------------------------------------------------------------


def test_a_timeout_costs_nothing_and_says_which_shard(queue):
    with pytest.raises(AcquireTimeout, match=r"shard 1 got no permit within 0\.05 s"):
        run(acquire(queue, 1, 0.05))
    run(until(left_alone(queue, 9)))


@memory
def test_a_timeout_of_zero_takes_what_is_free(account, clock):
    queue = account.large(LIMIT, clock=clock)
    run(acquire(queue, 0, 0))
    with pytest.raises(AcquireTimeout):
        run(acquire(queue, 1, timeout=0))
    assert left_alone(queue, 9)()


@pytest.mark.parametrize("timeout", [None, float("inf"), 30])
def test_a_permit_comes_before_the_timeout(queue, clock, timeout):
    async def main():
        task = await waiting_task(queue, timeout=timeout)
        clock.advance(WINDOW)
        return await task

    assert run(main()).shard_id == 1


def test_a_queue_that_is_closed_ends_the_wait(queue):
    async def main():
        task = await waiting_task(queue)
        queue.close()
        with pytest.raises(QueueClosed):
            await task

    run(main())


@memory
def test_a_limit_that_is_used_up_is_raised_if_the_queue_is_made_so(account, clock):
    queue = account.large(SessionStartLimit(1, 0, 60, 1), clock=clock, when_exhausted="raise")
    with pytest.raises(SessionLimitExhausted):
        run(acquire(queue, 0))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"shard_id": -1}, ValueError),
        ({"shard_id": "0"}, TypeError),
        ({"shard_id": 0, "timeout": -1}, ValueError),
        ({"shard_id": 0, "timeout": "1"}, TypeError),
        ({"shard_id": 0, "priority": float("nan")}, ValueError),
    ],
)
def test_arguments_are_checked_as_acquire_checks_them(arguments, error):
    with pytest.raises(error):
        run(acquire(NoOpQueue(), **arguments))
