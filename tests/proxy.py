"""A TCP proxy in front of a server, which causes the faults of a network."""

from __future__ import annotations

import contextlib
import enum
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from functools import partial


class Fault(enum.Enum):
    """What becomes of a call."""

    LOST = "it is executed, and its reply is lost with the connection"
    UNANSWERED = "it is executed, and its reply never comes"
    HELD = "it gets through only when `release` is called, even if its caller has gone by then"
    RESET = "its connection is reset before it gets through"
    HOLE = "nothing gets through, and nothing comes back"


class _Link:
    """A client's connection, and the one to the server that goes with it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client: socket.socket | None = client
        self.server = server
        self.fault: Fault | None = None  # what becomes of the next reply
        self.held = b""


class Proxy:
    """One port before another. All sockets are served by one thread.

    Attributes:
        port: where clients connect.
        server_port: where new connections lead.
        next: what becomes of the next calls: nothing, a fault, or bytes to answer instead of the server.
        always: what becomes of the calls after those.
        calls: how many calls came.
        on_loss: is called when a reply is lost.
    """

    CALL = b"EVAL"  # a request without this word belongs to a client's greeting

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.next: deque[Fault | bytes | None] = deque()
        self.always: Fault | bytes | None = None
        self.calls = 0
        self.on_loss: Callable[[], object] = lambda: None
        self._links: list[_Link] = []
        self._orders: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._bell, self._button = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._obey)
        self._listener: socket.socket | None = None
        self._ends = False
        self._listen(0)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    # --- what a test says -------------------------------------------------------------------------

    def cut(self) -> None:
        """Close all connections."""
        self._order(self._cut)

    def refuse(self) -> None:
        """Close all connections, and refuse new ones."""
        self._order(self._refuse)

    def accept(self) -> None:
        """Accept connections again."""
        self._order(partial(self._listen, self.port))

    def release(self) -> None:
        """Let the calls that are held get through."""
        self._order(self._release)

    def close(self) -> None:
        self._order(self._end)
        self._thread.join()
        self._selector.close()
        self._bell.close()
        self._button.close()

    def _order(self, what: Callable[[], None]) -> None:
        done = threading.Event()
        self._orders.append((what, done))
        self._button.send(b".")
        assert done.wait(10), "the proxy is stuck"

    # --- in its thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ends:
            for key, _ in self._selector.select():
                if key.fileobj.fileno() >= 0:  # not closed by what came before it
                    key.data()

    def _obey(self) -> None:
        self._bell.recv(1)
        what, done = self._orders.popleft()
        what()
        done.set()

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=100)
        self.port = self._listener.getsockname()[1]
        self._selector.register(self._listener, selectors.EVENT_READ, self._connect)

    def _connect(self) -> None:
        assert self._listener is not None
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self.server_port))
        except OSError:
            client.close()
            return
        link = _Link(client, server)
        self._links.append(link)
        self._selector.register(client, selectors.EVENT_READ, partial(self._ask, link))
        self._selector.register(server, selectors.EVENT_READ, partial(self._answer, link))

    def _ask(self, link: _Link) -> None:
        assert link.client is not None
        data = b""
        with contextlib.suppress(OSError):
            data = link.client.recv(1 << 20)
        if not data:
            self._drop(link)
            return
        fault = self._fault_of(link, data)
        if isinstance(fault, bytes):
            link.client.sendall(fault)
        elif fault is Fault.RESET:
            link.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._drop(link)
        elif fault is Fault.HELD or link.held:
            link.held += data
        elif fault is not Fault.HOLE:
            link.fault = fault
            link.server.sendall(data)

    def _fault_of(self, link: _Link, data: bytes) -> Fault | bytes | None:
        if self.CALL not in data:  # a greeting, or what is left of a call
            return Fault.HOLE if self.always is Fault.HOLE else link.fault
        self.calls += 1
        return self.next.popleft() if self.next else self.always

    def _answer(self, link: _Link) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = link.server.recv(1 << 20)
        if data and link.fault is not None:
            self.on_loss()
        if not data or link.fault is Fault.LOST:
            link.held = b""
            self._drop(link)
        elif link.fault is None and link.client is not None:
            with contextlib.suppress(OSError):
                link.client.sendall(data)

    def _drop(self, link: _Link) -> None:
        """Close both connections; the server's not while a call is held."""
        if link.client is not None:
            self._close(link.client)
            link.client = None
        if not link.held:
            self._close(link.server)
            self._links.remove(link)

    def _close(self, it: socket.socket) -> None:
        self._selector.unregister(it)
        it.close()

    def _cut(self) -> None:
        for link in list(self._links):
            link.held = b""
            self._drop(link)

    def _refuse(self) -> None:
        self._cut()
        if self._listener is not None:
            self._close(self._listener)
            self._listener = None

    def _release(self) -> None:
        for link in list(self._links):
            data, link.held = link.held, b""
            if data:
                link.server.sendall(data)

    def _end(self) -> None:
        self._refuse()
        self._ends = True
