"""The broker under load, in small: ``broker_load.py`` runs the same with 10,000 clients."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("psutil", reason="psutil is not installed (the test extra has it)")

import broker_load

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_permits_come_in_time_while_many_wait_and_many_read():
    counted = broker_load.permits(waiting=1_000, readers=20, seconds=6.0)
    assert counted.share > 0.9  # 99 % and more, on a machine that does nothing else
    assert counted.read > 200
    assert counted.memory < 16_384


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_storms_of_clients_leave_nothing_behind():
    memory = broker_load.storm(rounds=8, clients=500)
    assert memory[-1] - memory[2] < 4_000_000, memory
