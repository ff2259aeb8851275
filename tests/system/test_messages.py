"""`/v1/messages` as Anthropic's official client meets it, unchanged, whatever the upstream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import MessageParam, ToolParam

from tests.conftest import SIM_KEY
from tests.support.simulator import answer_text
from tests.support.upstream import Upstream

pytestmark = pytest.mark.ray

TEXT = "Hello there"
HELLO: list[MessageParam] = [{"role": "user", "content": TEXT}]
WEATHER: ToolParam = {
    "name": "weather",
    "description": "Today's weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
UPSTREAMS = ["sim", "sim-claude", "sim-gemini", "sim-cohere"]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("model", UPSTREAMS)
def test_a_message_is_the_upstreams_answer(
    client: anthropic.Anthropic, url: str, upstream: Upstream, model: str
) -> None:
    message = client.messages.create(
        model=model, max_tokens=64, messages=HELLO, system="Be brief", stop_sequences=["###"]
    )
    (block,) = message.content
    (record,) = upstream.wait_log(1)
    asked = [{"role": "system", "content": "Be brief"}, *HELLO]
    body = {"model": model, "max_tokens": 64, "messages": asked, "stop": ["###"]}
    same = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()

    assert message.type == "message"
    assert message.role == "assistant"
    assert message.id.startswith("msg_")
    assert message.stop_reason == "end_turn"
    assert block.type == "text"
    assert block.text == same["choices"][0]["message"]["content"]
    assert message.usage.input_tokens == record.prompt_tokens
    assert message.usage.output_tokens == record.completion_tokens
    assert message._request_id


@pytest.mark.parametrize("model", UPSTREAMS)
def test_a_streamed_message_is_the_same(
    client: anthropic.Anthropic, upstream: Upstream, model: str
) -> None:
    with client.messages.stream(model=model, max_tokens=64, messages=HELLO) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    (record,) = upstream.wait_log(1)

    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert {"content_block_start", "content_block_delta", "content_block_stop"} <= set(kinds)
    assert message.stop_reason == "end_turn"
    assert [block.text for block in message.content if block.type == "text"] == [answer_text(TEXT)]
    if model != "sim-cohere":  # LiteLLM drops the usage of Cohere's streams: it is estimated
        assert message.usage.output_tokens == record.completion_tokens


def test_a_short_limit_is_the_stop_reason(client: anthropic.Anthropic, upstream: Upstream) -> None:
    message = client.messages.create(model="sim", max_tokens=4, messages=HELLO)

    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 4


@pytest.mark.parametrize("model", ["sim", "sim-claude"])
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
def test_tools_are_asked_for_and_answered(
    client: anthropic.Anthropic, upstream: Upstream, model: str, streamed: bool
) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "max_tokens": 64,
        "messages": HELLO,
        "tools": [WEATHER],
        "tool_choice": {"type": "tool", "name": "weather"},
    }
    if streamed:
        with client.messages.stream(**asked) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**asked)
    (use,) = [block for block in message.content if block.type == "tool_use"]
    turns: list[MessageParam] = [
        *HELLO,
        {"role": "assistant", "content": message.content},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Rain."}],
        },
    ]
    answer = client.messages.create(model=model, max_tokens=64, messages=turns, tools=[WEATHER])

    assert message.stop_reason == "tool_use"
    assert use.name == "weather"
    assert isinstance(use.input, dict)
    assert set(use.input) == {"city"}
    assert answer.content[0].type == "text"


async def test_the_async_client_works_too(url: str, upstream: Upstream) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        message = await client.messages.create(model="sim", max_tokens=64, messages=HELLO)
        async with client.messages.stream(model="sim", max_tokens=64, messages=HELLO) as stream:
            text = "".join([piece async for piece in stream.text_stream])

    assert message.content[0].type == "text"
    assert message.content[0].text == text


@pytest.mark.parametrize(
    ("model", "status", "kind", "word"),
    [
        ("faulty-400", 400, anthropic.BadRequestError, "invalid_request_error"),
        ("faulty-429", 429, anthropic.RateLimitError, "rate_limit_error"),
        ("faulty-500", 500, anthropic.InternalServerError, "api_error"),
    ],
)
def test_the_upstreams_errors_have_anthropics_shape(
    client: anthropic.Anthropic,
    upstream: Upstream,
    model: str,
    status: int,
    kind: type[anthropic.APIStatusError],
    word: str,
) -> None:
    upstream.script(status=status, leak=True)
    with pytest.raises(kind) as caught:
        client.messages.create(model=model, max_tokens=64, messages=HELLO)
    body: Any = caught.value.body

    assert body["type"] == "error"
    assert body["error"]["type"] == word
    assert body["request_id"]
    assert SIM_KEY not in str(caught.value)


def test_bad_requests_never_reach_the_upstream(
    client: anthropic.Anthropic, url: str, upstream: Upstream
) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude-17", max_tokens=64, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="sim", max_tokens=0, messages=HELLO)
    raw = httpx.post(f"{url}/v1/messages", json={"model": "sim", "messages": HELLO}, timeout=30)
    broken = httpx.post(f"{url}/v1/messages", content=b"{", timeout=30)

    assert raw.status_code == broken.status_code == 400
    assert "max_tokens" in raw.json()["error"]["message"]
    assert {r.json()["type"] for r in (raw, broken)} == {"error"}
    assert upstream.log() == []


def test_a_stream_that_breaks_off_ends_with_an_error(
    client: anthropic.Anthropic, upstream: Upstream
) -> None:
    script = "[[tokens=20 interval=0.02 cut-after=6]]"
    broken: list[MessageParam] = [{"role": "user", "content": script}]
    pieces: list[str] = []
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(model="sim-two", max_tokens=64, messages=broken) as stream,
    ):
        pieces += stream.text_stream
    body: Any = caught.value.body

    assert pieces
    assert body["type"] == "error"
    assert len(upstream.log()) == 1


def test_leaving_a_stream_stops_the_upstream(
    client: anthropic.Anthropic, upstream: Upstream
) -> None:
    endless: list[MessageParam] = [{"role": "user", "content": "[[tokens=200 interval=0.05]]"}]
    with client.messages.stream(model="sim", max_tokens=400, messages=endless) as stream:
        for piece in stream.text_stream:
            if piece:
                break
    left_s = time.monotonic()
    (record,) = upstream.wait_log(1)

    assert record.disconnected
    assert record.end_mono_ns is not None
    assert record.end_mono_ns / 1e9 - left_s <= 1.0
