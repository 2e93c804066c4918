"""The clients that wait for permits, without HTTP: each is a future in a line of the queue.

Everything runs in the event loop. The queue's worker emits the events, since observers may take long.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from gateway_queue_sync.broker.positions import HeldPositions, Position
from gateway_queue_sync.broker.responses import GRANTED, Header, Response
from gateway_queue_sync.errors import QueueClosed, SessionLimitExhausted
from gateway_queue_sync.models import US_PER_SECOND, Permit, Report
from gateway_queue_sync.request_parser import PermitRequest
from gateway_queue_sync.scheduler import Scheduler
from gateway_queue_sync.worker import enqueue

log = logging.getLogger("gateway_queue_sync.broker")

TICK = 1.0  # s between two looks at the session start limit, and at what has expired
HOLD_US = 10 * US_PER_SECOND  # how long a bucket stays closed for a client that has yet to report
REPORT_US = 60 * US_PER_SECOND  # how long a client may report on its permit
MAX_REPORTABLE = 100_000
MAX_REST = 60.0  # s until a legacy client joins the line again, if the limit is used up


class Client(Protocol):
    """A client that waits."""

    legacy: bool

    def respond(self, response: Response) -> bool:
        """Send a response. Return false if the client is gone."""

    def refuse(self, status: int, reason: str, *headers: Header) -> None:
        """Refuse the permit."""


class WaitingRoom:
    """The clients of one broker that wait, and the positions of those that went away."""

    def __init__(
        self,
        scheduler: Scheduler,
        loop: asyncio.AbstractEventLoop,
        granted: Callable[[int, Permit], object],
    ) -> None:
        self.scheduler, self.loop, self.granted = scheduler, loop, granted
        self.clients: set[WaitingClient] = set()
        self.positions = HeldPositions()
        self.by_ticket: dict[str, WaitingClient] = {}
        # By ticket: permits on which their clients may still report, and when they were sent.
        self._reportable: OrderedDict[str, tuple[int, Permit]] = OrderedDict()
        self._tick()

    def _tick(self) -> None:
        self.loop.call_later(TICK, self._tick)
        now_us = self.scheduler.now_us()
        self.positions.expire(now_us)
        while self._reportable and next(iter(self._reportable.values()))[0] < now_us - REPORT_US:
            self._reportable.popitem(last=False)
        left = self.scheduler.ledger.budget()
        if left is None or left.remaining > self.scheduler.reserve or not left.resets_in_us:
            return
        for one in list(self.clients):
            if not one.client.legacy:
                one.exhausted(left.resets_in_us / US_PER_SECOND)

    def expect_report(self, ticket: str, permit: Permit, now_us: int) -> None:
        """Store a permit on which its client will report."""
        self._reportable.pop(ticket, None)
        self._reportable[ticket] = now_us, permit
        if len(self._reportable) > MAX_REPORTABLE:
            self._reportable.popitem(last=False)

    def report(self, ticket: str, report: Report) -> bool:
        """Record a report. Return false if there is no such permit."""
        _, permit = self._reportable.get(ticket, (0, None))
        if permit is None:
            return False
        if report is not Report.SENT:  # after ``sent``, the gateway may still reject the IDENTIFY
            del self._reportable[ticket]
        self._report(permit, report)
        return True

    def _report(self, permit: Permit, report: Report) -> None:
        event = self.scheduler.record_report(permit, report)
        if event is not None:
            self.scheduler.worker.emit_later(self.scheduler, event)

    def give_back(self, future: Future[Permit]) -> None:
        """Leave the line, or give back the permit if it was granted. Any thread may call this."""
        if not future.cancel() and future.exception() is None:
            self._report(future.result(), Report.UNUSED)

    def stop(self) -> None:
        """End all waits. Nobody waits for a permit, and none that was granted is kept."""
        futures = [one.future for one in self.clients if one.future is not None]
        for one in list(self.clients):
            one.end()
        for future in futures:
            self.give_back(future)


class WaitingClient:
    """A client that waits for one permit, at the position that it had or at the end of the line.

    Attributes:
        client: the client.
        position: its position, which it keeps while it waits for the session start limit to reset.
        future: the future of the permit; ``None`` while the client is in no line.
    """

    def __init__(self, room: WaitingRoom, client: Client, request: PermitRequest) -> None:
        self._room, self.client, self._request = room, client, request
        self.future: Future[Permit] | None = None
        self._timeout: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        older = room.by_ticket.get(request.ticket) if request.ticket else None
        if older is not None:
            older.leave()
            older.client.refuse(409, "a later request has the same ticket")
        now_us = room.scheduler.now_us()
        self.position = Position(now_us, request.priority_us)
        held = None if request.key is None else room.positions.claim(request.key, now_us)
        if held is not None:
            self.position = min(
                self.position, held, key=lambda one: one.arrived_us - one.priority_us
            )
        room.clients.add(self)
        if request.ticket:
            room.by_ticket[request.ticket] = self
        if request.timeout is not None:
            self._timeout = room.loop.call_later(request.timeout, self._timed_out)
        self._join()  # even if the limit is used up: joining asks the ledger how much is left now

    def _join(self) -> None:
        (arrived_us, priority_us), asked = self.position, self._request
        hold_us = HOLD_US if asked.confirms else 0
        try:
            future = enqueue(self._room.scheduler, asked.shard_id, priority_us, arrived_us, hold_us)
        except Exception as error:
            if not isinstance(error, QueueClosed):
                log.exception("a client cannot wait")
            self.end()
            self.client.refuse(503, str(error))
            return
        self.future = future
        future.add_done_callback(self._completed)

    def _completed(self, future: Future[Permit]) -> None:
        """Pass a permit to the event loop, from the thread that got it."""
        if not future.cancelled():
            try:
                self._room.loop.call_soon_threadsafe(self._hand_over, future)
            except RuntimeError:  # the loop is closed
                self._room.give_back(future)

    def _hand_over(self, future: Future[Permit]) -> None:
        """Send a permit to the client, unless the client has left or the permit is too old."""
        if self.future is not future:
            return  # the client has left, and the future is being given back
        room, failure, self.future = self._room, future.exception(), None
        now_us = room.scheduler.now_us()
        if isinstance(failure, SessionLimitExhausted):
            self.exhausted(failure.resets_in)
        elif failure is not None:
            self.end()
            self.client.refuse(503, str(failure) or type(failure).__name__)
        elif not room.scheduler.is_in_time(future.result()):
            self._join()  # at its position, before the permit is given back
            room.give_back(future)
        elif self.client.respond(GRANTED):
            self.end()
            if self._request.confirms:
                room.expect_report(self._request.ticket, future.result(), now_us)
            room.granted(now_us, future.result())
        else:
            room.give_back(future)
            self.leave()

    def exhausted(self, resets_in: float) -> None:
        """Refuse the client until the limit resets. One that does not understand a status waits."""
        if self.client.legacy:
            rest = min(max(resets_in, TICK), MAX_REST)
            self._rest = self._room.loop.call_later(rest, self._join)
        else:
            self.leave()
            again = ("Retry-After", str(math.ceil(resets_in)))
            self.client.refuse(429, "the session start limit is used up", again)

    def _timed_out(self) -> None:
        self.leave()
        self.client.refuse(408, f"no permit within {self._request.timeout:g} s")

    def leave(self) -> None:
        """Leave the line without a permit. The position is held for 30 s."""
        room, future = self._room, self.future
        if self in room.clients:
            self.end()
            if self._request.key is not None:
                room.positions.store(self._request.key, self.position, room.scheduler.now_us())
            if future is not None:
                room.give_back(future)

    def end(self) -> None:
        """End the wait."""
        self._room.clients.discard(self)
        if self._room.by_ticket.get(self._request.ticket) is self:
            del self._room.by_ticket[self._request.ticket]
        self.future = None
        for timer in (self._timeout, self._rest):
            if timer is not None:
                timer.cancel()
