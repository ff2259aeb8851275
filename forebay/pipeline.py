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
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.batcher.policy import BadVectors, BatcherFull, Lane, Order, Text
from actors.cache.desk import FlightFailed, Hit, Joined, Lead
from actors.cache.policy import Scope, key, text_keys
from actors.circuit_breaker.policy import LETS_THROUGH, Pass, Verdict
from actors.circuit_breaker.policy import Refusal as BreakerRefusal
from actors.ledger.desk import OpenEntry
from actors.rate_limiter.terms import NOTHING_USED, Amount, Hold, Limits, Refusal, Ticket
from actors.ref import OwnerUnavailable
from forebay import bounds, codec, schemas, validation
from forebay.attempts import Plan, Try, pass_unasked, refused_by, why_of
from forebay.bounds import Bound
from forebay.call import Call, Facts, Result, Stream
from forebay.checks import aside
from forebay.checks.finding import Finding
from forebay.checks.shape import texts_of
from forebay.codec import Answer
from forebay.config import RateLimitConfig
from forebay.ended import Ended, Tried
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
from forebay.relaying import Ending, Relay, followed, replayed
from forebay.routing import Deployment, Group
from forebay.tally import StreamTally
from forebay.texts import Texts

if TYPE_CHECKING:
    from forebay.kv_cache import Reading
    from forebay.once import Before, Turn
    from forebay.system import System
    from forebay.validation import Judgement

BATCHER_GRACE_S = 0.25
QUEUED_S_MIN = 0.001
"""What a limit takes less than this to say is no wait, but a message."""
ROUNDS_MAX = 16
"""How often a stream's follower asks again when its leader is lost, before it asks nobody."""
JOINED_TEXTS_MAX = 256
"""Longer lists are told of only where vectors are stored anyway. To join costs 10 us for each text
and takes its vector to the owner, whether anybody waits for it or not: for 2,048 texts of 1,536
dimensions 25 ms and 12 MB, where the list itself costs 5 ms (measured in one process). Such lists
are jobs, which read each text once; two of them seldom have the same texts under way."""
NO_JSON = (TypeError, ValueError, RecursionError)
"""What comes of a body that holds other things than JSON, or is too deep."""
OWN_ENDS = ("stop", "tool_calls", "function_call")
NANO_PER_USD = 1e9
UNKNOWN = "unknown"  # the model and provider of a request that was not even understood
TEXTS_FIELD: dict[str, str] = {"chat": "messages", "completion": "prompt", "embedding": "input"}


@dataclass(slots=True)
class _Request:
    """A checked call and what was taken for it so far."""

    call: Call
    group: Group
    started_s: float
    deadline_s: float
    ends_s: float  # the configured deadline, which those have who share the call
    facts: Facts
    own_deadline: bool = False  # the client's, shorter than the configured one
    limits: Limits | None = None
    bound: Bound | None = None
    ticket: Ticket | None = None
    hold: Hold | None = None
    reserved: bool = False
    used: Amount = NOTHING_USED
    doubted: bool = False  # the validation had something to say of the answer
    invalid: tuple[dict[str, Any], list[str]] | None = None  # an answer, and what is wrong with it
    prompt: Reading | None = None  # what its beginnings are called
    streams: bool = False
    answer: Answer | None = None  # the last one that a provider gave for it
    tried: tuple[Tried, ...] = ()  # its attempts, where somebody wants to know


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
    """A stream that is being relayed. `begun_s`: since when its time is not in the facts yet."""

    request: _Request
    attempt: _Attempt
    entry: OpenEntry | None
    lead: Lead | None
    tally: StreamTally
    begun_s: float | None


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
        read = read and call.idempotency_key is None
        if not read or call.route == "embedding" or not isinstance(name, str):
            return None
        try:
            group = system.table.group(name)
            scope = self._scope(call)
            address = self._address(scope, call, group)
            hit = system.cache.near(address, scope)
            request = None if hit is None else self._check(call)
        except GatewayError:
            return None
        if hit is None or request is None:
            return None
        request.ticket = system.limiter.count_at_once(call.tenant, request.limits)
        if request.ticket is None:
            return None
        request.facts.cache_key = self._cache_key(address)
        answer = self._shared(request, hit)
        self._free(request)
        self._finish(call, request, "ok")
        return Result(answer, request.facts)

    async def answer(self, call: Call, turn: Turn | None = None) -> Result:
        """One request, one whole answer; what its key was answered before, where it has one.

        Raises:
            GatewayError: every failure, with its HTTP status and, where one is known, the time
            after which a retry can succeed.
        """
        if turn is None and call.idempotency_key is not None:
            return await self._system.once.answer(call, self.answer)
        request: _Request | None = None
        status = "error"
        try:
            request = self._check(call)
            await self._count(request)
            before = None if turn is None else await turn.take(partial(self._left, request))
            if before is not None:
                answer = self._replay(request, before)
                self._free(request)
            elif call.route == "embedding":
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

    async def stream(self, call: Call, turn: Turn | None = None) -> Stream:
        """One request, answered chunk by chunk; returns when the first chunk is there.

        Until then another deployment may take over; afterwards an error is raised from `chunks`
        and no second answer is ever begun.

        Raises:
            GatewayError: as `answer`.
        """
        if turn is None and call.idempotency_key is not None:
            return await self._system.once.stream(call, self.stream)
        request: _Request | None = None
        try:
            request = self._check(call)
            request.streams = True
            await self._count(request)
            before = None if turn is None else await turn.take(partial(self._left, request))
            if before is not None:
                answer = self._replay(request, before)
                return await self._handed(request, replayed(call.route, answer))
            found = await self._look_up_stream(request)
            return found if isinstance(found, Stream) else await self._lead_stream(request, found)
        except BaseException as error:
            status = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
            if isinstance(error, GatewayError):
                status = str(error.status)
                error.facts = None if request is None else request.facts
            self._finish(call, request, status)
            raise

    def refused(self, call: Call, status: int) -> None:
        """A request was answered with `status` before it became a call: its `body` is empty."""
        self._finish(call, None, str(status))

    def key_of(self, call: Call) -> bytes:
        """What the answer to this call is stored under. Raises as `answer` does for a wrong one."""
        group = self._check(call).group
        return self._address(self._scope(call), call, group)

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
        ends_s = now + config.timeout
        return _Request(call, group, now, now + timeout_s, ends_s, facts, own_deadline, limits)

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
        finally:
            self._queued(asked_s)
        if isinstance(counted, Refusal):
            raise self._refused(request, counted, wait_s)
        request.ticket = counted

    def _queued(self, since_s: float) -> None:
        """A limit, of the tenant or of a deployment, has let us wait since then, if at all."""
        waited_s = self._system.clock() - since_s
        if waited_s > QUEUED_S_MIN:
            self._system.meter.queued(waited_s)

    # 3 ----------------------------------------------------------------------------- look up

    async def _look_up(self, request: _Request) -> Answer | Lead | None:
        system, call, facts = self._system, request.call, request.facts
        read, join = self._may_share(call)
        if not (read or join):
            return None
        scope = self._scope(call)
        address = self._address(scope, call, request.group)
        facts.cache_key = self._cache_key(address)
        asked_s = system.clock()
        try:
            found = await system.cache.lookup(
                address, scope, read=read, join=join, patience_s=self._left(request)
            )
        except FlightFailed as failure:
            facts.cache = "joined"
            self._note_wait(request, asked_s)
            raise codec.unpack_error(failure.error) from None
        if isinstance(found, Joined):
            self._note_wait(request, asked_s)
        if isinstance(found, Lead):
            facts.cache = "miss"
            system.meter.cache("miss")
            return found
        if isinstance(found, Joined) and not self._is_moderated(found):
            # A stream's, or one with a doubt: who wants it whole is to have it judged.
            facts.cache = "miss"
            system.meter.cache("miss")
            return system.cache.alone(address, scope)
        answer = self._shared(request, found)
        if facts.cache == "joined":  # it may be a stream's, which nobody has judged
            facts.warnings += self._validate(request, answer)
        self._free(request)
        return answer

    def _shared(self, request: _Request, found: Hit | Joined) -> Answer:
        """A stored answer, or that of somebody else's call."""
        answer, facts = codec.unpack(found.value), request.facts
        facts.cache = "hit" if isinstance(found, Hit) else "joined"
        facts.saved_nano = answer.cost_nano or 0
        facts.response_id = answer.id
        if answer.clamped is not None:
            self._tell_clamp(request, answer.clamped)
        return answer

    async def _look_up_stream(self, request: _Request) -> Stream | Lead | None:
        """As `_look_up`, for those who want the answer piece by piece."""
        system, call, facts = self._system, request.call, request.facts
        read, join = self._may_share(call)
        if not (read or join):
            return None
        scope = self._scope(call)
        address = self._address(scope, call, request.group)
        facts.cache_key = self._cache_key(address)
        for _ in range(ROUNDS_MAX):
            # Who leads may have to go on for others when its own time is up.
            ends_s = max(0.0, request.ends_s - system.clock())
            (found,) = await system.cache.ask(
                [address], scope, read=read, join=join, patience_s=ends_s, stream=True
            )
            chunks: AsyncGenerator[dict[str, Any], None]
            if isinstance(found, Lead):
                break
            if isinstance(found, Hit):
                chunks = replayed(call.route, self._shared(request, found))
            else:
                listening = system.cache.listen(found.flight)
                asked_s = system.clock()
                try:
                    news = await listening.more(self._left(request))
                except BaseException as failure:
                    listening.close()
                    if not isinstance(failure, FlightFailed):
                        raise
                    facts.cache = "joined"
                    raise codec.unpack_error(failure.error) from None
                finally:
                    self._note_wait(request, asked_s)
                if news is None:
                    listening.close()
                    continue
                if isinstance(news, Joined):
                    listening.close()
                    chunks = replayed(call.route, self._shared(request, news))
                else:
                    facts.cache = "joined"
                    left_s, lost = partial(self._left, request), partial(self._lost, request)
                    heard = partial(self._heard, request)
                    chunks = followed(listening, news, call.route, call.body, left_s, lost, heard)
            return await self._handed(request, chunks)
        else:
            found = Lead(address, scope, None)
        facts.cache = "miss"
        system.meter.cache("miss")
        return found

    def _note_wait(self, request: _Request, since_s: float) -> None:
        """Somebody else's call was waited for since then: that is no overhead of ours."""
        request.facts.provider_s += self._system.clock() - since_s

    def _heard(self, request: _Request, whole: Answer) -> None:
        """The end of a stream that was somebody else's."""
        request.facts.saved_nano = whole.cost_nano or 0
        request.facts.response_id = whole.id

    async def _handed(
        self, request: _Request, chunks: AsyncGenerator[dict[str, Any], None]
    ) -> Stream:
        system, facts = self._system, request.facts
        shared = self._share_out(request, chunks)
        system.meter.first_token(system.clock() - request.started_s)
        facts.total_s = system.clock() - request.started_s
        await anext(shared)  # into its `try`, as in `_open_stream`
        return Stream(shared, facts)

    def _replay(self, request: _Request, before: Before) -> Answer:
        """What the first request with this key was answered."""
        answer, facts = before.answer, request.facts
        facts.replayed = True
        facts.saved_nano = answer.cost_nano or 0
        facts.response_id = answer.id
        facts.clamped = answer.clamped
        facts.warnings += before.warnings
        return answer

    async def _share_out(
        self, request: _Request, chunks: AsyncGenerator[dict[str, Any], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """A stream that is not ours. The first item is no chunk, as in `Relay.own`."""
        status, follows = "cancelled", request.facts.cache == "joined"
        clock = self._system.clock
        asked_s: float | None = None
        try:
            yield {}
            asked_s = clock()
            async for chunk in chunks:
                if follows:
                    self._note_wait(request, asked_s)
                asked_s = None
                yield chunk
                asked_s = clock()
            status = "ok"
        except GatewayError as error:
            status = str(error.status)
            raise
        finally:
            await chunks.aclose()
            if follows and asked_s is not None:
                self._note_wait(request, asked_s)
            if status in ("ok", "cancelled"):
                self._free(request)
            self._finish(request.call, request, status)

    def _lost(self, request: _Request) -> GatewayError:
        """The stream that we followed came to no end, and what was told cannot be taken back."""
        if self._left(request) <= 0:
            timeout_s = request.deadline_s - request.started_s
            return GatewayTimeout(f"no answer within {timeout_s:g} s", model=request.facts.group)
        return ProviderError("the call that this stream shared was lost", model=request.facts.group)

    def _scope(self, call: Call) -> Scope:
        """Who shares the answer: the tenant's own, or everybody where that is configured."""
        cache = self._system.config.gateway.cache_config
        shared = cache is not None and cache.scope == "shared"
        return Scope(None if shared else call.tenant)

    def _address(self, scope: Scope, call: Call, group: Group) -> bytes:
        """Where an answer is kept: what was judged by other rules is kept elsewhere."""
        meaning = _meaning(group) + self._system.validation.rules
        try:
            return key(scope, call.route, group.name, call.body, meaning)
        except NO_JSON as error:  # Python's callers can ask for what no request can say
            message = f"the request cannot be sent as JSON: {error}"
            raise InvalidRequest(message, code="invalid_json") from None

    def _may_share(self, call: Call) -> tuple[bool, bool]:
        """Whether a stored answer may serve the call, and whether another's running one may."""
        config = self._system.config.gateway
        if not schemas.understands(call.route, call.body):
            return False, False
        read = config.enable_caching and call.cache_read
        join = config.deduplicate == "all" or not _asks_for_variety(call.body)
        return read, join and config.enable_request_deduplication

    def _cache_key(self, address: bytes) -> str:
        """What a correction of the answer is to take out of the cache, if anything."""
        return address.hex() if self._system.config.gateway.enable_caching else ""

    def _free(self, request: _Request) -> None:
        """An answer from the cache, from somebody else's call, or from before: it costs nothing."""
        system, call, facts = self._system, request.call, request.facts
        if not facts.replayed:
            system.meter.cache(facts.cache)
        known = facts.replayed or facts.cache == "hit"
        if known and not system.tenants.counts_cache_hits(call.tenant):
            self._uncount(request)
        system.books.free(call, facts, system.clock() - request.started_s)

    async def _vectors(self, request: _Request) -> Answer:
        """Texts are looked up one by one, and only those that nobody has or is getting are sent."""
        system, call, facts = self._system, request.call, request.facts
        read, join = self._may_share(call)
        given = _inputs(call.body["input"])
        join &= read or len(given) <= JOINED_TEXTS_MAX
        if not (read or join):
            return await self._lead(request, None)
        shared = {name: value for name, value in call.body.items() if name != "input"}
        scope, group = self._scope(call), request.group
        keys = text_keys(scope, call.route, group.name, shared, given, _meaning(group))
        texts = Texts(system.cache, scope, given, keys)
        try:
            await texts.look_up(read=read, join=join, patience_s=self._left(request))
            while True:
                if texts.to_send:
                    await self._lead_texts(request, texts)
                elif texts.awaited:
                    asked_s = system.clock()
                    try:
                        await texts.wait(read=read, join=join, patience_s=self._left(request))
                    finally:
                        self._note_wait(request, asked_s)
                elif texts.even():
                    break
        except FlightFailed as failure:
            facts.cache = "miss" if texts.sent_any else "joined"
            raise codec.unpack_error(failure.error) from None
        facts.cached = texts.cached
        answer = texts.answer()
        if texts.sent_any:
            system.meter.cache("miss")
        else:
            facts.cache = "hit" if facts.cached else "joined"
            first = request.group.deployments[0]
            saved = system.provider.price(first, answer.usage, model=answer.model)
            facts.saved_nano = saved or 0
            self._free(request)
        return answer

    # 4 ----------------------------------------------------------------------------- reserve

    async def _lead(self, request: _Request, lead: Lead | None) -> Answer:
        """Get the answer ourselves, and let those who wait for it have it or the failure."""
        landed: bytes | None = None
        told: bytes | None = None
        ttl_s: float | None = None
        try:
            await self._reserve(request)
            lead = self._still_for_all(request, lead)
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
            answer = await self._attempt(request)
            texts.take(answer, self._ttl_s(request), own=_is_own(request))
        except GatewayError as failure:
            error = failure
            raise
        finally:
            self._settle(request)
            texts.give_up(_told_to_others(request, error), error)

    async def _lead_stream(self, request: _Request, lead: Lead | None) -> Stream:
        """Get the stream ourselves; once it has begun, its relay settles and lands it."""
        try:
            await self._reserve(request)
            lead = self._still_for_all(request, lead)
            return await self._open_stream(request, lead)
        except BaseException as error:
            self._settle(request)
            if lead is not None:
                self._system.cache.land(lead, None, _told_to_others(request, error))
            raise

    def _still_for_all(self, request: _Request, lead: Lead | None) -> Lead | None:
        """Where tenants share answers, one's limit shortens nobody else's: another one leads."""
        clamped = request.facts.clamped is not None
        if lead is None or not clamped or self._scope(request.call).tenant is not None:
            return lead
        self._system.cache.land(lead)
        return None

    async def _reserve(self, request: _Request) -> None:
        """Take what the call may use. What fails here is nobody's but the request's own."""
        system = self._system
        request.reserved = False
        if system.books.full:
            self._uncount(request)
            raise Overloaded("the ledger is away and its buffer is full", retry_after_s=1.0)
        if request.ticket is None:
            request.reserved = True
            return
        may_wait = request.call.may_wait
        wait_s, _ = system.tenants.queue_for(request.call.tenant) if may_wait else (0.0, 0)
        asked_s = system.clock()
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
        finally:
            self._queued(asked_s)
        if isinstance(held, Refusal):
            self._uncount(request)
            raise self._refused(request, held, wait_s)
        request.hold, request.reserved = held, True
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
            repaired = await self._repair(request)
            if repaired is not None:
                return repaired
            if not filtered:
                raise
        deployment, answer = filtered[-1]
        request.facts.deployment = deployment.id
        request.facts.warnings += self._validate(request, answer)
        request.doubted = True  # nobody else is to have it: next time another may be asked
        return answer

    async def _attempts(
        self,
        request: _Request,
        plan: Plan,
        filtered: list[tuple[Deployment, Answer]],
        note: str | None = None,
    ) -> Answer:
        """The attempts themselves; what a filter kept back on the way is added to `filtered`.

        `note` tells the ledger why the answer is not the request's own; nobody validates it then.
        """
        while True:
            attempt = await self._next(request, plan)
            system, facts = self._system, request.facts
            entry = await self._open_entry(request, attempt)
            self._begin(attempt)
            try:
                answer = await self._provider_call(request, attempt)
            except GatewayError as failure:
                error = system.kv_cache.blamed(request.prompt, attempt.deployment, failure)
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
                warnings = [] if note else await self._validate_whole(request, answer)
            except GatewayError as error:
                broken = error
                raise
            finally:  # whatever it is worth, it is paid for
                system.books.post_call(entry, answer, broken, note)
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
                asked_s = system.clock()
                await asyncio.sleep(again_s - asked_s)
                self._queued(asked_s)
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

    async def _open_entry(
        self, request: _Request, attempt: _Attempt, *, stream: bool = False
    ) -> OpenEntry | None:
        """The ledger's entry of an attempt. The breaker has its leave back where there is none."""
        try:
            return await self._system.books.open_call(
                request.call,
                request.facts,
                attempt.deployment,
                stream=stream,
                bound=request.bound,
            )
        except BaseException:
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
        system, call, deployment = self._system, request.call, attempt.deployment
        body = call.body
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
                Order(
                    call.tenant,
                    timeout_s,
                    coalesce,
                    call.bulk,
                    self._patience_s(request),
                    system.caps_for(deployment),
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

    def _patience_s(self, request: _Request) -> float:
        """How long texts may wait in the Batcher for the deployment's own limits: not at all where
        another deployment may have room."""
        group = request.group
        if len(group.deployments) > 1 or self._system.table.fallbacks(group.name):
            return 0.0
        now = self._system.clock()
        return self._waits_until_s(request, now) - now

    async def _open_stream(self, request: _Request, lead: Lead | None) -> Stream:
        """Attempts as planned, until one gives a first chunk.

        A stream that others may come to follow has their time, and its own client's only while that
        is all that waits for it.
        """
        plan = self._plan(request)
        outlives = request.own_deadline and lead is not None and lead.flight is not None
        while True:
            attempt = await self._next(request, plan)
            system, facts = self._system, request.facts
            entry = await self._open_entry(request, attempt, stream=True)
            self._begin(attempt)
            try:
                chunks = self._opened(request, attempt, outlives)
            except BaseException:
                self._abandon(request, attempt, entry)
                raise
            try:
                first = await self._first_of(request, chunks, outlives)
            except (GatewayError, StopAsyncIteration) as failure:
                error = _stream_failure(failure, attempt.deployment)
                error = system.kv_cache.blamed(request.prompt, attempt.deployment, error)
                facts.provider_s += system.clock() - attempt.begun_s
                system.books.void_call(entry, error)
                verdict = self._judge(request, attempt, error)
                await chunks.aclose()
                plan.failed(attempt.deployment, error, verdict)
                continue
            except BaseException:
                self._abandon(request, attempt, entry)
                await chunks.aclose()
                raise
            attempt.took_s = system.clock() - attempt.begun_s
            facts.provider_s += attempt.took_s
            if attempt.took_s > self._slow_s():
                self._notice_slow(attempt)
            if attempt.admitted is not None:
                begun = Verdict.SLOW if attempt.slow else Verdict.SUCCESS
                attempt.admitted = system.breaker.begun(attempt.admitted, begun)
            system.meter.first_token(system.clock() - request.started_s)
            facts.total_s = system.clock() - request.started_s
            tally = StreamTally(request.call.route)
            flow = _Flow(request, attempt, entry, lead, tally, system.clock())
            relay = Relay(
                chunks,
                tally,
                attempt,
                lead=lead,
                cache=system.cache,
                clock=system.clock,
                left_s=self._left(request),
                timeout_s=request.deadline_s - request.started_s,
                outlives=outlives,
                slow_s=self._slow_s(),
                late=partial(_late, attempt.deployment),
                notice_slow=partial(self._notice_slow, attempt),
                settle=partial(self._settle_stream, flow),
                finish=partial(self._finish_stream, flow),
            )
            own = relay.own(first)
            # Into its `try`, so that closing or dropping it settles even if nobody takes a chunk.
            await anext(own)
            return Stream(own, facts)

    def _opened(self, request: _Request, attempt: _Attempt, outlives: bool) -> Chunks:
        system = self._system
        chat = request.call.route == "chat"
        open_stream = system.provider.chat_stream if chat else system.provider.completion_stream
        # Its own clock keeps both times; another one here would cost as much as a chunk.
        return open_stream(
            attempt.deployment,
            _with_usage(self._body(request, attempt.deployment)),
            timeout_s=self._left(request) + (request.ends_s - request.deadline_s) * outlives,
            resolve=system.resolve,
            stall_s=system.config.gateway.stall_timeout,
        )

    def _abandon(self, request: _Request, attempt: _Attempt, entry: OpenEntry | None) -> None:
        """The caller went away, or we failed ourselves: nothing is known of the deployment."""
        self._system.books.void_call(entry, None)
        self._judge(request, attempt, None, ignored=True)

    async def _first_of(self, request: _Request, chunks: Chunks, outlives: bool) -> dict[str, Any]:
        if not outlives:
            return await anext(chunks)
        try:
            async with asyncio.timeout(self._left(request)):
                return await anext(chunks)
        except TimeoutError as error:
            if isinstance(error, GatewayError):
                raise
            timeout_s = request.deadline_s - request.started_s
            raise GatewayTimeout(
                f"no answer within {timeout_s:g} s", model=request.facts.group
            ) from None

    def _settle_stream(self, flow: _Flow, ending: Ending) -> None:
        """A stream is over. Whatever goes wrong here, nothing stays open."""
        try:
            self._end_stream(flow, ending)
        except BaseException:
            self._system.books.void_call(flow.entry, None)
            self._settle(flow.request)
            if flow.lead is not None:
                self._system.cache.land(flow.lead, None)
            raise

    def _end_stream(self, flow: _Flow, ending: Ending) -> None:
        """Judge, settle, and land. A whole, valid stream is kept as answers are."""
        system, request, attempt = self._system, flow.request, flow.attempt
        facts, lead = request.facts, flow.lead
        self._note_time(flow)
        answer = flow.tally.answer(request.call.body, ending.status == "ok")
        if answer.cost_nano is None:
            answer.cost_nano = system.provider.price(
                attempt.deployment, answer.usage, model=answer.model
            )
        facts.cost_nano = answer.cost_nano
        self._judge(request, attempt, ending.error, ignored=ending.own, usage=answer.usage)
        system.books.post_call(flow.entry, answer, ending.error)
        self._learn(request, answer)
        system.meter.usage(*codec.tokens_in(answer.usage), answer.cost_nano)
        landed, told, ttl_s = None, None, None
        if ending.status != "ok":
            self._settle(request)
            if ending.error is not None and not ending.own:
                told = codec.pack_error(ending.error)
        else:
            stored = self._judge_stream(request, answer, lead)
            if lead is not None:
                landed, ttl_s = self._keep(request, answer)
                ttl_s = ttl_s if stored else None
        if lead is not None:
            system.cache.land(lead, landed, told, ttl_s)

    def _finish_stream(self, flow: _Flow, status: str) -> None:
        """Its own client is done with; the stream may go on for others."""
        self._note_time(flow)
        self._finish(flow.request.call, flow.request, status)

    def _note_time(self, flow: _Flow) -> None:
        if flow.begun_s is not None:
            flow.request.facts.provider_s += self._system.clock() - flow.begun_s
            flow.begun_s = None

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
        if self._system.telemetry is not None:
            request.tried += (self._tried(attempt, verdict, error),)
        self._system.kv_cache.learn(request.call.tenant, attempt.deployment, usage)
        if attempt.quota is not None:
            prompt, completion = codec.tokens_in(usage)
            self._system.limiter.settle(attempt.quota, Amount(prompt + completion))
        if attempt.admitted is not None:
            retry_after_s = None if error is None else error.retry_after_s
            self._system.breaker.judge(attempt.admitted, verdict, retry_after_s)
        return verdict

    def _tried(self, attempt: _Attempt, verdict: Verdict, error: GatewayError | None) -> Tried:
        return Tried(
            attempt.deployment,
            attempt.begun_s,
            self._system.clock(),
            attempt.took_s,
            verdict.value,
            None if error is None else type(error).__name__,
        )

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
        """What all rules that need nobody else say. Raises ResponseValidationError by the level."""
        call = request.call
        if not self._system.config.gateway.enable_validation or call.route == "embedding":
            return []
        judgement = self._system.validation.judge(
            answer.body, call.body, tenant=call.tenant, request_id=call.request_id
        )
        return judgement.require(answer.body.get("model"))

    async def _validate_whole(self, request: _Request, answer: Answer) -> list[str]:
        """As `_validate`, the moderation's model included. What can be repaired is noted."""
        call, gateway = request.call, self._system.config.gateway
        if not gateway.enable_validation or call.route == "embedding":
            return []
        manager = self._system.validation
        judgement = manager.validate(answer.body, call.body)
        if self._moderates and not judgement.fatal:
            found = await self._moderate(request, answer)
            judgement = judgement.and_also(found)
            answer.moderated = not found
        self._tell(request, answer, judgement)
        if gateway.validation.repair and judgement.repairable:
            request.invalid = answer.body, judgement.fatal
        return judgement.require(answer.body.get("model"))

    async def _moderate(self, request: _Request, answer: Answer) -> list[Finding]:
        """What the moderation's model says of each choice's text. The tenant pays for it."""
        system, facts = self._system, request.facts
        name = system.config.gateway.validation.moderation_model
        assert name is not None, "nobody is asked where none is configured"
        found: list[Finding] = []
        for text in texts_of(answer.body):
            own = replace(facts, group=name, cost_nano=0, warnings=[])
            call = replace(request.call, route="chat", body=aside.question(text, name))
            asked = replace(
                request,
                call=call,
                group=system.table.group(name),
                facts=own,
                limits=None,
                bound=None,
                hold=None,
                used=NOTHING_USED,
            )
            tokens = 0
            try:
                told = await self._attempts(asked, self._plan(asked), [], note=aside.MODERATION)
                tokens = sum(codec.tokens_in(told.usage))
                found += aside.verdict(told.body)
            except GatewayError as error:
                found.append(aside.unknown(error))
            facts.attempts, facts.provider_s = own.attempts, own.provider_s
            facts.cost_nano = codec.costs_of(facts.cost_nano, own.cost_nano)
            request.tried = asked.tried
            self._use(request, Amount(asked.used.tokens + tokens, own.cost_nano or 0))
        return found

    async def _repair(self, request: _Request) -> Answer | None:
        """Another answer in place of one that is not valid, None if that is none either.

        It is a call like any other: limits must let it through, and it is paid for.
        """
        if request.invalid is None:
            return None
        (body, problems), request.invalid = request.invalid, None
        call, facts, limits = request.call, request.facts, request.limits
        asking = aside.repair(call.body, body, problems)
        if asking is None:
            return None
        again = replace(call, body=asking)
        own = replace(facts, warnings=[])
        asked = replace(request, call=again, facts=own, hold=None, used=NOTHING_USED)
        try:
            if request.ticket is not None:
                self._settle(request)  # what the first answer left of its reservation may be needed
                if asked.bound is not None and limits is not None:
                    asked.bound = await self._system.bounds.of(again, request.group, limits)
                held = await self._hold(asked, 0.0)
                if isinstance(held, Refusal):
                    return None
                asked.hold = held
            answer = await self._attempts(asked, self._plan(asked), [])
        except (GatewayError, OwnerUnavailable):
            return None
        finally:
            self._settle(asked)
            facts.attempts, facts.provider_s = own.attempts, own.provider_s
            facts.cost_nano = own.cost_nano
            request.tried = asked.tried
        request.answer = answer
        facts.deployment, facts.fallbacks = own.deployment, own.fallbacks
        facts.warnings += [*own.warnings, aside.note(problems)]
        request.doubted = bool(own.warnings)
        return answer

    def _judge_stream(self, request: _Request, answer: Answer, lead: Lead | None) -> bool:
        """Judge a stream that has been handed on, and settle it. Whether it may be stored now.

        Where a moderation's model is to be asked, a task does the rest, and stores it if it may be.
        """
        system, call = self._system, request.call
        if not system.config.gateway.enable_validation:
            self._settle(request)
            return True
        judgement = system.validation.validate(answer.body, call.body)
        request.doubted = bool(judgement.findings)
        if self._moderates and not judgement.fatal:
            later = None
            if lead is not None and (ttl_s := self._ttl_s(request)) is not None:
                later = system.cache.alone(lead.key, lead.scope), ttl_s
            if system.cache.carry(self._moderate_stream(request, answer, judgement, later)):
                return False
            judgement = judgement.and_also([aside.UNASKED])
            request.doubted = True
        self._settle(request)
        self._tell(request, answer, judgement)
        return True

    async def _moderate_stream(
        self,
        request: _Request,
        answer: Answer,
        judgement: Judgement,
        later: tuple[Lead, float] | None,
    ) -> None:
        """The end of a stream's judgement; `later` says where, and for how many seconds, it is to
        be stored. It has a deadline of its own, and its own client waits for none of it."""
        system = self._system
        request.deadline_s = system.clock() + system.config.gateway.timeout
        try:
            found = await self._moderate(request, answer)
        finally:
            self._settle(request)
        judgement = judgement.and_also(found)
        self._tell(request, answer, judgement)
        if later is None or judgement.findings or not self._is_good(request, answer):
            return
        lead, ttl_s = later
        answer.moderated = True
        system.cache.land(lead, codec.pack(answer), None, ttl_s)

    def _tell(self, request: _Request, answer: Answer, judgement: Judgement) -> None:
        call = request.call
        self._system.validation.tell(
            judgement, answer.body, tenant=call.tenant, request_id=call.request_id
        )

    def _is_moderated(self, found: Joined) -> bool:
        """Whether somebody else's answer has been called safe, where it has to be."""
        return not self._moderates or codec.unpack(found.value).moderated

    @property
    def _moderates(self) -> bool:
        gateway = self._system.config.gateway
        return gateway.enable_validation and gateway.validation.moderation_model is not None

    # 8 -------------------------------------------------------------------------------- keep

    def _keep(self, request: _Request, answer: Answer) -> tuple[bytes, float | None]:
        """The answer as bytes for those who wait, and for how long to store it, if at all."""
        answer.clamped = request.facts.clamped
        ttl_s = self._ttl_s(request)
        if ttl_s is not None and (request.doubted or not self._is_good(request, answer)):
            ttl_s = None
        return codec.pack(answer), ttl_s

    def _is_good(self, request: _Request, answer: Answer) -> bool:
        """Whether an answer is worth keeping: whole, and valid even where nobody validates."""
        call, gateway = request.call, self._system.config.gateway
        if not _is_whole(answer, call.body):
            return False
        return gateway.enable_validation or not any(validation.findings(answer.body, call.body))

    def _ttl_s(self, request: _Request) -> float | None:
        """For how long a good answer to this request is stored, None where it is not."""
        config = self._system.config.gateway
        call = request.call
        if not (config.enable_caching and call.cache_write):
            return None
        if not (schemas.understands(call.route, call.body) and _is_own(request)):
            return None
        return call.cache_ttl_s or float(config.cache_ttl_s)

    # 9 ------------------------------------------------------------------------------ settle

    def _settle(self, request: _Request | None) -> None:
        if request is not None and request.hold is not None:
            self._system.limiter.settle(request.hold, request.used)
            request.hold = None
            request.used = NOTHING_USED

    def _learn(self, request: _Request, answer: Answer) -> None:
        """An answer was paid for: so much of the reservation is used."""
        request.answer = answer
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
        system.books.end_call(call, None if request is None else request.facts, status)
        if request is None:
            system.meter.request(call.route, UNKNOWN, call.tenant, status, 0.0, 0.0)
            if system.tells(status):
                now = system.clock()
                system.tell(Ended(call, status, UNKNOWN, UNKNOWN, False, now, now))
            return
        facts = request.facts
        facts.total_s = system.clock() - request.started_s
        pattern = request.group.pattern  # a wildcard's filled-in name would be the client's choice
        system.meter.request(
            call.route, pattern, call.tenant, status, facts.total_s, facts.provider_s
        )
        if system.tells(status):
            system.tell(self._ended(request, call, status))

    def _ended(self, request: _Request, call: Call, status: str) -> Ended:
        facts, group = request.facts, request.group
        last = [d for d in group.deployments if d.id == facts.deployment] or group.deployments
        provider = request.tried[-1].deployment.provider if request.tried else last[0].provider
        return Ended(
            call,
            status,
            group.pattern,
            provider,
            request.streams,
            request.started_s,
            request.started_s + facts.total_s,
            facts,
            request.answer,
            request.tried,
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


def _late(deployment: Deployment, words: str) -> GatewayTimeout:
    return GatewayTimeout(
        f"the answer {words}", model=deployment.group, provider=deployment.provider
    )


def _told_to_others(request: _Request, error: BaseException | None) -> bytes | None:
    """What those hear who wait for a call that failed; None: one of them tries.

    What is our client's own is no news for them: limits that refuse it, a deadline shorter than
    theirs, its leaving; nor is what this process has no room for.
    """
    if not (isinstance(error, GatewayError) and request.reserved) or isinstance(error, Overloaded):
        return None
    is_late = request.own_deadline and isinstance(error, GatewayTimeout)
    return None if is_late else codec.pack_error(error)


def _meaning(group: Group) -> str:
    """What a model's name stands for: another configuration may mean something else by it."""
    return " ".join(deployment.meaning for deployment in group.deployments)


def _is_own(request: _Request) -> bool:
    """Whether the last attempt was at the model that was asked for, and not at a fallback."""
    told = request.facts.deployment
    return any(deployment.id == told for deployment in request.group.deployments)


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


def _is_whole(answer: Answer, asked: Mapping[str, Any]) -> bool:
    """Whether every choice that was asked for is there and came to its own end.

    Reasons that OpenAI does not know are providers' words for what went wrong.
    """
    prompts = asked.get("prompt")
    many = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    count = (asked.get("n") or 1) * (len(prompts) if many and prompts else 1)
    ends = [choice.get("finish_reason") for choice in answer.body.get("choices") or ()]
    return len(ends) >= count and all(end in OWN_ENDS for end in ends)


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
