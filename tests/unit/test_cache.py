"""What operators see of the response cache and take out of it, over a whole system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.ref import OwnerUnavailable
from deployments.gateway import PipelineService
from forebay import cache
from forebay.config import CacheConfig, GatewayConfig
from forebay.errors import InvalidRequest, ModelNotFound, Overloaded
from forebay.gateway import LiteLLMGateway
from forebay.reckoning import Reckoner
from tests.support.house import Scripted

LIMIT = {"requests_per_minute": 1000}


def opened(tmp_path: Path, **more: Any) -> LiteLLMGateway:
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", "api_key": "k"}}
        for name in ("m", "n")
    ]
    tenants = [{"id": tenant, "limits": LIMIT} for tenant in ("a", "b")]
    given = {"enable_caching": True, "tenants": tenants, **more}
    gateway = LiteLLMGateway(GatewayConfig(model_list=models, **given), runtime="inline")
    system = gateway._system
    system.provider = provider = Scripted()
    system.bounds = Reckoner(provider, system._candidates)
    return gateway


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[LiteLLMGateway]:
    with opened(tmp_path) as made:
        yield made


async def away(*named: Any) -> int:
    raise OwnerUnavailable("cache", "it died")


class Away:
    name = "cache"

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        raise OwnerUnavailable("cache", "it died")


def asked(gateway: LiteLLMGateway) -> int:
    """How often a provider was."""
    provider: Any = gateway._system.provider
    return len(provider.asked)


def fill(gateway: LiteLLMGateway) -> None:
    for tenant in ("a", "b"):
        for model in ("m", "n"):
            gateway.generate("hi", model, tenant_id=tenant)
    assert asked(gateway) == 4
    assert gateway.cache.stats()["entries"] == 4


def again(gateway: LiteLLMGateway) -> set[str]:
    """Tenant and model of what was not in the cache any more."""
    gone = set()
    for tenant in ("a", "b"):
        for model in ("m", "n"):
            if not gateway.generate("hi", model, tenant_id=tenant).cached:
                gone.add(tenant + model)
    return gone


class TestInvalidation:
    @pytest.mark.parametrize(
        ("named", "gone"),
        [
            ({"tenant": "a"}, {"am", "an"}),
            ({"model": "m"}, {"am", "bm"}),
            ({"tenant": "a", "model": "m"}, {"am"}),
        ],
    )
    def test_by_tenant_by_model_and_by_both(
        self, gateway: LiteLLMGateway, named: dict[str, str], gone: set[str]
    ) -> None:
        fill(gateway)
        assert gateway.cache.invalidate(**named) == len(gone)
        assert again(gateway) == gone

    def test_by_the_key_of_one_request(self, gateway: LiteLLMGateway) -> None:
        fill(gateway)
        key = gateway.cache.key("hi", "m", tenant_id="a")
        assert gateway.cache.invalidate(tenant="b", key=key) == 0
        assert gateway.cache.invalidate(model="n", key=key) == 0
        assert gateway.cache.invalidate(key=key) == 1
        assert again(gateway) == {"am"}
        assert key != gateway.cache.key("hi", "m", tenant_id="a", temperature=0.5)
        with pytest.raises(InvalidRequest, match="unknown tenant"):
            gateway.cache.key("hi", "m", tenant_id="nobody")

    def test_everything(self, gateway: LiteLLMGateway) -> None:
        fill(gateway)
        assert gateway.cache.clear() == 4
        assert gateway.cache.clear() == 0
        assert again(gateway) == {"am", "an", "bm", "bn"}

    async def test_from_a_loop(self, gateway: LiteLLMGateway) -> None:
        fill(gateway)
        assert await gateway.cache.invalidate_async(tenant="a") == 2
        assert (await gateway.cache.stats_async())["entries"] == 2
        assert await gateway.cache.clear_async() == 2

    @pytest.mark.parametrize(
        ("named", "error", "param", "status"),
        [
            ({"tenant": "nobody"}, InvalidRequest, "tenant", 404),
            ({"model": "gpt-9"}, ModelNotFound, "model", 404),
            ({"key": "abc"}, InvalidRequest, "key", 400),
            ({"key": "F" * 80}, InvalidRequest, "key", 400),
            ({"key": "0" * 80 + "\n"}, InvalidRequest, "key", 400),
            ({"tenant": ""}, InvalidRequest, "tenant", 404),
            ({"tenant": ["a"]}, InvalidRequest, "tenant", 400),
            ({"model": 1}, InvalidRequest, "model", 400),
            ({"key": b"0" * 80}, InvalidRequest, "key", 400),
            ({}, InvalidRequest, None, 400),
        ],
    )
    def test_a_slip_clears_nothing_and_is_named(
        self,
        gateway: LiteLLMGateway,
        named: dict[str, Any],
        error: type[Exception],
        param: str | None,
        status: int,
    ) -> None:
        fill(gateway)
        with pytest.raises(error) as caught:
            gateway.cache.invalidate(**named)
        told: Any = caught.value
        assert (told.param, told.status) == (param, status)
        assert gateway.cache.stats()["entries"] == 4

    def test_what_everybody_shares_is_no_tenants(self, tmp_path: Path) -> None:
        with opened(tmp_path, cache_config=CacheConfig(scope="shared")) as shared:
            shared.generate("hi", "m", tenant_id="a")
            with pytest.raises(InvalidRequest) as caught:
                shared.cache.invalidate(tenant="a")
            assert (caught.value.code, caught.value.status) == ("cache_is_shared", 409)
            key = shared.cache.key("hi", "m", tenant_id="b")
            assert shared.cache.invalidate(key=key) == 1

    def test_an_owner_that_is_away_is_said(self, gateway: LiteLLMGateway) -> None:
        gateway._system.cache.invalidate = away  # type: ignore[assignment]
        with pytest.raises(Overloaded) as caught:
            gateway.cache.clear()
        assert caught.value.retry_after_s


class TestFigures:
    def test_look_ups_are_those_of_all_processes(self, gateway: LiteLLMGateway) -> None:
        fill(gateway)
        assert again(gateway) == set()
        found = gateway.cache.stats()
        assert (found["hits"], found["misses"], found["joined"]) == (4, 4, 0)
        assert (found["hit_rate"], found["scope"]) == (0.5, "system")
        assert 0 < found["bytes"] < found["max_bytes"]
        assert (found["redis"], found["away"]) == (None, 0)
        owner: Any = gateway._system._refs["cache"]
        owner.owner.tally("another", 1, {"cache": (10, 0, 2)})
        found = gateway.cache.stats()
        assert (found["hits"], found["joined"]) == (14, 2)
        assert found["hit_rate"] == 16 / 20

    def test_what_is_with_the_holder_of_a_lease_is_in_the_cache(
        self, gateway: LiteLLMGateway
    ) -> None:
        fill(gateway)
        gateway._system.cache.held = lambda: (3, 1000, 2)  # type: ignore[method-assign]
        found = gateway.cache.stats()
        assert (found["entries"], found["evicted"]) == (7, 2)
        assert found["bytes"] > 1000
        gateway.run(gateway._system.measure())
        assert "forebay_cache_entries 7.0" in gateway._system.metrics().decode()

    def test_without_the_owner_they_are_this_processs(self, gateway: LiteLLMGateway) -> None:
        fill(gateway)
        gateway._system._refs["cache"] = Away()  # type: ignore[assignment]
        gateway._system.tallies._ref = Away()  # type: ignore[assignment]
        found = gateway.cache.stats()
        assert (found["misses"], found["scope"], found["away"]) == (4, "process", 1)
        assert gateway.kv_cache.get_cache_stats()["scope"] == "process"

    def test_where_it_is_off_there_is_none(self, tmp_path: Path) -> None:
        with opened(tmp_path, enable_caching=False) as made:
            assert made.cache is None

    def test_the_prefix_caches_figures_are_those_of_all_processes(
        self, gateway: LiteLLMGateway
    ) -> None:
        provider: Any = gateway._system.provider
        details = {"cached_tokens": 6}
        provider.usage = {
            "prompt_tokens": 10,
            "completion_tokens": 1,
            "prompt_tokens_details": details,
        }
        gateway.generate("hi", "m", tenant_id="a")
        numbers = (1, 1, 100, 50, 0, 9, 0, 0)
        owner: Any = gateway._system._refs["cache"]
        owner.owner.tally("another", 1, {"all": numbers, "tenant a": numbers, "model m": numbers})
        found = gateway.kv_cache.get_cache_stats()
        assert (found["requests"], found["cached_tokens"], found["scope"]) == (2, 56, "system")
        assert gateway.kv_cache.get_cache_stats("a")["prompt_tokens"] == 110
        assert gateway.kv_cache.get_cache_stats("b")["prompt_tokens"] == 0
        assert gateway.kv_cache.stats()["cached_tokens"] == 6


class TestOverHttp:
    async def test_an_admin_sees_and_clears_it(self, gateway: LiteLLMGateway) -> None:
        fill(gateway)
        service = PipelineService(gateway._system, b"s" * 32, "127.0.0.1")
        told = await gateway._loop.hand_over(service.cache())
        assert told["responses"]["entries"] == 4
        assert told["prompts"]["requests"] == 4
        clearing = service.clear_cache(tenant="a", model="m", key=None)
        assert await gateway._loop.hand_over(clearing) == 1
        clearing = service.clear_cache(tenant=None, model=None, key=None)
        assert await gateway._loop.hand_over(clearing) == 3
        with pytest.raises(InvalidRequest):
            await gateway._loop.hand_over(cache.invalidate(gateway._system, tenant="nobody"))
