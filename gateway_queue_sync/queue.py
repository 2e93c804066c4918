"""The queue that users hold: what it offers, on the waiting of ``waiting.py``, and its futures."""

from __future__ import annotations

import contextlib
import math
import threading
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Literal, Protocol, Self, runtime_checkable

from gateway_queue_sync import rules
from gateway_queue_sync.clock import Clock
from gateway_queue_sync.errors import AcquireTimeout, QueueClosed
from gateway_queue_sync.events import LimitUpdated, Observer
from gateway_queue_sync.ledgers import Ledger
from gateway_queue_sync.lines import PermitFuture, Ticket
from gateway_queue_sync.models import (
    Permit,
    QueueSnapshot,
    SessionStartLimit,
    real_number,
    whole_number,
)
from gateway_queue_sync.rules import Grant, to_us
from gateway_queue_sync.waiting import (
    Errand,
    Refresh,
    Waiting,
    as_timeout,
    longest_sleep_us,
    reason_for,
)

WhenExhausted = Literal["wait", "raise"]


@runtime_checkable
class Queue(Protocol):
    """All that a framework needs of a queue. Write your own broker on it."""

    def acquire(self, shard_id: int, timeout: float | None = None) -> Permit:
        """Block until the shard may identify, and return its permit; raise if it may not.

        Args:
            shard_id: the shard that wants to IDENTIFY, from 0 on.
            timeout: the longest wait in seconds; ``None`` waits for ever.
        """


class GatewayQueue(Waiting):
    """A queue that blocks threads until their shards may identify: what every queue here is.

    Made by its policies (``LocalQueue``, ``LargeBotQueue``, ...), each a choice of ledger. All
    methods may be called from any thread, but not from a signal handler or finalizer that
    interrupts one of them (``RuntimeError``); ``close`` may be called from there, too. As a context
    manager it closes itself at the end.

    Source of the rules: https://discord.com/developers/docs/topics/gateway (*Rate Limiting*, *Session
    Start Limit*).

    Args:
        ledger: the account of who was granted what, when.
        clock: what tells the time; ``testing.FakeClock`` in tests.
        observer: called with each event (``gateway_queue_sync.events``).
        refresh: called without arguments when the limit is due to reset, to read it anew.
        reserve: session starts never to use up: at ``remaining <= reserve`` the queue is exhausted.
        when_exhausted: ``"wait"`` for the reset, or ``"raise"`` ``SessionLimitExhausted``.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Clock,
        observer: Observer | None = None,
        refresh: Refresh | None = None,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
    ) -> None:
        if when_exhausted not in ("wait", "raise"):
            raise ValueError(f'when_exhausted must be "wait" or "raise", not {when_exhausted!r}')
        for name, callback in (("observer", observer), ("refresh", refresh)):
            if callback is not None and not callable(callback):
                raise TypeError(f"{name} must be callable, not {type(callback).__name__}")
        reserve = whole_number("reserve", reserve)
        super().__init__(ledger, clock, observer, refresh, reserve, when_exhausted == "raise")

    def _begin(self) -> None:
        super()._begin()
        self._server: threading.Thread | None = None  # the futures' thread

    # --- what users call --------------------------------------------------------------------------

    def acquire(
        self, shard_id: int, timeout: float | None = None, *, priority: float = 0.0
    ) -> Permit:
        """Block until the shard may identify, and return its permit.

        With no permit available the calling thread waits in its bucket's line: first come, first
        served. Waiting costs nothing: a call that times out or is interrupted uses up no permit.

        Args:
            shard_id: the shard that wants to IDENTIFY, from 0 on.
            timeout: the longest wait in seconds; ``None`` or ``inf`` waits for ever, 0 tries once.
            priority: a head start in seconds: the shard counts as having arrived that much earlier
                (a negative one stands back). Nobody starves by it.

        Raises:
            AcquireTimeout: no permit came in time; its ``eta`` says when one would have.
            SessionLimitExhausted: the limit is used up, and the queue was made to raise then.
            QueueClosed: the queue is closed, or was while waiting.
            BrokerError: the ledger that processes share was out of reach when the time was up.
            TypeError, ValueError: an argument is no shard id, no timeout or no priority.
            RuntimeError: called from a signal handler or finalizer that interrupted this queue, or
                in a forked child.
        """
        if type(shard_id) is not int or shard_id < 0:
            shard_id = whole_number("shard_id", shard_id)
        if timeout is not None:
            timeout = _patience(timeout)
        priority_us = 0 if priority == 0.0 and type(priority) is float else _head_start(priority)
        permit = self._at_once(shard_id)
        if (
            permit.__class__ is Permit
        ):  # not isinstance: interrupts come after calls, and would lose it
            return permit
        if timeout != 0 and threading.current_thread() is self._server:
            raise RuntimeError("a future's callback must not block on the queue that serves it")
        ticket = self._ticket(shard_id, priority_us, permit)
        try:
            return self._wait_for_turn(ticket, timeout)
        except AcquireTimeout as error:
            self._explain(error, ticket)
            raise

    def try_acquire(self, shard_id: int) -> Permit | None:
        """Return a permit if the shard may identify now, else ``None``; nobody in line is passed.

        Raises:
            SessionLimitExhausted: the limit is used up, and the queue was made to raise then.
            QueueClosed: the queue is closed.
            BrokerError: the ledger that processes share is out of reach.
            TypeError, ValueError: ``shard_id`` is no shard id.
            RuntimeError: as ``acquire`` does.
        """
        shard_id = whole_number("shard_id", shard_id)
        permit = self._at_once(shard_id)
        if permit.__class__ is Permit:
            return permit
        with contextlib.suppress(AcquireTimeout):
            return self._wait_for_turn(self._ticket(shard_id, 0, permit), 0.0)
        return None

    def enqueue(self, shard_id: int, *, priority: float = 0.0) -> Future[Permit]:
        """Join the line without a thread, and return the future of the permit.

        On a free bucket the future is done at once. Cancelling it leaves the line and uses up
        nothing; once ``cancel`` says no, the permit is there and must be used or given back
        (``unused``). Callbacks run in the one thread that serves all futures: keep them quick, and
        never block in them on this queue. The future carries ``QueueClosed`` if the queue is closed
        before its turn, and ``SessionLimitExhausted`` if the queue was made to raise that. From
        asyncio::

            permit = await asyncio.wrap_future(queue.enqueue(shard_id))

        Args:
            shard_id: the shard that wants to IDENTIFY, from 0 on.
            priority: a head start in seconds, as for ``acquire``.

        Raises:
            QueueClosed: the queue is closed.
            TypeError, ValueError: an argument is no shard id or no priority.
            RuntimeError: as ``acquire`` does.
        """
        shard_id = whole_number("shard_id", shard_id)
        priority_us = _head_start(priority)
        future = PermitFuture()
        permit = self._at_once(shard_id)
        if permit.__class__ is Permit:
            _complete(future, permit)
            return future
        ticket = self._ticket(shard_id, priority_us, permit, future)
        future.ticket, future.on_cancel = ticket, self._leave_cancelled
        try:
            self._fulfil(ticket, self._join_as_future(ticket))
        except BaseException:
            future.cancel()
            raise
        return future

    def _enqueue_as_of(
        self,
        arrived_us: int,
        shard_id: int,
        priority_us: int,
        elsewhere: Callable[[Errand], object],
    ) -> Future[Permit]:
        """Join the line at the place of an arrival, without what may block: an event loop may not.

        The thread that serves all futures asks, on a free bucket, too. What an observer or the log
        is to be told is handed ``elsewhere``.
        """
        future = PermitFuture()
        ticket = self._ticket(shard_id, priority_us, None, future, arrived_us)
        future.ticket, future.on_cancel = ticket, self._leave_cancelled
        self._check_thread()
        self._join_as_future(ticket, elsewhere)
        return future

    def _explain(self, error: AcquireTimeout, ticket: Ticket) -> None:
        """Say in the error of a ticket that timed out when its permit would have come."""

    def _ticket(
        self,
        shard_id: int,
        priority_us: int,
        answer: Permit | Grant | None,
        future: PermitFuture | None = None,
        arrived_us: int | None = None,
    ) -> Ticket:
        """Return a place in line, that of a permit which came too late if there is one."""
        late = answer if isinstance(answer, Grant) else None
        if arrived_us is None:
            arrived_us = self._now_us() if late is None else late.stamp_us
        ticket = Ticket(shard_id, arrived_us, priority_us, future)
        ticket.grant = late
        return ticket

    def update(self, limit: SessionStartLimit) -> None:
        """Adopt a session start limit, as it is given; who waits for the budget goes on at once.

        Another ``max_concurrency`` puts everybody in the line of their new bucket, in their order;
        every new bucket starts from the latest grant of any old one.

        Raises:
            TypeError: ``limit`` is no ``SessionStartLimit``.
            ValueError: its ``total`` is not more than this queue's reserve.
            QueueClosed: the queue is closed.
            BrokerError: the ledger that processes share is out of reach.
            RuntimeError: as ``acquire`` does.
        """
        self._check_limit(limit)
        self._check_thread()
        self._adopt(limit)
        self._tell(LimitUpdated(limit))

    @abstractmethod
    def _adopt(self, limit: SessionStartLimit) -> None:
        """Have the ledger take a limit as it is given, and let those who wait know."""

    @abstractmethod
    def snapshot(self) -> QueueSnapshot:
        """Return who waits where, until when, and what is left of the budget; works when closed, too.

        Raises:
            RuntimeError: as ``acquire`` does.
        """

    def close(self) -> None:
        """Grant no more permits: whoever waits gets ``QueueClosed``. Closing again changes nothing."""
        self._closed = True
        if self._is_forked():
            return
        if self._inside():  # a signal handler, in the midst of something: right after that, then
            threading.Thread(target=self.close, name="gateway-queue-close").start()
            return
        with self._mutex:
            futures = list(self._futures)
            for ticket in self._lines:
                self._wake(ticket)
        for ticket in futures:
            self._fail(ticket, QueueClosed())

    @property
    def closed(self) -> bool:
        """Whether the queue was closed."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _describe(self, granted: int, left: rules.Budget | None) -> str:
        """Return the repr of a queue with this many permits granted and this budget left."""
        budget = "" if left is None else f" remaining={left.remaining}/{left.total}"
        state = " closed" if self._closed else ""
        waiting = len(self._threads) + len(self._futures)
        return f"<{type(self).__name__} waiting={waiting} granted={granted}{budget}{state}>"

    # --- futures ----------------------------------------------------------------------------------

    def _join_as_future(
        self, ticket: Ticket, elsewhere: Callable[[Errand], object] | None = None
    ) -> Grant | None:
        """Stand in line for a future; return its grant if it need not wait there.

        Given an ``elsewhere`` for what may block, the ledger is not asked here.
        """
        with self._mutex:
            try:
                if ticket.finished:
                    return None  # cancelled, or failed by close, while its permit came too late
                self._join(ticket)
                answer = self._ask(ticket) if elsewhere is None else None
                if isinstance(answer, Grant):
                    return answer
                if self._lines.first(self._lines.bucket(ticket)) is ticket:
                    self._look_at(ticket)
                announcement = self._announcement(ticket)
                if self._server is None or not self._server.is_alive():
                    self._server = threading.Thread(
                        target=self._serve_futures, name="gateway-queue-futures", daemon=True
                    )
                    self._server.start()
            finally:
                # Asking, interrupted right after it has let go of the mutex, ends without it.
                if not self._inside():
                    self._mutex.acquire()
        if announcement is not None and elsewhere is not None:
            elsewhere(announcement)
        elif announcement is not None:
            announcement()
        return None

    def _serve_futures(self) -> None:
        """Ask for the futures that are first of their lines, while there are any."""
        while (errand := self._sleep_until_errand()) is not None:
            errand()

    def _sleep_until_errand(self) -> Errand | None:
        with self._mutex:
            while not self._closed:  # close() fails those that are left
                chore = self._chore()
                if chore is not None:
                    return chore
                if not self._futures:
                    break
                now_us, at_us = self._now_us(), self._agenda.next_us
                if at_us is None or at_us > now_us:
                    self._bell.wait(as_timeout(None if at_us is None else at_us - now_us))
                    continue
                ticket = self._lines.first(self._agenda.pop())
                if ticket is None or ticket.future is None:
                    continue
                try:
                    answer = self._ask(ticket)
                    if isinstance(answer, Grant):
                        return partial(self._serve, ticket, partial(self._fulfil, ticket, answer))
                    errand = self._errand_before_sleep(ticket, answer)
                except Exception as error:  # noqa: BLE001 - the future's holder gets it
                    return partial(self._fail, ticket, error)
                sleep_us = longest_sleep_us(answer)
                number = self._lines.bucket(ticket)  # asking may have shown that it is another one
                if errand is not None:
                    self._agenda.set(number, rules.NEVER)
                    return partial(self._serve, ticket, errand)
                if sleep_us is not None:
                    self._agenda.set(number, self._now_us() + sleep_us)
            self._server = None
            return None

    def _chore(self) -> Errand | None:
        """Return what else their thread has to do for the futures, if anything."""
        return None

    def _serve(self, ticket: Ticket, errand: Errand) -> None:
        """Run an errand for a future, whose holder gets what goes wrong."""
        try:
            errand()
        except BaseException as error:  # noqa: BLE001 - the future's holder gets it
            self._fail(ticket, error)

    def _fulfil(self, ticket: Ticket, grant: Grant | None) -> None:
        """Hand a permit to its future, unless that was cancelled; one that comes too late rejoins."""
        assert ticket.future is not None
        while grant is not None:
            permit = self._deliver(ticket, grant)
            if permit is None and not ticket.future.cancelled():
                grant = self._join_as_future(ticket)
                continue
            with self._mutex:
                mine = permit is not None and self._claim(ticket)
                if mine:
                    ticket.hand_over()
            if permit is None or not mine:
                self._step_out(ticket, "cancelled")
            else:
                _complete(ticket.future, permit)
            return

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """Give a future an error instead of a permit."""
        assert ticket.future is not None
        with self._mutex:
            mine = self._claim(ticket)
        try:
            self._step_out(ticket, reason_for(error))
            begun = ticket.future.running()  # by a call of this that was interrupted
            if mine and (begun or ticket.future.set_running_or_notify_cancel()):
                ticket.future.on_cancel = None
                ticket.future.set_exception(error)
        finally:
            if mine and not ticket.future.done():  # interrupted: the next close does it
                with self._mutex:
                    ticket.finished = False
                    self._futures.add(ticket)

    def _claim(self, ticket: Ticket) -> bool:
        """Return whether the ticket's future is the caller's to complete; with the mutex held."""
        mine = not ticket.finished
        ticket.finished = True
        return mine

    def _leave_cancelled(self, ticket: Ticket) -> None:
        """Leave the line for a future that was cancelled, and tell those who wait for it."""
        if self._is_forked():
            return
        if self._inside():  # a signal handler, in the midst of something: right after that, then
            threading.Thread(
                target=self._leave_cancelled, args=(ticket,), name="gateway-queue-cancel"
            ).start()
            return
        with self._mutex:
            mine = self._claim(ticket)
        self._step_out(ticket, "cancelled")
        if mine and ticket.future is not None:
            ticket.future.set_running_or_notify_cancel()


def _complete(future: PermitFuture, permit: Permit) -> None:
    """Hand a permit to its future, or give it back if that is cancelled or interrupted just now."""
    try:
        if future.set_running_or_notify_cancel():
            future.on_cancel = None
            future.set_result(permit)
    finally:
        if future.cancelled() or not future.done():
            permit.unused()


def _patience(timeout: object) -> float | None:
    """Return a timeout in seconds, ``None`` for one that never ends."""
    patience = real_number("timeout", timeout)
    if patience < 0:
        raise ValueError(f"timeout must not be negative, not {patience:g}")
    return patience if patience <= threading.TIMEOUT_MAX else None


def _head_start(priority: object) -> int:
    head_start = real_number("priority", priority)
    if math.isinf(head_start):
        raise ValueError(f"priority must be finite, not {head_start}")
    return to_us(head_start)
