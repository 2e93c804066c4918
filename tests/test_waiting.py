"""Threads in lines: spacing, order, priority, time-outs, independence. On a clock driven by hand."""

from __future__ import annotations

import threading

import pytest
from clocks import Watched

from gateway_queue_sync import (
    AcquireTimeout,
    NoOpQueue,
    Permit,
    Queue,
    QueueClosed,
    SessionStartLimit,
    ShardGranted,
    forecast,
)
from gateway_queue_sync.lines import Line, Lines
from gateway_queue_sync.queue import scheduler_of
from gateway_queue_sync.testing import FakeClock

WINDOW = 5.25


memory = pytest.mark.accounts("memory")
shared = pytest.mark.accounts("sqlite", "redis", "http")


def limit(total=1000, remaining=1000, reset_after=0.0, max_concurrency=1):
    return SessionStartLimit(total, remaining, reset_after, max_concurrency)


def buckets(account, count, clock, **settings):
    return account.large(limit(max_concurrency=count), clock=clock, **settings)


def in_line(queue, crew, clock, shard_ids, **settings):
    """One thread after the other joins the queue's lines."""
    calls = []
    for shard_id in shard_ids:
        parked = clock.parked
        calls.append(crew(queue.acquire, shard_id, **settings))
        clock.settle(parked + 1)
    return calls


def order(snapshot, bucket=0):
    return [shard.shard_id for shard in snapshot.buckets[bucket].shards]


# --- spacing --------------------------------------------------------------------------------------


def test_a_free_bucket_grants_at_once(account, clock):
    queue = account.local(clock=clock)
    permit = queue.acquire(3)
    assert (permit.shard_id, permit.bucket, permit.waited) == (3, 0, 0.0)


def test_the_next_permit_comes_a_window_later_and_not_before(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1])
    clock.advance(WINDOW - 0.000_001)
    clock.settle(1)
    assert not call.done()
    clock.advance(0.000_001)
    assert call.now().waited == WINDOW


def test_interval_and_margin_make_the_window(account, clock):
    queue = account.local(interval=2, margin=0.5, clock=clock)
    queue.acquire(0)
    clock.advance(2.499_999)
    assert queue.try_acquire(0) is None
    clock.advance(0.000_001)
    assert queue.try_acquire(0) is not None


def test_a_late_taker_starts_the_window_when_it_takes(account, clock):
    queue = account.local(clock=clock)
    queue.acquire(0)
    clock.advance(100)
    queue.acquire(1)
    assert queue.snapshot().buckets[0].ready_in == WINDOW


def test_buckets_do_not_wait_for_each_other(account, clock, crew):
    queue = buckets(account, 2, clock)
    queue.acquire(0)
    in_line(queue, crew, clock, [2])
    assert queue.acquire(1).waited == 0.0
    clock.advance(WINDOW)
    crew.join()


def test_a_bucket_that_is_asked_between_the_grants_of_another_grants_at_once(account, clock):
    """One global tick made an idle bucket wait for the grants of a busy one."""
    queue = buckets(account, 2, clock)
    queue.acquire(0)
    clock.advance(0.001)
    assert queue.acquire(1).waited == 0.0


# --- order ----------------------------------------------------------------------------------------


def test_first_come_first_served(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(99)
    calls = in_line(queue, crew, clock, [5, 3, 4, 1])
    for left, call in zip((3, 2, 1, 0), calls, strict=True):
        clock.advance(WINDOW)
        call.now()
        clock.settle(left)
    assert [permit.shard_id for permit in crew.returned] == [5, 3, 4, 1]


def test_a_head_start_passes_those_who_came_later_than_it_counts_for(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(99)
    in_line(queue, crew, clock, [1])
    clock.advance(2)
    in_line(queue, crew, clock, [2])
    clock.advance(2)
    in_line(queue, crew, clock, [3], priority=3.0)
    in_line(queue, crew, clock, [4], priority=30.0)
    in_line(queue, crew, clock, [5], priority=-1.0)
    in_line(queue, crew, clock, [6])
    assert order(queue.snapshot()) == [4, 1, 3, 2, 6, 5]
    queue.close()


def test_equal_positions_go_by_who_asked_first(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(99)
    in_line(queue, crew, clock, [8, 7, 9], priority=10.0)
    assert order(queue.snapshot()) == [8, 7, 9]
    queue.close()


@memory
def test_nobody_barges_past_a_line(account, clock, crew):
    watched, tried = Watched(clock), []
    queue = account.local(clock=watched)
    queue.acquire(0)
    (first,) = in_line(queue, crew, clock, [1])
    assert queue.try_acquire(2) is None
    clock.settle(1)

    def try_it():  # the clock holds the lock while it wakes the first: that one has not moved yet
        watched.notified = lambda: None
        tried.append(queue.try_acquire(2))

    watched.notified = try_it
    clock.advance(WINDOW)
    assert first.now().shard_id == 1
    assert tried == [None]


@memory
def test_nobody_barges_past_a_head_that_is_told_of_its_permit(account, clock, crew):
    tried = []

    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 1:
            clock.advance(2 * WINDOW)
            tried.append(crew(queue.try_acquire, 2).now())

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(0)
    (first,) = in_line(queue, crew, clock, [1])
    clock.advance(WINDOW)
    assert first.now().shard_id == 1
    assert tried == [None]


def test_try_acquire_stands_in_no_line(account, clock):
    queue = account.local(clock=clock)
    assert queue.try_acquire(0) is not None
    assert queue.try_acquire(1) is None
    assert queue.snapshot().waiting == 0


def test_a_shard_may_stand_in_line_twice(account, clock, crew):
    """Two sessions with one shard id are legal: the id does not name a waiter."""
    queue = account.local(clock=clock)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [7, 7])
    for left, call in zip((1, 0), calls, strict=True):
        clock.advance(WINDOW)
        assert call.now().shard_id == 7
        clock.settle(left)


# --- time-outs ------------------------------------------------------------------------------------


def test_a_timeout_says_when_the_permit_would_have_come(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(0)
    in_line(queue, crew, clock, [1])
    (call,) = in_line(queue, crew, clock, [2], timeout=4.0)
    clock.advance(4)
    with pytest.raises(AcquireTimeout) as caught:
        call.now()
    assert (caught.value.shard_id, caught.value.timeout) == (2, 4.0)
    assert caught.value.eta == pytest.approx(2 * WINDOW - 4)
    assert "shard 2" in str(caught.value)
    queue.close()


def test_a_timeout_of_zero_tries_once(account, clock):
    queue = account.local(clock=clock)
    assert queue.acquire(0, timeout=0)
    with pytest.raises(AcquireTimeout):
        queue.acquire(1, timeout=0)
    assert queue.snapshot().waiting == 0


def test_who_times_out_takes_no_permit_and_nobodys_place(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(0)
    (gone,) = in_line(queue, crew, clock, [1], timeout=1.0)
    (waits,) = in_line(queue, crew, clock, [2])
    clock.advance(1)
    with pytest.raises(AcquireTimeout):
        gone.now()
    clock.settle(1)
    assert order(queue.snapshot()) == [2]
    clock.advance(WINDOW - 1)
    assert waits.now().waited == WINDOW
    assert queue.snapshot().granted == 2


def test_the_first_in_line_timing_out_hands_the_front_on(account, clock, crew):
    """A waiter that times out can still have eaten the notify meant for it."""
    queue = account.local(clock=clock)
    queue.acquire(0)
    (gone,) = in_line(queue, crew, clock, [1], timeout=1.0)
    (waits,) = in_line(queue, crew, clock, [2])
    assert clock.next_in == 1.0
    clock.advance(1)
    clock.settle(1)
    gone.exception(1)
    clock.advance(WINDOW - 1)
    waits.now()


@pytest.mark.parametrize("timeout", [WINDOW, WINDOW + 1])
def test_a_permit_due_at_the_deadline_is_granted(account, clock, crew, timeout):
    queue = account.local(clock=clock)
    queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1], timeout=timeout)
    clock.advance(timeout)
    assert call.now().shard_id == 1


def test_a_deadline_at_the_grant_grants_or_leaves_it_to_the_next(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(0)
    (first,) = in_line(queue, crew, clock, [1], timeout=WINDOW)
    (second,) = in_line(queue, crew, clock, [2], timeout=WINDOW)
    clock.advance(WINDOW)
    assert first.now().shard_id == 1
    with pytest.raises(AcquireTimeout):
        second.now()
    assert queue.snapshot().granted == 2


@pytest.mark.parametrize("timeout", [None, float("inf"), threading.TIMEOUT_MAX * 2, 1e308, 10**400])
def test_endless_timeouts_wait_for_ever(account, clock, crew, timeout):
    queue = account.local(clock=clock)
    queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1], timeout=timeout)
    clock.advance(WINDOW)
    call.now()


@memory
def test_a_window_of_centuries_does_not_overflow(account, clock, crew):
    queue = account.local(interval=threading.TIMEOUT_MAX, clock=clock)
    queue.acquire(0)
    in_line(queue, crew, clock, [1, 2])
    assert queue.snapshot().buckets[0].shards[1].eta > threading.TIMEOUT_MAX
    queue.close()


@memory
def test_a_time_out_tells_when_a_used_up_limit_would_have_given_a_permit(account, clock):
    queue = account.large(limit(1000, 0, 100.0), clock=clock)
    for shard in range(3):
        queue.enqueue(shard)
    with pytest.raises(AcquireTimeout) as caught:
        queue.acquire(0, timeout=0)
    assert caught.value.eta == 100 + 3 * WINDOW
    queue.close()


@memory
def test_behind_a_thousand_others_a_time_out_tells_no_eta(account, clock):
    """Who comes before it would have to be counted, with the lock held."""
    queue = account.local(clock=clock)
    queue.acquire(0)
    for _ in range(1001):
        queue.enqueue(0)
    queue.enqueue(0, priority=-60.0)  # the rearmost, so that the others are not the whole line
    with pytest.raises(AcquireTimeout) as caught:
        queue.acquire(0, timeout=0)
    assert caught.value.eta is None
    queue.close()


@memory
def test_a_time_out_costs_no_more_for_those_who_wait_elsewhere(account, clock, monkeypatch):
    """Its position and ETA are known without looking through the line."""
    queue = account.local(clock=clock)
    queue.acquire(0)
    futures = [queue.enqueue(shard) for shard in range(500)]
    for lines, whole in ((Line, "entries"), (Lines, "waiters")):
        monkeypatch.setattr(lines, whole, None)
    with pytest.raises(AcquireTimeout) as caught:
        queue.acquire(7, timeout=0)
    assert caught.value.eta == 501 * WINDOW
    monkeypatch.undo()
    queue.close()
    for future in futures:
        assert isinstance(future.exception(10), QueueClosed)


# --- idle is free ---------------------------------------------------------------------------------


@memory
def test_only_the_first_of_each_line_sleeps_with_a_timeout(account, clock, crew):
    watched = Watched(clock)
    queue = buckets(account, 2, watched)
    queue.acquire(0)
    queue.acquire(1)
    in_line(queue, crew, clock, [0, 1, 2, 3, 4, 5])
    timeouts = [watched.timeouts[thread] for thread in crew.threads]
    assert timeouts == [WINDOW, WINDOW, None, None, None, None]
    queue.close()


@shared
def test_nobody_but_the_worker_sleeps_with_a_timeout(account, clock, crew):
    queue = account.queue(limit(max_concurrency=2), clock=clock)
    queue.acquire(0)
    queue.acquire(1)
    in_line(queue, crew, clock, [0, 1, 2])
    assert clock.next_in is None
    in_line(queue, crew, clock, [3], timeout=7.0)
    assert clock.next_in == 7.0
    queue.close()


@memory
def test_acquire_starts_no_thread(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(0)
    before = set(threading.enumerate())
    in_line(queue, crew, clock, [1, 2])
    assert len(set(threading.enumerate()) - before) == 2
    queue.close()


# --- looking --------------------------------------------------------------------------------------


def test_a_snapshot_shows_every_bucket_and_everybodys_eta(account, clock, crew):
    queue = buckets(account, 3, clock)
    queue.acquire(0)
    clock.advance(1)
    in_line(queue, crew, clock, [0, 3])
    clock.advance(1)
    seen = queue.snapshot()
    assert (seen.waiting, seen.granted) == (2, 1)
    assert [bucket.bucket for bucket in seen.buckets] == [0, 1, 2]
    assert [bucket.ready_in for bucket in seen.buckets] == [WINDOW - 2, 0.0, 0.0]
    first, second = seen.buckets[0].shards
    assert (first.shard_id, first.waited, first.eta) == (0, 1.0, WINDOW - 2)
    assert (second.shard_id, second.waited, second.eta) == (3, 1.0, 2 * WINDOW - 2)
    queue.close()


@memory
def test_a_snapshot_copies_only_the_buckets_that_are_in_use(account, clock, monkeypatch):
    """Copying a million buckets under the lock held up those who acquire for seconds."""
    queue = buckets(account, 100_000, clock)
    queue.acquire(7)
    clock.advance(WINDOW)
    queue.acquire(99_999)
    future = queue.enqueue(99_999)
    work_out, copied = forecast.snapshot, []

    def snapshot(outlook, lines):
        takes = threading.Thread(target=queue.acquire, args=(8,), daemon=True)
        takes.start()
        takes.join(10)  # so nobody holds the lock
        copied.append((dict(outlook.ready_in_us), list(lines), takes.is_alive()))
        return work_out(outlook, lines)

    monkeypatch.setattr(forecast, "snapshot", snapshot)
    seen = queue.snapshot()
    assert copied == [({99_999: 5_250_000}, [99_999], False)]
    assert len(seen.buckets) == 100_000
    assert [bucket.bucket for bucket in seen.buckets if bucket.shards] == [99_999]
    assert future.cancel()


@memory
def test_a_repr_shows_the_state(account, clock, crew):
    queue = account.large(limit(10, 7, 60.0), clock=clock)
    queue.acquire(0)
    in_line(queue, crew, clock, [1])
    assert repr(queue) == "<LargeBotQueue waiting=1 granted=1 remaining=6/10>"
    queue.close()
    crew.join()
    assert repr(queue) == "<LargeBotQueue waiting=0 granted=1 remaining=6/10 closed>"
    assert "LocalQueue waiting=0 granted=0>" in repr(account.local())


# --- closing --------------------------------------------------------------------------------------


def test_close_lets_everybody_go(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [1, 2, 3])
    queue.close()
    for call in calls:
        assert isinstance(call.exception(10), QueueClosed)
    crew.join()
    assert queue.closed
    assert queue.snapshot().waiting == 0
    assert queue.snapshot().granted == 1


def test_a_closed_queue_refuses_and_closes_again(account, clock):
    with account.local(clock=clock) as queue:
        assert not queue.closed
        permit = queue.acquire(0)
    queue.close()
    for call in (queue.acquire, queue.try_acquire, queue.enqueue):
        with pytest.raises(QueueClosed, match="closed"):
            call(1)
    with pytest.raises(QueueClosed):
        queue.update(limit())
    permit.sent()
    assert queue.snapshot().granted == 1


# --- what every queue is --------------------------------------------------------------------------


def test_a_no_op_queue_always_grants_and_ignores_limits():
    with NoOpQueue() as queue:
        queue.update(limit(1, 0, 60.0))
        for shard_id in range(50):
            with queue.acquire(shard_id % 3) as permit:
                assert permit.remaining is None
        queue.acquire(0).rejected()
        queue.acquire(0).unused()
        assert queue.enqueue(3).result(0).shard_id == 3
        assert queue.snapshot().waiting == 0
        assert queue.snapshot().granted == 53
    with pytest.raises(QueueClosed):
        queue.acquire(0)


@memory
def test_a_repr_does_not_wait_for_the_lock(account, clock, crew):
    """A debugger may ask for it, or a signal handler that interrupts one who holds the lock."""
    queue = account.local(clock=clock)
    queue.acquire(0)
    queue.enqueue(0)
    locked = scheduler_of(queue).locked
    assert "waiting=1" in locked(repr, queue)
    assert "waiting=1" in locked(lambda: crew(repr, queue).result(5))


@memory
def test_who_leaves_the_middle_of_a_line_wakes_nobody(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(9)
    (head,) = in_line(queue, crew, clock, [0])
    futures = [queue.enqueue(shard_id) for shard_id in range(1, 4)]
    clock.settle(1)
    ledger, asked = scheduler_of(queue).local, []
    ledger.take = lambda *arguments: asked.append(arguments) or type(ledger).take(*arguments)
    futures[1].cancel()
    futures[2].cancel()
    clock.settle(1)
    assert asked == []
    clock.advance(WINDOW)
    assert head.now().shard_id == 0


def test_all_of_them_are_queues(account, clock):
    class Mine:
        def acquire(self, shard_id: int, timeout: float | None = None) -> Permit:
            return Permit(shard_id)

    for queue in (NoOpQueue(), account.large(limit(), clock=clock), Mine()):
        assert isinstance(queue, Queue)


def test_a_fleet_starts_in_the_least_time_there_is(account):
    """Every bucket's line moves on at exactly its window, for 1,024 shards in 16 buckets."""
    clock = FakeClock()
    queue = account.large(limit(2000, 2000, max_concurrency=16), clock=clock)
    futures = [queue.enqueue(shard_id) for shard_id in range(1024)]
    for _ in range(1024 // 16 - 1):
        clock.settle(0)
        clock.advance(WINDOW)
    waited = [future.result(10).waited for future in futures]
    assert waited == [shard_id // 16 * WINDOW for shard_id in range(1024)]


@shared
def test_buckets_that_another_process_has_changed_are_noticed(account, clock, crew):
    queue, other = (account.queue(limit(max_concurrency=1), clock=clock) for _ in range(2))
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [2, 1, 3])
    other.update(limit(max_concurrency=4))
    assert queue.try_acquire(0) is None
    crew.settle(clock)
    clock.advance(WINDOW)
    assert [call.now().bucket for call in calls] == [2, 1, 3]
