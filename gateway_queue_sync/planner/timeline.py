"""A plan in the terminal: a summary, and a bar for each step of the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain, pairwise
from textwrap import wrap

from gateway_queue_sync.format import format_clock, format_exact, format_ranges, format_time
from gateway_queue_sync.planner.fleet import Fleet, Instant

MAX_ROWS = 20
LABEL = TIME_WIDTH = 13  # columns
MAX_BAR, MIN_BAR = 40, 6
# For shards that start now, earlier, later:
BLOCKS, ASCII_BLOCKS = ("█", "▒", "░"), ("#", "=", ".")


def describe(fleet: Fleet, now: datetime, width: int, encoding: str) -> Iterator[str]:
    """Yield the lines that describe a plan made at ``now``, for a terminal of this width."""
    for line in _summary(fleet, now):
        yield from wrap(line, max(width, 2 * LABEL), subsequent_indent=" " * LABEL) or [""]
    yield from _timeline(fleet, width, encoding)


def _summary(fleet: Fleet, now: datetime) -> Iterator[str]:
    plan = fleet.plan
    yield f"{fleet.title}, {fleet.window:g} s between two starts of a bucket"
    yield ""
    yield f"first start  {format_time(now, plan.starts[0].at, format_exact)}"
    yield f"last start   {format_time(now, plan.last_at, format_exact)}"
    yield f"limit        {fleet.verdict}"
    for resets_in in plan.resets[:3]:
        yield f"resets       {format_time(now, resets_in, format_exact)}"
    if plan.resets[3:]:
        yield f"resets       and {len(plan.resets) - 3} more times"
    yield ""


def _timeline(fleet: Fleet, width: int, encoding: str) -> Iterator[str]:
    runs = fleet.runs
    if len(runs) > MAX_ROWS // 2:
        runs = [list(chain.from_iterable(runs))]
    per_row = -(-sum(len(run) for run in runs) // MAX_ROWS)
    rows = [[run[at : at + per_row] for at in range(0, len(run), per_row)] for run in runs]
    times = [row[0][0].at for row in chain.from_iterable(rows)]
    alike = any(format_exact(a) == format_exact(b) for a, b in pairwise(times))
    row = _Row(fleet, width, encoding, format_clock if alike else format_exact)
    yield row.heading
    ends_at = 0.0
    for run, its_rows in zip(runs, rows, strict=True):
        waits = run[0][0].at - ends_at
        if waits > fleet.window:
            yield f"{'...':>{TIME_WIDTH}}  {format_exact(waits)} until the limit resets"[:width]
        yield from map(row.show, its_rows)
        ends_at = run[-1][0].at


class _Row:
    """Formats one row after the other, and counts the shards that have started so far."""

    def __init__(
        self, fleet: Fleet, width: int, encoding: str, label: Callable[[float], str]
    ) -> None:
        self._label = label
        self._shards = fleet.shards
        self._width = width
        self._started = 0
        self._digits = len(str(fleet.shards))
        self._left_digits = max(len("left"), len(str(fleet.limit.total)))
        self._started_width = max(len("started"), 2 * self._digits + 1)
        figures = TIME_WIDTH + self._started_width + self._left_digits + 9
        self._bar = max(MIN_BAR, min(MAX_BAR, (width - figures) * 2 // 3))
        try:
            "".join(BLOCKS).encode(encoding)
            blocks = BLOCKS
        except UnicodeEncodeError:
            blocks = ASCII_BLOCKS
        self._now, self._past, self._later = blocks

    @property
    def heading(self) -> str:
        """The names of the columns."""
        return (
            f"{'from':>{TIME_WIDTH}}  {'':{self._bar}}  {'started':>{self._started_width}}"
            f"  {'left':>{self._left_digits}}  shards"
        )[: self._width]

    def show(self, instants: list[Instant]) -> str:
        """Return the row for the shards that start at these instants."""
        starts = list(chain.from_iterable(instants))
        before = self._started * self._bar // self._shards
        self._started += len(starts)
        after = max(before + 1, self._started * self._bar // self._shards)  # each row shows a block
        bar = self._past * before + self._now * (after - before) + self._later * (self._bar - after)
        row = (
            f"{self._label(starts[0].at):>{TIME_WIDTH}}  {bar}"
            f"  {f'{self._started}/{self._shards}':>{self._started_width}}"
            f"  {starts[-1].remaining:{self._left_digits}}"
        )
        ids = format_ranges(sorted(start.shard_id for start in starts))
        room = self._width - len(row) - 2
        if len(ids) > room:
            ids = f"{ids[: max(0, room - 3)]}..." if room > 8 else ""
        return f"{row}  {ids}".rstrip()[: self._width]
