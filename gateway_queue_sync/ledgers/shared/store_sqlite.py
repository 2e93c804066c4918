"""The rows of one account in an SQLite file: a ``store.Store`` of four tables."""

from __future__ import annotations

import json
import sqlite3
from operator import attrgetter
from typing import Any, NamedTuple

from gateway_queue_sync.ledgers.shared.store import (
    ACCOUNT_FIELDS,
    BUCKET_FIELDS,
    DEFAULT_FIELDS,
    SILENT_US,
    LineRow,
    SessionRow,
    SharedAccount,
    SharedBucket,
)
from gateway_queue_sync.token_bucket import NEVER, TokenBucket

APPLICATION_ID = 0x47515359  # "GQSY": the file is this library's
SCHEMA_VERSION = 7
MAX_REMOVED = 4  # silent sessions that one request deletes


class Kept(NamedTuple):
    """How an account was last stored: by which clock, on which machine, in which file and when.

    Attributes:
        clock: identifies the monotonic clock.
        machine: identifies the machine; empty if unknown.
        inode: the file's inode, which a copy does not have.
        touched_us: when it was stored, by the wall clock.
        generation: counts how often the account was stored, so that an older copy can be noticed.
    """

    clock: str
    machine: str
    inode: str
    touched_us: int
    generation: int


_account_values, _default_values, _bucket_values = (
    attrgetter(*columns) for columns in (ACCOUNT_FIELDS, DEFAULT_FIELDS, BUCKET_FIELDS)
)
_ALL_OF_ACCOUNT = (
    *ACCOUNT_FIELDS,
    *(f"default_{column}" for column in DEFAULT_FIELDS),
    *("other_reset_us", "other_read_us"),
    *Kept._fields,
)
_TABLES = {  # the rest of the key after ``name``, and the columns
    "account": ("", _ALL_OF_ACCOUNT),
    "bucket": (", number", ("number", *BUCKET_FIELDS)),
    "session": (", session", SessionRow._fields),
    "recent": (", serial", ("serial", "wall_us")),
}
CREATE = (
    *(
        f"CREATE TABLE {table} (name, {', '.join(columns)}, PRIMARY KEY (name{key})) WITHOUT ROWID"
        for table, (key, columns) in _TABLES.items()
    ),
    "CREATE INDEX session_heard ON session (name, last_request_us)",
    "CREATE INDEX recent_wall ON recent (name, wall_us)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_PUT, _SELECT = {}, {}
for _table, (_, _columns) in _TABLES.items():
    _PUT[_table] = f"INSERT OR REPLACE INTO {_table} VALUES (?{', ?' * len(_columns)})"
    _SELECT[_table] = f"SELECT {', '.join(_columns)} FROM {_table} WHERE name = ?"
_DELETE_SILENT = (
    "DELETE FROM session WHERE name = ? AND session IN "
    "(SELECT session FROM session WHERE name = ? AND last_request_us < ? LIMIT ?)"
)
_MONOTONIC_TIMES = [
    *("opened_us", "settle_until_us", "interval_until_us", "margin_until_us", "differs_until_us"),
    *("reader_until_us", "read_us", "read_due_us", "default_closed_until_us"),
]


class SqliteStore:
    """The rows of the account ``name``, within a transaction.

    Attributes:
        kept: how the account is stored; ``None`` if there is none.

    Args:
        connection: in a transaction.
        name: which account in the file.
        now: how the account is to be stored, but with the generation that this process has seen.
    """

    def __init__(self, connection: sqlite3.Connection, name: str, now: Kept) -> None:
        self._run, self._name = connection.execute, name
        self._unchanged: dict[int, tuple[Any, ...]] = {}  # buckets as they are in the file
        self._read_account()
        kept = self.kept
        generation = now.generation if kept is None else max(kept.generation, now.generation)
        self._now = now._replace(generation=generation + 1)

    def _read_account(self) -> None:
        self._account = self._run(_SELECT["account"], (self._name,)).fetchone()
        row = self._account
        self.kept = None if row is None else Kept(*row[-len(Kept._fields) :])

    def reinit(self) -> None:
        """Delete sessions, buckets and all times of the monotonic clock, since it has changed."""
        for table in ("bucket", "session"):
            self._run(f"DELETE FROM {table} WHERE name = ?", (self._name,))
        never = ", ".join(f"{column} = {NEVER}" for column in _MONOTONIC_TIMES)
        self._run(
            f"UPDATE account SET reader = '', refresh_owed = 1, {never} WHERE name = ?",
            (self._name,),
        )
        self._read_account()

    # --- the account and its buckets --------------------------------------------------------------

    def account(self) -> SharedAccount | None:
        if self._account is None:
            return None
        values = dict(zip(_ALL_OF_ACCOUNT, self._account, strict=True))
        account = SharedAccount(**{column: values[column] for column in ACCOUNT_FIELDS})
        account.refresh_owed = bool(account.refresh_owed)
        account.default_bucket = TokenBucket(
            **{column: values[f"default_{column}"] for column in DEFAULT_FIELDS}
        )
        if values["other_reset_us"] is not None:
            account.other_reset = values["other_reset_us"], values["other_read_us"]
        return account

    def put_account(self, account: SharedAccount) -> None:
        self.kept = self._now
        self._account = (
            *_account_values(account),
            *_default_values(account.default_bucket),
            *(account.other_reset or (None, None)),
            *self._now,
        )
        self._run(_PUT["account"], (self._name, *self._account))

    def bucket(self, number: int) -> SharedBucket | None:
        row = self._run(f"{_SELECT['bucket']} AND number = ?", (self._name, number)).fetchone()
        return None if row is None else self._as_bucket(row)

    def buckets(self) -> dict[int, SharedBucket]:
        found = self._run(_SELECT["bucket"], (self._name,))
        return {row[0]: self._as_bucket(row) for row in found}

    def _as_bucket(self, row: tuple[Any, ...]) -> SharedBucket:
        self._unchanged[row[0]] = row
        *values, lines = row[1:]
        bucket = SharedBucket(*values)
        bucket.lines = tuple(map(LineRow.from_text, json.loads(lines)))
        return bucket

    def put_bucket(self, number: int, bucket: SharedBucket) -> None:
        *values, lines = _bucket_values(bucket)
        row = (number, *values, json.dumps([line.text() for line in lines]))
        if self._unchanged.get(number) != row:
            self._run(_PUT["bucket"], (self._name, *row))
            self._unchanged[number] = row

    def drop_buckets(self) -> None:
        self._unchanged.clear()
        self._run("DELETE FROM bucket WHERE name = ?", (self._name,))

    # --- sessions ---------------------------------------------------------------------------------

    def session(self, session: str) -> SessionRow | None:
        row = self._run(f"{_SELECT['session']} AND session = ?", (self._name, session)).fetchone()
        return None if row is None else SessionRow(*row)

    def put_session(self, row: SessionRow) -> None:
        before_us = row.last_request_us - SILENT_US
        self._run(_DELETE_SILENT, (self._name, self._name, before_us, MAX_REMOVED))
        self._run(_PUT["session"], (self._name, *row))

    def drop_session(self, session: str) -> None:
        self._run("DELETE FROM session WHERE name = ? AND session = ?", (self._name, session))

    # --- recent permits ---------------------------------------------------------------------------

    def recent(self) -> dict[int, int]:
        return dict(self._run(_SELECT["recent"], (self._name,)).fetchall())

    def put_recent(self, serial: int, wall_us: int) -> None:
        self._run(_PUT["recent"], (self._name, serial, wall_us))

    def drop_recent(self, serial: int) -> bool:
        gone = self._run("DELETE FROM recent WHERE name = ? AND serial = ?", (self._name, serial))
        return gone.rowcount > 0

    def drop_recent_before(self, wall_us: int) -> None:
        self._run("DELETE FROM recent WHERE name = ? AND wall_us < ?", (self._name, wall_us))
