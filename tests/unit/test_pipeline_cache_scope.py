"""Who is served by whose answers, what is never stored, and what is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from actors.cache.policy import Scope
from forebay.call import Call
from forebay.config import CacheConfig
from forebay.errors import ProviderError
from tests.support.fake_time import settle
from tests.support.house import House
from tests.support.readers import drained

Open = Callable[..., Awaitable[House]]
SHARED = CacheConfig(scope="shared")
KINDS = ("plain", "stream", "texts")


def call(here: House, kind: str, tenant: str, **body: Any) -> Call:
    one = here.texts("hello") if kind == "texts" else here.call()
    return replace(one, tenant=tenant, body=one.body | body)


async def ask(here: House, kind: str, tenant: str, **body: Any) -> str:
    """Asks, to the end; how the cache took it."""
    one = call(here, kind, tenant, **body)
    if kind == "stream":
        stream = await here.pipeline.stream(one)
        await drained(stream)
        return stream.facts.cache
    return (await here.pipeline.answer(one)).facts.cache


@pytest.mark.parametrize("kind", KINDS)
async def test_two_tenants_never_share_an_answer(house: Open, kind: str) -> None:
    here = await house(enable_caching=True)
    assert [await ask(here, kind, tenant) for tenant in ("a", "a:b", "b")] == ["miss"] * 3
    assert [await ask(here, kind, tenant) for tenant in ("a", "a:b", "b")] == ["hit"] * 3
    assert len(here.provider.asked) == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_two_tenants_share_answers_where_that_is_configured(house: Open, kind: str) -> None:
    here = await house(enable_caching=True, cache_config=SHARED)
    assert [await ask(here, kind, tenant) for tenant in ("a", "b")] == ["miss", "hit"]
    assert len(here.provider.asked) == 1


@pytest.mark.parametrize(("shared", "calls"), [(False, 2), (True, 1)])
async def test_a_running_call_is_shared_by_those_who_share_answers(
    house: Open, shared: bool, calls: int
) -> None:
    here = await house(cache_config=SHARED if shared else CacheConfig())
    gate = asyncio.Event()
    here.provider.steps["openai/gpt-x"] = [gate, gate]
    tasks = [asyncio.create_task(ask(here, "plain", tenant)) for tenant in ("a", "b")]
    for _ in range(20):
        await settle()
    gate.set()
    told = await asyncio.gather(*tasks)
    assert len(here.provider.asked) == calls
    assert told == (["miss", "joined"] if shared else ["miss", "miss"])


@pytest.mark.parametrize("kind", KINDS)
async def test_what_nobody_here_understands_is_neither_stored_nor_shared(
    house: Open, kind: str
) -> None:
    here = await house(enable_caching=True, own={"allowed_params": ["session", "top_k"]})
    told = [await ask(here, kind, "a", session="s") for _ in range(2)]
    assert told == ["off", "off"]
    assert len(here.provider.asked) == 2
    assert [await ask(here, kind, "a", top_k=3) for _ in range(2)] == ["miss", "hit"]


async def test_what_is_invalidated_is_asked_for_again(house: Open) -> None:
    here = await house(enable_caching=True)
    for kind in ("plain", "texts"):
        await ask(here, kind, "a")
        await ask(here, kind, "b")
    cache, key = here.system.cache, here.pipeline.key_of(call(here, "plain", "b"))
    assert await cache.invalidate(Scope("a"), "m", None) == 1
    assert await cache.invalidate(None, "e", None) == 2
    assert await ask(here, "plain", "b") == "hit"
    assert await cache.invalidate(None, None, key) == 1
    assert await cache.invalidate(None, None, None) == 0
    assert [await ask(here, kind, "b") for kind in ("plain", "texts")] == ["miss", "miss"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_fallbacks_answer_is_not_kept_as_that_of_the_model_asked_for(
    house: Open, kind: str
) -> None:
    fallbacks = ["spare"]
    here = await house(enable_caching=True, max_retries=0, fallbacks=fallbacks)
    own = "openai/text-embedding-x" if kind == "texts" else "openai/a"
    here.provider.steps[own] = [ProviderError("down")]
    told = [await ask(here, kind, "a") for _ in range(3)]
    assert told == ["miss", "miss", "hit"]
    assert here.provider.asked.count(own) >= 2, "it is asked again"


async def test_a_fallbacks_vectors_never_stand_beside_the_models_own(house: Open) -> None:
    own = "openai/text-embedding-x"
    here = await house(enable_caching=True, max_retries=0, fallbacks=[{"e": ["spare"]}])
    await here.pipeline.answer(call(here, "texts", "a", input=["one"]))
    here.provider.steps[own] = [ProviderError("down")] * 2
    result = await here.pipeline.answer(call(here, "texts", "a", input=["one", "two"]))
    assert here.provider.texts[1:] == [["two"], ["two"], ["one", "two"], ["one", "two"]]
    assert (result.answer.model, result.facts.cached) == ("openai/c", 0)
    assert await ask(here, "texts", "a", input=["one"]) == "hit"


async def test_nor_do_those_that_somebody_else_got_from_a_fallback(house: Open) -> None:
    own = "openai/text-embedding-x"
    here = await house(max_retries=0, fallbacks=["spare"])
    gate = asyncio.Event()
    here.provider.steps[own] = [(gate, ProviderError("down"))]
    first = asyncio.create_task(here.pipeline.answer(call(here, "texts", "a", input=["one"])))
    while not here.provider.asked:
        await settle()
    both = call(here, "texts", "a", input=["one", "two"])
    second = asyncio.create_task(here.pipeline.answer(both))
    for _ in range(20):
        await settle()
    gate.set()
    assert (await first).answer.model == "openai/c"
    assert (await second).answer.model == own
    assert here.provider.texts == [["one"], ["two"], ["one"], ["one", "two"]]


async def test_who_joins_a_call_that_a_fallback_answers_is_told(house: Open) -> None:
    here = await house(max_retries=0, fallbacks=["spare"])
    gate = asyncio.Event()
    here.provider.steps["openai/text-embedding-x"] = [(gate, ProviderError("down"))]
    first = asyncio.create_task(here.pipeline.answer(call(here, "texts", "a", input=["one"])))
    while not here.provider.asked:
        await settle()
    joins = call(here, "texts", "a", input=["one"])
    joins.bulk = True
    second = asyncio.create_task(here.pipeline.answer(joins))
    for _ in range(20):
        await settle()
    gate.set()
    assert ((await first).facts.fallbacks, (await second).facts.fallbacks) == (1, 1)
    assert here.provider.texts == [["one"], ["one"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_one_tenants_limit_shortens_no_other_tenants_answer(
    house: Open, stream: bool
) -> None:
    limited = {"usd_per_day": 0.01}
    tenants = [{"id": "a", "limits": limited}, {"id": "b"}]
    here = await house(enable_caching=True, cache_config=SHARED, tenants=tenants)
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate, gate]
    kind = "stream" if stream else "plain"
    first = asyncio.create_task(ask(here, kind, "a", max_tokens=100_000))
    while not here.provider.bodies:
        await settle()
    second = asyncio.create_task(ask(here, kind, "b", max_tokens=100_000))
    for _ in range(20):
        await settle()
    gate.set()
    assert [await first, await second] == ["miss", "miss"]
    most = [body["max_tokens"] for body in here.provider.bodies]
    assert most[0] < most[1] == 100_000
    kept = await here.pipeline.answer(call(here, "plain", "b", max_tokens=100_000))
    assert (kept.facts.cache, kept.facts.clamped, kept.facts.warnings) == ("hit", None, [])
