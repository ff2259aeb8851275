"""Anthropic's wire format: messages, and their event stream."""

from __future__ import annotations

from typing import Any

import orjson

from tests.support.simulator.dialects.ask import (
    Ask,
    BadAsk,
    Choice,
    Frame,
    Reply,
    Request,
    Tool,
    field_int,
    field_str,
    flatten,
)
from tests.support.simulator.dialects.openai import split_messages

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Anthropic:
    """Reads and writes Anthropic's bodies."""

    request_id_header = b"request-id"

    def read(self, route: str, request: Request, body: dict[str, Any]) -> Ask:
        model = field_str(body, "model")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadAsk("messages: at least one message is required", param="messages")
        max_tokens = field_int(body, "max_tokens")
        if max_tokens is None and route == "messages":
            raise BadAsk("max_tokens: Field required", param="max_tokens")
        prompt, context = split_messages(messages)
        system = flatten(body.get("system"))
        tools = body.get("tools") or []
        choice: dict[str, Any] = body.get("tool_choice") or {}
        kind = choice.get("type", "")
        forced = str(choice.get("name", "")) if kind == "tool" else kind.replace("auto", "")
        last = messages[-1].get("content")
        return Ask(
            route,
            model,
            (prompt,),
            context=system + context,
            stream=body.get("stream") is True,
            max_tokens=max_tokens,
            tools=[
                Tool(str(tool.get("name", "")), tool.get("input_schema") or {})
                for tool in tools
                if isinstance(tool, dict)
            ],
            forced=forced,
            after_tool=isinstance(last, list)
            and any(isinstance(b, dict) and b.get("type") == "tool_result" for b in last),
        )

    def answer(self, ask: Ask, reply: Reply) -> bytes:
        if ask.route == "count_tokens":
            return orjson.dumps({"input_tokens": reply.prompt_tokens})
        choice = reply.choices[0]
        body = _message(ask, reply)
        body["content"] = [_block(choice)]
        body["stop_reason"] = _STOPS[choice.finish]
        body["usage"] = _usage(reply, reply.completion_tokens)
        return orjson.dumps(body)

    def frames(self, ask: Ask, reply: Reply) -> list[Frame]:
        choice = reply.choices[0]
        message = _message(ask, reply)
        message["usage"] = _usage(reply, 1)
        frames = [Frame(_event("message_start", {"message": message}))]
        if choice.tool is None:
            start: dict[str, Any] = {"type": "text", "text": ""}
        else:
            start = {**_block(choice), "input": {}}
        frames.append(Frame(_event("content_block_start", {"index": 0, "content_block": start})))
        frames.append(Frame(_event("ping", {})))
        for piece in choice.pieces:
            if choice.tool is None:
                delta = {"type": "text_delta", "text": piece}
            else:
                delta = {"type": "input_json_delta", "partial_json": piece}
            frames.append(Frame(_event("content_block_delta", {"index": 0, "delta": delta}), 1))
        frames.append(Frame(_event("content_block_stop", {"index": 0})))
        stop = {"stop_reason": _STOPS[choice.finish], "stop_sequence": None}
        usage = {"output_tokens": reply.completion_tokens if reply.usage else 0}
        frames.append(Frame(_event("message_delta", {"delta": stop, "usage": usage})))
        frames.append(Frame(_event("message_stop", {})))
        return frames

    def error(
        self, status: int, message: str, param: str | None, code: str | None, wait_s: float | None
    ) -> bytes:
        kind = code or _TYPES.get(status, "api_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **data}))


def _message(ask: Ask, reply: Reply) -> dict[str, Any]:
    return {
        "id": "msg_" + reply.id,
        "type": "message",
        "role": "assistant",
        "model": ask.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _block(choice: Choice) -> dict[str, Any]:
    if choice.tool is None:
        return {"type": "text", "text": choice.text}
    arguments = orjson.loads(choice.tool.arguments)
    identity = choice.tool.id.replace("call_", "toolu_")
    return {"type": "tool_use", "id": identity, "name": choice.tool.name, "input": arguments}


def _usage(reply: Reply, output_tokens: int) -> dict[str, int]:
    if not reply.usage:
        return {"input_tokens": 0, "output_tokens": 0}
    return {
        "input_tokens": reply.prompt_tokens - reply.cached_tokens - reply.written_tokens,
        "cache_creation_input_tokens": reply.written_tokens,
        "cache_read_input_tokens": reply.cached_tokens,
        "output_tokens": output_tokens,
    }
