"""Runs functions of the benchmarks here with the package of this or of another checkout."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gateway_queue_sync

USED = Path(gateway_queue_sync.__file__).parents[1]
"""The checkout whose package this process has imported."""

HERE = Path(__file__).parents[1]
CHILD = """
import sys
directory, here, *task = sys.argv[1:]
sys.path[0] = directory
import gateway_queue_sync
sys.path[0] = here
from benchmarks.checkout import child
child(*task)
"""


def child(module: str, function: str, args: str) -> None:
    """Run one function in this process, and write the checkout and what it returned."""
    returned = getattr(importlib.import_module(module), function)(*json.loads(args))
    print(json.dumps([str(USED), returned]), flush=True)


def begin(directory: Path, function: Callable[..., object], *args: Any) -> subprocess.Popen[str]:
    """Start a process that calls a function with the package of a checkout. Pass it to ``finish``."""
    task = function.__module__, function.__name__, json.dumps(args)
    command = [sys.executable, "-c", CHILD, str(directory), str(HERE), *task]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], directory: Path) -> Any:
    """Close the input of a process, and return what its function returned."""
    written, _ = process.communicate()
    assert process.returncode == 0, f"the process ended with {process.returncode}"
    used, returned = json.loads(written.splitlines()[-1])
    assert Path(used) == directory, f"{used} is not {directory}"
    return returned
