"""Ledgers: who was granted what, when. In memory here, and shared by processes beside it."""

from __future__ import annotations

from typing import Protocol

from gateway_queue_sync.models import Report
from gateway_queue_sync.rules import Grant


class Ledger(Protocol):
    """What waiting needs of any ledger; asking it for permits is the queue's that knows its kind."""

    @property
    def margin_us(self) -> int:
        """How old a permit may be when it reaches its caller; 0: any age."""

    @property
    def window_us(self) -> int:
        """How long a bucket rests after a permit, as far as is known."""

    @property
    def max_concurrency(self) -> int:
        """How many buckets there are, as far as is known."""

    def report(self, grant: Grant, report: Report) -> None:
        """Book what became of a permit."""
