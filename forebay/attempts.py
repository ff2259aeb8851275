"""Which deployment is tried next, and after what pause: retries and fallbacks as a plan.

Rule 1: only decisions live here; the pipeline makes the calls and reports what came of them.
Rule 2: a retry goes to another deployment at once; back to the same one only after a pause with
        full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015), never sooner than the
        provider's Retry-After.
Rule 3: each group on the way (the one asked for, then its fallbacks) has its own `max_retries`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.circuit_breaker.policy import Verdict
from forebay.errors import CircuitBreakerOpenError, DeploymentsBusy, GatewayError
from forebay.routing import Deployment

PAUSE_MAX_S = 30.0


@dataclass(frozen=True, slots=True)
class Try:
    """One attempt to make: where, after how many seconds, and why it is not the first."""

    deployment: Deployment
    pause_s: float
    is_retry: bool
    is_fallback: bool


class Plan:
    """The attempts of one request, handed out one by one.

    `order(group)` gives a group's deployments in the order to try them, open breakers left out.
    """

    def __init__(
        self,
        groups: Sequence[str],
        order: Callable[[str], list[Deployment]],
        *,
        max_retries: int,
        retry_delay_s: float,
        rng: random.Random,
    ) -> None:
        self._groups = list(groups)
        self._order = order
        self._max_retries = max_retries
        self._retry_delay_s = retry_delay_s
        self._rng = rng
        self._group_index = -1
        self._deployments: list[Deployment] = []
        self._made = 0  # attempts made in this group
        self._tries: Counter[str] = Counter()  # and of each deployment
        self._earliest_s: dict[str, float] = {}  # deployment id → the pause its provider asked for
        self._refused: set[str] = set()  # not to be tried again for this request
        self._reopens_s: list[float] = []
        self._frees_s: list[float] = []
        self._last: GatewayError | None = None
        self.retries = 0
        self.fallbacks = 0

    def next(self, left_s: float = math.inf) -> Try:
        """The next attempt; never one whose pause would not fit into the `left_s` seconds left.

        Raises:
            GatewayError: what the last attempt failed with, when nothing is left to try;
            DeploymentsBusy, CircuitBreakerOpenError: when nothing could be tried at all.
        """
        while True:
            candidates = [d for d in self._deployments if d.id not in self._refused]
            if candidates and self._made <= self._max_retries:
                deployment = min(candidates, key=lambda d: self._tries[d.id])
                pause_s = self._pause_s(deployment)
                if pause_s == 0 or pause_s < left_s:
                    is_retry = self._made > 0
                    self._made += 1
                    self._tries[deployment.id] += 1
                    self.retries += is_retry
                    return Try(deployment, pause_s, is_retry, self._group_index > 0)
            if not self._next_group():
                raise self._failure()

    def failed(self, deployment: Deployment, error: GatewayError, verdict: Verdict) -> None:
        """Take note of a failed attempt.

        Raises:
            GatewayError: `error` itself, when no other deployment would do better.
        """
        self._last = error
        if verdict is Verdict.IGNORED:
            raise error
        if verdict is Verdict.CREDENTIAL:
            self._refused.add(deployment.id)
        if error.retry_after_s is not None:
            self._earliest_s[deployment.id] = error.retry_after_s

    def refused(self, deployment: Deployment, retry_after_s: float, *, busy: bool = False) -> None:
        """No attempt was made: the breaker let nothing through, or its own limits (`busy`)."""
        self._refused.add(deployment.id)
        (self._frees_s if busy else self._reopens_s).append(retry_after_s)
        self._made -= 1
        self.retries -= self._made > 0

    def again(self) -> None:
        """Begin anew with the first group: those that were busy may be free by now."""
        self._group_index = -1
        self._deployments = []
        self._refused.clear()
        self._frees_s.clear()
        self._reopens_s.clear()
        self.fallbacks = 0

    def _next_group(self) -> bool:
        self._group_index += 1
        if self._group_index >= len(self._groups):
            return False
        self._deployments = self._order(self._groups[self._group_index])
        self._made = 0
        self._tries.clear()
        self.fallbacks += self._group_index > 0
        return True

    def _pause_s(self, deployment: Deployment) -> float:
        tries = self._tries[deployment.id]
        if tries == 0:
            return 0.0
        ceiling_s = min(PAUSE_MAX_S, self._retry_delay_s * 2 ** (tries - 1))
        return max(self._rng.uniform(0.0, ceiling_s), self._earliest_s.get(deployment.id, 0.0))

    def _failure(self) -> GatewayError:
        if self._last is not None:
            return self._last
        if self._frees_s:
            return DeploymentsBusy(
                f"every deployment of {self._groups[0]!r} has used up its own rpm or tpm",
                model=self._groups[0],
                retry_after_s=min(self._frees_s),
            )
        retry_after_s = min(self._reopens_s, default=1.0)
        return CircuitBreakerOpenError(
            f"circuit breaker is OPEN for every deployment of {self._groups[0]!r}",
            model=self._groups[0],
            retry_after_s=retry_after_s,
        )
