"""What an observer is given: one frozen value for each thing that happens in a queue.

An observer is one callable that takes an event. It is called without any lock held, in the thread in
which the thing happened, so it must be quick, and it must not wait for a permit itself. For a future
that waits, that is the queue's worker. If an observer raises, the error is logged and the queue goes
on. A permit that is older than the margin when its observer returns is given back and asked for again;
``ShardGranted`` is sent once for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
        waiter: a number that tells this call from all others of the process; not compared.
    """

    shard_id: int
    bucket: int
    position: int
    eta: float | None
    waiter: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ShardGranted:
    """A shard got its permit.

    Attributes:
        shard_id: the shard.
        bucket: the bucket it was granted in.
        waited: seconds since it asked.
        remaining: session starts left, ``None`` if no budget is kept.
        waiter: a number that tells this call from all others of the process; not compared.
    """

    shard_id: int
    bucket: int
    waited: float
    remaining: int | None
    waiter: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ShardLeft:
    """A shard left its line without a permit.

    Attributes:
        shard_id: the shard.
        waited: seconds since it asked.
        reason: why it left.
        waiter: a number that tells this call from all others of the process; not compared.
    """

    shard_id: int
    waited: float
    reason: LeaveReason
    waiter: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class PermitReported:
    """The holder of a permit said what became of it.

    Attributes:
        shard_id: the shard.
        bucket: the bucket it was granted in.
        report: what became of the permit.
        waiter: a number that tells this call from all others of the process; not compared.
    """

    shard_id: int
    bucket: int
    report: Report
    waiter: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class BudgetExhausted:
    """The session start limit is used up, except for the reserve.

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
"""Whatever an observer is given."""

Observer = Callable[[Event], None]
"""Any callable that takes an event."""
