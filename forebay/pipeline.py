"""The way of a request: nine steps, in this order and nowhere else.

    1 check      request.py     shape, parameters, model known, tenant may use it
    2 count      reserving.py   the request itself; a refusal says when to come back
    3 look up    sharing.py     somebody has the answer, or is getting it, or we lead
    4 reserve    reserving.py   slot, tokens, money, all or nothing
                 trying.py      choose deployments; an entry per attempt
    5 call       calling.py     the provider, within the deadline
                 trying.py      retries and fallbacks as planned
    6 judge      judging.py     what the breaker learns from the outcome
    7 validate   reviewing.py   the answer, by the configured level
    8 keep       keeping.py     whole, valid answers only
    9 settle     reserving.py   reservation and ledger, whatever happened

Rule 1: this file orders the steps; what each one decides is in its own room. For a stream, 5 to 9
        are its own: see `streaming.py`.
Rule 2: no step leaves the process unless its desk has run dry.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from actors.cache.desk import FlightFailed, Lead
from forebay import codec
from forebay.call import Call, Result, Stream
from forebay.calling import Calls
from forebay.codec import Answer
from forebay.errors import GatewayError
from forebay.finishing import finish
from forebay.judging import Judge
from forebay.keeping import Keeper, told_to_others
from forebay.relaying import replayed
from forebay.request import Request, check
from forebay.reserving import Reservations
from forebay.reviewing import Reviewer
from forebay.routing import Deployment
from forebay.sharing import Sharing
from forebay.streaming import Streams
from forebay.texts import Texts, inputs_of
from forebay.trying import Attempts

if TYPE_CHECKING:
    from forebay.once import Turn
    from forebay.system import System


class Pipeline:
    """Runs requests, wherever the caller is, over the desks of this process.

    Failure behaviour: money and limits fail closed (a short wait, then `Overloaded`), breaker and
    cache fail open; a full ledger buffer refuses new paid calls. Cancelling a call settles it.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self._reservations = Reservations(system)
        self._keeper = Keeper(system)
        judge, calls = Judge(system), Calls(system)
        self._attempts = Attempts(system, self._reservations, judge, calls)
        self._reviewer = Reviewer(system, self._reservations, self._attempts, self._keeper)
        self._sharing = Sharing(system, self._reservations, self._reviewer)
        self._streams = Streams(
            system,
            reservations=self._reservations,
            attempts=self._attempts,
            calls=calls,
            judge=judge,
            reviewer=self._reviewer,
            keeper=self._keeper,
        )

    def at_once(self, call: Call) -> Result | None:
        """The stored answer to a request, where neither it nor a permit has to be waited for.

        None, and nothing was done, where `answer` is to be asked: it also says what is wrong.
        """
        system = self._system
        read = system.config.gateway.enable_caching and call.cache_read
        if not read or call.idempotency_key is not None or call.route == "embedding":
            return None
        name = call.body.get("model") or system.table.default(call.route)
        if not isinstance(name, str):
            return None
        try:
            group = system.table.group(name)
            scope = self._sharing.scope(call)
            address = self._sharing.address(scope, call, group)
            hit = system.cache.near(address, scope)
            request = None if hit is None else check(system, call)
        except GatewayError:
            return None
        if hit is None or request is None:
            return None
        request.ticket = system.limiter.count_at_once(call.tenant, request.limits)
        if request.ticket is None:
            return None
        request.facts.cache_key = self._sharing.cache_key(address)
        answer = self._sharing.shared(request, hit)
        self._sharing.free(request)
        finish(system, call, request, "ok")
        return Result(answer, request.facts)

    async def answer(self, call: Call, turn: Turn | None = None) -> Result:
        """One request, one whole answer; what its key was answered before, where it has one.

        Raises:
            GatewayError: every failure, with its HTTP status and, where one is known, the time
            after which a retry can succeed.
        """
        if turn is None and call.idempotency_key is not None:
            return await self._system.once.answer(call, self.answer)
        request: Request | None = None
        status = "error"
        try:
            request = check(self._system, call)  # 1
            await self._reservations.count(request)  # 2
            before = None
            if turn is not None:
                before = await turn.take(partial(request.left_s, self._system.clock))
            if before is not None:
                answer = self._sharing.replay(request, before)
                self._sharing.free(request)
            elif call.route == "embedding":
                answer = await self._vectors(request)
            else:
                shares = self._sharing.is_on
                found = await self._sharing.look_up(request) if shares else None  # 3
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
            finish(self._system, call, request, status)

    async def stream(self, call: Call, turn: Turn | None = None) -> Stream:
        """One request, answered chunk by chunk; returns when the first chunk is there.

        Until then another deployment may take over; afterwards an error is raised from `chunks`
        and no second answer is ever begun.

        Raises:
            GatewayError: as `answer`.
        """
        if turn is None and call.idempotency_key is not None:
            return await self._system.once.stream(call, self.stream)
        request: Request | None = None
        try:
            request = check(self._system, call)  # 1
            request.streams = True
            await self._reservations.count(request)  # 2
            before = None
            if turn is not None:
                before = await turn.take(partial(request.left_s, self._system.clock))
            if before is not None:
                answer = self._sharing.replay(request, before)
                return await self._sharing.handed(request, replayed(call.route, answer))
            found = await self._sharing.look_up_stream(request)  # 3
            return found if isinstance(found, Stream) else await self._lead_stream(request, found)
        except BaseException as error:
            status = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
            if isinstance(error, GatewayError):
                status = str(error.status)
                error.facts = None if request is None else request.facts
            finish(self._system, call, request, status)
            raise

    def refused(self, call: Call, status: int) -> None:
        """A request was answered with `status` before it became a call: its `body` is empty."""
        finish(self._system, call, None, str(status))

    def key_of(self, call: Call) -> bytes:
        """What the answer to this call is stored under. Raises as `answer` does for a wrong one."""
        group = check(self._system, call).group
        return self._sharing.address(self._sharing.scope(call), call, group)

    async def _lead(self, request: Request, lead: Lead | None) -> Answer:
        """Get the answer ourselves, and let those who wait for it have it or the failure."""
        landed: bytes | None = None
        told: bytes | None = None
        ttl_s: float | None = None
        try:
            await self._reservations.reserve(request)  # 4
            lead = self._sharing.still_for_all(request, lead)
            answer = await self._call(request)  # 5 to 7
            if lead is not None:
                landed, ttl_s = self._keeper.keep(request, answer)  # 8
            return answer
        except GatewayError as error:
            told = told_to_others(request, error)
            raise
        finally:
            self._reservations.settle(request)  # 9
            if lead is not None:
                self._system.cache.land(lead, landed, told, ttl_s)

    async def _lead_stream(self, request: Request, lead: Lead | None) -> Stream:
        """Get the stream ourselves; once it has begun, its relay settles and lands it."""
        try:
            await self._reservations.reserve(request)  # 4
            lead = self._sharing.still_for_all(request, lead)
            return await self._streams.open(request, lead)  # 5 to 9
        except BaseException as error:
            self._reservations.settle(request)  # 9
            if lead is not None:
                self._system.cache.land(lead, None, told_to_others(request, error))
            raise

    async def _vectors(self, request: Request) -> Answer:
        """Texts are looked up one by one, and only those that nobody has or is getting are sent."""
        system, call, facts = self._system, request.call, request.facts
        given = inputs_of(call.body["input"])
        read, join = self._sharing.may_share_texts(call, len(given))
        if not (read or join):
            return await self._lead(request, None)
        texts = self._sharing.texts(request, given)
        try:
            await texts.look_up(read=read, join=join, patience_s=request.left_s(system.clock))
            while True:
                if texts.to_send:
                    await self._lead_texts(request, texts)
                elif texts.awaited:
                    asked_s, left_s = system.clock(), request.left_s(system.clock)
                    try:
                        await texts.wait(read=read, join=join, patience_s=left_s)
                    finally:
                        self._sharing.note_wait(request, asked_s)
                elif texts.even():
                    break
        except FlightFailed as failure:
            facts.cache = "miss" if texts.sent_any else "joined"
            raise codec.unpack_error(failure.error) from None
        facts.failed = texts.failed
        if texts.of_fallback:
            facts.fallbacks = max(1, facts.fallbacks)
        return self._sharing.shared_texts(request, texts)

    async def _lead_texts(self, request: Request, texts: Texts) -> None:
        """Get those of the texts that are ours to get, and hand them to whoever waits for them."""
        system, limits = self._system, request.limits
        request.facts.cache = "miss"
        request.call = replace(request.call, body={**request.call.body, "input": texts.to_send})
        error: GatewayError | None = None
        try:
            if request.bound is not None and limits is not None:
                request.bound = await system.bounds.of(request.call, request.group, limits)
            await self._reservations.reserve(request)  # 4
            answer = await self._call(request)  # 5 to 7
            ttl_s, failed = self._keeper.ttl_s(request), request.facts.failed
            texts.take(answer, ttl_s, own=request.is_own, failed=failed)
        except GatewayError as failure:
            error = failure
            raise
        finally:
            self._reservations.settle(request)  # 9
            texts.give_up(told_to_others(request, error), error)

    async def _call(self, request: Request) -> Answer:
        """Attempts as planned, until one gives a valid answer, or a better one is asked for.

        An answer that a filter kept back is better than none: it is paid for.
        """
        plan = self._attempts.plan(request)
        filtered: list[tuple[Deployment, Answer]] = []
        try:
            validate = self._reviewer.validate_whole
            return await self._attempts.answer(request, plan, filtered, validate=validate)
        except GatewayError:
            repaired = await self._reviewer.repair(request)
            if repaired is not None:
                return repaired
            if not filtered:
                raise
        deployment, answer = filtered[-1]
        request.facts.deployment = deployment.id
        request.facts.warnings += self._reviewer.validate(request, answer)
        request.doubted = True  # nobody else is to have it: next time another may be asked
        return answer
