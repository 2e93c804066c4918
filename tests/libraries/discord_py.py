"""A bot on one of discord.py's family, with the mixin: a script that ends when it reads a line."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import importlib
import json
import sys
from typing import Any

import yarl

from gateway_queue_sync import HttpQueue
from gateway_queue_sync.recipes.discord_py import QueuedIdentify

faulthandler.enable()
HOW: dict[str, Any] = json.loads(sys.argv[1])
MODULE = {"discord.py": "discord", "py-cord": "discord"}.get(HOW["library"], HOW["library"])

discord: Any = importlib.import_module(MODULE)
http = importlib.import_module(f"{MODULE}.http")
gateway = importlib.import_module(f"{MODULE}.gateway")


def point_at(url: str, api: str) -> None:
    """Have the library use a gateway in place of Discord's."""
    if hasattr(http.Route, "API_BASE_URL"):
        http.Route.API_BASE_URL = api
    http.Route.BASE = api
    http._modify_api_version = lambda version: None
    gateway.DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(url)


async def main() -> None:
    point_at(HOW["url"], HOW["api"])
    queue = HttpQueue(
        HOW["broker"], interval=HOW["interval"], margin=HOW["margin"], lease=HOW["lease"]
    )
    kind = discord.AutoShardedClient if HOW["shards"] > 1 else discord.Client

    class Bot(QueuedIdentify, kind):
        async def on_ready(self) -> None:
            print("ready", flush=True)

    options = {"shard_count": HOW["shards"]} if HOW["shards"] > 1 else {}
    if "shard_ids" in HOW:
        options |= {"shard_ids": HOW["shard_ids"]}
    if HOW["library"] == "discord.py":
        options |= {"guild_ready_timeout": 0.05}
    bot = Bot(
        queue,
        intents=discord.Intents(guilds=True),
        heartbeat_timeout=HOW["heartbeat_timeout"],
        **options,
    )

    async def end() -> None:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await bot.close()
        queue.close()

    ending = asyncio.ensure_future(end())
    with contextlib.suppress(RuntimeError):  # py-cord connects again while it closes
        await bot.start(HOW["token"])
    await ending


asyncio.run(main())
