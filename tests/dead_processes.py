"""How long the first permit takes in a ledger that thousands of dead processes have left things in.

``python -m tests.dead_processes --count 20000`` measures it on SQLite and Redis: after the leases of the
dead are over, and after they count as silent, when each request removes some of them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __package__:
    sys.path.insert(0, str(Path(__file__).parent))

import redis_servers

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

S = 1_000_000
BUCKETS = 16


class SetClock(SystemClock):
    """A clock that tells what the benchmark says."""

    now = 1_000 * S

    def now_us(self) -> int:
        return self.now

    def wall_us(self) -> int:
        return self.now


class Process:
    """A process that says what is needed to stand in a line."""

    def __init__(self, backend: RedisBackend | SqliteBackend, clock: SetClock, number: int) -> None:
        self.backend, self.clock, self.number = backend, clock, number
        self.said = 0

    def say(self, **what: object) -> Reply:
        self.said += 1
        request = Request(
            attempt=self.said, sent_us=self.clock.now, session=f"{self.number:016x}",
            number=self.said, interval_us=5 * S, margin_us=S // 4, period_us=86_400 * S,
            lease_us=5 * S, reserve=0, reread_us=0, can_read=0, look=0, layout=1,
        )._replace(**what)  # fmt: skip
        return self.backend.ask(request)

    def introduce(self) -> Reply:
        limit = Limit(OPEN, 1 << 40, 1 << 40, 0, BUCKETS, self.clock.now, self.clock.now)
        return self.say(introduction=Introduction("", "", 0, limit, 0, 0, 0, None))

    def ask(self) -> Reply:
        bucket, now_us = self.number % BUCKETS, self.clock.now
        waiters = (Waiter(1, bucket, now_us, now_us), Waiter(2, bucket, now_us, now_us))
        return self.say(lines=(Line(bucket, 3, waiters),))


@contextlib.contextmanager
def backends(folder: Path, clock: SetClock) -> Iterator[dict[str, RedisBackend | SqliteBackend]]:
    """Provide a ledger of each kind."""
    found: dict[str, RedisBackend | SqliteBackend] = {
        "SQLite": SqliteBackend(folder / "q.sqlite3", "default", clock)
    }
    server = None
    if redis_servers.BINARY is not None:
        server = redis_servers.RedisServer(folder)
        found["Redis"] = RedisBackend(server.url, "default", clock)
    try:
        yield found
    finally:
        for backend in found.values():
            backend.close()
        if server is not None:
            server.stop()


def seconds(backend: RedisBackend | SqliteBackend, clock: SetClock, number: int) -> float:
    """Return how long a new process takes for its introduction and its permit."""
    process = Process(backend, clock, number)
    began = time.perf_counter()
    process.introduce()
    granted = process.ask().permits
    took = time.perf_counter() - began
    assert granted, "nothing was granted"
    return took


def measure(count: int) -> dict[str, list[float]]:
    """Return the seconds to the first permit by ledger: at first, after 6 s and after 61 s."""
    clock, found = SetClock(), {}
    with tempfile.TemporaryDirectory() as name, backends(Path(name), clock) as ledgers:
        for kind, backend in ledgers.items():
            first = Process(backend, clock, 1 << 60)
            first.introduce()
            clock.now += 6 * S
            took = [seconds(backend, clock, 1 << 61)]
            for number in range(1, count + 1):
                dead = Process(backend, clock, number)
                dead.introduce(), dead.ask()
                clock.now += (
                    50 * S // count
                )  # all die within a minute: else others had removed them
            clock.now += 6 * S
            took.append(seconds(backend, clock, 1 << 62))
            clock.now += 61 * S
            took.append(seconds(backend, clock, 3 << 60))
            found[kind] = took
    return found


def main() -> None:
    """Print the milliseconds to the first permit."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    count = parser.parse_args().count
    print(f"{'ms to the first permit':24}{'nobody dead':>14}{'leases over':>14}{'silent':>14}")
    for kind, took in measure(count).items():
        print(f"{kind:24}" + "".join(f"{1000 * one:14.2f}" for one in took))


if __name__ == "__main__":
    main()
