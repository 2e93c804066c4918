"""Benchmark 2: what ``acquire`` costs when it need not wait, with the making of the permit."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.figures import OURS, Result, Table, Target
from benchmarks.peers import SUBJECTS
from benchmarks.rounds import Case, Measured, Say, interleaved
from gateway_queue_sync import Event, LargeBotQueue, SessionStartLimit

NAME = "free"
TITLE = "Free path"

FLOOR = "lock, clock, compare, store"
NO_OP = f"{OURS}: NoOpQueue"
BUDGET = f"{OURS}: LargeBotQueue"
FIRST = f"{OURS}: LargeBotQueue, each bucket's first"
OBSERVED = f"{OURS}: LargeBotQueue, observed"
ONE = "1 thread (ns)"
THREADS = (1, 2, 8)
MARGIN = 0.25


class Size(NamedTuple):
    """How much is measured: calls in each of the rounds, over all threads."""

    rounds: int
    calls: int


SIZES = {"whole": Size(3, 100_000), "quick": Size(2, 20_000), "tiny": Size(1, 400)}


def run(size: Size, say: Say) -> Result:
    """Measure with 1, 2 and 8 threads that call without a pause."""
    cases = [
        Case(FLOOR, "floor", floor, (size.calls,)),
        Case(
            BUDGET,
            "ours",
            with_limit,
            (size.calls,),
            "with a session start limit and a margin of 0.25 s; each bucket has granted before",
        ),
        Case(
            FIRST,
            "ours",
            first_of_each,
            (size.calls,),
            "the same, of buckets that were never asked: they are made, and stay",
        ),
        Case(OBSERVED, "ours", observed, (size.calls,), "by an observer that does nothing"),
        Case(NO_OP, "ours", calls_of, (OURS, size.calls), "keeps no account"),
    ]
    cases += [
        Case(peer.name, peer.kind, calls_of, (peer.name, size.calls))
        for peer in SUBJECTS.values()
        if peer.kind != "ours" and not peer.is_slow  # calls the same here
    ]
    note = "" if size.calls >= SIZES["quick"].calls else "too few calls to say anything"
    table = Table(
        "A call of acquire that need not wait",
        interleaved(cases, size.rounds, say),
        compared=ONE,
        note=note,
    )
    exact = min(
        (
            row.figures[ONE].value
            for row in table.rows
            if row.kind == "peer" and row.figures and SUBJECTS[row.subject].is_exact
        ),
        default=float("nan"),
    )
    floor_ns = table.value(FLOOR, ONE)
    targets = []
    for name, most in ((BUDGET, 4.5), (FIRST, 4.5), (NO_OP, 3)):
        ours, queue = table.value(name, ONE), name.removeprefix(f"{OURS}: ")
        targets += [
            Target(f"{queue}, one thread / the floor", ours / floor_ns, most),
            Target(f"{queue}, one thread / the fastest peer that is exact", ours / exact, 1),
        ]
    return Result(NAME, TITLE, [table], targets)


# --- in a process of its own ----------------------------------------------------------------------


def calls_of(name: str, calls: int) -> Measured:
    """Call a subject that never blocks."""
    subject = SUBJECTS[name]
    if subject.is_async:
        return asyncio.run(_tasks(name, calls))
    return _for_each_count(lambda _: subject.free(), calls)


def first_of_each(calls: int) -> Measured:
    """Call a large bot's queue, each time for a bucket that was never asked."""
    return _for_each_count(_queue, calls)


def with_limit(calls: int, observer: Callable[[Event], None] | None = None) -> Measured:
    """Call the same queue when each of its buckets has granted once, a window ago."""

    def make(count: int) -> Callable[[int], object]:
        acquire = _queue(count, observer)
        for _ in range(count):
            acquire(0)
        time.sleep(MARGIN + 0.05)
        return acquire

    return _for_each_count(make, calls)


def observed(calls: int) -> Measured:
    """Call the same queue with an observer."""
    return with_limit(calls, lambda _: None)


def _queue(count: int, observer: Callable[[Event], None] | None = None) -> Callable[[int], object]:
    limit = SessionStartLimit(2 * count, 2 * count, 0.0, count)
    acquire = LargeBotQueue(limit, interval=1e-6, margin=MARGIN, observer=observer).acquire
    shard_ids = itertools.cycle(range(count))
    return lambda _: acquire(next(shard_ids))


def floor(calls: int) -> Measured:
    """Do the least that any exact limiter must: lock, read the clock, compare and store."""

    def make(_: int) -> Callable[[int], object]:
        lock, due = threading.Lock(), 0
        now = time.monotonic_ns

        def acquire(_: int) -> bool:
            nonlocal due
            with lock:
                at = now()
                if at < due:
                    return False
                due = at + 1
                return True

        return acquire

    return _for_each_count(make, calls)


def _for_each_count(make: Callable[[int], Callable[[int], object]], calls: int) -> Measured:
    measured = {}
    for threads in THREADS:
        each = calls // threads
        name = f"{threads} thread{'s' * (threads > 1)} (ns)"
        measured[name] = _time(make(calls), threads, each) / (each * threads) * 1e9
    return measured


def _time(acquire: Callable[[int], object], threads: int, each: int) -> float:
    """Return the seconds from when all threads may begin until the last has made its calls."""
    gate = threading.Barrier(threads + 1)

    def call() -> None:
        gate.wait()
        for _ in range(each):
            acquire(0)

    callers = [threading.Thread(target=call) for _ in range(threads)]
    for caller in callers:
        caller.start()
    gate.wait()
    began = time.perf_counter()
    for caller in callers:
        caller.join()
    return time.perf_counter() - began


async def _tasks(name: str, calls: int) -> Measured:
    acquire = SUBJECTS[name].free()
    measured = {}
    for tasks in THREADS:
        each = calls // tasks

        async def call(each: int = each) -> None:
            for _ in range(each):
                await acquire(0)

        began = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(tasks)))
        name = f"{tasks} thread{'s' * (tasks > 1)} (ns)"
        measured[name] = (time.perf_counter() - began) / (each * tasks) * 1e9
    return measured
