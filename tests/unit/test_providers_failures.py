"""What failures become, without a network: the table, the texts, the waiting times."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pickle
import socket
import ssl
from datetime import UTC, datetime
from types import ModuleType, SimpleNamespace
from typing import Any

import aiohttp
import httpx
import pytest

from actors.circuit_breaker.policy import Verdict
from forebay import errors
from forebay.errors import (
    BudgetExceeded,
    CircuitBreakerOpenError,
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ProviderConnectionError,
    ProviderError,
    RateLimitError,
    ResponseValidationError,
)
from forebay.providers.base import MODEL_REFUSED, NO_BASE64, verdict_of
from forebay.providers.failures import (
    RETRY_AFTER_S_MAX,
    STATUS_OF_CLASS,
    error_of,
    retry_after_s,
)
from forebay.providers.redaction import MESSAGE_CHARS_MAX, redact, secrets_in, spoken

BROKE = "it broke"


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


REQUEST = httpx.Request("POST", "http://host/v1")
STATUSES = {
    "APIResponseValidationError": 200,
    "BadRequestError": 400,
    "AuthenticationError": 401,
    "OAuthError": 401,
    "PermissionDeniedError": 403,
    "NotFoundError": 404,
    "ConflictError": 409,
    "UnprocessableEntityError": 422,
    "RateLimitError": 429,
    "InternalServerError": 500,
    "APIStatusError": 503,
}
ARGUMENTS: dict[str, Any] = {
    "message": BROKE,
    "model": "m",
    "llm_provider": "acme",
    "custom_llm_provider": "acme",
    "request": REQUEST,
    "body": None,
    "status_code": 503,
    "failures": [],
    "request_data": {},
    "raw_response": "{}",
    "schema": "{}",
    "current_cost": 2.0,
    "max_budget": 1.0,
    "entity_type": "EMAIL",
    "route_to_model": "n",
    "session_id": "s",
    "unsent_messages": [],
    "completion": SimpleNamespace(usage=None),
}


def made(cls: type[Any]) -> Any:
    """An instance, by its own constructor, with what that wants and no more."""
    told = {"error": {"message": BROKE}}
    response = httpx.Response(STATUSES.get(cls.__name__, 400), request=REQUEST, json=told)
    given = {**ARGUMENTS, "response": response}
    wanted = [
        parameter.name
        for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]
        if parameter.name == "message" or parameter.default is parameter.empty
    ]
    if wanted == ["args", "kwargs"]:
        return cls(BROKE)
    return cls(**{name: given[name] for name in wanted})


REFUSED = (InvalidRequest, None, Verdict.IGNORED)
FILTERED = (InvalidRequest, "content_filter", Verdict.IGNORED)
CREDENTIAL = (ProviderError, "provider_credentials", Verdict.CREDENTIAL)
FAILED = (ProviderError, None, Verdict.FAILURE)
UNREACHED = (ProviderConnectionError, None, Verdict.UNREACHABLE)
LATE = (GatewayTimeout, "timeout", Verdict.UNREACHABLE)
MEANINGS: dict[str, tuple[type[GatewayError], str | None, Verdict]] = {
    "AuthenticationError": CREDENTIAL,
    "OAuthError": CREDENTIAL,
    "SubjectTokenProviderError": CREDENTIAL,
    "PermissionDeniedError": CREDENTIAL,
    "PaymentRequiredError": (ProviderError, "provider_quota", Verdict.CREDENTIAL),
    "RateLimitError": (RateLimitError, "rate_limit_exceeded", Verdict.THROTTLED),
    "NotFoundError": (ModelNotFound, "model_not_found", Verdict.IGNORED),
    "BadRequestError": REFUSED,
    "ConflictError": REFUSED,
    "ImageFetchError": REFUSED,
    "InvalidRequestError": REFUSED,
    "LiteLLMUnknownProvider": REFUSED,
    "ModifyResponseException": REFUSED,
    "RejectedRequestError": REFUSED,
    "SensitiveDataRouteException": REFUSED,
    "UnprocessableEntityError": REFUSED,
    "UnsupportedParamsError": REFUSED,
    "VectorStoreSearchError": (InvalidRequest, "vector_store_search_failed", Verdict.IGNORED),
    "ContextWindowExceededError": (InvalidRequest, "context_length_exceeded", Verdict.IGNORED),
    "ContentPolicyViolationError": FILTERED,
    "ContentFilterFinishReasonError": FILTERED,
    "GuardrailRaisedException": FILTERED,
    "BlockedPiiEntityError": FILTERED,
    "Timeout": LATE,
    "APITimeoutError": LATE,
}
"""What the classes mean that are not simply a failure of the provider."""


@pytest.mark.parametrize("name", ["litellm.exceptions", "openai._exceptions"])
def test_every_exception_class_becomes_an_error_of_ours(name: str) -> None:
    for cls in exceptions_of(importlib.import_module(name)):
        error = error_of(made(cls), provider="acme", model="m")
        meant = MEANINGS.get(cls.__name__, FAILED)
        if (name, cls.__name__) == ("openai._exceptions", "APIConnectionError"):
            meant = UNREACHED
        assert (type(error), error.code, verdict_of(error)) == meant, cls
        unprocessable = cls.__name__ == "UnprocessableEntityError"
        assert error.status == (422 if unprocessable else type(error).status), cls
        assert error.body().keys() == {"message", "type", "param", "code"}
        assert (error.provider, error.model) == ("acme", "m")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.__dict__) == (type(error), error.__dict__)


def test_every_exception_that_litellms_handlers_raise_goes_by_its_status() -> None:
    importlib.import_module("litellm")
    base = importlib.import_module("litellm.llms.base_llm.chat.transformation").BaseLLMException

    def below(cls: type[Any]) -> list[type[Any]]:
        return [cls, *(found for sub in cls.__subclasses__() for found in below(sub))]

    found = below(base)
    assert len(found) > 20
    expected = {400: InvalidRequest, 401: ProviderError, 429: RateLimitError, 503: ProviderError}
    for cls in found:
        for status, kind in expected.items():
            error: Any = BaseException.__new__(cls)
            error.args, error.message, error.status_code = (BROKE,), BROKE, status
            ours = error_of(error, provider="acme", model="m")
            assert (type(ours), ours.upstream_status) == (kind, status), cls


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (httpx.ConnectError("no"), ProviderConnectionError),
        (httpx.ConnectTimeout("no"), GatewayTimeout),
        (httpx.ReadTimeout("no"), GatewayTimeout),
        (httpx.PoolTimeout("no"), GatewayTimeout),
        (httpx.ReadError("no"), ProviderConnectionError),
        (httpx.RemoteProtocolError("no"), ProviderConnectionError),
        (httpx.ProxyError("no"), ProviderConnectionError),
        (aiohttp.ServerDisconnectedError(), ProviderConnectionError),
        (aiohttp.ClientPayloadError("half"), ProviderConnectionError),
        (aiohttp.ServerTimeoutError("no"), GatewayTimeout),
        (ssl.SSLCertVerificationError("no"), ProviderConnectionError),
        (socket.gaierror("no such host"), ProviderConnectionError),
        (ConnectionRefusedError("no"), ProviderConnectionError),
        (BrokenPipeError("no"), ProviderConnectionError),
        (TimeoutError("no"), GatewayTimeout),
    ],
)
def test_what_happens_below_http_is_told_from_an_answer(
    error: BaseException, expected: type[GatewayError]
) -> None:
    litellm = importlib.import_module("litellm")
    wrapped = raised(litellm.InternalServerError("no idea", "acme", "m"), error)
    for told in (error, wrapped):
        ours = error_of(told, provider="acme", model="m")
        assert type(ours) is expected
        assert verdict_of(ours) is Verdict.UNREACHABLE


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


def answered(status: int, **said: Any) -> BaseException:
    """What LiteLLM raises when OpenAI's client was answered so."""
    openai, litellm = importlib.import_module("openai"), importlib.import_module("litellm")
    response = httpx.Response(status, request=REQUEST, json={"error": said})
    client = openai.APIStatusError(said["message"], response=response, body=said)
    return raised(litellm.APIError(status, f"wrapped: {said['message']}", "acme", "m"), client)


NO_ACCESS = "Project `proj_1` does not have access to model `gpt-5`"
NO_KEY = "You are not allowed to sample from this engine"
FLAGGED = 'acme/m requires moderation. Your input was flagged for "sexual".'


@pytest.mark.parametrize(
    ("said", "expected", "code"),
    [
        ({"message": "no", "code": "model_not_found"}, ModelNotFound, "model_not_found"),
        ({"message": NO_ACCESS, "code": None}, ModelNotFound, "model_not_found"),
        ({"message": FLAGGED, "code": 403}, InvalidRequest, "content_filter"),
        ({"message": "no", "code": "content_policy_violation"}, InvalidRequest, "content_filter"),
        ({"message": "no", "type": "moderation"}, InvalidRequest, "content_filter"),
        ({"message": "Your account was flagged"}, ProviderError, "provider_credentials"),
        ({"message": NO_KEY, "code": "forbidden"}, ProviderError, "provider_credentials"),
    ],
)
@pytest.mark.parametrize("filled", [False, True])
def test_a_403_about_the_model_or_the_prompt_does_not_blame_our_key(
    said: dict[str, Any], expected: type[GatewayError], code: str, filled: bool
) -> None:
    error = error_of(answered(403, **said), provider="acme", model="m", filled=filled)
    ours = expected is ProviderError
    assert type(error) is expected
    assert error.code == (MODEL_REFUSED if ours and filled else code)
    assert error.upstream_status == 403
    blame = Verdict.FAILURE if filled else Verdict.CREDENTIAL
    assert verdict_of(error) is (blame if ours else Verdict.IGNORED)


@pytest.mark.parametrize("status", [401, 402])
def test_a_bad_key_is_a_bad_key_whatever_the_words_and_whoever_chose_the_name(status: int) -> None:
    for message in (NO_ACCESS, FLAGGED, NO_KEY):
        error = error_of(answered(status, message=message), provider="a", model="m", filled=True)
        assert verdict_of(error) is Verdict.CREDENTIAL


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
        (ProviderError("x", upstream_status=403, code=MODEL_REFUSED), Verdict.FAILURE),
        (ProviderError("x", code=NO_BASE64), Verdict.SUCCESS),
        (ProviderConnectionError("x"), Verdict.UNREACHABLE),
        (ResponseValidationError("x"), Verdict.FAILURE),
        (GatewayTimeout("x"), Verdict.UNREACHABLE),
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


# --- to another process -----------------------------------------------------------------------

KEY = "sk-do-not-show-this-4711"


def every_error() -> list[type[GatewayError]]:
    return [
        cls
        for cls in vars(errors).values()
        if inspect.isclass(cls) and issubclass(cls, GatewayError)
    ]


@pytest.mark.parametrize("cls", every_error())
def test_an_error_arrives_in_another_process_as_it_was(cls: type[GatewayError]) -> None:
    error = cls(
        BROKE,
        param="p",
        code="c",
        status=418,
        retry_after_s=1.5,
        model="m",
        provider="acme",
        upstream_status=503,
        figures={"requests": (1, 2)},
    )
    error.__cause__ = KeyError("choices")
    error.add_note("while it rained")
    again = pickle.loads(pickle.dumps(error))
    twice = pickle.loads(pickle.dumps(again))
    for one in (again, twice):
        assert type(one) is cls
        assert one.__dict__ == error.__dict__
        assert str(one) == str(error)
        assert str(one.__cause__) == "KeyError: 'choices'"


def test_what_an_error_was_raised_from_shows_no_key() -> None:
    error = ProviderError("it broke")
    error.__cause__ = ValueError(f"Authorization: Bearer {KEY}")
    assert KEY.encode() not in pickle.dumps(error)


def test_an_error_without_a_cause_gets_none() -> None:
    again = pickle.loads(pickle.dumps(raised(ProviderError("it broke"), KeyError("x"))))
    assert again.__cause__ is None


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
