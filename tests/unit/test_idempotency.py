"""Requests with a key: called once, answered the same for a day, whoever leaves or fails."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ledger import claims as claims_room
from actors.ref import OwnerUnavailable
from deployments.gateway import Gateway, PipelineService
from deployments.http import build_asgi
from forebay import once as room
from forebay.call import KEY_CHARS_MAX, Call, Stream
from forebay.config import GatewayConfig
from forebay.errors import GatewayError, InvalidRequest, Overloaded, ProviderError
from forebay.gateway import LiteLLMGateway
from tests.support.fake_time import settle
from tests.support.house import House, Scripted, open_house
from tests.support.readers import Reader, Slow, drained, words
from tests.support.scripted_service import Answered, Client

Open = Callable[..., Awaitable[House]]
KEY: dict[str, Any] = {"idempotency_key": "once"}


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await settle()


async def test_a_repeat_has_the_first_answer_and_costs_nothing(house: Open) -> None:
    here = await house()
    first = await here.pipeline.answer(here.call(**KEY))
    call = here.call(**KEY)
    again = await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    totals = await here.system.books.usage()
    assert here.provider.asked == ["openai/a"]
    assert again.answer.body == first.answer.body
    assert (again.answer.id, again.answer.usage) == (first.answer.id, first.answer.usage)
    assert (first.facts.replayed, again.facts.replayed) == (False, True)
    assert (again.facts.cost_nano, again.facts.attempts, again.facts.cache) == (0, 0, "off")
    assert (entry.status, entry.cost_nano, entry.saved_nano) == ("replay", 0, 7)
    assert (entry.response_id, entry.error) == ("1", None)
    assert (totals["total_requests"], totals["total_cost_nano"]) == (2, 7)
    assert totals["saved_cost_nano"] == 7
    assert totals["success_rate"] == 1.0
    assert here.system.once.stats()["replays"] == 1
    assert here.at_rest


async def test_a_key_is_for_one_body_of_one_tenant_on_one_route(house: Open) -> None:
    here = await house()
    await here.pipeline.answer(here.call(**KEY))
    other = here.call("another text", **KEY)
    streamed = here.call(**KEY)
    streamed.body["stream"] = True
    for ask in (here.pipeline.answer(other), here.pipeline.stream(streamed)):
        with pytest.raises(InvalidRequest, match="another request body") as refused:
            await ask
        assert (refused.value.status, refused.value.code) == (409, "idempotency_key_reused")
    (entry,) = await here.entries(other)
    assert (entry.status, entry.http_status) == ("refused", 409)
    # Neither another tenant's key nor another key of its own has anything to do with it.
    zenith, plain = here.call(**KEY), here.call(idempotency_key="twice")
    zenith.tenant = "zenith"
    for call in (zenith, plain):
        assert not (await here.pipeline.answer(call)).facts.replayed
    assert len(here.provider.asked) == 3


async def test_the_order_of_fields_is_no_difference(house: Open) -> None:
    here = await house()
    first, again = here.call(max_tokens=5, **KEY), here.call(max_tokens=5, **KEY)
    again.body = dict(reversed(again.body.items()))
    await here.pipeline.answer(first)
    assert (await here.pipeline.answer(again)).facts.replayed


async def test_a_request_without_a_key_asks_nobody(house: Open) -> None:
    here = await house()
    await here.pipeline.answer(here.call())
    await drained(await here.pipeline.stream(here.call()))
    sent = here.system._refs["ledger"].sent
    assert (sent["claim"], sent["finish"]) == (0, 0)
    await here.pipeline.answer(here.call(**KEY))
    assert (sent["claim"], sent["finish"]) == (1, 1)


async def test_keys_need_no_entries(house: Open) -> None:
    here = await house(enable_llmops=False)
    await here.pipeline.answer(here.call(**KEY))
    assert (await here.pipeline.answer(here.call(**KEY))).facts.replayed
    assert len(here.provider.asked) == 1


async def test_answers_outlive_the_whole_system(tmp_path: Path) -> None:
    how: dict[str, Any] = {"ledger_url": f"sqlite:///{tmp_path / 'ledger.db'}"}
    bodies = []
    for _ in range(3):
        here = await open_house(tmp_path, **how)
        result = await here.pipeline.answer(here.call(**KEY))
        vectors = await here.pipeline.answer(here.texts("abc", idempotency_key="v"))
        chunks = await drained(await here.pipeline.stream(here.call(idempotency_key="s")))
        assert vectors.answer.array is not None
        bodies.append(
            (
                result.answer.body,
                vectors.answer.array.tolist(),
                vectors.answer.usage,
                words(chunks),
                chunks[-1]["usage"],
            )
        )
        asked = len(here.provider.asked)
        await here.system.close()
        assert asked == (0 if len(bodies) > 1 else 3)
    assert bodies[0] == bodies[1] == bodies[2]


async def test_who_comes_meanwhile_waits_for_the_first(house: Open) -> None:
    here = await house()
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    asked = [asyncio.create_task(here.pipeline.answer(here.call(**KEY))) for _ in range(4)]
    await until(lambda: here.system._refs["ledger"].owner._claims._waiters == 3)  # type: ignore[attr-defined]
    await until(lambda: here.provider.asked == ["openai/a"])
    gate.set()
    results = await asyncio.gather(*asked)
    assert sorted(result.facts.replayed for result in results) == [False, True, True, True]
    assert here.provider.asked == ["openai/a"]


async def test_where_nobody_more_can_wait_one_is_told_to_come_again(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await house()
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    first = asyncio.create_task(here.pipeline.answer(here.call(**KEY)))
    await until(lambda: bool(here.provider.asked))
    monkeypatch.setattr(claims_room, "WAITERS_MAX", 0)
    with pytest.raises(InvalidRequest, match="under way") as refused:
        await here.pipeline.answer(here.call(**KEY))
    assert (refused.value.status, refused.value.code) == (409, "idempotency_key_in_use")
    assert refused.value.retry_after_s == 1.0
    gate.set()
    assert not (await first).facts.replayed
    assert (await here.pipeline.answer(here.call(**KEY))).facts.replayed


async def test_a_call_that_failed_is_made_again(house: Open) -> None:
    here = await house(max_retries=0)
    here.provider.steps["openai/a"] = [ProviderError("no", upstream_status=500)]
    with pytest.raises(ProviderError):
        await here.pipeline.answer(here.call(**KEY))
    result = await here.pipeline.answer(here.call("another body", **KEY))
    assert not result.facts.replayed
    assert here.at_rest


async def test_a_request_that_is_refused_before_does_not_use_its_key(house: Open) -> None:
    here = await house()
    wrong = here.call(**KEY)
    wrong.body["temperature"] = "hot"
    with pytest.raises(InvalidRequest):
        await here.pipeline.answer(wrong)
    assert here.system._refs["ledger"].sent["claim"] == 0
    odd = here.call(**KEY)
    odd.body["seed"] = {1}
    with pytest.raises(InvalidRequest, match="plain JSON"):
        await here.pipeline.answer(odd)


async def test_a_call_goes_on_when_its_client_leaves(house: Open) -> None:
    here = await house()
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    first = here.call(**KEY)
    asked = asyncio.create_task(here.pipeline.answer(first))
    await until(lambda: bool(here.provider.asked))
    asked.cancel()
    await asyncio.wait([asked])
    assert asked.cancelled()
    assert here.system.once.stats()["carried"] == 1
    again = asyncio.create_task(here.pipeline.answer(here.call(**KEY)))
    await settle()
    gate.set()

    result = await again
    (entry,) = await here.entries(first)
    assert result.facts.replayed
    assert (entry.status, entry.error) == ("posted", None)
    assert here.provider.asked == ["openai/a"]
    assert here.system.once.stats()["carried"] == 0
    assert here.at_rest


async def test_who_leaves_while_another_has_the_key_is_gone(house: Open) -> None:
    here = await house()
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    first = asyncio.create_task(here.pipeline.answer(here.call(**KEY)))
    await until(lambda: bool(here.provider.asked))
    second = asyncio.create_task(here.pipeline.answer(here.call(**KEY)))
    await until(lambda: here.system._refs["ledger"].sent["claim"] == 2)
    second.cancel()
    await asyncio.wait([second])
    assert here.system.once.stats()["carried"] == 0
    gate.set()
    await first
    assert (await here.pipeline.answer(here.call(**KEY))).facts.replayed


async def test_where_no_more_are_carried_a_call_ends_with_its_client(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CARRIED_MAX", 0)
    here = await house()
    for open_one in (here.pipeline.answer, here.pipeline.stream):
        here.provider.steps["openai/a"] = [asyncio.Event()]
        here.provider.asked.clear()
        asked: asyncio.Task[Any] = asyncio.create_task(open_one(here.call(**KEY)))
        await until(lambda: bool(here.provider.asked))
        asked.cancel()
        await asyncio.wait([asked])
    reader = Reader(here, **KEY)
    await reader.hears("onetwo")
    await reader.end()
    slow = Slow(here)
    cut = Reader(here, idempotency_key="cut")
    await slow.say(2)
    await cut.hears("ab")
    await cut.leave()
    await slow.say(10)
    again = Reader(here, idempotency_key="cut")
    await again.end()
    assert again.stream is not None
    assert not again.stream.facts.replayed
    assert here.at_rest


async def test_closing_ends_what_is_carried(house: Open) -> None:
    here = await house()
    here.provider.steps["openai/a"] = [asyncio.Event()]
    asked = asyncio.create_task(here.pipeline.answer(here.call(**KEY)))
    await until(lambda: bool(here.provider.asked))
    asked.cancel()
    await asyncio.wait([asked])
    await here.system.once.close()
    assert here.system.once.stats()["carried"] == 0
    assert not (await here.pipeline.answer(here.call(**KEY))).facts.replayed


async def test_a_stream_is_told_again(house: Open) -> None:
    here = await house()
    first = await drained(await here.pipeline.stream(here.call(**KEY)))
    call = here.call(**KEY)
    stream = await here.pipeline.stream(call)
    again = await drained(stream)
    (entry,) = await here.entries(call)
    assert words(again) == words(first) == "onetwo"
    assert again[-1]["usage"] == first[-1]["usage"]
    assert (stream.facts.replayed, stream.facts.cost_nano) == (True, 0)
    assert (entry.status, entry.saved_nano) == ("replay", 7)
    assert here.provider.asked == ["openai/a"]
    assert here.at_rest


async def test_a_stream_goes_on_when_its_client_leaves(house: Open) -> None:
    here = await house()
    slow = Slow(here)
    reader = Reader(here, **KEY)
    await slow.say(2)
    await reader.hears("ab")
    await reader.leave()
    assert here.provider.streams_open == 1
    await slow.say(10)
    again = Reader(here, **KEY)
    await again.end()
    assert again.heard == "abcdefghij"
    assert again.stream is not None
    assert again.stream.facts.replayed
    (entry,) = await here.entries(reader.call)
    assert (entry.status, entry.error) == ("posted", None)
    assert here.provider.asked == ["openai/a"]
    assert here.at_rest


@pytest.mark.parametrize("moment", ["opening", "begun", "closed unread"])
async def test_a_stream_that_nobody_reads_is_kept(house: Open, moment: str) -> None:
    here = await house()
    gate = asyncio.Event()
    if moment == "opening":
        here.provider.steps["openai/a"] = [gate]
    asked = asyncio.create_task(here.pipeline.stream(here.call(**KEY)))
    if moment == "opening":
        await until(lambda: bool(here.provider.asked))
        asked.cancel()
        await asyncio.wait([asked])
        gate.set()
    else:
        stream = await asked
        if moment == "begun":
            assert await anext(stream.chunks)
        await stream.chunks.aclose()
    again = await here.pipeline.stream(here.call(**KEY))
    assert words(await drained(again)) == "onetwo"
    assert again.facts.replayed
    assert here.at_rest


async def test_a_stream_that_is_cut_is_not_kept(house: Open) -> None:
    here = await house()
    here.provider.cut = ProviderError("cut")
    with pytest.raises(ProviderError, match="cut"):
        await drained(await here.pipeline.stream(here.call(**KEY)))
    here.provider.cut = None
    stream = await here.pipeline.stream(here.call(**KEY))
    assert words(await drained(stream)) == "onetwo"
    assert not stream.facts.replayed
    # Nor is one whose client had left when it was cut.
    here.provider.cut = ProviderError("cut")
    cut = await here.pipeline.stream(here.call(idempotency_key="left"))
    await cut.chunks.aclose()
    await until(lambda: here.system.once.stats()["carried"] == 0)
    here.provider.cut = None
    assert not (await here.pipeline.stream(here.call(idempotency_key="left"))).facts.replayed


async def test_a_hit_is_kept_too_and_the_cache_is_not_asked_again(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(here.call())
    hit = await here.pipeline.answer(here.call(**KEY))
    await here.system.cache.invalidate(None, None, None)
    again = await here.pipeline.answer(here.call(**KEY))
    assert (hit.facts.cache, hit.facts.replayed) == ("hit", False)
    assert (again.facts.cache, again.facts.saved_nano) == ("off", 7)
    streamed = await here.pipeline.stream(here.call(idempotency_key="s"))
    assert await drained(streamed)
    saved = await here.pipeline.stream(here.call(idempotency_key="s"))
    assert await drained(saved)
    assert saved.facts.saved_nano == 7


async def test_texts_are_answered_again(house: Open) -> None:
    here = await house()
    first = await here.pipeline.answer(here.texts("abc", **KEY))
    again = await here.pipeline.answer(here.texts("abc", **KEY))
    assert again.facts.replayed
    assert first.answer.array is not None
    assert again.answer.array is not None
    assert np.array_equal(again.answer.array, first.answer.array)
    assert len(here.provider.texts) == 1


async def test_warnings_and_clamps_are_told_again(house: Open) -> None:
    limits = {"tokens_per_minute": 300, "burst_size": 40}
    here = await house(rate_limit_config=limits)
    first = await here.pipeline.answer(here.call(max_tokens=4000, **KEY))
    again = await here.pipeline.answer(here.call(max_tokens=4000, **KEY))
    assert first.facts.clamped is not None
    assert again.facts.clamped == first.facts.clamped
    assert again.facts.warnings == first.facts.warnings != []


@pytest.mark.parametrize("counts", [True, False])
async def test_a_replay_counts_as_a_hit_does_and_uses_nothing(house: Open, counts: bool) -> None:
    limits = {"requests_per_minute": 60, "burst_size": 2, "enable_queuing": False}
    here = await house(rate_limit_config={**limits, "count_cache_hits": counts})
    for _ in range(2):
        await here.pipeline.answer(here.call(**KEY))
    if counts:
        with pytest.raises(GatewayError) as refused:
            await here.pipeline.answer(here.call(**KEY))
        assert refused.value.status == 429
    else:
        for _ in range(5):
            await here.pipeline.answer(here.call(**KEY))
    assert here.at_rest


async def test_with_the_ledger_away_nothing_is_called(house: Open) -> None:
    here = await house()

    class Away:
        name = "ledger"

        async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
            raise OwnerUnavailable(self.name, "it died")

    desk = here.system.once._desk
    there, desk._ref = desk._ref, Away()  # type: ignore[assignment]
    with pytest.raises(Overloaded, match="Idempotency-Key") as refused:
        await here.pipeline.answer(here.call(**KEY))
    assert (refused.value.status, refused.value.retry_after_s) == (503, 1.0)
    assert here.provider.asked == []
    desk._ref = there
    assert not (await here.pipeline.answer(here.call(**KEY))).facts.replayed


async def test_an_answer_that_cannot_be_kept_is_given_with_a_warning(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ANSWER_BYTES_MAX", 10)
    here = await house()
    for _ in range(2):
        result = await here.pipeline.answer(here.call(**KEY))
        assert not result.facts.replayed
        (warning,) = result.facts.warnings
        assert "is not kept" in warning
    assert here.system.once.stats()["not_kept"] == 2
    monkeypatch.undo()

    async def forgets(finish: Any) -> bool:
        return False

    monkeypatch.setattr(here.system._refs["ledger"].owner, "finish", forgets)  # type: ignore[attr-defined]
    result = await here.pipeline.answer(here.call(**KEY))
    assert "may be a call of its own" in result.facts.warnings[0]


@given(
    fails=st.lists(st.booleans(), max_size=4),
    leaves=st.lists(st.integers(0, 6), max_size=3),
    streams=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_one_good_call_is_all_there_is(fails: list[bool], leaves: list[int], streams: bool) -> None:
    """Clients of one key, some of whom leave at any moment, and a provider that fails at times."""

    async def ask(here: House) -> tuple[str, bool]:
        if streams:
            stream: Stream = await here.pipeline.stream(here.call(**KEY))
            return words(await drained(stream)), stream.facts.replayed
        result = await here.pipeline.answer(here.call(**KEY))
        return str(result.answer.body), result.facts.replayed

    async def work(directory: Path) -> None:
        here = await open_house(directory, max_retries=0, enable_circuit_breaker=False)
        here.provider.steps["openai/a"] = [
            ProviderError("no", upstream_status=500) if failing else None for failing in fails
        ]
        asked = []
        for after in (*leaves, None, None):
            task = asyncio.create_task(ask(here))
            if after is None:
                asked.append(task)
                continue
            await settle(after)
            task.cancel()
            await asyncio.wait([task])
        while True:
            told = await asyncio.gather(*asked, return_exceptions=True)
            good = [one for one in told if isinstance(one, tuple)]
            if good:
                break
            asked = [asyncio.create_task(ask(here))]
        good.append(await ask(here))
        totals = await here.system.books.usage()
        calls = len(here.provider.asked)
        assert len({text for text, _ in good}) == 1
        assert sum(not replayed for _, replayed in good) <= 1
        assert calls <= sum(fails) + 1
        assert totals["total_cost_nano"] == 7
        assert here.at_rest
        await here.system.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(work(Path(directory)))


# --- over HTTP and from Python ------------------------------------------------------------------

HI = [{"role": "user", "content": "hi"}]
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"model": "m", "messages": HI}),
    "stream": ("/v1/chat/completions", {"model": "m", "messages": HI, "stream": True}),
    "completion": ("/v1/completions", {"model": "m", "prompt": "hi"}),
    "texts": ("/v1/embeddings", {"model": "e", "input": ["a", "b"]}),
    "messages": ("/v1/messages", {"model": "m", "messages": HI, "max_tokens": 5}),
    "native": ("/api/v1/gateway/generate", {"model": "m", "prompt": "hi"}),
    "native stream": ("/api/v1/gateway/generate/stream", {"model": "m", "prompt": "hi"}),
    "native texts": ("/api/v1/gateway/embeddings", {"model": "e", "texts": ["a"]}),
}


def said(answered: Answered) -> Any:
    """What was answered, but for what is the request's own."""
    if not answered.headers["content-type"].startswith("application/json"):
        return b"one" in answered.body, b"two" in answered.body, b"[DONE]" in answered.body
    body = answered.json()
    return body["data"] | {"cost_usd": 0} if "data" in body and "success" in body else body


@pytest.mark.parametrize("path", PATHS)
async def test_over_http_every_route_answers_a_repeat(house: Open, path: str) -> None:
    here = await house()
    app = build_asgi(PipelineService(here.system, b"s" * 32, "127.0.0.1"))
    where, body = PATHS[path]

    async def post(body: dict[str, Any], key: str = "once") -> Answered:
        return await Client(app).post(where, body, idempotency_key=key)

    first, again = await post(body), await post(body)
    assert (first.status, again.status) == (200, 200)
    assert "x-forebay-idempotent-replay" not in first.headers
    assert again.headers["x-forebay-idempotent-replay"] == "true"
    assert again.headers["x-litellm-response-cost"] == "0"
    assert again.headers["x-forebay-attempts"] == "0"
    assert said(again) == said(first)
    assert len(here.provider.asked) == 1

    other = await post(body | ({"dimensions": 2} if "texts" in path else {"top_p": 0.5}))
    assert other.status == 409
    assert other.headers["x-should-retry"] == "false"
    assert "retry-after" not in other.headers
    assert b"Idempotency-Key" in other.body
    assert len(here.provider.asked) == 1


async def test_over_http_a_key_in_use_is_worth_another_try(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await house()
    app = build_asgi(PipelineService(here.system, b"s" * 32, "127.0.0.1"))
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    where, body = PATHS["chat"]
    leaving = Client(app)
    first = asyncio.create_task(leaving.post(where, body, idempotency_key="once"))
    await until(lambda: bool(here.provider.asked))
    with monkeypatch.context() as patch:
        patch.setattr(claims_room, "WAITERS_MAX", 0)
        busy = await Client(app).post(where, body, idempotency_key="once")
    assert (busy.status, busy.error["code"]) == (409, "idempotency_key_in_use")
    assert (busy.headers["retry-after"], busy.headers["retry-after-ms"]) == ("1", "1000")
    assert "x-should-retry" not in busy.headers
    # The first client hangs up, and comes again for its answer.
    leaving.leave.set()
    await first
    gate.set()
    again = await Client(app).post(where, body, idempotency_key="once")
    assert again.headers["x-forebay-idempotent-replay"] == "true"
    assert len(here.provider.asked) == 1


def test_from_python_a_key_is_a_keyword() -> None:
    call = Call.of("chat", {"messages": HI, "idempotency_key": "mine"})
    assert (call.idempotency_key, call.body) == ("mine", {"messages": HI})
    assert Call.of("chat", {"messages": HI, "idempotency_key": None}).idempotency_key is None
    longest = "x" * KEY_CHARS_MAX
    assert Call.of("chat", {"idempotency_key": longest}).idempotency_key == longest
    for wrong in ("", longest + "x", "a\nb", "ключ", 7, ["a"]):
        with pytest.raises(InvalidRequest, match="1 to 255 printable") as refused:
            Call.of("chat", {"messages": HI, "idempotency_key": wrong})
        assert refused.value.param == "idempotency_key"


def test_a_gateway_answers_a_repeat() -> None:
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{model}", "api_key": "k"}}
        for name, model in (("m", "a"), ("e", "text-embedding-x"))
    ]
    with LiteLLMGateway(GatewayConfig(model_list=models), runtime="inline") as gateway:
        gateway._system.provider = provider = Scripted()
        told = [gateway.generate("hi", "m", **KEY) for _ in range(2)]
        arrays = [gateway.embed(["a"], "e", idempotency_key="v").array.tolist() for _ in range(2)]
        streams = [
            list(gateway.generate("hi", "m", stream=True, idempotency_key="s")) for _ in range(2)
        ]
        with pytest.raises(InvalidRequest, match="another request body"):
            gateway.generate("hello", "m", **KEY)
    assert (told[0].text, told[0].id) == (told[1].text, told[1].id) == ("fine", "1")
    assert [one.cost_usd for one in told] == [7e-9, 0.0]
    assert arrays[0] == arrays[1]
    assert ["".join(one) for one in streams] == ["onetwo", "onetwo"]
    assert len(provider.asked) == 3


async def test_a_handle_answers_a_repeat(house: Open) -> None:
    here = await house()
    replica: Any = SimpleNamespace(_system=here.system)
    request = {"model": "m", "messages": HI, **KEY}
    first, again = [await Gateway.generate(replica, request) for _ in range(2)]
    chunks = [
        [chunk async for chunk in Gateway.stream(replica, request | {"idempotency_key": "s"})]
        for _ in range(2)
    ]
    vectors = [await Gateway.embed(replica, ["a"], "e", idempotency_key="v") for _ in range(2)]
    assert first == again
    assert words(chunks[0]) == words(chunks[1]) == "onetwo"
    assert vectors[0][0].tolist() == vectors[1][0].tolist()
    assert len(here.provider.asked) == 3
