"""The checked settings of a broker, and the addresses on which it listens."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from gateway_queue_sync.ledgers.shared.http import checked_secret
from gateway_queue_sync.models import whole_number

BACKLOG = 4_096  # connections that are not accepted yet, since all shards may connect at once
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this machine does not have the address


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """The arguments of ``serve``. Raises ``TypeError`` or ``ValueError``, as that does."""

    host: str
    port: int
    secret: str | None
    strict: bool
    max_connections: int

    def __post_init__(self) -> None:
        if not isinstance(self.host, str):
            raise TypeError(f"host must be a str, not {type(self.host).__name__}")
        if whole_number("port", self.port) > 65_535:
            raise ValueError(f"port must be at most 65535, not {self.port}")
        whole_number("max_connections", self.max_connections, least=1)
        if self.secret is not None:
            checked_secret(self.secret)
        elif not is_loopback(self.host):
            raise ValueError(
                f"{self.host!r} is not a loopback address: any client that reaches it could use up "
                "the bot's session starts, so it needs a secret"
            )


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on one port, one for each address of a host.

    Raises:
        OSError: none can be listened on.
    """
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    with contextlib.ExitStack() as undo:
        for family, address in _addresses(host):
            one = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if os.name == "posix":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setblocking(False)
            try:
                one.bind((address[0], port, *address[2:]))
                one.listen(BACKLOG)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                one.close()
                failure = error
                continue
            sockets.append(one)
            port = one.getsockname()[1]
        if not sockets:
            raise failure or OSError(f"{host!r} has no address")
        undo.pop_all()
    return sockets


def _addresses(host: str) -> list[tuple[int, tuple[object, ...]]]:
    found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can connect to a host's addresses."""
    try:
        found = [str(address[0]).partition("%")[0] for _, address in _addresses(host)]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r} is no address of this machine: {error}") from None
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def names_loopback(host_header: str, served: str) -> bool:
    """Return whether a request's ``Host`` is a name of this machine."""
    with contextlib.suppress(ValueError):
        name = (urlsplit(f"//{host_header}").hostname or "").rstrip(".")
        is_local = name in ("", "localhost", served.lower()) or name.endswith(".localhost")
        return is_local or ipaddress.ip_address(name).is_loopback
    return False
