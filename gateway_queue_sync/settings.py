"""The settings of a queue: one checked value, made from the keyword arguments of its class."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.events import Observer
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    SessionStartLimit,
    seconds,
    to_us,
    whole_number,
)

WhenExhausted = Literal["wait", "raise"]
WhenUnreachable = Literal["wait", "raise"]

Refresh = Callable[[], SessionStartLimit]

REREAD_AFTER = 600.0
"""Seconds after which a queue that is used reads the limit again: others may start sessions, too."""

DEFAULT_LEASE = 5.0
"""Seconds without a request after which a process counts as dead. One that waits sends three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a queue, checked. Each is a keyword argument of the queues that have it.

    Raises:
        TypeError, ValueError: a setting is of the wrong kind or out of range.
    """

    name: str = "default"
    refresh: Refresh | None = None
    reread_after: float | None = REREAD_AFTER
    reserve: int = 0
    when_exhausted: WhenExhausted = "wait"
    when_unreachable: WhenUnreachable = "wait"
    period: float = SESSION_PERIOD
    interval: float = IDENTIFY_INTERVAL
    margin: float = DEFAULT_MARGIN
    lease: float = DEFAULT_LEASE
    clock: Clock = SYSTEM_CLOCK
    observer: Observer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str, not {type(self.name).__name__}")
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", self.name):
            raise ValueError(
                f"name must be 1 to 64 letters, digits, or any of _ . : -, not {self.name!r}"
            )
        for name, callback in (("observer", self.observer), ("refresh", self.refresh)):
            if callback is not None and not callable(callback):
                raise TypeError(f"{name} must be callable, not {type(callback).__name__}")
        for name in ("when_exhausted", "when_unreachable"):
            if getattr(self, name) not in ("wait", "raise"):
                raise ValueError(f'{name} must be "wait" or "raise", not {getattr(self, name)!r}')
        if self.reread_after is not None:
            seconds("reread_after", self.reread_after, above=0)
        object.__setattr__(self, "reserve", whole_number("reserve", self.reserve))
        seconds("interval", self.interval, above=0)
        seconds("margin", self.margin)
        seconds("period", self.period, above=0)
        seconds("lease", self.lease, above=0.1)

    @property
    def timings_us(self) -> tuple[int, int, int]:
        """The interval, the margin and the period in microseconds."""
        interval_us, period_us = to_us(self.interval), to_us(self.period)
        return max(1, interval_us), to_us(self.margin), max(1, period_us)
