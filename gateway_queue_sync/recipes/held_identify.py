"""An IDENTIFY that is held back until there is a permit for it: what recipes for asyncio share.

The library goes on as if it were sent. It is sent when the queue grants a permit, if its socket is still
open then. So heartbeats are answered in the line, shards wait side by side, and a shard whose connection
closes leaves the line. Its next connection returns to its position.
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
INVALID_SESSION = 1000  # the code that these libraries close with when the gateway says so


class HeldIdentify:
    """The shards of one client.

    Attributes:
        queue: what grants permits.
        identified: the shards that have identified.
        unanswered: the sockets whose IDENTIFY has no answer yet, by shard. One that is closed with 1000
            before it has one got an Invalid Session.

    Args:
        queue: what grants permits.
        rejects: whether the client removes from ``unanswered`` those that are READY.
    """

    def __init__(self, queue: GatewayQueue, *, rejects: bool = False) -> None:
        self.queue = queue
        self._rejects = rejects
        self.identified: set[int] = set()
        self.unanswered: dict[int, HeldSocket] = {}
        self._asked_at: dict[int, float] = {}

    async def acquire(self, shard_id: int) -> Permit:
        """Wait for a permit, at the position that the shard had before its connection closed."""
        now = time.monotonic()
        waited = now - self._asked_at.setdefault(shard_id, now)
        head_start = HEAD_START if shard_id in self.identified else 0.0
        return await acquire(self.queue, shard_id, priority=head_start + waited)

    def sent(self, shard_id: int, socket: HeldSocket | None = None) -> None:
        """Note that a shard has identified."""
        if self._rejects and socket is not None:
            self.unanswered[shard_id] = socket
        self._asked_at.pop(shard_id, None)
        self.identified.add(shard_id)


class HeldSocket:
    """A WebSocket of aiohttp's that holds back the IDENTIFY."""

    def __init__(self, shards: HeldIdentify, socket: Any) -> None:
        self._shards, self._socket = shards, socket
        self._waiting: asyncio.Task[None] | None = None
        self._permit: Permit | None = None  # that was used

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    # As aiohttp's sockets do:

    async def receive(self, *args: Any, **options: Any) -> Any:
        message = await self._socket.receive(*args, **options)
        if self._socket.closed:
            self._leave()
        return message

    async def send_str(self, data: str, *args: Any, **options: Any) -> None:
        payload = json.loads(data)
        if payload["op"] == IDENTIFY:
            shard_id = payload["d"].get("shard", [0])[0]
            self._waiting = asyncio.ensure_future(self._identify(shard_id, data))
            return
        if self._waiting is not None and payload["op"] not in (HEARTBEAT, RESUME):
            await asyncio.wait([self._waiting])
        await self._socket.send_str(data, *args, **options)

    async def close(self, *args: Any, **options: Any) -> Any:
        self._leave()
        is_unanswered = self._permit is not None and self in self._shards.unanswered.values()
        if self._permit is not None and is_unanswered and options.get("code") == INVALID_SESSION:
            self._permit.rejected()
        return await self._socket.close(*args, **options)

    async def _identify(self, shard_id: int, data: str) -> None:
        try:
            permit = await self._shards.acquire(shard_id)
        except GatewayQueueError:
            log.exception("shard %d cannot identify", shard_id)
            return
        try:
            if self._socket.closed:
                raise ConnectionResetError
            await self._socket.send_str(data)
        except ConnectionError:
            permit.unused()
        else:
            permit.sent()
            self._permit = permit
            self._shards.sent(shard_id, self)

    def _leave(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
