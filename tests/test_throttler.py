"""The throttler for Node.js, by itself: what it asks a broker, and what it reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from contextlib import ExitStack, closing
from pathlib import Path
from queue import SimpleQueue

import pytest
from redis_servers import free_port, until

from gateway_queue_sync import LargeBotQueue, PermitReported, Report, SessionStartLimit, serve
from gateway_queue_sync.broker import waiting

RECIPE = Path(__file__).parent.parent / "gateway_queue_sync/recipes/discord_js.cjs"
SCRIPT = """
const { EventEmitter } = require('node:events');
const { BrokerThrottler } = require(process.argv[1]);
const { url, options, manages } = JSON.parse(process.argv[2]);
const manager = manages ? new EventEmitter() : undefined;
const throttler = new BrokerThrottler(url, { pause: 20, manager, ...options });
const controllers = {};
const say = (...words) => console.log(JSON.stringify(words));
process.on('warning', ({ message }) => say('warning', message));
const calls = {
  wait(shard) {
    controllers[shard] = new AbortController();
    const waiting = throttler.waitForIdentify(shard, controllers[shard].signal);
    waiting.then(() => say('may', shard), () => say('may not', shard));
  },
  abort: (shard) => controllers[shard].abort(),
  rejected: (shard) => throttler.rejected(shard),
  close: () => throttler.close(),
  emit: (...event) => manager.emit(...event),
};
require('node:readline').createInterface({ input: process.stdin }).on('line', (line) => {
  const [name, ...args] = JSON.parse(line);
  calls[name](...args);
}).on('close', () => process.exit(0));
"""
WINDOW = 5.25
PATIENCE = 20.0


class Node:
    """A program that has one throttler, and says what comes of its calls."""

    def __init__(self, url, manages, options):
        how = json.dumps({"url": url, "manages": manages, "options": options})
        self.process = subprocess.Popen(
            ["node", "-e", SCRIPT, str(RECIPE), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self._said.put(json.loads(line))

    def call(self, *words):
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def says(self):
        return self._said.get(timeout=PATIENCE)

    def close(self):
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self.process.stdout.close()


@pytest.fixture
def events():
    return []


@pytest.fixture
def queue(clock, events):
    limit = SessionStartLimit(100, 100, 600.0, 1)
    with LargeBotQueue(limit, clock=clock, observer=events.append) as queue:
        yield queue


@pytest.fixture
def node(queue, monkeypatch):
    """Return what runs Node with a throttler, by default for a broker that is there."""
    if shutil.which("node") is None:
        pytest.skip("there is no node here")
    monkeypatch.setattr(waiting, "HOLD_US", 0)  # windows start at grants
    with ExitStack() as stack:
        broker = stack.enter_context(serve(queue, port=0, secret="s3cret"))

        def run(*, url=broker.url, manages=False, **options):
            options = {"secret": "s3cret"} | options
            return stack.enter_context(closing(Node(url, manages, options)))

        yield run


def ready_in(queue):
    return queue.snapshot().buckets[0].ready_in


def test_a_shard_waits_for_its_permit(node, queue, clock, events):
    program = node()
    program.call("wait", 1)
    assert program.says() == ["may", 1]
    until(lambda: PermitReported(1, 0, Report.SENT) in events, "the report that it was sent")
    program.call("wait", 2)
    until(lambda: queue.snapshot().waiting == 1, "the second shard")
    clock.advance(WINDOW)
    assert program.says() == ["may", 2]


def test_an_abort_leaves_the_line(node, queue):
    queue.acquire(0)
    program = node()
    program.call("wait", 1)
    until(lambda: queue.snapshot().waiting == 1, "the shard")
    program.call("abort", 1)
    assert program.says() == ["may not", 1]
    until(lambda: queue.snapshot().waiting == 0, "an empty line")


def test_close_leaves_the_line_with_all_shards(node, queue):
    queue.acquire(0)
    program = node()
    program.call("wait", 1)
    program.call("wait", 2)
    until(lambda: queue.snapshot().waiting == 2, "both shards")
    program.call("close")
    until(lambda: queue.snapshot().waiting == 0, "an empty line")


def test_a_wrong_secret_is_warned_of_and_is_no_permit(node, queue):
    program = node(secret="other")
    program.call("wait", 1)
    what, message = program.says()
    assert (what, "answers 401" in message) == ("warning", True)
    assert queue.snapshot().granted == 0


def test_a_broker_that_is_away_is_asked_again(node, queue):
    port = free_port()
    program = node(url=f"http://127.0.0.1:{port}")
    program.call("wait", 1)
    with serve(queue, port=port):
        assert program.says() == ["may", 1]


def test_a_rejection_closes_the_bucket_for_longer(node, queue):
    program = node()
    program.call("wait", 1)
    program.says()
    until(lambda: ready_in(queue) == WINDOW, "the report that it was sent")
    program.call("rejected", 1)
    until(lambda: ready_in(queue) == 2 * WINDOW, "the report")


def test_a_shard_that_asks_again_without_an_answer_was_rejected(node, queue):
    program = node(manages=True)
    program.call("wait", 1)
    program.says()
    program.call("emit", "debug", {"message": "Identifying\n\tshard id: 1", "shardId": 1})
    program.call("wait", 1)
    until(lambda: ready_in(queue) == 2 * WINDOW, "the report")


@pytest.mark.parametrize(
    "event",
    [
        ["ready", {"shardId": 1}],  # of @discordjs/ws 1
        ["closed", {"code": 1006, "shardId": 1}],
        ["ready", {}, 1],  # of @discordjs/ws 2
        ["closed", 1006, 1],
    ],
)
def test_a_shard_that_was_ready_or_lost_its_connection_was_not_rejected(node, queue, event):
    program = node(manages=True)
    program.call("wait", 1)
    program.says()
    program.call("emit", *event)
    program.call("wait", 1)
    until(lambda: queue.snapshot().waiting == 1, "the shard")
    assert ready_in(queue) == WINDOW


def test_a_manager_says_when_an_identify_is_sent(node, queue, clock):
    program = node(manages=True)
    program.call("wait", 1)
    program.says()
    clock.advance(1)
    program.call("emit", "debug", "Identifying\n\tshard id: 1", 1)
    until(lambda: ready_in(queue) == WINDOW, "the report")
