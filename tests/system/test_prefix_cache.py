"""Prompts that begin alike, as the providers' own logs show them: hints, homes, cached tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest

from forebay import GatewayConfig, LiteLLMGateway
from tests.conftest import SIM_KEY
from tests.support import system as support
from tests.support.upstream import Upstream

CACHE_TOKENS = 7_000  # of each server: the beginnings of nine documents
DOCUMENTS = 24
QUESTIONS = 300


def text(rng: Random, words: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(words))


def prompt(system: str, question: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Upstream]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Upstream()) for _ in range(3)]


def gateway_over(servers: list[Upstream]) -> LiteLLMGateway:
    """One self-hosted model: `own` on every server, and `own-N` on the N-th alone."""
    os.environ["SIM_KEY"] = SIM_KEY
    params = [
        {"model": "hosted_vllm/sim", "api_base": f"{server.url}/v1", "api_key": "k"}
        for server in servers
    ]
    names = [("own", number) for number in range(len(params))]
    names += [(f"own-{number}", number) for number in range(len(params))]
    config = GatewayConfig(
        model_list=[
            # Names of their own, so that the same prompts go to the same server in every run.
            {
                "model_name": name,
                "litellm_params": params[number],
                "model_info": {"id": f"{name}-on-{number}"},
            }
            for name, number in names
        ],
        routing="prefix",
    )
    return LiteLLMGateway(config, runtime="inline")


def cached_tokens(servers: list[Upstream], name: Callable[[int], str]) -> tuple[int, list[int]]:
    """Tokens that the servers had in their caches, and how many requests each one got.

    `name` says which model the n-th question goes to.
    """
    rng = Random(1)
    documents = [text(rng, 700) for _ in range(DOCUMENTS)]
    for server in servers:
        server.reset()
        server.script(prefix_cache=CACHE_TOKENS)
    with gateway_over(servers) as gateway:
        for number in range(QUESTIONS):
            messages = prompt(rng.choice(documents), text(rng, 10))
            gateway.generate(model=name(number), messages=messages)
        stats = gateway.kv_cache.get_cache_stats()
    logs = [server.log() for server in servers]
    found = sum(record.cached_tokens for log in logs for record in log)
    assert stats["cached_tokens"] == found
    return found, [len(log) for log in logs]


def test_by_prefix_servers_find_twice_as_much_in_their_caches(
    servers: list[Upstream], capsys: pytest.CaptureFixture[str]
) -> None:
    by_turns, even = cached_tokens(servers, lambda number: f"own-{number % len(servers)}")
    by_prefix, requests = cached_tokens(servers, lambda _: "own")
    with capsys.disabled():
        print(f"\n  prefixes: {by_prefix} cached tokens, round robin {by_turns}; load {requests}")

    mean = QUESTIONS / len(servers)
    assert even == [mean] * len(servers)
    assert by_prefix >= 2 * by_turns > 0
    assert all(abs(number - mean) <= 0.15 * mean for number in requests)


@pytest.fixture
def hosted(upstream: Upstream) -> Iterator[LiteLLMGateway]:
    os.environ["SIM_KEY"] = SIM_KEY
    upstream.script(prefix_cache=10**6)
    config = GatewayConfig(model_list=support.groups(upstream.url))
    with LiteLLMGateway(config, runtime="inline") as gateway:
        yield gateway


def test_anthropics_marks_come_with_the_second_prompt(
    hosted: LiteLLMGateway, upstream: Upstream
) -> None:
    system = text(Random(2), 1500)
    for question in ("one", "two", "three"):
        hosted.generate(model="sim-claude", messages=prompt(system, question))
    first, second, third = upstream.log()

    assert (first.cache_marks, first.cached_tokens) == (0, 0)
    assert (second.cache_marks, second.cached_tokens) == (1, 0)  # written for the next
    assert third.cache_marks == 1
    assert third.cached_tokens >= 1500
    stats = hosted.kv_cache.get_cache_stats()
    assert (stats["cached_tokens"], stats["hits"]) == (third.cached_tokens, 1)
    assert stats["written_tokens"] >= 1500
    assert stats["prompt_tokens"] >= 4500


def test_a_conversation_reads_all_that_was_said_before(
    hosted: LiteLLMGateway, upstream: Upstream
) -> None:
    rng = Random(3)
    turns = prompt(text(rng, 1500), "Hi")
    for _ in range(5):
        stream = hosted.generate(model="sim-claude", messages=turns, stream=True)
        said = "".join(stream)
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": text(rng, 9)}]
    log = upstream.log()

    assert all(record.cache_marks <= 4 for record in log)
    grown = [record.cached_tokens for record in log[2:]]
    assert grown == sorted(set(grown))
    assert grown[0] >= 1500
    assert hosted.kv_cache.get_cache_stats()["cached_tokens"] == sum(grown)


def test_openais_key_is_each_tenants_own(hosted: LiteLLMGateway, upstream: Upstream) -> None:
    system = text(Random(4), 1500)
    for tenant in ("a", "b"):
        for question in ("one", "two", "three"):
            hosted.generate(model="sim", messages=prompt(system, question), tenant_id=tenant)
    keys = [record.cache_key for record in upstream.log()]

    assert keys[0] is keys[3] is None
    assert keys[1] == keys[2] is not None
    assert keys[4] == keys[5] is not None
    assert keys[1] != keys[4]


def test_a_callers_own_key_and_marks_stand(hosted: LiteLLMGateway, upstream: Upstream) -> None:
    system = text(Random(5), 1500)
    part = {"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}
    for question in ("one", "two"):
        hosted.generate(
            model="sim", messages=prompt(system, question), prompt_cache_key="of my own"
        )
        messages = [{"role": "system", "content": [part]}, {"role": "user", "content": question}]
        hosted.generate(model="sim-claude", messages=messages)
    log = upstream.log()

    assert [record.cache_key for record in log if record.dialect == "openai"] == ["of my own"] * 2
    assert [record.cache_marks for record in log if record.dialect == "anthropic"] == [1, 1]
