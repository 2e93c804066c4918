"""One process's side of a shared ledger: what to send when, and what a reply means.

A state machine without thread, lock, clock or I/O. The scheduler's ledger calls a method for each
change, gets the next request from ``compose``, sends it, and passes in the reply (``answered``) or the
failure (``failed``).

Invariants:

- One request is in flight. Until it is answered it is sent again with the same content, so the ledger
  applies it once; a reply to any other attempt than the latest is dropped.
- A permit is handed over only while it is younger than the margin. Its age is counted from when the
  attempt was sent. An older one is given back, and its waiter keeps its position.
- The ledger has the same lines as the process. A new head is sent at once, other changes with it.
- After an introduction that the ledger asked for, only changes that may be applied twice are repeated.
"""

from __future__ import annotations

import heapq
import random
import secrets
from collections import deque
from collections.abc import Callable

from gateway_queue_sync import forecast, models
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.answers import (
    Answers,
    LimitChange,
    SessionSettings,
    WaitingLines,
    Waits,
)
from gateway_queue_sync.ledgers.shared.backend import Busy
from gateway_queue_sync.ledgers.shared.messages import (
    Introduction,
    Limit,
    Line,
    Reply,
    Report,
    Request,
    Wait,
    Waiter,
)
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.models import US_PER_SECOND, Permit, SessionStartLimit, to_us
from gateway_queue_sync.token_bucket import Denial, Reason

FOREVER_US = 1 << 62
MAX_COUNT_AGE_US = 100_000  # after the latest request, until changed counts are sent
FIRST_PAUSE_US = 50_000  # before a failed request is sent again; doubled each time
BUSY_PAUSE_US = 5_000  # the same, if another process has locked the ledger
MAX_PAUSE_US = 2 * US_PER_SECOND
MAX_WAIT_US = messages.MAX_AGE_US - 86_400 * US_PER_SECOND  # minus a day in which it is sent again
FORGOTTEN_US = 50 * US_PER_SECOND  # a ledger removes sessions that are silent for 60 s
MAX_RAISED_MARGIN_US = 2 * US_PER_SECOND
MANY_LATE = 3  # replies with permits, in a row
MANY_TRIPS = 20  # round trips, after which a raised margin may be lowered
MANY_SLOW = 3  # round trips in a row
LATE_PAUSE_US = 30 * US_PER_SECOND
KINDS = {models.Report.SENT: 0, models.Report.UNUSED: 1, models.Report.REJECTED: 2}
REASONS = (Reason.WINDOW, Reason.BUDGET, Reason.RESET)
UNKNOWN_FATE = "the limit may or may not have been applied"


class Session:
    """One process's conversation with a shared ledger.

    Attributes:
        margin_us: how old a permit may be when it reaches its caller.
        max_concurrency, granted, period: the account's, as the latest reply says.
        window_us: the time between two permits of a bucket.
        budget: what was left at ``budget_us``; ``None`` while the ledger has no limit.
        failure: why the latest attempt failed; ``None`` if it succeeded.
    """

    def __init__(
        self,
        settings: SessionSettings,
        *,
        new_id: Callable[[], str] = lambda: secrets.token_hex(8),
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._settings, self._new_id, self._uniform = settings, new_id, uniform
        self.margin_us = settings.margin_us
        self.window_us = settings.interval_us + settings.margin_us
        self.max_concurrency = 1 if settings.limit is None else settings.limit.max_concurrency
        self.granted = self.period = self.budget_us = 0
        self.budget: Budget | None = None
        self.failure: Exception | None = None
        self._layout = self._attempt = self._slow = 0
        self._late = self._trips = self._longest_trip_us = 0
        self._differs = self._lacks_limit = False
        self._begin()

    def _begin(self) -> None:
        self._id, self._replaces = "", ""
        self._opens = self._settings.limit is not None
        self._in_flight: Request | None = None
        self._failures = 0
        self._retry_us = self._paused_until_us = self._answered_us = -FOREVER_US
        self._sent_us = -FOREVER_US
        self._paused = False
        self._reports: deque[Report] = deque()
        self._changes: deque[LimitChange] = deque()
        self._looks = False
        self._start_anew()

    def reinit(self) -> None:
        """Begin anew in a forked child, which has no waiters."""
        self._begin()

    def _start_anew(self) -> None:
        """Choose a new id, and introduce it with the next request."""
        self._id, self._replaces = self._new_id(), self._id
        self._number, self._introduces, self._relaid = 0, True, False
        self._forget_lines()

    def _forget_lines(self) -> None:
        """Send all lines with the next request, because the ledger has none of them."""
        self._stored: dict[int, int] = {}  # the waiter number of each bucket's head in the ledger
        self._ask_us: dict[int, int] = {}  # when the head of a bucket asks next
        self._due: list[tuple[int, int]] = []  # the same as a heap; entries may be outdated
        self._waits: dict[int, Wait] = {}  # the latest; ``waiting`` counts those of other sessions
        self._changed: set[int] = set()
        self._along: set[int] = set()  # buckets whose line has changed, but not its head
        self._along_us = FOREVER_US  # the latest time to send these
        self._all = True

    # --- what the scheduler says ------------------------------------------------------------------

    def changed(self, bucket: int) -> None:
        """Note that a line has changed."""
        self._changed.add(bucket)

    def report(self, permit: Permit, report: models.Report, now_us: int) -> None:
        """Add a report to the next request."""
        self._reports.append(
            Report(KINDS[report], permit.serial, permit.shard_id, permit.period, now_us)
        )

    def change_limit(
        self,
        limit: SessionStartLimit,
        at_us: int,
        kind: int = messages.UPDATE,
        asked_us: int | None = None,
    ) -> LimitChange:
        """Add a limit as it was at ``at_us`` to the next request; a read of it began at ``asked_us``."""
        asked_us = at_us if asked_us is None else asked_us
        change = LimitChange(_limit(kind, limit, asked_us, at_us))
        self._changes.append(change)
        return change

    def abandon(self, change: LimitChange) -> LedgerError:
        """Stop waiting for a limit change. Return the error for its caller."""
        if change in self._changes and not self._is_in_flight(change):
            self._changes.remove(change)
            return LedgerError("the ledger did not answer in time; the limit was not applied")
        return LedgerError(f"the ledger did not answer in time; {UNKNOWN_FATE}")

    def _is_in_flight(self, change: LimitChange) -> bool:
        return self._in_flight is not None and self._in_flight.limit is change.limit

    def look(self) -> None:
        """Ask for the waiters of all processes with the next request."""
        self._looks = True

    def hurry(self, now_us: int) -> None:
        """Send a failed request again at once, because a caller waits for the reply."""
        if self.failure is not None:
            self._retry_us = min(self._retry_us, now_us)

    def knows(self, bucket: int) -> bool:
        """Return whether the ledger has said when the bucket opens."""
        return bucket in self._waits

    # --- sending ----------------------------------------------------------------------------------

    def wake_us(self, now_us: int) -> int:
        """Return when to call ``compose`` next."""
        if self._in_flight is not None:
            return self._retry_us
        if self._changed or self._all or self._introduces or self._wants_now():
            return now_us
        due = self._due
        while due and self._ask_us.get(due[0][1]) != due[0][0]:
            heapq.heappop(due)
        wake_us = min(due[0][0] if due else FOREVER_US, self._along_us)
        return min(wake_us, self._paused_until_us) if self._paused else wake_us

    def _wants_now(self) -> bool:
        return bool(self._reports or self._changes or self._looks or self._relaid)

    def compose(self, lines: WaitingLines, now_us: int, *, can_read: bool) -> Request | None:
        """Return the request to send now, if any: a new one, or the one in flight again."""
        request = self._in_flight
        if request is not None:
            if now_us < self._retry_us:
                return None
            return self._send(request, now_us)
        if self._paused and now_us >= self._paused_until_us:
            self._paused, self._all = False, True
        buckets = [] if self._introduces else self._buckets_to_send(lines, now_us)
        if not (self._introduces or buckets or self._wants_now()):
            return None
        if now_us - self._answered_us > FORGOTTEN_US and not self._introduces:
            self._start_anew()
        if self._introduces:
            return self._send(self._new_request(can_read, self._introduction(now_us)), now_us)
        reports = tuple(self._reports)[: messages.MAX_CHANGES - len(buckets)]
        request = self._new_request(can_read)._replace(
            lines=tuple(self._line(lines, bucket, now_us) for bucket in buckets),
            reports=reports,
            limit=self._changes[0].limit if self._changes else None,
            look=int(self._looks),
        )
        for _ in reports:
            self._reports.popleft()
        self._looks = self._relaid = False
        return self._send(request, now_us)

    def _send(self, request: Request, now_us: int) -> Request:
        self._attempt, self._sent_us = self._attempt + 1, now_us
        self._in_flight = request._replace(attempt=self._attempt, sent_us=now_us)
        self._retry_us = FOREVER_US  # until it has failed
        return self._in_flight

    def _new_request(self, can_read: bool, introduction: Introduction | None = None) -> Request:
        wanted = self._settings
        self._number += 1
        return Request(
            attempt=0,
            sent_us=0,
            session=self._id,
            number=self._number,
            interval_us=wanted.interval_us,
            margin_us=self.margin_us,
            period_us=wanted.period_us,
            lease_us=wanted.lease_us,
            reserve=wanted.reserve,
            reread_us=wanted.reread_us,
            can_read=int(can_read),
            look=0,
            layout=self._layout,
            introduction=introduction,
        )

    def _introduction(self, now_us: int) -> Introduction:
        limit, left, seen = self._settings.limit, self.budget, None
        opening = None
        if limit is not None and self._opens:
            opening = _limit(messages.OPEN, limit, now_us, now_us)
        if left is not None:
            seen = Limit(
                messages.OPEN,
                left.total,
                left.remaining,
                left.resets_in_us,
                self.max_concurrency,
                self.budget_us,
                self.budget_us,
            )
        return Introduction(
            self._replaces,
            self._settings.bot,
            opening,
            self.granted,
            self.period,
            self._layout,
            seen,
        )

    def _buckets_to_send(self, lines: WaitingLines, now_us: int) -> list[int]:
        """Return the buckets whose lines to send with the next request; none if nothing is urgent."""
        if lines.max_concurrency != self.max_concurrency:
            return []
        if self._all:
            self._changed.update(lines.buckets(), self._stored)
            self._all = False
        due = {bucket for bucket, ask_us in self._pop_due(now_us)}
        urgent = {bucket for bucket in self._changed if self._is_urgent(lines, bucket)}
        if not self._along:
            self._along_us = max(now_us, self._sent_us + MAX_COUNT_AGE_US)
        rest = self._changed - urgent
        self._along |= {one for one in rest if one in self._stored or lines.length(one)}
        self._changed.clear()
        send = list(due | urgent)
        if send or self._wants_now() or now_us >= self._along_us:
            send += [bucket for bucket in self._along if bucket not in due and bucket not in urgent]
        most = messages.MAX_CHANGES - min(len(self._reports), messages.MAX_CHANGES // 2)
        for bucket in send[most:]:
            self._changed.add(bucket)
            self._stored.pop(bucket, None)
        self._along.difference_update(send)
        if not self._along:
            self._along_us = FOREVER_US
        return send[:most]

    def _pop_due(self, now_us: int) -> list[tuple[int, int]]:
        found = []
        while self._due and self._due[0][0] <= now_us:
            ask_us, bucket = heapq.heappop(self._due)
            if self._ask_us.get(bucket) == ask_us:
                del self._ask_us[bucket]
                found.append((bucket, ask_us))
        return found

    def _is_urgent(self, lines: WaitingLines, bucket: int) -> bool:
        """Return whether the ledger has another head than the process."""
        first = () if self._paused else lines.first_two(bucket)
        return (first[0].number if first else None) != self._stored.get(bucket)

    def _line(self, lines: WaitingLines, bucket: int, now_us: int) -> Line:
        first = () if self._paused else lines.first_two(bucket)
        waiters = tuple(_waiter(one, now_us) for one in first)
        more = lines.length(bucket) - len(waiters) if waiters else 0
        return Line(bucket, more, waiters)

    # --- replies ----------------------------------------------------------------------------------

    def failed(self, request: Request, error: Exception, now_us: int) -> None:
        """Note that an attempt had no reply; it may or may not have been applied."""
        if self._in_flight is None or self._in_flight.attempt != request.attempt:
            return
        self.failure = error
        self._failures += 1
        first_us = BUSY_PAUSE_US if isinstance(error, Busy) else FIRST_PAUSE_US
        pause_us = min(MAX_PAUSE_US, first_us << min(self._failures - 1, 16))
        self._retry_us = now_us + int(pause_us * self._uniform(0.5, 1.0))

    def interrupted(self, now_us: int) -> None:
        """Send the request again that was in flight, or whose reply was not applied completely."""
        self._all = True
        self._retry_us = min(self._retry_us, now_us + FIRST_PAUSE_US)

    def answered(self, request: Request, reply: Reply, now_us: int) -> Answers:
        """Apply a reply. One to an earlier attempt changes nothing."""
        answers, flying = Answers(), self._in_flight
        if flying is None or not request.attempt == reply.attempt == flying.attempt:
            return answers
        if reply.status == messages.REFUSED:
            answers.error = LedgerError(f"the ledger refuses this process: {reply.error}")
            self._refused(flying, answers, now_us)
            return answers
        self._in_flight, self.failure, self._failures = None, None, 0
        if reply.lost and self.budget_us:
            answers.warnings.append("the ledger has lost requests: no bucket grants for one window")
        if reply.status == messages.INTRODUCE:
            self._unknown_here(flying, answers)
            return answers
        self._answered_us = flying.sent_us
        self._note_account(flying, reply, answers)
        if flying.introduction is not None:
            self._introduces = self._opens = False
            self._all = True
            if reply.lost:
                self._drop_refunds()
        if flying.limit is not None:
            change = self._changes.popleft()
            change.done, change.applied = True, reply.limit_result == messages.APPLIED
            answers.changes.append(change)
        self._note_trip(now_us - flying.sent_us, answers)
        self._note_heads(flying, reply, answers, now_us)
        if answers.limit_changed:  # those who waited for session starts may get permits now
            for bucket in self._stored:
                self._ask_us[bucket] = now_us
                heapq.heappush(self._due, (now_us, bucket))
        is_read = any(one.limit.kind == messages.READ for one in self._changes)  # but not sent yet
        answers.read, answers.look = bool(reply.read) and not is_read, reply.look
        answers.uncounted = None if reply.uncounted < 0 else reply.uncounted
        answers.rejections = dict(reply.rejections)
        return answers

    def _refused(self, request: Request, answers: Answers, now_us: int) -> None:
        """Drop a request that the ledger refused, since it would refuse it again.

        An introduction is sent again, with pauses, because waiting is only possible after it.
        """
        if request.introduction is not None:
            self.failed(request, answers.error or LedgerError(), now_us)
            answers.refused = None
            return
        answers.refused = [one.number for line in request.lines for one in line.waiters]
        self._in_flight, self._failures = None, 0
        self._looks = self._looks or bool(request.look)
        if request.limit is not None:
            change = self._changes.popleft()
            change.done, change.error = True, answers.error
            answers.changes.append(change)
        self._start_anew()

    def _unknown_here(self, request: Request, answers: Answers) -> None:
        """Begin a new session, because the ledger does not know this one; a request may be lost."""
        kept = (report for report in request.reports if report.kind != messages.UNUSED)
        self._reports.extendleft(reversed(list(kept)))
        self._drop_refunds()
        self._looks = self._looks or bool(request.look)
        if request.limit is not None:
            change = self._changes.popleft()
            change.done = True
            if change.limit.kind == messages.UPDATE:
                change.error = LedgerError(f"the ledger has lost requests; {UNKNOWN_FATE}")
            answers.changes.append(change)
        self._start_anew()

    def _drop_refunds(self) -> None:
        self._reports = deque(one for one in self._reports if one.kind != messages.UNUSED)

    def _note_account(self, request: Request, reply: Reply, answers: Answers) -> None:
        left = budget_of(reply)
        answers.limit_changed = reply.limit_result == messages.APPLIED or bool(reply.lost)
        if reply.layout != self._layout or reply.max_concurrency != self.max_concurrency:
            self._relaid = bool(self._stored or request.lines)
            self._layout, self.max_concurrency = reply.layout, reply.max_concurrency
            self._forget_lines()
            answers.limit_changed = True
        if left is None and not self._lacks_limit and not request.can_read:
            answers.warnings.append(
                "the session start limit is not known there: no permit is granted until a process "
                "that can read it, or the command `limit --read`, has done so"
            )
        self._lacks_limit = left is None
        self.budget, self.budget_us = left, request.sent_us
        self.granted, self.period = reply.granted, reply.period
        self.window_us = reply.interval_us + reply.margin_us
        if reply.differs and not self._differs:
            answers.warnings.append(
                f"processes have different settings: interval={reply.interval_us / US_PER_SECOND:g}, "
                f"margin={reply.margin_us / US_PER_SECOND:g} count, the largest of all; this one has "
                f"{request.interval_us / US_PER_SECOND:g} and {request.margin_us / US_PER_SECOND:g}"
            )
        self._differs = bool(reply.differs)

    def _note_heads(self, request: Request, reply: Reply, answers: Answers, now_us: int) -> None:
        """Store which waiters got a permit, and when the other heads ask again."""
        granted = {one.waiter: one for one in reply.permits}
        waits = {one.bucket: one for one in reply.waits}
        if request.layout == reply.layout:
            for line in request.lines:
                left = [one for one in line.waiters if one.number not in granted]
                wait = waits.get(line.bucket)
                if left and wait is not None:
                    ask_us = request.sent_us + wait.wait_us
                    others = max(0, wait.waiting - len(left) - line.more)
                    self._ask_us[line.bucket] = ask_us
                    self._waits[line.bucket] = wait._replace(waiting=others)
                    heapq.heappush(self._due, (ask_us, line.bucket))
                    answers.denials[left[0].number] = Denial(
                        max(0, ask_us - now_us),
                        REASONS[wait.reason],
                        reply.remaining,
                        reply.resets_in_us,
                    )
                self._note_stored(line.bucket, [one for one in left if not one.once])
        late_us = 0  # how old the oldest is that comes too late
        for one in reply.permits:
            permit = Permit(
                one.shard_id, one.bucket, remaining=None if one.remaining < 0 else one.remaining
            )
            permit.serial, permit.period, permit.waiter = one.serial, one.period, one.waiter
            permit.stamp_us = request.sent_us - one.age_us
            if request.margin_us and now_us - permit.stamp_us > request.margin_us:
                self.report(permit, models.Report.UNUSED, now_us)
                self._changed.add(one.bucket)
                late_us = max(late_us, now_us - permit.stamp_us)
            else:
                answers.permits.append(permit)
        if late_us > self.margin_us:
            self._note_late(late_us, now_us, answers)
        elif reply.permits:
            self._late = 0

    def _note_stored(self, bucket: int, waiters: list[Waiter]) -> None:
        if waiters:
            self._stored[bucket] = waiters[0].number
        else:
            self._stored.pop(bucket, None)
            self._ask_us.pop(bucket, None)
            self._waits.pop(bucket, None)

    def _note_trip(self, trip_us: int, answers: Answers) -> None:
        """Warn if round trips take so long that this process always asks too late for its turn.

        A margin that was raised is lowered when round trips are shorter again.
        """
        self._trips, self._longest_trip_us = self._trips + 1, max(self._longest_trip_us, trip_us)
        if self._trips == MANY_TRIPS:
            enough_us = max(self._settings.margin_us, self._longest_trip_us * 3 // 2)
            self.margin_us = min(self.margin_us, enough_us)
            self._trips = self._longest_trip_us = 0
        self._slow = self._slow + 1 if trip_us > self._settings.lease_us // 3 else 0
        if self._slow == MANY_SLOW:
            answers.warnings.append(
                f"the ledger answers after {trip_us / US_PER_SECOND:.2f} s, more than a third of the "
                "lease: other processes are likely to take the turns of this one"
            )

    def _note_late(self, late_us: int, now_us: int, answers: Answers) -> None:
        """Raise the margin if permits come late again and again; at the maximum, pause.

        Then round trips are long, or replies are lost: what is sent again has aged meanwhile.
        """
        self._late += 1
        margin_us = min(late_us * 3 // 2, MAX_RAISED_MARGIN_US)
        if self._late >= MANY_LATE - 1 and margin_us > self.margin_us:
            self.margin_us, self._late = margin_us, 0
            answers.warnings.append(
                f"the ledger answers after {late_us / US_PER_SECOND:.2f} s, later than the margin: it "
                f"is raised to {margin_us / US_PER_SECOND:.2f} s"
            )
        elif self._late >= MANY_LATE:
            self._paused_until_us = now_us + LATE_PAUSE_US
            self._paused = self._all = True
            answers.warnings.append(
                f"the ledger answers after {late_us / US_PER_SECOND:.2f} s, too late for permits: this "
                f"process asks for none for {LATE_PAUSE_US / US_PER_SECOND:.0f} s"
            )

    # --- looking ahead ----------------------------------------------------------------------------

    def position(self, bucket: int, index: int) -> int:
        """Return about how many come before a waiter that has just arrived, the ``index``-th here."""
        wait = self._waits.get(bucket)
        return index if wait is None else index + wait.waiting

    def eta_us(self, bucket: int, position: int, now_us: int) -> int | None:
        """Return in about how many microseconds the waiter at a position gets its permit."""
        wait, elapsed_us = self._waits.get(bucket), now_us - self.budget_us
        left = self.budget
        if left is None:  # it depends on the next read
            return None
        left = Budget(left.total, left.remaining, max(0, left.resets_in_us - elapsed_us))
        outlook = forecast.Outlook(
            now_us=now_us,
            window_us=self.window_us,
            period_us=self._settings.period_us,
            reserve=self._settings.reserve,
            max_concurrency=self.max_concurrency,
            ready_in_us={bucket: 0 if wait is None else max(0, wait.opens_us - elapsed_us)},
            others_ready_in_us=0,
            budget=left,
            granted=self.granted,
        )
        lines = max(1, len(self._waits))
        return forecast.eta_us(outlook, bucket, position, lines, (position + 1) * lines)


def budget_of(reply: Reply) -> Budget | None:
    """Return what is left by a reply; ``None`` if the ledger has no limit."""
    return None if reply.total < 0 else Budget(reply.total, reply.remaining, reply.resets_in_us)


def _waiter(one: Waits, now_us: int) -> Waiter:
    """Return a waiter for a request, with its age and head start within the bounds."""
    arrived_us = max(one.arrived_us, now_us - MAX_WAIT_US)
    most_us = messages.MAX_HEAD_START_US
    position_us = arrived_us - max(-most_us, min(one.arrived_us - one.position_us, most_us))
    return Waiter(one.number, one.shard_id, arrived_us, position_us, int(one.once))


def _limit(kind: int, limit: SessionStartLimit, asked_us: int, at_us: int) -> Limit:
    return Limit(
        kind,
        limit.total,
        limit.remaining,
        to_us(limit.reset_after),
        limit.max_concurrency,
        asked_us,
        at_us,
    )
