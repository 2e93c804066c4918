"""The command line: its options, its commands, and how it ends."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gateway_queue_sync
from gateway_queue_sync import cli

ROOT = Path(gateway_queue_sync.__file__).parents[1]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command ``try``, whose result is set on what is returned."""

    stand_in = SimpleNamespace(func=None)

    def add_parser(subparsers: Any) -> None:
        subparsers.add_parser("try").set_defaults(func=stand_in.func)

    stand_in.add_parser = add_parser
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, stand_in))
    return stand_in


def raising(error: BaseException) -> Any:
    def func(arguments: argparse.Namespace) -> int:
        raise error

    return func


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([option])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"gateway_queue_sync {gateway_queue_sync.__version__}\n"


def test_no_command_exits_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("usage: python -m gateway_queue_sync ")
    assert "the following arguments are required: command" in printed.err
    assert printed.out == ""


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "plan", "serve", "status", "limit", "recipe"])
def test_help_begins_with_a_capital_and_keeps_those_of_names(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    actions = cli.make_parser()._actions
    (action,) = [one for one in actions if isinstance(one, argparse._SubParsersAction)]
    (what,) = [one.help for one in action._get_subactions() if one.dest == command]
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"\n{what[0].upper()}{what[1:]}" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("arguments", [["plan", "--shards", "4"], ["recipe"], ["--help"], ["-V"]])
def test_a_full_disk_is_said_in_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [sys.executable, "-m", "gateway_queue_sync", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr == "cannot write the output: No space left on device\n"


def test_other_errors_of_the_system_are_not_hidden(command: Any) -> None:
    command.func = raising(OSError(5, "a mistake"))
    with pytest.raises(OSError, match="a mistake"):
        cli.main(["try"])


def test_an_unknown_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["dance"])
    assert end.value.code == 2
    assert "'dance'" in capsys.readouterr().err


def test_without_arguments_it_reads_those_of_the_command_line(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.func = lambda arguments: 7
    monkeypatch.setattr(sys, "argv", ["__main__.py", "try"])
    assert cli.main() == 7


def test_ctrl_c_returns_130(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command.func = raising(KeyboardInterrupt())
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_an_interrupt_hidden_by_the_error_that_it_led_to_returns_130(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """``Event.wait`` raises that if Ctrl-C comes just after it released its lock (CPython #118433)."""

    def func(arguments: argparse.Namespace) -> int:
        try:
            raise KeyboardInterrupt
        finally:
            threading.Lock().release()

    command.func = func
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
    command.func = raising(RuntimeError("a mistake"))
    with pytest.raises(RuntimeError, match="a mistake"):
        cli.main(["try"])


def test_a_broken_pipe_is_quiet_and_stays_quiet(
    command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        command.func = lambda arguments: print("nobody reads this", flush=True)
        assert cli.main(["try"]) == 141
        stdout.flush()  # what is left in the buffer goes nowhere now
    assert capsys.readouterr().err == ""


def test_it_runs_as_a_module_from_anywhere(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "gateway_queue_sync", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("usage: python -m gateway_queue_sync ")


def test_a_command_that_waits_for_discord_says_so_after_a_second(tmp_path: Path) -> None:
    """As it says all that the library warns of, although the library itself prints nothing."""
    token = tmp_path / "token"
    token.write_text("a.b.c")
    token.chmod(0o604)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = ["plan", "--shards", "4", "--token-file", str(token), "--base-url", url]
        run = subprocess.Popen(
            [sys.executable, "-m", "gateway_queue_sync", *options],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert run.stderr is not None
            assert f"WARNING --token-file {str(token)!r} can be read" in run.stderr.readline()
            assert "WARNING waiting for 127.0.0.1:" in run.stderr.readline()
        finally:
            run.kill()
            run.communicate()
