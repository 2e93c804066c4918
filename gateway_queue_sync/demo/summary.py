"""The text at the end: how the shards ended, and what the referee counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gateway_queue_sync.demo.fleet import Result
from gateway_queue_sync.testing import Referee


def summary(results: Sequence[Result], referee: Referee, interval: float) -> str:
    """Return the verdict and its figures."""
    shards, identifies = len(results), referee.accepted + referee.refused
    failures = Counter(result.failure for result in results if result.failure)
    least = referee.least_time(range(shards))
    took = max(result.at for result in results)
    gap = "-" if referee.shortest_gap is None else f"{referee.shortest_gap:.3f} s"
    return "\n".join(
        [
            "",
            _verdict(referee, failures.total()),
            f"  shards started  {shards - failures.total()} of {shards}",
            f"  refused         {referee.refused} of {identifies} IDENTIFYs",
            f"  shortest gap    {gap} in a bucket; the rule is {interval:g} s",
            f"  total time      {took:.3f} s; the least possible is {least:.3f} s",
            *(f"  failed          {many}: {why}" for why, many in failures.most_common()),
        ]
    )


def _verdict(referee: Referee, failed: int) -> str:
    if referee.token_reset:
        return (
            "A rule was broken: IDENTIFYs went past the limit, and Discord resets the bot's token."
        )
    if referee.refused:
        return "A rule was broken: IDENTIFYs came too fast, and got Invalid Session."
    if failed:
        return "Not all shards started."
    return "All shards started, and no rule was broken."
