"""Passes the events of a queue on to its log and to the user's observer.

No event is emitted twice. An event that neither of them needs is not computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from gateway_queue_sync.errors import AcquireTimeout, QueueClosed, SessionLimitExhausted
from gateway_queue_sync.events import (
    BudgetExhausted,
    Event,
    LeaveReason,
    ShardGranted,
    ShardLeft,
    ShardWaiting,
)
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.lines import Waiter
from gateway_queue_sync.log import MIN_WAIT, Log
from gateway_queue_sync.models import US_PER_SECOND, Permit
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.token_bucket import Denial

log = logging.getLogger("gateway_queue_sync")

SAME_END_US = 60 * US_PER_SECOND
"""If the reset of a used-up limit moves by more than this, that is a new event."""


class Observers:
    """Passes events on, and stores the type of the latest event of each waiter.

    One thread emits all events of a waiter, in order: its own, or for a future the worker. ``latest`` is
    changed with the scheduler's lock held.

    Args:
        settings: the queue's settings.
        budget: returns what is left of the limit now.

    Attributes:
        log: the queue's.
        latest: the type of the latest event, by waiter number; ``None`` before the first.
    """

    def __init__(self, settings: Settings, budget: Callable[[], Budget | None]) -> None:
        self._observer = settings.observer
        self.log = Log(settings.clock.now_us, budget, settings.reserve)
        self.latest: dict[int, type[Event] | None] = {}
        self._exhausted_until_us: int | None = None  # the reset in the latest BudgetExhausted

    def emit(self, event: Event, *, in_worker: bool) -> None:
        """Pass an event on, without the lock. Errors are logged; only an interrupt is raised."""
        for observer in (self.log, self._observer):
            if observer is not None:
                try:
                    observer(event)
                except BaseException as error:
                    if not isinstance(error, Exception) and not in_worker:
                        raise
                    log.exception("an observer raised on %r; the queue goes on", event)

    def follow_wait(self, waiter: Waiter, left_us: int) -> bool:
        """Return whether a wait of at most ``left_us`` needs events; true once for each waiter."""
        if self._observer is None and left_us <= MIN_WAIT * US_PER_SECOND:
            return False
        if waiter.number in self.latest:
            return False
        self.latest[waiter.number] = None
        return True

    def waiting(self, waiter: Waiter, bucket: int, position: int, eta: float | None) -> Event:
        """Return the ``ShardWaiting`` of a waiter."""
        self.latest[waiter.number] = ShardWaiting
        return ShardWaiting(waiter.shard_id, bucket, position, eta, waiter.number)

    def granted(self, waiter: Waiter, permit: Permit) -> Event | None:
        """Return the ``ShardGranted`` of a waiter; ``None`` if it has left, or had this event before."""
        if waiter.entry is None or self.latest.get(waiter.number) is ShardGranted:
            return None
        self.latest[waiter.number] = ShardGranted
        shard_id, bucket, number = permit.shard_id, permit.bucket, waiter.number
        return ShardGranted(shard_id, bucket, permit.waited, permit.remaining, number)

    def note_granted(self, number: int) -> None:
        """Note that a waiter had its ``ShardGranted`` before it joined the line."""
        self.latest[number] = ShardGranted

    def forget(self, number: int) -> type[Event] | None:
        """Return the type of the latest event of a waiter, and remove it."""
        return self.latest.pop(number, None)

    def exhausted(self, denial: Denial, now_us: int) -> Event | None:
        """Return the ``BudgetExhausted`` of a denial; ``None`` if it was emitted before."""
        ends_us, latest_us = now_us + denial.resets_in_us, self._exhausted_until_us
        if latest_us is not None and abs(ends_us - latest_us) <= SAME_END_US:
            return None
        self._exhausted_until_us = ends_us
        return BudgetExhausted(denial.remaining, denial.resets_in_us / US_PER_SECOND)


def left_event(waiter: Waiter, error: BaseException | None, now_us: int) -> Event:
    """Return the ``ShardLeft`` of a waiter that left because of an error; ``None``: cancelled."""
    reason: LeaveReason = "interrupted"
    match error:
        case None:
            reason = "cancelled"
        case AcquireTimeout():
            reason = "timeout"
        case QueueClosed():
            reason = "closed"
        case SessionLimitExhausted():
            reason = "exhausted"
        case Exception():
            reason = "error"
    waited = max(0, now_us - waiter.arrived_us) / US_PER_SECOND
    return ShardLeft(waiter.shard_id, waited, reason, waiter.number)
