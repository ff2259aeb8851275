"""How a desk reaches its owner: by the owner's verbs, wherever the owner lives.

Two kinds exist: `InlineRef` here, for owners in the same process, and `RayRef` in `spawn.py`, for
owners that are named Ray actors. A desk cannot tell them apart.
"""

from __future__ import annotations

import inspect
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Clock = Callable[[], float]
"""Seconds on a monotonic clock. Only differences mean anything, and only within one process."""


class Packed(tuple[T, ...]):
    """Many values that cross to another process in one piece, and are a plain tuple there.

    Ray's pickler asks Python about each value that is not built in: 1.4 ms for a limiter's message
    about 50 tenants, where this takes 0.2 ms.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (pickle.dumps(tuple(self), pickle.HIGHEST_PROTOCOL),)


class OwnerUnavailable(Exception):
    """The owner could not be reached in time; the message may or may not have been executed."""

    def __init__(self, owner: str, reason: str) -> None:
        super().__init__(owner, reason)
        self.owner = owner
        self.reason = reason

    def __str__(self) -> str:
        return f"owner {self.owner!r} is unavailable: {self.reason}"


class OwnerRef(Protocol):
    """The far end of a desk's line.

    `ask` may deliver a message more than once when it has to retry, so every message that changes
    something carries an id. What the owner raises is raised here; `OwnerUnavailable` means that no
    answer came within `timeout_s` seconds.
    """

    name: str
    sent: Counter[str]

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any: ...


class InlineRef:
    """An owner that lives in this process and on this event loop."""

    def __init__(self, name: str, owner: object) -> None:
        self.name = name
        self.owner = owner
        self.sent: Counter[str] = Counter()

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self.sent[method] += 1
        result = getattr(self.owner, method)(*args)
        return await result if inspect.isawaitable(result) else result
