"""Step 6: what breaker, quota and router learn of an attempt.

Rule 1: an attempt that was begun is judged once, whatever comes of it.
Rule 2: what is ours, or our client's own, is no news of a deployment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actors.circuit_breaker.policy import ANSWERED, IGNORED, SLOW, SUCCESS, Verdict
from actors.rate_limiter.terms import Amount
from forebay import codec
from forebay.ended import Tried
from forebay.errors import GatewayError
from forebay.request import Attempt, Request

if TYPE_CHECKING:
    from forebay.system import System

NAMES = {verdict: verdict.value for verdict in Verdict}
"""What verdicts are called among the counts."""


class Judge:
    """Tells all who learn of a deployment how a call of it went; holds nothing, asks nobody.

    Failure behaviour: none of its own. What is told waits in the desks, and fails open with them.
    """

    def __init__(self, system: System) -> None:
        self._system = system

    def begin(self, attempt: Attempt) -> None:
        """The provider is called now; one `judge` or `end` follows."""
        attempt.begun_s = attempt.asked_s = self._system.clock()
        self._system.router.began(attempt.deployment)

    def end(self, attempt: Attempt, verdict: Verdict) -> None:
        """Tell the router how long it took, where that says something of the deployment."""
        took_s = attempt.took_s
        if took_s is None:
            took_s = self._system.clock() - attempt.begun_s
        told_s = None if verdict is IGNORED else took_s
        self._system.router.ended(attempt.deployment, told_s, verdict in ANSWERED)

    def judge(
        self,
        request: Request,
        attempt: Attempt,
        error: GatewayError | None,
        *,
        ignored: bool = False,
        usage: Mapping[str, Any] | None = None,
    ) -> Verdict:
        """Tell breaker, quota and router what came of an attempt; for embeddings the router only.

        The Batcher tells the other two, once for each provider call, whoever shares it.
        """
        system, deployment = self._system, attempt.deployment
        if ignored:
            verdict = IGNORED
        elif error is None:
            verdict = SLOW if attempt.slow else SUCCESS
        else:
            verdict = self._verdict(request, attempt, error)
        self.end(attempt, verdict)
        system.meter.provider_call(deployment.circuit, NAMES[verdict])
        if system.telemetry is not None:
            request.tried += (self._tried(attempt, verdict, error),)
        system.kv_cache.learn(request.call.tenant, deployment, usage)
        if attempt.quota is not None:
            prompt, completion = codec.tokens_in(usage)
            system.limiter.settle(attempt.quota, Amount(prompt + completion))
        if attempt.admitted is not None:
            retry_after_s = None if error is None else error.retry_after_s
            system.breaker.judge(attempt.admitted, verdict, retry_after_s)
        return verdict

    def slow_s(self) -> float:
        """How long a stream's next chunk may keep us waiting and not be called slow."""
        told = self._system.config.gateway.circuit_breaker_config
        return math.inf if told is None else told.slow_call_s or math.inf

    def notice_slow(self, attempt: Attempt) -> None:
        """A chunk took too long; that is the provider's doing, unless this process stood still."""
        if not self._system.stalls.is_to_blame(attempt.asked_s):
            attempt.slow = True

    def _verdict(self, request: Request, attempt: Attempt, error: GatewayError) -> Verdict:
        """What a failure says of the deployment: its own fault, or nobody's."""
        system = self._system
        given_s = request.deadline_s - attempt.begun_s
        fair = system.is_patient(given_s) and not request.own_deadline
        if attempt.took_s is not None:
            # A stream that was still speaking when its time was up has done nothing wrong.
            fair &= system.clock() - attempt.asked_s > given_s / 2
        return system.verdict(error, attempt.asked_s, request.deadline_s, fair=fair)

    def _tried(self, attempt: Attempt, verdict: Verdict, error: GatewayError | None) -> Tried:
        return Tried(
            attempt.deployment,
            attempt.begun_s,
            self._system.clock(),
            attempt.took_s,
            verdict.value,
            None if error is None else type(error).__name__,
        )
