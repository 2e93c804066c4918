"""The rules exist twice, in Python and in Lua: the same requests, the same answers."""

from __future__ import annotations

import random
import secrets

import pytest
from redis_servers import needs_redis

from gateway_queue_sync.ledgers.shared import Terms
from gateway_queue_sync.ledgers.sqlite import SqliteLedger
from gateway_queue_sync.messages import OUTCOMES, News, Next, Order, Reply, Request, Take
from gateway_queue_sync.models import Permit, SessionStartLimit
from gateway_queue_sync.testing import FakeClock

S = 1_000_000
STEPS = 12_000
LIVES = 12  # accounts, one after the other
seen = set()  # the kinds of answers in all lives
SEED = 20261124


class ServersClock(FakeClock):
    """A clock that may also be set back, as a server's may be."""

    back_us = 0

    def now_us(self) -> int:
        return super().now_us() - self.back_us


class World:
    """Processes that draw on one account in ways that come to nobody's mind."""

    def __init__(self, dice: random.Random, clock: ServersClock) -> None:
        self.dice = dice
        self.clock = clock
        self.owners = [f"{dice.getrandbits(64):016x}" for _ in range(dice.choice((1, 2, 4, 7)))]
        self.period_us = dice.choice((20, 60, 600)) * S
        self.tickets: dict[str, list[tuple[int, int, int, int]]] = {
            name: [] for name in self.owners
        }
        self.granted: dict[str, list[tuple[int, int, int]]] = {name: [] for name in self.owners}
        self.number = 0
        self.last = (1, 0)  # period and granted, as last heard
        self.requests = self.void = 0

    def limit(self) -> SessionStartLimit:
        dice = self.dice
        total = dice.choice((1, 3, 10, 1000))
        reset_after = dice.choice((0.0, 1.5, 20.0, 3600.0))
        return SessionStartLimit(
            total, dice.randint(0, total), reset_after, dice.choice((1, 1, 2, 5))
        )

    def time_goes_by(self) -> None:
        dice = self.dice
        self.clock.advance(dice.choice((0, 0, 0.001, 0.05, 0.1, 0.3, 1.0, 1.0, 5.0)))
        if dice.random() < 0.01:
            self.clock.advance(dice.choice((30, 70, 700, 3000)))
        if dice.random() < 0.01:
            self.clock.set_wall(self.clock.wall_us() / S + dice.uniform(-4000, 4000))
        if dice.random() < 0.004:  # a server's clock may be set back, too
            self.clock.back_us += dice.choice((100_000, 3 * S, 3600 * S))

    def request(self) -> Request:
        dice, owner = self.dice, self.dice.choice(self.owners)
        now_us = self.clock.now_us()
        went_back = dice.random() < 0.02  # the ledger, and has lost permits that the process saw
        return Request(
            owner if dice.random() > 0.02 else "",
            self.request_number(),
            self.void,
            dice.choice((None, now_us, now_us - 1_000, now_us - 7 * S)),
            dice.choice((S, S, S, 2 * S)),
            dice.choice((50_000, 50_000, 250_000)),
            self.period_us,
            dice.choice((1, 5)) * S,
            self.limit(),
            self.last[0] + (dice.random() < 0.1),
            self.last[1] + went_back,
            tuple(
                self.news(owner, now_us)
                for _ in range(12 if went_back else dice.choice((0, 0, 1, 1, 3)))
            ),
            self.order() if dice.random() < 0.06 else None,
            self.take(owner, now_us) if dice.random() < 0.75 else None,
            dice.random() < 0.2,
        )

    def request_number(self) -> int:
        self.requests += 1
        if self.dice.random() < 0.02:
            self.void = self.requests - self.dice.choice((0, 1, 5))
        return self.requests - (self.dice.random() < 0.02) * 3

    def order(self) -> Order:
        kind = self.dice.choice(("open", "update", "renew", "renew", "trust"))
        limit = None if kind == "trust" or self.dice.random() < 0.1 else self.limit()
        period, granted = self.last
        return Order(kind, limit, period - (self.dice.random() < 0.2), granted)

    def new_ticket(self, owner: str, now_us: int) -> tuple[int, int, int, int]:
        self.number += 1
        at_us = now_us - self.dice.choice((0, 0, 10_000, 2 * S))
        place_us = at_us - self.dice.choice((0, 0, 0, 30 * S, -5 * S))
        ticket = (self.number, self.dice.randrange(12), at_us, place_us)
        self.tickets[owner].append(ticket)
        return ticket

    def a_ticket(self, owner: str, now_us: int) -> tuple[int, int, int, int]:
        tickets = self.tickets[owner][-6:]
        if not tickets or self.dice.random() < 0.4:
            return self.new_ticket(owner, now_us)
        return self.dice.choice(tickets)

    def take(self, owner: str, now_us: int) -> Take:
        dice = self.dice
        ticket = self.a_ticket(owner, now_us)
        return Take(
            *ticket,
            stays=dice.random() < 0.8,
            reserve=dice.choice((0, 0, 1, 2)),
            can_refresh=dice.random() < 0.3,
            next=Next(*self.new_ticket(owner, now_us)) if dice.random() < 0.3 else None,
        )

    def news(self, owner: str, now_us: int) -> News:
        dice = self.dice
        kind = dice.choice(("joined", "left", "sent", "unused", "rejected"))
        if kind in ("joined", "left") or not self.granted[owner]:
            number, shard_id, at_us, place_us = self.a_ticket(owner, now_us)
            return News(
                "left" if kind == "left" else "joined", number, shard_id, 0, at_us, place_us
            )
        number, shard_id, serial = dice.choice(self.granted[owner][-4:])
        at_us = now_us - dice.choice((0, 20_000, 3 * S))
        return News(kind, number, shard_id, serial + (dice.random() < 0.05), at_us)

    def hear(self, request: Request, reply) -> None:
        self.last = (reply.period, reply.granted)
        if OUTCOMES[reply.outcome.kind] is Permit and request.take is not None:
            take = request.take
            self.granted[request.owner].append((take.ticket, take.shard_id, reply.outcome.serial))


@needs_redis
@pytest.mark.parametrize("life", range(LIVES))
def test_python_and_lua_answer_alike(tmp_path, redis_server, life, monkeypatch):
    from gateway_queue_sync.ledgers.redis import RedisLedger

    dice, clock = random.Random(SEED + life), ServersClock()
    print(f"seed {SEED + life}")
    world, terms = World(dice, clock), Terms(S, 50_000, 60 * S, 5 * S)
    monkeypatch.setattr(secrets, "token_hex", lambda size: "5" * 2 * size)  # one process has both
    python = SqliteLedger(tmp_path / "ledger.sqlite3", "default", terms, clock)
    lua = RedisLedger(redis_server.url, f"life-{life}", terms, clock)
    lua.open(None)
    python.open(None)  # a stranger is told nothing of an account that is not there
    kinds = set()
    for step in range(STEPS // LIVES):
        world.time_goes_by()
        request = world.request()
        ours = python.carry(request)
        theirs = lua.carry(request)
        unlike = {
            name: (mine, others)
            for name, mine, others in zip(Reply.__annotations__, ours, theirs, strict=True)
            if mine != others
        }
        assert not unlike, f"step {step} of seed {SEED + life}: {request}"
        world.hear(request, ours)
        kinds.add(ours.outcome.kind)
    python.close()
    lua.close()
    seen.update(kinds)
    if life == LIVES - 1:
        assert seen == set(range(len(OUTCOMES)))
