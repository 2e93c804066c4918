"""The session start limit: hard, charged at the grant, renewed at its reset, updated meanwhile."""

from __future__ import annotations

import contextlib
import logging
import threading

import pytest
from accounts import InMemory
from clocks import Hooked
from test_interruptions import run_interrupted_everywhere
from test_waiting import in_line, limit, memory, order

from gateway_queue_sync import (
    AcquireTimeout,
    BudgetExhausted,
    GatewayBotError,
    LimitUpdated,
    SessionLimitExhausted,
)
from gateway_queue_sync.queue import scheduler_of

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
    clock.settle(1)
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
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Gate:
    """Something that one thread waits for and another one opens."""

    def __init__(self):
        self._event = threading.Event()

    def open(self):
        self._event.set()

    def wait(self):
        assert self._event.wait(20)


class Slow:
    """A refresh that a test lets go."""

    def __init__(self, answer):
        self.answer, self.asked, self.thread = answer, 0, None
        self.entered, self.leave = Gate(), Gate()

    def __call__(self):
        self.asked, self.thread = self.asked + 1, threading.current_thread()
        self.entered.open()
        self.leave.wait()
        return self.answer


@pytest.mark.accounts("memory")
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
    clock.advance(DAY - WINDOW)
    assert queue.acquire(3).remaining == 29
    assert refresh.asked == 2


def failed_reads(caplog):
    return [record for record in caplog.records if "could not read" in record.getMessage()]


def rest(crew, clock):
    """Block until the limit is read, and each call has returned or is parked."""
    crew.settle(clock)
    for thread in threading.enumerate():
        if thread.name == "gateway-queue-limit":
            thread.join(20)
            assert not thread.is_alive()
    crew.settle(clock)


@pytest.mark.accounts("memory")
def test_if_the_read_at_a_reset_fails_the_last_total_counts_five_seconds_later(
    account, clock, crew, caplog
):
    queue = spent(account, clock, refresh=Answers(*[OSError("no route")] * 50))
    (call,) = in_line(queue, crew, clock, [0])
    clock.advance(100)
    rest(crew, clock)
    clock.advance(4.999)
    rest(crew, clock)
    assert not call.done()
    clock.advance(0.001)
    assert call.now().remaining == 9
    assert "OSError: no route" in failed_reads(caplog)[0].getMessage()


@pytest.mark.accounts("memory")
def test_a_read_that_failed_is_tried_again_while_the_last_total_counts(
    account, clock, crew, caplog
):
    caplog.set_level(logging.INFO, "gateway_queue_sync")
    refresh = Answers(OSError("down"), ValueError("nonsense"), limit(50, 40, DAY))
    queue = spent(account, clock, total=20, refresh=refresh)
    clock.advance(100)
    left = []
    for shard in range(10):
        call = crew(queue.acquire, shard)
        rest(crew, clock)
        clock.advance(10)
        left.append(call.now().remaining)
        rest(crew, clock)
    assert refresh.asked == 3
    assert left[0] == 19
    assert 30 <= left[-1] <= 39
    assert [record.levelname for record in failed_reads(caplog)] == ["WARNING", "INFO"]


@pytest.mark.accounts("memory")
@pytest.mark.parametrize("nonsense", [None, 17, limit(5, 5)])
def test_a_refresh_that_returns_nonsense_has_failed(account, clock, crew, caplog, nonsense):
    queue = spent(account, clock, total=20, refresh=lambda: nonsense, reserve=5)
    clock.advance(100)
    call = crew(queue.acquire, 0)
    rest(crew, clock)
    clock.advance(5)
    assert call.now().remaining == 19
    assert failed_reads(caplog)[0].levelname == "WARNING"


@pytest.mark.accounts("memory")
def test_an_exhausted_answer_is_waited_for_and_asked_for_again_a_second_later(account, clock, crew):
    refresh = Answers(limit(10, 0, 0.0), limit(10, 0, 50.0), limit(10, 10, 0.0))
    queue = spent(account, clock, refresh=refresh)
    (call,) = in_line(queue, crew, clock, [0])
    for pause, asked in ((100.0, 1), (1.0, 2), (50.0, 3)):
        clock.advance(pause - 0.001)
        rest(crew, clock)
        assert refresh.asked == asked - 1
        clock.advance(0.001)
        rest(crew, clock)
        assert refresh.asked == asked
    assert call.now().remaining == 9


@pytest.mark.accounts("memory")
def test_a_refresh_with_other_buckets_puts_everybody_in_their_new_line(account, clock, crew):
    queue = spent(account, clock, refresh=Answers(limit(10, 10, DAY, max_concurrency=4)))
    calls = in_line(queue, crew, clock, range(4))
    clock.advance(100)
    assert [call.now().bucket for call in calls] == [0, 1, 2, 3]


@pytest.mark.accounts("memory")
def test_a_thread_of_its_own_reads_the_limit_and_all_wait_for_it(account, clock, crew):
    refresh = Slow(limit(10, 10, DAY, max_concurrency=3))
    queue = account.large(limit(10, 0, 100.0, max_concurrency=3), refresh=refresh, clock=clock)
    calls = in_line(queue, crew, clock, range(3))
    clock.advance(100)
    refresh.entered.wait()
    clock.settle(3)
    assert clock.next_in in (None, 5.0)  # they are woken when the answer is there
    late = crew(queue.acquire, 5, timeout=0)
    assert isinstance(late.exception(10), AcquireTimeout)
    refresh.leave.open()
    for call in calls:
        call.now()
    assert refresh.thread not in crew.threads
    assert refresh.asked == 1


@pytest.mark.accounts("memory")
def test_deadlines_are_kept_while_the_limit_is_read(account, clock, crew):
    """An HTTP read held every caller up for as long as it took."""
    refresh = Slow(limit(10, 10, DAY))
    queue = spent(account, clock, refresh=refresh)
    clock.advance(100)
    (call,) = in_line(queue, crew, clock, [0], timeout=1.0)
    refresh.entered.wait()
    assert queue.try_acquire(1) is None
    clock.settle(1)
    assert clock.next_in == 1.0
    clock.advance(1)
    assert isinstance(call.exception(10), AcquireTimeout)
    refresh.leave.open()
    assert queue.acquire(2).remaining == 9


@pytest.mark.accounts("memory")
def test_a_read_that_takes_too_long_at_a_reset_lets_the_last_total_count(account, clock, crew):
    refresh = Slow(limit(30, 30, DAY))
    queue = spent(account, clock, refresh=refresh)
    (call,) = in_line(queue, crew, clock, [0])
    clock.advance(100)
    refresh.entered.wait()
    clock.settle(1)
    clock.advance(5)
    assert call.now().remaining == 9
    refresh.leave.open()
    rest(crew, clock)
    clock.advance(WINDOW)
    call = crew(queue.acquire, 1)
    rest(crew, clock)
    assert 28 <= call.now().remaining <= 29


@pytest.mark.accounts("memory")
def test_a_read_that_fails_is_not_repeated_for_each_permit(account, clock, crew, caplog):
    """32 shards on idle buckets took 32 reads, one after the other."""
    refresh = Answers(*[OSError("down")] * 50)
    queue = account.large(limit(1000, 900, 100.0, max_concurrency=32), refresh=refresh, clock=clock)
    clock.advance(100)
    calls = [crew(queue.acquire, shard) for shard in range(32)]
    rest(crew, clock)
    assert refresh.asked == 1
    clock.advance(5)
    assert sorted(call.now().remaining for call in calls) == list(range(968, 1000))
    rest(crew, clock)
    assert refresh.asked <= 2
    assert len(failed_reads(caplog)) == 1


@pytest.mark.accounts("memory")
def test_a_reset_that_is_noticed_late_is_a_reason_to_read_the_limit_too(account, clock, crew):
    """Nobody used the queue when it was due. Nobody waits for the read either."""
    refresh = Answers(limit(2000, 1500, DAY))
    never = {"reread_after": None} if isinstance(account, InMemory) else {}
    queue = account.large(
        limit(1000, 900, 100.0, max_concurrency=32), refresh=refresh, clock=clock, **never
    )
    clock.advance(200)
    queue.acquire(0)
    rest(crew, clock)
    assert refresh.asked == 1
    assert 1498 <= queue.snapshot().limit.remaining <= 1500


@pytest.mark.accounts("memory")
def test_an_update_is_newer_than_an_answer_that_is_on_its_way(account, clock, crew):
    """The late answer, taken as it was, would grant the same budget twice."""
    refresh = Slow(limit(10, 10, DAY, max_concurrency=16))
    queue = account.large(
        limit(10, 0, 100.0, max_concurrency=16),
        refresh=refresh,
        clock=clock,
        when_exhausted="raise",
    )
    clock.advance(100)
    asking = crew(queue.acquire, 0)
    refresh.entered.wait()
    queue.update(limit(10, 10, DAY, max_concurrency=16))
    assert asking.now().remaining == 9
    permits = [queue.acquire(shard) for shard in range(1, 10)]
    refresh.leave.open()
    rest(crew, clock)
    assert [permit.remaining for permit in permits] == list(range(8, -1, -1))
    with pytest.raises(SessionLimitExhausted):
        queue.try_acquire(10)


@pytest.mark.accounts("memory")
def test_a_read_that_fails_after_an_update_changes_nothing(account, clock, crew, caplog):
    asked = []

    def refresh():
        asked.append(1)
        if len(asked) == 1:
            queue.update(limit(100, 50, 3600.0))
        raise OSError("too late anyway")

    queue = spent(account, clock, refresh=refresh)
    clock.advance(100)
    assert queue.acquire(0).remaining == 49
    rest(crew, clock)
    clock.advance(WINDOW)
    assert queue.acquire(0).remaining == 48
    rest(crew, clock)
    assert not [record for record in failed_reads(caplog) if record.levelname == "WARNING"]


@pytest.mark.accounts("memory")
def test_those_who_wait_for_a_reset_have_the_limit_read_again_if_it_failed(account, clock, crew):
    refresh = Answers(OSError("down"), limit(10, 3, DAY))
    queue = account.large(limit(1, 0, 100.0), refresh=refresh, clock=clock, period=1000.0)
    first, second = in_line(queue, crew, clock, [0, 1])
    clock.advance(100)
    rest(crew, clock)
    clock.advance(5)
    assert first.now().remaining == 0
    for _ in range(1000 // 50):
        rest(crew, clock)
        clock.advance(50)
    assert 1 <= second.now().remaining <= 2
    assert refresh.asked == 2


@pytest.mark.accounts("memory")
def test_no_eta_is_told_while_the_limit_is_read(account, clock, crew):
    refresh = Slow(limit(10, 10, DAY))
    queue = spent(account, clock, refresh=refresh)
    clock.advance(100)
    asking = crew(queue.acquire, 0)
    refresh.entered.wait()
    with pytest.raises(AcquireTimeout) as caught:
        queue.acquire(1, timeout=0)
    assert caught.value.eta is None
    refresh.leave.open()
    asking.now()


def test_the_tiniest_period_still_is_one(account, clock):
    queue = account.large(limit(2, 2, 60.0, max_concurrency=16), period=1e-9, clock=clock)
    assert [queue.try_acquire(shard) is not None for shard in range(3)] == [True, True, False]


@pytest.mark.accounts("memory")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_whatever_a_refresh_raises_is_a_read_that_failed(account, clock, crew, caplog, raised):
    queue = spent(account, clock, refresh=Answers(*[raised()] * 50))
    first, second = in_line(queue, crew, clock, [0, 1])
    clock.advance(100)
    rest(crew, clock)
    clock.advance(5)
    assert first.now().remaining == 9
    rest(crew, clock)
    clock.advance(WINDOW)
    assert second.now().remaining == 8
    assert raised.__name__ in failed_reads(caplog)[0].getMessage()


@pytest.mark.accounts("memory")
def test_futures_wait_for_a_reset_and_have_the_limit_read_too(account, clock, crew):
    refresh = Answers(OSError("down"), limit(10, 7, DAY))
    queue = spent(account, clock, refresh=refresh)
    futures = [queue.enqueue(shard) for shard in range(5)]
    clock.settle(0)
    clock.advance(100)
    rest(crew, clock)
    clock.advance(5)
    assert futures[0].result(10).remaining == 9
    for _ in range(5):
        rest(crew, clock)
        clock.advance(WINDOW)
    assert 2 <= futures[4].result(10).remaining <= 6
    assert refresh.asked == 2


@pytest.mark.accounts("memory")
def test_a_future_cancelled_while_the_limit_is_read_changes_nothing_for_the_others(account, clock):
    refresh = Slow(limit(10, 10, DAY))
    queue = spent(account, clock, refresh=refresh)
    first, second = queue.enqueue(0), queue.enqueue(1)
    clock.settle(0)
    clock.advance(100)
    refresh.entered.wait()
    assert first.cancel()
    refresh.leave.open()
    assert second.result(10).remaining == 9


@pytest.mark.parametrize("way", ["acquire", "enqueue"])
def test_a_reset_while_the_machine_is_suspended_is_noticed_within_a_minute(
    account, clock, crew, way
):
    """The sleep of a thread does not get shorter while a laptop is suspended, the wait does."""
    queue = spent(account, clock, reset_after=12 * 3600.0)
    if way == "acquire":
        (call,) = in_line(queue, crew, clock, [0])
    else:
        call = queue.enqueue(0)
        clock.settle(0)
    clock.advance(30)
    clock.suspend(12 * 3600.0)
    crew.settle(clock)
    clock.advance(60)
    assert call.result(20).remaining == 9


@memory
@pytest.mark.parametrize("way", ["acquire", "enqueue"])
def test_a_window_that_ends_while_the_machine_is_suspended_ends_within_a_minute(
    account, clock, crew, way
):
    queue = account.local(clock=clock, interval=3600.0)
    queue.acquire(9)
    if way == "acquire":
        (call,) = in_line(queue, crew, clock, [0])
    else:
        call = queue.enqueue(0)
        clock.settle(0)
    clock.suspend(2 * 3600.0)
    clock.advance(60)
    assert call.result(20).shard_id == 0


@memory
def test_a_deadline_that_ends_while_the_machine_is_suspended_ends_within_a_minute(
    account, clock, crew
):
    queue = account.local(clock=clock, interval=7200.0)
    queue.acquire(9)
    calls = in_line(queue, crew, clock, [0], timeout=5400.0)
    calls += in_line(queue, crew, clock, [1], timeout=1800.0)
    clock.suspend(6000.0)
    clock.advance(60)
    for call in calls:
        assert isinstance(call.exception(20), AcquireTimeout)


# --- limits that are read again -------------------------------------------------------------------


def start_that_raises(error, context=None):
    def start(self):
        try:
            if context is not None:
                raise context
        finally:
            raise error

    return start


@memory
def test_ctrl_c_while_the_thread_that_reads_the_limit_is_started_is_raised(
    account, clock, monkeypatch
):
    """``Thread.start`` waits for the thread, and then fails to release a lock (CPython #118433)."""
    refresh = Answers(limit(100, 40, DAY))
    queue = account.large(limit(100, 50, DAY), refresh=refresh, clock=clock)
    clock.advance(600)
    error = RuntimeError("release unlocked lock")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_that_raises(error, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            queue.acquire(0)
    clock.advance(600)
    assert queue.acquire(0).remaining == 49
    while queue.snapshot().limit.remaining != 39:
        pass


@memory
def test_an_interrupt_at_any_point_of_a_call_that_reads_the_limit_ends_no_reads(
    account, clock, monkeypatch
):
    started = []
    queue = account.large(
        limit(1000, 1000, DAY), refresh=list, clock=clock, reread_after=60.0, interval=1.0
    )
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread) or 1 / 0)

    def call():
        with contextlib.suppress(ZeroDivisionError):
            queue.acquire(0)

    def check(result, injector):
        clock.advance(600)
        started.clear()
        call()
        assert started, injector.where

    assert run_interrupted_everywhere(call, check, lambda: clock.advance(600)) > 2


@memory
def test_that_no_thread_can_read_the_limit_is_logged_without_the_lock(account, clock, monkeypatch):
    queue = account.large(limit(100, 50, DAY), refresh=Answers(), clock=clock)
    clock.advance(600)
    held = []

    class Handler(logging.Handler):
        def emit(self, record):
            held.append(scheduler_of(queue).lock.is_held())

    handler, logger = Handler(), logging.getLogger("gateway_queue_sync")
    logger.addHandler(handler)
    try:
        error = RuntimeError("can't start new thread")
        monkeypatch.setattr(threading.Thread, "start", start_that_raises(error))
        assert queue.acquire(0).remaining == 49
    finally:
        logger.removeHandler(handler)
    assert held == [False]


def reread(account, clock, crew, known, *answers, **settings):
    """Acquire at once, and again after ten minutes: then the limit is read."""
    refresh = Answers(*answers)
    queue = account.large(known, refresh=refresh, clock=clock, **settings)
    queue.acquire(0)
    clock.advance(600 - 0.001)
    queue.acquire(0).unused()
    assert refresh.asked == 0
    clock.advance(0.001)
    queue.acquire(0)
    rest(crew, clock)
    assert refresh.asked == 1
    return queue, refresh


@memory
def test_a_limit_is_read_again_when_it_is_used_ten_minutes_later(account, clock, crew):
    """Others may start sessions on the token; and Discord may not have seen our latest permit."""
    queue, _ = reread(account, clock, crew, limit(100, 50, DAY), limit(100, 40, DAY - 600))
    assert queue.snapshot().limit.remaining == 39


@memory
def test_what_is_left_is_never_more_than_the_total_less_the_own_permits(account, clock, crew):
    queue, _ = reread(account, clock, crew, limit(100, 50, DAY), limit(100, 100, DAY - 600))
    assert queue.snapshot().limit.remaining == 98


@memory
@pytest.mark.accounts("memory")
def test_a_higher_number_that_is_not_used_is_warned_of_once(account, clock, crew, caplog):
    answers = [limit(100, 100, DAY - 600), limit(100, 100, DAY - 1200), limit(100, 90, DAY - 1800)]
    queue, _ = reread(account, clock, crew, limit(100, 50, DAY), *answers)
    (warning,) = [text for text in caplog.messages if "update()" in text]
    assert "100 session starts are left" in warning
    assert "it is 1 fewer" in warning  # the other one is so new that Discord may not know it
    for _ in range(2):
        clock.advance(600)
        queue.acquire(0)
        rest(crew, clock)
    assert len([text for text in caplog.messages if "update()" in text]) == 1


@memory
@pytest.mark.accounts("memory")
def test_each_permit_counts_once_whether_discord_has_seen_it_or_not(account, clock, crew):
    refresh = Answers(limit(100, 97, DAY - 600), limit(100, 94, DAY - 1200))
    queue = account.large(limit(100, 100, DAY, max_concurrency=16), refresh=refresh, clock=clock)
    for shard in range(3):  # Discord has seen these when it is asked
        queue.acquire(shard)
    clock.advance(550)
    for shard in range(2):  # and not these, although they are almost a minute old
        queue.acquire(shard)
    clock.advance(50)
    queue.acquire(2)
    rest(crew, clock)
    assert queue.snapshot().limit.remaining == 94
    clock.advance(600)
    queue.acquire(3)
    rest(crew, clock)
    assert queue.snapshot().limit.remaining == 93


@memory
@pytest.mark.accounts("memory")
def test_a_limit_that_is_not_used_is_not_read(account, clock, crew):
    refresh = Answers()
    queue = account.large(limit(100, 50, DAY), refresh=refresh, clock=clock)
    clock.advance(3600)
    queue.snapshot()
    rest(crew, clock)
    assert refresh.asked == 0


@memory
@pytest.mark.accounts("memory")
def test_how_often_a_limit_is_read_again_is_a_setting(account, clock, crew):
    refresh = Answers(limit(100, 40, DAY), limit(100, 30, DAY))
    queue = account.large(limit(100, 50, DAY), refresh=refresh, reread_after=60.0, clock=clock)
    for _ in range(2):
        clock.advance(60)
        queue.acquire(0)
        rest(crew, clock)
    assert refresh.asked == 2
    never = account.large(limit(100, 50, DAY), refresh=refresh, reread_after=None, clock=clock)
    clock.advance(DAY / 2)
    never.acquire(0)
    rest(crew, clock)
    assert refresh.asked == 2


@memory
@pytest.mark.accounts("memory")
def test_nobody_waits_while_a_limit_is_read_again(account, clock, crew):
    refresh = Slow(limit(100, 40, DAY - 600))
    queue = account.large(limit(100, 50, DAY, 16), refresh=refresh, clock=clock)
    clock.advance(600)
    assert [queue.acquire(shard).remaining for shard in range(3)] == [49, 48, 47]
    refresh.entered.wait()
    refresh.leave.open()
    rest(crew, clock)
    assert queue.snapshot().limit.remaining == 37
    assert refresh.asked == 1


@memory
@pytest.mark.accounts("memory")
def test_another_reset_counts_only_when_a_second_read_a_minute_later_confirms_it(
    account, clock, crew
):
    """A bot that crashes in a loop must win no session starts from an answer that lags behind."""
    other = DAY / 2
    answers = [limit(100, 100, other), limit(100, 99, other - 59), limit(100, 98, other - 61)]
    queue, refresh = reread(account, clock, crew, limit(100, 10, DAY), *answers)
    assert queue.snapshot().limit.remaining == 8
    assert queue.snapshot().limit.resets_in == DAY - 600
    clock.advance(59)
    queue.acquire(0)
    rest(crew, clock)
    assert queue.snapshot().limit.remaining == 7
    clock.advance(WINDOW)
    queue.acquire(0)
    rest(crew, clock)
    seen = queue.snapshot().limit
    assert seen.resets_in == pytest.approx(other - 59, abs=60)
    assert 90 <= seen.remaining <= 98
    assert refresh.asked == 2


@memory
def test_until_another_reset_is_confirmed_the_smaller_numbers_count(account, clock, crew):
    queue, _ = reread(account, clock, crew, limit(100, 50, DAY), limit(100, 3, DAY / 2))
    assert queue.snapshot().limit.remaining == 2
    assert queue.snapshot().limit.resets_in == DAY - 600


@memory
@pytest.mark.accounts("memory")
def test_reads_that_fail_back_off_up_to_five_minutes_with_one_warning(account, clock, crew, caplog):
    caplog.set_level(logging.INFO, "gateway_queue_sync")
    refresh = Answers(*[OSError("down")] * 1000)
    queue = account.large(
        limit(1000, 1000, DAY), refresh=refresh, interval=0.5, margin=0.1, clock=clock
    )
    clock.advance(600)
    for _ in range(3600):
        permit = queue.try_acquire(0)
        if permit is not None:
            permit.unused()
        rest(crew, clock)
        clock.advance(1)
    assert 15 <= refresh.asked <= 32
    levels = [record.levelname for record in failed_reads(caplog)]
    assert levels == ["WARNING", *["INFO"] * (refresh.asked - 1)]


@memory
@pytest.mark.accounts("memory")
def test_a_read_that_is_told_to_come_back_later_does_so(account, clock, crew):
    refresh = Answers(GatewayBotError("too many", 429, 1000.0), limit(100, 40, DAY))
    queue = account.large(limit(100, 50, DAY), refresh=refresh, clock=clock)
    for wait, asked in ((600, 1), (999, 1), (WINDOW, 2)):
        clock.advance(wait)
        queue.acquire(0)
        rest(crew, clock)
        assert refresh.asked == asked


# --- interruptions --------------------------------------------------------------------------------


@memory
def test_an_update_that_is_interrupted_is_whole_and_wakes_those_who_wait(account, clock, crew):
    """Ctrl-C changed the limit, and those who waited for it slept on until the old reset."""

    def interrupt():
        raise KeyboardInterrupt

    interrupted = 0
    for at in range(1, 8):
        hooked = Hooked(clock, interrupt)
        queue = spent(account, hooked)
        (call,) = in_line(queue, crew, clock, [0])
        hooked.left, hooked.thread = at, threading.current_thread()
        try:
            queue.update(limit(1000, 1000, DAY))
        except KeyboardInterrupt:
            interrupted += 1
        hooked.left = 0
        assert call.now().remaining == 999
    assert interrupted


@memory
def test_an_update_that_is_interrupted_anywhere_wakes_those_who_wait_or_did_nothing(
    account, clock, crew
):
    def prepare():
        nonlocal queue, call
        queue = spent(account, clock)
        (call,) = in_line(queue, crew, clock, [0])

    def check(result, injector):
        if queue.snapshot().limit.total == 10:
            queue.update(limit(1000, 1000, DAY))  # the interrupt came before anything was done
        assert call.now().remaining == 999, injector.where

    queue = call = None
    points = run_interrupted_everywhere(
        lambda: queue.update(limit(1000, 1000, DAY)), check, prepare
    )
    assert points > 4


# --- what observers get ---------------------------------------------------------------------------


def test_observers_hear_of_the_end_and_of_new_limits(account, clock):
    heard = []
    queue = spent(account, clock, observer=heard.append)
    assert queue.try_acquire(0) is None
    new = limit(5, 5, 60.0)
    queue.update(new)
    clock.settle(0)
    assert heard == [BudgetExhausted(0, 100.0), LimitUpdated(new)]


def test_observers_hear_of_the_end_once_where_it_raises_too(account, clock, caplog):
    heard = []
    queue = spent(account, clock, observer=heard.append, when_exhausted="raise")
    for _ in range(3):
        with pytest.raises(SessionLimitExhausted):
            queue.acquire(0)
    clock.settle(0)
    assert heard == [BudgetExhausted(0, 100.0)]
    assert len(warnings_in(caplog)) == 1
