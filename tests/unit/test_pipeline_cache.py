"""What is known is not asked for again: texts one by one, and streams as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay.call import Call, Result, Stream
from forebay.errors import InvalidRequest, ProviderError, RequestTooLarge, ResponseValidationError
from tests.support.fake_time import settle
from tests.support.house import USAGE, House, open_house, vector_of

Open = Callable[..., Awaitable[House]]
LIMITS = {"tokens_per_minute": 300, "burst_size": 40}
_numbers = iter(range(10**6))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Open]:
    houses: list[House] = []

    async def build(**how: Any) -> House:
        houses.append(await open_house(tmp_path, **how))
        return houses[-1]

    yield build
    for one in houses:
        await one.system.close()


def texts(*texts: str, tenant: str = "acme", **details: Any) -> Call:
    body = {"model": "e", "input": list(texts)} | details.pop("body", {})
    return Call("embedding", body, tenant, f"req_{next(_numbers)}", **details)


def holds(result: Result, *texts: str) -> bool:
    """Whether the vectors are those of the texts, in their order."""
    assert result.answer.array is not None
    return bool(np.array_equal(result.answer.array, np.stack([vector_of(t) for t in texts])))


async def all_asked(here: House, count: int) -> None:
    while len(here.provider.texts) < count:
        await settle()


async def test_only_texts_that_nobody_knows_are_sent(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(texts("a", "bb"))
    call = texts("bb", "ccc", "a", "dddd")
    result = await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    assert here.provider.texts == [["a", "bb"], ["ccc", "dddd"]]
    assert holds(result, "bb", "ccc", "a", "dddd")
    assert (result.facts.cache, result.facts.cached, result.facts.cost_nano) == ("miss", 2, 9)
    assert (entry.prompt_tokens, entry.cost_nano) == (2, 9), "what was paid, and no more"
    assert result.answer.usage == {
        "prompt_tokens": 4,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert here.at_rest


async def test_texts_that_are_all_known_cost_nothing(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(texts("a", "bb"))
    call = texts("bb", "a", "bb")
    result = await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    assert len(here.provider.texts) == 1
    assert holds(result, "bb", "a", "bb")
    assert (result.facts.cache, result.facts.cached, result.facts.cost_nano) == ("hit", 3, 0)
    assert (entry.status, entry.cost_nano) == ("hit", 0)


@pytest.mark.parametrize("how", [{}, {"enable_caching": True}])
async def test_a_text_that_stands_twice_in_a_list_is_sent_once(
    house: Open, how: dict[str, Any]
) -> None:
    here = await house(**how)
    result = await here.pipeline.answer(texts("a", "bb", "a", "a"))

    assert here.provider.texts == [["a", "bb"]]
    assert holds(result, "a", "bb", "a", "a")
    assert (result.facts.cached, result.answer.usage) == (
        0,
        {"prompt_tokens": 2, "total_tokens": 2},
    )


async def test_lists_that_share_texts_send_each_once_between_them(house: Open) -> None:
    here = await house()
    gate = asyncio.Event()
    here.provider.steps["openai/text-embedding-x"] = [gate, gate]
    calls = [texts("a", "bb"), texts("bb", "ccc"), texts("ccc", "a")]
    tasks = [asyncio.create_task(here.pipeline.answer(call)) for call in calls]
    await all_asked(here, 2)
    gate.set()
    first, second, third = await asyncio.gather(*tasks)

    assert here.provider.texts == [["a", "bb"], ["ccc"]]
    assert holds(first, "a", "bb")
    assert holds(second, "bb", "ccc")
    assert holds(third, "ccc", "a")
    assert (second.facts.cache, third.facts.cache) == ("miss", "joined")
    assert (third.facts.cost_nano, third.facts.cached) == (0, 0)
    assert [e.status for e in await here.entries(calls[2])] == ["joined"]
    assert here.at_rest


async def test_a_providers_failure_goes_to_those_who_wait_for_a_part_of_the_list(
    house: Open,
) -> None:
    here = await house(max_retries=0)
    gate = asyncio.Event()
    here.provider.steps["openai/text-embedding-x"] = [(gate, ProviderError("down for all"))]
    tasks = [asyncio.create_task(here.pipeline.answer(texts(*t))) for t in ("ab", "b", "a")]
    await all_asked(here, 1)
    await settle()
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(result) for result in results] == ["down for all"] * 3
    assert here.provider.texts == [["a", "b"]]
    assert here.at_rest


async def test_one_lists_own_trouble_is_not_anothers(house: Open) -> None:
    here = await house(max_retries=0)
    gate = asyncio.Event()
    here.provider.steps["openai/text-embedding-x"] = [(gate, RequestTooLarge("too long a list"))]
    tasks = [asyncio.create_task(here.pipeline.answer(texts(*t))) for t in ("ab", "b")]
    await all_asked(here, 1)
    await settle()
    gate.set()
    long, short = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(long, RequestTooLarge)
    assert isinstance(short, Result)
    assert holds(short, "b")
    assert here.at_rest


async def test_a_cancelled_list_leaves_its_texts_to_those_who_wait(house: Open) -> None:
    here = await house()
    here.provider.steps["openai/text-embedding-x"] = [asyncio.Event()]
    leaver = asyncio.create_task(here.pipeline.answer(texts("a", "bb")))
    await all_asked(here, 1)
    stayer = asyncio.create_task(here.pipeline.answer(texts("bb")))
    await settle()
    leaver.cancel()
    result = await stayer

    assert holds(result, "bb")
    assert here.provider.texts == [["a", "bb"], ["bb"]]
    assert here.at_rest


async def test_texts_are_a_tenants_own_and_dimensions_part_them(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(texts("a"))
    await here.pipeline.answer(texts("a", tenant="other"))
    await here.pipeline.answer(texts("a", body={"dimensions": 4}))
    same = await here.pipeline.answer(
        texts("a", body={"input": "a", "encoding_format": "base64", "user": "u"})
    )

    assert len(here.provider.texts) == 3
    assert same.facts.cache == "hit"


async def test_who_may_not_read_or_write_the_cache_does_neither(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(texts("a", cache_read=False, cache_write=False))
    await here.pipeline.answer(texts("a"))
    again = await here.pipeline.answer(texts("a", cache_read=False))
    hit = await here.pipeline.answer(texts("a"))

    assert len(here.provider.texts) == 3
    assert (again.facts.cache, hit.facts.cache) == ("miss", "hit")


async def test_only_what_is_sent_is_held_against_a_limit(house: Open) -> None:
    here = await house(enable_caching=True, rate_limit_config=LIMITS)
    await here.pipeline.answer(texts("a" * 50))
    for _ in range(20):
        await here.pipeline.answer(texts("a" * 50, "b"))
    assert here.provider.texts == [["a" * 50], ["b"]]
    assert here.at_rest


async def test_vectors_of_a_model_that_has_changed_are_forgotten(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(texts("a"))
    monkeypatch.setattr(
        "tests.support.house.vector_of", lambda text: np.full(6, len(text), np.float32)
    )
    result = await here.pipeline.answer(texts("a", "bb"))

    assert result.answer.array is not None
    assert result.answer.array.shape == (2, 6)
    assert here.provider.texts == [["a"], ["bb"], ["a", "bb"]]
    assert result.facts.cached == 0
    assert (await here.pipeline.answer(texts("bb", "a"))).facts.cache == "hit"


async def test_with_nothing_stored_long_lists_are_no_news_to_anybody(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.pipeline.JOINED_TEXTS_MAX", 2)
    here = await house()
    result = await here.pipeline.answer(texts("a", "bb", "a"))
    assert (result.facts.cache, here.system._refs["cache"].sent["lookup"]) == ("off", 0)
    assert holds(result, "a", "bb", "a")


async def test_the_check_still_comes_first(house: Open) -> None:
    here = await house(enable_caching=True)
    with pytest.raises(InvalidRequest):
        await here.pipeline.answer(texts())
    assert here.provider.texts == []


# --------------------------------------------------------------------- what needs nobody's word


async def near(here: House) -> None:
    """The answer is stored, and this process has just heard so."""
    for _ in range(4):
        await here.pipeline.answer(here.call())


async def test_what_is_near_is_answered_at_once_and_costs_nothing(house: Open) -> None:
    here = await house(enable_caching=True)
    await near(here)
    call = here.call()
    result = here.pipeline.at_once(call)

    assert result is not None
    (entry,) = await here.entries(call)
    assert (result.facts.cache, result.facts.cost_nano, entry.status) == ("hit", 0, "hit")
    assert result.answer.body["choices"][0]["message"]["content"] == "fine"
    assert here.provider.asked == ["openai/a"]
    assert 'outcome="hit"} 4.0' in here.system.meter.render().decode()


async def test_what_is_near_still_counts_against_the_limit(house: Open) -> None:
    here = await house(
        enable_caching=True, rate_limit_config={"requests_per_minute": 60, "burst_size": 10}
    )
    await near(here)
    at_once = [here.pipeline.at_once(here.call()) for _ in range(10)]

    assert 0 < sum(result is not None for result in at_once) <= 6
    assert here.pipeline.at_once(here.call()) is None, "`answer` says when to come back"


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"user": 7},
        {"model": "nobody's"},
        {"model": 7},
        {"messages": []},
        {"temperature": "hot"},
        {"n": [1]},
    ],
)
async def test_what_is_not_near_or_not_right_is_left_to_answer(
    house: Open, changed: dict[str, Any]
) -> None:
    here = await house(enable_caching=True)
    await near(here)
    before = here.system.meter.render()
    call = here.call()
    call.body |= changed

    assert here.pipeline.at_once(call) is None
    assert here.system.meter.render() == before


async def test_who_may_not_read_the_cache_is_not_answered_from_it_at_once(house: Open) -> None:
    here = await house(enable_caching=True)
    await near(here)

    assert here.pipeline.at_once(here.call(cache_read=False)) is None


async def test_nothing_is_near_with_caching_off(house: Open) -> None:
    here = await house()
    await near(here)

    assert here.pipeline.at_once(here.call()) is None


# ------------------------------------------------------------------------------------ streams


def words(chunks: list[dict[str, Any]]) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


async def drained(stream: Stream) -> list[dict[str, Any]]:
    return [chunk async for chunk in stream.chunks]


async def opened(here: House) -> Stream:
    return await here.pipeline.stream(here.call())


async def test_a_whole_stream_is_kept_and_told_as_a_stream(house: Open) -> None:
    here = await house(enable_caching=True)
    here.provider.words = ("one", " and", " two")
    first = await opened(here)
    live = await drained(first)
    call = here.call()
    again = await here.pipeline.stream(call)
    told = await drained(again)
    plain = await here.pipeline.answer(here.call())

    (entry,) = await here.entries(call)
    assert (first.facts.cache, again.facts.cache, plain.facts.cache) == ("miss", "hit", "hit")
    assert words(live) == words(told) == "one and two"
    assert len([c for c in told if words([c])]) == 3, "in natural pieces"
    assert told[-1] == {**told[-1], "choices": [], "usage": USAGE}
    assert plain.answer.body["choices"][0]["message"]["content"] == "one and two"
    assert (entry.status, entry.cost_nano, again.facts.cost_nano) == ("hit", 0, 0)
    assert here.provider.asked == ["openai/a"]
    assert here.at_rest


async def test_a_plain_answer_that_is_kept_is_told_as_a_stream(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(here.call())
    stream = await opened(here)

    assert words(await drained(stream)) == "fine"
    assert stream.facts.cache == "hit"


@pytest.mark.parametrize("ended", [None, "content_filter"])
async def test_a_stream_without_a_proper_end_is_not_kept(house: Open, ended: str | None) -> None:
    here = await house(enable_caching=True)
    here.provider.finish_reason = ended
    await drained(await opened(here))
    await drained(await opened(here))

    assert len(here.provider.asked) == 2


async def test_a_stream_that_is_cut_or_left_is_not_kept(house: Open) -> None:
    here = await house(enable_caching=True)
    here.provider.cut = ProviderError("cut", upstream_status=502)
    with pytest.raises(ProviderError):
        await drained(await opened(here))
    here.provider.cut = None
    left = await opened(here)
    await anext(left.chunks)
    await left.chunks.aclose()
    whole = await opened(here)

    assert whole.facts.cache == "miss"
    assert words(await drained(whole)) == "onetwo"
    assert len(here.provider.asked) == 3


async def test_an_invalid_stream_is_not_kept(house: Open) -> None:
    here = await house(enable_caching=True, validation_level="strict")
    for _ in range(2):
        call = here.call()
        call.body["response_format"] = {"type": "json_object"}
        await drained(await here.pipeline.stream(call))

    assert len(here.provider.asked) == 2


class Slow:
    """A provider's stream that goes on word by word, as the test says."""

    def __init__(self, here: House) -> None:
        self._gates = [asyncio.Event() for _ in range(10)]
        here.provider.words = tuple("abcdefghij")
        here.provider.gates = list(self._gates)

    async def say(self, count: int) -> None:
        """Words that may come by now."""
        for gate in self._gates[:count]:
            gate.set()
        for _ in range(10):
            await settle()


class Reader:
    """A client that reads a stream as it comes."""

    def __init__(self, here: House, **details: Any) -> None:
        self.call = here.call(**details)
        self.stream: Stream | None = None
        self.chunks: list[dict[str, Any]] = []
        self._task = asyncio.create_task(self._read(here))

    async def _read(self, here: House) -> None:
        self.stream = await here.pipeline.stream(self.call)
        async for chunk in self.stream.chunks:
            self.chunks.append(chunk)

    @property
    def heard(self) -> str:
        return words(self.chunks)

    @property
    def cache(self) -> str:
        return "" if self.stream is None else self.stream.facts.cache

    async def hears(self, text: str) -> None:
        """Wait until it has heard so much."""
        async with asyncio.timeout(5):
            while self.heard != text:
                await settle()

    async def end(self) -> None:
        await self._task

    async def leave(self) -> None:
        """As a server's task is cancelled whose client hangs up."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self.stream is not None:
            await self.stream.chunks.aclose()


async def test_followers_of_a_stream_get_its_chunks_as_they_come(house: Open) -> None:
    here = await house()
    slow = Slow(here)
    leader = Reader(here)
    await slow.say(2)
    early = Reader(here)
    await slow.say(4)
    late = Reader(here)
    await slow.say(6)
    assert (leader.heard, early.heard, late.heard) == ("abcdef",) * 3
    await slow.say(10)
    for reader in (leader, early, late):
        await reader.end()

    assert (leader.heard, early.heard, late.heard) == ("abcdefghij",) * 3
    assert early.chunks == late.chunks == leader.chunks
    assert (leader.cache, early.cache, late.cache) == ("miss", "joined", "joined")
    assert here.provider.asked == ["openai/a"]
    assert [e.status for e in await here.entries(early.call)] == ["joined"]
    assert here.at_rest


async def test_a_leader_that_leaves_does_not_end_the_stream_of_its_followers(house: Open) -> None:
    here = await house(enable_caching=True, rate_limit_config={"concurrent_requests": 1})
    slow = Slow(here)
    leader = Reader(here)
    await slow.say(2)
    await leader.hears("ab")
    follower = Reader(here)
    while not here.system.cache.stats()["following"]:
        await settle()
    await slow.say(4)
    await leader.hears("abcd")
    await follower.hears("abcd")
    await leader.leave()
    assert not here.at_rest
    await slow.say(10)
    await follower.end()

    (entry,) = await here.entries(leader.call)
    assert follower.heard == "abcdefghij"
    assert (entry.status, entry.completion_tokens) == ("posted", 2)
    assert here.provider.asked == ["openai/a"]
    assert (await opened(here)).facts.cache == "hit"
    assert here.at_rest


async def test_when_nobody_has_heard_anything_yet_one_follower_takes_over(house: Open) -> None:
    here = await house()
    slow = Slow(here)
    leader = Reader(here)
    for _ in range(5):
        await settle()
    followers = [Reader(here) for _ in range(3)]
    for _ in range(5):
        await settle()
    await leader.leave()
    await slow.say(10)
    for follower in followers:
        await follower.end()

    assert [one.heard for one in followers] == ["abcdefghij"] * 3
    assert sorted(one.cache for one in followers) == ["joined", "joined", "miss"]
    assert len(here.provider.asked) == 2
    assert here.at_rest


async def test_when_everybody_has_left_the_stream_is_read_to_its_end_or_not_at_all(
    house: Open,
) -> None:
    here = await house()
    slow = Slow(here)
    leader = Reader(here)
    await slow.say(2)
    await leader.leave()

    assert here.at_rest


async def test_a_stream_that_fails_fails_for_its_followers_too(house: Open) -> None:
    here = await house()
    slow = Slow(here)
    leader = Reader(here)
    await slow.say(1)
    follower = Reader(here)
    await slow.say(1)
    here.provider.cut = ProviderError("cut", upstream_status=502)
    await slow.say(2)
    for reader in (leader, follower):
        with pytest.raises(ProviderError, match="cut"):
            await reader.end()
    here.provider.cut = None

    assert here.provider.asked == ["openai/a"]
    assert here.at_rest


async def test_a_stream_that_cannot_begin_fails_for_its_followers_too(house: Open) -> None:
    here = await house(max_retries=0)
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [(gate, ProviderError("down for all"))]
    readers = [Reader(here) for _ in range(3)]
    for _ in range(5):
        await settle()
    gate.set()
    for reader in readers:
        with pytest.raises(ProviderError, match="down for all"):
            await reader.end()

    assert here.provider.asked == ["openai/a"]
    assert here.at_rest


async def test_streams_and_plain_answers_share_one_call(house: Open) -> None:
    here = await house()
    slow = Slow(here)
    leader = Reader(here)
    await slow.say(1)
    plain = asyncio.create_task(here.pipeline.answer(here.call()))
    await slow.say(2)
    await slow.say(10)
    await leader.end()
    assert (await plain).answer.body["choices"][0]["message"]["content"] == "abcdefghij"

    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    plain = asyncio.create_task(here.pipeline.answer(here.call("other")))
    for _ in range(5):
        await settle()
    follower = Reader(here, text="other")
    for _ in range(5):
        await settle()
    gate.set()
    await plain
    await follower.end()
    assert (follower.heard, follower.cache) == ("fine", "joined")
    assert len(here.provider.asked) == 2


async def test_who_shares_a_stream_for_its_whole_answer_has_it_validated(house: Open) -> None:
    here = await house(validation_level="strict")
    slow = Slow(here)
    call, same = here.call(), here.call()
    for one in (call, same):
        one.body["response_format"] = {"type": "json_object"}
    streamed = asyncio.create_task(here.pipeline.stream(call))
    await slow.say(1)
    plain = asyncio.create_task(here.pipeline.answer(same))
    await slow.say(1)
    await slow.say(10)
    await drained(await streamed)
    with pytest.raises(ResponseValidationError):
        await plain

    assert here.provider.asked == ["openai/a"]


async def test_what_is_too_long_to_be_passed_on_is_told_by_its_end(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.cache.desk.SPEECH_BYTES_MAX", 500)
    here = await house()
    slow = Slow(here)
    leader = Reader(here)
    await slow.say(1)
    follower = Reader(here)
    await slow.say(1)
    await slow.say(8)
    assert leader.heard == "abcdefgh"
    assert follower.heard == "abcd"
    await slow.say(10)
    await leader.end()
    await follower.end()

    assert follower.heard == "abcdefghij"
    assert follower.chunks[-1]["usage"] == USAGE


async def test_who_asks_for_variety_gets_a_stream_of_its_own(house: Open) -> None:
    here = await house()
    calls = [here.call() for _ in range(2)]
    for call in calls:
        call.body["temperature"] = 1
    streams = [await here.pipeline.stream(call) for call in calls]
    for stream in streams:
        await drained(stream)

    assert len(here.provider.asked) == 2
    assert [stream.facts.cache for stream in streams] == ["off", "off"]
