"""What goes into the ledger, said in the pipeline's words; and what comes out, in users' words."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from actors.batcher.policy import Paid, Spare
from actors.ledger.desk import LedgerDesk, OpenEntry
from actors.ledger.policy import TENANTS_PER_READ_MAX, LedgerFull, Spent, Status
from actors.rate_limiter.terms import Amount, Seed
from actors.ref import OwnerUnavailable
from forebay import bounds, usage
from forebay.bounds import Bound
from forebay.call import Call, Facts
from forebay.codec import Answer, cached_in, tokens_in
from forebay.errors import GatewayError, GatewayTimeout, Overloaded, ProviderError
from forebay.routing import Deployment

if TYPE_CHECKING:
    from forebay.providers.base import Provider
    from forebay.providers.prices import PriceBound

CLIENT_CLOSED = 499  # nginx's status for a caller who went away; no answer carries it
HEDGING = "forebay/hedging"  # who pays for second copies; no tenant can be called so
NOBODY = "forebay/nobody"  # whose requests have no good key; no tenant can be called so
UNUSED = "another copy of this call was answered first"
CLIENT_LEFT = "the caller went away"

TARIFFS_MAX = 1_000  # names that are filled into patterns are callers' choice; full = begin anew

log = logging.getLogger(__name__)


class _Tariff(NamedTuple):
    """What a deployment charges at most, None where nobody knows, and a name for its prices."""

    bound: PriceBound | None = None
    version: str = ""


_UNKNOWN = _Tariff()


class Books:
    """The ledger's desk, as the pipeline and the limiter use it.

    With `enabled` off nothing is written, and a limiter that asks hears that nothing was used
    before and that all is used since. `count_hits` says of a tenant whether answers from the cache
    count as its requests. `prices` tells what a call may cost at most; without it nobody knows.
    `strict`: a call is made only when the ledger's store has its intent. It is made anew with each
    configuration, and remembers the prices of TARIFFS_MAX deployments.

    Failure behaviour: the desk's. `full` says that no further paid call may start.
    """

    def __init__(
        self,
        desk: LedgerDesk,
        *,
        enabled: bool,
        count_hits: Callable[[str], bool] = lambda tenant: True,
        prices: Callable[[], Provider] | None = None,
        strict: bool = False,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._desk = desk
        self.enabled = enabled
        self._count_hits = count_hits
        self._prices = prices
        self._strict = strict
        self._listed = False
        self._tariffs: dict[str, _Tariff] = {}
        self._wall = wall

    @property
    def full(self) -> bool:
        return self.enabled and self._desk.full

    async def open_call(
        self,
        call: Call,
        facts: Facts,
        deployment: Deployment,
        *,
        stream: bool = False,
        bound: Bound | None = None,
    ) -> OpenEntry | None:
        """The intent of one attempt, before its bytes leave.

        Raises `Overloaded` when full, or when a strict ledger does not take the intent: then the
        attempt is not made. One of which no row tells is no attempt in `facts`.
        """
        if not self.enabled:
            return None
        tariff = self._tariff(deployment)
        if tariff.bound is None and self._prices is not None and not self._listed:
            await self._prices().warm()  # LiteLLM's list comes with it; the call needs it anyway
            self._listed = True
            tariff = self._tariff(deployment)
        try:
            entry = self._desk.open(
                request_id=call.request_id,
                tenant=call.tenant,
                route=call.route,
                model=facts.group,
                deployment=deployment.id,
                attempt=facts.attempts,
                stream=stream,
                most_nano=_most(call, deployment, bound, tariff.bound),
                price_version=tariff.version,
            )
        except LedgerFull as error:
            facts.attempts -= 1
            raise Overloaded(str(error), retry_after_s=error.retry_after_s) from None
        entry.cache_key = facts.cache_key
        if self._strict:
            await self._intend(entry)
        return entry

    async def _intend(self, entry: OpenEntry) -> None:
        try:
            await self._desk.intend(entry)
        except LedgerFull as error:
            failure = Overloaded(str(error), retry_after_s=error.retry_after_s)
            self._desk.void(entry, _line(failure), failure.status)
            raise failure from None
        except BaseException:
            self._desk.void(entry, CLIENT_LEFT, CLIENT_CLOSED)
            raise

    def _tariff(self, deployment: Deployment) -> _Tariff:
        """The deployment's prices; they do not change while this configuration is in force."""
        known = self._tariffs.get(deployment.id)
        if known is not None:
            return known
        if self._prices is None:
            return _UNKNOWN
        prices = self._prices()
        told = _Tariff(prices.price_bound(deployment), prices.price_version(deployment))
        if told.bound is not None or self._listed:  # LiteLLM's list may be still to come
            if len(self._tariffs) >= TARIFFS_MAX:
                self._tariffs.clear()
            self._tariffs[deployment.id] = told
        return told

    def post_call(
        self,
        entry: OpenEntry | None,
        answer: Answer,
        error: GatewayError | None = None,
        note: str | None = None,
    ) -> None:
        """The attempt was answered, at least in part. `note`: why nobody was served with it."""
        if entry is None:
            return
        prompt_tokens, completion_tokens = tokens_in(answer.usage)
        self._desk.post(
            entry,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_nano=answer.cost_nano,
            estimated=answer.estimated or answer.usage is None,
            error=note if error is None else _line(error),
            http_status=200 if error is None else error.status,
            tool_calls=_tool_calls(answer),
            response_id="" if note is not None else str(answer.body.get("id") or ""),
            cached_tokens=cached_in(answer.usage),
        )

    def void_call(self, entry: OpenEntry | None, error: GatewayError | None) -> None:
        """The attempt failed; None for `error` means that the caller went away.

        It costs nothing where the provider said so, or has not seen it. Where nobody can tell, the
        entry is unsettled and holds the most that it may have cost.
        """
        if entry is None:
            return
        line = CLIENT_LEFT if error is None else _line(error)
        status = CLIENT_CLOSED if error is None else error.status
        if entry.most_nano != 0 and (error is None or _is_lost(error)):
            self._desk.unsettle(entry, line, status)
        else:
            self._desk.void(entry, line, status)

    def fail_call(
        self, entry: OpenEntry | None, error: GatewayError, *, asked: bool = True
    ) -> Amount:
        """The attempt failed. What was paid all the same, for a part of a split list, is posted.

        Where no provider was `asked` and nothing paid, there was no attempt: no row tells of it.
        Returns what was used.
        """
        paid: Paid | None = getattr(error, "paid", None)
        if paid is None and not asked:
            if entry is not None:
                self._desk.drop(entry)
            return Amount()
        if paid is None:
            self.void_call(entry, error)
            return Amount()
        if entry is not None:
            self._desk.post(
                entry,
                prompt_tokens=paid.prompt_tokens,
                cost_nano=paid.cost_nano,
                estimated=_is_lost(error),
                error=_line(error),
                http_status=error.status,
            )
        return Amount(paid.prompt_tokens, paid.cost_nano or 0)

    def spare(self, call: Call, facts: Facts, deployment: Deployment, spare: Spare) -> None:
        """What second copies of a call have cost, beside the call's own entry.

        The caller did not ask for them, so they are no part of its tenant's bill. With the ledger's
        buffer full they are logged only: they are paid for already, and the answer is there.
        """
        if not self.enabled:
            return
        try:
            entry = self._desk.open(
                request_id=call.request_id,
                tenant=HEDGING,
                route=call.route,
                model=facts.group,
                deployment=deployment.id,
                attempt=facts.attempts + 1,  # it is no request; those are counted by their first
                most_nano=spare.cost_nano,
                price_version=self._tariff(deployment).version,
            )
        except LedgerFull:
            log.warning("a second copy of %s is in no ledger: %s", call.request_id, spare)
            return
        self._desk.post(
            entry,
            prompt_tokens=spare.prompt_tokens,
            completion_tokens=0,
            cost_nano=spare.cost_nano,
            estimated=spare.estimated,
            error=UNUSED,
            http_status=200,
        )

    def free(self, call: Call, facts: Facts, took_s: float) -> None:
        """An answer that cost nothing: from the cache, from somebody else's call, from before."""
        facts.booked = True
        status: Status = "hit" if facts.cache == "hit" else "joined"
        if self.enabled:
            self._desk.note(
                "replay" if facts.replayed else status,
                request_id=call.request_id,
                tenant=call.tenant,
                route=call.route,
                model=facts.group,
                latency_ms=int(took_s * 1000),
                saved_nano=facts.saved_nano,
                response_id=facts.response_id,
                cache_key=facts.cache_key,
            )

    def end_call(self, call: Call, facts: Facts | None, outcome: str) -> None:
        """A request is over: `outcome` is `ok`, `cancelled`, `error` or the status of its error.

        One of which no row tells yet has one now: refused, gone, or joined to a call that failed.
        `facts` is None where it was not even understood.
        """
        if not self.enabled or (facts is not None and (facts.attempts or facts.booked)):
            return
        known = {"cancelled": CLIENT_CLOSED, "error": 500}
        status = known[outcome] if outcome in known else int(outcome)
        kind: Literal["refused", "voided"] = "voided" if outcome in known else "refused"
        model = "" if facts is None else facts.group
        if facts is not None and facts.cache == "joined":
            self._desk.note(
                "joined",
                request_id=call.request_id,
                tenant=call.tenant,
                route=call.route,
                model=model,
                error=f"the call that it joined ended with {status}",
                http_status=status,
            )
            return
        self._desk.refuse(
            request_id=call.request_id,
            tenant=call.tenant,
            route=call.route,
            model=model,
            error=CLIENT_LEFT if status == CLIENT_CLOSED else f"answered with {status}",
            http_status=status,
            status=kind,
        )

    def mark(self) -> int:
        """A name for all that this process has recorded so far."""
        return self._desk.mark() if self.enabled else 0

    def commit_of(self, mark: int) -> int | None:
        """The commit of what `mark` names, None while it is not acknowledged.

        A seed knows of it if, and only if, the seed's commit is this or a later one.
        """
        return self._desk.commit_of(mark) if self.enabled else 1

    async def seeds(self, tenants: list[str]) -> list[Seed]:
        """The ledger's word about each of the tenants, in their order.

        All that this process has recorded is in it, unless the flush before it takes too long.
        Raises OwnerUnavailable.
        """
        if not self.enabled:
            return [Seed(commit=0) for _ in tenants]
        told: list[Seed] = []
        for start in range(0, len(tenants), TENANTS_PER_READ_MAX):
            part = tenants[start : start + TENANTS_PER_READ_MAX]
            spent = await self._desk.spent(part, int(self._wall() * 1000))
            told += [
                _seed(one, self._count_hits(name)) for name, one in zip(part, spent, strict=True)
            ]
        return told

    async def usage(
        self,
        *,
        tenant: str | None = None,
        since_s: float | None = None,
        until_s: float | None = None,
        group_by: str | Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """As `usage.report`."""
        return await usage.report(
            self._desk,
            self._wall(),
            tenant=tenant,
            since_s=since_s,
            until_s=until_s,
            group_by=group_by,
        )

    async def metrics(self, *, tenant: str | None, hours: float) -> dict[str, Any]:
        """As `usage.metrics`."""
        return await usage.metrics(self._desk, self._wall(), tenant=tenant, hours=hours)

    async def cost(self, *, tenant: str | None, since_s: float | None) -> dict[str, Any]:
        """As `usage.costs`."""
        return await usage.costs(self._desk, self._wall(), tenant=tenant, since_s=since_s)

    def stats(self) -> dict[str, Any]:
        return self._desk.stats()


def _seed(spent: Spent, count_hits: bool) -> Seed:
    requests = Counter(dict(spent.minutes))
    if count_hits:
        requests.update(dict(spent.hit_minutes))
    return Seed(
        spent.commit,
        spent.day,
        spent.day_nano,
        spent.month,
        spent.month_nano,
        tuple(sorted(requests.items())),
    )


def _most(
    call: Call, deployment: Deployment, bound: Bound | None, price: PriceBound | None
) -> int | None:
    """What an attempt may cost at most, in nano-USD, None if no price is known."""
    if bound is not None and bound.nano is not None:
        return bound.nano
    if price is None:
        return None
    clamp = None if bound is None else bound.clamp
    return bounds.most_nano(call.route, call.body, price, clamp, deployment.model)


def _is_lost(error: GatewayError) -> bool:
    """Whether a provider may have done the work although no answer came of it."""
    if isinstance(error, GatewayTimeout | ProviderError):
        return error.sent and error.upstream_status is None
    # The Batcher went away with the call; the error that says so was raised while handling that.
    return isinstance(error.__context__, OwnerUnavailable)


def _tool_calls(answer: Answer) -> int:
    count = 0
    for choice in answer.body.get("choices") or ():
        message = choice.get("message")
        if not message:
            continue
        if calls := message.get("tool_calls"):
            count += len(calls)
        if message.get("function_call"):
            count += 1
    return count


def _line(error: GatewayError) -> str:
    return f"{type(error).__name__}: {error.message}"
