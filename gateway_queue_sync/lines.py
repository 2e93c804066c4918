"""Lines: who waits for which bucket, in what order. Plain data under the queue's mutex."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from gateway_queue_sync.clock import make_small
from gateway_queue_sync.models import Permit
from gateway_queue_sync.rules import Grant

_serials = itertools.count()


class PermitFuture(Future[Permit]):
    """A future that leaves its line as soon as it is cancelled."""

    ticket: Ticket
    on_cancel: Callable[[Ticket], None] | None = None

    def __init__(self) -> None:
        super().__init__()
        make_small(self._condition)

    def cancel(self) -> bool:
        """Cancel as any future does, and leave the line."""
        cancelled = super().cancel()
        on_cancel, self.on_cancel = self.on_cancel, None
        if cancelled and on_cancel is not None:
            on_cancel(self.ticket)
        return cancelled


class Ticket:
    """One place in a line, held by a thread or by a future.

    Its place is its arrival minus its priority (a head start), then the order of asking. A ticket
    that is no longer ``waiting`` is as good as gone: lines pass over it.
    """

    __slots__ = (
        "announced",
        "arrived_us",
        "condition",
        "finished",
        "followed",
        "future",
        "grant",
        "left",
        "place",
        "shard_id",
        "told",
        "trusted_period",
        "unshown",
        "waiting",
        "warning",
    )

    def __init__(
        self,
        shard_id: int,
        arrived_us: int,
        priority_us: int = 0,
        future: PermitFuture | None = None,
    ) -> None:
        self.shard_id = shard_id
        self.arrived_us = arrived_us
        self.place = (arrived_us - priority_us, next(_serials))
        self.future = future
        self.condition: threading.Condition | None = None  # a thread's, made when it has to wait
        self.waiting = False
        self.left = False  # it stood in a line before
        self.grant: Grant | None = None  # granted, but not handed over yet
        self.finished = False  # somebody completes its future
        self.announced = False  # an observer, or the log if it is for long, knows that it waits
        self.followed = False  # the log has told that it waits
        self.unshown: int | None = None  # the log tells of its permit, and that so many had theirs
        self.warning: Callable[[], object] | None = None  # of the budget, told with its permit
        self.told = False  # its permit was told of
        self.trusted_period: int | None = None  # whose limit it tried to read, in vain

    @property
    def number(self) -> int:
        """What tells the ticket from all others of this process."""
        return self.place[1]

    def hand_over(self) -> None:
        """Let go of a permit that is somebody's from now on: whatever happens, it is not given back."""
        self.grant = None


class Line:
    """Those waiting for one bucket: a heap by place, in which whoever left stays until passed over.

    So joining, leaving and taking the front cost the same (or a logarithm) at any length.
    """

    __slots__ = ("_gone", "_heap", "_last")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Ticket]] = []
        self._gone = 0  # how many in the heap have left
        self._last: tuple[int, int] | None = None  # the last place that anybody took

    @property
    def first(self) -> Ticket | None:
        """Who comes next, or ``None`` if nobody waits."""
        heap = self._heap
        while heap and not heap[0][1].waiting:
            heapq.heappop(heap)
            self._gone -= 1
        return heap[0][1] if heap else None

    @property
    def second(self) -> Ticket | None:
        """Who comes after the first, or ``None`` if nobody does."""
        if self.first is None:
            return None
        best, left = None, [1, 2]
        while left:  # down the heap, but only below those who have left
            at = left.pop()
            if at >= len(self._heap):
                continue
            ticket = self._heap[at][1]
            if not ticket.waiting:
                left += (2 * at + 1, 2 * at + 2)
            elif best is None or ticket.place < best.place:
                best = ticket
        return best

    def join(self, ticket: Ticket) -> None:
        """Stand in line, at the ticket's place."""
        if ticket.left:  # it stood here before: what is left of that must not come to life again
            self._forget_the_gone()
        ticket.waiting = True
        heapq.heappush(self._heap, (ticket.place, ticket))
        if self._last is None or ticket.place > self._last:
            self._last = ticket.place

    def leave(self, ticket: Ticket) -> None:
        """Stand in line no longer."""
        ticket.waiting, ticket.left = False, True
        self._gone += 1
        if self._gone > max(16, len(self._heap) // 2):
            self._forget_the_gone()  # else a line that is blocked would only grow

    def _forget_the_gone(self) -> None:
        heap = [entry for entry in self._heap if entry[1].waiting]
        heapq.heapify(heap)
        self._heap, self._gone = heap, 0

    def __iter__(self) -> Iterator[Ticket]:
        """Yield those who stand here, in no order."""
        return (ticket for _, ticket in self._heap if ticket.waiting)

    def waiting(self) -> list[Ticket]:
        """Return those who wait, in no order: not the first if its permit is just handed over."""
        return [ticket for ticket in self if ticket.grant is None]

    def copy(self) -> Line:
        """Return a line of the same tickets, to look at without holding up this one."""
        line = Line()
        line._heap, line._gone, line._last = self._heap.copy(), self._gone, self._last
        return line

    def before(self, ticket: Ticket) -> int:
        """Return how many wait in front of this place, of one who stands or stood here."""
        if ticket.place == self._last:
            return len(self) - ticket.waiting
        place = ticket.place
        before = sum(1 for other, who in self._heap if other < place and who.waiting)
        return before - (self._is_first_served() and before > 0)

    def has_before(self, ticket: Ticket, count: int) -> bool:
        """Return whether so many wait in front of this place; looks at few more than that."""
        if ticket.place == self._last:
            return self.before(ticket) >= count
        left = [0]
        while left and count > 0:  # down the heap, as far as places are before this one
            at = left.pop()
            if at < len(self._heap) and self._heap[at][0] < ticket.place:
                count -= self._heap[at][1].waiting
                left += (2 * at + 1, 2 * at + 2)
        return count <= 0

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._heap) - self._gone - self._is_first_served()

    def _is_first_served(self) -> bool:
        first = self.first
        return first is not None and first.grant is not None


class Lines:
    """The line of each bucket in which somebody waits, for one ``max_concurrency``."""

    __slots__ = ("by_bucket", "max_concurrency")

    def __init__(self, max_concurrency: int, tickets: Iterable[Ticket] = ()) -> None:
        self.max_concurrency = max_concurrency
        self.by_bucket: dict[int, Line] = {}  # a bucket is in here while somebody waits for it
        for ticket in tickets:
            self.join(ticket)

    def bucket(self, ticket: Ticket) -> int:
        """Return the number of the bucket that a ticket waits for."""
        return ticket.shard_id % self.max_concurrency

    def join(self, ticket: Ticket) -> None:
        """Stand in the line of the ticket's bucket."""
        number = self.bucket(ticket)
        line = self.by_bucket.get(number)
        if line is None:
            line = self.by_bucket[number] = Line()
        line.join(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Stand in line no longer; harmless if the ticket does not."""
        line = self.by_bucket.get(self.bucket(ticket))
        if line is not None and ticket.waiting:
            line.leave(ticket)

    def first(self, number: int) -> Ticket | None:
        """Return who comes next in a bucket; a line that has run empty is dropped."""
        line = self.by_bucket.get(number)
        if line is None:
            return None
        first = line.first
        if first is None:
            del self.by_bucket[number]
        return first

    def second(self, number: int) -> Ticket | None:
        """Return who comes after the first in a bucket."""
        line = self.by_bucket.get(number)
        return None if line is None else line.second

    def before(self, ticket: Ticket) -> int:
        """Return how many wait in front of this place in its line."""
        line = self.by_bucket.get(self.bucket(ticket))
        return 0 if line is None else line.before(ticket)

    def lengths(self) -> dict[int, int]:
        """Return how many wait in each bucket that has a line."""
        return {number: len(line) for number, line in self.by_bucket.items()}

    def firsts(self) -> list[Ticket]:
        """Return who comes next, of each line."""
        found = (self.first(number) for number in list(self.by_bucket))
        return [ticket for ticket in found if ticket is not None]

    def __iter__(self) -> Iterator[Ticket]:
        """Yield everybody who waits, first come first."""
        everybody = [ticket for line in self.by_bucket.values() for ticket in line]
        return iter(sorted(everybody, key=lambda ticket: ticket.place))


class Agenda:
    """When to look at which bucket again: a heap by time, one valid entry for each bucket."""

    __slots__ = ("_heap", "_times")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []
        self._times: dict[int, int] = {}

    def set(self, number: int, at_us: int) -> None:
        """Look at the bucket at ``at_us``, instead of at any time set before."""
        self._times[number] = at_us
        heapq.heappush(self._heap, (at_us, number))
        if len(self._heap) > 16 + 2 * len(self._times):
            self._heap = [(at_us, number) for number, at_us in self._times.items()]
            heapq.heapify(self._heap)

    @property
    def next_us(self) -> int | None:
        """When to look next, ``None`` for never."""
        heap = self._heap
        while heap and self._times.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def pop(self) -> int:
        """Take the bucket that ``next_us`` is about off the agenda."""
        _, number = heapq.heappop(self._heap)
        del self._times[number]
        return number
