"""Whole answers that need nobody to read them: OpenAI's shape, and nothing in it that LiteLLM would
put elsewhere or call by another name.

An answer is parsed once (orjson takes 2 µs for a chat's; a scan for its usage in Python would
take longer), and its bytes go back as they came. What is not understood here is no failure:
LiteLLM is given the same answer to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

OWN_ENDS = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
PLAIN_TIERS = frozenset({None, "auto", "default", "standard", "on_demand"})
"""Service tiers at the listed price."""

_MESSAGE = frozenset({"role", "content", "refusal", "tool_calls", "function_call"})
_CALL = frozenset({"id", "type", "function", "index"})
_TEXT = (str, type(None))


def read_answer(route: str, data: bytes) -> dict[str, Any] | None:
    """The body of a chat or a completion; None where LiteLLM is to read it."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict) or body.get("error"):
        return None
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not _has_head(body):
        return None
    is_plain = _is_plain_choice if route == "chat" else _is_plain_text
    for place, choice in enumerate(choices):
        if not is_plain(choice) or choice["index"] != place:
            return None
    return body if is_plain_usage(body.get("usage")) else None


class Vectors(NamedTuple):
    """An embedding answer: OpenAI's objects of vectors, not decoded, and what it says of them."""

    data: list[Any]
    prompt_tokens: int
    model: str


def read_vectors(data: bytes) -> Vectors | None:
    """The parts of an embedding answer; None where LiteLLM is to read it."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict) or body.get("error"):
        return None
    rows, usage, model = body.get("data"), body.get("usage"), body.get("model")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    if not isinstance(usage, dict) or not isinstance(model, str) or not model:
        return None
    tokens = usage.get("prompt_tokens")
    return Vectors(rows, tokens, model) if type(tokens) is int and tokens > 0 else None


def is_plain_usage(usage: Any) -> bool:
    """Whether a provider said what was used, in OpenAI's words."""
    if not isinstance(usage, dict):
        return False
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return False
    if prompt < 0 or completion < 0 or not prompt + completion:
        return False
    if type(usage.get("total_tokens")) is not int:
        return False
    told, said = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    return (told is None or _is_counts(told)) and (said is None or _is_counts(said))


def mend_usage(usage: dict[str, Any]) -> bool:
    """Say DeepSeek's cached tokens where OpenAI says them; whether that was needed."""
    cached = usage.get("prompt_cache_hit_tokens")
    if not cached or (usage.get("prompt_tokens_details") or {}).get("cached_tokens") is not None:
        return False
    usage["prompt_tokens_details"] = {
        **(usage.get("prompt_tokens_details") or {}),
        "cached_tokens": cached,
    }
    return True


def _has_head(body: Mapping[str, Any]) -> bool:
    name, model = body.get("id"), body.get("model")
    named = isinstance(name, str) and isinstance(model, str) and bool(name and model)
    return named and body.get("service_tier") in PLAIN_TIERS


def _is_counts(details: Any) -> bool:
    return isinstance(details, dict) and all(
        value is None or type(value) is int for value in details.values()
    )


def _is_plain_choice(choice: Any) -> bool:
    if not isinstance(choice, dict) or choice.get("finish_reason") not in OWN_ENDS:
        return False
    message = choice.get("message")
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return False
    if not isinstance(message.get("content"), _TEXT) or type(choice.get("index")) is not int:
        return False
    for name, value in message.items():
        if name not in _MESSAGE and value is not None and value != []:
            return False
    return _are_calls(message.get("tool_calls")) and not message.get("function_call")


def _are_calls(calls: Any) -> bool:
    if calls is None:
        return True
    return isinstance(calls, list) and bool(calls) and all(map(_is_call, calls))


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not call.keys() <= _CALL or call.get("type") != "function":
        return False
    function = call.get("function")
    return (
        isinstance(call.get("id"), str)
        and isinstance(function, dict)
        and function.keys() == {"name", "arguments"}
        and all(isinstance(text, str) for text in function.values())
    )


def _is_plain_text(choice: Any) -> bool:
    return (
        isinstance(choice, dict)
        and choice.get("finish_reason") in OWN_ENDS
        and isinstance(choice.get("text"), str)
        and type(choice.get("index")) is int
        and "message" not in choice
    )
