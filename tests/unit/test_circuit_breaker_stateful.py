"""Owner and desks in a bad world: lines that lose, double and delay, and both ends dying.

What must hold whatever happens: states change only as the table says; at most one live probe
lease in the cluster; reports of an older generation change nothing; no more retries are granted
than the calls of all processes have earned; and when the world is well again, every circuit
closes in bounded time.

A lease is no longer than a circuit stays open, so that even the death of the owner and of all who
could tell it of a probe lends no second one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from itertools import count
from random import Random
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
from actors.circuit_breaker.policy import (
    FORCED,
    TRANSITIONS,
    Claim,
    Outcome,
    Pass,
    Refusal,
    Rules,
    Standing,
    State,
    Verdict,
)
from actors.circuit_breaker.retry_budget import MEMORY_S
from tests.support.bad_wire import Fate, House, Wire
from tests.support.fake_time import FakeTime

RULES = Rules(
    failure_threshold=2,
    success_threshold=2,
    open_s=3.0,
    open_s_max=9.0,
    min_calls=6,
    probe_s=3.0,
    retry_share=0.25,
    retries_per_s=0.5,
)
HASTY = replace(RULES, open_s=2.0)
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

# What a report that is void leaves alone; that a call was made, and earns, is true all the same.
JUDGED = ("state", "reason", "retry_after_s", "open_for_s", "calls", "failures", "slow")

TROUBLES = ["cut", "cut", "mend", "mend", "kill", "kill", "restart", "restart", "late", "force"]


async def settle() -> None:
    """Let every task go on until none can; no rounds are wasted on a loop that is idle."""
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(0)
    while loop._ready:
        await asyncio.sleep(0)


@dataclass
class Process:
    """A desk, its line, and the calls that are under way in it."""

    desk: CircuitBreakerDesk
    wire: Wire
    calls: list[Pass]


class Breaker(RuleBasedStateMachine):
    breaker_rules = RULES

    def __init__(self) -> None:
        super().__init__()
        starts = count(1_000_000, 1_000_000)
        self.names = count(1)
        self.loop = asyncio.new_event_loop()
        self.time = FakeTime(settled=settle)
        self.wrong: list[str] = []
        self.house = House(
            lambda: CircuitBreaker(
                self.breaker_rules, self.time, lambda: 0.5, lambda _: next(starts)
            )
        )
        self.house.around = self.look  # type: ignore[method-assign]
        self.processes: list[Process] = []
        self.began_at = self.time.now
        self.owners = 1
        self.judged = self.granted = 0

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
                told = row if repeated else JUDGED
                if void and name in before and any(row[of] != was[of] for of in told):
                    self.wrong.append(f"a void report changed {name}: {was} -> {row}")

        return compare

    async def add_process(self) -> None:
        number = next(self.names)
        wire = self.house.line()
        desk = CircuitBreakerDesk(
            wire, f"h{number}", self.time, lambda: 0.5 + number / 2**20, self.time.sleep
        )
        desk.set_rules(self.breaker_rules)
        await desk.start()
        self.processes.append(Process(desk, wire, []))

    @initialize()
    def begin(self) -> None:
        for _ in range(DESKS):
            self.do(self.add_process())
        self.break_down(0, DEPLOYMENTS[0], Verdict.FAILURE)

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

    @rule(
        which=st.integers(0, DESKS - 1),
        deployment=st.sampled_from(DEPLOYMENTS),
        verdict=st.sampled_from([Verdict.FAILURE, Verdict.UNREACHABLE]),
    )
    def break_down(self, which: int, deployment: str, verdict: Verdict) -> None:
        """The upstream fails for one process as often as it takes."""

        async def fail() -> None:
            desk = self.processes[which].desk
            for _ in range(RULES.failure_threshold):
                if isinstance(answer := await desk.admit(deployment), Pass):
                    self.judge(desk, answer, verdict)

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
                self.judge(process.desk, process.calls.pop(index), verdict, wait_s)

        self.do(judge())

    def judge(
        self,
        desk: CircuitBreakerDesk,
        given: Pass,
        verdict: Verdict,
        wait_s: float | None = None,
    ) -> None:
        self.judged += verdict is not Verdict.IGNORED
        desk.judge(given, verdict, wait_s)

    @rule(
        order=st.permutations(range(DESKS)),
        deployment=st.sampled_from(DEPLOYMENTS),
        times=st.integers(1, DESKS),
        each=st.integers(1, 6),
    )
    def retry(self, order: list[int], deployment: str, times: int, each: int) -> None:
        """Some processes ask for retries at the same time."""

        async def ask() -> None:
            desks = [self.processes[which].desk for which in order[:times]]
            answers = await asyncio.gather(
                *(desk.may_retry(deployment) for desk in desks for _ in range(each))
            )
            self.granted += sum(answers)

        self.do(ask())

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
        self.owners += 1
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

    @invariant()
    def retries_are_within_the_budget(self) -> None:
        for_s = self.time.now - self.began_at + self.owners * MEMORY_S
        earned = (
            self.breaker_rules.retry_share * self.judged + self.breaker_rules.retries_per_s * for_s
        )
        assert self.granted * (1 + self.breaker_rules.retry_share) <= earned + 1e-6

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
                        self.judge(process.desk, answer, Verdict.SUCCESS)
                        await settle()
        await self.time.advance(1.0)
        assert self.wrong == []
        for deployment, row in self.house.owner.board().items():
            assert row["state"] == "closed", (deployment, row)
        for process in self.processes:
            for deployment in DEPLOYMENTS:
                assert await process.desk.may_retry(deployment)
                assert process.desk.standing(deployment).clean, process.desk.standing(deployment)
                generation = self.house.owner.board().get(deployment, {"generation": 0})
                assert process.desk.standing(deployment).generation == generation["generation"]


def test_a_forced_transition_does_not_let_a_second_probe_begin_beside_the_first() -> None:
    """Its prober is cut off, so it does not hear that its lease is void."""

    class Hasty(Breaker):
        breaker_rules = HASTY

    world = Hasty()
    world.begin()
    world.call([1, 0, 2], "a", 1, HASTY.open_s)
    assert world.processes[1].desk.probing("a")
    world.have_trouble("force", 1, prober=False)
    world.have_trouble("cut", 1, prober=True)
    world.break_down(0, "a", Verdict.FAILURE)
    world.call([0, 1, 2], "a", 1, HASTY.open_s)
    world.one_live_lease_at_most()
    world.nothing_went_wrong()
    world.pass_time(HASTY.probe_s)
    world.call([0, 1, 2], "a", 1, 0.0)
    assert world.processes[0].desk.probing("a")
    world.teardown()


def test_thousands_of_walks_of_an_owner_whose_answers_are_lost_and_messages_come_again() -> None:
    """Without desks, so that many are quick: who has heard of a lease, and how many retries."""
    rules = replace(HASTY, failure_threshold=1, open_s=1.0, open_s_max=2.0)
    paths = {(before, after) for before in State for after in TRANSITIONS[before].values()}
    paths |= {(state, state) for state in State} | {(State.OPEN, State.HALF_OPEN)}
    deepest: Counter[State] = Counter()
    for seed in range(2_000):
        chance, time = Random(seed), FakeTime(settled=settle)
        owner = CircuitBreaker(rules, time, chance.random, lambda _: 100)
        leases: dict[str, tuple[str, float]] = {}  # holder to probe id, and until when
        sent: list[tuple[str, tuple[Any, ...]]] = []
        judged = granted = 0
        for number in range(40):
            time.now += chance.choice([0.0, 0.0, 0.5, rules.open_s])
            before = owner.board().get("a", {"state": "closed", "generation": 0})
            holder, generation = chance.choice("xyz"), before["generation"]
            verb = chance.choice(["report", "report", "probe", "probe", "renew", "retry", "force"])
            held, _ = leases.get(holder, ("", 0.0))
            message: tuple[str, tuple[Any, ...]]
            if sent and chance.random() < 0.2:
                message = chance.choice(sent)  # it comes again, and nobody waits for the answer
                getattr(owner, message[0])(*message[1])
            elif verb == "report":
                verdict = chance.choice([*Verdict, Verdict.UNREACHABLE, Verdict.FAILURE])
                outcome = Outcome("a", generation, verdict, probe=held or None)
                message = (verb, (holder, number, [outcome]))
                owner.report(*message[1])
                judged += verdict is not Verdict.IGNORED
                leases.pop(holder, None)
            elif verb == "probe" and not held:
                message = (verb, ("a", holder, f"{holder}{number}"))
                answer = owner.probe(*message[1])
                if isinstance(answer, Pass) and chance.random() < 0.8:
                    leases[holder] = (f"{holder}{number}", time.now + answer.lease_s)
            elif verb == "renew" and held:
                claim = Claim("a", Standing(State.HALF_OPEN, generation), held)
                message = (verb, ("a", holder, held, claim))
                if owner.renew(*message[1]) and chance.random() < 0.8:
                    leases[holder] = (held, time.now + rules.probe_s)
            elif verb == "retry":
                message = (verb, (holder, number, {"a": 3}))
                granted += owner.retry(*message[1])["a"]
            else:
                state = chance.choice([None, None, *FORCED])
                message = ("force", ("a", state, f"{number}"))
                owner.force("a", state, f"{number}")
            sent.append(message)
            after = owner.board().get("a", before)
            deepest[State(after["state"])] += 1
            live = [name for name, (_, until) in leases.items() if time.now < until]
            assert len(live) <= 1, (seed, number, leases)
            assert (State(before["state"]), State(after["state"])) in paths, (seed, number)
            earned = rules.retry_share * judged
            earned += rules.retries_per_s * (time.now - 1_000.0 + MEMORY_S)
            assert granted * (1 + rules.retry_share) <= earned + 1e-6, (seed, number)

    assert min(deepest[state] for state in State) > 1_000


Breaker.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestBreaker = Breaker.TestCase
