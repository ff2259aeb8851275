"""Which deployment is tried next, and after what pause: retries and fallbacks as a plan.

Rule 1: only decisions live here; `trying.py` makes the attempts and reports what came of them.
Rule 2: a retry goes to another deployment at once; back to the same one only after a pause with
        full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015), never sooner than the
        provider's Retry-After.
Rule 3: `max_retries` counts for the request, over all groups on its way (the one asked for, then
        its fallbacks). The first attempt in a group is no retry.
Rule 4: what the caller did wrong is final, except where groups are configured for just that:
        longer contexts, other content policies. Those are then the only ones left to try.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from actors.circuit_breaker.policy import LETS_THROUGH, Pass, Refusal, Verdict
from forebay.errors import (
    CircuitBreakerOpenError,
    DeploymentsBusy,
    GatewayError,
    GatewayTimeout,
    Overloaded,
    RateLimitError,
)
from forebay.routing import Deployment, SpecialKind

NO_GENERATION = -1
PAUSE_MAX_S = 30.0
ASKED_PAUSE_JITTER = (1.02, 1.1)
"""What a provider asked for is stretched so: all those it sent away would come back at once."""

THROTTLED_CODE = "provider_throttled"
"""The code of a 429 that stands in for a call: the provider asked for none before a later time."""

SPENT_CODE = "retry_budget_spent"
"""The code of a 503 that stands in for a call that would be one retry too many."""

KIND_OF_CODE: Mapping[str, SpecialKind] = MappingProxyType(
    {
        "context_length_exceeded": "context_window",
        "content_filter": "content_policy",
        "content_policy_violation": "content_policy",
    }
)

Why = Literal["open", "throttled", "busy"]
"""Why no attempt was made: the breaker is open, the provider asked for a pause, or the
deployment's own limits are used up."""


def pass_unasked(deployment: Deployment) -> Pass:
    """Leave for a call where the breaker is off.

    It is of no state that a breaker was ever in, so that the call earns retries and opens nothing.
    """
    return Pass(deployment.circuit, NO_GENERATION)


def why_of(refusal: Refusal) -> Why:
    """Why the breaker let no call through."""
    return "throttled" if refusal.state in LETS_THROUGH else "open"


def refusal_error(deployment: Deployment, refusal: Refusal) -> GatewayError:
    """The breaker's refusal as an error that another process can make a refusal of again."""
    details: dict[str, Any] = {
        "model": deployment.group,
        "provider": deployment.provider,
        "retry_after_s": refusal.retry_after_s,
    }
    if why_of(refusal) == "throttled":
        text = f"{deployment.provider} has asked for a pause in calls of {deployment.group!r}"
        return RateLimitError(text, code=THROTTLED_CODE, **details)
    return CircuitBreakerOpenError(f"circuit breaker is OPEN for {deployment.circuit}", **details)


def spent_error(deployment: Deployment) -> GatewayError:
    """No retry, as an error that another process can make a plan's `spent` of again."""
    return Overloaded(
        f"there are enough retries of {deployment.group!r} for now",
        code=SPENT_CODE,
        model=deployment.group,
        retry_after_s=1.0,
    )


def refused_by(error: GatewayError) -> Why | Literal["spent"] | None:
    """What kept a call from being made; None for the failure of one that was made."""
    if isinstance(error, Overloaded):
        return "spent" if error.code == SPENT_CODE else None
    if isinstance(error, CircuitBreakerOpenError):
        return "open"
    if isinstance(error, DeploymentsBusy):
        return "busy"
    is_throttle = isinstance(error, RateLimitError) and error.code == THROTTLED_CODE
    return "throttled" if is_throttle else None


class Try(NamedTuple):
    """One attempt to make: where, after how many seconds, and why it is not the first."""

    deployment: Deployment
    pause_s: float
    is_retry: bool
    is_fallback: bool


class Plan:
    """The attempts of one request, handed out one by one.

    `order(group)` gives a group's deployments in the order to try them, open breakers last.
    `special(kind, group)` names the groups for one kind of refusal; most have none.
    """

    def __init__(
        self,
        groups: Sequence[str],
        order: Callable[[str], list[Deployment]],
        *,
        max_retries: int,
        retry_delay_s: float,
        rng: random.Random,
        special: Callable[[SpecialKind, str], Sequence[str]] = lambda kind, group: (),
    ) -> None:
        self._usual = list(groups)
        self._groups = self._usual
        self._order = order
        self._special = special
        self._max_retries = max_retries
        self._retry_delay_s = retry_delay_s
        self._rng = rng
        self._group_index = -1
        self._deployments: list[Deployment] = []
        self._made = 0  # attempts made in this group
        self._tries: dict[str, int] = {}  # and of each deployment
        self._earliest_s: dict[str, float] = {}  # deployment id → the pause its provider asked for
        self._beats: dict[str, float] = {}  # deployment id → the chance that all failed there share
        self._refused: set[str] = set()  # not to be tried again for this request
        self._waits_s: dict[Why, list[float]] = {}
        self._last: GatewayError | None = None
        self.retries = 0
        self.fallbacks = 0

    def next(self, left_s: float = math.inf) -> Try:
        """The next attempt; never one whose pause would not fit into the `left_s` seconds left.

        Raises:
            GatewayError: what the last attempt failed with, when nothing is left to try;
            RateLimitError, CircuitBreakerOpenError: when nothing could be tried at all.
        """
        if left_s <= 0 and self._last is not None:
            raise self._last
        while True:
            is_retry = self._made > 0
            if self._deployments and (not is_retry or self.retries < self._max_retries):
                for deployment in self._candidates():
                    pause_s = self._pause_s(deployment) if is_retry else 0.0
                    if pause_s == 0 or pause_s < left_s:
                        self._made += 1
                        self._tries[deployment.id] = self._tries.get(deployment.id, 0) + 1
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
        # A timeout that blames nobody leaves no time, or did not come from the deadline.
        if verdict is Verdict.IGNORED and not isinstance(error, GatewayTimeout):
            kind = KIND_OF_CODE.get(error.code or "")
            if kind is None or not self.turn_aside(kind):
                raise error
            return
        if verdict is Verdict.CREDENTIAL:
            self._refused.add(deployment.id)
        if error.retry_after_s is not None:
            self._earliest_s[deployment.id] = error.retry_after_s
        beat: float | None = getattr(error, "beat", None)
        if beat is not None:
            self._beats[deployment.id] = beat

    def refused(self, deployment: Deployment, retry_after_s: float, why: Why) -> None:
        """No attempt was made; one may succeed in `retry_after_s`."""
        self._refused.add(deployment.id)
        self._waits_s.setdefault(why, []).append(retry_after_s)
        self._take_back()

    def spent(self) -> None:
        """No attempt was made: there are enough retries in this group for now."""
        self._take_back()
        self._deployments = []

    def turn_aside(self, kind: SpecialKind) -> bool:
        """Go on with the groups for this kind of refusal, and only those; False: there are none."""
        tried = self._groups[: self._group_index + 1]
        for group in (tried[-1], tried[0]):
            names = [name for name in self._special(kind, group) if name not in tried]
            if names:
                self._groups, self._deployments = tried + names, []
                return True
        return False

    def again(self) -> None:
        """Begin anew with the first group: those that were busy may be free by now."""
        self._groups = self._usual
        self._group_index = -1
        self._deployments = []
        self._refused.clear()
        self._waits_s.clear()
        self.fallbacks = 0

    def _candidates(self) -> list[Deployment]:
        """Those of the group that may be tried: the least tried first, then the soonest."""
        there = self._deployments
        if self._refused:
            there = [d for d in there if d.id not in self._refused]
        if self._made or self._earliest_s:  # else their order says it all
            tries, earliest_s = self._tries, self._earliest_s
            there = sorted(there, key=lambda d: (tries.get(d.id, 0), earliest_s.get(d.id, 0.0)))
        return there

    def _take_back(self) -> None:
        self._made -= 1
        self.retries -= self._made > 0

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
        tries = self._tries.get(deployment.id, 0)
        if tries == 0:
            return 0.0
        ceiling_s = min(PAUSE_MAX_S, self._retry_delay_s * 2.0 ** (tries - 1))
        # What the Batcher sent in one call and failed comes back in one, so it waits alike.
        beat = self._beats.get(deployment.id)
        chance: float = self._rng.random() if beat is None else beat
        least, most = ASKED_PAUSE_JITTER
        asked_s = self._earliest_s.get(deployment.id, 0.0)
        return max(chance * ceiling_s, asked_s * (least + chance * (most - least)))

    def _failure(self) -> GatewayError:
        """What callers get: what happened, if anything did, else when to come back."""
        if self._last is not None:
            return self._last
        asked = self._usual[0]
        waits_s = self._waits_s
        soonest_s = min((wait_s for all_s in waits_s.values() for wait_s in all_s), default=1.0)
        if "busy" in waits_s:
            return DeploymentsBusy(
                f"every deployment of {asked!r} has used up its own rpm or tpm",
                model=asked,
                retry_after_s=soonest_s,
            )
        if "throttled" in waits_s:
            return RateLimitError(
                f"every provider of {asked!r} that could answer has asked for a pause",
                code=THROTTLED_CODE,
                model=asked,
                retry_after_s=soonest_s,
            )
        return CircuitBreakerOpenError(
            f"circuit breaker is OPEN for every deployment of {asked!r}",
            model=asked,
            retry_after_s=soonest_s,
        )
