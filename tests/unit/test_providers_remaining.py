from __future__ import annotations

from typing import Any

import pytest

from actors.batcher.policy import Room
from forebay.providers.remaining import RESET_S, room_in


def headers(**told: Any) -> dict[str, Any]:
    return {f"x-ratelimit-{name.replace('_', '-')}": value for name, value in told.items()}


@pytest.mark.parametrize("prefix", ["", "llm_provider-", "LLM_PROVIDER-"])
def test_what_is_left_is_read_under_the_providers_name_and_litellms(prefix: str) -> None:
    told = headers(remaining_requests="3", remaining_tokens="1000", reset_requests="1s")
    assert room_in({prefix + name: value for name, value in told.items()}) == Room(3, 1000, 0.0)


@pytest.mark.parametrize(
    ("reset", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("12.5", 12.5),
        ("soon", RESET_S),
        (None, RESET_S),
        ("9" * 50, RESET_S),
    ],
)
def test_a_limit_that_is_used_up_says_until_when(reset: str | None, seconds: float) -> None:
    told = headers(remaining_requests="0", reset_requests=reset, reset_tokens="1h")
    assert room_in(told) == Room(0, None, pytest.approx(seconds))


@pytest.mark.parametrize("value", ["-1", "", "many", "1.5", "٣"])
def test_what_is_no_count_says_nothing(value: str) -> None:
    assert room_in(headers(remaining_requests=value)) is None


def test_headers_of_something_else_say_nothing() -> None:
    assert room_in({"content-type": "application/json"}) is None
