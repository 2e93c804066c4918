"""The results of benchmarks: figures, in rows of tables, and the targets to compare them with."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

Kind = Literal["ours", "floor", "peer", "naive"]

OURS = "gateway_queue_sync"
LEAST_TAIL = 200
"""With fewer values no p99 is shown: it would be almost their maximum."""


class Tail(NamedTuple):
    """The sorted values of one round. Their high percentile is that of all rounds together."""

    ordered: list[float]
    percent: float


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of several rounds (or a percentile, see ``of_tails``), with the extremes."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Iterable[float]) -> Self:
        """Return the figure of the values of the rounds."""
        rounds = list(rounds)
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    @classmethod
    def of_tails(cls, rounds: Sequence[Tail]) -> Self | None:
        """Return the percentile of the values of all rounds; ``None`` if there are too few."""
        together = sorted(itertools.chain(*(one.ordered for one in rounds)))
        if len(together) < LEAST_TAIL:
            return None
        each = [percentile(*one) for one in rounds]
        return cls(percentile(together, rounds[0].percent), min(each), max(each))


@dataclass(slots=True)
class Row:
    """The figures of one subject by their names, which end in the unit; or why there are none."""

    subject: str
    kind: Kind
    figures: dict[str, Figure] = field(default_factory=dict)
    note: str = ""
    noisy: int = 0
    rounds: int = 0


@dataclass(slots=True)
class Table:
    """Rows to compare. ``compared`` names the figure to show relative to the floor and to ours."""

    title: str
    rows: list[Row]
    compared: str = ""
    note: str = ""

    def row(self, subject: str) -> Row:
        """Return a subject's row."""
        return next(row for row in self.rows if row.subject == subject)

    def value(self, subject: str, figure: str) -> float:
        """Return a subject's figure; not a number if there is none."""
        for row in self.rows:
            if row.subject == subject and figure in row.figures:
                return row.figures[figure].value
        return math.nan

    def best_of(self, kind: Kind, figure: str) -> float:
        """Return the least figure of all rows of one kind; not a number if there is none."""
        found = [
            row.figures[figure].value
            for row in self.rows
            if row.kind == kind and figure in row.figures
        ]
        return min(found, default=math.nan)


@dataclass(slots=True)
class Target:
    """A target for a figure: at most ``limit``, or with ``at_least`` at least that."""

    what: str
    got: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` if it was not measured."""
        if math.isnan(self.got) or math.isnan(self.limit):
            return None
        return self.got >= self.limit if self.at_least else self.got <= self.limit


@dataclass(slots=True)
class Result:
    """The result of one benchmark, or why it was skipped."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    skipped: str = ""

    def table(self, title: str) -> Table | None:
        """Return the table of that title, if there is one."""
        return next((table for table in self.tables if table.title == title), None)

    def to_json(self) -> dict[str, Any]:
        """Return the result as a value for JSON. A figure that was not measured is null."""
        return {
            "name": self.name,
            "title": self.title,
            "skipped": self.skipped,
            "tables": [dataclasses.asdict(table) for table in self.tables],
            "targets": [
                {key: _number(value) for key, value in dataclasses.asdict(target).items()}
                | {"met": target.met}
                for target in self.targets
            ],
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Return the result that ``to_json`` returned as JSON."""
        tables = []
        for table in found["tables"]:
            rows = []
            for row in table["rows"]:
                figures = {name: Figure(**figure) for name, figure in row["figures"].items()}
                rows.append(Row(**{**row, "figures": figures}))
            tables.append(Table(**{**table, "rows": rows}))
        targets = [
            Target(one["what"], _back(one["got"]), _back(one["limit"]), one["at_least"])
            for one in found["targets"]
        ]
        return cls(found["name"], found["title"], tables, targets, found["skipped"])


def _number(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _back(number: float | None) -> float:
    return math.nan if number is None else number


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest of the sorted values that at least so many percent of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
