"""The gateway's own REST routes, in their envelope.

Rule 1: a native request is an OpenAI request in other words; the same checks and limits hold.
Rule 2: below /api/v1/gateway every answer is `{success, data, message, correlation_id,
        request_id, timestamp, metadata}`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson

from deployments.http.exchange import JSON, Exchange, Header
from deployments.http.openai import answered, embedded, told
from deployments.http.service import Reply, StreamReply, Told
from deployments.http.sse import frame, send_stream
from forebay.errors import GatewayError, InvalidRequest
from forebay.responses import GenerateResponse

FEEDBACK_FIELDS = ("response_id", "rating", "type", "content", "id")

Wall = Callable[[], float]
"""Seconds since the epoch, for the timestamps in answers; nothing is decided by it."""


async def generate(exchange: Exchange) -> None:
    """POST /api/v1/gateway/generate."""
    identity = exchange.identify()
    body = _chat_body(await exchange.json_body())
    if body.get("stream"):
        raise InvalidRequest.about(
            "stream", "Streams come from /api/v1/gateway/generate/stream.", code="invalid_value"
        )
    call = exchange.call("chat", body, identity.tenant, stream=False)
    reply = await answered(exchange, call)
    assert isinstance(reply, Reply), "a call without stream is answered whole"
    await _send(exchange, reply, _generated(reply))


async def generate_stream(exchange: Exchange) -> None:
    """POST /api/v1/gateway/generate/stream: events `{text, done, …}`, then [DONE]."""
    identity = exchange.identify()
    body = {**_chat_body(await exchange.json_body()), "stream": True}
    call = exchange.call("chat", body, identity.tenant, stream=True)
    reply = await answered(exchange, call)
    assert isinstance(reply, StreamReply), "a call with stream is answered in chunks"
    await send_stream(
        exchange,
        told(exchange, reply),
        reply.chunks,
        _event,
        fail=lambda error: frame(error_envelope(exchange, error)),
    )


async def embeddings(exchange: Exchange) -> None:
    """POST /api/v1/gateway/embeddings: `texts` (or `text`), `model?`, `dimensions?`."""
    identity = exchange.identify()
    body = await exchange.json_body()
    given = [name for name in ("texts", "text", "input") if name in body]
    if len(given) != 1:
        raise InvalidRequest.about(
            "texts", "Give the texts to embed as 'texts'.", code="missing_required_parameter"
        )
    body["input"] = body.pop(given[0])
    call = exchange.call("embedding", body, identity.tenant, stream=False)
    reply = await embedded(exchange, call)
    assert reply.array is not None, "an embedding answer has an array"
    told_body = reply.body if isinstance(reply.body, dict) else orjson.loads(reply.body)
    array = np.ascontiguousarray(reply.array, dtype=np.float32)
    data = {
        "embeddings": array,
        "model": told_body.get("model"),
        "usage": told_body.get("usage"),
        "dimensions": int(array.shape[1]),
    }
    await _send(exchange, reply, data)


async def providers(exchange: Exchange) -> None:
    """GET /api/v1/gateway/providers."""
    identity = exchange.identify()
    found = await exchange.service.providers(identity.tenant)
    await _send(exchange, None, {"providers": found})


async def rate_limits(exchange: Exchange) -> None:
    """GET /api/v1/gateway/rate-limits: a tenant sees its own, an admin that of `?tenant=`."""
    tenant = exchange.tenant_asked("limits") or exchange.identify().tenant
    await _send(exchange, None, await exchange.service.rate_limits(tenant))


async def record_feedback(exchange: Exchange) -> None:
    """POST /v1/feedback: what a tenant thinks of an answer that it was given.

    `{response_id, rating or type, content?, id?}`; with an `id` of its own, sending it again
    changes nothing. An admin's key names the tenant with `?tenant=`.
    """
    tenant = exchange.tenant_asked("feedback") or exchange.identify().tenant
    body = await exchange.json_body()
    for name in body:
        if name not in FEEDBACK_FIELDS:
            raise InvalidRequest.about(
                name[:64],
                f"Unknown field {name[:64]!r}; there are {', '.join(FEEDBACK_FIELDS)}.",
                code="unknown_parameter",
            )
    if not body.get("response_id") or not isinstance(body["response_id"], str):
        raise InvalidRequest.about(
            "response_id",
            "Name the answer: 'response_id' is its 'id', or the x-request-id that came with it.",
            code="missing_required_parameter",
        )
    if body.get("rating") is None and body.get("type") is None:
        raise InvalidRequest.about(
            "rating", "Give a 'rating' or a 'type'.", code="missing_required_parameter"
        )
    kind = "rating" if body.get("type") is None else body["type"]
    if not isinstance(kind, str):
        raise InvalidRequest.about("type", "'type' must be a string.", code="invalid_type")
    if body.get("rating") is not None and kind not in ("rating", "useful"):
        raise InvalidRequest.about(
            "rating", f"A {kind[:32]} has no 'rating'; leave it out.", code="invalid_value"
        )
    recorded = await exchange.service.record_feedback(
        tenant,
        kind=kind,
        content=body.get("content"),
        rating=body.get("rating"),
        response_id=body["response_id"],
        feedback_id=body.get("id"),
    )
    await exchange.send_json(recorded, 200 if recorded["duplicate"] else 201)


async def feedback_stats(exchange: Exchange) -> None:
    """GET /v1/feedback/stats: a tenant sees its own, an admin that of `?tenant=`, or all."""
    tenant = exchange.tenant_asked("feedback")
    await exchange.send_json(await exchange.service.feedback_stats(tenant))


def error_envelope(
    exchange: Exchange, error: GatewayError, wall: Wall = time.time
) -> dict[str, Any]:
    """A failure in the envelope; `details` holds what OpenAI's shape would have told."""
    details: dict[str, Any] = {"type": error.type, "param": error.param, "status": error.status}
    if error.retry_after_s is not None:
        details["retry_after_s"] = error.retry_after_s
    envelope = _envelope(exchange, None, None, wall)
    code = error.code or error.type
    failure = {"code": code, "message": error.message, "details": details}
    return {**envelope, "success": False, "message": error.message, "error": failure}


def _chat_body(body: dict[str, Any]) -> dict[str, Any]:
    """The chat request that a native one stands for. Unknown names stay in, to be refused."""
    if body.get("messages") is not None:
        return {name: value for name, value in body.items() if name != "prompt"}
    prompt = body.get("prompt")
    if prompt is None:
        raise InvalidRequest.about(
            "prompt", "Missing required parameter: 'prompt'.", code="missing_required_parameter"
        )
    if not isinstance(prompt, str):
        raise InvalidRequest.about(
            "prompt", "Invalid type for 'prompt': expected a string.", code="invalid_type"
        )
    if not prompt.strip():
        raise InvalidRequest.about("prompt", "'prompt' must not be empty.", code="invalid_value")
    rest = {name: value for name, value in body.items() if name not in ("prompt", "messages")}
    return {**rest, "messages": [{"role": "user", "content": prompt}]}


def _generated(reply: Reply) -> dict[str, Any]:
    body = reply.body if isinstance(reply.body, dict) else orjson.loads(reply.body)
    response = GenerateResponse.of(
        body,
        cached=reply.cache == "hit",
        cost_nano=reply.cost_nano,
        warnings=reply.warnings,
    )
    choice: dict[str, Any] = next(iter(body.get("choices") or ()), {})
    message = choice.get("message") or {}
    return {
        **response.model_dump(exclude={"raw_response"}),
        "tool_calls": message.get("tool_calls"),
    }


def _event(chunk: dict[str, Any]) -> bytes:
    """A chunk as a native event; b"" for one that says nothing."""
    choice: dict[str, Any] = next(iter(chunk.get("choices") or ()), {})
    delta = choice.get("delta") or {}
    reason, usage = choice.get("finish_reason"), chunk.get("usage")
    done = reason is not None or bool(usage)
    event: dict[str, Any] = {"text": delta.get("content") or "", "done": done}
    if delta.get("tool_calls"):
        event["tool_calls"] = delta["tool_calls"]
    if reason is not None:
        event |= {"finish_reason": reason, "model": chunk.get("model")}
    if usage:
        event["usage"] = usage
    silent = not event["text"] and not done and len(event) == 2
    return b"" if silent else frame(event)


async def _send(exchange: Exchange, reply: Told | None, data: Any) -> None:
    envelope = _envelope(exchange, reply, data, time.time)
    headers: list[Header] = [JSON, *(told(exchange, reply) if reply is not None else ())]
    await exchange.send(200, orjson.dumps(envelope, option=orjson.OPT_SERIALIZE_NUMPY), headers)


def _envelope(exchange: Exchange, reply: Told | None, data: Any, wall: Wall) -> dict[str, Any]:
    metadata: dict[str, Any] = {"tenant": exchange.tenant}
    if reply is not None:
        metadata |= {
            "model_group": reply.model_group,
            "deployment": reply.deployment,
            "attempts": reply.attempts,
            "retries": reply.retries,
            "fallbacks": reply.fallbacks,
            "cache": reply.cache,
            "overhead_ms": reply.overhead_ms,
            "config_version": reply.config_version,
            "warnings": list(reply.warnings),
        }
    return {
        "success": True,
        "data": data,
        "message": "OK",
        "correlation_id": exchange.correlation_id(),
        "request_id": exchange.request_id,
        "timestamp": datetime.fromtimestamp(wall(), UTC).isoformat(),
        "metadata": metadata,
    }
