"""The bounds of requests and replies: a mistake of one process must not stop all others."""

from __future__ import annotations

from collections.abc import Iterator

from gateway_queue_sync.ledgers.shared.messages import (
    FORGET,
    MAX_AGE_US,
    MAX_CHANGES,
    MAX_COUNTER,
    MAX_HEAD_START_US,
    MAX_HOLD_US,
    MAX_NUMBER,
    REFUSED,
    REJECTED,
    RESET,
    Limit,
    Reply,
    Request,
)
from gateway_queue_sync.models import MAX_BUCKETS, MAX_RESET_AFTER, US_PER_SECOND

MAX_INTERVAL_US = 60 * US_PER_SECOND
MAX_MARGIN_US = 10 * US_PER_SECOND
MIN_LEASE_US = US_PER_SECOND // 10
MAX_LEASE_US = 60 * US_PER_SECOND
MAX_RESET_AFTER_US = int(MAX_RESET_AFTER) * US_PER_SECOND
MAX_REREAD_US = 366 * 86_400 * US_PER_SECOND
MAX_MORE = 1 << 32
COUNTS = (  # in a reply
    *("status", "granted", "period", "layout", "remaining", "resets_in_us", "max_concurrency"),
    *("interval_us", "margin_us"),
)

Bound = tuple[str, int, int, int]


def refusal(request: Request) -> str:
    """Return why a request is out of bounds, empty if it is not."""
    if request.session and request.session.split() != [request.session]:
        return f"session must be without white space, not {request.session!r}"
    for name, value, least, most in _durations(request):
        if not least <= value <= most:
            least_s, most_s, value_s = (us / US_PER_SECOND for us in (least, most, value))
            return f"{name} must be {least_s:g} to {most_s:g} s, not {value_s:g} s"
    for name, value, least, most in _counts(request):
        if not least <= value <= most:
            return f"{name} must be {least} to {most}, not {value}"
    return ""


def _limits(request: Request) -> Iterator[Limit]:
    new = request.introduction
    found = (request.limit,) if new is None else (request.limit, new.limit, new.seen)
    return (limit for limit in found if limit is not None)


def _durations(request: Request) -> Iterator[Bound]:
    yield "interval", request.interval_us, 1, MAX_INTERVAL_US
    yield "margin", request.margin_us, 0, MAX_MARGIN_US
    yield "lease", request.lease_us, MIN_LEASE_US, MAX_LEASE_US
    yield "period", request.period_us, 1, MAX_RESET_AFTER_US
    yield "reread_after", request.reread_us, 0, MAX_REREAD_US
    for line in request.lines:
        for waiter in line.waiters:
            age_us = request.sent_us - waiter.arrived_us
            head_start_us = waiter.arrived_us - waiter.position_us
            yield "age", age_us, -MAX_HEAD_START_US, MAX_AGE_US
            yield "head start", head_start_us, -MAX_HEAD_START_US, MAX_HEAD_START_US
            yield "hold", waiter.hold_us, 0, MAX_HOLD_US
    for limit in _limits(request):
        yield "reset_after", limit.reset_after_us, 0, MAX_RESET_AFTER_US


def _counts(request: Request) -> Iterator[Bound]:
    yield "reserve", request.reserve, 0, MAX_COUNTER
    yield "changes", len(request.lines) + len(request.reports), 0, MAX_CHANGES
    yield "number", request.number, 1, 1 if request.introduction else MAX_COUNTER
    # No bucket twice:
    yield "buckets", len({line.bucket for line in request.lines}), len(request.lines), MAX_CHANGES
    for line in request.lines:
        yield "bucket", line.bucket, 0, MAX_BUCKETS
        yield "waiting", line.more, 0, MAX_MORE
        yield "waiters", len(line.waiters), 0, 2
        for waiter in line.waiters:
            yield "shard_id", waiter.shard_id, 0, MAX_COUNTER
    for report in request.reports:
        yield "kind of report", report.kind, 0, REJECTED
        yield "serial", report.serial, 1, MAX_NUMBER
        yield "shard_id", report.shard_id, 0, MAX_COUNTER
    for limit in _limits(request):
        yield "kind of limit", limit.kind, 0, FORGET
        yield "max_concurrency", limit.max_concurrency, 1, MAX_BUCKETS
        yield "total", limit.total, 0, MAX_COUNTER
        yield "remaining", limit.remaining, 0, limit.total
    if request.introduction is not None:
        yield "granted", request.introduction.granted, 0, MAX_COUNTER
        yield "period", request.introduction.period, 0, MAX_COUNTER
        yield "layout", request.introduction.layout, 0, MAX_COUNTER


def check_reply(request: Request, reply: Reply) -> None:
    """Check a reply before a session applies it.

    Raises:
        ValueError: the reply is wrong; the message says why.
    """
    bounds = {"status": (0, REFUSED), "max_concurrency": (1, MAX_BUCKETS)}
    for name in COUNTS:
        value, (least, most) = getattr(reply, name), bounds.get(name, (0, MAX_NUMBER))
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}")
    asked = {one.number: one.shard_id for line in request.lines for one in line.waiters}
    for permit in reply.permits:
        if asked.pop(permit.waiter, None) != permit.shard_id or permit.age_us < 0:
            raise ValueError(f"no waiter has asked for {permit}")
    wrong_waits = [one for one in reply.waits if min(one[:4]) < 0 or one.reason > RESET]
    lines = () if reply.look is None else reply.look.lines
    empty = [line for line in lines if not line.waiters]
    for wrong in (*wrong_waits, *empty):
        raise ValueError(f"no waiter matches {wrong}")
