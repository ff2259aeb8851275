"""What the Batcher's owner keeps of upstreams, lanes, and provider calls under way."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from actors.batcher.calls import Call, Unit
from actors.batcher.lane import LaneState, Upstream
from actors.batcher.policy import Caps, Lane, Text

PARAMS_MAX = 1000


class Answered:
    """Owns the sets of parameters that an upstream has answered to. Bounded by PARAMS_MAX.

    Failure behaviour: what is forgotten is known again with the next answer.
    """

    def __init__(self) -> None:
        self._params: dict[Any, None] = {}

    def add(self, params: Any) -> None:
        if params not in self._params:
            if len(self._params) >= PARAMS_MAX:
                del self._params[next(iter(self._params))]
            self._params[params] = None

    def __contains__(self, params: Any) -> bool:
        return params in self._params


@dataclass(slots=True, eq=False)
class Up:
    """An upstream, its lanes in which something waits, and when to look at them again."""

    state: Upstream = field(default_factory=Upstream)
    answered: Answered = field(default_factory=Answered)
    waiting: OrderedDict[tuple[Lane, Caps], Line] = field(default_factory=OrderedDict)
    ticking: bool = False
    timer: asyncio.Task[None] | None = None
    timer_s: float = 0.0


@dataclass(slots=True, eq=False)
class Line:
    """A lane: what waits in it, and its texts by what they say, queued and under way."""

    lane: Lane
    caps: Caps
    up: Up
    state: LaneState[Unit]
    queued: dict[bool, dict[Text, Unit]] = field(default_factory=lambda: {False: {}, True: {}})
    flying: dict[Text, Unit] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Tree:
    """The search for the bad texts of one refused call: how many were found, and whether a part
    of it was answered."""

    leaves: int = 0
    found: bool = False


@dataclass(slots=True, eq=False)
class Flight:
    """One provider call. `line` None: a caller's own, that nobody shares. `buyers` pay for it."""

    lane: Lane
    caps: Caps
    up: Up
    line: Line | None
    units: list[Unit]
    bulk: bool
    buyers: dict[Call, int]
    tree: Tree | None

    @property
    def ends_s(self) -> float:
        return max(call.deadline_s for call in self.buyers)

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units)

    @property
    def size(self) -> int:
        return sum(unit.size for unit in self.units)


def unlist(wanted: dict[Text, Unit], unit: Unit) -> None:
    """Take a text out of those that are known by what they say, if it is the one that is known."""
    if wanted.get(unit.text) is unit:
        del wanted[unit.text]
