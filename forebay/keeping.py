"""Step 8: what of an answer is stored, and what those hear who wait for it.

Rule 1: only whole, valid answers of the model that was asked for are stored.
Rule 2: whoever waits is told of an answer in any case, of a failure only where it may be theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from forebay import codec, schemas, validation
from forebay.codec import Answer
from forebay.errors import GatewayError, GatewayTimeout, Overloaded
from forebay.request import Request

if TYPE_CHECKING:
    from forebay.system import System

OWN_ENDS = ("stop", "tool_calls", "function_call")


class Keeper:
    """Decides what of an answer is stored, by the configuration of the moment; holds nothing.

    Failure behaviour: none of its own. What is not stored is asked for again.
    """

    def __init__(self, system: System) -> None:
        self._system = system

    def keep(self, request: Request, answer: Answer) -> tuple[bytes, float | None]:
        """The answer as bytes for those who wait, and for how long to store it, if at all."""
        answer.clamped = request.facts.clamped
        ttl_s = self.ttl_s(request)
        if ttl_s is not None and (request.doubted or not self.is_good(request, answer)):
            ttl_s = None
        return codec.pack(answer), ttl_s

    def is_good(self, request: Request, answer: Answer) -> bool:
        """Whether an answer is worth keeping: whole, and valid even where nobody validates."""
        call, gateway = request.call, self._system.config.gateway
        if not _is_whole(answer, call.body):
            return False
        return gateway.enable_validation or not any(validation.findings(answer.body, call.body))

    def ttl_s(self, request: Request) -> float | None:
        """For how long a good answer to this request is stored, None where it is not."""
        config = self._system.config.gateway
        call = request.call
        if not (config.enable_caching and call.cache_write):
            return None
        if not (schemas.understands(call.route, call.body) and request.is_own):
            return None
        return call.cache_ttl_s or float(config.cache_ttl_s)


def told_to_others(request: Request, error: BaseException | None) -> bytes | None:
    """What those hear who wait for a call that failed; None: one of them tries.

    What is our client's own is no news for them: limits that refuse it, a deadline shorter than
    theirs, its leaving; nor is what this process has no room for.
    """
    if not (isinstance(error, GatewayError) and request.reserved) or isinstance(error, Overloaded):
        return None
    is_late = request.own_deadline and isinstance(error, GatewayTimeout)
    return None if is_late else codec.pack_error(error)


def _is_whole(answer: Answer, asked: Mapping[str, Any]) -> bool:
    """Whether every choice that was asked for is there and came to its own end.

    Reasons that OpenAI does not know are providers' words for what went wrong.
    """
    prompts = asked.get("prompt")
    many = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    count = (asked.get("n") or 1) * (len(prompts) if many and prompts else 1)
    ends = [choice.get("finish_reason") for choice in answer.body.get("choices") or ()]
    return len(ends) >= count and all(end in OWN_ENDS for end in ends)
