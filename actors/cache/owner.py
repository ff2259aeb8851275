"""The cache's owner: stored answers, and who is computing which one right now.

Answers are in memory, and behind that in Redis where one is configured (`redis_tier.py`).
"""

from __future__ import annotations

import asyncio
import random as stdlib_random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from actors.cache.hall import Hall
from actors.cache.policy import (
    Answer,
    Ask,
    Entries,
    Failed,
    Flights,
    Follow,
    Gone,
    Landed,
    Landing,
    Lead,
    Miss,
    News,
    Outcome,
    Searching,
    leader_of,
)
from actors.cache.redis_tier import Found, Place, Places, RedisTier
from actors.ref import Clock

BYTES_MAX = 256 * 1024 * 1024
FOLLOWS_MAX = 8000
"""Most held `follow` messages; who comes beyond that is told Gone."""
TTL_JITTER = 0.1
"""A lifetime is cut by up to this share, so that what was stored together does not end together."""


class Cache:
    """Owns the entries of every scope, in memory, and the flights of every process.

    Bounded by `max_bytes` of entries (see `Entries`), the bounds of `Flights` and of `RedisTier`,
    and FOLLOWS_MAX held messages.

    Failure behaviour: a restarted owner knows nothing but where its Redis is. Entries are found
    there or computed anew, leaders on their way land as if nobody had waited, and followers ask
    again, so that one of them leads. A leader that is not heard of for its `silence_s` is lost:
    exactly one of its followers leads next. A Redis that is slow or away costs a miss the tier's
    budget at most, and everybody else nothing.
    """

    PROTOCOL = 2

    def __init__(
        self,
        max_bytes: int = BYTES_MAX,
        clock: Clock = time.monotonic,
        random: Callable[[], float] = stdlib_random.random,
        tenant_share: float = 1.0,
        places: Places | None = None,
    ) -> None:
        """`places` tells where the second tier is, if there may be one."""
        self._clock = clock
        self._random = random
        self._entries = Entries(max_bytes, tenant_share)
        self._flights = Flights()
        self._hall = Hall()
        self._counts: Counter[str] = Counter()
        self._places = places
        self._following: asyncio.Task[None] | None = None
        self._place: Place | None = None
        self._tier: RedisTier | None = None
        self._tier_problem: str | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def protocol(self) -> int:
        self._wake()
        return self.PROTOCOL

    def lookup(self, asks: list[Ask]) -> list[Answer | Searching]:
        """One answer per ask, in order. Safe to repeat.

        Hit, Follow, and Lead or Miss where there is nothing more to ask. Where there is, Searching:
        the flight is the asker's already, and `search` says whether it has to fly.
        """
        self._wake()
        now = self._clock()
        self._lapse(now)
        answers: list[Answer | Searching] = [self._look_up(ask, now) for ask in asks]
        if self._tier is not None and self._tier.up:
            answers = [
                Searching() if ask.read and isinstance(answer, Lead | Miss) else answer
                for ask, answer in zip(asks, answers, strict=True)
            ]
        self._counts.update(type(answer).__name__.lower() for answer in answers)
        return answers

    async def search(self, asks: list[Ask]) -> list[Answer]:
        """One answer per ask that `lookup` is Searching for: Hit, Lead, Follow or Miss, in order.

        All of them are one question to Redis. What is found there is a hit here from now on, and
        lands the flight for those who follow it already. Safe to repeat.
        """
        found: list[Found | None] = [None] * len(asks)
        if self._tier is not None:
            found = await self._tier.find([(ask.scope, ask.key) for ask in asks])
        now = self._clock()
        self._lapse(now)
        for ask, one in zip(asks, found, strict=True):
            if one is not None and self._entries.put(ask.key, ask.scope, one.value, one.ttl_s, now):
                self._end(ask.flight, Landed(one.value), now)
        answers = [self._look_up(ask, now) for ask in asks]
        self._counts.update(type(answer).__name__.lower() for answer in answers)
        return answers

    def _look_up(self, ask: Ask, now: float) -> Answer:
        hit = self._entries.get(ask.key, ask.scope, now) if ask.read else None
        if hit is not None:
            return hit
        if not ask.join:
            return Miss()
        answer = self._flights.join(ask, now)
        if ask.stream and isinstance(answer, Follow):
            self._hall.tell(leader_of(answer.flight))
        return answer

    def land(self, landings: list[Landing]) -> None:
        """Ends flights and stores what has a lifetime. Safe to repeat.

        A value whose flight is not known is stored all the same: it is a whole answer, and only
        those who would have waited for it are elsewhere.
        """
        now = self._clock()
        for landing in landings:
            outcome = _outcome(landing)
            if landing.flight is not None:
                self._end(landing.flight, outcome, now)
            if landing.value is not None and landing.ttl_s is not None:
                ttl_s = landing.ttl_s * (1.0 - TTL_JITTER * self._random())
                stored = self._entries.put(landing.key, landing.scope, landing.value, ttl_s, now)
                self._counts["stored" if stored else "not_stored"] += 1
                if stored and self._tier is not None:
                    self._tier.store(landing.scope, landing.key, landing.value, ttl_s)
        self._lapse(now)

    def renew(self, flights: list[str]) -> list[str]:
        """The leaders of these flights are alive. Returns those that lead no longer."""
        now = self._clock()
        lost = [flight for flight in flights if not self._flights.renew(flight, now)]
        self._lapse(now)
        return lost

    def say(self, said: list[tuple[str, int, list[bytes]]]) -> None:
        """Pieces of streams, for those who follow: (flight, number of the first, pieces) of each.

        Safe to repeat.
        """
        now = self._clock()
        for flight, start, pieces in said:
            if self._flights.say(flight, start, pieces, now):
                self._hall.tell(flight)
        self._lapse(now)

    async def hear(self, wants: list[tuple[str, int]], timeout_s: float) -> list[News]:
        """Waits for news of any of these flights, each with how many pieces of it are known.

        One News per flight, in their order; all are empty after `timeout_s` seconds.
        """
        deadline = self._clock() + timeout_s
        while True:
            now = self._clock()
            self._lapse(now)
            news = [self._flights.news(flight, seen) for flight, seen in wants]
            if any(news) or now >= deadline:
                return news
            if len(self._hall) >= FOLLOWS_MAX:
                return [News(outcome=Gone())] * len(wants)
            silent_in_s = min(self._flights.silent_in_s(flight, now) for flight, _ in wants)
            await self._hall.wait((name for name, _ in wants), min(deadline - now, silent_in_s))

    async def followed(self, leader: str, known: list[str], timeout_s: float) -> list[str]:
        """The streams of this leader that are followed piece by piece.

        Waits until there is one that is not `known`, for `timeout_s` seconds at the most.
        """
        deadline = self._clock() + timeout_s
        while True:
            now = self._clock()
            heard = self._flights.heard(leader)
            if now >= deadline or not set(heard).issubset(known):
                return heard
            await self._hall.wait([leader], deadline - now)

    def stats(self) -> dict[str, Any]:
        return {
            "entries": len(self._entries),
            "bytes": self._entries.bytes,
            "max_bytes": self._entries.bytes_max,
            "evicted": self._entries.evicted,
            "flights": len(self._flights),
            "followers": len(self._hall),
            "redis": self._tier_stats(),
            **self._counts,
        }

    async def close(self) -> None:
        """Lets every follower go, and Redis."""
        self._flights = Flights()
        self._hall.tell_all()
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
            self._following = None
        self._move(None)
        if self._closing:
            await asyncio.wait(self._closing)

    # ------------------------------------------------------------------------- the second tier

    def _wake(self) -> None:
        """Begin to follow where the second tier is; a constructor has no event loop yet."""
        if self._places is not None and self._following is None:
            following = asyncio.get_running_loop().create_task(self._places.follow(self._move))
            self._following = following

    def _move(self, place: Place | None, problem: str | None = None) -> None:
        """The second tier is there from now on, or nowhere."""
        self._tier_problem = problem
        if place == self._place:
            return
        if self._tier is not None:
            closing = asyncio.get_running_loop().create_task(self._tier.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._place = place
        self._tier = None if place is None else RedisTier(place, self._clock)
        if self._tier is not None:
            self._tier.start()

    def _tier_stats(self) -> dict[str, Any] | None:
        """None where none is configured; otherwise with its `state`, healthy or degraded."""
        if self._tier is not None:
            return self._tier.stats()
        problem = self._tier_problem
        return None if problem is None else {"state": "degraded", "reason": problem}

    # ------------------------------------------------------------------------------ the flights

    def _end(self, flight: str, outcome: Outcome, now: float) -> None:
        if self._flights.land(flight, outcome, now):
            self._hall.tell(flight)

    def _lapse(self, now: float) -> None:
        for flight in self._flights.lapse(now):
            self._counts["leaders_lost"] += 1
            self._hall.tell(flight)


def _outcome(landing: Landing) -> Outcome:
    if landing.value is not None:
        return Landed(landing.value)
    return Gone() if landing.error is None else Failed(landing.error)
