"""Reads the session start limit from Discord (``GET /gateway/bot``), without showing the token."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import math
import random
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

from gateway_queue_sync.clock import if_slow
from gateway_queue_sync.errors import GatewayBotError
from gateway_queue_sync.models import SessionStartLimit, seconds, whole_number

log = logging.getLogger("gateway_queue_sync.gateway_bot")

DISCORD_API = "https://discord.com/api/v10"
ATTEMPTS = 5
FIRST_PAUSE = 0.5  # s; doubled by each attempt that failed
MAX_RETRY_AFTER = 300.0  # s; Discord asks for more only when it has blocked us
MAX_BODY = 1 << 20  # bytes
MAX_BOT_ID = 20  # digits, of 64 bits
WARN_AFTER = 1.0  # s without an answer
USER_AGENT = "DiscordBot (gateway-queue-sync, 0.1.0)"


class GatewayBot:
    """A bot's access to ``GET /gateway/bot``.

    Source: https://discord.com/developers/docs/topics/gateway#get-gateway-bot.

    Args:
        token: the bot's token, with or without ``Bot`` before it.
        base_url: where the REST API is, without a trailing ``/gateway/bot``; Discord's if ``None``.
        timeout: seconds for one attempt as a whole: connecting, TLS, headers and body. The look-up of
            the host's name is the exception: nothing can interrupt it, so the attempt fails after it.
        attempts: how many requests to make before giving up.
        jitter: each call but the first pauses for a random time of at most this many seconds, so that
            processes that read at the same reset do not all read at the same instant.
        sleep: the function that makes every pause.

    Attributes:
        bot_id: the bot's id, which the first part of a token encodes; empty if it does not.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind. The message never contains the token.
    """

    def __init__(
        self,
        token: str,
        *,
        base_url: str | None = None,
        timeout: float = 10.0,
        attempts: int = ATTEMPTS,
        jitter: float = 0.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not isinstance(token, str):
            raise TypeError(f"token must be a str, not {type(token).__name__}")
        words = token.split()
        if words[:1] == ["Bot"]:
            del words[0]
        if len(words) != 1 or not words[0].isascii() or not words[0].isprintable():
            raise ValueError("token must be a bot's token: printable ASCII without spaces")
        url = _checked(DISCORD_API if base_url is None else base_url)
        self._host = url.netloc
        self._url = urllib.parse.urlunsplit(
            (url.scheme, url.netloc, url.path.rstrip("/") + "/gateway/bot", "", "")
        )
        self._token = words[0]
        self.bot_id = _bot_id(self._token)
        self._headers = {
            "Authorization": f"Bot {self._token}",
            "User-Agent": USER_AGENT,
            "Accept": "application/json",
        }
        self._timeout = seconds("timeout", timeout, above=0)
        self._attempts = whole_number("attempts", attempts, least=1)
        self._jitter = seconds("jitter", jitter)
        self._sleep = sleep
        self._has_read = False
        handler = _TimedHandler(debuglevel=0)  # a debug level would print the token
        self._open = urllib.request.build_opener(_NoRedirects, handler).open

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the arguments, the token included: send the pickle to child processes only."""
        again = partial(
            GatewayBot,
            self._token,
            base_url=self._url.removesuffix("/gateway/bot"),
            timeout=self._timeout,
            attempts=self._attempts,
            jitter=self._jitter,
            sleep=self._sleep,
        )
        return again, ()

    def __repr__(self) -> str:
        return f"GatewayBot(host={self._host!r})"

    def session_start_limit(self) -> SessionStartLimit:
        """Return the bot's current session start limit.

        Blocks. If the server cannot be reached, fails or sends something else, it tries again after a
        random pause, which doubles each time, or after the time that the server asks for. Until a
        call has succeeded, each call that takes longer than a second logs one WARNING.

        Raises:
            GatewayBotError: the token is wrong, or no attempt succeeded.
        """
        if self._has_read:
            if self._jitter:
                self._sleep(random.uniform(0, self._jitter))
            return self._read_with_retries()
        with if_slow(WARN_AFTER, self._warn):
            limit = self._read_with_retries()
        self._has_read = True
        return limit

    def _warn(self) -> None:
        log.warning(
            "waiting for %s to send the session start limit (attempts: %d, of at most %g s each)",
            *(self._host, self._attempts, self._timeout),
        )

    def _read_with_retries(self) -> SessionStartLimit:
        attempt = 1
        while True:
            try:
                return self._read()
            except _Retry as failure:
                if attempt == self._attempts:
                    why = f"in {attempt} attempts: {failure}"
                    raise GatewayBotError(
                        f"could not read the session start limit from {self._host} {why}",
                        *(failure.status, failure.retry_after),
                    ) from failure.__cause__
                pause = failure.retry_after
                if pause is None:
                    pause = FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                log.info("%s; asking again in %.1f s", failure, pause)
                self._sleep(pause)
                attempt += 1

    def _read(self) -> SessionStartLimit:
        try:
            request = urllib.request.Request(self._url, headers=self._headers)
            with self._open(request, timeout=self._timeout) as response:
                body = response.read(MAX_BODY)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from self._shown(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)  # urllib wraps what it catches
            cause = reason if isinstance(reason, Exception) else error
            why = f"{self._host} is out of reach ({type(cause).__name__}: {cause})"
            raise _Retry(self._without_token(why)) from self._shown(cause)
        try:
            return SessionStartLimit.from_payload(json.loads(body))
        except (ValueError, TypeError, RecursionError) as error:
            why = f"{self._host} answered with no session start limit ({error})"
            raise _Retry(self._without_token(why)) from self._shown(error)

    def _without_token(self, text: str) -> str:
        """Return a server's text without the token, which the server may have repeated."""
        return text.replace(self._token, "[token]")

    def _shown(self, cause: Exception) -> Exception | None:
        """Return the cause to show in tracebacks; ``None`` if the server put the token into it.

        The cause loses its own causes, which may hold what the server said, and its traceback: some
        tools print the local variables of a traceback, and these hold the request.
        """
        texts = (str(cause), cause.args, vars(cause), str(getattr(cause, "headers", "")))
        cause.__cause__ = cause.__context__ = None
        return None if self._token in repr(texts) else cause.with_traceback(None)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        status = error.code
        if status == 401:
            why = f"the token is wrong: {self._host} does not know it (401 Unauthorized)"
            return GatewayBotError(why, status)
        if status != 429 and status < 500:
            why = f"{self._host} answered {status} {error.reason}"
            return GatewayBotError(self._without_token(why), status)
        why = f"{self._host} {'limits our rate (429)' if status == 429 else f'answered {status}'}"
        retry_after = _retry_after(error) if status in {429, 503} else None
        if retry_after is not None and retry_after > MAX_RETRY_AFTER:
            why += f" and asks to wait {retry_after:.0f} s"
            return GatewayBotError(why, status, retry_after)
        return _Retry(why, status, retry_after)


class _Retry(GatewayBotError):
    """An attempt failed; another one may succeed."""


class _Deadline:
    """The deadline of an attempt. ``http.client`` itself only limits each step."""

    def __init__(self, timeout: float) -> None:
        self._at = time.monotonic() + timeout

    def limit(self, sock: socket.socket, shares: int = 1) -> None:
        """Limit the socket's next operation to one share of the remaining time."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left / shares)

    def connect(self, address: tuple[str, int], *_: object) -> socket.socket:
        """Connect to the first address that answers. No address may use up the time of the others."""
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        while True:
            family, kind, protocol, _name, where = found.pop(0)
            with suppress(OSError) if found else nullcontext(), ExitStack() as opened:
                sock = opened.enter_context(socket.socket(family, kind, protocol))
                self.limit(sock, shares=1 + len(found))
                sock.connect(where)
                self.limit(sock)  # for TLS
                opened.pop_all()
                return sock


class _TimedReader(io.RawIOBase):
    """Reads from a socket until a deadline; an ``HTTPResponse`` uses it in place of the socket."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._deadline.limit(self._sock)
        count = self._raw.readinto(buffer)
        self._deadline.limit(self._sock)  # for TLS, if a proxy's answer has been read
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Makes a request's ``timeout`` the limit for everything: connecting, TLS, headers and body."""

    def do_open(self, http_class: Any, req: urllib.request.Request, **settings: Any) -> Any:
        def connection(host: str, **settings: Any) -> Any:
            deadline = _Deadline(settings["timeout"])
            made = http_class(host, **settings)
            made._create_connection = deadline.connect
            made.response_class = lambda sock, **settings: http.client.HTTPResponse(
                _TimedReader(sock, deadline),  # type: ignore[arg-type]
                **settings,
            )
            return made

        return super().do_open(connection, req, **settings)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because the token would be sent to the new address."""

    def redirect_request(self, *_: object) -> None:
        return None


def _bot_id(token: str) -> str:
    """Return the bot's id, which the first part of a token encodes; empty if it does not."""
    encoded = token.partition(".")[0]
    try:
        bot_id = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode("ascii")
    except ValueError:
        return ""
    return bot_id if bot_id.isdecimal() and len(bot_id) <= MAX_BOT_ID else ""


def _checked(base_url: str) -> urllib.parse.SplitResult:
    """Return the parts of a URL for requests. No message shows the URL, since it may contain secrets."""
    if not isinstance(base_url, str):
        raise TypeError(f"base_url must be a str, not {type(base_url).__name__}")
    try:
        url = urllib.parse.urlsplit(base_url)
        host, _ = url.hostname, url.port  # the port is checked as it is read
        (host or "").encode("idna")
    except ValueError:
        raise ValueError("base_url must be a URL with a well-formed host and port") from None
    if url.scheme not in ("http", "https") or not host:
        raise ValueError("base_url must be an http:// or https:// URL with a host")
    if url.username is not None or url.password is not None:
        raise ValueError("base_url must not hold a user name or password")
    if url.query or url.fragment:
        raise ValueError("base_url must not hold a query or fragment")
    if not base_url.isascii() or not base_url.isprintable() or " " in base_url:
        raise ValueError("base_url must be printable ASCII without spaces")
    return url


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Return the seconds of ``Retry-After``, ``None`` if there are none."""
    try:
        pause = float(error.headers["Retry-After"])
    except (TypeError, ValueError):
        return None
    return pause if math.isfinite(pause) and pause >= 0 else None
