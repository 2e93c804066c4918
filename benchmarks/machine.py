"""The machine that is measured on: what it is, and whether others use it at the same time."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HAS_PSUTIL = find_spec("psutil") is not None

NOISE, GRAIN = 0.1, 0.05
"""Which share of a processor others may use before a round counts as noisy, and the least difference of
two readings of their time, in seconds."""


def describe() -> dict[str, Any]:
    """Return a description of the machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "switch interval (s)": sys.getswitchinterval(),
        "load at the start": load,
        "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "noise is judged": HAS_PSUTIL,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_bytes(pid: int | None = None) -> int:
    """Return how much memory a process has; this one by default."""
    import psutil

    return int(psutil.Process(pid).memory_info().rss)


def processor_seconds(pid: int) -> float:
    """Return how much of the processors' time another process has used."""
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


class Watch:
    """Measures how much of a processor others used in its block; ``None`` if that is unknown."""

    others: float | None = None

    def __enter__(self) -> Self:
        self._began = self._reading()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        began, ended = self._began, self._reading()
        if began and ended:
            wall, busy, own = (after - before for before, after in zip(began, ended, strict=True))
            self.others = max(0.0, busy - own - GRAIN) / wall

    @property
    def is_noisy(self) -> bool:
        """Whether others used more than they may."""
        return self.others is not None and self.others > NOISE

    @staticmethod
    def _reading() -> tuple[float, float, float] | None:
        if not HAS_PSUTIL:
            return None
        import psutil

        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0)
        own = os.times()
        return time.monotonic(), busy, sum(own[:4])
