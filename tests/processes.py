"""Real processes on one account, which tests command, stop, kill and restart.

Each notes what it was granted in a file that no ledger knows of: one line, written with one call,
right after ``acquire`` returned. The clock is the monotonic one that all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from accounts import backend_of

from gateway_queue_sync import (
    AcquireTimeout,
    GatewayQueue,
    LedgerError,
    QueueClosed,
    RedisQueue,
    SessionLimitExhausted,
    SessionStartLimit,
    SqliteQueue,
)
from gateway_queue_sync.ledgers.shared.backend import Busy, Unreachable
from gateway_queue_sync.ledgers.shared.inquiry import peek
from gateway_queue_sync.settings import Settings

PATIENCE = 30.0  # s a test waits for what must come
APART = 0.02  # s: who ask within a trip to the ledger of each other have no order
FORKED = multiprocessing.get_context("forkserver")
PRELOADED = [
    "processes",
    "bots",
    "gateway_queue_sync.ledgers.shared.sqlite",
    "gateway_queue_sync.ledgers.shared.redis",
    "pytest",  # what the command of that name has each child import anew
]

_names = itertools.count()


def start_forkserver() -> None:
    """Have one process, in which nothing runs, import what is needed, and fork off all others.

    Python starts in a quarter of a second, a fork in a hundredth.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
    try:
        FORKED.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def until(predicate: Callable[[], Any], what: str, within: float = PATIENCE) -> Any:
    """Wait until something is true, and return it."""
    give_up = time.monotonic() + within
    while not (found := predicate()):
        assert time.monotonic() < give_up, f"{what} did not come within {within:g} s"
        time.sleep(0.002)
    return found


class Broker(NamedTuple):
    """Where an account is that processes share."""

    kind: str
    where: str
    name: str

    def queue(self, limit: SessionStartLimit | None = None, **settings: Any) -> GatewayQueue:
        make = SqliteQueue if self.kind == "sqlite" else RedisQueue
        return make(self.where, limit, name=self.name, **settings)


def new_broker(kind: str, folder: Path, redis_url: Callable[[], str]) -> Broker:
    where = str(folder / "queue.sqlite3") if kind == "sqlite" else redis_url()
    return Broker(kind, where, f"processes-{next(_names)}")


# --- the audit ------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of the audit: what happened to which shard in which process."""

    at: float  # s, right after it happened
    asked: float  # s, right before it was asked for
    process: int
    shard_id: int
    what: str

    @property
    def waited(self) -> float:
        return self.at - self.asked


class Audit:
    """A file to which any process appends, and which one that is killed leaves whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def __reduce__(self) -> tuple[object, ...]:
        return Audit, (self._path,)

    def note(self, at: float, asked: float, process: int, shard_id: int, what: str) -> None:
        os.write(self._file, f"{at:.6f} {asked:.6f} {process} {shard_id} {what}\n".encode())

    def read(self, *what: str) -> list[Entry]:
        """Return what happened, in its order; only what is named, if something is."""
        found = []
        for line in self._path.read_text().splitlines():
            at, asked, process, shard_id, kind = line.split(" ", 4)
            if not what or kind in what:
                found.append(Entry(float(at), float(asked), int(process), int(shard_id), kind))
        return sorted(found)

    def close(self) -> None:
        os.close(self._file)


def gaps(grants: list[Entry]) -> list[float]:
    """Return the spacings of grants, as their callers saw them."""
    return [later.at - earlier.at for earlier, later in itertools.pairwise(grants)]


# --- in a process of its own ----------------------------------------------------------------------


class Worker:
    """A process with a queue, which calls what a test asks for."""

    def __init__(self, number: int, broker: Broker, audit: Audit) -> None:
        self.number = number
        self.broker = broker
        self.audit = audit
        self.trips = 0  # requests carried to the ledger
        warnings.simplefilter("error")
        threading.excepthook = self._failed
        sys.unraisablehook = self._failed

    def _failed(self, failure: Any) -> None:
        what = " ".join(f"{failure.exc_type.__name__}: {failure.exc_value}".split())
        self._note_now(f"failed {what}")

    def _note_now(self, what: str) -> None:
        now = time.monotonic()
        self.audit.note(now, now, self.number, 0, what)

    def open(self, limit: SessionStartLimit | None = None, **settings: Any) -> None:
        self.queue = self.broker.queue(limit, **settings)
        backend = backend_of(self.queue)
        self._ask = backend.ask
        backend.ask = self._counted  # type: ignore[method-assign]

    def _counted(self, *args: Any) -> Any:
        self.trips += 1
        return self._ask(*args)

    def open_refreshing(self, answer: SessionStartLimit, takes: float, **settings: Any) -> None:
        """Open the queue with a ``refresh`` that is noted, takes a while and answers this."""

        def refresh() -> SessionStartLimit:
            self._note_now("refresh")
            time.sleep(takes)
            return answer

        self.open(refresh=refresh, **settings)

    # --- how requests fare ---

    def delay_permits(self, delay: float) -> None:
        """Have every second permit come so late."""
        ask, late = self._ask, itertools.cycle([True, False])

        def slow(*args: Any) -> Any:
            reply = ask(*args)
            if reply.permits and next(late):
                time.sleep(delay)
            return reply

        self._ask = slow

    def delay_take(self, start: float, delay: float) -> None:
        """Have the first request for a permit after a time go out so late."""
        ask = self._ask

        def slow(request: Any, *args: Any) -> Any:
            if request.lines and time.monotonic() > start:
                self._ask = ask
                time.sleep(delay)
            return ask(request, *args)

        self._ask = slow

    def cost(self) -> tuple[int, float]:
        """Return how often the ledger was asked, and the processor's time in seconds."""
        return self.trips, time.process_time()

    # --- what it does with the queue ---

    def acquire(self, *shard_ids: int, times: int = 1, start: float = 0.0, **how: Any) -> None:
        """Have a thread for each shard ask so often, from a time on."""
        for shard_id in shard_ids:
            self._begin(self._acquire, shard_id, times, start, how)

    def _begin(self, function: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=function, args=args, daemon=True).start()

    def _acquire(self, shard_id: int, times: int, start: float, how: dict[str, Any]) -> None:
        time.sleep(max(0.0, start - time.monotonic()))
        acquire, note, now = self.queue.acquire, self.audit.note, time.monotonic
        for _ in range(times):
            asked, what = now(), "granted"
            try:
                acquire(shard_id, **how)
            except (AcquireTimeout, QueueClosed) as error:
                what = type(error).__name__
            note(now(), asked, self.number, shard_id, what)

    def enqueue(self, shard_id: int) -> None:
        asked = time.monotonic()

        def done(future: Any) -> None:
            at = time.monotonic()
            self.audit.note(at, asked, self.number, future.result().shard_id, "granted")

        self.queue.enqueue(shard_id).add_done_callback(done)

    def try_until(self, end: float, shard_id: int) -> int:
        """Try again and again until a time, and return how often that was granted before it."""
        granted = 0
        while time.monotonic() < end:
            permit = self.queue.try_acquire(shard_id)
            granted += permit is not None and time.monotonic() < end
        return granted

    def be_fickle(self, threads: int, end: float, seed: int) -> None:
        """Have threads ask until a time, most of which soon give up, or give back what they get."""
        for thread in range(threads):
            self._begin(self._be_fickle, random.Random(f"{seed} {self.number} {thread}"), end)

    def _be_fickle(self, rng: random.Random, end: float) -> None:
        while time.monotonic() < end:
            asked, shard_id, patience = time.monotonic(), rng.randrange(6), rng.uniform(0, 0.1)
            if rng.random() < 0.5:
                try:
                    permit = self.queue.acquire(shard_id, timeout=patience)
                except (AcquireTimeout, LedgerError):  # under load others hold a file for long
                    continue
            else:
                future = self.queue.enqueue(shard_id)
                with contextlib.suppress(TimeoutError):
                    future.result(patience)
                if future.cancel():
                    continue
                permit = future.result(PATIENCE)
            if rng.random() < 0.3:
                permit.unused()
            else:
                self.audit.note(time.monotonic(), asked, self.number, shard_id, "granted")
        self._note_now("ended")

    def look_all_the_time(self) -> None:
        """Look at the account without a pause, as a process without a session."""
        self._begin(self._look_all_the_time)

    def _look_all_the_time(self) -> None:
        while True:
            with contextlib.suppress(Busy, Unreachable):
                peek(backend_of(self.queue), Settings(margin=0.25))

    def update(self, limit: SessionStartLimit) -> None:
        self.queue.update(limit)

    def snapshot(self) -> Any:
        return self.queue.snapshot()

    def close(self) -> None:
        self.queue.close()


def run_commands(number: int, broker: Broker, audit: Audit, orders: Any) -> None:
    """Do what the test says, until it says no more."""
    worker = Worker(number, broker, audit)
    with contextlib.suppress(EOFError):
        while (order := orders.recv()) is not None:
            name, args, kwargs = order
            try:
                result = getattr(worker, name)(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - it is raised in the test
                result = error
            orders.send(result)


def want_ever_more(
    number: int, broker: Broker, audit: Audit, threads: int, settings: dict[str, Any]
) -> None:
    """Ask for permits until this process is killed."""
    worker = Worker(number, broker, audit)
    worker.open(**settings)
    worker.acquire(*range(threads), times=sys.maxsize)
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()


def crash_after_a_session_start(
    number: int, broker: Broker, audit: Audit, limit: SessionStartLimit, settings: dict[str, Any]
) -> None:
    """Start one session, if the limit that was known before lets it, and be gone."""
    queue = broker.queue(limit, **settings)
    asked, what = time.monotonic(), "granted"
    try:
        queue.acquire(number)
    except SessionLimitExhausted:
        what = "exhausted"
    audit.note(time.monotonic(), asked, number, number, what)
    os.kill(os.getpid(), signal.SIGKILL)


# --- in the test ----------------------------------------------------------------------------------


class Process:
    """A process that obeys: it has every method of ``Worker``, which runs over there."""

    def __init__(self, number: int, broker: Broker, audit: Audit) -> None:
        self.number = number
        self._orders, theirs = FORKED.Pipe()
        self._process = FORKED.Process(target=run_commands, args=(number, broker, audit, theirs))
        self._process.start()
        theirs.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._order, name)

    def _order(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._orders.send((name, args, kwargs))
        assert self._orders.poll(PATIENCE), f"process {self.number} does not answer"
        result = self._orders.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(PATIENCE)

    def exit(self) -> None:
        """End as programs do, without closing the queue."""
        self._orders.send(None)
        self._process.join(PATIENCE)
        assert self._process.exitcode == 0

    def end(self) -> None:
        self.kill()
        self._process.close()
        self._orders.close()


class Fleet:
    """Processes on a new account, which grants nothing for a first window."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        self.broker = broker
        self.audit = Audit(folder / "audit")
        self.processes: list[Process] = []  # by their numbers
        self.spawned: list[Any] = []
        self.queue: GatewayQueue  # the test's own
        self.opens = 0.0  # when the first window is over, at the earliest

    def begin(self, processes: int, limit: SessionStartLimit, **settings: Any) -> list[Process]:
        """Start processes, the account, and a queue on it in each."""
        started = [self.start() for _ in range(processes)]
        for process in started:
            process.cost()  # it answers: no start is in the midst of what follows
        self.opens = time.monotonic() + settings["interval"] + settings["margin"]
        self.queue = self.broker.queue(limit, **settings)
        for process in started:
            process.open(**settings)
        return started

    def start(self) -> Process:
        process = Process(len(self.processes), self.broker, self.audit)
        self.processes.append(process)
        return process

    def spawn(self, target: Callable[..., None], *args: Any) -> Any:
        """Start a process that does one thing, and is no longer spoken to."""
        number = len(self.spawned)
        process = FORKED.Process(target=target, args=(number, self.broker, self.audit, *args))
        process.start()
        self.spawned.append(process)
        return process

    def line_up(self, *calls: tuple[Callable[..., None], int], **how: Any) -> None:
        """Have processes ask for shards, one after the other, and wait until all are in line."""
        waiting = self.queue.snapshot().waiting
        for ask, shard_id in calls:
            ask(shard_id, **how)
            time.sleep(APART)
        self.await_waiting(waiting + len(calls))
        assert not self.audit.read("granted"), "the window is too short to line up in, here and now"

    def await_waiting(self, number: int) -> None:
        until(lambda: self.queue.snapshot().waiting == number, f"a line of {number}")

    def await_granted(self, number: int) -> list[Entry]:
        """Return the grants, when there are so many."""
        until(lambda: len(self.audit.read("granted")) >= number, f"{number} permits", within=120)
        return self.audit.read("granted")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self.processes:
            process.end()
        for spawned in self.spawned:
            spawned.kill()
        for spawned in self.spawned:
            spawned.join(PATIENCE)
            spawned.close()
        if hasattr(self, "queue"):
            self.queue.close()
        failures = [entry for entry in self.audit.read() if entry.what.startswith("failed")]
        self.audit.close()
        assert not failures, failures
