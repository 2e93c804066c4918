"""What holders report of their permits, and what that changes."""

from __future__ import annotations

import logging
import time

import pytest
from test_waiting import in_line, limit, memory

from gateway_queue_sync import (
    AcquireTimeout,
    PermitReported,
    Report,
    ShardGranted,
    ShardLeft,
    ShardWaiting,
)

WINDOW = 5.25


@pytest.fixture
def queue(account, clock):
    return account.large(limit(10, 8, 600.0), clock=clock)


def ready_in(queue):
    return queue.snapshot().buckets[0].ready_in


def remaining(queue):
    return queue.snapshot().limit.remaining


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelno == logging.WARNING]


# --- sent -----------------------------------------------------------------------------------------


def test_leaving_the_with_moves_the_window_to_now(queue, clock):
    with queue.acquire(0) as permit:
        clock.advance(2)
    assert ready_in(queue) == WINDOW
    assert permit.reported is Report.SENT


def test_leaving_it_by_an_exception_counts_as_sent(queue, clock):
    def connect():
        with queue.acquire(0):
            clock.advance(2)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        connect()
    assert ready_in(queue) == WINDOW
    assert remaining(queue) == 7


def test_who_waits_sleeps_on_when_the_window_moves(queue, clock, crew):
    permit = queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1])
    clock.advance(2)
    permit.sent()
    clock.advance(WINDOW - 2)
    clock.settle(1)
    assert not call.done()
    clock.advance(2)
    call.now()


def test_a_late_report_still_moves_the_window(queue, clock):
    """A connect that took long: the grant is used only now, after the bucket has granted again."""
    slow = queue.acquire(0)
    clock.advance(WINDOW)
    queue.acquire(1)
    clock.advance(1)
    slow.sent()
    assert ready_in(queue) == WINDOW


def test_a_repeated_report_changes_nothing(queue, clock, caplog):
    permit = queue.acquire(0)
    permit.sent()
    clock.advance(1)
    permit.sent()
    assert ready_in(queue) == WINDOW - 1
    permit = queue.try_acquire(0)
    clock.advance(WINDOW)
    permit = queue.acquire(0)
    permit.unused()
    permit.unused()
    assert remaining(queue) == 7
    assert not warnings_in(caplog)


# --- unused ---------------------------------------------------------------------------------------


def test_an_unused_permit_costs_nothing(queue, clock):
    queue.acquire(0).unused()
    assert (ready_in(queue), remaining(queue)) == (0.0, 8)
    assert queue.snapshot().granted == 1  # which never falls


def test_an_unused_permit_goes_to_the_next_at_once(queue, clock, crew):
    permit = queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1])
    permit.unused()
    assert call.now().waited == 0.0


def test_an_unused_permit_frees_no_window_that_is_another_ones(queue, clock):
    permit = queue.acquire(0)
    clock.advance(WINDOW)
    queue.acquire(1)
    permit.unused()
    assert (ready_in(queue), remaining(queue)) == (WINDOW, 7)


def test_a_refund_releases_those_who_wait_for_the_budget(account, clock, crew):
    queue = account.large(limit(10, 1, 600.0, max_concurrency=2), clock=clock)
    permit = queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1])
    permit.unused()
    assert call.now().remaining == 0


def test_no_refund_reaches_into_another_period(queue, clock):
    permit = queue.acquire(0)
    clock.advance(600)
    queue.acquire(1)
    permit.unused()
    assert remaining(queue) == 9


def test_unused_in_a_with_is_not_contradicted_by_leaving_it(queue, caplog):
    with queue.acquire(0) as permit:
        permit.unused()
    assert remaining(queue) == 8
    assert not warnings_in(caplog)


# --- rejected -------------------------------------------------------------------------------------


def test_rejections_in_a_row_close_the_bucket_for_longer_and_longer(account, clock):
    queue = account.large(limit(100, 100, 0.0), clock=clock)
    for windows in (2, 4, 8):
        permit = queue.acquire(0)
        permit.sent()
        permit.rejected()
        assert ready_in(queue) == windows * WINDOW
        clock.advance(windows * WINDOW)
    for _ in range(3):
        queue.acquire(0).rejected()
        assert ready_in(queue) == 60.0
        clock.advance(60)


def test_a_permit_that_is_not_rejected_ends_the_row(queue, clock):
    queue.acquire(0).rejected()
    clock.advance(2 * WINDOW)
    queue.acquire(0)
    clock.advance(WINDOW)
    queue.acquire(0).rejected()
    assert ready_in(queue) == 2 * WINDOW


def test_a_rejection_costs_its_budget_and_no_other_bucket(account, clock):
    queue = account.large(limit(10, 10, 600.0, max_concurrency=2), clock=clock)
    queue.acquire(0).rejected()
    assert remaining(queue) == 9
    assert queue.acquire(1).waited == 0.0


@memory
def test_a_rejection_closes_for_two_windows_even_if_these_are_longer_than_a_minute(account, clock):
    queue = account.local(interval=100, margin=0, clock=clock)
    queue.acquire(0).rejected()
    assert ready_in(queue) == 200.0


@pytest.mark.parametrize(
    ("first", "second"),
    [("sent", "unused"), ("unused", "sent"), ("unused", "rejected"), ("rejected", "unused")],
)
def test_a_contradiction_changes_nothing_and_warns(queue, clock, caplog, first, second):
    permit = queue.acquire(0)
    getattr(permit, first)()
    before = (ready_in(queue), remaining(queue))
    getattr(permit, second)()
    assert (ready_in(queue), remaining(queue)) == before
    (record,) = warnings_in(caplog)
    assert second in record.getMessage()


def test_sent_after_rejected_is_no_contradiction(queue, clock, caplog):
    permit = queue.acquire(0)
    permit.rejected()
    permit.sent()
    assert ready_in(queue) == 2 * WINDOW
    assert not warnings_in(caplog)


@pytest.mark.parametrize("report", ["sent", "unused", "rejected"])
def test_reports_after_close_are_harmless(queue, report):
    permit = queue.acquire(0)
    queue.close()
    getattr(permit, report)()


def test_reports_reach_the_bucket_the_shard_is_in_now(account, clock):
    queue = account.large(limit(max_concurrency=2), clock=clock)
    permit = queue.acquire(5)
    queue.update(limit(max_concurrency=8))
    clock.advance(WINDOW)
    permit.sent()
    ready = [bucket.ready_in for bucket in queue.snapshot().buckets]
    assert ready == [0, 0, 0, 0, 0, WINDOW, 0, 0]
    permit.rejected()
    assert queue.snapshot().buckets[5].ready_in == 2 * WINDOW


# --- late permits ---------------------------------------------------------------------------------


def stopped(queue, clock, monkeypatch, *stops):
    """Stop the process for so many seconds between each stamp and its return; then no more."""
    is_in_time, left = queue._is_in_time, list(stops)

    def after_the_stop(grant):
        clock.advance(left.pop(0) if left else 0)
        return is_in_time(grant)

    monkeypatch.setattr(queue, "_is_in_time", after_the_stop)


def test_a_permit_that_came_back_too_late_is_given_back_and_asked_for_again(
    account, clock, monkeypatch
):
    """Between the stamp and the return a process can be stopped for as long as it likes."""
    queue = account.large(limit(10, 10, 600.0), clock=clock)
    stopped(queue, clock, monkeypatch, 30, 30)
    permit = queue.acquire(0)
    assert permit.waited == 60.0
    assert (ready_in(queue), remaining(queue), queue.snapshot().granted) == (WINDOW, 9, 3)


def test_a_permit_that_is_given_back_keeps_its_place(account, clock, crew, monkeypatch):
    queue = account.large(limit(10, 10, 600.0), clock=clock)
    queue.acquire(9)
    calls = in_line(queue, crew, clock, [1, 2])
    future = queue.enqueue(3)
    clock.settle(3)
    stopped(queue, clock, monkeypatch, 1, 0, 0, 1, 0)
    for outcome, parked in ((calls[0], 2), (calls[1], 1)):
        clock.advance(WINDOW)
        outcome.now()
        clock.settle(parked)
    clock.advance(WINDOW)
    assert future.result(10).shard_id == 3
    assert [permit.shard_id for permit in crew.returned] == [1, 2]
    assert remaining(queue) == 6


@memory
def test_a_permit_that_is_given_back_on_the_fast_path_keeps_its_place_too(
    account, clock, crew, monkeypatch
):
    queue = account.local(clock=clock)
    others = []

    def while_stopped(grant):
        if not others:
            monkeypatch.undo()
            clock.advance(0.001)
            others.append(crew(queue.acquire, 2))
            clock.settle(1)
            clock.advance(1)
        return bool(clock.now_us() - grant.stamp_us <= 250_000)

    monkeypatch.setattr(queue, "_is_in_time", while_stopped)
    assert queue.acquire(1).waited == 1.001
    clock.settle(1)
    clock.advance(WINDOW)
    assert others[0].now().shard_id == 2


def test_a_deadline_counts_when_permits_come_too_late(account, clock, monkeypatch):
    queue = account.large(limit(10, 10, 600.0), clock=clock)
    stopped(queue, clock, monkeypatch, *[3] * 50)
    with pytest.raises(AcquireTimeout):
        queue.acquire(0, timeout=10)
    assert (ready_in(queue), remaining(queue)) == (0.0, 10)


def test_a_future_whose_permit_came_too_late_can_still_be_cancelled(account, clock, monkeypatch):
    queue = account.large(limit(10, 1, 600.0), clock=clock)
    permit = queue.acquire(9)
    future = queue.enqueue(0)
    clock.settle(1)
    stopped(queue, clock, monkeypatch, 700)
    permit.unused()
    assert future.result(10).remaining == 9  # asked for again after the reset
    later = queue.enqueue(1)
    assert later.cancel()


@memory
def test_without_a_margin_the_promise_is_made_at_the_stamp(account, clock, monkeypatch):
    queue = account.local(margin=0, clock=clock)
    stopped(queue, clock, monkeypatch, 1)
    queue.acquire(0)
    assert ready_in(queue) == 4.0


# --- observers ------------------------------------------------------------------------------------


def test_an_observer_hears_all_of_a_shards_story(account, clock, crew):
    heard = []
    queue = account.large(limit(10, 10, 600.0), clock=clock, observer=heard.append)
    with queue.acquire(0):
        pass
    (call,) = in_line(queue, crew, clock, [1], timeout=1.0)
    clock.advance(1)
    assert call.exception(10)
    assert queue.try_acquire(2) is None
    assert heard == [
        ShardGranted(0, 0, 0.0, 9),
        PermitReported(0, 0, Report.SENT),
        ShardWaiting(1, 0, 0, WINDOW),
        ShardLeft(1, 1.0, "timeout"),
    ]


def test_an_observer_that_raises_is_logged_and_survived(account, clock, caplog):
    def observer(event):
        raise ZeroDivisionError

    queue = account.local(clock=clock, observer=observer)
    with queue.acquire(0):
        pass
    assert "an observer raised on ShardGranted" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_slow_observer_costs_nobody_spacing(account, clock):
    """What it takes is no part of the next one's gap, and no reason to give the permit back."""
    queue = account.local(clock=clock, observer=lambda event: clock.advance(3))
    queue.acquire(0)
    assert ready_in(queue) == WINDOW


def test_a_free_bucket_makes_a_finished_future_where_somebody_observes_too(account, clock):
    told = []
    queue = account.local(clock=clock, observer=told.append)
    assert queue.enqueue(3).done()
    assert [(event.shard_id, event.waited) for event in told] == [(3, 0.0)]
    assert queue.snapshot().waiting == 0


def test_whose_permit_is_being_told_of_waits_no_more(account, clock, crew):
    seen = []

    def observer(event):
        if isinstance(event, ShardGranted):
            seen.append(queue.snapshot())

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(0)
    assert (seen[0].waiting, seen[0].granted) == (0, 1)
    (call,) = in_line(queue, crew, clock, [1])
    in_line(queue, crew, clock, [2])
    clock.advance(WINDOW)
    call.now()
    assert [shard.shard_id for shard in seen[1].buckets[0].shards] == [2]
    assert seen[1].buckets[0].shards[0].eta == WINDOW
    queue.close()


@memory
def test_a_ticket_whose_permit_was_voided_stands_in_its_line_once(account, clock, crew):
    told = []

    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 2 and not told:
            told.append(event)
            in_line(queue, crew, clock, [4], priority=100.0)
            queue.update(limit(max_concurrency=2))

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [2])
    clock.advance(WINDOW)
    clock.settle(2)
    assert queue.snapshot().waiting == 2
    assert [shard.shard_id for shard in queue.snapshot().buckets[0].shards] == [4, 2]
    clock.advance(WINDOW)
    clock.settle(1)
    clock.advance(WINDOW)
    assert calls[0].now().shard_id == 2
    assert queue.snapshot().waiting == 0
    assert not queue._lines.by_bucket


def test_settling_waits_for_those_who_tell_their_observer(account, clock, crew):
    """Else the clock could be moved between a grant and its stamp."""

    def observer(event):
        time.sleep(0.02)

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [1, 2, 3])
    for left, call in zip((2, 1, 0), calls, strict=True):
        clock.advance(WINDOW)
        clock.settle(left)
        assert call.now()
    assert [call.now().waited for call in calls] == [WINDOW, 2 * WINDOW, 3 * WINDOW]


@memory
def test_an_observer_slower_than_the_window_holds_up_its_line_and_nobody_for_ever(
    account, clock, crew
):
    told = []

    def observer(event):
        if isinstance(event, ShardGranted):
            told.append(event.shard_id)
            clock.advance(2 * WINDOW)

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [1, 2, 3])
    for left, call in zip((2, 1, 0), calls, strict=True):
        clock.settle(left + 1)
        clock.advance(WINDOW)
        call.now()
    assert told == [0, 1, 2, 3]
    assert queue.snapshot().granted == 4


def test_new_buckets_laid_out_while_an_observer_is_told_void_the_permit(account, clock):
    told = []

    def observer(event):
        if isinstance(event, ShardGranted) and not told:
            queue.update(limit(max_concurrency=4))
            clock.advance(WINDOW)
        told.append(event)

    queue = account.local(clock=clock, observer=observer)
    permit = queue.acquire(5)
    assert permit.bucket == 1
    assert queue.snapshot().granted == 2


def test_an_observer_may_look_at_the_queue(account, clock):
    queue = account.local(clock=clock, observer=lambda event: queue.snapshot())
    queue.acquire(0)
    assert queue.snapshot().granted == 1
