"""The relay: when it is taken, what it hands back, how long it waits and whom it lets go."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from aiohttp import web

from forebay.config import GatewayConfig
from forebay.errors import ConfigurationError, GatewayTimeout, InvalidRequest, ProviderError
from forebay.providers.base import STALLED
from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels
from forebay.providers.relay.ear import EAR, Ear, listen
from forebay.providers.relay.events import RawChunk
from forebay.providers.relay.lanes import Lanes
from forebay.providers.relay.pool import Origin, Pool, Target
from forebay.providers.relay.rules import Rule
from forebay.routing import Deployment, ModelTable
from tests.support.two_lanes import (
    DONE,
    HELLO,
    KEY,
    STREAM,
    TwoLanes,
    Upstream,
    answer_for,
    as_json,
    chat,
    choice,
    chunk,
    events,
    sent_by,
)

HOW: dict[str, Any] = {"timeout_s": 10.0, "resolve": dict}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
async def two() -> AsyncIterator[TwoLanes]:
    upstream = Upstream()
    await upstream.start()
    two = TwoLanes(upstream)
    await two.warm()
    upstream.reply = answer_for("chat")
    yield two
    await two.close()
    await upstream.stop()


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "the-group", "messages": HELLO, **fields}


async def relays(two: TwoLanes, to: Deployment, body: dict[str, Any], resolve: Any = dict) -> bool:
    """Whether a call takes the relay, LiteLLM having been asked once if it had to be."""
    await two.lanes.chat(to, body, timeout_s=10.0, resolve=resolve)
    before = two.lanes.relayed
    await two.lanes.chat(to, body, timeout_s=10.0, resolve=resolve)
    return two.lanes.relayed > before


# --- which lane ---------------------------------------------------------------------------------


async def test_the_first_request_of_a_form_is_litellms(two: TwoLanes) -> None:
    to = two.deployment("openai")
    for body in (asked(), asked(), asked(temperature=0.3), asked(temperature=0.7)):
        await two.lanes.chat(to, body, **HOW)
    assert two.lanes.relayed == 2
    other = [{"role": "user", "content": "Something else, and more of it"}]
    await two.lanes.chat(to, asked(messages=other, temperature=0.9), **HOW)
    assert two.lanes.relayed == 3


async def test_a_crowd_waits_for_one_lesson(two: TwoLanes) -> None:
    to = two.deployment("openai")
    calls = [two.lanes.chat(to, asked(), **HOW) for _ in range(20)]
    answers = await asyncio.gather(*calls)
    assert len(answers) == len(two.upstream.received) == 20
    assert two.lanes.relayed == 19


async def test_a_lesson_that_fails_is_somebody_elses(two: TwoLanes) -> None:
    to = two.deployment("openai")
    refused = asked(verbosity="low")  # LiteLLM sends nothing
    calls = [two.lanes.chat(to, refused, **HOW) for _ in range(5)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(one) for one in found} == {InvalidRequest}
    assert two.lanes._lessons.under_way == 0
    assert await relays(two, to, asked())


async def test_calls_are_counted_by_the_lane_they_took(two: TwoLanes) -> None:
    to = two.deployment("openai")
    for _ in range(3):
        await two.lanes.chat(to, asked(), **HOW)
    two.upstream.reply = as_json({"odd": True})
    with pytest.raises(ProviderError):  # LiteLLM reads it, and asks nobody
        await two.lanes.chat(to, asked(), **HOW)
    assert two.lanes.figures() == {
        ("forebay_lane_calls", to.circuit, "litellm"): (1,),
        ("forebay_lane_calls", to.circuit, "relay"): (3,),
    }


async def test_what_has_no_form_is_litellms(two: TwoLanes) -> None:
    to = two.deployment("openai", allowed_openai_params=["top_k"])
    assert not await relays(two, to, asked(top_k=3))
    assert not await relays(two, to, asked(seed=2**70))
    assert await relays(two, to, asked())


async def test_a_number_that_json_cannot_hold_is_left_to_litellm(two: TwoLanes) -> None:
    to = two.deployment("openai")
    assert await relays(two, to, asked(seed=7))
    before = two.lanes.relayed
    await two.lanes.chat(to, asked(seed=2**70), **HOW)
    assert two.lanes.relayed == before


@pytest.mark.parametrize(
    ("server", "own", "provider", "relayed"),
    [
        ("auto", None, "openai", True),
        ("litellm", None, "openai", False),
        ("auto", "litellm", "openai", False),
        ("litellm", "auto", "openai", True),
        ("auto", None, "xai", False),
        ("relay", None, "xai", True),
        ("auto", "relay", "xai", True),
    ],
)
async def test_a_deployments_own_lane_goes_before_the_servers(
    two: TwoLanes, server: Any, own: str | None, provider: str, relayed: bool
) -> None:
    two.lanes.lane = server
    params = {} if own is None else {"lane": own}
    to = two.deployment(provider, f"{provider}/grok-3", **params)
    assert await relays(two, to, asked()) is relayed
    assert all("lane" not in body for _, _, body in two.upstream.received)


def test_a_lane_tells_deployments_apart_that_mean_the_same() -> None:
    params = {"model": "openai/gpt-4o", "api_key": "os.environ/KEY"}
    entries = [{"model_name": "a", "litellm_params": params}]
    entries += [{"model_name": "b", "litellm_params": {**params, "lane": "litellm"}}]
    one, other = ModelTable.build(GatewayConfig(model_list=entries)).deployments()
    assert one.meaning == other.meaning
    assert other.id == f"{one.id}-litellm"
    assert other.params["lane"] == "litellm"


async def test_parameters_whose_meaning_may_change_keep_it_with_litellm(two: TwoLanes) -> None:
    assert not await relays(two, two.deployment("openai", mock_response="Hi"), asked())
    assert not await relays(two, two.deployment("openai", tags=["a"], metadata_x=1), asked())


async def test_a_callers_name_for_a_place_is_refused(two: TwoLanes) -> None:
    with pytest.raises(InvalidRequest):
        await two.lanes.chat(two.deployment("openai"), asked(api_base="http://x"), **HOW)


async def test_another_key_is_learnt_anew(two: TwoLanes) -> None:
    key = "sk-the-first-key-1"

    def resolve(params: Any) -> dict[str, Any]:
        return {**params, "api_key": key}

    to = two.deployment("openai")
    assert await relays(two, to, asked(), resolve)
    key = "sk-the-second-key-2"
    assert await relays(two, to, asked(), resolve)
    sent = [headers["authorization"] for _, headers, _ in two.upstream.received]
    assert sent == ["Bearer sk-the-first-key-1"] * 2 + ["Bearer sk-the-second-key-2"] * 2


async def test_a_provider_that_knows_us_no_more_is_asked_for_by_litellm(two: TwoLanes) -> None:
    to = two.deployment("openai")
    assert await relays(two, to, asked())
    two.upstream.reply = as_json({"error": {"message": "no"}}, 401)
    with pytest.raises(ProviderError):
        await two.lanes.chat(to, asked(), **HOW)
    two.upstream.reply = answer_for("chat")
    before = two.lanes.relayed
    await two.lanes.chat(to, asked(), **HOW)
    assert two.lanes.relayed == before


async def test_a_provider_that_has_moved_is_followed_by_litellm(two: TwoLanes) -> None:
    to = two.deployment("openai")
    assert await relays(two, to, asked())
    good = answer_for("chat")

    async def moved(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if request.path.startswith("/v2"):
            return await good(request, body)
        raise web.HTTPTemporaryRedirect("/v2/chat/completions")

    two.upstream.reply = moved
    for _ in range(2):
        answer = await two.lanes.chat(to, asked(), **HOW)
        assert answer.body["choices"][0]["message"]["content"] == "Hello!"


async def test_a_missing_secret_is_said_as_it_is(two: TwoLanes) -> None:
    def resolve(_: Any) -> dict[str, Any]:
        raise ConfigurationError("OPENAI_API_KEY is not set")

    with pytest.raises(ConfigurationError):
        await two.lanes.chat(two.deployment("openai"), asked(), timeout_s=1.0, resolve=resolve)


async def test_what_is_known_has_a_bound(two: TwoLanes) -> None:
    two.lanes = Lanes(two.litellm, forms_max=3, deployments_max=2)
    for number in range(8):
        to = two.deployment("openai", f"openai/gpt-{number % 4}")
        assert await relays(two, to, asked(stop=str(number)))
        assert len(two.lanes._lessons) <= 3
        assert len(two.lanes._known) <= 2


def test_rules_do_not_show_their_key() -> None:
    headers = {b"authorization": KEY.encode()}
    target = Target.of(Origin("a", 80, None), b"/v1/chat/completions", headers)
    assert KEY.encode() in target.head
    assert KEY not in repr(Rule(target, {}, frozenset(), {}, bare=False))


# --- answers ------------------------------------------------------------------------------------


async def test_an_answer_goes_back_as_it_came(two: TwoLanes) -> None:
    to = two.deployment("openai")
    data = b'{ "usage":{"total_tokens":3,"prompt_tokens":2,"completion_tokens":1},\n "model":"m",'
    data += b'"id":"c","x":1.50,"choices":[{"index":0,"finish_reason":"stop","message":'
    data += b'{"role":"assistant","content":"\\u0041"}}]}'

    async def reply(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(body=data, content_type="application/json")

    await two.lanes.chat(to, asked(), **HOW)
    two.upstream.reply = reply
    answer = await two.lanes.chat(to, asked(), **HOW)
    assert answer.json == data
    assert answer.body["choices"][0]["message"]["content"] == "A"
    assert (answer.id, answer.model, answer.usage) == ("c", "m", answer.body["usage"])


async def test_a_packed_answer_is_unpacked(two: TwoLanes) -> None:
    to = two.deployment("openai")

    async def reply(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.json_response(chat())
        response.enable_compression(web.ContentCoding.gzip)
        return response

    await two.lanes.chat(to, asked(), **HOW)
    two.upstream.reply = reply
    answer = await two.lanes.chat(to, asked(), **HOW)
    assert two.lanes.relayed == 1
    assert answer.json is not None
    assert orjson.loads(answer.json) == chat()


async def test_one_pool_serves_all_calls(two: TwoLanes) -> None:
    ports: set[Any] = set()
    good = answer_for("chat")

    async def reply(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername"))
        return await good(request, body)

    to = two.deployment("openai")
    for body in (asked(), asked(**USAGE)):
        await relays_any(two, to, body)
    two.upstream.reply = reply
    for timeout_s in (9.0, 8.5, 8.1):
        await two.lanes.chat(to, asked(), timeout_s=timeout_s, resolve=dict)
        chunks = two.lanes.chat_stream(to, asked(**USAGE), timeout_s=timeout_s, resolve=dict)
        assert [one async for one in chunks]
    assert len(ports) == 1


async def relays_any(two: TwoLanes, to: Deployment, body: dict[str, Any]) -> None:
    """Let LiteLLM show what it makes of a request."""
    if body.get("stream"):
        assert [one async for one in two.lanes.chat_stream(to, body, **HOW)]
    else:
        await two.lanes.chat(to, body, **HOW)


# --- time, and who goes -------------------------------------------------------------------------


async def slow(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError


async def test_a_deadline_ends_the_call_upstream_too(two: TwoLanes) -> None:
    to = two.deployment("openai")
    await two.lanes.chat(to, asked(), **HOW)
    two.upstream.reply = slow
    with pytest.raises(GatewayTimeout) as caught:
        await two.lanes.chat(to, asked(), timeout_s=0.05, resolve=dict)
    assert (caught.value.provider, caught.value.model) == ("openai", "the-group")
    await asyncio.wait_for(two.upstream.gone.wait(), 5)


async def test_a_deployments_own_timeout_is_kept(two: TwoLanes) -> None:
    to = two.deployment("openai", timeout=0.05)
    two.upstream.reply = answer_for("chat")
    await two.lanes.chat(to, asked(), **HOW)
    two.upstream.reply = slow
    with pytest.raises(GatewayTimeout):
        await two.lanes.chat(to, asked(), **HOW)
    assert two.lanes.relayed == 1


async def test_a_cancelled_call_ends_upstream(two: TwoLanes) -> None:
    to = two.deployment("openai")
    await two.lanes.chat(to, asked(), **HOW)
    two.upstream.reply = slow
    calling = asyncio.create_task(two.lanes.chat(to, asked(), **HOW))
    while len(two.upstream.received) < 2:
        await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await asyncio.wait_for(two.upstream.gone.wait(), 5)


async def test_a_closed_stream_ends_upstream(two: TwoLanes) -> None:
    to = two.deployment("openai")
    await relays_any(two, to, asked(**USAGE))
    two.upstream.reply = events(STREAM["chat"][:2], "stall")
    chunks = two.lanes.chat_stream(to, asked(**USAGE), **HOW)
    await anext(chunks)
    await chunks.aclose()
    await asyncio.wait_for(two.upstream.gone.wait(), 5)
    assert two.lanes.relayed == 1
    assert [one async for one in chunks] == []


async def test_a_stream_that_falls_silent_is_over(two: TwoLanes) -> None:
    to = two.deployment("openai")
    await relays_any(two, to, asked(**USAGE))
    two.upstream.reply = events(STREAM["chat"][:2], "stall")
    chunks = two.lanes.chat_stream(to, asked(**USAGE), stall_s=0.05, **HOW)
    with pytest.raises(GatewayTimeout) as caught:
        assert [one async for one in chunks]
    assert caught.value.code == STALLED
    await asyncio.wait_for(two.upstream.gone.wait(), 5)


async def test_an_error_while_a_stream_opens_lets_the_connection_go(two: TwoLanes) -> None:
    to = two.deployment("openai")
    await relays_any(two, to, asked(**USAGE))
    two.upstream.reply = as_json({"error": {"message": "Busy", "type": "t"}}, 503)
    with pytest.raises(ProviderError) as caught:
        await anext(two.lanes.chat_stream(to, asked(**USAGE), **HOW))
    assert caught.value.upstream_status == 503
    assert two.lanes._pool().busy == 0


async def test_more_than_one_answer_may_hold_is_refused(two: TwoLanes) -> None:
    two.lanes = Lanes(two.litellm, answer_bytes_max=1 << 20)
    to = two.deployment("openai")
    await two.lanes.chat(to, asked(), **HOW)
    two.upstream.reply = as_json(chat(choices=[choice(content="x" * (2 << 20))]))
    with pytest.raises(ProviderError, match="more than"):
        await two.lanes.chat(to, asked(), **HOW)


def test_an_event_loop_that_is_closed_keeps_no_connections() -> None:
    lanes = Lanes(LiteLLMProvider(InProcessModels()))

    async def pool() -> Pool:
        assert lanes._pool() is lanes._pool()
        return lanes._pool()

    first, second = asyncio.run(pool()), asyncio.run(pool())
    assert first is not second
    assert list(lanes._pools.values()) == [second]


# --- chunks as they came ------------------------------------------------------------------------


async def test_chunks_keep_the_bytes_they_came_in(two: TwoLanes) -> None:
    to = two.deployment("openai")
    await relays_any(two, to, asked(**USAGE))
    two.upstream.reply = reply = events(STREAM["chat"])
    got = [one async for one in two.lanes.chat_stream(to, asked(**USAGE), **HOW)]
    assert [orjson.loads(one.json) for one in got if isinstance(one, RawChunk)] == sent_by(reply)


@pytest.mark.parametrize(
    ("json", "with_usage", "without"),
    [
        (
            b'{"id":"c","choices":[]}',
            b'{"id":"c","choices":[],"usage":null}',
            b'{"id":"c","choices":[]}',
        ),
        (
            b'{"id":"c", "usage" : null,"choices":[]}',
            b'{"id":"c", "usage" : null,"choices":[]}',
            b'{"id":"c","choices":[]}',
        ),
        (
            b'{"usage":null,"id":"c"}',
            b'{"usage":null,"id":"c"}',
            b'{"id":"c"}',
        ),
        (
            b'{"id":"c","usage":{"total_tokens":3}}',
            b'{"id":"c","usage":{"total_tokens":3}}',
            b'{"id":"c"}',
        ),
        (
            b'{"text":",\\"usage\\":null"}',
            b'{"text":",\\"usage\\":null","usage":null}',
            b'{"text":",\\"usage\\":null"}',
        ),
        (
            b'{"x":{"a":1,"usage":null},"id":"c","usage":null}',
            b'{"x":{"a":1,"usage":null},"id":"c","usage":null}',
            b'{"x":{"a":1,"usage":null},"id":"c"}',
        ),
    ],
)
def test_usage_is_told_to_who_asks(json: bytes, with_usage: bytes, without: bytes) -> None:
    fields = orjson.loads(json)
    if fields.get("usage", ...) is None:
        del fields["usage"]
    one = RawChunk(fields, json)
    assert one.told(with_usage=True) == with_usage
    assert one.told(with_usage=False) == without


async def test_mistrals_parts_are_words(two: TwoLanes) -> None:
    to = two.deployment("openai")
    await relays_any(two, to, asked(**USAGE))
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    parts = [thought, {"type": "text", "text": "Hi"}]
    two.upstream.reply = events([chunk({"content": parts}), chunk({}, "stop"), DONE])
    to = two.deployment("mistral")
    await relays_any_stream(two, to)
    got = [one async for one in two.lanes.chat_stream(to, asked(**USAGE), **HOW)]
    delta = got[0]["choices"][0]["delta"]
    assert (delta["content"], delta["reasoning_content"]) == ("Hi", "Hm.")
    assert two.lanes.relayed == 1


async def relays_any_stream(two: TwoLanes, to: Deployment) -> None:
    before, two.upstream.reply = two.upstream.reply, answer_for("chat")
    await relays_any(two, to, asked(**USAGE))
    two.upstream.reply = before


# --- the ear ------------------------------------------------------------------------------------


async def test_a_transport_is_listened_to_once() -> None:
    import httpx

    class Transport:
        calls = 0
        _ssl_verify = None

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            type(self).calls += 1
            return httpx.Response(200)

        async def _get_proxy_settings(self, request: httpx.Request) -> str | None:
            return "http://proxy"

    listen(Transport)
    listen(Transport)
    request = httpx.Request("POST", "http://a")
    await Transport().handle_async_request(request)
    ear = Ear()
    token = EAR.set(ear)
    await Transport().handle_async_request(request)
    assert (Transport.calls, ear.heard, ear.proxied) == (2, 1, True)
    told = Ear(httpx.Response(418))
    EAR.set(told)
    assert (await Transport().handle_async_request(request)).status_code == 418
    with pytest.raises(httpx.ConnectError):
        await Transport().handle_async_request(request)
    assert Transport.calls == 2
    EAR.reset(token)


def test_importing_the_lanes_imports_neither_litellm_nor_aiohttp() -> None:
    script = "import sys, forebay.providers.relay.lanes; "
    script += "assert not {'litellm', 'aiohttp', 'openai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_litellms_transport_is_the_one_that_is_listened_to() -> None:
    name = "litellm.llms.custom_httpx.aiohttp_transport"
    transport = importlib.import_module(name).LiteLLMAiohttpTransport
    assert hasattr(transport, "handle_async_request")
    assert hasattr(transport, "_get_proxy_settings")
