"""What the log tells: an observer like any other, which keeps its own state by waiter number.

Who waits long and how that ends goes to ``gateway_queue_sync.shards`` (INFO), the session start limit to
``gateway_queue_sync.budget`` (WARNING). Neither shows anything unless logging is configured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from gateway_queue_sync.events import (
    BudgetExhausted,
    Event,
    LimitUpdated,
    ShardGranted,
    ShardLeft,
    ShardWaiting,
)
from gateway_queue_sync.format import format_duration, format_time
from gateway_queue_sync.models import Permit
from gateway_queue_sync.token_bucket import NEVER, US_PER_SECOND, Budget

MIN_WAIT = 30.0
"""Seconds; only waits that take longer are logged."""

MAX_LINES = 5
"""Lines of a kind that are logged in a minute; after these, each that doubles their number."""

MINUTE_US = 60 * US_PER_SECOND
ALL = 1 << 62

shards = logging.getLogger("gateway_queue_sync.shards")
limits = logging.getLogger("gateway_queue_sync.budget")


class LineFilter:
    """Which lines of one kind to log, so that a start of ten thousand shards fits a screen."""

    def __init__(self) -> None:
        self._until_us = NEVER
        self._count = self._skipped = 0

    def count(self, now_us: int) -> int | None:
        """Count a line; return how many were skipped before it, or ``None`` to skip this one, too."""
        if now_us >= self._until_us:
            self._until_us, self._count = now_us + MINUTE_US, 0
        self._count += 1
        if self._count > MAX_LINES and self._count & (self._count - 1):
            self._skipped += 1
            return None
        skipped, self._skipped = self._skipped, 0
        return skipped


class Log:
    """Logs what the events of one queue say that a person wants to know.

    Args:
        now_us: the queue's clock.
        budget: returns what is left of the limit now.
        reserve: the queue's reserve.

    Attributes:
        grants_up_to: permits that leave more session starts than this need not be passed on.
    """

    def __init__(
        self, now_us: Callable[[], int], budget: Callable[[], Budget | None], reserve: int
    ) -> None:
        self._now_us = now_us
        self._budget = budget
        self._reserve = reserve
        self._begun, self._ended = LineFilter(), LineFilter()
        self._logged: set[int] = set()  # waiters of whose wait a line was logged
        self._low_from = -1
        self._warned_low = False
        self.grants_up_to = -1
        self.limit_changed()

    def limit_changed(self) -> None:
        """Find out from how few session starts on the limit runs low: one tenth above the reserve."""
        left = self._budget()
        if left is not None:
            share = (left.total - self._reserve) // 10
            self._low_from = self._reserve + share if share > 0 else -1
            self.grants_up_to = ALL if self._warned_low else self._low_from

    def follows_waits(self, left_us: int) -> bool:
        """Return whether one who waits for so long at most may be worth a line."""
        return left_us > MIN_WAIT * US_PER_SECOND and shards.isEnabledFor(logging.INFO)

    def wants_wait(self, eta: float | None) -> bool:
        """Return whether to pass on the event of a wait that begins and will take so many seconds."""
        return eta is not None and eta > MIN_WAIT and shards.isEnabledFor(logging.INFO)

    def wants_grant(self, permit: Permit) -> bool:
        """Return whether to pass on the event of a permit, where INFO is logged."""
        few = permit.remaining is not None and permit.remaining <= self.grants_up_to
        return few or permit.waited > MIN_WAIT or permit.waiter in self._logged

    def __call__(self, event: Event) -> None:
        """Log an event, if it is worth a line."""
        match event:
            case ShardWaiting():
                self._waiting(event)
            case ShardGranted():
                self._granted(event)
            case ShardLeft():
                self._left(event)
            case BudgetExhausted():
                limits.warning(
                    "the session start limit is used up (%d left, reserve %d): no shard may identify "
                    "until it resets, %s",
                    event.remaining,
                    self._reserve,
                    format_time(_now(), event.resets_in),
                )
            case LimitUpdated():
                self.limit_changed()

    def _waiting(self, event: ShardWaiting) -> None:
        if not self.wants_wait(event.eta):
            return
        skipped = self._begun.count(self._now_us())
        if skipped is None or event.eta is None:
            return
        self._logged.add(event.waiter)
        shards.info(
            "shard %d waits in bucket %d: %d before it, its permit is due %s%s",
            event.shard_id,
            event.bucket,
            event.position,
            format_time(_now(), event.eta),
            f"; {skipped} more wait long" if skipped else "",
        )

    def _granted(self, event: ShardGranted) -> None:
        long = event.waited > MIN_WAIT and shards.isEnabledFor(logging.INFO)
        skipped = self._ended.count(self._now_us()) if long else None
        if event.waiter in self._logged or skipped is not None:
            self._logged.discard(event.waiter)
            left = "" if event.remaining is None else f"; {event.remaining} session starts are left"
            more = f"; {skipped} more got theirs" if skipped else ""
            duration = format_duration(event.waited)
            shards.info(
                "shard %d has its permit, after %s%s%s", event.shard_id, duration, left, more
            )
        if event.remaining is not None and event.remaining <= self.grants_up_to:
            self._warn_if_low(event.remaining)

    def _left(self, event: ShardLeft) -> None:
        if event.waiter not in self._logged:
            return
        self._logged.discard(event.waiter)
        if event.waited > MIN_WAIT and event.reason != "closed":
            shards.info(
                "shard %d waits no more, without a permit, after %s (%s)",
                event.shard_id,
                format_duration(event.waited),
                event.reason,
            )

    def _warn_if_low(self, remaining: int) -> None:
        """Warn once that few are left, until that has well recovered."""
        if self._warned_low and remaining > 2 * self._low_from - self._reserve:
            self._warned_low, self.grants_up_to = False, self._low_from
        elif not self._warned_low and remaining <= self._low_from:
            self._warned_low, self.grants_up_to = True, ALL
            left = self._budget()
            if left is not None and remaining > self._reserve:
                limits.warning(
                    "the session start limit runs low: %d of %d left, reserve %d; it resets %s",
                    remaining,
                    left.total,
                    self._reserve,
                    format_time(_now(), left.resets_in_us / US_PER_SECOND),
                )


def rejected_often(rejections: int, shard_id: int, bucket: int) -> None:
    """Warn that a bucket's permits are rejected again and again, and what follows."""
    limits.warning(
        "Discord rejected %d permits of bucket %d in a row (the latest: shard %d). Each one uses up a "
        "session start, so the bucket now stays closed for up to 15 minutes",
        rejections,
        bucket,
        shard_id,
    )


def _now() -> datetime:
    return datetime.now().astimezone()
