"""Answers by JSON schema, and the columns they become."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pyarrow as pa
from referencing.exceptions import Unresolvable

from forebay.errors import ConfigurationError
from forebay.pipelines.vectors import plain

NAME = "row"


def check(schema: Mapping[str, Any], taken: Sequence[str] = ()) -> None:
    """
    Raises:
        ConfigurationError: it is no JSON schema, or none of an object with properties, or one of
            these has the name of a column that is `taken`.
    """
    validator = jsonschema.Draft202012Validator
    try:
        validator.check_schema(schema, format_checker=validator.FORMAT_CHECKER)
    except jsonschema.SchemaError as error:
        raise ConfigurationError(f"schema: {error.message}", param="schema") from None
    properties = schema.get("properties")
    if schema.get("type") != "object" or not isinstance(properties, Mapping) or not properties:
        raise ConfigurationError(
            'schema: it must be of "type": "object" with "properties"; each becomes a column',
            param="schema",
        )
    for name in taken:
        if name in properties:
            raise ConfigurationError(
                f"schema: a property cannot be called {name!r}, as a column of every job is",
                param="schema",
            )
    try:
        validator(schema).is_valid(dict.fromkeys(properties))
    except Unresolvable as error:
        raise ConfigurationError(f"schema: {error}", param="schema") from None


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What OpenAI's `response_format` says to get answers by the schema."""
    return {"type": "json_schema", "json_schema": {"name": NAME, "schema": dict(schema)}}


def read(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """An answer's object.

    Raises:
        ValueError: it is not JSON, or not by the schema.
    """
    try:
        found = json.loads(text)
        error: Any = jsonschema.exceptions.best_match(
            jsonschema.Draft202012Validator(schema).iter_errors(found)
        )
    except (RecursionError, OverflowError):
        raise ValueError("the answer is nested too deeply, or has too large a number") from None
    except ValueError:
        raise ValueError("the answer is no JSON") from None
    if error is not None:
        raise ValueError(f"the answer is not by the schema: {error.message}"[:500])
    assert isinstance(found, dict)
    for name, one in schema["properties"].items():
        value, most = found.get(name), _MOST.get(_kind(one))
        if value is not None and most is not None and abs(value) >= most:
            raise ValueError(f"{name} is too large a number")
    return found


def columns(schema: Mapping[str, Any], rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The properties as Arrow columns; what has no simple type is JSON text."""
    made = {}
    for name, one in schema["properties"].items():
        kind = _kind(one)
        values = [None if row is None else row.get(name) for row in rows]
        convert: Callable[[Any], Any] = _CONVERT.get(kind, json.dumps)
        values = [None if value is None else convert(value) for value in values]
        made[name] = pa.array(values, _TYPES.get(kind, pa.string()))
    return made


def _kind(schema: Any) -> str:
    """The simple type that a property has; empty if it may be several things, or a nested one."""
    named = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = [named] if isinstance(named, str) else list(named or ())
    kinds = [kind for kind in kinds if kind != "null"]
    return kinds[0] if len(kinds) == 1 and kinds[0] in _TYPES else ""


_TYPES = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
_MOST = {"integer": 2**63, "number": 2**1023}
_CONVERT: dict[str, Callable[[Any], Any]] = {
    "string": plain,
    "integer": int,
    "number": float,
    "boolean": bool,
}
