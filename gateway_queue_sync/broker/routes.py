"""The broker's paths: one table with the methods, the access rule and the handler of each."""

from __future__ import annotations

import asyncio
import hmac
import importlib.resources
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from gateway_queue_sync.broker import responses
from gateway_queue_sync.broker.connection import Connection
from gateway_queue_sync.broker.ledger import LedgerEndpoint
from gateway_queue_sync.broker.reports import Reports, SharedAnswers
from gateway_queue_sync.broker.responses import PAGE_HEADERS, Refusal, Response
from gateway_queue_sync.broker.settings import BrokerSettings, names_loopback
from gateway_queue_sync.broker.waiting import WaitingClient, WaitingRoom
from gateway_queue_sync.log import LogFilter
from gateway_queue_sync.models import Permit
from gateway_queue_sync.queue import GatewayQueue, scheduler_of
from gateway_queue_sync.request_parser import Head, parse_query, parse_report

log = logging.getLogger("gateway_queue_sync.broker")

MAX_OVER_LIMIT = 32  # connections over the limit that get an error; others are closed at once


class Service:
    """What all connections of a broker share. It answers their requests, by the table ``ROUTES``.

    Attributes:
        connections: all open connections.
        ledger: answers ``POST /ledger``.
        reports: the counters, and the state of the queue.
        shared: the answers that are computed once a second for all readers.
        room: the clients that wait.
    """

    def __init__(
        self, queue: GatewayQueue, loop: asyncio.AbstractEventLoop, settings: BrokerSettings
    ) -> None:
        self._queue, self._loop, self._settings = queue, loop, settings
        self._stopping = False
        self._over_limit: set[Connection] = set()
        self._warnings = LogFilter()
        self._scheduler = scheduler_of(queue)
        self.connections: set[Connection] = set()
        self.ledger = LedgerEndpoint(self._scheduler)
        self.reports = Reports(queue)
        self.shared = SharedAnswers(loop, lambda: self.reports.compute(len(self.connections)))
        self.room = WaitingRoom(self._scheduler, loop, self.reports.granted)

    def opened(self, connection: Connection) -> None:
        """Note a new connection. One over the limit is refused."""
        self.connections.add(connection)
        if len(self.connections) - len(self._over_limit) > self._settings.max_connections:
            self._over_limit.add(connection)
            if len(self._over_limit) > MAX_OVER_LIMIT:
                self.reports.refused[503] += 1
                connection.abort()

    def closed(self, connection: Connection) -> None:
        """Note that a connection is closed."""
        self.connections.discard(connection)
        self._over_limit.discard(connection)

    def stop(self) -> None:
        """Stop granting, and close all connections."""
        self._stopping = True
        self.room.stop()
        for connection in list(self.connections):
            if connection.waiting is not None and not connection.legacy:
                connection.refuse(503, "the broker is shutting down")
            connection.close()

    def route(self, connection: Connection, head: Head) -> Callable[[bytes], object]:
        """Return the handler of a request.

        Sets whether the connection reads the body, and whether the client understands a status.
        """
        path = head.path if head.path in ROUTES else head.path.rstrip("/")
        route = ROUTES.get(path, PERMIT)
        connection.legacy = connection.legacy and route is PERMIT
        refusal = self._refusal(connection, head, route)
        if refusal is not None:
            self._warn(head, f"refused: {refusal[1]}")  # a legacy client sees only a close
            return lambda _: connection.refuse(*refusal)
        connection.reads_body = route.reads_body
        return partial(route.handler, self, connection, head)

    def _refusal(self, connection: Connection, head: Head, route: Route) -> Refusal | None:
        if connection in self._over_limit:
            return 503, "too many connections"
        if route.methods and head.method not in route.methods:
            allowed = ", ".join(route.methods)
            return 405, f"{head.path} takes {allowed} only", ("Allow", allowed)
        return route.access(self, head)

    def _warn(self, head: Head, what: str) -> None:
        """Log what is wrong with a request, a few times a minute at most."""
        skipped = self._warnings.count(self._scheduler.now_us())
        if skipped is not None:
            more = f"; {skipped} more were wrong" if skipped else ""
            log.warning("%.20s %.100r: %.200s%s", head.method, head.path, what, more)

    # --- access: `None`, or why a request is refused ----------------------------------------------

    def _anyone(self, _: Head) -> Refusal | None:
        return None  # these answers contain nothing about the bot

    def _probes(self, _: Head) -> Refusal | None:
        if self._stopping or self._queue.closed:
            return 503, "the broker is shutting down" if self._stopping else "the queue is closed"
        return None

    def _readers(self, head: Head) -> Refusal | None:
        """Let in clients that have the secret; without a secret, those whose ``Host`` is this machine.

        A web page can point its own name to this machine after it was loaded (DNS rebinding), but it
        cannot change the ``Host`` of its requests.
        """
        secret = self._settings.secret
        if secret is None:
            if names_loopback(head.headers.get("host", ""), self._settings.host):
                return None
            return 403, "the Host is not this machine: set a secret to serve other names"
        kind, _, given = head.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), secret.encode())
        if is_right and kind.lower() == "bearer":
            return None
        return 401, "the secret is wrong or missing", ("WWW-Authenticate", "Bearer")

    def _programs(self, head: Head) -> Refusal | None:
        if head.is_from_page:
            return 403, "pages in a browser get no permits and cannot change anything"
        return self._readers(head) or self._probes(head)

    def _queues(self, head: Head) -> Refusal | None:
        return self._programs(head) or self.ledger.refusal(head)

    # --- handlers ---------------------------------------------------------------------------------

    def _give_figures(self, connection: Connection, head: Head, _: bytes) -> None:
        self.shared.give(head.path.rstrip("/"), connection.respond)

    def _give_ledger(self, connection: Connection, _: Head, body: bytes) -> None:
        answering = self._loop.run_in_executor(self.ledger.executor, self.ledger.answer, body)
        answering.add_done_callback(partial(self._ledger_answered, connection))

    def _ledger_answered(
        self, connection: Connection, answering: asyncio.Future[tuple[Response, list[Permit]]]
    ) -> None:
        if (failure := answering.exception()) is not None:
            log.error("a request to the ledger failed", exc_info=failure)
            connection.respond(responses.error(500, type(failure).__name__))
            return
        response, permits = answering.result()
        for permit in permits:
            self.reports.granted(self._scheduler.now_us(), permit)
        if response.status == 400:
            self.reports.refused[400] += 1
        connection.respond(response)

    def _give_permit(self, connection: Connection, head: Head, _: bytes) -> None:
        if head.is_page_load:
            connection.respond(responses.TO_PAGE)
            return
        request, wrong = parse_query(head.query)
        if wrong:
            self._warn(head, "; ".join(wrong))
        if wrong and self._settings.strict:
            connection.refuse(400, wrong[0])
        else:
            connection.waiting = WaitingClient(self.room, connection, request)

    def _take_report(self, connection: Connection, head: Head, _: bytes) -> None:
        try:
            ticket, report = parse_report(head.query)
        except ValueError as error:
            connection.refuse(400, str(error))
            return
        if self.room.report(ticket, report):
            connection.respond(responses.NOTED)
        else:
            connection.refuse(404, "no client with this ticket was to confirm its permit")

    def _give_page(self, connection: Connection, _: Head, __: bytes) -> None:
        connection.respond(_page())


@cache
def _page() -> Response:
    html = importlib.resources.files(__package__).joinpath("page.html").read_bytes()
    return Response(200, html, "text/html; charset=utf-8", PAGE_HEADERS)


class Route(NamedTuple):
    """How requests to a path are answered. Without ``methods``, any method is allowed."""

    methods: tuple[str, ...]
    access: Callable[[Service, Head], Refusal | None]
    handler: Callable[[Service, Connection, Head, bytes], object]
    reads_body: bool = False


_READ = ("GET", "HEAD")
PERMIT = Route(
    (), lambda self, head: None if head.is_page_load else self._programs(head), Service._give_permit
)
ROUTES = {
    "/status": Route(_READ, Service._anyone, Service._give_page),
    "/status/": Route(_READ, Service._anyone, lambda _, c, *__: c.respond(responses.TO_PAGE)),
    "/favicon.ico": Route(_READ, Service._anyone, lambda _, c, *__: c.respond(responses.NOT_FOUND)),
    "/robots.txt": Route(_READ, Service._anyone, lambda _, c, *__: c.respond(responses.NOT_FOUND)),
    "/health": Route(_READ, Service._probes, Service._give_figures),
    "/healthz": Route(_READ, Service._probes, Service._give_figures),
    "/status.json": Route(_READ, Service._readers, Service._give_figures),
    "/recent.json": Route(_READ, Service._readers, Service._give_figures),
    "/metrics": Route(_READ, Service._readers, Service._give_figures),
    "/permit": Route(("POST",), Service._programs, Service._take_report),
    "/ledger": Route(("POST",), Service._queues, Service._give_ledger, reads_body=True),
}
