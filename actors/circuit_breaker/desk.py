"""The breaker's desk: what this process knows of every deployment, and what it has to report.

Rule 1: a closed deployment costs a call nothing: no await, no message.
Rule 2: reports go to the owner one message at a time, in order, each with its number.
Rule 3: a snapshot is counted down from the moment it arrived, never compared with a wall clock.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.circuit_breaker.outbox import Outbox
from actors.circuit_breaker.policy import (
    ANSWERED,
    CLEAN,
    IGNORED,
    LETS_THROUGH,
    PROVEN,
    RULES_KEY,
    THROTTLED,
    Claim,
    Outcome,
    Pass,
    Refusal,
    Rules,
    Standing,
    State,
    Verdict,
)
from actors.circuit_breaker.probes import Probes
from actors.circuit_breaker.retries import Retries
from actors.ref import Clock, OwnerRef, OwnerUnavailable
from actors.watch import Backoff, Sleep, WatchClient

SUCCESS_PAUSE_S = 0.5  # answers wait this long for company; anything else goes on the next tick
THROTTLES_MAX = 10_000  # throttles seen here; beyond that only the owner's word counts
PROBE_PAUSE_S = 1.0  # when to come back while a probe is out and nobody knows how it ends
LOCAL_AFTER_S = 10.0  # an owner that is away for longer is done without
CLOSE_S = 1.0  # how long closing waits for the last report

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _View:
    """What the owner said last, and until when no call may go."""

    said: Standing
    until: float


class CircuitBreakerDesk:
    """Answers whether a deployment may be called, and reports what became of the calls.

    Owns: the last snapshot, throttles that this process has seen, the outbox, the probes, and
    those who ask for retries.
    Bounds: a view for each deployment that the owner publishes; `THROTTLES_MAX` throttles; the
    outbox's runs; one probe for each deployment; `retries.WAITING_MAX` askers.
    Failure behaviour: fails open. With the owner away the last snapshot holds, outcomes are
    kept for ten seconds, and a probe that is due is refused; once the owner has been away for
    `LOCAL_AFTER_S`, this process probes by itself, one call at a time. Retries are then a share of
    this process's own calls. When the owner returns without its memory, the desk tells it what was
    not closed. A desk that dies loses the good outcomes of its last 500 ms, and its probe's lease
    ends by itself.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        clock: Clock = time.monotonic,
        random: Callable[[], float] = random.random,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        # Message numbers start anew with each desk, so each desk is a holder of its own.
        self.holder = f"{holder}#{int(random() * 2**52):x}"
        self._ref = ref
        self._clock = clock
        self._sleep = sleep
        self._watch = WatchClient(ref, self._changed, clock, random, sleep=sleep)
        self._backoff = Backoff(random)
        self._views: dict[str, _View] = {}
        self._blocked: dict[str, float] = {}  # throttled here, until when
        self._gone: set[str] = set()  # what the owner has to be told again
        self._rules: tuple[Rules, int] | None = None
        self._rules_told = True
        self._ids = 0
        self._probes = Probes(ref, self.holder, clock, sleep, self._new_id)
        self._retries = Retries(ref, self.holder, clock, lambda: self._watch.connected)
        self._outbox = Outbox()
        self._line = asyncio.Lock()
        self._due = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._timer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Fetch the first snapshot, then keep up in the background.

        Raises:
            OwnerUnavailable: the owner could not be reached; starting again is fine.
        """
        if self._sender is None:
            await self._watch.start()
            self._sender = asyncio.create_task(self._send(), name="circuit breaker reports")

    async def close(self) -> None:
        """Stop, after a last attempt to report; probes not judged are left to their leases."""
        stopping = [task for task in (self._sender, self._timer) if task is not None]
        self._sender = self._timer = None
        for task in stopping:
            task.cancel()
        await asyncio.gather(*stopping, return_exceptions=True)
        await self._retries.close()
        await self._probes.close()
        await self._watch.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.flush()
        except (OwnerUnavailable, TimeoutError):
            log.warning("circuit breaker: %d outcomes were not reported", len(self._outbox))

    def standing(self, deployment: str) -> Standing:
        """How the deployment stands, as far as this process knows; unknown means closed."""
        view = self._views.get(deployment)
        blocked_until = self._blocked.get(deployment)
        said = CLEAN if view is None else view.said
        if blocked_until is None and said.retry_after_s <= 0:
            return said
        if said.state is State.FORCED_OPEN:
            return said
        now = self._clock()
        if blocked_until is not None and blocked_until <= now:
            del self._blocked[deployment]
        until = max(view.until if view else now, blocked_until or now)
        return Standing(said.state, said.generation, max(0.0, until - now), said.reason)

    def admit_at_once(self, deployment: str) -> Pass | None:
        """Leave for one call, which is to end in `judge`; None where `admit` has more to say."""
        standing = self.standing(deployment)
        if standing.state in LETS_THROUGH and standing.retry_after_s <= 0:
            return Pass(deployment, standing.generation)
        return None

    async def admit(self, deployment: str) -> Pass | Refusal:
        """Leave for one call, which is to end in `judge`. Waits only to ask for a due probe."""
        standing = self.standing(deployment)
        if not standing.callable:
            return self._refuse(deployment, standing, standing.retry_after_s)
        if standing.state in LETS_THROUGH:
            return Pass(deployment, standing.generation)
        if self._probes.busy(deployment):
            return self._refuse(deployment, standing, PROBE_PAUSE_S)
        try:
            answer = await self._probes.ask(deployment, standing)
        except OwnerUnavailable:
            return self._without_owner(deployment, standing)
        if isinstance(answer, Pass):
            return answer
        if answer.callable and answer.state in LETS_THROUGH:
            return Pass(deployment, answer.generation)
        self._hold_off(deployment, answer.retry_after_s)
        return self._refuse(deployment, answer, answer.retry_after_s)

    def begun(self, given: Pass, verdict: Verdict) -> Pass:
        """A call has begun to answer and goes on: a probe is judged now, since others wait for it.

        The pass returned is for the end of the call. Of a probe it then counts only what went
        wrong, as any other call's, by how its deployment stands by then.
        """
        if given.probe is None:
            self._probes.end(given)  # one of our own, made without the owner
            return given
        self.judge(given, verdict)
        return Pass(given.deployment, PROVEN)

    def judge(self, given: Pass, verdict: Verdict, retry_after_s: float | None = None) -> None:
        """Say how the call ended. `retry_after_s`: with THROTTLED, what the provider asked for."""
        now = self._clock()
        deployment, generation, probe, _ = given
        proven = generation == PROVEN
        if not proven:
            self._probes.end(given)
        if verdict is THROTTLED and retry_after_s is not None:
            self._block(deployment, now + retry_after_s)
        if verdict is IGNORED and probe is None:
            return
        answered = verdict in ANSWERED
        if proven and answered:
            return
        alone = self._retries.alone_at(now)
        if alone and not proven and verdict is not IGNORED:
            self._retries.earn(deployment)
        if proven:
            generation = self.standing(deployment).generation
        earns = not (alone or proven)
        unlike = probe is not None or retry_after_s is not None
        if unlike or not self._outbox.again(deployment, generation, verdict, earns, now):
            outcome = Outcome(deployment, generation, verdict, 1, retry_after_s, probe, earns)
            self._outbox.add(outcome, now)
        if not answered or probe is not None:
            self._due.set()
        elif self._sender is not None and self._timer is None:
            self._timer = asyncio.create_task(self._send_later())

    async def may_retry(self, deployment: str) -> bool:
        """Leave to send `deployment` one call more for a request that has failed somewhere.

        One leave is for one call, within the budget of the whole cluster. To be asked before
        `admit`, after the failed call was judged. Takes one message for all who ask meanwhile.
        """
        return await self._retries.may(deployment)

    def probing(self, deployment: str) -> bool:
        """Whether this process holds the live lease of the deployment's probe."""
        return self._probes.leased(deployment)

    def set_rules(self, rules: Rules, version: int = 0) -> None:
        """Have the owner judge by `rules`, now and after each time that it lost its memory.

        `version` settles disagreement between processes: the highest one wins.
        """
        self._rules, self._rules_told = (rules, version), False
        self._retries.learn(rules)
        self._due.set()

    async def force(self, deployment: str, state: State | None) -> Standing:
        """Force a deployment open or closed for everybody, or (None) let it go."""
        standing: Standing = await self._ref.ask("force", deployment, state, self._new_id())
        return standing

    async def board(self) -> dict[str, dict[str, Any]]:
        """The owner's view of all deployments, with the figures behind it."""
        board: dict[str, dict[str, Any]] = await self._ref.ask("board")
        return board

    async def flush(self) -> None:
        """Send what there is to say, but for successes that have just come and can wait.

        Raises OwnerUnavailable, and then keeps it.
        """
        async with self._line:
            if self._rules is not None and not self._rules_told:
                self._rules_told = True
                try:
                    await self._ref.ask("set_rules", *self._rules)
                except OwnerUnavailable:
                    self._rules_told = False
                    raise
            if self._gone:
                await self._restate()
            while (message := self._outbox.message(self._clock())) is not None:
                await self._ref.ask("report", self.holder, *message)
                self._outbox.acknowledge()
                if self._timer is not None and not self._due.is_set():
                    break  # what came meanwhile waits for company

    def stats(self) -> dict[str, Any]:
        return {
            **self._watch.stats(),
            "deployments": dict(Counter(view.said.state.value for view in self._views.values())),
            "buffered": len(self._outbox),
            "dropped": self._outbox.dropped,
            "probes": self._probes.names(),
        }

    # Deciding

    def _without_owner(self, deployment: str, standing: Standing) -> Pass | Refusal:
        if self._watch.away_s < LOCAL_AFTER_S:
            self._hold_off(deployment, PROBE_PAUSE_S)
            return self._refuse(deployment, standing, PROBE_PAUSE_S)
        given = Pass(deployment, standing.generation)
        self._probes.take(given)
        return given

    # What arrives

    def _changed(self, key: str, value: Standing | int | None) -> None:
        if key == RULES_KEY:
            if self._rules is not None and isinstance(value, int) and value < self._rules[1]:
                self._rules_told = False
                self._due.set()
            return
        self._gone.discard(key)
        known = self.standing(key)
        if _forgot(value, known):
            self._gone.add(key)
            self._due.set()
        elif isinstance(value, Standing):
            self._views[key] = _View(value, self._clock() + value.retry_after_s)
            if value.state is State.FORCED_CLOSED:
                self._blocked.pop(key, None)
        else:
            self._views.pop(key, None)

    # What leaves

    async def _send(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self.flush()
            except OwnerUnavailable:
                self._due.set()
                await self._sleep(self._backoff.next_s())
            except Exception:  # a bug of the owner's, or another protocol: never silent
                log.exception("circuit breaker: a message was refused and is dropped")
                self._forget(self._gone)
                self._gone.clear()
                self._outbox.discard()
                self._due.set()
                await self._sleep(self._backoff.next_s())
            else:
                self._backoff.reset()

    async def _send_later(self) -> None:
        await self._sleep(SUCCESS_PAUSE_S)
        self._timer = None
        self._due.set()

    async def _restate(self) -> None:
        known = {name: self.standing(name) for name in self._gone}
        claims = [
            Claim(name, standing, self._probes.id_of(name))
            for name, standing in known.items()
            if not standing.clean
        ]
        refused = await self._ref.ask("restate", self.holder, claims) if claims else []
        clean = [name for name, standing in known.items() if standing.clean]
        self._forget(self._gone.intersection([*clean, *refused]))
        self._gone.difference_update(known)

    # Small things

    def _forget(self, names: set[str]) -> None:
        for name in names:
            self._views.pop(name, None)

    def _hold_off(self, deployment: str, for_s: float) -> None:
        """Ask no more for a while, or until the owner has news."""
        view = self._views.get(deployment)
        if view is not None:
            until = max(view.until, self._clock() + for_s)
            said = view.said
            self._views[deployment] = _View(
                Standing(said.state, said.generation, for_s, said.reason), until
            )

    def _block(self, deployment: str, until: float) -> None:
        if deployment in self._blocked or len(self._blocked) < THROTTLES_MAX:
            self._blocked[deployment] = max(until, self._blocked.get(deployment, until))

    def _refuse(self, deployment: str, standing: Standing, retry_after_s: float) -> Refusal:
        wait_s = retry_after_s if retry_after_s > 0 else PROBE_PAUSE_S
        return Refusal(deployment, wait_s, standing.state, standing.reason)

    def _new_id(self) -> str:
        self._ids += 1
        return f"{self.holder}:{self._ids}"


def _forgot(value: Standing | int | None, known: Standing) -> bool:
    """Whether the owner has lost its memory of a deployment; what is `known` here then stands.

    On purpose it forgets only what is clean, and never the generation of a circuit that it has.
    """
    if isinstance(value, Standing):
        return value.generation == 0 != known.generation and known.state is not State.CLOSED
    return not known.clean
