"""Running a broker: a socket, a thread with an event loop, and the way in and out of both."""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self

from gateway_queue_sync.broker.address import BACKLOG, is_loopback, listen
from gateway_queue_sync.broker.connection import Connection
from gateway_queue_sync.broker.desk import Desk, give_back
from gateway_queue_sync.broker.throttle import Throttle
from gateway_queue_sync.ledgers.http import checked_secret
from gateway_queue_sync.models import Permit, whole_number
from gateway_queue_sync.queue import GatewayQueue

if sys.platform != "win32":  # which has no such limit
    import resource

log = logging.getLogger("gateway_queue_sync.broker")

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8787
BATCH = 64  # connections that are accepted at once, before others get their turn
POOL = 8  # threads that talk with the ledger
MAX_CONNECTIONS = 20_000
SPARE_FILES = 64
LAST_WORDS = 0.2  # s for what was written to be sent
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
    """Let any process ask a queue over HTTP, from a thread in the background, until it is closed.

    A client asks ``GET /?shard=N`` and is held without a byte until its shard may identify; the README
    has the whole wire. ``HttpQueue`` needs a queue whose account is shared: an ``SqliteQueue`` or a
    ``RedisQueue``. The queue stays its owner's, who closes it.

    Without a secret only this machine reaches it, and the pages in its browsers: those get no permit,
    cannot speak to the ledger (``Sec-Fetch-Site``, ``Origin`` and ``Content-Type`` are looked at), and
    see no data under a name of their own that was pointed here (so is ``Host``). Any other program of
    this machine may ask.

    Args:
        queue: what grants.
        host: the address to listen on; any but a loopback one needs a secret.
        port: the port; 0 takes a free one.
        secret: what clients must send, as ``Authorization: Bearer ...``.
        strict: refuse requests without a shard, or with a bad one, rather than taking it for shard 0.
        max_connections: how many there may be, at most; further clients are refused.

    Returns:
        The broker, which runs: a context manager, with its ``url``, ``port`` and ``close``.

    Raises:
        OSError: the address cannot be listened on.
        TypeError, ValueError: an argument is of the wrong kind or out of range, or the secret missing.
    """
    if not isinstance(queue, GatewayQueue):
        raise TypeError(f"queue must be a GatewayQueue, not {type(queue).__name__}")
    if not isinstance(host, str):
        raise TypeError(f"host must be a str, not {type(host).__name__}")
    port = whole_number("port", port)
    if port > 65_535:
        raise ValueError(f"port must be at most 65535, not {port}")
    max_connections = whole_number("max_connections", max_connections)
    if secret is not None:
        secret = checked_secret(secret)
    elif not is_loopback(host):
        raise ValueError(
            f"{host!r} is no loopback address: whoever reaches it could use up the bot's session "
            "starts, so it needs a secret"
        )
    settings: dict[str, Any] = {"secret": secret, "strict": bool(strict)}
    return Broker(queue, host, port, max_connections=_affordable(max_connections), **settings)


class Broker:
    """A broker that runs: what ``serve`` returns.

    Attributes:
        url: where it is, such as ``http://127.0.0.1:8787``.
        port: the port it listens on.
    """

    def __init__(self, queue: GatewayQueue, host: str, port: int, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._failed)
        self._out_of_files = Throttle(1, 60.0)
        self._pool = ThreadPoolExecutor(POOL, thread_name_prefix="gateway-queue-broker")
        self._desk = Desk(queue, self._loop, self._pool, served=host, **settings)
        self._closing = threading.Lock()
        self._futures: list[Future[Permit]] = []  # of those who waited when it was closed
        try:
            self._sockets = listen(host, port)
            self._servers = [
                self._loop.run_until_complete(
                    self._loop.create_server(
                        partial(Connection, self._desk), sock=one, backlog=BATCH
                    )
                )
                for one in self._sockets
            ]
            for one in self._sockets:
                one.listen(BACKLOG)  # which was lowered to a batch
        except BaseException:
            self._loop.close()
            raise
        self.port: int = self._sockets[0].getsockname()[1]
        shown = f"[{host}]" if ":" in host else host or "0.0.0.0"  # noqa: S104 - as it was asked for
        self.url = f"http://{shown}:{self.port}"
        self._thread = threading.Thread(target=self._run, name="gateway-queue-broker", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "" if self._thread.is_alive() else " closed"
        return f"<Broker {self.url}{state}>"

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._let_go())
        finally:
            self._loop.close()

    def close(self) -> None:
        """Accept and grant no more, and close all connections; closing again changes nothing.

        Takes a fifth of a second, and as long as the queue's ledger takes to hear who leaves.
        """
        with self._closing:
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._stop)
                self._thread.join()
            for future in self._futures:
                give_back(future)
            self._futures = []
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _stop(self) -> None:
        for server in self._servers:
            server.close()
        self._futures = self._desk.stop()
        self._end(self._loop.time() + LAST_WORDS)

    def _end(self, at_last: float) -> None:
        if self._desk.connections and self._loop.time() < at_last:
            self._loop.call_later(0.01, self._end, at_last)
        else:
            self._loop.stop()

    async def _let_go(self) -> None:
        """Close what has not closed itself, and what was just being accepted."""
        accepting = asyncio.all_tasks() - {asyncio.current_task()}
        if accepting:
            await asyncio.wait(accepting, timeout=LAST_WORDS)
        for connection in list(self._desk.connections):
            connection.abort()
        for _ in range(3):  # until they have let go
            await asyncio.sleep(0)

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what went wrong in the loop, unless it is a client that went away."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
            if self._out_of_files.lets_through():
                log.error("no connection can be accepted for now: %s", error)
        elif not isinstance(error, ConnectionError) and not self._is_late_accept(error):
            log.error("%s", context.get("message"), exc_info=error)

    def _is_late_accept(self, error: object) -> bool:
        """Return whether asyncio has tried to accept again, on a socket that is closed now."""
        return isinstance(error, ValueError) and self._sockets[0].fileno() < 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _affordable(most: int) -> int:
    """Return how many connections there may be with the files that this process may open."""
    if sys.platform == "win32":
        return most
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if files == resource.RLIM_INFINITY else max(1, min(most, files - SPARE_FILES))
