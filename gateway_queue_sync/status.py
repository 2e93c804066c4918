"""The ``status`` command: what a shared account looks like just now, for people and for programs.

It looks as a stranger: it takes part in nothing, and leaves no trace in the ledger.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timedelta

from gateway_queue_sync.clock import SYSTEM_CLOCK
from gateway_queue_sync.environment import REDIS_URL, public_url, read_secret, warn_if_open
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.format import format_duration, format_ranges, format_time
from gateway_queue_sync.ledgers.adapter import snapshot
from gateway_queue_sync.ledgers.shared import STRANGER, SharedLedger
from gateway_queue_sync.models import BucketSnapshot, QueueSnapshot, seconds
from gateway_queue_sync.policies import redis_ledger, sqlite_ledger
from gateway_queue_sync.settings import Settings

FIRST_SHOWN = 5  # of those who wait in a bucket
CLEAR = "\x1b[H\x1b[2J"


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 1 if there is no account to show."""
    try:
        if arguments.watch is not None:
            seconds("--watch", arguments.watch, above=0)
        ledger = _ledger(arguments)
    except (TypeError, ValueError, ImportError) as error:
        arguments.error(str(error))  # exits with 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        while True:
            shown = _show(ledger, arguments)
            if arguments.watch is None:
                return 0 if shown else 1
            time.sleep(arguments.watch)
    finally:
        ledger.close()


def _ledger(arguments: argparse.Namespace) -> SharedLedger:
    if arguments.sqlite is not None:
        connect = sqlite_ledger(arguments.sqlite)
    elif arguments.redis is not None:
        connect = redis_ledger(public_url(arguments.redis))
    else:
        connect = redis_ledger(read_secret(arguments.redis_file, REDIS_URL))
        warn_if_open(arguments.redis_file, REDIS_URL)
    return connect(Settings(name=arguments.name).name, STRANGER, SYSTEM_CLOCK)


def _show(ledger: SharedLedger, arguments: argparse.Namespace) -> bool:
    """Print what there is, or why there is nothing; return whether there is."""
    try:
        reply = ledger.peek()
        if not reply.known:
            raise LedgerError(f"{ledger!r} holds no account of that name") from LookupError()
    except LedgerError as error:
        print(error, file=sys.stderr)
        return False
    seen = snapshot(reply)
    if arguments.json:
        print(json.dumps(asdict(seen)), flush=True)
        return True
    page = "\n".join(describe(seen, repr(ledger), datetime.now().astimezone()))
    clear = CLEAR if arguments.watch is not None and sys.stdout.isatty() else ""
    print(clear + page, flush=True)
    return True


def describe(seen: QueueSnapshot, title: str, now: datetime) -> Iterator[str]:
    """Yield the lines that tell a person of a snapshot which was taken at ``now``."""
    yield f"{title}, {now:%Y-%m-%d %H:%M:%S %Z}"
    yield ""
    if seen.limit is not None:
        left = seen.limit
        resets = f"resets {format_time(now, left.resets_in)}" if left.resets_in else "not begun"
        yield f"left today  {left.remaining} of {left.total}, {resets}"
    yield f"granted     {seen.granted}"
    lines = sum(bool(bucket.shards) for bucket in seen.buckets)
    yield f"waiting     {seen.waiting}, in {lines} of {len(seen.buckets)} bucket(s)"
    yield ""
    idle = []
    for bucket in seen.buckets:
        if bucket.shards or bucket.ready_in:
            yield from _describe_bucket(bucket, now)
        else:
            idle.append(bucket.bucket)
    if idle:
        yield f"ready: bucket {format_ranges(idle)}"


def _describe_bucket(bucket: BucketSnapshot, now: datetime) -> Iterator[str]:
    ready = f"ready in {format_duration(bucket.ready_in)}" if bucket.ready_in else "ready"
    yield f"bucket {bucket.bucket}: {ready}"
    for shard in bucket.shards[:FIRST_SHOWN]:
        since = (now - timedelta(seconds=shard.waited)).astimezone()
        due = (
            "never: the budget is all reserve" if shard.eta is None else format_time(now, shard.eta)
        )
        yield (
            f"  shard {shard.shard_id:<6} waits {format_duration(shard.waited):>9}, "
            f"since {since:%H:%M:%S}; due {due}"
        )
    more = bucket.shards[FIRST_SHOWN:]
    if more:
        last = more[-1].eta
        due = "" if last is None else f", the last due {format_time(now, last)}"
        yield f"  and {len(more)} more{due}"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    what = "show an account that processes share: who waits, and what is left today"
    parser = subparsers.add_parser(
        "status",
        help=what,
        description=f"{what.capitalize()}. Exits with 1 if there is none, or it is out of reach.",
    )
    ledger = parser.add_mutually_exclusive_group(required=True)
    ledger.add_argument("--sqlite", metavar="FILE", help="the file of a SqliteQueue")
    ledger.add_argument(
        "--redis",
        metavar="URL",
        help="the server of a RedisQueue; of a cluster, the one that has the account's slot",
    )
    ledger.add_argument(
        "--redis-file", metavar="FILE", help="a file with that URL, which may hold a password"
    )
    parser.add_argument("--name", default="default", help="which account (default: %(default)s)")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=1.0,
        metavar="SECONDS",
        help="show it again and again, until Ctrl-C (default: each second)",
    )
    parser.add_argument(
        "--json", action="store_true", help="the snapshot's fields as JSON, one line each time"
    )
    parser.set_defaults(func=run, error=parser.error)
