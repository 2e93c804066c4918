"""The rows of one account in Redis: a ``store.Store`` over what ``answer.lua`` has read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gateway_queue_sync.ledgers.shared.messages import Request
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
from gateway_queue_sync.token_bucket import TokenBucket

VERSION = 6  # of what is stored, as in answer.lua
KEYS = ("ledger", "recent", "session", "replaced", "claim", "probe")
_LEDGER, _RECENT, _SESSION, _REPLACED = 1, 2, 3, 4  # as Lua counts


class RedisStore:
    """The rows as they were at one moment, and what is to be written.

    Attributes:
        now_us, wall_us: that moment.
        lost: the account was last stored by another server, or before this one was restarted.
        changed: names the last change of the account; empty if there is none.
        writes: commands: the name, the index of the key, the arguments.

    Args:
        rows: what the script returned, without the reply.
        request: the request that it was given.
    """

    def __init__(self, rows: Sequence[Any], request: Request) -> None:
        now, wall, self._run, self._replid, own, replaced, ledger, recent = rows
        self.now_us, self.wall_us = int(now), int(wall)
        self._rows = dict(_pairs(ledger))  # as JSON
        account = self._rows.pop("account", None)
        self._account = None if account is None else json.loads(account)
        if self._account is None:
            recent = []  # somebody has deleted the ledger's key only
        self._recent = {int(serial): int(float(at_us)) for serial, at_us in _pairs(recent)}
        session, new = request.session, request.introduction
        replaces = new.replaces if new else ""
        self._changes = f"{now} {request.attempt} {session}"  # as in the script: no other has this
        self._sessions = {replaces: replaced, session: own}
        self._keys = {replaces: _REPLACED, session: _SESSION}
        self._created = self._account["created"] if self._account else str(self.now_us)
        self.changed: str = self._account["changed"] if self._account else ""
        self.lost = self._is_other("run", self._run) or self._is_other("replid", self._replid)
        self.writes: list[list[str | int]] = []

    def _is_other(self, name: str, now: str) -> bool:
        return bool(self._account and self._account[name] and now and self._account[name] != now)

    def _write(self, command: str, key: int, *values: str | int) -> None:
        self.writes.append([command, key, *map(str, values)])

    # --- the account and its buckets --------------------------------------------------------------

    def account(self) -> SharedAccount | None:
        row = self._account
        if row is None:
            return None
        values = {name: row[name] for name in ACCOUNT_FIELDS}
        values["total"] = _or_none(row["total"])
        values["resets_at_us"] = _or_none(row["resets_at_us"])
        account = SharedAccount(**values)
        account.refresh_owed = bool(account.refresh_owed)
        account.default_bucket = TokenBucket(
            **{name: row[f"default_{name}"] for name in DEFAULT_FIELDS}
        )
        if row["other_reset_us"] is not False:
            account.other_reset = row["other_reset_us"], row["other_read_us"]
        return account

    def put_account(self, account: SharedAccount) -> None:
        before = self._account or {"run": "", "replid": ""}
        row = {name: getattr(account, name) for name in ACCOUNT_FIELDS}
        row["refresh_owed"] = int(account.refresh_owed)
        row |= {f"default_{name}": getattr(account.default_bucket, name) for name in DEFAULT_FIELDS}
        row["other_reset_us"], row["other_read_us"] = account.other_reset or (None, None)
        row |= {
            "version": VERSION,
            "run": self._run or before["run"],
            "replid": self._replid or before["replid"],
            "created": self._created,
            "changed": self._changes,
        }
        row = {name: False if value is None else value for name, value in row.items()}
        self._account = row
        self._write("HSET", _LEDGER, "account", _json(row))

    def bucket(self, number: int) -> SharedBucket | None:
        text = self._rows.get(str(number))
        return None if text is None else _as_bucket(text)

    def buckets(self) -> dict[int, SharedBucket]:
        return {int(number): _as_bucket(text) for number, text in self._rows.items()}

    def put_bucket(self, number: int, bucket: SharedBucket) -> None:
        if bucket != self.bucket(number):
            row = {name: getattr(bucket, name) for name in BUCKET_FIELDS}
            text = _json(row | {"lines": [line.text() for line in bucket.lines]})
            self._rows[str(number)] = text
            self._write("HSET", _LEDGER, number, text)

    def drop_buckets(self) -> None:
        self._rows.clear()
        self._write("UNLINK", _LEDGER)  # the account, which has changed, is stored after that

    # --- sessions ---------------------------------------------------------------------------------

    def session(self, session: str) -> SessionRow | None:
        text = self._sessions.get(session)
        if text is None:
            return None
        number, last_request_us, created, reply = text.split(" ", 3)
        is_known = created == self._created  # else the ledger's key was deleted
        return SessionRow(session, int(number), int(last_request_us), reply) if is_known else None

    def put_session(self, row: SessionRow) -> None:
        text = f"{row.number} {row.last_request_us} {self._created} {row.reply}"
        self._sessions[row.session] = text
        self._write("SET", self._keys[row.session], text, "PX", SILENT_US // 1000)

    def drop_session(self, session: str) -> None:
        self._sessions.pop(session, None)
        self._write("UNLINK", self._keys[session])

    # --- recent permits ---------------------------------------------------------------------------

    def recent(self) -> dict[int, int]:
        return dict(self._recent)

    def put_recent(self, serial: int, wall_us: int) -> None:
        self._recent[serial] = wall_us
        self._write("ZADD", _RECENT, wall_us, serial)

    def drop_recent(self, serial: int) -> bool:
        self._write("ZREM", _RECENT, serial)
        return self._recent.pop(serial, None) is not None

    def drop_recent_before(self, wall_us: int) -> None:
        self._recent = {key: at_us for key, at_us in self._recent.items() if at_us >= wall_us}
        self._write("ZREMRANGEBYSCORE", _RECENT, "-inf", f"({wall_us}")


def _as_bucket(text: str) -> SharedBucket:
    row = json.loads(text)
    return SharedBucket(**row | {"lines": tuple(map(LineRow.from_text, row["lines"]))})


def _or_none(value: Any) -> Any:
    return None if value is False else value


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def as_text(value: Any) -> Any:
    """Return an answer of Redis with text instead of bytes."""
    if isinstance(value, list):
        return [as_text(one) for one in value]
    return value.decode() if isinstance(value, bytes) else value


def _pairs(flat: list[str]) -> list[tuple[str, str]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
