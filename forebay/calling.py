"""Step 5: one call of a provider, or of the Batcher, who calls it for many.

Rule 1: nothing is judged here: an attempt that comes in has leave, or gets it from the Batcher.
Rule 2: a call has what its request's deadline leaves; a stream that others may follow, what theirs
        does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from actors.batcher.policy import BadVectors, BatcherFull, Lane, Order
from actors.ref import OwnerUnavailable
from forebay import bounds
from forebay.codec import Answer
from forebay.config import RateLimitConfig
from forebay.errors import (
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    Overloaded,
    ProviderError,
    RateLimitError,
)
from forebay.providers.base import Chunks
from forebay.providers.embedded import LOCAL
from forebay.request import Attempt, Request
from forebay.routing import Deployment
from forebay.texts import inputs_of

if TYPE_CHECKING:
    from forebay.system import System

BATCHER_GRACE_S = 0.25


class Calls:
    """Makes the provider calls of requests; holds nothing between them.

    Bounded by each request's deadline. Failure behaviour: a provider's failure, its silence, and
    the Batcher's refusal are each a `GatewayError`.
    """

    def __init__(self, system: System) -> None:
        self._system = system

    def answer(self, request: Request, attempt: Attempt) -> Awaitable[Answer]:
        """One attempt, which begins now, bounded by what is left of the deadline.

        Raises:
            GatewayError: the provider's, the Batcher's, or `GatewayTimeout`.
        """
        timeout_s = max(0.0, request.deadline_s - attempt.begun_s)
        if self._system.bounds.prepared and request.call.route != "embedding":
            return self._generate(request, attempt.deployment, timeout_s)  # which keeps the time
        return self._in_time(request, attempt, timeout_s)

    async def _in_time(self, request: Request, attempt: Attempt, timeout_s: float) -> Answer:
        system, deployment = self._system, attempt.deployment
        embeds = request.call.route == "embedding"
        # The Batcher's own clock goes first, so that it, and not we, judges a call that hangs.
        grace_s = BATCHER_GRACE_S if embeds else 0.0
        try:
            async with asyncio.timeout(timeout_s + grace_s):
                if embeds:
                    return await self._embed(request, attempt, timeout_s)
                await system.bounds.prepare()
                return await self._generate(request, deployment, timeout_s)
        except TimeoutError as error:
            if isinstance(error, GatewayError):
                raise
            raise GatewayTimeout(
                f"{deployment.group!r} gave no answer within {timeout_s:.1f} s",
                model=deployment.group,
                provider=deployment.provider,
            ) from None

    def stream(self, request: Request, attempt: Attempt, outlives: bool) -> Chunks:
        """One attempt at a stream. `outlives`: it has the time of those who may follow it."""
        system = self._system
        left_s = request.left_s(system.clock)
        chat = request.call.route == "chat"
        open_stream = system.provider.chat_stream if chat else system.provider.completion_stream
        # Its own clock keeps both times; another one here would cost as much as a chunk.
        return open_stream(
            attempt.deployment,
            _with_usage(self._body(request, attempt.deployment)),
            timeout_s=left_s + (request.ends_s - request.deadline_s) * outlives,
            resolve=system.resolve,
            stall_s=system.config.gateway.stall_timeout,
        )

    def waits_until_s(self, request: Request, begun_s: float) -> float:
        """Until when the request may wait for a deployment's own limits."""
        told = self._system.config.gateway.rate_limit_config or RateLimitConfig()
        if not (request.call.may_wait and told.enable_queuing):
            return begun_s
        return min(request.deadline_s, begun_s + told.queue_timeout)

    def _generate(
        self, request: Request, deployment: Deployment, timeout_s: float
    ) -> Awaitable[Answer]:
        system, chat = self._system, request.call.route == "chat"
        ask = system.provider.chat if chat else system.provider.completion
        body = self._body(request, deployment)
        return ask(deployment, body, timeout_s=timeout_s, resolve=system.resolve)

    def _body(self, request: Request, deployment: Deployment) -> dict[str, Any]:
        """What is sent: the caller's own body, with hints for the provider's cache.

        Clamped where a limit of tokens or money says so.
        """
        body, bound = request.call.body, request.bound
        if bound is not None and bound.clamp is not None:
            body = bounds.clamped(request.call.route, body, bound, deployment)
        return self._system.kv_cache.sent(request.prompt, body, deployment)

    async def _embed(self, request: Request, attempt: Attempt, timeout_s: float) -> Answer:
        """Texts go through the Batcher, which may send them together with other callers'."""
        system, call, deployment = self._system, request.call, attempt.deployment
        body = call.body
        texts = inputs_of(body["input"])
        params = tuple(
            sorted(
                (name, value)
                for name, value in body.items()
                if name == "dimensions" or name in request.group.allowed_params
                if value is not None
            )
        )
        for name, value in params:
            if not isinstance(value, str | int | float):
                raise InvalidRequest.about(name, f"{name} must be a plain value for embeddings")
        tokens = not isinstance(texts[0], str)
        if tokens and deployment.provider == LOCAL:
            raise InvalidRequest.about(
                "input", "embedded models take texts, no token ids", model=deployment.group
            )
        coalesce = system.config.gateway.enable_request_batching
        try:
            share = await system.batcher_for(deployment, coalesce).embed(
                Lane(deployment.id, params, retry=attempt.is_retry, tokens=tokens),
                texts,
                Order(
                    call.tenant,
                    timeout_s,
                    coalesce,
                    call.bulk,
                    self._patience_s(request),
                    system.caps_for(deployment),
                    call.partial,
                    call.anew,
                ),
            )
        except BatcherFull as error:
            full = RateLimitError(
                f"texts cannot be sent now: {error}",
                code="texts_queue_full",
                model=deployment.group,
                retry_after_s=error.retry_after_s,
            )
            full.sent = False
            raise full from None
        except OwnerUnavailable as error:
            raise Overloaded(f"texts cannot be sent now: {error}", retry_after_s=1.0) from None
        except BadVectors as error:
            raise ProviderError(
                f"the provider's vectors make no sense: {error}",
                model=deployment.group,
                provider=deployment.provider,
            ) from None
        request.facts.failed = share.failed
        if share.texts_in_call > len(texts):
            system.meter.coalesced(len(texts))
        if share.spare is not None:
            system.books.spare(call, request.facts, deployment, share.spare)
            system.meter.usage(share.spare.prompt_tokens, 0, share.spare.cost_nano)
        usage = {"prompt_tokens": share.prompt_tokens, "total_tokens": share.prompt_tokens}
        return Answer(
            body={"object": "list", "model": share.model, "usage": usage},
            usage=usage,
            cost_nano=share.cost_nano,
            model=share.model,
            array=share.array,
            estimated=share.estimated,
        )

    def _patience_s(self, request: Request) -> float:
        """How long texts may wait in the Batcher for the deployment's own limits: not at all where
        another deployment may have room."""
        group = request.group
        if len(group.deployments) > 1 or self._system.table.fallbacks(group.name):
            return 0.0
        now = self._system.clock()
        return self.waits_until_s(request, now) - now


def _with_usage(body: dict[str, Any]) -> dict[str, Any]:
    """The body, asking for usage in the stream: the ledger wants to count, not to estimate."""
    return {**body, "stream_options": {**(body.get("stream_options") or {}), "include_usage": True}}
