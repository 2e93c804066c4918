"""The log: an observer like any other, with its own state for each waiter number.

Long waits and their ends are logged to ``gateway_queue_sync.shards`` (INFO), the session start limit to
``gateway_queue_sync.budget`` (WARNING). Without a configuration of ``logging`` nothing is printed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from gateway_queue_sync import events
from gateway_queue_sync.format import format_duration, format_time
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.models import US_PER_SECOND
from gateway_queue_sync.token_bucket import NEVER

MIN_WAIT = 30.0  # s; only waits that take longer are logged
MAX_LINES = 5  # of one kind in a minute; after that, only the 8th, the 16th, the 32nd and so on
MINUTE_US = 60 * US_PER_SECOND
ALL = 1 << 62  # as ``grants_up_to``: the log ignores no ``ShardGranted``

shards = logging.getLogger("gateway_queue_sync.shards")
limits = logging.getLogger("gateway_queue_sync.budget")


class LogFilter:
    """Chooses which lines of one kind to log, so that the start of 10,000 shards logs few."""

    def __init__(self) -> None:
        self._until_us = NEVER
        self._count = self._skipped = 0

    def count(self, now_us: int) -> int | None:
        """Count a line. Return how many were skipped before it; ``None``: skip this one, too."""
        if now_us >= self._until_us:
            self._until_us, self._count = now_us + MINUTE_US, 0
        self._count += 1
        if self._count > MAX_LINES and self._count & (self._count - 1):
            self._skipped += 1
            return None
        skipped, self._skipped = self._skipped, 0
        return skipped


class Log:
    """Logs the events of one queue that its operator should know.

    Args:
        now_us: returns the time of the queue's clock.
        budget: returns what is left of the limit now.
        reserve: the queue's reserve.

    Attributes:
        grants_up_to: the log ignores a ``ShardGranted`` that leaves more session starts than this.
    """

    def __init__(
        self, now_us: Callable[[], int], budget: Callable[[], Budget | None], reserve: int
    ) -> None:
        self._now_us = now_us
        self._budget = budget
        self._reserve = reserve
        self._begun, self._ended = LogFilter(), LogFilter()
        self._logged: set[int] = set()  # the waiters whose wait was logged
        self._low_from = self.grants_up_to = -1
        self.limit_changed()

    def limit_changed(self) -> None:
        """Compute when to warn: if a tenth of what the limit allows above the reserve is left."""
        left = self._budget()
        if left is not None:
            share = (left.total - self._reserve) // 10
            self._low_from = self._reserve + share if share > 0 else -1
            if self.grants_up_to != ALL:  # no warning yet
                self.grants_up_to = self._low_from

    def __call__(self, event: events.Event) -> None:
        """Log an event, if it is one to log."""
        match event:
            case events.ShardWaiting():
                if event.eta is not None and event.eta > MIN_WAIT:
                    self._log_waiting(event, event.eta)
            case events.ShardGranted():
                self._log_granted(event)
                if event.remaining is not None and event.remaining <= self.grants_up_to:
                    self._warn_if_low(event.remaining)
            case events.ShardLeft():
                self._log_left(event)
            case events.BudgetExhausted():
                limits.warning(
                    "the session start limit is used up (%d left, reserve %d): no shard may identify "
                    "until it resets, %s",
                    event.remaining,
                    self._reserve,
                    _when(event.resets_in),
                )

    def _log_waiting(self, event: events.ShardWaiting, eta: float) -> None:
        skipped = self._begun.count(self._now_us()) if shards.isEnabledFor(logging.INFO) else None
        if skipped is not None:
            self._logged.add(event.waiter)
            shards.info(
                "shard %d waits in bucket %d: %d before it, its permit is due %s%s",
                event.shard_id,
                event.bucket,
                event.position,
                _when(eta),
                f"; {skipped} similar lines skipped" if skipped else "",
            )

    def _log_granted(self, event: events.ShardGranted) -> None:
        long = event.waited > MIN_WAIT and shards.isEnabledFor(logging.INFO)
        skipped = self._ended.count(self._now_us()) if long else None
        if event.waiter in self._logged or skipped is not None:
            self._logged.discard(event.waiter)
            left = "" if event.remaining is None else f"; {event.remaining} session starts are left"
            more = f"; {skipped} similar lines skipped" if skipped else ""
            duration = format_duration(event.waited)
            shards.info(
                "shard %d has its permit, after %s%s%s", event.shard_id, duration, left, more
            )

    def _log_left(self, event: events.ShardLeft) -> None:
        logged = event.waiter in self._logged
        self._logged.discard(event.waiter)
        if logged and event.waited > MIN_WAIT and event.reason != "closed":
            shards.info(
                "shard %d has left its line without a permit, after %s (%s)",
                event.shard_id,
                format_duration(event.waited),
                event.reason,
            )

    def _warn_if_low(self, remaining: int) -> None:
        """Warn once that few are left, and again only after twice as many were left."""
        warned = self.grants_up_to == ALL
        if warned and remaining > 2 * self._low_from - self._reserve:
            self.grants_up_to = self._low_from
        elif not warned and remaining <= self._low_from:
            self.grants_up_to, left = ALL, self._budget()
            if left is not None and remaining > self._reserve:
                limits.warning(
                    "the session start limit runs low: %d of %d left, reserve %d; it resets %s",
                    remaining,
                    left.total,
                    self._reserve,
                    _when(left.resets_in_us / US_PER_SECOND),
                )


def rejected_often(rejections: int, shard_id: int, bucket: int) -> None:
    """Warn that a bucket was rejected many times in a row, and is closed for longer from now on."""
    limits.warning(
        "Discord rejected %d permits of bucket %d in a row (the latest: shard %d). Each one uses up a "
        "session start, so the bucket now stays closed for up to 15 minutes",
        rejections,
        bucket,
        shard_id,
    )


def _when(in_seconds: float) -> str:
    return format_time(datetime.now().astimezone(), in_seconds)
