"""A shared ledger in memory, for tests of the code between a process and its ledger."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from memory_store import MemoryStore

from gateway_queue_sync import GatewayQueue, SessionStartLimit
from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.ledgers.remote import RemoteLedger
from gateway_queue_sync.ledgers.shared.backend import Backend
from gateway_queue_sync.ledgers.shared.messages import Reply, Request
from gateway_queue_sync.settings import Settings


class MemoryBackend:
    """What ``backend.Backend`` says, over a ``MemoryStore``.

    Attributes:
        relayed: the requests of other processes, as they came.
        before: is called before each request, and may raise.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.store = MemoryStore()
        self.relayed: list[Request] = []
        self.before: Callable[[], object] = lambda: None
        self._clock = clock
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "memory of a test"

    def ask(self, request: Request) -> Reply:
        return self._answer(request._replace(sent_us=self._clock.now_us()))

    def relay(self, request: Request) -> Reply:
        self.relayed.append(request)
        return self._answer(request)

    def _answer(self, request: Request) -> Reply:
        self.before()
        with self._lock:
            return self.store.answer(request, self._clock.now_us(), self._clock.wall_us())

    def before_fork(self) -> None:
        pass

    def after_fork_in_parent(self) -> None:
        pass

    def begin_in_child(self) -> None:
        pass

    def close(self) -> None:
        pass


def queue_on(
    backend: Backend, limit: SessionStartLimit | None = None, **settings: Any
) -> GatewayQueue:
    """Return a queue on a ledger that processes share."""
    return GatewayQueue(partial(_opened, backend, limit), Settings(**settings))


def _opened(backend: Backend, limit: SessionStartLimit | None, settings: Settings) -> RemoteLedger:
    ledger = RemoteLedger(backend, settings, limit)
    try:
        ledger.open(can_read=settings.refresh is not None)
    except BaseException:
        ledger.close()
        raise
    return ledger
