"""The ledger of one machine: an SQLite file that any number of processes open.

Each request is one ``BEGIN IMMEDIATE`` transaction around ``turns.answer``. Spacing runs on the
monotonic clock, which all processes of a machine share; the budget runs on wall time, which a reboot
does not set back. Nothing is synced to the disk: a process that is killed loses nothing by that, and
after a reboot the windows are started anew in any case.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sqlite3
import threading
import time
import weakref
from pathlib import Path

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.errors import LedgerError, reentered
from gateway_queue_sync.ledgers.file import OpenFile, remote_file_system
from gateway_queue_sync.ledgers.shared import SharedLedger, Terms
from gateway_queue_sync.ledgers.tables import CREATE, Kept, Tables
from gateway_queue_sync.messages import Reply, Request
from gateway_queue_sync.models import US_PER_SECOND
from gateway_queue_sync.turns import answer

log = logging.getLogger("gateway_queue_sync")

IN_USE_US = 60 * US_PER_SECOND  # for so long somebody who keeps another time counts as being there


class SqliteLedger(SharedLedger):
    """An account in an SQLite file.

    Args:
        path: the file; it is made if it is not there, for its owner's eyes only.
        name: which account in the file.
        terms: what this process wants of it.
        clock: what tells the time; every process of the file must have the same.
    """

    shares_clock = True

    def __init__(self, path: str, name: str, terms: Terms, clock: Clock) -> None:
        self._path = Path(path)
        self._name = name
        self._boot = _boot()
        self._closed = False
        super().__init__(terms, clock)

    def _begin(self) -> None:
        super()._begin()
        self._io = threading.RLock()
        self._file: OpenFile | None = None
        self._closer: weakref.finalize[..., SqliteLedger] | None = None
        self._opened_anew = False  # and nothing was asked of the file since

    def __repr__(self) -> str:
        name = "" if self._name == "default" else f" ({self._name})"
        return f"SQLite file {str(self._path)!r}{name}"

    def carry(self, request: Request, patience: float = 0.0) -> Reply:
        """Answer a request within one transaction."""
        if self._io._is_owned():  # type: ignore[attr-defined]
            raise reentered()
        give_up = time.monotonic() + patience
        while True:
            first = self._file is None
            try:
                return self._carry(request)
            except sqlite3.Error as error:
                if _is_busy(error):
                    if time.monotonic() < give_up:
                        continue
                else:
                    self._disconnect()
                    if not first:
                        continue  # what is wrong may be what the connection remembers
                raise LedgerError(f"{self!r}: {_explained(error)}") from error
            except OSError as error:
                self._disconnect()
                raise LedgerError(f"{self!r}: {error.strerror or error}") from error

    def _is_inside(self) -> bool:
        return super()._is_inside() or bool(self._io._is_owned())  # type: ignore[attr-defined]

    def _carry(self, request: Request) -> Reply:
        with self._io:
            while True:
                file = self._opened(create=bool(request.owner))
                connection = file.connection
                try:
                    connection.execute("BEGIN IMMEDIATE" if request.owner else "BEGIN")
                    if file.is_current():
                        reply = self._answer(file, request)
                        connection.execute("COMMIT")
                        self._opened_anew = False
                        return reply
                finally:
                    if connection.in_transaction:
                        connection.rollback()
                    if self._closed:
                        self._disconnect()
                log.warning("%r was deleted or replaced; going on with what is there now", self)
                self._disconnect()

    def _answer(self, file: OpenFile, request: Request) -> Reply:
        if not file.holds_tables():
            if not request.owner:
                raise LedgerError(f"{self!r} holds nothing") from LookupError()
            for statement in CREATE:
                file.connection.execute(statement)
        now_us, wall_us = self._clock.now_us(), self._clock.wall_us()
        kept = Kept(self._which_clock(), file.inode, wall_us)
        tables = Tables(file.connection, self._name, kept)
        try:
            if request.owner:
                self._check_kept(tables, kept, now_us)
            return answer(tables, request, now_us, wall_us)
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            raise LedgerError(f"{self!r} holds nonsense: {error!r}") from error

    # --- what was kept, and how -------------------------------------------------------------------

    def _which_clock(self) -> str:
        """Return what tells the clock of this process from others, by which spacing cannot go.

        Where a machine does not tell its boots apart, that is when its clock was at zero.
        """
        if self._clock is not SYSTEM_CLOCK:
            return "given by hand"
        return self._boot or str(self._clock.wall_us() - self._clock.now_us())

    def _check_kept(self, tables: Tables, mine: Kept, now_us: int) -> None:
        """Start the windows anew if the account was kept by another clock, or is from another file."""
        last = tables.last_kept()
        if last is None:
            return
        if not _is_same_clock(last.clock, mine.clock):
            same_boot = last.clock.split()[:1] == mine.clock.split()[:1]
            if same_boot and abs(mine.touched_us - last.touched_us) < IN_USE_US:
                raise LedgerError(
                    f"{self!r} is in use by processes of another time namespace, whose monotonic "
                    "clock cannot be compared with this one's; give each a file of its own"
                ) from ValueError(last.clock)
            why = "was kept by another clock (a reboot?)"
        elif self._opened_anew and last.inode != mine.inode:  # and nobody has noticed before
            why = "was replaced by a copy, which may be older"
        else:
            return
        log.warning("%r %s: no bucket grants for a window", self, why)
        tables.begin_windows_anew(now_us)

    # --- the file ---------------------------------------------------------------------------------

    def _opened(self, *, create: bool) -> OpenFile:
        if self._file is None:
            file = OpenFile(self._path, create=create)
            self._opened_anew = True
            self._closer = weakref.finalize(self, file.close)
            self._closer.atexit = False  # a worker may be in the midst of a statement then
            self._file = file
            file_system = remote_file_system(self._path)
            if file_system is not None:
                log.warning(
                    "%r is on a network file system (%s): locks may not hold there, and then the "
                    "spacing does not either; use a local disk, or RedisQueue",
                    self,
                    file_system,
                )
        elif self._file.connection.in_transaction:  # an interrupt came in the way of ending it
            self._file.connection.rollback()
        return self._file

    def _disconnect(self) -> None:
        with self._io:
            file, self._file = self._file, None
            if self._closer is not None:
                self._closer.detach()
            if file is not None:
                file.close()

    def close(self) -> None:
        self._closed = True
        if not self._io._is_owned():  # type: ignore[attr-defined]
            self._disconnect()

    # --- forks ------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Let no transaction be under way: SQLite in the child would wait for its end for ever."""
        self._io.acquire()

    def after_fork_in_parent(self) -> None:
        self._io.release()

    def after_fork_in_child(self) -> None:
        """Be another process, with a connection of its own; the parent's is never used nor closed."""
        if self._file is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._file.connection))
        if self._closer is not None:
            self._closer.detach()
        super().after_fork_in_child()


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


def _explained(error: sqlite3.Error) -> str:
    """Return what is wrong, and what to do about it where that is not obvious."""
    if _is_busy(error):
        return "another process holds it locked"
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"{error}; to begin anew move it away, and give the limit that is left"
    return str(error)


def _boot() -> str | None:
    """Return what tells this machine's monotonic clock from others: its boot and time namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return None
    try:
        return f"{boot} {os.readlink('/proc/self/ns/time')}"  # noqa: PTH115 - it is no path
    except OSError:
        return boot


def _is_same_clock(one: str, other: str) -> bool:
    """Return whether two of these are one clock; where a machine has no boot id, more or less."""
    if one.isdigit() and other.isdigit():
        return abs(int(one) - int(other)) < IN_USE_US
    return one == other
