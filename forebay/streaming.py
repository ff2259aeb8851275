"""Steps 5 to 9 for streams: one is opened, handed to its relay, and settled when it is over.

Rule 1: until the first chunk is there another deployment may take over; afterwards none does.
Rule 2: a stream is judged, paid for and kept at its end, which may come after its client has gone.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.cache.desk import Lead
from actors.circuit_breaker.policy import Verdict
from actors.ledger.desk import OpenEntry
from forebay import codec
from forebay.call import Stream
from forebay.calling import Calls
from forebay.errors import GatewayError, GatewayTimeout, ProviderError
from forebay.finishing import finish
from forebay.judging import Judge
from forebay.keeping import Keeper
from forebay.providers.base import Chunks
from forebay.relaying import Ending, Relay
from forebay.request import Attempt, Flow, Request
from forebay.reserving import Reservations
from forebay.reviewing import Reviewer
from forebay.routing import Deployment
from forebay.tally import StreamTally
from forebay.trying import Attempts

if TYPE_CHECKING:
    from forebay.system import System


class Streams:
    """Opens streams and settles them; between the two a stream is its relay's.

    Bounded as attempts and relays are. Failure behaviour: nothing stays open: whatever goes wrong
    at a stream's end, its entry is closed, its reservation settled, and its followers told.
    """

    def __init__(
        self,
        system: System,
        *,
        reservations: Reservations,
        attempts: Attempts,
        calls: Calls,
        judge: Judge,
        reviewer: Reviewer,
        keeper: Keeper,
    ) -> None:
        self._system = system
        self._reservations = reservations
        self._attempts = attempts
        self._calls = calls
        self._judge = judge
        self._reviewer = reviewer
        self._keeper = keeper

    async def open(self, request: Request, lead: Lead | None) -> Stream:
        """Attempts as planned, until one gives a first chunk.

        A stream that others may come to follow has their time, and its own client's only while that
        is all that waits for it.

        Raises:
            GatewayError: what the last attempt failed with.
        """
        plan = self._attempts.plan(request)
        outlives = request.own_deadline and lead is not None and lead.flight is not None
        while True:
            attempt = await self._attempts.next(request, plan)
            system, facts = self._system, request.facts
            entry = await self._attempts.open_entry(request, attempt, stream=True)
            self._judge.begin(attempt)
            try:
                chunks = self._calls.stream(request, attempt, outlives)
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
                verdict = self._judge.judge(request, attempt, error)
                await chunks.aclose()
                plan.failed(attempt.deployment, error, verdict)
                continue
            except BaseException:
                self._abandon(request, attempt, entry)
                await chunks.aclose()
                raise
            attempt.took_s = system.clock() - attempt.begun_s
            facts.provider_s += attempt.took_s
            if attempt.took_s > self._judge.slow_s():
                self._judge.notice_slow(attempt)
            if attempt.admitted is not None:
                begun = Verdict.SLOW if attempt.slow else Verdict.SUCCESS
                attempt.admitted = system.breaker.begun(attempt.admitted, begun)
            system.meter.first_token(system.clock() - request.started_s)
            facts.total_s = system.clock() - request.started_s
            tally = StreamTally(request.call.route)
            flow = Flow(request, attempt, entry, lead, tally, system.clock())
            relay = Relay(
                chunks,
                tally,
                attempt,
                lead=lead,
                cache=system.cache,
                clock=system.clock,
                left_s=request.left_s(system.clock),
                timeout_s=request.deadline_s - request.started_s,
                outlives=outlives,
                slow_s=self._judge.slow_s(),
                late=partial(_late, attempt.deployment),
                notice_slow=partial(self._judge.notice_slow, attempt),
                settle=partial(self._settle, flow),
                finish=partial(self._finish, flow),
            )
            own = relay.own(first)
            # Into its `try`, so that closing or dropping it settles even if nobody takes a chunk.
            await anext(own)
            return Stream(own, facts)

    def _abandon(self, request: Request, attempt: Attempt, entry: OpenEntry | None) -> None:
        """The caller went away, or we failed ourselves: nothing is known of the deployment."""
        self._system.books.void_call(entry, None)
        self._judge.judge(request, attempt, None, ignored=True)

    async def _first_of(self, request: Request, chunks: Chunks, outlives: bool) -> dict[str, Any]:
        """A stream's first chunk, within its own client's time."""
        if not outlives:
            return await anext(chunks)
        try:
            async with asyncio.timeout(request.left_s(self._system.clock)):
                return await anext(chunks)
        except TimeoutError as error:
            if isinstance(error, GatewayError):
                raise
            timeout_s = request.deadline_s - request.started_s
            raise GatewayTimeout(
                f"no answer within {timeout_s:g} s", model=request.facts.group
            ) from None

    def _settle(self, flow: Flow, ending: Ending) -> None:
        """A stream is over. Whatever goes wrong here, nothing stays open."""
        try:
            self._end(flow, ending)
        except BaseException:
            self._system.books.void_call(flow.entry, None)
            self._reservations.settle(flow.request)
            if flow.lead is not None:
                self._system.cache.land(flow.lead, None)
            raise

    def _end(self, flow: Flow, ending: Ending) -> None:
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
        self._judge.judge(request, attempt, ending.error, ignored=ending.own, usage=answer.usage)
        system.books.post_call(flow.entry, answer, ending.error)
        self._reservations.learn(request, answer)
        system.meter.usage(*codec.tokens_in(answer.usage), answer.cost_nano)
        landed, told, ttl_s = None, None, None
        if ending.status != "ok":
            self._reservations.settle(request)
            if ending.error is not None and not ending.own:
                told = codec.pack_error(ending.error)
        else:
            stored = self._reviewer.judge_stream(request, answer, lead)
            if lead is not None:
                landed, ttl_s = self._keeper.keep(request, answer)
                ttl_s = ttl_s if stored else None
        if lead is not None:
            system.cache.land(lead, landed, told, ttl_s)

    def _finish(self, flow: Flow, status: str) -> None:
        """Its own client is done with; the stream may go on for others."""
        self._note_time(flow)
        finish(self._system, flow.request.call, flow.request, status)

    def _note_time(self, flow: Flow) -> None:
        if flow.begun_s is not None:
            flow.request.facts.provider_s += self._system.clock() - flow.begun_s
            flow.begun_s = None


def _late(deployment: Deployment, words: str) -> GatewayTimeout:
    return GatewayTimeout(
        f"the answer {words}", model=deployment.group, provider=deployment.provider
    )


def _stream_failure(failure: BaseException, deployment: Deployment) -> GatewayError:
    """The failure of a stream that has given nothing, as an error of ours."""
    if isinstance(failure, GatewayError):
        return failure
    return ProviderError(
        "the provider ended the stream before its first chunk",
        model=deployment.group,
        provider=deployment.provider,
    )
