"""The ledger of many machines: a Redis server that runs ``take.lua`` for each request.

The client is redis-py's, with its own pool, retries, TLS, Sentinel or Cluster: only scripts are sent.
Time is the server's, so the clocks of the machines need not agree.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import inspect
import json
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers import wire
from gateway_queue_sync.ledgers.shared import SharedLedger, Terms
from gateway_queue_sync.messages import Reply, Request

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ImportError(
        "RedisQueue needs redis-py: pip install gateway-queue-sync[redis]", name="redis"
    ) from error

if TYPE_CHECKING:
    Client = redis.Redis | redis.RedisCluster

SCRIPT = importlib.resources.files(__package__).joinpath("take.lua").read_text("utf-8")
SHA1 = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
KEYS = ("account", "process", "void", "head", "permit", "waiter")
SOCKET_TIMEOUT = 1.0  # s, of a client that is made here: a deadline is kept that closely


class RedisLedger(SharedLedger):
    """An account in a Redis server.

    Args:
        client: redis-py's, or the URL of a server to make one for.
        name: which account on the server.
        terms: what this process wants of it.
        clock: what tells the time here. The server's own counts for the account, unless this is
            not the system's: then it is taken along, as tests need it.
    """

    def __init__(self, client: Client | str, name: str, terms: Terms, clock: Clock) -> None:
        self.shares_clock = clock is not SYSTEM_CLOCK
        self._url = client if isinstance(client, str) else None
        self._client = made_from(client) if isinstance(client, str) else client
        self._closed = False
        self._keys = [f"gateway_queue_sync:{{{name}}}:{key}" for key in KEYS]
        self._where = address(self._client) + ("" if name == "default" else f" ({name})")
        super().__init__(terms, clock)

    def __repr__(self) -> str:
        return f"Redis server {self._where}"

    def after_fork_in_child(self) -> None:
        """Be another process. redis-py's pools notice that themselves, but would wait for their locks.

        Some thread of the parent may have held one, which is not there to let go of it.
        """
        parts: list[Any] = [self._client]
        if isinstance(self._client, redis.RedisCluster):
            manager = self._client.nodes_manager
            parts += [manager, *(node.redis_connection for node in manager.nodes_cache.values())]
        parts += [getattr(part, "connection_pool", None) for part in parts]
        for part in parts:
            for lock in ("_lock", "_initialization_lock"):
                if hasattr(part, lock):
                    setattr(part, lock, threading.RLock())
        super().after_fork_in_child()

    def carry(self, request: Request, patience: float = 0.0) -> Reply:
        """Answer a request by the script; nobody holds a server, so nobody is waited for."""
        given = [json.dumps(wire.request_as_json(request), separators=(",", ":"))]
        if self.shares_clock:
            given += [str(self._clock.now_us()), str(self._clock.wall_us())]
        try:
            reply = self._run(given)
            if reply.number != request.number:
                # An interrupt came between a request and its reply, which is still in the connection.
                disconnect(self._client)
                reply = self._run(given)
            if reply.number != request.number:
                raise ValueError(f"an answer to request {reply.number}")
        except (redis.RedisError, OSError) as error:
            raise LedgerError(f"{self!r}: {explained(error)}") from error
        except (TypeError, ValueError, LookupError) as error:
            raise LedgerError(f"{self!r} answered nonsense: {error}") from error
        finally:
            if self._closed:
                self._disconnect()
        return reply

    def _run(self, given: list[str]) -> Reply:
        count = len(self._keys)
        try:
            answer = self._client.evalsha(SHA1, count, *self._keys, *given)
        except (
            redis.exceptions.NoScriptError
        ):  # a server that was restarted, flushed or failed over to
            answer = self._client.eval(SCRIPT, count, *self._keys, *given)
        return wire.reply_from_json(answer)

    def close(self) -> None:
        self._closed = True
        self._disconnect()

    def _disconnect(self) -> None:
        """Close what was made here; a client that was given is its owner's."""
        if self._url is not None:
            self._client.close()


def made_from(url: str) -> redis.Redis:
    """Return a client for a server; what its URL says wins over what suits a queue.

    The queue tries again by itself, with pauses, and has deadlines to keep. So the client tries
    again just once, for a connection that the server has closed meanwhile.

    Raises:
        ValueError: it is no URL of a Redis server; no message shows it, it may hold a password.
    """
    if re.search(r"//[^/?#]*[/?#].*@", url):  # what would be read as a host, or shown as a path
        raise ValueError(
            "the URL has an @ after its host: percent-encode the password (/ is %2F, ? is %3F, # is "
            "%23, @ is %40)"
        )
    once_more = Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,))
    try:
        client = redis.Redis.from_url(
            url,
            retry=once_more,
            socket_timeout=SOCKET_TIMEOUT,
            socket_connect_timeout=SOCKET_TIMEOUT,
        )
        client.connection_pool.make_connection()  # which checks the rest
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            "the URL must be like redis://host:6379/0, rediss://... (TLS) or unix://path"
        ) from None
    return client


def disconnect(client: Client) -> None:
    """Close the connections that are not in use just now: the next call opens new ones."""
    if isinstance(client, redis.RedisCluster):
        client.disconnect_connection_pools()  # type: ignore[no-untyped-call]
    else:
        client.connection_pool.disconnect(inuse_connections=False)


def checked(client: object) -> Client | str:
    """Return a client or URL, or say what is wrong with it."""
    if not isinstance(client, str | redis.Redis | redis.RedisCluster):
        raise TypeError(
            "client must be a redis.Redis, a redis.RedisCluster or the URL of a server, not "
            f"{type(client).__module__}.{type(client).__qualname__}"
        )
    return client


def address(client: Client) -> str:
    """Return where a client's server is, without user or password."""
    if isinstance(client, redis.RedisCluster):
        return f"cluster of {', '.join(sorted(client.nodes_manager.startup_nodes))}"
    pool = client.connection_pool
    if hasattr(pool, "service_name"):
        return f"of Sentinel's service {pool.service_name}"
    settings = pool.connection_kwargs
    database = settings.get("db") or 0
    if "path" in settings:
        return f"unix:{settings['path']}/{database}"
    return f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}/{database}"


def portable(client: Client | str) -> tuple[Callable[..., object], tuple[object, ...]]:
    """Return what makes a client's like in another process, and out of what.

    Raises:
        TypeError: it is a client of a cluster or Sentinel.
    """
    if isinstance(client, str):
        return str, (client,)
    return _remade, (_settings_of(client),)


def _remade(settings: dict[str, Any]) -> redis.Redis:
    return redis.Redis(**settings)


def _settings_of(client: Client) -> dict[str, Any]:
    if isinstance(client, redis.RedisCluster) or hasattr(client.connection_pool, "service_name"):
        raise TypeError(
            "a RedisQueue on a client of a cluster or Sentinel cannot be pickled: make one in each "
            "process"
        )
    pool = client.connection_pool
    given = pool.connection_kwargs
    settings = {
        name: given[name]
        for name, parameter in inspect.signature(redis.Redis).parameters.items()
        if name in given and given[name] is not parameter.default  # which need not pickle
    }
    settings["ssl"] = issubclass(pool.connection_class, redis.SSLConnection)
    settings["unix_socket_path"] = given.get("path")
    return settings


def explained(error: Exception) -> str:
    """Return what is wrong, in a server's or a system's words."""
    words = str(error) or "no answer"
    return (
        words
        if isinstance(error, redis.exceptions.ConnectionError)
        else (f"{type(error).__name__}: {words}")
    )
