"""The ``demo`` command: shards start their sessions at a small gateway, which judges every IDENTIFY.

The gateway listens on the loopback and speaks Discord's opcodes, one JSON object a line. Its referee
knows nothing of the queue. Read on in this order: the gateway, a shard, all of them, what is shown,
what is said at the end, the command itself.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import os
import random
import shutil
import socket
import socketserver
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from gateway_queue_sync.clock import MICROSECOND, SYSTEM_CLOCK
from gateway_queue_sync.errors import GatewayQueueError
from gateway_queue_sync.models import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    SessionStartLimit,
    seconds,
    whole_number,
)
from gateway_queue_sync.policies import LargeBotQueue, NoOpQueue
from gateway_queue_sync.testing import Referee

if TYPE_CHECKING:
    from gateway_queue_sync.queue import GatewayQueue

    Address = tuple[str, int]

PATIENCE = 10.0  # s a shard waits for an answer of the gateway
MOST_TRIES = 50  # IDENTIFYs a shard sends before it gives up
FRAME = 0.1  # s between two pictures of the live display


@dataclass(frozen=True, slots=True)
class Settings:
    """What to show: so many shards, under Discord's rule with an interval of so many seconds."""

    shards: int
    max_concurrency: int
    interval: float
    margin: float
    with_queue: bool = True

    @property
    def buckets(self) -> int:
        """How many buckets have a shard; shards and gateway need no others."""
        return min(self.shards, self.max_concurrency)

    @property
    def limit(self) -> SessionStartLimit:
        """A fresh session start limit: Discord's 1000 a day, or 5 for each shard of a large bot."""
        total = max(1000, 5 * self.shards)
        return SessionStartLimit(total, total, SESSION_PERIOD, self.buckets)

    def make_queue(self) -> GatewayQueue:
        """Return the queue to show, or one that lets everybody through at once."""
        if not self.with_queue:
            return NoOpQueue()
        return LargeBotQueue(self.limit, interval=self.interval, margin=self.margin)

    def make_referee(self) -> Referee:
        """Return the judge of the IDENTIFYs."""
        return Referee(self.buckets, interval=self.interval, total=self.limit.total)


# --- the gateway -----------------------------------------------------------------------------------


class Op(enum.IntEnum):
    """Discord's opcodes, as far as a session start needs them."""

    DISPATCH = 0
    IDENTIFY = 2
    INVALID_SESSION = 9
    HELLO = 10


def encode(payload: Mapping[str, Any]) -> bytes:
    """Return a payload as it goes over the wire."""
    return json.dumps(payload).encode() + b"\n"


def hello() -> dict[str, Any]:
    """Return what the gateway says first."""
    return {"op": Op.HELLO, "d": {"heartbeat_interval": 41_250}}


def identify(shard_id: int, shards: int) -> dict[str, Any]:
    """Return the IDENTIFY of a shard."""
    return {"op": Op.IDENTIFY, "d": {"token": "demo", "shard": [shard_id, shards]}}


def ready(shard_id: int, shards: int) -> dict[str, Any]:
    """Return the READY that greets a shard."""
    session = {"v": 10, "session_id": f"{shard_id:032x}", "shard": [shard_id, shards]}
    return {"op": Op.DISPATCH, "t": "READY", "s": 1, "d": session}


def invalid_session() -> dict[str, Any]:
    """Return what refuses a session."""
    return {"op": Op.INVALID_SESSION, "d": False}


class Gateway(socketserver.ThreadingTCPServer):
    """Listens on a free port of the loopback, and lets its referee judge what arrives there."""

    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False

    def __init__(self, referee: Referee) -> None:
        super().__init__(("127.0.0.1", 0), GatewayConnection)
        self.referee = referee
        self.accepted_us: list[int] = []  # when the accepted IDENTIFYs arrived

    @property
    def address(self) -> Address:
        """Where it listens."""
        host, port = self.socket.getsockname()
        return host, port

    @contextlib.contextmanager
    def serving(self) -> Iterator[Self]:
        """Serve in a thread of its own until the ``with`` is left."""
        with self:
            threading.Thread(
                target=self.serve_forever, args=(0.02,), name="demo-gateway", daemon=True
            ).start()
            try:
                yield self
            finally:
                self.shutdown()

    def judge(self, shard_id: int) -> bool:
        """Judge an IDENTIFY that arrives now."""
        arrived_us = SYSTEM_CLOCK.now_us()
        accepted = self.referee.identify(shard_id)
        if accepted:
            self.accepted_us.append(arrived_us)
        return accepted

    @property
    def took(self) -> float:
        """Seconds from the first accepted IDENTIFY to the last."""
        if not self.accepted_us:
            return 0.0
        return (max(self.accepted_us) - min(self.accepted_us)) / MICROSECOND

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: whoever hung up or sent nonsense is hung up on, and that is all."""


class GatewayConnection(socketserver.StreamRequestHandler):
    """The gateway's end of one connection."""

    server: Gateway
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Greet the shard, and answer its IDENTIFYs until it hangs up or the token is no good."""
        self.wfile.write(encode(hello()))
        for line in self.rfile:
            shard_id, shards = json.loads(line)["d"]["shard"]
            accepted = self.server.judge(shard_id)
            if self.server.referee.token_reset and not accepted:
                return
            self.wfile.write(encode(ready(shard_id, shards) if accepted else invalid_session()))


# --- a shard ---------------------------------------------------------------------------------------


class GatewayFailure(Exception):
    """The gateway did what no gateway should, and this shard cannot start."""


class Connection:
    """A shard's end of its connection; it has its HELLO when it is made."""

    def __init__(self, address: Address) -> None:
        self._socket = socket.create_connection(address, timeout=PATIENCE)
        self._lines = self._socket.makefile("rb")
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            greeting = self.receive()
            if greeting.get("op") != Op.HELLO:
                raise GatewayFailure(f"the gateway sent {greeting} instead of HELLO")
        except BaseException:
            self.__exit__()
            raise

    def send(self, payload: Mapping[str, Any]) -> None:
        """Send one payload."""
        self._socket.sendall(encode(payload))

    def receive(self) -> dict[str, Any]:
        """Return the next payload that arrives."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise GatewayFailure("the gateway closed the connection")
        try:
            payload = json.loads(line)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            raise GatewayFailure(f"the gateway sent {line[:40]!r}, which is no JSON object")
        return payload

    def becomes_ready(self) -> bool:
        """Wait for the answer to an IDENTIFY: READY is true, Invalid Session false."""
        payload = self.receive()
        match payload:
            case {"op": Op.DISPATCH, "t": "READY"}:
                return True
            case {"op": Op.INVALID_SESSION}:
                return False
        raise GatewayFailure(f"the gateway answered IDENTIFY with {payload}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lines.close()
        self._socket.close()


@dataclass(frozen=True, slots=True)
class Started:
    """A shard got its READY, ``at`` seconds after the start, after this wait and these refusals."""

    shard_id: int
    bucket: int
    at: float
    waited: float
    refused: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A shard did not get its READY."""

    shard_id: int
    bucket: int
    why: str


Outcome = Started | Failed


class Fleet:
    """All shards, each a thread. Leaving the ``with`` stops those that still run."""

    def __init__(self, settings: Settings, queue: GatewayQueue, address: Address) -> None:
        self.outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._settings = settings
        self._queue = queue
        self._address = address
        self._threads: list[threading.Thread] = []
        self._arrived = threading.Semaphore(0)
        self._gates = [threading.Event() for _ in range(settings.shards + 1)]
        self._stop = threading.Event()
        self._went_us = 0

    def start(self) -> None:
        """Connect all shards, and let them go in their order when the last one has its HELLO."""
        for shard_id in range(self._settings.shards):
            thread = threading.Thread(
                target=self._run_shard, args=(shard_id,), name=f"demo-shard-{shard_id}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # the machine has no more threads
                for without_thread in range(shard_id, self._settings.shards):
                    self._fail(without_thread, error)
                break
            self._threads.append(thread)
        for _ in self._threads:
            self._arrived.acquire()
        self._went_us = SYSTEM_CLOCK.now_us()
        self._gates[0].set()

    @property
    def elapsed(self) -> float:
        """Seconds since the shards were let go."""
        return (SYSTEM_CLOCK.now_us() - self._went_us) / MICROSECOND

    def _run_shard(self, shard_id: int) -> None:
        connection = self._connect(shard_id)
        self._arrived.release()
        self._gates[shard_id].wait()
        self._gates[shard_id + 1].set()  # the next one comes right behind this one
        if connection is None:
            return
        try:
            with connection:
                self.outcomes.put(self._start_session(connection, shard_id))
        except Exception as error:  # noqa: BLE001 - whatever it is, this shard must not be waited for
            self._fail(shard_id, error)

    def _connect(self, shard_id: int) -> Connection | None:
        """Return a connection that has greeted its shard, or ``None`` if that failed."""
        try:
            return Connection(self._address)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(shard_id, error)
            return None

    def _start_session(self, connection: Connection, shard_id: int) -> Outcome:
        """Identify when the queue says so, and again after a pause if the gateway refuses.

        READY is awaited within the ``with``, so that the bucket's window starts when the gateway has
        surely judged. On a busy machine a thread may be late by more than a margin this small.
        """
        bucket = shard_id % self._settings.buckets
        for refused in range(MOST_TRIES):
            if refused and self._stop.wait(_pause(self._settings.interval)):
                return Failed(shard_id, bucket, "stopped")
            with self._queue.acquire(shard_id) as permit:
                waited = self.elapsed
                connection.send(identify(shard_id, self._settings.shards))
                if connection.becomes_ready():
                    return Started(shard_id, bucket, self.elapsed, waited, refused)
                permit.rejected()
        return Failed(shard_id, bucket, f"gave up after {MOST_TRIES} refusals")

    def _fail(self, shard_id: int, error: Exception) -> None:
        self.outcomes.put(Failed(shard_id, shard_id % self._settings.buckets, _reason(error)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for gate in self._gates:
            gate.set()
        deadline = self.elapsed + 1
        for thread in self._threads:
            thread.join(max(0.0, deadline - self.elapsed))


def _pause(interval: float) -> float:
    """Return the 1 to 5 random seconds that Discord wants after Invalid Session, to our scale."""
    return random.uniform(1, 5) * interval / IDENTIFY_INTERVAL


def _reason(error: Exception) -> str:
    match error:
        case GatewayFailure() | GatewayQueueError() | RuntimeError():
            return str(error)
        case TimeoutError():
            return f"no answer from the gateway within {PATIENCE:g} s"
        case OSError(strerror=str(text)):
            return text
    return repr(error)


# --- what is shown ---------------------------------------------------------------------------------


class Display(Protocol):
    """Shows how the shards start. Entered before the first of them, left after the last."""

    def tell(self, outcome: Outcome) -> None:
        """Take note of one more outcome."""

    def draw(self, elapsed: float) -> None:
        """Show how things are, so many seconds after the start."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class LineDisplay:
    """One line for each shard, when it has started: for pipes and files."""

    def __enter__(self) -> Self:
        _say(" time (s)   shard  bucket  waited (s)")
        return self

    def tell(self, outcome: Outcome) -> None:
        """Print the line of this shard."""
        shard = f"{outcome.shard_id:6}  {outcome.bucket:6}"
        if isinstance(outcome, Failed):
            _say(f"        -  {shard}  failed: {outcome.why}")
            return
        refused = f"  refused {_count(outcome.refused, 'time')} before" if outcome.refused else ""
        _say(f"{outcome.at:9.3f}  {shard}  {outcome.waited:10.3f}{refused}")

    def draw(self, elapsed: float) -> None:
        """Show nothing that is not told."""

    def __exit__(self, *exc_info: object) -> None:
        """Leave the lines as they are."""


Row = list[tuple[str, str]]  # texts, each with the number of its colour ("" for none)

GREEN, RED, DIM = "32", "31", "2"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
MOST_BUCKET_ROWS, BAR_WIDTH = 16, 20


class LiveDisplay:
    """A picture of all buckets, drawn over and over in the same place: for terminals.

    The cursor is hidden only within a picture, and a picture is one write: however this ends, the
    terminal is as it was.
    """

    def __init__(
        self,
        settings: Settings,
        queue: GatewayQueue,
        referee: Referee,
        stream: TextIO,
        *,
        colour: bool,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._referee = referee
        self._stream = stream
        self._colour = colour
        self._marks = _marks(stream.encoding)
        self._started: Counter[int] = Counter()
        self._failed = 0
        self._height = 0

    def __enter__(self) -> Self:
        return self

    def tell(self, outcome: Outcome) -> None:
        """Take note of one more outcome."""
        if isinstance(outcome, Started):
            self._started[outcome.bucket] += 1
        else:
            self._failed += 1

    def draw(self, elapsed: float) -> None:
        """Draw the picture over the one before."""
        columns, lines = shutil.get_terminal_size()
        rows = self._rows(elapsed, columns, lines)
        up = f"\x1b[{self._height}F" if self._height else ""
        body = "".join(f"{self._paint(row, columns - 1)}\x1b[K\n" for row in rows)
        self._height = len(rows)
        self._stream.write(f"{HIDE_CURSOR}{up}{body}\x1b[J{SHOW_CURSOR}")
        self._stream.flush()

    def __exit__(self, *exc_info: object) -> None:
        self._stream.write(SHOW_CURSOR)
        self._stream.flush()

    def _rows(self, elapsed: float, columns: int, lines: int) -> list[Row]:
        """Return a row for each bucket and one for all, or that one with a bar if they do not fit."""
        settings = self._settings
        etas = _etas(self._queue)
        refused = Counter(refusal.bucket for refusal in tuple(self._referee.refusals))
        total = self._total_row(elapsed, max(etas.values(), default=None), refused.total())
        if settings.buckets > min(MOST_BUCKET_ROWS, lines - 4) or columns < 60:
            return [[*self._bar(self._started.total(), settings.shards), ("  ", ""), *total]]
        rows = [
            self._bucket_row(bucket, etas, refused[bucket]) for bucket in range(settings.buckets)
        ]
        return [*rows, total]

    def _total_row(self, elapsed: float, eta: float | None, refused: int) -> Row:
        row = [
            (f"{self._started.total()} of {self._settings.shards} started, {elapsed:.1f} s", ""),
            (f", {refused} refused", RED if refused else ""),
        ]
        if self._failed:
            row.append((f", {self._failed} failed", RED))
        if eta is not None:
            row.append((f", done in {eta:.1f} s", ""))
        return row

    def _bucket_row(self, bucket: int, etas: Mapping[int, float], refused: int) -> Row:
        shards, buckets = self._settings.shards, self._settings.buckets
        size = len(range(bucket, shards, buckets))
        started = self._started[bucket]
        digits = len(str(-(-shards // buckets)))
        row = [
            (f"bucket {bucket:2}  ", ""),
            *self._bar(started, size),
            (f"  {started:{digits}}/{size}", ""),
        ]
        if bucket in etas:
            row.append((f"  done in {etas[bucket]:.1f} s", DIM))
        if refused:
            row.append((f"  {refused} refused", RED))
        return row

    def _bar(self, done: int, of: int) -> Row:
        full = done * BAR_WIDTH // of
        return [(self._marks[0] * full, GREEN), (self._marks[1] * (BAR_WIDTH - full), DIM)]

    def _paint(self, row: Row, width: int) -> str:
        """Return the row as text of at most this width, in colour if that is wanted."""
        painted = []
        for text, colour in row:
            shown, width = text[:width], max(0, width - len(text))
            painted.append(f"\x1b[{colour}m{shown}\x1b[m" if colour and self._colour else shown)
        return "".join(painted)


def _etas(queue: GatewayQueue) -> dict[int, float]:
    """Return in how many seconds each bucket with a line will have granted to all of it."""
    return {
        bucket.bucket: bucket.shards[-1].eta
        for bucket in queue.snapshot().buckets
        if bucket.shards and bucket.shards[-1].eta is not None
    }


def _marks(encoding: str) -> tuple[str, str]:
    """Return what bars are drawn with: their full and their empty part."""
    try:
        "█·".encode(encoding)
    except UnicodeEncodeError:
        return "#", "."
    return "█", "·"


def speaks_ansi(stream: TextIO | None, environ: Mapping[str, str], platform: str) -> bool:
    """Return whether the stream is a terminal on which things can be drawn."""
    if stream is None or not stream.isatty():
        return False
    if platform == "win32":  # only the newer of its terminals does, unasked
        return "WT_SESSION" in environ
    return environ.get("TERM", "dumb") != "dumb"


def make_display(settings: Settings, queue: GatewayQueue, referee: Referee) -> Display:
    """Return the display that suits what standard output is."""
    if not speaks_ansi(sys.stdout, os.environ, sys.platform):
        return LineDisplay()
    colour = not os.environ.get("NO_COLOR")
    return LiveDisplay(settings, queue, referee, sys.stdout, colour=colour)


def _say(text: str) -> None:
    print(text, flush=True)


# --- what is said at the end -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """How it went: what became of the shards, and what the referee saw."""

    settings: Settings
    outcomes: Sequence[Outcome]
    identifies: int
    refused: int
    shortest_gap: float | None
    took: float
    least_time: float
    token_reset: bool = False

    @property
    def started(self) -> int:
        """How many shards got their READY."""
        return sum(isinstance(outcome, Started) for outcome in self.outcomes)

    @property
    def fine(self) -> bool:
        """Whether all shards started and no rule was broken."""
        return self.started == self.settings.shards and not self.refused


def introduction(settings: Settings) -> str:
    """Return what is about to be shown."""
    how = f"queued with a margin of {settings.margin:g} s" if settings.with_queue else "not queued"
    return (
        f"Starting {_count(settings.shards, 'shard')} in {_count(settings.buckets, 'bucket')}, {how}.\n"
        f"The gateway accepts one IDENTIFY per bucket every {settings.interval:g} s.\n"
    )


def summary(result: Result) -> str:
    """Return what is to be said of a result."""
    lines = [
        "",
        _verdict(result),
        f"  shards started       {result.started} of {result.settings.shards}",
        f"  refused              {result.refused} of {result.identifies} IDENTIFYs",
        f"  shortest gap         {_gap(result)}",
        f"  total time           {_time(result)}",
        f"  session starts left  {_starts_left(result)}",
        *_failures(result.outcomes),
    ]
    if result.refused:
        lines += ["", _advice(result.settings)]
    return "\n".join(lines)


def _verdict(result: Result) -> str:
    if result.token_reset:
        total = result.settings.limit.total
        return f"A rule was broken: past {total} IDENTIFYs, Discord resets the bot's token."
    if result.refused:
        return "A rule was broken: IDENTIFYs came too fast, and got Invalid Session."
    if not result.fine:
        return "Not all shards started."
    return "All shards started, and no rule was broken."


def _advice(settings: Settings) -> str:
    if settings.with_queue:
        return (
            "An IDENTIFY was on its way for longer than a whole interval, as on a machine that is very\n"
            "busy: try a longer --interval."
        )
    return "With the queue nothing is refused: run this again without --no-queue."


def _gap(result: Result) -> str:
    rule = f"the rule: at least {result.settings.interval:g} s"
    if result.shortest_gap is None:
        return f"none, no bucket had two ({rule})"
    return f"{result.shortest_gap:.3f} s in a bucket ({rule})"


def _time(result: Result) -> str:
    took = f"{result.took:.3f} s"
    if result.started < result.settings.shards or not result.least_time:
        return took
    ratio = result.took / result.least_time
    return f"{took}, {ratio:.3f} times the least possible ({result.least_time:.3f} s)"


def _starts_left(result: Result) -> str:
    total = result.settings.limit.total
    burnt = f", {result.refused} burnt by refusals" if result.refused else ""
    return f"{max(0, total - result.identifies)} of {total}{burnt}"


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for each reason why shards did not start."""
    reasons = Counter(outcome.why for outcome in outcomes if isinstance(outcome, Failed))
    return [f"  {_count(many, 'shard')}: {why}" for why, many in reasons.most_common()]


def _count(many: int, noun: str) -> str:
    return f"{many} {noun}" if many == 1 else f"{many} {noun}s"


# --- the command -----------------------------------------------------------------------------------


def demonstrate(settings: Settings) -> Result:
    """Start all shards, show how they do, and return the result."""
    queue, referee = settings.make_queue(), settings.make_referee()
    display = make_display(settings, queue, referee)
    with (
        Gateway(referee).serving() as gateway,
        Fleet(settings, queue, gateway.address) as fleet,
        queue,
        display,
    ):
        fleet.start()
        outcomes = watch(fleet, settings.shards, display)
    return Result(
        settings=settings,
        outcomes=outcomes,
        identifies=referee.accepted + referee.refused,
        refused=referee.refused,
        shortest_gap=referee.shortest_gap,
        took=gateway.took,
        least_time=referee.least_time(range(settings.shards)),
        token_reset=referee.token_reset,
    )


def watch(fleet: Fleet, shards: int, display: Display) -> list[Outcome]:
    """Show every outcome until all are there, and a picture every now and then."""
    outcomes: list[Outcome] = []
    next_picture = 0.0
    while len(outcomes) < shards:
        if fleet.elapsed >= next_picture:
            display.draw(fleet.elapsed)
            next_picture = fleet.elapsed + FRAME
        with contextlib.suppress(Empty):
            outcomes.append(fleet.outcomes.get(timeout=max(0.0, next_picture - fleet.elapsed)))
            display.tell(outcomes[-1])
    display.draw(fleet.elapsed)
    return outcomes


def make_room(files: int) -> None:
    """Let this process open so many files, where that is limited and may be raised."""
    try:
        import resource  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        with contextlib.suppress(OSError, ValueError):  # then the shards will say what they lack
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0 if all went by the rules, else 1."""
    interval, margin = arguments.interval, arguments.margin
    settings = Settings(
        shards=arguments.shards,
        max_concurrency=arguments.max_concurrency,
        interval=interval,
        margin=interval * DEFAULT_MARGIN / IDENTIFY_INTERVAL if margin is None else margin,
        with_queue=arguments.with_queue,
    )
    make_room(2 * settings.shards + 50)
    _say(introduction(settings))
    result = demonstrate(settings)
    _say(summary(result))
    return 0 if result.fine else 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to those of the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="start shards at a small gateway on this machine that judges every IDENTIFY",
        description="Start shards at a small gateway on this machine that judges every IDENTIFY. "
        "Exits with 0 if all started by the rules, else with 1.",
    )
    parser.add_argument(
        "--shards",
        type=_shards,
        default=16,
        metavar="N",
        help="how many shards to start (default: %(default)s)",
    )
    parser.add_argument(
        "--max-concurrency",
        type=_whole,
        default=4,
        metavar="N",
        help="how many buckets the shards have (default: %(default)s)",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=0.5,
        metavar="SECONDS",
        help="the least time between two IDENTIFYs of a bucket (default: %(default)s; Discord's: 5)",
    )
    parser.add_argument(
        "--margin",
        type=_margin,
        metavar="SECONDS",
        help="what the queue adds to that (default: a twentieth of the interval)",
    )
    parser.add_argument(
        "--no-queue",
        dest="with_queue",
        action="store_false",
        help="show what happens without the queue: all shards identify at once",
    )
    parser.set_defaults(func=run)


MOST_SHARDS = 4096  # each is two threads and a connection of this machine


def _whole(text: str) -> int:
    with contextlib.suppress(ValueError):
        return whole_number("it", int(text), least=1)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")


def _shards(text: str) -> int:
    shards = _whole(text)
    if shards > MOST_SHARDS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_SHARDS}, not {text!r}")
    return shards


def _interval(text: str) -> float:
    with contextlib.suppress(ValueError):
        return seconds("it", float(text), above=0)
    raise argparse.ArgumentTypeError(f"must be a finite number of seconds above 0, not {text!r}")


def _margin(text: str) -> float:
    with contextlib.suppress(ValueError):
        return seconds("it", float(text))
    raise argparse.ArgumentTypeError(f"must be a finite number of seconds from 0 on, not {text!r}")
