"""The breaker's vocabulary: states, the table of transitions, and what travels.

    CLOSED ──trip──▶ OPEN ──cool──▶ HALF_OPEN ──recover──▶ CLOSED
                       ▲               │
                       └─────trip──────┘        any ──force_open/force_close──▶ FORCED_*
                                                FORCED_* ──release──▶ CLOSED

Rule 1: states change in `Circuit._go` (circuit.py), nowhere else, and only as `TRANSITIONS` says.
Rule 2: each transition begins a new generation; what a call of an older one reports is void.
Rule 3: in HALF_OPEN only the holder of the one probe lease is heard, and leases end by themselves.
        A lease that a forced transition made void keeps the place until its holder lets it go.
Rule 4: a throttle (429) is not a failure: it blocks for a time and leaves the state alone.

After resilience4j (time-based window), gobreaker (generations) and Envoy (growing ejection time).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import NamedTuple


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


class Event(StrEnum):
    TRIP = "trip"
    COOL = "cool"
    RECOVER = "recover"
    FORCE_OPEN = "force_open"
    FORCE_CLOSE = "force_close"
    RELEASE = "release"


_FORCE = {Event.FORCE_OPEN: State.FORCED_OPEN, Event.FORCE_CLOSE: State.FORCED_CLOSED}

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.CLOSED: {Event.TRIP: State.OPEN, **_FORCE},
    State.OPEN: {Event.COOL: State.HALF_OPEN, **_FORCE},
    State.HALF_OPEN: {Event.TRIP: State.OPEN, Event.RECOVER: State.CLOSED, **_FORCE},
    State.FORCED_OPEN: {
        Event.FORCE_CLOSE: State.FORCED_CLOSED,
        Event.RELEASE: State.CLOSED,
    },
    State.FORCED_CLOSED: {
        Event.FORCE_OPEN: State.FORCED_OPEN,
        Event.RELEASE: State.CLOSED,
    },
}
"""A missing key is the illegal transition."""

RULES_KEY = "\0rules"  # among the watched keys, where deployments are; no deployment is called so
FORCED = (State.FORCED_OPEN, State.FORCED_CLOSED)
LETS_THROUGH = (State.CLOSED, State.FORCED_CLOSED)


class Verdict(StrEnum):
    """How one attempt ended, as far as the deployment is to blame for it."""

    SUCCESS = "success"
    SLOW = "slow"  # answered, but its first token or a later one came late
    FAILURE = "failure"  # it answered, and wrongly: 5xx, truncated or unreadable
    UNREACHABLE = "unreachable"  # connection, DNS, TLS, a timeout of ours, a stalled stream
    THROTTLED = "throttled"  # 429
    CREDENTIAL = "credential"  # 401, 402, 403
    IGNORED = "ignored"  # the caller's own doing: other 4xx, content filter, client gone


# A class's member costs Python 3.11 a call each time; these are named with every call.
SUCCESS, SLOW, THROTTLED, IGNORED = (
    Verdict.SUCCESS,
    Verdict.SLOW,
    Verdict.THROTTLED,
    Verdict.IGNORED,
)
ANSWERED = (SUCCESS, SLOW)


class Reason(StrEnum):
    """Why a circuit is in its state."""

    NONE = ""
    CONSECUTIVE_FAILURES = "consecutive failures"
    FAILURE_RATE = "failure rate"
    SLOW = "slow calls"
    CREDENTIAL = "credential refused"
    PROBE_FAILED = "probe failed"
    OPERATOR = "operator"
    LEARNED = "learned from a desk"


@dataclass(frozen=True, slots=True)
class Rules:
    """When a circuit opens and closes.

    It opens after `failure_threshold` unreachable calls with no answer between them; or so many
    failures of any kind in a row, if there was no good answer in the last `window_s` whole
    seconds either (a busy deployment that fails now and then has such rows by chance, so there
    it takes `min_calls`, if that is more); or when, of at least `min_calls` calls in the window,
    the share `failure_rate` failed or `slow_call_rate` was slow. It stays open `open_s` seconds;
    when it opens again soon after, twice as long each time up to `open_s_max`, less a random
    fifth at most. `success_threshold` probes in a row close it. `probe_s` is the life of a
    probe's lease; `throttle_s` stands in where a 429 came without a Retry-After. Its retries are
    `retry_share` of its calls and `retries_per_s` beside (retry_budget.py).
    """

    failure_threshold: int = 5
    success_threshold: int = 2
    open_s: float = 60.0
    window_s: int = 10
    failure_rate: float = 0.5
    slow_call_rate: float = 0.5
    min_calls: int = 20
    open_s_max: float = 300.0
    throttle_s: float = 1.0
    probe_s: float = 5.0
    retry_share: float = 0.1
    retries_per_s: float = 3.0

    def __post_init__(self) -> None:
        for name in ("failure_threshold", "success_threshold", "window_s", "min_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        for name in ("open_s", "open_s_max", "throttle_s", "probe_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)!r}")
        for name in ("failure_rate", "slow_call_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], not {getattr(self, name)!r}")
        if not 0 <= self.retry_share <= 1:
            raise ValueError(f"retry_share must be in [0, 1], not {self.retry_share!r}")
        if not 0 <= self.retries_per_s < inf:
            raise ValueError(f"retries_per_s must be at least 0, not {self.retries_per_s!r}")

    def open_for_s(self, reopened: int, random: float) -> float:
        """How long to stay open after having reopened `reopened` times; `random` in [0, 1)."""
        if reopened == 0:
            return self.open_s
        grown_s = self.open_s * 2.0 ** min(reopened, 30)
        return max(self.open_s, min(grown_s, self.open_s_max) * (1 - random / 5))


@dataclass(frozen=True, slots=True)
class Standing:
    """How a deployment stands. `retry_after_s`: no call goes there for so many seconds.

    Durations only: it was true when it was said, and whoever keeps it counts down from there.
    In OPEN and HALF_OPEN the call that goes then is the probe. For FORCED_OPEN nobody knows.
    """

    state: State = State.CLOSED
    generation: int = 0
    retry_after_s: float = 0.0
    reason: Reason = Reason.NONE

    @property
    def callable(self) -> bool:
        """Whether a call, or a probe, may be tried now."""
        return self.retry_after_s <= 0 and self.state is not State.FORCED_OPEN

    @property
    def clean(self) -> bool:
        """Whether nothing would be lost if this were forgotten."""
        return self.state is State.CLOSED and self.retry_after_s <= 0


CLEAN = Standing()
"""How a deployment stands of which nobody has said anything."""


PROVEN = -2
"""In place of a generation: the call was its circuit's probe, and has been judged as that."""


class Pass(NamedTuple):
    """Leave to make one call; in HALF_OPEN it is the probe, leased as `probe` for `lease_s`."""

    deployment: str
    generation: int = 0
    probe: str | None = None
    lease_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """No call now; `retry_after_s` is the shortest time after which asking again makes sense."""

    deployment: str
    retry_after_s: float
    state: State
    reason: Reason = Reason.NONE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of `count` calls in a row of one deployment and generation.

    `earns`: whether they earn retries at the owner. Each call earns in one place: the desk that
    finds the owner away lets it earn there.
    """

    deployment: str
    generation: int
    verdict: Verdict
    count: int = 1
    retry_after_s: float | None = None
    probe: str | None = None
    earns: bool = True


@dataclass(frozen=True, slots=True)
class Claim:
    """What a desk remembers of a deployment, for an owner that has lost its memory.

    `probe` is the id of a probe lease that the desk holds.
    """

    deployment: str
    standing: Standing
    probe: str | None = None


class IllegalTransition(Exception):
    """A programmer's error: the table has no such transition."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(state, event)
        self.state, self.event = state, event

    def __str__(self) -> str:
        return f"{self.event} is not possible in {self.state}"
