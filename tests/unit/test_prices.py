"""What calls cost, and that none costs more than the bound said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels
from forebay.providers.prices import (
    CACHE_READ,
    CACHE_WRITE,
    INPUT,
    LONG_PROMPT_TOKENS,
    OUTPUT,
    PriceBound,
    Prices,
    Rate,
    dearest,
    text_only,
    version_of,
)
from forebay.providers.tokenizers import NEWER, OLDER, Tokenizers
from forebay.routing import Deployment


def deployment(model: str = "openai/m", info: Any = None, **params: Any) -> Deployment:
    return Deployment("d", "g", model, model.partition("/")[0], params, info=info or {})


def usage(prompt: int, completion: int, read: int = 0, written: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": read},
        "cache_creation_input_tokens": written,
    }


def rate(prompt: int, completion: int) -> Rate:
    return Rate(Decimal(prompt), Decimal(completion))


counts = st.integers(0, 10**6)
usd = st.decimals(0, 1, places=12)
own_prices = st.fixed_dictionaries(
    {INPUT: usd, OUTPUT: usd}, optional={CACHE_READ: usd, CACHE_WRITE: usd}
)


class ListedPrices:
    """LiteLLM, as far as prices go: USD per million tokens; dearer above 200,000."""

    def __init__(self, models: Mapping[str, tuple[float, float]]) -> None:
        self.asked = 0
        self.Usage = lambda **given: SimpleNamespace(**given)
        self.cost_calculator = self
        self._models = models

    def cost_per_token(
        self, *, model: str, prompt_tokens: int, completion_tokens: int, usage_object: Any
    ) -> tuple[float, float]:
        self.asked += 1
        prompt_usd, completion_usd = self._models[model]  # KeyError: not mapped
        factor = 2 if prompt_tokens > 200_000 else 1
        written = getattr(usage_object, "cache_creation_input_tokens", 0)
        prompt = prompt_tokens + 0.25 * written
        return (
            factor * prompt * prompt_usd / 1e6,
            factor * completion_tokens * completion_usd / 1e6,
        )


class TestOwn:
    @given(own_prices, counts, counts, counts, counts, st.data())
    def test_no_usage_within_the_bound_costs_more(
        self,
        own: dict[str, Decimal],
        prompt: int,
        completion: int,
        read: int,
        written: int,
        data: st.DataObject,
    ) -> None:
        prices, here = Prices(), deployment(**own)
        bound = prices.bound(here)
        assert bound is not None
        most = bound.rate(prompt, is_plain=True).nano(prompt, completion)
        within = usage(
            data.draw(st.integers(0, prompt)), data.draw(st.integers(0, completion)), read, written
        )
        cost = prices.of_usage(here, within)
        assert cost is not None
        assert 0 <= cost <= most

    def test_cached_tokens_have_prices_of_their_own(self) -> None:
        own = {INPUT: 10e-9, OUTPUT: 100e-9, CACHE_READ: 1e-9, CACHE_WRITE: 20e-9}
        here = deployment(**own)
        assert Prices().of_usage(here, usage(100, 1, read=50, written=20)) == 300 + 50 + 400 + 100
        assert Prices().bound(here) == PriceBound(rate(20, 100), rate(20, 100))

    def test_no_token_is_both_read_from_a_cache_and_written_into_it(self) -> None:
        here = deployment(**{INPUT: 10e-9, CACHE_READ: 1e-9, CACHE_WRITE: 20e-9})
        assert Prices().of_usage(here, usage(10, 0, read=10, written=10)) == 10

    @pytest.mark.parametrize("given", ["free of charge", "nan", "-1", float("inf")])
    def test_what_is_no_price_is_none(self, given: Any) -> None:
        here = deployment(**{INPUT: given, OUTPUT: 1e-9})
        assert Prices().bound(here) is None
        assert Prices().of_usage(here, usage(1, 1)) is None

    def test_prices_that_are_not_per_token_are_not_known_here(self) -> None:
        assert Prices().bound(deployment(input_cost_per_image=1)) is None

    def test_an_empty_price_is_unknown_and_not_free(self) -> None:
        for here in (deployment(**{INPUT: None}), deployment(info={INPUT: None, OUTPUT: None})):
            assert Prices().bound(here) is None
            assert Prices().of_usage(here, usage(1, 1)) is None

    def test_they_may_be_hidden_or_stand_in_the_info(self) -> None:
        here = deployment(**{INPUT: SecretStr("2e-9")}, info={INPUT: 9e-9, OUTPUT: 5e-9})
        assert Prices().bound(here) == PriceBound(rate(2, 5), rate(2, 5))

    def test_embedded_models_are_free(self) -> None:
        assert Prices().bound(deployment("local/smollm2")) == PriceBound(rate(0, 0), rate(0, 0))


LISTED = {"openai/m": (3.0, 15.0), "openai/cheap": (0.0375, 0.1)}


class TestListed:
    @pytest.mark.parametrize("name", LISTED)
    @given(prompt=counts, completion=counts, written=counts)
    def test_no_usage_within_the_bound_costs_more(
        self, name: str, prompt: int, completion: int, written: int
    ) -> None:
        prices = Prices(ListedPrices(LISTED))
        bound, here = prices.bound(deployment(name)), deployment(name)
        assert bound is not None
        most = bound.rate(prompt, is_plain=True).nano(prompt, completion)
        cost = prices.of_usage(here, usage(prompt, completion, written=min(written, prompt)))
        assert cost is not None
        assert cost <= most

    def test_long_prompts_and_anything_but_text_have_the_dearest_rate(self) -> None:
        bound = Prices(ListedPrices(LISTED)).bound(deployment())
        assert bound is not None
        assert bound.plain == Rate(Decimal(3750), Decimal(15_000))
        assert bound.dearest == Rate(Decimal(7500), Decimal(30_000))
        assert bound.rate(LONG_PROMPT_TOKENS, is_plain=True) == bound.plain
        assert bound.rate(LONG_PROMPT_TOKENS + 1, is_plain=True) == bound.dearest
        assert bound.rate(1, is_plain=False) == bound.dearest

    def test_a_list_is_asked_once_for_each_name(self) -> None:
        listed = ListedPrices(LISTED)
        prices = Prices(listed)
        prices.bound(deployment())
        asked = listed.asked
        prices.bound(deployment())
        assert listed.asked == asked

    def test_a_model_that_is_not_listed_has_no_bound(self) -> None:
        assert Prices(ListedPrices({})).bound(deployment()) is None

    def test_before_the_list_is_there_nothing_is_known_or_remembered(self) -> None:
        prices = Prices()
        assert prices.bound(deployment()) is None
        prices.litellm = ListedPrices(LISTED)
        assert prices.bound(deployment()) is not None

    def test_the_base_model_is_the_one_that_has_the_price(self) -> None:
        prices = Prices(ListedPrices(LISTED))
        here = deployment("azure/mine", info={"base_model": "openai/m"})
        assert prices.bound(here) == prices.bound(deployment())


class TestRate:
    @given(
        st.builds(Rate, usd, st.decimals(Decimal("0.001"), 10, places=5)),
        st.integers(0, 10**12),
        counts,
    )
    def test_what_money_affords_costs_no_more_than_it(
        self, rate: Rate, nano: int, prompt: int
    ) -> None:
        bought = rate.affords(nano, prompt)
        if bought < 0:
            assert rate.nano(prompt, 0) > nano
        else:
            assert rate.nano(prompt, bought) <= nano
            assert rate.completion * (bought + 1) > nano - rate.nano(prompt, 0)

    def test_a_free_answer_is_as_long_as_it_likes(self) -> None:
        assert rate(1, 0).affords(10, 10) >= 2**31
        assert rate(1, 0).affords(9, 10) == -1

    def test_the_dearest_of_several_is_exceeded_by_none(self) -> None:
        cheap, dear = PriceBound(rate(1, 9), rate(2, 9)), PriceBound(rate(5, 1), rate(6, 1))
        assert dearest([cheap, None, dear]) == PriceBound(rate(5, 9), rate(6, 9))
        assert dearest([None]) is None
        assert dearest([]) is None


class Encoding:
    """A tokenizer that makes a token of every so many letters."""

    def __init__(self, letters: int) -> None:
        self._letters = letters

    def encode_ordinary(self, text: str) -> list[int]:
        return [0] * -(-len(text) // self._letters)


class TestTokenizers:
    def test_a_model_of_openais_has_an_encoding_by_its_name(self) -> None:
        both = Tokenizers({NEWER: Encoding(10), OLDER: Encoding(5)})
        text = "x" * 100
        for model, tokens in (
            ("openai/gpt-4o-mini", 10),
            ("openai/o3", 10),
            ("openai/ft:gpt-4o:acme", 10),
            ("openai/gpt-4-turbo", 20),
            ("openai/text-embedding-3-small", 20),
        ):
            assert both.count(deployment(model), text) == tokens, model
        assert both.count(deployment("azure/x", info={"base_model": "azure/gpt-4"}), text) == 20

    def test_other_models_have_room_and_their_bytes_beyond_ascii(self) -> None:
        newer = Tokenizers({NEWER: Encoding(10)})
        claude = deployment("anthropic/claude-haiku-4-5")
        assert newer.count(claude, "x" * 100) == 16
        assert newer.count(claude, "x" * 96 + "ä" * 4) == 16 + 8
        assert newer.count(claude, "ä" * 100) == 200, "never more than there are bytes"
        assert newer.count(claude, "\ud800" * 2) == 6

    def test_without_an_encoding_there_is_no_count(self) -> None:
        assert Tokenizers({}).count(deployment("anthropic/claude"), "x") is None
        assert Tokenizers({NEWER: Encoding(1)}).count(deployment("openai/gpt-4"), "x") is None


class TestVersions:
    """Which prices an entry was made with."""

    def test_own_prices_have_a_version_that_changes_when_they_do(self) -> None:
        prices = Prices()
        told = prices.version(deployment(**{INPUT: 0.1, OUTPUT: 2}))
        assert told.startswith("own:")
        assert prices.version(deployment(**{OUTPUT: "2.0", INPUT: SecretStr("0.10")})) == told
        assert prices.version(deployment(**{INPUT: 0.1, OUTPUT: 3})) != told
        assert prices.version(deployment(**{INPUT: 0.1, "input_cost_per_second": 1})) == ""

    def test_lists_price_the_others_once_there_is_one(self) -> None:
        prices, here = Prices(), deployment()
        assert prices.version(here) == ""
        prices.listed_version = "abc"
        assert prices.version(here) == "litellm:abc"
        assert prices.version(deployment("local/m")) == "local"

    def test_it_is_made_once_for_each_deployment(self) -> None:
        prices, here = Prices(listed_version="abc"), deployment()
        assert prices.version(here) is prices.version(here)
        assert prices.version(here) is not prices.version(deployment())


async def test_litellms_own_list_has_a_version() -> None:
    lane = LiteLLMProvider(InProcessModels())
    here = deployment("openai/gpt-4o-mini")
    assert lane.price_version(here) == ""
    await lane.warm()
    assert re.fullmatch("litellm:[0-9a-f]{12}", lane.price_version(here))
    await lane.close()


@pytest.mark.parametrize(
    "model",
    ["openai/gpt-4o-mini", "anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-pro", "openai/o3"],
)
async def test_litellms_own_list_is_within_its_bound(model: str) -> None:
    lane = LiteLLMProvider(InProcessModels())
    await lane.warm()
    here = deployment(model)
    bound = lane.price_bound(here)
    assert bound is not None
    for prompt in (1, 50_000, LONG_PROMPT_TOKENS, LONG_PROMPT_TOKENS + 1, 300_000):
        for read, written in ((0, 0), (prompt, 0), (0, prompt), (prompt // 2, prompt // 2)):
            cost = lane.price(here, usage(prompt, 777, read, written))
            assert cost is not None
            assert 0 < cost <= bound.rate(prompt, is_plain=True).nano(prompt, 777)
    await lane.close()


class TestSumsMadeHere:
    """A usage of nothing but text is priced without LiteLLM, and to the same nano-USD."""

    @pytest.mark.parametrize(
        "model",
        [
            *("openai/gpt-4o-mini", "openai/o3", "groq/llama-3.1-8b-instant", "azure/gpt-4o"),
            *("mistral/mistral-small-latest", "deepseek/deepseek-chat", "openai/gpt-4.1-nano"),
        ],
    )
    @pytest.mark.parametrize("prompt", [1, 17, 1_001, 99_999, 100_001, 300_000])
    async def test_they_are_litellms_own(self, model: str, prompt: int) -> None:
        lane = LiteLLMProvider(InProcessModels())
        await lane.warm()
        asked = Prices(lane.module)
        for cached in (0, prompt // 3, prompt):
            for completion, thought in ((0, 0), (7, 0), (4_001, 1_000)):
                usage = {
                    "prompt_tokens": prompt,
                    "completion_tokens": completion,
                    "total_tokens": prompt + completion,
                    "prompt_tokens_details": {"cached_tokens": cached},
                    "completion_tokens_details": {"reasoning_tokens": thought},
                }
                told = Deployment(id="d", group="g", model=model, provider=model.partition("/")[0])
                assert asked.of_usage(told, usage) == asked._from_list(model, usage)

    async def test_they_are_of_the_list_that_the_version_names(self) -> None:
        lane, here = LiteLLMProvider(InProcessModels()), deployment("openai/gpt-4o-mini")
        await lane.warm()
        assert lane.price(here, {"prompt_tokens": 3, "completion_tokens": 2}) == 1_650
        assert lane.price_version(here) == f"litellm:{version_of(lane.module.model_cost)}"
        await lane.close()

    @pytest.mark.parametrize(
        ("usage", "counts"),
        [
            ({"prompt_tokens": 3, "completion_tokens": 2}, (3, 0, 2)),
            ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}, (3, 2, 0)),
            ({"prompt_tokens": 3, "prompt_tokens_details": {"audio_tokens": 2}}, None),
            ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}, None),
            ({"prompt_tokens": 3, "completion_tokens_details": {"audio_tokens": 1}}, None),
            ({"prompt_tokens": 3, "cache_creation_input_tokens": 1}, None),
            ({"prompt_tokens": 3, "prompt_cache_hit_tokens": 2}, None),
            ({"prompt_tokens": 3, "asked_service_tier": "flex"}, None),
            ({"prompt_tokens": 3.5}, None),
            ({"prompt_tokens": 100_001}, None),
            ({"prompt_tokens": 3, "queue_time": 0.1}, (3, 0, 0)),
        ],
    )
    def test_what_is_more_than_text_is_litellms(
        self, usage: dict[str, Any], counts: tuple[int, int, int] | None
    ) -> None:
        assert text_only(usage) == counts
