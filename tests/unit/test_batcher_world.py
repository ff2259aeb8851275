"""Desks and a Batcher that is killed, over a line that loses and doubles, against a provider."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from actors.batcher.desk import BatcherDesk
from actors.batcher.owner import Batcher
from actors.batcher.policy import Caps, Lane, Order, Share, Vectors
from actors.ref import OwnerUnavailable
from tests.support.fake_time import FakeTime, settle

LANES = (Lane("d1"), Lane("d1", (("dimensions", 8),)), Lane("d2"))


class Refused(Exception):
    upstream_status = 400


def vector_of(lane: Lane, text: str) -> list[float]:
    return [float(len(text)), float(sum(map(ord, text + lane.deployment)) % 997)]


class World:
    """One provider, one Batcher at a time, and what each provider call has cost."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.time = FakeTime(settled=lambda: settle(6))
        self.bad = {f"t{n}" for n in self.dice.sample(range(60), 6)}
        self.under_way = self.most = 0
        self.paid = 0  # what the provider has asked for, in tokens
        self.charged = 0  # what callers were told that they owe, and what nobody is left to pay
        self.lost = 0  # of `paid`, what dead owners were asked for
        self.batchers: list[Batcher] = []
        self.asks: set[asyncio.Task[Any]] = set()
        self.born()

    def born(self) -> None:
        self.alive = Batcher(lambda: self.provide, self.time, self.time.sleep, random.Random(1))
        self.batchers.append(self.alive)

    async def kill(self) -> None:
        """Whoever waits for an answer gets none; nobody closes anything."""
        dead = self.alive
        self.born()
        for ask in list(self.asks):
            ask.cancel()
        for task in list(dead._tasks):
            task.cancel()
        for up in dead._ups.values():
            dead._stop_timer(up)
        await settle(6)

    async def provide(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        assert len(texts) == len(set(texts)) <= 7
        owner = self.alive
        tokens = sum(len(text) + 1 for text in texts)
        arrives = False
        try:
            await self.time.sleep(0.05 + 0.01 * self.dice.random())
            arrives = True
        finally:
            if not self.bad.intersection(texts):
                self.paid += tokens
                if not arrives or owner is not self.alive:
                    self.lost += tokens
        if self.bad.intersection(texts):
            raise Refused
        array = np.array([vector_of(lane, text) for text in texts], np.float32)
        return Vectors(array, tokens, 3 * tokens, "m")


class Line:
    """A line to whichever Batcher lives, that loses lists and answers and doubles messages."""

    def __init__(self, world: World, faults: float) -> None:
        self.name = "batcher"
        self.sent: Any = {}
        self._world = world
        self._faults = faults

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        world = self._world
        chance = world.dice.random()
        if chance < self._faults and method == "embed":
            raise OwnerUnavailable(self.name, "message lost")
        owner = world.alive
        if chance > 1 - self._faults:  # doubled: the first one's answer goes nowhere
            self._execute(owner, method, args)
        ask = self._execute(owner, method, args)
        try:
            answer = await asyncio.shield(ask)
        except asyncio.CancelledError:
            if ask.cancelled() and owner is not world.alive:
                raise OwnerUnavailable(self.name, "it died") from None
            raise
        if self._faults < chance < 2 * self._faults:
            raise OwnerUnavailable(self.name, "answer lost")
        return answer

    def _execute(self, owner: Batcher, method: str, args: Any) -> asyncio.Task[Any]:
        async def run() -> Any:
            told = getattr(owner, method)(*args)
            return await told if asyncio.iscoroutine(told) else told

        ask = asyncio.create_task(run())
        self._world.asks.add(ask)
        ask.add_done_callback(self._world.asks.discard)
        ask.add_done_callback(lambda done: done.cancelled() or done.exception())
        return ask


async def session(seed: int, *, kills: int, faults: float, cancels: float) -> World:
    """A hundred callers; checks what each of them gets, and that all money is somebody's."""
    world = World(seed)
    dice = world.dice
    rng = random.Random(seed)
    desks = [
        BatcherDesk([Line(world, faults)], f"p{n}", world.time, world.time.sleep, rng=rng)
        for n in range(4)
    ]
    asked: list[tuple[Lane, list[str], bool, asyncio.Task[Share]]] = []
    killed = set(dice.sample(range(100), kills))
    for number in range(100):
        lane = dice.choice(LANES)
        texts = [f"t{dice.randrange(60)}" for _ in range(dice.choice((1, 1, 1, 4, 12)))]
        order = Order(
            dice.choice("abc"),
            30.0,
            coalesce=dice.random() < 0.9,
            bulk=dice.random() < 0.3,
            caps=Caps(items_max=7),
            partial=dice.random() < 0.3,
            anew=dice.random() < 0.1,
        )
        task = asyncio.create_task(dice.choice(desks).embed(lane, texts, order))
        asked.append((lane, texts, order.partial, task))
        await world.time.advance(dice.choice((0.0, 0.0, 0.005, 0.04)))
        if dice.random() < cancels:
            dice.choice(asked)[3].cancel()
        if number in killed:
            await world.kill()
    await world.time.advance(20.0)
    assert all(task.done() for _, _, _, task in asked)
    charged = 0
    for lane, texts, partial, task in asked:
        if task.cancelled():
            continue
        error = task.exception()
        if error is None:
            share = task.result()
            bad = [place for place, text in enumerate(texts) if text in world.bad]
            assert [place for place, _ in share.failed] == bad
            assert partial or not bad
            wanted = [[0.0, 0.0] if t in world.bad else vector_of(lane, t) for t in texts]
            assert share.array.tolist() == wanted
            charged += share.prompt_tokens
        else:
            assert isinstance(error, Refused), repr(error)
            assert (all if partial else any)(text in world.bad for text in texts)
            paid = getattr(error, "paid", None)
            charged += 0 if paid is None else paid.prompt_tokens
    for desk in desks:
        await desk.close()
    await world.time.advance(20.0)
    stats = world.alive.stats()
    assert stats["texts_queued"] == stats["calls_under_way"] == 0
    assert not any(up.waiting or up.state.in_flight for up in world.alive._ups.values())
    for batcher in world.batchers:
        charged += batcher.stats().get("unclaimed_tokens", 0)
    world.charged = charged
    return world


@pytest.mark.parametrize("seed", range(8))
def test_every_caller_gets_its_own_vectors_and_every_token_is_somebodys(seed: int) -> None:
    world = asyncio.run(session(seed, kills=0, faults=0.0, cancels=0.1))
    assert world.charged == world.paid


@pytest.mark.parametrize("seed", range(8))
def test_lost_and_doubled_messages_fail_nobody_and_are_paid_once(seed: int) -> None:
    world = asyncio.run(session(seed, kills=0, faults=0.1, cancels=0.05))
    assert world.charged == world.paid


@pytest.mark.parametrize("seed", range(8))
def test_a_batcher_killed_twenty_times_fails_nobody(seed: int) -> None:
    """Nobody is charged twice; what dead owners had asked for is all that nobody is charged for."""
    world = asyncio.run(session(seed, kills=20, faults=0.05, cancels=0.05))
    assert len(world.batchers) == 21
    assert world.charged <= world.paid
    assert world.lost > 0
