"""Who is passed the events of a queue: its log, and the observer that its user gave.

No event is emitted twice, and nothing is computed for events to which nobody listens.
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
"""A used-up limit is an event again if its reset moves by more."""


class Observers:
    """Passes events on, and remembers the latest about each waiter.

    All events about a waiter are passed on by one thread, in order: its own, or the worker for a
    future. What is remembered of a waiter is changed with the scheduler's lock held.

    Args:
        settings: the queue's settings.
        budget: returns what is left of the limit now.

    Attributes:
        log: the queue's.
        latest: the latest event about each waiter that was followed; ``None`` before the first.
    """

    def __init__(self, settings: Settings, budget: Callable[[], Budget | None]) -> None:
        self._observer = settings.observer
        self.log = Log(settings.clock.now_us, budget, settings.reserve)
        self.latest: dict[int, type[Event] | None] = {}
        self._exhausted_until_us: int | None = None  # the reset in the latest BudgetExhausted

    def emit(self, event: Event, *, in_worker: bool) -> None:
        """Pass an event on; without the lock. Only what interrupts a caller is raised."""
        for observer in (self.log, self._observer):
            if observer is not None:
                try:
                    observer(event)
                except BaseException as error:
                    if not isinstance(error, Exception) and not in_worker:
                        raise
                    log.exception("an observer raised on %r; the queue goes on", event)

    def follow_wait(self, waiter: Waiter, left_us: int) -> bool:
        """Return whether to emit that one waits, for so long at most; true once for each."""
        if self._observer is None and left_us <= MIN_WAIT * US_PER_SECOND:
            return False
        if waiter.number in self.latest:
            return False
        self.latest[waiter.number] = None
        return True

    def waiting(self, waiter: Waiter, bucket: int, position: int, eta: float | None) -> Event:
        """Return the event that one waits."""
        self.latest[waiter.number] = ShardWaiting
        return ShardWaiting(waiter.shard_id, bucket, position, eta, waiter.number)

    def granted(self, waiter: Waiter, permit: Permit) -> Event | None:
        """Return the event of a permit, ``None`` if its waiter has left, or had one before."""
        if waiter.entry is None or self.latest.get(waiter.number) is ShardGranted:
            return None
        self.latest[waiter.number] = ShardGranted
        shard_id, bucket, number = permit.shard_id, permit.bucket, waiter.number
        return ShardGranted(shard_id, bucket, permit.waited, permit.remaining, number)

    def note_granted(self, number: int) -> None:
        """Note that the event of a waiter's permit was emitted before it stood in line."""
        self.latest[number] = ShardGranted

    def forget(self, number: int) -> type[Event] | None:
        """Return the latest event about a waiter, and forget it."""
        return self.latest.pop(number, None)

    def exhausted(self, denial: Denial, now_us: int) -> Event | None:
        """Return the event that the limit is used up, ``None`` if it was emitted."""
        ends_us, latest_us = now_us + denial.resets_in_us, self._exhausted_until_us
        if latest_us is not None and abs(ends_us - latest_us) <= SAME_END_US:
            return None
        self._exhausted_until_us = ends_us
        return BudgetExhausted(denial.remaining, denial.resets_in_us / US_PER_SECOND)


def left_event(waiter: Waiter, error: BaseException | None, now_us: int) -> Event:
    """Return the event that one has left because of an error, or (``None``) was cancelled."""
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
