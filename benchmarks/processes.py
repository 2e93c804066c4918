"""Processes with many callers each that share a ledger, for ``benchmarks.beside``."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.checkout import USED, begin, finish
from benchmarks.figures import Tail, percentile
from benchmarks.rounds import Case, Measured
from benchmarks.shared import count_trips, ledger, redis_server
from gateway_queue_sync import (
    HttpQueue,
    QueueClosed,
    RedisQueue,
    SessionStartLimit,
    SqliteQueue,
    serve,
)

INTERVAL, MARGIN = 0.03, 0.05  # s: a thousand threads on two cores begin within it
WINDOW = INTERVAL + MARGIN
LEASE = 60.0  # s: no heartbeat comes meanwhile
FLEETS = ((8, 8, 1), (32, 32, 1), (8, 128, 16))  # processes, callers in each, buckets


def cases(seconds: float) -> list[Case]:
    """Return the cases of all fleets on all ledgers, each measured for so many seconds."""
    kinds = {"SQLite": "sqlite", "Redis": "redis", "HTTP": "http"}
    if redis_server() is None:
        del kinds["Redis"]
    return [
        Case(
            f"{processes} × {callers} callers, {buckets} bucket{'s' * (buckets > 1)}, {name}",
            "ours",
            measure,
            (kind, processes, callers, buckets, seconds),
        )
        for processes, callers, buckets in FLEETS
        for name, kind in kinds.items()
    ]


def measure(kind: str, processes: int, callers: int, buckets: int, seconds: float) -> Measured:
    """Let the callers of some processes ask for permits all the time, and judge when these came.

    A permit is due a window after the one before in its bucket; how much later it came is how late it
    is. If a process has raised its margin because it was answered late, the windows are longer, and all
    permits count as late: then the machine is too busy for these figures.
    """
    with _account(kind) as where, tempfile.TemporaryDirectory() as ready:
        arguments = (kind, where, ready, processes, callers, buckets, seconds)
        started = [begin(USED, work, *arguments) for _ in range(processes)]
        works = [finish(one, USED) for one in started]
    returned: dict[int, list[float]] = defaultdict(list)
    for bucket, at in itertools.chain.from_iterable(one["returned"] for one in works):
        returned[bucket].append(at)
    late, windows = [], 0
    for times in returned.values():
        windows += len(times)
        late += [
            (after - before - WINDOW) * 1e3 for before, after in itertools.pairwise(sorted(times))
        ]
    late.sort()
    return {
        "late, median (ms)": percentile(late, 50),
        "late, p99 (ms)": Tail(late, 99),
        "too close (of 100)": sum(one < -MARGIN * 1e3 for one in late) / len(late) * 100,
        "trips a window": sum(one["trips"] for one in works) / (windows / buckets),
        "CPU a permit (ms)": sum(one["cpu"] for one in works) / windows * 1e3,
        "margins raised": sum(one["raised"] for one in works),
        "permits": windows,
    }


def work(
    kind: str,
    where: str,
    ready: str,
    processes: int,
    callers: int,
    buckets: int,
    seconds: float,
) -> dict[str, Any]:
    """Be one of the processes: begin when all are ready, and end after so many seconds."""
    limit, trips = SessionStartLimit(10**6, 10**6, 0.0, buckets), itertools.count()
    make = {"sqlite": SqliteQueue, "redis": RedisQueue, "http": HttpQueue}[kind]
    queue = make(where, limit, interval=INTERVAL, margin=MARGIN, lease=LEASE)
    count_trips(queue, trips)
    returned: list[tuple[int, float]] = []
    raised = itertools.count()
    log = logging.getLogger("gateway_queue_sync")
    log.addFilter(lambda record: "is raised" in record.getMessage() and next(raised) < 0)

    def ask(shard_id: int) -> None:
        with contextlib.suppress(QueueClosed):
            while True:
                queue.acquire(shard_id)
                returned.append((shard_id % buckets, time.monotonic()))

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(callers)]
    (Path(ready) / str(os.getpid())).touch()
    while sum(1 for _ in Path(ready).iterdir()) < processes:
        time.sleep(0.01)
    before = time.process_time()
    for asker in askers:
        asker.start()
    time.sleep(seconds)
    asked, cpu = next(trips), time.process_time() - before
    queue.close()
    for asker in askers:
        asker.join()
    return {"returned": returned, "trips": asked, "cpu": cpu, "raised": next(raised)}


@contextlib.contextmanager
def _account(kind: str) -> Iterator[str]:
    """Yield where an account is stored in the block. For HTTP, that is a broker in another process."""
    if kind != "http":
        with ledger(kind) as where:
            yield where
        return
    with ledger("sqlite") as file:
        broker = begin(USED, serve_until_told, file)
        assert broker.stdout is not None
        try:
            yield broker.stdout.readline().strip()
        finally:
            finish(broker, USED)


def serve_until_told(file: str) -> None:
    """Be a broker, print its URL, and end at the end of the input."""
    own = SqliteQueue(file, interval=INTERVAL, margin=MARGIN, lease=LEASE)
    with own, serve(own, port=0) as broker:
        print(broker.url, flush=True)
        sys.stdin.read()
