"""Retry budgets: the sum that must hold, one message for all who ask, and the owner away."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any, ClassVar

import pytest

from actors.circuit_breaker import owner as owner_module
from actors.circuit_breaker.desk import CircuitBreakerDesk
from actors.circuit_breaker.owner import CircuitBreaker
from actors.circuit_breaker.policy import Outcome, Pass, Rules, State, Verdict
from actors.circuit_breaker.retries import AWAY_S, Retries
from actors.circuit_breaker.retry_budget import MEMORY_S, RetryBudget
from tests.support.bad_wire import Fate, House, Wire
from tests.support.fake_time import FakeTime, settle

RULES = Rules(retry_share=0.1, retries_per_s=3.0)
SHARE_ONLY = Rules(retry_share=0.1, retries_per_s=0.0)
NO_RETRIES = Rules(retry_share=0.0, retries_per_s=0.0)
STEADY = int(MEMORY_S * 3.0 / 1.1)


# The bucket


def test_at_first_the_steady_part_is_full_and_then_it_fills_with_time() -> None:
    budget = RetryBudget()
    assert budget.take(100, RULES, 0.0) == STEADY == 27
    assert budget.take(1, RULES, 0.0) == 0

    assert budget.take(100, RULES, 1.1) == 3
    assert budget.left(RULES, 1e6) == STEADY


def test_calls_earn_a_share_which_fades() -> None:
    budget = RetryBudget()
    budget.earn(1_100, SHARE_ONLY, 0.0)

    assert budget.left(SHARE_ONLY, 0.0) == 100
    assert budget.left(SHARE_ONLY, MEMORY_S) == 36
    assert budget.left(SHARE_ONLY, 10 * MEMORY_S) == 0


def test_what_fades_is_spent_first() -> None:
    budget = RetryBudget()
    budget.earn(110, RULES, 0.0)
    assert budget.take(10, RULES, 0.0) == 10

    assert budget.left(RULES, 0.0) == STEADY


def test_new_rules_change_what_is_left_at_once() -> None:
    budget = RetryBudget()
    assert budget.left(NO_RETRIES, 0.0) == 0
    budget.earn(1_000, NO_RETRIES, 0.0)
    assert budget.left(NO_RETRIES, 0.0) == 0

    assert budget.left(RULES, 0.0) == STEADY


def test_a_clock_that_stands_still_or_goes_back_fills_nothing() -> None:
    budget = RetryBudget()
    budget.take(100, RULES, 50.0)

    assert budget.take(1, RULES, 50.0) == budget.take(1, RULES, 10.0) == 0


@pytest.mark.parametrize("calls_per_s", [1, 10, 50, 500])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_when_every_call_fails_attempts_stay_below_the_bound(
    calls_per_s: int, share: float
) -> None:
    rules, budget = Rules(retry_share=share), RetryBudget()
    retries = 0
    for requests in range(1, 60 * calls_per_s + 1):
        now = (requests - 1) / calls_per_s
        budget.earn(1, rules, now)
        while budget.take(1, rules, now):
            retries += 1
            budget.earn(1, rules, now)
        allowed = requests * share + (now + MEMORY_S) * rules.retries_per_s
        assert retries <= allowed + 1e-6
    # The bound is also about what is had: a tenth of it may fade.
    assert retries >= 0.9 * (60 + MEMORY_S) * 3.0 / (1 + share) - 2
    assert retries >= 0.85 * 60 * (calls_per_s * share + 3.0 / (1 + share)) - 2


def test_random_bursts_stay_below_the_bound() -> None:
    for seed in range(50):
        chance, budget = random.Random(seed), RetryBudget()
        now = requests = retries = 0.0
        for _ in range(500):
            now += chance.choice([0.0, 0.01, 1.0, 30.0]) * chance.random()
            calls = chance.randrange(20)
            requests += calls
            budget.earn(calls, RULES, now)
            taken = budget.take(chance.randrange(20), RULES, now)
            retries += taken
            if chance.random() < 0.5:  # a retry that ends by its caller's doing earns nothing
                budget.earn(taken, RULES, now)
            assert retries <= requests * 0.1 + (now + MEMORY_S) * 3.0 + 1e-6


# The owner


def owner_of(rules: Rules = RULES) -> CircuitBreaker:
    return CircuitBreaker(rules, FakeTime(), lambda: 0.0, lambda _: 100)


def test_each_deployment_has_a_budget_of_its_own_for_all_processes_together() -> None:
    owner = owner_of()
    assert owner.retry("a", 1, {"d": 20, "e": 5}) == {"d": 20, "e": 5}

    assert owner.retry("b", 1, {"d": 20}) == {"d": STEADY - 20}
    assert owner.board()["e"]["retries_left"] == STEADY - 5
    assert (owner.stats()["retries"], owner.stats()["retries_refused"]) == (STEADY + 5, 13)


def test_a_message_that_comes_twice_is_answered_twice_and_costs_once() -> None:
    owner = owner_of()
    first = owner.retry("a", 1, {"d": 20})
    assert owner.retry("a", 1, {"d": 20}) == first
    second = owner.retry("a", 2, {"d": 20})
    assert owner.retry("a", 1, {"d": 20}) == {}
    assert owner.retry("a", 2, {"d": 20}) == second == {"d": STEADY - 20}


def test_what_is_reported_earns_except_what_callers_did_and_what_earned_elsewhere() -> None:
    owner = owner_of(SHARE_ONLY)
    owner.report("a", 1, [Outcome("d", 0, Verdict.IGNORED, 1_000)])
    owner.report("a", 2, [Outcome("d", 0, Verdict.SUCCESS, 1_000, earns=False)])
    assert owner.retry("a", 1, {"d": 1}) == {"d": 0}
    void = Outcome("d", 77, Verdict.FAILURE, 11)
    owner.report("a", 3, [void, Outcome("d", 0, Verdict.THROTTLED, 11, 0.0)])

    assert owner.retry("a", 2, {"d": 5}) == {"d": 2}


def test_a_circuit_that_finds_no_room_is_granted_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "DEPLOYMENTS_MAX", 1)
    owner = owner_of()

    assert owner.retry("a", 1, {"d": 1, "e": 1}) == {"d": 1, "e": 0}


def test_answers_are_kept_for_a_bounded_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner_module, "HOLDERS_MAX", 2)
    owner = owner_of()
    for holder in "abc":
        owner.retry(holder, 1, {"d": 1})

    assert list(owner._answers) == ["b", "c"]


# The desk


class World:
    """An owner and desks, each with a line of its own."""

    def __init__(self, rules: Rules) -> None:
        starts = count(1_000_000, 1_000_000)
        self.rules = rules
        self.time = FakeTime()
        self.house = House(
            lambda: CircuitBreaker(rules, self.time, lambda: 0.0, lambda _: next(starts))
        )
        self.desks: list[CircuitBreakerDesk] = []

    @property
    def owner(self) -> CircuitBreaker:
        return self.house.owner  # type: ignore[no-any-return]

    async def desk(self) -> tuple[CircuitBreakerDesk, Wire]:
        wire = self.house.line()
        self.desks.append(
            CircuitBreakerDesk(wire, "h", self.time, lambda: len(self.desks) / 16, self.time.sleep)
        )
        self.desks[-1].set_rules(self.rules)
        await self.desks[-1].start()
        await settle()
        return self.desks[-1], wire

    async def calls(self, desk: CircuitBreakerDesk, times: int, verdict: Verdict) -> None:
        for _ in range(times):
            given = await desk.admit("d")
            assert isinstance(given, Pass), given
            desk.judge(given, verdict)
        await self.time.advance(0.5)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(RULES)
    yield world
    for desk in world.desks:
        await desk.close()


async def test_all_who_ask_at_once_are_asked_for_in_one_message(world: World) -> None:
    desk, wire = await world.desk()
    answers = await asyncio.gather(*(desk.may_retry("d") for _ in range(32)))
    others = await asyncio.gather(*(desk.may_retry(name) for name in "efg"))

    assert answers == [True] * STEADY + [False] * (32 - STEADY)
    assert all(others)
    assert wire.sent["retry"] == 2


async def test_who_asks_while_a_message_is_under_way_goes_with_the_next(world: World) -> None:
    desk, wire = await world.desk()
    first = asyncio.ensure_future(desk.may_retry("d"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert wire.sent["retry"] == 1
    rest = [asyncio.ensure_future(desk.may_retry("d")) for _ in range(10)]

    assert await asyncio.gather(first, *rest) == [True] * 11
    assert wire.sent["retry"] == 2


async def test_two_processes_share_one_budget(world: World) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    granted = [await desk.may_retry("d") for _ in range(20) for desk in (one, two)]

    assert sum(granted) == STEADY


async def test_a_caller_that_goes_away_leaves_its_grant_to_the_others(world: World) -> None:
    desk, _ = await world.desk()
    asking = [asyncio.ensure_future(desk.may_retry("d")) for _ in range(STEADY + 5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for each in asking[:5]:
        each.cancel()
    answers = await asyncio.gather(*asking, return_exceptions=True)

    assert answers[5:] == [True] * STEADY


async def test_with_the_owner_away_only_own_calls_earn_and_no_call_earns_twice() -> None:
    world = World(Rules(retry_share=0.1, retries_per_s=0.5))
    desk, wire = await world.desk()
    wire.cut = True
    wire.break_held()
    await settle()
    sent = wire.sent["retry"]
    assert not await desk.may_retry("d")
    await world.calls(desk, 25, Verdict.SUCCESS)
    assert [await desk.may_retry("d") for _ in range(3)] == [True, True, False]
    assert wire.sent["retry"] == sent
    wire.cut = False
    await world.time.advance(2.0)

    assert world.owner.board()["d"]["calls"] == 25
    assert world.owner.board()["d"]["retries_left"] == int(0.5 * MEMORY_S / 1.1)
    assert await desk.may_retry("d")
    await desk.close()


@pytest.mark.parametrize("fate", [Fate.LOST, Fate.UNHEARD, Fate.LATE])
async def test_an_asking_that_is_not_answered_is_refused_and_for_a_while_not_repeated(
    world: World, fate: Fate
) -> None:
    desk, wire = await world.desk()
    wire.fates.append(fate)
    assert not await desk.may_retry("d")
    assert not await desk.may_retry("d")
    assert wire.sent["retry"] == 1
    await world.time.advance(AWAY_S)

    assert await desk.may_retry("d")


async def test_a_doubled_asking_costs_once(world: World) -> None:
    desk, wire = await world.desk()
    wire.fates.append(Fate.DOUBLED)
    assert await desk.may_retry("d")

    assert world.owner.board()["d"]["retries_left"] == STEADY - 1


async def test_what_the_owner_raises_is_raised_and_the_next_asking_goes_on(world: World) -> None:
    desk, _ = await world.desk()

    def bug(method: str, _: object) -> Callable[[], None]:
        if method == "retry":
            raise KeyError("a bug")
        return lambda: None

    world.house.around = bug
    asking = [asyncio.ensure_future(desk.may_retry("d")) for _ in range(2)]
    await settle()
    for each in asking:
        with pytest.raises(KeyError, match="a bug"):
            await each
    del world.house.around

    assert await desk.may_retry("d")


async def test_closing_refuses_who_waits() -> None:
    class Silent:
        name = "owner"
        sent: ClassVar[Counter[str]] = Counter()

        async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
            await asyncio.get_running_loop().create_future()

    retries = Retries(Silent(), "h", FakeTime(), lambda: True)
    asking = [asyncio.ensure_future(retries.may("d"))]
    await settle()
    asking.append(asyncio.ensure_future(retries.may("d")))
    await settle()
    await retries.close()

    assert await asyncio.gather(*asking) == [False] * 2
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_storm_of_failures_is_not_made_much_worse(world: World) -> None:
    """Four processes, 48 requests a second, all failing, each tried as often as is allowed."""
    desks = [(await world.desk())[0] for _ in range(4)]
    await desks[0].force("d", State.FORCED_CLOSED)
    await settle()
    attempts = requests = 0

    async def request(desk: CircuitBreakerDesk) -> None:
        nonlocal attempts
        for tried in range(4):
            if tried and not await desk.may_retry("d"):
                return
            given = await desk.admit("d")
            assert isinstance(given, Pass)
            attempts += 1
            desk.judge(given, Verdict.FAILURE)

    for _ in range(240):  # 60 s
        requests += 12
        await asyncio.gather(*(request(desk) for desk in desks for _ in range(3)))
        await world.time.advance(0.25)

    assert attempts <= requests * (1 + 0.1 * 1.12) + 3.0 * 60 + 30
    assert 1.1 < attempts / requests <= 1.2
