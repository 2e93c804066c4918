"""The values that users pass and get: limits, permits, snapshots. No lock, no clock, no I/O."""

from __future__ import annotations

import enum
import logging
import math
import operator
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

log = logging.getLogger("gateway_queue_sync")

US_PER_SECOND = 1_000_000

IDENTIFY_INTERVAL = 5.0
"""Seconds between two IDENTIFYs of one bucket: Discord's rule."""

DEFAULT_MARGIN = 0.25
"""Seconds added to the interval, because one IDENTIFY may take longer to reach Discord than the next."""

SESSION_PERIOD = 86_400.0
"""Seconds after which Discord renews the session start limit."""

MAX_RESET_AFTER = 172_800.0
"""Seconds; a limit that resets later than in 48 hours was given in milliseconds by mistake."""

MAX_BUCKETS = 100_000
"""The largest ``max_concurrency`` that is accepted; Discord's largest bots have a few hundred."""

MAX_PRIORITY_US = 1 << 51
"""71 years. More would make no difference, and some ledgers could not store it."""


def whole_number(name: str, value: object, *, least: int = 0) -> int:
    """Return ``value`` as an ``int`` of at least ``least``, or say what is wrong with it."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not the bool {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be a whole number, not {type(value).__name__} {value!r}"
        ) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def real_number(name: str, value: object) -> float:
    """Return ``value`` as a ``float`` that is not NaN, or say what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf if value > 0 else -math.inf
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, not NaN")
    return number


def seconds(name: str, value: object, *, above: float | None = None) -> float:
    """Return ``value`` as seconds that a wait can take: at least 0, or above ``above`` if given."""
    number = real_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, not {number}")
    if number > threading.TIMEOUT_MAX:
        raise ValueError(f"{name} must be at most {threading.TIMEOUT_MAX:.0f} s, not {number:g}")
    if above is not None and number <= above:
        raise ValueError(f"{name} must be more than {above:g} s, not {number:g}")
    if number < 0:
        raise ValueError(f"{name} must not be negative, not {number:g}")
    return number


def to_us(duration: float) -> int:
    """Return seconds as whole microseconds; exact where a product of floats would overflow."""
    whole = int(duration)
    return whole * US_PER_SECOND + round((duration - whole) * US_PER_SECOND)


def timeout_seconds(timeout: object) -> float | None:
    """Return a timeout in seconds; ``None`` for one that is longer than a wait can take."""
    number = real_number("timeout", timeout)
    if number < 0:
        raise ValueError(f"timeout must not be negative, not {number:g}")
    return number if number <= threading.TIMEOUT_MAX else None


def to_priority_us(priority: object) -> int:
    """Return a priority in seconds as whole microseconds."""
    number = real_number("priority", priority)
    if math.isinf(number):
        raise ValueError(f"priority must be finite, not {number}")
    return max(-MAX_PRIORITY_US, min(to_us(number), MAX_PRIORITY_US))


@dataclass(frozen=True, slots=True)
class SessionStartLimit:
    """Discord's session start limit: how many sessions a bot may still start, and how fast.

    Source: https://discord.com/developers/docs/topics/gateway#session-start-limit-object.

    Attributes:
        total: session starts allowed in a period (about a day).
        remaining: session starts left in this period, at most ``total``.
        reset_after: seconds until the limit resets, at most 48 hours. Discord counts in milliseconds:
            ``from_payload`` converts its answer.
        max_concurrency: IDENTIFYs allowed per 5 seconds, one for each bucket
            ``shard_id % max_concurrency``; at most 100,000.

    Raises:
        TypeError: a value is no number of the right kind.
        ValueError: a value is negative, not finite, too large or contradicts another one.
    """

    total: int
    remaining: int
    reset_after: float
    max_concurrency: int

    def __post_init__(self) -> None:
        def normalise(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        normalise("total", whole_number("total", self.total))
        normalise("remaining", whole_number("remaining", self.remaining))
        normalise("reset_after", seconds("reset_after", self.reset_after))
        if self.reset_after > MAX_RESET_AFTER:
            raise ValueError(
                f"reset_after must be at most 48 hours ({MAX_RESET_AFTER:.0f} s), not "
                f"{self.reset_after:g} s; Discord counts in milliseconds, which from_payload converts"
            )
        normalise("max_concurrency", whole_number("max_concurrency", self.max_concurrency, least=1))
        if self.max_concurrency > MAX_BUCKETS:
            raise ValueError(
                f"max_concurrency must be at most {MAX_BUCKETS}, not {self.max_concurrency}"
            )
        if self.remaining > self.total:
            raise ValueError(f"remaining ({self.remaining}) is more than total ({self.total})")

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        """Read Discord's JSON: the ``session_start_limit`` object or the whole ``/gateway/bot`` body.

        Discord counts ``reset_after`` in milliseconds; the result has seconds. What a proxy leaves out
        or gets wrong is replaced by the safe value, with a WARNING: a missing ``max_concurrency`` by 1,
        a ``remaining`` above ``total`` by ``total``.

        Raises:
            TypeError: the payload or one of its fields has another type than Discord's.
            ValueError: a field is missing, negative or contradicts another one.
        """
        what = "the payload"
        if isinstance(payload, Mapping) and "session_start_limit" in payload:
            payload, what = payload["session_start_limit"], "session_start_limit"
        if not isinstance(payload, Mapping):
            raise TypeError(f"{what} must be a JSON object, not {type(payload).__name__}")
        missing = [name for name in ("total", "remaining", "reset_after") if name not in payload]
        if missing:
            raise ValueError(f"{what} lacks {', '.join(missing)}")
        milliseconds = real_number("reset_after (milliseconds)", payload["reset_after"])
        total = whole_number("total", payload["total"])
        remaining = whole_number("remaining", payload["remaining"])
        if remaining > total:
            log.warning(
                "%s says remaining=%d of total=%d: %d counts", what, remaining, total, total
            )
        if "max_concurrency" not in payload:
            log.warning("%s lacks max_concurrency: 1 counts", what)
        return cls(
            total=total,
            remaining=min(remaining, total),
            reset_after=milliseconds / 1000,
            max_concurrency=payload.get("max_concurrency", 1),
        )


def check_limit(limit: object, reserve: int) -> SessionStartLimit:
    """Return a limit that a queue with this reserve can keep, or raise an error that says why not."""
    if not isinstance(limit, SessionStartLimit):
        raise TypeError(f"a limit must be a SessionStartLimit, not {type(limit).__name__}")
    if limit.total <= reserve:
        raise ValueError(f"total ({limit.total}) must be more than the reserve ({reserve})")
    return limit


class Report(enum.Enum):
    """What became of a permit, as its holder reports it."""

    SENT = "sent"
    UNUSED = "unused"
    REJECTED = "rejected"


class Reporter(Protocol):
    """What receives the reports on a permit."""

    def report(self, permit: Permit, report: Report) -> None:
        """Record a report on a permit."""


class Permit:
    """The right to send one IDENTIFY, now.

    As a context manager it reports ``sent()`` at the end of the ``with`` block, also after an exception
    (the IDENTIFY may have been sent), unless something was reported before. A permit without a report
    counts as used when it was granted. Any thread may report, also after the queue was closed. A
    repeated report changes nothing. A report that contradicts an earlier one changes nothing and logs
    a WARNING.

    A ``Queue`` of your own may make one with ``Permit(shard_id)``: its reports do nothing.

    Attributes:
        shard_id: the shard that may identify.
        bucket: the bucket it was granted in, ``shard_id % max_concurrency``.
        waited: seconds between asking and the grant.
        remaining: session starts left after this one, or ``None`` if no limit is kept.
        reported: the latest report; ``None`` if there is none.
    """

    bucket: int = 0
    waited: float = 0.0
    remaining: int | None = None
    reported: Report | None = None
    # Not public: the number and time of the grant, the period that it was charged to, the number of the
    # call, whether the permit was given back, and what receives its reports.
    serial = stamp_us = period = waiter = 0
    returned = False
    reporter: Reporter | None = None

    def __init__(
        self,
        shard_id: int,
        bucket: int = 0,
        waited: float = 0.0,
        remaining: int | None = None,
    ) -> None:
        self.shard_id = shard_id
        self.bucket = bucket
        self.waited = waited
        self.remaining = remaining

    def sent(self) -> None:
        """Report that the IDENTIFY was sent just now: the bucket's window starts now.

        A late report is useful, too. It never makes the window end earlier.
        """
        self._report(Report.SENT)

    def unused(self) -> None:
        """Give the permit back: no IDENTIFY was sent and none will be.

        The session start is refunded if the limit has not been renewed since, and the bucket is
        free again if it has granted nothing since. Counts only as the first report.
        """
        self._report(Report.UNUSED)

    def rejected(self) -> None:
        """Report that the gateway answered the IDENTIFY with Invalid Session (opcode 9).

        The bucket is closed for 2 windows from now. Each further rejection in a row doubles that, up
        to a minute (but never less than 2 windows); from the tenth in a row on, up to 15 minutes. May
        follow ``sent()``. A rejected IDENTIFY still counts in the session start limit.
        """
        self._report(Report.REJECTED)

    def _report(self, report: Report) -> None:
        if self.reporter is not None:
            self.reporter.report(self, report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.reported is None:
            self.sent()

    def __repr__(self) -> str:
        state = "" if self.reported is None else f" {self.reported.value}"
        left = "" if self.remaining is None else f" remaining={self.remaining}"
        return (
            f"<Permit shard_id={self.shard_id} bucket={self.bucket} "
            f"waited={self.waited:.3f}{left}{state}>"
        )


@dataclass(frozen=True, slots=True)
class WaitingShard:
    """One waiter in a line: its shard, how long it has waited, and when its permit should come.

    Attributes:
        shard_id: the shard.
        waited: seconds since it asked.
        eta: seconds from the snapshot until its permit, including a wait for the limit's reset;
            ``None`` if that is unknown. A shard that arrives later with a head start may delay it.
    """

    shard_id: int
    waited: float
    eta: float | None


@dataclass(frozen=True, slots=True)
class BucketSnapshot:
    """One bucket and its line.

    Attributes:
        bucket: its number, Discord's ``rate_limit_key``.
        ready_in: seconds until it may grant, 0.0 if it may now.
        shards: the waiters, in the order in which they are served.
    """

    bucket: int
    ready_in: float
    shards: tuple[WaitingShard, ...]


@dataclass(frozen=True, slots=True)
class LimitSnapshot:
    """The session start limit. A reset that is due counts as done.

    Attributes:
        total: session starts in a period.
        remaining: session starts left; ``total`` if a reset is due.
        resets_in: seconds until the limit resets; 0.0 if that is due.
    """

    total: int
    remaining: int
    resets_in: float


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """A queue at one instant.

    Attributes:
        waiting: how many wait in all lines.
        granted: permits granted since the account was created, by all processes; it never decreases.
        buckets: all buckets, by number.
        limit: the session start limit; ``None`` if the queue has none, or it is not known yet.
    """

    waiting: int
    granted: int
    buckets: tuple[BucketSnapshot, ...]
    limit: LimitSnapshot | None
