"""A plan with its limit and settings, divided for texts and pictures.

An *instant* is when some shards start. A *run* is all instants between two waits for a reset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from gateway_queue_sync.format import format_count
from gateway_queue_sync.models import SessionStartLimit
from gateway_queue_sync.plan import ShardStart, StartPlan

Instant = list[ShardStart]
"""The shards that start at the same time."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """A plan of at least one shard, with its limit, its reserve and its window in seconds."""

    plan: StartPlan
    limit: SessionStartLimit
    reserve: int
    window: float

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self.plan.starts)

    @property
    def buckets(self) -> list[int]:
        """The buckets that have shards, in ascending order."""
        return sorted({start.bucket for start in self.plan.starts})

    @property
    def waves(self) -> int:
        """How many shards the bucket with the most of them has."""
        return 1 + max(start.wave for start in self.plan.starts)

    @property
    def instants(self) -> Iterator[Instant]:
        """The instants at which shards start, in order of time."""
        return (list(starts) for _, starts in groupby(self.plan.starts, key=lambda s: s.at))

    @property
    def runs(self) -> list[list[Instant]]:
        """The instants in groups: a new one begins where all shards have waited for a reset."""
        runs: list[list[Instant]] = []
        last_at = float("-inf")
        for instant in self.instants:
            if instant[0].at - last_at > self.window * 1.001:
                runs.append([])
            runs[-1].append(instant)
            last_at = instant[0].at
        return runs

    @property
    def title(self) -> str:
        """How many shards and buckets there are, in one line."""
        return (
            f"{format_count(self.shards, 'shard')} in {format_count(len(self.buckets), 'bucket')}"
        )

    @property
    def verdict(self) -> str:
        """Whether the limit suffices, in one line."""
        held = f", reserve {self.reserve}" if self.reserve else ""
        if self.plan.lasts:
            ends = f"enough; {self.plan.remaining} left after the last start"
        else:
            late = sum(s.at > (s.wave + 0.001) * self.window for s in self.plan.starts)
            ends = f"not enough; {format_count(late, 'shard')} must wait for a reset"
        return f"{self.limit.remaining} of {self.limit.total} left now{held}: {ends}"
