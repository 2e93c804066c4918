"""Plans: when each shard of a bot would start, and whether the session start limit suffices.

A plan applies the rules of the queues ahead of time, permit by permit. No thread, clock or I/O.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway_queue_sync import limits, token_bucket
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    US_PER_SECOND,
    SessionStartLimit,
    check_limit,
    whole_number,
)
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.token_bucket import Account, Denial


@dataclass(frozen=True, slots=True)
class ShardStart:
    """When one shard would start.

    Attributes:
        shard_id: the shard.
        bucket: its bucket, ``shard_id % max_concurrency``.
        wave: how many shards start before it in its bucket.
        at: seconds from now until its permit.
        remaining: session starts left after it.
    """

    shard_id: int
    bucket: int
    wave: int
    at: float
    remaining: int


@dataclass(frozen=True, slots=True)
class StartPlan:
    """When the shards of a bot would start: the result of ``plan_start``.

    Attributes:
        starts: the starts of all shards, in order of time.
        last_at: seconds from now until the last start; 0.0 if there is none.
        lasts: whether no shard has to wait for the limit to reset.
        remaining: session starts left after the last one, including the reserve.
        resets: in how many seconds the limit resets, for each reset before the last start.
    """

    starts: tuple[ShardStart, ...] = field(repr=False)
    last_at: float
    lasts: bool
    remaining: int
    resets: tuple[float, ...]


def plan_start(
    shard_ids: Iterable[int],
    limit: SessionStartLimit,
    *,
    reserve: int = 0,
    interval: float = IDENTIFY_INTERVAL,
    margin: float = DEFAULT_MARGIN,
    period: float = SESSION_PERIOD,
) -> StartPlan:
    """Return when each shard would start if all asked a ``LargeBotQueue`` now, in this order.

    Nothing is granted or charged. The plan assumes that each permit is used at once, none is rejected,
    no others ask, and the limit resets to its ``total``. If the limit does not suffice for all shards
    that are due at one instant, the threads of a queue would race for what is left; in the plan the
    buckets get it in the order of ``shard_ids``::

        plan = plan_start(range(64), SessionStartLimit(1000, 1000, 0, max_concurrency=16))
        assert plan.lasts and plan.last_at == 3 * 5.25

    Source of the rules: https://discord.com/developers/docs/topics/gateway (*Rate Limiting*, *Session
    Start Limit*).

    Args:
        shard_ids: the shards, in the order in which they ask.
        limit: the session start limit as it is now.
        reserve: session starts that are never used.
        interval: seconds between two permits of a bucket: Discord's 5.
        margin: seconds added to that, as for ``LocalQueue``.
        period: seconds from the first start after a reset to the next reset.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, such as a reserve
            that is not less than the limit's total.
    """
    reserve = whole_number("reserve", reserve)
    check_limit(limit, reserve)
    settings = Settings(reserve=reserve, interval=interval, margin=margin, period=period)
    interval_us, margin_us, period_us = settings.timings_us
    account = Account(interval_us + margin_us, period_us, settings.reserve)
    limits.adopt(account, limit, 0)
    lines: dict[int, deque[int]] = {}
    for shard_id in shard_ids:
        if type(shard_id) is not int or shard_id < 0:
            shard_id = whole_number("shard_id", shard_id)  # noqa: PLW2901 - the same, as an int
        lines.setdefault(shard_id % limit.max_concurrency, deque()).append(shard_id)

    heap = [(0, number, line) for number, line in enumerate(lines.values())]  # by when each is due
    waves = [0] * len(heap)
    starts: list[ShardStart] = []
    resets: list[float] = []
    lasts = True
    while heap:
        at_us, number, line = heap[0]
        period_before, resets_at_us = account.period, account.resets_at_us
        answer = token_bucket.take(account, line[0], at_us)
        if isinstance(answer, Denial):
            heapq.heapreplace(heap, (at_us + answer.wait_us, number, line))
            continue
        if answer.period != period_before and resets_at_us is not None:
            resets.append(resets_at_us / US_PER_SECOND)
        assert answer.remaining is not None
        wave = waves[number]
        starts.append(
            ShardStart(line.popleft(), answer.bucket, wave, at_us / US_PER_SECOND, answer.remaining)
        )
        waves[number] += 1
        lasts = lasts and at_us == wave * account.window_us
        if line:  # its next shard is not due before the window is over
            heapq.heapreplace(heap, (at_us + account.window_us, number, line))
        else:
            heapq.heappop(heap)

    left = limits.budget(account, 0)
    assert left is not None
    return StartPlan(
        starts=tuple(starts),
        last_at=starts[-1].at if starts else 0.0,
        lasts=lasts,
        remaining=starts[-1].remaining if starts else left.remaining,
        resets=tuple(resets),
    )
