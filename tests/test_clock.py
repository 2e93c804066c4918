"""The system clock's conditions: one thread waits on each."""

from __future__ import annotations

import threading

import pytest

from gateway_queue_sync.clock import SYSTEM_CLOCK


@pytest.fixture
def lock():
    lock = threading.RLock()
    with lock:
        yield lock


def test_a_wait_lets_go_of_the_lock_and_takes_it_back(lock):
    condition = SYSTEM_CLOCK.condition(lock)

    def wake():
        with lock:
            condition.notify()

    thread = threading.Thread(target=wake)
    thread.start()
    condition.wait(30)
    assert lock._is_owned()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("timeout", [-1.0, 0.0, 0.000_01, 0.01])
def test_a_wait_that_is_not_notified_ends(lock, timeout):
    SYSTEM_CLOCK.condition(lock).wait(timeout)
    assert lock._is_owned()
