"""The money of one tenant: what is spent, and what desks hold of the rest.

Rule 1: nano-USD, whole ones. Spent + held never exceeds the day's nor the month's limit.
Rule 2: money comes back by word only: the call that it is for may go on unheard.
Rule 3: days and months are UTC. What is told in a period belongs to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from actors.rate_limiter.terms import Limits, Refusal, Seed

DAY_S = 86_400.0
NANO_PER_USD = 1_000_000_000
RETURNS_S = 0.1  # money of calls under way may be back so soon; nobody knows

Wall = Callable[[], float]
"""Seconds since 1970, UTC."""


def day_of(wall_s: float) -> int:
    """UTC days since 1970."""
    return int(wall_s // DAY_S)


def month_of(wall_s: float) -> int:
    """UTC months since the year 0."""
    date = time.gmtime(wall_s)
    return date.tm_year * 12 + date.tm_mon - 1


def month_left_s(wall_s: float) -> float:
    """Seconds to the end of the month."""
    return _next_month(day_of(wall_s)) * DAY_S - wall_s


@lru_cache(maxsize=4)
def _next_month(day: int) -> int:
    """The first day of the month that follows a day's."""
    month = month_of(day * DAY_S)
    while month_of(day * DAY_S) == month:
        day += 1
    return day


@dataclass(slots=True)
class Purse:
    """One desk's money as it told last, and what it was lent since."""

    spent: int = 0  # all that it ever told; the account's periods have it already
    held: int = 0
    carried: int = 0


class Account:
    """Owns a tenant's spending of the current day and month, and who holds what of the rest.

    Bounded by the desks that ever held money of the tenant under this owner. Failure behaviour: a
    new one lends nothing until it has the ledger's word; what a dead desk held counts as spent.
    """

    __slots__ = ("_month_ends_s", "day", "day_spent", "month", "month_spent", "purses")

    def __init__(self, wall_s: float) -> None:
        self.day = day_of(wall_s)
        self.month = month_of(wall_s)
        self._month_ends_s = wall_s + month_left_s(wall_s)
        self.day_spent = 0
        self.month_spent = 0
        self.purses: dict[str, Purse] = {}

    def seed(self, seed: Seed) -> None:
        """What the ledger had. Of a day or month that is over by now it says nothing."""
        if seed.day >= self.day:
            self.day_spent += seed.day_nano
        if seed.month >= self.month:
            self.month_spent += seed.month_nano

    def roll(self, wall_s: float) -> None:
        """A new day or month begins with nothing spent. A clock that goes back is not followed."""
        if wall_s < (self.day + 1) * DAY_S:
            return
        self.day, self.day_spent = day_of(wall_s), 0
        if wall_s >= self._month_ends_s:
            self.month, self.month_spent = month_of(wall_s), 0
            self._month_ends_s = wall_s + month_left_s(wall_s)

    def told(self, holder: str, spent: int, held: int, carried: int) -> None:
        """What a desk says it has spent in all, and what it holds now."""
        purse = self.purses.get(holder)
        if purse is None:
            if not (spent or held or carried):
                return
            purse = self.purses[holder] = Purse()
        more = max(0, spent - purse.spent)
        purse.spent += more
        self.day_spent += more
        self.month_spent += more
        purse.held, purse.carried = held, carried

    def unknown(self, holder: str, nano: int) -> None:
        """A desk that still speaks of another owner: all of its money may be spent or not."""
        if nano or holder in self.purses:
            self.told(holder, 0, 0, nano)

    def lend(self, holder: str, nano: int) -> None:
        if nano:
            self.purses.setdefault(holder, Purse()).held += nano

    def gone(self, holder: str) -> bool:
        """The desk is dead: what it had not accounted for counts as spent. Whether it had any."""
        purse = self.purses.pop(holder, None)
        if purse is None:
            return False
        lost = purse.held + purse.carried
        self.day_spent += lost
        self.month_spent += lost
        return lost > 0

    def holds(self, holder: str) -> bool:
        purse = self.purses.get(holder)
        return purse is not None and (purse.held > 0 or purse.carried > 0)

    @property
    def reserved(self) -> int:
        """Held by desks, for calls that are under way or will be."""
        return sum(purse.held + purse.carried for purse in self.purses.values())

    def available(self, limits: Limits) -> int:
        """What can be lent now."""
        left = [
            limit - spent
            for limit, spent in (
                (limits.day_nano, self.day_spent),
                (limits.month_nano, self.month_spent),
            )
            if limit is not None
        ]
        return max(0, min(left) - self.reserved)

    def refusal(self, limits: Limits, nano: int, wall_s: float, lent_now: int = 0) -> Refusal:
        """Why so much cannot be lent now, and when it can. The period that takes longer decides.

        `lent_now` is on its way to a desk and not in its purse yet.
        """
        reserved = self.reserved + lent_now
        told: Refusal | None = None
        for kind, limit, spent, ends_s in (
            ("usd_per_day", limits.day_nano, self.day_spent, (self.day + 1) * DAY_S),
            ("usd_per_month", limits.month_nano, self.month_spent, self._month_ends_s),
        ):
            if limit is None or nano <= limit - spent - reserved:
                continue
            left, wait_s = max(0, limit - spent - reserved), max(0.001, ends_s - wall_s)
            lent = nano <= limit - spent  # all of it, if nothing of what is held were used
            found = Refusal(kind, float(limit), float(left), wait_s, lent, never=nano > limit)
            if found.never:
                return found
            if told is None or told.lent or not lent:
                told = found  # a firm no is not softened by a limit that may yet have room
        return told or Refusal("usd_per_day", 0.0, 0.0, RETURNS_S, lent=True)

    def state(self, limits: Limits, wall_s: float) -> dict[str, dict[str, float]]:
        """For people, in USD."""
        reserved, periods = self.reserved, {}
        for kind, limit, spent, ends_s in (
            ("usd_per_day", limits.day_nano, self.day_spent, (self.day + 1) * DAY_S),
            ("usd_per_month", limits.month_nano, self.month_spent, self._month_ends_s),
        ):
            if limit is not None:
                periods[kind] = {
                    "limit": limit / NANO_PER_USD,
                    "spent": spent / NANO_PER_USD,
                    "reserved": reserved / NANO_PER_USD,
                    "remaining": max(0, limit - spent - reserved) / NANO_PER_USD,
                    "resets_in_s": max(0.0, ends_s - wall_s),
                }
        return periods
