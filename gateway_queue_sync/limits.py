"""The session start limit of an account: what is left, and how a limit that was read changes it.

Pure arithmetic. Discord's answer may lag, other programs may start sessions with the same token, and a
proxy may answer for Discord. So the smaller number counts: what this account says is left, or what was
read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gateway_queue_sync.models import US_PER_SECOND, SessionStartLimit, to_us
from gateway_queue_sync.token_bucket import Account, TokenBucket, resets_in, unseen_us

MIN_REREAD_US = 1 * US_PER_SECOND

SAME_RESET_US = 300 * US_PER_SECOND
"""Two resets that are at most so far apart count as the same."""

CONFIRM_US = 60 * US_PER_SECOND
"""How much later a second read must confirm a reset that differs."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What is left of the limit. A reset that is due counts as done."""

    total: int
    remaining: int
    resets_in_us: int


def budget(account: Account, wall_us: int) -> Budget | None:
    """Return what is left now, ``None`` if the account has no limit."""
    if account.total is None:
        return None
    resets_in_us = resets_in(account, wall_us)
    due = account.resets_at_us is not None and resets_in_us == 0
    return Budget(account.total, account.total if due else account.remaining, resets_in_us)


def adopt(account: Account, limit: SessionStartLimit, wall_us: int) -> None:
    """Replace the limit. A new period begins, of which this account has used nothing."""
    reset_us = to_us(limit.reset_after)
    untouched = limit.remaining == limit.total and reset_us == 0
    resets_at_us = None if untouched else wall_us + reset_us
    rebucket(account, limit.max_concurrency)
    # From here on there are only assignments: no interrupt can come between them.
    account.total, account.remaining = limit.total, limit.remaining
    account.resets_at_us, account.max_reset_us = resets_at_us, reset_us
    account.period += 1
    account.used, account.other_reset, account.refresh_owed = 0, None, False


def rebucket(account: Account, max_concurrency: int) -> None:
    """Replace the buckets, if their number differs. Each new one starts from the latest grant of all.

    Each new one also continues the longest series of rejections.
    """
    if max_concurrency == account.max_concurrency:
        return
    known = [account.default_bucket, *account.buckets.values()]
    series = [
        bucket.rejections
        for bucket in known
        if bucket.rejected_serial in (bucket.serial, bucket.previous_serial)
    ]
    last_us = max(bucket.last_us for bucket in known)
    default = TokenBucket(
        last_us,
        max(bucket.last_us + bucket.hold_us for bucket in known) - last_us,
        closed_until_us=max(bucket.closed_until_us for bucket in known),
        rejections=max(series, default=0),
        rejected_serial=0 if series else -1,  # 0 is the serial of a bucket that has not granted
    )
    buckets: dict[int, TokenBucket] = {}
    account.buckets, account.default_bucket = buckets, default
    account.max_concurrency = max_concurrency


def read(account: Account, limit: SessionStartLimit, sent_us: int, now_us: int) -> bool:
    """Take in a limit that was read: the request was sent at ``sent_us`` and answered at ``now_us``.

    What is left is the smaller of two numbers: ``total`` less all permits that this account has granted
    in the period, and ``remaining`` less those that it granted less than a minute before the request,
    because Discord may not have counted these yet. So each permit counts, and so do the session starts
    of other programs.

    The known reset and the one that was read count as the same if they are at most 5 minutes apart; the
    later one is stored. A reset that differs by more counts only if a second read, a minute later or
    more, shows it again. Until then the smaller numbers count. Otherwise a bot that crashes in a loop
    would get session starts from an answer that lags.

    Returns false if the limit should be read again in a minute: to confirm a reset, or because permits
    were granted so shortly before the read that it does not show how many are left.
    """
    since_us = sent_us - unseen_us(account)
    recent = {
        serial: at_us for serial, at_us in (account.recent or {}).items() if at_us >= since_us
    }
    account.recent = recent
    known_us = account.resets_at_us
    resets_at_us = now_us + to_us(limit.reset_after)
    if known_us is not None and now_us >= known_us:
        return _begin_period(account, limit, 0, now_us)
    # A period began without a read, or no limit is known. An answer without a reset is from before the
    # period if permits of it were used.
    if account.refresh_owed and not (account.used and limit.reset_after == 0):
        return _begin_period(account, limit, account.used, now_us)
    if known_us is not None and abs(resets_at_us - known_us) <= SAME_RESET_US:
        account.other_reset = None
        if resets_at_us > known_us:  # Discord's period begins with a use, ours with a grant
            account.resets_at_us = resets_at_us
            account.max_reset_us = max(account.max_reset_us, to_us(limit.reset_after))
        own, theirs = limit.total - account.used, limit.remaining - len(recent)
        _take_in(account, limit, limit.total, max(0, min(own, theirs)))
        return not recent or own <= theirs  # else some may count twice: read again soon
    other = account.other_reset
    if known_us is not None and (other is None or abs(resets_at_us - other[0]) > SAME_RESET_US):
        account.other_reset = other = (resets_at_us, now_us)
    if known_us is None or (other is not None and now_us - other[1] >= CONFIRM_US):
        return _begin_period(account, limit, len(recent), now_us)
    total = limit.total if account.total is None else min(limit.total, account.total)
    left = min(total - account.used, limit.remaining - len(recent), account.remaining)
    _take_in(account, limit, total, max(0, left))
    return False


def ignored(account: Account, limit: SessionStartLimit) -> int:
    """Return how many more session starts a read says are left than the account does."""
    return max(0, limit.remaining - len(account.recent or ()) - account.remaining)


def _begin_period(account: Account, limit: SessionStartLimit, used: int, now_us: int) -> bool:
    """Begin the period that was read. This account has ``used`` so many session starts of it."""
    recent = len(account.recent or ())
    left = max(0, min(limit.total - used, limit.remaining - recent))
    if limit.reset_after == 0 and limit.remaining < limit.total:  # an answer from before the reset
        adopt(account, less_starts(limit, limit.remaining), now_us)
        return False
    if limit.reset_after == 0:  # no period runs, or Discord does not show yet what has begun it
        adopt(account, limit, now_us)
    else:
        adopt(account, less_starts(limit, limit.remaining - left), now_us)
    account.remaining, account.used = left, used
    return left == limit.remaining or limit.reset_after > 0


def _take_in(account: Account, limit: SessionStartLimit, total: int, remaining: int) -> None:
    rebucket(account, limit.max_concurrency)
    account.total, account.remaining = total, remaining


def less_starts(limit: SessionStartLimit, starts: int) -> SessionStartLimit:
    """Return a limit with so many starts fewer, and a ``reset_after`` of at least a second."""
    if starts > 0:
        limit = replace(limit, remaining=max(0, limit.remaining - starts))
    if limit.remaining < limit.total:
        limit = replace(limit, reset_after=max(limit.reset_after, MIN_REREAD_US / US_PER_SECOND))
    return limit
