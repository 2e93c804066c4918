"""A bot on hikari, with the recipe: a script that ends when it reads a line."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import sys
from typing import Any

sys.path.pop(0)  # where this file is, which has the library's name
import hikari

from gateway_queue_sync import HttpQueue
from gateway_queue_sync.recipes.hikari import queue_identify

faulthandler.enable()
HOW: dict[str, Any] = json.loads(sys.argv[1])


async def main() -> None:
    queue = HttpQueue(
        HOW["broker"], interval=HOW["interval"], margin=HOW["margin"], lease=HOW["lease"]
    )
    queue_identify(queue)
    bot = hikari.GatewayBot(
        HOW["token"],
        rest_url=HOW["api"],
        banner=None,
        logs=os.environ.get("DEBUG"),
        intents=hikari.Intents.GUILDS,
    )
    kind: Any = type(bot.rest)
    fetch = kind.fetch_gateway_bot_info

    async def fetch_gateway_bot_info(self: Any) -> Any:  # one window: they are 5 s apart
        info = await fetch(self)
        info.session_start_limit.max_concurrency = HOW["shards"]
        return info

    kind.fetch_gateway_bot_info = fetch_gateway_bot_info

    async def end() -> None:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        starting.cancel()
        if bot.is_alive:
            await bot.close()
        queue.close()
        os._exit(0)

    starting = asyncio.ensure_future(bot.start(check_for_updates=False, shard_count=HOW["shards"]))
    await asyncio.wait([starting, asyncio.ensure_future(end())], return_when="FIRST_EXCEPTION")


asyncio.run(main())
