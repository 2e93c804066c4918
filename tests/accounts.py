"""The accounts that queues keep, for the tests that all pass: in memory, SQLite, Redis, a broker."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway_queue_sync import (
    GatewayQueue,
    HttpQueue,
    LargeBotQueue,
    LocalQueue,
    RedisQueue,
    SqliteQueue,
    serve,
)
from gateway_queue_sync.clock import Clock
from gateway_queue_sync.testing import FakeClock

NAMES = ("memory", "sqlite", "redis", "http")
WINDOW = {"interval": 5.0, "margin": 0.25}
NEVER_HEARD_OF = 1_000_000.0  # s: no poll comes between what a test drives

_serials = itertools.count()


class InMemory:
    """Each queue has an account of its own."""

    def close(self) -> None:
        """Nothing is held open."""

    def local(self, **settings: Any) -> GatewayQueue:
        return LocalQueue(**settings)

    def large(self, limit: Any, **settings: Any) -> GatewayQueue:
        return LargeBotQueue(limit, **settings)


class Shared:
    """One account, past its first window; ``queue`` is what another process would make."""

    def __init__(self, make: Callable[..., GatewayQueue]) -> None:
        self._make = make
        self._begun = False

    def close(self) -> None:
        """Nothing is held open but by the queues."""

    def queue(self, limit: Any = None, *, clock: Clock, **settings: Any) -> GatewayQueue:
        settings.setdefault("lease", NEVER_HEARD_OF)
        if not self._begun and isinstance(clock, FakeClock):
            self._begun = True
            window = {name: settings.get(name, value) for name, value in WINDOW.items()}
            self._make(clock=clock, **window).close()
            clock.advance(sum(window.values()))
        return self._make(limit, clock=clock, **settings)

    large = local = queue


class ByBroker(Shared):
    """An account in SQLite that a broker keeps, which goes by the clock of the first queue."""

    def __init__(self, file: Path) -> None:
        super().__init__(self._ask)
        self._file = file
        self._open = contextlib.ExitStack()
        self._url = ""

    def _ask(self, *args: Any, **settings: Any) -> GatewayQueue:
        if not self._url:
            window = {name: settings.get(name, value) for name, value in WINDOW.items()}
            own = SqliteQueue(self._file, clock=settings["clock"], lease=NEVER_HEARD_OF, **window)
            self._url = self._open.enter_context(serve(self._open.enter_context(own), port=0)).url
        return HttpQueue(self._url, *args, **settings)

    def close(self) -> None:
        self._open.close()


def make(name: str, folder: Path, redis_url: Callable[[], str]) -> InMemory | Shared:
    if name == "memory":
        return InMemory()
    if name == "http":
        return ByBroker(folder / "q.sqlite3")
    if name == "sqlite":
        return Shared(
            lambda *args, **settings: SqliteQueue(folder / "q.sqlite3", *args, **settings)
        )
    account = f"test-{next(_serials)}"
    url = redis_url()
    return Shared(lambda *args, **settings: RedisQueue(url, *args, name=account, **settings))
