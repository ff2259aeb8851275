"""Both lanes to a provider, side by side: the same request to LiteLLM's and to the relay, and what
the upstream received and the caller got, in one normal form.

The normal form (`received`, `answered`, `streamed`, `failed`) leaves out what is no difference:

- a request's headers that name the client or the wire (user-agent, accept-encoding, x-stainless-…);
- nulls and empty objects; OpenAI's `logprobs: null` and the like may be there or not;
- `provider_specific_fields`, into which LiteLLM moves fields of a choice that OpenAI has not: they
  count as standing where the provider put them; fields of a choice that neither lane knows
  (`stop_reason`) are left out, for LiteLLM keeps some providers' and drops others';
- of usage: what OpenAI does not know; LiteLLM drops it in streams, and adds counts of its own
  (`text_tokens`, in streams `reasoning_tokens`); zeros; in streams, all usages but the last;
- of a chunk: `id`, `created`, `model`, `system_fingerprint` and unknown fields beside `choices`:
  LiteLLM makes them up or drops them, the relay tells the provider's; `role`; chunks that say
  nothing; `reasoning` where `reasoning_content` says the same; whether the last words and the
  reason for the end come in one or in two; the `type` of a tool call's later pieces;
- the words of a broken connection's error: LiteLLM wraps them in its own;
- a content that is empty, and none: of Mistral's LiteLLM makes the one the other;
- the provider's name before a reported model's: of Azure's o-series LiteLLM writes it there;
- ids that LiteLLM makes up where the provider gave none: each time another one;
- usage that nobody reported: LiteLLM counts words and marks it `estimated`, the relay tells none.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

from forebay.errors import GatewayError, ProviderConnectionError
from forebay.providers.base import Provider
from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels
from forebay.providers.relay.forms import form_of
from forebay.providers.relay.lanes import LOST, Lanes
from forebay.routing import Deployment

Reply = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]

KEY = "sk-do-not-show-this-4711"
MODELS = {
    "openai": "openai/gpt-4o-mini",
    "azure": "azure/my-gpt",
    "groq": "groq/llama-3.1-8b-instant",
    "together_ai": "together_ai/meta-llama/Llama-3-8b-chat-hf",
    "mistral": "mistral/mistral-small-latest",
    "deepseek": "deepseek/deepseek-chat",
    "openrouter": "openrouter/openai/gpt-4o-mini",
    "hosted_vllm": "hosted_vllm/qwen",
}
USAGE = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})
DETAILS = frozenset({"cached_tokens", "audio_tokens", "reasoning_tokens"}) | {
    "accepted_prediction_tokens",
    "rejected_prediction_tokens",
}
COUNTED = frozenset({"reasoning_tokens"})
CLIENTS = frozenset({"host", "user-agent", "accept-encoding", "connection", "content-length"})
MADE_UP = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CHOICE = frozenset({"index", "message", "text", "logprobs", "finish_reason"})


@dataclass(slots=True)
class Seen:
    """What came of a call: what the upstream received, and what the caller got."""

    received: list[Any] = field(default_factory=list)
    got: Any = None
    relayed: int = 0


class Upstream:
    """A provider in this process that answers with `reply` and keeps what it received."""

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.received: list[Any] = []
        self.gone = asyncio.Event()
        self.refused = False
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.received.append(received(request, body))
        assert self.reply is not None
        try:
            response = await self.reply(request, body)
            self.refused |= response.status in LOST
            return response
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise


class TwoLanes:
    """LiteLLM's lane, and the lanes of a system, both of them to one upstream."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.litellm = LiteLLMProvider(InProcessModels())
        self.lanes = Lanes(LiteLLMProvider(InProcessModels()))
        self._shown: set[Any] = set()

    async def warm(self) -> None:
        await self.litellm.warm()
        await self.lanes.warm()

    async def close(self) -> None:
        await self.lanes.close()
        await self.litellm.close()

    def deployment(self, provider: str, model: str | None = None, **params: Any) -> Deployment:
        base = self.upstream.url + ("" if provider == "azure" else "/v1")
        own = {"api_base": base, "api_key": KEY}
        if provider == "azure":
            own["api_version"] = "2024-10-21"
        return Deployment(
            id=f"{provider} {model} {params}",
            group="the-group",
            model=model or MODELS[provider],
            provider=provider,
            params={**own, **params},
        )

    async def both(
        self, route: str, to: Deployment, body: Mapping[str, Any], reply: Reply
    ) -> tuple[Seen, Seen]:
        """The same call over LiteLLM's lane, and over the relay once LiteLLM has shown how."""
        form = to.id, route, form_of(route, body)
        is_embedding = route == "embedding"
        if self.upstream.refused:  # the relay has forgotten the provider
            self._shown.clear()
            self.upstream.refused = False
        if form not in self._shown:
            self._shown.add(form)
            # Vectors would show what base64 means there, which the other lane does not know yet.
            self.upstream.reply = as_json({}, 500) if is_embedding else answer_for(route)
            await self.seen(self.lanes, route, to, body)  # overheard
        self.upstream.reply = reply
        first = await self.seen(self.litellm, route, to, body)
        before = self.lanes.relayed
        second = await self.seen(self.lanes, route, to, body)
        second.relayed = self.lanes.relayed - before
        return first, second

    async def seen(
        self, lane: Provider, route: str, to: Deployment, body: Mapping[str, Any]
    ) -> Seen:
        self.upstream.received = []
        seen = Seen()
        try:
            seen.got = await ask(lane, route, to, deepcopy(body))  # LiteLLM changes it
        except GatewayError as error:
            seen.got = failed(error)
        seen.received = self.upstream.received
        return seen


async def ask(lane: Provider, route: str, to: Deployment, body: Mapping[str, Any]) -> Any:
    """One call to its end, and what came of it in the normal form."""
    how: dict[str, Any] = {"timeout_s": 10.0, "resolve": dict}
    if route == "embedding":
        params = {name: value for name, value in body.items() if name != "input"}
        vectors = await lane.embed(to, body["input"], params, **how)
        rows = vectors.array.tolist()
        told = vectors.prompt_tokens, vectors.cost_nano, vectors.model, vectors.estimated
        return rows, *told, vectors.room
    if body.get("stream"):
        open_stream = lane.chat_stream if route == "chat" else lane.completion_stream
        chunks: list[Any] = []
        try:
            async for chunk in open_stream(to, body, **how):
                chunks.append(chunk)
        except GatewayError as error:
            return streamed(chunks), failed(error)
        return streamed(chunks)
    function = lane.chat if route == "chat" else lane.completion
    answer = await function(to, body, **how)
    maker = f"{to.provider}/"
    named = {**answer.body, "model": str(answer.body.get("model")).removeprefix(maker)}
    told = answered(named), usage_of(answer.usage or {}), answer.cost_nano
    return *told, answer.model.removeprefix(maker), answer.estimated


# -- the normal form ------------------------------------------------------------------------


def received(request: web.Request, body: dict[str, Any]) -> Any:
    """A request as the upstream sees it."""
    headers = {
        name.lower(): value
        for name, value in request.headers.items()
        if name.lower() not in CLIENTS and not name.lower().startswith("x-stainless-")
    }
    return request.path_qs, headers, body


def answered(body: Mapping[str, Any]) -> Any:
    """A whole answer."""
    told = {name: value for name, value in body.items() if name not in ("usage", "choices")}
    choices = []
    for choice in body["choices"]:
        known = {name: choice[name] for name in choice if name in CHOICE}
        message = dict(choice.get("message") or {})
        message |= message.pop("provider_specific_fields", None) or {}
        message["content"] = message.get("content") or None
        choices.append({**known, "message": message})
    return some({**told, "choices": choices})


def streamed(chunks: list[dict[str, Any]]) -> Any:
    """What the chunks of a stream say, one after the other, and the usage that was reported."""
    said: list[Any] = []
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = dict(choice.get("delta") or {})
            delta.pop("role", None)
            delta |= delta.pop("provider_specific_fields", None) or {}
            if choice.get("text"):
                delta["text"] = choice["text"]
            if delta.get("reasoning_content"):
                delta.pop("reasoning", None)
            for call in delta.get("tool_calls") or ():
                if not call.get("id"):
                    call.pop("type", None)
            told = {name: value for name, value in some(delta).items() if value != ""}
            logprobs = some(choice.get("logprobs") or {})
            if told or logprobs:
                said.append((choice["index"], told, logprobs))
            if choice.get("finish_reason"):
                said.append((choice["index"], choice["finish_reason"]))
    told_usages = [usage_of(u, COUNTED) for u in usages if not u.get("estimated")]
    return said, told_usages[-1:]


def usage_of(usage: Mapping[str, Any], leave_out: Collection[str] = ()) -> Any:
    """What OpenAI knows of a usage."""
    told = {name: usage[name] for name in usage if name in USAGE}
    for kind in ("prompt_tokens_details", "completion_tokens_details"):
        details = usage.get(kind) or {}
        known = DETAILS.difference(leave_out)
        told[kind] = {name: details[name] for name in details if name in known and details[name]}
    return some(told)


def failed(error: GatewayError) -> Any:
    """A failure, as callers and the breaker see it."""
    return (
        type(error).__name__,
        error.status,
        error.code,
        error.param,
        error.upstream_status,
        error.retry_after_s,
        error.provider,
        error.model,
        getattr(error, "paid", None),
        "" if isinstance(error, ProviderConnectionError) else str(error),
    )


def some(value: Any) -> Any:
    """Without nulls and empty objects, deep down; but for a message's own empty lists."""
    if isinstance(value, Mapping):
        kept = {name: some(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item is not None and item != {}}
    if isinstance(value, list):
        return [some(item) for item in value]
    return MADE_UP.sub("made up", value) if isinstance(value, str) else value


# -- replies ---------------------------------------------------------------------------------


def answer_for(route: str) -> Reply:
    """A good answer to whatever is asked."""

    async def reply(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("stream"):
            return await events(STREAM[route])(request, body)
        if route == "embedding":
            return await vectors()(request, body)
        return web.json_response(chat() if route == "chat" else text())

    return reply


def chat(*, choices: list[dict[str, Any]] | None = None, **fields: Any) -> dict[str, Any]:
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000}
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    told = {**head, "model": "reported-1", "choices": choices or [choice()], "usage": usage}
    # Of Groq's answers LiteLLM wants a service tier, and they have one.
    return {**told, "service_tier": "default", **fields}


def choice(finish: Any = "stop", index: int = 0, **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": "Hello!", **message}
    return {"index": index, "message": said, "logprobs": None, "finish_reason": finish}


def text(**fields: Any) -> dict[str, Any]:
    one = {"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "stop"}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1_700_000_000, "model": "r-1"}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    return {**head, "choices": [one], "usage": usage, **fields}


def as_json(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None, **how: Any
) -> Reply:
    async def reply(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(value, status=status, headers=headers, **how)

    return reply


def as_text(said: str | bytes, status: int = 200, content_type: str = "text/html") -> Reply:
    async def reply(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        data = said.encode() if isinstance(said, str) else said
        return web.Response(body=data, status=status, content_type=content_type)

    return reply


def vectors(
    spoil: Callable[[dict[str, Any]], None] | None = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """Embeddings of four numbers, in the encoding that is asked for."""

    async def reply(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        given = body["input"] if isinstance(body["input"], list) else [body["input"]]
        rows = []
        for index, _ in enumerate(given):
            row = (np.arange(4, dtype="<f4") + index) / 8
            packed = body.get("encoding_format") == "base64"
            said = base64.b64encode(row.tobytes()).decode() if packed else row.tolist()
            rows.append({"object": "embedding", "index": index, "embedding": said})
        usage = {"prompt_tokens": 6, "total_tokens": 6}
        answer = {"object": "list", "data": rows, "model": "reported-1", "usage": usage}
        if spoil is not None:
            spoil(answer)
        return web.json_response(answer, headers=headers)

    return reply


def events(parts: list[str | bytes], then: str = "end", **headers: str) -> Reply:
    """Server-sent events; `then` the stream ends, stalls, or is cut."""

    async def reply(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **headers})
        await response.prepare(request)
        for part in parts:
            await response.write(part.encode() if isinstance(part, str) else part)
        if then == "stall":
            await asyncio.sleep(60)
        if then == "cut":
            assert request.transport is not None
            request.transport.abort()
        return response

    reply.parts = parts  # type: ignore[attr-defined]
    return reply


def sent_by(reply: Reply) -> list[dict[str, Any]]:
    """The chunks of a reply of `events`."""
    parts: list[str] = reply.parts  # type: ignore[attr-defined]
    lines = [line for part in parts for line in part.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def event(data: Any) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0, **fields: Any) -> str:
    one = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event({**CHUNK, "choices": [one], **fields})


def piece(said: str, finish: str | None = None, **fields: Any) -> str:
    one = {"index": 0, "text": said, "logprobs": None, "finish_reason": finish}
    return event({**CHUNK, "object": "text_completion", "choices": [one], **fields})


CHUNK = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "reported-1"}
TOKENS = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
SPENT = event({**CHUNK, "choices": [], "usage": TOKENS})
DONE = event("[DONE]")
STREAM: dict[str, list[str | bytes]] = {
    "chat": [
        chunk({"role": "assistant", "content": ""}, usage=None),
        chunk({"content": "Hel"}, usage=None),
        chunk({"content": "lo"}, usage=None),
        chunk({}, "stop", usage=None),
        SPENT,
        DONE,
    ],
    "completion": [
        piece("Hel"),
        piece("lo"),
        piece("", "stop"),
        event({**CHUNK, "object": "text_completion", "choices": [], "usage": TOKENS}),
        DONE,
    ],
}


# -- what is talked about -------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello there"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
}
