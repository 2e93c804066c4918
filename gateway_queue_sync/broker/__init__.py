"""The broker: one queue for bots in any language, over HTTP."""

from gateway_queue_sync.broker.server import Broker, serve

__all__ = ["Broker", "serve"]
