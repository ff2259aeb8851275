"""The LiteLLM lane, against a small upstream in this very process that notices everything."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from actors.batcher.policy import Paid, Room
from actors.circuit_breaker.policy import Verdict
from forebay.errors import (
    ConfigurationError,
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    ModelNotFound,
    ProviderConnectionError,
    ProviderError,
    RateLimitError,
    RequestTooLarge,
    ResponseValidationError,
)
from forebay.providers.base import MODEL_REFUSED, NO_BASE64, verdict_of
from forebay.providers.embedded import register
from forebay.providers.encodings import PROBED, TRUSTED
from forebay.providers.litellm import LiteLLMProvider, prepare_environment
from forebay.providers.local import InProcessModels
from forebay.routing import Deployment

KEY = "sk-do-not-show-this-4711"
SOON_S = 5.0  # on a busy machine; whoever waited for the reply would wait for a minute
MESSAGES = [{"role": "user", "content": "Hello there"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

Reply = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class Remote:
    """Answers every request with `reply`, and keeps what it saw."""

    def __init__(self) -> None:
        self.reply: Reply = json_reply(chat_answer())
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.connections: set[Any] = set()
        self.gone = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.paths.append(request.path)
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        try:
            return await self.reply(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise


@pytest.fixture
async def remote() -> AsyncIterator[Remote]:
    remote = Remote()
    app = web.Application()
    app.router.add_post("/{path:.*}", remote.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    remote.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    yield remote
    await runner.cleanup()


@pytest.fixture
async def lane() -> AsyncIterator[LiteLLMProvider]:
    lane = LiteLLMProvider(InProcessModels())
    await lane.warm()
    yield lane
    await lane.close()


def deployment(
    remote: Remote, model: str = "openai/gpt-4o-mini", info: Any = None, **params: Any
) -> Deployment:
    provider = model.partition("/")[0]
    base = remote.url + ("" if provider == "anthropic" else "/v1")
    params = {"api_base": base, "api_key": KEY, **params}
    return Deployment(
        id=f"{model}-{sorted(params)}",
        group="the-group",
        model=model,
        provider=provider,
        params=params,
        info=info or {},
    )


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "the-group", "messages": MESSAGES, **fields}


def call(**fields: Any) -> dict[str, Any]:
    return {"timeout_s": 10.0, "resolve": dict, **fields}


def chat_answer(**message: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None, **message},
                "logprobs": None,
                "finish_reason": "tool_calls" if "tool_calls" in message else "stop",
            }
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }


def json_reply(answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    async def reply(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(answer, status=status, headers=headers)

    return reply


def error_reply(status: int, message: str, **fields: Any) -> Reply:
    headers = fields.pop("headers", None)
    return json_reply({"error": {"message": message, **fields}}, status, headers)


def chunk(delta: dict[str, Any], finish_reason: str | None = None, **fields: Any) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return sse({**_CHUNK, "choices": [choice], **fields})


def sse(data: Any) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


_CHUNK = {"id": "c1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"}
WORDS = [chunk({"role": "assistant", "content": ""}), chunk({"content": "Hel"})]
WORDS += [chunk({"content": "lo"})]
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
END = [chunk({}, "stop"), sse({**_CHUNK, "choices": [], "usage": USAGE}), sse("[DONE]")]


def stream_reply(parts: list[str], then: str = "end", content_type: str = "") -> Reply:
    """Server-sent events; `then` the stream ends, stalls, or the connection is cut."""

    async def reply(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part.encode())
        if then == "stall":
            await asyncio.sleep(60)
        if then == "cut":
            assert request.transport is not None
            request.transport.abort()
        return response

    return reply


async def slow_reply(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for told in chunks for choice in told["choices"]
    )


# --- one answer -------------------------------------------------------------------------------


async def test_an_answer_is_plain_openai_json(remote: Remote, lane: LiteLLMProvider) -> None:
    answer = await lane.chat(deployment(remote), body(temperature=0.5), **call())
    assert answer.body == json.loads(json.dumps(answer.body))
    assert answer.body["choices"] == chat_answer()["choices"]
    assert answer.model == "gpt-4o-mini-2024-07-18"
    assert answer.usage == answer.body["usage"]
    assert answer.usage is not None
    assert answer.usage["prompt_tokens"] == 1000
    assert not {"_hidden_params", "_response_ms"} & set(answer.body)


async def test_the_provider_gets_what_was_asked_and_our_key(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    asked = body(temperature=0.5, max_tokens=9, seed=3, user="u", metadata={"tag": "x"})
    await lane.chat(deployment(remote), asked, **call())
    assert remote.bodies == [
        {
            "model": "gpt-4o-mini",
            "messages": MESSAGES,
            "temperature": 0.5,
            "max_tokens": 9,
            "seed": 3,
            "user": "u",
        }
    ]
    assert remote.headers[0]["Authorization"] == f"Bearer {KEY}"


async def test_metadata_goes_with_what_openai_is_to_store(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    await lane.chat(deployment(remote), body(store=True, metadata={"tag": "x"}), **call())
    assert remote.bodies[0]["metadata"] == {"tag": "x"}


async def test_a_deployments_defaults_yield_to_the_caller(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    own = deployment(remote, temperature=0.1, max_tokens=5)
    await lane.chat(own, body(temperature=0.9), **call())
    assert remote.bodies[0]["temperature"] == 0.9
    assert remote.bodies[0]["max_tokens"] == 5


@pytest.mark.parametrize("name", ["api_base", "API-KEY", "extra_headers", "mock_response"])
async def test_a_body_cannot_say_where_or_as_whom(
    remote: Remote, lane: LiteLLMProvider, name: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await lane.chat(deployment(remote), body(**{name: "x"}), **call())
    assert caught.value.param == name
    assert remote.bodies == []


async def test_what_was_asked_is_only_read(remote: Remote, lane: LiteLLMProvider) -> None:
    part = {"type": "file", "file": {"file_id": "file-1"}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}}
    asked = body(messages=[{"role": "user", "content": [part]}], tools=[tool])
    before = json.dumps(asked)
    for model in ("mistral/mistral-small-latest", "hosted_vllm/m", "openai/gpt-4o-mini"):
        with contextlib.suppress(GatewayError):
            await lane.chat(deployment(remote, model), asked, **call())
    assert json.dumps(asked) == before


async def test_a_missing_secret_is_said_as_it_is(remote: Remote, lane: LiteLLMProvider) -> None:
    def resolve(_: Any) -> dict[str, Any]:
        raise ConfigurationError("OPENAI_API_KEY is not set")

    with pytest.raises(ConfigurationError):
        await lane.chat(deployment(remote), body(), **call(resolve=resolve))
    with pytest.raises(ConfigurationError):
        await anext(lane.chat_stream(deployment(remote), body(), **call(resolve=resolve)))


async def test_tool_calls_come_through_intact(remote: Remote, lane: LiteLLMProvider) -> None:
    calls = [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
        }
    ]
    remote.reply = json_reply(chat_answer(content=None, tool_calls=calls))
    answer = await lane.chat(deployment(remote), body(tools=TOOLS, tool_choice="auto"), **call())
    assert remote.bodies[0]["tools"] == TOOLS
    choice = answer.body["choices"][0]
    assert choice["message"]["tool_calls"] == calls
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


async def test_one_pool_serves_calls_of_every_deadline(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    for timeout_s in (9.0, 8.5, 8.123, 7.9, 6.01):
        await lane.chat(deployment(remote), body(), **call(timeout_s=timeout_s))
    assert len(remote.bodies) == 5
    assert len(remote.connections) == 1


async def test_texts_share_connections_too(remote: Remote, lane: LiteLLMProvider) -> None:
    choices = [
        {"index": n, "text": t, "logprobs": None, "finish_reason": "stop"}
        for n, t in enumerate(("one", "two"))
    ]
    told = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
    remote.reply = json_reply({**told, "choices": choices, "usage": USAGE})
    instruct = deployment(remote, "openai/gpt-3.5-turbo-instruct")
    vllm = deployment(remote, "hosted_vllm/gpt-3.5-turbo-instruct")
    await lane.completion(vllm, {"prompt": ["a", "b"], "max_tokens": 2}, **call())
    for _ in range(3):
        answer = await lane.completion(instruct, {"prompt": ["a", "b"], "max_tokens": 2}, **call())
    assert answer.body["choices"] == choices
    assert answer.cost_nano == 7 * 1500 + 2 * 2000
    assert remote.paths == ["/v1/completions"] * 4
    assert remote.bodies[1] == remote.bodies[0]
    assert remote.bodies[0] == {
        "model": "gpt-3.5-turbo-instruct",
        "prompt": ["a", "b"],
        "max_tokens": 2,
    }
    assert len(remote.connections) == 1


async def test_several_prompts_are_refused_where_they_would_be_melted_into_one(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await lane.completion(deployment(remote), {"prompt": ["a", "b"]}, **call())
    assert caught.value.param == "prompt"
    answer = await lane.completion(deployment(remote), {"prompt": ["a"]}, **call())
    assert answer.body["choices"][0]["text"] == "Hello!"


# --- money ------------------------------------------------------------------------------------


async def test_listed_models_have_litellms_price(remote: Remote, lane: LiteLLMProvider) -> None:
    answer = await lane.chat(deployment(remote), body(), **call())
    assert answer.cost_nano == 1000 * 150 + 100 * 600
    assert lane.price(deployment(remote), answer.usage) == answer.cost_nano


async def test_an_unknown_price_is_none_and_not_zero(remote: Remote, lane: LiteLLMProvider) -> None:
    answer = chat_answer() | {"model": "nobody-knows"}
    remote.reply = json_reply(answer)
    unknown = deployment(remote, "openai/nobody-knows")
    assert (await lane.chat(unknown, body(), **call())).cost_nano is None
    assert lane.price(unknown, answer["usage"]) is None


async def test_usage_that_nobody_reported_is_estimated_and_not_free(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    answer = chat_answer(content="x" * 400)
    del answer["usage"]
    remote.reply = json_reply(answer)
    told = await lane.chat(deployment(remote), body(), **call())
    assert told.estimated
    assert told.usage is not None
    assert told.usage["completion_tokens"] == 100
    assert told.usage["estimated"] is True
    assert told.cost_nano is not None
    assert told.cost_nano >= 100 * 600


async def test_own_prices_count_and_stay_out_of_litellms_list(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    own = deployment(remote, input_cost_per_token=2e-6, output_cost_per_token="0.000003")
    answer = await lane.chat(own, body(), **call())
    assert answer.cost_nano == 1000 * 2000 + 100 * 3000
    plain = await lane.chat(deployment(remote), body(), **call())
    assert plain.cost_nano == 1000 * 150 + 100 * 600
    assert "input_cost_per_token" not in remote.bodies[0]


# --- streams ----------------------------------------------------------------------------------


async def test_a_stream_gives_chunks_and_calls_at_the_first(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = stream_reply([*WORDS, *END])
    asked = body(stream=True, stream_options={"include_usage": True})
    chunks = lane.chat_stream(deployment(remote), asked, **call())
    assert remote.bodies == []
    told = [one async for one in chunks]
    assert text_of(told) == "Hello"
    assert told[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["finish_reason"] for one in told for c in one["choices"]][-1] == "stop"
    assert told[-1]["choices"] == []
    assert {n: told[-1]["usage"][n] for n in USAGE} == USAGE
    assert "estimated" not in told[-1]["usage"]
    assert all(one["object"] == "chat.completion.chunk" for one in told)
    assert told == json.loads(json.dumps(told))
    assert remote.bodies[0]["stream_options"] == {"include_usage": True}
    assert [one async for one in chunks] == []


async def test_usage_that_the_provider_did_not_give_is_marked(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = stream_reply([*WORDS, chunk({}, "stop"), sse("[DONE]")])
    asked = body(stream_options={"include_usage": True})
    told = [one async for one in lane.chat_stream(deployment(remote), asked, **call())]
    assert told[-1]["usage"]["estimated"] is True


async def test_streamed_tool_calls_come_in_pieces(remote: Remote, lane: LiteLLMProvider) -> None:
    first = {"index": 0, "id": "call_1", "type": "function"}
    parts = [
        chunk({"role": "assistant", "content": None}),
        chunk({"tool_calls": [{**first, "function": {"name": "weather", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"Ulm"}'}}]}),
        chunk({}, "tool_calls"),
        sse("[DONE]"),
    ]
    remote.reply = stream_reply(parts)
    asked = body(tools=TOOLS)
    told = [one async for one in lane.chat_stream(deployment(remote), asked, **call())]
    calls = [c for one in told for c in one["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["id"] == "call_1"
    assert "".join(c["function"].get("arguments", "") for c in calls) == '{"city":"Ulm"}'
    assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"


ANTHROPIC = [
    f"event: {event['type']}\n" + sse(event)
    for event in (
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "claude-3-5-haiku-20241022",
                "content": [],
                "stop_reason": None,
                "usage": {"input_tokens": 7, "output_tokens": 1},
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "Hello"},
        },
    )
]
TEXT_CHUNKS = [
    sse({"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})
    for choice in ({"index": 0, "text": "Hel", "finish_reason": None, "logprobs": None},)
]


@pytest.mark.parametrize("kind", ["chat", "text", "anthropic"])
async def test_closing_a_stream_closes_the_upstream_connection(
    remote: Remote, lane: LiteLLMProvider, kind: str
) -> None:
    if kind == "chat":
        remote.reply = stream_reply(WORDS, "stall")
        chunks = lane.chat_stream(deployment(remote), body(), **call())
    elif kind == "text":
        remote.reply = stream_reply(TEXT_CHUNKS, "stall")
        instruct = deployment(remote, "openai/gpt-3.5-turbo-instruct")
        chunks = lane.completion_stream(instruct, {"prompt": "Hi"}, **call())
    else:
        remote.reply = stream_reply(ANTHROPIC, "stall")
        claude = deployment(remote, "anthropic/claude-3-5-haiku-20241022")
        chunks = lane.chat_stream(claude, body(max_tokens=5), **call())
    first = await anext(chunks)
    assert first["choices"]
    async with asyncio.timeout(SOON_S):
        await chunks.aclose()
        await remote.gone.wait()
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)
    await chunks.aclose()


async def test_cancelling_who_waits_for_a_chunk_closes_the_connection(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = stream_reply(WORDS[1:], "stall")
    chunks = lane.chat_stream(deployment(remote), body(), **call())
    await anext(chunks)
    await anext(chunks)
    waiting = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(remote.gone.wait(), SOON_S)


async def test_cancelling_a_call_closes_the_connection(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = slow_reply
    waiting = asyncio.ensure_future(lane.chat(deployment(remote), body(), **call()))
    while not remote.bodies:
        await asyncio.sleep(0.005)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(remote.gone.wait(), SOON_S)


async def test_a_stream_that_another_task_closes_is_over(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = stream_reply(WORDS[1:2], "stall")
    chunks = lane.chat_stream(deployment(remote), body(), **call())
    await anext(chunks)
    waiting = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0.02)
    await chunks.aclose()
    await asyncio.wait_for(remote.gone.wait(), SOON_S)
    with pytest.raises((StopAsyncIteration, GatewayError)):
        await asyncio.wait_for(waiting, SOON_S)


@pytest.mark.parametrize(
    ("parts", "then", "expected", "verdict"),
    [
        pytest.param(
            WORDS, "cut", ProviderConnectionError, Verdict.UNREACHABLE, id="connection cut"
        ),
        pytest.param(
            WORDS, "end", ProviderConnectionError, Verdict.UNREACHABLE, id="no finish reason"
        ),
        pytest.param(
            [*WORDS, sse({"error": {"message": "boiler burst", "type": "server_error"}})],
            "end",
            ProviderError,
            Verdict.FAILURE,
            id="error event",
        ),
        pytest.param(
            [*WORDS, sse({"error": {"message": "slow down", "code": "rate_limit_exceeded"}})],
            "end",
            RateLimitError,
            Verdict.THROTTLED,
            id="limit event",
        ),
    ],
)
async def test_a_stream_that_breaks_raises_what_happened(
    remote: Remote,
    lane: LiteLLMProvider,
    parts: list[str],
    then: str,
    expected: type[GatewayError],
    verdict: Verdict,
) -> None:
    remote.reply = stream_reply(parts, then)
    told = []
    with pytest.raises(expected) as caught:
        async for one in lane.chat_stream(deployment(remote), body(), **call()):
            told.append(one)
    assert text_of(told) == "Hello"
    assert verdict_of(caught.value) is verdict
    assert len(remote.bodies) == 1


async def test_a_stream_that_stalls_ends_at_its_deadline(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = stream_reply(WORDS[1:2], "stall")
    chunks = lane.chat_stream(deployment(remote), body(), **call(timeout_s=0.3))
    await anext(chunks)
    with pytest.raises(GatewayTimeout):
        await anext(chunks)
    await asyncio.wait_for(remote.gone.wait(), SOON_S)


# --- failures ---------------------------------------------------------------------------------


async def test_a_slow_answer_is_given_up_in_time(remote: Remote, lane: LiteLLMProvider) -> None:
    remote.reply = slow_reply
    async with asyncio.timeout(SOON_S):
        with pytest.raises(GatewayTimeout) as caught:
            await lane.chat(deployment(remote), body(), **call(timeout_s=0.2))
    assert verdict_of(caught.value) is Verdict.UNREACHABLE
    with pytest.raises(GatewayTimeout):
        await lane.chat(deployment(remote, timeout=0.2), body(), **call())


async def test_nobody_at_the_address_is_a_connection_failure(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    nowhere = deployment(remote, api_base="http://127.0.0.1:9/v1")
    for attempt in (
        lambda: lane.chat(nowhere, body(), **call()),
        lambda: anext(lane.chat_stream(nowhere, body(), **call())),
        lambda: lane.embed(nowhere, ["a"], {}, **call()),
    ):
        with pytest.raises(ProviderConnectionError) as caught:
            await attempt()
        assert caught.value.provider == "openai"
        assert "Traceback" not in str(caught.value)
        assert verdict_of(caught.value) is Verdict.UNREACHABLE


@pytest.mark.parametrize(
    ("status", "expected", "ours", "verdict"),
    [
        (400, InvalidRequest, 400, Verdict.IGNORED),
        (401, ProviderError, 502, Verdict.CREDENTIAL),
        (402, ProviderError, 502, Verdict.CREDENTIAL),
        (403, ProviderError, 502, Verdict.CREDENTIAL),
        (404, ModelNotFound, 404, Verdict.IGNORED),
        (408, GatewayTimeout, 504, Verdict.UNREACHABLE),
        (413, RequestTooLarge, 413, Verdict.IGNORED),
        (418, InvalidRequest, 400, Verdict.IGNORED),
        (422, InvalidRequest, 422, Verdict.IGNORED),
        (429, RateLimitError, 429, Verdict.THROTTLED),
        (500, ProviderError, 502, Verdict.FAILURE),
        (503, ProviderError, 502, Verdict.FAILURE),
        (504, ProviderError, 502, Verdict.FAILURE),
        (529, ProviderError, 502, Verdict.FAILURE),
    ],
)
@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "anthropic/claude-3-5-haiku-20241022"])
async def test_a_status_becomes_an_error_of_ours(
    remote: Remote,
    lane: LiteLLMProvider,
    model: str,
    status: int,
    expected: type[GatewayError],
    ours: int,
    verdict: Verdict,
) -> None:
    # The type says "invalid request" whatever the status is, as many servers do.
    remote.reply = error_reply(status, "the boiler burst", type="invalid_request_error")
    for attempt in (
        lambda: lane.chat(deployment(remote, model), body(max_tokens=5), **call()),
        lambda: anext(lane.chat_stream(deployment(remote, model), body(max_tokens=5), **call())),
    ):
        remote.bodies.clear()
        with pytest.raises(expected) as caught:
            await attempt()
        error = caught.value
        assert error.status == ours
        assert error.upstream_status == status
        assert error.model == "the-group"
        assert error.provider == model.partition("/")[0]
        assert "the boiler burst" in str(error)
        assert "litellm" not in str(error).lower()
        assert verdict_of(error) is verdict
        assert len(remote.bodies) == 1, "one attempt, no retries"


async def test_a_name_filled_into_a_pattern_that_is_forbidden_is_not_a_bad_key(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = error_reply(403, "not for you")
    filled = dataclasses.replace(deployment(remote), filled_from="any/*")
    with pytest.raises(ProviderError) as caught:
        await lane.chat(filled, body(), **call())
    assert (caught.value.code, caught.value.upstream_status) == (MODEL_REFUSED, 403)
    assert verdict_of(caught.value) is Verdict.FAILURE


@pytest.mark.parametrize("status", [400, 401, 429, 500])
async def test_embeddings_are_tried_once(
    remote: Remote, lane: LiteLLMProvider, status: int
) -> None:
    remote.reply = error_reply(status, "no")
    embedding = deployment(remote, "openai/text-embedding-3-small")
    with pytest.raises(GatewayError) as caught:
        await lane.embed(embedding, ["a"], {}, **call())
    assert caught.value.upstream_status == status
    assert len(remote.bodies) == 1


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        (
            {
                "retry-after": "Wed, 21 Oct 2026 07:28:30 GMT",
                "date": "Wed, 21 Oct 2026 07:28:00 GMT",
            },
            30.0,
        ),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "anthropic/claude-3-5-haiku-20241022"])
async def test_retry_after_is_heard(
    remote: Remote,
    lane: LiteLLMProvider,
    model: str,
    headers: dict[str, str],
    expected_s: float | None,
) -> None:
    for status in (429, 503):
        remote.reply = error_reply(status, "later", headers=headers)
        with pytest.raises(GatewayError) as caught:
            await lane.chat(deployment(remote, model), body(max_tokens=5), **call())
        assert caught.value.retry_after_s == expected_s


async def test_a_prompt_that_is_too_long_keeps_its_code(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    said = "This model's maximum context length is 128000 tokens."
    remote.reply = error_reply(400, said, code="context_length_exceeded", param="messages")
    with pytest.raises(InvalidRequest) as caught:
        await lane.chat(deployment(remote), body(), **call())
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert str(caught.value) == said


async def test_filtered_content_keeps_its_code(remote: Remote, lane: LiteLLMProvider) -> None:
    said = "Your request was rejected as a result of the safety system."
    remote.reply = error_reply(
        400, said, type="invalid_request_error", code="content_policy_violation"
    )
    with pytest.raises(InvalidRequest) as caught:
        await lane.chat(deployment(remote), body(), **call())
    assert caught.value.code == "content_filter"


@pytest.mark.parametrize("status", [400, 401, 429, 500])
async def test_no_error_shows_a_key(remote: Remote, lane: LiteLLMProvider, status: int) -> None:
    remote.reply = error_reply(status, f"Incorrect API key provided: {KEY}; header Bearer {KEY}")
    for attempt in (
        lambda: lane.chat(deployment(remote), body(), **call()),
        lambda: lane.embed(deployment(remote), ["a"], {}, **call()),
    ):
        with pytest.raises(GatewayError) as caught:
            await attempt()
        shown = repr(caught.value.__dict__) + str(caught.value) + repr(caught.value)
        assert KEY not in shown
        assert "4711" not in shown
        assert caught.value.__cause__ is None


async def test_an_answer_that_makes_no_sense_is_the_providers_failure(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    for nonsense in ({"hello": "there"}, {"choices": []}):
        remote.reply = json_reply(nonsense)
        with pytest.raises(ProviderError) as caught:
            await lane.chat(deployment(remote), body(), **call())
        assert caught.value.status == 502


async def test_an_earlier_failure_does_not_colour_a_later_one(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = error_reply(401, "who are you")
    nowhere = deployment(remote, api_base="http://127.0.0.1:9/v1")
    try:
        await lane.chat(deployment(remote), body(), **call())
    except ProviderError:
        with pytest.raises(ProviderConnectionError) as caught:
            await lane.chat(nowhere, body(), **call())
        assert caught.value.upstream_status is None


# --- embeddings -------------------------------------------------------------------------------

VECTORS = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def embedding_reply(
    *,
    shuffled: bool = False,
    floats: bool = False,
    vectors: np.ndarray = VECTORS,
    usage: int = 6,
    headers: dict[str, str] | None = None,
) -> Reply:
    async def reply(_: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        as_text = asked.get("encoding_format") == "base64" and not floats
        data = [
            {
                "object": "embedding",
                "index": n,
                "embedding": base64.b64encode(row.tobytes()).decode() if as_text else row.tolist(),
            }
            for n, row in enumerate(vectors)
        ]
        told = {"prompt_tokens": usage, "total_tokens": usage}
        return web.json_response(
            {
                "object": "list",
                "data": data[::-1] if shuffled else data,
                "model": "text-embedding-3-small",
                "usage": told,
            },
            headers=headers,
        )

    return reply


def embedder(remote: Remote, **params: Any) -> Deployment:
    return deployment(remote, "openai/text-embedding-3-small", **params)


async def test_vectors_are_asked_in_base64_and_come_as_one_array(remote: Remote) -> None:
    remote.reply = embedding_reply(shuffled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lane = LiteLLMProvider(InProcessModels())
        vectors = await lane.embed(embedder(remote), ["a", "b", "c"], {"user": "u"}, **call())
    assert remote.bodies[0] == {
        "model": "text-embedding-3-small",
        "input": ["a", "b", "c"],
        "user": "u",
        "encoding_format": "base64",
    }
    assert vectors.array.dtype == np.float32
    np.testing.assert_array_equal(vectors.array, VECTORS)
    assert vectors.prompt_tokens == 6
    assert vectors.cost_nano == 6 * 20
    assert vectors.model == "text-embedding-3-small"
    assert not vectors.estimated


async def test_what_the_provider_says_is_left_comes_with_the_vectors(remote: Remote) -> None:
    lane = LiteLLMProvider(InProcessModels())
    remote.reply = embedding_reply()
    texts = ["a", "b", "c"]
    assert (await lane.embed(embedder(remote), texts, {}, **call())).room is None
    left = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2s"}
    remote.reply = embedding_reply(headers=left)
    assert (await lane.embed(embedder(remote), texts, {}, **call())).room == Room(0, None, 2.0)


async def test_a_server_that_ignores_base64_is_understood(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = embedding_reply(floats=True)
    vectors = await lane.embed(embedder(remote), ["a", "b", "c"], {}, **call())
    np.testing.assert_allclose(vectors.array, VECTORS, rtol=1e-6)


async def test_token_ids_go_out_as_they_are(remote: Remote, lane: LiteLLMProvider) -> None:
    remote.reply = embedding_reply()
    vectors = await lane.embed(embedder(remote), [(1, 2), (3,), (4, 5, 6)], {}, **call())
    assert remote.bodies[0]["input"] == [[1, 2], [3], [4, 5, 6]]
    np.testing.assert_array_equal(vectors.array, VECTORS)


async def test_a_deployment_may_want_floats(remote: Remote, lane: LiteLLMProvider) -> None:
    remote.reply = embedding_reply()
    floats = embedder(remote, encoding_format="float")
    vectors = await lane.embed(floats, ["a", "b", "c"], {}, **call())
    assert remote.bodies[0]["encoding_format"] == "float"
    np.testing.assert_allclose(vectors.array, VECTORS, rtol=1e-6)


async def test_a_server_that_means_something_else_by_base64_is_asked_for_floats_from_then_on(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    good = embedding_reply()

    async def reply(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        if asked["encoding_format"] == "base64":
            data = [{"object": "embedding", "index": n, "embedding": "AAE="} for n in range(3)]
            used = {"prompt_tokens": 6, "total_tokens": 6}
            named = {"object": "list", "model": "text-embedding-3-small"}
            return web.json_response({**named, "data": data, "usage": used})
        return await good(request, asked)

    remote.reply = reply
    with pytest.raises(ProviderError) as caught:
        await lane.embed(embedder(remote), ["a", "b", "c"], {}, **call())
    assert len(remote.bodies) == 1, "one attempt is one call"
    error: Any = caught.value
    assert (error.code, error.provider, error.model) == (NO_BASE64, "openai", "the-group")
    assert error.retryable
    assert error.paid == Paid(6, 6 * 20, "text-embedding-3-small"), "it was answered, and so paid"
    for _ in range(2):
        vectors = await lane.embed(embedder(remote), ["a", "b", "c"], {}, **call())
        np.testing.assert_allclose(vectors.array, VECTORS, rtol=1e-6)
    assert [b["encoding_format"] for b in remote.bodies] == ["base64", "float", "float"]


async def test_a_server_that_refuses_base64_is_asked_once_and_for_floats_from_then_on(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = error_reply(400, "encoding_format: must be float")
    with pytest.raises(ProviderError) as caught:
        await lane.embed(embedder(remote), ["a"], {}, **call())
    assert caught.value.code == NO_BASE64
    assert caught.value.upstream_status is None, "the texts are not to blame"
    assert not hasattr(caught.value, "paid"), "what is refused costs nothing"
    with pytest.raises(InvalidRequest):
        await lane.embed(embedder(remote), ["a"], {}, **call())
    assert [b["encoding_format"] for b in remote.bodies] == ["base64", "float"]


async def test_while_the_first_call_in_base64_is_under_way_others_ask_for_floats(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    good, held = embedding_reply(), asyncio.Event()

    async def reply(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        if asked["encoding_format"] == "base64":
            await held.wait()
        return await good(request, asked)

    remote.reply = reply
    first = asyncio.create_task(lane.embed(embedder(remote), ["a", "b", "c"], {}, **call()))
    while not remote.bodies:
        await asyncio.sleep(0)
    vectors = await lane.embed(embedder(remote), ["a", "b", "c"], {}, **call())
    np.testing.assert_allclose(vectors.array, VECTORS, rtol=1e-6)
    held.set()
    np.testing.assert_array_equal((await first).array, VECTORS)
    await lane.embed(embedder(remote), ["a", "b", "c"], {}, **call())
    assert [b["encoding_format"] for b in remote.bodies] == ["base64", "float", "base64"]


async def test_quantised_vectors_of_a_right_length_are_not_taken_for_float32(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    quantised = np.arange(-96, 96, dtype=np.int8).reshape(3, 64).view("<f4")
    remote.reply = embedding_reply(vectors=np.nan_to_num(quantised))
    with pytest.raises(ProviderError) as caught:
        await lane.embed(embedder(remote), ["a", "b", "c"], {}, **call())
    assert caught.value.code == NO_BASE64


@pytest.mark.parametrize("text", ["[1, 2]", '{"object": "list", "da', "busy"])
async def test_an_embedding_answer_that_makes_no_sense_is_an_error(
    remote: Remote, lane: LiteLLMProvider, text: str
) -> None:
    async def reply(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.Response(text=text, content_type="application/json")

    remote.reply = reply
    with pytest.raises(ProviderError) as caught:
        await lane.embed(embedder(remote), ["a"], {}, **call())
    assert caught.value.retryable
    assert KEY not in str(caught.value)


async def test_an_answer_without_vectors_is_an_error(remote: Remote, lane: LiteLLMProvider) -> None:
    remote.reply = json_reply({"object": "list", "model": "m", "data": None})
    with pytest.raises(ResponseValidationError):
        await lane.embed(embedder(remote, encoding_format="float"), ["a"], {}, **call())


async def test_what_a_deployment_adds_to_embedding_calls_goes_out(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = embedding_reply()
    own = embedder(remote, extra_headers={"x-own": "1"}, extra_body={"embed_dtype": "float32"})
    await lane.embed(own, ["a", "b", "c"], {"dimensions": 4}, **call())
    assert remote.headers[0]["x-own"] == "1"
    assert remote.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert remote.bodies[0]["embed_dtype"] == "float32"
    assert remote.bodies[0]["dimensions"] == 4


@pytest.mark.parametrize("provider", sorted(TRUSTED | PROBED))
def test_litellm_hands_the_word_base64_on_as_it_is(provider: str, lane: LiteLLMProvider) -> None:
    litellm: Any = importlib.import_module("litellm")
    words = litellm.utils.get_optional_params_embeddings(
        model="m", encoding_format="base64", custom_llm_provider=provider
    )
    assert words["encoding_format"] == "base64"


async def test_a_provider_that_means_quantised_vectors_by_base64_is_not_asked_for_it(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    answer = {"id": "1", "texts": ["a"], "embeddings": {"float": [[0.5, 0.25]]}}
    answer |= {"meta": {"billed_units": {"input_tokens": 1}}}
    remote.reply = json_reply(answer)
    cohere = deployment(remote, "cohere/embed-english-v3.0", api_base=f"{remote.url}/v2/embed")
    vectors = await lane.embed(cohere, ["a"], {}, **call())
    np.testing.assert_array_equal(vectors.array, [[0.5, 0.25]])
    assert "base64" not in json.dumps(remote.bodies)


@pytest.mark.parametrize(
    ("vectors", "params"),
    [
        (VECTORS[:2], {}),
        (np.full((3, 4), np.nan, dtype=np.float32), {}),
        (VECTORS, {"dimensions": 3}),
        (np.empty((3, 0), dtype=np.float32), {}),
    ],
)
async def test_wrong_vectors_are_not_passed_on(
    remote: Remote, lane: LiteLLMProvider, vectors: np.ndarray, params: dict[str, Any]
) -> None:
    good = embedding_reply(vectors=vectors)

    async def reply(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return await good(request, {**asked, "encoding_format": "base64"})

    remote.reply = reply
    floats = embedder(remote, encoding_format="float")
    with pytest.raises(ResponseValidationError) as caught:
        await lane.embed(floats, ["a", "b", "c"], params, **call())
    assert caught.value.status == 502
    assert caught.value.model == "the-group"
    paid: Any = caught.value
    assert paid.paid == Paid(6, 6 * 20, "text-embedding-3-small"), "it was answered, and so paid"


async def test_tokens_that_nobody_counted_are_estimated(
    remote: Remote, lane: LiteLLMProvider
) -> None:
    remote.reply = embedding_reply(usage=0)
    vectors = await lane.embed(embedder(remote), ["abcd", "ef", "gh"], {}, **call())
    assert vectors.estimated
    assert vectors.prompt_tokens == 2
    assert vectors.cost_nano == 2 * 20


# --- embedded models through LiteLLM -----------------------------------------------------------


class FakeModels:
    """Stands for the embedded models; `test_local_models` has the real ones."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def chat(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((model, body))
        if "prompt" in body:
            texts = [
                {"index": n, "text": t, "logprobs": None, "finish_reason": "stop"}
                for n, t in enumerate(body["prompt"])
            ]
            return {
                "id": "c",
                "object": "text_completion",
                "created": 1,
                "model": model,
                "choices": texts,
                "usage": USAGE,
            }
        return chat_answer() | {"model": model}

    async def chat_stream(self, model: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self.asked.append((model, body))
        try:
            for part in [*WORDS, *END[:2]]:
                yield json.loads(part.removeprefix("data: "))
            if body.get("seed") == 1:
                raise InvalidRequest("too long", code="context_length_exceeded")
        finally:
            self.asked.append("closed")

    async def embed(
        self, model: str, texts: list[str], dimensions: int | None
    ) -> tuple[np.ndarray, int]:
        self.asked.append((model, texts, dimensions))
        if dimensions == 5:
            raise InvalidRequest.about("dimensions", "64, 128 or 256")
        return np.ones((len(texts), dimensions or 256), dtype=np.float32), 3 * len(texts)

    async def close(self) -> None:
        self.asked.append("let go")


def local(model: str) -> Deployment:
    return Deployment(id=model, group=model, model=f"local/{model}", provider="local")


async def test_embedded_models_get_the_whole_request_and_cost_nothing() -> None:
    models = FakeModels()
    lane = LiteLLMProvider(models)
    asked = body(tools=TOOLS, logprobs=True, n=2, parallel_tool_calls=False, seed=3)
    answer = await lane.chat(local("smollm2-135m"), asked, **call())
    del asked["model"]
    assert models.asked == [("smollm2-135m", asked)]
    assert answer.body == chat_answer() | {"model": "smollm2-135m"}
    assert answer.cost_nano == 0
    assert answer.model == "smollm2-135m"


async def test_embedded_texts_come_back_as_texts() -> None:
    lane = LiteLLMProvider(FakeModels())
    answer = await lane.completion(local("smollm2-135m"), {"prompt": ["a", "b"]}, **call())
    assert [choice["text"] for choice in answer.body["choices"]] == ["a", "b"]
    assert answer.body["object"] == "text_completion"


async def test_embedded_streams_are_passed_on_as_they_are() -> None:
    models = FakeModels()
    lane = LiteLLMProvider(models)
    asked = body(stream=True, stream_options={"include_usage": True})
    told = [one async for one in lane.chat_stream(local("smollm2-135m"), asked, **call())]
    assert told == [json.loads(p.removeprefix("data: ")) for p in [*WORDS, *END[:2]]]
    assert models.asked[0][1] == {
        "messages": MESSAGES,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_closing_an_embedded_stream_stops_it() -> None:
    models = FakeModels()
    chunks = LiteLLMProvider(models).chat_stream(local("smollm2-135m"), body(), **call())
    await anext(chunks)
    await chunks.aclose()
    assert models.asked[-1] == "closed"


async def test_embedded_vectors_have_the_dimensions_asked_for() -> None:
    models = FakeModels()
    lane = LiteLLMProvider(models)
    vectors = await lane.embed(local("wordllama-256"), ["a", "b"], {"dimensions": 64}, **call())
    assert vectors.array.shape == (2, 64)
    assert (vectors.prompt_tokens, vectors.cost_nano, vectors.estimated) == (6, 0, False)
    assert models.asked == [("wordllama-256", ["a", "b"], 64)]


async def test_errors_of_embedded_models_come_through_as_they_are() -> None:
    lane = LiteLLMProvider(FakeModels())
    with pytest.raises(InvalidRequest) as caught:
        await lane.embed(local("wordllama-256"), ["a"], {"dimensions": 5}, **call())
    assert caught.value.param == "dimensions"
    with pytest.raises(InvalidRequest) as caught:
        async for _ in lane.chat_stream(local("smollm2-135m"), body(seed=1), **call()):
            pass
    assert caught.value.code == "context_length_exceeded"


async def test_litellm_itself_can_stream_them_with_usage() -> None:
    litellm = importlib.import_module("litellm")
    await LiteLLMProvider(FakeModels()).warm()
    before = list(litellm.custom_provider_map)
    litellm.custom_provider_map.clear()
    register(litellm, FakeModels())
    try:
        stream = await litellm.acompletion(
            "local/smollm2-135m", MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        told = [one.model_dump() async for one in stream]
        vectors = await litellm.aembedding("local/wordllama-256", input=["a"])
    finally:
        litellm.custom_provider_map[:] = before
    assert text_of(told) == "Hello"
    assert told[-1]["usage"]["prompt_tokens"] == USAGE["prompt_tokens"]
    assert len(base64.b64decode(vectors.data[0]["embedding"])) == 4 * 256


# --- the environment ---------------------------------------------------------------------------


def test_litellm_is_told_to_stay_at_home() -> None:
    environ = {"DEFAULT_MAX_RETRIES": "2", "LITELLM_MODE": "DEV"}
    prepare_environment(environ)
    assert environ["DEFAULT_MAX_RETRIES"] == "0"
    assert environ["LITELLM_LOCAL_MODEL_COST_MAP"] == "True"
    assert environ["LITELLM_MODE"] == "DEV", "an operator's own choice stands"


def test_importing_the_lane_does_not_import_litellm() -> None:
    code = "import forebay.providers.litellm, sys; assert 'litellm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
