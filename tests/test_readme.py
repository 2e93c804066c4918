"""The README's code is run as it stands there, so that none of it can rot."""

from __future__ import annotations

import asyncio
import re
import shlex
import threading

import pytest
from recipes import README, block, run

from gateway_queue_sync import (
    LargeBotQueue,
    LocalQueue,
    QueueClosed,
    SessionStartLimit,
    SqliteQueue,
    cli,
    serve,
)


def test_the_bot_in_ten_lines_starts_its_shards(monkeypatch):
    sent, ran = [], threading.Semaphore(0)

    class WebSocket:
        def send(self, payload):
            sent.append(payload)

        def run(self):
            ran.release()

    code = block("python", "def run_shard").replace(
        "LocalQueue()", "LocalQueue(interval=0.01, margin=0.01)"
    )
    exec(code, {"connect": lambda shard_id: WebSocket(), "identify": lambda shard_id: shard_id})
    for _ in range(4):
        assert ran.acquire(timeout=20)
    assert sorted(sent) == [0, 1, 2, 3]


@pytest.fixture
def wait_to_identify():
    names = {"asyncio": asyncio}
    exec(block("python", "async def wait_to_identify"), names)
    return names["wait_to_identify"]


def test_the_recipe_for_asyncio_gets_a_permit(wait_to_identify):
    permit = asyncio.run(wait_to_identify(LocalQueue(), 3))
    assert permit.shard_id == 3


def test_the_recipe_for_asyncio_strands_no_permit(wait_to_identify):
    """Cancelled at the very instant at which its permit has come."""
    queue = LargeBotQueue(SessionStartLimit(10, 10, 600.0, 1), interval=0.01, margin=0.0)

    async def main():
        queue.acquire(0)
        task = asyncio.ensure_future(wait_to_identify(queue, 1))
        await asyncio.sleep(0)
        while queue.snapshot().granted < 2:  # the loop does not run: the permit cannot be delivered
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert queue.snapshot().limit.remaining == 9


def test_the_recipe_for_asyncio_stays_cancelled_when_the_queue_is_closed(wait_to_identify):
    queue = LocalQueue(interval=30)

    async def main():
        queue.acquire(0)
        task = asyncio.ensure_future(wait_to_identify(queue, 1))
        await asyncio.sleep(0)
        queue.close()
        task.cancel()
        with pytest.raises((asyncio.CancelledError, QueueClosed)):
            await task
        return task

    assert asyncio.run(main()).done()


def test_the_commands_are_there():
    commands = [
        line
        for code in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
        for line in code.splitlines()
    ]
    assert commands[0] == "python3 -m gateway_queue_sync demo"
    assert shlex.split(commands[1])[:4] == ["python3", "-m", "venv", ".venv"]


def test_the_shared_queue_grants_and_can_be_looked_at(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    code = block("python", "SqliteQueue(").replace(
        "reserve=50", "reserve=50, interval=0.01, margin=0.02"
    )
    names = {}
    exec(code, names)
    names["queue"].close()
    assert capsys.readouterr().out.startswith("<Permit shard_id=7 bucket=0 ")
    command = shlex.split(block("sh", "status --sqlite"))
    assert command[:3] == ["python3", "-m", "gateway_queue_sync"]
    assert command.pop() == "--watch"
    assert cli.main(command[3:]) == 0
    assert "left today  999 of 1000" in capsys.readouterr().out


def test_the_remote_queue_asks_its_broker(tmp_path, capsys):
    with SqliteQueue(tmp_path / "q", interval=0.01, margin=0.02) as queue:
        with serve(queue, port=0) as broker:
            changes = {"http://127.0.0.1:8787": broker.url, '")\nwith': '", margin=0.02)\nwith'}
            run("HttpQueue(", changes=changes)["queue"].close()
    assert capsys.readouterr().out.startswith("<Permit shard_id=7 bucket=0 ")


def test_the_plan_is_what_the_comment_says(capsys):
    run("plan_start(")
    said = block("python", "plan_start(").split("print(plan)  # ")[1]
    assert capsys.readouterr().out == said


RUN = ("def run_shard", "def wait_to_identify", "SqliteQueue(", "HttpQueue(", "plan_start(",
       "class Shard", "import websocket\n", "from websockets.sync", "from gevent", "import discord",
       "add_done_callback", "SqliteQueue.from_token(", "RedisQueue.from_token(",
       "class PausableQueue")  # fmt: skip


def test_every_block_is_run_by_a_test():
    """A new one has its name here, and a test that runs it."""
    blocks = re.findall(r"```(?:python|py)\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == len(RUN)
    for containing in RUN:
        assert block("python", containing)
