"""``GET /gateway/bot``: reading the session start limit from Discord. The token stays in here."""

from __future__ import annotations

import http.client
import json
import logging
import math
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.message import Message
from functools import partial
from typing import IO

from gateway_queue_sync.errors import GatewayBotError
from gateway_queue_sync.models import SessionStartLimit, seconds, whole_number

log = logging.getLogger("gateway_queue_sync.gateway_bot")

DISCORD_API = "https://discord.com/api/v10"
ATTEMPTS = 5
FIRST_PAUSE = 0.5  # s; doubled by each attempt that failed
LONGEST_RETRY_AFTER = 300.0  # s; Discord asks for more only when it has blocked us
LARGEST_BODY = 1 << 20
USER_AGENT = "DiscordBot (gateway-queue-sync, 0.1.0)"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to wherever it points."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        return None


class _Retry(Exception):
    """An attempt failed in a way that may pass; ``pause`` is what the server asks for, if it does."""

    def __init__(self, why: str, status: int | None = None, pause: float | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.pause = pause


class GatewayBot:
    """A bot's access to ``GET /gateway/bot``.

    Source: https://discord.com/developers/docs/topics/gateway#get-gateway-bot.

    Args:
        token: the bot's token, with or without ``Bot`` before it.
        base_url: where the REST API is, without a trailing ``/gateway/bot``; Discord's if ``None``.
        timeout: seconds that a request waits for the server to go on answering.
        attempts: how many requests are made before giving up.
        sleep: what pauses between attempts.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; no message holds the token.
    """

    def __init__(
        self,
        token: str,
        *,
        base_url: str | None = None,
        timeout: float = 10.0,
        attempts: int = ATTEMPTS,
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
        self._timeout = seconds("timeout", timeout, above=0)
        self._attempts = whole_number("attempts", attempts, least=1)
        self._sleep = sleep
        self._open = urllib.request.build_opener(_NoRedirects).open

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as what it was made with, the token too: so it goes to child processes alone."""
        again = partial(
            GatewayBot,
            self._token,
            base_url=self._url.removesuffix("/gateway/bot"),
            timeout=self._timeout,
            attempts=self._attempts,
            sleep=self._sleep,
        )
        return again, ()

    def __repr__(self) -> str:
        return f"GatewayBot(host={self._host!r})"

    def session_start_limit(self) -> SessionStartLimit:
        """Return the bot's session start limit, as it is now.

        Blocks, and tries again after growing, jittered pauses where the server is out of reach,
        fails or answers nonsense; where it limits the rate, after as long as it asks for.

        Raises:
            GatewayBotError: the token is wrong, or no attempt succeeded.
        """
        attempt = 1
        while True:
            try:
                return self._read()
            except _Retry as failure:
                if attempt == self._attempts:
                    raise GatewayBotError(
                        f"could not read the session start limit from {self._host} in {attempt} "
                        f"attempts: {failure}",
                        failure.status,
                    ) from failure.__cause__
                pause = failure.pause
                if pause is None:
                    pause = FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                log.info("%s; asking again in %.1f s", failure, pause)
                self._sleep(pause)
                attempt += 1

    def _read(self) -> SessionStartLimit:
        headers = {
            "Authorization": f"Bot {self._token}",
            "User-Agent": USER_AGENT,
            "Accept": "application/json",
        }
        request = urllib.request.Request(self._url, headers=headers)
        try:
            with self._open(request, timeout=self._timeout) as response:
                body = response.read(LARGEST_BODY)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from self._shown(error)
        except (OSError, http.client.HTTPException) as error:
            why = self._without_token(_described(getattr(error, "reason", error)))
            raise _Retry(f"{self._host} is out of reach ({why})") from self._shown(error)
        try:
            return SessionStartLimit.from_payload(json.loads(body))
        except (ValueError, TypeError, RecursionError) as error:
            why = self._without_token(str(error))
            raise _Retry(
                f"{self._host} answered with no session start limit ({why})"
            ) from self._shown(error)

    def _without_token(self, text: str) -> str:
        """Return what a server said, even if it says the token back to us."""
        return text.replace(self._token, "[token]")

    def _shown(self, cause: Exception) -> Exception | None:
        """Return the cause to show in tracebacks, if that does not show the token."""
        return None if self._token in str(cause) else cause

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        if error.code == 401:
            return GatewayBotError(
                f"the token is wrong: {self._host} does not know it (401 Unauthorized)", 401
            )
        if error.code == 429:
            pause = _retry_after(error)
            if pause is not None and pause > LONGEST_RETRY_AFTER:
                return GatewayBotError(
                    f"{self._host} limits our rate (429) and asks to wait {pause:.0f} s", 429
                )
            return _Retry(f"{self._host} limits our rate (429)", 429, pause)
        if error.code >= 500:
            return _Retry(f"{self._host} answered {error.code}", error.code)
        reason = self._without_token(str(error.reason))
        return GatewayBotError(f"{self._host} answered {error.code} {reason}", error.code)


def _checked(base_url: str) -> urllib.parse.SplitResult:
    """Return the parts of a URL that requests can go to; no message shows it, it may hold secrets."""
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


def _described(reason: object) -> str:
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Return the seconds of ``Retry-After``, ``None`` if there are none."""
    try:
        pause = float(error.headers["Retry-After"])
    except (TypeError, ValueError):
        return None
    return pause if math.isfinite(pause) and pause >= 0 else None
