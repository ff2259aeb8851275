"""How far apart the messages about tenants that nobody saw lately leave."""

from __future__ import annotations

from actors.ref import Clock

BUSY = (0.3, 0.7)  # between these shares of a core the pause grows from its least to its most
MEASURE_S = 0.5


class Pace:
    """Owns what is known of how busy this process is.

    A message costs two processes about a millisecond each, however much it says. With time to
    spare it leaves soon; under load more wait for the next one, and go together.

    Failure behaviour: none. Until it has measured, the process counts as idle.
    """

    def __init__(self, least_s: float, most_s: float, clock: Clock, cpu_clock: Clock) -> None:
        """`cpu_clock` gives the CPU seconds that this process has used."""
        self._least_s = least_s
        self._most_s = most_s
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._at_s = clock()
        self._cpu_s = cpu_clock()
        self._pause_s = least_s

    def pause_s(self) -> float:
        """Seconds from one message to the next."""
        now = self._clock()
        elapsed_s = now - self._at_s
        if elapsed_s >= MEASURE_S:
            cpu_s = self._cpu_clock()
            low, high = BUSY
            share = ((cpu_s - self._cpu_s) / elapsed_s - low) / (high - low)
            self._pause_s = self._least_s + (self._most_s - self._least_s) * min(1, max(0, share))
            self._at_s, self._cpu_s = now, cpu_s
        return self._pause_s
