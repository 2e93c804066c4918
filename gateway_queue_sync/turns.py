"""Turns over processes: one account, and one line for each bucket, of all that draw on it.

The rules of ``token_bucket.py`` say whether a bucket may grant; here it is said to whom. No thread,
clock or I/O: the time is an argument, and what is remembered is in a ``Store``. A ledger does it all
in one atomic step for each ``Request``.

Only the first ticket that each process has for a bucket stands in the line, ordered by arrival less
head start. It has *rank* r if r of them are before it, and may take from r *graces* after the bucket
opens on: so each process ahead of it that is dead or stuck costs one grace, and not the line. A
process counts while it holds its *lease*, which any request renews; whoever is passed over loses it,
and has it and its old place back with its next request. Where a bucket opens by surprise (a permit was
given back, a limit is new), who is first may sleep on for a third of a lease: graces count from then.
One that only tries passes nobody. The others of a process are known for snapshots alone, so they may
be told of late, and many at a time.

A ticket is granted once, however often it asks, until it gives the permit back: a reply that was lost
costs nothing. ``ledgers/take.lua`` says the same to Redis; the two are tested against each other,
answer by answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

from gateway_queue_sync import limits, token_bucket
from gateway_queue_sync.messages import (
    OUTCOMES,
    News,
    Order,
    Outcome,
    Reply,
    Request,
    Take,
    Waiter,
    in_order,
)
from gateway_queue_sync.models import US_PER_SECOND, Permit, SessionStartLimit
from gateway_queue_sync.token_bucket import NEVER, Account, Denial, Reason, TokenBucket

MAX_GRACE_US = 100_000
FORGOTTEN_AFTER_US = 60_000_000  # a process that has been silent for that long
SETTLED_AFTER_US = 600_000_000  # a permit of an earlier period that nobody will report on


@dataclass(slots=True)
class SharedAccount(Account):
    """An account that processes share.

    Attributes:
        interval_us, margin_us: the largest that a live process wants; they make the window.
        interval_until_us, margin_until_us: until when a smaller one does not count.
        opened_us: from when on graces count at least, where there is a budget or a window again:
            after a reset, or when the first have woken that could not know of a surprise.
        refresher, refresh_until_us: which process reads the limit anew, and until when others let it.

    ``reserve`` is that of whoever asked for a permit last, and ``period_us`` that of whoever asked for
    anything: for those who look.
    """

    interval_us: int = 0
    margin_us: int = 0
    interval_until_us: int = NEVER
    margin_until_us: int = NEVER
    opened_us: int = NEVER
    refresher: str = ""
    refresh_until_us: int = NEVER


@dataclass(slots=True)
class StoredPermit:
    """A permit as the shared account remembers it; ``stamp_us`` is when its window started."""

    serial: int
    shard_id: int
    bucket: int
    stamp_us: int
    remaining: int | None
    period: int
    returned: bool = False
    ticket: int = 0
    refused: bool = False


class Head(NamedTuple):
    """The first ticket of a process in the line of a bucket."""

    owner: str
    ticket: int
    shard_id: int
    place_us: int

    @property
    def place(self) -> tuple[int, str]:
        """Where it stands."""
        return self.place_us, self.owner


class Store(Protocol):
    """Where the shared state is kept: who calls this has it for themselves."""

    def account(self) -> SharedAccount | None:
        """Return the account without its buckets, ``None`` if there is none."""

    def buckets(self, number: int | None = None) -> dict[int, TokenBucket]:
        """Return all buckets that were kept, or that one."""

    def keep(self, account: SharedAccount, *, relaid: bool) -> None:
        """Keep the account and its buckets, and if it was ``relaid`` no others."""

    def begin_anew(self) -> None:
        """Forget all but the account: processes, heads, permits and who waits."""

    def renew_lease(self, owner: str, until_us: int, void: int) -> tuple[bool, int]:
        """Let a process count until then; return if it was known, and the highest ``void`` it gave."""

    def end_leases(self, owners: Iterable[str], now_us: int) -> None:
        """Let processes not count any longer."""

    def forget_silent(self, before_us: int) -> None:
        """Forget the processes whose leases ended before then, and all who waited there."""

    def heads(self, number: int | None = None, since_us: int = NEVER) -> list[Head]:
        """Return the heads of a bucket, or of all, whose processes have leases after ``since_us``."""

    def put_head(self, number: int, head: Head) -> None:
        """Keep a head, in the stead of its process's other one in that bucket."""

    def drop_head(self, owner: str, ticket: int) -> None:
        """Forget the head that is this ticket, if it is one."""

    def drop_heads(self) -> None:
        """Forget all heads."""

    def permit(self, owner: str, ticket: int) -> StoredPermit | None:
        """Return what was granted to a ticket."""

    def put_permit(self, owner: str, grant: StoredPermit) -> None:
        """Keep what was granted to a ticket."""

    def forget_permits(self, period: int, before_us: int) -> None:
        """Forget the permits of earlier periods than that, if they were granted before then."""

    def put_waiter(self, owner: str, waiter: Waiter) -> None:
        """Keep that a ticket waits; if that is known, the earlier arrival and place count."""

    def drop_waiter(self, owner: str, ticket: int) -> None:
        """Forget that a ticket waits."""

    def waiters(self, since_us: int) -> list[Waiter]:
        """Return those who wait in processes with a lease after ``since_us``."""


def answer(store: Store, request: Request, now_us: int, wall_us: int) -> Reply:
    """Do what a request says, in one step, and answer it."""
    return _Turn(store, request, now_us, wall_us).answer()


class _Turn:
    """One request while it is answered."""

    def __init__(self, store: Store, request: Request, now_us: int, wall_us: int) -> None:
        self.store = store
        self.request = request
        self.now_us = now_us
        self.wall_us = wall_us
        # From the process's clock to the ledger's:
        self.shift_us = 0 if request.at_us is None else now_us - request.at_us
        account = store.account()
        self.new = account is None
        self.relaid = self.new  # what the store has of buckets is out of date
        self.account = account or self._begun()
        self.outcome = Outcome()

    def _begun(self) -> SharedAccount:
        """Return the account of a ledger that finds nothing: it grants nothing for a window.

        It starts from what the process knows that asks: a limit that it brings, or else the one of
        before the loss, which is to be read anew by whoever can.
        """
        request = self.request
        window_us = request.interval_us + request.margin_us
        account = SharedAccount(
            window_us, request.period_us, default_bucket=TokenBucket(last_us=self.now_us)
        )
        account.period, account.granted = request.period, request.granted
        order = request.order
        given = order is not None and order.kind in ("open", "renew")
        limit = order.limit if given and order is not None and order.limit else request.limit
        limits.adopt(account, limit, self.wall_us)
        account.refresh_owed = not given
        return account

    def _make_good(self) -> None:
        """Go on with a ledger that has lost permits which the process has seen.

        As a replica has that is promoted, or an older copy that was put back. What else it lost
        nobody can tell: so no bucket grants for a window, and the process's word counts for the
        budget.
        """
        account, request = self.account, self.request
        self._load_all()
        closed_us = max(
            bucket.closed_until_us for bucket in (account.default_bucket, *account.buckets.values())
        )
        account.default_bucket = TokenBucket(last_us=self.now_us, closed_until_us=closed_us)
        account.buckets, self.relaid = {}, True
        self._open_with(request.limit)
        account.period = max(account.period, request.period)
        account.granted, account.refresh_owed = request.granted, True
        self._rebucket_heads()

    def answer(self) -> Reply:
        request, account = self.request, self.account
        if not request.owner:  # it only looks, and leaves no trace
            return self._reply(known=not self.new, booked=False)
        if self.new:
            self.store.begin_anew()
        period, until_us = account.period, self.now_us + request.lease_us
        known, void = self.store.renew_lease(request.owner, until_us, request.void)
        if request.number <= void:
            return self._reply(known=known, booked=False, void=True)
        if request.granted > account.granted:
            self._make_good()
        self._agree_on_window()
        for news in request.news:
            self._hear(news)
        booked = request.order is not None and self._obey(request.order)
        if self.relaid:
            self._rebucket_heads()
        if request.take is not None:
            self._take(request.take)
        if account.period != period:
            self.store.forget_permits(account.period - 1, self.now_us - SETTLED_AFTER_US)
        self.store.keep(account, relaid=self.relaid)
        return self._reply(known=known, booked=booked)

    def _reply(self, *, known: bool, booked: bool, void: bool = False) -> Reply:
        account = self.account
        left = limits.budget(account, self.wall_us)
        assert left is not None
        ready_in_us: tuple[tuple[int, int], ...] = ()
        others_us = 0
        waiting: tuple[Waiter, ...] = ()
        if self.request.look:
            self._load_all()
            ready_in_us = tuple(
                (number, max(0, token_bucket.closed_for_us(account, bucket, self.now_us)))
                for number, bucket in sorted(account.buckets.items())
            )
            others_us = max(
                0, token_bucket.closed_for_us(account, account.default_bucket, self.now_us)
            )
            waiting = in_order(self.store.waiters(self.now_us))
        return Reply(
            self.request.number,
            void,
            known,
            booked,
            left.total,
            left.remaining,
            left.resets_in_us,
            account.max_concurrency,
            account.period,
            account.granted,
            account.interval_us,
            account.margin_us,
            account.period_us,
            account.reserve,
            self.outcome,
            ready_in_us,
            others_us,
            waiting,
            self.now_us,
        )

    def _agree_on_window(self) -> None:
        """Let the larger interval and the larger margin of all live processes count."""
        account, request, now_us = self.account, self.request, self.now_us
        until_us = now_us + request.lease_us + request.interval_us + request.margin_us
        if request.interval_us >= account.interval_us or now_us >= account.interval_until_us:
            account.interval_us, account.interval_until_us = request.interval_us, until_us
        if request.margin_us >= account.margin_us or now_us >= account.margin_until_us:
            account.margin_us, account.margin_until_us = request.margin_us, until_us
        account.window_us = account.interval_us + account.margin_us
        account.period_us = request.period_us

    # --- buckets ----------------------------------------------------------------------------------

    def _bucket(self, shard_id: int) -> TokenBucket:
        number = shard_id % self.account.max_concurrency
        if number not in self.account.buckets and not self.relaid:
            self.account.buckets |= self.store.buckets(number)
        return token_bucket.bucket_of(self.account, shard_id)

    def _load_all(self) -> None:
        if not self.relaid:
            self.account.buckets = self.store.buckets() | self.account.buckets

    # --- news -------------------------------------------------------------------------------------

    def _hear(self, news: News) -> None:
        store, owner, ticket = self.store, self.request.owner, news.ticket
        at_us = news.at_us + self.shift_us
        permit = store.permit(owner, ticket)
        held = permit if permit is not None and not permit.returned else None
        if news.kind == "joined":
            if held is None:
                waiter = Waiter(ticket, news.shard_id, at_us, news.place_us + self.shift_us)
                store.put_waiter(owner, waiter)
        elif news.kind == "left":
            store.drop_waiter(owner, ticket)
            store.drop_head(owner, ticket)
            self._give_back(held)
        elif news.kind == "unused":
            self._give_back(held if held is not None and held.serial == news.serial else None)
        else:
            if permit is None or permit.serial != news.serial:  # the ledger has lost it
                permit = StoredPermit(news.serial, news.shard_id, 0, at_us, None, -1)
            self._hear_of_use(news, permit, min(at_us, self.now_us))

    def _give_back(self, permit: StoredPermit | None) -> None:
        if permit is None:
            return
        self._bucket(permit.shard_id)
        token_bucket.unused(self.account, cast(Permit, permit))
        self._open_by_surprise()
        self.store.put_permit(self.request.owner, permit)

    def _hear_of_use(self, news: News, permit: StoredPermit, at_us: int) -> None:
        if news.kind == "rejected" and permit.refused:
            return
        self._bucket(permit.shard_id)
        if news.kind == "sent":
            token_bucket.sent(self.account, cast(Permit, permit), at_us)
        else:
            permit.refused = True
            token_bucket.rejected(self.account, cast(Permit, permit), at_us)
            if permit.period >= 0:
                self.store.put_permit(self.request.owner, permit)

    # --- limits -----------------------------------------------------------------------------------

    def _obey(self, order: Order) -> bool:
        """Adopt a limit, or do without; false if that is overtaken."""
        account = self.account
        if account.refresher == self.request.owner:
            account.refresher = ""
        if order.kind == "trust":
            return self._trust(order.period)
        if order.limit is None or (self.new and order.kind in ("open", "renew")):
            return True  # there is nothing new in it
        other_buckets = order.limit.max_concurrency != account.max_concurrency
        if other_buckets:
            self._load_all()
            self.relaid = True
        if order.kind == "renew":
            if account.period != order.period:
                return False  # an update came before it
            limit = limits.less_starts(order.limit, account.granted - order.granted)
            limits.adopt(account, limit, self.wall_us)
        elif order.kind == "open":
            self._open_with(order.limit)
        else:
            limits.adopt(account, order.limit, self.wall_us)
        default = self.account.default_bucket
        default.rejections, default.rejected_serial = 0, -1  # which the ledgers do not store
        if other_buckets or order.kind != "open":  # which gives nobody more than there was
            self._open_by_surprise()
        return True

    def _trust(self, period: int) -> bool:
        """Let the last known total count at the reset of ``period``; false if that is outdated."""
        account = self.account
        account.refresh_owed = account.refresh_owed or account.period == period
        return account.period == period

    def _open_by_surprise(self) -> None:
        self.account.opened_us = self.now_us + self._longest_sleep_us()

    def _open_with(self, limit: SessionStartLimit) -> None:
        """Take the limit that a process begins with.

        Within the period that runs it refills nothing, nor does it bring the reset nearer.
        """
        account = self.account
        period, owed, left = (
            account.period,
            account.refresh_owed,
            limits.budget(account, self.wall_us),
        )
        runs = left is not None and left.resets_in_us > 0
        if runs and left is not None:
            resets_in = left.resets_in_us / US_PER_SECOND
            if limit.remaining >= left.remaining:
                remaining, reset_after = min(left.remaining, limit.total), resets_in
            else:
                remaining, reset_after = limit.remaining, max(limit.reset_after, resets_in)
            limit = replace(limit, remaining=remaining, reset_after=reset_after)
        limits.adopt(account, limit, self.wall_us)
        if runs:
            account.period, account.refresh_owed = period, owed

    def _rebucket_heads(self) -> None:
        """Give every head the line of its new bucket; where a process has two, the first one stays."""
        heads = sorted(self.store.heads(), key=lambda head: head.place, reverse=True)
        self.store.drop_heads()
        for head in heads:
            self.store.put_head(head.shard_id % self.account.max_concurrency, head)

    # --- permits ----------------------------------------------------------------------------------

    def _take(self, take: Take) -> None:
        store, account, owner, now_us = self.store, self.account, self.request.owner, self.now_us
        account.reserve = take.reserve
        permit = store.permit(owner, take.ticket)
        if permit is not None and not permit.returned:  # its reply was lost
            self._grant(permit)
            return
        number = take.shard_id % account.max_concurrency
        bucket = self._bucket(take.shard_id)
        head = Head(owner, take.ticket, take.shard_id, take.place_us + self.shift_us)
        heads = store.heads(number, now_us)
        for other in heads:
            if other[:2] == head[:2]:
                # It has a place, and keeps it unless the ledger's clock was set back.
                head = head._replace(place_us=min(head.place_us, other.place_us))
        ahead = self._ahead(head, heads)
        opens_us, period = self._opens_us(bucket), account.period
        turn_us = self._turn_us(len(ahead), opens_us)
        if ahead and not take.stays:
            turn_us = max(turn_us, now_us + 1)
        answer = token_bucket.take(
            account,
            take.shard_id,
            now_us,
            self.wall_us,
            take.can_refresh,
            turn_us,
        )
        if isinstance(answer, Denial):
            if take.stays:
                self._stand(number, head, take.at_us)
            self._deny(answer, len(ahead), opens_us, turn_us)
            return
        if account.period != period:
            account.opened_us = max(account.opened_us, opens_us)
        permit = StoredPermit(
            answer.serial, answer.shard_id, number, now_us, answer.remaining, answer.period
        )
        permit.ticket = take.ticket
        store.put_permit(owner, permit)
        store.drop_head(owner, take.ticket)
        store.drop_waiter(owner, take.ticket)
        store.end_leases(ahead, now_us)
        store.forget_silent(now_us - FORGOTTEN_AFTER_US)
        self._grant(permit, self._hand_on(take, number))

    def _ahead(self, head: Head, heads: list[Head]) -> list[str]:
        """Return the other processes whose heads are before that one."""
        return [one.owner for one in heads if one.owner != head.owner and one.place < head.place]

    def _stand(self, number: int, head: Head, at_us: int) -> None:
        """Let a ticket be the first of its process in a line."""
        self.store.put_head(number, head)
        waiter = Waiter(head.ticket, head.shard_id, at_us + self.shift_us, head.place_us)
        self.store.put_waiter(head.owner, waiter)

    def _hand_on(self, take: Take, number: int) -> int:
        """Let the next of the process stand where one was granted; return how long it may sleep."""
        account, heir = self.account, take.next
        if heir is None or heir.shard_id % account.max_concurrency != number:
            return 0
        if account.remaining <= take.reserve:
            return 0  # it is to hear of that
        if self.store.permit(self.request.owner, heir.ticket) is not None:
            return 0  # it has asked meanwhile
        head = Head(self.request.owner, heir.ticket, heir.shard_id, heir.place_us + self.shift_us)
        self._stand(number, head, heir.at_us)
        rank = len(self._ahead(head, self.store.heads(number, self.now_us)))
        opens_us = self.now_us + account.window_us
        return self._sleep_us(rank, opens_us, opens_us)

    def _grace_us(self) -> int:
        return min(MAX_GRACE_US, self.account.window_us // 5)

    def _opens_us(self, bucket: TokenBucket) -> int:
        """Return from when on there was, or will be, something to take."""
        account, now_us = self.account, self.now_us
        opens_us = now_us + token_bucket.closed_for_us(account, bucket, now_us)
        if account.resets_at_us is not None and self.wall_us >= account.resets_at_us:
            opens_us = max(opens_us, now_us - (self.wall_us - account.resets_at_us))
        return opens_us

    def _turn_us(self, rank: int, opens_us: int) -> int:
        """Return from when on a ticket of that rank may take."""
        if rank and opens_us <= self.now_us:  # whoever is first did perhaps not know
            latest_us = self.now_us + self._longest_sleep_us()
            opens_us = max(opens_us, min(self.account.opened_us, latest_us))
        return opens_us + rank * self._grace_us()

    def _grant(self, permit: StoredPermit, next_us: int = 0) -> None:
        self.outcome = Outcome(
            OUTCOMES.index(Permit),
            max(0, self.now_us - permit.stamp_us),
            permit.serial,
            permit.bucket,
            permit.remaining or 0,
            next_us,
        )

    def _deny(self, denial: Denial, rank: int, opens_us: int, turn_us: int) -> None:
        if denial.reason is Reason.RESET:
            sleep_us = self._claim_refresh()
        else:
            if denial.reason is Reason.BUDGET:
                opens_us = max(opens_us, self.now_us + denial.resets_in_us)
            sleep_us = self._sleep_us(rank, opens_us, turn_us)
        self.outcome = Outcome(OUTCOMES.index(denial.reason), sleep_us)

    def _sleep_us(self, rank: int, opens_us: int, turn_us: int) -> int:
        """Return how long a ticket may sleep: till its turn, or sooner where much may happen before.

        Where the bucket has opened by surprise, the first may take within it, and another window end.
        """
        sleep_us = opens_us - self.now_us + min(rank, 2) * self._grace_us()
        sleep_us += max(0, rank - 2) * self.account.window_us
        if sleep_us <= 0:
            sleep_us = min(turn_us - self.now_us, self.account.window_us)
        return min(max(1, sleep_us), self._longest_sleep_us())

    def _longest_sleep_us(self) -> int:
        return self.request.lease_us // 3

    def _claim_refresh(self) -> int:
        """Let one process read the limit anew: return 0 if it is this one, else how long to wait."""
        account, owner, lease_us = self.account, self.request.owner, self.request.lease_us
        left_us = min(account.refresh_until_us - self.now_us, lease_us)
        if account.refresher not in ("", owner) and left_us > 0:
            return min(left_us, MAX_GRACE_US)
        account.refresher, account.refresh_until_us = owner, self.now_us + lease_us
        return 0
