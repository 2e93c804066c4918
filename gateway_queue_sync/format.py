"""Durations, times, counts and ranges of numbers as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta


def format_time(
    now: datetime, in_seconds: float, format_: Callable[[float], str] | None = None
) -> str:
    """Return in how long something happens (``format_duration`` by default), and at what time of day."""
    duration = (format_ or format_duration)(in_seconds)
    try:
        at = (now + timedelta(seconds=in_seconds)).astimezone()  # its offset may be another then
    except (OverflowError, ValueError):
        return f"in {duration}"
    day = "" if at.date() == now.date() else "%Y-%m-%d "
    return f"in {duration} ({at.strftime(day + '%H:%M:%S')})"


def format_duration(duration: float) -> str:
    """Return a duration in seconds with the units that suit it."""
    if round(duration, 1) < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def format_exact(duration: float) -> str:
    """Return a duration with the decimals and units that it needs: ``5.25 s``, ``1 min``, ``16 d``."""
    if round(duration, 2) < 60:
        return f"{duration:.4g} s"
    number, unit, *rest = format_duration(duration).split()
    return f"{number} {unit}" if rest[0] == "0" else " ".join([number, unit, *rest])


def format_clock(duration: float) -> str:
    """Return a duration with its seconds, as ``24:00:05`` or, from 48 hours on, ``2 d 0:00:05``."""
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24) if hours >= 48 else (0, hours)
    return f"{f'{days} d ' if days else ''}{hours}:{minutes:02}:{rest:02}"


def format_ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ``0-3, 7``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)


def format_count(number: int, what: str) -> str:
    """Return how many there are, as ``1 shard``, ``2 shards``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def sentence(words: str) -> str:
    """Return words with a capital at the beginning; all others stay as they are."""
    return words[:1].upper() + words[1:]
