"""The cache's desk: look-ups and landings of one event-loop tick travel together."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from actors.cache.policy import (
    Answer,
    Ask,
    Failed,
    Gone,
    Hit,
    Landed,
    Landing,
    Lead,
    Miss,
    Outcome,
    Scope,
    Waiting,
)
from actors.ref import Clock, OwnerRef

__all__ = ["CacheDesk", "FlightFailed", "Hit", "Joined", "Lead"]

LOOKUP_TIMEOUT_S = 0.25
"""The most that an unreachable owner costs a request, and it costs that once per outage."""
LAND_TIMEOUT_S = 5.0
FOLLOW_HOLD_S = 10.0
START_WAIT_S = 2.0
SILENCE_S = 3.0
RENEW_EVERY_S = 1.0
BACK_OFF_S = (0.05, 1.0)
ASKS_PER_MESSAGE_MAX = 256
LANDING_BYTES_MAX = 64 * 1024 * 1024
"""Most bytes of values on their way to the owner; beyond, a flight lands empty."""
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
class _Held:
    """A flight that this process leads: when it was last spoken of, and how long it may take."""

    said_s: float
    until_s: float


class CacheDesk:
    """Owns this process's look-ups under way, the flights it leads, and those it follows.

    Look-ups of one tick are one message (ASKS_PER_MESSAGE_MAX at most), together with those that
    came while the last message was under way; so are landings. All followers of a flight in this
    process share one held message. Bounded by the calls under way, LANDING_BYTES_MAX of values
    waiting to be sent, and FOLLOWS_MAX flights followed; beyond the last, a request computes alone.

    Failure behaviour: fails open. Without an answer in LOOKUP_TIMEOUT_S the caller leads, and until
    the owner answers a probe again every look-up is answered at once, without asking. Landings that
    cannot be delivered are dropped and counted. Flights are renewed while they are led, so that
    followers elsewhere learn within SILENCE_S that this process is dead.
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
        self._asks: list[tuple[Ask, float, asyncio.Future[Answer]]] = []
        self._landings: list[Landing] = []
        self._landing_bytes = 0
        self._flush_due = False
        self._looking = False  # a message of look-ups is under way
        self._landing = False  # and one of landings
        self._held: dict[str, _Held] = {}
        self._follows: dict[str, asyncio.Task[Outcome]] = {}
        self._sending: set[asyncio.Task[None]] = set()
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
        while (self._landings or self._sending) and self._clock() < deadline:
            self._flush()
            if self._sending:
                await asyncio.wait(self._sending, timeout=LAND_TIMEOUT_S)
        tasks: list[asyncio.Task[Any]] = [*self._sending, *self._follows.values()]
        if self._task is not None:
            tasks.append(self._task)
            self._task = None
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
            answer = await self._ask(key, scope, read, join, patience_s)
            if isinstance(answer, Hit):
                self._counts["hits"] += 1
                return answer
            if isinstance(answer, Lead):
                return answer
            if isinstance(answer, Miss):
                break
            outcome = await self._follow(answer.flight, deadline - self._clock())
            if isinstance(outcome, Landed):
                self._counts["joined"] += 1
                return Joined(outcome.value)
            if isinstance(outcome, Failed):
                self._counts["flights_failed"] += 1
                raise FlightFailed(outcome.error)
            if self._clock() >= deadline:
                break
        return Lead(key, scope, None)

    def land(
        self,
        lead: Lead,
        value: bytes | None = None,
        error: bytes | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """Ends what was led: a value for those who wait, stored too if it has a `ttl_s` (seconds);
        or an error for those who wait; or neither, and one of them leads. Lands once."""
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
            "following": len(self._follows),
            "landing_bytes": self._landing_bytes,
            "last_error": self._last_error,
            **self._counts,
        }

    # ------------------------------------------------------------------------------ looking up

    async def _ask(
        self, key: bytes, scope: Scope, read: bool, join: bool, patience_s: float
    ) -> Answer:
        self._minted += 1
        if self._away:
            self._counts["unasked"] += 1
            return Lead(key, scope, None)
        flight = f"{self._prefix}-{self._minted}"
        ask = Ask(key, scope, flight, read, join, min(SILENCE_S, patience_s))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asks.append((ask, patience_s, future))
        self._flush_soon()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._decline(future.result())
            raise

    def _decline(self, answer: Answer) -> None:
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
            landings, self._landings = self._landings, []
            self._landing = True
            self._spawn(self._send_landings(landings))
        if self._asks and not self._looking:
            asks = self._asks[:ASKS_PER_MESSAGE_MAX]
            del self._asks[:ASKS_PER_MESSAGE_MAX]
            self._looking = True
            self._spawn(self._send_asks(asks))

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_asks(self, asks: list[tuple[Ask, float, asyncio.Future[Answer]]]) -> None:
        sent_s = self._clock()
        answers: list[Answer]
        try:
            answers = await self._ref.ask(
                "lookup", [ask for ask, _, _ in asks], timeout_s=LOOKUP_TIMEOUT_S
            )
        except Exception as error:  # noqa: BLE001
            # Whatever it is, no request fails for it. The owner may have executed the message, so
            # these lead under the flights they asked for.
            self._lost(error)
            answers = [
                Lead(ask.key, ask.scope, ask.flight if ask.join else None) for ask, _, _ in asks
            ]
        finally:
            self._looking = False
            if self._asks:
                self._flush_soon()
        for (_, patience_s, future), answer in zip(asks, answers, strict=True):
            if isinstance(answer, Lead) and answer.flight is not None:
                self._held[answer.flight] = _Held(sent_s, sent_s + patience_s)
                self._busy.set()
            if future.cancelled():
                self._decline(answer)
            else:
                future.set_result(answer)

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
        task = self._follows.get(flight)
        if task is None:
            if len(self._follows) >= FOLLOWS_MAX:
                return Gone()
            task = asyncio.get_running_loop().create_task(self._follow_to_the_end(flight))
            self._follows[flight] = task
            task.add_done_callback(lambda _: self._follows.pop(flight, None))
        await asyncio.wait([task], timeout=max(0.0, patience_s))
        return task.result() if task.done() and not task.cancelled() else Gone()

    async def _follow_to_the_end(self, flight: str) -> Outcome:
        while True:
            try:
                outcome: Outcome | Waiting = await self._ref.ask(
                    "follow", flight, FOLLOW_HOLD_S, timeout_s=FOLLOW_HOLD_S + LAND_TIMEOUT_S
                )
            except Exception as error:  # noqa: BLE001
                self._lost(error)
                return Gone()
            if not isinstance(outcome, Waiting):
                return outcome

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
