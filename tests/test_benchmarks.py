"""The benchmarks run, and their results are well formed. No speed is asserted."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest

from benchmarks import fairness, fleet, free_path, lines, peers, plots, processes, report, wake
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.figures import OURS, Figure, Result, Row, Table, Tail, Target, percentile
from benchmarks.rounds import Case, row_of

pytestmark = pytest.mark.slow


def ignore(what):
    """Report no progress."""


def check(result):
    assert result.skipped or result.tables
    for row in (row for table in result.tables for row in table.rows):
        assert row.figures or row.note.startswith(("not installed: pip install ", "no redis"))
        for figure in row.figures.values():
            assert math.isfinite(figure.value)
            assert figure.low <= figure.value <= figure.high
        assert row.noisy <= row.rounds
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert Result.from_json(found).to_json() == found
    text = report.as_text(result)
    assert all(table.title in text for table in result.tables)
    assert all(target.what in text for target in result.targets)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_tiny_run_gives_well_formed_figures(name):
    module = BENCHMARKS[name]
    result = module.run(module.SIZES["tiny"], ignore)
    assert (result.name, result.title) == (name, module.TITLE)
    check(result)
    if not result.skipped:
        assert any(row.kind == "ours" and row.figures for row in result.tables[0].rows)


def test_a_peer_that_is_not_installed_has_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    result = fairness.run(fairness.SIZES["tiny"], ignore)
    check(result)
    rows = {row.subject: row for row in result.tables[0].rows}
    assert rows["aiolimiter"].note == "not installed: pip install aiolimiter"
    assert rows[OURS].figures
    assert peers.versions() == {}


def test_what_was_measured_can_be_shown_again(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["fairness", "--tiny", "--json", str(file)]) == 0
    measured = capsys.readouterr().out
    assert main(["--load", str(file)]) == 0
    shown = capsys.readouterr().out
    assert set(shown.splitlines()) <= set(measured.splitlines())
    assert main(["--load", str(file), "--markdown"]) == 0
    for table in capsys.readouterr().out.split("\n\n"):
        head, ruler, *rows = table.splitlines()
        assert len({line.count("|") for line in (head, ruler, *rows)}) == 1
        assert rows[0].startswith("| **this package** |")


def test_a_name_that_is_no_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["sleep"])
    assert "'sleep' is none of wake, free," in capsys.readouterr().err


def test_a_figure_is_the_median_of_its_rounds_with_its_spread():
    assert Figure.of([3.0, 1.0, 8.0]) == Figure(value=3.0, low=1.0, high=8.0)


def test_a_p99_is_that_of_all_rounds_values_together_and_not_the_most_of_them():
    rounds = [Tail([float(n) for n in range(first, 210, 3)], 99) for first in range(3)]
    assert Figure.of_tails(rounds) == Figure(value=207.0, low=207.0, high=209.0)


def test_processes_that_share_a_ledger_are_judged_by_when_their_permits_came():
    measured = processes.measure("sqlite", 2, 2, 1, 0.5)
    assert measured["permits"] > 1
    assert measured["too close (of 100)"] == 0
    assert measured["trips a window"] > 0


def test_too_few_values_have_no_p99():
    rounds = [{"late": 1.0, "p99": Tail([1.0] * 199, 99)}]
    row = row_of(Case("it", "peer", print, ()), rounds, noisy=0)
    assert list(row.figures) == ["late"]


@pytest.mark.parametrize(
    ("percent", "value"), [(1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)]
)
def test_so_many_percent_do_not_exceed_a_percentile(percent, value):
    assert percentile(range(1, 101), percent) == value


def test_a_row_says_how_many_rounds_it_had_and_how_many_were_noisy():
    figures = {"late (ms)": Figure(1.0, 1.0, 1.0)}
    rows = [Row("a", "peer", figures, rounds=3), Row("b", "peer", figures, noisy=1, rounds=3)]
    text = report.as_text(Result("wake", "Wake", [Table("A table", rows)]))
    assert [line.split("  ")[-1] for line in text.splitlines()[-2:]] == [
        "3 rounds",
        "3 rounds, 1 noisy",
    ]


def test_a_target_without_a_measurement_is_neither_met_nor_missed():
    assert Target("late", math.nan, 1).met is None
    assert [Target("late", got, 1).met for got in (1, 2)] == [True, False]
    assert Target("faster", 2, 3, at_least=True).met is False


def test_a_spacing_below_the_window_counts_as_short():
    judged = wake.judge([10.0, 11.5, 12.25, 14.0], 1.0)
    assert judged[wake.SHORT] == pytest.approx(100 / 3)
    assert judged[wake.SHORTEST] == pytest.approx(250)
    assert judged[wake.LATE] == pytest.approx(500)


def test_the_least_time_of_a_start_counts_from_when_shards_asked():
    assert fleet.least_seconds([10.0, 10.0, 10.0, 10.0], 2, 5.0) == 5.0
    assert fleet.least_seconds([10.0, 11.0, 18.0], 1, 5.0) == 10.0  # due at 10, 15, 20
    assert fleet.least_seconds([10.0, 10.0, 18.0], 2, 5.0) == 8.0


def test_an_overtaken_shard_is_found(monkeypatch):
    monkeypatch.setattr(fairness, "_served_threads", lambda *_: [0, 2, 3, 1])
    judged = fairness.order(OURS, 4, 0.02)
    assert judged == {fairness.OVERTAKEN: 25.0, fairness.MOST: 2.0, fairness.BEHIND: 2.0}


def test_ratios_are_to_the_floor_and_to_ours():
    def row(subject, kind, late):
        return Row(subject, kind, {"late (ms)": Figure(late, late, late)}, rounds=1)

    rows = [row("floor", "floor", 0.2), row(OURS, "ours", 0.3), row("other", "peer", 0.9)]
    table = Table("A table", rows, compared="late (ms)")
    text = report.as_text(Result("wake", "Wake", [table]))
    other = next(line for line in text.splitlines() if line.strip().startswith("other"))
    assert other.split() == ["other", "0.900", "4.50", "3.00", "1", "round"]


def measured(column, values):
    """A table with a figure for the floor and for each subject, whose values go up to ``values``."""
    floor, *names = ["the floor", OURS, *(n for n in peers.SUBJECTS if n != OURS)]
    low, high = values
    rows = [Row(floor, "floor", {column: Figure(low, low, low)}, rounds=3)]
    for number, name in enumerate(names, 1):
        value = low + (high - low) * number / len(names)
        kind = "ours" if name == OURS else "peer"
        rows.append(Row(name, kind, {column: Figure(value, value, value)}, rounds=3))
    return Table("A permit each 50 ms, alone", rows)


def text_boxes(chart):
    """Each text of a chart, with its left, right, top and bottom."""
    for one in ET.fromstring(chart.read_text()).iter("{http://www.w3.org/2000/svg}text"):
        style = one.get("style")
        size = float(re.search(r"font-size: (\d+)px", style)[1])
        width, x, y = 0.6 * size * len(one.text), float(one.get("x")), float(one.get("y"))
        left = (
            x
            - width
            * {"start": 0, "middle": 0.5, "end": 1}[re.search(r"text-anchor: (\w+)", style)[1]]
        )
        yield one.text, left, left + width, y - 0.7 * size, y


@pytest.mark.parametrize("values", [(0.11, 1.2), (240.0, 900.0), (240.0, 4_290.0), (0.0, 150.0)])
def test_charts_show_the_floor_and_each_subject_by_the_name_in_the_text(tmp_path, values):
    pytest.importorskip("matplotlib")
    late, free = measured(wake.LATE, values), measured(free_path.ONE, values)
    for row in late.rows:
        row.figures[wake.SHORT] = Figure(0.0, 0.0, 0.0)
    idle, order = measured(lines.IDLE, values), measured(fairness.OVERTAKEN, (0.0, 88.0))
    tables = {
        wake.NAME: [late, late],
        fairness.NAME: [order],
        lines.NAME: [idle, idle, idle],
        free_path.NAME: [free],
    }
    charts = plots.draw([Result(name, name, found) for name, found in tables.items()], tmp_path)
    assert sorted(chart.name for chart in charts) == ["free.svg", "summary.svg", "wake.svg"]
    for chart in charts:
        boxes = list(text_boxes(chart))
        shown = [text for text, *_ in boxes]
        assert {"floor", "this package", "a Lock and time.sleep", "limits"} <= set(shown)
        for (text, left, right, top, bottom), (other, *box) in combinations(boxes, 2):
            apart = right <= box[0] or box[1] <= left or bottom <= box[2] or box[3] <= top
            assert apart, f"{chart.name}: {text!r} is printed over {other!r}"
