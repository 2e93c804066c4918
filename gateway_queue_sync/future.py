"""The future of a permit.

It differs from other futures in three ways. Cancelling it leaves the line. If an interrupt (such as
Ctrl-C) comes in one of its methods, its lock is released. If one comes in a callback, the other
callbacks are called, too.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from gateway_queue_sync.clock import make_small, unmasked
from gateway_queue_sync.models import Permit

log = logging.getLogger("gateway_queue_sync")

P = ParamSpec("P")
T = TypeVar("T")


class _Raised(threading.local):
    """The interrupt that a callback has raised in this thread, until it is raised in the caller."""

    interrupt: BaseException | None = None


_raised = _Raised()


def _unlocked_at_exit(method: Callable[P, T]) -> Callable[P, T]:
    """Make a method of a future release its lock if an interrupt would leave that locked.

    ``Condition.__enter__`` is written in Python, so an interrupt can come between taking the lock and
    entering the block that releases it.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        future: Any = args[0]
        condition = future._condition
        is_outer = not condition._is_owned()
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            if is_outer:
                with contextlib.suppress(RuntimeError):  # raised when it is free
                    while True:
                        condition.release()
            interrupt = unmasked(error)
            if interrupt is error:
                raise
            raise interrupt from None

    return call


class PermitFuture(Future[Permit]):
    """A future that leaves its line as soon as it is cancelled.

    The lock of a future must not be taken with a queue's lock held, because others may hold it for long.

    Attributes:
        on_cancel: leaves the line; it may be called again after an interrupt. ``None`` if the future
            is in no line.
    """

    on_cancel: Callable[[PermitFuture], None] | None = None
    _process = 0  # the id of the process that is completing it

    def __init__(self) -> None:
        super().__init__()
        make_small(self._condition)

    @_unlocked_at_exit
    def cancel(self) -> bool:
        """Cancel as any future does, and leave the line."""
        try:
            cancelled = super().cancel()
        finally:
            try:
                self._leave()
            finally:
                if self.on_cancel is not None:  # it was interrupted before
                    self._leave()
        if _raised.interrupt is not None:
            _raise_interrupt()
        return cancelled

    def _leave(self) -> None:
        on_cancel = self.on_cancel
        if on_cancel is not None and self._state.startswith("CANCELLED"):
            on_cancel(self)

    @_unlocked_at_exit
    def add_done_callback(self, fn: Callable[[Future[Permit]], object]) -> None:
        """Call ``fn`` with the future when that is done, even if another callback raises."""
        super().add_done_callback(functools.partial(_call_back, fn))
        if _raised.interrupt is not None:  # the future is done: it was called at once
            _raise_interrupt()

    @_unlocked_at_exit
    def set_running_or_notify_cancel(self) -> bool:
        """Begin to complete the future. False if it was cancelled, even if that was notified before."""
        self._condition.acquire()  # at an interrupt, the wrapper releases it
        is_new = self._state != "CANCELLED_AND_NOTIFIED" and super().set_running_or_notify_cancel()
        self._condition.release()
        return is_new

    @_unlocked_at_exit
    def set_result(self, result: Permit) -> None:
        """Complete the future. If a callback forks, the child does not call the others."""
        try:
            self._process = os.getpid()
            super().set_result(result)
        finally:
            self._process, _raised.interrupt = 0, None

    @_unlocked_at_exit
    def set_exception(self, exception: BaseException | None) -> None:
        """Complete the future with an error. If a callback forks, the child does not call the others."""
        try:
            self._process = os.getpid()
            super().set_exception(exception)
        finally:
            self._process, _raised.interrupt = 0, None

    def has_permit(self) -> bool:
        """Return whether it was completed with a permit."""
        return self._state == "FINISHED" and self._exception is None

    cancelled = _unlocked_at_exit(Future.cancelled)
    running = _unlocked_at_exit(Future.running)
    done = _unlocked_at_exit(Future.done)
    result = _unlocked_at_exit(Future.result)
    exception = _unlocked_at_exit(Future.exception)


def _call_back(fn: Callable[[Future[Permit]], object], future: PermitFuture) -> None:
    """Call a callback. An interrupt in it is logged; a caller raises it after the other callbacks."""
    if future._process not in (0, os.getpid()):
        return  # an earlier callback has forked: this is the child, and the permit its parent's
    try:
        fn(future)
    except Exception:
        raise  # any future logs that
    except BaseException as error:
        log.exception("a callback of %r raised; the others are called", future)
        _raised.interrupt = error


def _raise_interrupt() -> None:
    """Raise the interrupt of a callback in this thread."""
    interrupt, _raised.interrupt = _raised.interrupt, None
    try:
        if interrupt is not None:
            raise interrupt
    finally:
        interrupt = None  # its traceback holds this frame
