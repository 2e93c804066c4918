"""The ledger of one process: the rules, on an account in memory, at the queue's clock.

It has no lock of its own; the queue calls it with its mutex held. Spacing and budget both run on
the monotonic clock, so that setting the machine's time neither grants early nor holds up.
"""

from __future__ import annotations

from gateway_queue_sync import rules
from gateway_queue_sync.clock import Clock
from gateway_queue_sync.models import Report, SessionStartLimit
from gateway_queue_sync.rules import Account, Denial, Grant


class MemoryLedger:
    """An account that lives and dies with the process."""

    def __init__(self, *, window_us: int, margin_us: int, period_us: int, clock: Clock) -> None:
        self._account = Account(window_us=window_us, period_us=period_us)
        self._now_us = clock.now_us
        self.margin_us = margin_us

    @property
    def window_us(self) -> int:
        return self._account.window_us

    @property
    def max_concurrency(self) -> int:
        return self._account.max_concurrency

    def take(self, shard_id: int, reserve: int, can_refresh: bool) -> Grant | Denial:
        """Grant a permit now, or say for how long there is none."""
        now_us = self._now_us()
        return rules.take(self._account, shard_id, now_us, now_us, reserve, can_refresh)

    def restamp(self, grant: Grant) -> bool:
        """Move the window of a permit that is about to be handed over; false if it is too late."""
        return rules.restamp(self._account, grant, self._now_us())

    def report(self, grant: Grant, report: Report) -> None:
        if report is Report.SENT:
            rules.sent(self._account, grant, self._now_us())
        elif report is Report.UNUSED:
            rules.unused(self._account, grant)
        else:
            rules.rejected(self._account, grant, self._now_us())

    def adopt(self, limit: SessionStartLimit) -> None:
        """Take a limit as it is given."""
        rules.adopt(self._account, limit, self._now_us())

    def renew(
        self, limit: SessionStartLimit, period: int, granted: int
    ) -> SessionStartLimit | None:
        """Adopt what was read at the reset of ``period``, or return ``None``: that is overtaken."""
        return rules.renew(self._account, limit, period, granted, self._now_us())

    def trust(self, period: int) -> bool:
        """Let the last known total count at the reset of ``period``; false: that is overtaken."""
        return rules.trust(self._account, period)

    def state(self) -> tuple[Account, int, int]:
        """Return the account to look at, not to change, with this instant's now and wall time."""
        now_us = self._now_us()
        return self._account, now_us, now_us
