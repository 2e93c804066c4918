"""The file of an SQLite ledger: checks before it is opened, and whether it was replaced."""

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

BUSY_TIMEOUT = 0.01  # s that SQLite itself waits; then the session tries again
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE_ID = Path("/etc/machine-id")
SHARED = (  # file systems over which machines, or a machine and its virtual ones, share files
    *("nfs", "cifs", "smb", "9p", "fuse.", "afs", "ceph", "gluster", "lustre", "gpfs", "beegfs"),
    *("gfs2", "ocfs2", "virtiofs", "vboxsf", "prl_fs", "vmhgfs", "drvfs", "orangefs", "pvfs"),
)


class OpenFile:
    """A connection to a file that was checked first.

    The file must not be opened in another way: closing it would drop the locks of this process.

    Attributes:
        connection: SQLite's.
        inode, machine, boot: identify the file, the machine and its monotonic clock; empty if unknown.
        shared: the type of its file system, if machines may share that; else empty.
        writes: whether requests write; if not, nothing is changed, not even the file's mode.
        has_tables: whether the tables exist for certain.
        is_new: nothing was written through this connection yet.

    Raises:
        OSError, sqlite3.Error: it cannot be opened or shared safely.
        LedgerError: it belongs to another program or version.
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
        """Return the file system if machines may share it. Raise if the file cannot be used safely."""
        path, found = self._path, self._found
        if not stat.S_ISREG(found.st_mode):
            raise OSError(None, "is not a regular file")
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
        """Return whether the tables exist; false if the file is empty.

        Raises:
            LedgerError: the tables belong to another program or version.
        """
        run = self.connection.execute
        # First, because another process may create all tables just now, in one transaction.
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
                f"{where} was written by another version of this package (schema {version}; this one "
                f"uses {SCHEMA_VERSION}); to begin anew, move it away"
            ) from ValueError(version)
        return False

    def is_current(self) -> bool:
        """Return whether the path still leads to the open file."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, self._found)


def _mount(path: Path) -> tuple[Path | None, str]:
    """Return the mount point of a file and its type of file system, if they can be found out."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None, ""
    found: tuple[Path | None, str] = None, ""
    for line in mounts:
        before, _, after = line.partition(" - ")
        escaped = before.split()[4]
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), escaped))
        # Of two mounts at one point, the later counts.
        if path.is_relative_to(point) and (found[0] is None or point.is_relative_to(found[0])):
            found = point, after.split()[0]
    return found


def _boot() -> str:
    """Return what identifies the monotonic clock of this machine: boot id and time namespace."""
    try:
        boot = BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""
    try:
        return f"{boot} {os.readlink('/proc/self/ns/time')}"  # noqa: PTH115 - it is no path
    except OSError:
        return boot


def _machine() -> str:
    """Return what identifies this machine: a hash, since its id should be kept secret."""
    try:
        machine = MACHINE_ID.read_bytes().strip()
    except OSError:
        return ""
    return blake2b(machine, digest_size=8, key=b"gateway_queue_sync").hexdigest() if machine else ""
