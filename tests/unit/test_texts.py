"""Texts that are sent without asking are stored like others, sweep or no sweep."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from actors.cache.desk import CacheDesk, Hit, Lead
from actors.cache.owner import Cache
from actors.cache.policy import TRAVEL_S, Scope
from actors.ref import InlineRef
from forebay import texts as texts_module
from forebay.codec import Answer, unpack_vector
from forebay.errors import InvalidRequest
from forebay.texts import Texts
from tests.support.fake_time import settle

ACME = Scope("acme")
KEYS = [b"a" * 40, b"b" * 40]


class Bench:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.cache = Cache(1_000_000, clock=self.clock, random=lambda: 0.0)
        self.desk = CacheDesk([InlineRef("cache", self.cache)], "d", clock=self.clock)

    def clock(self) -> float:
        return self.now_s

    async def texts(self) -> Texts:
        texts = Texts(self.desk, ACME, ["a", "b"], KEYS)
        await texts.look_up(read=True, join=True, patience_s=60)
        return texts

    async def sizes(self) -> list[int | None]:
        """How long the vectors are that are stored."""
        await settle()
        found = await self.desk.ask(KEYS, ACME, read=True, join=False, patience_s=60)
        hits = [one if isinstance(one, Hit) else None for one in found]
        return [None if one is None else unpack_vector(one.value).array.size for one in hits]


def answer(*sizes: int) -> Answer:
    """One vector of each size; a list of one size is what a provider gives."""
    array = np.ones((len(sizes), sizes[0]), dtype=np.float32)
    return Answer(body={}, usage={"prompt_tokens": 2}, cost_nano=None, model="e", array=array)


async def test_what_is_sent_once_more_for_its_length_is_stored_in_spite_of_an_old_sweep() -> None:
    bench = Bench()
    await bench.desk.invalidate(ACME, None, None)
    bench.now_s += TRAVEL_S + 1
    known = Texts(bench.desk, ACME, ["a"], KEYS[:1])
    await known.look_up(read=True, join=True, patience_s=60)
    known.take(answer(3), 600.0)
    await settle()
    texts = await bench.texts()
    texts.take(answer(4), 600.0)
    assert not texts.even(), "the model has changed"
    assert texts.to_send == ["a", "b"]
    texts.take(answer(4, 4), 600.0)
    assert await bench.sizes() == [4, 4]


async def test_what_is_sent_alone_since_its_leaders_are_lost_is_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(texts_module, "ROUNDS_MAX", 1)
    bench = Bench()
    await bench.desk.invalidate(ACME, None, None)
    bench.now_s += TRAVEL_S + 1
    leads = await bench.desk.ask(KEYS, ACME, read=True, join=True, patience_s=60)
    texts = await bench.texts()
    waiting = asyncio.create_task(texts.wait(read=True, join=True, patience_s=60))
    await settle()
    for lead in leads:
        assert isinstance(lead, Lead)
        bench.desk.land(lead)
    await waiting
    assert texts.to_send == ["a", "b"]
    texts.take(answer(4, 4), 600.0)
    assert await bench.sizes() == [4, 4]


async def test_a_text_that_fails_alone_is_named_wherever_it_stands_and_not_stored() -> None:
    bench = Bench()
    texts = Texts(bench.desk, ACME, ["b", "a", "b"], [KEYS[1], KEYS[0], KEYS[1]])
    await texts.look_up(read=True, join=True, patience_s=60)
    assert texts.to_send == ["b", "a"]
    refused = InvalidRequest("'$.input' is invalid")
    texts.take(answer(4, 4), 600.0, failed=[(0, refused)])

    assert texts.even()
    assert texts.failed == ((0, refused), (2, refused))
    told = texts.answer()
    assert told.array is not None
    assert told.array.tolist() == [[0.0] * 4, [1.0] * 4, [0.0] * 4]
    assert (told.usage or {})["prompt_tokens"] == 2
    assert await bench.sizes() == [4, None]
