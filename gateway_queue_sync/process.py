"""What happens to the queues of a process at a fork and at its end."""

from __future__ import annotations

import atexit
import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Protocol

from gateway_queue_sync.clock import SYSTEM_CLOCK, OwnedLock, until_complete
from gateway_queue_sync.models import US_PER_SECOND

if TYPE_CHECKING:
    from gateway_queue_sync.ledgers.remote import RemoteLedger
    from gateway_queue_sync.scheduler import Scheduler

MAX_EXIT_US = 500_000  # how long the end of a process waits for the workers of its queues


class Server(Protocol):
    """An object with sockets that a forked child must close."""

    def open_files(self) -> list[int]:
        """Return the file descriptors of its sockets."""


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_ledgers: weakref.WeakSet[RemoteLedger] = weakref.WeakSet()
_forking = OwnedLock()  # held during a fork; also protects the sets
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def register(scheduler: Scheduler) -> None:
    """Register a queue."""
    _forking.run(_schedulers.add, scheduler)


def register_ledger(ledger: RemoteLedger) -> None:
    """Register a shared ledger, before its first request."""
    _forking.run(_ledgers.add, ledger)


def register_server(server: Server) -> None:
    """Register a server, before a process may fork."""
    _servers.add(server)


# If Ctrl-C interrupts one of these, Python ignores the exception and forks. So each is repeated until
# it is complete.


def _before_fork() -> None:
    """Hold all shared ledgers, so that the child does not get one in the middle of a request.

    If two threads fork at once, one waits for the other. Otherwise each could hold what the other needs.
    """
    if not _forking._is_owned():
        _forking.acquire()
    for ledger in list(_ledgers):
        ledger.before_fork()


def _after_fork_in_parent() -> None:
    for ledger in list(_ledgers):
        ledger.after_fork_in_parent()
    if _forking._is_owned():
        _forking.release()


def _after_fork_in_child() -> None:
    _forking.reinit()
    for ledger in list(_ledgers):
        ledger.begin_in_child()
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
    """Prepare a queue for a forked child. If its ledger is in memory, the child cannot use it.

    The only thread is the one that forked. If it did so in a signal handler that interrupted its wait,
    the wait ends with an error.
    """
    scheduler.forks += 1
    scheduler.lock.reinit()
    for waiter in scheduler.lines.waiters():
        waiter.error = scheduler.forked()
        if waiter.condition is not None:
            scheduler.locked(waiter.condition.notify)
    if scheduler.reader is not None:
        scheduler.reader.reading = False
    scheduler.begin()


def _at_exit() -> None:
    """Send outstanding reports to shared ledgers, for 0.5 s at most and without a new thread."""
    deadline_us = SYSTEM_CLOCK.now_us() + MAX_EXIT_US
    for scheduler in _forking.run(list, _schedulers):
        if scheduler.remote is None or scheduler.lock.is_held():
            continue
        if scheduler.worker.is_alive():
            scheduler.close()
            scheduler.worker.join(max(0, deadline_us - SYSTEM_CLOCK.now_us()) / US_PER_SECOND)
        else:
            scheduler.remote.close()  # the worker has sent everything


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    for _ in range(2):  # an interrupt at the very beginning of ``until_complete`` ends it
        os.register_at_fork(
            before=partial(until_complete, _before_fork),
            after_in_parent=partial(until_complete, _after_fork_in_parent),
            after_in_child=partial(until_complete, _after_fork_in_child),
        )
