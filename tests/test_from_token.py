"""Queues made from a bot's token, in many processes, or with Discord or a ledger out of reach."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from redis_servers import RedisServer, free_port, needs_redis, until

from gateway_queue_sync import (
    AcquireTimeout,
    GatewayBotError,
    HttpQueue,
    LargeBotQueue,
    LedgerError,
    RedisQueue,
    SqliteQueue,
    gateway_bot,
    limit_reader,
    serve,
)
from gateway_queue_sync.ledgers.shared import inquiry

BOT = "123456789012345678"
LIMIT = {"total": 1000, "remaining": 900, "reset_after": 3_650_000, "max_concurrency": 16}
SHORT = {"interval": 0.05, "margin": 0.05}
_names = itertools.count()


def token_of(bot: str) -> str:
    return base64.urlsafe_b64encode(bot.encode()).decode().rstrip("=") + ".Abcdef.secret-part"


TOKEN = token_of(BOT)


class Discord(ThreadingHTTPServer):
    """Answers the first request, and 429 to all that come within 5 s of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.limit = dict(LIMIT)
        self.times: list[float] = []
        self.refused = 0
        self.status = 200
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def status_now(self) -> int:
        now = time.monotonic()
        if self.status == 200 and self.times and now - self.times[-1] < 5:
            self.refused += 1
            return 429
        self.times.append(now)
        return self.status


class _Request(BaseHTTPRequestHandler):
    def do_GET(self):
        status = self.server.status_now()
        self.server.may_answer.wait(20)
        body = json.dumps({"session_start_limit": self.server.limit}).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "5")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def discord(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Discord() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


new_account = pytest.mark.parametrize("make", ["sqlite", "redis"], indirect=True)
"""A broker's account is there already: it has Discord's default until somebody reads."""


@pytest.fixture(params=["sqlite", "redis", "http"])
def make(request, tmp_path):
    """Make a queue of a token, on the account of a kind."""
    if request.param == "sqlite":
        yield lambda token=TOKEN, **settings: SqliteQueue.from_token(
            token, tmp_path / "q", **SHORT | settings
        )
    elif request.param == "redis":
        if not (url := find_redis(request)):
            pytest.skip("no redis-server here")
        name = f"from-token-{next(_names)}"
        yield lambda token=TOKEN, **settings: RedisQueue.from_token(
            token, url, name=name, **SHORT | settings
        )
    else:
        with (
            SqliteQueue(tmp_path / "q", **SHORT) as queue,
            serve(queue, port=0) as broker,
        ):
            yield lambda token=TOKEN, **settings: HttpQueue.from_token(
                token, broker.url, **SHORT | settings
            )


def find_redis(request):
    if needs_redis.args[0]:
        return None
    return request.getfixturevalue("redis_server").url


def at_once(count, call):
    """Return what a call returns or raises, in so many threads at once."""
    barrier, results = threading.Barrier(count), []

    def run():
        barrier.wait()
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- many at once ---------------------------------------------------------------------------------


def test_fault_15_of_sixteen_at_once_one_reads_for_all(make, discord):
    queues = at_once(16, lambda: make(base_url=discord.url))
    try:
        assert not [one for one in queues if isinstance(one, Exception)]
        assert {one.snapshot().limit.remaining for one in queues} == {900}
        assert {len(one.snapshot().buckets) for one in queues} == {16}
        assert (len(discord.times), discord.refused) == (1, 0)
        assert queues[0].acquire(3, timeout=10).remaining == 899
    finally:
        for one in queues:
            one.close()


def test_fault_15_an_account_that_was_just_read_needs_no_read(make, discord):
    make(base_url=discord.url).close()
    with make(base_url=discord.url) as queue:
        assert queue.snapshot().limit.remaining == 900
    assert len(discord.times) == 1
    assert discord.refused == 0


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_fault_15_processes_of_a_fleet_read_once(kind, request, discord, tmp_path):
    if kind == "sqlite":
        policy, where = "SqliteQueue", str(tmp_path / "q")
    elif not (where := find_redis(request)):
        pytest.skip("no redis-server here")
    else:
        policy = "RedisQueue"
    code = (
        "import sys\n"
        f"from gateway_queue_sync import {policy}\n"
        f"queue = {policy}.from_token({TOKEN!r}, sys.argv[1], base_url=sys.argv[2], name='fleet')\n"
        "print(queue.snapshot().limit.remaining)\n"
    )
    command = [sys.executable, "-c", code, where, discord.url]
    fleet = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    results = [process.communicate(timeout=60) for process in fleet]
    assert results == [("900\n", "")] * 6
    assert (len(discord.times), discord.refused) == (1, 0)


# --- something is away ----------------------------------------------------------------------------


@new_account
def test_a_queue_that_cannot_read_its_first_limit_waits_in_acquire(
    make, discord, caplog, monkeypatch
):
    monkeypatch.setattr(limit_reader, "FIRST_PAUSE_US", 200_000)
    discord.status = 500
    with make(base_url=discord.url) as queue:
        assert queue.snapshot().limit is None
        with pytest.raises(AcquireTimeout) as late:
            queue.acquire(0, timeout=0.3)
        assert late.value.eta is None
        (warning,) = [text for text in caplog.messages if "could not read" in text][:1]
        assert "no permit is granted until it is read" in warning
        discord.status = 200
        discord.times.clear()
        assert queue.acquire(0, timeout=10).remaining == 899


@pytest.mark.slow
def test_a_queue_in_memory_waits_for_its_first_limit_too(discord, caplog, monkeypatch):
    monkeypatch.setattr(limit_reader, "FIRST_PAUSE_US", 200_000)
    discord.status = 500
    with LargeBotQueue.from_token(TOKEN, base_url=discord.url, **SHORT) as queue:
        with pytest.raises(AcquireTimeout) as late:
            queue.acquire(0, timeout=0)
        assert late.value.eta is None
        discord.status = 200
        discord.times.clear()
        assert queue.acquire(0, timeout=10).remaining == 899
    assert "no permit is granted until it is read" in caplog.text


def test_where_the_ledger_knows_the_limit_discord_may_be_away(make, discord):
    make(base_url=discord.url).close()
    nowhere = f"http://127.0.0.1:{free_port()}"
    with make(base_url=nowhere, when_unreachable="raise") as queue:
        assert queue.acquire(0, timeout=10).remaining == 899


@new_account
def test_a_setting_makes_it_fail_at_once(make, discord):
    discord.status = 500
    with pytest.raises(GatewayBotError, match="answered 500"):
        make(base_url=discord.url, when_unreachable="raise")


@new_account
def test_a_total_that_is_no_more_than_the_reserve_always_fails(make, discord):
    with pytest.raises(ValueError, match="must be more than the reserve"):
        make(base_url=discord.url, reserve=1000)


def test_a_wrong_token_always_fails(make, discord):
    discord.status = 401
    with pytest.raises(GatewayBotError, match="the token is wrong"):
        make(base_url=discord.url)


def test_a_silent_discord_is_waited_for_no_longer_than_a_limit_is_worth(make, discord, caplog):
    make(base_url=discord.url).close()
    with contextlib.ExitStack() as opened:
        silent = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        since = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with make(base_url=url) as queue:
            assert time.monotonic() - since < 3
            assert queue.acquire(0, timeout=10).remaining == 899


def test_a_first_read_that_takes_long_is_logged_and_not_waited_for(
    tmp_path, discord, caplog, monkeypatch
):
    monkeypatch.setattr(limit_reader, "PATIENCE_US", 600_000)
    monkeypatch.setattr(limit_reader, "WARN_AFTER", 0.05)
    monkeypatch.setattr(gateway_bot, "WARN_AFTER", 0.05)
    discord.may_answer.clear()
    queue = SqliteQueue.from_token(TOKEN, tmp_path / "q", base_url=discord.url, **SHORT)
    with (
        queue,
        SqliteQueue.from_token(TOKEN, tmp_path / "q", base_url=discord.url, **SHORT) as other,
    ):
        assert queue.snapshot().limit is None
        assert "to send the session start limit" in caplog.text
        assert "waiting for the session start limit, which another process reads" in caplog.text
        discord.may_answer.set()
        assert other.acquire(0, timeout=10).remaining == 899


@pytest.mark.parametrize("kind", ["redis", "http"])
def test_a_ledger_that_is_away_is_waited_for_in_acquire(kind, discord, caplog):
    pytest.importorskip("redis")
    port = free_port()

    def made(**settings):
        if kind == "redis":
            where = f"redis://127.0.0.1:{port}/0"
            return RedisQueue.from_token(TOKEN, where, base_url=discord.url, **settings)
        return HttpQueue.from_token(
            TOKEN, f"http://127.0.0.1:{port}", base_url=discord.url, **settings
        )

    since = time.monotonic()
    with made() as queue:
        assert time.monotonic() - since < 3
        assert "no permit is granted until it can be asked" in caplog.text
        with pytest.raises(LedgerError):
            queue.acquire(0, timeout=0.1)
    with pytest.raises(LedgerError):
        made(when_unreachable="raise")
    assert not discord.times


@needs_redis
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system stops no processes")
def test_a_server_that_is_stopped_is_logged_after_a_second(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(inquiry, "WARN_AFTER", 0.2)
    server = RedisServer(tmp_path)
    try:
        server.send(signal.SIGSTOP)
        since = time.monotonic()
        with RedisQueue(server.url, **SHORT):
            assert time.monotonic() - since < 3
        assert f"waiting for Redis server 127.0.0.1:{server.port}/0" in caplog.text
    finally:
        server.stop()


def test_a_file_that_another_process_holds_is_logged_after_a_second(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(inquiry, "WARN_AFTER", 0.2)
    monkeypatch.setattr(inquiry, "MAX_OPEN_US", 500_000)
    SqliteQueue(tmp_path / "q", **SHORT).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "q", isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError):
            SqliteQueue(tmp_path / "q", when_unreachable="raise", **SHORT)
        with SqliteQueue(tmp_path / "q", **SHORT) as queue:
            assert "waiting for SQLite file" in caplog.text
            held.execute("ROLLBACK")
            assert queue.acquire(0, timeout=10)


# --- two bots -------------------------------------------------------------------------------------


def test_fault_16_another_bot_on_the_account_is_refused(make, discord):
    with make(base_url=discord.url):
        with pytest.raises(LedgerError, match=f"belongs to bot {BOT}, not 222") as refused:
            make(token_of("222"), base_url=discord.url)
        assert "secret" not in repr(refused.value)
    make(base_url=discord.url).close()
    assert len(discord.times) == 1


def test_fault_16_a_broker_refuses_the_token_of_another_bot(tmp_path, discord):
    SqliteQueue.from_token(TOKEN, tmp_path / "q", base_url=discord.url).close()
    environment = {**os.environ, "DISCORD_TOKEN": token_of("222")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gateway_queue_sync", "serve", "--port", "0"),
            *("--state", str(tmp_path / "q"), "--base-url", discord.url),
        ],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"belongs to bot {BOT}, not 222" in done.stderr
    assert "secret-part" not in done.stderr


# --- other programs -------------------------------------------------------------------------------


def test_fault_17_starts_of_other_programs_are_noticed(tmp_path, discord):
    queue = SqliteQueue.from_token(
        TOKEN, tmp_path / "q", base_url=discord.url, reread_after=0.2, reserve=10, **SHORT
    )
    with queue:
        queue.acquire(0, timeout=10)
        discord.limit["remaining"] = 12  # 888 starts by others
        discord.times.clear()
        time.sleep(0.3)
        queue.acquire(1, timeout=10)
        until(lambda: queue.snapshot().limit.remaining <= 12, "what is left")


def test_fault_17_a_higher_remaining_that_does_not_count_is_logged(tmp_path, discord, caplog):
    caplog.set_level(logging.WARNING)
    with SqliteQueue.from_token(
        TOKEN, tmp_path / "q", base_url=discord.url, reread_after=0.2, **SHORT
    ) as queue:
        discord.times.clear()
        discord.limit |= {"remaining": 950, "reset_after": 1_800_000}
        time.sleep(0.3)
        queue.acquire(0, timeout=10)
        until(lambda: "949 session starts are left" in caplog.text, "the log")
        assert "limit --set" in caplog.text
