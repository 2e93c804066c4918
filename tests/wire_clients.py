"""Raw clients of the broker's plain protocol, over sockets."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from typing import Self

from redis_servers import until

PATIENCE = 20.0  # s
SILENCE = 0.05  # s in which nothing comes


class Client:
    """A connection to a broker."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._rest = b""

    def send(self, text: str | bytes) -> Self:
        self.socket.sendall(text.encode() if isinstance(text, str) else text)
        return self

    def ask(self, target: str = "/?shard=0", method: str = "GET", *headers: str) -> Self:
        if not any(header.startswith("Host:") for header in headers):
            headers = ("Host: 127.0.0.1", *headers)
        return self.send("\r\n".join([f"{method} {target} HTTP/1.1", *headers, "", ""]))

    def read(self, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
        """The next response: status, headers by lower-case name, body."""
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = 0 if head_only else int(headers["content-length"])
        while len(self._rest) < length:
            self._more()
        body, self._rest = self._rest[:length], self._rest[length:]
        return int(first.split()[1]), headers, body

    def _more(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"closed after {self._rest!r}"
        self._rest += data

    @property
    def granted(self) -> bool:
        return self.read()[0] == 200

    def is_silent(self) -> bool:
        """Whether nothing comes for a moment, not even the end."""
        self.socket.settimeout(SILENCE)
        try:
            self._rest += self.socket.recv(1)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(PATIENCE)
        return False

    def is_closed_without_a_byte(self) -> bool:
        """Whether the end comes, and nothing before it."""
        assert not self._rest
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def first_to_hear(clients: dict[int, Client], within: float = PATIENCE) -> int:
    """The number of the client that something comes for."""
    with selectors.DefaultSelector() as selector:
        for number, client in clients.items():
            selector.register(client.socket, selectors.EVENT_READ, number)
        ready = selector.select(within)
        assert len(ready) == 1, f"{len(ready)} of {len(clients)} heard something"
        return ready[0][0].data


@contextlib.contextmanager
def clients_of(port: int):
    """A function that makes clients, all of which are closed in the end."""
    with contextlib.ExitStack() as stack:

        def client(*ask: str) -> Client:
            made = stack.enter_context(Client(port))
            return made.ask(*ask) if ask else made

        yield client


def wait_for_line(queue, waiting: int) -> None:
    until(lambda: queue.snapshot().waiting == waiting, f"{waiting} who wait")


def timed(call):
    start = time.monotonic()
    result = call()
    return result, time.monotonic() - start
