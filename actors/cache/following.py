"""Those who follow a call that somebody else makes, and what they have heard of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.cache.policy import Failed, Landed, Outcome


class FlightFailed(Exception):
    """The call that this request shared has failed; `error` is what its leader landed."""

    def __init__(self, error: bytes) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True, slots=True)
class Joined:
    """The answer of somebody else's call, which ran at the same time."""

    value: bytes


@dataclass(slots=True, eq=False)
class Ear:
    """A flight that is followed here: what was heard of it, and how many are listening."""

    pieces: list[bytes] = field(default_factory=list)
    outcome: Outcome | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: int = 0

    def ring(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Listening:
    """One follower of a flight. `taken` are the pieces of a stream that it has been handed.

    Close it. Failure behaviour: a leader that is lost, and an owner, end it with None.
    """

    def __init__(self, ear: Ear, left: Callable[[], None]) -> None:
        """`left` is called when nobody is listening any more."""
        self._ear = ear
        self._left = left
        self._taken = 0
        self._closed = False
        ear.listeners += 1

    @property
    def taken(self) -> list[bytes]:
        return self._ear.pieces[: self._taken]

    async def more(self, patience_s: float) -> list[bytes] | Joined | None:
        """The pieces that have come since; the whole value at the end; None when it is lost, or
        after `patience_s` seconds. Raises FlightFailed with the leader's error."""
        ear = self._ear
        if len(ear.pieces) == self._taken and ear.outcome is None:
            try:
                async with asyncio.timeout(max(0.0, patience_s)):
                    await ear.changed.wait()
            except TimeoutError:
                return None
        pieces = ear.pieces[self._taken :]
        if pieces:
            self._taken = len(ear.pieces)
            return pieces
        if isinstance(ear.outcome, Landed):
            return Joined(ear.outcome.value)
        if isinstance(ear.outcome, Failed):
            raise FlightFailed(ear.outcome.error)
        return None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._ear.listeners -= 1
        if not self._ear.listeners:
            self._left()
