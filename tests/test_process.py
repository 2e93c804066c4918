"""Events of a process that has a queue: signals, finalizers, forks, exit, frozen time."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from clocks import Hooked
from freezegun import freeze_time

from gateway_queue_sync import AcquireTimeout, LocalQueue, QueueClosed, ShardGranted

ROOT = Path(__file__).parent.parent


def python(code, timeout=30):
    """Run a program of its own, warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        check=False,
    )


# --- re-entry -------------------------------------------------------------------------------------


@pytest.fixture
def on_signal():
    """Set what SIGUSR1 does, for one test."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handler: signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGUSR1, before)


def signal_main_soon():
    main = threading.main_thread().ident
    timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1))
    timer.start()
    return timer


@pytest.mark.parametrize("method", ["acquire", "try_acquire"])
def test_a_signal_handler_in_a_waiting_thread_is_refused(on_signal, method):
    queue = LocalQueue(interval=0.15, margin=0.25)
    queue.acquire(0)
    errors = []

    def handler(signum, frame):
        try:
            getattr(queue, method)(1)
        except RuntimeError as error:
            errors.append(str(error))

    on_signal(handler)
    timer = signal_main_soon()
    assert queue.acquire(2).shard_id == 2
    timer.join()
    assert len(errors) == 1
    assert "signal handler" in errors[0]
    assert queue.snapshot().granted == 2


@pytest.mark.parametrize("waits", [False, True])
def test_an_observer_may_enqueue(clock, crew, waits):
    """That never blocks, whatever its thread is inside of."""
    futures = []

    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 1:
            futures.append(queue.enqueue(2))

    queue = LocalQueue(clock=clock, observer=observer)
    if waits:
        queue.acquire(0)
        call = crew(queue.acquire, 1)
        clock.settle(1)
        clock.advance(5.25)
        call.now()
    else:
        queue.acquire(1)
    clock.settle(0)
    clock.advance(5.25)
    assert futures[0].result(10).shard_id == 2


def test_a_signal_handler_may_close_the_queue_that_its_thread_waits_in(on_signal):
    queue = LocalQueue(interval=30)
    queue.acquire(0)
    on_signal(lambda signum, frame: queue.close())
    timer = signal_main_soon()
    with pytest.raises(QueueClosed):
        queue.acquire(1)
    timer.join()


@pytest.mark.parametrize("at", range(1, 6))
def test_a_signal_handler_may_close_the_queue_even_in_the_midst_of_a_call(clock, at):
    hooked = Hooked(clock)
    queue = LocalQueue(clock=hooked)
    hooked.call = queue.close
    queue.acquire(0)
    hooked.left = at  # the clock is read with the lock held, and without
    with contextlib.suppress(AcquireTimeout, QueueClosed):
        queue.acquire(1, timeout=0)
    hooked.left = 0
    queue.close()
    assert queue.closed
    for thread in threading.enumerate():
        if thread.name == "gateway-queue-close":
            thread.join(10)
            assert not thread.is_alive()


def test_a_finalizer_in_the_midst_of_a_call_is_refused(clock):
    errors = []

    class Careless:
        def __del__(self):
            try:
                queue.acquire(1)
            except RuntimeError as error:
                errors.append(error)

    def collect():
        garbage = Careless()
        garbage.itself = garbage
        del garbage
        gc.collect()

    hooked = Hooked(clock, collect)
    queue = LocalQueue(clock=hooked)
    hooked.left = 1  # with the lock held
    queue.acquire(0)
    assert len(errors) == 1
    assert queue.snapshot().granted == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda queue, permit: queue.acquire(0),
        lambda queue, permit: queue.enqueue(0),
        lambda queue, permit: queue.update(None),
        lambda queue, permit: queue.snapshot(),
        lambda queue, permit: permit.sent(),
    ],
)
def test_nothing_sees_a_half_done_state(clock, call):
    """A signal handler that comes while the clock is read with the lock held."""
    errors = []

    def handler():
        with pytest.raises((RuntimeError, TypeError)) as caught:
            call(queue, permit)
        errors.append(caught.value)

    hooked = Hooked(clock, handler)
    queue = LocalQueue(clock=hooked)
    permit = queue.acquire(0)
    clock.advance(5.25)
    hooked.left = 1
    queue.acquire(1)
    assert len(errors) == 1


# --- forks ----------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@needs_fork
def test_a_forked_child_is_refused_and_the_parent_goes_on():
    """Its copy of the account would grant what the parent grants, too."""
    result = python(
        """
        import os, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from gateway_queue_sync import LocalQueue
        from gateway_queue_sync.clock import SystemClock
        inside, go = threading.Event(), threading.Event()

        class Clock(SystemClock):
            def now_us(self):
                if threading.current_thread().name == "inside":
                    inside.set()
                    go.wait()
                return SystemClock.now_us()

        queue = LocalQueue(interval=0.05, margin=0, clock=Clock())
        permit = queue.acquire(0)
        waiting = threading.Thread(target=queue.acquire, args=(1,))
        waiting.start()
        holds = threading.Thread(target=queue.snapshot, name="inside")
        holds.start()
        inside.wait()                   # the worst moment: somebody holds the lock
        child = os.fork()
        if child == 0:
            permit.sent()               # harmless
            queue.close()
            for call in (lambda: queue.acquire(0), lambda: queue.try_acquire(0),
                         lambda: queue.enqueue(0), queue.snapshot, lambda: queue.update(None)):
                try:
                    call()
                except RuntimeError as error:
                    assert "forked" in str(error) and "SqliteQueue" in str(error), error
                except TypeError:
                    pass
                else:
                    os._exit(1)
            fresh = LocalQueue()
            fresh.acquire(0)
            os._exit(7)
        go.set()
        holds.join()
        _, status = os.waitpid(child, 0)
        waiting.join()
        print(os.waitstatus_to_exitcode(status), queue.snapshot().granted)
        """
    )
    assert (result.stdout.strip(), result.stderr) == ("7 2", "")


FORKS = """
    import os, signal, threading, warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    from gateway_queue_sync import LargeBotQueue, SessionStartLimit, ShardGranted
    from gateway_queue_sync.clock import SystemClock

    class Clock(SystemClock):
        left = 0

        def now_us(self):
            if self.left and threading.current_thread() is threading.main_thread():
                self.left -= 1
                if not self.left:
                    fork()
            return SystemClock.now_us()

    def fork():
        global child
        child = os.fork()
        if not child:
            signal.alarm(10)  # kills a child that hangs

    def result(call):
        # What came of the call in the parent and in the child; nothing for a child there is not.
        global child
        parent, child = os.getpid(), None
        ours, theirs = os.pipe()
        try:
            permit = call()
            came = "permit" if permit is not None else "nothing"
        except RuntimeError as error:
            came = "refused" if "forked" in str(error) else repr(error)
        except BaseException as error:
            came = repr(error)
        if os.getpid() != parent:
            os.write(theirs, came.encode())
            os._exit(0)
        os.close(theirs)
        if child is None:
            return came, None
        os.waitpid(child, 0)
        return came, os.read(ours, 1000).decode()
"""


@needs_fork
@pytest.mark.parametrize("waits", [False, True])
def test_a_child_that_an_observer_forks_inside_a_call_gets_no_permit(waits):
    """It got the same one as its parent."""
    result = python(
        FORKS
        + f"""
    def observer(event):
        if isinstance(event, ShardGranted) and event.shard_id == 1:
            fork()

    queue = LargeBotQueue(
        SessionStartLimit(10, 10, 600.0, 1), interval=0.05, margin=0.5, observer=observer
    )
    if {waits}:
        queue.acquire(0)
    print(*result(lambda: queue.acquire(1)), queue.snapshot().limit.remaining)
        """
    )
    assert (result.stdout, result.stderr) == (f"permit refused {9 - waits}\n", "")


@needs_fork
@pytest.mark.parametrize("by", ["observer", "callback"])
def test_a_child_that_is_forked_in_the_worker_gets_no_permit_and_ends(by):
    result = python(
        FORKS
        + f"""
    def fork_in(place, shard_id):
        if place == {by!r} and shard_id == 1:
            fork()

    def observer(event):
        if isinstance(event, ShardGranted):
            fork_in("observer", event.shard_id)

    def note(future):
        os.write(1, f"{{os.getpid() == parent}} {{future.result().shard_id}}\\n".encode())
        noted.release()

    parent, noted = os.getpid(), threading.Semaphore(0)
    queue = LargeBotQueue(
        SessionStartLimit(10, 10, 600.0, 1), interval=0.05, margin=0.5, observer=observer
    )
    queue.acquire(0)
    futures = [queue.enqueue(1), queue.enqueue(2)]
    for future in futures:
        future.add_done_callback(lambda future: fork_in("callback", future.result().shard_id))
        future.add_done_callback(note)
    for future in futures:
        assert noted.acquire(timeout=10)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), queue.snapshot().granted, flush=True)
        """
    )
    printed = sorted(result.stdout.splitlines())
    assert (printed, result.stderr) == (["0 3", "True 1", "True 2"], "")


@needs_fork
def test_a_child_that_a_callback_forks_at_close_calls_no_other_callback():
    result = python(
        FORKS
        + """
    def note(future):
        os.write(1, f"{os.getpid() == parent}\\n".encode())
        noted.release()

    parent, noted = os.getpid(), threading.Semaphore(0)
    queue = LargeBotQueue(SessionStartLimit(10, 10, 600.0, 1))
    queue.acquire(0)
    future = queue.enqueue(1)
    future.add_done_callback(lambda _: fork())
    future.add_done_callback(note)
    queue.close()
    assert noted.acquire(timeout=10)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert (sorted(result.stdout.splitlines()), result.stderr) == (["0", "True"], "")


@needs_fork
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("call", ["acquire", "try_acquire", "enqueue"])
def test_a_child_that_a_signal_handler_forks_inside_a_call_gets_no_permit(call, waits):
    """Here it comes whenever the clock is read."""
    if waits and call != "acquire":
        pytest.skip("only acquire waits")
    result = python(
        FORKS
        + f"""
    results = []
    for at in range(1, 12):
        clock = Clock()
        queue = LargeBotQueue(
            SessionStartLimit(10, 10, 600.0, 1), interval=0.05, margin=0.1, clock=clock
        )
        if {waits}:
            queue.acquire(0)
        clock.left = at
        came, child_came = result(lambda: queue.{call}(1))
        clock.left = 0
        assert came == "permit", came
        assert child_came in (None, "refused"), (at, child_came)
        assert queue.snapshot().limit.remaining == 9 - {waits}
        results.append(child_came)
    print(results.count("refused") > 0)
        """
    )
    assert (result.stdout, result.stderr) == ("True\n", "")


@needs_fork
@pytest.mark.parametrize("is_head", [False, True])
def test_a_child_that_a_signal_handler_forks_while_its_thread_sleeps_is_refused(is_head):
    """It slept for ever: whoever would have woken it is in the parent."""
    result = python(
        f"""
    import contextlib, os, signal, threading, warnings
    from gateway_queue_sync import LocalQueue, QueueClosed
    warnings.simplefilter("ignore")  # from 3.12 on: this process has several threads
    queue = LocalQueue(interval=3600)
    queue.acquire(0)
    def wait():
        with contextlib.suppress(QueueClosed):
            queue.acquire(1)
    if not {is_head}:
        threading.Thread(target=wait, daemon=True).start()
        while queue.snapshot().waiting < 1:
            pass
    child = None
    def fork(*_):
        global child
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            queue.close()
    signal.signal(signal.SIGALRM, fork)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        queue.acquire(2)
    except QueueClosed:
        print("closed")
    except RuntimeError as error:
        os._exit(7 if child == 0 and "before the process forked" in str(error) else 1)
        """
    )
    assert (result.stdout, result.stderr) == ("7\nclosed\n", "")


# --- the end of the interpreter -------------------------------------------------------------------


@needs_fork
def test_an_interrupt_at_any_point_of_a_fork_leaves_no_lock_behind_and_no_copy_that_grants(
    tmp_path,
):
    """Python ignores the exceptions of what it calls at a fork, and forks all the same."""
    code = f"""
import os, sys, threading, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_interruptions import Injector
from gateway_queue_sync import LocalQueue, SqliteQueue

sys.unraisablehook = lambda _: None
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads
local, shared = LocalQueue(), SqliteQueue({str(tmp_path / "queue.db")!r})
sys._getframe().f_trace_opcodes = True
def use():
    LocalQueue()
    shared.snapshot()
at = missed = 0
while missed < 5:
    at += 1
    injector = Injector(at)
    sys.settrace(injector)
    child = os.fork()
    sys.settrace(None)
    if child == 0:
        try:
            local.try_acquire(0)
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, at
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), injector.where
    missed = 0 if injector.where else missed + 1
print(at)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20


def test_the_interpreter_ends_while_daemon_threads_and_futures_wait():
    result = python(
        """
        import threading, time
        from gateway_queue_sync import LocalQueue
        queue = LocalQueue(interval=3600)
        queue.acquire(0)
        for shard in range(20):
            threading.Thread(target=queue.acquire, args=(shard,), daemon=True).start()
            queue.enqueue(shard)
        while queue.snapshot().waiting < 40:
            time.sleep(0.01)
        print("bye")
        """
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "bye\n", "")


def test_close_lets_the_interpreter_end():
    result = python(
        """
        import threading, time
        from gateway_queue_sync import LocalQueue, QueueClosed
        queue = LocalQueue(interval=3600)
        queue.acquire(0)
        def shard():
            try:
                queue.acquire(1)
            except QueueClosed:
                print("let go")
        threading.Thread(target=shard).start()
        while not queue.snapshot().waiting:
            time.sleep(0.01)
        queue.close()
        """
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "let go\n", "")


# --- frozen time ----------------------------------------------------------------------------------


def test_waiting_stays_real_when_a_test_freezes_time():
    """Frozen readings are real again in shallow threads: mixed, they wait for years or not at all."""
    began = time.monotonic()
    with freeze_time("2020-01-01"):
        queue = LocalQueue(interval=0.06, margin=0)
        grants = []

        def shallow():
            queue.acquire(1)
            grants.append(real_us())

        def deep(depth=8):
            return deep(depth - 1) if depth else shallow()

        queue.acquire(0)
        grants.append(real_us())
        threads = [threading.Thread(target=target) for target in (shallow, deep)]
        for thread in threads:
            thread.start()
        queue.acquire(2)
        grants.append(real_us())
        for thread in threads:
            thread.join(10)
    grants.sort()
    assert min(later - earlier for earlier, later in itertools.pairwise(grants)) >= 59_000
    assert len(grants) == 4
    assert time.monotonic() - began < 10


def real_us():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_waiting_stays_real_when_the_package_is_imported_in_frozen_time():
    result = python(
        """
        import time
        from freezegun import freeze_time
        with freeze_time("2020-01-01"):
            from gateway_queue_sync import LocalQueue
            queue = LocalQueue(interval=0.1, margin=0)
            began = time.clock_gettime(time.CLOCK_MONOTONIC)
            queue.acquire(0)
            assert queue.try_acquire(0) is None
            queue.acquire(0, timeout=5)
            took = time.clock_gettime(time.CLOCK_MONOTONIC) - began
        assert 0.099 < took < 5, took
        print("real")
        """
    )
    assert (result.stdout, result.stderr) == ("real\n", "")
