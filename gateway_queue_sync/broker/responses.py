"""The broker's responses: values, and their bytes."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, NamedTuple

JSON = "application/json"

Header = tuple[str, str]
Refusal = tuple[int, str] | tuple[int, str, Header]
"""A status, the reason, and a header."""


class Response(NamedTuple):
    """A whole response."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[Header, ...] = ()

    def encoded(self, *, keep_alive: bool, head_only: bool) -> bytes:
        """Return the bytes to send."""
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Cache-Control: no-store",
            f"Connection: {'keep-alive' if keep_alive else 'close'}",
            *(f"{name}: {value}" for name, value in self.headers),
            "\r\n",
        ]
        return "\r\n".join(lines).encode("latin-1") + (b"" if head_only else self.body)


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
GRANTED = Response(200, b'{"message": "You\'re free to connect now! :)"}')
NOTED = Response(200, b'{"message": "noted"}')
TO_PAGE = Response(303, headers=(("Location", "/status"),))
NOT_FOUND = Response(404)
PAGE_HEADERS = (
    ("Content-Security-Policy", "frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
)


def as_json(value: Any) -> Response:
    """Return a response in JSON. A snapshot is written as its fields."""
    return Response(200, json.dumps(value, separators=(",", ":"), default=_fields).encode())


def _fields(one: Any) -> dict[str, Any]:  # dataclasses.asdict copies each value, which is slow
    return {name: getattr(one, name) for name in one.__slots__}


def error(status: int, reason: str, *headers: Header) -> Response:
    """Return a refusal, for a client that understands a status."""
    return Response(status, json.dumps({"error": reason}).encode(), headers=headers)
