"""A request that is over, for those who tell of it: telemetry and the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forebay.call import Call, Facts
from forebay.codec import Answer
from forebay.routing import Deployment


@dataclass(frozen=True, slots=True)
class Tried:
    """An attempt: when it began and ended, and what the breaker learnt from it.

    `took_s` is how long its answer, or a stream's first chunk, took; None: there was none. `error`
    is the class of what it failed with. Times are on the system's monotonic clock.
    """

    deployment: Deployment
    begun_s: float
    ended_s: float
    took_s: float | None
    verdict: str
    error: str | None


@dataclass(frozen=True, slots=True)
class Ended:
    """A request, from the first step to the last.

    `status` is `ok`, `cancelled`, `error`, or the HTTP status of its error. `model` is the group's
    name, with a wildcard left in it; of a request that was not even understood it is `unknown`, and
    `facts` is None. `answer` is what a provider gave for it, None where nobody was asked.
    """

    call: Call
    status: str
    model: str
    provider: str
    streams: bool
    started_s: float
    ended_s: float
    facts: Facts | None = None
    answer: Answer | None = None
    tried: Sequence[Tried] = ()

    @property
    def failed(self) -> bool:
        return self.status not in ("ok", "cancelled")

    @property
    def first_chunk_s(self) -> float | None:
        """From the request to the first chunk of its stream, if a provider has sent one."""
        for tried in self.tried:
            if self.streams and tried.took_s is not None:
                return tried.begun_s + tried.took_s - self.started_s
        return None
