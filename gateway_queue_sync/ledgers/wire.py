"""Requests and replies as JSON, for ledgers that are reached over a wire: whole numbers throughout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from gateway_queue_sync.messages import (
    OUTCOMES,
    News,
    Next,
    Order,
    Outcome,
    Reply,
    Request,
    Take,
    Waiter,
    in_order,
)
from gateway_queue_sync.models import US_PER_SECOND, SessionStartLimit, to_us

MAX_NUMBER = (1 << 53) - 1  # that all ledgers hold exactly
MAX_OWNER = 64  # characters


def request_as_json(request: Request) -> dict[str, Any]:
    """Return a request as an object; what is ``None`` is left out."""
    written = {name: value for name, value in request._asdict().items() if value is not None}
    written["limit"] = _limit_as_json(request.limit)
    written["news"] = [news._asdict() for news in request.news]
    if request.order is not None:
        written["order"] = request.order._asdict()
        if request.order.limit is None:
            del written["order"]["limit"]
        else:
            written["order"]["limit"] = _limit_as_json(request.order.limit)
    if request.take is not None:
        written["take"] = request.take._asdict()
        if request.take.next is None:
            del written["take"]["next"]
        else:
            written["take"]["next"] = request.take.next._asdict()
    return written


def _limit_as_json(limit: SessionStartLimit) -> dict[str, int]:
    return {
        "total": limit.total,
        "remaining": limit.remaining,
        "reset_after_us": to_us(limit.reset_after),
        "max_concurrency": limit.max_concurrency,
    }


def request_from_json(written: object) -> Request:
    """Return the request that an object tells of.

    Raises:
        ValueError: it is none; the message says what is wrong with it.
    """
    request: Request = _named(Request, written, "request", at_us=None)
    return request


def _named(kind: type, written: object, what: str, **left_out: None) -> Any:
    """Return a named tuple that was written as an object, each field as its reader reads it."""
    if not isinstance(written, dict):
        raise ValueError(f"{what} must be an object, not {written!r:.100}")
    unknown = written.keys() - set(kind._fields)  # type: ignore[attr-defined]
    if unknown:
        raise ValueError(f"{what} has no {min(unknown)!r:.100}")
    fields = {name: _READERS.get(name, _number)(value, name) for name, value in written.items()}
    try:
        return kind(**(left_out | fields))
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


def _number(value: object, name: str, least: int = -MAX_NUMBER) -> int:
    if type(value) is not int or not least <= value <= MAX_NUMBER:
        raise ValueError(f"{name} must be a whole number from {least} on, not {value!r:.100}")
    return value


def _flag(value: object, name: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, not {value!r:.100}")
    return value


def _owner(value: object, name: str) -> str:
    stranger = value == ""  # who only looks
    if not (isinstance(value, str) and len(value) <= MAX_OWNER and (stranger or value.isalnum())):
        raise ValueError(f"{name} must be letters and digits, not {value!r:.100}")
    return value


def _kind(value: object, name: str) -> str:
    known = ("joined", "left", "sent", "unused", "rejected", "open", "update", "renew", "trust")
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r:.100}")
    return str(value)


def _news(value: object, name: str) -> tuple[News, ...]:
    return tuple(_named(News, news, name) for news in _rows(value, name))


def _limit(value: object, name: str) -> SessionStartLimit:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {value!r:.100}")
    fields = {key: _number(number, f"{name}.{key}", 0) for key, number in value.items()}
    try:
        reset_after = fields.pop("reset_after_us") / US_PER_SECOND
        return SessionStartLimit(reset_after=reset_after, **fields)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{name}: {error}") from None


_from_0, _from_1 = partial(_number, least=0), partial(_number, least=1)
_READERS: dict[str, Callable[[Any, str], Any]] = {
    "owner": _owner,
    "number": _from_1,
    "void": _from_0,
    "interval_us": _from_1,
    "margin_us": _from_0,
    "period_us": _from_1,
    "lease_us": _from_0,
    "period": _from_0,
    "granted": _from_0,
    "shard_id": _from_0,
    "reserve": _from_0,
    "limit": _limit,
    "news": _news,
    "order": lambda value, name: _named(Order, value, name),
    "take": lambda value, name: _named(Take, value, name),
    "next": lambda value, name: _named(Next, value, name),
    "kind": _kind,
    "look": _flag,
    "stays": _flag,
    "can_refresh": _flag,
}


def reply_as_json(reply: Reply) -> list[Any]:
    """Return a reply as the list that ``reply_from_json`` reads."""
    return list(reply[:-1])  # named tuples are written as lists


def reply_from_json(written: object) -> Reply:
    """Return the reply that a list of numbers and lists tells of.

    Raises:
        ValueError: it is none; the message says what is wrong with it.
    """
    if not isinstance(written, list):
        raise ValueError(f"a reply must be a list, not {written!r:.100}")
    reply: Reply = _row(Reply, [*written, 0], "reply")
    return reply


def _row(kind: type, written: object, what: str) -> Any:
    """Return a named tuple that was written as a list, each field as its reader reads it."""
    fields = kind._fields  # type: ignore[attr-defined]
    if not isinstance(written, list) or len(written) != len(fields):
        raise ValueError(f"{what} must be a list of {len(fields)}, not {written!r:.100}")
    named = zip(fields, written, strict=True)
    return kind(*(_REPLY_READERS.get(name, _from_0)(value, name) for name, value in named))


def _rows(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {value!r:.100}")
    return value


def _truth(value: object, name: str) -> bool:
    if type(value) not in (int, bool) or value not in (0, 1):
        raise ValueError(f"{name} must be true or false, 1 or 0, not {value!r:.100}")
    return bool(value)


def _outcome(value: object, name: str) -> Outcome:
    outcome: Outcome = _row(Outcome, value, name)
    if outcome.kind >= len(OUTCOMES):
        raise ValueError(f"{name} must be of a known kind, not {outcome.kind}")
    return outcome


def _ready(value: object, name: str) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(_row(_Ready, one, name) for one in _rows(value, name)))


class _Ready(NamedTuple):
    bucket: int
    in_us: int


# What is none of these is a duration, a count or a number of something: from 0 on.
_REPLY_READERS: dict[str, Callable[[Any, str], Any]] = {
    "number": _number,
    "void": _truth,
    "known": _truth,
    "booked": _truth,
    "outcome": _outcome,
    "ready_in_us": _ready,
    "waiting": lambda value, name: in_order(_row(Waiter, one, name) for one in _rows(value, name)),
    "arrived_us": _number,
    "place_us": _number,
    "now_us": _number,
}
