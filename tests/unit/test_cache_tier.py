from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from actors.cache.redis_tier import Place
from actors.ref import InlineRef, OwnerUnavailable
from actors.registry.owner import Registry
from forebay import cache_tier
from forebay.cache_tier import FixedPlace, RegisteredPlace, Setting
from forebay.config import CacheConfig, GatewayConfig, SystemConfig
from forebay.secrets import Vault
from forebay.system import Boot, owners

CANARY = "canary-0123456789"
URL = f"redis://:{CANARY}@127.0.0.1:6379"


class Heard:
    def __init__(self) -> None:
        self.words: list[tuple[Place | None, str | None]] = []

    def __call__(self, place: Place | None, problem: str | None = None) -> None:
        self.words.append((place, problem))


async def until(true: Callable[[], Any]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0)
    raise AssertionError


def system(tmp_path: Path, **gateway: Any) -> SystemConfig:
    return SystemConfig(
        gateway=GatewayConfig(enable_caching=True, **gateway), data_dir=str(tmp_path)
    )


def test_what_crosses_to_the_owner_holds_no_password(tmp_path: Path) -> None:
    config = system(tmp_path, cache_config=CacheConfig(redis_url=URL, namespace="prod"))
    boot = Boot.of(config, "forebay", durable=True)
    made = owners(boot)["cache"][1]
    assert CANARY not in json.dumps(asdict(boot)) + repr(made)
    assert CANARY.encode() not in pickle.dumps(made)
    setting = pickle.loads(pickle.dumps(made))["places"].setting
    assert Vault(tmp_path).get(setting.url) == URL
    assert setting.namespace == "prod"


def test_a_system_in_memory_writes_no_vault(tmp_path: Path) -> None:
    boot = Boot.of(system(tmp_path, redis_url=URL), "forebay", durable=False)
    assert boot.cache_url is None
    assert owners(boot)["cache"][1]["places"] is None
    assert list(tmp_path.iterdir()) == []


async def test_a_system_in_one_process_says_it_once(tmp_path: Path) -> None:
    heard = Heard()
    config = system(tmp_path, redis_url=URL).gateway
    await FixedPlace(Setting.of(config), str(tmp_path)).follow(heard)
    assert heard.words == [(Place(URL), None)]
    assert CANARY not in repr(heard.words)


async def test_a_reference_to_nothing_is_a_problem_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    config = system(tmp_path, redis_url="os.environ/CACHE_AT").gateway
    monkeypatch.delenv("CACHE_AT", raising=False)
    await FixedPlace(Setting.of(config), str(tmp_path)).follow(heard)
    monkeypatch.setenv("CACHE_AT", "redis://h")
    await FixedPlace(Setting.of(config), str(tmp_path)).follow(heard)
    (place, problem), now = heard.words
    assert place is None
    assert "CACHE_AT is not set" in str(problem)
    assert now == (Place("redis://h"), None)


async def test_what_the_registry_says_goes_first_and_is_followed(tmp_path: Path) -> None:
    registry = Registry()
    heard, vault = Heard(), Vault(tmp_path)
    made = RegisteredPlace(
        Setting("redis://first", "forebay"),
        str(tmp_path),
        lambda: InlineRef("registry", registry),
    )
    following = asyncio.create_task(made.follow(heard))
    await until(lambda: heard.words)
    assert heard.words == [(Place("redis://first"), None)]
    own = CacheConfig(redis_url=URL, namespace="prod")
    document = system(tmp_path, cache_config=own).document(vault)
    await registry.put(document, "", None, "1")
    await until(lambda: len(heard.words) == 2)
    assert heard.words[-1] == (Place(URL, "prod"), None)
    await registry.put(system(tmp_path).document(vault), "", None, "2")
    await until(lambda: len(heard.words) == 3)
    assert heard.words[-1] == (None, None)
    following.cancel()
    await asyncio.wait([following])


async def test_a_registry_that_is_away_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(InlineRef):
        async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
            self.sent[method] += 1
            raise OwnerUnavailable(self.name, "it died")

    away = Away("registry", Registry())
    monkeypatch.setattr(cache_tier, "ATTACH_EVERY_S", 0)
    heard = Heard()
    made = RegisteredPlace(Setting("redis://first", "forebay"), str(tmp_path), lambda: away)
    following = asyncio.create_task(made.follow(heard))
    await until(lambda: away.sent.total() > 3)
    assert heard.words == [(Place("redis://first"), None)]
    following.cancel()
    await asyncio.wait([following])
