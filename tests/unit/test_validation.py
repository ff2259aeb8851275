"""Whether an answer is what was asked for, and what each level makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forebay.errors import ResponseValidationError
from forebay.validation import ValidationLevel, validate

SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
    },
    "required": ["age"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": ["a", "b"]}},
}


def answer(text: str | None = "hi", finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **message}
    return {"model": "m", "choices": [{"message": message, "finish_reason": finish_reason}]}


def calling(arguments: str | None) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return answer(None, "tool_calls", tool_calls=[call])


def wants(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    }


WANTS_JSON = {"response_format": {"type": "json_object"}}


def moderate(body: dict[str, Any], request: dict[str, Any] | None = None) -> list[str]:
    return validate(body, request or {}, ValidationLevel.MODERATE)


def broken(body: dict[str, Any], request: dict[str, Any] | None = None) -> str:
    """What moderate raises on, strict raises on, and lenient returns."""
    with pytest.raises(ResponseValidationError) as caught:
        moderate(body, request)
    with pytest.raises(ResponseValidationError):
        validate(body, request or {}, ValidationLevel.STRICT)
    assert validate(body, request or {}, ValidationLevel.LENIENT)
    return str(caught.value)


def bent(body: dict[str, Any], request: dict[str, Any] | None = None) -> list[str]:
    """What moderate returns and strict raises on."""
    with pytest.raises(ResponseValidationError):
        validate(body, request or {}, ValidationLevel.STRICT)
    warnings = moderate(body, request)
    assert warnings == validate(body, request or {}, ValidationLevel.LENIENT)
    return warnings


def test_a_plain_answer_is_fine_at_every_level() -> None:
    assert all(validate(answer(), {}, level) == [] for level in ValidationLevel)


def test_a_text_completion_is_fine() -> None:
    body = {"choices": [{"text": "hi", "finish_reason": "stop"}]}

    assert validate(body, {"prompt": "x"}, "strict") == []


def test_the_error_is_a_502_that_names_the_model() -> None:
    with pytest.raises(ResponseValidationError) as caught:
        moderate(answer(""))

    assert caught.value.status == 502
    assert caught.value.model == "m"


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None}])
def test_no_choices_break_the_rules(body: dict[str, Any]) -> None:
    assert "no choices" in broken(body)


@pytest.mark.parametrize("text", ["", None, " \n"])
def test_an_empty_answer_breaks_the_rules(text: str | None) -> None:
    assert "empty" in broken(answer(text))


def test_an_empty_answer_may_come_of_a_stop_sequence() -> None:
    assert bent(answer(""), {"stop": ["."]}) == ["the answer is empty"]


def test_a_refusal_is_no_empty_answer() -> None:
    assert validate(answer(None, refusal="I will not."), {}, "strict") == []


def test_an_answer_cut_at_its_limit_is_a_warning_even_when_empty() -> None:
    assert bent(answer("", "length")) == ["the answer was cut at its token limit"]


def test_a_filtered_answer_is_a_warning() -> None:
    assert len(bent(answer(None, "content_filter"))) == 1


def test_json_that_was_asked_for_and_is_none_breaks_the_rules() -> None:
    assert "not the JSON" in broken(answer("Sure! {}"), WANTS_JSON)


def test_json_cut_at_the_limit_is_a_warning() -> None:
    assert len(bent(answer('{"a":', "length"), WANTS_JSON)) == 2


def test_json_that_was_not_asked_for_is_not_looked_at() -> None:
    assert validate(answer('{"a":'), {"response_format": {"type": "text"}}, "strict") == []


@pytest.mark.parametrize("text", ['{"age": 5}', '{"age": 5, "tags": ["a", "b"]}'])
def test_an_answer_that_fits_its_schema_is_fine(text: str) -> None:
    assert validate(answer(text), wants(SCHEMA), "strict") == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"age": "5"}', "$.age (type)"),
        ("{}", "$ (required)"),
        ('{"age": 5, "tags": ["a", "z"]}', "$.tags[1] (enum)"),
        ('{"age": 5, "name": 1}', "$ (additionalProperties)"),
    ],
)
def test_an_answer_that_does_not_fit_its_schema_is_told_where(text: str, where: str) -> None:
    assert where in broken(answer(text), wants(SCHEMA))


DOUBLING = {
    "$ref": "#/$defs/a0",
    "$defs": {
        **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)},
        "a40": {"type": "integer"},
    },
}


@pytest.mark.parametrize(
    "schema",
    [
        DOUBLING,
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1:1/schema"},
        {"$dynamicRef": "http://127.0.0.1:1/schema"},
        {"$ref": "#/nowhere"},
        {"type": 5},
        {"enum": ["x" * 40_000]},
    ],
    ids=["exponential", "endless", "remote", "remote-dynamic", "dangling", "wrong", "large"],
)
def test_a_schema_that_cannot_be_checked_is_a_warning(schema: dict[str, Any]) -> None:
    assert len(bent(answer("1"), wants(schema))) == 1


def test_regular_expressions_of_callers_are_never_run() -> None:
    evil = "^(a+)+$"
    schema = {
        "type": "object",
        "patternProperties": {evil: False},
        "additionalProperties": {"type": "string", "pattern": evil},
        "propertyNames": {"pattern": evil},
    }

    text = json.dumps({"a" * 60 + "!": "a" * 60 + "!"})

    assert moderate(answer(text), wants(schema)) == []


@pytest.mark.parametrize("arguments", ["{}", '{"a": 1}', "", None])
def test_tool_arguments_that_are_an_object_are_fine(arguments: str | None) -> None:
    assert validate(calling(arguments), WANTS_JSON, "strict") == []


@pytest.mark.parametrize("arguments", ["{", "city=Paris", "[1]"])
def test_tool_arguments_that_are_none_break_the_rules(arguments: str) -> None:
    assert "call to 'f'" in broken(calling(arguments))
