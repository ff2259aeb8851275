"""Everything that can go wrong, as callers see it.

    GatewayError
    ├── InvalidRequest (400, ValueError)      ├── ProviderError (502)
    ├── AuthenticationError (401)             │   ├── ProviderConnectionError (ConnectionError)
    ├── PermissionDenied (403)                │   └── ResponseValidationError (ValueError)
    ├── ModelNotFound (404)                   ├── CircuitBreakerOpenError (503)
    ├── RequestTooLarge (413)                 ├── Overloaded (503)
    ├── RateLimitError (429)                  ├── GatewayTimeout (504, TimeoutError)
    │   ├── BudgetExceeded                    └── ConfigurationError (500, ValueError)
    │   ├── DeploymentsBusy
    │   └── QueueTimeout (TimeoutError)

Rule 1: every error knows its HTTP status, OpenAI's `type` and `code`, and when to come back.
Rule 2: every error survives pickling, with what it was raised from in words (`Cause`).
Rule 3: no error holds a key; text from a provider is redacted where it enters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from forebay.providers.redaction import redact

if TYPE_CHECKING:
    from forebay.call import Facts

CAUSE_CHARS_MAX = 500


class Cause(Exception):
    """What an error of another process was raised from, in words and without keys."""


class GatewayError(Exception):
    """The root. `status` is the HTTP status, `retry_after_s` seconds until a retry can succeed.

    `upstream_status` is the status a provider answered with, where one did; it is what callers
    need to tell a provider's 400 from ours. `figures` are the limits, "requests" and "tokens", as
    they stood at a refusal: each has `limit`, `remaining` and `reset_s`. `facts` are those of the
    request that it ended, where one had begun.
    """

    status: int = 500
    type: str = "internal_server_error"
    code: str | None = None
    retryable: ClassVar[bool] = False
    facts: Facts | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
        model: str | None = None,
        provider: str | None = None,
        upstream_status: int | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status
        self.retry_after_s = retry_after_s
        self.model = model
        self.provider = provider
        self.upstream_status = upstream_status
        self.figures = figures
        self.sent = True  # False where it is certain that no provider has seen the call

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        fields = dict(self.__dict__)
        return (_rebuild, (type(self), self.message, fields, _words(self.__cause__)))

    def body(self) -> dict[str, Any]:
        """OpenAI's error object, without the `error` wrapper."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    @classmethod
    def about(cls, param: str, message: str, **details: Any) -> Self:
        """An error about one field of the request."""
        return cls(message, param=param, **details)


def _rebuild(
    cls: type[GatewayError], message: str, state: dict[str, Any], cause: str | None
) -> GatewayError:
    error = cls(message)
    error.__dict__.update(state)
    if cause is not None:
        error.__cause__ = Cause(cause)
    return error


def _words(cause: BaseException | None) -> str | None:
    if cause is None or isinstance(cause, Cause):
        return None if cause is None else str(cause)
    return redact(f"{type(cause).__name__}: {cause}")[:CAUSE_CHARS_MAX]


class InvalidRequest(GatewayError, ValueError):
    """The request is wrong; the same request will never succeed."""

    status = 400
    type = "invalid_request_error"


class AuthenticationError(GatewayError):
    """No key, or one that is unknown, revoked or malformed: the answer is the same."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(GatewayError):
    """The tenant is known and may not do this."""

    status = 403
    type = "permission_error"


class ModelNotFound(GatewayError):
    """No model group has this name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RequestTooLarge(GatewayError):
    """The body exceeds a bound; the message says which."""

    status = 413
    type = "invalid_request_error"


class RateLimitError(GatewayError):
    """A limit is used up; waiting `retry_after_s` makes room."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class BudgetExceeded(RateLimitError):
    """A money limit is used up for its calendar period."""

    type = "insufficient_quota"
    code = "budget_exceeded"
    retryable = False


class DeploymentsBusy(RateLimitError):
    """Every deployment that could answer has used up its own `rpm` or `tpm`."""

    code = "deployments_busy"


class QueueTimeout(RateLimitError, TimeoutError):
    """The request waited its turn for as long as it was allowed to."""


class ProviderError(GatewayError):
    """A provider answered with something that is not the caller's fault."""

    status = 502
    type = "provider_error"
    retryable = True


class ProviderConnectionError(ProviderError, ConnectionError):
    """No usable connection to the provider: refused, reset, DNS, TLS."""


class ResponseValidationError(ProviderError, ValueError):
    """The provider's answer broke a rule that the validation level enforces."""

    code = "invalid_response"
    retryable = False


class CircuitBreakerOpenError(GatewayError):
    """Every deployment that could answer is taken out for now. The message contains `is OPEN`."""

    status = 503
    type = "service_unavailable"
    code = "circuit_open"
    retryable = True


class Overloaded(GatewayError):
    """Forebay itself cannot take the request right now; nothing was sent or charged."""

    status = 503
    type = "service_unavailable"
    code = "overloaded"
    retryable = True


class GatewayTimeout(GatewayError, TimeoutError):
    """The deadline passed. The provider may have done the work all the same."""

    status = 504
    type = "timeout_error"
    code = "timeout"


class ConfigurationError(GatewayError, ValueError):
    """The configuration is wrong; the message names the field and the remedy."""

    type = "configuration_error"
