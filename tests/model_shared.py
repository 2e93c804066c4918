"""A model checker for ledgers that processes share: random walks of whole systems.

``python -m tests.model_shared --seconds 60 [--seed N] [--ledger memory|redis]`` walks with the real
session code and the real rules, and a network, clocks, users and a Discord that are simulated. Messages
are delayed, lost, repeated and reordered; processes are stopped, killed and forked; the ledger fails,
goes back to an older state, and its clock is set. The ledger is in memory, or in a Redis server behind
the real backend and script, each trip to which is a message. ``--defects`` introduces known defects one
by one, and confirms that each is found.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import heapq
import inspect
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

if __package__:
    sys.path.insert(0, str(Path(__file__).parent))

import memory_store
import redis
import redis_servers
from memory_store import Failed, MemoryStore
from redis_store import RedisStore

from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared import bounds, messages, rows, turns
from gateway_queue_sync.ledgers.shared import redis as redis_module
from gateway_queue_sync.ledgers.shared import session as session_module
from gateway_queue_sync.ledgers.shared.answers import Answers, SessionSettings
from gateway_queue_sync.ledgers.shared.messages import Reply, Request
from gateway_queue_sync.ledgers.shared.session import Session
from gateway_queue_sync.ledgers.shared.store import LineRow
from gateway_queue_sync.models import Permit, Report, SessionStartLimit

SECOND = 1_000_000
FOREVER = 1 << 62
MAX_TRY_US = SECOND // 2  # how long a try waits for its reply
Answer = Reply | list[object] | LedgerError
STATUS = ("ok", "introduce", "refused")


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(eq=False)
class Waiter:
    number: int
    shard_id: int
    arrived_us: int
    position_us: int
    once: bool
    joined_us: int  # real time
    hold_us: int = 0
    permit: Permit | None = None


@dataclass(eq=False)
class Use:
    """A permit that was handed over: the bucket's next one comes an interval after ``at_us``.

    That is when the IDENTIFY may be sent at the latest: at once, or when a hold ends or is reported.
    """

    process: Process
    permit: Permit
    at_us: int
    layout: int
    returned: bool = False


class Lines:
    """The waiters of a process."""

    def __init__(self, max_concurrency: int) -> None:
        self.max_concurrency = max_concurrency
        self.waiters: list[Waiter] = []

    def _line(self, bucket: int) -> list[Waiter]:
        line = (
            one
            for one in self.waiters
            if one.permit is None and one.shard_id % self.max_concurrency == bucket
        )
        return sorted(line, key=lambda one: (one.position_us, one.number))

    def first_two(self, bucket: int) -> Sequence[Waiter]:
        return self._line(bucket)[:2]

    def length(self, bucket: int) -> int:
        return len(self._line(bucket))

    def buckets(self) -> list[int]:
        return sorted({one.shard_id % self.max_concurrency for one in self.waiters})


class Process:
    """A queue in a process: its session, its waiters, its worker."""

    def __init__(self, world: World, name: str, settings: SessionSettings, offset_us: int) -> None:
        self.world, self.name, self.settings, self.offset_us = world, name, settings, offset_us
        self.numbers = 0
        self.alive, self.stopped = True, False
        self.lines = Lines(1)
        self.can_read = world.reads
        self.reading = False
        self.twin: Process | None = None  # another queue in the same process
        self.attempt: Request | None = None
        self.trips = 0  # that the ledger has answered, of this attempt
        self.wake_at_us = FOREVER
        self.granted_here: dict[tuple[str, int], int] = {}
        self.session = self.new_session()

    def new_session(self) -> Session:
        return session_module.Session(
            self.settings, new_id=self.world.new_id, uniform=self.world.random.uniform
        )

    def now_us(self) -> int:
        return self.world.now_us + self.offset_us

    def pump(self) -> None:
        """Do what the worker does when it wakes: send what is to be sent, or sleep."""
        if not self.alive or self.stopped or self.attempt is not None:
            return
        if self.session.max_concurrency != self.lines.max_concurrency:
            self.lines.max_concurrency = self.session.max_concurrency
        now_us = self.now_us()
        request = self.session.compose(self.lines, now_us, can_read=self.can_read)
        if request is not None:
            self.attempt = request
            self.world.send(self, request, [])
            return
        wake_us = self.session.wake_us(now_us)
        if wake_us < FOREVER // 2:
            if wake_us <= now_us and not self.world.quiet:
                wake_us = now_us + 1000
            at_us = max(wake_us, now_us + 1) - self.offset_us
            if at_us < self.wake_at_us:
                self.wake_at_us = at_us
                self.world.at(at_us, self.woken, at_us)

    def woken(self, at_us: int) -> None:
        if self.wake_at_us == at_us:
            self.wake_at_us = FOREVER
            self.pump()

    def answer_came(self, request: Request, answer: Answer, there_us: int) -> None:
        """Go on with what the ledger has answered: a reply, an error, or what another trip needs."""
        if not self.alive:
            return
        if self.stopped:  # it reads the answer when it goes on
            self.world.when_resumed(self, self.answer_came, request, answer, there_us)
        elif isinstance(answer, Reply):
            self.reply_came(request, answer, there_us)
        elif self.attempt is request:
            if isinstance(answer, list):
                self.world.send(self, request, answer)
            else:
                self.attempt = None
                self.session.failed(request, answer, self.now_us())
                self.pump()

    def reply_came(self, request: Request, reply: Reply, there_us: int) -> None:
        flying = self.attempt
        if flying is not None and flying.attempt == request.attempt:
            self.attempt = None
        accepted = self.session._in_flight is not None and self.attempt is None
        given = self.session._in_flight or request  # as a careless caller would say
        answers = self.session.answered(given, reply, self.now_us())
        if accepted and flying is not None and flying.attempt == reply.attempt:
            self.world.check_late(self, given, reply, answers, there_us)
        self.take_in(answers)
        self.pump()

    def timed_out(self, request: Request, trips: int) -> None:
        if not self.alive:
            return
        if self.stopped:
            self.world.when_resumed(self, self.timed_out, request, trips)
            return
        if self.attempt is request and self.trips == trips:
            self.attempt = None
            self.session.failed(request, TimeoutError(), self.now_us())
            self.pump()

    def take_in(self, answers: Answers) -> None:
        world = self.world
        for permit in answers.permits:
            waiter = next((one for one in self.lines.waiters if one.number == permit.waiter), None)
            if waiter is None or waiter.permit is not None:
                self.session.report(permit, Report.UNUSED, self.now_us())
                continue
            waiter.permit = permit
            self.lines.waiters.remove(waiter)
            self.session.changed(permit.shard_id % self.lines.max_concurrency)
            world.handed_over(self, permit, waiter)
        for number, denial in answers.denials.items():
            longest_us = self.settings.lease_us // 3 + 1
            world.check(denial.wait_us <= longest_us, f"{self.name} sleeps {denial.wait_us}")
            for waiter in [one for one in self.lines.waiters if one.number == number and one.once]:
                self.leave(waiter)
        if answers.read and not self.reading:
            world.read_limit(self)

    def join(self, shard_id: int, *, once: bool, priority_us: int) -> None:
        self.numbers += 1
        now_us = self.now_us()
        waiter = Waiter(
            self.numbers,
            shard_id,
            now_us,
            now_us - priority_us,
            once,
            self.world.now_us,
            self.world.random.choice(self.world.holds),
        )
        self.lines.waiters.append(waiter)
        if once:  # behind a head it need not stay, and for no reply it waits longer
            self.world.after(self.world.random.choice([0, MAX_TRY_US]), self.leave, waiter)
        self.session.changed(shard_id % self.lines.max_concurrency)
        if not self.world.quiet and self.world.random.random() < 0.3:
            self.world.after(self.world.random.randint(0, 8 * SECOND), self.leave, waiter)
        self.pump()

    def leave(self, waiter: Waiter) -> None:
        if self.alive and waiter in self.lines.waiters:
            self.lines.waiters.remove(waiter)
            self.session.changed(waiter.shard_id % self.lines.max_concurrency)
            self.pump()

    def report(self, use: Use, report: Report) -> None:
        if not self.alive or use.returned:
            return
        if report is Report.UNUSED:
            use.returned = True
        self.session.report(use.permit, report, self.now_us())
        self.pump()


class World:
    """A system of processes and one ledger, with a walk through what may happen to it."""

    def __init__(self, seed: int, store: MemoryStore | RedisStore) -> None:
        self.random = rng = random.Random(seed)
        self.now_us = 1_000 * SECOND
        self.queue: list[tuple[int, int, Callable[..., None], tuple[object, ...]]] = []
        self.counter = 0
        self.trace: list[str] = []
        self.quiet = False
        self.lost_us = -1
        self.introductions = 0  # that were asked for since then
        self.store = store
        self.ledger_offset_us = rng.choice([5_000, 1_700_000_000]) * SECOND
        self.wall_offset_us = 0  # of the clock that resets count by
        self.lost = False  # the storage knows that it is an older one
        self.was_lost = self.clock_was_set = self.wall_was_set = self.was_forgotten = False
        self.snapshot, self.had_account = self.store.copy(), False
        self.interval_us = rng.choice([SECOND, SECOND // 5])
        self.margin_us = rng.choice([SECOND // 4, SECOND // 10])
        self.lease_us = rng.choice([3 * SECOND // 2, 5 * SECOND])
        self.max_concurrency = rng.choice([1, 1, 2, 4])
        self.total = rng.choice([1000, 1000, 12])
        self.reads = self.total < 1000 and rng.random() < 0.5
        # Where the limit is read, a hundredth of it is more than all delays, as a minute is of a day.
        self.period_us = (rng.choice([150] * 7 + [1500]) if self.reads else 25) * SECOND
        self.updates = self.total == 1000 and rng.random() < 0.3
        self.delay_us = rng.choice([2_000, 60_000, 300_000])
        self.loss = rng.choice([0.0, 0.05, 0.2])
        self.repeats = rng.choice([0.0, 0.1])
        self.fails = rng.choice([0.0, 0.05])
        self.silenced: dict[str, int] = {}  # since when, by session
        self.holds = rng.choice([[0], [0, SECOND // 2, 3 * SECOND]])
        self.long_waits = rng.choice([0.0, 0.0, 0.1])
        self.faults = rng.random() < 0.7
        self.uses: list[Use] = []
        self.granted_at: dict[tuple[str, int], int] = {}
        self.held_us: dict[tuple[str, int], int] = {}  # how much later its window starts
        self.granted_in: dict[tuple[str, int], int] = {}
        self.granted_period: dict[int, int] = {}
        self.unaccounted: dict[tuple[str, int], str] = {}
        self.sent_as: dict[str, Process] = {}
        self.resumptions: list[tuple[Process, Callable[..., None], tuple[object, ...]]] = []
        self.discord: list[int] = []
        count = rng.choice([1, 2, 2, 3])
        self.processes = [self.process(f"p{number}") for number in range(count)]
        if rng.random() < 0.2:
            first, second = self.processes[0], self.process("p0b")
            first.twin, second.twin, second.offset_us = second, first, first.offset_us
            self.processes.append(second)
        if rng.random() < 0.1:
            self.rogue()

    # --- events -----------------------------------------------------------------------------------

    def at(self, at_us: int, do: Callable[..., None], *what: object) -> None:
        self.counter += 1
        heapq.heappush(self.queue, (max(at_us, self.now_us), self.counter, do, what))

    def after(self, delay_us: int, do: Callable[..., None], *what: object) -> None:
        self.at(self.now_us + delay_us, do, *what)

    def run(self, until_us: int) -> None:
        while self.queue and self.queue[0][0] <= until_us:
            self.now_us, _, do, what = heapq.heappop(self.queue)
            do(*what)
        self.now_us = until_us

    def log(self, text: str) -> None:
        self.trace.append(f"{self.now_us / 1000 - 1_000_000:10.1f} ms  {text}")

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.log(f"VIOLATION: {what}")
            raise Violation(what)

    # --- processes --------------------------------------------------------------------------------

    def new_id(self) -> str:
        return f"{self.random.getrandbits(64):016x}"

    def process(self, name: str) -> Process:
        limit = SessionStartLimit(self.total, self.total, 0.0, self.max_concurrency)
        settings = SessionSettings(
            interval_us=self.interval_us,
            margin_us=self.margin_us,
            period_us=self.period_us,
            lease_us=self.lease_us,
            reread_us=10 * SECOND if self.reads else 0,
            limit=None if self.reads else limit,
        )
        offset_us = self.random.choice([0, 7_000 * SECOND, -300 * SECOND])
        process = Process(self, name, settings, offset_us)
        self.after(self.random.randint(0, 100_000), process.pump)
        return process

    def rogue(self) -> None:
        """Add a process that was given absurd settings by mistake."""
        process = self.process("rogue")
        wrong = self.random.choice(
            [
                {"lease_us": 3600 * SECOND},
                {"interval_us": 3600 * SECOND},
                {"margin_us": 60 * SECOND},
            ]
        )
        process.settings = replace(process.settings, **wrong)
        process.session = process.new_session()
        process.can_read = False
        self.rogue_process = process
        for shard_id in range(2):
            process.join(shard_id, once=False, priority_us=0)

    def kill(self, process: Process) -> None:
        for one in self.queues_of(process):
            self.log(f"{one.name} is killed")
            one.alive = False
            self.forget(one)

    def queues_of(self, process: Process) -> list[Process]:
        return [one for one in (process, process.twin) if one is not None and one.alive]

    def forget(self, process: Process) -> None:
        """Expect nothing more of the permits that are on their way to a process."""
        for key in [key for key in self.unaccounted if self.sent_as.get(key[0]) is process]:
            del self.unaccounted[key]

    def fork(self, process: Process) -> None:
        """Let a process have a child, with a copy of its queue in which nobody waits."""
        child = Process(self, process.name + "c", process.settings, process.offset_us)
        # What a child has is its parent's session, which it begins anew.
        child.session._layout, child.session.granted = (
            process.session._layout,
            process.session.granted,
        )
        child.session.max_concurrency = process.session.max_concurrency
        child.session.period, child.session.budget = process.session.period, process.session.budget
        child.session.budget_us = process.session.budget_us
        child.session.reinit()
        self.log(f"{process.name} forks {child.name}")
        self.processes.append(child)
        child.pump()

    def when_resumed(self, process: Process, do: Callable[..., None], *what: object) -> None:
        self.resumptions.append((process, do, what))

    def resume(self, process: Process) -> None:
        if process.stopped:
            self.log(f"{process.name} goes on")
            process.stopped = False
            waiting = [one for one in self.resumptions if one[0] is process]
            self.resumptions = [one for one in self.resumptions if one[0] is not process]
            for _, do, what in waiting:
                do(*what)
            process.pump()

    # --- the network and the ledger ---------------------------------------------------------------

    def send(self, process: Process, request: Request, known: list[object]) -> None:
        """Send a request, or its next trip after those that the ledger has answered."""
        rng = self.random
        self.sent_as[request.session] = process
        process.trips = len(known)
        timeout_us = max(200_000, 3 * self.delay_us)
        self.after(timeout_us, process.timed_out, request, len(known))
        if self.quiet:
            self.after(500, self.arrive, process, request, known, 500, True)
            return
        there_us, back_us = rng.randint(200, self.delay_us), rng.randint(200, self.delay_us)
        if rng.random() < self.loss:
            fate = rng.choice(["request", "reply", "late", "slow"])
            if fate != "request":
                slow_us = rng.randint(0, 2 * timeout_us) if fate == "slow" else 0
                back_us += timeout_us if fate == "late" else 0
                replies = fate != "reply"
                self.after(
                    there_us + slow_us, self.arrive, process, request, known, back_us, replies
                )
        else:
            self.after(there_us, self.arrive, process, request, known, back_us, True)
        if rng.random() < self.repeats:
            again_us = there_us + rng.randint(0, 3 * SECOND)
            self.after(again_us, self.arrive, process, request, known, 0, False)

    def ledger_now_us(self) -> int:
        return self.now_us + self.ledger_offset_us

    def arrive(
        self,
        process: Process,
        request: Request,
        known: list[object],
        back_us: int,
        replies: bool,
    ) -> None:
        sent_at_us = request.sent_us - process.offset_us
        if sent_at_us < self.silenced.get(request.session, -1):
            return  # in the minute that counts as over, the network has lost it
        if self.fails and not self.quiet and self.random.random() < self.fails:
            self.store.fails_after = self.random.randint(0, 6)
        now_us = self.ledger_now_us()
        before = {
            line.bucket: self.store.live(line.bucket, now_us)
            for line in request.lines
            if self.quiet
        }
        try:
            wall_us = now_us + self.wall_offset_us
            reply = self.store.trip(request, known, now_us, wall_us, lost=self.lost)
        except Failed:
            self.log(f"the ledger fails at {process.name} #{request.number}")
            return
        self.lost = False
        there_us = self.now_us + process.offset_us - request.sent_us
        if not isinstance(reply, Reply):
            self.log(
                f"{process.name} {request.session[:4]}#{request.number}.{request.attempt} "
                f"{f'trip {len(reply)}' if isinstance(reply, list) else repr(reply)}"
            )
            self.check(not self.store.events, "a trip without a reply has granted or refunded")
            if replies:
                self.after(back_us, process.answer_came, request, reply, there_us)
            return
        self.check_order(process, before, reply)
        self.log(
            f"{process.name} {request.session[:4]}#{request.number}.{request.attempt} "
            f"{[tuple(one[:2]) for one in request.reports]} "
            f"{[(line.bucket, [one.number for one in line.waiters]) for line in request.lines]} -> "
            f"{STATUS[reply.status]} {[tuple(one[:2]) for one in reply.permits]} "
            f"{[tuple(one) for one in reply.waits]} left {reply.remaining}"
            f"{' lost' if reply.lost else ''}{' limit' if request.limit else ''}"
        )
        self.note_events(process, request, reply)
        if self.quiet and reply.status == messages.INTRODUCE:
            self.introductions += 1
            self.check(self.introductions <= 100, "a process introduces itself again and again")
        self.check(
            reply.status != messages.OK
            or max(request.interval_us, request.margin_us * 6, request.lease_us) <= 60 * SECOND,
            "settings out of bounds are accepted",
        )
        self.check(
            reply.interval_us <= bounds.MAX_INTERVAL_US and reply.margin_us <= bounds.MAX_MARGIN_US,
            "the window is longer than any process may want",
        )
        if replies and self.faults and not self.quiet and self.random.random() < 0.02:
            self.log(f"the reply is lost, and {process.name} is away until it counts as silent")
            self.stop(process, self.random.choice([SECOND, 3 * SECOND]))
            self.make_silent(process)
        elif replies:
            self.after(back_us, process.answer_came, request, reply, there_us)

    def check_order(self, process: Process, before: dict[int, list[LineRow]], reply: Reply) -> None:
        """Check that while nothing goes wrong nobody is passed over by another process."""
        if not self.quiet or self.now_us < self.quiet_us + 10 * SECOND:
            return
        for permit in reply.permits:
            own = [row for row in before[permit.bucket] if row.session == process.session._id]
            for row in before[permit.bucket] if own else ():
                other = self.sent_as[row.session]
                self.check(
                    row.waiters[0].position_us >= own[0].waiters[0].position_us
                    or not other.alive
                    or other.session._id != row.session,
                    f"{other.name} is passed over by {process.name}",
                )

    def note_events(self, process: Process, request: Request, reply: Reply) -> None:
        holds_us = {one.number: one.hold_us for line in request.lines for one in line.waiters}
        for permit in reply.permits:
            self.held_us[request.session, permit.serial] = holds_us[permit.waiter]
        for kind, serial in self.store.events:
            if kind == "granted":
                self.granted_at[request.session, serial] = self.now_us - self.store.computed_us
                self.granted_in[request.session, serial] = request.layout
                if process.alive and request.session not in self.silenced:
                    self.unaccounted[request.session, serial] = process.name
                self.check(
                    request.session == process.session._id or not process.alive or self.was_lost,
                    f"serial {serial} is granted to a session that {process.name} has given up",
                )
            else:
                for use in self.uses:
                    same = use.process is process and use.permit.serial == serial
                    if same and not self.was_lost:
                        self.check(use.returned, f"serial {serial} is given back in use")
                self.check(kind == "refunded", f"serial {serial} is refunded twice")
                owner = self.sent_as.get(self.store.granted_to.get(serial, ""))
                self.check(
                    owner is process, f"serial {serial} is given back by {process.name}, in vain"
                )
                for key in [one for one in self.unaccounted if one[1] == serial]:
                    if self.sent_as[key[0]] is process:
                        del self.unaccounted[key]

    def check_late(
        self, process: Process, request: Request, reply: Reply, answers: Answers, there_us: int
    ) -> None:
        """Check that no permit is given back that is young, but for the way of its request."""
        passed = {permit.serial for permit in answers.permits}
        wanted_us = {one.number: one.hold_us for one in process.lines.waiters}
        for one in reply.permits if reply.status == messages.OK else ():
            known = (request.session, one.serial) in self.granted_at
            self.check(known, f"{process.name} gets serial {one.serial}, which was not granted")
            age_us = self.now_us - self.granted_at[request.session, one.serial]
            held_us = self.held_us[request.session, one.serial]
            raised_us = held_us - wanted_us.get(one.waiter, held_us)
            self.check(
                one.serial in passed
                or age_us + there_us > request.margin_us + raised_us
                or self.clock_was_set,
                f"serial {one.serial} is given back, {age_us} us old",
            )

    def handed_over(self, process: Process, permit: Permit, waiter: Waiter) -> None:
        """Check a permit that its waiter has, and let the user do something with it."""
        session = next(
            (
                key
                for key in reversed(list(self.granted_at))
                if key[1] == permit.serial and self.sent_as[key[0]] is process
            ),
            None,
        )
        self.check(session is not None, f"{process.name} has a permit that was not granted")
        assert session is not None
        self.unaccounted.pop(session, None)
        raised_us = self.held_us[session] - waiter.hold_us
        true_us = self.granted_at[session] + raised_us + process.offset_us
        self.check(
            permit.stamp_us <= true_us or self.clock_was_set,
            f"serial {permit.serial} counts as younger than it is, by {permit.stamp_us - true_us}",
        )
        is_kept = self.granted_at[session] > self.lost_us  # a loss forgets the hold
        at_us = self.now_us + (waiter.hold_us if is_kept else 0)
        use = Use(process, permit, at_us, self.granted_in[session])
        self.log(f"** {process.name} holds serial {permit.serial} for {waiter.number}")
        for other in reversed(self.uses):
            if other.permit.serial == permit.serial and not self.was_lost:
                self.check(False, f"serial {permit.serial} is held twice")
            if other.returned or (
                other.layout == use.layout and other.permit.bucket != permit.bucket
            ):
                continue
            apart_us = self.now_us - other.at_us
            self.check(
                apart_us >= self.interval_us,
                f"serials {other.permit.serial} and {permit.serial} are {apart_us} us apart",
            )
        period = permit.period
        self.granted_period[period] = self.granted_period.get(period, 0) + 1
        if not (self.was_lost or self.updates or self.reads):
            self.check(
                self.granted_period[period] <= self.total,
                f"period {period} has more than the limit",
            )
        self.uses.append(use)
        self.used(process, use)

    def used(self, process: Process, use: Use) -> None:
        """Let the user send an IDENTIFY, or not, and report something, or nothing."""
        kind = self.random.random()
        delay_us = self.random.choice([0, 50_000, 2 * SECOND])
        if not self.quiet and 0.6 <= kind < 0.95:
            delay_us = self.random.choice([0, 50_000, 50_000, 2 * SECOND, 70 * SECOND])
            self.after(delay_us, self.reported, process, use, Report.UNUSED)
            return
        self.identify()
        if not self.quiet and kind >= 0.3:
            report = Report.SENT if kind < 0.6 else Report.REJECTED
            self.after(delay_us, self.reported, process, use, report)
            if self.random.random() < 0.2:  # once more, and late
                report = self.random.choice([Report.SENT, Report.REJECTED])
                self.after(5 * SECOND, self.reported, process, use, report)

    def reported(self, process: Process, use: Use, report: Report) -> None:
        if process.alive and not process.stopped:
            if report is not Report.UNUSED:
                use.at_us = min(use.at_us, self.now_us)
            if report is Report.UNUSED:
                self.granted_period[use.permit.period] -= 1
            process.report(use, report)

    # --- Discord ----------------------------------------------------------------------------------

    def identify(self) -> None:
        """Let Discord count an IDENTIFY; its period begins with the first one after a reset."""
        if not self.discord or self.now_us >= self.discord[0] + self.period_us:
            self.discord = []
        self.discord.append(self.now_us)
        unsure = self.was_lost or self.clock_was_set or self.wall_was_set or self.was_forgotten
        if self.reads and not unsure:
            self.check(
                len(self.discord) <= self.total, "Discord counts more session starts than the limit"
            )

    def discord_answer(self, asked_us: int) -> SessionStartLimit:
        """Return what Discord says of a moment, a little late."""
        starts = [at_us for at_us in self.discord if at_us <= asked_us]
        if not starts or asked_us >= starts[0] + self.period_us:
            return SessionStartLimit(self.total, self.total, 0.0, self.max_concurrency)
        resets_in = (starts[0] + self.period_us - asked_us) / SECOND
        left = max(0, self.total - len(starts))
        return SessionStartLimit(self.total, left, resets_in, self.max_concurrency)

    def read_limit(self, process: Process) -> None:
        process.reading, asked_us = True, process.now_us()
        at_us = self.now_us - self.random.choice([0, 600_000])

        def done() -> None:
            process.reading = False
            if process.alive and not process.stopped:
                if self.quiet or self.random.random() < 0.7:
                    process.can_read = True
                    answer = self.discord_answer(at_us + took_us)
                    process.session.change_limit(answer, process.now_us(), messages.READ, asked_us)
                else:
                    process.can_read = False
                    self.after(3 * SECOND, rested)
                process.pump()

        def rested() -> None:
            process.can_read = True
            process.pump()

        took_us = self.random.choice([10_000, 10_000, SECOND, 15 * SECOND])
        self.after(took_us, done)

    # --- the walk ---------------------------------------------------------------------------------

    def step(self) -> None:  # noqa: C901 - a list of what may happen
        """Let something happen."""
        rng = self.random
        alive = [one for one in self.processes if one.alive]
        process = rng.choice(alive)
        kind = rng.random()
        if kind < 0.75 or not self.faults:
            if not process.stopped:
                process.join(
                    rng.randint(0, 5),
                    once=rng.random() < 0.1,
                    priority_us=rng.choice([0, 0, 0, SECOND]),
                )
        elif kind < 0.80:
            if not process.stopped:
                self.stop(process, rng.choice([100_000, 2 * SECOND, 70 * SECOND]))
        elif kind < 0.83 and len(alive) > len(self.queues_of(process)):
            self.kill(process)
        elif kind < 0.86 and len(self.processes) < 5 and not process.stopped:
            self.fork(process)
        elif kind < 0.89:
            self.snapshot, self.had_account = self.store.copy(), not self.store.is_empty()
            if rng.random() < (
                0.4 if len(self.processes) > 1 else 0.8
            ):  # while what is lost matters
                self.after(rng.randint(1_000, 3 * SECOND), self.go_back)
        elif kind < 0.91:
            self.go_back()
        elif kind < 0.94:
            self.make_silent(process)
        elif kind < 0.95 and not self.was_lost:
            self.log("the ledger's clock is set back")
            self.clock_was_set = True
            self.ledger_offset_us -= rng.choice([3_600, 20]) * SECOND
        elif kind < 0.955:
            self.log("the ledger's wall clock is set")
            self.wall_was_set = True
            self.wall_offset_us += rng.choice([-3_600, -20, 5, 3_600]) * SECOND
        elif kind < 0.98 and self.updates and not process.stopped:
            self.update(process)
        elif 0.98 <= kind < 0.985 and (self.updates or self.reads) and not process.stopped:
            self.forget_limit(process)

    def stop(self, process: Process, for_us: int) -> None:
        for one in self.queues_of(process):
            self.log(f"{one.name} stops")
            one.stopped = True
            self.after(for_us, self.resume, one)

    def make_silent(self, process: Process) -> None:
        """Let the ledger believe that it has not heard of a session for a minute."""
        session = process.session._id
        if self.store.silence(session, self.ledger_now_us()):
            self.log(f"{process.name} counts as silent")
            self.forget(process)
            self.silenced[session] = self.now_us

    def go_back(self) -> None:
        """Let the ledger lose requests; with one process that is left for the rules to notice."""
        if self.quiet or (not self.had_account and self.random.random() < 0.5):
            return
        self.log("the ledger goes back to an older state")
        self.store.restore(self.snapshot)
        self.was_lost = True
        self.lost = len(self.processes) > 1
        self.unaccounted.clear()
        self.lost_us = self.now_us
        for use in self.uses:  # the ledger may have lost holds, too
            use.at_us = min(use.at_us, self.now_us)

    def update(self, process: Process) -> None:
        self.max_concurrency = self.random.choice([1, 2, 4])
        limit = SessionStartLimit(self.total, self.total, 60.0, self.max_concurrency)
        self.log(f"{process.name} updates to {self.max_concurrency} buckets")
        process.session.change_limit(limit, process.now_us())
        process.pump()

    def forget_limit(self, process: Process) -> None:
        """Forget the limit. If nobody reads it within a minute, Discord's default counts."""
        self.log(f"{process.name} has the limit forgotten")
        self.was_forgotten = True
        limit = SessionStartLimit(1, 1, 0.0, 1)
        process.session.change_limit(limit, process.now_us(), messages.FORGET)
        process.pump()

    def walk(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            waits_us = [0, 1_000, 100_000, 400_000, 2 * SECOND]
            long = self.random.random() < self.long_waits
            self.run(self.now_us + (70 * SECOND if long else self.random.choice(waits_us)))
        self.settle()

    def settle(self) -> None:
        """Let all faults end; then everybody must get a permit, and nothing may be left over."""
        self.log("--- quiet")
        self.quiet, self.quiet_us = True, self.now_us
        rogue = getattr(self, "rogue_process", None)
        if rogue is not None:
            rogue.alive = False
        for process in self.processes:
            self.resume(process)
            process.lines.waiters = [one for one in process.lines.waiters if not one.once]
            for bucket in process.lines.buckets():
                process.session.changed(bucket)
            process.session._all = True
            process.pump()
        alive = [one for one in self.processes if one.alive]
        waiting = sum(len(one.lines.waiters) for one in alive)
        window_us = self.interval_us + 2 * SECOND + max(self.holds)
        # rejections, losses that are noticed one after another, dead sessions, limits, pauses
        self.run(self.now_us + 75 * SECOND)
        limit_us = (waiting // self.total + 2) * (self.period_us + 15 * SECOND)
        end_us = self.now_us + waiting * window_us + 130 * SECOND + limit_us
        while self.now_us < end_us and any(one.lines.waiters for one in alive):
            self.run(self.now_us + 5 * SECOND)
        starving = [(one.name, len(one.lines.waiters)) for one in alive if one.lines.waiters]
        self.check(not starving, f"some got no permit: {starving}")
        self.run(self.now_us + 5 * SECOND)
        for process in alive:
            rows = [one for one in self.lines() if one.session == process.session._id]
            self.check(
                not rows or self.was_lost, f"{process.name} has left, but not its lines: {rows[:2]}"
            )
        for _ in range(2):  # requests remove what dead processes have left
            self.run(self.now_us + 62 * SECOND)
            for process in alive * 3:
                process.session.look()
                process.pump()
                self.run(self.now_us + SECOND)
        self.check_stored(alive)

    def lines(self) -> list[LineRow]:
        """Return the lines of all buckets that are live."""
        return self.store.all_live(self.ledger_now_us())

    def check_stored(self, alive: list[Process]) -> None:
        lines = self.lines()
        self.check(not lines, f"lines are live without their processes: {lines[:2]}")
        ids = {one.session._id for one in alive}
        left = self.store.sessions() - ids
        self.check(not left or self.clock_was_set, f"sessions are left over: {left}")
        if not self.was_lost:
            self.check(not self.unaccounted, f"permits went nowhere: {self.unaccounted}")


def walk(seed: int, server: redis.Redis | None = None, steps: int = 60) -> World:
    """Walk once, on a ledger in memory or in a server; a ``Violation`` has a trace in its notes."""
    store = MemoryStore() if server is None else RedisStore(server)
    world = World(seed, store)
    try:
        world.walk(steps)
    except Exception as error:
        error.add_note("\n".join(world.trace[-60:]))
        error.add_note(f"seed {seed}, steps {steps}: {settings_of(world)}")
        raise
    finally:
        store.close()
    return world


def settings_of(world: World) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(world).items()
        if isinstance(value, int | float | bool) and name not in ("counter", "now_us")
    }


# --- defects --------------------------------------------------------------------------------------

TURNS, SESSION, BOUNDS, ROWS = "turns", "session", "bounds", "rows"
SCRIPT = "script"  # answer.lua: these defects are looked for in a server
REPLAY = (
    "    if row is not None and row.number == request.number:\n",
    "    if row is None and request.number < 0:\n",
)
SENDS = "        self._in_flight = request._replace(attempt=self._attempt, "
FIRST_SEND = """    def _first(self, request, now_us):
        if not request.attempt:
            self._first_us = now_us

"""
DEFECTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "number check dropped": (
        TURNS,
        [REPLAY, ("if request.number == row.number + 1:", "if request.number >= 1:")],
    ),
    "stored reply not kept": (
        TURNS,
        [
            (
                "permits=tuple(one._replace(age_us=one.age_us + since_us) for one in reply.permits)",
                "permits=()",
            )
        ],
    ),
    "refund repeated after an introduction": (
        SESSION,
        [
            (
                "if report.kind != messages.UNUSED)\n        self._reports.extendleft",
                "if True)\n        self._reports.extendleft",
            ),
            (
                "self._reports.extendleft(reversed(list(kept)))\n        self._drop_refunds()",
                "self._reports.extendleft(reversed(list(kept)))",
            ),
        ],
    ),
    "gap ignored": (
        TURNS,
        [("if request.number == row.number + 1:", "if request.number > row.number:")],
    ),
    "age taken from the first send": (
        SESSION,
        [
            (
                "age_us = now_us - (request.sent_us - one.age_us)",
                "age_us = now_us - (self._first_us - one.age_us)",
            ),
            (
                SENDS,
                "        self._first(request, now_us)\n" + SENDS,
            ),
            (
                "    def _new_request(",
                FIRST_SEND + "    def _new_request(",
            ),
        ],
    ),
    "age of a repeated reply not recomputed": (
        TURNS,
        [("one._replace(age_us=one.age_us + since_us)", "one._replace(age_us=one.age_us)")],
    ),
    "age taken from a later send for an earlier reply": (
        SESSION,
        [
            (
                "not request.attempt == reply.attempt == in_flight.attempt:",
                "reply.number != in_flight.number:",
            )
        ],
    ),
    "writes in the old order": ("store", []),
    "grace of 0": (TURNS, [("MAX_GRACE_US = US_PER_SECOND // 10", "MAX_GRACE_US = 0")]),
    "lease unbounded": (BOUNDS, [("MAX_LEASE_US = 60 *", "MAX_LEASE_US = 1_000_000 *")]),
    "interval unbounded": (BOUNDS, [("MAX_INTERVAL_US = 60 *", "MAX_INTERVAL_US = 1_000_000 *")]),
    "margin not checked": (
        SESSION,
        [
            (
                "if self.margin_us and age_us > self._round_trips.margin_us:",
                "if self.margin_us < 0:",
            )
        ],
    ),
    "no window after a loss": (
        ROWS,
        [
            (
                "default_bucket.last_us = self.now_us",
                "default_bucket.last_us = -(1 << 62)",
            )
        ],
    ),
    "lines outlive another number of buckets": (
        ROWS,
        [("account.buckets, account.max_concurrency = {}, ", "account.max_concurrency = ")],
    ),
    "silent sessions are known": (
        TURNS,
        [("self.now_us - row.last_request_us > SILENT_US", "self.now_us < 0")],
    ),
    "permits from before a loss are refunded": (
        TURNS,
        [("0 <= account.period - report.period < MAX_PERIODS_BACK", "True")],
    ),
    "hold not kept": (TURNS, [("bucket.hold_us = head.hold_us", "bucket.hold_us = 0")]),
    "a result is stored over what has changed": (
        SCRIPT,
        [("if ARGV[2] == 'store' and ARGV[3] == changed then", "if ARGV[2] == 'store' then")],
    ),
    "number check of the script dropped": (
        SCRIPT,
        [("request.number == number + 1 and", "request.number >= 1 and")],
    ),
    "a claim lasts for ever": (
        SCRIPT,
        [
            (", 'PX', whole(min(max(1000, 2 * trip_ms), 4000))", ""),
            ("if claim then write('UNLINK', CLAIM) end\n", ""),
        ],
    ),
}


def mutated(module: ModuleType, changes: list[tuple[str, str]]) -> ModuleType:
    """Return a copy of a module with changes in its source."""
    source = inspect.getsource(module)
    for old, new in changes:
        assert source.count(old) == 1, f"{module.__name__} has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    copy = ModuleType(module.__name__)
    copy.__file__ = module.__file__
    exec(compile(source, str(module.__file__), "exec"), vars(copy))
    return copy


def changed_script(changes: list[tuple[str, str]]) -> dict[str, str]:
    """Return ``answer.lua`` with changes in its source, and its digest."""
    source = redis_module.SCRIPT
    for old, new in changes:
        assert source.count(old) == 1, f"answer.lua has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    return {"SCRIPT": source, "SHA1": hashlib.sha1(source.encode()).hexdigest()}


@contextlib.contextmanager
def defect(name: str) -> Iterator[None]:
    """Let the code have a defect."""
    where, changes = DEFECTS[name]
    if where == TURNS:
        patch = mock.patch.object(memory_store, "turns", mutated(turns, changes))
    elif where == SESSION:
        patch = mock.patch.object(
            sys.modules[__name__], "session_module", mutated(session_module, changes)
        )
    elif where == ROWS:
        patch = mock.patch.object(turns, "Rows", mutated(rows, changes).Rows)
    elif where == SCRIPT:
        patch = mock.patch.multiple(redis_module, **changed_script(changes))
    elif where == BOUNDS:
        patch = mock.patch.object(turns, "refusal", mutated(bounds, changes).refusal)
    else:
        patch = mock.patch.object(MemoryStore, "rolls_back", False)
    with patch:
        yield


def find(
    name: str, seed: int, walks: int, server: redis.Redis | None = None
) -> tuple[int, Exception] | None:
    """Walk with a defect until it is found; return after how many walks, and how."""
    with defect(name):
        for count in range(walks):
            try:
                walk(seed + count, server)
            except Exception as error:  # noqa: BLE001 - a defect may break anything
                return count + 1, error
    return None


def find_all(seed: int, walks: int, server: redis.Redis | None) -> bool:
    """Confirm that each defect is found, and print after how many seconds, in which walk and how."""
    found_all = True
    for name, (where, _) in DEFECTS.items():
        if where == SCRIPT and server is None:
            print(f"{name:48} SKIPPED: {redis_servers.WITHOUT}")
            continue
        began = time.monotonic()
        found = find(name, seed, walks, server if where == SCRIPT else None)
        took = f"{name:48} {time.monotonic() - began:6.1f} s"
        found_all = found_all and found is not None
        if found is None:
            print(f"{took}  NOT FOUND in {walks} walks", flush=True)
        else:
            print(f"{took}  walk {found[0]:4}  {found[1]!s:.70}", flush=True)
    return found_all


@contextlib.contextmanager
def running_server() -> Iterator[redis.Redis | None]:
    """Run a server as long as a test needs it; ``None`` if there is none to run."""
    if redis_servers.BINARY is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        server = redis_servers.RedisServer(Path(folder))
        try:
            with server.client() as client:
                yield client
        finally:
            server.stop()


def main() -> None:
    """Walk for some time from a new seed, which is printed; half of it on each kind of ledger."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ledger", choices=["memory", "redis"], help="walk on this one only")
    parser.add_argument("--defects", action="store_true", help="confirm that defects are found")
    wanted = parser.parse_args()
    seed = secrets.randbits(40) if wanted.seed is None else wanted.seed
    print(f"seed {seed}", flush=True)
    with running_server() as server:
        if wanted.defects:
            sys.exit(not find_all(seed, 3000, server))
        ledgers = {"memory": None, "redis": server}
        if wanted.ledger:
            ledgers = {wanted.ledger: ledgers[wanted.ledger]}
        if server is None and ledgers.pop("redis", "none") is None:
            print(f"redis: SKIPPED, {redis_servers.WITHOUT}", flush=True)
        for name, where in ledgers.items():
            deadline, count = time.monotonic() + wanted.seconds / len(ledgers), 0
            while time.monotonic() < deadline:
                walk(seed + count, where, wanted.steps)
                count += 1
            print(f"{name}: {count} walks, no violation", flush=True)


if __name__ == "__main__":
    main()
