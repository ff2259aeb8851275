"""When two requests are of one form, and what LiteLLM's request shows of all of them."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from forebay.providers.relay.ear import Ear
from forebay.providers.relay.forms import EXACT_BYTES_MAX, form_of
from forebay.providers.relay.pool import Origin
from forebay.providers.relay.rules import Rule, asked_of, rule_of

HELLO = [{"role": "user", "content": "Hello"}]
URL = "http://a.example/v1/chat/completions"
HEADERS = {"authorization": "Bearer k", "content-type": "application/json", "user-agent": "LiteLLM"}


def form(**fields: Any) -> Any:
    return form_of("chat", {"messages": HELLO, **fields})


# --- forms --------------------------------------------------------------------------------------


def test_texts_and_numbers_are_no_part_of_a_form() -> None:
    other = [{"role": "user", "content": "Something else"}]
    assert form(temperature=0.3, max_tokens=5) == form(temperature=0.9, max_tokens=700)
    assert form() == form_of("chat", {"model": "any", "messages": other})
    assert form(user="u") == form(user="somebody else")
    assert form(stop=None, n=None) == form()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"temperature": 0.5}, {"top_p": 0.5}),
        ({"temperature": 0.5}, {"temperature": 1.0}),
        ({"temperature": 0.5}, {"temperature": 0}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"n": 1}, {"n": 2}),
        ({"stream": True}, {"stream": False}),
        ({"tool_choice": "auto"}, {"tool_choice": "none"}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"response_format": {"type": "text"}}, {"response_format": {"type": "json_object"}}),
        ({"user": "u"}, {"user": " "}),
    ],
)
def test_what_litellm_may_look_at_is_part_of_a_form(one: Any, other: Any) -> None:
    assert form(**one) != form(**other)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Hello"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \n"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "Hello", "name": "ann"}],
        [*HELLO, *HELLO],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    ],
)
def test_the_kinds_of_messages_are_part_of_a_form(messages: list[dict[str, Any]]) -> None:
    assert form_of("chat", {"messages": messages}) not in (None, form())


def test_how_many_turns_there_are_is_not() -> None:
    turn = [{"role": "assistant", "content": "Hi"}, *HELLO]
    assert form_of("chat", {"messages": [*HELLO, *turn]}) == form_of(
        "chat", {"messages": [*HELLO, *turn, *turn, *turn]}
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 3},
        {"store": True, "metadata": {"a": "b"}},
        {"tools": [{"type": "function", "function": {"name": "x" * EXACT_BYTES_MAX}}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
        {"messages": [{"role": "assistant", "content": "a", "thinking_blocks": []}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}]},
    ],
)
def test_what_is_not_known_has_no_form(fields: dict[str, Any]) -> None:
    assert form(**fields) is None


def test_a_form_holds_no_text_of_a_callers() -> None:
    secret = "a text that is nobody else's"
    told = form(user=secret, stop=[secret], tools=[{"x": secret}], logit_bias={secret: 1})
    called = [{"role": "assistant", "content": secret, "name": secret}]
    assert secret not in repr((told, form_of("chat", {"messages": called})))


# --- rules --------------------------------------------------------------------------------------


def heard(sent: Any, *, url: str = URL, **headers: str) -> Ear:
    ear = Ear()
    ear.heard = 1
    content = sent if isinstance(sent, bytes) else orjson.dumps(sent)
    ear.request = httpx.Request("POST", url, headers={**HEADERS, **headers}, content=content)
    return ear


def rule(asked: dict[str, Any], sent: Any, own: Any = None, **how: Any) -> Rule | None:
    given = asked_of({"model": "the-group", **asked})
    assert given is not None
    return rule_of("chat", given, own or {}, heard({"model": "m", **sent}, **how))


def worded(rule: Rule | None, **fields: Any) -> Any:
    assert rule is not None
    return orjson.loads(rule.worded({"model": "the-group", **fields}))


def test_a_request_is_sent_as_the_one_that_was_overheard() -> None:
    asked = {"messages": HELLO, "user": "u", "max_tokens": 9, "stop": None}
    shown = rule(
        asked, {"messages": HELLO, "max_completion_tokens": 9, "top_p": 0.5}, {"top_p": 0.5}
    )
    assert shown is not None
    assert shown.target.origin == Origin("a.example", 80, None)
    request, *headers = shown.target.head.split(b"\r\n")
    assert request == b"POST /v1/chat/completions HTTP/1.1"
    assert {b"host: a.example", b"authorization: Bearer k", b"user-agent: forebay"} <= set(headers)
    assert headers[-1] == b"content-length: "
    other = [{"role": "user", "content": "Else"}]
    assert worded(shown, messages=other, user="v", max_tokens=70, stop=None) == {
        "model": "m",
        "messages": other,
        "max_completion_tokens": 70,
        "top_p": 0.5,
    }


def test_messages_may_lose_their_nulls() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": []}
    bare = {"role": "assistant", "tool_calls": []}
    shown = rule({"messages": [message]}, {"messages": [bare]})
    assert worded(shown, messages=[message, *HELLO])["messages"] == [bare, *HELLO]


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"temperature": 0.5}, {"temperature": 0.7}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"messages": HELLO}, {"messages": [{"role": "user", "content": "Hello!"}]}),
        ({}, {"safe_prompt": True}),
        ({"max_tokens": 9}, {"max_completion_tokens": 10}),
        ({"max_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": 9}),
    ],
)
def test_of_a_change_there_is_no_rule(asked: dict[str, Any], sent: dict[str, Any]) -> None:
    assert rule(asked, sent) is None


def test_of_what_cannot_be_told_there_is_no_rule() -> None:
    assert rule({}, {}) is not None
    assert rule({}, {}, **{"x-of-its-own": "1"}) is None
    assert rule({}, {}, {"extra_headers": {"X-Of-Its-Own": "1"}}, **{"x-of-its-own": "1"})
    assert rule({}, {}, url="http://a.example/v1/messages") is None
    assert rule_of("chat", {}, {}, heard(b"no JSON")) is None
    assert rule_of("chat", {}, {}, Ear()) is None
    twice, proxied = heard({"model": "m"}), heard({"model": "m"})
    twice.heard, proxied.proxied = 2, True
    assert rule_of("chat", {}, {}, twice) is None
    assert rule_of("chat", {}, {}, proxied) is None
