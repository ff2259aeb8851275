"""OpenAI's routes: what goes to the service, and what comes back."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from deployments.http import build_asgi
from forebay.errors import ModelNotFound
from tests.support.scripted_service import (
    Answered,
    Client,
    Figure,
    ScriptedService,
    chat_body,
    chunk,
    raises,
    usage_chunk,
)

CHAT = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


async def post(service: ScriptedService, path: str, body: Any, **headers: str) -> Answered:
    return await Client(build_asgi(service)).post(path, body, **headers)


async def get(service: ScriptedService, path: str) -> Answered:
    return await Client(build_asgi(service)).get(path)


async def test_a_chat_is_answered_with_the_providers_body() -> None:
    answered = await post(ScriptedService(), PATH, CHAT)

    assert answered.status == 200
    assert answered.json() == chat_body()
    assert answered.headers["content-type"] == "application/json"
    assert answered.headers["content-length"] == str(len(answered.body))


async def test_bytes_are_sent_as_they_are() -> None:
    answered = await post(ScriptedService(answer=b'{"id":"kept"}'), PATH, CHAT)

    assert answered.body == b'{"id":"kept"}'


async def test_the_body_reaches_the_service_verbatim() -> None:
    service = ScriptedService()
    body = {**CHAT, "temperature": 0, "user": "é"}
    await post(service, PATH, body)

    assert service.calls[0].body == body
    assert service.calls[0].route == "chat"
    assert not service.calls[0].stream


async def test_headers_steer_the_call() -> None:
    service = ScriptedService()
    await post(
        service,
        PATH,
        CHAT,
        x_forebay_timeout="1.5",
        x_forebay_priority="bulk",
        cache_control="max-age=0, No-Store",
        idempotency_key="once",
        x_request_id="mine-1",
    )
    call = service.calls[0]

    assert (call.timeout_s, call.priority, call.cache_control) == (1.5, "bulk", "no-store")
    assert (call.idempotency_key, call.request_id) == ("once", "mine-1")


async def test_cache_control_may_stand_in_several_lines() -> None:
    service = ScriptedService()
    lines = {"cache_control": "no-store", "Cache_Control": "no-cache", "CACHE_CONTROL": "max-age=0"}
    await post(service, PATH, CHAT, **lines)

    assert service.calls[0].cache_control == "no-cache, no-store"


async def test_the_query_string_is_never_a_parameter() -> None:
    service = ScriptedService()
    await post(service, PATH + "?api_base=http://evil&temperature=1", CHAT)

    assert service.calls[0].body == CHAT


async def test_the_response_headers_tell_how_the_answer_came_to_be() -> None:
    limits = {"requests": Figure(600, 598.7, 0.2), "tokens": Figure(1000, 10, 61.5)}
    service = ScriptedService(limits=limits)
    headers = (await post(service, PATH, CHAT, x_request_id="r1")).headers

    assert headers["x-request-id"] == headers["x-litellm-call-id"] == "r1"
    assert headers["x-forebay-deployment"] == headers["x-litellm-model-id"] == "d-1"
    assert headers["x-litellm-model-group"] == "small"
    assert headers["x-forebay-cache"] == "miss"
    assert headers["x-forebay-attempts"] == "2"
    assert headers["x-litellm-attempted-retries"] == "1"
    assert headers["x-litellm-attempted-fallbacks"] == "0"
    assert headers["x-litellm-response-cost"] == "0.0000285"
    assert headers["x-forebay-overhead-ms"] == "0.250"
    assert headers["x-forebay-config-version"] == "7"
    assert headers["x-ratelimit-limit-requests"] == "600"
    assert headers["x-ratelimit-remaining-requests"] == "598"
    assert headers["x-ratelimit-reset-requests"] == "200ms"
    assert headers["x-ratelimit-reset-tokens"] == "1m1.5s"
    assert "x-forebay-clamped" not in headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_shortened_answer_says_so(stream: bool) -> None:
    service = ScriptedService()
    service.tells |= {"clamped": 5, "warnings": ["max_tokens: 9, now 5", "é\r\nx-evil: 1"]}
    answered = await post(service, PATH, {**CHAT, "stream": stream})

    assert answered.headers["x-forebay-clamped"] == "5"
    listed = answered.headers["x-forebay-warnings"].split(", ")
    assert [unquote(text) for text in listed] == service.tells["warnings"]
    assert "warnings" not in answered.body.decode()


async def test_many_warnings_are_cut_between_two_of_them() -> None:
    service = ScriptedService()
    service.tells["warnings"] = [f"{n} {'é' * 500}" for n in range(50)]
    header = (await post(service, PATH, CHAT)).headers["x-forebay-warnings"]

    assert len(header) <= 2048
    assert [unquote(text)[:3] for text in header.split(", ")][:2] == ["0 é", "1 é"]


async def test_one_long_warning_always_fits() -> None:
    service = ScriptedService()
    service.tells["warnings"] = ["\U0001f600" * 500]
    header = (await post(service, PATH, CHAT)).headers["x-forebay-warnings"]

    assert set(unquote(header)) == {"\U0001f600"}


async def test_a_name_from_outside_cannot_break_a_header() -> None:
    service = ScriptedService()
    service.tells |= {"model_group": "a\r\nx-evil: 1", "deployment": "é"}
    headers = (await post(service, PATH, CHAT)).headers

    assert headers["x-litellm-model-group"] == r"'a\r\nx-evil: 1'"
    assert headers["x-forebay-deployment"] == r"\xe9"
    assert "x-evil" not in headers


async def test_a_completion_goes_to_the_completion_route() -> None:
    service = ScriptedService()
    await post(service, "/v1/completions", {"model": "small", "prompt": "hi"})

    assert service.calls[0].route == "completion"


# --- streams ----------------------------------------------------------------------------------

STREAM = {**CHAT, "stream": True}


async def test_a_stream_ends_with_done() -> None:
    answered = await post(ScriptedService(), PATH, STREAM)

    assert answered.status == 200
    assert answered.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answered.headers["x-forebay-deployment"] == "d-1"
    assert "content-length" not in answered.headers
    assert answered.events[0] == chunk("Hel")
    assert answered.events[-1] == "[DONE]"


async def test_usage_is_left_out_unless_asked_for() -> None:
    last = chunk(finish_reason="stop", usage={"prompt_tokens": 1})
    service = ScriptedService(chunks=[chunk("x"), last, usage_chunk()])
    answered = await post(service, PATH, STREAM)

    assert answered.events == [chunk("x"), chunk(finish_reason="stop"), "[DONE]"]


async def test_usage_comes_last_when_asked_for() -> None:
    body = {**STREAM, "stream_options": {"include_usage": True}}
    answered = await post(ScriptedService(chunks=[chunk("x"), usage_chunk()]), PATH, body)

    assert answered.events == [chunk("x", usage=None), usage_chunk(), "[DONE]"]


async def test_a_failure_before_the_first_chunk_is_a_plain_status() -> None:
    answered = await post(raises(ModelNotFound("no model")), PATH, STREAM)

    assert answered.status == 404
    assert answered.error["code"] == "model_not_found"


# --- embeddings -------------------------------------------------------------------------------


async def embed(service: ScriptedService, **fields: Any) -> Any:
    body = {"model": "e", "input": ["a", "bbb"], **fields}
    return (await post(service, "/v1/embeddings", body)).json()


async def test_vectors_are_numbers_unless_base64_is_asked_for() -> None:
    answered = await embed(ScriptedService())

    assert answered == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [1.0, 0.1]},
            {"object": "embedding", "index": 1, "embedding": [3.0, 0.1]},
        ],
        "model": "embed-2026",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    assert await embed(ScriptedService(), encoding_format="float") == answered


async def test_base64_is_little_endian_float32() -> None:
    array = np.random.default_rng(1).normal(size=(2, 5)).astype(">f4")
    answered = await embed(ScriptedService(vectors=array), encoding_format="base64")
    rows = [base64.b64decode(datum["embedding"]) for datum in answered["data"]]

    assert np.array_equal([np.frombuffer(row, "<f4") for row in rows], array)


async def test_a_view_of_a_larger_array_is_sent_right() -> None:
    array = np.arange(16, dtype=np.float32).reshape(2, 8)[:, ::2]
    answered = await embed(ScriptedService(vectors=array))

    assert [datum["embedding"] for datum in answered["data"]] == array.tolist()


async def test_no_vectors_make_an_empty_list() -> None:
    answered = await embed(ScriptedService(vectors=np.zeros((0, 4), np.float32)))

    assert answered["data"] == []


# --- models -----------------------------------------------------------------------------------


async def test_models_are_listed() -> None:
    answered = await get(ScriptedService(), "/v1/models")

    assert answered.json()["object"] == "list"
    assert [model["id"] for model in answered.json()["data"]] == ["small", "openai/large"]


async def test_a_model_is_found_by_a_name_with_a_slash() -> None:
    assert (await get(ScriptedService(), "/v1/models/openai/large")).json()["id"] == "openai/large"


async def test_an_unknown_model_is_404_and_names_those_that_exist() -> None:
    answered = await get(ScriptedService(), "/v1/models/nope")

    assert answered.status == 404
    assert "small" in answered.error["message"]
