"""The breaker's owner: one circuit per deployment, for the whole cluster.

Rule 1: no method that decides awaits, so inside the actor every decision is atomic.
Rule 2: what is published is that something changed; how it stands is said when it is asked.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.circuit_breaker.circuit import Circuit
from actors.circuit_breaker.policy import (
    CLEAN,
    FORCED,
    RULES_KEY,
    Claim,
    Outcome,
    Pass,
    Reason,
    Rules,
    Standing,
    State,
)
from actors.ref import Clock
from actors.watch import GONE, HOLD_S, SnapshotHost, Snapshots

DEPLOYMENTS_MAX = 10_000  # far above any model list; a circuit is about 1 kB
HOLDERS_MAX = 10_000  # processes whose last message number is remembered
ORDERS_MAX = 1_000  # operators' orders whose ids are remembered
SWEEP_PAUSE_S = 1.0  # a full table is searched for forgettable circuits no more often

log = logging.getLogger(__name__)


class CircuitBreaker:
    """Decides which deployments may be called, and tried again, from what all desks report.

    Owns: the circuit of each deployment with its retry budget, the one probe lease of each
    half-open one, the rules.
    Bounds: `DEPLOYMENTS_MAX` circuits; when full, closed ones that were idle for ten minutes are
    forgotten, and if there are none, a new deployment is not judged (it counts as closed) and is
    granted no retries. `HOLDERS_MAX` message numbers and answers, the longest silent forgotten
    first.
    Failure behaviour: all is in memory. A restarted owner knows nothing, and learns what was
    open, forced, throttled or being probed from the desks, which see it forget; where a probe may
    be under way it lends none for one lease life. Meanwhile desks act on their last snapshot.
    Counts of failures that had opened nothing are lost, and retry budgets begin anew with their
    steady part full. Rules come again from the desks. Two probes at once are possible only if the
    owner dies together with every desk that knows of the first one but the prober itself, and
    `open_s` is shorter than a lease.
    """

    PROTOCOL = 2

    def __init__(
        self,
        rules: Rules | None = None,
        clock: Clock = time.monotonic,
        random: Callable[[], float] = random.random,
        getrandbits: Callable[[int], int] = random.getrandbits,
    ) -> None:
        self.snapshots = SnapshotHost("circuit_breaker", getrandbits)
        self._rules = rules or Rules()
        self._rules_version = 0
        self._clock = clock
        self._random = random
        self._generation = getrandbits(48)
        self._circuits: dict[str, Circuit] = {}
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._answers: OrderedDict[str, tuple[int, dict[str, int]]] = OrderedDict()
        self._orders: OrderedDict[str, None] = OrderedDict()
        self._swept_at = float("-inf")
        self._counts = {"reports": 0, "doubled": 0, "outcomes": 0, "probes": 0, "unjudged": 0}
        self._counts |= {"retries": 0, "retries_refused": 0}
        self.snapshots.publish(RULES_KEY, None)

    def protocol(self) -> int:
        return self.PROTOCOL

    async def watch(self, seen: dict[str, int], hold_s: float = HOLD_S) -> Snapshots:
        """Deployment to (version, `Standing`) of all that ever left the clean state.

        Under `RULES_KEY`: the version number of the rules in force.
        """
        changes = await self.snapshots.watch(seen, hold_s)
        # A circuit may be here and not be published: to those who ask for it, it is gone.
        return {
            key: (version, None if version == GONE else self._said(key))
            for key, (version, _) in changes.items()
        }

    def report(self, holder: str, seq: int, outcomes: Sequence[Outcome]) -> int:
        """Take a desk's outcomes. A number not above the holder's last one changes nothing.

        Returns the holder's last number.
        """
        self._counts["reports"] += 1
        last = self._numbers.get(holder)
        if last is not None and seq <= last:
            self._counts["doubled"] += 1
            return last
        self._numbers[holder] = seq
        self._numbers.move_to_end(holder)
        if len(self._numbers) > HOLDERS_MAX:
            self._numbers.popitem(last=False)
        for outcome in outcomes:
            self._judge(outcome)
        return seq

    def retry(self, holder: str, number: int, wanted: Mapping[str, int]) -> dict[str, int]:
        """Leave for retries: how many of those `wanted` for each deployment may be made.

        The same `number` again is answered as before; an older one, whose sender has given up,
        gets nothing. Neither costs anything.
        """
        last, answer = self._answers.get(holder, (-1, {}))
        if number <= last:
            return answer if number == last else {}
        now, granted = self._clock(), {}
        for deployment, count in wanted.items():
            circuit = self._circuit(deployment)
            granted[deployment] = circuit.take_retries(count, self._rules, now) if circuit else 0
        asked, given = sum(wanted.values()), sum(granted.values())
        self._counts["retries"] += given
        self._counts["retries_refused"] += asked - given
        self._answers[holder] = number, granted
        self._answers.move_to_end(holder)
        if len(self._answers) > HOLDERS_MAX:
            self._answers.popitem(last=False)
        return granted

    def probe(
        self, deployment: str, holder: str, probe_id: str, claim: Claim | None = None
    ) -> Pass | Standing:
        """Lend the probe to `holder` for `Rules.probe_s`, or say how the deployment stands.

        One probe in the cluster; the same `probe_id` asks for the same lease. `claim` is why the
        desk believes that a probe is due.
        """
        circuit = self._learn(claim) if claim else self._circuits.get(deployment)
        if circuit is None:
            return CLEAN
        before = circuit.generation
        answer = circuit.take_probe(probe_id, self._rules, self._clock())
        self._counts["probes"] += isinstance(answer, Pass)
        if isinstance(answer, Pass) or circuit.generation != before:
            self.snapshots.publish(deployment, None)
        return answer

    def renew(self, deployment: str, holder: str, probe_id: str, claim: Claim) -> bool:
        """Prolong a probe's lease. False: it is lost, and what the probe reports will be void."""
        circuit = self._learn(claim)
        return circuit is not None and circuit.renew(probe_id, self._rules, self._clock())

    def restate(self, holder: str, claims: Sequence[Claim]) -> list[str]:
        """Learn from a desk that saw this owner forget. Returns what there was no room for.

        Repeating it changes nothing: a circuit with a story of its own learns no other.
        """
        return [claim.deployment for claim in claims if self._learn(claim) is None]

    def force(self, deployment: str, state: State | None, order: str = "") -> Standing:
        """Force a deployment open or closed, or (None) let it go; each `order` id counts once.

        Raises:
            ValueError: `state` is none of FORCED_OPEN, FORCED_CLOSED, None, or there is no room.
        """
        if state is not None and state not in FORCED:
            raise ValueError(f"a breaker is forced open or closed, not {state!r}")
        circuit = self._circuit(deployment)
        if circuit is None:
            raise ValueError(f"the breaker keeps {DEPLOYMENTS_MAX} deployments already")
        if order not in self._orders and circuit.force(state, self._clock()):
            self.snapshots.publish(deployment, None)
        if order:
            self._orders[order] = None
        if len(self._orders) > ORDERS_MAX:
            self._orders.popitem(last=False)
        return circuit.standing(self._clock(), self._rules)

    def set_rules(self, rules: Rules, version: int = 0) -> int:
        """Judge by `rules` from now on, unless those in force are of a higher version.

        A circuit that is open stays so for as long as it was told. Returns the version in force.
        """
        if version >= self._rules_version:
            self._rules, self._rules_version = rules, version
            self.snapshots.publish(RULES_KEY, None)
        return self._rules_version

    def board(self) -> dict[str, dict[str, Any]]:
        """Each deployment that is known: its standing and the figures behind it.

        `calls`, `failures` and `slow` (good, but late) are those of the window; `verdicts` counts
        all reports by verdict, those of older generations included; `retries_left` is how many
        retries could be had now; `open_for_s` is what is left of the open time, which throttles
        and probe leases in `retry_after_s` may exceed.
        """
        now, rules = self._clock(), self._rules
        board = {}
        for name, circuit in self._circuits.items():
            standing = circuit.standing(now, rules)
            seen = circuit.window.totals(now, rules.window_s)
            board[name] = {
                "state": standing.state.value,
                "reason": standing.reason.value,
                "generation": standing.generation,
                "retry_after_s": standing.retry_after_s,
                "open_for_s": circuit.open_for_s(now),
                "calls": seen.calls,
                "failures": seen.failures,
                "slow": seen.slow,
                "failures_in_row": circuit.failures_in_row,
                "retries_left": circuit.retries.left(rules, now),
                "verdicts": {verdict.value: times for verdict, times in circuit.verdicts.items()},
            }
        return board

    def stats(self) -> dict[str, Any]:
        return {
            **self._counts,
            "deployments": len(self._circuits),
            "holders": len(self._numbers),
            "rules_version": self._rules_version,
            "watchers": self.snapshots.waiting,
        }

    async def close(self) -> None:
        """Send the watchers away."""
        self.snapshots.close()

    def _said(self, key: str) -> Standing | int | None:
        if key == RULES_KEY:
            return self._rules_version
        circuit = self._circuits.get(key)
        return circuit.standing(self._clock(), self._rules) if circuit else None

    def _judge(self, outcome: Outcome) -> None:
        circuit = self._circuit(outcome.deployment)
        self._counts["outcomes"] += outcome.count
        if circuit is None:
            self._counts["unjudged"] += outcome.count
            return
        before, why = circuit.state, circuit.reason
        if circuit.judge(outcome, self._rules, self._clock()):
            self.snapshots.publish(outcome.deployment, None)
        if circuit.state is not before:
            _tell(circuit, why)

    def _learn(self, claim: Claim) -> Circuit | None:
        circuit = self._circuit(claim.deployment)
        if circuit is not None and circuit.learn(claim, self._rules, self._clock()):
            self.snapshots.publish(claim.deployment, None)
        return circuit

    def _circuit(self, deployment: str) -> Circuit | None:
        """The deployment's circuit, made if there is room; None when the table is full."""
        circuit = self._circuits.get(deployment)
        if circuit is None and self._has_room():
            circuit = Circuit(deployment, self._mint, self._random)
            self._circuits[deployment] = circuit
        return circuit

    def _has_room(self) -> bool:
        now = self._clock()
        if len(self._circuits) >= DEPLOYMENTS_MAX and now - self._swept_at >= SWEEP_PAUSE_S:
            self._swept_at = now
            for name in [n for n, c in self._circuits.items() if c.forgettable(now)]:
                del self._circuits[name]
                self.snapshots.withdraw(name)
        return len(self._circuits) < DEPLOYMENTS_MAX

    def _mint(self) -> int:
        self._generation += 1
        return self._generation


def _tell(circuit: Circuit, why: Reason) -> None:
    """Log a change of state; `why` was the reason for the state before."""
    words = "breaker of %s: %s", circuit.deployment, f"{circuit.state} ({circuit.reason or 'well'})"
    # A key that is wrong stays so until somebody looks after it: said once, not with every probe.
    if circuit.reason is Reason.CREDENTIAL and why is not Reason.CREDENTIAL:
        log.warning(*words)
    else:
        log.info(*words)
