"""What keeps the log from a flood."""

from __future__ import annotations

import time


class Throttle:
    """Lets so many lines of the log through in so many seconds."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._since = -seconds
        self._count = 0

    def lets_through(self) -> bool:
        """Return whether the next line is to be written."""
        now = time.monotonic()
        if now - self._since >= self._seconds:
            self._since, self._count = now, 0
        self._count += 1
        return self._count <= self._most
