"""How users use it, for the type checker alone: this file is checked and never run."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import assert_type

from gateway_queue_sync import (
    AcquireTimeout,
    Event,
    GatewayQueue,
    LargeBotQueue,
    LocalQueue,
    NoOpQueue,
    Permit,
    Queue,
    QueueSnapshot,
    SessionStartLimit,
    ShardStart,
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


def observe(event: Event) -> None:
    print(event)


def bot(token: str) -> None:
    limit = SessionStartLimit(total=1000, remaining=990, reset_after=3600, max_concurrency=1)
    assert_type(SessionStartLimit.from_payload({"total": 1}), SessionStartLimit)
    queue: GatewayQueue
    for queue in (
        NoOpQueue(),
        LocalQueue(interval=5, margin=0.25, clock=FakeClock(), observer=observe),
        LargeBotQueue(limit, refresh=lambda: limit, reserve=10, when_exhausted="raise"),
        LargeBotQueue.from_token(token, reserve=10),
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


async def hook(queue: GatewayQueue) -> None:
    try:
        permit = await asyncio.wrap_future(queue.enqueue(7))
    except AcquireTimeout as error:
        assert_type(error.eta, float | None)
    else:
        permit.sent()
