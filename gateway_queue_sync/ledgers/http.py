"""The ledger of any machine: a broker (``python -m gateway_queue_sync serve``) that answers over HTTP.

Each request is one POST of JSON over a connection that is kept. Only a whole, valid answer counts.
Time is the broker's; a permit's age is counted from when it was asked for.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import time
import urllib.parse
from collections import deque
from typing import Any

from gateway_queue_sync.clock import Clock
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers import wire
from gateway_queue_sync.ledgers.shared import SharedLedger, Terms
from gateway_queue_sync.messages import Reply, Request

PATH = "/ledger"
OUR_HEADER = "Gateway-Queue"  # who sends it knows what a status means
SOCKET_TIMEOUT = 2.0  # s for a whole call: a deadline is kept that closely
MAX_IDLE = 30.0  # s for which a connection is kept; the broker hangs up after 75
MAX_ANSWER = 64 << 20  # bytes; a hundred thousand who wait are 5 MiB


class HttpLedger(SharedLedger):
    """An account that a broker keeps.

    Args:
        url: the broker's.
        secret: what it asks for, if it does.
        name: must be the default: a broker keeps one account.
        terms: what this process wants of it.
        clock: what tells the time here.
    """

    shares_clock = False

    def __init__(self, url: str, secret: str | None, name: str, terms: Terms, clock: Clock) -> None:
        if name != "default":
            raise ValueError(f"a broker keeps one account: name must be left out, not {name!r}")
        self._url = _parts(url)
        self._headers = {OUR_HEADER: "1", "Content-Type": "application/json"}
        if secret is not None:
            self._headers["Authorization"] = f"Bearer {checked_secret(secret)}"
        self._closed = False
        super().__init__(terms, clock)

    def _begin(self) -> None:
        super()._begin()
        # In a forked child the parent's connections are left to the parent.
        self._idle: deque[tuple[float, http.client.HTTPConnection]] = deque()  # since when

    def __repr__(self) -> str:
        return f"broker {self._url.scheme}://{self._url.netloc}{self._url.path}"

    def carry(self, request: Request, patience: float = 0.0) -> Reply:
        """Have the broker answer a request; it waits itself for those who hold its ledger."""
        body = json.dumps(wire.request_as_json(request), separators=(",", ":"))
        try:
            status, answer = self._post(body)
            if status != http.client.OK:
                raise LedgerError(f"{self!r} answered {status}: {_told(answer)}") from None
            reply = wire.reply_from_json(json.loads(answer))
            if reply.number != request.number:
                raise ValueError(f"an answer to request {reply.number}")
        except (OSError, http.client.HTTPException) as error:
            raise LedgerError(f"{self!r}: {str(error) or type(error).__name__}") from error
        except (TypeError, ValueError, LookupError, RecursionError) as error:
            raise LedgerError(f"{self!r} answered nonsense: {error}") from error
        return reply

    def _post(self, body: str) -> tuple[int, bytes]:
        """Send a body and return the status and the body of the answer.

        A kept connection that was closed meanwhile is replaced once; the request does no more if it
        is heard twice.
        """
        while self._idle:
            with contextlib.suppress(IndexError):  # somebody else took it
                since, connection = self._idle.pop()
                if time.monotonic() - since > MAX_IDLE:
                    connection.close()
                    continue
                try:
                    return self._exchange(connection, body)
                except TimeoutError:
                    self._disconnect()  # the idle ones have probably failed, too
                    raise
                except (
                    ConnectionError,
                    http.client.RemoteDisconnected,
                    http.client.CannotSendRequest,
                ):
                    continue
        return self._exchange(self._connection(), body)

    def _connection(self) -> http.client.HTTPConnection:
        encrypted = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if encrypted else http.client.HTTPConnection
        assert self._url.hostname is not None
        connection = kind(self._url.hostname, self._url.port, timeout=SOCKET_TIMEOUT)
        connection.response_class = _Response
        return connection

    def _exchange(self, connection: http.client.HTTPConnection, body: str) -> tuple[int, bytes]:
        response, whole = None, False
        give_up = time.monotonic() + SOCKET_TIMEOUT
        try:
            if connection.sock is not None:
                connection.sock.settimeout(SOCKET_TIMEOUT)
            connection.request("POST", self._url.path + PATH, body, self._headers)
            connection.sock.settimeout(max(0.001, give_up - time.monotonic()))
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER)
            whole = response.isclosed() and not response.will_close
        finally:  # an interrupt, too, may leave half an answer in it
            if whole and not self._closed:
                self._idle.append((time.monotonic(), connection))
            else:
                connection.close()
                if response is not None:  # one without a length is not the connection's any more
                    response.close()
        return response.status, answer

    def close(self) -> None:
        self._closed = True
        self._disconnect()

    def __del__(self) -> None:
        if hasattr(self, "_idle"):  # it was made in whole
            self._disconnect()

    def _disconnect(self) -> None:
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop()[1].close()


class _Response(http.client.HTTPResponse):
    """A response that must be here in whole when the timeout which its socket has now is over."""

    def __init__(self, sock: socket.socket, *args: Any, **settings: Any) -> None:
        super().__init__(sock, *args, **settings)
        self.fp = io.BufferedReader(_Hurried(self.fp, sock))


class _Hurried(io.RawIOBase):
    """What comes from a socket, until the timeout that it had in the beginning is over."""

    def __init__(self, file: io.BufferedReader, sock: socket.socket) -> None:
        self._file, self._sock = file, sock
        self._give_up = time.monotonic() + (sock.gettimeout() or SOCKET_TIMEOUT)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._give_up - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._file.readinto1(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


def _parts(url: str) -> urllib.parse.SplitResult:
    """Return the parts of a broker's URL, or say what is wrong with it without showing it."""
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {type(url).__name__}")
    try:
        parts = urllib.parse.urlsplit(url.rstrip("/"))
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = (
            usable and not (parts.query or parts.fragment) and url.isascii() and url.isprintable()
        )
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("url must be like http://host:8787 (or https://...), without a query")
    if "@" in parts.netloc:
        raise ValueError("url must hold no user or password: a broker takes a secret=")
    return parts


def checked_secret(secret: object) -> str:
    """Return a secret, or say what is wrong with it without showing it."""
    if not isinstance(secret, str):
        raise TypeError(f"secret must be a str, not {type(secret).__name__}")
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ValueError("secret must be printable ASCII characters, without spaces")
    return secret


def _told(answer: bytes) -> str:
    """Return what the body of an error says, as far as it can be shown."""
    with contextlib.suppress(ValueError, TypeError, LookupError):
        return str(json.loads(answer)["error"])[:200]
    return repr(answer[:100])
