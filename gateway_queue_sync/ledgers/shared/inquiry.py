"""Asking a shared ledger without a worker: when a queue is made, and for the commands.

Each of these functions asks until there is a reply, for 5 seconds at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

from gateway_queue_sync import forecast
from gateway_queue_sync.clock import FOREVER_US, SYSTEM_CLOCK, start
from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.answers import Answers
from gateway_queue_sync.ledgers.shared.backend import Backend, Busy, Unreachable
from gateway_queue_sync.ledgers.shared.messages import Reply, Request
from gateway_queue_sync.ledgers.shared.session import Session, budget_of
from gateway_queue_sync.ledgers.shared.stored_lines import NoLines
from gateway_queue_sync.models import US_PER_SECOND, QueueSnapshot, to_us
from gateway_queue_sync.settings import Settings

log = logging.getLogger("gateway_queue_sync")

MAX_OPEN_US = 5 * US_PER_SECOND  # how long a reply is waited for
MAX_LATE_US = 40_000  # how much later the error may come of a ledger that was busy all the time
BUSY_PAUSE = 0.02  # s, until a busy ledger is asked again
WARN_AFTER = 1.0  # s, until a WARNING says what a queue that is being made waits for


def first_reply(backend: Backend, request: Request) -> Reply:
    """Have the first request of a queue answered, in a thread of its own: a client may have no timeout.

    Raises:
        Unreachable: it was not answered within 5 seconds.
        LedgerError: the ledger cannot be used.
    """
    since_us = SYSTEM_CLOCK.now_us()
    answered: Future[Reply] = Future()
    args = backend, request, answered
    thread = threading.Thread(target=_answer, args=args, name="gateway-queue-open", daemon=True)
    start(thread)
    try:
        if wait([answered], min(WARN_AFTER, MAX_OPEN_US / US_PER_SECOND)).not_done:
            log.warning("waiting for %r", backend)
            left_us = since_us + MAX_OPEN_US + MAX_LATE_US - SYSTEM_CLOCK.now_us()
            if wait([answered], max(0, left_us) / US_PER_SECOND).not_done:
                raise Unreachable(f"{backend!r} did not answer within 5 s") from TimeoutError()
        return answered.result()
    finally:
        if not answered.cancel():  # there is a reply: the thread ends, so that a fork finds none
            thread.join()


def _answer(backend: Backend, request: Request, answered: Future[Reply]) -> None:
    """Have a request answered, and complete the future of the reply unless it was cancelled."""
    try:
        reply = _ask_patiently(backend, request, answered.cancelled)
    except BaseException as error:  # noqa: BLE001 - who waits for the answer raises it
        if answered.set_running_or_notify_cancel():
            answered.set_exception(error)
    else:
        if answered.set_running_or_notify_cancel():
            answered.set_result(reply)


def _ask_patiently(
    backend: Backend, request: Request, stops: Callable[[], bool] = lambda: False
) -> Reply:
    """Have a request answered. A busy ledger has not applied it, and is asked again."""
    give_up_us = SYSTEM_CLOCK.now_us() + MAX_OPEN_US
    while True:
        try:
            return backend.ask(request)
        except Busy:
            if SYSTEM_CLOCK.now_us() >= give_up_us or stops():
                raise
        time.sleep(BUSY_PAUSE)


def converse(backend: Backend, session: Session) -> Answers:
    """Send all that a session without waiters has to send. Return what the last reply means.

    Raises:
        LedgerError: the ledger refuses it, or could not be reached for 5 seconds.
    """
    answers, now_us = Answers(), SYSTEM_CLOCK.now_us
    give_up_us = now_us() + MAX_OPEN_US
    while (wake_us := session.wake_us(now_us())) < FOREVER_US:
        time.sleep(max(0, wake_us - now_us()) / US_PER_SECOND)
        lines = NoLines(session.max_concurrency)
        request = session.compose(lines, now_us(), can_read=False)
        if request is None:
            continue
        try:
            reply = backend.ask(request)
        except (Busy, Unreachable) as error:
            if now_us() >= give_up_us:
                raise
            session.failed(request, error, now_us())
            continue
        answers = session.answered(request, reply, now_us())
        if answers.error is not None:
            raise LedgerError(f"{backend!r}: {answers.error}")
    return answers


def seen_in(
    reply: Reply, own: dict[int, list[messages.Waiter]], reserve: int | None = None
) -> QueueSnapshot:
    """Return the snapshot of an account, from a reply with a look and the waiters of this process.

    Of other processes the ledger knows the first two waiters of each line, and how many more there are.
    Without a ``reserve``, that of the process that asked last for a permit counts.
    """
    look, left = reply.look, budget_of(reply)
    assert look is not None
    outlook = forecast.Outlook(
        now_us=reply.now_us,
        window_us=reply.interval_us + reply.margin_us,
        period_us=look.period_us,
        reserve=look.reserve if reserve is None else reserve,
        max_concurrency=reply.max_concurrency,
        ready_in_us=dict(look.ready),
        others_ready_in_us=look.others_ready_in_us,
        budget=left,
        granted=reply.granted,
        knows_limit=left is not None,
    )
    lines = {number: [(one, 0) for one in waiters] for number, waiters in own.items()}
    for line in look.lines:
        *others, last = line.waiters  # those that are only counted come after it
        lines.setdefault(line.bucket, []).extend([*((one, 0) for one in others), (last, line.more)])
    for waiters in lines.values():
        waiters.sort(key=lambda entry: (entry[0].position_us, entry[0].number))
    known = {number: [one for one, _ in line] for number, line in lines.items()}
    unknown = {number: [more for _, more in line] for number, line in lines.items()}
    return forecast.snapshot(outlook, known, unknown)


def peek(backend: Backend, settings: Settings) -> QueueSnapshot:
    """Return the snapshot of an account without taking part in it. Raises as ``look``."""
    return seen_in(look(backend, settings), {})


def look(backend: Backend, settings: Settings) -> Reply:
    """Return the state of an account without taking part in it.

    Raises:
        LedgerError: there is no account, or it cannot be reached.
    """
    interval_us, margin_us, period_us = settings.timings_us
    now_us, lease_us = settings.clock.now_us(), to_us(settings.lease)
    wanted = interval_us, margin_us, period_us, lease_us, settings.reserve
    reply = _ask_patiently(backend, Request(1, now_us, "", 1, *wanted, 0, 0, look=1, layout=0))
    if reply.status == messages.REFUSED:
        raise LedgerError(f"{backend!r}: the ledger refuses this process: {reply.error}")
    if reply.status != messages.OK:
        raise LedgerError(f"{backend!r} holds no account of that name") from LookupError()
    return reply
