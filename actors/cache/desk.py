"""The cache's desk: look-ups and landings of one event-loop tick travel together."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.cache.policy import (
    PIECE_OVERHEAD_BYTES,
    SPEECH_BYTES_MAX,
    Answer,
    Ask,
    Entries,
    Failed,
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
)
from actors.ref import Clock, OwnerRef

__all__ = ["CacheDesk", "FlightFailed", "Follow", "Hit", "Joined", "Lead", "Listening"]

LOOKUP_TIMEOUT_S = 0.25
"""The most that an unreachable owner costs a request, and it costs that once per outage."""
LAND_TIMEOUT_S = 5.0
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
CARRIED_MAX = 1000
"""Most streams that are read on for their followers when their own client has left."""
NEAR_BYTES_MAX = 16 * 1024 * 1024
NEAR_TTL_S = 1.0
"""What the owner has dropped, or has anew, is told from here for so long at the most."""
FOLLOWS_MAX = 10_000
ROUNDS_MAX = 16
"""How often a follower asks again when its leader is lost, before it computes alone."""


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
    group: _Group
    place: int


@dataclass(slots=True)
class _Group:
    """Look-ups that are answered together; `future` holds how many, in their order."""

    future: asyncio.Future[list[Hit | Lead | Follow]]
    answers: list[Any]
    left: int


@dataclass(slots=True)
class _Held:
    """A flight that this process leads: when it was last spoken of, and how long it may take.

    Of a stream, `pieces` are what it has said so far, of which the owner knows `told`.
    """

    said_s: float
    until_s: float
    stream: bool = False
    followed: bool = False
    pieces: list[bytes] = field(default_factory=list)
    piece_bytes: int = 0
    told: int = 0


@dataclass(slots=True, eq=False)
class _Ear:
    """A flight that this process follows: what was heard of it, and how many are listening."""

    pieces: list[bytes] = field(default_factory=list)
    outcome: Outcome | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: int = 0


class Listening:
    """One follower of a flight. `taken` are the pieces of a stream that it has been handed.

    Close it. Failure behaviour: a leader that is lost, and an owner, end it with None.
    """

    def __init__(self, desk: CacheDesk, flight: str, ear: _Ear) -> None:
        self._desk = desk
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
            self._desk._leave(self._flight, self._ear)


class CacheDesk:
    """Owns this process's look-ups under way, the flights it leads, and those it follows.

    Look-ups of one tick are one message (ASKS_PER_MESSAGE_MAX at most), together with those that
    came while the last message was under way; so are landings, and the pieces of streams that are
    followed. All followers of a flight in this process share what is heard of it, and flights that
    are listened to from one tick on share one held message. Bounded by the calls under way,
    NEAR_BYTES_MAX of answers that were hits a moment ago, LANDING_BYTES_MAX of values waiting to be
    sent, SPEECH_BYTES_MAX of pieces for each stream, and FOLLOWS_MAX flights followed; beyond the
    last, a request computes alone.

    Failure behaviour: fails open. Without an answer in LOOKUP_TIMEOUT_S the caller leads, and until
    the owner answers a probe again every look-up is answered at once, without asking. Landings that
    cannot be delivered are dropped and counted. Flights are renewed while they are led, so that
    followers elsewhere learn within SILENCE_S that this process is dead. A stream's pieces that
    cannot be delivered are told by its end.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
    ) -> None:
        self._ref = ref
        # Ids that no other desk has, not even one of this process.
        self._prefix = f"{holder}-{nonce or secrets.token_hex(8)}"
        self._clock = clock
        self._pause = pause
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
        self._carried: set[asyncio.Task[None]] = set()
        self._sending: set[asyncio.Task[None]] = set()
        self._hearing: set[asyncio.Task[None]] = set()
        self._away = False
        self._busy = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._last_error: str | None = None
        self._counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Finds the owner, waiting START_WAIT_S for it at the most."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._mind_for_ever())
            await self._probe(START_WAIT_S)

    async def close(self) -> None:
        """Lands what was promised, as far as the owner answers, and stops."""
        deadline = self._clock() + LAND_TIMEOUT_S
        for task in self._carried:
            task.cancel()
        if self._carried:
            await asyncio.wait(self._carried)
        while (self._landings or self._sending) and self._clock() < deadline:
            self._flush()
            if self._sending:
                await asyncio.wait(self._sending, timeout=LAND_TIMEOUT_S)
        own = [task for task in (self._task, self._attending) if task is not None]
        self._task = self._attending = None
        tasks = [*self._sending, *self._hearing, *own]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def lookup(
        self, key: bytes, scope: Scope, *, read: bool, join: bool, patience_s: float
    ) -> Hit | Lead | Joined:
        """The stored answer, the answer of a call that is running, or the duty to compute it.

        Whoever gets a Lead must `land` it, in `finally`, with or without a result; within
        `patience_s` seconds, after which others stop waiting. A follower waits for that long too,
        then leads alone. Raises FlightFailed with the leader's error.
        """
        if not (read or join):
            return Lead(key, scope, None)
        deadline = self._clock() + patience_s
        for _ in range(ROUNDS_MAX):
            (answer,) = await self.ask([key], scope, read=read, join=join, patience_s=patience_s)
            if not isinstance(answer, Follow):
                return answer
            joined = await self.follow(answer.flight, deadline - self._clock())
            if joined is not None:
                return joined
            if self._clock() >= deadline:
                break
        return Lead(key, scope, None)

    def near(self, key: bytes, scope: Scope) -> Hit | None:
        """The stored answer, where it is known here without asking."""
        hit = self._near.get(key, scope, self._clock())
        self._counts["near_hits"] += hit is not None
        return hit

    async def ask(
        self,
        keys: Sequence[bytes],
        scope: Scope,
        *,
        read: bool,
        join: bool,
        patience_s: float,
        stream: bool = False,
    ) -> list[Hit | Lead | Follow]:
        """What is known of each key, now: `lookup` without the waiting.

        Each Lead is a duty as it is there. Land them before following anybody: two who ask for the
        same keys in another order would wait for each other otherwise.
        """
        now = self._clock()
        near = [self._near.get(key, scope, now) if read else None for key in keys]
        left = near.count(None)
        self._counts["near_hits"] += len(keys) - left
        if self._away or not left or not (read or join):
            self._counts["unasked"] += left
            return [hit or Lead(key, scope, None) for key, hit in zip(keys, near, strict=True)]
        silence_s = min(SILENCE_S, patience_s)
        group = _Group(asyncio.get_running_loop().create_future(), near, left)
        for place, key in enumerate(keys):
            if near[place] is not None:
                continue
            self._minted += 1
            flight = f"{self._prefix}-{self._minted}"
            ask = Ask(key, scope, flight, read, join, silence_s, stream)
            self._asks.append(_Asked(ask, patience_s, group, place))
        self._flush_soon()
        try:
            return await group.future
        except asyncio.CancelledError:
            for answer in group.answers:  # the others are declined when they come
                self._decline(answer)
            raise

    async def follow(self, flight: str, patience_s: float) -> Joined | None:
        """The answer of somebody else's call; None when it is lost, or after `patience_s` seconds.

        Raises FlightFailed with the leader's error.
        """
        (joined,) = await self.follow_all([flight], patience_s)
        return joined

    async def follow_all(self, flights: Sequence[str], patience_s: float) -> list[Joined | None]:
        """`follow` for several, in their order; waits for all of them.

        Raises FlightFailed with the first failure.
        """
        outcomes = await asyncio.gather(*(self._follow(flight, patience_s) for flight in flights))
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                self._counts["flights_failed"] += 1
                raise FlightFailed(outcome.error)
        joined = [Joined(one.value) if isinstance(one, Landed) else None for one in outcomes]
        self._counts["joined"] += sum(one is not None for one in joined)
        return joined

    def listen(self, flight: str) -> Listening:
        """Follow a flight piece by piece, from its beginning."""
        ear = self._ears.get(flight)
        if ear is None:
            ear = _Ear()
            if len(self._ears) >= FOLLOWS_MAX:
                ear.outcome = Gone()
                ear.changed.set()
            else:
                self._ears[flight] = self._unheard[flight] = ear
                self._flush_soon()
        return Listening(self, flight, ear)

    def say(self, lead: Lead, piece: bytes) -> None:
        """The next piece of a stream that we lead; it goes out if somebody follows."""
        held = self._held.get(lead.flight or "")
        if held is None or lead.flight is None:
            return
        held.piece_bytes += len(piece) + PIECE_OVERHEAD_BYTES
        if held.piece_bytes <= SPEECH_BYTES_MAX:  # beyond, the end tells the rest
            held.pieces.append(piece)
        if held.followed and held.told < len(held.pieces):
            self._untold[lead.flight] = held
            self._flush_soon()

    def is_followed(self, lead: Lead) -> bool:
        """Whether somebody follows this stream piece by piece, as far as is known here."""
        held = self._held.get(lead.flight or "")
        return held is not None and held.followed

    def carry(self, work: Coroutine[Any, Any, None]) -> bool:
        """Go on with a followed stream whose own client has left. False where no more fit."""
        if len(self._carried) >= CARRIED_MAX:
            work.close()
            return False
        task = asyncio.get_running_loop().create_task(work)
        self._carried.add(task)
        task.add_done_callback(self._carried.discard)
        self._counts["carried"] += 1
        return True

    def land(
        self,
        lead: Lead,
        value: bytes | None = None,
        error: bytes | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """Ends what was led: a value for those who wait, stored too if it has a `ttl_s` (seconds);
        or an error for those who wait; or neither, and one of them leads. Lands once."""
        self._near.remove(lead.key, lead.scope)
        self._untold.pop(lead.flight or "", None)  # its end tells the rest
        if lead.flight is not None and self._held.pop(lead.flight, None) is None:
            # Landed before, or given up as too slow; a whole value is still worth keeping.
            lead = Lead(lead.key, lead.scope, None)
        if lead.flight is None and (value is None or ttl_s is None):
            return
        size = len(value or b"") + len(error or b"")
        if self._landing_bytes + size > LANDING_BYTES_MAX:
            self._counts["landings_emptied"] += 1
            value = error = None
            size = 0
        self._landings.append(Landing(lead.key, lead.scope, lead.flight, value, error, ttl_s))
        self._landing_bytes += size
        self._flush_soon()

    def stats(self) -> dict[str, Any]:
        return {
            "away": self._away,
            "leading": len(self._held),
            "following": len(self._ears),
            "landing_bytes": self._landing_bytes,
            "near_bytes": self._near.bytes,
            "last_error": self._last_error,
            **self._counts,
        }

    # ------------------------------------------------------------------------------ looking up

    def _decline(self, answer: Answer | None) -> None:
        """Nobody is there to take this answer: a lead must not be left hanging."""
        if isinstance(answer, Lead):
            self.land(answer)

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send what waits, at once when no message of its kind is under way. What comes while one
        is goes with the next, so that messages grow with the load and their number does not."""
        self._flush_due = False
        if self._landings and not self._landing:
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
        answers: list[Answer | Searching]
        try:
            answers = await self._ref.ask(
                verb, [asked.ask for asked in asks], timeout_s=LOOKUP_TIMEOUT_S
            )
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
            if isinstance(answer, Searching):
                continue
            if isinstance(answer, Miss):
                answer = Lead(asked.ask.key, asked.ask.scope, None)
            elif isinstance(answer, Hit):
                self._counts["hits"] += 1
                ttl_s = min(answer.left_s, NEAR_TTL_S)
                self._near.put(
                    asked.ask.key,
                    asked.ask.scope,
                    answer.value,
                    ttl_s,
                    self._clock(),
                    age_s=answer.age_s,
                )
            elif isinstance(answer, Lead) and answer.flight is not None:
                until_s = sent_s + asked.patience_s
                self._held[answer.flight] = _Held(sent_s, until_s, asked.ask.stream)
                self._busy.set()
                if asked.ask.stream and self._attending is None:
                    self._attending = asyncio.get_running_loop().create_task(self._attend())
            group = asked.group
            group.answers[asked.place] = answer
            group.left -= 1
            if group.future.cancelled():
                self._decline(answer)
            elif group.left == 0:
                group.future.set_result(group.answers)

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

    async def _follow(self, flight: str, patience_s: float) -> Outcome:
        listening = self.listen(flight)
        deadline = self._clock() + patience_s
        try:
            while True:
                news = await listening.more(deadline - self._clock())
                if isinstance(news, Joined):
                    return Landed(news.value)
                if news is None:
                    return Gone()
        except FlightFailed as failure:
            return Failed(failure.error)
        finally:
            listening.close()

    async def _hear(self, ears: dict[str, _Ear]) -> None:
        """One held message for these flights. Those still in the air go with the next one."""
        wants = [(flight, len(ear.pieces)) for flight, ear in ears.items()]
        news: list[News]
        try:
            news = await self._ref.ask(
                "hear", wants, FOLLOW_HOLD_S, timeout_s=FOLLOW_HOLD_S + LAND_TIMEOUT_S
            )
        except Exception as error:  # noqa: BLE001
            self._lost(error)
            news = [News(outcome=Gone())] * len(wants)
        for (flight, ear), one in zip(ears.items(), news, strict=True):
            ear.pieces += one.pieces
            ear.outcome = one.outcome
            if one:
                ear.changed.set()
                ear.changed = asyncio.Event()
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

    async def _attend(self) -> None:
        """While we lead streams, learn which of them are followed."""
        while any(held.stream for held in self._held.values()):
            known = [flight for flight, held in self._held.items() if held.followed]
            try:
                followed = await self._ref.ask(
                    "followed",
                    self._prefix,
                    known,
                    FOLLOW_HOLD_S,
                    timeout_s=FOLLOW_HOLD_S + LAND_TIMEOUT_S,
                )
            except Exception as error:  # noqa: BLE001
                self._lost(error)
                break
            for flight in followed:
                if flight in self._held:
                    self._held[flight].followed = True
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
        self._away = self._task is not None  # only a started desk can find the owner again
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
        for flight in [flight for flight, held in self._held.items() if held.until_s <= now]:
            del self._held[flight]
            self._counts["given_up"] += 1
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
