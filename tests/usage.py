"""Examples of use for the type checker: this file is checked and never run."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import assert_type

from gateway_queue_sync import (
    AcquireTimeout,
    Event,
    GatewayQueue,
    HttpQueue,
    LargeBotQueue,
    LocalQueue,
    NoOpQueue,
    Permit,
    Queue,
    QueueSnapshot,
    RedisQueue,
    SessionStartLimit,
    ShardGranted,
    ShardLeft,
    ShardStart,
    ShardWaiting,
    SqliteQueue,
    StartPlan,
    plan_start,
)
from gateway_queue_sync.testing import FakeClock, Referee


class Mine:
    """A queue of a user's own."""

    def acquire(self, shard_id: int, timeout: float | None = None) -> Permit:
        return Permit(shard_id)


def framework(queue: Queue) -> None:
    with queue.acquire(3, timeout=1.5) as permit:
        assert_type(permit, Permit)
        permit.rejected()
        assert_type(permit.remaining, int | None)
    Permit(3, 0, waited=1.5, remaining=7)


def observe(event: Event) -> None:
    print(event)
    if isinstance(event, ShardWaiting | ShardGranted | ShardLeft):
        assert_type(event.waiter, int)


def bot(token: str) -> None:
    limit = SessionStartLimit(total=1000, remaining=990, reset_after=3600, max_concurrency=1)
    assert_type(SessionStartLimit.from_payload({"total": 1}), SessionStartLimit)
    queue: GatewayQueue
    for queue in (
        NoOpQueue(),
        LocalQueue(interval=5, margin=0.25, clock=FakeClock(), observer=observe),
        LargeBotQueue(limit, refresh=lambda: limit, reserve=10, when_exhausted="raise"),
        LargeBotQueue(limit, refresh=lambda: limit, reread_after=None),
        LargeBotQueue.from_token(token, reserve=10),
        SqliteQueue("a.sqlite3", limit, name="a", reserve=5, lease=2.0, observer=observe),
        SqliteQueue.from_token(token, Path("a.sqlite3"), when_exhausted="raise"),
        RedisQueue("redis://localhost", name="a", interval=5.0, margin=0.1),
        HttpQueue("http://127.0.0.1:8787", secret="s", refresh=lambda: limit),
    ):
        framework(queue)
        assert_type(queue.acquire(1, priority=60), Permit)
        assert_type(queue.try_acquire(1), Permit | None)
        assert_type(queue.enqueue(1), Future[Permit])
        assert_type(queue.snapshot(), QueueSnapshot)
        queue.update(limit)
        queue.close()
    framework(Mine())
    assert_type(Referee(16).identify(3), bool)
    plan = plan_start(range(64), limit, reserve=50)
    assert_type(plan, StartPlan)
    assert_type(plan.starts, tuple[ShardStart, ...])


def drive(clock: FakeClock) -> None:
    clock.settle(2, timeout=1.0)
    clock.advance(5.25)
    clock.suspend(3600)
    assert_type(clock.next_in, float | None)
    assert_type(clock.parked, int)
    with clock.inside():
        pass


async def hook(queue: GatewayQueue) -> None:
    try:
        permit = await asyncio.wrap_future(queue.enqueue(7))
    except AcquireTimeout as error:
        assert_type(error.eta, float | None)
    else:
        permit.sent()
