"""Benchmark 3: what a waiter costs, in lines of different lengths."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from benchmarks.figures import OURS, Result, Table, Target
from benchmarks.machine import HAS_PSUTIL, resident_bytes
from benchmarks.peers import SUBJECTS
from benchmarks.rounds import Case, Measured, Say, at_one_time, interleaved
from benchmarks.shared import ledger, redis_server
from gateway_queue_sync import AcquireTimeout, GatewayQueue, LocalQueue, RedisQueue, SqliteQueue

NAME = "lines"
TITLE = "Lines"

SEED = 20261124
NEVER = 86_400.0  # s: a window that does not end meanwhile
JOIN, BYTES, CANCEL, GRANT = "join (µs)", "each (KiB)", "cancel (µs)", "grant (µs)"
TRACED, IDLE, LAST_RETURN = (
    "of Python's (KiB)",
    "CPU while idle (ms)",
    "the last returns after (ms)",
)
TASKS = "aiolimiter"
BARE_FUTURE, BARE_THREADS = "a bare Future in a deque", "bare threads on a lock"


class Size(NamedTuple):
    """How much is measured: how many wait, and for how many seconds they are observed."""

    rounds: int
    peers_rounds: int
    futures: tuple[int, ...]
    threads: tuple[int, ...]
    peers: int
    idle: float
    peers_idle: float
    timing_out: int


SIZES = {
    "whole": Size(2, 3, (1_000, 10_000, 100_000), (1_000, 10_000), 1_000, 10.0, 5.0, 1_000),
    "quick": Size(1, 1, (1_000, 10_000), (1_000,), 200, 1.0, 2.0, 500),
    "tiny": Size(1, 1, (50,), (8,), 4, 0.1, 0.1, 5),
}


def run(size: Size, say: Say) -> Result:
    """Measure futures and threads in lines, time-outs, and waiting while single permits are granted."""
    futures = _futures(size, say)
    threads = _threads(size, say)
    idle = _idle(size, say)
    returned = _timeouts(size, say)
    return Result(
        NAME, TITLE, [futures, threads, idle, returned], _targets(size, futures, threads, returned)
    )


def _futures(size: Size, say: Say) -> Table:
    say("futures in line")
    cases = [
        *(
            Case(_many(BARE_FUTURE, count), "floor", bare_futures, (count,))
            for count in size.futures
        ),
        *(Case(_many(OURS, count), "ours", futures_in_line, (count,)) for count in size.futures),
        *(
            Case(_many(TASKS, count), "peer", tasks_in_line, (count,), of=TASKS)
            for count in size.futures[:2]
        ),
    ]
    rows = interleaved(cases, size.rounds, say)
    note = (
        "aiolimiter: tasks of one event loop. A grant: a permit is given back, and the next takes it. "
        "What grows is the garbage collector's share: it looks at all that wait again and again."
    )
    return Table("Waiting without a thread", rows, note=note)


def _threads(size: Size, say: Say) -> Table:
    say(f"threads in line, idle for {size.idle:g} s")
    cases = [Case(_many(BARE_THREADS, size.threads[0]), "floor", bare_threads, (size.threads[0],))]
    cases += [
        Case(_many(OURS, count), "ours", threads_in_line, (count, size.idle))
        for count in size.threads
    ]
    many = size.futures[-1]
    cases.append(Case(f"{OURS}, {many:,} futures", "ours", idle_futures, (many, size.idle)))
    note = "What is Python's own does not count the threads' stacks."
    return Table("Waiting with a thread each", at_one_time(cases, size.rounds, say), note=note)


def _idle(size: Size, say: Say) -> Table:
    say(f"{size.peers} threads each, idle for {size.peers_idle:g} s")
    cases = [
        Case(
            subject.name,
            subject.kind,
            idle_with_grants,
            (subject.name, size.peers, size.peers_idle),
        )
        for subject in SUBJECTS.values()
    ]
    title = f"{size.peers:,} in line for {size.peers_idle:g} s, in which two permits are due"
    return Table(title, at_one_time(cases, size.peers_rounds, say), compared=IDLE)


def _timeouts(size: Size, say: Say) -> Table:
    say(f"{size.timing_out} time out at one instant")
    cases = [
        Case("bare lock.acquire(timeout)", "floor", timed_out_locks, (size.timing_out,)),
        Case(OURS, "ours", timed_out_acquires, (size.timing_out,)),
        *(
            Case(f"{OURS}, {kind}", "ours", timed_out_of_a_ledger, (kind, size.timing_out))
            for kind in ["SQLite"] + ["Redis"] * (redis_server() is not None)
        ),
    ]
    title = f"{size.timing_out:,} threads time out at one instant"
    return Table(title, interleaved(cases, size.rounds, say), compared=LAST_RETURN)


def _targets(size: Size, futures: Table, threads: Table, returned: Table) -> list[Target]:
    few, many = (_many(OURS, count) for count in (size.futures[0], size.futures[-1]))
    bare = threads.value(_many(BARE_THREADS, size.threads[0]), TRACED)
    ours = _many(OURS, size.threads[0])
    growth = f"{size.futures[0]:,} to {size.futures[-1]:,}"
    least, most = (_many(BARE_FUTURE, count) for count in (size.futures[0], size.futures[-1]))
    grows = futures.value(many, JOIN) / futures.value(few, JOIN)
    floor_grows = futures.value(most, JOIN) / futures.value(least, JOIN)
    return [
        Target(f"join, {growth}: ratio", grows, 1.5),
        Target(f"join, {growth}: ratio / the floor's", grows / floor_grows, 1.15),
        Target(
            f"cancel, {growth}: ratio",
            futures.value(many, CANCEL) / futures.value(few, CANCEL),
            1.5,
        ),
        Target(
            f"grant, {growth}: ratio", futures.value(many, GRANT) / futures.value(few, GRANT), 1.5
        ),
        Target("a future that waits (KiB)", futures.value(many, BYTES), 1.5),
        Target("added to a thread that waits (KiB)", threads.value(ours, TRACED) - bare, 1.0),
        Target(
            f"{size.threads[0]:,} threads, idle for {size.idle:g} s: CPU (ms)",
            threads.value(ours, IDLE),
            2.0 * size.idle / 10,
        ),
        Target(
            "the last of those timing out returns / the floor's",
            returned.value(OURS, LAST_RETURN)
            / returned.value("bare lock.acquire(timeout)", LAST_RETURN),
            1.5,
        ),
    ]


def _many(name: str, count: int) -> str:
    return f"{name}, {count:,}"


# --- in a process of its own: without a thread ----------------------------------------------------


def futures_in_line(count: int) -> Measured:
    """Time joining, cancelling and granting in a line of futures; measure the memory of a second one."""
    queue = LocalQueue(interval=NEVER)
    permit = queue.acquire(0)
    began = time.perf_counter()
    futures = [queue.enqueue(0) for _ in range(count)]
    join = time.perf_counter() - began
    some = min(count // 4, 1_000)
    leaving = random.Random(SEED).sample(range(count // 4, count), some)
    began = time.perf_counter()
    for number in leaving:
        futures[number].cancel()
    cancel = time.perf_counter() - began
    granted = []
    for number in range(min(count // 4, 200)):
        began = time.perf_counter()
        permit.unused()
        permit = futures[number].result(30)
        granted.append(time.perf_counter() - began)
    queue.close()
    return {
        JOIN: join / count * 1e6,
        BYTES: weight(lambda: LocalQueue(interval=NEVER), _enqueue, count),
        CANCEL: cancel / some * 1e6,
        GRANT: statistics.median(granted) * 1e6,
    }


def _enqueue(queue: LocalQueue, count: int) -> object:
    return queue.enqueue(0).result(30), [queue.enqueue(0) for _ in range(count)]


def weight(make: Callable[[], Any], join: Callable[[Any, int], object], count: int) -> float:
    """Return the KiB that each waiter takes."""
    made = make()
    tracemalloc.start()
    joined = join(made, count)
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if hasattr(made, "close"):
        made.close()
    del joined
    return now / count / 1024


def bare_futures(count: int) -> Measured:
    """Make futures and put them in a deque, under a lock: the least that such a line can be."""
    lock = threading.Lock()

    def join(line: deque[Future[None]], count: int) -> None:
        for _ in range(count):
            future: Future[None] = Future()
            with lock:
                line.append(future)

    line: deque[Future[None]] = deque()
    began = time.perf_counter()
    join(line, count)
    each = (time.perf_counter() - began) / count
    return {JOIN: each * 1e6, BYTES: weight(deque, join, count)}


def tasks_in_line(count: int) -> Measured:
    """Have tasks wait for a limiter of asyncio's."""

    async def wait(trace: bool) -> float:
        acquire = SUBJECTS[TASKS].make(NEVER)
        await acquire(0)
        if trace:
            tracemalloc.start()
        began = time.perf_counter()
        tasks = [asyncio.create_task(acquire(0)) for _ in range(count)]
        await asyncio.sleep(0)
        each = (time.perf_counter() - began) / count
        if trace:
            each = tracemalloc.get_traced_memory()[0] / count
            tracemalloc.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return each

    return {JOIN: asyncio.run(wait(False)) * 1e6, BYTES: asyncio.run(wait(True)) / 1024}


# --- in a process of its own: with a thread each --------------------------------------------------


def threads_in_line(count: int, seconds: float) -> Measured:
    """Measure the memory of threads that wait for a queue, and the CPU time of doing nothing."""
    queue = LocalQueue(interval=NEVER)
    queue.acquire(0)
    measured = _weigh_threads(lambda: queue.acquire(0), count)
    while queue.snapshot().waiting < count:
        time.sleep(0.01)
    return measured | {IDLE: idle_ms(seconds)}


def idle_futures(count: int, seconds: float) -> Measured:
    """Measure the CPU time of futures that only wait."""
    queue = LocalQueue(interval=NEVER)
    queue.acquire(0)
    before = resident_bytes() if HAS_PSUTIL else 0
    futures = [queue.enqueue(0) for _ in range(count)]
    weighed = {BYTES: (resident_bytes() - before) / count / 1024} if HAS_PSUTIL else {}
    measured = weighed | {IDLE: idle_ms(seconds)}
    del futures
    queue.close()
    return measured


def bare_threads(count: int) -> Measured:
    """Measure the memory of threads that wait for a lock."""
    lock = threading.Lock()
    lock.acquire()
    return _weigh_threads(lock.acquire, count)


def _weigh_threads(wait: Callable[[], object], count: int) -> Measured:
    """Measure the memory of threads that wait: all of it for a half, Python's objects for the other."""
    half = count // 2
    before = resident_bytes() if HAS_PSUTIL else 0
    threads = _start(wait, half)
    weighed = {BYTES: (resident_bytes() - before) / half / 1024} if HAS_PSUTIL else {}
    tracemalloc.start()
    threads += _start(wait, count - half)
    time.sleep(0.2)
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return weighed | {TRACED: now / (count - half) / 1024}


def _start(wait: Callable[[], object], count: int) -> list[threading.Thread]:
    """Start threads, and give them the time to begin to wait."""
    threads = [threading.Thread(target=wait, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    return threads


def idle_ms(seconds: float) -> float:
    """Do nothing for a while, and return the CPU time of the process in milliseconds."""
    time.sleep(0.5)  # the start of the threads is over by then
    before = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - before) * 1e3


def idle_with_grants(name: str, count: int, seconds: float) -> Measured:
    """Measure the CPU time of many that wait while one or two permits are granted."""
    subject, window = SUBJECTS[name], seconds / 2 + 0.1
    if subject.is_async:
        return asyncio.run(_idle_tasks(name, count, window, seconds))
    acquire = subject.make(window)
    acquire(0)
    _start(lambda: acquire(0), count)
    return {IDLE: idle_ms(seconds)}


async def _idle_tasks(name: str, count: int, window: float, seconds: float) -> Measured:
    acquire = SUBJECTS[name].make(window)
    await acquire(0)
    tasks = [asyncio.create_task(acquire(0)) for _ in range(count)]
    await asyncio.sleep(0.5)
    before = time.process_time()
    await asyncio.sleep(seconds)
    used = time.process_time() - before
    for task in tasks:
        task.cancel()
    return {IDLE: used * 1e3}


# --- in a process of its own: timing out ----------------------------------------------------------


def timed_out_acquires(count: int) -> Measured:
    """Let many calls to a queue in memory time out at one instant."""
    with LocalQueue(interval=NEVER) as queue:
        queue.acquire(0)
        return _timed_out_of(queue, count)


def timed_out_of_a_ledger(kind: str, count: int) -> Measured:
    """Let many calls to a queue on a shared ledger time out at one instant."""
    make = SqliteQueue if kind == "SQLite" else RedisQueue
    with ledger(kind.lower()) as where, make(where, interval=60.0) as queue:
        return _timed_out_of(queue, count)  # a new account grants nothing for a window


def _timed_out_of(queue: GatewayQueue, count: int) -> Measured:
    def wait(timeout: float) -> None:
        try:
            queue.acquire(0, timeout)
        except AcquireTimeout:
            return
        raise AssertionError("there was a permit")

    return _times_out_after(wait, count)


def timed_out_locks(count: int) -> Measured:
    """Let many time out at one instant, each with a lock of its own."""

    def wait(timeout: float) -> None:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire(timeout=timeout)

    return _times_out_after(wait, count)


def _times_out_after(wait: Callable[[float], None], count: int) -> Measured:
    deadline = time.monotonic() + 0.3 + count / 2_000
    returned: list[float] = []

    def time_out() -> None:
        wait(max(0.0, deadline - time.monotonic()))
        returned.append(time.monotonic())

    threads = [threading.Thread(target=time_out) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    late = sorted(at - deadline for at in returned)
    return {
        LAST_RETURN: late[-1] * 1e3,
        "returns after, median (ms)": statistics.median(late) * 1e3,
    }
