"""Reading the limit from Discord: from a local server, and without showing the token."""

from __future__ import annotations

import gc
import http.client
import json
import logging
import pickle
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import warnings
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gateway_queue_sync import (
    GatewayBotError,
    LargeBotQueue,
    SessionLimitExhausted,
    SessionStartLimit,
    __version__,
    gateway_bot,
)
from gateway_queue_sync.gateway_bot import MAX_BODY, MAX_RETRY_AFTER, GatewayBot

TOKEN = "not-a.real-token_0123456789"
LIMIT = {"total": 1000, "remaining": 998, "reset_after": 3_600_000, "max_concurrency": 16}
BODY = {"url": "wss://gateway.discord.gg", "shards": 9, "session_start_limit": LIMIT}


# --- a server whose answers a test sets -----------------------------------------------------------


def answer(body, status=200, *, reason=None, length=None, **headers):
    """Answer with a body; a ``length`` that is not the body's makes it look cut off."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def send(request):
        request.send_response(status, reason)
        request.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(data)

    return send


def raw(data):
    """Say just that, be it HTTP or not, and hang up."""
    return lambda request: request.wfile.write(data)


def fall_silent(data=b""):
    """Say that and no more until the client hangs up."""

    def send(request):
        request.wfile.write(data)
        with suppress(ConnectionError):
            request.connection.recv(1)

    return send


def hold(request):
    """Say no more until the client hangs up, whatever it says itself."""
    while request.connection.recv(4096):
        pass


def hangs_up(connection, within):
    """Wait for so many seconds, or until the client hangs up; return whether it did."""
    end = time.monotonic() + within
    with suppress(TimeoutError):
        while (left := end - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(4096):
                return True
    return False


def drip(first, slow, last=b""):
    """Say ``first``, then ``slow`` at one byte each 0.05 s, then ``last``, or until it hangs up."""

    def send(request):
        request.wfile.write(first)
        for byte in slow:
            request.wfile.write(bytes([byte]))
            if hangs_up(request.connection, within=0.05):
                return
        request.wfile.write(last)

    return send


class Request(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self)
        self.server.answers.popleft()(self)

    do_CONNECT = do_GET  # noqa: N815 - that is what the base class calls

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """What was asked is in ``requests``; what will be answered is in ``answers``."""

    daemon_threads = False  # so that closing waits for them

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.requests = []
        self.answers = deque()

    def handle_error(self, request, client_address):
        pass  # the client hung up; its error says what that means

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def will(self, *answers):
        self.answers.extend(answers)
        return self


@contextmanager
def serving():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server():
    with serving() as server:
        yield server
        # A request that ran out of time may not have been read yet.
        until(lambda: not server.answers)


@pytest.fixture
def pauses():
    """How long the bot paused between attempts; it does not really."""
    return []


@pytest.fixture
def bot(server, pauses):
    return GatewayBot(TOKEN, base_url=server.url, sleep=pauses.append)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(autouse=True)
def no_token_in_any_log(caplog):
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.get_records("call"):
        assert TOKEN not in logging.Formatter().format(record)


@pytest.fixture(autouse=True)
def no_timer_is_left():
    yield
    assert not timers()


def timers():
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


# --- asking ---------------------------------------------------------------------------------------


def test_the_limit_is_read_from_the_body(server, bot):
    server.will(answer(BODY))
    assert bot.session_start_limit() == SessionStartLimit(1000, 998, 3600.0, 16)


def test_a_proxy_that_passes_on_the_limit_alone_will_do(server, bot):
    server.will(answer(LIMIT))
    assert bot.session_start_limit() == SessionStartLimit(1000, 998, 3600.0, 16)


def test_the_request_is_what_discord_asks_for(server, bot):
    server.will(answer(BODY))
    bot.session_start_limit()
    (request,) = server.requests
    assert request.headers.get_all("Authorization") == [f"Bot {TOKEN}"]
    assert request.headers["Accept"] == "application/json"


def test_the_user_agent_is_of_discords_form_and_has_our_version(server, bot):
    server.will(answer(BODY))
    bot.session_start_limit()
    agent = server.requests[0].headers["User-Agent"]
    assert agent.startswith("DiscordBot (")
    assert agent.endswith(f", {__version__})")


@pytest.mark.parametrize("written", [f"Bot {TOKEN}", f"  {TOKEN}\n", f"Bot  {TOKEN} "])
def test_a_token_may_come_with_its_prefix_and_with_blanks_around_it(server, written):
    server.will(answer(BODY))
    GatewayBot(written, base_url=server.url).session_start_limit()
    assert server.requests[0].headers["Authorization"] == f"Bot {TOKEN}"


@pytest.mark.parametrize(
    ("after_host", "path"),
    [
        ("", "/gateway/bot"),
        ("/", "/gateway/bot"),
        ("/api/v10", "/api/v10/gateway/bot"),
        ("/api/v10/", "/api/v10/gateway/bot"),
    ],
)
def test_the_base_url_may_have_a_path_and_end_in_a_slash(server, after_host, path):
    server.will(answer(BODY))
    GatewayBot(TOKEN, base_url=server.url + after_host).session_start_limit()
    assert server.requests[0].path == path


def test_each_call_asks_anew(server, bot):
    server.will(answer(LIMIT), answer(LIMIT | {"remaining": 7}))
    assert [bot.session_start_limit().remaining for _ in range(2)] == [998, 7]


def test_discord_is_asked_unless_told_otherwise():
    assert repr(GatewayBot(TOKEN)) == "GatewayBot(host='discord.com')"


# --- refusals that no patience helps against ------------------------------------------------------


def test_a_wrong_token_is_called_that_at_once(server, bot, pauses):
    server.will(answer({"message": "401: Unauthorized", "code": 0}, 401))
    with pytest.raises(GatewayBotError, match=r"^the token is wrong: 127\.0\.0\.1:\d+ ") as caught:
        bot.session_start_limit()
    assert caught.value.status == 401
    assert isinstance(caught.value.__cause__, urllib.error.HTTPError)
    assert pauses == []


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_other_refusals_are_told_at_once(server, bot, pauses, status):
    server.will(answer({}, status, reason="So Be It"))
    with pytest.raises(GatewayBotError, match=rf" answered {status} So Be It$") as caught:
        bot.session_start_limit()
    assert caught.value.status == status
    assert isinstance(caught.value.__cause__, urllib.error.HTTPError)
    assert pauses == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server, bot, pauses, status):
    """The token would go wherever it points."""
    with serving() as elsewhere:
        server.will(answer({}, status, Location=elsewhere.url + "/gateway/bot"))
        with pytest.raises(GatewayBotError, match=rf" answered {status} ") as caught:
            bot.session_start_limit()
        assert caught.value.status == status
        assert elsewhere.requests == []
    assert pauses == []


# --- rate limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("asked", ["0", "1.5", "65", str(MAX_RETRY_AFTER)])
def test_a_server_that_asks_to_wait_is_asked_again_after_that_time(
    server, bot, pauses, asked, status
):
    server.will(answer({"retry_after": 7}, status, Retry_After=asked), answer(BODY))
    assert bot.session_start_limit().remaining == 998
    assert pauses == [float(asked)]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "asked", [None, "", "soon", "-1", "nan", "inf", "Wed, 21 Oct 2015 07:28:00 GMT"]
)
def test_a_server_that_does_not_say_how_long_to_wait_takes_a_pause_of_ours(
    server, bot, pauses, asked, status
):
    headers = {} if asked is None else {"Retry_After": asked}
    server.will(answer({}, status, **headers), answer(BODY))
    assert bot.session_start_limit().remaining == 998
    (pause,) = pauses
    assert 0.25 <= pause <= 0.5


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, r" limits our rate \(429\) and asks to wait 3600 s$"),
        (503, r" answered 503 and asks to wait 3600 s$"),
    ],
)
def test_a_wait_of_an_hour_is_an_error(server, bot, pauses, status, message):
    server.will(answer({}, status, Retry_After="3600"))
    with pytest.raises(GatewayBotError, match=message) as caught:
        bot.session_start_limit()
    assert (caught.value.status, caught.value.retry_after) == (status, 3600.0)
    assert pauses == []


@pytest.mark.parametrize(
    ("status", "message"), [(429, r" limits our rate \(429\)$"), (503, r" answered 503$")]
)
def test_a_server_that_always_asks_to_wait_is_given_up(server, bot, pauses, status, message):
    server.will(*[answer({}, status, Retry_After="2")] * 5)
    with pytest.raises(GatewayBotError, match=rf"in 5 attempts: .*{message}") as caught:
        bot.session_start_limit()
    assert (caught.value.status, caught.value.retry_after) == (status, 2.0)
    assert pauses == [2.0] * 4


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_an_error_holds_no_wait_that_nobody_asked_for(server, status):
    server.will(*[answer({}, status)] * (1 if status < 429 else 2))
    assert failed(server).retry_after is None


# --- failures that may pass -----------------------------------------------------------------------

FULL = json.dumps(BODY).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n"
FAILURES = {
    "500": answer({}, 500),
    "502": answer(b"<html>", 502),
    "503": answer({}, 503),
    "504": answer({}, 504),
    "no body": answer(b""),
    "no body at all": answer(b"", 204),
    "half a JSON object": answer(FULL[:-9]),
    "no JSON": answer(b"<html>maintenance</html>"),
    "no text": answer(b"\xfa\xfb"),
    "a JSON array": answer([BODY]),
    "a JSON null": answer(None),
    "JSON without end": answer(b"[" * 100_000),
    "another object": answer({"url": "wss://gateway.discord.gg"}),
    "an array for the limit": answer({"session_start_limit": [LIMIT]}),
    "a missing field": answer({"remaining": 1, "reset_after": 0, "max_concurrency": 1}),
    "a mistyped field": answer(LIMIT | {"total": "1000"}),
    "a negative field": answer(LIMIT | {"remaining": -1}),
    "a NaN": answer(json.dumps(LIMIT | {"reset_after": float("nan")}).encode()),
    "too much": answer(b" " * MAX_BODY + FULL),
    "hanging up": raw(b""),
    "hanging up in the head": raw(HEAD),
    "hanging up in the body": raw(HEAD + b"\r\n" + FULL[:40]),
    "hanging up in a chunk": raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + FULL[:40]
    ),
    "another protocol": raw(b"220 smtp.example.com ESMTP\r\n"),
    "an endless line": raw(b"HTTP/1.1 200 " + b"O" * 70_000),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failure_that_may_pass_is_retried(server, bot, pauses, failure):
    server.will(failure, answer(BODY))
    assert bot.session_start_limit() == SessionStartLimit(1000, 998, 3600.0, 16)
    assert len(pauses) == 1


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failure_that_stays_is_an_error_with_its_cause(server, bot, pauses, failure):
    server.will(*[failure] * 5)
    message = r"^could not read the session start limit from 127\.0\.0\.1:\d+ in 5 attempts: "
    with pytest.raises(GatewayBotError, match=message) as caught:
        bot.session_start_limit()
    assert caught.value.__cause__ is not None
    assert len(server.requests) == 5
    assert len(pauses) == 4


@pytest.mark.parametrize(
    ("name", "cause", "message", "status"),
    [
        ("503", urllib.error.HTTPError, r" answered 503$", 503),
        ("no JSON", json.JSONDecodeError, r"no session start limit \(Expecting value", None),
        ("no text", UnicodeDecodeError, r"no session start limit \('utf-8' codec", None),
        ("JSON without end", RecursionError, r"no session start limit \(", None),
        ("a JSON array", TypeError, r"\(the payload must be a JSON object, not list\)$", None),
        ("a JSON null", TypeError, r"\(the payload must be a JSON object, not NoneType\)$", None),
        ("a missing field", ValueError, r"\(the payload lacks total\)$", None),
        ("a mistyped field", TypeError, r"\(total must be a whole number, not str '1000'\)$", None),
        ("hanging up", http.client.RemoteDisconnected, r"is out of reach \(RemoteDisc", None),
        ("another protocol", http.client.BadStatusLine, r"is out of reach \(BadStatusLi", None),
    ],
)
def test_an_error_says_what_was_wrong_in_the_end(server, pauses, name, cause, message, status):
    server.will(answer({}, 500), FAILURES[name])
    bot = GatewayBot(TOKEN, base_url=server.url, attempts=2, sleep=pauses.append)
    with pytest.raises(GatewayBotError, match=message) as caught:
        bot.session_start_limit()
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.status == status


def test_pauses_grow_and_jitter(server, bot, pauses, monkeypatch):
    monkeypatch.setattr(gateway_bot, "random", random.Random(7))
    server.will(*[answer({}, 503)] * 10)
    for _ in range(2):
        with pytest.raises(GatewayBotError):
            bot.session_start_limit()
    first, second = pauses[:4], pauses[4:]
    for growing in (first, second):
        for pause, most in zip(growing, (0.5, 1.0, 2.0, 4.0), strict=True):
            assert most / 2 <= pause <= most
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_the_attempts_are_as_many_as_wanted(server, pauses):
    server.will(answer({}, 503))
    bot = GatewayBot(TOKEN, base_url=server.url, attempts=1, sleep=pauses.append)
    with pytest.raises(GatewayBotError, match=r"in 1 attempt"):
        bot.session_start_limit()
    assert pauses == []


def test_each_retry_is_told_to_the_log_and_not_as_a_warning(server, bot, caplog):
    server.will(answer({}, 503), answer(BODY))
    bot.session_start_limit()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("gateway_queue_sync.gateway_bot", "INFO")
    assert "answered 503; asking again in" in record.getMessage()


def test_an_interrupted_pause_ends_the_reading(server):
    def interrupted(_):
        raise KeyboardInterrupt

    server.will(answer({}, 503))
    bot = GatewayBot(TOKEN, base_url=server.url, sleep=interrupted)
    with pytest.raises(KeyboardInterrupt):
        bot.session_start_limit()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_server_that_is_not_there_is_tried_again(pauses):
    bot = GatewayBot(TOKEN, base_url=f"http://127.0.0.1:{closed_port()}", sleep=pauses.append)
    with pytest.raises(GatewayBotError, match=r"is out of reach \(ConnectionRefused") as caught:
        bot.session_start_limit()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.status is None
    assert len(pauses) == 4


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200", HEAD, HEAD + b"\r\n" + FULL[:40]], ids=len)
def test_a_server_that_falls_silent_is_not_waited_for(server, pauses, said):
    server.will(*[fall_silent(said)] * 2)
    bot = GatewayBot(TOKEN, base_url=server.url, timeout=0.4, attempts=2, sleep=pauses.append)
    began = time.monotonic()
    with pytest.raises(GatewayBotError, match=r"is out of reach \(TimeoutError") as caught:
        bot.session_start_limit()
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(pauses) == 1
    assert 0.8 <= time.monotonic() - began < 5


# --- one deadline for a whole attempt -------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
REST = b"Content-Length: %d\r\n\r\n%s" % (len(FULL), FULL)
SLOW = b"." * 100  # takes 5 s
DRIPS = {
    "status line": drip(b"HTTP/1.1 200 ", SLOW, b"\r\n" + REST),
    "headers": drip(OK + b"X-Slow: ", SLOW, b"\r\n" + REST),
    "body": drip(OK + b"Content-Length: %d\r\n\r\n" % (100 + len(FULL)), b" " * 100, FULL),
    "body without a length": drip(OK + b"\r\n", b" " * 100, FULL),
    "chunks": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 20),
}


@contextmanager
def in_time(timeout):
    """Check that an attempt with this timeout fails when it should."""
    began = time.monotonic()
    with pytest.raises(GatewayBotError, match=r"is out of reach \(TimeoutError") as caught:
        yield
    assert timeout <= time.monotonic() - began < timeout + 2.0
    assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize("slow", DRIPS.values(), ids=DRIPS)
def test_an_answer_that_comes_byte_by_byte_has_the_same_deadline(server, slow):
    server.will(slow)
    bot = GatewayBot(TOKEN, base_url=server.url, timeout=0.3, attempts=1)
    with in_time(0.3):
        bot.session_start_limit()


def test_each_attempt_has_a_deadline_of_its_own(server, pauses):
    server.will(DRIPS["headers"], answer(BODY))
    bot = GatewayBot(TOKEN, base_url=server.url, timeout=0.3, attempts=2, sleep=pauses.append)
    assert bot.session_start_limit().remaining == 998
    assert len(pauses) == 1


def test_a_slow_answer_that_is_in_time_is_read(server):
    server.will(drip(OK + b"X-Slow: ", SLOW[:4], b"\r\n" + REST))
    assert GatewayBot(TOKEN, base_url=server.url).session_start_limit().remaining == 998


@contextmanager
def silent_address():
    """An address that answers no connect: the line of those who wait for a connection is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        with socket.create_connection(listener.getsockname()):
            yield listener.getsockname()


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="others refuse or accept more")


@pytest.fixture
def resolve_to(monkeypatch):
    """Make every name have these addresses."""

    def resolve_to(*addresses, family=socket.AF_INET):
        found = [(family, socket.SOCK_STREAM, 0, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found.copy())

    return resolve_to


@linux_only
@pytest.mark.parametrize("count", [1, 3])
def test_all_addresses_of_a_host_share_one_deadline(resolve_to, count):
    with silent_address() as silent:
        resolve_to(*[silent] * count)
        bot = GatewayBot(TOKEN, base_url="http://discord.invalid", timeout=0.3, attempts=1)
        with in_time(0.3):
            bot.session_start_limit()


@linux_only
def test_an_address_that_is_silent_leaves_time_for_the_next(server, resolve_to, pauses):
    server.will(answer(BODY))
    with silent_address() as silent:
        resolve_to(silent, server.server_address)
        bot = GatewayBot(TOKEN, base_url="http://discord.invalid", timeout=1, sleep=pauses.append)
        assert bot.session_start_limit().remaining == 998
    assert pauses == []


def test_an_address_that_refuses_is_followed_by_the_next(server, resolve_to, pauses):
    server.will(answer(BODY))
    resolve_to(("127.0.0.1", closed_port()), server.server_address)
    bot = GatewayBot(TOKEN, base_url="http://discord.invalid", sleep=pauses.append)
    assert bot.session_start_limit().remaining == 998
    assert pauses == []


def test_addresses_of_a_kind_that_the_machine_lacks_are_out_of_reach(resolve_to):
    resolve_to(("::1", 80), ("::1", 81), family=250)
    bot = GatewayBot(TOKEN, base_url="http://discord.invalid", attempts=1)
    with pytest.raises(GatewayBotError, match=r"is out of reach \(OSError"):
        bot.session_start_limit()


def test_a_closed_answer_closes_its_socket():
    """Even if somebody still refers to it, as a debugger may."""
    ours, theirs = socket.socketpair()
    reader = gateway_bot._TimedReader(ours, gateway_bot._Deadline(10))
    with theirs:
        reader.makefile("rb").close()
        ours.close()
        theirs.settimeout(10)
        assert theirs.recv(1) == b""
    assert reader.closed


def test_nothing_is_left_open(server, pauses):
    failures = [*FAILURES.values(), DRIPS["headers"], DRIPS["body"], answer({}, 404)]
    server.will(*failures)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in failures:
            bot = GatewayBot(TOKEN, base_url=server.url, timeout=0.3, attempts=1)
            with pytest.raises(GatewayBotError):
                bot.session_start_limit()
            assert not timers()
        del bot
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# --- proxies and TLS ------------------------------------------------------------------------------


@pytest.fixture
def proxy(server, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, server.url)
    return server


def test_a_proxy_of_the_environment_is_used(proxy):
    proxy.will(answer(BODY))
    bot = GatewayBot(TOKEN, base_url="http://discord.invalid/api")
    assert bot.session_start_limit().remaining == 998
    assert proxy.requests[0].path == "http://discord.invalid/api/gateway/bot"


def test_a_proxy_is_asked_for_a_tunnel_and_does_not_see_the_token(proxy):
    proxy.will(answer({}, 502))
    bot = GatewayBot(TOKEN, base_url="https://discord.invalid", attempts=1)
    with pytest.raises(GatewayBotError, match=r"Tunnel connection failed: 502"):
        bot.session_start_limit()
    (request,) = proxy.requests
    assert (request.command, request.path) == ("CONNECT", "discord.invalid:443")
    assert TOKEN not in str(request.headers)


def tunnel_late(request):
    """Open the tunnel after 0.9 s, and say no more."""
    if not hangs_up(request.connection, within=0.9):
        request.connection.settimeout(None)
        request.wfile.write(OK + b"\r\n")
        hold(request)


def drip_into_tls(request):
    """Open the tunnel, and answer the client's hello with the start of a record of 16 KiB."""
    request.wfile.write(OK + b"\r\n")
    if request.connection.recv(1):
        drip(b"\x16\x03\x03\x40\x00", bytes(100))(request)


@pytest.mark.parametrize(
    ("slow", "timeout"),
    [
        (drip(OK + b"X-Slow: ", SLOW, b"\r\n\r\n"), 0.6),
        (tunnel_late, 1.0),
        (drip_into_tls, 0.6),
    ],
    ids=["before the tunnel", "before TLS and in it", "in TLS"],
)
def test_a_tunnel_that_is_slow_has_the_same_deadline(proxy, slow, timeout):
    proxy.will(slow)
    bot = GatewayBot(TOKEN, base_url="https://discord.invalid", timeout=timeout, attempts=1)
    with in_time(timeout):
        bot.session_start_limit()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The files of a certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    files = (folder / "certificate.pem", folder / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]),
        ],
        check=True,
        capture_output=True,
    )
    return files


@pytest.fixture
def tls_url(server, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    plain = server.get_request

    def get_request():
        connection, address = plain()
        # The handshake is left to the connection's own thread, which reads first.
        return context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        ), address

    server.get_request = get_request
    return server.url.replace("http:", "https:")


@pytest.fixture
def trust(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))


def test_the_limit_is_read_over_tls(server, tls_url, trust):
    server.will(answer(BODY))
    assert GatewayBot(TOKEN, base_url=tls_url).session_start_limit().remaining == 998


def test_a_certificate_that_nobody_vouches_for_is_refused(server, tls_url):
    bot = GatewayBot(TOKEN, base_url=tls_url, attempts=1)
    with pytest.raises(GatewayBotError, match=r"\(SSLCertVerificationError: ") as caught:
        bot.session_start_limit()
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    assert server.requests == []


@pytest.mark.parametrize("slow", ["headers", "body"])
def test_an_answer_that_comes_byte_by_byte_over_tls_has_the_same_deadline(
    server, tls_url, trust, slow
):
    server.will(DRIPS[slow])
    bot = GatewayBot(TOKEN, base_url=tls_url, timeout=0.3, attempts=1)
    with in_time(0.3):
        bot.session_start_limit()


class LateHandshake(Request):
    """Takes its time before the TLS handshake, which the first read makes."""

    def setup(self):
        time.sleep(self.server.late)
        super().setup()


def test_a_tls_handshake_and_an_answer_that_are_slow_share_one_deadline(server, tls_url, trust):
    server.RequestHandlerClass, server.late = LateHandshake, 0.9
    server.will(hold)
    bot = GatewayBot(TOKEN, base_url=tls_url, timeout=1, attempts=1)
    with in_time(1):
        bot.session_start_limit()
    server.answers.clear()  # it is not asked if the handshake took longer


def test_after_a_connect_the_other_addresses_need_no_more_time(
    server, tls_url, trust, resolve_to, pauses
):
    server.RequestHandlerClass, server.late = LateHandshake, 1.2
    server.will(answer(BODY))
    resolve_to(server.server_address, server.server_address)
    bot = GatewayBot(TOKEN, base_url=tls_url, timeout=2, sleep=pauses.append)
    assert bot.session_start_limit().remaining == 998


# --- a first reading that takes long --------------------------------------------------------------


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def warned():
    """An event that is set by the first WARNING on the module's logger."""
    warned = threading.Event()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.set()
    gateway_bot.log.addHandler(handler)
    yield warned
    gateway_bot.log.removeHandler(handler)


def after(event, send):
    """Do nothing until the event, or for 5 s, if it does not happen; then answer."""

    def wait(request):
        event.wait(5)
        send(request)

    return wait


def test_a_first_reading_that_takes_longer_than_a_second_warns(server, bot, warned, caplog):
    server.will(after(warned, answer(BODY)))
    began = time.monotonic()
    assert bot.session_start_limit().remaining == 998
    assert time.monotonic() - began >= 1
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.name == "gateway_queue_sync.gateway_bot"
    assert record.getMessage() == (
        f"waiting for 127.0.0.1:{server.server_port} to send the session start limit "
        "(attempts: 5, of at most 10 s each)"
    )


def test_a_call_warns_once_however_many_attempts_it_makes(server, bot, warned, caplog, monkeypatch):
    monkeypatch.setattr(gateway_bot, "WARN_AFTER", 0.01)
    server.will(after(warned, answer({}, 500)), *[drip(b"", b"HTTP")] * 2, answer(BODY))
    bot.session_start_limit()
    assert len(warnings_in(caplog)) == 1


def test_each_call_warns_until_one_has_succeeded(server, warned, caplog, monkeypatch):
    monkeypatch.setattr(gateway_bot, "WARN_AFTER", 0.01)
    bot = GatewayBot(TOKEN, base_url=server.url, attempts=1)
    for expected in (1, 2):
        warned.clear()
        server.will(after(warned, answer({}, 500)))
        with pytest.raises(GatewayBotError):
            bot.session_start_limit()
        assert len(warnings_in(caplog)) == expected
    server.will(answer(BODY), drip(b"", OK[:4], OK[4:] + REST))
    bot.session_start_limit()
    caplog.clear()
    bot.session_start_limit()
    assert warnings_in(caplog) == []


def test_a_reading_that_is_answered_at_once_warns_not(server, bot, caplog, monkeypatch):
    monkeypatch.setattr(gateway_bot, "WARN_AFTER", 20)
    server.will(answer(BODY))
    bot.session_start_limit()
    assert not timers()
    assert warnings_in(caplog) == []


def test_an_interrupted_reading_warns_no_more(server, monkeypatch):
    monkeypatch.setattr(gateway_bot, "WARN_AFTER", 20)

    def interrupted(_):
        raise KeyboardInterrupt

    server.will(answer({}, 503))
    bot = GatewayBot(TOKEN, base_url=server.url, sleep=interrupted)
    with pytest.raises(KeyboardInterrupt):
        bot.session_start_limit()
    assert not timers()


def test_the_limit_is_read_even_if_no_thread_can_be_started(server, bot, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", refuse)
    server.will(answer(BODY))
    assert bot.session_start_limit().remaining == 998


@pytest.mark.parametrize(
    ("first_part", "bot_id"),
    [
        ("MTIzNDU2Nzg5MDEyMzQ1Njc4", "123456789012345678"),
        ("MTIzNDU2Nzg5MDEyMzQ1Njc", "12345678901234567"),
        ("not-a", ""),
        ("!", ""),
        ("YWJj", ""),
        ("MTEx" * 9, ""),
    ],
)
def test_the_id_of_the_bot_is_in_its_token(first_part, bot_id):
    assert GatewayBot(f"Bot {first_part}.x.y").bot_id == bot_id


# --- jitter ---------------------------------------------------------------------------------------


def test_each_call_but_the_first_pauses_for_a_random_time(server, monkeypatch):
    monkeypatch.setattr(gateway_bot, "random", random.Random(7))
    pauses = []

    def pause(seconds):
        pauses.append((seconds, len(server.requests)))

    bot = GatewayBot(TOKEN, base_url=server.url, jitter=30, sleep=pause)
    server.will(answer({}, 500), answer(BODY), answer(BODY))
    server.will(answer(BODY))
    for _ in range(3):
        bot.session_start_limit()
    (retry, before_retry), (first, before_first), (second, before_second) = pauses
    assert (before_retry, before_first, before_second) == (1, 2, 3)
    assert 0 <= first <= 30
    assert 0 <= second <= 30
    assert first != second
    assert 0.25 <= retry <= 0.5


def no_pause(_):
    """Stands for ``time.sleep`` in a bot that is pickled."""


def test_a_bot_keeps_its_settings_in_a_pickle(server):
    bot = GatewayBot(
        TOKEN, base_url=f"{server.url}/api", timeout=7, attempts=3, jitter=2.5, sleep=no_pause
    )
    twin = pickle.loads(pickle.dumps(bot))
    assert {**vars(twin), "_open": None} == {**vars(bot), "_open": None}
    server.will(answer(BODY))
    assert twin.session_start_limit().remaining == 998
    assert server.requests[0].path == "/api/gateway/bot"


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    ["", "  ", "Bot", "Bot ", "se\ncret", "se\r\nX-Evil: 1", "se cret", "sécret", "se\0cret"],
    ids=repr,
)
def test_what_cannot_be_a_token_is_refused_without_showing_it(wrong):
    with pytest.raises(ValueError, match=r"^token must be a bot's token: ") as caught:
        GatewayBot(wrong)
    shown = "".join(traceback.format_exception_only(caught.value))
    assert "cret" not in shown
    assert "X-Evil" not in shown


@pytest.mark.parametrize("wrong", [None, b"secret", 0, ["secret"]], ids=repr)
def test_a_token_that_is_no_text_is_refused_without_showing_it(wrong):
    with pytest.raises(TypeError, match=rf"^token must be a str, not {type(wrong).__name__}$"):
        GatewayBot(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *["", "discord.com", "//discord.com", "ftp://discord.com", "file:///etc/passwd"],
        *["https://", "https:///api", "http://user:hunter2@host", "http://hunter2@host"],
        *["http://host:port", "http://host:99999", "http://[::1", "http://.host"],
        *[
            "http://hunter2:hunter2",
            "http://ho st",
            "http://host/a b",
            "http://host/a\nb",
            "http://höst",
            "http://host/ä",
        ],
        *["http://host/?key=hunter2", "http://host/#top"],
    ],
)
def test_a_base_url_that_no_request_can_go_to_is_refused_without_showing_it(wrong):
    with pytest.raises(ValueError, match=r"^base_url must ") as caught:
        GatewayBot(TOKEN, base_url=wrong)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("wrong", [b"http://host", 5, ["http://host"]], ids=repr)
def test_a_base_url_that_is_no_text_is_refused(wrong):
    with pytest.raises(TypeError, match=r"^base_url must be a str, not "):
        GatewayBot(TOKEN, base_url=wrong)


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("timeout", 0, ValueError),
        ("timeout", float("nan"), ValueError),
        ("timeout", float("inf"), ValueError),
        ("timeout", "10", TypeError),
        ("jitter", -1, ValueError),
        ("jitter", float("nan"), ValueError),
        ("jitter", float("inf"), ValueError),
        ("jitter", "1", TypeError),
        ("attempts", 0, ValueError),
        ("attempts", 2.0, TypeError),
        ("attempts", True, TypeError),
    ],
)
def test_settings_are_checked(name, wrong, error):
    with pytest.raises(error, match=rf"^{name} must "):
        GatewayBot(TOKEN, **{name: wrong})


# --- the token stays inside -----------------------------------------------------------------------


def shown_of(error):
    """All that a log, a debugger or another process gets to see of an error and its causes."""
    yield "".join(traceback.format_exception(error))
    with_locals = traceback.TracebackException.from_exception(error, capture_locals=True)
    yield "".join(with_locals.format())
    while error is not None:
        yield from (str(error), repr(error), repr(error.args), repr(vars(error)))
        yield str(getattr(error, "headers", ""))
        with suppress(Exception):  # what cannot be pickled cannot leak that way
            yield repr(pickle.dumps(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def failed(server, **settings):
    """The error of a bot that asked this server in vain."""
    bot = GatewayBot(TOKEN, base_url=server.url, attempts=2, sleep=lambda _: None, **settings)
    with pytest.raises(GatewayBotError) as caught:
        bot.session_start_limit()
    assert TOKEN in server.requests[0].headers["Authorization"]
    return caught.value


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_no_failure_that_may_pass_shows_the_token(server, failure):
    error = failed(server.will(failure, failure))
    assert not any(TOKEN in shown for shown in shown_of(error))


REFUSALS = {
    **{str(status): answer({}, status, Location="/") for status in (302, 400, 401, 403, 404)},
    "429": answer({}, 429, Retry_After="3600"),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_no_refusal_shows_the_token(server, refusal):
    error = failed(server.will(refusal))
    assert not any(TOKEN in shown for shown in shown_of(error))


def test_no_silence_shows_the_token(server):
    error = failed(server.will(fall_silent(), fall_silent()), timeout=0.4)
    assert not any(TOKEN in shown for shown in shown_of(error))


ECHOES = {
    "in a refusal": answer({}, 403, reason=f"Bot {TOKEN} Is Not Welcome"),
    "in a 401": answer({}, 401, reason=f"Who Is Bot {TOKEN}"),
    "in a 500": answer({}, 500, reason=f"Choked On Bot {TOKEN}"),
    "in a field": answer(LIMIT | {"total": f"Bot {TOKEN}"}),
    "in a header": answer({}, 500, WWW_Authenticate=f"Bot {TOKEN}"),
    "in what is no JSON": answer(f"Bot {TOKEN}".encode()),
    "in what is no text": answer(f"Bot {TOKEN} \xfa".encode("latin-1")),
    "in a chunk that is cut off": raw(
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nBot {TOKEN}".encode()
    ),
    "in the status line": raw(f"Authorization: Bot {TOKEN}\r\n\r\n".encode()),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_not_even_a_server_that_says_the_token_back_makes_us_show_it(server, echo):
    server.will(*[echo] * (1 if echo in (ECHOES["in a refusal"], ECHOES["in a 401"]) else 2))
    assert not any(TOKEN in shown for shown in shown_of(failed(server)))


def test_an_error_goes_through_a_pickle_without_its_causes(server):
    error = failed(server.will(answer({}, 429, Retry_After="3600")))
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.status, twin.retry_after) == (str(error), 429, 3600.0)


def test_no_debug_level_prints_the_token(server, bot, capsys, monkeypatch):
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    server.will(answer(BODY))
    bot.session_start_limit()
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_bot_does_not_show_its_token():
    bot = GatewayBot(TOKEN, base_url="http://127.0.0.1:8080/api")
    assert repr(bot) == str(bot) == "GatewayBot(host='127.0.0.1:8080')"
    assert TOKEN not in repr(bot.session_start_limit)


# --- a queue from a token -------------------------------------------------------------------------


def queue_from_token(server, clock, **settings):
    return LargeBotQueue.from_token(TOKEN, base_url=server.url, clock=clock, **settings)


def test_a_queue_adopts_the_limit_that_discord_gives_its_token(server, clock):
    server.will(answer(BODY))
    snapshot = queue_from_token(server, clock).snapshot()
    assert len(snapshot.buckets) == 16
    assert (snapshot.limit.total, snapshot.limit.remaining) == (1000, 998)
    assert snapshot.limit.resets_in == 3600.0
    assert server.requests[0].headers["Authorization"] == f"Bot {TOKEN}"


def test_a_queue_takes_the_settings_of_its_policy(server, clock):
    server.will(answer(LIMIT | {"total": 5, "remaining": 5, "max_concurrency": 1}))
    queue = queue_from_token(
        server, clock, reserve=4, when_exhausted="raise", interval=1.0, margin=0.5
    )
    assert queue.acquire(0, timeout=0).remaining == 4
    assert queue.snapshot().buckets[0].ready_in == 1.5
    clock.advance(1.5)
    with pytest.raises(SessionLimitExhausted, match="all of it reserved"):
        queue.acquire(0, timeout=0)


def test_a_queue_asks_again_at_the_reset_and_only_then(server, clock):
    server.will(answer(LIMIT | {"total": 3, "remaining": 2, "reset_after": 60_000}))
    queue = queue_from_token(server, clock)
    assert queue.acquire(0, timeout=0).remaining == 1
    clock.advance(59.999)
    assert queue.acquire(0, timeout=0).remaining == 0
    assert len(server.requests) == 1
    clock.advance(0.001)
    server.will(answer(LIMIT | {"total": 9, "remaining": 8, "reset_after": 86_000_000}))
    # Two of the old period are younger than a minute: Discord may not have seen them.
    assert queue.acquire(1, timeout=60).remaining == 5
    assert queue.snapshot().limit.total == 9
    assert len(server.requests) == 2


def test_a_queue_takes_other_buckets_from_discord_at_the_reset(server, clock):
    server.will(
        answer(LIMIT | {"reset_after": 60_000, "max_concurrency": 1}),
        answer(LIMIT | {"max_concurrency": 4}),
    )
    queue = queue_from_token(server, clock)
    clock.advance(60)
    assert [queue.acquire(shard_id, timeout=60).bucket for shard_id in range(4)] == [0, 1, 2, 3]


def test_a_queue_that_cannot_ask_at_a_reset_goes_on_and_asks_again(server, clock, crew, caplog):
    server.will(
        answer(LIMIT | {"total": 3, "remaining": 1, "reset_after": 60_000}),
        answer({}, 404),
        answer(LIMIT | {"total": 9, "remaining": 9, "reset_after": 86_000_000}),
    )
    queue = queue_from_token(server, clock)
    assert queue.acquire(0, timeout=0).remaining == 0
    clock.advance(60)
    call = crew(queue.acquire, 0, timeout=60)
    until(lambda: [record for record in caplog.records if record.levelname == "WARNING"])
    clock.settle(1)
    clock.advance(5)
    assert call.now().remaining == 2
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "could not read the session start limit" in warning.getMessage()
    assert "answered 404" in warning.getMessage()
    clock.advance(60)
    queue.acquire(0, timeout=0)
    until(lambda: queue.snapshot().limit.total == 9)


def until(happened):
    """Wait for what another thread does."""
    give_up = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def test_a_queue_does_not_show_its_token(server, clock):
    server.will(answer(BODY))
    queue = queue_from_token(server, clock)
    assert TOKEN not in repr(queue)
    assert TOKEN not in repr(vars(queue))


def test_there_is_no_queue_for_a_wrong_token(server, clock):
    server.will(answer({}, 401))
    with pytest.raises(GatewayBotError, match=r"^the token is wrong"):
        queue_from_token(server, clock)


def test_there_is_no_queue_for_what_cannot_be_a_token(clock):
    with pytest.raises(ValueError, match=r"^token must be a bot's token"):
        LargeBotQueue.from_token("not a token", clock=clock)
