"""The rules of session starts as pure arithmetic: when a bucket may grant, and what a report changes.

No thread, clock, lock or I/O: the time is an argument, in integer microseconds, and an ``Account`` is
the whole state. Windows are measured by a clock that is never set (``now_us``), the session start limit
by one that goes on when the process ends (``wall_us``). ``limits.py`` has what a new limit changes.

Source of the rules: https://discord.com/developers/docs/topics/gateway (*Rate Limiting*, *Session
Start Limit*). What Discord does not document is decided safely: a window starts with the latest
IDENTIFY of its bucket, and a rejected IDENTIFY counts in the limit.

Functions that change an account compute first and then only assign. CPython handles signals and
asynchronous exceptions at calls and jumps, so an interrupt finds either all of a change or nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from gateway_queue_sync.models import US_PER_SECOND, Permit

NEVER = -(1 << 62)
MAX_CLOSURE_US = 60 * US_PER_SECOND
MANY_REJECTIONS = 10  # in a row; from then on a bucket may close for longer
MAX_LONG_CLOSURE_US = 900 * US_PER_SECOND
MAX_REJECTIONS = 32  # that are counted in a row; more make no difference
UNSEEN_US = 60 * US_PER_SECOND  # how long a session start may take to show in an answer, at most


@dataclass
class TokenBucket:
    """One bucket, with one token: a permit takes it, and it comes back one window later.

    Attributes:
        last_us: when its window started.
        hold_us: how much later it starts, unless a report on the latest permit comes sooner.
        serial: the number of its latest grant.
        previous_us, previous_serial: the values of both before that grant, so that it can be undone.
        closed_until_us: until when it is closed because of rejections.
        rejections: permits rejected in a row.
        rejected_serial: the latest permit that was rejected.
    """

    last_us: int = NEVER
    hold_us: int = 0
    serial: int = 0
    previous_us: int = NEVER
    previous_serial: int = 0
    closed_until_us: int = NEVER
    rejections: int = 0
    rejected_serial: int = -1


@dataclass(slots=True)
class Account:
    """The whole state of a ledger: when each bucket granted, and what is left of the limit.

    Attributes:
        window_us, period_us: the time between permits of a bucket, and between resets of the limit.
        reserve: session starts that are never used.
        patience_us: how long permits wait for a read of the limit after a reset, at most.
        max_concurrency: how many buckets there are.
        buckets: those that have granted; all others are like ``default_bucket``.
        total, remaining: session starts of this period (``None``: there is no limit), and what is left.
        resets_at_us: when the period ends, on the wall clock; ``None`` until its first grant.
        max_reset_us: the reset is never further away than this, even if the clock is set back.
        period: the number of this period; a permit is refunded only to the period that was charged.
        refresh_owed: the limit should be read, because the latest reset passed without a read. Without
            a ``total``, no permit is granted before a read.
        granted: permits granted; also the serial number of the latest.
        used: permits charged to this period and not given back.
        recent: when the latest permits were granted, by serial; ``None`` if the limit is never read.
        other_reset: a reset that was read and differs from ``resets_at_us``, and when it was read.
    """

    window_us: int
    period_us: int
    reserve: int = 0
    patience_us: int = 0
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
    """No permit now. There will be one in ``wait_us``, unless the account changes before.

    If the limit is used up, ``remaining`` and ``resets_in_us`` describe it.
    """

    wait_us: int
    reason: Reason
    remaining: int = 0
    resets_in_us: int = 0


# __init__ would make the free path 50 % slower. Attributes that are not set have their class's defaults.
_new_bucket, _new_permit = TokenBucket.__new__, Permit.__new__


def take(
    account: Account,
    shard_id: int,
    now_us: int,
    wall_us: int | None = None,
    can_refresh: bool = False,
    not_before_us: int = NEVER,
) -> Permit | Denial:
    """Grant a permit if the bucket's window is over and the limit allows it now.

    ``wall_us`` is ``now_us`` if left out. A shared ledger passes whether the process ``can_refresh`` the
    limit at a reset, and when its turn comes (``not_before_us``).
    """
    number = shard_id % account.max_concurrency
    bucket = account.buckets.get(number)
    if bucket is None:
        bucket = bucket_of(account, shard_id)
    last_us = bucket.last_us
    wait_us = 0
    if (
        last_us + account.window_us > now_us
        or bucket.hold_us
        or bucket.closed_until_us > now_us
        or not_before_us > now_us
    ):
        wait_us = closed_for_us(account, bucket, now_us)
        bucket.last_us = min(last_us, now_us)  # a clock that was set back costs one window, once
        bucket.closed_until_us = min(bucket.closed_until_us, now_us + wait_us)
        wait_us = max(wait_us, not_before_us - now_us)
    period, resets_at_us, remaining = account.period, account.resets_at_us, None
    left = used = 0
    if account.total is not None:
        wall_us = now_us if wall_us is None else wall_us
        due = resets_at_us is not None and wall_us >= resets_at_us
        early = _early(account) if due else 0
        remaining = left = (account.total - early if due else account.remaining) - 1
        used = (early if due else account.used) + 1
        if left < account.reserve:
            return _used_up(account, wait_us, wall_us, early)
        if wait_us <= 0 and (due or resets_at_us is None or account.refresh_owed):
            denial = _wait_for_read(account, wall_us, due, can_refresh)
            if denial is not None:
                return denial
            resets_at_us, period = _next_period(account, wall_us, due)
    elif account.refresh_owed and account.patience_us:  # no limit is known yet
        return Denial(account.patience_us, Reason.RESET)
    if wait_us > 0:
        return Denial(wait_us, Reason.WINDOW)
    serial = account.granted + 1
    permit = _new_permit(Permit)
    permit.shard_id, permit.bucket, permit.remaining = shard_id, number, remaining
    permit.serial, permit.stamp_us, permit.period = serial, now_us, period
    if account.recent is not None:
        account.recent[serial] = now_us
    # From here on there are only assignments: no interrupt can come between them.
    account.remaining, account.resets_at_us, account.period = left, resets_at_us, period
    account.granted, account.used = serial, used
    bucket.previous_us, bucket.previous_serial = last_us, bucket.serial
    bucket.last_us, bucket.hold_us, bucket.serial = now_us, 0, serial
    return permit


def grant(account: Account, shard_id: int, now_us: int) -> Permit:
    """Grant a permit unconditionally."""
    permit = _new_permit(Permit)
    permit.shard_id, permit.serial, permit.stamp_us = shard_id, account.granted + 1, now_us
    account.granted = permit.serial
    return permit


def _wait_for_read(account: Account, wall_us: int, due: bool, can_refresh: bool) -> Denial | None:
    """Return a denial while permits wait for a read after a reset, else ``None``."""
    patience_us = 0  # no permit waits for a read, except at a reset
    if due and account.resets_at_us is not None:
        patience_us = account.resets_at_us + account.patience_us - wall_us
    if (can_refresh and (due or account.refresh_owed)) or patience_us > 0:
        return Denial(max(0, patience_us), Reason.RESET)
    return None


def _next_period(account: Account, wall_us: int, due: bool) -> tuple[int, int]:
    """Return when the period of a grant ends, and its number. If a reset is due, a new period begins."""
    if account.resets_at_us is not None and not due:
        return account.resets_at_us, account.period
    account.max_reset_us = account.period_us
    if due:
        account.other_reset = None
        if account.recent is not None:  # older permits matter neither to a read nor to a refund
            since_us, account.refresh_owed = wall_us - unseen_us(account), True
            account.recent = {key: at for key, at in account.recent.items() if at >= since_us}
    return wall_us + account.period_us, account.period + due


def _early(account: Account) -> int:
    """Return how many permits of the last period may count in the next one, if it begins without a read.

    The reset may have been a little earlier than the answer said, and Discord counts a permit when it
    is used, not when it is granted.
    """
    if not account.recent or account.resets_at_us is None:
        return 0
    since_us = account.resets_at_us - unseen_us(account)
    return sum(at_us > since_us for at_us in account.recent.values())


def _used_up(account: Account, wait_us: int, wall_us: int, early: int) -> Denial:
    """Return the denial of a used-up limit."""
    resets_in_us = resets_in(account, wall_us)
    if not resets_in_us:  # the reset is due, and too few are left even after it
        resets_in_us = account.max_reset_us = account.period_us
        if early and account.total is not None:  # a period begins, with these used of it
            account.remaining, account.used = max(0, account.total - early), early
            account.period, account.other_reset = account.period + 1, None
            account.refresh_owed = True
    account.resets_at_us = wall_us + resets_in_us  # nearer, if the clock was set back
    return Denial(max(wait_us, resets_in_us), Reason.BUDGET, account.remaining, resets_in_us)


def unseen_us(account: Account) -> int:
    """Return how long a session start may be missing in Discord's answer; less for short periods."""
    return min(UNSEEN_US, account.period_us // 100)


def resets_in(account: Account, wall_us: int) -> int:
    """Return how many microseconds are left until the limit resets, 0 if that is due or unknown."""
    if account.resets_at_us is None:
        return 0
    return min(max(account.resets_at_us - wall_us, 0), account.max_reset_us)


def closed_for_us(account: Account, bucket: TokenBucket, now_us: int) -> int:
    """Return how long the bucket is still closed; if it is open, minus the time since it opened."""
    last_us = min(bucket.last_us, now_us) + bucket.hold_us  # the clock may have been set back
    max_us = _max_closure_us(account, bucket.rejections)
    closed_until_us = min(bucket.closed_until_us, now_us + max_us)
    return max(last_us + account.window_us, closed_until_us) - now_us


def _max_closure_us(account: Account, rejections: int) -> int:
    many = rejections >= MANY_REJECTIONS
    return max(MAX_LONG_CLOSURE_US if many else MAX_CLOSURE_US, 2 * account.window_us)


def bucket_of(account: Account, shard_id: int) -> TokenBucket:
    """Return the bucket of a shard. A permit of that shard may have been granted in another one."""
    number = shard_id % account.max_concurrency
    bucket = account.buckets.get(number)
    if bucket is None:
        bucket = _new_bucket(TokenBucket)
        if account.default_bucket.last_us > NEVER:
            bucket.__dict__.update(vars(account.default_bucket))
        account.buckets[number] = bucket  # last: an interrupt can come after each call
    return bucket


# --- reports --------------------------------------------------------------------------------------


def restamp(account: Account, permit: Permit, now_us: int, hold_us: int = 0) -> bool:
    """Start the window when a permit is handed over: now, or when its hold ends.

    Returns false if its bucket has granted again.
    """
    bucket = account.buckets.get(permit.bucket)
    if bucket is None or bucket.serial != permit.serial:
        return False
    bucket.hold_us = hold_us
    bucket.last_us = permit.stamp_us = max(bucket.last_us, now_us)
    return True


def sent(account: Account, permit: Permit, now_us: int) -> None:
    """Start the window now, because the IDENTIFY was sent only now. This ends a hold."""
    bucket = bucket_of(account, permit.shard_id)
    bucket.last_us = max(bucket.last_us, now_us)
    if bucket.serial == permit.serial:
        bucket.hold_us = 0
    else:
        bucket.previous_us = bucket.last_us  # in case the later grant is undone


def unused(account: Account, permit: Permit) -> None:
    """Undo a grant, once: refund it to its period, and open its bucket if that has not granted since."""
    if permit.returned:
        return
    bucket = bucket_of(account, permit.shard_id)
    last_us, hold_us, serial = bucket.last_us, bucket.hold_us, bucket.serial
    if serial == permit.serial:
        last_us, hold_us, serial = bucket.previous_us, 0, bucket.previous_serial
    remaining, used, recent = account.remaining, account.used, account.recent
    if account.total is not None and account.period == permit.period:
        used = max(0, used - 1)
        if recent is None or permit.serial in recent:  # else a read since did not count it
            remaining = min(remaining + 1, account.total)
    # From here on there are only assignments: no interrupt can come between them.
    permit.returned = True
    account.remaining, account.used = remaining, used
    bucket.last_us, bucket.hold_us, bucket.serial = last_us, hold_us, serial
    if recent is not None:
        recent.pop(permit.serial, None)


def rejected(account: Account, permit: Permit, now_us: int) -> int:
    """Close the bucket for 2 windows, doubled by each further rejection in a row. Return their number.

    The maximum is a minute, from the tenth on 15 minutes, because 16 buckets that are rejected once a
    minute would use up a day's limit in an hour. A permit that is not rejected before its bucket's next
    grant ends the series. One that is reported after a later one of its bucket is not counted (0),
    because a ledger cannot tell it from one that is reported again; it closes the bucket for 2 windows.
    """
    bucket = bucket_of(account, permit.shard_id)
    if permit.serial < bucket.rejected_serial:
        closed_until_us = now_us + 2 * account.window_us
        bucket.closed_until_us = max(bucket.closed_until_us, closed_until_us)
        return 0
    if permit.serial == bucket.rejected_serial:
        return bucket.rejections  # repeated, after an interrupt
    goes_on = bucket.rejected_serial in (bucket.serial, bucket.previous_serial)
    rejections = min(bucket.rejections + 1, MAX_REJECTIONS) if goes_on else 1
    closed_us = min(account.window_us << rejections, _max_closure_us(account, rejections))
    closed_until_us = max(bucket.closed_until_us, now_us + closed_us)
    # From here on there are only assignments: no interrupt can come between them.
    bucket.rejections, bucket.rejected_serial = rejections, permit.serial
    bucket.closed_until_us = closed_until_us
    return rejections
