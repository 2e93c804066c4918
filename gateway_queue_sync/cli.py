"""The command line, ``python -m gateway_queue_sync``: which commands there are, and how they end.

A command is a module whose ``add_parser`` adds a subparser and sets its ``func``, which takes the parsed
arguments and returns the exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import gateway_queue_sync
from gateway_queue_sync import demo

COMMANDS = (demo,)

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (or the command line) names, and return its exit code.

    The code is 0 if all is well, 1 if it is not, 130 after Ctrl-C, and 141 if the reader of a pipe went
    away. Without a command it is 2, and help is printed to standard error.

    Raises:
        SystemExit: with 2 for options that are wrong, with 0 for ``--help`` and ``--version``.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.func is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(arguments.func(arguments))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return BROKEN_PIPE
    except OSError as error:  # a full disk, no network
        _forget_stdout()
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway_queue_sync",
        description="Let the shards of a Discord bot identify when they may.",
    )
    version = f"gateway_queue_sync {gateway_queue_sync.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.set_defaults(func=None)
    subparsers = parser.add_subparsers(title="commands", metavar="command")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _forget_stdout() -> None:
    """Send what is still to be written nowhere, so that the interpreter's last flush says nothing."""
    with contextlib.suppress(OSError, ValueError):  # standard output need not be a file
        stdout = sys.stdout.fileno()
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a name, not a path
            os.dup2(nowhere.fileno(), stdout)
