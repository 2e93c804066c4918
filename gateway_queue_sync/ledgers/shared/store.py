"""What a shared ledger stores: an account, and rows, of which a request touches a few."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

from gateway_queue_sync.ledgers.shared.messages import Waiter, from_wire, to_wire
from gateway_queue_sync.models import US_PER_SECOND
from gateway_queue_sync.token_bucket import NEVER, Account, TokenBucket


class LineRow(NamedTuple):
    """A session's line for a bucket, with times by the ledger's clock; live until ``until_us``.

    It is stored as text, and its first waiters are JSON in it: a request reads and writes the lines of
    all sessions that wait for a bucket, but needs the waiters of its own only.

    Attributes:
        position_us: of its head.
        waiting: how many wait in it.
    """

    session: str
    until_us: int
    position_us: int
    waiting: int
    first: str

    @classmethod
    def of(cls, session: str, until_us: int, more: int, waiters: Sequence[Waiter]) -> LineRow:
        """Return the line of these waiters, and so many more."""
        first = json.dumps(to_wire(tuple(waiters)), separators=(",", ":"))
        return cls(session, until_us, waiters[0].position_us, len(waiters) + more, first)

    @classmethod
    def from_text(cls, text: str) -> LineRow:
        """Return a line that was stored."""
        session, until_us, position_us, waiting, first = text.split(" ", 4)
        return cls(session, int(until_us), int(position_us), int(waiting), first)

    def text(self) -> str:
        """Return the line as it is stored."""
        return f"{self.session} {self.until_us} {self.position_us} {self.waiting} {self.first}"

    @property
    def waiters(self) -> tuple[Waiter, ...]:
        """The first waiters."""
        return from_wire(tuple[Waiter, ...], json.loads(self.first))


@dataclass(slots=True)
class SharedBucket(TokenBucket):
    """A bucket, with the lines of all sessions that wait for it.

    Attributes:
        opened_us: if the bucket opened early, the earliest time from which graces count.
        lines: at most one of each session.
    """

    opened_us: int = NEVER
    lines: tuple[LineRow, ...] = ()

    def waiting(self, but_for: str = "") -> int:
        """Return how many wait for it, in all sessions but one."""
        return sum(row.waiting for row in self.lines if row.session != but_for)


@dataclass(slots=True)
class SharedAccount(Account):
    """An account that processes share.

    Attributes:
        bot: the id of the bot that starts the sessions; empty if unknown.
        interval_us, margin_us: the largest of all live processes; together the window.
        held_us: the longest time for which a permit was held.
        interval_until_us, margin_until_us: until when a smaller one does not count.
        differs_until_us: until when replies say that processes have different ones.
        layout: counts how often all buckets were replaced; a request's lines must be for the latest.
        opened_us: the same for all buckets, after a shorter window or new session starts.
        settle_until_us: no permit is granted until then, because sessions send their lines again.
        reader, reader_until_us: the session that reads the limit, and until when no other may.
        read_us, read_due_us: when the limit was read, and when it should be again. Only a process that
            can read it sets the first, so that others know that there is one.
    """

    bot: str = ""
    interval_us: int = 0
    margin_us: int = 0
    held_us: int = 0
    interval_until_us: int = NEVER
    margin_until_us: int = NEVER
    differs_until_us: int = NEVER
    layout: int = 0
    opened_us: int = NEVER
    settle_until_us: int = NEVER
    reader: str = ""
    reader_until_us: int = NEVER
    read_us: int = NEVER
    read_due_us: int = NEVER

    @property
    def has_reader(self) -> bool:
        """Whether a process that can read the limit uses this account, or has used it."""
        return self.read_us > NEVER


ACCOUNT_FIELDS = [
    field.name
    for field in fields(SharedAccount)
    if field.name not in ("buckets", "default_bucket", "recent", "patience_us", "other_reset")
]
DEFAULT_FIELDS = ("last_us", "hold_us", "closed_until_us", "rejections")  # of the default bucket
BUCKET_FIELDS = [field.name for field in fields(SharedBucket)]  # the lines come last

SILENT_US = 60 * US_PER_SECOND
"""How long after its last request a session counts as removed."""


class SessionRow(NamedTuple):
    """A session: the number of its latest request, and the reply to it as JSON."""

    session: str
    number: int
    last_request_us: int
    reply: str


class Store(Protocol):
    """The rows of an account, in a transaction. What it returns is a copy."""

    def account(self) -> SharedAccount | None:
        """Return the account without its buckets (but with ``default_bucket``)."""

    def put_account(self, account: SharedAccount) -> None:
        """Store the account without its buckets."""

    def bucket(self, number: int) -> SharedBucket | None:
        """Return a bucket that was stored."""

    def buckets(self) -> dict[int, SharedBucket]:
        """Return all buckets that were stored."""

    def put_bucket(self, number: int, bucket: SharedBucket) -> None:
        """Store a bucket."""

    def drop_buckets(self) -> None:
        """Delete all buckets."""

    def session(self, session: str) -> SessionRow | None:
        """Return a session, if it is stored."""

    def put_session(self, row: SessionRow) -> None:
        """Store a session. The store may delete sessions that are silent (``SILENT_US``) then."""

    def drop_session(self, session: str) -> None:
        """Delete a session."""

    def recent(self) -> dict[int, int]:
        """Return when the latest permits were granted, by serial."""

    def put_recent(self, serial: int, wall_us: int) -> None:
        """Store when a permit was granted."""

    def drop_recent(self, serial: int) -> bool:
        """Delete a recent permit, and return whether it was stored."""

    def drop_recent_before(self, wall_us: int) -> None:
        """Delete the recent permits that were granted before then."""
