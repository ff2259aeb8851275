from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import oracle
from tests.support.upstream import Record

TIMES = st.lists(st.integers(0, 40).map(lambda n: n / 8), max_size=25)


def record(start_s: float, end_s: float | None, prompt: int = 0, completion: int = 0) -> Record:
    nanos = [None if t is None else int(t * oracle.NANO) for t in (start_s, end_s)]
    assert nanos[0] is not None
    return Record(
        "", 0, "openai", "chat", "", "sim", 200, False, 0, prompt, completion, 0, 0, 0, False,
        start_ns=nanos[0], start_mono_ns=nanos[0], end_ns=nanos[1], end_mono_ns=nanos[1],
    )  # fmt: skip


@given(TIMES, st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 5))
def test_the_bucket_finds_what_looking_at_every_interval_finds(
    times: list[float], rate: float, burst: int
) -> None:
    found = oracle.overrun(times, rate, burst)
    assert found == pytest.approx(oracle.overrun_by_definition(times, rate, burst))


def test_exactly_the_burst_and_the_rate_is_not_over() -> None:
    times = [0.0, 0.0, 0.5, 1.0, 1.5]
    assert oracle.overrun(times, 2.0, 2) == 0.0
    assert oracle.overrun([*times, 1.75], 2.0, 2) == pytest.approx(0.5)
    assert oracle.overrun([*times, 1.5], 2.0, 2) == 1.0


def test_an_excess_is_found_wherever_it_is() -> None:
    late = [100.0, 100.0, 100.0]
    assert oracle.overrun([0.0, *late], 1.0, 2) == 1.0
    assert oracle.overrun([*late, 200.0], 1.0, 2) == 1.0


def test_one_request_may_use_more_tokens_than_the_burst() -> None:
    assert oracle.token_overrun([(0.0, 50.0), (5.0, 50.0)], 10.0, 10.0) == 0.0
    assert oracle.token_overrun([(0.0, 50.0), (4.0, 50.0)], 10.0, 10.0) == 10.0
    assert oracle.token_overrun([], 10.0, 10.0) == -10.0


def test_who_ends_as_another_begins_was_not_beside_it() -> None:
    assert oracle.most_at_once([record(0, 1), record(1, 2), record(2, 3)]) == 1
    assert oracle.most_at_once([record(0, 2), record(1, 3), record(1.5, None), record(9, 9)]) == 3
    assert oracle.most_at_once([]) == 0


@given(TIMES, st.sampled_from([0.5, 1.0, 2.0]))
def test_the_most_in_a_window_is_the_most_that_any_window_holds(
    times: list[float], window_s: float
) -> None:
    most = max((sum(a <= t < a + window_s for t in times) for a in times), default=0)
    assert oracle.most_in(times, window_s) == most


def test_a_window_can_be_weighed() -> None:
    assert oracle.most_in([0.0, 59.0, 60.0], 60.0, [5.0, 1.0, 2.0]) == 6.0


def test_a_bucket_that_is_kept_empty_is_wholly_used() -> None:
    times = [0.0] * 5 + [n / 2 for n in range(1, 21)]
    assert oracle.utilisation(times, 2.0, 5, 0.25, 10.0) == pytest.approx(1.0, abs=0.03)


def test_what_was_saved_up_does_not_pay_for_idling() -> None:
    assert oracle.utilisation([1.0] * 5, 1.0, 5, 1.0, 6.0) == 0.0


def test_time_without_an_owner_is_not_asked_for() -> None:
    times = [0.0, *(n + 1.0 for n in range(5)), *(n + 11.0 for n in range(10))]
    whole = oracle.utilisation(times, 1.0, 1, 0.5, 20.0)
    without = oracle.utilisation(times, 1.0, 1, 0.5, 20.0, [(5.5, 8.0), (7.0, 10.5)])
    assert whole < 0.8
    assert without > 0.95


def test_spans_that_overlap_count_once() -> None:
    assert oracle.covered([(0.0, 2.0), (1.0, 3.0), (9.0, 12.0)], 0.5, 10.0) == 3.5


def test_the_longest_pause_includes_the_ends() -> None:
    assert oracle.longest_pause([1.0, 2.0], 0.0, 10.0) == 8.0
    assert oracle.longest_pause([], 3.0, 4.0) == 1.0


def test_money_is_added_up_exactly() -> None:
    calls = [record(0, 1, 7, 1000)] * 20
    assert oracle.spent(calls, "0", "0.00005") == oracle.NANO


def test_what_begins_or_ends_at_a_moment_is_under_way_then() -> None:
    records = [record(0, 1), record(1, 2), record(1.5, None), record(3, 4)]

    assert [oracle.under_way(records, at_s) for at_s in (0.5, 1, 2, 2.5, 4)] == [1, 2, 2, 1, 2]
    assert oracle.ends_s(records) == [1, 2, 4]
