from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batcher.planner import Load, cut, middle, size_of, tokens_of
from actors.batcher.policy import Caps

caps = st.builds(
    Caps,
    items_max=st.integers(1, 6),
    tokens_max=st.integers(1, 20),
    bytes_max=st.integers(1, 60),
)
sizes = st.lists(st.integers(0, 80), max_size=40)


@given(sizes, caps)
@settings(deadline=None)
def test_caps_are_never_exceeded_but_by_a_text_that_is_over_them_alone(
    sizes: list[int], caps: Caps
) -> None:
    for run in cut(sizes, caps):
        held = [sizes[place] for place in run]
        assert 0 < len(held) <= caps.items_max
        if len(held) > 1:
            assert sum(held) <= caps.bytes_max
            assert sum(map(tokens_of, held)) <= caps.tokens_max


@given(sizes, caps)
@settings(deadline=None)
def test_order_is_kept_and_nothing_is_lost_or_sent_twice(sizes: list[int], caps: Caps) -> None:
    assert [place for run in cut(sizes, caps) for place in run] == list(range(len(sizes)))


@given(sizes, caps)
@settings(deadline=None)
def test_a_call_ends_only_where_the_next_text_would_not_fit(sizes: list[int], caps: Caps) -> None:
    runs = cut(sizes, caps)
    for run, after in pairwise(runs):
        load = Load(caps)
        for place in run:
            load.add(sizes[place], tokens_of(sizes[place]))
        following = sizes[after.start]
        assert not load.takes(following, tokens_of(following))


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=30))
@settings(deadline=None)
def test_a_call_is_halved_between_two_callers_texts_where_there_are_two(callers: list[str]) -> None:
    place = middle(callers)
    assert 0 < place < len(callers)
    ends = [n for n in range(1, len(callers)) if callers[n - 1] != callers[n]]
    half = len(callers) // 2
    if ends:
        assert place in ends
        assert abs(place - half) == min(abs(end - half) for end in ends)
    else:
        assert place == half


def test_one_bad_caller_in_a_call_is_alone_after_as_many_halvings_as_its_size_has_bits() -> None:
    callers = list(range(256))
    for halvings in range(8):
        assert len(callers) == 256 >> halvings
        place = middle(callers)
        callers = callers[:place] if 77 in callers[:place] else callers[place:]
    assert callers == [77]


@pytest.mark.parametrize(
    ("text", "size"), [("", 0), ("abc", 3), ("日本", 6), ("\ud800", 3), ((1, 2, 3), 9)]
)
def test_a_text_is_as_long_as_its_bytes_and_token_ids_as_what_estimates_as_many(
    text: str | tuple[int, ...], size: int
) -> None:
    assert size_of(text) == size


def test_estimates_err_on_the_high_side_and_are_never_nothing() -> None:
    assert tokens_of(0) == 1
    assert tokens_of(4) == 2
    assert tokens_of(size_of((1, 2, 3))) == 3
