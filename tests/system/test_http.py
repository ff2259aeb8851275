"""The HTTP API as clients meet it: the official OpenAI client, unchanged, and raw requests."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

from tests.conftest import SIM_KEY
from tests.support.loader import Load, in_process
from tests.support.system import UpProcess
from tests.support.upstream import Upstream

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


def test_a_chat_answer_is_the_upstreams(client: openai.OpenAI, upstream: Upstream) -> None:
    answer = client.chat.completions.create(model="sim", messages=HELLO, max_tokens=20)

    assert answer.choices[0].message.content
    assert answer.usage is not None
    (record,) = upstream.wait_log(1)
    assert record.completion_tokens == answer.usage.completion_tokens
    assert record.prompt_tokens == answer.usage.prompt_tokens


async def test_the_async_client_works_too(
    async_client: openai.AsyncOpenAI, upstream: Upstream
) -> None:
    answer = await async_client.chat.completions.create(model="sim", messages=HELLO)
    stream = await async_client.chat.completions.create(model="sim", messages=HELLO, stream=True)
    text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    assert text == answer.choices[0].message.content


def test_a_stream_carries_usage_only_where_it_is_asked_for(
    client: openai.OpenAI, upstream: Upstream
) -> None:
    plain = list(client.chat.completions.create(model="sim", messages=HELLO, stream=True))
    asked = list(
        client.chat.completions.create(
            model="sim", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )

    assert not any(chunk.usage for chunk in plain)
    assert asked[-1].usage is not None
    assert asked[-1].usage.total_tokens > 0
    assert len(plain) > 2


def test_tools_pass_through_both_ways(client: openai.OpenAI, upstream: Upstream) -> None:
    upstream.script(tool="weather")
    answer = client.chat.completions.create(model="sim", messages=HELLO, tools=[WEATHER])
    stream = client.chat.completions.create(
        model="sim", messages=HELLO, tools=[WEATHER], stream=True
    )
    pieces = [
        call
        for chunk in stream
        for choice in chunk.choices
        for call in choice.delta.tool_calls or []
    ]

    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    json.loads(call.function.arguments)
    assert pieces[0].function is not None
    assert pieces[0].function.name == "weather"


def test_text_completions_plain_and_streamed(client: openai.OpenAI, upstream: Upstream) -> None:
    answer = client.completions.create(model="sim", prompt="Once upon", max_tokens=8)
    stream = client.completions.create(model="sim", prompt="Once upon", max_tokens=8, stream=True)

    assert answer.choices[0].text
    assert answer.choices[0].text == "".join(c.choices[0].text for c in stream if c.choices)


def test_embeddings_in_every_form(
    client: openai.OpenAI, http: httpx.Client, upstream: Upstream
) -> None:
    one = client.embeddings.create(model="sim-embed", input="alpha", dimensions=32)
    many = client.embeddings.create(model="sim-embed", input=["alpha", "beta"], dimensions=32)
    floats = http.post(
        "/v1/embeddings",
        json={"model": "sim-embed", "input": ["alpha"], "dimensions": 32,
              "encoding_format": "float"},
    ).json()  # fmt: skip
    packed = http.post(
        "/v1/embeddings",
        json={"model": "sim-embed", "input": ["alpha"], "dimensions": 32,
              "encoding_format": "base64"},
    ).json()  # fmt: skip
    decoded = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")

    assert len(one.data[0].embedding) == 32
    assert one.data[0].embedding == many.data[0].embedding
    assert [item.index for item in many.data] == [0, 1]
    np.testing.assert_allclose(floats["data"][0]["embedding"], decoded, rtol=1e-6)
    assert many.usage.prompt_tokens > 0


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]

    assert {"local-chat", "local-embed", "sim", "sim-claude"} <= set(names)
    assert client.models.retrieve("sim").id == "sim"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_an_unknown_model_names_those_that_exist(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=HELLO)

    assert caught.value.code == "model_not_found"
    assert "local-chat" in str(caught.value)


@pytest.mark.parametrize("model", ["sim-claude", "sim-gemini", "sim-cohere"])
def test_upstreams_of_other_dialects_answer_and_stream(
    client: openai.OpenAI, upstream: Upstream, model: str
) -> None:
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=20)
    # Another number: what is asked anew a moment later may still join the call before.
    stream = client.chat.completions.create(model=model, messages=HELLO, max_tokens=21, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

    assert answer.choices[0].message.content
    assert text == answer.choices[0].message.content
    assert {record.dialect for record in upstream.wait_log(2)} == {
        model.removeprefix("sim-").replace("claude", "anthropic")
    }


def test_a_wildcard_group_passes_the_name_on(client: openai.OpenAI, upstream: Upstream) -> None:
    client.chat.completions.create(model="any/some-model", messages=HELLO)

    (record,) = upstream.wait_log(1)
    assert record.model == "some-model"


def test_several_deployments_share_a_group(client: openai.OpenAI, upstream: Upstream) -> None:
    for number in range(24):
        client.chat.completions.create(
            model="pair", messages=[{"role": "user", "content": f"Question {number}"}]
        )

    assert {record.model for record in upstream.wait_log(24)} == {"sim", "sim-b"}


def test_a_dead_deployment_is_passed_over_and_a_dead_group_falls_back(
    http: httpx.Client, upstream: Upstream
) -> None:
    for model in ("dead-first", "dead"):
        response = http.post("/v1/chat/completions", json={"model": model, "messages": HELLO})
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"]


def test_the_upstreams_errors_arrive_as_the_client_expects_them(
    client: openai.OpenAI, upstream: Upstream
) -> None:
    cases: list[tuple[int, type[openai.APIStatusError], int]] = [
        (400, openai.BadRequestError, 400),
        (401, openai.InternalServerError, 502),
        (429, openai.RateLimitError, 429),
        (500, openai.InternalServerError, 502),
    ]
    for status, kind, told in cases:
        upstream.reset()
        upstream.script(status=status, leak=True, count=50)
        with pytest.raises(kind) as caught:
            client.chat.completions.create(
                model=f"faulty-{status}", messages=[{"role": "user", "content": "Hello"}]
            )
        assert caught.value.status_code == told
        assert SIM_KEY not in str(caught.value)


# ------------------------------------------------------------------------------- bad input


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": HELLO, **fields}


BAD: list[tuple[Any, str]] = [
    (chat(messages=[]), "messages"),
    (chat(messages="hello"), "messages"),
    (chat(temperature="hot"), "temperature"),
    (chat(max_tokens="5"), "max_tokens"),
    (chat(no_such_parameter=1), "no_such_parameter"),
    (chat(api_base="http://127.0.0.1:1"), "api_base"),
    (chat(api_key="sk-1"), "api_key"),
    (chat(base_url="http://127.0.0.1:1"), "base_url"),
    (chat(extra_headers={"a": "b"}), "extra_headers"),
    (chat(extra_body={"api_base": "x"}), "extra_body"),
    (chat(mock_response="hi"), "mock_response"),
    (chat(custom_llm_provider="openai"), "custom_llm_provider"),
    (chat(success_callback=["x"]), "success_callback"),
    (chat(model=7), "model"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=[field for _, field in BAD])
def test_bad_input_is_a_400_that_names_the_field(
    http: httpx.Client, upstream: Upstream, body: dict[str, Any], field: str
) -> None:
    response = http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]

    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert field in (error["param"] or "")
    assert upstream.log() == []


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "sim", "model": "sim", "messages": []}', 400),
        (b'{"model": "sim", "messages": NaN}', 400),
        (b'{"a":' * 200 + b"1" + b"}" * 200, 400),
        (b"\xff\xfe", 400),
        (b" " * (10 * 1024 * 1024 + 1), 413),
    ],
)
def test_malformed_bodies_are_4xx_without_a_trace(
    http: httpx.Client, raw: bytes, status: int
) -> None:
    response = http.post(
        "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
    )

    assert response.status_code == status
    assert "Traceback" not in response.text
    assert response.json()["error"]["message"]


def test_unknown_paths_and_methods_speak_openais_shape(http: httpx.Client) -> None:
    for response, status in (
        (http.get("/v1/no-such-route"), 404),
        (http.get("/v1/chat/completions"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_health_and_openapi(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()

    assert http.get("/health").status_code == 200
    assert http.get("/health/ready").status_code == 200
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/health",
        "/health/ready",
    ):
        assert path in document["paths"]


def test_response_headers_tell_how_the_answer_came_to_be(
    http: httpx.Client, upstream: Upstream
) -> None:
    response = http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "abc-1"})

    assert response.headers["x-request-id"] == "abc-1"
    assert response.headers["x-forebay-attempts"] == "1"
    assert response.headers["x-forebay-deployment"]
    assert float(response.headers["x-forebay-overhead-ms"]) >= 0
    assert int(response.headers["x-forebay-config-version"]) >= 1


def test_serves_control_headers_are_not_obeyed(http: httpx.Client, upstream: Upstream) -> None:
    """`x-request-timeout-seconds` would let a client have Serve cut requests short, or never."""
    upstream.script(latency=0.6)
    response = http.post(
        "/v1/chat/completions",
        json=chat(messages=[{"role": "user", "content": "slowly"}]),
        headers={"x-request-timeout-seconds": "0.2"},
    )

    assert response.status_code == 200


def haproxies(up: UpProcess) -> list[psutil.Process]:
    """This system's; others may run on this machine. One that was reloaded lives on for a while."""
    assert up.process is not None
    found = []
    for process in psutil.Process(up.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # some live for a moment only
            if process.name() == "haproxy":
                found.append(process)
    return found


def test_haproxys_side_doors_open_only_to_this_machine(up: UpProcess, url: str) -> None:
    """Its pages are bound to every interface by Serve's own template."""
    listening = {
        (c.laddr.ip, c.laddr.port)
        for haproxy in haproxies(up)
        for c in haproxy.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }

    assert {port for _, port in listening} > {int(url.rpartition(":")[2])}
    assert {ip for ip, _ in listening} == {"127.0.0.1"}


def test_many_slow_streams_at_once_come_whole(url: str, upstream: Upstream) -> None:
    streams, tokens = 200, 64
    upstream.script(interval=0.02, tokens=tokens)
    load = Load(f"{url}/v1/chat/completions", concurrency=streams, requests=streams, stream=True)
    result = in_process(load)
    log = upstream.wait_log(lambda log: all(record.finished for record in log), 15.0)

    assert result.statuses == {"200": streams}
    # The role, the reason for the end, and [DONE] are events too.
    assert result.chunks == streams * (tokens + 3)
    assert len(log) == streams
    assert not any(record.disconnected for record in log)


def test_a_client_that_goes_away_stops_the_upstream_and_leaves_no_work(
    up: UpProcess, url: str, upstream: Upstream
) -> None:
    """HTTP libraries send a body in a packet of its own, which HAProxy's splicing cannot bear."""
    upstream.script(latency=8.0)
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(chat(messages=[{"role": "user", "content": "gone"}])).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode())
        time.sleep(0.05)
        connection.sendall(body)
        upstream.wait_log(lambda log: len(log) == 1, 15.0)
    left_s = time.monotonic()
    (record,) = upstream.wait_log(lambda log: bool(log) and log[0].finished, 5.0)
    proxies = haproxies(up)
    before_s = sum(sum(p.cpu_times()[:2]) for p in proxies)
    time.sleep(1.0)
    spent_s = sum(sum(p.cpu_times()[:2]) for p in proxies) - before_s

    assert record.disconnected
    assert record.end_mono_ns / 1e9 - left_s < 4.0  # half of the latency
    assert proxies
    assert spent_s < 0.5
