"""What HTTP needs from the rest of Forebay, and what passes between the two.

Rule 1: HTTP knows bytes, headers and status codes; the service knows models, limits and providers.
Rule 2: a request becomes one `HttpCall`, an answer one `Reply` or `StreamReply`; a refusal is a
        GatewayError, which knows its own status.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from deployments.http.auth import Keys

Route = Literal["chat", "completion", "embedding"]
Priority = Literal["interactive", "bulk"]
CacheOutcome = Literal["hit", "miss", "joined", "off"]
BreakerOrder = Literal["closed", "open", "auto"]
"""Forced closed, forced open, or left to judge for itself again."""


@dataclass(slots=True, kw_only=True)
class HttpCall:
    """One request, parsed and authenticated, its parameters not checked yet.

    `body` holds the caller's JSON object verbatim. `timeout_s` may only shorten the configured
    deadline. `cache_control` is None, "no-cache", "no-store" or "no-cache, no-store". `arrived_s`
    is on the app's monotonic clock, so that overhead counts from the first byte.
    """

    route: Route
    body: dict[str, Any]
    tenant: str
    request_id: str
    stream: bool = False
    timeout_s: float | None = None
    priority: Priority = "interactive"
    cache_control: str | None = None
    idempotency_key: str | None = None
    trace_parent: str | None = None
    arrived_s: float = 0.0


class Figures(Protocol):
    """A limit as the caller sees it: how many per period, how many left, seconds until full."""

    @property
    def limit(self) -> float: ...
    @property
    def remaining(self) -> float: ...
    @property
    def reset_s(self) -> float: ...


@dataclass(slots=True, kw_only=True)
class Told:
    """How an answer came to be; what the response headers tell.

    `figures` is keyed "requests" and "tokens". `cost_nano` is integer nano-USD, None when the cost
    is not known (yet). `clamped` is what `max_tokens` was lowered to. `replayed`: it is what the
    first request with this idempotency key was answered.
    """

    model_group: str = ""
    deployment: str = ""
    attempts: int = 0
    retries: int = 0
    fallbacks: int = 0
    cache: CacheOutcome = "off"
    cost_nano: int | None = None
    overhead_ms: float | None = None
    config_version: int = 0
    clamped: int | None = None
    replayed: bool = False
    figures: Mapping[str, Figures] | None = None
    warnings: Sequence[str] = ()


@dataclass(slots=True, kw_only=True)
class Reply(Told):
    """A whole answer: an OpenAI body, or its JSON bytes, which are sent as they are.

    For embeddings `array` holds the vectors, float32 of shape (n, d), and `body` only `model` and
    `usage`.
    """

    body: dict[str, Any] | bytes
    array: npt.NDArray[np.float32] | None = None


@dataclass(slots=True, kw_only=True)
class StreamReply(Told):
    """An answer in OpenAI chunks. The first one has been fetched: from here on the status is 200.

    Closing `chunks` (`aclose`, where it has one) stops the provider. A GatewayError raised from it
    becomes an error event.
    """

    chunks: AsyncIterator[dict[str, Any]]


class Service(Protocol):
    """Forebay, as HTTP sees it. Everything may raise GatewayError."""

    @property
    def keys(self) -> Keys:
        """The keys in force; a new object whenever one comes or goes."""

    @property
    def config_version(self) -> int: ...

    def at_once(self, call: HttpCall) -> Reply | None:
        """The answer that can be given without waiting for anybody.

        None where there is none, and nothing was done: then one of the others is to be awaited.
        """

    def refused(self, route: Route, tenant: str | None, request_id: str, status: int) -> None:
        """A request for a call was answered with an error before it became one; `tenant` is None
        where nobody knows whose it was."""

    async def chat(self, call: HttpCall) -> Reply | StreamReply: ...
    async def completion(self, call: HttpCall) -> Reply | StreamReply: ...
    async def embedding(self, call: HttpCall) -> Reply: ...

    def models(self, tenant: str) -> list[dict[str, Any]]:
        """OpenAI model objects that `tenant` may use."""

    def model(self, model_id: str, tenant: str) -> dict[str, Any]:
        """One of them, or ModelNotFound."""

    def figures(self, tenant: str) -> Mapping[str, Figures] | None:
        """The tenant's limits right now, for the headers of a refusal."""

    def ready(self) -> tuple[bool, str]:
        """Whether requests can be served, and if not, why."""

    async def health(self, detail: bool) -> dict[str, Any]: ...

    async def usage(
        self,
        *,
        tenant: str | None,
        group_by: Sequence[str],
        since_s: float | None,
        until_s: float | None,
    ) -> dict[str, Any]:
        """Totals of one tenant, or of all (None), and by group. Times are UTC epoch seconds."""

    async def metrics(self) -> bytes:
        """Prometheus text for the whole system."""

    async def providers(self, tenant: str) -> list[dict[str, Any]]:
        """What is configured, as `/api/v1/gateway/providers` shows it; no secrets."""

    async def rate_limits(self, tenant: str) -> dict[str, Any]:
        """The tenant's limits and what is left of them; 404 for a tenant nobody knows."""

    async def record_feedback(
        self,
        tenant: str,
        *,
        kind: str,
        content: Any,
        rating: Any,
        response_id: str,
        feedback_id: str | None,
    ) -> dict[str, Any]:
        """Keep what a tenant thinks of an answer of its own, durably; see `FeedbackLoop.record`.

        Raises:
            InvalidRequest: 400; 404 (`response_not_found`); 409 (`feedback_loop_off`).
        """

    async def feedback_stats(self, tenant: str | None) -> dict[str, Any]:
        """How much feedback there is, of a tenant or of all (None)."""

    async def create_key(
        self,
        tenant: str,
        *,
        key_id: str | None,
        admin: bool,
        limits: dict[str, Any] | None,
        models: list[str] | None,
    ) -> dict[str, Any]:
        """Make a key, durably: `{id, tenant, key, hash, admin, created}`. Only here is it told.

        `limits` and `models`, where given, hold for the tenant from now on.

        Raises:
            ConfigurationError: limits or models are wrong.
            InvalidRequest: 409 (`key_exists`), the tenant has a key of this id.
        """

    async def list_keys(self) -> list[dict[str, Any]]:
        """Each key in force: `{id, tenant, admin, source, created?}`, source config or runtime."""

    async def revoke_key(self, key_id: str, tenant: str | None) -> dict[str, Any]:
        """End a key, durably before this returns: `{id, tenant, revoked: True}`.

        Raises:
            InvalidRequest: 404 (`key_not_found`), or 409 (`key_ambiguous`): several tenants have a
                key of this id and `tenant` is None.
        """

    async def read_config(self) -> dict[str, Any]:
        """`{version, config}`, without secrets."""

    async def write_config(self, document: dict[str, Any], expected: int | None) -> int:
        """Put a configuration in force, durably; its version.

        Raises:
            ConfigurationError: it is wrong; the message names each field.
            InvalidRequest: 412 (`version_conflict`), the newest version is not `expected`.
        """

    async def breakers(self) -> dict[str, Any]:
        """`{source, data}`: how each deployment of each group stands; no parameters of theirs.

        `source` is `owner`, or `replica` while the owner is away: then it is what was last heard.
        """

    async def cache(self) -> dict[str, Any]:
        """`{responses, prompts}`: what is stored, and what providers' own caches were worth."""

    async def clear_cache(self, *, tenant: str | None, model: str | None, key: str | None) -> int:
        """Forget a tenant's, a model's and a key's answers, None being any; how many there were.

        Raises:
            InvalidRequest: 404 (`unknown_tenant`), or 400: the key is none.
            ModelNotFound: there is no such model.
        """

    async def set_breaker(self, deployment: str, state: BreakerOrder) -> dict[str, Any]:
        """Have every process obey: `{deployment, state, reason, retry_after_s}`.

        Raises:
            InvalidRequest: 404 (`deployment_not_found`); 409 (`circuit_breaker_off`).
        """
