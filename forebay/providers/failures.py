"""What a failed provider call becomes.

Rule 1: the status that a provider really answered with decides. LiteLLM chooses its classes by
        words in the text, so a class counts only where no answer is known.
Rule 2: a provider that refuses *our* key is a bad gateway (502), never the caller's 401.
Rule 3: all text from a provider passes `redaction.spoken`.

    a provider answered                 becomes                      the breaker hears
    400, 422, other 4xx                 InvalidRequest               ignored
    404                                 ModelNotFound                ignored
    413                                 RequestTooLarge              ignored
    401, 402, 403                       ProviderError (502)          credential
    403, of a model it does not give    ModelNotFound                ignored
    403, of what was asked              InvalidRequest               ignored
    403, of a name filled in            ProviderError (502)          failure
    429                                 RateLimitError (429)         throttled
    408, or nothing in time             GatewayTimeout (504)         unreachable
    5xx, or what makes no sense         ProviderError (502)          failure
    over no connection, or half         ProviderConnectionError      unreachable
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any

from forebay.errors import (
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    ModelNotFound,
    ProviderConnectionError,
    ProviderError,
    RateLimitError,
    RequestTooLarge,
)
from forebay.providers.base import MODEL_REFUSED
from forebay.providers.redaction import error_object, spoken

CHAIN_MAX = 32
RETRY_AFTER_S_MAX = 86_400.0

STATUS_OF_CLASS: Mapping[str, int | None] = MappingProxyType(
    {
        # LiteLLM's
        "InvalidRequestError": 400,
        "RejectedRequestError": 400,
        "UnsupportedParamsError": 400,
        "ContextWindowExceededError": 400,
        "ContentPolicyViolationError": 400,
        "ImageFetchError": 400,
        "VectorStoreSearchError": 400,
        "LiteLLMUnknownProvider": 400,
        "GuardrailRaisedException": 400,
        "BlockedPiiEntityError": 400,
        "ModifyResponseException": 400,
        "SensitiveDataRouteException": 400,
        "PaymentRequiredError": 402,
        "ServiceUnavailableError": 503,
        "BadGatewayError": 502,
        "MidStreamFallbackError": None,
        "Timeout": None,
        "MockException": None,
        "JSONSchemaValidationError": None,
        "BudgetExceededError": None,
        "ModelNotMappedError": None,
        # both have them
        "BadRequestError": 400,
        "AuthenticationError": 401,
        "PermissionDeniedError": 403,
        "NotFoundError": 404,
        "UnprocessableEntityError": 422,
        "RateLimitError": 429,
        "InternalServerError": 500,
        "APIError": None,
        "APIConnectionError": None,
        "APIResponseValidationError": None,
        "OpenAIError": None,
        # openai's
        "ConflictError": 409,
        "APIStatusError": None,
        "APITimeoutError": None,
        "APIWebSocketConnectionClosedError": None,
        "LengthFinishReasonError": None,
        "ContentFilterFinishReasonError": 400,
        "InvalidWebhookSignatureError": None,
        "WebSocketConnectionClosedError": None,
        "WebSocketQueueFullError": None,
        "OAuthError": 401,
        "SubjectTokenProviderError": 401,
    }
)
"""Class name → the status it stands for; None: the instance or what lies behind it tells. A test
walks the installed packages and fails when a class is missing here."""

CODE_OF_CLASS: Mapping[str, str] = MappingProxyType(
    {
        "ContextWindowExceededError": "context_length_exceeded",
        "ContentPolicyViolationError": "content_filter",
        "ContentFilterFinishReasonError": "content_filter",
        "GuardrailRaisedException": "content_filter",
        "BlockedPiiEntityError": "content_filter",
    }
)

STATUS_OF_KIND: Mapping[str, int] = MappingProxyType(
    {
        "rate_limit_exceeded": 429,
        "rate_limit_error": 429,
        "insufficient_quota": 429,
        "resource_exhausted": 429,
        "context_length_exceeded": 400,
        "content_filter": 400,
        "content_policy_violation": 400,
        "invalid_request_error": 400,
        "authentication_error": 401,
        "invalid_api_key": 401,
        "permission_error": 403,
        "overloaded_error": 529,
        "api_error": 500,
        "server_error": 500,
    }
)
"""What an error event inside a stream means, by its `code` or `type`; it has no status."""

UNKNOWN, UNREADABLE = 500, 422
"""What LiteLLM's handlers say of all that they do not understand, and of an answer that they cannot
read. Where a provider really said one of these, its client's exception is behind it and tells."""

NOT_FOUND, FILTERED = "model_not_found", "content_filter"
_FILTERS = frozenset({FILTERED, "content_policy_violation", "moderation", "moderation_blocked"})
_NO_SUCH_MODEL = re.compile(r"not have access to (the )?model\b", re.IGNORECASE)
_FLAGGED = re.compile(
    r"\b(input|prompt|content|text|image|message|request)s? (\w+ ){1,3}flagged\b", re.IGNORECASE
)
"""What providers say with a 403 that is not about our key. (A flagged *account* is.)"""

_BEFORE_SENDING = frozenset({"UnsupportedParamsError", "LiteLLMUnknownProvider", "ImageFetchError"})
_TIMEOUTS = frozenset({"APITimeoutError", "TimeoutException", "ServerTimeoutError"})
_NETWORK = frozenset(
    {"APIConnectionError", "TransportError", "ClientConnectionError", "ClientPayloadError"}
)

_UNCONNECTED = frozenset(
    {"ConnectError", "ConnectTimeout", "PoolTimeout", "ClientConnectorError"}
    | {"ConnectionTimeoutError", "ConnectionRefusedError", "gaierror"}
)
"""What is said before anything can have been sent."""


class ErrorEvent(Exception):
    """An error that a provider sent inside a stream. `body` is the event, parsed."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        inner = body.get("error")
        said = inner if isinstance(inner, str) else error_object(body).get("message")
        super().__init__(said if isinstance(said, str) and said else "an error without words")
        self.body = body


@dataclass(slots=True)
class _Found:
    """What an exception and those behind it tell."""

    ours: GatewayError | None = None
    answered: int | None = None  # the status of a real answer
    claimed: int | None = None  # what LiteLLM's handler says the status was
    implied: int | None = None  # what LiteLLM's class stands for
    before_sending: bool = False
    timed_out: bool = False
    disconnected: bool = False
    unconnected: bool = False  # there never was a connection
    code: str | None = None
    param: str | None = None
    kinds: list[str] = field(default_factory=list)
    said: str = ""  # in the provider's own words
    wrapped: str = ""  # in LiteLLM's
    headers: Mapping[str, str] = field(default_factory=dict)

    def status(self) -> int | None:
        """The best known status; None when nobody answered, or it cannot be told."""
        if self.answered is not None:
            return self.answered
        for kind in self.kinds:
            if kind in STATUS_OF_KIND:
                return STATUS_OF_KIND[kind]
        if self.timed_out or self.disconnected:
            return None
        if self.claimed == UNREADABLE:
            return None
        claimed, implied = (s if s != UNKNOWN else None for s in (self.claimed, self.implied))
        return claimed or implied


def error_of(
    error: BaseException,
    *,
    provider: str,
    model: str,
    secrets: Iterable[str] = (),
    outer: BaseException | None = None,
    filled: bool = False,
) -> GatewayError:
    """The error of ours that a failed provider call is.

    `filled`: a caller chose the model's name, and the configuration has only a pattern for it.
    `outer` is the exception that was being handled when the call began; what lies behind it is
    another story. An error of ours comes out from under LiteLLM's wrapping as it was.
    """
    found = _look(error, outer)
    if found.ours is not None:
        found.ours.provider = found.ours.provider or provider
        found.ours.model = found.ours.model or model
        return found.ours
    status = found.status()
    said = spoken(found.said or found.wrapped or str(error), secrets)
    details: dict[str, Any] = {
        "provider": provider,
        "model": model,
        "code": found.code,
        "param": found.param,
        "upstream_status": None if found.before_sending else status,
        "retry_after_s": retry_after_s(found.headers, found.said or found.wrapped),
    }
    if status is None and (found.timed_out or found.disconnected):
        lost: GatewayError
        if found.timed_out:
            lost = GatewayTimeout(f"{provider} gave no answer in time", **details)
        else:
            words = f"no connection to {provider}, or it broke off: {said}"
            lost = ProviderConnectionError(words, **details)
        lost.sent = not found.unconnected
        return lost
    if status == 403:
        about = _forbidden(found)
        if about is not None:
            details["code"] = about
            return (ModelNotFound if about == NOT_FOUND else InvalidRequest)(said, **details)
        if filled:
            details["code"] = MODEL_REFUSED
            return ProviderError(f"{provider} refused {model} (403): {said}", **details)
    return _by_status(status, said, details)


def _forbidden(found: _Found) -> str | None:
    """The code of a 403 that is about the model or the prompt; None: it is about our key."""
    kinds = {*found.kinds, (found.code or "").lower()}
    words = found.said or found.wrapped
    if NOT_FOUND in kinds or _NO_SUCH_MODEL.search(words):
        return NOT_FOUND
    if not _FILTERS.isdisjoint(kinds) or _FLAGGED.search(words):
        return FILTERED
    return None


def _by_status(status: int | None, said: str, details: dict[str, Any]) -> GatewayError:
    if status in (401, 402, 403):
        details["code"] = "provider_credentials" if status != 402 else "provider_quota"
        return ProviderError(
            f"{details['provider']} refused the gateway's credentials ({status}): {said}", **details
        )
    if status == 404:
        return ModelNotFound(said, **details)
    if status == 408:
        return GatewayTimeout(said, **details)
    if status == 413:
        return RequestTooLarge(said, **details)
    if status == 429:
        return RateLimitError(said, **details)
    if status is not None and 400 <= status < 500:
        return InvalidRequest(said, status=422 if status == 422 else 400, **details)
    if status is None or status < 400:
        said = f"what {details['provider']} answered cannot be understood: {said}"
    return ProviderError(said, **details)


def _look(error: BaseException, outer: BaseException | None) -> _Found:
    found = _Found()
    for cause in _behind(error, outer):
        if isinstance(cause, GatewayError):
            return _Found(ours=cause)
        names = [kind.__name__ for kind in type(cause).__mro__]
        name = next((name for name in names if name in STATUS_OF_CLASS), "")
        home = type(cause).__module__.partition(".")[0]
        found.code = CODE_OF_CLASS.get(name) or found.code
        found.before_sending |= name in _BEFORE_SENDING
        found.timed_out |= isinstance(cause, TimeoutError) or not _TIMEOUTS.isdisjoint(names)
        if home == "litellm":
            _hear_litellm(cause, name, found)
        else:
            _hear_client(cause, name, found)
        _read_body(getattr(cause, "body", None), found)
        for holder in (cause, getattr(cause, "response", None)):
            for attribute in ("headers", "litellm_response_headers"):
                headers = getattr(holder, attribute, None)
                if isinstance(headers, Mapping) and not found.headers:
                    found.headers = dict(headers)
    return found


def _hear_litellm(cause: BaseException, name: str, found: _Found) -> None:
    status = _status(cause)
    found.wrapped = found.wrapped or str(getattr(cause, "message", "") or cause)
    if type(cause).__module__.startswith("litellm.llms"):
        found.claimed = found.claimed or status
    elif name in ("APIError", "MockException"):
        found.implied = found.implied or status
    elif name == "Timeout":
        found.claimed = found.claimed or (status if status != 408 else None)
    elif name:
        found.implied = found.implied or STATUS_OF_CLASS[name]


def _hear_client(cause: BaseException, name: str, found: _Found) -> None:
    """An exception of openai, httpx, aiohttp, or the system."""
    response = getattr(cause, "response", None)
    status = _status(cause)
    if response is not None and status is not None:
        found.answered = status
        found.said = _words(cause, response) or found.said
    elif name == "APIError" or isinstance(cause, ErrorEvent):  # inside a stream
        found.said = found.said or str(cause)
    elif name:
        found.implied = found.implied or STATUS_OF_CLASS[name]
    names = {kind.__name__ for kind in type(cause).__mro__}
    found.disconnected |= isinstance(cause, OSError) or not _NETWORK.isdisjoint(names)
    found.unconnected |= not _UNCONNECTED.isdisjoint(names)


def _behind(error: BaseException, outer: BaseException | None) -> Iterator[BaseException]:
    """The exception, then what it was raised from or while handling, up to `outer`."""
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting and len(seen) < CHAIN_MAX:
        cause = waiting.pop(0)
        if not isinstance(cause, BaseException) or cause is outer or cause in seen:
            continue
        seen.append(cause)
        yield cause
        waiting.append(getattr(cause, "original_exception", None))
        waiting.append(cause.__cause__ or cause.__context__)


def _status(cause: BaseException) -> int | None:
    for holder in (cause, getattr(cause, "response", None)):
        status = getattr(holder, "status_code", None)
        if isinstance(status, str) and status.isdigit():
            status = int(status)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def _words(cause: BaseException, response: Any) -> str:
    """What the answer says: its error object's message, or all of it."""
    message = error_object(getattr(cause, "body", None)).get("message")
    if isinstance(message, str) and message:
        return message
    try:
        text = response.text
    except RuntimeError:  # httpx: a streamed answer that was never read
        return ""
    return text if isinstance(text, str) else ""


def _read_body(body: Any, found: _Found) -> None:
    """Take `code`, `type` and `param` from an error body that was parsed."""
    error = error_object(body)
    for name in ("code", "type"):
        kind = error.get(name)
        if isinstance(kind, int) and 400 <= kind < 600 and found.answered is None:
            found.answered = kind
        elif isinstance(kind, str) and kind:
            found.kinds.append(kind.lower())
            if name == "code":
                found.code = found.code or kind
    if isinstance(error.get("param"), str):
        found.param = found.param or error["param"]


# --- when to come back ------------------------------------------------------------------------

_RETRY_DELAY = re.compile(r'"retryDelay"\s*:\s*"(\d+(?:\.\d+)?)s"')


def retry_after_s(
    headers: Mapping[str, str], text: str = "", *, now: datetime | None = None
) -> float | None:
    """Seconds that a provider asks to wait; None where it does not ask.

    Understands Retry-After in both forms (RFC 9110 §10.2.3), `retry-after-ms`, and Google's
    RetryInfo in the error's text. A date counts from the answer's own Date header, else from
    `now`. At most RETRY_AFTER_S_MAX.
    """
    plain = {name.lower().removeprefix("llm_provider-"): str(v) for name, v in headers.items()}
    ms = _seconds(plain.get("retry-after-ms"))
    seconds = None if ms is None else ms / 1000
    if seconds is None:
        seconds = _seconds(plain.get("retry-after"))
    if seconds is None and (when := _date(plain.get("retry-after"))):
        since = _date(plain.get("date")) or now or datetime.now(UTC)
        seconds = max(0.0, (when - since).total_seconds())
    if seconds is None and (delay := _RETRY_DELAY.search(text)):
        seconds = float(delay[1])
    return None if seconds is None else min(seconds, RETRY_AFTER_S_MAX)


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < float("inf") else None


def _date(text: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(text or "")
    except (TypeError, ValueError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)
