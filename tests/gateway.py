"""A gateway to run bots against: a WebSocket server that enforces Discord's rules, on a loopback port.

IDENTIFYs are judged where Discord would: when they arrive, by ``testing.Referee``. Nothing here knows
of any queue. Source of the opcodes and close codes:
https://discord.com/developers/docs/topics/opcodes-and-status-codes#gateway.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
import math
import random
import re
import socket
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from gateway_queue_sync.testing import Referee

TOKEN = "MQ.not-a-real.token_0123456789"
USER = {
    "id": "1",
    "bot": True,
    "username": "bot",
    "discriminator": "0000",
    "avatar": None,
    "verified": True,
    "mfa_enabled": False,
    "flags": 0,
    "locale": "en-US",
}
APPLICATION = {
    "id": "1",
    "name": "bot",
    "icon": None,
    "description": "",
    "flags": 0,
    "bot_public": True,
    "bot_require_code_grant": False,
    "verify_key": "",
    "summary": "",
    "owner": USER,
}


class Op(enum.IntEnum):
    DISPATCH = 0
    HEARTBEAT = 1
    IDENTIFY = 2
    RESUME = 6
    RECONNECT = 7
    INVALID_SESSION = 9
    HELLO = 10
    HEARTBEAT_ACK = 11


class Close(enum.IntEnum):
    UNKNOWN_OPCODE = 4001
    DECODE_ERROR = 4002
    NOT_AUTHENTICATED = 4003
    AUTHENTICATION_FAILED = 4004
    ALREADY_AUTHENTICATED = 4005
    SESSION_TIMED_OUT = 4009
    INVALID_SHARD = 4010


RESUME_PATH = "/resume"
ENDS_THE_SESSION = {1000, 1001}  # a client that closes with these cannot resume


@dataclass(frozen=True)
class Weather:
    """What the network does to connections. Shares are of 1, times are the longest, in seconds."""

    connect_delay: float = 0.0  # before HELLO
    jitter: float = 0.0  # an IDENTIFY is on its way
    lost: float = 0.0  # share of the IDENTIFYs that go down with their connection on the way
    dropped: float = 0.0  # share of the new sessions that lose their connection ...
    dropped_within: float = 0.0  # ... some time after READY
    forgotten: float = 0.0  # share of the RESUMEs whose session is gone
    asked: float = 0.0  # share of the new sessions that are asked for a heartbeat


class Gateway:
    """Serves in threads of its own until the ``with`` is left.

    Args:
        shards: how many ``GET /gateway/bot`` recommends.
        max_concurrency, interval, total, period: the rules, as for ``Referee``.
        heartbeat: seconds between heartbeats; who misses two is disconnected.
        weather: what the network does.
        seed: of the weather.
    """

    def __init__(
        self,
        *,
        shards: int = 1,
        max_concurrency: int = 1,
        interval: float = 0.1,
        total: int = 1000,
        period: float = 86_400.0,
        heartbeat: float = 40.0,
        weather: Weather = Weather(),
        seed: int = 0,
    ) -> None:
        self.referee = Referee(max_concurrency, interval=interval, total=total, period=period)
        self.weather = weather
        self.heartbeat = heartbeat
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.sessions: dict[str, list[int]] = {}  # their shards
        self.refuses = 0  # so many of the next IDENTIFYs get Invalid Session, whenever they come
        self.started: list[int] = []  # shards that became READY, in that order
        self.changed = threading.Condition()
        self.connections: set[Connection] = set()
        self._shards = shards
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"

    @property
    def resume_url(self) -> str:
        """Where sessions are resumed, and nowhere else."""
        return self.url + RESUME_PATH

    @property
    def api(self) -> str:
        """Where its REST API is."""
        return self.url.replace("ws", "http", 1)

    @property
    def online(self) -> set[int]:
        """The shards that have a session over a connection that is not about to be lost."""
        with self.changed:
            return {
                connection.shard[0]
                for connection in self.connections
                if connection.shard is not None and connection.drop_at == math.inf
            }

    def wait_for(self, shards: set[int], within: float = 30.0) -> None:
        """Wait until these shards, and no others, are online."""
        with self.changed:
            came = self.changed.wait_for(lambda: self.online == shards, within)
        assert came, f"{shards - self.online} are not online after {within:g} s: {self}"

    def count(self, what: str) -> None:
        with self.changed:
            self.seen[what] += 1
            self.changed.notify_all()

    def new_session(self, shard: list[int]) -> str:
        session = f"{next(self._numbers):032x}"
        self.sessions[session] = shard
        return session

    def drop(self, *, online: bool) -> None:
        """Lose all connections that have a session, or else all that have none."""
        with self.changed:
            for connection in self.connections:
                if online is (connection.shard is not None):
                    connection.lose()

    def invalidate(self) -> None:
        """Tell all that have a session that it is invalid, and cannot be resumed."""
        with self.changed:
            connections = [one for one in self.connections if one.shard is not None]
        for connection in connections:
            connection.invalidate()

    def revoke(self) -> None:
        """Reset the token, as Discord does when the limit is passed: nobody gets in any more."""
        self.referee.token_reset = True
        with self.changed:
            connections = list(self.connections)
        for connection in connections:
            close, how = connection.websocket.close, (Close.AUTHENTICATION_FAILED,)
            threading.Thread(target=close, args=how).start()

    def __repr__(self) -> str:
        judge = f"accepted={self.referee.accepted} refused={self.referee.refused}"
        return f"<Gateway {judge} seen={dict(self.seen)}>"

    def __enter__(self) -> Self:
        self._server = serve(
            self._welcome,
            "127.0.0.1",
            0,
            process_request=self._answer,
            compression=None,
            ping_interval=None,
            close_timeout=2,
            backlog=1024,
        )
        self._thread = threading.Thread(target=self._server.serve_forever, name="gateway")
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()

    def _welcome(self, websocket: ServerConnection) -> None:
        connection = Connection(self, websocket)
        with self.changed:
            self.connections.add(connection)
        try:
            connection.run()
        except ConnectionClosed as closed:
            if closed.rcvd is not None and closed.rcvd.code in ENDS_THE_SESSION:
                self.sessions.pop(connection.session, None)
        finally:
            with self.changed:
                self.connections.discard(connection)
                self.changed.notify_all()

    # --- the REST API, as far as bots need it to start ---

    def _answer(self, websocket: ServerConnection, request: Request) -> Response | None:
        if "Upgrade" in request.headers:
            return None
        routes = {
            "/gateway": lambda: {"url": self.url},
            "/gateway/bot": self._gateway_bot,
            "/users/@me": lambda: USER,
            "/applications/@me": lambda: APPLICATION,
            "/oauth2/applications/@me": lambda: APPLICATION,
        }
        route = routes.get(re.sub(r"^(/api)?(/v\d+)?", "", urlsplit(request.path).path))
        status, body = HTTPStatus.OK, {}
        sent = request.headers.get("Authorization")
        if (route != routes["/gateway"] and sent != f"Bot {TOKEN}") or self.referee.token_reset:
            status, body = HTTPStatus.UNAUTHORIZED, {"message": "401: Unauthorized", "code": 0}
        elif route is None:
            status, body = HTTPStatus.NOT_FOUND, {"message": "404: Not Found", "code": 0}
        else:
            body = route()
        response = websocket.respond(status, json.dumps(body))
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response

    def _gateway_bot(self) -> dict[str, Any]:
        limit = self.referee.limit
        assert limit is not None
        start = {
            "total": limit.total,
            "remaining": limit.remaining,
            "reset_after": round(limit.reset_after * 1000),
            "max_concurrency": limit.max_concurrency,
        }
        return {"url": self.url, "shards": self._shards, "session_start_limit": start}


class Connection:
    """The gateway's end of one connection."""

    def __init__(self, gateway: Gateway, websocket: ServerConnection) -> None:
        self.gateway = gateway
        self.websocket = websocket
        self.session = ""
        self.shard: list[int] | None = None  # None: there is no session yet
        self.drop_at = math.inf
        self._sequence = itertools.count(1)
        self._sending = threading.Lock()
        query = urlsplit(websocket.request.path).query
        self._zlib = zlib.compressobj() if "compress=zlib-stream" in query else None
        self._heard_at = time.monotonic()

    def run(self) -> None:
        self._delay(self.gateway.weather.connect_delay)
        self._send(Op.HELLO, {"heartbeat_interval": round(self.gateway.heartbeat * 1000)})
        while True:
            patience = self._heard_at + 2 * self.gateway.heartbeat
            try:
                message = self.websocket.recv(min(patience, self.drop_at) - time.monotonic())
            except TimeoutError:
                if self.drop_at < patience:
                    self._drop()
                else:
                    self.gateway.count("timed out")
                    self.websocket.close(Close.SESSION_TIMED_OUT)
                return
            if not self._receive(message):
                return

    def _receive(self, message: str | bytes) -> bool:
        """Answer a message; return whether the connection goes on."""
        try:
            payload = json.loads(message)
            op, d = Op(payload["op"]), payload["d"]
        except (ValueError, TypeError, KeyError):
            return self._close(Close.DECODE_ERROR)
        match op:
            case Op.HEARTBEAT:
                self._heard_at = time.monotonic()
                self.gateway.count("heartbeats")
                self._send(Op.HEARTBEAT_ACK, None)
                return True
            case Op.IDENTIFY | Op.RESUME if self.shard is not None:
                return self._close(Close.ALREADY_AUTHENTICATED)
            case Op.IDENTIFY:
                return self._identify(d)
            case Op.RESUME:
                return self._resume(d)
        return self._close(Close.UNKNOWN_OPCODE if self.shard else Close.NOT_AUTHENTICATED)

    def _identify(self, d: dict[str, Any]) -> bool:
        gateway, weather = self.gateway, self.gateway.weather
        self._delay(weather.jitter)
        if gateway.random.random() < weather.lost:
            gateway.count("lost")
            return self._drop()
        if not self._authenticates(d):
            return False
        shard = d.get("shard", [0, 1])
        if not (len(shard) == 2 and 0 <= shard[0] < shard[1]):
            return self._close(Close.INVALID_SHARD)
        if gateway.refuses:
            gateway.refuses -= 1
            gateway.count("refused")
            self._send(Op.INVALID_SESSION, False)
            return True
        if gateway.referee.identify(shard[0]):
            self.session = gateway.new_session(shard)
            more = {"session_id": self.session, "resume_gateway_url": gateway.resume_url}
            more |= {"v": 10, "user": USER, "guilds": [], "shard": shard}
            more |= {"application": {"id": "1", "flags": 0}, "private_channels": []}
            self._send(Op.DISPATCH, more, "READY")
            if gateway.random.random() < weather.asked:
                gateway.count("asked")
                self._send(Op.HEARTBEAT, None)
            if gateway.random.random() < weather.dropped:
                self.drop_at = time.monotonic() + gateway.random.uniform(0, weather.dropped_within)
            gateway.started.append(shard[0])
            self._begin(shard, "ready")
            return True
        if gateway.referee.token_reset:
            gateway.revoke()
            return self._close(Close.AUTHENTICATION_FAILED)
        self._send(Op.INVALID_SESSION, False)
        return True

    def _resume(self, d: dict[str, Any]) -> bool:
        gateway = self.gateway
        if not self._authenticates(d):
            return False
        if gateway.random.random() < gateway.weather.forgotten:
            gateway.sessions.pop(d["session_id"], None)
        shard = gateway.sessions.get(d["session_id"])
        if urlsplit(self.websocket.request.path).path.rstrip("/") != RESUME_PATH:
            gateway.count("resumed elsewhere")
            shard = None
        if shard is None:
            gateway.count("not resumed")
            self._send(Op.INVALID_SESSION, False)
            return True
        self.session = d["session_id"]
        self._send(Op.DISPATCH, {}, "RESUMED")
        self._begin(shard, "resumed")
        return True

    def _begin(self, shard: list[int], how: str) -> None:
        self.shard = shard
        self.gateway.count(how)

    def _authenticates(self, d: dict[str, Any]) -> bool:
        good = d["token"].removeprefix("Bot ") == TOKEN and not self.gateway.referee.token_reset
        return good or self._close(Close.AUTHENTICATION_FAILED)

    def _drop(self) -> bool:
        """Lose the connection: half of the sessions are asked to reconnect before."""
        if self.shard is not None and self.gateway.random.random() < 0.5:
            self._send(Op.RECONNECT, None)
            with contextlib.suppress(TimeoutError):
                while True:
                    self.websocket.recv(5)  # until the client closes
        self.lose()
        return False

    def invalidate(self) -> None:
        """End the session; its client may identify again here, or over another connection."""
        self.gateway.sessions.pop(self.session, None)
        self.shard = None
        with contextlib.suppress(ConnectionClosed):
            self._send(Op.INVALID_SESSION, False)

    def lose(self) -> None:
        with contextlib.suppress(OSError):
            self.websocket.socket.shutdown(socket.SHUT_RDWR)

    def _close(self, code: Close) -> bool:
        self.gateway.count(code.name)
        self.websocket.close(code)
        return False

    def _delay(self, longest: float) -> None:
        time.sleep(self.gateway.random.uniform(0, longest))

    def _send(self, op: Op, d: Any, event: str | None = None) -> None:
        with self._sending:
            number = next(self._sequence) if op is Op.DISPATCH else None
            text = json.dumps({"op": op, "d": d, "t": event, "s": number})
            if self._zlib is None:
                self.websocket.send(text)
            else:
                data = self._zlib.compress(text.encode()) + self._zlib.flush(zlib.Z_SYNC_FLUSH)
                self.websocket.send(data)
