"""How figures are said to a person: durations, instants, counts, many numbers."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta


def when(now: datetime, in_seconds: float) -> str:
    """Return an instant as a person says it: in how long, and at what time."""
    try:
        at = (now + timedelta(seconds=in_seconds)).astimezone()  # its offset may be another then
    except (OverflowError, ValueError):
        return f"in {lasting(in_seconds)}"
    day = "" if at.date() == now.date() else "%Y-%m-%d "
    return f"in {lasting(in_seconds)} ({at.strftime(day + '%H:%M:%S')})"


def lasting(duration: float) -> str:
    """Return a duration in seconds as a person says it."""
    if round(duration, 1) < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def to_the_second(duration: float) -> str:
    """Return a duration in seconds as ``24:00:05``."""
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ``0-3, 7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def counted(number: int, what: str) -> str:
    """Return how many there are, as ``1 shard``, ``2 shards``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
