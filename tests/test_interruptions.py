"""Exceptions raised into callers at any point: nothing is lost, and the queue works on."""

from __future__ import annotations

import contextlib
import ctypes
import dis
import gc
import random
import signal
import sys
import threading
import time
from concurrent.futures import wait

import pytest
from test_waiting import in_line, limit

from gateway_queue_sync import AcquireTimeout, LargeBotQueue, LocalQueue, Report
from gateway_queue_sync.lines import Lines, Waiter
from gateway_queue_sync.queue import scheduler_of
from gateway_queue_sync.testing import FakeClock

SEED = 20261123


class Interrupt(BaseException):
    """What no code under test catches by name."""


def is_inside(frame):
    """Whether a call to the package is under way in this frame."""
    while frame is not None:
        if "gateway_queue_sync" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def is_whole(queue):
    """Whether the lock is free, the lines are empty, and nothing remembers a caller."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(queue.snapshot().waiting), daemon=True)
    thread.start()
    thread.join(5)
    queue.snapshot()  # in this thread, too: it would be refused if it were remembered as a caller
    return seen == [0]


class Injector:
    """Raises ``Interrupt`` at the n-th point where the interpreter would handle a signal.

    It does so when a function begins, after a call and on a jump back: not, say, between the end of a
    ``with lock:`` and the release, which no Python code could survive.
    """

    CHECKED = ("RESUME", "CALL", "JUMP_BACKWARD")

    def __init__(self, at: int) -> None:
        self.left = at
        self.where = ""
        self._previous: dict[object, str] = {}

    def __call__(self, frame, event, argument):
        watched = "gateway_queue_sync" in frame.f_code.co_filename
        if not watched and not frame.f_code.co_qualname.startswith("Condition."):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = self._previous.get(frame, "")
            now = self._previous[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            # A call that raised goes to its handler without looking for signals.
            if before.startswith(self.CHECKED) and now != "PUSH_EXC_INFO":
                self.left -= 1
                if self.left == 0:
                    self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}:{frame.f_lasti}"
                    sys.settrace(None)
                    raise Interrupt
        return self


def run_interrupted_everywhere(call, check, prepare=lambda: None):
    """Run ``call`` again and again, interrupted at the first point, the second, ..."""
    gc.collect()  # else a queue of an earlier test may be deleted meanwhile, and that be interrupted
    at = hit = missed = 0
    while True:
        at += 1
        prepare()
        injector = Injector(at)
        tracer = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # from 3.12 on, no frame reports any otherwise
        sys.settrace(injector)
        try:
            result = call()
        except Interrupt:
            result = None
        finally:
            sys.settrace(tracer)
        check(result, injector)
        hit += bool(injector.where)
        missed = 0 if injector.where else missed + 1
        if missed == 5:  # some interpreters report nothing now and then
            return hit


def tracks_what_is_lost(queue, clock=None):
    """A check that the queue is whole, and counts the permits that reached nobody."""
    lost = []
    total = queue.snapshot().limit.total

    def check(result, injector):
        assert is_whole(queue), injector.where
        if result is not None:
            result.unused()
        if clock is not None:
            clock.advance(60)
        missing = total - queue.snapshot().limit.remaining
        if missing > len(lost):
            lost.append(injector.where)
        assert missing == len(lost), (injector.where, missing)

    return check, lost


# Where a permit is on its way from one function's return to its caller's next assignment: at worst the
# permit that is handed over at that very instruction is lost.
HANDED_OVER = {"take", "try_free", "acquire"}


def test_an_interrupt_at_any_point_of_a_free_acquire(clock):
    queue = LargeBotQueue(limit(1000, 1000, 0.0), clock=clock, period=1e9)
    check, lost = tracks_what_is_lost(queue, clock)
    points = run_interrupted_everywhere(lambda: queue.acquire(0), check)
    assert points > 5
    assert len(set(lost)) <= 3
    assert {where.split(":")[0].split(".")[-1] for where in lost} <= HANDED_OVER, lost


def test_an_interrupt_at_any_point_of_a_try(clock):
    queue = LargeBotQueue(limit(1000, 1000, 0.0), clock=clock, period=1e9)

    def call():
        queue.acquire(0).sent()
        with pytest.raises(AcquireTimeout):
            queue.acquire(0, timeout=0)

    def check(result, injector):
        assert is_whole(queue), injector.where
        clock.advance(60)

    assert run_interrupted_everywhere(call, check) > 15


def test_an_interrupt_at_any_point_of_a_try_after_a_change_of_buckets_opens_none_early(clock):
    """The first look at a bucket lays it out: it could lose what it had from the others."""
    queue = LargeBotQueue(limit(10**6, 10**6), clock=clock, period=1e9)
    buckets = [1]

    def prepare():
        clock.advance(60)
        buckets[0] = 3 - buckets[0]
        queue.acquire(0)
        queue.update(limit(10**6, 10**6, max_concurrency=buckets[0]))

    def check(result, injector):
        assert result is None
        assert queue.try_acquire(0) is None, injector.where
        assert is_whole(queue), injector.where

    assert run_interrupted_everywhere(lambda: queue.try_acquire(0), check, prepare) > 5


def test_an_interrupt_at_any_point_of_a_wait():
    """With really sleeping threads: the first in line, with somebody behind it, every time."""
    queue = LargeBotQueue(limit(10**6, 10**6), interval=0.001, margin=0)
    served = []

    def behind():
        served.append(queue.acquire(1, timeout=20))

    threads = []

    def prepare():
        queue.acquire(9)
        threads.append(threading.Thread(target=behind))
        threads[-1].start()

    def check(result, injector):
        threads[-1].join(20)
        assert not threads[-1].is_alive(), f"whoever was behind is stuck: {injector.where}"
        assert is_whole(queue), injector.where

    points = run_interrupted_everywhere(lambda: queue.acquire(0), check, prepare)
    assert points > 4
    assert len(served) > points


REPORTS = ("sent", "unused", "rejected")


@pytest.mark.parametrize("report", REPORTS)
def test_an_interrupt_at_any_point_of_a_report_leaves_it_whole(clock, report):
    """Either nothing was booked, and the report can be repeated; or all of it was."""
    queue = LargeBotQueue(limit(10**6, 10**6, 0.0), clock=clock, period=1e9)
    permits = []

    def prepare():
        clock.advance(2000)
        permits.append(queue.acquire(0))

    def check(result, injector):
        permit = permits.pop()
        getattr(permit, report)()  # what a user does who does not know
        assert permit.reported.value == report, injector.where
        seen = queue.snapshot()
        if report == "unused":
            assert seen.limit.remaining == queue_starts[0], injector.where
            assert seen.buckets[0].ready_in == 0, injector.where
        elif report == "rejected":
            assert seen.buckets[0].ready_in >= 10.5, injector.where
        assert is_whole(queue), injector.where
        queue_starts[0] = seen.limit.remaining

    queue_starts = [10**6]
    assert (
        run_interrupted_everywhere(
            lambda: getattr(permits[-1], report)(),  # noqa: PLW0108 - another one each time
            check,
            prepare,
        )
        > 4
    )


def test_an_interrupt_at_any_point_of_giving_back_wakes_who_waits_for_it(clock, crew):
    queue = LargeBotQueue(limit(10**6, 1, 1e5), clock=clock, period=1e9)
    held = []

    def prepare():
        queue.update(limit(10**6, 1, 1e5))
        clock.advance(120)
        held.append(queue.acquire(0))
        held.append(in_line(queue, crew, clock, [1])[0])

    def check(result, injector):
        waiter, permit = held.pop(), held.pop()
        permit.unused()
        assert wait([waiter], 5).done, injector.where

    assert (
        run_interrupted_everywhere(
            lambda: held[0].unused(),  # noqa: PLW0108 - another one each time
            check,
            prepare,
        )
        > 4
    )


def test_an_interrupt_at_any_point_of_an_update_wakes_who_waits_for_it(clock, crew):
    queue = LargeBotQueue(limit(10, 0, 1e5), clock=clock, period=1e9)
    waiters = []

    def prepare():
        queue.update(limit(10, 0, 1e5))
        clock.advance(120)
        waiters.extend(in_line(queue, crew, clock, [0, 1]))

    def check(result, injector):
        if queue.snapshot().limit.remaining == 0 and queue.snapshot().waiting == 2:
            queue.update(
                limit(10, 10, 1e5, max_concurrency=2)
            )  # it was interrupted before it began
        assert wait(waiters, 5).not_done == set(), injector.where
        waiters.clear()

    points = run_interrupted_everywhere(
        lambda: queue.update(limit(10, 10, 1e5, max_concurrency=2)), check, prepare
    )
    assert points > 4


def test_waiters_may_leave_and_join_before_an_interrupted_update_is_repeated(clock):
    """The lock is free in between, and then the waiters are no longer those that were to be moved."""
    queue = LargeBotQueue(limit(10**6, 10**6), clock=clock, interval=1e6, period=1e9)
    queue.acquire(0)
    queue.enqueue(0)
    buckets, waiting, updating, lock = [1], [], [], scheduler_of(queue).lock
    release = lock.release

    def meddle():
        release()
        here = threading.current_thread() is threading.main_thread()  # not in the worker
        if here and updating and sys.gettrace() is None:  # interrupted just now
            updating.clear()
            waiting.pop().cancel()
            waiting.append(queue.enqueue(2))

    def prepare():
        buckets[0] = 3 - buckets[0]
        waiting.append(queue.enqueue(1))

    def update():
        updating.append(True)
        queue.update(limit(10**6, 10**6, max_concurrency=buckets[0]))

    def check(outcome, injector):
        expected = [0, 1 if updating else 2]
        updating.clear()
        seen = [shard.shard_id for bucket in queue.snapshot().buckets for shard in bucket.shards]
        assert sorted(seen) == expected, injector.where
        waiting.pop().cancel()
        assert queue.snapshot().waiting == 1, injector.where

    lock.release = meddle
    assert run_interrupted_everywhere(update, check, prepare) > 15


def test_an_interrupted_update_is_complete_before_another_thread_may_take_a_permit(clock):
    """Else its repetition would give back a session start that was used meanwhile."""
    queue = LargeBotQueue(limit(10, 0, 1e5), clock=clock, period=1e9)
    permits, updating, lock = [], [], scheduler_of(queue).lock
    release = lock.release

    def take():
        release()
        if updating and sys.gettrace() is None:  # interrupted just now
            updating.clear()
            permits.append(queue.try_acquire(0))

    def prepare():
        clock.advance(60)
        queue.update(limit(10, 0, 1e5, max_concurrency=2))

    def update():
        updating.append(True)
        queue.update(limit(10, 1, 1e5, max_concurrency=2))

    def check(outcome, injector):
        updating.clear()
        permits.append(queue.try_acquire(1))
        assert len([permit for permit in permits if permit is not None]) <= 1, injector.where
        permits.clear()

    lock.release = take
    assert run_interrupted_everywhere(update, check, prepare) > 5


def test_an_interrupt_at_any_point_of_joining_a_line_leaves_the_number_of_waiters_right():
    lines, waiters = Lines(1), []
    lines.join(Waiter(0, 0, 0))

    def check(outcome, injector):
        lines.leave(waiters.pop())
        assert len(lines) == 1, injector.where

    def prepare():
        waiters.append(Waiter(1, 1, 1))

    assert run_interrupted_everywhere(lambda: lines.join(waiters[0]), check, prepare) > 2


def test_an_interrupt_at_any_point_of_deleting_a_queue_leaves_the_lock_to_its_worker(monkeypatch):
    """The deletion wakes the worker, which needs the lock to end."""
    monkeypatch.setattr(
        sys, "unraisablehook", lambda unraisable: None
    )  # the interrupt arrives there
    queues, locks = [], []

    def prepare():
        clock = FakeClock()
        queue = LocalQueue(clock=clock)
        queue.acquire(0)
        queue.enqueue(0).cancel()  # starts the worker
        clock.settle(0)  # it sleeps, and has no reference to what is deleted
        locks.append(scheduler_of(queue).lock)
        queues.append(queue)

    def check(outcome, injector):
        taken, lock = [], locks.pop()
        thread = threading.Thread(target=lambda: taken.append(lock.acquire(timeout=5)), daemon=True)
        thread.start()
        thread.join()
        assert taken == [True], injector.where

    assert run_interrupted_everywhere(queues.clear, check, prepare) > 0


def test_an_interrupt_at_any_point_of_an_enqueue_loses_nothing(clock):
    queue = LargeBotQueue(limit(1000, 1000, 0.0), clock=clock, period=1e9)
    check, lost = tracks_what_is_lost(queue, clock)

    def finish(future, injector):
        check(None if future is None else future.result(5), injector)

    assert run_interrupted_everywhere(lambda: queue.enqueue(0), finish) > 6
    assert len(set(lost)) <= 3
    assert {where.split(":")[0].split(".")[-1] for where in lost} <= HANDED_OVER | {"enqueue"}, lost


@pytest.mark.parametrize(
    "method", ["cancel", "cancelled", "running", "done", "result", "exception"]
)
def test_an_interrupt_at_any_point_of_a_call_of_a_future_leaves_no_lock_behind(clock, method):
    queue = LargeBotQueue(limit(1000, 1000, 0.0), clock=clock, period=1e9)
    queue.acquire(0)
    futures = []
    arguments = [0] if method in ("result", "exception") else []

    def call():
        with contextlib.suppress(TimeoutError):
            getattr(futures[-1], method)(*arguments)

    def check(result, injector):
        future = futures.pop()
        assert queue.snapshot().waiting == (not future.cancelled()), injector.where
        others = [threading.Thread(target=future.cancel, daemon=True) for _ in range(2)]
        for thread in others:
            thread.start()
            thread.join(5)
            assert not thread.is_alive(), injector.where
        assert wait([future], 5).done, injector.where
        assert is_whole(queue), injector.where

    points = run_interrupted_everywhere(call, check, lambda: futures.append(queue.enqueue(0)))
    assert points > 3 or sys.version_info >= (3, 13)  # which reports fewer, and runs less in Python


def test_signals_at_random_points_lose_nothing():
    """Ctrl-C again and again, while other threads wait and go."""
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    total = 10**6
    queue = LargeBotQueue(limit(total, total), interval=0.000_1, margin=0.001, period=1e6)
    taken = []
    stop = threading.Event()

    def worker():
        while not stop.is_set():
            taken.append(queue.acquire(1))

    def handler(signum, frame):
        if is_inside(frame):
            raise KeyboardInterrupt

    workers = [threading.Thread(target=worker) for _ in range(2)]
    before = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        for thread in workers:
            thread.start()
        for _ in range(1500):
            timeout = rng.choice([None, 0, 0.0005, 0.002])
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.000_01, 0.000_5))
            try:
                taken.append(queue.acquire(0, timeout=timeout))
            except AcquireTimeout:
                pass
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        stop.set()
        for thread in workers:
            thread.join(20)
    assert is_whole(queue)
    assert interrupted > 300
    assert total - queue.snapshot().limit.remaining == len(taken)


def test_signals_while_queues_are_made_leave_no_lock_behind():
    """All queues of a process are registered under one lock, which a fork takes, too."""
    rng = random.Random(SEED)

    def handler(signum, frame):
        if is_inside(frame):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        for _ in range(4000):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.000_005, 0.000_06))
            try:
                LocalQueue()
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100
    thread = threading.Thread(target=LocalQueue, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


def test_asynchronous_exceptions_at_random_points_lose_nothing():
    """As a debugger or a framework raises them into a thread; one for each call of the victim."""
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    total, rounds = 10**6, 1500
    queue = LargeBotQueue(limit(total, total), interval=0.000_1, margin=0.001, period=1e6)
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    taken, inside, over, stop = (
        [],
        threading.Semaphore(0),
        threading.Semaphore(0),
        threading.Event(),
    )

    def victim():
        for _ in range(rounds):
            try:
                inside.release()
                taken.append(queue.acquire(0))
                while True:  # it came too late for this call, or is still on its way
                    time.sleep(0.000_1)
            except Interrupt:
                over.release()

    def worker():
        while not stop.is_set():
            taken.append(queue.acquire(1))

    threads = [threading.Thread(target=target) for target in (victim, worker, worker)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        assert inside.acquire(timeout=20)
        time.sleep(rng.uniform(0, 0.000_2))
        raise_in(ctypes.c_ulong(threads[0].ident), ctypes.py_object(Interrupt))
        assert over.acquire(timeout=20), "the victim is stuck"
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert is_whole(queue)
    assert total - queue.snapshot().limit.remaining == len(taken)


def test_an_interrupted_sleeper_hands_the_front_on(clock, crew):
    """Waiting inside a lock made it impossible to interrupt anybody."""
    queue = LocalQueue(clock=clock)
    queue.acquire(9)
    (first,) = in_line(queue, crew, clock, [0])
    victim = crew.threads[-1]
    (second,) = in_line(queue, crew, clock, [1])
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(victim.ident), ctypes.py_object(Interrupt)
    )
    clock.advance(5.25)  # it is delivered when its wait ends
    assert isinstance(first.exception(10), Interrupt)
    clock.settle(0)
    assert second.now().shard_id == 1


class Striking:
    """A clock whose readings raise, a few times, once it is armed: as interrupts in a row do."""

    def __init__(self, clock, blows):
        self._clock, self.blows, self.armed = clock, blows, False

    def __getattr__(self, name):
        return getattr(self._clock, name)

    def now_us(self):
        if self.armed and self.blows:
            raise self.blows.pop(0)
        return self._clock.now_us()


def test_interrupts_in_a_row_cannot_stop_the_leaving(clock):
    striking = Striking(clock, [Interrupt, KeyboardInterrupt, Interrupt])
    queue = LargeBotQueue(limit(10, 10, 600.0), clock=striking, observer=lambda event: None)
    permit = queue.acquire(9)
    striking.armed = True
    with pytest.raises((Interrupt, KeyboardInterrupt)):
        permit.rejected()  # reads the clock when it books
    assert not striking.blows
    assert permit.reported is Report.REJECTED
    assert is_whole(queue)


def test_ctrl_c_ends_a_wait():
    queue = LocalQueue(interval=30)
    queue.acquire(0)

    def interrupt():
        while not queue.snapshot().waiting:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        queue.acquire(1)
    thread.join()
    assert is_whole(queue)
