"""Bytes to dict, under the rules for input: size, depth, one meaning only.

Rule 1: a document that two parsers could read differently is refused: duplicate keys, NaN, bad
        UTF-8, anything after the value.
Rule 2: every bound has its own error: 413 for size, 400 with a code of its own for the rest.
Rule 3: the usual body is parsed once by orjson, and written again to count; only a body that has
        duplicate keys is parsed a second time, to name one.

Why counting is enough: in valid JSON the colons outside strings are as many as the keys that were
written, so duplicates exist exactly when there are more such colons than keys in the parsed tree.
What the tree is written as has its keys' colons, and those in strings, which are in both texts
unless one was written as an escape. So nobody has to tell the two kinds apart.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import orjson

from forebay.errors import InvalidRequest, RequestTooLarge

BODY_BYTES_MAX = 10 * 1024 * 1024
DEPTH_MAX = 64
"""Containers inside one another, the outermost included."""

_SHORT_BYTES = 2048  # to count brackets takes longer than to look at the tree in longer ones
_ESCAPED_COLON = b"\\u003"  # and a few others
_CONTAINERS = frozenset((dict, list))
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_A_NUMBER = re.compile(r"NaN|Infinity")


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises RequestTooLarge (413) over 10 MiB, InvalidRequest (400) for everything else: malformed,
    not an object, deeper than 64, a key given twice, NaN or Infinity.
    """
    if len(raw) > BODY_BYTES_MAX:
        raise too_large()
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        _refuse(raw, error)
    if type(value) is not dict:
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    colons = raw.count(b":")
    is_short = len(raw) <= _SHORT_BYTES and raw.count(b"[") + raw.count(b"{") <= DEPTH_MAX
    if not is_short and _keys(value) == colons:
        return value
    is_plain = _ESCAPED_COLON not in raw and orjson.dumps(value).count(b":") == colons
    if not is_plain and _keys(value) != _colons(raw):
        _refuse_duplicates(raw)
    return value


def too_large() -> RequestTooLarge:
    """What a body over the bound is answered with."""
    mib = BODY_BYTES_MAX // (1024 * 1024)
    return RequestTooLarge(f"The body is larger than {mib} MiB.", code="body_too_large")


def _keys(value: dict[str, Any]) -> int:
    """How many keys the tree has, level by level. Raises when there are too many levels."""
    keys = 0
    level: list[Any] = [value]
    for _ in range(DEPTH_MAX):
        below: list[Any] = []
        for container in level:
            if type(container) is dict:
                keys += len(container)
                children = container.values()
            elif _CONTAINERS.isdisjoint(map(type, container)):
                continue
            else:
                children = container
            below += [child for child in children if type(child) in _CONTAINERS]
        if not below:
            return keys
        level = below
    raise InvalidRequest(
        f"The body is nested more than {DEPTH_MAX} levels deep.", code="json_too_deep"
    )


def _colons(raw: bytes) -> int:
    """The colons outside strings, exactly."""
    return _STRING.sub(b"", raw).count(b":")


def _refuse_duplicates(raw: bytes) -> NoReturn:
    """Parse again, slowly, to name the key that is given twice in one object."""

    def once(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                name = key[:64]
                raise InvalidRequest.about(
                    name, f"The key {name!r} is given twice.", code="duplicate_key"
                )
            seen.add(key)

    json.loads(raw, object_pairs_hook=once)
    raise AssertionError("the body has more colons than keys, and no key twice")


def _refuse(raw: bytes, error: orjson.JSONDecodeError) -> NoReturn:
    """The 400 for bytes that do not parse; never quotes them."""
    if not raw.strip():
        raise InvalidRequest("The body is empty; it must be a JSON object.", code="invalid_json")
    if "depth limit" in error.msg:
        raise InvalidRequest(
            f"The body is nested more than {DEPTH_MAX} levels deep.", code="json_too_deep"
        ) from None
    if _NOT_A_NUMBER.match(error.doc, error.pos):
        raise InvalidRequest("NaN and Infinity are not JSON.", code="not_a_number") from None
    raise InvalidRequest(
        f"The body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).",
        code="invalid_json",
    ) from None
