"""The broker under load, in small: ``python -m benchmarks.load`` measures it with 10,000 clients."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("psutil", reason="psutil is not installed (the test extra has it)")

from benchmarks import load

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_permits_and_answers_come_while_many_wait_and_many_read():
    counted = load.permits(waiting=1_000, readers=20, seconds=6.0)
    assert counted.granted
    assert counted.read
    assert counted.memory < 16_384


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_storms_of_clients_leave_nothing_behind():
    memory = load.storm(rounds=8, clients=500)
    assert memory[-1] - memory[2] < 4_000_000, memory
