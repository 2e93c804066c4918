"""The broker's paths: one table with the methods, the access rule and the handler of each."""

from __future__ import annotations

import asyncio
import hmac
import importlib.resources
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from gateway_queue_sync.broker import parser, responses
from gateway_queue_sync.broker.connection import Connection
from gateway_queue_sync.broker.ledger import LedgerEndpoint
from gateway_queue_sync.broker.parser import Head
from gateway_queue_sync.broker.reports import Reports, SharedAnswers
from gateway_queue_sync.broker.responses import Refusal
from gateway_queue_sync.broker.settings import BrokerSettings, names_loopback
from gateway_queue_sync.broker.waiting import WaitingClient, WaitingRoom
from gateway_queue_sync.log import LineFilter
from gateway_queue_sync.queue import GatewayQueue, scheduler_of

log = logging.getLogger("gateway_queue_sync.broker")

MAX_OVER_LIMIT = 32  # connections over the limit that are told so; others are closed at once


class Service:
    """What one broker's clients are given: it finds the route of each request.

    Attributes:
        connections: all there are.
        reports: what is counted.
        room: the clients that wait.
    """

    def __init__(
        self,
        queue: GatewayQueue,
        loop: asyncio.AbstractEventLoop,
        settings: BrokerSettings,
        max_connections: int,
    ) -> None:
        self._queue = queue
        self._settings = settings
        self._max_connections = max_connections
        self._stopping = False
        self._over_limit: set[Connection] = set()
        self._warnings = LineFilter()
        self._page = responses.as_page(
            importlib.resources.files(__package__).joinpath("page.html").read_bytes()
        )
        scheduler = scheduler_of(queue)
        self.connections: set[Connection] = set()
        self.ledger = LedgerEndpoint(queue, loop)
        self.reports = Reports(self.ledger.look, scheduler)
        self.shared = SharedAnswers(loop, lambda: self.reports.compute(len(self.connections)))
        self.room = WaitingRoom(scheduler, loop, self.reports.granted)

    def opened(self, connection: Connection) -> None:
        """Take note of a new connection; one over the limit is refused."""
        self.connections.add(connection)
        if len(self.connections) - len(self._over_limit) > self._max_connections:
            self._over_limit.add(connection)
            if len(self._over_limit) > MAX_OVER_LIMIT:
                self.reports.refused[503] += 1
                connection.abort()

    def closed(self, connection: Connection) -> None:
        """Take note that a connection is closed."""
        self.connections.discard(connection)
        self._over_limit.discard(connection)

    def stop(self) -> None:
        """Grant nobody any more, and close all connections."""
        self._stopping = True
        for connection in list(self.connections):
            if connection.waiting is not None and not connection.legacy:
                connection.refuse(503, "the broker is shutting down")
            connection.close()

    def route(self, connection: Connection, head: Head) -> Callable[..., object]:
        """Return what answers a request; set whether its body is read and errors are sent."""
        path = head.path if head.path in ROUTES else head.path.rstrip("/")
        route = ROUTES.get(path, PERMIT)
        connection.legacy = connection.legacy and route is PERMIT
        refusal = self._refusal(connection, head, route)
        if refusal is not None:
            return lambda *_: connection.refuse(*refusal)
        connection.reads_body = route.reads_body
        return partial(route.handler, self)

    def _refusal(self, connection: Connection, head: Head, route: Route) -> Refusal | None:
        if connection in self._over_limit:
            return 503, "too many connections"
        if route.methods and head.method not in route.methods:
            allowed = ", ".join(route.methods)
            return 405, f"{head.path} takes {allowed} only", ("Allow", allowed)
        return route.access(self, head)

    # --- access -----------------------------------------------------------------------------------

    def anyone(self, _: Head) -> Refusal | None:
        """Let anybody in: nothing here tells of the bot."""
        return None

    def readers(self, head: Head) -> Refusal | None:
        """Let in who has the secret, or without one whoever calls this machine by a name of its own.

        A page could have its own name pointed here after it was loaded; it cannot change its ``Host``.
        """
        secret = self._settings.secret
        if secret is None:
            if names_loopback(head.headers.get("host", ""), self._settings.host):
                return None
            return 403, "the Host is none of this machine's: set a secret to serve other names"
        kind, _, given = head.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), secret.encode())
        if kind.lower() == "bearer" and is_right:
            return None
        return 401, "the secret is wrong or missing", ("WWW-Authenticate", "Bearer")

    def programs(self, head: Head) -> Refusal | None:
        """Let in the readers, but no page in a browser, and only while permits are granted."""
        if head.is_from_page:
            return 403, "a page in a browser may take no permit and give no order"
        refusal = self.readers(head)
        if refusal is None and (self._stopping or self._queue.closed):
            return 503, "the broker is shutting down" if self._stopping else "the queue is closed"
        return refusal

    def permits(self, head: Head) -> Refusal | None:
        """Let in programs; who loads a page is sent to ours."""
        return None if head.is_page_load else self.programs(head)

    def queues(self, head: Head) -> Refusal | None:
        """Let in programs that can talk to a ledger."""
        return self.programs(head) or self.ledger.refusal(head)

    # --- handlers ---------------------------------------------------------------------------------

    def give_page(self, connection: Connection, *_: object) -> None:
        """Answer the page, which carries no data."""
        connection.respond(self._page)

    def give_way(self, connection: Connection, *_: object) -> None:
        """Answer where the page is: its links are relative."""
        connection.respond(responses.TO_PAGE)

    def give_nothing(self, connection: Connection, *_: object) -> None:
        """Answer browsers and crawlers that there is no such thing."""
        connection.respond(responses.NOT_FOUND)

    def give_report(self, connection: Connection, head: Head, _: bytes) -> None:
        """Answer what is computed for all who ask."""
        self.shared.give(head.path.rstrip("/"), connection.respond)

    def give_health(self, connection: Connection, *_: object) -> None:
        """Answer whether permits can be granted."""
        if self._stopping or self._queue.closed:
            connection.respond(responses.error(503, "the broker is shutting down"))
        else:
            self.shared.give("/healthz", connection.respond)

    def ask_ledger(self, connection: Connection, _: Head, body: bytes) -> None:
        """Answer what the ledger replies."""
        self.ledger.handle(connection, body, self.reports)

    def give_permit(self, connection: Connection, head: Head, _: bytes) -> None:
        """Answer when a shard may identify."""
        if head.is_page_load:
            connection.respond(responses.TO_PAGE)
            return
        request, wrong = parser.parse_query(head.query)
        skipped = self._warnings.count(self.room.scheduler.now_us()) if wrong else None
        if skipped is not None:
            more = f"; {skipped} more were wrong" if skipped else ""
            reasons = "; ".join(wrong)
            log.warning("%.20s %.100r: %.200s%s", head.method, head.path, reasons, more)
        if wrong and self._settings.strict:
            connection.refuse(400, wrong[0])
        else:
            connection.waiting = WaitingClient(self.room, connection, request)


class Route(NamedTuple):
    """How the requests to a path are answered; no ``methods`` are any."""

    methods: tuple[str, ...]
    access: Callable[[Service, Head], Refusal | None]
    handler: Callable[[Service, Connection, Head, bytes], object]
    reads_body: bool = False


_READ = ("GET", "HEAD")
PERMIT = Route((), Service.permits, Service.give_permit)
ROUTES = {
    "/status": Route(_READ, Service.anyone, Service.give_page),
    "/status/": Route(_READ, Service.anyone, Service.give_way),
    "/favicon.ico": Route(_READ, Service.anyone, Service.give_nothing),
    "/robots.txt": Route(_READ, Service.anyone, Service.give_nothing),
    "/health": Route(_READ, Service.anyone, Service.give_health),
    "/healthz": Route(_READ, Service.anyone, Service.give_health),
    "/status.json": Route(_READ, Service.readers, Service.give_report),
    "/recent.json": Route(_READ, Service.readers, Service.give_report),
    "/metrics": Route(_READ, Service.readers, Service.give_report),
    "/ledger": Route(("POST",), Service.queues, Service.ask_ledger, reads_body=True),
}
