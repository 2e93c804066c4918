"""Reads the session start limit, in a thread of its own so that no caller waits for Discord."""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from typing import TYPE_CHECKING

from gateway_queue_sync import limits
from gateway_queue_sync.clock import FOREVER_US, SYSTEM_CLOCK, if_slow, start
from gateway_queue_sync.errors import GatewayBotError
from gateway_queue_sync.events import Event, LimitUpdated
from gateway_queue_sync.limits import CONFIRM_US
from gateway_queue_sync.models import US_PER_SECOND, SessionStartLimit, check_limit, to_us
from gateway_queue_sync.settings import Settings

if TYPE_CHECKING:
    from gateway_queue_sync.scheduler import Scheduler

log = logging.getLogger("gateway_queue_sync")

PATIENCE_US = 5 * US_PER_SECOND
"""How long permits wait for a read after a reset. Then the last known total counts."""

FIRST_PAUSE_US = 5 * US_PER_SECOND
MAX_PAUSE_US = 300 * US_PER_SECOND
MAX_RETRY_AFTER = 86_400.0
WRONG_TOKEN = 401  # the status of the answer
WARN_AFTER = 1.0  # s, until a WARNING says what the constructor waits for
FIRST_LOOK, MAX_LOOK = 0.005, 0.25  # s, pauses between checks whether another process has read it


class LimitReader:
    """Reads the limit, one read at a time, with growing pauses after failures.

    Attributes:
        due_us: when to read next, if the queue is used then; ``FOREVER_US`` during a read.
        reading: whether a read is under way.
        outdated: ``update`` was called since the read began, so the result of the read is ignored.
        error: why the latest read failed; ``None`` if it succeeded.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._now_us = settings.clock.now_us
        reread = settings.reread_after
        self._reread_us = FOREVER_US if reread is None else to_us(reread)
        self._pause_us = self._sent_us = 0
        self.reading = self.outdated = self._warned = False
        self.error: BaseException | None = None
        self._has_limit = True  # whether there was one when the latest read began
        self.due_us = min(self._now_us() + self._reread_us, FOREVER_US)
        self._unlogged: tuple[int, BaseException, int] | None = None  # the latest failure

    def can_read(self, now_us: int) -> bool:
        """Return whether permits should wait for a read: no if one failed just now or takes too long."""
        resting = self._pause_us > 0 and now_us < self.due_us
        return not resting and not (self.reading and now_us - self._sent_us >= PATIENCE_US)

    def read_if_due(self, scheduler: Scheduler, now_us: int) -> None:
        """Read if that is due, or if a reset is. The scheduler's lock is held."""
        local = scheduler.local
        if now_us >= self.due_us or (local is not None and local.is_reset_due(now_us)):
            self.read(scheduler, now_us)

    def read(self, scheduler: Scheduler, now_us: int) -> None:
        """Read in a new thread, unless a read is under way or has failed just now. The lock is held."""
        if self.reading or not self.can_read(now_us):
            return
        try:
            self.reading, self.outdated = True, False
            self.due_us, self._sent_us = FOREVER_US, now_us
            self._has_limit = scheduler.ledger.budget() is not None
            args = weakref.ref(scheduler), now_us
            thread = threading.Thread(
                target=self._read, args=args, name="gateway-queue-limit", daemon=True
            )
            start(thread)
        except BaseException as error:
            self.reading, self.due_us = False, now_us  # first, in case another interrupt comes
            self._failed(error)
            if not isinstance(error, RuntimeError):  # no thread can be started
                raise

    def _read(self, ref: weakref.ref[Scheduler], sent_us: int) -> None:
        refresh, limit = self._settings.refresh, None
        assert refresh is not None
        try:
            limit = check_limit(refresh(), self._settings.reserve)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the queue goes on without
            self._failed(error)
            self.log_failure()
        scheduler = ref()
        if scheduler is not None:
            self._take_in(scheduler, limit, sent_us)

    def _take_in(self, scheduler: Scheduler, limit: SessionStartLimit | None, sent_us: int) -> None:
        """Pass on a limit that was read (``None``: the read failed), unless an ``update`` is newer."""
        event: Event | None = None
        ignored = 0

        def change() -> None:
            nonlocal event, ignored
            confirmed, local = True, scheduler.local
            if scheduler.remote is not None:
                scheduler.remote.read(scheduler, limit, sent_us)
            elif local is not None and limit is not None and not self.outdated:
                confirmed, event = local.read(limit, sent_us), LimitUpdated(limit)
                ignored = limits.ignored(local.account, limit)
            if limit is not None:
                self._succeeded(confirmed=confirmed)
                scheduler.limit_changed()

        scheduler.complete(change)
        if event is not None:
            scheduler.emit(event)
        if ignored and not self._warned and limit is not None:
            log.warning(
                "Discord says that %d session starts are left. By this queue's own count it is %d "
                "fewer, and the smaller number counts. update() sets another one",
                limit.remaining,
                ignored,
            )
        self._warned = ignored > 0

    def _succeeded(self, *, confirmed: bool) -> None:
        """Note that a read succeeded. If it is not ``confirmed``, it is repeated in a minute."""
        self._pause_us, self.error = 0, None
        pause_us = self._reread_us if confirmed else CONFIRM_US
        self.due_us = min(self._now_us() + pause_us, FOREVER_US)
        self.reading = False

    def _failed(self, error: BaseException) -> None:
        """Note that a read failed, and when the next may be; ``log_failure`` logs it."""
        first = not self._pause_us and not self.outdated
        self._pause_us = min(2 * self._pause_us or FIRST_PAUSE_US, MAX_PAUSE_US)
        pause_us = int(self._pause_us * random.uniform(0.5, 1.0))
        asked = getattr(error, "retry_after", None)
        if isinstance(asked, int | float) and 0 <= asked <= MAX_RETRY_AFTER:
            pause_us = max(pause_us, to_us(asked))
        self.due_us = self._now_us() + pause_us
        self.reading, self.error = False, error
        self._unlogged = (logging.WARNING if first else logging.INFO, error, pause_us)

    def log_failure(self) -> None:
        """Log a failed read, the first of several as WARNING. The scheduler's lock must not be held."""
        unlogged, self._unlogged = self._unlogged, None
        if unlogged is None:
            return
        level, error, pause_us = unlogged
        log.log(
            level,
            "could not read the session start limit (%s: %s); %s; the limit is read again in %.0f s",
            type(error).__name__,
            error,
            "at its reset the last known total counts"
            if self._has_limit
            else "no permit is granted until it is read",
            pause_us / US_PER_SECOND,
        )


def wait_for_limit(scheduler: Scheduler, *, raises: bool) -> None:
    """Wait for the first limit for at most 5 seconds, or for a newer one for at most 1 second.

    If it cannot be read, or the ledger cannot be reached, this returns. But if no limit is known, and
    ``raises`` is true, it raises.

    Raises:
        GatewayBotError: the token is wrong; the limit could not be read.
        LedgerError: the ledger cannot be reached.
        ValueError: the limit's total is not more than the reserve.
    """
    reader = scheduler.reader
    assert reader is not None

    def warn() -> None:
        if not reader.reading:  # else the reader logs that
            log.warning("waiting for the session start limit, which another process reads")

    with if_slow(WARN_AFTER, warn):
        failure = _wait_for(reader, scheduler) or reader.error
    is_unknown = scheduler.ledger.budget() is None
    if failure is not None and (_is_final(failure) or (raises and is_unknown)):
        raise failure


def _wait_for(reader: LimitReader, scheduler: Scheduler) -> BaseException | None:
    """Wait for a limit. Return why there is none, if that is known."""
    ledger, remote = scheduler.ledger, scheduler.remote
    since_us, pause = SYSTEM_CLOCK.now_us(), FIRST_LOOK
    while reader.reading or ledger.budget() is None:
        max_wait_us = PATIENCE_US if ledger.budget() is None else US_PER_SECOND
        if SYSTEM_CLOCK.now_us() - since_us >= max_wait_us:
            return GatewayBotError("the session start limit was not read in time")
        time.sleep(pause)
        pause = min(2 * pause, MAX_LOOK)
        if reader.reading:
            continue
        failure = reader.error
        if failure is None and remote is not None:
            failure = scheduler.locked(remote.inquire, scheduler)
        if failure is not None:
            return failure
    return None


def _is_final(failure: BaseException) -> bool:
    """Return whether reading again would not help."""
    wrong_token = isinstance(failure, GatewayBotError) and failure.status == WRONG_TOKEN
    return wrong_token or isinstance(failure, ValueError)
