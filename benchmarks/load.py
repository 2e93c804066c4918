"""A broker under load: its permits while many wait and many read, and its memory in storms.

As a command: ``python -m benchmarks.load [--waiting N] [--readers N] [--storm N] [--seconds S]``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

BUCKETS, INTERVAL, MARGIN = 16, 1.2, 0.05
PATIENCE = 120.0  # s
READ = ("/status.json", "/metrics", "/recent.json", "/healthz")


class Served:
    """A broker in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "gateway_queue_sync", "serve", "--port", "0"]
            state = ("--state", str(folder / "state"))
            self.process = subprocess.Popen([*command, *state, *arguments], stderr=log)
        give_up = time.monotonic() + PATIENCE
        while not (found := re.search(r"serving at http://[^:]+:(\d+)", self.log.read_text())):
            assert time.monotonic() < give_up, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        self.port = int(found[1])
        self.memory = psutil.Process(self.process.pid).memory_info

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[Served]:
    """Run a broker meanwhile."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Served(Path(folder), *arguments)) as broker,
    ):
        yield broker


def connect(port: int, number: int) -> socket.socket:
    """Return a connection; 20,000 from one address are more than a machine has ports for."""
    one = socket.socket()
    one.bind((f"127.9.0.{1 + number % 8}", 0))
    one.settimeout(PATIENCE)
    one.connect(("127.0.0.1", port))
    return one


def ask(one: socket.socket, target: str) -> None:
    """Send a request."""
    one.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


def read(one: socket.socket, target: str) -> int:
    """Ask and return the status of the whole answer."""
    ask(one, target)
    data = b""
    while b"\r\n\r\n" not in data:
        data += one.recv(1 << 20)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
    left = length - len(body)
    while left > 0:
        left -= len(one.recv(min(left, 1 << 20)))
    return int(head[9:12])


class Counted(NamedTuple):
    """What came in a time under load."""

    granted: int
    share: float  # of the permits that were due, from the first that came to the last
    read: int
    slowest: float  # s, of the readers' answers
    memory: int  # bytes for each that waits


def permits(waiting: int, readers: int, seconds: float, pause: float = 0.0) -> Counted:
    """Count the permits that come while so many clients wait, and so many read all the time."""
    timing = ("--interval", str(INTERVAL), "--margin", str(MARGIN))
    with served("--max-concurrency", str(BUCKETS), *timing) as broker:
        before = broker.memory().rss
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            for number in range(waiting):
                one = stack.enter_context(connect(broker.port, number))
                ask(one, f"/?shard={number}")
                selector.register(one, selectors.EVENT_READ)
            with connect(broker.port, 0) as probe:
                while read(probe, "/healthz") != 200:
                    time.sleep(0.1)
            memory = (broker.memory().rss - before) // max(1, waiting)
            over, times = threading.Event(), []

            def reader(number: int) -> None:
                with connect(broker.port, number) as one:
                    while not over.is_set():
                        since = time.monotonic()
                        assert read(one, READ[len(times) % len(READ)]) == 200
                        times.append(time.monotonic() - since)
                        time.sleep(pause)

            threads = [threading.Thread(target=reader, args=(n,)) for n in range(readers)]
            for thread in threads:
                thread.start()
            time.sleep(2 * (INTERVAL + MARGIN))
            _times(selector, 0.0)
            granted = _times(selector, seconds)
            over.set()
            for thread in threads:
                thread.join()
    return Counted(len(granted), _share(granted), len(times), max(times, default=0.0), memory)


def _share(granted: list[float]) -> float:
    """Return how many of the permits that were due came, from the second burst to the last."""
    window = INTERVAL + MARGIN
    begins = [b for a, b in itertools.pairwise(granted) if b - a > window / 2]
    if len(begins) < 2:
        return 0.0  # they came as slowly as that
    came = sum(begins[0] <= at < begins[-1] for at in granted)
    return came / ((begins[-1] - begins[0]) * BUCKETS / window)


def _times(selector: selectors.BaseSelector, seconds: float) -> list[float]:
    """Return when clients got their permits, within so many seconds or before."""
    times, give_up = [], time.monotonic() + seconds
    while True:
        ready = selector.select(max(0.0, give_up - time.monotonic()))
        for key, _ in ready:
            assert key.fileobj.recv(15) == b"HTTP/1.1 200 OK"  # type: ignore[union-attr]
            selector.unregister(key.fileobj)
            times.append(time.monotonic())
        if time.monotonic() >= give_up and (not ready or seconds):
            return times


def storm(rounds: int, clients: int) -> list[int]:
    """Connect, ask and disconnect so many clients in each round; return the memory after each."""
    memory = []
    with served("--interval", "60", "--margin", "0.05") as broker:
        for number in range(rounds):
            many = [connect(broker.port, client) for client in range(clients)]
            for client, one in enumerate(many):
                if client % 4 == 0:
                    one.sendall(b"GET /nonsense \xff" + bytes([client % 256]) * 50 + b"\r\n\r\n")
                elif client % 4 == 1:
                    ask(one, f"/{number}-{client}?shard={client}&ticket={number}-{client}")
                elif client % 4 == 2:
                    ask(one, f"/?shard={client % 16}")
            for one in many:
                one.close()
            with connect(broker.port, 0) as probe:
                # Clients that sent nonsense stay connected for up to 10 s.
                while _connections(probe) > clients // 3:
                    time.sleep(0.1)
            memory.append(broker.memory().rss)
    return memory


def _connections(one: socket.socket) -> int:
    ask(one, "/metrics")
    data = b""
    while not (
        found := re.search(rb"gateway_queue_connections (\d+)\n(?s:.*)_seconds [0-9.]+\n$", data)
    ):
        data += one.recv(1 << 16)
    return int(found[1])


def main() -> None:
    """Print what was measured."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--waiting", type=int, default=10_000)
    options.add_argument("--readers", type=int, default=20)
    options.add_argument("--seconds", type=float, default=20.0)
    options.add_argument("--pause", type=float, default=0.0)
    options.add_argument("--storm", type=int, default=0)
    given = options.parse_args()
    if given.storm:
        for number, rss in enumerate(storm(10, given.storm)):
            print(f"after {given.storm * (number + 1):,} clients: {rss / 1e6:.1f} MB", flush=True)
        return
    counted = permits(given.waiting, given.readers, given.seconds, given.pause)
    print(counted)
    print(f"{counted.share:.1%} of the permits that were due")


if __name__ == "__main__":
    main()
