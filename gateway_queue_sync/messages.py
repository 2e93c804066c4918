"""What processes say to the ledger that they share, and what it answers: plain values.

Times in a request are those of the asking process's clock, and in a reply durations, or of the ledger's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from gateway_queue_sync.models import Permit, SessionStartLimit
from gateway_queue_sync.token_bucket import Reason

OUTCOMES = (None, Permit, Reason.WINDOW, Reason.BUDGET, Reason.RESET)  # what Reply.outcome counts


class News(NamedTuple):
    """What a process tells of one of its tickets, and no answer is needed for.

    ``joined``: it stands in a line, since ``at_us``, at ``place_us``. ``left``: it does not, and what
    was granted to it is given back. ``sent`` and ``rejected`` (at ``at_us``) and ``unused`` are its
    holder's reports on permit ``serial``. Hearing news twice changes nothing.
    """

    kind: Literal["joined", "left", "sent", "unused", "rejected"]
    ticket: int
    shard_id: int = 0
    serial: int = 0
    at_us: int = 0
    place_us: int = 0


class Next(NamedTuple):
    """The ticket of the same process that is next in a line, since ``at_us``, at ``place_us``."""

    ticket: int
    shard_id: int
    at_us: int
    place_us: int


class Take(NamedTuple):
    """The wish for a permit of a ticket that is the first of its process for its bucket.

    It waits since ``at_us``, at ``place_us``; one that does not ``stay`` only tries. ``reserve`` and
    ``can_refresh`` are as in the rules. If the permit is granted, ``next`` takes the ticket's stead in
    the line.
    """

    ticket: int
    shard_id: int
    at_us: int
    place_us: int
    stays: bool = True
    reserve: int = 0
    can_refresh: bool = False
    next: Next | None = None


class Order(NamedTuple):
    """A limit to adopt, or (``trust``) that none could be read.

    ``open``: a process has begun with it. ``update``: as it is given. ``renew``: it was read at the
    reset of ``period``, when ``granted`` permits had been.
    """

    kind: Literal["open", "update", "renew", "trust"]
    limit: SessionStartLimit | None = None
    period: int = 0
    granted: int = 0


class Request(NamedTuple):
    """One message of a process to the ledger. With no ``owner`` it only looks, and leaves no trace.

    ``number`` counts a process's requests; those up to ``void`` that come later than this one were
    given up, and do nothing. ``at_us`` is when it was sent, by the clock of all times in it; ``None``
    if that is the ledger's. ``limit``, ``period`` and ``granted`` are what the process knows of the
    account (with an ``open`` order: its limit, if it has one), for a ledger that has lost it.
    """

    owner: str
    number: int
    void: int
    at_us: int | None
    interval_us: int
    margin_us: int
    period_us: int
    lease_us: int
    limit: SessionStartLimit
    period: int
    granted: int
    news: tuple[News, ...] = ()
    order: Order | None = None
    take: Take | None = None
    look: bool = False


class Waiter(NamedTuple):
    """A ticket that waits, for those who look: by the ledger's clock."""

    ticket: int
    shard_id: int
    arrived_us: int
    place_us: int

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands; among those of one process that came at one instant, as they came."""
        return self.place_us, self.ticket


class Outcome(NamedTuple):
    """What came of a wish for a permit: whole numbers throughout.

    ``kind`` counts ``OUTCOMES``. ``us`` is the permit's age, or the time to sleep before asking again;
    ``left`` the session starts left after the permit; ``next_us`` how long the next of the process may
    sleep, 0 if it has to ask.
    """

    kind: int = 0
    us: int = 0
    serial: int = 0
    bucket: int = 0
    left: int = 0
    next_us: int = 0


class Reply(NamedTuple):
    """What the ledger answers to the request of that ``number``: whole numbers throughout.

    ``void`` says that it had been given up, and was not heard. ``known`` is false if the ledger did
    not know the process, nor who waits there (to one that only looks: if it knows nothing at all).
    ``booked`` is false if a renewal was overtaken. The rest tells of the account, and of who waits if
    that was asked.
    """

    number: int
    void: bool
    known: bool
    booked: bool
    total: int
    remaining: int
    resets_in_us: int
    max_concurrency: int
    period: int
    granted: int
    interval_us: int
    margin_us: int
    period_us: int
    reserve: int  # that of whoever asked for a permit last
    outcome: Outcome = Outcome()
    ready_in_us: tuple[tuple[int, int], ...] = ()  # of the buckets that were used, by number
    others_ready_in_us: int = 0  # of the buckets that were not
    waiting: tuple[Waiter, ...] = ()  # as they stand
    now_us: int = 0  # by the ledger's clock
    asked_us: int = 0  # when the request was sent, by the process's; filled in there


def in_order(waiters: Iterable[Waiter]) -> tuple[Waiter, ...]:
    """Return those who wait as they stand."""
    return tuple(sorted(waiters, key=lambda one: (one.place, one)))
