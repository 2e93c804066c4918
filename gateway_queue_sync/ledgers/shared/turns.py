"""The rules of a shared ledger, as one pure function: ``answer``.

``token_bucket.py`` decides whether a bucket may grant; this module decides to which process, and applies
each request exactly once. No thread, clock or I/O: the time is an argument, and the state is in the rows
of a ``Store``. A ledger calls ``answer`` in one atomic step; if it raises, nothing is stored.
``PROTOCOL.md`` describes the rules. ``answer.lua`` has those for frequent requests a second time.

Turns: the heads of all sessions for a bucket stand in one line, ordered by position. A head has *rank* r
if r heads of other sessions come before it. It may take a permit r *graces* after the bucket has opened.
So a dead session delays those behind it by one grace, once: a head that is passed over leaves the line
until its session asks again. If a bucket opens earlier than its head expects, graces count from when
the head has had time to ask.

Invariants:

- ``answer``: a request takes effect once, even if copies of it arrive later or in another order.
- ``Rows.lose``: after requests were lost, no permit is granted for one window.
- ``_report``: a permit is refunded at most once. A permit from before a loss is not refunded, because
  its serial may have been given to another one.
- ``_replace_line``: the stored lines of a session are those of its latest request.
- ``_ask``: one permit per window and bucket, within the limit, in order.
"""

from __future__ import annotations

import json

from gateway_queue_sync import limits as session_limits
from gateway_queue_sync import token_bucket
from gateway_queue_sync.ledgers.shared import limits, messages
from gateway_queue_sync.ledgers.shared.bounds import refusal
from gateway_queue_sync.ledgers.shared.messages import (
    Granted,
    Introduction,
    Line,
    Look,
    Ready,
    Rejections,
    Reply,
    Report,
    Request,
    Wait,
    Waiter,
    from_wire,
    to_wire,
)
from gateway_queue_sync.ledgers.shared.rows import DIFFERS_US, MAX_PERIODS_BACK, Rows
from gateway_queue_sync.ledgers.shared.store import (
    SILENT_US,
    LineRow,
    SessionRow,
    SharedAccount,
    SharedBucket,
    Store,
)
from gateway_queue_sync.models import US_PER_SECOND, Permit
from gateway_queue_sync.token_bucket import NEVER, UNSEEN_US, Denial, Reason

MAX_GRACE_US = US_PER_SECOND // 10
PATIENCE_US = 5 * US_PER_SECOND  # how long permits wait for a read after a reset
READ_AGAIN_US = US_PER_SECOND // 2  # after which a head asks again whether the limit was read
RECENT_US = 2 * UNSEEN_US  # how long recent permits are stored
UNKNOWN_AGE_US = 3_600 * US_PER_SECOND  # of a stored reply, if the clock was set back since


def answer(
    store: Store, request: Request, now_us: int, wall_us: int, *, lost: bool = False
) -> Reply:
    """Apply a request if it is the next of its session, and return the reply.

    ``lost``: the storage was replaced by another or an older one, or was restarted. A request without a
    session does not store that, as it only reads.
    """
    step = _Step(store, request, now_us, wall_us)
    account = step.rows.account
    error = refusal(request) or step.other_bot()
    if error:
        return step.reply(messages.REFUSED, error)
    if lost and account is not None and request.session:
        step.lost = 1
        step.rows.lose()
        account.refresh_owed = True
        step.rows.save()
    if account is not None and not request.session:
        return step.with_look(step.reply(messages.OK))
    introduces, row = request.introduction is not None, step.session_row()
    if row is not None and row.number == request.number:
        return step.with_look(step.replay(row))
    if introduces and row is None and request.session:
        return step.apply()
    if not introduces and row is not None:
        if request.number == row.number + 1:
            return step.apply()
        if request.number > row.number:
            step.lost = 1
            step.rows.lose()
            store.drop_session(request.session)
            step.rows.save()
    return step.reply(messages.INTRODUCE)


def look(store: Store, request: Request, now_us: int, wall_us: int) -> Look:
    """Return who waits in other sessions, and when buckets open. There must be an account."""
    return _Step(store, request, now_us, wall_us).look()


class _Step:
    """One request while it is being applied."""

    def __init__(self, store: Store, request: Request, now_us: int, wall_us: int) -> None:
        self.store, self.request, self.now_us, self.wall_us = store, request, now_us, wall_us
        self.shift_us = now_us - request.sent_us  # from the process's clock to the ledger's
        self.lost = self.limit_result = 0
        self.uncounted = -1
        self.reset_denied = False
        self.rejections: list[Rejections] = []
        self.permits: list[Granted] = []
        self.waits: list[Wait] = []
        self.rows = Rows(store, request, now_us, wall_us)

    # --- the whole request ------------------------------------------------------------------------

    def session_row(self) -> SessionRow | None:
        """Return the session of the request, if it is known and not silent."""
        row = None if self.rows.account is None else self.store.session(self.request.session)
        is_silent = row is not None and self.now_us - row.last_request_us > SILENT_US
        return None if is_silent else row

    def other_bot(self) -> str:
        """Return why the bot of this process may not use the account; empty if it may."""
        introduction, account = self.request.introduction, self.rows.account
        if introduction is None or account is None or introduction.bot in ("", account.bot):
            return ""
        if not account.bot:
            return ""
        return (
            f"the account belongs to bot {account.bot}, not {introduction.bot}: each needs an account "
            "of its own (`limit --forget` frees this one)"
        )

    def apply(self) -> Reply:
        """Apply the request."""
        request = self.request
        if request.introduction is not None:
            self._introduce(request.introduction)
        self._settings()
        self._reports()
        if request.layout == self.rows.kept.layout:
            for line in request.lines:
                self._replace_line(line)
        read = limits.reads(self.rows, reset_denied=self.reset_denied)
        reply = self.reply(messages.OK, read=read)
        written = json.dumps(to_wire(reply), separators=(",", ":"))
        self.store.put_session(SessionRow(request.session, request.number, self.now_us, written))
        self.rows.save()
        return self.with_look(reply)

    def replay(self, row: SessionRow) -> Reply:
        """Return the stored reply, with ages as of now. Nothing changes."""
        reply = from_wire(Reply, json.loads(row.reply))
        since_us = self.now_us - reply.now_us
        if since_us < 0:  # the ledger's clock was set back
            since_us = UNKNOWN_AGE_US
        return reply._replace(
            attempt=self.request.attempt,
            now_us=self.now_us,
            permits=tuple(one._replace(age_us=one.age_us + since_us) for one in reply.permits),
            waits=tuple(
                one._replace(wait_us=max(0, one.wait_us - since_us)) for one in reply.waits
            ),
        )

    def with_look(self, reply: Reply) -> Reply:
        """Add a look if the request asked for it. Call it last: rows that it reads are not saved."""
        return reply._replace(look=self.look()) if self.request.look else reply

    def reply(self, status: int, error: str = "", *, read: int = 0) -> Reply:
        """Return the reply as of now."""
        account = self.rows.account or SharedAccount(0, 0)
        left = session_limits.budget(account, self.wall_us)
        return Reply(
            self.request.attempt,
            self.request.number,
            status,
            error,
            self.lost,
            self.now_us,
            account.granted,
            account.period,
            account.layout,
            -1 if left is None else left.total,
            0 if left is None else left.remaining,
            0 if left is None else left.resets_in_us,
            account.max_concurrency,
            account.interval_us,
            account.margin_us,
            int(self.now_us < account.differs_until_us),
            read,
            self.limit_result,
            self.uncounted,
            tuple(self.rejections),
            tuple(self.permits),
            tuple(self.waits),
        )

    def look(self) -> Look:
        """Return who waits in other sessions, and when buckets open."""
        account, now_us = self.rows.kept, self.now_us
        self.rows.load_all()
        ready = tuple(
            Ready(number, max(0, self.rows.due_us(self.rows.bucket(number)) - now_us))
            for number in sorted(account.buckets)
        )
        others_us = token_bucket.closed_for_us(account, account.default_bucket, now_us)
        lines = tuple(
            Line(number, row.waiting - len(first), first)
            for number in sorted(account.buckets)
            for row in sorted(self.rows.bucket(number).lines)
            if row.session != self.request.session
            for first in (row.waiters,)
        )
        others_us = max(0, others_us, account.settle_until_us - now_us)
        return Look(ready, others_us, lines, account.reserve, account.period_us)

    # --- sessions ---------------------------------------------------------------------------------

    def _introduce(self, new: Introduction) -> None:
        """Begin a session. A ledger without an account, or with an older one, uses what it says."""
        if self.rows.account is None:
            limits.create(self.rows, new)
            self.lost = 1
        else:
            # A process that has not seen more grants than the ledger may know less of the limit.
            if new.granted > self.rows.account.granted:
                self.rows.lose(new.period)
                limits.recover(self.rows, new)
                self.lost = 1
            if new.limit is not None:
                limits.open_with(self.rows, new.limit)
        account = self.rows.kept
        account.bot = account.bot or new.bot
        if new.replaces and self.store.session(new.replaces) is not None:
            self.store.drop_session(new.replaces)
            self.rows.load_all()
            for bucket in account.buckets:
                self._put_line(self.rows.bucket(bucket), new.replaces, None)

    def _settings(self) -> None:
        """Use the largest interval and the largest margin of all live processes."""
        account, request, now_us = self.rows.kept, self.request, self.now_us
        until_us = now_us + request.lease_us + request.interval_us + request.margin_us
        if request.interval_us >= account.interval_us or now_us >= account.interval_until_us:
            account.interval_us, account.interval_until_us = request.interval_us, until_us
        if request.margin_us >= account.margin_us or now_us >= account.margin_until_us:
            account.margin_us, account.margin_until_us = request.margin_us, until_us
        if (account.interval_us, account.margin_us) != (request.interval_us, request.margin_us):
            account.differs_until_us = now_us + DIFFERS_US
        window_us, account.window_us = account.window_us, account.interval_us + account.margin_us
        if account.window_us < window_us:  # buckets open earlier than the heads expect
            account.opened_us = now_us + self.rows.notice_us
        account.period_us = request.period_us

    # --- reports and limits -----------------------------------------------------------------------

    def _reports(self) -> None:
        """Apply reports and a limit."""
        request, left = self.request, self._left()
        for report in request.reports:
            self._report(report)
        if request.limit is not None:
            self.limit_result, self.uncounted = limits.change(self.rows, request.limit)
        if left <= request.reserve < self._left():
            self.rows.kept.opened_us = self.now_us + self.rows.notice_us

    def _left(self) -> int:
        """Return how many session starts are left; -1 while heads wait for the limit."""
        resets_at_us = self.rows.kept.resets_at_us
        if resets_at_us is not None and self.wall_us >= resets_at_us:
            return -1
        return self.rows.left()

    def _report(self, report: Report) -> None:
        account = self.rows.kept
        bucket = self.rows.bucket(report.shard_id % account.max_concurrency)
        due_us = self.rows.due_us(bucket)
        permit = Permit(report.shard_id, report.shard_id % account.max_concurrency)
        permit.serial, permit.period = report.serial, report.period
        at_us = min(self.now_us, report.at_us + self.shift_us)
        is_after_loss = 0 <= account.period - report.period < MAX_PERIODS_BACK
        if report.kind == messages.UNUSED:
            if is_after_loss:
                self._refund(permit)
        else:
            if not is_after_loss:  # the bucket's latest permit may have the same serial
                permit.serial = -1
            token_bucket.sent(account, permit, at_us)
            permit.serial = report.serial
        if report.kind == messages.REJECTED:
            is_new = report.serial > bucket.rejected_serial
            in_a_row = token_bucket.rejected(account, permit, at_us)
            if is_new:
                self.rejections.append(Rejections(report.serial, in_a_row))
        if self.now_us < due_us > self.rows.due_us(bucket):
            bucket.opened_us = min(due_us, self.now_us + self.rows.notice_us)

    def _refund(self, permit: Permit) -> None:
        """Undo a grant. If a later read did not count this permit, ``remaining`` does not change."""
        account = self.rows.kept
        recent, is_recent = account.recent, self.store.drop_recent(permit.serial)
        # ``token_bucket.unused`` does not change ``remaining`` if the permit is missing in ``recent``.
        account.recent = None if is_recent or not account.has_reader else {}
        token_bucket.unused(account, permit)
        account.recent = recent

    # --- turns ------------------------------------------------------------------------------------

    def _replace_line(self, line: Line) -> None:
        """Replace a session's line, and answer its head."""
        request, buckets = self.request, self.rows.kept.max_concurrency
        if any(one.shard_id % buckets != line.bucket for one in line.waiters):
            return
        bucket = self.rows.bucket(line.bucket)
        own = [row for row in bucket.lines if row.session == request.session]
        stored = {one.number: one for row in own for one in row.waiters}
        waiters = [self._by_ledger_clock(one, stored.get(one.number)) for one in line.waiters]
        wait = None
        while waiters:
            answered = self._ask(line.bucket, waiters[0])
            if isinstance(answered, Granted):
                self.permits.append(answered)
            else:
                wait = answered
                if not waiters[0].once:
                    break
            del waiters[0]
        until_us = self.now_us + request.lease_us
        new = LineRow.of(request.session, until_us, line.more, waiters) if waiters else None
        self._put_line(bucket, request.session, new)
        if wait is not None:
            self.waits.append(wait._replace(waiting=bucket.waiting()))

    def _put_line(self, bucket: SharedBucket, session: str, row: LineRow | None) -> None:
        """Replace a session's line."""
        others = tuple(one for one in bucket.lines if one.session != session)
        bucket.lines = others if row is None else (*others, row)

    def _by_ledger_clock(self, waiter: Waiter, stored: Waiter | None) -> Waiter:
        """Return a waiter with times by the ledger's clock; its position never becomes worse."""
        arrived_us, position_us = (
            waiter.arrived_us + self.shift_us,
            waiter.position_us + self.shift_us,
        )
        if stored is not None:
            arrived_us = min(arrived_us, stored.arrived_us)
            position_us = min(position_us, stored.position_us)
        return waiter._replace(arrived_us=arrived_us, position_us=position_us)

    def _ask(self, number: int, head: Waiter) -> Granted | Wait:
        """Grant a permit to the head of a line if it is its turn, or say how long to wait."""
        limits.replace_forgotten(self.rows)
        account, request, now_us, wall_us = self.rows.kept, self.request, self.now_us, self.wall_us
        bucket, resets_at_us = self.rows.bucket(number), account.resets_at_us
        position = head.position_us, request.session
        ahead = [
            row
            for row in bucket.lines
            if row.until_us > now_us and (row.position_us, row.session) < position
            if row.session != request.session
        ]
        graces_us = len(ahead) * min(MAX_GRACE_US, account.window_us // 5)
        due_us = self.rows.due_us(bucket)
        turn_us = self._turn_us(bucket, head, due_us, graces_us) if ahead else due_us
        if account.total is None:
            return self._wait(number, READ_AGAIN_US, messages.RESET)
        waited_us = PATIENCE_US if resets_at_us is None else wall_us - resets_at_us
        reset_us, account.reserve = self._reset_us(), request.reserve
        if reset_us > NEVER and account.has_reader:
            account.recent = self.store.recent()
        answered = token_bucket.take(
            account,
            head.shard_id,
            now_us,
            wall_us,
            self._can_read() and 0 <= waited_us < PATIENCE_US,
            turn_us,
        )
        account.recent = {}
        if isinstance(answered, Denial):
            if answered.reason is Reason.WINDOW:
                wait_us = due_us + graces_us - now_us
                if wait_us <= 0:  # it opened early: ask again when another window may be over
                    wait_us = min(answered.wait_us, account.window_us)
                return self._wait(number, wait_us, messages.WINDOW)
            if answered.reason is Reason.BUDGET:
                return self._wait(number, answered.wait_us + graces_us, messages.BUDGET)
            wait_us = min(READ_AGAIN_US, PATIENCE_US - waited_us) + graces_us
            return self._wait(number, wait_us, messages.RESET)
        if resets_at_us is not None and account.resets_at_us != resets_at_us:
            account.opened_us = max(account.opened_us, reset_us)
        bucket.hold_us = head.hold_us
        account.held_us = max(account.held_us, head.hold_us)
        for row in ahead:
            self._put_line(bucket, row.session, row._replace(until_us=now_us))
        self.store.put_recent(answered.serial, wall_us)
        self.store.drop_recent_before(wall_us - RECENT_US)
        remaining = -1 if answered.remaining is None else answered.remaining
        return Granted(
            head.number, answered.serial, number, head.shard_id, answered.period, remaining, 0
        )

    def _turn_us(self, bucket: SharedBucket, head: Waiter, due_us: int, graces_us: int) -> int:
        """Return from when a head that has others ahead of it may take a permit."""
        opened_us = max(due_us, self.rows.kept.opened_us, bucket.opened_us, self._reset_us())
        return max(opened_us + graces_us, self.now_us + head.once)

    def _can_read(self) -> bool:
        """Return whether this process can read the limit, or another one probably can."""
        return bool(self.request.can_read) or self.rows.kept.has_reader

    def _reset_us(self) -> int:
        """Return since when heads may take permits after a due reset; ``NEVER`` if none is due."""
        resets_at_us = self.rows.kept.resets_at_us
        if resets_at_us is None or self.wall_us < resets_at_us:
            return NEVER
        since_us = self.wall_us - resets_at_us
        if since_us >= PATIENCE_US and self._can_read():  # the time to wait for a read is over
            since_us -= PATIENCE_US
        return self.now_us - since_us

    def _wait(self, number: int, wait_us: int, reason: int) -> Wait:
        self.reset_denied = self.reset_denied or reason == messages.RESET
        # The wait is divided into equal parts, so that the last one is not shorter than a round trip.
        parts = -(-wait_us // self.rows.notice_us)
        wait_us = max(1, -(-wait_us // max(1, parts)))
        opens_us = max(0, self.rows.due_us(self.rows.bucket(number)) - self.now_us)
        return Wait(number, wait_us, opens_us, reason, 0)
