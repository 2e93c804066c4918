"""When the session start limit is read: in a thread of its own, so that nobody waits for it."""

from __future__ import annotations

import logging
import random
import threading
import weakref
from typing import TYPE_CHECKING

from gateway_queue_sync import limits
from gateway_queue_sync.clock import FOREVER_US, start
from gateway_queue_sync.events import Event, LimitUpdated
from gateway_queue_sync.limits import CONFIRM_US
from gateway_queue_sync.models import US_PER_SECOND, SessionStartLimit, check_limit, to_us
from gateway_queue_sync.settings import Settings

if TYPE_CHECKING:
    from gateway_queue_sync.scheduler import Scheduler

log = logging.getLogger("gateway_queue_sync")

PATIENCE_US = 5 * US_PER_SECOND
"""How long a reset waits for the limit to be read; then the last known total counts."""

FIRST_PAUSE_US = 5 * US_PER_SECOND
MAX_PAUSE_US = 300 * US_PER_SECOND
MAX_RETRY_AFTER = 86_400.0


class LimitReader:
    """Reads the limit, one read at a time, with growing pauses after failures.

    Attributes:
        due_us: when to read next, if the queue is used then; ``FOREVER_US`` while a read goes on.
        reading: whether a read goes on.
        outdated: a limit was given since the read began, so what is read does not count.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._now_us = settings.clock.now_us
        reread = settings.reread_after
        self._reread_us = FOREVER_US if reread is None else to_us(reread)
        self._pause_us = self._sent_us = 0
        self.reading = self.outdated = self._warned = False
        self.due_us = min(self._now_us() + self._reread_us, FOREVER_US)
        self._unlogged: tuple[int, BaseException, int] | None = None  # the latest failure

    def can_read(self, now_us: int) -> bool:
        """Return whether a reset may wait for a read: none failed just now, and none takes too long."""
        resting = self._pause_us > 0 and now_us < self.due_us
        return not resting and not (self.reading and now_us - self._sent_us >= PATIENCE_US)

    def read_if_due(self, scheduler: Scheduler, now_us: int) -> None:
        """Read if it is time to, or a reset is due; with the scheduler's lock held."""
        local = scheduler.local
        if now_us >= self.due_us or (local is not None and local.is_reset_due(now_us)):
            self.read(scheduler, now_us)

    def read(self, scheduler: Scheduler, now_us: int) -> None:
        """Read in a new thread, unless a read goes on or failed just now; with the lock held."""
        if self.reading or not self.can_read(now_us):
            return
        try:
            self.reading, self.outdated = True, False
            self.due_us, self._sent_us = FOREVER_US, now_us
            args = weakref.ref(scheduler), now_us
            thread = threading.Thread(
                target=self._read, args=args, name="gateway-queue-limit", daemon=True
            )
            start(thread)
        except BaseException as error:
            self.reading, self.due_us = False, now_us  # if an interrupt comes once more
            self._failed(error)
            if not isinstance(error, RuntimeError):  # the system gives no more threads
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
        """Take in a limit that was read, unless an ``update`` is newer; ``None`` if that failed."""
        event: Event | None = None
        ignored = 0

        def change() -> None:
            nonlocal event, ignored
            confirmed, local = True, scheduler.local
            if scheduler.remote is not None:
                scheduler.remote.read(scheduler, limit)
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
                "Discord says that %d session starts are left; this queue, which counts its permits, "
                "goes by %d fewer, since the smaller number is safe. update() sets another one",
                limit.remaining,
                ignored,
            )
        self._warned = ignored > 0

    def _succeeded(self, *, confirmed: bool) -> None:
        """Note that a read succeeded; one that is not ``confirmed`` is repeated soon."""
        self._pause_us = 0
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
        self.reading = False
        self._unlogged = (logging.WARNING if first else logging.INFO, error, pause_us)

    def log_failure(self) -> None:
        """Log a failed read, a warning for the first of several; without the scheduler's lock."""
        unlogged, self._unlogged = self._unlogged, None
        if unlogged is None:
            return
        level, error, pause_us = unlogged
        log.log(
            level,
            "could not read the session start limit (%s: %s); at its reset the last known total counts; "
            "the limit is read again in %.0f s",
            type(error).__name__,
            error,
            pause_us / US_PER_SECOND,
        )
