"""Real processes on one account: the promises hold at each caller, whoever is stopped or killed."""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
import time
from collections import Counter
from typing import NamedTuple

import processes
import pytest
import redis_servers
from processes import Entry, Fleet, gaps, until

from gateway_queue_sync import SessionStartLimit

pytestmark = pytest.mark.slow

SEED = 20261124
LOADED = 0.5  # s for which a machine that has other work, too, may keep anybody from going on
PLENTY = 1_000_000
KINDS = ["sqlite", "redis"]


@pytest.fixture(scope="module", autouse=True)
def _forkserver():
    processes.start_forkserver()


def new_fleet(kind, folder, request):
    if kind == "redis" and redis_servers.BINARY is None:
        pytest.skip(redis_servers.WITHOUT)
    broker = processes.new_broker(kind, folder, lambda: request.getfixturevalue("redis_server").url)
    return Fleet(broker, folder)


@pytest.fixture(params=KINDS)
def fleet(request, tmp_path):
    with new_fleet(request.param, tmp_path, request) as fleet:
        yield fleet


def limit(total=PLENTY, remaining=None, reset_after=0.0, buckets=1):
    return SessionStartLimit(total, total if remaining is None else remaining, reset_after, buckets)


# windows to line up in
SHORT = {"interval": 2.0, "margin": 0.1}
LONG = {"interval": 60.0, "margin": 0.02}
TINY = {"interval": 0.001, "margin": 0.02}  # no window to speak of


def window(settings):
    return settings["interval"] + settings["margin"]


def grace(settings):
    return min(0.1, window(settings) / 5)


def whose(grants):
    return [grant.process for grant in grants]


def shards(grants):
    return [grant.shard_id for grant in grants]


# --- eight processes of eight threads -------------------------------------------------------------

WINDOW = {"interval": 0.03, "margin": 0.02}
PROCESSES, THREADS, TIMES = 8, 8, 2
AT_ONCE = 0.01  # s: who ask within a trip to the ledger of each other have no order


class Load(NamedTuple):
    grants: list[Entry]
    trips: int
    seconds: float  # of CPU


@pytest.fixture(scope="module")
def loads(request, tmp_path_factory):
    """On each kind of ledger: 128 permits of one bucket for 64 threads, which begin at one time.

    All kinds at once, since it is mostly waiting.
    """
    with contextlib.ExitStack() as stack:
        fleets = {
            kind: stack.enter_context(new_fleet(kind, tmp_path_factory.mktemp("load"), request))
            for kind in KINDS
            if kind != "redis" or redis_servers.BINARY is not None
        }
        for fleet in fleets.values():
            fleet.begin(PROCESSES, limit(), **WINDOW)
        before = {kind: costs(fleet) for kind, fleet in fleets.items()}
        start = time.monotonic() + 0.1
        for process in itertools.chain(*(fleet.processes for fleet in fleets.values())):
            process.acquire(*range(THREADS), times=TIMES, start=start)
        return {
            kind: Load(
                fleet.await_granted(PROCESSES * THREADS * TIMES), *spent(before[kind], costs(fleet))
            )
            for kind, fleet in fleets.items()
        }


@pytest.fixture(params=KINDS)
def load(request, loads):
    if request.param not in loads:
        pytest.skip(redis_servers.WITHOUT)
    return loads[request.param]


def costs(fleet):
    return [process.cost() for process in fleet.processes]


def spent(before, after):
    """Return the trips to the ledger and the seconds of CPU that processes took meanwhile."""
    costs = [
        (trips - trips_before, seconds - seconds_before)
        for (trips_before, seconds_before), (trips, seconds) in zip(before, after, strict=True)
    ]
    return tuple(map(sum, zip(*costs, strict=True)))


def figures(load):
    """Return what was measured, for those who want to know: most of it is nothing to insist on."""
    grants = load.grants
    late = sorted(gap - window(WINDOW) for gap in gaps(grants))
    inversions = sum(
        later.asked < earlier.asked - AT_ONCE for earlier, later in itertools.pairwise(grants)
    )
    return (
        f"{len(grants)} permits; shortest spacing {min(gaps(grants)) * 1e3:.1f} ms; "
        f"longer than a window by {late[len(late) // 2] * 1e3:.2f} ms (median), "
        f"{late[len(late) * 99 // 100] * 1e3:.2f} (p99), {late[-1] * 1e3:.2f} (most); "
        f"{inversions} asked for after the next; "
        f"longest wait {max(grant.waited for grant in grants):.2f} s; {load.trips / len(grants):.2f} "
        f"trips and {load.seconds / len(grants) * 1e3:.1f} ms of CPU a permit"
    )


def test_no_spacing_at_any_caller_is_shorter_than_the_interval(load):
    print(figures(load))
    assert min(gaps(load.grants)) >= WINDOW["interval"]


def test_everybody_gets_every_permit_asked_for(load):
    got = Counter((grant.process, grant.shard_id) for grant in load.grants)
    assert got == {
        (process, shard_id): TIMES for process in range(PROCESSES) for shard_id in range(THREADS)
    }


def test_no_spacing_is_short_where_permits_come_late(fleet):
    """They are given back, and asked for again."""
    started = fleet.begin(3, limit(), **WINDOW)
    started[0].delay_permits(2 * WINDOW["margin"])
    for process in started:
        process.acquire(0, 1, times=2)
    assert min(gaps(fleet.await_granted(12))) >= WINDOW["interval"]


# --- buckets --------------------------------------------------------------------------------------


def test_a_closed_bucket_holds_up_no_other_process_in_another_one(fleet):
    one, other = fleet.begin(2, limit(buckets=2), **SHORT)
    one.acquire(0, 2)
    fleet.await_granted(1)
    other.acquire(1)
    assert [shard_id % 2 for shard_id in shards(fleet.await_granted(3))] == [0, 1, 0]


def test_several_buckets_grant_each_at_its_own_pace(fleet):
    started = fleet.begin(4, limit(buckets=4), interval=0.2, margin=0.05)
    for process in started:
        process.acquire(*range(4))
    grants = fleet.await_granted(16)
    buckets = [[grant for grant in grants if grant.shard_id == bucket] for bucket in range(4)]
    assert all(min(gaps(bucket)) >= 0.2 for bucket in buckets)
    assert max(bucket[0].at for bucket in buckets) < min(bucket[-1].at for bucket in buckets)
    assert min(gaps(grants)) < 0.2


# --- processes that die or stop -------------------------------------------------------------------


def test_a_process_killed_as_the_first_in_line_costs_a_grace_and_not_its_lease(fleet):
    """That is 5 seconds."""
    first, second = fleet.begin(2, limit(), **SHORT)
    fleet.line_up((first.acquire, 0), (second.acquire, 1))
    first.kill()
    (grant,) = fleet.await_granted(1)
    assert grant.process == second.number
    assert grant.at < fleet.opens + grace(SHORT) + LOADED


def test_a_killed_process_costs_one_grace_once_and_nobody_elses_place(fleet):
    """However many waited in it: only the first window is longer."""
    dead, one, other = fleet.begin(3, limit(), **SHORT)
    fleet.line_up((dead.acquire, 0), (dead.acquire, 1))
    fleet.line_up((one.acquire, 2), (other.acquire, 3), (one.acquire, 4))
    dead.kill()
    grants = fleet.await_granted(3)
    assert shards(grants) == [2, 3, 4]
    assert min(gaps(grants)) < window(SHORT) + grace(SHORT) / 2


def test_a_process_stopped_for_longer_than_its_lease_comes_back_to_its_place(fleet):
    stopped, one, other = fleet.begin(3, limit(), lease=0.3, **SHORT)
    fleet.line_up((stopped.acquire, 0), (one.acquire, 1), (other.acquire, 2))
    stopped.stop()
    fleet.await_granted(1)
    stopped.go_on()
    grants = fleet.await_granted(3)
    assert whose(grants) == [one.number, stopped.number, other.number]
    assert min(gaps(grants)) >= SHORT["interval"]


STORM = {"interval": 0.02, "margin": 0.02, "lease": 0.5}


class Storm(NamedTuple):
    fleet: Fleet
    grants: list[Entry]


@pytest.fixture(scope="module", params=KINDS)
def storm(request, tmp_path_factory):
    """Six processes that want ever more; 200 times one of them is killed, and started anew."""
    rng = random.Random(SEED)
    with new_fleet(request.param, tmp_path_factory.mktemp("storm"), request) as fleet:
        fleet.begin(0, limit(), **STORM)
        alive = [fleet.spawn(processes.want_ever_more, 2, STORM) for _ in range(6)]
        for _ in range(200):
            time.sleep(rng.uniform(0.0, 0.03))
            unlucky = rng.randrange(6)
            alive[unlucky].kill()
            alive[unlucky] = fleet.spawn(processes.want_ever_more, 2, STORM)
        for process in alive:
            process.kill()
        for process in alive:
            process.join()
        grants = fleet.audit.read("granted")
        shortest, longest = min(gaps(grants)) * 1e3, max(gaps(grants)) * 1e3
        print(
            f"{request.param}, seed {SEED}: {len(grants)} permits to "
            f"{len(set(whose(grants)))} processes, spacings of {shortest:.1f} to {longest:.0f} ms"
        )
        yield Storm(fleet, grants)


def test_no_spacing_is_short_in_a_storm_of_kills(storm):
    assert min(gaps(storm.grants)) >= STORM["interval"]


def test_the_queue_grants_after_a_storm_of_kills(storm):
    assert storm.fleet.queue.acquire(0, timeout=processes.PATIENCE)


@pytest.mark.parametrize("storm", ["sqlite"], indirect=True)
def test_the_file_is_whole_after_a_storm_of_kills(storm):
    with contextlib.closing(sqlite3.connect(storm.fleet.broker.where)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# --- the budget -----------------------------------------------------------------------------------

PERIOD = 3.0  # s


@pytest.mark.parametrize(("reserve", "periods"), [(0, 3), (5, 2)])
def test_each_period_has_exactly_its_budget(fleet, reserve, periods):
    """Twenty, less the reserve, over eight processes."""
    started = fleet.begin(8, limit(20, buckets=16), reserve=reserve, period=PERIOD, **TINY)
    each = 20 - reserve
    for process in started:
        process.acquire(*range(process.number, periods * each, 8))
    grants = fleet.await_granted(periods * each)
    granted = [grants[first : first + each] for first in range(0, len(grants), each)]
    assert all(period[-1].at - period[0].at < PERIOD for period in granted)
    for earlier, later in itertools.pairwise(granted):
        assert later[0].at - earlier[0].at >= PERIOD - LOADED


def test_a_crash_loop_gets_no_more_than_what_was_left(fleet):
    """Each start gets the limit that Discord sent before the first one."""
    left = limit(10, 7, 600.0, buckets=16)
    fleet.begin(0, left, **TINY)
    how = {"when_exhausted": "raise", **TINY}
    for _ in range(10):
        crashed = [fleet.spawn(processes.crash_after_a_session_start, left, how) for _ in range(6)]
        for process in crashed:
            process.join()
    assert Counter(entry.what for entry in fleet.audit.read()) == {"granted": 7, "exhausted": 53}


def test_who_gives_up_or_gives_back_costs_no_budget(fleet):
    print(f"seed {SEED}")
    started = fleet.begin(4, limit(buckets=2), **STORM)
    end = time.monotonic() + 1.0
    for process in started:
        process.be_fickle(6, end, SEED)
    until(lambda: len(fleet.audit.read("ended")) == 24, "the end of 24 threads")
    used = len(fleet.audit.read("granted"))
    for process in started:
        process.snapshot()  # asks: what did not get through before goes along with that
    until(lambda: fleet.queue.snapshot().limit.remaining == PLENTY - used, "the rest")


def test_one_process_reads_the_limit_for_all_at_a_reset(fleet):
    """The account's limit has just been read, so that no process reads it when it starts."""
    fleet.begin(0, limit(4, 0, 0.3), refresh=lambda: limit(4), **TINY)
    for _ in range(4):
        process = fleet.start()
        process.open_refreshing(limit(4, 4, 60.0, buckets=16), takes=0.1, lease=0.5, **TINY)
        process.acquire(0)
    fleet.await_granted(4)
    assert len(fleet.audit.read("refresh")) == 1


def test_another_process_reads_the_limit_when_one_is_killed_while_it_does(fleet):
    fleet.begin(0, limit(4, 0, 0.2), **TINY)
    for _ in range(3):
        process = fleet.start()
        process.open_refreshing(limit(4), takes=60.0, lease=0.5, **TINY)
        process.acquire(
            0, 1, 2
        )  # more than there are: some wait on, whatever total counts meanwhile
    (first,) = until(lambda: fleet.audit.read("refresh"), "a refresh")
    fleet.processes[first.process].kill()
    until(lambda: fleet.audit.read("refresh")[1:], "another one", within=10.0 + 2 * LOADED)


# --- what one process does, to others -------------------------------------------------------------


def test_an_update_reaches_other_processes_within_a_third_of_the_lease(fleet):
    one, other = fleet.begin(2, limit(10, 0, 3600.0), lease=0.9, **TINY)
    fleet.line_up((one.acquire, 0))
    other.update(limit())
    updated = time.monotonic()
    (grant,) = fleet.await_granted(1)
    assert grant.at - updated < 0.9 / 3 + LOADED


def test_a_queue_that_is_closed_leaves_other_processes_alone(fleet):
    closed, other = fleet.begin(2, limit(), **SHORT)
    fleet.line_up((closed.acquire, 0), (closed.acquire, 1), (other.acquire, 2))
    closed.close()
    fleet.await_granted(1)
    results = Counter((entry.process, entry.what) for entry in fleet.audit.read())
    assert results == {(closed.number, "QueueClosed"): 2, (other.number, "granted"): 1}


def test_who_waited_in_a_closed_queue_is_gone_for_others_at_once(fleet):
    closed, other = fleet.begin(2, limit(), **LONG)
    fleet.line_up((closed.acquire, 0), (closed.acquire, 1), (other.acquire, 2))
    closed.close()
    until(lambda: other.snapshot().waiting == 1, "a line of 1", within=LOADED)


def test_who_waited_in_a_process_that_ended_is_gone_after_its_lease(fleet):
    ended, other = fleet.begin(2, limit(), lease=0.6, **LONG)
    fleet.line_up((ended.acquire, 0), (ended.acquire, 1), (other.acquire, 2))
    ended.exit()
    until(lambda: other.snapshot().waiting == 1, "a line of 1", within=0.6 + LOADED)


def test_who_gives_up_while_the_one_before_is_granted_waits_no_longer(fleet):
    (one,) = fleet.begin(1, limit(), **SHORT)
    one.delay_take(start=fleet.opens - 0.01, delay=0.2)
    fleet.line_up((one.acquire, 0))
    fleet.line_up((one.acquire, 1), timeout=fleet.opens + 0.1 - time.monotonic())
    until(lambda: fleet.audit.read("granted", "AcquireTimeout")[1:], "both results")
    until(lambda: one.snapshot().waiting == 0, "an empty line", within=LOADED)


def test_a_head_start_counts_over_processes(fleet):
    one, other = fleet.begin(2, limit(), **SHORT)
    fleet.line_up((one.acquire, 0))
    fleet.line_up((other.acquire, 1), priority=10.0)
    assert fleet.await_granted(1)[0].process == other.number


def test_who_only_tries_passes_nobody_in_another_process(fleet):
    """Not even while the one whose turn it is comes late."""
    one, other = fleet.begin(2, limit(), **SHORT)
    fleet.line_up((one.acquire, 0))
    one.stop()
    assert other.try_until(fleet.opens + grace(SHORT), 1) == 0
    one.go_on()
    assert fleet.await_granted(1)[0].process == one.number


def test_futures_and_threads_of_different_processes_stand_in_one_line(fleet):
    one, other = fleet.begin(2, limit(), **SHORT)
    fleet.line_up((one.enqueue, 0), (other.acquire, 1), (one.enqueue, 2))
    assert shards(fleet.await_granted(3)) == [0, 1, 2]


# --- what costs next to nothing -------------------------------------------------------------------


def test_processes_that_wait_ask_three_times_in_a_lease(fleet):
    started = fleet.begin(2, limit(), lease=1.0, **LONG)
    for process in started:
        process.acquire(*range(8))
    fleet.await_waiting(16)
    before, since = costs(fleet), time.monotonic()
    time.sleep(1.0)
    trips, seconds = spent(before, costs(fleet))
    print(f"{trips} trips and {seconds * 1e3:.0f} ms of CPU for 16 threads in a second")
    assert 0 < trips <= 2 * (1 + 3 * (time.monotonic() - since))


def test_looking_all_the_time_holds_nobody_up(fleet):
    asks, *looking = fleet.begin(3, limit(), **WINDOW)
    for process in looking:
        process.look_all_the_time()
    asks.acquire(0, 1, times=12)
    grants = fleet.await_granted(24)
    late = grants[-1].at - grants[0].at - 23 * window(WINDOW)
    print(f"24 permits came {late * 1e3:.0f} ms late in all")
    assert min(gaps(grants)) >= WINDOW["interval"]
