"""How many retries a deployment may be sent: a share of its calls, and a few a second beside.

After Finagle's `RetryBudget`: calls earn, retries spend, and what was earned fades in ten seconds.
The bound, over any time t in which there were c first calls and r retries: since every one of
these calls earns at most `retry_share`, and a retry costs 1 + `retry_share`,

    r  ≤  c · retry_share + t · retries_per_s + 10 s · retries_per_s
"""

from __future__ import annotations

from math import exp

from actors.circuit_breaker.policy import Rules

MEMORY_S = 10.0  # of the calls a second, what is kept; and how long what was earned lasts
ROUNDING = 1e-9  # ten times a tenth is one


class RetryBudget:
    """One deployment's bucket, told the time.

    Owns: what its calls have earned, which fades with a time constant of `MEMORY_S`, and what was
    spent of the steady part, which holds `MEMORY_S` times `Rules.retries_per_s`, is full at first
    and fills with time. Bound: three numbers.
    Failure behaviour: none of its own; who loses it begins anew with the steady part full.
    """

    __slots__ = ("_at", "_earned", "_spent")

    def __init__(self) -> None:
        self._at = 0.0
        self._earned = 0.0
        self._spent = 0.0  # of the steady part, so that new rules change its size at once

    def earn(self, calls: int, rules: Rules, now: float) -> None:
        """So many calls were made, first ones and retries alike."""
        self._pass(rules, now)
        self._earned += calls * rules.retry_share

    def take(self, wanted: int, rules: Rules, now: float) -> int:
        """Spend on up to `wanted` retries; returns on how many."""
        granted = min(wanted, self.left(rules, now))
        cost = granted * _cost(rules)
        # What fades is spent first.
        of_earned = min(cost, self._earned)
        self._earned -= of_earned
        self._spent += cost - of_earned
        return granted

    def left(self, rules: Rules, now: float) -> int:
        """How many retries could be had now."""
        self._pass(rules, now)
        steady = max(0.0, MEMORY_S * rules.retries_per_s - self._spent)
        return int((self._earned + steady) / _cost(rules) + ROUNDING)

    def _pass(self, rules: Rules, now: float) -> None:
        passed_s = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._earned *= exp(-passed_s / MEMORY_S)
        self._spent = max(0.0, self._spent - passed_s * rules.retries_per_s)


def _cost(rules: Rules) -> float:
    # The retry is a call, too, and will earn: it pays for that beforehand.
    return 1.0 + rules.retry_share
