"""The money that one desk holds of one tenant, exact over the deaths of owners.

Rule 1: nano-USD, whole ones. Free money was lent and waits for a call; reserved money is a call's.
Rule 2: `spent` is what was settled under the owner that lives, and only grows while it does.
Rule 3: what an owner did not live to see is carried until the ledger has it: an owner that was
        seeded up to a commit knows what has that or an earlier one, and is told the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SETTLED_MAX = 256  # of one tenant; beyond, two become one that is committed when the later is

CommitOf = Callable[[int], int | None]


@dataclass(slots=True, eq=False)
class Settled:
    """A settled call whose ledger entry an owner's seed may or may not have."""

    mark: int
    nano: int
    hours: int
    carried: bool
    commit: int | None = None


@dataclass(slots=True, eq=False)
class Purse:
    """Owns one tenant's money at this desk.

    `era` grows with each owner: a call of an earlier era has its money among `carried`.
    Bounded by the calls under way and SETTLED_MAX. Failure behaviour: with this process it is
    lost; its owner counts all of it as spent when it hears of that.
    """

    era: int = 0
    spent: int = 0
    free: int = 0
    reserved: int = 0
    carried: int = 0
    settled: list[Settled] = field(default_factory=list)

    @property
    def held(self) -> int:
        return self.free + self.reserved

    @property
    def empty(self) -> bool:
        return not (self.free or self.reserved or self.carried or self.settled)

    def take(self, nano: int) -> None:
        """For a call; the caller has seen that it is there."""
        self.free -= nano
        self.reserved += nano

    def settle(self, era: int, nano: int, used: int, mark: int, hours: int) -> None:
        """A call for which `nano` was taken used so much."""
        if era != self.era:
            self.carried += used - nano
        elif nano or used:
            self.reserved -= nano
            self.free += max(0, nano - used)
            self.spent += used
        if used or hours:
            self._remember(mark, used, hours, era != self.era)

    def orphan(self) -> int:
        """The owner is another one: it lent none of this. Calls that the ledger may not have."""
        self.era += 1
        self.carried += self.reserved
        self.spent = self.free = self.reserved = 0
        for entry in self.settled:
            if not entry.carried:
                entry.carried = True
                self.carried += entry.nano
        return sum(entry.hours for entry in self.settled)

    def look(self, commit_of: CommitOf) -> bool:
        """Ask for the commits that are not known. Whether any is known now.

        They are in the ledger's order: where one is not known, those after it are not.
        """
        known = False
        for entry in self.settled:
            if entry.commit is None:
                entry.commit = commit_of(entry.mark)
                if entry.commit is None:
                    break
            known = True
        return known

    def learn(self, seed_commit: int) -> bool:
        """The owner's seed has what was committed by then; the rest is told. Whether any moved."""
        moved = False
        for entry in list(self.settled):
            if not entry.carried or entry.commit is None:
                continue
            moved = True
            self.carried -= entry.nano
            entry.carried = False
            if entry.commit <= seed_commit:
                self.settled.remove(entry)
            else:
                self.spent += entry.nano
        return moved

    def confirm(self) -> None:
        """The owner lived when these commits were known: whoever comes after it is seeded later."""
        if any(entry.commit is not None and not entry.carried for entry in self.settled):
            self.settled = [
                entry for entry in self.settled if entry.commit is None or entry.carried
            ]

    def _remember(self, mark: int, nano: int, hours: int, carried: bool) -> None:
        last = self.settled[-1] if self.settled else None
        if (
            last is not None
            and last.commit is None
            and last.carried == carried
            and (last.mark == mark or len(self.settled) >= SETTLED_MAX)
        ):
            last.mark = max(last.mark, mark)
            last.nano += nano
            last.hours += hours
        else:
            self.settled.append(Settled(mark, nano, hours, carried))
