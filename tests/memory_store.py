"""A store of rows in memory, for tests of the rules that processes share."""

from __future__ import annotations

import copy

from gateway_queue_sync.ledgers.shared import turns
from gateway_queue_sync.ledgers.shared.messages import Reply, Request
from gateway_queue_sync.ledgers.shared.store import (
    SILENT_US,
    LineRow,
    SessionRow,
    SharedAccount,
    SharedBucket,
)


class Failed(Exception):
    """A write failed, as a test wanted it."""


class MemoryStore:
    """What ``store.Store`` says, in dictionaries. What goes in and out is copied.

    ``reads`` counts the rows that were read and written; ``events`` are grants and refunds.
    """

    rolls_back = True
    keeps_silent = False  # as Redis does while no time passes by its own clock
    computed_us = 0  # how long ago the rows were read that the latest reply was computed from

    def __init__(self) -> None:
        self._account: SharedAccount | None = None
        self._buckets: dict[int, SharedBucket] = {}
        self._sessions: dict[str, SessionRow] = {}
        self._recent: dict[int, int] = {}
        self._refunded: set[int] = set()
        self.granted_to: dict[int, str] = {}  # sessions, by serial
        self._asks = ""
        self.rows = 0
        self.events: list[tuple[str, int]] = []
        self.fails_after: int | None = None

    def close(self) -> None:
        pass

    def answer(self, request: Request, now_us: int, wall_us: int, *, lost: bool = False) -> Reply:
        """Answer a request; if a write fails, nothing is stored."""
        before = self.copy() if self.fails_after is not None else None
        self.events, self._asks = [], request.session
        try:
            return turns.answer(self, request, now_us, wall_us, lost=lost)
        except Failed:
            if before is not None and self.rolls_back:
                self.restore(before)
            raise
        finally:
            self.fails_after = None

    def trip(
        self, request: Request, known: list[object], now_us: int, wall_us: int, *, lost: bool
    ) -> Reply:
        """Answer a request, which needs one trip only."""
        assert not known
        return self.answer(request, now_us, wall_us, lost=lost)

    def is_empty(self) -> bool:
        return self._account is None

    def sessions(self) -> set[str]:
        """Return the ids of the sessions that are stored."""
        return set(self._sessions)

    def silence(self, session: str, now_us: int) -> bool:
        """Let a session count as silent; False if it is unknown."""
        row = self._sessions.get(session)
        if row is not None:
            last_request_us = now_us - SILENT_US - 1_000_000
            self._sessions[session] = row._replace(last_request_us=last_request_us)
        return row is not None

    def copy(self) -> MemoryStore:
        """Return another store with the same rows."""
        other = MemoryStore()
        other.restore(self)
        return other

    def restore(self, other: MemoryStore) -> None:
        """Go back to the rows of another store."""
        self._account = copy.deepcopy(other._account)
        self._buckets = {number: copy.copy(one) for number, one in other._buckets.items()}
        self._sessions = dict(other._sessions)
        self._recent = dict(other._recent)
        self._refunded = set(other._refunded)
        self.granted_to = dict(other.granted_to)

    def _write(self) -> None:
        self.rows += 1
        if self.fails_after is not None:
            if self.fails_after == 0:
                raise Failed
            self.fails_after -= 1

    # --- rows -------------------------------------------------------------------------------------

    def account(self) -> SharedAccount | None:
        self.rows += 1
        account = copy.copy(self._account)
        if account is not None:
            account.buckets = {}
            account.default_bucket = copy.copy(account.default_bucket)
        return account

    def put_account(self, account: SharedAccount) -> None:
        self._write()
        self._account = copy.copy(account)
        self._account.default_bucket = copy.copy(account.default_bucket)

    def bucket(self, number: int) -> SharedBucket | None:
        self.rows += 1
        return copy.copy(self._buckets.get(number))

    def buckets(self) -> dict[int, SharedBucket]:
        self.rows += len(self._buckets)
        return {number: copy.copy(bucket) for number, bucket in self._buckets.items()}

    def put_bucket(self, number: int, bucket: SharedBucket) -> None:
        self._write()
        self._buckets[number] = copy.copy(bucket)

    def drop_buckets(self) -> None:
        self._write()
        self._buckets.clear()

    def session(self, session: str) -> SessionRow | None:
        self.rows += 1
        return self._sessions.get(session)

    def put_session(self, row: SessionRow) -> None:
        self._write()
        for silent in list(self._sessions.values()):
            is_silent = row.last_request_us - silent.last_request_us > SILENT_US
            if is_silent and not self.keeps_silent:
                del self._sessions[silent.session]
        self._sessions[row.session] = row

    def live(self, number: int, now_us: int) -> list[LineRow]:
        """Return the lines of a bucket that are live."""
        bucket = self._buckets.get(number)
        return [] if bucket is None else [one for one in bucket.lines if one.until_us > now_us]

    def all_live(self, now_us: int) -> list[LineRow]:
        """Return the lines of all buckets that are live."""
        return [row for number in self._buckets for row in self.live(number, now_us)]

    def drop_session(self, session: str) -> None:
        self._write()
        self._sessions.pop(session, None)

    def recent(self) -> dict[int, int]:
        self.rows += len(self._recent)
        return dict(self._recent)

    def put_recent(self, serial: int, wall_us: int) -> None:
        self._write()
        if serial not in self._recent:
            self.events.append(("granted", serial))
            self._refunded.discard(serial)
            self.granted_to[serial] = self._asks
        self._recent[serial] = wall_us

    def drop_recent(self, serial: int) -> bool:
        self._write()
        was_stored = self._recent.pop(serial, None) is not None
        self.events.append(("refunded again" if serial in self._refunded else "refunded", serial))
        self._refunded.add(serial)
        return was_stored

    def drop_recent_before(self, wall_us: int) -> None:
        old = [serial for serial, at_us in self._recent.items() if at_us < wall_us]
        for serial in old:
            self._write()
            del self._recent[serial]
