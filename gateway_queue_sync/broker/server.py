"""Runs a broker: its sockets, and a thread with an event loop."""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Self

from gateway_queue_sync import process
from gateway_queue_sync.broker.connection import Connection
from gateway_queue_sync.broker.routes import Service
from gateway_queue_sync.broker.settings import BACKLOG, BrokerSettings, listen
from gateway_queue_sync.queue import GatewayQueue

if sys.platform != "win32":  # which has no such limit
    import resource

log = logging.getLogger("gateway_queue_sync.broker")

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8787
MAX_CONNECTIONS = 20_000
BATCH = 64  # connections that are accepted before other work
SPARE_FILES = 64  # open files that are no connections of clients
END_TIMEOUT = 0.2  # s at the end, for connections being accepted, and for sending the rest
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def serve(
    queue: GatewayQueue,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    *,
    secret: str | None = None,
    strict: bool = False,
    max_connections: int = MAX_CONNECTIONS,
) -> Broker:
    """Serve a queue to any process over HTTP, from a thread in the background, until it is closed.

    A client sends ``GET /?shard=N`` and gets no byte until its shard may identify; ``README.md`` beside
    this file has the whole protocol. If clients use ``HttpQueue``, the queue must be an ``SqliteQueue``
    or a ``RedisQueue``. The caller closes the queue.

    Without a secret, only programs on this machine get permits. Pages in its browsers get no permit and
    cannot change anything; they get data only if the request's ``Host`` is this machine.

    Args:
        queue: the queue that grants the permits.
        host: the address to listen on; any but a loopback one needs a secret.
        port: the port; 0 takes a free one.
        secret: what clients must send, as ``Authorization: Bearer ...``.
        strict: refuse requests without a shard or with a bad value. Otherwise a missing or bad shard
            counts as 0, and any other bad value is ignored.
        max_connections: how many clients may be connected at one time; others are refused.

    Returns:
        The broker, which runs: a context manager, with its ``url``, ``port`` and ``close``.

    Raises:
        OSError: the address cannot be listened on.
        TypeError, ValueError: an argument is of the wrong kind or out of range, or a secret is missing.
    """
    if not isinstance(queue, GatewayQueue):
        raise TypeError(f"queue must be a GatewayQueue, not {type(queue).__name__}")
    return Broker(queue, BrokerSettings(host, port, secret, bool(strict), max_connections))


class Broker:
    """A running broker, as ``serve`` returns it.

    Attributes:
        url: where it is, such as ``http://127.0.0.1:8787``.
        port: the port it listens on.
    """

    def __init__(self, queue: GatewayQueue, settings: BrokerSettings) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._failed)
        self._logged_at = -60.0  # when it was logged that there were no files left
        most = _affordable(settings.max_connections)
        self._service = Service(queue, self._loop, replace(settings, max_connections=most))
        self._stopped = asyncio.Event()
        self._closing = threading.Lock()
        factory, create = partial(Connection, self._service), self._loop.create_server
        try:
            self._sockets = listen(settings.host, settings.port)
            self._servers = [
                self._loop.run_until_complete(create(factory, sock=one, backlog=BATCH))
                for one in self._sockets
            ]
            for one in self._sockets:
                one.listen(BACKLOG)  # ``create_server`` has lowered it to a batch
        except BaseException:
            self._loop.close()
            raise
        self.port: int = self._sockets[0].getsockname()[1]
        host = settings.host or "0.0.0.0"  # noqa: S104 - as it was asked for
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._thread = threading.Thread(
            target=self._run_and_close, name="gateway-queue-broker", daemon=True
        )
        self._thread.start()
        process.register_server(self)

    def open_files(self) -> list[int]:
        """Return the file descriptors of all sockets."""
        sockets = (*self._sockets, *(one.socket for one in self._service.connections))
        return [file for one in sockets if (file := one.fileno()) >= 0]

    def __repr__(self) -> str:
        state = "" if self._thread.is_alive() else " closed"
        return f"<Broker {self.url}{state}>"

    async def _run(self) -> None:
        await self._stopped.wait()
        with suppress(NotImplementedError):  # Windows' loop accepts in another way
            for one in self._sockets:
                self._loop.remove_reader(one)
        accepting = asyncio.all_tasks() - {asyncio.current_task()}
        if accepting:  # closing the servers now would drop these connections
            await asyncio.wait(accepting, timeout=END_TIMEOUT)
        for server in self._servers:
            server.close()
        self._service.stop()
        give_up = self._loop.time() + END_TIMEOUT
        while self._service.connections and self._loop.time() < give_up:
            await asyncio.sleep(0.01)
        for connection in list(self._service.connections):
            connection.abort()
        for _ in range(3):  # until they are closed
            await asyncio.sleep(0)

    def _run_and_close(self) -> None:
        with closing(self._loop):
            self._loop.run_until_complete(self._run())

    def close(self) -> None:
        """Stop granting and close all connections. Closing again changes nothing."""
        with self._closing:
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._stopped.set)
                self._thread.join()
            for part in (self._service.shared, self._service.ledger):
                part.executor.shutdown(wait=False, cancel_futures=True)

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error of the event loop, unless a client just went away."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
            if time.monotonic() - self._logged_at >= 60.0:
                self._logged_at = time.monotonic()
                log.error("no connection can be accepted for now: %s", error)
        elif isinstance(error, ValueError) and self._sockets[0].fileno() < 0:
            pass  # asyncio has tried to accept again, on a socket that is closed now
        elif not isinstance(error, ConnectionError):
            log.error("%s", context.get("message"), exc_info=error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _affordable(most: int) -> int:
    """Return how many connections the limit of open files allows."""
    if sys.platform == "win32":
        return most
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if files == resource.RLIM_INFINITY else max(1, min(most, files - SPARE_FILES))
