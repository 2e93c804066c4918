"""The ledger in a Redis server.

``answer.lua`` answers frequent requests there. For all others it returns what is stored,
``turns.answer`` computes the reply, and the script stores the result if nothing has changed meanwhile.

The client is redis-py's, with its own pool, retries, TLS, Sentinel or Cluster. The server's clock
counts, so the clocks of the machines need not agree.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import inspect
import json
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway_queue_sync.clock import SYSTEM_CLOCK, Clock
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared.backend import Busy, Unreachable
from gateway_queue_sync.ledgers.shared.bounds import check_reply, refusal
from gateway_queue_sync.ledgers.shared.messages import Reply, Request, from_wire, to_wire
from gateway_queue_sync.ledgers.shared.store_redis import KEYS, RedisStore, as_text
from gateway_queue_sync.ledgers.shared.turns import answer, look

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.cluster import ClusterNode
    from redis.retry import Retry
    from redis.sentinel import Sentinel, SentinelConnectionPool
except ImportError as error:
    raise ImportError(
        "RedisQueue needs redis-py: pip install gateway-queue-sync[redis]", name="redis"
    ) from error

if TYPE_CHECKING:
    Client = redis.Redis | redis.RedisCluster

log = logging.getLogger("gateway_queue_sync")

SCRIPT = importlib.resources.files(__package__).joinpath("answer.lua").read_text("utf-8")
SHA1 = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
TRIES = 3  # to store what Python has computed. After the first, other sessions are kept out.
SOCKET_TIMEOUT = 1.0  # s, of a client that is made from a URL

# Runs commands on a key, and deletes it. Returns the first one that fails, with the error; and
# whether an id can be read that shows restarts and failovers.
TRY_COMMANDS = """
local key = KEYS[1]
local refused = {}
for line in string.gmatch(ARGV[1], '[^,]+') do
  local words = {}
  for word in string.gmatch(line, '%S+') do words[#words + 1] = word == 'key' and key or word end
  local answer = redis.pcall(unpack(words))
  if type(answer) == 'table' and answer.err then
    refused = {words[1], answer.err}
    break
  end
end
redis.pcall('UNLINK', key)
local ids = 0
for section, name in pairs({server = 'run_id:%w', replication = 'master_replid:%w'}) do
  local text = redis.pcall('INFO', section)
  if type(text) == 'string' and string.match(text, name) then ids = ids + 1 end
end
return {ids, unpack(refused)}
"""
COMMANDS = (
    "UNLINK key,HSET key f 1,HGET key f,HGETALL key,UNLINK key,"
    "ZADD key 0 m,ZRANGE key 0 -1,ZCOUNT key 0 1,ZSCORE key m,ZREM key m,ZREMRANGEBYSCORE key 1 0,"
    "UNLINK key,SET key 1,GET key,TIME"
)

# Errors of a server that may be able to answer later; redis-py has classes for some of them.
PASSING = re.compile(
    r"\b(LOADING|BUSY|READONLY|MASTERDOWN|NOREPLICAS|MISCONF|OOM|CLUSTERDOWN|TRYAGAIN)\b"
)
PASSES = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)
REFUSED = (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError)
FAILURES = (redis.RedisError, redis.exceptions.RedisClusterException, OSError)
INVALID = (ArithmeticError, AssertionError, LookupError, TypeError, ValueError)


class RedisBackend:
    """An account in a Redis server.

    Args:
        client_or_url: redis-py's client, or the URL of a server to make one for.
        name: which account on the server.
        clock: the clock of this process. The server's clock counts for the account, unless this is
            a clock for tests, which is then sent with each request.

    Raises:
        TypeError: it is neither, or a forked child could not make an equal client.
        ValueError: it is not the URL of a Redis server. The message does not show it, since it may
            contain a password.
    """

    def __init__(self, client_or_url: Client | str, name: str, clock: Clock) -> None:
        given = checked(client_or_url)
        self._made = isinstance(given, str)  # whether the client was made here
        self._client: Client | None = made_from(given) if isinstance(given, str) else given
        self._make = maker(given)
        self._where = address(self._client) + ("" if name == "default" else f" ({name})")
        self._prefix = f"gateway_queue_sync:{{{name}}}"
        self._clock = None if clock is SYSTEM_CLOCK else clock
        self._tried = self._warned = False
        self._parents: list[Client] = []

    def __repr__(self) -> str:
        return f"Redis server {self._where}"

    def relay(self, request: Request) -> Reply:
        """Answer a request of another process. The server's clock counts in any case."""
        return self.ask(request)

    def ask(self, request: Request) -> Reply:
        """Send a request to the script and return its reply."""
        try:
            return self._ask(request)
        except Busy:
            raise
        except FAILURES as error:
            self._tried = False
            raise self._failure(error) from error
        except BaseException as error:
            if self._client is not None:
                disconnect(self._client)  # a reply may be on its way in the connection
            if isinstance(error, INVALID):
                raise LedgerError(f"{self!r} sent an invalid reply: {error}") from error
            raise

    def _ask(self, request: Request) -> Reply:
        if self._client is None:
            self._client = self._make()
        if not self._tried:
            self._try_commands()
        rare = not request.session or request.limit or refusal(request)
        text, *rows = self._run(request, "read" if rare else "apply")
        reply = _reply(request, text, rows) if text else self._compute(request, rows)
        check_reply(request, reply)
        return reply

    def _compute(self, request: Request, rows: list[Any]) -> Reply:
        """Answer a request by what is stored, and store the result unless that has changed meanwhile."""
        for _ in range(TRIES):
            store = RedisStore(rows, request)
            reply = answer(store, request, store.now_us, store.wall_us, lost=store.lost)
            if not store.writes:
                return reply
            text, *rows = self._run(request, "store", store)
            if text:
                return reply if text == "stored" else _reply(request, text, rows)
        raise Busy(f"{self!r} changes again and again")

    def _run(self, request: Request, mode: str, store: RedisStore | None = None) -> list[Any]:
        """Run the script. Return the reply as JSON, if it has one, and the rows that it read."""
        assert self._client is not None
        keys = self._keys(request)
        given = [json.dumps(to_wire(request), separators=(",", ":")), mode]
        if store is None:
            given += ["", "", ""]
        else:
            given += [store.changed, json.dumps(store.writes), str(store.now_us)]
        if self._clock is not None:
            given += [str(self._clock.now_us()), str(self._clock.wall_us())]
        try:
            found = self._client.evalsha(SHA1, len(keys), *keys, *given)
        except redis.exceptions.NoScriptError:  # it was restarted, flushed or failed over to
            found = self._client.eval(SCRIPT, len(keys), *keys, *given)
        tag, text, *rows = as_text(found)
        attempt, _, session = tag.partition(" ")
        if (int(attempt), session) != (request.attempt, request.session):
            # An interrupt came between a request and its answer, which is still in the connection.
            raise Unreachable(f"{self!r} answered another request")
        if text == "busy":
            raise Busy(f"{self!r}: another process changes it")
        return [text, *rows]

    def _keys(self, request: Request) -> list[str]:
        new = request.introduction
        names = {
            "session": f"session:{request.session}",
            "replaced": f"session:{new.replaces if new else ''}",
        }
        return [f"{self._prefix}:{names.get(key, key)}" for key in KEYS]

    def _try_commands(self) -> None:
        """Check that this user may run the commands that the script needs."""
        assert self._client is not None
        ids, *refused = self._client.eval(TRY_COMMANDS, 1, f"{self._prefix}:probe", COMMANDS)
        if refused:
            command, why = (one.decode() if isinstance(one, bytes) else one for one in refused)
            if PASSING.search(why):
                raise redis.ResponseError(why)
            raise LedgerError(f"{self!r}: this user may not run {command}: {why}")
        self._tried = True
        if not ids and not self._warned:
            self._warned = True
            log.warning(
                "%r: neither run_id nor master_replid can be read (INFO), so a restart or failover "
                "is noticed only by what the processes know",
                self,
            )

    def _failure(self, error: Exception) -> LedgerError:
        words = str(error) or "no answer"
        if not isinstance(error, redis.exceptions.ConnectionError):
            words = f"{type(error).__name__}: {words}"
        answered = isinstance(error, redis.ResponseError) and not isinstance(error, PASSES)
        if (not answered or PASSING.search(words)) and not isinstance(error, REFUSED):
            if self._client is not None:
                disconnect(self._client)  # another server may have the address by now
            return Unreachable(f"{self!r}: {words}")
        return LedgerError(f"{self!r}: {words}")

    def before_fork(self) -> None:
        """Do nothing: a child makes a client of its own."""

    def after_fork_in_parent(self) -> None:
        """Do nothing: a child makes a client of its own."""

    def begin_in_child(self) -> None:
        """Make another client at the next request.

        The parent's client is neither used nor closed. A thread of the parent may have held its locks,
        which nobody would release here.
        """
        if self._client is not None:
            if isinstance(self._client, redis.Redis):
                self._client.auto_close_connection_pool = False
            self._parents.append(self._client)
        self._client, self._made = None, True

    def close(self) -> None:
        """Close a client that was made here. One that was passed belongs to its owner."""
        if self._made and self._client is not None:
            self._client.close()


def _reply(request: Request, text: str, rows: list[Any]) -> Reply:
    """Return a reply of the script. If it comes with rows, the request asks for a look, too."""
    reply = from_wire(Reply, json.loads(text))
    if rows:
        store = RedisStore(rows, request)
        reply = reply._replace(look=look(store, request, store.now_us, store.wall_us))
    return reply


def made_from(url: str) -> redis.Redis:
    """Return a client for a URL. Options in the URL win over those that suit a queue.

    The queue itself tries again, with pauses, and keeps deadlines. So the client tries again only once,
    in case the server has closed a connection meanwhile.

    Raises:
        ValueError: it is not the URL of a Redis server. The message does not show it, since it may
            contain a password.
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
    """Close the connections that are not in use. The next call opens new ones."""
    if isinstance(client, redis.RedisCluster):
        client.disconnect_connection_pools()  # type: ignore[no-untyped-call]
    else:
        client.connection_pool.disconnect(inuse_connections=False)
        if client.connection is not None:  # a client made with single_connection_client=True
            client.connection.disconnect()  # type: ignore[no-untyped-call]


def checked(client: object) -> Client | str:
    """Return a client or URL, or say what is wrong with it."""
    if not isinstance(client, str | redis.Redis | redis.RedisCluster):
        raise TypeError(
            "client must be a redis.Redis, a redis.RedisCluster or the URL of a server, not "
            f"{type(client).__module__}.{type(client).__qualname__}"
        )
    return client


def address(client: Client) -> str:
    """Return the address of a client's server, without user and password."""
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


# --- a client like another ------------------------------------------------------------------------


def portable(client: Client | str) -> tuple[Callable[..., object], tuple[object, ...]]:
    """Return a function that makes an equal client in another process, and its arguments.

    Raises:
        TypeError: it is a client of a cluster or Sentinel.
    """
    if isinstance(client, str):
        return str, (client,)
    if isinstance(client, redis.RedisCluster) or hasattr(client.connection_pool, "service_name"):
        raise TypeError(
            "a RedisQueue on a client of a cluster or Sentinel cannot be pickled: make one in each "
            "process"
        )
    return _remade, (_settings_of(client),)


def maker(client: Client | str) -> Callable[[], Client]:
    """Return a function that makes a client with the same settings, but no connection or lock of it.

    Raises:
        TypeError: it has a pool or connections of a class that is not redis-py's.
    """
    if isinstance(client, str):
        return lambda: made_from(client)
    if isinstance(client, redis.RedisCluster):
        return _cluster_maker(client)
    pool = client.connection_pool
    if type(pool) is SentinelConnectionPool:
        return _sentinel_maker(pool)
    plain = type(pool) in (redis.ConnectionPool, redis.BlockingConnectionPool)
    settings = _settings_of(client)
    if not plain or pool.connection_class not in (
        redis.Connection,
        redis.SSLConnection,
        redis.UnixDomainSocketConnection,
    ):
        raise TypeError(
            "a forked child could not make a client like this one, whose "
            f"{type(pool).__qualname__} of {pool.connection_class.__qualname__} is not redis-py's: "
            "pass a URL, or a client with redis-py's own pool and connections"
        )
    return lambda: _remade(settings)


def _sentinel_maker(pool: SentinelConnectionPool) -> Callable[[], Client]:
    if not pool.is_master:
        raise TypeError("client must be a Sentinel's master_for(...), not a replica's")
    manager, service = pool.sentinel_manager, pool.service_name
    watchers = [_settings_of(client) for client in manager.sentinels]
    fewest, watching = manager.min_other_sentinels, dict(manager.sentinel_kwargs)
    settings = _among(_named_settings(), pool.connection_kwargs)
    settings["ssl"] = issubclass(pool.connection_class, redis.SSLConnection)

    def make() -> redis.Redis:
        another = Sentinel([], min_other_sentinels=fewest, sentinel_kwargs=watching)  # type: ignore[no-untyped-call]
        another.sentinels = [_remade(one) for one in watchers]
        client: redis.Redis = another.master_for(service, **settings)  # type: ignore[no-untyped-call]
        return client

    return make


def _cluster_maker(client: redis.RedisCluster) -> Callable[[], Client]:
    nodes = [(node.host, node.port) for node in client.nodes_manager.startup_nodes.values()]
    given = client.nodes_manager.connection_kwargs
    settings = _among(_named_settings() - {"host", "port", "retry", "redis_connect_func"}, given)
    connections = given.get("connection_class", redis.Connection)
    if given.get("ssl") or issubclass(connections, redis.SSLConnection):
        settings["ssl"] = True

    def make() -> redis.RedisCluster:
        startup = [ClusterNode(host, port) for host, port in nodes]  # type: ignore[no-untyped-call]
        return redis.RedisCluster(startup_nodes=startup, **settings)

    return make


def _remade(settings: dict[str, Any]) -> redis.Redis:
    return redis.Redis(**settings)


def _settings_of(client: redis.Redis) -> dict[str, Any]:
    pool = client.connection_pool
    settings = _among(_named_settings(), pool.connection_kwargs)
    settings["ssl"] = issubclass(pool.connection_class, redis.SSLConnection)
    settings["unix_socket_path"] = pool.connection_kwargs.get("path")
    return settings


def _named_settings() -> set[str]:
    """Return the named settings, without those that are objects with threads or locks."""
    return set(inspect.signature(redis.Redis).parameters) - {"event_dispatcher", "connection_pool"}


def _among(names: set[str], given: dict[str, Any]) -> dict[str, Any]:
    defaults = inspect.signature(redis.Redis).parameters
    return {
        name: value
        for name, value in given.items()
        if name in names and value is not defaults[name].default  # some cannot be pickled
    }
