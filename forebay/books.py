"""What goes into the ledger, said in the pipeline's words; and what comes out, in users' words."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from actors.batcher.policy import Paid, Spare
from actors.ledger.desk import LedgerDesk, OpenEntry
from actors.ledger.policy import TENANTS_PER_READ_MAX, GroupBy, LedgerFull, Spent
from actors.rate_limiter.terms import Amount, Seed
from actors.ref import OwnerUnavailable
from forebay.call import Call, Facts
from forebay.codec import Answer, tokens_in
from forebay.errors import GatewayError, Overloaded
from forebay.routing import Deployment

CLIENT_CLOSED = 499  # nginx's status for a caller who went away; no answer carries it
HEDGING = "forebay/hedging"  # who pays for second copies; no tenant can be called so
UNUSED = "another copy of this call was answered first"

log = logging.getLogger(__name__)


class Books:
    """The ledger's desk, as the pipeline and the limiter use it.

    With `enabled` off nothing is written, and a limiter that asks hears that nothing was used
    before and that all is used since. `count_hits` says of a tenant whether answers from the cache
    count as its requests.

    Failure behaviour: the desk's. `full` says that no further paid call may start.
    """

    def __init__(
        self,
        desk: LedgerDesk,
        *,
        enabled: bool,
        count_hits: Callable[[str], bool] = lambda tenant: True,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._desk = desk
        self.enabled = enabled
        self._count_hits = count_hits
        self._wall = wall

    @property
    def full(self) -> bool:
        return self.enabled and self._desk.full

    def open_call(
        self, call: Call, facts: Facts, deployment: Deployment, *, stream: bool = False
    ) -> OpenEntry | None:
        """The intent of one attempt, before its bytes leave. Raises `Overloaded` when full."""
        if not self.enabled:
            return None
        try:
            return self._desk.open(
                request_id=call.request_id,
                tenant=call.tenant,
                route=call.route,
                model=facts.group,
                deployment=deployment.id,
                attempt=facts.attempts,
                stream=stream,
            )
        except LedgerFull as error:
            raise Overloaded(str(error), retry_after_s=error.retry_after_s) from None

    def post_call(
        self, entry: OpenEntry | None, answer: Answer, error: GatewayError | None = None
    ) -> None:
        """The attempt was answered, at least in part."""
        if entry is None:
            return
        prompt_tokens, completion_tokens = tokens_in(answer.usage)
        self._desk.post(
            entry,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_nano=answer.cost_nano,
            estimated=answer.estimated or answer.usage is None,
            error=None if error is None else _line(error),
            http_status=200 if error is None else error.status,
        )

    def void_call(self, entry: OpenEntry | None, error: GatewayError | None) -> None:
        """The attempt failed; None for `error` means that the caller went away."""
        if entry is None:
            return
        if error is None:
            self._desk.void(entry, "the caller went away", CLIENT_CLOSED)
        else:
            self._desk.void(entry, _line(error), error.status)

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
        """An answer that cost nothing: from the cache, or from somebody else's call."""
        if self.enabled:
            self._desk.note(
                "hit" if facts.cache == "hit" else "joined",
                request_id=call.request_id,
                tenant=call.tenant,
                route=call.route,
                model=facts.group,
                latency_ms=int(took_s * 1000),
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
        group_by: GroupBy | None = None,
    ) -> dict[str, Any]:
        """Totals, in tokens and USD; times are UTC epoch seconds.

        Raises:
            Overloaded: the ledger cannot be asked now.
        """
        try:
            totals = await self._desk.usage(tenant, _ms(since_s), _ms(until_s), group_by)
        except OwnerUnavailable as error:
            raise Overloaded(f"usage cannot be read now: {error}", retry_after_s=1.0) from None
        result: dict[str, Any] = _in_usd(totals)
        return result

    async def cost(
        self, *, tenant: str | None = None, since_s: float | None = None
    ) -> dict[str, Any]:
        """Cost in USD: the total, by model and by day."""
        totals = await self.usage(tenant=tenant, since_s=since_s, group_by="day")
        return {
            "total_cost": totals["total_cost"],
            "by_model": {name: part["total_cost"] for name, part in totals["by_model"].items()},
            "by_day": {name: part["total_cost"] for name, part in totals["by_day"].items()},
        }

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


def _line(error: GatewayError) -> str:
    return f"{type(error).__name__}: {error.message}"


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


def _in_usd(value: Any) -> Any:
    """The same figures with `total_cost` in USD beside each `total_cost_nano`."""
    if isinstance(value, dict):
        told = {name: _in_usd(inner) for name, inner in value.items()}
        if "total_cost_nano" in told:
            told["total_cost"] = told["total_cost_nano"] / 1e9
        return told
    if isinstance(value, list):
        return [_in_usd(inner) for inner in value]
    return value
