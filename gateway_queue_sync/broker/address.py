"""Where a broker listens, and who reaches that."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from urllib.parse import urlsplit

BACKLOG = 4_096  # connections that came and were not accepted yet: a whole fleet may come at once
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # a name's address that this machine lacks


def listen(host: str, port: int) -> list[socket.socket]:
    """Return a socket that listens for each address of a host, all on one port.

    Raises:
        OSError: none can be listened on.
    """
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    with contextlib.ExitStack() as undo:
        for family, address in _addresses(host):
            try:
                one = _listening(family, (address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                failure = error
                continue
            sockets.append(undo.enter_context(one))
            port = one.getsockname()[1]
        if not sockets:
            raise failure or OSError(f"{host!r} has no address")
        undo.pop_all()
    return sockets


def _listening(family: int, address: tuple[object, ...]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.setblocking(False)
        one.bind(address)
        one.listen(BACKLOG)
    except BaseException:
        one.close()
        raise
    return one


def _addresses(host: str) -> list[tuple[int, tuple[object, ...]]]:
    found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        found = _addresses(host)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r} is no address of this machine: {error}") from None
    return all(
        ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback for _, address in found
    )


def names_loopback(host_header: str, served: str) -> bool:
    """Return whether a request's ``Host`` is what only this machine's clients would write."""
    try:
        name = (urlsplit(f"//{host_header}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name in ("", "localhost", served.lower()) or name.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False
