"""For betterdisco-py, under gevent: its clients identify when a queue says so.

Only the IDENTIFY is delayed. While a client waits for its permit, it reads its socket and sends
heartbeats as usual. You may change ``HEAD_START`` and ``LOOK``.
"""

from __future__ import annotations

import importlib
import threading
import time
from concurrent.futures import Future
from typing import Any

from gateway_queue_sync.models import Permit
from gateway_queue_sync.queue import GatewayQueue

IDENTIFY = 2
HEAD_START = 60.0  # s that a shard which had a session before is ahead of a cold start
LOOK = 0.25  # s between two checks whether a shard that waits is still connected


def queue_identify(queue: GatewayQueue) -> None:
    """Let all clients of this program ask a queue; call it once, after ``monkey.patch_all()``."""
    kind: Any = importlib.import_module("disco.gateway.client").GatewayClient
    send, handle_invalid_session = kind.send, kind.handle_invalid_session
    unanswered: dict[Any, Permit] = {}  # the permits whose IDENTIFY has no answer yet, by client
    asked_at: dict[int, float] = {}  # a shard that reconnects returns to its position
    identified: set[int] = set()

    def identify(self: Any, socket: Any, data: Any) -> None:
        shard_id, now = data["shard"][0], time.monotonic()
        waited = now - asked_at.setdefault(shard_id, now)
        head_start = HEAD_START if shard_id in identified else 0.0
        future = queue.enqueue(shard_id, priority=head_start + waited)
        while not socket.is_closed and self.ws is socket:
            try:
                permit = future.result(LOOK)
            except TimeoutError:
                continue
            if socket.is_closed or self.ws is not socket:
                break
            unanswered[self] = permit
            with permit:
                send(self, IDENTIFY, data)
            identified.add(shard_id)
            del asked_at[shard_id]
            return
        if not future.cancel():
            future.add_done_callback(give_back)

    def queued_send(self: Any, op: int, data: Any) -> None:
        if int(op) == IDENTIFY:
            args = self, self.ws, data
            threading.Thread(target=identify, args=args, daemon=True).start()
        else:
            send(self, op, data)

    def invalid_session(self: Any, packet: Any) -> None:
        refused = unanswered.pop(self, None)
        if refused is not None and self.session_id is None:  # there was no READY
            refused.rejected()
        handle_invalid_session(self, packet)

    kind.send, kind.handle_invalid_session = queued_send, invalid_session


def give_back(future: Future[Permit]) -> None:
    """Give back a permit that came too late."""
    if future.exception() is None:
        future.result().unused()
