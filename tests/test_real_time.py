"""The promises with real clocks and threads, measured at the caller."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from concurrent.futures import wait

from gateway_queue_sync import LargeBotQueue, LocalQueue, SessionStartLimit
from gateway_queue_sync.testing import Referee

SEED = 20261123
JITTER = 0.000_1  # s: what two readings of the clock in two threads may be apart


def test_no_spacing_at_the_caller_is_shorter_than_the_interval():
    """A third to a half of them are, where places in time are reserved beforehand."""
    queue = LocalQueue(interval=0.02, margin=0.01)
    returned = []

    def shard():
        for _ in range(4):
            queue.acquire(1)
            returned.append(time.monotonic())

    threads = [threading.Thread(target=shard) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    gaps = [later - earlier for earlier, later in itertools.pairwise(returned)]
    assert len(gaps) == 31
    assert min(gaps) >= 0.02 - JITTER


def test_no_spacing_is_short_while_another_thread_burns_the_processor():
    queue = LocalQueue(interval=0.02, margin=0.02)
    returned = []
    stop = threading.Event()

    def burn():
        while not stop.is_set():
            sum(range(1000))

    def shard():
        queue.acquire(1)
        returned.append(time.monotonic())

    burner = threading.Thread(target=burn)
    burner.start()
    threads = [threading.Thread(target=shard) for _ in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    stop.set()
    burner.join()
    gaps = [later - earlier for earlier, later in itertools.pairwise(returned)]
    # `returned` is written after acquire: the burner may take a switch interval before that
    assert min(gaps) >= 0.02 - sys.getswitchinterval() - JITTER


def test_a_staggered_fleet_breaks_no_rule():
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    referee = Referee(max_concurrency=4, interval=0.05, total=64)
    queue = LargeBotQueue(SessionStartLimit(64, 64, 0.0, 4), interval=0.05, margin=0.025)

    def shard(shard_id, delay):
        time.sleep(delay)
        with queue.acquire(shard_id):
            assert referee.identify(shard_id)

    threads = [
        threading.Thread(target=shard, args=(shard_id, rng.uniform(0, 0.3)))
        for shard_id in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (referee.accepted, referee.refusals) == (32, [])
    assert queue.snapshot().limit.remaining == 32


def test_a_thousand_time_outs_at_one_instant_are_all_told():
    queue = LocalQueue(interval=600)
    queue.acquire(0)
    etas = []

    def shard(shard_id):
        try:
            queue.acquire(shard_id, timeout=0.5)
        except TimeoutError as error:
            etas.append(error.eta)

    threads = [threading.Thread(target=shard, args=(n,)) for n in range(1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(etas) == 1000
    assert queue.snapshot().waiting == 0


def test_thousands_of_futures_wait_and_go():
    queue = LocalQueue(interval=0.02, margin=0)
    queue.acquire(0)
    futures = [queue.enqueue(shard) for shard in range(10_000)]
    assert futures[0].result(30).shard_id == 0
    middle = futures[5_000]
    assert middle.cancel()
    assert futures[1].result(30).shard_id == 1
    assert queue.snapshot().waiting >= 9_000
    queue.close()
    wait(futures, 60)  # the worker completes them
    assert sum(future.done() for future in futures) == 10_000
