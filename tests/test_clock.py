"""The system clock: its times, and its conditions, on each of which one thread waits."""

from __future__ import annotations

import pickle
import threading
import time

import pytest

from gateway_queue_sync.clock import SYSTEM_CLOCK, make_small


def assert_owned(lock):
    """Releasing a lock fails if the thread does not have it."""
    lock.release()
    lock.acquire()


@pytest.fixture
def lock():
    lock = threading.RLock()
    with lock:
        yield lock


def test_a_notified_wait_lets_go_of_the_lock_takes_it_back_and_says_so(lock):
    condition = SYSTEM_CLOCK.condition(lock)

    def wake():
        with lock:
            condition.notify()

    thread = threading.Thread(target=wake)
    thread.start()
    assert condition.wait(30) is True
    assert_owned(lock)
    thread.join(30)
    assert not thread.is_alive()
    assert condition.wait(0.001) is False


@pytest.mark.parametrize("timeout", [-1.0, 0.0, 0.000_01, 0.01])
def test_a_wait_that_is_not_notified_ends(lock, timeout):
    SYSTEM_CLOCK.condition(lock).wait(timeout)
    assert_owned(lock)


def test_a_timed_wait_ends_no_later_than_it_was_asked_to(lock):
    """A little earlier: the queue looks at the clock and waits again for the rest."""
    condition = SYSTEM_CLOCK.condition(lock)
    late = []
    for _ in range(20):
        deadline = time.perf_counter() + 0.01
        condition.wait(0.01)
        late.append(time.perf_counter() - deadline)
    assert min(late) < 0


def test_a_condition_that_was_made_small_works(lock):
    condition = threading.Condition(lock)
    make_small(condition)
    assert condition.wait(0.001) is False
    condition.notify_all()


@pytest.mark.skipif(
    not hasattr(time, "CLOCK_BOOTTIME"), reason="no clock here counts suspended time"
)
def test_the_system_clock_counts_the_time_for_which_the_machine_was_suspended():
    before_us = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
    shown_us = SYSTEM_CLOCK.now_us()
    assert before_us <= shown_us <= time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def test_the_wall_clock_is_that_of_the_machine():
    assert abs(SYSTEM_CLOCK.wall_us() - time.time() * 1_000_000) < 1_000_000


def test_threads_inside_a_queue_cost_nothing_on_the_system_clock():
    inside = SYSTEM_CLOCK.inside()
    with inside, SYSTEM_CLOCK.inside(worker=True) as again:
        assert again is None
    assert inside is SYSTEM_CLOCK.inside(worker=True)


def test_there_is_one_system_clock():
    assert pickle.loads(pickle.dumps(SYSTEM_CLOCK)) is SYSTEM_CLOCK
    assert repr(SYSTEM_CLOCK) == "SystemClock()"
