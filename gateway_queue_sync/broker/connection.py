"""One client's connection: reads requests one after another, and is held without a byte meanwhile."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from concurrent.futures import Future
from http import HTTPStatus
from typing import TYPE_CHECKING

from gateway_queue_sync.broker import wire
from gateway_queue_sync.broker.places import Place
from gateway_queue_sync.ledgers.http import PATH
from gateway_queue_sync.models import Permit

if TYPE_CHECKING:
    from gateway_queue_sync.broker.desk import Desk

HEAD_TIMEOUT = 10.0  # s for a head to come in whole
IDLE_TIMEOUT = 75.0  # s between two requests
SEND_TIMEOUT = 30.0  # s for a client to take what it is sent
HOLD = (1.0, 10.0)  # s for which a refused client is held, which would take a status for a permit
MAX_BODY = 1 << 20  # bytes that are read
KEEPALIVE = {  # vanished hosts are noticed within a minute
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 60_000,
}


class Connection(asyncio.Protocol):
    """A client, as the broker's loop sees it.

    It is *idle* (reads a head), *busy* (its request is answered elsewhere), or *doomed* (held, to be
    closed without an answer). A client whose end of the connection is closed is gone, even if it might
    still read.

    Attributes:
        future: of the permit it waits for.
        place: where it stands meanwhile, or is to stand again when the budget resets.
        until: when it has waited for long enough, in seconds of the loop's clock, if ever.
        ask: what it asked for.
        head: of the request that is being answered.
    """

    __slots__ = (
        "_doomed",
        "_paused",
        "_received",
        "_skip",
        "_timer",
        "_transport",
        "_wants_body",
        "ask",
        "desk",
        "future",
        "head",
        "place",
        "until",
    )

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.future: Future[Permit] | None = None
        self.place: Place | None = None
        self.until: float | None = None
        self.ask = wire.Ask()
        self.head: wire.Head | None = None
        self._received = bytearray()
        self._skip = 0  # bytes of a body that nobody reads
        self._wants_body = False
        self._doomed = False
        self._paused = False  # until the client has taken what was sent
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    # --- what asyncio calls -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        _keep_alive(transport.get_extra_info("socket"))
        self.after(HEAD_TIMEOUT, self.close)
        self.desk.arrived(self)

    def data_received(self, data: bytes) -> None:
        """Take what came: the next request, or what a held client sends though nobody reads it."""
        if self._doomed:
            return
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
            if not data:
                return
        was_empty = not self._received
        self._received += data
        if self.head is not None:
            if len(self._received) > (MAX_BODY if self._wants_body else wire.MAX_HEAD):
                self.close()  # it is told nothing, and talks on and on
            elif self._wants_body:
                self._read_body()
            return
        if was_empty:
            self.after(HEAD_TIMEOUT, self.close)
        self._read_head()

    def pause_writing(self) -> None:
        """Read on when the client has taken what it was sent, and not before."""
        assert self._transport is not None
        self._paused = True
        self._transport.pause_reading()
        self.after(SEND_TIMEOUT, self.abort)

    def resume_writing(self) -> None:
        """Go on."""
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            self._expect_next()

    def eof_received(self) -> bool:
        """Take a client that closes its end for gone."""
        self.close()
        return False

    def connection_lost(self, _: Exception | None) -> None:
        """Leave."""
        self._cancel_timer()
        self._transport = None
        self.desk.left(self)

    # --- reading ----------------------------------------------------------------------------------

    def _read_head(self) -> None:
        end = wire.end_of_head(self._received)
        if end is None:
            if len(self._received) > wire.MAX_HEAD:
                self.desk.metrics.refused[431] += 1
                self._doom()
            return
        self.head = head = wire.read_head(self._take(end))
        self._cancel_timer()
        refusal = self._refusal(end, head)
        if refusal is None and head.path == PATH:
            self._wants_body = True
            self.after(HEAD_TIMEOUT, self.close)
            self._read_body()
            return
        length = head.body_length
        if length is None:
            self.head = head = head._replace(closes=True)  # where its body ends is not known
            length = 1 << 62
        self._skip = length - len(self._take(length))
        if refusal is None:
            self.desk.asked(self, head)
        else:
            self.refuse(*refusal)

    def _refusal(self, size: int, head: wire.Head) -> wire.Refusal | None:
        """Return why a request is refused, before any of its body is read."""
        if size > wire.MAX_HEAD:
            return 431, "the head of the request is too large"
        if head.refusal is not None:
            return 400, head.refusal
        refusal = self.desk.refusal(self, head)
        length = head.body_length
        if refusal is None and head.path == PATH and (length is None or length > MAX_BODY):
            return 413, "the body must have a Content-Length of 1 MiB at most"
        return refusal

    def _read_body(self) -> None:
        assert self.head is not None
        length = self.head.body_length
        if length is not None and len(self._received) >= length:
            self._cancel_timer()
            self._wants_body = False
            self.desk.asked(self, self.head, self._take(length))

    def _take(self, length: int) -> bytes:
        """Return so many of the bytes that came, or all there are."""
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    # --- answering --------------------------------------------------------------------------------

    def answer(self, answer: wire.Answer) -> bool:
        """Send an answer, and go on to the next request; return false if the client is gone."""
        if self._transport is None or self._transport.is_closing():
            return False
        assert self.head is not None
        self._cancel_timer()
        self._wants_body = False
        head, self.head = self.head, None
        self._transport.write(wire.response(answer, head))
        if head.closes:
            self.close()
        elif not self._paused:
            self._expect_next()
        return True

    def _expect_next(self) -> None:
        """Go on to the next request, which may be here already."""
        self.after(HEAD_TIMEOUT if self._received else IDLE_TIMEOUT, self.close)
        if self._received:
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self.head is None and self._transport is not None and not self._paused:
            self._read_head()

    def refuse(self, status: int, what: str, *headers: tuple[str, str]) -> None:
        """Answer an error to a client that knows what it means, and nothing to any other."""
        assert self.head is not None
        self.desk.metrics.refused[status] += 1
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.head = self.head._replace(closes=True)
        if self.head.is_ours or self.head.is_reserved:
            self.answer(wire.error(status, what, *headers))
        else:
            self._doom()

    def _doom(self) -> None:
        """Hold the client for a while, and close without a byte: it would take any for a permit."""
        if self._transport is None or self._transport.is_closing():
            return
        self._doomed = True
        self._received.clear()
        self._transport.pause_reading()
        self.after(random.uniform(*HOLD), self.close)

    # --- time, and the end ------------------------------------------------------------------------

    def after(self, delay: float, call: Callable[[], object]) -> None:
        """Do something after so many seconds, unless something else is to be done by then."""
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(delay, call)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Leave the line at once, and close when what was written is sent, in 30 s at most."""
        self.desk.leave_line(self)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            self.after(SEND_TIMEOUT, self.abort)

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


def _keep_alive(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            client.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
