"""Limits, permits and snapshots: what they accept and refuse, and their errors."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import pickle
import threading
from types import MappingProxyType

import pytest

from gateway_queue_sync import (
    DEFAULT_MARGIN,
    IDENTIFY_INTERVAL,
    SESSION_PERIOD,
    BucketSnapshot,
    LimitSnapshot,
    Permit,
    QueueSnapshot,
    Report,
    SessionStartLimit,
    WaitingShard,
)
from gateway_queue_sync.models import seconds

GOOD = {"total": 1000, "remaining": 999, "reset_after": 14_400.0, "max_concurrency": 16}
COUNTS = ["total", "remaining", "max_concurrency"]
PAYLOAD = {"total": 1000, "remaining": 999, "reset_after": 14_400_000, "max_concurrency": 16}


class Seven:
    """An integer as numpy has them: no ``int``, but usable as one."""

    def __index__(self):
        return 7


# --- session start limits -------------------------------------------------------------------------


def test_a_limit_keeps_its_figures():
    limit = SessionStartLimit(**GOOD)
    assert dataclasses.asdict(limit) == GOOD


def test_a_limit_of_nothing_that_resets_at_once_is_one():
    limit = SessionStartLimit(total=0, remaining=0, reset_after=0, max_concurrency=1)
    assert (limit.total, limit.remaining, limit.reset_after) == (0, 0, 0.0)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("wrong", [True, 16.0, math.nan, "16", b"16", None, [16]], ids=repr)
def test_a_count_that_is_no_integer_is_refused_by_name(name, wrong):
    with pytest.raises(TypeError, match=rf"^{name} must be a whole number, not "):
        SessionStartLimit(**GOOD | {name: wrong})


@pytest.mark.parametrize("name", COUNTS)
def test_a_negative_count_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name} must be at least \d, not -1$"):
        SessionStartLimit(**GOOD | {name: -1})


def test_there_is_at_least_one_bucket():
    with pytest.raises(ValueError, match=r"^max_concurrency must be at least 1, not 0$"):
        SessionStartLimit(**GOOD | {"max_concurrency": 0})


def test_no_more_can_remain_than_there_is_in_total():
    with pytest.raises(ValueError, match=r"^remaining \(1001\) is more than total \(1000\)$"):
        SessionStartLimit(**GOOD | {"remaining": 1001})


def test_all_of_the_total_can_remain():
    assert SessionStartLimit(**GOOD | {"remaining": 1000}).remaining == 1000


@pytest.mark.parametrize("name", COUNTS)
def test_whatever_is_an_index_counts_and_becomes_an_int(name):
    limit = SessionStartLimit(**GOOD | {"remaining": 0, name: Seven()})
    assert getattr(limit, name) == 7
    assert type(getattr(limit, name)) is int


@pytest.mark.parametrize("wrong", [True, "14400", None, 1j], ids=repr)
def test_a_reset_that_is_no_number_is_refused(wrong):
    with pytest.raises(TypeError, match=r"^reset_after must be a number, not "):
        SessionStartLimit(**GOOD | {"reset_after": wrong})


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (math.nan, "must be a number, not NaN"),
        (math.inf, "must be finite, not inf"),
        (-math.inf, "must be finite, not -inf"),
        (10**400, "must be finite, not inf"),
        (-(10**400), "must be finite, not -inf"),
        (1e300, "must be at most"),
        (172_800.001, r"must be at most 48 hours \(172800 s\), not 172800"),
        (
            14_400_000,
            "must be at most 48 hours .*; Discord counts in milliseconds, which from_payload",
        ),
        (-0.001, "must not be negative, not -0.001"),
    ],
)
def test_a_reset_that_can_never_be_waited_for_is_refused(wrong, why):
    with pytest.raises(ValueError, match=f"^reset_after {why}"):
        SessionStartLimit(**GOOD | {"reset_after": wrong})


def test_a_reset_may_be_48_hours_away():
    assert SessionStartLimit(**GOOD | {"reset_after": 48 * 3600}).reset_after == 172_800.0


def test_a_limit_has_at_most_100_000_buckets():
    assert SessionStartLimit(**GOOD | {"max_concurrency": 100_000}).max_concurrency == 100_000
    with pytest.raises(ValueError, match=r"^max_concurrency must be at most 100000, not 100001$"):
        SessionStartLimit(**GOOD | {"max_concurrency": 100_001})


def test_the_reset_becomes_a_float():
    limit = SessionStartLimit(**GOOD | {"reset_after": 60})
    assert type(limit.reset_after) is float


def test_a_limit_is_a_value():
    limit = SessionStartLimit(**GOOD)
    assert limit == SessionStartLimit(**GOOD)
    assert hash(limit) == hash(SessionStartLimit(**GOOD))
    assert limit != SessionStartLimit(**GOOD | {"remaining": 5})
    assert pickle.loads(pickle.dumps(limit)) == limit


def test_a_changed_copy_is_checked_anew():
    with pytest.raises(ValueError, match=r"^remaining \(2000\) is more than total"):
        dataclasses.replace(SessionStartLimit(**GOOD), remaining=2000)


# --- Discord's JSON -------------------------------------------------------------------------------


def test_the_limit_object_is_read_with_its_milliseconds_as_seconds():
    assert SessionStartLimit.from_payload(PAYLOAD) == SessionStartLimit(**GOOD)


def test_the_whole_body_of_gateway_bot_is_read_too():
    body = {"url": "wss://gateway.discord.gg", "shards": 9, "session_start_limit": PAYLOAD}
    assert SessionStartLimit.from_payload(body) == SessionStartLimit(**GOOD)


def test_any_mapping_is_a_payload():
    payload = MappingProxyType({"session_start_limit": MappingProxyType(PAYLOAD)})
    assert SessionStartLimit.from_payload(payload) == SessionStartLimit(**GOOD)


def test_fields_that_discord_may_add_are_ignored():
    assert SessionStartLimit.from_payload(PAYLOAD | {"news": 1}) == SessionStartLimit(**GOOD)


@pytest.mark.parametrize(
    ("milliseconds", "in_seconds"),
    [(0, 0.0), (1, 0.001), (1500.5, 1.5005), (86_400_000, 86_400.0), (172_800_000, 172_800.0)],
)
def test_a_reset_may_be_due_now_or_in_48_hours(milliseconds, in_seconds):
    limit = SessionStartLimit.from_payload(PAYLOAD | {"reset_after": milliseconds})
    assert limit.reset_after == in_seconds


@pytest.mark.parametrize("milliseconds", [172_800_001, 2_592_000_000])
def test_a_reset_in_more_than_48_hours_is_refused_as_seconds(milliseconds):
    with pytest.raises(ValueError, match=r"^reset_after must be at most 48 hours"):
        SessionStartLimit.from_payload(PAYLOAD | {"reset_after": milliseconds})


@pytest.mark.parametrize("name", ["total", "remaining", "reset_after"])
def test_a_field_that_is_missing_is_named(name):
    payload = {key: value for key, value in PAYLOAD.items() if key != name}
    with pytest.raises(ValueError, match=rf"^the payload lacks {name}$"):
        SessionStartLimit.from_payload(payload)


def test_all_fields_that_are_missing_are_named_at_once():
    body = {"session_start_limit": {"total": 1000}}
    everything = r"^session_start_limit lacks remaining, reset_after$"
    with pytest.raises(ValueError, match=everything):
        SessionStartLimit.from_payload(body)


def test_a_good_payload_is_read_without_a_warning(caplog):
    SessionStartLimit.from_payload(PAYLOAD)
    assert not caplog.records


def test_a_missing_max_concurrency_counts_as_1_with_a_warning(caplog):
    payload = {key: value for key, value in PAYLOAD.items() if key != "max_concurrency"}
    limit = SessionStartLimit.from_payload({"session_start_limit": payload})
    assert limit == SessionStartLimit(**GOOD | {"max_concurrency": 1})
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("gateway_queue_sync", logging.WARNING)
    assert record.getMessage() == "session_start_limit lacks max_concurrency: 1 counts"


def test_more_remaining_than_the_total_counts_as_the_total_with_a_warning(caplog):
    limit = SessionStartLimit.from_payload(PAYLOAD | {"remaining": 1200})
    assert limit == SessionStartLimit(**GOOD | {"remaining": 1000})
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("gateway_queue_sync", logging.WARNING)
    assert record.getMessage() == "the payload says remaining=1200 of total=1000: 1000 counts"


def test_both_faults_of_one_payload_are_told():
    assert SessionStartLimit.from_payload(
        {"total": 10, "remaining": 11, "reset_after": 0}
    ) == SessionStartLimit(10, 10, 0.0, 1)


@pytest.mark.parametrize("name", PAYLOAD)
@pytest.mark.parametrize("wrong", ["1", None, True, {}], ids=repr)
def test_a_field_of_the_wrong_kind_is_named(name, wrong):
    with pytest.raises(TypeError, match=rf"^{name}\b.* must be a (whole )?number, not "):
        SessionStartLimit.from_payload(PAYLOAD | {name: wrong})


@pytest.mark.parametrize("name", PAYLOAD)
@pytest.mark.parametrize("wrong", [-1, -1000], ids=repr)
def test_a_negative_field_is_named(name, wrong):
    with pytest.raises(ValueError, match=rf"^{name} must "):
        SessionStartLimit.from_payload(PAYLOAD | {name: wrong})


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_the_json_of_a_broken_server_is_no_limit(wrong):
    """Python's JSON reader takes NaN and Infinity for numbers."""
    with pytest.raises(ValueError, match=r"^reset_after "):
        SessionStartLimit.from_payload(PAYLOAD | {"reset_after": wrong})


@pytest.mark.parametrize(
    "wrong", [None, [PAYLOAD], "the session_start_limit as text", 7, [("total", 1)]], ids=repr
)
def test_what_is_no_json_object_is_no_payload(wrong):
    with pytest.raises(TypeError, match=r"^the payload must be a JSON object, not "):
        SessionStartLimit.from_payload(wrong)


def test_a_limit_in_the_body_that_is_no_object_is_named():
    with pytest.raises(TypeError, match=r"^session_start_limit must be a JSON object, not list$"):
        SessionStartLimit.from_payload({"session_start_limit": [1000, 999, 0, 16]})


# --- seconds --------------------------------------------------------------------------------------


def test_seconds_can_be_as_long_as_a_lock_can_wait():
    assert seconds("interval", threading.TIMEOUT_MAX) == threading.TIMEOUT_MAX
    with pytest.raises(ValueError, match=r"^interval must be at most \d+ s, not "):
        seconds("interval", math.nextafter(threading.TIMEOUT_MAX, math.inf))


def test_seconds_can_be_none_unless_they_must_be_more():
    assert seconds("margin", 0) == 0.0
    with pytest.raises(ValueError, match=r"^interval must be more than 0 s, not 0$"):
        seconds("interval", 0, above=0)


def test_the_figures_are_discords():
    assert (IDENTIFY_INTERVAL, SESSION_PERIOD) == (5.0, 24 * 60 * 60)
    assert 0 < DEFAULT_MARGIN < IDENTIFY_INTERVAL


# --- permits --------------------------------------------------------------------------------------


class Reporter:
    """What permits are reported to, as a queue does it."""

    def __init__(self):
        self.reports = []

    def report(self, permit, report):
        permit.reported = report
        self.reports.append((permit.shard_id, report))

    def permit(self, shard_id=3):
        permit = Permit(shard_id)
        permit.reporter = self
        return permit


def test_a_permits_signature_shows_what_users_may_pass():
    assert list(inspect.signature(Permit).parameters) == [
        "shard_id",
        "bucket",
        "waited",
        "remaining",
    ]


def test_a_permit_can_be_made_from_its_shard_alone():
    permit = Permit(17)
    assert (permit.shard_id, permit.bucket, permit.waited, permit.remaining) == (17, 0, 0.0, None)


@pytest.mark.parametrize("report", ["sent", "unused", "rejected"])
def test_the_reports_of_a_permit_that_stands_alone_do_nothing(report):
    permit = Permit(17)
    before = repr(permit)
    assert getattr(permit, report)() is None
    assert repr(permit) == before


def test_a_permit_that_stands_alone_can_be_used_in_a_with():
    permit = Permit(17)
    with permit as entered:
        assert entered is permit


def test_a_with_lets_exceptions_pass():
    with pytest.raises(ConnectionError), Permit(17):
        raise ConnectionError


@pytest.mark.parametrize("report", Report)
def test_a_report_tells_the_queue_which_permit_and_what(report):
    reporter = Reporter()
    getattr(reporter.permit(3), report.value)()
    assert reporter.reports == [(3, report)]


def test_leaving_the_with_reports_it_sent():
    reporter = Reporter()
    with reporter.permit():
        assert reporter.reports == []
    assert reporter.reports == [(3, Report.SENT)]


def test_leaving_the_with_by_an_exception_reports_it_sent():
    """The IDENTIFY may have gone out before the exception came."""
    reporter = Reporter()
    with pytest.raises(ConnectionError), reporter.permit():
        raise ConnectionError
    assert reporter.reports == [(3, Report.SENT)]


@pytest.mark.parametrize("report", Report)
def test_leaving_the_with_adds_nothing_to_an_earlier_report(report):
    reporter = Reporter()
    with reporter.permit() as permit:
        getattr(permit, report.value)()
    assert reporter.reports == [(3, report)]


def test_a_permit_shows_what_it_is_for():
    permit = Permit(17, bucket=1, waited=5.25)
    assert repr(permit) == "<Permit shard_id=17 bucket=1 waited=5.250>"


def test_a_permit_shows_the_budget_that_was_left_even_if_nothing_was():
    assert repr(Permit(2, remaining=0)) == "<Permit shard_id=2 bucket=0 waited=0.000 remaining=0>"


def test_a_permit_shows_its_report():
    permit = Reporter().permit()
    permit.rejected()
    assert repr(permit) == "<Permit shard_id=3 bucket=0 waited=0.000 rejected>"


# --- snapshots ------------------------------------------------------------------------------------

SHARD = WaitingShard(shard_id=3, waited=1.0, eta=None)
BUCKET = BucketSnapshot(bucket=0, ready_in=4.25, shards=(SHARD,))
LIMIT = LimitSnapshot(total=1000, remaining=998, resets_in=86_000.0)
SNAPSHOT = QueueSnapshot(waiting=1, granted=2, buckets=(BUCKET,), limit=LIMIT)


@pytest.mark.parametrize(
    "value",
    [SHARD, BUCKET, LIMIT, SNAPSHOT, SessionStartLimit(**GOOD)],
    ids=lambda value: type(value).__name__,
)
def test_nothing_in_a_snapshot_can_be_changed(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, 0)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(value, field.name)


def test_snapshots_are_values():
    assert pickle.loads(pickle.dumps(SNAPSHOT)) == SNAPSHOT
    assert dataclasses.replace(SNAPSHOT, waiting=0) != SNAPSHOT
    assert hash(SNAPSHOT) == hash(pickle.loads(pickle.dumps(SNAPSHOT)))
