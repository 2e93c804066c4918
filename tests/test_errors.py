"""Errors: their attributes, messages and base classes, and that they can be pickled."""

from __future__ import annotations

import copy
import pickle

import pytest

from gateway_queue_sync import (
    AcquireTimeout,
    GatewayBotError,
    GatewayQueueError,
    LedgerError,
    QueueClosed,
    SessionLimitExhausted,
)
from gateway_queue_sync import errors as module

ERRORS = [
    GatewayQueueError(),
    GatewayQueueError("something", "else"),
    AcquireTimeout(7, 2.5, 10.25),
    AcquireTimeout(7, 0.0),
    QueueClosed(),
    QueueClosed("closed for the night"),
    SessionLimitExhausted(3, 3600.0),
    GatewayBotError("no answer"),
    GatewayBotError("the token is wrong", 401),
    GatewayBotError("too many requests", 429, 12.5),
    LedgerError(),
    LedgerError("the ledger is out of reach"),
]


def text(error):
    return f"{type(error).__name__}: {error}"


# --- the family -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (GatewayQueueError, (Exception,)),
        (AcquireTimeout, (GatewayQueueError, TimeoutError)),
        (QueueClosed, (GatewayQueueError, RuntimeError)),
        (SessionLimitExhausted, (GatewayQueueError,)),
        (GatewayBotError, (GatewayQueueError,)),
        (LedgerError, (GatewayQueueError,)),
    ],
)
def test_every_error_has_its_place_in_the_family(error, bases):
    assert error.__bases__ == bases


def test_one_except_catches_all_that_is_raised_on_purpose():
    defined = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    assert defined == {type(error) for error in ERRORS}
    assert all(issubclass(error, GatewayQueueError) for error in defined)


def test_a_timeout_is_caught_as_pythons_own():
    with pytest.raises(TimeoutError):
        raise AcquireTimeout(7, 2.5, 10.25)


def test_a_timeout_is_no_failed_system_call():
    """``TimeoutError`` is an ``OSError``, which takes two arguments for errno and strerror."""
    error = AcquireTimeout(7, 2.5, 10.25)
    assert (error.errno, error.strerror, error.filename) == (None, None, None)


# --- figures and words ----------------------------------------------------------------------------


def test_a_timeout_says_who_waited_how_long_and_for_what():
    error = AcquireTimeout(7, 2.5, 10.25)
    assert (error.shard_id, error.timeout, error.eta) == (7, 2.5, 10.25)
    assert str(error) == ("shard 7 got no permit within 2.5 s; it would have come in about 10.25 s")


def test_a_timeout_without_an_eta_promises_nothing():
    error = AcquireTimeout(shard_id=7, timeout=0.0)
    assert error.eta is None
    assert str(error) == "shard 7 got no permit within 0 s"


def test_an_eta_of_no_time_is_one():
    assert str(AcquireTimeout(7, 1.0, 0.0)).endswith("in about 0.00 s")


def test_a_closed_queue_says_so():
    assert str(QueueClosed()) == "the queue is closed: it grants no more permits"


def test_exhaustion_says_when_it_ends():
    error = SessionLimitExhausted(0, 3600.4)
    assert (error.remaining, error.resets_in) == (0, 3600.4)
    assert str(error) == "the session start limit is used up; it resets in 3600 s"


def test_exhaustion_says_what_is_kept_in_reserve():
    error = SessionLimitExhausted(remaining=3, resets_in=60.0)
    assert str(error) == (
        "the session start limit is used up (3 left, all of it reserved); it resets in 60 s"
    )


def test_a_failed_reading_of_the_limit_has_the_status_that_came():
    assert GatewayBotError("the token is wrong", 401).status == 401
    assert GatewayBotError("no answer").status is None
    assert str(GatewayBotError("the token is wrong", 401)) == "the token is wrong"


def test_a_failed_reading_of_the_limit_has_the_seconds_that_discord_asked_to_wait():
    assert GatewayBotError("too many requests", 429, 12.5).retry_after == 12.5
    assert GatewayBotError("no answer").retry_after is None


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", ERRORS, ids=text)
def test_an_error_comes_out_of_a_pickle_as_it_went_in(error, protocol):
    twin = pickle.loads(pickle.dumps(error, protocol))
    assert type(twin) is type(error)
    assert vars(twin) == vars(error)
    assert (str(twin), twin.args) == (str(error), error.args)


@pytest.mark.parametrize("error", ERRORS, ids=text)
def test_an_error_can_be_copied(error):
    twin = copy.copy(error)
    assert type(twin) is type(error)
    assert (vars(twin), str(twin)) == (vars(error), str(error))
