"""The way of a request: nine steps, in this order and nowhere else.

    1 check      shape, parameters, model known, tenant may use it
    2 count      the request itself; a refusal says when to come back
    3 look up    somebody has the answer, or is getting it, or we lead
    4 reserve    a slot; choose deployments; open a ledger entry per attempt
    5 call       the provider, within the deadline; retries and fallbacks as planned
    6 judge      what the breaker learns from the outcome
    7 validate   the answer, by the configured level
    8 keep       whole, valid answers only
    9 settle     slot and ledger, whatever happened

Rule 1: this file orders the steps; what each one decides is in its own room.
Rule 2: no step leaves the process unless its desk has run dry.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from actors.batcher.policy import BadVectors, BatcherFull, Lane
from actors.cache.desk import FlightFailed, Hit, Lead
from actors.cache.policy import Scope, key
from actors.circuit_breaker.policy import Pass, Verdict
from actors.circuit_breaker.policy import Refusal as BreakerRefusal
from actors.ledger.desk import OpenEntry
from actors.rate_limiter.policy import Hold, Refusal, Ticket
from actors.ref import OwnerUnavailable
from forebay import codec, schemas, validation
from forebay.attempts import Plan, Try
from forebay.codec import Answer
from forebay.errors import (
    CircuitBreakerOpenError,
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    ProviderError,
    QueueTimeout,
    RateLimitError,
)
from forebay.providers.base import Chunks, verdict_of
from forebay.routing import Deployment, Group, allows

if TYPE_CHECKING:
    from forebay.system import System

Route = Literal["chat", "completion", "embedding"]
BATCHER_GRACE_S = 0.25
DEFAULT_TENANT = "default"
TEXTS_FIELD: dict[str, str] = {"chat": "messages", "completion": "prompt", "embedding": "input"}


@dataclass(slots=True)
class Call:
    """One request as it came in, from whichever door.

    `body` holds OpenAI's parameters of the route, verbatim. `timeout_s` can only shorten the
    configured deadline. `may_wait` lets a limit queue the request instead of refusing it.
    """

    route: Route
    body: dict[str, Any]
    tenant: str
    request_id: str
    timeout_s: float | None = None
    may_wait: bool = False
    cache_read: bool = True
    cache_write: bool = True
    cache_ttl_s: float | None = None
    bulk: bool = False

    @classmethod
    def of(cls, route: Route, keywords: Mapping[str, Any]) -> Self:
        """A call from Python: OpenAI's parameters, and ours among them.

        Ours are `tenant_id`, `timeout` and `cache_ttl` (seconds). A parameter that is None is as if
        it had not been given.

        Raises:
            InvalidRequest: one of ours has a wrong value.
        """
        body = {name: value for name, value in keywords.items() if value is not None}
        tenant = body.pop("tenant_id", DEFAULT_TENANT)
        timeout_s, cache_ttl_s = body.pop("timeout", None), body.pop("cache_ttl", None)
        for name, seconds in (("timeout", timeout_s), ("cache_ttl", cache_ttl_s)):
            if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
                raise InvalidRequest.about(name, f"{name} must be a positive number of seconds")
        if not isinstance(tenant, str) or not tenant:
            raise InvalidRequest.about("tenant_id", "tenant_id must be a non-empty string")
        return cls(
            route,
            body,
            tenant,
            request_id=f"req_{uuid.uuid4().hex}",
            timeout_s=timeout_s,
            may_wait=True,
            cache_ttl_s=cache_ttl_s,
        )


@dataclass(slots=True)
class Facts:
    """How an answer came to be; what the response headers tell."""

    group: str
    deployment: str = ""
    attempts: int = 0
    retries: int = 0
    fallbacks: int = 0
    cache: Literal["hit", "miss", "joined", "off"] = "off"
    cost_nano: int | None = 0
    provider_s: float = 0.0
    total_s: float = 0.0
    config_version: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def overhead_s(self) -> float:
        return max(0.0, self.total_s - self.provider_s)


@dataclass(slots=True)
class Result:
    """An answer and how it came to be."""

    answer: Answer
    facts: Facts


@dataclass(slots=True)
class Stream:
    """A stream whose first chunk has arrived. Close `chunks` to stop the provider."""

    chunks: AsyncGenerator[dict[str, Any], None]
    facts: Facts


@dataclass(slots=True)
class _Request:
    """A checked call and what was taken for it so far."""

    call: Call
    group: Group
    started_s: float
    deadline_s: float
    facts: Facts
    own_deadline: bool = False  # the client's, shorter than the configured one
    ticket: Ticket | None = None
    hold: Hold | None = None


class Pipeline:
    """Runs requests, wherever the caller is, over the desks of this process.

    Failure behaviour: money and limits fail closed (a short wait, then `Overloaded`), breaker and
    cache fail open; a full ledger buffer refuses new paid calls. Cancelling a call settles it.
    """

    def __init__(self, system: System) -> None:
        self._system = system

    async def answer(self, call: Call) -> Result:
        """One request, one whole answer.

        Raises:
            GatewayError: every failure, with its HTTP status and, where one is known, the time
            after which a retry can succeed.
        """
        request: _Request | None = None
        status = "error"
        try:
            request = self._check(call)
            await self._count(request)
            found = await self._look_up(request)
            answer = found if isinstance(found, Answer) else await self._lead(request, found)
            status = "ok"
            return Result(answer, request.facts)
        except GatewayError as error:
            status = str(error.status)
            raise
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        finally:
            self._finish(call, request, status)

    async def stream(self, call: Call) -> Stream:
        """One request, answered chunk by chunk; returns when the first chunk is there.

        Until then another deployment may take over; afterwards an error is raised from `chunks`
        and no second answer is ever begun.

        Raises:
            GatewayError: as `answer`.
        """
        request: _Request | None = None
        try:
            request = self._check(call)
            await self._count(request)
            await self._reserve(request)
            return await self._open_stream(request)
        except BaseException as error:
            status = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
            if isinstance(error, GatewayError):
                status = str(error.status)
            self._settle(request)
            self._finish(call, request, status)
            raise

    # 1 ------------------------------------------------------------------------------- check

    def _check(self, call: Call) -> _Request:
        system = self._system
        config = system.config.gateway
        body = call.body
        name = body.get("model") or system.table.default(call.route)
        if not isinstance(name, str):
            raise InvalidRequest.about("model", "model must be a string")
        group = system.table.group(name)
        schemas.check(call.route, body, group.allowed_params)
        tenant = system.tenants.get(call.tenant)
        if tenant is not None and not allows(tenant.models, name):
            raise PermissionDenied(
                f"tenant {call.tenant!r} may not use model {name!r}", param="model", model=name
            )
        now = system.clock()
        own_deadline = call.timeout_s is not None and call.timeout_s < config.timeout
        timeout_s = call.timeout_s if own_deadline and call.timeout_s else config.timeout
        facts = Facts(group=group.name, config_version=system.version)
        return _Request(call, group, now, now + timeout_s, facts, own_deadline)

    # 2 ------------------------------------------------------------------------------- count

    async def _count(self, request: _Request) -> None:
        system, call = self._system, request.call
        limits = system.limits_for(call.tenant)
        if limits is None:
            return
        wait_s, queue_max = system.queue_for(call.tenant) if call.may_wait else (0.0, 0)
        asked_s = system.clock()
        try:
            counted = await system.limiter.count(
                call.tenant, limits, wait_s=min(wait_s, self._left(request)), queue_max=queue_max
            )
        except OwnerUnavailable as error:
            raise Overloaded(f"limits cannot be checked now: {error}", retry_after_s=1.0) from None
        waited_s = system.clock() - asked_s
        if waited_s > 0.001:
            system.meter.queued(waited_s)
        if isinstance(counted, Refusal):
            raise self._refused(request, counted, wait_s)
        request.ticket = counted

    # 3 ----------------------------------------------------------------------------- look up

    async def _look_up(self, request: _Request) -> Answer | Lead | None:
        system, call, facts = self._system, request.call, request.facts
        config = system.config.gateway
        read = config.enable_caching and call.cache_read
        join = config.enable_request_deduplication and not _asks_for_variety(call.body)
        if not (read or join):
            return None
        # By deployments too: another configuration may mean something else by the same name.
        asked = " ".join([request.group.name, *(d.id for d in request.group.deployments)])
        address = key(Scope(call.tenant), call.route, asked, call.body)
        try:
            found = await system.cache.lookup(
                address, Scope(call.tenant), read=read, join=join, patience_s=self._left(request)
            )
        except FlightFailed as failure:
            facts.cache = "joined"
            raise codec.unpack_error(failure.error) from None
        if isinstance(found, Lead):
            facts.cache = "miss"
            system.meter.cache("miss")
            return found
        answer = codec.unpack(found.value)
        facts.cache = "hit" if isinstance(found, Hit) else "joined"
        facts.cost_nano = 0
        system.meter.cache(facts.cache)
        if isinstance(found, Hit) and not system.count_cache_hits(call.tenant):
            self._uncount(request)
        system.books.free(call, facts, system.clock() - request.started_s)
        return answer

    # 4 ----------------------------------------------------------------------------- reserve

    async def _lead(self, request: _Request, lead: Lead | None) -> Answer:
        """Get the answer ourselves, and let those who wait for it have it or the failure."""
        landed: bytes | None = None
        error: GatewayError | None = None
        ttl_s: float | None = None
        try:
            await self._reserve(request)
            answer = await self._attempt(request)
            if lead is not None:
                landed, ttl_s = self._keep(request, answer)
            return answer
        except GatewayError as failure:
            # Our client's own deadline is no news for those who have more time: one of them leads.
            if not (request.own_deadline and isinstance(failure, GatewayTimeout)):
                error = failure
            raise
        finally:
            self._settle(request)
            if lead is not None:
                packed = None if error is None else codec.pack_error(error)
                self._system.cache.land(lead, landed, packed, ttl_s)

    async def _reserve(self, request: _Request) -> None:
        system = self._system
        if system.books.full:
            self._uncount(request)
            raise Overloaded("the ledger is away and its buffer is full", retry_after_s=1.0)
        if request.ticket is None:
            return
        wait_s, _ = system.queue_for(request.call.tenant) if request.call.may_wait else (0.0, 0)
        try:
            held = await system.limiter.reserve(
                request.ticket, wait_s=min(wait_s, self._left(request))
            )
        except OwnerUnavailable as error:
            self._uncount(request)
            raise Overloaded(f"limits cannot be checked now: {error}", retry_after_s=1.0) from None
        if isinstance(held, Refusal):
            self._uncount(request)
            raise self._refused(request, held, wait_s)
        request.hold = held

    # 5 -------------------------------------------------------------------------------- call

    async def _attempt(self, request: _Request) -> Answer:
        """Attempts as planned, until one answers."""
        plan = self._plan(request)
        while True:
            attempt, admitted = await self._next(request, plan)
            system, facts = self._system, request.facts
            entry = self._open_entry(request, attempt, admitted)
            begun_s = system.clock()
            try:
                answer = await self._provider_call(request, attempt.deployment)
                facts.warnings = self._validate(request, answer)
            except GatewayError as error:
                facts.provider_s += system.clock() - begun_s
                system.books.fail_call(entry, error)
                if isinstance(error, CircuitBreakerOpenError):
                    plan.refused(attempt.deployment, error.retry_after_s or 0.0)
                    continue
                verdict = self._judge(request, attempt.deployment, admitted, error)
                plan.failed(attempt.deployment, error, verdict)
                continue
            except BaseException:
                system.books.void_call(entry, None)
                self._judge(request, attempt.deployment, admitted, None, ignored=True)
                raise
            facts.provider_s += system.clock() - begun_s
            facts.cost_nano = answer.cost_nano
            self._judge(request, attempt.deployment, admitted, None)
            system.books.post_call(entry, answer)
            system.meter.usage(*_tokens(answer.usage), answer.cost_nano)
            return answer

    async def _next(self, request: _Request, plan: Plan) -> tuple[Try, Pass | None]:
        """The next attempt that the breaker lets through, after the pause it needs."""
        system, facts = self._system, request.facts
        while True:
            left_s = self._left(request)
            attempt = plan.next(left_s)
            if left_s <= 0:
                timeout_s = request.deadline_s - request.started_s
                raise GatewayTimeout(
                    f"no time left for another attempt within {timeout_s:g} s",
                    model=facts.group,
                )
            if attempt.pause_s:
                await asyncio.sleep(attempt.pause_s)
            admitted: Pass | None = None
            if system.config.gateway.enable_circuit_breaker and request.call.route != "embedding":
                answer = await system.breaker.admit(attempt.deployment.id)
                if isinstance(answer, BreakerRefusal):
                    plan.refused(attempt.deployment, answer.retry_after_s)
                    continue
                admitted = answer
            facts.deployment = attempt.deployment.id
            facts.attempts += 1
            facts.retries, facts.fallbacks = plan.retries, plan.fallbacks
            return attempt, admitted

    def _open_entry(
        self, request: _Request, attempt: Try, admitted: Pass | None, *, stream: bool = False
    ) -> OpenEntry | None:
        """The ledger's entry of an attempt. The breaker has its leave back where there is none."""
        try:
            return self._system.books.open_call(
                request.call, request.facts, attempt.deployment, stream=stream
            )
        except GatewayError as error:
            self._judge(request, attempt.deployment, admitted, error)
            raise

    def _plan(self, request: _Request) -> Plan:
        system = self._system
        config = system.config.gateway
        group = request.group.name
        return Plan(
            [group, *system.table.fallbacks(group)],
            system.order,
            max_retries=config.max_retries,
            retry_delay_s=config.retry_delay,
            rng=system.rng,
        )

    async def _provider_call(self, request: _Request, deployment: Deployment) -> Answer:
        """One attempt, bounded by what is left of the deadline."""
        system, call = self._system, request.call
        timeout_s = self._left(request)
        # The Batcher's own clock goes first, so that it, and not we, judges a call that hangs.
        grace_s = BATCHER_GRACE_S if call.route == "embedding" else 0.0
        try:
            async with asyncio.timeout(timeout_s + grace_s):
                if call.route == "chat":
                    return await system.provider.chat(
                        deployment, call.body, timeout_s=timeout_s, resolve=system.resolve
                    )
                if call.route == "completion":
                    return await system.provider.completion(
                        deployment, call.body, timeout_s=timeout_s, resolve=system.resolve
                    )
                return await self._embed(request, deployment, timeout_s)
        except TimeoutError as error:
            if isinstance(error, GatewayError):
                raise
            raise GatewayTimeout(
                f"{deployment.group!r} gave no answer within {timeout_s:.1f} s",
                model=deployment.group,
                provider=deployment.provider,
            ) from None

    async def _embed(self, request: _Request, deployment: Deployment, timeout_s: float) -> Answer:
        """Texts go through the Batcher, which may send them together with other callers'."""
        system, body = self._system, request.call.body
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        params = tuple(
            sorted(
                (name, value)
                for name, value in body.items()
                if name == "dimensions" or name in request.group.allowed_params
            )
        )
        for name, value in params:
            if not isinstance(value, str | int | float):
                raise InvalidRequest.about(name, f"{name} must be a plain value for embeddings")
        coalesce = system.config.gateway.enable_request_batching
        try:
            share = await system.batcher_for(deployment, coalesce).embed(
                Lane(deployment.id, params),
                texts,
                timeout_s=timeout_s,
                coalesce=coalesce,
                caps=system.caps_for(deployment),
            )
        except (BatcherFull, OwnerUnavailable) as error:
            after_s = error.retry_after_s if isinstance(error, BatcherFull) else 1.0
            raise Overloaded(f"texts cannot be sent now: {error}", retry_after_s=after_s) from None
        except BadVectors as error:
            raise ProviderError(
                f"the provider's vectors make no sense: {error}",
                model=deployment.group,
                provider=deployment.provider,
            ) from None
        if share.texts_in_call > len(texts):
            system.meter.coalesced(len(texts))
        usage = {"prompt_tokens": share.prompt_tokens, "total_tokens": share.prompt_tokens}
        return Answer(
            body={"object": "list", "model": share.model, "usage": usage},
            usage=usage,
            cost_nano=share.cost_nano,
            model=share.model,
            array=share.array,
            estimated=share.estimated,
        )

    async def _open_stream(self, request: _Request) -> Stream:
        """Attempts as planned, until one gives a first chunk."""
        plan = self._plan(request)
        while True:
            attempt, admitted = await self._next(request, plan)
            system, facts, call = self._system, request.facts, request.call
            entry = self._open_entry(request, attempt, admitted, stream=True)
            begun_s = system.clock()
            open_stream = (
                system.provider.chat_stream
                if call.route == "chat"
                else system.provider.completion_stream
            )
            chunks = open_stream(
                attempt.deployment,
                _with_usage(call.body),
                timeout_s=self._left(request),
                resolve=system.resolve,
            )
            try:
                async with asyncio.timeout(self._left(request)):
                    first = await anext(chunks)
            except (GatewayError, TimeoutError, StopAsyncIteration) as failure:
                error = _stream_failure(failure, attempt.deployment)
                facts.provider_s += system.clock() - begun_s
                system.books.void_call(entry, error)
                verdict = self._judge(request, attempt.deployment, admitted, error)
                await chunks.aclose()
                plan.failed(attempt.deployment, error, verdict)
                continue
            except BaseException:
                system.books.void_call(entry, None)
                self._judge(request, attempt.deployment, admitted, None, ignored=True)
                await chunks.aclose()
                raise
            facts.provider_s += system.clock() - begun_s
            system.meter.first_token(call.route, system.clock() - request.started_s)
            facts.total_s = system.clock() - request.started_s
            relay = self._relay(request, attempt, admitted, entry, first, chunks)
            # Into its `try`, so that closing or dropping it settles even if nobody takes a chunk.
            await anext(relay)
            return Stream(relay, facts)

    async def _relay(
        self,
        request: _Request,
        attempt: Try,
        admitted: Pass | None,
        entry: OpenEntry | None,
        first: dict[str, Any],
        chunks: Chunks,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Hand the chunks on, and settle when they end, fail, or nobody wants them any more.

        The first item is no chunk: it says that the generator has started.
        """
        system, facts = self._system, request.facts
        begun_s = system.clock()
        tally = schemas.StreamTally(request.call.route)
        error: GatewayError | None = None
        status = "cancelled"
        try:
            async with aclosing(chunks):
                yield {}
                tally.add(first)
                yield first
                while True:
                    async with asyncio.timeout(self._left(request)):
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        break
                    tally.add(chunk)
                    yield chunk
            status = "ok"
        except (GatewayError, TimeoutError) as failure:
            error = _stream_failure(failure, attempt.deployment)
            status = str(error.status)
            raise error from None
        finally:
            facts.provider_s += system.clock() - begun_s
            ignored = status == "cancelled"
            self._judge(request, attempt.deployment, admitted, error, ignored=ignored)
            answer = tally.answer(request.call.body, status == "ok")
            if answer.cost_nano is None:
                answer.cost_nano = system.provider.price(
                    attempt.deployment, answer.usage, model=answer.model
                )
            facts.cost_nano = answer.cost_nano
            system.books.post_call(entry, answer, error)
            system.meter.usage(*_tokens(answer.usage), answer.cost_nano)
            self._settle(request)
            self._finish(request.call, request, status)

    # 6 ------------------------------------------------------------------------------- judge

    def _judge(
        self,
        request: _Request,
        deployment: Deployment,
        admitted: Pass | None,
        error: GatewayError | None,
        *,
        ignored: bool = False,
    ) -> Verdict:
        """Tell the breaker what came of an attempt. The Batcher tells it for embeddings."""
        verdict = Verdict.IGNORED if ignored else Verdict.SUCCESS
        if error is not None:
            verdict = verdict_of(error)
            if isinstance(error, GatewayTimeout) and request.own_deadline:
                verdict = Verdict.IGNORED  # the client's own deadline blames nobody
        # Without a wildcard's filled-in name, which is the client's choice.
        label = deployment.id.removesuffix(f":{deployment.group}")
        self._system.meter.provider_call(label, verdict.value)
        if admitted is not None:
            retry_after_s = None if error is None else error.retry_after_s
            self._system.breaker.judge(admitted, verdict, retry_after_s)
        return verdict

    # 7 ---------------------------------------------------------------------------- validate

    def _validate(self, request: _Request, answer: Answer) -> list[str]:
        config = self._system.config.gateway
        if not config.enable_validation or request.call.route == "embedding":
            return []
        return validation.validate(answer.body, request.call.body, config.validation_level)

    # 8 -------------------------------------------------------------------------------- keep

    def _keep(self, request: _Request, answer: Answer) -> tuple[bytes, float | None]:
        """The answer as bytes for those who wait, and for how long to store it, if at all."""
        config = self._system.config.gateway
        ttl_s = request.call.cache_ttl_s or float(config.cache_ttl_s)
        store = config.enable_caching and request.call.cache_write and not request.facts.warnings
        return codec.pack(answer), ttl_s if store else None

    # 9 ------------------------------------------------------------------------------ settle

    def _settle(self, request: _Request | None) -> None:
        if request is not None and request.hold is not None:
            self._system.limiter.settle(request.hold)
            request.hold = None

    def _uncount(self, request: _Request) -> None:
        if request.ticket is not None:
            self._system.limiter.uncount(request.ticket)
            request.ticket = None

    def _finish(self, call: Call, request: _Request | None, status: str) -> None:
        system = self._system
        if request is None:
            system.meter.request(call.route, "unknown", call.tenant, status, 0.0, 0.0)
            return
        facts = request.facts
        facts.total_s = system.clock() - request.started_s
        pattern = request.group.pattern  # a wildcard's filled-in name would be the client's choice
        system.meter.request(
            call.route, pattern, call.tenant, status, facts.total_s, facts.provider_s
        )

    # ----------------------------------------------------------------------------------------

    def _left(self, request: _Request) -> float:
        return max(0.0, request.deadline_s - self._system.clock())

    def _refused(self, request: _Request, refusal: Refusal, waited_s: float) -> GatewayError:
        tenant = request.call.tenant
        self._system.meter.limited(tenant, refusal.kind)
        kind = RateLimitError if waited_s <= 0 else QueueTimeout
        return kind(
            f"tenant {tenant!r} is over its limit of {refusal.limit:g} "
            f"{refusal.kind.replace('_', ' ')}; retry after {refusal.retry_after_s:.3f} s",
            retry_after_s=refusal.retry_after_s,
            model=request.facts.group,
        )


def _asks_for_variety(body: dict[str, Any]) -> bool:
    """Whether two equal requests are meant to get two different answers."""
    temperature, n = body.get("temperature"), body.get("n")
    return (temperature is not None and temperature > 0) or (n is not None and n > 1)


def _with_usage(body: dict[str, Any]) -> dict[str, Any]:
    """The body, asking for usage in the stream: the ledger wants to count, not to estimate."""
    return {**body, "stream_options": {**(body.get("stream_options") or {}), "include_usage": True}}


def _tokens(usage: dict[str, Any] | None) -> tuple[int, int]:
    usage = usage or {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def _stream_failure(failure: BaseException, deployment: Deployment) -> GatewayError:
    """The failure of a stream as an error of ours."""
    if isinstance(failure, GatewayError):
        return failure
    details: dict[str, Any] = {"model": deployment.group, "provider": deployment.provider}
    if isinstance(failure, TimeoutError):
        return GatewayTimeout("the stream did not end within the deadline", **details)
    return ProviderError("the provider ended the stream before its first chunk", **details)
