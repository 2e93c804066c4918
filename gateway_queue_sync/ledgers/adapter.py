"""A shared ledger of the first protocol behind the interface that the scheduler's worker speaks.

Temporary: it goes when the shared ledgers answer a whole exchange in one message.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from gateway_queue_sync import forecast
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.forecast import Outlook
from gateway_queue_sync.ledgers import Answers, Placed, Request, Wants
from gateway_queue_sync.ledgers.remote import RemoteLedger
from gateway_queue_sync.ledgers.shared import MIN_MARGIN, Connect, SharedLedger, Terms
from gateway_queue_sync.ledgers.wire import MAX_NUMBER
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.lines import Waiter
from gateway_queue_sync.messages import Reply
from gateway_queue_sync.models import (
    US_PER_SECOND,
    Permit,
    QueueSnapshot,
    SessionStartLimit,
    check_limit,
    to_us,
)
from gateway_queue_sync.token_bucket import Denial, Reason

READING_US = 1 * US_PER_SECOND  # after which a head asks again whose process reads the limit

if TYPE_CHECKING:
    from gateway_queue_sync.settings import Settings


def open_ledger(
    connect: Connect, limit: SessionStartLimit | None, settings: Settings
) -> RemoteLedger:
    """Open a ledger that processes share."""
    if settings.margin < MIN_MARGIN:
        raise ValueError(
            f"margin must be at least {MIN_MARGIN} s for a queue shared by processes, not "
            f"{settings.margin:g}"
        )
    terms = Terms(*settings.timings_us, to_us(settings.lease))
    if limit is not None:
        check(limit, settings.reserve)
    ledger = connect(settings.name, terms, settings.clock)
    try:
        ledger.open(limit)
        check(ledger.limit, settings.reserve)
    except BaseException:
        ledger.close()
        raise
    return RemoteLedger(AdaptedLedger(ledger, settings), settings)


def check(limit: SessionStartLimit, reserve: int) -> None:
    """Refuse a limit that a shared ledger cannot keep."""
    check_limit(limit, reserve)
    if limit.total > MAX_NUMBER:
        raise ValueError(
            f"total must be at most {MAX_NUMBER} for a shared queue, not {limit.total}"
        )


class AdaptedLedger:
    """A shared ledger, for the worker of one scheduler."""

    def __init__(self, shared: SharedLedger, settings: Settings) -> None:
        self.shared = shared
        self._settings = settings
        self._known: set[int] = set()  # the numbers of waiters that the ledger may know
        _ledgers.add(self)

    def __repr__(self) -> str:
        return repr(self.shared)

    @property
    def max_concurrency(self) -> int:
        return self.shared.max_concurrency

    @property
    def margin_us(self) -> int:
        return self.shared.margin_us

    @property
    def window_us(self) -> int:
        return self.shared.window_us

    @property
    def period_us(self) -> int:
        return self.shared.terms.period_us

    @property
    def granted(self) -> int:
        return self.shared.granted

    def budget(self) -> Budget:
        limit = self.shared.limit
        age_us = self._settings.clock.now_us() - self.shared.learned_us
        return Budget(limit.total, limit.remaining, max(0, to_us(limit.reset_after) - age_us))

    def exchange(self, wants: Wants) -> Answers:
        answers, now_us = Answers(), self._settings.clock.now_us
        answered_us: dict[Waiter, int] = {}
        for waiter in wants.joined:
            self._known.add(waiter.number)
            self.shared.joined(waiter)
        for waiter in wants.left:
            if waiter.number in self._known:
                self._known.discard(waiter.number)
                self.shared.left(waiter)
        for permit, report, at_us in wants.reports:
            self.shared.report(permit, report, at_us)
        try:
            for request in wants.requests:
                if request.kind != "look":
                    self._serve(request)
            for waiter in wants.heads:
                answers.heads[waiter] = self._take(waiter, wants)
                answered_us[waiter] = now_us()
            self.shared.tell(patient=True)
            for request in wants.requests:
                if request.kind == "look":  # last: it shows who has joined just now
                    self._serve(request)
        except Exception as error:  # noqa: BLE001 - whatever a client raises, it is tried again
            self._failed(error, wants, answers)
        answers.unsent = self.shared.has_news
        for waiter, answer in answers.heads.items():
            if isinstance(answer, Denial):  # the sleep began when it was answered
                answer.wait_us = max(0, answer.wait_us - (now_us() - answered_us[waiter]))
        if self.shared.forgotten:
            self.shared.forgotten = False
            self._known.clear()
            answers.forgotten = True
        return answers

    def _failed(self, error: Exception, wants: Wants, answers: Answers) -> None:
        failure = error
        if not isinstance(failure, LedgerError):
            failure = LedgerError(f"{self!r}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error.__traceback__ = None
        failure.__traceback__ = None  # its frames hold the answers, which hold it
        answers.failure = failure
        for request in wants.requests:
            if not request.done:
                request.error = failure

    def _take(self, waiter: Waiter, wants: Wants) -> Permit | Denial:
        self._known.add(waiter.number)
        answer, _ = self.shared.take(
            waiter,
            stays=not waiter.once,
            reserve=self._settings.reserve,
            can_refresh=wants.can_read,
        )
        if waiter.once or isinstance(answer, Permit):
            self._known.discard(waiter.number)
        if isinstance(answer, Denial) and answer.reason is Reason.RESET:
            # Long enough to read it, unless that has failed; short enough to keep the lease meanwhile.
            answer.wait_us = min(READING_US, self.shared.terms.lease_us // 3)
        return answer

    def _serve(self, request: Request) -> None:
        shared, limit, denial = self.shared, request.limit, request.denial
        if request.kind == "look":
            reply = shared.look(patient=True)
            if shared.forgotten:
                return  # nobody of this process is in what it shows: it is asked again
            request.outlook = outlook(reply._replace(reserve=self._settings.reserve))
            request.lines = lines(reply)
            request.at_us = self._settings.clock.now_us()
            request.ahead_us = reply.now_us - request.at_us
        elif request.kind == "update":
            assert limit is not None
            try:
                check(limit, self._settings.reserve)
            except ValueError as error:
                request.error = error
                return
            shared.adopt(limit)
        elif request.kind == "renew":
            assert limit is not None
            assert denial is not None
            request.limit = shared.renew(limit, denial)
        else:
            assert denial is not None
            shared.trust(denial)
        request.done = True

    def begin_anew(self) -> None:
        self._known = set()
        self.shared.after_fork_in_child()

    def close(self) -> None:
        self.shared.close()


def outlook(reply: Reply) -> Outlook:
    """Return what decides when permits come, as a ledger answered a look."""
    return Outlook(
        now_us=reply.now_us,
        window_us=reply.interval_us + reply.margin_us,
        period_us=reply.period_us,
        reserve=reply.reserve,
        max_concurrency=reply.max_concurrency,
        ready_in_us=dict(reply.ready_in_us),
        others_ready_in_us=reply.others_ready_in_us,
        budget=Budget(reply.total, reply.remaining, reply.resets_in_us),
        granted=reply.granted,
    )


def lines(reply: Reply) -> dict[int, list[Placed]]:
    """Return who waits for which bucket, in order, as a ledger answered a look."""
    found: dict[int, list[Placed]] = {}
    for waiter in sorted(reply.waiting, key=lambda waiter: waiter.place):
        found.setdefault(waiter.shard_id % reply.max_concurrency, []).append(waiter)
    return found


def snapshot(reply: Reply) -> QueueSnapshot:
    """Return the snapshot of an account, as a ledger answered a look."""
    return forecast.snapshot(outlook(reply), lines(reply))


# --- forks ----------------------------------------------------------------------------------------

_ledgers: weakref.WeakSet[AdaptedLedger] = weakref.WeakSet()


class _Held(threading.local):
    """The ledgers that a thread which forks has made ready for that."""

    def __init__(self) -> None:
        self.ledgers: list[SharedLedger] = []


_held = _Held()


def _before_fork() -> None:
    # In one order, for two threads that fork at once.
    for ledger in sorted((adapted.shared for adapted in list(_ledgers)), key=id):
        ledger.before_fork()
        _held.ledgers.append(ledger)


def _after_fork_in_parent() -> None:
    while _held.ledgers:
        _held.ledgers.pop().after_fork_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_held.ledgers.clear,
    )
