"""What commands read besides their options: files with secrets, and the folder for state."""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

log = logging.getLogger("gateway_queue_sync")

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def read_secret(file: str, option: str) -> str:
    """Return the secret in the file that an option names. Warn if every user may read the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty or not text.
    """
    try:
        mode, secret = Path(file).stat().st_mode, Path(file).read_text("utf-8").strip()
    except OSError as error:
        raise OSError(f"{option} {file!r}: {error.strerror}") from error
    except UnicodeError:
        raise ValueError(f"{option} {file!r} is not text") from None
    if not secret:
        raise ValueError(f"{option} {file!r} is empty")
    if os.name == "posix" and mode & stat.S_IROTH:
        log.warning("%s %r can be read by every user of this machine (chmod o-r)", option, file)
    return secret


def public_url(url: str) -> str:
    """Return the URL of a Redis server from the command line.

    Raises:
        ValueError: it is not such a URL, or it contains a password, which the message does not show.
    """
    try:
        parts = urlsplit(url)
        has_password = parts.password is not None or "password" in parse_qs(parts.query)
    except ValueError:
        has_password = "@" in url
    if has_password:
        raise ValueError(
            "--redis must hold no password, because every user of this machine can see the command "
            "line: put the URL into a file (--redis-file)"
        )
    if not url.startswith(REDIS_SCHEMES):
        shown = "" if "@" in url else f", not {url!r}"
        raise ValueError(
            f"--redis must be a URL such as redis://host:6379/0 (with rediss:// for TLS){shown}"
        )
    return url


def state_folder(environment: Mapping[str, str]) -> tuple[Path, str]:
    """Return the folder for a service's state, and where that setting is from."""
    if environment.get("STATE_DIRECTORY"):  # systemd's
        return Path(environment["STATE_DIRECTORY"].split(":")[0]), "STATE_DIRECTORY"
    if sys.platform == "win32":
        home = Path(environment.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Application Support"
    else:
        home = Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return home / "gateway-queue-sync", "the default"
