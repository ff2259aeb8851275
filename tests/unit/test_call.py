"""A call from Python: OpenAI's parameters, and ours among them."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.call import Call
from forebay.errors import InvalidRequest


@pytest.mark.parametrize(
    ("keywords", "read", "write", "ttl_s"),
    [
        ({}, True, True, None),
        ({"cache": None}, True, True, None),
        ({"cache": True}, True, True, None),
        ({"cache": {}}, True, True, None),
        ({"cache_ttl": 60}, True, True, 60),
        ({"cache": {"ttl": 60}}, True, True, 60),
        ({"cache": {"ttl": 60}, "cache_ttl": 90}, True, True, 60),
        ({"cache": {"ttl": None}, "cache_ttl": 90}, True, True, 90),
        ({"cache": {"no-cache": True}}, False, True, None),
        ({"cache": {"no-cache": False, "no-store": False}}, True, True, None),
        ({"cache": {"no-store": True}}, False, False, None),
        ({"cache": {"no-cache": True, "no-store": True}}, False, False, None),
        ({"cache": False}, False, False, None),
    ],
)
def test_a_request_says_what_the_cache_may_do(
    keywords: dict[str, Any], read: bool, write: bool, ttl_s: float | None
) -> None:
    call = Call.of("chat", {"model": "m", **keywords})

    assert (call.cache_read, call.cache_write, call.cache_ttl_s) == (read, write, ttl_s)
    assert call.body == {"model": "m"}, "the provider hears nothing of it"


@pytest.mark.parametrize(
    "keywords",
    [
        {"cache": "no-store"},
        {"cache": 0},
        {"cache": {"no_store": True}},
        {"cache": {"no-store": "yes"}},
        {"cache": {"ttl": 0}},
        {"cache": {"ttl": "60"}},
        {"cache": {"ttl": True}},
        {"cache_ttl": -1},
        {"cache_ttl": float("nan")},
        {"cache_ttl": float("inf")},
        {"cache_ttl": 1e300},
        {"cache_ttl": 10**400},
        {"cache": {"ttl": 10**400}},
    ],
)
def test_what_the_cache_cannot_do_is_an_error_that_names_the_field(
    keywords: dict[str, Any],
) -> None:
    with pytest.raises(InvalidRequest, match="cache") as caught:
        Call.of("chat", {"model": "m", **keywords})

    assert caught.value.param in ("cache", "cache_ttl")
