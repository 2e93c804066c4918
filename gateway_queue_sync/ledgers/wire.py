"""Requests and replies as JSON, for ledgers that are reached over a wire: whole numbers throughout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
from gateway_queue_sync.models import SessionStartLimit
from gateway_queue_sync.rules import MICROSECOND, to_us

LARGEST_NUMBER = (1 << 53) - 1  # that all ledgers hold exactly
LONGEST_OWNER = 64  # characters


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


def _number(value: object, name: str, least: int = -LARGEST_NUMBER) -> int:
    if type(value) is not int or not least <= value <= LARGEST_NUMBER:
        raise ValueError(f"{name} must be a whole number from {least} on, not {value!r:.100}")
    return value


def _flag(value: object, name: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, not {value!r:.100}")
    return value


def _owner(value: object, name: str) -> str:
    stranger = value == ""  # who only looks
    if not (
        isinstance(value, str) and len(value) <= LONGEST_OWNER and (stranger or value.isalnum())
    ):
        raise ValueError(f"{name} must be letters and digits, not {value!r:.100}")
    return value


def _kind(value: object, name: str) -> str:
    known = ("joined", "left", "sent", "unused", "rejected", "open", "update", "renew", "trust")
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r:.100}")
    return str(value)


def _news(value: object, name: str) -> tuple[News, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {value!r:.100}")
    return tuple(_named(News, news, name) for news in value)


def _limit(value: object, name: str) -> SessionStartLimit:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {value!r:.100}")
    fields = {key: _number(number, f"{name}.{key}", 0) for key, number in value.items()}
    try:
        reset_after = fields.pop("reset_after_us") / MICROSECOND
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


def reply_from_json(row: list[Any]) -> Reply:
    """Return the reply that a list of numbers and lists tells of.

    Raises:
        TypeError, ValueError, LookupError: it is none.
    """
    number, void, known, booked, *numbers, outcome, ready_in_us, others_us, waiting, now_us = row
    ready = sorted((int(number), int(in_us)) for number, in_us in ready_in_us)
    waiters = in_order(Waiter(*map(int, waiter)) for waiter in waiting)
    outcome = Outcome(*map(int, outcome))
    if outcome.kind not in range(len(OUTCOMES)):
        raise ValueError(f"an outcome of kind {outcome.kind}")
    return Reply._make(
        (
            *(int(number), bool(void), bool(known), bool(booked), *map(int, numbers)),
            *(outcome, tuple(ready), int(others_us), waiters, int(now_us), 0),
        )
    )
