"""A mixin for the clients of interactions.py.

The library's own start does not wait between IDENTIFYs, and does not end. So the mixin starts the shards
itself, and delays each IDENTIFY: see ``held_identify``. You may change ``PAUSE``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from gateway_queue_sync.queue import GatewayQueue
from gateway_queue_sync.recipes.held_identify import HeldIdentify, HeldSocket

INVALID_SESSION = 1012  # the code that the library closes with when the gateway says so
PAUSE = 1.0  # s before a shard is started again


class QueuedIdentify:
    """Let the shards of a client identify when a queue says so.

    Put it before ``AutoShardedClient``:
    ``class Bot(QueuedIdentify, interactions.AutoShardedClient): ...``. Then call
    ``Bot(queue, total_shards=16).start(token)``.

    Args:
        queue: any queue of this package; you close it.
        args, options: the arguments of the client.
    """

    http: Any
    login: Any
    _connection_states: Any

    def __init__(self, queue: GatewayQueue, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        held = self._held = HeldIdentify(queue, invalid_session=INVALID_SESSION)
        self._stopping = False
        connect = self.http.websocket_connect

        async def websocket_connect(url: str) -> HeldSocket:
            return HeldSocket(held, await connect(url))

        self.http.websocket_connect = websocket_connect

    async def astart(self, token: str | None = None) -> None:
        """Start all shards at once: they wait for the queue."""
        await self.login(token)
        try:
            await asyncio.gather(*map(self._keep_online, self._connection_states))
        finally:
            await self.stop()

    async def _keep_online(self, shard: Any) -> None:
        """Start a shard, and again if it ends: the library gives up if a connection is lost early."""
        while not self._stopping:
            await shard.start()
            await asyncio.sleep(PAUSE)

    def dispatch(self, event: Any, *args: Any, **options: Any) -> None:
        """Note that a shard is READY, and go on as the client does."""
        if type(event).__name__ == "WebsocketReady":
            self._held.unanswered.pop(event.data["shard"][0], None)
        super().dispatch(event, *args, **options)  # type: ignore[misc]

    async def stop(self) -> None:
        """Stop the shards before the HTTP session: the library's own ``stop`` does not end."""
        self._stopping = True
        await asyncio.gather(*[shard.stop() for shard in self._connection_states])
        await super().stop()  # type: ignore[misc]
