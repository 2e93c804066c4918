"""Faults of the file of a ``SqliteQueue``: real files, locks, disks, users, forks and signals.

Whatever happens to it, no permit comes early: the queue waits, or says what is wrong.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from accounts import backend_of, wait_for_workers
from test_interruptions import is_whole, run_interrupted_everywhere
from test_waiting import in_line, limit

from gateway_queue_sync import (
    AcquireTimeout,
    LedgerError,
    QueueClosed,
    SqliteQueue,
)
from gateway_queue_sync.clock import SystemClock
from gateway_queue_sync.ledgers import remote
from gateway_queue_sync.ledgers.shared import inquiry, session, sqlite, sqlite_file, turns
from gateway_queue_sync.ledgers.shared.store_sqlite import SCHEMA_VERSION
from gateway_queue_sync.queue import scheduler_of
from gateway_queue_sync.testing import Referee

ROOT = Path(__file__).parent.parent
PATIENCE = 20.0  # s for what must come
WINDOW = 5.25
QUICK = {"interval": 0.05, "margin": 0.05}  # where time is real
NOBODY = 65534

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
TIME_NAMESPACE = Path("/proc/self/ns/time")

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
needs_time_namespaces = pytest.mark.skipif(
    not BOOT_ID.exists() or not os.path.lexists(TIME_NAMESPACE),
    reason="this system has no boot id or no time namespaces",
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bot.sqlite3"


@pytest.fixture
def make(path, clock, monkeypatch):
    """Make queues on the file, on a clock driven by hand; the first window is over."""
    queues = []
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT", 5.0)  # a pause would end by the clock

    def make(given=None, **settings):
        if not queues:
            SqliteQueue(path, clock=clock).close()
            clock.advance(WINDOW)
        queues.append(SqliteQueue(path, given, clock=clock, lease=60, **settings))
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()


def sql(path, *statements):
    """Run statements on the file as another program, and return what the last one found."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def is_sound(path):
    return sql(path, "PRAGMA integrity_check") == [("ok",)]


def logged(caplog, words):
    """The warnings with these words in them."""
    messages = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    return [message for message in messages if words in message]


def shortest(stamps):
    """The shortest time between two grants."""
    return min(later - earlier for earlier, later in itertools.pairwise(stamps))


def soon(is_so, what="it did not come to that"):
    give_up = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < give_up, what
        time.sleep(0.002)


def failures_of(queue, monkeypatch):
    """The list to which each failure to ask the queue's ledger is added from now on."""
    ask, failures = backend_of(queue).ask, []

    def noted(request):
        try:
            return ask(request)
        except LedgerError as failure:
            failures.append(failure)
            raise

    monkeypatch.setattr(backend_of(queue), "ask", noted)
    return failures


def run(code, *arguments, python=sys.executable, before=(), timeout=30):
    """Run a program of its own, warnings as errors, and return what it said; it must end well."""
    process = subprocess.Popen(
        [*before, str(python), "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # its children, too: they have its output open
        process.communicate()
        raise
    assert (process.returncode, stderr) == (0, ""), stdout + stderr
    return stdout.split("\n")[:-1]


# --- a file that a stopped process holds locked ---------------------------------------------------


class Holder:
    """A process that holds a lock on the file, and is stopped."""

    CODE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2].split(";"):
    cursor = connection.execute(statement)
    cursor.fetchone()
print("held", flush=True)
sys.stdin.read()
"""

    def __init__(self, path, how):
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", self.CODE, str(path), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout.readline() == b"held\n"
        self.process.send_signal(signal.SIGSTOP)

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def hold(path):
    """Hold the file from now on, in a stopped process."""
    holders = []

    def hold(how="BEGIN IMMEDIATE"):
        holders.append(Holder(path, how))
        return holders[-1]

    yield hold
    for holder in holders:
        holder.kill()


@pytest.fixture
def queue(path):
    """A queue in real time, past its first window."""
    with SqliteQueue(path, **QUICK) as queue:
        sql(path, "UPDATE account SET default_last_us = default_last_us - 1000000")
        yield queue


def how_long(call, *args, **kwargs):
    """How long a call takes, and what it raises."""
    began = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(*args, **kwargs)
    return time.monotonic() - began, caught.value


def test_a_locked_file_is_named_in_a_ledger_error_at_the_timeout(path, queue, hold):
    hold()
    took, error = how_long(queue.acquire, 0, timeout=0.3)
    assert type(error) is LedgerError
    assert isinstance(error.__cause__, sqlite3.OperationalError)
    assert str(path) in str(error)
    assert "another process holds it locked" in str(error)
    assert took >= 0.3


def test_a_try_outlasts_what_another_process_is_in_the_midst_of(path, queue):
    """A thread that computes makes every transaction of its process take a tenth of a second."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.1, other.execute, ("COMMIT",))
    timer.start()
    try:
        assert queue.try_acquire(0) is not None
    finally:
        timer.join()
        other.close()


def test_the_timeout_is_kept_on_a_locked_file_if_somebody_observes(path, hold):
    with SqliteQueue(path, **QUICK, observer=lambda event: None) as queue:
        hold()
        took, error = how_long(queue.acquire, 0, timeout=0.3)
    assert type(error) is LedgerError
    assert took < PATIENCE / 4


@pytest.mark.parametrize("call", ["snapshot", "update"])
def test_what_has_no_timeout_waits_for_a_locked_file_and_then_says_so(
    queue, hold, monkeypatch, call
):
    calls = {"snapshot": queue.snapshot, "update": lambda: queue.update(limit())}
    hold()
    monkeypatch.setattr(remote, "MAX_REQUEST_US", 200_000)
    took, error = how_long(calls[call])
    assert type(error) is LedgerError
    assert "another process holds it locked" in str(error.__cause__)
    assert 0.2 <= took < PATIENCE / 4


def test_a_queue_waits_for_a_locked_file_to_open(path, queue, hold, caplog):
    holder = hold("BEGIN EXCLUSIVE")
    timer = threading.Timer(0.2, holder.process.kill)
    timer.start()
    with SqliteQueue(path, **QUICK) as late:
        assert repr(late).count("1000/1000")  # it was answered
    timer.join()
    assert not logged(caplog, "")


def test_a_queue_opens_on_a_file_that_stays_locked_and_says_so(
    path, queue, hold, crew, caplog, monkeypatch
):
    holder = hold()
    monkeypatch.setattr(inquiry, "MAX_OPEN_US", 200_000)
    monkeypatch.setattr(inquiry, "MAX_LATE_US", 5_000_000)  # for a busy machine
    began = time.monotonic()
    with SqliteQueue(path, **QUICK) as late:
        assert 0.2 <= time.monotonic() - began < PATIENCE / 4
        (message,) = logged(caplog, "another process holds it locked")
        assert str(path) in message
        assert "no permit is granted until it can be asked" in message
        call = crew(late.acquire, 0)
        with pytest.raises(LedgerError, match="another process holds it locked"):
            late.try_acquire(0)
        holder.kill()
        assert call.now().shard_id == 0
    assert len(logged(caplog, "no permit is granted")) == 1
    (message,) = logged(caplog, "answers again, after")
    assert 0.2 <= float(message.split()[-2]) < PATIENCE


def test_a_report_on_a_locked_file_is_booked_later(queue, hold):
    permit = queue.acquire(0)
    holder = hold()
    permit.unused()
    holder.kill()
    assert queue.snapshot().limit.remaining == 1000


def test_ctrl_c_ends_the_wait_for_a_locked_file_to_open(path, queue, hold):
    hold()
    files = open_files(path)
    for delay in (0.1, 0.113, 0.127):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            SqliteQueue(path, **QUICK)
        timer.join()
    soon(lambda: gc.collect() >= 0 and open_files(path) == files)


def test_a_killed_holder_leaves_no_lock(queue, hold):
    holder = hold()
    with pytest.raises(LedgerError):
        queue.acquire(0, timeout=0.1)
    holder.kill()
    assert queue.try_acquire(0) is not None


def test_who_waits_goes_on_after_the_holder_is_killed(queue, hold, crew, monkeypatch):
    holder, failures = hold(), failures_of(queue, monkeypatch)
    calls = [crew(queue.acquire, shard) for shard in range(2)]
    soon(lambda: len(failures) > 2)
    holder.kill()
    for call in calls:
        call.now()


def test_a_future_outlasts_a_locked_file(queue, hold, monkeypatch):
    holder, failures = hold(), failures_of(queue, monkeypatch)
    future = queue.enqueue(0)
    soon(lambda: failures)
    holder.kill()
    assert future.result(PATIENCE).shard_id == 0


@pytest.mark.slow
def test_each_outage_is_warned_of_once(queue, hold, crew, caplog, monkeypatch):
    monkeypatch.setattr(session, "MAX_PAUSE_US", 100_000)
    queue.update(limit(max_concurrency=2))
    failures, words = failures_of(queue, monkeypatch), "no permit is granted until it can be asked"
    for outage in (1, 2):
        holder = hold()
        calls = [crew(queue.acquire, shard) for shard in range(4)]
        soon(lambda count=outage: len(logged(caplog, words)) == count)
        failures.clear()
        soon(lambda: len(failures) > 3)
        holder.kill()
        for call in calls:
            call.now()
        assert len(logged(caplog, words)) == outage
        assert len(logged(caplog, "answers again")) == outage


# --- a file that is lost --------------------------------------------------------------------------


def deleted(path):
    path.unlink()


def replaced_by_an_empty_one(path):
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.replace(path)


def emptied(path):
    os.truncate(path, 0)


def put_back(path):
    path.with_suffix(".old").replace(path)


LOSSES = [deleted, replaced_by_an_empty_one, emptied, put_back]


def keep_a_copy(path):
    shutil.copy2(path, path.with_suffix(".old"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("who", ["who was granted", "another process"])
def test_after_the_file_is_lost_nobody_is_granted_early(loss, who, path, make, clock):
    queues = {"who was granted": make(), "another process": make()}
    keep_a_copy(path)
    queues["who was granted"].acquire(0)
    loss(path)
    for _ in range(20):
        clock.advance(WINDOW / 21)
        assert queues[who].try_acquire(0) is None


@pytest.mark.parametrize("loss", LOSSES)
def test_a_window_after_the_file_is_lost_there_are_permits_again(loss, path, make, clock):
    queue, other = make(), make()
    keep_a_copy(path)
    queue.acquire(0)
    loss(path)
    queue.try_acquire(0)
    clock.advance(WINDOW)
    assert queue.try_acquire(0) is not None
    clock.advance(WINDOW)
    assert other.try_acquire(0) is not None


@pytest.mark.parametrize("loss", [deleted, replaced_by_an_empty_one, emptied])
def test_who_made_the_file_makes_it_anew_when_it_is_lost(loss, path, clock):
    with SqliteQueue(path, clock=clock) as queue:
        clock.advance(WINDOW)
        queue.acquire(0)
        loss(path)
        assert queue.try_acquire(0) is None
        clock.advance(WINDOW)
        assert queue.try_acquire(0) is not None


@pytest.mark.parametrize("loss", LOSSES)
def test_spacing_holds_over_all_who_notice_that_the_file_is_lost(loss, path, make, clock):
    queues = make(), make(), make()
    keep_a_copy(path)
    queues[0].acquire(0)
    loss(path)
    grants = [clock.now_us()]
    for _ in range(60):
        clock.advance(0.25)
        grants += [clock.now_us() for queue in reversed(queues) if queue.try_acquire(0)]
    assert len(grants) >= 3
    assert shortest(grants) >= WINDOW * 1e6


@pytest.mark.parametrize("loss", LOSSES)
def test_the_budget_goes_on_from_what_the_process_knew(loss, path, make, clock):
    queue = make(limit(10, 8, 100.0))
    keep_a_copy(path)
    queue.acquire(0)
    loss(path)
    left = queue.snapshot().limit
    assert (left.total, left.remaining, left.resets_in) == (10, 7, 100.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_who_waits_when_the_file_is_lost_goes_on_and_nobody_comes_early(loss, path, crew):
    referee = Referee(interval=QUICK["interval"])
    queues = [SqliteQueue(path, **QUICK) for _ in range(2)]
    keep_a_copy(path)

    def identify(queue, shard_id):
        queue.acquire(shard_id)
        referee.identify(shard_id)

    calls = [crew(identify, queues[shard % 2], shard) for shard in range(3)]
    soon(lambda: referee.accepted)
    with contextlib.closing(sqlite3.connect(path, timeout=20, isolation_level=None)) as between:
        between.execute(
            "BEGIN EXCLUSIVE"
        )  # a file that is emptied within a transaction is malformed
        loss(path)
    for call in calls:
        call.now()
    assert not referee.refusals
    for queue in queues:
        queue.close()


def test_a_file_that_is_lost_is_warned_of_once(path, make, caplog):
    queue = make()
    path.unlink()
    for _ in range(3):
        queue.try_acquire(0)
    (message,) = logged(caplog, "deleted or replaced")
    assert str(path) in message


def test_the_limit_is_read_anew_after_a_loss(path, make, clock):
    left = [6, 4]  # as a process begins with an account that was never read, and after the loss

    def refresh():
        return limit(10, left.pop(0), 50.0)

    queue = make(limit(10, 8, 100.0), refresh=refresh)
    soon(lambda: queue.snapshot().limit.remaining == 6)
    path.unlink()
    assert queue.try_acquire(0) is None
    soon(lambda: queue.snapshot().limit.remaining == 4)
    clock.advance(WINDOW)
    assert queue.acquire(0).remaining == 3
    assert not left


def test_a_read_that_ends_while_a_request_is_under_way_is_not_repeated(path, make, monkeypatch):
    read, asked = [], threading.Event()

    def refresh():
        asked.wait(PATIENCE)
        read.append(True)
        return limit(10, 4, 50.0)

    queue = make(limit(10, 8, 100.0), refresh=refresh)
    ask, reader = backend_of(queue).ask, scheduler_of(queue).reader

    def late(request):
        reply = ask(request)
        if reply.read and request.lines:
            asked.set()
            soon(lambda: not reader.reading)
        return reply

    monkeypatch.setattr(backend_of(queue), "ask", late)
    path.unlink()
    assert queue.try_acquire(0) is None
    assert queue.snapshot().limit.remaining == 4
    assert len(read) == 1


def test_who_begins_on_an_older_copy_is_granted_nothing_for_a_window(path, make, clock, caplog):
    before = make(limit(10, 8, 600.0))
    keep_a_copy(path)
    before.acquire(0)
    before.close()
    wait_for_workers()
    put_back(path)
    clock.advance(1)
    queue = make(refresh=lambda: limit(10, 4, 500.0))
    assert len(logged(caplog, "replaced by a copy")) == 1
    clock.advance(WINDOW - 0.000_001)
    assert queue.try_acquire(0) is None
    soon(lambda: queue.snapshot().limit.remaining == 4)  # the copy may know of fewer grants
    clock.advance(0.000_001)
    assert queue.acquire(0).remaining == 3
    clock.advance(WINDOW)
    assert make().try_acquire(0) is not None


def test_an_older_state_written_over_the_file_grants_nothing_for_a_window(path, make, clock):
    """The process has seen more permits than the file tells of."""
    queue = make()
    keep_a_copy(path)
    queue.acquire(0)
    clock.advance(1)
    path.write_bytes(path.with_suffix(".old").read_bytes())
    assert queue.snapshot().granted == 1
    clock.advance(WINDOW - 0.000_001)
    assert queue.try_acquire(0) is None
    clock.advance(0.000_001)
    assert queue.try_acquire(0) is not None


# --- a file that cannot be read -------------------------------------------------------------------


def halved(path):
    os.truncate(path, path.stat().st_size // 2)


def cut_by_a_page(path):
    os.truncate(path, path.stat().st_size - 4096)


def garbled(path):
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def garbled_below_the_header(path):
    content = path.read_bytes()
    path.write_bytes(content[:4096] + random.Random(1).randbytes(len(content) - 4096))


def made_a_folder(path):
    path.unlink()
    path.mkdir()


def made_anothers(path):
    path.unlink()
    sql(path, "CREATE TABLE account (name, password)", "PRAGMA user_version = 1")


SPOILT = {
    halved: "malformed; to begin anew, move it away",
    cut_by_a_page: "malformed; to begin anew, move it away",
    garbled: "not a database; to begin anew, move it away",
    made_a_folder: "is not a regular file",
    made_anothers: "belongs to another program",
}


def test_a_file_that_is_spoilt_below_its_header_opens_no_queue(path, make):
    make().close()
    garbled_below_the_header(path)
    with pytest.raises(LedgerError, match="malformed; to begin anew, move it away"):
        SqliteQueue(path)


def move_away(path):
    path.rename(path.with_suffix(".spoilt"))


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_file_is_a_ledger_error_that_says_what_is_wrong(spoil, path, make, clock):
    queue = make()
    spoil(path)
    for call in (queue.try_acquire, lambda shard: queue.acquire(shard, timeout=0)):
        with pytest.raises(LedgerError) as caught:
            call(0)
        assert str(path) in str(caught.value)
        assert SPOILT[spoil] in str(caught.value)
        assert caught.value.__cause__ is not None
        clock.advance(WINDOW)


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_file_opens_no_queue_and_stays_as_it_is(spoil, path, make):
    make()
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerError, match=SPOILT[spoil].split(";")[0]):
        SqliteQueue(path)
    assert before == (path.read_bytes() if path.is_file() else None)


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_file_that_is_moved_away_costs_a_window(spoil, path, make, clock):
    queue = make(limit(10, 8, 1000.0))
    queue.acquire(0)
    spoil(path)
    with pytest.raises(LedgerError):
        queue.try_acquire(0)
    move_away(path)
    assert queue.try_acquire(0) is None
    clock.advance(WINDOW - 0.000_001)
    assert queue.try_acquire(0) is None
    clock.advance(0.000_001)
    assert queue.try_acquire(0).remaining == 6


@pytest.mark.parametrize("spoil", SPOILT)
def test_who_waits_on_a_spoilt_file_goes_on_when_the_right_one_is_back(
    spoil, path, queue, crew, monkeypatch
):
    keep_a_copy(path)
    spoil(path)
    failures = failures_of(queue, monkeypatch)
    call = crew(queue.acquire, 0)
    soon(lambda: failures)
    assert not call.done()
    move_away(path)
    put_back(path)
    assert call.now().shard_id == 0


# --- a file that cannot be written ----------------------------------------------------------------


@pytest.fixture
def nobodys():
    """A folder of an unprivileged user's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not all(parent.stat().st_mode & 0o001 for parent in folder.parents):
            pytest.skip("unprivileged users cannot reach the folder for temporary files")
        try:
            os.chown(folder, NOBODY, -1)
            os.seteuid(NOBODY)
            os.seteuid(0)
        except PermissionError:
            pytest.skip("this root may not become somebody else")
        yield folder


def as_nobody(path, code):
    """Run code as an unprivileged user, in a process of its own, and return what it said."""
    return run(
        """
        import encodings.ascii, os, sys     # whatever is loaded later may be out of its reach
        import gateway_queue_sync.ledgers.shared.sqlite
        from gateway_queue_sync import LedgerError, SqliteQueue
        path = sys.argv[1]
        folder = os.path.dirname(path)
        def opened():
            return SqliteQueue(path, interval=0.05, margin=0.05)
        def failure(call, *args):
            try:
                return call(*args)
            except LedgerError as error:
                return str(error)
        os.seteuid(65534)
        try:
            exec(sys.argv[2])
        finally:
            os.seteuid(0)
        """,
        path,
        textwrap.dedent(code),
    )


@needs_root
def test_a_file_that_may_not_be_read_is_refused(nobodys):
    path = nobodys / "bot"
    (error,) = as_nobody(
        path,
        """
        opened().close()
        os.chmod(path, 0)
        print(failure(opened))
        """,
    )
    assert str(path) in error
    assert "unable to open" in error


@needs_root
def test_a_read_only_file_is_refused_until_it_may_be_written(nobodys):
    path = nobodys / "bot"
    error, again = as_nobody(
        path,
        """
        opened().close()
        os.chmod(path, 0o400)
        print(failure(opened))
        os.chmod(path, 0o600)
        with opened() as queue:
            print(queue.acquire(0).remaining)
        """,
    )
    assert str(path) in error
    assert "readonly" in error
    assert again == "999"


@needs_root
def test_a_read_only_folder_in_which_to_make_the_file_is_refused(nobodys):
    path = nobodys / "bot"
    (error,) = as_nobody(
        path,
        """
        os.chmod(folder, 0o500)
        print(failure(opened))
        os.chmod(folder, 0o700)
        """,
    )
    assert error.endswith(f"{str(path)!r}: Permission denied")


@needs_root
def test_a_folder_that_becomes_read_only_grants_nothing_until_it_is_not(nobodys):
    """SQLite keeps a journal beside the file while it writes."""
    path = nobodys / "bot"
    error, again = as_nobody(
        path,
        """
        queue = opened()
        queue.acquire(0).unused()
        queue.snapshot()   # the ledger has heard of that
        os.unlink(path + "-journal")
        os.chmod(folder, 0o500)
        print(failure(queue.try_acquire, 0))
        os.chmod(folder, 0o700)
        print(queue.acquire(0).remaining)
        queue.close()
        """,
    )
    assert str(path) in error
    assert "readonly" in error or "unable to open" in error
    assert again == "999"


@needs_root
def test_a_folder_that_becomes_out_of_reach_grants_nothing_until_it_is_not(nobodys):
    path = nobodys / "bot"
    error, again = as_nobody(
        path,
        """
        queue = opened()
        queue.acquire(0).unused()
        os.chmod(folder, 0)
        print(failure(queue.try_acquire, 0))
        os.chmod(folder, 0o700)
        print(queue.acquire(0).remaining)
        queue.close()
        """,
    )
    assert error.endswith(f"{str(path)!r}: Permission denied")
    assert again == "999"


def test_a_file_that_may_not_grow_opens_no_queue_until_it_may(path):
    pytest.importorskip("resource", reason="this system has no resource limits")
    error, again = run(
        """
        import resource, sys
        from gateway_queue_sync import LedgerError, SqliteQueue
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, most))
        try:
            SqliteQueue(sys.argv[1])
        except LedgerError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        with SqliteQueue(sys.argv[1]) as queue:
            print(queue.snapshot().limit.remaining)
        """,
        path,
    )
    assert str(path) in error
    assert "disk" in error
    assert again == "1000"


def test_a_folder_that_is_missing_is_no_harm_once_it_is_there(tmp_path):
    path = tmp_path / "later" / "bot"
    with pytest.raises(LedgerError):
        SqliteQueue(path)
    path.parent.mkdir()
    with SqliteQueue(path) as queue:
        assert queue.try_acquire(0) is None


# --- other versions, other programs ---------------------------------------------------------------


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_another_schema_is_refused_with_both_versions_and_left_alone(path, make, version):
    make().close()
    sql(path, f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(LedgerError) as caught:
        SqliteQueue(path)
    assert str(path) in str(caught.value)
    assert f"(schema {version}; this one uses {SCHEMA_VERSION})" in str(caught.value)
    assert path.read_bytes() == before


@pytest.fixture(params=[0, SCHEMA_VERSION, 7])
def anothers(request, path):
    """Another program's database, of any version."""
    sql(
        path,
        "PRAGMA journal_mode = WAL",
        "CREATE TABLE account (name, password)",
        "INSERT INTO account VALUES ('default', 'secret')",
        f"PRAGMA user_version = {request.param}",
    )
    path.chmod(0o644)
    return path


def test_another_programs_database_is_refused_and_left_alone(anothers):
    before = anothers.read_bytes()
    with pytest.raises(LedgerError) as caught:
        SqliteQueue(anothers)
    assert str(anothers) in str(caught.value)
    assert "belongs to another program" in str(caught.value)
    assert anothers.read_bytes() == before
    assert anothers.stat().st_mode & 0o777 == 0o644


# --- where the file is ----------------------------------------------------------------------------


def test_a_link_that_leads_to_nothing_yet_has_the_file_made_where_it_leads(tmp_path, path):
    link = tmp_path / "link"
    link.symlink_to(path)
    SqliteQueue(link).close()
    assert link.is_symlink()
    assert path.is_file()


def test_a_relative_path_means_the_same_file_wherever_the_process_goes(
    tmp_path, path, make, clock, monkeypatch
):
    queue = make()
    monkeypatch.chdir(tmp_path)
    with SqliteQueue(path.name, clock=clock) as relative:
        monkeypatch.chdir("/")
        backend_of(relative).close()  # the next call opens the file anew
        relative.acquire(0)
    assert queue.snapshot().granted == 1


# --- forks ----------------------------------------------------------------------------------------

FORKING = """
import contextlib, os, sqlite3, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from gateway_queue_sync import QueueClosed, SqliteQueue
from gateway_queue_sync.ledgers.shared import sqlite, turns
from gateway_queue_sync.queue import scheduler_of
path = sys.argv[1]
queue = SqliteQueue(path, interval=0.05, margin=0.05)
backend = scheduler_of(queue).ledger.backend
queue.acquire(0)

def transaction_in_a_thread(call=lambda: queue.acquire(1)):
    \"\"\"Begin one that takes its time; it is under way when this returns.\"\"\"
    inside = threading.Event()
    def slowly(*args, **kwargs):
        sqlite.answer = turns.answer
        inside.set()
        time.sleep(0.2)
        return turns.answer(*args, **kwargs)
    sqlite.answer = slowly
    thread = threading.Thread(target=call)
    thread.start()
    inside.wait()
    return thread

def fork(in_child):
    \"\"\"Run that in a child, which ends with its result.\"\"\"
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        status = in_child()
    finally:
        os._exit(status)

def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def used():
    \"\"\"Permits; those that came late, and were given back, do not count.\"\"\"
    return 1000 - queue.snapshot().limit.remaining

def is_sound():
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]
"""


@needs_fork
def test_a_forked_child_works_on_as_another_process(path):
    (said,) = run(
        FORKING
        + """
connection, asked, ask = backend._file.connection, [], backend.ask
def noted(request):
    asked.append(request.session)
    return ask(request)
backend.ask = noted
queue.snapshot()
def in_child():
    queue.acquire(1, timeout=5)
    return 7 if asked[0] not in asked[-2:] and backend._file.connection is not connection else 1
child = fork(in_child)
queue.acquire(2, timeout=5)
print(status_of(child), used(), len(set(asked)))
queue.close()
""",
        path,
    )
    assert said == "7 3 1"


@needs_fork
def test_parent_and_forked_children_keep_the_spacing(path):
    stamps = run(
        FORKING
        + """
def grants():
    for _ in range(2):
        queue.acquire(0, timeout=10)
        os.write(1, b"%f\\n" % time.monotonic())
    return 0
children = [fork(grants) for _ in range(2)]
grants()
assert [status_of(child) for child in children] == [0, 0]
queue.close()
""",
        path,
    )
    stamps = sorted(map(float, stamps))
    assert len(stamps) == 6
    assert shortest(stamps) >= QUICK["interval"]


@needs_fork
def test_a_child_forked_in_the_midst_of_a_transaction_works_on(path):
    """What SQLite remembers of the parent's locks must not make the child wait for itself."""
    (said,) = run(
        FORKING
        + """
thread = transaction_in_a_thread()
child = fork(lambda: 0 if queue.acquire(2, timeout=2) else 1)
thread.join()
print(status_of(child), used(), is_sound())
queue.close()
""",
        path,
    )
    assert said == "0 3 ok"


@needs_fork
def test_a_child_forked_while_a_thread_opens_the_file_works_on(path):
    (said,) = run(
        FORKING
        + """
opened = []
thread = transaction_in_a_thread(lambda: opened.append(SqliteQueue(path, interval=0.05, margin=0.05)))
child = fork(lambda: 0 if queue.acquire(1, timeout=2) else 1)
thread.join()
print(status_of(child), used(), is_sound())
queue.close()
opened[0].close()
""",
        path,
    )
    assert said == "0 2 ok"


@needs_fork
def test_a_child_forked_by_a_handler_amid_a_transaction_does_not_end_that(path):
    """What the child wrote would be older than what the parent has written since."""
    (said,) = run(
        FORKING
        + """
import signal
from gateway_queue_sync import LedgerError
from gateway_queue_sync.ledgers.shared.stored_lines import NoLines
children, parent = [], os.getpid()
signal.signal(signal.SIGUSR1, lambda *_: children.append(os.fork()))
inside, outside = os.pipe()
def forks(*args, **kwargs):
    sqlite.answer = turns.answer
    reply = turns.answer(*args, **kwargs)
    os.kill(parent, signal.SIGUSR1)
    if children == [0]:
        os.read(inside, 1)
    return reply
other = SqliteQueue(path, interval=0.05, margin=0.05)
ledger = scheduler_of(other).ledger
ledger._session.reinit()
request = ledger._session.compose(NoLines(1), ledger._now_us(), can_read=False)
sqlite.answer = forks
try:
    ledger.backend.ask(request)  # in this thread, which handles signals
except LedgerError:  # the transaction is the parent's
    os._exit(7 if children == [0] else 1)
queue.acquire(0)
os.write(outside, b"!")
print(status_of(children[0]), used(), queue.acquire(0).waited < 0.2, is_sound())
queue.close()
other.close()
""",
        path,
    )
    assert said == "7 2 True ok"


@needs_fork
def test_a_fork_waits_for_no_lock_on_the_file(path, hold):
    with SqliteQueue(path, **QUICK) as queue:
        hold()
        future, took = queue.enqueue(0), []
        for _ in range(20):
            began = time.monotonic()
            child = os.fork()
            if child == 0:
                os._exit(0)
            took.append(time.monotonic() - began)
            os.waitpid(child, 0)
            time.sleep(0.01)
        future.cancel()
    assert sorted(took)[-3] < 0.2


@needs_fork
def test_a_child_in_which_the_queue_is_collected_says_nothing(path):
    """The parent's worker was asleep, and its references to the queue are never freed in the child."""
    said = run(
        FORKING
        + """
import gc
queue.snapshot()
time.sleep(0.05)
child = os.fork()
if child == 0:
    del queue, backend
    gc.collect()
    sys.exit(0)
print(status_of(child))
queue.close()
""",
        path,
    )
    assert said == ["0"]


@needs_fork
@pytest.mark.parametrize("leave", ["sys.exit(0)", "os._exit(0)"])
def test_a_child_that_ends_leaves_the_parents_transaction_alone(path, leave):
    (said,) = run(
        FORKING
        + f"""
thread = transaction_in_a_thread()
child = os.fork()
if child == 0:
    {leave}
status = status_of(child)
thread.join()
print(status, used(), is_sound())
queue.close()
""",
        path,
    )
    assert said == "0 2 ok"


@needs_fork
def test_who_waits_in_the_parent_goes_on_and_does_not_wait_in_the_child(path):
    (said,) = run(
        FORKING
        + """
threads = [threading.Thread(target=queue.acquire, args=(shard,)) for shard in (1, 2)]
for thread in threads:
    thread.start()
child = fork(lambda: "waiting=0" not in repr(queue))
for thread in threads:
    thread.join()
print(status_of(child), used())
queue.close()
""",
        path,
    )
    assert said == "0 3"


@needs_fork
def test_threads_that_fork_at_once_let_each_other_go_on(path):
    (said,) = run(
        FORKING
        + """
others = [SqliteQueue(path, interval=0.05, margin=0.05, name=name) for name in "abc"]
def forks():
    for _ in range(70):
        assert status_of(fork(lambda: 0)) == 0
threads = [threading.Thread(target=forks, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
give_up = time.monotonic() + 20
while any(thread.is_alive() for thread in threads) and time.monotonic() < give_up:
    for asked in (queue, *others):
        asked.snapshot()
print(sum(thread.is_alive() for thread in threads), flush=True)
os._exit(0)
""",
        path,
    )
    assert said == "0"


@needs_fork
def test_the_child_of_a_closed_queue_grants_nothing_and_leaves_nothing_open(path):
    (said,) = run(
        FORKING
        + """
queue.close()
def in_child():
    try:
        queue.acquire(0)
    except QueueClosed:
        queue.snapshot()
        give_up = time.monotonic() + 5
        while backend._file is not None and time.monotonic() < give_up:
            time.sleep(0.001)
        return 7 if backend._file is None else 8
print(status_of(fork(in_child)))
""",
        path,
    )
    assert said == "7"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_queue_can_be_handed_to_multiprocessing(tmp_path, path, method):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys, time
            from gateway_queue_sync import SqliteQueue

            def shard(queue, shard_id, stamps):
                with queue.acquire(shard_id, timeout=20):
                    stamps.put(time.monotonic())

            if __name__ == "__main__":
                path, method = sys.argv[1:]
                if method not in multiprocessing.get_all_start_methods():
                    sys.exit("none")
                context = multiprocessing.get_context(method)
                with SqliteQueue(path, interval=0.05, margin=0.05) as queue:
                    stamps = context.SimpleQueue()
                    processes = [
                        context.Process(target=shard, args=(queue, shard_id, stamps))
                        for shard_id in range(2)
                    ]
                    for process in processes:
                        process.start()
                    shard(queue, 2, stamps)
                    for process in processes:
                        process.join()
                    print(*(stamps.get() for _ in range(3)), queue.snapshot().limit.remaining)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script, path, method],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    if done.stderr == "none\n":
        pytest.skip(f"this system knows no {method}")
    assert done.stderr == ""
    *stamps, remaining = map(float, done.stdout.split())
    assert remaining == 997
    stamps.sort()
    assert shortest(stamps) >= QUICK["interval"]


# --- other clocks ---------------------------------------------------------------------------------

ANOTHER_BOOT = "'a1b2c3d4-0000-4000-8000-000000000000 time:[4026531834]'"


def kept_by(path, clock, touched=0.0):
    """Have the account kept by another clock, and used so many seconds ago."""
    sql(path, f"UPDATE account SET clock = {clock}, touched_us = touched_us - {touched * 1e6:.0f}")


def test_after_a_reboot_no_bucket_grants_for_a_window(path, make, clock, caplog):
    make(limit(max_concurrency=3)).close()
    kept_by(path, ANOTHER_BOOT)
    queue = make()
    clock.advance(WINDOW - 0.000_001)
    assert [queue.try_acquire(shard) for shard in range(3)] == [None] * 3
    clock.advance(0.000_001)
    assert None not in [queue.try_acquire(shard) for shard in range(3)]
    (message,) = logged(caplog, "kept by another clock (a reboot?)")
    assert str(path) in message


def test_a_reboot_keeps_the_budget(path, make, clock):
    queue = make(limit(10, 8, 100.0))
    queue.acquire(0)
    queue.close()
    wait_for_workers()
    kept_by(path, ANOTHER_BOOT)
    left = make().snapshot().limit
    assert (left.total, left.remaining, left.resets_in) == (10, 7, 100.0)


def test_a_reboot_forgets_who_waited_before_it(path, make, clock, crew):
    queue = make()
    queue.acquire(0)
    in_line(queue, crew, clock, [1])
    kept_by(path, ANOTHER_BOOT)
    assert make().snapshot().waiting == 0
    queue.close()


def test_a_clock_that_was_far_ahead_before_the_reboot_costs_a_window(path, make, clock):
    """The monotonic clock begins anew: what was stamped before lies in the future."""
    queue = make()
    clock.advance(1e6)
    queue.acquire(0).rejected()
    queue.close()
    wait_for_workers()
    sql(path, "UPDATE bucket SET last_us = last_us + 1000000000000")
    kept_by(path, ANOTHER_BOOT)
    queue = make()
    clock.advance(WINDOW)
    assert queue.try_acquire(0) is not None


@needs_time_namespaces
def test_another_time_namespace_that_used_the_file_just_now_is_refused(path, queue):
    kept_by(path, f"'{BOOT_ID.read_text().strip()} time:[1]'")
    for call in (lambda: SqliteQueue(path), lambda: queue.acquire(0, timeout=0.1)):
        with pytest.raises(LedgerError) as caught:
            call()
        assert str(path) in str(caught.value)
        assert "another time namespace" in str(caught.value)


@needs_time_namespaces
def test_another_time_namespace_that_used_the_file_long_ago_costs_a_window(path, queue, caplog):
    kept_by(path, f"'{BOOT_ID.read_text().strip()} time:[1]'", touched=61)
    began = time.monotonic()
    assert queue.try_acquire(0) is None
    queue.acquire(0, timeout=PATIENCE)
    assert time.monotonic() - began >= sum(QUICK.values())
    assert logged(caplog, "kept by another clock")


@needs_time_namespaces
def test_a_real_time_namespace_is_refused_and_does_no_harm(path, queue):
    before = ["unshare", "--time", "--monotonic", "100000"]
    if shutil.which("unshare") is None or subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("no time namespace can be made here")
    queue.snapshot()
    (said,) = run(
        """
        import sys, time
        from gateway_queue_sync import LedgerError, SqliteQueue
        try:
            SqliteQueue(sys.argv[1])
        except LedgerError as error:
            print(error)
        """,
        path,
        before=before,
    )
    assert "another time namespace" in said
    assert queue.acquire(0, timeout=PATIENCE).remaining == 999


@pytest.fixture
def without(monkeypatch):
    """Take things of Linux away."""
    read_text, readlink = Path.read_text, os.readlink

    def without(*gone):
        def fake(read):
            def reading(path, *args, **kwargs):
                if str(path) in map(str, gone):
                    raise FileNotFoundError(path)
                return read(path, *args, **kwargs)

            return reading

        monkeypatch.setattr(Path, "read_text", fake(read_text))
        monkeypatch.setattr(os, "readlink", fake(readlink))

    return without


@pytest.fixture
def step_wall(monkeypatch):
    """Step the machine's wall clock by so many seconds."""
    wall_us = SystemClock.wall_us

    def step_wall(by):
        stepped = staticmethod(lambda: wall_us() + int(by * 1e6))
        monkeypatch.setattr(SystemClock, "wall_us", stepped)

    return step_wall


def test_without_a_boot_id_a_machine_is_known_by_when_it_began(path, without, step_wall, caplog):
    without(BOOT_ID)
    SqliteQueue(path, **QUICK).close()
    step_wall(30)  # as it may be set by NTP
    SqliteQueue(path, **QUICK).close()
    assert not logged(caplog, "kept by another clock")


def test_without_a_boot_id_a_set_clock_costs_a_window_once(path, without, step_wall, crew, caplog):
    """Processes from before and after agree on which clock it is."""
    without(BOOT_ID)
    with SqliteQueue(path, **QUICK) as before:
        step_wall(300)
        with SqliteQueue(path, **QUICK) as after:
            calls = [crew(queue.acquire, 0, timeout=2) for queue in (before, after)]
            for call in calls:
                call.now()
    assert len(logged(caplog, "kept by another clock")) == 1


@needs_time_namespaces
def test_a_machine_without_time_namespaces_is_known_by_its_boot_id(
    path, without, step_wall, caplog
):
    without(TIME_NAMESPACE)
    SqliteQueue(path, **QUICK).close()
    step_wall(300)
    SqliteQueue(path, **QUICK).close()
    assert not logged(caplog, "kept by another clock")


# --- the budget, the wall clock, and starting again -----------------------------------------------


@pytest.mark.parametrize("by", [-1e6, -3600.0, 3600.0, 1e6])
def test_a_wall_clock_that_is_set_moves_no_window(make, clock, by):
    queue = make()
    queue.acquire(0)
    clock.set_wall(clock.wall_us() / 1e6 + by)
    clock.advance(WINDOW - 0.000_001)
    assert queue.try_acquire(0) is None
    clock.advance(0.000_001)
    assert queue.try_acquire(0) is not None


def test_a_wall_clock_that_is_set_back_pushes_the_reset_no_farther_than_it_was(make, clock):
    queue = make(limit(10, 0, 100.0))
    clock.advance(60)
    clock.set_wall(clock.wall_us() / 1e6 - 1e6)
    assert queue.snapshot().limit.resets_in == 100.0
    assert queue.try_acquire(0) is None
    clock.advance(100)
    assert queue.acquire(0).remaining == 9


def test_the_budget_outlives_the_process(make, clock):
    with make(limit(10, 8, 100.0)) as queue:
        queue.acquire(0)
        clock.advance(30)
    left = make().snapshot().limit
    assert (left.total, left.remaining, left.resets_in) == (10, 7, 70.0)


def test_the_window_outlives_the_process(make, clock):
    with make() as queue:
        queue.acquire(0)
    clock.advance(WINDOW - 0.000_001)
    with make() as queue:
        assert queue.try_acquire(0) is None
        clock.advance(0.000_001)
        assert queue.try_acquire(0) is not None


def test_a_crash_loop_neither_moves_the_window_nor_comes_early(make, clock):
    make().acquire(0)
    for _ in range(20):
        assert make(limit()).try_acquire(0) is None
        clock.advance(WINDOW / 20)
    assert make(limit()).try_acquire(0) is not None


# --- closing --------------------------------------------------------------------------------------


def open_files(path):
    """Which of the file's descriptors this process has open."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("this system does not tell which files are open")
    links = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry))  # noqa: PTH115 - it may be no path
    return [link for link in links if link.startswith(str(path))]


def test_a_closed_queue_has_no_file_open(path, make):
    queue = make()
    queue.acquire(0)
    assert open_files(path)
    queue.close()
    wait_for_workers()
    assert not open_files(path)


def test_the_file_of_a_closed_queue_can_be_removed(path, make, caplog):
    queue = make()
    queue.close()
    wait_for_workers()
    path.unlink()
    queue.close()
    wait_for_workers()
    assert not logged(caplog, "")
    assert not path.exists()


def test_a_report_after_close_is_booked_and_leaves_nothing_open(path, make, clock):
    queue = make()
    permit = queue.acquire(0)
    queue.close()
    permit.unused()
    wait_for_workers()
    assert not open_files(path)
    assert make().snapshot().limit.remaining == 1000


def test_a_look_after_close_leaves_nothing_open(path, make):
    queue = make()
    queue.close()
    assert queue.snapshot().granted == 0
    wait_for_workers()
    assert not open_files(path)


def test_a_queue_that_could_not_be_made_leaves_nothing_open(path, make):
    make().close()
    sql(path, "PRAGMA user_version = 9")
    with pytest.raises(LedgerError):
        SqliteQueue(path)
    gc.collect()
    assert not open_files(path)


def test_at_the_end_nobody_waits_for_a_worker_that_could_not_be_started(make, monkeypatch):
    """The worker may end right before, and then the interpreter starts no thread any more."""
    scheduler = scheduler_of(make())
    scheduler.worker.join(PATIENCE)

    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with scheduler.lock:
        scheduler.worker.wake(scheduler)
    scheduler.worker.join(PATIENCE)


def is_new_enough(version):
    return tuple(map(int, version.split(".")[:2])) >= (3, 11)


def pythons():
    """Every other CPython that this library works with and pyenv has, by version."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in sorted(root.glob("versions/3.*/bin/python3")):
        version = python.parts[-3]
        if version != platform.python_version() and is_new_enough(version):
            yield pytest.param(python, id=version)


@pytest.mark.parametrize("python", [pytest.param(sys.executable, id="this"), *pythons()])
def test_a_queue_that_nobody_closes_leaks_no_connection(path, python):
    """Some Pythons warn when a connection is collected that was not closed."""
    said = run(
        """
        import gc, sys
        from gateway_queue_sync import SqliteQueue
        def use(name):
            queue = SqliteQueue(sys.argv[1], interval=0.05, margin=0.05, name=name)
            queue.try_acquire(0)
            queue.snapshot()
            return queue
        use("collected")
        gc.collect()
        kept_to_the_end = use("kept")
        closed = use("closed")
        closed.close()
        closed.snapshot()
        print("done")
        """,
        path,
        python=python,
    )
    assert said == ["done"]


# --- re-entry -------------------------------------------------------------------------------------

needs_signals = pytest.mark.skipif(
    not hasattr(signal, "SIGUSR1"), reason="this system has no such signals"
)


@pytest.fixture
def amid(monkeypatch):
    """Have a signal handled in the midst of the queue's next transaction; this tells what it raised."""
    before = signal.getsignal(signal.SIGUSR1)

    def amid(queue, handler):
        result, handled = [], []

        def handle(signum, frame):
            if handled:
                return
            handled.append(True)
            try:
                result.append(handler())
            except Exception as error:  # noqa: BLE001
                result.append(error)

        def interrupted(*args, **kwargs):
            monkeypatch.setattr(sqlite, "answer", turns.answer)
            while (
                not result
            ):  # one that comes just before a lock is waited for is handled after that
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
                time.sleep(0.01)
            return turns.answer(*args, **kwargs)

        signal.signal(signal.SIGUSR1, handle)
        monkeypatch.setattr(sqlite, "answer", interrupted)
        return result

    yield amid
    signal.signal(signal.SIGUSR1, before)


CALLS = {
    "acquire": lambda queue, permit: queue.acquire(0),
    "try_acquire": lambda queue, permit: queue.try_acquire(0),
    "snapshot": lambda queue, permit: queue.snapshot(),
    "update": lambda queue, permit: queue.update(limit()),
}


@needs_signals
@pytest.mark.parametrize("name", CALLS)
def test_a_handler_in_the_midst_of_a_transaction_is_refused(make, amid, name):
    queue = make(limit(max_concurrency=2))
    permit = queue.acquire(1)
    result = amid(queue, lambda: CALLS[name](queue, permit))
    queue.acquire(0)
    (error,) = result
    assert isinstance(error, RuntimeError)
    assert "signal handler" in str(error)
    assert queue.snapshot().granted == 2


@needs_signals
def test_what_a_handler_reports_in_the_midst_of_a_transaction_is_told_after_it(make, amid):
    queue = make(limit(max_concurrency=2))
    permit = queue.acquire(1)
    result = amid(queue, permit.unused)
    queue.acquire(0)
    assert result == [None]
    assert queue.snapshot().limit.remaining == 999


@needs_signals
def test_what_a_handler_was_refused_harms_nobody(make, amid, clock):
    queue = make(limit(10, 8, 100.0))
    amid(queue, lambda: queue.acquire(0))
    assert queue.acquire(0).remaining == 7
    assert queue.snapshot().waiting == 0
    clock.advance(WINDOW)
    assert queue.acquire(0).remaining == 6
    assert is_whole(queue)


@needs_signals
@pytest.mark.parametrize("call", ["snapshot", "acquire"])
def test_a_handler_may_close_the_queue_in_the_midst_of_a_transaction(path, make, amid, call):
    queue = make()
    result = amid(queue, queue.close)
    with contextlib.suppress(QueueClosed):
        queue.snapshot() if call == "snapshot" else queue.acquire(0)
    assert result == [None]
    assert queue.closed
    soon(lambda: not open_files(path), "closing left the file open")


@needs_signals
def test_a_permit_that_a_closing_handler_came_in_the_way_of_is_given_back(make, amid):
    queue = make(limit(10, 8, 100.0))
    amid(queue, queue.close)
    with pytest.raises(QueueClosed):
        queue.acquire(0)
    assert make().snapshot().limit.remaining == 8


HANDLING = """
import faulthandler, signal, sys, threading, time
from gateway_queue_sync import SqliteQueue
from gateway_queue_sync.ledgers.shared import sqlite, turns
faulthandler.dump_traceback_later(8, exit=True)     # it is stuck
queue = SqliteQueue(sys.argv[1], interval=0.05, margin=0.05)
permit = queue.acquire(0)

def another_reports_meanwhile(*args, **kwargs):
    sqlite.answer = turns.answer
    reporting = threading.Thread(target=permit.sent)
    reporting.start()
    reporting.join()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
    time.sleep(0.05)                                # until it is handled
    return turns.answer(*args, **kwargs)

sqlite.answer = another_reports_meanwhile
"""


@needs_signals
@pytest.mark.parametrize("call", ["queue.snapshot()", "queue.acquire(1)", "queue.try_acquire(1)"])
def test_a_handler_is_refused_while_another_thread_has_something_to_tell(path, call):
    (said,) = run(
        HANDLING
        + f"""
def handler(signum, frame):
    try:
        {call}
    except RuntimeError as error:
        print(error)
signal.signal(signal.SIGUSR1, handler)
queue.snapshot()
queue.close()
""",
        path,
    )
    assert "signal handler" in said


@needs_signals
def test_a_handler_may_close_the_queue_while_another_thread_has_something_to_tell(path):
    (said,) = run(
        HANDLING
        + """
signal.signal(signal.SIGUSR1, lambda signum, frame: queue.close())
queue.snapshot()
print(queue.closed)
""",
        path,
    )
    assert said == "True"


# --- exceptions raised into callers ---------------------------------------------------------------


# CPython 3.13 does not report all instructions again of code that was traced before.
ENOUGH = 20 if sys.version_info < (3, 13) else 1


def wait_for_transaction(path):
    """Wait until another process can begin one: as soon as a worker has ended its own."""
    sql(path, "PRAGMA busy_timeout = 1000", "BEGIN IMMEDIATE", "ROLLBACK")


@pytest.mark.parametrize("name", ["try_acquire", "sent", "snapshot"])
def test_an_interrupt_at_any_point_of_a_call_leaves_no_transaction_open(path, make, clock, name):
    queue = make(limit(10**6, 10**6), period=48 * 3600.0)
    permits = []
    calls = {
        "try_acquire": lambda: queue.try_acquire(0),
        "sent": lambda: permits.pop().sent(),
        "snapshot": queue.snapshot,
    }

    def prepare():
        clock.advance(10)
        if name == "sent":
            permits.append(queue.acquire(0))

    def check(result, injector):
        wait_for_transaction(path)
        assert is_whole(queue), injector.where

    assert run_interrupted_everywhere(calls[name], check, prepare) > ENOUGH


def test_an_interrupt_at_any_point_of_an_acquire_loses_next_to_nothing(path, make, clock):
    total = 10**6
    queue = make(limit(total, total), period=48 * 3600.0)
    lost = []

    def prepare():
        clock.advance(10)

    def check(result, injector):
        if result is not None:
            result.unused()
        missing = total - queue.snapshot().limit.remaining
        assert missing - len(lost) in (0, 1), injector.where
        if missing > len(lost):
            lost.append(injector.where)

    assert run_interrupted_everywhere(lambda: queue.acquire(0), check, prepare) > ENOUGH
    assert len(lost) <= 4, lost  # each where the permit is handed from one function to the next


def test_interrupts_at_random_instants_cost_no_more_than_what_was_handed_over(path):
    """Ctrl-C again and again, while other threads and another queue contend for the file."""
    seed = 20261124
    rng = random.Random(seed)
    print(f"seed {seed}")
    total = 10**6
    settings = {"interval": 0.001, "margin": 0.02, "period": 172_800.0}
    queue = SqliteQueue(path, limit(total, total, max_concurrency=4096), **settings)
    other = SqliteQueue(path, **settings)
    with contending((queue, queue, other)) as taken:
        interrupted = interrupt_at_random(rng, queue, taken)
    assert interrupted > 200
    assert is_whole(queue)
    wait_for_transaction(path)
    charged = total - queue.snapshot().limit.remaining
    assert 0 <= charged - len(taken) <= interrupted / 20
    queue.close()
    other.close()
    assert is_sound(path)


@contextlib.contextmanager
def contending(queues):
    """Have a thread for each of the queues take permits of one bucket all the while."""
    taken, stop = [], threading.Event()

    def contend(queue):
        while not stop.is_set():
            with contextlib.suppress(AcquireTimeout, LedgerError):
                taken.append(queue.acquire(0, timeout=1))

    threads = [threading.Thread(target=contend, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    try:
        yield taken
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


def interrupt_at_random(rng, queue, taken):
    """Ask for permits, and be interrupted; return how often that came in the way."""

    def ask(shard_id):
        if rng.random() < 0.3:
            return queue.try_acquire(shard_id)
        return queue.acquire(shard_id, timeout=rng.choice([None, 0, 0.005]))

    def handler(signum, frame):
        if may_be_interrupted(frame):
            raise KeyboardInterrupt

    interrupted = 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for bucket in range(1, 2001):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.000_02, 0.001_5))
            try:
                permit = ask(rng.choice([0, bucket, bucket]))
            except (AcquireTimeout, LedgerError):  # another queue may be in the midst of something
                continue
            except KeyboardInterrupt:
                interrupted += 1
                continue
            if permit is not None:
                taken.append(permit)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return interrupted


def may_be_interrupted(frame):
    """Whether a call to the package is under way here, and in it nothing that no exception leaves."""
    while frame is not None:
        name = frame.f_code.co_filename
        if "gateway_queue_sync" in name:
            return True
        if (
            "coverage" in name
            or "hypothesis" in name
            or name.endswith(("weakref.py", "_weakrefset.py"))
        ):
            return False
        frame = frame.f_back
    return False


def test_processes_that_make_the_file_at_one_time_all_have_it(path):
    """Whatever one of them sees of what another is just making."""
    for _ in range(30):
        path.unlink(missing_ok=True)
        barrier = threading.Barrier(4)
        failures = []

        def begin(barrier=barrier, failures=failures):
            barrier.wait(PATIENCE)
            try:
                SqliteQueue(path).close()
            except LedgerError as error:
                failures.append(error)

        threads = [threading.Thread(target=begin) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not failures
