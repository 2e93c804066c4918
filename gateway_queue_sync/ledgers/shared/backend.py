"""Where a shared ledger is: what sends a request there and receives the reply."""

from __future__ import annotations

from typing import Protocol

from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared.messages import Reply, Request


class Unreachable(LedgerError):
    """The ledger did not answer, or not in time: it may have applied the request all the same."""


class Busy(LedgerError):
    """The ledger did not apply the request, because another process has it locked for a moment."""


class Backend(Protocol):
    """Sends requests, one at a time, in the worker's thread.

    Its repr names the place, not its secrets.
    """

    def ask(self, request: Request) -> Reply:
        """Have a request answered in one atomic step; the caller sends it again if it fails.

        Raises:
            Unreachable: there was no answer.
            LedgerError: what is there cannot be used, such as another program's file.
        """

    def relay(self, request: Request) -> Reply:
        """Answer a request of another process, whose clock is not this one's; from any thread.

        Its times are moved by ``now_us - sent_us``, also where ``ask`` knows better. Raises as ``ask``.
        """

    def before_fork(self) -> None:
        """Make ready for a fork of this process."""

    def after_fork_in_parent(self) -> None:
        """Go on after a fork."""

    def begin_in_child(self) -> None:
        """Be another process from now on: what the parent has open stays the parent's."""

    def close(self) -> None:
        """Let go of what is held open; a later request opens it anew."""
