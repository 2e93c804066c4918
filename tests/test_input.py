"""Nonsense from callers: each call raises an error that names it, and loses nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
from test_waiting import limit

from gateway_queue_sync import LargeBotQueue, LocalQueue, NoOpQueue

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[NoOpQueue, LocalQueue, lambda: LargeBotQueue(limit())])
def queue(request):
    queue = request.param()
    yield queue
    assert queue.snapshot().granted == 0
    assert queue.snapshot().waiting == 0
    assert queue.acquire(0, timeout=0)


@pytest.mark.parametrize(
    ("shard_id", "error", "text"),
    [
        (-1, ValueError, "shard_id must be at least 0, not -1"),
        (True, TypeError, "not the bool True"),
        (1.0, TypeError, "not float 1.0"),
        ("1", TypeError, "not str '1'"),
        (None, TypeError, "not NoneType None"),
    ],
)
@pytest.mark.parametrize("method", ["acquire", "try_acquire", "enqueue"])
def test_shard_ids(queue, method, shard_id, error, text):
    with pytest.raises(error, match=text):
        getattr(queue, method)(shard_id)


class Index:
    def __index__(self):
        return 7


def test_whatever_is_an_integer_is_a_shard_id():
    permit = LocalQueue().acquire(Index())
    assert type(permit.shard_id) is int
    assert permit.shard_id == 7


@pytest.mark.parametrize(
    ("timeout", "error", "text"),
    [
        (-0.001, ValueError, "timeout must not be negative, not -0.001"),
        (-INF, ValueError, "not -inf"),
        (-(10**400), ValueError, "not -inf"),
        (NAN, ValueError, "not NaN"),
        (True, TypeError, "timeout must be a number, not bool True"),
        ("5", TypeError, "not str '5'"),
    ],
)
def test_timeouts(queue, timeout, error, text):
    with pytest.raises(error, match=text):
        queue.acquire(0, timeout=timeout)


@pytest.mark.parametrize(
    ("priority", "error"),
    [(NAN, ValueError), (INF, ValueError), (True, TypeError), ("1", TypeError), (None, TypeError)],
)
@pytest.mark.parametrize("method", ["acquire", "enqueue"])
def test_priorities(queue, method, priority, error):
    with pytest.raises(error, match="priority must be"):
        getattr(queue, method)(0, priority=priority)


@pytest.mark.parametrize("priority", [1e308, -1e308, 10**300, 0])
def test_any_finite_priority_will_do(priority):
    assert LocalQueue().acquire(0, priority=priority)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("interval", 0, ValueError),
        ("interval", -5, ValueError),
        ("interval", NAN, ValueError),
        ("interval", INF, ValueError),
        ("interval", 1e30, ValueError),
        ("interval", True, TypeError),
        ("interval", "5", TypeError),
        ("margin", -0.1, ValueError),
        ("margin", INF, ValueError),
        ("margin", None, TypeError),
        ("observer", 5, TypeError),
    ],
)
def test_settings(name, value, error):
    for make in (LocalQueue, lambda **settings: LargeBotQueue(limit(), **settings)):
        with pytest.raises(error, match=f"{name} must"):
            make(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("period", 0, ValueError),
        ("reserve", -1, ValueError),
        ("reserve", 1.5, TypeError),
        ("reserve", 1000, ValueError),
        ("refresh", "no", TypeError),
        ("when_exhausted", "maybe", ValueError),
        ("when_unreachable", "maybe", ValueError),
    ],
)
def test_settings_of_a_large_bots_queue(name, value, error):
    with pytest.raises(error, match=name):
        LargeBotQueue(limit(), **{name: value})


def test_a_large_bots_queue_needs_a_limit_or_what_reads_it():
    with pytest.raises(TypeError, match="limit must be a SessionStartLimit if there is no refresh"):
        LargeBotQueue(None)


def test_a_large_bots_queue_needs_a_limit():
    with pytest.raises(TypeError, match="SessionStartLimit, not dict"):
        LargeBotQueue({"total": 5})


@pytest.mark.parametrize("attempt", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_queue_in_memory_refuses_to_be_copied_and_says_why(queue, attempt):
    with pytest.raises(TypeError, match=r"live in this process.*SqliteQueue"):
        attempt(queue)
