"""The ``limit`` command: shows and changes the session start limit of a shared account.

For a change it has a session with the ledger, as any process. The others get the new limit with their
next request.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial

from gateway_queue_sync.clock import SYSTEM_CLOCK
from gateway_queue_sync.environment import read_secret
from gateway_queue_sync.errors import GatewayBotError, LedgerError
from gateway_queue_sync.format import format_time, sentence
from gateway_queue_sync.gateway_bot import GatewayBot
from gateway_queue_sync.ledgers.remote import look
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.backend import Backend, Busy, Unreachable
from gateway_queue_sync.ledgers.shared.messages import Introduction, Limit, Reply, Request
from gateway_queue_sync.limits import SAME_RESET_US, less_starts
from gateway_queue_sync.models import (
    SESSION_PERIOD,
    US_PER_SECOND,
    SessionStartLimit,
    to_us,
)
from gateway_queue_sync.settings import DEFAULT_LEASE, Settings
from gateway_queue_sync.status import add_ledger, ledger_of

PATIENCE = 5.0  # s for a request to the ledger
PAUSE = 0.05  # s before it is sent again
MAX_AGE_US = 30 * US_PER_SECOND  # of what Discord said, when it is confirmed
FORGET = (
    "forget what is left, and which bot the account is of: a process with the token reads what is left, "
    "or if there is none, Discord's default counts"
)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 1 if the account cannot be shown or was not changed."""
    try:
        if arguments.read != (arguments.token_file is not None):
            raise ValueError("--read and --token-file go together")
        if arguments.set is not None and arguments.set < 0:
            raise ValueError(f"--set must be at least 0, not {arguments.set}")
        bot = _bot(arguments) if arguments.read else None
        backend = ledger_of(arguments)
    except (TypeError, ValueError, ImportError) as error:
        arguments.error(str(error))  # exits with 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        return _run(backend, arguments, bot)
    except (LedgerError, GatewayBotError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        backend.close()


def _bot(arguments: argparse.Namespace) -> GatewayBot:
    token = read_secret(arguments.token_file, "--token-file")
    return GatewayBot(token, base_url=arguments.base_url)


def _run(backend: Backend, arguments: argparse.Namespace, bot: GatewayBot | None) -> int:
    at_us = SYSTEM_CLOCK.now_us()  # figures are as they were then, whenever they are confirmed
    now = look(backend, Settings(name=arguments.name))
    print("\n".join(_describe(backend, now)))
    account = _Account(backend, now, "" if bot is None else bot.bot_id)
    if arguments.set is not None:
        limit = _with_remaining(now, arguments)
        what = f"set what is left to {_written(limit)}"
        change = partial(account.change, messages.UPDATE, limit, at_us)
    elif bot is not None:
        limit, read_us = bot.session_start_limit(), SYSTEM_CLOCK.now_us()
        what = f"take what Discord says: {_written(limit)}"
        change = partial(account.take_what_was_read, limit, at_us, read_us)
    elif arguments.forget:
        what = FORGET
        limit = SessionStartLimit(1, 1, 0.0, now.max_concurrency)  # these figures do not count
        change = partial(account.change, messages.FORGET, limit, at_us)
    else:
        return 0
    print(f"will {what}")
    if not arguments.yes and not _is_confirmed():
        print("nothing was changed (--yes asks nothing)", file=sys.stderr)
        return 1
    print(f"done: {_left(change())}")
    return 0


def _with_remaining(now: Reply, arguments: argparse.Namespace) -> SessionStartLimit:
    """Return the account's limit with another number of session starts left."""
    if now.total < 0:
        raise LedgerError("how many there are in all is not known yet: use --read")
    if arguments.set > now.total:
        arguments.error(f"--set must be at most {now.total}, the total of the limit")
    resets_in = now.resets_in_us / US_PER_SECOND
    if not resets_in and arguments.set < now.total:
        resets_in = SESSION_PERIOD  # no period has begun: it does now
    return SessionStartLimit(now.total, arguments.set, resets_in, now.max_concurrency)


def _is_confirmed() -> bool:
    try:
        return input("go on? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


class _Account:
    """The account, and this process's session with it.

    Args:
        backend: where the account is.
        now: its state.
        bot_id: the id of the bot whose limit was read; empty if none was.

    Raises:
        LedgerError: in its methods; the ledger cannot be reached, or refuses.
    """

    def __init__(self, backend: Backend, now: Reply, bot_id: str) -> None:
        self._backend, self._bot_id = backend, bot_id
        self._attempts, self._numbers = itertools.count(1), itertools.count(1)
        period_us = to_us(SESSION_PERIOD) if now.look is None else now.look.period_us
        self._request = Request(
            attempt=0,
            sent_us=0,
            session=secrets.token_hex(8),
            number=0,
            interval_us=now.interval_us,
            margin_us=now.margin_us,
            period_us=period_us,
            lease_us=to_us(DEFAULT_LEASE),
            reserve=0,
            reread_us=0,
            can_read=0,
            look=0,
            layout=now.layout,
        )

    def change(
        self, kind: int, limit: SessionStartLimit, at_us: int, asked_us: int | None = None
    ) -> Reply:
        """Send a limit as it was at ``at_us``, and return the state of the account after it."""
        if not self._request.number:
            new = Introduction("", self._bot_id, 0, None, 0, 0, 0, None)
            self._ask(introduction=new)
        figures = limit.total, limit.remaining, to_us(limit.reset_after), limit.max_concurrency
        asked_us = at_us if asked_us is None else asked_us
        return self._ask(limit=Limit(kind, *figures, asked_us, at_us))

    def take_what_was_read(self, limit: SessionStartLimit, asked_us: int, at_us: int) -> Reply:
        """Send a limit that was read, minus the permits that Discord may not have seen."""
        if SYSTEM_CLOCK.now_us() - asked_us > MAX_AGE_US:
            raise LedgerError("what Discord said is old by now, so nothing was changed: try again")
        now = self.change(messages.READ, limit, at_us, asked_us)
        left = max(now.remaining, now.uncounted)
        differs = abs(now.resets_in_us - to_us(limit.reset_after)) > SAME_RESET_US
        if now.total == limit.total and now.remaining == left and not differs:
            return now
        given = less_starts(limit, max(0, limit.remaining - left))
        given = replace(given, remaining=min(left, limit.remaining))
        return self.change(messages.UPDATE, given, at_us)

    def _ask(
        self, *, limit: Limit | None = None, introduction: Introduction | None = None
    ) -> Reply:
        """Send the next request until there is a reply. It is applied once."""
        self._request = self._request._replace(
            number=next(self._numbers), limit=limit, introduction=introduction
        )
        give_up = time.monotonic() + PATIENCE
        while True:
            now_us = SYSTEM_CLOCK.now_us()
            request = self._request._replace(attempt=next(self._attempts), sent_us=now_us)
            try:
                reply = self._backend.ask(request)
                break
            except (Busy, Unreachable):
                if time.monotonic() >= give_up:
                    raise
            time.sleep(PAUSE)
        if reply.status == messages.OK:
            return reply
        raise LedgerError(f"{self._backend!r}: {reply.error or 'it was lost meanwhile: try again'}")


def _describe(backend: Backend, now: Reply) -> Iterator[str]:
    yield repr(backend)
    yield f"left     {_left(now)}"
    yield f"buckets  {now.max_concurrency}"
    yield f"granted  {now.granted}"


def _left(now: Reply) -> str:
    if now.total < 0:
        return "not known yet: it is to be read"
    resets_in = now.resets_in_us / US_PER_SECOND
    return _written(SessionStartLimit(now.total, now.remaining, resets_in, now.max_concurrency))


def _written(limit: SessionStartLimit) -> str:
    if not limit.reset_after:
        return f"{limit.remaining} of {limit.total}, not begun"
    when = format_time(datetime.now().astimezone(), limit.reset_after)
    return f"{limit.remaining} of {limit.total}, resets {when}"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    what = "show or change how many session starts of a shared account are left"
    parser = subparsers.add_parser(
        "limit",
        help=what,
        description=f"{sentence(what)}; the processes that use it get the new number. Exits with "
        "1 if nothing was shown or changed.",
    )
    add_ledger(parser)
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--set",
        type=int,
        metavar="REMAINING",
        help="set how many session starts are left, until the limit is reset or read",
    )
    change.add_argument(
        "--read", action="store_true", help="take what Discord says (needs --token-file)"
    )
    change.add_argument(
        "--forget",
        action="store_true",
        help="delete the limit and the id of the bot, so that they are new",
    )
    parser.add_argument("--token-file", metavar="FILE", help="a file that holds the bot's token")
    parser.add_argument(
        "--base-url", metavar="URL", help="the URL of the REST API, if it is not Discord's"
    )
    parser.add_argument("--yes", action="store_true", help="change it without asking, for scripts")
    parser.set_defaults(func=run, error=parser.error)
