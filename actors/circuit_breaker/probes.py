"""The probes of this process: asking for one, keeping its lease alive, letting it go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from actors.circuit_breaker.policy import Claim, Pass, Standing, State
from actors.ref import Clock, OwnerRef, OwnerUnavailable
from actors.watch import Sleep

ASK_S = 1.0  # how long a caller waits for leave to probe
PROBE_S_MAX = 330.0  # the longest call and a margin; a probe not judged by then is given up


@dataclass(slots=True)
class _Held:
    """A probe under way. `lease_until` is in the past where there is no lease."""

    given: Pass
    ends_at: float
    lease_until: float
    renewing: asyncio.Task[None] | None = None


class Probes:
    """Which deployments this process is probing.

    Owns: for each, the pass and the task that renews its lease three times in a lease life.
    Bounds: one probe for each deployment, and `PROBE_S_MAX` for each probe.
    Failure behaviour: a lease that cannot be renewed, or whose grant was not heard, ends by
    itself; the owner lends the next one, and what this probe reports is void. A lease is counted
    from when it was asked for, so it never seems longer here than it is at the owner.
    """

    def __init__(
        self, ref: OwnerRef, holder: str, clock: Clock, sleep: Sleep, new_id: Callable[[], str]
    ) -> None:
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._sleep = sleep
        self._new_id = new_id
        self._held: dict[str, _Held] = {}
        self._asking: set[str] = set()

    def busy(self, deployment: str) -> bool:
        """Whether a probe is under way here, or being asked for."""
        held = self._held.get(deployment)
        return deployment in self._asking or (held is not None and self._clock() < held.ends_at)

    def leased(self, deployment: str) -> bool:
        """Whether this process holds the live lease of the deployment's probe."""
        held = self._held.get(deployment)
        return held is not None and self._clock() < held.lease_until

    def id_of(self, deployment: str) -> str | None:
        """The id of the probe under way here."""
        held = self._held.get(deployment)
        return None if held is None else held.given.probe

    def names(self) -> list[str]:
        """The deployments being probed."""
        return sorted(self._held)

    async def ask(self, deployment: str, standing: Standing) -> Pass | Standing:
        """The probe, or how the deployment stands. Not to be called while it is `busy`.

        Raises:
            OwnerUnavailable: no answer within `ASK_S`.
        """
        self._asking.add(deployment)
        sent_at = self._clock()
        claim = Claim(deployment, standing)
        try:
            answer: Pass | Standing = await self._ref.ask(
                "probe", deployment, self._holder, self._new_id(), claim, timeout_s=ASK_S
            )
        finally:
            self._asking.discard(deployment)
        if not isinstance(answer, Pass):
            return answer
        if self._clock() - sent_at >= answer.lease_s:
            return standing  # it was so long under way that the lease is over
        held = _Held(answer, sent_at + PROBE_S_MAX, sent_at + answer.lease_s)
        self._held[deployment] = held
        held.renewing = asyncio.create_task(self._renew(held), name=f"probe {deployment}")
        return answer

    def take(self, given: Pass) -> None:
        """Begin a probe without a lease."""
        now = self._clock()
        self._held[given.deployment] = _Held(given, now + PROBE_S_MAX, now)

    def end(self, given: Pass) -> None:
        """The call is over. Nothing happens if it was no probe."""
        held = self._held.get(given.deployment)
        if held is not None and held.given == given:
            del self._held[given.deployment]
            if held.renewing is not None:
                held.renewing.cancel()

    async def close(self) -> None:
        """Leave all leases to their end."""
        tasks = [held.renewing for held in self._held.values() if held.renewing is not None]
        self._held.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _renew(self, held: _Held) -> None:
        given = held.given
        assert given.probe is not None
        standing = Standing(State.HALF_OPEN, given.generation)
        claim = Claim(given.deployment, standing, given.probe)
        try:
            while self._clock() < held.ends_at:
                await self._sleep(given.lease_s / 3)
                sent_at = self._clock()
                try:
                    kept = await self._ref.ask(
                        "renew", given.deployment, self._holder, given.probe, claim, timeout_s=ASK_S
                    )
                except OwnerUnavailable:
                    continue
                if not kept:
                    return
                held.lease_until = sent_at + given.lease_s
        finally:
            held.renewing = None
            if self._held.get(given.deployment) is held:
                del self._held[given.deployment]
