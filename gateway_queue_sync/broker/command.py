"""The ``serve`` command: a broker, its settings from flags, the environment and what is stored."""

from __future__ import annotations

import argparse
import logging
import os
import signal
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
    serve,
)
from gateway_queue_sync.broker.wire import MAX_BUCKETS
from gateway_queue_sync.errors import GatewayBotError, LedgerError
from gateway_queue_sync.gateway_bot import GatewayBot
from gateway_queue_sync.log import shards
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    US_PER_SECOND,
    SessionStartLimit,
)
from gateway_queue_sync.policies import RedisQueue, SqliteQueue
from gateway_queue_sync.queue import GatewayQueue, scheduler_of
from gateway_queue_sync.settings import Refresh, Settings

if sys.platform != "win32":
    import resource

log = logging.getLogger("gateway_queue_sync.broker")

STATE_FILE = "broker.sqlite3"
MAX_END = 0.9  # s for the last calls to a ledger, after a signal


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes; return 0, or 1 if it could not begin."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    shards.setLevel(logging.WARNING)  # a line for each of thousands: the page tells that
    stop = _Stop()
    try:
        settings = _Settings.gathered(arguments, os.environ)
        _raise_file_limit(arguments.max_connections)
        queue = settings.queue()
    except (TypeError, ValueError, ImportError) as error:
        arguments.error(str(error))  # exits with 2
    except (LedgerError, GatewayBotError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    with queue:
        try:
            broker = serve(
                queue,
                settings.host,
                settings.port,
                secret=settings.secret,
                strict=arguments.strict,
                max_connections=arguments.max_connections,
            )
        except (TypeError, ValueError) as error:
            arguments.error(str(error))
        except OSError as error:
            print(f"cannot listen on {settings.host}:{settings.port}: {error}", file=sys.stderr)
            return 1
        with broker:
            log.info("serving at %s; its state is at %r", broker.url, scheduler_of(queue).ledger)
            stop.wait()
            log.info("stopping")
    log.info("stopped")
    return 0


class _Stop:
    """What ends the command: SIGTERM or SIGINT; a second one, or a ledger that hangs, at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)

    def _heard(self, number: int, _: FrameType | None) -> None:
        if self._event.is_set():
            os._exit(128 + number)
        self._event.set()
        timer = threading.Timer(MAX_END, os._exit, [0])
        timer.daemon = True
        timer.start()

    def wait(self) -> None:
        """Block until a signal has come."""
        self._event.wait()


@dataclass
class _Settings:
    """What to serve, and where."""

    host: str
    port: int
    secret: str | None
    token: str | None
    base_url: str | None
    max_concurrency: int | None
    make: type[SqliteQueue | RedisQueue]
    where: str
    queue_settings: dict[str, Any]

    @classmethod
    def gathered(cls, arguments: argparse.Namespace, environment: Mapping[str, str]) -> _Settings:
        """Take each setting from its flag, else from the environment."""

        def chosen(flag: str, variable: str = "", default: Any = None) -> Any:
            given = getattr(arguments, flag)
            if given is not None:
                log.info("%s is %s (--%s)", flag, given, flag.replace("_", "-"))
                return given
            if environment.get(variable):
                log.info("%s is %s (the environment's %s)", flag, environment[variable], variable)
                return environment[variable]
            if default is not None:
                log.info("%s is %s (the default)", flag, default)
            return default

        make: type[SqliteQueue | RedisQueue] = SqliteQueue
        if arguments.redis is None:
            where = chosen("state") or str(_default_state(environment))
        else:
            make, where = RedisQueue, arguments.redis
            log.info("the state is in a Redis server (--redis)")
        concurrency = chosen("max_concurrency", "CONCURRENCY")
        settings = {
            "name": Settings(name=arguments.name).name,
            "interval": chosen("interval", default=IDENTIFY_INTERVAL),
            "margin": chosen("margin", default=DEFAULT_MARGIN),
            "reserve": chosen("reserve", default=0),
        }
        if arguments.secret_file is not None:
            log.info("the secret is read from %s (--secret-file)", arguments.secret_file)
        return cls(
            host=chosen("host", "HOST", DEFAULT_HOST),
            port=_whole("port", str(chosen("port", "PORT", DEFAULT_PORT))),
            secret=None if arguments.secret_file is None else _secret(arguments.secret_file),
            token=environment.get("DISCORD_TOKEN") or None,
            base_url=arguments.base_url,
            max_concurrency=None if concurrency is None else _buckets(concurrency),
            make=make,
            where=where,
            queue_settings=settings,
        )

    def queue(self) -> GatewayQueue:
        """Make the queue, with Discord's limit if there is a token, else with the stored one."""
        limit: SessionStartLimit | None = None
        if self.token is not None:
            limit, refresh = self._from_discord(self.token)
            self.queue_settings["refresh"] = refresh
            log.info("the limit is Discord's, read with DISCORD_TOKEN: %s", limit)
        elif self.max_concurrency is not None:
            limit = self._with_concurrency(self._stored())
        queue = self.make(self.where, limit, **self.queue_settings)
        left = _known_limit(queue)
        log.info(
            "%d of %d session starts are left, in %d bucket(s)%s",
            left.remaining,
            left.total,
            left.max_concurrency,
            "" if limit is not None else " (as stored, or Discord's default)",
        )
        return queue

    def _from_discord(self, token: str) -> tuple[SessionStartLimit, Refresh]:
        now = GatewayBot(token, base_url=self.base_url).session_start_limit()
        read = GatewayBot(token, base_url=self.base_url, attempts=2).session_start_limit
        if self.max_concurrency is not None and self.max_concurrency > now.max_concurrency:
            log.warning(
                "max_concurrency %d is more than Discord's %d: shards will be refused",
                self.max_concurrency,
                now.max_concurrency,
            )
        return self._with_concurrency(now), lambda: self._with_concurrency(read())

    def _with_concurrency(self, limit: SessionStartLimit) -> SessionStartLimit:
        if self.max_concurrency is None:
            return limit
        return replace(limit, max_concurrency=self.max_concurrency)

    def _stored(self) -> SessionStartLimit:
        """Return the stored limit, or Discord's default."""
        with self.make(self.where, **self.queue_settings) as queue:
            return _known_limit(queue)


def _known_limit(queue: GatewayQueue) -> SessionStartLimit:
    """Return the limit that the queue's ledger answered when it was opened."""
    ledger = scheduler_of(queue).ledger
    left = ledger.budget()
    assert left is not None
    reset_after = left.resets_in_us / US_PER_SECOND
    return SessionStartLimit(left.total, left.remaining, reset_after, ledger.max_concurrency)


def _default_state(environment: Mapping[str, str]) -> Path:
    """Return the state file in the platform's folder for such, which is made if need be."""
    if environment.get("STATE_DIRECTORY"):  # systemd's
        folder, why = Path(environment["STATE_DIRECTORY"].split(":")[0]), "STATE_DIRECTORY"
    else:
        folder, why = _state_home(environment) / "gateway-queue-sync", "the default"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    log.info("state is %s (%s)", folder / STATE_FILE, why)
    return folder / STATE_FILE


def _state_home(environment: Mapping[str, str]) -> Path:
    if sys.platform == "win32":
        return Path(environment.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")


def _secret(file: str) -> str:
    try:
        secret = Path(file).read_text("utf-8").strip()
    except OSError as error:
        raise OSError(f"cannot read the secret file {file!r}: {error.strerror}") from error
    except UnicodeError:
        raise ValueError(f"the secret file {file!r} is no text") from None
    if not secret:
        raise ValueError(f"the secret file {file!r} is empty")
    return secret


def _whole(name: str, written: str) -> int:
    if not written.isdecimal():
        raise ValueError(f"{name} must be a whole number, not {written!r}")
    return int(written)


def _buckets(written: str) -> int:
    number = _whole("max_concurrency", written)
    if not 1 <= number <= MAX_BUCKETS:
        raise ValueError(
            f"max_concurrency must be at least 1 and at most {MAX_BUCKETS}, not {number}"
        )
    return number


def _raise_file_limit(max_connections: int) -> None:
    """Allow this process as many open files as connections may need, or warn."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + SPARE_FILES
    if resource.RLIM_INFINITY != hard < wanted:
        log.warning(
            "%d connections at most, not %d: this process may open no more than %d files",
            max(1, hard - SPARE_FILES),
            max_connections,
            hard,
        )
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    what = "run a broker: one queue that bots in any language ask over HTTP"
    parser = subparsers.add_parser(
        "serve",
        help=what,
        description=f"{what.capitalize()}. Flags win over the environment (HOST, PORT, CONCURRENCY; "
        "DISCORD_TOKEN to read the limit from Discord), the environment over what is stored.",
    )
    parser.add_argument("--host", help=f"the address to listen on (default: {DEFAULT_HOST})")
    parser.add_argument("--port", help=f"the port; 0: a free one (default: {DEFAULT_PORT})")
    parser.add_argument("--max-concurrency", metavar="N", help="buckets (default: as stored, or 1)")
    ledger = parser.add_mutually_exclusive_group()
    ledger.add_argument(
        "--state", metavar="FILE", help="an SQLite file (default: in the platform's state folder)"
    )
    ledger.add_argument("--redis", metavar="URL", help="a Redis server: several brokers, one count")
    parser.add_argument("--name", default="default", help="which account (default: %(default)s)")
    parser.add_argument(
        "--secret-file", metavar="FILE", help="what clients must send: Authorization: Bearer ..."
    )
    for name, default, unit in (
        ("interval", IDENTIFY_INTERVAL, "seconds between two permits of a bucket"),
        ("margin", DEFAULT_MARGIN, "seconds added to it, for the way"),
    ):
        parser.add_argument(
            f"--{name}",
            type=float,
            metavar="SECONDS",
            help=f"{unit} (default: {default})",
        )
    parser.add_argument(
        "--reserve", type=int, metavar="N", help="session starts never to use up (default: 0)"
    )
    parser.add_argument("--base-url", metavar="URL", help="Discord's REST API, if not at Discord")
    parser.add_argument(
        "--strict", action="store_true", help="refuse requests without a valid shard"
    )
    parser.add_argument(
        "--max-connections",
        type=int,
        default=MAX_CONNECTIONS,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.set_defaults(func=run, error=parser.error)
