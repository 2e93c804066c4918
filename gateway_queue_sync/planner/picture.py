"""A plan as a picture: bucket by time, coloured by wave, and the budget below. One SVG, all in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import chain

from gateway_queue_sync.format import format_count, format_duration, format_ranges
from gateway_queue_sync.plan import ShardStart
from gateway_queue_sync.planner.fleet import Fleet

WIDTH = 1000.0
LEFT, RIGHT = 76.0, 24.0
GRID_TOP = 112.0
HIGHEST_ROW, HIGHEST_GRID = 24.0, 640.0
BUDGET_HEIGHT = 90.0
BREAK = 44.0  # how wide a wait for a reset is drawn, however long it is
MAX_BREAKS = 6  # with more, time is drawn as it is
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
"""  # no variables: some programs that show pictures know none


def draw(fleet: Fleet) -> str:
    """Return the picture of a plan as the text of an SVG file."""
    rows = fleet.buckets
    row_height = min(HIGHEST_ROW, HIGHEST_GRID / len(rows))
    grid = _Area(GRID_TOP, row_height * len(rows))
    budget = _Area(grid.bottom + 34, BUDGET_HEIGHT)
    height = budget.bottom + 52
    time = _Axis(fleet)
    title = f"{fleet.title}: the last starts in {format_duration(fleet.plan.last_at)}"
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
            *_legend(fleet),
            *_breaks(time, grid, budget),
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


class _Axis:
    """Where an instant is drawn. Waits for resets are cut short, unless there are many."""

    def __init__(self, fleet: Fleet) -> None:
        runs = fleet.runs
        if len(runs) > MAX_BREAKS:
            runs = [list(chain.from_iterable(runs))]
        self.spans = [(run[0][0].at, run[-1][0].at + fleet.window) for run in runs]
        if self.spans[0][0] > 0:
            self.spans.insert(0, (0.0, fleet.window))  # the picture begins now
        width = WIDTH - LEFT - RIGHT - BREAK * (len(self.spans) - 1)
        self.scale = width / sum(ends - begins for begins, ends in self.spans)
        self.places: list[float] = []
        x = LEFT
        for begins, ends in self.spans:
            self.places.append(x)
            x += (ends - begins) * self.scale + BREAK

    def x(self, at: float) -> float:
        """Return where an instant is, the begin of the next span if it is cut out."""
        for (begins, ends), place in zip(self.spans, self.places, strict=True):
            if at <= ends:
                return place + max(0.0, at - begins) * self.scale
        return WIDTH - RIGHT

    @property
    def breaks(self) -> Iterator[tuple[float, float]]:
        """Where each cut begins, and how many seconds it leaves out."""
        for (_, ends), (begins, _), place in zip(
            self.spans, self.spans[1:], self.places[1:], strict=False
        ):
            yield place - BREAK, begins - ends


def _text(x: float, y: float, words: str, kind: str = "note") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _colour(wave: int, waves: int) -> str:
    """Return a wave's place on the ramp from the first to the last."""
    at = wave / max(1, waves - 1) * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _legend(fleet: Fleet) -> Iterator[str]:
    shown = min(fleet.waves, 32)
    x = LEFT
    for number in range(shown):
        wave = number * (fleet.waves - 1) // max(1, shown - 1)
        yield (
            f'<rect x="{x:.1f}" y="74" width="9" height="10" fill="{_colour(wave, fleet.waves)}"/>'
        )
        x += 9.5
    order = ", first to last" if fleet.waves > 1 else ""
    what = "each bar begins with a start, and is as long as its bucket then rests"
    yield _text(x + 8, 83, f"{format_count(fleet.waves, 'wave')}{order}; {what}")


def _breaks(time: _Axis, grid: _Area, budget: _Area) -> Iterator[str]:
    for x, left_out in time.breaks:
        height = budget.bottom - grid.top
        yield (
            f'<rect class="band" x="{x + 4:.1f}" y="{grid.top:.1f}" width="{BREAK - 8:g}" '
            f'height="{height:.1f}"/>'
        )
        for edge in (x + 4, x + BREAK - 4):
            yield _line(edge, grid.top, edge, budget.bottom, "cut")
        middle = min(max(x + BREAK / 2, LEFT + 60), WIDTH - RIGHT - 60)
        yield _text(middle, grid.top - 12, f"{format_duration(left_out)} later", "note middle")


def _bars(fleet: Fleet, time: _Axis, grid: _Area, row_height: float) -> Iterator[str]:
    """Yield a group for each wave: its bars as one path, and its shards' numbers where they fit."""
    rows = {bucket: number for number, bucket in enumerate(fleet.buckets)}
    width = fleet.window * time.scale
    width, height = max(1.0, width - _gap(width)), row_height - _gap(row_height)
    waves: dict[int, list[ShardStart]] = defaultdict(list)
    for start in fleet.plan.starts:
        waves[start.wave].append(start)
    digits = max(len(str(start.shard_id)) for start in fleet.plan.starts)
    numbered = row_height >= 13 and width >= 7.5 * digits + 4
    for wave, starts in sorted(waves.items()):
        at = [(time.x(s.at), grid.top + rows[s.bucket] * row_height, s) for s in starts]
        path = "".join(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z" for x, y, _ in at)
        ids = format_ranges(sorted(start.shard_id for start in starts))
        first = format_duration(min(start.at for start in starts))
        yield f"<g><title>wave {wave + 1}, from {first} on: shard {escape(ids)}</title>"
        yield f'<path fill="{_colour(wave, fleet.waves)}" d="{path}"/>'
        if numbered:
            for x, y, start in at:
                yield _text(x + width / 2, y + height / 2 + 4, str(start.shard_id), "shard")
        yield "</g>"


def _gap(size: float) -> float:
    """Return what is left free between bars of this size: nothing where it would only flicker."""
    return min(2.0, size * 0.15) if size >= 4 else 0.0


def _bucket_labels(rows: list[int], grid: _Area, row_height: float) -> Iterator[str]:
    every = 1
    while every * row_height < 20:
        every *= 2
    for number in range(0, len(rows), every):
        middle = grid.top + (number + 0.5) * row_height - 1
        yield _text(LEFT - 8, middle + 4, str(rows[number]), "note end")
    yield _text(LEFT - 8, grid.top - 12, "bucket", "note end")


def _budget(fleet: Fleet, time: _Axis, area: _Area) -> Iterator[str]:
    """Yield what is left of the limit over time, as steps, with the reserve."""
    total = fleet.limit.total

    def y(left: int) -> float:
        return area.bottom - left / total * area.height

    changes = [(at, 0, total) for at in fleet.plan.resets]
    changes += [(instant[-1].at, 1, instant[-1].remaining) for instant in fleet.instants]
    path = f"M{LEFT:.1f} {y(fleet.limit.remaining):.1f}"
    for at, _, left in sorted(changes):
        path += f"H{time.x(at):.1f}V{y(left):.1f}"
    path += f"H{WIDTH - RIGHT:.1f}"
    floor = f"V{area.bottom:.1f}H{LEFT:.1f}z"
    yield _line(LEFT, area.top, WIDTH - RIGHT, area.top, "rule")
    yield _line(LEFT, area.bottom, WIDTH - RIGHT, area.bottom, "rule")
    yield f'<path class="area" d="{path}{floor}"/><path class="left" d="{path}"/>'
    if fleet.reserve:
        at = y(fleet.reserve)
        yield _line(LEFT, at, WIDTH - RIGHT, at, "reserve")
        yield _text(WIDTH - RIGHT, at - 4, f"reserve {fleet.reserve}", "end warn")
    yield _text(LEFT - 8, area.top + 4, str(total), "note end")
    yield _text(LEFT - 8, area.bottom + 4, "0", "note end")
    yield _text(LEFT, area.top - 8, "session starts left")


def _ticks(time: _Axis, y: float) -> Iterator[str]:
    step = next((step for step in STEPS if step * time.scale >= 70), DAY)
    while step * time.scale < 70:
        step *= 2
    ticks = [(begins, place) for (begins, _), place in zip(time.spans, time.places, strict=True)]
    for (begins, ends), place in zip(time.spans, time.places, strict=True):
        for number in range(1, int((ends - begins) / step) + 1):
            x = place + number * step * time.scale
            if all(abs(x - other) > 60 for _, other in ticks) and x < WIDTH - RIGHT - 20:
                ticks.append((begins + number * step, x))
    for at, x in ticks:
        yield _line(x, y, x, y + 5, "rule")
        yield _text(x, y + 19, _clock(at), "note middle")
    yield _text(WIDTH - RIGHT, y + 40, "time from now", "note end")


def _clock(at: float) -> str:
    if at < 60:
        return f"{at:.3g} s"
    minutes, rest = divmod(round(at), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
