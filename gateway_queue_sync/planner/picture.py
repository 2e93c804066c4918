"""A plan as an SVG picture: a row for each bucket, time from left to right, the limit below."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import chain

from gateway_queue_sync.format import format_count, format_duration, format_exact, format_ranges
from gateway_queue_sync.plan import ShardStart
from gateway_queue_sync.planner.fleet import Fleet

WIDTH = 1000.0
LEFT, RIGHT = 76.0, 24.0
GRID_TOP = 112.0
HIGHEST_ROW, HIGHEST_GRID = 24.0, 640.0
BUDGET_HEIGHT = 90.0
MAX_CUT, MAX_CUT_SHARE = 44.0, 0.45  # how wide one cut is, and which share of the width all have
MAX_SPANS = 24  # if there are more, those in the middle are left out
MAX_BARS = 1_200  # with more shards, bars of neighbouring buckets are drawn as one
MIN_COLUMN = 4.0  # a bar is no narrower
MAX_SWATCHES = 12
LABEL = 80.0  # from one label to the next
RAMP = (
    (96, 140, 255),
    (38, 186, 190),
    (240, 180, 41),
    (240, 112, 74),
)  # readable on dark and light
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200)
DAY = 86_400.0

STYLE = """
text { font: 12px system-ui, sans-serif }
.title { font-size: 20px; font-weight: 600 } .said { font-size: 14px }
.end { text-anchor: end } .middle, .shard { text-anchor: middle } .shard { fill: #14171c }
.paper { fill: #ffffff } .band { fill: #eef1f4 } .title, .said { fill: #1b1f24 } .note { fill: #59636e }
.rule { stroke: #d0d7de } .cut { stroke: #8b949e; stroke-dasharray: 3 3 }
.left { fill: none; stroke: #3557c8; stroke-width: 2 } .area { fill: #3557c8; opacity: .15 }
.reserve { stroke: #c2410c; stroke-dasharray: 6 4 } .warn { fill: #c2410c }
@media (prefers-color-scheme: dark) {
  .paper { fill: #14171c } .band { fill: #1f242b } .title, .said { fill: #e8ebef }
  .note { fill: #9aa4af } .rule { stroke: #363d46 } .left { stroke: #9db4ff } .area { fill: #9db4ff }
  .reserve { stroke: #ff9163 } .warn { fill: #ff9163 }
}
"""  # without CSS variables, because some programs that show pictures do not know them


def draw(fleet: Fleet) -> str:
    """Return the picture of a plan as the text of an SVG file."""
    rows = fleet.buckets
    row_height = min(HIGHEST_ROW, HIGHEST_GRID / len(rows))
    grid = _Area(GRID_TOP, row_height * len(rows))
    budget = _Area(grid.bottom + 34, BUDGET_HEIGHT)
    height = budget.bottom + 52
    time = Axis(fleet)
    title = f"{fleet.title}: the last starts in {format_exact(fleet.plan.last_at)}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}"',
            'role="img" aria-labelledby="title said">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="said">{escape(fleet.verdict)}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{WIDTH:g}" height="{height:g}"/>',
            _text(LEFT, 36, title, "title"),
            _text(LEFT, 60, fleet.verdict, "said"),
            *_legend(fleet, merged=fleet.window * time.scale < MIN_COLUMN),
            *_cuts(time, grid, budget),
            *_bars(fleet, time, grid, row_height),
            *_bucket_labels(rows, grid, row_height),
            *_budget(fleet, time, budget),
            *_ticks(time, budget.bottom),
            "</svg>\n",
        ]
    )


@dataclass(frozen=True, slots=True)
class _Area:
    """A stretch of the picture, from top to bottom."""

    top: float
    height: float

    @property
    def bottom(self) -> float:
        return self.top + self.height


class Axis:
    """The axis of time. It leaves out waits for resets, unless they are short.

    If there are many runs, it leaves out those in the middle, too.

    Attributes:
        spans: the stretches of time that are drawn: beginning and end, in seconds.
        places: the x at which each span begins.
        scale: how wide a second is.
        cut: how wide the gap between two spans is.
        omitted: how many spans are left out, before span ``omitted_before``.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.spans = [(0.0, fleet.window)]  # the picture begins now
        for run in fleet.runs:
            begins, ends = run[0][0].at, run[-1][0].at + fleet.window
            if begins - self.spans[-1][1] > fleet.window:
                self.spans.append((begins, ends))
            else:
                self.spans[-1] = self.spans[-1][0], ends
        self.omitted, self.omitted_before = max(0, len(self.spans) - MAX_SPANS), MAX_SPANS // 2
        if self.omitted:
            del self.spans[self.omitted_before : self.omitted_before + self.omitted]
        cuts = len(self.spans) - 1
        width = WIDTH - LEFT - RIGHT
        self.cut = min(MAX_CUT, MAX_CUT_SHARE * width / max(1, cuts))
        self.scale = (width - self.cut * cuts) / sum(ends - begins for begins, ends in self.spans)
        self.places: list[float] = []
        x = LEFT
        for begins, ends in self.spans:
            self.places.append(x)
            x += (ends - begins) * self.scale + self.cut

    def x(self, at: float) -> float:
        """Return where an instant is drawn; if it is cut out, the beginning of the next span."""
        number = bisect_left(self.spans, at, key=lambda span: span[1])
        if number == len(self.spans):
            return WIDTH - RIGHT
        return self.places[number] + max(0.0, at - self.spans[number][0]) * self.scale

    def omits(self, at: float) -> bool:
        """Return whether an instant is in a run that is left out."""
        before = self.omitted_before
        return self.omitted > 0 and self.spans[before - 1][1] < at < self.spans[before][0]

    @property
    def cuts(self) -> Iterator[tuple[float, str]]:
        """Where each cut begins, and what is cut out."""
        pairs = zip(self.spans, self.spans[1:], self.places[1:], strict=False)
        for number, ((_, ends), (begins, _), place) in enumerate(pairs, 1):
            if self.omitted and number == self.omitted_before:
                yield place - self.cut, f"{format_count(self.omitted, 'more period')}"
            else:
                yield place - self.cut, f"{format_duration(begins - ends)} later"


def _text(x: float, y: float, words: str, kind: str = "note") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _colour(wave: int, waves: int) -> str:
    """Return the colour of a wave, on the ramp from the first to the last."""
    at = wave / max(1, waves - 1) * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _legend(fleet: Fleet, *, merged: bool) -> Iterator[str]:
    shown = min(fleet.waves, MAX_SWATCHES)
    x = LEFT
    for number in range(shown):
        wave = number * (fleet.waves - 1) // max(1, shown - 1)
        yield (
            f'<rect x="{x:.1f}" y="74" width="9" height="10" fill="{_colour(wave, fleet.waves)}"/>'
        )
        x += 9.5
    order = "; colours go from the first wave to the last" if fleet.waves > 1 else ""
    what = (
        "shows the shards that start at about that time"
        if merged
        else "begins when a shard starts and ends when its bucket may start the next"
    )
    yield _text(x + 8, 83, f"Each bar {what}{order}.")


def _cuts(time: Axis, grid: _Area, budget: _Area) -> Iterator[str]:
    cuts = list(time.cuts)
    labelled = [cuts[time.omitted_before - 1]] if time.omitted else []
    labelled += cuts
    places: list[float] = []
    for x, words in labelled:
        middle = min(max(x + time.cut / 2, LEFT + 60), WIDTH - RIGHT - 60)
        if all(abs(middle - other) >= 1.5 * LABEL for other in places):
            places.append(middle)
            yield _text(middle, grid.top - 12, words, "note middle")
    margin = min(4.0, time.cut / 5)
    for x, _ in cuts:
        yield (
            f'<rect class="band" x="{x + margin:.1f}" y="{grid.top:.1f}" '
            f'width="{time.cut - 2 * margin:.1f}" height="{budget.bottom - grid.top:.1f}"/>'
        )
        for edge in (x + margin, x + time.cut - margin):
            yield _line(edge, grid.top, edge, budget.bottom, "cut")


def _bars(fleet: Fleet, time: Axis, grid: _Area, row_height: float) -> Iterator[str]:
    """Yield a group for each wave: its bars as one path, and its shards' numbers where they fit.

    If waves are too narrow to be seen, a group has all shards that start within a few pixels. With many
    shards, bars of neighbouring buckets are drawn as one.
    """
    rows = {bucket: number for number, bucket in enumerate(fleet.buckets)}
    step, joined = fleet.window * time.scale, fleet.shards > MAX_BARS
    merged = step < MIN_COLUMN
    width = MIN_COLUMN if merged else max(1.0, step - _gap(step))
    groups: dict[int, dict[float, list[ShardStart]]] = defaultdict(lambda: defaultdict(list))
    for instant in fleet.instants:
        if time.omits(instant[0].at):
            continue
        x = time.x(instant[0].at)
        if merged:
            number = int((x - LEFT) / MIN_COLUMN)
            groups[number][min(LEFT + number * MIN_COLUMN, WIDTH - RIGHT - width)] += instant
        else:
            for start in instant:
                groups[start.wave][x].append(start)
    digits = max(len(str(start.shard_id)) for start in fleet.plan.starts)
    numbered = not joined and row_height >= 13 and width >= 7.5 * digits + 4
    for _, columns in sorted(groups.items()):
        starts = list(chain.from_iterable(columns.values()))
        first, last = min(start.wave for start in starts), max(start.wave for start in starts)
        path = "".join(
            f"M{x:.1f} {grid.top + row * row_height:.1f}h{width:.1f}"
            f"v{count * row_height - _gap(row_height):.1f}h-{width:.1f}z"
            for x, column in columns.items()
            for row, count in _ranges({rows[start.bucket] for start in column}, joined=joined)
        )
        ids = format_ranges(sorted(start.shard_id for start in starts))[:80]
        begins = format_exact(min(start.at for start in starts))
        waves = f"wave {first + 1}" if first == last else f"waves {first + 1} to {last + 1}"
        yield f"<g><title>{waves}, from {begins} on: shard {escape(ids)}</title>"
        yield f'<path fill="{_colour(first, fleet.waves)}" d="{path}"/>'
        for x, column in columns.items() if numbered else ():
            for start in column:
                y = grid.top + rows[start.bucket] * row_height
                middle = y + (row_height - _gap(row_height)) / 2 + 4
                yield _text(x + width / 2, middle, str(start.shard_id), "shard")
        yield "</g>"


def _ranges(rows: set[int], *, joined: bool) -> Iterator[tuple[int, int]]:
    """Yield rows as the first one and how many there are; one by one, unless they are ``joined``."""
    first = count = 0
    for row in sorted(rows):
        if joined and count and row == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = row, 1
    yield first, count


def _gap(size: float) -> float:
    """Return how wide the gap between bars of this size is: 0 for small ones, where it would flicker."""
    return min(2.0, size * 0.15) if size >= 4 else 0.0


def _bucket_labels(rows: list[int], grid: _Area, row_height: float) -> Iterator[str]:
    every = 1
    while every * row_height < 20:
        every *= 2
    for number in range(0, len(rows), every):
        middle = grid.top + (number + 0.5) * row_height - 1
        yield _text(LEFT - 8, middle + 4, str(rows[number]), "note end")
    yield _text(LEFT - 8, grid.top - 12, "bucket", "note end")


def _budget(fleet: Fleet, time: Axis, area: _Area) -> Iterator[str]:
    """Yield what is left of the limit over time, as steps, with the reserve.

    Its axis begins at 0. If more than half of the limit is always left, it begins at the least that is
    left at any time.
    """
    total = fleet.limit.total
    least = min(fleet.limit.remaining, *(start.remaining for start in fleet.plan.starts))
    low = least if least > total / 2 else 0

    def y(left: int) -> float:
        return area.bottom - (left - low) / (total - low) * area.height

    changes = [(at, 0, total) for at in fleet.plan.resets]
    changes += [(instant[-1].at, 1, instant[-1].remaining) for instant in fleet.instants]
    path = f"M{LEFT:.1f} {y(fleet.limit.remaining):.1f}"
    drawn: dict[float, list[int]] = {}  # what is left, for each place
    for at, _, left in sorted(changes):
        if not time.omits(at):
            drawn.setdefault(round(time.x(at)) if len(changes) > WIDTH else time.x(at), []).append(
                left
            )
    for x, lefts in sorted(drawn.items()):
        steps = lefts if len(lefts) < 4 else [max(lefts), min(lefts), lefts[-1]]
        path += f"H{x:.1f}" + "".join(f"V{y(left):.1f}" for left in steps)
    path += f"H{WIDTH - RIGHT:.1f}"
    floor = f"V{area.bottom:.1f}H{LEFT:.1f}z"
    yield _line(LEFT, area.top, WIDTH - RIGHT, area.top, "rule")
    yield _line(LEFT, area.bottom, WIDTH - RIGHT, area.bottom, "rule")
    yield f'<path class="area" d="{path}{floor}"/><path class="left" d="{path}"/>'
    if fleet.reserve >= low and fleet.reserve:
        height = y(fleet.reserve)
        yield _line(LEFT, height, WIDTH - RIGHT, height, "reserve")
        yield _text(WIDTH - RIGHT, height - 4, f"reserve {fleet.reserve}", "end warn")
    elif fleet.reserve:
        yield _text(WIDTH - RIGHT, area.bottom - 4, f"reserve {fleet.reserve}, below", "end warn")
    yield _text(LEFT - 8, area.top + 4, str(total), "note end")
    yield _text(LEFT - 8, area.bottom + 4, str(low), "note end")
    yield _text(LEFT, area.top - 8, "session starts left")


def _ticks(time: Axis, y: float) -> Iterator[str]:
    """Yield the labels of the axis.

    The label at the beginning of a span counts from now; those within it count from its beginning.
    """
    step = next((step for step in STEPS if step * time.scale >= LABEL), DAY)
    while step * time.scale < LABEL:
        step *= 2
    ticks: list[float] = []
    texts = [
        (place, format_exact(begins))
        for (begins, _), place in zip(time.spans, time.places, strict=True)
    ]
    for (begins, ends), place in zip(time.spans, time.places, strict=True):
        plus = "+" if begins else ""
        texts += [
            (place + number * step * time.scale, plus + format_exact(number * step))
            for number in range(1, int((ends - begins) / step) + 1)
        ]
    for x, words in texts:
        if all(abs(x - other) >= LABEL for other in ticks) and x < WIDTH - RIGHT - 20:
            ticks.append(x)
            yield _line(x, y, x, y + 5, "rule")
            yield _text(x, y + 19, words, "note middle")
    yield _text(WIDTH - RIGHT, y + 40, "time from now", "note end")
