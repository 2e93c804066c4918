"""The queues to choose from. Each is a ``GatewayQueue``, and differs only in its ledger."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Self, Unpack

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.events import Observer
from gateway_queue_sync.in_memory import InMemoryQueue
from gateway_queue_sync.ledgers.memory import MemoryLedger
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    SessionStartLimit,
)
from gateway_queue_sync.queue import WhenExhausted
from gateway_queue_sync.rules import timings_us
from gateway_queue_sync.shared import Connect, SharedQueue, SharedSettings
from gateway_queue_sync.waiting import Refresh

if TYPE_CHECKING:
    from gateway_queue_sync.ledgers.redis import Client


def _in_memory(interval: float, margin: float, period: float, clock: Clock) -> MemoryLedger:
    interval_us, margin_us, period_us = timings_us(interval, margin, period)
    return MemoryLedger(
        window_us=interval_us + margin_us, margin_us=margin_us, period_us=period_us, clock=clock
    )


def _from_discord(token: str, base_url: str | None) -> tuple[SessionStartLimit, Refresh]:
    """Return the limit of now, and what reads it anew."""
    from gateway_queue_sync.gateway_bot import GatewayBot  # noqa: PLC0415 - loads urllib

    limit = GatewayBot(token, base_url=base_url).session_start_limit()
    # At a reset somebody waits: better go on with the known total than try for minutes.
    return limit, GatewayBot(token, base_url=base_url, attempts=2).session_start_limit


class NoOpQueue(InMemoryQueue):
    """Grants at once, always: for a bot whose gateway proxy does the queueing.

    It keeps no window and no budget, and ``update`` is ignored.
    """

    def __init__(self) -> None:
        ledger = MemoryLedger(window_us=0, margin_us=0, period_us=0, clock=SYSTEM_CLOCK)
        super().__init__(ledger, clock=SYSTEM_CLOCK)

    def update(self, limit: SessionStartLimit) -> None:
        """Ignore the limit."""


class LocalQueue(InMemoryQueue):
    """One process, one bucket: for a bot whose ``max_concurrency`` is 1.

    It keeps no budget until ``update`` gives it one; then it also has that limit's buckets.

    Args:
        interval: seconds between two permits of a bucket: Discord's 5.
        margin: seconds added for what happens between the grant and the IDENTIFY's arrival. A
            permit that took longer than that to come back to its caller is given back and asked for
            again. With 0 the spacing is promised at the grant, not at the caller.
        clock: what tells the time; ``testing.FakeClock`` in tests.
        observer: called with each event (``gateway_queue_sync.events``).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, not finite or out of range.
    """

    def __init__(
        self,
        *,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> None:
        ledger = _in_memory(interval, margin, SESSION_PERIOD, clock)
        super().__init__(ledger, clock=clock, observer=observer)


class LargeBotQueue(InMemoryQueue):
    """One process, a bucket for each of ``max_concurrency``, and the day's budget.

    Args:
        limit: the session start limit to begin with, as Discord gives it now.
        refresh: called without arguments when the limit is due to reset, to read it anew. It runs
            in the thread of whoever is first in line, once per reset; if it raises, the last known
            total counts, with a WARNING, and the next permit asks again.
        reserve: session starts never to use up: at ``remaining <= reserve`` the queue is exhausted.
        when_exhausted: ``"wait"`` for the reset, or ``"raise"`` ``SessionLimitExhausted``.
        period: seconds from the first grant after a reset to the next reset.
        interval: seconds between two permits of a bucket: Discord's 5.
        margin: seconds added to it, as for ``LocalQueue``.
        clock: what tells the time; ``testing.FakeClock`` in tests.
        observer: called with each event (``gateway_queue_sync.events``).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, such as a reserve
            that is not less than the limit's total.
    """

    def __init__(
        self,
        limit: SessionStartLimit,
        *,
        refresh: Refresh | None = None,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(
            _in_memory(interval, margin, period, clock),
            clock=clock,
            observer=observer,
            refresh=refresh,
            reserve=reserve,
            when_exhausted=when_exhausted,
        )
        self._start_with(limit)

    @classmethod
    def from_token(
        cls,
        token: str,
        *,
        base_url: str | None = None,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> Self:
        """Read the limit from Discord now, and again whenever it resets.

        Blocks while it reads. The token is kept for the re-reading; it shows in no log, repr or
        error.

        Args:
            token: the bot's token, with or without ``Bot`` before it.
            base_url: where Discord's REST API is, if not at Discord.
            reserve: as for ``LargeBotQueue``, and so are the others.
            when_exhausted: ``"wait"`` or ``"raise"``.
            period: seconds.
            interval: seconds.
            margin: seconds.
            clock: what tells the time.
            observer: called with each event.

        Raises:
            GatewayBotError: the token is wrong, or Discord could not be asked.
            TypeError, ValueError: as ``LargeBotQueue`` does; also for what cannot be a token.
        """
        limit, refresh = _from_discord(token, base_url)
        return cls(
            limit,
            refresh=refresh,
            reserve=reserve,
            when_exhausted=when_exhausted,
            period=period,
            interval=interval,
            margin=margin,
            clock=clock,
            observer=observer,
        )


# --- shared by processes --------------------------------------------------------------------------


def _file(path: str | os.PathLike[str]) -> str:
    path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"path must be a str, not {type(path).__name__}")
    if not path or path == ":memory:" or "\0" in path:
        raise ValueError(f"path must name a file, not {path!r}")
    return os.path.realpath(path)


def _made_again(
    queue: Callable[..., SharedQueue],
    make: Callable[..., object],
    given: tuple[object, ...],
    settings: SharedSettings,
) -> SharedQueue:
    """Make a queue that was pickled, on what is made of what was given."""
    return queue(make(*given), **settings)


def sqlite_ledger(path: str | os.PathLike[str]) -> Connect:
    """Return what makes a ledger of a file."""
    from gateway_queue_sync.ledgers.sqlite import SqliteLedger  # noqa: PLC0415 - loads sqlite3

    return partial(SqliteLedger, _file(path))


def redis_ledger(client_or_url: Client | str) -> Connect:
    """Return what makes a ledger on a server."""
    from gateway_queue_sync.ledgers.redis import RedisLedger, checked  # noqa: PLC0415 - an extra

    return partial(RedisLedger, checked(client_or_url))


def http_ledger(url: str, secret: str | None = None) -> Connect:
    """Return what makes a ledger of a broker."""
    from gateway_queue_sync.ledgers.http import HttpLedger  # noqa: PLC0415 - loads http.client

    return partial(HttpLedger, url, secret)


class SqliteQueue(SharedQueue):
    """Every process of one machine, or one that a supervisor restarts: an account in an SQLite file.

    No server and no dependency; what was granted survives crashes, ``kill -9`` and restarts, so that
    a bot that crashes in a loop cannot burn its budget unseen. Spacing, order, budget and limits hold
    over all queues on one file. It can be handed to ``multiprocessing`` (it pickles as its settings)
    and works on in a forked child. A file that is new, or that was lost, grants nothing for one window.

    Args:
        path: the file, on a local disk; it is made if it is not there. Not in a folder that is
            cleaned up by others, such as /tmp.
        limit: the session start limit to begin with. Within the period that the file has stored, the
            smaller ``remaining`` counts, so that a restart refills nothing. ``None`` takes what is
            stored, or Discord's default (1000 a day, ``max_concurrency`` 1).
        name: which account in the file: one for each bot.
        refresh: called without arguments when the limit is due to reset, to read it anew; one process
            does that for all. If it raises, the last known total counts, with a WARNING, and the
            next permit asks again.
        reserve: session starts never to use up: at ``remaining <= reserve`` the queue is exhausted.
        when_exhausted: ``"wait"`` for the reset, or ``"raise"`` ``SessionLimitExhausted``.
        period: seconds from the first grant after a reset to the next reset. Give all processes the
            same: that of whoever makes the first grant counts.
        interval: seconds between two permits of a bucket: Discord's 5.
        margin: seconds added to it, at least 0.02. A permit that took longer to come back to its
            caller is given back and asked for again. If processes disagree on interval or margin,
            the larger counts, with a WARNING.
        lease: seconds for which a process counts that was not heard of; those that wait are heard of
            three times as often. A process that dies costs the others 0.1 s, once.
        clock: what tells the time; ``testing.FakeClock`` in tests, one for all queues of the file.
        observer: called with each event (``gateway_queue_sync.events``).

    Raises:
        BrokerError: the file cannot be used; the message says why.
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        limit: SessionStartLimit | None = None,
        **settings: Unpack[SharedSettings],
    ) -> None:
        self._path, self._settings = _file(path), settings
        super().__init__(sqlite_ledger(path), limit, **settings)

    def __reduce__(self) -> tuple[object, ...]:
        return _made_again, (type(self), str, (self._path,), self._settings)

    @classmethod
    def from_token(
        cls,
        token: str,
        path: str | os.PathLike[str],
        *,
        base_url: str | None = None,
        **settings: Unpack[SharedSettings],
    ) -> Self:
        """Read the limit from Discord now, and again whenever it resets; one process does for all.

        Blocks while it reads. The token is kept for the re-reading; it shows in no log, repr or
        error, but it goes along when the queue is pickled.

        Args:
            token: the bot's token, with or without ``Bot`` before it.
            path: the file, as for ``SqliteQueue``.
            base_url: where Discord's REST API is, if not at Discord.
            settings: as for ``SqliteQueue``.

        Raises:
            GatewayBotError: the token is wrong, or Discord could not be asked.
            BrokerError, TypeError, ValueError: as ``SqliteQueue`` does; also for what cannot be a token.
        """
        limit, refresh = _from_discord(token, base_url)
        settings["refresh"] = refresh
        return cls(path, limit, **settings)


class RedisQueue(SharedQueue):
    """Every process of any number of machines: an account in a Redis (or Valkey) server.

    Needs redis-py: ``pip install gateway-queue-sync[redis]``. Spacing, order, budget and limits hold
    over all queues of one ``name`` on one server. While its primary is the same, two permits of a
    bucket are never too close, unless its host's clock is set forward; while two primaries are at work
    in a failover, one permit of a bucket may come early. An account that is new or was lost grants
    nothing for one window, nor does a server that was restarted or has failed over. It pickles as
    its settings, a URL's password included, and works on in a forked child.

    Args:
        client_or_url: ``redis://...``, ``rediss://...`` (TLS) or ``unix://...`` (in which a password
            is percent-encoded), or a client of redis-py's, which is used as it is: its pool, retries,
            TLS, Sentinel or Cluster. A call takes as long as the client's ``socket_timeout`` and
            retries let it; one made for a URL, 1 s.
        limit: as for ``SqliteQueue``.
        name: which account on the server: one for each bot. All its keys are in one hash slot.
        refresh: as for ``SqliteQueue``, and so are the others.
        reserve: session starts.
        when_exhausted: ``"wait"`` or ``"raise"``.
        period: seconds.
        interval: seconds.
        margin: seconds, at least 0.02; longer than a round trip to the server.
        lease: seconds.
        clock: what tells the time; given another than the system's, the server goes by it, too.
        observer: called with each event.

    Raises:
        ImportError: redis-py is not installed.
        BrokerError: the server cannot be reached, or refuses.
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        client_or_url: Client | str,
        limit: SessionStartLimit | None = None,
        **settings: Unpack[SharedSettings],
    ) -> None:
        self._client_or_url, self._settings = client_or_url, settings
        super().__init__(redis_ledger(client_or_url), limit, **settings)

    def __reduce__(self) -> tuple[object, ...]:
        from gateway_queue_sync.ledgers.redis import portable  # noqa: PLC0415 - an extra

        return _made_again, (type(self), *portable(self._client_or_url), self._settings)

    @classmethod
    def from_token(
        cls,
        token: str,
        client_or_url: Client | str,
        *,
        base_url: str | None = None,
        **settings: Unpack[SharedSettings],
    ) -> Self:
        """Read the limit from Discord now, and again whenever it resets; one process does for all.

        Blocks while it reads. The token is kept for the re-reading; it shows in no log, repr or
        error, but it goes along when the queue is pickled.

        Args:
            token: the bot's token, with or without ``Bot`` before it.
            client_or_url: the server, as for ``RedisQueue``.
            base_url: where Discord's REST API is, if not at Discord.
            settings: as for ``RedisQueue``.

        Raises:
            GatewayBotError: the token is wrong, or Discord could not be asked.
            BrokerError, TypeError, ValueError: as ``RedisQueue`` does; also for what cannot be a token.
        """
        limit, refresh = _from_discord(token, base_url)
        settings["refresh"] = refresh
        return cls(client_or_url, limit, **settings)


class HttpQueue(SharedQueue):
    """Every process that reaches a broker: an account that ``python -m gateway_queue_sync serve`` keeps.

    Spacing, order, budget and limits hold over all queues of one broker and the clients of its plain
    wire, in any language. What the broker promises when machines fail is what its own ledger does.
    It pickles as its settings, the secret included, and works on in a forked child.

    Args:
        url: the broker's, such as ``http://127.0.0.1:8787``; ``https://`` through a proxy that has it.
        limit: as for ``SqliteQueue``.
        secret: what the broker was given to ask for; it shows in no log, repr or error.
        name: to be left out; a broker keeps one account.
        refresh: as for ``SqliteQueue``, and so are the others. A call takes 2 s at most.
        reserve: session starts.
        when_exhausted: ``"wait"`` or ``"raise"``.
        period: seconds.
        interval: seconds.
        margin: seconds, at least 0.02; longer than a round trip to the broker, since a permit's age is
            counted from when it was asked for.
        lease: seconds.
        clock: what tells the time here; the broker has its own.
        observer: called with each event.

    Raises:
        BrokerError: the broker cannot be reached, or refuses.
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        url: str,
        limit: SessionStartLimit | None = None,
        *,
        secret: str | None = None,
        **settings: Unpack[SharedSettings],
    ) -> None:
        self._given = url, secret
        self._settings = settings
        super().__init__(http_ledger(url, secret), limit, **settings)

    def __reduce__(self) -> tuple[object, ...]:
        url, secret = self._given
        return _made_again, (partial(type(self), secret=secret), str, (url,), self._settings)

    @classmethod
    def from_token(
        cls,
        token: str,
        url: str,
        *,
        secret: str | None = None,
        base_url: str | None = None,
        **settings: Unpack[SharedSettings],
    ) -> Self:
        """Read the limit from Discord now, and again whenever it resets; one process does for all.

        Blocks while it reads. The token is kept for the re-reading; it shows in no log, repr or
        error, but it goes along when the queue is pickled.

        Args:
            token: the bot's token, with or without ``Bot`` before it.
            url: the broker's, as for ``HttpQueue``.
            secret: as for ``HttpQueue``.
            base_url: where Discord's REST API is, if not at Discord.
            settings: as for ``HttpQueue``.

        Raises:
            GatewayBotError: the token is wrong, or Discord could not be asked.
            BrokerError, TypeError, ValueError: as ``HttpQueue`` does; also for what cannot be a token.
        """
        limit, refresh = _from_discord(token, base_url)
        settings["refresh"] = refresh
        return cls(url, limit, secret=secret, **settings)
