"""Whether this process's own event loop stood still, so that it blames nobody else for it.

After a standstill every timer that fell due in it goes off at once: all calls under way seem to
have hung together, and any rule about failures in a row would open a healthy circuit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from actors.ref import Clock

BEAT_S = 0.1
STANDSTILL_S = 0.1  # a beat that comes later than this is worth remembering
OWN_FAULT_S = 0.2
OWN_FAULT_SHARE = 0.1
STANDSTILLS_MAX = 2_048  # with their beats those of 400 s: more than the longest timeout


class Timer(Protocol):
    """What `later` gives back."""

    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], None]], Timer]
"""Calls back on the event loop after so many seconds, as `loop.call_later` does."""


class StallWatch:
    """Owns a heartbeat on the event loop, and the times at which it came late.

    Bounded by STANDSTILLS_MAX, of which the oldest are forgotten. Failure behaviour: one that was
    not started has seen no standstill, so that everything counts.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._late: deque[tuple[float, float]] = deque(maxlen=STANDSTILLS_MAX)  # from, until
        self._due_s: float | None = None
        self._later: Later | None = None
        self._timer: Timer | None = None

    def start(self, later: Later) -> None:
        """Begin to beat. A second start changes nothing."""
        if self._later is None:
            self._later = later
            self._next()

    def close(self) -> None:
        self._later = self._due_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stalled_since(self, since_s: float) -> float:
        """Seconds that the loop stood still after `since_s`, a standstill just ending included."""
        now = self._clock()
        total_s = 0.0
        # Timers that fell due in a standstill go off in their order, some before the late beat.
        if self._due_s is not None and now - self._due_s > STANDSTILL_S:
            total_s = now - max(since_s, self._due_s)
        for begun_s, ended_s in reversed(self._late):
            if ended_s <= since_s:
                break
            total_s += ended_s - max(since_s, begun_s)
        return max(0.0, total_s)

    def is_to_blame(self, since_s: float) -> bool:
        """Whether a wait that began at `since_s` was long because of this process itself."""
        waited_s = self._clock() - since_s
        return self.stalled_since(since_s) > max(OWN_FAULT_S, OWN_FAULT_SHARE * waited_s)

    def _next(self) -> None:
        assert self._later is not None
        self._due_s = self._clock() + BEAT_S
        self._timer = self._later(BEAT_S, self._beat)

    def _beat(self) -> None:
        if self._later is None or self._due_s is None:
            return
        now = self._clock()
        if now - self._due_s > STANDSTILL_S:
            self._late.append((self._due_s, now))
        self._next()
