"""What is known is not asked for again: texts one by one, and streams as they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from actors.batcher.policy import Text
from actors.rate_limiter.terms import Refusal
from actors.ref import OwnerUnavailable
from deployments.gateway import PipelineService
from deployments.http.service import HttpCall, StreamReply
from forebay.call import Call, Facts, Result, Route
from forebay.errors import (
    GatewayTimeout,
    InvalidRequest,
    Overloaded,
    ProviderError,
    RequestTooLarge,
    ResponseValidationError,
)
from tests.support.fake_time import settle
from tests.support.house import USAGE, House, vector_of
from tests.support.readers import Reader, Slow, drained, opened, words

Open = Callable[..., Awaitable[House]]
LIMITS = {"tokens_per_minute": 300, "burst_size": 40}
_numbers = iter(range(10**6))


def texts(*texts: str, tenant: str = "acme", **details: Any) -> Call:
    body = {"model": "e", "input": list(texts)} | details.pop("body", {})
    return Call("embedding", body, tenant, f"req_{next(_numbers)}", **details)


def holds(result: Result, *texts: Text) -> bool:
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


async def test_token_ids_are_known_one_by_one_as_texts_are(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(texts(body={"input": [[1, 2], [3]]}))
    mixed = await here.pipeline.answer(texts(body={"input": [[3], [4, 5], [3], [1, 2]]}))
    one = await here.pipeline.answer(texts(body={"input": [1, 2]}))

    assert here.provider.texts == [[(1, 2), (3,)], [(4, 5)]]
    assert holds(mixed, (3,), (4, 5), (3,), (1, 2))
    assert holds(one, (1, 2))
    assert (mixed.facts.cache, mixed.facts.cached) == ("miss", 3)
    assert (one.facts.cache, one.facts.cached) == ("hit", 1)
    assert here.at_rest


async def test_token_ids_are_no_text_and_no_other_ids(house: Open) -> None:
    here = await house(enable_caching=True)
    for given in ("1,2", "[1,2]", "12", [1, 2], [12], [[1], [2]], ["1", "2"], [1, 2, 0], [2, 1]):
        result = await here.pipeline.answer(texts(body={"input": given}))
        assert result.facts.cache == "miss", given


async def test_equal_token_ids_under_way_are_sent_once(house: Open) -> None:
    here = await house()
    gate = asyncio.Event()
    here.provider.steps["openai/text-embedding-x"] = [gate]
    given = ([[1, 2], [3]], [3], [[1, 2]])
    tasks = [asyncio.create_task(here.pipeline.answer(texts(body={"input": g}))) for g in given]
    await all_asked(here, 1)
    await settle()
    gate.set()
    both, three, pair = await asyncio.gather(*tasks)

    assert here.provider.texts == [[(1, 2), (3,)]]
    assert holds(both, (1, 2), (3,))
    assert holds(three, (3,))
    assert holds(pair, (1, 2))
    assert here.at_rest


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
    monkeypatch.setattr("forebay.sharing.JOINED_TEXTS_MAX", 2)
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
        {"temperature": float("nan")},
        {"logit_bias": {1, 2}},
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
    assert early.chunks == late.chunks == leader.chunks
    await slow.say(10)
    for reader in (leader, early, late):
        await reader.end()

    assert (leader.heard, early.heard, late.heard) == ("abcdefghij",) * 3
    assert early.chunks[-1]["usage"] == late.chunks[-1]["usage"] == USAGE
    assert (leader.cache, early.cache, late.cache) == ("miss", "joined", "joined")
    assert here.provider.asked == ["openai/a"]
    assert [e.status for e in await here.entries(early.call)] == ["joined"]
    assert here.at_rest


@pytest.mark.parametrize("kind", ["whole", "texts", "stream"])
async def test_the_time_of_a_shared_call_is_no_overhead(house: Open, kind: str) -> None:
    here = await house()
    now = 1000.0
    here.system.clock = lambda: now
    gate = asyncio.Event()
    here.provider.steps = {"openai/a": [gate], "openai/text-embedding-x": [gate]}

    async def asked() -> Facts:
        if kind == "stream":
            stream = await here.pipeline.stream(here.call())
            await drained(stream)
            return stream.facts
        call = texts("a") if kind == "texts" else here.call()
        return (await here.pipeline.answer(call)).facts

    tasks = [asyncio.create_task(asked()) for _ in range(2)]
    while not here.provider.asked:
        await settle()
    await settle()  # the second one waits for the first by now
    now += 30
    gate.set()
    led, joined = await asyncio.gather(*tasks)

    assert (led.cache, joined.cache) == ("miss", "joined")
    assert [(one.total_s, one.overhead_s) for one in (led, joined)] == [(30.0, 0.0)] * 2


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
    monkeypatch.setattr("actors.cache.channel.SPEECH_BYTES_MAX", 500)
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


async def test_all_that_is_equal_shares_a_call_where_that_is_chosen(house: Open) -> None:
    here = await house(deduplicate="all")
    calls = [here.call() for _ in range(3)]
    for call in calls:
        call.body["temperature"] = 1
    told = await asyncio.gather(*map(here.pipeline.answer, calls))

    assert len(here.provider.asked) == 1
    assert sorted(one.facts.cache for one in told) == ["joined", "joined", "miss"]


# ------------------------------------------------------------------- a leader's own trouble


async def answered(here: House, kind: str, **details: Any) -> str:
    """One of several equal requests; "joined", "miss" or "off", as it was answered."""
    if kind == "stream":
        stream = await opened(here, **details)
        assert words(await drained(stream)) == "onetwo"
        return stream.facts.cache
    call = texts("a", **details) if kind == "texts" else here.call(**details)
    return (await here.pipeline.answer(call)).facts.cache


def asked(here: House) -> int:
    return len(here.provider.asked)


def hang(here: House, kind: str) -> asyncio.Event:
    """The provider's first answer waits for this."""
    gate = asyncio.Event()
    here.provider.steps["openai/text-embedding-x" if kind == "texts" else "openai/a"] = [gate]
    return gate


KINDS = ["plain", "stream", "texts"]


async def some_follow(here: House, kind: str) -> list[asyncio.Task[str]]:
    followers = [asyncio.create_task(answered(here, kind)) for _ in range(3)]
    for _ in range(3):
        await settle()
    return followers


@pytest.mark.parametrize("kind", KINDS)
async def test_a_leaders_own_deadline_is_its_own_and_exactly_one_takes_over(
    house: Open, kind: str
) -> None:
    here = await house()
    hang(here, kind)
    leader = asyncio.create_task(answered(here, kind, timeout_s=0.05))
    followers = await some_follow(here, kind)
    with pytest.raises(GatewayTimeout):
        await leader

    assert sorted(await asyncio.gather(*followers)) == ["joined", "joined", "miss"]
    assert asked(here) == 2
    assert here.at_rest


@pytest.mark.parametrize("kind", KINDS)
async def test_a_leader_that_is_cancelled_leaves_the_lead_to_exactly_one(
    house: Open, kind: str
) -> None:
    here = await house()
    hang(here, kind)
    leader = asyncio.create_task(answered(here, kind))
    followers = await some_follow(here, kind)
    leader.cancel()

    assert sorted(await asyncio.gather(*followers)) == ["joined", "joined", "miss"]
    assert asked(here) == 2
    assert here.at_rest


REFUSALS = [
    Refusal("requests_per_minute", 1, 0, 1.0),
    Refusal("usd_per_day", 10**9, 0, 3600.0),
    OwnerUnavailable("limiter", "away"),
]


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_leader_without_money_or_leave_is_no_news_for_the_others(
    house: Open, monkeypatch: pytest.MonkeyPatch, kind: str, refusal: Any
) -> None:
    here = await house(rate_limit_config={"requests_per_minute": 600})
    limiter = here.system.limiter
    reserve, at_once = limiter.reserve, limiter.reserve_at_once
    refusals = [refusal]

    async def reserved(*asked: Any, **how: Any) -> Any:
        if not refusals:
            return await reserve(*asked, **how)
        refused = refusals.pop()
        await settle()
        if isinstance(refused, OwnerUnavailable):
            raise refused
        return refused

    monkeypatch.setattr(limiter, "reserve", reserved)
    monkeypatch.setattr(limiter, "reserve_at_once", lambda *of: None if refusals else at_once(*of))
    tasks = [asyncio.create_task(answered(here, kind)) for _ in range(4)]
    await asyncio.wait(tasks)
    failed = [task.exception() for task in tasks if task.exception()]

    assert [type(error).__name__ for error in failed] == [
        {"requests_per_minute": "RateLimitError", "usd_per_day": "BudgetExceeded"}.get(
            getattr(refusal, "kind", ""), "Overloaded"
        )
    ]
    told = sorted(task.result() for task in tasks if not task.exception())
    assert told == ["joined", "joined", "miss"]
    assert asked(here) == 1
    assert here.at_rest


@pytest.mark.parametrize("kind", KINDS)
async def test_a_leader_whose_ledger_is_full_is_no_news_for_the_others(
    house: Open, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    here = await house()
    full = [True]
    monkeypatch.setattr(
        type(here.system.books), "full", property(lambda books: bool(full and full.pop()))
    )
    tasks = [asyncio.create_task(answered(here, kind)) for _ in range(4)]
    await asyncio.wait(tasks)

    failed = [task.exception() for task in tasks if task.exception()]
    assert [type(error) for error in failed] == [Overloaded]
    assert asked(here) == 1
    assert here.at_rest


@pytest.mark.parametrize("kind", ["plain", "stream"])
async def test_what_a_leaders_process_has_no_room_for_is_no_news_for_the_others(
    house: Open, kind: str
) -> None:
    here = await house(max_retries=0, enable_circuit_breaker=False)
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [(gate, Overloaded("no room here"))]
    leader = asyncio.create_task(answered(here, kind))
    followers = await some_follow(here, kind)
    gate.set()
    with pytest.raises(Overloaded):
        await leader

    assert sorted(await asyncio.gather(*followers)) == ["joined", "joined", "miss"]
    assert asked(here) == 2
    assert here.at_rest


@pytest.mark.parametrize("kind", KINDS)
async def test_a_provider_that_is_late_for_everybody_is_everybodys(house: Open, kind: str) -> None:
    here = await house(max_retries=0)
    late = GatewayTimeout("late for all")
    gate = hang(here, kind)
    steps = next(iter(here.provider.steps.values()))
    steps[:] = [(gate, late)]
    leader = asyncio.create_task(answered(here, kind))
    followers = await some_follow(here, kind)
    gate.set()
    told = await asyncio.gather(leader, *followers, return_exceptions=True)

    assert [str(one) for one in told] == ["late for all"] * 4
    assert asked(here) == 1
    assert await answered(here, kind) == "miss", "the next one tries anew"
    assert here.at_rest


# ---------------------------------------------------------------------- what is worth keeping


def choice(reason: str | None = "stop", index: int = 0, **message: Any) -> dict[str, Any]:
    told = {"role": "assistant", "content": "fine", **message}
    return {"index": index, "finish_reason": reason, "message": told}


def tool(arguments: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]}


JSON = {"response_format": {"type": "json_object"}}
KEPT: list[tuple[str, list[dict[str, Any]], dict[str, Any], bool]] = [
    ("whole", [choice()], {}, True),
    ("tool calls", [choice("tool_calls", **tool('{"x": 1}'))], {}, True),
    ("a tool call without arguments", [choice("tool_calls", **tool(""))], {}, True),
    ("two", [choice(), choice(index=1)], {"n": 2}, True),
    ("more than asked for", [choice(), choice(index=1)], {}, True),
    ("the JSON that was asked for", [choice(content="{}")], JSON, True),
    ("no end", [choice(None)], {}, False),
    ("filtered", [choice("content_filter")], {}, False),
    ("cut at a limit", [choice("length")], {}, False),
    ("an end that OpenAI does not know", [choice("insufficient_system_resource")], {}, False),
    ("an error for an end", [choice("error")], {}, False),
    ("tool calls cut at a limit", [choice("length", **tool('{"x": '))], {}, False),
    ("tool calls that break off", [choice("tool_calls", **tool('{"x": '))], {}, False),
    ("no choices", [], {}, False),
    ("an empty answer", [choice(content="")], {}, False),
    ("one of two", [choice()], {"n": 2}, False),
    ("one of two filtered", [choice(), choice("content_filter", 1)], {"n": 2}, False),
    ("one of two without an end", [choice(), choice(None, 1)], {"n": 2}, False),
    ("no JSON", [choice(content="fine")], JSON, False),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "validates", [{}, {"validation_level": "lenient"}, {"enable_validation": 0}]
)
@pytest.mark.parametrize(
    ("choices", "body", "kept"), [row[1:] for row in KEPT], ids=[r[0] for r in KEPT]
)
async def test_only_whole_and_valid_answers_are_kept(
    house: Open,
    choices: list[dict[str, Any]],
    body: dict[str, Any],
    kept: bool,
    validates: dict[str, Any],
    stream: bool,
) -> None:
    here = await house(enable_caching=True, max_retries=0, **validates)
    here.provider.choices = choices

    async def ask() -> None:
        call = here.call()
        call.body |= body
        with contextlib.suppress(ResponseValidationError):
            if stream:
                await drained(await here.pipeline.stream(call))
            else:
                await here.pipeline.answer(call)

    await ask()
    await ask()
    assert asked(here) == (1 if kept else 2)
    assert here.at_rest


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_what_a_limit_has_cut_is_not_kept(house: Open, reason: str, stream: bool) -> None:
    limits = {"usd_per_day": 0.01}
    here = await house(enable_caching=True, enable_validation=False, rate_limit_config=limits)
    here.provider.finish_reason = reason
    for _ in range(2):
        call = here.call(max_tokens=100_000)
        if stream:
            answered = await here.pipeline.stream(call)
            await drained(answered)
            facts = answered.facts
        else:
            facts = (await here.pipeline.answer(call)).facts
        assert facts.clamped is not None

    assert asked(here) == (1 if reason == "stop" else 2)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_is_not_kept(house: Open, stream: bool) -> None:
    here = await house(enable_caching=True, max_retries=0)
    here.provider.steps["openai/a"] = [ProviderError("down"), InvalidRequest("no")]
    for _ in range(2):
        with pytest.raises((ProviderError, InvalidRequest)):
            await answered(here, "stream" if stream else "plain")
    if stream:
        assert await answered(here, "stream") == "miss"
    else:
        assert await answered(here, "plain") == "miss"


async def test_each_of_several_prompts_has_to_be_answered(house: Open) -> None:
    here = await house(enable_caching=True, enable_validation=False)
    text = {"index": 0, "finish_reason": "stop", "text": "fine"}
    for count, kept in ((1, False), (2, True)):
        here.provider.choices = [{**text, "index": index} for index in range(count)]
        for prompts, enough in ((["a", "b"], kept), ([[1], [2]], kept), ("a", True), ([1], True)):
            before = asked(here)
            for _ in range(2):
                body = {"model": "m", "prompt": prompts, "suffix": str(count)}
                await here.pipeline.answer(Call("completion", body, "acme", "req"))
            assert asked(here) - before == (1 if enough else 2), (count, prompts)


# ------------------------------------------------------------------- what a request wishes for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("wishes", "first", "second"),
    [
        ({}, "hit", "hit"),
        ({"cache_read": False}, "miss", "hit"),
        ({"cache_read": False, "cache_write": False}, "miss", "hit"),
    ],
)
async def test_who_wants_no_stored_answer_gets_a_new_one(
    house: Open, kind: str, wishes: dict[str, bool], first: str, second: str
) -> None:
    here = await house(enable_caching=True)
    await answered(here, kind)
    assert await answered(here, kind, **wishes) == first
    assert await answered(here, kind) == second


@pytest.mark.parametrize("kind", KINDS)
async def test_who_wants_nothing_stored_leaves_nothing_behind(house: Open, kind: str) -> None:
    here = await house(enable_caching=True)
    await answered(here, kind, cache_read=False, cache_write=False)
    assert await answered(here, kind, cache_read=True, cache_write=False) == "miss"
    assert await answered(here, kind) == "miss"
    assert await answered(here, kind) == "hit"


@pytest.mark.parametrize("kind", KINDS)
async def test_who_wants_no_stored_answer_stores_its_own(house: Open, kind: str) -> None:
    here = await house(enable_caching=True)
    await answered(here, kind, cache_read=False)
    assert await answered(here, kind) == "hit"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wished_s", [None, 7.5])
async def test_an_answer_is_kept_for_as_long_as_its_request_says(
    house: Open, monkeypatch: pytest.MonkeyPatch, kind: str, wished_s: float | None
) -> None:
    here = await house(enable_caching=True, cache_ttl=90)
    land, told_s = here.system.cache.land, []

    def landed(lead: Any, value: Any = None, error: Any = None, ttl_s: Any = None) -> None:
        told_s.append(ttl_s)
        land(lead, value, error, ttl_s)

    monkeypatch.setattr(here.system.cache, "land", landed)
    await answered(here, kind, cache_ttl_s=wished_s)
    assert told_s == [wished_s or 90.0]


@pytest.mark.parametrize("kind", KINDS)
async def test_with_caching_off_no_wish_stores_anything(house: Open, kind: str) -> None:
    here = await house()
    await answered(here, kind, cache_ttl_s=60.0)
    assert await answered(here, kind, cache_ttl_s=60.0) == "miss"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("control", "cache", "next_time"),
    [
        (None, "hit", "hit"),
        ("no-cache", "miss", "hit"),
        ("no-store", "miss", "hit"),
        ("no-cache, no-store", "miss", "hit"),
    ],
)
async def test_over_http_cache_control_is_obeyed(
    house: Open, kind: str, control: str | None, cache: str, next_time: str
) -> None:
    here = await house(enable_caching=True)
    service = PipelineService(here.system, b"s" * 32, "127.0.0.1")

    async def ask(control: str | None) -> str:
        route: Route = "embedding" if kind == "texts" else "chat"
        call = texts("a") if kind == "texts" else here.call()
        http = HttpCall(
            route=route,
            body=call.body,
            tenant="acme",
            request_id=call.request_id,
            stream=kind == "stream",
            cache_control=control,
        )
        reply = await getattr(service, route)(http)
        if isinstance(reply, StreamReply):
            assert [chunk async for chunk in reply.chunks]
        return str(reply.cache)

    stored = control is not None and "no-store" not in control
    assert await ask(control) == "miss"
    assert await ask(None) == ("hit" if stored or control is None else "miss")
    assert await ask(control) == cache
    assert await ask(None) == next_time
