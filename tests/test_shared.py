"""Several queues with one account, as in several processes, on one fake clock.

What these tests call a process is a queue of its own on the account of the others; real processes are
in ``test_many_processes``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import random
import threading

import pytest
from accounts import NEVER_HEARD_OF, backend_of
from redis_servers import until
from test_waiting import in_line, limit, order

from gateway_queue_sync import (
    AcquireTimeout,
    LedgerError,
    PermitReported,
    QueueClosed,
    Report,
    SessionLimitExhausted,
    ShardGranted,
    ShardWaiting,
)
from gateway_queue_sync.clock import SYSTEM_CLOCK
from gateway_queue_sync.ledgers.shared import bounds, messages
from gateway_queue_sync.ledgers.shared.backend import Busy
from gateway_queue_sync.ledgers.shared.inquiry import peek
from gateway_queue_sync.queue import scheduler_of
from gateway_queue_sync.scheduler import Scheduler
from gateway_queue_sync.settings import Settings

pytestmark = pytest.mark.accounts("sqlite", "redis")

WINDOW = 5.25
GRACE = 0.1
LEASE = 5.0


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelno == logging.WARNING]


def cut_off(queue, monkeypatch):
    """Take the ledger out of a queue's reach, as if its process were stopped or its network gone."""

    def ask(request):
        raise LedgerError("out of reach") from OSError("no route")

    monkeypatch.setattr(backend_of(queue), "ask", ask)


def requests_of(queue, clock, monkeypatch, failure=None):
    """Return the list to which what the queue asks of its ledger is added, each with its time."""
    ask, asked = backend_of(queue).ask, []

    def noted(request):
        asked.append((clock.now_us() / 1e6, request))
        if failure is not None:
            raise failure from OSError("no route")
        return ask(request)

    monkeypatch.setattr(backend_of(queue), "ask", noted)
    return asked


@pytest.fixture
def two(account, clock):
    queues = [account.queue(limit(100, 100, 6000.0), clock=clock) for _ in range(2)]
    yield queues
    for queue in queues:
        queue.close()


# --- spacing and order ----------------------------------------------------------------------------


def test_the_window_is_one_for_all(two, clock):
    one, other = two
    one.acquire(0)
    assert other.try_acquire(1) is None
    clock.advance(WINDOW - 0.000_001)
    assert other.try_acquire(1) is None
    clock.advance(0.000_001)
    assert other.try_acquire(1).remaining == 98


def test_who_came_first_goes_first_whichever_process_it_is_in(two, clock, crew):
    two[0].acquire(99)
    calls = []
    for shard_id in range(6):
        calls += in_line(two[shard_id % 2], crew, clock, [shard_id])
        clock.advance(0.01)
    for left in range(5, -1, -1):
        clock.advance(WINDOW)
        clock.settle(left)
    assert [permit.shard_id for permit in crew.returned] == list(range(6))


def test_a_head_start_counts_over_processes(two, clock, crew):
    one, other = two
    one.acquire(99)
    in_line(one, crew, clock, [1])
    clock.advance(2)
    in_line(other, crew, clock, [2])
    in_line(other, crew, clock, [3], priority=3.0)
    in_line(one, crew, clock, [4], priority=-10.0)
    assert order(one.snapshot()) == [3, 1, 2, 4]
    clock.advance(WINDOW - 2)
    for left in range(3, -1, -1):
        clock.settle(left)
        clock.advance(WINDOW)
    assert [permit.shard_id for permit in crew.returned] == [3, 1, 2, 4]


def test_nobody_barges_past_a_line_in_another_process(two, clock, crew):
    one, other = two
    one.acquire(99)
    (call,) = in_line(one, crew, clock, [1])
    clock.advance(WINDOW - 0.000_001)
    clock.settle(1)
    with clock_stopped_for(one):
        clock.advance(0.000_001)
        assert other.try_acquire(2) is None
    assert call.now().shard_id == 1


@contextlib.contextmanager
def clock_stopped_for(queue):
    """Hold up the worker of a queue when it is about to ask, as a busy machine does."""
    backend, go_on = backend_of(queue), threading.Event()
    ask = backend.ask

    def held_up(request):
        assert go_on.wait(20)
        return ask(request)

    backend.ask = held_up
    try:
        yield
    finally:
        backend.ask = ask
        go_on.set()


def test_futures_and_threads_of_all_processes_stand_in_one_line(two, clock, crew):
    one, other = two
    one.acquire(99)
    first = one.enqueue(1)
    clock.settle(0)
    clock.advance(0.01)
    (second,) = in_line(other, crew, clock, [2])
    clock.advance(0.01)
    third = one.enqueue(3)
    clock.settle(1)
    for future, parked in ((first, 1), (second, 0), (third, 0)):
        assert not future.done()
        clock.advance(WINDOW)
        assert future.result(10)
        clock.settle(parked)


def test_buckets_do_not_wait_for_each_other(account, clock, crew):
    one, other = (account.queue(limit(max_concurrency=2), clock=clock) for _ in range(2))
    one.acquire(0)
    in_line(other, crew, clock, [2])
    assert other.acquire(1).waited == 0.0
    clock.advance(WINDOW)


# --- who is gone ----------------------------------------------------------------------------------


def test_a_process_that_is_stuck_costs_one_grace_and_not_the_line(two, clock, crew, monkeypatch):
    stuck, other = two
    stuck.acquire(99)
    in_line(stuck, crew, clock, [1, 3, 5])
    clock.advance(0.01)
    (call,) = in_line(other, crew, clock, [2])
    with clock_stopped_for(stuck):
        clock.advance(WINDOW + GRACE - 0.01 - 0.000_001)
        assert not call.done()
        clock.advance(0.000_001)
        assert call.now().waited == pytest.approx(WINDOW + GRACE - 0.01)
    stuck.close()


def test_a_process_that_was_passed_over_counts_no_more_until_it_asks_again(
    two, account, clock, crew
):
    stuck, other = two
    stuck.acquire(99)
    in_line(stuck, crew, clock, [1])
    clock.advance(0.01)
    calls = in_line(other, crew, clock, [2, 4])
    with clock_stopped_for(stuck):
        clock.advance(WINDOW + GRACE)
        calls[0].now()
        assert order(other.snapshot()) == [1, 4]  # it keeps its place for when it comes back
        clock.advance(WINDOW)
        assert calls[1].now().shard_id == 4  # without another grace
    stuck.close()


def test_who_comes_back_has_its_old_place(two, clock, crew):
    stuck, other = two
    stuck.acquire(99)
    (first,) = in_line(stuck, crew, clock, [1])
    clock.advance(0.01)
    calls = in_line(other, crew, clock, [2, 4])
    with clock_stopped_for(stuck):
        clock.advance(WINDOW + GRACE)
        calls[0].now()
    clock.settle(2)  # it asked again, and stands before 4
    assert order(other.snapshot()) == [1, 4]
    clock.advance(WINDOW)
    assert first.now().shard_id == 1
    assert not calls[1].done()
    clock.advance(WINDOW)
    calls[1].now()


def test_who_is_not_heard_of_for_a_lease_costs_nobody_a_grace(account, clock, crew, monkeypatch):
    gone, other = (account.queue(clock=clock, lease=LEASE) for _ in range(2))
    gone.acquire(99)
    in_line(gone, crew, clock, [1])
    cut_off(gone, monkeypatch)
    clock.advance(LEASE + 0.1)
    (call,) = in_line(other, crew, clock, [2])
    clock.advance(WINDOW - LEASE - 0.1)
    assert call.now().waited == pytest.approx(WINDOW - LEASE - 0.1)
    gone.close()


def test_who_is_not_heard_of_for_a_minute_is_no_longer_seen(account, clock, crew, monkeypatch):
    gone, other = (account.queue(clock=clock, lease=LEASE) for _ in range(2))
    gone.acquire(99)
    in_line(gone, crew, clock, [1])
    assert order(other.snapshot()) == [1]
    cut_off(gone, monkeypatch)
    clock.advance(60.001)
    other.snapshot()  # any request removes it
    assert other.snapshot().waiting == 0
    gone.close()


def test_those_who_wait_are_heard_of_three_times_in_a_lease(account, clock, crew, monkeypatch):
    queue, other = (account.queue(clock=clock, lease=LEASE, interval=60) for _ in range(2))
    queue.acquire(99)
    in_line(queue, crew, clock, [1, 2])
    clock.advance(0.3)
    clock.settle(2)  # the ledger knows of both
    heard = requests_of(queue, clock, monkeypatch)
    for _ in range(10 * 51):
        clock.advance(LEASE / 3 / 50)
        clock.settle(2)
    assert len(heard) == 10
    for earlier, later in itertools.pairwise(at for at, _ in heard):
        assert later - earlier == pytest.approx(LEASE / 3, abs=LEASE / 3 / 50 + 0.001)
    assert other.snapshot().waiting == 2
    queue.close()


@pytest.mark.parametrize("freed_by", ["unused", "update"])
def test_a_bucket_that_opens_by_surprise_is_for_who_is_first(account, clock, crew, freed_by):
    one, other = (account.queue(clock=clock, lease=LEASE) for _ in range(2))
    one.update(limit(10, 1 if freed_by == "update" else 10, 600.0))
    permit = one.acquire(99)
    (first,) = in_line(other, crew, clock, [1])
    clock.advance(0.01)
    (second,) = in_line(one, crew, clock, [2])
    if freed_by == "unused":
        permit.unused()
    else:
        clock.advance(WINDOW)
        clock.settle(2)
        one.update(limit(10, 9, 600.0))
    clock.advance(0.15)
    clock.settle(2)
    assert one.try_acquire(3) is None
    while not first.done():
        assert not second.done()
        clock.advance(0.1)
        crew.settle(clock)
    clock.advance(WINDOW)
    assert second.now().shard_id == 2


def test_a_process_that_is_stuck_costs_a_third_of_a_lease_after_a_surprise(
    account, clock, crew, monkeypatch
):
    stuck, other = (account.queue(clock=clock, lease=LEASE) for _ in range(2))
    permit = other.acquire(99)
    in_line(stuck, crew, clock, [1])
    clock.advance(0.01)
    (call,) = in_line(other, crew, clock, [2])
    cut_off(stuck, monkeypatch)
    permit.unused()
    clock.settle(2)
    clock.advance(LEASE / 3 + GRACE - 0.001)
    clock.settle(2)
    assert not call.done()
    clock.advance(0.001)
    assert call.now().shard_id == 2
    stuck.close()


def test_who_only_tries_passes_nobody(two, clock, crew):
    stuck, other = two
    stuck.acquire(99)
    in_line(stuck, crew, clock, [1])
    with clock_stopped_for(stuck):
        clock.advance(WINDOW + 10 * GRACE)
        assert other.try_acquire(2) is None
    stuck.close()


def test_closing_one_queue_leaves_the_others_alone(two, clock, crew):
    one, other = two
    one.acquire(99)
    calls = in_line(one, crew, clock, [1, 3])
    future = one.enqueue(5)
    clock.settle(2)
    (waits,) = in_line(other, crew, clock, [2])
    one.close()
    for call in (*calls, future):
        assert isinstance(call.exception(10), QueueClosed)
    crew.threads[0].join(10)
    crew.threads[1].join(10)
    clock.settle(1)  # its worker has sent who has left
    assert order(other.snapshot()) == [2]
    clock.advance(WINDOW + GRACE)
    assert waits.now().shard_id == 2


def test_trying_leaves_nothing_behind(two, clock):
    one, other = two
    one.acquire(0)
    assert other.try_acquire(1) is None
    with pytest.raises(AcquireTimeout):
        other.acquire(2, timeout=0)
    assert one.snapshot().waiting == 0
    clock.advance(WINDOW)
    assert one.acquire(3).waited == 0.0


@contextlib.contextmanager
def behind_a_stopped_process(two, clock, crew):
    """Hold up the process whose head is the first, until its time is over."""
    one, other = two
    one.acquire(99)
    in_line(one, crew, clock, [1])
    ask = backend_of(other).ask

    def takes_time(request):
        reply = ask(request)
        clock.advance(0.001)
        return reply

    backend_of(other).ask = takes_time
    with clock_stopped_for(one):
        clock.advance(WINDOW + 1.0)
        yield
    backend_of(other).ask = ask
    crew.settle(clock)
    clock.advance(WINDOW + GRACE)


def test_trying_behind_a_stopped_process_takes_one_round_trip(two, clock, crew):
    _, other = two
    with behind_a_stopped_process(two, clock, crew):
        tries = crew(other.acquire, 2, timeout=0)
        assert isinstance(tries.exception(5), AcquireTimeout)


def test_trying_takes_one_round_trip_where_the_next_of_its_line_gets_the_permit(two, clock, crew):
    """The one that waits may pass a stopped process; the one before it, which only tries, may not."""
    _, other = two
    with behind_a_stopped_process(two, clock, crew):
        with clock_stopped_for(other):
            looks = crew(other.snapshot)
            until(lambda: scheduler_of(other).ledger._session._in_flight is not None, "a request")
            waits = crew(other.acquire, 3)
            tries = crew(other.acquire, 2, timeout=0, priority=1.0)
            until(lambda: len(list(scheduler_of(other).lines.waiters())) == 2, "both")
        assert isinstance(tries.exception(5), AcquireTimeout)
        assert waits.now().shard_id == 3
        looks.now()


def test_who_only_tries_inherits_no_place(two, crew, monkeypatch):
    one, other = two
    ask = backend_of(one).ask

    def passed_meanwhile(request):
        monkeypatch.undo()
        crew(other.acquire, 2).now()
        return ask(request)

    monkeypatch.setattr(backend_of(one), "ask", passed_meanwhile)
    assert one.try_acquire(1) is None
    assert other.snapshot().waiting == 0


def test_a_timeout_leaves_the_line_of_all(two, clock, crew):
    one, other = two
    one.acquire(99)
    (gone,) = in_line(one, crew, clock, [1], timeout=1.0)
    clock.advance(0.01)
    (waits,) = in_line(other, crew, clock, [2])
    clock.advance(0.99)
    with pytest.raises(AcquireTimeout) as caught:
        gone.now()
    assert caught.value.eta == pytest.approx(WINDOW - 1)
    clock.settle(1)
    assert order(one.snapshot()) == [2]
    clock.advance(
        WINDOW - 1 + GRACE
    )  # unless it has asked meanwhile, it takes itself for the second
    assert waits.now().shard_id == 2


def test_a_head_is_told_in_time_when_others_have_left_behind_it(two, clock, crew):
    one, _ = two
    one.acquire(99)
    (head,) = in_line(one, crew, clock, [1], timeout=2.0)
    (gone,) = in_line(one, crew, clock, [2], timeout=1.0)
    for call in (gone, head):
        clock.advance(1)
        assert isinstance(call.exception(10), AcquireTimeout)


# --- the budget -----------------------------------------------------------------------------------


def test_the_budget_is_one_for_all(account, clock):
    queues = [account.queue(limit(5, 5, 600.0, 16), clock=clock) for _ in range(4)]
    granted = [queue.try_acquire(n) for n, queue in enumerate(queues * 4)]
    assert sum(permit is not None for permit in granted) == 5
    assert {queue.snapshot().limit.remaining for queue in queues} == {0}
    clock.advance(600)
    granted = [queue.try_acquire(n) for n, queue in enumerate(queues * 4)]
    assert sum(permit is not None for permit in granted) == 5


def test_each_process_keeps_its_own_reserve(account, clock):
    careful = account.queue(limit(10, 3, 600.0), clock=clock, reserve=2, when_exhausted="raise")
    other = account.queue(clock=clock)
    careful.acquire(0)
    with pytest.raises(SessionLimitExhausted):
        careful.acquire(1)
    clock.settle(0)  # it has left the line of all
    clock.advance(WINDOW)
    assert other.acquire(2).remaining == 1


def test_an_update_in_one_process_is_seen_by_all_when_they_ask_next(account, clock, crew):
    one, other = (account.queue(limit(10, 0, 600.0), clock=clock, lease=LEASE) for _ in range(2))
    (call,) = in_line(one, crew, clock, [1])
    other.update(limit(10, 7, 600.0, max_concurrency=4))
    clock.settle(1)
    clock.advance(LEASE / 3)
    permit = call.now()
    assert (permit.remaining, permit.bucket) == (6, 1)
    assert one.snapshot().limit.total == 10
    assert len(one.snapshot().buckets) == 4


def test_an_update_wakes_those_of_its_own_process_at_once(two, clock, crew):
    one, _ = two
    one.update(limit(10, 0, 600.0))
    (call,) = in_line(one, crew, clock, [1])
    one.update(limit(10, 7, 600.0))
    assert call.now().remaining == 6


def test_those_who_waited_for_a_reset_go_in_their_order(account, clock, crew):
    """A window that is long over lets nobody pass: graces count from the reset."""
    one, other = (account.queue(limit(10, 0, 30.0), clock=clock) for _ in range(2))
    in_line(one, crew, clock, [1])
    clock.advance(0.01)
    in_line(other, crew, clock, [2])
    with clock_stopped_for(one):
        clock.advance(29.99)
        assert other.try_acquire(7) is None
        assert not crew.returned
    clock.settle(1)
    assert [permit.shard_id for permit in crew.returned] == [1]
    clock.advance(WINDOW)


def test_one_process_reads_the_limit_for_all(account, clock, crew):
    asked = []

    def refresh():
        asked.append(threading.current_thread())
        return limit(10, 8, 600.0, max_concurrency=4)

    queues = [account.queue(limit(10, 0, 100.0, 4), clock=clock, refresh=refresh) for _ in range(4)]
    calls = [call for n, q in enumerate(queues) for call in in_line(q, crew, clock, [n])]
    until(lambda: asked, "the read at the first use")
    crew.settle(clock)
    assert len(asked) == 1
    asked.clear()
    clock.advance(100)
    until(lambda: asked, "the read at the reset")
    for _ in range(10):  # who waits for the answer looks each 0.1 s
        crew.settle(clock)
        clock.advance(0.1)
    assert sorted(call.now().remaining for call in calls) == [4, 5, 6, 7]
    assert len(asked) == 1


def answers_once(first, entered, leave):
    """Return a refresh that answers when its queue begins, and then no more."""
    answers = [first]

    def refresh():
        if answers:
            return answers.pop()
        entered.set()
        leave.wait(20)
        raise OSError

    return refresh


def wait_for_read(queue):
    """Wait until the ledger has the limit that a queue reads when it begins."""
    until(lambda: not scheduler_of(queue).reader.reading)
    queue.snapshot()


def test_a_process_that_dies_while_it_reads_the_limit_costs_five_seconds_and_a_grace(
    account, clock, crew, monkeypatch
):
    entered, leave = threading.Event(), threading.Event()
    known = limit(10, 0, 100.0)
    one = account.queue(known, clock=clock, refresh=answers_once(known, entered, leave))
    wait_for_read(one)
    other = account.queue(clock=clock, refresh=lambda: limit(10, 8, 600.0))
    clock.advance(100)
    (dead,) = in_line(one, crew, clock, [1])
    assert entered.wait(20)
    clock.advance(0.01)
    (call,) = in_line(other, crew, clock, [2])
    cut_off(one, monkeypatch)
    for _ in range(10):
        clock.advance(0.49)
        clock.settle(2)
    assert not call.done()
    for _ in range(3):
        clock.advance(GRACE)
        crew.settle(clock)
    assert call.now().remaining == 9  # by the last known total
    one.close()
    leave.set()
    assert isinstance(dead.exception(10), QueueClosed)


def test_a_process_that_reads_the_limit_for_long_keeps_its_turn_and_then_counts_on_the_last_total(
    account, clock, crew
):
    entered, leave = threading.Event(), threading.Event()
    known = limit(10, 0, 100.0)
    slow = answers_once(known, entered, leave)
    one = account.queue(known, clock=clock, refresh=slow, lease=1.0)
    wait_for_read(one)
    other = account.queue(clock=clock, refresh=slow, lease=1.0)
    clock.advance(100)
    (first,) = in_line(one, crew, clock, [1])
    assert entered.wait(20)
    clock.advance(0.01)
    (second,) = in_line(other, crew, clock, [2])
    for _ in range(49):
        clock.advance(0.1)
        clock.settle(2)
    for _ in range(5):
        clock.advance(0.1)
        crew.settle(clock)
    assert first.now().remaining == 9
    assert not second.done()
    clock.advance(WINDOW)
    crew.settle(clock)
    assert second.now().remaining == 8
    leave.set()


# --- limits that processes begin with -------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "then"),
    [
        (limit(10, 10, 900.0), (10, 6, 590.0)),  # a restart refills nothing
        (limit(10, 6, 900.0), (10, 6, 590.0)),
        (limit(10, 2, 30.0), (10, 2, 590.0)),  # Discord knows of more
        (limit(10, 2, 900.0), (10, 2, 900.0)),
        (limit(10, 2, 0.0), (10, 2, 590.0)),
        (limit(100, 100, 900.0), (100, 6, 590.0)),  # total is taken as given
        (limit(4, 4, 900.0), (4, 4, 900.0)),
        (None, (10, 6, 590.0)),
    ],
)
def test_a_limit_given_at_a_start_meets_the_one_that_is_stored(account, clock, given, then):
    queue = account.queue(limit(10, 8, 600.0), clock=clock)
    queue.acquire(0)
    clock.advance(10)
    queue.acquire(0)
    seen = account.queue(given, clock=clock).snapshot().limit
    assert (seen.total, seen.remaining, seen.resets_in) == then


def test_a_limit_given_after_the_period_is_taken_as_it_is(account, clock):
    account.queue(limit(10, 2, 600.0), clock=clock)
    clock.advance(600)
    seen = account.queue(limit(10, 9, 500.0), clock=clock).snapshot().limit
    assert (seen.remaining, seen.resets_in) == (9, 500.0)


def test_without_a_limit_it_is_the_stored_one_or_discords_default(account, clock):
    queue = account.queue(clock=clock)
    assert queue.snapshot().limit.total == 1000
    assert len(queue.snapshot().buckets) == 1
    queue.update(limit(50, 40, 600.0, max_concurrency=3))
    again = account.queue(clock=clock).snapshot()
    assert (again.limit.remaining, len(again.buckets)) == (40, 3)


def test_a_crash_loop_cannot_burn_the_budget_unseen(account, clock):
    granted = 0
    for _ in range(50):
        queue = account.queue(limit(20, 20, 86_400.0), clock=clock, reserve=5)
        clock.advance(WINDOW)
        granted += queue.try_acquire(0) is not None
        backend_of(queue).close()  # and not the queue: it crashes
    assert granted == 15


def test_a_crash_loop_whose_limit_says_that_its_reset_is_due_cannot_either(account, clock):
    granted = 0
    for _ in range(50):
        queue = account.queue(limit(20, 15, 0.0), clock=clock)
        clock.advance(WINDOW)
        granted += queue.try_acquire(0) is not None
        backend_of(queue).close()
    assert granted == 16  # one of a new period, and what was given


def test_other_buckets_given_at_a_start_begin_from_the_latest_grant(account, clock):
    one = account.queue(limit(max_concurrency=4), clock=clock)
    one.acquire(0)
    clock.advance(1)
    other = account.queue(limit(max_concurrency=2), clock=clock)
    assert {bucket.ready_in for bucket in other.snapshot().buckets} == {WINDOW - 1}
    assert one.try_acquire(1) is None


def test_an_exception_before_the_lines_are_divided_anew_stops_nobody(
    two, clock, monkeypatch, caplog
):
    one, other = two
    divide, failures = Scheduler.limit_changed, [MemoryError("no memory left")]

    def fail_once(scheduler):
        if failures and scheduler is scheduler_of(other):
            raise failures.pop()
        divide(scheduler)

    monkeypatch.setattr(Scheduler, "limit_changed", fail_once)
    one.update(limit(max_concurrency=2))
    clock.advance(WINDOW)
    assert [other.acquire(shard_id, 5.0).bucket for shard_id in range(2)] == [0, 1]
    assert not failures
    assert "no memory left" in caplog.text


def test_a_reserve_that_is_not_less_than_the_stored_total_is_refused(account, clock):
    account.queue(limit(10, 10), clock=clock)
    with pytest.raises(ValueError, match=r"total \(10\) must be more than the reserve \(10\)"):
        account.queue(clock=clock, reserve=10)


# --- settings that differ -------------------------------------------------------------------------


def test_the_larger_window_wins_with_a_warning_while_its_process_lives(account, clock, caplog):
    longer = account.queue(clock=clock, interval=8.0, margin=0.1, lease=LEASE)
    shorter = account.queue(clock=clock, interval=5.0, margin=0.5, lease=LEASE)
    (record,) = warnings_in(caplog)
    assert (
        "interval=8, margin=0.5 count, the largest of all; this one has 5 and 0.5"
        in record.getMessage()
    )
    clock.advance(0.4)
    assert shorter.try_acquire(0) is not None
    assert shorter.snapshot().buckets[0].ready_in == 8.5
    longer.close()
    clock.advance(LEASE + 8.5)
    assert shorter.try_acquire(0) is not None
    assert shorter.snapshot().buckets[0].ready_in == 5.5
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"margin": 0.01}, ValueError, "margin must be at least 0.02 s"),
        ({"margin": 0}, ValueError, "margin must be at least 0.02 s"),
        ({"lease": 0.1}, ValueError, "lease must be more than 0.1 s"),
        ({"lease": float("inf")}, ValueError, "lease must be finite"),
        ({"interval": 0}, ValueError, "interval must be more than 0 s"),
        ({"period": True}, TypeError, "period must be a number"),
        ({"when_exhausted": "stop"}, ValueError, "when_exhausted"),
        ({"reserve": -1}, ValueError, "reserve must be at least 0"),
        ({"observer": 5}, TypeError, "observer must be callable"),
        ({"nmae": "x"}, TypeError, "unexpected keyword argument 'nmae'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(account, clock, settings, error, words):
    account.queue(clock=clock)
    with pytest.raises(error, match=words):
        account.queue(clock=clock, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval": 60.1}, "interval must be 1e-06 to 60 s, not 60.1 s"),
        ({"margin": 10.5}, "margin must be 0 to 10 s, not 10.5 s"),
        ({"lease": 61}, "lease must be 0.1 to 60 s, not 61 s"),
        ({"period": 3 * 86_400}, "period must be 1e-06 to 172800 s, not 259200 s"),
    ],
)
def test_a_ledger_refuses_what_would_hold_up_all(account, clock, settings, words):
    other = account.queue(clock=clock)
    with pytest.raises(LedgerError, match=words):
        account.queue(clock=clock, **settings)
    assert other.acquire(0).waited == 0.0
    assert other.snapshot().buckets[0].ready_in == WINDOW


def refuse_what(queue, monkeypatch, is_refused):
    """Have the ledger find a request out of bounds if the test says so."""
    ask = backend_of(queue).ask

    def answer(request):
        return ask(request._replace(reserve=-1) if is_refused(request) else request)

    monkeypatch.setattr(backend_of(queue), "ask", answer)


def test_a_request_that_is_refused_fails_its_callers_and_no_other(two, clock, monkeypatch):
    one, _ = two
    one.acquire(99)
    refuse_what(one, monkeypatch, lambda request: any(line.waiters for line in request.lines))
    with pytest.raises(LedgerError, match="refuses this process: reserve must be 0 to"):
        one.try_acquire(1)
    with pytest.raises(LedgerError, match="reserve must be"):
        one.enqueue(2).result(20)
    monkeypatch.undo()
    clock.advance(WINDOW)
    assert one.acquire(3).shard_id == 3


def test_a_process_that_is_refused_for_good_logs_that_once(two, clock, monkeypatch, caplog):
    one, _ = two
    refuse_what(one, monkeypatch, lambda request: True)
    for _ in range(5):
        with pytest.raises(LedgerError, match="reserve must be"):
            one.try_acquire(1)
        clock.advance(5)
    assert len(warnings_in(caplog)) == 1


def test_an_update_that_is_refused_says_so(two, monkeypatch):
    one, _ = two
    refuse_what(one, monkeypatch, lambda request: request.limit is not None)
    with pytest.raises(LedgerError, match="reserve must be"):
        one.update(limit(50, 50))
    assert one.snapshot().limit.remaining == 100


def test_numbers_that_not_every_ledger_can_hold_are_refused(two):
    one, _ = two
    with pytest.raises(ValueError, match="shard_id must be at most 4503599627370496"):
        one.acquire((1 << 52) + 1)
    with pytest.raises(ValueError, match="total must be at most"):
        one.update(limit(1 << 60, 5))
    assert one.acquire(1 << 52).waited == 0.0


def test_any_finite_head_start_will_do(two, clock, crew):
    one, _ = two
    one.acquire(99)
    in_line(one, crew, clock, [1], priority=-1e300)
    in_line(one, crew, clock, [2])
    in_line(one, crew, clock, [3], priority=1e300)
    assert order(one.snapshot()) == [3, 2, 1]
    one.close()


# --- state that is new or lost --------------------------------------------------------------------


def forget_all(queue):
    """Lose the ledger's state, as a server without a disk does, or whoever removes the file."""
    account = backend_of(queue)
    if hasattr(account, "_path"):
        account._path.unlink()
    else:
        account._client.flushall()


def test_an_account_that_is_new_grants_nothing_for_a_window(account, clock):
    queue = account.queue(clock=clock)
    forget_all(queue)
    new = account.queue(clock=clock)
    assert new.try_acquire(0) is None
    assert new.snapshot().buckets[0].ready_in == WINDOW
    clock.advance(WINDOW)
    assert new.try_acquire(0) is not None


def test_lost_state_is_begun_again_from_what_a_process_knows(two, clock, crew):
    one, _ = two
    one.acquire(99)
    calls = in_line(one, crew, clock, [1, 2])
    clock.advance(1)
    forget_all(one)
    assert one.snapshot().limit.remaining == 99
    assert one.snapshot().buckets[0].ready_in == WINDOW
    clock.advance(WINDOW - 1)
    clock.settle(2)
    clock.advance(1)
    assert calls[0].now().remaining == 98
    clock.settle(1)
    assert order(one.snapshot()) == [2]
    clock.advance(WINDOW)
    calls[1].now()


def test_who_waits_is_told_anew_to_a_ledger_that_lost_it(two, clock, crew):
    one, other = two
    one.acquire(99)
    in_line(one, crew, clock, [1, 2, 3])
    forget_all(one)
    one.snapshot()
    seen = other.snapshot()  # it finds another, younger ledger, and all tell that anew
    clock.advance(NEVER_HEARD_OF / 3)
    clock.settle(2)
    seen = other.snapshot()
    assert order(seen) == [2]
    assert seen.waiting == 2  # those behind the first two are only counted
    one.close()


def test_who_only_tried_is_not_told_to_a_ledger_that_lost_it(two, clock):
    one, other = two
    one.acquire(99)
    forget_all(one)
    assert one.try_acquire(1) is None
    with pytest.raises(AcquireTimeout):
        other.acquire(2, timeout=0)
    assert one.snapshot().waiting == other.snapshot().waiting == 0


def test_after_a_loss_the_limit_is_read_anew(account, clock):
    queue = account.queue(limit(10, 8, 600.0), clock=clock, refresh=lambda: limit(10, 3, 500.0))
    queue.acquire(0)
    forget_all(queue)
    until(lambda: queue.snapshot().limit.remaining == 3, "the read")
    clock.advance(WINDOW)
    assert queue.acquire(0).remaining == 2


def test_a_ledger_that_lost_grants_is_held_to_what_its_processes_saw(two, clock):
    """As a replica does that is promoted with an older state."""
    one, _ = two
    clock.advance(WINDOW)
    before = copy_of(one)
    one.acquire(0)
    put_back(one, before)
    assert one.try_acquire(0) is None
    clock.advance(WINDOW)
    assert one.try_acquire(0) is not None


def copy_of(queue):
    account = backend_of(queue)
    if hasattr(account, "_path"):
        return account._path.read_bytes()
    return {key: account._client.dump(key) for key in account._client.keys("*")}


def put_back(queue, copy):
    account = backend_of(queue)
    if hasattr(account, "_path"):
        account.close()  # else SQLite would lose its locks
        account._closed = False
        account._path.write_bytes(copy)
        return
    account._client.flushall()
    for key, value in copy.items():
        account._client.restore(key, 0, value)


# --- replies that are lost, ledgers out of reach --------------------------------------------------


def test_a_permit_whose_reply_was_lost_is_granted_once(two, clock, monkeypatch, crew):
    one, _ = two
    ask, lost = backend_of(one).ask, []

    def lose_the_reply(request):
        reply = ask(request)
        if reply.permits and len(lost) < 2:
            lost.append(reply)
            raise LedgerError("the reply was lost") from OSError()
        return reply

    monkeypatch.setattr(backend_of(one), "ask", lose_the_reply)
    call = crew(one.acquire, 0)
    clock.settle(1)
    clock.advance(0.05)  # the longest first pause
    clock.settle(1)
    clock.advance(0.1)
    permit = call.now()
    assert permit.remaining == 99
    assert one.snapshot().granted == 1


def test_a_permit_whose_reply_came_too_late_is_given_back(two, clock, monkeypatch, crew):
    """Asked for again it would look new, but the ledger knows its age."""
    one, _ = two
    ask, lost = backend_of(one).ask, []

    def lose_the_reply(request):
        reply = ask(request)
        if reply.permits and not lost:
            lost.append(reply)
            clock.advance(1)
            raise LedgerError("the reply was lost") from OSError()
        return reply

    monkeypatch.setattr(backend_of(one), "ask", lose_the_reply)
    call = crew(one.acquire, 0)
    clock.settle(1)
    clock.advance(0.05)
    assert call.now().remaining == 99
    assert one.snapshot().buckets[0].ready_in == WINDOW


def test_a_deadline_in_an_outage_names_the_cause(two, clock, crew, monkeypatch, caplog):
    one, _ = two
    cut_off(one, monkeypatch)
    call = crew(one.acquire, 7, timeout=30.0)
    for _ in range(30):
        clock.settle(1)
        clock.advance(1)
    error = call.exception(10)
    assert isinstance(error, LedgerError)
    assert isinstance(error.__cause__, OSError)
    assert "shard 7 got no permit within 30 s: out of reach" in str(error)
    (record,) = warnings_in(caplog)
    assert "no permit is granted until it can be asked again" in record.getMessage()


def test_trying_in_an_outage_says_so_at_once(two, monkeypatch):
    one, _ = two
    cut_off(one, monkeypatch)
    with pytest.raises(LedgerError, match="out of reach"):
        one.try_acquire(0)
    with pytest.raises(LedgerError, match="out of reach"):
        one.acquire(0, timeout=0)


def test_who_looks_or_updates_in_an_outage_learns_of_it_in_five_seconds(
    two, clock, crew, monkeypatch
):
    one, _ = two
    cut_off(one, monkeypatch)
    calls = crew(one.snapshot), crew(one.update, limit())
    clock.settle(2)
    clock.advance(4.999)
    clock.settle(2)
    clock.advance(0.001)
    for call in calls:
        error = call.exception(10)
        assert isinstance(error, LedgerError)
        assert isinstance(error.__cause__, LedgerError)


def test_an_outage_is_waited_out_with_growing_pauses(two, clock, crew, monkeypatch, caplog):
    one, _ = two
    with monkeypatch.context() as patches:
        asked = requests_of(one, clock, patches, LedgerError("out of reach"))
        call = crew(one.acquire, 0)
        while len(asked) < 10:
            clock.settle(1)
            clock.advance(0.01)
        clock.settle(1)
    for number, (earlier, later) in enumerate(itertools.pairwise(at for at, _ in asked)):
        longest = min(2.0, 0.05 * 2**number)
        assert longest / 2 <= later - earlier <= longest + 0.01
    clock.advance(2)
    assert call.now().remaining == 99
    clock.settle(0)
    assert [("answers again" in record.getMessage()) for record in warnings_in(caplog)] == [
        False,
        True,
    ]


@contextlib.contextmanager
def busy(queue):
    """Have a queue find its ledger busy, as while another process writes."""
    with pytest.MonkeyPatch.context() as patches:

        def ask(request):
            raise Busy("busy")

        patches.setattr(backend_of(queue), "ask", ask)
        yield


def test_a_ledger_that_is_busy_for_a_moment_is_in_no_outage_however_long_the_queue_was_idle(
    two, clock, crew, caplog
):
    one, _ = two
    clock.advance(3600)
    with busy(one):
        call = crew(one.acquire, 0)
        for _ in range(19):
            clock.settle(1)
            clock.advance(0.01)
        clock.settle(1)
    clock.advance(0.2)
    assert call.now().shard_id == 0
    assert warnings_in(caplog) == []


def test_an_outage_ends_when_the_ledger_answers_even_if_it_refuses_the_process(
    two, clock, monkeypatch, caplog
):
    one, _ = two
    with busy(one):
        future = one.enqueue(0)
        clock.settle(0)
    refuse_what(one, monkeypatch, lambda request: True)
    clock.advance(0.2)
    with pytest.raises(LedgerError, match="reserve must be"):
        future.result(20)
    for _ in range(10):
        clock.advance(2)
        clock.settle(0)
    with monkeypatch.context() as patches:
        cut_off(one, patches)
        for _ in range(5):
            clock.advance(2)
            clock.settle(0)
    clock.advance(2)
    clock.settle(0)
    refused, lost, again, still_refused = (one.getMessage() for one in warnings_in(caplog))
    assert "refuses this process" in refused
    assert "no permit is granted until it can be asked again" in lost
    assert again.endswith("answers again, after 10.0 s")
    assert still_refused == refused


def test_futures_wait_an_outage_out(two, clock, monkeypatch):
    one, _ = two
    with monkeypatch.context() as patches:
        cut_off(one, patches)
        future = one.enqueue(0)
        clock.settle(0)
    clock.advance(2)
    assert future.result(10).remaining == 99


def test_in_the_pauses_of_an_outage_only_those_ask_who_just_try(account, clock, monkeypatch):
    one = account.queue(limit(100, 100, 6000.0, max_concurrency=9), clock=clock)
    with monkeypatch.context() as patches:
        asked = requests_of(one, clock, patches, LedgerError("out of reach"))
        futures = [one.enqueue(shard_id) for shard_id in range(8)]
        clock.settle(0)
        assert len(asked) == 1
        with pytest.raises(LedgerError):
            one.try_acquire(8)
        assert len(asked) == 2
    clock.advance(2)
    assert futures[0].result(10).remaining == 99
    one.close()


def test_a_look_that_gets_through_ends_an_outage(two, clock, monkeypatch):
    one, _ = two
    permit = one.acquire(0)
    with monkeypatch.context() as patches:
        cut_off(one, patches)
        permit.unused()
        clock.settle(0)
    one.snapshot()
    assert one.acquire(0).remaining == 99


def test_an_interrupted_worker_sends_its_request_again(two, clock, monkeypatch, caplog):
    """An asynchronous exception may come in the midst of a request to the ledger."""
    one, _ = two
    ask, interrupts = backend_of(one).ask, [KeyboardInterrupt(), KeyboardInterrupt()]

    def interrupted(request):
        if len(interrupts) == 2:  # before it is sent, and after its reply has come
            raise interrupts.pop()
        reply = ask(request)
        if interrupts:
            raise interrupts.pop()
        return reply

    monkeypatch.setattr(backend_of(one), "ask", interrupted)
    future = one.enqueue(1)
    until(lambda: clock.advance(0.01) or future.done())
    assert not interrupts
    assert one.snapshot().limit.remaining == 99
    assert "was interrupted" in caplog.text or "failed" in caplog.text


def test_reports_made_in_an_outage_are_booked_after_it(two, clock, monkeypatch):
    one, other = two
    one.acquire(0).sent()
    clock.advance(WINDOW)
    permit = one.acquire(0)
    with monkeypatch.context() as patches:
        cut_off(one, patches)
        permit.unused()
        clock.settle(0)
    clock.advance(2)  # the longest pause
    assert one.acquire(0).remaining == 98
    assert other.snapshot().granted == 3


def test_a_report_made_in_an_outage_is_booked_when_that_is_over_without_any_call(
    two, clock, monkeypatch
):
    one, other = two
    permit = one.acquire(0)
    with monkeypatch.context() as patches:
        cut_off(one, patches)
        permit.unused()
        clock.settle(0)
    clock.advance(2)  # the longest pause
    clock.settle(0)
    assert other.snapshot().limit.remaining == 100


def test_a_report_counts_from_when_it_was_made(two, clock, monkeypatch):
    one, other = two
    permit = one.acquire(0)
    clock.advance(1)
    with monkeypatch.context() as patches:
        cut_off(one, patches)
        permit.sent()
        clock.settle(0)
    clock.advance(2)
    one.snapshot()
    assert other.snapshot().buckets[0].ready_in == WINDOW - 2


def test_who_gives_up_in_an_outage_is_out_of_the_line_after_it(two, clock, crew, monkeypatch):
    one, other = two
    one.acquire(99)
    (call,) = in_line(one, crew, clock, [1], timeout=1.0)
    with monkeypatch.context() as patches:
        cut_off(one, patches)
        look = crew(one.snapshot)  # so that it is known
        clock.settle(2)
        clock.advance(1)
        assert isinstance(call.exception(10), LedgerError)
    clock.advance(1)
    look.now()
    clock.settle(0)
    assert other.snapshot().waiting == 0


def test_an_update_whose_reply_is_lost_says_that_it_may_count(two, clock, crew, monkeypatch):
    one, other = two
    ask = backend_of(one).ask

    def lose_the_replies(request):
        ask(request)
        raise LedgerError("the reply was lost") from OSError()

    monkeypatch.setattr(backend_of(one), "ask", lose_the_replies)
    call = crew(one.update, limit(50, 40, 600.0))
    for _ in range(10):
        clock.settle(1)
        clock.advance(0.5)
    with pytest.raises(LedgerError, match="may or may not have been applied"):
        call.now()
    assert other.snapshot().limit.remaining == 40


def test_an_update_that_was_never_sent_says_that_it_does_not_count(two, clock, crew, monkeypatch):
    one, other = two
    with monkeypatch.context() as patches:
        cut_off(one, patches)
        look = crew(one.snapshot)  # one request is in flight
        clock.settle(1)
        call = crew(one.update, limit(50, 40, 600.0))
        clock.settle(2)
        clock.advance(5)
        with pytest.raises(LedgerError, match="the limit was not applied"):
            call.now()
        assert isinstance(look.exception(10), LedgerError)
    clock.advance(2)
    clock.settle(0)
    assert one.snapshot().limit.remaining == other.snapshot().limit.remaining == 100


# --- reports over processes -----------------------------------------------------------------------


def test_reports_change_the_window_for_all(two, clock):
    one, other = two
    permit = one.acquire(0)
    clock.advance(2)
    permit.sent()
    clock.settle(0)
    assert other.snapshot().buckets[0].ready_in == WINDOW
    permit.rejected()
    clock.settle(0)
    assert other.snapshot().buckets[0].ready_in == 2 * WINDOW
    clock.advance(2 * WINDOW)
    other.acquire(0).rejected()
    clock.settle(0)
    assert one.snapshot().buckets[0].ready_in == 4 * WINDOW
    clock.advance(4 * WINDOW)
    other.acquire(0).unused()
    clock.settle(0)
    assert one.snapshot().buckets[0].ready_in == 0.0
    assert one.snapshot().limit.remaining == 98


def test_hearing_a_report_twice_changes_nothing(two, clock, monkeypatch):
    one, other = two
    ask = backend_of(one).ask

    def lose_the_first_reply(request):
        ask(request)
        monkeypatch.undo()
        raise LedgerError("the reply was lost") from OSError()

    for report, ready_in in (("unused", 0.0), ("rejected", 2 * WINDOW), ("sent", WINDOW)):
        permit = one.acquire(0)
        monkeypatch.setattr(backend_of(one), "ask", lose_the_first_reply)
        getattr(permit, report)()
        clock.settle(0)
        one.snapshot()
        assert other.snapshot().buckets[0].ready_in == ready_in
        clock.advance(3 * WINDOW) if ready_in else None
    assert other.snapshot().limit.remaining == 98


def test_a_permit_is_not_given_back_by_an_older_answer(account, clock, monkeypatch):
    queue = account.queue(limit(100, 100, 6000.0, max_concurrency=2), clock=clock)
    queue.acquire(0)
    queue.acquire(1)
    other = queue.enqueue(3)
    clock.settle(0)
    ask, asked, go_on = backend_of(queue).ask, threading.Event(), threading.Event()

    def late(request):
        monkeypatch.undo()
        reply = ask(request)
        asked.set()
        assert go_on.wait(20)
        return reply

    monkeypatch.setattr(backend_of(queue), "ask", late)
    future = queue.enqueue(2)
    assert asked.wait(20)
    clock.advance(WINDOW)
    assert not other.done()  # the worker asks for all, and has no answer yet
    go_on.set()
    clock.settle(0)
    clock.advance(WINDOW)  # on Redis a sleep begins with the answer
    assert {future.result(20).remaining, other.result(20).remaining} == {96, 97}
    assert queue.snapshot().limit.remaining == 96
    queue.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_permit_in_use_is_never_given_back(account, clock, crew, seed):
    """Whatever replies are late or lost, and whoever asks meanwhile."""
    rng, refunds, held = random.Random(seed), set(), []
    queue = account.queue(limit(100, 100, 6000.0, max_concurrency=2), clock=clock)
    ask = backend_of(queue).ask

    def late(request):
        refunds.update(one.serial for one in request.reports if one.kind == messages.UNUSED)
        reply = ask(request)
        clock.advance(rng.choice([0.0, 0.1, 0.2, 0.3]))
        if rng.random() < 0.3:
            raise LedgerError("the reply was lost") from OSError()
        return reply

    backend_of(queue).ask = late
    for _ in range(4):
        calls = [crew(queue.acquire, 0), crew(queue.acquire, 2), queue.enqueue(4)]
        while not all(call.done() for call in calls):
            clock.advance(0.5)
            crew.settle(clock)
        held += [call.result() for call in calls]
    crew.settle(clock)
    backend_of(queue).ask = ask
    assert not refunds & {permit.serial for permit in held}
    clock.advance(2)  # the longest pause
    seen = queue.snapshot()
    assert (seen.limit.remaining, seen.waiting) == (100 - len(held), 0)


@pytest.mark.parametrize("loses", [False, True])
def test_nothing_of_a_closed_queue_stays_in_line(two, clock, crew, monkeypatch, loses):
    one, other = two
    permit = one.acquire(99)
    calls = [*in_line(one, crew, clock, [1, 3]), one.enqueue(5)]
    ask, asked, go_on = backend_of(one).ask, threading.Event(), threading.Event()

    def held_up(request):
        monkeypatch.undo()
        reply = ask(request)
        asked.set()
        assert go_on.wait(20)
        if loses:
            raise LedgerError("the reply was lost") from OSError()
        return reply

    clock.settle(2)
    monkeypatch.setattr(backend_of(one), "ask", held_up)
    permit.sent()
    assert asked.wait(20)
    one.close()
    for call in calls[:2]:  # which nobody but the ledger keeps
        assert isinstance(call.exception(10), QueueClosed)
    go_on.set()
    clock.settle(0)
    clock.advance(0.05)  # the longest first pause
    clock.settle(0)
    assert isinstance(calls[2].exception(10), QueueClosed)
    seen = other.snapshot()
    assert (seen.waiting, order(seen)) == (0, [])
    clock.advance(WINDOW)
    assert other.acquire(2).waited == 0.0


def timeouts_at_one_instant(queue, timeout, now):
    """Have a thousand threads wait, and return the list to which each adds when it gave up.

    Each calls ``timeout`` for how long it waits.
    """
    gave_up, start = [], threading.Barrier(1001)

    def shard(shard_id):
        start.wait(20)
        with pytest.raises(AcquireTimeout):
            queue.acquire(shard_id, timeout=timeout())
        gave_up.append(now())

    threads = [threading.Thread(target=shard, args=(n,), daemon=True) for n in range(1000)]
    for thread in threads:
        thread.start()
    start.wait(20)
    return gave_up, threads


def test_a_thousand_timeouts_at_one_instant_cost_few_requests(two, clock, monkeypatch):
    one, other = two
    one.acquire(99)
    gave_up, threads = timeouts_at_one_instant(one, lambda: 1.0, clock.now_us)
    clock.settle(1000)
    asked, due_us = requests_of(one, clock, monkeypatch), clock.now_us() + 1_000_000
    clock.advance(1)
    for thread in threads:
        thread.join(20)
    clock.settle(0)
    assert gave_up == [due_us] * 1000
    assert len(asked) <= 100  # and not one for each
    assert other.snapshot().waiting == 0


# --- looking --------------------------------------------------------------------------------------


def test_a_snapshot_is_of_the_whole(two, clock, crew):
    one, other = two
    one.acquire(99)
    in_line(one, crew, clock, [1])
    clock.advance(1)
    in_line(other, crew, clock, [2])
    for queue in two:
        seen = queue.snapshot()
        assert (seen.waiting, seen.granted, seen.limit.remaining) == (2, 1, 99)
        shards = [(shard.shard_id, shard.waited, shard.eta) for shard in seen.buckets[0].shards]
        assert shards == [(1, 1.0, WINDOW - 1), (2, 0.0, 2 * WINDOW - 1)]
    assert repr(one).endswith("Queue waiting=1 granted=1 remaining=99/100>")
    one.close()
    other.close()


def test_of_each_other_line_the_first_two_are_shown_and_the_others_counted(two, clock, crew):
    one, other = two
    one.acquire(99)
    in_line(one, crew, clock, [1, 2, 3, 4])
    clock.advance(0.01)
    in_line(other, crew, clock, [5])
    assert order(one.snapshot()) == [1, 2, 3, 4, 5]  # it tells of those behind the head, too
    seen = other.snapshot()
    assert (seen.waiting, order(seen)) == (5, [1, 2, 5])
    etas = [shard.eta for shard in seen.buckets[0].shards]
    assert etas == pytest.approx([WINDOW * n - 0.01 for n in (1, 2, 5)])
    one.close()
    other.close()


def test_however_many_a_process_says_wait_they_are_only_counted(two, clock, crew, monkeypatch):
    one, other = two
    one.acquire(99)
    ask, many = backend_of(one).ask, bounds.MAX_MORE

    def exaggerate(request):
        lines = tuple(line._replace(more=many) for line in request.lines)
        return ask(request._replace(lines=lines))

    monkeypatch.setattr(backend_of(one), "ask", exaggerate)
    in_line(one, crew, clock, [1])
    clock.advance(0.01)
    in_line(other, crew, clock, [2])
    for seen in (other.snapshot(), peek(backend_of(other), Settings(clock=clock))):
        assert (seen.waiting, order(seen)) == (many + 2, [1, 2])
        etas = [shard.eta for shard in seen.buckets[0].shards]
        assert etas == [WINDOW - 0.01, None]  # it is not worked out for one so far behind
    one.close()
    other.close()


def test_a_look_from_outside_changes_nothing(account, clock, crew):
    queue = account.queue(limit(10, 8, 600.0), clock=clock)
    queue.acquire(99)
    in_line(queue, crew, clock, [1])
    settings = Settings(clock=clock)
    for _ in range(2):
        seen = peek(backend_of(queue), settings)
        assert (seen.granted, seen.limit.remaining, order(seen)) == (1, 7, [1])
    assert queue.snapshot() == seen
    queue.close()


def test_observers_are_told_of_places_among_all(two, account, clock, crew):
    one, _ = two
    one.acquire(99)
    in_line(one, crew, clock, [1])
    heard = []
    watched = account.queue(clock=clock, observer=heard.append)
    in_line(watched, crew, clock, [2])
    assert heard == [ShardWaiting(2, 0, 1, 2 * WINDOW)]
    one.close()
    watched.close()


def test_an_observer_that_takes_longer_than_the_margin_is_told_once(account, clock):
    heard = []

    def observer(event):
        heard.append(event)
        clock.advance(3)

    queue = account.queue(limit(10, 10, 600.0), clock=clock, observer=observer)
    with queue.acquire(0) as permit:
        assert permit.remaining == 9
    assert heard == [ShardGranted(0, 0, 0.0, 9), PermitReported(0, 0, Report.SENT)]
    assert queue.snapshot().limit.remaining == 9


@pytest.mark.parametrize("timeout", [0, 1])
def test_a_permit_that_comes_too_late_at_a_deadline_is_no_silence_of_the_ledger(
    account, clock, timeout
):
    granted = []

    def observer(event):
        if isinstance(event, ShardGranted) and not granted:
            granted.append(event)
            clock.advance(3)

    queue = account.queue(limit(10, 10, 600.0), clock=clock, observer=observer)
    with pytest.raises(AcquireTimeout):
        queue.acquire(0, timeout=timeout)
    assert len(granted) == 1
    assert queue.acquire(0).remaining == 9
    queue.close()


# --- being handed on ------------------------------------------------------------------------------


def test_a_queue_pickles_as_its_settings(account):
    queue = account.queue(limit(10, 7, 600.0), clock=SYSTEM_CLOCK, interval=0.03, margin=0.02)
    copy = pickle.loads(pickle.dumps(queue))
    assert type(copy) is type(queue)
    assert copy.snapshot().limit.remaining == 7
    queue.acquire(0)
    assert copy.snapshot().limit.remaining == 6
    copy.close()
    queue.close()
