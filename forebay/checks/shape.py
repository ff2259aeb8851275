"""Whether an answer has the shape that was asked for: there, whole, JSON, calls that can be made.

Rule 1: an answer that was cut short by its own token limit is bent, never broken: the caller asked
        for that limit and sees `finish_reason`. So is a refusal, which is an answer too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from forebay.checks.finding import Finding
from forebay.checks.schemas import misfit

REFUSAL_CHARS_MAX = 600
"""A longer text that begins like a refusal goes on with an answer."""

_CUT = ("length", "content_filter")
_SORRY = ("i'm sorry", "i am sorry", "sorry", "i apologize", "my apologies", "unfortunately")
_UNABLE = (
    *("i can't ", "i cannot ", "i can not ", "i won't ", "i will not ", "i'm unable to "),
    *("i am unable to ", "i'm not able to ", "i am not able to "),
)
_HELP = ("assist", "help", "comply", "provide", "fulfill", "fulfil", "do that", "continue")


def shape(body: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[Finding]:
    """Every finding about every choice, in order."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        yield Finding("the answer has no choices", True, "empty")
        return
    for choice in choices:
        yield from _of_choice(choice, request)


def texts_of(body: Mapping[str, Any]) -> Iterator[str]:
    """What the choices say, reasoning and tool calls left out."""
    choices = body.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        text = (choice.get("message") or {}).get("content") or choice.get("text")
        if isinstance(text, str) and text:
            yield text


def _of_choice(choice: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[Finding]:
    message: Mapping[str, Any] = choice.get("message") or {}
    text = message.get("content") or choice.get("text") or ""
    calls = message.get("tool_calls") or []
    reason = choice.get("finish_reason")
    cut = reason in _CUT
    if reason == "length":
        yield Finding("the answer was cut at its token limit", False, "truncated")
    elif reason == "content_filter":
        yield Finding("the provider's content filter cut the answer", False, "truncated")
    if message.get("refusal") or (isinstance(text, str) and not calls and _refuses(text)):
        yield Finding("the model refused to answer", False, "refusal")
    if not cut and _empty(text, message):
        # A stop sequence of the caller's may well come first.
        yield Finding("the answer is empty", not request.get("stop"), "empty")
    legacy = message.get("function_call")
    for call in [*calls, {"function": legacy}] if legacy else calls:
        yield from _of_call(call, request, cut)
    wanted = request.get("response_format")
    if isinstance(wanted, dict) and text and isinstance(text, str) and not calls:
        yield from _of_json(text, wanted, cut)


def _empty(text: Any, message: Mapping[str, Any]) -> bool:
    others = ("tool_calls", "function_call", "refusal", "audio", "images")
    said = text.strip() if isinstance(text, str) else text
    return not said and not any(message.get(name) for name in others)


def _refuses(text: str) -> bool:
    """Whether a short text begins as models do that will not answer, in English."""
    if len(text) > REFUSAL_CHARS_MAX:
        return False
    start = text[:160].strip().lower().replace("\u2019", "'")
    after = start
    if start.startswith(_SORRY):
        word = next(word for word in _SORRY if start.startswith(word))
        after = start[len(word) :].lstrip(" ,.!;:-\u2014").removeprefix("but ")
    if not after.startswith(_UNABLE):
        return False
    word = next(word for word in _UNABLE if after.startswith(word))
    return after is not start or after[len(word) :].startswith(_HELP)


def _of_call(call: Mapping[str, Any], request: Mapping[str, Any], cut: bool) -> Iterator[Finding]:
    function = call.get("function")
    if not isinstance(function, dict):
        return
    name = str(function.get("name"))
    shown = repr(name[:64])
    tools = _tools(request)
    if tools and name not in tools:
        yield Finding(f"the answer calls {shown}, a tool that was not offered", not cut, "tools")
        return
    arguments = function.get("arguments")
    value, ok = ({}, True) if arguments in (None, "") else _parsed(arguments)
    if not ok or not isinstance(value, dict):
        yield Finding(f"the arguments of the call to {shown} are no JSON object", not cut, "tools")
        return
    schema = tools.get(name)
    if isinstance(schema, dict) and schema and not cut:
        yield from misfit(value, schema, f"the call to {shown}", "tools")


def _tools(request: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of the tools that were offered, by name."""
    found: dict[str, Any] = {}
    for tool in request.get("tools") or ():
        if not isinstance(tool, dict):
            continue
        function = tool.get("function")
        if not isinstance(function, dict):
            return {}  # a custom tool takes any text, and its calls look like others'
        found[str(function.get("name"))] = function.get("parameters")
    for function in request.get("functions") or ():  # what tools were called before
        if isinstance(function, dict):
            found[str(function.get("name"))] = function.get("parameters")
    return found


def _of_json(text: str, response_format: dict[str, Any], cut: bool) -> Iterator[Finding]:
    kind = response_format.get("type")
    if kind not in ("json_object", "json_schema"):
        return
    value, ok = _parsed(text)
    if not ok:
        yield Finding("the answer is not the JSON that was asked for", not cut, "json")
        return
    schema = (response_format.get("json_schema") or {}).get("schema")
    if kind == "json_schema" and isinstance(schema, dict):
        yield from misfit(value, schema, "the answer", "schema")


def _parsed(text: Any) -> tuple[Any, bool]:
    try:
        return orjson.loads(text), True
    except orjson.JSONDecodeError:
        return None, False
