"""The session start limit: charged at the grant, hard, renewed at its reset, updated while they wait."""

from __future__ import annotations

import logging
import threading

import pytest
from test_waiting import in_line, limit, memory, order

from gateway_queue_sync import (
    AcquireTimeout,
    BudgetExhausted,
    LimitUpdated,
    SessionLimitExhausted,
)

WINDOW = 5.25
DAY = 86_400.0


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelno == logging.WARNING]


def spent(account, clock, *, total=10, remaining=0, reset_after=100.0, **settings):
    return account.large(limit(total, remaining, reset_after), clock=clock, **settings)


# --- charging -------------------------------------------------------------------------------------


def test_each_permit_is_charged_and_tells_what_is_left(account, clock):
    queue = account.large(limit(10, 3, 60.0, max_concurrency=3), clock=clock)
    assert [queue.acquire(shard).remaining for shard in range(3)] == [2, 1, 0]
    assert queue.snapshot().limit.remaining == 0


def test_waiting_costs_no_budget(account, clock, crew):
    """The day's permit was spent before the bucket's line, so a cancelled waiter burnt it."""
    queue = account.large(limit(10, 5, 600.0), clock=clock)
    queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1], timeout=1.0)
    future = queue.enqueue(2)
    assert queue.snapshot().limit.remaining == 4
    clock.settle(2)
    clock.advance(1)
    with pytest.raises(AcquireTimeout):
        call.now()
    future.cancel()
    assert queue.snapshot().limit.remaining == 4


def test_the_budget_is_hard(account, clock, crew):
    queue = account.large(limit(3, 2, 600.0, max_concurrency=16), clock=clock)
    queue.acquire(0)
    queue.acquire(1)
    calls = in_line(queue, crew, clock, [2, 3, 4])
    clock.advance(599.999_999)
    clock.settle(3)
    assert queue.snapshot().granted == 2
    clock.advance(0.000_001)
    for call in calls:
        call.now()
    assert queue.snapshot().limit.remaining == 0


def test_a_bucket_without_a_line_takes_what_is_left(account, clock, crew):
    """With the last permit spent by bucket 0, everything stalled although bucket 1 was empty."""
    queue = account.large(limit(10, 2, 600.0, max_concurrency=2), clock=clock)
    queue.acquire(0)
    (waits,) = in_line(queue, crew, clock, [2])
    assert queue.acquire(1).remaining == 0
    clock.advance(600)
    waits.now()


def test_the_reserve_is_never_used(account, clock, crew):
    queue = account.large(limit(10, 4, 60.0, max_concurrency=16), reserve=2, clock=clock)
    queue.acquire(0)
    assert queue.acquire(1).remaining == 2
    (call,) = in_line(queue, crew, clock, [2])
    clock.advance(60)
    assert call.now().remaining == 9


# --- used up --------------------------------------------------------------------------------------


def test_one_warning_says_until_when(account, clock, crew, caplog, freezer):
    freezer.move_to("2026-11-23 23:58:00")
    queue = spent(account, clock, reset_after=300.0)
    in_line(queue, crew, clock, [0, 1, 2])
    queue.try_acquire(3)
    (record,) = warnings_in(caplog)
    assert "(0 left, reserve 0)" in record.getMessage()
    assert record.getMessage().endswith("it resets, in 5 min 0 s (2026-11-24 00:03:00)")
    queue.close()


def test_each_exhaustion_is_warned_of(account, clock, crew, caplog):
    queue = spent(account, clock, total=1, reset_after=100.0)
    calls = in_line(queue, crew, clock, [0, 1])
    clock.advance(100)
    calls[0].now()
    clock.settle(1)
    clock.advance(WINDOW)
    clock.settle(1)
    assert len(warnings_in(caplog)) == 2
    queue.close()


def test_raising_says_what_is_left_and_when_it_resets(account, clock):
    queue = spent(account, clock, remaining=2, reserve=2, when_exhausted="raise")
    for call in (queue.acquire, queue.try_acquire):
        with pytest.raises(SessionLimitExhausted) as caught:
            call(0)
        assert (caught.value.remaining, caught.value.resets_in) == (2, 100.0)
    future = queue.enqueue(0)
    assert isinstance(future.exception(10), SessionLimitExhausted)
    assert queue.snapshot().waiting == 0
    clock.advance(100)
    assert queue.acquire(0).remaining == 9


def test_who_reaches_the_front_of_a_used_up_budget_gets_the_error(account, clock, crew):
    queue = account.large(limit(10, 2, 600.0), when_exhausted="raise", clock=clock)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [1, 2, 3])
    clock.advance(WINDOW)
    assert calls[0].now().remaining == 0
    for call in calls[1:]:
        assert isinstance(call.exception(10), SessionLimitExhausted)


def test_a_timeout_includes_the_wait_for_the_reset_in_its_eta(account, clock, crew):
    queue = spent(account, clock)
    (call,) = in_line(queue, crew, clock, [0], timeout=10.0)
    clock.advance(10)
    with pytest.raises(AcquireTimeout) as caught:
        call.now()
    assert caught.value.eta == 90.0


def test_etas_include_the_wait_for_a_reset(account, clock, crew):
    queue = account.large(limit(2, 2, 600.0), clock=clock)
    queue.acquire(0)
    in_line(queue, crew, clock, [1, 2, 3, 4])
    etas = [shard.eta for shard in queue.snapshot().buckets[0].shards]
    assert etas == [WINDOW, 600.0, 600.0 + WINDOW, 600.0 + DAY]
    queue.close()


# --- update ---------------------------------------------------------------------------------------


def test_an_update_releases_those_who_wait_for_the_budget_at_once(account, clock, crew):
    """With remaining=0, an update to 1000 did not release the waiter until the old reset."""
    queue = spent(account, clock)
    (call,) = in_line(queue, crew, clock, [0])
    queue.update(limit(1000, 1000, DAY))
    assert call.now().remaining == 999


@memory
def test_an_update_gives_a_local_queue_a_budget_and_buckets(account, clock):
    queue = account.local(clock=clock)
    assert queue.snapshot().limit is None
    queue.update(limit(10, 5, 60.0, max_concurrency=2))
    assert [queue.acquire(shard).remaining for shard in (0, 1)] == [4, 3]


def test_an_update_puts_everybody_in_their_new_line_in_their_order(account, clock, crew):
    queue = account.large(limit(max_concurrency=2), clock=clock)
    queue.acquire(0)
    queue.acquire(1)
    in_line(queue, crew, clock, [2, 3, 5, 4, 7, 9])
    queue.update(limit(max_concurrency=4))
    seen = queue.snapshot()
    assert [order(seen, bucket) for bucket in range(4)] == [[4], [5, 9], [2], [3, 7]]
    queue.close()


def test_new_buckets_start_from_the_latest_grant_of_any_old_one(account, clock):
    """Changing the concurrency forgot the windows that were spent."""
    queue = account.large(limit(max_concurrency=4), clock=clock)
    queue.acquire(0)
    clock.advance(3)
    queue.acquire(2)
    clock.advance(1)
    queue.update(limit(max_concurrency=16))
    assert {bucket.ready_in for bucket in queue.snapshot().buckets} == {WINDOW - 1}
    assert queue.try_acquire(7) is None
    clock.advance(WINDOW - 1)
    assert queue.try_acquire(7) is not None


def test_many_updates_while_they_wait_lose_nobody(account, clock, crew):
    """One with max_concurrency 0 killed the runner for good: here it cannot even be made."""
    queue = account.large(limit(), clock=clock)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, range(8))
    with pytest.raises(ValueError, match="max_concurrency must be at least 1, not 0"):
        limit(max_concurrency=0)
    for count in (4, 1, 16, 3, 8):
        queue.update(limit(max_concurrency=count))
    clock.advance(WINDOW)
    assert sorted(call.now().bucket for call in calls) == list(range(8))


@pytest.mark.parametrize("nonsense", [None, 5, {"total": 5}])
def test_an_update_with_something_else_is_refused(account, clock, nonsense):
    queue = account.large(limit(7, 7), clock=clock)
    with pytest.raises(TypeError, match="SessionStartLimit"):
        queue.update(nonsense)
    assert queue.snapshot().limit.total == 7


def test_a_reserve_that_is_not_less_than_the_total_is_refused(account, clock):
    with pytest.raises(ValueError, match=r"total \(10\) must be more than the reserve \(10\)"):
        account.large(limit(10, 10), reserve=10, clock=clock)
    queue = account.large(limit(10, 10), reserve=5, clock=clock)
    with pytest.raises(ValueError, match=r"the reserve \(5\)"):
        queue.update(limit(5, 5))
    assert queue.snapshot().limit.total == 10


# --- resets ---------------------------------------------------------------------------------------


def test_a_reset_that_is_due_shows_as_done_and_the_period_starts_at_the_next_grant(account, clock):
    queue = spent(account, clock, total=10, remaining=3, period=1000.0)
    clock.advance(500)
    seen = queue.snapshot().limit
    assert (seen.remaining, seen.resets_in) == (10, 0.0)
    assert queue.acquire(0).remaining == 9
    assert queue.snapshot().limit.resets_in == 1000.0


class Answers:
    """A refresh that answers from a list; an exception in it is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    def __call__(self):
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_limit_is_read_anew_once_at_each_reset(account, clock):
    refresh = Answers(limit(20, 15, DAY), limit(30, 30, DAY))
    queue = spent(account, clock, remaining=5, refresh=refresh)
    queue.acquire(0)
    assert refresh.asked == 0
    clock.advance(100)
    assert queue.acquire(1).remaining == 14
    clock.advance(WINDOW)
    queue.acquire(2)
    assert refresh.asked == 1
    clock.advance(DAY)
    assert queue.acquire(3).remaining == 29
    assert refresh.asked == 2


def test_a_refresh_that_fails_lets_the_last_total_count_and_is_asked_again(account, clock, caplog):
    refresh = Answers(OSError("no route"), ValueError("nonsense"), limit(50, 40, DAY))
    queue = spent(account, clock, refresh=refresh)
    clock.advance(100)
    assert queue.acquire(0).remaining == 9
    assert "OSError: no route" in warnings_in(caplog)[0].getMessage()
    clock.advance(WINDOW)
    assert queue.acquire(1).remaining == 8
    clock.advance(WINDOW)
    assert queue.acquire(2).remaining == 39
    clock.advance(WINDOW)
    assert queue.acquire(3).remaining == 38
    assert refresh.asked == 3
    assert len(warnings_in(caplog)) == 2


@pytest.mark.parametrize("nonsense", [None, 17, limit(5, 5)])
def test_a_refresh_that_returns_nonsense_has_failed(account, clock, caplog, nonsense):
    queue = spent(account, clock, total=20, refresh=lambda: nonsense, reserve=5)
    clock.advance(100)
    assert queue.acquire(0).remaining == 19
    assert "could not read the session start limit" in warnings_in(caplog)[0].getMessage()


def test_an_exhausted_answer_is_waited_for_and_asked_for_again_a_second_later(account, clock, crew):
    refresh = Answers(limit(10, 0, 0.0), limit(10, 0, 50.0), limit(10, 10, 0.0))
    queue = spent(account, clock, refresh=refresh)
    (call,) = in_line(queue, crew, clock, [0])
    for pause, asked in ((100.0, 1), (1.0, 2), (50.0, 3)):
        assert clock.next_in == pause
        clock.advance(pause)
        clock.settle(1 if asked < 3 else 0)
        assert refresh.asked == asked
    assert call.now().remaining == 9


def test_a_refresh_with_other_buckets_puts_everybody_in_their_new_line(account, clock, crew):
    queue = spent(account, clock, refresh=Answers(limit(10, 10, DAY, max_concurrency=4)))
    calls = in_line(queue, crew, clock, range(4))
    clock.advance(100)
    assert [call.now().bucket for call in calls] == [0, 1, 2, 3]


def test_one_thread_reads_the_limit_and_the_others_wait_for_it(account, clock, crew):
    entered, leave = Gate(), Gate()

    def refresh():
        entered.open()
        leave.wait()
        return limit(10, 10, DAY, max_concurrency=3)

    queue = account.large(limit(10, 0, 100.0, max_concurrency=3), refresh=refresh, clock=clock)
    calls = in_line(queue, crew, clock, range(3))
    clock.advance(100)
    entered.wait()
    clock.settle(2)
    assert clock.next_in is None  # the other two are woken when the answer is there
    late = crew(queue.acquire, 5, timeout=0)
    assert isinstance(late.exception(10), AcquireTimeout)
    leave.open()
    for call in calls:
        call.now()


def test_an_update_is_newer_than_an_answer_that_is_on_its_way(account, clock, crew):
    """The late answer, taken as it was, would grant the same budget twice."""
    entered, leave = Gate(), Gate()

    def refresh():
        entered.open()
        leave.wait()
        return limit(10, 10, DAY, max_concurrency=16)

    queue = account.large(
        limit(10, 0, 100.0, max_concurrency=16),
        refresh=refresh,
        clock=clock,
        when_exhausted="raise",
    )
    clock.advance(100)
    asking = crew(queue.acquire, 0)
    entered.wait()
    queue.update(limit(10, 10, DAY, max_concurrency=16))
    permits = [queue.acquire(shard) for shard in range(1, 10)]
    leave.open()
    assert asking.now().remaining == 0
    assert [permit.remaining for permit in permits] == list(range(9, 0, -1))


def test_a_refresh_that_fails_after_an_update_changes_nothing(account, clock, caplog):
    asked = []

    def refresh():
        asked.append(1)
        queue.update(limit(100, 50, 3600.0))
        raise OSError("too late anyway")

    queue = spent(account, clock, refresh=refresh)
    clock.advance(100)
    assert queue.acquire(0).remaining == 49
    clock.advance(WINDOW)
    assert queue.acquire(0).remaining == 48
    assert asked == [1]
    assert not any("could not read" in record.getMessage() for record in warnings_in(caplog))


def test_each_reset_is_asked_about_even_by_a_ticket_that_asked_in_vain_before(account, clock, crew):
    refresh = Answers(OSError("down"), limit(10, 3, DAY))
    queue = account.large(limit(1, 0, 100.0), refresh=refresh, clock=clock, period=1000.0)
    first, second = in_line(queue, crew, clock, [0, 1])
    clock.advance(100)
    assert first.now().remaining == 0
    clock.settle(1)
    clock.advance(WINDOW)
    clock.settle(1)
    clock.advance(1000 - WINDOW)
    assert second.now().remaining == 2
    assert refresh.asked == 2


def test_no_eta_is_told_while_the_limit_is_read(account, clock, crew):
    entered, leave = Gate(), Gate()

    def refresh():
        entered.open()
        leave.wait()
        return limit(10, 10, DAY)

    queue = spent(account, clock, refresh=refresh)
    clock.advance(100)
    asking = crew(queue.acquire, 0)
    entered.wait()
    with pytest.raises(AcquireTimeout) as caught:
        queue.acquire(1, timeout=0)
    assert caught.value.eta is None
    leave.open()
    asking.now()


def test_the_tiniest_period_still_is_one(account, clock):
    queue = account.large(limit(2, 2, 60.0, max_concurrency=16), period=1e-9, clock=clock)
    assert [queue.try_acquire(shard) is not None for shard in range(3)] == [True, True, False]


def test_a_thread_that_is_interrupted_while_it_reads_leaves_that_to_the_next(account, clock, crew):
    asked = []

    def refresh():
        asked.append(1)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return limit(10, 10, DAY)

    queue = spent(account, clock, refresh=refresh)
    first, second = in_line(queue, crew, clock, [0, 1])
    clock.advance(100)
    assert isinstance(first.exception(10), KeyboardInterrupt)
    assert second.now().remaining == 9


def test_futures_wait_for_a_reset_and_read_the_limit_too(account, clock):
    refresh = Answers(OSError("down"), limit(10, 7, DAY))
    queue = spent(account, clock, refresh=refresh)
    futures = [queue.enqueue(shard) for shard in (0, 1)]
    clock.settle(1)
    clock.advance(100)
    assert futures[0].result(10).remaining == 9
    clock.settle(1)
    clock.advance(WINDOW)
    assert futures[1].result(10).remaining == 6


def test_a_future_cancelled_while_the_limit_is_read_changes_nothing_for_the_others(account, clock):
    entered, leave = Gate(), Gate()

    def refresh():
        entered.open()
        leave.wait()
        return limit(10, 10, DAY)

    queue = spent(account, clock, refresh=refresh)
    first, second = queue.enqueue(0), queue.enqueue(1)
    clock.settle(1)
    clock.advance(100)
    entered.wait()
    assert first.cancel()
    leave.open()
    assert second.result(10).remaining == 9


# --- what observers are told ----------------------------------------------------------------------


def test_observers_hear_of_the_end_and_of_new_limits(account, clock):
    heard = []
    queue = spent(account, clock, observer=heard.append)
    assert queue.try_acquire(0) is None
    new = limit(5, 5, 60.0)
    queue.update(new)
    assert heard == [BudgetExhausted(0, 100.0), LimitUpdated(new)]


def test_observers_hear_of_the_end_once_where_it_raises_too(account, clock, caplog):
    heard = []
    queue = spent(account, clock, observer=heard.append, when_exhausted="raise")
    for _ in range(3):
        with pytest.raises(SessionLimitExhausted):
            queue.acquire(0)
    assert heard == [BudgetExhausted(0, 100.0)]
    assert len(warnings_in(caplog)) == 1


class Gate:
    """Something that one thread waits for and another one opens."""

    def __init__(self):
        self._event = threading.Event()

    def open(self):
        self._event.set()

    def wait(self):
        assert self._event.wait(20)
