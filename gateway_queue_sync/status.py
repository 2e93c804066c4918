"""The ``status`` command: shows the state of a shared account, as text or JSON.

It only reads, and changes nothing in the ledger.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TypeVar

from gateway_queue_sync.environment import public_url, read_secret
from gateway_queue_sync.errors import GatewayBotError, LedgerError
from gateway_queue_sync.format import (
    format_count,
    format_duration,
    format_ranges,
    format_time,
    sentence,
)
from gateway_queue_sync.ledgers.shared.backend import Backend
from gateway_queue_sync.ledgers.shared.inquiry import peek
from gateway_queue_sync.models import BucketSnapshot, QueueSnapshot, seconds
from gateway_queue_sync.policies import http_backend, redis_backend, sqlite_backend
from gateway_queue_sync.settings import Settings

FIRST_SHOWN = 5  # waiters of each bucket
HEADINGS = ("bucket", "opens", "shard", "waits", "since", "due")
NEVER = "never: the reserve is the whole limit"
T = TypeVar("T")
CLEAR = "\x1b[H\x1b[2J"


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 1 if there is no account to show."""
    return use_ledger(arguments, _check, _show_all)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.watch is not None:
        seconds("--watch", arguments.watch, above=0)


def _show_all(backend: Backend, arguments: argparse.Namespace, _: None) -> int:
    while True:
        shown = _show(backend, arguments)
        if arguments.watch is None:
            return 0 if shown else 1
        time.sleep(arguments.watch)


def use_ledger(
    arguments: argparse.Namespace,
    check: Callable[[argparse.Namespace], T],
    use: Callable[[Backend, argparse.Namespace, T], int],
) -> int:
    """Check the options and use the account that they name. Return the exit code.

    ``check`` raises ``ValueError`` or ``OSError``; what it returns is passed to ``use``.
    """
    try:
        checked = check(arguments)
        backend = _ledger_of(arguments)
    except (TypeError, ValueError, ImportError) as error:
        arguments.error(str(error))  # exits with 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        return use(backend, arguments, checked)
    except (LedgerError, GatewayBotError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        backend.close()


def _ledger_of(arguments: argparse.Namespace) -> Backend:
    """Return the backend of the account that the options name.

    Raises:
        TypeError, ValueError, ImportError: an option is wrong.
        OSError: a file that an option names cannot be read.
    """
    settings = Settings(name=arguments.name)
    if arguments.secret_file is not None and arguments.url is None:
        raise ValueError("--secret-file goes with --url")
    if arguments.sqlite is not None:
        return sqlite_backend(arguments.sqlite, settings)
    if arguments.redis is not None:
        return redis_backend(public_url(arguments.redis), settings)
    if arguments.redis_file is not None:
        return redis_backend(read_secret(arguments.redis_file, "--redis-file"), settings)
    secret = arguments.secret_file and read_secret(arguments.secret_file, "--secret-file")
    return http_backend(arguments.url, secret, settings)


def _show(backend: Backend, arguments: argparse.Namespace) -> bool:
    """Print the account, or why there is none. Return whether there is one."""
    try:
        seen = peek(backend, Settings(name=arguments.name))
    except LedgerError as error:
        print(error, file=sys.stderr)
        return False
    if arguments.json:
        print(json.dumps(asdict(seen)), flush=True)
        return True
    page = "\n".join(describe(seen, repr(backend), datetime.now().astimezone()))
    clear = CLEAR if arguments.watch is not None and sys.stdout.isatty() else ""
    print(clear + page, flush=True)
    return True


def describe(seen: QueueSnapshot, title: str, now: datetime) -> Iterator[str]:
    """Yield the lines that describe a snapshot taken at ``now``."""
    yield f"{title}, {now:%Y-%m-%d %H:%M:%S %Z}"
    yield ""
    left = seen.limit
    if left is None:
        yield "left today  not known yet"
    else:
        resets = f"resets {format_time(now, left.resets_in)}" if left.resets_in else "not begun"
        yield f"left today  {left.remaining} of {left.total}, {resets}"
    yield f"granted     {seen.granted}"
    lines = sum(bool(bucket.shards) for bucket in seen.buckets)
    buckets = format_count(len(seen.buckets), "bucket")
    yield f"waiting     {seen.waiting}, in {lines} of {buckets}"
    yield ""
    if_unknown = NEVER if left is not None else "when the limit is known"
    idle = [bucket.bucket for bucket in seen.buckets if not (bucket.shards or bucket.ready_in)]
    if len(idle) < len(seen.buckets):
        yield from _table(seen.buckets, if_unknown, now)
    more = seen.waiting - sum(len(bucket.shards) for bucket in seen.buckets)
    if more:
        yield f"and {more} more: of each process, the first two in each line are known"
    if idle:
        yield f"empty, and open: bucket {format_ranges(idle)}"


def _table(buckets: Sequence[BucketSnapshot], if_unknown: str, now: datetime) -> Iterator[str]:
    """Yield a row for each of the first shards of each bucket, and for each bucket that is closed.

    ``if_unknown`` says when a shard without an ETA is due.
    """
    rows = [HEADINGS]
    for bucket in buckets:
        opens = f"in {format_duration(bucket.ready_in)}" if bucket.ready_in else "now"
        first = (str(bucket.bucket), opens)  # only in the first row of the bucket
        if bucket.ready_in and not bucket.shards:
            rows.append((*first, "none", "", "", ""))
        for shard in bucket.shards[:FIRST_SHOWN]:
            since = (now - timedelta(seconds=shard.waited)).astimezone()
            due = if_unknown if shard.eta is None else format_time(now, shard.eta)
            waits = format_duration(shard.waited)
            rows.append((*first, str(shard.shard_id), waits, f"{since:%H:%M:%S}", due))
            first = ("", "")
        more = bucket.shards[FIRST_SHOWN:]
        if more:
            last = more[-1].eta
            due = if_unknown if last is None else f"the last {format_time(now, last)}"
            rows.append((*first, f"{len(more)} more", "", "", due))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *cells, due in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=False)]
        yield "  ".join([*padded, due]).rstrip()


def add_ledger(parser: argparse.ArgumentParser) -> None:
    """Add the options that name an account."""
    ledger = parser.add_mutually_exclusive_group(required=True)
    ledger.add_argument("--sqlite", metavar="FILE", help="the file of an SqliteQueue")
    ledger.add_argument(
        "--redis",
        metavar="URL",
        help="the server of a RedisQueue; in a cluster, the node of the account's hash slot",
    )
    ledger.add_argument(
        "--redis-file", metavar="FILE", help="a file with that URL, which may contain a password"
    )
    ledger.add_argument("--url", help="the broker of an HttpQueue")
    parser.add_argument("--secret-file", metavar="FILE", help="a file with the broker's secret")
    parser.add_argument("--name", default="default", help="which account (default: %(default)s)")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    what = "show a shared account: who waits, and what is left today"
    parser = subparsers.add_parser(
        "status",
        help=what,
        description=f"{sentence(what)}. Exits with 1 if there is none, or it cannot be reached.",
    )
    add_ledger(parser)
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=1.0,
        metavar="SECONDS",
        help="show it repeatedly, until Ctrl-C (default: each second)",
    )
    parser.add_argument(
        "--json", action="store_true", help="the snapshot's fields as JSON, one line each time"
    )
    parser.set_defaults(func=run, error=parser.error)
