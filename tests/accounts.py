"""The accounts that queues keep, for the tests that all pass: in memory, SQLite, Redis, a broker."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
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
from gateway_queue_sync.ledgers.remote import RemoteLedger
from gateway_queue_sync.ledgers.shared.backend import Backend
from gateway_queue_sync.queue import scheduler_of
from gateway_queue_sync.testing import FakeClock

NAMES = ("memory", "sqlite", "redis", "http")
WINDOW = {"interval": 5.0, "margin": 0.25}
NEVER_HEARD_OF = 60.0  # s, the longest lease: no other request comes for 20 s

_serials = itertools.count()


def backend_of(queue: GatewayQueue) -> Backend:
    """Return what a queue's worker asks for permits."""
    ledger = scheduler_of(queue).ledger
    assert isinstance(ledger, RemoteLedger)
    return ledger.backend


earlier_workers: set[threading.Thread] = set()
"""Those of earlier tests, on clocks that stand still now."""


def workers() -> set[threading.Thread]:
    """Return the workers of all queues."""
    return {one for one in threading.enumerate() if one.name == "gateway-queue-worker"}


def wait_for_workers(clock: FakeClock | None = None) -> None:
    """Wait until the workers of closed queues have sent their last requests, and ended.

    One whose ledger is out of reach tries again: the clock is moved on for it.
    """
    give_up = time.monotonic() + 20
    while workers() - earlier_workers:
        assert time.monotonic() < give_up, "a worker does not end"
        time.sleep(0.001)
        if clock is not None:
            clock.advance(1)


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
        if not self._begun and hasattr(clock, "advance"):  # one that is driven by hand
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
