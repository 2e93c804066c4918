"""A shard in threads, over ``websockets``.

Make a subclass of ``Shard``, and override ``received`` to handle events.
"""

from __future__ import annotations

import contextlib
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
        from websockets import exceptions  # noqa: PLC0415
        from websockets.sync.client import connect  # noqa: PLC0415

        self._closed: Any = exceptions.ConnectionClosed
        self._exit = contextlib.ExitStack()
        try:
            opened = connect(url, max_size=None, ping_interval=None)
            self._websocket = self._exit.enter_context(opened)
        except exceptions.WebSocketException as error:
            raise ConnectionError(str(error)) from error
        self.socket = self._websocket.socket

    def receive(self) -> str:
        try:
            return str(self._websocket.recv(timeout=TIMEOUT))
        except self._closed as closed:
            raise Closed(closed.rcvd and closed.rcvd.code) from closed

    def send(self, data: str) -> None:
        try:
            self._websocket.send(data)
        except self._closed as closed:
            raise Closed from closed

    def close(self, code: int) -> None:
        self._websocket.close(code)

    def release(self) -> None:
        self._exit.close()
