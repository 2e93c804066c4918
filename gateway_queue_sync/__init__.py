"""A queue for the IDENTIFYs of a threaded Discord bot: each shard waits until it may send one.

The thread of a shard acquires a permit before it sends::

    queue = LocalQueue()
    with queue.acquire(shard_id):      # blocks this thread until the shard may identify
        websocket.send(identify)
"""

import logging
from typing import TYPE_CHECKING

from gateway_queue_sync.errors import (
    AcquireTimeout,
    GatewayBotError,
    GatewayQueueError,
    LedgerError,
    QueueClosed,
    SessionLimitExhausted,
)
from gateway_queue_sync.events import (
    BudgetExhausted,
    Event,
    LimitUpdated,
    Observer,
    PermitReported,
    ShardGranted,
    ShardLeft,
    ShardWaiting,
)
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    BucketSnapshot,
    LimitSnapshot,
    Permit,
    QueueSnapshot,
    Report,
    SessionStartLimit,
    WaitingShard,
)
from gateway_queue_sync.plan import ShardStart, StartPlan, plan_start
from gateway_queue_sync.policies import (
    HttpQueue,
    LargeBotQueue,
    LocalQueue,
    NoOpQueue,
    RedisQueue,
    SqliteQueue,
)
from gateway_queue_sync.queue import GatewayQueue, Queue

if TYPE_CHECKING:
    from gateway_queue_sync.broker import serve as serve

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the program decides what is shown

__all__ = [
    # queues
    "GatewayQueue",
    "HttpQueue",
    "LargeBotQueue",
    "LocalQueue",
    "NoOpQueue",
    "Queue",
    "RedisQueue",
    "SqliteQueue",
    # a broker
    "serve",
    # values
    "BucketSnapshot",
    "LimitSnapshot",
    "Permit",
    "QueueSnapshot",
    "Report",
    "SessionStartLimit",
    "WaitingShard",
    # plans
    "ShardStart",
    "StartPlan",
    "plan_start",
    # errors
    "AcquireTimeout",
    "LedgerError",
    "GatewayBotError",
    "GatewayQueueError",
    "QueueClosed",
    "SessionLimitExhausted",
    # events
    "BudgetExhausted",
    "Event",
    "LimitUpdated",
    "Observer",
    "PermitReported",
    "ShardGranted",
    "ShardLeft",
    "ShardWaiting",
    # figures
    "DEFAULT_MARGIN",
    "IDENTIFY_INTERVAL",
    "SESSION_PERIOD",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name == "serve":  # loads asyncio, which few need
        from gateway_queue_sync.broker import serve  # noqa: PLC0415

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
