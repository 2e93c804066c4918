"""The ``plan`` command: when each shard of a bot would start, and whether the limit suffices.

Nothing is started or charged. ``timeline`` shows the plan in the terminal, ``picture`` as SVG.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from gateway_queue_sync.environment import read_secret
from gateway_queue_sync.errors import GatewayBotError
from gateway_queue_sync.format import sentence
from gateway_queue_sync.gateway_bot import GatewayBot
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    SessionStartLimit,
    whole_number,
)
from gateway_queue_sync.plan import plan_start
from gateway_queue_sync.planner.fleet import Fleet
from gateway_queue_sync.planner.picture import draw
from gateway_queue_sync.planner.timeline import describe

MAX_SHARDS = 1_000_000  # which takes a few seconds
SESSION_STARTS = 1000  # a day, by default
STANDARD_OUTPUT = "-"


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0 if the limit suffices, 1 if not, 2 if something is wrong."""
    was_on = gc.isenabled()
    gc.disable()  # there may be a million values, and no cycles
    try:
        return _run(arguments)
    finally:
        if was_on:
            gc.enable()


def _run(arguments: argparse.Namespace) -> int:
    try:
        limit = _limit(arguments)
        fleet = _fleet(arguments, limit)
    except GatewayBotError as error:
        print(error, file=sys.stderr)
        return 2
    except (TypeError, ValueError, OSError) as error:
        arguments.error(str(error))  # exits with 2
    if arguments.svg == STANDARD_OUTPUT:
        print(draw(fleet), end="", flush=True)
        return 0 if fleet.plan.lasts else 1
    if arguments.svg is not None:
        try:
            Path(arguments.svg).write_text(draw(fleet), encoding="utf-8")
        except OSError as error:
            print(f"--svg {arguments.svg!r}: {error.strerror}", file=sys.stderr)
            return 2
    if arguments.json:
        print(json.dumps(asdict(fleet.plan)), flush=True)
    else:
        width = shutil.get_terminal_size().columns - 1
        lines = describe(fleet, datetime.now().astimezone(), width, sys.stdout.encoding or "ascii")
        print("\n".join(lines), flush=True)
    return 0 if fleet.plan.lasts else 1


def _limit(arguments: argparse.Namespace) -> SessionStartLimit:
    """Return Discord's limit, or its default, with the values that options set."""
    if arguments.json and arguments.svg == STANDARD_OUTPUT:
        raise ValueError("--svg - and --json both write to standard output")
    said = {
        name: getattr(arguments, name)
        for name in ("total", "remaining", "reset_after", "max_concurrency")
        if getattr(arguments, name) is not None
    }
    if arguments.token_file is not None:
        token = read_secret(arguments.token_file, "--token-file")
        read = GatewayBot(token, base_url=arguments.base_url).session_start_limit()
        return replace(read, **said)
    if arguments.base_url is not None:
        raise ValueError("--base-url goes with --token-file")
    total = said.get("total", SESSION_STARTS)
    remaining = said.get("remaining", total)
    reset_after = 0.0 if remaining == total else SESSION_PERIOD
    usual = SessionStartLimit(total, remaining, reset_after, max_concurrency=1)
    return replace(usual, **said)


def _fleet(arguments: argparse.Namespace, limit: SessionStartLimit) -> Fleet:
    count = whole_number("--shards", arguments.shards, least=1)
    if count > MAX_SHARDS:
        raise ValueError(f"--shards must be at most {MAX_SHARDS}, not {count}")
    first = whole_number("--first-shard", arguments.first_shard)
    interval, margin, reserve = arguments.interval, arguments.margin, arguments.reserve
    plan = plan_start(
        range(first, first + count), limit, reserve=reserve, interval=interval, margin=margin
    )
    return Fleet(plan, limit, reserve, interval + margin)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    what = "show when each shard of a bot would start, and whether the session start limit suffices"
    parser = subparsers.add_parser(
        "plan",
        help=what,
        description=f"{sentence(what)}. Nothing is started. Exits with 0 if it suffices, with "
        "1 if it does not, and with 2 if that cannot be computed.",
    )
    parser.add_argument(
        "--shards", type=int, required=True, metavar="N", help="how many shards are to start"
    )
    parser.add_argument(
        "--first-shard",
        type=int,
        default=0,
        metavar="ID",
        help="the smallest shard id (default: %(default)s)",
    )
    limit = parser.add_argument_group(
        "the session start limit",
        "Without an option: Discord's default, or with --token-file its answer.",
    )
    limit.add_argument(
        "--max-concurrency", type=int, metavar="N", help="how many buckets there are (usually 1)"
    )
    limit.add_argument(
        "--total", type=int, metavar="N", help=f"session starts a day (usually {SESSION_STARTS})"
    )
    limit.add_argument(
        "--remaining", type=int, metavar="N", help="session starts that are left now (usually all)"
    )
    limit.add_argument(
        "--reset-after",
        type=float,
        metavar="SECONDS",
        help="seconds until the limit resets (usually a day, if some are used)",
    )
    limit.add_argument(
        "--token-file",
        metavar="FILE",
        help="a file that holds the bot's token: read the limit from Discord",
    )
    limit.add_argument(
        "--base-url", metavar="URL", help="the URL of the REST API, if it is not Discord's"
    )
    settings = parser.add_argument_group("the queue's settings")
    settings.add_argument(
        "--reserve",
        type=int,
        default=0,
        metavar="N",
        help="session starts that are never used (default: %(default)s)",
    )
    settings.add_argument(
        "--interval",
        type=float,
        default=IDENTIFY_INTERVAL,
        metavar="SECONDS",
        help="the shortest time between two IDENTIFYs of a bucket (default: %(default)s)",
    )
    settings.add_argument(
        "--margin",
        type=float,
        default=DEFAULT_MARGIN,
        metavar="SECONDS",
        help="seconds that the queue adds to that (default: %(default)s)",
    )
    parser.add_argument(
        "--svg",
        metavar="FILE",
        help="draw a picture into this file; -: to standard output, instead of the summary",
    )
    parser.add_argument(
        "--json", action="store_true", help="the plan's fields as JSON, instead of the summary"
    )
    parser.set_defaults(func=run, error=parser.error)
