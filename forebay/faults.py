"""What is wrong with a configuration, in words: where, what, and the nearest valid name.

Rule 1: a message shows numbers, truth values and names (of models, ids, providers); never another
        text, for it may be a secret.
Rule 2: all faults are found before any is reported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from forebay.errors import ConfigurationError

JsonSchema = dict[str, Any]
Path = tuple[str | int, ...]

_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
_KINDS = {"str": "text", "list": "a list", "tuple": "a list", "dict": "a mapping"}


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with the configuration, and where: keys and indices from the root."""

    path: Path
    message: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message

    def under(self, *path: str | int) -> Fault:
        """The same fault, seen from further up."""
        return Fault((*path, *self.path), self.message)


def dotted(path: Sequence[str | int]) -> str:
    """A place in words: `model_list[0].litellm_params.model`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(name: str, choices: Iterable[str], likeness: float = 0.6) -> str | None:
    """The choice that a misspelt name was probably meant to be, None if none is like enough."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(name.casefold()[:256], by_folded, n=1, cutoff=likeness)
    return by_folded[close[0]] if close else None


def one_of(value: Any, choices: Sequence[str]) -> str:
    """That a value must be one of some names, and which one was probably meant."""
    close = nearest(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean {close!r}?" if close else ""
    return f"must be one of {', '.join(choices)}{hint}"


def refuse(faults: Iterable[Fault]) -> None:
    """Inside a pydantic validator: raise all of these, each below the validator's own place."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError("refused", "{message}", {"message": fault.message}),
            loc=fault.path,
            input=None,
        )
        for fault in faults
    ]
    if details:
        raise ValidationError.from_exception_data("configuration", details, hide_input=True)


def refusal(faults: Sequence[Fault]) -> ConfigurationError:
    """All of these as one error, one a line; its `param` is the first one's place."""
    message = "\n".join(map(str, faults))
    return ConfigurationError(message, param=dotted(faults[0].path) or None)


def translated(error: ValidationError, schema: JsonSchema) -> list[Fault]:
    """Pydantic's findings; `schema` is the JSON schema of what was checked."""
    found = {}
    for line in error.errors(include_url=False):
        path = tuple(part for part in line["loc"] if not _is_tag(part))
        found[path] = Fault(path, _in_words(line, schema, path))
    return list(found.values())


def _is_tag(part: str | int) -> bool:
    """Whether a step is a branch of a union, which pydantic puts into its places."""
    return isinstance(part, str) and (part == "str" or "[" in part)


def _in_words(line: Mapping[str, Any], schema: JsonSchema, path: Path) -> str:
    kind, context, value = line["type"], line.get("ctx") or {}, line["input"]
    if kind == "extra_forbidden":
        return _unknown(str(path[-1]), list(_part(schema, path[:-1]).get("properties", {})))
    if kind == "refused":
        return str(context["message"])
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("literal_error", "enum"):
        return one_of(value, re.findall(r"'([^']*)'", context["expected"]))
    bounds = _bounds(_part(schema, path))
    if bounds and kind.startswith(("greater_than", "less_than")):
        return f"must be {bounds}, not {value!r}"
    if kind.endswith(("_type", "_parsing", "_from_float", "_number")):
        return (
            f"must be {_WANTED.get(kind.partition('_')[0], 'something else')}, not {_kind(value)}"
        )
    text = str(line["msg"]).replace("Input should", "must")
    return f"{text[0].lower()}{text[1:]}"


def _unknown(name: str, valid: Sequence[str]) -> str:
    close = nearest(name, valid)
    if close:
        return f"unknown setting; did you mean {close!r}?"
    return f"unknown setting; the settings here are {', '.join(valid)}"


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    name = type(value).__name__
    return _KINDS.get(name, name)


def _part(schema: JsonSchema, path: Sequence[str | int]) -> JsonSchema:
    """The schema of what is at a path; empty where anything goes."""
    part = _opened(schema, schema)
    for step in path:
        below = part.get("items") if isinstance(step, int) else part.get("properties", {}).get(step)
        part = _opened(below or {}, schema)
    return part


def _opened(part: JsonSchema, schema: JsonSchema) -> JsonSchema:
    """A schema with its reference followed, and its alternatives of one value (null) dropped."""
    if "$ref" in part:
        return _opened(schema["$defs"][part["$ref"].rpartition("/")[2]], schema)
    branches = part.get("anyOf") or part.get("oneOf") or ()
    real = [b for b in branches if b.get("type") != "null" and "const" not in b]
    return _opened(real[0], schema) if len(real) == 1 else part


def _bounds(part: JsonSchema) -> str:
    low, above, high = (part.get(k) for k in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f"from {low:g} to {high:g}"
    found = [("at least", low), ("more than", above), ("at most", high)]
    return " and ".join(f"{word} {bound:g}" for word, bound in found if bound is not None)
