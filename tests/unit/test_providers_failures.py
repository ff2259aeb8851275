"""What failures become, without a network: the table, the texts, the waiting times."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pickle
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

import pytest

from actors.circuit_breaker.policy import Verdict
from forebay import errors
from forebay.errors import (
    BudgetExceeded,
    CircuitBreakerOpenError,
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    Overloaded,
    ProviderConnectionError,
    ProviderError,
    RateLimitError,
    ResponseValidationError,
)
from forebay.providers.base import verdict_of
from forebay.providers.failures import (
    CODE_OF_CLASS,
    RETRY_AFTER_S_MAX,
    STATUS_OF_CLASS,
    error_of,
    retry_after_s,
)
from forebay.providers.redaction import MESSAGE_CHARS_MAX, redact, secrets_in, spoken


def exceptions_of(module: ModuleType) -> list[type[BaseException]]:
    home = module.__name__.partition(".")[0]
    return [
        cls
        for cls in list(vars(module).values())
        if inspect.isclass(cls)
        and issubclass(cls, BaseException)
        and cls.__module__.partition(".")[0] == home
    ]


@pytest.mark.parametrize("name", ["litellm.exceptions", "openai._exceptions"])
def test_every_exception_class_of_the_installed_packages_is_known(name: str) -> None:
    found = exceptions_of(importlib.import_module(name))
    assert len(found) > 15
    missing = [cls.__name__ for cls in found if cls.__name__ not in STATUS_OF_CLASS]
    assert missing == [], "say in STATUS_OF_CLASS what these mean"


def made(cls: type[Any]) -> Any:
    """An instance without its constructor, which each class wants something else for."""
    error = cls.__new__(cls)
    error.args = ("it broke",)
    error.message = "it broke"
    return error


@pytest.mark.parametrize("name", ["litellm.exceptions", "openai._exceptions"])
def test_every_exception_class_becomes_an_error_of_ours(name: str) -> None:
    for cls in exceptions_of(importlib.import_module(name)):
        error = error_of(made(cls), provider="acme", model="m")
        assert isinstance(error, GatewayError)
        assert error.provider == "acme"
        assert error.status not in (401, 403), "a provider's refusal is not the caller's"
        assert verdict_of(error) in Verdict
        if cls.__name__ in CODE_OF_CLASS:
            assert error.code == CODE_OF_CLASS[cls.__name__]
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.__dict__) == (type(error), error.__dict__)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        try:
            if cause is not None:
                raise cause
        finally:
            raise error
    except BaseException as caught:  # noqa: BLE001
        return caught


def test_an_error_of_ours_comes_out_from_under_wrapping() -> None:
    ours = InvalidRequest("dimensions are 64, 128 or 256", param="dimensions")
    litellm = importlib.import_module("litellm")
    wrapped = litellm.APIConnectionError("wrapped", "local", "m")
    assert error_of(raised(wrapped, ours), provider="local", model="m") is ours


def test_a_real_connection_failure_is_told_from_litellms_word_for_everything() -> None:
    litellm = importlib.import_module("litellm")
    wrapped = litellm.APIConnectionError("no idea", "acme", "m")
    bug = error_of(raised(wrapped, KeyError("choices")), provider="acme", model="m")
    assert type(bug) is ProviderError
    gone = error_of(raised(wrapped, ConnectionResetError("reset")), provider="acme", model="m")
    assert type(gone) is ProviderConnectionError


def test_what_was_being_handled_before_the_call_is_another_story() -> None:
    before = TimeoutError("somebody else's")
    error = raised(KeyError("x"), before)
    assert type(error_of(error, provider="acme", model="m", outer=before)) is ProviderError
    assert type(error_of(error, provider="acme", model="m")) is GatewayTimeout


def test_a_chain_that_bites_its_own_tail_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert type(error_of(first, provider="acme", model="m")) is ProviderError


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (None, Verdict.SUCCESS),
        (ProviderError("x", upstream_status=500), Verdict.FAILURE),
        (ProviderError("x"), Verdict.FAILURE),
        (ProviderError("x", upstream_status=401), Verdict.CREDENTIAL),
        (ProviderError("x", upstream_status=403), Verdict.CREDENTIAL),
        (ProviderConnectionError("x"), Verdict.FAILURE),
        (ResponseValidationError("x"), Verdict.FAILURE),
        (GatewayTimeout("x"), Verdict.FAILURE),
        (RateLimitError("x", upstream_status=429, provider="acme"), Verdict.THROTTLED),
        (RateLimitError("a limit of ours"), Verdict.IGNORED),
        (BudgetExceeded("a limit of ours"), Verdict.IGNORED),
        (InvalidRequest("x", upstream_status=400), Verdict.IGNORED),
        (CircuitBreakerOpenError("x"), Verdict.IGNORED),
        (Overloaded("x"), Verdict.IGNORED),
        (asyncio.CancelledError(), Verdict.IGNORED),
        (RuntimeError("x"), Verdict.FAILURE),
    ],
)
def test_the_breaker_hears_who_is_to_blame(error: BaseException | None, verdict: Verdict) -> None:
    assert verdict_of(error) is verdict


def test_every_error_of_ours_has_a_verdict() -> None:
    for cls in vars(errors).values():
        if inspect.isclass(cls) and issubclass(cls, GatewayError):
            assert verdict_of(cls("x")) in Verdict


# --- texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Incorrect API key provided: sk-abcd1234efgh5678.", "Incorrect API key provided: ***"),
        ("Incorrect API key provided: my-own*****key.", "Incorrect API key provided: ***"),
        (
            "header 'Authorization: Bearer abcdef123456' is wrong",
            "header 'Authorization: Bearer ***' is wrong",
        ),
        ("GET /v1?key=AIzaSyA1234567890abcdefghijklmn failed", "GET /v1?key=*** failed"),
        ("AIzaSyA1234567890abcdefghijklmn is not valid", "*** is not valid"),
        ('{"api_key": "deadbeef"}', '{"api_key": "***"}'),
        ("https://user:secret@host/v1 refused", "https://***@host/v1 refused"),
        ("token eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2ln expired", "token *** expired"),
        ("gsk_1234567890 and hf_abcdefghij", "*** and ***"),
        ("AKIAIOSFODNN7EXAMPLE cannot sign", "*** cannot sign"),
        ("the key is to be patient", "the key is to be patient"),
        ("maximum of 4096 tokens, 5000 asked", "maximum of 4096 tokens, 5000 asked"),
    ],
)
def test_what_looks_like_a_key_is_not_shown(text: str, left: str) -> None:
    assert redact(text) == left


def test_known_secrets_are_not_shown_whatever_they_look_like() -> None:
    params = {
        "api_key": "plain words as key",
        "api_base": "http://host/v1",
        "extra_headers": {"x-team": "blue whale", "authorization": "Bearer tip-top-one"},
        "aws_region_name": "eu-central-1",
        "timeout": 5,
    }
    secrets = secrets_in(params)
    text = "plain words as key; blue whale; tip-top-one; http://host/v1; eu-central-1"
    assert redact(text, secrets) == "***; ***; ***; http://host/v1; eu-central-1"


def test_short_values_are_not_searched_for() -> None:
    assert redact("a cat sat", ["a", "cat"]) == "a cat sat"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("litellm.BadRequestError: OpenAIException - no", "no"),
        ("litellm.RateLimitError: RateLimitError: OpenAIException - slow down", "slow down"),
        ("litellm.APIConnectionError: boom\nTraceback (most recent call last):\n  File", "boom"),
        (
            'litellm.BadRequestError: AnthropicException - {"type":"error","error":{"type":"x",'
            '"message":"too long"}}',
            "too long",
        ),
        ('b\'{"error": {"code": 400, "message": "bad"}}\'', "bad"),
        ("nothing to unwrap: really", "nothing to unwrap: really"),
    ],
)
def test_a_providers_words_stand_alone(text: str, left: str) -> None:
    assert spoken(text) == left


def test_long_words_are_cut() -> None:
    assert len(spoken("x" * 100_000)) == MESSAGE_CHARS_MAX


# --- when to come back ------------------------------------------------------------------------

NOON = datetime(2026, 10, 21, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "text", "expected"),
    [
        ({"Retry-After": "3"}, "", 3.0),
        ({"retry-after": "1.5"}, "", 1.5),
        ({"retry-after-ms": "1500"}, "", 1.5),
        ({"llm_provider-retry-after": "4"}, "", 4.0),
        ({"retry-after": "Wed, 21 Oct 2026 12:00:10 GMT"}, "", 10.0),
        ({"retry-after": "Wed, 21 Oct 2026 11:00:00 GMT"}, "", 0.0),
        (
            {
                "retry-after": "Wed, 21 Oct 2026 12:00:10 GMT",
                "date": "Wed, 21 Oct 2026 12:00:04 GMT",
            },
            "",
            6.0,
        ),
        ({}, '{"@type": "RetryInfo", "retryDelay": "17s"}', 17.0),
        ({"retry-after": "-1"}, "", None),
        ({"retry-after": "nan"}, "", None),
        ({"retry-after": "inf"}, "", None),
        ({"retry-after": "999999999"}, "", RETRY_AFTER_S_MAX),
        ({}, "", None),
    ],
)
def test_the_time_to_wait_is_read(
    headers: dict[str, str], text: str, expected: float | None
) -> None:
    assert retry_after_s(headers, text, now=NOON) == expected
