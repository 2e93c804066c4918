"""The queues to choose from. Each is a ``GatewayQueue`` with another kind of ledger."""

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
"""Seconds over which processes spread their reads of the limit, since all of them read at a reset."""


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
        """Make a queue that reads the limit from Discord: now, at resets, and every ten minutes of use.

        Of processes that share a ledger one reads for all, and none reads if that was done within the
        last minute. Blocks for at most 5 seconds until the limit is known; for at most 1 second if the
        ledger has a limit that is only to be renewed. If the limit cannot be read, a WARNING says so
        and no permit is granted until it can. The token is in no log, repr or error, but a pickled
        queue contains it.

        Args:
            token: the bot's token, with or without ``Bot`` before it.
            where: the arguments of the class before the limit, such as the path of a ``SqliteQueue``.
            base_url: the URL of the REST API, if it is not Discord's.
            settings: as for the class; ``reread_after`` is the ten minutes, in seconds.

        Raises:
            GatewayBotError: the token is wrong; with ``when_unreachable="raise"``, the limit is not
                known and could not be read.
            LedgerError, TypeError, ValueError: as for the class; the token cannot be one.
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
    """Grants each permit at once: for a bot behind a gateway proxy that queues.

    It has no window and no limit, and ignores ``update``.
    """

    def __init__(self) -> None:
        super().__init__(NoLedger, Settings(margin=0))

    def update(self, limit: SessionStartLimit) -> None:
        """Ignore the limit."""


class LocalQueue(GatewayQueue):
    """One process, one bucket: for a bot whose ``max_concurrency`` is 1.

    It has no session start limit until ``update`` gives it one; then it also has that limit's buckets.

    Args:
        interval: seconds between two permits of a bucket: Discord's 5.
        margin: seconds added for the time from the grant to the arrival of the IDENTIFY. If a permit
            takes longer to reach its caller, it is given back and the call waits again. With 0 the
            spacing holds at the grant, not at the caller.
        clock: the clock; ``testing.FakeClock`` in tests.
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
    """One process, ``max_concurrency`` buckets, and the day's session start limit.

    Args:
        limit: the session start limit to begin with, as Discord gives it now; ``None``: nothing is
            granted until ``refresh`` has read it.
        refresh: a function that reads the limit and returns it. It is called at each reset and after
            ``reread_after`` seconds, in a thread of its own. If it raises, a WARNING says so, and it
            is called again after a pause that grows from 5 seconds to 5 minutes (or the error's
            ``retry_after``, if that is longer); from 5 seconds after a reset, the last known total
            counts. Give it a timeout: if it never returns, the limit is not read again.
        reread_after: seconds after which a queue that is used reads the limit again, since other
            programs may start sessions with the same token; ``None``: only at resets.
        reserve: session starts that are never used: at ``remaining <= reserve`` no permit is granted.
        when_exhausted: ``"wait"`` for the reset, or ``"raise"`` ``SessionLimitExhausted``.
        when_unreachable: if the first limit cannot be read, ``"wait"`` for it in
            ``acquire``, or ``"raise"`` in ``from_token``.
        period: seconds from the first grant after a reset to the next reset.
        interval: seconds between two permits of a bucket: Discord's 5.
        margin: seconds added to it, as for ``LocalQueue``.
        clock: the clock; ``testing.FakeClock`` in tests.
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
    """Return the backend of an SQLite file."""
    from gateway_queue_sync.ledgers.shared.sqlite import SqliteBackend  # noqa: PLC0415 - loads sqlite3

    return SqliteBackend(_file(path), settings.name, settings.clock)


def redis_backend(client_or_url: Client | str, settings: Settings) -> Backend:
    """Return the backend of a Redis server."""
    from gateway_queue_sync.ledgers.shared.redis import RedisBackend, checked  # noqa: PLC0415 - an extra

    return RedisBackend(checked(client_or_url), settings.name, settings.clock)


def http_backend(url: str, secret: str | None, settings: Settings) -> Backend:
    """Return the backend of a broker."""
    from gateway_queue_sync.ledgers.shared.http import HttpBackend  # noqa: PLC0415 - loads http.client

    return HttpBackend(url, secret, settings.name)


def _shared(
    backend: Callable[[Settings], Backend], limit: SessionStartLimit | None
) -> Callable[[Settings], RemoteLedger]:
    """Return a function that opens a shared ledger, with a limit if there is one."""
    return partial(open_ledger, backend, limit)


def _made_again(
    queue: Callable[..., GatewayQueue],
    make: Callable[..., object],
    given: tuple[object, ...],
    settings: Settings,
) -> GatewayQueue:
    """Make a queue that was pickled, with the same arguments and settings."""
    names = (field.name for field in fields(Settings))
    return queue(make(*given), **{name: getattr(settings, name) for name in names})


class SqliteQueue(_ReadsLimit):
    """For all processes of one machine, or one that a supervisor restarts: an account in an SQLite file.

    It needs no server. The account survives crashes, ``kill -9`` and restarts, so a bot that crashes in
    a loop stops at its reserve. Spacing, order and the session start limit hold over all queues with the
    same file. A queue can be pickled, for ``multiprocessing``, and works in a forked child. A new file
    grants its first permit after one window.

    Args:
        path: the file, on a local disk; it is created if it does not exist. Not in a folder whose
            files other programs delete, such as /tmp.
        limit: the session start limit to begin with. Within the period that the file has stored, the
            smaller ``remaining`` counts, so a restart refills nothing. ``None``: what is stored, or
            Discord's default (1000 a day, ``max_concurrency`` 1).
        name: the account in the file; each bot needs its own.
        refresh: a function that reads the limit and returns it. It is called at a reset and after
            ``reread_after`` seconds, in one process for all. If it raises, a WARNING says so, the last
            known total counts, and it is called again after a pause that grows from 5 seconds to 5
            minutes. Give it a timeout: if it never returns, this process does not read again.
        reread_after: seconds after which an account that is used has its limit read again; ``None``:
            only at resets.
        reserve: session starts that are never used: at ``remaining <= reserve`` no permit is granted.
        when_exhausted: ``"wait"`` for the reset, or ``"raise"`` ``SessionLimitExhausted``.
        when_unreachable: if the ledger (or Discord, for a first limit) cannot be reached when the
            queue is made, ``"wait"`` for it in ``acquire``, with a WARNING, or ``"raise"`` at once.
        period: seconds from the first grant after a reset to the next reset, 48 hours at most. Give
            all processes the same value: that of the process which grants first counts.
        interval: seconds between two permits of a bucket: Discord's 5; at most 60.
        margin: seconds added to it, 0.02 to 10. If a permit takes longer to reach its caller, it is
            given back and the call waits again. If processes have different intervals or margins, the
            larger counts, with a WARNING.
        lease: seconds without a request after which a process counts as dead, 0.1 to 60. One that
            waits sends three in that time. A process that dies delays the others by 0.1 s, once.
        clock: the clock; ``testing.FakeClock`` in tests, one for all queues of the file.
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
    """For processes on any number of machines: an account in a Redis (or Valkey) server.

    Needs redis-py: ``pip install gateway-queue-sync[redis]``. Spacing, order and the session start limit
    hold over all queues with the same ``name`` on one server. Exceptions: if the host's clock is set
    forward, two permits of a bucket may be too close; while two primaries are at work in a failover,
    nothing is guaranteed (``min-replicas-to-write 1`` prevents that). No bucket grants for one window
    if the account is new or was lost, or if the server was restarted or failed over. A pickled queue
    contains its settings, including the password of a URL. It works in a forked child.

    Args:
        client_or_url: ``redis://...``, ``rediss://...`` (TLS) or ``unix://...`` (in which a password
            is percent-encoded), or a client of redis-py, with its own pool, retries, TLS, Sentinel or
            Cluster. The client's ``socket_timeout`` and retries limit how long a call takes; for a
            URL, that is 1 s.
        limit: as for ``SqliteQueue``.
        name: the account on the server; each bot needs its own. All its keys are in one hash slot.
        refresh: this and the following settings are as for ``SqliteQueue``.
        reread_after: seconds, or ``None``.
        reserve: session starts.
        when_exhausted: ``"wait"`` or ``"raise"``.
        when_unreachable: ``"wait"`` or ``"raise"``.
        period: seconds.
        interval: seconds.
        margin: seconds, at least 0.02; it must be longer than a round trip to the server.
        lease: seconds.
        clock: the clock. If it is not the system's, it counts on the server, too: for tests.
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
    """For processes that reach a broker: an account of ``python -m gateway_queue_sync serve``.

    Spacing, order and the session start limit hold over all queues of one broker and its clients in any
    language. When machines fail, the guarantees are those of the broker's own ledger. A call to the
    broker takes 2 s at most. A pickled queue contains its settings, including the secret. It works in a
    forked child.

    Args:
        url: the broker's, such as ``http://127.0.0.1:8787``; ``https://``, if a proxy has TLS.
        limit: as for ``SqliteQueue``.
        secret: the broker's secret, if it has one; it is in no log, repr or error.
        name: must be left out, since a broker has one account.
        refresh: this and the following settings are as for ``SqliteQueue``.
        reread_after: seconds, or ``None``.
        reserve: session starts.
        when_exhausted: ``"wait"`` or ``"raise"``.
        when_unreachable: ``"wait"`` or ``"raise"``.
        period: seconds.
        interval: seconds.
        margin: seconds, at least 0.02; it must be longer than a round trip to the broker, since a
            permit's age is counted from when the request was sent.
        lease: seconds.
        clock: the clock of this process; the broker has its own.
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
