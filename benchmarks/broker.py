"""Benchmark 7: what waiting clients cost the broker, and how late it answers when their permits are due.

The broker and the clients run in two processes. The floor is an asyncio server that never
answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import OURS, Result, Table, Tail, Target, percentile
from benchmarks.machine import HAS_PSUTIL, processor_seconds, resident_bytes
from benchmarks.rounds import Case, Measured, Say, interleaved
from benchmarks.shared import free_port

NAME = "broker"
TITLE = "Broker"

INTERVAL, MARGIN = 0.03, 0.02
NEVER = 60.0  # s: a window that does not end meanwhile; a shared ledger allows no longer one
AT_ONCE = 512  # connections that are opened at the same time
PATIENCE = 60.0  # s
BARE = "bare asyncio server"
EACH, CONNECT = "each (KiB)", "to connect all (s)"
IDLE = "CPU while idle (ms a second)"
LATE, P99, CLOSE = "late, median (ms)", "late, p99 (ms)", "too close (of 100)"


class Size(NamedTuple):
    """How much is measured.

    ``stalled`` is how many clients wait, for each measurement; ``idle`` is for how many seconds;
    ``answers`` is how many answers are timed.
    """

    rounds: int
    stalled: tuple[int, ...]
    idle: float
    answers: int


SIZES = {
    "whole": Size(3, (1_000, 5_000, 10_000), 1.0, 70),
    "quick": Size(1, (500,), 1.0, 20),
    "tiny": Size(1, (8,), 0.1, 3),
}


def run(size: Size, say: Say) -> Result:
    """Measure with more and more clients that wait."""
    if not HAS_PSUTIL:
        return Result(
            NAME, TITLE, skipped="psutil, which measures what a process uses, is not installed"
        )
    if not _can_serve():
        return Result(NAME, TITLE, skipped="this version has no `serve` command")
    allowed = allow_files(max(size.stalled) + 200)
    stalled = [count for count in size.stalled if count + 200 <= allowed]
    cases = []
    for count in stalled:
        cases += [
            Case(f"{BARE}, {count:,}", "floor", stall, (BARE, count, size.idle)),
            Case(f"{OURS}, {count:,}", "ours", stall, (OURS, count, size.idle)),
        ]
    table = Table("Connections that stall", interleaved(cases, size.rounds, say))
    if stalled != list(size.stalled):
        table.note = f"No more than {allowed:,} files may be open here (ulimit -n)."
    answers = Table(
        f"Answers among those that stall, one each {(INTERVAL + MARGIN) * 1e3:.0f} ms",
        interleaved(
            [Case(f"{OURS}, {n:,}", "ours", answer, (n, size.answers)) for n in stalled],
            size.rounds,
            say,
        ),
        note=f"interval {INTERVAL * 1e3:.0f} ms and margin {MARGIN * 1e3:.0f} ms; as the client sees it",
    )
    most = f"{OURS}, {stalled[-1]:,}"
    targets = [
        Target(f"{stalled[-1]:,} that stall: each (KiB)", table.value(most, EACH), 8),
        Target(f"{stalled[-1]:,} that stall: median late (ms)", answers.value(most, LATE), 2),
        Target(f"{stalled[-1]:,} that stall: too close (of 100)", answers.value(most, CLOSE), 0),
    ]
    return Result(NAME, TITLE, [table, answers], targets)


def _can_serve() -> bool:
    command = [sys.executable, "-m", "gateway_queue_sync", "serve", "--help"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def allow_files(wanted: int) -> int:
    """Raise the limit of open files for this process and its children; return the new limit."""
    try:
        import resource
    except ImportError:
        return 500  # Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(wanted, soft)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


# --- in a process of its own ----------------------------------------------------------------------


def stall(subject: str, count: int, idle: float) -> Measured:
    """Measure the memory of connections that wait, and the CPU time while they only wait."""
    allow_files(count + 200)
    with _server(subject, NEVER, 0.25) as (port, pid):
        before = resident_bytes(pid)
        with _clients(port, count) as clients:
            clients.send("connect")
            took = clients.recv()
            if subject == OURS:
                _until_all_are_in_line(port, count)
            time.sleep(0.5)  # the start of the clients is over by then
            each = (resident_bytes(pid) - before) / count / 1024
            used = processor_seconds(pid)
            time.sleep(idle)
            used = processor_seconds(pid) - used
    return {EACH: each, CONNECT: took, IDLE: used / idle * 1e3}


def _until_all_are_in_line(port: int, count: int) -> None:
    """Wait until all clients are in a line, which happens after they have connected."""
    counted = re.compile(
        rb"^gateway_queue_(?:waiting|granted_total)(?:{.*})? ([0-9]+)", re.MULTILINE
    )
    give_up = time.monotonic() + PATIENCE
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
            came = sum(int(number) for number in counted.findall(answer.read()))
        if came >= count:
            return
        if time.monotonic() > give_up:
            raise RuntimeError(f"of {count} clients, only {came} are in line")
        time.sleep(count / 10_000)  # with more clients, an answer to this takes the broker longer


def _until_the_margin_is_normal(port: int) -> None:
    """Wait until the window is the configured one.

    While thousands connect, permits can be older than this small margin when they reach the broker: full
    garbage collections take longer, and the processors are busy. Then the broker raises its margin for
    some seconds, so each permit is due that much later.
    """
    give_up = time.monotonic() + PATIENCE
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/recent.json") as answer:
            window = json.load(answer)["window"]
        if round(window, 6) == round(INTERVAL + MARGIN, 6):
            return
        if time.monotonic() > give_up:
            raise RuntimeError(f"the window is still {window} s")
        time.sleep(0.5)


def answer(count: int, answers: int) -> Measured:
    """Time answers while so many clients wait."""
    allow_files(count + 200)
    with _server(OURS, INTERVAL, MARGIN) as (port, _), _clients(port, count) as clients:
        clients.send("connect")
        clients.recv()
        _until_all_are_in_line(port, count)
        _until_the_margin_is_normal(port)
        clients.send(answers)
        answered = clients.recv()
    gaps = [later - earlier for earlier, later in itertools.pairwise(sorted(answered))]
    late = sorted(gap - INTERVAL - MARGIN for gap in gaps)
    return {
        LATE: percentile(late, 50) * 1e3,
        P99: Tail([one * 1e3 for one in late], 99),
        CLOSE: sum(gap < INTERVAL for gap in gaps) / len(gaps) * 100,
    }


@contextlib.contextmanager
def _server(subject: str, interval: float, margin: float) -> Iterator[tuple[int, int]]:
    """Run a server in the block; yield its port and the id of its process."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        if subject == BARE:
            command = [sys.executable, "-m", "benchmarks.broker", str(port)]
        else:
            command = [
                *(sys.executable, "-m", "gateway_queue_sync", "serve"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--interval", str(interval), "--margin", str(margin)),
                *("--state", str(Path(folder) / "state.sqlite3")),
            ]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment()
        )
        try:
            asyncio.run(_until_it_listens(process, port))
            yield port, process.pid
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    """Return this process's environment without the variables that a broker reads."""
    settings = ("HOST", "PORT", "DISCORD_TOKEN", "CONCURRENCY")
    return {name: value for name, value in os.environ.items() if name not in settings}


async def _until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the server does not listen on port {port}") from None
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return


@contextlib.contextmanager
def _clients(port: int, count: int) -> Iterator[Any]:
    """Run a process of clients in the block; yield the pipe for orders to it."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=be_clients, args=(there, port, count))
    process.start()
    try:
        yield here
    finally:
        process.kill()
        process.join()


def be_clients(orders: Any, port: int, count: int) -> None:
    """Open connections that ask for a permit and wait for it; then report when answers come."""
    asyncio.run(_be_clients(orders, port, count))


async def _be_clients(orders: Any, port: int, count: int) -> None:
    answered: asyncio.Queue[float] = asyncio.Queue()
    turns = asyncio.Semaphore(AT_ONCE)
    loop = asyncio.get_running_loop()

    class Client(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport
            self.ask()

        def ask(self) -> None:
            self.transport.write(b"GET /?shard=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")

        def data_received(self, data: bytes) -> None:
            if data.startswith(b"HTTP/1.1 200"):
                answered.put_nowait(time.monotonic())
                self.ask()  # so that as many wait as before

    async def connect() -> None:
        async with turns:
            await loop.create_connection(Client, "127.0.0.1", port)

    orders.recv()
    began = time.monotonic()
    await asyncio.gather(*(connect() for _ in range(count)))
    orders.send(time.monotonic() - began)
    wanted = await asyncio.to_thread(orders.recv)
    while not answered.empty():
        answered.get_nowait()  # these came before all clients waited
    async with asyncio.timeout(PATIENCE):
        orders.send([await answered.get() for _ in range(wanted)])


class _Silent(asyncio.Protocol):
    """A server that reads a request and never answers."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport


async def _be_silent(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Silent, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_be_silent(int(sys.argv[1])))
