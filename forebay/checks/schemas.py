"""Whether a value fits a JSON schema that came from a caller.

Rule 1: evaluating one is bounded: no fetching of references, no regular expressions of theirs,
        STEPS_MAX keywords per value.
Rule 2: a schema that cannot be checked bends the rules, and breaks none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from forebay.checks.finding import Finding, Rule

STEPS_MAX = 10_000
"""Keywords evaluated for one value; a plain schema needs one or two per value in it."""
SCHEMAS_MAX = 128
"""Compiled schemas kept; applications send the same few again and again."""
SCHEMA_BYTES_MAX = 32 * 1024

_IGNORED = ("pattern", "patternProperties", "unevaluatedProperties", "uniqueItems", "format")


class _TooMuch(Exception):
    """The schema needs more steps than it may have."""


def misfit(value: Any, schema: dict[str, Any], what: str, rule: Rule) -> Iterator[Finding]:
    """Where the value breaks the schema, if it does. `what` is what the value is, in words."""
    try:
        text = json.dumps(schema, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        yield Finding(f"the schema is no JSON; {what} is unchecked", False, rule)
        return
    if len(text) > SCHEMA_BYTES_MAX:
        yield Finding(f"the schema is too large to check {what} against", False, rule)
        return
    errors = _compiled(text)
    if errors is None:
        yield Finding(f"the schema is no valid JSON schema; {what} is unchecked", False, rule)
        return
    from referencing.exceptions import Unresolvable

    try:
        first = next(iter(errors(value)), None)
    except (_TooMuch, RecursionError):
        yield Finding(f"the schema takes too long to check {what} against", False, rule)
    except Unresolvable:
        yield Finding("the schema refers to what it does not hold", False, rule)
    else:
        if first is not None:
            yield Finding(f"{what} does not fit its schema at {first}", True, rule)


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
