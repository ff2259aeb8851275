"""LiteLLM's own word on prompt caches: what it sends of our hints, its prices, its minima."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import pytest

from forebay import prefixes
from forebay.kv_cache import KVCacheManager
from forebay.prefixes import TOOLS, Place
from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels
from forebay.providers.prices import PromptCaching
from forebay.providers.shapes import plain_usage
from forebay.routing import Deployment

CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
BODY: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "system", "content": "instructions"},
        {"role": "user", "content": [{"type": "text", "text": "paper"}]},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "1", "content": "result"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "next"},
    ],
}
PLACES = [TOOLS, Place(0), Place(1, 0), Place(3), Place(4), Place(5)]
SONNET = "anthropic.claude-sonnet-4-5-20250929-v1:0"
MARKED = [
    ("anthropic", "claude-sonnet-4-5"),
    ("bedrock", SONNET),
    ("bedrock", f"invoke/{SONNET}"),
    ("vertex_ai", "claude-sonnet-4-5@20250929"),
    ("azure_ai", "claude-sonnet-4-5"),
]


@pytest.fixture(scope="module")
def provider() -> LiteLLMProvider:
    made = LiteLLMProvider(InProcessModels(), {})
    asyncio.run(made.warm())
    return made


@pytest.fixture(scope="module")
def litellm(provider: LiteLLMProvider) -> Any:
    return provider._litellm


def deployment(model: str, **info: Any) -> Deployment:
    return Deployment(f"{model} {info}", "g", model, model.split("/")[0], info=info)


def optional(litellm: Any, provider: str, model: str, **given: Any) -> dict[str, Any]:
    found: dict[str, Any] = litellm.utils.get_optional_params(
        model=model, custom_llm_provider=provider, max_tokens=9, **given
    )
    return found


class TestWhatIsSent:
    @pytest.mark.parametrize(("provider_name", "model"), MARKED)
    def test_every_claude_gets_a_mark_at_each_place(
        self, litellm: Any, provider: LiteLLMProvider, provider_name: str, model: str
    ) -> None:
        body = copy.deepcopy(prefixes.marked(BODY, PLACES))
        config = litellm.utils.ProviderConfigManager.get_provider_chat_config(
            model=model, provider=litellm.LlmProviders(provider_name)
        )
        sent = config.transform_request(
            model=model,
            messages=body["messages"],
            optional_params=optional(litellm, provider_name, model, tools=body["tools"]),
            litellm_params={},
            headers={},
        )
        text = json.dumps(sent)
        assert text.count("ephemeral") + text.count("cachePoint") == len(PLACES)
        assert provider.prompt_caching(deployment(f"{provider_name}/{model}")) == (True, 1024)

    def test_the_key_is_handed_on_by_those_that_we_give_one(self, litellm: Any) -> None:
        for name in ("openai", "azure"):
            for model in ("gpt-4o", "o3-mini", "gpt-5", "one-of-my-own"):
                sent = optional(litellm, name, model, prompt_cache_key="k")
                assert sent["prompt_cache_key"] == "k"


class TestWhatTheListSays:
    @pytest.mark.parametrize(
        ("model", "pays", "tokens_min"),
        [
            ("openai/gpt-4o", True, 1024),
            ("openai/gpt-4", False, 1024),
            ("openai/sim", None, 1024),
            ("anthropic/claude-haiku-4-5", True, 4096),
            ("bedrock/anthropic.claude-3-5-haiku-20241022-v1:0", True, 2048),
            ("bedrock/anthropic.claude-3-5-sonnet-20240620-v1:0", False, 1024),
        ],
    )
    def test_who_caches_and_from_how_many_tokens(
        self, provider: LiteLLMProvider, model: str, pays: bool | None, tokens_min: int
    ) -> None:
        assert provider.prompt_caching(deployment(model)) == PromptCaching(pays, tokens_min)

    def test_a_deployments_base_model_is_asked_for(self, provider: LiteLLMProvider) -> None:
        here = deployment("azure/my-deployment", base_model="azure/gpt-4o")
        assert provider.prompt_caching(here) == PromptCaching(True, 1024)

    def test_before_it_is_there_nothing_is_known(self) -> None:
        cold = LiteLLMProvider(InProcessModels(), {})
        assert cold.prompt_caching(deployment("openai/gpt-4o")) is None


def reported(litellm: Any, model: str, usage: Any) -> Any:
    return litellm.ModelResponse(model=model, usage=usage)


def anthropic_usage(read: int, written: int, an_hour: int = 0) -> Any:
    from litellm.llms.anthropic.chat.transformation import AnthropicConfig

    told = {
        "input_tokens": 10,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
        "output_tokens": 7,
        "cache_creation": {
            "ephemeral_5m_input_tokens": written - an_hour,
            "ephemeral_1h_input_tokens": an_hour,
        },
    }
    return AnthropicConfig().calculate_usage(usage_object=told, reasoning_content=None)


class TestMoney:
    """claude-sonnet-4-5: 3 USD a million, read 0.30, written 3.75 (for an hour 6), answered 15."""

    @pytest.mark.parametrize(
        ("read", "written", "an_hour"), [(3000, 500, 0), (3000, 0, 0), (0, 2000, 0), (9, 900, 900)]
    )
    def test_what_is_posted_for_a_cached_prompt_is_litellms_own_price(
        self, litellm: Any, provider: LiteLLMProvider, read: int, written: int, an_hour: int
    ) -> None:
        model = "anthropic/claude-sonnet-4-5"
        usage = anthropic_usage(read, written, an_hour)
        told = plain_usage(usage.model_dump())
        whole = litellm.completion_cost(
            completion_response=reported(litellm, model, usage), model=model
        )
        expected = 10 * 3000 + read * 300 + (written - an_hour) * 3750 + an_hour * 6000 + 7 * 15000
        assert provider.price(deployment(model), told) == expected
        assert round(whole * 1e9) == expected

    @pytest.mark.parametrize("text_tokens", [None, 976])
    def test_openais_cached_tokens_are_half_the_price(
        self, litellm: Any, provider: LiteLLMProvider, text_tokens: int | None
    ) -> None:
        details = {"cached_tokens": 1024, "text_tokens": text_tokens}
        usage = litellm.Usage(
            prompt_tokens=2000, completion_tokens=5, prompt_tokens_details=details
        )
        told = plain_usage(usage.model_dump())
        expected = 976 * 2500 + 1024 * 1250 + 5 * 10000
        assert provider.price(deployment("openai/gpt-4o"), told) == expected
        whole = litellm.completion_cost(
            completion_response=reported(litellm, "gpt-4o", usage), model="openai/gpt-4o"
        )
        assert round(whole * 1e9) == expected

    @pytest.mark.parametrize(
        ("read", "written", "saved"),
        [
            (3000, 0, 3000 * 2700),
            (0, 500, -500 * 750),
            (3000, 500, 3000 * 2700 - 500 * 750),
            (0, 0, 0),
        ],
    )
    def test_what_is_saved_is_the_usual_price_less_the_one_that_was_paid(
        self, provider: LiteLLMProvider, read: int, written: int, saved: int
    ) -> None:
        kv_cache = KVCacheManager(price_of=provider.price)
        told = plain_usage(anthropic_usage(read, written).model_dump())
        use = kv_cache.learn("acme", deployment("anthropic/claude-sonnet-4-5"), told)
        assert use == (read, written, saved)
        assert kv_cache.stats()["saved_usd"] == pytest.approx(saved / 1e9)

    @pytest.mark.parametrize(
        ("read", "written", "an_hour"), [(3000, 900, 900), (300_000, 0, 0), (210_000, 40_000, 0)]
    )
    def test_so_it_is_of_what_is_kept_for_an_hour_and_of_long_prompts(
        self, provider: LiteLLMProvider, read: int, written: int, an_hour: int
    ) -> None:
        here = deployment("anthropic/claude-sonnet-4-5")
        kv_cache = KVCacheManager(price_of=provider.price)
        told = plain_usage(anthropic_usage(read, written, an_hour).model_dump())
        plain = {name: told[name] for name in ("prompt_tokens", "completion_tokens")}
        usual, paid = provider.price(here, plain), provider.price(here, told)
        assert usual is not None
        assert paid is not None
        assert kv_cache.learn("acme", here, told) == (read, written, usual - paid)

    def test_a_vllm_that_costs_nothing_more_saves_what_its_owner_says(
        self, provider: LiteLLMProvider
    ) -> None:
        kv_cache = KVCacheManager(price_of=provider.price)
        told = {
            "prompt_tokens": 1000,
            "completion_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": 600},
        }
        prices = {"input_cost_per_token": 10e-9, "output_cost_per_token": 0}
        here = deployment("hosted_vllm/m")
        assert kv_cache.learn("acme", here, told) == (600, 0, None)
        here = deployment("hosted_vllm/m", **prices)
        assert kv_cache.learn("acme", here, told) == (600, 0, 0)
        here = deployment("hosted_vllm/m", **prices, cache_read_input_token_cost=1e-9)
        assert kv_cache.learn("acme", here, told) == (600, 0, 5400)
