"""Step 7: whether an answer is valid and safe, and a better one where it is not.

Rule 1: what the rules are stands in `validation.py`; whom to ask beside them, and when, here.
Rule 2: a question of ours is a call like any other: the ledger has it, and the tenant pays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from actors.cache.desk import Joined, Lead
from actors.rate_limiter.terms import NOTHING_USED, Amount, Refusal
from actors.ref import OwnerUnavailable
from forebay import codec
from forebay.checks import aside
from forebay.checks.finding import Finding
from forebay.checks.shape import texts_of
from forebay.codec import Answer
from forebay.errors import GatewayError
from forebay.keeping import Keeper
from forebay.request import Request
from forebay.reserving import Reservations
from forebay.trying import Attempts

if TYPE_CHECKING:
    from forebay.system import System
    from forebay.validation import Judgement


class Reviewer:
    """Has answers judged, by rules and by a moderation's model, and asks for better ones.

    Bounded by one repair for a request, one question for each choice of an answer, and the cache
    desk's CARRIED_MAX streams whose moderation is under way.

    Failure behaviour: a moderation that cannot be asked is a finding; a repair that fails leaves
    the first answer's error as it was.
    """

    def __init__(
        self, system: System, reservations: Reservations, attempts: Attempts, keeper: Keeper
    ) -> None:
        self._system = system
        self._reservations = reservations
        self._attempts = attempts
        self._keeper = keeper

    def validate(self, request: Request, answer: Answer) -> list[str]:
        """What all rules that need nobody else say. Raises ResponseValidationError by the level."""
        call = request.call
        if not self._system.config.gateway.enable_validation or call.route == "embedding":
            return []
        judgement = self._system.validation.judge(
            answer.body, call.body, tenant=call.tenant, request_id=call.request_id
        )
        return judgement.require(answer.body.get("model"))

    async def validate_whole(self, request: Request, answer: Answer) -> list[str]:
        """As `validate`, the moderation's model included. What can be repaired is noted."""
        call, gateway = request.call, self._system.config.gateway
        if not gateway.enable_validation or call.route == "embedding":
            return []
        wishes = gateway.validation
        judgement = self._system.validation.validate(answer.body, call.body)
        if wishes.moderation_model is not None and not judgement.fatal:
            found = await self._moderate(request, answer)
            judgement = judgement.and_also(found)
            answer.moderated = not found
        self._tell(request, answer, judgement)
        if judgement.findings and wishes.repair and judgement.repairable:
            request.invalid = answer.body, judgement.fatal
        return judgement.require(answer.body.get("model"))

    async def repair(self, request: Request) -> Answer | None:
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
                # What the first answer left of its reservation may be needed.
                self._reservations.settle(request)
                if asked.bound is not None and limits is not None:
                    asked.bound = await self._system.bounds.of(again, request.group, limits)
                held = await self._reservations.hold(asked, 0.0)
                if isinstance(held, Refusal):
                    return None
                asked.hold = held
            plan = self._attempts.plan(asked)
            answer = await self._attempts.answer(asked, plan, [], validate=self.validate_whole)
        except (GatewayError, OwnerUnavailable):
            return None
        finally:
            self._reservations.settle(asked)
            facts.attempts, facts.provider_s = own.attempts, own.provider_s
            facts.cost_nano = own.cost_nano
            request.tried = asked.tried
        request.answer = answer
        facts.deployment, facts.fallbacks = own.deployment, own.fallbacks
        facts.warnings += [*own.warnings, aside.note(problems)]
        request.doubted = bool(own.warnings)
        return answer

    def judge_stream(self, request: Request, answer: Answer, lead: Lead | None) -> bool:
        """Judge a stream that has been handed on, and settle it. Whether it may be stored now.

        Where a moderation's model is to be asked, a task does the rest, and stores it if it may be.
        """
        system, call = self._system, request.call
        if not system.config.gateway.enable_validation:
            self._reservations.settle(request)
            return True
        judgement = system.validation.validate(answer.body, call.body)
        request.doubted = bool(judgement.findings)
        if self._moderates and not judgement.fatal:
            later = None
            if lead is not None and (ttl_s := self._keeper.ttl_s(request)) is not None:
                later = system.cache.alone(lead.key, lead.scope), ttl_s
            if system.cache.carry(self._moderate_stream(request, answer, judgement, later)):
                return False
            judgement = judgement.and_also([aside.UNASKED])
            request.doubted = True
        self._reservations.settle(request)
        self._tell(request, answer, judgement)
        return True

    def is_moderated(self, found: Joined) -> bool:
        """Whether somebody else's answer has been called safe, where it has to be."""
        return not self._moderates or codec.unpack(found.value).moderated

    async def _moderate(self, request: Request, answer: Answer) -> list[Finding]:
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
                plan = self._attempts.plan(asked)
                told = await self._attempts.answer(asked, plan, [], note=aside.MODERATION)
                tokens = sum(codec.tokens_in(told.usage))
                found += aside.verdict(told.body)
            except GatewayError as error:
                found.append(aside.unknown(error))
            facts.attempts, facts.provider_s = own.attempts, own.provider_s
            facts.cost_nano = codec.costs_of(facts.cost_nano, own.cost_nano)
            request.tried = asked.tried
            request.use(Amount(asked.used.tokens + tokens, own.cost_nano or 0))
        return found

    async def _moderate_stream(
        self,
        request: Request,
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
            self._reservations.settle(request)
        judgement = judgement.and_also(found)
        self._tell(request, answer, judgement)
        if later is None or judgement.findings or not self._keeper.is_good(request, answer):
            return
        lead, ttl_s = later
        answer.moderated = True
        system.cache.land(lead, codec.pack(answer), None, ttl_s)

    def _tell(self, request: Request, answer: Answer, judgement: Judgement) -> None:
        call = request.call
        self._system.validation.tell(
            judgement, answer.body, tenant=call.tenant, request_id=call.request_id
        )

    @property
    def _moderates(self) -> bool:
        gateway = self._system.config.gateway
        return gateway.enable_validation and gateway.validation.moderation_model is not None
