"""A desk's line to one of the cache's owners: what is asked, led, followed and said goes over it.

A look-up is asked with `ask`: it is answered from what is near, or waits in a group for the next
message (`_flush`, `_send_asks`). Who leads lands (`land`, `_send_landings`), who follows listens
(`listen`, `_hear`). While the desk holds the owner's part of the key space on a lease, `holding.py`
answers all of them.
"""

from __future__ import annotations

import asyncio
import random as stdlib_random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from actors.cache.following import Ear, Listening
from actors.cache.holding import Holding
from actors.cache.lease import LEASE_S, RECALL_S
from actors.cache.policy import (
    PIECE_OVERHEAD_BYTES,
    SPEECH_BYTES_MAX,
    Answer,
    Ask,
    Entries,
    Follow,
    Gone,
    Hit,
    Landing,
    Lead,
    Miss,
    News,
    Outcome,
    Scope,
    Searching,
    Sweep,
    Swept,
    leader_of,
)
from actors.cache.under_way import Asked, Group, Led
from actors.ref import Clock, OwnerRef

LOOKUP_TIMEOUT_S = 0.25
"""The most that an unreachable owner costs a request, and it costs that once per outage."""
SEARCH_TIMEOUT_S = RECALL_S + LOOKUP_TIMEOUT_S
LAND_TIMEOUT_S = 5.0
INVALIDATE_TIMEOUT_S = LEASE_S + LAND_TIMEOUT_S
FOLLOW_HOLD_S = 10.0
START_WAIT_S = 2.0
SILENCE_S = 3.0
RENEW_EVERY_S = 1.0
BACK_OFF_S = (0.05, 1.0)
ASKS_PER_MESSAGE_MAX = 256
LANDING_MESSAGE_BYTES = 2 * 1024 * 1024
"""Values that travel in one message, so that a long list of them holds nobody else's up."""
LANDING_BYTES_MAX = 64 * 1024 * 1024
"""Most bytes of values on their way to the owner; beyond, a flight lands empty."""
SAY_MESSAGE_BYTES = 256 * 1024
NEAR_BYTES_MAX = 16 * 1024 * 1024
NEAR_TTL_S = 1.0
"""What the owner has dropped, or has anew, is told from here for so long at the most."""
FOLLOWS_MAX = 10_000


class Channel:
    """Owns this process's business with one owner: look-ups under way, the flights it leads, those
    it follows.

    Look-ups of one tick are one message (ASKS_PER_MESSAGE_MAX at most), together with those that
    came while the last message was under way; so are landings, and the pieces of streams that are
    followed. All followers of a flight in this process share what is heard of it, flights that are
    listened to from one tick on share one held message, and those of a flight that is led here need
    none. Bounded by the calls under way, NEAR_BYTES_MAX of answers that were hits a moment ago,
    `Holding` while there is a lease, LANDING_BYTES_MAX of values waiting to be sent,
    SPEECH_BYTES_MAX of pieces for each stream, and FOLLOWS_MAX flights followed; beyond the last, a
    request computes alone.

    Failure behaviour: fails open. Without an answer in LOOKUP_TIMEOUT_S the caller leads, and until
    the owner answers a probe again every look-up is answered at once, without asking. Landings that
    cannot be delivered are dropped and counted. Flights are renewed while they are led, so that
    followers elsewhere learn within SILENCE_S that this process is dead. A stream's pieces that
    cannot be delivered are told by its end. With a lease, see `Holding`.
    """

    def __init__(
        self,
        ref: OwnerRef,
        name: str,
        clock: Clock,
        pause: Callable[[float], Awaitable[None]],
        random: Callable[[], float] = stdlib_random.random,
    ) -> None:
        """`name` is nobody else's, and without a hyphen at its end."""
        self._ref = ref
        self._name = name
        self._clock = clock
        self._pause = pause
        self.minted = 0
        self._near = Entries(NEAR_BYTES_MAX)
        self._swept = Swept()
        self._asks: list[Asked] = []
        self._landings: list[Landing] = []
        self._landing_bytes = 0
        self._flush_due = False
        self._looking = False  # a message of look-ups is under way
        self._landing = False  # and one of landings
        self.led: dict[str, Led] = {}
        self._ears: dict[str, Ear] = {}
        self._unheard: dict[str, Ear] = {}  # to be listened to with the next message
        self._untold: dict[str, Led] = {}  # streams that have pieces to be told
        self._saying = False
        self._attending: asyncio.Task[None] | None = None
        self.sending: set[asyncio.Task[None]] = set()
        self._hearing: set[asyncio.Task[None]] = set()
        self.away = False
        self._busy = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._last_error: str | None = None
        self.counts: Counter[str] = Counter()
        self._holding = Holding(self, ref, name, clock, pause, random)

    async def start(self) -> None:
        """Finds the owner, waiting START_WAIT_S for it at the most."""
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [
                loop.create_task(self._mind_for_ever()),
                loop.create_task(self._holding.run()),
            ]
            await self._probe(START_WAIT_S)

    async def close(self) -> None:
        """Lands what was promised and gives back what was lent, as far as the owner answers."""
        deadline = self._clock() + LAND_TIMEOUT_S
        own, self._tasks = self._tasks, []
        await _end(own)
        try:
            async with asyncio.timeout(LAND_TIMEOUT_S):
                await self._holding.settle()
        except TimeoutError:
            self._holding.giving = False  # the owner waits until the lease is over
        while (self._landings or self.sending) and self._clock() < deadline:
            self._flush()
            if self.sending:
                await asyncio.wait(self.sending, timeout=LAND_TIMEOUT_S)
        attending = [] if self._attending is None else [self._attending]
        self._attending = None
        await _end([*self.sending, *self._hearing, *attending])

    def near(self, key: bytes, scope: Scope) -> Hit | None:
        """The stored answer, where it is known here without asking."""
        now = self._clock()
        tenure = self._holding.at(now)
        if tenure is not None:
            hit = tenure.entries.get(key, scope, now) if tenure.reads else None
            self.counts["hits_here"] += hit is not None
        else:
            hit = self._near.get(key, scope, now)
            self.counts["near_hits"] += hit is not None
        if hit is not None:
            self._holding.asked(now)
        return hit

    def ask(
        self,
        keys: Sequence[bytes],
        scope: Scope,
        read: bool,
        join: bool,
        patience_s: float,
        stream: bool,
    ) -> list[Hit | Lead | Follow] | Group:
        """What is known of each key, in their order; or what to wait for with `answers`."""
        now = self._clock()
        self._holding.asked(now)
        tenure = self._holding.at(now)
        if tenure is not None and read and not tenure.reads:
            self._holding.leave(tenure)
            tenure = None
        if tenure is not None:
            return self._holding.ask(
                tenure, keys, scope, read, join, patience_s, SILENCE_S, stream, now
            )
        near = [self._near.get(key, scope, now) if read else None for key in keys]
        left = near.count(None)
        self.counts["near_hits"] += len(keys) - left
        if self.away or not left or not (read or join):
            self.counts["unasked"] += left
            return [hit or Lead(key, scope, None, now) for key, hit in zip(keys, near, strict=True)]
        self._holding.want()
        silence_s = min(SILENCE_S, patience_s)
        group = Group(asyncio.get_running_loop().create_future(), near, left)
        for place, key in enumerate(keys):
            if near[place] is not None:
                continue
            ask = Ask(key, scope, self.mint(), read, join, silence_s, stream)
            self._asks.append(Asked(ask, patience_s, group, place))
        self.flush_soon()
        return group

    async def answers(self, group: Group) -> list[Hit | Lead | Follow]:
        try:
            return await group.future
        except asyncio.CancelledError:
            for answer in group.answers:  # the others are declined when they come
                self._decline(answer)
            raise

    def listen(self, flight: str) -> Listening:
        """Follow a flight piece by piece, from its beginning."""
        ear = self._ears.get(flight)
        if ear is None:
            ear = self._new_ear(flight)
        return Listening(ear, lambda: self._drop_ear(flight, ear))

    def say(self, flight: str, piece: bytes) -> None:
        """The next piece of a stream that we lead; it goes out if somebody follows."""
        led = self.led.get(flight)
        if led is None:
            return
        led.piece_bytes += len(piece) + PIECE_OVERHEAD_BYTES
        if led.piece_bytes <= SPEECH_BYTES_MAX:  # beyond, the end tells the rest
            led.pieces.append(piece)
            if flight in self._ears:
                self._ears[flight].ring()
        if led.abroad and led.told < len(led.pieces):
            self._untold[flight] = led
            self.flush_soon()

    def is_followed(self, flight: str) -> bool:
        led = self.led.get(flight)
        return led is not None and led.followed

    def on_followed(self, flight: str, callback: Callable[[], None]) -> None:
        """Call `callback` once, when somebody begins to follow this stream: now, if so already."""
        led = self.led.get(flight)
        if led is None:
            return
        if led.followed:
            callback()
        else:
            led.on_followed = callback

    def land(
        self, lead: Lead, value: bytes | None, error: bytes | None, ttl_s: float | None
    ) -> None:
        """Ends what was led; see `CacheDesk.land`."""
        self._near.remove(lead.key, lead.scope)
        now, flight = self._clock(), lead.flight
        led = None
        if flight is not None:
            self._untold.pop(flight, None)  # its end tells the rest
            led = self.led.pop(flight, None)
            if led is None:
                # Landed before, or given up as too slow; a whole value is still worth keeping.
                flight = None
        if flight is None and (value is None or ttl_s is None):
            return
        age_s = None if lead.begun_s is None else now - lead.begun_s
        landing = Landing(lead.key, lead.scope, flight, value, error, ttl_s, age_s)
        if flight is not None:
            self._tell_ear(flight, landing.outcome)
        tenure = self._holding.at(now)
        if tenure is not None:
            self._holding.land(tenure, landing, led is not None and led.searched, now)
            return
        size = _size(landing)
        if self._landing_bytes + size > LANDING_BYTES_MAX:
            self.counts["landings_emptied"] += 1
            landing = Landing(lead.key, lead.scope, flight, None, None, ttl_s, age_s)
            size = 0
        self._landings.append(landing)
        self._landing_bytes += size
        self.flush_soon()

    async def invalidate(self, scope: Scope | None, model: str | None, key: bytes | None) -> int:
        """Asks the owner to; returns how many answers that were. Raises OwnerUnavailable."""
        self.swept(Sweep.of(scope, model, key))
        dropped: int = await self._ref.ask(
            "invalidate", scope, model, key, timeout_s=INVALIDATE_TIMEOUT_S
        )
        self.swept(Sweep.of(scope, model, key))
        return dropped

    def held(self) -> tuple[int, int, int]:
        """What is kept on a lease: entries, their bytes, and how many gave way."""
        tenure = self._holding.tenure
        if tenure is None:
            return 0, 0, 0
        entries = tenure.entries
        return len(entries), entries.bytes, entries.evicted

    def stats(self) -> dict[str, Any]:
        tenure = self._holding.tenure
        return {
            "away": self.away,
            "leased": tenure is not None,
            "leading": len(self.led),
            "following": len(self._ears),
            "landing_bytes": self._landing_bytes,
            "near_bytes": self._near.bytes if tenure is None else tenure.entries.bytes,
            "last_error": self._last_error,
            **self.counts,
        }

    # ------------------------------------------------------------------------------ looking up

    def mint(self) -> str:
        self.minted += 1
        return f"{self._name}-{self.minted}"

    def _decline(self, answer: Answer | None) -> None:
        """Nobody is there to take this answer: a lead must not be left hanging."""
        if isinstance(answer, Lead):
            self.land(answer, None, None, None)

    def resolve(self, asked: Asked, answer: Hit | Lead | Follow) -> None:
        group = asked.group
        group.answers[asked.place] = answer
        group.left -= 1
        if group.future.cancelled():
            self._decline(answer)
        elif group.left == 0:
            group.future.set_result(group.answers)

    def flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send what waits, at once when no message of its kind is under way. What comes while one
        is goes with the next, so that messages grow with the load and their number does not."""
        self._flush_due = False
        if self._holding.gated:
            return
        tenure = self._holding.at(self._clock())
        if tenure is not None:
            asks, self._asks = self._asks, []
            landings, self._landings = self._landings, []
            self._landing_bytes -= sum(map(_size, landings))
            self._holding.flush(tenure, asks, landings)
        if self._landings and not self._landing and not self._holding.giving:
            landings = self._some_landings()
            self._landing = True
            self.spawn(self._send_landings(landings))
        if self._untold and not self._saying:
            self._saying = True
            self.spawn(self._send_says())
        if self._unheard:
            ears, self._unheard = self._unheard, {}
            task = asyncio.get_running_loop().create_task(self._hear(ears))
            self._hearing.add(task)
            task.add_done_callback(self._hearing.discard)
        if self._asks and not self._looking:
            asks = self._asks[:ASKS_PER_MESSAGE_MAX]
            del self._asks[:ASKS_PER_MESSAGE_MAX]
            self._looking = True
            self.spawn(self._send_asks(asks))

    def _some_landings(self) -> list[Landing]:
        """As many of those that wait as travel together; one at least."""
        size = 0
        for count, landing in enumerate(self._landings):
            size += len(landing.value or b"")
            if count and size > LANDING_MESSAGE_BYTES:
                break
        else:
            count = len(self._landings)
        landings = self._landings[:count]
        del self._landings[:count]
        return landings

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self.sending.add(task)
        task.add_done_callback(self.sending.discard)

    async def _send_asks(self, asks: list[Asked], verb: str = "lookup") -> None:
        """Those that a `lookup` has to search for travel on as a `search`, beside the next one."""
        sent_s = self._clock()
        timeout_s = LOOKUP_TIMEOUT_S if verb == "lookup" else SEARCH_TIMEOUT_S
        answers: list[Answer | Searching]
        try:
            answers = await self._ref.ask(verb, [asked.ask for asked in asks], timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, no request fails for it. The owner may have executed the message, so
            # these lead under the flights they asked for.
            self.lost(error)
            answers = [
                Lead(one.ask.key, one.ask.scope, one.ask.flight if one.ask.join else None)
                for one in asks
            ]
        finally:
            if verb == "lookup":
                self._looking = False
                if self._asks:
                    self.flush_soon()
        searching = [
            asked
            for asked, answer in zip(asks, answers, strict=True)
            if isinstance(answer, Searching)
        ]
        if searching:
            self.spawn(self._send_asks(searching, "search"))
        for asked, answer in zip(asks, answers, strict=True):
            ask = asked.ask
            if isinstance(answer, Searching):
                continue
            if isinstance(answer, Miss):
                answer = Lead(ask.key, ask.scope, None, sent_s)
            elif isinstance(answer, Hit):
                self.counts["hits"] += 1
                ttl_s, now = min(answer.left_s, NEAR_TTL_S), self._clock()
                # An answer that a sweep has overtaken is for nobody else.
                if not self._swept.forbids(ask.key, ask.scope, sent_s, now):
                    self._near.put(ask.key, ask.scope, answer.value, ttl_s, now, age_s=answer.age_s)
            elif isinstance(answer, Lead):
                answer = Lead(ask.key, ask.scope, answer.flight, sent_s)
                if answer.flight is not None:
                    self.lead(ask, sent_s, sent_s + asked.patience_s)
                    self._busy.set()
                    if ask.stream:
                        self._attend_soon()
            self.resolve(asked, answer)

    def lead(self, ask: Ask, now: float, until_s: float) -> None:
        """This process leads it from now on."""
        self.led[ask.flight] = Led(ask, now, now, until_s)

    async def _send_landings(self, landings: list[Landing]) -> None:
        try:
            if self.away:
                self.counts["landings_dropped"] += len(landings)
            else:
                await self._ref.ask("land", landings, timeout_s=LAND_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001
            self.counts["landings_dropped"] += len(landings)
            self.lost(error)
        finally:
            self._landing = False
            if self._landings:
                self.flush_soon()
            self._landing_bytes -= sum(map(_size, landings))

    # ------------------------------------------------------------------- for who holds the lease

    def swept(self, sweep: Sweep) -> None:
        """The owner has forgotten this."""
        self._swept.add(sweep, self._clock())
        # All of a scope rather than a model's: a second's worth, and looking for it takes longer.
        self._near.invalidate(sweep if sweep.key is not None else Sweep(sweep.scope))

    def mind(self) -> None:
        """What is led is to be renewed again."""
        if self.led:
            self._busy.set()

    def free(self) -> None:
        """The lease is given back: what waited for that goes on."""
        if self._attending is not None:  # it asks for others than those of before the lease
            self._attending.cancel()
            self._attending = None
        if any(led.ask.stream for led in self.led.values()):
            self._attend_soon()
        self.flush_soon()

    # ------------------------------------------------------------------------------- following

    def _new_ear(self, flight: str) -> Ear:
        led = self.led.get(flight)
        if led is not None:
            ear = self._ears[flight] = Ear(led.pieces)  # it is led here: nobody has to be asked
            led.hear_of_followers()
            return ear
        ear = Ear()
        known = self._outcome_here(flight)
        if known is not None:
            ear.outcome = known
        elif len(self._ears) >= FOLLOWS_MAX:
            ear.outcome = Gone()
        else:
            self._ears[flight] = self._unheard[flight] = ear
            self.flush_soon()
        return ear

    def _outcome_here(self, flight: str) -> Outcome | None:
        """How a flight of ours ended that was led under a lease; None when the owner may know."""
        return self._holding.outcome(flight) if leader_of(flight) == self._name else None

    def _tell_ear(self, flight: str, outcome: Outcome) -> None:
        """A flight that is led here has ended."""
        ear = self._ears.get(flight)
        if ear is not None:
            ear.outcome = outcome
            ear.ring()
            self._drop_ear(flight, ear)

    async def _hear(self, ears: dict[str, Ear]) -> None:
        """One held message for these flights. Those still in the air go with the next one."""
        wants = [(flight, len(ear.pieces)) for flight, ear in ears.items()]
        news: list[News]
        timeout_s = FOLLOW_HOLD_S + LAND_TIMEOUT_S
        try:
            news = await self._ref.ask(
                "hear", wants, FOLLOW_HOLD_S, self._name, timeout_s=timeout_s
            )
        except Exception as error:  # noqa: BLE001
            self.lost(error)
            news = [News(outcome=Gone())] * len(wants)
        for (flight, ear), one in zip(ears.items(), news, strict=True):
            ear.pieces += one.pieces
            ear.outcome = one.outcome
            if one:
                ear.ring()
            if one.outcome is not None:
                self._drop_ear(flight, ear)
            elif ear.listeners:
                self._unheard[flight] = ear
                self.flush_soon()

    def _drop_ear(self, flight: str, ear: Ear) -> None:
        if self._ears.get(flight) is ear:
            del self._ears[flight]
        if self._unheard.get(flight) is ear:
            del self._unheard[flight]

    # ----------------------------------------------------------------------- saying what we lead

    def _attend_soon(self) -> None:
        if self._attending is None:
            self._attending = asyncio.get_running_loop().create_task(self._attend())

    async def _attend(self) -> None:
        """While we lead streams that others may follow, learn which of them are followed."""
        timeout_s = FOLLOW_HOLD_S + LAND_TIMEOUT_S
        while self._holding.tenure is None and any(led.ask.stream for led in self.led.values()):
            known = [flight for flight, led in self.led.items() if led.abroad]
            try:
                followed = await self._ref.ask(
                    "followed", self._name, known, FOLLOW_HOLD_S, timeout_s=timeout_s
                )
            except Exception as error:  # noqa: BLE001
                self.lost(error)
                await self._pause(RENEW_EVERY_S)
                continue
            for flight in followed:
                led = self.led.get(flight)
                if led is not None:
                    led.abroad = True
                    led.hear_of_followers()
        self._attending = None

    async def _send_says(self) -> None:
        size = 0
        said = []
        for flight, led in self._untold.items():
            said.append((flight, led.told, led.pieces[led.told :]))
            size += sum(map(len, said[-1][2]))
            if size > SAY_MESSAGE_BYTES:
                break
        for flight, _, _ in said:
            del self._untold[flight]
        try:
            await self._ref.ask("say", said, timeout_s=LAND_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001
            self.lost(error)
        else:
            self.counts["pieces"] += sum(len(pieces) for _, _, pieces in said)
            for flight, start, pieces in said:
                led_now = self.led.get(flight)
                if led_now is not None:
                    led_now.told = start + len(pieces)
                    if led_now.told < len(led_now.pieces):
                        self._untold[flight] = led_now
        finally:
            self._saying = False
            if self._untold:
                self.flush_soon()

    # ---------------------------------------------------------------------- in the background

    def lost(self, error: Exception) -> None:
        self.counts["failures"] += 1
        self._last_error = f"{type(error).__name__}: {error}"
        self.away = bool(self._tasks)  # only a started desk can find the owner again
        self._busy.set()

    async def _mind_for_ever(self) -> None:
        """While the owner is away, looks for it; while flights are led, says so."""
        back_off_s = BACK_OFF_S[0]
        while True:
            await self._busy.wait()
            if self.away:
                await self._pause(back_off_s)
                back_off_s = min(2 * back_off_s, BACK_OFF_S[1])
                await self._probe(LAND_TIMEOUT_S)
                continue
            back_off_s = BACK_OFF_S[0]
            await self._pause(RENEW_EVERY_S)
            await self._renew()
            if not self.led and not self.away:
                self._busy.clear()

    async def _probe(self, timeout_s: float) -> None:
        try:
            await self._ref.ask("protocol", timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001
            self.lost(error)
        else:
            self.away = False

    async def _renew(self) -> None:
        now = self._clock()
        self.give_up(now)
        if self._holding.at(now) is not None:
            return
        due = [f for f, led in self.led.items() if now - led.said_s >= RENEW_EVERY_S / 2]
        if not due:
            return
        try:
            lost = await self._ref.ask("renew", due, timeout_s=SILENCE_S)
        except Exception as error:  # noqa: BLE001
            self.lost(error)
            return
        for flight in due:
            if flight in self.led:
                self.led[flight].said_s = now
        self.counts["renewed"] += len(due) - len(lost)

    def give_up(self, now: float) -> None:
        """Who leads for longer than it was given does so alone."""
        for flight in [flight for flight, led in self.led.items() if led.until_s <= now]:
            del self.led[flight]
            self._untold.pop(flight, None)
            self._holding.give_up(flight, now)
            self._tell_ear(flight, Gone())
            self.counts["given_up"] += 1


def _size(landing: Landing) -> int:
    return len(landing.value or b"") + len(landing.error or b"")


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
