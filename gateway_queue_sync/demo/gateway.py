"""A gateway on the loopback interface, which lets a referee check the IDENTIFYs that arrive.

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
    """Return the bytes of a payload."""
    return json.dumps({"op": op, "d": d, **more}).encode() + b"\n"


class Gateway(socketserver.ThreadingTCPServer):
    """Serves in threads of its own, on a free loopback port, until the end of the ``with`` block."""

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
        """Log nothing. The connection is closed in any case."""

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
        """Send HELLO, and answer IDENTIFYs until the shard disconnects or the token is reset."""
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
