"""Which failures are a row's own, which pass, and which would meet every row alike."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from forebay.errors import (
    AuthenticationError,
    BudgetExceeded,
    ConfigurationError,
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    RateLimitError,
    RequestTooLarge,
    ResponseValidationError,
)

Kind = Literal["row", "passing", "job"]
ROW_PARAMS = ("input", "messages", "prompt", "text")
"""Fields that a row fills; an error about another one is about the job."""
BAD_INPUT = (400, 413, 422)
REFUSED = (401, 403, 404)
DOUBTFUL_S = 60.0
"""How long an outage is waited out by a job of which no row was ever done."""
T = TypeVar("T")


def kind_of(error: GatewayError) -> Kind:
    """Whose failure it is: the row's, nobody's for long, or the whole job's."""
    job = AuthenticationError, PermissionDenied, ModelNotFound, BudgetExceeded, ConfigurationError
    if isinstance(error, job) or error.upstream_status in REFUSED:
        return "job"
    if isinstance(error, ResponseValidationError):
        return "row"
    bad_input = isinstance(error, InvalidRequest | RequestTooLarge)
    if bad_input or error.upstream_status in BAD_INPUT:
        field = (error.param or "").partition("[")[0].partition(".")[0]
        return "row" if not field or field in ROW_PARAMS else "job"
    return "passing"


def halves_help(error: GatewayError) -> bool:
    """Whether fewer rows at once may succeed where these did not."""
    too_much = isinstance(error, RateLimitError) and error.retry_after_s is None
    return kind_of(error) == "row" or too_much or isinstance(error, GatewayTimeout)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long passing failures are borne: for `most_s` seconds of pauses in a row.

    Pauses double from `first_s` to `longest_s`, with jitter, and are never shorter than a
    Retry-After. `outage_s`, where it is less, is for failures that are no limit.
    """

    pause: Callable[[float], Awaitable[None]]
    rng: random.Random
    most_s: float = 600.0
    outage_s: float = math.inf
    first_s: float = 0.5
    longest_s: float = 30.0

    @classmethod
    def of(cls, most_s: float, doubtful: bool) -> Patience:
        """`doubtful`: no row of the job was ever done, so perhaps there is nobody to wait for."""
        outage_s = DOUBTFUL_S if doubtful else math.inf
        return cls(asyncio.sleep, random.Random(), most_s, outage_s)

    async def bear(self, ask: Callable[[], Awaitable[T]], is_final: Callable[..., bool]) -> T:
        """What `ask` gives in the end. Raises what `is_final` calls final, or lasts too long."""
        waited_s, pause_s = 0.0, self.first_s
        while True:
            try:
                return await ask()
            except GatewayError as error:
                is_limit = isinstance(error, RateLimitError)
                most_s = self.most_s if is_limit else min(self.most_s, self.outage_s)
                if kind_of(error) != "passing" or is_final(error) or waited_s >= most_s:
                    raise
                wait_s = max(error.retry_after_s or 0.0, pause_s * self.rng.uniform(0.5, 1.0))
            await self.pause(wait_s)
            waited_s += wait_s
            pause_s = min(2 * pause_s, self.longest_s)
