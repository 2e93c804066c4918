"""The subjects: this package, the limiters that people would use instead, and a naive one.

Each is used as its own documentation says for "one permit per window, block until granted". If there
is a more exact setting, it is used, and named in ``how``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from benchmarks.figures import OURS, Kind
from gateway_queue_sync import LocalQueue, NoOpQueue

Acquire = Callable[[int], Any]
"""Blocks until a shard has its permit. Those for asyncio return what must be awaited."""


class Subject(NamedTuple):
    """A limiter.

    ``make`` makes it for one permit per window (in seconds), ``free`` so that it never blocks.
    """

    name: str
    kind: Kind
    how: str
    make: Callable[[float], Acquire]
    free: Callable[[], Acquire]
    module: str = ""
    package: str = ""
    is_async: bool = False
    is_exact: bool = True  # two threads never get the same permit
    is_slow: bool = False  # waits for a multiple of a short window


def _ours(window: float) -> Acquire:
    return LocalQueue(interval=window, margin=0).acquire


def _naive(window: float) -> Acquire:
    lock, last = threading.Lock(), -window

    def acquire(_: int) -> None:
        nonlocal last
        with lock:
            left = last + window - time.monotonic()
            if left > 0:
                time.sleep(left)
            last = time.monotonic()

    return acquire


def _pyrate(limit: int, interval_ms: int) -> Acquire:
    from pyrate_limiter import Limiter, Rate

    limiter = Limiter(Rate(limit, interval_ms), buffer_ms=0)
    return lambda _: limiter.try_acquire("identify")


def _throttled(limit: int, seconds: int, burst: int) -> Any:
    from throttled import MemoryStore, Throttled, per_duration

    quota = per_duration(timedelta(seconds=seconds), limit, burst=burst)
    return Throttled(key="identify", using="gcra", quota=quota, store=MemoryStore())


def _throttled_timeout(window: float) -> Acquire:
    seconds, limit = Fraction(window).limit_denominator(1000).as_integer_ratio()
    throttled = _throttled(limit, seconds, 1)
    return lambda _: throttled.limit(timeout=86_400)


def _throttled_retry_after(window: float) -> Acquire:
    seconds, limit = Fraction(window).limit_denominator(1000).as_integer_ratio()
    throttled = _throttled(limit, seconds, 1)

    def acquire(_: int) -> None:
        while (result := throttled.limit()).limited:
            time.sleep(result.state.retry_after)

    return acquire


def _throttled_free() -> Acquire:
    throttled = _throttled(10**9, 1, 10**9)
    return lambda _: throttled.limit()


def _limits(window: float) -> Acquire:
    from limits import RateLimitItem, storage, strategies
    from limits.limits import Granularity

    class Window(RateLimitItem):
        GRANULARITY = Granularity(window, "window")

    limiter, item = strategies.MovingWindowRateLimiter(storage.MemoryStorage()), Window(1)

    def acquire(_: int) -> None:
        while not limiter.hit(item, "identify"):
            reset_time = limiter.get_window_stats(item, "identify").reset_time
            time.sleep(max(0.0, reset_time - time.time()))

    return acquire


def _token_bucket(rate: float, capacity: int) -> Acquire:
    from token_bucket import Limiter, MemoryStorage

    storage = MemoryStorage()
    limiter = Limiter(rate, capacity, storage)

    def acquire(_: int) -> None:
        while not limiter.consume("identify"):
            time.sleep(max(0.0, 1 - storage.get_token_count("identify")) / rate)

    return acquire


def _ratelimit(calls: int, period: float) -> Acquire:
    from ratelimit import limits, sleep_and_retry

    return sleep_and_retry(limits(calls=calls, period=period)(lambda _: None))


def _aiolimiter(rate: float, period: float) -> Acquire:
    from aiolimiter import AsyncLimiter

    limiter = AsyncLimiter(rate, period)
    return lambda _: limiter.acquire()


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            OURS,
            "ours",
            "LocalQueue(interval=window, margin=0); NoOpQueue() where nothing ever waits",
            _ours,
            lambda: NoOpQueue().acquire,
        ),
        Subject(
            "naive",
            "naive",
            "a Lock, and time.sleep inside it: no timeout, nobody can leave",
            _naive,
            lambda: _naive(0.0),
        ),
        Subject(
            "pyrate-limiter",
            "peer",
            "Limiter(Rate(1, window), buffer_ms=0).try_acquire()",
            lambda window: _pyrate(1, round(window * 1000)),
            lambda: _pyrate(10**9, 1000),
            "pyrate_limiter",
            "pyrate-limiter",
        ),
        Subject(
            "throttled-py, timeout",
            "peer",
            'Throttled(using="gcra", burst=1).limit(timeout=...)',
            _throttled_timeout,
            _throttled_free,
            "throttled",
            "throttled-py",
            is_slow=True,
        ),
        Subject(
            "throttled-py, retry_after",
            "peer",
            'Throttled(using="gcra", burst=1).limit() in a loop that sleeps for its retry_after',
            _throttled_retry_after,
            _throttled_free,
            "throttled",
            "throttled-py",
        ),
        Subject(
            "limits",
            "peer",
            "MovingWindowRateLimiter.hit() in a loop that sleeps until get_window_stats().reset_time",
            _limits,
            lambda: _limits(1e-6),
            "limits",
            "limits",
        ),
        Subject(
            "token-bucket",
            "peer",
            "Limiter.consume() in a loop that sleeps for what get_token_count() lacks; takes no lock",
            lambda window: _token_bucket(1 / window, 1),
            lambda: _token_bucket(1e9, 10**9),
            "token_bucket",
            "token-bucket",
            is_exact=False,
        ),
        Subject(
            "ratelimit",
            "peer",
            "@sleep_and_retry @limits(calls=1, period=window)",
            lambda window: _ratelimit(1, window),
            lambda: _ratelimit(10**9, 1.0),
            "ratelimit",
            "ratelimit",
        ),
        Subject(
            "aiolimiter",
            "peer",
            "AsyncLimiter(1, window).acquire(), of tasks in one event loop",
            lambda window: _aiolimiter(1, window),
            lambda: _aiolimiter(10**9, 1),
            "aiolimiter",
            "aiolimiter",
            is_async=True,
        ),
    )
}


def missing(name: str) -> str:
    """Return why a subject cannot be measured; an empty text if it can."""
    subject = SUBJECTS.get(name)
    if subject is None or not subject.module or find_spec(subject.module):
        return ""
    return f"not installed: pip install {subject.package}"


def versions() -> dict[str, str]:
    """Return which versions of the peers are installed."""
    packages = {subject.package for subject in SUBJECTS.values() if subject.package}
    present = {subject.package for subject in SUBJECTS.values() if not missing(subject.name)}
    return {package: version(package) for package in sorted(packages & present)}
