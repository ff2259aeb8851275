"""What is under way at a desk: the look-ups that it has asked, and the flights that it leads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.cache.policy import Ask, Follow, Hit, Lead


@dataclass(slots=True)
class Asked:
    """One look-up on its way: the answer goes to a place in its group's list."""

    ask: Ask
    patience_s: float
    group: Group
    place: int


@dataclass(slots=True)
class Group:
    """Look-ups that are answered together; `future` holds how many, in their order."""

    future: asyncio.Future[list[Hit | Lead | Follow]]
    answers: list[Any]
    left: int


@dataclass(slots=True)
class Led:
    """A flight that this process leads: since when, when it was last spoken of, and how long it may
    take.

    Of a stream, `pieces` are what it has said so far, of which the owner knows `told`. `searched`:
    nobody stored an answer when it began.
    """

    ask: Ask
    begun_s: float
    said_s: float
    until_s: float
    searched: bool = False
    followed: bool = False  # by whom we know of
    abroad: bool = False  # and not only here
    on_followed: Callable[[], None] | None = None
    pieces: list[bytes] = field(default_factory=list)
    piece_bytes: int = 0
    told: int = 0

    def hear_of_followers(self) -> None:
        if not self.followed:
            self.followed = True
            if self.on_followed is not None:
                self.on_followed()
