"""The ledger of one machine: an SQLite file that any number of processes open.

Each request is one ``BEGIN IMMEDIATE`` transaction around ``turns.answer``. Spacing runs on the
monotonic clock, which all processes of a machine share; the budget runs on wall time, which a reboot
does not set back. Nothing is synced to the disk: a process that is killed loses nothing by that, and
after a reboot the windows are started anew in any case.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sqlite3
import stat
import threading
import time
import weakref
from pathlib import Path

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.errors import BrokerError, reentered
from gateway_queue_sync.ledgers.shared import SharedLedger, Terms
from gateway_queue_sync.ledgers.tables import APPLICATION_ID, CREATE, SCHEMA_VERSION, Tables
from gateway_queue_sync.messages import Reply, Request
from gateway_queue_sync.rules import MICROSECOND
from gateway_queue_sync.turns import answer

log = logging.getLogger("gateway_queue_sync")

BUSY_TIMEOUT = 0.02  # s that SQLite waits for others by itself, deaf to Ctrl-C
PATIENCE = 5.0  # s for what nobody tries again
IN_USE_US = 60 * MICROSECOND  # for so long somebody who keeps another time counts as being there
REMOTE = ("nfs", "cifs", "smb", "9p", "fuse.", "afs", "ceph", "gluster", "lustre", "gpfs")


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
        self._time_kept = _time_kept() if clock is SYSTEM_CLOCK else "given by hand"
        super().__init__(terms, clock)

    def _begin(self) -> None:
        super()._begin()
        self._io = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._closer: weakref.finalize[..., SqliteLedger] | None = None
        self._file: tuple[int, int] | None = None
        self._closed = False

    def __repr__(self) -> str:
        name = "" if self._name == "default" else f" ({self._name})"
        return f"SQLite file {str(self._path)!r}{name}"

    def begin_anew_after_fork(self) -> None:
        """Be another process, with a connection of its own.

        The parent's is abandoned, unused and unclosed for good: closing it could wait for a lock of
        the parent's, or roll back what the parent is just writing.
        """
        if self._connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
        if self._closer is not None:
            self._closer.detach()
        super().begin_anew_after_fork()

    def carry(self, request: Request) -> Reply:
        """Answer a request within one transaction.

        One that nobody would try again waits a while for others who hold the file.
        """
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                return self._carry(request)
            except sqlite3.Error as error:
                if _is_busy(error):
                    if (request.order or request.look) and time.monotonic() < give_up:
                        continue
                else:
                    self._disconnect()  # what is wrong with the file may be gone when it is opened anew
                raise BrokerError(f"{self!r}: {_explained(error)}") from error
            except OSError as error:
                self._disconnect()
                raise BrokerError(f"{self!r}: {error.strerror or error}") from error

    def _carry(self, request: Request) -> Reply:
        if self._io._is_owned():  # type: ignore[attr-defined]
            raise reentered()
        with self._io:
            while True:
                connection = self._connected(create=bool(request.owner))
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    if self._is_current():
                        reply = self._answer(connection, request)
                        connection.execute("COMMIT")
                        return reply
                finally:
                    if connection.in_transaction:
                        connection.rollback()
                    if self._closed:
                        self._disconnect()
                log.warning("%r was deleted or replaced; going on with what is there now", self)
                self._disconnect()

    def _answer(self, connection: sqlite3.Connection, request: Request) -> Reply:
        self._check_schema(connection, create=bool(request.owner))
        now_us, wall_us = self._clock.now_us(), self._clock.wall_us()
        tables = Tables(connection, self._name, self._time_kept, wall_us)
        last = tables.last_clock()
        if last is not None and request.owner and not _is_same_time(last[0], self._time_kept):
            self._change_clock(tables, *last, now_us, wall_us)
        return answer(tables, request, now_us, wall_us)

    def _check_schema(self, connection: sqlite3.Connection, *, create: bool) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == SCHEMA_VERSION:
            return
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION_ID and tables:
            raise BrokerError(f"{self!r} belongs to another program") from ValueError(application)
        if tables or not create:
            what = f"schema {version}; this version reads {SCHEMA_VERSION}" if tables else "nothing"
            raise BrokerError(f"{self!r} holds {what}") from ValueError(version)
        for statement in CREATE:
            connection.execute(statement)

    def _change_clock(
        self, tables: Tables, kept: str, touched_us: int, now_us: int, wall_us: int
    ) -> None:
        """Go on by this process's clock with what was kept by another one."""
        same_boot = kept.split()[:1] == self._time_kept.split()[:1]
        if same_boot and abs(wall_us - touched_us) < IN_USE_US:
            raise BrokerError(
                f"{self!r} is in use by processes of another time namespace, whose monotonic clock "
                "cannot be compared with this one's; give each namespace a file of its own"
            ) from ValueError(kept)
        log.warning("%r was kept by another clock (a reboot?); no bucket grants for a window", self)
        tables.begin_windows_anew(now_us)

    # --- the file ---------------------------------------------------------------------------------

    def _connected(self, *, create: bool) -> sqlite3.Connection:
        if self._connection is not None:
            if self._connection.in_transaction:  # an interrupt came in the way of ending it
                self._connection.rollback()
            return self._connection
        self._file = _secured(self._path, create=create)
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        self._closer = weakref.finalize(self, connection.close)
        self._connection = connection
        connection.execute("PRAGMA journal_mode = TRUNCATE")
        connection.execute("PRAGMA synchronous = OFF")
        file_system = _remote_file_system(self._path)
        if file_system is not None:
            log.warning(
                "%r is on a network file system (%s): locks may not hold there, and then the spacing "
                "does not either; use a local disk, or RedisQueue",
                self,
                file_system,
            )
        return connection

    def _is_current(self) -> bool:
        """Return whether the open file is still the one of that name."""
        try:
            return _identity(self._path.stat()) == self._file
        except FileNotFoundError:
            return False

    def _disconnect(self) -> None:
        with self._io:
            connection, self._connection = self._connection, None
            if self._closer is not None:
                self._closer.detach()
            if connection is not None:
                connection.close()

    def close(self) -> None:
        self._closed = True
        if not self._io._is_owned():  # type: ignore[attr-defined]
            self._disconnect()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _secured(path: Path, *, create: bool) -> tuple[int, int]:
    """Return which file it is, after making sure that it is ours alone.

    It is not opened if it exists: closing it would drop the locks that this process has on it.
    """
    if create:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, flags, 0o600))
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(None, "is no regular file")
    if hasattr(os, "geteuid"):
        if found.st_uid != os.geteuid():
            raise OSError(None, f"belongs to user {found.st_uid}, not to {os.geteuid()}")
        if stat.S_IMODE(found.st_mode) & 0o077:
            log.warning("%s could be read by other users; now it cannot", path)
            path.chmod(0o600)
    return _identity(found)


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


def _time_kept() -> str:
    """Return what tells this machine's monotonic clock from others: its boot and time namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"  # noqa: PTH115 - it is no path
    except OSError:
        return str(SYSTEM_CLOCK.wall_us() - SYSTEM_CLOCK.now_us())


def _is_same_time(one: str, other: str) -> bool:
    """Return whether two of these are one clock; where a machine has no boot id, more or less."""
    if one.isdigit() and other.isdigit():
        return abs(int(one) - int(other)) < IN_USE_US
    return one == other


def _remote_file_system(path: Path) -> str | None:
    """Return the type of the network file system that a file is on, ``None`` for a local one."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    found, longest = "", -1
    for line in mounts:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= longest:
            found, longest = after.split()[0], len(point)
    return found if found.startswith(REMOTE) else None
