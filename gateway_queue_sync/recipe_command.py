"""The ``recipe`` command: print how a bot library uses the queue."""

from __future__ import annotations

import argparse
import importlib.resources
import re
import sys

from gateway_queue_sync.format import sentence

FOLDER = importlib.resources.files("gateway_queue_sync") / "recipes"
_ROW = re.compile(r"^\| ([^|]+) \| `([^`|]+)` \|", re.MULTILINE)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    what = "print how a bot library uses the queue"
    parser = subparsers.add_parser("recipe", help=what, description=f"{sentence(what)}.")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a library or a file (default: the list of all)"
    )
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the list, or the file of a library; return 1 if there is none."""
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    if arguments.name is None:
        print(listed, end="")
        return 0
    for libraries, file in _ROW.findall(listed):
        if arguments.name in (file, *libraries.split(", ")):
            print((FOLDER / file).read_text(encoding="utf-8"), end="")
            return 0
    print(
        f"there is no recipe for {arguments.name!r}; without a name all are listed", file=sys.stderr
    )
    return 1
