"""Shows how the shards start: as a picture on a terminal, as lines in a pipe or a file."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gateway_queue_sync.demo.fleet import Result
from gateway_queue_sync.testing import Referee

if TYPE_CHECKING:
    from gateway_queue_sync.queue import GatewayQueue

BAR_WIDTH = 20
OTHER_LINES = 6  # of the terminal, above and below the buckets


def choose_display(queue: GatewayQueue, referee: Referee, shards: int) -> LineDisplay | LiveDisplay:
    """Return the display for the kind of standard output."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveDisplay(queue, referee, shards)
    return LineDisplay(referee.max_concurrency)


class LineDisplay:
    """One line for each shard that has started or failed."""

    def __init__(self, buckets: int) -> None:
        self._buckets = buckets
        self._shown = 0
        print(" time (s)   shard  bucket  waited (s)", flush=True)

    def show(self, results: Sequence[Result]) -> None:
        """Print the results since the last call."""
        for result in results[self._shown :]:
            how = result.failure or f"{result.waited:10.3f}"
            if result.refused:
                how += f"  refused before: {result.refused}"
            bucket = result.shard_id % self._buckets
            print(f"{result.at:9.3f}  {result.shard_id:6}  {bucket:6}  {how}", flush=True)
            self._shown += 1


class LiveDisplay:
    """A line for each bucket and one for all, redrawn in the same place.

    If the buckets do not fit the terminal, there is only the line for all.
    """

    def __init__(self, queue: GatewayQueue, referee: Referee, shards: int) -> None:
        self._queue = queue
        self._referee = referee
        self._shards = shards
        self._height = 0

    def show(self, results: Sequence[Result]) -> None:
        """Draw the picture over the last one, in one write, so that Ctrl-C cannot leave half of it."""
        columns, lines = shutil.get_terminal_size()
        rows = self._rows(results)
        if len(rows) + OTHER_LINES > lines:
            rows = rows[-1:]
        up = f"\x1b[{self._height}F" if self._height else ""
        self._height = len(rows)
        picture = "".join(f"{row[: columns - 1]}\x1b[K\n" for row in rows)
        print(f"{up}{picture}\x1b[J", end="", flush=True)

    def _rows(self, results: Sequence[Result]) -> list[str]:
        buckets = range(self._referee.max_concurrency)
        sizes = Counter(shard_id % len(buckets) for shard_id in range(self._shards))
        started = Counter(one.shard_id % len(buckets) for one in results if one.failure is None)
        refused = Counter(refusal.bucket for refusal in self._referee.refusals)
        etas = _etas(self._queue)
        rows = [_row(f"bucket {b}", started[b], sizes[b], etas.get(b), refused[b]) for b in buckets]
        last_eta = max(etas.values(), default=None)
        return [*rows, _row("all", started.total(), self._shards, last_eta, refused.total())]


def _etas(queue: GatewayQueue) -> dict[int, float]:
    """Return in how many seconds each bucket will have served its line."""
    lines = {bucket.bucket: bucket.shards for bucket in queue.snapshot().buckets}
    return {bucket: line[-1].eta for bucket, line in lines.items() if line and line[-1].eta}


def _row(name: str, started: int, size: int, eta: float | None, refused: int) -> str:
    bar = "#" * (started * BAR_WIDTH // size)
    row = f"{name:<10}  {bar:.<{BAR_WIDTH}}  {started}/{size}"
    if eta is not None:
        row += f"  done in {eta:.1f} s"
    if refused:
        row += f"  refused: {refused}"
    return row
