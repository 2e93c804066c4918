"""Ledgers: where it is kept who was granted what, when: in this process, or shared by processes.

A *local* ledger is asked under the scheduler's lock, and answers at once. A *remote* one is only ever
asked by the scheduler's worker, without the lock: everything that a process wants of it goes along in
one exchange.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.forecast import Outlook, Waits
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.lines import Waiter
from gateway_queue_sync.models import Permit, Report, SessionStartLimit
from gateway_queue_sync.token_bucket import Denial


class Known(Protocol):
    """What is known of any ledger here."""

    @property
    def max_concurrency(self) -> int:
        """How many buckets there are."""

    @property
    def margin_us(self) -> int:
        """How old a permit may be when it reaches its caller; 0: any age."""

    @property
    def window_us(self) -> int:
        """How long a bucket rests after a permit."""

    @property
    def granted(self) -> int:
        """How many permits were granted."""

    def budget(self) -> Budget | None:
        """Return what is left of the limit, ``None`` if none is kept."""


class Placed(Waits, Protocol):
    """Somebody who waits in any process."""

    @property
    def place(self) -> tuple[int, int]:
        """What the line is sorted by."""


@dataclass(slots=True, eq=False)
class Request:
    """Something that a process asks of a remote ledger, besides permits.

    ``update``: take ``limit`` as it is given. ``renew``: it was read at the reset that ``denial`` told
    of; the ``limit`` that was adopted is the answer, ``None`` if an update came before it. ``trust``: it
    could not be read. ``look``: say who waits where. The answer is ``outlook``, by the ledger's clock,
    which is ahead by ``ahead_us``, the time here (``at_us``), and the waiters of each bucket in order.
    ``error`` is set in place of an answer.
    """

    kind: Literal["update", "renew", "trust", "look"]
    limit: SessionStartLimit | None = None
    denial: Denial | None = None
    outlook: Outlook | None = None
    lines: dict[int, list[Placed]] = field(default_factory=dict)
    at_us: int = 0
    ahead_us: int = 0
    error: LedgerError | ValueError | None = None
    done: bool = False
    condition: threading.Condition | None = None

    def position(self, waiter: Waiter) -> int:
        """Return how many stood before a waiter of this process, in all processes."""
        assert self.outlook is not None
        line = self.lines.get(waiter.shard_id % self.outlook.max_concurrency, [])
        place = waiter.position_us + self.ahead_us, waiter.number
        return bisect_left(line, place, key=lambda one: one.place)


@dataclass(slots=True)
class Wants:
    """All that a process wants of a remote ledger at one time."""

    heads: list[Waiter] = field(default_factory=list)  # who ask for a permit
    joined: list[Waiter] = field(default_factory=list)
    left: list[Waiter] = field(default_factory=list)
    reports: list[tuple[Permit, Report, int]] = field(
        default_factory=list
    )  # and when each was made
    requests: list[Request] = field(default_factory=list)
    can_read: bool = False  # the process can read the limit at a reset

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.heads or self.joined or self.left or self.reports or self.requests)


@dataclass(slots=True)
class Answers:
    """What a remote ledger answered: for each head a permit, or how long to wait and why."""

    heads: dict[Waiter, Permit | Denial] = field(default_factory=dict)
    failure: LedgerError | None = None  # it was out of reach: what has no answer is asked again
    unsent: bool = False  # there is something to send when it can be reached again
    forgotten: bool = False  # it did not know this process: who waits here must join again


class Exchange(Known, Protocol):
    """Where the account of several processes is, as one of them asks it."""

    @property
    def period_us(self) -> int:
        """How long a limit lasts from its first grant on."""

    def budget(self) -> Budget:
        """Return what is left of the limit."""

    def exchange(self, wants: Wants) -> Answers:
        """Send all that is wanted and return the answers; what could not be sent is sent next time."""

    def begin_anew(self) -> None:
        """Be another process from now on: this one was forked."""

    def close(self) -> None:
        """Let go of what is held open."""
