"""The demo: real shards at a real gateway, and what is shown of them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gateway_queue_sync
from gateway_queue_sync import SessionStartLimit, demo
from gateway_queue_sync.cli import main
from gateway_queue_sync.demo import Failed, Result, Settings, Started
from gateway_queue_sync.testing import Referee, Refusal

ROOT = Path(gateway_queue_sync.__file__).parents[1]
PATIENCE = 20.0  # s for what must come; nothing takes that long unless it is broken
SMALL = ["demo", "--shards", "8", "--max-concurrency", "4", "--interval", "0.05"]

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
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
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


def start(*options: str, **how: Any) -> subprocess.Popen[str]:
    """Start the demo as a user does, in another directory."""
    return subprocess.Popen(
        [sys.executable, "-m", "gateway_queue_sync", "demo", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    )


# --- with the queue --------------------------------------------------------------------------------


def test_all_shards_start_by_the_rules(said: Said) -> None:
    assert main(SAFE) == 0
    text = said()
    rows = re.findall(r"^ +\d+\.\d{3} +(\d+) +(\d+) +\d+\.\d{3}$", text, re.MULTILINE)
    assert sorted((int(shard), int(bucket)) for shard, bucket in rows) == [
        (shard, shard % 4) for shard in range(8)
    ]
    assert "All shards started, and no rule was broken." in text
    assert "shards started       8 of 8" in text
    assert "refused              0 of 8 IDENTIFYs" in text
    assert "session starts left  992 of 1000" in text
    assert "\x1b" not in text


def test_one_shard(said: Said) -> None:
    assert main(["demo", "--shards", "1"]) == 0
    text = said()
    assert "Starting 1 shard in 1 bucket, queued with a margin of 0.025 s." in text
    assert "none, no bucket had two" in text


def test_more_buckets_than_anybody_could_count(said: Said) -> None:
    assert main(["demo", "--shards", "3", "--max-concurrency", "1" + "0" * 12]) == 0
    assert "3 shards in 3 buckets" in said()


def test_as_a_subprocess_in_another_directory(tmp_path: Path) -> None:
    demo = start("--shards", "8", "--interval", "0.1", "--margin", "0.2", cwd=tmp_path)
    out, err = demo.communicate(timeout=PATIENCE)
    assert (demo.returncode, err) == (0, "")
    assert "All shards started" in out


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
    assert main([*SMALL[:2], "2", *SMALL[3:]]) == 1
    text = said()
    assert text.count("refused 1 time before") == 2
    assert "A rule was broken" in text
    assert "try a longer --interval" in text


# --- without ---------------------------------------------------------------------------------------


def test_without_the_queue_a_rule_is_broken(said: Said) -> None:
    assert main(["demo", "--shards", "8", "--interval", "0.3", "--no-queue"]) == 1
    text = said()
    assert "8 shards in 4 buckets, not queued." in text
    assert "A rule was broken" in text
    refused, identifies = map(int, re.search(r"(\d+) of (\d+) IDENTIFYs", text).groups())  # type: ignore[union-attr]
    assert refused > 0
    assert f"{1000 - identifies} of 1000, {refused} burnt by refusals" in text
    assert "run this again without --no-queue" in text


def test_without_the_queue_but_with_a_bucket_for_each_shard_all_is_well(said: Said) -> None:
    assert main(["demo", "--shards", "4", "--no-queue"]) == 0
    assert "All shards started" in said()


def test_shards_that_are_always_refused_give_up(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Referee, "identify", lambda referee, shard_id: False)
    monkeypatch.setattr(demo, "MOST_TRIES", 2)
    assert main([*SMALL, "--no-queue"]) == 1
    text = said()
    assert "Not all shards started." in text
    assert "8 shards: gave up after 2 refusals" in text


def test_going_past_the_limit_resets_the_token(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = SessionStartLimit(6, 6, 86_400, 4)
    monkeypatch.setattr(Settings, "limit", property(lambda settings: limit))
    assert main([*SMALL, "--no-queue"]) == 1
    text = said()
    assert "past 6 IDENTIFYs, Discord resets the bot's token" in text
    assert "0 of 6" in text
    assert "the gateway closed the connection" in text


# --- bad options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--shards", "0", "whole number of at least 1"),
        ("--shards", "-3", "whole number of at least 1"),
        ("--shards", "many", "whole number of at least 1"),
        ("--shards", "4097", "at most 4096"),
        ("--max-concurrency", "0", "whole number of at least 1"),
        ("--max-concurrency", "1.5", "whole number of at least 1"),
        ("--interval", "0", "finite number of seconds above 0"),
        ("--interval", "-1", "finite number of seconds above 0"),
        ("--interval", "nan", "finite number of seconds above 0"),
        ("--interval", "inf", "finite number of seconds above 0"),
        ("--interval", "soon", "finite number of seconds above 0"),
        ("--margin", "-0.1", "finite number of seconds from 0 on"),
        ("--margin", "inf", "finite number of seconds from 0 on"),
    ],
)
def test_a_bad_option_exits_with_2_and_names_the_value(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["demo", option, value])
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: must be" in message
    assert expected in message
    assert f"not '{value}'" in message


def test_the_margin_is_a_twentieth_of_the_interval_unless_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: list[Settings] = []

    def demonstrate(its: Settings) -> Result:
        settings.append(its)
        return result()

    monkeypatch.setattr(demo, "demonstrate", demonstrate)
    main(["demo", "--interval", "5"])
    main(["demo", "--interval", "5", "--margin", "0"])
    assert [its.margin for its in settings] == [0.25, 0.0]


# --- a gateway that fails --------------------------------------------------------------------------


def send(*lines: bytes) -> Callable[[Any], None]:
    """Return how a gateway handles connections that sends one line for each that it gets."""

    def handle(connection: Any) -> None:
        first, *others = lines
        connection.wfile.write(first)
        for line in others:
            connection.rfile.readline()
            connection.wfile.write(line)

    return handle


HELLO = demo.encode(demo.hello())


@pytest.mark.parametrize(
    ("handle", "why"),
    [
        (send(b""), "the gateway closed the connection"),
        (send(HELLO), "the gateway closed the connection"),
        (send(HELLO, b'{"op": 0'), "the gateway closed the connection"),
        (send(b"\xff what?\n"), r"the gateway sent b'\xff what?\n', which is no JSON object"),
        (send(b"[1]\n"), r"the gateway sent b'[1]\n', which is no JSON object"),
        (send(b'{"op": 9}\n'), "the gateway sent {'op': 9} instead of HELLO"),
        (send(HELLO, b"{}\n"), "the gateway answered IDENTIFY with {}"),
    ],
)
def test_shards_fail_at_a_gateway_that_fails(
    handle: Callable[[Any], None], why: str, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.GatewayConnection, "handle", handle)
    assert main([*SMALL[:2], "4", *SMALL[3:]]) == 1
    text = said()
    assert text.count(f"failed: {why}") == 4
    assert "Not all shards started." in text
    assert f"4 shards: {why}" in text


def test_a_gateway_that_says_nothing_is_not_waited_for(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo.GatewayConnection, "handle", lambda connection: connection.rfile.read()
    )
    monkeypatch.setattr(demo, "PATIENCE", 0.1)
    assert main(["demo", "--shards", "2"]) == 1
    assert "2 shards: no answer from the gateway within 0.1 s" in said()


def test_nobody_listens(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # but it does not listen
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr(demo.Gateway, "address", bound.getsockname())
        assert main(["demo", "--shards", "2"]) == 1
    assert "2 shards: Connection refused" in said()


def test_an_error_that_nobody_thought_of_is_told_and_not_waited_for(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "identify", lambda shard_id, shards: {"op": object()})
    assert main(["demo", "--shards", "2"]) == 1
    assert "2 shards: TypeError(" in said()


def test_a_machine_out_of_threads(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    class Thread(threading.Thread):
        def start(self) -> None:
            if self.name == "demo-shard-2":
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(threading, "Thread", Thread)
    assert main(["demo", "--shards", "4"]) == 1
    text = said()
    assert "shards started       2 of 4" in text
    assert "2 shards: can't start new thread" in text


def test_the_gateway_hangs_up_on_nonsense_and_says_nothing(said: Said) -> None:
    settings = Settings(1, 1, 1.0, 0.0)
    with (
        demo.Gateway(settings.make_referee()).serving() as gateway,
        socket.create_connection(gateway.address, timeout=PATIENCE) as client,
        client.makefile("rb") as lines,
    ):
        assert lines.readline() == HELLO
        client.sendall(b"GET / HTTP/1.1\r\n")
        assert lines.read() == b""
    assert said() == ""


# --- Ctrl-C and broken pipes -----------------------------------------------------------------------

INTERRUPTIBLE = """
import signal, sys
from gateway_queue_sync.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("options", [[], ["--no-queue"]])
def test_ctrl_c_ends_it_at_once(options: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "demo", "--interval", "1000", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r" +\d+\.\d{3} +\d", line):  # the first shard has started
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (130, "\ninterrupted\n")


@pytest.mark.parametrize("options", [[], ["--no-queue"]])
def test_ctrl_c_leaves_no_thread_behind(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(display: object, elapsed: float) -> None:
        if elapsed > 0.05:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo.LineDisplay, "draw", draw)
    assert main(["demo", "--interval", "1000", *options]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert not [thread for thread in threading.enumerate() if "demo-shard" in thread.name]


def test_a_reader_that_goes_away_is_no_drama() -> None:
    process = start("--interval", "0.05")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


# --- on a terminal ---------------------------------------------------------------------------------


def on_terminal(
    *options: str, lines: int = 24, columns: int = 80, interrupt_at: str = "never", **env: str
) -> tuple[int, str]:
    """Run the demo on a terminal of its own; return its exit code and what it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "demo", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **env},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
        while piece := os.read(ours, 65_536):
            written += piece
            if interrupt_at.encode() in written:
                process.send_signal(signal.SIGINT)
                interrupt_at = "never"
    os.close(ours)
    return process.wait(PATIENCE), written.decode()


class Terminal(io.TextIOWrapper):
    """Standard output that takes itself for a terminal, with a stroke of Ctrl-C in its third picture."""

    def __init__(self, encoding: str = "utf-8", *, interrupts: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self._pictures_until_interrupt = 3 if interrupts else -1

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._pictures_until_interrupt -= demo.HIDE_CURSOR in text
        if not self._pictures_until_interrupt:
            self._pictures_until_interrupt = -1
            raise KeyboardInterrupt
        return super().write(text)

    @property
    def written(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined,no-any-return]


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows after all this, as far as the demo uses one."""
    rows, row, column = [""], 0, 0
    for count, code, character in re.findall(r"\x1b\[([0-9;?]*)([A-Za-z])|([^\x1b])", written):
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


def restores_the_cursor(written: str) -> bool:
    return written.rfind(demo.SHOW_CURSOR) > written.rfind(demo.HIDE_CURSOR) > 0


def test_a_terminal_shows_every_bucket() -> None:
    code, written = on_terminal("--shards", "8", "--interval", "0.2", "--margin", "0.2")
    assert code == 0
    assert written.count(demo.HIDE_CURSOR) > 2
    assert restores_the_cursor(written)
    assert "done in 0." in written
    shown = screen(written)
    for bucket in range(4):
        assert shown[3 + bucket] == f"bucket  {bucket}  {'█' * 20}  2/2"
    assert re.fullmatch(r"8 of 8 started, \d\.\d s, 0 refused", shown[7])
    assert shown[9] == "All shards started, and no rule was broken."


@pytest.mark.parametrize(
    ("buckets", "lines", "columns"), [("17", 24, 80), ("8", 8, 80), ("8", 24, 50)]
)
def test_buckets_that_do_not_fit_the_terminal_become_one_bar(
    buckets: str, lines: int, columns: int, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("LINES", str(lines))
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["demo", "--shards", buckets, "--max-concurrency", buckets]) == 0
    bars = [line for line in screen(terminal.written) if "█" in line]
    assert len(bars) == 1
    assert bars[0].startswith("█" * 20 + f"  {buckets} of {buckets} started")
    assert len(bars[0]) < columns


def test_a_terminal_shows_what_is_refused_and_what_failed(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal("ascii"))
    monkeypatch.setattr(demo, "MOST_TRIES", 1)
    two_in_one_bucket = ["--shards", "2", "--max-concurrency", "1", "--interval", "1000"]
    assert main(["demo", *two_in_one_bucket, "--no-queue"]) == 1
    shown = screen(terminal.written)
    assert shown[3] == "bucket  0  ##########..........  1/2  1 refused"
    assert re.fullmatch(r"1 of 2 started, \d\.\d s, 1 refused, 1 failed", shown[4])


def test_no_color_draws_without_colour(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", coloured := Terminal())
    main(["demo", "--shards", "2"])
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", plain := Terminal())
    main(["demo", "--shards", "2"])
    assert "\x1b[32m" in coloured.written
    assert "\x1b[32m" not in plain.written
    assert demo.HIDE_CURSOR in plain.written


def test_a_dumb_terminal_gets_lines() -> None:
    code, written = on_terminal("--shards", "2", TERM="dumb")
    assert code == 0
    assert "\x1b" not in written


def test_ctrl_c_on_a_terminal_restores_the_cursor() -> None:
    code, written = on_terminal("--interval", "1000", interrupt_at="started")
    assert code == 130
    assert restores_the_cursor(written)
    assert screen(written)[-3:] == ["", "interrupted", ""]
    assert "Traceback" not in written


def test_ctrl_c_within_a_picture_restores_the_cursor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal(interrupts=True))
    assert main(["demo", "--interval", "1000"]) == 130
    assert terminal.written.endswith(demo.SHOW_CURSOR)
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize(
    ("stream", "environ", "platform", "speaks"),
    [
        (None, {"TERM": "xterm"}, "linux", False),
        (io.StringIO(), {"TERM": "xterm"}, "linux", False),
        (Terminal(), {"TERM": "xterm"}, "linux", True),
        (Terminal(), {"TERM": "dumb"}, "linux", False),
        (Terminal(), {}, "linux", False),
        (Terminal(), {}, "win32", False),
        (Terminal(), {"WT_SESSION": "1"}, "win32", True),
    ],
)
def test_what_can_be_drawn_on(
    stream: Any, environ: dict[str, str], platform: str, speaks: bool
) -> None:
    assert demo.speaks_ansi(stream, environ, platform) is speaks


# --- what is said at the end -----------------------------------------------------------------------

SETTINGS = Settings(shards=3, max_concurrency=2, interval=0.5, margin=0.025)
STARTED = [Started(shard, shard % 2, 0.1, 0.1, 0) for shard in range(3)]


def result(**changes: Any) -> Result:
    fine = Result(
        settings=SETTINGS,
        outcomes=STARTED,
        identifies=3,
        refused=0,
        shortest_gap=0.526,
        took=0.55,
        least_time=0.5,
    )
    return replace(fine, **changes)


def test_summary_of_a_run_by_the_rules() -> None:
    assert demo.summary(result()) == (
        "\n"
        "All shards started, and no rule was broken.\n"
        "  shards started       3 of 3\n"
        "  refused              0 of 3 IDENTIFYs\n"
        "  shortest gap         0.526 s in a bucket (the rule: at least 0.5 s)\n"
        "  total time           0.550 s, 1.100 times the least possible (0.500 s)\n"
        "  session starts left  997 of 1000"
    )


def test_summary_without_the_queue() -> None:
    settings = replace(SETTINGS, with_queue=False)
    text = demo.summary(result(settings=settings, identifies=5, refused=2, shortest_gap=0.001))
    assert "A rule was broken: IDENTIFYs came too fast, and got Invalid Session." in text
    assert "  refused              2 of 5 IDENTIFYs\n" in text
    assert "  session starts left  995 of 1000, 2 burnt by refusals\n" in text
    assert text.endswith("run this again without --no-queue.")


def test_summary_of_a_run_in_which_shards_failed() -> None:
    outcomes = [STARTED[0], Failed(1, 1, "it rained"), Failed(2, 0, "it rained")]
    text = demo.summary(result(outcomes=outcomes, shortest_gap=None))
    assert "Not all shards started." in text
    assert "  shortest gap         none, no bucket had two (the rule: at least 0.5 s)\n" in text
    assert "  total time           0.550 s\n" in text
    assert text.endswith("\n  2 shards: it rained")


def test_a_run_is_fine_if_all_started_and_nothing_was_refused() -> None:
    assert result().fine
    assert not result(refused=1).fine
    assert not result(outcomes=STARTED[:2]).fine


def test_a_large_bot_has_5_session_starts_for_each_shard() -> None:
    assert Settings(200, 16, 0.5, 0.025).limit.total == 1000
    assert Settings(201, 16, 0.5, 0.025).limit.total == 1005


# --- open files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "raised_to"), [(100, [300]), (300, []), (-1, [])], ids=["less", "enough", "no limit"]
)
def test_the_limit_of_open_files_is_raised_where_it_must_be(
    soft: int, raised_to: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, 4000))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit[0]))
    demo.make_room(300)
    assert limits == raised_to


def test_a_limit_of_open_files_that_may_not_be_raised_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(which: int, limit: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 100))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    demo.make_room(300)


def test_a_system_without_such_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    demo.make_room(300)
