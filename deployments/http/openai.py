"""OpenAI's routes: chat completions, completions, embeddings, models.

Rule 1: what the provider said is passed on; only what the client did not ask for is left out.
Rule 2: vectors are written as bytes, never as Python lists.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
import pybase64

from deployments.http.exchange import (
    JSON,
    Exchange,
    Header,
    ascii_value,
    attempt_headers,
    limit_headers,
)
from deployments.http.service import HttpCall, Reply, Route, StreamReply, Told
from deployments.http.sse import Encode, close, frame, send_stream
from forebay.errors import InvalidRequest
from forebay.providers.relay.events import RawChunk

WARNING_CHARS_MAX = 160
WARNINGS_BYTES_MAX = 2048
"""Of x-forebay-warnings, which holds as many as fit: at least one, whatever has to be escaped."""

_PLAIN = " !'()*+/:;=?@[]|$&"


def chat_completions(exchange: Exchange) -> Awaitable[None]:
    """POST /v1/chat/completions."""
    return _answer(exchange, "chat")


def completions(exchange: Exchange) -> Awaitable[None]:
    """POST /v1/completions."""
    return _answer(exchange, "completion")


async def embeddings(exchange: Exchange) -> None:
    """POST /v1/embeddings."""
    identity = exchange.identify()
    body = _with_model(await exchange.json_body())
    call = exchange.call("embedding", body, identity.tenant, stream=False)
    reply = await embedded(exchange, call)
    packed = body.get("encoding_format") == "base64"
    await exchange.send(200, embedding_body(reply, packed=packed), [JSON, *told(exchange, reply)])


async def list_models(exchange: Exchange) -> None:
    """GET /v1/models."""
    identity = exchange.identify()
    models = exchange.service.models(identity.tenant)
    await exchange.send_json({"object": "list", "data": models})


async def one_model(exchange: Exchange) -> None:
    """GET /v1/models/{id}."""
    identity = exchange.identify()
    model_id = exchange.scope["path_params"]["id"]
    await exchange.send_json(exchange.service.model(model_id, identity.tenant))


async def _answer(exchange: Exchange, route: Route) -> None:
    identity = exchange.identify()
    body = _with_model(await exchange.json_body())
    stream = body.get("stream") is True
    call = exchange.call(route, body, identity.tenant, stream=stream)
    reply = await answered(exchange, call)
    if isinstance(reply, StreamReply):
        encode = chunk_encoder(include_usage=_wants_usage(body))
        await send_stream(exchange, told(exchange, reply), reply.chunks, encode)
        return
    out = reply.body if isinstance(reply.body, bytes) else orjson.dumps(reply.body)
    await exchange.send(200, out, [JSON, *told(exchange, reply)])


def _with_model(body: dict[str, Any]) -> dict[str, Any]:
    """The body, which on OpenAI's routes has to name a model."""
    if body.get("model") is None:
        raise InvalidRequest.about(
            "model", "Missing required parameter: 'model'.", code="missing_required_parameter"
        )
    return body


def _wants_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


async def answered(exchange: Exchange, call: HttpCall) -> Reply | StreamReply:
    """The answer to a chat or a completion: at once, or as long as somebody waits for it."""
    service = exchange.service
    reply = service.at_once(call)
    if reply is not None:
        return reply
    answer = service.chat if call.route == "chat" else service.completion
    return await exchange.unless_gone(answer(call), _let_go)


async def embedded(exchange: Exchange, call: HttpCall) -> Reply:
    """The answer to a call for embeddings, as long as somebody waits for it."""
    return await exchange.unless_gone(exchange.service.embedding(call))


async def _let_go(late: Reply | StreamReply) -> None:
    """Nobody waits for an answer that comes now."""
    if isinstance(late, StreamReply):
        await close(late.chunks)


# --- answers ----------------------------------------------------------------------------------


def chunk_encoder(*, include_usage: bool) -> Encode:
    """Frames with usage as OpenAI sends it: null until the last chunk, or not at all."""

    def as_it_came(chunk: dict[str, Any]) -> bytes:
        if not isinstance(chunk, RawChunk):
            return written(chunk)
        if not include_usage and "usage" in chunk and not chunk.get("choices"):
            return b""
        return b"data: " + chunk.told(with_usage=include_usage) + b"\n\n"

    def with_usage(chunk: dict[str, Any]) -> bytes:
        return frame(chunk if "usage" in chunk else {**chunk, "usage": None})

    def without_usage(chunk: dict[str, Any]) -> bytes:
        if "usage" not in chunk:
            return frame(chunk)
        if not chunk.get("choices"):
            return b""
        return frame({name: value for name, value in chunk.items() if name != "usage"})

    written = with_usage if include_usage else without_usage
    return as_it_came


def embedding_body(reply: Reply, *, packed: bool) -> bytes:
    """OpenAI's embedding list: each vector as base64 of little-endian float32, or as numbers.

    128 vectors of 1536 numbers take 0.12 ms or 3.7 ms, where `json.dumps` of lists takes 90 ms.
    """
    if reply.array is None:
        return reply.body if isinstance(reply.body, bytes) else orjson.dumps(reply.body)
    array = np.ascontiguousarray(reply.array, dtype="<f4")
    given = orjson.loads(reply.body) if isinstance(reply.body, bytes) else reply.body
    rest = {name: value for name, value in given.items() if name not in ("object", "data")}
    # One list of parts and one join: the body of a big batch is copied once.
    parts: list[bytes] = [b'{"object":"list","data":[']
    for index, row in enumerate(array):
        comma = b"," if index else b""
        parts.append(comma + b'{"object":"embedding","index":%d,"embedding":' % index)
        parts += _packed(row) if packed else (_numbers(row),)
        parts.append(b"}")
    parts += (b"]," if rest else b"]", orjson.dumps(rest)[1:])
    return b"".join(parts)


def _packed(row: np.ndarray[Any, Any]) -> tuple[bytes, bytes, bytes]:
    return b'"', pybase64.b64encode(row.data), b'"'


def _numbers(row: np.ndarray[Any, Any]) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)


def told(exchange: Exchange, reply: Told) -> list[Header]:
    """The response headers of an answer, LiteLLM's names beside our own."""
    headers: list[Header] = [
        (b"x-forebay-cache", reply.cache.encode()),
        (b"x-forebay-config-version", b"%d" % reply.config_version),
        (b"x-litellm-call-id", exchange.request_id.encode()),
        (b"x-litellm-model-group", ascii_value(reply.model_group)),
        *attempt_headers(reply),
    ]
    if reply.overhead_ms is not None:
        headers.append((b"x-forebay-overhead-ms", b"%.3f" % reply.overhead_ms))
    if reply.cost_nano is not None:
        headers.append((b"x-litellm-response-cost", usd(reply.cost_nano)))
    if reply.replayed:
        headers.append((b"x-forebay-idempotent-replay", b"true"))
    if reply.clamped is not None:
        headers.append((b"x-forebay-clamped", b"%d" % reply.clamped))
    if reply.warnings:
        headers.append((b"x-forebay-warnings", _listed(reply.warnings)))
    if reply.figures:
        headers += limit_headers(reply.figures)
    return headers


def usd(nano: int) -> bytes:
    """Nano-USD as USD, in plain decimals.

    >>> usd(28_500)
    b'0.0000285'
    """
    whole, rest = divmod(nano, 10**9)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".").encode()


def _listed(warnings: Sequence[str]) -> bytes:
    """Warnings as a header value: URL-escaped, so that a comma is always between two of them."""
    listed = ", ".join(quote(warning[:WARNING_CHARS_MAX], safe=_PLAIN) for warning in warnings)
    if len(listed) <= WARNINGS_BYTES_MAX:
        return listed.encode()
    whole = listed[: WARNINGS_BYTES_MAX + 1].rpartition(", ")[0]
    return whole.encode()
