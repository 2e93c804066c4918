"""The charts. Each is drawn from one table, and is skipped if that was not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import free_path, lines, wake
from benchmarks.figures import Kind, Result, Row, Table

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
    charts: dict[str, Callable[[Result, Path], None]] = {
        wake.NAME: _wake,
        free_path.NAME: _free,
        lines.NAME: _lines,
    }
    drawn = []
    with mpl.rc_context(STYLE):
        for result in results:
            if result.name in charts and not result.skipped:
                path = folder / f"{result.name}.svg"
                charts[result.name](result, path)
                drawn.append(path)
    return drawn


def _wake(result: Result, path: Path) -> None:
    """How late, alone and beside a thread that burns the processor; whoever is too early is marked."""
    figure, axes = _axes(
        2, "how late acquire returns, one permit each 50 ms (ms; bar: median, line: p99)"
    )
    for axis, table, beside in zip(
        axes, result.tables, ("alone", "beside a busy thread"), strict=False
    ):
        rows = [row for row in table.rows if row.figures]
        _bars(axis, rows, wake.LATE, beside)
        for at, row in enumerate(rows):
            median, p99 = row.figures[wake.LATE].value, row.figures[wake.P99].value
            axis.plot([max(median, 0.01), max(p99, 0.01)], [at, at], color="#444444", linewidth=1)
            short = row.figures[wake.SHORT].value
            if short:
                axis.annotate(
                    f" {short:.0f} % too early",
                    (max(p99, median, 0.01), at),
                    va="center",
                    color="#b02a2a",
                    fontsize=8,
                )
        axis.set_xlim(left=0.05)
    _save(figure, path)


def _free(result: Result, path: Path) -> None:
    figure, axes = _axes(1, "a call of acquire that need not wait, one thread (ns)")
    _bars(axes[0], _measured(result.tables[0], free_path.ONE), free_path.ONE, "")
    _save(figure, path)


def _lines(result: Result, path: Path) -> None:
    figure, axes = _axes(1, result.tables[2].title + ": CPU (ms)")
    _bars(axes[0], _measured(result.tables[2], lines.IDLE), lines.IDLE, "")
    _save(figure, path)


def _measured(table: Table, figure: str) -> list[Row]:
    return [row for row in table.rows if figure in row.figures]


def _axes(count: int, title: str) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5 if count > 1 else 6, 2.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, count, sharey=False, squeeze=False)[0]
    return figure, axes


def _bars(axis: Any, rows: Iterable[Row], figure: str, title: str) -> None:
    rows = list(rows)
    values = [max(row.figures[figure].value, 0.01) for row in rows]
    axis.barh(range(len(rows)), values, color=[COLOURS[row.kind] for row in rows], height=0.7)
    axis.set_yticks(range(len(rows)), [row.subject for row in rows])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_title(title, fontsize=9)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})
