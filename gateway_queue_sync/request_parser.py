"""A strict parser of HTTP/1 requests: bytes in, values out. No state and no I/O.

Source: RFC 9112. It refuses requests that a proxy might read differently: lines outside of the grammar,
folded lines, a bare CR, lengths that are repeated or contradict each other.
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import NamedTuple
from urllib.parse import parse_qsl

from gateway_queue_sync.ledgers.shared.http import OUR_HEADER
from gateway_queue_sync.ledgers.shared.messages import MAX_NUMBER
from gateway_queue_sync.models import Report, to_us

MAX_HEAD = 8_192  # bytes
MAX_HEADERS = 100
MAX_TICKET = 200  # characters
MAX_HEAD_START = 3_600.0  # s
MIN_TIMEOUT = 0.05  # s, since a shared ledger needs some time to answer
_STATUS_HEADER = OUR_HEADER.lower()
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%s) ([!-~]+) HTTP/([0-9])\.([0-9])" % _TOKEN)
_NAME = re.compile(_TOKEN)
_VALUE = re.compile(rb"[\t -~\x80-\xff]*")
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]+)")
_ONCE = ("content-length", "host", "transfer-encoding")


class Malformed(NamedTuple):
    """Why a head is refused, and whether its client understands a status."""

    status: int
    reason: str
    understands_status: bool


class Head(NamedTuple):
    """The head of a request.

    ``headers`` have lower-case names; the values of a repeated one are joined. ``body_length`` is
    ``None`` for a chunked body, which is not read.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    keep_alive: bool
    body_length: int | None

    @property
    def understands_status(self) -> bool:
        """Whether the client says that it does not take every status for a permit."""
        return _STATUS_HEADER in self.headers

    @property
    def expects_continue(self) -> bool:
        """Whether the client sends its body only after ``100 Continue``."""
        return self.headers.get("expect", "").lower() == "100-continue"

    @property
    def is_from_page(self) -> bool:
        """Whether the headers of a browser show that a page or its user has made the request."""
        return "sec-fetch-site" in self.headers or "origin" in self.headers

    @property
    def is_page_load(self) -> bool:
        """Whether a browser asks for a page to show."""
        browser = self.is_from_page or "upgrade-insecure-requests" in self.headers
        browser = browser or self.headers.get("user-agent", "").startswith("Mozilla/")
        return browser and "text/html" in self.headers.get("accept", "").lower()


def end_of_head(received: bytes | bytearray) -> int | None:
    """Return the length of the head at the beginning; ``None`` if its end was not received yet."""
    end = _END_OF_HEAD.search(received)
    return None if end is None else end.end()


def too_large(received: bytes | bytearray) -> Malformed:
    """Return the refusal of a head that is too large, from its beginning."""
    return _malformed(bytes(received[:MAX_HEAD]), "the head of the request is too large", 431)


def _malformed(raw: bytes, reason: str, status: int = 400) -> Malformed:
    understands = re.search(rb"\n%s:" % _STATUS_HEADER.encode(), raw, re.IGNORECASE)
    return Malformed(status, reason, understands is not None)


def parse_head(raw: bytes) -> Head | Malformed:
    """Parse a head, which may follow an empty line. Return a ``Malformed`` if it is refused."""
    if len(raw) > MAX_HEAD:
        return too_large(raw)
    try:
        return _parse(raw)
    except ValueError as error:
        return _malformed(raw, str(error))


def _parse(raw: bytes) -> Head:
    text = raw.replace(b"\r\n", b"\n")
    if b"\r" in text:
        raise ValueError("a CR must be followed by an LF")
    first, *lines = text.removeprefix(b"\n").removesuffix(b"\n\n").split(b"\n")
    request = _REQUEST_LINE.fullmatch(first)
    if request is None:
        raise ValueError("the first line must be a method, a target and HTTP/1.1")
    method, target = request[1].decode(), request[2].decode()
    if request[3] != b"1":
        raise ValueError(f"HTTP/{request[3].decode()} is not supported")
    is_old, headers = request[4] == b"0", _headers(lines)
    options = {one.strip(" \t").lower() for one in headers.get("connection", "").split(",")}
    keep_alive = "close" not in options and (not is_old or "keep-alive" in options)
    body_length = _body_length(headers, is_old)
    origin = _ORIGIN.match(target)
    path, _, query = target[origin.end() if origin else 0 :].partition("#")[0].partition("?")
    if origin:
        headers["host"] = origin[1]
    if is_old:
        headers.pop("expect", None)
    keep_alive = keep_alive and body_length is not None
    return Head(method, path or "/", query, headers, keep_alive, body_length)


def _headers(lines: list[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    if len(lines) > MAX_HEADERS:
        raise ValueError(f"there must be at most {MAX_HEADERS} headers")
    for line in lines:
        raw_name, colon, raw_value = line.partition(b":")
        if not (colon and _NAME.fullmatch(raw_name) and _VALUE.fullmatch(raw_value)):
            raise ValueError("each header must be a line with a name, a colon and a value")
        name, value = raw_name.decode().lower(), raw_value.strip(b" \t").decode("latin-1")
        if name in headers:
            if name in _ONCE:
                raise ValueError(f"there must be one {name} at most")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _body_length(headers: dict[str, str], is_old: bool) -> int | None:
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or is_old or coding.lower() != "chunked":
            raise ValueError("transfer-encoding must be chunked, in HTTP/1.1, without a length")
        return None
    if length is not None and not re.fullmatch("[0-9]{1,15}", length):
        raise ValueError("content-length must be a number of bytes")
    return int(length or 0)


class PermitRequest(NamedTuple):
    """A client's request for a permit. ``timeout`` is in seconds; ``key`` identifies its held position.

    ``ticket`` is the client's name for the request. With ``confirms`` it will report on its permit.
    """

    shard_id: int = 0
    priority_us: int = 0
    timeout: float | None = None
    key: tuple[str, str | int] | None = None
    ticket: str = ""
    confirms: bool = False


def parse_query(query: str) -> tuple[PermitRequest, list[str]]:
    """Return the request in a query, and what is wrong with it. A missing or bad shard counts as 0."""
    try:
        fields = dict(parse_qsl(query, max_num_fields=100))
    except ValueError as error:
        return PermitRequest(), [str(error)]
    wrong: list[str] = []
    shard, ticket = fields.get("shard"), fields.get("ticket", "")
    is_valid = shard is not None and re.fullmatch("[0-9]{1,16}", shard) and int(shard) <= MAX_NUMBER
    shard_id = int(shard or 0) if is_valid else 0
    key = None if not is_valid else ("ticket", ticket) if ticket else ("shard", shard_id)
    if not is_valid:
        wrong.append(f"shard must be a shard id, not {shard!r:.50}" if shard else "no shard")
    if len(ticket) > MAX_TICKET:
        wrong.append(f"ticket must be {MAX_TICKET} characters at most")
        key, ticket = None, ""
    confirms = fields.get("confirm") == "1"
    if confirms and not ticket:
        wrong.append("confirm needs a ticket")
    priority = _seconds(fields, "priority", -math.inf, wrong) or 0.0
    priority = max(-MAX_HEAD_START, min(priority, MAX_HEAD_START))
    timeout = _seconds(fields, "timeout", 0.0, wrong)
    timeout = None if timeout is None else max(timeout, MIN_TIMEOUT)
    request = PermitRequest(
        shard_id, to_us(priority), timeout, key, ticket, confirms=confirms and bool(ticket)
    )
    return request, wrong


def parse_report(query: str) -> tuple[str, Report]:
    """Return the ticket and the report in a query.

    Raises:
        ValueError: the query contains something else.
    """
    fields = dict(parse_qsl(query, max_num_fields=100))
    return fields.get("ticket", ""), Report(fields.get("state"))


def _seconds(fields: dict[str, str], name: str, least: float, wrong: list[str]) -> float | None:
    """Return a field's number of seconds. A wrong one counts as missing."""
    if name not in fields:
        return None
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(fields[name])) and number >= least:
            return number
    more = "" if math.isinf(least) else f" from {least:g} on"
    wrong.append(f"{name} must be a number of seconds{more}, not {fields[name]!r:.50}")
    return None
