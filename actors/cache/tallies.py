"""What each process has counted so far, at the cache's owner, and the sums of all of them.

Rule 1: a process tells all that it has counted since it began, never a difference: what is lost,
        doubled or late changes nothing, and an owner that restarts is told again.
Rule 2: what is counted is named by who counts; here they are numbers that are added up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import NamedTuple

from actors.ref import OwnerRef

DESKS_MAX = 2_000
NAMES_MAX = 500
"""Names of one desk; those beyond are not taken."""
TELL_AFTER_S = 1.0
TELL_AGAIN_S = 30.0
"""How often a desk says the same again, so that an owner which has restarted knows it too."""
TELL_TIMEOUT_S = 2.0
NOW = "now "
"""Names that begin so are of what a desk has now, and count while it is heard of."""
NOW_S = 2 * TELL_AGAIN_S + TELL_TIMEOUT_S

Tally = Mapping[str, tuple[int, ...]]
"""Numbers by name, each of which only this process adds to."""


class _Word(NamedTuple):
    number: int
    tally: Tally
    heard_s: float


class Tallies:
    """Owns the last word of DESKS_MAX desks, NAMES_MAX names of each, and the sum of those before.

    Who was not heard of for longest is added to that sum: with so many it is long gone.

    Failure behaviour: an owner that restarts knows what desks tell it again within TELL_AGAIN_S;
    what those counted that had ended before is lost.
    """

    def __init__(self, desks_max: int = DESKS_MAX) -> None:
        self._desks_max = desks_max
        self._words: OrderedDict[str, _Word] = OrderedDict()
        self._gone: dict[str, tuple[int, ...]] = {}

    def take(self, desk: str, number: int, tally: Tally, now: float) -> None:
        """A desk's word, the `number`-th that it has sent. An older one than is known is nothing.

        Safe to repeat.
        """
        known = self._words.get(desk)
        if known is not None and known.number >= number:
            return
        if known is None and len(self._words) >= self._desks_max:
            _, last = self._words.popitem(last=False)
            _add(self._gone, _counted(last.tally))
        self._words[desk] = _Word(number, dict(list(tally.items())[:NAMES_MAX]), now)
        self._words.move_to_end(desk)

    def sums(self, now: float) -> dict[str, tuple[int, ...]]:
        whole = dict(self._gone)
        for word in self._words.values():
            fresh = now - word.heard_s <= NOW_S
            _add(whole, word.tally if fresh else _counted(word.tally))
        return whole


def _counted(tally: Tally) -> Tally:
    return {name: numbers for name, numbers in tally.items() if not name.startswith(NOW)}


def _add(whole: dict[str, tuple[int, ...]], more: Tally) -> None:
    for name, numbers in more.items():
        pairs = zip_longest(whole.get(name, ()), numbers, fillvalue=0)
        whole[name] = tuple(a + b for a, b in pairs)


class TallyDesk:
    """Tells the owner what this process has counted: TELL_AFTER_S after a change, and now and then.

    Owns nothing but the number of its last word. `read` gives all that was counted.

    Failure behaviour: with the owner away nothing is told, and nothing lost but what a process that
    ends meanwhile had counted.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        read: Callable[[], Tally],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
    ) -> None:
        self._ref = ref
        self._name = f"{holder}-{nonce or secrets.token_hex(8)}"
        self._read = read
        self._pause = pause
        self._number = 0
        self._failures = 0
        self._untold = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def changed(self) -> None:
        """Something was counted."""
        self._untold.set()

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
        if self._untold.is_set():
            await self._tell()

    async def sums(self) -> dict[str, tuple[int, ...]]:
        """The sums of all processes, all that this one has counted included.

        Raises OwnerUnavailable.
        """
        self._number += 1
        self._untold.clear()
        word = (self._name, self._number, dict(self._read()))
        try:
            sums: dict[str, tuple[int, ...]] = await self._ref.ask(
                "tally", *word, timeout_s=TELL_TIMEOUT_S
            )
        except BaseException:
            self._failures += 1
            self._untold.set()
            raise
        return sums

    def stats(self) -> dict[str, int]:
        return {"told": self._number - self._failures, "failures": self._failures}

    async def _tell(self) -> None:
        with suppress(Exception):  # whatever it is, it is counted, and told again
            await self.sums()

    async def _tell_for_ever(self) -> None:
        """Nothing is told before there is something to tell."""
        await self._untold.wait()
        while True:
            await self._pause(TELL_AFTER_S)
            await self._tell()
            try:
                async with asyncio.timeout(TELL_AGAIN_S):
                    await self._untold.wait()
            except TimeoutError:
                pass  # the same again
