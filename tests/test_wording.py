"""How figures are said to a person."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from gateway_queue_sync.wording import lasting, when


@pytest.fixture
def berlin(monkeypatch):
    """A place whose clocks go back an hour in the night to 2026-10-25."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the local time cannot be chosen here")
def test_an_instant_behind_a_change_of_the_clocks_is_said_by_the_clocks_of_then(berlin):
    now = datetime(2026, 10, 24, 20, tzinfo=UTC).astimezone()
    assert when(now, 20 * 3600.0) == "in 20 h 0 min (2026-10-25 17:00:00)"


def test_an_instant_behind_all_calendars_is_said_by_how_long_it_takes():
    assert when(datetime(2026, 1, 1, tzinfo=UTC), 1e12).startswith("in ")


@pytest.mark.parametrize(
    ("duration", "said"),
    [
        (59.94, "59.9 s"),
        (59.97, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (47.9 * 3600, "47 h 54 min"),
        (48 * 3600, "2 d 0 h"),
        (75.5 * 3600, "3 d 3 h"),
    ],
)
def test_a_duration_is_never_said_in_a_full_unit_too_small(duration, said):
    assert lasting(duration) == said
