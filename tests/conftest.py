"""Fixtures: threads that make calls, and a clock that tests advance."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import accounts
import pytest
import redis_servers
from freezegun import freeze_time
from hypothesis import settings

from gateway_queue_sync.testing import FakeClock

PATIENCE = 20.0  # s a test waits for what must come; nothing takes that long unless it is broken

# Whoever started the tests may ignore it, such as a shell that runs them in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Property tests try the same examples each time. CI tries many others, too, from a seed that it prints:
# pytest -m hypothesis --hypothesis-profile explore --hypothesis-seed SEED tests/test_token_bucket.py
settings.register_profile("same", max_examples=100, deadline=None, database=None, derandomize=True)
settings.register_profile("explore", max_examples=1_000, deadline=None, database=None)
settings.load_profile("same")


class Crew:
    """Threads that each make one call, and whose results are futures."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.returned: list[Any] = []  # results in the order in which the calls returned

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        call: Call = Call()

        def run() -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001
                call.set_exception(error)
            else:
                self.returned.append(result)
                call.set_result(result)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()
        return call

    def settle(self, clock: FakeClock, elsewhere: int = 0) -> None:
        """Block until each call has returned or is parked, but for so many that block elsewhere."""
        give_up = time.monotonic() + PATIENCE
        while True:
            left = sum(thread.is_alive() for thread in self.threads)
            with contextlib.suppress(AssertionError):
                clock.settle(left - elsewhere, timeout=0.05)
                if left == sum(thread.is_alive() for thread in self.threads):
                    return
            assert time.monotonic() < give_up, "the calls do not come to rest"

    def join(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a call never returned"


class Call(Future[Any]):
    def now(self) -> Any:
        """The result of a call that must return without more ado."""
        return self.result(PATIENCE)


@pytest.fixture(autouse=True)
def _workers_of_earlier_tests() -> None:
    accounts.earlier_workers = accounts.workers()


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.join()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what asks for an account on every kind of it, or on those its marker names."""
    if "account" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("accounts")
        metafunc.parametrize("account", marker.args if marker else accounts.NAMES, indirect=True)


@pytest.fixture
def account(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Make queues that keep accounts of the kind that the test is run for."""
    if request.param == "redis" and redis_servers.BINARY is None:
        pytest.skip(redis_servers.WITHOUT)
    with contextlib.closing(
        accounts.make(request.param, tmp_path, lambda: request.getfixturevalue("redis_server").url)
    ) as made:
        yield made


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One real Redis server for all tests that do nothing to it; each takes a name of its own."""
    server = redis_servers.RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def freezer() -> Iterator[Any]:
    """The wall clock, stopped, to be moved by hand."""
    with freeze_time("2026-11-23 12:00:00") as frozen:
        yield frozen
