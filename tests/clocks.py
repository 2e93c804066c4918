"""Clocks that run an action when a queue uses them: an event at a known point of a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gateway_queue_sync.clock import Clock


class Hooked:
    """A clock that makes a call at one of its next readings, as a signal handler there would.

    Set ``left`` to the number of the reading, and ``thread`` if only those of one thread count.
    """

    def __init__(self, clock: Clock, call: Callable[[], object] = lambda: None) -> None:
        self._clock = clock
        self.call = call
        self.left = 0
        self.thread: threading.Thread | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)

    def now_us(self) -> int:
        if self.left and self.thread in (None, threading.current_thread()):
            self.left -= 1
            if not self.left:
                self.call()
        return self._clock.now_us()


class Watched:
    """A clock that notes with what timeout each thread sleeps, and calls ``notified`` at wake-ups."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.timeouts: dict[threading.Thread, float | None] = {}
        self.notified: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)

    def condition(self, lock: Any) -> threading.Condition:
        condition = self._clock.condition(lock)
        wait, notify = condition.wait, condition.notify

        def watched_wait(timeout: float | None = None) -> bool:
            self.timeouts[threading.current_thread()] = timeout
            return wait(timeout)

        def watched_notify(n: int = 1) -> None:
            notify(n)
            self.notified()

        condition.wait, condition.notify = watched_wait, watched_notify  # type: ignore[method-assign]
        return condition
