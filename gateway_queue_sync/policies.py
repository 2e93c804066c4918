"""The queues to choose from. Each is a ``GatewayQueue``, and differs only in its ledger."""

from __future__ import annotations

from typing import Self

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.events import Observer
from gateway_queue_sync.in_memory import InMemoryQueue
from gateway_queue_sync.ledgers.memory import MemoryLedger
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    SessionStartLimit,
    seconds,
)
from gateway_queue_sync.queue import WhenExhausted
from gateway_queue_sync.rules import to_us
from gateway_queue_sync.waiting import Refresh


def _in_memory(interval: float, margin: float, period: float, clock: Clock) -> MemoryLedger:
    interval = seconds("interval", interval, above=0)
    margin = seconds("margin", margin)
    return MemoryLedger(
        window_us=max(1, to_us(interval)) + to_us(margin),
        margin_us=to_us(margin),
        period_us=max(1, to_us(seconds("period", period, above=0))),
        clock=clock,
    )


class NoOpQueue(InMemoryQueue):
    """Grants at once, always: for a bot whose gateway proxy does the queueing.

    It keeps no window and no budget, and ``update`` is ignored.
    """

    def __init__(self) -> None:
        ledger = MemoryLedger(window_us=0, margin_us=0, period_us=0, clock=SYSTEM_CLOCK)
        super().__init__(ledger, clock=SYSTEM_CLOCK)

    def update(self, limit: SessionStartLimit) -> None:
        """Ignore the limit."""


class LocalQueue(InMemoryQueue):
    """One process, one bucket: for a bot whose ``max_concurrency`` is 1.

    It keeps no budget until ``update`` gives it one; then it also has that limit's buckets.

    Args:
        interval: seconds between two permits of a bucket: Discord's 5.
        margin: seconds added for what happens between the grant and the IDENTIFY's arrival. A
            permit that took longer than that to come back to its caller is given back and asked for
            again. With 0 the spacing is promised at the grant, not at the caller.
        clock: what tells the time; ``testing.FakeClock`` in tests.
        observer: called with each event (``gateway_queue_sync.events``).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, not finite or out of range.
    """

    def __init__(
        self,
        *,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> None:
        ledger = _in_memory(interval, margin, SESSION_PERIOD, clock)
        super().__init__(ledger, clock=clock, observer=observer)


class LargeBotQueue(InMemoryQueue):
    """One process, a bucket for each of ``max_concurrency``, and the day's budget.

    Args:
        limit: the session start limit to begin with, as Discord gives it now.
        refresh: called without arguments when the limit is due to reset, to read it anew. It runs
            in the thread of whoever is first in line, once per reset; if it raises, the last known
            total counts, with a WARNING, and the next permit asks again.
        reserve: session starts never to use up: at ``remaining <= reserve`` the queue is exhausted.
        when_exhausted: ``"wait"`` for the reset, or ``"raise"`` ``SessionLimitExhausted``.
        period: seconds from the first grant after a reset to the next reset.
        interval: seconds between two permits of a bucket: Discord's 5.
        margin: seconds added to it, as for ``LocalQueue``.
        clock: what tells the time; ``testing.FakeClock`` in tests.
        observer: called with each event (``gateway_queue_sync.events``).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, such as a reserve
            that is not less than the limit's total.
    """

    def __init__(
        self,
        limit: SessionStartLimit,
        *,
        refresh: Refresh | None = None,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(
            _in_memory(interval, margin, period, clock),
            clock=clock,
            observer=observer,
            refresh=refresh,
            reserve=reserve,
            when_exhausted=when_exhausted,
        )
        self._start_with(limit)

    @classmethod
    def from_token(
        cls,
        token: str,
        *,
        base_url: str | None = None,
        reserve: int = 0,
        when_exhausted: WhenExhausted = "wait",
        period: float = SESSION_PERIOD,
        interval: float = IDENTIFY_INTERVAL,
        margin: float = DEFAULT_MARGIN,
        clock: Clock = SYSTEM_CLOCK,
        observer: Observer | None = None,
    ) -> Self:
        """Read the limit from Discord now, and again whenever it resets.

        Blocks while it reads. The token is kept for the re-reading; it shows in no log, repr or
        error.

        Args:
            token: the bot's token, with or without ``Bot`` before it.
            base_url: where Discord's REST API is, if not at Discord.
            reserve: as for ``LargeBotQueue``, and so are the others.
            when_exhausted: ``"wait"`` or ``"raise"``.
            period: seconds.
            interval: seconds.
            margin: seconds.
            clock: what tells the time.
            observer: called with each event.

        Raises:
            GatewayBotError: the token is wrong, or Discord could not be asked.
            TypeError, ValueError: as ``LargeBotQueue`` does; also for what cannot be a token.
        """
        from gateway_queue_sync.gateway_bot import GatewayBot  # noqa: PLC0415 - loads urllib

        return cls(
            GatewayBot(token, base_url=base_url).session_start_limit(),
            # At a reset somebody waits: better go on with the known total than try for minutes.
            refresh=GatewayBot(token, base_url=base_url, attempts=2).session_start_limit,
            reserve=reserve,
            when_exhausted=when_exhausted,
            period=period,
            interval=interval,
            margin=margin,
            clock=clock,
            observer=observer,
        )
