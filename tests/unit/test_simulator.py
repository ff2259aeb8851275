"""The upstream simulator behaves as scripted, and its log tells the truth."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest

from tests.support.loader import Load
from tests.support.loader import run as run_load
from tests.support.simulator import answer_text, count_tokens, hash_credential, vector
from tests.support.simulator.script import ScriptError, from_model, from_text
from tests.support.simulator.truth import DIMENSIONS
from tests.support.upstream import Upstream

KEY = "sk-simulated-0123456789"
ODD_TOOLS = b'{"model":"sim","messages":[{"role":"user"}],"tools":[{"function":3}]}'
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture(scope="module")
def simulator() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream
        assert upstream.stderr == ""


@pytest.fixture
def upstream(simulator: Upstream) -> Upstream:
    simulator.reset()
    return simulator


@pytest.fixture
async def client(upstream: Upstream) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=upstream.url + "/v1", api_key=KEY, max_retries=0, timeout=10
    ) as client:
        yield client


@pytest.fixture
async def http(upstream: Upstream) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=upstream.url, timeout=10) as http:
        yield http


async def ask(client: openai.AsyncOpenAI, text: str, **more: Any) -> Any:
    model = more.pop("model", "sim")
    messages: Any = [{"role": "user", "content": text}]
    return await client.chat.completions.create(model=model, messages=messages, **more)


def chat_body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": text}], **more}


# -- right answers --------------------------------------------------------------------------


async def test_chat_answers_with_a_function_of_the_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await ask(client, "What is a weir?")
    assert answer.choices[0].message.content == answer_text("What is a weir?")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == count_tokens("What is a weir?")
    assert answer.usage.completion_tokens == count_tokens(answer_text("What is a weir?"))


async def test_a_stream_carries_the_same_answer_one_token_a_chunk(
    client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    stream = await ask(client, "Stream it", stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer_text("Stream it")
    assert chunks[-1].usage.completion_tokens == count_tokens(text)
    (record,) = upstream.wait_log(lambda log: log and log[-1].finished)
    assert record.stream
    assert record.completion_tokens == count_tokens(text)
    assert record.chunks == len(chunks) + 1  # [DONE]


async def test_max_tokens_cuts_the_answer_and_says_so(client: openai.AsyncOpenAI) -> None:
    answer = await ask(client, "Short please", max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4
    assert answer_text("Short please").startswith(answer.choices[0].message.content)


async def test_echo_length_and_text_can_be_asked_for(client: openai.AsyncOpenAI) -> None:
    echoed = await ask(client, "[[echo]] say this")
    assert echoed.choices[0].message.content == "[[echo]] say this"
    long = await ask(client, "[[tokens=200]] at length")
    assert long.usage.completion_tokens == 200
    fixed = await ask(client, '[[answer="no more than this"]]')
    assert fixed.choices[0].message.content == "no more than this"


async def test_n_choices_differ(client: openai.AsyncOpenAI) -> None:
    answer = await ask(client, "Twice", n=2)
    assert len({choice.message.content for choice in answer.choices}) == 2


async def test_json_is_answered_when_json_is_asked_for(client: openai.AsyncOpenAI) -> None:
    answer = await ask(client, "As JSON", response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {"answer": answer_text("As JSON")}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called_when_the_prompt_asks(
    client: openai.AsyncOpenAI, stream: bool
) -> None:
    answer = await ask(client, "Please call the tool.", tools=[WEATHER], stream=stream)
    if stream:
        deltas = [chunk.choices[0] async for chunk in answer]
        calls = [d.delta.tool_calls[0] for d in deltas if d.delta.tool_calls]
        name = calls[0].function.name
        arguments = "".join(call.function.arguments or "" for call in calls)
        finish = deltas[-1].finish_reason
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        finish = answer.choices[0].finish_reason
    assert name == "get_weather"
    assert {k: type(v) for k, v in json.loads(arguments).items()} == {"city": str, "days": int}
    assert finish == "tool_calls"


async def test_tools_are_not_called_unasked_and_not_again_after_a_result(
    client: openai.AsyncOpenAI,
) -> None:
    plain = await ask(client, "Just talk", tools=[WEATHER])
    assert plain.choices[0].message.content == answer_text("Just talk")
    forced = await ask(client, "Just talk", tools=[WEATHER], tool_choice="required")
    call = forced.choices[0].message.tool_calls[0]
    messages: Any = [
        {"role": "user", "content": "call the tool"},
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    tool: Any = WEATHER
    after = await client.chat.completions.create(model="sim", messages=messages, tools=[tool])
    assert after.choices[0].message.content == answer_text("call the tool")


async def test_completions_answer_each_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="sim", prompt=["one", "two"])
    assert [c.text for c in answer.choices] == [answer_text("one"), answer_text("two")]
    stream = await client.completions.create(model="sim", prompt="one", stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == answer_text("one")


async def test_embeddings_are_a_function_of_the_text(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(
        model="sim-embed", input=["a", "b"], encoding_format="float"
    )
    assert np.allclose([d.embedding for d in answer.data], [vector("a"), vector("b")], atol=1e-6)
    assert answer.usage.prompt_tokens == 2


async def test_base64_embeddings_are_the_same_floats(http: httpx.AsyncClient) -> None:
    body = {"model": "sim-embed", "input": "a", "encoding_format": "base64", "dimensions": 64}
    answer = (await http.post("/v1/embeddings", json=body)).json()
    raw = base64.b64decode(answer["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(raw, "<f4"), vector("a", 64))


async def test_a_shorter_vector_is_the_longer_ones_beginning() -> None:
    head = vector("text", 256)[:64]
    assert np.allclose(vector("text", 64), head / np.linalg.norm(head), atol=1e-6)
    assert np.linalg.norm(vector("text", 1536)) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [["fine", "[[poison]]"], ["fine", ""], [], ["x"] * 2049])
async def test_one_bad_text_refuses_the_whole_list(
    client: openai.AsyncOpenAI, bad: list[str]
) -> None:
    with pytest.raises(openai.BadRequestError, match="input"):
        await client.embeddings.create(model="sim-embed", input=bad)


async def test_a_text_over_the_context_length_is_refused_as_openai_does(
    client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.script(text_tokens_max=3)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 3 tokens"):
        await client.embeddings.create(model="sim-embed", input=["a", "a b c d"])


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert "sim" in [model.id async for model in await client.models.list()]


# -- the other dialects ---------------------------------------------------------------------


async def test_anthropic_client_works_plain_and_streaming(upstream: Upstream) -> None:
    async with anthropic.AsyncAnthropic(
        base_url=upstream.url, api_key=KEY, max_retries=0
    ) as client:
        messages: Any = [{"role": "user", "content": "Bonjour"}]
        plain = await client.messages.create(model="claude", max_tokens=50, messages=messages)
        async with client.messages.stream(
            model="claude", max_tokens=50, messages=messages
        ) as stream:
            streamed = await stream.get_final_message()
    for message in (plain, streamed):
        assert message.content[0].text == answer_text("Bonjour")  # type: ignore[union-attr]
        assert message.stop_reason == "end_turn"
        assert message.usage.input_tokens == count_tokens("Bonjour")
        assert message.usage.output_tokens == count_tokens(answer_text("Bonjour"))
    records = upstream.wait_log(lambda log: len(log) == 2 and log[-1].finished)
    assert {record.dialect for record in records} == {"anthropic"}
    assert {record.credential for record in records} == {hash_credential(KEY)}


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropic_tools_and_errors(upstream: Upstream, stream: bool) -> None:
    tool: Any = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    async with anthropic.AsyncAnthropic(
        base_url=upstream.url, api_key=KEY, max_retries=0
    ) as client:
        call: dict[str, Any] = {"model": "claude", "max_tokens": 50, "tools": [tool]}
        call["messages"] = [{"role": "user", "content": "use the tool"}]
        if stream:
            async with client.messages.stream(**call) as events:
                message = await events.get_final_message()
        else:
            message = await client.messages.create(**call)
        block: Any = message.content[0]
        assert (block.type, message.stop_reason) == ("tool_use", "tool_use")
        assert set(block.input) == {"city", "days"}
        call["messages"] = [{"role": "user", "content": "[[status=529]]"}]
        with pytest.raises(anthropic.APIStatusError, match="overloaded_error") as caught:
            await client.messages.create(**call)
        assert caught.value.status_code == 529


async def test_gemini_plain_and_streaming(http: httpx.AsyncClient) -> None:
    body = {"contents": [{"role": "user", "parts": [{"text": "Guten Tag"}]}]}
    path = "/v1beta/models/gemini-2.5-flash"
    plain = (await http.post(path + ":generateContent", json=body)).json()
    candidate = plain["candidates"][0]
    assert candidate["content"]["parts"] == [{"text": answer_text("Guten Tag")}]
    assert candidate["finishReason"] == "STOP"
    streamed = await http.post(path + ":streamGenerateContent?alt=sse", json=body)
    chunks = [json.loads(part[6:]) for part in streamed.text.split("\r\n\r\n") if part]
    parts = [chunk["candidates"][0]["content"]["parts"][0]["text"] for chunk in chunks]
    assert "".join(parts) == answer_text("Guten Tag")
    assert chunks[-1]["usageMetadata"] == plain["usageMetadata"]


async def test_gemini_embeds_and_hides_its_query_key(
    http: httpx.AsyncClient, upstream: Upstream
) -> None:
    requests = [{"content": {"parts": [{"text": text}]}} for text in ("a", "b")]
    path = "/v1beta/models/sim-embed:batchEmbedContents?key=" + KEY
    answer = (await http.post(path, json={"requests": requests})).json()
    assert np.allclose(answer["embeddings"][1]["values"], vector("b"), atol=1e-6)
    single = await http.post("/models/sim-embed:embedContent", json=requests[0])
    assert np.allclose(single.json()["embedding"]["values"], vector("a"), atol=1e-6)
    assert upstream.log()[0].credential == hash_credential(KEY)
    assert KEY not in upstream.log_path.read_text()


async def test_cohere_plain_streaming_and_embedding(http: httpx.AsyncClient) -> None:
    body: dict[str, Any] = chat_body("Hola")
    plain = (await http.post("/v2/chat", json=body)).json()
    assert plain["message"]["content"] == [{"type": "text", "text": answer_text("Hola")}]
    assert plain["usage"]["tokens"]["output_tokens"] == count_tokens(answer_text("Hola"))
    body["stream"] = True
    streamed = await http.post("/v2/chat", json=body)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line[:7] == "data: {"]
    lines = await http.post("/v2/chat", json=body, headers={"accept": "application/json"})
    for stream in (events, [json.loads(line) for line in lines.text.splitlines()]):
        deltas = [e["delta"]["message"] for e in stream if e["type"] == "content-delta"]
        assert "".join(d["content"]["text"] for d in deltas) == answer_text("Hola")
        assert stream[-1]["delta"]["finish_reason"] == "COMPLETE"
    embed = {"model": "sim-embed", "texts": ["a"], "input_type": "search_query"}
    second = (await http.post("/v2/embed", json=embed)).json()["embeddings"]["float"]
    first = (await http.post("/v1/embed", json=embed)).json()["embeddings"]
    assert np.allclose([first[0], second[0]], [vector("a"), vector("a")], atol=1e-6)
    too_many = await http.post("/v2/embed", json={**embed, "texts": ["a"] * 97})
    assert too_many.status_code == 400


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("openai/gpt-4o-mini", "/v1"),
        ("anthropic/claude-3-5-haiku-20241022", ""),
        ("gemini/gemini-2.5-flash", "/v1beta"),
        ("cohere_chat/command-r-08-2024", "/v2/chat"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_litellm_speaks_each_dialect(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, model: str, base: str, stream: bool
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    answer: Any = litellm.completion(
        model=model,
        api_base=upstream.url + base,
        api_key=KEY,
        messages=[{"role": "user", "content": "Through LiteLLM"}],
        stream=stream,
        max_tokens=64,
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
        assert answer.usage.completion_tokens == count_tokens(text)
    assert text == answer_text("Through LiteLLM")
    (record,) = upstream.wait_log(lambda log: log and log[-1].finished)
    assert record.dialect == model.partition("/")[0].removesuffix("_chat")
    assert (record.stream, record.credential) == (stream, hash_credential(KEY))


@pytest.mark.parametrize(
    ("model", "base", "size"),
    [
        ("openai/text-embedding-3-small", "/v1", 1536),
        ("gemini/gemini-embedding-001", "/v1beta", 3072),
        ("cohere/embed-v4.0", "/v2/embed", 1536),
    ],
)
def test_litellm_embeds_in_each_dialect(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, model: str, base: str, size: int
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    answer = litellm.embedding(
        model=model, input=["a", "b"], api_base=upstream.url + base, api_key=KEY
    )
    found = [entry["embedding"] for entry in answer.data]
    assert np.allclose(found, [vector("a", size), vector("b", size)], atol=1e-6)


# -- what goes wrong ------------------------------------------------------------------------


async def test_the_next_requests_fail_and_then_it_is_well_again(
    http: httpx.AsyncClient, upstream: Upstream
) -> None:
    upstream.script(status=503, count=2)
    statuses = [
        (await http.post("/v1/chat/completions", json=chat_body("x"))).status_code for _ in range(3)
    ]
    assert statuses == [503, 503, 200]
    assert [(r.status, r.fault) for r in upstream.log()][:2] == [(503, "status")] * 2


async def test_rules_choose_by_model_route_and_text(
    client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.script(status=500, model="bad")
    upstream.script(status=500, text="unlucky")
    upstream.script(status=500, route="embeddings")
    assert await ask(client, "fine")
    for text, model in (("fine", "bad"), ("an unlucky one", "sim")):
        with pytest.raises(openai.InternalServerError):
            await ask(client, text, model=model)
    with pytest.raises(openai.InternalServerError):
        await client.embeddings.create(model="sim-embed", input="x")


async def test_chance_is_repeated_with_its_seed(
    http: httpx.AsyncClient, upstream: Upstream
) -> None:
    seen = []
    for _ in range(2):
        upstream.reset()
        upstream.script(seed=7, status=500, probability=0.5)
        answers = [await http.post("/v1/chat/completions", json=chat_body("x")) for _ in range(20)]
        seen.append([answer.status_code for answer in answers])
    assert seen[0] == seen[1]
    assert set(seen[0]) == {200, 500}


async def test_a_refusal_says_when_to_come_back(http: httpx.AsyncClient) -> None:
    text = "[[status=429 retry-after=2 retry-after-ms=1500]]"
    answer = await http.post("/v1/chat/completions", json=chat_body(text))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["retry-after-ms"] == "1500"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    dated = await http.post(
        "/v1/chat/completions", json=chat_body("[[status=503 retry-after=date+30]]")
    )
    wait_s = parsedate_to_datetime(dated.headers["retry-after"]).timestamp() - time.time()
    assert 27 < wait_s <= 31


async def test_the_model_name_can_ask_for_it(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(client, "x", model="sim-502")
    assert caught.value.status_code == 502
    answer = await ask(client, "x", model="sim-tokens=20+latency=0.001")
    assert answer.usage.completion_tokens == 20


async def test_latency_is_kept_and_does_not_block_others(
    client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    slow = [asyncio.create_task(ask(client, f"{i}", model="sim-latency=60")) for i in range(9)]
    while upstream.stats()["running"] < 9:
        await asyncio.sleep(0.01)
    before = time.perf_counter()
    await ask(client, "not so slow", model="sim-latency=0.1")

    assert time.perf_counter() - before >= 0.1
    assert upstream.stats()["running"] == 9
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)


async def test_latency_grows_with_the_number_of_texts(client: openai.AsyncOpenAI) -> None:
    before = time.perf_counter()
    await client.embeddings.create(model="sim-latency_per_text=0.02", input=["x"] * 5)
    assert time.perf_counter() - before >= 0.1


async def test_beyond_its_concurrency_requests_queue(
    client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.script(latency=0.03, concurrency=2)
    before = time.perf_counter()
    await asyncio.gather(*(ask(client, f"{i}") for i in range(6)))
    assert time.perf_counter() - before >= 0.09
    assert upstream.stats()["running_max"] == 2


async def test_beyond_its_concurrency_requests_are_refused(
    http: httpx.AsyncClient, upstream: Upstream
) -> None:
    upstream.script(latency=0.1, concurrency=2, over="429")
    calls = [http.post("/v1/chat/completions", json=chat_body(f"{i}")) for i in range(5)]
    answers = await asyncio.gather(*calls)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 429)


async def test_a_queued_client_that_leaves_takes_no_slot(
    client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.script(latency=0.05, concurrency=1)
    calls = [asyncio.create_task(ask(client, f"{i}")) for i in range(3)]
    await asyncio.sleep(0.02)
    calls[1].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert await ask(client, "after")
    assert upstream.stats()["running"] == 0


async def test_a_stream_can_be_cut(client: openai.AsyncOpenAI, upstream: Upstream) -> None:
    stream = await ask(client, "[[cut-after=3]]", stream=True)
    seen = [await anext(stream) for _ in range(3)]
    with pytest.raises(httpx.RemoteProtocolError):
        await anext(stream)
    (record,) = upstream.wait_log(lambda log: log and log[-1].finished)
    assert (len(seen), record.chunks, record.fault) == (3, 3, "cut")
    assert record.completion_tokens == 2  # the first chunk holds the role
    assert not record.disconnected


async def test_a_stream_can_end_well_without_done(http: httpx.AsyncClient) -> None:
    body = chat_body("[[cut-after=3 cut=clean]]", stream=True)
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.text.count("data: ") == 3
    assert "[DONE]" not in answer.text


async def test_a_chunk_or_a_body_can_be_malformed(http: httpx.AsyncClient) -> None:
    body = chat_body("[[malformed-at=2]]", stream=True)
    streamed = await http.post("/v1/chat/completions", json=body)
    parts = [part for part in streamed.text.split("\n\n") if part]
    with pytest.raises(json.JSONDecodeError):
        json.loads(parts[2][6:])
    assert parts[-1] == "data: [DONE]"
    plain = await http.post("/v1/chat/completions", json=chat_body("[[malformed-at=0]]"))
    with pytest.raises(json.JSONDecodeError):
        plain.json()


@pytest.mark.parametrize(
    ("kind", "sign"),
    [
        ("text", b"data: the boiler burst\n\n"),
        ("choices", b'"object": "chat.completion.chunk"}\n\n'),
        ("types", b'"delta": "word"'),
        ("utf8", b"\xff\xfe"),
        ("error", b'data: {"error": {'),
        ("huge", b"x" * (9 << 20)),
    ],
)
async def test_a_chunk_can_be_malformed_in_many_ways(
    http: httpx.AsyncClient, kind: str, sign: bytes
) -> None:
    body = chat_body(f"[[malformed-at=1 malformed={kind}]]", stream=True)
    told = (await http.post("/v1/chat/completions", json=body)).content
    events = told.split(b"\n\n")
    assert sign in told
    assert sign.rstrip() not in events[0] + events[2], "this one and no other"


async def test_one_key_can_be_refused_and_another_served(
    http: httpx.AsyncClient, upstream: Upstream
) -> None:
    upstream.script(status=401, key="sk-bad")
    statuses = [
        (
            await http.post(
                "/v1/chat/completions",
                json=chat_body("hi"),
                headers={"authorization": f"Bearer {key}"},
            )
        ).status_code
        for key in ("sk-bad", "sk-good", "sk-bad")
    ]
    assert statuses == [401, 200, 401]


async def test_a_stalled_stream_goes_on_or_ends_with_its_client(
    http: httpx.AsyncClient, upstream: Upstream
) -> None:
    body = chat_body("[[stall-after=2 stall=0.05]]", stream=True)
    assert "[DONE]" in (await http.post("/v1/chat/completions", json=body)).text
    body = chat_body("[[stall-after=2]]", stream=True)
    with pytest.raises(httpx.ReadTimeout):
        await http.post("/v1/chat/completions", json=body, timeout=0.1)
    record = upstream.wait_log(lambda log: len(log) == 2 and log[-1].finished)[-1]
    assert (record.disconnected, record.chunks, record.fault) == (True, 2, "stall")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_connection_can_be_reset(
    http: httpx.AsyncClient, upstream: Upstream, when: str
) -> None:
    with pytest.raises(httpx.ReadError):
        await http.post("/v1/chat/completions", json=chat_body(f"[[reset={when}]]"))
    (record,) = upstream.wait_log(lambda log: log and log[-1].finished)
    assert (record.fault, record.status) == ("reset", 0 if when == "before" else 200)


async def test_usage_can_be_missing_and_keys_can_leak(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat_body("[[usage=missing]]"))
    assert "usage" not in answer.json()
    leaked = await http.post(
        "/v1/chat/completions",
        json=chat_body("[[status=401 leak]]"),
        headers={"authorization": f"Bearer {KEY}"},
    )
    assert KEY in leaked.text


async def test_bad_requests_are_refused_in_the_dialects_shape(http: httpx.AsyncClient) -> None:
    for body in (b"{", b"[]", b'{"model":"sim"}', b'{"messages":[]}', ODD_TOOLS):
        answer = await http.post("/v1/chat/completions", content=body)
        assert (answer.status_code, set(answer.json())) == (400, {"error"})
    assert (await http.post("/v1/nothing", json={})).status_code == 404
    no_max = {"model": "claude", "messages": [{"role": "user", "content": "x"}]}
    assert (await http.post("/v1/messages", json=no_max)).json()["type"] == "error"


def test_a_script_refuses_words_it_does_not_know(upstream: Upstream) -> None:
    with pytest.raises(ValueError, match="unknown script word 'statsu'"):
        upstream.script(statsu=500)
    with pytest.raises(ScriptError, match="latency"):
        from_text("[[latency=soon]]")
    assert from_text("a matrix [[1, 2], [3]] and [[wiki link]]") == {}
    assert from_model("sim-429") == {"status": 429}
    assert from_model("openai/sim-latency=0.5+tokens=40") == {"latency": 0.5, "tokens": 40}


# -- the log --------------------------------------------------------------------------------


async def test_the_log_knows_who_asked_what_and_never_the_key(
    http: httpx.AsyncClient, upstream: Upstream
) -> None:
    upstream.script(log_bodies=True)
    body = chat_body("Who?", stream_options={"include_usage": True}, user="u-1")
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "req-7", "x-odd": "1"}
    answer = await http.post("/v1/chat/completions", json=body, headers=headers)
    (record,) = upstream.log()
    assert record.id == answer.headers["x-request-id"]
    assert (record.request_id, record.dialect, record.route) == ("req-7", "openai", "chat")
    assert record.keys == (
        "messages",
        "model",
        "stream_options",
        "stream_options.include_usage",
        "user",
    )
    assert record.body == body
    assert "x-odd" in record.header_names
    assert record.credential == hash_credential(f"Bearer {KEY}") == hash_credential(KEY)
    assert record.end_mono_ns is not None
    assert record.end_mono_ns >= record.start_mono_ns
    assert record.bytes_out > len(answer.content)
    assert KEY not in upstream.log_path.read_text()


async def test_a_client_that_goes_is_seen(client: openai.AsyncOpenAI, upstream: Upstream) -> None:
    stream = await ask(client, "[[interval=0.02 tokens=500]]", stream=True)
    async for _ in stream:
        break
    await stream.close()
    (record,) = upstream.wait_log(lambda log: log and log[-1].finished)
    assert record.disconnected
    assert 1 <= record.chunks < 250


async def test_a_pipelined_connection_is_answered_in_order(upstream: Upstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    for text in ("[[latency=0.05]] first", "second"):
        body = json.dumps(chat_body(text)).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n"
        last = b"connection: close\r\n" if text == "second" else b""
        writer.write(head % len(body) + last + b"\r\n" + body)
    answers = await reader.read()
    writer.close()
    first, second = answer_text("[[latency=0.05]] first"), answer_text("second")
    assert 0 < answers.index(first.encode()) < answers.index(second.encode())


def test_kills_are_visible_and_a_restart_continues_the_log() -> None:
    with Upstream() as upstream:
        sock = socket.create_connection(("127.0.0.1", upstream.port))
        body = json.dumps(chat_body("[[latency=60]]")).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
        sock.sendall(head % len(body) + body)
        upstream.wait_log(lambda log: log)
        port = upstream.port
        os.kill(upstream.pid, signal.SIGKILL)
        upstream.kill()
        upstream.start()
        sock.close()
        assert upstream.port == port
        assert [record.finished for record in upstream.log()] == [False]


async def test_a_fast_simulator_and_the_loader_agree_on_every_request() -> None:
    with Upstream(fast=True) as upstream:
        for stream in (False, True):
            upstream.reset()
            load = Load(
                upstream.url + "/v1/chat/completions",
                concurrency=16,
                requests=400,
                warmup=100,
                keys=[f"key-{i}" for i in range(10)],
                stream=stream,
                check=True,
            )
            result = await run_load(load)
            records = upstream.log()
            assert result.statuses == {"200": 400}
            assert (result.sent, result.wrong) == (500, 0)
            assert len(records) == 500
            assert {record.credential for record in records} == {
                hash_credential(f"key-{i}") for i in range(10)
            }
            assert result.chunks == sum(record.chunks for record in records) - 100 * (
                records[0].chunks
            )


async def test_the_loader_compares_vectors_also_in_an_open_loop(upstream: Upstream) -> None:
    load = Load(
        upstream.url + "/v1/embeddings",
        concurrency=4,
        requests=20,
        body='{"model":"sim","encoding_format":"base64","input":"Text @UNIQUE@"}',
        check=True,
        dimensions=DIMENSIONS,
        rate=2_000.0,
    )
    result = await run_load(load)
    assert (result.statuses, result.wrong) == ({"200": 20}, 0)
    upstream.script(dims=DIMENSIONS // 2)
    assert (await run_load(load)).wrong == 20


async def test_the_loader_counts_what_goes_wrong(upstream: Upstream) -> None:
    upstream.script(status=503, count=3)
    upstream.script(reset="before", count=2)
    url = upstream.url + "/v1/chat/completions"
    result = await run_load(Load(url, concurrency=2, requests=20))
    assert result.statuses == {"503": 3, "reset": 2, "200": 15}
