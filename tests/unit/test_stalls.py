"""Whether the event loop stood still: a heartbeat, and what came late."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forebay.stalls import BEAT_S, STANDSTILLS_MAX, StallWatch


class Loop:
    """A clock, and an event loop that runs what is due only when it is let."""

    def __init__(self) -> None:
        self.now = 100.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def clock(self) -> float:
        return self.now

    def later(self, delay_s: float, callback: Callable[[], None]) -> Loop:
        self._due.append((self.now + delay_s, callback))
        return self

    def cancel(self) -> None:
        self._due.clear()

    @property
    def idle(self) -> bool:
        return not self._due

    def run(self, for_s: float) -> None:
        """Time passes as it should."""
        end = self.now + for_s
        while self._due and self._due[0][0] <= end:
            self.now, callback = self._due.pop(0)
            callback()
        self.now = end

    def stand_still(self, for_s: float) -> None:
        """Time passes, and whatever fell due comes late."""
        self.now += for_s
        for when, callback in list(self._due):
            if when <= self.now:
                self._due.remove((when, callback))
                callback()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def watch(loop: Loop) -> StallWatch:
    watch = StallWatch(loop.clock)
    watch.start(loop.later)
    return watch


def test_a_loop_that_runs_has_never_stood_still(loop: Loop, watch: StallWatch) -> None:
    loop.run(60.0)

    assert watch.stalled_since(0.0) == 0
    assert not watch.is_to_blame(loop.now - 1.0)


def test_a_standstill_is_known_when_it_is_over(loop: Loop, watch: StallWatch) -> None:
    begun = loop.now
    loop.stand_still(1.0)
    loop.run(1.0)

    assert watch.stalled_since(begun) == pytest.approx(1.0 - BEAT_S)
    assert watch.is_to_blame(begun)


def test_whoever_is_called_before_the_late_beat_knows_it_too(loop: Loop, watch: StallWatch) -> None:
    begun = loop.now
    loop.now += 1.0

    assert watch.stalled_since(begun) == pytest.approx(1.0 - BEAT_S)
    assert watch.is_to_blame(begun)


def test_only_what_came_after_the_call_began_counts(loop: Loop, watch: StallWatch) -> None:
    loop.stand_still(1.0)
    begun = loop.now
    loop.run(5.0)
    assert watch.stalled_since(begun) == 0

    loop.now += 0.6
    assert watch.stalled_since(loop.now - 0.3) == pytest.approx(0.3)


def test_standstills_add_up(loop: Loop, watch: StallWatch) -> None:
    begun = loop.now
    for _ in range(3):
        loop.stand_still(0.3)
        loop.run(1.0)

    assert watch.stalled_since(begun) == pytest.approx(3 * (0.3 - BEAT_S), abs=0.15)


def test_a_long_wait_is_not_excused_by_a_short_standstill(loop: Loop, watch: StallWatch) -> None:
    begun = loop.now
    loop.stand_still(0.5)
    loop.run(1.0)
    assert watch.is_to_blame(begun)

    loop.run(30.0)
    assert not watch.is_to_blame(begun)


def test_a_slightly_late_beat_is_nothing(loop: Loop, watch: StallWatch) -> None:
    begun = loop.now
    for _ in range(20):
        loop.stand_still(BEAT_S + 0.05)

    assert watch.stalled_since(begun) == 0


def test_what_is_remembered_is_bounded(loop: Loop, watch: StallWatch) -> None:
    for _ in range(2 * STANDSTILLS_MAX):
        loop.stand_still(0.3)

    assert watch.stalled_since(0.0) == pytest.approx(STANDSTILLS_MAX * 0.2)


def test_closed_it_beats_no_more_and_blames_nothing_on_us(loop: Loop, watch: StallWatch) -> None:
    watch.close()
    watch.close()
    assert loop.idle

    loop.now += 10.0
    assert watch.stalled_since(0.0) == 0


def test_it_beats_once_however_often_it_is_started(loop: Loop, watch: StallWatch) -> None:
    watch.start(loop.later)
    loop.run(1.0)
    loop.stand_still(1.0)

    assert watch.stalled_since(0.0) == pytest.approx(1.0 - BEAT_S)


def test_one_that_was_not_started_excuses_nobody(loop: Loop) -> None:
    watch = StallWatch(loop.clock)
    loop.now += 10.0

    assert not watch.is_to_blame(0.0)
