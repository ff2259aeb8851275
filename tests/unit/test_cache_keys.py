"""Metamorphic tests of what an answer is called: each parameter of each route, as the schemas list
them, splits the key; each other spelling of the same request shares it; nobody shares it who may
not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actors.cache.policy import TRANSPORT_FIELDS, Scope, key, model_mark, text_keys
from forebay import schemas

ACME = Scope("acme")
BASE: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}]},
    "completion": {"prompt": "Hello"},
    "embedding": {"input": "Hello"},
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"n": {"minimum": 1}}}}
OTHER_FUNCTION = {
    "name": "f",
    "parameters": {"type": "object", "properties": {"n": {"minimum": 2}}},
}
SAMPLES: dict[str, list[Any]] = {
    "audio": [{"voice": "alloy", "format": "wav"}, {"voice": "alloy", "format": "mp3"}],
    "best_of": [1, 2],
    "dimensions": [8, 16],
    "echo": [True, False],
    "frequency_penalty": [0, 0.5, -0.5],
    "function_call": ["none", "auto", {"name": "f"}, {"name": "g"}],
    "functions": [[FUNCTION], [OTHER_FUNCTION], [FUNCTION, OTHER_FUNCTION]],
    "input": ["one", "two", ["one", "two"], ["two", "one"], [1, 2], ["onetwo"]],
    "logit_bias": [{"1": 1}, {"1": 2}, {"2": 1}],
    "logprobs": [True, False],
    "max_completion_tokens": [1, 2],
    "max_tokens": [1, 2],
    "messages": [
        [{"role": "user", "content": "Hello "}],
        [{"role": "user", "content": "hello"}],
        [{"role": "system", "content": "Hello"}],
        [{"role": "user", "content": "Hello", "name": "ann"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        [{"role": "user", "content": "Hello"}, {"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "Hell"}, {"role": "user", "content": "o"}],
    ],
    "modalities": [["text"], ["text", "audio"]],
    "moderation": [{"model": "one"}, {"model": "two"}],
    "n": [1, 2],
    "parallel_tool_calls": [True, False],
    "prediction": [{"type": "content", "content": "a"}, {"type": "content", "content": "b"}],
    "presence_penalty": [0, 0.5, -0.5],
    "prompt": ["one", "two", ["one", "two"], ["two", "one"], [1, 2]],
    "prompt_cache_options": [{"mode": "implicit"}, {"mode": "explicit"}],
    "reasoning_effort": ["low", "high"],
    "response_format": [{"type": "text"}, {"type": "json_object"}],
    "seed": [0, 1, -1],
    "service_tier": ["auto", "flex"],
    "stop": ["a", ["a", "b"], ["b", "a"]],
    "store": [True, False],
    "suffix": ["a", "b", ""],
    "temperature": [0, 0.5, 1],
    "tool_choice": ["none", "auto", "required"],
    "tools": [
        [{"type": "function", "function": FUNCTION}],
        [{"type": "function", "function": OTHER_FUNCTION}],
    ],
    "top_logprobs": [0, 1],
    "top_p": [0.1, 1],
    "verbosity": ["low", "high"],
    "web_search_options": [{"search_context_size": "low"}, {"search_context_size": "high"}],
    "thinking": [{"type": "enabled", "budget_tokens": 9}, {"type": "enabled", "budget_tokens": 8}],
    "top_k": [1, 2],
}
"""Values of each parameter that mean different things, all of them valid."""
OF_ITS_ROUTE = {("completion", "logprobs"): [0, 1, 5]}
TRANSPORT: dict[str, Any] = {
    "encoding_format": "base64",
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "u",
}
EXTRAS = frozenset(schemas.Extras.__annotations__)
PLACES = [
    (route, name)
    for route in schemas.ROUTES
    for name in sorted(schemas.parameters(route) | EXTRAS)
    if name not in TRANSPORT_FIELDS
]


def values(route: str, name: str) -> list[Any]:
    return OF_ITS_ROUTE.get((route, name), SAMPLES[name])


def checked(route: str, **changes: Any) -> dict[str, Any]:
    """A body of the route that the schema accepts."""
    body = BASE[route] | changes
    schemas.check(route, {"model": "m", **body}, EXTRAS)
    return body


@pytest.mark.parametrize(("route", "name"), PLACES)
def test_every_parameter_of_every_route_splits_the_key(route: str, name: str) -> None:
    bodies = [checked(route), *(checked(route, **{name: value}) for value in values(route, name))]
    keys = {key(ACME, route, "m", body) for body in bodies}
    assert len(keys) == len(bodies)


@pytest.mark.parametrize(("route", "name"), PLACES)
def test_every_other_spelling_of_it_shares_the_key(route: str, name: str) -> None:
    for value in values(route, name):
        body = checked(route, **{name: value})
        plain = key(ACME, route, "m", body)
        for twin in (
            dict(reversed(body.items())),
            json.loads(json.dumps(body, sort_keys=True, indent=2)),
            json.loads(json.dumps(turned(body))),
            {**body, "user": None, "seed": body.get("seed")},
        ):
            assert key(ACME, route, "m", twin) == plain


def turned(value: Any) -> Any:
    """The same JSON: fields in the other order, whole numbers with a point."""
    if isinstance(value, dict):
        return {name: turned(inner) for name, inner in reversed(value.items())}
    if isinstance(value, list):
        return [turned(inner) for inner in value]
    return float(value) if type(value) is int else value


@pytest.mark.parametrize("route", schemas.ROUTES)
def test_what_only_travels_or_names_the_user_is_left_out(route: str) -> None:
    left_out = TRANSPORT_FIELDS & schemas.parameters(route) - {"model"}
    assert left_out <= TRANSPORT.keys()
    for name in left_out:
        changes = {name: TRANSPORT[name]}
        if name == "stream_options":
            changes["stream"] = True
        assert key(ACME, route, "m", checked(route, **changes)) == key(
            ACME, route, "m", BASE[route]
        )


def test_what_the_model_means_is_a_part_of_the_key_and_its_name_can_be_told_from_it() -> None:
    body = BASE["chat"]
    plain = key(ACME, "chat", "m", body, "openai/a")
    others = {
        key(ACME, "chat", "m", body, "openai/b"),
        key(ACME, "chat", "n", body, "openai/a"),
        key(ACME, "chat", "m o", body, "penai/a"),
        key(ACME, "chat", "mopenai/a", body),
        key(ACME, "completion", "m", body, "openai/a"),
    }
    assert len(others | {plain}) == 6
    assert plain.endswith(model_mark("m"))
    (text,) = text_keys(ACME, "embedding", "m", {}, ["x"], "openai/a")
    assert text.endswith(model_mark("m"))
    assert text_keys(ACME, "embedding", "m", {}, ["x"], "openai/b") != [text]


def test_no_tenant_shares_a_key_whatever_it_is_called_or_writes_into_its_request() -> None:
    tenants = [
        None, "a", "a:b", "b", "A", "", " ", "a ", "everybody", "tenant a", "None", "null",
        "a\0", "a/b", "*", "\ud800",
    ]  # fmt: skip
    forged: list[dict[str, Any]] = [
        {}, *({name: "a"} for name in ("tenant", "tenant_id", "scope", "namespace", "mark")),
        {"tenant": None}, {"scope": None},
    ]  # fmt: skip
    seen: dict[bytes, str | None] = {}
    for tenant in tenants:
        for fields in forged:
            name = key(Scope(tenant), "chat", "m", BASE["chat"] | fields)
            assert seen.setdefault(name, tenant) == tenant
    texts = {text_keys(Scope(tenant), "embedding", "m", {}, ["x"])[0] for tenant in tenants}
    assert len(texts) == len(tenants)


@pytest.mark.parametrize("route", schemas.ROUTES)
def test_what_is_not_in_the_schemas_is_not_understood(route: str) -> None:
    whole = dict.fromkeys(schemas.parameters(route) | EXTRAS, 1)
    assert schemas.understands(route, whole)
    assert not schemas.understands(route, whole | {"session": 1})
