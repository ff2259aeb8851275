from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import pytest

from actors.batcher import poison as module
from actors.batcher.poison import TTL_S, Poison
from actors.batcher.policy import Lane

LANE = Lane("d1")


def _a_traceback() -> TracebackType | None:
    with pytest.raises(KeyError) as caught:
        raise KeyError
    return caught.value.__traceback__


ERROR = ValueError("bad")


def first(found: Iterable[tuple[int, Exception]]) -> Exception | None:
    return next((error for _, error in found), None)


def test_a_refused_text_is_known_for_a_while_in_its_lane_and_its_retries() -> None:
    poison = Poison()
    poison.remember(LANE, "x", ERROR, 0.0)
    for lane in (LANE, Lane("d1", retry=True)):
        assert str(first(poison.among(lane, ["a", "x"], TTL_S - 1))) == "bad"
    assert first(poison.among(LANE, ["a"], 0.0)) is None
    for lane in (Lane("d2"), Lane("d1", (("dimensions", 8),)), Lane("d1", owner="t")):
        assert first(poison.among(lane, ["x"], 0.0)) is None
    assert first(poison.among(LANE, ["x"], TTL_S)) is None
    assert len(poison) == 0


def test_token_ids_are_no_words() -> None:
    poison = Poison()
    poison.remember(Lane("d1", tokens=True), (1, 2), ERROR, 0.0)
    assert first(poison.among(Lane("d1", tokens=True), [(1, 2)], 1.0)) is not None
    assert first(poison.among(LANE, ["(1, 2)"], 1.0)) is None


def test_what_it_has_cost_and_where_it_was_raised_is_not_remembered() -> None:
    poison = Poison()
    raised = ValueError("bad").with_traceback(_a_traceback())
    raised.paid = 5  # type: ignore[attr-defined]
    poison.remember(LANE, "x", raised, 0.0)
    assert raised.paid == 5  # type: ignore[attr-defined]
    known = first(poison.among(LANE, ["x"], 0.0))
    assert known is not None
    assert not hasattr(known, "paid")
    assert known.__traceback__ is None


def test_so_many_are_remembered_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS_MAX", 2)
    poison = Poison()
    for text in "abac":
        poison.remember(LANE, text, ERROR, 0.0)
    assert [first(poison.among(LANE, [text], 1.0)) is not None for text in "abc"] == [
        True,
        False,
        True,
    ]


def test_each_refused_text_of_a_list_is_named_by_its_place() -> None:
    poison = Poison()
    for text, from_s in (("x", 10.0), ("y", 10.0), ("old", 0.0)):
        poison.remember(LANE, text, ERROR, from_s)
    found = poison.among(LANE, ["x", "a", "old", "y", "x"], TTL_S + 1)
    assert [place for place, _ in found] == [0, 3, 4]
