"""The recipes in the real libraries, each in a process of its own, by a broker, against the gateway.

``BOT_LIBRARIES`` names a folder with a virtual environment for each Python library, by its name on PyPI,
with ``node`` for the libraries of npm, and with ``node18`` for that Node.js. ``.ci/libraries`` makes it.
What is not there is skipped.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from gateway import TOKEN, Gateway
from processes import until

HERE = Path(__file__).parent
ROOT = HERE.parent
LIBRARIES = Path(os.environ.get("BOT_LIBRARIES", "/nowhere"))
PATIENCE = 30.0
SHARDS, CONCURRENCY = 16, 4
INTERVAL, MARGIN = 0.2, 0.6
WINDOW = {"interval": INTERVAL, "margin": MARGIN}

SCRIPTS = {
    "discord.py": "discord_py.py",
    "py-cord": "discord_py.py",
    "nextcord": "discord_py.py",
    "disnake": "discord_py.py",
    "betterdisco-py": "betterdisco.py",
    "websocket-client": "threaded.py",
    "websockets": "threaded.py",
    "interactions.py": "interactions_py.py",
    "hikari": "hikari.py",
    "discord.js": "discord_js.js",
    "discord.js in workers": "discord_js.js",
    "discord.js on Node.js 18": "discord_js.js",
    "@discordjs/ws": "discordjs_ws.mjs",
    "eris": "eris.js",
    "oceanic.js": "eris.js",
    "seyfert": "seyfert.js",
    "@discordeno/gateway": "discordeno.mjs",
}


def command_of(library):
    """Return what runs the bot of a library."""
    script = HERE / "libraries" / SCRIPTS[library]
    if script.suffix != ".py":
        package = library.partition(" ")[0]
        is_old = library.endswith("18")
        node = shutil.which(LIBRARIES / "node18/node_modules/node/bin/node" if is_old else "node")
        if node and (LIBRARIES / "node/node_modules" / package).is_dir():
            return [node, script]
    elif (python := LIBRARIES / library / "bin/python").exists():
        return [python, script]
    pytest.skip(f"BOT_LIBRARIES names no folder with {library}")


class Broker:
    """A broker in a process of its own, which reads the limit from the gateway."""

    def __init__(self, gateway, folder, window=WINDOW):
        self.gateway, self.folder, self.window = gateway, folder, window
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        settings = {"port": self.port, "state": self.folder / "q.sqlite3"} | self.window
        settings |= {"base-url": self.gateway.api}
        command = [sys.executable, "-m", "gateway_queue_sync", "serve"]
        command += [f"--{name}={value}" for name, value in settings.items()]
        log = (self.folder / "broker.log").open("a")
        self.process = subprocess.Popen(
            command, env=os.environ | {"DISCORD_TOKEN": TOKEN}, stderr=log, cwd=ROOT
        )
        log.close()
        until(self.is_up, "the broker")

    def is_up(self):
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self):
        self.process.kill()
        self.process.wait(PATIENCE)

    def status(self):
        with urllib.request.urlopen(f"{self.url}/status.json", timeout=5) as answer:
            return json.load(answer)

    @property
    def used(self):
        limit = self.status()["limit"]
        return limit["total"] - limit["remaining"]


class Bot:
    """A bot in a process of its own."""

    def __init__(self, library, gateway, broker, shards=SHARDS, **how):
        how = broker.window | {
            "library": library,
            "url": gateway.url,
            "api": gateway.api,
            "broker": broker.url,
            "token": TOKEN,
            "shards": shards,
            "lease": 2.0,
            "heartbeat_timeout": 60.0,
            **how,
        }
        environment = {
            "PYTHONPATH": str(ROOT),
            "NODE_PATH": str(LIBRARIES / "node/node_modules"),
        }
        self.log = broker.folder / "bot.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command_of(library), json.dumps(how)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                text=True,
            )

    def close(self):
        self.process.stdin.write("close\n")
        self.process.stdin.flush()
        try:
            assert self.process.wait(PATIENCE) == 0
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # a Python tells where it is
            raise

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(params=SCRIPTS)
def library(request):
    command_of(request.param)
    return request.param


def of(*libraries):
    """Run a test if these libraries are there."""

    def mark(test):
        test.libraries = libraries
        return test

    return mark


@pytest.fixture
def world(request, tmp_path):
    """Return what makes a gateway, its broker, and what starts bots there."""
    for library in getattr(request.function, "libraries", ()):
        command_of(library)
    with ExitStack() as stack:

        def make(shards=SHARDS, max_concurrency=CONCURRENCY, window=WINDOW, **rules):
            rules |= {"shards": shards, "max_concurrency": max_concurrency}
            gateway = stack.enter_context(Gateway(interval=window["interval"], **rules))
            broker = Broker(gateway, tmp_path, window)
            stack.callback(broker.kill)

            def start(library="", **how):
                library = library or request.getfixturevalue("library")
                bot = Bot(library, gateway, broker, **{"shards": shards} | how)
                stack.callback(bot.kill)
                return bot

            return gateway, broker, start

        yield make
        for log in sorted(tmp_path.glob("*.log")):  # shown if the test fails
            print(f"--- {log.name}", *log.read_text().splitlines()[-60:], sep="\n")


def wait_for(gateway, shards=SHARDS, within=PATIENCE):
    gateway.wait_for(set(range(shards)), within)
    assert gateway.referee.refusals == []


def online(gateway, count):
    until(lambda: len(gateway.online) >= count, f"{count} shards")


def budgets_are_equal(gateway, broker, lost=0):
    """Permits whose IDENTIFY went down with its connection count for the queue alone."""

    def are_equal():
        return 0 <= broker.used - gateway.referee.accepted <= lost

    until(are_equal, f"equal budgets: {gateway}")


def test_all_shards_become_ready(library, world):
    gateway, broker, start = world()
    bot = start()
    wait_for(gateway)
    budgets_are_equal(gateway, broker)
    assert gateway.referee.accepted == SHARDS
    bot.close()


def test_a_bot_of_one_shard_becomes_ready(library, world):
    gateway, broker, start = world(shards=1)
    bot = start()
    wait_for(gateway, 1)
    budgets_are_equal(gateway, broker)
    bot.close()


def test_all_connections_are_dropped_during_the_start(library, world):
    gateway, broker, start = world()
    start()
    online(gateway, CONCURRENCY)
    gateway.drop(online=False)
    gateway.drop(online=True)
    time.sleep(0.1)
    wait_for(gateway)
    budgets_are_equal(gateway, broker, lost=CONCURRENCY)


def test_all_sessions_become_invalid(library, world):
    gateway, broker, start = world()
    start()
    wait_for(gateway)
    gateway.invalidate()
    until(lambda: gateway.referee.accepted >= 2 * SHARDS, "the second start", PATIENCE)
    wait_for(gateway)
    budgets_are_equal(gateway, broker)


def test_a_bot_that_is_closed_while_its_shards_wait_leaves_nothing(library, world):
    gateway, broker, start = world()
    bot = start()
    online(gateway, CONCURRENCY)
    bot.close()
    until(lambda: broker.status()["waiting"] == 0, "an empty line")
    budgets_are_equal(gateway, broker)
    assert gateway.referee.accepted < SHARDS


def test_the_broker_is_killed_and_comes_back_during_the_start(library, world):
    gateway, broker, start = world()
    start()
    online(gateway, CONCURRENCY)
    broker.kill()
    time.sleep(1)
    broker.start()
    wait_for(gateway)
    budgets_are_equal(gateway, broker, lost=CONCURRENCY)


def test_a_bot_that_is_terminated_while_its_shards_wait_can_start_again(library, world):
    gateway, broker, start = world()
    bot = start()
    online(gateway, CONCURRENCY)
    bot.process.send_signal(signal.SIGTERM)
    bot.process.wait(PATIENCE)
    until(lambda: gateway.online == set(), "the end of the bot")
    start()
    wait_for(gateway)
    budgets_are_equal(gateway, broker, lost=CONCURRENCY)


def test_an_identify_that_is_refused_closes_its_bucket_for_longer(library, world):
    window = {"interval": 2.0, "margin": 1.0}
    gateway, broker, start = world(shards=1, max_concurrency=1, window=window)
    gateway.refuses = 1
    start()
    until(lambda: broker.status()["buckets"][0]["ready_in"] > 3.0, "the report")
    wait_for(gateway, 1)
    assert gateway.seen["refused"] == gateway.referee.accepted == 1
    assert broker.used == 2


def test_a_line_may_be_longer_than_the_heartbeat_timeout(library, world):
    gateway, broker, start = world(max_concurrency=1, heartbeat=1.5)
    start(heartbeat_timeout=4.0)
    wait_for(gateway)
    assert gateway.referee.accepted == SHARDS
    assert gateway.seen["timed out"] == 0
    budgets_are_equal(gateway, broker)


# --- several libraries ----------------------------------------------------------------------------


@of("discord.js")
def test_an_event_loop_that_is_often_busy_sends_at_the_right_time(world):
    """At Discord's own 5 s: the loop reads a permit late by up to 0.8 s, and the next one in time."""
    gateway, broker, start = world(shards=24, window={"interval": 5.0, "margin": 0.25})
    start("discord.js", work=550, every=2000)
    wait_for(gateway, 24, within=90)
    budgets_are_equal(gateway, broker)
    assert gateway.referee.accepted == 24


@of("discord.js")
def test_the_processes_of_a_sharding_manager_share_a_broker(world):
    gateway, broker, start = world(shards=8)
    bot = start("discord.js", manager=True)
    wait_for(gateway, 8)
    budgets_are_equal(gateway, broker)
    bot.close()
    until(lambda: broker.status()["waiting"] == 0, "an empty line")


@of("discord.py", "discord.js")
def test_libraries_in_two_languages_share_a_broker_through_a_storm(world):
    gateway, broker, start = world(shards=24)
    start("discord.py", shard_ids=list(range(0, 24, 2)))
    start("discord.js", shard_ids=list(range(1, 24, 2)))
    for count in (8, 16):
        online(gateway, count)
        gateway.drop(online=False)
        gateway.drop(online=True)
        time.sleep(0.1)
    wait_for(gateway, 24)
    gateway.invalidate()
    until(lambda: gateway.referee.accepted >= 48, "the second start", PATIENCE)
    wait_for(gateway, 24)
    budgets_are_equal(gateway, broker, lost=4 * CONCURRENCY)


# --- what the README says of this ------------------------------------------------------------------


def test_the_readme_says_which_libraries_are_run_in_what_situation():
    situations = {
        name.removeprefix("test_").replace("_", " "): ", ".join(getattr(test, "libraries", ["all"]))
        for name, test in globals().items()
        if name.startswith("test_") and "world" in inspect.signature(test).parameters
    }
    text = (ROOT / "gateway_queue_sync/recipes/README.md").read_text()
    _, _, listed = text.partition("| situation | libraries |\n| --- | --- |\n")
    rows = listed.partition("\n\n")[0].splitlines()
    assert rows == [f"| {situation} | {which} |" for situation, which in situations.items()]


def test_each_library_of_the_readme_is_run():
    text = (ROOT / "gateway_queue_sync/recipes/README.md").read_text()
    listed = re.findall(r"^\| ([^|]+) \| `[^`|]+` \|", text, re.MULTILINE)
    libraries = {library for row in listed for library in row.split(", ")}
    assert libraries == {name.partition(" ")[0] for name in SCRIPTS}
