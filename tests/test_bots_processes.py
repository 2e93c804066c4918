"""Bots in several processes, and one that is restarted, on the shared queues of the README."""

from __future__ import annotations

import itertools

import bots
import processes
import pytest
import redis_servers
from gateway import TOKEN, Gateway
from processes import FORKED, until

PATIENCE = 30.0
WINDOW = {"interval": 0.1, "margin": 0.2}

_names = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def _forkserver():
    processes.start_forkserver()


@pytest.fixture
def start():
    """Return what starts a process that is killed at the end if it is still there."""
    started = []

    def start(target, *args):
        process = FORKED.Process(target=target, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join(PATIENCE)
        process.close()


@pytest.fixture(params=["sqlite", "redis"])
def new_account(request, tmp_path):
    """Return what makes an account for a gateway."""
    kind, where = request.param, str(tmp_path / "identify.sqlite3")
    if kind == "redis":
        if redis_servers.BINARY is None:
            pytest.skip(redis_servers.WITHOUT)
        where = request.getfixturevalue("redis_server").url

    def make(gateway, **settings):
        settings |= {"name": f"bots-{next(_names)}", "base_url": gateway.api}
        return bots.Account(gateway.url, TOKEN, kind, where, **settings)

    return make


def test_several_processes_start_their_shards_as_one_bot(new_account, start):
    with Gateway(shards=12, max_concurrency=4, interval=WINDOW["interval"]) as gateway:
        account = new_account(gateway, reserve=50, **WINDOW)
        running = [start(bots.run_shards, account, range(n, 12, 3), 12) for n in range(3)]
        gateway.wait_for(set(range(12)))
        running[0].kill()
        gateway.wait_for(set(range(12)) - set(range(0, 12, 3)))
        running.append(start(bots.run_shards, account, range(0, 12, 3), 12))
        gateway.wait_for(set(range(12)))
        with account.queue() as queue:
            left = queue.snapshot().limit
        gateway.revoke()
        for process in running:
            process.join(PATIENCE)
        assert [process.exitcode for process in running] == [-9, 0, 0, 0]
        assert gateway.referee.refusals == []
        assert left.total - left.remaining == gateway.referee.accepted == 16


# --- a supervisor that restarts a crashing bot in a tight loop, for scaled days -------------------

DAY = 1.5  # s: several times what the starts of a day take
TOTAL, RESERVE = 5, 2
RULES = {"interval": 0.05, "total": TOTAL, "period": DAY}


def supervise(start, account, until_then):
    """Restart a bot whenever it crashes, at once."""
    while not until_then():
        bot = start(bots.run_and_crash, account)
        until(lambda: bot.exitcode is not None or until_then(), "a crash")  # noqa: B023


def test_a_crash_loop_without_a_queue_has_the_token_reset(start):
    with Gateway(**RULES | {"period": 3600.0}) as gateway:
        supervise(start, bots.Account(gateway.url, TOKEN), lambda: gateway.referee.token_reset)
        assert len(gateway.started) <= TOTAL


@pytest.mark.parametrize("new_account", ["sqlite"], indirect=True)
def test_a_crash_loop_with_a_shared_queue_and_a_reserve_never_has_the_token_reset(
    new_account, start
):
    left = []
    starts_in_two_days = 2 * (TOTAL - RESERVE)

    def until_then():
        left.append(gateway.referee.limit.remaining)
        return gateway.referee.token_reset or len(gateway.started) > starts_in_two_days

    with Gateway(**RULES) as gateway:
        settings = {"reserve": RESERVE, "interval": 0.05, "margin": 0.05, "period": DAY}
        supervise(start, new_account(gateway, **settings), until_then)
        assert not gateway.referee.token_reset
        assert gateway.referee.refusals == []
    assert min(left) == RESERVE
