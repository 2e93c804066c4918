"""The broker's status and metrics: computed at most once a second, for all readers at once.

One thread, which grants no permits, takes the snapshot and prepares all answers.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from gateway_queue_sync.broker import responses
from gateway_queue_sync.broker.responses import Response
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.models import US_PER_SECOND, Permit, QueueSnapshot
from gateway_queue_sync.queue import GatewayQueue, scheduler_of

log = logging.getLogger("gateway_queue_sync.broker")

MAX_AGE = 1.0  # s
PAUSE = 0.02  # s before a known answer is given again, so that busy readers do not delay permits
WAITS = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)  # s
RECENT = 200  # permits
HEALTH = ("/healthz", "/health")
METRICS = "text/plain; version=0.0.4; charset=utf-8"

Answers = dict[str, Response]
Sample = float | tuple[str, float]
"""A value, or its labels and the value."""


class SharedAnswers:
    """Expensive answers, computed at most once a second in a thread of their own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, compute: Callable[[], Answers]) -> None:
        self._loop = loop
        self._compute = compute
        self._answers: Answers = {}
        self._fresh_until = 0.0
        self._receivers: list[tuple[str, Callable[[Response], object]]] = []  # of the next answers
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="gateway-queue-broker-read")

    def give(self, path: str, receiver: Callable[[Response], object]) -> None:
        """Call a receiver with the answer for a path, when that is computed."""
        if self._loop.time() < self._fresh_until:
            self._loop.call_later(PAUSE, receiver, self._answers[path])
            return
        if not self._receivers:
            computing = self._loop.run_in_executor(self.executor, self._compute)
            computing.add_done_callback(self._computed)
        self._receivers.append((path, receiver))

    def _computed(self, computing: asyncio.Future[Answers]) -> None:
        receivers, self._receivers = self._receivers, []
        failure = computing.exception()
        if failure is None:
            self._answers = computing.result()
        else:
            log.error("the state could not be read", exc_info=failure)
            failed = responses.error(500, type(failure).__name__)
            self._answers = defaultdict(lambda: failed)
        self._fresh_until = self._loop.time() + MAX_AGE
        for path, receiver in receivers:
            self._loop.call_soon(receiver, self._answers[path])


class Reports:
    """The counters of one broker (``refused``: requests by status), and the state of its queue."""

    def __init__(self, queue: GatewayQueue) -> None:
        self._queue = queue
        self._scheduler = scheduler_of(queue)
        self._unreachable = False
        self.refused: Counter[int] = Counter()
        # When, to which shard and in which bucket; replaced as a whole, because other threads read it.
        self._recent: tuple[tuple[int, int, int], ...] = ()
        self._waits = [0] * (len(WAITS) + 1)
        self._waited = 0.0

    def granted(self, at_us: int, permit: Permit) -> None:
        """Count a permit that was sent at ``at_us``."""
        new = at_us, permit.shard_id, permit.bucket
        self._recent = (*self._recent[1 - RECENT :], new)
        self._waits[bisect_left(WAITS, permit.waited)] += 1
        self._waited += permit.waited

    def compute(self, connections: int) -> Answers:
        """Return the answers for all paths. The cost grows with the number of waiters."""
        recent = {"/recent.json": self._recent_permits()}
        try:
            seen = self._queue.snapshot()
        except LedgerError as error:
            if not self._unreachable:
                log.warning("the state is unreachable: %s", error)
            self._unreachable = True
            failed = responses.error(503, "the state is unreachable")
            return recent | dict.fromkeys(("/status.json", "/metrics", *HEALTH), failed)
        self._unreachable = False
        text = "\n".join([*self._metrics(seen, connections), ""]).encode()
        status, healthy = responses.as_json(seen), responses.as_json({"status": "ok"})
        answers = {"/status.json": status, "/metrics": Response(200, text, METRICS)}
        return recent | answers | dict.fromkeys(HEALTH, healthy)

    def _recent_permits(self) -> Response:
        now_us, ledger = self._scheduler.now_us(), self._scheduler.ledger
        grants = [
            {"shard_id": shard, "bucket": bucket, "ago": max(0, now_us - at_us) / US_PER_SECOND}
            for at_us, shard, bucket in self._recent
        ]
        return responses.as_json(
            {
                "window": ledger.window_us / US_PER_SECOND,
                "keeps_limit": ledger.keeps_limit,
                "reserve": self._scheduler.reserve,
                "grants": grants,
            }
        )

    def _metrics(self, seen: QueueSnapshot, connections: int) -> Iterator[str]:
        """Yield the lines of Prometheus' text format."""
        counts, limit, reserve = list(accumulate(self._waits)), seen.limit, self._scheduler.reserve
        waiting = [(f'{{bucket="{one.bucket}"}}', len(one.shards)) for one in seen.buckets]
        counted = seen.waiting - sum(number for _, number in waiting)
        waiting.append(('{bucket="other"}', counted))
        most = [*WAITS, "+Inf"]
        waits = [(f'_bucket{{le="{s}"}}', n) for s, n in zip(most, counts, strict=True)]
        summed = [("_sum", round(self._waited, 6)), ("_count", counts[-1])]
        refused = [(f'{{status="{code}"}}', n) for code, n in sorted(dict(self.refused).items())]
        yield from _family(
            "granted_total", "counter", "Permits since the account was created.", seen.granted
        )
        yield from _family(
            "waiting",
            "gauge",
            "Waiters by bucket; other: those that are only counted.",
            *waiting,
        )
        yield from _family("wait_seconds", "histogram", "Waits for permits here.", *waits, *summed)
        yield from _family("refused_total", "counter", "Requests refused, by status.", *refused)
        yield from _family("connections", "gauge", "Open connections.", connections)
        if limit is not None:
            resets_in = round(limit.resets_in, 3)
            yield from _family("remaining", "gauge", "Session starts left.", limit.remaining)
            yield from _family("reserve", "gauge", "Session starts never used up.", reserve)
            yield from _family("limit", "gauge", "Session starts of a period.", limit.total)
            yield from _family("resets_in_seconds", "gauge", "0: no period has begun.", resets_in)


def _family(name: str, kind: str, what: str, *samples: Sample) -> Iterator[str]:
    yield f"# HELP gateway_queue_{name} {what}"
    yield f"# TYPE gateway_queue_{name} {kind}"
    for sample in samples:
        labels, value = sample if isinstance(sample, tuple) else ("", sample)
        yield f"gateway_queue_{name}{labels} {value}"
