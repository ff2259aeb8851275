"""What the limiter's desk needs of the ledger's desk, and what stands in for it where none is."""

from __future__ import annotations

from typing import Protocol

from actors.rate_limiter.terms import Seed


class Commits(Protocol):
    """Whether the ledger has what was recorded."""

    def mark(self) -> int:
        """All entries so far have this mark or an earlier one."""
        ...

    def commit_of(self, mark: int) -> int | None:
        """The commit by which the ledger has these entries, None if it may not have them."""
        ...


class Book(Commits, Protocol):
    """Also what the ledger knows."""

    async def seeds(self, tenants: list[str]) -> list[Seed]:
        """What the ledger has of these tenants, in order. Raises OwnerUnavailable."""
        ...


class NoBook:
    """No ledger: nothing was used before, and what is settled is known at once."""

    def mark(self) -> int:
        return 1

    def commit_of(self, mark: int) -> int | None:
        return 1

    async def seeds(self, tenants: list[str]) -> list[Seed]:
        return [Seed(commit=0) for _ in tenants]
