"""The broker's desk: takes each client's wish to the queue, and each permit to its client.

All of it runs in the thread of one event loop. What may block (the ledger) is done in a pool of threads,
and waiting is left to the queue's futures: a client that waits costs memory, and no thread.
"""

from __future__ import annotations

import asyncio
import hmac
import importlib.resources
import json
import logging
import math
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import asdict
from functools import partial

from gateway_queue_sync.broker import wire
from gateway_queue_sync.broker.address import names_loopback
from gateway_queue_sync.broker.connection import Connection
from gateway_queue_sync.broker.metrics import Metrics
from gateway_queue_sync.broker.places import Place, Places
from gateway_queue_sync.broker.throttle import Throttle
from gateway_queue_sync.errors import LedgerError, QueueClosed, SessionLimitExhausted
from gateway_queue_sync.ledgers.http import PATH
from gateway_queue_sync.ledgers.shared import SHORT_PATIENCE, SharedLedger
from gateway_queue_sync.ledgers.wire import reply_as_json, request_from_json
from gateway_queue_sync.messages import OUTCOMES, Reply, Request
from gateway_queue_sync.models import US_PER_SECOND, LimitSnapshot, Permit, check_limit
from gateway_queue_sync.queue import GatewayQueue, scheduler_of
from gateway_queue_sync.worker import enqueue

log = logging.getLogger("gateway_queue_sync.broker")

TICK = 1.0  # s
HEALTH_FOR = 1.0  # s for which it is known how the ledger does
MAX_SURPLUS = 32  # connections over the most, which are told so; others are closed at once
MAX_HOLD = 60.0  # s before the budget is looked at again for a client that is held


class Desk:
    """What the clients of one broker are told.

    Attributes:
        connections: all there are.
        metrics: what is counted.
    """

    def __init__(
        self,
        queue: GatewayQueue,
        loop: asyncio.AbstractEventLoop,
        pool: Executor,
        *,
        served: str,
        secret: str | None,
        strict: bool,
        max_connections: int,
    ) -> None:
        self._queue = queue
        self._scheduler = scheduler_of(queue)
        self._shared: SharedLedger | None = getattr(
            getattr(self._scheduler.ledger, "ledger", None), "shared", None
        )
        self._loop = loop
        self._pool = pool
        self._served = served
        self._secret = None if secret is None else secret.encode()
        self._strict = strict
        self._max_connections = max_connections
        self._places = Places()
        self._stopping = False
        self._looking = False
        self._health: wire.Answer | None = None
        self._health_until = 0.0
        self._ask_health: list[Connection] = []  # who wait for the probe that is on its way
        self._warnings = Throttle(3, 1.0)
        self._returning: set[Future[Permit]] = set()  # of those who left, until the queue knows
        self.connections: set[Connection] = set()
        self._surplus: set[Connection] = set()  # those of them that came when there were too many
        self.metrics = Metrics()
        self._page = importlib.resources.files(__package__).joinpath("page.html").read_bytes()
        loop.call_later(TICK, self._tick)

    # --- connections come and go ------------------------------------------------------------------

    def arrived(self, connection: Connection) -> None:
        """Take note of a new connection; one too many is refused."""
        self.connections.add(connection)
        if len(self.connections) - len(self._surplus) <= self._max_connections:
            return
        self._surplus.add(connection)
        if len(self._surplus) > MAX_SURPLUS:
            self.metrics.refused[503] += 1
            connection.abort()

    def left(self, connection: Connection) -> None:
        """Let go of a connection; the place of a client that waited is kept for a while."""
        self.connections.discard(connection)
        self._surplus.discard(connection)
        self.leave_line(connection)

    def stop(self) -> list[Future[Permit]]:
        """Grant nobody any more, close all connections, and return the futures to give back."""
        self._stopping = True
        waiting = [one for one in self.connections if one.future is not None]
        futures = [one.future for one in waiting if one.future is not None]
        for connection in waiting:
            connection.future = connection.place = None
            if connection.head is not None and connection.head.is_ours:
                connection.refuse(503, "the broker is shutting down")
        for connection in self.connections:
            connection.close()
        return futures + list(self._returning)

    def _tick(self) -> None:
        self._loop.call_later(TICK, self._tick)
        self._places.sweep(self._scheduler.now_us())
        if any(
            one.future is not None and one.head and one.head.is_ours for one in self.connections
        ):
            self._look_at_budget()

    # --- requests ---------------------------------------------------------------------------------

    def refusal(self, connection: Connection, head: wire.Head) -> wire.Refusal | None:
        """Return why a request is refused, as far as its head says, or ``None``."""
        if connection in self._surplus:
            return 503, "too many connections"
        if head.path == PATH:
            return self._refusal_of_data(head) or self._refusal_of_ledger(head)
        if head.is_reserved:
            if head.command not in ("GET", "HEAD"):
                return 405, f"{head.path} takes GET only", ("Allow", "GET, HEAD")
            return None if head.path in wire.OPEN else self._refusal_of_data(head)
        if self._is_of_browser(head):
            return None  # it is sent to the page
        return self._refusal_of_stranger(head) or self._refusal_of_all()

    def _refusal_of_data(self, head: wire.Head) -> wire.Refusal | None:
        if not self._is_meant(head):
            return 403, "the Host is none of this machine's: set a secret to serve other names"
        return self._refusal_of_stranger(head)

    def _refusal_of_stranger(self, head: wire.Head) -> wire.Refusal | None:
        if self._is_authorised(head):
            return None
        return 401, "the secret is wrong or missing", ("WWW-Authenticate", "Bearer")

    def _refusal_of_ledger(self, head: wire.Head) -> wire.Refusal | None:
        if head.is_browser:
            return 403, "a browser has nothing to say to the ledger"
        if head.command != "POST":
            return 405, f"{head.path} takes POST only", ("Allow", "POST")
        if not head.is_json:
            return 415, "the body must be of type application/json"
        if self._shared is None:
            return 404, "this broker's queue keeps its account in memory: no HttpQueue can"
        return self._refusal_of_all()

    def _refusal_of_all(self) -> wire.Refusal | None:
        if self._stopping:
            return 503, "the broker is shutting down"
        return (503, "the queue is closed") if self._queue.closed else None

    def asked(self, connection: Connection, head: wire.Head, body: bytes = b"") -> None:
        """Take a request that is not refused."""
        if head.path == PATH:
            self._answer_later(connection, partial(self._carry, body))
        elif head.is_reserved:
            self._asked_reserved(connection, head)
        elif self._is_of_browser(head):
            connection.answer(wire.TO_PAGE)
        else:
            ask, wrong = wire.read_ask(head.query)
            if wrong and self._warnings.lets_through():
                log.warning("%.20r %.100r: %s", head.command, head.path, "; ".join(wrong))
            if wrong and self._strict:
                connection.refuse(400, wrong[0])
            else:
                self._stand_in_line(connection, ask)

    def _asked_reserved(self, connection: Connection, head: wire.Head) -> None:
        if head.path == "/status":
            connection.answer(wire.page(self._page))
        elif head.path == "/status/":
            connection.answer(wire.TO_PAGE)  # whose links are relative
        elif head.path in ("/favicon.ico", "/robots.txt"):
            connection.answer(wire.Answer(404))
        elif head.path == "/healthz":
            self._asked_health(connection)
        elif head.path == "/recent.json":
            connection.answer(wire.as_json(self._recent()))
        elif head.path == "/metrics":
            self._answer_later(connection, self._figures)
        else:
            self._answer_later(connection, lambda: wire.as_json(asdict(self._queue.snapshot())))

    def _on_our_terms(self, request: Request) -> Request:
        """Return a request that is bound by this broker's reserve, too.

        Raises:
            ValueError: it brings a limit that the reserve uses up, or of too many buckets.
        """
        ordered = None if request.order is None else request.order.limit
        if ordered is not None:
            check_limit(ordered, self._scheduler.reserve)
        for limit in (request.limit, ordered):
            if limit is not None and limit.max_concurrency > wire.MAX_BUCKETS:
                raise ValueError(f"max_concurrency must be at most {wire.MAX_BUCKETS} for a broker")
        if request.take is None:
            return request
        reserve = max(request.take.reserve, self._scheduler.reserve)
        return request._replace(take=request.take._replace(reserve=reserve))

    def _is_meant(self, head: wire.Head) -> bool:
        """Return false for a page whose name was pointed at this machine after it was loaded."""
        return self._secret is not None or names_loopback(head.host, self._served)

    def _is_of_browser(self, head: wire.Head) -> bool:
        return head.is_browser or (head.seems_browser and not self._is_meant(head))

    def _is_authorised(self, head: wire.Head) -> bool:
        if self._secret is None:
            return True
        kind, _, given = head.authorization.partition(" ")
        given_bytes = given.strip().encode("utf-8", "replace")
        return kind.lower() == "bearer" and hmac.compare_digest(given_bytes, self._secret)

    # --- waiting for permits ----------------------------------------------------------------------

    def _stand_in_line(self, connection: Connection, ask: wire.Ask) -> None:
        """Let a client wait at the place that was kept for it, or at the end of the line."""
        now_us = self._scheduler.now_us()
        place = Place(now_us, ask.priority_us)
        kept = None if ask.key is None else self._places.claim(ask.key, now_us)
        if kept is not None:
            place = min(place, kept, key=lambda one: one.arrived_us - one.priority_us)
        connection.ask, connection.place = ask, place
        connection.until = None if ask.timeout is None else self._loop.time() + ask.timeout
        self._wait(connection)
        if connection.head is not None and connection.head.is_ours:
            self._look_at_budget()

    def _wait(self, connection: Connection) -> None:
        """Let a client wait at its place, for as long as it will."""
        if connection.until is not None:
            left = connection.until - self._loop.time()
            connection.after(left, partial(self._timed_out, connection))
        self._join(connection)

    def _join(self, connection: Connection) -> None:
        assert connection.place is not None
        arrived_us, priority_us = connection.place
        try:
            future = enqueue(self._scheduler, connection.ask.shard_id, priority_us, arrived_us)
        except QueueClosed:
            connection.refuse(503, "the queue is closed")
            return
        connection.future = future
        future.add_done_callback(partial(self._bring, connection))

    def _bring(self, connection: Connection, future: Future[Permit]) -> None:
        """Take a permit to the loop, from the thread that got it."""
        if future.cancelled():
            return
        try:
            self._loop.call_soon_threadsafe(self._hand_over, connection, future)
        except RuntimeError:  # the loop is closed
            give_back(future)

    def _hand_over(self, connection: Connection, future: Future[Permit]) -> None:
        """Give a permit to its client, if that is still there and the permit not too old."""
        failure = future.exception()
        if connection.future is not future:
            if failure is None:
                self._return(future)
            return
        connection.future = None
        if isinstance(failure, SessionLimitExhausted):
            self._turn_away(connection, failure.resets_in)
        elif failure is not None:
            connection.place = None
            connection.refuse(503, str(failure) or type(failure).__name__)
        elif not self._scheduler.is_in_time(future.result()):
            self._join(connection)  # at its place, before the permit is given back
            self._return(future)
        else:
            permit, now_us = future.result(), self._scheduler.now_us()
            if connection.answer(wire.GRANTED):
                connection.place = None
                self.metrics.granted(now_us, permit.shard_id, permit.bucket, permit.waited)
            else:
                self._return(future)

    def leave_line(self, connection: Connection) -> None:
        """Take a client out of the line, and keep its place in case it comes back."""
        future, connection.future = connection.future, None
        place, connection.place = connection.place, None
        if place is not None and connection.ask.key is not None:
            self._places.keep(connection.ask.key, place, self._scheduler.now_us())
        if future is not None:
            self._return(future)

    def _return(self, future: Future[Permit]) -> None:
        """Leave the line, or give back the permit, where that may block."""
        self._returning.add(future)
        self._pool.submit(self._give_back, future)

    def _give_back(self, future: Future[Permit]) -> None:
        give_back(future)
        self._returning.discard(future)

    def _timed_out(self, connection: Connection) -> None:
        self.leave_line(connection)
        if connection.head is not None and connection.head.is_ours:
            connection.refuse(408, f"no permit within {connection.ask.timeout:g} s")
        else:
            connection.close()

    # --- a budget that is used up -----------------------------------------------------------------

    def _look_at_budget(self) -> None:
        """Turn those away who know what that means, if the budget is used up."""
        if not self._looking:
            self._looking = True
            self._pool.submit(self._read_budget)

    def _read_budget(self) -> None:
        left = None
        try:
            left = self._queue.snapshot().limit
        except LedgerError:
            log.debug("the budget could not be read", exc_info=True)
        self._in_loop(self._judge_budget, left)

    def _judge_budget(self, left: LimitSnapshot | None) -> None:
        self._looking = False
        if left is None or left.remaining > self._scheduler.reserve or not left.resets_in:
            return
        for one in list(self.connections):
            if one.future is not None and one.head is not None and one.head.is_ours:
                self._turn_away(one, left.resets_in)

    def _turn_away(self, connection: Connection, resets_in: float) -> None:
        """Tell a client when the budget resets; hold it until then if it would not understand."""
        if connection.head is not None and connection.head.is_ours:
            self.leave_line(connection)
            again = ("Retry-After", str(math.ceil(resets_in)))
            connection.refuse(429, "the session start limit is used up", again)
        else:
            hold = min(max(resets_in, TICK), MAX_HOLD)
            if connection.until is None or self._loop.time() + hold < connection.until:
                connection.after(hold, partial(self._wait, connection))

    # --- answers from the pool --------------------------------------------------------------------

    def _answer_later(self, connection: Connection, answer: Callable[[], wire.Answer]) -> None:
        """Answer a request with what a function returns, which may block."""
        self._pool.submit(self._work_out, connection.answer, answer)

    def _work_out(
        self, tell: Callable[[wire.Answer], object], answer: Callable[[], wire.Answer]
    ) -> None:
        try:
            worked_out = answer()
        except LedgerError as failure:
            worked_out = wire.error(503, str(failure))
        except Exception as failure:
            log.exception("a request could not be answered")
            worked_out = wire.error(500, type(failure).__name__)
        self._in_loop(tell, worked_out)

    def _in_loop(self, call: Callable[..., object], *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    def _carry(self, body: bytes) -> wire.Answer:
        """Take to the ledger what a process of an ``HttpQueue`` says to it."""
        assert self._shared is not None
        try:
            request = self._on_our_terms(request_from_json(json.loads(body)))
        except (ValueError, RecursionError) as failure:
            self._in_loop(self.metrics.refused.update, (400,))
            return wire.error(400, str(failure))
        reply = self._shared.carry(request, SHORT_PATIENCE)
        if OUTCOMES[reply.outcome.kind] is Permit:
            self._in_loop(self._count_grant, request, reply)
        return wire.as_json(reply_as_json(reply))

    def _count_grant(self, request: Request, reply: Reply) -> None:
        assert request.take is not None
        waited_us = (request.at_us or 0) - request.take.at_us
        self.metrics.granted(
            self._scheduler.now_us(),
            request.take.shard_id,
            reply.outcome.bucket,
            max(0, waited_us) / US_PER_SECOND,
        )

    def _asked_health(self, connection: Connection) -> None:
        """Answer with what was found out a moment ago, or together with all who ask just now."""
        if self._stopping or self._queue.closed:
            connection.answer(wire.error(503, "shutting down"))
        elif self._health is not None and self._loop.time() < self._health_until:
            connection.answer(self._health)
        else:
            self._ask_health.append(connection)
            if len(self._ask_health) == 1:
                self._pool.submit(self._work_out, self._tell_health, self._probe)

    def _probe(self) -> wire.Answer:
        if self._shared is not None:
            self._queue.snapshot()  # 503 if it is out of reach
        return wire.as_json({"status": "ok"})

    def _tell_health(self, health: wire.Answer) -> None:
        self._health, self._health_until = health, self._loop.time() + HEALTH_FOR
        asking, self._ask_health = self._ask_health, []
        for connection in asking:
            connection.answer(health)

    def _figures(self) -> wire.Answer:
        text = self.metrics.text(self._queue.snapshot(), len(self.connections))
        return wire.Answer(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def _recent(self) -> dict[str, object]:
        now_us = self._scheduler.now_us()
        return {
            "window": self._scheduler.ledger.window_us / US_PER_SECOND,
            "grants": [
                {
                    "shard_id": shard_id,
                    "bucket": bucket,
                    "ago": max(0, now_us - at_us) / US_PER_SECOND,
                }
                for at_us, shard_id, bucket in self.metrics.recent
            ],
        }


def give_back(future: Future[Permit]) -> None:
    """Leave the line, or give back the permit that came nevertheless."""
    if not future.cancel() and future.exception() is None:
        future.result().unused()
