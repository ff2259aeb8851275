"""Steps 2, 4 and 9: what a request takes of its tenant's limits, and gives back.

Rule 1: it is counted once, whoever answers it; tokens and money are taken by those who lead only.
Rule 2: what is taken is given back once: `settle` says what was used, `uncount` that nothing was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.rate_limiter.terms import NOTHING_USED, Amount, Hold, Refusal
from actors.ref import OwnerUnavailable
from forebay import bounds
from forebay.codec import Answer
from forebay.errors import (
    BudgetExceeded,
    GatewayError,
    Overloaded,
    QueueTimeout,
    RateLimitError,
    RequestTooLarge,
)
from forebay.request import Request

if TYPE_CHECKING:
    from forebay.system import System

QUEUED_S_MIN = 0.001
"""What a limit takes less than this to say is no wait, but a message."""
NANO_PER_USD = 1e9


class Reservations:
    """Takes and gives back what a request uses of its tenant's limits; each request has its own.

    Bounded by the limiter's desk. Failure behaviour: fails closed. A limit that cannot be checked,
    or a ledger that can take no more, refuses the call (`Overloaded`), and its count is undone.
    """

    def __init__(self, system: System) -> None:
        self._system = system

    async def count(self, request: Request) -> None:
        """Count the request, and reckon the most that it may use.

        Raises:
            GatewayError: the tenant's limits refuse it, or cannot be checked now.
        """
        system, call, limits = self._system, request.call, request.limits
        if limits is None:
            return
        if not system.bounds.prepared:
            await system.bounds.prepare()
        amount = NOTHING_USED
        if limits.meters:
            request.bound = await system.bounds.of(call, request.group, limits)
            amount = request.bound.amount
        request.ticket = system.limiter.count_at_once(call.tenant, limits)
        if request.ticket is not None:
            return
        wait_s, queue_max = system.tenants.queue_for(call.tenant) if call.may_wait else (0.0, 0)
        asked_s = system.clock()
        try:
            counted = await system.limiter.count(
                call.tenant,
                limits,
                amount,
                wait_s=min(wait_s, request.left_s(system.clock)),
                queue_max=queue_max,
            )
        except OwnerUnavailable as error:
            raise Overloaded(f"limits cannot be checked now: {error}", retry_after_s=1.0) from None
        finally:
            self.queued(asked_s)
        if isinstance(counted, Refusal):
            raise self._refusal(request, counted, wait_s)
        request.ticket = counted

    async def reserve(self, request: Request) -> None:
        """Take what the call may use. What fails here is nobody's but the request's own.

        Raises:
            GatewayError: the tenant's limits refuse it, or nobody can say or write down now.
        """
        system = self._system
        request.reserved = False
        if system.books.full:
            self.uncount(request)
            raise Overloaded("the ledger is away and its buffer is full", retry_after_s=1.0)
        ticket, bound = request.ticket, request.bound
        if ticket is None:
            request.reserved = True
            return
        amount = NOTHING_USED if bound is None else bound.amount
        request.hold = system.limiter.reserve_at_once(ticket, amount)
        if request.hold is None:
            request.hold = await self._wait_for_hold(request)
        request.reserved = True
        bound = request.bound  # it may be lower now
        if bound is not None and bound.clamp is not None:
            request.tell_clamp(bound.clamp)

    async def _wait_for_hold(self, request: Request) -> Hold:
        system, may_wait = self._system, request.call.may_wait
        wait_s, _ = system.tenants.queue_for(request.call.tenant) if may_wait else (0.0, 0)
        asked_s = system.clock()
        try:
            held = await self.hold(request, wait_s)
            for _ in range(2):  # the day's money, and the month's
                if not isinstance(held, Refusal) or not self._lower(request, held):
                    break
                held = await self.hold(request, wait_s)
        except OwnerUnavailable as error:
            self.uncount(request)
            raise Overloaded(f"limits cannot be checked now: {error}", retry_after_s=1.0) from None
        except BaseException:
            self.uncount(request)
            raise
        finally:
            self.queued(asked_s)
        if isinstance(held, Refusal):
            self.uncount(request)
            raise self._refusal(request, held, wait_s)
        return held

    async def hold(self, request: Request, wait_s: float) -> Hold | Refusal:
        """Take what its bound says, waiting for at most `wait_s` seconds."""
        assert request.ticket is not None, "what is counted only is reserved"
        amount = Amount() if request.bound is None else request.bound.amount
        wait_s = min(wait_s, request.left_s(self._system.clock))
        return await self._system.limiter.reserve(request.ticket, amount, wait_s=wait_s)

    def settle(self, request: Request) -> None:
        """Give back what the request has not used, if anything is held for it."""
        if request.hold is not None:
            self._system.limiter.settle(request.hold, request.used)
            request.hold = None
            request.used = NOTHING_USED

    def uncount(self, request: Request) -> None:
        """The request is to count for nothing after all."""
        if request.ticket is not None:
            self._system.limiter.uncount(request.ticket)
            request.ticket = None

    def learn(self, request: Request, answer: Answer) -> None:
        """An answer was paid for: so much of the reservation is used."""
        request.answer = answer
        bound, limits = request.bound, request.limits
        if bound is None or limits is None:
            return
        nano = answer.cost_nano if answer.cost_nano is not None else bound.nano
        request.use(Amount(bounds.used(answer.usage, bound), nano or 0))
        cut = request.facts.clamped is not None and _is_cut(answer)
        self._system.bounds.learn(request.call, request.group, answer.usage, cut=cut)

    def queued(self, since_s: float) -> None:
        """A limit, of the tenant or of a deployment, has let us wait since then, if at all."""
        waited_s = self._system.clock() - since_s
        if waited_s > QUEUED_S_MIN:
            self._system.meter.queued(waited_s)

    def _lower(self, request: Request, refusal: Refusal) -> bool:
        """Whether a shorter answer would do: money that is left is used to the end."""
        if request.bound is None or refusal.lent or not refusal.kind.startswith("usd_"):
            return False
        lower = bounds.lowered(request.bound, int(refusal.remaining))
        if lower is None or lower == request.bound:
            return False
        request.bound = lower
        return True

    def _refusal(self, request: Request, refusal: Refusal, waited_s: float) -> GatewayError:
        tenant, kind = request.call.tenant, refusal.kind
        self._system.meter.limited(tenant, kind)
        is_money = kind.startswith("usd_")
        limit = f"${refusal.limit / NANO_PER_USD:g}" if is_money else f"{refusal.limit:g}"
        words = f"{limit} {kind.replace('_', ' ')}"
        details: dict[str, Any] = {
            "model": request.facts.group,
            "figures": self._system.limiter.figures(tenant),
        }
        if refusal.never and not is_money:
            return RequestTooLarge(
                f"this request alone is more than tenant {tenant!r} may ever use: {words}",
                code="tokens_over_limit",
                **details,
            )
        if is_money and not refusal.lent:
            after_s = None if refusal.never else refusal.retry_after_s
            when = "; it never fits" if after_s is None else f"; it begins anew in {after_s:.0f} s"
            return BudgetExceeded(
                f"tenant {tenant!r} has used up its {words}{when}", retry_after_s=after_s, **details
            )
        error = RateLimitError if waited_s <= 0 else QueueTimeout
        return error(
            f"tenant {tenant!r} is over its limit of {words}; "
            f"retry after {refusal.retry_after_s:.3f} s",
            retry_after_s=refusal.retry_after_s,
            **details,
        )


def _is_cut(answer: Answer) -> bool:
    """Whether the answer ended because it could have no more tokens."""
    return any(c.get("finish_reason") == "length" for c in answer.body.get("choices") or ())
