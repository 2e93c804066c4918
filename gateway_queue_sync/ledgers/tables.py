"""What a shared account is kept in, in an SQLite file: a ``turns.Store`` of a few small tables."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import fields
from operator import attrgetter
from typing import NamedTuple

from gateway_queue_sync.messages import Waiter
from gateway_queue_sync.token_bucket import NEVER, TokenBucket
from gateway_queue_sync.turns import Head, SharedAccount, StoredPermit

APPLICATION_ID = 0x47515359  # "GQSY": the file is this library's
SCHEMA_VERSION = 2

_BUCKET = [field.name for field in fields(TokenBucket)]
_GRANT = [field.name for field in fields(StoredPermit)]
_NOT_STORED = ("buckets", "default_bucket", "recent", "other_reset")
_ACCOUNT = [field.name for field in fields(SharedAccount) if field.name not in _NOT_STORED]
_bucket_row, _grant_row, _account_row = (
    attrgetter(*columns) for columns in (_BUCKET, _GRANT, _ACCOUNT)
)
CREATE = (
    f"""CREATE TABLE account (name PRIMARY KEY, {", ".join(_ACCOUNT)}, default_last_us,
        default_closed_until_us, clock, inode, touched_us) WITHOUT ROWID""",
    f"""CREATE TABLE bucket (name, number, {", ".join(_BUCKET)},
        PRIMARY KEY (name, number)) WITHOUT ROWID""",
    """CREATE TABLE process (name, owner, lease_until_us, void,
        PRIMARY KEY (name, owner)) WITHOUT ROWID""",
    """CREATE TABLE head (name, number, owner, ticket, shard_id, place_us,
        PRIMARY KEY (name, number, owner)) WITHOUT ROWID""",
    f"""CREATE TABLE permit (name, owner, {", ".join(_GRANT)},
        PRIMARY KEY (name, owner, ticket)) WITHOUT ROWID""",
    """CREATE TABLE waiter (name, owner, ticket, shard_id, arrived_us, place_us,
        PRIMARY KEY (name, owner, ticket)) WITHOUT ROWID""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


def _insert(table: str, columns: int) -> str:
    return f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * columns)})"


class Kept(NamedTuple):
    """By which clock an account was kept, in which file, and when by the wall clock."""

    clock: str
    inode: str
    touched_us: int


class Tables:
    """The state of one account in the file, within a transaction."""

    def __init__(self, connection: sqlite3.Connection, name: str, kept: Kept) -> None:
        self._run = connection.execute
        self._name = name
        self._kept = kept

    def last_kept(self) -> Kept | None:
        """Return where, when and by which clock the account was last kept; ``None``: never."""
        row = self._run(
            "SELECT clock, inode, touched_us FROM account WHERE name = ?", (self._name,)
        ).fetchone()
        return None if row is None else Kept(*row)

    def begin_windows_anew(self, now_us: int) -> None:
        """Forget all but the budget: no bucket grants for a window, and the limit is read anew."""
        self.begin_anew()
        self._run("DELETE FROM bucket WHERE name = ?", (self._name,))
        self._run(
            "UPDATE account SET default_last_us = ?, default_closed_until_us = ?, opened_us = ?, "
            "interval_until_us = ?, margin_until_us = ?, refresh_until_us = ?, "
            "refresh_owed = 1 WHERE name = ?",
            (now_us, *[NEVER] * 5, self._name),
        )

    def account(self) -> SharedAccount | None:
        row = self._run("SELECT * FROM account WHERE name = ?", (self._name,)).fetchone()
        if row is None:
            return None
        values = dict(zip(_ACCOUNT, row[1:], strict=False))
        values["refresh_owed"] = bool(values["refresh_owed"])
        last_us, closed_until_us = row[len(_ACCOUNT) + 1 : len(_ACCOUNT) + 3]
        default = TokenBucket(last_us=last_us, closed_until_us=closed_until_us)
        return SharedAccount(default_bucket=default, **values)

    def buckets(self, number: int | None = None) -> dict[int, TokenBucket]:
        if number is None:
            found = self._run("SELECT * FROM bucket WHERE name = ?", (self._name,))
        else:
            found = self._run(
                "SELECT * FROM bucket WHERE name = ? AND number = ?", (self._name, number)
            )
        return {row[1]: TokenBucket(*row[2:]) for row in found}

    def keep(self, account: SharedAccount, *, relaid: bool) -> None:
        if relaid:
            self._run("DELETE FROM bucket WHERE name = ?", (self._name,))
        for number, bucket in account.buckets.items():
            row = (self._name, number, *_bucket_row(bucket))
            self._run(_insert("bucket", len(row)), row)
        default = account.default_bucket
        row = (
            self._name,
            *_account_row(account),
            *(default.last_us, default.closed_until_us, *self._kept),
        )
        self._run(_insert("account", len(row)), row)

    def begin_anew(self) -> None:
        for table in ("process", "head", "permit", "waiter"):
            self._run(f"DELETE FROM {table} WHERE name = ?", (self._name,))

    def renew_lease(self, owner: str, until_us: int, void: int) -> tuple[bool, int]:
        row = self._run(
            "SELECT void FROM process WHERE name = ? AND owner = ?", (self._name, owner)
        ).fetchone()
        if row is not None:
            void = max(void, row[0])
        self._run(_insert("process", 4), (self._name, owner, until_us, void))
        return row is not None, void

    def end_leases(self, owners: Iterable[str], now_us: int) -> None:
        for owner in owners:
            self._run(
                "UPDATE process SET lease_until_us = ? WHERE name = ? AND owner = ?",
                (now_us, self._name, owner),
            )

    def forget_silent(self, before_us: int) -> None:
        silent = self._run(
            "SELECT owner FROM process WHERE name = ? AND lease_until_us < ?",
            (self._name, before_us),
        ).fetchall()
        for (owner,) in silent:
            for table in ("process", "head", "waiter"):
                self._run(f"DELETE FROM {table} WHERE name = ? AND owner = ?", (self._name, owner))

    def heads(self, number: int | None = None, since_us: int = NEVER) -> list[Head]:
        found = self._run(
            "SELECT head.owner, ticket, shard_id, place_us FROM head JOIN process USING (name, owner) "
            "WHERE name = ? AND number = coalesce(?, number) AND lease_until_us > ?",
            (self._name, number, since_us),
        )
        return [Head(*row) for row in found]

    def put_head(self, number: int, head: Head) -> None:
        row = (self._name, number, *head)
        self._run(_insert("head", len(row)), row)

    def drop_head(self, owner: str, ticket: int) -> None:
        self._run(
            "DELETE FROM head WHERE name = ? AND owner = ? AND ticket = ?",
            (self._name, owner, ticket),
        )

    def drop_heads(self) -> None:
        self._run("DELETE FROM head WHERE name = ?", (self._name,))

    def permit(self, owner: str, ticket: int) -> StoredPermit | None:
        row = self._run(
            "SELECT * FROM permit WHERE name = ? AND owner = ? AND ticket = ?",
            (self._name, owner, ticket),
        ).fetchone()
        if row is None:
            return None
        values = dict(zip(_GRANT, row[2:], strict=True))
        values["returned"], values["refused"] = bool(values["returned"]), bool(values["refused"])
        return StoredPermit(**values)

    def put_permit(self, owner: str, grant: StoredPermit) -> None:
        row = (self._name, owner, *_grant_row(grant))
        self._run(_insert("permit", len(row)), row)

    def forget_permits(self, period: int, before_us: int) -> None:
        self._run(
            "DELETE FROM permit WHERE name = ? AND period < ? AND stamp_us < ?",
            (self._name, period, before_us),
        )

    def put_waiter(self, owner: str, waiter: Waiter) -> None:
        row = (self._name, owner, *waiter)
        self._run(
            _insert("waiter", len(row)).replace("OR REPLACE ", "")
            + " ON CONFLICT (name, owner, ticket) DO UPDATE SET "
            "arrived_us = min(arrived_us, excluded.arrived_us), "
            "place_us = min(place_us, excluded.place_us)",
            row,
        )

    def drop_waiter(self, owner: str, ticket: int) -> None:
        self._run(
            "DELETE FROM waiter WHERE name = ? AND owner = ? AND ticket = ?",
            (self._name, owner, ticket),
        )

    def waiters(self, since_us: int) -> list[Waiter]:
        found = self._run(
            "SELECT ticket, shard_id, arrived_us, place_us FROM waiter JOIN process USING (name, owner) "
            "WHERE name = ? AND lease_until_us > ?",
            (self._name, since_us),
        )
        return [Waiter(*row) for row in found]
