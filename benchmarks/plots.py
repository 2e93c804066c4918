"""The charts. One is skipped if what it shows was not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fairness, free_path, lines, wake
from benchmarks.figures import OURS, Kind, Result, Row, Table
from benchmarks.peers import SUBJECTS

LEAST = 0.001  # a logarithmic scale has no 0

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
    """Draw how late permits are, how many are overtaken, and what waiting costs."""
    names = [name for name, subject in SUBJECTS.items() if not subject.is_slow]
    figure, axes = _axes(3, "", names)
    panels = (
        (late[0], wake.LATE, "late, median (ms)", True),
        (order[0], fairness.OVERTAKEN, "overtaken (%)", False),
        (idle[2], lines.IDLE, "CPU of 1,000 idle (ms)", True),
    )
    for axis, (table, column, title, is_log) in zip(axes, panels, strict=True):
        _points(axis, table, column, names, is_log=is_log)
        axis.set_title(title, fontsize=9)
    axes[1].set_xlim(-5, 105)
    return figure


def _wake(tables: list[Table]) -> Any:
    """Draw how late permits are, alone and beside a busy thread; and which come too early."""
    names = [row.subject for row in tables[0].rows if row.kind != "floor"]
    title = tables[0].title.removesuffix(", alone") + ": late (ms; point: median, line: to the p99)"
    figure, axes = _axes(2, title, names)
    for axis, table, beside in zip(axes, tables, ("alone", "beside a busy thread"), strict=False):
        _points(axis, table, wake.LATE, names, is_log=True)
        axis.set_title(beside, fontsize=9)
        for row in table.rows:
            if row.figures and row.subject in names:
                _whisker(axis, names.index(row.subject), row)
    return figure


def _whisker(axis: Any, at: int, row: Row) -> None:
    median = max(LEAST, row.figures[wake.LATE].value)
    p99 = max(LEAST, row.figures[wake.P99].value) if wake.P99 in row.figures else median
    axis.plot([median, max(median, p99)], [at, at], color=COLOURS[row.kind], linewidth=2)
    short = row.figures[wake.SHORT].high
    if short:
        style = {"va": "center", "color": "#b02a2a", "fontsize": 8}
        axis.annotate(f"  {short:.0f} % too early", (max(median, p99), at), **style)


def _free(tables: list[Table]) -> Any:
    """Draw what a call costs that need not wait."""
    names = [row.subject for row in tables[0].rows if row.kind != "floor"]
    figure, axes = _axes(1, "free path: a call that need not wait (ns)", names)
    _points(axes[0], tables[0], free_path.ONE, names, is_log=True)
    return figure


def _axes(count: int, title: str, names: Sequence[str]) -> tuple[Any, Sequence[Any]]:
    """Return a figure with so many panels side by side, with a row for each name."""
    from matplotlib.figure import Figure

    height = 1.0 + 0.24 * len(names)
    labels = [_label(name) for name in names]
    width = 0.08 * max(map(len, labels)) + 2.8 * count
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    axes[0].set_yticks(range(len(names)), labels)
    axes[0].set_ylim(len(names) - 0.1, -0.5)  # room for the word "floor"
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        if name.startswith(OURS):
            label.set_fontweight("bold")
    for axis in axes:
        axis.grid(axis="x", color="#e3e6ea", linewidth=0.6)
        axis.set_axisbelow(True)
        for at, name in enumerate(names):
            if name.startswith(OURS):
                axis.axhspan(at - 0.5, at + 0.5, color="#2f6fde", alpha=0.1, linewidth=0)
    return figure, axes


def _label(name: str) -> str:
    """Return what the documents call a subject."""
    return name.replace(OURS, "this package").replace("naive", "a Lock and time.sleep")


def _points(axis: Any, table: Table, column: str, names: Sequence[str], *, is_log: bool) -> None:
    """Draw a point for each subject, with its value, and the floor as a line."""
    rows = [row for row in table.rows if column in row.figures]
    shown = [row for row in rows if row.subject in names and row.kind != "floor"]
    for row in shown:
        value, at = row.figures[column].value, names.index(row.subject)
        drawn = max(LEAST, value) if is_log else value
        axis.plot([drawn], [at], "o", color=COLOURS[row.kind], markersize=6)
    floors = [row for row in rows if row.kind == "floor"]
    for row in floors:
        value = max(LEAST, row.figures[column].value) if is_log else row.figures[column].value
        axis.axvline(value, color=COLOURS["floor"], linewidth=1, linestyle="--")
        style = {"fontsize": 7, "color": "#5b6573", "textcoords": "offset points"}
        axis.annotate("floor", (value, len(names) - 0.1), xytext=(2, 2), **style)
    if is_log:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_xscale("log")
        values = [max(LEAST, row.figures[column].value) for row in shown + floors]
        axis.set_xlim(min(values) / 2, max(values) * 4)
        axis.xaxis.set_major_locator(LogLocator(base=10, numticks=6))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
