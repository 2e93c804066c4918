"""The broker: one queue for bots in any language, over HTTP.

``server`` runs it, ``connection`` reads the requests of one client, ``routes`` decides who gets what
answer, and ``waiting`` has the clients that wait for permits. Read them in this order.
"""

from gateway_queue_sync.broker.server import Broker, serve

__all__ = ["Broker", "serve"]
