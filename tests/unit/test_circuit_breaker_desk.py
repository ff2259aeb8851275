"""The breaker's desk: free while all is well, one probe when it is not, open when in doubt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from itertools import count

import pytest

from actors.circuit_breaker.desk import LOCAL_AFTER_S, SUCCESS_PAUSE_S, CircuitBreakerDesk
from actors.circuit_breaker.owner import CircuitBreaker
from actors.circuit_breaker.policy import (
    CLEAN,
    Outcome,
    Pass,
    Reason,
    Refusal,
    Rules,
    Standing,
    State,
    Verdict,
)
from actors.ref import OwnerUnavailable
from tests.support.bad_wire import Fate, House, Wire
from tests.support.fake_time import FakeTime, settle

RULES = Rules(failure_threshold=3, success_threshold=2)


class World:
    """An owner and as many desks as a test wants, each with a line of its own."""

    def __init__(self) -> None:
        starts = count(1_000_000, 1_000_000)
        self.time = FakeTime()
        self.house = House(
            lambda: CircuitBreaker(RULES, self.time, lambda: 0.0, lambda _: next(starts))
        )
        self.desks: list[CircuitBreakerDesk] = []

    @property
    def owner(self) -> CircuitBreaker:
        return self.house.owner  # type: ignore[no-any-return]

    async def desk(self) -> tuple[CircuitBreakerDesk, Wire]:
        wire = self.house.line()
        number = len(self.desks) + 1
        desk = CircuitBreakerDesk(
            wire, f"h{number}", self.time, lambda: number / 16, self.time.sleep
        )
        await desk.start()
        self.desks.append(desk)
        return desk, wire


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for desk in world.desks:
        await desk.close()


async def passed(desk: CircuitBreakerDesk, deployment: str = "d") -> Pass:
    answer = await desk.admit(deployment)
    assert isinstance(answer, Pass), answer
    return answer


async def refused(desk: CircuitBreakerDesk, deployment: str = "d") -> Refusal:
    answer = await desk.admit(deployment)
    assert isinstance(answer, Refusal), answer
    return answer


async def fail(desk: CircuitBreakerDesk, times: int = 3) -> None:
    for given in [await passed(desk) for _ in range(times)]:
        desk.judge(given, Verdict.FAILURE)
    await settle()


async def test_what_is_closed_or_unknown_costs_no_await_and_no_message(world: World) -> None:
    desk, wire = await world.desk()
    await settle()
    before = wire.sent.copy()
    with pytest.raises(StopIteration) as stop:
        desk.admit("d").send(None)

    assert stop.value.value == Pass("d")
    assert desk.standing("d") is CLEAN
    assert wire.sent == before


async def test_the_deciding_failure_opens_it_for_every_desk_without_any_time_passing(
    world: World,
) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    await fail(one)

    assert await refused(one) == await refused(two)
    assert await refused(two) == Refusal("d", 60.0, State.OPEN, Reason.CONSECUTIVE_FAILURES)
    await world.time.advance(20.0)
    assert (await refused(two)).retry_after_s == 40.0
    assert two.standing("d").retry_after_s == 40.0


async def test_successes_wait_for_company_and_failures_take_them_along(world: World) -> None:
    desk, wire = await world.desk()
    for number in range(50):
        desk.judge(await passed(desk), Verdict.SUCCESS if number % 5 else Verdict.SLOW)
    await settle()
    assert wire.sent["report"] == 0
    await world.time.advance(SUCCESS_PAUSE_S)
    assert wire.sent["report"] == 1
    assert world.owner.board()["d"]["calls"] == 50
    desk.judge(await passed(desk), Verdict.SUCCESS)
    desk.judge(await passed(desk), Verdict.FAILURE)
    await settle()

    assert wire.sent["report"] == 2
    assert world.owner.board()["d"]["calls"] == 52


async def test_callers_own_mistakes_are_not_even_sent(world: World) -> None:
    desk, wire = await world.desk()
    for _ in range(10_000):
        desk.judge(await passed(desk), Verdict.IGNORED)
    await world.time.advance(1.0)

    assert wire.sent["report"] == 0
    assert await passed(desk) == Pass("d")


async def test_a_throttle_is_obeyed_here_at_once_and_everywhere_soon(world: World) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    one.judge(await passed(one), Verdict.THROTTLED, retry_after_s=5.0)
    assert (await refused(one)).retry_after_s == 5.0
    await settle()
    assert (await refused(two)).retry_after_s == 5.0
    await world.time.advance(4.9)
    assert (await refused(two)).state is State.CLOSED
    await world.time.advance(0.1)

    assert await passed(one) == await passed(two) == Pass("d")


async def test_only_one_desk_gets_the_probe_and_its_success_counts(world: World) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    await fail(one)
    await world.time.advance(60.0)
    probe = await passed(one)
    assert probe.probe is not None
    assert (await refused(two)).state is State.HALF_OPEN
    assert await refused(one)
    one.judge(probe, Verdict.SUCCESS)
    await settle()
    two.judge(await passed(two), Verdict.SUCCESS)
    await settle()

    assert (await passed(one)).probe is None
    assert one.standing("d").state is State.CLOSED


async def test_a_probe_that_has_begun_to_answer_is_judged_and_keeps_nobody_waiting(
    world: World,
) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    await fail(one)
    await world.time.advance(60.0)
    first = one.begun(await passed(one), Verdict.SUCCESS)
    await settle()
    second = two.begun(await passed(two), Verdict.SUCCESS)
    await settle()

    assert one.standing("d").state is two.standing("d").state is State.CLOSED
    one.judge(first, Verdict.SUCCESS)
    await one.flush()
    board = (await one.board())["d"]
    assert board["calls"] == 0, "the end of a good probe is no second success"

    two.judge(second, Verdict.UNREACHABLE)
    await two.flush()
    board = (await one.board())["d"]
    assert (board["calls"], board["failures"]) == (1, 1), "what fails later counts as any call's"


async def test_a_call_that_is_no_probe_is_judged_at_its_end_only(world: World) -> None:
    desk, wire = await world.desk()
    given = await passed(desk)

    assert desk.begun(given, Verdict.SUCCESS) == given
    await settle()
    assert wire.sent["report"] == 0


async def test_of_many_callers_at_once_one_asks_and_one_probes(world: World) -> None:
    desk, wire = await world.desk()
    await fail(desk)
    await world.time.advance(60.0)
    answers = await asyncio.gather(*(desk.admit("d") for _ in range(64)))

    assert sum(isinstance(answer, Pass) for answer in answers) == 1
    assert wire.sent["probe"] == 1


async def test_refused_desks_do_not_ask_again_before_it_makes_sense(world: World) -> None:
    one, _ = await world.desk()
    two, wire = await world.desk()
    await fail(one)
    await world.time.advance(60.0)
    await passed(one)
    for _ in range(50):
        await refused(two)
        await world.time.advance(0.1)

    assert wire.sent["probe"] <= 2


async def test_a_bad_probe_opens_it_again_for_all(world: World) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    await fail(one)
    await world.time.advance(60.0)
    one.judge(await passed(one), Verdict.FAILURE)
    await settle()

    assert await refused(two) == Refusal("d", 120.0, State.OPEN, Reason.PROBE_FAILED)


async def test_a_long_probe_keeps_its_lease(world: World) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    await fail(one)
    await world.time.advance(60.0)
    probe = await passed(one)
    for _ in range(100):
        await world.time.advance(2.0)
        assert one.probing("d")
        await refused(two)
    one.judge(probe, Verdict.SUCCESS)
    await settle()

    assert not one.probing("d")
    assert (await passed(two)).probe is not None


async def test_the_probe_of_a_desk_that_died_is_lent_again_within_a_lease_life(
    world: World,
) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    await fail(one)
    await world.time.advance(60.0)
    await passed(one)
    await one.close()
    await world.time.advance(RULES.probe_s - 0.1)
    assert await refused(two)
    await world.time.advance(0.1)

    assert (await passed(two)).probe is not None


@pytest.mark.parametrize("fate", [Fate.UNHEARD, Fate.LATE, Fate.LOST])
async def test_a_probe_whose_grant_was_not_heard_is_lent_again_within_a_lease_life(
    world: World, fate: Fate
) -> None:
    desk, wire = await world.desk()
    await fail(desk)
    await world.time.advance(60.0)
    wire.fates.append(fate)
    assert await refused(desk)
    await wire.deliver_late()
    await world.time.advance(RULES.probe_s)

    assert (await passed(desk)).probe is not None


async def test_a_caller_that_goes_away_while_asking_leaves_no_probe_behind(world: World) -> None:
    desk, _ = await world.desk()
    await fail(desk)
    await world.time.advance(60.0)
    asking = asyncio.ensure_future(desk.admit("d"))
    await asyncio.sleep(0)
    asking.cancel()
    await world.time.advance(RULES.probe_s)

    assert (await passed(desk)).probe is not None


async def test_lost_and_doubled_reports_count_once(world: World) -> None:
    desk, wire = await world.desk()
    wire.fates.extend([Fate.LOST, Fate.UNHEARD, Fate.DOUBLED])
    desk.judge(await passed(desk), Verdict.FAILURE)
    await world.time.advance(5.0)
    wire.fates.append(Fate.DOUBLED)
    desk.judge(await passed(desk), Verdict.FAILURE)
    await world.time.advance(5.0)

    assert world.owner.board()["d"]["failures_in_row"] == 2


async def test_with_the_owner_away_the_last_snapshot_holds(world: World) -> None:
    desk, wire = await world.desk()
    await fail(desk)
    wire.cut = True
    wire.break_held()
    desk.judge(await passed(desk, "other"), Verdict.FAILURE)
    await world.time.advance(30.0)

    assert await passed(desk, "other")
    assert (await refused(desk)).retry_after_s == 30.0


async def test_a_probe_that_is_due_waits_for_the_owner_but_not_for_ever(world: World) -> None:
    desk, wire = await world.desk()
    await fail(desk)
    await world.time.advance(59.0)
    wire.cut = True
    wire.break_held()
    await world.time.advance(1.0)
    asked = wire.sent["probe"]
    for _ in range(16):
        assert (await refused(desk)).retry_after_s <= 1.0
    assert wire.sent["probe"] == asked + 1
    await world.time.advance(LOCAL_AFTER_S)
    alone = await passed(desk)
    assert alone.probe is None
    assert await refused(desk)
    desk.judge(alone, Verdict.SUCCESS)
    assert await passed(desk)
    wire.cut = False
    await world.time.advance(2.0)

    assert world.owner.board()["d"]["state"] == "open"


async def test_a_restarted_owner_learns_what_was_open(world: World) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    await fail(one)
    await world.time.advance(20.0)
    world.house.restart()
    await world.time.advance(1.0)
    late, _ = await world.desk()

    assert world.owner.board()["d"]["state"] == "open"
    for desk in (one, two, late):
        assert (await refused(desk)).retry_after_s == pytest.approx(39.0, abs=1.0)


@pytest.mark.parametrize("verdict", [Verdict.SUCCESS, Verdict.THROTTLED])
async def test_a_restarted_owner_learns_what_was_open_though_it_heard_of_calls_before(
    world: World, verdict: Verdict
) -> None:
    one, _ = await world.desk()
    await fail(one)
    world.house.restart()
    world.owner.report("another process", 1, [Outcome("d", 0, verdict)])
    await world.time.advance(1.0)

    assert world.owner.board()["d"]["state"] == "open"
    assert (await refused(one)).state is State.OPEN


async def test_a_restarted_owner_learns_what_was_forced_and_forgets_what_was_let_go(
    world: World,
) -> None:
    desk, _ = await world.desk()
    await desk.force("shut", State.FORCED_OPEN)
    await desk.force("free", State.FORCED_OPEN)
    assert (await desk.force("free", None)).state is State.CLOSED
    await settle()
    world.house.restart()
    await world.time.advance(1.0)

    assert {name: row["state"] for name, row in (await desk.board()).items()} == {
        "shut": "forced_open"
    }
    assert not desk.standing("shut").callable
    assert await passed(desk, "free") == Pass("free")


async def test_a_probe_under_way_survives_the_owner(world: World) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    await fail(one)
    await world.time.advance(60.0)
    probe = await passed(one)
    await settle()
    world.house.restart()
    for _ in range(20):
        await world.time.advance(1.0)
        assert await refused(two)
    one.judge(probe, Verdict.SUCCESS)
    await settle()
    two.judge(await passed(two), Verdict.SUCCESS)
    await settle()

    assert world.owner.board()["d"]["state"] == "closed"


async def test_after_a_restart_calls_of_what_was_closed_again_count(world: World) -> None:
    desk, _ = await world.desk()
    await fail(desk)
    await world.time.advance(60.0)
    for _ in range(2):
        desk.judge(await passed(desk), Verdict.SUCCESS)
        await settle()
    assert (await passed(desk)).generation != 0
    world.house.restart()
    await world.time.advance(1.0)
    await fail(desk)

    assert (await refused(desk)).state is State.OPEN


async def test_rules_are_told_now_and_again_to_an_owner_that_lost_them(world: World) -> None:
    one, _ = await world.desk()
    two, _ = await world.desk()
    two.set_rules(Rules(failure_threshold=1), version=2)
    await settle()
    one.set_rules(Rules(failure_threshold=9), version=1)
    await settle()
    world.house.restart()
    await world.time.advance(2.0)
    await fail(one, 1)

    assert world.owner.stats()["rules_version"] == 2
    assert (await refused(two)).state is State.OPEN


async def test_forced_closed_ends_a_throttle_here_too(world: World) -> None:
    desk, _ = await world.desk()
    desk.judge(await passed(desk), Verdict.THROTTLED, retry_after_s=500.0)
    await settle()
    await desk.force("d", State.FORCED_CLOSED)
    await settle()

    assert (await passed(desk)).probe is None


async def test_an_owner_that_fails_on_a_message_does_not_stop_the_next(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    desk, _ = await world.desk()

    def bug(method: str, _: object) -> Callable[[], None]:
        if method == "report":
            raise KeyError("a bug")
        return lambda: None

    world.house.around = bug
    with caplog.at_level(logging.ERROR):
        await fail(desk, 1)
    del world.house.around
    assert len(caplog.records) == desk.stats()["dropped"] == 1
    await world.time.advance(1.0)
    await fail(desk)

    assert (await refused(desk)).state is State.OPEN


async def test_a_desk_that_finds_no_owner_says_so_and_lets_calls_through(world: World) -> None:
    wire = world.house.line()
    wire.cut = True
    desk = CircuitBreakerDesk(wire, "h", world.time, lambda: 0.5, world.time.sleep)
    with pytest.raises(OwnerUnavailable):
        await desk.start()
    desk.judge(await passed(desk), Verdict.FAILURE)
    wire.cut = False
    await desk.start()
    await settle()

    assert world.owner.board()["d"]["failures_in_row"] == 1
    await desk.close()


async def test_closing_reports_what_is_left_and_stops_every_task(world: World) -> None:
    desk, _ = await world.desk()
    desk.judge(await passed(desk), Verdict.SUCCESS)
    await fail(desk, 2)
    await desk.force("p", State.FORCED_OPEN)
    desk.judge(await passed(desk), Verdict.SUCCESS)
    await desk.close()
    await settle()

    assert world.owner.board()["d"]["calls"] == 4
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_desk_tells_how_it_is(world: World) -> None:
    desk, _ = await world.desk()
    await fail(desk)
    await world.time.advance(60.0)
    await passed(desk)
    await settle()

    stats = desk.stats()
    assert stats["connected"] is True
    assert stats["deployments"] == {"half_open": 1}
    assert stats["probes"] == ["d"]
    assert (stats["buffered"], stats["dropped"]) == (0, 0)
    assert desk.standing("d") == Standing(
        State.HALF_OPEN, desk.standing("d").generation, 5.0, Reason.CONSECUTIVE_FAILURES
    )
