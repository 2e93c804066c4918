"""A ledger in a real Redis server for walks of whole systems: one trip at a time, on a set time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import redis

from gateway_queue_sync.clock import SystemClock
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared import redis as redis_module
from gateway_queue_sync.ledgers.shared import store_redis
from gateway_queue_sync.ledgers.shared.messages import Reply, Request
from gateway_queue_sync.ledgers.shared.store import LineRow

Rows = tuple[dict[str, bytes], dict[str, int], set[int], dict[int, str]]


class SetClock(SystemClock):
    """A clock that tells what a test says."""

    now = wall = 0

    def now_us(self) -> int:
        return self.now

    def wall_us(self) -> int:
        return self.wall


class _NextTrip(Exception):
    """The server is to be asked again, at another time."""


class _OneTrip(redis.Redis):
    """A client that repeats the answers to the first trips, makes one more, and stops at the next."""

    def __init__(self, server: redis.Redis) -> None:
        super().__init__()  # whose connections are not used
        self._server = server

    def begin(self, known: list[Any]) -> None:
        self._known, self._made, self.answer = known, 0, None

    def evalsha(self, *given: Any) -> Any:
        if self._made < len(self._known):
            self._made += 1
            return self._known[self._made - 1]
        if self.answer is not None:
            raise _NextTrip
        self.answer = self._server.evalsha(*given)
        return self.answer

    def eval(self, *given: Any) -> Any:
        return self._server.eval(*given)


class RedisStore:
    """What walks need of ``MemoryStore``, over the real backend, script and server.

    What a process computes between two trips follows from the answers to the first ones. So it is
    computed again for each trip, and trips can be late, lost and repeated like any message. Keys expire
    by the time that is set: what the script tells the server is heard through MONITOR.
    """

    def __init__(self, server: redis.Redis) -> None:
        server.flushall()
        server.script_load(redis_module.SCRIPT)
        self._server, self._clock, self._client = server, SetClock(), _OneTrip(server)
        self._backend = redis_module.RedisBackend(self._client, "walk", self._clock)
        self._ledger, self._recent, self._session, _, self._claim, _ = self._keys("")
        self._expires: dict[str, int] = {}
        self._known_serials: set[int] = set()
        self._refunded: set[int] = set()
        self.granted_to: dict[int, str] = {}  # sessions, by serial
        self.events: list[tuple[str, int]] = []
        self.computed_us = 0
        self.fails_after: int | None = None
        self._monitor = server.monitor().__enter__()

    def close(self) -> None:
        self._monitor.__exit__(None, None, None)
        self._client.close()

    def _keys(self, session: str) -> list[str]:
        names = [f"session:{session}" if key == "session" else key for key in store_redis.KEYS]
        return [f"{self._backend._prefix}:{name}" for name in names]

    # --- requests ---------------------------------------------------------------------------------

    def trip(
        self, request: Request, known: list[Any], now_us: int, wall_us: int, *, lost: bool
    ) -> Reply | list[Any] | LedgerError:
        """Make one more trip. Return the reply, or all answers so far if another trip must follow.

        ``computed_us`` is how long ago the rows were read that the reply was computed from.
        """
        self._clock.now, self._clock.wall, self.events = now_us, wall_us, []
        self.computed_us = now_us - int(known[-1][2]) if known else 0
        self._expire()
        if lost:
            self._mark_lost()
        self._client.begin(known)
        try:
            with self._failing():
                return self._backend.ask(request)
        except _NextTrip:
            return [*known, self._client.answer]
        except LedgerError as error:
            return error
        finally:
            self._observe(request)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Let the server have no memory, if a test wants that."""
        fails, self.fails_after = self.fails_after is not None, None
        if fails:
            self._server.config_set("maxmemory", 1)
        try:
            yield
        finally:
            if fails:
                self._server.config_set("maxmemory", 0)

    def _mark_lost(self) -> None:
        """Let the server be another one than the account's."""
        text = self._server.hget(self._ledger, "account")
        if text is not None:
            account = json.loads(text) | {"run": "another"}
            self._server.hset(self._ledger, "account", json.dumps(account))

    def _observe(self, request: Request) -> None:
        """Note what the script has written. No key expires by the server's own time."""
        with self._server.pipeline(transaction=False) as pipe:
            pipe.persist(self._session + request.session).persist(self._claim)
            pipe.zrange(self._recent, 0, -1).echo("observed")
            *_, serials, _ = pipe.execute()
        while (seen := self._monitor.next_command())["command"] != "ECHO observed":
            if seen["client_type"] != "lua":
                continue
            name, *words = seen["command"].split(" ")
            if name == "SET" and words[-2] == "PX":
                self._expires[words[0]] = self._clock.now + int(words[-1]) * 1000
            elif name == "UNLINK":
                self._expires.pop(words[0], None)
            elif words[:1] != [self._recent] or words[1] in ("XX", ""):  # a read, or a trial
                continue
            elif name == "ZADD" and int(words[2]) not in self._known_serials:
                serial = int(words[2])
                self.events.append(("granted", serial))
                self._refunded.discard(serial)
                self.granted_to[serial] = request.session
            elif name == "ZREM":
                serial = int(words[1])
                again = "refunded again" if serial in self._refunded else "refunded"
                self.events.append((again, serial))
                self._refunded.add(serial)
        self._known_serials = {int(one) for one in serials}

    def _expire(self) -> None:
        for key in [key for key, at_us in self._expires.items() if at_us <= self._clock.now]:
            self._server.unlink(key)
            del self._expires[key]

    # --- what is stored ---------------------------------------------------------------------------

    def is_empty(self) -> bool:
        return not self._server.hexists(self._ledger, "account")

    def sessions(self) -> set[str]:
        """Return the ids of the sessions that are stored."""
        self._expire()
        found = {key.decode() for key in self._server.scan_iter(match=f"{self._session}*")}
        return {key.removeprefix(self._session) for key in found}

    def silence(self, session: str, now_us: int) -> bool:
        """Let the ledger forget a session, as if it was silent for a minute; False if it is unknown."""
        self._expires.pop(self._session + session, None)
        return bool(self._server.unlink(self._session + session))

    def live(self, number: int, now_us: int) -> list[LineRow]:
        """Return the lines of a bucket that are live."""
        text = self._server.hget(self._ledger, str(number))
        lines = () if text is None else store_redis._as_bucket(text).lines
        return [one for one in lines if one.until_us > now_us]

    def all_live(self, now_us: int) -> list[LineRow]:
        """Return the lines of all buckets that are live."""
        numbers = [key for key in self._server.hkeys(self._ledger) if key != b"account"]
        return [line for number in numbers for line in self.live(int(number), now_us)]

    def copy(self) -> Rows:
        """Return all that is stored."""
        keys = self._server.scan_iter()
        rows = {key.decode(): self._server.dump(key) for key in keys}
        return rows, dict(self._expires), set(self._refunded), dict(self.granted_to)

    def restore(self, rows: Rows) -> None:
        """Go back to what was stored."""
        self._server.flushdb()
        for key, value in rows[0].items():
            self._server.restore(key, 0, value)
        self._expires, self._refunded, self.granted_to = dict(rows[1]), set(rows[2]), dict(rows[3])
        self._known_serials = {int(one) for one in self._server.zrange(self._recent, 0, -1)}
