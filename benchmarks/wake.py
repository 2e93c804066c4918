"""Benchmark 1: how late ``acquire`` returns once the permit is due, and whether it returns too early.

As many threads as there are permits block on one bucket. What counts is when their calls return: the
time between two returns, minus the window, is how late the second was. If it is negative, the second
was too early.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.figures import OURS, Result, Table, Tail, Target, percentile
from benchmarks.peers import SUBJECTS
from benchmarks.rounds import Case, Measured, Say, interleaved

NAME = "wake"
TITLE = "Wake precision"

FLOOR = "bare Condition.wait"
LATE, P99 = "late, median (ms)", "late, p99 (ms)"
SHORT, SHORTEST = "short (of 100)", "too short by (ms)"
CLOCK = 2e-6
"""Seconds: the greatest error of a difference of two times in microseconds."""

NOT_MEASURED = (
    "From other measurements on a machine of this type: twilight's InMemoryQueue "
    "(Rust) wakes 1.3 ms late, its timer has steps of 1 ms; Go's x/time/rate wakes 0.27 ms late, with "
    "30 % of the spacings short."
)


class Size(NamedTuple):
    """How much is measured: permits in each round, of us and the floor, and of the peers."""

    window: float
    rounds: int
    ours: int
    peers: int
    peers_burning: int


SIZES = {
    "whole": Size(0.05, 3, 67, 67, 5),
    "quick": Size(0.05, 1, 25, 10, 5),
    "tiny": Size(0.02, 1, 3, 3, 2),
}


def run(size: Size, say: Say) -> Result:
    """Measure alone in the process, and beside threads that keep the processor busy."""
    result = Result(NAME, TITLE)
    for burners in (0, 1, 2):
        beside = f"beside {burners} burning thread{'s' * (burners > 1)}" if burners else "alone"
        say(beside)
        cases = [
            Case(FLOOR, "floor", condition_wait, (size.window, size.ours, burners)),
            Case(OURS, "ours", blocked, (OURS, size.window, size.ours, burners)),
        ]
        if burners < 2:
            cases += _others(size, burners)
        table = Table(
            f"A permit each {size.window * 1e3:.0f} ms, {beside}",
            interleaved(cases, size.rounds, say),
            compared=LATE,
            note="" if burners else NOT_MEASURED,
        )
        result.tables.append(table)
        result.targets += _targets(table, beside, alone=not burners)
    return result


def _others(size: Size, burners: int) -> Iterator[Case]:
    for peer in SUBJECTS.values():
        grants = size.peers_burning if burners else size.peers
        if peer.kind != "ours":
            yield Case(peer.name, peer.kind, blocked, (peer.name, size.window, grants, burners))


def _targets(table: Table, beside: str, *, alone: bool) -> list[Target]:
    late = table.value(OURS, LATE)
    short = table.row(OURS).figures[SHORT].high
    targets = [Target(f"{beside}: spacings too short (of 100), in any round", short, 0)]
    if alone:
        safe = [
            row.figures[LATE].value
            for row in table.rows
            if row.kind == "peer" and row.figures and row.figures[SHORT].high == 0
        ]
        targets += [
            Target("alone: median late / the floor's", late / table.value(FLOOR, LATE), 0.75),
            Target(
                "alone: p99 late (ms), best peer's",
                table.value(OURS, P99),
                table.best_of("peer", P99),
            ),
            Target(
                "alone: the best safe peer's median late / ours",
                min(safe, default=float("nan")) / late,
                3,
                at_least=True,
            ),
        ]
    return targets


# --- in a process of its own ----------------------------------------------------------------------


def blocked(name: str, window: float, grants: int, burners: int) -> Measured:
    """Block a thread for each permit, and judge when their calls return."""
    subject = SUBJECTS[name]
    if subject.is_async:
        return judge(asyncio.run(_returns_of_tasks(name, window, grants, burners)), window)
    acquire = subject.make(window)
    returned: list[float] = []

    def ask() -> None:
        acquire(0)
        returned.append(time.monotonic())

    ask()
    threads = [threading.Thread(target=ask) for _ in range(grants)]
    for thread in threads:
        thread.start()
    with burning(burners):  # only now, because it makes starting a thread take longer than a window
        for thread in threads:
            thread.join()
    return judge(returned, window)


async def _returns_of_tasks(name: str, window: float, grants: int, burners: int) -> list[float]:
    acquire = SUBJECTS[name].make(window)
    returned: list[float] = []

    async def ask() -> None:
        await acquire(0)
        returned.append(time.monotonic())

    await ask()
    tasks = [asyncio.create_task(ask()) for _ in range(grants)]
    with burning(burners):
        await asyncio.gather(*tasks)
    return returned


def condition_wait(window: float, grants: int, burners: int) -> Measured:
    """Wait on a condition again and again: the floor for limiters that wait in the same way."""
    condition = threading.Condition()
    with burning(burners), condition:
        returned = [time.monotonic()]
        for _ in range(grants):
            due = returned[-1] + window
            while (left := due - time.monotonic()) > 0:
                condition.wait(left)
            returned.append(time.monotonic())
    return judge(returned, window)


@contextlib.contextmanager
def burning(threads: int) -> Iterator[None]:
    """Keep the processor busy in the block with threads of pure Python, as a busy bot does."""
    stop = False

    def burn() -> None:
        number = 0
        while not stop:
            for _ in range(100):
                number += 1

    burners = [threading.Thread(target=burn) for _ in range(threads)]
    for burner in burners:
        burner.start()
    try:
        yield
    finally:
        stop = True
        for burner in burners:
            burner.join()


def judge(returned: list[float], window: float) -> Measured:
    """Return how late calls were that returned at these times, in seconds."""
    late = sorted(
        later - earlier - window for earlier, later in itertools.pairwise(sorted(returned))
    )
    short = [-one for one in late if one < -CLOCK]
    return {
        LATE: percentile(late, 50) * 1e3,
        P99: Tail([one * 1e3 for one in late], 99),
        SHORT: len(short) / len(late) * 100,
        SHORTEST: max(short, default=0.0) * 1e3,
    }
