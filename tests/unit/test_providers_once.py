"""One call is one call: nobody below the lane tries again, whatever the route and the failure.

The upstream is a process of its own, and its log is what counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from forebay.errors import GatewayError, ProviderConnectionError, ProviderError, RateLimitError
from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels
from forebay.routing import Deployment
from tests.support.upstream import Upstream

ADDRESSES = {"anthropic": "", "gemini": "", "cohere": "/v2/embed", "cohere_chat": "/v2/chat"}
CHATS = ("openai/sim", "hosted_vllm/sim", "anthropic/sim", "gemini/sim", "cohere_chat/sim")
TEXTS = (
    *("openai/gpt-3.5-turbo-instruct", "text-completion-openai/sim", "hosted_vllm/sim"),
    *("openai/sim", "anthropic/sim"),
)
EMBEDDINGS = ("openai/sim-embed", "hosted_vllm/sim-embed", "gemini/sim-embed", "cohere/sim-embed")
ROUTES = [
    *((route, model) for route in ("chat", "chat_stream") for model in CHATS),
    *((route, model) for route in ("completion", "completion_stream") for model in TEXTS),
    *(("embed", model) for model in EMBEDDINGS),
]
FAILURES: list[tuple[dict[str, Any], type[GatewayError]]] = [
    ({"status": 500}, ProviderError),
    ({"status": 503, "retry_after": "0"}, ProviderError),
    ({"status": 408}, GatewayError),
    ({"status": 409}, GatewayError),
    ({"status": 429, "retry_after": "0"}, RateLimitError),
    ({"reset": "before"}, ProviderConnectionError),
    ({"reset": "after"}, ProviderConnectionError),
]


@pytest.fixture
async def lane() -> AsyncIterator[LiteLLMProvider]:
    lane = LiteLLMProvider(InProcessModels())
    await lane.warm()
    yield lane
    await lane.close()


async def ask(lane: LiteLLMProvider, route: str, model: str, url: str) -> None:
    """One call, to its end."""
    provider = model.partition("/")[0]
    params = {"api_base": url + ADDRESSES.get(provider, "/v1"), "api_key": "sk-1234567890"}
    to = Deployment(id=model, group="g", model=model, provider=provider, params=params)
    how: dict[str, Any] = {"timeout_s": 10.0, "resolve": dict}
    chat = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 9}
    text = {"prompt": "Hello there", "max_tokens": 9}
    match route:
        case "chat":
            await lane.chat(to, chat, **how)
        case "completion":
            await lane.completion(to, text, **how)
        case "embed":
            await lane.embed(to, ["Hello", "there"], {}, **how)
        case "chat_stream":
            assert [one async for one in lane.chat_stream(to, chat, **how)]
        case _:
            assert [one async for one in lane.completion_stream(to, text, **how)]


@pytest.mark.parametrize(("route", "model"), ROUTES)
async def test_a_call_that_fails_is_made_once(
    upstream: Upstream, lane: LiteLLMProvider, route: str, model: str
) -> None:
    await ask(lane, route, model, upstream.url)
    assert len(upstream.log()) == 1, "it works, and the connection is open from now on"
    for words, expected in FAILURES:
        upstream.reset()
        upstream.script(**words)
        with pytest.raises(expected):
            await ask(lane, route, model, upstream.url)
        assert len(upstream.log()) == 1, words
