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
    NoPermit,
    Order,
    Share,
    Vectors,
    split,
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
    refused = pickle.loads(pickle.dumps(NoPermit(2.0, ValueError("busy"))))
    assert (refused.retry_after_s, str(refused)) == (2.0, "busy")
    assert pickle.loads(pickle.dumps(Order("t", bulk=True))) == Order("t", bulk=True)


def test_nothing_negative_is_split() -> None:
    with pytest.raises(AssertionError):
        split(-1, [1])
