"""Events: plain values, with the number of their call."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from gateway_queue_sync import (
    AcquireTimeout,
    BudgetExhausted,
    LargeBotQueue,
    LimitUpdated,
    LocalQueue,
    PermitReported,
    Report,
    SessionStartLimit,
    ShardGranted,
    ShardLeft,
    ShardWaiting,
)

ABOUT_A_CALL = [
    ShardWaiting(3, 0, position=1, eta=5.25, waiter=7),
    ShardGranted(3, 0, waited=5.25, remaining=None, waiter=7),
    ShardLeft(3, waited=1.0, reason="timeout", waiter=7),
    PermitReported(3, 0, Report.SENT, waiter=7),
]
OTHERS = [BudgetExhausted(0, 60.0), LimitUpdated(SessionStartLimit(10, 9, 60.0, 1))]


def kind(event):
    return type(event).__name__


@pytest.mark.parametrize("event", ABOUT_A_CALL + OTHERS, ids=kind)
def test_an_event_is_a_value(event):
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, 0)
    assert pickle.loads(pickle.dumps(event)) == event
    assert hash(event) == hash(dataclasses.replace(event))


@pytest.mark.parametrize("event", ABOUT_A_CALL, ids=kind)
def test_the_number_of_the_call_shows_and_is_not_compared(event):
    assert "waiter=7" in repr(event)
    other = dataclasses.replace(event, waiter=8)
    assert other == event
    assert pickle.loads(pickle.dumps(other)).waiter == 8


@pytest.mark.parametrize("event", ABOUT_A_CALL, ids=kind)
def test_an_event_can_be_made_without_the_number_of_a_call(event):
    given = [getattr(event, f.name) for f in dataclasses.fields(event) if f.name != "waiter"]
    assert type(event)(*given).waiter == 0


@pytest.mark.parametrize("event", OTHERS, ids=kind)
def test_what_is_about_no_call_has_no_number(event):
    assert not hasattr(event, "waiter")


# --- the events of a queue ------------------------------------------------------------------------


class Seen(list):
    def of(self, shard_id):
        return [event for event in self if getattr(event, "shard_id", None) == shard_id]

    def waiters(self, shard_id):
        return [event.waiter for event in self.of(shard_id)]


@pytest.fixture
def seen():
    return Seen()


@pytest.fixture
def queue(clock, seen):
    with LocalQueue(clock=clock, observer=seen.append) as queue:
        yield queue


def test_all_events_of_a_call_have_its_number(queue, clock, crew, seen):
    queue.acquire(0)
    call = crew(queue.acquire, 1)
    clock.settle(1)
    clock.advance(5.25)
    call.now().sent()
    assert [type(event) for event in seen.of(1)] == [ShardWaiting, ShardGranted, PermitReported]
    assert len(set(seen.waiters(1))) == 1
    assert seen.waiters(1)[0] not in (0, *seen.waiters(0))


def test_calls_for_the_same_shard_are_told_apart(queue, clock, crew, seen):
    queue.acquire(0)
    calls = [crew(queue.acquire, 1) for _ in range(2)]
    clock.settle(2)
    clock.advance(5.25)
    clock.settle(1)
    clock.advance(5.25)
    assert all(call.now() for call in calls)
    numbers = seen.waiters(1)
    assert sorted(numbers[:2]) == sorted(numbers[2:])
    assert len(set(numbers)) == 2


def test_a_call_that_leaves_has_its_number_too(queue, clock, crew, seen):
    queue.acquire(0)
    call = crew(queue.acquire, 1, timeout=1.0)
    clock.settle(1)
    clock.advance(1)
    with pytest.raises(AcquireTimeout):
        call.now()
    assert [type(event) for event in seen.of(1)] == [ShardWaiting, ShardLeft]
    assert len(set(seen.waiters(1))) == 1
    assert seen.waiters(1)[0] not in (0, *seen.waiters(0))


def test_a_free_permit_and_the_reports_on_it_have_one_number(queue, seen):
    queue.acquire(0).rejected()
    assert [type(event) for event in seen] == [ShardGranted, PermitReported]
    assert len({event.waiter for event in seen}) == 1
    assert seen[0].waiter > 0


def test_a_future_has_one_number(queue, clock, seen):
    queue.acquire(0)
    future = queue.enqueue(1)
    clock.settle(0)
    clock.advance(5.25)
    clock.settle(0)
    future.result(0).unused()
    assert [type(event) for event in seen.of(1)] == [ShardWaiting, ShardGranted, PermitReported]
    assert len(set(seen.waiters(1))) == 1


def test_a_future_that_a_callback_enqueues_has_its_events_in_order(clock, seen):
    """Its bucket opens while the worker still serves others."""
    limit = SessionStartLimit(1000, 1000, 0.0, 2)
    with LargeBotQueue(limit, clock=clock, observer=seen.append) as queue:
        queue.acquire(0)
        clock.advance(2)
        queue.acquire(1)
        futures = [queue.enqueue(2)]

        def enqueue(_):
            futures.append(queue.enqueue(3))
            clock.advance(2)

        futures[0].add_done_callback(enqueue)
        clock.settle(0)
        clock.advance(3.25)
        clock.settle(0)
        assert futures[1].result(5).shard_id == 3
        assert [type(event) for event in seen.of(3)] == [ShardWaiting, ShardGranted]


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_that_is_interrupted_with_its_permit_has_left(clock, crew, seen, waits):
    def observe(event):
        seen.append(event)
        if isinstance(event, ShardGranted) and event.shard_id == 1:
            raise KeyboardInterrupt

    with LocalQueue(clock=clock, observer=observe) as queue:
        if waits:
            queue.acquire(0)
        call = crew(queue.acquire, 1)
        if waits:
            clock.settle(1)
            clock.advance(5.25)
        with pytest.raises(KeyboardInterrupt):
            call.now()
    assert [type(event) for event in seen.of(1)][-2:] == [ShardGranted, ShardLeft]
    assert seen[-1].reason == "interrupted"
    assert len(set(seen.waiters(1))) == 1


def test_calls_in_two_queues_have_different_numbers(clock, seen):
    for _ in range(2):
        LocalQueue(clock=clock, observer=seen.append).acquire(0)
    assert len(set(seen.waiters(0))) == 2
