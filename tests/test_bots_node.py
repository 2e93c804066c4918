"""The recipe for Node.js, by a broker, against the gateway."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import ExitStack

import pytest
import recipes
from gateway import TOKEN, Gateway, Op
from websockets.sync.client import connect

from gateway_queue_sync import SessionStartLimit, SqliteQueue, serve

PATIENCE = 30.0
SHARDS = 4
INTERVAL, MARGIN = 0.2, 0.4
START = f"""
for (let shardId = 0; shardId < {SHARDS}; shardId++)
  waitToIdentify(shardId).then(() => console.log(shardId));
"""


@pytest.fixture
def node():
    """Return what runs the recipe for all shards, with a broker; its lines name those that may."""
    if shutil.which("node") is None:
        pytest.skip("there is no node here")
    with ExitStack() as stack:

        def run(url):
            code = recipes.block("js", "async function waitToIdentify")
            assert "http://127.0.0.1:8787" in code
            code = code.replace("http://127.0.0.1:8787", url) + START
            command = ["node", "-e", code]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def test_shards_that_identify_when_node_says_so_are_never_refused(node, tmp_path):
    """Their connections are there before; an IDENTIFY is sent as soon as its line is read."""
    limit = SessionStartLimit(10, 10, 600.0, 1)
    with ExitStack() as stack:
        gateway = stack.enter_context(Gateway(shards=SHARDS, interval=INTERVAL))
        path = tmp_path / "identify.sqlite3"
        queue = stack.enter_context(SqliteQueue(path, limit, interval=INTERVAL, margin=MARGIN))
        broker = stack.enter_context(serve(queue, port=0))
        shards = [stack.enter_context(connect(gateway.url)) for _ in range(SHARDS)]
        process = node(broker.url)
        for line in process.stdout:
            d = {"token": TOKEN, "shard": [int(line), SHARDS]}
            shards[int(line)].send(json.dumps({"op": Op.IDENTIFY, "d": d}))
        assert process.wait(PATIENCE) == 0
        gateway.wait_for(set(range(SHARDS)))
        assert gateway.referee.refusals == []
        assert queue.snapshot().limit.remaining == 10 - SHARDS
