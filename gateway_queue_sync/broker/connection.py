"""One connection of a client: reads requests one after another, and sends the responses."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING

from gateway_queue_sync import request_parser as parser
from gateway_queue_sync.broker import responses
from gateway_queue_sync.broker.responses import Header, Response
from gateway_queue_sync.request_parser import Head, Malformed

if TYPE_CHECKING:
    from gateway_queue_sync.broker.routes import Service
    from gateway_queue_sync.broker.waiting import WaitingClient

HEAD_TIMEOUT = 10.0  # s for a complete head, and for a complete body
IDLE_TIMEOUT = 75.0  # s between two requests
FLUSH_TIMEOUT = 30.0  # s for a client to receive a response
# s until a refused client that takes every status for a permit is disconnected, at least and at most:
TARPIT = (1.0, 10.0)
# Hosts that have vanished are noticed within a minute:
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}


class State(Enum):
    """What a connection does."""

    HEAD = auto()  # waits for the head of a request
    BODY = auto()  # waits for its body
    BUSY = auto()  # the request is being answered
    SENDING = auto()  # waits until the client has taken the response
    TARPIT = auto()  # the client is refused, and will be disconnected without a byte
    CLOSING = auto()  # will be closed when all is sent
    CLOSED = auto()


class Connection(asyncio.Protocol):
    """A client's connection, in the broker's event loop.

    If a client closes its end of the connection, it counts as gone, even if it might still read.

    Attributes:
        state: what it does.
        legacy: whether the client takes every status for a permit.
        reads_body: whether the body of the request is read; else it is skipped.
        waiting: the client's wait for a permit, if there is one.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._received = bytearray()
        self._skip = 0  # bytes of a body to skip
        self._head: Head | None = None  # of the request that is being answered
        self._handler: Callable[[bytes], object]  # of that request; called with its body
        self._body_length = 0
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport
        self.state = State.HEAD
        self.legacy = True
        self.reads_body = False
        self.waiting: WaitingClient | None = None

    def _enter(
        self, state: State, seconds: float | None = None, then: Callable[[], object] | None = None
    ) -> None:
        """Enter a state. If no other state comes within ``seconds``, call ``then``, or close."""
        self.state = state
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds, then or self.close)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with the first request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.socket: socket.socket = transport.get_extra_info("socket")
        _keep_alive(self.socket)
        self._enter(State.HEAD, HEAD_TIMEOUT)
        self._service.opened(self)

    def data_received(self, data: bytes) -> None:
        """Receive data, of this request or already of the next one."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        data, is_first = data[skipped:], not self._received
        if not data or self.state in (State.TARPIT, State.CLOSING):
            return
        self._received += data
        if self.state is State.HEAD:
            if is_first:
                self._enter(State.HEAD, HEAD_TIMEOUT)
            self._read_head()
        elif self.state is State.BODY:
            self._read_body()
        elif len(self._received) > parser.MAX_HEAD:
            self.close()  # the client sends on and on, although it has no answer yet

    def pause_writing(self) -> None:
        """Stop reading until the client has received what was sent."""
        self._transport.pause_reading()
        if self.state is not State.CLOSING:
            self._enter(State.SENDING, FLUSH_TIMEOUT, self.abort)

    def resume_writing(self) -> None:
        """Continue reading."""
        self._transport.resume_reading()
        if self.state is State.SENDING:
            self._expect_next()

    def eof_received(self) -> bool:
        """Close the connection, because the client has closed its end."""
        self.close()
        return False

    def connection_lost(self, _: Exception | None) -> None:
        """Leave the line, because the connection is closed."""
        self._enter(State.CLOSED)
        self._stop_waiting()
        self._service.closed(self)

    def _read_head(self) -> None:
        if self.state is not State.HEAD:
            return
        end = parser.end_of_head(self._received)
        if end is not None:
            head = parser.parse_head(self._take(end))
        elif len(self._received) > parser.MAX_HEAD:
            head = parser.too_large(self._received)
        else:
            return
        self.reads_body, self.legacy = False, not head.understands_status
        if isinstance(head, Malformed):
            self._enter(State.BUSY)
            self.refuse(head.status, head.reason)
            return
        self._head = head
        self._handler = self._service.route(self, head)
        if self.reads_body and head.body_length is not None:
            self._body_length = head.body_length
            if head.expects_continue and not self._received:
                self._transport.write(responses.CONTINUE)
            self._enter(State.BODY, HEAD_TIMEOUT)
            self._read_body()
            return
        length = 1 << 62 if head.body_length is None else head.body_length
        self._skip = length - len(self._take(length))
        self._answer(b"")

    def _read_body(self) -> None:
        if len(self._received) >= self._body_length:
            self._answer(self._take(self._body_length))

    def _answer(self, body: bytes) -> None:
        self._enter(State.BUSY)
        try:
            self._handler(body)
        except BaseException:
            self.abort()
            raise

    def _take(self, length: int) -> bytes:
        """Remove and return so many received bytes, or all if there are fewer."""
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    def respond(self, response: Response) -> bool:
        """Send a response, and continue with the next request. Return false if the client is gone."""
        if self.state is not State.BUSY or self._transport.is_closing():
            return False
        head, self._head, self.waiting = self._head, None, None
        keep_alive = head is not None and head.keep_alive and response.status != 503
        head_only = head is not None and head.method == "HEAD"
        self._transport.write(response.encoded(keep_alive=keep_alive, head_only=head_only))
        if not keep_alive:
            # The client closes first: if it still sends, closing here could destroy the response.
            self._enter(State.CLOSING, FLUSH_TIMEOUT, self.abort)
            with contextlib.suppress(OSError):  # it is gone
                self._transport.write_eof()
        elif self.state is State.BUSY:  # else writing was paused: the client has not taken it yet
            self._expect_next()
        return True

    def refuse(self, status: int, reason: str, *headers: Header) -> None:
        """Send an error to a client that understands it; close the connection of any other."""
        if self.state is not State.BUSY:
            return
        self._service.reports.refused[status] += 1
        if not self.legacy:
            self.respond(responses.error(status, reason, *headers))
        elif status == 408:  # its own timeout is over
            self.close()
        else:
            self._stop_waiting()
            self._received.clear()
            self._transport.pause_reading()
            self._enter(State.TARPIT, random.uniform(*TARPIT))

    def _expect_next(self) -> None:
        """Continue with the next request, which may be here already."""
        self._enter(State.HEAD, HEAD_TIMEOUT if self._received else IDLE_TIMEOUT)
        if self._received:
            asyncio.get_running_loop().call_soon(self._read_head)

    def _stop_waiting(self) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.leave()

    def close(self) -> None:
        """Leave the line, and close when all data is sent, after 30 s at most."""
        self._stop_waiting()
        if self.state is not State.CLOSED:
            self._enter(State.CLOSING, FLUSH_TIMEOUT, self.abort)
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()


def _keep_alive(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            client.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
