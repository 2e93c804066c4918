"""What happens to all queues of a process when it forks, and when it ends."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import TYPE_CHECKING, Protocol

from gateway_queue_sync.clock import SYSTEM_CLOCK
from gateway_queue_sync.models import US_PER_SECOND

if TYPE_CHECKING:
    from gateway_queue_sync.scheduler import Scheduler

MAX_EXIT_US = 500_000


class Server(Protocol):
    """Whoever has sockets that are this process's alone."""

    def open_files(self) -> list[int]:
        """Return the file descriptors of its sockets."""


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def register(scheduler: Scheduler) -> None:
    """Note that there is a queue."""
    _schedulers.add(scheduler)


def register_server(server: Server) -> None:
    """Note that there is a server."""
    _servers.add(server)


def _after_fork_in_child() -> None:
    for scheduler in list(_schedulers):
        _begin_in_child(scheduler)
    for server in list(_servers):
        _close_in_child(server.open_files())


def _close_in_child(files: list[int]) -> None:
    """Close sockets of the parent: while they are open here, nobody sees that the parent closed them.

    The descriptors then refer to the null device: the objects that they belong to close them again.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for file in files:
        os.dup2(null, file, inheritable=False)
    os.close(null)


def _begin_in_child(scheduler: Scheduler) -> None:
    """Make a queue that of a forked child; a ledger in memory stays with the parent.

    Nobody waits here but the thread that forked, perhaps in a signal handler that interrupts its wait:
    that ends with an error.
    """
    scheduler.forks += 1
    scheduler.lock.begin_anew()
    for waiter in scheduler.lines.waiters():
        waiter.error = scheduler.forked()
        if waiter.condition is not None:
            scheduler.locked(waiter.condition.notify)
    if scheduler.remote is not None:
        scheduler.remote.begin_in_child()
    if scheduler.reader is not None:
        scheduler.reader.reading = False
    scheduler.begin()


def _at_exit() -> None:
    """Send outstanding reports to remote ledgers: 0.5 s at most, and without a new thread."""
    deadline_us = SYSTEM_CLOCK.now_us() + MAX_EXIT_US
    for scheduler in list(_schedulers):
        if scheduler.remote is None or scheduler.lock.is_held():
            continue
        if scheduler.worker.is_alive():
            scheduler.close()
            scheduler.worker.join(max(0, deadline_us - SYSTEM_CLOCK.now_us()) / US_PER_SECOND)
        else:
            scheduler.remote.close()  # the worker has sent all that there was


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
