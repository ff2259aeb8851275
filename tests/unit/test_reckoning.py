"""Bounds for every deployment that a request may end up at, and deployments' own limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, cast

import pytest

from actors.rate_limiter.desk import RateLimiterDesk
from actors.rate_limiter.terms import Amount, Hold, Limits
from forebay import bounds
from forebay.call import Call
from forebay.errors import BudgetExceeded, PermissionDenied, RequestTooLarge
from forebay.providers.base import Provider
from forebay.providers.prices import PriceBound, Rate
from forebay.reckoning import Quotas, Reckoner
from forebay.routing import Deployment, Group

MONEY = Limits(day_nano=10**9)
TOKENS = Limits(tokens_per_minute=60_000)
LONG = "x" * 5000


def price(nano: int) -> PriceBound:
    rate = Rate(Decimal(nano), Decimal(nano))
    return PriceBound(rate, rate)


def deployment(model: str, **details: Any) -> Deployment:
    return Deployment(model, "g", model, "openai", **details)


def group(*models: str) -> Group:
    return Group("g", "g", "chat", tuple(map(deployment, models)))


def call(text: str = "hello", **params: Any) -> Call:
    return Call("chat", {"messages": [{"role": "user", "content": text}], **params}, "acme", "r")


class Listed:
    """A provider as far as reckoning goes: prices and token counts by model.

    Those in `after_warm` are known only once it is warm.
    """

    def __init__(
        self,
        prices: dict[str, PriceBound] | None = None,
        after_warm: dict[str, PriceBound] | None = None,
        tokens: dict[str, int] | None = None,
    ) -> None:
        self.warmed = 0
        self._prices = dict(prices or {})
        self._after_warm = after_warm or {}
        self._tokens = tokens or {}

    def price_bound(self, deployment: Deployment) -> PriceBound | None:
        return self._prices.get(deployment.model)

    def count_tokens(self, deployment: Deployment, text: str) -> int | None:
        return self._tokens.get(deployment.model)

    async def warm(self) -> None:
        self.warmed += 1
        self._prices |= self._after_warm


def reckoner(
    provider: Listed, fallbacks: Callable[[str], list[Deployment]] = lambda _: []
) -> Reckoner:
    return Reckoner(cast(Provider, provider), fallbacks)


class TestPrices:
    async def test_the_dearest_of_all_that_may_answer_counts(self) -> None:
        provider = Listed({"a": price(1), "b": price(5), "c": price(9)})
        here = reckoner(provider, lambda _: [deployment("c")])
        found = await here.of(call(max_tokens=10), group("a", "b"), MONEY)
        assert found.nano == 9 * found.tokens
        assert provider.warmed == 0

    async def test_litellms_list_is_waited_for_when_a_price_is_missing(self) -> None:
        provider = Listed({"a": price(1)}, after_warm={"b": price(5)})
        found = await reckoner(provider).of(call(max_tokens=10), group("a", "b"), MONEY)
        assert (found.nano, provider.warmed) == (5 * found.tokens, 1)

    async def test_a_price_that_nobody_knows_is_not_spent_from_a_budget(self) -> None:
        with pytest.raises(PermissionDenied, match="input_cost_per_token") as caught:
            await reckoner(Listed({"a": price(1)})).of(call(), group("a", "b"), MONEY)
        assert (caught.value.code, caught.value.status) == ("price_unknown", 403)

    async def test_without_a_limit_of_money_no_price_is_asked_for(self) -> None:
        provider = Listed()
        found = await reckoner(provider).of(call(max_tokens=10), group("a"), TOKENS)
        assert (found.nano, provider.warmed) == (None, 0)

    async def test_what_never_fits_is_refused(self) -> None:
        here = reckoner(Listed({"a": price(10**9)}))
        with pytest.raises(BudgetExceeded):
            await here.of(call(), group("a"), MONEY)
        with pytest.raises(RequestTooLarge):
            await here.of(call(), group("a"), Limits(tokens_per_minute=1))


class TestTokens:
    async def test_the_tokenizer_that_makes_most_of_a_long_text_counts(self) -> None:
        short = (await reckoner(Listed()).of(call("", max_tokens=1), group("a"), TOKENS)).prompt
        provider = Listed(tokens={"a": 1000, "b": 2000, "c": 3000})
        here = reckoner(provider, lambda _: [deployment("c")])
        found = await here.of(call(LONG, max_tokens=1), group("a", "b"), TOKENS)
        assert found.prompt == short + 3000

    async def test_where_one_has_no_tokenizer_the_bytes_count(self) -> None:
        here = reckoner(Listed(tokens={"a": 1000}))
        found = await here.of(call(LONG, max_tokens=1), group("a", "b"), TOKENS)
        assert found.prompt > len(LONG)

    async def test_an_image_counts_as_the_dearest_of_all_that_may_answer(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "https://h/x.png"}}
        asked = Call("chat", {"messages": [{"role": "user", "content": [image]}]}, "acme", "r")
        for models, fallback in ((("a", "gpt-4o-mini"), "b"), (("a",), "gpt-4o-mini")):
            here = reckoner(Listed(), lambda _, name=fallback: [deployment(name)])
            found = await here.of(asked, group(*models), TOKENS)
            assert found.prompt > bounds.IMAGE_TOKENS_4O_MINI

    async def test_what_came_is_learnt_for_tenant_and_group(self) -> None:
        here, limits = reckoner(Listed()), Limits(tokens_per_minute=10**6)
        for _ in range(20):
            here.learn(call(n=2), group("a"), {"completion_tokens": 2000}, cut=False)
        assert (await here.of(call(), group("a"), limits)).completion == 2000

    async def test_an_answer_without_usage_teaches_nothing(self) -> None:
        here = reckoner(Listed())
        for usage in (None, {}, {"completion_tokens": 0}):
            here.learn(call(), group("a"), usage, cut=True)
        found = await here.of(call(), group("a"), TOKENS)
        assert found.completion == bounds.FIRST_GUESS

    def test_an_attempt_without_a_limit_is_an_estimate_that_clamps_nothing(self) -> None:
        found = reckoner(Listed()).of_attempt(call(), group("a"))
        assert (found.clamp, found.completion) == (None, bounds.FIRST_GUESS)

    def test_one_that_reasons_has_room_for_it_wherever_it_stands(self) -> None:
        found = reckoner(Listed()).of_attempt(call(), group("openai/a", "openai/o3"))
        assert found.completion == bounds.FIRST_GUESS_REASONING


class Admitting:
    """A limiter that admits everything and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Limits, Amount]] = []

    async def admit(self, tenant: str, limits: Limits, amount: Amount) -> Hold:
        self.asked.append((tenant, limits, amount))
        return Hold(tenant, len(self.asked), amount)


class TestQuotas:
    def quotas(self, limiter: Admitting) -> Quotas:
        return Quotas(cast(RateLimiterDesk, limiter), reckoner(Listed()), 5)

    async def take(self, limiter: Admitting, here: Deployment, **params: Any) -> Hold | None:
        hold = await self.quotas(limiter).take_call(here, call(**params), group("a"), None)
        assert hold is None or isinstance(hold, Hold)
        return hold

    async def test_a_deployment_without_limits_asks_nobody(self) -> None:
        limiter = Admitting()
        assert await self.take(limiter, deployment("a")) is None
        assert await self.quotas(limiter).take_texts(deployment("a"), ["x"]) is None
        assert limiter.asked == []

    async def test_leave_is_for_calls_that_can_go_out_at_once(self) -> None:
        """LiteLLM's import would gather what was allowed one by one."""
        provider = Listed()
        warm_by_then: list[int] = []

        class Watching(Admitting):
            async def admit(self, tenant: str, limits: Limits, amount: Amount) -> Hold:
                warm_by_then.append(provider.warmed)
                return await super().admit(tenant, limits, amount)

        quotas = Quotas(cast(RateLimiterDesk, Watching()), reckoner(provider), 5)
        await quotas.take_texts(deployment("a", rpm=60), ["x"])
        await quotas.take_call(deployment("a", rpm=60), call(), group("a"), None)
        assert warm_by_then == [1, 1]

    async def test_requests_alone_reserve_no_tokens(self) -> None:
        limiter = Admitting()
        await self.take(limiter, deployment("a", rpm=60))
        ((name, limits, amount),) = limiter.asked
        assert (name, amount, limits.version) == ("deployment/a", Amount(), 5)
        assert limits.hard_minute

    async def test_tokens_are_those_of_the_request_or_all_that_there_can_be(self) -> None:
        limiter = Admitting()
        await self.take(limiter, deployment("a", tpm=60_000), max_tokens=100)
        await self.take(limiter, deployment("a", tpm=600), max_tokens=10_000)
        small, all_of_it = (amount.tokens for _, _, amount in limiter.asked)
        assert 100 < small < 300
        assert all_of_it == 500

    async def test_the_tenants_bound_is_taken_where_there_is_one(self) -> None:
        limiter = Admitting()
        bound = bounds.bound("chat", call(max_tokens=7).body, TOKENS, 1)
        here = deployment("a", tpm=60_000)
        await self.quotas(limiter).take_call(here, call(max_tokens=999), group("a"), bound)
        assert limiter.asked[0][2] == Amount(bound.tokens)

    @pytest.mark.parametrize(("texts", "most"), [(["x" * 100], 300), (["x" * 9000], 500)])
    async def test_texts_count_with_their_bytes(self, texts: Sequence[str], most: int) -> None:
        limiter = Admitting()
        await self.quotas(limiter).take_texts(deployment("a", tpm=600), texts)
        assert 100 <= limiter.asked[0][2].tokens <= most

    async def test_a_patterns_deployments_share_one_limit(self) -> None:
        limiter = Admitting()
        for name in ("openai/x", "openai/y"):
            here = Deployment(f"d:{name}", name, name, "openai", rpm=60, filled_from="d")
            await self.take(limiter, here)
        assert {name for name, _, _ in limiter.asked} == {"deployment/d"}
