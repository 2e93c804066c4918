"""Computes when permits will come, by the same rules. Pure: no thread, clock, lock or I/O."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Protocol

from gateway_queue_sync.limits import Budget, budget
from gateway_queue_sync.models import (
    US_PER_SECOND,
    BucketSnapshot,
    LimitSnapshot,
    QueueSnapshot,
    WaitingShard,
)
from gateway_queue_sync.token_bucket import Account, closed_for_us

MAX_UNKNOWN = 100_000  # waiters that are only counted, for which permits are forecast


@dataclass(frozen=True, slots=True)
class Outlook:
    """A copy of everything that decides when permits come, at one instant.

    ``ready_in_us`` is for the buckets that were used; ``others_ready_in_us`` is for all others. If not
    ``knows_limit``, nothing is granted until a limit is read.
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
    knows_limit: bool = True

    def ready(self, number: int) -> int:
        """Return in how many microseconds a bucket opens."""
        return self.ready_in_us.get(number, self.others_ready_in_us)


def outlook(account: Account, now_us: int, number: int | None = None) -> Outlook:
    """Return the outlook of an account with one clock: for all buckets, or for one.

    Only closed buckets are copied, because the scheduler's lock is held meanwhile.
    """
    closed_since_us, buckets = now_us - account.window_us, account.buckets
    if number is not None:
        buckets = {number: buckets[number]} if number in buckets else {}
    ready_in_us = {
        number: max(0, closed_for_us(account, bucket, now_us))
        for number, bucket in buckets.items()
        if bucket.last_us + bucket.hold_us > closed_since_us or bucket.closed_until_us > now_us
    }
    return Outlook(
        now_us=now_us,
        window_us=account.window_us,
        period_us=account.period_us,
        reserve=account.reserve,
        max_concurrency=account.max_concurrency,
        ready_in_us=ready_in_us,
        others_ready_in_us=max(0, closed_for_us(account, account.default_bucket, now_us)),
        budget=budget(account, now_us),
        granted=account.granted,
        knows_limit=account.total is not None or not account.refresh_owed,
    )


def starts(outlook: Outlook, lines: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Yield ``(in_us, bucket)`` for each permit that lines of these lengths will get, in time order.

    ``in_us`` counts from the outlook's instant. Buckets that are ready at one instant come by
    number.
    """
    if not outlook.knows_limit:
        return
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
                    return  # everything is reserved: no reset will help
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


def eta_us(outlook: Outlook, number: int, before: int, lines: int, waiting: int) -> int | None:
    """Return in about how many microseconds a waiter with so many ``before`` it gets its permit.

    If the session starts do not suffice for all that are ``waiting``, the ``lines`` (so many) are
    assumed to be equally long: otherwise the cost would grow with the waiters. ``None`` if no permit
    will ever come, or if it is unknown when.
    """
    if not outlook.knows_limit:
        return None
    at_us = outlook.ready(number) + before * outlook.window_us
    left = outlook.budget
    if left is None or waiting <= left.remaining - outlook.reserve:
        return at_us
    if left.total <= outlook.reserve:
        return None
    # How many before it in its line get their permits after the reset:
    after = before - max(0, left.remaining - outlook.reserve) // lines
    if after < 0:
        return at_us
    periods, after = divmod(after, -(-(left.total - outlook.reserve) // lines))
    resets_in_us = (left.resets_in_us or outlook.period_us) + periods * outlook.period_us
    return max(at_us, resets_in_us + after * outlook.window_us)


class Waits(Protocol):
    """A waiter: anything with a shard and an arrival."""

    @property
    def shard_id(self) -> int:
        """The shard."""

    @property
    def arrived_us(self) -> int:
        """When it joined."""


def snapshot(
    outlook: Outlook,
    lines: Mapping[int, Sequence[Waits]],
    unknown: Mapping[int, Sequence[int]] | None = None,
) -> QueueSnapshot:
    """Return the snapshot of a queue with this outlook and these lines, each in order.

    ``unknown``: how many waiters, of whom only that is known, come after each one of a line. They may be
    any number, so permits are forecast only for the first 100,000 of them.
    """
    places = {
        number: [
            0,
            *accumulate(1 + after for after in (unknown or {}).get(number, [0] * len(line))),
        ]
        for number, line in lines.items()
    }
    lengths = {number: line[-1] for number, line in places.items()}
    known = sum(len(line) for line in lines.values())
    etas: dict[int, list[float]] = {number: [] for number in lines}
    for in_us, number in islice(starts(outlook, lengths), known + MAX_UNKNOWN):
        etas[number].append(in_us / US_PER_SECOND)
    buckets = []
    for number in range(outlook.max_concurrency):
        due = etas.get(number, [])
        shards = (
            WaitingShard(
                waiter.shard_id,
                max(0, outlook.now_us - waiter.arrived_us) / US_PER_SECOND,
                due[place] if place < len(due) else None,
            )
            for waiter, place in zip(lines.get(number, ()), places.get(number, ()), strict=False)
        )
        ready_in = outlook.ready(number) / US_PER_SECOND
        buckets.append(BucketSnapshot(number, ready_in, tuple(shards)))
    limit = None
    if outlook.budget is not None:
        left = outlook.budget
        limit = LimitSnapshot(left.total, left.remaining, left.resets_in_us / US_PER_SECOND)
    return QueueSnapshot(sum(lengths.values()), outlook.granted, tuple(buckets), limit)
