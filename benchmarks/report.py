"""Results as text: tables for a terminal, and those of the documents in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import fairness, free_path, lines, wake
from benchmarks.figures import LEAST_TAIL, OURS, Figure, Kind, Result, Row, Table
from benchmarks.peers import SUBJECTS

COLUMNS = (
    "one permit each 50 ms",
    "late, median",
    "late, p99",
    "too early, worst round",
    "overtaken",
    "CPU of 1,000 idle",
    "free path",
)
NOT_IN_README = {"CPU of 1,000 idle"}
"""The column that only ``benchmarks/README.md`` has."""

DETAILS = ("**this package**, `NoOpQueue`", "a `Lock` and `time.sleep`", "throttled-py, timeout")
"""The rows that only ``benchmarks/README.md`` has."""


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if value == 0 or math.isnan(value):
        return "0" if value == 0 else "?"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def header(found: dict[str, Any]) -> str:
    """Return a description of the machine and of the subjects."""
    text = [f"{name}: {value}" for name, value in found["machine"].items() if value is not None]
    versions = ", ".join(f"{name} {version}" for name, version in found["peers"].items())
    text.append(f"peers: {versions or 'none are installed (the bench extra)'}")
    text += [f"  {name}: {how}" for name, how in found["used as"].items()]
    text.append(
        "A figure is the median of all rounds (the least–the most of them); p99 is that of all rounds' "
        f"values together, where they are {LEAST_TAIL} at least."
    )
    return "\n".join(text)


def as_text(result: Result) -> str:
    """Return the result of a benchmark."""
    parts = [f"== {result.title}"]
    if result.skipped:
        parts.append(f"skipped: {result.skipped}")
    parts += [_table(table) for table in result.tables]
    if result.targets:
        parts.append("\n".join(f"  {line}" for line in _targets(result)))
    return "\n\n".join(parts)


def _targets(result: Result) -> Iterable[str]:
    said = {True: "met   ", False: "MISSED", None: "?     "}
    for target in result.targets:
        bound = "at least" if target.at_least else "at most"
        yield (
            f"{said[target.met]}  {target.what}: {number(target.got)} ({bound} {number(target.limit)})"
        )


def _table(table: Table) -> str:
    names = list(dict.fromkeys(name for row in table.rows for name in row.figures))
    floor = next((row for row in table.rows if row.kind == "floor"), None)
    ours = next((row for row in table.rows if row.kind == "ours"), None)
    others = {"× floor": floor, "× ours": ours} if table.compared else {}
    compared = {label: row for label, row in others.items() if row and row.figures}
    cells = [["", *names, *compared, ""]]
    for row in table.rows:
        ratios = [_ratio(row, other, table.compared) for other in compared.values()]
        figures = [_cell(row.figures[name]) if name in row.figures else "" for name in names]
        note = _rounds(row) if row.figures else row.note
        cells.append([row.subject, *figures, *ratios, note])
    lines = [table.title, *_aligned(cells)]
    lines += [f"  {row.subject}: {row.note}" for row in table.rows if row.figures and row.note]
    return "\n".join([*lines, *([f"  {table.note}"] if table.note else [])])


def _rounds(row: Row) -> str:
    noisy = f", {row.noisy} noisy" if row.noisy else ""
    return f"{row.rounds} round{'s' * (row.rounds > 1)}{noisy}"


def _cell(figure: Figure) -> str:
    if figure.low == figure.high:
        return number(figure.value)
    return f"{number(figure.value)} ({number(figure.low)}–{number(figure.high)})"


def _ratio(row: Row, other: Row, name: str) -> str:
    if row is other or name not in row.figures or not other.figures[name].value:
        return ""
    return number(row.figures[name].value / other.figures[name].value)


def _aligned(cells: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    for row in cells:
        texts = [row[0].ljust(widths[0])]
        texts += [text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True)]
        yield ("  " + "  ".join([*texts, row[-1]])).rstrip()


# --- the tables of the documents ------------------------------------------------------------------


def as_markdown(results: Sequence[Result]) -> str:
    """Return the main figures of all subjects in one table, without those that were not measured."""
    tables = {result.name: result.tables for result in results}
    alone = tables[wake.NAME][0] if wake.NAME in tables else None
    order = tables[fairness.NAME][0] if fairness.NAME in tables else None
    idle = tables[lines.NAME][2] if lines.NAME in tables else None
    free = tables[free_path.NAME][0] if free_path.NAME in tables else None
    columns = [
        (alone, wake.LATE, " ms"),
        (alone, wake.P99, " ms"),
        (alone, wake.SHORT, " %"),
        (order, fairness.OVERTAKEN, " %"),
        (idle, lines.IDLE, " ms"),
        (free, free_path.ONE, " ns"),
    ]
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("the floor", ("floor",)),
        ("**this package**", (OURS, free_path.BUDGET)),
        ("**this package**, `NoOpQueue`", (free_path.NO_OP,)),
    ]
    rows += [
        (_said(subject.name, subject.kind), (subject.name,))
        for subject in SUBJECTS.values()
        if subject.kind != "ours"
    ]
    text = [_markdown_row(COLUMNS), _markdown_row(["---"] + ["--:"] * len(columns))]
    for said, names in rows:
        cells = [_measured(table, names, figure, unit) for table, figure, unit in columns]
        if any(cells):
            text.append(_markdown_row([said, *cells]))
    return "\n".join(text)


def for_readme(markdown: str) -> str:
    """Return the part of the table of ``as_markdown`` that ``README.md`` has."""
    shown = [at for at, name in enumerate(COLUMNS) if name not in NOT_IN_README]
    rows = [line.strip("|").split("|") for line in markdown.splitlines()]
    return "\n".join(
        _markdown_row(row[at].strip() for at in shown)
        for row in rows
        if row[0].strip() not in DETAILS
    )


def _said(name: str, kind: Kind) -> str:
    return "a `Lock` and `time.sleep`" if kind == "naive" else name


def _measured(table: Table | None, names: Sequence[str], figure: str, unit: str) -> str:
    """Return a cell: the figure of the row with one of these names or kinds."""
    if table is None:
        return ""
    for row in table.rows:
        if {row.subject, row.kind} & set(names) and figure in row.figures:
            found = row.figures[figure]
            return f"{number(found.high if figure == wake.SHORT else found.value)}{unit}"
    return ""


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
