"""The rules of session starts as pure arithmetic: a token bucket per bucket, the limit, re-bucketing.

No thread, clock, lock or I/O: the time is an argument, in integer microseconds, and an ``Account`` is
all that is remembered. Windows run on a clock that is never set (``now_us``), the session start limit
on one that outlives the process (``wall_us``); a ledger with one clock for both passes it twice.

Source of the rules: https://discord.com/developers/docs/topics/gateway (*Rate Limiting*, *Session
Start Limit*). Where Discord is silent, the safe reading counts: a window starts with the latest
IDENTIFY of its bucket, and a rejected IDENTIFY counts in the limit.

Functions that change an account compute first and then only assign. CPython handles signals and
asynchronous exceptions at calls and jumps, so an interrupt finds either all of a change or nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Protocol

from gateway_queue_sync.models import Permit, SessionStartLimit, seconds

NEVER = -(1 << 62)
US_PER_SECOND = 1_000_000
MAX_CLOSURE_US = 60 * US_PER_SECOND
MANY_REJECTIONS = 10  # in a row; from then on a bucket may close for longer
MAX_LONG_CLOSURE_US = 900 * US_PER_SECOND
MAX_REJECTIONS = 32  # counted; more make no difference
MIN_REREAD_US = 1 * US_PER_SECOND

UNSEEN_US = 60 * US_PER_SECOND
"""How long a session start may take to show in what Discord answers."""

SAME_RESET_US = 300 * US_PER_SECOND
"""Two resets that are no further apart are one."""

CONFIRM_US = 60 * US_PER_SECOND
"""How much later a second read must confirm another reset."""


def to_us(duration: float) -> int:
    """Return seconds as whole microseconds; exact where a product of floats would overflow."""
    whole = int(duration)
    return whole * US_PER_SECOND + round((duration - whole) * US_PER_SECOND)


def timings_us(interval: float, margin: float, period: float) -> tuple[int, int, int]:
    """Return these settings of a queue in microseconds, or raise an error that names the bad one."""
    interval = seconds("interval", interval, above=0)
    margin = seconds("margin", margin)
    period = seconds("period", period, above=0)
    return max(1, to_us(interval)), to_us(margin), max(1, to_us(period))


def check_limit(limit: object, reserve: int) -> SessionStartLimit:
    """Return a limit that a queue with this reserve can keep, or raise an error that says why not."""
    if not isinstance(limit, SessionStartLimit):
        raise TypeError(f"a limit must be a SessionStartLimit, not {type(limit).__name__}")
    if limit.total <= reserve:
        raise ValueError(f"total ({limit.total}) must be more than the reserve ({reserve})")
    return limit


@dataclass(slots=True)
class TokenBucket:
    """One bucket, which holds one token: a permit takes it, and a window later it is back.

    ``last_us`` is when its window started and ``serial`` the number of its latest grant;
    ``previous_us`` and ``previous_serial`` are what these were before that grant, so that it can be
    undone once. ``closed_until_us``, ``rejections`` (in a row) and ``rejected_serial`` are about
    permits that Discord rejected.
    """

    last_us: int = NEVER
    serial: int = 0
    previous_us: int = NEVER
    previous_serial: int = 0
    closed_until_us: int = NEVER
    rejections: int = 0
    rejected_serial: int = -1


@dataclass(slots=True)
class Account:
    """Who was granted when, and what is left: the whole state that a ledger keeps.

    Attributes:
        window_us: how long a bucket rests after a permit.
        period_us: how long a limit lasts from its first grant on.
        buckets: those that granted since they were laid out; the others are like ``default_bucket``.
        total: session starts in a period; ``None`` while no limit is kept.
        remaining: session starts left in this period.
        resets_at_us: when the period ends, on the wall clock; ``None`` until its first grant.
        max_reset_us: how far away ``resets_at_us`` was when it was set: it never is further.
        period: counts the limits seen, so that a refund goes to the one that was charged.
        refresh_owed: the latest reset passed without a read, so a read should come next.
        granted: permits granted; also the serial number of the latest.
        used: permits charged to this period and not given back.
        recent: when each of the latest permits was granted, by serial; ``None`` where nobody reads
            the limit.
        other_reset: a reset that was read and differs from ``resets_at_us``, and when it was read.
    """

    window_us: int
    period_us: int
    max_concurrency: int = 1
    buckets: dict[int, TokenBucket] = field(default_factory=dict)
    default_bucket: TokenBucket = field(default_factory=TokenBucket)
    total: int | None = None
    remaining: int = 0
    resets_at_us: int | None = None
    max_reset_us: int = 0
    period: int = 0
    refresh_owed: bool = False
    granted: int = 0
    used: int = 0
    recent: dict[int, int] | None = None
    other_reset: tuple[int, int] | None = None


class Reason(enum.Enum):
    """Why there is no permit now."""

    WINDOW = "the bucket's window is not over"
    BUDGET = "the session start limit is used up"
    RESET = "a reset is due, and the limit should be read again"


@dataclass(slots=True)
class Denial:
    """No permit for ``wait_us`` from now, and one then unless the account changes before.

    If the limit or its reset is the reason, the other fields describe it. ``period`` and ``granted``
    are the account's: they show whether it has changed while the limit was read.
    """

    wait_us: int
    reason: Reason
    remaining: int = 0
    resets_in_us: int = 0
    period: int = 0
    granted: int = 0


# --- taking a permit ------------------------------------------------------------------------------

# Without __init__, which takes half as long again: the free path is mostly these two.
_new_bucket, _new_permit = TokenBucket.__new__, Permit.__new__


def take(
    account: Account,
    shard_id: int,
    now_us: int,
    wall_us: int,
    reserve: int = 0,
    can_refresh: bool = False,
    not_before_us: int = NEVER,
) -> Permit | Denial:
    """Grant a permit now if the bucket's window is over and the limit allows it.

    ``can_refresh`` says that the caller can read the limit at a reset; it is then denied when one is
    due. A caller that could not read it passes ``False``, and the last known total counts. A caller
    whose turn comes later passes when (``not_before_us``).
    """
    number = shard_id % account.max_concurrency
    bucket = account.buckets.get(number)
    if bucket is None:
        default, bucket = account.default_bucket, _new_bucket(TokenBucket)
        bucket.last_us, bucket.closed_until_us = default.last_us, default.closed_until_us
        bucket.serial, bucket.previous_us, bucket.previous_serial = 0, NEVER, 0
        bucket.rejections, bucket.rejected_serial = default.rejections, -1
        account.buckets[number] = bucket
    last_us = bucket.last_us
    if (
        last_us + account.window_us > now_us
        or bucket.closed_until_us > now_us
        or not_before_us > now_us
    ):
        wait_us = max(_wait_us(account, bucket, now_us), not_before_us - now_us)
    else:
        wait_us = 0
    period, resets_at_us, remaining = account.period, account.resets_at_us, None
    left = used = 0
    if account.total is not None:
        due = resets_at_us is not None and wall_us >= resets_at_us
        left = (account.total if due else account.remaining) - 1
        if left < reserve:
            return _used_up(account, wait_us, wall_us)
        used = 1 if due else account.used + 1
        remaining = left
        if due or resets_at_us is None or account.refresh_owed:
            if can_refresh and wait_us <= 0 and (due or account.refresh_owed):
                return Denial(0, Reason.RESET, period=period, granted=account.granted)
            if wait_us <= 0 and (due or resets_at_us is None):
                resets_at_us, period = _next_period(account, wall_us, due)
    if wait_us > 0:
        return Denial(wait_us, Reason.WINDOW)
    serial = account.granted + 1
    permit = _new_permit(Permit)
    permit.shard_id, permit.bucket, permit.waited, permit.remaining = (
        shard_id,
        number,
        0.0,
        remaining,
    )
    permit.serial, permit.stamp_us, permit.period, permit.waiter = serial, now_us, period, 0
    permit.reported, permit.returned, permit.reporter = None, False, None
    if account.recent is not None:
        account.recent[serial] = now_us
    # From here on there are only assignments: no interrupt can come between them.
    account.remaining, account.resets_at_us, account.period = left, resets_at_us, period
    account.granted, account.used = serial, used
    bucket.previous_us, bucket.previous_serial = last_us, bucket.serial
    bucket.last_us, bucket.serial = now_us, serial
    return permit


def _next_period(account: Account, wall_us: int, due: bool) -> tuple[int, int]:
    """Return when the period that begins with a grant ends, and its number."""
    account.max_reset_us = account.period_us
    if not due:
        return wall_us + account.period_us, account.period
    account.other_reset = None
    account.refresh_owed = account.refresh_owed or account.recent is not None
    return wall_us + account.period_us, account.period + 1


def _used_up(account: Account, wait_us: int, wall_us: int) -> Denial:
    resets_in_us = _resets_in_us(account, wall_us)
    if not resets_in_us:  # no reset will help
        resets_in_us = account.max_reset_us = account.period_us
    account.resets_at_us = wall_us + resets_in_us  # nearer, if the clock was set back
    return Denial(
        max(wait_us, resets_in_us), Reason.BUDGET, account.remaining, resets_in_us, account.period
    )


def closed_for_us(account: Account, bucket: TokenBucket, now_us: int) -> int:
    """Return how long the bucket stays closed; negative: since when it is open.

    A clock that was set back never adds to that.
    """
    last_us = min(bucket.last_us, now_us)
    closed_until_us = min(
        bucket.closed_until_us, now_us + _max_closure_us(account, bucket.rejections)
    )
    return max(last_us + account.window_us, closed_until_us) - now_us


def _max_closure_us(account: Account, rejections: int) -> int:
    many = rejections >= MANY_REJECTIONS
    return max(MAX_LONG_CLOSURE_US if many else MAX_CLOSURE_US, 2 * account.window_us)


def _wait_us(account: Account, bucket: TokenBucket, now_us: int) -> int:
    """Return how long the bucket stays closed; a clock that was set back costs a window once."""
    bucket.last_us = min(bucket.last_us, now_us)
    if bucket.closed_until_us > now_us:
        max_us = _max_closure_us(account, bucket.rejections)
        bucket.closed_until_us = min(bucket.closed_until_us, now_us + max_us)
    return max(bucket.last_us + account.window_us, bucket.closed_until_us) - now_us


def _resets_in_us(account: Account, wall_us: int) -> int:
    if account.resets_at_us is None:
        return 0
    return min(max(account.resets_at_us - wall_us, 0), account.max_reset_us)


# --- what holders report --------------------------------------------------------------------------


class Granted(Protocol):
    """A permit, as far as reports need it."""

    shard_id: int
    serial: int
    period: int
    bucket: int
    stamp_us: int
    returned: bool


def restamp(account: Account, permit: Granted, now_us: int) -> bool:
    """Move the window of a permit that is handed over now, unless its bucket has gone on since."""
    bucket = account.buckets.get(permit.bucket)
    if bucket is None or bucket.serial != permit.serial:
        return False
    bucket.last_us = permit.stamp_us = max(bucket.last_us, now_us)
    return True


def sent(account: Account, permit: Granted, now_us: int) -> None:
    """Start the window again: the IDENTIFY went out only now."""
    bucket = bucket_of(account, permit.shard_id)
    bucket.last_us = max(bucket.last_us, now_us)
    if bucket.serial != permit.serial:  # what a later grant would give back to
        bucket.previous_us = bucket.last_us


def unused(account: Account, permit: Granted) -> None:
    """Undo a grant, once: refund the period it was charged to, free its window if nothing came since."""
    if permit.returned:
        return
    bucket = bucket_of(account, permit.shard_id)
    last_us, serial = bucket.last_us, bucket.serial
    if serial == permit.serial:
        last_us, serial = bucket.previous_us, bucket.previous_serial
    remaining, used = account.remaining, account.used
    if account.total is not None and account.period == permit.period:
        remaining, used = min(remaining + 1, account.total), max(0, used - 1)
    if account.recent is not None:
        account.recent.pop(permit.serial, None)
    # From here on there are only assignments: no interrupt can come between them.
    permit.returned = True
    account.remaining, account.used = remaining, used
    bucket.last_us, bucket.serial = last_us, serial


def rejected(account: Account, permit: Granted, now_us: int) -> int:
    """Close the bucket for 2 windows, doubled by each rejection in a row; return the length of the row.

    Up to a minute; from the tenth in a row on, up to 15 minutes: 16 buckets that are rejected once a
    minute would use up a day's limit in an hour. A row ends with a permit that is not rejected before
    its bucket's next grant.
    """
    bucket = bucket_of(account, permit.shard_id)
    if bucket.rejected_serial == permit.serial:
        return bucket.rejections  # repeated, after an interrupt
    goes_on = bucket.rejected_serial in (bucket.serial, bucket.previous_serial)
    rejections = min(bucket.rejections + 1, MAX_REJECTIONS) if goes_on else 1
    rejected_serial = max(bucket.rejected_serial, permit.serial)
    closed_us = min(account.window_us << rejections, _max_closure_us(account, rejections))
    closed_until_us = max(bucket.closed_until_us, now_us + closed_us)
    # From here on there are only assignments: no interrupt can come between them.
    bucket.rejections, bucket.rejected_serial = rejections, rejected_serial
    bucket.closed_until_us = closed_until_us
    return rejections


def bucket_of(account: Account, shard_id: int) -> TokenBucket:
    """Return the bucket that the shard belongs to now (re-bucketing may have moved it)."""
    number = shard_id % account.max_concurrency
    bucket = account.buckets.get(number)
    if bucket is None:
        default = account.default_bucket
        bucket = replace(default)
        account.buckets[number] = bucket
    return bucket


# --- limits that are given ------------------------------------------------------------------------


def adopt(account: Account, limit: SessionStartLimit, wall_us: int) -> None:
    """Take a limit as it is given; its period begins, with nothing used of it by this account."""
    reset_us = to_us(limit.reset_after)
    untouched = limit.remaining == limit.total and reset_us == 0
    resets_at_us = None if untouched else wall_us + reset_us
    _rebucket(account, limit.max_concurrency)
    # From here on there are only assignments: no interrupt can come between them.
    account.total, account.remaining = limit.total, limit.remaining
    account.resets_at_us, account.max_reset_us = resets_at_us, reset_us
    account.period += 1
    account.used, account.other_reset, account.refresh_owed = 0, None, False


def _rebucket(account: Account, max_concurrency: int) -> None:
    """Lay out other buckets, if there are others: each starts from the latest grant of all."""
    if max_concurrency == account.max_concurrency:
        return
    known = [account.default_bucket, *account.buckets.values()]
    default = TokenBucket(
        max(bucket.last_us for bucket in known),
        closed_until_us=max(bucket.closed_until_us for bucket in known),
        rejections=max(bucket.rejections for bucket in known),
    )
    buckets: dict[int, TokenBucket] = {}
    account.buckets, account.default_bucket = buckets, default
    account.max_concurrency = max_concurrency


def renew(
    account: Account, limit: SessionStartLimit, period: int, granted: int, wall_us: int
) -> SessionStartLimit | None:
    """Adopt a limit that was read at the reset of ``period``; ``None`` if an update came before it.

    What was granted since (``granted`` permits had been when the read began) is taken off. Returns
    what was adopted.
    """
    if account.period != period:
        return None
    limit = _less(limit, account.granted - granted)
    adopt(account, limit, wall_us)
    return limit


def _less(limit: SessionStartLimit, starts: int) -> SessionStartLimit:
    """Return a limit with so many starts taken off, to be read again after a second at the earliest."""
    if starts > 0:
        limit = replace(limit, remaining=max(0, limit.remaining - starts))
    if limit.remaining < limit.total:
        limit = replace(limit, reset_after=max(limit.reset_after, MIN_REREAD_US / US_PER_SECOND))
    return limit


def trust(account: Account, period: int) -> bool:
    """Note that the limit could not be read at the reset of ``period``; false if that is outdated.

    The last known total counts then, and the next grant asks for the limit again.
    """
    account.refresh_owed = account.refresh_owed or account.period == period
    return account.period == period


# --- limits that are read again and again ---------------------------------------------------------


def read(account: Account, limit: SessionStartLimit, sent_us: int, now_us: int) -> bool:
    """Take in a limit that was read: the request was sent at ``sent_us`` and answered at ``now_us``.

    What is left is the smaller of ``total`` less all own permits of the period, and ``remaining``
    less those of the last minute before the request, which Discord may not have seen. So each permit
    counts, and so do the starts of other programs. Another reset than the known one counts only if a
    second read confirms it a minute later; until then the smaller numbers count. Otherwise a bot that
    crashes in a loop would win session starts from an answer that lags behind.

    Returns false if the limit should be read again in a minute: to confirm its reset, or because it was
    read too soon after own permits to know what is left.
    """
    unseen_us = sent_us - UNSEEN_US
    recent = {
        serial: at_us for serial, at_us in (account.recent or {}).items() if at_us >= unseen_us
    }
    account.recent = recent
    known_us = account.resets_at_us
    resets_at_us = now_us + to_us(limit.reset_after)
    if known_us is not None and now_us >= known_us:
        return _begin_period(account, limit, 0, now_us)
    if account.refresh_owed and not (account.used and limit.reset_after == 0):
        return _begin_period(account, limit, account.used, now_us)
    if known_us is not None and abs(resets_at_us - known_us) <= SAME_RESET_US:
        account.other_reset = None
        own, theirs = limit.total - account.used, limit.remaining - len(recent)
        _take_in(account, limit, limit.total, max(0, min(own, theirs)))
        return not recent or own <= theirs  # else some may have been counted twice: not for long
    other = account.other_reset
    if known_us is not None and (other is None or abs(resets_at_us - other[0]) > SAME_RESET_US):
        account.other_reset = other = (resets_at_us, now_us)
    if known_us is None or (other is not None and now_us - other[1] >= CONFIRM_US):
        return _begin_period(account, limit, len(recent), now_us)
    total = limit.total if account.total is None else min(limit.total, account.total)
    left = min(total - account.used, limit.remaining - len(recent), account.remaining)
    _take_in(account, limit, total, max(0, left))
    return False


def _begin_period(account: Account, limit: SessionStartLimit, used: int, now_us: int) -> bool:
    """Adopt what was read as the limit of a period in which this account has used so many starts."""
    recent = len(account.recent or ())
    left = max(0, min(limit.total - used, limit.remaining - recent))
    if limit.reset_after == 0 and limit.remaining < limit.total:  # an answer from before the reset
        adopt(account, _less(limit, limit.remaining), now_us)
        return False
    if limit.reset_after == 0:  # no period runs, or Discord does not show yet what has begun it
        adopt(account, limit, now_us)
    else:
        adopt(account, _less(limit, limit.remaining - left), now_us)
    account.remaining, account.used = left, used
    return left == limit.remaining or limit.reset_after > 0


def _take_in(account: Account, limit: SessionStartLimit, total: int, remaining: int) -> None:
    _rebucket(account, limit.max_concurrency)
    account.total, account.remaining = total, remaining


# --- looking ahead --------------------------------------------------------------------------------


def ready_in_us(account: Account, bucket: TokenBucket, now_us: int) -> int:
    """Return how long the bucket's window still lasts, 0 if it is over."""
    return max(0, closed_for_us(account, bucket, now_us))


@dataclass(frozen=True, slots=True)
class Budget:
    """What is left to grant; a reset that is due shows as done."""

    total: int
    remaining: int
    resets_in_us: int


def budget(account: Account, wall_us: int) -> Budget | None:
    """Return the budget as it is now, ``None`` if no limit is kept."""
    if account.total is None:
        return None
    resets_in_us = _resets_in_us(account, wall_us)
    due = account.resets_at_us is not None and resets_in_us == 0
    return Budget(account.total, account.total if due else account.remaining, resets_in_us)
