"""What the broker counts, as Prometheus reads it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from itertools import accumulate

from gateway_queue_sync.models import QueueSnapshot

WAITS = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)  # s
RECENT = 200  # grants


class Metrics:
    """The figures of one broker since it was started.

    Attributes:
        refused: how many requests were refused, by the status that says why.
        recent: the latest grants: instant in microseconds, shard, bucket.
    """

    def __init__(self) -> None:
        self.refused: Counter[int] = Counter()
        self.recent: deque[tuple[int, int, int]] = deque(maxlen=RECENT)
        self._waits = [0] * (len(WAITS) + 1)
        self._waited = 0.0

    def granted(self, at_us: int, shard_id: int, bucket: int, waited: float) -> None:
        """Count a permit that went out, after so many seconds."""
        self.recent.append((at_us, shard_id, bucket))
        self._waits[bisect_left(WAITS, waited)] += 1
        self._waited += waited

    def text(self, seen: QueueSnapshot, connections: int) -> str:
        """Return all figures, with those of a snapshot, in Prometheus' text format."""
        return "\n".join([*self._lines(seen, connections), ""])

    def _lines(self, seen: QueueSnapshot, connections: int) -> Iterator[str]:
        yield from _family("granted_total", "counter", "Permits granted since the account began.")
        yield f"gateway_queue_granted_total {seen.granted}"
        yield from _family("waiting", "gauge", "Shards that wait, by bucket.")
        for bucket in seen.buckets:
            yield f'gateway_queue_waiting{{bucket="{bucket.bucket}"}} {len(bucket.shards)}'
        yield from _family(
            "wait_seconds", "histogram", "How long shards waited for their permits here."
        )
        counts = list(accumulate(self._waits))
        for limit, count in zip((*map(str, WAITS), "+Inf"), counts, strict=True):
            yield f'gateway_queue_wait_seconds_bucket{{le="{limit}"}} {count}'
        yield f"gateway_queue_wait_seconds_sum {self._waited:.6f}"
        yield f"gateway_queue_wait_seconds_count {counts[-1]}"
        yield from _family("refused_total", "counter", "Requests refused here, by status.")
        for status, count in sorted(self.refused.items()):
            yield f'gateway_queue_refused_total{{status="{status}"}} {count}'
        if seen.limit is not None:
            yield from _family("remaining", "gauge", "Session starts left in this period.")
            yield f"gateway_queue_remaining {seen.limit.remaining}"
            yield from _family("limit", "gauge", "Session starts of a whole period.")
            yield f"gateway_queue_limit {seen.limit.total}"
            yield from _family(
                "resets_in_seconds", "gauge", "Seconds until the budget resets; 0: not begun."
            )
            yield f"gateway_queue_resets_in_seconds {seen.limit.resets_in:.3f}"
        yield from _family("connections", "gauge", "Open connections.")
        yield f"gateway_queue_connections {connections}"


def _family(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP gateway_queue_{name} {what}"
    yield f"# TYPE gateway_queue_{name} {kind}"
