"""The events that an observer gets: frozen values, one for each thing that happens in a queue.

An observer is a callable that takes one event. The queue calls it without holding a lock, in the thread
in which the event happened; for a future that waits, in the queue's worker. So an observer must be
quick, and it must not wait for a permit. If it raises, the error is logged and the queue continues. If
a permit is older than the margin when the observer returns, it is given back and the shard waits again;
``ShardGranted`` is not sent a second time for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gateway_queue_sync.models import Report, SessionStartLimit

LeaveReason = Literal["timeout", "cancelled", "interrupted", "closed", "exhausted", "error"]


@dataclass(frozen=True, slots=True)
class ShardWaiting:
    """A shard has to wait.

    Attributes:
        shard_id: the shard.
        bucket: the bucket that it waits for.
        position: how many waiters come before it.
        eta: seconds until its permit should come; ``None`` if that is unknown.
        waiter: the number of the call, unique in the process; ignored when events are compared.
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
        remaining: session starts left; ``None`` if the queue has no limit.
        waiter: the number of the call, unique in the process; ignored when events are compared.
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
        waiter: the number of the call, unique in the process; ignored when events are compared.
    """

    shard_id: int
    waited: float
    reason: LeaveReason
    waiter: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class PermitReported:
    """A permit was reported as sent, unused or rejected.

    Attributes:
        shard_id: the shard.
        bucket: the bucket it was granted in.
        report: the report.
        waiter: the number of the call, unique in the process; ignored when events are compared.
    """

    shard_id: int
    bucket: int
    report: Report
    waiter: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class BudgetExhausted:
    """No session start is left until the limit resets, except for the reserve.

    Attributes:
        remaining: session starts left; all of them are reserved.
        resets_in: seconds until the limit resets.
    """

    remaining: int
    resets_in: float


@dataclass(frozen=True, slots=True)
class LimitUpdated:
    """The queue got a limit: from ``update``, or by a read.

    Attributes:
        limit: the limit as it was passed or read.
    """

    limit: SessionStartLimit


Event = ShardWaiting | ShardGranted | ShardLeft | PermitReported | BudgetExhausted | LimitUpdated
"""Any event."""

Observer = Callable[[Event], None]
"""Any callable that takes an event."""
