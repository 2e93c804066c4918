"""The ledger of one process: the rules of ``token_bucket``, on an account in memory.

It has no lock; the scheduler calls it with its own lock held. It measures spacing and limit by the
monotonic clock, so setting the machine's time changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from gateway_queue_sync import forecast, limits, token_bucket
from gateway_queue_sync.forecast import Outlook
from gateway_queue_sync.limit_reader import PATIENCE_US
from gateway_queue_sync.models import Permit, Report, SessionStartLimit
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.token_bucket import Account, Denial


class MemoryLedger:
    """An account that ends with the process.

    Attributes:
        account: the account. The scheduler calls ``take`` and ``restamp`` with it.
        margin_us: how old a permit may be when it reaches its caller; 0: any age.
    """

    remote: Literal[False] = False
    take: Callable[[Account, int, int], Permit | Denial] = staticmethod(token_bucket.take)
    restamp: Callable[[Account, Permit, int, int], bool] = staticmethod(token_bucket.restamp)

    def __init__(self, settings: Settings) -> None:
        interval_us, self.margin_us, period_us = settings.timings_us
        self.account = Account(interval_us + self.margin_us, period_us, settings.reserve)
        if settings.refresh is not None:
            self.account.recent, self.account.patience_us = {}, PATIENCE_US
        self._now_us = settings.clock.now_us

    @property
    def should_read(self) -> bool:
        """Whether no permit is granted until the limit is read."""
        return self.account.total is None and self.account.refresh_owed

    @property
    def keeps_limit(self) -> bool:
        """Whether the session start limit is kept, even if it is not known yet."""
        return self.account.refresh_owed or self.account.total is not None

    @property
    def window_us(self) -> int:
        return self.account.window_us

    @property
    def max_concurrency(self) -> int:
        return self.account.max_concurrency

    @property
    def granted(self) -> int:
        return self.account.granted

    def is_reset_due(self, now_us: int) -> bool:
        resets_at_us = self.account.resets_at_us
        return resets_at_us is not None and now_us >= resets_at_us

    def report(self, permit: Permit, report: Report) -> int:
        if report is Report.UNUSED:
            token_bucket.unused(self.account, permit)
            return 0
        token_bucket.sent(self.account, permit, self._now_us())
        if report is Report.SENT:
            return 0
        return token_bucket.rejected(self.account, permit, self._now_us())

    def adopt(self, limit: SessionStartLimit) -> None:
        limits.adopt(self.account, limit, self._now_us())

    def read(self, limit: SessionStartLimit, sent_us: int) -> bool:
        return limits.read(self.account, limit, sent_us, self._now_us())

    def budget(self) -> limits.Budget | None:
        return limits.budget(self.account, self._now_us())

    def outlook(self) -> Outlook:
        return forecast.outlook(self.account, self._now_us())

    def eta_us(self, number: int, position: int, lines: int, waiting: int) -> int | None:
        outlook = forecast.outlook(self.account, self._now_us(), number)
        return forecast.eta_us(outlook, number, position, lines, waiting)


class NoLedger(MemoryLedger):
    """Grants each permit at once."""

    take = staticmethod(token_bucket.grant)
    restamp = staticmethod(lambda *_: True)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.account.window_us = 0

    def report(self, permit: Permit, report: Report) -> int:  # noqa: ARG002 - the signature of the base class
        return 0
