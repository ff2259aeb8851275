"""Both lanes side by side: what the upstream receives and what the caller gets is the same.

LiteLLM's lane is the reference. What is no difference is said in `tests.support.two_lanes`; where
LiteLLM changes a request, or loses a part of an answer, it is said here, by name.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.batcher.policy import Room
from forebay import schemas
from forebay.providers.relay.forms import covered, form_of
from forebay.providers.relay.lanes import AUTO
from tests.support import two_lanes
from tests.support.lane_replies import ANSWERS, STREAMS, VECTORS
from tests.support.lane_requests import ALIKE, CHAT, EMBED, MESSAGES, TEXT
from tests.support.two_lanes import HELLO, MODELS, TwoLanes, Upstream, answer_for

PROVIDERS = tuple(MODELS)
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
STREAMED = ("nothing more", "n 2", "stop", "tools", "max_completion_tokens", "all of the usual")
TEXTS = {
    "openai": "openai/gpt-3.5-turbo-instruct",
    "together_ai": "together_ai/acme/base",
    "hosted_vllm": "hosted_vllm/base",
}
"""Providers that LiteLLM asks for texts; of the others it asks chats."""
EMBEDS = {
    "openai": "openai/text-embedding-3-small",
    "azure": "azure/my-embed",
    "together_ai": "together_ai/embed",
    "mistral": "mistral/mistral-embed",
    "openrouter": "openrouter/openai/text-embedding-3-small",
    "hosted_vllm": "hosted_vllm/embed",
}
"""Providers that have embeddings, as far as LiteLLM knows."""
HEADLESS = ("openrouter", "hosted_vllm")
"""Providers whose headers LiteLLM drops where they come with vectors; the relay reads them."""

LITELLMS: dict[str, set[str]] = {
    "all": {"messages: developer", "messages: file", "messages: sound", "store with metadata"},
    "openai": set(),
    "azure": set(),
    "groq": {"messages: cached part", "response_format schema"},
    "together_ai": {"messages: cached part"},
    "mistral": {
        *("messages: named", "messages: empty", "messages: blank", "messages: one part"),
        *("messages: two parts", "messages: cached part"),
        *("tool_choice required", "reasoning_effort"),
    },
    "deepseek": {
        *("messages: one part", "messages: two parts", "messages: cached part"),
        *("messages: picture", "messages: far picture", "reasoning_effort"),
    },
    "openrouter": {"messages: cached part"},
    "hosted_vllm": {"messages: cached part", "strict tools"},
}
"""Requests that LiteLLM words otherwise than by leaving out or renaming a parameter, or that hold
what has no form: `auto` leaves them to it."""

REFUSED: dict[str, set[str]] = {
    "openai": {"verbosity", "reasoning_effort"},
    "azure": {"verbosity", "reasoning_effort", "service_tier", "safety_identifier"},
    "groq": {"verbosity", "reasoning_effort", "web_search_options"},
    "together_ai": {"verbosity", "reasoning_effort"},
    "mistral": {
        *("verbosity", "frequency_penalty", "presence_penalty", "n 2", "logit_bias", "logprobs"),
        *("top_logprobs", "store", "store with metadata", "functions", "function_call"),
        *("service_tier", "modalities", "audio", "prediction", "prompt_cache_key"),
        *("safety_identifier", "web_search_options"),
    },
    "deepseek": {"verbosity"},
    "openrouter": {"verbosity"},
    "hosted_vllm": {"verbosity"},
}
"""Requests that LiteLLM refuses, on both lanes, before anything is sent."""

KEPT = {"a refusal", "two choices"}
"""Streams of which LiteLLM loses a part: refusals, and the later choices' reasons to end."""
KEPT_OF_OPENROUTER = {"reasoning_content"}

CUT = {"no end, but [DONE]", "only [DONE]"}
"""Streams that were broken off. LiteLLM makes up a "stop", but for OpenAI's and Azure's."""


@pytest.fixture
async def two() -> AsyncIterator[TwoLanes]:
    upstream = Upstream()
    await upstream.start()
    two = TwoLanes(upstream)
    await two.warm()
    gc.disable()  # a collection walks over LiteLLM's half a million objects, for each few calls
    yield two
    gc.enable()
    await two.close()
    await upstream.stop()


def test_every_provider_of_auto_is_held_against_litellm() -> None:
    assert set(PROVIDERS) == AUTO


@pytest.mark.parametrize(
    ("route", "cases", "apart"),
    [
        ("chat", CHAT, {"messages", "model", "stream_options"}),
        ("completion", TEXT, {"prompt", "model", "stream_options"}),
        ("embedding", EMBED, {"input", "model", "encoding_format"}),  # that is the lane's own
    ],
)
def test_there_is_a_case_for_every_parameter(
    route: str, cases: dict[str, Any], apart: set[str]
) -> None:
    named = {name.partition(" ")[0] for name in cases}
    assert schemas.parameters(route) - apart <= named
    assert schemas.parameters(route) - {"model"} <= covered(route) | {"encoding_format"}


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_chat_is_asked_for_alike(two: TwoLanes, provider: str) -> None:
    to = two.deployment(provider)
    cases = {name: {"messages": HELLO, **fields} for name, fields in CHAT.items()}
    cases |= {f"messages: {name}": {"messages": given} for name, given in MESSAGES.items()}
    ways: dict[str, set[str]] = {"relay": set(), "litellm": set(), "refused": set()}
    for name, body in cases.items():
        first, second = await two.both("chat", to, body, answer_for("chat"))
        assert second.received == first.received, name
        assert second.got == first.got, name
        way = "relay" if second.relayed else "litellm" if first.received else "refused"
        ways[way].add(name)
    refused = REFUSED[provider]
    assert ways["refused"] == refused
    assert ways["litellm"] == (LITELLMS["all"] | LITELLMS[provider]) - refused


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_what_litellm_shows_once_holds_for_the_whole_form(
    two: TwoLanes, provider: str
) -> None:
    to = two.deployment(provider)
    for name, (shown, meant) in ALIKE.items():
        one, other = {"messages": HELLO, **shown}, {"messages": HELLO, **meant}
        assert form_of("chat", one) == form_of("chat", other), name
        await two.both("chat", to, one, answer_for("chat"))
        first, second = await two.both("chat", to, other, answer_for("chat"))
        assert second.received == first.received, name
        assert second.got == first.got, name


@pytest.mark.parametrize("model", ["openai/o3-mini", "openai/gpt-5", "azure/o3-mini"])
async def test_models_that_think_are_asked_as_litellm_asks_them(two: TwoLanes, model: str) -> None:
    to = two.deployment(model.partition("/")[0], model)
    cases = {**CHAT, "heat": {"temperature": 0.3}, "effort": {"reasoning_effort": "high"}}
    relayed = set()
    for name, fields in cases.items():
        first, second = await two.both(
            "chat", to, {"messages": HELLO, **fields}, answer_for("chat")
        )
        assert second.received == first.received, name
        assert second.got == first.got, name
        if second.relayed:
            relayed.add(name)
    assert {"nothing more", "max_tokens", "temperature 1", "tools", "effort"} <= relayed
    assert not {"temperature", "heat", "temperature 0"} & relayed  # LiteLLM refuses them


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_streamed_chat_is_asked_for_alike(two: TwoLanes, provider: str) -> None:
    to = two.deployment(provider)
    for name in STREAMED:
        body = {"messages": HELLO, **CHAT[name], **USAGE}
        first, second = await two.both("chat", to, body, answer_for("chat"))
        assert second.received == first.received, name
        assert second.got == first.got, name
        assert second.relayed or not first.received, name


@pytest.mark.parametrize("provider", TEXTS)
async def test_texts_are_asked_for_alike(two: TwoLanes, provider: str) -> None:
    to = two.deployment(provider, TEXTS[provider])
    for streams in ({}, USAGE):
        for name, fields in TEXT.items():
            if streams and name not in ("nothing more", "n", "stop", "echo"):
                continue
            body = {"prompt": "Hello", **fields, **streams}
            first, second = await two.both("completion", to, body, answer_for("completion"))
            assert second.received == first.received, name
            assert second.got == first.got, name
            assert second.relayed or name.startswith("prompt"), name


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name not in TEXTS])
async def test_texts_that_become_chats_are_litellms(two: TwoLanes, provider: str) -> None:
    body = {"prompt": "Hello", "max_tokens": 5}
    first, second = await two.both("completion", two.deployment(provider), body, answer_for("chat"))
    assert (second.received, second.got, second.relayed) == (first.received, first.got, 0)


@pytest.mark.parametrize("provider", EMBEDS)
async def test_vectors_are_asked_for_and_read_alike(two: TwoLanes, provider: str) -> None:
    to = two.deployment(provider, EMBEDS[provider])
    for name, body in EMBED.items():
        first, second = await two.both("embedding", to, body, answer_for("embedding"))
        assert second.received == first.received, name
        assert second.got == first.got, name
        assert second.relayed or not first.received, name
    for number, (name, reply) in enumerate(VECTORS.items()):
        # Of each of them nothing is known yet, and after that what this answer has shown.
        to = two.deployment(provider, EMBEDS[provider], timeout=60 + number)
        for again in range(3):
            first, second = await two.both("embedding", to, {"input": ["Hello", "there"]}, reply)
            assert second.received == first.received, (name, again)
            if name == "what is left" and provider in HEADLESS:
                assert first.got[-1] is None
                assert second.got == (*first.got[:-1], Room(0, 149_984, 62.0))
            else:
                assert second.got == first.got, (name, again)
            assert second.relayed or again == 1, name  # LiteLLM is asked once how to say "float"


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_answer_is_read_alike(two: TwoLanes, provider: str) -> None:
    to = two.deployment(provider)
    for name, reply in ANSWERS.items():
        first, second = await two.both("chat", to, {"messages": HELLO}, reply)
        assert second.received == first.received, name
        assert second.got == first.got, name
        assert second.relayed == 1, name


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_stream_is_read_alike(two: TwoLanes, provider: str) -> None:
    to = two.deployment(provider)
    for name, reply in STREAMS.items():
        first, second = await two.both("chat", to, {"messages": HELLO, **USAGE}, reply)
        assert second.received == first.received, name
        assert second.relayed == 1, name
        if name in KEPT or (provider == "openrouter" and name in KEPT_OF_OPENROUTER):
            assert second.got != first.got, name
            assert second.got == two_lanes.streamed(two_lanes.sent_by(reply)), name
        elif name in CUT and provider not in ("openai", "azure"):
            _, failure = second.got
            assert failure[0] == "ProviderConnectionError", name
        else:
            assert second.got == first.got, name


@pytest.mark.parametrize("provider", TEXTS)
async def test_a_texts_answer_is_read_alike(two: TwoLanes, provider: str) -> None:
    to = two.deployment(provider, TEXTS[provider])
    replies = {name: reply for name, reply in ANSWERS.items() if name[0].isdigit()}
    for name, reply in replies.items():
        first, second = await two.both("completion", to, {"prompt": "Hello"}, reply)
        assert second.received == first.received, name
        assert second.got == first.got, name
        assert second.relayed == 1, name
