"""Benchmark 8: which functions of the package one ``acquire`` runs in its thread, and in how many files.

This measures how much code a reader must follow, not time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import gateway_queue_sync
from benchmarks.figures import OURS, Result, Table, Target
from benchmarks.rounds import Case, Measured, Say, interleaved
from gateway_queue_sync import GatewayQueue, LargeBotQueue, SessionStartLimit, SqliteQueue

NAME = "path"
TITLE = "Path"

FUNCTIONS, FILES, CALLS = "functions", "files", "calls"
PACKAGE = str(Path(gateway_queue_sync.__file__).parent)
WINDOW = {"interval": 0.05, "margin": 0.02}


class Size(NamedTuple):
    """The counts are the same in each round, so there is one."""

    rounds: int


SIZES = {"whole": Size(1), "quick": Size(1), "tiny": Size(1)}


def run(size: Size, say: Say) -> Result:
    """Count for a free and a waiting call, with and without an observer, in memory and on SQLite."""
    cases = [
        Case(f"{OURS}: {kind}, {call}{observer}", "ours", count, (kind, call, bool(observer)))
        for kind in ("memory", "sqlite")
        for call in ("free", "waiting")
        for observer in ("", ", observed")
    ]
    title = "Functions of the package that one acquire runs in the calling thread"
    table = Table(title, interleaved(cases, size.rounds, say))
    waiting = f"{OURS}: memory, waiting"
    return Result(
        NAME,
        TITLE,
        [table],
        [
            Target("memory, waiting: files", table.value(waiting, FILES), 5),
            Target("memory, waiting: functions", table.value(waiting, FUNCTIONS), 30),
        ],
    )


# --- in a process of its own ----------------------------------------------------------------------


def count(kind: str, call: str, observed: bool) -> Measured:
    """Count what one call runs."""
    observer: Callable[[Any], object] | None = id if observed else None
    limit = SessionStartLimit(1000, 1000, 0.0, 1)
    with tempfile.TemporaryDirectory() as folder:
        queue: GatewayQueue
        if kind == "memory":
            queue = LargeBotQueue(limit, observer=observer, **WINDOW)
        else:
            queue = SqliteQueue(Path(folder) / "q.sqlite3", limit, observer=observer, **WINDOW)
            queue.acquire(0)  # a new file grants nothing for one window
        with queue:
            if call == "waiting":
                queue.acquire(0)
            elif kind == "sqlite":
                queue.acquire(0)
                queue.acquire(0).unused()
            return profiled(queue)


def profiled(queue: GatewayQueue) -> Measured:
    """Profile one ``acquire``."""
    seen: set[tuple[str, str]] = set()
    calls = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            calls += 1
            seen.add((file, frame.f_code.co_qualname))

    sys.setprofile(profile)
    try:
        queue.acquire(0)
    finally:
        sys.setprofile(None)
    return {FUNCTIONS: len(seen), FILES: len({file for file, _ in seen}), CALLS: calls}
