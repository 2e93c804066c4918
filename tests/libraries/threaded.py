"""A bot in threads: a script that ends when it reads a line."""

from __future__ import annotations

import faulthandler
import json
import sys
import threading

from gateway_queue_sync import HttpQueue

faulthandler.enable()
HOW = json.loads(sys.argv[1])
if HOW["library"] == "websockets":
    from gateway_queue_sync.recipes.websockets_sync import Shard
else:
    from gateway_queue_sync.recipes.websocket_client import Shard

Shard.pause = 0.01, 0.05
queue = HttpQueue(HOW["broker"], interval=HOW["interval"], margin=HOW["margin"], lease=HOW["lease"])
shards = [Shard(queue, HOW["token"], number, HOW["shards"]) for number in range(HOW["shards"])]
threads = [threading.Thread(target=one.run, args=(HOW["url"],), daemon=True) for one in shards]
for thread in threads:
    thread.start()
sys.stdin.readline()
for one in shards:
    one.close()
for thread in threads:
    thread.join()
queue.close()
