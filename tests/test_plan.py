"""Plans: a real queue does what they say, to the microsecond."""

from __future__ import annotations

import inspect
from collections import defaultdict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway_queue_sync import (
    LargeBotQueue,
    SessionStartLimit,
    ShardStart,
    forecast,
    plan_start,
)
from gateway_queue_sync.limits import adopt, budget
from gateway_queue_sync.models import US_PER_SECOND, to_us
from gateway_queue_sync.testing import FakeClock
from gateway_queue_sync.token_bucket import Account

WINDOW = 5.25
DAY = 86_400.0


def limit(total=1000, remaining=None, reset_after=0.0, max_concurrency=1):
    remaining = total if remaining is None else remaining
    return SessionStartLimit(total, remaining, reset_after, max_concurrency)


def planned(plan):
    """When each shard starts, by its id; several starts of one shard in their order."""
    times = defaultdict(list)
    for start in plan.starts:
        times[start.shard_id].append(start.at)
    return dict(times)


def by_threads(shard_ids, limit, crew, **settings):
    """When a thread for each shard got its permit from a real queue."""
    clock = FakeClock()
    queue = LargeBotQueue(limit, clock=clock, **settings)
    calls = []
    for shard_id in shard_ids:
        calls.append(crew(queue.acquire, shard_id))
        crew.settle(clock)
    while clock.parked:
        clock.advance(clock.next_in)
        crew.settle(clock)
    return [call.now() for call in calls], queue


def by_futures(shard_ids, limit, **settings):
    """When the future for each shard was done by a real queue; its worker makes that repeatable."""
    clock = FakeClock()
    queue = LargeBotQueue(limit, clock=clock, **settings)
    futures = [queue.enqueue(shard_id) for shard_id in shard_ids]
    while not all(future.done() for future in futures):
        clock.settle(0)
        etas = [bucket.shards[0].eta for bucket in queue.snapshot().buckets if bucket.shards]
        next_in = min(etas, default=0.0)
        clock.advance(
            max(0.0, next_in - 1.0)
        )  # so that the worker is on time then, as in real time
        clock.settle(0)
        clock.advance(min(next_in, 1.0))
    return [future.result() for future in futures], queue


def happened(permits):
    times = defaultdict(list)
    for permit in permits:
        times[permit.shard_id].append(permit.waited)
    return {shard_id: sorted(waits) for shard_id, waits in times.items()}


FLEETS = {
    "one bucket": (range(5), limit()),
    "four whole waves": (range(16), limit(max_concurrency=4)),
    "a last wave that is not full": (range(22), limit(max_concurrency=16)),
    "more buckets than shards": (range(3), limit(max_concurrency=16)),
    "a machine's part of the fleet": (range(5, 15), limit(max_concurrency=4)),
    "ids of one bucket alone": ([0, 16, 32, 48], limit(max_concurrency=16)),
    "ids with gaps, in no order": ([7, 3, 19, 4, 12, 2, 34, 1], limit(max_concurrency=4)),
    "a shard that starts twice": ([1, 1, 0, 1], limit(max_concurrency=2)),
    "a budget that ends with a wave": (range(12), limit(6, max_concurrency=2)),
    "a budget that is used up": (range(4), limit(1000, 0, 3600.0, 4)),
    "a limit that resets on the way": (range(6), limit(1000, 3, 8.0)),
    "a reset that is due": (range(3), limit(1000, 0, 0.0)),
}


@pytest.mark.parametrize("fleet", FLEETS)
def test_a_real_fleet_of_threads_starts_at_exactly_those_times(fleet, crew):
    shard_ids, given_limit = FLEETS[fleet]
    permits, queue = by_threads(shard_ids, given_limit, crew)
    plan = plan_start(shard_ids, given_limit)
    assert planned(plan) == happened(permits)
    assert plan.last_at == max(permit.waited for permit in permits)
    assert plan.remaining == queue.snapshot().limit.remaining


def test_settings_count_as_they_do_for_the_queue(crew):
    settings = {"reserve": 4, "interval": 2.0, "margin": 0.5, "period": 60.0}
    permits, queue = by_threads(range(16), limit(8, max_concurrency=2), crew, **settings)
    plan = plan_start(range(16), limit(8, max_concurrency=2), **settings)
    assert planned(plan) == happened(permits)
    assert plan.resets == (60.0, 120.0, 180.0)
    assert plan.remaining == queue.snapshot().limit.remaining == 4


def test_where_the_budget_ends_within_a_wave_the_times_are_those_though_threads_race(crew):
    permits, _ = by_threads(range(11), limit(5, max_concurrency=3), crew)
    plan = plan_start(range(11), limit(5, max_concurrency=3))
    assert sorted(start.at for start in plan.starts) == sorted(p.waited for p in permits)


limits = st.builds(
    lambda total, share, reset_after, max_concurrency: SessionStartLimit(
        total, total * share // 10, reset_after, max_concurrency
    ),
    total=st.integers(1, 12),
    share=st.integers(0, 10),
    reset_after=st.sampled_from([0.0, 0.1, 5.25, 9.0, 3600.0]),
    max_concurrency=st.integers(1, 5),
)


@given(
    st.integers(0, 7), st.integers(1, 14), limits, st.integers(0, 3), st.sampled_from([7.0, DAY])
)
@example(0, 9, limit(4, max_concurrency=3), 0, DAY)
@example(0, 9, limit(6, 5, 9.0, 2), 2, DAY)
def test_any_fleet_of_futures_starts_at_exactly_those_times(first, count, some, reserve, period):
    reserve = min(reserve, some.total - 1)
    first -= first % some.max_concurrency  # then the order of asking is that of the buckets
    shard_ids = range(first, first + count)
    permits, queue = by_futures(shard_ids, some, reserve=reserve, period=period)
    plan = plan_start(shard_ids, some, reserve=reserve, period=period)
    assert planned(plan) == happened(permits)
    assert {s.shard_id: (s.bucket, s.remaining) for s in plan.starts} == {
        permit.shard_id: (permit.bucket, permit.remaining) for permit in permits
    }
    assert len(plan.starts) == queue.snapshot().granted


@given(st.lists(st.integers(0, 40), max_size=12), limits, st.integers(0, 3))
def test_any_shards_start_at_exactly_those_times(shard_ids, some, reserve):
    reserve = min(reserve, some.total - 1)
    shard_ids.sort(key=lambda shard_id: shard_id % some.max_concurrency)
    permits, _ = by_futures(shard_ids, some, reserve=reserve)
    assert planned(plan_start(shard_ids, some, reserve=reserve)) == happened(permits)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 20))
def test_any_shards_in_any_order_do_where_the_budget_lasts(shard_ids, max_concurrency):
    ample = limit(max_concurrency=max_concurrency)
    permits, _ = by_futures(shard_ids, ample)
    assert planned(plan_start(shard_ids, ample)) == happened(permits)


@given(st.integers(0, 60), limits, st.integers(0, 3))
def test_it_agrees_with_the_forecast_that_snapshots_show(count, some, reserve):
    reserve = min(reserve, some.total - 1)
    account = Account(window_us=to_us(WINDOW), period_us=to_us(DAY))
    adopt(account, some, 0)
    buckets = range(some.max_concurrency)
    outlook = forecast.Outlook(
        now_us=0,
        window_us=account.window_us,
        period_us=account.period_us,
        reserve=reserve,
        max_concurrency=some.max_concurrency,
        ready_in_us={},
        others_ready_in_us=0,
        budget=budget(account, 0),
        granted=0,
    )
    lines = {b: len(range(b, count, some.max_concurrency)) for b in buckets}
    plan = plan_start(range(count), some, reserve=reserve)
    assert [(start.at, start.bucket) for start in plan.starts] == [
        (in_us / US_PER_SECOND, bucket) for in_us, bucket in forecast.starts(outlook, lines)
    ]


# --- what is said of it ---------------------------------------------------------------------------


def test_a_thousand_shards_at_sixteen_outlast_the_day():
    plan = plan_start(range(1024), limit(max_concurrency=16))
    assert not plan.lasts
    assert plan.resets == (DAY,)
    assert plan.last_at == DAY + WINDOW
    assert plan.remaining == 1000 - 24
    assert plan.starts[999] == ShardStart(999, 7, 62, 62 * WINDOW, 0)
    assert plan.starts[1000] == ShardStart(1008, 0, 63, DAY, 999)


def test_a_budget_that_suffices_lasts_and_says_what_is_left():
    plan = plan_start(range(64), limit(1000, 900, 3600.0, 16), reserve=50)
    assert plan.lasts
    assert (plan.last_at, plan.remaining, plan.resets) == (3 * WINDOW, 836, ())


def test_a_budget_lasts_down_to_its_reserve_and_no_further():
    assert plan_start(range(10), limit(10, max_concurrency=4)).lasts
    assert plan_start(range(9), limit(10, max_concurrency=4), reserve=1).lasts
    assert not plan_start(range(10), limit(10, max_concurrency=4), reserve=1).lasts


def test_a_reset_that_nobody_waits_for_is_listed_and_the_budget_lasts():
    plan = plan_start(range(4), limit(1000, 3, 3 * WINDOW))
    assert plan.lasts
    assert plan.resets == (3 * WINDOW,)
    assert plan.remaining == 999


def test_no_shards_need_nothing():
    plan = plan_start([], limit(1000, 7, 60.0))
    assert plan == plan_start(iter(()), limit(1000, 7, 60.0))
    assert (plan.starts, plan.last_at, plan.lasts, plan.remaining) == ((), 0.0, True, 7)


def test_its_repr_does_not_name_every_shard():
    assert len(repr(plan_start(range(1024), limit(max_concurrency=16)))) < 100


def test_its_settings_are_those_of_the_queue():
    ours, queues = (inspect.signature(made).parameters for made in (plan_start, LargeBotQueue))
    for name in ("reserve", "interval", "margin", "period"):
        assert ours[name].default == queues[name].default


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shard_ids": [1, -1]}, ValueError, "shard_id must be at least 0, not -1"),
        ({"shard_ids": [True]}, TypeError, "shard_id must be a whole number, not the bool True"),
        ({"shard_ids": ["1"]}, TypeError, "shard_id must be a whole number, not str '1'"),
        ({"limit": {"total": 1}}, TypeError, "a limit must be a SessionStartLimit, not dict"),
        ({"reserve": 1000}, ValueError, "total (1000) must be more than the reserve (1000)"),
        ({"reserve": -1}, ValueError, "reserve must be at least 0, not -1"),
        ({"interval": 0}, ValueError, "interval must be more than 0 s, not 0"),
        ({"margin": -1}, ValueError, "margin must not be negative, not -1"),
        ({"period": float("nan")}, ValueError, "period must be a number, not NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(change, error, words):
    arguments = {"shard_ids": range(4), "limit": limit(), **change}
    with pytest.raises(error) as caught:
        plan_start(**arguments)
    assert str(caught.value) == words
