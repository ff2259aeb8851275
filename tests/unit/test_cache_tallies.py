"""What processes count, told to the owner and added up there."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from actors.cache.tallies import DESKS_MAX, NAMES_MAX, NOW, NOW_S, Tallies, TallyDesk
from actors.ref import InlineRef, OwnerUnavailable
from tests.support.fake_time import settle


class TestTallies:
    def test_they_are_added_up_by_name(self) -> None:
        tallies = Tallies()
        tallies.take("a", 1, {"all": (1, 2), "tenant x": (1, 2)}, 0.0)
        tallies.take("b", 1, {"all": (10, 20), "tenant y": (10, 20)}, 0.0)
        assert tallies.sums(0.0) == {"all": (11, 22), "tenant x": (1, 2), "tenant y": (10, 20)}

    def test_a_word_that_is_lost_doubled_or_late_changes_nothing(self) -> None:
        tallies = Tallies()
        words: list[tuple[int, Any]] = [(1, {"all": (1,)}), (2, {"all": (5,)}), (4, {"all": (9,)})]
        for number, tally in [words[1], words[0], words[1], words[2], words[2], words[0]]:
            tallies.take("a", number, tally, 0.0)
        assert tallies.sums(0.0) == {"all": (9,)}

    def test_one_of_another_version_may_count_more(self) -> None:
        tallies = Tallies()
        tallies.take("old", 1, {"all": (1, 1)}, 0.0)
        tallies.take("new", 1, {"all": (1, 1, 7)}, 0.0)
        assert tallies.sums(0.0) == {"all": (2, 2, 7)}

    def test_those_of_long_ago_are_kept_as_their_sum(self) -> None:
        tallies = Tallies(desks_max=3)
        for number in range(10):
            tallies.take(f"d{number}", 1, {"all": (1, number)}, 0.0)
            tallies.take("alive", number + 1, {"all": (number, 0)}, 0.0)
        assert tallies.sums(0.0) == {"all": (10 + 9, 45)}
        assert len(tallies._words) == 3

    def test_names_beyond_the_bound_are_not_taken(self) -> None:
        tallies = Tallies()
        tallies.take("a", 1, {str(number): (1,) for number in range(NAMES_MAX + 9)}, 0.0)
        assert len(tallies.sums(0.0)) == NAMES_MAX
        assert DESKS_MAX == 2_000

    def test_what_a_desk_has_now_counts_while_it_is_heard_of(self) -> None:
        tallies = Tallies(desks_max=2)
        tallies.take("a", 1, {"all": (1,), f"{NOW}cache": (5,)}, 0.0)
        tallies.take("b", 1, {"all": (1,), f"{NOW}cache": (7,)}, NOW_S)
        assert tallies.sums(NOW_S) == {"all": (2,), f"{NOW}cache": (12,)}
        assert tallies.sums(NOW_S + 1) == {"all": (2,), f"{NOW}cache": (7,)}
        tallies.take("c", 1, {}, NOW_S + 1)
        assert tallies.sums(0.0) == {"all": (2,), f"{NOW}cache": (7,)}


class Owner:
    def __init__(self) -> None:
        self.tallies = Tallies()
        self.words: list[Any] = []
        self.away = False
        self.error: Exception = OwnerUnavailable("cache", "it died")

    def tally(self, desk: str, number: int, tally: Any) -> dict[str, tuple[int, ...]]:
        if self.away:
            raise self.error
        self.words.append(tally)
        self.tallies.take(desk, number, tally, 0.0)
        return self.tallies.sums(0.0)


class Bench:
    """A desk whose pauses end when the test says so."""

    def __init__(self, owner: Owner, name: str = "a") -> None:
        self.counted = Counter({"all": 0})
        self.pauses: list[asyncio.Event] = []
        self.desk = TallyDesk(InlineRef("cache", owner), name, self._read, self._pause, nonce="1")

    def _read(self) -> dict[str, tuple[int, ...]]:
        return {name: (number,) for name, number in self.counted.items()}

    async def _pause(self, seconds: float) -> None:
        over = asyncio.Event()
        self.pauses.append(over)
        await over.wait()

    def count(self) -> None:
        self.counted["all"] += 1
        self.desk.changed()

    async def pass_time(self) -> None:
        self.pauses[-1].set()
        await settle()


@pytest.fixture
def owner() -> Owner:
    return Owner()


class TestTheDesk:
    async def test_what_was_counted_in_a_second_is_one_word(self, owner: Owner) -> None:
        bench = Bench(owner)
        await bench.desk.start()
        for _ in range(5):
            bench.count()
            await settle()
        assert owner.words == []
        await bench.pass_time()
        assert owner.words == [{"all": (5,)}]
        bench.count()
        await settle()
        await bench.pass_time()
        assert owner.words == [{"all": (5,)}, {"all": (6,)}]
        await bench.desk.close()
        assert len(owner.words) == 2

    async def test_nothing_is_told_where_nothing_was_counted(self, owner: Owner) -> None:
        bench = Bench(owner)
        await bench.desk.start()
        await settle()
        assert bench.pauses == []
        await bench.desk.close()
        assert owner.words == []

    async def test_whatever_an_owner_answers_it_is_told_again(self, owner: Owner) -> None:
        bench = Bench(owner)
        await bench.desk.start()
        owner.away, owner.error = True, AttributeError("an older one knows no tallies")
        bench.count()
        await settle()
        await bench.pass_time()
        assert bench.desk.stats() == {"told": 0, "failures": 1}
        owner.away = False
        await settle()
        await bench.pass_time()
        assert owner.words == [{"all": (1,)}]
        await bench.desk.close()

    async def test_the_last_of_it_is_told_at_the_end(self, owner: Owner) -> None:
        bench = Bench(owner)
        await bench.desk.start()
        bench.count()
        await settle()
        await bench.desk.close()
        assert owner.tallies.sums(0.0) == {"all": (1,)}

    async def test_who_asks_gets_the_sums_of_all_its_own_word_included(self, owner: Owner) -> None:
        one, two = Bench(owner, "a"), Bench(owner, "b")
        one.count()
        two.count()
        await one.desk.sums()
        assert await two.desk.sums() == {"all": (2,)}

    async def test_an_owner_that_is_away_is_told_later(self, owner: Owner) -> None:
        bench = Bench(owner)
        await bench.desk.start()
        bench.count()
        await settle()
        owner.away = True
        await bench.pass_time()
        with pytest.raises(OwnerUnavailable):
            await bench.desk.sums()
        owner.away = False
        await bench.pass_time()
        assert owner.tallies.sums(0.0) == {"all": (1,)}
        assert bench.desk.stats() == {"told": 1, "failures": 2}
        await bench.desk.close()
