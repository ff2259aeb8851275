"""Counts of all processes, added up: exact under loss, repetition, deaths and restarts."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from actors.ref import InlineRef, OwnerUnavailable
from actors.registry.owner import Registry
from actors.registry.policy import RegistryUnavailable
from actors.registry.sums import (
    LABEL_VALUES_MAX,
    OTHER,
    PROCESSES_MAX,
    SAVE_EVERY_S,
    SERIES_MAX,
    TELL_AGAIN_S,
    TELL_EVERY_S,
    Series,
    Sums,
    SumsDesk,
)
from tests.support.fake_time import FakeTime

HITS: Series = ("hits", "acme")


class TestSums:
    def test_what_processes_count_is_added_up_number_by_number(self) -> None:
        sums = Sums()
        sums.take("a", 1, 0, {HITS: (1,), ("times", "chat"): (1, 0, 5)})
        sums.take("b", 1, 0, {HITS: (10,), ("times", "chat"): (0, 2, 7)})
        sums.take("a", 2, 1, {HITS: (4,)})
        assert sums.sums() == {HITS: (14,), ("times", "chat"): (1, 2, 12)}

    def test_words_may_come_twice_late_or_never(self) -> None:
        sums = Sums()
        words = [(1, 0, {HITS: (1,)}), (2, 1, {HITS: (5,)}), (3, 1, {HITS: (9,)})]
        for number, since, figures in [words[0], words[2], words[1], words[2], words[0]]:
            assert sums.take("a", number, since, figures)
        assert sums.sums() == {HITS: (9,)}

    def test_who_builds_on_a_word_that_is_not_known_has_to_tell_all(self) -> None:
        sums = Sums()
        assert not sums.take("a", 7, 6, {HITS: (1,)})
        assert sums.take("a", 8, 0, {HITS: (3,)})
        assert not sums.take("a", 10, 9, {HITS: (4,)})
        assert sums.sums() == {HITS: (3,)}

    def test_label_values_beyond_the_bound_are_other_for_ever(self) -> None:
        sums = Sums()
        tenants = [f"t{number}" for number in range(LABEL_VALUES_MAX + 3)]
        sums.take("b", 1, 0, {("hits", tenant): (1,) for tenant in tenants})
        sums.take("a", 1, 0, {("hits", tenant): (1,) for tenant in reversed(tenants)})
        before = sums.sums()
        sums = Sums(sums.unsaved()[0])
        assert sums.sums() == before
        sums.take("c", 1, 0, {("hits", tenant): (1,) for tenant in reversed(tenants)})
        told = sums.sums()
        assert len(told) == LABEL_VALUES_MAX + 1
        assert told["hits", OTHER] == (9,)
        assert told["hits", "t0"] == (3,)

    def test_series_beyond_the_bound_are_other(self) -> None:
        sums = Sums()
        side = int(SERIES_MAX**0.5) + 1
        assert side < LABEL_VALUES_MAX
        names = [str(number) for number in range(side)]
        figures = {("hits", one, two): (1,) for one in names for two in names}
        sums.take("a", 1, 0, figures)
        assert len(sums) == SERIES_MAX + 1
        assert sums.sums()["hits", OTHER, OTHER] == (side * side - SERIES_MAX,)

    def test_of_too_many_processes_the_longest_silent_is_forgotten_and_its_part_stays(self) -> None:
        sums = Sums()
        for number in range(PROCESSES_MAX + 10):
            sums.take(f"p{number}", 1, 0, {HITS: (1,)})
            sums.take("alive", number + 1, number, {HITS: (number,)})
        assert sums.processes == PROCESSES_MAX
        assert sums.sums() == {HITS: (2 * PROCESSES_MAX + 19,)}
        kept = {row[0]: row for row in sums.unsaved()[0]}
        sums.take("one more", 1, 0, {HITS: (1,)})
        rows, gone = sums.unsaved()
        assert gone == ["p11"]
        kept = {name: row for name, row in kept.items() if name not in gone}
        kept |= {row[0]: row for row in rows}
        assert Sums(kept.values()).sums() == sums.sums() == {HITS: (2 * PROCESSES_MAX + 20,)}

    def test_what_has_not_changed_is_not_written_again(self) -> None:
        sums = Sums()
        sums.take("a", 1, 0, {HITS: (1,)})
        assert [name for name, _, _ in sums.unsaved()[0]] == ["", "a"]
        sums.take("a", 2, 1, {})
        assert sums.unsaved() == ([], [])


class Process:
    """A process that counts, and its desk."""

    def __init__(self, ref: Any, name: str, time: FakeTime) -> None:
        self.counts: Counter[str] = Counter()
        self.desk = SumsDesk(
            ref, name, lambda: {("hits", k): (n,) for k, n in self.counts.items()}, time.sleep, "x"
        )


class Line:
    """A line to an owner that can be exchanged, lose words before or after, or be cut."""

    name = "registry"

    def __init__(self, owner: Registry) -> None:
        self.owner = owner
        self.sent: Counter[str] = Counter()
        self.lost: list[str] = []
        self.words: list[Any] = []

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        fate = self.lost.pop(0) if self.lost else ""
        if fate == "before":
            raise OwnerUnavailable(self.name, "lost")
        self.words.append(args)
        answer = await getattr(self.owner, method)(*args)
        if fate == "after":
            raise OwnerUnavailable(self.name, "lost")
        return answer


def registry(path: Path | None, time: FakeTime) -> Registry:
    return Registry(None if path is None else str(path), clock=time, lock_wait_s=0.0)


async def test_a_word_is_no_reason_for_another_one() -> None:
    """The words themselves are counted too, and go along with what else is told."""
    time = FakeTime()
    line = Line(registry(None, time))
    others: Counter[str] = Counter(x=1)
    words: Series = ("messages", "registry")

    def read() -> dict[Series, tuple[int, ...]]:
        return {words: (len(line.words),), **{("hits", k): (n,) for k, n in others.items()}}

    desk = SumsDesk(line, "a", read, time.sleep, "x", echoes=[words])
    await line.owner.current()
    await desk.start()
    await time.advance(5 * TELL_EVERY_S)
    assert len(line.words) == 1
    others["x"] = 2
    await time.advance(5 * TELL_EVERY_S)
    assert len(line.words) == 2
    assert line.words[-1][3] == {words: (1,), ("hits", "x"): (2,)}
    await desk.close()


async def test_what_changed_is_told_each_second_and_nothing_else() -> None:
    time = FakeTime()
    owner = registry(None, time)
    line = Line(owner)
    process = Process(line, "a", time)
    await owner.current()
    await process.desk.start()
    process.counts["x"] = 1
    process.counts["y"] = 1
    await time.advance(TELL_EVERY_S)
    process.counts["x"] = 2
    await time.advance(TELL_EVERY_S)
    await time.advance(5 * TELL_EVERY_S)
    assert [word[3] for word in line.words] == [
        {("hits", "x"): (1,), ("hits", "y"): (1,)},
        {("hits", "x"): (2,)},
    ]
    await time.advance(TELL_AGAIN_S)
    assert [word[3] for word in line.words[2:]] == [{}], "it is heard of all the same"
    await process.desk.close()
    await owner.close()


async def test_every_process_is_told_the_same_sums_with_its_own_latest_in_them() -> None:
    time = FakeTime()
    owner = registry(None, time)
    one, other = (Process(InlineRef("registry", owner), name, time) for name in "ab")
    one.counts["x"] = 3
    assert await one.desk.sums() == {("hits", "x"): (3,)}
    other.counts["x"] = 4
    assert await other.desk.sums() == await one.desk.sums() == {("hits", "x"): (7,)}
    await owner.close()


async def test_lost_words_and_lost_answers_change_nothing() -> None:
    time = FakeTime()
    owner = registry(None, time)
    line = Line(owner)
    process = Process(line, "a", time)
    for fate in ("", "before", "after", "before", "after", ""):
        process.counts["x"] += 1
        line.lost = [fate]
        if fate:
            with pytest.raises(OwnerUnavailable):
                await process.desk.sums()
        else:
            await process.desk.sums()
    assert await process.desk.sums() == {("hits", "x"): (6,)}
    assert process.desk.stats() == {"told": 3, "failures": 4}
    await owner.close()


async def test_the_last_of_it_is_told_when_a_process_ends() -> None:
    time = FakeTime()
    owner = registry(None, time)
    process = Process(InlineRef("registry", owner), "a", time)
    await process.desk.start()
    process.counts["x"] = 3
    await process.desk.close()
    assert owner._sums.sums() == {("hits", "x"): (3,)}
    await owner.close()


def crashed(path: Path, to: Path) -> Path:
    """The files as a process that is killed now leaves them."""
    to.mkdir()
    for name in (path.name, f"{path.name}-wal"):
        if (path.parent / name).exists():
            shutil.copy(path.parent / name, to / name)
    return to / path.name


async def test_sums_never_go_back_whoever_dies(tmp_path: Path) -> None:
    rng = random.Random(7)
    time = FakeTime()
    path = tmp_path / "0" / "registry.db"
    path.parent.mkdir()
    owner = registry(path, time)
    line = Line(owner)
    processes = [Process(line, f"p{number}", time) for number in range(3)]
    shown: Counter[Series] = Counter()
    told = 0  # what has to be in the sums, whatever happens
    for turn in range(120):
        process = rng.choice(processes)
        process.counts[rng.choice("xyz")] += rng.randrange(1, 4)
        fate = rng.randrange(10)
        if fate < 4:
            line.lost = [rng.choice(["", "before", "after"])]
            await process.desk._tell()
            line.lost = []
        elif fate < 8:
            sums = await process.desk.sums()
            for series, (count,) in sums.items():
                assert count >= shown[series], f"turn {turn}"
                shown[series] = count
            assert sum(shown.values()) == sum(n for (n,) in sums.values())
            told = max(told, sum(shown.values()))
        elif fate == 8:  # a process is killed, another comes
            processes.remove(process)
            processes.append(Process(line, f"p{turn}x", time))
        else:  # the owner is killed
            path = crashed(path, tmp_path / f"{turn}")
            await owner.close()
            line.owner = owner = registry(path, time)
    assert told > 100
    for process in processes:
        final = await process.desk.sums()
    for process in processes:
        for name, count in process.counts.items():
            assert final["hits", name] >= (count,)
    await owner.close()


async def test_all_that_living_processes_counted_is_there_after_an_owners_death(
    tmp_path: Path,
) -> None:
    time = FakeTime()
    path = tmp_path / "a" / "registry.db"
    path.parent.mkdir()
    owner = registry(path, time)
    line = Line(owner)
    process = Process(line, "a", time)
    process.counts.update(x=2, y=1)
    await process.desk.sums()
    process.counts["x"] = 5
    await process.desk._tell()  # acknowledged, and not on disk
    line.owner = registry(crashed(path, tmp_path / "b"), time)
    await owner.close()
    process.counts["y"] = 2
    assert await process.desk.sums() == {("hits", "x"): (5,), ("hits", "y"): (2,)}
    await line.owner.close()


async def test_words_are_written_down_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    time = FakeTime()
    path = tmp_path / "registry.db"
    owner = registry(path, time)
    process = Process(InlineRef("registry", owner), "a", time)
    process.counts["x"] = 1
    await process.desk._tell()
    before = Registry(str(crashed(path, tmp_path / "before")))
    await before.current()
    time.now += SAVE_EVERY_S
    process.counts["x"] = 2
    await process.desk._tell()
    after = Registry(str(crashed(path, tmp_path / "after")))
    await after.current()
    process.counts["x"] = 3
    await process.desk._tell()
    await owner.close()
    last = registry(path, time)
    await last.current()
    found = [one._sums.sums() for one in (before, after, last)]
    assert found == [{}, {("hits", "x"): (2,)}, {("hits", "x"): (3,)}]
    for one in (before, after, last):
        await one.close()


async def test_sums_that_cannot_be_written_are_not_told(tmp_path: Path) -> None:
    time = FakeTime()
    path = tmp_path / "registry.db"
    owner = registry(path, time)
    process = Process(InlineRef("registry", owner), "a", time)
    process.counts["x"] = 1
    silent = Process(InlineRef("registry", owner), "b", time)
    silent.counts["y"] = 5
    await owner.current()
    await silent.desk._tell()
    await owner._write(owner._store._disconnect)
    path.rename(tmp_path / "away")
    path.mkdir()
    with pytest.raises(RegistryUnavailable):
        await process.desk.sums()
    path.rmdir()
    (tmp_path / "away").rename(path)
    assert await process.desk.sums() == {("hits", "x"): (1,), ("hits", "y"): (5,)}
    again = registry(crashed(path, tmp_path / "after"), time)
    await owner.close()
    await again.current()
    assert again._sums.sums() == {("hits", "x"): (1,), ("hits", "y"): (5,)}
    await again.close()
