"""The ledger of a broker (``python -m gateway_queue_sync serve``), over HTTP.

Each request is one POST of JSON over a connection that is reused. Only a complete, valid reply to the
latest attempt counts. A request may be sent again over another connection, since the broker's ledger
applies it once.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import ssl
import threading
import urllib.parse
from collections import deque
from typing import Any

from gateway_queue_sync.clock import SYSTEM_CLOCK
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared.backend import Unreachable
from gateway_queue_sync.ledgers.shared.bounds import check_reply
from gateway_queue_sync.ledgers.shared.messages import Reply, Request, from_wire, to_wire
from gateway_queue_sync.models import US_PER_SECOND

PATH = "/ledger"
OUR_HEADER = "Gateway-Queue"  # says that this client understands a status
CALL_TIMEOUT = 2.0  # s for a whole call, from the look-up of the name to the last byte
MAX_IDLE = 30.0  # s for which a connection is kept; the broker closes it after 75
MAX_ANSWER = 64 << 20  # bytes
MAX_SHOWN = 200  # characters of what a broker said
_STALE = (
    *(ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError),
    *(http.client.NotConnected, http.client.CannotSendRequest),
)
_PASSING = (http.client.REQUEST_TIMEOUT, http.client.TOO_EARLY, http.client.TOO_MANY_REQUESTS)


class HttpBackend:
    """An account of a broker.

    Args:
        url: the broker's URL.
        secret: its secret, if it has one.
        name: must be the default, since a broker has one account.
    """

    def __init__(self, url: str, secret: str | None = None, name: str = "default") -> None:
        if name != "default":
            raise ValueError(f"a broker keeps one account: name must be left out, not {name!r}")
        self._url = _parts(url)
        self._secret = None if secret is None else checked_secret(secret)
        self._headers = {OUR_HEADER: "1", "Content-Type": "application/json"}
        if self._secret is not None:
            self._headers["Authorization"] = f"Bearer {self._secret}"
        self._tls: ssl.SSLContext | None = None
        self._generation = 0  # of connections: those of an earlier one are not kept
        self._begin()

    def _begin(self) -> None:
        self._idle: deque[tuple[float, http.client.HTTPConnection]] = deque()  # since when
        self._look_up = _LookUp(self._url)

    def __repr__(self) -> str:
        return f"broker {self._url.scheme}://{self._url.netloc}{self._url.path}"

    def ask(self, request: Request) -> Reply:
        """Send a request to the broker and return its reply. From any thread."""
        body = json.dumps(to_wire(request), separators=(",", ":")).encode()
        try:
            status, answer, ends = self._post(body, _now() + CALL_TIMEOUT)
        except ssl.SSLCertVerificationError as error:
            raise LedgerError(f"{self!r}: {error}") from error
        except (OSError, http.client.IncompleteRead, http.client.NotConnected) as error:
            raise Unreachable(f"{self!r}: {str(error) or type(error).__name__}") from error
        except http.client.HTTPException as error:
            said = self._shown(str(error) or type(error).__name__)
            raise LedgerError(f"{self!r} sent an invalid answer: {said}") from error
        if status != http.client.OK:
            passes = status >= http.client.INTERNAL_SERVER_ERROR or status in _PASSING
            failure = Unreachable if passes else LedgerError
            said = self._shown(_reason(answer))
            raise failure(f"{self!r} answered {status}: {said}") from http.client.HTTPException(
                status
            )
        try:
            reply = from_wire(Reply, json.loads(answer))
            check_reply(request, reply)
        except (ValueError, RecursionError) as error:
            said = self._shown(str(error))
            failure = LedgerError if ends else Unreachable  # it may have been cut
            raise failure(f"{self!r} sent an invalid answer: {said}") from error
        if (reply.attempt, reply.number) != (request.attempt, request.number):
            self._disconnect()  # the same fault may have hit the other connections
            mismatch = ValueError(f"an answer to attempt {reply.attempt}, not {request.attempt}")
            raise Unreachable(f"{self!r} answered another request") from mismatch
        return reply

    relay = ask
    """The broker uses the times in a request in any case."""

    def _shown(self, text: str) -> str:
        """Return a broker's words as far as they may be shown."""
        if self._secret is not None:
            text = text.replace(self._secret, "***")
        return text[:MAX_SHOWN]

    # --- connections ------------------------------------------------------------------------------

    def _post(self, body: bytes, give_up: float) -> tuple[int, bytes, bool]:
        """Send a body. Return the status and body of the answer, and whether its length was given.

        If a reused connection was closed meanwhile, the body is sent again over a new one. That is
        safe, because a request that arrives twice is applied once.
        """
        while (connection := self._kept()) is not None:
            try:
                return self._exchange(connection, body, give_up)
            except TimeoutError:
                self._disconnect()  # the same fault may have hit the others
                raise
            except _STALE:
                continue
        return self._exchange(self._connected(give_up), body, give_up)

    def _kept(self) -> http.client.HTTPConnection | None:
        while True:
            try:
                since, connection = self._idle.pop()
            except IndexError:
                return None
            if _now() - since <= MAX_IDLE:
                return connection
            connection.close()

    def _connected(self, give_up: float) -> http.client.HTTPConnection:
        url = self._url
        assert url.hostname is not None
        connection: http.client.HTTPConnection
        if url.scheme == "https":
            if self._tls is None:
                self._tls = ssl.create_default_context()
            connection = http.client.HTTPSConnection(url.hostname, url.port, context=self._tls)
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port)
        connection.auto_open = 0  # it would not keep the deadline
        connection.response_class = _Response
        sock = _open(self._look_up.addresses(give_up), give_up)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock.settimeout(_left(give_up))  # the handshake keeps it as a whole
                sock = self._tls.wrap_socket(sock, server_hostname=url.hostname)
        except BaseException:
            sock.close()
            raise
        connection.sock = sock
        return connection

    def _exchange(
        self, connection: http.client.HTTPConnection, body: bytes, give_up: float
    ) -> tuple[int, bytes, bool]:
        response, whole, generation = None, False, self._generation
        try:
            connection.sock.settimeout(_left(give_up))
            connection.request("POST", self._url.path + PATH, body, self._headers)
            connection.sock.settimeout(_left(give_up))
            response = connection.getresponse()
            ends = response.chunked or response.length is not None
            answer = response.read(MAX_ANSWER)
            if response.length:
                raise http.client.IncompleteRead(answer, response.length)
            whole = response.isclosed() and not response.will_close
        finally:  # an interrupt, too, may leave half an answer in it
            if whole and generation == self._generation:
                self._idle.append((_now(), connection))
            else:
                connection.close()
                if response is not None:  # one without a length is not the connection's any more
                    response.close()
        return response.status, answer, ends

    def _disconnect(self) -> None:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread took it
                self._idle.pop()[1].close()

    def close(self) -> None:
        """Close the connections; one that is in use, at the end of its call."""
        self._generation += 1
        self._disconnect()

    def __del__(self) -> None:
        if hasattr(self, "_idle"):  # else the constructor has raised
            self._disconnect()

    # --- forks ------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Do nothing: connections stay with the parent."""

    def after_fork_in_parent(self) -> None:
        """Do nothing."""

    def begin_in_child(self) -> None:
        """Begin without connections. The parent's are not used."""
        self.close()  # the child's descriptors only: the connections stay open
        self._begin()


class _LookUp:
    """Looks up the addresses of a broker in a thread, because the system's look-up has no deadline."""

    def __init__(self, url: urllib.parse.SplitResult) -> None:
        self._name = url.hostname or ""
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._found: list[Any] | OSError = []

    def addresses(self, give_up: float) -> list[Any]:
        """Return the result of ``getaddrinfo``."""
        with contextlib.suppress(socket.gaierror):
            return self._ask(socket.AI_NUMERICHOST)
        with self._lock:
            thread = self._thread
            if thread is None or not thread.is_alive():
                thread = threading.Thread(
                    target=self._run, name="gateway-queue-look-up", daemon=True
                )
                thread.start()
                self._thread = thread
        thread.join(_left(give_up))
        if thread.is_alive():
            raise TimeoutError(f"the look-up of {self._name} timed out")
        if isinstance(self._found, OSError):
            raise OSError(*self._found.args)  # a new one, with a traceback of this call only
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._ask(0)
        except OSError as error:
            error.__traceback__ = None
            self._found = error
        except UnicodeError as error:
            self._found = OSError(f"{self._name!r} is no name of a host: {error}")

    def _ask(self, flags: int) -> list[Any]:
        return socket.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM, flags=flags)


def _open(addresses: list[Any], give_up: float) -> socket.socket:
    """Return a socket that is connected to the first address that accepts."""
    failure: OSError = OSError("the name has no address")
    for at, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.001, _left(give_up) / (len(addresses) - at)))
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    try:
        raise failure
    finally:
        del failure  # else the exception and this frame refer to each other


def _now() -> float:
    return SYSTEM_CLOCK.now_us() / US_PER_SECOND


def _left(give_up: float) -> float:
    """Return how many seconds are left, or raise."""
    left = give_up - _now()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _Response(http.client.HTTPResponse):
    """A response that must be complete before the current timeout of its socket is over."""

    def __init__(self, sock: socket.socket, *args: Any, **settings: Any) -> None:
        super().__init__(sock, *args, **settings)
        self.fp = io.BufferedReader(_Timed(self.fp, sock))


class _Timed(io.RawIOBase):
    """Reads from a socket, in all for no longer than the timeout that it has at the beginning."""

    def __init__(self, file: io.BufferedReader, sock: socket.socket) -> None:
        self._file, self._sock = file, sock
        self._give_up = _now() + (sock.gettimeout() or CALL_TIMEOUT)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._give_up))
        return self._file.readinto1(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


# --- values ---------------------------------------------------------------------------------------


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


def _reason(answer: bytes) -> str:
    """Return the message in the body of an error."""
    with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
        return str(json.loads(answer)["error"])
    return repr(answer[:100])
