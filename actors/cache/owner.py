"""The cache's owner: stored answers, and who is computing which one right now.

Answers are in memory, and behind that in Redis where one is configured (`redis_tier.py`).
"""

from __future__ import annotations

import asyncio
import logging
import random as stdlib_random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from actors.cache.hall import Hall
from actors.cache.lease import (
    ALONE_S,
    MORE_BYTES,
    RECALL_S,
    SWEEPS_MAX,
    Grant,
    Kept,
    Lease,
    Told,
)
from actors.cache.policy import (
    TRAVEL_S,
    Answer,
    Ask,
    Entries,
    Flights,
    Follow,
    Gone,
    Hit,
    Landed,
    Landing,
    Lead,
    Miss,
    News,
    Outcome,
    Scope,
    Searching,
    Sweep,
    Swept,
    jittered,
    leader_of,
)
from actors.cache.redis_tier import Found, Place, Places, RedisTier
from actors.cache.tallies import NOW, Tallies, Tally
from actors.ref import Clock

BYTES_MAX = 256 * 1024 * 1024
FOLLOWS_MAX = 8000
"""Most held `follow` messages; who comes beyond that is told Gone."""
FREED = "lease over"
SWEPT = "lease swept"
RETRY_S = 0.5
"""How often a desk that waits for the lease is looked at, where only others' flights forbid it."""

log = logging.getLogger(__name__)


class Cache:
    """Owns the entries of every scope, in memory, and the flights of every process.

    Bounded by `max_bytes` of entries (see `Entries`), the bounds of `Flights` and of `RedisTier`,
    and FOLLOWS_MAX held messages.

    Failure behaviour: a restarted owner knows nothing but where its Redis is. Entries are found
    there or computed anew, leaders on their way land as if nobody had waited, and followers ask
    again, so that one of them leads. A leader that is not heard of for its `silence_s` is lost:
    exactly one of its followers leads next. An invalidation is forgotten with its owner: what was
    under way then may land, and what had not been deleted from Redis yet stays there. A Redis that
    is slow or away costs a miss the tier's budget at most, and everybody else nothing.
    """

    PROTOCOL = 4

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
        self._swept = Swept()
        self._hall = Hall()
        self._hearers: Counter[str] = Counter()
        self._lease = Lease(clock())
        self._read_s = float("-inf")
        self._keeper: tuple[str, int] | None = None  # whose entries may still come
        self._sweeps: dict[int, Sweep] = {}  # those that the holder has not done yet
        self._dropped: dict[int, int] = {}  # what it has dropped for those it has done
        self._sweeps_begun = 0
        self._counts: Counter[str] = Counter()
        self._tallies = Tallies()
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

        Hit, Follow, and Lead or Miss where there is nothing more to ask. Where there is, Searching,
        and `search` tells the rest. With a second tier the flight is the asker's already; while
        somebody has the lease, it is recalled.
        """
        self._wake()
        now = self._clock()
        self._lapse(now)
        if asks and not self._is_free(asks, now):
            self._counts["barred"] += len(asks)
            return [Miss() if self._lease.unanswered else Searching() for _ in asks]
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
        if not await self._freed():
            return [Miss()] * len(asks)
        begun_s = self._clock()
        found: list[Found | None] = [None] * len(asks)
        if self._tier is not None:
            found = await self._tier.find([(ask.scope, ask.key) for ask in asks])
        now = self._clock()
        self._lapse(now)
        answers: list[Answer] = []
        for ask, one in zip(asks, found, strict=True):
            if one is None or self._swept.forbids(ask.key, ask.scope, begun_s, now):
                answers.append(self._look_up(ask, now))
                continue
            self._entries.put(ask.key, ask.scope, one.value, one.ttl_s, now)
            self._end(ask.flight, Landed(one.value), now)
            answers.append(Hit(one.value, 0.0, one.ttl_s))
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
        those who would have waited for it are elsewhere. What was begun before it was invalidated
        is not stored.
        """
        now = self._clock()
        for landing in landings:
            begun_s = self._begun_s(landing, now)
            if landing.flight is not None:
                self._end(landing.flight, landing.outcome, now)
            try:
                self._store(landing, begun_s, now)
            except Exception:
                # One that makes no sense must not look like an owner that is away.
                self._counts["refused"] += 1
                log.exception("an answer cannot be stored")
        self._lapse(now)
        if self._lease.holder(now) is not None:
            self._recall()  # the holder does not know of these

    def _store(self, landing: Landing, begun_s: float, now: float) -> None:
        if landing.value is None or landing.ttl_s is None:
            return
        if self._swept.forbids(landing.key, landing.scope, begun_s, now):
            self._counts["invalidated_under_way"] += 1
            return
        ttl_s = jittered(landing.ttl_s, self._random())
        stored = self._entries.put(landing.key, landing.scope, landing.value, ttl_s, now)
        self._counts["stored" if stored else "not_stored"] += 1
        if self._tier is not None:
            self._tier.store(landing.scope, landing.key, landing.value, ttl_s)

    def _begun_s(self, landing: Landing, now: float) -> float:
        """When its call began, at the latest sure time before; on the owner's clock."""
        begun_s = self._flights.begun_s(landing.flight)
        if begun_s is not None:
            return begun_s
        return float("-inf") if landing.age_s is None else now - landing.age_s - TRAVEL_S

    async def invalidate(
        self, scope: Scope | None = None, model: str | None = None, key: bytes | None = None
    ) -> int:
        """Forgets the answers of a scope, of a model, under a key, or all of these; None is any.

        `model` and `key` are what `policy.key` was given and returned. Returns how many answers
        that were in memory: here, and at the lease's holder as far as it says so in time. No
        look-up from now on is served by them, nor by what is under way; who waits for a call
        already gets its answer, which is not stored. Desks that have just been served may serve it
        again for one second. What is in Redis is deleted in the background, and not read meanwhile.
        Others are answered while this goes on. Safe to repeat.
        """
        self._wake()
        sweep = Sweep.of(scope, model, key)
        self._swept.add(sweep, self._clock())
        self._flights.part(sweep)
        steps = self._entries.sweep(sweep)
        holder = self._have_swept(sweep)
        number = self._sweeps_begun
        if self._tier is not None:
            self._tier.sweep(sweep)
        dropped = 0
        try:
            for part in steps:
                dropped += part
                await asyncio.sleep(0)
            if holder is not None:
                await self._holder_has_swept(holder, number)
        finally:
            dropped += sum(steps) + self._dropped.pop(number, 0)
            self._counts["invalidated"] += dropped
        return dropped

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

    async def hear(
        self, wants: list[tuple[str, int]], timeout_s: float, desk: str = ""
    ) -> list[News]:
        """Waits for news of any of these flights, each with how many pieces of it are known.

        One News per flight, in their order; all are empty after `timeout_s` seconds.
        """
        self._lease.heard(desk, self._clock())
        self._hearers[desk] += 1
        try:
            return await self._hear(wants, timeout_s)
        finally:
            self._hearers[desk] -= 1
            if not self._hearers[desk]:
                del self._hearers[desk]

    async def _hear(self, wants: list[tuple[str, int]], timeout_s: float) -> list[News]:
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

    def tally(self, desk: str, number: int, tally: Tally) -> dict[str, tuple[int, ...]]:
        """All that a process has counted since it began; the sums of all. Safe to repeat."""
        now = self._clock()
        self._tallies.take(desk, number, tally, now)
        return self._tallies.sums(now)

    def stats(self) -> dict[str, Any]:
        return {
            "entries": len(self._entries),
            "bytes": self._entries.bytes,
            "max_bytes": self._entries.bytes_max,
            "evicted": self._entries.evicted,
            "flights": len(self._flights),
            "followers": len(self._hall),
            "leased": self._lease.holder(self._clock()) is not None,
            "redis": self._tier_stats(),
            **self._held(),
            **self._counts,
        }

    def _held(self) -> dict[str, int]:
        """What desks keep on leases, as they tell it: in no owner's memory, but of the cache."""
        numbers = self._tallies.sums(self._clock()).get(f"{NOW}cache", (0, 0, 0))
        names = ("held_entries", "held_bytes", "held_evicted")
        return dict(zip(names, numbers, strict=True))

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
        self._recall()
        unswept = [] if self._tier is None else self._tier.unswept
        self._tier = None if place is None else RedisTier(place, self._clock)
        if self._tier is not None:
            for sweep in unswept:  # it may be the same Redis by another URL
                self._tier.sweep(sweep)
            self._tier.start()

    def _tier_stats(self) -> dict[str, Any] | None:
        """None where none is configured; otherwise with its `state`, healthy or degraded."""
        if self._tier is not None:
            return self._tier.stats()
        problem = self._tier_problem
        return None if problem is None else {"state": "degraded", "reason": problem}

    # -------------------------------------------------------------------------------- the lease

    async def lease(self, desk: str, timeout_s: float) -> bool:
        """Waits until this desk may `take` the key space, for `timeout_s` seconds at the most."""
        deadline = self._clock() + timeout_s
        while True:
            now = self._clock()
            self._lapse(now)
            if self._may_take(desk, now):
                return True
            if now >= deadline or len(self._hall) >= FOLLOWS_MAX:
                return False
            due_in_s = max(RETRY_S, self._lease.due_in_s(desk, now))
            await self._hall.wait([_name(desk)], min(deadline - now, due_in_s))

    def take(self, desk: str, number: int) -> Grant | None:
        """The key space, with the flights of this desk, which are in no message now. Safe to
        repeat."""
        now = self._clock()
        held = self._lease.holder(now) == (desk, number)
        if not held and not (self._may_take(desk, now) and self._lease.take(desk, number, now)):
            return None
        if not held:
            self._sweeps.clear()
            self._dropped.clear()
            self._keeper = None
            self._counts["leases"] += 1
            for flight in self._flights.aloft():
                self._flights.let_go(flight)
        entries = self._entries
        stores, reads = len(entries) > 0, self._place is None
        swept = self._swept.recent(now)
        return Grant(entries.bytes_max, entries.scope_share, stores, reads, swept)

    async def hold(
        self, desk: str, number: int, swept: dict[int, int], timeout_s: float
    ) -> Told | None:
        """The holder is alive and has made the sweeps `swept`, each of which has dropped so many
        entries. Held for `timeout_s` seconds, or until there is something to tell. None when the
        lease is over. Safe to repeat."""
        now = self._clock()
        deadline = now + timeout_s
        if not self._lease.renew(desk, number, now):
            return None
        self._take_off(swept)
        while self._lease.holder(now) == (desk, number):
            recalled = self._lease.recalled
            if recalled or self._sweeps or now >= deadline:
                return Told(recalled, tuple(self._sweeps.items()))
            await self._hall.wait([_name(desk)], deadline - now)
            now = self._clock()
        return None

    def find(
        self, desk: str, number: int, places: list[tuple[Scope, bytes]]
    ) -> tuple[list[Hit | None], list[Kept], bool]:
        """What is stored here for the holder, in the order of `places`; a little of the rest; and
        whether there is more. It is the holder's from now on."""
        now = self._clock()
        found = [self._entries.get(key, scope, now) for scope, key in places]
        if self._lease.holder(now) != (desk, number):
            return found, [], True
        for scope, key in places:
            self._entries.remove(key, scope)
        more = self._entries.pop_some(MORE_BYTES, now)
        return found, more, len(self._entries) > 0

    def give_back(
        self, desk: str, number: int, led: list[tuple[Ask, float]], swept: dict[int, int]
    ) -> bool:
        """The holder has stopped to answer, and has made the sweeps `swept`, as in `hold`. These
        flights it leads, each with the seconds since it began. Safe to repeat.

        Whether its entries are welcome.
        """
        now = self._clock()
        ended = self._lease.end(desk, number)
        if ended:
            self._take_off(swept)
        if self._lease.holder(now) is None:  # who has it now is not told of others
            for ask, age_s in led:
                if not self._is_swept(ask.key, ask.scope, age_s, now):
                    self._flights.join(ask, now)
        if ended or not self._sweeps_begun:
            self._keeper = None if self._sweeps else (desk, number)
        self._hall.tell(FREED)
        self._hall.tell(SWEPT)
        return self._keeper == (desk, number)

    def keep(self, desk: str, number: int, entries: list[Kept]) -> bool:
        """Entries of a holder, or of one that was. The younger one stays, unless it may be from
        before a sweep. Safe to repeat.

        False when they are not wanted any more.
        """
        now = self._clock()
        holder = self._lease.holder(now)
        if (desk, number) not in (holder, self._keeper if holder is None else None):
            return False
        for key, scope, hit in entries:
            known = self._entries.get(key, scope, now)
            if known is not None and known.age_s <= hit.age_s:
                continue
            if self._is_swept(key, scope, hit.age_s, now):
                self._entries.remove(key, scope)  # the older one
            else:
                self._entries.put(key, scope, hit.value, hit.left_s, now, age_s=hit.age_s)
        return True

    def _is_swept(self, key: bytes, scope: Scope, age_s: float, now: float) -> bool:
        """Whether what was so old when it was sent to us may be from before a sweep."""
        return self._swept.forbids(key, scope, now - age_s - TRAVEL_S, now)

    def _have_swept(self, sweep: Sweep) -> tuple[str, int] | None:
        """Who holds the lease is to make this sweep too, under the number `_sweeps_begun`."""
        self._sweeps_begun += 1
        self._keeper = None
        holder = self._lease.holder(self._clock())
        if holder is None:
            return None
        if len(self._sweeps) >= SWEEPS_MAX:
            self._sweeps.clear()
            self._recall()  # who waits for the others waits for the end of the lease
            sweep = Sweep()
        self._sweeps[self._sweeps_begun] = sweep
        self._hall.tell(_name(holder[0]))
        return holder

    async def _holder_has_swept(self, holder: tuple[str, int], number: int) -> None:
        """Waits until this holder has made the sweep, or holds the lease no longer."""
        now = self._clock()
        while self._lease.holder(now) == holder and (
            self._lease.recalled or number in self._sweeps
        ):
            await self._hall.wait([SWEPT], self._lease.left_s(now))
            now = self._clock()

    def _take_off(self, swept: dict[int, int]) -> None:
        """The holder has made these sweeps."""
        for number, dropped in swept.items():
            if self._sweeps.pop(number, None) is not None:
                self._dropped[number] = dropped
        if swept:
            self._hall.tell(SWEPT)

    def _is_free(self, asks: list[Ask], now: float) -> bool:
        """Whether these may be answered now. If not, the key space is recalled."""
        self._lease.heard(leader_of(asks[0].flight), now)
        if any(ask.read for ask in asks):
            self._read_s = now
        if self._lease.holder(now) is None:
            return True
        self._recall()
        return False

    async def _freed(self) -> bool:
        """Whether the key space is nobody's, after waiting RECALL_S for its holder at the most."""
        now = self._clock()
        deadline = now + RECALL_S
        while (left_s := self._lease.left_s(now)) > 0:
            self._recall()
            if now >= deadline:
                self._lease.unanswered = True
            if self._lease.unanswered or len(self._hall) >= FOLLOWS_MAX:
                return False
            await self._hall.wait([FREED], min(left_s, deadline - now))
            now = self._clock()
        return True

    def _recall(self) -> None:
        holder = self._lease.holder(self._clock())
        if holder is not None and not self._lease.recalled:
            self._lease.recalled = True
            self._counts["recalls"] += 1
            self._hall.tell(_name(holder[0]))

    def _may_take(self, desk: str, now: float) -> bool:
        """Whether nobody else is there, by what is known: no ask, no flight, no ear."""
        if self._lease.due_in_s(desk, now) > 0:
            return False
        if self._place is not None and now - self._read_s < ALONE_S:
            return False  # the second tier is here
        if any(hearer != desk for hearer in self._hearers):
            return False
        return all(leader_of(flight) == desk for flight in self._flights.aloft())

    # ------------------------------------------------------------------------------ the flights

    def _end(self, flight: str, outcome: Outcome, now: float) -> None:
        if self._flights.land(flight, outcome, now):
            self._hall.tell(flight)

    def _lapse(self, now: float) -> None:
        for flight in self._flights.lapse(now):
            self._counts["leaders_lost"] += 1
            self._hall.tell(flight)


def _name(desk: str) -> str:
    """What a desk's message about the lease waits for."""
    return f"lease {desk}"
