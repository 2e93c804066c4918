"""Queues whose account is shared by processes: the ledger is asked without the mutex.

Only the first ticket of each line here asks, and sleeps for as long as it is told; where it stands
among the tickets of other processes is the ledger's to say (``turns.py``). While it asks, everybody
else goes on: so what was known before is looked at again afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypedDict

from gateway_queue_sync import forecast, journal
from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.errors import AcquireTimeout, BrokerError, QueueClosed, reentered
from gateway_queue_sync.events import LeaveReason, Observer, ShardWaiting
from gateway_queue_sync.ledgers.shared import (
    DEFAULT_LEASE,
    LEAST_MARGIN,
    SharedLedger,
    Terms,
)
from gateway_queue_sync.ledgers.wire import LARGEST_NUMBER
from gateway_queue_sync.lines import PermitFuture, Ticket
from gateway_queue_sync.messages import Reply, Waiter
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    Permit,
    QueueSnapshot,
    Report,
    SessionStartLimit,
    seconds,
)
from gateway_queue_sync.queue import GatewayQueue, WhenExhausted
from gateway_queue_sync.rules import (
    MICROSECOND,
    NEVER,
    Budget,
    Denial,
    Grant,
    Reason,
    timings_us,
    to_us,
)
from gateway_queue_sync.waiting import Errand, Refresh

log = logging.getLogger("gateway_queue_sync")

FIRST_PAUSE_US = 50_000  # before a ledger that is out of reach is asked again; doubled each time
LONGEST_PAUSE_US = 2_000_000
WORTH_A_WARNING = 3  # failures in a row
LATEST_FOR_US = 1_000_000
SOON_US = 100_000  # for so long others need not know that somebody joined
LONGEST_HEAD_START_US = 1 << 51  # 71 years: more makes no difference


Connect = Callable[[str, Terms, Clock], SharedLedger]
"""Makes a ledger: of which account, on what terms, by which clock."""


class SharedSettings(TypedDict, total=False):
    """The settings that queues shared by processes have in common, as ``SqliteQueue`` explains them."""

    name: str
    refresh: Refresh | None
    reserve: int
    when_exhausted: WhenExhausted
    period: float
    interval: float
    margin: float
    lease: float
    clock: Clock
    observer: Observer | None


def _terms(interval: float, margin: float, period: float, lease: float) -> Terms:
    interval_us, margin_us, period_us = timings_us(interval, margin, period)
    if margin < LEAST_MARGIN:
        raise ValueError(
            f"margin must be at least {LEAST_MARGIN} s for a queue shared by processes, not {margin:g}"
        )
    return Terms(interval_us, margin_us, period_us, to_us(seconds("lease", lease, above=0.1)))


def account_name(name: str) -> str:
    """Return the name of an account, or say what is wrong with it."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", name):
        raise ValueError(f"name must be 1 to 64 letters, digits, or any of _ . : -, not {name!r}")
    return name


class SharedTicket(Ticket):
    """A place in line that a ledger may know of, and what it last said to it."""

    __slots__ = ("answer", "foretold", "known", "served", "stays", "until_us", "woken")

    def __init__(
        self,
        shard_id: int,
        arrived_us: int,
        priority_us: int = 0,
        future: PermitFuture | None = None,
    ) -> None:
        super().__init__(shard_id, arrived_us, priority_us, future)
        self.answer: Denial | None = None
        self.until_us = 0  # how long the answer holds
        self.woken = False  # something has changed since the answer
        self.foretold = False  # the answer came before it was the first, and holds when it is
        self.stays = True  # it does not just try
        self.known = False  # the ledger has heard of it, or may have
        self.served = False  # its permit is somebody's

    def hand_over(self) -> None:  # noqa: D102 - as any ticket
        super().hand_over()
        self.known, self.served = False, True

    @property
    def has_permit(self) -> bool:
        """Whether it was granted: then what is said of it later must not give that back."""
        return self.served or self.grant is not None


@dataclass(slots=True)
class _Outage:
    """A ledger that cannot be reached: why, since when, and how often it was tried."""

    failure: BrokerError
    since_us: int
    failures: int = 0
    pause_until_us: int = NEVER


@dataclass(frozen=True, slots=True)
class _Sighting:
    """What a ledger showed, when that was by the clock here, and who stands where, in order."""

    reply: Reply
    at_us: int
    places: Mapping[int, list[tuple[int, int]]]
    outlook: forecast.Outlook


class SharedQueue(GatewayQueue):
    """What the queues of many processes are."""

    _ledger: SharedLedger

    def __init__(
        self,
        connect: Connect,
        limit: SessionStartLimit | None,
        *,
        name: str = "default",
        refresh: Refresh | None = None,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        lease: float = DEFAULT_LEASE,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
        **unknown: object,
    ) -> None:
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {min(unknown)!r}")
        ledger = connect(account_name(name), _terms(interval, margin, period, lease), clock)
        super().__init__(
            ledger,
            clock=clock,
            observer=observer,
            refresh=refresh,
            reserve=reserve,
            when_exhausted=when_exhausted,
        )
        self._outage: _Outage | None = None
        self._latest: _Sighting | None = None
        if limit is not None:
            self._check_limit(limit)
        try:
            ledger.open(limit)
            self._check_limit(ledger.limit)
        except BaseException:
            ledger.close()
            raise
        self._let_know()
        _queues.add(self)

    def _begin_anew_after_fork(self) -> None:
        """Be another process's queue in a forked child: nobody waits here, and nothing is held.

        Those who waited are threads of the parent; their futures' copies here are never done.
        """
        self._begin()
        self._outage = self._latest = None
        self._ledger.after_fork_in_child()

    def snapshot(self) -> QueueSnapshot:
        """Return who waits where, in all processes, until when, and what is left of the budget.

        Works when closed, too.

        Raises:
            BrokerError: the ledger is out of reach.
            RuntimeError: as ``acquire`` does.
        """
        self._check_thread()
        return picture(self._own(self._look(patient=True)))

    def close(self) -> None:
        """Grant no more permits: whoever waits here gets ``QueueClosed``; other processes go on.

        Closing again changes nothing.
        """
        super().close()
        if not self._inside():
            self._post()
            self._ledger.close()

    def __repr__(self) -> str:
        return self._describe(self._ledger.granted, self._left())

    # --- asking -----------------------------------------------------------------------------------

    def _check_limit(self, limit: object) -> None:
        super()._check_limit(limit)
        assert isinstance(limit, SessionStartLimit)
        for name in ("total", "max_concurrency"):
            if getattr(limit, name) > LARGEST_NUMBER:
                raise ValueError(f"{name} must be at most {LARGEST_NUMBER} for a shared queue")

    def _at_once(self, shard_id: int) -> Permit | Grant | None:
        """Stand aside: a ledger is asked for a ticket, and outside the mutex."""
        self._check_thread()
        with self._mutex:
            if self._closed:
                raise QueueClosed
            if threading.get_ident() in self._threads:
                raise reentered()
        return None

    def _ticket(
        self,
        shard_id: int,
        priority_us: int,
        answer: Permit | Grant | None,
        future: PermitFuture | None = None,
        arrived_us: int | None = None,
    ) -> Ticket:
        if shard_id > LARGEST_NUMBER:
            raise ValueError(f"shard_id must be at most {LARGEST_NUMBER}, not {shard_id}")
        priority_us = max(-LONGEST_HEAD_START_US, min(priority_us, LONGEST_HEAD_START_US))
        arrived_us = self._now_us() if arrived_us is None else arrived_us
        return SharedTicket(shard_id, arrived_us, priority_us, future)

    def _wait_for_turn(self, ticket: Ticket, timeout: float | None) -> Permit:
        assert isinstance(ticket, SharedTicket)
        ticket.stays = timeout != 0
        return super()._wait_for_turn(ticket, timeout)

    def _timed_out(self, ticket: Ticket, timeout: float) -> Exception:
        if self._outage is None:
            return AcquireTimeout(ticket.shard_id, timeout)
        failure = self._outage.failure
        error = BrokerError(
            f"shard {ticket.shard_id} got no permit within {timeout:g} s: {failure}"
        )
        error.__cause__ = failure.__cause__
        return error

    def _explain(self, error: AcquireTimeout, ticket: Ticket) -> None:
        if self._refresher is None and self._outage is None:  # else nobody knows
            with contextlib.suppress(BrokerError):
                sighting = self._sighting()
                number, before = self._position(ticket, sighting)
                lengths = {other: len(places) for other, places in sighting.places.items()}
                lengths[number] = before + 1
                eta_us = forecast.eta_us(sighting.outlook, number, before, lengths)
                error.eta = None if eta_us is None else eta_us / MICROSECOND

    def _position(self, ticket: Ticket, sighting: _Sighting) -> tuple[int, int]:
        """Return a ticket's bucket, and how many wait there before it in all processes."""
        reply = sighting.reply
        place_us, number = ticket.place
        place = (place_us + reply.now_us - sighting.at_us, number)
        number = ticket.shard_id % reply.max_concurrency
        before = bisect_left(sighting.places.get(number, ()), place)
        with self._mutex:
            return number, max(before, self._lines.before(ticket))  # who came here since

    def _sighting(self) -> _Sighting:
        reply, at_us = self._look(patient=False), self._now_us()
        places: dict[int, list[tuple[int, int]]] = {}
        for waiter in sorted(reply.waiting, key=lambda waiter: waiter.place):
            places.setdefault(waiter.shard_id % reply.max_concurrency, []).append(waiter.place)
        return _Sighting(reply, at_us, places, _outlook(self._own(reply)))

    def _look(self, *, patient: bool) -> Reply:
        reply = self._ledger.look(patient=patient)
        forgotten = self._ledger.forgotten  # nobody here is in what it has told
        self._back()
        return self._ledger.look(patient=patient) if forgotten else reply

    def _own(self, reply: Reply) -> Reply:
        """Return what a look found, with this queue's own reserve."""
        return reply._replace(reserve=self._reserve)

    # ----------------------------------------------------------------------------------------------
    # With the mutex held

    def _ask(self, ticket: Ticket) -> Grant | Denial | None:
        assert isinstance(ticket, SharedTicket)
        while self._is_its_turn(ticket):
            left_us = ticket.until_us - self._now_us()
            if ticket.answer is not None and left_us > 0 and not ticket.woken:
                return replace(ticket.answer, wait_us=left_us)
            answer, heir, heir_us = self._consult_unlocked(ticket)
            if ticket.has_permit:
                return None  # another thread has asked for it meanwhile, and was granted
            if self._closed:
                raise QueueClosed
            self._reline_if_changed()
            if isinstance(answer, Grant):
                if heir_us and isinstance(heir, SharedTicket):
                    self._foretell(heir, Denial(heir_us, Reason.WINDOW))
                self._accept(ticket, answer)
                return answer
            if (
                not ticket.waiting
            ):  # its future was cancelled meanwhile, and came to be known after all
                self._ledger.left(ticket)
            ticket.answer, ticket.until_us = answer, self._now_us() + answer.wait_us
            if not ticket.woken:
                return answer
        return None

    def _consult_unlocked(self, ticket: SharedTicket) -> tuple[Grant | Denial, Ticket | None, int]:
        """Ask the ledger with the mutex let go; also return the heir, and how long it may sleep."""
        ticket.woken, ticket.known = False, True
        heir = self._lines.second(self._lines.bucket(ticket))
        if isinstance(heir, SharedTicket) and not heir.stays:
            heir = None
        self._mutex.release()
        try:
            answer, heir_us = self._consult(ticket, heir)
        finally:
            while not self._inside():
                self._mutex.acquire()
        return answer, heir, heir_us

    def _foretell(self, heir: SharedTicket, answer: Denial) -> None:
        """Tell the next in line what the ledger said to the one before, for when it is the first."""
        if heir.waiting:
            heir.answer, heir.until_us = answer, self._now_us() + answer.wait_us
            heir.foretold = heir.known = True
        elif not heir.has_permit:  # it has left meanwhile, and came to be known after all
            self._ledger.left(heir)

    def _wake(self, ticket: Ticket | None) -> None:
        if isinstance(ticket, SharedTicket):
            ticket.woken, ticket.foretold = True, False
        super()._wake(ticket)

    def _call_up(self, ticket: Ticket | None) -> None:
        if isinstance(ticket, SharedTicket) and ticket.foretold:
            ticket.foretold = False
            super()._wake(ticket)  # to sleep on for as long as it was told
        else:
            self._wake(ticket)

    def _hand_on(self, ticket: Ticket, grant: Grant) -> bool:
        """Leave the line; the permit was stamped by the ledger, and how old it is is checked after."""
        self._leave(ticket)
        return True

    def _return_grant(self, grant: Grant) -> None:
        self._ledger.report(grant, Report.UNUSED)
        if self._ledger.limit.remaining <= self._reserve:
            self._wake_all_firsts()  # there was nothing left to grant
        else:
            self._wake(self._lines.first(grant.shard_id % self._lines.max_concurrency))

    def _join(self, ticket: Ticket) -> bool:
        came_back = super()._join(ticket)
        if came_back and isinstance(ticket, SharedTicket):
            ticket.answer = None
        return came_back

    def _announcement(self, ticket: Ticket, left_us: int | None = None) -> Errand | None:
        """Return what makes the ticket known to the ledger, an observer or the log, before it sleeps."""
        assert isinstance(ticket, SharedTicket)
        if not ticket.known:
            ticket.known = True
            self._ledger.joined(ticket)
        if ticket.future is not None:
            self._bell.notify()  # the futures' thread tells it
        elif self._chore() is not None and not self._asks_soon(self._lines.bucket(ticket)):
            return self._post
        if ticket.announced:
            return None
        logs = self._outage is None and self._is_for_the_log(left_us)
        if self._observer is None and not logs:
            return None
        ticket.announced = True
        return partial(self._announce, ticket, self._lines.bucket(ticket), logs)

    def _asks_soon(self, number: int) -> bool:
        """Return whether the first of a line will ask at once or so, and tell all news with that."""
        first = self._lines.first(number)
        if not isinstance(first, SharedTicket):
            return False
        return first.woken or first.until_us - self._now_us() < SOON_US

    def _chore(self) -> Errand | None:
        return self._post if self._ledger.has_news and self._outage is None else None

    def _eta(self, ticket: Ticket, before: int) -> float | None:
        return None  # the ledger would have to be asked; see _announce

    def _left(self) -> Budget | None:
        limit = self._ledger.limit
        return Budget(limit.total, limit.remaining, to_us(limit.reset_after))

    def _let_know(self) -> None:
        with self._mutex:
            self._reline_if_changed()
            self._wake_all_firsts()

    # ----------------------------------------------------------------------------------------------
    # Without the mutex

    def _consult(self, ticket: SharedTicket, heir: Ticket | None) -> tuple[Grant | Denial, int]:
        """Ask the ledger; one that is out of reach denies for a pause that grows.

        Until that is over nobody asks but who only tries: an attempt may block.
        """
        outage = self._outage
        if outage is not None and ticket.stays:
            pause_us = outage.pause_until_us - self._now_us()
            if pause_us > 0:
                return Denial(pause_us, Reason.WINDOW), 0
        can_refresh = self._refresh is not None and ticket.trusted_period != self._ledger.period
        try:
            answer, heir_us = self._ledger.take(
                ticket,
                stays=ticket.stays,
                reserve=self._reserve,
                can_refresh=can_refresh,
                heir=heir,
            )
        except BrokerError as failure:
            return Denial(self._missed(failure), Reason.WINDOW), 0
        self._back()
        if isinstance(answer, Denial):
            ticket.known = ticket.stays
        return answer, heir_us

    def _missed(self, failure: BrokerError) -> int:
        """Note that the ledger is out of reach, and return how long to leave it alone.

        Those who fail in one pause have failed once.
        """
        with self._mutex:
            now_us = self._now_us()
            outage = self._outage or _Outage(failure, now_us)
            outage.failure = failure
            again = now_us >= outage.pause_until_us
            if again:
                outage.failures += 1
                longest_us = min(LONGEST_PAUSE_US, FIRST_PAUSE_US << min(outage.failures - 1, 16))
                pause_us = int(longest_us * random.uniform(0.5, 1.0))
                outage.pause_until_us = now_us + pause_us
            self._outage = outage
        if again and outage.failures == WORTH_A_WARNING:
            log.warning("%s; no permit is granted until it can be asked again", failure)
        return outage.pause_until_us - now_us

    def _back(self) -> None:
        """Note that the ledger answers, and tell it anew who waits if it has forgotten that."""
        if self._outage is None and not self._ledger.forgotten:
            return
        with self._mutex:
            outage, self._outage = self._outage, None
            if self._ledger.forgotten:
                self._ledger.forgotten = False
                for ticket in self._lines:
                    assert isinstance(ticket, SharedTicket)
                    if ticket.stays:  # one that just tries is never told of
                        ticket.known = True
                        self._ledger.joined(ticket)
        if outage is not None and outage.failures >= WORTH_A_WARNING:
            away = (self._now_us() - outage.since_us) / MICROSECOND
            log.warning("%r answers again, after %.1f s", self._ledger, away)

    def _post(self, *, patient: bool = False) -> None:
        """Tell the ledger the news; what does not get through goes along with the next call."""
        try:
            self._ledger.tell(patient=patient)
        except BrokerError as failure:
            log.info("%s; it will be told what happened here with the next call", failure)
            self._missed(failure)
            self._let_know()  # the next call is that of who is first here
        else:
            self._back()

    def _step_out(self, ticket: Ticket, reason: LeaveReason) -> None:
        assert isinstance(ticket, SharedTicket)
        if ticket.known:
            self._ledger.left(ticket)
        super()._step_out(ticket, reason)
        if not ticket.known or self._outage is not None:
            return
        if ticket.future is None or not self._futures:
            self._post()
        else:
            with self._mutex:
                self._bell.notify()  # one call for all who leave; close() has its own
        ticket.known = False

    def _book_report(self, permit: Permit, report: Report) -> None:
        super()._book_report(permit, report)
        if self._outage is None:  # else it goes along when the ledger is asked again
            self._post(patient=True)  # which may be long after, if nobody waits here

    def _announce(self, ticket: Ticket, number: int, logs: bool) -> None:
        before, eta, unshown = 0, None, None
        with contextlib.suppress(BrokerError):
            if self._observer is not None or self._latest_is_old():
                self._latest = self._sighting()
            assert self._latest is not None
            latest = self._latest
            seen, before = self._position(ticket, latest)
            lines = len({seen, *latest.places})
            waiting = max(len(latest.reply.waiting), len(self._threads) + len(self._futures))
            in_us = forecast.rough_eta_us(latest.outlook, seen, before, lines, waiting)
            eta = None if in_us is None else in_us / MICROSECOND
        if logs and journal.is_long(eta):
            with self._mutex:
                unshown = self._begun_waits.count(self._now_us())
        self._tell_waiting(ticket, ShardWaiting(ticket.shard_id, number, before, eta), unshown)

    def _latest_is_old(self) -> bool:
        """Return whether the log wants a new look: it is told of a thousand shards by a few."""
        return self._latest is None or self._now_us() - self._latest.at_us > LATEST_FOR_US

    def _adopt(self, limit: SessionStartLimit) -> None:
        if self._closed:
            raise QueueClosed
        try:
            self._ledger.adopt(limit)
        finally:
            self._let_know()

    def _renew(self, limit: SessionStartLimit, denial: Denial) -> SessionStartLimit | None:
        try:
            return self._ledger.renew(limit, denial)
        except BrokerError as failure:
            log.warning("%s; the limit that was read is dropped, and will be read again", failure)
            return None
        finally:
            self._let_know()

    def _trust(self, denial: Denial) -> bool:
        try:
            return self._ledger.trust(denial)
        except BrokerError:
            return False  # whoever asks next is told to read it again


def picture(reply: Reply) -> QueueSnapshot:
    """Return the snapshot of an account, as a ledger has answered a look at it."""
    lines: dict[int, list[Waiter]] = {}
    for waiter in reply.waiting:
        lines.setdefault(waiter.shard_id % reply.max_concurrency, []).append(waiter)
    return forecast.snapshot(_outlook(reply), lines, reply.now_us, reply.granted)


def _outlook(reply: Reply) -> forecast.Outlook:
    return forecast.Outlook(
        window_us=reply.interval_us + reply.margin_us,
        period_us=reply.period_us,
        reserve=reply.reserve,
        ready_in_us=dict.fromkeys(range(reply.max_concurrency), reply.others_ready_in_us)
        | dict(reply.ready_in_us),
        budget=Budget(reply.total, reply.remaining, reply.resets_in_us),
    )


_queues: weakref.WeakSet[SharedQueue] = weakref.WeakSet()


class _Held(threading.local):
    """The ledgers that a thread which forks has made ready for that."""

    def __init__(self) -> None:
        self.ledgers: list[SharedLedger] = []


_held = _Held()


def _before_fork() -> None:
    # In one order, for two threads that fork at once.
    for ledger in sorted((queue._ledger for queue in list(_queues)), key=id):
        ledger.before_fork()
        _held.ledgers.append(ledger)


def _after_fork_in_parent() -> None:
    while _held.ledgers:
        _held.ledgers.pop().after_fork_in_parent()


def _after_fork_in_child() -> None:
    _held.ledgers.clear()
    for queue in list(_queues):
        queue._begin_anew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
