"""Owner and desks in a bad world: lines that lose, double and delay, and both ends dying.

What must hold whatever happens: states change only as the table says; at most one live probe
lease in the cluster; reports of an older generation change nothing; and when the world is well
again, every circuit closes in bounded time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import count
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from actors.circuit_breaker.circuit import PROBE_AGE_S_MAX
from actors.circuit_breaker.desk import CircuitBreakerDesk
from actors.circuit_breaker.owner import CircuitBreaker
from actors.circuit_breaker.policy import FORCED, Pass, Refusal, Rules, State, Verdict
from tests.support.bad_wire import Fate, House, Wire
from tests.support.fake_time import FakeTime, settle

RULES = Rules(
    failure_threshold=2,
    success_threshold=2,
    open_s=2.0,
    open_s_max=8.0,
    min_calls=6,
    probe_s=3.0,
)
DEPLOYMENTS = ("a",)
DESKS = 3

# What one message may do to one circuit. The way CLOSED -> HALF_OPEN is TRIP and COOL at once: an
# owner without memory learns of a probe that is under way.
CHANGES: dict[str, set[tuple[State, State]]] = {
    "report": {
        (State.CLOSED, State.OPEN),
        (State.HALF_OPEN, State.OPEN),
        (State.HALF_OPEN, State.CLOSED),
    },
    "probe": {(State.OPEN, State.HALF_OPEN), (State.CLOSED, State.HALF_OPEN)},
    "renew": {(State.CLOSED, State.HALF_OPEN)},
    "restate": {
        (State.CLOSED, after)
        for after in (State.OPEN, State.HALF_OPEN, State.FORCED_OPEN, State.FORCED_CLOSED)
    },
    "force": {
        (before, after) for before in State for after in (*FORCED, State.CLOSED) if before != after
    },
}

TROUBLES = ["cut", "cut", "mend", "mend", "kill", "kill", "restart", "restart", "late", "force"]


@dataclass
class Process:
    """A desk, its line, and the calls that are under way in it."""

    desk: CircuitBreakerDesk
    wire: Wire
    calls: list[Pass]


class Breaker(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        starts = count(1_000_000, 1_000_000)
        self.names = count(1)
        self.loop = asyncio.new_event_loop()
        self.time = FakeTime()
        self.wrong: list[str] = []
        self.house = House(
            lambda: CircuitBreaker(RULES, self.time, lambda: 0.5, lambda _: next(starts))
        )
        self.house.around = self.look  # type: ignore[method-assign]
        self.processes: list[Process] = []

    def do(self, step: Coroutine[Any, Any, Any]) -> Any:
        async def run() -> Any:
            result = await step
            await settle()
            return result

        return self.loop.run_until_complete(run())

    def look(self, method: str, args: tuple[Any, ...]) -> Callable[[], None]:
        """The oracle: compare each circuit before and after a message."""
        owner: CircuitBreaker = self.house.owner
        before = owner.board()
        leases = {name: circuit._lease for name, circuit in owner._circuits.items()}
        repeated = method == "report" and args[1] <= owner._numbers.get(args[0], -1)

        def current(outcome: Any) -> bool:
            lease = leases.get(outcome.deployment)
            if lease is not None and outcome.probe is not None:
                return bool(outcome.probe == lease.id)
            known = before.get(outcome.deployment)
            return outcome.generation == (known["generation"] if known else 0)

        void = method == "report" and (repeated or not any(map(current, args[2])))

        def compare() -> None:
            after = owner.board()
            for name, row in after.items():
                was = before.get(name, {"state": "closed", "generation": 0})
                change = (State(was["state"]), State(row["state"]))
                if change[0] != change[1] and change not in CHANGES.get(method, set()):
                    self.wrong.append(f"{method} made {name} go {change[0]} -> {change[1]}")
                if (change[0] != change[1]) != (was["generation"] != row["generation"]):
                    self.wrong.append(f"{method}: state and generation of {name} disagree")
                learned = change[0] is State.CLOSED and method in ("probe", "renew", "restate")
                if change[0] != change[1] and learned and was["generation"] != 0:
                    self.wrong.append(f"{method} taught {name}, which had a story of its own")
                if void and name in before and row != was:
                    self.wrong.append(f"a void report changed {name}: {was} -> {row}")

        return compare

    async def add_process(self) -> None:
        number = next(self.names)
        wire = self.house.line()
        desk = CircuitBreakerDesk(
            wire, f"h{number}", self.time, lambda: 0.5 + number / 2**20, self.time.sleep
        )
        await desk.start()
        self.processes.append(Process(desk, wire, []))

    @initialize()
    def begin(self) -> None:
        for _ in range(DESKS):
            self.do(self.add_process())
        self.break_down(0, DEPLOYMENTS[0])

    @rule(
        order=st.permutations(range(DESKS)),
        deployment=st.sampled_from(DEPLOYMENTS),
        times=st.integers(1, 3),
        pause_s=st.sampled_from([0.0, 0.0, RULES.open_s, RULES.open_s_max]),
    )
    def call(self, order: list[int], deployment: str, times: int, pause_s: float) -> None:
        """Some processes call at the same time, after a pause."""
        self.pass_time(pause_s)

        async def admit() -> None:
            chosen = [self.processes[which] for which in order[:times]]
            answers = await asyncio.gather(*(each.desk.admit(deployment) for each in chosen))
            for process, answer in zip(chosen, answers, strict=True):
                if isinstance(answer, Pass):
                    process.calls.append(answer)
                else:
                    assert isinstance(answer, Refusal)
                    assert answer.retry_after_s > 0

        self.do(admit())

    @rule(which=st.integers(0, DESKS - 1), deployment=st.sampled_from(DEPLOYMENTS))
    def break_down(self, which: int, deployment: str) -> None:
        """The upstream fails for one process as often as it takes."""

        async def fail() -> None:
            desk = self.processes[which].desk
            for _ in range(RULES.failure_threshold):
                if isinstance(answer := await desk.admit(deployment), Pass):
                    desk.judge(answer, Verdict.FAILURE)

        self.do(fail())

    @precondition(lambda self: any(process.calls for process in self.processes))
    @rule(
        data=st.data(),
        verdict=st.sampled_from([*Verdict, Verdict.SUCCESS, Verdict.SUCCESS, Verdict.FAILURE]),
        times=st.integers(1, 4),
    )
    def end_calls(self, data: st.DataObject, verdict: Verdict, times: int) -> None:
        process = data.draw(st.sampled_from([p for p in self.processes if p.calls]))
        wait_s = 2.0 if verdict is Verdict.THROTTLED else None

        async def judge() -> None:
            for _ in range(min(times, len(process.calls))):
                index = data.draw(st.integers(0, len(process.calls) - 1))
                process.desk.judge(process.calls.pop(index), verdict, wait_s)

        self.do(judge())

    @rule(by_s=st.sampled_from([0.1, 1.0, 2.0, 2.0, 2.9, 3.1, 8.0]))
    def pass_time(self, by_s: float) -> None:
        self.do(self.time.advance(by_s))

    @rule(
        which=st.integers(0, DESKS - 1),
        fates=st.lists(st.sampled_from(Fate), min_size=1, max_size=3),
        prober=st.booleans(),
    )
    def worsen(self, which: int, fates: list[Fate], prober: bool) -> None:
        self.pick(which, prober).wire.fates.extend(fates)

    @rule(
        trouble=st.sampled_from(TROUBLES),
        which=st.integers(0, DESKS - 1),
        prober=st.booleans(),
    )
    def have_trouble(self, trouble: str, which: int, prober: bool) -> None:
        self.do(getattr(self, trouble)(self.pick(which, prober)))

    def pick(self, which: int, prober: bool) -> Process:
        """Trouble likes those best who are probing."""
        probers = [each for each in self.processes if each.desk.stats()["probes"]]
        return probers[0] if prober and probers else self.processes[which]

    async def cut(self, process: Process) -> None:
        process.wire.cut = True
        process.wire.break_held()

    async def mend(self, process: Process) -> None:
        process.wire.cut = False

    async def late(self, _: Process) -> None:
        for wire in self.house.lines:
            await wire.deliver_late()

    async def kill(self, process: Process) -> None:
        self.processes.remove(process)
        process.wire.cut = True
        await process.desk.close()
        await self.add_process()

    async def restart(self, _: Process) -> None:
        self.house.restart()

    async def force(self, _: Process) -> None:
        """An operator who changes his mind, and whose first order arrives once more."""
        for order, state in (("1", FORCED[0]), ("2", FORCED[1]), ("3", None), ("1", FORCED[0])):
            number = f"{self.time.now}/{order}"
            await self.house.execute("force", (DEPLOYMENTS[0], state, number))

    @invariant()
    def nothing_went_wrong(self) -> None:
        assert self.wrong == []

    @invariant()
    def one_live_lease_at_most(self) -> None:
        for deployment in DEPLOYMENTS:
            assert sum(process.desk.probing(deployment) for process in self.processes) <= 1

    def teardown(self) -> None:
        try:
            if self.processes:
                self.do(self.recover())
        finally:
            for process in self.processes:
                self.do(process.desk.close())
            self.loop.close()

    async def recover(self) -> None:
        """The world is well; passes that were never judged stay so. All must close in time."""
        for wire in self.house.lines:
            wire.fates.clear()
            wire.cut = not any(process.wire is wire for process in self.processes)
        await self.time.advance(2.0)
        for deployment in DEPLOYMENTS:
            if self.house.owner.board().get(deployment, {"state": ""})["state"] in FORCED:
                await self.house.execute("force", (deployment, None))
        # A probe that is never judged is renewed for PROBE_AGE_S_MAX; then all goes quickly.
        await self.time.advance(PROBE_AGE_S_MAX)
        for _ in range(20):
            await self.time.advance(RULES.probe_s / 2)
            for process in self.processes:
                for deployment in DEPLOYMENTS:
                    answer = await process.desk.admit(deployment)
                    if isinstance(answer, Pass):
                        process.desk.judge(answer, Verdict.SUCCESS)
                        await settle()
        await self.time.advance(1.0)
        assert self.wrong == []
        for deployment, row in self.house.owner.board().items():
            assert row["state"] == "closed", (deployment, row)
        for process in self.processes:
            for deployment in DEPLOYMENTS:
                assert process.desk.standing(deployment).clean, process.desk.standing(deployment)
                generation = self.house.owner.board().get(deployment, {"generation": 0})
                assert process.desk.standing(deployment).generation == generation["generation"]


Breaker.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestBreaker = Breaker.TestCase
