"""What the class's first document shows, done with `forebay` and models that exist."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from forebay import CacheConfig, GatewayConfig, LiteLLMGateway
from forebay.rate_limiter import RateLimitConfig
from tests.support.upstream import Upstream


def models(url: str) -> list[dict[str, object]]:
    params = {"api_base": f"{url}/v1", "api_key": "sk-of-the-example"}
    claude = {"model": "anthropic/claude-3-opus", "api_base": url, "api_key": "sk-of-another"}
    return [
        {"model_name": "gpt-4", "litellm_params": {"model": "openai/gpt-4", **params}},
        {"model_name": "claude-3", "litellm_params": claude},
        {"model_name": "gpt-3.5-turbo", "litellm_params": {"model": "openai/gpt-3.5", **params}},
        {
            "model_name": "text-embedding-ada-002",
            "litellm_params": {"model": "openai/text-embedding-ada-002", **params},
        },
    ]


@pytest.fixture(scope="module")
def gateway(upstream: Upstream) -> Iterator[LiteLLMGateway]:
    config = GatewayConfig(
        model_list=models(upstream.url), fallbacks=["gpt-3.5-turbo"], timeout=120.0, max_retries=5
    )
    with LiteLLMGateway(config=config, runtime="inline") as made:
        yield made


def test_text_sync_and_async(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    response = gateway.generate(
        prompt="Explain quantum computing", model="gpt-4", temperature=0.7, max_tokens=500
    )
    later = asyncio.run(gateway.generate_async(prompt="Explain it again", model="claude-3"))

    assert response.text
    assert later.text


async def test_a_story_streams(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    story = [piece async for piece in gateway.generate_stream(prompt="A story", model="gpt-4")]

    assert len(story) > 1


async def test_one_vector_and_several(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    one = await gateway.embed_async(text="A sample", model="text-embedding-ada-002")
    several = await gateway.embed_async(text=["1", "2", "3"], model="text-embedding-ada-002")

    assert len(one.embeddings[0]) == len(several.embeddings[2])
    assert len(several.embeddings) == 3


async def test_a_second_question_is_answered_from_the_cache(upstream: Upstream) -> None:
    config = GatewayConfig(
        model_list=models(upstream.url),
        enable_caching=True,
        cache_ttl=3600,
        cache_config=CacheConfig(backend="memory"),
    )
    async with LiteLLMGateway(config=config, runtime="inline") as gateway:
        first = await gateway.generate_async("What is AI?")
        second = await gateway.generate_async("What is AI?")

    assert not first.cached
    assert second.cached
    assert second.text == first.text
    assert second.cost_usd == 0
    assert len(upstream.log()) == 1


async def test_limits_are_per_tenant(upstream: Upstream) -> None:
    from forebay import errors

    config = GatewayConfig(
        model_list=models(upstream.url),
        enable_rate_limiting=True,
        rate_limit_config=RateLimitConfig(
            requests_per_minute=60, requests_per_hour=1000, burst_size=2, enable_queuing=False
        ),
    )
    async with LiteLLMGateway(config=config, runtime="inline") as gateway:
        for number in range(2):
            await gateway.generate_async(prompt=f"Hello {number}", tenant_id="tenant_123")
        with pytest.raises(errors.RateLimitError) as caught:
            await gateway.generate_async(prompt="Hello again", tenant_id="tenant_123")
        await gateway.generate_async(prompt="Hello", tenant_id="tenant_456")

    assert 0 < (caught.value.retry_after_s or 0) <= 1.1


def test_health_and_usage(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    gateway.generate("Count me", model="gpt-4", tenant_id="tenant_123")
    health = gateway.check_health()
    stats = gateway.get_usage_stats(tenant_id="tenant_123")

    assert health.status == "healthy", health.details
    assert stats["total_requests"] == 1
    assert f"${stats['total_cost']:.2f}"


def test_health_is_unknown_where_monitoring_is_off(upstream: Upstream) -> None:
    config = GatewayConfig(model_list=models(upstream.url), enable_health_monitoring=False)
    with LiteLLMGateway(config=config, runtime="inline") as gateway:
        assert gateway.check_health().status == "unknown"
