"""Reports on permits, and their effects."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import wait

import pytest
from accounts import InMemory
from clocks import Hooked
from processes import until
from test_interruptions import run_interrupted_everywhere
from test_waiting import in_line, limit, memory, shared

from gateway_queue_sync import (
    AcquireTimeout,
    PermitReported,
    Report,
    ShardGranted,
    ShardLeft,
    ShardWaiting,
)

WINDOW, MARGIN = 5.25, 0.25
ARGUMENTS = {"snapshot": [], "update": [limit()], "try_acquire": [1]}


@pytest.fixture
def queue(account, clock):
    return account.large(limit(10, 8, 600.0), clock=clock)


def another_process(account, queue, clock):
    """What may be called in an observer: with a shared account, its own queue's worker runs that."""
    return queue if isinstance(account, InMemory) else account.queue(clock=clock)


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


def test_from_the_tenth_rejection_in_a_row_the_bucket_closes_for_fifteen_minutes(
    account, clock, caplog
):
    """16 buckets that are rejected once a minute spend a day's limit in an hour."""
    queue = account.large(limit(1000, 1000, 0.0, max_concurrency=2), clock=clock)
    for turn in range(1, 13):
        queue.acquire(0).rejected()
        closed_for = ready_in(queue)
        assert closed_for <= 60 if turn < 10 else closed_for == 900
        until(lambda often=turn >= 10: len(warnings_in(caplog)) == often, "the warning")
        clock.advance(closed_for)
    assert "rejected 10 permits of bucket 0 in a row" in warnings_in(caplog)[0].getMessage()
    assert queue.acquire(1).waited == 0.0
    queue.acquire(0).sent()
    clock.advance(WINDOW)
    queue.acquire(0).rejected()
    assert ready_in(queue) == 2 * WINDOW


def test_a_permit_that_is_not_rejected_ends_the_row(queue, clock):
    queue.acquire(0).rejected()
    clock.advance(2 * WINDOW)
    queue.acquire(0)
    clock.advance(WINDOW)
    queue.acquire(0).rejected()
    assert ready_in(queue) == 2 * WINDOW


def test_a_rejection_that_comes_after_that_of_a_later_permit_closes_for_two_windows(queue, clock):
    """It is not counted: ledgers that processes share cannot tell it from one that is reported again."""
    earlier = queue.acquire(0)
    clock.advance(WINDOW)
    queue.acquire(0).rejected()
    clock.advance(WINDOW)
    earlier.rejected()
    assert ready_in(queue) == 2 * WINDOW
    clock.advance(2 * WINDOW)
    queue.acquire(0).rejected()
    assert ready_in(queue) == 4 * WINDOW


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


# --- interrupted reports --------------------------------------------------------------------------


def interrupt():
    raise KeyboardInterrupt


@memory
@pytest.mark.parametrize("report", list(Report))
def test_a_report_that_is_interrupted_under_the_lock_is_booked(account, clock, crew, report):
    """It was half done, and repeating it did nothing."""
    interrupted = 0
    for at in range(1, 8):
        hooked = Hooked(clock, interrupt)
        queue = account.large(limit(10, 1, 600.0), clock=hooked)
        permit = queue.acquire(0)
        (call,) = in_line(queue, crew, clock, [0])
        clock.advance(1)
        hooked.left, hooked.thread = at, threading.current_thread()
        try:
            getattr(permit, report.value)()
        except KeyboardInterrupt:
            interrupted += 1
        hooked.left = 0
        assert permit.reported is report
        if report is Report.UNUSED:
            assert call.now().remaining == 0
        else:
            assert ready_in(queue) == {Report.SENT: WINDOW, Report.REJECTED: 2 * WINDOW}[report]
        queue.close()
    assert interrupted


@memory
@pytest.mark.parametrize("report", list(Report))
def test_a_report_that_is_interrupted_anywhere_is_booked_or_can_be_repeated(
    account, clock, crew, report
):
    def prepare():
        nonlocal queue, permit, call
        queue = account.large(limit(10, 1, 600.0), clock=clock)
        permit = queue.acquire(0)
        (call,) = in_line(queue, crew, clock, [0])
        clock.advance(1)

    def check(result, injector):
        if permit.reported is None:
            getattr(permit, report.value)()
        if report is Report.UNUSED:
            assert call.now().remaining == 0, injector.where
        else:
            closed_for = {Report.SENT: WINDOW, Report.REJECTED: 2 * WINDOW}[report]
            assert ready_in(queue) == closed_for, injector.where
        queue.close()

    queue = permit = call = None

    def call_it():
        getattr(permit, report.value)()

    points = run_interrupted_everywhere(call_it, check, prepare)
    assert points > 4


# --- late permits ---------------------------------------------------------------------------------


LAST_READING = 20  # of the clock in an acquire: no call reads it more often without being late


class Stops(Hooked):
    """A clock at one of whose next readings the whole process is stopped for so many seconds."""

    def __init__(self, clock):
        super().__init__(clock, lambda: clock.advance(self.seconds))
        self.seconds = 0.0

    def stop(self, at, seconds):
        self.left, self.seconds = at, seconds


@pytest.mark.parametrize("at", range(1, LAST_READING))
def test_wherever_a_process_is_stopped_no_permit_comes_back_too_late(account, clock, crew, at):
    """Between the stamp and the return a process can be stopped for as long as it likes."""
    stops = Stops(clock)
    queue = account.large(limit(10, 10, 600.0), clock=stops)

    def acquire():
        permit = queue.acquire(0)
        returned_us, stops.left = clock.now_us(), 0
        return returned_us - permit.stamp_us

    stops.stop(at, 30)
    call = crew(acquire)
    while not call.done():
        crew.settle(clock)
        clock.advance(0 if call.done() else WINDOW)
    assert call.now() <= MARGIN * 1e6
    assert remaining(queue) == 9


@memory
def test_a_permit_that_came_back_too_late_is_given_back_and_asked_for_again(account, clock):
    again = 0
    for at in range(1, LAST_READING):
        stops = Stops(clock)
        queue = account.large(limit(10, 10, 600.0), clock=stops)
        stops.stop(at, 30)
        permit = queue.acquire(0)
        assert remaining(queue) == 9
        if queue.snapshot().granted == 2:
            assert permit.waited == 30.0
            again += 1
    assert again


@pytest.mark.parametrize("at", range(1, LAST_READING, 2))
def test_a_permit_that_is_given_back_keeps_its_position(account, clock, crew, at):
    stops = Stops(clock)
    queue = account.large(limit(10, 10, 600.0), clock=stops)
    queue.acquire(9)
    in_line(queue, crew, clock, [1, 2])
    future = queue.enqueue(3)
    future.add_done_callback(lambda future: crew.returned.append(future.result()))
    clock.settle(2)
    stops.stop(at, 1)
    while not future.done():
        crew.settle(clock)
        clock.advance(WINDOW)
    crew.join()
    assert [permit.shard_id for permit in crew.returned] == [1, 2, 3]
    stops.left = 0
    assert remaining(queue) == 6


@memory
def test_who_was_given_no_line_keeps_its_position_too(account, clock, crew):
    """A free bucket's permit that came too late: others have joined meanwhile."""
    others = []

    def observer(event):
        if isinstance(event, ShardGranted) and not others:
            clock.advance(0.001)
            others.append(crew(queue.acquire, 2))
            clock.settle(1)
            clock.advance(1)

    queue = account.local(clock=clock, observer=observer)
    first = crew(queue.acquire, 1)
    until(lambda: others, "the observer")
    crew.settle(clock)
    clock.advance(WINDOW)
    crew.join()
    assert [permit.shard_id for permit in crew.returned] == [1, 2]
    assert first.now().waited == 1.001


@pytest.mark.accounts("memory", "sqlite")
def test_a_deadline_counts_when_permits_come_too_late(account, clock):
    caller = threading.current_thread()

    class Slow:
        """A machine so slow that a second passes whenever the caller's thread reads its clock."""

        left = 0  # readings that it is so slow for; in the end it recovers

        def __getattr__(self, name):
            return getattr(clock, name)

        def now_us(self):
            if self.left and threading.current_thread() is caller:
                self.left -= 1
                clock.advance(1)
            return clock.now_us()

    slow = Slow()
    queue = account.large(limit(10, 10, 600.0), clock=slow)
    slow.left = 500
    with pytest.raises(AcquireTimeout):
        queue.acquire(0, timeout=10)
    slow.left = 0
    assert (ready_in(queue), remaining(queue)) == (0.0, 10)


@memory
@pytest.mark.parametrize("at", range(1, LAST_READING))
def test_a_future_that_is_cancelled_at_any_moment_costs_nothing_or_has_its_permit(
    account, clock, at
):
    futures, said = [], []
    hooked = Hooked(clock, lambda: said.append(futures[0].cancel()))
    queue = account.large(limit(10, 10, 600.0), clock=hooked)
    queue.acquire(9)
    futures.append(queue.enqueue(0))
    clock.settle(0)
    hooked.left = at
    clock.advance(WINDOW)
    wait(futures, 10)
    clock.settle(0)
    hooked.left = 0
    for thread in threading.enumerate():
        if thread.name == "gateway-queue-cancel":
            thread.join(10)
    assert futures[0].cancelled() == (said == [True])
    assert remaining(queue) == (9 if futures[0].cancelled() else 8)
    assert queue.snapshot().waiting == 0


@memory
def test_without_a_margin_the_promise_is_made_at_the_stamp(account, clock):
    queue = account.local(margin=0, clock=clock, observer=lambda event: clock.advance(1))
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
    events = []
    queue = account.local(clock=clock, observer=events.append)
    assert queue.enqueue(3).result(10).shard_id == 3
    assert [(event.shard_id, event.waited) for event in events] == [(3, 0.0)]
    assert queue.snapshot().waiting == 0


def test_whose_permit_is_being_told_of_waits_no_more(account, clock, crew):
    seen = []

    def observer(event):
        if isinstance(event, ShardGranted):
            seen.append(other.snapshot())

    with account.local(clock=clock, observer=observer) as queue:
        other = another_process(account, queue, clock)
        queue.acquire(0)
        assert (seen[0].waiting, seen[0].granted) == (0, 1)
        (call,) = in_line(queue, crew, clock, [1])
        in_line(queue, crew, clock, [2])
        clock.advance(WINDOW)
        call.now()
        assert [shard.shard_id for shard in seen[1].buckets[0].shards] == [2]
        assert seen[1].buckets[0].shards[0].eta == WINDOW


@memory
def test_a_waiter_whose_permit_was_voided_stands_in_its_line_once(account, clock, crew):
    events = []

    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 2 and not events:
            events.append(event)
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
    events = []

    def observer(event):
        if isinstance(event, ShardGranted):
            events.append(event.shard_id)
            clock.advance(2 * WINDOW)

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [1, 2, 3])
    for left, call in zip((2, 1, 0), calls, strict=True):
        clock.settle(left + 1)
        clock.advance(WINDOW)
        call.now()
    assert events == [0, 1, 2, 3]
    assert queue.snapshot().granted >= 4  # one that got too late is given back and granted again


def test_new_buckets_laid_out_while_an_observer_is_told_void_the_permit(account, clock):
    events = []

    def observer(event):
        if isinstance(event, ShardGranted) and not events:
            other.update(limit(max_concurrency=4))
            clock.advance(WINDOW)
        events.append(event)

    queue = account.local(clock=clock, observer=observer)
    other = another_process(account, queue, clock)
    permit = queue.acquire(5)
    assert permit.bucket == 1
    assert queue.snapshot().granted == 2


@memory
@pytest.mark.parametrize("call", ["snapshot", "update"])
def test_an_observer_may_call_the_queue(account, clock, caplog, call):
    def observer(event):
        if isinstance(event, ShardGranted):
            getattr(queue, call)(*ARGUMENTS[call])

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(0)
    assert not caplog.records


@shared
@pytest.mark.parametrize("call", ["snapshot", "update", "try_acquire"])
def test_an_observer_must_not_wait_for_the_worker_that_calls_it(account, clock, call):
    errors = []

    def observer(event):
        if isinstance(event, ShardGranted):
            with pytest.raises(RuntimeError, match=r"inside another call|must not block") as caught:
                getattr(queue, call)(*ARGUMENTS[call])
            errors.append(caught.value)

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(0)
    assert len(errors) == 1
    assert queue.snapshot().granted == 1
