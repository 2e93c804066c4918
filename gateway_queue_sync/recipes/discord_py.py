"""A mixin for the clients of discord.py, py-cord, nextcord and disnake.

These libraries have a hook that may wait before an IDENTIFY. But they do not read the socket meanwhile,
and connect again after one to three minutes. In a longer line no shard would ever start. So the mixin
delays only the IDENTIFY: see ``held_identify``. There is nothing to change here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway_queue_sync.queue import GatewayQueue
from gateway_queue_sync.recipes.held_identify import HeldIdentify, HeldSocket

INVALID_SESSION = 1000  # the code that these libraries close with when the gateway says so


class QueuedIdentify:
    """Let a client's shards identify when a queue says so, instead of one each 5 seconds.

    Put it before ``Client``, ``AutoShardedClient`` or one of the ``Bot`` classes:
    ``class Bot(QueuedIdentify, discord.AutoShardedClient): ...``. Then call
    ``Bot(queue, intents=discord.Intents.default()).run(token)``.

    Args:
        queue: any queue of this package. Several clients may use it; you close it.
        args, options: the arguments of the client.
    """

    http: Any
    is_closed: Any
    _connection: Any

    def __init__(self, queue: GatewayQueue, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._held = HeldIdentify(queue, invalid_session=INVALID_SESSION)
        self._all_launched: Callable[[], None] | None = None
        connect = self.http.ws_connect

        async def ws_connect(*args: Any, **options: Any) -> HeldSocket:
            return HeldSocket(self._held, await connect(*args, **options))

        self.http.ws_connect = ws_connect

    async def before_identify_hook(self, shard_id: int | None, *, initial: bool = False) -> None:
        """Do not sleep: the queue decides."""

    async def launch_shards(self, **options: Any) -> None:
        """Connect all shards, and let ``on_ready`` wait until they are READY, too."""
        launched = getattr(self._connection, "shards_launched", None)
        if launched is not None:  # discord.py itself counts them
            self._all_launched, launched.set = launched.set, lambda: None
        await super().launch_shards(**options)  # type: ignore[misc]

    async def launch_shard(self, *args: Any, **options: Any) -> None:
        """Connect a shard, unless the client is closed: then the libraries would try without end."""
        if not self.is_closed():
            await super().launch_shard(*args, **options)  # type: ignore[misc]

    async def close(self) -> None:
        """Close the client; that rejects no permit."""
        self._held.unanswered.clear()
        await super().close()  # type: ignore[misc]

    def dispatch(self, event: str, /, *args: Any, **options: Any) -> None:
        """Note that a shard is READY, and go on as the client does."""
        if event == "shard_connect":
            self._held.unanswered.pop(args[0], None)
            if self._all_launched and self._held.identified.issuperset(self._connection.shard_ids):
                self._all_launched()
        elif event == "connect" and not hasattr(self, "shards"):
            self._held.unanswered.clear()
        super().dispatch(event, *args, **options)  # type: ignore[misc]
