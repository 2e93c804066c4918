"""The file of an SQLite ledger: opened with care, and noticed when it is another one."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
from hashlib import blake2b
from pathlib import Path

from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared.store_sqlite import APPLICATION_ID, SCHEMA_VERSION

BUSY_TIMEOUT = 0.01  # s that SQLite waits by itself; the session tries again
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE_ID = Path("/etc/machine-id")
SHARED = (  # file systems over which machines, or a machine and its virtual ones, share files
    *("nfs", "cifs", "smb", "9p", "fuse.", "afs", "ceph", "gluster", "lustre", "gpfs", "beegfs"),
    *("gfs2", "ocfs2", "virtiofs", "vboxsf", "prl_fs", "vmhgfs", "drvfs", "orangefs", "pvfs"),
)


class OpenFile:
    """A connection to a file that was checked first.

    The file itself is never opened beside it: closing it would drop the locks that this process has.

    Attributes:
        connection: SQLite's.
        inode, machine, boot: what tells the file from copies of it, the machine from others, and its
            monotonic clock from others; empty if unknown.
        shared: the type of its file system, if machines may share that; empty if not.
        writes: whether it is for requests that write; others change nothing, not even its mode.
        has_tables: whether they are known to be there.
        is_new: nothing was written through this connection yet.

    Raises:
        OSError, sqlite3.Error: it cannot be opened, or not yet, or not be shared safely.
        LedgerError: it is not this library's, or not this version's.
    """

    def __init__(self, path: Path, writes: bool, warnings: list[str]) -> None:
        self._path, self.writes, self.is_new = path, writes, True
        if writes:
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, flags, 0o600))
        self._found = found = path.stat()
        self.inode, self.machine, self.boot = str(found.st_ino), _machine(), _boot()
        self.shared = self._check_kind()
        self.connection = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        try:
            self.has_tables = self.check()  # before anything is changed in a file that is not ours
            if writes:
                self.connection.execute("PRAGMA journal_mode = TRUNCATE")
                self.connection.execute("PRAGMA synchronous = OFF")
                if hasattr(os, "geteuid") and stat.S_IMODE(found.st_mode) & 0o077:
                    path.chmod(0o600)
                    warnings.append("could be read by other users; now it cannot")
        except BaseException:
            self.connection.close()
            raise

    def _check_kind(self) -> str:
        """Return its file system if machines may share that; raise if it cannot be used safely."""
        path, found = self._path, self._found
        if not stat.S_ISREG(found.st_mode):
            raise OSError(None, "is no regular file")
        if self.writes and hasattr(os, "geteuid") and found.st_uid != os.geteuid():
            raise OSError(None, f"belongs to user {found.st_uid}, not to {os.geteuid()}")
        if found.st_nlink > 1:
            raise OSError(
                None,
                f"has {found.st_nlink} names (hard links), and two processes that know it by different "
                "ones would corrupt it; delete the others, or make them symbolic links",
            )
        point, kind = _mount(path)
        if point == path:
            folder = path.with_name("queue")
            raise OSError(
                None,
                "is a mount point itself, and two containers that have it mounted alone corrupt it; "
                f"mount a folder that holds it, such as ./queue:{folder}, and use {folder / path.name}",
            )
        return kind if kind.startswith(SHARED) else ""

    def check(self) -> bool:
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


def _mount(path: Path) -> tuple[Path | None, str]:
    """Return where the file system of a file is mounted, and its type, if that can be known."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None, ""
    found: tuple[Path | None, str] = None, ""
    for line in mounts:
        before, _, after = line.partition(" - ")
        escaped = before.split()[4]
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), escaped))
        # Of two in one place the later counts.
        if path.is_relative_to(point) and (found[0] is None or point.is_relative_to(found[0])):
            found = point, after.split()[0]
    return found


def _boot() -> str:
    """Return what tells this machine's monotonic clock from others: its boot and time namespace."""
    try:
        boot = BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""
    try:
        return f"{boot} {os.readlink('/proc/self/ns/time')}"  # noqa: PTH115 - it is no path
    except OSError:
        return boot


def _machine() -> str:
    """Return what tells this machine from others, but not the id that is meant to be kept secret."""
    try:
        machine = MACHINE_ID.read_bytes().strip()
    except OSError:
        return ""
    return blake2b(machine, digest_size=8, key=b"gateway_queue_sync").hexdigest() if machine else ""
