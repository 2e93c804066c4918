"""The file that an SQLite ledger is kept in: opened with care, and noticed when it is another one."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
from pathlib import Path

from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.tables import APPLICATION_ID, SCHEMA_VERSION

log = logging.getLogger("gateway_queue_sync")

BUSY_TIMEOUT = 0.02  # s that SQLite waits for others by itself, deaf to Ctrl-C
REMOTE = ("nfs", "cifs", "smb", "9p", "fuse.", "afs", "ceph", "gluster", "lustre", "gpfs")


class OpenFile:
    """A connection to a file.

    The file itself is never opened beside it: closing it would drop the locks that this process has.

    Attributes:
        connection: SQLite's.
        inode: what tells the file from others of its name, in whichever container.

    Args:
        path: where the file is.
        create: whether to make it if it is not there, for its owner's eyes only; if not, this is for
            one who only looks: nothing is changed, and whoever may read it may look.

    Raises:
        OSError, sqlite3.Error: it cannot be opened, or not yet.
        LedgerError: it is not this library's, or not this version's.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        found = _owned(path, create=create)
        self._found = found
        self.inode = str(found.st_ino)
        self.connection = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        try:
            self.holds_tables()  # before anything is changed in a file that is not ours
            if not create:
                return
            self.connection.execute("PRAGMA journal_mode = TRUNCATE")
            self.connection.execute("PRAGMA synchronous = OFF")
            if hasattr(os, "geteuid") and stat.S_IMODE(found.st_mode) & 0o077:
                log.warning("%s could be read by other users; now it cannot", path)
                path.chmod(0o600)
        except BaseException:
            self.connection.close()
            raise

    def holds_tables(self) -> bool:
        """Return whether the tables are there; false if there are none at all.

        Raises:
            LedgerError: there are others, or those of another version.
        """
        run = self.connection.execute
        # First: another process may make them all just now, in one transaction.
        (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = run("PRAGMA application_id").fetchone()
        (version,) = run("PRAGMA user_version").fetchone()
        if (application, version) == (APPLICATION_ID, SCHEMA_VERSION):
            return True
        where = f"SQLite file {str(self._path)!r}"
        if tables and application != APPLICATION_ID:
            raise LedgerError(f"{where} belongs to another program") from ValueError(application)
        if tables:
            raise LedgerError(
                f"{where} holds schema {version}; this version reads {SCHEMA_VERSION}"
            ) from ValueError(version)
        return False

    def is_current(self) -> bool:
        """Return whether the open file is still the one of that name."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, self._found)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def _owned(path: Path, *, create: bool) -> os.stat_result:
    """Return what kind of file it is; make sure that it is there and ours, or just that it is a file."""
    if create:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, flags, 0o600))
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(None, "is no regular file")
    if create and hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise OSError(None, f"belongs to user {found.st_uid}, not to {os.geteuid()}")
    return found


def remote_file_system(path: Path) -> str | None:
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
