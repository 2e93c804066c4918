"""A store of rows in memory, for tests of the rules that processes share."""

from __future__ import annotations

import copy
from collections import defaultdict

from gateway_queue_sync.ledgers.shared import turns
from gateway_queue_sync.ledgers.shared.messages import Reply, Request
from gateway_queue_sync.ledgers.shared.store import LineRow, SessionRow, SharedAccount, SharedBucket


class Failed(Exception):
    """A write failed, as a test wanted it."""


class MemoryStore:
    """What ``store.Store`` says, in dictionaries. What goes in and out is copied.

    ``reads`` counts the rows that were read and written; ``events`` are grants and refunds.
    """

    rolls_back = True

    def __init__(self) -> None:
        self._account: SharedAccount | None = None
        self._buckets: dict[int, SharedBucket] = {}
        self._sessions: dict[str, SessionRow] = {}
        self._lines: dict[tuple[int, int], dict[str, LineRow]] = defaultdict(dict)
        self._of: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self._recent: dict[int, int] = {}
        self._refunded: set[int] = set()
        self.granted_to: dict[int, str] = {}  # sessions, by serial
        self._asks = ""
        self.rows = 0
        self.events: list[tuple[str, int]] = []
        self.fails_after: int | None = None

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
        self._lines = defaultdict(dict, {key: dict(rows) for key, rows in other._lines.items()})
        self._of = defaultdict(set, {session: set(keys) for session, keys in other._of.items()})
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
        self._sessions[row.session] = row

    def drop_session(self, session: str) -> None:
        self._write()
        self._sessions.pop(session, None)
        self._of.pop(session, None)

    def silent(self, before_us: int, after_us: int, at_most: int) -> list[SessionRow]:
        rows = sorted(self._sessions.values(), key=lambda row: (row.last_request_us, row.session))
        found = [row for row in rows if not before_us <= row.last_request_us <= after_us]
        self.rows += min(at_most, len(found))
        return found[:at_most]

    def line(self, layout: int, bucket: int, session: str) -> LineRow | None:
        self.rows += 1
        return self._lines[layout, bucket].get(session)

    def put_line(self, row: LineRow) -> None:
        self._write()
        self._lines[row.layout, row.bucket][row.session] = row
        self._of[row.session].add((row.layout, row.bucket))

    def drop_line(self, row: LineRow) -> None:
        self._write()
        del self._lines[row.layout, row.bucket][row.session]
        self._of[row.session].discard((row.layout, row.bucket))

    def lines_of(self, session: str) -> list[LineRow]:
        found = [self._lines[key][session] for key in sorted(self._of[session])]
        self.rows += len(found)
        return found

    def live(self, layout: int, bucket: int, after_us: int, up_to_us: int) -> list[LineRow]:
        rows = self._lines[layout, bucket].values()
        found = [row for row in rows if after_us < row.until_us <= up_to_us]
        self.rows += len(found)  # an index finds them without reading the others
        return found

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
