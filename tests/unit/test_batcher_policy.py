from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batcher.policy import (
    BadVectors,
    BatcherFull,
    Caps,
    Lane,
    Share,
    Vectors,
    plan,
    regroup,
    split,
    tokens_of,
)

texts = st.one_of(st.sampled_from(["a", "b", "longer text", "日本語", ""]), st.text(max_size=30))
lists = st.lists(st.lists(texts, min_size=1, max_size=12), min_size=1, max_size=6)
caps = st.builds(
    Caps,
    items_max=st.integers(1, 6),
    tokens_max=st.integers(1, 20),
    bytes_max=st.integers(1, 60),
)


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
@settings(deadline=None)
def test_parts_sum_exactly_and_are_within_one_of_their_quota(
    total: int, weights: list[int]
) -> None:
    parts = split(total, weights)
    assert sum(parts) == total
    whole = sum(weights)
    for part, weight in zip(parts, weights, strict=True):
        if whole:
            assert abs(part * whole - total * weight) < whole
            assert weight or not part


def test_ties_go_to_the_earliest_and_nothing_weighs_equally() -> None:
    assert split(10, [1, 1, 1]) == [4, 3, 3]
    assert split(2, [0, 0, 0]) == [1, 1, 0]
    assert split(0, [3, 1]) == [0, 0]
    assert split(7, [1, 0]) == [7, 0]


@given(lists, caps)
@settings(deadline=None)
def test_caps_are_never_exceeded_but_by_a_text_that_is_over_them_alone(
    pending: list[list[str]], caps: Caps
) -> None:
    for batch in plan(pending, caps):
        sizes = [len(text.encode()) for text in batch.texts]
        assert len(sizes) <= caps.items_max
        if len(sizes) > 1:
            assert sum(sizes) <= caps.bytes_max
            assert sum(map(tokens_of, sizes)) <= caps.tokens_max


@given(lists, caps)
@settings(deadline=None)
def test_each_distinct_text_is_sent_once_and_everybody_gets_its_own(
    pending: list[list[str]], caps: Caps
) -> None:
    batches = plan(pending, caps)
    sent = [text for batch in batches for text in batch.texts]
    assert len(sent) == len(set(sent))
    assert set(sent) == {text for texts in pending for text in texts}
    received: list[dict[int, str]] = [{} for _ in pending]
    for batch in batches:
        for take in batch.takes:
            for position, row in zip(take.positions, take.rows, strict=True):
                assert position not in received[take.caller]
                received[take.caller][position] = batch.texts[row]
    assert [[mine[n] for n in range(len(mine))] for mine in received] == pending


@given(lists)
@settings(deadline=None)
def test_a_plan_without_caps_is_one_call(pending: list[list[str]]) -> None:
    (batch,) = plan(pending, Caps())
    assert [take.caller for take in batch.takes] == list(range(len(pending)))


@given(lists)
@settings(deadline=None)
def test_weights_are_the_bytes_of_a_callers_texts_shared_ones_in_part(
    pending: list[list[str]],
) -> None:
    (batch,) = plan(pending, Caps())
    whole = sum(len(text.encode()) for text in batch.texts) << 16
    total = sum(take.weight for take in batch.takes)
    assert whole - len(pending) * len(batch.texts) <= total <= whole


def test_two_callers_of_one_text_pay_half_each() -> None:
    (batch,) = plan([["same", "mine"], ["same"]], Caps())
    assert batch.texts == ("same", "mine")
    assert split(12, [take.weight for take in batch.takes]) == [9, 3]


@given(lists, caps)
@settings(deadline=None)
def test_regrouped_parts_carry_what_the_whole_did(pending: list[list[str]], caps: Caps) -> None:
    for batch in plan(pending, caps):
        middle = len(batch.takes) // 2
        halves = [regroup(pending, batch.takes[:middle]), regroup(pending, batch.takes[middle:])]
        assert {text for half in halves for text in half.texts} == set(batch.texts)
        carried = [(take.caller, take.positions) for half in halves for take in half.takes]
        assert carried == [(take.caller, take.positions) for take in batch.takes]


def test_a_long_list_fills_each_call_but_the_last() -> None:
    batches = plan([[str(n) for n in range(100)]], Caps(items_max=30))
    assert [len(batch.texts) for batch in batches] == [30, 30, 30, 10]


def test_token_ids_count_as_the_tokens_they_are() -> None:
    batches = plan([[(1,) * 6, (2,) * 4, (2,) * 4, (3,) * 7]], Caps(tokens_max=10))
    assert [batch.texts for batch in batches] == [((1,) * 6, (2,) * 4), ((3,) * 7,)]
    assert batches[0].takes[0].rows == (0, 1, 1)


def test_an_oversized_text_goes_alone() -> None:
    batches = plan([["a", "x" * 100, "b", "c"]], Caps(bytes_max=10))
    assert [batch.texts for batch in batches] == [("a",), ("x" * 100,), ("b", "c")]


def test_messages_survive_pickling() -> None:
    lane = Lane("d", (("dimensions", 64),))
    assert pickle.loads(pickle.dumps(lane)) == lane
    assert hash(pickle.loads(pickle.dumps((lane, Caps())))) == hash((lane, Caps()))
    array = np.ones((2, 3), dtype=np.float32)
    for message in (Vectors(array, 5, 7, "m"), Share(array, 5, None, "m", "call-1", 2)):
        copy = pickle.loads(pickle.dumps(message))
        assert (copy.array == array).all()
        assert (copy.prompt_tokens, copy.cost_nano) == (message.prompt_tokens, message.cost_nano)
    assert pickle.loads(pickle.dumps(BatcherFull(1.5))).retry_after_s == 1.5
    assert pickle.loads(pickle.dumps(BadVectors("odd"))).reason == "odd"


def test_nothing_negative_is_split() -> None:
    with pytest.raises(AssertionError):
        split(-1, [1])
