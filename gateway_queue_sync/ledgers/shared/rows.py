"""The account and the buckets that one request touches: read once, saved at its end."""

from __future__ import annotations

from gateway_queue_sync import limits as session_limits
from gateway_queue_sync import token_bucket
from gateway_queue_sync.ledgers.shared.bounds import (
    MAX_INTERVAL_US,
    MAX_LEASE_US,
    MAX_MARGIN_US,
)
from gateway_queue_sync.ledgers.shared.messages import Request
from gateway_queue_sync.ledgers.shared.store import SharedAccount, SharedBucket, Store
from gateway_queue_sync.limits import CONFIRM_US
from gateway_queue_sync.models import US_PER_SECOND

MAX_SETTINGS_US = MAX_LEASE_US + MAX_INTERVAL_US + MAX_MARGIN_US
MAX_NOTICE_US = 2 * US_PER_SECOND  # the longest time that heads get to learn of an opening
MAX_PERIODS_BACK = 100  # a permit from so many periods ago counts as one from before a loss
DIFFERS_US = 60 * US_PER_SECOND  # how long replies say that processes have different settings
READ_CLAIM_US = 10 * US_PER_SECOND  # how long other processes leave a read to the one that began it


class Rows:
    """The account, if there is one, and buckets of it.

    Attributes:
        account: the account; ``None`` in a new ledger.
        divided: all buckets were replaced, so those that are stored do not count.
    """

    def __init__(self, store: Store, request: Request, now_us: int, wall_us: int) -> None:
        self.store, self.request, self.now_us, self.wall_us = store, request, now_us, wall_us
        self.divided = False
        self.account = store.account()
        if self.account is not None:
            self._bound_times(self.account)

    def _bound_times(self, account: SharedAccount) -> None:
        """Limit stored times, in case the ledger's clock was set back."""
        now_us, account.recent = self.now_us, {}
        account.interval_until_us = min(account.interval_until_us, now_us + MAX_SETTINGS_US)
        account.margin_until_us = min(account.margin_until_us, now_us + MAX_SETTINGS_US)
        account.differs_until_us = min(account.differs_until_us, now_us + DIFFERS_US)
        account.opened_us = min(account.opened_us, now_us + MAX_NOTICE_US)
        account.settle_until_us = min(account.settle_until_us, now_us + MAX_NOTICE_US)
        account.reader_until_us = min(account.reader_until_us, now_us + READ_CLAIM_US)
        account.read_us = min(account.read_us, now_us)
        if self.request.reread_us:
            longest_us = max(self.request.reread_us, CONFIRM_US)
            account.read_due_us = min(account.read_due_us, now_us + longest_us)

    @property
    def kept(self) -> SharedAccount:
        """The account, which must exist."""
        assert self.account is not None
        return self.account

    @property
    def notice_us(self) -> int:
        """How long it may take until a head asks again after its bucket has opened early."""
        return min(self.request.lease_us // 3, MAX_NOTICE_US)

    def left(self) -> int:
        """Return how many session starts are left, -1 while there is no limit."""
        left = session_limits.budget(self.kept, self.wall_us)
        return -1 if left is None else left.remaining

    def bucket(self, number: int) -> SharedBucket:
        """Return a bucket. One that is not stored is like the default bucket."""
        buckets, default = self.kept.buckets, self.kept.default_bucket
        bucket = buckets.get(number)
        if not isinstance(bucket, SharedBucket):
            bucket = None if self.divided else self.store.bucket(number)
            if bucket is None:
                bucket = SharedBucket(
                    default.last_us,
                    default.hold_us,
                    closed_until_us=default.closed_until_us,
                    rejections=default.rejections,
                    rejected_serial=0,  # a new bucket's serial is 0, too, so the series continues
                )
            bucket.opened_us = min(bucket.opened_us, self.now_us + MAX_NOTICE_US)
            # A session whose head was passed over may not have asked again yet: its line stays a while.
            after_us, up_to_us = self.now_us - self.notice_us, self.now_us + MAX_LEASE_US
            bucket.lines = tuple(row for row in bucket.lines if after_us < row.until_us <= up_to_us)
            buckets[number] = bucket
        return bucket

    def load_all(self) -> None:
        """Read all buckets that were stored."""
        for number in () if self.divided else self.store.buckets():
            self.bucket(number)

    def divide(self, max_concurrency: int) -> None:
        """Replace all buckets by new ones without lines, closed until the last old one would open.

        So all sessions send their lines again. If the number of buckets changes, they get time for it.
        """
        self.load_all()
        account, others = self.kept, 0
        default = account.default_bucket
        default.last_us = min(default.last_us, self.now_us)  # the clock may have been set back
        for bucket in account.buckets.values():
            assert isinstance(bucket, SharedBucket)
            others += bucket.waiting(but_for=self.request.session)
            last_us = min(bucket.last_us, self.now_us)
            held_until_us = max(default.last_us + default.hold_us, last_us + bucket.hold_us)
            default.last_us = max(default.last_us, last_us)
            default.hold_us = held_until_us - default.last_us
            default.closed_until_us = max(default.closed_until_us, bucket.closed_until_us)
            if bucket.rejected_serial in (bucket.serial, bucket.previous_serial):
                default.rejections = max(default.rejections, bucket.rejections)
        # Not at an introduction: else each process that starts would close the buckets for all.
        begins = self.request.introduction is not None
        if others and not begins and max_concurrency != account.max_concurrency:
            account.settle_until_us = self.now_us + self.notice_us
        self.store.drop_buckets()
        account.buckets, account.max_concurrency = {}, max_concurrency
        account.layout += 1
        self.divided = True

    def due_us(self, bucket: SharedBucket) -> int:
        """Return when a bucket opens, or when it opened."""
        account, now_us = self.kept, self.now_us
        due_us = now_us + token_bucket.closed_for_us(account, bucket, now_us)
        return max(due_us, account.settle_until_us)

    def lose(self, period: int = 0) -> None:
        """Close all buckets for one window and the longest hold, because requests were lost.

        The serials of lost grants are used again. So the period gets a number that it cannot have had
        before the loss: it shows which permits are from before, and these cannot be given back.
        """
        account = self.kept
        self.divide(account.max_concurrency)
        account.default_bucket.last_us = self.now_us
        account.default_bucket.hold_us = account.held_us  # permits that were lost may be held
        account.period = max(max(account.period, period) + MAX_PERIODS_BACK, self.wall_us)

    def save(self) -> None:
        """Store the account and the buckets that were touched."""
        for number, bucket in self.kept.buckets.items():
            assert isinstance(bucket, SharedBucket)
            self.store.put_bucket(number, bucket)
        self.store.put_account(self.kept)
