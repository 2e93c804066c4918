"""The messages between a process and a shared ledger: values of whole numbers and strings.

A value is written as the list of its fields, so JSON and Lua read it alike; ``None`` is an empty list
and a flag is 0 or 1. Times in a request are by the process's clock, those in a reply by the ledger's;
all are in microseconds.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

SENT, UNUSED, REJECTED = range(3)  # kinds of Report
OPEN, UPDATE, READ, FORGET = range(4)  # kinds of Limit
WINDOW, BUDGET, RESET = range(3)  # reasons of Wait
OK, INTRODUCE, REFUSED = range(3)  # Reply.status
APPLIED, NOT_APPLIED = 1, 2  # Reply.limit_result; 0: there was no limit in the request

MAX_CHANGES = 1_000  # lines and reports in one request
MAX_NUMBER = (1 << 53) - 1  # what Lua holds exactly
MAX_TEXT = 300  # characters
MAX_AGE_US = 7 * 86_400_000_000  # of a waiter
MAX_HEAD_START_US = 86_400_000_000
MAX_HOLD_US = 12_000_000  # 10 s for a client that reports, 2 s for a margin that was raised
MAX_COUNTER = 1 << 52  # the maximum of granted, period and layout in an introduction


class Waiter(NamedTuple):
    """A waiter: a number that is unique in its session, and when it arrived.

    A line is sorted by ``position_us``: arrival minus priority. A waiter that asks ``once`` is not added
    to the line. With ``hold_us``, the window of its permit starts only at a report, or after this time.
    """

    number: int
    shard_id: int
    arrived_us: int
    position_us: int
    once: int = 0
    hold_us: int = 0


class Line(NamedTuple):
    """A session's line for one bucket, as it is now: its first two waiters, and how many more wait."""

    bucket: int
    more: int = 0
    waiters: tuple[Waiter, ...] = ()


class Report(NamedTuple):
    """A report on a permit, made at ``at_us``."""

    kind: int
    serial: int
    shard_id: int
    period: int
    at_us: int


class Limit(NamedTuple):
    """A session start limit as it was at ``at_us``. If it was read, the read began at ``asked_us``.

    The kind ``FORGET`` deletes the limit and the bot of the account; its numbers are ignored.
    """

    kind: int
    total: int
    remaining: int
    reset_after_us: int
    max_concurrency: int
    asked_us: int
    at_us: int


class Introduction(NamedTuple):
    """The content of a session's first request. It takes no permit, so repeating it is safe.

    ``replaces`` is the id of the process's last session. ``bot`` is its bot's id, empty if unknown.
    ``limit`` is the limit that the program begins with. The other fields are what the process knows of
    the account, for a ledger that is new or has lost requests.
    """

    replaces: str
    bot: str
    limit: Limit | None
    granted: int
    period: int
    layout: int
    seen: Limit | None


class Request(NamedTuple):
    """Everything that a process wants now. If it is sent again, only the first two fields differ.

    ``session`` is a new random id after each introduction, ``number`` counts its requests. ``layout``
    numbers the division into buckets that ``lines`` is for. A line in ``lines`` replaces the stored one,
    and its head is answered.
    """

    attempt: int
    sent_us: int
    session: str
    number: int
    interval_us: int
    margin_us: int
    period_us: int
    lease_us: int
    reserve: int
    reread_us: int  # after which the limit should be read again; 0: never
    can_read: int
    look: int
    layout: int
    lines: tuple[Line, ...] = ()
    reports: tuple[Report, ...] = ()
    limit: Limit | None = None
    introduction: Introduction | None = None


class Granted(NamedTuple):
    """A permit for the waiter of that number, granted ``age_us`` ago; remaining -1: no limit."""

    waiter: int
    serial: int
    bucket: int
    shard_id: int
    period: int
    remaining: int
    age_us: int


class Wait(NamedTuple):
    """The head of a line gets no permit now, and should ask again in ``wait_us``.

    The bucket opens in ``opens_us``; ``waiting`` wait for it in all sessions.
    """

    bucket: int
    wait_us: int
    opens_us: int
    reason: int
    waiting: int


class Ready(NamedTuple):
    """In how many microseconds a bucket opens."""

    bucket: int
    in_us: int


class Rejections(NamedTuple):
    """How many permits of a bucket were rejected in a row, up to and with the one of ``serial``."""

    serial: int
    in_a_row: int


class Look(NamedTuple):
    """The waiters of other sessions, as far as the ledger knows them, with times by its clock.

    ``reserve`` is that of the process that asked last for a permit.
    """

    ready: tuple[Ready, ...]  # the buckets that have granted
    others_ready_in_us: int
    lines: tuple[Line, ...]  # live ones, and those that were until just now
    reserve: int
    period_us: int


class Reply(NamedTuple):
    """The answer to one attempt. ``error`` says why a request was refused."""

    attempt: int
    number: int
    status: int
    error: str
    lost: int  # the ledger is new or has lost requests: all buckets are closed for a window
    now_us: int
    granted: int
    period: int
    layout: int
    total: int  # -1: no limit yet
    remaining: int
    resets_in_us: int
    max_concurrency: int
    interval_us: int  # the largest of the live processes
    margin_us: int
    differs: int  # processes have different intervals or margins
    read: int  # this process should read the limit now
    limit_result: int
    uncounted: int  # what a read says is left, if a smaller number counts instead; else -1
    rejections: tuple[Rejections, ...] = ()
    permits: tuple[Granted, ...] = ()
    waits: tuple[Wait, ...] = ()
    look: Look | None = None


T = TypeVar("T")


def to_wire(value: object) -> Any:
    """Return a value as nested lists of whole numbers and strings."""
    if isinstance(value, tuple):
        return [to_wire(field) for field in value]
    return [] if value is None else value


def from_wire(kind: type[T], wire: object) -> T:
    """Return the value that nested lists describe.

    Raises:
        ValueError: they describe none; the message names the wrong field.
    """
    value: T = _read(kind, wire, kind.__name__)
    return value


def _read(kind: Any, wire: object, name: str) -> Any:
    if kind is int:
        if type(wire) is int and abs(wire) <= MAX_NUMBER:
            return wire
    elif kind is str:
        if type(wire) is str and len(wire) <= MAX_TEXT:
            return wire
    elif isinstance(wire, list):
        wrapper, item, fields = _parts(kind)
        if wrapper is tuple:
            return tuple(_read(item, one, name) for one in wire)
        if wrapper is not None:
            return _read(item, wire, name) if wire else None
        if len(wire) == len(fields):
            return kind(*(_read(fields[at][1], wire[at], fields[at][0]) for at in range(len(wire))))
    raise ValueError(f"{name} is wrong: {wire!r:.100}")


@cache
def _parts(kind: Any) -> tuple[Any, Any, list[tuple[str, Any]]]:
    """Return what wraps an item (``tuple``, an optional, ``None``), the item, and a value's fields."""
    if get_args(kind):
        return get_origin(kind), get_args(kind)[0], []
    return None, None, list(get_type_hints(kind).items())
