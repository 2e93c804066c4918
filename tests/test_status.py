"""The ``status`` command: a shared account as a table and as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis_servers
from accounts import backend_of, wait_for_workers

from gateway_queue_sync import (
    BucketSnapshot,
    LargeBotQueue,
    LimitSnapshot,
    QueueSnapshot,
    RedisQueue,
    SessionStartLimit,
    SqliteQueue,
    WaitingShard,
    cli,
    limit_reader,
    serve,
    status,
)

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
LIMIT = SessionStartLimit(1000, 930, 7200.0, 4)


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "q.sqlite3")


def lines(seen):
    return list(status.describe(seen, "Some ledger", NOON))


def test_it_tells_what_is_left_and_who_waits():
    shards = (WaitingShard(16, 75.0, 3.2), WaitingShard(32, 7.0, 8_000.0))
    seen = QueueSnapshot(
        waiting=2,
        granted=3,
        buckets=(
            BucketSnapshot(0, 3.2, shards),
            BucketSnapshot(1, 0.0, ()),
            BucketSnapshot(2, 1.0, ()),
            BucketSnapshot(3, 0.0, ()),
            BucketSnapshot(4, 0.0, ()),
        ),
        limit=LimitSnapshot(1000, 927, 50_000.0),
    )
    assert lines(seen) == [
        "Some ledger, 2026-11-24 12:00:00 UTC",
        "",
        "left today  927 of 1000, resets in 13 h 53 min (2026-11-25 01:53:20)",
        "granted     3",
        "waiting     2, in 1 of 5 buckets",
        "",
        "bucket     opens  shard       waits     since  due",
        "     0  in 3.2 s     16  1 min 15 s  11:58:45  in 3.2 s (12:00:03)",
        "                     32       7.0 s  11:59:53  in 2 h 13 min (14:13:20)",
        "     2  in 1.0 s   none",
        "empty, and open: bucket 1, 3-4",
    ]


def test_without_anybody_who_waits_and_any_closed_bucket_there_is_no_table():
    seen = QueueSnapshot(0, 0, (BucketSnapshot(0, 0.0, ()),), LimitSnapshot(9, 9, 0.0))
    assert lines(seen)[-3:] == ["waiting     0, in 0 of 1 bucket", "", "empty, and open: bucket 0"]


def test_of_a_long_line_the_first_are_shown_and_the_others_counted():
    shards = tuple(WaitingShard(n, 1.0, float(n)) for n in range(40))
    seen = QueueSnapshot(40, 0, (BucketSnapshot(0, 0.0, shards),), LimitSnapshot(9, 9, 0.0))
    assert "left today  9 of 9, not begun" in lines(seen)
    assert lines(seen)[-1].endswith("  the last in 39.0 s (12:00:39)")
    assert "35 more" in lines(seen)[-1]
    assert len(lines(seen)) == 13


def test_what_is_never_due_or_in_a_thousand_years_is_shown_too():
    shards = (WaitingShard(1, 1.0, None), WaitingShard(2, 1.0, 1e12))
    seen = QueueSnapshot(2, 0, (BucketSnapshot(0, 0.0, shards),), None)
    assert lines(seen)[-2].endswith("  when the limit is known")
    assert lines(seen)[-1].endswith("  in 11574074 d 1 h")
    assert "left today  not known yet" in lines(seen)
    seen = replace(seen, limit=LimitSnapshot(9, 9, 0.0))
    assert lines(seen)[-2].endswith("  never: the reserve is the whole limit")


@pytest.mark.parametrize("make", [SqliteQueue, lambda _, **given: LargeBotQueue(None, **given)])
def test_nobody_is_due_while_the_limit_is_not_known(file, make, monkeypatch):
    monkeypatch.setattr(limit_reader, "log", logging.getLogger("gateway_queue_sync.elsewhere"))

    def refuse():
        raise OSError("not now")

    with make(file, refresh=refuse) as queue:
        queue.enqueue(5)
        seen = queue.snapshot()
    assert seen.limit is None
    assert seen.buckets[0].shards[0].eta is None


def test_a_file_is_shown_with_those_who_wait_in_it(file, capsys):
    with SqliteQueue(file, LIMIT) as queue:
        queue.enqueue(5)
        queue.enqueue(9)
        queue.snapshot()
        assert cli.main(["status", "--sqlite", file]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"SQLite file {file!r}, ")
        assert "left today  930 of 1000, resets in 2 h 0 min" in printed
        assert re.search(r"^ +1 +in [\d.]+ s +5 ", printed, re.MULTILINE)
        assert "waiting     2, in 1 of 4 buckets" in printed


def test_those_whom_the_ledger_only_counts_are_counted(file, capsys):
    with SqliteQueue(file, LIMIT) as queue:
        for shard_id in range(0, 40, 4):
            queue.enqueue(shard_id)
        queue.snapshot()
        assert cli.main(["status", "--sqlite", file]) == 0
    printed = capsys.readouterr().out
    assert "waiting     10, in 1 of 4 buckets" in printed
    assert "\nand 8 more: " in printed


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_it_tells_of_turns_with_the_reserve_and_the_period_of_who_waits(
    file, request, capsys, kind
):
    limit = SessionStartLimit(100, 10, 3600.0, 1)
    settings = {"reserve": 10, "period": 7200.0, "name": "reserved"}
    if kind == "sqlite":
        queue, where = SqliteQueue(file, limit, **settings), file
    else:
        if redis_servers.BINARY is None:
            pytest.skip(redis_servers.WITHOUT)
        where = request.getfixturevalue("redis_server").url
        queue = RedisQueue(where, limit, **settings)
    with queue:
        queue.enqueue(5)
        seen = queue.snapshot()
        assert cli.main(["status", "--json", f"--{kind}", where, "--name", "reserved"]) == 0
        shown = json.loads(capsys.readouterr().out)
    (shard,) = shown["buckets"][0]["shards"]
    assert shard["eta"] == pytest.approx(seen.buckets[0].shards[0].eta, abs=10)
    assert shard["eta"] > 3000


def test_programs_get_the_fields_of_the_snapshot(file, capsys):
    with SqliteQueue(file, LIMIT) as queue:
        queue.enqueue(5)
        seen = queue.snapshot()  # by then the file knows who waits
        assert cli.main(["status", "--json", "--sqlite", file]) == 0
        shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == {"waiting", "granted", "buckets", "limit"}
    assert shown["buckets"][1]["shards"][0]["shard_id"] == 5
    assert shown["limit"]["remaining"] == seen.limit.remaining


@redis_servers.needs_redis
def test_a_server_is_shown_and_its_password_is_not(tmp_path, capsys):
    server = redis_servers.RedisServer(tmp_path)
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    try:
        server.client().config_set("requirepass", "hunter2")
        right.write_text(f"redis://:hunter2@127.0.0.1:{server.port}/0\n")
        wrong.write_text(f"redis://:hunter3@127.0.0.1:{server.port}/0\n")
        with RedisQueue(right.read_text().strip(), LIMIT, name="mine") as queue:
            queue.enqueue(5)
            assert cli.main(["status", "--redis-file", str(right), "--name", "mine"]) == 0
        assert cli.main(["status", "--redis-file", str(wrong)]) == 1
        assert cli.main(["status", "--redis-file", str(tmp_path / "none")]) == 1
    finally:
        server.stop()
    printed = capsys.readouterr()
    assert printed.out.startswith(f"Redis server 127.0.0.1:{server.port}/0 (mine), ")
    assert "waiting     1, in 1 of 4 buckets" in printed.out
    assert "hunter" not in printed.out + printed.err


def test_a_broker_is_shown_and_its_secret_is_not(file, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    with SqliteQueue(file, LIMIT) as queue, serve(queue, port=0, secret="hunter2") as broker:
        queue.enqueue(5)
        queue.snapshot()
        url = ("--url", broker.url)
        assert cli.main(["status", *url, "--secret-file", str(secret)]) == 0
        assert cli.main(["status", *url]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"broker {broker.url}, ")
    assert "waiting     1, in 1 of 4 buckets" in printed.out
    assert "401" in printed.err
    assert "hunter2" not in printed.out + printed.err


@pytest.mark.parametrize("command", ["status", "serve"])
@pytest.mark.parametrize("url", ["redis://:hunter2@localhost/0", "redis://x/?password=hunter2"])
def test_no_password_is_taken_from_the_command_line(monkeypatch, capsys, command, url):
    """Every user of the machine can read it there."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--redis", url])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "--redis-file" in printed
    assert "hunter2" not in printed


def test_looking_leaves_no_trace(file):
    SqliteQueue(file, LIMIT).close()
    with open(file, "rb") as kept:  # noqa: PTH123
        before = kept.read()
    assert cli.main(["status", "--sqlite", file]) == 0
    with open(file, "rb") as kept:  # noqa: PTH123
        assert kept.read() == before


def test_looking_changes_neither_the_mode_nor_an_empty_file(file, tmp_path):
    SqliteQueue(file, LIMIT).close()
    Path(file).chmod(0o640)
    empty = tmp_path / "empty"
    empty.touch()
    before = {path.name: path.stat() for path in tmp_path.iterdir()}
    assert cli.main(["status", "--sqlite", file]) == 0
    assert cli.main(["status", "--sqlite", str(empty)]) == 1
    after = {path.name: path.stat() for path in tmp_path.iterdir()}
    assert {name: (s.st_mode, s.st_size, s.st_mtime_ns) for name, s in before.items()} == {
        name: (s.st_mode, s.st_size, s.st_mtime_ns) for name, s in after.items()
    }


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else"
)
def test_root_may_look_at_anybodys_file(file):
    SqliteQueue(file, LIMIT).close()
    os.chown(file, 65534, 65534)
    assert cli.main(["status", "--sqlite", file]) == 0


def test_a_file_that_is_not_there_is_not_made(tmp_path, capsys):
    file = tmp_path / "nothing.sqlite3"
    assert cli.main(["status", "--sqlite", str(file)]) == 1
    assert not file.exists()
    assert "No such file" in capsys.readouterr().err


def test_an_account_that_is_not_there_is_said_to_be_none(file, capsys):
    SqliteQueue(file).close()
    assert cli.main(["status", "--sqlite", file, "--name", "other"]) == 1
    assert "(other) holds no account of that name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--sqlite", "a", "--redis", "b"],
        ["--redis", "http://localhost"],
        ["--sqlite", ""],
        ["--sqlite", "x", "--name", "no good"],
        ["--sqlite", "x", "--watch", "0"],
        ["--sqlite", "x", "--watch", "nan"],
    ],
)
def test_options_that_make_no_sense_are_refused(options, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["status", *options])
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_watching_shows_it_again_and_survives_what_goes_wrong(file):
    queue = SqliteQueue(file, LIMIT)
    watch = subprocess.Popen(
        [
            *(sys.executable, "-m", "gateway_queue_sync", "status"),
            *("--json", "--watch", "0.05", "--sqlite", file),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert json.loads(watch.stdout.readline())["waiting"] == 0
        future = queue.enqueue(1)
        while json.loads(watch.stdout.readline())["waiting"] != 1:
            pass
        future.cancel()
        queue.close()
        wait_for_workers()
        with contextlib.suppress(FileNotFoundError):
            backend_of(queue)._path.unlink()
        while "No such file" not in watch.stderr.readline():
            pass
        SqliteQueue(file, LIMIT).close()
        assert json.loads(watch.stdout.readline())
    finally:
        watch.terminate()
        watch.communicate()
