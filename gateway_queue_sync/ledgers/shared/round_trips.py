"""How long a shared ledger takes to answer one process, and what follows from that."""

from __future__ import annotations

from gateway_queue_sync.clock import FOREVER_US
from gateway_queue_sync.models import US_PER_SECOND

MAX_RAISED_US = 2 * US_PER_SECOND  # to which the margin is raised
MANY_LATE = 3  # replies with late permits, in a row
MANY_SLOW = 3  # round trips, in a row
MANY_TRIPS = 20  # after which a margin that was raised may be lowered
PAUSE_US = 30 * US_PER_SECOND


class RoundTrips:
    """The round trips of one process to its ledger.

    If permits come late again and again, the process would give each one back, and the others would wait
    in vain. So it raises its margin, and its permits are held for the difference: the windows after them
    become longer, no others. If permits are late even at the maximum, it asks for none for a while.

    Attributes:
        margin_us: how old a permit may be when it reaches its caller: the margin of the settings, or
            1.5 times the age of permits that came late, 2 s at most.
        resumes_us: until when this process asks for no permits; ``FOREVER_US`` if it does ask.
    """

    def __init__(self, margin_us: int, lease_us: int) -> None:
        self.margin_us = self._least_us = margin_us
        self._slow_us = lease_us // 3  # from then on, other processes take the turns of this one
        self.resumes_us = FOREVER_US
        self._late = self._slow = self._trips = self._longest_us = 0

    @property
    def hold_us(self) -> int:
        """How much later than its grant the window of a permit has to start."""
        return self.margin_us - self._least_us

    def note(self, trip_us: int, age_us: int | None, now_us: int) -> list[str]:
        """Note a reply that took so long, and the age of its oldest permit, if it had any.

        Returns what to log.
        """
        self._trips, self._longest_us = self._trips + 1, max(self._longest_us, trip_us)
        if self._trips == MANY_TRIPS:
            enough_us = max(self._least_us, self._longest_us * 3 // 2)
            self.margin_us = min(self.margin_us, enough_us)
            self._trips = self._longest_us = 0
        warnings = []
        self._slow = self._slow + 1 if trip_us > self._slow_us else 0
        if self._slow == MANY_SLOW:
            warnings.append(
                f"the ledger answers after {trip_us / US_PER_SECOND:.2f} s, more than a third of the "
                "lease: other processes are likely to take the turns of this one"
            )
        if age_us is not None and age_us > self.margin_us:
            warnings += self._note_late(age_us, now_us)
        elif age_us is not None:
            self._late = 0
        return warnings

    def _note_late(self, age_us: int, now_us: int) -> list[str]:
        """Raise the margin or pause if permits were late in several replies in a row.

        They are late if round trips are long, or if a reply was lost and the request was sent again.
        """
        self._late += 1
        said = f"the ledger answers after {age_us / US_PER_SECOND:.2f} s"
        margin_us = min(age_us * 3 // 2, MAX_RAISED_US)
        if self._late >= MANY_LATE - 1 and margin_us > self.margin_us:
            self.margin_us, self._late = margin_us, 0
            raised = f"it is raised to {margin_us / US_PER_SECOND:.2f} s"
            return [f"{said}, later than the margin: {raised}"]
        if self._late < MANY_LATE:
            return []
        self.resumes_us = now_us + PAUSE_US
        pause = f"this process asks for none for {PAUSE_US / US_PER_SECOND:.0f} s"
        return [f"{said}, too late for permits: {pause}"]
