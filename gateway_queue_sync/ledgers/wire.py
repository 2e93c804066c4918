"""Requests and replies as JSON, for ledgers that are reached over a wire: whole numbers throughout."""

from __future__ import annotations

from typing import Any

from gateway_queue_sync.messages import OUTCOMES, Outcome, Reply, Request, Waiter, in_order
from gateway_queue_sync.models import SessionStartLimit
from gateway_queue_sync.rules import to_us


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
