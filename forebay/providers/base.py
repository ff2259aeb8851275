"""What the pipeline asks of a provider lane, and what the breaker learns from a failure.

Rule 1: a body is OpenAI-shaped on the way in and on the way out, whatever the provider speaks.
Rule 2: every failure is an error of `forebay.errors`; nothing else leaves a lane, but cancellation.
Rule 3: a lane makes exactly one attempt per call. Retries, fallbacks and caches are elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from actors.circuit_breaker.policy import Verdict
from forebay.codec import Answer
from forebay.errors import (
    GatewayError,
    GatewayTimeout,
    ProviderConnectionError,
    ProviderError,
    RateLimitError,
)

if TYPE_CHECKING:
    from actors.batcher.policy import Text, Vectors
    from forebay.providers.prices import PriceBound, PromptCaching
    from forebay.routing import Deployment

__all__ = [
    "MODEL_REFUSED",
    "NO_BASE64",
    "NO_HINTS",
    "STALLED",
    "STALL_S",
    "Answer",
    "Chunks",
    "Provider",
    "Resolve",
    "verdict_of",
]

Resolve = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A deployment's `params` with references and hidden secrets replaced by the secrets.

Raises ConfigurationError when one is missing, in words that hold no secret.
"""

CREDENTIAL_STATUSES = frozenset({401, 402, 403})
STALL_S = 30.0
STALLED = "stream_stalled"
MODEL_REFUSED = "provider_refused_model"
NO_BASE64 = "encoding_not_supported"
NO_HINTS = "cache_hints_not_supported"


class Chunks(Protocol):
    """A stream of OpenAI chunk dicts.

    The first `anext` makes the call, so that a call that fails has given no chunk. `aclose` ends
    the upstream connection, at once, and may be called at any time and more than once.
    """

    def __aiter__(self) -> Chunks: ...

    async def __anext__(self) -> dict[str, Any]: ...

    async def aclose(self) -> None: ...


class Provider(Protocol):
    """A lane to providers. `timeout_s` is the total time a call may take, streams included;
    `stall_s` is how long a stream may keep who waits for its next chunk, once the first one has
    come: a model may think before that. A stream that keeps silent longer is over with a
    GatewayTimeout whose code is STALLED.

    `body` holds OpenAI's parameters of the route, checked; it is only read. Its `model` is the
    name the caller used and is not looked at: the deployment says which model is asked.
    All calls raise GatewayError and nothing else.
    """

    async def chat(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Answer: ...

    def chat_stream(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
        stall_s: float = STALL_S,
    ) -> Chunks: ...

    async def completion(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Answer: ...

    def completion_stream(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
        stall_s: float = STALL_S,
    ) -> Chunks: ...

    async def embed(
        self,
        deployment: Deployment,
        texts: Sequence[Text],
        params: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Vectors: ...

    def price(
        self,
        deployment: Deployment,
        usage: Mapping[str, Any] | None,
        *,
        model: str | None = None,
    ) -> int | None:
        """What `usage` costs, in nano-USD; None when no price is known.

        `model` is the name the provider reported, which prices a deployment whose own name does
        not tell the model (Azure's, aliases).
        """
        ...

    def price_bound(self, deployment: Deployment) -> PriceBound | None:
        """The most that the deployment charges per token; None when no price is known."""
        ...

    def price_version(self, deployment: Deployment) -> str:
        """A name for the prices of the deployment's calls, which changes when they do."""
        ...

    def prompt_caching(self, deployment: Deployment) -> PromptCaching | None:
        """How the provider caches the beginnings of prompts; None while nobody can tell."""
        ...

    def count_tokens(self, deployment: Deployment, text: str) -> int | None:
        """An upper bound of the tokens of a text; None where nothing but its size is known."""
        ...

    async def warm(self) -> None:
        """Do now what the first call would have to wait for."""
        ...

    async def close(self) -> None: ...


def verdict_of(error: BaseException | None) -> Verdict:
    """How far the deployment is to blame for the way a call ended; None is success."""
    if error is None:
        return Verdict.SUCCESS
    if isinstance(error, GatewayTimeout | ProviderConnectionError):
        return Verdict.UNREACHABLE
    if isinstance(error, RateLimitError):
        # A limit of ours says nothing about the provider.
        return Verdict.IGNORED if error.upstream_status is None else Verdict.THROTTLED
    if isinstance(error, ProviderError):
        if error.code in (NO_BASE64, NO_HINTS):
            return Verdict.SUCCESS  # it has answered; the next attempt asks it in other words
        # All names that a pattern takes share one circuit: one that is forbidden does not take
        # the others out.
        credential = error.upstream_status in CREDENTIAL_STATUSES and error.code != MODEL_REFUSED
        return Verdict.CREDENTIAL if credential else Verdict.FAILURE
    if isinstance(error, GatewayError | asyncio.CancelledError):
        return Verdict.IGNORED
    return Verdict.FAILURE
