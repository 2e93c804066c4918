"""The rules of session starts as pure arithmetic: the windows, the budget, re-bucketing.

No thread, clock, lock or I/O: the time is an argument, in integer microseconds, and an ``Account``
is all that is remembered. Windows run on a clock that is never set (``now_us``), the budget on one
that outlives the process (``wall_us``); a ledger that has one clock for both passes it twice.

Source of the rules: https://discord.com/developers/docs/topics/gateway (*Rate Limiting*, *Session
Start Limit*). What Discord leaves open is taken the careful way: a window starts with the latest
IDENTIFY of its bucket, and an IDENTIFY that was refused still counts in the budget.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from gateway_queue_sync.models import SessionStartLimit, seconds

NEVER = -(1 << 62)
MICROSECOND = 1_000_000  # µs in a second
LONGEST_CLOSURE_US = 60_000_000
SOONEST_REASK_US = 1_000_000


def to_us(duration: float) -> int:
    """Return seconds as whole microseconds; exact where a product of floats would overflow."""
    whole = int(duration)
    return whole * MICROSECOND + round((duration - whole) * MICROSECOND)


def timings_us(interval: float, margin: float, period: float) -> tuple[int, int, int]:
    """Return these settings of a queue in microseconds, or say what is wrong with one of them."""
    interval = seconds("interval", interval, above=0)
    margin = seconds("margin", margin)
    period = seconds("period", period, above=0)
    return max(1, to_us(interval)), to_us(margin), max(1, to_us(period))


def check_limit(limit: object, reserve: int) -> None:
    """Say what is wrong with a limit for a queue that keeps this reserve, if anything is."""
    if not isinstance(limit, SessionStartLimit):
        raise TypeError(f"a limit must be a SessionStartLimit, not {type(limit).__name__}")
    if limit.total <= reserve:
        raise ValueError(f"total ({limit.total}) must be more than the reserve ({reserve})")


@dataclass(slots=True)
class Bucket:
    """What is remembered of one bucket.

    ``last_us`` is when its window started and ``serial`` the number of its latest grant;
    ``before_us`` and ``before_serial`` are what these were before that grant, so that it can be
    undone once. ``closed_until_us``, ``row`` and ``rejected_serial`` keep count of rejections in a
    row.
    """

    last_us: int = NEVER
    serial: int = 0
    before_us: int = NEVER
    before_serial: int = 0
    closed_until_us: int = NEVER
    row: int = 0
    rejected_serial: int = -1


@dataclass(slots=True)
class Account:
    """Who was granted when, and what is left: the whole state that a ledger keeps.

    Attributes:
        window_us: how long a bucket rests after a permit.
        period_us: how long a budget lasts from its first grant on.
        buckets: those that granted since they were laid out; ``fresh`` is what the others are like.
        total: session starts in a period; ``None`` while no budget is kept.
        remaining: session starts left in this period.
        resets_at_us: when the period ends, on the wall clock; ``None`` until its first grant.
        span_us: how far ``resets_at_us`` was away when it was set (it never is farther).
        period: counts the budgets seen, so that a refund goes to the one that was charged.
        refresh_owed: the latest reset was taken on trust, since the limit could not be read.
        granted: permits granted; also the serial number of the latest.
    """

    window_us: int
    period_us: int
    max_concurrency: int = 1
    buckets: dict[int, Bucket] = field(default_factory=dict)
    fresh: Bucket = field(default_factory=Bucket)
    total: int | None = None
    remaining: int = 0
    resets_at_us: int | None = None
    span_us: int = 0
    period: int = 0
    refresh_owed: bool = False
    granted: int = 0


@dataclass(slots=True)
class Grant:
    """One permit as the account knows it; ``stamp_us`` is when its window started."""

    serial: int
    shard_id: int
    bucket: int
    stamp_us: int
    remaining: int | None
    period: int
    returned: bool = False


class Reason(enum.Enum):
    """Why there is no permit now."""

    WINDOW = "the bucket's window is not over"
    BUDGET = "the session start limit is used up"
    RESET = "a reset is due, and whoever can read the new limit should"


@dataclass(frozen=True, slots=True)
class Denial:
    """No permit for ``wait_us`` from now, and one then unless the account changes before.

    When it is for the budget or its reset, the other fields tell of that. ``period`` and ``granted``
    are the account's then: they show whether it has changed while the limit was read anew.
    """

    wait_us: int
    reason: Reason
    remaining: int = 0
    resets_in_us: int = 0
    period: int = 0
    granted: int = 0


# --- the token bucket and the budget --------------------------------------------------------------


def take(
    account: Account,
    shard_id: int,
    now_us: int,
    wall_us: int,
    reserve: int = 0,
    can_refresh: bool = False,
    not_before_us: int = NEVER,
) -> Grant | Denial:
    """Grant a permit now if the bucket's window is over and the budget allows it.

    ``can_refresh`` says that the caller would read the limit anew at a reset; it is then told when
    one is due. A caller that tried in vain passes ``False``, and the last known total counts. One
    whose turn has not come passes when it will (``not_before_us``).
    """
    number = shard_id % account.max_concurrency
    bucket = account.buckets.get(number)
    if bucket is None:
        bucket = account.buckets[number] = _copy(account.fresh)
    wait_us = bucket.last_us + account.window_us - now_us
    if wait_us > 0 or bucket.closed_until_us > now_us or not_before_us > now_us:
        wait_us = max(_wait_us(account, bucket, now_us), not_before_us - now_us)
    if account.total is None:
        if wait_us > 0:
            return Denial(wait_us, Reason.WINDOW)
        remaining, left, resets_at_us, period = None, 0, None, account.period
    else:
        due = account.resets_at_us is not None and wall_us >= account.resets_at_us
        if (account.total if due else account.remaining) <= reserve:
            return _used_up(account, wait_us, wall_us)
        if wait_us > 0:
            return Denial(wait_us, Reason.WINDOW)
        if can_refresh and (due or account.refresh_owed):
            return Denial(0, Reason.RESET, period=account.period, granted=account.granted)
        if due:
            left, resets_at_us, period = account.total - 1, None, account.period + 1
        else:
            left, resets_at_us, period = account.remaining - 1, account.resets_at_us, account.period
        if resets_at_us is None:
            resets_at_us, account.span_us = wall_us + account.period_us, account.period_us
        remaining = left
    grant = Grant(account.granted + 1, shard_id, number, now_us, remaining, period)
    # From here on there are only assignments: no interrupt can come between them.
    account.remaining, account.resets_at_us, account.period = left, resets_at_us, period
    account.granted = grant.serial
    bucket.before_us, bucket.before_serial = bucket.last_us, bucket.serial
    bucket.last_us, bucket.serial = now_us, grant.serial
    return grant


def _used_up(account: Account, wait_us: int, wall_us: int) -> Denial:
    resets_in_us = _resets_in_us(account, wall_us) or account.period_us  # no reset will help
    account.resets_at_us = wall_us + resets_in_us  # nearer, if the clock was set back
    return Denial(
        max(wait_us, resets_in_us), Reason.BUDGET, account.remaining, resets_in_us, account.period
    )


def _copy(bucket: Bucket) -> Bucket:
    return Bucket(last_us=bucket.last_us, closed_until_us=bucket.closed_until_us)


def closed_for_us(account: Account, bucket: Bucket, now_us: int) -> int:
    """Return how long the bucket stays closed; negative: since when it is open.

    A clock that was set back never adds to that.
    """
    last_us = min(bucket.last_us, now_us)
    closed_until_us = min(bucket.closed_until_us, now_us + _longest_closure_us(account))
    return max(last_us + account.window_us, closed_until_us) - now_us


def _longest_closure_us(account: Account) -> int:
    return max(LONGEST_CLOSURE_US, 2 * account.window_us)


def _wait_us(account: Account, bucket: Bucket, now_us: int) -> int:
    """Return how long the bucket stays closed; a clock that was set back costs a window once."""
    bucket.last_us = min(bucket.last_us, now_us)
    bucket.closed_until_us = min(bucket.closed_until_us, now_us + _longest_closure_us(account))
    return closed_for_us(account, bucket, now_us)


def _resets_in_us(account: Account, wall_us: int) -> int:
    if account.resets_at_us is None:
        return 0
    return min(max(account.resets_at_us - wall_us, 0), account.span_us)


# --- what holders report --------------------------------------------------------------------------


def restamp(account: Account, grant: Grant, now_us: int) -> bool:
    """Move the window of a permit that is about to be handed over, unless its bucket went on."""
    bucket = account.buckets.get(grant.bucket)
    if bucket is None or bucket.serial != grant.serial:
        return False
    bucket.last_us = grant.stamp_us = max(bucket.last_us, now_us)
    return True


def sent(account: Account, grant: Grant, now_us: int) -> None:
    """Start the window anew: the IDENTIFY went out only now."""
    bucket = bucket_of(account, grant.shard_id)
    bucket.last_us = max(bucket.last_us, now_us)
    if bucket.serial != grant.serial:  # what a later grant would give back to
        bucket.before_us = bucket.last_us


def unused(account: Account, grant: Grant) -> None:
    """Undo a grant, once: refund the budget it was charged to, free its window if nothing came since."""
    if grant.returned:
        return
    grant.returned = True
    if account.total is not None and account.period == grant.period:
        account.remaining = min(account.remaining + 1, account.total)
    bucket = bucket_of(account, grant.shard_id)
    if bucket.serial == grant.serial:
        bucket.last_us, bucket.serial = bucket.before_us, bucket.before_serial


def rejected(account: Account, grant: Grant, now_us: int) -> None:
    """Close the bucket for 2 windows, doubled by each rejection in a row, up to a minute.

    A row is ended by a permit that its bucket's next grant finds not rejected.
    """
    bucket = bucket_of(account, grant.shard_id)
    goes_on = bucket.rejected_serial in (bucket.serial, bucket.before_serial)
    bucket.row = min(bucket.row + 1, 32) if goes_on else 1
    bucket.rejected_serial = max(bucket.rejected_serial, grant.serial)
    closed_us = min(account.window_us << bucket.row, _longest_closure_us(account))
    bucket.closed_until_us = max(bucket.closed_until_us, now_us + closed_us)


def bucket_of(account: Account, shard_id: int) -> Bucket:
    """Return the bucket that the shard belongs to now (re-bucketing may have moved it)."""
    number = shard_id % account.max_concurrency
    bucket = account.buckets.get(number)
    if bucket is None:
        bucket = account.buckets[number] = _copy(account.fresh)
    return bucket


# --- new limits -----------------------------------------------------------------------------------


def adopt(account: Account, limit: SessionStartLimit, wall_us: int) -> None:
    """Take a limit as it is given; if it has other buckets, start each from the latest grant of all."""
    span_us = to_us(limit.reset_after)
    untouched = limit.remaining == limit.total and span_us == 0
    resets_at_us = None if untouched else wall_us + span_us
    buckets, fresh = account.buckets, account.fresh
    if limit.max_concurrency != account.max_concurrency:
        known = [fresh, *buckets.values()]
        last_us = max(bucket.last_us for bucket in known)
        buckets, fresh = {}, Bucket(last_us, closed_until_us=max(b.closed_until_us for b in known))
    # From here on there are only assignments: no interrupt can come between them.
    account.buckets, account.fresh, account.max_concurrency = buckets, fresh, limit.max_concurrency
    account.total, account.remaining = limit.total, limit.remaining
    account.resets_at_us, account.span_us = resets_at_us, span_us
    account.period += 1
    account.refresh_owed = False


def renew(
    account: Account, limit: SessionStartLimit, period: int, granted: int, wall_us: int
) -> SessionStartLimit | None:
    """Adopt a limit that was read at the reset of ``period``; ``None`` if an update has overtaken it.

    What was granted since (``granted`` permits had been when the reading began) is taken off, and it
    is not to be read again before a second. Returns what was adopted.
    """
    if account.period != period:
        return None
    since = account.granted - granted
    if since > 0:
        limit = replace(limit, remaining=max(0, limit.remaining - since))
    if limit.remaining < limit.total:
        limit = replace(limit, reset_after=max(limit.reset_after, SOONEST_REASK_US / MICROSECOND))
    adopt(account, limit, wall_us)
    return limit


def trust(account: Account, period: int) -> bool:
    """Note that the limit could not be read at the reset of ``period``; false if that is overtaken.

    The last known total counts then, and the next grant asks for the limit again.
    """
    account.refresh_owed = account.refresh_owed or account.period == period
    return account.period == period


# --- looking ahead --------------------------------------------------------------------------------


def ready_in_us(account: Account, number: int, now_us: int) -> int:
    """Return how long the bucket's window still lasts, 0 if it is over."""
    bucket = account.buckets.get(number, account.fresh)
    return max(0, closed_for_us(account, bucket, now_us))


@dataclass(frozen=True, slots=True)
class Budget:
    """What is left to grant; a reset that is due shows as done."""

    total: int
    remaining: int
    resets_in_us: int


def budget(account: Account, wall_us: int) -> Budget | None:
    """Return the budget as it is now, ``None`` if none is kept."""
    if account.total is None:
        return None
    resets_in_us = _resets_in_us(account, wall_us)
    due = account.resets_at_us is not None and resets_in_us == 0
    return Budget(account.total, account.total if due else account.remaining, resets_in_us)
