"""A bot on interactions.py, with the mixin: a script that ends when it reads a line."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import sys
from typing import Any

import interactions
from interactions.api.http import route

from gateway_queue_sync import HttpQueue
from gateway_queue_sync.recipes.interactions_py import QueuedIdentify

faulthandler.enable()
logging.basicConfig()
HOW: dict[str, Any] = json.loads(sys.argv[1])
route.Route.BASE = HOW["api"]


class Bot(QueuedIdentify, interactions.AutoShardedClient):
    """A bot that does nothing but start."""


async def main() -> None:
    queue = HttpQueue(
        HOW["broker"], interval=HOW["interval"], margin=HOW["margin"], lease=HOW["lease"]
    )
    bot = Bot(
        queue,
        total_shards=HOW["shards"],
        intents=interactions.Intents.GUILDS,
        sync_interactions=False,
    )

    async def end() -> None:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        starting.remove_done_callback(fail)
        await bot.stop()
        queue.close()
        os._exit(0)

    def fail(_: object) -> None:
        os._exit(1)

    ending = asyncio.ensure_future(end())
    starting = asyncio.ensure_future(bot.astart(HOW["token"]))
    starting.add_done_callback(fail)
    await ending


asyncio.run(main())
