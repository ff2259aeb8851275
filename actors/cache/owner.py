"""The cache's owner: stored answers, and who is computing which one right now."""

from __future__ import annotations

import asyncio
import random as stdlib_random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from actors.cache.policy import (
    Answer,
    Ask,
    Entries,
    Failed,
    Flights,
    Gone,
    Landed,
    Landing,
    Miss,
    Outcome,
    Waiting,
)
from actors.ref import Clock

BYTES_MAX = 256 * 1024 * 1024
FOLLOWS_MAX = 8000
"""Most held `follow` messages; who comes beyond that is told Gone."""
TTL_JITTER = 0.1
"""A lifetime is cut by up to this share, so that what was stored together does not end together."""


class Cache:
    """Owns the entries of every scope, in memory, and the flights of every process.

    Bounded by `max_bytes` of entries (see `Entries`), the bounds of `Flights`, and FOLLOWS_MAX
    held messages.

    Failure behaviour: a restarted owner knows nothing. Entries are computed anew, leaders on their
    way land as if nobody had waited, and followers ask again, so that one of them leads. A leader
    that is not heard of for its `silence_s` is lost: exactly one of its followers leads next.
    """

    PROTOCOL = 1

    def __init__(
        self,
        max_bytes: int = BYTES_MAX,
        clock: Clock = time.monotonic,
        random: Callable[[], float] = stdlib_random.random,
        tenant_share: float = 1.0,
    ) -> None:
        self._clock = clock
        self._random = random
        self._entries = Entries(max_bytes, tenant_share)
        self._flights = Flights()
        self._landings: dict[str, asyncio.Future[Outcome]] = {}
        self._follows = 0
        self._counts: Counter[str] = Counter()

    def protocol(self) -> int:
        return self.PROTOCOL

    def lookup(self, asks: list[Ask]) -> list[Answer]:
        """One answer per ask, in order: Hit, Lead, Follow or Miss. Safe to repeat."""
        now = self._clock()
        self._lapse(now)
        answers = [self._look_up(ask, now) for ask in asks]
        self._counts.update(type(answer).__name__.lower() for answer in answers)
        return answers

    def _look_up(self, ask: Ask, now: float) -> Answer:
        hit = self._entries.get(ask.key, ask.scope, now) if ask.read else None
        if hit is not None:
            return hit
        return self._flights.join(ask, now) if ask.join else Miss()

    def land(self, landings: list[Landing]) -> None:
        """Ends flights and stores what has a lifetime. Safe to repeat.

        A value whose flight is not known is stored all the same: it is a whole answer, and only
        those who would have waited for it are elsewhere.
        """
        now = self._clock()
        for landing in landings:
            outcome = _outcome(landing)
            if landing.flight is not None and self._flights.land(landing.flight, outcome, now):
                self._tell(landing.flight, outcome)
            if landing.value is not None and landing.ttl_s is not None:
                ttl_s = landing.ttl_s * (1.0 - TTL_JITTER * self._random())
                stored = self._entries.put(landing.key, landing.scope, landing.value, ttl_s, now)
                self._counts["stored" if stored else "not_stored"] += 1
        self._lapse(now)

    def renew(self, flights: list[str]) -> list[str]:
        """The leaders of these flights are alive. Returns those that lead no longer."""
        now = self._clock()
        lost = [flight for flight in flights if not self._flights.renew(flight, now)]
        self._lapse(now)
        return lost

    async def follow(self, flight: str, timeout_s: float) -> Outcome | Waiting:
        """Waits for a flight's end: Landed, Failed or Gone; Waiting after `timeout_s` seconds."""
        deadline = self._clock() + timeout_s
        while True:
            now = self._clock()
            self._lapse(now)
            outcome = self._flights.outcome(flight)
            if outcome is not None:
                return outcome
            if now >= deadline:
                return Waiting()
            if self._follows >= FOLLOWS_MAX:
                return Gone()
            landing = self._landings.get(flight)
            if landing is None:
                landing = self._landings[flight] = asyncio.get_running_loop().create_future()
            wait_s = min(deadline - now, self._flights.silent_in_s(flight, now))
            self._follows += 1
            try:
                await asyncio.wait([landing], timeout=wait_s)
            finally:
                self._follows -= 1
            if landing.done():
                return landing.result()

    def stats(self) -> dict[str, Any]:
        return {
            "entries": len(self._entries),
            "bytes": self._entries.bytes,
            "max_bytes": self._entries.bytes_max,
            "evicted": self._entries.evicted,
            "flights": len(self._flights),
            "followers": self._follows,
            **self._counts,
        }

    async def close(self) -> None:
        """Lets every follower go."""
        for flight in list(self._landings):
            self._tell(flight, Gone())

    def _lapse(self, now: float) -> None:
        for flight in self._flights.lapse(now):
            self._counts["leaders_lost"] += 1
            self._tell(flight, Gone())

    def _tell(self, flight: str, outcome: Outcome) -> None:
        landing = self._landings.pop(flight, None)
        if landing is not None and not landing.done():
            landing.set_result(outcome)


def _outcome(landing: Landing) -> Outcome:
    if landing.value is not None:
        return Landed(landing.value)
    return Gone() if landing.error is None else Failed(landing.error)
