from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.batcher.owner import Batcher
from actors.batcher.policy import BULK_LINGER_S, LINGER_S, Caps, Lane, NoPermit
from forebay.config import ServerConfig, SystemConfig
from forebay.errors import ConfigurationError, DeploymentsBusy, RateLimitError
from forebay.providers.call_caps import LOCAL, OPENAI, UNKNOWN, call_caps
from forebay.routing import Deployment
from forebay.system import Boot, batcher_names, open_inline, owners
from tests.support.house import House


def deployment(model: str, **info: Any) -> Deployment:
    return Deployment("d", "group", model, model.partition("/")[0], info=info)


@pytest.mark.parametrize(
    ("model", "caps"),
    [
        ("openai/text-embedding-3-small", OPENAI),
        ("azure/mine", OPENAI),
        ("cohere/embed-v4.0", Caps(96, 128_000)),
        ("bedrock/cohere.embed-english-v3", Caps(96, 49_152)),
        ("bedrock/amazon.titan-embed-text-v2:0", Caps(1)),
        ("voyage/voyage-3-large", Caps(1000, 120_000)),
        ("voyage/voyage-3-lite", Caps(1000, 1_000_000)),
        ("voyage/voyage-3.5", Caps(1000, 320_000)),
        ("gemini/gemini-embedding-001", Caps(100, 204_800)),
        ("vertex_ai/gemini-embedding-001", Caps(1)),
        ("mistral/mistral-embed", Caps(1024, 16_384)),
        ("local/wordllama-256", LOCAL),
        ("somebody/else", UNKNOWN),
    ],
)
def test_providers_have_their_caps(model: str, caps: Caps) -> None:
    assert call_caps(deployment(model), None) == caps


def test_a_batch_size_lowers_what_is_known_and_stands_for_what_is_not() -> None:
    assert call_caps(deployment("cohere/embed-v4.0"), 500).items_max == 96
    assert call_caps(deployment("cohere/embed-v4.0"), 50).items_max == 50
    assert call_caps(deployment("somebody/else"), 500).items_max == 500


def test_what_a_deployment_says_of_itself_has_the_last_word() -> None:
    own = {"max_texts_per_call": 7, "max_tokens_per_call": 8, "max_bytes_per_call": 9}
    assert call_caps(deployment("cohere/embed-v4.0", **own), 500) == Caps(7, 8, 9)


@pytest.mark.parametrize("wrong", [0, -1, "many", 1.5, True])
def test_a_cap_that_cannot_be_is_refused(wrong: Any) -> None:
    entry = {
        "model_name": "a",
        "litellm_params": {"model": "openai/a"},
        "model_info": {"max_texts_per_call": wrong},
    }
    with pytest.raises(ConfigurationError, match="max_texts_per_call"):
        SystemConfig.from_document({"model_list": [entry]})


@pytest.mark.parametrize(
    ("told", "linger_s", "bulk_s"),
    [(None, LINGER_S, BULK_LINGER_S), (0, 0.0, 0.0), (0.1, 0.1, 0.1)],
)
async def test_a_linger_is_as_long_as_batch_timeout_says(
    tmp_path: Any, told: float | None, linger_s: float, bulk_s: float
) -> None:
    document = {"gateway": {"batch_timeout": told}, "data_dir": str(tmp_path)}
    system = await open_inline(SystemConfig.from_document(document))
    caps = system.caps_for(deployment("openai/a"))
    assert (caps.lingers_s(bulk=False), caps.lingers_s(bulk=True)) == (linger_s, bulk_s)
    await system.close()


def test_one_batcher_has_no_number_and_several_have() -> None:
    assert [name for name, (cls, _) in owners(Boot()).items() if cls is Batcher] == ["batcher"]
    several = owners(Boot(batcher_shards=3))
    assert [name for name, (cls, _) in several.items() if cls is Batcher] == batcher_names(3)


@pytest.mark.parametrize("wrong", [0, 17, "many"])
def test_a_number_of_batchers_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ServerConfig(batcher_shards=wrong)
    assert caught.value.param == "batcher_shards"


async def test_where_the_deployments_own_limit_leaves_no_room_the_call_is_not_made(
    house: Callable[..., Awaitable[House]],
) -> None:
    here = await house(own={"rpm": 1})
    lane = Lane(here.deployment("openai/text-embedding-x", "e").id)
    await here.system.embed_call(lane, ["a", "b"], 5.0)
    with pytest.raises(NoPermit) as caught:
        await here.system.embed_call(lane, ["c"], 5.0)
    assert caught.value.retry_after_s > 1.0
    assert isinstance(caught.value.error, DeploymentsBusy)
    assert here.provider.texts == [["a", "b"]]


async def test_while_the_provider_wants_a_pause_the_call_is_not_made(
    house: Callable[..., Awaitable[House]],
) -> None:
    here = await house()
    embeds = here.deployment("openai/text-embedding-x", "e")
    here.provider.steps[embeds.model] = [
        RateLimitError("slower", retry_after_s=30.0, upstream_status=429)
    ]
    with pytest.raises(RateLimitError):
        await here.system.embed_call(Lane(embeds.id), ["a"], 5.0)
    with pytest.raises(NoPermit) as caught:
        await here.system.embed_call(Lane(embeds.id), ["b"], 5.0)
    assert caught.value.retry_after_s == pytest.approx(30.0, abs=1.0)
    assert here.provider.texts == [["a"]]


async def test_each_batcher_is_asked_how_it_is(tmp_path: Any) -> None:
    document = {
        "model_list": [{"model_name": "e", "litellm_params": {"model": "openai/e"}}],
        "server": {"batcher_shards": 3},
        "data_dir": str(tmp_path),
    }
    system = await open_inline(SystemConfig.from_document(document))
    told = await system.health()
    await system.close()
    assert {name for name in told["owners"] if name.startswith("batcher")} == set(batcher_names(3))
    assert told["checks"]["batcher"]["texts_queued"] == 0
