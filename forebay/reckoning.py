"""What a request may use at most: of its tenant's limits, and of a deployment's own.

Rule 1: nothing is reckoned for a tenant without limits of tokens or money, nor for a deployment
        without `tpm`.
Rule 2: the bound of a tenant holds for every deployment that the request may end up at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.batcher.policy import Text
from actors.rate_limiter.desk import RateLimiterDesk
from actors.rate_limiter.terms import Amount, Hold, Limits, Refusal
from forebay import bounds
from forebay.bounds import Bound, Guess
from forebay.call import Call
from forebay.errors import PermissionDenied
from forebay.providers.base import Provider
from forebay.providers.prices import PriceBound, dearest
from forebay.routing import Deployment, Group

NOT_LIMITED = Limits()
DEPLOYMENTS_REMEMBERED_MAX = 10_000
GROUPS_REMEMBERED_MAX = 1_000


@dataclass(slots=True, eq=False)
class _Ends:
    """Every deployment that a group's requests may end up at; `price` is what none of them exceeds,
    once it is known."""

    group: Group
    deployments: tuple[Deployment, ...]
    models: list[str]
    tighter: Callable[[str], int]
    price: PriceBound | None = None


class Reckoner:
    """Owns what was learnt of the lengths of answers, bounded by `Guess`, and where the requests of
    GROUPS_REMEMBERED_MAX groups may end up.

    `prepared`: a call need not wait for a library's import any more; see `prepare`.

    Failure behaviour: none of its own; without a tokenizer the bytes of a prompt count.
    """

    def __init__(self, provider: Provider, candidates: Callable[[str], list[Deployment]]) -> None:
        """`candidates` gives every deployment that a group's requests may end up at."""
        self._provider = provider
        self._candidates = candidates
        self._guess = Guess()
        self._known: dict[str, _Ends] = {}
        self.prepared = False

    async def of(self, call: Call, group: Group, limits: Limits) -> Bound:
        """The bound of a request under its tenant's limits.

        Raises:
            RequestTooLarge, BudgetExceeded: it can never fit.
            PermissionDenied: money is limited, and what the model costs is not known.
        """
        price = None
        if limits.nano_most is not None:
            price = self._ends(group).price or await self._price(group)
        return self._bound(call, group, limits, price)

    async def prepare(self) -> None:
        """What a call would wait for between being allowed and going out: a library's import.

        Calls that were allowed one after another would leave together after it.
        """
        await self._provider.warm()
        self.prepared = True

    def of_attempt(self, call: Call, group: Group) -> Bound:
        """What to expect of a request, where no limit of its tenant demands a bound."""
        return self._bound(call, group, NOT_LIMITED, None)

    def of_texts(self, deployment: Deployment, texts: Sequence[Text]) -> int:
        """The most tokens of some texts to embed."""
        tighter = self._tighter((deployment,))
        body = {"input": texts}
        return bounds.prompt_tokens("embedding", body, models=[deployment.model], tighter=tighter)

    def learn(
        self, call: Call, group: Group, usage: Mapping[str, Any] | None, *, cut: bool
    ) -> None:
        """An answer came. `cut`: our clamp ended it."""
        tokens = (usage or {}).get("completion_tokens")
        if tokens and call.route != "embedding":
            choices = int(call.body.get("n") or 1)
            self._guess.learn(call.tenant, group.pattern, int(tokens), cut, choices=choices)

    def _bound(self, call: Call, group: Group, limits: Limits, price: PriceBound | None) -> Bound:
        ends = self._ends(group)
        first = max(bounds.first_guess(call.body, d.model) for d in group.deployments)
        return bounds.bound(
            call.route,
            call.body,
            limits,
            self._guess.guess(call.tenant, group.pattern, first),
            price,
            models=ends.models,
            tighter=ends.tighter,
        )

    def _ends(self, group: Group) -> _Ends:
        """Where the group's requests may end up, found once for each configuration's group."""
        ends = self._known.get(group.name)
        if ends is None or ends.group is not group:
            if len(self._known) >= GROUPS_REMEMBERED_MAX:
                self._known.clear()
            all_ = (*group.deployments, *self._candidates(group.name))
            models = [deployment.model for deployment in all_]
            ends = self._known[group.name] = _Ends(group, all_, models, self._tighter(all_))
        return ends

    def _tighter(self, deployments: Sequence[Deployment]) -> Callable[[str], int]:
        by_model = {deployment.model: deployment for deployment in deployments}

        def tokens(text: str) -> int:
            size = len(text.encode("utf-8", "surrogatepass"))
            counts = [self._provider.count_tokens(d, text) for d in by_model.values()]
            return max(size if count is None else count for count in counts)

        return tokens

    async def _price(self, group: Group) -> PriceBound:
        ends = self._ends(group)
        candidates = ends.deployments
        prices = [self._provider.price_bound(deployment) for deployment in candidates]
        if None in prices:
            await self._provider.warm()  # LiteLLM's list comes with it
            prices = [self._provider.price_bound(deployment) for deployment in candidates]
        if None in prices:
            unknown = candidates[prices.index(None)]
            raise PermissionDenied(
                f"what {unknown.group!r} costs is not known, and this tenant's money is limited; "
                "give the deployment input_cost_per_token and output_cost_per_token, or base_model",
                param="model",
                code="price_unknown",
                model=group.name,
            )
        found = dearest(prices)
        assert found is not None, "a group has deployments"
        ends.price = found
        return found


class Quotas:
    """Holds deployments to their own `rpm` and `tpm`, all processes together.

    Each is a tenant of the limiter's under a name that no tenant can have. Made anew with each
    configuration. Failure behaviour: the limiter's: fails closed.
    """

    def __init__(self, limiter: RateLimiterDesk, reckoner: Reckoner, version: int) -> None:
        self._limiter = limiter
        self._reckoner = reckoner
        self._version = version
        self._limits: dict[str, Limits | None] = {}

    def limit(self, deployment: Deployment) -> bool:
        """Whether the deployment has limits of its own."""
        return deployment.rpm is not None or deployment.tpm is not None

    async def take_call(
        self, deployment: Deployment, call: Call, group: Group, bound: Bound | None
    ) -> Hold | Refusal | None:
        """Leave for one call; settle the hold with what it used. None: nothing limits it."""
        limits = self._of(deployment)
        if limits is None:
            return None
        if not self._reckoner.prepared:
            await self._reckoner.prepare()
        amount = Amount()
        if limits.tokens_per_minute is not None:
            amount = bounds.fits(bound or self._reckoner.of_attempt(call, group), limits)
        return await self._limiter.admit(deployment.limited_as, limits, amount)

    async def take_texts(
        self, deployment: Deployment, texts: Sequence[Text]
    ) -> Hold | Refusal | None:
        """The same for one call with texts to embed."""
        limits = self._of(deployment)
        if limits is None:
            return None
        if not self._reckoner.prepared:
            await self._reckoner.prepare()
        amount = Amount()
        if limits.tokens_per_minute is not None:
            tokens = self._reckoner.of_texts(deployment, texts)
            amount = Amount(min(tokens, limits.tokens_most))
        return await self._limiter.admit(deployment.limited_as, limits, amount)

    def _of(self, deployment: Deployment) -> Limits | None:
        if not self.limit(deployment):
            return None
        name = deployment.limited_as
        if name not in self._limits:
            if len(self._limits) >= DEPLOYMENTS_REMEMBERED_MAX:
                self._limits.clear()
            rpm, tpm = deployment.rpm, deployment.tpm
            self._limits[name] = bounds.deployment_limits(rpm, tpm, self._version)
        return self._limits[name]
