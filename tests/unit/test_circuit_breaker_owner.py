"""The breaker's owner: numbered messages, one probe for all, bounds, and what it publishes."""

from __future__ import annotations

import asyncio
import logging
import pickle
from typing import Any

import pytest

from actors.circuit_breaker import owner as owner_module
from actors.circuit_breaker.circuit import FORGET_AFTER_S
from actors.circuit_breaker.owner import DEPLOYMENTS_MAX, HOLDERS_MAX, CircuitBreaker
from actors.circuit_breaker.policy import (
    CLEAN,
    RULES_KEY,
    Claim,
    Outcome,
    Pass,
    Reason,
    Rules,
    Standing,
    State,
    Verdict,
)
from tests.support.fake_time import FakeTime

RULES = Rules(failure_threshold=3, success_threshold=1)


def breaker(time: FakeTime | None = None, **more: Any) -> CircuitBreaker:
    return CircuitBreaker(RULES, time or FakeTime(), lambda: 0.0, lambda _: 100, **more)


def failures(times: int = 3, deployment: str = "d", generation: int = 0) -> list[Outcome]:
    return [Outcome(deployment, generation, Verdict.FAILURE, times)]


async def published(owner: CircuitBreaker, seen: dict[str, int] | None = None) -> dict[str, Any]:
    changes = await owner.watch(seen or {}, 0.0)
    return {key: value for key, (_, value) in changes.items() if key != RULES_KEY}


async def test_failures_of_several_processes_add_up_and_everybody_hears_of_it() -> None:
    owner = breaker()
    for holder in ("a", "b", "c"):
        owner.report(holder, 1, failures(1))

    assert await published(owner) == {
        "d": Standing(State.OPEN, 101, 60.0, Reason.CONSECUTIVE_FAILURES)
    }


def test_a_message_that_comes_twice_or_after_its_successor_counts_once() -> None:
    owner = breaker()
    assert owner.report("a", 1, failures(1)) == 1
    assert owner.report("a", 1, failures(1)) == 1
    assert owner.report("a", 2, failures(1)) == 2
    assert owner.report("a", 1, failures(1)) == 2

    assert owner.board()["d"]["failures_in_row"] == 2
    assert owner.stats()["doubled"] == 2


async def test_nothing_is_published_of_what_never_left_the_clean_state() -> None:
    owner = breaker()
    owner.report("a", 1, [Outcome("d", 0, Verdict.SUCCESS, 500), *failures(2)])

    assert await published(owner) == {}


async def test_a_snapshot_says_how_long_it_takes_from_now() -> None:
    time = FakeTime()
    owner = breaker(time)
    owner.report("a", 1, failures())
    await time.advance(45.0)

    assert (await published(owner))["d"].retry_after_s == 15.0


async def test_the_return_to_clean_is_published() -> None:
    time = FakeTime()
    owner = breaker(time)
    owner.report("a", 1, failures())
    await time.advance(60.0)
    lease = owner.probe("d", "b", "p")
    assert isinstance(lease, Pass)
    owner.report("b", 1, [Outcome("d", lease.generation, Verdict.SUCCESS, probe="p")])

    assert await published(owner) == {"d": Standing(State.CLOSED, 103)}


async def test_a_held_watch_hears_of_a_trip_with_the_standing_as_it_is_then() -> None:
    time = FakeTime()
    owner = breaker(time)
    seen = {key: version for key, (version, _) in (await owner.watch({}, 0.0)).items()}
    watch = asyncio.ensure_future(owner.watch(seen))
    await time.advance(5.0)
    owner.report("a", 1, failures())

    assert {key: value.state for key, (_, value) in (await watch).items()} == {"d": State.OPEN}


def test_one_probe_is_lent_in_the_whole_cluster() -> None:
    time = FakeTime()
    owner = breaker(time)
    owner.report("a", 1, failures())
    time.now += 60.0
    answers = [owner.probe("d", holder, f"{holder}1") for holder in "abc"]

    assert [type(answer) for answer in answers] == [Pass, Standing, Standing]
    assert owner.stats()["probes"] == 1


def test_a_probe_of_what_is_closed_is_answered_by_its_standing() -> None:
    owner = breaker()
    owner.report("a", 1, failures(1))

    assert owner.probe("d", "a", "p") == CLEAN
    assert owner.probe("unknown", "a", "p") == CLEAN


async def test_a_restarted_owner_learns_from_the_first_desk_that_asks_for_a_probe() -> None:
    time = FakeTime()
    owner = breaker(time)
    claim = Claim("d", Standing(State.OPEN, 7, 0.0))

    assert owner.probe("d", "a", "p", claim) == Standing(State.HALF_OPEN, 102, 5.0, Reason.LEARNED)
    assert list(await published(owner)) == ["d"]
    time.now += 5.0
    assert isinstance(owner.probe("d", "a", "p", claim), Pass)


def test_a_restarted_owner_learns_from_the_prober_that_renews_its_lease() -> None:
    owner = breaker()
    claim = Claim("d", Standing(State.HALF_OPEN, 7), "p")
    assert owner.renew("d", "a", "p", claim)
    assert isinstance(owner.probe("d", "b", "q", claim), Standing)
    owner.report("a", 1, [Outcome("d", 7, Verdict.SUCCESS, probe="p")])

    assert owner.board()["d"]["state"] == "closed"


async def test_restating_twice_or_late_is_restating_once() -> None:
    owner = breaker()
    claims = [Claim("d", Standing(State.OPEN, 7, 30.0)), Claim("clean", CLEAN)]
    assert owner.restate("a", claims) == []
    first = await published(owner)
    owner.restate("b", [Claim("d", Standing(State.OPEN, 7, 500.0))])

    assert await published(owner) == first == {"d": Standing(State.OPEN, 101, 30.0, Reason.LEARNED)}


async def test_an_operator_forces_and_lets_go_and_each_order_counts_once() -> None:
    owner = breaker()
    assert owner.force("d", State.FORCED_OPEN, "1").state is State.FORCED_OPEN
    assert owner.force("d", None, "2") == Standing(State.CLOSED, 102)
    owner.force("d", State.FORCED_OPEN, "1")

    assert await published(owner) == {"d": Standing(State.CLOSED, 102)}
    with pytest.raises(ValueError, match="forced open or closed"):
        owner.force("d", State.HALF_OPEN)


async def test_new_rules_count_from_now_on_and_older_ones_are_not_taken_back() -> None:
    owner = breaker()
    owner.report("a", 1, failures(1))
    assert owner.set_rules(Rules(failure_threshold=2), version=4) == 4
    assert owner.set_rules(Rules(failure_threshold=9), version=3) == 4
    owner.report("a", 2, failures(1))

    assert owner.board()["d"]["state"] == "open"
    assert (await owner.watch({}, 0.0))[RULES_KEY][1] == 4


def test_a_refused_credential_is_reported_once_until_it_is_well_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    time = FakeTime()
    owner = breaker(time)
    with caplog.at_level(logging.WARNING):
        owner.report("a", 1, [Outcome("d", 0, Verdict.CREDENTIAL)])
        for seq in (2, 3):
            time.now += 500.0
            lease = owner.probe("d", "a", f"p{seq}")
            assert isinstance(lease, Pass)
            outcome = Outcome("d", lease.generation, Verdict.CREDENTIAL, probe=lease.probe)
            owner.report("a", seq, [outcome])
        owner.report("b", 1, failures(3, "e"))

    assert [record.getMessage() for record in caplog.records] == [
        "breaker of d: open (credential refused)"
    ]


def test_the_board_shows_the_figures_behind_each_standing() -> None:
    owner = breaker()
    owner.report("a", 1, [Outcome("d", 0, Verdict.SLOW, 2), Outcome("d", 0, Verdict.SUCCESS, 5)])
    owner.report("a", 2, [Outcome("d", 0, Verdict.UNREACHABLE, 2)])
    owner.report("a", 3, [Outcome("d", 0, Verdict.THROTTLED, 1, 9.0)])
    assert owner.board()["d"] == {
        "state": "closed",
        "reason": "",
        "generation": 0,
        "retry_after_s": 9.0,
        "open_for_s": 0.0,
        "calls": 9,
        "failures": 2,
        "slow": 2,
        "failures_in_row": 2,
        "retries_left": 28,
        "verdicts": {"slow": 2, "success": 5, "unreachable": 2, "throttled": 1},
    }
    owner.report("a", 4, [Outcome("d", 0, Verdict.UNREACHABLE, 1)])

    assert owner.board()["d"]["open_for_s"] == 60.0


def test_in_a_hundred_recoveries_there_is_one_probe_at_a_time_though_half_of_the_probers_die() -> (
    None
):
    time = FakeTime()
    owner = breaker(time)
    owner.report("a", 1, failures())
    out_s = []
    for recovery in range(100):
        time.now += owner.board()["d"]["open_for_s"]
        dies = recovery % 2 == 0
        lent_until, began_at, seq = -1.0, time.now, recovery * 1_000
        while owner.board()["d"]["state"] != "closed":
            asked = [owner.probe("d", f"h{n}", f"h{n}:{recovery}:{time.now}") for n in range(16)]
            lent = [answer for answer in asked if isinstance(answer, Pass)]
            assert len(lent) <= (time.now >= lent_until)
            for given in lent:
                lent_until = time.now + given.lease_s
                if dies:
                    dies = False  # nobody hears of this probe again
                    continue
                seq += 1
                outcome = Outcome("d", given.generation, Verdict.SUCCESS, probe=given.probe)
                owner.report("b", seq, [outcome])
                lent_until = time.now
            time.now += 0.5
        out_s.append(time.now - began_at)
        generation = owner.board()["d"]["generation"]
        owner.report("c", recovery, failures(3, generation=generation))

    assert max(out_s) <= RULES.probe_s + 1.0


async def test_a_full_table_forgets_what_was_idle_and_clean_and_nothing_else() -> None:
    time = FakeTime()
    owner = breaker(time)
    owner.report("a", 1, failures(3, "open"))
    owner.report("a", 2, [o for n in range(DEPLOYMENTS_MAX - 1) for o in failures(1, f"d{n}")])
    owner.report("a", 3, failures(3, "new"))
    assert owner.stats()["unjudged"] == 3
    assert owner.restate("a", [Claim("new", Standing(State.OPEN, 1, 9.0))]) == ["new"]
    with pytest.raises(ValueError, match="already"):
        owner.force("new", State.FORCED_OPEN)
    time.now += FORGET_AFTER_S
    owner.report("a", 4, failures(3, "new"))

    assert sorted(owner.board()) == ["new", "open"]
    assert sorted(await published(owner)) == ["new", "open"]


async def test_a_forgotten_deployment_is_said_to_be_gone() -> None:
    time = FakeTime()
    owner = breaker(time)
    owner.force("d", State.FORCED_CLOSED)
    owner.force("d", None)
    version = (await owner.watch({}, 0.0))["d"][0]
    time.now += FORGET_AFTER_S
    owner.report("a", 1, [o for n in range(DEPLOYMENTS_MAX) for o in failures(1, f"d{n}")])

    assert (await owner.watch({"d": version}, 0.0))["d"] == (0, None)


def test_the_numbers_of_the_longest_silent_holders_are_forgotten_first() -> None:
    owner = breaker()
    for number in range(HOLDERS_MAX + 5):
        owner.report(str(number), 1, [])

    assert owner.stats()["holders"] == HOLDERS_MAX


def test_it_can_be_an_actor() -> None:
    owner = CircuitBreaker(**pickle.loads(pickle.dumps({"rules": RULES})))

    assert owner.protocol() == CircuitBreaker.PROTOCOL
    assert owner_module.CircuitBreaker().stats()["deployments"] == 0
