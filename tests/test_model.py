"""The whole queue against a slow, obvious model: join, cancel, time out, report, update, close."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway_queue_sync import (
    AcquireTimeout,
    LargeBotQueue,
    QueueClosed,
    SessionStartLimit,
)
from gateway_queue_sync.testing import FakeClock

WINDOW = 5_250_000
PERIOD = 1_000_000_000
FAR = -(10**18)


@dataclass
class Waiter:
    shard_id: int
    position: tuple[int, int]
    deadline: int | None
    future: Future
    threaded: bool


@dataclass
class Held:
    """A permit that somebody holds, and what the model knows of it."""

    permit: object
    bucket: int
    stamp: int
    before: int
    period: int
    layout: int


@dataclass
class Model:
    """A list of waiters, a time for each bucket, a count. Everything is looked through every time."""

    now: int
    total: int
    remaining: int
    resets_at: int
    count: int
    period: int = 0
    layout: int = 0
    granted: int = 0
    last: dict[int, int] = field(default_factory=dict)
    waiters: list[Waiter] = field(default_factory=list)

    def line(self, bucket):
        mine = [waiter for waiter in self.waiters if waiter.shard_id % self.count == bucket]
        return sorted(mine, key=lambda waiter: waiter.position)

    def due(self, bucket):
        return self.last.get(bucket, FAR) + WINDOW

    def has_budget(self):
        return self.remaining > 0 or self.now >= self.resets_at

    def grant(self, shard_id):
        if self.now >= self.resets_at:
            self.remaining, self.resets_at = self.total, self.now + PERIOD
            self.period += 1
        self.remaining -= 1
        self.granted += 1
        bucket = shard_id % self.count
        before = self.last.get(bucket, FAR)
        self.last[bucket] = self.now
        return bucket, before

    def move(self):
        """Return who is granted now and who times out now."""
        granted, late = [], []
        for bucket in range(self.count):
            line = self.line(bucket)
            if line and self.due(bucket) <= self.now and self.has_budget():
                self.waiters.remove(line[0])
                granted.append((line[0], *self.grant(line[0].shard_id)))
        for waiter in list(self.waiters):
            if waiter.deadline is not None and waiter.deadline <= self.now:
                self.waiters.remove(waiter)
                late.append(waiter)
        return granted, late


class Machine(RuleBasedStateMachine):
    @initialize(buckets=st.integers(1, 3), scarce=st.booleans())
    def begin(self, buckets, scarce):
        # With several buckets and a scarce budget it is open which bucket gets the last permit.
        total = 4 if scarce and buckets == 1 else 10_000
        self.scarce = total == 4
        self.clock = FakeClock()
        self.queue = LargeBotQueue(
            SessionStartLimit(total, total, 500.0, buckets), period=1000.0, clock=self.clock
        )
        now = self.clock.now_us()
        self.model = Model(now, total, total, now + 500_000_000, buckets)
        self.serial = 0
        self.held: list[Held] = []

    def settle(self):
        """Let everybody make their move, and see that it is the model's."""
        granted, late = self.model.move()
        self.clock.settle(sum(waiter.threaded for waiter in self.model.waiters))
        for waiter, bucket, before in granted:
            permit = waiter.future.result(20)
            assert (permit.shard_id, permit.bucket) == (waiter.shard_id, bucket)
            self.hold(permit, bucket, before)
        for waiter in late:
            assert isinstance(waiter.future.exception(20), AcquireTimeout)
        assert not any(waiter.future.done() for waiter in self.model.waiters)

    def hold(self, permit, bucket, before):
        model = self.model
        self.held.append(Held(permit, bucket, model.now, before, model.period, model.layout))

    def join(self, shard_id, priority, timeout, future, threaded):
        self.serial += 1
        now = self.model.now
        deadline = None if timeout is None else now + round(timeout * 1e6)
        position = (now - round(priority * 1e6), self.serial)
        self.model.waiters.append(Waiter(shard_id, position, deadline, future, threaded))
        self.settle()

    @rule(
        shard_id=st.integers(0, 8),
        priority=st.sampled_from([0.0, 0.0, 3.0, 20.0, -4.0]),
        timeout=st.sampled_from([None, None, 0, 2.0, 5.25, 11.0]),
    )
    def acquire(self, shard_id, priority, timeout):
        future = Future()

        def run():
            try:
                future.set_result(self.queue.acquire(shard_id, timeout, priority=priority))
            except BaseException as error:  # noqa: BLE001
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        self.join(shard_id, priority, timeout, future, threaded=True)

    @rule(shard_id=st.integers(0, 8), priority=st.sampled_from([0.0, 0.0, 3.0, 20.0, -4.0]))
    def enqueue(self, shard_id, priority):
        future = self.queue.enqueue(shard_id, priority=priority)
        self.join(shard_id, priority, None, future, threaded=False)

    @rule(shard_id=st.integers(0, 8))
    def try_acquire(self, shard_id):
        model = self.model
        bucket = shard_id % model.count
        permit = self.queue.try_acquire(shard_id)
        free = not model.line(bucket) and model.due(bucket) <= model.now and model.has_budget()
        assert (permit is not None) == free
        if permit is not None:
            self.hold(permit, *model.grant(shard_id))

    @rule(by=st.sampled_from([0.5, 2.0, 5.25, 5.25, 7.0, 300.0]))
    def advance(self, by):
        self.clock.advance(by)
        self.model.now += round(by * 1e6)
        self.settle()

    @precondition(lambda self: any(not waiter.threaded for waiter in self.model.waiters))
    @rule(data=st.data())
    def cancel(self, data):
        futures = [waiter for waiter in self.model.waiters if not waiter.threaded]
        waiter = data.draw(st.sampled_from(futures))
        assert waiter.future.cancel()
        self.model.waiters.remove(waiter)
        self.settle()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def sent(self, data):
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        held.permit.sent()
        model = self.model
        bucket = held.permit.shard_id % model.count
        model.last[bucket] = model.now
        for other in self.held:
            if other.bucket == bucket and other.layout == model.layout:
                other.before = model.now
        self.settle()

    @precondition(lambda self: self.held)
    @rule()
    def unused(self):
        """Give the latest permit back, so that the model need not know of undoing the undone."""
        held = self.held.pop()
        held.permit.unused()
        model = self.model
        if held.period == model.period:
            model.remaining += 1
        if held.layout == model.layout and model.last[held.bucket] == held.stamp:
            model.last[held.bucket] = held.before
        self.settle()

    @rule(buckets=st.integers(1, 4))
    def update(self, buckets):
        model = self.model
        if self.scarce:
            buckets = 1
        self.queue.update(SessionStartLimit(model.total, model.total, 500.0, buckets))
        model.period += 1
        model.remaining, model.resets_at = model.total, model.now + 500_000_000
        if buckets != model.count:
            latest = max(model.last.values(), default=FAR)
            model.count, model.last = buckets, dict.fromkeys(range(buckets), latest)
            model.layout += 1
        self.settle()

    @invariant()
    def looks_like_the_model(self):
        if not hasattr(self, "model"):
            return
        model, seen = self.model, self.queue.snapshot()
        assert (seen.waiting, seen.granted) == (len(model.waiters), model.granted)
        for bucket in seen.buckets:
            line = model.line(bucket.bucket)
            assert [shard.shard_id for shard in bucket.shards] == [each.shard_id for each in line]
            ready_in = max(0, model.due(bucket.bucket) - model.now)
            assert round(bucket.ready_in * 1e6) == ready_in
            etas = [shard.eta for shard in bucket.shards]
            assert etas == sorted(etas)
        if model.now >= model.resets_at:
            assert (seen.limit.remaining, seen.limit.resets_in) == (model.total, 0.0)
        else:
            assert seen.limit.remaining == model.remaining
            assert round(seen.limit.resets_in * 1e6) == model.resets_at - model.now

    def teardown(self):
        if not hasattr(self, "queue"):
            return
        self.queue.close()
        for waiter in self.model.waiters:
            assert isinstance(waiter.future.exception(20), QueueClosed)
        self.clock.settle(0)
        assert self.queue.snapshot().waiting == 0


TestQueue = Machine.TestCase
TestQueue.settings = settings(stateful_step_count=40)
