"""OpenTelemetry's GenAI spans and metrics, as a real OTLP/HTTP receiver gets them."""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes import error_attributes

from deployments.http import build_asgi
from forebay import telemetry
from forebay.config import SystemConfig, around, load
from forebay.errors import ConfigurationError, GatewayError, ProviderConnectionError
from forebay.telemetry import PROVIDERS, SECONDS, TOKENS
from tests.support.house import House, open_house
from tests.support.otlp_receiver import OtlpReceiver, otlp_receiver
from tests.support.scripted_service import Client, ScriptedService

CLIENT, INTERNAL = 3, 1


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


async def telling(tmp_path: Path, receiver: OtlpReceiver, **gateway: Any) -> House:
    house = await open_house(tmp_path, **gateway)
    house.system._tell_to(receiver.url)
    return house


async def test_an_answer_is_a_span_with_its_attempt_in_it(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver)
    call = house.call("hello, receiver", max_tokens=7)
    call.body |= {"temperature": 0.5, "seed": 3, "stop": ["secret stop"]}
    before_ns = time.time_ns()
    await house.pipeline.answer(call)
    after_ns = time.time_ns()
    await house.system.close()

    (span,) = [s for s in receiver.spans if s["kind"] == CLIENT]
    told = span["told"]
    assert span["name"] == "chat m"
    assert not span["failed"]
    assert span["parent"] == ""
    assert before_ns <= span["start_ns"] <= span["end_ns"] <= after_ns
    assert told["forebay.overhead"] >= 0
    assert {k: v for k, v in told.items() if k != "forebay.overhead"} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": "1",
        "gen_ai.response.model": "openai/a",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "forebay.request.id": call.request_id,
        "forebay.tenant": "acme",
        "forebay.status": "ok",
        "forebay.cache": "off",  # who asks for variety shares with nobody
        "forebay.attempts": 1,
        "forebay.retries": 0,
        "forebay.fallbacks": 0,
        "forebay.deployment.id": house.deployment("openai/a").id,
        "forebay.cost_usd": 7e-9,
    }
    (attempt,) = [s for s in receiver.spans if s["kind"] == INTERNAL]
    assert attempt["name"] == "forebay.attempt"
    assert (attempt["parent"], attempt["trace"]) == (span["id"], span["trace"])
    assert span["start_ns"] <= attempt["start_ns"] <= attempt["end_ns"] <= span["end_ns"]
    assert attempt["told"] == {
        "forebay.deployment.id": house.deployment("openai/a").id,
        "forebay.deployment.model": "openai/a",
        "forebay.verdict": "success",
    }
    assert b"hello, receiver" not in receiver.raw
    assert b"secret stop" not in receiver.raw
    resource = {"service.name": "forebay", "service.instance.id": house.system.holder}
    assert all(resource.items() <= told.items() for told in receiver.resources)


async def test_retries_and_fallbacks_are_attempts_of_one_span(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver, fallbacks=[{"m": ["spare"]}], max_retries=0)
    house.provider.steps["openai/a"] = [ProviderConnectionError("refused")]
    await house.pipeline.answer(house.call())
    await house.system.close()

    (span,) = [s for s in receiver.spans if s["kind"] == CLIENT]
    assert span["told"]["forebay.fallbacks"] == 1
    assert span["told"]["gen_ai.response.model"] == "openai/c"
    failed, answered = sorted(
        (s for s in receiver.spans if s["kind"] == INTERNAL), key=lambda s: s["start_ns"]
    )
    assert (failed["failed"], failed["told"]["error.type"]) == (True, "ProviderConnectionError")
    assert failed["told"]["forebay.verdict"] == "unreachable"
    assert (answered["failed"], answered["told"]["forebay.deployment.model"]) == (False, "openai/c")


async def test_what_is_found_out_about_an_answer_is_an_event(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver)
    call = house.call()
    await house.pipeline.answer(call)
    await house.system.close()

    about = {
        "gen_ai.response.id": "1",
        "forebay.request.id": call.request_id,
        "forebay.tenant": "acme",
    }
    whole = {
        "gen_ai.evaluation.name": "validation",
        "gen_ai.evaluation.score.label": "pass",
        "gen_ai.evaluation.score.value": 1.0,
    }
    assert receiver.events == [("gen_ai.evaluation.result", {**about, **whole})]


@pytest.mark.parametrize("named", [True, False])
async def test_a_request_is_a_part_of_its_callers_trace(
    tmp_path: Path, receiver: OtlpReceiver, named: bool
) -> None:
    house = await telling(tmp_path, receiver)
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    given = f"00-{trace}-{parent}-01" if named else "nonsense"
    await house.pipeline.answer(house.call(trace_parent=given))
    await house.system.close()

    (span,) = [s for s in receiver.spans if s["kind"] == CLIENT]
    assert ((span["trace"], span["parent"]) == (trace, parent)) is named
    assert named or span["parent"] == ""


async def test_in_python_the_callers_own_span_is_the_parent(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver)
    around = trace.SpanContext(0xABC, 0x77, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(around)):
        await house.pipeline.answer(house.call())
    await house.system.close()

    (span,) = [s for s in receiver.spans if s["kind"] == CLIENT]
    assert (int(span["trace"], 16), int(span["parent"], 16)) == (0xABC, 0x77)


async def test_embeddings_have_spans_with_attempts_and_no_texts(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver)
    call = house.texts("a very private text")
    call.body["dimensions"] = 4
    await house.pipeline.answer(call)
    await house.system.close()

    (span,) = [s for s in receiver.spans if s["kind"] == CLIENT]
    told = span["told"]
    assert span["name"] == "embeddings e"
    assert (told["gen_ai.operation.name"], told["gen_ai.embeddings.dimension.count"]) == (
        "embeddings",
        4,
    )
    assert told["gen_ai.usage.input_tokens"] == 1
    assert [s["parent"] for s in receiver.spans if s["kind"] == INTERNAL] == [span["id"]]
    assert b"private" not in receiver.raw


async def test_http_takes_the_callers_trace() -> None:
    service = ScriptedService()
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
    for headers in ({"traceparent": "00-1-2-01"}, {}):
        await Client(build_asgi(service)).post("/v1/chat/completions", body, **headers)
    assert [call.trace_parent for call in service.calls] == ["00-1-2-01", None]


async def test_a_failure_has_the_status_of_its_error(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver, max_retries=0)
    house.provider.steps["openai/a"] = [ProviderConnectionError("refused")]
    with pytest.raises(ProviderConnectionError):
        await house.pipeline.answer(house.call())
    with pytest.raises(GatewayError):
        await house.pipeline.answer(house.call(model="nobody/knows/this"))
    await house.system.close()

    failed, unknown = sorted(
        (s for s in receiver.spans if s["kind"] == CLIENT), key=lambda s: s["start_ns"]
    )
    assert failed["failed"]
    assert failed["told"]["error.type"] == "502"
    assert "gen_ai.usage.input_tokens" not in failed["told"]
    assert (unknown["name"], unknown["told"]["error.type"]) == ("chat unknown", "404")
    assert b"nobody/knows" not in receiver.raw
    durations = receiver.points["gen_ai.client.operation.duration"]
    assert {one["labels"]["error.type"] for one in durations} == {"502", "404"}
    assert "gen_ai.client.token.usage" not in receiver.points


async def test_a_stream_tells_when_its_first_chunk_came(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver)
    stream = await house.pipeline.stream(house.call())
    async for _ in stream.chunks:
        pass
    await house.system.close()

    (span,) = [s for s in receiver.spans if s["kind"] == CLIENT]
    took_s = (span["end_ns"] - span["start_ns"]) / 1e9
    assert span["told"]["gen_ai.request.stream"] is True
    assert 0 < span["told"]["gen_ai.response.time_to_first_chunk"] <= took_s
    (point,) = receiver.points["gen_ai.client.operation.time_to_first_chunk"]
    assert (point["count"], point["bounds"]) == (1, SECONDS)


async def test_answers_from_the_cache_used_no_tokens(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver, enable_caching=True)
    for _ in range(3):
        await house.pipeline.answer(house.call("the same"))
    await house.pipeline.answer(house.texts("a text"))
    await house.system.close()

    tokens = {
        (one["labels"]["gen_ai.operation.name"], one["labels"]["gen_ai.token.type"]): one
        for one in receiver.points["gen_ai.client.token.usage"]
    }
    assert {key: (one["count"], one["sum"]) for key, one in tokens.items()} == {
        ("chat", "input"): (1, 3),
        ("chat", "output"): (1, 2),
        ("embeddings", "input"): (1, 1),
    }
    durations = receiver.points["gen_ai.client.operation.duration"]
    assert {one["labels"]["gen_ai.operation.name"]: one["count"] for one in durations} == {
        "chat": 3,
        "embeddings": 1,
    }
    assert [one["bounds"] for one in durations] == [SECONDS] * 2
    assert all(one["bounds"] == TOKENS for one in tokens.values())
    assert receiver.units == {
        "gen_ai.client.operation.duration": "s",
        "gen_ai.client.token.usage": "{token}",
    }


async def test_a_wildcards_filled_in_names_are_no_labels_of_metrics(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver)
    for name in ("any/one", "any/two"):
        await house.pipeline.answer(house.call(model=name))
    await house.system.close()

    (point,) = receiver.points["gen_ai.client.operation.duration"]
    assert (point["labels"]["gen_ai.request.model"], point["count"]) == ("any/*", 2)
    assert {s["name"] for s in receiver.spans if s["kind"] == CLIENT} == {
        "chat any/one",
        "chat any/two",
    }


async def test_opentelemetrys_own_variables_hold(
    tmp_path: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer canary")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "our-gateway")
    house = await telling(tmp_path, receiver)
    await house.pipeline.answer(house.call())
    await house.system.close()

    assert {headers["authorization"] for headers in receiver.headers} == {"Bearer canary"}
    assert {told["service.name"] for told in receiver.resources} == {"our-gateway"}


async def test_an_endpoint_that_changes_is_obeyed_and_one_that_goes_is_told_the_rest(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    house = await telling(tmp_path, receiver)
    await house.pipeline.answer(house.call())
    first = house.system.telemetry
    house.system._tell_to(receiver.url)
    assert house.system.telemetry is first, "nothing has changed"
    house.system._tell_to(None)
    assert house.system.telemetry is None
    await house.pipeline.answer(house.call("untold"))
    await asyncio.gather(*house.system._closing)
    assert len([s for s in receiver.spans if s["kind"] == CLIENT]) == 1
    await house.system.close()


async def test_an_endpoint_that_is_away_costs_no_request_and_no_long_end(tmp_path: Path) -> None:
    house = await open_house(tmp_path)
    house.system._tell_to("http://127.0.0.1:9")  # where nobody listens
    assert (await house.pipeline.answer(house.call())).answer.body["choices"]
    begun_s = time.monotonic()
    await house.system.close()
    assert time.monotonic() - begun_s < telemetry.CLOSE_TIMEOUT_S + 5  # the exporter's own: 10 s


def test_the_names_are_those_of_the_conventions() -> None:
    known = {
        value
        for module in (gen_ai_attributes, gen_ai_metrics, error_attributes)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    used = set(re.findall(r'"((?:gen_ai|error)\.[\w.]+)"', inspect.getsource(telemetry)))
    assert len(used) > 20
    assert used <= {*known, "gen_ai.evaluation.result"}  # of events there is no list
    providers = {one.value for one in gen_ai_attributes.GenAiProviderNameValues}
    assert set(PROVIDERS.values()) <= providers


def test_nothing_is_imported_where_nothing_is_configured() -> None:
    code = (
        "import sys, deployments.http\n"
        "from forebay import GatewayConfig, LiteLLMGateway\n"
        "entry = {'model_name': 'm', 'litellm_params': {'model': 'openai/m', 'api_key': 'k'}}\n"
        "with LiteLLMGateway(GatewayConfig(model_list=[entry]), runtime='inline') as gateway:\n"
        "    gateway.get_usage_stats()\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_endpoint_comes_from_the_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "forebay.yaml"
    file.write_text("telemetry: {otlp_endpoint: 'http://file:4318', request_log: all}")
    standard = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://standard:4318"}
    own = {"FOREBAY_TELEMETRY_OTLP_ENDPOINT": "http://own:4318"}

    assert load(None, {}).telemetry.otlp_endpoint is None
    assert load(None, standard).telemetry.otlp_endpoint == "http://standard:4318"
    assert load(file, standard).telemetry.otlp_endpoint == "http://file:4318"
    assert load(file, {**standard, **own}).telemetry.otlp_endpoint == "http://own:4318"
    assert load(file, {}).telemetry.request_log == "all"
    assert around(SystemConfig().gateway, standard).telemetry.otlp_endpoint == (
        "http://standard:4318"
    )


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("collector:4318", "must be the http:// or https:// address"),
        ("grpc://collector:4317", "must be the http:// or https:// address"),
        ("https://user:canary@collector", "must have no credentials"),
        ("https://collector/?token=canary", "must have no credentials"),
    ],
)
def test_an_endpoint_that_is_none_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        SystemConfig(telemetry={"otlp_endpoint": url})  # type: ignore[arg-type]
    assert "canary" not in str(caught.value)
