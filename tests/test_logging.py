"""The log: long waits and how they end, and the session start limit."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest
from accounts import backend_of
from test_waiting import WINDOW, in_line, limit

from gateway_queue_sync import (
    AcquireTimeout,
    LocalQueue,
    SessionLimitExhausted,
    ShardGranted,
    ShardWaiting,
    forecast,
)
from gateway_queue_sync.lines import Line, Lines
from gateway_queue_sync.log import Log, limits, shards

SHARDS, BUDGET = "gateway_queue_sync.shards", "gateway_queue_sync.budget"
memory = pytest.mark.accounts("memory")
shared = pytest.mark.accounts("sqlite", "redis")


@pytest.fixture
def log(caplog):
    for logger in ("gateway_queue_sync", SHARDS):  # the command serve may have set this one's level
        caplog.set_level(logging.INFO, logger)
    return caplog


def logged(log, logger=SHARDS):
    """What was logged, but for the time of day."""
    return [
        re.sub(r" \((\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d\)", "", record.getMessage())
        for record in log.records
        if record.name == logger
    ]


def levels(log):
    return {record.levelname for record in log.records}


# --- shards ---------------------------------------------------------------------------------------


def test_a_long_wait_is_told_when_it_begins_and_when_it_ends(account, clock, crew, log):
    queue = account.local(clock=clock)
    queue.acquire(0)
    in_line(queue, crew, clock, range(1, 7))
    assert logged(log) == ["shard 6 waits in bucket 0: 5 before it, its permit is due in 31.5 s"]
    for left in range(5, -1, -1):
        clock.advance(WINDOW)
        clock.settle(left)
    crew.join()
    (line,) = logged(log)[1:]
    assert line.startswith("shard 6 has its permit, after 31.5 s")
    assert levels(log) == {"INFO"}


def test_each_shard_is_told_of_once(account, clock, crew, log):
    queue = account.large(limit(1000, 0, 50.0), clock=clock)
    in_line(queue, crew, clock, [0, 1])
    clock.advance(50)
    clock.settle(1)
    clock.advance(WINDOW)
    crew.join()
    assert logged(log) == [
        "shard 0 waits in bucket 0: 0 before it, its permit is due in 50.0 s",
        "shard 1 waits in bucket 0: 1 before it, its permit is due in 55.2 s",
        "shard 0 has its permit, after 50.0 s; 999 session starts are left",
        "shard 1 has its permit, after 55.2 s; 998 session starts are left",
    ]


def test_it_says_at_what_time_of_day(account, clock, crew, log, freezer):
    freezer.move_to("2026-11-23 23:59:00")
    queue = account.large(limit(1000, 0, 90.0), clock=clock)
    in_line(queue, crew, clock, [0])
    (record,) = (record for record in log.records if record.name == SHARDS)
    assert record.getMessage().endswith("due in 1 min 30 s (2026-11-24 00:00:30)")
    queue.close()


def test_a_wait_that_nobody_foresaw_to_be_long_is_told_at_its_end(account, clock, crew, log):
    queue = account.large(limit(), clock=clock)
    queue.acquire(0)
    (call,) = in_line(queue, crew, clock, [1])
    queue.update(limit(1000, 0, 100.0))
    clock.settle(1)
    clock.advance(100)
    call.now()
    assert logged(log) == ["shard 1 has its permit, after 1 min 40 s; 999 session starts are left"]


def test_a_wait_that_ends_sooner_than_foretold_is_told_at_its_end(account, clock, crew, log):
    queue = account.large(limit(1000, 0, 100.0), clock=clock)
    (call,) = in_line(queue, crew, clock, [1])
    queue.update(limit())
    call.now()
    assert logged(log)[1:] == ["shard 1 has its permit, after 0.0 s; 999 session starts are left"]


def test_who_leaves_without_a_permit_is_told_of_too(account, clock, crew, log):
    queue = account.large(limit(1000, 0, 100.0), clock=clock)
    (call,) = in_line(queue, crew, clock, [1], timeout=40.0)
    futures = [queue.enqueue(2), queue.enqueue(3)]
    clock.settle(1)
    futures[0].cancel()  # after no time: that is not worth a line
    clock.settle(1)
    clock.advance(35)
    clock.settle(1)
    futures[1].cancel()
    clock.settle(1)
    clock.advance(5)
    assert isinstance(call.exception(10), AcquireTimeout)
    assert logged(log)[3:] == [
        "shard 3 has left its line without a permit, after 35.0 s (cancelled)",
        "shard 1 has left its line without a permit, after 40.0 s (timeout)",
    ]


def test_who_does_not_stay_for_long_is_not_told_of(account, clock, crew, log):
    queue = account.large(limit(1000, 0, 100.0), clock=clock)
    (call,) = in_line(queue, crew, clock, [1], timeout=30.0)
    clock.advance(30)
    assert isinstance(call.exception(10), AcquireTimeout)
    assert queue.try_acquire(2) is None
    assert logged(log) == []


def test_those_who_are_let_go_by_close_are_not_told_of_each(account, clock, log):
    queue = account.large(limit(1000, 0, 100.0), clock=clock)
    queue.enqueue(1)
    clock.settle(0)
    clock.advance(40)
    queue.close()
    clock.settle(0)
    assert len(logged(log)) == 1


@memory
def test_a_mass_start_is_told_in_a_screen_of_lines(account, clock, log):
    """The first five of a minute, then each that doubles their number."""
    queue = account.large(limit(5000, 0, 100.0, max_concurrency=2000), clock=clock)
    futures = [queue.enqueue(shard_id) for shard_id in range(2000)]
    assert len(logged(log)) == 5 + len(["8", "16", "32", "64", "128", "256", "512", "1024"])
    assert logged(log)[-1] == (
        "shard 1023 waits in bucket 1023: 0 before it, its permit is due in 1 min 40 s; "
        "511 similar lines skipped"
    )
    clock.settle(0)
    clock.advance(100)
    for future in futures:
        future.result(10)
    (*_, last) = logged(log)[13:]
    assert len(logged(log)) == 2 * 13
    assert last.startswith("shard 1023 has its permit, after 1 min 40 s; ")
    assert last.endswith("left; 511 similar lines skipped")


def test_futures_are_told_of_as_threads_are(account, clock, log):
    queue = account.large(limit(1000, 0, 100.0, max_concurrency=4), clock=clock)
    future = queue.enqueue(6)
    clock.settle(0)
    clock.advance(100)
    future.result(10)
    assert [line.split(",")[0] for line in logged(log)] == [
        "shard 6 waits in bucket 2: 0 before it",
        "shard 6 has its permit",
    ]


def test_an_observer_hears_all_and_the_log_only_what_is_long(account, clock, crew, log):
    events = []
    queue = account.local(clock=clock, observer=events.append)
    queue.acquire(0)
    in_line(queue, crew, clock, range(1, 7))
    assert len([event for event in events if isinstance(event, ShardWaiting)]) == 6
    assert len(logged(log)) == 1
    for left in range(5, -1, -1):
        clock.advance(WINDOW)
        clock.settle(left)
    crew.join()
    assert len([event for event in events if isinstance(event, ShardGranted)]) == 7
    assert len(logged(log)) == 2


def test_whoever_does_not_listen_pays_nothing(account, clock, crew, caplog, monkeypatch):
    """At the level WARNING, which is the default, no position and no ETA are worked out."""
    queue = account.large(limit(1000, 2, 100.0), clock=clock)
    monkeypatch.setattr(forecast, "eta_us", None)
    monkeypatch.setattr(Line, "position", None)
    queue.acquire(0)
    calls = in_line(queue, crew, clock, [1, 2])
    clock.advance(WINDOW)
    calls[0].now()
    clock.settle(1)
    clock.advance(100 - WINDOW)
    calls[1].now()
    assert not logged(caplog)


@memory
@pytest.mark.parametrize("priority", [0.0, 60.0])
def test_who_joins_a_long_line_does_not_look_through_it_for_the_log(
    account, clock, log, monkeypatch, priority
):
    queue = account.large(limit(1000, 500, 100.0), clock=clock)
    queue.acquire(0)
    for shard_id in range(100):
        queue.enqueue(shard_id)
    monkeypatch.setattr(Line, "entries", None)
    monkeypatch.setattr(Lines, "waiters", None)
    monkeypatch.setattr(forecast, "starts", None)
    queue.enqueue(100, priority=priority)
    monkeypatch.undo()
    queue.close()


@memory
def test_a_free_bucket_does_not_even_ask_whether_to_log(account, clock, log, monkeypatch):
    queue = account.large(limit(max_concurrency=3), clock=clock)
    for name in ("__call__",):
        monkeypatch.setattr(Log, name, None)
    queue.acquire(0)
    queue.try_acquire(1)
    queue.enqueue(2)
    assert queue.snapshot().granted == 3


class Slow(logging.Handler):
    """Takes its time over each line that tells of a permit."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.lines = clock, seconds, 0

    def emit(self, record):
        if "has its permit" in record.getMessage():
            self.lines += 1
            self.clock.advance(self.seconds)


@pytest.fixture
def slow(clock, log):
    handler = Slow(clock, 1.0)
    logging.getLogger(SHARDS).addHandler(handler)
    yield handler
    logging.getLogger(SHARDS).removeHandler(handler)


@memory
def test_nobody_passes_while_a_handler_takes_longer_than_a_window(account, clock, crew, slow):
    slow.seconds = 2 * WINDOW
    queue = account.large(limit(1000, 0, 100.0), clock=clock)
    in_line(queue, crew, clock, [0, 1])
    clock.advance(100)
    crew.settle(clock)
    clock.advance(WINDOW)
    crew.join()
    assert [permit.shard_id for permit in crew.returned] == [0, 1]
    assert slow.lines == 2
    assert queue.snapshot().granted == 2


def test_what_a_slow_handler_takes_is_nobodys_gap(account, clock, crew, slow):
    """In memory the stamp comes after the line; a shared permit that got too late is asked for anew."""
    queue = account.large(limit(1000, 0, 100.0), clock=clock)
    first, second = in_line(queue, crew, clock, [0, 1])
    returned = []
    for call in (first, second):
        call.add_done_callback(lambda _: returned.append(clock.now_us()))
    clock.advance(100)
    while not second.done():
        crew.settle(clock)
        clock.advance(0.25 if clock.next_in is None else clock.next_in)
    assert returned[1] - returned[0] >= 5_000_000
    assert slow.lines == 2
    assert queue.snapshot().limit.remaining == 998


@memory
def test_a_permit_is_told_of_once_even_if_the_buckets_are_laid_out_anew_meanwhile(
    account, clock, crew, log
):
    heard = []

    def observer(event):
        heard.append(type(event))
        if event.__class__ is ShardGranted and heard.count(ShardGranted) == 1:
            queue.update(limit(1000, 900, 100.0, max_concurrency=2))

    queue = account.large(limit(1000, 0, 100.0), clock=clock, observer=observer)
    (call,) = in_line(queue, crew, clock, [0])
    while not call.done():
        crew.settle(clock)
        if clock.next_in is not None:
            clock.advance(clock.next_in)
    assert heard.count(ShardGranted) == 1
    assert len([line for line in logged(log) if "has its permit" in line]) == 1


@shared
def test_the_position_counts_those_of_all_processes(account, clock, crew, log):
    one, other = (account.queue(limit(), clock=clock) for _ in range(2))
    one.acquire(0)
    first, *_ = in_line(one, crew, clock, range(1, 6))
    clock.advance(WINDOW)
    first.now()  # with this request the ledger has heard of those behind it
    clock.settle(4)
    in_line(other, crew, clock, [7])
    assert logged(log) == []
    in_line(other, crew, clock, [8])
    assert logged(log) == ["shard 8 waits in bucket 0: 5 before it, its permit is due in 31.5 s"]
    one.close()
    other.close()


@shared
def test_many_who_come_at_once_do_not_ask_the_ledger_for_the_log_each(
    account, clock, log, monkeypatch
):
    queue = account.queue(limit(), clock=clock)
    queue.acquire(0)
    requests = []
    backend = backend_of(queue)
    ask = backend.ask
    monkeypatch.setattr(backend, "ask", lambda request: requests.append(request) or ask(request))
    for shard_id in range(1, 40):
        queue.enqueue(shard_id)
        clock.settle(0)
    assert len(requests) <= 2
    positions = [int(re.search(r"(\d+) before", line)[1]) for line in logged(log)]
    assert positions == [5, 6, 7, 8, 9, 12, 20, 36]
    assert logged(log)[-1].endswith("its permit is due in 3 min 14 s; 15 similar lines skipped")
    queue.close()


# --- the budget -----------------------------------------------------------------------------------


def test_a_budget_that_runs_low_is_warned_of_once_where_nobody_waits(account, clock, log):
    queue = account.large(limit(30, 30, 600.0, max_concurrency=64), reserve=10, clock=clock)
    for shard_id in range(17):
        with queue.acquire(shard_id):
            pass
    assert logged(log, BUDGET) == []
    for shard_id in range(17, 20):
        with queue.acquire(shard_id):
            pass
    assert logged(log, BUDGET) == [
        "the session start limit runs low: 12 of 30 left, reserve 10; it resets in 10 min 0 s"
    ]
    assert levels(log) == {"WARNING"}


@pytest.mark.parametrize("way", ["acquire", "try_acquire", "enqueue"])
@pytest.mark.parametrize("observer", [None, id])
def test_a_budget_that_runs_low_is_warned_of_where_buckets_are_free(
    account, clock, log, way, observer
):
    queue = account.large(limit(100, 12, 600.0, max_concurrency=64), clock=clock, observer=observer)
    for shard_id in range(12):
        permit = getattr(queue, way)(shard_id)
        if way == "enqueue":
            permit = permit.result(10)
        assert permit.shard_id == shard_id
    assert logged(log, BUDGET) == [
        "the session start limit runs low: 10 of 100 left, reserve 0; it resets in 10 min 0 s"
    ]


def test_a_budget_that_stays_low_is_warned_of_once_whatever_is_updated_or_given_back(
    account, clock, log
):
    queue = account.large(limit(100, 10, 600.0, max_concurrency=64), clock=clock)
    for shard_id in range(5):
        queue.acquire(shard_id)
        queue.acquire(8 + shard_id).unused()
        queue.update(limit(100, 11, 600.0, max_concurrency=64))
    assert len(logged(log, BUDGET)) == 1
    queue.update(limit(100, 100, 600.0, max_concurrency=64))
    queue.acquire(20)
    queue.update(limit(100, 10, 600.0, max_concurrency=64))
    queue.acquire(21)
    assert len(logged(log, BUDGET)) == 2


def test_a_budget_that_stays_used_up_is_warned_of_when_its_reset_moves(account, clock, log):
    queue = account.large(limit(1000, 0, 600.0), clock=clock)
    for reset_after in (600.0, 590.0, 550.0):
        queue.update(limit(1000, 0, reset_after))
        assert queue.try_acquire(0) is None
    clock.settle(0)
    assert len(logged(log, BUDGET)) == 1
    queue.update(limit(1000, 0, 661.0))
    assert queue.try_acquire(0) is None
    clock.settle(0)
    assert len(logged(log, BUDGET)) == 2


def test_a_budget_that_is_used_up_is_warned_of_once_where_it_raises(account, clock, log):
    queue = account.large(limit(1000, 0, 600.0), when_exhausted="raise", clock=clock)
    for _ in range(3):
        with pytest.raises(SessionLimitExhausted):
            queue.acquire(0)
    clock.settle(0)
    (line,) = logged(log, BUDGET)
    assert line.startswith("the session start limit is used up (0 left, reserve 0)")


def test_a_budget_that_runs_low_is_warned_of_where_nobody_reports(account, clock, crew, log):
    queue = account.large(limit(1000, 101, 600.0), clock=clock)
    queue.acquire(0)
    in_line(queue, crew, clock, [1, 2])
    clock.advance(WINDOW)
    clock.settle(1)
    assert logged(log, BUDGET) == [
        "the session start limit runs low: 100 of 1000 left, reserve 0; it resets in 10 min 0 s"
    ]
    queue.close()


def test_each_period_has_a_warning_of_its_own(account, clock, log):
    queue = account.large(limit(10, 2, 100.0, max_concurrency=64), clock=clock)
    for shard_id in range(2):
        queue.acquire(shard_id).sent()
    clock.advance(100)
    for shard_id in range(2, 11):
        queue.acquire(shard_id).sent()
    assert [line.split(";")[0] for line in logged(log, BUDGET)] == [
        "the session start limit runs low: 1 of 10 left, reserve 0"
    ] * 2


def test_a_budget_that_is_used_up_is_no_longer_low(account, clock, crew, log):
    queue = account.large(limit(1000, 0, 600.0), clock=clock)
    in_line(queue, crew, clock, [0])
    (line,) = logged(log, BUDGET)
    assert line.startswith("the session start limit is used up (0 left, reserve 0)")
    queue.close()


@memory
def test_a_queue_without_a_budget_has_nothing_to_say_of_it(account, clock, log):
    queue = account.local(clock=clock)
    queue.acquire(0).sent()
    assert not log.records


# --- only if asked for ----------------------------------------------------------------------------


def test_nothing_is_shown_unless_logging_is_configured():
    code = (
        "from gateway_queue_sync import *\n"
        "queue = LargeBotQueue(SessionStartLimit(10, 2, 600.0, 16))\n"
        "queue.acquire(0).sent()\n"
        "queue.acquire(1).sent()\n"
        "assert queue.try_acquire(2) is None\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout + run.stderr == ""
    shown = "import logging; logging.basicConfig(level=logging.INFO)\n"
    run = subprocess.run(
        [sys.executable, "-c", shown + code], capture_output=True, text=True, check=True
    )
    assert "WARNING:gateway_queue_sync.budget:the session start limit runs low" in run.stderr
    assert "WARNING:gateway_queue_sync.budget:the session start limit is used up" in run.stderr


def test_the_loggers_are_below_that_of_the_package():
    assert LocalQueue.__module__.startswith("gateway_queue_sync.")
    for logger in (shards, limits):
        assert logger.parent is logging.getLogger("gateway_queue_sync")
