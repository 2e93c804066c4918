"""Ledgers: who was granted what, when. One protocol; memory here, shared ones beside it."""

from __future__ import annotations

from typing import Protocol

from gateway_queue_sync.models import Report, SessionStartLimit
from gateway_queue_sync.rules import Account, Denial, Grant


class Ledger(Protocol):
    """The accounting behind a queue. Every call is atomic."""

    margin_us: int

    @property
    def max_concurrency(self) -> int:
        """How many buckets there are."""

    def take(self, shard_id: int, reserve: int, can_refresh: bool) -> Grant | Denial:
        """Grant a permit now, or say for how long there is none."""

    def restamp(self, grant: Grant) -> bool:
        """Move the window of a permit that is about to be handed over; false if it is too late."""

    def report(self, grant: Grant, report: Report) -> None:
        """Book what became of a permit."""

    def adopt(self, limit: SessionStartLimit) -> None:
        """Take a limit as it is given."""

    def refresh_failed(self) -> None:
        """Note that the limit could not be read at a reset, so that the next grant asks again."""

    def account(self) -> tuple[Account, int, int]:
        """Return the account to look at, not to change, with this instant's now and wall time."""
