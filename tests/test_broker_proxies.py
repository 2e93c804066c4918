"""nginx and haproxy in front of a broker: both read a request in the same way."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_request_parser import random_data
from redis_servers import free_port, until
from wire_clients import clients_of

from gateway_queue_sync import NoOpQueue, serve
from gateway_queue_sync.broker import connection

REQUESTS = 2_000
SECONDS = 15.0  # at most, for all of them

NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/a; uwsgi_temp_path {folder}/b; scgi_temp_path {folder}/c;
  upstream broker {{ server 127.0.0.1:{broker}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://broker; proxy_http_version 1.1; proxy_read_timeout 1d;
      proxy_set_header Connection ""; proxy_set_header Host localhost;
    }}
  }}
}}
"""

HAPROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  option http-keep-alive
frontend in
  bind 127.0.0.1:{port}
  default_backend broker
backend broker
  http-reuse always
  http-request set-header Host localhost
  server broker 127.0.0.1:{broker} maxconn 4
"""

HAPROXY_TCP = """
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
listen broker
  bind 127.0.0.1:{port}
  server broker 127.0.0.1:{broker}
"""


def nginx(folder: Path, port: int, broker: int) -> list[str]:
    (folder / "conf").write_text(NGINX.format(folder=folder, port=port, broker=broker))
    return ["nginx", "-c", str(folder / "conf"), "-e", str(folder / "log")]


def haproxy(folder: Path, port: int, broker: int) -> list[str]:
    (folder / "conf").write_text(HAPROXY.format(port=port, broker=broker))
    return ["haproxy", "-db", "-f", str(folder / "conf")]


def haproxy_tcp(folder: Path, port: int, broker: int) -> list[str]:
    (folder / "conf").write_text(HAPROXY_TCP.format(port=port, broker=broker))
    return ["haproxy", "-db", "-f", str(folder / "conf")]


PROXIES = [
    pytest.param(
        proxy,
        marks=pytest.mark.skipif(
            shutil.which(proxy.__name__) is None,
            reason=f"there is no {proxy.__name__} here (Debian has it)",
        ),
    )
    for proxy in (nginx, haproxy)
]


@contextlib.contextmanager
def proxied(proxy, folder: Path, broker: int) -> Iterator[int]:
    """Run a proxy in front of a broker; return its port."""
    port = free_port()
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(proxy(folder, port, broker), stdout=out, stderr=out)
        try:
            until(lambda: _listens(port), "the proxy")
            yield port
        finally:
            process.terminate()
            process.wait(20)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 5.0).close()
        return True
    return False


@pytest.mark.parametrize("proxy", PROXIES)
def test_permits_come_through_a_proxy_and_nothing_before(proxy, tmp_path):
    with NoOpQueue() as queue, serve(queue, port=0) as broker:
        with proxied(proxy, tmp_path, broker.port) as port, clients_of(port) as client:
            one = client("/?shard=1")
            for _ in range(3):
                assert one.granted
                one.ask("/?shard=1", "POST", "Content-Length: 2").send("{}")
            assert one.read()[0] == 200
            assert client("/healthz").read()[2] == b'{"status":"ok"}'


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="there is no haproxy here")
def test_a_proxy_for_tcp_passes_on_a_refusal_as_it_is(tmp_path, monkeypatch):
    """A proxy for HTTP answers with a status, which existing clients take for a permit."""
    monkeypatch.setattr(connection, "TARPIT", (0.01, 0.02))
    with NoOpQueue() as queue, serve(queue, port=0, secret="s3cret") as broker:
        with proxied(haproxy_tcp, tmp_path, broker.port) as port, clients_of(port) as client:
            assert client("/?shard=1").is_closed_without_a_byte()
            assert client("/?shard=1", "GET", "Authorization: Bearer s3cret").granted
        with proxied(haproxy, tmp_path, broker.port) as port, clients_of(port) as client:
            assert client("/?shard=1").read()[0] == 502


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("proxy", PROXIES)
def test_no_request_of_one_client_answers_another(proxy, tmp_path, monkeypatch):
    """Whatever is sent: a permit for each answer, and the next client's answer is its own."""
    monkeypatch.setattr(connection, "TARPIT", (0.01, 0.02))
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng, give_up = random.Random(seed), time.monotonic() + SECONDS
    with NoOpQueue() as queue, serve(queue, port=0) as broker:
        with proxied(proxy, tmp_path, broker.port) as port, clients_of(port) as client:
            for _ in range(REQUESTS):
                if time.monotonic() > give_up:
                    break
                data = random_data(rng)
                # Twice, since a request of the connection before may have been granted just now.
                answered = _is_answered(queue, port, data) or _is_answered(queue, port, data)
                assert answered, (seed, data)
                assert client("/robots.txt").read()[0] == 404, (seed, data)
            assert queue.snapshot().granted > 10


def _is_answered(queue, port, data):
    """Send something; return whether each permit that is granted meanwhile is answered."""
    before, give_up = queue.snapshot().granted, time.monotonic() + 5.0
    with contextlib.closing(Talk(port, data)) as talk:
        while talk.read() or queue.snapshot().granted - before > talk.permits:
            if time.monotonic() > give_up:
                return False
    return True


class Talk:
    """A connection on which something was sent, and what has been answered."""

    def __init__(self, port: int, data: bytes) -> None:
        self.answers = b""
        self.socket = socket.create_connection(("127.0.0.1", port), 5.0)
        self.socket.settimeout(0.05)
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def read(self) -> bool:
        """Return whether something came within a moment."""
        with contextlib.suppress(OSError):
            more = self.socket.recv(65_536)
            self.answers += more
            return bool(more)
        return False

    @property
    def permits(self) -> int:
        """How many permits were answered: with a body, to HEAD without, to HTTP/0.9 without a head."""
        pages = self.answers.count(b"\r\n\r\n<!doctype html>")
        headless = len(re.findall(rb'(?<!\r\n\r\n)\{"message"', self.answers))
        return len(re.findall(rb"HTTP/1\.[01] 200", self.answers)) - pages + headless

    def close(self) -> None:
        self.socket.close()
