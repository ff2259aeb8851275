"""LiteLLM's objects as plain OpenAI JSON.

LiteLLM answers with pydantic models that hold OpenAI's fields, its own, and many nulls. Here they
become dicts with OpenAI's fields, those that providers add (reasoning, thinking blocks,
citations), and nulls only where OpenAI has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain_chat(response: Any) -> dict[str, Any]:
    """A ModelResponse as a chat completion."""
    body = _head(response)
    for choice in body["choices"]:
        _unwrap(choice)
        choice.setdefault("logprobs", None)
        message = choice["message"] = _some(choice["message"])
        _unwrap(message)
        for call in message.get("tool_calls", ()):
            call.pop("index", None)
        message.setdefault("content", None)
        message.setdefault("refusal", None)
    if "usage" in body:
        body["usage"] = plain_usage(body["usage"])
    return body


def plain_text(response: Any) -> dict[str, Any]:
    """A TextCompletionResponse as a text completion."""
    body = _head(response)
    for choice in body["choices"]:
        message = choice.pop("message", None)
        if choice.get("text") is None:
            choice["text"] = (message or {}).get("content") or ""
        _unwrap(choice)
    if "usage" in body:
        body["usage"] = plain_usage(body["usage"])
    return body


def plain_chat_chunk(chunk: Any) -> dict[str, Any]:
    """A ModelResponseStream as a chat completion chunk."""
    body = _head(chunk)
    for choice in body["choices"]:
        choice.setdefault("logprobs", None)
        delta = choice["delta"] = _some(choice["delta"])
        _unwrap(delta)
        if "tool_calls" in delta:
            delta["tool_calls"] = [_some_deep(call) for call in delta["tool_calls"]]
    return _with_usage(body, "delta")


def plain_text_chunk(chunk: Any) -> dict[str, Any]:
    """A text completion chunk."""
    body = _head(chunk)
    for choice in body["choices"]:
        choice["text"] = choice.get("text") or ""
        choice.pop("reasoning_content", None)
        _unwrap(choice)
    return _with_usage(body, "text")


def plain_usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Usage without nulls, and without the cost that LiteLLM writes into it."""
    told = _some_deep(usage)
    told.pop("cost", None)
    return {name: value for name, value in told.items() if value != {}}


def _with_usage(body: dict[str, Any], said: str) -> dict[str, Any]:
    """LiteLLM's usage chunk has an empty choice where OpenAI's has none."""
    usage = body.get("usage")
    if usage is not None:
        body["usage"] = plain_usage(usage)
        if all(not c.get(said) and c.get("finish_reason") is None for c in body["choices"]):
            body["choices"] = []
    return body


def _head(response: Any) -> dict[str, Any]:
    """A response without nulls, and without the lists that LiteLLM has for Vertex alone."""
    return {
        name: value
        for name, value in response.model_dump().items()
        if value is not None and not (value == [] and name.startswith("vertex_ai_"))
    }


def _unwrap(holder: dict[str, Any]) -> None:
    """Put what LiteLLM moved into `provider_specific_fields` back where OpenAI has it."""
    moved = holder.pop("provider_specific_fields", None)
    for name in ("images", "thinking_blocks"):
        if holder.get(name) == []:
            del holder[name]
    if moved:
        moved = _some(moved)
        if "refusal" in moved:
            holder["refusal"] = moved.pop("refusal")
        if moved:
            holder["provider_specific_fields"] = moved


def _some(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _some_deep(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _some(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if value is not None
    }
