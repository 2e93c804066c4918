"""The token bucket as tables and as properties. Times are arguments: microseconds, from any origin."""

from __future__ import annotations

import ast
import copy
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_queue_sync import forecast, limits, models, token_bucket
from gateway_queue_sync.forecast import Outlook
from gateway_queue_sync.limits import Budget
from gateway_queue_sync.models import Permit, SessionStartLimit
from gateway_queue_sync.settings import Settings
from gateway_queue_sync.token_bucket import MANY_REJECTIONS, Account, Denial, Reason

S = 1_000_000
W = 5_250_000  # a window
DAY = 86_400 * S
MINUTE = 60 * S


def limit(total=1000, remaining=None, reset_after=0.0, max_concurrency=1):
    remaining = total if remaining is None else remaining
    return SessionStartLimit(total, remaining, reset_after, max_concurrency)


def account(window_us=W, **fields):
    """An account that keeps no budget."""
    return Account(window_us=window_us, period_us=DAY, **fields)


def with_budget(total=1000, remaining=None, reset_after=0.0, max_concurrency=1, at=0, **fields):
    kept = account(**fields)
    limits.adopt(kept, limit(total, remaining, reset_after, max_concurrency), at)
    return kept


def take(kept, now_us, shard_id=0, **asked):
    """Ask at an instant that both clocks show, unless the wall clock has its own (``wall_us``)."""
    return token_bucket.take(kept, shard_id, now_us, **asked)


def granted(kept, now_us, shard_id=0, **asked):
    permit = take(kept, now_us, shard_id, **asked)
    assert isinstance(permit, Permit), permit
    return permit


def ready_in_us(kept, number, now_us):
    """Return how long the window of a bucket still lasts, which may never have granted."""
    bucket = kept.buckets.get(number, kept.default_bucket)
    return max(0, token_bucket.closed_for_us(kept, bucket, now_us))


def wait(kept, now_us, shard_id=0, **asked):
    """How long the account lets a shard wait, 0 if it grants; the account is left alone."""
    answer = take(copy.deepcopy(kept), now_us, shard_id, **asked)
    return 0 if isinstance(answer, Permit) else answer.wait_us


# --- microseconds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_seconds", "in_us"),
    [
        (0.0, 0),
        (5.25, W),
        (0.000_001, 1),
        (0.1 + 0.2, 300_000),
        (-1.5, -1_500_000),
        (2.0**60, 2**60 * S),
        (1e300, int(1e300) * S),
    ],
)
def test_seconds_become_whole_microseconds(in_seconds, in_us):
    assert models.to_us(in_seconds) == in_us


@given(st.integers(0, 10**12))
def test_microseconds_survive_being_seconds(in_us):
    assert models.to_us(in_us / S) == in_us


@pytest.mark.parametrize(
    ("interval", "margin", "period", "in_us"),
    [
        (5.0, 0.25, 60.0, (5 * S, S // 4, MINUTE)),
        (1e-9, 0.0, 1e-9, (1, 0, 1)),  # neither can be nothing
    ],
)
def test_the_timings_of_the_settings_are_whole_microseconds(interval, margin, period, in_us):
    assert Settings(interval=interval, margin=margin, period=period).timings_us == in_us


# --- windows --------------------------------------------------------------------------------------


def test_a_bucket_that_never_granted_grants():
    permit = take(account(), 123)
    assert (permit.shard_id, permit.bucket, permit.remaining) == (0, 0, None)
    assert (permit.serial, permit.stamp_us, permit.period) == (1, 123, 0)
    assert not permit.returned


def test_a_permit_that_is_granted_is_a_permit_like_any_other():
    """The free path makes it without calling its constructor."""
    made, granted_one = Permit(0), granted(account(), 0)
    assert type(granted_one) is Permit
    for name in ("waited", "remaining", "reported", "reporter", "waiter", "returned"):
        assert getattr(granted_one, name) == getattr(made, name), name
    assert repr(granted_one) == repr(made)


@pytest.mark.parametrize("start", [0, 7, -3 * DAY, 10**15])
@pytest.mark.parametrize(("later", "left"), [(0, W), (1, W - 1), (W - 1, 1), (W, 0), (W + 1, 0)])
def test_a_bucket_rests_for_a_window_after_a_permit(start, later, left):
    kept = account()
    granted(kept, start)
    assert ready_in_us(kept, 0, start + later) == left
    answer = take(kept, start + later)
    assert answer == Denial(left, Reason.WINDOW) if left else isinstance(answer, Permit)


def test_asking_again_and_again_does_not_put_it_off():
    kept = account()
    granted(kept, 0)
    for now_us in range(0, W, S // 2):
        assert take(kept, now_us) == Denial(W - now_us, Reason.WINDOW)
    granted(kept, W)


def test_unused_windows_are_not_saved_up():
    kept = account()
    granted(kept, 0)
    granted(kept, 100 * W)
    assert wait(kept, 100 * W) == W


def test_buckets_are_independent():
    kept = account(max_concurrency=3)
    granted(kept, 0, shard_id=0)
    granted(kept, S, shard_id=1)
    assert [wait(kept, 2 * S, shard_id) for shard_id in range(3)] == [W - 2 * S, W - S, 0]


@pytest.mark.parametrize(
    ("max_concurrency", "shard_id", "bucket"), [(1, 31, 0), (16, 5, 5), (16, 16, 0), (16, 37, 5)]
)
def test_a_shards_bucket_is_its_remainder(max_concurrency, shard_id, bucket):
    assert granted(account(max_concurrency=max_concurrency), 0, shard_id).bucket == bucket


def test_shards_of_one_bucket_share_its_window():
    kept = account(max_concurrency=16)
    granted(kept, 0, shard_id=5)
    assert wait(kept, 0, shard_id=21) == W


def test_permits_are_numbered():
    kept = account(max_concurrency=2)
    assert [granted(kept, at, shard_id).serial for at, shard_id in [(0, 0), (0, 1), (W, 0)]] == [
        1,
        2,
        3,
    ]
    assert kept.granted == 3


def test_without_a_window_every_call_grants():
    kept = account(window_us=0)
    assert [granted(kept, 0).serial for _ in range(3)] == [1, 2, 3]


def test_whose_turn_comes_later_than_the_window_ends_waits_for_that():
    kept = account()
    granted(kept, 0)
    assert take(kept, S, not_before_us=W - 1) == Denial(W - S, Reason.WINDOW)
    assert take(kept, S, not_before_us=W + S) == Denial(W, Reason.WINDOW)
    assert take(kept, W, not_before_us=W + S) == Denial(S, Reason.WINDOW)
    granted(kept, W + S, not_before_us=W + S)


# --- the budget -----------------------------------------------------------------------------------


def test_a_permit_is_charged_when_it_is_granted_and_a_denial_never():
    kept = with_budget(total=3)
    assert granted(kept, 0).remaining == 2
    for now_us in (0, 1, W - 1):
        take(kept, now_us)
        assert limits.budget(kept, now_us).remaining == 2
    assert granted(kept, W).remaining == 1


def test_without_a_limit_no_budget_is_kept():
    kept = account()
    assert granted(kept, 0).remaining is None
    assert limits.budget(kept, 0) is None


def test_a_spent_budget_denies_until_the_reset():
    kept = with_budget(remaining=1, reset_after=100.0)
    granted(kept, 0)
    denial = take(kept, 40 * S)
    assert denial == Denial(60 * S, Reason.BUDGET, remaining=0, resets_in_us=60 * S)


def test_the_last_permit_of_one_bucket_leaves_none_for_another():
    kept = with_budget(remaining=1, reset_after=100.0, max_concurrency=2)
    granted(kept, 0, shard_id=0)
    assert take(kept, 0, shard_id=1).reason is Reason.BUDGET


def test_a_denial_for_the_budget_counts_in_a_window_that_lasts_longer():
    kept = with_budget(remaining=1, reset_after=2.0)
    granted(kept, 0)
    denial = take(kept, S)
    assert (denial.reason, denial.wait_us, denial.resets_in_us) == (Reason.BUDGET, W - S, S)
    assert take(kept, 3 * S) == Denial(W - 3 * S, Reason.WINDOW)
    granted(kept, W)


@pytest.mark.parametrize(("reserve", "grants"), [(0, 5), (1, 4), (4, 1), (5, 0), (99, 0)])
def test_the_reserve_is_never_touched(reserve, grants):
    kept = with_budget(remaining=5, reset_after=DAY / S, reserve=reserve)
    answers = [take(kept, number * W) for number in range(8)]
    assert [isinstance(answer, Permit) for answer in answers] == [True] * grants + [False] * (
        8 - grants
    )
    assert answers[-1].remaining == 5 - grants


def test_a_period_starts_at_the_first_permit_after_a_reset():
    kept = with_budget(total=2, remaining=0, reset_after=10.0)
    assert granted(kept, 50 * S).remaining == 1
    assert limits.budget(kept, 50 * S).resets_in_us == DAY
    assert limits.budget(kept, 51 * S).resets_in_us == DAY - S


@pytest.mark.parametrize(("now_us", "remaining"), [(100 * S - 1, 498), (100 * S, 999)])
def test_a_reset_renews_even_a_budget_that_is_not_spent(now_us, remaining):
    kept = with_budget(remaining=500, reset_after=100.0)
    granted(kept, 0)
    assert granted(kept, now_us).remaining == remaining


@pytest.mark.parametrize(
    ("now_us", "remaining", "resets_in_us"), [(0, 3, 100 * S), (100 * S - 1, 3, 1), (100 * S, 9, 0)]
)
def test_a_reset_that_is_due_shows_as_done(now_us, remaining, resets_in_us):
    kept = with_budget(total=9, remaining=3, reset_after=100.0)
    assert limits.budget(kept, now_us) == Budget(9, remaining, resets_in_us)


def test_a_reset_shows_as_done_until_the_next_permit():
    kept = with_budget(total=9, remaining=3, reset_after=100.0)
    assert limits.budget(kept, 10 * DAY) == Budget(9, 9, 0)
    granted(kept, 10 * DAY)
    assert limits.budget(kept, 10 * DAY) == Budget(9, 8, DAY)


def test_the_budget_runs_on_the_wall_clock_and_windows_do_not():
    kept = with_budget(total=9, remaining=1, reset_after=100.0, at=DAY)
    granted(kept, 0, wall_us=DAY)
    assert take(kept, W - 1, wall_us=DAY + 100 * S) == Denial(1, Reason.WINDOW)
    assert take(kept, W, wall_us=DAY + 99 * S).wait_us == S


def test_a_ledger_with_one_clock_shows_it_once():
    kept, alike = with_budget(remaining=1, reset_after=100.0), with_budget(1000, 1, 100.0)
    for now_us in (0, W, 100 * S, 100 * S + W):
        assert shown(take(kept, now_us)) == shown(take(alike, now_us, wall_us=now_us))


# --- limits that reset at once --------------------------------------------------------------------


def test_an_untouched_limit_that_resets_at_once_has_not_begun_its_period():
    kept = with_budget(total=5, reset_after=0.0)
    assert limits.budget(kept, 0) == Budget(5, 5, 0)
    assert not isinstance(take(kept, 7 * S, can_refresh=True), Denial)
    assert limits.budget(kept, 7 * S) == Budget(5, 4, DAY)


def test_a_spent_limit_that_resets_at_once_is_due():
    kept = with_budget(total=5, remaining=0, reset_after=0.0)
    assert limits.budget(kept, 0) == Budget(5, 5, 0)
    assert take(kept, 0, can_refresh=True) == Denial(0, Reason.RESET)
    assert granted(kept, 0).remaining == 4


def test_an_untouched_limit_keeps_the_reset_that_it_comes_with():
    kept = with_budget(total=5, reset_after=100.0)
    granted(kept, 0)
    assert limits.budget(kept, 0) == Budget(5, 4, 100 * S)


# --- reading the limit anew -----------------------------------------------------------------------


def test_whoever_can_read_the_limit_anew_is_told_to_at_a_reset():
    kept = with_budget(remaining=5, reset_after=100.0)
    assert isinstance(take(kept, 0, can_refresh=True), Permit)
    assert take(kept, 100 * S, can_refresh=True) == Denial(0, Reason.RESET)


def test_being_told_of_a_reset_changes_nothing():
    kept = with_budget(remaining=5, reset_after=100.0)
    granted(kept, 0)
    before = copy.deepcopy(kept)
    assert take(kept, 100 * S, can_refresh=True).reason is Reason.RESET
    assert kept == before


def test_nobody_reads_the_limit_before_its_bucket_is_ready():
    kept = with_budget(remaining=1, reset_after=1.0)
    granted(kept, 0)
    assert take(kept, 2 * S, can_refresh=True) == Denial(W - 2 * S, Reason.WINDOW)


def test_the_last_known_total_counts_for_whoever_could_not_read_it():
    kept = with_budget(total=9, remaining=0, reset_after=100.0)
    assert take(kept, 100 * S, can_refresh=True).reason is Reason.RESET
    kept.refresh_owed = True
    assert granted(kept, 100 * S, can_refresh=False).remaining == 8


def test_a_reading_that_is_owed_is_asked_for_at_the_next_permit_and_after_its_window():
    kept = with_budget(total=9, remaining=0, reset_after=100.0)
    kept.refresh_owed = True
    granted(kept, 100 * S, can_refresh=False)
    assert take(kept, 100 * S, can_refresh=True) == Denial(W, Reason.WINDOW)
    assert take(kept, 100 * S + W, can_refresh=True) == Denial(0, Reason.RESET)
    granted(kept, 100 * S + W, can_refresh=False)
    assert kept.refresh_owed


def test_a_limit_that_was_read_is_owed_no_more():
    kept = with_budget(total=9, remaining=0, reset_after=100.0)
    kept.refresh_owed = True
    limits.adopt(kept, limit(total=9, remaining=9), 100 * S)
    assert granted(kept, 100 * S, can_refresh=True).remaining == 8


# --- a reset that waits for the limit to be read --------------------------------------------------


@pytest.mark.parametrize(("later", "left_us"), [(0, 5 * S), (1, 5 * S - 1), (5 * S - 1, 1)])
def test_a_reset_that_is_due_waits_for_the_limit_for_as_long_as_its_patience(later, left_us):
    kept = with_budget(total=9, remaining=5, reset_after=100.0, patience_us=5 * S)
    granted(kept, 0)
    before = copy.deepcopy(kept)
    denial = Denial(left_us, Reason.RESET)
    assert take(kept, 100 * S + later) == denial
    assert take(kept, 100 * S + later, can_refresh=True) == denial
    assert kept == before


@pytest.mark.parametrize("later", [5 * S, 5 * S + 1, DAY])
def test_when_the_patience_is_over_the_last_known_total_counts(later):
    kept = with_budget(total=9, remaining=0, reset_after=100.0, patience_us=5 * S)
    denial = Denial(0, Reason.RESET)
    assert take(copy.deepcopy(kept), 100 * S + later, can_refresh=True) == denial
    assert granted(kept, 100 * S + later).remaining == 8
    assert limits.budget(kept, 100 * S + later).resets_in_us == DAY


def test_the_patience_ends_as_soon_as_the_limit_is_there():
    kept = with_budget(total=9, remaining=0, reset_after=100.0, patience_us=5 * S, recent={})
    assert take(kept, 100 * S).reason is Reason.RESET
    assert limits.read(kept, limit(9, 9, DAY / S), 100 * S, 101 * S) is True
    assert granted(kept, 101 * S).remaining == 8


def test_the_patience_runs_while_the_window_does():
    """So nobody waits for a limit who could not go on without it."""
    kept = with_budget(total=9, remaining=5, reset_after=1.0, patience_us=5 * S)
    granted(kept, 0)
    assert take(kept, 2 * S) == Denial(W - 2 * S, Reason.WINDOW)
    assert take(kept, W) == Denial(6 * S - W, Reason.RESET)
    granted(kept, 6 * S)


def test_there_is_no_patience_before_the_reset_nor_without_one():
    kept = with_budget(total=9, remaining=2, reset_after=100.0, patience_us=5 * S)
    assert granted(kept, 0).remaining == 1
    assert granted(kept, 100 * S - 1).remaining == 0
    assert granted(with_budget(total=9, patience_us=5 * S), 0).remaining == 8
    assert granted(account(patience_us=5 * S), 0).remaining is None


def test_a_reading_that_is_owed_puts_nobody_off_who_cannot_read():
    kept = with_budget(total=9, remaining=0, reset_after=100.0, patience_us=5 * S, recent={})
    granted(kept, 105 * S)
    assert kept.refresh_owed
    assert granted(kept, 105 * S + W).remaining == 7


# --- limits that are read again and again ---------------------------------------------------------

HOUR = 3600 * S


def with_reads(total=1000, remaining=None, reset_after=3600.0, max_concurrency=1):
    """An account whose limit was read at 0, and is read again and again."""
    kept = with_budget(total, remaining, reset_after, max_concurrency)
    kept.recent = {}
    return kept


def read(kept, now_us, remaining=1000, resets_at_us=HOUR, *, sent_us=None, **figures):
    """Take in an answer that shows this reset; it was asked for at the same instant, if not before."""
    found = limit(figures.pop("total", 1000), remaining, (resets_at_us - now_us) / S, **figures)
    return limits.read(kept, found, now_us if sent_us is None else sent_us, now_us)


def left(kept, now_us):
    return limits.budget(kept, now_us).remaining


@pytest.mark.parametrize(
    ("granted_at", "remaining", "expected"),
    [
        (0, 999, 999),  # Discord shows it: it counts once
        (0, 1000, 999),  # Discord does not show it, after a minute: it counts all the same
        (0, 700, 700),  # other programs have started sessions, too
        (40 * S, 1000, 999),  # Discord may not show it yet
        (40 * S, 700, 699),  # others have, and Discord may not show this one yet
        (40 * S - 1, 700, 700),  # Discord shows a session start after a minute
        (100 * S, 700, 699),
    ],
)
def test_what_is_left_is_the_smaller_of_what_was_read_and_what_was_granted(
    granted_at, remaining, expected
):
    kept = with_reads()
    granted(kept, granted_at)
    read(kept, 100 * S, remaining)
    assert left(kept, 100 * S) == expected


def test_a_limit_that_was_read_right_after_own_permits_is_read_again_soon():
    """Some may have been counted twice: 300 left of Discord's are not to be missing for ten minutes."""
    kept = with_reads()
    granted(kept, 90 * S)
    assert read(kept, 100 * S, 700) is False
    assert read(kept, 200 * S, 700) is True
    assert left(kept, 200 * S) == 700


def test_permits_that_are_granted_while_the_limit_is_read_are_taken_off():
    kept = with_reads()
    granted(kept, 90 * S)
    granted(kept, 101 * S)
    assert read(kept, 108 * S, 1000, sent_us=100 * S)
    assert left(kept, 108 * S) == 998


def test_a_slow_answer_counts_from_when_it_was_asked_for():
    """Permits of the minute before the request count; that the answer took long changes nothing."""
    kept = with_reads()
    granted(kept, 45 * S)
    read(kept, 200 * S, 800, sent_us=100 * S)
    assert left(kept, 200 * S) == 799


def test_a_permit_counts_once_in_reads_that_follow_each_other():
    kept = with_reads()
    granted(kept, 0)
    for now_us in range(S, 5 * MINUTE, 10 * S):
        read(kept, now_us, 999 if now_us > 20 * S else 1000)
        assert left(kept, now_us) == (999 if now_us > MINUTE or now_us <= 20 * S else 998)


def test_a_permit_that_was_given_back_does_not_count():
    kept = with_reads()
    token_bucket.unused(kept, granted(kept, 40 * S))
    read(kept, 50 * S, 1000)
    assert left(kept, 50 * S) == 1000


def test_a_permit_given_back_after_a_read_is_refunded():
    kept = with_reads()
    permit = granted(kept, 40 * S)
    read(kept, 50 * S, 1000)
    token_bucket.unused(kept, permit)
    assert left(kept, 50 * S) == 1000


def test_no_refund_exceeds_what_other_programs_left():
    kept = with_reads()
    permit = granted(kept, 40 * S)
    read(kept, 50 * S, 300)
    token_bucket.unused(kept, permit)
    assert left(kept, 50 * S) == 300


def test_no_refund_exceeds_what_was_read_when_the_permit_no_longer_counted_on_top():
    """Other programs have used nearly all; this permit had been granted, but not sent."""
    kept = with_reads()
    permit = granted(kept, 0)
    read(kept, 2 * MINUTE, 10)
    token_bucket.unused(kept, permit)
    assert (left(kept, 2 * MINUTE), kept.used) == (10, 0)


def test_a_permit_given_back_long_after_it_was_granted_is_refunded_if_nothing_was_read_since():
    kept = with_reads()
    permit = granted(kept, 0)
    granted(kept, 10 * MINUTE)
    token_bucket.unused(kept, permit)
    assert left(kept, 10 * MINUTE) == 999


def test_what_is_remembered_of_permits_does_not_grow_over_periods_in_which_no_read_succeeds():
    kept = with_reads(total=10)
    kept.period_us = HOUR
    for number in range(100):
        granted(kept, number * HOUR // 10)
    assert len(kept.recent) <= 10


def test_a_permit_of_the_last_minute_before_a_reset_is_remembered_after_it():
    kept = with_reads()
    granted(kept, HOUR - 61 * S)
    granted(kept, HOUR - 10 * S)
    granted(kept, HOUR)
    assert set(kept.recent) == {2, 3}


def test_a_read_that_shows_more_than_the_total_less_own_permits_gives_none_back():
    kept = with_reads()
    for number in range(5):
        granted(kept, number * W)
    read(kept, 30 * MINUTE, 1000)
    assert left(kept, 30 * MINUTE) == 995


def test_a_limit_that_was_not_full_at_first_may_grow_to_what_is_read_but_not_beyond_own_permits():
    """Who restarts reads a limit that other programs, or an earlier life, have used."""
    kept = with_reads(remaining=10)
    granted(kept, 0)
    read(kept, 30 * MINUTE, 500)
    assert left(kept, 30 * MINUTE) == 500


def test_less_than_nothing_is_never_left():
    kept = with_reads()
    for number in range(5):
        granted(kept, number * W)
    read(kept, 30 * S, 2)
    assert left(kept, 30 * S) == 0


@pytest.mark.parametrize("off_us", [-5 * MINUTE, -1, 0, S, 5 * MINUTE])
def test_of_resets_that_differ_by_up_to_5_minutes_the_later_counts(off_us):
    kept = with_reads()
    assert read(kept, MINUTE, 800, HOUR + off_us) is True
    assert left(kept, MINUTE) == 800
    assert limits.budget(kept, MINUTE).resets_in_us == max(HOUR + off_us, HOUR) - MINUTE
    assert kept.other_reset is None


def test_another_total_counts_at_once_if_the_reset_is_the_same():
    kept = with_reads()
    granted(kept, 0)
    read(kept, 2 * MINUTE, 1999, total=2000)
    assert limits.budget(kept, 2 * MINUTE) == Budget(2000, 1999, HOUR - 2 * MINUTE)


def test_another_max_concurrency_lays_out_other_buckets():
    kept = with_reads()
    granted(kept, MINUTE)
    read(kept, MINUTE, max_concurrency=4)
    assert kept.max_concurrency == 4
    assert [wait(kept, MINUTE, shard_id) for shard_id in range(4)] == [W] * 4


@pytest.mark.parametrize("off_us", [-5 * MINUTE - 1, 5 * MINUTE + 1, 23 * HOUR])
def test_another_reset_does_not_count_before_it_is_confirmed(off_us):
    kept = with_reads(remaining=100)
    granted(kept, 0)
    assert read(kept, 2 * MINUTE, 1000, HOUR + off_us) is False
    assert left(kept, 2 * MINUTE) == 99
    assert limits.budget(kept, 2 * MINUTE).resets_in_us == HOUR - 2 * MINUTE
    assert kept.period == 1


def test_until_another_reset_is_confirmed_the_smaller_numbers_count():
    kept = with_reads()
    granted(kept, 0)
    read(kept, 2 * MINUTE, 400, 10 * HOUR, total=500)
    assert limits.budget(kept, 2 * MINUTE) == Budget(500, 400, HOUR - 2 * MINUTE)
    read(kept, 2 * MINUTE + S, 900, 10 * HOUR, total=2000)
    assert limits.budget(kept, 2 * MINUTE).remaining == 400
    assert limits.budget(kept, 2 * MINUTE).total == 500


def test_a_second_read_after_a_minute_confirms_another_reset():
    kept = with_reads(remaining=100)
    granted(kept, 0)
    assert read(kept, 2 * MINUTE, 1000, 10 * HOUR) is False
    assert read(kept, 3 * MINUTE - 1, 1000, 10 * HOUR) is False
    assert read(kept, 3 * MINUTE, 1000, 10 * HOUR + S) is True
    assert left(kept, 3 * MINUTE) == 1000
    assert limits.budget(kept, 3 * MINUTE).resets_in_us == 10 * HOUR + S - 3 * MINUTE
    assert kept.period == 2


def test_a_confirmed_reset_begins_a_period_in_which_only_recent_permits_were_used():
    kept = with_reads(remaining=100)
    granted(kept, 0)
    read(kept, 2 * MINUTE, 1000, 10 * HOUR)
    granted(kept, 2 * MINUTE)
    read(kept, 3 * MINUTE, 1000, 10 * HOUR)
    assert left(kept, 3 * MINUTE) == 999
    read(kept, HOUR, 1000, 10 * HOUR)
    assert left(kept, HOUR) == 999


def test_a_third_reset_starts_the_minute_anew():
    kept = with_reads(remaining=100)
    assert not read(kept, 2 * MINUTE, 1000, 10 * HOUR)
    assert not read(kept, 4 * MINUTE, 1000, 20 * HOUR)
    assert not read(kept, 5 * MINUTE - 1, 1000, 20 * HOUR)
    assert left(kept, 5 * MINUTE) == 100
    assert read(kept, 5 * MINUTE, 1000, 20 * HOUR)


def test_the_known_reset_ends_the_doubt():
    kept = with_reads(remaining=100)
    assert not read(kept, 2 * MINUTE, 1000, 10 * HOUR)
    assert read(kept, 3 * MINUTE, 100, HOUR)
    assert not read(kept, 4 * MINUTE, 1000, 10 * HOUR)
    assert left(kept, 4 * MINUTE) == 100


def test_a_permit_of_before_a_confirmed_reset_is_not_refunded():
    kept = with_reads(remaining=100)
    old = granted(kept, 0)
    read(kept, 2 * MINUTE, 900, 10 * HOUR)
    read(kept, 3 * MINUTE, 900, 10 * HOUR)
    token_bucket.unused(kept, old)
    assert left(kept, 3 * MINUTE) == 900


def test_a_bot_that_crashes_in_a_loop_wins_nothing_from_an_answer_that_lags():
    """The answer shows a reset that is far away and all session starts, though some were used."""
    kept = with_reads(total=10, reset_after=0.0)
    for number in range(10):
        granted(kept, number * W)
        read(kept, number * W, 10, number * W, total=10)
    assert left(kept, 10 * W) == 0


def test_a_read_at_a_reset_begins_a_period():
    kept = with_reads(remaining=3)
    granted(kept, 0)
    assert read(kept, HOUR, 990, 25 * HOUR) is True
    assert limits.budget(kept, HOUR) == Budget(1000, 990, DAY)
    assert kept.period == 2


def test_a_read_at_a_reset_takes_off_what_discord_may_not_have_seen():
    kept = with_reads(remaining=3)
    granted(kept, HOUR - 59 * S)
    granted(kept, HOUR - 10 * S)
    read(kept, HOUR, 1000, 25 * HOUR)
    assert left(kept, HOUR) == 998


def test_a_read_at_a_reset_whose_period_has_not_begun():
    kept = with_reads(remaining=3)
    read(kept, HOUR, 1000, HOUR)
    assert limits.budget(kept, HOUR) == Budget(1000, 1000, 0)
    granted(kept, 2 * HOUR)
    assert limits.budget(kept, 2 * HOUR) == Budget(1000, 999, DAY)


def test_a_reset_that_was_taken_on_trust_keeps_the_permits_since():
    kept = with_reads(remaining=0)
    for number in range(3):
        granted(kept, HOUR + number * W)
    assert kept.refresh_owed
    assert read(kept, HOUR + 10 * MINUTE, 1000, 25 * HOUR) is True
    assert left(kept, HOUR + 10 * MINUTE) == 997
    assert not kept.refresh_owed


def test_after_a_reset_that_was_taken_on_trust_other_programs_count():
    kept = with_reads(remaining=0)
    granted(kept, HOUR)
    read(kept, HOUR + 10 * MINUTE, 600, 25 * HOUR)
    assert left(kept, HOUR + 10 * MINUTE) == 600


def test_after_a_reset_that_was_taken_on_trust_the_next_read_needs_no_confirmation():
    kept = with_reads(remaining=0)
    granted(kept, HOUR)
    assert limits.budget(kept, HOUR).resets_in_us == DAY
    assert read(kept, 2 * HOUR, 999, 20 * HOUR) is True
    assert limits.budget(kept, 2 * HOUR).resets_in_us == 18 * HOUR


def test_a_read_is_owed_after_a_reset_that_was_taken_on_trust_only_where_the_limit_is_read():
    kept = with_budget(remaining=0, reset_after=3600.0)
    granted(kept, HOUR)
    assert not kept.refresh_owed
    assert kept.recent is None


def test_only_the_permits_of_the_last_minute_are_remembered():
    kept = with_reads(max_concurrency=4)
    for number in range(40):
        granted(kept, number * W)
    read(kept, 40 * W)
    assert len(kept.recent) == MINUTE // W


def test_a_limit_that_is_given_ends_every_doubt():
    kept = with_reads(remaining=100)
    granted(kept, 0)
    read(kept, 2 * MINUTE, 1000, 10 * HOUR)
    limits.adopt(kept, limit(remaining=77, reset_after=60.0), 2 * MINUTE)
    assert (kept.other_reset, kept.used, left(kept, 2 * MINUTE)) == (None, 0, 77)


def test_the_first_limit_of_an_account_that_had_none_counts_at_once():
    kept = account()
    kept.recent = {}
    assert read(kept, S, 990) is True
    assert left(kept, S) == 990


class Discord:
    """What Discord counts: a period begins with its first session start. Its answers may lag.

    ``known`` has what an answer showed from each instant on: the session starts, and the reset.
    """

    def __init__(self, total, period_us):
        self.total, self.period_us = total, period_us
        self.used, self.resets_at_us = 0, 0
        self.known = [(-DAY, 0, 0)]

    def start(self, now_us):
        if now_us >= self.resets_at_us:
            self.used, self.resets_at_us = 0, now_us + self.period_us
        self.used += 1
        self.known.append((now_us, self.used, self.resets_at_us))

    def answer(self, now_us, lag_us):
        """What an answer says at ``now_us`` that shows what there was ``lag_us`` before.

        After a reset it may show the old period as if that ended just now, or none (an odd lag).
        """
        _, used, resets_at_us = [entry for entry in self.known if entry[0] <= now_us - lag_us][-1]
        if now_us >= resets_at_us and (lag_us % (2 * S) or now_us - lag_us >= resets_at_us):
            return limit(self.total, self.total, 0.0)
        resets_in_us = max(0, resets_at_us - now_us)
        return limit(self.total, max(0, self.total - used), resets_in_us / S)


TOTALS = st.integers(1, 8)
PERIOD = 120 * MINUTE  # so that an answer may lag for a minute (UNSEEN_US)
PAUSES = st.sampled_from([0, S, W, 20 * S, PERIOD])


class Bot:
    """The only program with the token: it reads answers that lag, and counts what Discord counts."""

    def __init__(self, total, max_concurrency):
        self.account = Account(window_us=W, period_us=PERIOD, recent={})
        limits.adopt(self.account, limit(total, max_concurrency=max_concurrency), 0)
        self.discord = Discord(total, PERIOD)
        self.now_us = 0

    def read(self, lag):
        found = self.discord.answer(self.now_us, lag * S)
        found = replace(found, max_concurrency=self.account.max_concurrency)
        return limits.read(self.account, found, self.now_us, self.now_us)

    def take(self, shard_id, lag=None):
        """Take a permit as a queue does: at a reset it reads the limit, or trusts 5 s later."""
        answer = take(self.account, self.now_us, shard_id, can_refresh=True)
        if isinstance(answer, Denial) and answer.reason is Reason.RESET:
            if lag is None:
                self.now_us += 5 * S
            else:
                self.read(lag)
            answer = take(self.account, self.now_us, shard_id)
        if isinstance(answer, Permit):
            self.discord.start(self.now_us)
            assert self.discord.used <= self.discord.total
        return answer


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(
        st.tuples(
            st.sampled_from(["take", "take", "read"]),
            PAUSES,
            st.integers(0, 2),
            st.none() | st.sampled_from([0, 1, 26, 60]),
        ),
        min_size=5,
        max_size=30,
    ),
)
def test_no_sequence_of_reads_that_lag_and_permits_exceeds_discords_total(
    total, max_concurrency, steps
):
    """Answers show what was true up to a minute before, and some reads fail."""
    bot = Bot(total, max_concurrency)
    for step, pause_us, shard_id, lag in steps:
        bot.now_us += pause_us
        if step == "take":
            bot.take(shard_id, lag)
        elif lag is not None:
            bot.read(lag)


def test_an_answer_that_does_not_show_a_reset_taken_on_trust_is_not_believed():
    """It shows a limit that nobody has used. Were that believed, a failed read would refill it."""
    kept = with_reads(total=3, remaining=0)
    for number in range(3):
        granted(kept, HOUR + number * W)
    now_us = HOUR + 20 * S
    assert read(kept, now_us, 3, now_us, total=3) is False
    assert limits.budget(kept, now_us) == Budget(3, 0, DAY - 20 * S)
    assert take(kept, now_us + MINUTE).reason is Reason.BUDGET


def test_an_answer_of_before_the_reset_grants_nothing_and_is_read_again():
    kept = with_reads(max_concurrency=4)
    granted(kept, 0)
    assert read(kept, HOUR, 990, HOUR, max_concurrency=4) is False
    assert take(kept, HOUR, 1).wait_us == S
    assert take(kept, HOUR + S, 1, can_refresh=True).reason is Reason.RESET


def test_an_unused_limit_that_may_not_show_recent_permits_is_taken_less_these():
    kept = with_reads(max_concurrency=4)
    granted(kept, HOUR - S)
    assert read(kept, HOUR, 1000, HOUR, max_concurrency=4) is False
    assert left(kept, HOUR) == 999
    assert granted(kept, HOUR, 1).remaining == 998
    assert limits.budget(kept, HOUR).resets_in_us == DAY


def test_a_reset_after_a_day_of_failed_reads_forgets_the_day_before():
    kept = with_reads(remaining=0)
    for number in range(900):
        granted(kept, HOUR + number * W)
    day_later = HOUR + DAY
    assert kept.refresh_owed
    assert read(kept, day_later, 1000, day_later + DAY) is True
    assert left(kept, day_later) == 1000


@given(
    TOTALS,
    st.lists(
        st.tuples(
            st.sampled_from(["take", "take", "read"]), st.integers(0, 8), st.integers(-300, 300)
        ),
        max_size=60,
    ),
)
def test_no_remaining_that_is_read_grants_more_than_the_total_until_the_reset(total, steps):
    kept = with_reads(total=total)
    now_us, permits = 0, 0
    for step, figure, off in steps:
        if step == "take":
            now_us += W
            permits += isinstance(take(kept, now_us), Permit)
        else:
            limits.read(
                kept,
                limit(total, min(figure, total), (HOUR + off * S - now_us) / S),
                now_us,
                now_us,
            )
        assert permits <= total
        assert 0 <= left(kept, now_us) <= total - permits


@given(
    TOTALS,
    st.lists(
        st.tuples(
            st.sampled_from(["take", "read"]),
            st.integers(0, 12),
            st.integers(0, 48),
            st.sampled_from([0, 1, S // 2]),
        ),
        max_size=60,
    ),
)
def test_no_answers_within_a_minute_grant_more_than_was_known_to_be_left(remaining, steps):
    """Whatever they say: another reset needs a second read a minute later."""
    kept = Account(window_us=0, period_us=DAY, recent={})
    limits.adopt(kept, limit(12, remaining, 3 * 3600.0), 0)
    now_us, permits = 0, 0
    for step, figure, hours, pause_us in steps:
        now_us += pause_us
        if step == "take":
            permits += isinstance(take(kept, now_us), Permit)
        elif hours != 3:
            limits.read(kept, limit(12, figure, hours * 3600.0), now_us, now_us)
        assert permits + left(kept, now_us) <= remaining


# --- giving a permit back -------------------------------------------------------------------------


def test_a_permit_that_is_given_back_frees_its_window_and_refunds_its_budget():
    kept = with_budget(total=5)
    token_bucket.unused(kept, granted(kept, 0))
    assert limits.budget(kept, 0).remaining == 5
    assert granted(kept, 0).remaining == 4


def test_what_is_given_back_is_the_window_of_the_permit_before():
    kept = account()
    granted(kept, 0)
    token_bucket.unused(kept, granted(kept, 2 * W))
    assert ready_in_us(kept, 0, 0) == W
    granted(kept, 2 * W)


def test_a_permit_is_refunded_once():
    kept = with_budget(total=5, max_concurrency=2)
    first = granted(kept, 0, shard_id=0)
    granted(kept, 0, shard_id=1)
    token_bucket.unused(kept, first)
    token_bucket.unused(kept, first)
    assert limits.budget(kept, 0).remaining == 4


def test_a_permit_given_back_late_refunds_its_budget_but_not_a_later_window():
    kept = with_budget(total=5)
    first = granted(kept, 0)
    granted(kept, W)
    token_bucket.unused(kept, first)
    assert limits.budget(kept, W).remaining == 4
    assert wait(kept, W) == W


def test_an_older_permit_is_no_longer_undone_after_a_newer_one_was():
    """The bucket granted since: that this was undone too does not bring the chance back."""
    kept = account()
    first = granted(kept, 0)
    token_bucket.unused(kept, granted(kept, W))
    token_bucket.unused(kept, first)
    assert wait(kept, S) == W - S


def test_a_permit_of_another_period_is_not_refunded():
    kept = with_budget(total=5, remaining=1, reset_after=100.0)
    old = granted(kept, 0)
    assert granted(kept, 100 * S).remaining == 4
    token_bucket.unused(kept, old)
    assert limits.budget(kept, 100 * S).remaining == 4


def test_a_permit_of_another_limit_is_not_refunded():
    kept = with_budget(total=5)
    old = granted(kept, 0)
    limits.adopt(kept, limit(total=5, remaining=2, reset_after=100.0), S)
    token_bucket.unused(kept, old)
    assert limits.budget(kept, S).remaining == 2


def test_a_permit_from_before_there_was_a_budget_is_not_refunded():
    kept = account()
    old = granted(kept, 0)
    limits.adopt(kept, limit(total=5, remaining=2, reset_after=100.0), S)
    token_bucket.unused(kept, old)
    assert limits.budget(kept, S).remaining == 2


def test_a_refund_never_exceeds_the_total():
    kept = with_budget(total=5)
    permit = granted(kept, 0)
    kept.remaining = 5
    token_bucket.unused(kept, permit)
    assert limits.budget(kept, 0).remaining == 5


def test_a_permit_that_was_given_back_still_counts_as_granted():
    kept = account()
    token_bucket.unused(kept, granted(kept, 0))
    assert kept.granted == 1
    assert granted(kept, 0).serial == 2


def test_the_period_goes_on_when_its_first_permit_is_given_back():
    kept = with_budget(total=5)
    token_bucket.unused(kept, granted(kept, 0))
    assert limits.budget(kept, S) == Budget(5, 5, DAY - S)


# --- reporting it sent, stamping it anew ----------------------------------------------------------


@pytest.mark.parametrize(("sent_at", "left_then"), [(0, W), (S, W), (W - 1, W), (W, W), (3 * W, W)])
def test_a_report_that_it_was_sent_starts_the_window_anew(sent_at, left_then):
    kept = account()
    token_bucket.sent(kept, granted(kept, 0), sent_at)
    assert wait(kept, sent_at) == left_then


def test_a_report_never_starts_the_window_earlier():
    kept = account()
    token_bucket.sent(kept, granted(kept, 10 * S), 9 * S)
    assert wait(kept, 10 * S) == W


def test_a_late_report_moves_the_window_of_a_later_permit():
    kept = account()
    first = granted(kept, 0)
    granted(kept, W)
    token_bucket.sent(kept, first, W + S)
    assert wait(kept, W + S) == W


def test_a_later_permit_that_is_given_back_leaves_the_window_of_a_late_report():
    kept = account()
    first = granted(kept, 0)
    second = granted(kept, W)
    token_bucket.sent(kept, first, W + S)
    token_bucket.unused(kept, second)
    assert wait(kept, W + S) == W


def test_a_permit_is_stamped_anew_as_it_is_handed_over():
    kept = account()
    permit = granted(kept, 0)
    assert token_bucket.restamp(kept, permit, S) is True
    assert permit.stamp_us == S
    assert wait(kept, S) == W


def test_no_stamp_moves_back():
    kept = account()
    permit = granted(kept, 10 * S)
    assert token_bucket.restamp(kept, permit, 9 * S) is True
    assert permit.stamp_us == 10 * S
    assert wait(kept, 10 * S) == W


def test_a_permit_is_not_stamped_anew_once_its_bucket_went_on():
    kept = account()
    late = granted(kept, 0)
    granted(kept, W)
    assert token_bucket.restamp(kept, late, W + S) is False
    assert late.stamp_us == 0
    assert wait(kept, W) == W


def test_a_permit_is_not_stamped_anew_once_it_was_given_back():
    kept = account()
    permit = granted(kept, 0)
    token_bucket.unused(kept, permit)
    assert token_bucket.restamp(kept, permit, S) is False
    assert wait(kept, S) == 0


@pytest.mark.parametrize("shard_id", [0, 1, 5])
def test_a_permit_is_not_stamped_anew_once_the_buckets_are_others(shard_id):
    kept = with_budget(max_concurrency=6)
    permit = granted(kept, 0, shard_id)
    limits.adopt(kept, limit(max_concurrency=2), S)
    take(kept, S, shard_id)
    assert token_bucket.restamp(kept, permit, 2 * S) is False


def test_a_stamp_that_was_moved_is_undone_with_its_permit():
    kept = account()
    permit = granted(kept, 0)
    token_bucket.restamp(kept, permit, S)
    token_bucket.unused(kept, permit)
    assert wait(kept, S) == 0


# --- rejections -----------------------------------------------------------------------------------


def row_of_rejections(kept, count, start=0):
    """Let so many permits be rejected at once, each as soon as it comes; how long each closed."""
    closures, now_us = [], start
    for _ in range(count):
        token_bucket.rejected(kept, granted(kept, now_us), now_us)
        closures.append(wait(kept, now_us))
        now_us += closures[-1]
    return closures


def test_rejections_in_a_row_close_the_bucket_ever_longer_up_to_a_minute():
    assert row_of_rejections(account(), 6) == [2 * W, 4 * W, 8 * W, MINUTE, MINUTE, MINUTE]


def test_no_closure_is_shorter_than_two_windows():
    long = 40 * S
    assert row_of_rejections(account(window_us=long), 3) == [2 * long] * 3


def test_from_the_tenth_in_a_row_on_rejections_close_the_bucket_for_up_to_15_minutes():
    closures = row_of_rejections(account(), 12)
    assert closures[8] == MINUTE
    assert closures[9:] == [15 * MINUTE] * 3


def test_many_rejections_with_a_short_window_close_it_for_no_more_than_two_windows_doubled():
    closures = row_of_rejections(account(window_us=S // 10), 14)
    assert closures[8:] == [
        51_200_000,
        102_400_000,
        204_800_000,
        409_600_000,
        819_200_000,
        15 * MINUTE,
    ]


def test_a_row_may_have_any_length():
    assert row_of_rejections(account(window_us=1), 100)[-1] == 15 * MINUTE
    assert row_of_rejections(account(), 5000)[-1] == 15 * MINUTE


def test_a_rejection_says_how_many_there_were_in_a_row():
    kept, now_us, counts = account(), 0, []
    for _ in range(MANY_REJECTIONS + 2):
        permit = granted(kept, now_us)
        counts.append(token_bucket.rejected(kept, permit, now_us))
        again = token_bucket.rejected(kept, permit, now_us)  # repeated after an interrupt
        assert again == counts[-1]
        now_us += wait(kept, now_us)
    assert counts == list(range(1, MANY_REJECTIONS + 3))
    granted(kept, now_us)
    now_us += W
    assert token_bucket.rejected(kept, granted(kept, now_us), now_us) == 1


def test_a_rejection_that_is_reported_twice_counts_once():
    kept = account()
    permit = granted(kept, 0)
    token_bucket.rejected(kept, permit, 0)
    token_bucket.rejected(kept, permit, S)
    assert wait(kept, S) == 2 * W - S


def test_a_single_permit_that_is_not_rejected_ends_the_long_closures():
    kept = account()
    now_us = sum(row_of_rejections(kept, 11))
    granted(kept, now_us)
    assert row_of_rejections(kept, 1, start=now_us + W) == [2 * W]


def test_16_buckets_that_are_always_rejected_use_few_session_starts_of_a_day():
    """A minute for each would use up a limit of 1,000 within an hour."""
    kept = account(max_concurrency=16)
    starts = 0
    for shard_id in range(16):
        now_us = 0
        while now_us < DAY // 2:
            token_bucket.rejected(kept, granted(kept, now_us, shard_id), now_us)
            now_us += wait(kept, now_us, shard_id)
            starts += 1
    assert starts < 1000


def test_a_closure_counts_from_the_report():
    kept = account()
    permit = granted(kept, 0)
    token_bucket.rejected(kept, permit, 3 * S)
    assert ready_in_us(kept, 0, 3 * S) == 2 * W
    assert take(kept, 3 * S) == Denial(2 * W, Reason.WINDOW)


def test_a_closure_keeps_other_buckets_open():
    kept = account(max_concurrency=2)
    token_bucket.rejected(kept, granted(kept, 0, shard_id=0), 0)
    granted(kept, 0, shard_id=1)


def test_a_permit_that_is_not_rejected_ends_the_row():
    kept = account()
    closed_us = sum(row_of_rejections(kept, 3))
    granted(kept, closed_us)
    assert row_of_rejections(kept, 1, start=closed_us + W) == [2 * W]


def test_a_permit_that_was_sent_and_then_rejected_goes_on_with_the_row():
    kept = account()
    now_us = sum(row_of_rejections(kept, 2))
    permit = granted(kept, now_us)
    token_bucket.sent(kept, permit, now_us + S)
    token_bucket.rejected(kept, permit, now_us + 2 * S)
    assert wait(kept, now_us + 2 * S) == 8 * W


def test_a_permit_that_was_given_back_does_not_end_the_row():
    """No IDENTIFY went out, so nothing is known that could end it."""
    kept = account()
    now_us = sum(row_of_rejections(kept, 1))
    token_bucket.unused(kept, granted(kept, now_us))
    assert row_of_rejections(kept, 1, start=now_us) == [4 * W]


def test_two_permits_that_are_both_rejected_late_make_a_row():
    kept = account()
    first, second = granted(kept, 0), granted(kept, W)
    token_bucket.rejected(kept, first, W)
    token_bucket.rejected(kept, second, W)
    assert wait(kept, W) == 4 * W


def test_a_rejection_that_comes_after_that_of_a_later_permit_is_not_counted():
    kept = account()
    first, second = granted(kept, 0), granted(kept, W)
    assert token_bucket.rejected(kept, second, W) == 1
    assert token_bucket.rejected(kept, first, 2 * W) == 0
    assert wait(kept, 2 * W) == 2 * W
    assert row_of_rejections(kept, 1, start=4 * W) == [4 * W]


def test_giving_a_permit_back_does_not_open_a_closed_bucket():
    kept = account()
    first, second = granted(kept, 0), granted(kept, W)
    token_bucket.rejected(kept, first, W)
    token_bucket.unused(kept, second)
    assert wait(kept, W) == 2 * W


def test_a_shorter_closure_never_cuts_a_longer_one():
    """Other buckets know of no row, but of how long the old ones were closed."""
    kept = with_budget(max_concurrency=1)
    old = granted(kept, 0)
    now_us = W + sum(row_of_rejections(kept, 4, start=W)) - MINUTE
    limits.adopt(kept, limit(max_concurrency=2), now_us)
    token_bucket.rejected(kept, old, now_us)
    assert wait(kept, now_us) == MINUTE


def test_a_rejected_permit_still_counts_in_the_budget():
    kept = with_budget(total=5)
    token_bucket.rejected(kept, granted(kept, 0), 0)
    assert limits.budget(kept, 0).remaining == 4


# --- other buckets --------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(1, 4), (4, 1), (4, 2), (2, 3), (16, 15)])
def test_every_new_bucket_starts_from_the_latest_permit_of_any_old_one(old, new):
    kept = with_budget(max_concurrency=old)
    latest = (old - 1) * S
    for shard_id in range(old):
        granted(kept, shard_id * S, shard_id)
    limits.adopt(kept, limit(max_concurrency=new), latest + S)
    now_us = latest + S
    assert [ready_in_us(kept, number, now_us) for number in range(new)] == [W - S] * new
    assert [wait(kept, now_us, shard_id) for shard_id in range(new)] == [W - S] * new


def test_the_latest_permit_survives_two_changes_without_a_permit_between():
    kept = with_budget(max_concurrency=4)
    granted(kept, 0, shard_id=3)
    for max_concurrency in (2, 8, 1):
        limits.adopt(kept, limit(max_concurrency=max_concurrency), S)
    assert wait(kept, S) == W - S


def test_new_buckets_stay_closed_for_as_long_as_any_old_one():
    kept = with_budget(max_concurrency=2)
    token_bucket.rejected(kept, granted(kept, 0, shard_id=1), 0)
    limits.adopt(kept, limit(max_concurrency=4), 0)
    assert [wait(kept, 0, shard_id) for shard_id in range(4)] == [2 * W] * 4


def test_new_buckets_stay_closed_for_as_long_as_an_old_one_after_many_rejections():
    kept = with_budget(max_concurrency=1)
    now_us = sum(row_of_rejections(kept, 10)) - 15 * MINUTE
    limits.adopt(kept, limit(max_concurrency=2), now_us)
    assert [wait(kept, now_us, shard_id) for shard_id in range(2)] == [15 * MINUTE] * 2


def test_a_row_of_rejections_goes_on_in_other_buckets():
    kept = with_budget(max_concurrency=1)
    now_us = sum(row_of_rejections(kept, 11))
    for max_concurrency in (2, 3):
        limits.adopt(kept, limit(max_concurrency=max_concurrency), now_us)
    assert row_of_rejections(kept, 1, now_us) == [15 * MINUTE]


def test_a_row_of_rejections_that_had_ended_does_not_go_on_in_other_buckets():
    kept = with_budget(max_concurrency=1)
    now_us = sum(row_of_rejections(kept, 11))
    for number in range(2):
        granted(kept, now_us + number * W)
    limits.adopt(kept, limit(max_concurrency=2), now_us + 2 * W)
    assert row_of_rejections(kept, 1, now_us + 2 * W) == [2 * W]


def test_the_same_number_of_buckets_are_the_same_buckets():
    kept = with_budget(max_concurrency=2)
    granted(kept, 0, shard_id=1)
    limits.adopt(kept, limit(max_concurrency=2), 0)
    assert [wait(kept, 0, shard_id) for shard_id in range(2)] == [0, W]


def test_new_buckets_are_independent_of_each_other():
    kept = with_budget(max_concurrency=1)
    granted(kept, 0)
    limits.adopt(kept, limit(max_concurrency=2), 0)
    granted(kept, W, shard_id=0)
    granted(kept, W + S, shard_id=1)
    assert [wait(kept, W + S, shard_id) for shard_id in range(2)] == [W - S, W]


@pytest.mark.parametrize("shard_id", [1, 3])
def test_a_late_report_moves_the_window_of_the_shards_new_bucket(shard_id):
    kept = with_budget(max_concurrency=4)
    permit = granted(kept, 0, shard_id)
    limits.adopt(kept, limit(max_concurrency=2), S)
    token_bucket.sent(kept, permit, 2 * W)
    assert [wait(kept, 2 * W, number) for number in range(2)] == [0, W]


def test_a_permit_of_old_buckets_frees_no_new_one():
    kept = with_budget(max_concurrency=2)
    permit = granted(kept, 0, shard_id=1)
    limits.adopt(kept, limit(max_concurrency=3), S)
    token_bucket.unused(kept, permit)
    assert [wait(kept, S, shard_id) for shard_id in range(3)] == [W - S] * 3


def test_a_limit_is_taken_as_it_is_given():
    kept = with_budget(total=1000, remaining=900, reset_after=5.0)
    limits.adopt(kept, limit(total=2000, remaining=7, reset_after=60.0), S)
    assert limits.budget(kept, S) == Budget(2000, 7, MINUTE)


# --- clocks that are set --------------------------------------------------------------------------


@pytest.mark.parametrize("back_us", [1, S, W, DAY, 1000 * DAY])
def test_a_clock_set_back_costs_at_most_a_window(back_us):
    kept = account()
    granted(kept, 0)
    assert take(kept, -back_us) == Denial(W, Reason.WINDOW)
    assert take(kept, W - 1 - back_us) == Denial(1, Reason.WINDOW)
    granted(kept, W - back_us)


def test_a_clock_set_back_keeps_a_bucket_closed_for_a_minute_at_the_most():
    kept = account()
    closed_us = sum(row_of_rejections(kept, 6))
    assert wait(kept, closed_us - DAY) == MINUTE
    take(kept, closed_us - DAY)
    granted(kept, closed_us - DAY + MINUTE)


def test_a_clock_set_back_after_many_rejections_keeps_a_bucket_closed_for_15_minutes_at_the_most():
    kept = account()
    closed_us = sum(row_of_rejections(kept, 10))
    assert wait(kept, closed_us - DAY) == 15 * MINUTE


def test_a_clock_set_back_without_a_window_costs_nothing():
    kept = account(window_us=0)
    granted(kept, 0)
    granted(kept, -DAY)


@pytest.mark.parametrize("back_us", [1, S, DAY, 1000 * DAY])
def test_a_wall_clock_set_back_shows_a_reset_no_farther_than_it_ever_was(back_us):
    kept = with_budget(remaining=0, reset_after=100.0)
    assert limits.budget(kept, -back_us).resets_in_us == 100 * S
    assert take(kept, 0, wall_us=-back_us).wait_us == 100 * S


@pytest.mark.parametrize(("away_us", "back_us"), [(100 * S, DAY), (100 * S, S)])
def test_a_wall_clock_set_back_puts_a_reset_off_for_no_longer_than_it_ever_was_away(
    away_us, back_us
):
    kept = with_budget(remaining=0, reset_after=away_us / S)
    take(kept, 0, wall_us=-back_us)
    granted(kept, away_us, wall_us=away_us - back_us)


def test_a_clock_set_back_shows_no_bucket_closed_for_longer_than_it_is():
    kept = account()
    granted(kept, 0)
    shown_us = ready_in_us(kept, 0, -DAY)
    assert shown_us == wait(kept, -DAY) == W


# --- looking ahead --------------------------------------------------------------------------------


def outlook(ready_in_us, budget=None, reserve=0, window_us=W, period_us=DAY):
    return Outlook(
        now_us=0,
        window_us=window_us,
        period_us=period_us,
        reserve=reserve,
        max_concurrency=len(ready_in_us),
        ready_in_us=ready_in_us,
        others_ready_in_us=0,
        budget=budget,
        granted=0,
    )


def etas(ahead, number, lines):
    """When each place of a line is said to get its permit."""
    waiting = sum(lines.values())
    return [
        forecast.eta_us(ahead, number, before, len(lines), waiting)
        for before in range(lines[number])
    ]


def expected(ahead, number, lines):
    """When each place of a line gets its permit."""
    return [in_us for in_us, bucket in forecast.starts(ahead, lines) if bucket == number]


def etas_in_snapshot(ahead, lines):
    """What a snapshot says of each place, in seconds."""
    waiting = {
        number: [SimpleNamespace(shard_id=number, arrived_us=0)] * size
        for number, size in lines.items()
    }
    buckets = forecast.snapshot(ahead, waiting).buckets
    return {number: [shard.eta for shard in buckets[number].shards] for number in lines}


def test_permits_come_a_window_apart_from_when_their_bucket_is_ready():
    ahead = outlook({0: 3 * S})
    assert list(forecast.starts(ahead, {0: 3})) == [(3 * S, 0), (3 * S + W, 0), (3 * S + 2 * W, 0)]


def test_buckets_run_side_by_side():
    ahead = outlook({0: 0, 1: S, 2: 0})
    lines = {2: 1, 0: 2, 1: 2}
    assert list(forecast.starts(ahead, lines)) == [(0, 0), (0, 2), (S, 1), (W, 0), (S + W, 1)]


def test_buckets_that_were_not_used_are_ready_when_all_others_are():
    ahead = replace(outlook({0: 3 * S}), max_concurrency=3, others_ready_in_us=S)
    assert list(forecast.starts(ahead, {0: 1, 2: 1})) == [(S, 2), (3 * S, 0)]
    assert [bucket.ready_in for bucket in forecast.snapshot(ahead, {}).buckets] == [3.0, 1.0, 1.0]


def test_empty_lines_get_nothing():
    assert list(forecast.starts(outlook({0: 0, 1: 0}), {0: 0, 1: 1})) == [(0, 1)]
    assert list(forecast.starts(outlook({}), {})) == []


def test_all_wait_for_the_reset_once_the_budget_is_spent():
    ahead = outlook({0: 0, 1: S}, Budget(total=9, remaining=1, resets_in_us=MINUTE))
    coming = list(forecast.starts(ahead, {0: 2, 1: 1}))
    assert coming == [(0, 0), (MINUTE, 0), (MINUTE, 1)]


def test_the_next_period_is_counted_from_the_first_permit_after_the_reset():
    ahead = outlook({0: 0}, Budget(total=2, remaining=0, resets_in_us=S), period_us=MINUTE)
    coming = [in_us for in_us, _ in forecast.starts(ahead, {0: 5})]
    first = S
    second = first + MINUTE
    third = second + MINUTE
    assert coming == [first, first + W, second, second + W, third]


def test_the_reserve_stays_out_of_every_period():
    ahead = outlook({0: 0}, Budget(3, 3, 0), reserve=2, period_us=MINUTE)
    assert [in_us for in_us, _ in forecast.starts(ahead, {0: 3})] == [0, MINUTE, 2 * MINUTE]


def test_a_reserve_that_is_the_whole_budget_lets_nobody_go():
    ahead = outlook({0: 0}, Budget(total=3, remaining=1, resets_in_us=S), reserve=3)
    assert list(forecast.starts(ahead, {0: 2})) == []
    assert etas_in_snapshot(ahead, {0: 2}) == {0: [None, None]}
    assert etas(ahead, 0, {0: 2}) == [None, None]


def test_a_place_in_line_has_its_eta():
    assert etas(outlook({0: S, 1: 0}), 0, {0: 3, 1: 1}) == [S, S + W, S + 2 * W]


def test_an_eta_includes_the_wait_for_a_reset():
    ahead = outlook({0: 0, 1: 0}, Budget(total=9, remaining=2, resets_in_us=MINUTE))
    lines = {0: 3, 1: 3}
    for number in lines:
        assert etas(ahead, number, lines) == [0, MINUTE, MINUTE + W]


def test_the_eta_in_a_snapshot_includes_the_wait_for_a_reset_in_lines_of_any_length():
    ahead = outlook({0: 0, 1: 0}, Budget(total=9, remaining=1, resets_in_us=MINUTE))
    assert etas_in_snapshot(ahead, {0: 1, 1: 2}) == {0: [0.0], 1: [60.0, 65.25]}


def test_an_eta_leaves_the_reserve_alone():
    ahead = outlook({0: 0}, Budget(total=9, remaining=2, resets_in_us=MINUTE), reserve=1)
    assert etas(ahead, 0, {0: 2}) == [0, MINUTE]


@pytest.mark.parametrize(
    ("total", "remaining"), [(20, 0), (20, 4), (20, 6), (20, 20), (50, 50), (99, 50)]
)
def test_an_eta_is_exact_where_lines_are_equally_long(total, remaining):
    ahead = outlook({0: 0, 1: 0}, Budget(total, remaining, resets_in_us=MINUTE))
    lines = {0: 25, 1: 25}
    assert etas(ahead, 1, lines) == expected(ahead, 1, lines)


# --- whatever happens -----------------------------------------------------------------------------
#
# Small figures make many coincidences: windows of 1 or 10 µs, and resets about as far away.

STEPS = [
    *["take", "go"] * 4,
    *["advance", "restamp", "sent", "unused", "rejected", "adopt", "fail_to_refresh"],
]
LIMITS = [
    limit(total, remaining, reset_after_us / S, max_concurrency)
    for total, remaining, reset_after_us, max_concurrency in [
        *[(3, 3, 0, 1), (5, 0, 0, 1), (5, 4, 99, 1), (9, 9, 10, 1)],
        *[(3, 2, 11, 2), (5, 5, 0, 2), (9, 8, 60 * S, 2), (9, 0, 25, 2)],
        *[(3, 1, 100, 3), (9, 9, 0, 3), (5, 3, 1, 4), (9, 7, 5 * S, 4)],
    ]
]


class Life:
    """An account and a clock to which things happen, and a bookkeeper of its own who checks it.

    The bookkeeper keeps a plain list of all IDENTIFYs that may have gone out (for spacing), and
    counts each period's permits (for the budget).
    """

    def __init__(self, window_us, reserve):
        self.account = Account(window_us=window_us, period_us=10 * window_us, reserve=reserve)
        self.now_us = 0
        self.permits = []
        self.reported = {}
        self.layout = 0
        self.busy = []  # (layout, bucket, when, serial of its permit)
        self.total = self.left = self.ends_us = None
        self.charged = {}  # serial: the period it was charged to
        self.period = 0

    def happen(self, steps):
        """Let one thing after the other happen; what a figure means depends on the thing."""
        for name, figure in steps:
            getattr(self, name)(figure)
        return self

    def advance(self, figure):
        self.now_us += (0, 1, 2, 9, 10, 11, 20, 25, 99, 100, 101, MINUTE)[figure]

    def go(self, shard_id):
        """Wait for as long as a permit takes, and take it."""
        answer = self.take(shard_id)
        if isinstance(answer, Denial):
            self.now_us += answer.wait_us
            assert isinstance(self.take(shard_id), Permit)

    def take(self, shard_id):
        before = self.account.granted
        answer = take(self.account, self.now_us, shard_id)
        if isinstance(answer, Permit):
            assert answer.serial == self.account.granted == before + 1
            assert answer.bucket == shard_id % self.account.max_concurrency
            self.check_spacing(answer)
            self.charge(answer)
            self.permits.append(answer)
        else:
            assert self.account.granted == before
            assert answer.wait_us > 0
        return answer

    def check_spacing(self, permit):
        for layout, bucket, at_us, _ in self.busy:
            if layout < self.layout or bucket == permit.bucket:
                assert permit.stamp_us - at_us >= self.account.window_us
        self.busy.append((self.layout, permit.bucket, permit.stamp_us, permit.serial))

    def charge(self, permit):
        if self.total is None:
            assert permit.remaining is None
            return
        if self.ends_us is not None and self.now_us >= self.ends_us:
            self.left, self.ends_us = self.total, None
            self.period += 1
        assert self.left > self.account.reserve
        self.left -= 1
        if self.ends_us is None:
            self.ends_us = self.now_us + self.account.period_us
        assert permit.remaining == self.left
        self.charged[permit.serial] = self.period

    def report(self, figure, kind, after=()):
        """Find a permit that may be reported so: once, but a rejection may follow ``sent``."""
        if not self.permits:
            return None
        permit = self.permits[-1 - figure % min(3, len(self.permits))]
        if permit.serial in self.reported and self.reported[permit.serial] not in after:
            return None
        if kind is not None:
            self.reported[permit.serial] = kind
        return permit

    def restamp(self, _):
        permit = self.report(0, None)
        if permit is not None and token_bucket.restamp(self.account, permit, self.now_us):
            assert permit.stamp_us == self.now_us
            self.busy.append((self.layout, permit.bucket, self.now_us, permit.serial))

    def sent(self, figure):
        permit = self.report(figure, "sent")
        if permit is not None:
            token_bucket.sent(self.account, permit, self.now_us)
            bucket = permit.shard_id % self.account.max_concurrency
            self.busy.append((self.layout, bucket, self.now_us, permit.serial))

    def unused(self, figure):
        permit = self.report(figure, "unused")
        if permit is not None:
            token_bucket.unused(self.account, permit)
            self.busy = [entry for entry in self.busy if entry[3] != permit.serial]
            if self.total is not None and self.charged.get(permit.serial) == self.period:
                self.left += 1

    def rejected(self, figure):
        permit = self.report(figure, "rejected", after=("sent",))
        if permit is not None:
            token_bucket.rejected(self.account, permit, self.now_us)
            number = permit.shard_id % self.account.max_concurrency
            closed_us = ready_in_us(self.account, number, self.now_us)
            assert closed_us >= 2 * self.account.window_us

    def adopt(self, figure):
        new = LIMITS[figure]
        if new.max_concurrency != self.account.max_concurrency:
            self.layout += 1
        limits.adopt(self.account, new, self.now_us)
        self.period += 1
        self.total, self.left = new.total, new.remaining
        untouched = new.remaining == new.total and new.reset_after == 0
        self.ends_us = None if untouched else self.now_us + models.to_us(new.reset_after)

    def fail_to_refresh(self, _):
        self.account.refresh_owed = True

    def outlook(self):
        kept = self.account
        return Outlook(
            now_us=self.now_us,
            window_us=kept.window_us,
            period_us=kept.period_us,
            reserve=kept.reserve,
            max_concurrency=kept.max_concurrency,
            ready_in_us={
                number: ready_in_us(kept, number, self.now_us)
                for number in range(kept.max_concurrency)
            },
            others_ready_in_us=0,
            budget=limits.budget(kept, self.now_us),
            granted=kept.granted,
        )


SHARDS = st.integers(0, 11)
HAPPENINGS = st.lists(st.tuples(st.sampled_from(STEPS), SHARDS), min_size=12, max_size=40)
LIVES = st.builds(
    lambda window_us, reserve, steps: Life(window_us, reserve).happen(steps),
    st.sampled_from([1, 10, 40 * S]),
    st.integers(0, 2),
    HAPPENINGS,
)
SIZES = st.dictionaries(st.integers(0, 3), st.integers(0, 5))


def lines_of(life, sizes):
    return {n: size for n, size in sizes.items() if n < life.account.max_concurrency}


@given(LIVES)
def test_permits_of_a_bucket_are_a_window_apart_and_no_budget_is_overspent(life):
    """The bookkeeper checks each permit as it comes."""
    left = limits.budget(life.account, life.now_us)
    if life.total is None:
        assert left is None
    elif life.ends_us is None or life.now_us < life.ends_us:
        assert left.remaining == life.left
    else:
        assert left == Budget(life.total, life.total, 0)
    assert life.account.granted == len(life.permits)


@given(LIVES, SHARDS, st.data())
def test_a_denial_is_exact(life, shard_id, data):
    """Whoever asks before the promised instant is denied, whoever asks at it is granted."""
    promised_us = life.now_us + wait(life.account, life.now_us, shard_id)
    earlier = data.draw(st.lists(st.integers(life.now_us, max(life.now_us, promised_us - 1))))
    if promised_us > life.now_us:
        for at_us in sorted([*earlier, promised_us - 1]):
            kept = copy.deepcopy(life.account)
            denial = take(kept, at_us, shard_id)
            assert isinstance(denial, Denial)
            assert at_us + denial.wait_us == promised_us
    granted(life.account, promised_us, shard_id)


@given(LIVES, SHARDS)
def test_asking_in_vain_changes_nothing_to_be_seen(life, shard_id):
    before, granted_before = life.outlook(), life.account.granted
    if isinstance(life.take(shard_id), Denial):
        assert life.outlook() == before
        assert life.account.granted == granted_before


@given(LIVES, SHARDS)
def test_a_reset_is_told_of_instead_of_the_permit_that_would_come(life, shard_id):
    """So nobody reads the limit anew who could not go on at once if that fails."""
    kept = life.account
    due = kept.resets_at_us is not None and life.now_us >= kept.resets_at_us
    without = take(copy.deepcopy(kept), life.now_us, shard_id)
    answer = take(kept, life.now_us, shard_id, can_refresh=True)
    if isinstance(without, Permit) and kept.total is not None and (due or kept.refresh_owed):
        assert answer == Denial(0, Reason.RESET)
    else:
        assert shown(answer) == shown(without)


def shown(answer):
    """What tells one answer from another: permits are compared as objects."""
    if isinstance(answer, Permit):
        return repr(answer), answer.serial, answer.stamp_us, answer.period
    return answer


def drive(life, lines):
    """Let lines of these lengths take their permits from a copy, each as soon as it may."""
    kept, left, now_us, coming = copy.deepcopy(life.account), dict(lines), life.now_us, []
    while any(left.values()):
        waits = []
        for number in sorted(number for number, size in left.items() if size):
            answer = take(kept, now_us, number)
            if isinstance(answer, Permit):
                coming.append((now_us - life.now_us, number))
                left[number] -= 1
                waits.append(kept.window_us)
            else:
                waits.append(answer.wait_us)
        now_us += min(waits)
    return coming


@given(LIVES, SIZES)
def test_permits_come_exactly_when_they_are_foretold(life, sizes):
    lines = lines_of(life, sizes)
    assert list(forecast.starts(life.outlook(), lines)) == drive(life, lines)


@given(LIVES, SIZES)
def test_what_is_foretold_is_in_order_and_complete(life, sizes):
    lines = lines_of(life, sizes)
    coming = list(forecast.starts(life.outlook(), lines))
    assert coming == sorted(coming)
    for number, size in lines.items():
        times = [in_us for in_us, bucket in coming if bucket == number]
        assert len(times) == size
        assert all(b - a >= life.account.window_us for a, b in itertools.pairwise(times))


@given(LIVES, SIZES)
def test_the_eta_of_a_place_in_a_snapshot_is_when_its_permit_is_foretold(life, sizes):
    lines = lines_of(life, sizes)
    ahead = life.outlook()
    for number, shown_etas in etas_in_snapshot(ahead, lines).items():
        assert shown_etas == [in_us / S for in_us in expected(ahead, number, lines)]


@given(LIVES, SIZES)
def test_an_eta_is_exact_where_the_budget_lasts_and_else_no_earlier_than_the_windows(life, sizes):
    lines = {number: size for number, size in lines_of(life, sizes).items() if size}
    ahead = life.outlook()
    lasts = ahead.budget is None or sum(lines.values()) <= ahead.budget.remaining - ahead.reserve
    for number, size in lines.items():
        if lasts:
            assert etas(ahead, number, lines) == expected(ahead, number, lines)
        for before, eta_us in zip(range(size), etas(ahead, number, lines), strict=True):
            assert eta_us >= ahead.ready(number) + before * ahead.window_us


@given(LIVES, SHARDS, st.integers(1, 10 * DAY))
def test_no_clock_set_back_denies_for_longer_than_a_window_or_a_closure(life, shard_id, back_us):
    now_us = life.now_us - back_us
    wall_us = life.now_us + 100 * DAY  # so that the budget is no matter
    answer = take(life.account, now_us, shard_id, wall_us=wall_us)
    if isinstance(answer, Denial):
        rejections = max(bucket.rejections for bucket in life.account.buckets.values())
        closed = rejections or life.account.default_bucket.closed_until_us > token_bucket.NEVER
        longest_us = 15 * MINUTE if rejections >= MANY_REJECTIONS else MINUTE
        longest_us = (
            max(longest_us, 2 * life.account.window_us) if closed else life.account.window_us
        )
        assert 0 < answer.wait_us <= longest_us


# --- purity ---------------------------------------------------------------------------------------


def imports_of(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    return names


@pytest.mark.parametrize(
    ("module", "ours"),
    [
        (token_bucket, {"models"}),
        (limits, {"models", "token_bucket"}),
        (forecast, {"models", "limits", "token_bucket"}),
    ],
)
def test_the_rules_import_arithmetic_the_values_and_each_other_alone(module, ours):
    names = imports_of(module)
    found = {name for name in names if name.split(".")[0] == "gateway_queue_sync"}
    assert found == {f"gateway_queue_sync.{name}" for name in ours}
    arithmetic = {"__future__", "collections.abc", "dataclasses", "enum", "heapq", "itertools"}
    assert names - found <= arithmetic | {"typing"}


def test_the_values_import_no_module_of_ours():
    names = {name.split(".")[0] for name in imports_of(models)}
    assert names <= sys.stdlib_module_names
    assert not names & {"time", "os", "socket", "asyncio", "concurrent", "datetime"}


def test_the_values_know_of_threads_only_how_long_they_can_wait():
    tree = ast.parse(Path(models.__file__).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "threading"
    }
    assert used == {"TIMEOUT_MAX"}
