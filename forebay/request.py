"""Step 1, and what comes of it: a request on its way, and what was taken for it so far.

Rule 1: what the steps tell each other of a request stands here; they hold nothing of it themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.cache.desk import Lead
from actors.circuit_breaker.policy import Pass
from actors.ledger.desk import OpenEntry
from actors.rate_limiter.terms import NOTHING_USED, Amount, Hold, Limits, Ticket
from forebay import schemas
from forebay.bounds import Bound
from forebay.call import Call, Facts
from forebay.codec import Answer
from forebay.ended import Tried
from forebay.errors import InvalidRequest, PermissionDenied
from forebay.routing import Deployment, Group
from forebay.tally import StreamTally

if TYPE_CHECKING:
    from actors.ref import Clock
    from forebay.kv_cache import Reading
    from forebay.system import System


@dataclass(slots=True)
class Request:
    """A checked call and what was taken for it so far.

    Times are on the system's monotonic clock. A question that is asked beside it, such as for a
    better answer, is a copy with its own `facts`.
    """

    call: Call
    group: Group
    started_s: float
    deadline_s: float
    ends_s: float  # the configured deadline, which those have who share the call
    facts: Facts
    own_deadline: bool = False  # the client's, shorter than the configured one
    limits: Limits | None = None
    bound: Bound | None = None
    ticket: Ticket | None = None
    hold: Hold | None = None
    reserved: bool = False
    used: Amount = NOTHING_USED
    doubted: bool = False  # the validation had something to say of the answer
    invalid: tuple[dict[str, Any], list[str]] | None = None  # an answer, and what is wrong with it
    prompt: Reading | None = None  # what its beginnings are called
    streams: bool = False
    answer: Answer | None = None  # the last one that a provider gave for it
    tried: tuple[Tried, ...] = ()  # its attempts, where somebody wants to know

    def left_s(self, clock: Clock) -> float:
        """How many seconds its deadline leaves."""
        return max(0.0, self.deadline_s - clock())

    def use(self, used: Amount) -> None:
        """So much more of its reservation is used."""
        self.used = Amount(self.used.tokens + used.tokens, self.used.nano + used.nano)

    def tell_clamp(self, clamp: int) -> None:
        """Its client is told that the answer may have `clamp` tokens only."""
        self.facts.clamped = clamp
        self.facts.warnings.append(
            f"the answer may have {clamp} tokens at most: the tenant's limit leaves no more"
        )

    @property
    def is_own(self) -> bool:
        """Whether the last attempt was at the model that was asked for, and not at a fallback."""
        told = self.facts.deployment
        return any(deployment.id == told for deployment in self.group.deployments)


@dataclass(slots=True)
class Attempt:
    """One attempt: the breaker's leave, the deployment's own limits, and how it goes.

    `asked_s` is when we began to wait for what comes next: the answer, or a stream's next chunk.
    `took_s` is how long the first of it took, None until it is there.
    """

    deployment: Deployment
    is_retry: bool
    admitted: Pass | None = None
    quota: Hold | None = None
    begun_s: float = 0.0
    asked_s: float = 0.0
    took_s: float | None = None
    slow: bool = False


@dataclass(slots=True)
class Flow:
    """A stream that is being relayed. `begun_s`: since when its time is not in the facts yet."""

    request: Request
    attempt: Attempt
    entry: OpenEntry | None
    lead: Lead | None
    tally: StreamTally
    begun_s: float | None


def check(system: System, call: Call) -> Request:
    """A request for this call: parameters that are allowed, a model that is known and permitted.

    Raises:
        GatewayError: what is wrong with it.
    """
    config = system.config.gateway
    body = call.body
    name = body.get("model") or system.table.default(call.route)
    if not isinstance(name, str):
        raise InvalidRequest.about("model", "model must be a string")
    group = system.table.group(name)
    schemas.check(call.route, body, group.allowed_params)
    system.tenants.require(call.tenant)
    if not system.tenants.allows(call.tenant, name):
        raise PermissionDenied(
            f"tenant {call.tenant!r} may not use model {name!r}", param="model", model=name
        )
    now = system.clock()
    own_deadline = call.timeout_s is not None and call.timeout_s < config.timeout
    timeout_s = call.timeout_s if own_deadline and call.timeout_s else config.timeout
    facts = Facts(group=group.name, config_version=system.version)
    limits = system.tenants.limits_for(call.tenant)
    ends_s = now + config.timeout
    return Request(call, group, now, now + timeout_s, ends_s, facts, own_deadline, limits)
