"""A shard in threads, over ``websocket-client``.

Make a subclass of ``Shard``, and override ``received`` to handle events.
"""

from __future__ import annotations

from typing import Any

from gateway_queue_sync.queue import GatewayQueue
from gateway_queue_sync.recipes import threaded
from gateway_queue_sync.recipes.threaded import Closed

TIMEOUT = 90.0  # s: heartbeats are answered sooner


class Shard(threaded.Shard):
    """One shard, whose thread calls ``run("wss://gateway.discord.gg")``."""

    def __init__(
        self, queue: GatewayQueue, token: str, shard_id: int, shards: int, **options: Any
    ) -> None:
        super().__init__(queue, token, shard_id, shards, connect=_Connection, **options)


class _Connection:
    def __init__(self, url: str) -> None:
        import websocket  # noqa: PLC0415

        self._library: Any = websocket
        try:
            self._websocket: Any = websocket.create_connection(url, timeout=TIMEOUT)
        except websocket.WebSocketException as error:
            raise ConnectionError(str(error)) from error
        self.socket = self._websocket.sock

    def receive(self) -> str:
        try:
            opcode, data = self._websocket.recv_data()
        except self._library.WebSocketException as error:
            raise Closed from error
        if opcode == self._library.ABNF.OPCODE_CLOSE:
            raise Closed(int.from_bytes(data[:2], "big") or None)
        return str(data, "utf-8")

    def send(self, data: str) -> None:
        try:
            self._websocket.send(data)
        except self._library.WebSocketException as error:
            raise Closed from error

    def close(self, code: int) -> None:
        try:
            self._websocket.send_close(code)
        except self._library.WebSocketException as error:
            raise Closed from error

    def release(self) -> None:
        self._websocket.shutdown()
