"""Benchmark 5: whether shards that ask first get their permits first."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import NamedTuple

from benchmarks.figures import OURS, Result, Table, Target
from benchmarks.peers import SUBJECTS
from benchmarks.rounds import Case, Measured, Say, interleaved

NAME = "fairness"
TITLE = "Fairness"

OVERTAKEN, MOST = "overtaken (of 100)", "most by whom anyone was (shards)"
BEHIND = "longest behind one's place (windows)"
APART = 0.002  # s between two calls, so that their order is certain


class Size(NamedTuple):
    """How much is measured."""

    rounds: int
    waiting: int
    window: float


SIZES = {"whole": Size(3, 50, 0.02), "quick": Size(1, 20, 0.02), "tiny": Size(1, 4, 0.02)}


def run(size: Size, say: Say) -> Result:
    """Have threads ask one after the other, and compare that with the order of their permits."""
    cases = [
        Case(subject.name, subject.kind, order, (subject.name, size.waiting, size.window))
        for subject in SUBJECTS.values()
        if not subject.is_slow
    ]
    title = (
        f"{size.waiting} who ask {APART * 1e3:g} ms apart, a permit each {size.window * 1e3:g} ms"
    )
    table = Table(title, interleaved(cases, size.rounds, say))
    row = table.row(OURS)
    most = max(row.figures[name].high for name in (OVERTAKEN, MOST))
    return Result(NAME, TITLE, [table], [Target("anyone overtaken", most, 0)])


# --- in a process of its own ----------------------------------------------------------------------


def order(name: str, waiting: int, window: float) -> Measured:
    """Return how much the order of permits differs from that of asking."""
    if SUBJECTS[name].is_async:
        served = asyncio.run(_served_tasks(name, waiting, window))
    else:
        served = _served_threads(name, waiting, window)
    overtaken_by = [sum(later > place for later in served[:at]) for at, place in enumerate(served)]
    return {
        OVERTAKEN: sum(count > 0 for count in overtaken_by) / waiting * 100,
        MOST: float(max(overtaken_by)),
        BEHIND: float(max(at - place for at, place in enumerate(served))),
    }


def _served_threads(name: str, waiting: int, window: float) -> list[int]:
    """Return the numbers of the threads, which ask in this order, in the order of their permits."""
    acquire = SUBJECTS[name].make(window)
    acquire(0)
    served: list[int] = []

    def ask(place: int) -> None:
        acquire(0)
        served.append(place)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(waiting)]
    for thread in threads:
        thread.start()
        time.sleep(APART)
    for thread in threads:
        thread.join()
    return served


async def _served_tasks(name: str, waiting: int, window: float) -> list[int]:
    acquire = SUBJECTS[name].make(window)
    await acquire(0)
    served: list[int] = []

    async def ask(place: int) -> None:
        await acquire(0)
        served.append(place)

    tasks = []
    for place in range(waiting):
        tasks.append(asyncio.create_task(ask(place)))
        await asyncio.sleep(APART)
    await asyncio.gather(*tasks)
    return served
