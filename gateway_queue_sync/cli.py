"""The command line, ``python -m gateway_queue_sync``: its commands and their exit codes.

A command is a module whose ``add_parser`` adds a subparser and sets its ``func``, which takes the parsed
arguments and returns the exit code. It may also set ``log_level``, if that is not WARNING.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence

import gateway_queue_sync
from gateway_queue_sync import (
    demo,
    limit_command,
    planner,
    recipe_command,
    serve_command,
    status,
)
from gateway_queue_sync.clock import unmasked

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMANDS = (demo, planner, serve_command, status, limit_command, recipe_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (or the command line) names, and return its exit code.

    The code is 0 if all is well, 1 if it is not, 2 if the output cannot be written, 130 after Ctrl-C,
    and 141 if the reader of a pipe went away (128 and the signal's number, as shells have it).

    Raises:
        SystemExit: with 2 for options that are wrong, with 0 for ``--help`` and ``--version``.
    """
    try:
        try:
            arguments = make_parser().parse_args(argv)
            level = getattr(arguments, "log_level", logging.WARNING)
            logging.basicConfig(format=LOG_FORMAT, level=level)  # to standard error
            return int(arguments.func(arguments))
        finally:
            print(end="", flush=True)  # so that an error in writing is raised here
    except (KeyboardInterrupt, RuntimeError) as error:
        if not isinstance(unmasked(error), KeyboardInterrupt):
            raise
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(f"cannot write the output: {error.strerror}", file=sys.stderr)
        _discard_output()
        return 2


def _discard_output() -> None:
    """Send standard output nowhere, so that the interpreter's last flush of it succeeds."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a name, not a path
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway_queue_sync",
        description="Let the shards of a Discord bot identify when they may.",
    )
    version = f"gateway_queue_sync {gateway_queue_sync.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    subparsers = parser.add_subparsers(title="commands", metavar="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser
