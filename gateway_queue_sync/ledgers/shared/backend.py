"""A backend sends requests to a shared ledger and receives the replies."""

from __future__ import annotations

from typing import Protocol

from gateway_queue_sync.errors import LedgerError
from gateway_queue_sync.ledgers.shared.messages import Reply, Request


class Unreachable(LedgerError):
    """The ledger did not answer in time. It may have applied the request nevertheless."""


class Busy(LedgerError):
    """The ledger did not apply the request, because another process has it locked for a moment."""


class Backend(Protocol):
    """Sends requests, one at a time, in the worker's thread.

    Its repr says where the ledger is, without secrets.
    """

    def ask(self, request: Request) -> Reply:
        """Have the ledger apply a request in one atomic step. After a failure the caller sends it again.

        Raises:
            Unreachable: there was no answer.
            Busy: another process has the ledger locked; the request was not applied.
            LedgerError: the ledger cannot be used; the file is another program's, for example.
        """

    def relay(self, request: Request) -> Reply:
        """Have the ledger apply a request whose times are by another process's clock. From any thread.

        The times in the request are moved by ``now_us - sent_us``. Raises as ``ask``.
        """

    def before_fork(self) -> None:
        """Prepare for a fork of this process. Like the next two, it may be repeated."""

    def after_fork_in_parent(self) -> None:
        """Go on after a fork."""

    def begin_in_child(self) -> None:
        """Begin anew in a forked child, without what the parent has open."""

    def close(self) -> None:
        """Close the file or the connection. A later request opens it again."""
