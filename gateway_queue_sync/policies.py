"""The queues to choose from. Each is a ``GatewayQueue`` with a ledger of its own kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.events import Observer
from gateway_queue_sync.ledgers.memory import MemoryLedger, NoLedger
from gateway_queue_sync.ledgers.remote import RemoteLedger, open_ledger
from gateway_queue_sync.limit_reader import wait_for_limit
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    SessionStartLimit,
    check_limit,
)
from gateway_queue_sync.queue import GatewayQueue, scheduler_of
from gateway_queue_sync.settings import (
    DEFAULT_LEASE,
    REREAD_AFTER,
    Refresh,
    Settings,
    WhenExhausted,
    WhenUnreachable,
)

if TYPE_CHECKING:
    from gateway_queue_sync.ledgers.shared.backend import Backend
    from gateway_queue_sync.ledgers.shared.redis import Client

READ_JITTER = 1.0
"""Seconds; a fleet whose processes all read the limit at a reset spreads its reads over so many."""


def _in_memory(settings: Settings, limit: SessionStartLimit | None = None) -> MemoryLedger:
    ledger = MemoryLedger(settings)
    if limit is not None:
        ledger.adopt(check_limit(limit, settings.reserve))
    ledger.account.refresh_owed = limit is None and settings.refresh is not None
    return ledger


class _ReadsLimit(GatewayQueue):
    """A queue whose limit can be read from Discord."""

    @classmethod
    def from_token(
        cls, token: str, *where: Any, base_url: str | None = None, **settings: Any
    ) -> Self:
        """Have the limit read from Discord now, and again at each reset and every ten minutes of use.

        Of processes that share a ledger one reads for all, and none if that was done within the last
        minute. Blocks for 5 seconds at most until the limit is known (for 1 second, if the ledger knows
        one, until it is up to date). If it cannot be read, nobody is granted a permit until it is, with
        a WARNING. The token shows in no log, repr or error; it goes along when the queue is pickled.

        Args:
            token: the bot's token, with or without ``Bot`` before it.
            where: what the class takes before the limit, such as the path of a ``SqliteQueue``.
            base_url: where Discord's REST API is, if not at Discord.
            settings: as for the class; ``reread_after`` is the ten minutes, in seconds.

        Raises:
            GatewayBotError: the token is wrong; with ``when_unreachable="raise"`` also if no limit is
                known and Discord could not be asked.
            LedgerError, TypeError, ValueError: as the class raises; also for what cannot be a token.
        """
        from gateway_queue_sync.gateway_bot import GatewayBot  # noqa: PLC0415 - loads urllib

        bot = GatewayBot(token, base_url=base_url, attempts=1, jitter=READ_JITTER)
        queue = cls(*where, **settings | {"limit": None, "refresh": bot.session_start_limit})
        raises = queue._settings.when_unreachable == "raise"
        try:
            wait_for_limit(scheduler_of(queue), raises=raises)
        except BaseException:
            queue.close()
            raise
        return queue


class NoOpQueue(GatewayQueue):
    """Grants at once, always: for a bot whose gateway proxy does the queueing.

    It keeps no window and no limit, and ``update`` is ignored.
    """

    def __init__(self) -> None:
        super().__init__(NoLedger, Settings(margin=0))

    def update(self, limit: SessionStartLimit) -> None:
        """Ignore the limit."""


class LocalQueue(GatewayQueue):
    """One process, one bucket: for a bot whose ``max_concurrency`` is 1.

    It keeps no limit until ``update`` gives it one; then it also has that limit's buckets.

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
        settings = Settings(interval=interval, margin=margin, clock=clock, observer=observer)
        super().__init__(_in_memory, settings)


class LargeBotQueue(_ReadsLimit):
    """One process, a bucket for each of ``max_concurrency``, and the day's session start limit.

    Args:
        limit: the session start limit to begin with, as Discord gives it now; ``None``: nothing is
            granted until ``refresh`` has read it.
        refresh: called without arguments when the limit is to be read: at each reset, and as
            ``reread_after`` says. It runs in a thread of its own. If it raises, the last known total
            counts from 5 seconds after the reset on, with a WARNING, and it is called again after a
            pause that grows from 5 seconds to 5 minutes (not less than the error's ``retry_after``).
            If it never returns, the limit is not read again, and the last known total counts: give
            it a timeout.
        reread_after: seconds after which the limit is read again when the queue is used, since other
            programs may start sessions with the same token; ``None`` reads at resets only.
        reserve: session starts never to use up: at ``remaining <= reserve`` the queue is exhausted.
        when_exhausted: ``"wait"`` for the reset, or ``"raise"`` ``SessionLimitExhausted``.
        when_unreachable: if Discord cannot be asked for the first limit, ``"wait"`` for it in
            ``acquire``, or ``"raise"`` in ``from_token``.
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
        limit: SessionStartLimit | None,
        *,
        refresh: Refresh | None = None,
        reread_after: float | None = REREAD_AFTER,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        when_unreachable: WhenUnreachable = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> None:
        settings = Settings(
            refresh=refresh,
            reread_after=reread_after,
            reserve=reserve,
            when_exhausted=when_exhausted,
            when_unreachable=when_unreachable,
            period=period,
            interval=interval,
            margin=margin,
            clock=clock,
            observer=observer,
        )
        if limit is None and refresh is None:
            raise TypeError("limit must be a SessionStartLimit if there is no refresh to read it")
        super().__init__(partial(_in_memory, limit=limit), settings)


# --- shared by processes --------------------------------------------------------------------------


def _file(path: str | os.PathLike[str]) -> str:
    path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"path must be a str, not {type(path).__name__}")
    if not path or path == ":memory:" or "\0" in path:
        raise ValueError(f"path must name a file, not {path!r}")
    return os.path.realpath(path)


def sqlite_backend(path: str | os.PathLike[str], settings: Settings) -> Backend:
    """Return what carries requests to a file."""
    from gateway_queue_sync.ledgers.shared.sqlite import SqliteBackend  # noqa: PLC0415 - loads sqlite3

    return SqliteBackend(_file(path), settings.name, settings.clock)


def redis_backend(client_or_url: Client | str, settings: Settings) -> Backend:
    """Return what carries requests to a server."""
    from gateway_queue_sync.ledgers.shared.redis import RedisBackend, checked  # noqa: PLC0415 - an extra

    return RedisBackend(checked(client_or_url), settings.name, settings.clock)


def http_backend(url: str, secret: str | None, settings: Settings) -> Backend:
    """Return what carries requests to a broker."""
    from gateway_queue_sync.ledgers.shared.http import HttpBackend  # noqa: PLC0415 - loads http.client

    return HttpBackend(url, secret, settings.name)


def _shared(
    backend: Callable[[Settings], Backend], limit: SessionStartLimit | None
) -> Callable[[Settings], RemoteLedger]:
    """Return what opens a ledger that processes share, with a limit if there is one."""
    return partial(open_ledger, backend, limit)


def _made_again(
    queue: Callable[..., GatewayQueue],
    make: Callable[..., object],
    given: tuple[object, ...],
    settings: Settings,
) -> GatewayQueue:
    """Make a queue that was pickled, from what it was made of."""
    names = (field.name for field in fields(Settings))
    return queue(make(*given), **{name: getattr(settings, name) for name in names})


class SqliteQueue(_ReadsLimit):
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
        refresh: called without arguments when the limit is to be read: at a reset, and as
            ``reread_after`` says; one process does that for all. If it raises, the last known total
            counts, with a WARNING, and it is called again after a pause that grows from 5 seconds to 5
            minutes. If it never returns, this process does not read again: give it a timeout.
        reread_after: seconds after which the limit is read again when the account is used; ``None``
            reads at resets only.
        reserve: session starts never to use up: at ``remaining <= reserve`` the queue is exhausted.
        when_exhausted: ``"wait"`` for the reset, or ``"raise"`` ``SessionLimitExhausted``.
        when_unreachable: if the ledger (or Discord, for a first limit) is out of reach when the queue
            is made, ``"wait"`` for it in ``acquire``, with a WARNING, or ``"raise"`` at once.
        period: seconds from the first grant after a reset to the next reset, 48 hours at most. Give
            all processes the same: that of whoever makes the first grant counts.
        interval: seconds between two permits of a bucket: Discord's 5; at most 60.
        margin: seconds added to it, 0.02 to 10. A permit that took longer to come back to its
            caller is given back and asked for again. If processes disagree on interval or margin,
            the larger counts, with a WARNING.
        lease: seconds for which a process counts that was not heard of, 0.1 to 60; those that wait
            are heard of three times as often. A process that dies costs the others 0.1 s, once.
        clock: what tells the time; ``testing.FakeClock`` in tests, one for all queues of the file.
        observer: called with each event (``gateway_queue_sync.events``).

    Raises:
        LedgerError: the file cannot be used, or belongs to another bot; the message says why.
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        limit: SessionStartLimit | None = None,
        *,
        name: str = "default",
        refresh: Refresh | None = None,
        reread_after: float | None = REREAD_AFTER,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        when_unreachable: WhenUnreachable = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        lease: float = DEFAULT_LEASE,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> None:
        settings = Settings(
            name=name,
            refresh=refresh,
            reread_after=reread_after,
            reserve=reserve,
            when_exhausted=when_exhausted,
            when_unreachable=when_unreachable,
            period=period,
            interval=interval,
            margin=margin,
            lease=lease,
            clock=clock,
            observer=observer,
        )
        self._path = _file(path)
        super().__init__(_shared(partial(sqlite_backend, path), limit), settings)

    def __reduce__(self) -> tuple[object, ...]:
        return _made_again, (type(self), str, (self._path,), self._settings)


class RedisQueue(_ReadsLimit):
    """Every process of any number of machines: an account in a Redis (or Valkey) server.

    Needs redis-py: ``pip install gateway-queue-sync[redis]``. Spacing, order, budget and limits hold
    over all queues of one ``name`` on one server. While its primary is the same, two permits of a
    bucket are never too close, unless its host's clock is set forward; while two primaries are at work
    in a failover, nothing is promised (``min-replicas-to-write 1`` prevents that). An account that is
    new or was lost grants nothing for one window, nor does a server that was restarted or has failed
    over. It pickles as its settings, a URL's password included, and works on in a forked child.

    Args:
        client_or_url: ``redis://...``, ``rediss://...`` (TLS) or ``unix://...`` (in which a password
            is percent-encoded), or a client of redis-py's, which is used as it is: its pool, retries,
            TLS, Sentinel or Cluster. A call takes as long as the client's ``socket_timeout`` and
            retries let it; one made for a URL, 1 s.
        limit: as for ``SqliteQueue``.
        name: which account on the server: one for each bot. All its keys are in one hash slot.
        refresh: as for ``SqliteQueue``, and so are the others.
        reread_after: seconds, or ``None``.
        reserve: session starts.
        when_exhausted: ``"wait"`` or ``"raise"``.
        when_unreachable: ``"wait"`` or ``"raise"``.
        period: seconds.
        interval: seconds.
        margin: seconds, at least 0.02; longer than a round trip to the server.
        lease: seconds.
        clock: what tells the time; given another than the system's, the server goes by it, too.
        observer: called with each event.

    Raises:
        ImportError: redis-py is not installed.
        LedgerError: the server refuses, or cannot be reached and ``when_unreachable`` is ``"raise"``.
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        client_or_url: Client | str,
        limit: SessionStartLimit | None = None,
        *,
        name: str = "default",
        refresh: Refresh | None = None,
        reread_after: float | None = REREAD_AFTER,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        when_unreachable: WhenUnreachable = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        lease: float = DEFAULT_LEASE,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> None:
        settings = Settings(
            name=name,
            refresh=refresh,
            reread_after=reread_after,
            reserve=reserve,
            when_exhausted=when_exhausted,
            when_unreachable=when_unreachable,
            period=period,
            interval=interval,
            margin=margin,
            lease=lease,
            clock=clock,
            observer=observer,
        )
        self._client_or_url = client_or_url
        super().__init__(_shared(partial(redis_backend, client_or_url), limit), settings)

    def __reduce__(self) -> tuple[object, ...]:
        from gateway_queue_sync.ledgers.shared.redis import portable  # noqa: PLC0415 - an extra

        return _made_again, (type(self), *portable(self._client_or_url), self._settings)


class HttpQueue(_ReadsLimit):
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
        reread_after: seconds, or ``None``.
        reserve: session starts.
        when_exhausted: ``"wait"`` or ``"raise"``.
        when_unreachable: ``"wait"`` or ``"raise"``.
        period: seconds.
        interval: seconds.
        margin: seconds, at least 0.02; longer than a round trip to the broker, since a permit's age is
            counted from when it was asked for.
        lease: seconds.
        clock: what tells the time here; the broker has its own.
        observer: called with each event.

    Raises:
        LedgerError: the broker refuses, or cannot be reached and ``when_unreachable`` is ``"raise"``.
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        url: str,
        limit: SessionStartLimit | None = None,
        *,
        secret: str | None = None,
        name: str = "default",
        refresh: Refresh | None = None,
        reread_after: float | None = REREAD_AFTER,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        when_unreachable: WhenUnreachable = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        lease: float = DEFAULT_LEASE,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> None:
        settings = Settings(
            name=name,
            refresh=refresh,
            reread_after=reread_after,
            reserve=reserve,
            when_exhausted=when_exhausted,
            when_unreachable=when_unreachable,
            period=period,
            interval=interval,
            margin=margin,
            lease=lease,
            clock=clock,
            observer=observer,
        )
        self._given = url, secret
        super().__init__(_shared(partial(http_backend, url, secret), limit), settings)

    def __reduce__(self) -> tuple[object, ...]:
        url, secret = self._given
        return _made_again, (partial(type(self), secret=secret), str, (url,), self._settings)
