"""Lines: who waits for which bucket, in what order. Plain data; the scheduler's lock protects it."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from gateway_queue_sync.clock import make_small
from gateway_queue_sync.models import Permit

waiter_numbers = itertools.count(1)

Entry = tuple[int, int, "Waiter"]


class PermitFuture(Future[Permit]):
    """A future that leaves its line as soon as it is cancelled."""

    on_cancel: Callable[[], None] | None = None

    def __init__(self) -> None:
        super().__init__()
        make_small(self._condition)

    def cancel(self) -> bool:
        """Cancel as any future does, and leave the line."""
        cancelled = super().cancel()
        on_cancel = self.on_cancel
        if cancelled and on_cancel is not None:
            on_cancel()
        return cancelled


class Waiter:
    """A thread or a future that waits for a permit.

    Attributes:
        number: tells it from all other waiters of the process.
        shard_id: the shard.
        arrived_us: when it arrived.
        position_us: what its line is sorted by: its arrival less its priority, then its number.
        future: completed with the permit; ``None`` for a thread.
        condition: wakes the thread; made when it first sleeps.
        once: it asks once and then leaves.
        ask_at_us: when it may ask the ledger, if it is the head of its line.
        permit: granted to it, and not handed over yet.
        error: what to raise in place of a permit.
        entry: its entry in a line, ``None`` while it is in none.
    """

    __slots__ = (
        "arrived_us",
        "ask_at_us",
        "condition",
        "entry",
        "error",
        "future",
        "number",
        "once",
        "permit",
        "position_us",
        "shard_id",
    )

    def __init__(
        self,
        shard_id: int,
        arrived_us: int,
        priority_us: int = 0,
        future: PermitFuture | None = None,
    ) -> None:
        self.number = next(waiter_numbers)
        self.shard_id = shard_id
        self.arrived_us = arrived_us
        self.position_us = arrived_us - priority_us
        self.future = future
        self.condition: threading.Condition | None = None
        self.once = False
        self.ask_at_us = 0
        self.permit: Permit | None = None
        self.error: Exception | None = None
        self.entry: Entry | None = None


class Line:
    """Those waiting for one bucket: a heap, in which an entry that its waiter has left is skipped.

    So joining, leaving and taking the head cost the same (or a logarithm) at any length.
    """

    __slots__ = ("_heap", "_last", "_left")

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._left = 0  # entries whose waiters have left
        self._last: tuple[int, int] = (0, -1)  # the rearmost position that was ever taken

    @property
    def head(self) -> Waiter | None:
        """Who comes next, or ``None`` if nobody waits."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if entry[2].entry is entry:
                return entry[2]
            self._left -= 1  # before the call, which an interrupt may follow
            heapq.heappop(heap)
        return None

    def join(self, waiter: Waiter) -> None:
        """Stand in line, at the waiter's position."""
        entry = waiter.position_us, waiter.number, waiter
        waiter.entry = entry  # before the call, which an interrupt may follow
        heapq.heappush(self._heap, entry)
        self._last = max(self._last, entry[:2])

    def leave(self, waiter: Waiter) -> None:
        """Stand in line no longer."""
        waiter.entry = None
        self._left += 1
        if self._left > max(
            16, len(self._heap) // 2
        ):  # else a line that is blocked would only grow
            heap = list(self.entries())
            heapq.heapify(heap)
            self._heap, self._left = heap, 0

    def entries(self) -> Iterator[Entry]:
        """Yield the entries of those who wait, in no order."""
        return (entry for entry in self._heap if entry[2].entry is entry)

    def position(self, waiter: Waiter, at_most: int | None = None) -> int:
        """Return how many wait before this one, who stands or stood here; stop at ``at_most``."""
        key = waiter.position_us, waiter.number
        if key >= self._last:
            return len(self) - (waiter.entry is not None)
        before, unseen = 0, [0]
        while unseen and (
            at_most is None or before < at_most
        ):  # down the heap, while entries are less
            at = unseen.pop()
            if at < len(self._heap):
                entry = self._heap[at]
                if entry[:2] < key:
                    before += entry[2].entry is entry
                    unseen += (2 * at + 1, 2 * at + 2)
        return before

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._heap) - self._left


class Lines:
    """The line of each bucket for which somebody waits, for one ``max_concurrency``."""

    __slots__ = ("by_bucket", "max_concurrency")

    def __init__(self, max_concurrency: int, waiters: Iterable[Waiter] = ()) -> None:
        self.max_concurrency = max_concurrency
        self.by_bucket: dict[int, Line] = {}
        for waiter in waiters:
            self.join(waiter)

    def line(self, waiter: Waiter) -> Line | None:
        """Return the line that a waiter belongs in, if somebody waits there."""
        return self.by_bucket.get(waiter.shard_id % self.max_concurrency)

    def join(self, waiter: Waiter) -> None:
        """Stand in the line of the waiter's bucket."""
        number = waiter.shard_id % self.max_concurrency
        line = self.by_bucket.get(number)
        if line is None:
            line = self.by_bucket[number] = Line()
        line.join(waiter)

    def leave(self, waiter: Waiter) -> Waiter | None:
        """Stand in line no longer, and return the head of that line now."""
        number = waiter.shard_id % self.max_concurrency
        line = self.by_bucket.get(number)
        if line is None:
            return None
        if waiter.entry is not None:
            line.leave(waiter)
        head = line.head
        if head is None:
            del self.by_bucket[number]
        return head

    def is_head(self, waiter: Waiter) -> bool:
        """Return whether the waiter is the head of its line."""
        line = self.line(waiter)
        return line is not None and line.head is waiter

    def heads(self) -> list[Waiter]:
        """Return the head of each line."""
        heads = (line.head for line in self.by_bucket.values())
        return [head for head in heads if head is not None]

    def waiters(self) -> list[Waiter]:
        """Return all who wait, by position."""
        entries = (entry for line in self.by_bucket.values() for entry in line.entries())
        return [entry[2] for entry in sorted(entries)]

    def lengths(self) -> dict[int, int]:
        """Return how many wait, of each bucket that has a line."""
        return {number: len(line) for number, line in self.by_bucket.items()}

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self.by_bucket.values()))
