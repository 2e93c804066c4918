"""The ``limit`` command, on accounts in use: in a file, on a server, at a broker."""

from __future__ import annotations

import builtins
import contextlib
import itertools
import logging
import sqlite3
import threading
import time
from types import SimpleNamespace

import pytest
import redis_servers
from redis_servers import free_port, until
from test_from_token import BOT, TOKEN, discord, token_of

from gateway_queue_sync import (
    GatewayBotError,
    HttpQueue,
    LedgerError,
    RedisQueue,
    SessionStartLimit,
    SqliteQueue,
    cli,
    limit_command,
    limit_reader,
    serve,
)
from gateway_queue_sync.gateway_bot import GatewayBot

__all__ = ["discord"]  # a fixture

LIMIT = SessionStartLimit(1000, 30, 7250.0, 4)
SHORT = {"interval": 0.05, "margin": 0.05, "reserve": 30}
_names = itertools.count()


class Account:
    """An shared, and how the command line names it."""

    def __init__(self, queue, *options):
        self.queue = queue
        self.options = options

    def limit(self, *options):
        return cli.main(["limit", *self.options, *options])


@pytest.fixture(params=["sqlite", "redis", "http"])
def shared(request, tmp_path):
    file = str(tmp_path / "q.sqlite3")
    if request.param == "sqlite":
        yield Account(
            lambda *given, **settings: SqliteQueue(file, *given, **settings), "--sqlite", file
        )
    elif request.param == "redis":
        if redis_servers.BINARY is None:
            pytest.skip(redis_servers.WITHOUT)
        url, name = request.getfixturevalue("redis_server").url, f"limit-{next(_names)}"
        yield Account(
            lambda *given, **settings: RedisQueue(url, *given, name=name, **settings),
            *("--redis", url, "--name", name),
        )
    else:
        secret = tmp_path / "secret"
        secret.write_text("hunter2\n")
        secret.chmod(0o600)
        with (
            SqliteQueue(file, LIMIT, **SHORT | {"reserve": 0}) as own,
            serve(own, port=0, secret="hunter2") as broker,
        ):
            yield Account(
                lambda *given, **settings: HttpQueue(
                    broker.url, *given, secret="hunter2", **settings
                ),
                *("--url", broker.url, "--secret-file", str(secret)),
            )


@pytest.fixture
def answers(monkeypatch):
    """What is typed when it asks."""
    typed = []
    monkeypatch.setattr(builtins, "input", lambda _: typed.pop(0))
    return typed


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    return file


def test_it_shows_what_is_left(shared, capsys):
    with shared.queue(LIMIT, **SHORT) as queue:
        queue.snapshot()
        assert shared.limit() == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("left     30 of 1000, resets in 2 h 0 min")
    assert printed[2:] == ["buckets  4", "granted  0"]
    assert "hunter2" not in "".join(printed)


def test_what_is_set_counts_at_once_for_those_who_wait(shared, answers, capsys):
    with shared.queue(LIMIT, **SHORT) as queue:
        future = queue.enqueue(0)
        answers.append("y")
        assert shared.limit("--set", "500") == 0
        assert future.result(20).remaining == 499
        assert queue.snapshot().limit.remaining == 499
    printed = capsys.readouterr().out
    assert "will set what is left to 500 of 1000, resets in 2 h 0 min" in printed
    assert "done: 500 of 1000" in printed


def test_fewer_may_be_set_too_and_settings_and_buckets_stay(shared):
    with shared.queue(LIMIT, **SHORT | {"reserve": 0}) as queue:
        before = queue.snapshot()
        assert shared.limit("--set", "1", "--yes") == 0
        assert queue.acquire(3, timeout=20).remaining == 0
        assert len(queue.snapshot().buckets) == len(before.buckets) == 4
        assert queue.snapshot().buckets[3].ready_in < 0.2  # the interval is the one of the queue


def test_an_account_whose_period_has_not_begun_gets_a_day_until_the_reset(tmp_path, capsys):
    file = str(tmp_path / "q")
    with SqliteQueue(file, SessionStartLimit(1000, 1000, 0.0, 1)) as queue:
        assert cli.main(["limit", "--sqlite", file, "--set", "400", "--yes"]) == 0
        assert queue.snapshot().limit.remaining == 400
    assert "resets in 24 h 0 min" in capsys.readouterr().out


@pytest.mark.parametrize("typed", ["n", "", "nonsense"])
def test_it_changes_nothing_unless_that_is_confirmed(shared, answers, capsys, typed):
    answers.append(typed)
    with shared.queue(LIMIT, **SHORT) as queue:
        assert shared.limit("--set", "500") == 1
        assert queue.snapshot().limit.remaining == 30
    assert "nothing was changed" in capsys.readouterr().err


def test_a_script_without_input_changes_nothing(shared, monkeypatch, capsys):
    def end(_):
        raise EOFError

    monkeypatch.setattr(builtins, "input", end)
    with shared.queue(LIMIT, **SHORT) as queue:
        assert shared.limit("--forget") == 1
        assert queue.snapshot().limit.remaining == 30
    assert "--yes" in capsys.readouterr().err


def test_what_discord_says_is_taken(shared, discord, token_file, capsys):
    """More than counts here, and another reset, of which a queue by itself would not be sure."""
    with shared.queue(LIMIT, **SHORT | {"reserve": 0}) as queue:
        queue.acquire(0, timeout=20)  # so recent that Discord may not have seen it
        read = ("--read", "--token-file", str(token_file), "--base-url", discord.url)
        assert shared.limit(*read, "--yes") == 0
        seen = queue.snapshot()
        assert seen.limit.remaining == 899
        assert seen.limit.resets_in == pytest.approx(3650, abs=50)
        assert len(seen.buckets) == 16
        assert queue.acquire(5, timeout=20).remaining == 898
    printed = capsys.readouterr()
    assert "will take what Discord says: 900 of 1000, resets in 1 h 0 min" in printed.out
    assert "secret-part" not in printed.out + printed.err


def test_what_discord_said_is_old_if_it_is_confirmed_late(
    tmp_path, discord, token_file, monkeypatch, capsys
):
    """Others may have started sessions since, and more of them than the ledger remembers."""
    file, clock = str(tmp_path / "q"), limit_command.SYSTEM_CLOCK
    SqliteQueue(file, LIMIT).close()
    later = SimpleNamespace(now_us=clock.now_us)

    def confirm_late(_):
        later.now_us = lambda: clock.now_us() + 31_000_000
        return "y"

    monkeypatch.setattr(limit_command, "SYSTEM_CLOCK", later)
    monkeypatch.setattr(builtins, "input", confirm_late)
    read = ("--read", "--token-file", str(token_file), "--base-url", discord.url)
    assert cli.main(["limit", "--sqlite", file, *read]) == 1
    printed = capsys.readouterr()
    assert "nothing was changed" in printed.err
    assert "done" not in printed.out


def test_what_discord_said_is_not_old_because_the_read_took_long(
    tmp_path, discord, token_file, monkeypatch
):
    file, clock = str(tmp_path / "q"), limit_command.SYSTEM_CLOCK
    SqliteQueue(file, LIMIT).close()
    later = SimpleNamespace(now_us=clock.now_us)
    read_limit = GatewayBot.session_start_limit

    def read_slowly(bot):
        later.now_us = lambda: clock.now_us() + 31_000_000
        return read_limit(bot)

    monkeypatch.setattr(limit_command, "SYSTEM_CLOCK", later)
    monkeypatch.setattr(GatewayBot, "session_start_limit", read_slowly)
    read = ("--read", "--token-file", str(token_file), "--base-url", discord.url, "--yes")
    assert cli.main(["limit", "--sqlite", file, *read]) == 0


def test_a_reset_comes_no_later_if_a_change_is_confirmed_late(tmp_path, monkeypatch):
    file = str(tmp_path / "q")

    def confirm_late(_):
        time.sleep(1)
        return "y"

    monkeypatch.setattr(builtins, "input", confirm_late)
    with SqliteQueue(file, LIMIT) as queue:
        before = time.monotonic() + queue.snapshot().limit.resets_in
        assert cli.main(["limit", "--sqlite", file, "--set", "5"]) == 0
        after = time.monotonic() + queue.snapshot().limit.resets_in
    assert after == pytest.approx(before, abs=0.5)


def test_the_token_of_another_bot_is_refused(tmp_path, discord, token_file, capsys):
    file = str(tmp_path / "q")
    SqliteQueue.from_token(token_of("222"), file, base_url=discord.url).close()
    discord.times.clear()
    read = ("--read", "--token-file", str(token_file), "--base-url", discord.url)
    assert cli.main(["limit", "--sqlite", file, *read, "--yes"]) == 1
    said = capsys.readouterr().err
    assert f"belongs to bot 222, not {BOT}" in said
    assert said.count("\n") == 1


def test_a_limit_that_is_forgotten_is_read_anew_by_a_process_that_can(shared):
    limits = [SessionStartLimit(1000, 700, 3600.0, 4)]
    with shared.queue(refresh=lambda: limits[0], **SHORT) as queue:
        until(lambda: (seen := queue.snapshot().limit) and seen.remaining in (30, 700), "a read")
        limits[0] = SessionStartLimit(2000, 1500, 3600.0, 4)
        assert shared.limit("--forget", "--yes") == 0
        assert queue.acquire(0, timeout=20).remaining == 1499


def test_a_limit_that_is_forgotten_is_discords_default_if_nobody_can_read(shared, capsys):
    with shared.queue(LIMIT, **SHORT) as queue:
        assert shared.limit("--forget", "--yes") == 0
        assert queue.acquire(0, timeout=20).remaining == 999
    assert "done: 1000 of 1000, not begun" in capsys.readouterr().out


def test_another_bot_may_use_what_was_forgotten(tmp_path, discord):
    file = tmp_path / "q"
    SqliteQueue.from_token(token_of("222"), file, base_url=discord.url).close()
    with pytest.raises(LedgerError, match="belongs to bot 222"):
        SqliteQueue.from_token(TOKEN, file, base_url=discord.url)
    assert cli.main(["limit", "--sqlite", str(file), "--forget", "--yes"]) == 0
    discord.times.clear()
    SqliteQueue.from_token(TOKEN, file, base_url=discord.url).close()


def test_a_limit_that_is_not_known_is_shown_so_and_cannot_be_set(tmp_path, capsys, monkeypatch):
    def refuse():
        raise GatewayBotError("not now")

    monkeypatch.setattr(limit_reader, "log", logging.getLogger("gateway_queue_sync.elsewhere"))
    with SqliteQueue(tmp_path / "q", refresh=refuse):
        assert cli.main(["limit", "--sqlite", str(tmp_path / "q")]) == 0
        assert "not known yet" in capsys.readouterr().out
        assert cli.main(["limit", "--sqlite", str(tmp_path / "q"), "--set", "5", "--yes"]) == 1
    assert "use --read" in capsys.readouterr().err


# --- what goes wrong ------------------------------------------------------------------------------


def test_no_file_is_made(tmp_path, capsys):
    for change in ([], ["--set", "5", "--yes"], ["--forget", "--yes"]):
        assert cli.main(["limit", "--sqlite", str(tmp_path / "none"), *change]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_showing_leaves_no_trace(tmp_path):
    file = tmp_path / "q"
    SqliteQueue(file, LIMIT).close()
    before = file.read_bytes()
    assert cli.main(["limit", "--sqlite", str(file)]) == 0
    assert file.read_bytes() == before


def test_an_account_that_is_not_there_is_not_made(shared, capsys):
    if "--url" in shared.options:
        pytest.skip("a broker has one account")
    shared.queue(LIMIT, **SHORT).close()
    assert cli.main(["limit", *shared.options[:2], "--name", "other", "--set", "5", "--yes"]) == 1
    assert "holds no account of that name" in capsys.readouterr().err


def test_a_broker_that_is_away_or_refuses_is_an_error_of_one_line(tmp_path, capsys):
    assert cli.main(["limit", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    wrong = tmp_path / "wrong"
    wrong.write_text("hunter3")
    with (
        SqliteQueue(tmp_path / "q") as own,
        serve(own, port=0, secret="hunter2") as broker,
    ):
        assert cli.main(["limit", "--url", broker.url, "--secret-file", str(wrong)]) == 1
    said = capsys.readouterr().err
    assert "401" in said
    assert "hunter" not in said


def test_a_busy_file_is_asked_again(tmp_path, capsys):
    file = tmp_path / "q"
    SqliteQueue(file, LIMIT).close()
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    with contextlib.closing(connection) as held:
        held.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.3, held.execute, ["ROLLBACK"])
        timer.start()
        assert cli.main(["limit", "--sqlite", str(file), "--set", "5", "--yes"]) == 0
        timer.join()
    assert "done: 5 of 1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--sqlite", "a", "--url", "http://localhost"],
        ["--sqlite", "a", "--set", "x"],
        ["--sqlite", "a", "--set", "-1"],
        ["--sqlite", "a", "--set", "1", "--forget"],
        ["--sqlite", "a", "--read"],
        ["--sqlite", "a", "--token-file", "x"],
        ["--sqlite", "a", "--secret-file", "x"],
        ["--redis", "redis://:hunter2@localhost/0"],
        ["--url", "http://user:hunter2@localhost"],
        ["--url", "http://localhost", "--name", "other"],
        ["--sqlite", ""],
    ],
)
def test_options_that_make_no_sense_are_refused(options, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["limit", *options])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "hunter2" not in said


def test_more_than_there_are_in_all_is_refused(tmp_path, capsys):
    SqliteQueue(tmp_path / "q", LIMIT).close()
    with pytest.raises(SystemExit) as end:
        cli.main(["limit", "--sqlite", str(tmp_path / "q"), "--set", "1001", "--yes"])
    assert end.value.code == 2
    assert "at most 1000" in capsys.readouterr().err
