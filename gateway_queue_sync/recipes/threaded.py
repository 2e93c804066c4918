"""A shard in two threads, for ``websocket_client`` and ``websockets_sync``, which carry its messages.

One thread reads. The other one sends heartbeats, and the IDENTIFY when there is a permit. So heartbeats
are sent while the shard waits, and a shard whose connection closes leaves the line. You may change
``HEAD_START``, ``pause``, and what ``_identify`` sends.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol

from gateway_queue_sync.errors import GatewayQueueError
from gateway_queue_sync.models import Permit
from gateway_queue_sync.queue import GatewayQueue

FATAL = {4004, 4010, 4011, 4012, 4013, 4014}  # close codes: a new connection would be refused, too
QUERY = "/?v=10&encoding=json"
HEAD_START = 60.0  # s that a shard which had a session before is ahead of a cold start


class Closed(Exception):
    """The connection is closed, with a code if the gateway sent one."""

    def __init__(self, code: int | None = None) -> None:
        super().__init__(code)
        self.code = code


class Connection(Protocol):
    """A WebSocket; ``socket`` is what it reads from."""

    socket: Any

    def receive(self) -> str:
        """Return the next message; raise ``Closed`` after the last one."""

    def send(self, data: str) -> None:
        """Send a message, from any thread."""

    def close(self, code: int) -> None:
        """Say that it is to be closed, from any thread; nothing happens if it is closed."""

    def release(self) -> None:
        """Close the socket."""


class Shard:
    """One shard: ``run`` keeps it online until the token is wrong or its queue is closed.

    Override ``received`` to handle events. An ``OSError`` or ``Closed`` from ``connect``, ``receive`` or
    ``send`` means that the connection is lost.

    Attributes:
        pause: seconds before it connects again, at least and at most.
    """

    pause = 1.0, 5.0

    def __init__(
        self,
        queue: GatewayQueue,
        token: str,
        shard_id: int,
        shards: int,
        *,
        intents: int = 1,
        connect: Callable[[str], Connection],
    ) -> None:
        self.queue, self.token, self.shard_id, self.shards = queue, token, shard_id, shards
        self.intents, self._connect = intents, connect
        self._session: str | None = None
        self._sequence: int | None = None
        self._resume_url: str | None = None
        self._asked_at: float | None = None  # a shard that reconnects returns to its position
        self._started = self._stopping = False
        self._conversation: _Conversation | None = None

    def received(self, event: str, data: Any) -> None:
        """Handle an event of the gateway, in the thread that reads."""

    def run(self, url: str) -> None:
        """Stay online; ``url`` is what ``GET /gateway/bot`` returned."""
        while not self._stopping:
            # A resume URL to which no connection can be made is not tried again.
            resume_url, self._resume_url = self._resume_url, None
            try:
                connection = self._connect((resume_url or url).rstrip("/") + QUERY)
            except OSError:
                pass
            else:
                self._resume_url = resume_url
                self._conversation = _Conversation(self, connection)
                if not self._conversation.run():
                    return
            if not self._stopping:
                time.sleep(random.uniform(*self.pause))

    def close(self) -> None:
        """Leave the line, and end ``run``; may be called from any thread."""
        self._stopping = True
        if self._conversation is not None:
            self._conversation.close(1000)

    def _enqueue(self) -> Future[Permit]:
        now = time.monotonic()
        self._asked_at = now if self._asked_at is None else self._asked_at
        head_start = now - self._asked_at + (HEAD_START if self._started else 0.0)
        return self.queue.enqueue(self.shard_id, priority=head_start)


class _Conversation:
    """The messages of one connection."""

    def __init__(self, shard: Shard, connection: Connection) -> None:
        self._shard, self._connection = shard, connection
        self._closed = threading.Event()
        self._future: Future[Permit] | None = None
        self._permit: Permit | None = None  # the one whose IDENTIFY has no answer yet

    def run(self) -> bool:
        """Read until the connection is closed; return whether to connect again."""
        try:
            while self._receive(json.loads(self._connection.receive())):
                pass
        except GatewayQueueError:  # the queue is closed
            return False
        except Closed as closed:
            return closed.code not in FATAL
        except OSError:
            pass
        finally:
            self.close(4000)  # 1000 would end the session
            self._connection.release()
        return True

    def close(self, code: int) -> None:
        """Leave the line, and say goodbye; the thread that reads ends when that is answered."""
        self._end()
        with contextlib.suppress(OSError, Closed):
            self._connection.close(code)

    def _end(self) -> None:
        self._closed.set()
        future = self._future  # the other thread may take the permit now
        if future is not None:
            future.cancel()

    def _receive(self, payload: dict[str, Any]) -> bool:
        """Answer a payload; return whether to read on. If not, the shard connects again."""
        shard, op, d = self._shard, payload["op"], payload["d"]
        shard._sequence = payload.get("s") or shard._sequence
        if op == 10:  # HELLO
            if shard._session is None:
                self._future = shard._enqueue()
            else:
                resume = {
                    "token": shard.token,
                    "session_id": shard._session,
                    "seq": shard._sequence,
                }
                self._send(6, resume)
            interval = d["heartbeat_interval"] / 1000
            threading.Thread(target=self._speak, args=(interval,), daemon=True).start()
        elif op == 1:  # the gateway asks for a heartbeat
            self._send(1, shard._sequence)
        elif op == 9:  # Invalid Session
            if self._permit is not None:
                self._permit.rejected()
            if not d:
                shard._session = shard._resume_url = None
        elif op == 0:
            if payload["t"] == "READY":
                self._permit, shard._asked_at, shard._started = None, None, True
                shard._session, shard._resume_url = d["session_id"], d["resume_gateway_url"]
            shard.received(payload["t"], d)
        return op not in (7, 9)  # 7: Reconnect

    def _speak(self, interval: float) -> None:
        """Send heartbeats, and the IDENTIFY as soon as there is a permit for it."""
        beat_at = time.monotonic() + interval * random.random()
        try:
            while True:
                rest = max(0.0, beat_at - time.monotonic())
                if self._future is None:
                    if self._closed.wait(rest):
                        return
                else:
                    try:
                        permit = self._future.result(rest)
                    except TimeoutError:
                        pass
                    else:
                        self._identify(permit)
                        continue
                self._send(1, self._shard._sequence)
                beat_at = time.monotonic() + interval
        except (OSError, Closed, CancelledError):
            self._end()  # the thread that reads notices that itself
        except GatewayQueueError:
            self._shard._stopping = True
            self.close(4000)
        finally:
            if self._future is not None and not self._future.cancel():
                self._future.add_done_callback(give_back)

    def _identify(self, permit: Permit) -> None:
        # What was received, but not read yet, may be the end of the connection.
        while select.select([self._connection.socket], [], [], 0)[0]:
            if self._closed.wait(0.001):
                break
        if self._closed.is_set():
            raise Closed  # ``_speak`` gives the permit back
        properties = {"os": "linux", "browser": "mine", "device": "mine"}
        shard = self._shard
        d = {
            "token": shard.token,
            "intents": shard.intents,
            "properties": properties,
            "shard": [shard.shard_id, shard.shards],
        }
        self._future, self._permit = None, permit
        try:
            self._send(2, d)
        except (OSError, Closed):
            permit.unused()
            raise
        permit.sent()

    def _send(self, op: int, d: Any) -> None:
        self._connection.send(json.dumps({"op": op, "d": d}))


def give_back(future: Future[Permit]) -> None:
    """Give back a permit that came too late."""
    if future.exception() is None:
        future.result().unused()
