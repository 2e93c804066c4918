"""The session start limit of a shared account: how it begins, changes and is read."""

from __future__ import annotations

from dataclasses import replace

from gateway_queue_sync import limits as session_limits
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.messages import Introduction, Limit, Request
from gateway_queue_sync.ledgers.shared.rows import MAX_PERIODS_BACK, READ_CLAIM_US, Rows
from gateway_queue_sync.ledgers.shared.store import SharedAccount
from gateway_queue_sync.limits import CONFIRM_US
from gateway_queue_sync.models import US_PER_SECOND, SessionStartLimit
from gateway_queue_sync.token_bucket import UNSEEN_US, TokenBucket, unseen_us

FRESH_READ_US = 60 * US_PER_SECOND  # a process that starts uses a read of this age
FORGOTTEN_US = 60 * US_PER_SECOND  # in which a process that can read a forgotten limit has to do so
FOREVER_US = 1 << 60
DISCORDS_DEFAULT = SessionStartLimit(total=1000, remaining=1000, reset_after=0.0, max_concurrency=1)


def create(rows: Rows, new: Introduction) -> None:
    """Create the account. Its buckets are closed, because earlier grants are unknown."""
    request, given = rows.request, new.limit or new.seen
    closed = TokenBucket(last_us=rows.now_us)
    account = SharedAccount(1, request.period_us, default_bucket=closed, recent={})
    account.granted, account.layout = new.granted, new.layout + 1
    account.period = max(new.period + MAX_PERIODS_BACK, rows.wall_us)  # as after a loss
    rows.account, rows.divided = account, True
    if given is not None:
        session_limits.adopt(account, _as_now(rows.request, given), rows.wall_us)
    elif not request.can_read:
        session_limits.adopt(account, DISCORDS_DEFAULT, rows.wall_us)
    account.refresh_owed = new.limit is None
    if new.limit is not None and request.can_read:
        account.read_us = rows.now_us
        account.read_due_us = rows.now_us + (request.reread_us or FOREVER_US)


def recover(rows: Rows, new: Introduction) -> None:
    """Repair an account that has lost grants, with what this process knows of it."""
    account = rows.kept
    account.layout = max(account.layout, new.layout + 1)
    account.granted = new.granted
    if new.seen is not None:
        open_with(rows, new.seen)
    account.refresh_owed = True


def change(rows: Rows, limit: Limit) -> tuple[int, int]:
    """Apply a limit that was passed or read. Return the reply's ``limit_result`` and ``uncounted``."""
    account, given = rows.kept, _as_now(rows.request, limit)
    uncounted = -1
    if limit.kind == messages.FORGET:
        _forget(account, rows.wall_us)
        return messages.APPLIED, uncounted
    if limit.kind != messages.UPDATE:
        account.reader = "" if account.reader == rows.request.session else account.reader
        is_late = rows.request.sent_us - limit.asked_us > UNSEEN_US  # grants since may be deleted
        before_reset = limit.reset_after_us > 0 and not given.reset_after
        if before_reset or (is_late and account.total is not None):
            return messages.NOT_APPLIED, uncounted
    if limit.max_concurrency != account.max_concurrency:
        rows.divide(limit.max_concurrency)
    if limit.kind == messages.UPDATE:
        session_limits.adopt(account, given, rows.wall_us)
    else:
        account.recent = recent(rows)
        asked_us = rows.wall_us - (rows.request.sent_us - limit.asked_us)
        settled = session_limits.read(account, given, asked_us, rows.wall_us)
        rows.store.drop_recent_before(asked_us - unseen_us(account))
        if rows.request.can_read or account.has_reader:  # else nobody reads at a reset
            account.read_us = rows.now_us
        again_us = (rows.request.reread_us or FOREVER_US) if settled else CONFIRM_US
        account.read_due_us = rows.now_us + again_us
        theirs = limit.remaining - len(account.recent)
        uncounted = theirs if theirs > account.remaining else -1
    return messages.APPLIED, uncounted


def _forget(account: SharedAccount, wall_us: int) -> None:
    """Delete the limit and the bot. If it was read before, processes have a minute to read it."""
    _adopt_default(account, wall_us)
    account.bot = ""
    if account.has_reader:
        account.total, account.remaining, account.refresh_owed = None, 0, True
        account.resets_at_us = wall_us + FORGOTTEN_US


def replace_forgotten(rows: Rows) -> None:
    """Let Discord's default count if nobody has read a limit that was forgotten.

    A process that can read it waits for its own read.
    """
    account, until_us = rows.kept, rows.kept.resets_at_us
    is_forgotten = account.total is None and until_us is not None and rows.wall_us >= until_us
    if is_forgotten and not rows.request.can_read:
        _adopt_default(account, rows.wall_us)
        account.opened_us = rows.now_us + rows.notice_us


def _adopt_default(account: SharedAccount, wall_us: int) -> None:
    default = replace(DISCORDS_DEFAULT, max_concurrency=account.max_concurrency)
    session_limits.adopt(account, default, wall_us)


def open_with(rows: Rows, limit: Limit) -> None:
    """Apply the limit that a process begins with. In a running period it refills nothing."""
    account, given = rows.kept, _as_now(rows.request, limit)
    left = session_limits.budget(account, rows.wall_us)
    period, owed = account.period, account.refresh_owed
    if given.max_concurrency != account.max_concurrency:
        rows.divide(given.max_concurrency)
    runs = left is not None and left.resets_in_us > 0
    if left is not None and runs:
        resets_in = left.resets_in_us / US_PER_SECOND
        if given.remaining >= left.remaining:
            remaining, reset_after = min(left.remaining, given.total), resets_in
        else:
            remaining, reset_after = given.remaining, max(given.reset_after, resets_in)
        given = replace(given, remaining=remaining, reset_after=reset_after)
    used = account.used
    session_limits.adopt(account, given, rows.wall_us)
    if runs:
        account.period, account.refresh_owed, account.used = period, owed, used


def reads(rows: Rows, *, reset_denied: bool) -> int:
    """Return whether this process should read the limit now, for all."""
    account, request, now_us = rows.kept, rows.request, rows.now_us
    own = account.reader == request.session
    if not request.can_read:
        account.reader = "" if own else account.reader
        return 0
    uses = any(line.waiters for line in request.lines)
    due = account.total is None or account.refresh_owed or reset_denied
    due = due or (uses and now_us >= account.read_due_us)
    if request.introduction is not None:
        due = due or now_us >= account.read_us + FRESH_READ_US
    claimed = bool(account.reader) and now_us < account.reader_until_us
    if not due or (claimed and not own):
        return 0
    if not claimed:
        account.reader, account.reader_until_us = request.session, now_us + READ_CLAIM_US
    return 1


def recent(rows: Rows) -> dict[int, int]:
    """Return when the latest permits were granted, but not later than now."""
    recent = rows.store.recent()
    for serial, wall_us in recent.items():
        if wall_us > rows.wall_us:  # the clock was set back since
            recent[serial] = rows.wall_us
            rows.store.put_recent(serial, rows.wall_us)
    return recent


def _as_now(request: Request, limit: Limit) -> SessionStartLimit:
    """Return a limit with ``reset_after`` as of now."""
    reset_us = limit.reset_after_us - (request.sent_us - limit.at_us)
    reset_us = min(max(0, reset_us), limit.reset_after_us)
    return SessionStartLimit(
        limit.total, limit.remaining, reset_us / US_PER_SECOND, limit.max_concurrency
    )
