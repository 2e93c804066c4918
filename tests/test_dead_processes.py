"""What dead processes have left in a ledger costs the others nothing; 20,000 by hand, fewer here."""

from __future__ import annotations

import dead_processes
import pytest
from redis_servers import needs_redis


@needs_redis
@pytest.mark.parametrize("count", [1_000])
def test_the_first_permit_comes_at_once_however_many_processes_have_died(count):
    for kind, took in dead_processes.measure(count).items():
        assert max(took) < 0.5, kind  # about 1 ms, and a loaded machine
