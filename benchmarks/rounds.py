"""Runs the cases, each in a process of its own, in rounds that take turns."""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from benchmarks.figures import Figure, Kind, Row, Tail
from benchmarks.machine import Watch
from benchmarks.peers import missing

Measured = dict[str, Any]
"""The result of one round: a number or a ``Tail`` by the name of the figure, which ends in the unit."""

Say = Callable[[str], None]
"""Reports progress."""

_PROCESSES = multiprocessing.get_context("spawn")


class Case(NamedTuple):
    """What a row is to show: a subject, and the function and arguments that measure it.

    ``of`` is the name of the limiter, if the subject is called otherwise.
    """

    subject: str
    kind: Kind
    function: Callable[..., Measured]
    args: tuple[Any, ...]
    note: str = ""
    of: str = ""

    @property
    def missing(self) -> str:
        """Why it cannot be measured; empty if it can."""
        return missing(self.of or self.subject)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, and return what it returned."""
    return side_by_side([(function, args)])[0]


def side_by_side(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Call each function in a new process, all at the same time; return their results."""
    with ProcessPoolExecutor(len(calls), _PROCESSES) as pool:
        futures = [pool.submit(function, *args) for function, args in calls]
        return [future.result() for future in futures]


def interleaved(cases: Sequence[Case], rounds: int, say: Say) -> list[Row]:
    """Measure all cases in turn, so many times, and return a row for each.

    A case whose package is not installed has a row that says so.
    """
    measured: dict[Case, list[Measured]] = defaultdict(list)
    noisy: dict[Case, int] = defaultdict(int)
    for number in range(rounds):
        for case in cases:
            if case.missing:
                continue
            say(f"round {number + 1} of {rounds}: {case.subject}")
            with Watch() as watch:
                measured[case].append(apart(case.function, *case.args))
            noisy[case] += watch.is_noisy
    return [row_of(case, measured[case], noisy[case]) for case in cases]


def at_one_time(cases: Sequence[Case], rounds: int, say: Say) -> list[Row]:
    """Measure all cases at the same time, so many times: for cases that wait most of the time."""
    present = [case for case in cases if not case.missing]
    measured: dict[Case, list[Measured]] = defaultdict(list)
    noisy = 0
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}: {', '.join(case.subject for case in present)}")
        with Watch() as watch:
            found = side_by_side([(case.function, case.args) for case in present])
        for case, one in zip(present, found, strict=True):
            measured[case].append(one)
        noisy += watch.is_noisy
    return [row_of(case, measured[case], noisy) for case in cases]


def row_of(case: Case, measured: Sequence[Measured], noisy: int) -> Row:
    """Return the row of a case from the results of its rounds."""
    if not measured:
        return Row(case.subject, case.kind, note=case.missing)
    figures = {}
    for name, first in measured[0].items():
        each = [one[name] for one in measured]
        figure = Figure.of_tails(each) if isinstance(first, Tail) else Figure.of(each)
        if figure is not None:
            figures[name] = figure
    return Row(case.subject, case.kind, figures, case.note, noisy, len(measured))
