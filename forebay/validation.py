"""Whether a provider's answer is what was asked for.

Rule 1: a rule is broken (an error) or bent (a warning); the level decides what follows.
Rule 2: an answer that was cut short by its own token limit is bent, never broken: the caller asked
        for that limit and sees `finish_reason`.
Rule 3: schemas come from callers, so evaluating one is bounded: no fetching of references, no
        regular expressions of theirs, STEPS_MAX keywords per answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import orjson

from forebay.errors import ResponseValidationError

STEPS_MAX = 10_000
"""Keywords evaluated for one answer; a plain schema needs one or two per value."""
SCHEMAS_MAX = 128
"""Compiled schemas kept; applications send the same few again and again."""
SCHEMA_BYTES_MAX = 32 * 1024

_CUT = ("length", "content_filter")
_IGNORED = ("pattern", "patternProperties", "unevaluatedProperties", "uniqueItems", "format")


class ValidationLevel(StrEnum):
    """strict raises on everything, moderate on errors, lenient on nothing."""

    STRICT = "strict"
    MODERATE = "moderate"
    LENIENT = "lenient"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about an answer that its caller should know."""

    message: str
    broken: bool


def validate(body: Mapping[str, Any], request: Mapping[str, Any], level: str) -> list[str]:
    """What is wrong with the OpenAI-shaped answer `body` to `request`: one sentence each.

    Raises ResponseValidationError (502) at level strict for any finding, at moderate for broken
    rules: no choices, an empty answer, JSON that was asked for and is none or does not fit its
    schema, tool arguments that are no JSON.
    """
    found = list(findings(body, request))
    fatal = [
        finding.message
        for finding in found
        if level == ValidationLevel.STRICT or (level == ValidationLevel.MODERATE and finding.broken)
    ]
    if fatal:
        message = "The provider's answer is not valid: " + "; ".join(fatal) + "."
        raise ResponseValidationError(message, model=body.get("model"))
    return [finding.message for finding in found]


def findings(body: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[Finding]:
    """Every finding about every choice, in order. Decides nothing."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        yield Finding("the answer has no choices", broken=True)
        return
    for choice in choices:
        yield from _of_choice(choice, request)


def _of_choice(choice: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[Finding]:
    message: Mapping[str, Any] = choice.get("message") or {}
    text = message.get("content") or choice.get("text") or ""
    calls = message.get("tool_calls") or []
    reason = choice.get("finish_reason")
    cut = reason in _CUT
    if reason == "length":
        yield Finding("the answer was cut at its token limit", broken=False)
    elif reason == "content_filter":
        yield Finding("the provider's content filter cut the answer", broken=False)
    if not cut and _empty(text, message):
        # A stop sequence of the caller's may well come first.
        yield Finding("the answer is empty", broken=not request.get("stop"))
    for call in calls:
        yield from _of_call(call, cut)
    if text and isinstance(text, str) and not calls:
        yield from _of_json(text, request.get("response_format"), cut)


def _empty(text: Any, message: Mapping[str, Any]) -> bool:
    others = ("tool_calls", "function_call", "refusal", "audio", "images")
    said = text.strip() if isinstance(text, str) else text
    return not said and not any(message.get(name) for name in others)


def _of_call(call: Mapping[str, Any], cut: bool) -> Iterator[Finding]:
    function = call.get("function")
    if not isinstance(function, dict):
        return
    arguments = function.get("arguments")
    if arguments in (None, ""):  # a function without parameters
        return
    value, ok = _parsed(arguments)
    if not ok or not isinstance(value, dict):
        name = str(function.get("name"))[:64]
        yield Finding(f"the arguments of the call to {name!r} are no JSON object", broken=not cut)


def _of_json(text: str, response_format: Any, cut: bool) -> Iterator[Finding]:
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind not in ("json_object", "json_schema"):
        return
    value, ok = _parsed(text)
    if not ok:
        yield Finding("the answer is not the JSON that was asked for", broken=not cut)
        return
    schema = (response_format.get("json_schema") or {}).get("schema")
    if kind == "json_schema" and isinstance(schema, dict):
        yield from _of_schema(value, schema)


def _parsed(text: Any) -> tuple[Any, bool]:
    try:
        return orjson.loads(text), True
    except orjson.JSONDecodeError:
        return None, False


# --- schemas ----------------------------------------------------------------------------------


class _TooMuch(Exception):
    """The schema needs more steps than it may have."""


def _of_schema(value: Any, schema: dict[str, Any]) -> Iterator[Finding]:
    text = json.dumps(schema, sort_keys=True)
    if len(text) > SCHEMA_BYTES_MAX:
        yield Finding("the schema is too large to check the answer against", broken=False)
        return
    errors = _compiled(text)
    if errors is None:
        yield Finding("the schema is no valid JSON schema; the answer is unchecked", broken=False)
        return
    from referencing.exceptions import Unresolvable

    try:
        first = next(iter(errors(value)), None)
    except (_TooMuch, RecursionError):
        yield Finding("the schema takes too long to check the answer against", broken=False)
    except Unresolvable:
        yield Finding("the schema refers to what it does not hold", broken=False)
    else:
        if first is not None:
            yield Finding(f"the answer does not fit its schema at {first}", broken=True)


@lru_cache(maxsize=SCHEMAS_MAX)
def _compiled(text: str) -> Callable[[Any], Iterable[str]] | None:
    """A function from a value to the places where it breaks the schema; None for a bad schema."""
    # 60 ms to import, and only structured outputs need it.
    from jsonschema import (  # type: ignore[import-untyped]
        Draft202012Validator,
        SchemaError,
        validators,
    )
    from referencing import Registry

    schema = json.loads(text)
    rules = Draft202012Validator.VALIDATORS

    def additional(validator: Any, rule: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if "patternProperties" not in schema:  # else it would need a regular expression
            yield from rules["additionalProperties"](validator, rule, instance, schema)

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError:
        return None

    def errors(value: Any) -> Iterator[str]:
        steps = iter(range(STEPS_MAX))
        keywords = {
            name: _counted(keyword, steps)
            for name, keyword in rules.items()
            if name not in _IGNORED
        }
        keywords["additionalProperties"] = _counted(additional, steps)
        bounded = validators.create(
            Draft202012Validator.META_SCHEMA,
            keywords,
            type_checker=Draft202012Validator.TYPE_CHECKER,
        )
        for error in bounded(schema, registry=Registry()).iter_errors(value):
            yield f"{error.json_path} ({error.validator})"

    return errors


def _counted(keyword: Callable[..., Any], steps: Iterator[int]) -> Callable[..., Iterator[Any]]:
    """The keyword's check, taking one of `steps` each time."""

    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if next(steps, None) is None:
            raise _TooMuch
        yield from keyword(validator, value, instance, schema) or ()

    return check
