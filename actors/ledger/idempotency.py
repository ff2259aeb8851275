"""Requests with a key of their own, which are answered once: who may make the call.

    nothing known, or its time is over      free        the call is this claim's to make
    under way, by the same claim            own         it came twice; as before
    under way, by another claim             running     its answer is waited for
    answered                                stored      here is the answer
    either of these, for another body       other       the key was used for something else

Rule 1: a claim is durable before the call that it is for is made, and names a moment at which it
        lapses: nobody waits longer for a process that is gone.
Rule 2: only an answer is kept. A call that failed gives its key back.
Rule 3: times are UTC epoch ms of the owner's wall clock; a claim says how long, never when.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

KEPT_MS = 24 * 3600 * 1000
"""For how long an answer is kept."""
ANSWER_BYTES_MAX = 4 * 1024 * 1024
"""Longest answer that is kept; some 680 vectors of 1,536 dimensions."""
KEPT_BYTES_MAX = 256 * 1024 * 1024
CLAIMS_MAX = 100_000
"""Most keys. Beyond either of these bounds the oldest answers leave first."""
GRACE_S = 10.0
"""For how long a claim outlives the deadline of its call."""
LATE_MS = 600_000
"""For how long a claim that has lapsed, and that nobody else has made, may still be answered."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One request's wish to make the call of a key.

    `name` is the key's, of one tenant; `fingerprint` that of what is asked. `token` is no other
    request's. `holder` is the process. It lapses in `lapses_s` seconds.
    """

    name: str
    fingerprint: str
    token: str
    holder: str
    lapses_s: float


@dataclass(frozen=True, slots=True)
class Finish:
    """What became of the call of a claim: an answer, or None, and the key is free again."""

    name: str
    token: str
    answer: bytes | None


@dataclass(frozen=True, slots=True)
class Gone:
    """A process has ended; what it claimed, and did not finish, is free again."""

    holder: str


@dataclass(frozen=True, slots=True)
class Won:
    """The call is yours to make."""

    token: str


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer that was given before."""

    answer: bytes


@dataclass(frozen=True, slots=True)
class Running:
    """Another request makes the call; it has `lapses_s` seconds left. `patient`: asking again waits
    for it, and is not answered so at once."""

    lapses_s: float
    patient: bool = True


@dataclass(frozen=True, slots=True)
class Differs:
    """The key was used for another body."""

    name: str


@dataclass(frozen=True, slots=True)
class Full:
    """CLAIMS_MAX calls are under way."""

    most: int


Outcome = Won | Kept | Running | Differs | Full


class Known(NamedTuple):
    """What is known of a key. `size` is that of the answer, 0 while the call is under way."""

    fingerprint: str
    token: str
    until_ms: int
    size: int


class Standing(StrEnum):
    FREE = "free"
    OWN = "own"
    RUNNING = "running"
    STORED = "stored"
    OTHER = "other"


def standing(known: Known | None, claim: Claim, now_ms: int) -> Standing:
    """How a claim stands with what is known of its key."""
    if known is None or now_ms >= known.until_ms:
        return Standing.FREE
    if known.fingerprint != claim.fingerprint:
        return Standing.OTHER
    if known.size:
        return Standing.STORED
    return Standing.OWN if known.token == claim.token else Standing.RUNNING


def may_finish(known: Known | None, token: str) -> bool:
    """Whether the key is still this claim's: late is well, as long as nobody else has it."""
    return known is not None and known.token == token and not known.size
