"""How far apart messages leave, by how busy the process is."""

from __future__ import annotations

import pytest

from actors.rate_limiter.pace import MEASURE_S, Pace


class Machine:
    """A clock, and the CPU time of a process that uses `share` of a core."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cpu_s = 7.0
        self.under_way = 64

    def pace(self) -> Pace:
        return Pace(0.01, 0.05, lambda: self.now, lambda: self.cpu_s, lambda: self.under_way)

    def run(self, for_s: float, share: float) -> None:
        self.now += for_s
        self.cpu_s += for_s * share


@pytest.mark.parametrize(
    ("share", "pause_s"), [(0.0, 0.01), (0.3, 0.01), (0.5, 0.03), (0.7, 0.05), (1.8, 0.05)]
)
def test_the_busier_the_farther_apart(share: float, pause_s: float) -> None:
    machine = Machine()
    pace = machine.pace()
    assert pace.pause_s() == 0.01
    machine.run(MEASURE_S, share)
    assert pace.pause_s() == pytest.approx(pause_s)


def test_a_burst_too_short_to_measure_changes_nothing() -> None:
    machine = Machine()
    pace = machine.pace()
    machine.run(MEASURE_S / 2, 1.0)
    assert pace.pause_s() == 0.01


def test_it_recovers_when_the_load_is_over() -> None:
    machine = Machine()
    pace = machine.pace()
    for share, pause_s in ((1.0, 0.05), (0.0, 0.01)):
        machine.run(MEASURE_S, share)
        assert pace.pause_s() == pytest.approx(pause_s)


@pytest.mark.parametrize(("under_way", "pause_s"), [(1, 0.01), (8, 0.01), (20, 0.03), (32, 0.05)])
def test_few_requests_are_not_made_to_wait_for_each_other(under_way: int, pause_s: float) -> None:
    machine = Machine()
    machine.under_way = under_way
    pace = machine.pace()
    machine.run(MEASURE_S, 1.0)
    assert pace.pause_s() == pytest.approx(pause_s)
