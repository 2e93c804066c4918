"""When the session start limit is read: in a thread of its own, so that nobody waits for it."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from gateway_queue_sync.models import SessionStartLimit
from gateway_queue_sync.token_bucket import CONFIRM_US, US_PER_SECOND, to_us

log = logging.getLogger("gateway_queue_sync")

Refresh = Callable[[], SessionStartLimit]

Done = Callable[[SessionStartLimit | None, BaseException | None], None]

FOREVER_US = 1 << 62
PATIENCE_US = 5 * US_PER_SECOND
"""How long a reset waits for the limit to be read; then the last known total counts."""
FIRST_PAUSE_US = 5 * US_PER_SECOND
MAX_RETRY_AFTER = 86_400.0
MAX_PAUSE_US = 300 * US_PER_SECOND


class LimitReader:
    """Reads the limit, one read at a time, with growing pauses after failures.

    Attributes:
        due_us: when to read next, if the queue is used then; ``FOREVER_US`` while a read goes on.
        reading: whether a read goes on.
    """

    def __init__(self, refresh: Refresh, reread_after: float | None, now_us: int) -> None:
        self._refresh = refresh
        self._reread_us = FOREVER_US if reread_after is None else to_us(reread_after)
        self._pause_us = self._sent_us = 0
        self.reading = False
        self.due_us = min(now_us + self._reread_us, FOREVER_US)

    def is_resting(self, now_us: int) -> bool:
        """Return whether a read failed so recently that the next one has to wait."""
        return self._pause_us > 0 and now_us < self.due_us

    def is_slow(self, now_us: int) -> bool:
        """Return whether a read goes on for so long that a reset does not wait for it any more."""
        return self.reading and now_us - self._sent_us >= PATIENCE_US

    def start(self, done: Done, now_us: int) -> None:
        """Read in a new thread, which then calls ``done`` with the limit or with what went wrong."""
        self.reading, self.due_us, self._sent_us = True, FOREVER_US, now_us
        try:
            threading.Thread(
                target=_read, args=(self._refresh, done), name="gateway-queue-limit", daemon=True
            ).start()
        except BaseException as error:
            self.failed(now_us, error)
            if not isinstance(error, RuntimeError):  # the system gives no more threads
                raise

    def succeeded(self, now_us: int, *, confirmed: bool) -> None:
        """Note that a read succeeded; one whose reset is not confirmed is repeated soon."""
        self.reading, self._pause_us = False, 0
        self.due_us = min(now_us + (self._reread_us if confirmed else CONFIRM_US), FOREVER_US)

    def failed(self, now_us: int, error: BaseException, *, quiet: bool = False) -> None:
        """Note that a read failed, and when the next may be; warn at the first of several."""
        first = not self._pause_us and not quiet
        self._pause_us = min(2 * self._pause_us or FIRST_PAUSE_US, MAX_PAUSE_US)
        pause_us = int(self._pause_us * random.uniform(0.5, 1.0))
        asked = getattr(error, "retry_after", None)
        if isinstance(asked, int | float) and 0 <= asked <= MAX_RETRY_AFTER:
            pause_us = max(pause_us, to_us(asked))
        self.reading, self.due_us = False, now_us + pause_us
        log.log(
            logging.WARNING if first else logging.INFO,
            "could not read the session start limit (%s: %s); at its reset the last known total counts; "
            "the limit is read again in %.0f s",
            type(error).__name__,
            error,
            pause_us / US_PER_SECOND,
        )


def _read(refresh: Refresh, done: Done) -> None:
    limit = failure = None
    try:
        limit = refresh()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the queue goes on without an answer
        failure = error
    try:
        done(limit, failure)
    finally:
        failure = None  # its traceback holds this frame
