"""The places of clients that went away while they waited: kept for a while, for their return."""

from __future__ import annotations

from typing import NamedTuple

KEPT_FOR_US = 30_000_000


class Place(NamedTuple):
    """A place in line: since when, and with what head start, in microseconds."""

    arrived_us: int
    priority_us: int


class Places:
    """Kept places, by what clients are told from each other.

    An absent one is granted nothing, and holds nobody up.
    """

    def __init__(self) -> None:
        self._kept: dict[object, list[tuple[Place, int]]] = {}  # each with its last instant

    def keep(self, key: object, place: Place, now_us: int) -> None:
        """Keep a place for 30 s."""
        self._kept.setdefault(key, []).append((place, now_us + KEPT_FOR_US))

    def claim(self, key: object, now_us: int) -> Place | None:
        """Return the oldest place that is kept for a client, and keep it no longer."""
        kept = [one for one in self._kept.pop(key, ()) if one[1] >= now_us]
        if not kept:
            return None
        oldest = min(kept)
        kept.remove(oldest)
        if kept:
            self._kept[key] = kept
        return oldest[0]

    def sweep(self, now_us: int) -> None:
        """Forget the places that were kept for long enough."""
        for key in list(self._kept):
            kept = [one for one in self._kept[key] if one[1] >= now_us]
            if kept:
                self._kept[key] = kept
            else:
                del self._kept[key]

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))
