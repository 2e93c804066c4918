"""Random walks of whole systems that share a ledger; and that they find known defects."""

from __future__ import annotations

import model_shared
import pytest
from redis_servers import needs_redis

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    with model_shared.running_server() as server:
        yield server


@pytest.mark.parametrize("seed", range(0, 60, 10))
def test_whole_systems_keep_every_invariant(seed):
    for one in range(seed, seed + 10):
        model_shared.walk(one)


@needs_redis
def test_whole_systems_keep_every_invariant_over_the_trips_to_a_redis_server(server):
    for one in (0, 1, 2, 4, 5, 6, 7):  # the others take many times as long
        model_shared.walk(one, server)


# Those that most walks find; ``python -m tests.model_shared --defects`` confirms all.
@pytest.mark.parametrize(
    "name",
    [
        "number check dropped",
        "stored reply not kept",
        "age taken from the first send",
        "age of a repeated reply not recomputed",
        "age taken from a later send for an earlier reply",
        "writes in the old order",
        "grace of 0",
        "margin not checked",
    ],
)
def test_walks_find_a_defect(name):
    assert model_shared.find(name, 7, 40) is not None


@needs_redis
@pytest.mark.parametrize(
    "name", ["a result is stored over what has changed", "number check of the script dropped"]
)
def test_walks_over_the_trips_to_a_redis_server_find_a_defect(server, name):
    assert model_shared.find(name, 7, 20, server) is not None


def test_every_defect_still_applies_to_the_code():
    for name in model_shared.DEFECTS:
        with model_shared.defect(name):
            pass
