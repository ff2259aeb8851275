"""Anthropic's route: the wire itself, and the official client, unchanged."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import httpx2
import pytest
import uvicorn
from anthropic import Anthropic, AsyncAnthropic

from deployments.http import build_asgi
from forebay.errors import (
    BudgetExceeded,
    CircuitBreakerOpenError,
    GatewayTimeout,
    ModelNotFound,
    Overloaded,
    ProviderError,
    RateLimitError,
)
from tests.support.fake_time import settle
from tests.support.scripted_service import (
    HELLO,
    Answered,
    Client,
    ScriptedChunks,
    ScriptedService,
    chat_body,
    chunk,
    keys_of,
    raises,
    usage_chunk,
)

PATH = "/v1/messages"
HI: Any = {"model": "small", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
TOOL: Any = {"name": "f", "input_schema": {"type": "object", "properties": {}}}


async def post(service: ScriptedService, body: Any = HI, **headers: str) -> Answered:
    return await Client(build_asgi(service)).post(PATH, body, **headers)


def tool_call(call_id: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def calls_body(*calls: dict[str, Any]) -> dict[str, Any]:
    body = chat_body()
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [*calls]}
    body["choices"][0]["finish_reason"] = "tool_calls"
    return body


def piece(index: int, **fields: Any) -> dict[str, Any]:
    made = chunk()
    made["choices"][0]["delta"] = {"tool_calls": [{"index": index, **fields}]}
    return made


# --- the wire ---------------------------------------------------------------------------------


async def test_a_message_goes_in_as_a_chat_and_comes_back_as_a_message() -> None:
    service = ScriptedService()
    answered = await post(service, {**HI, "system": "be kind", "stop_sequences": ["x"]})

    assert service.calls[0].route == "chat"
    assert service.calls[0].body["messages"][0] == {"role": "system", "content": "be kind"}
    assert service.calls[0].body["stop"] == ["x"]
    assert answered.status == 200
    assert answered.headers["content-type"] == "application/json"
    assert answered.json()["id"] == "msg_1"
    assert answered.json()["content"] == [{"type": "text", "text": "Hello!"}]


async def test_an_answer_in_bytes_is_understood_too() -> None:
    answered = await post(ScriptedService(answer=json.dumps(chat_body()).encode()))

    assert answered.json()["usage"] == {"input_tokens": 3, "output_tokens": 2}


async def test_headers_are_those_of_the_other_routes_and_the_requests_id_by_its_name_here() -> None:
    service = ScriptedService()
    answered = await post(
        service,
        x_request_id="r1",
        x_forebay_timeout="1.5",
        idempotency_key="once",
        anthropic_version="2023-06-01",
        anthropic_beta="some-beta-2026-01-01",
    )

    assert answered.headers["request-id"] == answered.headers["x-request-id"] == "r1"
    assert answered.headers["x-forebay-deployment"] == "d-1"
    assert answered.headers["x-forebay-attempts"] == "2"
    assert (service.calls[0].timeout_s, service.calls[0].idempotency_key) == (1.5, "once")


async def test_the_id_is_there_where_the_server_around_the_app_sends_its_own() -> None:
    app = build_asgi(ScriptedService(), echo_id=False)
    answered = await Client(app).post(PATH, HI, x_request_id="r1")
    refused = await Client(app).post(PATH, {}, x_request_id="r2")

    assert (answered.headers["request-id"], refused.headers["request-id"]) == ("r1", "r2")


async def test_a_stream_is_named_events_and_ends_with_the_last_of_them() -> None:
    answered = await post(ScriptedService(), {**HI, "stream": True})
    frames = answered.body.decode().split("\n\n")
    lines = [frame.split("\n") for frame in frames[:-1]]

    assert answered.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert frames[-1] == ""
    assert [name.removeprefix("event: ") for name, _ in lines] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    for name, data in lines:
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


async def test_the_first_words_go_out_at_once() -> None:
    rest = asyncio.Event()
    client = Client(build_asgi(ScriptedService(chunks=[chunk("Hel"), rest, chunk("lo")])))
    running = asyncio.create_task(client.post(PATH, {**HI, "stream": True}))
    await settle()
    first = b"".join(client.answered.writes)
    rest.set()
    await running

    assert b'"text_delta","text":"Hel"' in first
    assert b"message_stop" not in first


async def test_a_failure_in_mid_stream_is_the_last_event() -> None:
    service = ScriptedService(chunks=[chunk("Hel"), Overloaded("the provider is gone")])
    answered = await post(service, {**HI, "stream": True}, x_request_id="r1")
    last = answered.body.decode().split("\n\n")[-2]
    name, data = last.split("\n")

    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "the provider is gone"},
        "request_id": "r1",
    }
    assert b"message_stop" not in answered.body


async def test_calls_that_cannot_be_told_apart_are_an_error_and_stop_the_provider() -> None:
    mixed = [piece(0, id="t1", function={"name": "f"}), piece(1, function={"arguments": "{}"})]
    chunks = ScriptedChunks([*mixed, asyncio.Event()])
    answered = await post(ScriptedService(chunks=chunks), {**HI, "stream": True})

    assert b"event: error" in answered.body
    assert chunks.closed.is_set()


async def test_a_client_that_hangs_up_stops_the_provider() -> None:
    chunks = ScriptedChunks([chunk("a"), asyncio.Event()])
    client = Client(build_asgi(ScriptedService(chunks=chunks)))
    running = asyncio.create_task(client.post(PATH, {**HI, "stream": True}))
    await settle()
    client.leave.set()
    await running

    assert chunks.closed.is_set()


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "invalid_request_error"),
        (b'{"a":1,"a":2}', 400, "invalid_request_error"),
        ({"model": "small"}, 400, "invalid_request_error"),
        ({**HI, "top_k": 5}, 400, "invalid_request_error"),
        (b" " * (10 * 1024 * 1024 + 1), 413, "request_too_large"),
    ],
)
async def test_bad_requests_are_refused_in_anthropics_shape(
    body: Any, status: int, kind: str
) -> None:
    answered = await post(ScriptedService(), body, x_request_id="r1")

    assert answered.status == status
    assert answered.headers["request-id"] == "r1"
    assert answered.json().keys() == {"type", "error", "request_id"}
    assert answered.json()["type"] == "error"
    assert answered.error["type"] == kind
    assert answered.json()["request_id"] == "r1"


async def test_a_parameter_that_is_not_allowed_is_named() -> None:
    answered = await post(ScriptedService(), {**HI, "top_k": 5})

    assert "'top_k'" in answered.error["message"]


async def test_keys_are_asked_for_in_anthropics_way() -> None:
    service = ScriptedService(keys=keys_of(acme="fb-acme"))
    missing = await post(service)
    wrong = await post(service, x_api_key="fb-other")
    right = await post(service, x_api_key="fb-acme")

    assert missing.status == wrong.status == 401
    assert missing.error == wrong.error
    assert missing.error["type"] == "authentication_error"
    assert (right.status, service.calls[0].tenant) == (200, "acme")


async def test_other_methods_and_paths_below_are_refused_in_the_same_shape() -> None:
    app = build_asgi(ScriptedService())
    method = await Client(app).get(PATH)
    path = await Client(app).post(f"{PATH}/batches", HI)

    assert (method.status, method.headers["allow"]) == (405, "POST")
    assert method.json()["type"] == "error"
    assert (path.status, path.error["type"]) == (404, "not_found_error")
    assert "request-id" in path.headers


async def test_a_refusal_says_when_to_come_back() -> None:
    answered = await post(raises(CircuitBreakerOpenError("d is OPEN", retry_after_s=1.2)))

    assert (answered.status, answered.error["type"]) == (503, "overloaded_error")
    assert (answered.headers["retry-after"], answered.headers["retry-after-ms"]) == ("2", "1200")


async def test_a_bug_tells_nothing() -> None:
    answered = await post(ScriptedService(answer=RuntimeError("secret")))

    assert (answered.status, answered.error["type"]) == (500, "api_error")
    assert "secret" not in answered.body.decode()


# --- the official client ----------------------------------------------------------------------


def client_of(service: ScriptedService, **options: Any) -> AsyncAnthropic:
    transport = httpx2.ASGITransport(app=build_asgi(service))
    http = httpx2.AsyncClient(transport=transport)
    options = {"api_key": "fb-any", "max_retries": 0, **options}
    return AsyncAnthropic(base_url="http://forebay", http_client=http, **options)


@asynccontextmanager
async def served(service: ScriptedService) -> AsyncIterator[str]:
    """The app over a real socket: its URL."""
    config = uvicorn.Config(build_asgi(service), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve([listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def test_the_client_creates_a_message() -> None:
    answer = await client_of(ScriptedService()).messages.create(**HI)

    assert isinstance(answer.content[0], anthropic.types.TextBlock)
    assert answer.content[0].text == "Hello!"
    assert (answer.stop_reason, answer.usage.output_tokens) == ("end_turn", 2)
    assert str(answer._request_id).startswith("req_")


async def test_the_client_takes_tools_through_two_turns() -> None:
    service = ScriptedService(answer=calls_body(tool_call("t1", '{"x":1}'), tool_call("t2", "{}")))
    client = client_of(service)
    first = await client.messages.create(**HI, tools=[TOOL], tool_choice={"type": "auto"})
    uses = [block for block in first.content if block.type == "tool_use"]
    results: Any = [{"type": "tool_result", "tool_use_id": use.id, "content": "3"} for use in uses]
    service.answer = chat_body("Both are 3.")
    turns: Any = [
        *HI["messages"],
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    second = await client.messages.create(**{**HI, "messages": turns}, tools=[TOOL])
    sent = service.calls[1].body["messages"]

    assert first.stop_reason == "tool_use"
    assert [use.input for use in uses] == [{"x": 1}, {}]
    assert [call["id"] for call in sent[1]["tool_calls"]] == ["t1", "t2"]
    assert [turn["tool_call_id"] for turn in sent[2:]] == ["t1", "t2"]
    assert second.stop_reason == "end_turn"


async def test_the_client_streams_over_a_socket() -> None:
    async with (
        served(ScriptedService()) as url,
        AsyncAnthropic(base_url=url, api_key="fb-any", max_retries=0) as client,
    ):
        stream = await client.messages.create(**HI, stream=True)
        kinds = [event.type async for event in stream]
        async with client.messages.stream(**HI) as helped:
            text = "".join([part async for part in helped.text_stream])
            whole = await helped.get_final_message()

    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert text == "Hello"
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (3, 2)


async def test_the_client_streams_tools() -> None:
    script = [
        chunk("Wait."),
        piece(0, id="t1", function={"name": "f", "arguments": ""}),
        piece(0, function={"arguments": '{"x":'}),
        piece(0, function={"arguments": "1}"}),
        piece(1, id="t2", function={"name": "f", "arguments": "{}"}),
        chunk(finish_reason="tool_calls"),
        usage_chunk(),
    ]
    client = client_of(ScriptedService(chunks=script))
    partial = []
    async with client.messages.stream(**HI, tools=[TOOL]) as stream:
        async for event in stream:
            if event.type == "input_json":
                partial.append(event.partial_json)
        whole = await stream.get_final_message()

    assert "".join(partial) == '{"x":1}{}'
    assert [block.type for block in whole.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in whole.content if block.type == "tool_use"] == [{"x": 1}, {}]
    assert whole.stop_reason == "tool_use"


async def test_the_client_that_is_not_async_works_too() -> None:
    def talk(url: str) -> tuple[Any, str]:
        with Anthropic(base_url=url, api_key="fb-any", max_retries=0) as client:
            answer = client.messages.create(**HI)
            with client.messages.stream(**HI) as stream:
                return answer, stream.get_final_text()

    async with served(ScriptedService()) as url:
        answer, text = await asyncio.to_thread(talk, url)

    assert answer.content[0].text == "Hello!"
    assert text == "Hello"


async def test_the_client_parses_what_it_asked_a_shape_for() -> None:
    service = ScriptedService(answer=chat_body('{"x": 1}'))
    form: Any = {"type": "json_schema", "schema": {"type": "object"}}
    await client_of(service).messages.create(**HI, output_config={"format": form})

    assert service.calls[0].body["response_format"]["type"] == "json_schema"


async def test_the_beta_route_of_the_client_is_the_same_path() -> None:
    answer = await client_of(ScriptedService()).beta.messages.create(**HI, betas=["x-2026-01-01"])

    assert answer.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModelNotFound("no"), anthropic.NotFoundError),
        (RateLimitError("over", retry_after_s=1), anthropic.RateLimitError),
        (Overloaded("full", retry_after_s=1), anthropic.ServiceUnavailableError),
        (GatewayTimeout("late"), anthropic.GatewayTimeoutError),
        (ProviderError("bad"), anthropic.InternalServerError),
        (ValueError("a bug"), anthropic.InternalServerError),
    ],
)
async def test_errors_are_those_the_client_expects(
    error: Exception, expected: type[anthropic.APIStatusError]
) -> None:
    with pytest.raises(expected) as caught:
        await client_of(ScriptedService(answer=error)).messages.create(**HI)

    assert str(caught.value.request_id).startswith("req_")
    assert caught.value.type is not None


async def test_a_wrong_key_is_an_authentication_error() -> None:
    client = client_of(ScriptedService(keys=keys_of(acme="fb-acme")))
    with pytest.raises(anthropic.AuthenticationError):
        await client.messages.create(**HI)


async def test_a_failure_in_mid_stream_is_raised_from_the_stream() -> None:
    client = client_of(ScriptedService(chunks=[*HELLO[:1], Overloaded("the provider is gone")]))
    with pytest.raises(anthropic.APIStatusError, match="the provider is gone") as caught:
        async with client.messages.stream(**HI) as stream:
            await stream.get_final_message()

    assert caught.value.type == "overloaded_error"


async def test_the_client_does_not_retry_a_spent_budget() -> None:
    service = raises(BudgetExceeded("spent", retry_after_s=3600))
    with pytest.raises(anthropic.RateLimitError):
        await client_of(service, max_retries=5).messages.create(**HI)

    assert len(service.calls) == 1
