"""The ``limit`` command: shows and changes the session start limit of a shared account.

To change it, the command opens a session with the ledger, as any process does that uses the account.
Those others get the new limit with their next request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial

from gateway_queue_sync.clock import SYSTEM_CLOCK
from gateway_queue_sync.environment import read_secret
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.format import format_time, sentence
from gateway_queue_sync.gateway_bot import GatewayBot
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.answers import Answers, SessionSettings
from gateway_queue_sync.ledgers.shared.backend import Backend
from gateway_queue_sync.ledgers.shared.inquiry import converse, look
from gateway_queue_sync.ledgers.shared.messages import Reply
from gateway_queue_sync.ledgers.shared.session import Session, budget_of
from gateway_queue_sync.limits import SAME_RESET_US, Budget, less_starts
from gateway_queue_sync.models import (
    SESSION_PERIOD,
    US_PER_SECOND,
    SessionStartLimit,
    to_us,
)
from gateway_queue_sync.settings import DEFAULT_LEASE, Settings
from gateway_queue_sync.status import add_ledger, use_ledger

MAX_AGE_US = 30 * US_PER_SECOND  # of what Discord said, when it is confirmed
FORGET = (
    "forget what is left, and which bot the account is of: a process with the token reads what is left; "
    "if none does within a minute, Discord's default counts"
)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 1 if the account cannot be shown or was not changed."""
    return use_ledger(arguments, _check, _run)


def _check(arguments: argparse.Namespace) -> GatewayBot | None:
    """Check the options. Return the bot whose limit is to be read, if any."""
    if arguments.read != (arguments.token_file is not None):
        raise ValueError("--read and --token-file go together")
    if arguments.set is not None and arguments.set < 0:
        raise ValueError(f"--set must be at least 0, not {arguments.set}")
    if not arguments.read:
        return None
    token = read_secret(arguments.token_file, "--token-file")
    return GatewayBot(token, base_url=arguments.base_url)


def _run(backend: Backend, arguments: argparse.Namespace, bot: GatewayBot | None) -> int:
    at_us = SYSTEM_CLOCK.now_us()  # the figures are of this time, even if they are confirmed later
    account = look(backend, Settings(name=arguments.name))
    print("\n".join(_describe(backend, account)))
    session = _session(account, "" if bot is None else bot.bot_id)
    change = partial(_change, backend, session)
    apply: Callable[[], object]
    if arguments.set is not None:
        limit = _with_remaining(account, arguments)
        what = f"set what is left to {_format_limit(limit)}"
        apply = partial(change, limit, at_us)
    elif bot is not None:
        limit, read_us = bot.session_start_limit(), SYSTEM_CLOCK.now_us()
        what = f"take what Discord says: {_format_limit(limit)}"
        apply = partial(_take_what_was_read, change, session, limit, read_us, at_us)
    elif arguments.forget:
        what = FORGET
        limit = SessionStartLimit(1, 1, 0.0, account.max_concurrency)  # these figures do not count
        apply = partial(change, limit, at_us, messages.FORGET)
    else:
        return 0
    print(f"will {what}")
    if not arguments.yes and not _is_confirmed():
        print("nothing was changed (--yes asks nothing)", file=sys.stderr)
        return 1
    apply()
    print(f"done: {_format_budget(session.budget)}")
    return 0


def _with_remaining(account: Reply, arguments: argparse.Namespace) -> SessionStartLimit:
    """Return the account's limit with another number of session starts left."""
    if account.total < 0:
        raise LedgerError("how many there are in all is not known yet: use --read")
    if arguments.set > account.total:
        arguments.error(f"--set must be at most {account.total}, the total of the limit")
    resets_in = account.resets_in_us / US_PER_SECOND
    if not resets_in and arguments.set < account.total:
        resets_in = SESSION_PERIOD  # no period has begun: it does now
    return SessionStartLimit(account.total, arguments.set, resets_in, account.max_concurrency)


def _is_confirmed() -> bool:
    try:
        return input("go on? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _session(account: Reply, bot_id: str) -> Session:
    """Return a session with the account. It has the settings of the processes that use the account."""
    return Session(
        SessionSettings(
            interval_us=account.interval_us,
            margin_us=account.margin_us,
            period_us=to_us(SESSION_PERIOD) if account.look is None else account.look.period_us,
            lease_us=to_us(DEFAULT_LEASE),
            bot=bot_id,
        )
    )


def _change(
    backend: Backend,
    session: Session,
    limit: SessionStartLimit,
    at_us: int,
    kind: int = messages.UPDATE,
    asked_us: int | None = None,
) -> Answers:
    """Send a limit as it was at ``at_us``, and return what the reply means."""
    change = session.change_limit(limit, at_us, kind, asked_us)
    answers = converse(backend, session)
    if change.error is not None:
        raise LedgerError(f"{backend!r}: {change.error}")
    return answers


def _take_what_was_read(
    change: Callable[..., Answers],
    session: Session,
    limit: SessionStartLimit,
    at_us: int,
    asked_us: int,
) -> None:
    """Send a limit that was read, minus the permits that Discord may not have seen."""
    if SYSTEM_CLOCK.now_us() - at_us > MAX_AGE_US:
        raise LedgerError("what Discord said is old by now, so nothing was changed: try again")
    answers = change(limit, at_us, messages.READ, asked_us)
    budget = session.budget
    assert budget is not None
    left = max(budget.remaining, answers.uncounted or 0)
    differs = abs(budget.resets_in_us - to_us(limit.reset_after)) > SAME_RESET_US
    if budget.total != limit.total or budget.remaining != left or differs:
        given = less_starts(limit, max(0, limit.remaining - left))
        change(replace(given, remaining=min(left, limit.remaining)), at_us)


def _describe(backend: Backend, account: Reply) -> Iterator[str]:
    yield repr(backend)
    yield f"left     {_format_budget(budget_of(account))}"
    yield f"buckets  {account.max_concurrency}"
    yield f"granted  {account.granted}"


def _format_budget(budget: Budget | None) -> str:
    if budget is None:
        return "not known yet: it is to be read"
    resets_in = budget.resets_in_us / US_PER_SECOND
    return _format_limit(SessionStartLimit(budget.total, budget.remaining, resets_in, 1))


def _format_limit(limit: SessionStartLimit) -> str:
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
        help="delete the limit and the id of the bot: the next process sets both again",
    )
    parser.add_argument("--token-file", metavar="FILE", help="a file that holds the bot's token")
    parser.add_argument(
        "--base-url", metavar="URL", help="the URL of the REST API, if it is not Discord's"
    )
    parser.add_argument("--yes", action="store_true", help="change it without asking, for scripts")
    parser.set_defaults(func=run, error=parser.error)
