"""Compare the package here with another checkout of it: ``python -m benchmarks.beside DIRECTORY``.

Both run the functions of the benchmarks here. Each call has a process of its own, and the two checkouts
take turns. A figure is the median of the rounds; a percentile is that of all rounds' values together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import fleet, free_path, lines, processes, wake
from benchmarks.checkout import HERE, begin, finish
from benchmarks.figures import OURS, Tail
from benchmarks.fleet import Fleet
from benchmarks.rounds import Case, Measured, row_of


def cases(*, quick: bool) -> list[Case]:
    """Return the cases to compare."""
    many, some, rounds = (10_000, 1_000, 100) if quick else (100_000, 1_000, 200)
    return [
        Case("a free bucket", "ours", free_path.with_limit, (20_000,)),
        Case("NoOpQueue", "ours", free_path.calls_of, (OURS, 20_000)),
        Case("blocked threads", "ours", wake.blocked, (OURS, 0.05, rounds, 0)),
        Case("beside a busy thread", "ours", wake.blocked, (OURS, 0.05, 25, 1)),
        Case("1,000 futures", "ours", lines.futures_in_line, (1_000,)),
        Case(f"{many:,} futures", "ours", lines.futures_in_line, (many,)),
        Case(f"{some:,} threads", "ours", lines.threads_in_line, (some, 2.0)),
        Case(f"{some:,} time out at once", "ours", lines.timed_out_acquires, (some,)),
        *(
            Case(str(one), "ours", fleet.start, (OURS, *one[:3], one.stagger))
            for one in (Fleet(64, 16, 0.05), Fleet(1024, 64, 0.05), Fleet(64, 16, 0.05, 1, 0.1))
        ),
    ]


def measure(directory: Path, case: Case) -> Measured:
    """Run a case with the package in a directory, and the benchmarks that are here."""
    measured = finish(begin(directory, case.function, *case.args), directory)
    return {name: Tail(*one) if isinstance(one, list) else one for name, one in measured.items()}


def main() -> None:
    """Print a table with the figures of both checkouts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside", description=__doc__)
    parser.add_argument("directory", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="with less to do")
    parser.add_argument(
        "--processes",
        type=float,
        metavar="SECONDS",
        help="compare processes that share a ledger instead, each case for so long",
    )
    parser.add_argument("--only", default="", help="a part of the name of what to compare")
    options = parser.parse_args()
    there = options.directory.resolve()
    print("| what | figure | there | here | here / there |\n|---|---|---|---|---|")
    seconds = options.processes
    chosen = cases(quick=options.quick) if seconds is None else processes.cases(seconds)
    for case in (one for one in chosen if options.only in one.subject):
        measured: dict[Path, list[Measured]] = {there: [], HERE: []}
        for _ in range(options.rounds):
            for directory, rounds in measured.items():
                rounds.append(measure(directory, case))
        old, new = (row_of(case, rounds, 0).figures for rounds in measured.values())
        for name in (name for name in old if name in new):  # a tail needs many values
            before, after = old[name].value, new[name].value
            ratio = f"{after / before:.2f}" if before else ""
            print(f"| {case.subject} | {name} | {before:.3g} | {after:.3g} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
