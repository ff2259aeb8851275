"""Probing on purpose: asking an open deployment for one token before a caller has to.

Rule 1: off unless `circuit_breaker_config.active_probe_s` says otherwise: a probe is paid for.
Rule 2: a probe is an ordinary call of the smallest kind. The breaker lends its lease, so that
        there is one in the whole cluster; the deployment's own limits hold; the ledger has it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.circuit_breaker.policy import Refusal as BreakerRefusal
from actors.circuit_breaker.policy import State, Verdict
from actors.ledger.desk import OpenEntry
from actors.rate_limiter.terms import Amount, Hold, Refusal
from actors.ref import OwnerUnavailable
from actors.watch import Sleep
from forebay.call import Call, Facts, Route
from forebay.codec import Answer, tokens_in
from forebay.config import GatewayConfig
from forebay.errors import GatewayError, Overloaded
from forebay.routing import Deployment

if TYPE_CHECKING:
    from forebay.system import System

PROBER = "forebay/prober"  # whom the ledger names as the tenant; no tenant can be called so
PROBES_MAX = 16  # under way in this process; the others are due in the next round, too
WORD = "ping"
SMALLEST: dict[Route, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": WORD}], "max_tokens": 1},
    "completion": {"prompt": WORD, "max_tokens": 1},
    "embedding": {"input": [WORD]},
}
UNSETTLED = (State.OPEN, State.HALF_OPEN)

log = logging.getLogger(__name__)


class Prober:
    """Owns the task that looks for due deployments every period, and the probes it has sent.

    Patterns are left to callers' requests, which know the name that the `*` stands for, and so are
    deployments that neither chat, complete nor embed.
    Bounds: PROBES_MAX probes here, one for each deployment in the cluster, one round a period.
    Failure behaviour: a probe that cannot be asked for, limited, booked or paid is not sent, and
    its lease goes back; the next round tries again. One that is cut off by `close` blames nobody.
    """

    def __init__(self, system: System, sleep: Sleep = asyncio.sleep) -> None:
        self._system = system
        self._sleep = sleep
        self._period_s: float | None = None
        self._rounds: asyncio.Task[None] | None = None
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._counts: Counter[str] = Counter()
        self._heeding = False

    async def start(self) -> None:
        """Probe from now on, as far and as long as the configuration in force says so."""
        if not self._heeding:
            self._heeding = True
            self._system.on_change(self._configured)

    async def close(self) -> None:
        """Send no more probes, and cut off those under way."""
        self._heeding = False
        tasks = list(self._under_way.values())
        if self._rounds is not None:
            tasks.append(self._rounds)
            self._rounds = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def round(self) -> None:
        """Send a probe to each deployment that is due."""
        for deployment in self._due():
            if len(self._under_way) >= PROBES_MAX:
                return
            name = deployment.circuit
            task = asyncio.get_running_loop().create_task(self._probe(deployment))
            self._under_way[name] = task
            task.add_done_callback(partial(self._ended, name))

    def stats(self) -> dict[str, Any]:
        return {"period_s": self._period_s, "under_way": len(self._under_way), **self._counts}

    # ---------------------------------------------------------------------------- when, which

    def _configured(self, system: System) -> None:
        period_s = _period_s(system.config.gateway)
        if not self._heeding or period_s == self._period_s:
            return
        if self._rounds is not None:
            self._rounds.cancel()
            self._rounds = None
        self._period_s = period_s
        if period_s is not None:
            self._rounds = asyncio.get_running_loop().create_task(self._repeat(period_s))

    async def _repeat(self, period_s: float) -> None:
        # Processes that start together do not all ask at the same moment.
        await self._sleep(self._system.rng.uniform(0.0, period_s))
        while True:
            self.round()
            await self._sleep(period_s)

    def _due(self) -> list[Deployment]:
        """Deployments whose breaker would lend a probe now, as far as this process knows."""
        due: dict[str, Deployment] = {}
        for deployment in self._system.table.deployments():
            name = deployment.circuit
            standing = self._system.breaker.standing(name)
            waits = standing.state in UNSETTLED and standing.callable
            if waits and name not in self._under_way and self._route(deployment) is not None:
                due.setdefault(name, deployment)
        return list(due.values())

    def _route(self, deployment: Deployment) -> Route | None:
        if "*" in deployment.group:
            return None
        mode = self._system.table.group(deployment.group).mode
        return next((route for route in SMALLEST if route == mode), None)

    # -------------------------------------------------------------------------------- a probe

    async def _probe(self, deployment: Deployment) -> None:
        system, route = self._system, self._route(deployment)
        assert route is not None, "only what can be probed is due"
        admitted = await system.breaker.admit(deployment.circuit)
        if isinstance(admitted, BreakerRefusal):
            self._counts["refused"] += 1
            return
        call = Call(route, SMALLEST[route], PROBER, request_id=f"probe_{uuid.uuid4().hex}")
        verdict, retry_after_s, used = Verdict.IGNORED, None, Amount()
        quota: Hold | Refusal | None = None
        try:
            quota = await self._quota(deployment, call)
            if isinstance(quota, Refusal):
                self._counts["limited"] += 1
                return
            facts = Facts(deployment.group, deployment.id, attempts=1)
            entry = await system.books.open_call(call, facts, deployment)
            begun_s, timeout_s = system.clock(), system.config.gateway.timeout
            came = await self._ask(deployment, call, entry, timeout_s)
            if isinstance(came, GatewayError):
                verdict = system.verdict(came, begun_s, begun_s + timeout_s, fair=True)
                retry_after_s = came.retry_after_s
            else:
                verdict, used = Verdict.SUCCESS, Amount(sum(tokens_in(came.usage)))
            self._counts[verdict.value] += 1
            system.meter.provider_call(deployment.circuit, verdict.value)
        except (Overloaded, OwnerUnavailable) as failure:
            self._counts["not_sent"] += 1
            log.info("%s was not probed: %s", deployment.circuit, failure)
        finally:
            if quota is not None and not isinstance(quota, Refusal):
                system.limiter.settle(quota, used)
            system.breaker.judge(admitted, verdict, retry_after_s)

    async def _quota(self, deployment: Deployment, call: Call) -> Hold | Refusal | None:
        quotas = self._system.quotas
        if call.route == "embedding":
            return await quotas.take_texts(deployment, [WORD])
        group = self._system.table.group(deployment.group)
        return await quotas.take_call(deployment, call, group, None)

    async def _ask(
        self, deployment: Deployment, call: Call, entry: OpenEntry | None, timeout_s: float
    ) -> Answer | GatewayError:
        """The provider's answer, or how it failed; either way the ledger has it."""
        books, meter = self._system.books, self._system.meter
        try:
            answer = await self._answer(deployment, call, timeout_s)
        except GatewayError as error:
            books.void_call(entry, error)
            return error
        except BaseException:
            books.void_call(entry, None)
            raise
        books.post_call(entry, answer)
        meter.usage(*tokens_in(answer.usage), answer.cost_nano)
        return answer

    async def _answer(self, deployment: Deployment, call: Call, timeout_s: float) -> Answer:
        system = self._system
        asked: dict[str, Any] = {"timeout_s": timeout_s, "resolve": system.resolve}
        if call.route == "chat":
            return await system.provider.chat(deployment, call.body, **asked)
        if call.route == "completion":
            return await system.provider.completion(deployment, call.body, **asked)
        found = await system.provider.embed(deployment, [WORD], {}, **asked)
        usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
        return Answer({}, usage, found.cost_nano, found.model, estimated=found.estimated)

    def _ended(self, name: str, done: asyncio.Task[None]) -> None:
        self._under_way.pop(name, None)
        error = None if done.cancelled() else done.exception()
        if error is not None:  # a bug: never silent, and the rounds go on
            self._counts["broken"] += 1
            log.error("probing %s broke off", name, exc_info=error)


def _period_s(gateway: GatewayConfig) -> float | None:
    told = gateway.circuit_breaker_config
    return told.active_probe_s if told is not None and gateway.enable_circuit_breaker else None
