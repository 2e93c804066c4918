"""For hikari: its shards identify when a queue says so.

Only the IDENTIFY is delayed. While a shard waits for its permit, it reads its socket and sends
heartbeats as usual. You may change ``LOOK``.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from gateway_queue_sync.errors import GatewayQueueError
from gateway_queue_sync.models import Permit
from gateway_queue_sync.queue import GatewayQueue
from gateway_queue_sync.recipes.held_identify import IDENTIFY, HeldIdentify

log = logging.getLogger("gateway_queue_sync.recipes")

LOOK = 0.25  # s between two checks whether a shard that waits is still connected


def queue_identify(queue: GatewayQueue) -> None:
    """Let all shards of this program ask a queue; call it once, before a bot starts.

    hikari still starts ``max_concurrency`` shards at a time, and the next ones 5 s later.
    """
    held = HeldIdentify(queue)
    waiting: set[asyncio.Task[None]] = set()  # so that no task is collected before it is done
    kind = importlib.import_module("hikari.impl.shard").GatewayShardImpl
    send, poll = kind._send_json, kind._poll_events

    async def send_json(self: Any, payload: Any, *, priority: bool = False) -> None:
        if payload["op"] != IDENTIFY:
            await send(self, payload, priority=priority)
            return
        task = asyncio.ensure_future(_identify(held, self, self._ws, partial(send, self, payload)))
        waiting.add(task)
        task.add_done_callback(waiting.discard)

    async def poll_events(self: Any) -> None:
        try:
            await poll(self)
            if not self._handshake_event.is_set():  # the gateway had it connect again before READY
                held.refused(self.id)
        finally:
            held.unanswered.pop(self.id, None)

    kind._send_json, kind._poll_events = send_json, poll_events


async def _identify(
    held: HeldIdentify, shard: Any, connection: Any, send: Callable[[], Any]
) -> None:
    """Send an IDENTIFY when there is a permit, if the shard still has this connection then."""
    asking = asyncio.ensure_future(held.acquire(shard.id))
    try:
        while not (await asyncio.wait([asking], timeout=LOOK))[0]:
            if shard._ws is not connection:
                return
        permit: Permit = asking.result()
    except GatewayQueueError:
        log.exception("shard %d cannot identify", shard.id)
        return
    finally:
        asking.cancel()
    if shard._ws is not connection:
        permit.unused()
        return
    try:
        await send()
    except BaseException:
        permit.unused()
        raise
    held.sent(permit)
