"""Run shards in threads under gevent: a script, because monkey-patching cannot be undone."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402

import gevent  # noqa: E402
import recipes  # noqa: E402
from gateway import TOKEN  # noqa: E402

from gateway_queue_sync import LargeBotQueue  # noqa: E402


def run(api: str, url: str, shards: int, interval: float, margin: float) -> dict[str, float]:
    """Run all shards until the gateway resets the token, and look after each switch how long it took."""
    queue = LargeBotQueue.from_token(TOKEN, base_url=api, interval=interval, margin=margin)
    shard = recipes.threaded_bot("websocket-client")
    threads = [
        threading.Thread(target=shard(queue, TOKEN, shard_id, shards).run, args=(url,))
        for shard_id in range(shards)
    ]
    for thread in threads:
        thread.start()
    future = queue.enqueue(0)
    longest, last = 0.0, time.monotonic()
    while any(thread.is_alive() for thread in threads):
        gevent.sleep(0.005)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    future.result()
    return {"longest": longest, "granted": queue.snapshot().granted}


if __name__ == "__main__":
    api, url, *numbers = sys.argv[1:]
    shards, interval, margin = map(float, numbers)
    print(json.dumps(run(api, url, int(shards), interval, margin)))
