"""The ``serve`` command: runs a broker. Its settings come from options, the environment or the state."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from gateway_queue_sync.broker.server import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    MAX_CONNECTIONS,
    SPARE_FILES,
    Broker,
)
from gateway_queue_sync.broker.settings import BrokerSettings
from gateway_queue_sync.environment import public_url, read_secret, state_folder
from gateway_queue_sync.errors import GatewayBotError, LedgerError
from gateway_queue_sync.format import format_count, sentence
from gateway_queue_sync.gateway_bot import GatewayBot
from gateway_queue_sync.ledgers.remote import MIN_MARGIN
from gateway_queue_sync.ledgers.shared.inquiry import peek
from gateway_queue_sync.ledgers.shared.limits import DISCORDS_DEFAULT
from gateway_queue_sync.limit_reader import wait_for_limit
from gateway_queue_sync.log import shards
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    MAX_BUCKETS,
    MAX_RESET_AFTER,
    SessionStartLimit,
    check_limit,
)
from gateway_queue_sync.policies import (
    READ_JITTER,
    RedisQueue,
    SqliteQueue,
    redis_backend,
    sqlite_backend,
)
from gateway_queue_sync.queue import GatewayQueue, scheduler_of
from gateway_queue_sync.settings import Settings

if sys.platform != "win32":
    import resource

log = logging.getLogger("gateway_queue_sync.broker")

STATE_FILE = "broker.sqlite3"
MAX_END = 5.0  # s from the first signal to the end of the process, whatever it still has to do
MAX_SEND = 2.0  # s of these in which the ledger may take the last reports


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes. Return 0, or 1 if it could not begin or not end properly."""
    shards.setLevel(logging.WARNING)  # the page shows who waits; in the log it would be too much
    stop = _Stop()
    try:
        settings = _Settings.gathered(arguments, os.environ)
        settings.log_sources()
        settings.raise_file_limit()
        queue = settings.queue()
    except (TypeError, ValueError, ImportError) as error:
        arguments.error(str(error))  # exits with 2
    except (LedgerError, GatewayBotError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    scheduler = scheduler_of(queue)
    with queue:
        try:
            broker = Broker(queue, settings.broker)
        except OSError as error:
            where = f"{settings.broker.host}:{settings.broker.port}"
            print(f"cannot listen on {where}: {error}", file=sys.stderr)
            return 1
        with broker:
            log.info("serving at %s; its state is at %r", broker.url, scheduler.ledger)
            stop.wait()
            log.info("stopping")
    scheduler.worker.join(MAX_SEND)
    if scheduler.remote is not None and scheduler.locked(scheduler.remote.has_more_to_send):
        log.error("stopped; the ledger does not answer: permits that were given back count as used")
        return 1
    log.info("stopped")
    return 0


class _Stop:
    """Ends the command after SIGTERM or SIGINT. After a second signal, or ``MAX_END``, it ends at once.

    The main thread waits for a byte that Python writes when a signal comes. It does not wait for a lock,
    because a signal that another thread receives would not interrupt that.
    """

    def __init__(self) -> None:
        self._stopping = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)

    def _received(self, number: int, _: FrameType | None) -> None:
        if self._stopping:
            os._exit(128 + number)
        self._stopping = True
        timer = threading.Timer(MAX_END, os._exit, [1])
        timer.daemon = True
        timer.start()

    def wait(self) -> None:
        """Block until a signal has come."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        with reader, writer:
            signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            while not self._stopping:
                reader.recv(1)
            signal.set_wakeup_fd(-1)


@dataclass
class _Settings:
    """The checked settings. Nothing is created yet."""

    broker: BrokerSettings
    max_connections_given: bool
    token: str | None
    base_url: str | None
    max_concurrency: int | None
    make: type[SqliteQueue | RedisQueue]
    where: str
    queue_settings: dict[str, Any]
    sources: list[str]  # the log lines that say where each setting is from

    @classmethod
    def gathered(cls, arguments: argparse.Namespace, environment: Mapping[str, str]) -> _Settings:
        """Take each setting from its option, else from the environment."""
        sources = []

        def chosen(flag: str, variable: str = "", default: Any = None) -> Any:
            value, source = getattr(arguments, flag), f"--{flag.replace('_', '-')}"
            if value is None and environment.get(variable):
                value, source = environment[variable], f"the environment's {variable}"
            elif value is None:
                value, source = default, "the default"
            if value is not None:
                sources.append(f"{flag} is {value} ({source})")
            return value

        secret, concurrency = None, chosen("max_concurrency", "CONCURRENCY")
        interval = chosen("interval", default=IDENTIFY_INTERVAL)
        margin = chosen("margin", default=DEFAULT_MARGIN)
        reserve = chosen("reserve", default=0)
        Settings(name=arguments.name, interval=interval, margin=margin, reserve=reserve)
        if margin < MIN_MARGIN:
            raise ValueError(f"margin must be at least {MIN_MARGIN} s, not {margin:g}")
        if arguments.secret_file is not None:
            secret = read_secret(arguments.secret_file, "--secret-file")
            sources.append(f"the secret is read from {arguments.secret_file} (--secret-file)")
        most = chosen("max_connections", default=MAX_CONNECTIONS)
        host, port = chosen("host", "HOST", DEFAULT_HOST), chosen("port", "PORT", DEFAULT_PORT)
        broker = BrokerSettings(host, _whole("port", port), secret, arguments.strict, most)
        make, where = _state(arguments, environment, sources)
        token = _token(arguments, environment, sources)
        buckets = None if concurrency is None else _whole("max_concurrency", concurrency)
        if buckets is not None and not 1 <= buckets <= MAX_BUCKETS:
            raise ValueError(
                f"max_concurrency must be at least 1 and at most {MAX_BUCKETS}, not {buckets}"
            )
        if token is None and make is SqliteQueue and not Path(where).exists():
            check_limit(DISCORDS_DEFAULT, reserve)
        return cls(
            broker,
            arguments.max_connections is not None,
            token,
            arguments.base_url,
            buckets,
            make,
            where,
            {"name": arguments.name, "interval": interval, "margin": margin, "reserve": reserve},
            sources,
        )

    def log_sources(self) -> None:
        """Log where each setting is from."""
        for source in self.sources:
            log.info("%s", source)

    def raise_file_limit(self) -> None:
        """Raise the limit of open files, so that it suffices for the connections."""
        if sys.platform == "win32":
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.broker.max_connections + SPARE_FILES
        if resource.RLIM_INFINITY != hard < wanted:
            log.log(
                logging.WARNING if self.max_connections_given else logging.INFO,
                "%d connections at most, not %d: this process may open no more than %d files",
                max(1, hard - SPARE_FILES),
                self.broker.max_connections,
                hard,
            )
            wanted = hard
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    def queue(self) -> GatewayQueue:
        """Make the queue, with Discord's limit if there is a token, else with the stored one.

        If Discord or the ledger cannot be reached, the clients wait.
        """
        limit, settings = None, self.queue_settings
        if self.token is not None:
            reads = _Reads(self.token, self.base_url, self.max_concurrency)
            settings = settings | {"refresh": reads.session_start_limit}
        if self.max_concurrency is not None:
            stored = self._stored() or (None if self.token else DISCORDS_DEFAULT)
            limit = stored and replace(stored, max_concurrency=self.max_concurrency)
        if self.make is SqliteQueue and not Path(self.where).parent.exists():
            Path(self.where).parent.mkdir(mode=0o700, parents=True)
        queue = self.make(self.where, limit, **settings)
        scheduler = scheduler_of(queue)
        if self.token is not None:
            wait_for_limit(scheduler, raises=False)
        left = scheduler.ledger.budget()
        if left is None:
            log.warning("how many session starts are left is not known yet: all clients wait")
            return queue
        log.info(
            "%d of %d session starts are left, in %s%s",
            left.remaining,
            left.total,
            format_count(scheduler.ledger.max_concurrency, "bucket"),
            "" if self.token else " (as stored, or Discord's default)",
        )
        return queue

    def _stored(self) -> SessionStartLimit | None:
        """Return the stored limit, if there is one. Nothing is changed."""
        settings = Settings(name=self.queue_settings["name"])
        make = redis_backend if self.make is RedisQueue else sqlite_backend
        backend = make(self.where, settings)
        try:
            seen = peek(backend, settings)
        except LedgerError:
            return None  # what is wrong shows when the queue is made
        finally:
            backend.close()
        left = seen.limit
        if left is None:
            return None
        resets_in = min(left.resets_in, MAX_RESET_AFTER)
        return SessionStartLimit(left.total, left.remaining, resets_in, len(seen.buckets))


class _Reads:
    """Reads a bot's limit. If ``max_concurrency`` was set, that counts instead of Discord's.

    Attributes:
        bot_id: the bot's id.
    """

    def __init__(self, token: str, base_url: str | None, max_concurrency: int | None) -> None:
        self._bot = GatewayBot(token, base_url=base_url, attempts=1, jitter=READ_JITTER)
        self.bot_id = self._bot.bot_id
        self._max_concurrency, self._warned = max_concurrency, False

    def session_start_limit(self) -> SessionStartLimit:
        """Return the current limit."""
        limit, buckets = self._bot.session_start_limit(), self._max_concurrency
        log.info("the limit is Discord's: %s", limit)
        if buckets is None:
            return limit
        if buckets > limit.max_concurrency and not self._warned:
            self._warned = True
            log.warning(
                "max_concurrency %d is more than Discord's %d: shards will be refused",
                buckets,
                limit.max_concurrency,
            )
        return replace(limit, max_concurrency=buckets)


def _token(
    arguments: argparse.Namespace, environment: Mapping[str, str], sources: list[str]
) -> str | None:
    """Return the bot's token, checked, if there is one."""
    token = environment.get("DISCORD_TOKEN") or None
    if arguments.token_file is not None:
        token = read_secret(arguments.token_file, "--token-file")
        sources.append(f"the token is read from {arguments.token_file} (--token-file)")
    if token is not None:
        GatewayBot(token, base_url=arguments.base_url)
    return token


def _state(
    arguments: argparse.Namespace, environment: Mapping[str, str], sources: list[str]
) -> tuple[type[SqliteQueue | RedisQueue], str]:
    """Return the kind of queue for the state, and where the state is. Nothing is created."""
    url, source = None, "--redis"
    if arguments.redis is not None:
        url = public_url(arguments.redis)
    elif arguments.redis_file is not None:
        url, source = read_secret(arguments.redis_file, "--redis-file"), "--redis-file"
    elif arguments.state is None and environment.get("REDIS_URL"):
        url, source = environment["REDIS_URL"], "the environment's REDIS_URL"
    if url is not None:
        from gateway_queue_sync.ledgers.shared.redis import made_from  # noqa: PLC0415 - an extra

        made_from(url).close()
        sources.append(f"the state is in a Redis server ({source})")
        return RedisQueue, url
    if arguments.state is not None:
        file, source = arguments.state, "--state"
    else:
        folder, source = state_folder(environment)
        file = str(folder / STATE_FILE)
    sources.append(f"state is {file} ({source})")
    return SqliteQueue, file


def _whole(name: str, written: object) -> int:
    if not str(written).isdecimal():
        raise ValueError(f"{name} must be a whole number, not {written!r}")
    return int(str(written))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    what = "run a broker: one queue for bots in any language, over HTTP"
    parser = subparsers.add_parser(
        "serve",
        help=what,
        description=f"{sentence(what)}. Options win over the environment (HOST, PORT, CONCURRENCY, "
        "REDIS_URL; DISCORD_TOKEN, unless there is a --token-file), the environment over what is "
        "stored.",
    )
    parser.add_argument("--host", help=f"the address to listen on (default: {DEFAULT_HOST})")
    parser.add_argument("--port", help=f"the port; 0: a free one (default: {DEFAULT_PORT})")
    parser.add_argument("--max-concurrency", metavar="N", help="buckets (default: as stored, or 1)")
    ledger = parser.add_mutually_exclusive_group()
    ledger.add_argument(
        "--state", metavar="FILE", help="an SQLite file (default: in the platform's state folder)"
    )
    ledger.add_argument(
        "--redis",
        metavar="URL",
        help="a Redis server, which several brokers may share; without a password",
    )
    ledger.add_argument(
        "--redis-file", metavar="FILE", help="a file with the URL of a Redis server"
    )
    parser.add_argument("--name", default="default", help="which account (default: %(default)s)")
    parser.add_argument(
        "--secret-file", metavar="FILE", help="what clients must send: Authorization: Bearer ..."
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="a file that holds the bot's token: read the limit from Discord",
    )
    for name, default, unit in (
        ("interval", IDENTIFY_INTERVAL, "seconds between two permits of a bucket"),
        ("margin", DEFAULT_MARGIN, "seconds added for the way to Discord"),
    ):
        help_ = f"{unit} (default: {default})"
        parser.add_argument(f"--{name}", type=float, metavar="SECONDS", help=help_)
    parser.add_argument(
        "--reserve", type=int, metavar="N", help="session starts that are never used (default: 0)"
    )
    parser.add_argument(
        "--base-url", metavar="URL", help="the URL of the REST API, if it is not Discord's"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse requests without a valid shard"
    )
    parser.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="clients that may be connected at one time; others are refused (default: "
        f"{MAX_CONNECTIONS}, or what the limit of open files leaves)",
    )
    parser.set_defaults(func=run, error=parser.error, log_level=logging.INFO)
