"""What the recipes for asyncio libraries share: an IDENTIFY that is delayed until there is a permit.

The library continues as if the IDENTIFY were sent. It is really sent when the queue grants a permit, if
the socket is still open then. So the library answers heartbeats while a shard waits, and all shards can
wait at once. A shard whose connection closes leaves the line; when it has connected again, it returns to
its position. You may change ``HEAD_START``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

from gateway_queue_sync.aio import acquire
from gateway_queue_sync.errors import GatewayQueueError
from gateway_queue_sync.models import Permit
from gateway_queue_sync.queue import GatewayQueue

log = logging.getLogger("gateway_queue_sync.recipes")

HEARTBEAT, IDENTIFY, RESUME = 1, 2, 6
HEAD_START = 60.0  # s that a shard which had a session before is ahead of a cold start


class HeldIdentify:
    """The shards of one client.

    Attributes:
        queue: what grants permits.
        invalid_session: the code that the library closes a socket with after an Invalid Session.
        identified: the shards that have identified.
        unanswered: the permits whose IDENTIFY has no answer yet, by shard. The client removes those of
            shards that are READY.
    """

    def __init__(self, queue: GatewayQueue, *, invalid_session: int = 0) -> None:
        self.queue, self.invalid_session = queue, invalid_session
        self.identified: set[int] = set()
        self.unanswered: dict[int, Permit] = {}
        self._asked_at: dict[int, float] = {}

    async def acquire(self, shard_id: int) -> Permit:
        """Wait for a permit, at the position that the shard had before its connection closed."""
        now = time.monotonic()
        waited = now - self._asked_at.setdefault(shard_id, now)
        head_start = HEAD_START if shard_id in self.identified else 0.0
        return await acquire(self.queue, shard_id, priority=head_start + waited)

    def sent(self, permit: Permit) -> None:
        """Report that a shard has identified."""
        permit.sent()
        shard_id = permit.shard_id
        self.unanswered[shard_id] = permit
        self._asked_at.pop(shard_id, None)
        self.identified.add(shard_id)

    def refused(self, shard_id: int) -> None:
        """Report an Invalid Session, if it is the answer to an IDENTIFY."""
        permit = self.unanswered.pop(shard_id, None)
        if permit is not None:
            permit.rejected()


class HeldSocket:
    """A WebSocket of aiohttp that delays the IDENTIFY."""

    def __init__(self, shards: HeldIdentify, socket: Any) -> None:
        self._shards, self._socket = shards, socket
        self._waiting: asyncio.Task[None] | None = None
        self._shard_id = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    async def receive(self, *args: Any, **options: Any) -> Any:
        message = await self._socket.receive(*args, **options)
        if self._socket.closed:
            self._leave()
        return message

    async def send_str(self, data: str, *args: Any, **options: Any) -> None:
        payload = json.loads(data)
        if payload["op"] == IDENTIFY:
            self._shard_id = payload["d"].get("shard", [0])[0]
            self._waiting = asyncio.ensure_future(self._identify(data))
            return
        if self._waiting is not None and payload["op"] not in (HEARTBEAT, RESUME):
            await asyncio.wait([self._waiting])
        await self._socket.send_str(data, *args, **options)

    async def close(self, *args: Any, **options: Any) -> Any:
        if self._waiting is not None and options.get("code") == self._shards.invalid_session:
            self._shards.refused(self._shard_id)
        self._leave()
        return await self._socket.close(*args, **options)

    async def _identify(self, data: str) -> None:
        try:
            permit = await self._shards.acquire(self._shard_id)
        except GatewayQueueError:
            log.exception("shard %d cannot identify", self._shard_id)
            return
        try:
            if self._socket.closed:
                raise ConnectionResetError
            await self._socket.send_str(data)
        except ConnectionError:
            permit.unused()
        else:
            self._shards.sent(permit)

    def _leave(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._shards.unanswered.pop(self._shard_id, None)
