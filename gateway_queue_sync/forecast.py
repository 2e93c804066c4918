"""When permits will come: the rules looked ahead, on values alone. No thread, clock, lock or I/O."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from gateway_queue_sync.models import BucketSnapshot, LimitSnapshot, QueueSnapshot, WaitingShard
from gateway_queue_sync.token_bucket import US_PER_SECOND, Budget


@dataclass(frozen=True, slots=True)
class Outlook:
    """All that decides when permits come, copied at one instant.

    ``ready_in_us`` has the buckets that were used; ``others_ready_in_us`` is that of all others.
    """

    now_us: int
    window_us: int
    period_us: int
    reserve: int
    max_concurrency: int
    ready_in_us: Mapping[int, int]
    others_ready_in_us: int
    budget: Budget | None
    granted: int

    def ready(self, number: int) -> int:
        """Return in how many microseconds a bucket opens."""
        return self.ready_in_us.get(number, self.others_ready_in_us)


def starts(outlook: Outlook, lines: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Yield ``(in_us, bucket)`` for each permit that lines of these lengths will get, in time order.

    ``in_us`` counts from the outlook's instant. Buckets that are ready at one instant come by
    number.
    """
    left = {number: size for number, size in lines.items() if size}
    remaining = resets_at_us = None
    if outlook.budget is not None:
        remaining, resets_at_us = outlook.budget.remaining, outlook.budget.resets_in_us or None
    ready = [(outlook.ready(number), number) for number in left]
    heapq.heapify(ready)
    while ready:
        at_us, number = ready[0]
        if outlook.budget is not None and remaining is not None:
            if resets_at_us is not None and at_us >= resets_at_us:
                remaining, resets_at_us = outlook.budget.total, None
            if remaining <= outlook.reserve:
                if resets_at_us is None:
                    return  # the reserve is the whole budget: no reset will help
                heapq.heapreplace(ready, (resets_at_us, number))
                continue
            remaining -= 1
            if resets_at_us is None:
                resets_at_us = at_us + outlook.period_us
        yield at_us, number
        left[number] -= 1
        if left[number]:
            heapq.heapreplace(ready, (at_us + outlook.window_us, number))
        else:
            heapq.heappop(ready)


def eta_us(outlook: Outlook, number: int, before: int, lines: Mapping[int, int]) -> int | None:
    """Return when the place with ``before`` others in front of it in bucket ``number`` gets its permit.

    ``lines`` includes that place. Where the budget lasts for all that wait this is a product; else
    the starts are counted up to it. ``None`` if no permit will ever come.
    """
    kept = outlook.budget
    if kept is None or sum(lines.values()) <= kept.remaining - outlook.reserve:
        return outlook.ready(number) + before * outlook.window_us
    for at_us, bucket in starts(outlook, lines):
        if bucket == number:
            if before == 0:
                return at_us
            before -= 1
    return None


def rough_eta_us(
    outlook: Outlook, number: int, before: int, lines: int, waiting: int
) -> int | None:
    """Return about when a place gets its permit, in one step for any number of those who wait.

    There are so many ``lines``, in which so many are ``waiting``. Where the budget does not last for
    them, the lines are taken to be equally long. ``None`` if no permit will ever come.
    """
    at_us = outlook.ready(number) + before * outlook.window_us
    kept = outlook.budget
    if kept is None or waiting <= kept.remaining - outlook.reserve:
        return at_us
    if kept.total <= outlook.reserve:
        return None
    after = before - max(0, kept.remaining - outlook.reserve) // lines
    if after < 0:
        return at_us
    periods, after = divmod(after, -(-(kept.total - outlook.reserve) // lines))
    resets_in_us = (kept.resets_in_us or outlook.period_us) + periods * outlook.period_us
    return max(at_us, resets_in_us + after * outlook.window_us)


class Waits(Protocol):
    """Somebody who waits: anything with a shard and an arrival."""

    @property
    def shard_id(self) -> int:
        """The shard."""

    @property
    def arrived_us(self) -> int:
        """When it joined."""


def snapshot(outlook: Outlook, lines: Mapping[int, Sequence[Waits]]) -> QueueSnapshot:
    """Return the snapshot of a queue with this outlook and these lines, each in order."""
    etas: dict[int, list[float]] = {number: [] for number in lines}
    for in_us, number in starts(outlook, {number: len(line) for number, line in lines.items()}):
        etas[number].append(in_us / US_PER_SECOND)
    buckets = []
    for number in range(outlook.max_concurrency):
        shards = (
            WaitingShard(
                waiter.shard_id, max(0, outlook.now_us - waiter.arrived_us) / US_PER_SECOND, eta
            )
            for waiter, eta in zip_longest(lines.get(number, ()), etas.get(number, ()))
        )
        ready_in = outlook.ready(number) / US_PER_SECOND
        buckets.append(BucketSnapshot(number, ready_in, tuple(shards)))
    limit = None
    if outlook.budget is not None:
        left = outlook.budget
        limit = LimitSnapshot(left.total, left.remaining, left.resets_in_us / US_PER_SECOND)
    waiting = sum(len(line) for line in lines.values())
    return QueueSnapshot(waiting, outlook.granted, tuple(buckets), limit)
