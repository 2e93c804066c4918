"""The ``plan`` command: as a text, as JSON, and as a picture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_gateway_bot import BODY, TOKEN, answer, no_proxy, server  # noqa: F401 - fixtures

from gateway_queue_sync import SessionStartLimit, cli, plan_start
from gateway_queue_sync.planner import picture, timeline
from gateway_queue_sync.planner.fleet import Fleet

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
WINDOW = 5.25


def fleet(shards, *, total=1000, remaining=None, reset_after=0.0, buckets=1, reserve=0, first=0):
    remaining = total if remaining is None else remaining
    limit = SessionStartLimit(total, remaining, reset_after, buckets)
    return Fleet(
        plan_start(range(first, first + shards), limit, reserve=reserve), limit, reserve, WINDOW
    )


def planned(*args, **settings):
    """A fleet that is planned when a test first asks for it."""
    return cache(lambda: fleet(*args, **settings))


FLEETS = {
    "one shard": planned(1),
    "a few in one bucket": planned(5),
    "whole waves": planned(64, buckets=16, reserve=50),
    "a part of a bot": planned(40, buckets=16, first=3),
    "a thousand": planned(1024, buckets=16),
    "a small first step": planned(1024, remaining=10, reset_after=60.0),
    "a thousand in one bucket": planned(1024, total=2000),
    "many buckets": planned(1024, total=2000, buckets=256),
    "used up now": planned(4, remaining=0, reset_after=3600.0),
    "used up, but for less than a window": planned(4, remaining=0, reset_after=2.0),
    "a reset on the way": planned(9, remaining=5, reset_after=21.0),
    "many resets": planned(100, total=7, buckets=3, reserve=2),
    "a month of resets": planned(30, total=1),
}


@pytest.fixture(params=FLEETS)
def some(request):
    return FLEETS[request.param]()


def lines(fleet, width=100, encoding="utf-8"):
    return list(timeline.describe(fleet, NOON, width, encoding))


# --- in the terminal ------------------------------------------------------------------------------


def test_a_summary_and_a_timeline():
    assert lines(fleet(10, total=8, buckets=4, reserve=1), width=72) == [
        "10 shards in 4 buckets, 5.25 s between two starts of a bucket",
        "",
        "first start  in 0 s (12:00:00)",
        "last start   in 24 h (2026-11-25 12:00:00)",
        "limit        8 of 8 left now, reserve 1: not enough; 3 shards must wait",
        "             for a reset",
        "resets       in 24 h (2026-11-25 12:00:00)",
        "",
        "         from                              started  left  shards",
        "          0 s  ██████████░░░░░░░░░░░░░░░░     4/10     4  0-3",
        "       5.25 s  ▒▒▒▒▒▒▒▒▒▒████████░░░░░░░░     7/10     1  4-6",
        "          ...  23 h 59 min until the limit resets",
        "         24 h  ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒████████    10/10     5  7-9",
    ]


def test_a_limit_that_suffices_says_what_is_left():
    assert lines(fleet(64, remaining=900, reset_after=60.0, buckets=16))[4] == (
        "limit        900 of 1000 left now: enough; 836 left after the last start"
    )


def test_a_wait_before_the_first_start_is_shown():
    shown = lines(FLEETS["used up now"]())
    assert "first start  in 1 h (13:00:00)" in shown
    assert shown[4].endswith("not enough; 4 shards must wait for a reset")
    assert "          ...  1 h until the limit resets" in shown


def test_each_row_has_a_time_of_its_own():
    shown = lines(fleet(10, remaining=0, reset_after=86_400.0))
    times = [line.split()[0] for line in shown if re.search("[█▒░]", line)]
    assert times[:3] == ["24:00:00", "24:00:05", "24:00:10"]
    assert len(set(times)) == len(times) == 10


def test_those_who_wait_for_less_than_a_window_are_counted_too():
    shown = lines(fleet(8, remaining=5, reset_after=7.0, buckets=4))
    assert "not enough; 3 shards must wait" in shown[4]


def test_many_resets_are_told_in_short():
    shown = lines(FLEETS["a month of resets"]())
    assert sum(line.startswith("resets ") for line in shown) == 4
    assert "resets       and 26 more times" in shown
    assert len(shown) < 40


@pytest.mark.parametrize("width", [44, 60, 79, 132, 250])
def test_it_fits_the_width(some, width):
    assert all(len(line) <= width for line in lines(some, width))


def test_every_step_is_seen_and_the_bar_ends_full(some):
    bars = [re.search("[█▒░]+", line) for line in lines(some)]
    bars = [bar[0] for bar in bars if bar]
    assert 1 <= len(bars) <= timeline.MAX_ROWS + len(some.runs)
    assert len({len(bar) for bar in bars}) == 1
    assert all("█" in bar for bar in bars)
    assert bars[-1][-1] == "█"
    assert "▒" not in bars[0]


def test_where_blocks_cannot_be_written_it_takes_ascii():
    shown = lines(FLEETS["whole waves"](), encoding="ascii")
    assert "".join(shown).isascii()
    assert re.search(r"=+#+\.+", "".join(shown))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_it_runs_in_a_narrow_terminal_of_any_encoding(encoding):
    run = subprocess.run(
        [*(sys.executable, "-m", "gateway_queue_sync", "plan"), *("--shards", "48")],
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "60"},
        capture_output=True,
        check=True,
    )
    printed = run.stdout.decode(encoding)
    assert run.stderr == b""
    assert ("█" in printed) == (encoding == "utf-8")
    assert max(map(len, printed.splitlines())) < 60


# --- options, exit codes and JSON -----------------------------------------------------------------


def test_it_exits_with_0_if_the_limit_suffices_and_with_1_if_not(capsys):
    options = ["plan", "--shards", "1000", "--max-concurrency", "16"]
    assert cli.main(options) == 0
    assert " enough; 0 left after the last start" in capsys.readouterr().out
    assert cli.main([*options, "--reserve", "1"]) == 1
    assert "not enough; 1 shard must" in capsys.readouterr().out


def test_programs_get_the_fields_of_the_plan(capsys):
    options = "--shards 6 --first-shard 4 --max-concurrency 2 --total 9 --remaining 3"
    more = "--reset-after 60 --reserve 1 --interval 2 --margin 0.5"
    assert cli.main(["plan", "--json", *options.split(), *more.split()]) == 1
    shown = json.loads(capsys.readouterr().out)
    limit = SessionStartLimit(9, 3, 60.0, 2)
    plan = plan_start(range(4, 10), limit, reserve=1, interval=2.0, margin=0.5)
    assert shown == json.loads(json.dumps(asdict(plan)))
    assert shown["lasts"] is False


def test_some_used_up_and_no_word_of_the_reset_means_a_day(capsys):
    assert cli.main(["plan", "--json", "--shards", "2", "--remaining", "1"]) == 1
    assert json.loads(capsys.readouterr().out)["resets"] == [86_400.0]


def test_with_a_token_it_reads_the_limit_from_discord(server, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    server.will(answer(BODY))
    options = ["--token-file", str(file), "--base-url", server.url]
    assert cli.main(["plan", "--shards", "32", *options]) == 0
    printed = capsys.readouterr()
    assert "32 shards in 16 buckets" in printed.out
    assert "998 of 1000 left now: enough; 966 left" in printed.out
    assert TOKEN not in printed.out + printed.err


def test_what_is_said_counts_instead_of_what_was_read(server, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "token"
    file.write_text(TOKEN)
    server.will(answer(BODY))
    options = ["--token-file", str(file), "--base-url", server.url, "--remaining", "20"]
    assert cli.main(["plan", "--shards", "32", *options]) == 1
    assert "20 of 1000 left now: not enough; 12 shards must" in capsys.readouterr().out


def test_a_token_that_is_wrong_is_said_to_be_and_not_shown(server, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "token"
    file.write_text(TOKEN)
    server.will(answer({}, 401))
    assert (
        cli.main(["plan", "--shards", "2", "--token-file", str(file), "--base-url", server.url])
        == 2
    )
    printed = capsys.readouterr()
    assert "the token is wrong" in printed.err
    assert printed.out == ""
    assert TOKEN not in printed.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "--shards"),
        ("--shards 0", "--shards must be at least 1, not 0"),
        ("--shards 9999999", "--shards must be at most 1000000, not 9999999"),
        ("--shards 4 --first-shard -1", "--first-shard must be at least 0, not -1"),
        ("--shards 4 --max-concurrency 0", "max_concurrency must be at least 1, not 0"),
        ("--shards 4 --total 3 --remaining 4", "remaining (4) is more than total (3)"),
        ("--shards 4 --reserve 1000", "total (1000) must be more than the reserve (1000)"),
        ("--shards 4 --interval 0", "interval must be more than 0 s, not 0"),
        ("--shards 4 --margin nan", "margin must be a number, not NaN"),
        ("--shards 4 --reset-after inf", "reset_after must be finite, not inf"),
        ("--shards 4 --base-url http://localhost", "--base-url goes with --token-file"),
        ("--shards 4 --svg - --json", "--svg - and --json both write to standard output"),
        (
            "--shards 4 --token-file /nowhere/token",
            "--token-file '/nowhere/token': No such file or directory",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *options.split()])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_a_file_that_holds_no_token_is_refused_and_not_shown(tmp_path, capsys):
    file = tmp_path / "token"
    file.write_bytes(b"\xffsecret words")
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "--shards", "4", "--token-file", str(file)])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "is not text" in printed
    assert "secret" not in printed


# --- the picture ----------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def drawn(fleet):
    return ET.fromstring(picture.draw(fleet))


def waves(root):
    """The path of each wave's bars."""
    return [group.find(f"{SVG}path") for group in root.iter(f"{SVG}g")]


def bars(path):
    return [
        tuple(map(float, bar))
        for bar in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", path.get("d"))
    ]


def texts(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def test_a_bar_for_each_shard_and_a_colour_for_each_wave(some):
    axis = picture.Axis(some)
    if axis.omitted or some.window * axis.scale < picture.MIN_COLUMN:
        pytest.skip("bars are left out, or drawn as one")
    paths = waves(drawn(some))
    assert sum(len(bars(path)) for path in paths) == some.shards
    colours = [path.get("fill") for path in paths]
    assert len(colours) == some.waves
    if some.waves <= 64:
        assert len(set(colours)) == some.waves


def test_nothing_sticks_out(some):
    root = drawn(some)
    _, _, width, height = map(float, root.get("viewBox").split())
    for path in waves(root):
        for x, y, w, h in bars(path):
            assert x >= picture.LEFT
            assert x + w <= width
            assert y >= picture.GRID_TOP
            assert y + h < height - picture.BUDGET_HEIGHT
    for path in root.iter(f"{SVG}path"):
        if path.get("class") in ("left", "area"):
            heights = re.findall(r"(?:V|M[\d.]+ )(-?[\d.]+)", path.get("d"))
            assert all(0 < float(y) < height for y in heights)
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.get("x")) < width
        assert 0 < float(text.get("y")) < height


def test_a_bucket_has_a_row_and_an_instant_a_column():
    columns = [{x for x, *_ in bars(path)} for path in waves(drawn(FLEETS["whole waves"]()))]
    assert all(len(xs) == 1 for xs in columns)
    (first,), *_, (last,) = columns
    assert first == picture.LEFT
    assert last > 3 * (picture.WIDTH - picture.LEFT) / 4
    for path in waves(drawn(FLEETS["whole waves"]())):
        assert len({y for _, y, *_ in bars(path)}) == 16


def test_large_bars_bear_their_shards_number_and_small_ones_do_not():
    assert set(map(str, range(64))) <= set(texts(drawn(FLEETS["whole waves"]())))
    assert "1023" not in texts(drawn(FLEETS["a thousand"]()))


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 40), st.integers(1, 9))
def test_later_is_further_right(shards, total, used, buckets):
    some = fleet(shards, total=total, remaining=max(0, total - used), buckets=buckets)
    axis = picture.Axis(some)
    assume(not axis.omitted)
    places = [axis.x(start.at) for start in some.plan.starts]
    assert places == sorted(places)
    assert len({round(x, 6) for x in places}) == len(list(some.instants))


def test_a_wait_for_the_reset_is_cut_short():
    root = drawn(FLEETS["a thousand"]())
    assert "23 h 54 min later" in texts(root)
    assert "24 h" in texts(root)
    assert len([rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "band"]) == 1


@pytest.mark.parametrize(
    ("reset_after", "begins"),
    [(0.5, [0]), (2.0, [0]), (WINDOW, [0]), (10.4, [0]), (10.6, [0, 10.6])],
)
def test_now_and_a_first_start_soon_after_a_reset_are_not_parted(reset_after, begins):
    some = fleet(4, remaining=0, reset_after=reset_after)
    axis = picture.Axis(some)
    assert [span[0] for span in axis.spans] == begins
    assert len(list(axis.cuts)) == len(begins) - 1
    assert axis.x(some.plan.starts[1].at) - axis.x(some.plan.starts[0].at) == pytest.approx(
        WINDOW * axis.scale
    )


def test_spans_are_in_order_and_apart(some):
    spans = picture.Axis(some).spans
    assert spans[0][0] == 0
    assert all(ends < begins for (_, ends), (begins, _) in pairwise(spans))


def test_the_budget_falls_to_what_is_left_and_rises_at_resets():
    some = fleet(9, total=10, remaining=5, reset_after=21.0)
    (line,) = (p for p in drawn(some).iter(f"{SVG}path") if p.get("class") == "left")
    heights = [float(y) for y in re.findall(r"(?:V|M[\d.]+ )([\d.]+)", line.get("d"))]
    floor = heights[0] + 0.5 * picture.BUDGET_HEIGHT
    left = [round((floor - y) / picture.BUDGET_HEIGHT * 10) for y in heights]
    assert left == [5, 4, 3, 2, 1, 10, 9, 8, 7, 6, 5]


def test_the_reserve_is_a_line_of_its_own():
    assert "reserve 50" in texts(
        drawn(fleet(64, remaining=120, reset_after=60.0, buckets=16, reserve=50))
    )
    assert "reserve 50, below" in texts(drawn(FLEETS["whole waves"]()))
    assert not any("reserve" in text for text in texts(drawn(FLEETS["a thousand"]())))


def test_it_says_what_it_shows_to_those_who_cannot_see_it(some):
    root = drawn(some)
    assert root.get("role") == "img"
    names = {element.get("id"): element.text for element in root if element.get("id")}
    assert names == {"title": texts(root)[0], "said": texts(root)[1]}
    assert some.title in names["title"]


def test_it_needs_nothing_else_and_suits_dark_and_light(some):
    text = picture.draw(some)
    assert not re.search(r"https?:|href|url\(|@import|<script", text.replace(SVG[1:-1], ""))
    assert "@media (prefers-color-scheme: dark)" in text


def test_words_are_escaped():
    class Odd(Fleet):
        title = "<&>"

    odd = Odd(*(getattr(fleet(3), field.name) for field in fields(Fleet)))
    assert texts(drawn(odd))[0].startswith("<&>: ")


def test_the_picture_is_written_beside_the_summary(tmp_path, capsys):
    file = tmp_path / "plan.svg"
    assert cli.main(["plan", "--shards", "64", "--svg", str(file)]) == 0
    assert file.read_text(encoding="utf-8") == picture.draw(fleet(64))
    assert capsys.readouterr().out.startswith("64 shards in 1 bucket, ")


def test_a_file_that_cannot_be_written_is_said_to_be(tmp_path, capsys):
    for file, why in ((tmp_path, "Is a directory"), (tmp_path / "no/where", "No such file")):
        assert cli.main(["plan", "--shards", "64", "--svg", str(file)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"--svg {str(file)!r}: {why}")
        assert printed.out == ""


def test_the_picture_may_go_to_standard_output_in_place_of_the_summary(capsys):
    assert cli.main(["plan", "--shards", "64", "--svg", "-"]) == 0
    assert capsys.readouterr().out == picture.draw(fleet(64))


LARGE = {
    "many resets": planned(16_384, buckets=16),
    "many resets of parts of waves": planned(16_383, buckets=100, reserve=7),
    "many bars with numbers": planned(1_600, total=10_000, buckets=48),
    "many rows and columns": planned(50_000, total=50_000, buckets=160),
    "a thousand resets": planned(4_000, total=4, buckets=3),
    "many buckets and resets": planned(20_000, buckets=900, first=77),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_picture_is_100_kb_at_most(name):
    assert len(picture.draw(LARGE[name]()).encode()) <= 100_000


@pytest.mark.parametrize("name", LARGE)
def test_runs_are_wide_enough_to_be_seen(name):
    axis = picture.Axis(LARGE[name]())
    shown = sum(ends - begins for begins, ends in axis.spans) * axis.scale
    assert shown / len(axis.spans) >= 10
    assert shown > 0.35 * picture.WIDTH


def test_with_few_shards_the_budget_is_no_flat_area():
    (line,) = (p for p in drawn(fleet(4)).iter(f"{SVG}path") if p.get("class") == "left")
    heights = [float(y) for y in re.findall(r"V([\d.]+)", line.get("d"))]
    assert max(heights) - min(heights) > 0.5 * picture.BUDGET_HEIGHT
    assert {"1000", "996"} <= set(texts(drawn(fleet(4))))


def test_the_legend_is_one_sentence(some):
    (legend,) = (text for text in texts(drawn(some)) if "Each bar" in text)
    assert legend.count(".") == 1
    assert legend.endswith(".")


def test_durations_are_written_in_one_way(some):
    """As in the summary: 5.25 s, 1 min 30 s, 24 h, 16 d."""
    assert not any(re.search(r"\d:\d\d", text) for text in texts(drawn(some)))


@pytest.mark.slow
def test_a_million_shards_are_planned(capsys):
    assert cli.main(["plan", "--shards", "1000000"]) == 1
    printed = capsys.readouterr().out
    assert "last start   in 999 d 1 h" in printed
    assert "limit        1000 of 1000 left now: not enough; 999000 shards" in printed
    assert "resets       and 996 more times" in printed
    assert "1000000/1000000" in printed
