"""The lines of one process as its ledger has stored them, and which of them to send when.

Invariants:

- A bucket is in ``_heads`` if and only if the ledger has a line of this process for it, by the latest
  reply. So a head that is not the same in both is sent at once.
- A line that has changed is in ``_changed`` or ``_along`` until it is sent, or has no waiter any more.
- The valid entries of ``_due`` say when each head asks again; the others are skipped.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gateway_queue_sync.clock import FOREVER_US
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.answers import WaitingLines, Waits
from gateway_queue_sync.ledgers.shared.messages import Line, Reply, Request, Waiter
from gateway_queue_sync.models import US_PER_SECOND
from gateway_queue_sync.token_bucket import Denial, Reason

MAX_COUNT_AGE_US = 100_000  # after the latest request, until changed counts are sent
MAX_WAIT_US = messages.MAX_AGE_US - 86_400 * US_PER_SECOND  # a day less, since it may be sent again
REASONS = (Reason.WINDOW, Reason.BUDGET, Reason.RESET)


class Head(NamedTuple):
    """The head that the ledger has stored for a bucket, and what it has said of the bucket."""

    number: int
    ask_us: int  # when it asks next
    opens_us: int  # in how long the bucket opens, from when the request was sent
    others: int  # how many wait for it in other processes


class StoredLines:
    """The lines of one session in its ledger. It begins with none."""

    def __init__(self) -> None:
        self._heads: dict[int, Head] = {}
        self._due: list[tuple[int, int]] = []  # a heap of (ask_us, bucket)
        self._changed: set[int] = set()
        self._along: set[int] = set()  # changed, but with the same head: sent with other lines
        self._along_us = FOREVER_US  # the latest time to send these
        self._all = True  # all lines may have changed

    def __len__(self) -> int:
        """Return how many lines the ledger has."""
        return len(self._heads)

    def head(self, bucket: int) -> Head | None:
        """Return the head that the ledger has for a bucket."""
        return self._heads.get(bucket)

    def changed(self, bucket: int) -> None:
        """Note that a line of the process has changed."""
        self._changed.add(bucket)

    def all_changed(self) -> None:
        """Note that all lines of the process may have changed."""
        self._all = True

    def ask_now(self, now_us: int) -> None:
        """Let all heads ask again now."""
        for bucket, head in self._heads.items():
            self._heads[bucket] = head._replace(ask_us=now_us)
            heapq.heappush(self._due, (now_us, bucket))

    def wake_us(self, now_us: int) -> int:
        """Return when to call ``to_send`` next."""
        if self._changed or self._all:
            return now_us
        due = self._due
        while due and self._is_outdated(*due[0]):
            heapq.heappop(due)
        return min(due[0][0] if due else FOREVER_US, self._along_us)

    def to_send(
        self, lines: WaitingLines, now_us: int, most: int, sent_us: int, *, sends: bool
    ) -> list[Line]:
        """Return the lines to send with the next request, at most so many; none if nothing is urgent.

        ``sends``: there will be a request in any case. ``sent_us``: when the latest one was sent.
        """
        if self._all:
            self._changed.update(lines.buckets(), self._heads)
            self._all = False
        urgent = {bucket for bucket in self._changed if self._is_urgent(lines, bucket)}
        urgent.update(self._pop_due(now_us))
        if not self._along:
            self._along_us = max(now_us, sent_us + MAX_COUNT_AGE_US)
        rest = self._changed - urgent
        self._along |= {one for one in rest if one in self._heads or lines.length(one)}
        self._changed.clear()
        send = list(urgent)
        if send or sends or now_us >= self._along_us:
            send += self._along - urgent
        self._along.difference_update(send)
        if not self._along:
            self._along_us = FOREVER_US
        for bucket in send[most:]:
            self._changed.add(bucket)
            self._heads.pop(bucket, None)
        return [_line(lines, bucket, now_us) for bucket in send[:most]]

    def _pop_due(self, now_us: int) -> Iterator[int]:
        while self._due and self._due[0][0] <= now_us:
            ask_us, bucket = heapq.heappop(self._due)
            if not self._is_outdated(ask_us, bucket):
                yield bucket

    def _is_outdated(self, ask_us: int, bucket: int) -> bool:
        head = self._heads.get(bucket)
        return head is None or head.ask_us != ask_us

    def _is_urgent(self, lines: WaitingLines, bucket: int) -> bool:
        """Return whether the ledger has another head than the process."""
        first, head = lines.first_two(bucket), self._heads.get(bucket)
        return (first[0].number if first else None) != (None if head is None else head.number)

    def note(self, request: Request, reply: Reply, now_us: int) -> dict[int, Denial]:
        """Note what the ledger has stored. Return the denials of those that it has answered.

        It has answered those at the front that ask ``once``, and the first one that does not.
        """
        granted = {one.waiter for one in reply.permits}
        waits = {one.bucket: one for one in reply.waits}
        denials = {}
        for line in request.lines:
            left = [one for one in line.waiters if one.number not in granted]
            wait = waits.get(line.bucket)
            self._heads.pop(line.bucket, None)
            if wait is None:
                continue
            ask_us = request.sent_us + wait.wait_us
            denial = Denial(
                max(0, ask_us - now_us),
                REASONS[wait.reason],
                reply.remaining,
                reply.resets_in_us,
            )
            for at, one in enumerate(left):
                denials[one.number] = denial
                if not one.once:
                    others = max(0, wait.waiting - len(left[at:]) - line.more)
                    self._heads[line.bucket] = Head(one.number, ask_us, wait.opens_us, others)
                    heapq.heappush(self._due, (ask_us, line.bucket))
                    break
        return denials


class NoLines:
    """The lines of a process that asks for no permits."""

    def __init__(self, max_concurrency: int) -> None:
        self.max_concurrency = max_concurrency

    def first_two(self, bucket: int) -> tuple[Waits, ...]:
        """Return nobody."""
        del bucket
        return ()

    def length(self, bucket: int) -> int:
        """Return 0."""
        del bucket
        return 0

    def buckets(self) -> Iterable[int]:
        """Return none."""
        return ()


def _line(lines: WaitingLines, bucket: int, now_us: int) -> Line:
    waiters = tuple(_waiter(one, now_us) for one in lines.first_two(bucket))
    return Line(bucket, lines.length(bucket) - len(waiters) if waiters else 0, waiters)


def _waiter(one: Waits, now_us: int) -> Waiter:
    """Return a waiter for a request, with its age and head start within the bounds."""
    arrived_us = max(one.arrived_us, now_us - MAX_WAIT_US)
    most_us = messages.MAX_HEAD_START_US
    position_us = arrived_us - max(-most_us, min(one.arrived_us - one.position_us, most_us))
    return Waiter(one.number, one.shard_id, arrived_us, position_us, int(one.once), one.hold_us)
