"""The retries of this process: asking for them together, and what to do with the owner away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from actors.circuit_breaker.policy import Rules
from actors.circuit_breaker.retry_budget import RetryBudget
from actors.ref import Clock, OwnerRef, OwnerUnavailable

ASK_S = 1.0  # how long a caller waits for leave to retry
AWAY_S = 1.0  # after an asking that was not answered, how long the owner counts as away
WAITING_MAX = 10_000  # callers that wait for an answer; one more is refused
BUDGETS_MAX = 10_000  # deployments that earn here; what one more earns is lost

_Waiters = dict[str, list[asyncio.Future[bool]]]  # by deployment


class Retries:
    """Whether a failed call may be tried again, so that the cluster's budgets hold.

    Owns: those who wait, the one message under way that asks for all of them, and what calls
    earned here while the owner was away.
    Bounds: `WAITING_MAX` and `BUDGETS_MAX`.
    Failure behaviour: with the owner away there are as many retries as this process has earned
    by calls that the owner will not let earn again: a share of the calls, without the steady
    part, so that many processes alone spend no more than all of them together. A grant whose
    answer is lost is spent for nothing. What the owner raises is raised by `may`.
    """

    def __init__(
        self, ref: OwnerRef, holder: str, clock: Clock, connected: Callable[[], bool]
    ) -> None:
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._connected = connected
        self._rules = _alone(Rules())
        self._waiting: _Waiters = {}
        self._asked: _Waiters = {}
        self._waiters = 0
        self._number = 0
        self._asking: asyncio.Task[None] | None = None
        self._silent_until = float("-inf")
        self._earned: dict[str, RetryBudget] = {}

    def alone_at(self, now: float) -> bool:
        """Whether the owner is away, so that calls earn here and retries are spent from here."""
        return now < self._silent_until or not self._connected()

    def earn(self, deployment: str) -> None:
        """A call was made that the owner will not let earn."""
        budget = self._earned.get(deployment)
        if budget is None:
            if len(self._earned) >= BUDGETS_MAX:
                return
            budget = self._earned[deployment] = RetryBudget()
        budget.earn(1, self._rules, self._clock())

    async def may(self, deployment: str) -> bool:
        """Leave for one retry; with the owner away the answer comes at once."""
        if self.alone_at(self._clock()):
            return self._take(deployment, 1) == 1
        if self._waiters >= WAITING_MAX:
            return False
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(deployment, []).append(waiter)
        self._waiters += 1
        if self._asking is None:
            self._begin()
        try:
            return await waiter
        finally:
            self._waiters -= 1

    def learn(self, rules: Rules) -> None:
        """With the owner away, let calls earn what `rules` say."""
        self._rules = _alone(rules)

    async def close(self) -> None:
        """Refuse whoever waits."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    def _begin(self) -> None:
        self._asking = asyncio.create_task(self._ask(), name="circuit breaker retries")
        self._asking.add_done_callback(self._over)

    async def _ask(self) -> None:
        """Ask for all who wait now; those who come meanwhile are asked for when it is over."""
        self._asked, self._waiting = self._waiting, {}
        granted = await self._granted(
            {name: len(_still(waiters)) for name, waiters in self._asked.items()}
        )
        for name, waiters in self._asked.items():
            left = granted.get(name, 0)
            for waiter in _still(waiters):
                waiter.set_result(left > 0)
                left -= 1

    def _over(self, asking: asyncio.Task[None]) -> None:
        self._asking = None
        failed = list(self._asked.values())
        self._asked = {}
        if asking.cancelled():  # the desk is closing
            failed += self._waiting.values()
            self._waiting = {}
        error = None if asking.cancelled() else asking.exception()
        for waiter in _still(*failed):
            if error is None:
                waiter.set_result(False)
            else:
                waiter.set_exception(error)
        if self._waiting:
            self._begin()

    async def _granted(self, wanted: dict[str, int]) -> dict[str, int]:
        self._number += 1
        try:
            granted: dict[str, int] = await self._ref.ask(
                "retry", self._holder, self._number, wanted, timeout_s=ASK_S
            )
        except OwnerUnavailable:
            self._silent_until = self._clock() + AWAY_S
            return {name: self._take(name, count) for name, count in wanted.items()}
        return granted

    def _take(self, deployment: str, wanted: int) -> int:
        budget = self._earned.get(deployment)
        return 0 if budget is None else budget.take(wanted, self._rules, self._clock())


def _alone(rules: Rules) -> Rules:
    # The steady part is the owner's to give: each process has none of its own.
    return replace(rules, retries_per_s=0.0)


def _still(*lists: list[asyncio.Future[bool]]) -> list[asyncio.Future[bool]]:
    """Those who still wait, the longest waiting first."""
    return [waiter for waiters in lists for waiter in waiters if not waiter.done()]
