"""The values that a session gets from its scheduler, and those that it returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared.messages import Limit, Look
from gateway_queue_sync.models import Permit, SessionStartLimit
from gateway_queue_sync.token_bucket import Denial


class Waits(Protocol):
    """A waiter of this process."""

    number: int
    shard_id: int
    arrived_us: int
    position_us: int
    once: bool
    hold_us: int


class WaitingLines(Protocol):
    """The lines of this process, without those who have a permit already."""

    max_concurrency: int

    def first_two(self, bucket: int) -> Sequence[Waits]:
        """Return the first two waiters of a line, or all if there are fewer."""

    def length(self, bucket: int) -> int:
        """Return how many wait for a bucket."""

    def buckets(self) -> Iterable[int]:
        """Return the buckets that have waiters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """The settings of a session."""

    interval_us: int
    margin_us: int
    period_us: int
    lease_us: int
    reserve: int = 0
    reread_us: int = 0
    bot: str = ""
    limit: SessionStartLimit | None = None


@dataclass(slots=True, eq=False)
class LimitChange:
    """A limit that is sent to the ledger. When ``done``, it was ``applied`` or has an ``error``."""

    limit: Limit
    done: bool = False
    applied: bool = False
    error: LedgerError | None = None


@dataclass(slots=True)
class Answers:
    """What a reply means for the scheduler.

    Attributes:
        permits: granted; one for a waiter that has left must be reported unused.
        denials: for the others that the ledger has answered, by waiter number.
        changes: limit changes that are done.
        limit_changed: the session start limit or the buckets may have changed.
        read: this process should read the limit now.
        uncounted: what a read says is left, if a smaller number counts instead; else ``None``.
        rejected_often: the shards whose rejected permit was the tenth in a row of its bucket.
        look: the waiters of all processes, if the request asked for them.
        error: the ledger refuses this process, or its latest request.
        refused: the waiters of the refused request, by number; ``None``: all waiters of this process.
        warnings: what to log.
    """

    permits: list[Permit] = field(default_factory=list)
    denials: dict[int, Denial] = field(default_factory=dict)
    changes: list[LimitChange] = field(default_factory=list)
    limit_changed: bool = False
    read: bool = False
    uncounted: int | None = None
    rejected_often: list[int] = field(default_factory=list)
    look: Look | None = None
    error: LedgerError | None = None
    refused: list[int] | None = None
    warnings: list[str] = field(default_factory=list)
