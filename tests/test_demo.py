"""The demo: real shards at a real gateway, and its display."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gateway_queue_sync
from gateway_queue_sync import demo
from gateway_queue_sync.cli import main
from gateway_queue_sync.demo import display, fleet, gateway
from gateway_queue_sync.demo.fleet import Result
from gateway_queue_sync.demo.summary import summary
from gateway_queue_sync.testing import FakeClock, Referee, Refusal

ROOT = Path(gateway_queue_sync.__file__).parents[1]
PATIENCE = 20.0  # s for what must come; nothing takes that long unless it is broken
SMALL = ["demo", "--shards", "8", "--interval", "0.05"]

# Far more than what a busy machine may do to 0.05 s.
SAFE = [*SMALL, "--margin", "0.15"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive(), thread


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Return what was printed since the last call; nothing may ever go to standard error."""

    def said() -> str:
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return said


# --- with the queue --------------------------------------------------------------------------------


def test_all_shards_start_by_the_rules(said: Said) -> None:
    assert main(SAFE) == 0
    text = said()
    assert "Starting 8 shards in 4 buckets, queued with a margin of 0.15 s." in text
    rows = re.findall(r"^ +\d+\.\d{3} +(\d+) +(\d+) +\d+\.\d{3}$", text, re.MULTILINE)
    assert sorted((int(shard), int(bucket)) for shard, bucket in rows) == [
        (shard, shard % 4) for shard in range(8)
    ]
    assert "All shards started, and no rule was broken." in text
    assert re.search(r"shards started +8 of 8", text)
    assert re.search(r"refused +0 of 8 IDENTIFYs", text)
    assert re.search(r"total time +0\.[23]\d+ s; the least possible is 0.050 s", text)
    assert "\x1b" not in text


def test_the_margin_is_a_twentieth_of_the_interval_unless_given(said: Said) -> None:
    assert main(["demo", "--shards", "1", "--interval", "5"]) == 0
    assert "queued with a margin of 0.25 s" in said()


def test_more_buckets_than_anybody_could_count(said: Said) -> None:
    assert main(["demo", "--shards", "3", "--max-concurrency", "1" + "0" * 12]) == 0
    assert "3 shards in 3 buckets" in said()


def test_a_refused_shard_reports_it_and_tries_again(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Referee.identify
    seen: set[int] = set()

    def refuse_each_once(referee: Referee, shard_id: int) -> bool:
        if shard_id in seen:
            return judge(referee, shard_id)
        seen.add(shard_id)
        referee.refusals.append(Refusal(shard_id, shard_id % 4, 0.01))
        return False

    monkeypatch.setattr(Referee, "identify", refuse_each_once)
    assert main(["demo", "--shards", "2", "--interval", "0.05"]) == 1
    text = said()
    assert text.count("refused before: 1") == 2
    assert "A rule was broken" in text


# --- without ---------------------------------------------------------------------------------------


def test_without_the_queue_a_rule_is_broken(said: Said) -> None:
    assert main(["demo", "--shards", "8", "--interval", "0.3", "--no-queue"]) == 1
    text = said()
    assert "8 shards in 4 buckets, not queued." in text
    assert "A rule was broken: IDENTIFYs came too fast" in text
    assert re.search(r"shards started +8 of 8", text)
    assert re.search(r"refused +[1-9]\d* of \d+ IDENTIFYs", text)


def test_without_the_queue_but_with_a_bucket_for_each_shard_all_is_well(said: Said) -> None:
    assert main(["demo", "--shards", "4", "--no-queue"]) == 0
    assert "All shards started" in said()


def test_going_past_the_limit_resets_the_token(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SESSION_STARTS", 6)
    assert main([*SMALL, "--no-queue"]) == 1
    text = said()
    assert "Discord resets the bot's token" in text
    assert "ConnectionError: the gateway closed the connection" in text


# --- bad options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--shards", "0", "must be at least 1, not 0"),
        ("--shards", "many", "invalid int value: 'many'"),
        ("--shards", "401", "must be at most 400, not 401"),
        ("--max-concurrency", "0", "must be at least 1, not 0"),
        ("--max-concurrency", "1.5", "invalid int value: '1.5'"),
        ("--interval", "0", "must be more than 0 s, not 0"),
        ("--interval", "-1", "must be more than 0 s, not -1"),
        ("--interval", "nan", "must be a number, not NaN"),
        ("--interval", "inf", "must be finite"),
        ("--interval", "soon", "invalid float value: 'soon'"),
        ("--margin", "-0.1", "must not be negative, not -0.1"),
    ],
)
def test_a_bad_option_exits_with_2_and_says_why(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["demo", option, value])
    assert end.value.code == 2
    printed = capsys.readouterr()
    message = printed.err.splitlines()[-1]
    assert option in message
    assert expected in message
    assert printed.out == ""


# --- a gateway that fails --------------------------------------------------------------------------


def handled_by(handle: Callable[[Any], object], said: Said, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what two shards make of a gateway that handles connections like this."""
    monkeypatch.setattr(gateway._Connection, "handle", handle)
    assert main(["demo", "--shards", "2"]) == 1
    text = said()
    assert "Not all shards started." in text
    assert re.search(r"shards started +0 of 2", text)
    return text


def test_a_gateway_that_hangs_up(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    text = handled_by(lambda connection: None, said, monkeypatch)
    assert "failed          2: ConnectionError: the gateway closed the connection" in text


def test_a_gateway_that_talks_nonsense(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    text = handled_by(lambda connection: connection.wfile.write(b"what?\n"), said, monkeypatch)
    assert "failed          2: JSONDecodeError" in text


def test_a_gateway_that_says_nothing_is_not_waited_for(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "PATIENCE", 0.1)
    text = handled_by(lambda connection: connection.rfile.read(), said, monkeypatch)
    assert "failed          2: TimeoutError: timed out" in text


def test_the_gateway_hangs_up_on_nonsense_and_says_nothing(said: Said) -> None:
    with (
        gateway.Gateway(Referee()) as nonsensed,
        socket.create_connection(nonsensed.address, timeout=PATIENCE) as client,
        client.makefile("rb") as lines,
    ):
        assert json.loads(lines.readline())["op"] == gateway.Op.HELLO
        client.sendall(b"GET / HTTP/1.1\r\n")
        assert lines.read() == b""
    assert said() == ""


# --- Ctrl-C and broken pipes -----------------------------------------------------------------------


def start(*options: str, **how: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "gateway_queue_sync", "demo", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), **how.pop("env", {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    )


def test_ctrl_c_ends_it_at_once() -> None:
    process = start("--interval", "1000")
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(rb" +\d+\.\d{3} +\d", line):  # the first shard has started
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, b"\ninterrupted\n")


INTERRUPTED_ANYWHERE = """
import io, sys
from gateway_queue_sync.cli import main
from gateway_queue_sync.demo import display
show, stdout = display.LineDisplay.show, sys.stdout

def strike(frame, event, _):
    global left
    left -= 1
    if left == 0:
        sys.settrace(None)
        raise KeyboardInterrupt
    return strike

def shown(*args):
    show(*args)
    sys.settrace(strike)
    frame = sys._getframe(1)
    frame.f_trace = strike

display.LineDisplay.show = shown
codes = []
for at in range(1, 60):
    left, sys.stdout = at, io.StringIO()
    options = ["--interval", "1000", "--shards", "2", "--max-concurrency", "1"]
    codes.append(main(["demo", *options]))
    sys.settrace(None)
print(codes, file=stdout)
"""


@pytest.mark.slow
def test_ctrl_c_at_any_point_of_its_wait_ends_it() -> None:
    """Such as right after a lock was taken that the shards need for their end."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_ANYWHERE],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert set(json.loads(done.stdout)) == {130}


@pytest.mark.parametrize("options", [[], ["--no-queue"]])
def test_ctrl_c_leaves_no_shard_behind(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(display: object, results: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(display.LineDisplay, "show", show)
    assert main(["demo", "--interval", "1000", *options]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert not [thread for thread in threading.enumerate() if "demo-shard" in thread.name]


def test_a_reader_that_goes_away_is_no_drama() -> None:
    process = start("--interval", "0.05")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (141, b"")


# --- on a terminal ---------------------------------------------------------------------------------


def on_terminal(*options: str, interrupt_at: bytes | None = None, **env: str) -> tuple[int, str]:
    """Run the demo on a terminal of its own; return its exit code and what it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = start(*options, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
        while piece := os.read(ours, 65_536):
            written += piece
            if interrupt_at and interrupt_at in written:
                process.send_signal(signal.SIGINT)
                interrupt_at = None
    os.close(ours)
    return process.wait(PATIENCE), written.decode()


class Terminal(io.StringIO):
    """Standard output that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows after all this, as far as the demo uses one."""
    rows, row, column = [""], 0, 0
    for count, code, character in re.findall(r"\x1b\[([0-9]*)([A-Z])|([^\x1b])", written):
        if character == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif character == "\r":
            column = 0
        elif character:
            rows[row] = rows[row][:column] + character + rows[row][column + 1 :]
            column += 1
        elif code == "F":
            row, column = row - int(count), 0
        elif code == "K":
            rows[row] = rows[row][:column]
        elif code == "J":
            rows[row:] = [rows[row][:column]]
    return rows


def test_a_terminal_shows_every_bucket_and_when_it_will_be_done() -> None:
    code, written = on_terminal("--shards", "8", "--interval", "0.2", "--margin", "0.2")
    assert code == 0
    assert re.search(r"bucket 0    #{10}\.{10}  1/2  done in 0\.\d s", written)
    assert re.search(r"all         #{10}\.{10}  4/8  done in 0\.\d s", written)
    shown = screen(written)
    assert shown[3:7] == [f"bucket {bucket}    {'#' * 20}  2/2" for bucket in range(4)]
    assert shown[7] == f"all         {'#' * 20}  8/8"
    assert shown[9] == "All shards started, and no rule was broken."


def test_buckets_that_do_not_fit_the_terminal_become_one_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("LINES", "13")
    monkeypatch.setenv("COLUMNS", "45")
    assert main(["demo", "--shards", "16", "--max-concurrency", "8"]) == 0
    assert "bucket 0" not in terminal.getvalue()
    assert f"all         {'#' * 10}{'.' * 10}  8/16  done\x1b[K\n" in terminal.getvalue()
    bars = [line for line in screen(terminal.getvalue()) if "#" in line]
    assert bars == [f"all         {'#' * 20}  16/16"]


def test_a_terminal_shows_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main([*SMALL, "--max-concurrency", "1", "--no-queue"]) == 1
    assert re.search(r"bucket 0    #{20}  8/8  refused: [1-9]", terminal.getvalue())


def test_a_dumb_terminal_gets_lines() -> None:
    code, written = on_terminal("--shards", "2", TERM="dumb")
    assert code == 0
    assert "waited (s)" in written
    assert "\x1b" not in written


def test_ctrl_c_on_a_terminal_leaves_the_picture() -> None:
    code, written = on_terminal("--interval", "1000", interrupt_at=b"4/16")
    assert code == 130
    shown = screen(written.replace("^C", ""))
    assert shown[7].startswith(f"all         #####{'.' * 15}  4/16  done in ")
    assert shown[-2:] == ["interrupted", ""]
    assert "Traceback" not in written


# --- what is said at the end -----------------------------------------------------------------------


def test_summary_of_a_run_by_the_rules() -> None:
    clock = FakeClock()
    referee = Referee(2, interval=0.5, clock=clock)
    referee.identify(0)
    referee.identify(1)
    clock.advance(0.526)
    referee.identify(2)
    results = [Result(0, 0.01), Result(1, 0.01), Result(2, 0.536)]
    assert summary(results, referee, 0.5) == (
        "\n"
        "All shards started, and no rule was broken.\n"
        "  shards started  3 of 3\n"
        "  refused         0 of 3 IDENTIFYs\n"
        "  shortest gap    0.526 s in a bucket; the rule is 0.5 s\n"
        "  total time      0.536 s; the least possible is 0.500 s"
    )


def test_summary_counts_the_reasons_of_failures() -> None:
    results = [Result(shard, 0.1, failure="it rained") for shard in range(2)]
    text = summary([*results, Result(2, 0.2)], Referee(3), 5)
    assert "Not all shards started." in text
    assert "shortest gap    - in a bucket" in text
    assert text.endswith("\n  failed          2: it rained")
