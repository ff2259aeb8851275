"""How far apart the messages about tenants that nobody saw lately leave."""

from __future__ import annotations

from collections.abc import Callable

from actors.ref import Clock

CROWD = (8, 32)
"""Between so many requests under way the pause grows from its least to its most: who waits in a
crowd anyway does not notice, and the few callers of a quiet hour are not made to wait."""
BUSY = (0.3, 0.7)  # between these shares of a core the pause grows from its least to its most
MEASURE_S = 0.5


class Pace:
    """Owns what is known of how busy this process is.

    A message costs two processes about a millisecond each, however much it says. With time to
    spare, or few requests under way, it leaves soon; under load more wait for the next one, and go
    together.

    Failure behaviour: none. Until it has measured, the process counts as idle.
    """

    def __init__(
        self,
        least_s: float,
        most_s: float,
        clock: Clock,
        cpu_clock: Clock,
        under_way: Callable[[], int],
    ) -> None:
        """`cpu_clock` gives the CPU seconds that this process has used."""
        self._least_s = least_s
        self._most_s = most_s
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._under_way = under_way
        self._at_s = clock()
        self._cpu_s = cpu_clock()
        self._busy = 0.0

    def pause_s(self) -> float:
        """Seconds from one message to the next."""
        now = self._clock()
        elapsed_s = now - self._at_s
        if elapsed_s >= MEASURE_S:
            cpu_s = self._cpu_clock()
            self._busy = _between(BUSY, (cpu_s - self._cpu_s) / elapsed_s)
            self._at_s, self._cpu_s = now, cpu_s
        share = self._busy and self._busy * _between(CROWD, self._under_way())
        return self._least_s + (self._most_s - self._least_s) * share


def _between(bounds: tuple[float, float], value: float) -> float:
    """0 at the lower bound and below, 1 at the upper one and above."""
    low, high = bounds
    return min(1.0, max(0.0, (value - low) / (high - low)))
