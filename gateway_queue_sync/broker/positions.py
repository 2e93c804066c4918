"""Positions of clients that went away while they waited. They are held for 30 s, for their return."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from typing import NamedTuple

KEPT_US = 30_000_000
MAX_HELD = 100_000


class Position(NamedTuple):
    """A position in a line: the arrival and the head start, in microseconds."""

    arrived_us: int
    priority_us: int


class HeldPositions:
    """Held positions, by a key that identifies the client. All costs are logarithmic.

    A client that is away gets no permit and delays no other.
    """

    def __init__(self) -> None:
        # By number, in the order of storing: until when it is held, the key, the position.
        self._held: OrderedDict[int, tuple[int, object, Position]] = OrderedDict()
        # A heap for each key: the two values of each position, and its number.
        self._by_key: dict[object, list[tuple[int, int, int]]] = {}
        self._stale = 0  # entries of the heaps whose number is not in ``_held`` any more
        self._numbers = itertools.count()

    def store(self, key: object, position: Position, now_us: int) -> None:
        """Store a position for 30 s; if there are too many, the one stored first is removed."""
        number = next(self._numbers)
        self._held[number] = now_us + KEPT_US, key, position
        heapq.heappush(self._by_key.setdefault(key, []), (*position, number))
        self.expire(now_us)

    def claim(self, key: object, now_us: int) -> Position | None:
        """Return the oldest position that is stored for a client, and remove it."""
        self.expire(now_us)
        heap, position = self._by_key.get(key, []), None
        while heap and position is None:
            held = self._held.pop(heapq.heappop(heap)[2], None)
            if held is None:
                self._stale -= 1
            else:
                position = held[2]
        if not heap:
            self._by_key.pop(key, None)
        return position

    def expire(self, now_us: int) -> None:
        """Remove the positions that were stored 30 s ago."""
        while self._held:
            number, (until_us, _, _) = next(iter(self._held.items()))
            if until_us >= now_us and len(self._held) <= MAX_HELD:
                break
            del self._held[number]
            self._stale += 1
        if self._stale > len(self._held) + 16:
            self._by_key, self._stale = {}, 0
            for number, (_, key, position) in self._held.items():
                heapq.heappush(self._by_key.setdefault(key, []), (*position, number))

    def __len__(self) -> int:
        return len(self._held)
