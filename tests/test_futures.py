"""Futures: waiters without a thread."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
import time
import weakref
from concurrent.futures import FIRST_COMPLETED, CancelledError, as_completed, wait

import pytest
from test_waiting import in_line, limit, order

from gateway_queue_sync import (
    LocalQueue,
    QueueClosed,
    ShardGranted,
    ShardLeft,
    ShardWaiting,
)
from gateway_queue_sync.future import PermitFuture
from gateway_queue_sync.lines import Waiter
from gateway_queue_sync.queue import scheduler_of

WINDOW = 5.25


LINGER = 5.0  # s that the worker of a shared ledger stays when there is nothing to do


others = set()  # the workers that earlier tests have left


@pytest.fixture(autouse=True)
def only_own_workers():
    others.clear()
    others.update(workers())


def workers():
    found = [thread for thread in threading.enumerate() if thread.name == "gateway-queue-worker"]
    return [thread for thread in found if thread not in others]


def wait_for_no_worker(clock):
    clock.settle(0)
    clock.advance(LINGER)
    for thread in workers():
        thread.join(5)
        assert not thread.is_alive()


class SignalHandler:
    """A clock that makes a call when it is read, as a signal handler in the reading thread would."""

    def __init__(self, clock, call):
        self._clock, self._call, self.armed = clock, call, False

    def __getattr__(self, name):
        return getattr(self._clock, name)

    def now_us(self):
        if self.armed and threading.current_thread() is threading.main_thread():
            self.armed = False
            self._call()
        return self._clock.now_us()


def test_a_free_bucket_makes_a_finished_future(account, clock):
    queue = account.local(clock=clock)
    assert queue.enqueue(4).result(10).shard_id == 4


@pytest.mark.accounts("memory")
def test_a_free_bucket_in_memory_needs_no_worker(account, clock):
    queue, before = account.local(clock=clock), workers()
    assert queue.enqueue(4).result(0).shard_id == 4
    assert set(workers()) <= set(before)


def test_futures_and_threads_stand_in_one_line(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(9)
    (first,) = in_line(queue, crew, clock, [1])
    second = queue.enqueue(2)
    clock.settle(1)
    (third,) = in_line(queue, crew, clock, [3])
    ahead = queue.enqueue(4, priority=60.0)
    assert order(queue.snapshot()) == [4, 1, 2, 3]
    for future, parked in ((ahead, 2), (first, 2), (second, 1), (third, 1)):
        clock.settle(parked)
        assert not future.done()
        clock.advance(WINDOW)
        future.result(10)


def test_one_thread_serves_all_and_is_gone_when_nobody_waits(account, clock):
    queue = account.large(limit(max_concurrency=4), clock=clock)
    for shard in range(4):
        queue.acquire(shard)
    futures = [queue.enqueue(shard) for shard in range(40)]
    assert len(workers()) == 1
    for _ in range(10):
        clock.settle(0)
        clock.advance(WINDOW)
    assert [future.result(10).shard_id for future in futures] == list(range(40))
    wait_for_no_worker(clock)
    again = queue.enqueue(0)
    clock.settle(0)
    clock.advance(WINDOW)
    again.result(10)


def test_a_cancelled_future_leaves_the_line_at_once_and_costs_nothing(account, clock):
    queue = account.large(limit(10, 10, 600.0), clock=clock)
    queue.acquire(9)
    futures = [queue.enqueue(shard) for shard in range(3)]
    assert futures[1].cancel()
    assert futures[1].cancel()
    assert order(queue.snapshot()) == [0, 2]
    assert futures[0].cancel()
    clock.settle(0)
    clock.advance(WINDOW)
    assert futures[2].result(10).remaining == 8
    with pytest.raises(CancelledError):
        futures[0].result(0)


def test_who_waits_for_a_cancelled_future_is_told(account, clock):
    queue = account.local(clock=clock)
    queue.acquire(9)
    futures = [queue.enqueue(shard) for shard in range(3)]
    futures[1].cancel()
    done, _ = wait(futures, timeout=10, return_when=FIRST_COMPLETED)
    assert done == {futures[1]}
    queue.close()
    assert set(as_completed(futures, timeout=10)) == set(futures)


def test_a_future_that_is_closed_while_its_permit_is_told_of_gets_the_error_alone(account, clock):
    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 0:
            queue.close()

    queue = account.large(limit(10, 10, 600.0), clock=clock, observer=observer)
    queue.acquire(9)
    future = queue.enqueue(0)
    clock.settle(0)
    clock.advance(WINDOW)
    assert isinstance(future.exception(10), QueueClosed)
    wait_for_no_worker(clock)
    assert queue.snapshot().limit.remaining == 9


def test_a_future_that_is_cancelled_while_its_permit_is_told_of_costs_nothing(account, clock):
    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 0:
            assert future.cancel()

    queue = account.large(limit(10, 10, 600.0), clock=clock, observer=observer)
    queue.acquire(9)
    future = queue.enqueue(0)
    clock.settle(0)
    clock.advance(WINDOW)
    wait_for_no_worker(clock)
    assert (queue.snapshot().limit.remaining, queue.snapshot().waiting) == (9, 0)


def test_a_future_that_is_cancelled_while_its_permit_is_told_of_too_late_stays_out(account, clock):
    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 0:
            clock.advance(1.0)  # longer than the margin
            future.cancel()

    queue = account.large(limit(10, 10, 600.0), clock=clock, observer=observer)
    queue.acquire(9)
    future = queue.enqueue(0)
    clock.settle(0)
    clock.advance(WINDOW)
    wait_for_no_worker(clock)
    assert future.cancelled()
    assert (queue.snapshot().limit.remaining, queue.snapshot().waiting) == (9, 0)


def test_closing_completes_every_future_whatever_their_callbacks_raise(account, clock, caplog):
    queue = account.local(clock=clock)
    queue.acquire(9)
    futures = [queue.enqueue(shard) for shard in range(6)]

    def callback(future):
        raise KeyboardInterrupt

    for future in futures:
        future.add_done_callback(callback)
    queue.close()
    for future in futures:
        assert isinstance(future.exception(10), QueueClosed)
    wait_for_no_worker(clock)


@pytest.mark.accounts("memory")
@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, ValueError])
def test_an_observer_that_raises_stops_no_future(account, clock, caplog, raised):
    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id < 9:
            raise raised

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(9)
    futures = [queue.enqueue(shard) for shard in range(3)]
    for future in futures:
        clock.settle(0)
        clock.advance(WINDOW)
        assert future.result(10).bucket == 0
    assert caplog.text.count("an observer raised") == 3


@pytest.mark.accounts("memory")
def test_a_finished_future_keeps_neither_permit_nor_queue_alive(account, clock):
    queue = account.local(clock=clock)
    queue.acquire(9)
    gc.disable()
    try:
        done, cancelled, closed = (queue.enqueue(shard) for shard in range(3))
        cancelled.cancel()
        clock.settle(0)
        clock.advance(WINDOW)
        done.result(10)
        clock.settle(0)
        queue.close()
        closed.exception(10)
        wait_for_no_worker(clock)
        kept = [weakref.ref(one) for one in (done.result(), done, cancelled, closed, queue)]
        del done, cancelled, closed, queue
        assert [ref() for ref in kept] == [None] * 5
    finally:
        gc.enable()


@pytest.mark.accounts("memory")
def test_an_interrupt_that_comes_with_a_finished_future_costs_nothing(account, clock, monkeypatch):
    queue = account.large(limit(10, 10, 600.0), clock=clock)

    def interrupted(future, permit):
        raise KeyboardInterrupt

    monkeypatch.setattr(PermitFuture, "set_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.enqueue(0)
    seen = queue.snapshot()
    assert (seen.limit.remaining, seen.buckets[0].ready_in) == (10, 0.0)


@pytest.mark.accounts("memory")
def test_a_future_cancelled_in_the_midst_of_a_call_leaves_right_after_it(account, clock):
    """As a signal handler does that interrupts the queue."""
    futures = []
    handler = SignalHandler(clock, lambda: futures[0].cancel())  # noqa: PLW0108 - there is none yet
    queue = account.local(clock=handler)
    queue.acquire(9)
    futures.append(queue.enqueue(0))
    clock.settle(0)
    handler.armed = True
    assert queue.try_acquire(1) is None  # reads the clock with the lock held
    assert not handler.armed
    assert futures[0].cancelled()
    for thread in threading.enumerate():
        if thread.name == "gateway-queue-cancel":
            thread.join(10)
    assert queue.snapshot().waiting == 0
    wait_for_no_worker(clock)


@pytest.mark.accounts("memory")
def test_a_callback_may_try(account, clock):
    queue = account.local(clock=clock)
    queue.acquire(9)
    tried = []
    future = queue.enqueue(0)
    future.add_done_callback(lambda future: tried.append(queue.try_acquire(1)))
    clock.settle(0)
    clock.advance(WINDOW)
    wait_for_no_worker(clock)
    assert tried == [None]


@pytest.mark.accounts("sqlite", "http")
@pytest.mark.parametrize("call", ["try_acquire", "snapshot", "update"])
def test_a_callback_must_not_wait_for_the_worker_that_runs_it(account, clock, call):
    queue = account.local(clock=clock)
    queue.acquire(9)
    errors = []

    def callback(future):
        arguments = {"try_acquire": [1], "snapshot": [], "update": [limit()]}[call]
        with pytest.raises(RuntimeError, match="must not block") as caught:
            getattr(queue, call)(*arguments)
        errors.append(caught.value)

    future = queue.enqueue(0)
    future.add_done_callback(callback)
    clock.settle(0)
    clock.advance(WINDOW)
    wait_for_no_worker(clock)
    assert len(errors) == 1


def test_cancelling_the_last_future_ends_its_thread(account, clock):
    queue = account.local(clock=clock)
    queue.acquire(9)
    assert queue.enqueue(0).cancel()
    wait_for_no_worker(clock)
    assert queue.snapshot().waiting == 0


def test_a_cancelled_head_hands_the_front_to_a_thread(account, clock, crew):
    """One limiter loses everyone behind a cancelled head for good."""
    queue = account.local(clock=clock)
    queue.acquire(9)
    future = queue.enqueue(0)
    clock.settle(0)
    (call,) = in_line(queue, crew, clock, [1])
    future.cancel()
    clock.settle(1)
    clock.advance(WINDOW)
    assert call.now().waited == WINDOW


@pytest.mark.accounts("memory")
def test_a_future_cancelled_as_it_is_granted_gives_the_permit_to_the_next(account, clock):
    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 0:
            super(type(first), first).cancel()  # its state alone, as another thread at this instant

    queue = account.large(limit(10, 10, 600.0), clock=clock, observer=observer)
    queue.acquire(9)
    first, second = queue.enqueue(0), queue.enqueue(1)
    clock.settle(0)
    clock.advance(WINDOW)
    assert second.result(10).remaining == 8
    assert queue.snapshot().buckets[0].ready_in == WINDOW


def test_callbacks_run_and_one_that_raises_stops_nobody(account, clock, caplog):
    queue = account.local(clock=clock)
    queue.acquire(9)
    futures = [queue.enqueue(shard) for shard in range(3)]
    called = []

    def callback(future):
        called.append(future.result().shard_id)
        raise (SystemExit if len(called) == 1 else ValueError)

    for future in futures:
        future.add_done_callback(callback)
    for future in futures:
        clock.settle(0)
        clock.advance(WINDOW)
        future.result(10)
    wait_for_no_worker(clock)
    assert called == [0, 1, 2]


@pytest.mark.accounts("memory")
@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, ValueError])
def test_all_callbacks_of_a_future_run_whatever_one_raises(account, clock, caplog, raised):
    queue = account.local(clock=clock)
    queue.acquire(9)
    called = []

    def callback(future):
        raise raised

    future = queue.enqueue(0)
    future.add_done_callback(callback)
    future.add_done_callback(called.append)
    clock.settle(0)
    clock.advance(WINDOW)
    wait_for_no_worker(clock)
    assert called == [future]
    assert raised.__name__ in caplog.text


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_as_its_future_is_cancelled_keeps_nobody_in_line(
    account, clock, caplog, raised
):
    queue = account.local(clock=clock)
    queue.acquire(9)
    called = []

    def callback(future):
        raise raised

    future = queue.enqueue(0)
    future.add_done_callback(callback)
    future.add_done_callback(called.append)
    with pytest.raises(raised):
        future.cancel()
    assert called == [future]
    assert queue.snapshot().waiting == 0
    assert wait([future], timeout=10).done == {future}
    assert future.cancel()


@pytest.mark.accounts("memory")
def test_ctrl_c_in_a_callback_that_is_called_at_once_is_raised(account, clock, caplog):
    def callback(future):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        account.local(clock=clock).enqueue(0).add_done_callback(callback)


@pytest.mark.accounts("memory")
def test_a_future_whose_lock_somebody_holds_holds_up_nobody_else(account, clock, crew):
    queue = account.local(clock=clock)
    queue.acquire(9)
    future = queue.enqueue(0)
    clock.settle(0)
    with future._condition:
        clock.advance(WINDOW)
        while crew(queue.snapshot).result(5).granted < 2:
            pass
    assert future.result(10).shard_id == 0


@pytest.mark.accounts("memory")
def test_an_asynchronous_exception_does_not_end_the_worker(account, clock, caplog):
    queue = account.local(clock=clock)
    queue.acquire(9)
    future = queue.enqueue(0)
    clock.settle(0)
    (worker,) = workers()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit)
    )
    clock.advance(WINDOW)  # it comes when the sleep ends
    assert future.result(10).shard_id == 0
    assert "SystemExit" in caplog.text


def test_a_callback_that_would_block_on_its_own_queue_is_told_so(account, clock):
    queue = account.local(clock=clock)
    queue.acquire(9)
    errors = []

    def callback(future):
        try:
            queue.acquire(5)
        except RuntimeError as error:
            errors.append(str(error))

    future = queue.enqueue(0)
    future.add_done_callback(callback)
    clock.settle(0)
    clock.advance(WINDOW)
    wait_for_no_worker(clock)
    assert errors == ["a future's callback must not block on the queue that serves it"]


def test_futures_of_a_closed_queue_carry_the_error(account, clock):
    queue = account.local(clock=clock)
    queue.acquire(9)
    futures = [queue.enqueue(shard) for shard in range(3)]
    futures[1].cancel()
    clock.settle(0)
    queue.close()
    wait_for_no_worker(clock)
    for future in (futures[0], futures[2]):
        assert isinstance(future.exception(0), QueueClosed)


@pytest.mark.accounts("memory")
def test_a_thread_that_cannot_be_started_leaves_nobody_in_line(account, clock, monkeypatch):
    queue = account.local(clock=clock)
    queue.acquire(9)

    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        queue.enqueue(0)
    assert queue.snapshot().waiting == 0
    monkeypatch.undo()
    future = queue.enqueue(1)
    clock.settle(0)
    clock.advance(WINDOW)
    future.result(10)


def test_relined_futures_go_on_in_their_new_buckets(account, clock):
    queue = account.local(clock=clock)
    queue.acquire(9)
    futures = [queue.enqueue(shard) for shard in range(4)]
    clock.settle(0)
    queue.update(limit(max_concurrency=4))
    clock.settle(0)
    clock.advance(WINDOW)
    assert [future.result(10).bucket for future in futures] == [0, 1, 2, 3]


@pytest.mark.accounts("memory")
def test_a_future_waits_before_it_is_granted_however_slow_the_observer_is(account, clock):
    heard, granted, main = [], threading.Event(), threading.current_thread()

    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 0:
            granted.set()
        elif isinstance(event, ShardWaiting):
            clock.advance(WINDOW)
            if threading.current_thread() is main:  # the worker is not held up
                assert granted.wait(10)
        heard.append(type(event))

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(9)
    heard.clear()
    queue.enqueue(0).result(10)
    wait_for_no_worker(clock)
    assert heard == [ShardWaiting, ShardGranted]
    assert not scheduler_of(queue).observers.latest


def test_a_future_waits_before_it_is_cancelled_however_slow_the_observer_is(account, clock):
    heard, waits, cancelled = [], threading.Event(), threading.Event()

    def observer(event):
        if isinstance(event, ShardWaiting):
            waits.set()
            assert cancelled.wait(10)
        heard.append(type(event))

    queue = account.local(clock=clock, observer=observer)
    queue.acquire(9)
    heard.clear()
    future = queue.enqueue(0)
    assert waits.wait(10)
    future.cancel()
    cancelled.set()
    wait_for_no_worker(clock)
    assert heard == [ShardWaiting, ShardLeft]
    assert not scheduler_of(queue).observers.latest


def test_observers_hear_of_futures(account, clock):
    heard = []
    queue = account.local(clock=clock, observer=heard.append)
    queue.acquire(9)
    heard.clear()
    future = queue.enqueue(3)
    clock.settle(0)
    future.cancel()
    clock.settle(0)
    assert heard == [ShardWaiting(3, 0, 0, WINDOW), ShardLeft(3, 0.0, "cancelled")]


@pytest.mark.accounts("memory")
def test_ten_thousand_cancels_leave_nothing_behind(account, clock):
    """A line that is blocked for a day must not grow with those who gave up."""
    queue = account.local(clock=clock)
    queue.acquire(9)
    blocked = queue.enqueue(0)
    for shard in range(10_000):
        queue.enqueue(shard).cancel()
    gc.collect()
    assert sum(isinstance(one, Waiter) for one in gc.get_objects()) < 50
    blocked.cancel()
    wait_for_no_worker(clock)


# --- asyncio --------------------------------------------------------------------------------------


def test_asyncio_awaits_without_a_thread_and_cancelling_leaves_the_line():
    queue = LocalQueue(interval=0.05, margin=0.0)

    async def main():
        await asyncio.wrap_future(queue.enqueue(0))
        ghost = asyncio.ensure_future(asyncio.wrap_future(queue.enqueue(1)))
        behind = asyncio.wrap_future(queue.enqueue(2))
        await asyncio.sleep(0)
        ghost.cancel()
        began = time.monotonic()
        permit = await behind
        return permit.shard_id, time.monotonic() - began

    shard_id, took = asyncio.run(main())
    assert shard_id == 2
    assert took < 5
    assert queue.snapshot().granted == 2
    assert queue.snapshot().waiting == 0
