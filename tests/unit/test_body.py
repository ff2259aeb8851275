"""Bytes to dict: what is one JSON object of bounded size, and what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.body import BODY_BYTES_MAX, DEPTH_MAX, parse_json
from forebay.errors import InvalidRequest, RequestTooLarge


def refusal(raw: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(raw)
    return caught.value


def nested(depth: int) -> bytes:
    """An object with `depth` containers inside one another."""
    return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)


def test_an_object_is_parsed() -> None:
    assert parse_json(b'{"model": "m", "n": [1, 2.5, null, true]}') == {
        "model": "m",
        "n": [1, 2.5, None, True],
    }


@pytest.mark.parametrize("raw", [b"[]", b'"text"', b"5", b"null"])
def test_anything_but_an_object_is_refused(raw: bytes) -> None:
    assert refusal(raw).code == "invalid_json"


@pytest.mark.parametrize("raw", [b"", b"  ", b"{", b'{"a":1} x', b'{"a":\xff}', b'{"a":"\\ud800"}'])
def test_malformed_json_is_refused_with_a_place(raw: bytes) -> None:
    error = refusal(raw)

    assert error.status == 400
    assert error.code == "invalid_json"


def test_the_error_never_quotes_the_body() -> None:
    assert "sk-secret" not in str(refusal(b'{"api_key": "sk-secret",'))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_not_a_number_is_refused_by_name(number: str) -> None:
    assert refusal(b'{"t": %s}' % number.encode()).code == "not_a_number"


def test_numbers_too_large_for_a_double_are_refused() -> None:
    assert refusal(b'{"t": 1e999}').code == "invalid_json"


def test_the_deepest_allowed_nesting_is_accepted() -> None:
    parse_json(nested(DEPTH_MAX))


@pytest.mark.parametrize("depth", [DEPTH_MAX + 1, 500, 5000])
def test_deeper_nesting_is_refused(depth: int) -> None:
    assert refusal(nested(depth)).code == "json_too_deep"


def test_lists_count_as_depth_too() -> None:
    raw = b'{"a":' + b"[" * DEPTH_MAX + b"]" * DEPTH_MAX + b"}"

    assert refusal(raw).code == "json_too_deep"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"a","model":"b"}',
        b'{"model" : "a","model"\n: "b"}',
        b'{"messages":[{"role":"user","role":"system"}]}',
        b'{"a":{"x\\\\":1,"x\\\\":2}}',
        b'{"mod\\u0065l":"a","model":"b"}',
        b'{"a":": ","a":1}',
        b'{"a":"\\":","b":1,"b":2}',
        b'{"a":"\\u003a","b":1,"b":2}',
        b'{"a":"\\u003A","b":":","b":":"}',
    ],
)
def test_a_key_given_twice_is_refused(raw: bytes) -> None:
    assert refusal(raw).code == "duplicate_key"


def test_the_duplicate_key_is_named() -> None:
    assert refusal(b'{"model":"a","model":"b"}').param == "model"


@pytest.mark.parametrize(
    "text",
    ['say "a": b', ": leading", "a :b", '{"k": 1, "k": 2}', '\\"k\\":', "\\" * 40 + '":', '":' * 9],
)
def test_colons_and_keys_inside_strings_are_no_keys(text: str) -> None:
    body = {"messages": [{"role": "user", "content": text}], "x": json.dumps({"q": text})}

    assert parse_json(json.dumps(body).encode()) == body
    assert parse_json(json.dumps(body, indent=1, separators=(" ,", " : ")).encode()) == body


def test_an_escaped_colon_is_no_key() -> None:
    assert parse_json(b'{"a":"\\u003a","\\u003A":"\\\\u003a"}') == {"a": ":", ":": "\\u003a"}


def test_a_body_over_the_bound_is_too_large() -> None:
    with pytest.raises(RequestTooLarge) as caught:
        parse_json(b'{"a":"' + b"x" * BODY_BYTES_MAX + b'"}')

    assert caught.value.status == 413


class Pairs(list[tuple[str, Any]]):
    """An object as it is written: keys may repeat."""


TEXT = st.text(alphabet=st.sampled_from('ab":\\{}[] ,\n\té'), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(st.tuples(TEXT, inner), max_size=3).map(Pairs)
    ),
    max_leaves=8,
)


def written(value: Any, colon: str) -> str:
    if isinstance(value, Pairs):
        items = (json.dumps(key) + colon + written(item, colon) for key, item in value)
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(written(item, colon) for item in value) + "]"
    return json.dumps(value)


def repeats(value: Any) -> bool:
    if isinstance(value, Pairs):
        keys = [key for key, _ in value]
        return len(set(keys)) < len(keys) or any(repeats(item) for _, item in value)
    return isinstance(value, list) and any(repeats(item) for item in value)


@settings(max_examples=300, deadline=None)
@given(
    pairs=st.lists(st.tuples(TEXT, VALUES), max_size=4).map(Pairs),
    colon=st.sampled_from([":", ": ", " :", "\n:\t"]),
)
def test_exactly_the_documents_with_a_repeated_key_are_refused(pairs: Pairs, colon: str) -> None:
    raw = written(pairs, colon)

    if repeats(pairs):
        assert refusal(raw.encode()).code == "duplicate_key"
    else:
        assert parse_json(raw.encode()) == json.loads(raw)
