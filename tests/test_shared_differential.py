"""The rules of turns in Python and in Lua give the same replies to the same requests."""

from __future__ import annotations

import json
import os
import random
import secrets
from dataclasses import asdict, dataclass, field

import pytest
from memory_store import MemoryStore
from redis_servers import RedisServer, needs_redis
from redis_store import SetClock

from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.bounds import check_reply
from gateway_queue_sync.ledgers.shared.messages import (
    Introduction,
    Limit,
    Line,
    Reply,
    Report,
    Request,
    Waiter,
)
from gateway_queue_sync.ledgers.shared.redis import RedisBackend
from gateway_queue_sync.ledgers.shared.store import SharedBucket

pytestmark = [needs_redis, pytest.mark.slow]

S = 1_000_000
LIVES = 30  # accounts, one after the other; the environment may say another number
REQUESTS = 400  # in each
DEFAULTS = ("last_us", "hold_us", "closed_until_us", "rejections")


@dataclass
class Speaker:
    """A session that says anything, often sensible."""

    session: str
    offset_us: int
    number: int = 0
    layout: int = 0
    latest: Request | None = None
    permits: list[messages.Granted] = field(default_factory=list)


class World:
    """What an account hears from some sessions, drawn by chance."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.now_us = self.wall_us = 1_700_000_000 * S
        self.attempt = self.waiter = 0
        self.reply: Reply | None = None
        self.buckets = dice.choice((1, 1, 2, 4))
        self.reads = dice.random() < 0.6
        self.total = dice.choice((3, 10, 1000))
        self.period_us = dice.choice((20, 100, 3600)) * S
        self.interval_us = dice.choice((S, S, S, S // 5, S // 20))
        self.rude = dice.choice((0.0, 0.02, 0.1))
        self.speakers = [self.speaker() for _ in range(dice.choice((1, 2, 3, 6, 12)))]

    def speaker(self) -> Speaker:
        return Speaker(f"{self.dice.getrandbits(64):016x}", self.dice.choice((0, -50 * S, 7 * S)))

    def later(self) -> None:
        dice = self.dice
        step_us = dice.choice((0, 1, 1_000, 40_000, 100_000, 300_000, S, 2 * S, 5 * S))
        if dice.random() < 0.02:
            step_us = dice.choice((20, 61, 130, 4000)) * S
        self.now_us += step_us
        self.wall_us += step_us
        if dice.random() < 0.01:
            self.wall_us += dice.choice((-3600, -100, -5, 5, 100)) * S
        if dice.random() < 0.015:
            self.now_us -= dice.choice((S // 10, 3 * S, 70 * S, 3600 * S))

    def rudely(self, value: int) -> int:
        """Return a value, or sometimes one that nobody should say."""
        if self.dice.random() < self.rude / 20:
            return self.dice.choice((-1, 0, 1, 1 << 52, (1 << 52) + 1, value + 1, 10**9))
        return value

    def limit(self, kind: int, now_us: int) -> Limit:
        dice = self.dice
        total = self.rudely(dice.choice((self.total, self.total, self.total, 5)))
        remaining = total if dice.random() < 0.3 else dice.randint(0, max(0, total))
        if self.reply is not None and dice.random() < 0.6:
            remaining = min(total, max(0, self.reply.remaining + dice.choice((0, 0, 1, -1, 5))))
        resets_us = dice.choice((0, 0, S, 30 * S, self.period_us))
        if self.reply is not None and dice.random() < 0.5:
            resets_us = max(0, self.reply.resets_in_us + dice.choice((0, 0, -S, 299 * S, 500 * S)))
        buckets = self.rudely(self.buckets if dice.random() < 0.9 else dice.choice((1, 2, 3, 4)))
        at_us = now_us - dice.choice((0, 0, 1000, 2 * S, -S))
        asked_us = at_us - dice.choice((0, 50_000, 4 * S, 90 * S))
        return Limit(kind, total, self.rudely(remaining), resets_us, buckets, asked_us, at_us)

    def waiters(self, speaker: Speaker, bucket: int, now_us: int) -> tuple[Waiter, ...]:
        dice, made = self.dice, []
        buckets = self.buckets if self.reply is None else self.reply.max_concurrency
        for _ in range(dice.choice((0, 1, 1, 1, 2, 2) if dice.random() > self.rude / 8 else (3,))):
            if speaker.latest and speaker.latest.lines and dice.random() < 0.6:
                waiters = dice.choice(speaker.latest.lines).waiters
                if waiters:
                    made.append(dice.choice(waiters)._replace(once=int(dice.random() < 0.1)))
                    continue
            self.waiter += 1
            shard_id = self.rudely(bucket + buckets * dice.randint(0, 3))
            arrived_us = self.rudely(now_us - dice.choice((0, 0, 1000, S, 60 * S)))
            position_us = self.rudely(arrived_us) - dice.choice((0, 0, 0, 10 * S, -S))
            if dice.random() < 0.3:  # so that some are equal, by the ledger's clock
                position_us -= position_us % (5 * S)
            once = int(dice.random() < 0.15)
            hold_us = self.rudely(dice.choice((0, 0, 0, 3 * S, 10 * S)))
            made.append(Waiter(self.waiter, shard_id, arrived_us, position_us, once, hold_us))
        return tuple(made)

    def lines(self, speaker: Speaker, now_us: int) -> tuple[Line, ...]:
        dice = self.dice
        buckets = self.buckets if self.reply is None else self.reply.max_concurrency
        if dice.random() < 0.25:
            return ()
        chosen = dice.sample(range(buckets), dice.randint(1, min(3, buckets)))
        if dice.random() < self.rude / 4:
            chosen.append(dice.choice((0, buckets, 99_999, 100_001)))
        return tuple(
            Line(one, self.rudely(dice.choice((0, 0, 1, 30))), self.waiters(speaker, one, now_us))
            for one in chosen
        )

    def reports(self, speaker: Speaker, now_us: int) -> tuple[Report, ...]:
        dice, made = self.dice, []
        while dice.random() < 0.35:
            if speaker.permits and dice.random() < 0.9:
                permit = dice.choice(speaker.permits[-4:])
                serial, shard_id, period = permit.serial, permit.shard_id, permit.period
            else:
                serial, shard_id, period = dice.randint(1, 50), dice.randint(0, 9), 1
            at_us = now_us - dice.choice((0, 0, 1000, S, 20 * S, -S))
            kind = self.rudely(dice.choice((0, 0, 1, 2)))
            made.append(Report(kind, self.rudely(serial), shard_id, period, at_us))
        return tuple(made)

    def introduction(self, speaker: Speaker, now_us: int) -> Introduction:
        dice, reply = self.dice, self.reply
        granted = 0 if reply is None else reply.granted
        period = 0 if reply is None else reply.period
        more = dice.choice((1, 5)) if dice.random() < 0.1 else 0
        given = self.limit(messages.OPEN, now_us)
        return Introduction(
            replaces=dice.choice(("", "", dice.choice(self.speakers).session)),
            bot=dice.choice(("", "", "123456789012345678", "1" if dice.random() < 0.1 else "")),
            limit=given if not self.reads or dice.random() < 0.2 else None,
            granted=self.rudely(dice.choice((0, granted)) + more),
            period=self.rudely(dice.choice((0, period, period + 1))),
            layout=self.rudely(speaker.layout + more),
            seen=self.limit(messages.OPEN, now_us) if dice.random() < 0.3 else None,
        )

    def request(self) -> tuple[Speaker, Request]:
        dice = self.dice
        if dice.random() < 0.01:
            self.speakers[dice.randrange(len(self.speakers))] = self.speaker()
        speaker = dice.choice(self.speakers)
        now_us = self.now_us + speaker.offset_us
        self.attempt += 1
        sent_us = now_us - dice.choice((0, 0, 0, 500, 300_000))
        if speaker.latest is not None and dice.random() < 0.15:
            again = speaker.latest._replace(attempt=self.attempt, sent_us=sent_us)
            return speaker, again._replace(look=int(dice.random() < 0.3))
        introduces = speaker.number == 0 or dice.random() < self.rude / 10
        number = 1 if introduces else speaker.number + 1
        if dice.random() < self.rude / 4:
            number = self.rudely(max(1, number + dice.choice((-2, -1, 1))))
        limit = None
        if dice.random() < 0.12:
            limit = self.limit(
                dice.choice((messages.UPDATE, 1, messages.READ, 2, 2, 2, 2, messages.FORGET)),
                now_us,
            )
        plain = introduces and dice.random() < 0.8
        return speaker, Request(
            attempt=self.attempt,
            sent_us=sent_us,
            session="" if dice.random() < 0.02 else speaker.session,
            number=number,
            interval_us=self.rudely(self.interval_us * dice.choice((1, 1, 1, 1, 1, 3))),
            margin_us=self.rudely(dice.choice((50_000, 50_000, 50_000, 250_000))),
            period_us=self.rudely(self.period_us),
            lease_us=self.rudely(dice.choice((S, 5 * S))),
            reserve=self.rudely(dice.choice((0, 0, 1))),
            reread_us=self.rudely(dice.choice((0, 10 * S, 600 * S))),
            can_read=int(self.reads and dice.random() < 0.7),
            look=int(dice.random() < 0.1),
            layout=speaker.layout if dice.random() < 0.97 else speaker.layout + 1,
            lines=() if plain else self.lines(speaker, now_us),
            reports=() if plain else self.reports(speaker, now_us),
            limit=None if plain else limit,
            introduction=self.introduction(speaker, now_us) if introduces else None,
        )

    def heard(self, speaker: Speaker, request: Request, reply: Reply) -> None:
        self.reply = reply
        if request.session != speaker.session:
            return
        if reply.status == messages.INTRODUCE:
            speaker.number, speaker.latest = 0, None
            if self.dice.random() < 0.8:
                speaker.session = f"{self.dice.getrandbits(64):016x}"
        elif reply.status == messages.OK:
            speaker.number, speaker.layout, speaker.latest = request.number, reply.layout, request
            speaker.permits += reply.permits


def stored_in_python(store: MemoryStore) -> dict[str, object]:
    account = store._account
    if account is None:
        return {}
    flat = asdict(account)
    for name in ("patience_us", "buckets", "recent"):
        del flat[name]
    default = flat.pop("default_bucket")
    flat |= {name: default[name] for name in DEFAULTS}
    flat["other_reset_us"], flat["other_read_us"] = flat.pop("other_reset") or (None, None)
    flat["refresh_owed"] = int(flat["refresh_owed"])
    if flat["read_due_us"] > 1 << 59:
        flat["read_due_us"] = 1 << 60
    return {
        "account": flat,
        "bucket": {number: as_stored(one) for number, one in store._buckets.items()},
        "session": {
            row.session: [row.number, row.last_request_us, row.reply]
            for row in store._sessions.values()
        },
        "recent": dict(store._recent),
    }


def as_stored(bucket: SharedBucket) -> dict[str, object]:
    return asdict(bucket) | {"lines": sorted(row.text() for row in bucket.lines)}


def stored_in_redis(client, name: str) -> dict[str, object]:
    def key(part: str) -> str:
        return f"gateway_queue_sync:{{{name}}}:{part}"

    ledger = {part: json.loads(text) for part, text in client.hgetall(key("ledger")).items()}
    if not ledger:
        assert not client.keys(key("*"))
        return {}
    account = {
        part: None if value is False else value for part, value in ledger.pop("account").items()
    }
    for part in ("version", "run", "replid", "changed", "created"):
        del account[part]
    account |= {part: account.pop(f"default_{part}") for part in DEFAULTS}
    if account["read_due_us"] > 1 << 59:
        account["read_due_us"] = 1 << 60
    sessions = {}
    for session_key in client.keys(key("session:*")):
        number, last_request_us, _, reply = client.get(session_key).split(" ", 3)
        assert 0 < client.pttl(session_key) <= 60_000
        sessions[session_key.rpartition(":")[2]] = [int(number), int(last_request_us), reply]
    assert not client.exists(key("probe"), key("claim"))
    return {
        "account": account,
        "bucket": {
            int(number): row | {"lines": sorted(row["lines"])} for number, row in ledger.items()
        },
        "session": sessions,
        "recent": {
            int(serial): int(at)
            for serial, at in client.zrange(key("recent"), 0, -1, withscores=True)
        },
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


def test_python_and_lua_give_the_same_replies_and_store_the_same(server, capsys, monkeypatch):
    """All replies fit their requests, but if a process says two things under one number."""
    monkeypatch.setattr("gateway_queue_sync.ledgers.shared.redis.check_reply", lambda *_: None)
    seed = int(os.environ.get("SEED") or secrets.randbits(40))
    with capsys.disabled():
        print(f"\nseed {seed}")
    kinds = set()
    with server.client(decode_responses=True) as client:
        for life in range(int(os.environ.get("LIVES") or LIVES)):
            kinds |= live_once(seed + life, client)
    assert kinds >= {
        "granted", "window", "budget", "reset", "introduce", "refused", "lost", "read", "uncounted",
        "rejected", "looked", "replayed", "not applied", "forgotten", "differs",
    }  # fmt: skip


def assert_same(found: dict[str, object], expected: dict[str, object], at: str) -> None:
    assert found.keys() == expected.keys(), at
    for part, rows in expected.items():
        different = {
            key: (found[part].get(key), rows.get(key))
            for key in rows.keys() | found[part].keys()
            if found[part].get(key) != rows.get(key)
        }
        assert not different, f"{part}: (Redis, Python) {different}, after {at}"


def live_once(seed: int, client) -> set[str]:
    world, store, clock, name, kinds = World(seed), MemoryStore(), SetClock(), f"t{seed}", set()
    backend, store.keeps_silent = RedisBackend(client, name, clock), True
    lost = (
        False  # known to the server; stored with the next request, but not with a look or a refusal
    )
    applied: dict[str, tuple[Line, ...]] = {}  # what each session has asked under its latest number
    for count in range(REQUESTS):
        world.later()
        clock.now, clock.wall = world.now_us, world.wall_us
        speaker, request = world.request()
        if world.dice.random() < 0.005 and store._account is not None:
            lost = True
            where = f"gateway_queue_sync:{{{name}}}:ledger"
            account = json.loads(client.hget(where, "account"))
            account[world.dice.choice(("run", "replid"))] = "another"
            client.hset(where, "account", json.dumps(account))
        row = store._sessions.get(request.session)
        repeats = row is not None and row.number == request.number
        before = stored_in_python(store)
        expected = store.answer(request, world.now_us, world.wall_us, lost=lost)
        lost = lost and (not request.session or expected.status == messages.REFUSED)
        reply = backend.ask(request)
        at = f"life {seed}, request {count}: {request}"
        assert reply == expected, at
        if not repeats and reply.status == messages.OK:
            applied[request.session] = request.lines
        if not repeats or applied[request.session] == request.lines:
            check_reply(request, reply)
        if count % 20 == 19 or count == REQUESTS - 1 or os.environ.get("EACH"):
            assert_same(stored_in_redis(client, name), stored_in_python(store), at)
        kinds |= kinds_of(reply)
        if speaker.latest is not None and speaker.latest.number == request.number:
            kinds |= {"replayed"} if before == stored_in_python(store) else set()
        world.heard(speaker, request, reply)
    for key in client.keys(f"gateway_queue_sync:{{{name}}}:*"):
        client.delete(key)
    return kinds


def kinds_of(reply: Reply) -> set[str]:
    found = {("window", "budget", "reset")[wait.reason] for wait in reply.waits}
    found |= {("ok", "introduce", "refused")[reply.status]}
    for name, holds in {
        "granted": reply.permits,
        "lost": reply.lost,
        "read": reply.read,
        "uncounted": reply.uncounted > 0,
        "rejected": reply.rejections,
        "looked": reply.look,
        "forgotten": reply.limit_result and reply.total < 0,
        "not applied": reply.limit_result == messages.NOT_APPLIED,
        "differs": reply.differs,
    }.items():
        found |= {name} if holds else set()
    return found
