"""A mixin for the clients of discord.py, py-cord, nextcord and disnake.

These libraries ask for their turn before they read the socket, and give up after a minute or three: in
a longer line no shard ever starts. So the mixin holds back the IDENTIFY alone. The library goes on as
if it were sent; it is sent when the queue grants a permit, if its socket is still open then. Heartbeats
are answered meanwhile, shards wait side by side, and a shard whose connection closes leaves the line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from gateway_queue_sync.aio import acquire
from gateway_queue_sync.errors import GatewayQueueError
from gateway_queue_sync.models import Permit
from gateway_queue_sync.queue import GatewayQueue

log = logging.getLogger("gateway_queue_sync.recipes")

HEARTBEAT, IDENTIFY, RESUME = 1, 2, 6
HEAD_START = 60.0  # s that a shard which had a session before is ahead of a cold start
INVALID_SESSION = 1000  # the code that these libraries close with when the gateway says so


class QueuedIdentify:
    """Let a client's shards identify when a queue says so, instead of one each 5 seconds.

    It stands before ``Client``, ``AutoShardedClient`` or one of the ``Bot`` classes, as in
    ``class Bot(QueuedIdentify, discord.AutoShardedClient): ...``; then
    ``Bot(queue, intents=discord.Intents.default()).run(token)``.

    Args:
        queue: any queue of this package, which several clients may share. It is not closed here.
        args, options: what the client takes.
    """

    http: Any
    is_closed: Any
    _connection: Any

    def __init__(self, queue: GatewayQueue, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.queue = queue
        self._asked_at: dict[int, float] = {}  # a shard that reconnects returns to its position
        self._identified: set[int] = set()
        self._unanswered: dict[int, _Socket] = {}  # whose IDENTIFY was sent
        self._all_identified: Callable[[], None] | None = None
        connect = self.http.ws_connect

        async def ws_connect(*args: Any, **options: Any) -> _Socket:
            return _Socket(self, await connect(*args, **options))

        self.http.ws_connect = ws_connect

    async def before_identify_hook(self, shard_id: int | None, *, initial: bool = False) -> None:
        """Do not sleep: the queue decides."""

    async def launch_shards(self, **options: Any) -> None:
        """Connect all shards, and let ``on_ready`` wait until they have identified."""
        launched = getattr(self._connection, "shards_launched", None)
        if launched is not None:  # discord.py itself counts the shards that are READY
            self._all_identified, launched.set = launched.set, lambda: None
        await super().launch_shards(**options)  # type: ignore[misc]

    async def launch_shard(self, *args: Any, **options: Any) -> None:
        """Connect a shard, unless the client is closed: the libraries would try again for ever."""
        if not self.is_closed():
            await super().launch_shard(*args, **options)  # type: ignore[misc]

    async def _acquire(self, shard_id: int) -> Permit:
        now = time.monotonic()
        waited = now - self._asked_at.setdefault(shard_id, now)
        head_start = HEAD_START if shard_id in self._identified else 0.0
        return await acquire(self.queue, shard_id, priority=head_start + waited)

    def dispatch(self, event: str, /, *args: Any, **options: Any) -> None:
        """Note that a shard is READY, and go on as the client does."""
        if event == "shard_connect":
            self._unanswered.pop(args[0], None)
        elif event == "connect" and not hasattr(self, "shards"):
            self._unanswered.clear()
        super().dispatch(event, *args, **options)  # type: ignore[misc]

    def _sent(self, shard_id: int, socket: _Socket) -> None:
        self._unanswered[shard_id] = socket
        self._asked_at.pop(shard_id, None)
        self._identified.add(shard_id)
        if self._all_identified and self._identified.issuperset(self._connection.shard_ids):
            self._all_identified()


class _Socket:
    """A WebSocket of aiohttp's that holds back an IDENTIFY until there is a permit for it."""

    def __init__(self, client: QueuedIdentify, socket: Any) -> None:
        self._client, self._socket = client, socket
        self._waiting: asyncio.Task[None] | None = None
        self._permit: Permit | None = None  # that was used

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
            shard_id = payload["d"].get("shard", [0])[0]
            self._waiting = asyncio.ensure_future(self._identify(shard_id, data))
            return
        if self._waiting is not None and payload["op"] not in (HEARTBEAT, RESUME):
            await asyncio.wait([self._waiting])
        await self._socket.send_str(data, *args, **options)

    async def close(self, *args: Any, **options: Any) -> Any:
        self._leave()
        is_refused = options.get("code") == INVALID_SESSION and not self._client.is_closed()
        if self._permit is not None and is_refused and self in self._client._unanswered.values():
            self._permit.rejected()
        return await self._socket.close(*args, **options)

    async def _identify(self, shard_id: int, data: str) -> None:
        try:
            permit = await self._client._acquire(shard_id)
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
            self._client._sent(shard_id, self)

    def _leave(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
