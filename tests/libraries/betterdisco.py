"""A bot on betterdisco, a greenlet for each shard: a script that ends when it reads a line."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
from disco.api.http import HTTPClient  # noqa: E402
from disco.client import Client, ClientConfig  # noqa: E402
from gevent.fileobject import FileObject  # noqa: E402

from gateway_queue_sync import HttpQueue  # noqa: E402
from gateway_queue_sync.recipes.betterdisco import queue_identify  # noqa: E402

HOW = json.loads(sys.argv[1])
HTTPClient.BASE_URL = HOW["api"]
queue = HttpQueue(HOW["broker"], interval=HOW["interval"], margin=HOW["margin"], lease=HOW["lease"])
queue_identify(queue)
clients = []
for shard_id in range(HOW["shards"]):
    config = ClientConfig()
    config.token, config.shard_id, config.shard_count = HOW["token"], shard_id, HOW["shards"]
    config.intents, config.max_reconnects = 1, 0
    clients.append(Client(config))
    gevent.spawn(clients[-1].gw.run)
FileObject(sys.stdin).readline()
for client in clients:
    client.gw.shutting_down = True
    client.gw.ws.close()
queue.close()
gevent.sleep(0.5)
os._exit(0)
