"""A line to an owner that behaves as badly as a cluster may: it loses, doubles and delays."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections import Counter, deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from actors.ref import OwnerUnavailable


class Fate(StrEnum):
    """What happens to one message."""

    ARRIVES = "arrives"
    LOST = "lost"  # the owner never sees it
    UNHEARD = "unheard"  # it is executed, and the answer is lost
    DOUBLED = "doubled"  # it is executed twice
    LATE = "late"  # the asker gives up; it is executed when the test calls `deliver_late`


class House:
    """Where the owner lives, dies and comes back, with a line for each desk.

    `around` is called with the method and its arguments and gives a function to be called after
    it was executed: the place for a test's oracle.
    """

    around: Callable[[str, tuple[Any, ...]], Callable[[], None]] = staticmethod(
        lambda *_: lambda: None
    )

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.owner: Any = make()
        self.lines: list[Wire] = []

    def line(self) -> Wire:
        wire = Wire(self)
        self.lines.append(wire)
        return wire

    def restart(self) -> None:
        """The owner dies, and one without memory takes its place."""
        self.owner = self._make()
        for wire in self.lines:
            wire.break_held()

    async def execute(self, method: str, args: tuple[Any, ...]) -> Any:
        after = self.around(method, args)
        result = getattr(self.owner, method)(*args)
        if inspect.isawaitable(result):
            return await result
        after()
        return result


class Wire:
    """One desk's line. Everything that goes over it is pickled, both ways."""

    name = "owner"

    def __init__(self, house: House) -> None:
        self.sent: Counter[str] = Counter()
        self.fates: deque[Fate] = deque()
        self.cut = False
        self._house = house
        self._late: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._held: set[asyncio.Future[Any]] = set()

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self.sent[method] += 1
        args = pickle.loads(pickle.dumps(args))
        if self.cut:
            raise OwnerUnavailable(self.name, "it is away")
        if method == "watch":
            return await self._hold(method, args)
        fate = self.fates.popleft() if self.fates else Fate.ARRIVES
        await asyncio.sleep(0)
        if fate is Fate.LATE:
            self._late.append((method, args))
        if fate in (Fate.LATE, Fate.LOST):
            raise OwnerUnavailable(self.name, str(fate))
        answer = await self._house.execute(method, args)
        if fate is Fate.DOUBLED:
            await self._house.execute(method, args)
        if fate is Fate.UNHEARD:
            raise OwnerUnavailable(self.name, str(fate))
        return pickle.loads(pickle.dumps(answer))

    async def deliver_late(self) -> bool:
        """Execute the oldest message that was given up. False if there is none."""
        if not self._late:
            return False
        method, args = self._late.popleft()
        await self._house.execute(method, args)
        return True

    def break_held(self) -> None:
        """Fail the polls that are held, as the death of the owner does."""
        for task in self._held:
            task.cancel()

    async def _hold(self, method: str, args: tuple[Any, ...]) -> Any:
        poll = asyncio.ensure_future(self._house.execute(method, args))
        self._held.add(poll)
        try:
            await asyncio.wait([poll])
            if poll.cancelled():
                raise OwnerUnavailable(self.name, "it died")
            return pickle.loads(pickle.dumps(poll.result()))
        finally:
            poll.cancel()
            self._held.discard(poll)
