"""The form of a request: what of it decides how LiteLLM words it for a provider.

Two requests of one form to one deployment differ only in texts and numbers that LiteLLM hands on
without looking at them. Whatever it may look at is part of the form: which parameters there are,
the values of those that choose something, the roles in their order, the kinds of contents.

Rule 1: what is not known here has no form, and such a request is LiteLLM's.
Rule 2: a form holds no text of a caller's, only digests of what is compared as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import orjson

EXACT_BYTES_MAX = 256 * 1024
"""Longest JSON that is compared as a whole: tools, schemas. What is longer has no form."""

Form = frozenset[Any]


class Formless(Exception):
    """Not known here."""


def form_of(route: str, body: Mapping[str, Any]) -> Form | None:
    """The form of a checked body; None for one that has parameters or parts not known here."""
    kinds = _KINDS[route]
    parts = []
    try:
        for name, value in body.items():
            if value is not None and name != "model":
                parts.append((name, kinds[name](value)))
    except (Formless, KeyError, TypeError):
        return None
    if body.get("metadata") and body.get("store"):
        return None  # the lane to LiteLLM hands one on with the other
    return frozenset(parts)


def _number(value: Any) -> Any:
    """0 and 1 are what programs look for: "off", "the default", "the only temperature"."""
    if value in (0, 1):
        return value, type(value) is float
    return type(value) is float


def _exact(value: Any) -> Any:
    if isinstance(value, str | bool):
        return value
    data = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    if len(data) > EXACT_BYTES_MAX:
        raise Formless
    return blake2b(data, digest_size=16).digest()


def _filled(value: Any) -> Any:
    return type(value).__name__ if value else not value


def _text(value: str) -> str:
    return "" if not value or value.isspace() else "text"


def _messages(messages: list[dict[str, Any]]) -> Any:
    """Which kinds of messages follow each other: how many there are does not matter."""
    pairs = set()
    before: Any = None
    for message in messages:
        content = message.get("content")
        if len(message) == 2 and type(content) is str and content and not content.isspace():
            kind: Any = message["role"]
        else:
            kind = _message(message)
        pairs.add((before, kind))
        before = kind
    pairs.add((before, None))
    return frozenset(pairs)


def _message(message: dict[str, Any]) -> Any:
    return frozenset([(name, _FIELDS[name](value)) for name, value in message.items()])


def _content(content: Any) -> Any:
    if content is None or isinstance(content, str):
        return content if content is None else _text(content)
    return len(content) > 1, frozenset([_PARTS[part["type"]](part) for part in content])


def _text_part(part: dict[str, Any]) -> Any:
    return frozenset(part), _text(part["text"])


def _image_part(part: dict[str, Any]) -> Any:
    image = part["image_url"]
    url: str = image if isinstance(image, str) else image["url"]
    place = url[:64].partition(";")[0] if url.startswith("data:") else url.partition(":")[0]
    details = image if isinstance(image, dict) else {}
    return frozenset(part), frozenset(details), details.get("detail"), place


def _calls(calls: Any) -> Any:
    return None if calls is None else frozenset([_call(call) for call in calls])


def _call(call: dict[str, Any]) -> Any:
    function = call["function"]
    return (
        frozenset([(name, value is None) for name, value in call.items()]),
        frozenset([(name, _text(value)) for name, value in function.items()]),
    )


def _function(function: dict[str, Any] | None) -> Any:
    if function is None:
        return None
    return frozenset([(name, _text(value)) for name, value in function.items()])


def _prompt(prompt: Any) -> Any:
    """A text, several, token ids, or several of those."""
    if isinstance(prompt, str):
        return _text(prompt)
    first = prompt[0]
    if isinstance(first, str):
        return len(prompt) > 1, frozenset([_text(text) for text in prompt])
    return len(prompt) > 1, type(first).__name__


def _input(texts: list[Any]) -> Any:
    return len(texts) > 1, frozenset([type(text).__name__ for text in texts])


Kind = Callable[[Any], Any]

_PARTS: Mapping[str, Kind] = MappingProxyType({"text": _text_part, "image_url": _image_part})

_FIELDS: Mapping[str, Kind] = MappingProxyType(
    {
        "role": str,
        "content": _content,
        "name": lambda name: name if name is None else _text(name),
        "tool_call_id": _text,
        "tool_calls": _calls,
        "function_call": _function,
        "refusal": lambda text: text if text is None else _text(text),
    }
)

_SAMPLING: Mapping[str, Kind] = MappingProxyType(
    {
        **dict.fromkeys(("temperature", "top_p", "frequency_penalty", "presence_penalty"), _number),
        **dict.fromkeys(("max_tokens", "n", "seed"), _number),
        **dict.fromkeys(("logit_bias", "metadata"), _filled),
        **dict.fromkeys(("stop", "stream", "stream_options"), _exact),
        "user": _text,
    }
)

_KINDS: Mapping[str, Mapping[str, Kind]] = MappingProxyType(
    {
        "chat": {
            **_SAMPLING,
            "messages": _messages,
            **dict.fromkeys(("max_completion_tokens", "top_logprobs"), _number),
            **dict.fromkeys(("prompt_cache_key", "safety_identifier"), _text),
            **dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), _exact),
            **dict.fromkeys(("parallel_tool_calls", "logprobs", "store"), _exact),
            **dict.fromkeys(("response_format", "modalities", "reasoning_effort"), _exact),
            **dict.fromkeys(("verbosity", "service_tier", "prompt_cache_retention"), _exact),
            **dict.fromkeys(("prompt_cache_options", "web_search_options"), _exact),
            **dict.fromkeys(("prediction", "audio", "moderation"), _exact),
        },
        "completion": {
            **_SAMPLING,
            "prompt": _prompt,
            **dict.fromkeys(("best_of", "logprobs"), _number),
            "echo": _exact,
            "suffix": _text,
        },
        "embedding": {
            "input": _input,
            "dimensions": _number,
            "encoding_format": _exact,
            "user": _text,
        },
    }
)


def covered(route: str) -> frozenset[str]:
    """The parameters of a route that a request may have and still be of a form."""
    return frozenset(_KINDS[route])
