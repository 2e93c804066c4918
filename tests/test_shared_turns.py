"""The rules of shared ledgers, and one process's side of them, without a process or a ledger."""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass, field, replace

import pytest
from memory_store import MemoryStore

from gateway_queue_sync.ledgers.shared import messages
from gateway_queue_sync.ledgers.shared.answers import SessionSettings
from gateway_queue_sync.ledgers.shared.backend import Busy
from gateway_queue_sync.ledgers.shared.messages import (
    FORGET,
    INTRODUCE,
    OK,
    OPEN,
    READ,
    REFUSED,
    SENT,
    UNUSED,
    UPDATE,
    Introduction,
    Limit,
    Line,
    Reply,
    Report,
    Request,
    Waiter,
    from_wire,
    to_wire,
)
from gateway_queue_sync.ledgers.shared.session import Session
from gateway_queue_sync.models import Permit, SessionStartLimit
from gateway_queue_sync.models import Report as Said

S = 1_000_000
WINDOW = 5 * S + S // 4
LIMIT = SessionStartLimit(total=1000, remaining=1000, reset_after=0.0, max_concurrency=1)


def limit(kind, remaining=1000, reset_after=86_400 * S, buckets=1, at_us=0):
    return Limit(kind, 1000, remaining, reset_after, buckets, at_us, at_us)


@dataclass
class Talker:
    """A session whose requests a test writes itself."""

    ledger: Ledger
    name: str
    settings: dict[str, int] = field(default_factory=dict)
    number: int = 0
    latest: Request | None = None

    def introduce(self, **what):
        fields = {
            "replaces": "", "bot": "", "limit": limit(OPEN, reset_after=0),
            "granted": 0, "period": 0, "layout": 0, "seen": None,
        }  # fmt: skip
        return self.say(introduction=Introduction(**(fields | what)))

    def say(self, **what) -> Reply:
        if self.latest is not None and self.ledger.now_us - self.latest.sent_us > 60 * S:
            self.number, self.latest = 0, None  # it counts as removed
            self.introduce(limit=None)
        self.number += 1
        account = self.ledger.store._account
        settings = {
            "interval_us": 5 * S, "margin_us": S // 4, "period_us": 86_400 * S, "lease_us": 5 * S,
            "can_read": 0,
        } | self.settings  # fmt: skip
        self.latest = Request(
            attempt=self.number, sent_us=self.ledger.now_us, session=self.name, number=self.number,
            reserve=0, reread_us=600 * S, look=0,
            layout=0 if account is None else account.layout, **settings,
        )._replace(**what)  # fmt: skip
        return self.ledger.answer(self.latest)

    def ask(self, number=1, bucket=0, position_us=None, **what) -> Reply:
        at_us = self.ledger.now_us if position_us is None else position_us
        waiter = Waiter(number, bucket, at_us, at_us, **what)
        return self.say(lines=(Line(bucket, 0, (waiter,)),))

    def later_ask(self, number: int) -> int:
        """Ask a window later, and return how many are left."""
        self.ledger.later(WINDOW)
        return self.ask(number).permits[0].remaining

    def again(self) -> Reply:
        assert self.latest is not None
        return self.ledger.answer(self.latest._replace(attempt=99, sent_us=self.ledger.now_us))


class Ledger:
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.now_us = 1_000 * S

    def answer(self, request: Request, **what) -> Reply:
        wire = json.loads(json.dumps(to_wire(request)))
        reply = self.store.answer(from_wire(Request, wire), self.now_us, self.now_us, **what)
        return from_wire(Reply, json.loads(json.dumps(to_wire(reply))))

    def talker(self, name="a", **settings) -> Talker:
        talker = Talker(self, name, settings)
        talker.introduce()
        return talker

    def later(self, us: int) -> Ledger:
        self.now_us += us
        return self


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


# --- exactly once ---------------------------------------------------------------------------------


def test_a_new_ledger_grants_nothing_for_one_window(ledger):
    talker = ledger.talker()
    assert talker.ask().waits[0].opens_us == WINDOW
    ledger.later(WINDOW)
    assert talker.ask().permits[0].serial == 1


def test_an_introduction_may_come_twice_and_takes_nothing(ledger):
    talker = ledger.talker()
    before = ledger.store.copy()
    assert talker.again().status == OK
    assert ledger.store._account == before._account


def test_a_request_that_comes_twice_grants_one_permit_which_ages(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    first = talker.ask()
    ledger.later(S)
    second = talker.again()
    assert [one.serial for one in second.permits] == [one.serial for one in first.permits] == [1]
    assert (first.permits[0].age_us, second.permits[0].age_us) == (0, S)
    assert ledger.store._account.granted == 1


def test_a_reply_that_is_repeated_after_the_clock_was_set_back_is_too_old(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    talker.ask()
    ledger.later(-S)
    assert talker.again().permits[0].age_us >= 60 * S


def test_fault_5_an_update_that_comes_twice_counts_once(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    talker.say(limit=limit(UPDATE, remaining=5))
    update = talker.latest
    for _ in range(4):
        ledger.later(WINDOW)
        assert talker.ask().permits
    assert ledger.answer(update).status == INTRODUCE
    assert ledger.store._account.remaining == 1


def test_fault_5_a_request_that_comes_again_later_takes_no_permit(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    reply = talker.ask()
    taken = talker.latest
    talker.say(reports=(Report(UNUSED, reply.permits[0].serial, 0, reply.permits[0].period, 0),))
    assert ledger.answer(taken).permits == ()
    assert ledger.store._account.granted == 1


def test_fault_6_a_gap_closes_all_buckets_for_one_window(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    older = ledger.store.copy()
    granted = talker.ask().granted
    talker.say()
    ledger.store.restore(older)
    reply = talker.say()
    assert (reply.status, reply.lost) == (INTRODUCE, 1)
    again = Talker(ledger, "b")
    reply = again.introduce(replaces="a", granted=granted)
    assert (reply.lost, reply.granted) == (1, granted)
    assert again.ask().waits[0].opens_us == WINDOW
    ledger.later(WINDOW)
    assert again.ask().permits[0].serial == granted + 1


def test_fault_6_a_ledger_that_lost_the_session_itself_closes_all_buckets(ledger):
    other = ledger.talker("other")
    ledger.later(WINDOW)
    older = ledger.store.copy()
    talker = ledger.talker("a")
    granted = talker.ask().granted
    ledger.store.restore(older)
    assert talker.say().status == INTRODUCE
    Talker(ledger, "b").introduce(replaces="a", granted=granted)
    assert other.ask().waits[0].opens_us == WINDOW


def test_counters_of_a_process_change_nothing_in_a_ledger_that_lost_nothing(ledger):
    ledger.talker()
    before = ledger.store._account.remaining, ledger.store._account.period
    Talker(ledger, "b").introduce(limit=None, period=7, seen=limit(OPEN, remaining=0))
    account = ledger.store._account
    assert (account.remaining, account.period) == before


def test_after_a_loss_what_the_process_that_has_seen_most_grants_knew_is_left(ledger):
    talker = ledger.talker()
    older = ledger.store.copy()
    ledger.later(WINDOW)
    granted = talker.ask().granted
    ledger.store.restore(older)
    seen = limit(OPEN, remaining=7, reset_after=50 * S, at_us=ledger.now_us)
    Talker(ledger, "b").introduce(replaces="a", limit=None, granted=granted, seen=seen)
    assert ledger.store._account.remaining == 7


def test_what_a_process_has_seen_undoes_no_change_even_after_a_loss(ledger):
    """Unless it has seen more grants than the ledger, what it knows may be older: it was idle, say."""
    talker, other = ledger.talker(), Talker(ledger, "b", {"can_read": 1})
    granted = talker.say(limit=limit(UPDATE, remaining=900, reset_after=50 * S)).granted
    ledger.answer(talker.latest._replace(number=talker.number + 5))  # a gap: requests were lost
    seen = limit(OPEN, remaining=7, reset_after=50 * S, at_us=ledger.now_us)
    reply = other.introduce(limit=None, granted=granted, seen=seen)
    assert ledger.store._account.remaining == 900
    assert reply.read == 1  # what else was lost shows when the limit is read


# --- turns ----------------------------------------------------------------------------------------


def test_heads_take_in_order_and_each_one_ahead_costs_a_grace(ledger):
    first, second, third = (ledger.talker(name) for name in "abc")
    ledger.later(S)
    first.ask(), ledger.later(1), second.ask(), ledger.later(1), third.ask()
    ledger.now_us = 1_000 * S + WINDOW
    assert third.ask(position_us=ledger.now_us).waits[0].wait_us == 200_000
    assert second.ask(position_us=ledger.now_us).waits[0].wait_us == 100_000
    ledger.later(99_999)
    assert not second.ask(position_us=ledger.now_us).permits
    ledger.later(1)
    assert second.ask(position_us=ledger.now_us).permits
    assert first.ask(position_us=ledger.now_us).waits[0].opens_us == WINDOW


def test_fault_8_three_that_are_killed_at_once_cost_a_grace_each(ledger):
    dead = [ledger.talker(name) for name in "abc"]
    ledger.later(S)
    for one in dead:
        one.ask()
    ledger.later(1)
    last = ledger.talker("d")
    position_us = ledger.now_us
    opens_us = 1_000 * S + WINDOW
    while not (reply := last.ask(position_us=position_us)).permits:
        ledger.later(reply.waits[0].wait_us)
    assert ledger.now_us - opens_us == 300_000
    ledger.later(WINDOW)  # who was passed over costs nothing more
    assert last.ask().permits


def test_fault_8_a_line_that_is_empty_is_not_stored(ledger):
    talker = ledger.talker()
    talker.ask()
    talker.say(lines=(Line(0),))
    assert ledger.store._buckets[0].lines == ()


def test_one_that_asks_once_is_not_stored_and_passes_nobody(ledger):
    dead, talker = ledger.talker("a"), ledger.talker("b")
    ledger.later(WINDOW - S)
    dead.ask()
    ledger.later(2 * S)
    assert not talker.ask(once=1).permits  # a second after the bucket opened
    assert [row.session for row in ledger.store.live(0, ledger.now_us)] == ["a"]
    assert talker.ask().permits  # one that waits may pass


def test_one_that_asks_once_is_denied_if_the_next_of_its_line_passes_a_dead_one(ledger):
    dead, talker = ledger.talker("a"), ledger.talker("b")
    ledger.later(WINDOW - S)
    dead.ask()
    ledger.later(2 * S)
    now_us = ledger.now_us
    waiters = (Waiter(1, 0, now_us, now_us, once=1), Waiter(2, 0, now_us, now_us))
    reply = talker.say(lines=(Line(0, 0, waiters),))
    assert [one.waiter for one in reply.permits] == [2]
    assert [one.bucket for one in reply.waits] == [0]
    assert ledger.store.live(0, ledger.now_us) == []


def test_the_next_waiter_takes_the_heads_position_in_the_same_step(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    now_us = ledger.now_us
    waiters = (Waiter(1, 0, now_us, now_us), Waiter(2, 0, now_us, now_us))
    reply = talker.say(lines=(Line(0, 7, waiters),))
    assert [one.waiter for one in reply.permits] == [1]
    assert (reply.waits[0].opens_us, reply.waits[0].waiting) == (WINDOW, 8)
    assert ledger.store._buckets[0].lines[0].waiters[0].number == 2


def test_a_bucket_that_opens_early_gives_its_head_time_to_notice(ledger):
    holder, head, other = (ledger.talker(name) for name in "abc")
    ledger.later(WINDOW)
    permit = holder.ask().permits[0]
    head.ask(), ledger.later(1)
    position_us = ledger.now_us
    other.ask(position_us=position_us)
    holder.say(reports=(Report(UNUSED, permit.serial, 0, permit.period, ledger.now_us),))
    ledger.later(S)
    assert not other.ask(position_us=position_us).permits
    assert head.ask(position_us=0).permits


def test_another_number_of_buckets_gives_all_processes_time_to_send_their_lines(ledger):
    one, other = ledger.talker("a"), ledger.talker("b")
    ledger.later(WINDOW)
    one.ask(), other.ask(bucket=0), ledger.later(WINDOW)
    one.say(limit=limit(UPDATE, buckets=2))
    assert not one.ask(bucket=1).permits
    ledger.later(5 * S // 3)
    assert one.ask(bucket=1).permits


def test_processes_that_begin_again_and_again_with_other_buckets_stop_nobody(ledger):
    talker, granted = ledger.talker(), 0
    for number in range(1, 41):
        Talker(ledger, f"b{number}").introduce(limit=limit(OPEN, buckets=1 + number % 2))
        ledger.later(S // 2)
        granted += len(talker.ask(number).permits)
    assert granted >= 3


@pytest.mark.parametrize("lease_us", [5 * S, 60 * S])
def test_a_head_notices_that_a_bucket_has_opened_before_others_may_take(ledger, lease_us):
    first, second = ledger.talker("a", lease_us=lease_us), ledger.talker("b", lease_us=lease_us)
    third = ledger.talker("c", lease_us=lease_us)
    ledger.later(WINDOW)
    granted = first.ask().permits[0]
    asks_us = ledger.now_us + second.ask().waits[0].wait_us
    third.ask(position_us=ledger.now_us + 1)
    report = Report(UNUSED, granted.serial, 0, granted.period, ledger.now_us)
    first.say(reports=(report,))
    ledger.now_us = asks_us - 1
    assert not third.ask(position_us=asks_us).permits
    ledger.now_us = asks_us
    assert second.ask().permits


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.slow
def test_fault_9_a_request_costs_the_same_with_many_dead_processes(ledger):
    costs = []
    for dead in (10, 1_000):
        for number in range(dead):
            row = Talker(ledger, f"{dead}x{number}")
            row.introduce(), row.ask()
        ledger.later(59 * S)
        talker = ledger.talker(f"live{dead}")
        ledger.store.rows = 0
        talker.ask()
        costs.append(ledger.store.rows)
        ledger.later(2 * S)
    assert costs[1] <= costs[0] + 60


@pytest.mark.slow
def test_a_look_reads_the_lines_that_are_live(ledger):
    for number in range(1_000):
        row = Talker(ledger, f"dead{number}")
        row.introduce(), row.ask()
    ledger.later(10 * S)
    talker = ledger.talker()
    other = ledger.talker("b")
    other.ask(), other.ask(number=2)
    ledger.store.rows = 0
    look = talker.say(look=1).look
    assert [len(line.waiters) for line in look.lines] == [1]
    assert ledger.store.rows < 50


def test_a_look_without_a_session_stores_no_loss_but_the_next_request_does(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    before = ledger.store.copy()
    look = talker.latest._replace(session="", look=1, introduction=None)
    assert ledger.answer(look, lost=True).look is not None
    assert ledger.store._account == before._account
    talker.number, talker.latest = talker.number + 1, look._replace(session="a", number=2)
    assert ledger.answer(talker.latest, lost=True).lost == 1
    assert ledger.store._account != before._account


def test_a_look_tells_the_reserve_and_the_period_of_who_waits(ledger):
    talker = ledger.talker()
    waiter = Waiter(1, 0, ledger.now_us, ledger.now_us)
    talker.say(lines=(Line(0, 0, (waiter,)),), reserve=7, period_us=600 * S)
    look = ledger.talker("b").say(look=1, period_us=600 * S).look
    assert (look.reserve, look.period_us) == (7, 600 * S)


def test_a_session_that_is_silent_for_a_minute_is_removed_with_its_lines(ledger):
    ledger.talker("a").ask()
    talker = ledger.talker("b")
    ledger.later(61 * S)
    reply = ledger.answer(talker.latest._replace(number=2, introduction=None))
    assert reply.status == INTRODUCE
    other = ledger.talker("c")
    assert set(ledger.store._sessions) == {"c"}
    other.ask(once=1)
    assert ledger.store._buckets[0].lines == ()


def test_a_session_that_is_alone_is_not_known_after_a_minute_either(ledger):
    talker = ledger.talker()
    ledger.later(61 * S)
    reply = ledger.answer(talker.latest._replace(number=2, introduction=None))
    assert (reply.status, reply.lost) == (INTRODUCE, 0)


# --- holds ----------------------------------------------------------------------------------------


def opens_us(ledger, talker) -> int:
    return talker.ask(99, once=1).waits[0].opens_us


@pytest.fixture
def holder(ledger) -> tuple[Talker, messages.Granted]:
    talker = ledger.talker()
    ledger.later(WINDOW)
    return talker, talker.ask(hold_us=10 * S).permits[0]


def test_a_held_permit_keeps_its_bucket_closed_until_its_report(ledger, holder):
    talker, permit = holder
    assert opens_us(ledger, talker) == 10 * S + WINDOW
    ledger.later(S)
    assert (
        talker.say(reports=(Report(SENT, permit.serial, 0, permit.period, ledger.now_us),)).status
        == OK
    )
    assert opens_us(ledger, talker) == WINDOW


def test_a_loss_closes_for_the_longest_hold_too(ledger, holder):
    talker, _ = holder
    ledger.answer(talker.latest, lost=True)
    assert opens_us(ledger, ledger.talker("b", limit=None)) == 10 * S + WINDOW


def test_other_buckets_are_closed_for_as_long_as_a_hold_lasts(ledger, holder):
    talker, _ = holder
    ledger.later(4 * S)
    talker.say(limit=limit(UPDATE, buckets=2, at_us=ledger.now_us))
    assert opens_us(ledger, talker) == 6 * S + WINDOW
    ledger.later(40 * S)
    talker.say(limit=limit(UPDATE, buckets=3, at_us=ledger.now_us))
    assert talker.ask(99, once=1).permits


def test_a_hold_is_not_forgotten_if_the_clock_was_set_back_before(ledger):
    talker = ledger.talker()
    ledger.later(-100 * S)
    ledger.later(WINDOW)
    assert not talker.ask(hold_us=10 * S).permits  # the time of the account's beginning is ahead
    ledger.later(WINDOW)
    assert talker.ask(hold_us=10 * S).permits
    talker.say(limit=limit(UPDATE, buckets=2, at_us=ledger.now_us))
    assert opens_us(ledger, talker) == 10 * S + WINDOW


def test_a_refused_request_does_not_store_a_loss(ledger, holder):
    talker, _ = holder
    granted = ledger.store._account.period
    refused = talker.latest._replace(interval_us=3600 * S)
    assert ledger.answer(refused, lost=True).status == REFUSED
    assert ledger.store._account.period == granted


def test_a_refund_that_is_repeated_after_an_interrupt_is_sent_once(alone):
    ledger, session, lines = alone
    join(ledger, session, lines)
    (permit,) = exchange(ledger, session, lines).permits
    for _ in range(2):
        session.report(permit, Said.UNUSED, ledger.now_us)
    request = session.compose(lines, ledger.now_us, can_read=False)
    assert len(request.reports) == 1


# --- what is refused ------------------------------------------------------------------------------


def test_a_session_whose_line_could_not_be_read_again_is_refused(ledger):
    reply = ledger.answer(ledger.talker().latest._replace(session="a b"))
    assert (reply.status, reply.error) == (
        REFUSED,
        "session must be without white space, not 'a b'",
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval_us": 3600 * S}, "interval must be 1e-06 to 60 s, not 3600 s"),
        ({"margin_us": 60 * S}, "margin must be 0 to 10 s, not 60 s"),
        ({"lease_us": 3600 * S}, "lease must be 0.1 to 60 s, not 3600 s"),
        ({"period_us": 172_801 * S}, "period must be 1e-06 to 172800 s, not 172801 s"),
    ],
)
def test_fault_11_settings_out_of_bounds_are_refused_and_change_nothing(ledger, settings, words):
    ledger.talker()
    before = ledger.store.copy()
    reply = Talker(ledger, "b", settings).introduce()
    assert (reply.status, reply.error) == (REFUSED, words)
    assert ledger.store._account == before._account
    assert set(ledger.store._sessions) == {"a"}


def test_fault_11_counters_near_the_largest_number_are_refused(ledger):
    assert Talker(ledger, "b").introduce(granted=(1 << 53) - 1).status == REFUSED


@pytest.mark.parametrize(
    ("waiter", "words"),
    [
        ({"position_us": -(1 << 52)}, "head start must be -86400 to 86400 s, not"),
        ({"arrived_us": -(1 << 52), "position_us": -(1 << 52)}, "age must be -86400 to 604800 s"),
        ({"arrived_us": 1 << 52, "position_us": 1 << 52}, "age must be"),
    ],
)
def test_fault_11_a_position_that_nobody_could_pass_is_refused(ledger, waiter, words):
    talker = ledger.talker()
    line = Line(0, 0, (Waiter(1, 0, ledger.now_us, ledger.now_us)._replace(**waiter),))
    reply = talker.say(lines=(line,))
    assert reply.status == REFUSED
    assert reply.error.startswith(words)


def test_fault_11_more_waiters_than_can_be_added_up_are_refused(ledger):
    line = Line(0, 1 << 52, (Waiter(1, 0, ledger.now_us, ledger.now_us),))
    assert ledger.talker().say(lines=(line,)).error.startswith("waiting must be 0 to 4294967296")


@pytest.mark.parametrize("head_start_us", [1 << 51, -(1 << 51)])
def test_fault_11_a_session_keeps_within_the_bounds_by_itself(alone, head_start_us):
    ledger, session, lines = alone
    join(ledger, session, lines)
    lines.waiters[0].arrived_us -= 1 << 51
    lines.waiters[0].position_us = lines.waiters[0].arrived_us - head_start_us
    assert exchange(ledger, session, lines).permits


def test_fault_16_another_bot_is_refused_with_both_ids(ledger):
    Talker(ledger, "a").introduce(bot="111")
    reply = Talker(ledger, "b").introduce(bot="222")
    assert reply.status == REFUSED
    assert reply.error.startswith("the account belongs to bot 111, not 222: each needs")
    assert Talker(ledger, "c").introduce(bot="111").status == OK
    assert Talker(ledger, "d").introduce(bot="").status == OK


# --- the limit ------------------------------------------------------------------------------------


def test_fault_17_a_higher_remaining_that_does_not_count_is_said(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    talker.say(limit=limit(UPDATE, remaining=5, at_us=ledger.now_us))
    ledger.later(120 * S)
    reply = talker.say(
        limit=limit(READ, remaining=900, reset_after=86_280 * S, at_us=ledger.now_us)
    )
    assert (reply.remaining, reply.uncounted) == (900, -1)  # own starts alone count
    talker.ask()
    ledger.later(120 * S)
    reply = talker.say(limit=limit(READ, remaining=950, reset_after=3_600 * S, at_us=ledger.now_us))
    assert reply.remaining < 950 == reply.uncounted


def test_fault_17_starts_of_other_programs_count(ledger):
    talker = ledger.talker()
    ledger.later(WINDOW)
    talker.say(limit=limit(UPDATE, remaining=100, at_us=ledger.now_us))
    ledger.later(60 * S)
    reply = talker.say(limit=limit(READ, remaining=60, reset_after=86_340 * S, at_us=ledger.now_us))
    assert reply.remaining == 60


def test_one_process_reads_for_all(ledger):
    one, other = Talker(ledger, "a", {"can_read": 1}), Talker(ledger, "b", {"can_read": 1})
    assert one.introduce(limit=None).read == 1
    assert other.introduce(limit=None).read == 0
    assert not other.ask().permits
    one.say(limit=limit(READ, remaining=10, at_us=ledger.now_us))
    ledger.later(WINDOW)
    assert other.ask().permits
    assert Talker(ledger, "c", {"can_read": 1}).introduce(limit=None).read == 0


def test_a_reader_that_does_not_come_back_is_replaced(ledger):
    Talker(ledger, "a", {"can_read": 1}).introduce(limit=None)
    other = Talker(ledger, "b", {"can_read": 1})
    other.introduce(limit=None)
    ledger.later(10 * S)
    assert other.ask().read == 1


def test_nothing_is_granted_while_no_limit_is_known(ledger):
    talker = Talker(ledger, "a", {"can_read": 1})
    talker.introduce(limit=None)
    ledger.later(60 * S)
    assert talker.ask().waits[0].reason == messages.RESET


def test_a_read_that_comes_more_than_a_minute_late_does_not_count(ledger):
    """Which permits were granted since it was asked for is only known for so long."""
    late, other = ledger.talker("late", can_read=1), ledger.talker("other", can_read=1)
    ledger.later(WINDOW)
    read = limit(READ, remaining=500, at_us=ledger.now_us)
    late.say(limit=read)
    for number in range(1, 41):
        remaining = other.later_ask(number)
        late.say()
    assert remaining == 460
    assert late.say(limit=read).limit_result == messages.NOT_APPLIED
    assert other.later_ask(41) == 459


def test_a_late_read_counts_where_no_limit_is_known(ledger):
    talker = Talker(ledger, "a", {"can_read": 1})
    talker.introduce(limit=None)
    read = limit(READ, remaining=500, at_us=ledger.now_us)
    ledger.later(50 * S)
    talker.say()
    ledger.later(50 * S)
    assert talker.say(limit=read).remaining == 500


def test_a_limit_that_is_forgotten_is_read_by_a_process_that_can(ledger):
    reader, other = Talker(ledger, "a", {"can_read": 1}), Talker(ledger, "b")
    reader.introduce(limit=None, bot="111")
    reader.say(limit=limit(READ, remaining=10, at_us=ledger.now_us))
    other.introduce(limit=None)
    assert other.say(limit=limit(FORGET)).total == -1
    ledger.later(WINDOW)
    assert other.ask().waits[0].reason == messages.RESET
    assert reader.ask().read == 1
    assert Talker(ledger, "c").introduce(bot="222").status == OK


def test_a_limit_that_is_forgotten_is_discords_default_if_those_who_could_read_it_are_gone(ledger):
    reader, command = Talker(ledger, "a", {"can_read": 1}), Talker(ledger, "b")
    late = Talker(ledger, "c")
    reader.introduce(limit=None, bot="111")
    reader.say(limit=limit(READ, remaining=10, at_us=ledger.now_us))
    ledger.later(3_600 * S)
    command.introduce(limit=None)
    assert command.say(limit=limit(FORGET)).total == -1
    ledger.later(60 * S - 1)
    late.introduce(limit=None)
    assert late.ask().waits[0].reason == messages.RESET
    ledger.later(1)
    assert late.ask().permits
    assert late.say().total == 1000


def test_a_process_that_can_read_a_limit_that_was_forgotten_waits_for_its_own_read(ledger):
    reader, command = Talker(ledger, "a", {"can_read": 1}), Talker(ledger, "b")
    reader.introduce(limit=None)
    reader.say(limit=limit(READ, remaining=10, at_us=ledger.now_us))
    command.introduce(limit=None)
    command.say(limit=limit(FORGET))
    ledger.later(3_600 * S)
    new = Talker(ledger, "c", {"can_read": 1})
    assert new.introduce(limit=None).read == 1
    assert new.ask().waits[0].reason == messages.RESET
    new.say(limit=limit(READ, remaining=7, reset_after=50 * S, at_us=ledger.now_us))
    assert new.say().remaining == 7


def test_a_limit_that_is_forgotten_and_that_nobody_can_read_is_discords_default(ledger):
    talker = Talker(ledger, "a")
    talker.introduce(limit=limit(OPEN, remaining=3, buckets=4))
    reply = talker.say(limit=limit(FORGET))
    assert (reply.total, reply.remaining, reply.max_concurrency) == (1000, 1000, 4)


def test_a_read_by_who_cannot_read_again_makes_nobody_wait_for_another(ledger):
    """Such as the command ``limit --read``: it is not there at the next reset."""
    talker, command = ledger.talker(), ledger.talker("b")
    ledger.later(WINDOW)
    command.say(limit=limit(READ, remaining=10, at_us=ledger.now_us))
    reply = command.say(limit=limit(FORGET))
    assert (reply.total, reply.remaining) == (1000, 1000)
    assert talker.ask().permits


# --- one process's side ---------------------------------------------------------------------------


@dataclass
class Someone:
    number: int
    shard_id: int
    arrived_us: int
    position_us: int
    once: bool = False
    hold_us: int = 0


class Here:
    """The lines of a process."""

    def __init__(self, max_concurrency=1) -> None:
        self.max_concurrency = max_concurrency
        self.waiters: list[Someone] = []

    def line(self, bucket):
        return [one for one in self.waiters if one.shard_id % self.max_concurrency == bucket]

    def first_two(self, bucket):
        return self.line(bucket)[:2]

    def length(self, bucket):
        return len(self.line(bucket))

    def buckets(self):
        return {one.shard_id % self.max_concurrency for one in self.waiters}


class System:
    """Processes at some distance from one ledger, whose callers always want permits."""

    def __init__(self, *trips_us: int, interval_us=S, margin_us=S // 4) -> None:
        self.ledger = Ledger()
        self.queue: list = []
        self.counter = 0
        self.held: list[tuple[int, int]] = []  # when, and by which process
        self.warnings: list[str] = []
        self.held_for_us: dict[int, int] = {}
        self.processes = []
        for trip_us in trips_us:
            settings = SessionSettings(
                interval_us=interval_us, margin_us=margin_us, period_us=86_400 * S, lease_us=5 * S,
                limit=LIMIT,
            )  # fmt: skip
            lines, session = Here(), Session(settings)
            self.processes.append((session, lines, trip_us // 2))
            self.at(1_000 * S, self.pump, len(self.processes) - 1)
            for _ in range(4):
                self.join(len(self.processes) - 1)

    def join(self, which: int) -> None:
        _, lines, _ = self.processes[which]
        self.counter += 1
        now_us = self.ledger.now_us
        lines.waiters.append(Someone(self.counter, 0, now_us, now_us))

    def at(self, at_us, do, *what) -> None:
        self.counter += 1
        heapq.heappush(self.queue, (at_us, self.counter, do, what))

    def pump(self, which: int) -> None:
        session, lines, way_us = self.processes[which]
        now_us = self.ledger.now_us
        request = session.compose(lines, now_us, can_read=False)
        if request is not None:
            self.at(now_us + way_us, self.arrive, which, request)
        elif session._in_flight is None:
            self.at(max(now_us + 1, session.wake_us(now_us)), self.pump, which)

    def arrive(self, which, request) -> None:
        way_us = self.processes[which][2]
        for line in request.lines:
            for waiter in line.waiters:
                self.held_for_us[which] = waiter.hold_us
        self.at(self.ledger.now_us + way_us, self.back, which, request, self.ledger.answer(request))

    def back(self, which, request, reply) -> None:
        session, lines, _ = self.processes[which]
        answers = session.answered(request, reply, self.ledger.now_us)
        self.warnings += answers.warnings
        for permit in answers.permits:
            lines.waiters = [one for one in lines.waiters if one.number != permit.waiter]
            session.changed(0)
            self.held.append((self.ledger.now_us, which))
            self.join(which)
        self.pump(which)

    def run(self, us: int) -> list[int]:
        """Run so long, and return how many permits each process got."""
        end_us = self.ledger.now_us + us
        while self.queue and self.queue[0][0] <= end_us:
            self.ledger.now_us, _, do, what = heapq.heappop(self.queue)
            do(*what)
        return [
            sum(1 for _, one in self.held if one == which) for which in range(len(self.processes))
        ]


def test_fault_2_a_round_trip_longer_than_the_margin_raises_it():
    system = System(280_000, 1_000)
    far, near = system.run(60 * S)
    assert far >= 15
    assert near >= 15
    assert system.held_for_us == {0: 420_000 - 250_000, 1: 0}
    assert [line for line in system.warnings if "raised to 0.42 s" in line]


def test_fault_2_a_margin_that_was_raised_is_lowered_when_round_trips_are_short_again():
    system = System(280_000)
    system.run(30 * S)
    session, lines, _ = system.processes[0]
    assert system.held_for_us[0] == 420_000 - 250_000
    system.processes[0] = session, lines, 500  # one way
    system.run(60 * S)
    assert system.held_for_us[0] == 0


def test_fault_2_a_round_trip_beyond_every_margin_pauses_and_says_so():
    system = System(3_000_000)
    assert system.run(120 * S) == [0]
    assert system.ledger.store._account.granted <= 10
    assert [line for line in system.warnings if "asks for none for 30 s" in line]


def test_fault_2_a_round_trip_beyond_every_margin_starves_nobody_and_is_said():
    system = System(2_500_000, 1_000)
    far, near = system.run(120 * S)
    assert far == 0
    assert near >= 40
    assert [line for line in system.warnings if "likely to take the turns" in line]


@pytest.mark.parametrize("trip_us", [120_000, 300_000, 500_000])
def test_fault_3_a_round_trip_longer_than_a_grace_loses_no_turn(trip_us):
    far, near = System(trip_us, 1_000, interval_us=5 * S).run(300 * S)
    assert abs(far - near) <= 4


@pytest.mark.parametrize("trip_us", [1_000, 20_000])
def test_a_window_costs_at_most_a_trip_for_each_process_and_two(trip_us):
    system = System(*[trip_us] * 8)
    system.run(10 * S)
    count = system.counter
    numbers = sum(session._number for session, _, _ in system.processes)
    granted = len(system.held)
    system.run(60 * S)
    windows = len(system.held) - granted
    trips = sum(session._number for session, _, _ in system.processes) - numbers
    assert count
    assert trips / windows <= 8 + 2


SETTINGS = SessionSettings(
    interval_us=5 * S, margin_us=S // 4, period_us=86_400 * S, lease_us=5 * S, limit=LIMIT
)


@pytest.fixture
def alone() -> tuple[Ledger, Session, Here]:
    ledger, session, lines = Ledger(), Session(SETTINGS, uniform=lambda low, high: high), Here()
    exchange(ledger, session, lines)
    ledger.later(WINDOW)
    return ledger, session, lines


def exchange(ledger, session, lines):
    request = session.compose(lines, ledger.now_us, can_read=False)
    assert request is not None
    return session.answered(request, ledger.answer(request), ledger.now_us)


def join(ledger, session, lines, number=1):
    lines.waiters.append(Someone(number, 0, ledger.now_us, ledger.now_us))
    session.changed(0)


def test_fault_1_a_reply_to_an_earlier_attempt_changes_nothing(alone):
    ledger, session, lines = alone
    join(ledger, session, lines)
    first = session.compose(lines, ledger.now_us, can_read=False)
    early = ledger.answer(first)
    assert session.compose(lines, ledger.now_us, can_read=False) is None  # one in flight
    session.failed(first, TimeoutError(), ledger.now_us)
    ledger.later(50_000)
    again = session.compose(lines, ledger.now_us, can_read=False)
    assert again[2:] == first[2:]
    assert session.answered(first, early, ledger.now_us).permits == []
    permit = session.answered(again, ledger.answer(again), ledger.now_us).permits[0]
    assert permit.stamp_us == ledger.now_us - 50_000
    assert session.answered(again, early, ledger.now_us).permits == []
    assert session._reports == type(session._reports)()


def test_a_permit_older_than_the_margin_is_given_back_and_asked_for_in_one_request(alone):
    ledger, session, lines = alone
    join(ledger, session, lines)
    request = session.compose(lines, ledger.now_us, can_read=False)
    reply = ledger.answer(request)
    ledger.later(300_000)
    assert session.answered(request, reply, ledger.now_us).permits == []
    again = session.compose(lines, ledger.now_us, can_read=False)
    assert [one.kind for one in again.reports] == [UNUSED]
    assert again.lines[0].waiters[0].number == 1
    assert session.answered(again, ledger.answer(again), ledger.now_us).permits


def pauses_after(failure, alone, count):
    ledger, session, lines = alone
    join(ledger, session, lines)
    pauses = []
    for _ in range(count):
        request = session.compose(lines, ledger.now_us, can_read=False)
        session.failed(request, failure, ledger.now_us)
        pauses.append(session.wake_us(ledger.now_us) - ledger.now_us)
        ledger.later(pauses[-1])
    return pauses


def test_pauses_after_failures_double_up_to_two_seconds(alone):
    pauses = pauses_after(ConnectionError(), alone, 8)
    assert pauses == [50_000, 100_000, 200_000, 400_000, 800_000, 1_600_000, 2 * S, 2 * S]


def test_a_ledger_that_is_busy_is_asked_again_sooner(alone):
    assert pauses_after(Busy(), alone, 10) == [*(5_000 << n for n in range(6)), *[200_000] * 4]


def given(serial=1) -> Permit:
    permit = Permit(0)
    permit.serial, permit.period = serial, 1
    return permit


def test_a_process_that_waits_for_a_limit_that_others_must_read_says_so_once(ledger):
    reader = Talker(ledger, "a", {"can_read": 1})
    reader.introduce(limit=None)
    session, lines = Session(replace(SETTINGS, limit=None)), Here()
    warnings = exchange(ledger, session, lines).warnings
    assert "the session start limit is not known" in warnings[0]
    join(ledger, session, lines)
    assert exchange(ledger, session, lines).warnings == []


def test_after_an_introduction_sent_is_repeated_and_refunds_are_dropped(alone):
    ledger, session, lines = alone
    join(ledger, session, lines)
    (permit,) = exchange(ledger, session, lines).permits
    lines.waiters.clear()
    session.report(permit, Said.SENT, ledger.now_us)
    session.report(given(9), Said.UNUSED, ledger.now_us)
    ledger.store.drop_session(session._id)
    exchange(ledger, session, lines)
    exchange(ledger, session, lines)
    request = session.compose(lines, ledger.now_us, can_read=False)
    assert [(one.kind, one.serial) for one in request.reports] == [(SENT, permit.serial)]


def test_an_update_in_flight_when_the_ledger_forgets_is_of_unknown_fate(alone):
    ledger, session, lines = alone
    change = session.change_limit(LIMIT, ledger.now_us)
    ledger.store.drop_session(session._id)
    exchange(ledger, session, lines)
    assert change.done
    assert "may or may not have been applied" in str(change.error)


def test_an_update_that_is_given_up_says_whether_it_was_sent(alone):
    ledger, session, lines = alone
    change = session.change_limit(LIMIT, ledger.now_us)
    assert "was not applied" in str(session.abandon(change))
    change = session.change_limit(LIMIT, ledger.now_us)
    session.compose(lines, ledger.now_us, can_read=False)
    assert "may or may not" in str(session.abandon(change))


def test_a_session_that_was_idle_introduces_itself_before_it_is_forgotten(alone):
    ledger, session, lines = alone
    ledger.later(51 * S)
    before = session._id
    join(ledger, session, lines)
    request = session.compose(lines, ledger.now_us, can_read=False)
    assert request.introduction.replaces == before
    session.answered(request, ledger.answer(request), ledger.now_us)
    assert set(ledger.store._sessions) == {session._id}
    assert exchange(ledger, session, lines).permits


def test_a_forked_child_is_another_session_and_replaces_none(alone):
    ledger, session, _ = alone
    before = session._id
    session.report(given(), Said.UNUSED, ledger.now_us)
    session.reinit()
    request = session.compose(Here(), ledger.now_us, can_read=False)
    assert request.session != before
    assert request.introduction.replaces == ""
    session.answered(request, ledger.answer(request), ledger.now_us)
    assert session.compose(Here(), ledger.now_us, can_read=False) is None


@pytest.mark.parametrize(
    ("once", "granted", "denied"),
    [((True, False), [2], {1}), ((True, True), [], {1, 2})],
)
def test_each_that_asks_once_has_its_answer_in_one_reply(alone, once, granted, denied):
    ledger, session, lines = alone
    ledger.later(-S).talker("dead").ask()
    ledger.later(2 * S)
    for number, one in enumerate(once, 1):
        join(ledger, session, lines, number)
        lines.waiters[-1].once = one
    answers = exchange(ledger, session, lines)
    assert [one.waiter for one in answers.permits] == granted
    assert set(answers.denials) == denied


def test_who_is_behind_one_that_asks_once_is_denied_with_it(alone):
    ledger, session, lines = alone
    other = ledger.talker("other")
    other.ask(), other.ask(2)  # a permit, so the bucket is closed, and one that waits
    for number in (1, 2, 3):
        join(ledger, session, lines, number)
    lines.waiters[0].once = True
    assert set(exchange(ledger, session, lines).denials) == {1, 2}
    assert session.others(0) == 1
    lines.waiters.pop(0)
    session.changed(0)
    assert session.compose(lines, ledger.now_us, can_read=False) is None


def test_counts_alone_cause_no_request(alone):
    ledger, session, lines = alone
    join(ledger, session, lines)
    ledger.later(-S)
    exchange(ledger, session, lines)
    for number in range(2, 1_000):
        join(ledger, session, lines, number)
    assert session.compose(lines, ledger.now_us, can_read=False) is None
    ledger.later(S)
    request = session.compose(lines, ledger.now_us, can_read=False)
    assert (len(request.lines[0].waiters), request.lines[0].more) == (2, 997)


def test_who_joins_and_leaves_at_once_causes_no_request(alone):
    ledger, session, lines = alone
    session.changed(0)
    assert session.compose(lines, ledger.now_us, can_read=False) is None
    assert session.wake_us(ledger.now_us) > ledger.now_us + 3600 * S


def test_one_late_reply_with_many_permits_neither_raises_the_margin_nor_pauses(ledger):
    settings = SessionSettings(
        interval_us=5 * S, margin_us=S // 4, period_us=86_400 * S, lease_us=5 * S,
        limit=replace(LIMIT, max_concurrency=16),
    )  # fmt: skip
    session, lines = Session(settings), Here(16)
    exchange(ledger, session, lines)
    ledger.later(WINDOW)
    for bucket in range(16):
        lines.waiters.append(Someone(bucket + 1, bucket, ledger.now_us, ledger.now_us))
        session.changed(bucket)
    request = session.compose(lines, ledger.now_us, can_read=False)
    reply = ledger.answer(request)
    assert len(reply.permits) == 16
    answers = session.answered(request, reply, ledger.now_us + S)
    assert (answers.permits, answers.warnings) == ([], [])
    request = session.compose(lines, ledger.now_us + S, can_read=False)
    assert {waiter.hold_us for line in request.lines for waiter in line.waiters} == {0}


@pytest.mark.parametrize(("late_us", "words"), [(S, "is raised to 1.5"), (3 * S, "asks for none")])
def test_permits_whose_first_reply_is_lost_each_time_are_late_too(alone, late_us, words):
    """The reply that is sent again comes at once, but what it brings is as old as the first."""
    ledger, session, lines = alone
    join(ledger, session, lines)
    warnings = []
    for _ in range(10):
        request = session.compose(lines, ledger.now_us, can_read=False)
        if request is None:
            break
        ledger.answer(request)
        ledger.later(late_us)
        session.failed(request, TimeoutError(), ledger.now_us)
        ledger.later(50_000)
        answers = exchange(ledger, session, lines)
        warnings += answers.warnings
    assert words in "".join(warnings)
    assert bool(answers.permits) == (late_us == S)


def test_a_request_has_at_most_a_thousand_changes(alone):
    ledger, session, lines = alone
    for serial in range(1, 2_501):
        session.report(given(serial), Said.SENT, ledger.now_us)
    sizes = []
    while (request := session.compose(lines, ledger.now_us, can_read=False)) is not None:
        sizes.append(len(request.reports))
        session.answered(request, ledger.answer(request), ledger.now_us)
    assert sizes == [1000, 1000, 500]


def test_a_request_that_is_refused_fails_those_who_asked_and_the_session_goes_on(alone):
    ledger, session, lines = alone
    settings, session._settings = session._settings, replace(session._settings, lease_us=3600 * S)
    join(ledger, session, lines)
    change = session.change_limit(LIMIT, ledger.now_us)
    answers = exchange(ledger, session, lines)
    assert "refuses this process: lease must be" in str(answers.error)
    assert answers.refused == [1]
    assert change.done
    assert "lease must be" in str(change.error)
    lines.waiters.clear()
    session._settings = settings
    exchange(ledger, session, lines)  # introduces itself
    join(ledger, session, lines, number=2)
    assert [permit.waiter for permit in exchange(ledger, session, lines).permits] == [2]


def test_an_introduction_that_is_refused_is_tried_again_after_a_pause():
    settings = SessionSettings(
        interval_us=5 * S, margin_us=S // 4, period_us=86_400 * S, lease_us=3600 * S
    )
    ledger, session, lines = Ledger(), Session(settings, uniform=lambda low, high: high), Here()
    answers = exchange(ledger, session, lines)
    assert "lease must be" in str(answers.error)
    assert answers.refused is None
    assert session.wake_us(ledger.now_us) == ledger.now_us + 50_000


def test_what_is_malformed_is_named():
    with pytest.raises(ValueError, match="shard_id is wrong: 'x'"):
        from_wire(Waiter, [1, "x", 0, 0, 0, 0])
    with pytest.raises(ValueError, match="waiters is wrong"):
        from_wire(Line, [0, 0, 5])


def test_a_reset_waits_five_seconds_for_a_read_even_if_the_reader_has_failed(ledger):
    talker = Talker(ledger, "a", {"can_read": 1})
    talker.introduce(limit=limit(OPEN, remaining=0, reset_after=30 * S, at_us=ledger.now_us))
    ledger.later(30 * S)
    assert talker.ask().waits[0].reason == messages.RESET
    talker.settings["can_read"] = 0  # it rests after a failure
    ledger.later(5 * S - 1)
    assert not talker.ask().permits
    ledger.later(1)
    assert talker.ask().permits


def test_nobody_is_passed_over_when_the_wait_for_a_read_is_over(ledger):
    first, second = ledger.talker("a", can_read=1), ledger.talker("b", can_read=1)
    first.say(limit=limit(READ, remaining=0, reset_after=20 * S, at_us=ledger.now_us))
    ledger.later(24 * S)
    before_us = ledger.now_us - S
    first.ask(position_us=before_us - 1), second.ask(position_us=before_us)
    ledger.later(S)
    assert not second.ask(position_us=before_us).permits
    assert first.ask(position_us=before_us - 1).permits


def test_a_dead_head_costs_one_grace_at_a_reset_too(ledger):
    dead, other = ledger.talker("a", lease_us=60 * S), ledger.talker("b", lease_us=60 * S)
    dead.say(limit=limit(UPDATE, remaining=0, reset_after=20 * S, at_us=ledger.now_us))
    ledger.later(19 * S)
    dead.ask(1)
    ledger.later(1)
    reply = other.ask(1)
    while not reply.permits:
        wait_us = reply.waits[0].wait_us
        reply = ledger.later(wait_us) and other.ask(1, position_us=ledger.now_us - wait_us)
    assert ledger.now_us - 1_000 * S - 20 * S <= S // 10 + 1


def test_a_limit_that_was_read_and_not_sent_yet_is_not_read_again(alone):
    ledger, session, lines = alone
    session.look()
    request = session.compose(lines, ledger.now_us, can_read=True)
    session.change_limit(LIMIT, ledger.now_us, READ)  # while the request is on its way
    reply = ledger.answer(request)._replace(read=1)
    assert not session.answered(request, reply, ledger.now_us).read
    request = session.compose(lines, ledger.now_us, can_read=True)
    reply = ledger.answer(request)._replace(read=1)
    assert session.answered(request, reply, ledger.now_us).read  # that was another read


def test_a_dead_head_costs_a_grace_at_a_reset_however_often_others_ask(ledger):
    settings = {"can_read": 1, "lease_us": 60 * S}
    dead, other = ledger.talker("a", **settings), ledger.talker("b", **settings)
    dead.say(limit=limit(UPDATE, remaining=0, reset_after=30 * S, at_us=ledger.now_us))
    ledger.later(29 * S)
    dead.ask()
    ledger.later(S)
    for _ in range(10):
        assert other.ask(position_us=ledger.now_us + S).permits == ()
        ledger.later(S // 2)
    ledger.later(S // 10)
    assert other.ask(position_us=ledger.now_us + S).permits


# --- what is given back, and to which period ------------------------------------------------------


def test_a_permit_from_before_a_loss_gives_nothing_back(ledger):
    """Its serial is another permit's now, which is in use."""
    first, second = ledger.talker(), ledger.talker("b")
    before = ledger.store.copy()
    ledger.later(WINDOW)
    lost = first.ask().permits[0]
    ledger.store = before
    ledger.later(WINDOW).answer(second.latest, lost=True)
    ledger.later(WINDOW)
    used = second.ask(2).permits[0]
    assert used.serial == lost.serial
    assert used.period != lost.period
    account = ledger.store.copy()._account
    first.number = 0
    first.name = "a2"
    first.introduce(limit=None, granted=1)
    refund = Report(UNUSED, lost.serial, 0, lost.period, ledger.now_us)
    assert first.say(reports=(refund,)).remaining == account.remaining
    assert ledger.store._buckets[0].serial == used.serial


def test_a_refund_counts_once_if_the_limit_was_read_since(ledger):
    talker = ledger.talker(can_read=1)
    ledger.later(WINDOW)
    permit = talker.ask().permits[0]
    refund = Report(UNUSED, permit.serial, 0, permit.period, ledger.now_us)
    ledger.later(61 * S)
    now_us = ledger.now_us
    read = talker.say(limit=limit(READ, remaining=990, at_us=now_us, reset_after=86_300 * S))
    assert read.remaining == 990
    assert talker.say(reports=(refund,)).remaining == 990
    fresh = ledger.later(WINDOW) and talker.ask(2).permits[0]
    refund = Report(UNUSED, fresh.serial, 0, fresh.period, ledger.now_us)
    assert talker.say(reports=(refund,)).remaining == 990


def test_permits_just_before_a_reset_count_in_the_period_that_begins_without_a_read(ledger):
    talker = ledger.talker(can_read=1)
    ledger.later(WINDOW)
    talker.say(limit=limit(READ, remaining=10, reset_after=20 * S, at_us=ledger.now_us))
    assert [talker.later_ask(one) for one in range(2)] == [9, 8]
    ledger.later(30 * S)
    talker.settings["can_read"] = 0
    assert talker.later_ask(3) == 1000 - 2 - 1


@pytest.mark.parametrize("how", ["update", "loss"])
def test_a_row_of_rejections_goes_on_in_other_buckets(ledger, how):
    talker = ledger.talker()
    for number in (1, 2):
        ledger.later(60 * S)
        permit = talker.ask(number).permits[0]
        reply = talker.say(reports=(Report(2, permit.serial, 0, permit.period, ledger.now_us),))
    assert reply.rejections[0].in_a_row == 2
    if how == "update":
        talker.say(limit=limit(UPDATE, buckets=2, at_us=ledger.now_us))
    else:
        assert ledger.answer(talker.latest, lost=True).status == OK
    ledger.later(120 * S)
    permit = talker.ask(3).permits[0]
    reply = talker.say(reports=(Report(2, permit.serial, 0, permit.period, ledger.now_us),))
    assert reply.rejections[0].in_a_row == 3
