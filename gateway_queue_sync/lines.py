"""Lines: the waiters of each bucket, in order. Plain data, which the scheduler's lock protects."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from gateway_queue_sync.future import PermitFuture
from gateway_queue_sync.models import Permit

waiter_numbers = itertools.count(1)

Entry = tuple[int, int, "Waiter"]


@dataclass(slots=True, eq=False)
class Waiter:
    """A thread or a future that waits for a permit.

    Attributes:
        shard_id: the shard.
        arrived_us: when it arrived.
        position_us: the sort key in its line: arrival minus priority. Of equal ones, the smaller
            ``number`` comes first.
        future: completed with the permit; ``None`` for a thread.
        once: it asks once and then leaves (``timeout=0``).
        hold_us: its permit's window starts only at a report, or after this time.
        number: its number, unique in the process.
        condition: wakes the thread; created when the thread first sleeps.
        ask_at_us: when it may ask the ledger, if it is the head of its line.
        answered: whether a remote ledger has granted or denied it a permit.
        permit: a permit that was granted to it and is not handed over yet.
        error: the exception to raise instead of handing over a permit.
        entry: its entry in a line, ``None`` while it is in none.
    """

    shard_id: int
    arrived_us: int
    position_us: int
    future: PermitFuture | None = None
    once: bool = False
    hold_us: int = 0
    number: int = field(default_factory=waiter_numbers.__next__)
    condition: threading.Condition | None = None
    ask_at_us: int = 0
    answered: bool = False
    permit: Permit | None = None
    error: Exception | None = None
    entry: Entry | None = None


class Line:
    """The waiters for one bucket: a heap. The entry of a waiter that has left is skipped.

    So joining, leaving and finding the head take logarithmic time at most.
    """

    __slots__ = ("_heap", "_last", "_left")

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._left = 0  # entries whose waiters have left
        self._last: tuple[int, int] = (0, -1)  # the last position that any waiter has had

    @property
    def head(self) -> Waiter | None:
        """The first waiter, ``None`` if there is none."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if entry[2].entry is entry:
                return entry[2]
            self._left -= 1  # assigned first: an interrupt can come after the call
            heapq.heappop(heap)
        return None

    def add(self, entry: Entry) -> None:
        """Add the entry of a waiter."""
        entry[2].entry = entry  # assigned first: an interrupt can come after the call
        heapq.heappush(self._heap, entry)
        self._last = max(self._last, entry[:2])

    def leave(self, waiter: Waiter) -> None:
        """Remove a waiter."""
        waiter.entry = None
        self._left += 1
        if self._left > max(16, len(self._heap) // 2):  # else a blocked line would only grow
            heap = list(self.entries())
            heapq.heapify(heap)
            self._heap, self._left = heap, 0

    def first(self, count: int) -> list[Waiter]:
        """Return the first waiters, in order."""
        found: list[Waiter] = []
        unseen = [(self._heap[0], 0)] if self._heap else []
        while unseen and len(found) < count:
            entry, at = heapq.heappop(unseen)
            if entry[2].entry is entry:
                found.append(entry[2])
            for child in range(2 * at + 1, min(2 * at + 3, len(self._heap))):
                heapq.heappush(unseen, (self._heap[child], child))
        return found

    def entries(self) -> Iterator[Entry]:
        """Yield the entries of all waiters, unordered."""
        return (entry for entry in self._heap if entry[2].entry is entry)

    def position(self, waiter: Waiter, at_most: int | None = None) -> int:
        """Return how many waiters come before one that is or was in this line; at most ``at_most``."""
        key = waiter.position_us, waiter.number
        if key >= self._last:
            return len(self) - (waiter.entry is not None)
        before, unseen = 0, [0]
        while unseen and before != at_most:  # down the heap, while entries are less
            at = unseen.pop()
            if at < len(self._heap) and self._heap[at][:2] < key:
                before += self._heap[at][2].entry is self._heap[at]
                unseen += (2 * at + 1, 2 * at + 2)
        return before

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._heap) - self._left


class Lines:
    """The lines of all buckets that have waiters, for one ``max_concurrency``."""

    __slots__ = ("by_bucket", "max_concurrency")

    def __init__(self, max_concurrency: int, waiters: Iterable[Waiter] = ()) -> None:
        self.max_concurrency = max_concurrency
        self.by_bucket: dict[int, Line] = {}
        for waiter in waiters:
            self.join(waiter)

    def join(self, waiter: Waiter) -> None:
        """Add a waiter to the line of its bucket. Another ``Lines`` that has it stays as it is."""
        number = waiter.shard_id % self.max_concurrency
        line = self.by_bucket.get(number)
        if line is None:
            line = self.by_bucket[number] = Line()
        line.add(waiter.entry or (waiter.position_us, waiter.number, waiter))

    def leave(self, waiter: Waiter) -> Waiter | None:
        """Remove a waiter. If it was the head, return the new one, also if this is repeated."""
        number = waiter.shard_id % self.max_concurrency
        line = self.by_bucket.get(number)
        if line is None:
            return None
        if waiter.entry is not None:
            line.leave(waiter)
        head = line.head
        if head is None:
            del self.by_bucket[number]
        elif (waiter.position_us, waiter.number) < (head.position_us, head.number):
            return head
        return None

    def head(self, shard_id: int) -> Waiter | None:
        """Return the head of the line of a shard's bucket, ``None`` if it has no waiter."""
        line = self.by_bucket.get(shard_id % self.max_concurrency)
        return None if line is None else line.head

    def is_head(self, waiter: Waiter) -> bool:
        """Return whether a waiter is the head of its line."""
        return self.head(waiter.shard_id) is waiter

    def heads(self) -> list[Waiter]:
        """Return the head of each line."""
        heads = (line.head for line in self.by_bucket.values())
        return [head for head in heads if head is not None]

    def waiters(self) -> list[Waiter]:
        """Return all waiters, by position."""
        entries = (entry for line in self.by_bucket.values() for entry in line.entries())
        return [entry[2] for entry in sorted(entries)]

    def copy(self) -> dict[int, list[Entry]]:
        """Return the entries of each bucket, unordered, without heads that have their permit."""
        return {
            number: [entry for entry in line.entries() if entry[2].permit is None]
            for number, line in self.by_bucket.items()
        }

    def position(self, waiter: Waiter, at_most: int | None = None) -> int:
        """Return how many come before a waiter, without a head that has its permit."""
        line = self.by_bucket.get(waiter.shard_id % self.max_concurrency)
        if line is None:
            return 0
        head = line.head
        has_permit = head is not None and head is not waiter and head.permit is not None
        return line.position(waiter, at_most) - has_permit

    def __len__(self) -> int:
        """Return how many wait. Without the lock, the number may be outdated."""
        return sum(map(len, list(self.by_bucket.values())))
