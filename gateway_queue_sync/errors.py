"""The exceptions. Each has its figures as attributes, explains them in its text, and can be pickled."""

from __future__ import annotations


class GatewayQueueError(Exception):
    """The base class of all errors that are particular to this package."""

    def _fields(self) -> tuple[object, ...]:
        """Return the arguments that make an equal error, for pickling."""
        return self.args

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._fields()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._fields()))})"


class AcquireTimeout(GatewayQueueError, TimeoutError):
    """No permit came within the timeout. The wait used up nothing.

    Attributes:
        shard_id: the shard that asked.
        timeout: the timeout of the call, in seconds.
        eta: seconds until the permit would have come; ``None`` if that is unknown, or if 100 or more
            others come first.
    """

    def __init__(self, shard_id: int, timeout: float, eta: float | None = None) -> None:
        # TimeoutError is an OSError, which would take positional arguments for errno and strerror.
        super().__init__()
        self.shard_id = shard_id
        self.timeout = timeout
        self.eta = eta

    def __str__(self) -> str:
        when = "" if self.eta is None else f"; it would have come in about {self.eta:.2f} s"
        return f"shard {self.shard_id} got no permit within {self.timeout:g} s{when}"

    def _fields(self) -> tuple[object, ...]:
        return self.shard_id, self.timeout, self.eta


class QueueClosed(GatewayQueueError, RuntimeError):
    """The queue was closed before the call or while it waited. No permit was used up."""

    def __init__(self, message: str = "the queue is closed: it grants no more permits") -> None:
        super().__init__(message)


class SessionLimitExhausted(GatewayQueueError):
    """No session start is left until the limit resets, except for the reserve.

    Raised by queues made with ``when_exhausted="raise"``. Discord resets the token of a bot that
    goes past its limit (https://discord.com/developers/docs/topics/gateway, *Session Start Limit*).

    Attributes:
        remaining: session starts left, the reserve included.
        resets_in: seconds until the limit resets.
    """

    def __init__(self, remaining: int, resets_in: float) -> None:
        super().__init__()
        self.remaining = remaining
        self.resets_in = resets_in

    def __str__(self) -> str:
        return (
            f"the session start limit is used up ({self.remaining} left, all of it reserved); "
            f"it resets in {self.resets_in:.0f} s"
            if self.remaining
            else f"the session start limit is used up; it resets in {self.resets_in:.0f} s"
        )

    def _fields(self) -> tuple[object, ...]:
        return self.remaining, self.resets_in


class GatewayBotError(GatewayQueueError):
    """``GET /gateway/bot`` did not return a session start limit. The error never contains the token.

    Args:
        message: what went wrong, in a sentence.
        status: the HTTP status of Discord's answer, or ``None`` if there was no answer.
        retry_after: seconds to wait before the next request, if Discord asked for that, or ``None``.

    Attributes:
        status, retry_after: the arguments of the same names.
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    def _fields(self) -> tuple[object, ...]:
        return self.args[0], self.status, self.retry_after


class LedgerError(GatewayQueueError):
    """A shared ledger (a file, a server or a broker) cannot be reached or used.

    Always raised ``from`` its cause. No permit was granted.
    """


def reentered() -> RuntimeError:
    """Return the error for a call from inside another call to the same queue."""
    return RuntimeError(
        "the queue was called in a thread that is inside another call to it (by a signal handler, a "
        "finalizer or an observer); set a flag there instead, or use another thread"
    )


def worker_blocked() -> RuntimeError:
    """Return the error for a call that would block the worker that it waits for."""
    return RuntimeError("a future's callback must not block on the queue that serves it")


def forked(owner: str) -> RuntimeError:
    """Return the error for a call in a child process to a queue that its parent made."""
    return RuntimeError(
        f"this {owner} was made, or this call began, before the process forked: its permits belong to "
        "the parent; to share a queue between processes use SqliteQueue"
    )
