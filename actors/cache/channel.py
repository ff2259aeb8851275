"""A desk's line to one of the cache's owners: what is asked, led, followed and said goes over it.

While the desk holds the owner's part of the key space on a lease (`lease.py`), nothing does: what
is asked is answered here, by the same classes that the owner uses.
"""

from __future__ import annotations

import asyncio
import random as stdlib_random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.cache.lease import HOLD_S, LEASE_S, MARGIN_S, RECALL_S, WAIT_S, Grant, Kept
from actors.cache.policy import (
    PIECE_OVERHEAD_BYTES,
    SPEECH_BYTES_MAX,
    Answer,
    Ask,
    Entries,
    Failed,
    Flights,
    Follow,
    Gone,
    Hit,
    Landed,
    Landing,
    Lead,
    Miss,
    News,
    Outcome,
    Scope,
    Searching,
    Sweep,
    Swept,
    jittered,
    leader_of,
)
from actors.ref import Clock, OwnerRef

LOOKUP_TIMEOUT_S = 0.25
"""The most that an unreachable owner costs a request, and it costs that once per outage."""
SEARCH_TIMEOUT_S = RECALL_S + LOOKUP_TIMEOUT_S
LAND_TIMEOUT_S = 5.0
FOLLOW_HOLD_S = 10.0
START_WAIT_S = 2.0
SILENCE_S = 3.0
RENEW_EVERY_S = 1.0
BACK_OFF_S = (0.05, 1.0)
HOLD_ANSWER_S = 0.5
"""How long after the hold a holder waits for an answer, before it asks again."""
GIVE_BACK_TIMEOUT_S = 1.0
ASKS_PER_MESSAGE_MAX = 256
LANDING_MESSAGE_BYTES = 2 * 1024 * 1024
"""Values that travel in one message, so that a long list of them holds nobody else's up."""
LANDING_BYTES_MAX = 64 * 1024 * 1024
"""Most bytes of values on their way to the owner; beyond, a flight lands empty."""
KEEP_MESSAGE_BYTES = 1024 * 1024
SAY_MESSAGE_BYTES = 256 * 1024
NEAR_BYTES_MAX = 16 * 1024 * 1024
NEAR_TTL_S = 1.0
"""What the owner has dropped, or has anew, is told from here for so long at the most."""
FOLLOWS_MAX = 10_000


class FlightFailed(Exception):
    """The call that this request shared has failed; `error` is what its leader landed."""

    def __init__(self, error: bytes) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True, slots=True)
class Joined:
    """The answer of somebody else's call, which ran at the same time."""

    value: bytes


@dataclass(slots=True)
class _Asked:
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
class _Held:
    """A flight that this process leads: when it was last spoken of, and how long it may take.

    Of a stream, `pieces` are what it has said so far, of which the owner knows `told`. `searched`:
    nobody stored an answer when it began.
    """

    ask: Ask
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


@dataclass(slots=True, eq=False)
class _Ear:
    """A flight that is followed here: what was heard of it, and how many are listening."""

    pieces: list[bytes] = field(default_factory=list)
    outcome: Outcome | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: int = 0

    def ring(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class _Tenure:
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
        self.over = False


class Listening:
    """One follower of a flight. `taken` are the pieces of a stream that it has been handed.

    Close it. Failure behaviour: a leader that is lost, and an owner, end it with None.
    """

    def __init__(self, channel: Channel, flight: str, ear: _Ear) -> None:
        self._channel = channel
        self._flight = flight
        self._ear = ear
        self._taken = 0
        self._closed = False
        ear.listeners += 1

    @property
    def taken(self) -> list[bytes]:
        return self._ear.pieces[: self._taken]

    async def more(self, patience_s: float) -> list[bytes] | Joined | None:
        """The pieces that have come since; the whole value at the end; None when it is lost, or
        after `patience_s` seconds. Raises FlightFailed with the leader's error."""
        ear = self._ear
        if len(ear.pieces) == self._taken and ear.outcome is None:
            try:
                async with asyncio.timeout(max(0.0, patience_s)):
                    await ear.changed.wait()
            except TimeoutError:
                return None
        pieces = ear.pieces[self._taken :]
        if pieces:
            self._taken = len(ear.pieces)
            return pieces
        if isinstance(ear.outcome, Landed):
            return Joined(ear.outcome.value)
        if isinstance(ear.outcome, Failed):
            raise FlightFailed(ear.outcome.error)
        return None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._channel._leave(self._flight, self._ear)


class Channel:
    """Owns this process's business with one owner: look-ups under way, the flights it leads, those
    it follows, and the lease while it has it.

    Look-ups of one tick are one message (ASKS_PER_MESSAGE_MAX at most), together with those that
    came while the last message was under way; so are landings, and the pieces of streams that are
    followed. All followers of a flight in this process share what is heard of it, flights that are
    listened to from one tick on share one held message, and those of a flight that is led here need
    none. Bounded by the calls under way, NEAR_BYTES_MAX of answers that were hits a moment ago, or
    what the owner may keep while there is a lease, LANDING_BYTES_MAX of values waiting to be sent,
    SPEECH_BYTES_MAX of pieces for each stream, and FOLLOWS_MAX flights followed; beyond the last, a
    request computes alone.

    Failure behaviour: fails open. Without an answer in LOOKUP_TIMEOUT_S the caller leads, and until
    the owner answers a probe again every look-up is answered at once, without asking. Landings that
    cannot be delivered are dropped and counted. Flights are renewed while they are led, so that
    followers elsewhere learn within SILENCE_S that this process is dead. A stream's pieces that
    cannot be delivered are told by its end. A lease is used to its end by this process's own clock,
    whether or not the owner answers; what was stored under one is lost with the process.
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
        self._random = random
        self._minted = 0
        self._near = Entries(NEAR_BYTES_MAX)
        self._asks: list[_Asked] = []
        self._landings: list[Landing] = []
        self._landing_bytes = 0
        self._flush_due = False
        self._looking = False  # a message of look-ups is under way
        self._landing = False  # and one of landings
        self._held: dict[str, _Held] = {}
        self._ears: dict[str, _Ear] = {}
        self._unheard: dict[str, _Ear] = {}  # to be listened to with the next message
        self._untold: dict[str, _Held] = {}  # streams that have pieces to be told
        self._saying = False
        self._attending: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._hearing: set[asyncio.Task[None]] = set()
        self._away = False
        self._busy = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._last_error: str | None = None
        self._counts: Counter[str] = Counter()
        # The lease.
        self._wanted = asyncio.Event()
        self._asked_s = float("-inf")
        self._number = 0
        self._gated = False  # nothing is sent while the lease is taken
        self._giving = False  # no landing is sent while it is given back
        self._tenure: _Tenure | None = None
        self._owed: tuple[int, float] | None = None  # a lease that is to be given back, and its end
        self._stored: _Tenure | None = None  # one whose entries are to be handed over
        self._here = Flights()
        self._before = Flights()  # those of the last lease, for who comes late for an outcome
        self._finds: list[_Asked] = []  # for what the owner has left
        self._keeps: list[Kept] = []  # what the owner may have an older answer of

    async def start(self) -> None:
        """Finds the owner, waiting START_WAIT_S for it at the most."""
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [
                loop.create_task(self._mind_for_ever()),
                loop.create_task(self._lease_for_ever()),
            ]
            await self._probe(START_WAIT_S)

    async def close(self) -> None:
        """Lands what was promised and gives back what was lent, as far as the owner answers."""
        deadline = self._clock() + LAND_TIMEOUT_S
        own, self._tasks = self._tasks, []
        await _end(own)
        try:
            async with asyncio.timeout(LAND_TIMEOUT_S):
                await self._settle_lease()
        except TimeoutError:
            self._giving = False  # the owner waits until the lease is over
        while (self._landings or self._sending) and self._clock() < deadline:
            self._flush()
            if self._sending:
                await asyncio.wait(self._sending, timeout=LAND_TIMEOUT_S)
        attending = [] if self._attending is None else [self._attending]
        self._attending = None
        await _end([*self._sending, *self._hearing, *attending])

    def near(self, key: bytes, scope: Scope) -> Hit | None:
        """The stored answer, where it is known here without asking."""
        now = self._clock()
        tenure = self._tenure_at(now)
        if tenure is not None:
            hit = tenure.entries.get(key, scope, now) if tenure.reads else None
            self._counts["hits_here"] += hit is not None
        else:
            hit = self._near.get(key, scope, now)
            self._counts["near_hits"] += hit is not None
        if hit is not None:
            self._asked_s = now
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
        now = self._asked_s = self._clock()
        tenure = self._tenure_at(now)
        if tenure is not None and read and not tenure.reads:
            self._leave_tenure(tenure)
            tenure = None
        if tenure is not None:
            return self._ask_here(tenure, keys, scope, read, join, patience_s, stream, now)
        near = [self._near.get(key, scope, now) if read else None for key in keys]
        left = near.count(None)
        self._counts["near_hits"] += len(keys) - left
        if self._away or not left or not (read or join):
            self._counts["unasked"] += left
            return [hit or Lead(key, scope, None, now) for key, hit in zip(keys, near, strict=True)]
        self._wanted.set()
        silence_s = min(SILENCE_S, patience_s)
        group = Group(asyncio.get_running_loop().create_future(), near, left)
        for place, key in enumerate(keys):
            if near[place] is not None:
                continue
            ask = Ask(key, scope, self._mint(), read, join, silence_s, stream)
            self._asks.append(_Asked(ask, patience_s, group, place))
        self._flush_soon()
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
        return Listening(self, flight, ear)

    def say(self, flight: str, piece: bytes) -> None:
        """The next piece of a stream that we lead; it goes out if somebody follows."""
        held = self._held.get(flight)
        if held is None:
            return
        held.piece_bytes += len(piece) + PIECE_OVERHEAD_BYTES
        if held.piece_bytes <= SPEECH_BYTES_MAX:  # beyond, the end tells the rest
            held.pieces.append(piece)
            if flight in self._ears:
                self._ears[flight].ring()
        if held.abroad and held.told < len(held.pieces):
            self._untold[flight] = held
            self._flush_soon()

    def is_followed(self, flight: str) -> bool:
        held = self._held.get(flight)
        return held is not None and held.followed

    def on_followed(self, flight: str, callback: Callable[[], None]) -> None:
        """Call `callback` once, when somebody begins to follow this stream: now, if so already."""
        held = self._held.get(flight)
        if held is None:
            return
        if held.followed:
            callback()
        else:
            held.on_followed = callback

    def land(
        self, lead: Lead, value: bytes | None, error: bytes | None, ttl_s: float | None
    ) -> None:
        """Ends what was led; see `CacheDesk.land`."""
        self._near.remove(lead.key, lead.scope)
        now, flight = self._clock(), lead.flight
        held = None
        if flight is not None:
            self._untold.pop(flight, None)  # its end tells the rest
            held = self._held.pop(flight, None)
            if held is None:
                # Landed before, or given up as too slow; a whole value is still worth keeping.
                flight = None
        if flight is None and (value is None or ttl_s is None):
            return
        age_s = None if lead.begun_s is None else now - lead.begun_s
        landing = Landing(lead.key, lead.scope, flight, value, error, ttl_s, age_s)
        if flight is not None:
            self._tell_ear(flight, landing.outcome)
        tenure = self._tenure_at(now)
        if tenure is not None:
            self._land_here(tenure, landing, held is not None and held.searched, now)
            return
        size = len(value or b"") + len(error or b"")
        if self._landing_bytes + size > LANDING_BYTES_MAX:
            self._counts["landings_emptied"] += 1
            landing = Landing(lead.key, lead.scope, flight, None, None, ttl_s, age_s)
            size = 0
        self._landings.append(landing)
        self._landing_bytes += size
        self._flush_soon()

    async def invalidate(self, scope: Scope | None, model: str | None, key: bytes | None) -> int:
        """Asks the owner to; returns how many answers that were. Raises OwnerUnavailable."""
        self._near.invalidate(Sweep.of(scope, model, key))
        before = self._counts["swept"]
        dropped: int = await self._ref.ask(
            "invalidate", scope, model, key, timeout_s=LAND_TIMEOUT_S
        )
        await self._ref.ask("swept", timeout_s=LAND_TIMEOUT_S)
        self._near.invalidate(Sweep.of(scope, model, key))
        return dropped + self._counts["swept"] - before

    def held(self) -> tuple[int, int, int]:
        """What is kept on a lease: entries, their bytes, and how many gave way."""
        if self._tenure is None:
            return 0, 0, 0
        entries = self._tenure.entries
        return len(entries), entries.bytes, entries.evicted

    def stats(self) -> dict[str, Any]:
        tenure = self._tenure
        return {
            "away": self._away,
            "leased": tenure is not None,
            "leading": len(self._held),
            "following": len(self._ears),
            "landing_bytes": self._landing_bytes,
            "near_bytes": self._near.bytes if tenure is None else tenure.entries.bytes,
            "last_error": self._last_error,
            **self._counts,
        }

    # ------------------------------------------------------------------------------ looking up

    def _mint(self) -> str:
        self._minted += 1
        return f"{self._name}-{self._minted}"

    def _decline(self, answer: Answer | None) -> None:
        """Nobody is there to take this answer: a lead must not be left hanging."""
        if isinstance(answer, Lead):
            self.land(answer, None, None, None)

    def _resolve(self, asked: _Asked, answer: Hit | Lead | Follow) -> None:
        group = asked.group
        group.answers[asked.place] = answer
        group.left -= 1
        if group.future.cancelled():
            self._decline(answer)
        elif group.left == 0:
            group.future.set_result(group.answers)

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send what waits, at once when no message of its kind is under way. What comes while one
        is goes with the next, so that messages grow with the load and their number does not."""
        self._flush_due = False
        if self._gated:
            return
        tenure = self._tenure_at(self._clock())
        if tenure is not None:
            self._flush_here(tenure)
        if self._landings and not self._landing and not self._giving:
            landings = self._some_landings()
            self._landing = True
            self._spawn(self._send_landings(landings))
        if self._untold and not self._saying:
            self._saying = True
            self._spawn(self._send_says())
        if self._unheard:
            ears, self._unheard = self._unheard, {}
            task = asyncio.get_running_loop().create_task(self._hear(ears))
            self._hearing.add(task)
            task.add_done_callback(self._hearing.discard)
        if self._asks and not self._looking:
            asks = self._asks[:ASKS_PER_MESSAGE_MAX]
            del self._asks[:ASKS_PER_MESSAGE_MAX]
            self._looking = True
            self._spawn(self._send_asks(asks))

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

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_asks(self, asks: list[_Asked], verb: str = "lookup") -> None:
        """Those that a `lookup` has to search for travel on as a `search`, beside the next one."""
        sent_s = self._clock()
        timeout_s = LOOKUP_TIMEOUT_S if verb == "lookup" else SEARCH_TIMEOUT_S
        answers: list[Answer | Searching]
        try:
            answers = await self._ref.ask(verb, [asked.ask for asked in asks], timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, no request fails for it. The owner may have executed the message, so
            # these lead under the flights they asked for.
            self._lost(error)
            answers = [
                Lead(one.ask.key, one.ask.scope, one.ask.flight if one.ask.join else None)
                for one in asks
            ]
        finally:
            if verb == "lookup":
                self._looking = False
                if self._asks:
                    self._flush_soon()
        searching = [
            asked
            for asked, answer in zip(asks, answers, strict=True)
            if isinstance(answer, Searching)
        ]
        if searching:
            self._spawn(self._send_asks(searching, "search"))
        for asked, answer in zip(asks, answers, strict=True):
            ask = asked.ask
            if isinstance(answer, Searching):
                continue
            if isinstance(answer, Miss):
                answer = Lead(ask.key, ask.scope, None, sent_s)
            elif isinstance(answer, Hit):
                self._counts["hits"] += 1
                ttl_s, now = min(answer.left_s, NEAR_TTL_S), self._clock()
                self._near.put(ask.key, ask.scope, answer.value, ttl_s, now, age_s=answer.age_s)
            elif isinstance(answer, Lead):
                answer = Lead(ask.key, ask.scope, answer.flight, sent_s)
                if answer.flight is not None:
                    self._hold(ask, sent_s, sent_s + asked.patience_s)
                    self._busy.set()
                    if ask.stream:
                        self._attend_soon()
            self._resolve(asked, answer)

    def _hold(self, ask: Ask, now: float, until_s: float) -> None:
        self._held[ask.flight] = _Held(ask, now, until_s)

    async def _send_landings(self, landings: list[Landing]) -> None:
        try:
            if self._away:
                self._counts["landings_dropped"] += len(landings)
            else:
                await self._ref.ask("land", landings, timeout_s=LAND_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001
            self._counts["landings_dropped"] += len(landings)
            self._lost(error)
        finally:
            self._landing = False
            if self._landings:
                self._flush_soon()
            for landing in landings:
                self._landing_bytes -= len(landing.value or b"") + len(landing.error or b"")

    # ------------------------------------------------------------------------------- following

    def _new_ear(self, flight: str) -> _Ear:
        held = self._held.get(flight)
        if held is not None:
            ear = self._ears[flight] = _Ear(held.pieces)  # it is led here: nobody has to be asked
            held.hear_of_followers()
            return ear
        ear = _Ear()
        known = self._outcome_here(flight)
        if known is not None:
            ear.outcome = known
        elif len(self._ears) >= FOLLOWS_MAX:
            ear.outcome = Gone()
        else:
            self._ears[flight] = self._unheard[flight] = ear
            self._flush_soon()
        return ear

    def _outcome_here(self, flight: str) -> Outcome | None:
        """How a flight of ours ended that was led under a lease; None when the owner may know."""
        if leader_of(flight) != self._name:
            return None
        for flights in (self._here, self._before):
            outcome = flights.outcome(flight)
            if outcome is not None and not isinstance(outcome, Gone):
                return outcome
        return None if self._tenure is None else Gone()

    def _tell_ear(self, flight: str, outcome: Outcome) -> None:
        """A flight that is led here has ended."""
        ear = self._ears.get(flight)
        if ear is not None:
            ear.outcome = outcome
            ear.ring()
            self._drop_ear(flight, ear)

    async def _hear(self, ears: dict[str, _Ear]) -> None:
        """One held message for these flights. Those still in the air go with the next one."""
        wants = [(flight, len(ear.pieces)) for flight, ear in ears.items()]
        news: list[News]
        timeout_s = FOLLOW_HOLD_S + LAND_TIMEOUT_S
        try:
            news = await self._ref.ask(
                "hear", wants, FOLLOW_HOLD_S, self._name, timeout_s=timeout_s
            )
        except Exception as error:  # noqa: BLE001
            self._lost(error)
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
                self._flush_soon()

    def _leave(self, flight: str, ear: _Ear) -> None:
        ear.listeners -= 1
        if not ear.listeners:
            self._drop_ear(flight, ear)

    def _drop_ear(self, flight: str, ear: _Ear) -> None:
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
        while self._tenure is None and any(held.ask.stream for held in self._held.values()):
            known = [flight for flight, held in self._held.items() if held.abroad]
            try:
                followed = await self._ref.ask(
                    "followed", self._name, known, FOLLOW_HOLD_S, timeout_s=timeout_s
                )
            except Exception as error:  # noqa: BLE001
                self._lost(error)
                break
            for flight in followed:
                held = self._held.get(flight)
                if held is not None:
                    held.abroad = True
                    held.hear_of_followers()
        self._attending = None

    async def _send_says(self) -> None:
        size = 0
        said = []
        for flight, held in self._untold.items():
            said.append((flight, held.told, held.pieces[held.told :]))
            size += sum(map(len, said[-1][2]))
            if size > SAY_MESSAGE_BYTES:
                break
        for flight, _, _ in said:
            del self._untold[flight]
        try:
            await self._ref.ask("say", said, timeout_s=LAND_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001
            self._lost(error)
        else:
            self._counts["pieces"] += sum(len(pieces) for _, _, pieces in said)
            for flight, start, pieces in said:
                held_now = self._held.get(flight)
                if held_now is not None:
                    held_now.told = start + len(pieces)
                    if held_now.told < len(held_now.pieces):
                        self._untold[flight] = held_now
        finally:
            self._saying = False
            if self._untold:
                self._flush_soon()

    # ---------------------------------------------------------------------- in the background

    def _lost(self, error: Exception) -> None:
        self._counts["failures"] += 1
        self._last_error = f"{type(error).__name__}: {error}"
        self._away = bool(self._tasks)  # only a started desk can find the owner again
        self._busy.set()

    async def _mind_for_ever(self) -> None:
        """While the owner is away, looks for it; while flights are led, says so."""
        back_off_s = BACK_OFF_S[0]
        while True:
            await self._busy.wait()
            if self._away:
                await self._pause(back_off_s)
                back_off_s = min(2 * back_off_s, BACK_OFF_S[1])
                await self._probe(LAND_TIMEOUT_S)
                continue
            back_off_s = BACK_OFF_S[0]
            await self._pause(RENEW_EVERY_S)
            await self._renew()
            if not self._held and not self._away:
                self._busy.clear()

    async def _probe(self, timeout_s: float) -> None:
        try:
            await self._ref.ask("protocol", timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001
            self._lost(error)
        else:
            self._away = False

    async def _renew(self) -> None:
        now = self._clock()
        self._give_up(now)
        if self._tenure_at(now) is not None:
            return
        due = [f for f, held in self._held.items() if now - held.said_s >= RENEW_EVERY_S / 2]
        if not due:
            return
        try:
            lost = await self._ref.ask("renew", due, timeout_s=SILENCE_S)
        except Exception as error:  # noqa: BLE001
            self._lost(error)
            return
        for flight in due:
            if flight in self._held:
                self._held[flight].said_s = now
        self._counts["renewed"] += len(due) - len(lost)

    def _give_up(self, now: float) -> None:
        """Who leads for longer than it was given does so alone."""
        for flight in [flight for flight, held in self._held.items() if held.until_s <= now]:
            del self._held[flight]
            self._untold.pop(flight, None)
            self._here.land(flight, Gone(), now)
            self._tell_ear(flight, Gone())
            self._counts["given_up"] += 1

    # ---------------------------------------------------------------------- under a lease: asked

    def _tenure_at(self, now: float) -> _Tenure | None:
        """The lease, if it is ours now: by our own clock, whoever woke us up how late."""
        tenure = self._tenure
        if tenure is not None and now >= tenure.until_s:
            self._counts["leases_run_out"] += 1
            self._leave_tenure(tenure)
            return None
        return tenure

    def _ask_here(
        self,
        tenure: _Tenure,
        keys: Sequence[bytes],
        scope: Scope,
        read: bool,
        join: bool,
        patience_s: float,
        stream: bool,
        now: float,
    ) -> list[Hit | Lead | Follow] | Group:
        answers: list[Any] = []
        missing: list[tuple[int, Ask]] = []
        asks_owner = read and tenure.stores and not self._away
        for key in keys:
            hit = tenure.entries.get(key, scope, now) if read else None
            if hit is not None:
                answers.append(hit)
                continue
            ask = Ask(key, scope, self._mint(), read, join, SILENCE_S, stream)
            answer = self._join_here(ask, patience_s, now)
            if asks_owner and isinstance(answer, Lead):
                missing.append((len(answers), ask))
                answers.append(None)
            else:
                answers.append(answer)
        self._counts["hits_here"] += sum(isinstance(answer, Hit) for answer in answers)
        if not missing:
            return answers
        group = Group(asyncio.get_running_loop().create_future(), answers, len(missing))
        self._finds += [_Asked(ask, patience_s, group, place) for place, ask in missing]
        self._flush_soon()
        return group

    def _join_here(self, ask: Ask, patience_s: float, now: float) -> Lead | Follow:
        if not ask.join:
            return Lead(ask.key, ask.scope, None, now)
        answer = self._here.join(ask, now)
        if isinstance(answer, Follow):
            return answer
        if isinstance(answer, Miss):
            return Lead(ask.key, ask.scope, None, now)
        self._hold(ask, now, now + patience_s)
        return Lead(ask.key, ask.scope, ask.flight, now)

    def _flush_here(self, tenure: _Tenure) -> None:
        """What waited while the lease was taken is answered here; what the owner has is found."""
        now = self._clock()
        asks, self._asks = self._asks, []
        for asked in asks:
            ask = asked.ask
            hit = tenure.entries.get(ask.key, ask.scope, now) if ask.read else None
            answer = hit or self._join_here(ask, asked.patience_s, now)
            if ask.read and tenure.stores and isinstance(answer, Lead):
                self._finds.append(asked)
            else:
                self._resolve(asked, answer)
        landings, self._landings = self._landings, []
        for landing in landings:
            self._landing_bytes -= len(landing.value or b"") + len(landing.error or b"")
            self._land_here(tenure, landing, False, now)
        self._send_here(tenure)

    def _send_here(self, tenure: _Tenure) -> None:
        if self._keeps:
            keeps, self._keeps = self._keeps, []
            self._spawn(self._send_keeps(tenure, keeps))
        if self._finds:
            finds, self._finds = self._finds, []
            self._spawn(self._send_finds(tenure, finds))

    async def _send_finds(self, tenure: _Tenure, asks: list[_Asked]) -> None:
        """For what is not here the owner may have an answer: it moves here."""
        places = [(one.ask.scope, one.ask.key) for one in asks]
        found: list[Hit | None] = [None] * len(asks)
        searched = False
        more: list[Kept] = []
        try:
            found, more, tenure.stores = await self._ref.ask(
                "find", self._name, tenure.number, places, timeout_s=LOOKUP_TIMEOUT_S
            )
            searched = True
        except Exception as error:  # noqa: BLE001
            self._lost(error)
        now = self._clock()
        known = [(*place, hit) for place, hit in zip(places, found, strict=True) if hit is not None]
        self._take_in(tenure, [*more, *((key, scope, hit) for scope, key, hit in known)], now)
        for asked, hit in zip(asks, found, strict=True):
            ask = asked.ask
            lead = Lead(ask.key, ask.scope, ask.flight if ask.join else None, now)
            if hit is not None:
                if lead.flight is not None:
                    self.land(lead, hit.value, None, None)
                self._resolve(asked, hit)
                continue
            held = self._held.get(ask.flight)
            if held is not None:
                held.searched = searched
            self._resolve(asked, lead)

    def _take_in(self, tenure: _Tenure, entries: list[Kept], now: float) -> None:
        """Entries that were the owner's; what is here already is younger."""
        if tenure.over:
            return
        for key, scope, hit in entries:
            if tenure.entries.get(key, scope, now) is None and not tenure.swept.forbids(
                key, scope, now - hit.age_s, now
            ):
                tenure.entries.put(key, scope, hit.value, hit.left_s, now, age_s=hit.age_s)

    def _land_here(self, tenure: _Tenure, landing: Landing, searched: bool, now: float) -> None:
        if landing.flight is not None:
            self._here.land(landing.flight, landing.outcome, now)
        if landing.value is None or landing.ttl_s is None:
            return
        key, scope, value = landing.key, landing.scope, landing.value
        begun_s = float("-inf") if landing.age_s is None else now - landing.age_s
        if tenure.swept.forbids(key, scope, begun_s, now):
            self._counts["invalidated_under_way"] += 1
            return
        ttl_s = jittered(landing.ttl_s, self._random())
        stored = tenure.entries.put(key, scope, value, ttl_s, now)
        self._counts["stored" if stored else "not_stored"] += 1
        if tenure.stores and not searched:
            self._keeps.append((key, scope, Hit(value, 0.0, ttl_s)))
            self._flush_soon()

    async def _send_keeps(self, tenure: _Tenure, keeps: list[Kept]) -> None:
        try:
            await self._ref.ask("keep", self._name, tenure.number, keeps, timeout_s=LAND_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001
            self._lost(error)

    # ------------------------------------------------------------------ the lease: taken, given

    async def _lease_for_ever(self) -> None:
        """While there is something to ask, and nobody else asks, has the lease."""
        while True:
            await self._wanted.wait()
            try:
                free = await self._ref.ask(
                    "lease", self._name, WAIT_S, timeout_s=WAIT_S + LAND_TIMEOUT_S
                )
            except Exception as error:  # noqa: BLE001
                self._lost(error)
                free = False
            self._before = Flights()
            tenure = await self._take() if free else None
            if tenure is not None:
                await self._stay(tenure)
            await self._settle_lease()
            if tenure is None:
                if self._clock() - self._asked_s > WAIT_S:
                    self._wanted.clear()
                await self._pause(BACK_OFF_S[1])

    async def _take(self) -> _Tenure | None:
        """The lease, between two messages: nothing else is under way while it is taken."""
        self._gated = True
        try:
            if self._sending:
                await asyncio.wait(self._sending, timeout=LOOKUP_TIMEOUT_S)
            if self._sending:
                return None
            self._number += 1
            until_s = self._clock() + LEASE_S
            self._owed = (self._number, until_s)
            try:
                grant = await self._ref.ask(
                    "take", self._name, self._number, timeout_s=LOOKUP_TIMEOUT_S
                )
            except Exception as error:  # noqa: BLE001
                self._lost(error)
                self._giving = True
                return None
            if grant is None:
                self._owed = None
                return None
            self._counts["leases"] += 1
            tenure = self._tenure = self._stored = _Tenure(self._number, until_s, grant)
            self._here = Flights()
            self._untold.clear()
            for held in self._held.values():
                held.abroad = False
                self._here.join(held.ask, self._clock())
            return tenure
        finally:
            self._gated = False
            self._flush_soon()

    async def _stay(self, tenure: _Tenure) -> None:
        """Keep the lease until it is recalled, or over."""
        swept: list[int] = []
        while self._tenure_at(now := self._clock()) is tenure:
            self._give_up(now)
            for flight in self._held:
                self._here.renew(flight, now)
            self._here.lapse(now)
            try:
                told = await self._ref.ask(
                    "hold",
                    self._name,
                    tenure.number,
                    swept,
                    HOLD_S,
                    timeout_s=HOLD_S + HOLD_ANSWER_S,
                )
            except Exception as error:  # noqa: BLE001
                self._lost(error)
                await self._pause(BACK_OFF_S[0])
                continue
            self._away = False
            if told is not None:
                swept = [number for number, _ in told.sweeps]
                for _, sweep in told.sweeps:
                    self._sweep(tenure, sweep)
            if told is None or told.recalled:
                if not tenure.over:
                    self._leave_tenure(tenure)
            else:
                tenure.until_s = now + LEASE_S
                self._owed = (tenure.number, tenure.until_s)

    def _sweep(self, tenure: _Tenure, sweep: Sweep) -> None:
        tenure.swept.add(sweep, self._clock())
        self._here.part(sweep)
        self._near.invalidate(sweep)
        self._counts["swept"] += tenure.entries.invalidate(sweep)

    def _leave_tenure(self, tenure: _Tenure) -> None:
        """From now on nothing is answered here; the owner is told by who keeps the lease."""
        tenure.over = True
        self._tenure = None
        self._giving = True
        now = self._clock()
        for held in self._held.values():
            held.said_s = now
        if self._held:
            self._busy.set()
        self._send_here(tenure)

    async def _settle_lease(self) -> None:
        """What is held of a lease that is over, or was never heard of, goes back."""
        if self._tenure is not None:
            self._leave_tenure(self._tenure)
        if self._owed is not None:
            await self._give_back(*self._owed)
            self._owed = None
        if self._stored is not None:
            await self._hand_over(self._stored)
            self._stored = None

    async def _give_back(self, number: int, until_s: float) -> None:
        """Name the flights that are led here, until the owner answers or the lease is over."""
        back_off_s = BACK_OFF_S[0]
        while True:
            asks = [held.ask for flight, held in self._held.items() if self._passes_on(flight)]
            try:
                await self._ref.ask(
                    "give_back", self._name, number, asks, timeout_s=GIVE_BACK_TIMEOUT_S
                )
                break
            except Exception as error:  # noqa: BLE001
                self._lost(error)
            self._giving = False  # what lands is dropped while the owner is away
            if self._clock() >= until_s + MARGIN_S:
                break
            await self._pause(back_off_s)
            back_off_s = min(2 * back_off_s, BACK_OFF_S[1])
        self._giving = False
        self._before, self._here = self._here, Flights()
        if any(held.ask.stream for held in self._held.values()):
            self._attend_soon()
        self._flush_soon()

    def _passes_on(self, flight: str) -> bool:
        """Whether those who ask for its key may follow it: not if it is older than a sweep."""
        return self._here.leads(flight) or self._here.outcome(flight) is not None

    async def _hand_over(self, tenure: _Tenure) -> None:
        """What was stored here goes to the owner, a little at a time, while it takes it."""
        while entries := tenure.entries.pop_some(KEEP_MESSAGE_BYTES, self._clock()):
            try:
                if not await self._ref.ask(
                    "keep", self._name, tenure.number, entries, timeout_s=LAND_TIMEOUT_S
                ):
                    return
            except Exception as error:  # noqa: BLE001
                self._lost(error)
                return


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
