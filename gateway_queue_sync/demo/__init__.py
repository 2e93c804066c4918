"""The ``demo`` command: shards start their sessions at a small gateway that checks every IDENTIFY.

``run`` makes a queue, a ``gateway`` with a referee that does not use the queue, and a ``fleet`` of
shards. ``display`` shows their progress, ``summary`` the result.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from gateway_queue_sync.demo.display import choose_display
from gateway_queue_sync.demo.fleet import Fleet
from gateway_queue_sync.demo.gateway import Gateway
from gateway_queue_sync.demo.summary import summary
from gateway_queue_sync.format import format_count, sentence
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    SessionStartLimit,
    seconds,
    whole_number,
)
from gateway_queue_sync.policies import LargeBotQueue, NoOpQueue
from gateway_queue_sync.testing import Referee

if TYPE_CHECKING:
    from gateway_queue_sync.queue import GatewayQueue

FRAME = 0.1  # s between two updates of the display
MAX_SHARDS = 400  # each takes two threads and two open files; often a process may open 1024
SESSION_STARTS = 1000  # a day, by default


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0 if all shards started and no rule was broken, else 1."""
    shards, interval, margin = arguments.shards, arguments.interval, arguments.margin
    if margin is None:
        margin = interval * DEFAULT_MARGIN / IDENTIFY_INTERVAL
    try:
        _check(shards, arguments.max_concurrency, interval, margin)
    except ValueError as error:
        arguments.error(str(error))  # exits with 2
    buckets = min(shards, arguments.max_concurrency)  # the others would stay empty
    limit = SessionStartLimit(SESSION_STARTS, SESSION_STARTS, SESSION_PERIOD, buckets)
    queue: GatewayQueue
    if arguments.no_queue:
        queue, how = NoOpQueue(), "not queued"
    else:
        queue = LargeBotQueue(limit, interval=interval, margin=margin)
        how = f"queued with a margin of {margin:g} s"
    referee = Referee(buckets, interval=interval, total=limit.total)

    print(f"Starting {format_count(shards, 'shard')} in {format_count(buckets, 'bucket')}, {how}.")
    print(f"The gateway accepts one IDENTIFY per bucket every {interval:g} s.\n", flush=True)
    display = choose_display(queue, referee, shards)
    with (
        Gateway(referee) as gateway,
        Fleet(queue, gateway.address, shards, interval) as fleet,
        queue,  # is closed before the others, so that no shard waits in it when they end
    ):
        fleet.start()
        while not fleet.is_finished:
            display.show(fleet.results)
            time.sleep(FRAME)
        display.show(fleet.results)

    print(summary(fleet.results, referee, interval), flush=True)
    all_started = all(result.failure is None for result in fleet.results)
    return 0 if all_started and not referee.refused else 1


def _check(shards: int, max_concurrency: int, interval: float, margin: float) -> None:
    whole_number("--shards", shards, least=1)
    if shards > MAX_SHARDS:
        raise ValueError(f"--shards must be at most {MAX_SHARDS}, not {shards}")
    whole_number("--max-concurrency", max_concurrency, least=1)
    seconds("--interval", interval, above=0)
    seconds("--margin", margin)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    what = "start shards at a small gateway on this machine that checks every IDENTIFY"
    parser = subparsers.add_parser(
        "demo",
        help=what,
        description=f"{sentence(what)}. Exits with 1 if a rule was broken or not all started.",
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=16,
        metavar="N",
        help=f"how many shards to start, at most {MAX_SHARDS} (default: %(default)s)",
    )
    parser.add_argument(
        "--max-concurrency",
        type=int,
        default=4,
        metavar="N",
        help="how many buckets the shards have (default: %(default)s)",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=0.5,
        metavar="SECONDS",
        help="the shortest time between two IDENTIFYs of a bucket (default: %(default)s; Discord's: 5)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        metavar="SECONDS",
        help="what the queue adds to that (default: a twentieth of the interval)",
    )
    parser.add_argument(
        "--no-queue",
        action="store_true",
        help="show what happens without the queue: all shards identify at once",
    )
    parser.set_defaults(func=run, error=parser.error)
