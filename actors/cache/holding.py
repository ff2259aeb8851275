"""What a desk does while an owner's part of the key space is its own: it answers by itself.

See `lease.py` for the rules; the classes that answer are those that the owner uses.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from actors.cache.lease import HOLD_S, LEASE_S, MARGIN_S, WAIT_S, Grant, Kept
from actors.cache.policy import (
    Ask,
    Entries,
    Flights,
    Follow,
    Gone,
    Hit,
    Landing,
    Lead,
    Miss,
    Outcome,
    Scope,
    Sweep,
    Swept,
    jittered,
)
from actors.cache.under_way import Asked, Group, Led
from actors.ref import Clock, OwnerRef

TAKE_TIMEOUT_S = 0.25
"""How long look-ups wait while the lease is taken, in each of two steps."""
FIND_TIMEOUT_S = 0.25
KEEP_TIMEOUT_S = 5.0
LEASE_TIMEOUT_S = WAIT_S + 5.0
HOLD_ANSWER_S = 0.5
"""How long after the hold a holder waits for an answer, before it asks again."""
GIVE_BACK_TIMEOUT_S = 1.0
BACK_OFF_S = (0.05, 1.0)
KEEP_MESSAGE_BYTES = 1024 * 1024


class Surroundings(Protocol):
    """What a holding needs of the channel that it is a part of."""

    led: dict[str, Led]
    away: bool
    counts: Counter[str]
    sending: set[asyncio.Task[None]]

    def mint(self) -> str: ...

    def lead(self, ask: Ask, now: float, until_s: float) -> None:
        """This process leads it from now on."""

    def land(
        self, lead: Lead, value: bytes | None, error: bytes | None, ttl_s: float | None
    ) -> None: ...

    def resolve(self, asked: Asked, answer: Hit | Lead | Follow) -> None: ...

    def give_up(self, now: float) -> None:
        """Who leads for longer than it was given does so alone."""

    def lost(self, error: Exception) -> None:
        """The owner has not answered."""

    def swept(self, sweep: Sweep) -> None:
        """The owner has forgotten this."""

    def mind(self) -> None:
        """What is led is to be renewed again."""

    def free(self) -> None:
        """The lease is given back: what waited for that goes on."""

    def flush_soon(self) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class Tenure:
    """Owns what the holder of a lease keeps: entries, bounded as the owner's are.

    `stores`: the owner has entries still, and is asked for those that are missing here.
    """

    def __init__(self, number: int, until_s: float, grant: Grant) -> None:
        self.number = number
        self.until_s = until_s
        self.reads = grant.reads
        self.stores = grant.stores
        self.entries = Entries(grant.bytes_max, grant.scope_share)
        self.swept = Swept()
        self.made: dict[int, int] = {}  # sweeps that the owner has not heard of, and what they took
        self.over = False


class Holding:
    """Owns the lease while this process has it: what is kept, and who computes what, in the
    owner's place; and how it is taken, prolonged and given back.

    Bounded by what the owner may keep, and by the calls under way.

    Failure behaviour: a lease is used to its end by this process's own clock, whether or not the
    owner answers; what was stored under one is lost with the process.
    """

    def __init__(
        self,
        around: Surroundings,
        ref: OwnerRef,
        name: str,
        clock: Clock,
        pause: Callable[[float], Awaitable[None]],
        random: Callable[[], float],
    ) -> None:
        self.tenure: Tenure | None = None
        self.gated = False  # nothing is sent while the lease is taken
        self.giving = False  # no landing is sent while it is given back
        self._around = around
        self._ref = ref
        self._name = name
        self._clock = clock
        self._pause = pause
        self._random = random
        self._wanted = asyncio.Event()
        self._asked_s = float("-inf")
        self._number = 0
        self._owed: tuple[int, float] | None = None  # a lease that is to be given back, and its end
        self._stored: Tenure | None = None  # one whose entries are to be handed over
        self._here = Flights()
        self._before = Flights()  # those of the last lease, for who comes late for an outcome
        self._finds: list[Asked] = []  # for what the owner has left
        self._keeps: list[Kept] = []  # what the owner may have an older answer of

    # ------------------------------------------------------------------------ what the owner does

    def at(self, now: float) -> Tenure | None:
        """The lease, if it is ours now: by our own clock, whoever woke us up how late."""
        tenure = self.tenure
        if tenure is not None and now >= tenure.until_s:
            self._around.counts["leases_run_out"] += 1
            self.leave(tenure)
            return None
        return tenure

    def asked(self, now: float) -> None:
        """There is somebody whom a lease would serve."""
        self._asked_s = now

    def want(self) -> None:
        """There is something to ask."""
        self._wanted.set()

    def ask(
        self,
        tenure: Tenure,
        keys: Sequence[bytes],
        scope: Scope,
        read: bool,
        join: bool,
        patience_s: float,
        silence_s: float,
        stream: bool,
        now: float,
    ) -> list[Hit | Lead | Follow] | Group:
        """As `Channel.ask`."""
        answers: list[Any] = []
        missing: list[tuple[int, Ask]] = []
        asks_owner = read and tenure.stores and not self._around.away
        for key in keys:
            hit = tenure.entries.get(key, scope, now) if read else None
            if hit is not None:
                answers.append(hit)
                continue
            ask = Ask(key, scope, self._around.mint(), read, join, silence_s, stream)
            answer = self._join(ask, patience_s, now)
            if asks_owner and isinstance(answer, Lead):
                missing.append((len(answers), ask))
                answers.append(None)
            else:
                answers.append(answer)
        self._around.counts["hits_here"] += sum(isinstance(answer, Hit) for answer in answers)
        if not missing:
            return answers
        group = Group(asyncio.get_running_loop().create_future(), answers, len(missing))
        self._finds += [Asked(ask, patience_s, group, place) for place, ask in missing]
        self._around.flush_soon()
        return group

    def land(self, tenure: Tenure, landing: Landing, searched: bool, now: float) -> None:
        """Ends a flight, and stores what has a lifetime. `searched`: nobody stored an answer when
        it began."""
        if landing.flight is not None:
            self._here.land(landing.flight, landing.outcome, now)
        if landing.value is None or landing.ttl_s is None:
            return
        key, scope, value = landing.key, landing.scope, landing.value
        begun_s = float("-inf") if landing.age_s is None else now - landing.age_s
        counts = self._around.counts
        if tenure.swept.forbids(key, scope, begun_s, now):
            counts["invalidated_under_way"] += 1
            return
        ttl_s = jittered(landing.ttl_s, self._random())
        stored = tenure.entries.put(key, scope, value, ttl_s, now)
        counts["stored" if stored else "not_stored"] += 1
        if tenure.stores and not searched:
            self._keeps.append((key, scope, Hit(value, 0.0, ttl_s)))
            self._around.flush_soon()

    def outcome(self, flight: str) -> Outcome | None:
        """How a flight of ours ended that was led under a lease; None when the owner may know."""
        for flights in (self._here, self._before):
            outcome = flights.outcome(flight)
            if outcome is not None and not isinstance(outcome, Gone):
                return outcome
        return None if self.tenure is None else Gone()

    def give_up(self, flight: str, now: float) -> None:
        """It is led no longer."""
        self._here.land(flight, Gone(), now)

    def flush(self, tenure: Tenure, asks: list[Asked], landings: list[Landing]) -> None:
        """What waited while the lease was taken is answered here; what the owner has is found."""
        now = self._clock()
        for asked in asks:
            ask = asked.ask
            hit = tenure.entries.get(ask.key, ask.scope, now) if ask.read else None
            answer = hit or self._join(ask, asked.patience_s, now)
            if ask.read and tenure.stores and isinstance(answer, Lead):
                self._finds.append(asked)
            else:
                self._around.resolve(asked, answer)
        for landing in landings:
            self.land(tenure, landing, False, now)
        self._send(tenure)

    def _join(self, ask: Ask, patience_s: float, now: float) -> Lead | Follow:
        if not ask.join:
            return Lead(ask.key, ask.scope, None, now)
        answer = self._here.join(ask, now)
        if isinstance(answer, Follow):
            return answer
        if isinstance(answer, Miss):
            return Lead(ask.key, ask.scope, None, now)
        self._around.lead(ask, now, now + patience_s)
        return Lead(ask.key, ask.scope, ask.flight, now)

    # ---------------------------------------------------------------- what the owner still stores

    def _send(self, tenure: Tenure) -> None:
        if self._keeps:
            keeps, self._keeps = self._keeps, []
            self._around.spawn(self._send_keeps(tenure, keeps))
        if self._finds:
            finds, self._finds = self._finds, []
            self._around.spawn(self._send_finds(tenure, finds))

    async def _send_finds(self, tenure: Tenure, asks: list[Asked]) -> None:
        """For what is not here the owner may have an answer: it moves here."""
        places = [(one.ask.scope, one.ask.key) for one in asks]
        found: list[Hit | None] = [None] * len(asks)
        searched = False
        more: list[Kept] = []
        sent_s = self._clock()
        try:
            found, more, tenure.stores = await self._ref.ask(
                "find", self._name, tenure.number, places, timeout_s=FIND_TIMEOUT_S
            )
            searched = True
        except Exception as error:  # noqa: BLE001
            self._around.lost(error)
        now = self._clock()
        known = [(*place, hit) for place, hit in zip(places, found, strict=True) if hit is not None]
        known += [(scope, key, hit) for key, scope, hit in more]
        self._take_in(tenure, known, sent_s, now)
        for asked, hit in zip(asks, found, strict=True):
            ask = asked.ask
            lead = Lead(ask.key, ask.scope, ask.flight if ask.join else None, now)
            if hit is not None:
                if lead.flight is not None:
                    self._around.land(lead, hit.value, None, None)
                self._around.resolve(asked, hit)
                continue
            led = self._around.led.get(ask.flight)
            if led is not None:
                led.searched = searched
            self._around.resolve(asked, lead)

    def _take_in(
        self,
        tenure: Tenure,
        entries: list[tuple[Scope, bytes, Hit]],
        sent_s: float,
        now: float,
    ) -> None:
        """Entries that were the owner's; what is here already is younger. They may have left it as
        early as they were asked for, and have been swept since."""
        if tenure.over:
            return
        for scope, key, hit in entries:
            if tenure.entries.get(key, scope, now) is None and not tenure.swept.forbids(
                key, scope, sent_s - hit.age_s, now
            ):
                tenure.entries.put(key, scope, hit.value, hit.left_s, now, age_s=hit.age_s)

    async def _send_keeps(self, tenure: Tenure, keeps: list[Kept]) -> None:
        try:
            await self._ref.ask("keep", self._name, tenure.number, keeps, timeout_s=KEEP_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001
            self._around.lost(error)

    # ------------------------------------------------------------------ the lease: taken, given

    async def run(self) -> None:
        """While there is something to ask, and nobody else asks, has the lease; for ever."""
        while True:
            await self._wanted.wait()
            try:
                free = await self._ref.ask("lease", self._name, WAIT_S, timeout_s=LEASE_TIMEOUT_S)
            except Exception as error:  # noqa: BLE001
                self._around.lost(error)
                free = False
            self._before = Flights()
            tenure = await self._take() if free else None
            if tenure is not None:
                await self._stay(tenure)
            await self.settle()
            if tenure is None:
                if self._clock() - self._asked_s > WAIT_S:
                    self._wanted.clear()
                await self._pause(BACK_OFF_S[1])

    async def _take(self) -> Tenure | None:
        """The lease, between two messages: nothing else is under way while it is taken."""
        self.gated = True
        try:
            if self._around.sending:
                await asyncio.wait(self._around.sending, timeout=TAKE_TIMEOUT_S)
            if self._around.sending:
                return None
            self._number += 1
            until_s = self._clock() + LEASE_S
            self._owed = (self._number, until_s)
            try:
                grant = await self._ref.ask(
                    "take", self._name, self._number, timeout_s=TAKE_TIMEOUT_S
                )
            except Exception as error:  # noqa: BLE001
                self._around.lost(error)
                self.giving = True
                return None
            if grant is None:
                self._owed = None
                return None
            self._around.counts["leases"] += 1
            tenure = self.tenure = self._stored = Tenure(self._number, until_s, grant)
            now = self._clock()
            for sweep, age_s in grant.swept:
                tenure.swept.add(sweep, now - age_s)
            self._here = Flights()
            for led in self._around.led.values():
                led.abroad = False
                led.told = 0  # the owner has let it go
                ask = led.ask
                if not tenure.swept.forbids(ask.key, ask.scope, led.begun_s, now):
                    self._here.join(ask, now)
            return tenure
        finally:
            self.gated = False
            self._around.flush_soon()

    async def _stay(self, tenure: Tenure) -> None:
        """Keep the lease until it is recalled, or over."""
        while self.at(now := self._clock()) is tenure:
            self._around.give_up(now)
            for flight in self._around.led:
                self._here.renew(flight, now)
            self._here.lapse(now)
            try:
                told = await self._ref.ask(
                    "hold",
                    self._name,
                    tenure.number,
                    tenure.made,
                    HOLD_S,
                    timeout_s=HOLD_S + HOLD_ANSWER_S,
                )
            except Exception as error:  # noqa: BLE001
                self._around.lost(error)
                await self._pause(BACK_OFF_S[0])
                continue
            self._around.away = False
            goes_on = told is not None and not told.recalled
            if goes_on:
                tenure.until_s = now + LEASE_S
                self._owed = (tenure.number, tenure.until_s)
            elif not tenure.over:
                self.leave(tenure)
            if told is not None:
                await self._sweep(tenure, dict(told.sweeps))

    async def _sweep(self, tenure: Tenure, sweeps: dict[int, Sweep]) -> None:
        """What is swept is not found any more when this has begun; the rest takes its time."""
        tenure.made = {}  # the owner has heard of those: it has answered
        begun = []
        for number, sweep in sweeps.items():
            tenure.swept.add(sweep, self._clock())
            self._here.part(sweep)
            self._around.swept(sweep)
            begun.append((number, tenure.entries.sweep(sweep)))
        for number, steps in begun:
            dropped = 0
            for part in steps:
                dropped += part
                await asyncio.sleep(0)
            self._around.counts["swept"] += dropped
            tenure.made[number] = dropped

    def leave(self, tenure: Tenure) -> None:
        """From now on nothing is answered here; the owner is told by who keeps the lease."""
        tenure.over = True
        self.tenure = None
        self.giving = True
        now = self._clock()
        for led in self._around.led.values():
            led.said_s = now
        self._around.mind()
        self._send(tenure)

    async def settle(self) -> None:
        """What is held of a lease that is over, or was never heard of, goes back."""
        if self.tenure is not None:
            self.leave(self.tenure)
        if self._owed is not None:
            made = {} if self._stored is None else self._stored.made
            await self._give_back(*self._owed, made)
            self._owed = None
        if self._stored is not None:
            await self._hand_over(self._stored)
            self._stored = None

    async def _give_back(self, number: int, until_s: float, made: dict[int, int]) -> None:
        """Name the flights that are led here, until the owner answers or the lease is over."""
        back_off_s = BACK_OFF_S[0]
        while True:
            now = self._clock()
            flights = self._around.led.items()
            led = [(one.ask, now - one.begun_s) for name, one in flights if self._passes_on(name)]
            try:
                await self._ref.ask(
                    "give_back", self._name, number, led, made, timeout_s=GIVE_BACK_TIMEOUT_S
                )
                break
            except Exception as error:  # noqa: BLE001
                self._around.lost(error)
            self.giving = False  # what lands is dropped while the owner is away
            if self._clock() >= until_s + MARGIN_S:
                break
            await self._pause(back_off_s)
            back_off_s = min(2 * back_off_s, BACK_OFF_S[1])
        self.giving = False
        self._before, self._here = self._here, Flights()
        self._around.free()

    def _passes_on(self, flight: str) -> bool:
        """Whether those who ask for its key may follow it: not if it is older than a sweep."""
        return self._here.leads(flight) or self._here.outcome(flight) is not None

    async def _hand_over(self, tenure: Tenure) -> None:
        """What was stored here goes to the owner, a little at a time, while it takes it."""
        while entries := tenure.entries.pop_some(KEEP_MESSAGE_BYTES, self._clock()):
            try:
                if not await self._ref.ask(
                    "keep", self._name, tenure.number, entries, timeout_s=KEEP_TIMEOUT_S
                ):
                    return
            except Exception as error:  # noqa: BLE001
                self._around.lost(error)
                return
