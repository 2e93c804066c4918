"""The ledger of one process: the rules of ``token_bucket``, on an account in memory.

It has no lock of its own; the scheduler calls it with its lock held. Spacing and limit both run on the
monotonic clock, so setting the machine's time neither grants early nor delays.
"""

from __future__ import annotations

from typing import Literal

from gateway_queue_sync import token_bucket
from gateway_queue_sync.clock import Clock
from gateway_queue_sync.forecast import Outlook
from gateway_queue_sync.limit_reader import PATIENCE_US
from gateway_queue_sync.models import Permit, Report, SessionStartLimit
from gateway_queue_sync.token_bucket import Account, Budget, Denial, Reason, take


class MemoryLedger:
    """An account that lives and dies with the process."""

    remote: Literal[False] = False

    def __init__(
        self,
        *,
        interval_us: int,
        margin_us: int,
        period_us: int,
        reserve: int,
        reads: bool,
        clock: Clock,
    ) -> None:
        self._account = Account(window_us=interval_us + margin_us, period_us=period_us)
        if reads:
            self._account.recent = {}
        self._reserve = reserve
        self._now_us = clock.now_us
        self.margin_us = margin_us

    @property
    def window_us(self) -> int:
        return self._account.window_us

    @property
    def max_concurrency(self) -> int:
        return self._account.max_concurrency

    @property
    def granted(self) -> int:
        return self._account.granted

    def take(self, shard_id: int, now_us: int) -> Permit | Denial:
        account = self._account
        if account.recent is None:
            return take(account, shard_id, now_us, now_us, self._reserve)
        resets_at_us = account.resets_at_us  # a reset that is due waits for the limit to be read
        can_read = resets_at_us is not None and 0 <= now_us - resets_at_us < PATIENCE_US
        answer = take(account, shard_id, now_us, now_us, self._reserve, can_read)
        if (
            answer.__class__ is Denial and answer.reason is Reason.RESET
        ):  # as for Permit in the scheduler
            assert resets_at_us is not None
            answer.wait_us = resets_at_us + PATIENCE_US - now_us
        return answer

    def is_reset_due(self, now_us: int) -> bool:
        resets_at_us = self._account.resets_at_us
        return resets_at_us is not None and now_us >= resets_at_us

    def restamp(self, permit: Permit) -> bool:
        return token_bucket.restamp(self._account, permit, self._now_us())

    def report(self, permit: Permit, report: Report) -> int:
        if report is Report.REJECTED:
            return token_bucket.rejected(self._account, permit, self._now_us())
        if report is Report.SENT:
            token_bucket.sent(self._account, permit, self._now_us())
        else:
            token_bucket.unused(self._account, permit)
        return 0

    def adopt(self, limit: SessionStartLimit) -> None:
        token_bucket.adopt(self._account, limit, self._now_us())

    def read(self, limit: SessionStartLimit, sent_us: int) -> bool:
        return token_bucket.read(self._account, limit, sent_us, self._now_us())

    def budget(self) -> Budget | None:
        return token_bucket.budget(self._account, self._now_us())

    def outlook(self, reserve: int, number: int | None = None) -> Outlook:
        account, now_us = self._account, self._now_us()
        closed_since_us = now_us - account.window_us
        buckets = account.buckets
        if number is not None:
            buckets = {number: buckets[number]} if number in buckets else {}
        ready_in_us = {  # of those that are closed: nothing else is copied under the lock
            number: token_bucket.ready_in_us(account, bucket, now_us)
            for number, bucket in buckets.items()
            if bucket.last_us > closed_since_us or bucket.closed_until_us > now_us
        }
        return Outlook(
            now_us=now_us,
            window_us=account.window_us,
            period_us=account.period_us,
            reserve=reserve,
            max_concurrency=account.max_concurrency,
            ready_in_us=ready_in_us,
            others_ready_in_us=token_bucket.ready_in_us(account, account.default_bucket, now_us),
            budget=token_bucket.budget(account, now_us),
            granted=account.granted,
        )
