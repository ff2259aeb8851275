from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from actors.batcher.desk import BatcherDesk
from actors.batcher.owner import Batcher
from actors.batcher.policy import BatcherFull, Lane, Order, Share, Vectors
from actors.ref import InlineRef, OwnerUnavailable

LANE = Lane("d1")


class Line:
    """A line that loses messages ("x") or answers ("a") as its script says."""

    name = "batcher"

    def __init__(self, owner: Batcher, script: str = "") -> None:
        self.sent: Counter[str] = Counter()
        self.arguments: list[tuple[Any, ...]] = []
        self._inner = InlineRef("batcher", owner)
        self._script = list(script)

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self.sent[method] += 1
        self.arguments.append((*args, timeout_s))
        fault = self._script.pop(0) if self._script else "."
        if fault == "x":
            raise OwnerUnavailable(self.name, "it died")
        answer = await self._inner.ask(method, *args)
        if fault == "a":
            raise OwnerUnavailable(self.name, "answer lost")
        return answer


class Calls:
    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        self.sent.append(texts)
        await self.gate.wait()
        return Vectors(np.ones((len(texts), 2), np.float32), len(texts), 1, "m")


async def no_pause(_: float) -> None:
    await asyncio.sleep(0)


async def embed(
    desk: BatcherDesk, texts: list[str], timeout_s: float = 10.0, bulk: bool = False
) -> Share:
    return await desk.embed(LANE, texts, Order(timeout_s=timeout_s, bulk=bulk))


async def test_lists_of_two_desks_share_a_provider_call() -> None:
    calls = Calls()
    owner = Batcher(lambda: calls)
    desks = [BatcherDesk([InlineRef("b", owner)], f"d{n}") for n in range(2)]
    shares = await asyncio.gather(*(embed(desk, ["a"]) for desk in desks))
    assert calls.sent == [["a"]]
    assert sum(share.prompt_tokens for share in shares) == 1
    for desk in desks:
        await desk.close()


async def test_an_owner_that_died_is_asked_again_under_the_same_id() -> None:
    calls = Calls()
    line = Line(Batcher(lambda: calls), "xxa")
    desk = BatcherDesk([line], "d", pause=no_pause)
    assert (await embed(desk, ["a"])).array.shape == (1, 2)
    assert len({arguments[0] for arguments in line.arguments}) == 1
    assert line.sent == {"embed": 4}
    assert calls.sent == [["a"]]
    assert desk.stats()["owner_lost"] == 3


async def test_beyond_the_deadline_the_owner_is_said_to_be_away() -> None:
    now = [0.0]

    async def pause(seconds: float) -> None:
        now[0] += seconds

    line = Line(Batcher(Calls), "x" * 99)
    desk = BatcherDesk([line], "d", clock=lambda: now[0], pause=pause)
    with pytest.raises(OwnerUnavailable):
        await embed(desk, ["a"], timeout_s=1.0)
    assert 0.5 < now[0] < 1.0
    assert desk.stats()["under_way"] == 0


async def test_a_cancelled_call_is_dropped_at_the_owner() -> None:
    calls = Calls()
    calls.gate.clear()
    line = Line(Batcher(lambda: calls))
    desk = BatcherDesk([line], "d")
    task = asyncio.create_task(embed(desk, ["a"]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await desk.close()
    assert line.sent == {"embed": 1, "drop": 1}
    assert line.arguments[0][0] == line.arguments[1][0]


async def test_what_the_owner_raises_is_raised() -> None:
    owner = Batcher(Calls)
    await owner.close()
    with pytest.raises(BatcherFull):
        await embed(BatcherDesk([InlineRef("b", owner)], "d"), ["a"])
    with pytest.raises(ValueError, match="no texts"):
        await embed(BatcherDesk([InlineRef("b", Batcher(Calls))], "d"), [])


async def test_two_desks_of_one_name_never_mint_the_same_id() -> None:
    calls = Calls()
    owner = Batcher(lambda: calls)
    first, second = (BatcherDesk([InlineRef("b", owner)], "same") for _ in range(2))
    await embed(first, ["a"])
    await embed(second, ["b"])
    assert calls.sent == [["a"], ["b"]]


class Full:
    """A Batcher that has no room, so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def embed(self, *_: object) -> Share:
        if self.left:
            self.left -= 1
            raise BatcherFull(2.0)
        return Share(np.ones((1, 2), np.float32), 1, 1, "m", "call-1", 1)


async def test_bulk_waits_for_room_and_interactive_texts_are_told_to_come_back() -> None:
    waited: list[float] = []

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    owner = Full(3)
    desk = BatcherDesk([InlineRef("b", owner)], "d", pause=pause, rng=random.Random(1))
    with pytest.raises(BatcherFull):
        await embed(desk, ["a"])
    assert waited == []
    assert (await embed(desk, ["a"], bulk=True)).model == "m"
    assert len(waited) == 2
    assert all(1.0 <= seconds <= 3.0 for seconds in waited)
    assert desk.stats()["held_back"] == 2


async def test_bulk_waits_no_longer_than_its_deadline() -> None:
    desk = BatcherDesk([InlineRef("b", Full(99))], "d", pause=no_pause)
    with pytest.raises(BatcherFull):
        await embed(desk, ["a"], timeout_s=0.5, bulk=True)
