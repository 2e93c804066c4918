"""What an observer is told: one frozen value for each thing that happens in a queue.

An observer is one callable that takes an event. It is called without any lock held, in the thread in
which the thing happened, so it should be quick; it must not wait for a permit itself. One that raises
is logged and survived. A permit that came too late, or while the buckets were laid out anew, is given
back and asked for again; it is told of once, the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gateway_queue_sync.models import Report, SessionStartLimit

LeaveReason = Literal["timeout", "cancelled", "interrupted", "closed", "exhausted", "error"]


@dataclass(frozen=True, slots=True)
class ShardWaiting:
    """A shard joined a line.

    Attributes:
        shard_id: the shard.
        bucket: the bucket that it waits for.
        position: how many are before it.
        eta: seconds until its permit should come, ``None`` if that is unknown.
    """

    shard_id: int
    bucket: int
    position: int
    eta: float | None


@dataclass(frozen=True, slots=True)
class ShardGranted:
    """A shard got its permit.

    Attributes:
        shard_id: the shard.
        bucket: the bucket it was granted in.
        waited: seconds since it asked.
        remaining: session starts left, ``None`` if no budget is kept.
    """

    shard_id: int
    bucket: int
    waited: float
    remaining: int | None


@dataclass(frozen=True, slots=True)
class ShardLeft:
    """A shard left its line without a permit.

    Attributes:
        shard_id: the shard.
        waited: seconds since it asked.
        reason: why it left.
    """

    shard_id: int
    waited: float
    reason: LeaveReason


@dataclass(frozen=True, slots=True)
class PermitReported:
    """The holder of a permit said what became of it.

    Attributes:
        shard_id: the shard.
        bucket: the bucket it was granted in.
        report: what became of the permit.
    """

    shard_id: int
    bucket: int
    report: Report


@dataclass(frozen=True, slots=True)
class BudgetExhausted:
    """The session start limit is used up but for the reserve.

    Attributes:
        remaining: session starts left, the reserve.
        resets_in: seconds until it resets.
    """

    remaining: int
    resets_in: float


@dataclass(frozen=True, slots=True)
class LimitUpdated:
    """The queue adopted a limit, from ``update`` or from ``refresh``.

    Attributes:
        limit: the limit, as it was given.
    """

    limit: SessionStartLimit


Event = ShardWaiting | ShardGranted | ShardLeft | PermitReported | BudgetExhausted | LimitUpdated
"""Whatever an observer is told."""

Observer = Callable[[Event], None]
"""What is told: any callable that takes an event."""
