"""What the log tells a person: who waits long and how that ends, and how the budget does.

``waiting.py`` says when. Shards are told of by ``gateway_queue_sync.shards`` (INFO), the
budget by ``gateway_queue_sync.budget`` (WARNING); neither shows anything unless logging is configured.
"""

from __future__ import annotations

import logging
from datetime import datetime

from gateway_queue_sync.events import BudgetExhausted, ShardGranted, ShardLeft, ShardWaiting
from gateway_queue_sync.rules import MICROSECOND, NEVER, Budget
from gateway_queue_sync.wording import lasting, when

LONG_WAIT = 30.0
"""Seconds; shards that wait for longer are told of."""

FEW = 5
"""Lines of a kind that are shown in one period; after these, each that doubles their number."""

FEW_IN_US = 60 * MICROSECOND

LOW_SHARE = 10
"""A budget is low when one part in so many of it is left."""

MOVED = 60.0
"""Seconds by which a reset has to move for a budget to be told of as used up again."""

shards = logging.getLogger("gateway_queue_sync.shards")
budget = logging.getLogger("gateway_queue_sync.budget")


def follows_shards() -> bool:
    """Return whether anybody wants to know who waits."""
    return shards.isEnabledFor(logging.INFO)


def is_long(duration: float | None) -> bool:
    """Return whether a wait of so many seconds is worth a line."""
    return duration is not None and duration > LONG_WAIT


class Few:
    """Which lines of one kind to show: a start of ten thousand shards fits a screen."""

    __slots__ = ("_count", "_unshown", "_until_us")

    def __init__(self) -> None:
        self._until_us = NEVER
        self._count = self._unshown = 0

    def count(self, now_us: int) -> int | None:
        """Count a line; return how many before it were not shown, or ``None``: nor is this one."""
        if now_us >= self._until_us:
            self._until_us, self._count = now_us + FEW_IN_US, 0
        self._count += 1
        if self._count > FEW and self._count & (self._count - 1):
            self._unshown += 1
            return None
        unshown, self._unshown = self._unshown, 0
        return unshown


def waiting(event: ShardWaiting, unshown: int) -> None:
    """Tell that a shard will wait for long, as will so many of which no line was shown."""
    assert event.eta is not None
    shards.info(
        "shard %d waits in bucket %d: %d before it, its permit is due %s%s",
        event.shard_id,
        event.bucket,
        event.position,
        when(_now(), event.eta),
        f"; {unshown} more wait long" if unshown else "",
    )


def granted(event: ShardGranted, unshown: int) -> None:
    """Tell that a shard which waited long has its permit, as have so many of which no line was shown."""
    left = "" if event.remaining is None else f"; {event.remaining} session starts are left"
    more = f"; {unshown} more got theirs" if unshown else ""
    shards.info(
        "shard %d has its permit, after %s%s%s", event.shard_id, lasting(event.waited), left, more
    )


def left(event: ShardLeft) -> None:
    """Tell that a shard which waited long has no permit and waits no more."""
    shards.info(
        "shard %d waits no more, without a permit, after %s (%s)",
        event.shard_id,
        lasting(event.waited),
        event.reason,
    )


def low_from(total: int, reserve: int) -> int:
    """Return from how many left on a budget runs low; one too small for that only gets used up."""
    share = (total - reserve) // LOW_SHARE
    return reserve + share if share > 0 else -1


def low(left: Budget, reserve: int) -> None:
    """Tell that a budget runs low."""
    budget.warning(
        "the session start limit runs low: %d of %d left, reserve %d; it resets %s",
        left.remaining,
        left.total,
        reserve,
        when(_now(), left.resets_in_us / MICROSECOND),
    )


def used_up(event: BudgetExhausted, reserve: int) -> None:
    """Tell that a budget is used up, and until when."""
    budget.warning(
        "the session start limit is used up (%d left, reserve %d): no shard may identify until it "
        "resets, %s",
        event.remaining,
        reserve,
        when(_now(), event.resets_in),
    )


def _now() -> datetime:
    return datetime.now().astimezone()
