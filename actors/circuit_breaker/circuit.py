"""One deployment's breaker: a state machine that is told the time.

Rule 1: every method is synchronous and takes `now`, seconds on the owner's clock.
Rule 2: nothing happens by itself: an open circuit cools when somebody asks for the probe.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from actors.circuit_breaker.policy import (
    ANSWERED,
    FORCED,
    LETS_THROUGH,
    TRANSITIONS,
    Claim,
    Event,
    IllegalTransition,
    Outcome,
    Pass,
    Reason,
    Rules,
    Standing,
    State,
    Verdict,
)
from actors.circuit_breaker.retry_budget import RetryBudget

THROTTLE_S_MAX = 86_400.0  # a provider that asks for more than a day is mistaken
FORGET_AFTER_S = 600.0  # longer than any call lasts, so no report from before comes after
PROBE_AGE_S_MAX = 330.0  # the longest call (300 s) and a margin; no lease is renewed beyond


class Seen(NamedTuple):
    """Calls of the window; slow ones are good answers."""

    calls: int
    failures: int
    slow: int


class Window:
    """What became of the calls of the last whole seconds. Bound: one slot for each second."""

    def __init__(self) -> None:
        self._slots: deque[tuple[int, list[int]]] = deque()  # (second, figures), oldest first

    def add(self, now: float, seen: Seen, window_s: int) -> None:
        """Count calls that ended now."""
        self._drop(now, window_s)
        if not self._slots or self._slots[-1][0] != int(now):
            self._slots.append((int(now), [0, 0, 0]))
        figures = self._slots[-1][1]
        for index, more in enumerate(seen):
            figures[index] += more

    def totals(self, now: float, window_s: int) -> Seen:
        """The last `window_s` seconds, the running one included."""
        self._drop(now, window_s)
        return Seen(*(sum(figures[index] for _, figures in self._slots) for index in range(3)))

    def clear(self) -> None:
        self._slots.clear()

    def _drop(self, now: float, window_s: int) -> None:
        while self._slots and self._slots[0][0] <= int(now) - window_s:
            self._slots.popleft()


@dataclass(slots=True)
class Lease:
    """The right to make the one probe; `id` is "" when somebody unknown may have it.

    A void one gives no right any more, but its holder may not know that yet.
    """

    id: str
    until: float
    born: float
    void: bool = False


class Circuit:
    """The state of one deployment.

    `mint` gives a number never given before, for each generation. Generation 0 is that of a
    circuit that has never changed its state.
    """

    def __init__(
        self, deployment: str, mint: Callable[[], int], random: Callable[[], float]
    ) -> None:
        self.deployment = deployment
        self.state = State.CLOSED
        self.generation = 0
        self.reason = Reason.NONE
        self.window = Window()
        self.retries = RetryBudget()
        self.verdicts: Counter[Verdict] = Counter()  # of all reports, void ones included
        self.failures_in_row = 0
        self.unreachable_in_row = 0
        self.touched_at = float("-inf")
        self._mint = mint
        self._random = random
        self._blocked_until = float("-inf")
        self._open_until = float("-inf")
        self._open_s = 0.0  # how long it was last told to stay open
        self._closed_at = float("-inf")
        self._reopened = 0
        self._successes_in_row = 0
        self._lease: Lease | None = None
        self._spent = ""  # the last probe that was judged: a late message must not revive it

    def standing(self, now: float, rules: Rules) -> Standing:
        """How the deployment stands now."""
        until = self._blocked_until
        if self.state is State.FORCED_OPEN:
            until = max(until, now + rules.open_s)
        elif self.state is State.OPEN:
            until = max(until, self._open_until)
        elif self.state is State.HALF_OPEN and self._lease is not None:
            until = max(until, self._lease.until)
        return Standing(self.state, self.generation, max(0.0, until - now), self.reason)

    def open_for_s(self, now: float) -> float:
        """How much is left of the time it is to stay open; 0 where it is not open."""
        return max(0.0, self._open_until - now) if self.state is State.OPEN else 0.0

    def forgettable(self, now: float) -> bool:
        """Whether the circuit carries no information and no call of before is under way."""
        idle = now - self.touched_at >= FORGET_AFTER_S
        return idle and self.state is State.CLOSED and self._blocked_until <= now

    def judge(self, outcome: Outcome, rules: Rules, now: float) -> bool:
        """Take a report. True if the standing has changed."""
        self.touched_at = now
        self.verdicts[outcome.verdict] += outcome.count
        if outcome.earns and outcome.verdict is not Verdict.IGNORED:
            self.retries.earn(outcome.count, rules, now)
        if outcome.probe and self._lease is not None and self._lease.id == outcome.probe:
            return self._judge_probe(outcome, rules, now)
        if outcome.generation != self.generation or self.state not in LETS_THROUGH:
            return False
        if outcome.verdict is Verdict.THROTTLED:
            return self._throttle(outcome.retry_after_s, rules, now)
        if outcome.verdict is Verdict.IGNORED or self.state is State.FORCED_CLOSED:
            return False
        self._count(outcome, rules, now)
        # A success can trip, too: it may be the call that makes the sample large enough.
        reason = self._reason_to_trip(outcome.verdict, rules, now)
        if reason is not Reason.NONE:
            self._trip(reason, rules, now)
        return reason is not Reason.NONE

    def take_retries(self, wanted: int, rules: Rules, now: float) -> int:
        """Spend on up to `wanted` retries, which a circuit in any state may have."""
        self.touched_at = now
        return self.retries.take(wanted, rules, now)

    def take_probe(self, probe_id: str, rules: Rules, now: float) -> Pass | Standing:
        """Lease the probe, or say how things stand. Asking again with the same id is one asking."""
        self.touched_at = now
        if self.state is State.OPEN and now >= self._open_until:
            self._go(Event.COOL, self.reason)
        if self.state is not State.HALF_OPEN or probe_id == self._spent:
            return self.standing(now, rules)
        # A void lease is alive, too: who holds it may be probing still.
        lease = self._lease
        alive = lease is not None and now < lease.until
        if alive and not self.renew(probe_id, rules, now):
            return self.standing(now, rules)
        if self._blocked_until > now:
            return self.standing(now, rules)
        if not alive:
            self._lease = Lease(probe_id, now + rules.probe_s, now)
        return Pass(self.deployment, self.generation, probe_id, rules.probe_s)

    def renew(self, probe_id: str, rules: Rules, now: float) -> bool:
        """Prolong the lease. False if it is not this one's any more, or has lasted too long."""
        lease = self._lease
        if lease is None or lease.void or lease.id != probe_id:
            return False
        if now - lease.born > PROBE_AGE_S_MAX:
            return False
        lease.until = now + rules.probe_s
        return True

    def force(self, state: State | None, now: float) -> bool:
        """Obey the operator; None gives the circuit its freedom back. True if that changed it.

        Forcing also lifts a throttle; a new 429 throttles a circuit that is forced closed, too.
        """
        assert state is None or state in FORCED
        self.touched_at = now
        if state is None:
            if self.state in FORCED:
                self._go(Event.RELEASE, Reason.NONE)
                return True
            return False
        lifted = self._blocked_until > now
        self._blocked_until = float("-inf")
        if state is self.state:
            return lifted
        opened = state is State.FORCED_OPEN
        self._go(Event.FORCE_OPEN if opened else Event.FORCE_CLOSE, Reason.OPERATOR)
        return True

    def learn(self, claim: Claim, rules: Rules, now: float) -> bool:
        """Take over what a desk remembers, if this circuit has no story of its own yet.

        Whoever was probing may be so still: when the claimer is not the prober, the probe counts
        as leased to somebody unknown for one lease life. True if the standing has changed.
        """
        said = claim.standing
        if self.generation != 0:
            lease = self._lease
            if claim.probe and lease is not None and lease.id == "" and not lease.void:
                self._lease = Lease(claim.probe, now + rules.probe_s, now)
            return False
        if said.clean:
            return False
        self.touched_at = now
        if said.state in FORCED:
            return self.force(said.state, now)
        if said.state is State.CLOSED:
            return self._throttle(said.retry_after_s, rules, now)
        self._go(Event.TRIP, Reason.LEARNED)
        self._lease = Lease("", now + rules.probe_s, now)
        self._open_s = rules.open_s
        self._open_until = now + min(said.retry_after_s, THROTTLE_S_MAX)
        if said.state is State.HALF_OPEN or said.retry_after_s <= 0:
            self._go(Event.COOL, Reason.LEARNED)
            self._lease = Lease(claim.probe or "", now + rules.probe_s, now)
        return True

    def _judge_probe(self, outcome: Outcome, rules: Rules, now: float) -> bool:
        # The probe is known by its lease, not by its generation: an owner that has lost its
        # memory has new generations, and the probe may have begun before that.
        assert self._lease is not None
        void, self._lease, self._spent = self._lease.void, None, outcome.probe or ""
        if void or self.state is not State.HALF_OPEN:
            return self.state is State.HALF_OPEN
        if outcome.verdict in ANSWERED:
            self._successes_in_row += 1
            if self._successes_in_row >= rules.success_threshold:
                self._go(Event.RECOVER, Reason.NONE)
                self._closed_at = now
        elif outcome.verdict is Verdict.THROTTLED:
            self._throttle(outcome.retry_after_s, rules, now)
        elif outcome.verdict is not Verdict.IGNORED:
            bad_key = outcome.verdict is Verdict.CREDENTIAL
            self._trip(Reason.CREDENTIAL if bad_key else Reason.PROBE_FAILED, rules, now)
        return True

    def _count(self, outcome: Outcome, rules: Rules, now: float) -> None:
        failed = outcome.count if outcome.verdict not in ANSWERED else 0
        slow = outcome.count if outcome.verdict is Verdict.SLOW else 0
        self.window.add(now, Seen(outcome.count, failed, slow), rules.window_s)
        if outcome.verdict in ANSWERED:
            self.failures_in_row = self.unreachable_in_row = 0
        else:
            self.failures_in_row += failed
        if outcome.verdict is Verdict.UNREACHABLE:
            self.unreachable_in_row += outcome.count

    def _reason_to_trip(self, verdict: Verdict, rules: Rules, now: float) -> Reason:
        if verdict is Verdict.CREDENTIAL:
            return Reason.CREDENTIAL
        seen = self.window.totals(now, rules.window_s)
        quiet = seen.failures == seen.calls
        enough = rules.failure_threshold if quiet else max(rules.failure_threshold, rules.min_calls)
        if self.unreachable_in_row >= rules.failure_threshold or self.failures_in_row >= enough:
            return Reason.CONSECUTIVE_FAILURES
        if seen.calls < rules.min_calls:
            return Reason.NONE
        if seen.failures and seen.failures >= rules.failure_rate * seen.calls:
            return Reason.FAILURE_RATE
        if seen.slow and seen.slow >= rules.slow_call_rate * seen.calls:
            return Reason.SLOW
        return Reason.NONE

    def _trip(self, reason: Reason, rules: Rules, now: float) -> None:
        # An upstream that flaps is one that trips again before it was well for as long as it
        # was last out; to such a one the time out keeps growing.
        flaps = self.state is State.HALF_OPEN or now - self._closed_at < self._open_s
        self._reopened = self._reopened + 1 if flaps else 0
        self._go(Event.TRIP, reason)
        self._open_s = rules.open_for_s(self._reopened, self._random())
        self._open_until = now + self._open_s

    def _throttle(self, retry_after_s: float | None, rules: Rules, now: float) -> bool:
        wait_s = rules.throttle_s if retry_after_s is None else retry_after_s
        until = now + min(max(0.0, wait_s), THROTTLE_S_MAX)
        longer = until > self._blocked_until
        self._blocked_until = max(self._blocked_until, until)
        return longer

    def _go(self, event: Event, reason: Reason) -> None:
        after = TRANSITIONS[self.state].get(event)
        if after is None:
            raise IllegalTransition(self.state, event)
        self.state, self.reason, self.generation = after, reason, self._mint()
        self.failures_in_row = self.unreachable_in_row = self._successes_in_row = 0
        self.window.clear()
        if self._lease is not None:
            self._lease.void = True
