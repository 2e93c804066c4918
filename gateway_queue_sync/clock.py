"""The clock, the conditions with which threads wait for it, and the lock of these conditions.

They are in one module because a clock for tests has to wake threads, too (``testing.FakeClock``).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

FOREVER_US = 1 << 62
"""A time that never comes."""

MAX_INTERRUPTS = 100  # how often one change is repeated


@contextlib.contextmanager
def if_slow(delay: float, call: Callable[[], object]) -> Iterator[None]:
    """Call something if the block takes longer than ``delay`` seconds.

    The call has a thread of its own, because this one is blocked. If no thread can be started,
    nothing is called.
    """
    timer = threading.Timer(delay, call)
    timer.daemon = True
    try:
        with contextlib.suppress(RuntimeError):
            timer.start()
        yield
    finally:
        timer.cancel()
        if timer.is_alive():
            timer.join()


def until_complete(
    change: Callable[[], object], run: Callable[[Callable[[], None]], None] = lambda work: work()
) -> None:
    """Make a change as one unit, inside of ``run``.

    If an exception interrupts the change, the change is repeated until it is complete. Then the
    exception is raised. So the change must be idempotent.
    """
    interrupt: BaseException | None = None
    left = MAX_INTERRUPTS

    def repeat() -> None:
        nonlocal interrupt, left
        while left:
            try:
                change()
                left = 0
            except BaseException as error:  # noqa: BLE001 - raised below
                interrupt, left = error, left - 1

    while left:
        try:
            run(repeat)
        except BaseException as error:  # noqa: BLE001 - it came before or after ``repeat``
            interrupt, left = error, max(0, left - 1)
    if interrupt is not None:
        try:
            raise interrupt
        finally:
            interrupt = None  # its traceback holds this frame


class Lock(Protocol):
    """A reentrant lock that a ``threading.Condition`` can use."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it."""

    def release(self) -> None:
        """Release it."""

    def __enter__(self) -> object:
        """Take it."""

    def __exit__(self, *exc_info: object) -> None:
        """Release it."""


class OwnedLock:
    """A reentrant lock that knows which thread holds it, also during the wait of a condition.

    The reasons are three problems of CPython. With a plain lock, Ctrl-C while ``Condition.wait`` takes
    the lock again makes ``wait`` return without it (#118433); so the lock is reentrant. 3.14 may raise
    an interrupt between taking a lock and entering its ``with`` block (#148874), and
    ``Condition.wait`` may return without the lock if it is interrupted right after releasing it. So the
    lock is taken inside ``try`` and released in ``finally``, whether or not it is held.

    Attributes:
        owner: the thread that holds it, 0 if none does; set by the thread that takes it.
    """

    def __init__(self) -> None:
        self._get_ident = threading.get_ident  # looked up now: gevent may have patched it by now
        self.reinit()

    def reinit(self) -> None:
        """Begin with a new lock: in a forked child, the thread that held the old one may not exist."""
        self._lock: Any = threading.RLock()
        self.acquire, self.release = self._lock.acquire, self._lock.release
        self.owner = 0

    def is_held(self) -> bool:
        """Return whether this thread holds it. A signal handler may interrupt the holder."""
        return self.owner == self._get_ident()

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function with the lock held. A thread that holds the lock must not call this.

        Between the beginning of ``finally`` and the release there is no call, and so no interrupt.
        """
        ident = self._get_ident()
        try:
            self.acquire()
            self.owner = ident
            result = work(*args, **kwargs)
            return result  # noqa: RET504 - an interrupt right after the call is still inside of ``try``
        finally:
            if self.owner == ident:
                self.owner = 0
            try:  # noqa: SIM105 - there must be no call before the release
                self.release()
            except RuntimeError:
                pass  # an interrupt came before the lock was taken; it goes on from here

    def complete(self, change: Callable[[], object]) -> None:
        """Make a change, including its wake-ups, as one unit, with the lock held: ``until_complete``."""
        until_complete(change, self.run)

    # What a ``Condition`` calls:

    def _release_save(self) -> object:
        self.owner = 0
        return self._lock._release_save()

    def _acquire_restore(self, state: object) -> None:
        self._lock._acquire_restore(state)
        self.owner = self._get_ident()

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())

    def locked(self) -> bool:
        """Return whether a thread holds it; a Condition of CPython 3.14 asks."""
        return self.owner != 0

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def unmasked(error: BaseException) -> BaseException:
    """Return the interrupt in place of the ``RuntimeError`` that it led to, else the error itself.

    If an interrupt makes ``Condition.wait`` return without its lock, releasing that fails, and the
    failure takes the place of the interrupt (CPython #118433).
    """
    interrupt = error.__context__
    if isinstance(error, RuntimeError) and interrupt is not None:
        return error if isinstance(interrupt, Exception) else interrupt
    return error


def start(thread: threading.Thread) -> None:
    """Start a thread; if an interrupt comes meanwhile it is raised, and the thread may run."""
    try:
        thread.start()
    except RuntimeError as error:
        raise unmasked(error) from None


class Clock(Protocol):
    """The clock of a queue."""

    def now_us(self) -> int:
        """Return microseconds on a clock that is never set, from any origin."""

    def wall_us(self) -> int:
        """Return microseconds since the Unix epoch on the clock people read."""

    def condition(self, lock: Lock) -> threading.Condition:
        """Return a condition with this lock, whose timed waits end by this clock."""

    def inside(self, *, worker: bool = False) -> AbstractContextManager[object]:
        """Return a context in which a thread is inside the queue.

        The queue calls it where a thread begins a call that may wait, and for its worker (in the
        thread that starts that), so that a clock for tests knows which threads to wait for.
        """


def _unfrozen(name: str, clock_id: str) -> Callable[[], int]:
    """Return a function that reads a clock in microseconds, also while a test tool freezes time.

    Such tools replace the functions of ``time``, such as ``time.<name>``, before or after this import.
    They return the true time at some depths of the stack and the frozen one at others; a queue that
    mixed the two would wait for years or grant at once. They do not replace ``clock_gettime_ns``.
    """
    if hasattr(time, "clock_gettime_ns") and hasattr(time, clock_id):
        read, clock = time.clock_gettime_ns, getattr(time, clock_id)
        return lambda: read(clock) // 1000
    read_ns = getattr(time, name)
    return lambda: read_ns() // 1000


EARLY = 0.000_2
"""Seconds. Linux ends timed waits 50 µs late (timer slack), and then the thread still has to wake."""


def make_small(condition: threading.Condition) -> None:
    """Replace a new condition's deque by a list, which needs half the memory when few threads wait."""
    condition._waiters = []  # type: ignore[attr-defined]


class PromptCondition(threading.Condition):
    """A condition whose timed waits end a little early, so that the thread is awake in time.

    The waiting thread checks the clock and waits again for the rest.
    """

    def __init__(self, lock: Lock) -> None:
        super().__init__(lock)  # type: ignore[arg-type]
        self._waiters: list[Any] = []  # as in ``make_small``

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as any condition does, but end a timed wait ``EARLY``."""
        return super().wait(None if timeout is None else max(0.0, timeout - EARLY))


_NOTHING = contextlib.nullcontext()


class SystemClock:
    """The machine's own clocks: a monotonic one for waiting, wall time for what outlives a process.

    On Linux the monotonic one includes the time for which the machine was suspended, since a limit is
    reset while a laptop sleeps, too.
    """

    now_us = staticmethod(
        _unfrozen(
            "monotonic_ns",
            "CLOCK_BOOTTIME" if hasattr(time, "CLOCK_BOOTTIME") else "CLOCK_MONOTONIC",
        )
    )
    wall_us = staticmethod(_unfrozen("time_ns", "CLOCK_REALTIME"))
    condition = PromptCondition

    def inside(self, *, worker: bool = False) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return _NOTHING

    def __repr__(self) -> str:
        return "SystemClock()"

    def __reduce__(self) -> str:
        return "SYSTEM_CLOCK"  # there is one, which pickles by its name


SYSTEM_CLOCK = SystemClock()
