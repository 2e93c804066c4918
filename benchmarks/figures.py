"""What a benchmark returns: figures in rows in tables, and the targets they are held against."""

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
"""Fewer values have no p99: it would be almost their maximum."""


class Tail(NamedTuple):
    """What one round found, in order, of which a high percentile counts: that of all rounds together."""

    ordered: list[float]
    percent: float


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of several rounds (or what ``of_tails`` says), and the least and most of them."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Iterable[float]) -> Self:
        """Return the figure of what each round came to."""
        rounds = list(rounds)
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    @classmethod
    def of_tails(cls, rounds: Sequence[Tail]) -> Self | None:
        """Return the percentile of all rounds' values together; ``None`` if these are too few."""
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
    """Rows to compare. ``compared`` names the figure whose ratios to the floor and to ours count."""

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
    """Where a figure must stand: at most ``limit``, or at least if ``at_least``."""

    what: str
    got: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it stands there; ``None`` if it was not measured."""
        if math.isnan(self.got) or math.isnan(self.limit):
            return None
        return self.got >= self.limit if self.at_least else self.got <= self.limit


@dataclass(slots=True)
class Result:
    """What one benchmark came to, or why it was skipped."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    skipped: str = ""

    def table(self, title: str) -> Table | None:
        """Return the table of that title, if there is one."""
        return next((table for table in self.tables if table.title == title), None)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as what JSON has; what was not measured is null there."""
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
        """Return what ``to_json`` was made of."""
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
    """Return the least of the ordered values that so many percent of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
