"""What ledgers that processes share have in common: this process's side of the talk with them.

What needs no answer (who joined, who left, what became of a permit) is kept as news and goes along
with the next call. A call that fails leaves it here, and telling it twice changes nothing: so whatever
is lost on the way, the ledger hears of everything once it is back.
"""

from __future__ import annotations

import logging
import secrets
import threading
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from gateway_queue_sync.clock import Clock
from gateway_queue_sync.errors import BrokerError
from gateway_queue_sync.messages import OUTCOMES, News, Next, Order, Reply, Request, Take
from gateway_queue_sync.models import Report, SessionStartLimit
from gateway_queue_sync.rules import MICROSECOND, NEVER, Denial, Grant, Reason
from gateway_queue_sync.turns import SharedGrant

log = logging.getLogger("gateway_queue_sync")

DISCORDS_DEFAULT = SessionStartLimit(total=1000, remaining=1000, reset_after=0.0, max_concurrency=1)
DEFAULT_LEASE = 5.0
"""Seconds for which a process counts that was not heard of."""

LEAST_MARGIN = 0.02  # s; what any machine needs to bring a permit back
MOST_NEWS = 1_000  # in one call


@dataclass(frozen=True, slots=True)
class Terms:
    """What a process wants of an account, in microseconds; ``lease_us`` is how long it counts."""

    interval_us: int
    margin_us: int
    period_us: int
    lease_us: int


class Waits(Protocol):
    """A ticket, as far as a ledger is told of it."""

    shard_id: int
    arrived_us: int
    place: tuple[int, int]

    @property
    def number(self) -> int:
        """What tells the ticket from all others of this process."""


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
        self.limit = DISCORDS_DEFAULT
        self.period = self.granted = 0
        self._begin()

    def _begin(self) -> None:
        self._owner = secrets.token_hex(8)
        self._news: deque[News] = deque()
        self._telling = threading.RLock()  # news arrives in its order: one call at a time has some
        self._floors: dict[int, tuple[int, int]] = {}  # the newest grant seen of each bucket
        self.forgotten = False

    def begin_anew_after_fork(self) -> None:
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
                place_us=ticket.place[0],
            )
        )

    def left(self, ticket: Waits) -> None:
        """Note that a ticket stands in no line, and that it wants no permit that it was given."""
        self._news.append(News("left", ticket.number, ticket.shard_id))

    def report(self, grant: Grant, report: Report) -> None:
        """Note what became of a permit."""
        assert isinstance(grant, SharedGrant)
        now_us = self._clock.now_us()
        self._news.append(
            News(report.value, grant.ticket, grant.shard_id, grant.serial, at_us=now_us)
        )

    # --- calls: each may raise BrokerError --------------------------------------------------------

    def open(self, limit: SessionStartLimit | None) -> None:
        """Begin, with a limit if there is news of it; else the ledger's, or Discord's default."""
        if limit is not None:
            self.limit = limit
        self._call(order=Order("open", limit))
        self.forgotten = False  # nobody waits yet

    def take(
        self,
        ticket: Waits,
        *,
        stays: bool,
        reserve: int,
        can_refresh: bool,
        heir: Waits | None = None,
    ) -> tuple[SharedGrant | Denial, int]:
        """Ask for a ticket's permit; one that is denied and does not stay stands in no line.

        The second value is how long the heir, who is next in line here, may sleep if the permit was
        granted, in microseconds; 0 if it has to ask.
        """
        bucket = ticket.shard_id % self.max_concurrency
        take = Take(
            ticket.number,
            ticket.shard_id,
            ticket.arrived_us,
            ticket.place[0],
            stays,
            reserve,
            can_refresh,
            *self._floors.get(bucket, (NEVER, 0)),
            None
            if heir is None
            else Next(heir.number, heir.shard_id, heir.arrived_us, heir.place[0]),
        )
        asked_us = self._clock.now_us()
        reply = self._call(take=take)
        outcome = reply.outcome
        self._floors[ticket.shard_id % reply.max_concurrency] = outcome.last_us, reply.granted
        kind = OUTCOMES[outcome.kind]
        if isinstance(kind, Reason):
            if kind is Reason.RESET and outcome.us:
                kind = Reason.WINDOW  # another process reads the limit: wait for that, too
            wait_us = self._left_us(outcome.us, reply)
            left = reply.remaining, reply.resets_in_us, reply.period, reply.granted
            return Denial(wait_us, kind, *left), 0
        seen_us = reply.now_us if self.shares_clock else asked_us
        grant = SharedGrant(
            outcome.serial,
            ticket.shard_id,
            outcome.bucket,
            seen_us - outcome.us,
            outcome.left,
            reply.period,
        )
        grant.ticket = ticket.number
        return grant, self._left_us(outcome.next_us, reply) if outcome.next_us else 0

    def _left_us(self, sleep_us: int, reply: Reply) -> int:
        """Return what is left of a sleep that the ledger has told."""
        if not self.shares_clock:
            return sleep_us  # by half a round trip too long, rather than too short and ask twice
        return max(0, sleep_us + reply.now_us - self._clock.now_us())

    def tell(self) -> None:
        """Tell the news, if there is any and this thread is not in the midst of that."""
        while self._news and not self._telling._is_owned():  # type: ignore[attr-defined]
            with self._telling:
                self._tell()

    def adopt(self, limit: SessionStartLimit) -> None:
        """Take a limit as it is given."""
        self._call(order=Order("update", limit))

    def renew(self, limit: SessionStartLimit, denial: Denial) -> SessionStartLimit | None:
        """Adopt what was read at the reset that a denial told of, or return ``None``: overtaken."""
        reply = self._call(order=Order("renew", limit, denial.period, denial.granted))
        return self.limit if reply.booked else None

    def trust(self, denial: Denial) -> bool:
        """Let the last known total count at the reset that a denial told of; false: overtaken."""
        return self._call(order=Order("trust", None, denial.period)).booked

    def look(self) -> Reply:
        """Return the account, and who waits for which bucket in which order."""
        return self._call(look=True)

    def peek(self) -> Reply:
        """Return what ``look`` does, as a stranger that leaves no trace."""
        return self.carry(self._request((), {"look": True})._replace(owner=""))

    @abstractmethod
    def carry(self, request: Request) -> Reply:
        """Have the ledger answer a request, in one atomic step.

        Raises:
            BrokerError: it is out of reach or answers nonsense; whether it has heard is not known.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held open; a later call opens it anew, and closes it again."""

    def _call(self, **what: Any) -> Reply:
        """Send a request with the news there is; two with news never cross."""
        if self._news and not self._telling._is_owned():  # type: ignore[attr-defined]
            with self._telling:
                reply = self._tell(**what)
            if reply is not None:
                return reply
        return self._learn(self.carry(self._request((), what)))

    def _tell(self, **what: Any) -> Reply | None:
        """Send a request with news, unless somebody else has just told it."""
        news = tuple(self._news.copy())[:MOST_NEWS]
        if not news:
            return None
        reply = self._learn(self.carry(self._request(news, what)))
        for _ in news:
            self._news.popleft()
        return reply

    def _request(self, news: tuple[News, ...], what: dict[str, Any]) -> Request:
        terms = self.terms
        return Request(
            self._owner,
            None if self.shares_clock else self._clock.now_us(),
            terms.interval_us,
            terms.margin_us,
            terms.period_us,
            terms.lease_us,
            self.limit,
            news,
            **what,
        )

    def _learn(self, reply: Reply) -> Reply:
        """Remember what an answer tells of the account."""
        try:
            limit = SessionStartLimit(
                reply.total,
                reply.remaining,
                reply.resets_in_us / MICROSECOND,
                reply.max_concurrency,
            )
        except (TypeError, ValueError) as error:
            raise BrokerError(f"{self!r} answered nonsense: {error}") from error
        if limit.max_concurrency != self.limit.max_concurrency:
            self._floors = {}
        self.limit, self.period, self.granted = limit, reply.period, reply.granted
        self.forgotten = self.forgotten or not reply.known
        self._compare(reply)
        return reply

    def _compare(self, reply: Reply) -> None:
        """Warn, once, that another process wants a longer window."""
        terms = self.terms
        disagrees = reply.interval_us > terms.interval_us or reply.margin_us > terms.margin_us
        if disagrees and not self._disagrees:
            log.warning(
                "%r: other processes want interval=%g, margin=%g, this one %g and %g; the larger count",
                self,
                reply.interval_us / MICROSECOND,
                reply.margin_us / MICROSECOND,
                terms.interval_us / MICROSECOND,
                terms.margin_us / MICROSECOND,
            )
        self._disagrees = disagrees
