"""The future of a permit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from gateway_queue_sync.clock import make_small
from gateway_queue_sync.models import Permit


class PermitFuture(Future[Permit]):
    """A future that leaves its line as soon as it is cancelled."""

    on_cancel: Callable[[], None] | None = None

    def __init__(self) -> None:
        super().__init__()
        make_small(self._condition)

    def cancel(self) -> bool:
        """Cancel as any future does, and leave the line."""
        cancelled = super().cancel()
        on_cancel = self.on_cancel
        if cancelled and on_cancel is not None:
            on_cancel()
        return cancelled
