"""The gateway's own REST routes, in their envelope."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from deployments.http import build_asgi
from forebay.errors import InvalidRequest, RateLimitError
from tests.support.scripted_service import (
    Answered,
    Client,
    ScriptedService,
    chunk,
    keys_of,
    raises,
    usage_chunk,
)

ENVELOPE = {
    "success",
    "data",
    "message",
    "correlation_id",
    "request_id",
    "timestamp",
    "metadata",
}
BASE = "/api/v1/gateway"


async def post(service: ScriptedService, path: str, body: Any, **headers: str) -> Answered:
    return await Client(build_asgi(service)).post(BASE + path, body, **headers)


async def test_a_prompt_is_answered_in_the_envelope() -> None:
    service = ScriptedService()
    answered = await post(service, "/generate", {"prompt": "hi", "model": "small", "top_p": 1})
    envelope = answered.json()

    assert answered.status == 200
    assert envelope.keys() == ENVELOPE
    assert envelope["success"] is True
    assert envelope["data"]["text"] == "Hello!"
    assert envelope["data"]["usage"]["total_tokens"] == 5
    assert envelope["data"]["cost_usd"] == 0.0000285
    assert envelope["metadata"]["deployment"] == "d-1"
    assert datetime.fromisoformat(envelope["timestamp"]).tzinfo is not None
    assert service.calls[0].body == {
        "model": "small",
        "top_p": 1,
        "messages": [{"role": "user", "content": "hi"}],
    }


async def test_ids_are_echoed() -> None:
    headers = {"x-request-id": "r1", "x-correlation-id": "c1"}
    envelope = (await post(ScriptedService(), "/generate", {"prompt": "hi"}, **headers)).json()

    assert (envelope["request_id"], envelope["correlation_id"]) == ("r1", "c1")


async def test_the_model_may_be_left_to_the_default() -> None:
    service = ScriptedService()
    await post(service, "/generate", {"prompt": "hi"})

    assert "model" not in service.calls[0].body


async def test_messages_are_sent_verbatim_in_place_of_the_prompt() -> None:
    service = ScriptedService()
    messages = [{"role": "system", "content": "x"}]
    await post(service, "/generate", {"prompt": "hi", "messages": messages})

    assert service.calls[0].body == {"messages": messages}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "hi", "api_base": "x"}, "api_base"),
        ({"prompt": "hi", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "hi", "stream": True}, "stream"),
        ({"messages": []}, "messages"),
    ],
)
async def test_a_bad_request_names_its_field_in_the_envelope(
    body: dict[str, Any], param: str
) -> None:
    answered = await post(ScriptedService(), "/generate", body)
    envelope = answered.json()

    assert answered.status == 400
    assert envelope.keys() == ENVELOPE | {"error"}
    assert envelope["success"] is False
    assert envelope["data"] is None
    assert envelope["error"].keys() == {"code", "message", "details"}
    assert envelope["error"]["details"]["param"] == param


async def test_a_refusal_says_when_to_come_back() -> None:
    service = raises(RateLimitError("over", retry_after_s=1.5))
    answered = await post(service, "/generate", {"prompt": "hi"})

    assert answered.status == 429
    assert answered.headers["retry-after-ms"] == "1500"
    assert answered.json()["error"]["code"] == "rate_limit_exceeded"
    assert answered.json()["error"]["details"]["retry_after_s"] == 1.5


async def test_a_wrong_key_is_told_in_the_envelope() -> None:
    service = ScriptedService(keys=keys_of(acme="k"))
    answered = await post(service, "/generate", {"prompt": "hi"})

    assert answered.status == 401
    assert answered.json()["error"]["code"] == "invalid_api_key"


async def test_a_stream_of_text() -> None:
    script = [chunk(""), chunk("Hel"), chunk("lo"), chunk(finish_reason="stop"), usage_chunk()]
    service = ScriptedService(chunks=script)
    answered = await post(service, "/generate/stream", {"prompt": "hi"})

    assert service.calls[0].stream
    assert service.calls[0].body["stream"] is True
    assert answered.events == [
        {"text": "Hel", "done": False},
        {"text": "lo", "done": False},
        {"text": "", "done": True, "finish_reason": "stop", "model": "small-2026"},
        {"text": "", "done": True, "usage": usage_chunk()["usage"]},
        "[DONE]",
    ]


async def test_a_failure_in_mid_stream_is_told_in_the_envelope() -> None:
    service = ScriptedService(chunks=[chunk("a"), RateLimitError("over")])
    events = (await post(service, "/generate/stream", {"prompt": "hi"})).events

    assert events[1]["success"] is False
    assert events[1]["error"]["code"] == "rate_limit_exceeded"
    assert events[2] == "[DONE]"


@pytest.mark.parametrize("name", ["texts", "text", "input"])
async def test_vectors_in_the_envelope(name: str) -> None:
    service = ScriptedService()
    answered = await post(service, "/embeddings", {name: ["a", "bb"], "dimensions": 2})

    assert answered.json()["data"] == {
        "embeddings": [[1.0, 0.1], [2.0, 0.1]],
        "model": "embed-2026",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
        "dimensions": 2,
    }
    assert service.calls[0].body == {"input": ["a", "bb"], "dimensions": 2}


@pytest.mark.parametrize("body", [{}, {"texts": ["a"], "text": "b"}, {"texts": []}, {"texts": 5}])
async def test_wrong_texts_are_400(body: dict[str, Any]) -> None:
    assert (await post(ScriptedService(), "/embeddings", body)).status == 400


async def test_providers_and_limits() -> None:
    app = build_asgi(ScriptedService())
    providers = (await Client(app).get(BASE + "/providers")).json()
    limits = (await Client(app).get(BASE + "/rate-limits")).json()

    assert providers["data"] == {"providers": [{"name": "openai", "models": ["small"]}]}
    assert limits["data"] == {"tenant": "default", "requests_per_minute": 60}


async def test_a_tenant_sees_its_own_limits_and_an_admin_anybodys() -> None:
    app = build_asgi(ScriptedService(keys=keys_of(acme="k", ops="o", admins=("ops",))))
    path = BASE + "/rate-limits"
    seen = {
        (key, query): (await Client(app, key).get(path + query)).json()["data"]
        for key in ("k", "o")
        for query in ("", "?tenant=acme", "?tenant=ops")
    }

    assert {pair: data and data["tenant"] for pair, data in seen.items()} == {
        ("k", ""): "acme",
        ("k", "?tenant=acme"): "acme",
        ("k", "?tenant=ops"): None,
        ("o", ""): "ops",
        ("o", "?tenant=acme"): "acme",
        ("o", "?tenant=ops"): "ops",
    }


async def test_a_tenant_nobody_knows_is_404_in_the_envelope() -> None:
    refusal = InvalidRequest("no such tenant", code="tenant_not_found", status=404)
    answered = await Client(build_asgi(ScriptedService(refusal=refusal))).get(
        BASE + "/rate-limits?tenant=nobody"
    )

    assert answered.status == 404
    assert answered.json()["error"]["code"] == "tenant_not_found"


async def test_warnings_are_in_the_envelope() -> None:
    service = ScriptedService()
    service.tells["warnings"] = ["max_tokens was lowered to 5"]
    generated = (await post(service, "/generate", {"prompt": "hi"})).json()
    embedded = (await post(service, "/embeddings", {"texts": ["a"]})).json()

    assert generated["data"]["warnings"] == generated["metadata"]["warnings"]
    assert embedded["metadata"]["warnings"] == ["max_tokens was lowered to 5"]
