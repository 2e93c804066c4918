"""What bots do in processes of their own, made of the recipes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any, NoReturn

import recipes
import websockets.sync.client  # noqa: F401 - so that the process that forks has it

from gateway_queue_sync import GatewayQueue, NoOpQueue


class Account:
    """Where a queue keeps its account, and the bot its gateway. Without a kind, there is no queue."""

    def __init__(self, url: str, token: str, kind: str = "", where: str = "", **how: Any) -> None:
        self.url, self.token = url, token
        self.kind, self.where, self.how = kind, where, how

    def queue(self) -> GatewayQueue:
        if not self.kind:
            return NoOpQueue()
        return recipes.shared_queue(self.kind, self.where, self.token, **self.how)


def run_shards(account: Account, shard_ids: Iterable[int], shards: int) -> None:
    """Run shards, a thread for each, until there is no use in trying again."""
    shard = recipes.threaded_bot("websockets")
    queue = account.queue()
    threads = []
    for shard_id in shard_ids:
        bot = shard(queue, account.token, shard_id, shards)
        threads.append(threading.Thread(target=bot.run, args=(account.url,)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def run_and_crash(account: Account) -> None:
    """Run a shard that crashes as soon as it is READY."""

    class Crashing(recipes.threaded_bot("websockets")):  # type: ignore[misc]
        def received(self, event: str, data: Any) -> None:
            crash()

    Crashing(account.queue(), account.token, 0, 1).run(account.url)


def crash() -> NoReturn:
    os._exit(1)
