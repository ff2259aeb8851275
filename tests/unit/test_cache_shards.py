from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.cache.owner import Cache
from actors.cache.policy import Scope
from forebay.config import ServerConfig, SystemConfig
from forebay.errors import ConfigurationError
from forebay.system import Boot, open_inline, owners

ENTRY = {"model_name": "a", "litellm_params": {"model": "openai/a", "api_key": "sk-test"}}


def caches(boot: Boot) -> dict[str, Any]:
    return {name: made for name, (cls, made) in owners(boot).items() if cls is Cache}


def test_one_owner_has_no_number_and_several_share_the_bytes() -> None:
    assert list(caches(Boot(cache_bytes_max=900))) == ["cache"]
    three = caches(Boot(cache_bytes_max=900, cache_shards=3))
    assert list(three) == ["cache-0", "cache-1", "cache-2"]
    assert [made["max_bytes"] for made in three.values()] == [300, 300, 300]


@pytest.mark.parametrize("wrong", [0, 65, "many"])
def test_a_number_of_shards_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ServerConfig(cache_shards=wrong)
    assert caught.value.param == "cache_shards"


async def test_a_systems_answers_are_spread_over_its_owners(tmp_path: Any) -> None:
    document = {
        "model_list": [ENTRY],
        "server": {"cache_shards": 3},
        "data_dir": str(tmp_path),
    }
    system = await open_inline(SystemConfig.from_document(document))
    scope = Scope("acme")
    for number in range(60):
        key = number.to_bytes(40, "big")
        lead: Any = await system.cache.lookup(key, scope, read=True, join=True, patience_s=5)
        system.cache.land(lead, key, None, 60.0)
    while system.cache.stats()["landing_bytes"]:
        await asyncio.sleep(0)
    told = (await system.health())["owners"]
    entries = [told[f"cache-{shard}"]["entries"] for shard in range(3)]
    assert sum(entries) == 60
    assert min(entries) > 5
    await system.close()
