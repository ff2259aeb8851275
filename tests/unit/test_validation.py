"""Whether an answer is what was asked for, and what each level makes of it."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from forebay.checks.patterns import Pattern
from forebay.config import GatewayConfig
from forebay.errors import ConfigurationError, ResponseValidationError
from forebay.validation import (
    FINDINGS_MAX,
    OWN_RULES_MAX,
    Evaluation,
    ValidationLevel,
    ValidationManager,
    offered,
    validate,
)

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


def test_a_refusal_is_no_empty_answer_but_a_warning() -> None:
    assert bent(answer(None, refusal="I will not.")) == ["the model refused to answer"]


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
        {"properties": {1: {}, "a": {}}},
    ],
    ids=["exponential", "endless", "remote", "dynamic", "dangling", "wrong", "large", "no-json"],
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


# --- the manager ------------------------------------------------------------------------------


def manager(**gateway: Any) -> ValidationManager:
    return ValidationManager(GatewayConfig(**gateway))


def test_a_text_is_judged_as_an_answer_is() -> None:
    made = manager()

    assert made.validate("fine").warnings == []
    assert (
        made.validate("<script>x</script>").warnings
        == made.validate(answer("<script>x</script>")).warnings
    )
    assert made.validate("").broken


def test_levels_decide_what_is_fatal() -> None:
    made = manager(validation_level="strict")
    bad = made.validate("a@b.io")

    assert bad.fatal == bad.warnings == ["the answer holds an e-mail address"]
    assert made.validate("a@b.io", level="moderate").fatal == []
    assert made.validate("", level="moderate").fatal == ["the answer is empty"]
    assert made.validate("", level="lenient").fatal == []
    assert made.validate("", level="lenient").broken


def test_a_rule_can_be_off() -> None:
    made = manager(validation={"off": ["pii", "empty"]})

    assert made.validate("a@b.io <script>").warnings == [
        "the answer holds a tag that runs or loads something"
    ]
    assert made.validate("").warnings == []


def test_a_validator_of_ones_own_breaks_the_rules() -> None:
    made = manager()
    seen: list[Any] = []

    def no_acme(text: str, request: Any) -> str | None:
        seen.append((text, request))
        return "names a competitor" if "Acme" in text else None

    made.add_validator("rivals", no_acme)

    assert made.validate("Acme is better", {"a": 1}).fatal == ["rivals: names a competitor"]
    assert made.validate("we are better").warnings == []
    assert seen[0] == ("Acme is better", {"a": 1})
    assert made.remove("rivals")
    assert not made.remove("rivals")
    assert made.validate("Acme is better").warnings == []


def test_a_validator_may_find_several_things_or_fail() -> None:
    made = manager()
    made.add_validator("two", lambda text, request: ["one", "two"])
    made.add_validator("exits", lambda text, request: sys.exit(1))
    made.add_validator("bad", lambda text, request: str(1 // len(text[3:])))
    judged = made.validate("abc")

    assert judged.fatal == ["two: one", "two: two"]
    assert judged.warnings[2:] == [
        "validator 'exits' failed: SystemExit",
        "validator 'bad' failed: ZeroDivisionError",
    ]


def test_a_validator_that_cannot_answer_at_once_is_refused() -> None:
    async def later(text: str, request: Any) -> None: ...

    for wrong in (later, "no function"):
        with pytest.raises(ConfigurationError, match="plain function"):
            manager().add_validator("late", wrong)  # type: ignore[arg-type]


def test_what_a_pattern_of_many_states_has_not_looked_at_is_a_warning() -> None:
    made = manager()
    made.add_blocked_pattern("wide", "a.{0,900}d")
    chars = Pattern("a.{0,900}d").chars_max

    assert made.validate("ad" + "x" * chars).fatal == ["the answer holds what 'wide' blocks"]
    assert made.validate("x" * chars).warnings == []
    late = made.validate("x" * chars + "ad")
    assert (late.fatal, late.warnings) == (
        [],
        [f"only {chars} characters were searched for 'wide'"],
    )


def test_other_rules_have_another_name() -> None:
    patterns = {"one": {"a": "x"}, "two": {"a": "y"}}
    told: list[dict[str, Any]] = [
        {"validation": {"off": ["pii"]}},
        {"validation": {"blocked_patterns": patterns["one"]}},
        {"validation": {"blocked_patterns": patterns["two"]}},
        {
            "validation": {"moderation_model": "m"},
            "model_list": [{"model_name": "m", "litellm_params": {"model": "openai/m"}}],
        },
        {"enable_validation": False},
    ]
    names = [manager(**one).rules for one in told]

    assert manager().rules == manager(validation_level="strict").rules == ""
    assert len({"", *names}) == 6
    assert names == [manager(**one).rules for one in told]


def test_a_blocked_pattern_is_named_and_its_match_is_not() -> None:
    made = manager(validation={"blocked_patterns": {"projects": r"(?i)bluebird\s+\d+"}})
    made.add_blocked_pattern("soft", "maybe", broken=False)
    judged = made.validate("the BlueBird 7, maybe")

    assert judged.fatal == ["the answer holds what 'projects' blocks"]
    assert judged.warnings[1:] == ["the answer holds what 'soft' blocks"]
    assert made.stats()["blocked_patterns"] == ["projects", "soft"]


def test_what_was_added_by_hand_outlives_a_new_configuration() -> None:
    made = manager(validation={"blocked_patterns": {"a": "x"}})
    made.add_blocked_pattern("b", "y")
    made.configure(GatewayConfig(validation_level="strict"))

    assert made.stats()["blocked_patterns"] == ["b"]
    assert made.level == "strict"


def test_configured_validators_are_those_that_packages_offer() -> None:
    config = GatewayConfig(validation={"validators": ["short"]})
    made = ValidationManager()
    made.configure(config, find=lambda name: lambda text, request: f"{name}: too long")

    assert made.validate("x").fatal == ["short: short: too long"]
    with pytest.raises(ConfigurationError, match="no installed package offers 'short'"):
        ValidationManager(config)


def test_a_package_offers_a_validator_by_an_entry_point() -> None:
    def points(group: str, name: str) -> list[EntryPoint]:
        offers = {"keys": "json:dumps", "gone": "json:no_such_thing"}
        return [EntryPoint(name, offers[name], group)] if name in offers else []

    assert offered("keys", points) is json.dumps
    assert offered("none", points) is None
    with pytest.raises(ConfigurationError, match="'gone' cannot be loaded"):
        offered("gone", points)


def test_there_is_room_for_so_many_rules() -> None:
    made = manager()
    for number in range(OWN_RULES_MAX):
        made.add_blocked_pattern(str(number), "x")
        made.add_validator(str(number), lambda text, request: None)
    made.add_blocked_pattern("0", "y")
    with pytest.raises(ConfigurationError, match="which is the most"):
        made.add_blocked_pattern("more", "x")
    with pytest.raises(ConfigurationError, match="which is the most"):
        made.add_validator("more", lambda text, request: None)

    assert len(made.validate("x").findings) == FINDINGS_MAX


def test_a_wrong_rule_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="linear time"):
        manager().add_blocked_pattern("a", "(?=x)")
    with pytest.raises(ConfigurationError, match="plain function"):
        manager().add_validator("a", "x")  # type: ignore[arg-type]


def test_findings_are_counted_and_told() -> None:
    made = manager()
    heard: list[Evaluation] = []
    made.listener = heard.append
    body = {**answer("a@b.io"), "id": "chatcmpl-1"}
    made.judge(body, {}, tenant="acme", request_id="r1")
    made.judge(answer("fine"), {})
    made.judge(answer(""), {})

    assert made.stats()["findings"] == {"empty": 1, "pii": 1}
    assert (made.stats()["judged"], made.stats()["invalid"]) == (3, 1)
    assert made.figures() == {
        ("forebay_validation_findings", "pii", "warning"): (1,),
        ("forebay_validation_findings", "empty", "error"): (1,),
    }
    assert [(e.name, e.label, e.score) for e in heard] == [
        ("pii", "warn", None),
        ("validation", "warn", 0.5),
        ("validation", "pass", 1.0),
        ("empty", "fail", None),
        ("validation", "fail", 0.0),
    ]
    first = heard[0]
    assert (first.tenant, first.model, first.response_id, first.request_id) == (
        "acme",
        "m",
        "chatcmpl-1",
        "r1",
    )
