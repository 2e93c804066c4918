"""A shared ledger in an SQLite file: the same replies as any store, whatever happens to the file."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from memory_store import MemoryStore

from gateway_queue_sync import LedgerError
from gateway_queue_sync.clock import SYSTEM_CLOCK
from gateway_queue_sync.ledgers.shared import sqlite, sqlite_file, turns
from gateway_queue_sync.ledgers.shared.backend import Backend, Busy, Unreachable
from gateway_queue_sync.ledgers.shared.messages import (
    INTRODUCE,
    OK,
    OPEN,
    READ,
    REFUSED,
    UPDATE,
    Introduction,
    Limit,
    Line,
    Report,
    Request,
    Waiter,
)
from gateway_queue_sync.ledgers.shared.sqlite import SqliteBackend
from gateway_queue_sync.ledgers.shared.store_sqlite import Kept, SqliteStore

S = 1_000_000
WINDOW = 5 * S + S // 4
ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
NOBODY = 65534

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
needs_boot_id = pytest.mark.skipif(
    not sqlite_file.BOOT_ID.exists(), reason="there is no boot id here"
)


class HandClock:
    """A clock that can be set in any way."""

    def __init__(self) -> None:
        self.now, self.wall = 1_000 * S, 1_700_000_000 * S

    def now_us(self) -> int:
        return self.now

    def wall_us(self) -> int:
        return self.wall

    def later(self, us: int) -> None:
        self.now += us
        self.wall += us


@dataclass
class Talker:
    """A session that says what a test wants."""

    backend: SqliteBackend
    session: str = "a"
    interval_us: int = 5 * S
    margin_us: int = S // 4
    number: int = 0
    layout: int = 0
    can_read: int = 0
    latest: Request | None = None

    def introduce(self, limit=None, **fields):
        limit = limit or Limit(OPEN, 1000, 1000, 0, 1, 0, 0)
        defaults = {
            "replaces": "", "bot": "", "limit": limit, "granted": 0, "period": 0,
            "layout": 0, "seen": None,
        }  # fmt: skip
        return self.say(introduction=Introduction(**(defaults | fields)))

    def say(self, **what):
        self.number += 1
        self.latest = Request(
            attempt=self.number, sent_us=0, session=self.session, number=self.number,
            interval_us=self.interval_us, margin_us=self.margin_us, period_us=86_400 * S,
            lease_us=5 * S, reserve=0, reread_us=600 * S, can_read=self.can_read, look=0,
            layout=self.layout,
        )._replace(**what)  # fmt: skip
        reply = self.backend.ask(self.latest)
        self.layout = reply.layout
        return reply

    def ask(self, bucket=0, **what):
        now_us = self.backend._clock.now_us()
        waiter = Waiter(self.number + 1, bucket, now_us, now_us)
        return self.say(lines=(Line(bucket, 0, (waiter,)),), **what)


LOOK = Request(1, 0, "", 1, 5 * S, S // 4, 86_400 * S, 5 * S, 0, 0, 0, 1, 0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bot.sqlite3"


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def make(path, clock):
    """Make backends on the file, on a clock that is set by hand."""
    made = []

    def make(at=None, name="default", by=None, **what):
        made.append(SqliteBackend(str(at or path), name, by or clock, **what))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


@pytest.fixture
def talk(make, clock):
    """A session whose first window is over."""

    def talk(session="a", **settings):
        talker = Talker(make(), session, **settings)
        talker.introduce()
        clock.later(WINDOW)
        return talker

    return talk


def sql(path, *statements):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def logged(caplog, words):
    return [one for one in map(logging.LogRecord.getMessage, caplog.records) if words in one]


def run(code, *arguments, timeout=30):
    """Run a program of its own, and return the lines that it printed; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENVIRONMENT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


COMMON = """
import encodings.ascii, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from test_sqlite_backend import *
path = sys.argv[1]
def quick(session, backend=None):
    backend = backend or SqliteBackend(path, "default", SYSTEM_CLOCK)
    talker = Talker(backend, session, interval_us=40_000, margin_us=10_000)
    while True:
        try:
            talker.introduce(Limit(OPEN, 10**6, 10**6, 0, 1, 0, 0))
            return talker
        except Busy:
            talker.number -= 1
def until_granted(talker):
    while True:
        now_us = SYSTEM_CLOCK.now_us()
        request = talker.latest._replace(
            number=talker.number + 1, introduction=None, layout=talker.layout,
            lines=(Line(0, 0, (Waiter(1, 0, now_us, now_us),)),),
        )
        while True:
            try:
                reply = talker.backend.ask(request)
                break
            except Busy:
                time.sleep(0.001)
        assert reply.status == OK, reply
        talker.number, talker.layout = talker.number + 1, reply.layout
        for permit in reply.permits:
            return permit.serial, reply.now_us - permit.age_us
        time.sleep(0.005)
"""


# --- the same replies as a store in memory --------------------------------------------------------


class Walk:
    """Requests of several sessions, most of them sensible."""

    def __init__(self, seed: int, clock: HandClock) -> None:
        self.dice, self.clock = random.Random(seed), clock
        self.sessions: dict[str, int] = {}
        self.layout = self.granted = self.period = 0
        self.buckets = 1
        self.serials = [1]
        self.latest: list[Request] = []

    def time(self) -> None:
        dice = self.dice
        self.clock.later(dice.choice((1, 1_000, 50_000, 300_000, S, 3 * S)))
        chance = dice.random()
        if chance < 0.01:
            self.clock.later(dice.choice((30, 70, 100_000)) * S)
        elif chance < 0.02:
            self.clock.wall += dice.randint(-4_000, 4_000) * S
        elif chance < 0.025:
            self.clock.now -= dice.choice((100_000, 3 * S, 100 * S))

    def limit(self, kind: int) -> Limit:
        dice, now_us = self.dice, self.clock.now
        total = dice.choice((20, 1000, 1000))
        reset_us = dice.choice((0, 20 * S, 20 * S, 3_600 * S))
        asked_us = now_us - dice.choice((10_000, 2 * S))
        buckets = dice.choice((1, 1, 1, 1, 1, 1, 3))
        return Limit(kind, total, dice.randint(0, total), reset_us, buckets, asked_us, now_us)

    def waiter(self) -> Waiter:
        dice, now_us = self.dice, self.clock.now
        position_us = now_us - dice.choice((0, 10_000, 30 * S))
        once = int(dice.random() < 0.2)
        shard_id = dice.randrange(6)
        return Waiter(dice.randint(1, 999), shard_id, now_us, position_us, once)

    def line(self) -> Line:
        first = self.waiter()
        waiters = (first, first._replace(number=first.number + 1000))[: self.dice.randrange(3)]
        bucket = first.shard_id % self.buckets + (self.dice.random() < 0.03)
        return Line(bucket, self.dice.choice((0, 0, 4)), waiters)

    def report(self) -> Report:
        dice = self.dice
        serial, at_us = dice.choice(self.serials[-5:]), self.clock.now - dice.choice((0, 40_000))
        return Report(
            dice.choice((0, 1, 1, 1, 1, 2)),
            serial,
            dice.randrange(6),
            self.period,
            at_us,
        )

    def request(self) -> Request:
        dice, new = self.dice, None
        if self.latest and dice.random() < 0.05:
            return dice.choice(self.latest[-4:])
        if not self.sessions or dice.random() < 0.08:
            session, number = f"{dice.getrandbits(32):08x}", 1
            replaces = dice.choice([*self.sessions, "", ""])
            seen = dice.choice((None, self.limit(OPEN)))
            granted = self.granted + (dice.random() < 0.05)
            bot = dice.choice(("", "", "1", "2"))
            opens = dice.choice((None, None, self.limit(OPEN)))
            new = Introduction(replaces, bot, opens, granted, self.period, self.layout, seen)
        else:
            session = dice.choice([*self.sessions][-5:])
            number = self.sessions[session] + dice.choice((1,) * 200 + (0, 0, 0, 2))
        lines = {} if new else {line.bucket: line for line in (self.line(), self.line())}
        request = Request(
            len(self.latest), 0, session, number, dice.choice((5, 5, 3)) * S,
            dice.choice((S // 4, S // 20)), 86_400 * S, dice.choice((5, 1)) * S,
            dice.choice((0, 0, 2)), dice.choice((0, 600 * S)), dice.randint(0, 1),
            int(dice.random() < 0.1), self.layout - (dice.random() < 0.03), tuple(lines.values()),
            () if new else tuple(self.report() for _ in range(dice.choice((0,) * 9 + (1, 2)))),
            None if new or dice.random() < 0.9 else self.limit(dice.choice((UPDATE, READ))), new,
        )  # fmt: skip
        if dice.random() < 0.02:
            return request._replace(session="", look=1)
        return request._replace(interval_us=0) if dice.random() < 0.01 else request

    def note(self, request, reply) -> None:
        self.latest.append(request)
        self.buckets = max(1, reply.max_concurrency)
        self.layout, self.granted, self.period = reply.layout, reply.granted, reply.period
        self.serials += [permit.serial for permit in reply.permits]
        if reply.status == OK and request.session:
            self.sessions[request.session] = request.number
        elif reply.status == INTRODUCE:
            self.sessions.pop(request.session, None)


def rows_of(path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        store = SqliteStore(connection, "default", Kept("", "", "", 0, 0))
        ids = connection.execute("SELECT session FROM session").fetchall()
        sessions = {store.session(one) for (one,) in ids}
        return store.account(), store.buckets(), sessions, store.recent()


def rows_of_memory(memory):
    account = replace(memory.account(), recent=None)
    account.default_bucket = replace(account.default_bucket, rejected_serial=-1)  # it is not used
    sessions = set(memory._sessions.values())
    return account, memory._buckets, sessions, memory._recent


@pytest.mark.parametrize("seed", range(6))
def test_every_reply_is_the_same_as_that_of_a_store_in_memory(path, make, clock, seed):
    walk, memory, backends = Walk(seed, clock), MemoryStore(), [make(), make()]
    statuses, permits = set(), 0
    for step in range(800):
        walk.time()
        request = walk.request()
        if not path.exists() and not request.session:
            continue
        lost = bool(request.session) and memory._account is not None and step % 250 == 249
        backend = walk.dice.choice(backends)
        if lost:
            sql(path, "UPDATE account SET generation = generation - 1")
            backend = max(backends, key=lambda one: one._seen.generation)
        expected = memory.answer(
            request._replace(sent_us=clock.now), clock.now, clock.wall, lost=lost
        )
        reply = backend.ask(request)
        assert reply == expected, step
        walk.note(request, reply)
        statuses.add(reply.status)
        permits += len(reply.permits)
    assert statuses == {OK, INTRODUCE, REFUSED}
    assert permits > 20
    assert rows_of(path) == rows_of_memory(memory)


def test_the_request_of_a_process_with_another_clock_keeps_its_times(make, clock):
    talker = Talker(make())
    talker.introduce()
    clock.later(WINDOW)
    request = talker.latest._replace(
        attempt=7, number=2, introduction=None, layout=1, sent_us=50 * S,
        lines=(Line(0, 0, (Waiter(1, 0, 49 * S, 49 * S), Waiter(2, 0, 49 * S, 49 * S))),),
    )  # fmt: skip
    reply = talker.backend.relay(request)
    assert (reply.attempt, reply.number, len(reply.permits)) == (7, 2, 1)
    (line,) = talker.backend.ask(LOOK).look.lines
    assert line.waiters[0].arrived_us == clock.now - S


def test_accounts_in_one_file_do_not_know_of_each_other(make, clock):
    one, other = Talker(make(name="one")), Talker(make(name="other"))
    for talker in (one, other):
        talker.introduce()
    clock.later(WINDOW)
    assert [one.ask().permits[0].serial, other.ask().permits[0].serial] == [1, 1]


def test_one_account_is_divided_anew_and_the_other_keeps_its_buckets(make, clock):
    one, other = Talker(make(name="one")), Talker(make(name="other"))
    for talker in (one, other):
        talker.introduce()
    clock.later(WINDOW)
    assert other.ask().permits
    clock.later(WINDOW // 2)
    one.say(limit=Limit(UPDATE, 9, 9, 0, 2, clock.now, clock.now))
    assert other.ask().permits == ()


def test_a_bucket_that_was_deleted_is_written_though_it_is_as_it_was(path, talk):
    talk().ask()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        store = SqliteStore(connection, "default", Kept("", "", "", 0, 0))
        bucket = store.bucket(0)
        store.drop_buckets()
        assert store.bucket(0) is None
        store.put_bucket(0, bucket)
        assert store.buckets() == {0: bucket}


def test_a_backend_is_one(make):
    backend: Backend = make()
    assert repr(backend).startswith("SQLite file '/")
    assert repr(make(name="two")).endswith("(two)")


# --- what a request costs -------------------------------------------------------------------------


def statements_of(backend, call):
    found = []
    backend._file.connection.set_trace_callback(found.append)
    call()
    backend._file.connection.set_trace_callback(None)
    return found


def test_a_head_that_asks_again_takes_few_statements(talk):
    talker = talk()
    talker.ask()
    talker.ask()
    statements = statements_of(talker.backend, talker.ask)
    assert len(statements) <= 12
    assert statements[0] == "BEGIN IMMEDIATE"
    assert statements_of(talker.backend, lambda: talker.backend.ask(LOOK))[0] == "BEGIN"


def add_dead_sessions(path, count):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(session)")]
        (row,) = connection.execute("SELECT * FROM session LIMIT 1").fetchall()
        row = dict(zip(columns, row, strict=True))
        rows = [
            tuple((row | {"session": f"dead{one}", "last_request_us": one}).values())
            for one in range(count)
        ]
        marks = ", ".join("?" * len(columns))
        connection.executemany(f"INSERT INTO session VALUES ({marks})", rows)


def test_thousands_of_dead_sessions_are_removed_in_steps(path, talk):
    talker = talk()
    talker.ask()
    talker.ask()
    add_dead_sessions(path, 2_000)
    for _ in range(50):
        talker.ask()
    assert sql(path, "SELECT count(*) FROM session") == [(2_001 - 200,)]


def test_no_statement_reads_a_whole_table(path, talk):
    talker = talk()
    plans = []
    backend = talker.backend
    for statement in {
        *statements_of(backend, talker.ask),
        *statements_of(backend, lambda: talker.say(reports=(Report(1, 1, 0, 1, 0),))),
        *statements_of(backend, lambda: talker.ask(look=1)),
        *statements_of(backend, lambda: talker.say(limit=Limit(UPDATE, 9, 9, 0, 2, 0, 0))),
    }:
        if statement.split()[0] in {"SELECT", "DELETE", "UPDATE"}:
            plans += [row[3] for row in sql(path, f"EXPLAIN QUERY PLAN {statement}")]
    assert any("session_heard" in plan for plan in plans)
    scans = [plan for plan in plans if plan.startswith("SCAN") and "subquery" not in plan.lower()]
    assert scans == []


# --- a file that is locked ------------------------------------------------------------------------


def test_a_locked_file_is_unreachable_after_ten_milliseconds(path, talk):
    talker = talk()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy, match="another process holds it locked") as caught:
            talker.ask()
    assert talker.backend._file.connection.execute("PRAGMA busy_timeout").fetchone() == (10,)
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert str(path) in str(caught.value)
    assert talker.backend.ask(talker.latest).permits  # the same request, again


def test_a_reader_in_the_way_of_a_commit_costs_nothing(path, talk):
    talker = talk()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM account").fetchall()
        with pytest.raises(Busy):
            talker.ask()
    assert talker.backend.ask(LOOK).remaining == 1000
    assert talker.backend.ask(talker.latest).permits[0].serial == 1


def test_a_file_that_was_locked_when_it_was_opened_syncs_nothing_either(path, make):
    Talker(make()).introduce()
    late = Talker(make(), "b")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Busy):
            late.introduce()
    late.backend.ask(late.latest)
    run = late.backend._file.connection.execute
    assert run("PRAGMA synchronous").fetchone() == (0,)
    assert run("PRAGMA journal_mode").fetchone() == ("truncate",)


def test_who_only_looks_waits_for_no_lock_and_makes_no_file(path, make, talk):
    with pytest.raises(LedgerError, match="No such file"):
        make().ask(LOOK)
    assert not path.exists()
    path.touch()
    with pytest.raises(LedgerError, match="contains no account"):
        make().ask(LOOK)
    talker = talk()
    assert make(name="other").ask(LOOK).status == INTRODUCE
    looker = make()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert looker.ask(LOOK).total == 1000
    talker.backend = looker  # and may write later
    assert talker.ask().permits
    assert looker._file.connection.execute("PRAGMA synchronous").fetchone() == (0,)


# --- a file that is lost, or replaced -------------------------------------------------------------


def put_back(path):
    path.with_suffix(".old").replace(path)


def written_over(path):
    """An older copy under the same inode, as ``cp`` leaves it."""
    path.write_bytes(path.with_suffix(".old").read_bytes())


def test_the_numbers_of_a_file_that_is_its_own_successor_are_no_loss(talk, clock):
    one, two = talk("a"), talk("b")
    for _ in range(5):
        assert one.ask().lost == two.ask().lost == 0


@pytest.mark.parametrize(
    ("column", "nonsense"),
    [
        ("remaining", "'many'"),
        ("max_concurrency", "0"),
        ("resets_at_us", "'soon'"),
        ("interval_us", "x'00ff'"),
        ("granted", str(2**63 - 1)),
        ("default_last_us", "NULL"),
    ],
)
def test_nonsense_in_the_file_is_explained(column, nonsense, path, talk):
    talker = talk()
    sql(path, f"UPDATE account SET {column} = {nonsense}")
    with pytest.raises(LedgerError, match="contains invalid data") as caught:
        talker.ask()
    assert str(path) in str(caught.value)
    assert not talker.backend._file.connection.in_transaction


def made_a_pipe(path):
    os.mkfifo(path)


def made_a_loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("name", "make_it", "words"),
    [
        ("folder", Path.mkdir, "is not a regular file"),
        ("pipe", made_a_pipe, "is not a regular file"),
        ("loop", made_a_loop, "symbolic links"),
        ("missing/bot", None, "No such file or directory"),
        ("x" * 300, None, "name too long"),
        ("/dev/null", None, "is not a regular file"),
        ("/dev/null/bot", None, "Not a directory"),
    ],
)
def test_what_can_be_no_file_is_refused_with_the_reason(tmp_path, make, name, make_it, words):
    path = tmp_path / name
    if make_it is not None:
        make_it(path)
    with pytest.raises(LedgerError, match=words) as caught:
        Talker(make(path)).introduce()
    assert str(path) in str(caught.value)


# --- whose file it is -----------------------------------------------------------------------------


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_new_file_is_for_its_owner_alone_whatever_the_umask(path, make):
    before = os.umask(0)
    try:
        Talker(make()).introduce()
    finally:
        os.umask(before)
    assert {mode(file) for file in path.parent.iterdir()} == {0o600}


def test_a_file_that_others_can_read_is_closed_to_them_with_a_warning(path, make, caplog):
    Talker(make()).introduce()
    path.chmod(0o644)
    make().ask(LOOK)
    assert mode(path) == 0o644
    Talker(make(), "b").introduce()
    assert mode(path) == 0o600
    assert len(logged(caplog, "could be read by other users")) == 1


@needs_root
def test_a_file_of_another_user_is_refused(path, make):
    Talker(make()).introduce()
    os.chown(path, NOBODY, -1)
    with pytest.raises(LedgerError, match=f"belongs to user {NOBODY}, not to 0"):
        Talker(make(), "b").introduce()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def filled_up(disk):
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)
    yield
    ballast.unlink()


def test_a_full_disk_grants_nothing_until_there_is_room(small_disk, make, clock):
    talker = Talker(make(small_disk / "bot"))
    with filled_up(small_disk), pytest.raises(LedgerError, match="full"):
        talker.introduce()
    talker.layout = talker.backend.ask(talker.latest).layout
    clock.later(WINDOW)
    with filled_up(small_disk), pytest.raises(LedgerError, match="full") as caught:
        talker.ask()
    assert not isinstance(caught.value, Unreachable | Busy)
    assert talker.backend.ask(talker.latest).permits[0].serial == 1
    assert sql(small_disk / "bot", "PRAGMA integrity_check") == [("ok",)]


def test_a_link_leads_to_the_real_file_and_is_not_followed_later(tmp_path, path, make, clock):
    link = tmp_path / "link"
    link.symlink_to(path)
    talker = Talker(make(link))
    talker.introduce()
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere")
    talker.ask()
    assert path.is_file()
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "link-journal").exists()


def test_a_file_with_several_names_is_refused_until_it_has_one(tmp_path, path, make, clock):
    talker = Talker(make())
    talker.introduce()
    os.link(path, tmp_path / "name")
    talker.ask()  # a backup that links files does not stop those who have it open by its one name
    for at in (path, tmp_path / "name"):
        with pytest.raises(LedgerError, match=r"has 2 names \(hard links\)") as caught:
            Talker(make(at), "b").introduce()
        assert isinstance(caught.value.__cause__, OSError)
    (tmp_path / "name").unlink()
    assert Talker(make(), "b").introduce().status == OK


# --- where the file is ----------------------------------------------------------------------------


@pytest.fixture
def mounted(monkeypatch):
    """Say what is mounted: pairs of a mount point and a type of file system."""
    read_text = Path.read_text

    def mounted(*mounts):
        lines = [
            f"{20 + n} 1 0:{n} / {point} rw,relatime shared:{n} master:2 - {kind} source:/x rw\n"
            for n, (point, kind) in enumerate([("/", "ext4"), *mounts])
        ]

        def fake(self, *args, **kwargs):
            if str(self) == "/proc/self/mountinfo":
                return "".join(lines)
            return read_text(self, *args, **kwargs)

        monkeypatch.setattr(Path, "read_text", fake)

    return mounted


@pytest.mark.parametrize(
    "kind", ["nfs4", "cifs", "9p", "fuse.sshfs", "ceph", "virtiofs", "vboxsf", "prl_fs"]
)
def test_a_file_system_that_machines_share_is_warned_of_once(
    tmp_path, path, mounted, make, caplog, kind
):
    mounted((tmp_path, kind))
    talker = Talker(make())
    talker.introduce()
    talker.backend.close()
    talker.ask()
    (message,) = logged(caplog, f"is on a network or shared file system ({kind})")
    assert str(path) in message


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "overlay", "fuseblk"])
def test_a_local_file_system_is_not_warned_of(tmp_path, mounted, make, caplog, kind):
    mounted(("/", "nfs"), (tmp_path, kind), (tmp_path / "bot", "nfs"), (tmp_path / "other", "nfs"))
    Talker(make()).introduce()
    assert caplog.messages == []


def test_a_mount_point_may_have_a_space_and_the_later_mount_counts(tmp_path, mounted, make, caplog):
    share = tmp_path / "my share"
    share.mkdir()
    escaped = str(share).replace(" ", r"\040")
    mounted((escaped, "ext4"), (escaped, "nfs4"))
    Talker(make(share / "bot")).introduce()
    assert logged(caplog, "shared file system (nfs4)")


def test_a_file_that_is_said_to_be_mounted_alone_is_refused(path, mounted, make):
    mounted((path, "ext4"))
    with pytest.raises(LedgerError, match="is a mount point itself") as caught:
        Talker(make()).introduce()
    assert f"./queue:{path.parent}/queue" in str(caught.value)
    assert f"use {path.parent}/queue/{path.name}" in str(caught.value)


@needs_root
def test_a_file_that_is_mounted_alone_is_refused_and_its_folder_is_not(tmp_path):
    (tmp_path / "host").mkdir()
    (tmp_path / "folder").mkdir()
    for file in ("host/q", "alone"):
        (tmp_path / file).touch(0o600)
    code = COMMON + textwrap.dedent(
        """
        import subprocess
        host, alone, folder = (os.path.join(sys.argv[1], name) for name in ("host", "alone", "folder"))
        subprocess.run(["mount", "--bind", host + "/q", alone], check=True)
        subprocess.run(["mount", "--bind", host, folder], check=True)
        try:
            path = alone
            quick("a")
        except LedgerError as error:
            print(error)
        path = folder + "/q"
        print(until_granted(quick("a"))[0])
        """
    )
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=30,
        check=False,
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr[-200:]}")
    error, granted = done.stdout.splitlines()
    assert "is a mount point itself" in error
    assert granted == "1"


# --- other clocks and machines --------------------------------------------------------------------


def kept_by(path, touched=0.0, **columns):
    changes = [f"{column} = '{value}'" for column, value in columns.items()]
    changes += [f"touched_us = touched_us - {touched * S:.0f}"]
    sql(path, f"UPDATE account SET {', '.join(changes)}")


ANOTHER_BOOT = "a1b2c3d4-0000-4000-8000-000000000000 time:[4026531834]"
SYSTEM = {"interval_us": 40_000, "margin_us": 10_000}


@pytest.fixture
def system(path, make):
    talker = Talker(make(by=SYSTEM_CLOCK), **SYSTEM)
    talker.introduce()
    return talker


@needs_boot_id
def test_a_file_that_another_machine_uses_is_refused_until_it_has_stopped(
    path, system, make, caplog
):
    kept_by(path, clock=ANOTHER_BOOT, machine="another", touched=30)
    new = Talker(make(by=SYSTEM_CLOCK), "b", **SYSTEM)
    with pytest.raises(LedgerError, match="was used by another machine 30 s ago"):
        new.introduce()
    kept_by(path, touched=31)
    assert new.backend.ask(new.latest).lost == 1
    assert logged(caplog, "another clock")


@needs_boot_id
def test_two_machines_that_do_not_know_their_ids_do_not_starve_each_other(path, system):
    sql(path, "UPDATE account SET generation = generation + 1")  # the other has stored it
    kept_by(path, clock=ANOTHER_BOOT, machine="", touched=-4_000)  # by a clock that is fast
    with pytest.raises(LedgerError, match="was used by another machine 0 s ago"):
        system.ask()


@needs_boot_id
def test_a_machine_that_reboots_within_a_minute_is_not_refused(path, system, make):
    kept_by(path, clock=ANOTHER_BOOT)
    new = Talker(make(by=SYSTEM_CLOCK), "b", **SYSTEM)
    assert new.introduce().lost == 1


@needs_boot_id
def test_containers_of_one_machine_have_other_ids_and_one_boot(path, system):
    kept_by(path, machine="another")
    assert system.ask().lost == 0


def test_without_a_boot_id_a_machine_is_known_by_when_it_began(path, make, monkeypatch):
    monkeypatch.setattr(sqlite_file, "BOOT_ID", Path("/missing"))
    monkeypatch.setattr(sqlite_file, "MACHINE_ID", Path("/missing"))
    one = Talker(make(by=SYSTEM_CLOCK), **SYSTEM)
    one.introduce()
    one.ask()
    shutil.copy2(path, path.with_suffix(".old"))
    assert one.ask().lost == 0
    written_over(path)
    assert one.backend.ask(one.latest).lost == 1  # a copy, of the same clock
    (began,) = sql(path, "SELECT clock FROM account")[0]
    kept_by(path, clock=str(int(began) - 3_600 * S))
    assert one.ask().lost == 1


def test_the_machines_own_id_is_not_in_the_file(path, system):
    if not sqlite_file.MACHINE_ID.exists():
        pytest.skip("this machine has no id")
    assert sqlite_file.MACHINE_ID.read_bytes().strip() not in path.read_bytes()


# --- logging, closing, forks ----------------------------------------------------------------------


def test_a_log_that_blocks_holds_neither_the_file_nor_a_fork(path, talk, clock):
    talker, other, held = talk("a"), talk("b"), []

    class Blocks(logging.Handler):
        def emit(self, record):
            held.append(talker.backend._io._is_owned())
            connection = talker.backend._file.connection
            held.append(connection.in_transaction)
            other.ask()  # as another process would, meanwhile

    handler = Blocks()
    logging.getLogger("gateway_queue_sync").addHandler(handler)
    try:
        sql(path, "UPDATE account SET generation = 0")
        assert talker.ask().lost == 1
        shutil.copy2(path, path.with_suffix(".old"))
        put_back(path)
        talker.ask()
    finally:
        logging.getLogger("gateway_queue_sync").removeHandler(handler)
    assert len(held) >= 4
    assert not any(held)


def test_a_closed_file_is_opened_by_the_next_request(talk):
    talker = talk()
    talker.backend.close()
    talker.backend.close()
    assert talker.backend._file is None
    assert talker.ask().permits


def test_a_request_that_is_under_way_closes_the_file_when_it_ends(talk, monkeypatch):
    talker = talk()

    def closes(*args, **kwargs):
        closer = threading.Thread(target=talker.backend.close)
        closer.start()
        closer.join(5)
        assert not closer.is_alive()
        return turns.answer(*args, **kwargs)

    monkeypatch.setattr(sqlite, "answer", closes)
    assert talker.ask().permits
    assert talker.backend._file is None


def test_a_backend_that_is_forgotten_closes_its_file(path, clock):
    backend = SqliteBackend(str(path), "default", clock)
    Talker(backend).introduce()
    connection = backend._file.connection
    del backend
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


def test_a_call_from_inside_of_a_request_is_an_error(talk, monkeypatch):
    talker = talk()

    def asks_again(*args, **kwargs):
        talker.backend.close()
        return talker.backend.ask(LOOK)

    monkeypatch.setattr(sqlite, "answer", asks_again)
    with pytest.raises(RuntimeError, match="inside another call"):
        talker.ask()


FORKS = """
talker = quick("a")
backend = talker.backend
until_granted(talker)
def fork(in_child):
    backend.before_fork()
    child = os.fork()
    if child:
        backend.after_fork_in_parent()
        return child
    backend.begin_in_child()
    status = 99
    try:
        status = in_child()
    finally:
        os._exit(status)
def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def assert_spaced(lines, least):
    """No two permits in a window, those that nobody could report included."""
    permits = sorted(tuple(map(int, line.split())) for line in lines)
    assert len(permits) >= least
    assert len({serial for serial, _ in permits}) == len(permits)
    for (serial, at_us), (later, later_us) in itertools.pairwise(permits):
        assert later_us - at_us >= (later - serial) * 50_000


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are not listed here")
def test_a_child_never_closes_the_parents_connection(path):
    (said,) = run(
        FORKS
        + """
def open_files():
    gc.collect()
    links = [os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{one}")]
    return links.count(path)
print(open_files(), status_of(fork(open_files)), backend.ask(LOOK).granted)
""",
        path,
    )
    assert said == "1 1 1"


# --- kills ----------------------------------------------------------------------------------------

WORKER = """
talker = quick(f"{os.getpid()}{time.monotonic()}")
print("up", flush=True)
while True:
    print(*until_granted(talker), flush=True)
"""


@pytest.mark.slow
def test_processes_that_are_killed_lose_no_spacing(path):
    dice, lines, workers = random.Random(3), [], []

    def start():
        worker = subprocess.Popen(
            [sys.executable, "-c", COMMON + WORKER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        workers.append(worker)
        assert worker.stdout.readline() == "up\n"

    def kill(worker):
        worker.send_signal(signal.SIGKILL)
        lines.extend(worker.communicate()[0].splitlines(keepends=True))

    try:
        start()
        for _ in range(8):
            start()
            time.sleep(dice.uniform(0.05, 0.25))
            kill(workers.pop(0))
    finally:
        for worker in workers:
            kill(worker)
    assert_spaced([line for line in lines if line.endswith("\n")], 10)
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_transaction_that_kill_cut_short_is_undone(path, system):
    """Its changes are in the file already, and what was before in a journal beside it."""
    while not system.ask().permits:
        time.sleep(0.005)
    before = system.backend.ask(LOOK)
    code = """
    from gateway_queue_sync.ledgers.shared import sqlite
    from gateway_queue_sync.ledgers.shared.store_sqlite import SqliteStore
    talker = quick("b")
    time.sleep(0.1)
    run = talker.backend._file.connection.execute
    run("PRAGMA cache_size = 1")
    class Killed(SqliteStore):
        def put_account(self, account):
            super().put_account(account)
            for n in range(999):
                self.put_recent(10**6 + n, n)
            os.kill(os.getpid(), signal.SIGKILL)
    sqlite.SqliteStore = Killed
    until_granted(talker)
    """
    killed = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(code), str(path)],
        env=ENVIRONMENT,
        timeout=30,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert path.with_name(path.name + "-journal").stat().st_size > 0
    assert system.backend.ask(LOOK).granted == before.granted
    assert system.ask().status == OK
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
