from __future__ import annotations

from collections import Counter

import pytest

from actors.batcher import spread as module
from actors.batcher.policy import Lane
from actors.batcher.spread import CALM_S, WIDEN_S, Spread

LANES = [Lane(f"d{n}") for n in range(200)]


def test_a_lane_has_one_home_which_all_processes_agree_on() -> None:
    desks = [Spread(4, f"process-{n}") for n in range(20)]
    for lane in LANES:
        assert len({desk.choose(lane, 0.0) for desk in desks}) == 1
    homes = Counter(desks[0].choose(lane, 0.0) for lane in LANES)
    assert set(homes) == {0, 1, 2, 3}


def test_retries_and_token_ids_live_where_their_lane_does() -> None:
    desk = Spread(4, "p")
    for lane in LANES:
        others = (Lane(lane.deployment, retry=True), Lane(lane.deployment, tokens=True))
        assert {desk.choose(other, 0.0) for other in others} == {desk.choose(lane, 0.0)}


def test_another_shard_moves_only_the_lanes_that_get_it_as_their_home() -> None:
    three, four = Spread(3, "p"), Spread(4, "p")
    moved = [lane for lane in LANES if three.choose(lane, 0.0) != four.choose(lane, 0.0)]
    assert all(four.choose(lane, 0.0) == 3 for lane in moved)
    assert 20 < len(moved) < 90


def test_a_busy_lane_is_spread_over_one_more_and_each_process_keeps_to_one() -> None:
    desks = [Spread(4, f"process-{n}") for n in range(40)]
    lane = LANES[0]
    for desk in desks:
        for _ in range(10):  # all of one moment
            desk.told(lane, 0.9, 1.0)
    assert len({desk.choose(lane, 1.0) for desk in desks}) == 2
    assert all(desk.choose(lane, 1.0) == desk.choose(lane, 2.0) for desk in desks)
    for desk in desks:
        desk.told(lane, 0.9, 1.0 + WIDEN_S)
    assert len({desk.choose(lane, 1.0 + WIDEN_S) for desk in desks}) == 3
    assert desks[0].choose(LANES[1], 5.0) == Spread(4, "other").choose(LANES[1], 5.0)


def test_what_is_not_busy_stays_together_and_what_was_comes_together_again() -> None:
    desks = [Spread(4, f"process-{n}") for n in range(40)]
    lane = LANES[0]
    for desk in desks:
        desk.told(lane, 0.69, 1.0)
    assert len({desk.choose(lane, 1.0) for desk in desks}) == 1
    for desk in desks:
        desk.told(lane, 0.9, 1.0)
        desk.told(lane, 0.9, 1.0 + WIDEN_S)
    later = 1.0 + WIDEN_S + CALM_S
    assert len({desk.choose(lane, later) for desk in desks}) == 2
    assert len({desk.choose(lane, later + CALM_S) for desk in desks}) == 1


def test_a_lane_stays_wide_while_fewer_shards_would_be_busy_with_it() -> None:
    desk, lane = Spread(4, "p"), LANES[0]
    home = desk.choose(lane, 0.0)
    others = {Spread(4, f"p{n}").choose(lane, 0.0) for n in range(40)}
    assert others == {home}
    widths = []
    desk.told(lane, 0.9, 1.0)
    for second in range(2, 200):  # two share what had kept one busy: 0.45 of a core each
        desk.told(lane, 0.45, float(second))
        widths.append(desk._width(lane, float(second)))
    assert set(widths) == {2}
    for second in range(200, 200 + int(CALM_S) + 1):  # one could do this
        desk.told(lane, 0.34, float(second))
    assert desk._width(lane, 200 + CALM_S) == 1
    assert desk.choose(lane, 200 + CALM_S) == home


def test_so_many_wide_lanes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LANES_MAX", 3)
    desk = Spread(4, "p")
    for lane in LANES[:10]:
        desk.told(lane, 0.9, 1.0)
    assert len(desk._wide) == 3
