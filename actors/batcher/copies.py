"""One provider call, or two where the first is late: see `hedge`."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from actors.batcher.callers import Callers
from actors.batcher.calls import checked
from actors.batcher.flights import Flight
from actors.batcher.hedge import Hedging, Kind, kind_of
from actors.batcher.policy import BadVectors, Lane, Paid, Spare, Text, Vectors
from actors.ref import Clock

EmbedCall = Callable[[Lane, list[Text], float], Awaitable[Vectors]]
"""One provider call: the lane, distinct texts, and the seconds it may take. Raises NoPermit where
nothing was sent for want of room in the provider's limits."""
Spawn = Callable[[Coroutine[Any, Any, Vectors]], asyncio.Task[Vectors]]


class Copies:
    """Owns the way to the provider, opened by the first call, and how long calls take.

    Bounded by `Hedging`. Failure behaviour: a provider that cannot be opened fails the call and is
    opened again by the next; what nobody is left to pay for is told to `callers`.
    """

    def __init__(
        self,
        factory: Callable[[], EmbedCall],
        callers: Callers,
        counts: Counter[str],
        clock: Clock,
        spawn: Spawn,
    ) -> None:
        self._factory = factory
        self._callers = callers
        self._counts = counts
        self._clock = clock
        self._spawn = spawn
        self._hedging = Hedging()
        self._provider: EmbedCall | None = None

    async def close(self) -> None:
        """Let go of the provider."""
        provider, self._provider = self._provider, None
        close = getattr(provider, "close", None)
        if close is not None:
            closing = close()
            if inspect.isawaitable(closing):
                await closing

    async def ask(self, flight: Flight) -> tuple[Vectors, Spare | None]:
        """The vectors of a call, and what a second copy has cost, if there was one."""
        begun_s = self._clock()
        ends_s = flight.ends_s
        timeout_s = max(0.0, ends_s - begun_s)
        # A provider that has just failed is not helped by two calls in place of one.
        if not flight.caps.hedge or flight.lane.retry:
            async with asyncio.timeout(timeout_s):
                return await self._copy(flight, ends_s), None
        kind = kind_of(flight.lane, sum(unit.size for unit in flight.units))
        late_after_s = self._hedging.late_after_s(kind)
        spare: Spare | None = None
        async with asyncio.timeout(timeout_s):
            if late_after_s is None:
                vectors = await self._copy(flight, ends_s)
            else:
                vectors, spare = await self._race(flight, kind, late_after_s, ends_s)
        self._hedging.answered(kind, self._clock() - begun_s)
        return vectors, spare

    async def _copy(self, flight: Flight, ends_s: float) -> Vectors:
        """One provider call, and whether its vectors are any good."""
        if self._provider is None:
            self._provider = self._factory()
        timeout_s = max(0.0, ends_s - self._clock())
        texts = [unit.text for unit in flight.units]
        vectors = await self._provider(flight.lane, texts, timeout_s)
        try:
            return checked(vectors, len(texts))
        except BadVectors:
            self._callers.unclaimed(vectors)
            raise

    async def _race(
        self, flight: Flight, kind: Kind, late_after_s: float, ends_s: float
    ) -> tuple[Vectors, Spare | None]:
        """The first good answer of two copies, where the budget has a second one.

        With none the failure of the first copy is raised: the second may not even have left.
        """
        first = self._spawn(self._copy(flight, ends_s))
        copies = [first]
        try:
            await asyncio.wait(copies, timeout=late_after_s)
            if first.done() or not self._hedging.take(kind):
                return await first, None
            self._counts["hedges"] += 1
            second = self._spawn(self._copy(flight, ends_s))
            copies.append(second)
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            if not any(map(_is_good, copies)):
                await asyncio.wait(copies)
            if not _is_good(first) and not _is_good(second):
                self._callers.unclaimed(_cost_of(second))
                return await first, None
            winner, loser = (first, second) if _is_good(first) else (second, first)
            self._counts["hedges_won"] += winner is second
            return winner.result(), _spare(winner.result(), loser)
        except asyncio.CancelledError:
            # The deadline, or a caller who leaves, may come a tick after the answer.
            for one in copies:
                self._callers.unclaimed(_cost_of(one))
            raise
        finally:
            for one in copies:
                one.cancel()


def _is_good(call: asyncio.Task[Vectors]) -> bool:
    return call.done() and not call.cancelled() and call.exception() is None


def _cost_of(call: asyncio.Task[Vectors]) -> Vectors | Paid | None:
    """What a copy of a call has cost, as far as is known by now."""
    if not call.done() or call.cancelled():
        return None
    error = call.exception()
    return call.result() if error is None else getattr(error, "paid", None)


def _spare(won: Vectors, loser: asyncio.Task[Vectors]) -> Spare | None:
    """What the copy whose answer is not used has cost; nothing where it failed for nothing."""
    if not loser.done():
        return Spare(won.prompt_tokens, won.cost_nano, won.model, estimated=True)
    lost = _cost_of(loser)
    if lost is None:
        return None
    return Spare(lost.prompt_tokens, lost.cost_nano, lost.model, getattr(lost, "estimated", False))
