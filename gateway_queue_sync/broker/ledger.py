"""``POST /ledger``: what an ``HttpQueue`` says to the ledger that the broker's queue shares."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor

from gateway_queue_sync.broker import responses
from gateway_queue_sync.broker.connection import MAX_BODY, Connection
from gateway_queue_sync.broker.parser import Head
from gateway_queue_sync.broker.reports import Reports
from gateway_queue_sync.broker.responses import Refusal, Response
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.adapter import snapshot
from gateway_queue_sync.ledgers.shared import SHORT_PATIENCE, SharedLedger
from gateway_queue_sync.ledgers.wire import reply_as_json, request_from_json
from gateway_queue_sync.messages import OUTCOMES, Reply, Request
from gateway_queue_sync.models import Permit, QueueSnapshot
from gateway_queue_sync.queue import GatewayQueue, scheduler_of
from gateway_queue_sync.token_bucket import US_PER_SECOND, check_limit

log = logging.getLogger("gateway_queue_sync.broker")

MAX_BUCKETS = 10_000
THREADS = 8


class LedgerEndpoint:
    """Takes requests to the ledger in threads of its own, and answers what it replies."""

    def __init__(self, queue: GatewayQueue, loop: asyncio.AbstractEventLoop) -> None:
        self._queue = queue
        self._reserve = scheduler_of(queue).reserve
        self._ledger: SharedLedger | None = getattr(scheduler_of(queue).ledger, "shared", None)
        self._loop = loop
        self.executor = ThreadPoolExecutor(
            THREADS, thread_name_prefix="gateway-queue-broker-ledger"
        )

    def look(self) -> QueueSnapshot:
        """Return who waits, without the queue's worker, which grants permits."""
        if self._ledger is None:
            return self._queue.snapshot()
        reply = self._ledger.peek()
        return snapshot(reply._replace(reserve=self._reserve))

    def refusal(self, head: Head) -> Refusal | None:
        """Return why a request is refused, before its body is read."""
        if head.headers.get("content-type", "").partition(";")[0].strip().lower() != responses.JSON:
            return 415, f"the body must be of type {responses.JSON}"
        if self._ledger is None:
            return 404, "this broker's queue keeps its account in memory: no HttpQueue can use it"
        if head.body_length is None or head.body_length > MAX_BODY:
            return 413, "the body must have a Content-Length of 1 MiB at most"
        return None

    def handle(self, connection: Connection, body: bytes, reports: Reports) -> None:
        """Answer a request when the ledger has."""
        self.executor.submit(self._handle, connection, body, reports)

    def _handle(self, connection: Connection, body: bytes, reports: Reports) -> None:
        assert self._ledger is not None
        request = reply = None
        try:
            request = self._bounded(request_from_json(json.loads(body)))
            reply = self._ledger.carry(request, SHORT_PATIENCE)
            response = responses.as_json(reply_as_json(reply))
        except LedgerError as error:
            response = responses.error(503, str(error))
        except (ValueError, RecursionError) as error:
            response = responses.error(400, str(error))
        except Exception as error:
            log.exception("a request to the ledger failed")
            response = responses.error(500, type(error).__name__)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(
                self._answer, connection, response, reports, request, reply
            )

    def _answer(
        self,
        connection: Connection,
        response: Response,
        reports: Reports,
        request: Request | None,
        reply: Reply | None,
    ) -> None:
        if response.status == 400:
            reports.refused[400] += 1
        if (
            reply is not None
            and OUTCOMES[reply.outcome.kind] is Permit
            and request
            and request.take
        ):
            waited_us = (request.at_us or 0) - request.take.at_us
            waited = max(0, waited_us) / US_PER_SECOND
            now_us = scheduler_of(self._queue).now_us()
            reports.granted(now_us, request.take.shard_id, reply.outcome.bucket, waited)
        connection.respond(response)

    def _bounded(self, request: Request) -> Request:
        """Return a request that is bound by this broker's reserve, too.

        Raises:
            ValueError: it brings a limit that the reserve uses up, or of too many buckets.
        """
        ordered = None if request.order is None else request.order.limit
        if ordered is not None:
            check_limit(ordered, self._reserve)
        for limit in (request.limit, ordered):
            if limit is not None and limit.max_concurrency > MAX_BUCKETS:
                raise ValueError(f"max_concurrency must be at most {MAX_BUCKETS} for a broker")
        if request.take is None:
            return request
        reserve = max(request.take.reserve, self._reserve)
        return request._replace(take=request.take._replace(reserve=reserve))
