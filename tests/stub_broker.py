"""A small broker for the page: one thread per request, and answers that tests can replace."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import urlsplit

from gateway_queue_sync.queue import GatewayQueue, scheduler_of

PAGE = files("gateway_queue_sync") / "broker" / "page.html"


class StubBroker:
    """Answers for a queue. ``instead`` maps a path to the status and body that it answers with."""

    def __init__(self, queue: GatewayQueue, host: str, port: int, secret: str | None) -> None:
        self.queue = queue
        self.secret = secret
        self.instead: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []  # paths
        broker = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = broker.answer(self.path, self.headers["Authorization"])
                is_page = self.path == "/status"
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if is_page else "application/json")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer((host, port), Handler)
        self.url = f"http://{host}:{self.server.server_address[1]}"

    def answer(self, path: str, authorization: str | None) -> tuple[int, str]:
        at = urlsplit(path)
        self.asked.append(at.path)
        if at.path in self.instead:
            return self.instead[at.path]
        if at.path == "/status":
            return 200, PAGE.read_text("utf-8")
        if self.secret is not None and authorization != f"Bearer {self.secret}":
            return 401, "{}"
        if at.path == "/status.json":
            return 200, json.dumps(asdict(self.queue.snapshot()))
        keeps_limit = scheduler_of(self.queue).ledger.keeps_limit
        recent = {"window": 5.25, "keeps_limit": keeps_limit, "reserve": 0, "grants": []}
        return 200, json.dumps(recent)


@contextlib.contextmanager
def stub(
    queue: GatewayQueue, host: str, port: int, *, secret: str | None = None
) -> Iterator[StubBroker]:
    """Serve from a thread in the background; the port 0 takes a free one."""
    broker = StubBroker(queue, host, port, secret)
    thread = threading.Thread(target=broker.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield broker
    finally:
        broker.server.shutdown()
        broker.server.server_close()
        thread.join()
