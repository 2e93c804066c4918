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
    def max_concurrency(self) -> int:
        return self._account.max_concurrency

    def take(self, shard_id: int, reserve: int, can_refresh: bool) -> Grant | Denial:
        now_us = self._now_us()
        return rules.take(self._account, shard_id, now_us, now_us, reserve, can_refresh)

    def restamp(self, grant: Grant) -> bool:
        return rules.restamp(self._account, grant, self._now_us())

    def report(self, grant: Grant, report: Report) -> None:
        if report is Report.SENT:
            rules.sent(self._account, grant, self._now_us())
        elif report is Report.UNUSED:
            rules.unused(self._account, grant)
        else:
            rules.rejected(self._account, grant, self._now_us())

    def adopt(self, limit: SessionStartLimit) -> None:
        rules.adopt(self._account, limit, self._now_us())

    def refresh_failed(self) -> None:
        self._account.refresh_owed = True

    def account(self) -> tuple[Account, int, int]:
        now_us = self._now_us()
        return self._account, now_us, now_us
