"""The shards in threads under gevent's monkey-patching, as the old threaded frameworks run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from gateway import Gateway

PATIENCE = 30.0
SCRIPT = Path(__file__).with_name("bots_under_gevent.py")
INTERVAL, MARGIN = 0.1, 1.9


def test_waiting_greenlets_do_not_block_each_other():
    with Gateway(max_concurrency=4, interval=INTERVAL) as gateway:
        settings = map(str, (gateway.api, gateway.url, 8, INTERVAL, MARGIN))
        command = [sys.executable, "-W", "error", SCRIPT, *settings]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                gateway.wait_for(set(range(8)))
                gateway.revoke()
                printed = json.loads(process.communicate(timeout=PATIENCE)[0])
            finally:
                process.kill()
        assert gateway.referee.refusals == []
    assert printed["longest"] < INTERVAL + MARGIN
    assert printed["granted"] == 8 + 1
