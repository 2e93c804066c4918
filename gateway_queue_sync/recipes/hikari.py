"""For hikari: its shards identify when a queue says so.

The IDENTIFY is held back; meanwhile the shard reads its socket and answers heartbeats, as always.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from typing import Any

from gateway_queue_sync.errors import GatewayQueueError
from gateway_queue_sync.models import Permit
from gateway_queue_sync.queue import GatewayQueue
from gateway_queue_sync.recipes.held_identify import IDENTIFY, HeldIdentify

log = logging.getLogger("gateway_queue_sync.recipes")

LOOK = 0.25  # s between two looks at whether a shard that waits is still connected


def queue_identify(queue: GatewayQueue) -> None:
    """Let all shards of this program ask a queue; call it once, before a bot starts.

    hikari still starts ``max_concurrency`` shards at a time, and the next ones 5 s later.
    """
    held = HeldIdentify(queue)
    waiting: set[asyncio.Task[None]] = set()  # the event loop itself holds no task
    kind = importlib.import_module("hikari.impl.shard").GatewayShardImpl
    send = kind._send_json

    async def identify(self: Any, connection: Any, payload: Any) -> None:
        asking = asyncio.ensure_future(held.acquire(self.id))
        try:
            while not (await asyncio.wait([asking], timeout=LOOK))[0]:
                if self._ws is not connection:
                    return
            permit: Permit = asking.result()
        except GatewayQueueError:
            log.exception("shard %d cannot identify", self.id)
            return
        finally:
            asking.cancel()
        if self._ws is not connection:
            permit.unused()
            return
        with permit:
            held.sent(self.id)
            await send(self, payload)

    async def send_json(self: Any, payload: Any, *, priority: bool = False) -> None:
        if payload["op"] != IDENTIFY:
            await send(self, payload, priority=priority)
            return
        task = asyncio.ensure_future(identify(self, self._ws, payload))
        waiting.add(task)
        task.add_done_callback(waiting.discard)

    kind._send_json = send_json
