"""``POST /ledger``: requests of other processes to the shared ledger of the broker's queue."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from gateway_queue_sync.broker import responses
from gateway_queue_sync.broker.responses import Refusal, Response
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared.messages import Reply, Request, from_wire, to_wire
from gateway_queue_sync.models import US_PER_SECOND, Permit
from gateway_queue_sync.request_parser import Head
from gateway_queue_sync.scheduler import Scheduler

MAX_BODY = 1 << 20  # bytes
THREADS = 8


class LedgerEndpoint:
    """Answers requests to the ledger of a queue, in the threads of ``executor``."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._reserve = scheduler.reserve
        self._backend = None if scheduler.remote is None else scheduler.remote.backend
        self.executor = ThreadPoolExecutor(
            THREADS, thread_name_prefix="gateway-queue-broker-ledger"
        )

    def refusal(self, head: Head) -> Refusal | None:
        """Return why a request is refused, before its body is read."""
        if head.headers.get("content-type", "").partition(";")[0].strip().lower() != responses.JSON:
            return 415, f"the body must be of type {responses.JSON}"
        if self._backend is None:
            return 404, "this broker's queue keeps its account in memory: no HttpQueue can use it"
        if head.body_length is None or head.body_length > MAX_BODY:
            return 413, "the body must have a Content-Length of 1 MiB at most"
        return None

    def answer(self, body: bytes) -> tuple[Response, list[Permit]]:
        """Return the ledger's reply and the permits that it granted. It may block."""
        assert self._backend is not None
        try:
            request = from_wire(Request, json.loads(body))
        except (ValueError, RecursionError) as error:
            return responses.error(400, str(error)), []
        if 0 <= request.reserve < self._reserve:
            request = request._replace(reserve=self._reserve)
        try:
            reply = self._backend.relay(request)
        except LedgerError as error:
            return responses.error(503, str(error)), []
        return responses.as_json(to_wire(reply)), _granted(request, reply)


def _granted(request: Request, reply: Reply) -> list[Permit]:
    """Return the permits that a reply grants. Those of a repeated reply were counted before."""
    arrived_us = {one.number: one.arrived_us for line in request.lines for one in line.waiters}
    return [
        Permit(
            one.shard_id,
            one.bucket,
            max(0, request.sent_us - arrived_us.get(one.waiter, request.sent_us)) / US_PER_SECOND,
        )
        for one in reply.permits
        if one.age_us == 0
    ]
