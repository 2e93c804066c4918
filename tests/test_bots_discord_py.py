"""The mixin for discord.py, in several clients of one loop, against the gateway."""

from __future__ import annotations

import asyncio
import threading
import warnings
from contextlib import asynccontextmanager

import pytest
import yarl
from gateway import TOKEN, Gateway

from gateway_queue_sync import LargeBotQueue, LocalQueue, SessionStartLimit
from gateway_queue_sync.recipes.discord_py import QueuedIdentify

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # audioop, on some of Python's versions
    import discord
    import discord.gateway
    import discord.http

PATIENCE = 30.0
WINDOW = {"interval": 0.1, "margin": 0.2}
OPTIONS = {"intents": discord.Intents(guilds=True), "guild_ready_timeout": 0.05}


class Client(QueuedIdentify, discord.AutoShardedClient):
    pass


@pytest.fixture
def point_at(monkeypatch):
    """Return what has discord.py use a gateway in place of Discord's."""

    def point_at(gateway):
        monkeypatch.setattr(discord.http.Route, "BASE", gateway.api)
        url = yarl.URL(gateway.url)
        monkeypatch.setattr(discord.gateway.DiscordWebSocket, "DEFAULT_GATEWAY", url)

    return point_at


@asynccontextmanager
async def running(*clients):
    """Run clients, and yield what waits until something comes true, or one of them ends."""
    tasks = [asyncio.ensure_future(client.start(TOKEN)) for client in clients]

    async def until(predicate):
        async with asyncio.timeout(PATIENCE):
            while not predicate():
                for task in tasks:
                    assert not task.done(), task
                await asyncio.sleep(0.005)

    try:
        yield until
    finally:
        for client in clients:
            await client.close()
        for thread in threading.enumerate():  # which would find the loop closed
            if isinstance(thread, discord.gateway.KeepAliveHandler):
                thread.stop()
                while thread.is_alive():
                    await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_the_shards_of_several_clients_become_ready_one_after_another(point_at):
    async def main():
        clients = [
            Client(queue, shard_ids=shard_ids, shard_count=6, **OPTIONS)
            for shard_ids in ([0, 2], [1, 4], [3, 5])
        ]
        async with running(*clients) as until:
            await until(lambda: gateway.online == set(range(6)))
            await asyncio.gather(*(client.wait_until_ready() for client in clients))
        assert asyncio.get_running_loop()._default_executor is None

    with Gateway(shards=6, max_concurrency=2, interval=0.1) as gateway:
        point_at(gateway)
        queue = LargeBotQueue.from_token(TOKEN, base_url=gateway.api, **WINDOW)
        asyncio.run(main())
        assert gateway.referee.refusals == []
        assert gateway.referee.accepted == 6
        assert queue.snapshot().limit.remaining == gateway.referee.limit.remaining == 994


def test_a_client_that_is_refused_asks_the_queue_again(point_at):
    async def main():
        async with running(Client(queue, shard_count=1, **OPTIONS)) as until:
            await until(lambda: gateway.online == {0})

    with Gateway(interval=0.5) as gateway, LocalQueue(interval=0.5, margin=0.2) as queue:
        point_at(gateway)
        gateway.referee.identify(0)  # somebody else's, which this queue knows nothing of
        asyncio.run(main())
        assert (gateway.referee.accepted, gateway.referee.refused) == (2, 1)
        assert queue.snapshot().granted == 2


def test_a_client_that_is_closed_leaves_the_line_and_strands_no_permit(point_at):
    limit = SessionStartLimit(10, 10, 600.0, 1)

    async def main():
        queue.acquire(0)
        patient = Client(queue, shard_count=1, shard_connect_timeout=0.1, **OPTIONS)
        async with running(patient) as until:
            await until(lambda: queue.snapshot().waiting == 1)
            await asyncio.sleep(0.3)  # discord.py would give up
            assert queue.snapshot().waiting == 1
        assert queue.snapshot().waiting == 0
        assert gateway.referee.accepted == 0

    with Gateway() as gateway, LargeBotQueue(limit, interval=60.0) as queue:
        point_at(gateway)
        asyncio.run(main())
        assert queue.snapshot().limit.remaining == 9
