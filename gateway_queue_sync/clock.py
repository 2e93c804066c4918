"""The clock a queue lives by: it tells the time, and makes the conditions that wait for it.

Both belong together: a clock that can only be read cannot wake a thread (see
``testing.FakeClock``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    Lock = threading._RLock | threading.RLock


class Clock(Protocol):
    """What a queue asks of a clock."""

    def now_us(self) -> int:
        """Return microseconds on a clock that is never set, from any origin."""

    def wall_us(self) -> int:
        """Return microseconds since the Unix epoch on the clock people read."""

    def condition(self, lock: Lock) -> threading.Condition:
        """Return a condition over ``lock`` whose timed waits end by this clock."""


def _unfrozen(name: str, clock_id: str) -> Callable[[], int]:
    """Return the reading ``time.<name>`` that no time-freezing test tool replaces.

    Such tools swap the functions of ``time`` (before or after our import) and hand out the true
    time to some stack depths and the frozen one to others; a queue that mixed the two would wait
    for years or grant at once. ``clock_gettime_ns`` reads the same clocks and is left alone.
    """
    if hasattr(time, "clock_gettime_ns") and hasattr(time, clock_id):
        read, clock = time.clock_gettime_ns, getattr(time, clock_id)
        return lambda: read(clock) // 1000
    read_ns = getattr(time, name)
    return lambda: read_ns() // 1000


EARLY = (
    0.000_07  # s: Linux ends timed waits 50 µs late (timer slack), and waking takes longer still
)


def make_small(condition: threading.Condition) -> None:
    """Make a new condition half as big, if few threads wait for it: a list is that, a deque is not."""
    condition._waiters = []  # type: ignore[attr-defined]


class PromptCondition(threading.Condition):
    """A condition whose timed waits are asked to end a little early, so as to end in time.

    Whoever it wakes looks at the clock, and waits again for what is left.
    """

    def __init__(self, lock: Lock) -> None:
        super().__init__(lock)
        make_small(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as any condition does, but a little less long."""
        return super().wait(None if timeout is None else max(0.0, timeout - EARLY))


class SystemClock:
    """The machine's own clocks: monotonic for waiting, wall time for what outlives a process."""

    now_us = staticmethod(_unfrozen("monotonic_ns", "CLOCK_MONOTONIC"))
    wall_us = staticmethod(_unfrozen("time_ns", "CLOCK_REALTIME"))
    condition = PromptCondition

    def __repr__(self) -> str:
        return "SystemClock()"

    def __reduce__(self) -> str:
        return "SYSTEM_CLOCK"  # there is one, which pickles by its name


SYSTEM_CLOCK = SystemClock()
