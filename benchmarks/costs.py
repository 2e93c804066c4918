"""Benchmark 9: processor time of huge plans and of slow requests; a permit after many have died."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.figures import OURS, Result, Table, Target
from benchmarks.rounds import Case, Measured, Say, interleaved
from benchmarks.shared import ledger, redis_server
from gateway_queue_sync import SqliteQueue, request_parser, serve
from gateway_queue_sync.broker.positions import HeldPositions, Position
from gateway_queue_sync.clock import SystemClock
from gateway_queue_sync.ledgers.shared.messages import (
    OPEN,
    Introduction,
    Limit,
    Line,
    Reply,
    Request,
    Waiter,
)
from gateway_queue_sync.ledgers.shared.redis import RedisBackend
from gateway_queue_sync.ledgers.shared.sqlite import SqliteBackend

NAME = "costs"
TITLE = "Costs"

S = 1_000_000
BUCKETS = 16
CPU = "CPU (s)"
NOBODY, OVER, SILENT = "nobody dead (ms)", "leases over (ms)", "silent (ms)"


class Size(NamedTuple):
    """How much is measured.

    ``shards`` are planned; ``dead`` processes have died; ``times`` is how often a client acts.
    """

    rounds: int
    shards: int
    dead: int
    times: int


SIZES = {
    "whole": Size(3, 1_000_000, 20_000, 2_000),
    "quick": Size(1, 100_000, 500, 500),
    "tiny": Size(1, 1_000, 20, 20),
}


def run(size: Size, say: Say) -> Result:
    """Measure processor time, and how long the first permit takes after processes have died."""
    shards, times = size.shards, size.times
    one_bucket = f"plan of {shards:,} shards"
    cases = [
        Case(one_bucket, "ours", plan, (shards, 1)),
        Case(f"{one_bucket}, 16 buckets", "ours", plan, (shards, 16)),
        Case(f"a body in {times:,} pieces", "ours", read_body, (times,)),
        Case(f"{times // 50 + 1:,} heads of blanks", "ours", read_heads, (times // 50 + 1,)),
        Case(f"{2 * times:,} clients that return", "ours", hold_positions, (2 * times,)),
    ]
    costs = Table("Processor time", interleaved(cases, size.rounds, say))
    kinds = ["SQLite"] + ["Redis"] * (redis_server() is not None)
    dead = Table(
        f"Introduction and first permit, after {size.dead:,} processes have died",
        interleaved(
            [Case(f"{OURS}, {kind}", "ours", first_permit, (kind, size.dead)) for kind in kinds],
            size.rounds,
            say,
        ),
    )
    targets = [
        Target(f"{one_bucket}: CPU (s)", costs.value(one_bucket, CPU), 5),
        *(
            Target(f"{kind}, {size.dead:,} dead: ms to a permit", dead.value(row, figure), 50)
            for kind in kinds
            for row in [f"{OURS}, {kind}"]
            for figure in (OVER, SILENT)
        ),
    ]
    return Result(NAME, TITLE, [costs, dead], targets)


# --- in a process of its own ----------------------------------------------------------------------


def spent(function: Callable[[], object]) -> Measured:
    """Return the processor time that a call takes in this process."""
    before = time.process_time()
    function()
    return {CPU: time.process_time() - before}


def plan(shards: int, buckets: int) -> Measured:
    """Plan the start of a huge bot by the command."""
    options = ["--shards", str(shards), "--max-concurrency", str(buckets)]
    command = [sys.executable, "-m", "gateway_queue_sync", "plan", *options]
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # 1: the limit does not last
    after = os.times()
    return {CPU: sum(after[2:4]) - sum(before[2:4])}


def read_body(pieces: int) -> Measured:
    """Send a large body to a broker, the end of it byte by byte."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SqliteQueue(Path(folder) / "queue.sqlite3") as queue,
        serve(queue, port=0) as broker,
        socket.create_connection(("127.0.0.1", broker.port)) as client,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(
            b"POST /ledger HTTP/1.1\r\nHost: 127.0.0.1\r\nGateway-Queue: 1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        )
        client.sendall(b"x" * (1_000_000 - pieces))

        def send() -> None:
            for _ in range(pieces):
                client.send(b"x")
            if not client.recv(20).startswith(b"HTTP/1.1 400 "):
                raise RuntimeError("the broker did not refuse a body of x")

        return spent(send)


def read_heads(times: int) -> Measured:
    """Read heads with long runs of blanks."""
    head = b"GET / HTTP/1.1\r\nX: %sx%s\r\n\r\n" % (b" \t" * 3_500, b" " * 500)

    def read() -> None:
        for _ in range(times):
            request_parser.parse_head(head)

    return spent(read)


def hold_positions(count: int) -> Measured:
    """Store positions that all have the same key, and claim them again."""
    arrivals = random.Random(1).sample(range(count), count)
    held = HeldPositions()

    def come_back() -> None:
        for arrived_us in arrivals:
            held.store("key", Position(arrived_us, 0), 0)
        for _ in range(count):
            held.claim("key", 1)

    return spent(come_back)


class _SetClock(SystemClock):
    """A clock that shows the time to which it is set."""

    now = 1_000 * S

    def now_us(self) -> int:
        return self.now

    def wall_us(self) -> int:
        return self.now


class _Process:
    """A process that introduces itself to a ledger, and waits in a line."""

    def __init__(
        self, backend: RedisBackend | SqliteBackend, clock: _SetClock, number: int
    ) -> None:
        self.backend, self.clock, self.number = backend, clock, number
        self.sent = 0

    def _ask(self, **what: object) -> Reply:
        self.sent += 1
        request = Request(
            attempt=self.sent, sent_us=self.clock.now, session=f"{self.number:016x}",
            number=self.sent, interval_us=5 * S, margin_us=S // 4, period_us=86_400 * S,
            lease_us=5 * S, reserve=0, reread_us=0, can_read=0, look=0, layout=1,
        )._replace(**what)  # fmt: skip
        return self.backend.ask(request)

    def take(self) -> Reply:
        """Ask for a permit for the first time."""
        now_us, bucket = self.clock.now, self.number % BUCKETS
        limit = Limit(OPEN, 1 << 40, 1 << 40, 0, BUCKETS, now_us, now_us)
        self._ask(
            introduction=Introduction(
                replaces="", bot="", limit=limit, granted=0, period=0, layout=0, seen=None
            )
        )
        waiters = (Waiter(1, bucket, now_us, now_us), Waiter(2, bucket, now_us, now_us))
        return self._ask(lines=(Line(bucket, 3, waiters),))


def first_permit(kind: str, dead: int) -> Measured:
    """Time the first permit of a new process, three times.

    First no other process has died. Then many have, and their leases are over. Last, these count as
    silent.
    """
    clock = _SetClock()
    with ledger(kind.lower()) as where:
        backend = (SqliteBackend if kind == "SQLite" else RedisBackend)(where, "default", clock)

        def timed(number: int) -> float:
            began = time.perf_counter()
            if not _Process(backend, clock, number).take().permits:
                raise RuntimeError("nothing was granted")
            return (time.perf_counter() - began) * 1e3

        try:
            _Process(backend, clock, 1 << 60).take()
            clock.now += 6 * S
            nobody = timed(1 << 61)
            for number in range(1, dead + 1):
                _Process(backend, clock, number).take()
                clock.now += 50 * S // dead  # within a minute: later ones would remove the first
            clock.now += 6 * S
            over = timed(1 << 62)
            clock.now += 61 * S
            return {NOBODY: nobody, OVER: over, SILENT: timed(3 << 60)}
        finally:
            backend.close()
