"""The gateway that tests run bots against enforces Discord's rules."""

from __future__ import annotations

import json
import time
import urllib.request
from contextlib import contextmanager

import pytest
from gateway import RESUME_PATH, TOKEN, Close, Gateway, Op, Weather
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from gateway_queue_sync import GatewayBotError, SessionStartLimit
from gateway_queue_sync.gateway_bot import GatewayBot

PATIENCE = 20.0
LONG = 60.0  # s: longer than any test takes


class Client:
    def __init__(self, websocket):
        self.websocket = websocket
        self.hello = self.receive()

    def send(self, op, d):
        self.websocket.send(json.dumps({"op": op, "d": d}))

    def receive(self):
        return json.loads(self.websocket.recv(PATIENCE))

    def ask(self, op, d):
        self.send(op, d)
        return self.receive()

    def identify(self, shard=(0, 1), token=TOKEN):
        return self.ask(Op.IDENTIFY, {"token": token, "shard": shard})

    def resume(self, session, token=TOKEN):
        return self.ask(Op.RESUME, {"token": token, "session_id": session, "seq": 1})

    def close_code(self):
        with pytest.raises(ConnectionClosed) as caught:
            self.receive()
        return caught.value.rcvd and caught.value.rcvd.code


@contextmanager
def client(gateway, path=""):
    with connect(gateway.url + path) as websocket:
        yield Client(websocket)


@pytest.fixture
def gateway():
    with Gateway(shards=3, interval=LONG, total=5) as gateway:
        yield gateway


def limit(gateway, token=TOKEN):
    return GatewayBot(token, base_url=gateway.api).session_start_limit()


def test_it_says_hello_and_ready(gateway):
    with client(gateway) as bot:
        assert bot.hello["op"] == Op.HELLO
        assert bot.hello["d"]["heartbeat_interval"] == 40_000
        ready = bot.identify([2, 3])
        assert (ready["op"], ready["t"], ready["d"]["shard"]) == (Op.DISPATCH, "READY", [2, 3])
        gateway.wait_for({2})
    gateway.wait_for(set())


def test_a_bucket_that_identifies_too_soon_gets_invalid_session(gateway):
    with client(gateway) as first, client(gateway) as second:
        assert first.identify([0, 3])["t"] == "READY"
        invalid = second.identify([1, 3])
        assert (invalid["op"], invalid["d"]) == (Op.INVALID_SESSION, False)
    assert (gateway.referee.accepted, gateway.referee.refused) == (1, 1)


def test_an_identify_is_judged_when_it_arrives():
    """The one that is sent first is longer on its way."""
    weather = Weather(jitter=0.5)
    with Gateway(interval=LONG, weather=weather) as gateway, client(gateway) as first:
        with client(gateway) as second:
            gateway.random.uniform = lambda least, most: most
            first.send(Op.IDENTIFY, {"token": TOKEN, "shard": [0, 1]})
            time.sleep(0.1)
            gateway.random.uniform = lambda least, most: least
            assert second.identify()["t"] == "READY"
        assert first.receive()["op"] == Op.INVALID_SESSION


def test_the_session_start_limit_counts_down(gateway):
    assert limit(gateway) == SessionStartLimit(5, 5, 0.0, 1)
    with client(gateway) as bot:
        bot.identify()
    left = limit(gateway)
    assert (left.total, left.remaining) == (5, 4)
    assert 86_000 < left.reset_after <= 86_400


def test_a_bad_token_is_told_so(gateway):
    with client(gateway) as bot, pytest.raises(ConnectionClosed) as caught:
        bot.identify(token="wrong")
    assert caught.value.rcvd.code == Close.AUTHENTICATION_FAILED == 4004
    with pytest.raises(GatewayBotError, match="401"):
        limit(gateway, token="wrong")
    assert gateway.referee.accepted + gateway.referee.refused == 0


@pytest.mark.parametrize("shard", [[3, 3], [-1, 3], [0, 0], [0]])
def test_a_bad_shard_is_told_so(gateway, shard):
    with client(gateway) as bot, pytest.raises(ConnectionClosed) as caught:
        bot.identify(shard)
    assert caught.value.rcvd.code == Close.INVALID_SHARD == 4010


def test_going_past_the_limit_closes_everything_and_resets_the_token(gateway):
    with client(gateway) as first, client(gateway) as second:
        assert first.identify()["t"] == "READY"
        for _ in range(4):
            assert second.identify()["op"] == Op.INVALID_SESSION
        second.send(Op.IDENTIFY, {"token": TOKEN, "shard": [0, 1]})
        assert second.close_code() == first.close_code() == Close.AUTHENTICATION_FAILED
    assert gateway.referee.token_reset
    with client(gateway) as bot, pytest.raises(ConnectionClosed, match="4004"):
        bot.identify()
    with pytest.raises(GatewayBotError, match="401"):
        limit(gateway)


def test_a_session_resumes_unless_its_client_ended_it(gateway):
    with client(gateway) as bot:
        session = bot.identify()["d"]["session_id"]
        bot.websocket.close(4000)
    with client(gateway, RESUME_PATH) as bot:
        assert bot.resume(session)["t"] == "RESUMED"
        bot.websocket.close(1000)
    gateway.wait_for(set())
    with client(gateway, RESUME_PATH) as bot:
        assert bot.resume(session)["op"] == Op.INVALID_SESSION
    assert gateway.referee.accepted == 1


def test_a_session_resumes_only_where_ready_said(gateway):
    with client(gateway) as bot:
        ready = bot.identify()["d"]
        assert ready["resume_gateway_url"] == gateway.url + RESUME_PATH
        bot.websocket.close(4000)
    with client(gateway) as bot:
        assert bot.resume(ready["session_id"])["op"] == Op.INVALID_SESSION
    with client(gateway, RESUME_PATH + "/?v=10") as bot:
        assert bot.resume(ready["session_id"])["t"] == "RESUMED"
    assert gateway.seen["resumed elsewhere"] == 1


def test_a_new_session_may_be_asked_for_a_heartbeat():
    with Gateway(weather=Weather(asked=1.0)) as gateway, client(gateway) as bot:
        assert bot.identify()["t"] == "READY"
        assert bot.receive()["op"] == Op.HEARTBEAT
        assert bot.ask(Op.HEARTBEAT, 1)["op"] == Op.HEARTBEAT_ACK
        assert (gateway.seen["asked"], gateway.seen["heartbeats"]) == (1, 1)


def test_heartbeats_are_answered_and_missed():
    with Gateway(heartbeat=0.2) as gateway, client(gateway) as bot:
        for _ in range(4):
            assert bot.ask(Op.HEARTBEAT, None)["op"] == Op.HEARTBEAT_ACK
            time.sleep(0.15)
        assert bot.close_code() == Close.SESSION_TIMED_OUT


def test_an_identify_that_is_lost_with_its_connection_does_not_count():
    with Gateway(weather=Weather(lost=1.0)) as gateway, client(gateway) as bot:
        with pytest.raises(ConnectionClosed) as caught:
            bot.identify()
        assert caught.value.rcvd is None
        assert (gateway.seen["lost"], gateway.referee.accepted) == (1, 0)
        assert limit(gateway).remaining == 1000


@pytest.mark.parametrize("polite", [True, False])
def test_sessions_lose_their_connection_and_may_be_forgotten(polite):
    weather = Weather(dropped=1.0, dropped_within=0.01, forgotten=1.0)
    with Gateway(weather=weather) as gateway:
        gateway.random.random = lambda: 0.4 if polite else 0.6
        with client(gateway) as bot:
            session = bot.identify()["d"]["session_id"]
            if polite:
                assert bot.receive()["op"] == Op.RECONNECT
                bot.websocket.close(4000)
            else:
                assert bot.close_code() is None
        gateway.wait_for(set())
        with client(gateway, RESUME_PATH) as bot:
            assert bot.resume(session)["op"] == Op.INVALID_SESSION
        assert gateway.seen["not resumed"] == 1


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("nonsense", Close.DECODE_ERROR),
        ("[]", Close.DECODE_ERROR),
        ('{"op": 99, "d": null}', Close.DECODE_ERROR),
        ('{"op": 10, "d": null}', Close.NOT_AUTHENTICATED),
    ],
)
def test_nonsense_is_told_so(gateway, message, code):
    with client(gateway) as bot:
        bot.websocket.send(message)
        assert bot.close_code() == code


def test_other_paths_are_not_found(gateway):
    request = urllib.request.Request(f"{gateway.api}/x", headers={"Authorization": f"Bot {TOKEN}"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=PATIENCE)
    caught.value.close()
    assert caught.value.code == 404
