"""``testing``: the fake clock and the referee, for users' own tests."""

from __future__ import annotations

import math
import threading

import pytest

from gateway_queue_sync import (
    LargeBotQueue,
    LocalQueue,
    QueueClosed,
    SessionStartLimit,
    ShardGranted,
)
from gateway_queue_sync.testing import FakeClock, Referee, Refusal

S = 1_000_000
DAY = 86_400.0


class Sleepers:
    """Threads that wait on a fake clock, each on a condition over a lock of its own."""

    def __init__(self, clock, crew):
        self.clock = clock
        self.crew = crew
        self.notified = []  # deadlines in the order in which their conditions were notified

    def sleep(self, timeout):
        """Start a thread that waits for so long, and return its call once it is parked."""
        condition = self.clock.condition(threading.RLock())
        notify = condition.notify

        def notify_and_tell(n=1):
            self.notified.append(timeout)
            notify(n)

        condition.notify = notify_and_tell

        def wait():
            with condition:
                condition.wait(timeout)
            return timeout

        parked = self.clock.parked
        call = self.crew(wait)
        call.condition = condition
        self.clock.settle(parked + 1)
        return call


@pytest.fixture
def sleepers(clock, crew):
    return Sleepers(clock, crew)


def wake(call):
    with call.condition:
        call.condition.notify()
    call.now()


# --- a clock to read ------------------------------------------------------------------------------


def test_a_clock_shows_what_it_was_started_with():
    clock = FakeClock(start=2.5, wall=1_000_000.25)
    assert (clock.now_us(), clock.wall_us()) == (2_500_000, 1_000_000_250_000)


def test_a_clock_stands_still_until_it_is_advanced(clock):
    assert [clock.now_us() for _ in range(3)] == [1_000 * S] * 3


def test_advancing_moves_both_clocks(clock):
    before = clock.now_us(), clock.wall_us()
    clock.advance(0.000_001)
    clock.advance(5)
    assert (clock.now_us() - before[0], clock.wall_us() - before[1]) == (5_000_001, 5_000_001)


@pytest.mark.parametrize("to", [0.0, 1_700_000_000.0 - DAY, 2e9])
def test_the_wall_clock_can_be_set_alone(clock, to):
    clock.set_wall(to)
    assert clock.wall_us() == to * S
    assert clock.now_us() == 1_000 * S


@pytest.mark.parametrize("wrong", [-0.001, -1, math.nan, math.inf])
def test_a_clock_never_goes_back(clock, wrong):
    with pytest.raises(ValueError, match=r"^by must "):
        clock.advance(wrong)
    assert clock.now_us() == 1_000 * S


@pytest.mark.parametrize("wrong", [True, "1", None], ids=repr)
def test_a_clock_is_advanced_by_seconds(clock, wrong):
    with pytest.raises(TypeError, match=r"^by must be a number, not "):
        clock.advance(wrong)


# --- a clock to wait by ---------------------------------------------------------------------------


def test_only_those_are_woken_whose_wait_is_over(clock, sleepers):
    late, soon, never = sleepers.sleep(10.0), sleepers.sleep(5.0), sleepers.sleep(None)
    clock.advance(5)
    assert soon.now() == 5.0
    clock.settle(2)
    clock.advance(5)
    assert late.now() == 10.0
    clock.settle(1)
    clock.advance(1e6)
    clock.settle(1)
    assert not never.done()
    wake(never)


def test_a_wait_is_over_at_its_deadline_and_not_before(clock, sleepers):
    call = sleepers.sleep(5.25)
    clock.advance(5.249_999)
    clock.settle(1)
    assert not call.done()
    clock.advance(0.000_001)
    assert call.now() == 5.25


def test_those_due_are_woken_in_the_order_of_their_deadlines(clock, sleepers):
    calls = [sleepers.sleep(timeout) for timeout in (3.0, 1.0, 4.0, 2.0, 9.0)]
    clock.advance(4.5)
    assert sleepers.notified == [1.0, 2.0, 3.0, 4.0]
    clock.settle(1)
    wake(calls[-1])


def test_a_deadline_counts_from_when_the_wait_began(clock, sleepers):
    sleepers.sleep(10.0)
    clock.advance(6)
    sleepers.sleep(5.0)
    clock.advance(5)
    assert sleepers.notified == [10.0, 5.0]


def test_whoever_is_notified_wakes_at_once(clock, sleepers):
    call = sleepers.sleep(10.0)
    wake(call)
    clock.settle(0)
    assert clock.now_us() == 1_000 * S
    clock.advance(100)
    assert len(sleepers.notified) == 1


def test_notify_all_wakes_too(clock, sleepers):
    call = sleepers.sleep(None)
    with call.condition:
        call.condition.notify_all()
    assert call.now() is None
    clock.settle(0)


def test_whoever_is_notified_is_parked_no_more_before_it_has_its_lock(clock, sleepers):
    call = sleepers.sleep(10.0)
    with call.condition:
        call.condition.notify()
        assert (clock.parked, clock.next_in) == (0, None)
    call.now()


def test_a_wait_that_fails_leaves_nobody_parked(clock):
    with pytest.raises(RuntimeError, match="un-acquired lock"):
        clock.condition(threading.RLock()).wait(1.0)
    assert (clock.parked, clock.next_in) == (0, None)


def test_notifying_nobody_is_harmless(clock):
    condition = clock.condition(threading.RLock())
    with condition:
        condition.notify()
    clock.settle(0)


@pytest.mark.parametrize("timeout", [0, 0.0, -1.0])
def test_a_wait_for_no_time_does_not_park(clock, timeout):
    condition = clock.condition(threading.RLock())
    with condition:
        assert condition.wait(timeout) is False
    assert clock.parked == 0


def test_a_condition_waits_without_its_lock(clock, crew):
    lock = threading.RLock()
    condition = clock.condition(lock)

    def wait():
        with condition:
            return condition.wait()

    call = crew(wait)
    clock.settle(1)
    assert lock.acquire(blocking=False)
    condition.notify()
    lock.release()
    assert call.now() is True


def test_a_clock_tells_how_many_are_parked_and_when_the_first_is_due(clock, sleepers):
    assert (clock.parked, clock.next_in) == (0, None)
    never = sleepers.sleep(None)
    assert (clock.parked, clock.next_in) == (1, None)
    sleepers.sleep(7.5)
    sleepers.sleep(3.0)
    assert (clock.parked, clock.next_in) == (3, 3.0)
    clock.advance(1)
    assert clock.next_in == 2.0
    clock.advance(2)
    clock.settle(2)
    assert clock.next_in == 4.5
    clock.advance(4.5)
    clock.settle(1)
    wake(never)


# --- settling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, 2])
def test_settle_complains_if_others_than_expected_are_parked(clock, sleepers, wrong):
    call = sleepers.sleep(5.0)
    with pytest.raises(AssertionError, match=rf"^1 threads are parked, not {wrong}, after 0.01 s$"):
        clock.settle(wrong, timeout=0.01)
    wake(call)


def test_nobody_parked_is_settled(clock):
    clock.settle(0, timeout=0.01)


def test_settle_blocks_until_the_threads_are_parked(clock, sleepers, crew):
    settled = crew(clock.settle, 2)
    sleepers.sleep(1.0)
    assert not settled.done()
    sleepers.sleep(1.0)
    assert settled.now() is None
    clock.advance(1)


def test_settle_waits_for_the_moves_of_those_who_were_woken(clock, crew):
    """They are parked before and after; only what they did in between tells the two apart."""
    condition = clock.condition(threading.RLock())
    moves = []

    def move_each_second():
        with condition:
            for number in range(100):
                condition.wait(1.0)
                moves.append(number)
            condition.wait()

    call = crew(move_each_second)
    clock.settle(1)
    for number in range(100):
        clock.advance(1)
        clock.settle(1)
        assert len(moves) == number + 1
    with condition:
        condition.notify()
    call.now()


def test_settle_waits_for_who_is_inside_a_queue_and_not_parked(clock, sleepers, crew):
    """A thread that has not parked yet has not made its move, though the count may be right."""
    call = sleepers.sleep(1.0)
    condition = clock.condition(threading.RLock())
    inside, park = threading.Event(), threading.Event()

    def hesitate():
        with clock.inside():
            inside.set()
            park.wait(10)
            with condition:
                condition.wait(1.0)

    other = crew(hesitate)
    inside.wait(10)
    busy = r"^1 threads are parked, not 1, after 0.05 s; one is still inside its queue$"
    with pytest.raises(AssertionError, match=busy):
        clock.settle(1, timeout=0.05)
    park.set()
    clock.settle(2)
    clock.advance(1)
    assert (call.now(), other.now()) == (1.0, None)
    clock.settle(0)


def test_settle_does_not_wait_for_the_thread_that_calls_it(clock):
    with clock.inside():
        clock.settle(0, timeout=0.01)
        with clock.inside():
            clock.settle(0, timeout=0.01)


def test_a_thread_counts_as_inside_from_when_its_context_is_made(clock):
    """So a thread that starts another one can say so before that runs."""
    visit = clock.inside()
    with pytest.raises(AssertionError, match="one is still inside its queue"):
        clock.settle(0, timeout=0.01)
    with visit:
        pass
    clock.settle(0)


def test_a_thread_that_is_inside_two_queues_is_parked_when_it_waits_in_the_inner_one(clock, crew):
    """An observer of one queue may ask another."""
    condition = clock.condition(threading.RLock())

    def wait():
        with clock.inside(), clock.inside(), condition:
            condition.wait(1.0)
            condition.wait(1.0)

    call = crew(wait)
    clock.settle(1)
    clock.advance(1)
    clock.settle(1)
    clock.advance(1)
    call.now()
    clock.settle(0)


def test_a_visit_ends_with_an_exception_too(clock):
    with pytest.raises(KeyError), clock.inside():
        raise KeyError
    clock.settle(0)


# --- a queue's worker -----------------------------------------------------------------------------


def wait_as_worker(clock, crew, *timeouts):
    """Start a thread that waits as a queue's worker does, once for each timeout."""
    condition = clock.condition(threading.RLock())
    visit = clock.inside(worker=True)

    def serve():
        with visit, condition:
            for timeout in timeouts:
                condition.wait(timeout)

    return crew(serve)


def test_a_worker_is_not_counted(clock, sleepers, crew):
    call = wait_as_worker(clock, crew, 2.0, 2.0)
    clock.settle(0)
    assert (clock.parked, clock.next_in) == (0, None)
    sleepers.sleep(5.0)
    assert (clock.parked, clock.next_in) == (1, 5.0)
    clock.advance(2)
    clock.settle(1)
    assert not call.done()
    clock.advance(3)
    assert call.now() is None


def test_settle_waits_until_the_worker_is_parked(clock, crew):
    started, go_on = threading.Event(), threading.Event()

    def observe(event):
        if isinstance(event, ShardGranted) and event.shard_id == 1:  # in the worker
            started.set()
            go_on.wait(10)

    queue = LocalQueue(clock=clock, observer=observe)
    queue.acquire(0)
    future = queue.enqueue(1)
    clock.settle(0)
    clock.advance(5.25)
    started.wait(10)
    with pytest.raises(
        AssertionError, match=r"^0 threads are parked, not 0, after .*inside its queue$"
    ):
        clock.settle(0, timeout=0.05)
    go_on.set()
    clock.settle(0)
    assert future.done()
    queue.close()


def test_futures_are_driven_without_counting_the_worker(clock):
    queue = LocalQueue(clock=clock)
    futures = [queue.enqueue(shard_id) for shard_id in range(4)]
    for number in range(1, 5):
        clock.settle(0)
        assert (clock.parked, clock.next_in) == (0, None)
        assert sum(future.done() for future in futures) == number
        clock.advance(5.25)
    queue.close()
    clock.settle(0)


def test_a_worker_that_ends_is_waited_for(clock):
    queue = LocalQueue(clock=clock)
    queue.acquire(0)
    future = queue.enqueue(1)
    clock.settle(0)
    queue.close()
    assert isinstance(future.exception(20), QueueClosed)
    clock.settle(0)


# --- a machine that is suspended ------------------------------------------------------------------


def test_a_suspended_machine_moves_both_clocks_and_shortens_no_wait(clock, sleepers):
    call, never = sleepers.sleep(10.0), sleepers.sleep(None)
    before = clock.now_us(), clock.wall_us()
    clock.suspend(6 * 3600)
    assert (clock.now_us() - before[0], clock.wall_us() - before[1]) == (6 * 3600 * S,) * 2
    clock.settle(2)
    assert clock.next_in == 10.0
    clock.advance(9.999_999)
    clock.settle(2)
    clock.advance(0.000_001)
    assert call.now() == 10.0
    wake(never)


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf])
def test_no_machine_is_suspended_for_less_than_no_time(clock, wrong):
    with pytest.raises(ValueError, match=r"^for_ must "):
        clock.suspend(wrong)


def test_a_limit_that_reset_while_the_machine_was_suspended_counts_within_a_minute(clock, crew):
    queue = LargeBotQueue(SessionStartLimit(10, 0, 6 * 3600, 1), clock=clock)
    call = crew(queue.acquire, 0)
    clock.settle(1)
    clock.suspend(6 * 3600)
    clock.settle(1)
    assert clock.next_in <= 60
    clock.advance(60)
    assert call.now().remaining == 9


# --- a queue with a fake clock --------------------------------------------------------------------


def test_a_queues_threads_are_driven_as_the_clock_describes(clock, crew):
    queue = LocalQueue(clock=clock)
    queue.acquire(0)
    calls = [crew(queue.acquire, shard_id) for shard_id in (1, 2)]
    clock.settle(2)
    clock.advance(5.25)
    clock.settle(1)
    assert sum(call.done() for call in calls) == 1
    assert clock.next_in == 5.25
    clock.advance(5.25)
    assert {call.now().shard_id for call in calls} == {1, 2}


# --- a judge: spacing -----------------------------------------------------------------------------


@pytest.fixture
def referee(clock):
    return Referee(clock=clock)


def test_the_first_identify_is_accepted(referee):
    assert referee.identify(7) is True
    assert (referee.accepted, referee.refused, referee.token_reset) == (1, 0, False)


@pytest.mark.parametrize(
    ("gap", "early_by"), [(0.0, 5.0), (4.0, 1.0), (4.999_999, 0.000_001), (5.0, None), (9.0, None)]
)
def test_an_identify_is_judged_by_when_it_arrives_after_the_last(clock, referee, gap, early_by):
    referee.identify(0)
    clock.advance(gap)
    assert referee.identify(3) is (early_by is None)
    assert referee.refusals == ([] if early_by is None else [Refusal(3, 0, early_by)])


def test_a_refused_identify_does_not_put_off_the_next(clock, referee):
    referee.identify(0)
    clock.advance(4)
    assert not referee.identify(1)
    clock.advance(1)
    assert referee.identify(1)
    assert (referee.accepted, referee.refused) == (2, 1)


def test_buckets_are_judged_independently(clock):
    referee = Referee(max_concurrency=3, clock=clock)
    assert [referee.identify(shard_id) for shard_id in (0, 1, 2, 4)] == [True, True, True, False]
    assert referee.refusals == [Refusal(shard_id=4, bucket=1, early_by=5.0)]


def test_the_interval_may_be_another(clock):
    referee = Referee(interval=0.05, clock=clock)
    referee.identify(0)
    clock.advance(0.05)
    assert referee.identify(0)


def test_the_system_clock_is_the_one_that_counts_if_no_other_is_given():
    referee = Referee()
    assert referee.identify(0)
    assert not referee.identify(0)
    (refusal,) = referee.refusals
    assert 0 < refusal.early_by <= 5


def test_of_those_that_arrive_together_one_is_accepted(clock, crew):
    referee = Referee(clock=clock)
    together = threading.Barrier(8)

    def identify(shard_id):
        together.wait(10)
        return referee.identify(shard_id)

    calls = [crew(identify, shard_id) for shard_id in range(8)]
    assert sum(call.now() for call in calls) == 1
    assert (referee.accepted, referee.refused) == (1, 7)


# --- a judge: the limit ---------------------------------------------------------------------------


def test_going_past_the_total_resets_the_token_for_good(clock):
    referee = Referee(total=2, clock=clock)
    verdicts = []
    for _ in range(3):
        verdicts.append((referee.identify(0), referee.token_reset))
        clock.advance(5)
    assert verdicts == [(True, False), (True, False), (False, True)]
    clock.advance(10 * DAY)
    assert not referee.identify(0)
    assert referee.token_reset
    assert referee.accepted == 2
    assert referee.refusals == [Refusal(0, 0, 0.0)] * 2


def test_refused_identifies_count_too(clock):
    referee = Referee(total=2, clock=clock)
    assert [referee.identify(0) for _ in range(2)] == [True, False]
    assert not referee.token_reset
    clock.advance(5)
    assert not referee.identify(0)
    assert referee.token_reset


def test_the_total_is_over_all_buckets(clock):
    referee = Referee(max_concurrency=4, total=3, clock=clock)
    assert [referee.identify(shard_id) for shard_id in range(4)] == [True, True, True, False]
    assert referee.token_reset


def test_a_period_starts_with_its_first_identify(clock):
    referee = Referee(total=1, period=60.0, clock=clock)
    clock.advance(1_000)
    referee.identify(0)
    clock.advance(60)
    assert referee.identify(0)
    clock.advance(59.999_999)
    assert not referee.identify(0)
    assert referee.token_reset


def test_without_a_total_any_number_is_accepted(clock):
    referee = Referee(clock=clock)
    for _ in range(1_500):
        assert referee.identify(0)
        clock.advance(5)


def test_what_is_left_of_the_limit_counts_down_until_its_period_is_over(clock):
    referee = Referee(max_concurrency=2, total=3, period=60.0, clock=clock)
    assert referee.limit == SessionStartLimit(3, 3, 0.0, 2)
    for _ in range(2):  # the second is refused, and counts
        referee.identify(0)
    clock.advance(20)
    assert referee.limit == SessionStartLimit(3, 1, 40.0, 2)
    clock.advance(40)
    assert referee.limit == SessionStartLimit(3, 3, 0.0, 2)


def test_past_the_limit_nothing_is_left(clock):
    referee = Referee(max_concurrency=3, total=1, clock=clock)
    for shard_id in range(3):
        referee.identify(shard_id)
    assert referee.limit == SessionStartLimit(1, 0, DAY, 3)


def test_without_a_total_there_is_no_limit(referee):
    referee.identify(0)
    assert referee.limit is None


# --- a judge: figures -----------------------------------------------------------------------------


def test_there_is_no_gap_before_the_second_identify(clock):
    referee = Referee(max_concurrency=2, clock=clock)
    referee.identify(0)
    referee.identify(1)
    assert referee.shortest_gap is None


def test_the_shortest_gap_is_that_of_any_bucket_and_of_refused_ones_too(clock):
    referee = Referee(max_concurrency=2, clock=clock)
    gaps = []
    for shard_id, pause in [(0, 0.0), (1, 7.0), (0, 6.0), (1, 0.5), (0, 0.0), (0, 9.0)]:
        clock.advance(pause)
        referee.identify(shard_id)
        gaps.append(referee.shortest_gap)
    assert gaps == [None, None, 13.0, 6.5, 0.5, 0.5]


def test_no_gap_is_shorter_than_none(clock, referee):
    referee.identify(0)
    referee.identify(0)
    clock.advance(3)
    referee.identify(0)
    assert referee.shortest_gap == 0.0


@pytest.mark.parametrize(
    ("max_concurrency", "shard_ids", "least"),
    [
        (1, [], 0.0),
        (1, [7], 0.0),
        (1, range(4), 15.0),
        (16, range(16), 0.0),
        (16, range(17), 5.0),
        (16, range(64), 15.0),
        (16, [0, 16, 32, 1], 10.0),
        (2, iter([1, 1, 1]), 10.0),
    ],
)
def test_the_least_time_is_that_of_the_fullest_bucket(max_concurrency, shard_ids, least):
    assert Referee(max_concurrency).least_time(shard_ids) == least


def test_the_least_time_goes_by_the_interval():
    assert Referee(interval=0.05).least_time(range(11)) == 0.5


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_concurrency": 0}, ValueError),
        ({"max_concurrency": 1.0}, TypeError),
        ({"interval": 0}, ValueError),
        ({"interval": True}, TypeError),
        ({"period": -1}, ValueError),
        ({"period": math.nan}, ValueError),
    ],
)
def test_a_referee_checks_its_settings(settings, error):
    (name,) = settings
    with pytest.raises(error, match=rf"^{name} must "):
        Referee(**settings)


@pytest.mark.parametrize("shard_id", [-1, True, 1.5, "1"])
def test_a_referee_judges_shard_ids_only(shard_id):
    with pytest.raises((TypeError, ValueError), match="shard_id must be"):
        Referee().identify(shard_id)


@pytest.mark.parametrize("total", [-1, True, "3"])
def test_a_referee_counts_to_whole_numbers_only(total):
    with pytest.raises((TypeError, ValueError), match="total must be"):
        Referee(total=total)
