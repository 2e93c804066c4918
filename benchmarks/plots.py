"""The charts. One is skipped if what it shows was not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fairness, free_path, lines, wake
from benchmarks.figures import Kind, Result, Row, Table
from benchmarks.peers import SUBJECTS

LEAST = 0.001  # what a logarithmic scale can show

COLOURS: dict[Kind, str] = {
    "ours": "#2f6fde",
    "floor": "#8a94a6",
    "naive": "#b9a06a",
    "peer": "#c98a8a",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched
    "svg.hashsalt": "gateway_queue_sync",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw what was measured, and return the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    folder.mkdir(parents=True, exist_ok=True)
    tables = {result.name: result.tables for result in results if not result.skipped}
    charts: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
        "summary": (_summary, (wake.NAME, fairness.NAME, lines.NAME)),
        "wake": (_wake, (wake.NAME,)),
        "free": (_free, (free_path.NAME,)),
    }
    drawn = []
    with mpl.rc_context(STYLE):
        for name, (chart, needed) in charts.items():
            if all(one in tables for one in needed):
                path = folder / f"{name}.svg"
                figure = chart(*(tables[one] for one in needed))
                figure.savefig(path, metadata={"Date": None, "Creator": None})
                drawn.append(path)
    return drawn


def _summary(late: list[Table], order: list[Table], idle: list[Table]) -> Any:
    """Draw what users feel: how late they are, whether in order, and what it costs to wait."""
    names = [name for name, subject in SUBJECTS.items() if not subject.is_slow]
    figure, axes = _axes(3, "", names)
    panels = (
        (late[0], wake.LATE, "late, median (ms)", True),
        (order[0], fairness.OVERTAKEN, "overtaken (%)", False),
        (idle[2], lines.IDLE, "CPU while 1,000 wait for 5 s (ms)", True),
    )
    for axis, (table, column, title, is_log) in zip(axes, panels, strict=True):
        _bars(axis, table, column, names, is_log=is_log)
        axis.set_title(title, fontsize=9)
    return figure


def _wake(tables: list[Table]) -> Any:
    """Draw how late, alone and beside a thread that burns the processor; and who is too early."""
    names = [row.subject for row in tables[0].rows]
    title = tables[0].title.removesuffix(", alone") + ": late by (ms; bar: median, line: p99)"
    figure, axes = _axes(2, title, names)
    for axis, table, beside in zip(axes, tables, ("alone", "beside a busy thread"), strict=False):
        _bars(axis, table, wake.LATE, names, is_log=True)
        axis.set_title(beside, fontsize=9)
        for row in table.rows:
            if row.figures:
                _whisker(axis, names.index(row.subject), row)
    return figure


def _whisker(axis: Any, at: int, row: Row) -> None:
    median = max(LEAST, row.figures[wake.LATE].value)
    p99 = max(LEAST, row.figures[wake.P99].value) if wake.P99 in row.figures else median
    axis.plot([median, max(median, p99)], [at, at], color="#444444", linewidth=1)
    short = row.figures[wake.SHORT].high
    if short:
        style = {"va": "center", "color": "#b02a2a", "fontsize": 8}
        axis.annotate(f"  {short:.0f} % too early", (max(median, p99), at), **style)


def _free(tables: list[Table]) -> Any:
    """Draw what a call costs that need not wait."""
    names = [row.subject for row in tables[0].rows]
    figure, axes = _axes(1, "a call of acquire that need not wait, one thread (ns)", names)
    _bars(axes[0], tables[0], free_path.ONE, names, is_log=True)
    return figure


def _axes(count: int, title: str, names: Sequence[str]) -> tuple[Any, Sequence[Any]]:
    """Return a figure with so many panels side by side, in which each name has its line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 2.2 * count, 0.8 + 0.22 * len(names)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure, axes


def _bars(axis: Any, table: Table, column: str, names: Sequence[str], *, is_log: bool) -> None:
    rows = [row for row in table.rows if row.subject in names and column in row.figures]
    values = [row.figures[column].value for row in rows]
    axis.barh(
        [names.index(row.subject) for row in rows],
        [max(LEAST, value) for value in values] if is_log else values,
        color=[COLOURS[row.kind] for row in rows],
        height=0.7,
    )
    for row, value in zip(rows, values, strict=True):
        if value == 0:
            axis.annotate(" 0", (0, names.index(row.subject)), va="center", fontsize=8)
    if is_log:
        axis.set_xscale("log")
        axis.set_xlim(left=min(max(LEAST, value) for value in values) / 2)
