"""The ``serve`` command as a process of its own: settings, signals, kills, and real clients."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from pathlib import Path

import pytest
import requests
from recipes import block
from redis_servers import RedisServer, free_port, needs_redis, until
from test_broker import JSON, REQUEST
from test_gateway_bot import TOKEN, answer
from test_gateway_bot import serving as discord
from wire_clients import Client, clients_of, timed

from gateway_queue_sync import HttpQueue, RedisQueue, SqliteQueue
from gateway_queue_sync.cli import main
from gateway_queue_sync.serve_command import STATE_FILE

PATIENCE = 20.0  # s
SHORT = ("--interval", "0.2", "--margin", "0.05")
BODY = {"message": "You're free to connect now! :)"}
OURS = "Gateway-Queue: 1"


class Served:
    """A broker in a process of its own, up and past its first window."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway_queue_sync", "serve", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.log: deque[str] = deque()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        until(
            lambda: self.process.poll() is not None or "serving at" in self.text,
            "its start",
            PATIENCE,
        )
        found = re.search(r"serving at http://\S+:(\d+)", self.text)
        if not found:
            self.close()
            pytest.fail(self.text)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    @property
    def text(self) -> str:
        return "".join(self.log.copy())

    def status(self) -> dict:
        with urllib.request.urlopen(self.url + "/status.json") as response:
            return json.load(response)

    def wait_for_line(self, waiting: int) -> None:
        until(lambda: self.status()["waiting"] == waiting, f"{waiting} who wait")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def serving(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*arguments, **settings):
            if not {"--state", "--redis"} & set(arguments):
                arguments += ("--state", str(tmp_path / "state"))
            if "--port" not in arguments and "PORT" not in settings.get("environment", {}):
                arguments += ("--port", "0")
            return stack.enter_context(contextlib.closing(Served(*arguments, **settings)))

        yield start


# --- the clients people use -----------------------------------------------------------------------


def ask_by_curl(url):
    done = subprocess.run(
        ["curl", "-sS", url + "/?shard=1"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def ask_by_node(url):
    script = f"fetch({url!r} + '/?shard=1').then(r => r.text()).then(console.log)"
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def ask_by_http_client(url):
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/?shard=1")
    with contextlib.closing(connection):
        return json.load(connection.getresponse())


def ask_by_urllib(url):
    with urllib.request.urlopen(url + "/?shard=1") as response:
        return json.load(response)


def ask_by_requests(url):
    return requests.get(url, params={"shard": 1}, timeout=PATIENCE).json()


ASKS = [ask_by_http_client, ask_by_urllib, ask_by_requests]
for _program, _ask in (("curl", ask_by_curl), ("node", ask_by_node)):
    _missing = pytest.mark.skipif(
        shutil.which(_program) is None, reason=f"there is no {_program} here"
    )
    ASKS.append(pytest.param(_ask, marks=_missing))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with contextlib.closing(
        Served("--state", str(tmp_path_factory.mktemp("serve") / "s"), "--port", "0", *SHORT)
    ) as served:
        yield served


@pytest.mark.parametrize("ask", ASKS)
def test_clients_are_held_until_their_turn_and_then_granted(shared, ask):
    since = time.monotonic()
    assert ask_by_urllib(shared.url) == BODY
    assert ask(shared.url) == BODY
    assert time.monotonic() - since > 0.2


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here")
def test_the_recipe_for_node_waits_until_it_may(shared):
    recipe = block("js", "waitToIdentify").replace("http://127.0.0.1:8787", shared.url)
    script = (
        recipe + "waitToIdentify(1).then(() => waitToIdentify(2)).then(() => console.log('ok'))"
    )
    since = time.monotonic()
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"
    assert time.monotonic() - since > 0.2


# --- settings -------------------------------------------------------------------------------------


def test_flags_win_over_the_environment_and_each_has_a_line(serving):
    port = str(free_port())
    served = serving(
        "--max-concurrency", "4", *SHORT,
        environment={"CONCURRENCY": "8", "PORT": port, "HOST": "127.0.0.1"},
    )  # fmt: skip
    assert len(served.status()["buckets"]) == 4
    assert served.port == int(port)
    assert "max_concurrency is 4 (--max-concurrency)" in served.text
    assert f"port is {port} (the environment's PORT)" in served.text
    assert "host is 127.0.0.1 (the environment's HOST)" in served.text
    assert "1000 of 1000 session starts are left, in 4 buckets" in served.text


def test_each_setting_has_a_line_that_says_where_it_is_from(serving, tmp_path):
    (tmp_path / "secret").write_text("hunter2\n")
    secret = str(tmp_path / "secret")
    served = serving("--secret-file", secret, "--interval", "0.2", "--reserve", "5")
    for line in (
        "interval is 0.2 (--interval)",
        "margin is 0.25 (the default)",
        "reserve is 5 (--reserve)",
        "host is 127.0.0.1 (the default)",
        f"state is {tmp_path / 'state'} (--state)",
        f"the secret is read from {secret} (--secret-file)",
    ):
        assert line in served.text
    assert "hunter2" not in served.text


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system has other limits")
def test_more_connections_than_there_may_be_files_are_told_of(serving):
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    served = serving("--max-connections", str(most), *SHORT)
    assert f"{most - 64} connections at most, not {most}" in served.text
    assert resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)[0] == most
    fewer = serving("--max-connections", "10", *SHORT)
    assert "connections at most" not in fewer.text


def test_fewer_connections_than_by_default_are_no_warning(serving):
    served = serving(*SHORT)
    lines = [line for line in served.text.splitlines() if "connections at most" in line]
    assert all("INFO" in line for line in lines)


def test_a_secret_file_that_all_may_read_is_warned_about(serving, tmp_path):
    (tmp_path / "secret").write_text("hunter2\n")
    (tmp_path / "secret").chmod(0o644)
    served = serving("--secret-file", str(tmp_path / "secret"), *SHORT)
    assert re.search(r"WARNING .*secret' can be read by every user", served.text)
    (tmp_path / "secret").chmod(0o640)
    served = serving("--secret-file", str(tmp_path / "secret"), *SHORT)
    assert "can be read" not in served.text


@needs_redis
@pytest.mark.parametrize("where", ["file", "environment"])
def test_a_redis_url_with_a_password_shows_nowhere(serving, tmp_path, where):
    server = RedisServer(tmp_path)
    with _stopping(server):
        server.client().config_set("requirepass", "hunter2")
        url, environment = f"redis://:hunter2@127.0.0.1:{server.port}/0", {}
        (tmp_path / "url").write_text(url + "\n")
        (tmp_path / "url").chmod(0o600)
        if where == "environment":
            environment["REDIS_URL"] = url
        arguments = ("--redis-file", str(tmp_path / "url")) if where == "file" else ()
        process = contextlib.closing(
            Served(*arguments, "--port", "0", *SHORT, environment=environment)
        )
        with process as served:
            assert ask_by_urllib(served.url) == BODY
            command = Path(f"/proc/{served.process.pid}/cmdline")
            assert not command.exists() or b"hunter2" not in command.read_bytes()
            assert "hunter2" not in served.text
            assert "the state is in a Redis server" in served.text


def test_a_missing_secret_file_says_that_it_is_the_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    missing = str(tmp_path / "none")
    assert main(["serve", "--state", str(tmp_path / "s"), "--secret-file", missing]) == 1
    assert f"--secret-file '{missing}': No such file" in capsys.readouterr().err


def test_the_environment_wins_over_what_is_stored_and_a_restart_forgets_nothing(serving):
    first = serving(*SHORT, environment={"CONCURRENCY": "2"})
    assert ask_by_urllib(first.url) == BODY
    assert first.end() == 0
    second = serving(*SHORT)
    assert len(second.status()["buckets"]) == 2
    assert second.status()["limit"]["remaining"] == 999
    assert "(as stored, or Discord's default)" in second.text
    assert second.end() == 0
    third = serving(*SHORT, environment={"CONCURRENCY": "3"})
    assert len(third.status()["buckets"]) == 3
    assert third.status()["limit"]["remaining"] == 999


def test_the_limit_is_read_from_discord_and_again_at_each_reset(serving):
    with discord() as api:
        soon = {"total": 1000, "remaining": 1, "reset_after": 600, "max_concurrency": 16}
        api.answers += [
            answer({"session_start_limit": soon}),
            answer({"session_start_limit": {**soon, "remaining": 700, "reset_after": 10**8}}),
        ]
        served = serving("--base-url", api.url, *SHORT, environment={"DISCORD_TOKEN": TOKEN})
        assert len(served.status()["buckets"]) == 16
        for _ in range(3):
            assert ask_by_urllib(served.url) == BODY
        until(lambda: served.status()["limit"]["remaining"] in (697, 698), "the limit as read")
        assert TOKEN not in served.text


def test_the_token_may_be_in_a_file(serving, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with discord() as api:
        limit = {"total": 1000, "remaining": 700, "reset_after": 10**7, "max_concurrency": 2}
        api.answers.append(answer({"session_start_limit": limit}))
        file = str(tmp_path / "token")
        served = serving("--base-url", api.url, "--token-file", file, *SHORT)
        assert served.status()["limit"]["remaining"] == 700
    assert f"the token is read from {file} (--token-file)" in served.text
    assert TOKEN not in served.text


def test_without_discord_a_restart_goes_by_the_stored_limit(serving, tmp_path):
    limit = {"total": 1000, "remaining": 700, "reset_after": 10**7, "max_concurrency": 2}
    nowhere = f"http://127.0.0.1:{free_port()}"
    with discord() as api:
        api.answers.append(answer({"session_start_limit": limit}))
        first = serving("--base-url", api.url, *SHORT, environment={"DISCORD_TOKEN": TOKEN})
        assert ask_by_urllib(first.url) == BODY
        assert first.end() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "state", isolation_level=None)) as state:
        state.execute("UPDATE account SET read_us = read_us - 61000000")
    again = serving("--base-url", nowhere, *SHORT, environment={"DISCORD_TOKEN": TOKEN})
    assert again.status()["limit"]["remaining"] == 699
    assert len(again.status()["buckets"]) == 2
    assert re.search("WARNING .*could not read .* the last known total counts", again.text)
    assert TOKEN not in again.text


def test_without_discord_a_first_start_lets_clients_wait(serving):
    """It is asked again, and all go on."""
    port = free_port()
    environment = {"DISCORD_TOKEN": TOKEN}
    served = serving("--base-url", f"http://127.0.0.1:{port}", *SHORT, environment=environment)
    assert "all clients wait" in served.text
    assert "no permit is granted until it is read" in served.text
    assert served.status()["limit"] is None
    assert TOKEN not in served.text
    with pytest.raises(TimeoutError), urllib.request.urlopen(served.url + "/?shard=1", timeout=0.5):
        pass


def test_a_wrong_token_or_address_says_so_and_ends(serving, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with discord() as api:
        api.answers.append(answer({"message": "401: Unauthorized"}, 401))
        monkeypatch.setenv("DISCORD_TOKEN", TOKEN)
        state = ["--state", str(tmp_path / "s")]
        assert main(["serve", *state, "--base-url", api.url]) == 1
        printed = capsys.readouterr().err
        assert "token" in printed
        assert TOKEN not in printed
    monkeypatch.delenv("DISCORD_TOKEN")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", *state, "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--port", "x"], "port must be a whole number"), (["--port", "70000"], "at most 65535"),
     (["--port", "99999"], "at most 65535"), (["--host", "0.0.0.0"], "needs a secret"),
     (["--max-concurrency", "0"], "at least 1"),
     (["--max-concurrency", "100001"], "at most 100000"),
     (["--interval", "-1"], "interval"), (["--margin", "0"], "margin"), (["--reserve", "-1"], "reserve"),
     (["--reserve", "1000"], "reserve"), (["--redis", "nonsense"], "URL"), (["--name", "a b"], "name"),
     (["--max-connections", "0"], "max_connections"), (["--secret-file", "EMPTY"], "is empty")],
)  # fmt: skip
def test_bad_settings_end_with_2_and_the_usage_alone(
    tmp_path, monkeypatch, capsys, caplog, arguments, says
):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "EMPTY").write_text("\n")
    arguments = [str(tmp_path / one) if one == "EMPTY" else one for one in arguments]
    state = [] if "--redis" in arguments else ["--state", str(tmp_path / "s")]
    with pytest.raises(SystemExit) as end:
        main(["serve", *state, *arguments])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: ")
    assert says in printed
    assert not caplog.records
    assert not (tmp_path / "s").exists()


def test_bad_settings_make_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "made"))
    with pytest.raises(SystemExit):
        main(["serve", "--port", "99999"])
    assert not (tmp_path / "made").exists()


def test_each_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--max-connections N clients that may be connected at one time" in text


def test_the_secret_is_read_from_a_file_and_never_shown(serving, tmp_path):
    (tmp_path / "secret").write_text("hunter2\n")
    served = serving("--secret-file", str(tmp_path / "secret"), "--host", "0.0.0.0", *SHORT)
    with clients_of(served.port) as client:
        assert client("/?shard=0", "GET", OURS).read()[0] == 401
        assert client("/?shard=0", "GET", "Authorization: Bearer hunter2").granted
    with HttpQueue(served.url, secret="hunter2", interval=0.2, margin=0.05) as queue:
        assert queue.snapshot().limit.remaining == 999
    assert served.end() == 0
    assert "hunter2" not in served.text


@pytest.mark.parametrize(
    ("environment", "folder"),
    [({"STATE_DIRECTORY": "{0}/systemd"}, "systemd"),
     ({"XDG_STATE_HOME": "{0}/xdg"}, "xdg/gateway-queue-sync"),
     ({"HOME": "{0}/home", "XDG_STATE_HOME": ""}, "home/.local/state/gateway-queue-sync")],
)  # fmt: skip
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="their folders are others")
def test_the_state_is_in_the_platforms_folder_and_nobody_elses_to_read(
    tmp_path, environment, folder
):
    (tmp_path / "systemd").mkdir(0o700)
    given = {name: value.format(tmp_path) for name, value in environment.items()}
    with contextlib.closing(Served("--port", "0", *SHORT, environment=given)):
        kept = tmp_path / folder
        assert (kept / STATE_FILE).is_file()
        assert stat.S_IMODE(kept.stat().st_mode) == 0o700
        assert stat.S_IMODE((kept / STATE_FILE).stat().st_mode) == 0o600


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_the_systemd_unit_is_hardened(tmp_path):
    unit = tmp_path / "gateway-queue.service"
    unit.write_text(block("ini", "ExecStart"))
    command = ["systemd-analyze", "security", "--offline=true", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    exposure = re.search(r"Overall exposure level.*: ([0-9.]+)", done.stdout)
    if exposure is None:
        pytest.skip(f"this systemd rates no files: {done.stderr}")
    assert float(exposure[1]) < 2.0
    assert "DynamicUser=yes" in unit.read_text()


# --- signals, kills, and several brokers ----------------------------------------------------------


@pytest.mark.parametrize(("number", "many"), [(signal.SIGTERM, 2_000), (signal.SIGINT, 50)])
def test_a_signal_ends_it_soon_whoever_waits(serving, number, many):
    served = serving("--interval", "60", "--margin", "0.05")
    with clients_of(served.port) as client:
        waiting = [client(f"/?shard={shard}") for shard in range(many)]
        served.wait_for_line(many)
        assert served.end(number) == 0  # after 5 s it would end with another status
        assert all(one.is_closed_without_a_byte() for one in waiting)


def test_its_end_is_logged(serving):
    served = serving(*SHORT)
    served.end()
    assert "stopped" in served.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_not_lost_while_the_process_is_stopped(serving, tmp_path, number):
    for attempt in range(4):
        served = serving("--state", str(tmp_path / f"s{attempt}"), *SHORT)
        time.sleep(0.2)  # all its threads wait
        served.process.send_signal(signal.SIGSTOP)
        served.process.send_signal(number)
        served.process.send_signal(signal.SIGCONT)
        assert served.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_ledger_that_another_process_holds_does_not_keep_it_from_ending(
    serving, tmp_path, signals
):
    served = serving("--interval", "60", "--margin", "0.05")
    with clients_of(served.port) as client:
        for shard in range(20):
            client(f"/?shard={shard}")
        served.wait_for_line(20)
        with contextlib.closing(sqlite3.connect(tmp_path / "state")) as held:
            held.execute("BEGIN EXCLUSIVE")
            for _ in range(signals):
                served.process.send_signal(signal.SIGTERM)
            code = served.process.wait(PATIENCE)
    assert code in ((1,) if signals == 1 else (1, 128 + signal.SIGTERM))
    if signals == 1:
        served.reader.join(PATIENCE)
        assert "the ledger does not answer" in served.text


@needs_redis
@pytest.mark.parametrize("answers", [True, False])
def test_an_end_waits_for_the_ledgers_reply_and_its_status_says_if_there_was_one(
    serving, tmp_path, answers
):
    server = RedisServer(tmp_path)
    with _stopping(server):
        served = serving("--redis", f"{server.url}?socket_timeout=30", "--interval", "60")
        with clients_of(served.port) as client:
            client("/?shard=0")
            served.wait_for_line(1)
            server.send(signal.SIGSTOP)  # the request that the client has left stays under way
            served.process.send_signal(signal.SIGTERM)
            if answers:
                until(lambda: "stopping" in served.text, "the beginning of its end")
                server.send(signal.SIGCONT)
            assert served.process.wait(PATIENCE) == (0 if answers else 1)
        server.send(signal.SIGCONT)
        served.reader.join(PATIENCE)
        assert ("the ledger does not answer" in served.text) is not answers
        if answers:
            with RedisQueue(server.url, interval=60.0) as queue:
                assert queue.snapshot().waiting == 0


@needs_redis
def test_an_end_does_not_wait_for_a_request_of_another_process(serving, tmp_path):
    server = RedisServer(tmp_path)
    with _stopping(server):
        served = serving("--redis", f"{server.url}?socket_timeout=30", *SHORT)
        with clients_of(served.port) as client:
            server.send(signal.SIGSTOP)
            body = json.dumps(REQUEST)
            other = client("/ledger", "POST", JSON, f"Content-Length: {len(body)}").send(body)
            assert client("/status").read()[0] == 200  # the earlier request is under way, too
            assert served.end() == 0
            assert other.is_closed_without_a_byte()


def test_an_end_that_is_held_up_is_over_after_5_s_with_status_1(tmp_path):
    """Here nobody reads its log any more, so the next line blocks."""
    log = tmp_path / "log"
    os.mkfifo(log)
    command = [sys.executable, "-m", "gateway_queue_sync", "serve", "--port", "0", *SHORT]
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(os.fdopen(os.open(log, os.O_RDONLY | os.O_NONBLOCK)))
        with log.open("w") as stderr:
            process = subprocess.Popen([*command, "--state", str(tmp_path / "s")], stderr=stderr)
        stack.callback(process.wait)
        stack.callback(process.kill)
        os.set_blocking(reader.fileno(), True)
        assert any("serving at" in line for line in reader)
        more = os.open(log, os.O_WRONLY | os.O_NONBLOCK)
        stack.callback(os.close, more)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(more, b"x")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 1


@pytest.mark.slow
@needs_redis
def test_a_server_that_hangs_stops_grants_and_nothing_else(serving, tmp_path):
    server = RedisServer(tmp_path)
    with _stopping(server):
        served = serving("--redis", server.url, *SHORT)
        with clients_of(served.port) as client:
            assert client("/?shard=0").granted
            server.send(signal.SIGSTOP)
            try:
                waiting = [client(f"/?shard={shard}") for shard in range(1, 4)]
                probe = client("/healthz")
                for _ in range(10):
                    status, took = timed(lambda: client("/status").read()[0])
                    assert (status, took < 2.0) == (200, True)
                assert probe.read()[0] == 503
                assert all(one.is_silent() for one in waiting)
            finally:
                server.send(signal.SIGCONT)
            assert all(one.granted for one in waiting)


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="another process's limit cannot be set"
)
def test_running_out_of_files_is_told_once_and_survived(serving):
    served = serving(*SHORT)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with clients_of(served.port) as client:
        kept = client("/status")
        assert kept.read()[0] == 200
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (32, limits[1]))
        many = [client() for _ in range(100)]
        until(lambda: "no connection can be accepted" in served.text, "a line")
        assert kept.ask("/status").read()[0] == 200
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, limits)
        assert many[-1].ask("/?shard=0").granted
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (32, limits[1]))
        client()
        assert served.end() == 0
    assert served.text.count("no connection can be accepted") == 1
    assert "Traceback" not in served.text


def test_kill_and_restart_keep_spacing_and_budget(serving):
    """Clients ask again, as they do; nobody comes early, and no budget is new."""
    port = str(free_port())
    state = ("--interval", "0.6", "--margin", "0.05", "--port", port)
    served = serving(*state)
    with Client(int(port)) as first:
        since = time.monotonic()
        assert first.ask("/?shard=0").granted
    with Client(int(port)) as waits:
        waits.ask("/?shard=1")
        served.end(signal.SIGKILL)
        assert waits.is_closed_without_a_byte()
    again = serving(*state)
    with Client(int(port)) as waits:
        assert waits.ask("/?shard=1").granted
        assert time.monotonic() - since >= 0.6
    assert again.status()["limit"]["remaining"] == 998


@needs_redis
def test_two_brokers_on_one_redis_are_one_queue(serving, tmp_path):
    server = RedisServer(tmp_path)
    with _stopping(server):
        timing = ("--interval", "0.1", "--margin", "0.3")  # for clients that a machine holds up
        both = [serving("--redis", server.url, *timing) for _ in range(2)]
        stamps = []
        lock = threading.Lock()

        def shard(number):
            assert ask_by_urllib(both[number % 2].url) == BODY
            with lock:
                stamps.append(time.monotonic())

        threads = [threading.Thread(target=shard, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        stamps.sort()
        gaps = [after - before for before, after in itertools.pairwise(stamps)]
        assert len(gaps) == 5
        assert min(gaps) >= 0.1
        assert {one.status()["limit"]["remaining"] for one in both} == {994}


@contextlib.contextmanager
def _stopping(server):
    try:
        yield
    finally:
        server.stop()


def test_the_same_file_can_be_used_directly_beside_the_broker(serving, tmp_path):
    served = serving(*SHORT)
    with SqliteQueue(tmp_path / "state", interval=0.2, margin=0.05) as queue:
        queue.acquire(0, timeout=PATIENCE)
        assert ask_by_urllib(served.url) == BODY
        assert queue.snapshot().granted == 2
        assert Path(tmp_path / "state").is_file()
