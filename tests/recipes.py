"""The README's code, to be run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = (Path(__file__).parent.parent / "README.md").read_text()
SCALE = {"uniform(1, 5)": "uniform(0.01, 0.05)"}  # Discord's seconds before a reconnect, in tests


def block(language: str, containing: str) -> str:
    """Return the one code block with this text in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [code for code in blocks if containing in code]
    return found


def run(containing: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the one block of Python with this text in it, and return the names that it leaves."""
    names = {} if names is None else names
    code = block("python", containing)
    for written, scaled in SCALE.items():
        code = code.replace(written, scaled)
    exec(code, names)
    return names


def threaded_bot(library: str) -> tuple[Any, Any]:
    """Return the recipe's ``Shard`` and the ``keep_online`` for a library."""
    names = run("class Shard")
    run(LIBRARIES[library], names)
    return names["Shard"], names["keep_online"]


LIBRARIES = {
    "websocket-client": "import websocket\n",
    "websockets": "from websockets.sync.client",
}
