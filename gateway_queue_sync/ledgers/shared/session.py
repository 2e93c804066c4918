"""One process's side of a shared ledger: what to send when, and what a reply means.

A state machine without thread, lock, clock or I/O. The scheduler's ledger calls a method for each
change, gets the next request from ``compose``, sends it, and passes in the reply (``answered``) or the
failure (``failed``).

Invariants:

- One request is in flight. Until it is answered it is sent again with the same content, so the ledger
  applies it once; a reply to any other attempt than the latest is dropped. A number is given when a
  request is composed: with ``_number`` 0 and none in flight, the session has to introduce itself.
- A permit is handed over only while it is younger than the raised margin. Its age is counted from when
  the attempt was sent. An older one is given back, and its waiter keeps its position.
- The ledger has the same lines as the process. A new head is sent at once, other changes a little later.
- After an introduction that the ledger asked for, only changes that may be applied twice are repeated.
"""

from __future__ import annotations

import random
import secrets
from collections import deque
from collections.abc import Callable

from gateway_queue_sync import forecast, models
from gateway_queue_sync.clock import FOREVER_US
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.answers import (
    Answers,
    LimitChange,
    SessionSettings,
    WaitingLines,
)
from gateway_queue_sync.ledgers.shared.backend import Busy
from gateway_queue_sync.ledgers.shared.messages import (
    Introduction,
    Limit,
    Line,
    Reply,
    Report,
    Request,
)
from gateway_queue_sync.ledgers.shared.round_trips import RoundTrips
from gateway_queue_sync.ledgers.shared.stored_lines import NoLines, StoredLines
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.models import US_PER_SECOND, Permit, SessionStartLimit, to_us
from gateway_queue_sync.token_bucket import MANY_REJECTIONS

FIRST_PAUSE_US = 50_000  # before a failed request is sent again; doubled each time
BUSY_PAUSE_US = 5_000  # the same, if another process has locked the ledger
MAX_PAUSE_US = 2 * US_PER_SECOND
MAX_BUSY_PAUSE_US = 200_000
RENEW_AFTER_US = 50 * US_PER_SECOND  # a ledger removes sessions that are silent for 60 s
KINDS = {models.Report.SENT: 0, models.Report.UNUSED: 1, models.Report.REJECTED: 2}
UNKNOWN_FATE = "the limit may or may not have been applied"


class Session:
    """One process's conversation with a shared ledger.

    Attributes:
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
        self._round_trips = RoundTrips(settings.margin_us, settings.lease_us)
        self.window_us = settings.interval_us + settings.margin_us
        self.max_concurrency = 1 if settings.limit is None else settings.limit.max_concurrency
        self.granted = self.period = self.budget_us = 0
        self.budget: Budget | None = None
        self.failure: Exception | None = None
        self._layout = self._attempt = 0
        self._differs = self._lacks_limit = False
        self.reinit()

    def reinit(self) -> None:
        """Begin anew, as in a forked child, which has no waiters."""
        self._id, self._replaces = "", ""
        self._opens_with = self._settings.limit
        self._in_flight: Request | None = None
        self._failures = 0
        self._retry_us = self._answered_us = self._sent_us = -FOREVER_US
        self._reports: deque[Report] = deque()
        self._changes: deque[LimitChange] = deque()
        self._looks = False
        self._start_anew()

    def _start_anew(self) -> None:
        """Choose a new id, and introduce it with the next request."""
        self._id, self._replaces = self._new_id(), self._id
        self._number = 0
        self._relaid = False  # whether lines must be sent again, because the buckets were replaced
        self._lines = StoredLines()

    @property
    def margin_us(self) -> int:
        """How long after the start of its window a permit may reach its caller."""
        return self._settings.margin_us

    # --- what the scheduler says ------------------------------------------------------------------

    def changed(self, bucket: int) -> None:
        """Note that a line has changed."""
        self._lines.changed(bucket)

    def report(self, permit: Permit, report: models.Report, now_us: int) -> None:
        """Add a report to the next request."""
        kind = KINDS[report]
        one = Report(kind, permit.serial, permit.shard_id, permit.period, now_us)
        if kind == messages.UNUSED:
            if permit.returned:
                return  # repeated, after an interrupt: it would be refunded twice
            permit.returned = True
        self._reports.append(one)

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
        in_flight = self._in_flight
        if change in self._changes and (in_flight is None or in_flight.limit is not change.limit):
            self._changes.remove(change)
            return LedgerError("the ledger did not answer in time; the limit was not applied")
        return LedgerError(f"the ledger did not answer in time; {UNKNOWN_FATE}")

    def look(self) -> None:
        """Ask for the waiters of all processes with the next request."""
        self._looks = True

    def hurry(self, now_us: int) -> None:
        """Send a failed request again at once, because a caller waits for the reply."""
        if self.failure is not None:
            self._retry_us = min(self._retry_us, now_us)

    # --- sending ----------------------------------------------------------------------------------

    @property
    def is_in_flight(self) -> bool:
        """Whether a request has no reply yet."""
        return self._in_flight is not None

    def wake_us(self, now_us: int) -> int:
        """Return when to call ``compose`` next."""
        if self._in_flight is not None:
            return self._retry_us
        if not self._number or self._wants_now():
            return now_us
        return min(self._lines.wake_us(now_us), self._round_trips.resumes_us)

    def _wants_now(self) -> bool:
        return bool(self._reports or self._changes or self._looks or self._relaid)

    def compose(self, lines: WaitingLines, now_us: int, *, can_read: bool) -> Request | None:
        """Return the request to send now, if any: a new one, or the one in flight again."""
        request = self._in_flight
        if request is not None:
            if now_us < self._retry_us:
                return None
            return self._send(request, now_us)
        if now_us >= self._round_trips.resumes_us:
            self._round_trips.resumes_us = FOREVER_US
            self._lines.all_changed()
        send = self._lines_to_send(lines, now_us) if self._number else []
        if self._number and not (send or self._wants_now()):
            return None
        if self._number and now_us - self._answered_us > RENEW_AFTER_US:
            self._start_anew()
        if not self._number:
            request = self._new_request(can_read)._replace(introduction=self._introduction(now_us))
            return self._send(request, now_us)
        reports = tuple(self._reports)[: messages.MAX_CHANGES - len(send)]
        request = self._new_request(can_read)._replace(
            lines=tuple(send),
            reports=reports,
            limit=self._changes[0].limit if self._changes else None,
            look=int(self._looks),
        )
        for _ in reports:
            self._reports.popleft()
        self._looks = self._relaid = False
        return self._send(request, now_us)

    def _lines_to_send(self, lines: WaitingLines, now_us: int) -> list[Line]:
        if lines.max_concurrency != self.max_concurrency:
            return []
        if self._round_trips.resumes_us < FOREVER_US:
            lines = NoLines(self.max_concurrency)
        most = messages.MAX_CHANGES - min(len(self._reports), messages.MAX_CHANGES // 2)
        sends = self._wants_now()
        send = self._lines.to_send(lines, now_us, most, self._sent_us, sends=sends)
        return [_held(line, self._round_trips.hold_us) for line in send]

    def _send(self, request: Request, now_us: int) -> Request:
        self._attempt, self._sent_us = self._attempt + 1, now_us
        self._in_flight = request._replace(attempt=self._attempt, sent_us=now_us)
        self._retry_us = FOREVER_US  # until it has failed
        return self._in_flight

    def _new_request(self, can_read: bool) -> Request:
        wanted = self._settings
        self._number += 1
        return Request(
            attempt=0,
            sent_us=0,
            session=self._id,
            number=self._number,
            interval_us=wanted.interval_us,
            margin_us=wanted.margin_us,
            period_us=wanted.period_us,
            lease_us=wanted.lease_us,
            reserve=wanted.reserve,
            reread_us=wanted.reread_us,
            can_read=int(can_read),
            look=0,
            layout=self._layout,
        )

    def _introduction(self, now_us: int) -> Introduction:
        left, seen, opening = self.budget, None, None
        if self._opens_with is not None:
            opening = _limit(messages.OPEN, self._opens_with, now_us, now_us)
        if left is not None:
            figures = left.total, left.remaining, left.resets_in_us, self.max_concurrency
            seen = Limit(messages.OPEN, *figures, self.budget_us, self.budget_us)
        return Introduction(
            self._replaces,
            self._settings.bot,
            opening,
            self.granted,
            self.period,
            self._layout,
            seen,
        )

    # --- replies ----------------------------------------------------------------------------------

    def failed(self, request: Request, error: Exception, now_us: int) -> None:
        """Note that an attempt had no reply; it may or may not have been applied."""
        if self._in_flight is None or self._in_flight.attempt != request.attempt:
            return
        self.failure = error
        self._failures += 1
        first_us, most_us = FIRST_PAUSE_US, MAX_PAUSE_US
        if isinstance(error, Busy):
            first_us, most_us = BUSY_PAUSE_US, MAX_BUSY_PAUSE_US
        pause_us = min(most_us, first_us << min(self._failures - 1, 16))
        self._retry_us = now_us + int(pause_us * self._uniform(0.5, 1.0))

    def interrupted(self, now_us: int) -> None:
        """Send the request again that was in flight, or whose reply was not applied completely."""
        self._lines.all_changed()
        self._retry_us = min(self._retry_us, now_us + FIRST_PAUSE_US)

    def answered(self, request: Request, reply: Reply, now_us: int) -> Answers:
        """Apply a reply. One to an earlier attempt changes nothing."""
        answers, in_flight = Answers(), self._in_flight
        if in_flight is None or not request.attempt == reply.attempt == in_flight.attempt:
            return answers
        if reply.status == messages.REFUSED:
            answers.error = LedgerError(f"the ledger refuses this process: {reply.error}")
            self._refused(in_flight, answers, now_us)
            return answers
        self._in_flight, self.failure, self._failures = None, None, 0
        if reply.lost and self.budget_us:
            answers.warnings.append("the ledger has lost requests: no bucket grants for one window")
        if reply.status == messages.INTRODUCE:
            self._unknown_here(in_flight, answers)
            return answers
        self._answered_us = in_flight.sent_us
        self._note_account(in_flight, reply, answers)
        if in_flight.introduction is not None:
            self._opens_with = None
            self._lines.all_changed()
            if reply.lost:
                self._drop_refunds()
        self._finish_change(in_flight, answers, applied=reply.limit_result == messages.APPLIED)
        if in_flight.layout == reply.layout:
            answers.denials = self._lines.note(in_flight, reply, now_us)
        age_us = self._note_permits(in_flight, reply, answers, now_us)
        resumes_us = self._round_trips.resumes_us
        answers.warnings += self._round_trips.note(now_us - in_flight.sent_us, age_us, now_us)
        if self._round_trips.resumes_us != resumes_us:
            self._lines.all_changed()
        if answers.limit_changed:  # those who waited for session starts may get permits now
            self._lines.ask_now(now_us)
        is_read = any(one.limit.kind == messages.READ for one in self._changes)  # but not sent yet
        answers.read, answers.look = bool(reply.read) and not is_read, reply.look
        answers.uncounted = None if reply.uncounted < 0 else reply.uncounted
        often = {one.serial for one in reply.rejections if one.in_a_row == MANY_REJECTIONS}
        rejected = (one for one in in_flight.reports if one.kind == messages.REJECTED)
        answers.rejected_often = [one.shard_id for one in rejected if one.serial in often]
        return answers

    def _refused(self, request: Request, answers: Answers, now_us: int) -> None:
        """Drop a request that the ledger refused, since it would refuse it again.

        An introduction is sent again, with pauses: without one, no other request is accepted.
        """
        if request.introduction is not None:
            self.failed(request, answers.error or LedgerError(), now_us)
            answers.refused = None
            return
        answers.refused = [one.number for line in request.lines for one in line.waiters]
        self._in_flight, self._failures = None, 0
        self._looks = self._looks or bool(request.look)
        self._finish_change(request, answers, error=answers.error)
        self._start_anew()

    def _unknown_here(self, request: Request, answers: Answers) -> None:
        """Begin a new session, because the ledger does not know this one. The request may be lost."""
        kept = (report for report in request.reports if report.kind != messages.UNUSED)
        self._reports.extendleft(reversed(list(kept)))
        self._drop_refunds()
        self._looks = self._looks or bool(request.look)
        error = LedgerError(f"the ledger has lost requests; {UNKNOWN_FATE}")
        is_read = request.limit is not None and request.limit.kind == messages.READ
        self._finish_change(request, answers, error=None if is_read else error)
        self._start_anew()

    def _finish_change(
        self,
        request: Request,
        answers: Answers,
        *,
        applied: bool = False,
        error: LedgerError | None = None,
    ) -> None:
        """Complete the limit change of a request, if it has one: the first of those that wait."""
        if request.limit is not None:
            change = self._changes.popleft()
            change.done, change.applied, change.error = True, applied, error
            answers.changes.append(change)

    def _drop_refunds(self) -> None:
        self._reports = deque(one for one in self._reports if one.kind != messages.UNUSED)

    def _note_account(self, request: Request, reply: Reply, answers: Answers) -> None:
        left = budget_of(reply)
        answers.limit_changed = reply.limit_result == messages.APPLIED or bool(reply.lost)
        if reply.layout != self._layout or reply.max_concurrency != self.max_concurrency:
            self._relaid = bool(self._lines or request.lines)
            self._layout, self.max_concurrency = reply.layout, reply.max_concurrency
            self._lines = StoredLines()
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

    def _note_permits(
        self, request: Request, reply: Reply, answers: Answers, now_us: int
    ) -> int | None:
        """Pass on the permits that are in time, give back the others. Return the age of the oldest."""
        oldest_us: int | None = None
        for one in reply.permits:
            remaining = None if one.remaining < 0 else one.remaining
            permit = Permit(one.shard_id, one.bucket, remaining=remaining)
            permit.serial, permit.period, permit.waiter = one.serial, one.period, one.waiter
            age_us = now_us - (request.sent_us - one.age_us)
            permit.stamp_us = now_us - age_us + self._round_trips.hold_us  # when its window starts
            oldest_us = max(age_us, oldest_us or age_us)
            if self.margin_us and age_us > self._round_trips.margin_us:
                self.report(permit, models.Report.UNUSED, now_us)
                self._lines.changed(one.bucket)
            else:
                answers.permits.append(permit)
        return oldest_us

    # --- looking ahead ----------------------------------------------------------------------------

    def budget_at(self, now_us: int) -> Budget | None:
        """Return what is left of the limit at a later time. A reset that is due counts as done."""
        left = self.budget
        if left is None or not left.resets_in_us:
            return left
        resets_in_us = left.resets_in_us - (now_us - self.budget_us)
        if resets_in_us <= 0:
            return Budget(left.total, left.total, 0)
        return Budget(left.total, left.remaining, resets_in_us)

    def others(self, bucket: int) -> int | None:
        """Return how many wait for a bucket in other processes; ``None`` if there was no reply yet."""
        head = self._lines.head(bucket)
        return None if head is None else head.others

    def eta_us(self, bucket: int, position: int, now_us: int) -> int | None:
        """Return in about how many microseconds the waiter at a position gets its permit.

        ``None`` if that is not known: there was no reply yet, or it depends on the next read.
        """
        head, left = self._lines.head(bucket), self.budget_at(now_us)
        if head is None or left is None:
            return None
        outlook = forecast.Outlook(
            now_us=now_us,
            window_us=self.window_us,
            period_us=self._settings.period_us,
            reserve=self._settings.reserve,
            max_concurrency=self.max_concurrency,
            ready_in_us={bucket: max(0, head.opens_us - (now_us - self.budget_us))},
            others_ready_in_us=0,
            budget=left,
            granted=self.granted,
        )
        lines = len(self._lines)
        return forecast.eta_us(outlook, bucket, position, lines, (position + 1) * lines)


def budget_of(reply: Reply) -> Budget | None:
    """Return what is left by a reply; ``None`` if the ledger has no limit."""
    return None if reply.total < 0 else Budget(reply.total, reply.remaining, reply.resets_in_us)


def _held(line: Line, hold_us: int) -> Line:
    """Return a line that asks for permits whose windows start ``hold_us`` later."""
    waiters = (one._replace(hold_us=one.hold_us + hold_us) for one in line.waiters)
    return line._replace(waiters=tuple(waiters)) if hold_us else line


def _limit(kind: int, limit: SessionStartLimit, asked_us: int, at_us: int) -> Limit:
    figures = limit.total, limit.remaining, to_us(limit.reset_after), limit.max_concurrency
    return Limit(kind, *figures, asked_us, at_us)
