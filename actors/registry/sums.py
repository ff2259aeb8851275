"""What all processes have counted, added up: also those that have ended, and over owners' deaths.

Rule 1: a process tells how far each of its counts has come since it began, never a difference:
        what is lost, doubled or late changes nothing.
Rule 2: what a process has counted stays in the sums when the process is gone.
Rule 3: what somebody was shown is on disk first, so that no sum is ever seen to go back.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from actors.ref import OwnerRef, OwnerUnavailable
from actors.registry.policy import RegistryUnavailable

PROCESSES_MAX = 2_000
SERIES_MAX = 20_000
LABEL_VALUES_MAX = 200
OTHER = "other"
"""The value of every label that came when LABEL_VALUES_MAX others were there."""

SAVE_EVERY_S = 5.0
TELL_EVERY_S = 1.0
TELL_AGAIN_S = 30.0
"""How often a process that counts nothing is heard of."""
TELL_TIMEOUT_S = 2.0

Series = tuple[str, ...]
"""A family's name and the values of its labels."""
Numbers = tuple[int, ...]
"""Integers that are added up each by itself: a counter's one, or a histogram's buckets."""
Figures = Mapping[Series, Numbers]


@dataclass(slots=True)
class _Process:
    number: int
    counts: dict[Series, Numbers] = field(default_factory=dict)


class Sums:
    """Owns the sums, and how far PROCESSES_MAX processes had come at their last word.

    Bounds: SERIES_MAX sums, and LABEL_VALUES_MAX values of each label; what comes later is added
    under `other`. Of more processes than PROCESSES_MAX the one that was silent for longest is
    forgotten, while its part of the sums stays: a living one is heard of each TELL_AGAIN_S.
    """

    def __init__(self, saved: Iterable[tuple[str, int, str]] = ()) -> None:
        """`saved` are rows that `unsaved` gave, the oldest first."""
        self._processes: OrderedDict[str, _Process] = OrderedDict()
        self._forgotten: dict[Series, Numbers] = {}
        self._values: dict[tuple[str, int], dict[str, None]] = {}
        self._sums: dict[Series, Numbers] = {}
        self._changed: set[str] = set()
        for name, number, text in saved:
            if name:
                counts = {tuple(series): tuple(told) for series, told in json.loads(text)}
                self._processes[name] = _Process(number, counts)
                continue
            known = json.loads(text)
            self._forgotten = {tuple(series): tuple(told) for series, told in known["sums"]}
            for family, place, values in known["values"]:
                self._values[family, place] = dict.fromkeys(values)
        for series, told in self._forgotten.items():
            _add(self._sums, series, told)
        for process in self._processes.values():
            for series, told in process.counts.items():
                _add(self._sums, self._place(series), told)

    def take(self, name: str, number: int, since: int, figures: Figures) -> bool:
        """A process's `number`-th word: what has changed since its `since`-th; 0: all it counts.

        False: that one is not known here, so the process has to tell all. An older word than is
        known is nothing. Safe to repeat.
        """
        process = self._processes.get(name)
        if since > (0 if process is None else process.number):
            return False
        if process is None:
            while len(self._processes) >= PROCESSES_MAX:
                self._forget()
            process = self._processes[name] = _Process(0)
        self._processes.move_to_end(name)
        if number <= process.number:
            return True
        process.number = number
        for series, told in figures.items():
            before = process.counts.get(series, ())
            pairs = zip_longest(told, before, fillvalue=0)
            _add(self._sums, self._place(series), tuple(new - old for new, old in pairs))
            process.counts[series] = told
        if figures:
            self._changed |= {"", name}
        return True

    def sums(self) -> dict[Series, Numbers]:
        return dict(self._sums)

    def unsaved(self) -> tuple[list[tuple[str, int, str]], list[str]]:
        """Rows to write, and the names of rows to remove, since the last time this was asked."""
        names, self._changed = self._changed, set()
        rows = [(name, *self._row(name)) for name in sorted(names) if self._is_here(name)]
        return rows, [name for name in sorted(names) if not self._is_here(name)]

    def unsave(self, names: Iterable[str]) -> None:
        """Writing these has failed."""
        self._changed.update(names)

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def processes(self) -> int:
        return len(self._processes)

    def _is_here(self, name: str) -> bool:
        return not name or name in self._processes

    def _row(self, name: str) -> tuple[int, str]:
        if name:
            process = self._processes[name]
            return process.number, json.dumps(list(process.counts.items()))
        values = [(*place, list(known)) for place, known in self._values.items()]
        return 0, json.dumps({"sums": list(self._forgotten.items()), "values": values})

    def _forget(self) -> None:
        name, process = self._processes.popitem(last=False)
        for series, told in process.counts.items():
            _add(self._forgotten, self._place(series), told)
        self._changed |= {"", name}

    def _place(self, series: Series) -> Series:
        """The sum that a count belongs to. It is the same for ever: no value leaves the lists."""
        family = series[0]
        labels = [self._value(family, place, value) for place, value in enumerate(series[1:])]
        found = (family, *labels)
        if found not in self._sums and len(self._sums) >= SERIES_MAX:
            return (family, *[OTHER] * len(labels))
        return found

    def _value(self, family: str, place: int, value: str) -> str:
        known = self._values.setdefault((family, place), {})
        if value in known:
            return value
        if len(known) >= LABEL_VALUES_MAX:
            return OTHER
        known[value] = None
        return value


def _add(sums: dict[Series, Numbers], series: Series, more: Numbers) -> None:
    pairs = zip_longest(sums.get(series, ()), more, fillvalue=0)
    sums[series] = tuple(a + b for a, b in pairs)


class SumsDesk:
    """Tells the owner how far this process's counts have come, and asks for the sums of all.

    Owns what the owner has acknowledged of them. `read` gives all of this process's counts; what
    has changed is told each TELL_EVERY_S, and the last of it when this is closed. A change of
    `echoes` alone is no reason to tell anything: they are counts of this telling.

    Failure behaviour: with the owner away nothing is told and nothing lost, but the sums cannot be
    had. A process that is killed takes its last TELL_EVERY_S with it.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        read: Callable[[], Figures],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
        echoes: Collection[Series] = (),
    ) -> None:
        self._ref = ref
        self._echoes = frozenset(echoes)
        self._name = f"{holder}-{nonce or secrets.token_hex(8)}"
        self._read = read
        self._pause = pause
        self._number = 0
        self._told: dict[Series, Numbers] = {}
        self._told_number = 0
        self._silent_s = 0.0
        self._failures = 0
        self._line = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._tell_for_ever())

    async def close(self) -> None:
        """Tells the last of it, if the owner is there."""
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task])
        await self._tell()

    async def sums(self) -> dict[Series, Numbers]:
        """The sums of all processes, all that this one has counted so far included.

        Raises OwnerUnavailable, or RegistryUnavailable when the owner cannot write them down.
        """
        sums = await self._say(asked=True)
        assert sums is not None, "an owner that is asked tells them"
        return sums

    def stats(self) -> dict[str, int]:
        return {"told": self._number - self._failures, "failures": self._failures}

    async def _tell(self) -> None:
        news = _since(self._told, self._read()).keys() - self._echoes
        if not news and self._silent_s < TELL_AGAIN_S:
            return
        try:
            await self._say(asked=False)
        except (OwnerUnavailable, RegistryUnavailable):
            pass  # it is told with the next word

    async def _tell_for_ever(self) -> None:
        while True:
            await self._pause(TELL_EVERY_S)
            self._silent_s += TELL_EVERY_S
            await self._tell()

    async def _say(self, asked: bool) -> dict[Series, Numbers] | None:
        async with self._line:  # a word is about what has come since the one before
            while True:
                figures = dict(self._read())
                self._number += 1
                word = (self._number, self._told_number, _since(self._told, figures))
                known, sums = await self._ask(*word, asked)
                if known:
                    self._told, self._told_number = figures, word[0]
                    self._silent_s = 0.0
                    return sums
                self._told, self._told_number = {}, 0

    async def _ask(
        self, number: int, since: int, word: Figures, asked: bool
    ) -> tuple[bool, dict[Series, Numbers] | None]:
        try:
            answer: tuple[bool, dict[Series, Numbers] | None] = await self._ref.ask(
                "tally", self._name, number, since, word, asked, timeout_s=TELL_TIMEOUT_S
            )
        except BaseException:
            self._failures += 1
            raise
        return answer


def _since(told: Figures, figures: Figures) -> dict[Series, Numbers]:
    return {series: now for series, now in figures.items() if told.get(series) != now}
