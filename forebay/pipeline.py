"""The way of a request: nine steps, in this order and nowhere else.

    1 check      shape, parameters, model known, tenant may use it
    2 count      the request itself; a refusal says when to come back
    3 look up    somebody has the answer, or is getting it, or we lead
    4 reserve    slot, tokens, money, all or nothing; choose deployments; an entry per attempt
    5 call       the provider, within the deadline; retries and fallbacks as planned
    6 judge      what the breaker learns from the outcome
    7 validate   the answer, by the configured level
    8 keep       whole, valid answers only
    9 settle     reservation and ledger, whatever happened

Rule 1: this file orders the steps; what each one decides is in its own room.
Rule 2: no step leaves the process unless its desk has run dry.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import orjson

from actors.batcher.policy import BadVectors, BatcherFull, Lane, Text
from actors.cache.desk import FlightFailed, Hit, Joined, Lead, Listening
from actors.cache.policy import Scope, key, text_keys
from actors.circuit_breaker.policy import LETS_THROUGH, Pass, Verdict
from actors.circuit_breaker.policy import Refusal as BreakerRefusal
from actors.ledger.desk import OpenEntry
from actors.rate_limiter.terms import NOTHING_USED, Amount, Hold, Limits, Refusal, Ticket
from actors.ref import OwnerUnavailable
from forebay import bounds, codec, replay, schemas, validation
from forebay.attempts import Plan, Try, pass_unasked, refused_by, why_of
from forebay.bounds import Bound
from forebay.call import Call, Facts, Result, Stream
from forebay.codec import Answer
from forebay.config import RateLimitConfig
from forebay.errors import (
    BudgetExceeded,
    DeploymentsBusy,
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    ProviderError,
    QueueTimeout,
    RateLimitError,
    RequestTooLarge,
)
from forebay.providers.base import Chunks
from forebay.providers.embedded import LOCAL
from forebay.routing import Deployment, Group
from forebay.tally import StreamTally
from forebay.texts import Texts

if TYPE_CHECKING:
    from forebay.prefixes import Prompt
    from forebay.system import System

BATCHER_GRACE_S = 0.25
ROUNDS_MAX = 16
"""How often a stream's follower asks again when its leader is lost, before it asks nobody."""
JOINED_TEXTS_MAX = 256
"""Longer lists are jobs. Nobody asks for the same texts at the same moment, so with nothing stored
anyway, telling the owner of each would be for nothing."""
NANO_PER_USD = 1e9
TEXTS_FIELD: dict[str, str] = {"chat": "messages", "completion": "prompt", "embedding": "input"}


@dataclass(slots=True)
class _Request:
    """A checked call and what was taken for it so far."""

    call: Call
    group: Group
    started_s: float
    deadline_s: float
    facts: Facts
    own_deadline: bool = False  # the client's, shorter than the configured one
    limits: Limits | None = None
    bound: Bound | None = None
    ticket: Ticket | None = None
    hold: Hold | None = None
    used: Amount = NOTHING_USED
    doubted: bool = False  # the validation had something to say of the answer
    prompt: Prompt | None = None  # what its beginnings are called


@dataclass(slots=True)
class _Attempt:
    """One attempt: the breaker's leave, the deployment's own limits, and how it goes.

    `asked_s` is when we began to wait for what comes next: the answer, or a stream's next chunk.
    `took_s` is how long the first of it took, None until it is there.
    """

    deployment: Deployment
    is_retry: bool
    admitted: Pass | None = None
    quota: Hold | None = None
    begun_s: float = 0.0
    asked_s: float = 0.0
    took_s: float | None = None
    slow: bool = False


@dataclass(slots=True)
class _Flow:
    """A stream that is being relayed.

    `reading` is a chunk on its way that outlives who waits. `awaited`: somebody waits for the next
    chunk, or the end. `late`: its deadline passed while nobody did, and it is settled.
    """

    request: _Request
    attempt: _Attempt
    entry: OpenEntry | None
    lead: Lead | None
    chunks: Chunks
    tally: StreamTally
    begun_s: float
    reading: asyncio.Task[dict[str, Any] | None] | None = None
    awaited: bool = False
    late: GatewayTimeout | None = None


class Pipeline:
    """Runs requests, wherever the caller is, over the desks of this process.

    Failure behaviour: money and limits fail closed (a short wait, then `Overloaded`), breaker and
    cache fail open; a full ledger buffer refuses new paid calls. Cancelling a call settles it.
    """

    def __init__(self, system: System) -> None:
        self._system = system

    def at_once(self, call: Call) -> Result | None:
        """The stored answer to a request, where neither it nor a permit has to be waited for.

        None, and nothing was done, where `answer` is to be asked: it also says what is wrong.
        """
        system = self._system
        name = call.body.get("model") or system.table.default(call.route)
        read = system.config.gateway.enable_caching and call.cache_read
        if not read or call.route == "embedding" or not isinstance(name, str):
            return None
        try:
            group = system.table.group(name)
            address = key(Scope(call.tenant), call.route, _asked(group), call.body)
            hit = system.cache.near(address, Scope(call.tenant))
            request = None if hit is None else self._check(call)
        except GatewayError:
            return None
        if hit is None or request is None:
            return None
        request.ticket = system.limiter.count_at_once(call.tenant, request.limits)
        if request.ticket is None:
            return None
        answer = self._shared(request, hit)
        self._free(request)
        self._finish(call, request, "ok")
        return Result(answer, request.facts)

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
            if call.route == "embedding":
                answer = await self._vectors(request)
            else:
                found = await self._look_up(request)
                answer = found if isinstance(found, Answer) else await self._lead(request, found)
            status = "ok"
            return Result(answer, request.facts)
        except GatewayError as error:
            status = str(error.status)
            error.facts = None if request is None else request.facts
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
            found = await self._look_up_stream(request)
            return found if isinstance(found, Stream) else await self._lead_stream(request, found)
        except BaseException as error:
            status = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
            if isinstance(error, GatewayError):
                status = str(error.status)
                error.facts = None if request is None else request.facts
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
        system.tenants.require(call.tenant)
        if not system.tenants.allows(call.tenant, name):
            raise PermissionDenied(
                f"tenant {call.tenant!r} may not use model {name!r}", param="model", model=name
            )
        now = system.clock()
        own_deadline = call.timeout_s is not None and call.timeout_s < config.timeout
        timeout_s = call.timeout_s if own_deadline and call.timeout_s else config.timeout
        facts = Facts(group=group.name, config_version=system.version)
        limits = system.tenants.limits_for(call.tenant)
        return _Request(call, group, now, now + timeout_s, facts, own_deadline, limits)

    # 2 ------------------------------------------------------------------------------- count

    async def _count(self, request: _Request) -> None:
        system, call, limits = self._system, request.call, request.limits
        if limits is None:
            return
        await system.bounds.prepare()
        amount = Amount()
        if limits.meters:
            request.bound = await system.bounds.of(call, request.group, limits)
            amount = request.bound.amount
        wait_s, queue_max = system.tenants.queue_for(call.tenant) if call.may_wait else (0.0, 0)
        asked_s = system.clock()
        try:
            counted = await system.limiter.count(
                call.tenant,
                limits,
                amount,
                wait_s=min(wait_s, self._left(request)),
                queue_max=queue_max,
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
        read, join = self._may_share(call)
        if not (read or join):
            return None
        address = key(Scope(call.tenant), call.route, _asked(request.group), call.body)
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
        answer = self._shared(request, found)
        if facts.cache == "joined":  # it may be a stream's, which nobody has judged
            facts.warnings += self._validate(request, answer)
        self._free(request)
        return answer

    def _shared(self, request: _Request, found: Hit | Joined) -> Answer:
        """A stored answer, or that of somebody else's call."""
        answer, facts = codec.unpack(found.value), request.facts
        facts.cache = "hit" if isinstance(found, Hit) else "joined"
        if answer.clamped is not None:
            self._tell_clamp(request, answer.clamped)
        return answer

    async def _look_up_stream(self, request: _Request) -> Stream | Lead | None:
        """As `_look_up`, for those who want the answer piece by piece."""
        system, call, facts = self._system, request.call, request.facts
        read, join = self._may_share(call)
        if not (read or join):
            return None
        scope = Scope(call.tenant)
        address = key(scope, call.route, _asked(request.group), call.body)
        for _ in range(ROUNDS_MAX):
            left_s = self._left(request)
            (found,) = await system.cache.ask(
                [address], scope, read=read, join=join, patience_s=left_s, stream=True
            )
            relay: AsyncGenerator[dict[str, Any], None]
            if isinstance(found, Lead):
                break
            if isinstance(found, Hit):
                relay = self._replay(request, self._shared(request, found))
            else:
                listening = system.cache.listen(found.flight)
                try:
                    news = await listening.more(left_s)
                except BaseException as failure:
                    listening.close()
                    if not isinstance(failure, FlightFailed):
                        raise
                    facts.cache = "joined"
                    raise codec.unpack_error(failure.error) from None
                if news is None:
                    listening.close()
                    continue
                if isinstance(news, Joined):
                    listening.close()
                    relay = self._replay(request, self._shared(request, news))
                else:
                    facts.cache = "joined"
                    relay = self._follow(request, listening, news)
            system.meter.first_token(call.route, system.clock() - request.started_s)
            facts.total_s = system.clock() - request.started_s
            await anext(relay)  # into its `try`, as in `_open_stream`
            return Stream(relay, facts)
        else:
            found = Lead(address, scope, None)
        facts.cache = "miss"
        system.meter.cache("miss")
        return found

    async def _replay(
        self, request: _Request, answer: Answer
    ) -> AsyncGenerator[dict[str, Any], None]:
        """A whole answer as a stream. The first item is no chunk, as in `_relay`."""
        status = "cancelled"
        try:
            yield {}
            for chunk in replay.chunks(request.call.route, answer):
                yield chunk
            status = "ok"
        finally:
            self._free(request)
            self._finish(request.call, request, status)

    async def _follow(
        self, request: _Request, listening: Listening, pieces: list[bytes]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Somebody else's stream, as it comes. The first item is no chunk, as in `_relay`.

        What its pieces have not told is in the whole answer at the end.
        """
        call = request.call
        status = "cancelled"
        news: list[bytes] | Joined | None = pieces
        try:
            yield {}
            while isinstance(news, list):
                for piece in news:
                    yield orjson.loads(piece)
                news = await listening.more(self._left(request))
            if news is None:
                raise self._lost(request)
            told = replay.told(call.route, listening.taken, call.body)
            for chunk in replay.chunks(call.route, codec.unpack(news.value), told):
                yield chunk
            status = "ok"
        except FlightFailed as failure:
            error = codec.unpack_error(failure.error)
            status = str(error.status)
            raise error from None
        except GatewayError as error:
            status = str(error.status)
            raise
        finally:
            listening.close()
            if status in ("ok", "cancelled"):
                self._free(request)
            self._finish(call, request, status)

    def _lost(self, request: _Request) -> GatewayError:
        """The stream that we followed came to no end, and what was told cannot be taken back."""
        if self._left(request) <= 0:
            timeout_s = request.deadline_s - request.started_s
            return GatewayTimeout(f"no answer within {timeout_s:g} s", model=request.facts.group)
        return ProviderError("the call that this stream shared was lost", model=request.facts.group)

    def _may_share(self, call: Call) -> tuple[bool, bool]:
        """Whether a stored answer may serve the call, and whether another's running one may."""
        config = self._system.config.gateway
        read = config.enable_caching and call.cache_read
        return read, config.enable_request_deduplication and not _asks_for_variety(call.body)

    def _free(self, request: _Request) -> None:
        """An answer from the cache, or from somebody else's call: it costs nothing."""
        system, call, facts = self._system, request.call, request.facts
        system.meter.cache(facts.cache)
        if facts.cache == "hit" and not system.tenants.counts_cache_hits(call.tenant):
            self._uncount(request)
        system.books.free(call, facts, system.clock() - request.started_s)

    async def _vectors(self, request: _Request) -> Answer:
        """Texts are looked up one by one, and only those that nobody has or is getting are sent."""
        system, call, facts = self._system, request.call, request.facts
        read, join = self._may_share(call)
        given = _inputs(call.body["input"])
        join &= read or len(given) <= JOINED_TEXTS_MAX
        words = [text for text in given if isinstance(text, str)]
        if not (read or join) or len(words) < len(given):
            return await self._lead(request, None)  # tokens are nobody's but the model's
        shared = {name: value for name, value in call.body.items() if name != "input"}
        scope = Scope(call.tenant)
        keys = text_keys(scope, call.route, _asked(request.group), shared, words)
        texts = Texts(system.cache, scope, words, keys)
        try:
            await texts.look_up(read=read, join=join, patience_s=self._left(request))
            while True:
                if texts.to_send:
                    await self._lead_texts(request, texts)
                elif texts.awaited:
                    await texts.wait(read=read, join=join, patience_s=self._left(request))
                elif texts.even():
                    break
        except FlightFailed as failure:
            facts.cache = "miss" if texts.sent_any else "joined"
            raise codec.unpack_error(failure.error) from None
        facts.cached = texts.cached
        if texts.sent_any:
            system.meter.cache("miss")
        else:
            facts.cache = "hit" if facts.cached else "joined"
            self._free(request)
        return texts.answer()

    # 4 ----------------------------------------------------------------------------- reserve

    async def _lead(self, request: _Request, lead: Lead | None) -> Answer:
        """Get the answer ourselves, and let those who wait for it have it or the failure."""
        landed: bytes | None = None
        told: bytes | None = None
        ttl_s: float | None = None
        try:
            await self._reserve(request)
            answer = await self._attempt(request)
            if lead is not None:
                landed, ttl_s = self._keep(request, answer)
            return answer
        except GatewayError as error:
            told = _told_to_others(request, error)
            raise
        finally:
            self._settle(request)
            if lead is not None:
                self._system.cache.land(lead, landed, told, ttl_s)

    async def _lead_texts(self, request: _Request, texts: Texts) -> None:
        """Get those of the texts that are ours to get, and hand them to whoever waits for them."""
        system, limits = self._system, request.limits
        request.facts.cache = "miss"
        request.call = replace(request.call, body={**request.call.body, "input": texts.to_send})
        error: GatewayError | None = None
        try:
            if request.bound is not None and limits is not None:
                request.bound = await system.bounds.of(request.call, request.group, limits)
            await self._reserve(request)
            texts.take(await self._attempt(request), self._ttl_s(request))
        except GatewayError as failure:
            error = failure
            raise
        finally:
            self._settle(request)
            told = None if error is None else _told_to_others(request, error)
            texts.give_up(told, error)

    async def _lead_stream(self, request: _Request, lead: Lead | None) -> Stream:
        """Get the stream ourselves; once it has begun, its relay settles and lands it."""
        try:
            await self._reserve(request)
            return await self._open_stream(request, lead)
        except BaseException as error:
            self._settle(request)
            if lead is not None:
                told = _told_to_others(request, error) if isinstance(error, GatewayError) else None
                self._system.cache.land(lead, None, told)
            raise

    async def _reserve(self, request: _Request) -> None:
        system = self._system
        if system.books.full:
            self._uncount(request)
            raise Overloaded("the ledger is away and its buffer is full", retry_after_s=1.0)
        if request.ticket is None:
            return
        may_wait = request.call.may_wait
        wait_s, _ = system.tenants.queue_for(request.call.tenant) if may_wait else (0.0, 0)
        try:
            held = await self._hold(request, wait_s)
            for _ in range(2):  # the day's money, and the month's
                if not isinstance(held, Refusal) or not self._lower(request, held):
                    break
                held = await self._hold(request, wait_s)
        except OwnerUnavailable as error:
            self._uncount(request)
            raise Overloaded(f"limits cannot be checked now: {error}", retry_after_s=1.0) from None
        except BaseException:
            self._uncount(request)
            raise
        if isinstance(held, Refusal):
            self._uncount(request)
            raise self._refused(request, held, wait_s)
        request.hold = held
        bound = request.bound
        if bound is not None and bound.clamp is not None:
            self._tell_clamp(request, bound.clamp)

    async def _hold(self, request: _Request, wait_s: float) -> Hold | Refusal:
        assert request.ticket is not None
        amount = Amount() if request.bound is None else request.bound.amount
        wait_s = min(wait_s, self._left(request))
        return await self._system.limiter.reserve(request.ticket, amount, wait_s=wait_s)

    def _lower(self, request: _Request, refusal: Refusal) -> bool:
        """Whether a shorter answer would do: money that is left is used to the end."""
        if request.bound is None or refusal.lent or not refusal.kind.startswith("usd_"):
            return False
        lower = bounds.lowered(request.bound, int(refusal.remaining))
        if lower is None or lower == request.bound:
            return False
        request.bound = lower
        return True

    def _tell_clamp(self, request: _Request, clamp: int) -> None:
        request.facts.clamped = clamp
        request.facts.warnings.append(
            f"the answer may have {clamp} tokens at most: the tenant's limit leaves no more"
        )

    # 5 -------------------------------------------------------------------------------- call

    async def _attempt(self, request: _Request) -> Answer:
        """Attempts as planned, until one answers.

        An answer that a filter kept back is better than none: it is paid for.
        """
        plan = self._plan(request)
        filtered: list[tuple[Deployment, Answer]] = []
        try:
            return await self._attempts(request, plan, filtered)
        except GatewayError:
            if not filtered:
                raise
        deployment, answer = filtered[-1]
        request.facts.deployment = deployment.id
        request.facts.warnings += self._validate(request, answer)
        request.doubted = True  # nobody else is to have it: next time another may be asked
        return answer

    async def _attempts(
        self, request: _Request, plan: Plan, filtered: list[tuple[Deployment, Answer]]
    ) -> Answer:
        """The attempts themselves; what a filter kept back on the way is added to `filtered`."""
        while True:
            attempt = await self._next(request, plan)
            system, facts = self._system, request.facts
            entry = self._open_entry(request, attempt)
            self._begin(attempt)
            try:
                answer = await self._provider_call(request, attempt)
            except GatewayError as error:
                facts.provider_s += system.clock() - attempt.begun_s
                why = refused_by(error)
                paid = system.books.fail_call(entry, error, asked=why is None)
                self._use(request, paid)
                if why is None:
                    verdict = self._judge(request, attempt, error)
                    plan.failed(attempt.deployment, error, verdict)
                    continue
                # The Batcher, which asks breaker, quota and budget for us, has made no call.
                self._end(attempt, Verdict.IGNORED)
                if why == "spent":
                    plan.spent()
                else:
                    plan.refused(attempt.deployment, error.retry_after_s or 0.0, why)
                facts.attempts -= paid == NOTHING_USED
                facts.retries = plan.retries
                continue
            except BaseException:
                system.books.void_call(entry, None)
                self._judge(request, attempt, None, ignored=True)
                raise
            attempt.took_s = system.clock() - attempt.begun_s
            facts.provider_s += attempt.took_s
            facts.cost_nano = codec.costs_of(facts.cost_nano, answer.cost_nano)
            self._judge(request, attempt, None, usage=answer.usage)
            self._learn(request, answer)
            system.meter.usage(*codec.tokens_in(answer.usage), answer.cost_nano)
            broken: GatewayError | None = None
            try:
                if _is_filtered(answer) and plan.turn_aside("content_policy"):
                    filtered.append((attempt.deployment, answer))
                    continue
                warnings = self._validate(request, answer)
            except GatewayError as error:
                broken = error
                raise
            finally:  # whatever it is worth, it is paid for
                system.books.post_call(entry, answer, broken)
            facts.warnings += warnings
            request.doubted = bool(warnings)
            return answer

    async def _next(self, request: _Request, plan: Plan) -> _Attempt:
        """The next attempt that breaker and quota let through, after the pause it needs."""
        system, facts = self._system, request.facts
        begun_s = system.clock()
        while True:
            left_s = self._left(request)
            try:
                planned = plan.next(left_s)
            except DeploymentsBusy as busy:
                again_s = system.clock() + (busy.retry_after_s or 0.0)
                # Another round is for those of whom nothing was asked: what failed has its retries.
                if facts.attempts or again_s >= self._waits_until_s(request, begun_s):
                    raise
                await asyncio.sleep(again_s - system.clock())
                plan.again()
                continue
            if left_s <= 0:
                timeout_s = request.deadline_s - request.started_s
                raise GatewayTimeout(
                    f"no time left for another attempt within {timeout_s:g} s",
                    model=facts.group,
                )
            if planned.is_retry and not await self._may_retry(request, plan, planned, left_s):
                continue
            attempt = _Attempt(planned.deployment, planned.is_retry)
            # The Batcher asks both for embeddings: once for each provider call, whoever shares it.
            if request.call.route != "embedding" and not await self._may(request, plan, attempt):
                continue
            facts.deployment = attempt.deployment.id
            facts.attempts += 1
            facts.retries, facts.fallbacks = plan.retries, plan.fallbacks
            return attempt

    async def _may_retry(self, request: _Request, plan: Plan, planned: Try, left_s: float) -> bool:
        """Whether a retry is to be made; if so, returns after the pause it needs.

        It costs the budget of the deployment that it goes to, unless it cannot go there anyway.
        """
        system, deployment, pause_s = self._system, planned.deployment, planned.pause_s
        if system.config.gateway.enable_circuit_breaker:
            standing = system.breaker.standing(deployment.circuit)
            held_s = standing.retry_after_s
            if not standing.callable and not 0 < held_s <= pause_s:
                throttled = standing.state in LETS_THROUGH
                pause_s += held_s
                if not (throttled and planned.pause_s and pause_s < left_s):
                    plan.refused(deployment, held_s, "throttled" if throttled else "open")
                    return False
        # For texts the Batcher asks, once for each provider call that carries them again.
        embeds = request.call.route == "embedding"
        if not (embeds or await system.breaker.may_retry(deployment.circuit)):
            plan.spent()
            return False
        if pause_s:
            await asyncio.sleep(pause_s)
        return True

    async def _may(self, request: _Request, plan: Plan, attempt: _Attempt) -> bool:
        """Whether breaker and quota let an attempt through. What they gave is noted in it."""
        system, deployment = self._system, attempt.deployment
        if system.config.gateway.enable_circuit_breaker:
            answer = await system.breaker.admit(deployment.circuit)
            if isinstance(answer, BreakerRefusal):
                plan.refused(deployment, answer.retry_after_s, why_of(answer))
                return False
            attempt.admitted = answer
        else:
            attempt.admitted = pass_unasked(deployment)
        call, group = request.call, request.group
        try:
            quota = await system.quotas.take_call(deployment, call, group, request.bound)
        except BaseException as error:
            self._give_back(attempt)
            if isinstance(error, OwnerUnavailable):
                raise Overloaded(f"limits cannot be checked: {error}", retry_after_s=1.0) from None
            raise
        if isinstance(quota, Refusal):
            self._give_back(attempt)
            plan.refused(deployment, quota.retry_after_s, "busy")
            return False
        attempt.quota = quota
        return True

    def _give_back(self, attempt: _Attempt) -> None:
        """The attempt is not made after all."""
        if attempt.quota is not None:
            self._system.limiter.settle(attempt.quota, NOTHING_USED)
        if attempt.admitted is not None:
            self._system.breaker.judge(attempt.admitted, Verdict.IGNORED)

    def _waits_until_s(self, request: _Request, begun_s: float) -> float:
        """Until when the request may wait for a deployment's own limits."""
        told = self._system.config.gateway.rate_limit_config or RateLimitConfig()
        if not (request.call.may_wait and told.enable_queuing):
            return begun_s
        return min(request.deadline_s, begun_s + told.queue_timeout)

    def _open_entry(
        self, request: _Request, attempt: _Attempt, *, stream: bool = False
    ) -> OpenEntry | None:
        """The ledger's entry of an attempt. The breaker has its leave back where there is none."""
        try:
            return self._system.books.open_call(
                request.call, request.facts, attempt.deployment, stream=stream
            )
        except GatewayError:
            self._give_back(attempt)
            raise

    def _begin(self, attempt: _Attempt) -> None:
        """The provider is called now; one `_judge` or `_end` follows."""
        attempt.begun_s = attempt.asked_s = self._system.clock()
        self._system.router.began(attempt.deployment)

    def _end(self, attempt: _Attempt, verdict: Verdict) -> None:
        """Tell the router how long it took, where that says something of the deployment."""
        took_s = attempt.took_s
        if took_s is None:
            took_s = self._system.clock() - attempt.begun_s
        ok = verdict in (Verdict.SUCCESS, Verdict.SLOW)
        told_s = None if verdict is Verdict.IGNORED else took_s
        self._system.router.ended(attempt.deployment, told_s, ok)

    def _plan(self, request: _Request) -> Plan:
        system = self._system
        config = system.config.gateway
        group = request.group.name
        request.prompt = prompt = system.kv_cache.read(request.call)
        return Plan(
            [group, *system.table.fallbacks(group)],
            lambda name: system.order(name, prompt),
            max_retries=config.max_retries,
            retry_delay_s=config.retry_delay,
            rng=system.rng,
            special=system.table.special_fallbacks,
        )

    async def _provider_call(self, request: _Request, attempt: _Attempt) -> Answer:
        """One attempt, bounded by what is left of the deadline."""
        system, call, deployment = self._system, request.call, attempt.deployment
        body = self._body(request, deployment)
        timeout_s = self._left(request)
        # The Batcher's own clock goes first, so that it, and not we, judges a call that hangs.
        grace_s = BATCHER_GRACE_S if call.route == "embedding" else 0.0
        try:
            async with asyncio.timeout(timeout_s + grace_s):
                if call.route == "chat":
                    return await system.provider.chat(
                        deployment, body, timeout_s=timeout_s, resolve=system.resolve
                    )
                if call.route == "completion":
                    return await system.provider.completion(
                        deployment, body, timeout_s=timeout_s, resolve=system.resolve
                    )
                return await self._embed(request, attempt, timeout_s)
        except TimeoutError as error:
            if isinstance(error, GatewayError):
                raise
            raise GatewayTimeout(
                f"{deployment.group!r} gave no answer within {timeout_s:.1f} s",
                model=deployment.group,
                provider=deployment.provider,
            ) from None

    def _body(self, request: _Request, deployment: Deployment) -> dict[str, Any]:
        """What is sent: the caller's own body, with hints for the provider's cache.

        Clamped where a limit of tokens or money says so.
        """
        body, bound = request.call.body, request.bound
        if bound is not None and bound.clamp is not None:
            body = bounds.clamped(request.call.route, body, bound, deployment)
        return self._system.kv_cache.sent(request.prompt, body, deployment)

    async def _embed(self, request: _Request, attempt: _Attempt, timeout_s: float) -> Answer:
        """Texts go through the Batcher, which may send them together with other callers'."""
        system, body, deployment = self._system, request.call.body, attempt.deployment
        texts = _inputs(body["input"])
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
        if share.spare is not None:
            system.books.spare(request.call, request.facts, deployment, share.spare)
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

    async def _open_stream(self, request: _Request, lead: Lead | None) -> Stream:
        """Attempts as planned, until one gives a first chunk."""
        plan = self._plan(request)
        while True:
            attempt = await self._next(request, plan)
            system, facts, call = self._system, request.facts, request.call
            entry = self._open_entry(request, attempt, stream=True)
            self._begin(attempt)
            open_stream = (
                system.provider.chat_stream
                if call.route == "chat"
                else system.provider.completion_stream
            )
            # Its own clock keeps both times; another one here would cost as much as a chunk.
            chunks = open_stream(
                attempt.deployment,
                _with_usage(self._body(request, attempt.deployment)),
                timeout_s=self._left(request),
                resolve=system.resolve,
                stall_s=system.config.gateway.stall_timeout,
            )
            try:
                first = await anext(chunks)
            except (GatewayError, StopAsyncIteration) as failure:
                error = _stream_failure(failure, attempt.deployment)
                facts.provider_s += system.clock() - attempt.begun_s
                system.books.void_call(entry, error)
                verdict = self._judge(request, attempt, error)
                await chunks.aclose()
                plan.failed(attempt.deployment, error, verdict)
                continue
            except BaseException:
                system.books.void_call(entry, None)
                self._judge(request, attempt, None, ignored=True)
                await chunks.aclose()
                raise
            attempt.took_s = system.clock() - attempt.begun_s
            facts.provider_s += attempt.took_s
            if attempt.took_s > self._slow_s():
                self._notice_slow(attempt)
            if attempt.admitted is not None:
                begun = Verdict.SLOW if attempt.slow else Verdict.SUCCESS
                attempt.admitted = system.breaker.begun(attempt.admitted, begun)
            system.meter.first_token(call.route, system.clock() - request.started_s)
            facts.total_s = system.clock() - request.started_s
            flow = _Flow(
                request, attempt, entry, lead, chunks, StreamTally(call.route), system.clock()
            )
            relay = self._relay(flow, first)
            # Into its `try`, so that closing or dropping it settles even if nobody takes a chunk.
            await anext(relay)
            return Stream(relay, facts)

    async def _relay(
        self, flow: _Flow, first: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Hand the chunks on, and settle when they end, fail, or nobody wants them any more.

        At the deadline nobody may be there who could be told that time is up: then a timer settles.
        The first item is no chunk: it says that the generator has started.
        """
        status, error, carried = "cancelled", None, False
        timer = asyncio.get_running_loop().call_later(self._left(flow.request), self._expire, flow)
        try:
            yield {}
            self._hear(flow, first)
            yield first
            while (chunk := await self._next_chunk(flow)) is not None:
                yield chunk
            status = "ok"
        except GatewayError as failure:
            status, error = str(failure.status), failure
            raise
        except (GeneratorExit, asyncio.CancelledError):
            carried = self._is_followed(flow) and self._system.cache.carry(self._read_on(flow))
            raise
        finally:
            timer.cancel()
            if not carried:
                await self._end_stream(flow, status, error)

    async def _read_on(self, flow: _Flow) -> None:
        """Our own client has left, and others follow: the stream goes on for them."""
        status, error = "cancelled", None
        try:
            while await self._next_chunk(flow) is not None:
                pass
            status = "ok"
        except GatewayError as failure:
            status, error = str(failure.status), failure
        finally:
            await self._end_stream(flow, status, error)

    async def _next_chunk(self, flow: _Flow) -> dict[str, Any] | None:
        """The stream's next chunk, noted; None at its end."""
        attempt, clock = flow.attempt, self._system.clock
        if flow.late is not None:
            raise flow.late
        # Only while we wait: a client that is slow to take a chunk slows nobody down.
        attempt.asked_s = clock()
        flow.awaited = True
        if flow.reading is None and not self._is_followed(flow):
            chunk = await anext(flow.chunks, None)
        else:
            # Cancelling who waits for a chunk would end the stream, for its followers too.
            if flow.reading is None:
                flow.reading = asyncio.create_task(_next_of(flow.chunks))
            chunk = await asyncio.shield(flow.reading)
            flow.reading = None
        if chunk is not None:
            if clock() - attempt.asked_s > self._slow_s():
                self._notice_slow(attempt)
            self._hear(flow, chunk)
            flow.awaited = False
        return chunk

    def _hear(self, flow: _Flow, chunk: dict[str, Any]) -> None:
        flow.tally.add(chunk)
        if flow.lead is not None and flow.lead.flight is not None:
            self._system.cache.say(flow.lead, orjson.dumps(chunk))

    def _is_followed(self, flow: _Flow) -> bool:
        return flow.lead is not None and self._system.cache.is_followed(flow.lead)

    def _expire(self, flow: _Flow) -> None:
        """The stream's deadline. Who waits for a chunk hears of it from the provider's lane."""
        if flow.awaited:
            return
        request, deployment = flow.request, flow.attempt.deployment
        timeout_s = request.deadline_s - request.started_s
        flow.late = GatewayTimeout(
            f"the answer was not taken to its end within {timeout_s:g} s",
            model=deployment.group,
            provider=deployment.provider,
        )
        self._settle_stream(flow, str(flow.late.status), flow.late, ignored=True)

    async def _end_stream(self, flow: _Flow, status: str, error: GatewayError | None) -> None:
        try:
            if flow.reading is not None:
                flow.reading.cancel()
                await asyncio.wait([flow.reading])
            await flow.chunks.aclose()
        finally:
            if flow.late is None:
                self._settle_stream(flow, status, error, ignored=status == "cancelled")

    def _settle_stream(
        self, flow: _Flow, status: str, error: GatewayError | None, *, ignored: bool
    ) -> None:
        """A stream is over: judge, settle, and land. A whole, valid one is kept as answers are."""
        system, request, attempt = self._system, flow.request, flow.attempt
        facts, lead = request.facts, flow.lead
        facts.provider_s += system.clock() - flow.begun_s
        answer = flow.tally.answer(request.call.body, status == "ok")
        if answer.cost_nano is None:
            answer.cost_nano = system.provider.price(
                attempt.deployment, answer.usage, model=answer.model
            )
        facts.cost_nano = answer.cost_nano
        self._judge(request, attempt, error, ignored=ignored, usage=answer.usage)
        system.books.post_call(flow.entry, answer, error)
        self._learn(request, answer)
        system.meter.usage(*codec.tokens_in(answer.usage), answer.cost_nano)
        self._settle(request)
        if lead is not None:
            landed, ttl_s = None, None
            if status == "ok":
                request.doubted = self._is_doubtful(request, answer)
                landed, ttl_s = self._keep(request, answer)
            told = None if error is None else _told_to_others(request, error)
            system.cache.land(lead, landed, told, ttl_s)
        self._finish(request.call, request, status)

    # 6 ------------------------------------------------------------------------------- judge

    def _judge(
        self,
        request: _Request,
        attempt: _Attempt,
        error: GatewayError | None,
        *,
        ignored: bool = False,
        usage: Mapping[str, Any] | None = None,
    ) -> Verdict:
        """Tell breaker, quota and router what came of an attempt; for embeddings the router only.

        The Batcher tells the other two, once for each provider call, whoever shares it.
        """
        verdict = Verdict.IGNORED if ignored else self._verdict(request, attempt, error)
        self._end(attempt, verdict)
        self._system.meter.provider_call(attempt.deployment.circuit, verdict.value)
        self._system.kv_cache.learn(attempt.deployment, usage)
        if attempt.quota is not None:
            prompt, completion = codec.tokens_in(usage)
            self._system.limiter.settle(attempt.quota, Amount(prompt + completion))
        if attempt.admitted is not None:
            retry_after_s = None if error is None else error.retry_after_s
            self._system.breaker.judge(attempt.admitted, verdict, retry_after_s)
        return verdict

    def _verdict(self, request: _Request, attempt: _Attempt, error: GatewayError | None) -> Verdict:
        system = self._system
        if error is None:
            return Verdict.SLOW if attempt.slow else Verdict.SUCCESS
        given_s = request.deadline_s - attempt.begun_s
        fair = system.is_patient(given_s) and not request.own_deadline
        if attempt.took_s is not None:
            # A stream that was still speaking when its time was up has done nothing wrong.
            fair &= system.clock() - attempt.asked_s > given_s / 2
        return system.verdict(error, attempt.asked_s, request.deadline_s, fair=fair)

    def _slow_s(self) -> float:
        """How long a stream's next chunk may keep us waiting and not be called slow."""
        told = self._system.config.gateway.circuit_breaker_config
        return math.inf if told is None else told.slow_call_s or math.inf

    def _notice_slow(self, attempt: _Attempt) -> None:
        if not self._system.stalls.is_to_blame(attempt.asked_s):
            attempt.slow = True

    # 7 ---------------------------------------------------------------------------- validate

    def _validate(self, request: _Request, answer: Answer) -> list[str]:
        config = self._system.config.gateway
        if not config.enable_validation or request.call.route == "embedding":
            return []
        return validation.validate(answer.body, request.call.body, config.validation_level)

    def _is_doubtful(self, request: _Request, answer: Answer) -> bool:
        """Whether the validation has something to say of a stream that has been handed on."""
        try:
            return bool(self._validate(request, answer))
        except GatewayError:
            return True

    # 8 -------------------------------------------------------------------------------- keep

    def _keep(self, request: _Request, answer: Answer) -> tuple[bytes, float | None]:
        """The answer as bytes for those who wait, and for how long to store it, if at all."""
        clamped = request.facts.clamped
        whole = _is_whole(answer) and (clamped is None or not _is_cut(answer))
        answer.clamped = clamped
        good = whole and not request.doubted
        return codec.pack(answer), self._ttl_s(request) if good else None

    def _ttl_s(self, request: _Request) -> float | None:
        """For how long a good answer to this request is stored, None where it is not."""
        config = self._system.config.gateway
        if not (config.enable_caching and request.call.cache_write):
            return None
        return request.call.cache_ttl_s or float(config.cache_ttl_s)

    # 9 ------------------------------------------------------------------------------ settle

    def _settle(self, request: _Request | None) -> None:
        if request is not None and request.hold is not None:
            self._system.limiter.settle(request.hold, request.used)
            request.hold = None
            request.used = NOTHING_USED

    def _learn(self, request: _Request, answer: Answer) -> None:
        """An answer was paid for: so much of the reservation is used."""
        bound, limits = request.bound, request.limits
        if bound is None or limits is None:
            return
        nano = answer.cost_nano if answer.cost_nano is not None else bound.nano
        self._use(request, Amount(bounds.used(answer.usage, bound), nano or 0))
        cut = request.facts.clamped is not None and _is_cut(answer)
        self._system.bounds.learn(request.call, request.group, answer.usage, cut=cut)

    def _use(self, request: _Request, used: Amount) -> None:
        request.used = Amount(request.used.tokens + used.tokens, request.used.nano + used.nano)

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
        tenant, kind = request.call.tenant, refusal.kind
        self._system.meter.limited(tenant, kind)
        is_money = kind.startswith("usd_")
        limit = f"${refusal.limit / NANO_PER_USD:g}" if is_money else f"{refusal.limit:g}"
        words = f"{limit} {kind.replace('_', ' ')}"
        details: dict[str, Any] = {
            "model": request.facts.group,
            "figures": self._system.limiter.figures(tenant),
        }
        if refusal.never and not is_money:
            return RequestTooLarge(
                f"this request alone is more than tenant {tenant!r} may ever use: {words}",
                code="tokens_over_limit",
                **details,
            )
        if is_money and not refusal.lent:
            after_s = None if refusal.never else refusal.retry_after_s
            when = "; it never fits" if after_s is None else f"; it begins anew in {after_s:.0f} s"
            return BudgetExceeded(
                f"tenant {tenant!r} has used up its {words}{when}", retry_after_s=after_s, **details
            )
        error = RateLimitError if waited_s <= 0 else QueueTimeout
        return error(
            f"tenant {tenant!r} is over its limit of {words}; "
            f"retry after {refusal.retry_after_s:.3f} s",
            retry_after_s=refusal.retry_after_s,
            **details,
        )


async def _next_of(chunks: Chunks) -> dict[str, Any] | None:
    return await anext(chunks, None)


def _told_to_others(request: _Request, error: GatewayError) -> bytes | None:
    """What those hear who wait for a call that failed; None: one of them tries.

    Our client's own deadline is no news for those who have more time.
    """
    if request.own_deadline and isinstance(error, GatewayTimeout):
        return None
    return codec.pack_error(error)


def _asked(group: Group) -> str:
    """What a model's name stands for: another configuration may mean something else by it."""
    return " ".join([group.name, *(deployment.id for deployment in group.deployments)])


def _asks_for_variety(body: dict[str, Any]) -> bool:
    """Whether two equal requests are meant to get two different answers."""
    temperature, n = body.get("temperature"), body.get("n")
    return (temperature is not None and temperature > 0) or (n is not None and n > 1)


def _inputs(given: Any) -> list[Text]:
    """What is to be embedded, one by one; token ids as tuples."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [tuple(given)]
    return [one if isinstance(one, str) else tuple(one) for one in given]


def _is_cut(answer: Answer) -> bool:
    """Whether the answer ended because it could have no more tokens."""
    return any(c.get("finish_reason") == "length" for c in answer.body.get("choices") or ())


def _with_usage(body: dict[str, Any]) -> dict[str, Any]:
    """The body, asking for usage in the stream: the ledger wants to count, not to estimate."""
    return {**body, "stream_options": {**(body.get("stream_options") or {}), "include_usage": True}}


def _is_whole(answer: Answer) -> bool:
    """Whether every choice came to its own end, and no filter cut it short."""
    ends = [choice.get("finish_reason") for choice in answer.body.get("choices") or ()]
    return bool(ends) and all(end and end != "content_filter" for end in ends)


def _is_filtered(answer: Answer) -> bool:
    """Whether the provider's filter kept the answer back."""
    choices = answer.body.get("choices") or ()
    return any(choice.get("finish_reason") == "content_filter" for choice in choices)


def _stream_failure(failure: BaseException, deployment: Deployment) -> GatewayError:
    """The failure of a stream that has given nothing, as an error of ours."""
    if isinstance(failure, GatewayError):
        return failure
    return ProviderError(
        "the provider ended the stream before its first chunk",
        model=deployment.group,
        provider=deployment.provider,
    )
