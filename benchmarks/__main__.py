"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import (
    broker,
    costs,
    fairness,
    fleet,
    free_path,
    lines,
    machine,
    path,
    peers,
    plots,
    report,
    shared,
    wake,
)
from benchmarks.figures import Result

BENCHMARKS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (wake, free_path, lines, fleet, fairness, shared, broker, path, costs)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure or load figures, and print, store and draw them as the options say."""
    arguments = make_parser().parse_args(argv)
    if arguments.load:
        found = json.loads(arguments.load.read_text())
        results = [Result.from_json(result) for result in found["benchmarks"]]
    else:
        found = _about()
        size = "tiny" if arguments.tiny else "quick" if arguments.quick else "whole"
        results = _measure(arguments.names or list(BENCHMARKS), size, found)
        found["benchmarks"] = [result.to_json() for result in results]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        table = report.as_markdown(results)
        print(f"{table}\n\n{report.for_readme(table)}")
    elif arguments.load:
        print(report.header(found))
        for result in results:
            print(f"\n{report.as_text(result)}")
    if arguments.plot:
        for path in plots.draw(results, arguments.plot):
            print(path, file=sys.stderr)
    return 0


def _about() -> dict[str, Any]:
    used_as = {subject.name: subject.how for subject in peers.SUBJECTS.values()}
    return {"machine": machine.describe(), "peers": peers.versions(), "used as": used_as}


def _measure(names: Sequence[str], size: str, found: dict[str, Any]) -> list[Result]:
    """Run benchmarks one after the other, and print each when it is done."""
    print(report.header(found), flush=True)
    results = []
    for name in names:
        module = BENCHMARKS[name]
        began = time.monotonic()
        result: Result = module.run(module.SIZES[size], _say)
        _say("")
        results.append(result)
        took = time.monotonic() - began
        print(f"\n{report.as_text(result)}\n  ({took:.0f} s)", flush=True)
    return results


def _say(what: str) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what[:100]}", end="", file=sys.stderr, flush=True)


def _benchmark(name: str) -> str:
    if name not in BENCHMARKS:  # argparse's own ``choices`` would refuse an empty list
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(BENCHMARKS)}")
    return name


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the queue beside what else people would use.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        type=_benchmark,
        help=f"which: {', '.join(BENCHMARKS)} (all by default)",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="less of everything, under a minute")
    sizes.add_argument("--tiny", action="store_true", help="just enough to see that it works")
    sizes.add_argument(
        "--load", type=Path, metavar="FILE", help="measure nothing; show a --json FILE"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the charts there")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print the tables of the READMEs",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
