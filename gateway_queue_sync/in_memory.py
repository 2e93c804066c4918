"""Queues whose account is in this process: the ledger is asked with the mutex held.

That is pure arithmetic, so nobody waits for it, and a permit can be stamped as the very last thing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NoReturn

from gateway_queue_sync import forecast, journal, rules, waiting
from gateway_queue_sync.errors import AcquireTimeout, QueueClosed, reentered
from gateway_queue_sync.ledgers.memory import MemoryLedger
from gateway_queue_sync.lines import Line, Ticket
from gateway_queue_sync.models import Permit, QueueSnapshot, Report, SessionStartLimit
from gateway_queue_sync.queue import GatewayQueue
from gateway_queue_sync.rules import MICROSECOND, Budget, Denial, Grant


class InMemoryQueue(GatewayQueue):
    """What the queues of one process are."""

    _ledger: MemoryLedger
    _low_from = -1  # how many left of the budget are few

    def snapshot(self) -> QueueSnapshot:
        """Return who waits where, until when, and what is left of the budget; works when closed, too.

        Raises:
            RuntimeError: as ``acquire`` does.
        """
        self._check_thread()
        with self._mutex:  # only copying in here: the arithmetic may take long
            now_us = self._now_us()
            outlook = self._outlook(range(self._ledger.max_concurrency))
            tickets = {number: line.waiting() for number, line in self._lines.by_bucket.items()}
            granted = self._ledger.state()[0].granted
        return forecast.snapshot(outlook, tickets, now_us, granted)

    def __repr__(self) -> str:
        return self._describe(self._ledger.state()[0].granted, self._left())

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: its lines and its account live in "
            f"this process; to share one account over processes use SqliteQueue or RedisQueue"
        )

    def _check_thread(self) -> None:
        if self._is_forked():
            raise RuntimeError(
                f"this {type(self).__name__} was made before the process forked: its account "
                "stayed with the parent; to share one over processes use SqliteQueue"
            )
        super()._check_thread()

    def _at_once(self, shard_id: int) -> Permit | Grant | None:
        if self._forks != waiting.forks or self._inside():
            self._check_thread()
        grant: Grant | Denial | None = None
        try:
            with self._mutex:
                if self._closed:
                    raise QueueClosed
                if self._threads and threading.get_ident() in self._threads:
                    raise reentered()
                if self._observer is not None or (
                    self._lines.by_bucket and self._has_line(shard_id)
                ):
                    return None
                grant = self._ledger.take(shard_id, self._reserve, self._refresh is not None)
            if isinstance(grant, Grant):
                left = grant.remaining
                if left is not None and (left <= self._low_from) is not self._told_low:
                    self._look_at_budget()
                return self._permit(grant, 0.0) if self._is_in_time(grant) else grant
        except BaseException:
            if isinstance(grant, Grant):
                with self._mutex:
                    self._return_grant(grant)
            raise
        return None

    # ----------------------------------------------------------------------------------------------
    # With the mutex held

    def _has_line(self, shard_id: int) -> bool:
        """Return whether somebody waits for the shard's bucket (or the lines are out of date)."""
        count = self._ledger.max_concurrency
        return shard_id % count in self._lines.by_bucket or count != self._lines.max_concurrency

    def _ask(self, ticket: Ticket) -> Grant | Denial | None:
        if not self._is_its_turn(ticket):
            return None
        period = self._ledger.state()[0].period
        can_refresh = self._refresh is not None and ticket.trusted_period != period
        answer = self._ledger.take(ticket.shard_id, self._reserve, can_refresh)
        if isinstance(answer, Grant):
            self._accept(ticket, answer)
        return answer

    def _hand_on(self, ticket: Ticket, grant: Grant) -> bool:
        self._leave(ticket)
        return self._ledger.restamp(grant)

    def _return_grant(self, grant: Grant) -> None:
        self._ledger.report(grant, Report.UNUSED)
        account = self._ledger.state()[0]
        if account.total is not None and account.remaining == self._reserve + 1:
            self._wake_all_firsts()  # there was nothing left to grant
        else:
            self._wake(self._lines.first(grant.shard_id % self._lines.max_concurrency))

    def _outlook(self, numbers: Iterable[int]) -> forecast.Outlook:
        account, now_us, wall_us = self._ledger.state()
        return forecast.Outlook(
            window_us=account.window_us,
            period_us=account.period_us,
            reserve=self._reserve,
            ready_in_us={number: rules.ready_in_us(account, number, now_us) for number in numbers},
            budget=rules.budget(account, wall_us),
        )

    def _eta(self, ticket: Ticket, before: int) -> float | None:
        if self._refresher is not None:
            return None  # the limit that is being read decides
        number, lines = self._lines.bucket(ticket), len(self._lines.by_bucket)
        waiting = len(self._threads) + len(self._futures)
        in_us = forecast.rough_eta_us(self._outlook([number]), number, before, lines, waiting)
        return None if in_us is None else in_us / MICROSECOND

    def _left(self) -> Budget | None:
        account, _, wall_us = self._ledger.state()
        return rules.budget(account, wall_us)

    def _let_know(self) -> None:
        total = self._ledger.state()[0].total
        if total is not None:
            self._low_from = journal.low_from(total, self._reserve)
        self._reline_if_changed()
        self._wake_all_firsts()

    # ----------------------------------------------------------------------------------------------
    # Without the mutex

    def _look_at_budget(self) -> None:
        with self._mutex:
            warning = self._low_budget()
        if warning is not None:
            warning()

    def _explain(self, error: AcquireTimeout, ticket: Ticket) -> None:
        with self._mutex:  # only copying in here, as for a snapshot
            if self._refresher is not None:
                return  # the limit that is being read decides
            number, lengths = self._lines.bucket(ticket), self._lines.lengths()
            outlook = self._outlook({number, *lengths})
            line = self._lines.by_bucket.get(number, Line()).copy()
        before = line.before(ticket)
        lengths[number] = max(lengths.get(number, 0), before + 1)
        in_us = forecast.eta_us(outlook, number, before, lengths)
        error.eta = None if in_us is None else in_us / MICROSECOND

    def _start_with(self, limit: SessionStartLimit) -> None:
        """Adopt the limit that a policy was made with, before anybody can wait."""
        self._check_limit(limit)
        self._adopt(limit)

    def _adopt(self, limit: SessionStartLimit) -> None:
        with self._mutex:
            if self._closed:
                raise QueueClosed
            try:
                self._ledger.adopt(limit)
            finally:
                self._let_know()

    def _renew(self, limit: SessionStartLimit, denial: Denial) -> SessionStartLimit | None:
        with self._mutex:
            try:
                return self._ledger.renew(limit, denial.period, denial.granted)
            finally:
                self._let_know()

    def _trust(self, denial: Denial) -> bool:
        with self._mutex:
            return self._ledger.trust(denial.period)
