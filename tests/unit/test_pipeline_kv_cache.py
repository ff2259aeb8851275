"""Prompts that begin alike, on their way through a whole system."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from forebay.call import Call
from forebay.config import SystemConfig
from forebay.errors import InvalidRequest, ProviderError
from forebay.reckoning import Reckoner
from forebay.system import System, open_inline
from tests.support.house import Scripted

LONG = "All work and no play makes Jack a dull boy. " * 100
GROUPS = {
    "gpt": ["openai/gpt"],
    "claude": ["anthropic/claude"],
    "own": ["hosted_vllm/a", "hosted_vllm/b", "hosted_vllm/c"],
}


class Here:
    """A system and what its provider was sent."""

    def __init__(self, system: System, provider: Scripted) -> None:
        self.system = system
        self.provider = provider

    async def ask(self, text: str, model: str, system: str = LONG, **body: Any) -> dict[str, Any]:
        """What was sent at last for a question."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        call = Call("chat", {"model": model, "messages": messages, **body}, "acme", f"req_{text}")
        before = list(messages)
        if body.get("stream"):
            stream = await self.system.pipeline.stream(call)
            async for _ in stream.chunks:
                pass
        else:
            await self.system.pipeline.answer(call)
        assert call.body["messages"] == before
        return dict(self.provider.bodies[-1])


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Any]:
    systems: list[System] = []

    async def build(**gateway: Any) -> Here:
        entries = [
            {"model_name": name, "litellm_params": {"model": model, "api_key": "k"}}
            for name, models in GROUPS.items()
            for model in models
        ]
        whole = {"model_list": entries, "retry_delay": 0.1, **gateway}
        config = SystemConfig.model_validate({"gateway": whole, "data_dir": str(tmp_path)})
        system = await open_inline(config)
        systems.append(system)
        system.provider = provider = Scripted()
        system.bounds = Reckoner(provider, system._candidates)
        return Here(system, provider)

    yield build
    for system in systems:
        await system.close()


def is_marked(body: dict[str, Any]) -> bool:
    content = body["messages"][0]["content"]
    return isinstance(content, list) and content[0]["cache_control"] == {"type": "ephemeral"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_beginning_that_comes_again_is_hinted_at(opened: Any, stream: bool) -> None:
    here: Here = await opened()
    more = {"stream": True} if stream else {}
    assert not is_marked(await here.ask("one", "claude", **more))
    assert is_marked(await here.ask("two", "claude", **more))
    assert "prompt_cache_key" not in await here.ask("one", "gpt", **more)
    assert (await here.ask("two", "gpt", **more))["prompt_cache_key"].startswith("forebay-")


async def test_switched_off_it_is_not(opened: Any) -> None:
    here: Here = await opened(enable_kv_cache=False)
    for text in ("one", "two", "three"):
        assert not is_marked(await here.ask(text, "claude"))


async def test_a_retry_is_no_second_prompt(opened: Any) -> None:
    here: Here = await opened(max_retries=1)
    here.provider.steps["anthropic/claude"] = [ProviderError("down", upstream_status=500)]
    assert not is_marked(await here.ask("one", "claude"))
    assert len(here.provider.bodies) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_refuses_it_is_asked_again_without(opened: Any, stream: bool) -> None:
    here: Here = await opened(max_retries=1)
    more = {"stream": True} if stream else {}
    await here.ask("one", "gpt", **more)
    here.provider.steps["openai/gpt"] = [InvalidRequest("unknown field 'prompt_cache_key'")]
    assert "prompt_cache_key" not in await here.ask("two", "gpt", **more)
    assert ["prompt_cache_key" in body for body in here.provider.bodies] == [False, True, False]
    assert "prompt_cache_key" not in await here.ask("three", "gpt", **more)
    assert len(here.provider.bodies) == 4


async def test_the_figures_are_the_providers(opened: Any) -> None:
    here: Here = await opened()
    details: Any = {"cached_tokens": 800}
    here.provider.usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 2,
        "prompt_tokens_details": details,
    }
    await here.ask("one", "claude")
    found = here.system.kv_cache.stats()
    assert (found["requests"], found["cached_tokens"], found["cached_share"]) == (1, 800, 0.8)
    assert found["by_model"]["claude"]["hits"] == 1
    assert found["by_tenant"]["acme"]["hits"] == 1


async def test_by_prefix_a_beginning_stays_where_it_was_sent(opened: Any) -> None:
    here: Here = await opened(routing="prefix")
    homes: dict[int, set[str]] = {}
    for number in range(3):
        for text in ("one", "two", "three"):
            await here.ask(text, "own", system=f"{number}{LONG}")
            homes.setdefault(number, set()).add(here.provider.asked[-1])
    assert all(len(home) == 1 for home in homes.values())


async def test_by_prefix_one_that_fails_is_left_and_the_next_one_is_home(opened: Any) -> None:
    here: Here = await opened(routing="prefix", max_retries=1, enable_kv_cache=False)
    await here.ask("one", "own")
    (first,) = here.provider.asked
    here.provider.steps[first] = [ProviderError("down", upstream_status=500)]
    await here.ask("two", "own")
    await here.ask("three", "own")
    second = here.provider.asked[2]
    assert here.provider.asked == [first, first, second, second]
    assert first != second


async def test_by_prefix_short_prompts_are_spread(opened: Any) -> None:
    here: Here = await opened(routing="prefix")
    for number in range(60):
        await here.ask(str(number), "own", system="Be brief.")
    assert min(Counter(here.provider.asked).values()) >= 15
