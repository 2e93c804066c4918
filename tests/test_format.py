"""Durations, times, counts and ranges of numbers as text."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from gateway_queue_sync.format import (
    format_clock,
    format_count,
    format_duration,
    format_exact,
    format_ranges,
    format_time,
)


@pytest.fixture
def berlin(monkeypatch):
    """A place whose clocks go back an hour in the night to 2026-10-25."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the local time cannot be chosen here")
def test_a_time_after_a_change_of_the_clocks_is_shown_by_the_clocks_of_then(berlin):
    now = datetime(2026, 10, 24, 20, tzinfo=UTC).astimezone()
    assert format_time(now, 20 * 3600.0) == "in 20 h 0 min (2026-10-25 17:00:00)"


def test_a_time_after_the_end_of_the_calendar_is_shown_as_a_duration():
    assert format_time(datetime(2026, 1, 1, tzinfo=UTC), 1e12).startswith("in ")


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (59.94, "59.9 s"),
        (59.97, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (47.9 * 3600, "47 h 54 min"),
        (48 * 3600, "2 d 0 h"),
        (75.5 * 3600, "3 d 3 h"),
    ],
)
def test_a_duration_is_never_shown_as_a_full_smaller_unit(duration, text):
    assert format_duration(duration) == text


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (0.0, "0 s"),
        (5.25, "5.25 s"),
        (10.5, "10.5 s"),
        (59.996, "1 min"),
        (90.5, "1 min 30 s"),
        (86_400, "24 h"),
    ],
)
def test_an_exact_duration_has_the_decimals_and_units_that_it_needs(duration, text):
    assert format_exact(duration) == text


def test_a_time_of_today_is_shown_without_its_day():
    now = datetime(2026, 1, 1, 12, tzinfo=UTC).astimezone()
    assert format_time(now, 90.0).startswith("in 1 min 30 s (")
    assert "2026" not in format_time(now, 90.0)


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (0.0, "0:00:00"),
        (65.4, "0:01:05"),
        (86_405, "24:00:05"),
        (172_805, "2 d 0:00:05"),
        (3599.6, "1:00:00"),
    ],
)
def test_a_clock_shows_hours_minutes_and_seconds(duration, text):
    assert format_clock(duration) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([7], "7"), ([0, 1, 2, 3, 7], "0-3, 7"), ([1, 2], "1-2"), (range(5, 900), "5-899")],
)
def test_ranges_of_numbers_are_shown_by_their_ends(numbers, text):
    assert format_ranges(numbers) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards")])
def test_a_count_has_the_plural_it_needs(number, text):
    assert format_count(number, "shard") == text
