"""The official openai client against the app, unchanged."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from deployments.http import build_asgi
from forebay.errors import BudgetExceeded, ModelNotFound, Overloaded, RateLimitError
from tests.support.scripted_service import HELLO, ScriptedService, chat_body, keys_of, raises

HI: Any = [{"role": "user", "content": "hi"}]


def client_of(service: ScriptedService, **options: Any) -> openai.AsyncOpenAI:
    transport = httpx.ASGITransport(app=build_asgi(service))
    http = httpx.AsyncClient(transport=transport)
    options = {"api_key": "fb-any", "max_retries": 0, **options}
    return openai.AsyncOpenAI(base_url="http://forebay/v1", http_client=http, **options)


async def chat(service: ScriptedService, **fields: Any) -> Any:
    client = client_of(service)
    return await client.chat.completions.create(**{"model": "small", "messages": HI, **fields})


async def test_a_chat() -> None:
    answer = await chat(ScriptedService(), temperature=0.2, max_tokens=5, seed=1)

    assert answer.choices[0].message.content == "Hello!"
    assert answer.usage.total_tokens == 5
    assert answer._request_id.startswith("req_")


async def test_a_streamed_chat() -> None:
    stream = await chat(ScriptedService(), stream=True, stream_options={"include_usage": True})
    chunks = [item async for item in stream]

    assert "".join(item.choices[0].delta.content or "" for item in chunks[:3]) == "Hello"
    assert chunks[2].choices[0].finish_reason == "stop"
    assert chunks[3].usage.total_tokens == 5


async def test_tools_travel_both_ways() -> None:
    body = chat_body()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    service = ScriptedService(answer=body)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = await chat(service, tools=tools, tool_choice="auto", parallel_tool_calls=False)
    message = answer.choices[0].message
    turn = [*HI, message, {"role": "tool", "tool_call_id": "1", "content": "2"}]
    await chat(service, messages=turn, tools=tools)

    assert message.tool_calls[0].function.arguments == '{"x":1}'
    assert service.calls[0].body["tools"] == tools


async def test_a_completion() -> None:
    body = {**chat_body(), "object": "text_completion"}
    body["choices"] = [{"index": 0, "text": "x", "finish_reason": "stop", "logprobs": None}]
    client = client_of(ScriptedService(answer=body))
    answer = await client.completions.create(model="small", prompt="hi", echo=True)

    assert answer.choices[0].text == "x"


async def test_embeddings_which_the_client_asks_for_as_base64() -> None:
    service = ScriptedService()
    answer = await client_of(service).embeddings.create(model="e", input=["a", "bbb"])

    assert service.calls[0].body["encoding_format"] == "base64"
    assert [datum.embedding[0] for datum in answer.data] == [1.0, 3.0]
    assert answer.usage.total_tokens == 2


async def test_embeddings_as_numbers() -> None:
    client = client_of(ScriptedService())
    answer = await client.embeddings.create(model="e", input="ab", encoding_format="float")

    assert answer.data[0].embedding == [2.0, 0.1]


async def test_models() -> None:
    client = client_of(ScriptedService())

    assert [model.id async for model in client.models.list()] == ["small", "openai/large"]
    assert (await client.models.retrieve("openai/large")).id == "openai/large"


async def test_a_wrong_key() -> None:
    client = client_of(ScriptedService(keys=keys_of(acme="fb-acme")))
    with pytest.raises(openai.AuthenticationError):
        await client.models.list()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModelNotFound("no"), openai.NotFoundError),
        (RateLimitError("over", retry_after_s=1), openai.RateLimitError),
        (Overloaded("full", retry_after_s=1), openai.InternalServerError),
        (ValueError("a bug"), openai.InternalServerError),
    ],
)
async def test_errors_are_those_it_expects(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        await chat(ScriptedService(answer=error))


async def test_an_unknown_parameter_in_extra_body_is_a_bad_request() -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await chat(ScriptedService(), extra_body={"api_base": "http://evil"})

    assert caught.value.param == "api_base"
    assert caught.value.code == "unknown_parameter"


async def test_a_failure_in_mid_stream_is_raised_from_the_stream() -> None:
    service = ScriptedService(chunks=[*HELLO[:1], Overloaded("the provider is gone")])
    stream = await chat(service, stream=True)
    with pytest.raises(openai.APIError, match="the provider is gone"):
        [item async for item in stream]


async def test_it_does_not_retry_a_spent_budget() -> None:
    service = raises(BudgetExceeded("spent", retry_after_s=3600))
    with pytest.raises(openai.RateLimitError):
        await client_of(service, max_retries=5).chat.completions.create(model="m", messages=HI)

    assert len(service.calls) == 1
