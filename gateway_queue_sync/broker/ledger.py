"""``POST /ledger``: what an ``HttpQueue`` says to the ledger that the broker's queue shares."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from gateway_queue_sync.broker import responses
from gateway_queue_sync.broker.responses import Refusal, Response
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.adapter import snapshot
from gateway_queue_sync.ledgers.shared import SHORT_PATIENCE, SharedLedger
from gateway_queue_sync.ledgers.wire import reply_as_json, request_from_json
from gateway_queue_sync.messages import OUTCOMES, Request
from gateway_queue_sync.models import US_PER_SECOND, Permit, QueueSnapshot, check_limit
from gateway_queue_sync.queue import GatewayQueue, scheduler_of
from gateway_queue_sync.request_parser import Head

MAX_BODY = 1 << 20  # bytes
MAX_BUCKETS = 10_000
THREADS = 8


class LedgerEndpoint:
    """Takes requests to the ledger of a queue; ``executor`` has the threads for that."""

    def __init__(self, queue: GatewayQueue) -> None:
        self._queue = queue
        self._reserve = scheduler_of(queue).reserve
        self._ledger: SharedLedger | None = getattr(
            getattr(scheduler_of(queue).ledger, "ledger", None), "shared", None
        )
        self.executor = ThreadPoolExecutor(THREADS, "gateway-queue-broker-ledger")

    def look(self) -> QueueSnapshot:
        """Return who waits, without the queue's worker, which grants permits."""
        if self._ledger is None:
            return self._queue.snapshot()
        return snapshot(self._ledger.peek()._replace(reserve=self._reserve))

    def refusal(self, head: Head) -> Refusal | None:
        """Return why a request is refused, before its body is read."""
        if head.headers.get("content-type", "").partition(";")[0].strip().lower() != responses.JSON:
            return 415, f"the body must be of type {responses.JSON}"
        if self._ledger is None:
            return 404, "this broker's queue keeps its account in memory: no HttpQueue can use it"
        if head.body_length is None or head.body_length > MAX_BODY:
            return 413, "the body must have a Content-Length of 1 MiB at most"
        return None

    def answer(self, body: bytes) -> tuple[Response, Permit | None]:
        """Return what the ledger replies, and the permit in it; in a thread, because it may block."""
        assert self._ledger is not None
        try:
            request = self._bounded(request_from_json(json.loads(body)))
            reply = self._ledger.carry(request, SHORT_PATIENCE)
        except LedgerError as error:
            return responses.error(503, str(error)), None
        except (ValueError, RecursionError) as error:
            return responses.error(400, str(error)), None
        permit, take = None, request.take
        if take is not None and OUTCOMES[reply.outcome.kind] is Permit:
            waited = max(0, (request.at_us or 0) - take.at_us) / US_PER_SECOND
            permit = Permit(take.shard_id, reply.outcome.bucket, waited)
        return responses.as_json(reply_as_json(reply)), permit

    def _bounded(self, request: Request) -> Request:
        """Return a request that is bound by this broker's reserve, too; refuse limits beyond it."""
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
