"""For tests, yours too: a clock that is driven by hand, and a judge of IDENTIFYs."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.models import (
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    SessionStartLimit,
    seconds,
    whole_number,
)
from gateway_queue_sync.rules import MICROSECOND, to_us

if TYPE_CHECKING:
    from gateway_queue_sync.clock import Lock

_PACKAGE = str(Path(__file__).parent)


class _FakeCondition(threading.Condition):
    """A condition whose timed waits end when its clock is advanced that far."""

    def __init__(self, lock: Lock, clock: FakeClock) -> None:
        super().__init__(lock)
        self.timed_out = False
        self._clock = clock

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
    """A clock that moves only when told to, and with which threads really wait.

    Hand it to a queue, start threads that ``acquire``, and drive them::

        clock.settle(2)        # until two threads are parked in the queue
        clock.advance(5.25)    # wakes who is due
        clock.settle(1)        # until the other one is parked again

    Nothing sleeps: ``settle`` returns as soon as the threads are where they should be. One thread
    waits on a condition at a time, as it is in the queues.

    Args:
        start: what the monotonic clock shows at first, in seconds.
        wall: what the wall clock shows at first, in seconds since the Unix epoch.
    """

    def __init__(self, start: float = 1_000.0, wall: float = 1_700_000_000.0) -> None:
        self._now_us = to_us(start)
        self._wall_us = to_us(wall)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._parked: dict[_FakeCondition, int | None] = {}
        self._waking: set[_FakeCondition] = set()
        self._awake: set[int] = set()  # threads that woke and have not parked again
        self._locks: set[Lock] = set()

    def now_us(self) -> int:
        """Return what the monotonic clock shows, in microseconds."""
        return self._now_us

    def wall_us(self) -> int:
        """Return what the wall clock shows, in microseconds since the Unix epoch."""
        return self._wall_us

    def condition(self, lock: Lock) -> threading.Condition:
        """Return a condition whose timed waits end when the clock is advanced that far."""
        self._locks.add(lock)
        return _FakeCondition(lock, self)

    def advance(self, by: float) -> None:
        """Move both clocks on by so many seconds, in one step, and wake whose wait is over."""
        by_us = to_us(seconds("by", by))
        with contextlib.ExitStack() as held:
            for lock in list(self._locks):  # nobody is between reading the time and parking
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

    def set_wall(self, to: float) -> None:
        """Set the wall clock alone, as a person or NTP does."""
        self._wall_us = to_us(to)

    def settle(self, parked: int, timeout: float = 10.0) -> None:
        """Block until exactly so many threads are parked and whoever was woken has made its move.

        Args:
            parked: how many threads should be.
            timeout: the longest wait for that in real seconds.

        Raises:
            AssertionError: they are not after ``timeout`` real seconds.
        """
        give_up_us = SYSTEM_CLOCK.now_us() + to_us(timeout)
        while True:
            with self._lock:
                while len(self._parked) != parked or self._waking:
                    left_us = give_up_us - SYSTEM_CLOCK.now_us()
                    if left_us <= 0:
                        raise AssertionError(
                            f"{len(self._parked)} threads are parked, not {parked}, after {timeout:g} s"
                        )
                    self._changed.wait(left_us / MICROSECOND)
            for lock in list(self._locks):
                with lock:  # whoever woke and holds it makes its move before it lets go
                    pass
            with self._lock:
                if self._is_on_its_way():
                    self._changed.wait(0.000_2)
                elif len(self._parked) == parked and not self._waking:
                    return
            if SYSTEM_CLOCK.now_us() > give_up_us:
                raise AssertionError(f"a thread is still inside its queue after {timeout:g} s")

    def _is_on_its_way(self) -> bool:
        """Return whether a thread that woke is still on its way out of the queue.

        One that reads the limit anew is not waited for: that takes as long as it takes.
        """
        frames = sys._current_frames()
        for thread in self._awake - {threading.get_ident()}:
            frame, names = frames.get(thread), set()
            while frame is not None:
                if frame.f_code.co_filename.startswith(_PACKAGE):
                    names.add(frame.f_code.co_name)
                frame = frame.f_back
            if names & {"_take_turns", "_fulfil"} and "_renew_limit" not in names:
                return True
            self._awake.discard(thread)
        return False

    @property
    def parked(self) -> int:
        """How many threads are parked just now."""
        return len(self._parked)

    @property
    def next_in(self) -> float | None:
        """Seconds until the next timed wait ends, ``None`` if there is none."""
        with self._lock:
            deadlines = [at for at in self._parked.values() if at is not None]
        return (min(deadlines) - self._now_us) / MICROSECOND if deadlines else None

    def _park(self, condition: _FakeCondition, timeout: float | None) -> None:
        with self._lock:
            deadline_us = None if timeout is None else self._now_us + to_us(timeout)
            self._parked[condition] = deadline_us
            self._awake.discard(threading.get_ident())
            self._changed.notify_all()

    def _unpark(self, condition: _FakeCondition) -> None:
        with self._lock:
            if condition in self._parked:
                del self._parked[condition]
                self._waking.add(condition)
                self._changed.notify_all()

    def _woke(self, condition: _FakeCondition) -> None:
        with self._lock:
            self._parked.pop(condition, None)
            self._waking.discard(condition)
            self._awake.add(threading.get_ident())
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
    """Judges IDENTIFYs as Discord does: by when they arrive. It knows nothing of any queue.

    An IDENTIFY is refused if its bucket accepted another one less than ``interval`` ago. With
    ``total`` it also counts: going past that many in a ``period``, refused ones included, resets
    the token, and nothing is accepted any more.

    Args:
        max_concurrency: how many buckets there are.
        interval: seconds between two IDENTIFYs of a bucket.
        total: IDENTIFYs allowed in a period; ``None`` for any number.
        period: seconds; it starts with its first IDENTIFY.
        clock: what tells the time of arrival.
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
                self.refusals.append(Refusal(shard_id, bucket, early_us / MICROSECOND))
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
            self._total, remaining, left_us / MICROSECOND, self.max_concurrency
        )

    @property
    def refused(self) -> int:
        """How many IDENTIFYs broke a rule."""
        return len(self.refusals)

    @property
    def shortest_gap(self) -> float | None:
        """The least seconds between an accepted IDENTIFY and the next to arrive in its bucket."""
        return None if self._shortest_us is None else self._shortest_us / MICROSECOND

    def least_time(self, shard_ids: Iterable[int]) -> float:
        """Return the seconds that starting these shards must take at the least."""
        sizes: dict[int, int] = {}
        for shard_id in shard_ids:
            bucket = shard_id % self.max_concurrency
            sizes[bucket] = sizes.get(bucket, 0) + 1
        return (max(sizes.values(), default=1) - 1) * self._interval_us / MICROSECOND
