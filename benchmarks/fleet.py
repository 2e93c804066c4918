"""Benchmark 4: how long the start of many shards takes, compared with the least possible.

The least possible is computed from when each shard asked: in each bucket, a permit is due a window after
the one before. So the time that a machine takes to start threads does not count.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.figures import OURS, Result, Table, Target
from benchmarks.peers import SUBJECTS
from benchmarks.rounds import Case, Measured, Say, interleaved
from gateway_queue_sync import LargeBotQueue, SessionStartLimit
from gateway_queue_sync.testing import FakeClock

NAME = "fleet"
TITLE = "Fleet start"

SEED = 20261124
PERCENT, OVER, TOOK = "over the least (%)", "over the least (ms)", "took (s)"


class Fleet(NamedTuple):
    """The start of a fleet: how many shards and buckets, the window, and for how long shards arrive."""

    shards: int
    buckets: int
    window: float
    rounds: int = 3
    stagger: float = 0.0

    def __str__(self) -> str:
        arriving = f", over {self.stagger:g} s" if self.stagger else ""
        window = f"{self.window:g} s" if self.window >= 1 else f"{self.window * 1e3:g} ms"
        return f"{self.shards:,} shards, {self.buckets} at once, {window}{arriving}"


class Size(NamedTuple):
    """Which fleets are started; ``peers`` is the one that all subjects start."""

    fleets: tuple[Fleet, ...]
    peers: Fleet
    fake: tuple[tuple[int, int], ...]


SIZES = {
    "whole": Size(
        (
            Fleet(64, 1, 0.05, 2),
            Fleet(64, 16, 0.05),
            Fleet(64, 64, 0.05),
            Fleet(1024, 1, 0.003, 2),
            Fleet(1024, 16, 0.05),
            Fleet(1024, 64, 0.05),
            Fleet(64, 16, 0.05, stagger=0.1),
            Fleet(1024, 64, 0.05, stagger=0.6),
            Fleet(48, 16, 1.0),
            Fleet(32, 16, 5.0),
        ),
        Fleet(256, 16, 0.05, 2, stagger=0.4),
        ((1_024, 16), (65_536, 256)),
    ),
    "quick": Size(
        (Fleet(64, 16, 0.05, 1), Fleet(256, 64, 0.05, 1), Fleet(64, 16, 0.05, 1, stagger=0.1)),
        Fleet(64, 16, 0.05, 1, stagger=0.1),
        ((1_024, 16),),
    ),
    "tiny": Size(
        (Fleet(6, 2, 0.02, 1), Fleet(4, 4, 0.02, 1)), Fleet(6, 2, 0.02, 1, stagger=0.01), ((8, 4),)
    ),
}

LIMITS = ((5.0, 0.05), (1.0, 0.5), (0.05, 3.0))
"""By window in seconds: how many percent longer than the least a start may take."""


def run(size: Size, say: Say) -> Result:
    """Start fleets of different sizes: one with all subjects, and some by a fake clock."""
    ours = []
    for fleet in size.fleets:
        case = Case(str(fleet), "ours", start, (OURS, *fleet[:3], fleet.stagger))
        ours += interleaved([case], fleet.rounds, say)
    tables = [Table(f"{OURS}: LargeBotQueue, a thread for each shard", ours)]
    cases = [
        Case(subject.name, subject.kind, start, (subject.name, *size.peers[:3], size.peers.stagger))
        for subject in SUBJECTS.values()
    ]
    note = "Each of the others has one limiter for each bucket."
    rows = interleaved(cases, size.peers.rounds, say)
    tables.append(Table(str(size.peers), rows, note=note))
    faked = [
        Case(f"{shards:,} shards, {buckets} at once, 5.25 s", "ours", fake_start, (shards, buckets))
        for shards, buckets in size.fake
    ]
    tables.append(Table("At full scale, by a FakeClock", interleaved(faked, 1, say)))
    return Result(NAME, TITLE, tables, _targets(size, tables))


def _targets(size: Size, tables: list[Table]) -> list[Target]:
    targets = []
    for table, fleets in ((tables[0], size.fleets), (tables[1], (size.peers,))):
        for fleet in fleets:
            limit = next((limit for window, limit in LIMITS if fleet.window >= window), None)
            if limit is not None and fleet.shards > fleet.buckets:
                over = table.value(str(fleet) if table is tables[0] else OURS, PERCENT)
                targets.append(Target(f"{fleet}: over the least (%)", over, limit))
    targets += [
        Target(f"{row.subject}, faked: over the least (%)", row.figures[PERCENT].value, 0)
        for row in tables[2].rows
    ]
    return targets


# --- in a process of its own ----------------------------------------------------------------------


def start(name: str, shards: int, buckets: int, window: float, stagger: float) -> Measured:
    """Start a fleet, and say how long that took."""
    rng = random.Random(SEED)
    delays = [rng.uniform(0, stagger) for _ in range(shards)]
    if SUBJECTS[name].is_async:
        asked, got = asyncio.run(_start_tasks(name, delays, buckets, window))
    else:
        asked, got = _start_threads(_limiter(name, buckets, window), delays)
    least = least_seconds(asked, buckets, window)
    took = max(got) - min(asked)
    return {PERCENT: (took / least - 1) * 100, OVER: (took - least) * 1e3, TOOK: took}


def _limiter(name: str, buckets: int, window: float) -> Callable[[int], object]:
    if name == OURS:
        limit = SessionStartLimit(10**6, 10**6, 0.0, buckets)
        return LargeBotQueue(limit, interval=window, margin=0).acquire
    acquires = [SUBJECTS[name].make(window) for _ in range(buckets)]
    return lambda shard_id: acquires[shard_id % buckets](shard_id)


def _start_threads(
    acquire: Callable[[int], object], delays: list[float]
) -> tuple[list[float], list[float]]:
    """Return when each shard asked, and when it got its permit."""
    asked, got = [0.0] * len(delays), [0.0] * len(delays)
    begin = threading.Event()

    def shard(shard_id: int, delay: float) -> None:
        begin.wait()
        time.sleep(delay)
        asked[shard_id] = time.monotonic()
        acquire(shard_id)
        got[shard_id] = time.monotonic()

    threads = [threading.Thread(target=shard, args=each) for each in enumerate(delays)]
    for thread in threads:
        thread.start()
    begin.set()
    for thread in threads:
        thread.join()
    return asked, got


async def _start_tasks(
    name: str, delays: list[float], buckets: int, window: float
) -> tuple[list[float], list[float]]:
    acquires = [SUBJECTS[name].make(window) for _ in range(buckets)]
    asked, got = [0.0] * len(delays), [0.0] * len(delays)

    async def shard(shard_id: int, delay: float) -> None:
        await asyncio.sleep(delay)
        asked[shard_id] = time.monotonic()
        await acquires[shard_id % buckets](shard_id)
        got[shard_id] = time.monotonic()

    await asyncio.gather(*(shard(*each) for each in enumerate(delays)))
    return asked, got


def least_seconds(asked: Iterable[float], buckets: int, window: float) -> float:
    """Return the shortest time for the start of shards that asked at these times."""
    asked = list(asked)
    free: dict[int, float] = defaultdict(float)
    last = 0.0
    for at, shard_id in sorted((at, shard_id) for shard_id, at in enumerate(asked)):
        granted = max(at, free[shard_id % buckets])
        free[shard_id % buckets] = granted + window
        last = max(last, granted)
    return last - min(asked)


def fake_start(shards: int, buckets: int) -> Measured:
    """Start a fleet of futures by a fake clock, at Discord's interval and the usual margin."""
    clock = FakeClock()
    limit = SessionStartLimit(shards, shards, 0.0, buckets)
    began = time.perf_counter()
    queue = LargeBotQueue(limit, clock=clock)
    began_us = clock.now_us()
    futures = [queue.enqueue(shard_id) for shard_id in range(shards)]
    least_us = (-(-shards // buckets) - 1) * 5_250_000
    for first in range(buckets, shards, buckets):
        clock.settle(0, timeout=60)
        clock.advance(5.25)  # exactly when the buckets open
        for future in futures[first : first + buckets]:
            future.result(60)
    took_us = clock.now_us() - began_us
    queue.close()
    return {
        PERCENT: (took_us / least_us - 1) * 100,
        OVER: (took_us - least_us) / 1e3,
        "shown by the clock (s)": took_us / 1e6,
        TOOK: time.perf_counter() - began,
    }
