from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batcher.aimd import LEAST, MOST, START, Concurrency


def test_one_more_call_at_once_after_as_many_good_ones_as_there_may_be() -> None:
    concurrency = Concurrency()
    for _ in range(5):
        concurrency.answered(10, 0.0, 0.1, full=True)
    assert concurrency.limit == START + 1


def test_calls_that_had_room_beside_them_say_nothing() -> None:
    concurrency = Concurrency()
    for _ in range(100):
        concurrency.answered(10, 0.0, 0.1, full=False)
    assert concurrency.limit == START


def test_calls_that_queue_up_at_the_provider_do_not_make_room_for_more() -> None:
    concurrency = Concurrency()
    concurrency.answered(10, 0.0, 0.1, full=False)
    for _ in range(10):
        concurrency.answered(10, 0.0, 0.2, full=True)
    assert concurrency.limit == START


def test_a_provider_that_has_become_slower_for_good_is_the_usual_one_in_time() -> None:
    concurrency = Concurrency()
    concurrency.answered(10, 0.0, 0.1, full=False)
    for _ in range(60):
        concurrency.answered(10, 0.0, 0.2, full=True)
    assert concurrency.limit > START


def test_a_long_list_is_not_slow_by_the_measure_of_short_ones() -> None:
    concurrency = Concurrency()
    concurrency.answered(1, 0.0, 0.05, full=False)
    for _ in range(5):
        concurrency.answered(1000, 0.0, 0.5, full=True)
    assert concurrency.limit == START + 1


def test_refusals_of_one_moment_cut_once() -> None:
    concurrency = Concurrency()
    for _ in range(4):
        concurrency.pushed_back(began_s=1.0, now_s=1.1)
    assert concurrency.limit == 2
    concurrency.pushed_back(began_s=1.2, now_s=1.3)
    assert concurrency.limit == 1


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 10)), max_size=300))
@settings(deadline=None)
def test_there_is_always_room_for_one_and_never_for_more_than_the_most(
    events: list[tuple[bool, float]],
) -> None:
    concurrency = Concurrency()
    for now, (good, took) in enumerate(events):
        if good:
            concurrency.answered(1, now, now + took, full=True)
        else:
            concurrency.pushed_back(now, now + 0.5)
        assert LEAST <= concurrency.limit <= MOST


@pytest.mark.parametrize("places", [2, 8, 24])
def test_it_settles_near_what_a_provider_takes_that_refuses_the_rest(places: int) -> None:
    concurrency, seen = Concurrency(), []
    dice = random.Random(places)
    for moment in range(2000):
        if concurrency.limit > places:
            concurrency.pushed_back(moment, moment + 0.5)
        else:
            took_s = 0.1 * dice.uniform(1.0, 1.2)
            concurrency.answered(8, moment, moment + took_s, full=True)
        seen.append(concurrency.limit)
    settled = seen[1000:]
    assert max(settled) <= places + 1
    assert sum(settled) / len(settled) >= 0.7 * places


def settled(places: int, spread: float, calls: int = 20_000) -> list[int]:
    """The limits that a provider brings about which does so many calls at once."""
    concurrency, dice, seen = Concurrency(), random.Random(places), []
    for number in range(calls):
        began_s = float(number)
        took_s = 0.05 * max(1.0, concurrency.limit / places) * dice.lognormvariate(0.0, spread)
        concurrency.answered(32, began_s, began_s + took_s, full=True)
        seen.append(concurrency.limit)
    return seen[calls // 2 :]


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.25])
def test_a_provider_that_lets_calls_queue_gets_hardly_more_than_it_takes(spread: float) -> None:
    limits = settled(8, spread)
    assert max(limits) <= 20
    assert sum(limits) / len(limits) >= 6


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.25])
def test_a_provider_that_takes_more_gets_more_though_it_is_now_slow_now_quick(
    spread: float,
) -> None:
    limits = settled(48, spread)
    assert sum(limits) / len(limits) >= 32
