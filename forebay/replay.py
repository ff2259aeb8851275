"""A whole answer, told again as a stream: the chunks that it would come in, word by word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from forebay.codec import Answer
from forebay.tally import StreamTally

_PIECE = re.compile(r"\s*\S{1,24}|\s+")
"""A word with the space before it, as tokens are; pieces of what has no spaces."""
_TEXTS = ("reasoning_content", "content", "refusal")


def chunks(route: str, answer: Answer, told: Answer | None = None) -> Iterator[dict[str, Any]]:
    """OpenAI chunks that amount to `answer`, with its usage in the last one.

    `told` is what the client has of it already; only the rest is given.
    """
    body = answer.body
    kind = "chat.completion.chunk" if route == "chat" else "text_completion"
    head = {name: body[name] for name in body if name not in ("object", "choices", "usage")}
    head["object"] = kind
    before = {} if told is None else {c["index"]: c for c in told.body["choices"]}
    for number, choice in enumerate(body.get("choices") or ()):
        index = choice.get("index", number)
        said = before.get(index, {})
        for part in _chat(choice, said) if route == "chat" else _text(choice, said):
            yield {**head, "choices": [{"index": index, "finish_reason": None, **part}]}
        if not said.get("finish_reason"):
            end: dict[str, Any] = {"delta": {}} if route == "chat" else {"text": ""}
            end["finish_reason"] = choice.get("finish_reason")
            logprobs = _rest(choice.get("logprobs") or {}, said.get("logprobs") or {})
            if logprobs:
                end["logprobs"] = logprobs
            yield {**head, "choices": [{"index": index, **end}]}
    if answer.usage and (told is None or told.estimated):
        yield {**head, "choices": [], "usage": answer.usage}


def told(route: str, pieces: Iterable[bytes], request: dict[str, Any]) -> Answer:
    """What a client has that was given these chunks of a stream, each as JSON."""
    tally = StreamTally(route)
    for piece in pieces:
        tally.add(orjson.loads(piece))
    return tally.answer(request, complete=True)


def _text(choice: dict[str, Any], said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for piece in _pieces(choice.get("text"), said.get("text")):
        yield {"text": piece}


def _chat(choice: dict[str, Any], said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    message: dict[str, Any] = choice.get("message") or {}
    before: dict[str, Any] = said.get("message") or {}
    own = (*_TEXTS, "role", "tool_calls", "function_call")
    extra = {
        name: value
        for name, value in message.items()
        if name not in own and before.get(name) != value
    }
    if not before:
        role, content = message.get("role") or "assistant", message.get("content")
        yield {"delta": {"role": role, "content": None if content is None else "", **extra}}
    elif extra:
        yield {"delta": extra}
    for name in _TEXTS:
        for piece in _pieces(message.get(name), before.get(name)):
            yield {"delta": {name: piece}}
    calls, said_calls = message.get("tool_calls") or [], before.get("tool_calls") or []
    for number, call in enumerate(calls):
        one = said_calls[number] if number < len(said_calls) else None
        for part in _call(call, one):
            yield {"delta": {"tool_calls": [{"index": number, **part}]}}
    if message.get("function_call"):
        for part in _call({"function": message["function_call"]}, _wrapped(before)):
            yield {"delta": {"function_call": part["function"]}}


def _wrapped(message: dict[str, Any]) -> dict[str, Any] | None:
    called = message.get("function_call")
    return {"function": called} if called else None


def _call(call: dict[str, Any], said: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A call's name, then its arguments in pieces."""
    field = "custom" if "custom" in call else "function"
    text = "input" if field == "custom" else "arguments"
    function: dict[str, Any] = call.get(field) or {}
    if said is None:
        head = {name: call[name] for name in call if name != field}
        fixed = {name: function[name] for name in function if name != text}
        yield {**head, field: {**fixed, text: ""}}
    for piece in _pieces(function.get(text), ((said or {}).get(field) or {}).get(text)):
        yield {field: {text: piece}}


def _rest(whole: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """What is left of lists by name, such as log probabilities are."""
    rest = {name: value[len(said.get(name) or ()) :] for name, value in whole.items() if value}
    return {name: value for name, value in rest.items() if value}


def _pieces(whole: str | None, said: str | None) -> list[str]:
    """What is left of a text, in pieces."""
    return _PIECE.findall((whole or "")[len(said or "") :])
