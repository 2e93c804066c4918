"""A gateway that listens on the loopback, and lets a referee judge the IDENTIFYs that arrive there.

It speaks Discord's opcodes as far as a session start needs them, one JSON object a line.
"""

from __future__ import annotations

import enum
import json
import socketserver
import threading
from typing import Any, Self

from gateway_queue_sync.testing import Referee


class Op(enum.IntEnum):
    """Discord's opcodes; READY is a dispatch."""

    DISPATCH = 0
    IDENTIFY = 2
    INVALID_SESSION = 9
    HELLO = 10


def encode(op: Op, d: Any, **more: Any) -> bytes:
    """Return a payload as it goes over the wire."""
    return json.dumps({"op": op, "d": d, **more}).encode() + b"\n"


class Gateway(socketserver.ThreadingTCPServer):
    """Serves in threads of its own, on a free port of the loopback, until the ``with`` is left."""

    request_queue_size = 1024  # all shards may connect at the same moment
    daemon_threads = True

    def __init__(self, referee: Referee) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.referee = referee

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self.socket.getsockname()
        return host, port

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: whoever hung up or sent nonsense is hung up on, and that is all."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()


class _Connection(socketserver.StreamRequestHandler):
    """The gateway's end of one shard's connection."""

    server: Gateway

    def handle(self) -> None:
        """Greet the shard, and answer its IDENTIFYs until it hangs up or the token is no good."""
        self.wfile.write(encode(Op.HELLO, {"heartbeat_interval": 41_250}))
        for line in self.rfile:
            shard_id, shards = json.loads(line)["d"]["shard"]
            if self.server.referee.identify(shard_id):
                session = {"session_id": f"{shard_id:032x}", "shard": [shard_id, shards]}
                self.wfile.write(encode(Op.DISPATCH, session, t="READY", s=1))
            elif self.server.referee.token_reset:
                return
            else:
                self.wfile.write(encode(Op.INVALID_SESSION, d=False))
