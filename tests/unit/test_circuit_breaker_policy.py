"""One deployment's breaker, state by state, and the outbox of what is reported to it."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from itertools import count, product

import pytest

from actors.circuit_breaker import outbox as outbox_module
from actors.circuit_breaker.circuit import PROBE_AGE_S_MAX, THROTTLE_S_MAX, Circuit, Seen, Window
from actors.circuit_breaker.outbox import AGE_S_MAX, RUNS_SENT_MAX, Outbox
from actors.circuit_breaker.policy import (
    FORCED,
    TRANSITIONS,
    Claim,
    Event,
    IllegalTransition,
    Outcome,
    Pass,
    Reason,
    Refusal,
    Rules,
    Standing,
    State,
    Verdict,
)

RULES = Rules(
    failure_threshold=3, success_threshold=2, open_s=60.0, window_s=10, min_calls=10, probe_s=5.0
)
ALLOWED = {
    (State.CLOSED, Event.TRIP): State.OPEN,
    (State.OPEN, Event.COOL): State.HALF_OPEN,
    (State.HALF_OPEN, Event.TRIP): State.OPEN,
    (State.HALF_OPEN, Event.RECOVER): State.CLOSED,
    (State.CLOSED, Event.FORCE_OPEN): State.FORCED_OPEN,
    (State.OPEN, Event.FORCE_OPEN): State.FORCED_OPEN,
    (State.HALF_OPEN, Event.FORCE_OPEN): State.FORCED_OPEN,
    (State.FORCED_CLOSED, Event.FORCE_OPEN): State.FORCED_OPEN,
    (State.CLOSED, Event.FORCE_CLOSE): State.FORCED_CLOSED,
    (State.OPEN, Event.FORCE_CLOSE): State.FORCED_CLOSED,
    (State.HALF_OPEN, Event.FORCE_CLOSE): State.FORCED_CLOSED,
    (State.FORCED_OPEN, Event.FORCE_CLOSE): State.FORCED_CLOSED,
    (State.FORCED_OPEN, Event.RELEASE): State.CLOSED,
    (State.FORCED_CLOSED, Event.RELEASE): State.CLOSED,
}


def circuit(random: float = 0.0) -> Circuit:
    numbers = count(100)
    return Circuit("d", lambda: next(numbers), lambda: random)


def outcome(
    of: Circuit,
    verdict: Verdict,
    times: int = 1,
    *,
    retry_after_s: float | None = None,
    probe: str | None = None,
) -> Outcome:
    return Outcome("d", of.generation, verdict, times, retry_after_s, probe)


def say(of: Circuit, verdict: Verdict, times: int = 1, now: float = 0.0) -> bool:
    return of.judge(outcome(of, verdict, times), RULES, now)


def opened(now: float = 0.0) -> Circuit:
    of = circuit()
    say(of, Verdict.FAILURE, RULES.failure_threshold, now)
    assert of.state is State.OPEN
    return of


def probing(now: float = 60.0) -> Circuit:
    of = opened()
    assert isinstance(of.take_probe("p", RULES, now), Pass)
    return of


def probed(of: Circuit, verdict: Verdict, now: float, probe: str = "p") -> bool:
    return of.judge(outcome(of, verdict, probe=probe), RULES, now)


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_the_table_is_the_whole_truth_about_transitions(state: State, event: Event) -> None:
    of = circuit()
    of.state = state
    if (state, event) in ALLOWED:
        of._go(event, Reason.NONE)
        assert of.state is ALLOWED[state, event] is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event} is not possible in {state}"):
            of._go(event, Reason.NONE)
        assert of.state is state


HASTY = Rules(failure_threshold=1, success_threshold=1, min_calls=1)
STAYS = {state: dict.fromkeys(Verdict, state) for state in State}
BECOMES: dict[State, dict[Verdict, State]] = STAYS | {
    State.CLOSED: STAYS[State.CLOSED]
    | {
        Verdict.SLOW: State.OPEN,
        Verdict.FAILURE: State.OPEN,
        Verdict.UNREACHABLE: State.OPEN,
        Verdict.CREDENTIAL: State.OPEN,
    },
}
PROBE_MAKES = STAYS[State.HALF_OPEN] | {
    Verdict.SUCCESS: State.CLOSED,
    Verdict.SLOW: State.CLOSED,
    Verdict.FAILURE: State.OPEN,
    Verdict.UNREACHABLE: State.OPEN,
    Verdict.CREDENTIAL: State.OPEN,
}


def in_state(state: State) -> Circuit:
    of = circuit()
    if state in (State.OPEN, State.HALF_OPEN):
        of.judge(outcome(of, Verdict.FAILURE), HASTY, 0.0)
    if state is State.HALF_OPEN:
        of.take_probe("p", HASTY, 60.0)
    if state in FORCED:
        of.force(state, 0.0)
    assert of.state is state
    return of


@pytest.mark.parametrize(("state", "verdict"), list(product(State, Verdict)))
def test_each_verdict_does_in_each_state_what_the_table_says(
    state: State, verdict: Verdict
) -> None:
    of = in_state(state)
    of.judge(outcome(of, verdict, retry_after_s=7.0), HASTY, 60.0)
    throttled = verdict is Verdict.THROTTLED and state in (State.CLOSED, State.FORCED_CLOSED)

    assert of.state is BECOMES[state][verdict]
    assert (of._blocked_until == 67.0) is throttled


@pytest.mark.parametrize("verdict", Verdict)
def test_each_verdict_of_the_probe_does_what_the_table_says(verdict: Verdict) -> None:
    of = in_state(State.HALF_OPEN)
    assert of.judge(outcome(of, verdict, probe="p", retry_after_s=7.0), HASTY, 60.0)

    assert of.state is PROBE_MAKES[verdict]
    assert (of._blocked_until == 67.0) is (verdict is Verdict.THROTTLED)


def test_every_transition_begins_a_new_generation() -> None:
    of = circuit()
    seen = [of.generation]
    say(of, Verdict.FAILURE, 3)
    seen.append(of.generation)
    of.take_probe("p", RULES, 60.0)
    seen.append(of.generation)
    probed(of, Verdict.SUCCESS, 60.0)
    of.take_probe("q", RULES, 60.0)
    probed(of, Verdict.SUCCESS, 60.0, "q")
    seen.append(of.generation)

    assert of.state is State.CLOSED
    assert seen == [0, 100, 101, 102]


def test_failures_in_a_row_open_it() -> None:
    of = circuit()
    assert not say(of, Verdict.FAILURE, 2)
    assert of.state is State.CLOSED
    assert say(of, Verdict.FAILURE)

    assert of.standing(0.0, RULES) == Standing(State.OPEN, 100, 60.0, Reason.CONSECUTIVE_FAILURES)


def test_a_success_between_failures_starts_the_row_anew() -> None:
    of = circuit()
    for _ in range(3):
        say(of, Verdict.FAILURE, 2)
        say(of, Verdict.SUCCESS)

    assert of.state is State.CLOSED


def test_an_unreachable_upstream_opens_it_though_wrong_answers_come_between() -> None:
    of = circuit()
    say(of, Verdict.SUCCESS)
    for _ in range(2):
        say(of, Verdict.UNREACHABLE)
        say(of, Verdict.FAILURE)
    assert of.state is State.CLOSED
    say(of, Verdict.UNREACHABLE)

    assert (of.state, of.reason) == (State.OPEN, Reason.CONSECUTIVE_FAILURES)


@pytest.mark.parametrize("answer", [Verdict.SUCCESS, Verdict.SLOW])
def test_any_answer_ends_the_rows(answer: Verdict) -> None:
    of = circuit()
    for now in range(0, 200, 20):
        say(of, Verdict.UNREACHABLE, 2, float(now))
        say(of, answer, now=float(now))

    assert of.state is State.CLOSED


def test_a_row_of_wrong_answers_opens_a_quiet_deployment_and_a_busy_one_a_little_later() -> None:
    quiet, busy = circuit(), circuit()
    for of, now in ((quiet, 0.0), (busy, 90.0)):
        say(of, Verdict.SUCCESS, 100, now)
        say(of, Verdict.FAILURE, RULES.failure_threshold, 99.0)
    assert (quiet.state, busy.state) == (State.OPEN, State.CLOSED)
    say(busy, Verdict.FAILURE, RULES.min_calls - RULES.failure_threshold - 1, 99.0)
    assert busy.state is State.CLOSED
    say(busy, Verdict.FAILURE, 1, 99.0)

    assert busy.reason is quiet.reason is Reason.CONSECUTIVE_FAILURES


@pytest.mark.parametrize("seed", range(10))
def test_a_busy_deployment_of_which_three_calls_in_ten_fail_stays_closed(seed: int) -> None:
    of, rules, chance = circuit(), Rules(), random.Random(seed)
    of.judge(outcome(of, Verdict.SUCCESS, 100), rules, 0.0)
    for number in range(10_000):
        verdict = Verdict.FAILURE if chance.random() < 0.3 else Verdict.SUCCESS
        of.judge(outcome(of, verdict), rules, 1.0 + number / 100)

    assert of.generation == 0


def test_half_of_enough_calls_being_slow_opens_it_and_fewer_do_not() -> None:
    of = circuit()
    for now in range(4):
        say(of, Verdict.SLOW, now=float(now))
        say(of, Verdict.SUCCESS, now=float(now))
    say(of, Verdict.SUCCESS, now=5.0)
    say(of, Verdict.SUCCESS, now=5.0)
    assert of.state is State.CLOSED
    say(of, Verdict.SLOW, 2, now=5.0)

    assert (of.state, of.reason) == (State.OPEN, Reason.SLOW)
    assert of.open_for_s(6.0) == 59.0


def test_half_of_enough_calls_failing_opens_it_though_never_three_in_a_row() -> None:
    of = circuit()
    for now in range(4):
        say(of, Verdict.FAILURE, now=float(now))
        say(of, Verdict.SUCCESS, now=float(now))
    assert of.state is State.CLOSED
    say(of, Verdict.FAILURE, now=5.0)
    say(of, Verdict.SUCCESS, now=5.0)

    assert of.state is State.OPEN
    assert of.reason is Reason.FAILURE_RATE


def test_failures_that_left_the_window_do_not_count_for_the_rate() -> None:
    of = circuit()
    for now in range(0, 100, 3):
        say(of, Verdict.FAILURE, now=float(now))
        say(of, Verdict.SUCCESS, now=float(now))

    assert of.state is State.CLOSED


def test_a_refused_credential_opens_it_at_once() -> None:
    of = circuit()
    say(of, Verdict.CREDENTIAL)

    assert (of.state, of.reason) == (State.OPEN, Reason.CREDENTIAL)


def test_what_callers_do_wrong_changes_nothing() -> None:
    of = circuit()
    say(of, Verdict.FAILURE, 2)
    before = of.standing(0.0, RULES)
    assert not say(of, Verdict.IGNORED, 10_000)
    assert of.standing(0.0, RULES) == before
    say(of, Verdict.FAILURE)

    assert of.state is State.OPEN


def test_a_throttle_blocks_for_as_long_as_was_asked_and_leaves_the_state_alone() -> None:
    of = circuit()
    throttled = outcome(of, Verdict.THROTTLED, retry_after_s=5.0)
    assert of.judge(throttled, RULES, 10.0)

    assert of.standing(10.0, RULES) == Standing(State.CLOSED, 0, 5.0)
    assert not of.standing(14.9, RULES).callable
    assert of.standing(15.0, RULES).clean


def test_a_shorter_throttle_never_shortens_a_longer_one() -> None:
    of = circuit()
    of.judge(outcome(of, Verdict.THROTTLED, retry_after_s=5.0), RULES, 0.0)

    assert not of.judge(outcome(of, Verdict.THROTTLED, retry_after_s=1.0), RULES, 1.0)
    assert of.standing(1.0, RULES).retry_after_s == 4.0


@pytest.mark.parametrize(
    ("asked_s", "blocked_s"), [(None, 1.0), (0.0, 0.0), (-7.0, 0.0), (1e12, THROTTLE_S_MAX)]
)
def test_a_throttle_without_a_sane_retry_after_has_one(
    asked_s: float | None, blocked_s: float
) -> None:
    of = circuit()
    of.judge(outcome(of, Verdict.THROTTLED, retry_after_s=asked_s), RULES, 0.0)

    assert of.standing(0.0, RULES).retry_after_s == blocked_s


def test_an_open_circuit_lends_no_probe_before_its_time_is_over() -> None:
    of = opened()

    assert of.take_probe("p", RULES, 59.9) == Standing(
        State.OPEN, 100, pytest.approx(0.1), Reason.CONSECUTIVE_FAILURES
    )
    assert of.take_probe("p", RULES, 60.0) == Pass("d", 101, "p", 5.0)


def test_only_one_probe_is_lent_and_asking_again_is_one_asking() -> None:
    of = probing(60.0)

    assert of.take_probe("other", RULES, 62.0) == Standing(
        State.HALF_OPEN, 101, 3.0, Reason.CONSECUTIVE_FAILURES
    )
    assert of.take_probe("p", RULES, 62.0) == Pass("d", 101, "p", 5.0)


def test_the_lease_of_a_silent_prober_ends_by_itself() -> None:
    of = probing(60.0)

    assert isinstance(of.take_probe("other", RULES, 64.9), Standing)
    assert isinstance(of.take_probe("other", RULES, 65.0), Pass)
    assert not probed(of, Verdict.SUCCESS, 66.0, "p")
    assert probed(of, Verdict.SUCCESS, 66.0, "other")


def test_a_renewed_lease_lasts_but_not_for_ever() -> None:
    of, now = probing(60.0), 60.0
    while of.renew("p", RULES, now):
        assert isinstance(of.take_probe("other", RULES, now), Standing)
        now += 2.0

    assert now - 60.0 == pytest.approx(PROBE_AGE_S_MAX, abs=2.0)
    assert isinstance(of.take_probe("other", RULES, now + RULES.probe_s), Pass)


def test_a_lease_is_renewed_only_for_its_holder() -> None:
    assert not probing(60.0).renew("other", RULES, 61.0)
    assert not opened().renew("p", RULES, 61.0)


def test_a_lease_that_forcing_made_void_keeps_the_next_probe_waiting() -> None:
    of = probing(60.0)
    of.force(State.FORCED_CLOSED, 61.0)
    of.force(None, 61.0)
    say(of, Verdict.FAILURE, 3, 61.0)
    assert not of.renew("p", RULES, 61.0)
    hasty = Rules(open_s=1.0)
    of._open_until = 62.0

    assert not of.take_probe("q", hasty, 62.0).callable  # type: ignore[union-attr]
    assert not of.take_probe("p", hasty, 62.0).callable  # type: ignore[union-attr]
    assert isinstance(of.take_probe("q", hasty, 65.0), Pass)


def test_the_holder_of_a_void_lease_lets_it_go_and_is_not_heard_otherwise() -> None:
    of = probing(60.0)
    of.force(State.FORCED_OPEN, 61.0)
    of.force(None, 61.0)
    say(of, Verdict.FAILURE, 3, 61.0)
    of._open_until = 62.0
    assert isinstance(of.take_probe("q", RULES, 62.0), Standing)
    assert probed(of, Verdict.CREDENTIAL, 62.0, "p")

    assert of.state is State.HALF_OPEN
    assert isinstance(of.take_probe("q", RULES, 62.0), Pass)


def test_enough_good_probes_close_it() -> None:
    of = probing(60.0)
    assert probed(of, Verdict.SUCCESS, 61.0)
    assert of.state is State.HALF_OPEN
    of.take_probe("q", RULES, 61.0)
    probed(of, Verdict.SUCCESS, 62.0, "q")

    assert of.standing(62.0, RULES) == Standing(State.CLOSED, 102, 0.0)


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (Verdict.FAILURE, Reason.PROBE_FAILED),
        (Verdict.UNREACHABLE, Reason.PROBE_FAILED),
        (Verdict.CREDENTIAL, Reason.CREDENTIAL),
    ],
)
def test_a_bad_probe_opens_it_again_for_twice_as_long(verdict: Verdict, reason: Reason) -> None:
    of = probing(60.0)
    probed(of, verdict, 60.0)

    assert of.standing(60.0, RULES) == Standing(State.OPEN, 102, 120.0, reason)


def test_a_probe_that_says_nothing_makes_room_for_the_next() -> None:
    of = probing(60.0)
    assert probed(of, Verdict.IGNORED, 60.1)

    assert isinstance(of.take_probe("q", RULES, 60.1), Pass)


def test_a_throttled_probe_makes_the_next_one_wait() -> None:
    of = probing(60.0)
    of.judge(outcome(of, Verdict.THROTTLED, probe="p", retry_after_s=7.0), RULES, 60.0)

    assert of.state is State.HALF_OPEN
    assert of.take_probe("q", RULES, 66.0) == Standing(
        State.HALF_OPEN, 101, 1.0, Reason.CONSECUTIVE_FAILURES
    )
    assert isinstance(of.take_probe("q", RULES, 67.0), Pass)


def test_a_late_asking_does_not_revive_a_probe_that_was_judged() -> None:
    of = probing(60.0)
    probed(of, Verdict.SUCCESS, 61.0)

    assert isinstance(of.take_probe("p", RULES, 61.0), Standing)
    assert isinstance(of.take_probe("q", RULES, 61.0), Pass)


@pytest.mark.parametrize("verdict", Verdict)
@pytest.mark.parametrize("begin", [opened, probing, lambda: forced(State.FORCED_OPEN)])
def test_outcomes_of_an_older_generation_change_nothing(
    verdict: Verdict, begin: Callable[[], Circuit]
) -> None:
    of = begin()
    before = of.standing(61.0, RULES)

    assert not of.judge(Outcome("d", 0, verdict, 1_000, 30.0), RULES, 61.0)
    assert of.standing(61.0, RULES) == before


def test_calls_from_before_it_was_closed_again_do_not_open_it() -> None:
    of = probing(60.0)
    probed(of, Verdict.SUCCESS, 61.0)
    of.take_probe("q", RULES, 61.0)
    probed(of, Verdict.SUCCESS, 61.0, "q")

    assert not of.judge(Outcome("d", 0, Verdict.FAILURE, 16), RULES, 61.0)
    assert of.state is State.CLOSED


def forced(state: State) -> Circuit:
    of = circuit()
    of.force(state, 0.0)
    return of


def test_a_forced_closed_circuit_is_opened_by_nothing_but_still_throttled() -> None:
    of = forced(State.FORCED_CLOSED)
    say(of, Verdict.FAILURE, 1_000)
    say(of, Verdict.CREDENTIAL)
    assert of.standing(0.0, RULES) == Standing(State.FORCED_CLOSED, 100, 0.0, Reason.OPERATOR)
    of.judge(outcome(of, Verdict.THROTTLED, retry_after_s=5.0), RULES, 0.0)

    assert of.standing(0.0, RULES).retry_after_s == 5.0
    assert of.force(State.FORCED_CLOSED, 0.0)
    assert of.standing(0.0, RULES).callable


def test_a_forced_open_circuit_is_never_callable_and_lends_no_probe() -> None:
    of = forced(State.FORCED_OPEN)

    assert not of.standing(1e9, RULES).callable
    assert isinstance(of.take_probe("p", RULES, 1e9), Standing)


def test_forcing_twice_is_forcing_once_and_letting_go_of_what_is_free_is_nothing() -> None:
    of = forced(State.FORCED_OPEN)
    assert not of.force(State.FORCED_OPEN, 0.0)
    assert of.force(None, 0.0)
    assert not of.force(None, 0.0)

    assert of.standing(0.0, RULES).clean
    assert not opened().force(None, 0.0)


def test_open_times_double_up_to_the_cap_less_a_fifth_at_random() -> None:
    assert [RULES.open_for_s(n, 0.0) for n in range(5)] == [60.0, 120.0, 240.0, 300.0, 300.0]
    assert RULES.open_for_s(3, 1.0) == 240.0
    assert RULES.open_for_s(0, 1.0) == 60.0
    assert Rules(open_s=500.0).open_for_s(9, 0.5) == 500.0
    assert RULES.open_for_s(100_000, 0.0) == 300.0


def test_an_upstream_that_flaps_is_left_alone_ever_longer_and_one_that_was_well_is_forgiven() -> (
    None
):
    of, now, out_s = opened(), 0.0, []
    for lap in range(3):
        out_s.append(of.standing(now, RULES).retry_after_s)
        now += out_s[-1]
        for probe in (f"a{lap}", f"b{lap}"):
            of.take_probe(probe, RULES, now)
            probed(of, Verdict.SUCCESS, now, probe)
        now += 1.0
        say(of, Verdict.FAILURE, 3, now)
    assert out_s == [60.0, 120.0, 240.0]
    now += 300.0
    for probe in ("y", "z"):
        of.take_probe(probe, RULES, now)
        probed(of, Verdict.SUCCESS, now, probe)
    say(of, Verdict.FAILURE, 3, now + 301.0)

    assert of.standing(now + 301.0, RULES).retry_after_s == 60.0


def test_a_circuit_without_a_story_learns_that_it_is_open() -> None:
    of = circuit()
    assert of.learn(Claim("d", Standing(State.OPEN, 7, 42.0)), RULES, 0.0)

    assert of.standing(0.0, RULES) == Standing(State.OPEN, 100, 42.0, Reason.LEARNED)
    assert isinstance(of.take_probe("p", RULES, 42.0), Pass)


def test_a_circuit_with_a_story_learns_no_other() -> None:
    of = probing(60.0)
    for probe in ("y", "z"):
        of.take_probe(probe, RULES, 70.0)
        probed(of, Verdict.SUCCESS, 70.0, probe)

    assert not of.learn(Claim("d", Standing(State.OPEN, 7, 42.0)), RULES, 71.0)
    assert of.state is State.CLOSED


@pytest.mark.parametrize("said", [Standing(State.HALF_OPEN, 7, 3.0), Standing(State.OPEN, 7, 0.0)])
def test_where_somebody_may_be_probing_no_probe_is_lent_for_one_lease_life(said: Standing) -> None:
    of = circuit()
    of.learn(Claim("d", said), RULES, 0.0)

    assert isinstance(of.take_probe("p", RULES, 4.9), Standing)
    assert isinstance(of.take_probe("p", RULES, 5.0), Pass)


def test_the_prober_that_is_found_again_keeps_its_lease() -> None:
    of = circuit()
    of.learn(Claim("d", Standing(State.HALF_OPEN, 7, 3.0)), RULES, 0.0)
    of.learn(Claim("d", Standing(State.HALF_OPEN, 7), "p"), RULES, 4.0)

    assert of.renew("p", RULES, 8.0)
    assert isinstance(of.take_probe("other", RULES, 12.0), Standing)
    assert of.judge(Outcome("d", 7, Verdict.SUCCESS, probe="p"), RULES, 12.0)


def test_what_is_forced_or_throttled_is_learned_too() -> None:
    for state in (State.FORCED_OPEN, State.FORCED_CLOSED):
        of = circuit()
        of.learn(Claim("d", Standing(state, 7)), RULES, 0.0)
        assert of.state is state
    of = circuit()
    of.learn(Claim("d", Standing(State.CLOSED, 7, 9.0)), RULES, 0.0)

    assert of.standing(0.0, RULES) == Standing(State.CLOSED, 0, 9.0)


def test_what_is_clean_teaches_nothing() -> None:
    of = circuit()

    assert not of.learn(Claim("d", Standing(State.CLOSED, 7)), RULES, 0.0)
    assert of.generation == 0


def test_the_window_forgets_whole_seconds() -> None:
    window = Window()
    window.add(0.9, Seen(4, 1, 2), window_s=3)
    window.add(1.0, Seen(2, 2, 0), window_s=3)

    assert window.totals(2.99, 3) == Seen(6, 3, 2)
    assert window.totals(3.0, 3) == Seen(2, 2, 0)
    assert window.totals(4.0, 3) == Seen(0, 0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"failure_threshold": 0},
        {"success_threshold": 0},
        {"open_s": 0.0},
        {"failure_rate": 1.5},
        {"failure_rate": 0.0},
        {"slow_call_rate": 2.0},
        {"retry_share": -0.1},
        {"retries_per_s": float("inf")},
        {"min_calls": 0},
        {"probe_s": float("nan")},
    ],
)
def test_rules_that_make_no_sense_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)  # type: ignore[arg-type]


def test_all_that_travels_survives_pickling() -> None:
    standing = Standing(State.OPEN, 3, 1.5, Reason.CREDENTIAL)
    for value in (
        RULES,
        standing,
        Pass("d", 1, "p", 5.0),
        Refusal("d", 1.0, State.OPEN),
        Outcome("d", 1, Verdict.THROTTLED, 2, 3.0, earns=False),
        Claim("d", standing, "p"),
    ):
        assert pickle.loads(pickle.dumps(value)) == value
    error = pickle.loads(pickle.dumps(IllegalTransition(State.OPEN, Event.TRIP)))
    assert str(error) == "trip is not possible in open"


# The outbox


def ok(deployment: str = "d", generation: int = 0) -> Outcome:
    return Outcome(deployment, generation, Verdict.SUCCESS)


def bad(deployment: str = "d", generation: int = 0) -> Outcome:
    return Outcome(deployment, generation, Verdict.FAILURE)


def test_equal_outcomes_in_a_row_are_one_and_their_order_stays() -> None:
    box = Outbox()
    for each in (ok(), ok("e"), ok(), bad(), ok("e"), ok(), ok()):
        box.add(each, 0.0)

    assert box.message(0.0) == (
        1,
        [
            Outcome("d", 0, Verdict.SUCCESS, 2),
            Outcome("e", 0, Verdict.SUCCESS, 2),
            Outcome("d", 0, Verdict.FAILURE, 1),
            Outcome("d", 0, Verdict.SUCCESS, 2),
        ],
    )


def test_a_message_is_the_same_until_it_is_acknowledged() -> None:
    box = Outbox()
    box.add(bad(), 0.0)
    first = box.message(0.0)
    box.add(bad(), 0.0)
    assert box.message(0.1) == first == (1, [bad()])
    box.acknowledge()

    assert box.message(0.2) == (2, [bad()])
    box.acknowledge()
    assert box.message(0.3) is None


def test_what_is_too_old_is_not_told_any_more() -> None:
    box = Outbox()
    box.add(bad("old"), 0.0)
    box.message(0.0)
    box.add(bad("young"), 5.0)

    assert box.message(AGE_S_MAX + 1.0) == (2, [bad("young")])
    assert box.dropped == 1


def test_a_retry_after_is_counted_from_the_answer_that_named_it() -> None:
    box = Outbox()
    box.add(Outcome("d", 0, Verdict.THROTTLED, retry_after_s=5.0), 0.0)

    assert box.message(2.0) == (1, [Outcome("d", 0, Verdict.THROTTLED, 1, 3.0)])


def test_a_full_outbox_drops_the_oldest_and_says_so() -> None:
    box = Outbox()
    for number in range(outbox_module.RUNS_MAX + 3):
        box.add(bad(generation=number), 0.0)
    seq, sent = box.message(0.0) or (0, [])

    assert len(box) == outbox_module.RUNS_MAX
    assert box.dropped == 3
    assert (seq, len(sent), sent[0].generation) == (1, RUNS_SENT_MAX, 3)


def test_a_message_nobody_wants_is_dropped_and_counted() -> None:
    box = Outbox()
    box.add(bad(), 0.0)
    box.message(0.0)
    box.discard()

    assert (box.dropped, box.message(0.0)) == (1, None)
