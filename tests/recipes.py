"""The code blocks of the documents, to be run unchanged, and the shards in threads."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from gateway_queue_sync import GatewayQueue, RedisQueue, SqliteQueue

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md"]
DOCUMENTS += sorted(ROOT.glob("gateway_queue_sync/**/*.md")) + sorted(ROOT.glob("benchmarks/*.md"))


def blocks_of(document: Path) -> list[tuple[str, str]]:
    """Return the language and the code of each code block in a document."""
    return re.findall(r"^```(\w+)\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def block(language: str, containing: str) -> str:
    """Return the one code block with this text in it."""
    (found,) = [code for written, code in BLOCKS if written == language and containing in code]
    return found


def run(
    containing: str, names: dict[str, Any] | None = None, changes: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run the one block of Python with this text in it, and return the names that it leaves.

    What is scaled for a test is changed before, and must be there.
    """
    names = {} if names is None else names
    code = block("python", containing)
    for written, meant in (changes or {}).items():
        assert written in code
        code = code.replace(written, meant)
    exec(code, names)
    return names


LIBRARIES = {"websocket-client": "websocket_client", "websockets": "websockets_sync"}


def threaded_bot(library: str) -> Any:
    """Return a library's ``Shard``, which pauses for a moment only."""
    module = importlib.import_module(f"gateway_queue_sync.recipes.{LIBRARIES[library]}")

    class Shard(module.Shard):
        pause = 0.01, 0.05

    return Shard


SHARED = {
    "sqlite": ("queue = SqliteQueue.from_token(", SqliteQueue, '"identify.sqlite3"'),
    "redis": ("queue = RedisQueue.from_token(", RedisQueue, '"redis://..."'),
}


def shared_queue(kind: str, where: str, token: str, **settings: Any) -> GatewayQueue:
    """Return the queue of the recipe for a kind of account, which is there, and has these settings."""
    containing, policy, written = SHARED[kind]
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    names = {"token": token, policy.__name__: policy}
    return run(containing, names, {written: repr(where), "reserve=50": given})["queue"]
