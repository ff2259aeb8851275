"""Desks and owners of the cache, and a network between them that is none too good.

Time is virtual: the loop jumps to its next timer, so that seconds of leases pass in milliseconds.
"""

from __future__ import annotations

import asyncio
import pickle
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from actors.cache.desk import CacheDesk, Follow, Hit, Lead
from actors.cache.lease import LEASE_S, MARGIN_S
from actors.cache.owner import Cache
from actors.cache.policy import Scope
from actors.ref import OwnerUnavailable

ACME = Scope("acme")
KEYS = [bytes([n]) * 40 for n in range(4)]
KEY = KEYS[0]
PATIENCE_S = 20.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing sleeps: when nothing is ready, it is the time of the next timer."""

    now_s = 100.0

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            assert self._scheduled, "everybody waits for ever"  # type: ignore[attr-defined]
            self.now_s = max(self.now_s, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def virtually(session: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(session())  # type: ignore[arg-type]


class World:
    """Owners, desks, and what happens to the messages between them."""

    def __init__(self, shards: int = 1, seed: int = 0, *, wild: bool = False) -> None:
        self.chance = random.Random(seed)
        self.wild = wild
        self.owners = [self._owner() for _ in range(shards)]
        self.desks: dict[str, CacheDesk] = {}
        self.dead: set[str] = set()
        self.frozen: dict[str, asyncio.Event] = {}
        self.cut: set[str] = set()
        self.sent: Counter[str] = Counter()
        self.born_s = [self.now_s] * shards
        self.broken: str | None = None
        self.late: dict[str, float] = {}  # how much longer an answer to such a message takes
        self.lost: set[str] = set()  # messages whose answers are
        self.unheard: Callable[[str, tuple[Any, ...]], bool] = lambda method, args: False

    @property
    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def clock(self) -> float:
        return self.now_s

    def _owner(self) -> Cache:
        return Cache(1_000_000, clock=self.clock, random=self.chance.random)

    async def desk(self, name: str) -> CacheDesk:
        lines = [Line(self, shard, name) for shard in range(len(self.owners))]

        async def pause(seconds: float) -> None:
            await asyncio.sleep(seconds)
            await self.thawed(name)

        desk = CacheDesk(lines, name, self.clock, pause, random=self.chance.random)
        self.desks[name] = desk
        await desk.start()
        return desk

    async def leased(self, name: str) -> CacheDesk:
        """A desk that is alone for long enough."""
        wild, self.wild = self.wild, False
        desk = await self.desk(name)
        for number in range(20):
            desk.land(await look(desk, bytes([100 + number]) * 40, read=False), b"once")
        for _ in range(100):
            if desk.stats()["leased"]:
                self.wild = wild
                return desk
            await asyncio.sleep(0.1)
        raise AssertionError("no lease")

    def holders(self, shard: int) -> list[str]:
        """Who would answer by itself now, dead ones aside."""
        tenures = {name: desk._channels[shard]._holding.tenure for name, desk in self.desks.items()}
        return [
            name
            for name, tenure in tenures.items()
            if name not in self.dead and tenure is not None and self.now_s < tenure.until_s
        ]

    async def thawed(self, name: str) -> None:
        """A frozen process does nothing: it does not even notice that time is up."""
        while name in self.frozen:
            await self.frozen[name].wait()

    def note_answers(self, shard: int, desk: str, answers: list[Any]) -> None:
        """Nobody is told anything while another one would answer by itself, but by an owner that
        is so new that it has not heard of it."""
        if self.now_s - self.born_s[shard] > LEASE_S + MARGIN_S:
            told = any(isinstance(answer, (Hit, Lead, Follow)) for answer in answers)
            if told and set(self.holders(shard)) - {desk}:
                self.broken = f"{desk} was answered while another held the lease"

    def thaw(self, name: str) -> None:
        self.frozen.pop(name).set()

    def restart(self, shard: int) -> None:
        self.owners[shard] = self._owner()
        self.born_s[shard] = self.now_s

    async def close(self) -> None:
        self.wild = False
        for name in list(self.frozen):
            self.thaw(name)
        for name, desk in self.desks.items():
            if name not in self.dead:
                await desk.close()


class Line:
    def __init__(self, world: World, shard: int, desk: str) -> None:
        self.name = f"cache-{shard}"
        self.sent: Counter[str] = Counter()
        self._world = world
        self._shard = shard
        self._desk = desk

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self._world.sent[method] += 1
        self.sent[method] += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await self._travel(method, args)
        except TimeoutError:
            await self._world.thawed(self._desk)
            raise OwnerUnavailable(self.name, "no answer in time") from None

    async def _travel(self, method: str, args: tuple[Any, ...]) -> Any:
        world, chance = self._world, self._world.chance
        await self._pass()
        if world.wild and chance.random() < 0.1:
            later = asyncio.ensure_future(self._deliver(method, args, chance.uniform(0, 4)))
            later.add_done_callback(lambda done: done.cancelled() or done.exception())
        if world.unheard(method, args) or (world.wild and chance.random() < 0.05):
            await asyncio.Event().wait()  # it is lost
        answer = await self._deliver(method, args, chance.uniform(0, 0.02))
        if method in world.lost or (world.wild and chance.random() < 0.05):
            await asyncio.Event().wait()  # its answer is
        await asyncio.sleep(world.late.get(method, 0.0))
        await asyncio.sleep(chance.uniform(0, 0.02))
        await self._pass()
        return answer

    async def _pass(self) -> None:
        world = self._world
        await world.thawed(self._desk)
        if self._desk in world.dead or self._desk in world.cut:
            await asyncio.Event().wait()

    async def _deliver(self, method: str, args: tuple[Any, ...], delay_s: float) -> Any:
        """Executed even when nobody waits for it any more, unless its owner dies."""
        await asyncio.sleep(delay_s)
        owner = self._world.owners[self._shard]
        told = pickle.loads(pickle.dumps(args))
        result = getattr(owner, method)(*told)
        if asyncio.iscoroutine(result):
            result = await asyncio.shield(asyncio.ensure_future(result))
        if self._world.owners[self._shard] is not owner:
            raise OwnerUnavailable(self.name, "it died")
        if method in ("lookup", "search"):
            self._world.note_answers(self._shard, self._desk, result)
        return pickle.loads(pickle.dumps(result))


async def look(
    desk: CacheDesk, key: bytes = KEY, *, read: bool = True, patience_s: float = PATIENCE_S
) -> Any:
    return await desk.lookup(key, ACME, read=read, join=True, patience_s=patience_s)
