"""What a shared ledger stores: an account, and rows, of which a request touches a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gateway_queue_sync.ledgers.shared.messages import Waiter
from gateway_queue_sync.token_bucket import NEVER, Account, TokenBucket


@dataclass(slots=True)
class SharedBucket(TokenBucket):
    """A bucket. Graces count from ``opened_us``; ``waiting`` counts the waiters of all sessions."""

    opened_us: int = NEVER
    waiting: int = 0


@dataclass(slots=True)
class SharedAccount(Account):
    """An account that processes share.

    Attributes:
        bot: the id of the bot that starts the sessions; empty if unknown.
        interval_us, margin_us: the largest of all live processes; together the window.
        interval_until_us, margin_until_us: until when a smaller one does not count.
        differs_until_us: until when replies say that processes have different ones.
        layout: the number of the division into buckets; lines for an earlier one do not count.
        opened_us: graces do not count from earlier, because session starts came back then.
        settle_until_us: no permit is granted until then, because sessions send their lines again.
        reader, reader_until_us: the session that reads the limit, and until when no other may.
        read_us, read_due_us: when the limit was read, and when it should be again.
    """

    bot: str = ""
    interval_us: int = 0
    margin_us: int = 0
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


class SessionRow(NamedTuple):
    """A session: the number of its latest request, and the reply to it as JSON."""

    session: str
    number: int
    last_request_us: int
    layout: int
    reply: str


class LineRow(NamedTuple):
    """A session's line for a bucket, with times by the ledger's clock; live until ``until_us``."""

    layout: int
    bucket: int
    session: str
    until_us: int
    more: int
    waiters: tuple[Waiter, ...]

    @property
    def waiting(self) -> int:
        """How many wait in it."""
        return len(self.waiters) + self.more


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
        """Return a session."""

    def put_session(self, row: SessionRow) -> None:
        """Store a session."""

    def drop_session(self, session: str) -> None:
        """Delete a session's row, not its lines."""

    def silent(self, before_us: int, after_us: int, at_most: int) -> list[SessionRow]:
        """Return sessions whose last request was before the first time or after the second."""

    def line(self, layout: int, bucket: int, session: str) -> LineRow | None:
        """Return a session's line."""

    def put_line(self, row: LineRow) -> None:
        """Store a session's line."""

    def drop_line(self, row: LineRow) -> None:
        """Delete a session's line."""

    def lines_of(self, session: str) -> list[LineRow]:
        """Return all lines of a session."""

    def live(self, layout: int, bucket: int, after_us: int, up_to_us: int) -> list[LineRow]:
        """Return the lines for a bucket that are live until a time between these two."""

    def recent(self) -> dict[int, int]:
        """Return when the latest permits were granted, by serial."""

    def put_recent(self, serial: int, wall_us: int) -> None:
        """Store when a permit was granted."""

    def drop_recent(self, serial: int) -> bool:
        """Delete a recent permit, and return whether it was stored."""

    def drop_recent_before(self, wall_us: int) -> None:
        """Delete the recent permits that were granted before then."""
