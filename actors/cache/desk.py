"""The cache's desk: one channel to each of the cache's owners, which share the keys among them."""

from __future__ import annotations

import asyncio
import random as stdlib_random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from hashlib import blake2b
from typing import Any

from actors.cache.channel import Channel
from actors.cache.following import FlightFailed, Joined, Listening
from actors.cache.policy import Failed, Follow, Gone, Hit, Landed, Lead, Outcome, Scope, leader_of
from actors.ref import Clock, OwnerRef

__all__ = ["CacheDesk", "FlightFailed", "Follow", "Hit", "Joined", "Lead", "Listening"]

CARRIED_MAX = 1000
"""Most streams that go on without their own clients, at the provider's own pace."""
ROUNDS_MAX = 16
"""How often a follower asks again when its leader is lost, before it computes alone."""


def home(key: bytes, shards: int) -> int:
    """The number of the owner that has this key, by rendezvous hash (Thaler, Ravishankar, 1996)."""
    if shards == 1:
        return 0
    return max(range(shards), key=lambda shard: _weight(shard, key))


def _weight(shard: int, key: bytes) -> bytes:
    return blake2b(key, digest_size=8, salt=shard.to_bytes(2, "big")).digest()


class CacheDesk:
    """Owns a channel to each owner, and the streams that are carried on for others.

    Each key has one owner, so one that is slow or dead holds up its own keys only. Bounded by its
    channels and CARRIED_MAX.

    Failure behaviour: fails open; see `Channel`.
    """

    def __init__(
        self,
        refs: Sequence[OwnerRef],
        holder: str,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
        random: Callable[[], float] = stdlib_random.random,
    ) -> None:
        """`refs` are all owners, in the order that every desk has them in."""
        # Names that no other desk has, not even one of this process. They end with the owner's
        # number, and flights begin with them.
        name = f"{holder}-{nonce or secrets.token_hex(8)}"
        self._clock = clock
        self._channels = [
            Channel(ref, f"{name}@{shard}", clock, pause, random) for shard, ref in enumerate(refs)
        ]
        self._carried: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Finds the owners, waiting two seconds for them at the most."""
        await asyncio.gather(*(channel.start() for channel in self._channels))

    async def close(self) -> None:
        """Lands what was promised, gives back what was lent, as far as owners answer, and stops."""
        if self._carried:
            await asyncio.sleep(0)  # one that has not begun yet would settle nothing
        for task in self._carried:
            task.cancel()
        if self._carried:
            await asyncio.wait(self._carried)
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def lookup(
        self, key: bytes, scope: Scope, *, read: bool, join: bool, patience_s: float
    ) -> Hit | Lead | Joined:
        """The stored answer, the answer of a call that is running, or the duty to compute it.

        Whoever gets a Lead must `land` it, in `finally`, with or without a result; within
        `patience_s` seconds, after which others stop waiting. A follower waits for that long too,
        then leads alone. Raises FlightFailed with the leader's error.
        """
        if not (read or join):
            return self.alone(key, scope)
        channel = self._home(key)
        deadline = self._clock() + patience_s
        for _ in range(ROUNDS_MAX):
            asked = channel.ask([key], scope, read, join, patience_s, False)
            (answer,) = asked if isinstance(asked, list) else await channel.answers(asked)
            if not isinstance(answer, Follow):
                return answer
            joined = await self.follow(answer.flight, deadline - self._clock())
            if joined is not None:
                return joined
            if self._clock() >= deadline:
                break
        return self.alone(key, scope)

    def alone(self, key: bytes, scope: Scope) -> Lead:
        """The duty to compute it, with nobody asked, and nobody who waits."""
        return Lead(key, scope, None, self._clock())

    def near(self, key: bytes, scope: Scope) -> Hit | None:
        """The stored answer, where it is known here without asking."""
        return self._home(key).near(key, scope)

    async def ask(
        self,
        keys: Sequence[bytes],
        scope: Scope,
        *,
        read: bool,
        join: bool,
        patience_s: float,
        stream: bool = False,
    ) -> list[Hit | Lead | Follow]:
        """What is known of each key, now: `lookup` without the waiting.

        Each Lead is a duty as it is there. Land them before following anybody: two who ask for the
        same keys in another order would wait for each other otherwise.
        """
        shards = len(self._channels)
        if shards == 1:
            return await _ask(self._channels[0], keys, scope, read, join, patience_s, stream)
        places: list[list[int]] = [[] for _ in range(shards)]
        for place, key in enumerate(keys):
            places[home(key, shards)].append(place)
        asked = [
            asyncio.ensure_future(
                _ask(channel, [keys[p] for p in own], scope, read, join, patience_s, stream)
            )
            for channel, own in zip(self._channels, places, strict=True)
            if own
        ]
        try:
            parts = await asyncio.gather(*asked)
        except asyncio.CancelledError:
            self._decline(asked)
            raise
        found: dict[int, Hit | Lead | Follow] = {}
        for own, part in zip(filter(None, places), parts, strict=True):
            found.update(zip(own, part, strict=True))
        return [found[place] for place in range(len(keys))]

    async def follow(self, flight: str, patience_s: float) -> Joined | None:
        """The answer of somebody else's call; None when it is lost, or after `patience_s` seconds.

        Raises FlightFailed with the leader's error.
        """
        (joined,) = await self.follow_all([flight], patience_s)
        return joined

    async def follow_all(self, flights: Sequence[str], patience_s: float) -> list[Joined | None]:
        """`follow` for several, in their order; waits for all of them.

        Raises FlightFailed with the first failure.
        """
        if len(flights) == 1:
            outcomes = [await self._follow(flights[0], patience_s)]
        else:
            work = (self._follow(flight, patience_s) for flight in flights)
            outcomes = await asyncio.gather(*work)
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                self._counts["flights_failed"] += 1
                raise FlightFailed(outcome.error)
        joined = [Joined(one.value) if isinstance(one, Landed) else None for one in outcomes]
        self._counts["joined"] += sum(one is not None for one in joined)
        return joined

    def listen(self, flight: str) -> Listening:
        """Follow a flight piece by piece, from its beginning."""
        shard = int(leader_of(flight).rpartition("@")[2])
        return self._channels[shard].listen(flight)

    def say(self, lead: Lead, piece: bytes) -> None:
        """The next piece of a stream that we lead; it goes out if somebody follows."""
        if lead.flight is not None:
            self._home(lead.key).say(lead.flight, piece)

    def is_followed(self, lead: Lead) -> bool:
        """Whether somebody follows this stream piece by piece, as far as is known here."""
        return lead.flight is not None and self._home(lead.key).is_followed(lead.flight)

    def on_followed(self, lead: Lead, callback: Callable[[], None]) -> None:
        """Call `callback` once, when somebody begins to follow this stream: now, if so already.

        What was said until then is told to other processes with the next `say`, and not before: a
        leader that leaves in between has told them nothing yet.
        """
        if lead.flight is not None:
            self._home(lead.key).on_followed(lead.flight, callback)

    def carry(self, work: Coroutine[Any, Any, None]) -> bool:
        """Go on with a stream whatever its own client does: read it for its followers, or have it
        judged when it is over. False where no more fit."""
        if len(self._carried) >= CARRIED_MAX:
            work.close()
            return False
        task = asyncio.get_running_loop().create_task(work)
        self._carried.add(task)
        task.add_done_callback(self._carried.discard)
        self._counts["carried"] += 1
        return True

    def land(
        self,
        lead: Lead,
        value: bytes | None = None,
        error: bytes | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """Ends what was led: a value for those who wait, stored too if it has a `ttl_s` (seconds);
        or an error for those who wait; or neither, and one of them leads. Lands once."""
        self._home(lead.key).land(lead, value, error, ttl_s)

    async def invalidate(self, scope: Scope | None, model: str | None, key: bytes | None) -> int:
        """Forget what is stored of a scope, of a model, under a key, or all of these; None is any.

        Returns how many entries that were in memory: the owners', and that of processes that hold a
        lease and say so before it is over. Nothing of it
        is told any more when this returns, but by other processes that were told it less than a
        second ago. Raises OwnerUnavailable; some owners may have forgotten it then.
        """
        channels = self._channels if key is None else [self._home(key)]
        work = (channel.invalidate(scope, model, key) for channel in channels)
        return sum(await asyncio.gather(*work))

    def held(self) -> tuple[int, int, int]:
        """What this process keeps on leases, in the owners' place: entries, their bytes, and how
        many gave way."""
        parts = [channel.held() for channel in self._channels]
        entries, taken, evicted = (sum(numbers) for numbers in zip(*parts, strict=True))
        return entries, taken, evicted

    def stats(self) -> dict[str, Any]:
        """The sums over all owners; `away` when any is, `leased` when all key space is ours."""
        parts = [channel.stats() for channel in self._channels]
        total: Counter[str] = Counter(self._counts)
        for part in parts:
            total.update({name: n for name, n in part.items() if type(n) is int})
        errors = [part["last_error"] for part in parts if part["last_error"] is not None]
        return {
            **total,
            "away": any(part["away"] for part in parts),
            "leased": all(part["leased"] for part in parts),
            "last_error": errors[0] if errors else None,
        }

    def _home(self, key: bytes) -> Channel:
        return self._channels[home(key, len(self._channels))]

    async def _follow(self, flight: str, patience_s: float) -> Outcome:
        listening = self.listen(flight)
        deadline = self._clock() + patience_s
        try:
            while True:
                news = await listening.more(deadline - self._clock())
                if isinstance(news, Joined):
                    return Landed(news.value)
                if news is None:
                    return Gone()
        except FlightFailed as failure:
            return Failed(failure.error)
        finally:
            listening.close()

    def _decline(self, asked: Sequence[asyncio.Future[list[Hit | Lead | Follow]]]) -> None:
        """The caller has left: what was answered already is landed, the rest lands itself."""
        for part in asked:
            if part.done() and not part.cancelled() and part.exception() is None:
                for answer in part.result():
                    if isinstance(answer, Lead):
                        self.land(answer)


async def _ask(
    channel: Channel,
    keys: Sequence[bytes],
    scope: Scope,
    read: bool,
    join: bool,
    patience_s: float,
    stream: bool,
) -> list[Hit | Lead | Follow]:
    asked = channel.ask(keys, scope, read, join, patience_s, stream)
    return asked if isinstance(asked, list) else await channel.answers(asked)
