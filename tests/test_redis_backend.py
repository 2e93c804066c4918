"""A Redis server as a shared ledger: an error grants nothing, and is explained."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import random
import signal
import threading
import time

import pytest
import redis
from redis_servers import RedisCluster, RedisServer, needs_redis, until

from gateway_queue_sync.clock import SYSTEM_CLOCK, SystemClock
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared import redis as module
from gateway_queue_sync.ledgers.shared.backend import Busy, Unreachable
from gateway_queue_sync.ledgers.shared.messages import (
    Introduction,
    Limit,
    Line,
    Reply,
    Report,
    Request,
    Waiter,
)
from gateway_queue_sync.ledgers.shared.redis import RedisBackend, maker, portable
from gateway_queue_sync.testing import FakeClock

pytestmark = needs_redis

S = 1_000_000
WINDOW = 300_000
SECRET = "hunter2"


class Talker:
    """A session whose requests a test writes."""

    def __init__(self, backend: RedisBackend, session: str | None = None) -> None:
        self.backend = backend
        self.session = session or f"{random.getrandbits(64):016x}"
        self.number = self.layout = self.attempt = 0
        self.settings = {"interval_us": WINDOW, "lease_us": S}

    def introduce(self, granted: int = 0, layout: int = 0) -> Reply:
        limit = Limit(messages.OPEN, 1000, 1000, 0, 1, self.now_us(), self.now_us())
        return self.say(introduction=Introduction("", "", limit, granted, 0, layout, None))

    def now_us(self) -> int:
        clock = self.backend._clock or SYSTEM_CLOCK
        return clock.now_us()

    def say(self, **what: object) -> Reply:
        self.number += 1
        return self.again(**what)

    def again(self, **what: object) -> Reply:
        self.attempt += 1
        request = Request(
            attempt=self.attempt, sent_us=self.now_us(), session=self.session, number=self.number,
            margin_us=0, period_us=86_400 * S, reserve=0, reread_us=0, can_read=0, look=0,
            layout=self.layout, **self.settings,
        )._replace(**what)  # fmt: skip
        reply = self.backend.ask(request)
        self.layout = reply.layout
        return reply

    def ask(self, waiter: int = 1, shard_id: int = 0) -> Reply:
        at_us = self.now_us()
        return self.say(lines=(Line(shard_id, 0, (Waiter(waiter, shard_id, at_us, at_us),)),))

    def permit(self) -> messages.Granted:
        """Ask until a permit comes."""
        give_up = time.monotonic() + 10
        while True:
            reply = self.ask()
            if reply.permits:
                return reply.permits[0]
            assert time.monotonic() < give_up, reply
            time.sleep(reply.waits[0].wait_us / S if reply.waits else 0.01)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def server(shared_server):
    yield shared_server
    with shared_server.client() as client:
        client.flushall()
        client.execute_command("ACL", "DELUSER", "bot")


@contextlib.contextmanager
def started(folder, *options):
    server = RedisServer(folder, *options)
    try:
        yield server
    finally:
        server.stop()


def talker(server_or_client, clock=SYSTEM_CLOCK) -> Talker:
    given = getattr(server_or_client, "url", server_or_client)
    new = Talker(RedisBackend(given, "default", clock))
    assert new.introduce().status == messages.OK
    return new


def state(server) -> dict[bytes, object]:
    with server.client() as client:
        return {key: client.dump(key) for key in client.keys("*")}


# --- a server as it should be ---------------------------------------------------------------------


def test_sessions_share_an_account_by_the_servers_time(server):
    one, other = talker(server), talker(server)
    first = one.permit()
    assert other.ask().waits[0].opens_us > WINDOW - 100_000
    second = other.permit()
    assert (first.serial, second.serial) == (1, 2)


def test_a_request_that_is_repeated_takes_one_permit(server):
    one = talker(server)
    serial = one.permit().serial
    at_us = one.now_us()
    lines = (Line(0, 0, (Waiter(1, 0, at_us, at_us),)),)
    assert one.again(lines=lines).permits[0].serial == serial


# --- requests that Python computes ----------------------------------------------------------------


def limit_of(one: Talker, remaining: int) -> Limit:
    return Limit(messages.UPDATE, 9, remaining, 600 * S, 1, one.now_us(), one.now_us())


def between(backend: RedisBackend, monkeypatch, acts) -> list[str]:
    """Act before what a request has computed is stored, for the first time. Return the modes seen."""
    run, modes = backend._run, []

    def watched(request, mode, *given):
        modes.append(mode)
        if mode == "store" and modes.count("store") == 1:
            acts()
        return run(request, mode, *given)

    monkeypatch.setattr(backend, "_run", watched)
    return modes


def test_a_limit_is_computed_again_if_a_permit_was_granted_in_between(server, monkeypatch):
    one, other = talker(server), talker(server)
    modes = between(one.backend, monkeypatch, other.permit)
    reply = one.say(limit=limit_of(one, 5))
    assert (reply.limit_result, reply.granted, reply.remaining) == (messages.APPLIED, 1, 5)
    assert modes == ["read", "store", "store"]
    assert one.ask().waits[0].opens_us > WINDOW - 100_000


def test_two_changes_by_one_process_at_one_instant_are_two(server, monkeypatch):
    clock = FakeClock()
    one, other = talker(server, clock), talker(server, clock)
    clock.advance(1)
    other.say()
    between(one.backend, monkeypatch, other.ask)
    reply = one.say(limit=limit_of(one, 5))
    assert (reply.granted, reply.remaining) == (1, 5)


def test_who_has_computed_in_vain_is_next(server, monkeypatch):
    one, other = talker(server), talker(server)
    between(one.backend, monkeypatch, other.say)
    run = one.backend._run

    def watched(request, mode, *given):
        found = run(request, mode, *given)
        if mode == "store" and not found[0]:
            with pytest.raises(Busy):
                other.say()
        return found

    monkeypatch.setattr(one.backend, "_run", watched)
    assert one.say(limit=limit_of(one, 5)).limit_result == messages.APPLIED
    assert other.again().remaining == 5


def test_who_has_computed_in_vain_and_dies_stops_the_others_for_a_second(server, monkeypatch):
    one, other = talker(server), talker(server)
    monkeypatch.setattr(module, "TRIES", 1)
    between(one.backend, monkeypatch, other.say)
    with pytest.raises(Busy):
        one.say(limit=limit_of(one, 5))
    with pytest.raises(Busy):
        other.say()
    with server.client() as client:
        assert 0 < client.pttl("gateway_queue_sync:{default}:claim") <= 1_000
        client.delete("gateway_queue_sync:{default}:claim")  # as it expires
    assert other.again().remaining == 1000


def test_a_result_that_arrives_late_is_not_stored(server):
    one, other = talker(server), talker(server)
    run, late = one.backend._run, []

    def lost(request, mode, *given):
        if mode == "store" and not late:
            late.append((request, mode, *given))
            raise Unreachable
        return run(request, mode, *given)

    one.backend._run = lost
    with pytest.raises(Unreachable):
        one.say(limit=limit_of(one, 5))
    assert one.again(limit=limit_of(one, 5)).remaining == 5
    serial = other.permit().serial
    text, *_ = run(*late[0])
    assert not text
    with server.client() as client:
        client.delete("gateway_queue_sync:{default}:claim")
    reply = other.say()
    assert (reply.granted, reply.remaining) == (serial, 4)


@pytest.mark.parametrize("name", ["interval_us", "margin_us", "lease_us", "period_us", "reread_us"])
def test_a_process_that_checks_no_bounds_is_refused(server, monkeypatch, name):
    one = talker(server)
    monkeypatch.setattr(module, "refusal", lambda _: "")
    for wrong in (-1, 400 * 86_400 * S):
        before = state(server)
        assert one.say(**{name: wrong}).status == messages.REFUSED
        one.number -= 1
        assert state(server) == before


# --- users and what they may not do ---------------------------------------------------------------


def user(server, *rights: str) -> str:
    with server.client() as client:
        client.execute_command(
            "ACL", "SETUSER", "bot", "reset", "on", f">{SECRET}", "~*", "+@all", *rights
        )
    return f"redis://bot:{SECRET}@127.0.0.1:{server.port}/0"


NEEDED = (
    "hset", "hget", "hgetall", "zadd", "zrange", "zcount", "zscore", "zrem",
    "zremrangebyscore", "set", "get", "unlink", "time",
)  # fmt: skip


@pytest.mark.parametrize("command", NEEDED)
def test_the_command_that_a_user_may_not_run_is_named(server, command):
    backend = RedisBackend(user(server, f"-{command}"), "default", SYSTEM_CLOCK)
    with pytest.raises(LedgerError, match=f"may not run {command.upper()}") as caught:
        Talker(backend).introduce()
    assert not isinstance(caught.value, Unreachable)
    assert SECRET not in repr(caught.value) + repr(backend)
    assert not state(server)


@pytest.mark.parametrize("command", NEEDED)
def test_a_right_that_is_taken_away_meanwhile_changes_nothing(server, command):
    """Another process has died and left a line, so all kinds of writes are needed."""
    url = user(server)
    clock = SystemClock()
    clock.now_us = clock.wall_us = lambda: now_us  # type: ignore[method-assign]
    now_us = 1_700_000_000 * S
    dead, one = talker(url, clock), talker(url, clock)
    now_us += S
    dead.ask(9)
    now_us += S
    permit = one.ask(1).permits[0]
    one.ask(2)
    now_us += S
    user(server, f"-{command}")
    before = state(server)
    number = one.number
    report = (Report(messages.UNUSED, permit.serial, 0, permit.period, now_us),)
    line = (Line(0, 0, (Waiter(2, 0, now_us, now_us),)),)
    if command == "time":  # which is taken along here
        return
    if command in ("hgetall", "zrange", "zcount"):  # which this request does not need
        one.backend._tried = False
    for _ in range(3):
        one.number = number
        with pytest.raises(LedgerError):
            one.say(lines=line, reports=report)
        assert state(server) == before
    user(server)
    one.number = number
    assert [one.say(lines=line, reports=report).permits[0].serial] == [permit.serial + 1]


def test_an_account_of_another_version_is_refused(server):
    one = Talker(RedisBackend(user(server), "default", SYSTEM_CLOCK))
    one.introduce()
    with server.client() as client:
        (key,) = client.keys("*:ledger")
        account = json.loads(client.hget(key, "account"))
        client.hset(key, "account", json.dumps(account | {"version": 1}))
    with pytest.raises(LedgerError, match="written by another version of this package") as caught:
        one.ask()
    assert not isinstance(caught.value, Unreachable)


@pytest.mark.parametrize("command", ["eval", "evalsha"])
def test_a_user_without_scripts_is_told_so(server, command):
    backend = RedisBackend(user(server, f"-{command}"), "default", SYSTEM_CLOCK)
    with pytest.raises(LedgerError, match=command) as caught:
        Talker(backend).introduce()
    assert not isinstance(caught.value, Unreachable)


def test_a_wrong_password_is_no_outage_and_not_shown(server):
    user(server)
    backend = RedisBackend(
        f"redis://bot:{SECRET}er@127.0.0.1:{server.port}/0", "default", SYSTEM_CLOCK
    )
    with pytest.raises(LedgerError) as caught:
        Talker(backend).introduce()
    assert not isinstance(caught.value, Unreachable)
    assert SECRET not in repr(caught.value) + str(caught.value) + repr(backend)


def use_all(one: Talker) -> None:
    """Make requests that need all keys."""
    one.ask()
    one.say(
        limit=Limit(messages.READ, 9, 9, 0, 3, one.now_us(), one.now_us()),
        reports=(Report(messages.UNUSED, 1, 0, 1, 0),),
    )


@pytest.mark.parametrize("part", ["ledger", "recent", "session", "claim"])
def test_another_programs_key_is_left_as_it_is(server, part):
    one = talker(server)
    one.ask()
    with server.client() as client:
        name = f"session:{one.session}" if part == "session" else part
        key = f"gateway_queue_sync:{{default}}:{name}"
        client.delete(key)
        if part in ("ledger", "recent"):
            client.set(key, "theirs")
        else:
            client.rpush(key, "theirs")
    before = state(server)
    with pytest.raises(LedgerError, match="WRONGTYPE") as caught:
        use_all(one)
    assert not isinstance(caught.value, Unreachable)
    assert state(server) == before


def test_a_user_without_info_is_warned_once(server, caplog):
    backend = RedisBackend(user(server, "-info"), "default", SYSTEM_CLOCK)
    with caplog.at_level(logging.WARNING, "gateway_queue_sync"):
        one = Talker(backend)
        one.introduce()
        one.permit()
        backend._tried = False
        one.say()
    assert [record.message for record in caplog.records] == [
        (
            f"{backend!r}: neither run_id nor master_replid can be read (INFO), so a restart or "
            "failover is noticed only by what the processes know"
        )
    ]


# --- restarts and failovers -----------------------------------------------------------------------


def test_a_failover_and_back_within_the_lag_closes_all_buckets(tmp_path):
    sync = ("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
    with started(tmp_path, *sync) as one, started(tmp_path, *sync) as two:
        with one.client() as client, two.client() as copy:
            copy.replicaof("127.0.0.1", one.port)
            until(lambda: copy.info("replication")["master_link_status"] == "up")
            early = talker(one)
            early.permit()
            until(
                lambda: (
                    copy.info("replication")["slave_repl_offset"]
                    == client.info("replication")["master_repl_offset"]
                )
            )
            time.sleep(WINDOW / S + 0.2)
            copy.replicaof("NO", "ONE")  # type: ignore[arg-type]
            client.replicaof("127.0.0.1", two.port)
            until(lambda: client.info("replication")["master_link_status"] == "up")
            client.replicaof("127.0.0.1", 1)  # the link is cut, and what `two` grants is lost
            late = talker(two)
            late.permit()
            granted_at = time.monotonic()
            two.stop()
            client.replicaof("NO", "ONE")  # type: ignore[arg-type]
            talker(one).permit()  # of a process that did not see that permit
            assert time.monotonic() - granted_at >= WINDOW / S


def test_rows_of_an_account_that_was_deleted_alone_do_not_count(server):
    one = talker(server)
    one.permit()
    one.ask()
    with server.client() as client:
        client.delete("gateway_queue_sync:{default}:ledger")
    other = talker(server)
    assert other.say(look=1).look.lines == ()
    assert one.ask().status == messages.INTRODUCE
    assert other.ask().waits[0].opens_us > WINDOW - 100_000


# --- out of reach ---------------------------------------------------------------------------------


def test_a_server_that_does_not_answer_is_unreachable_within_seconds(tmp_path):
    with started(tmp_path) as server:
        one = talker(server)
        server.send(signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(Unreachable):
            one.say()
        assert time.monotonic() - begin < 2.5
        server.send(signal.SIGCONT)
        assert one.again().status == messages.OK
        server.stop()
        with pytest.raises(Unreachable, match=str(server.port)):
            one.again()


def test_a_replica_is_asked_again_later(tmp_path):
    with started(tmp_path) as server, server.client() as client:
        one = talker(server)
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(Unreachable, match=r"(?i)read ?only"):
            one.say()
        client.replicaof("NO", "ONE")  # type: ignore[arg-type]
        assert one.again().status == messages.OK


def test_a_primary_without_its_replicas_grants_nothing(server):
    one = talker(server)
    with server.client() as client:
        client.config_set("min-replicas-to-write", 1)
        before = state(server)
        try:
            time.sleep(WINDOW / S)
            with pytest.raises(Unreachable, match="NOREPLICAS"):
                one.ask()
            assert state(server) == before
        finally:
            client.config_set("min-replicas-to-write", 0)


# --- forks, copies and what is shown --------------------------------------------------------------


def in_child(work) -> str:
    """Return what a forked child says, or that it did not come back."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(10)
            os.write(writer, work().encode())
        except BaseException as error:  # noqa: BLE001 - a child must not go on with the tests
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", ["url", "client", "single", "blocking", "cluster", "replicated"])
def test_a_child_has_a_client_of_its_own_whatever_locks_were_held(server, tmp_path, kind, request):
    if kind == "cluster":
        cluster = RedisCluster(tmp_path)
        request.addfinalizer(cluster.stop)
        client = cluster.client()
    elif kind == "url":
        client = server.url
    elif kind == "single":
        client = server.client(single_connection_client=True)
    elif kind == "blocking":
        pool = redis.BlockingConnectionPool(host="127.0.0.1", port=server.port)
        client = redis.Redis(connection_pool=pool)
    else:
        client = server.client(decode_responses=kind == "replicated")
    one = talker(client)
    given = one.backend._client
    held, go = threading.Event(), threading.Event()
    locks = [given.nodes_manager._lock] if kind == "cluster" else [given.connection_pool._lock]
    if kind == "single":
        locks.append(given.single_connection_lock)

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            go.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(5)

    def work() -> str:
        one.backend.begin_in_child()
        child = Talker(one.backend)
        child.introduce()
        one.backend.close()
        return f"{child.say().status}"

    try:
        assert in_child(work) == "0"
    finally:
        go.set()
        holder.join()
    assert one.say().status == messages.OK


def test_a_client_of_sentinel_can_be_made_again(server):
    sentinel = redis.sentinel.Sentinel(
        [("127.0.0.1", 1)], sentinel_kwargs={"password": SECRET}, min_other_sentinels=1
    )
    client = sentinel.master_for("mine", password="x", socket_timeout=0.5)
    again = maker(client)()
    pool = again.connection_pool
    assert (pool.service_name, pool.is_master) == ("mine", True)
    assert pool.connection_kwargs["password"] == "x"
    assert pool.connection_kwargs["socket_timeout"] == 0.5
    assert pool.sentinel_manager.min_other_sentinels == 1
    [watcher] = pool.sentinel_manager.sentinels
    assert watcher.connection_pool.connection_kwargs["port"] == 1
    assert watcher.connection_pool.connection_kwargs["password"] == SECRET
    assert watcher is not sentinel.sentinels[0]
    with pytest.raises(Unreachable):
        Talker(RedisBackend(client, "default", SYSTEM_CLOCK)).introduce()
    with pytest.raises(TypeError, match="master_for"):
        maker(sentinel.slave_for("mine"))


class OddPool(redis.ConnectionPool):
    pass


class OddConnection(redis.Connection):
    pass


@pytest.mark.parametrize("pool", [OddPool(), redis.ConnectionPool(connection_class=OddConnection)])
def test_a_client_that_a_child_could_not_make_is_rejected(pool):
    with pytest.raises(TypeError, match=r"forked child.*Odd"):
        RedisBackend(redis.Redis(connection_pool=pool), "default", SYSTEM_CLOCK)


def test_a_client_is_portable_and_a_repr_shows_no_secret(server):
    for given in (server.url, server.client(password=SECRET)):
        make, what = pickle.loads(pickle.dumps(portable(given)))
        again = make(*what)
        backend = RedisBackend(again, "mine", SYSTEM_CLOCK)
        assert repr(backend) == f"Redis server 127.0.0.1:{server.port}/0 (mine)"
