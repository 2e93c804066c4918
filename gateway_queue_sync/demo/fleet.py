"""The shards: each is a thread that connects, acquires a permit and identifies."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from gateway_queue_sync.demo.gateway import Op, encode
from gateway_queue_sync.models import IDENTIFY_INTERVAL

if TYPE_CHECKING:
    from gateway_queue_sync.queue import GatewayQueue

PATIENCE = 10.0  # s a shard waits for an answer of the gateway


@dataclass(frozen=True, slots=True)
class Result:
    """How a shard ended: READY after so many seconds, or with a failure.

    ``waited`` is how long it waited for its permit, ``refused`` how often the gateway refused it.
    """

    shard_id: int
    at: float
    waited: float = 0.0
    refused: int = 0
    failure: str | None = None


class Fleet:
    """All shards. The end of the ``with`` block waits for their threads; close the queue before."""

    def __init__(
        self, queue: GatewayQueue, address: tuple[str, int], shards: int, interval: float
    ) -> None:
        self.results: list[Result] = []  # in the order in which the shards ended
        self._queue = queue
        self._address = address
        self._shards = shards
        self._interval = interval
        self._began = 0.0
        self._leaving = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def is_finished(self) -> bool:
        """Whether all shards have ended.

        An ``Event`` would not do: Ctrl-C in ``Event.wait`` can leave its lock locked, and then no shard
        could set it.
        """
        return len(self.results) == self._shards

    def start(self) -> None:
        """Start all shards."""
        self._began = time.monotonic()
        for shard_id in range(self._shards):
            thread = threading.Thread(
                target=self._run, args=(shard_id,), name=f"demo-shard-{shard_id}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _run(self, shard_id: int) -> None:
        try:
            waited, refused = self._start_session(shard_id)
            result = Result(shard_id, self._elapsed(), waited, refused)
        except Exception as error:  # noqa: BLE001 - after any error, no thread must wait for this shard
            failure = f"{type(error).__name__}: {error}"
            result = Result(shard_id, self._elapsed(), failure=failure)
        self.results.append(result)

    def _start_session(self, shard_id: int) -> tuple[float, int]:
        """Identify with a permit, and again after a pause if the gateway refuses.

        The ``with`` block contains the wait for the answer, so that the bucket's window starts after
        the gateway has checked the IDENTIFY: on a busy machine a thread may be late by more than the
        small margin of a demo.
        """
        connection = socket.create_connection(self._address, timeout=PATIENCE)
        with connection, connection.makefile("rb") as lines:
            _receive(lines)  # HELLO
            refused = 0
            while True:
                with self._queue.acquire(shard_id) as permit:
                    identify = {"token": "demo", "shard": [shard_id, self._shards]}
                    connection.sendall(encode(Op.IDENTIFY, identify))
                    if _receive(lines)["op"] != Op.INVALID_SESSION:
                        return permit.waited, refused
                    permit.rejected()
                refused += 1
                # Discord asks for a random pause of 1 to 5 seconds; this is scaled to the interval.
                self._leaving.wait(random.uniform(1, 5) * self._interval / IDENTIFY_INTERVAL)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()


def _receive(lines: BinaryIO) -> dict[str, Any]:
    line = lines.readline()
    if not line:
        raise ConnectionError("the gateway closed the connection")
    payload: dict[str, Any] = json.loads(line)
    return payload
