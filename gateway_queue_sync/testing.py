"""For tests of your own: a clock that is moved by hand, and a judge of IDENTIFYs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.models import (
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    US_PER_SECOND,
    SessionStartLimit,
    seconds,
    to_us,
    whole_number,
)

if TYPE_CHECKING:
    from gateway_queue_sync.clock import Lock


class _Visit:
    """A thread's call to a queue. It begins when this object is made, and ends with its context."""

    def __init__(self, clock: FakeClock, *, worker: bool) -> None:
        self._clock = clock
        self._outer: _Visit | None = None
        self.worker = worker
        self.parked = False
        clock._begin(self)

    def __enter__(self) -> None:
        self._outer, self._clock._here.visit = self._clock._here.visit, self
        if self._outer is not None:
            self._outer.parked = True  # of a thread, only the innermost call counts

    def __exit__(self, *exc_info: object) -> None:
        self._clock._here.visit = self._outer
        if self._outer is not None:
            self._outer.parked = False
        self._clock._end(self)


class _Here(threading.local):
    """What the clock knows about the calling thread."""

    visit: _Visit | None = None


class _FakeCondition(threading.Condition):
    """A condition whose timed waits end when its clock is advanced that far."""

    def __init__(self, lock: Lock, clock: FakeClock) -> None:
        super().__init__(lock)  # type: ignore[arg-type]
        self.timed_out = False
        self.visit: _Visit | None = None
        self._clock = clock

    @property
    def is_workers(self) -> bool:
        """Whether it is a queue's worker that waits on it."""
        return self.visit is not None and self.visit.worker

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None and timeout <= 0:
            return super().wait(0)
        self.timed_out = False
        try:
            self._clock._park(self, timeout)
            super().wait()
        finally:
            self._clock._woke(self)
        return not self.timed_out

    def notify(self, n: int = 1) -> None:
        self._clock._unpark(self)
        super().notify(n)


class FakeClock:
    """A clock that moves only when a test advances it. Threads that wait by it really block.

    Pass it to a queue, start threads that ``acquire``, and advance the clock::

        clock.settle(2)        # until two threads are parked in the queue
        clock.advance(5.25)    # wakes those whose wait is over
        clock.settle(1)        # until the other one is parked again

    Nothing sleeps: ``settle`` returns as soon as so many threads wait. The queue tells the clock which
    threads are inside it. Its worker, which serves futures and shared ledgers, is not counted. On each
    condition only one thread may wait at a time, as in the queues.

    Args:
        start: the first time of the monotonic clock, in seconds.
        wall: the first time of the wall clock, in seconds since the Unix epoch.
    """

    def __init__(self, start: float = 1_000.0, wall: float = 1_700_000_000.0) -> None:
        self._now_us = to_us(start)
        self._wall_us = to_us(wall)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._here = _Here()
        self._visits: set[_Visit] = set()
        self._parked: dict[_FakeCondition, int | None] = {}
        self._waking: set[_FakeCondition] = set()
        self._locks: set[Lock] = set()

    def now_us(self) -> int:
        """Return the time of the monotonic clock in microseconds."""
        return self._now_us

    def wall_us(self) -> int:
        """Return the time of the wall clock in microseconds since the Unix epoch."""
        return self._wall_us

    def condition(self, lock: Lock) -> threading.Condition:
        """Return a condition whose timed waits end when the clock is advanced that far."""
        self._locks.add(lock)
        return _FakeCondition(lock, self)

    def inside(self, *, worker: bool = False) -> contextlib.AbstractContextManager[object]:
        """Return a context in which a thread counts as inside a queue, from now on."""
        return _Visit(self, worker=worker)

    def advance(self, by: float) -> None:
        """Move both clocks on by some seconds, in one step, and wake the threads whose wait is over."""
        by_us = to_us(seconds("by", by))
        with contextlib.ExitStack() as held:
            for lock in list(self._locks):  # no thread may be between reading the time and parking
                held.enter_context(lock)
            self._now_us += by_us
            self._wall_us += by_us
        with self._lock:
            deadlines = [(at, c) for c, at in self._parked.items() if at is not None]
            due = [c for at, c in sorted(deadlines, key=lambda item: item[0]) if at <= self._now_us]
        for condition in due:
            with condition:
                condition.timed_out = True
                condition.notify()

    def suspend(self, for_: float) -> None:
        """Move both clocks on as if the machine was suspended: waits do not get shorter."""
        by_us = to_us(seconds("for_", for_))
        with self._lock:
            self._now_us += by_us
            self._wall_us += by_us
            for condition, at in self._parked.items():
                self._parked[condition] = None if at is None else at + by_us

    def set_wall(self, to: float) -> None:
        """Set the wall clock alone, as a person or NTP does."""
        self._wall_us = to_us(to)

    def settle(self, parked: int, timeout: float = 10.0) -> None:
        """Block until exactly so many threads wait (are *parked*), and no other thread is in a queue.

        A queue's worker is not counted, but it has to be parked, too. Threads that read the limit do not
        matter.

        Args:
            parked: how many threads should be parked.
            timeout: the longest wait in real seconds.

        Raises:
            AssertionError: that is not so after ``timeout`` real seconds.
        """
        give_up_us = SYSTEM_CLOCK.now_us() + to_us(timeout)
        with self._lock:
            while self.parked != parked or self._waking or self._is_busy():
                left_us = give_up_us - SYSTEM_CLOCK.now_us()
                if left_us <= 0:
                    busy = "; one is still inside its queue" if self._is_busy() else ""
                    raise AssertionError(
                        f"{self.parked} threads are parked, not {parked}, after {timeout:g} s{busy}"
                    )
                self._changed.wait(left_us / US_PER_SECOND)

    def _is_busy(self) -> bool:
        """Return whether another thread is inside a queue and not parked."""
        return any(not visit.parked for visit in self._visits if visit is not self._here.visit)

    @property
    def parked(self) -> int:
        """How many threads are parked now, queues' workers not counted."""
        return sum(1 for condition in list(self._parked) if not condition.is_workers)

    @property
    def next_in(self) -> float | None:
        """Seconds until the next timed wait ends, workers' not counted; ``None`` if there is none."""
        with self._lock:
            deadlines = [
                at for c, at in self._parked.items() if at is not None and not c.is_workers
            ]
        return (min(deadlines) - self._now_us) / US_PER_SECOND if deadlines else None

    def _begin(self, visit: _Visit) -> None:
        with self._lock:
            self._visits.add(visit)

    def _end(self, visit: _Visit) -> None:
        with self._lock:
            self._visits.discard(visit)
            self._changed.notify_all()

    def _park(self, condition: _FakeCondition, timeout: float | None) -> None:
        with self._lock:
            deadline_us = None if timeout is None else self._now_us + to_us(timeout)
            condition.visit = visit = self._here.visit
            if visit is not None:
                visit.parked = True
            self._parked[condition] = deadline_us
            self._changed.notify_all()

    def _unpark(self, condition: _FakeCondition) -> None:
        with self._lock:
            if condition in self._parked:
                del self._parked[condition]
                self._waking.add(condition)
                if condition.visit is not None:
                    condition.visit.parked = False

    def _woke(self, condition: _FakeCondition) -> None:
        with self._lock:
            self._parked.pop(condition, None)
            self._waking.discard(condition)
            if condition.visit is not None:
                condition.visit.parked = False
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Refusal:
    """An IDENTIFY that broke a rule.

    Attributes:
        shard_id: the shard that sent it.
        bucket: its bucket.
        early_by: seconds by which it came too soon, 0.0 if it went past the limit.
    """

    shard_id: int
    bucket: int
    early_by: float


class Referee:
    """Judges IDENTIFYs as Discord does: by when they arrive. It does not use a queue.

    An IDENTIFY is refused if its bucket accepted another one less than ``interval`` ago. With
    ``total`` it also counts: going past that many in a ``period``, refused ones included, resets
    the token, and nothing is accepted any more.

    Args:
        max_concurrency: how many buckets there are.
        interval: seconds between two IDENTIFYs of a bucket.
        total: IDENTIFYs allowed in a period; ``None`` for any number.
        period: seconds; it starts with its first IDENTIFY.
        clock: the clock for the times of arrival.
    """

    def __init__(
        self,
        max_concurrency: int = 1,
        *,
        interval: float = IDENTIFY_INTERVAL,
        total: int | None = None,
        period: float = SESSION_PERIOD,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.max_concurrency = whole_number("max_concurrency", max_concurrency, least=1)
        self._interval_us = to_us(seconds("interval", interval, above=0))
        self._period_us = to_us(seconds("period", period, above=0))
        self._total = None if total is None else whole_number("total", total)
        self._clock = clock
        self._lock = threading.Lock()
        self._accepted_us: dict[int, int] = {}
        self._period_ends_us: int | None = None
        self._in_period = 0
        self._shortest_us: int | None = None
        self.accepted = 0
        self.refusals: list[Refusal] = []
        self.token_reset = False

    def identify(self, shard_id: int) -> bool:
        """Judge an IDENTIFY that arrives now: true is READY, false is Invalid Session."""
        shard_id = whole_number("shard_id", shard_id)
        with self._lock:
            now_us = self._clock.now_us()
            bucket = shard_id % self.max_concurrency
            self._count(now_us)
            last_us = self._accepted_us.get(bucket)
            early_us = 0
            if last_us is not None:
                gap_us = now_us - last_us
                if self._shortest_us is None or gap_us < self._shortest_us:
                    self._shortest_us = gap_us
                early_us = max(0, self._interval_us - gap_us)
            if early_us or self.token_reset:
                self.refusals.append(Refusal(shard_id, bucket, early_us / US_PER_SECOND))
                return False
            self._accepted_us[bucket] = now_us
            self.accepted += 1
            return True

    def _count(self, now_us: int) -> None:
        if self._period_ends_us is None or now_us >= self._period_ends_us:
            self._period_ends_us, self._in_period = now_us + self._period_us, 0
        self._in_period += 1
        if self._total is not None and self._in_period > self._total:
            self.token_reset = True

    @property
    def limit(self) -> SessionStartLimit | None:
        """What ``GET /gateway/bot`` would answer now; ``None`` without a ``total``.

        Before the first IDENTIFY of a period all is left, and ``reset_after`` is 0.
        """
        if self._total is None:
            return None
        with self._lock:
            ends_us = self._period_ends_us
            left_us = 0 if ends_us is None else max(0, ends_us - self._clock.now_us())
            used = self._in_period if left_us else 0
        remaining = max(0, self._total - used)
        return SessionStartLimit(
            self._total, remaining, left_us / US_PER_SECOND, self.max_concurrency
        )

    @property
    def refused(self) -> int:
        """How many IDENTIFYs broke a rule."""
        return len(self.refusals)

    @property
    def shortest_gap(self) -> float | None:
        """The least seconds from an accepted IDENTIFY to the next that arrived in its bucket."""
        return None if self._shortest_us is None else self._shortest_us / US_PER_SECOND

    def least_time(self, shard_ids: Iterable[int]) -> float:
        """Return the least number of seconds that the start of these shards takes."""
        sizes: dict[int, int] = {}
        for shard_id in shard_ids:
            bucket = shard_id % self.max_concurrency
            sizes[bucket] = sizes.get(bucket, 0) + 1
        return (max(sizes.values(), default=1) - 1) * self._interval_us / US_PER_SECOND
