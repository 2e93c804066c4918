"""The ledger in an SQLite file, for the processes of one machine.

Each request is one transaction around ``turns.answer``. Windows are measured by the monotonic clock,
which all processes of a machine share; the session start limit by wall time, because the monotonic
clock begins anew at a reboot. Nothing is synced to the disk: a process that is killed loses nothing by
that, and after a reboot all buckets are closed for one window in any case.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sqlite3
import threading
import weakref
from pathlib import Path

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.errors import LedgerError, reentered
from gateway_queue_sync.ledgers.shared.backend import Busy, Unreachable
from gateway_queue_sync.ledgers.shared.messages import Reply, Request
from gateway_queue_sync.ledgers.shared.sqlite_file import BUSY_TIMEOUT, OpenFile
from gateway_queue_sync.ledgers.shared.store_sqlite import CREATE, Kept, SqliteStore
from gateway_queue_sync.ledgers.shared.turns import answer
from gateway_queue_sync.models import US_PER_SECOND

log = logging.getLogger("gateway_queue_sync")

IN_USE_US = 60 * US_PER_SECOND  # a file counts as in use for so long after its last use
TRIES = 3  # if the file is replaced meanwhile
BUSY = sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED
SPOILT = sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB
ADVICE = "; to begin anew, move it away and pass the limit that is left"


class SqliteBackend:
    """An account in an SQLite file.

    Args:
        path: the file; it is created if it does not exist, readable for its owner only.
        name: the account in the file.
        clock: the clock, which must be the same for all processes.
    """

    def __init__(self, path: str, name: str, clock: Clock) -> None:
        self._path, self._name = Path(os.path.realpath(path)), name
        self._clock = clock
        self._seen: Kept | None = None  # how the account was stored when this process last used it
        self._shared = ""  # the file system that was warned about
        self._begin()

    def _begin(self) -> None:
        self._io = threading.RLock()
        self._file: OpenFile | None = None
        self._closer: weakref.finalize[..., SqliteBackend] | None = None
        self._asks = False  # whether a request is under way
        self._closes = False  # whether to close the file at its end
        self._warnings: list[str] = []

    def __repr__(self) -> str:
        name = "" if self._name == "default" else f" ({self._name})"
        return f"SQLite file {str(self._path)!r}{name}"

    def ask(self, request: Request) -> Reply:
        """Answer a request of this process within one transaction."""
        return self._ask(request, same_clock=True)

    def relay(self, request: Request) -> Reply:
        """Answer a request of another process, by its own clock."""
        return self._ask(request, same_clock=False)

    def _ask(self, request: Request, *, same_clock: bool) -> Reply:
        if self._is_inside():
            raise reentered()
        self._closes = False
        try:
            with self._io:
                try:
                    self._asks = True
                    return self._try(request, same_clock)
                finally:
                    self._asks = False
                    if self._closes:
                        self._disconnect()
        finally:  # after the lock is released, because a log handler may be slow
            warnings, self._warnings = self._warnings, []
            for warning in warnings:
                log.warning("%r %s", self, warning)

    def _try(self, request: Request, same_clock: bool) -> Reply:
        for _ in range(TRIES):
            was_open = self._file is not None
            try:
                reply = self._transact(request, same_clock)
            except sqlite3.Error as error:
                if _code(error) in BUSY:
                    raise Busy(f"{self!r}: another process holds it locked") from error
                self._disconnect()
                if not was_open:  # else the connection may have outdated information
                    advice = ADVICE if _code(error) in SPOILT else ""
                    raise LedgerError(f"{self!r}: {error}{advice}") from error
            except OSError as error:
                self._disconnect()
                raise LedgerError(f"{self!r}: {error.strerror or error}") from error
            else:
                if reply is not None:
                    return reply
                self._warnings.append("was deleted or replaced; going on with what is there now")
                self._disconnect()
        raise Unreachable(f"{self!r} is replaced again and again") from FileNotFoundError()

    def _transact(self, request: Request, same_clock: bool) -> Reply | None:
        """Answer a request in one transaction; ``None``: the file was replaced."""
        writes = bool(request.session)
        file = self._opened(writes)
        run = file.connection.execute
        try:
            run("BEGIN IMMEDIATE" if writes else "BEGIN")
            if not file.is_current():
                return None
            if not file.has_tables and not file.check():
                if not writes:
                    raise LedgerError(f"{self!r} contains no account") from LookupError()
                for statement in CREATE:
                    run(statement)
            try:
                reply, kept, lost = self._answer(file, request, same_clock)
            except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
                raise LedgerError(f"{self!r} contains invalid data: {error!r}") from error
            if self._file is not file:  # a signal handler forked in here
                raise Busy(f"{self!r}: the transaction is the parent's")
            run("COMMIT")
        finally:
            if self._file is file and file.connection.in_transaction:
                file.connection.rollback()
        file.has_tables = True
        if writes:
            file.is_new, self._seen = False, kept
        if lost:
            self._warnings.append(f"{lost}: no bucket grants for a window")
        return reply

    def _answer(
        self, file: OpenFile, request: Request, same_clock: bool
    ) -> tuple[Reply, Kept | None, str]:
        """Return the reply, how the account is stored now, and why requests were lost, if they were."""
        now_us, wall_us = self._clock.now_us(), self._clock.wall_us()
        if same_clock:
            request = request._replace(sent_us=now_us)
        generation = 0 if self._seen is None else self._seen.generation
        now = Kept(self._clock_id(file), file.machine, file.inode, wall_us, generation)
        store = SqliteStore(file.connection, self._name, now)
        lost = self._lost(store, now, file) if request.session else ""
        reply = answer(store, request, now_us, wall_us, lost=bool(lost))
        return reply, store.kept, lost

    # --- who else uses the file -------------------------------------------------------------------

    def _clock_id(self, file: OpenFile) -> str:
        """Return what identifies the monotonic clock of this process.

        On a machine without a boot id, that is the time at which its clock was zero.
        """
        if self._clock is not SYSTEM_CLOCK:
            return "given by hand"
        return file.boot or str(self._clock.wall_us() - self._clock.now_us())

    def _lost(self, store: SqliteStore, now: Kept, file: OpenFile) -> str:
        """Return why the account may have lost requests; empty if it has not.

        If it was stored by another clock, rows with times of that clock are deleted.

        Raises:
            LedgerError: the file is in use by processes that cannot share it with this one.
        """
        last = store.kept
        if last is None:
            return ""
        if not _is_same_clock(last.clock, now.clock):
            self._check_users(last, now)
            store.reinit()
            return "was kept by another clock (a reboot?)"
        if (file.is_new and last.inode != now.inode) or last.generation < now.generation:
            return "was replaced by a copy, which may be older"
        return ""

    def _check_users(self, last: Kept, now: Kept) -> None:
        """Raise if processes with another monotonic clock have just used the file."""
        idle_us = abs(now.touched_us - last.touched_us)
        if last.clock.split()[:1] == now.clock.split()[:1]:
            if idle_us < IN_USE_US:
                raise LedgerError(
                    f"{self!r} is in use by processes of another time namespace, whose monotonic "
                    "clock cannot be compared with this one's; give each a file of its own"
                ) from ValueError(last.clock)
            return
        other = "" not in {last.machine, now.machine} and last.machine != now.machine
        seen = self._seen
        if seen is not None and seen.clock == now.clock and last.generation > seen.generation:
            other = True  # this machine was not rebooted, so another has stored the account
            idle_us = min(idle_us, abs(now.touched_us - seen.touched_us))
        if other and idle_us < IN_USE_US:
            raise LedgerError(
                f"{self!r} was used by another machine {idle_us // US_PER_SECOND} s ago, and the clocks "
                "of two machines cannot be compared: use RedisQueue or HttpQueue, or go on with the "
                f"file {IN_USE_US // US_PER_SECOND} s after the other has stopped"
            ) from ValueError(last.machine)

    # --- the file ---------------------------------------------------------------------------------

    def _opened(self, writes: bool) -> OpenFile:
        if self._file is not None and writes and not self._file.writes:
            self._disconnect()
        if self._file is None:
            file = OpenFile(self._path, writes, self._warnings)
            self._closer = weakref.finalize(self, file.connection.close)
            self._closer.atexit = False  # a worker may be in the midst of a statement then
            self._file = file
            if file.shared != self._shared:
                self._shared = file.shared
                self._warnings.append(
                    f"is on a network or shared file system ({file.shared}): locks may not hold there, "
                    "and then the spacing does not either; use a local disk, or RedisQueue"
                )
        elif self._file.connection.in_transaction:  # an interrupt came before its end
            self._file.connection.rollback()
        return self._file

    def _disconnect(self) -> None:
        file, self._file = self._file, None
        if self._closer is not None:
            self._closer.detach()
        if file is not None:
            file.connection.close()

    def _is_inside(self) -> bool:
        return bool(self._io._is_owned())  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close the file, at once or after the request that is under way."""
        self._closes = True
        if not self._is_inside() and self._io.acquire(timeout=BUSY_TIMEOUT):
            try:
                self._disconnect()
            finally:
                self._io.release()

    # --- forks ------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Wait until no transaction is under way: SQLite in the child would never see its end."""
        if not self._is_inside():
            self._io.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on after a fork."""
        if self._is_inside() and not self._asks:  # else a signal handler forked during a request
            self._io.release()

    def begin_in_child(self) -> None:
        """Open the file again when it is needed. The parent's connection is neither used nor closed."""
        if self._file is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._file.connection))
        if self._closer is not None:
            self._closer.detach()
        self._begin()


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_same_clock(one: str, other: str) -> bool:
    """Return whether two ids are of one clock; without a boot id, whether they are close enough."""
    if one.isdigit() and other.isdigit():
        return abs(int(one) - int(other)) < IN_USE_US
    return one == other
