"""Steps 4 and 5: attempts, one after the other, as their plan says, until one answers.

    leave       breaker and quota let it through; for texts the Batcher asks them
    entry       the ledger knows of it before its bytes leave
    call        the provider
    judge       whoever gave leave, and the router, learn what came of it
    post        whatever the answer is worth, it is paid for

Rule 1: which attempt is next, and after what pause, is decided in `attempts.py`.
Rule 2: what an attempt was given is given back if it is not made, and judged if it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from actors.circuit_breaker.policy import LETS_THROUGH, Verdict
from actors.circuit_breaker.policy import Refusal as BreakerRefusal
from actors.ledger.desk import OpenEntry
from actors.rate_limiter.terms import NOTHING_USED, Refusal
from actors.ref import OwnerUnavailable
from forebay import codec
from forebay.attempts import Plan, Try, pass_unasked, refused_by, why_of
from forebay.calling import Calls
from forebay.codec import Answer
from forebay.errors import DeploymentsBusy, GatewayError, GatewayTimeout, Overloaded
from forebay.judging import Judge
from forebay.request import Attempt, Request
from forebay.reserving import Reservations
from forebay.routing import Deployment

if TYPE_CHECKING:
    from forebay.system import System

Validate = Callable[[Request, Answer], Awaitable[list[str]]]
"""Gives an answer's warnings, or raises what is wrong with it."""


class Attempts:
    """Makes a request's attempts; owns each of them from its leave to its verdict.

    Bounded by the plan's retries, the cluster's retry budget, and the request's deadline.

    Failure behaviour: a breaker that cannot be asked lets calls through, limits that cannot be
    checked refuse them. An attempt that is cancelled blames nobody and leaves no entry open.
    """

    def __init__(
        self, system: System, reservations: Reservations, judge: Judge, calls: Calls
    ) -> None:
        self._system = system
        self._reservations = reservations
        self._judge = judge
        self._calls = calls

    def plan(self, request: Request) -> Plan:
        """What is to be tried for the request, by what is known now."""
        system = self._system
        config = system.config.gateway
        group = request.group.name
        request.prompt = prompt = system.kv_cache.read(request.call)
        # A job's vectors are all of one model: another's would be paid for and thrown away.
        alone = request.call.bulk and request.call.route == "embedding"
        return Plan(
            [group] if alone else [group, *system.table.fallbacks(group)],
            lambda name: system.order(name, prompt),
            max_retries=config.max_retries,
            retry_delay_s=config.retry_delay,
            rng=system.rng,
            special=(lambda kind, name: ()) if alone else system.table.special_fallbacks,
        )

    async def answer(
        self,
        request: Request,
        plan: Plan,
        filtered: list[tuple[Deployment, Answer]],
        *,
        validate: Validate | None = None,
        note: str | None = None,
    ) -> Answer:
        """Attempts as planned, until one answers, and the answer is valid.

        What a filter kept back on the way is added to `filtered`. `note` tells the ledger why the
        answer is not the request's own.

        Raises:
            GatewayError: the last failure, or what `validate` raises.
        """
        while True:
            attempt = await self.next(request, plan)
            system, facts = self._system, request.facts
            entry = await self.open_entry(request, attempt)
            self._judge.begin(attempt)
            try:
                answer = await self._calls.answer(request, attempt)
            except GatewayError as failure:
                error = system.kv_cache.blamed(request.prompt, attempt.deployment, failure)
                facts.provider_s += system.clock() - attempt.begun_s
                why = refused_by(error)
                paid = system.books.fail_call(entry, error, asked=why is None)
                request.use(paid)
                if why is None:
                    verdict = self._judge.judge(request, attempt, error)
                    plan.failed(attempt.deployment, error, verdict)
                    continue
                # The Batcher, which asks breaker, quota and budget for us, has made no call.
                self._judge.end(attempt, Verdict.IGNORED)
                if why == "spent":
                    plan.spent()
                else:
                    plan.refused(attempt.deployment, error.retry_after_s or 0.0, why)
                facts.attempts -= paid == NOTHING_USED
                facts.retries = plan.retries
                continue
            except BaseException:
                system.books.void_call(entry, None)
                self._judge.judge(request, attempt, None, ignored=True)
                raise
            attempt.took_s = system.clock() - attempt.begun_s
            facts.provider_s += attempt.took_s
            facts.cost_nano = codec.costs_of(facts.cost_nano, answer.cost_nano)
            self._judge.judge(request, attempt, None, usage=answer.usage)
            self._reservations.learn(request, answer)
            system.meter.usage(*codec.tokens_in(answer.usage), answer.cost_nano)
            broken: GatewayError | None = None
            try:
                if _is_filtered(answer) and plan.turn_aside("content_policy"):
                    filtered.append((attempt.deployment, answer))
                    continue
                warnings = [] if validate is None else await validate(request, answer)
            except GatewayError as error:
                broken = error
                raise
            finally:  # whatever it is worth, it is paid for
                system.books.post_call(entry, answer, broken, note)
            facts.warnings += warnings
            request.doubted = bool(warnings)
            return answer

    async def next(self, request: Request, plan: Plan) -> Attempt:
        """The next attempt that breaker and quota let through, after the pause it needs."""
        system, facts = self._system, request.facts
        begun_s = system.clock()
        while True:
            left_s = request.left_s(system.clock)
            try:
                planned = plan.next(left_s)
            except DeploymentsBusy as busy:
                again_s = system.clock() + (busy.retry_after_s or 0.0)
                # Another round is for those of whom nothing was asked: what failed has its retries.
                if facts.attempts or again_s >= self._calls.waits_until_s(request, begun_s):
                    raise
                asked_s = system.clock()
                await asyncio.sleep(again_s - asked_s)
                self._reservations.queued(asked_s)
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
            attempt = Attempt(planned.deployment, planned.is_retry)
            # The Batcher asks both for embeddings: once for each provider call, whoever shares it.
            free = request.call.route == "embedding" or self._may_at_once(attempt)
            if not (free or await self._may(request, plan, attempt)):
                continue
            facts.deployment = attempt.deployment.id
            facts.attempts += 1
            facts.retries, facts.fallbacks = plan.retries, plan.fallbacks
            return attempt

    async def open_entry(
        self, request: Request, attempt: Attempt, *, stream: bool = False
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

    async def _may_retry(self, request: Request, plan: Plan, planned: Try, left_s: float) -> bool:
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

    def _may_at_once(self, attempt: Attempt) -> bool:
        """Whether nobody has to be waited for. The breaker's leave is noted in any case; where it
        has none to give, or the deployment has limits of its own, `_may` has the rest to say."""
        system, deployment = self._system, attempt.deployment
        if system.config.gateway.enable_circuit_breaker:
            attempt.admitted = system.breaker.admit_at_once(deployment.circuit)
        else:
            attempt.admitted = pass_unasked(deployment)
        return attempt.admitted is not None and not system.quotas.limit(deployment)

    async def _may(self, request: Request, plan: Plan, attempt: Attempt) -> bool:
        """Whether breaker and quota let an attempt through. What they gave is noted in it."""
        system, deployment = self._system, attempt.deployment
        if attempt.admitted is None:
            answer = await system.breaker.admit(deployment.circuit)
            if isinstance(answer, BreakerRefusal):
                plan.refused(deployment, answer.retry_after_s, why_of(answer))
                return False
            attempt.admitted = answer
        if not system.quotas.limit(deployment):
            return True
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

    def _give_back(self, attempt: Attempt) -> None:
        """The attempt is not made after all."""
        if attempt.quota is not None:
            self._system.limiter.settle(attempt.quota, NOTHING_USED)
        if attempt.admitted is not None:
            self._system.breaker.judge(attempt.admitted, Verdict.IGNORED)


def _is_filtered(answer: Answer) -> bool:
    """Whether the provider's filter kept the answer back."""
    for choice in answer.body.get("choices") or ():
        if choice.get("finish_reason") == "content_filter":
            return True
    return False
