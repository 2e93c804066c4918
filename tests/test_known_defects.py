"""Defects of other queues that no other file of tests covers."""

from __future__ import annotations

from test_waiting import in_line, limit

from gateway_queue_sync import LargeBotQueue, LocalQueue

WINDOW = 5.25


def test_a_wall_clock_set_back_or_forth_changes_no_wait(clock, crew):
    """Read from the wall clock, a step back skips the wait and a step forth grants at once."""
    queue = LargeBotQueue(limit(10, 1, 600.0), clock=clock)
    queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1], timeout=700.0)
    for wall in (0.0, 4e9):
        clock.set_wall(wall)
        assert queue.try_acquire(2) is None
    clock.advance(599.9)
    clock.settle(1)
    clock.advance(0.1)
    assert call.now().waited == 600.0


def test_two_who_are_woken_at_once_do_not_both_pass(clock, crew):
    queue = LocalQueue(clock=clock)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [1, 2], timeout=WINDOW)  # both wake at this very instant
    clock.advance(WINDOW)
    crew.join()
    assert [call.exception() is None for call in calls] == [True, False]


def test_each_bucket_is_freed_by_its_own_grant(clock, crew):
    """One timer for all freed every bucket at once."""
    queue = LargeBotQueue(limit(max_concurrency=2), clock=clock)
    queue.acquire(0)
    clock.advance(3)
    queue.acquire(1)
    first, second = in_line(queue, crew, clock, [2, 3])
    clock.advance(WINDOW - 3)
    assert first.now().shard_id == 2
    clock.settle(1)
    assert not second.done()
    clock.advance(3)
    second.now()


def test_a_session_that_was_refused_waits_its_turn_like_any_other(clock, crew):
    """Identifying again past the queue loops through the day's budget."""
    queue = LargeBotQueue(limit(10, 10, 600.0), clock=clock)
    queue.acquire(0).rejected()
    again, other = in_line(queue, crew, clock, [0, 1])
    assert queue.snapshot().limit.remaining == 9
    clock.advance(2 * WINDOW)
    assert again.now().remaining == 8
    clock.settle(1)
    assert not other.done()
    queue.close()


def test_who_times_out_and_comes_back_can_ask_for_its_old_place(clock, crew):
    """A client that times out goes back to the tail, and behind a long line it never gets there."""
    queue = LocalQueue(clock=clock)
    queue.acquire(9)
    (gone,) = in_line(queue, crew, clock, [1], timeout=2.0)
    clock.advance(1)
    in_line(queue, crew, clock, [2])
    clock.advance(1)
    gone.exception(10)
    clock.settle(1)
    (back,) = in_line(queue, crew, clock, [1], priority=2.0)
    clock.advance(WINDOW - 2)
    assert back.now().shard_id == 1
    queue.close()
