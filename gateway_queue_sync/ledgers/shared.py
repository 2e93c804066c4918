"""What ledgers that processes share have in common: this process's side of the talk with them.

What needs no answer (who joined, who left, what became of a permit) is kept as news and goes along
with the next call. A call that fails leaves it here, and telling it twice changes nothing: so whatever
is lost on the way, the ledger hears of everything once it is back.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from gateway_queue_sync.clock import Clock
from gateway_queue_sync.errors import LedgerError, reentered
from gateway_queue_sync.messages import OUTCOMES, News, Next, Order, Reply, Request, Take
from gateway_queue_sync.models import (
    MAX_RESET_AFTER,
    SESSION_PERIOD,
    US_PER_SECOND,
    Permit,
    Report,
    SessionStartLimit,
    to_us,
)
from gateway_queue_sync.token_bucket import Denial, Reason

log = logging.getLogger("gateway_queue_sync")

DISCORDS_DEFAULT = SessionStartLimit(total=1000, remaining=1000, reset_after=0.0, max_concurrency=1)

PATIENCE = 5.0  # s for a ledger that others hold, where nobody would try again
SHORT_PATIENCE = 0.5  # s, where somebody only tries
MIN_PATIENCE = 0.2  # s, for those who ask again: others may be busy with it for as long

MIN_MARGIN = 0.02  # s; what any machine needs to bring a permit back
MAX_NEWS = 1_000  # in one call


@dataclass(frozen=True, slots=True)
class Terms:
    """What a process wants of an account, in microseconds; ``lease_us`` is how long it counts."""

    interval_us: int
    margin_us: int
    period_us: int
    lease_us: int


STRANGER = Terms(interval_us=1, margin_us=0, period_us=to_us(SESSION_PERIOD), lease_us=0)
"""The terms of who only looks: they have no effect."""


class Waits(Protocol):
    """A waiter, as far as a ledger is told of it."""

    number: int
    shard_id: int
    arrived_us: int
    position_us: int


Connect = Callable[[str, Terms, Clock], "SharedLedger"]
"""Makes a ledger: of which account, on what terms, by which clock."""


class SharedLedger(ABC):
    """The account of many processes, as one of them sees it.

    Attributes:
        terms: what this process wants of it.
        limit: the session start limit, as far as is known here.
        period, granted: the account's, as far as is known here.
        forgotten: the ledger had forgotten this process, and must be told anew who waits.
    """

    shares_clock: bool
    """Whether the ledger's clock is this process's."""

    def __init__(self, terms: Terms, clock: Clock) -> None:
        self.terms = terms
        self._clock = clock
        self._disagrees = False
        self.margin_us = terms.margin_us
        self.window_us = terms.interval_us + terms.margin_us
        self.limit = DISCORDS_DEFAULT
        self.period = self.granted = self.learned_us = 0
        self._begin()

    def _begin(self) -> None:
        self._owner = secrets.token_hex(8)
        self._news: deque[News] = deque()
        self._telling = threading.RLock()  # news arrives in its order: one call at a time has some
        self._numbers = itertools.count(1)
        self._void = 0  # no request up to this one is waited for any more
        self._failure: LedgerError | None = None  # why the latest call failed, if it did
        self.forgotten = False

    def before_fork(self) -> None:  # noqa: B027 - most have nothing to do
        """Make ready for a fork of this process."""

    def after_fork_in_parent(self) -> None:  # noqa: B027
        """Go on after a fork."""

    def after_fork_in_child(self) -> None:
        """Be another process from now on, in a forked child."""
        self._begin()

    @property
    def max_concurrency(self) -> int:
        """How many buckets there are, as far as is known here."""
        return self.limit.max_concurrency

    # --- news: told with the next call ------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._news)

    def joined(self, ticket: Waits) -> None:
        """Note that a ticket stands in a line."""
        self._news.append(
            News(
                "joined",
                ticket.number,
                ticket.shard_id,
                at_us=ticket.arrived_us,
                place_us=ticket.position_us,
            )
        )

    def left(self, ticket: Waits) -> None:
        """Note that a ticket stands in no line, and that it wants no permit that it was given."""
        self._news.append(News("left", ticket.number, ticket.shard_id))

    def report(self, permit: Permit, report: Report, at_us: int) -> None:
        """Note what became of a permit, as its holder said at that time."""
        self._news.append(
            News(report.value, permit.waiter, permit.shard_id, permit.serial, at_us=at_us)
        )

    # --- calls: each may raise LedgerError --------------------------------------------------------

    def open(self, limit: SessionStartLimit | None) -> None:
        """Begin, with a limit if there is news of it; else the ledger's, or Discord's default."""
        if limit is not None:
            self.limit = limit
        self._call(PATIENCE, order=Order("open", limit))
        self.forgotten = False  # nobody waits yet

    def take(
        self,
        ticket: Waits,
        *,
        stays: bool,
        reserve: int,
        can_refresh: bool,
        heir: Waits | None = None,
    ) -> tuple[Permit | Denial, int]:
        """Ask for a ticket's permit; one that is denied and does not stay stands in no line.

        The second value is how long the heir, who is next in line here, may sleep if the permit was
        granted, in microseconds; 0 if it has to ask.
        """
        take = Take(
            ticket.number,
            ticket.shard_id,
            ticket.arrived_us,
            ticket.position_us,
            stays,
            reserve,
            can_refresh,
            None
            if heir is None
            else Next(heir.number, heir.shard_id, heir.arrived_us, heir.position_us),
        )
        reply = self._call(MIN_PATIENCE if stays else SHORT_PATIENCE, take=take)
        outcome = reply.outcome
        kind = OUTCOMES[outcome.kind]
        if isinstance(kind, Reason):
            if kind is Reason.RESET and outcome.us:
                kind = Reason.WINDOW  # another process reads the limit: wait for that, too
            wait_us = self._left_us(outcome.us, reply)
            left = reply.remaining, reply.resets_in_us, reply.period, reply.granted
            return Denial(wait_us, kind, *left), 0
        if kind is not Permit:
            raise LedgerError(f"{self!r} answered nonsense") from ValueError(outcome)
        seen_us = reply.now_us if self.shares_clock else reply.asked_us
        permit = Permit(ticket.shard_id, outcome.bucket, remaining=outcome.left)
        permit.serial, permit.period, permit.waiter = outcome.serial, reply.period, ticket.number
        permit.stamp_us = seen_us - outcome.us
        return permit, self._left_us(outcome.next_us, reply) if outcome.next_us else 0

    def _left_us(self, sleep_us: int, reply: Reply) -> int:
        """Return what is left of a sleep that the ledger has told."""
        if not self.shares_clock:
            return sleep_us  # by half a round trip too long, rather than too short and ask twice
        return max(0, sleep_us + reply.now_us - self._clock.now_us())

    def tell(self, *, patient: bool = False) -> None:
        """Tell the news, if there is any and this thread is not in the midst of that."""
        while self._news and not self._is_inside():
            self._tell(MIN_PATIENCE if patient else 0.0)

    def adopt(self, limit: SessionStartLimit) -> None:
        """Take a limit as it is given."""
        self._call(PATIENCE, order=Order("update", limit))

    def renew(self, limit: SessionStartLimit, denial: Denial) -> SessionStartLimit | None:
        """Adopt what was read at the reset that a denial told of, or return ``None``: overtaken."""
        reply = self._call(PATIENCE, order=Order("renew", limit, denial.period, denial.granted))
        return self.limit if reply.booked else None

    def trust(self, denial: Denial) -> bool:
        """Let the last known total count at the reset that a denial told of; false: overtaken."""
        return self._call(PATIENCE, order=Order("trust", None, denial.period)).booked

    def look(self, *, patient: bool) -> Reply:
        """Return the account, and who waits for which bucket in which order."""
        return self._call(PATIENCE if patient else 0.0, look=True)

    def peek(self) -> Reply:
        """Return what ``look`` does, as a stranger that leaves no trace."""
        return self.carry(self._request(look=True)._replace(owner=""), PATIENCE)

    @abstractmethod
    def carry(self, request: Request, patience: float = 0.0) -> Reply:
        """Have the ledger answer a request, in one atomic step.

        If others hold it, it may wait for so many seconds, where nobody would try again.

        Raises:
            LedgerError: it is out of reach or answers nonsense; whether it has heard is not known.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held open; a later call opens it anew, and closes it again."""

    def _is_inside(self) -> bool:
        """Return whether this thread is in the midst of a call: a signal handler has interrupted it."""
        return bool(self._telling._is_owned())  # type: ignore[attr-defined]

    def _call(self, patience: float, **what: Any) -> Reply:
        """Send a request with the news there is; two with news never cross."""
        if self._is_inside():
            raise reentered()
        if self._news:
            reply = self._tell(patience, **what)
            if reply is not None:
                return reply
        return self._send((), patience, **what)

    def _tell(self, patience: float, **what: Any) -> Reply | None:
        """Send a request with news, unless somebody else has just told it, or failed to."""
        seen = self._failure
        with self._telling:
            failure = self._failure
            if failure is not None and failure is not seen:
                raise LedgerError(*failure.args) from failure.__cause__
            news = tuple(self._news.copy())[:MAX_NEWS]
            if not news:
                return None
            reply = self._send(news, patience, **what)
            for _ in news:
                self._news.popleft()
            return reply

    def _send(self, news: tuple[News, ...], patience: float, **what: Any) -> Reply:
        """Send a request; one that fails is void from now on, should it still come to be heard."""
        request = self._request(news, **what)
        try:
            reply = self.carry(request, patience)
            if reply.void:
                raise LedgerError(f"{self!r} heard too late") from TimeoutError()
        except BaseException as error:
            self._void = max(self._void, request.number)
            if isinstance(error, LedgerError):
                self._failure = error
            raise
        self._failure = None
        return self._learn(reply._replace(asked_us=request.at_us or 0))

    def _request(self, news: tuple[News, ...] = (), **what: Any) -> Request:
        terms = self.terms
        return Request(
            self._owner,
            next(self._numbers),
            self._void,
            None if self.shares_clock else self._clock.now_us(),
            terms.interval_us,
            terms.margin_us,
            terms.period_us,
            terms.lease_us,
            self.limit,
            self.period,
            self.granted,
            news,
            **what,
        )

    def _learn(self, reply: Reply) -> Reply:
        """Remember what an answer tells of the account."""
        try:
            limit = SessionStartLimit(
                reply.total,
                reply.remaining,
                min(reply.resets_in_us / US_PER_SECOND, MAX_RESET_AFTER),
                reply.max_concurrency,
            )
        except (TypeError, ValueError) as error:
            raise LedgerError(f"{self!r} answered nonsense: {error}") from error
        if reply.granted >= self.granted:  # it was not overtaken by another one on its way
            self.limit, self.period, self.granted = limit, reply.period, reply.granted
            self.learned_us = self._clock.now_us()
        self.forgotten = self.forgotten or not reply.known
        self._compare(reply)
        return reply

    def _compare(self, reply: Reply) -> None:
        """Remember the window that counts; warn, once, if another process wants a longer one."""
        terms = self.terms
        self.window_us = reply.interval_us + reply.margin_us
        disagrees = reply.interval_us > terms.interval_us or reply.margin_us > terms.margin_us
        if disagrees and not self._disagrees:
            log.warning(
                "%r: other processes want interval=%g, margin=%g, this one %g and %g; the larger count",
                self,
                reply.interval_us / US_PER_SECOND,
                reply.margin_us / US_PER_SECOND,
                terms.interval_us / US_PER_SECOND,
                terms.margin_us / US_PER_SECOND,
            )
        self._disagrees = disagrees
