"""Streams that do not end well, over real sockets: what the caller gets, and what is left behind.

The upstream is a process of its own; LiteLLM's pool has two connections, so that one leak shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from forebay.errors import (
    GatewayError,
    GatewayTimeout,
    ProviderConnectionError,
    ProviderError,
    RateLimitError,
)
from forebay.providers.base import STALLED
from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels
from forebay.providers.streams import LiteLLMChunks
from forebay.routing import Deployment
from tests.support.simulator import answer_text
from tests.support.upstream import Upstream

POOL = 2
ADDRESSES = {"anthropic": "", "gemini": "", "cohere_chat": "/v2/chat"}
CHATS = ("openai/sim", "hosted_vllm/sim", "anthropic/sim", "gemini/sim", "cohere_chat/sim")
TEXT = "openai/gpt-3.5-turbo-instruct"
ROUTES = (*CHATS, TEXT)
PROMPT = "Hello there"
TOKENS = 40


@pytest.fixture
def _pool_of_two() -> Iterator[None]:
    litellm = importlib.import_module("litellm")
    http: Any = importlib.import_module("litellm.llms.custom_httpx.http_handler")
    before = http.AIOHTTP_CONNECTOR_LIMIT
    http.AIOHTTP_CONNECTOR_LIMIT = POOL
    litellm.in_memory_llm_clients_cache.flush_cache()
    yield
    http.AIOHTTP_CONNECTOR_LIMIT = before
    litellm.in_memory_llm_clients_cache.flush_cache()


@pytest.fixture
async def lane() -> AsyncIterator[LiteLLMProvider]:
    lane = LiteLLMProvider(InProcessModels())
    await lane.warm()
    yield lane
    await lane.close()


def stream(
    lane: LiteLLMProvider, upstream: Upstream, model: str, prompt: str = PROMPT, **how: Any
) -> LiteLLMChunks:
    provider = model.partition("/")[0]
    params = {"api_base": upstream.url + ADDRESSES.get(provider, "/v1"), "api_key": "sk-123456789"}
    to = Deployment(id=model, group="g", model=model, provider=provider, params=params)
    how = {"timeout_s": 10.0, "resolve": dict, **how}
    if model == TEXT:
        return lane.completion_stream(to, {"prompt": prompt, "max_tokens": 500}, **how)
    messages = [{"role": "user", "content": prompt}]
    return lane.chat_stream(to, {"messages": messages, "max_tokens": 500}, **how)


def text_of(told: list[dict[str, Any]]) -> str:
    choices = [choice for one in told for choice in one["choices"]]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


async def read(chunks: LiteLLMChunks) -> tuple[list[dict[str, Any]], GatewayError | None]:
    """All that comes, and what it ends with."""
    told: list[dict[str, Any]] = []
    try:
        async for one in chunks:
            told.append(one)
    except GatewayError as error:
        return told, error
    return told, None


# --- what the caller gets ---------------------------------------------------------------------

KINDS: list[tuple[str, type[GatewayError]]] = [
    ("half", ProviderError),
    ("text", ProviderError),
    ("utf8", ProviderError),
    ("error", ProviderError),
]
OPENAI_KINDS = [*KINDS, ("choices", ProviderError), ("types", ProviderError)]


@pytest.mark.parametrize("model", ROUTES)
async def test_a_chunk_that_makes_no_sense_is_an_error_and_never_left_out(
    upstream: Upstream, lane: LiteLLMProvider, model: str
) -> None:
    kinds = OPENAI_KINDS if model.startswith(("openai/", "hosted_vllm/")) else KINDS
    whole = answer_text(PROMPT, TOKENS)
    for kind, expected in kinds:
        for at in (0, 5):
            upstream.reset()
            upstream.script(malformed_at=at, malformed=kind, tokens=TOKENS)
            told, error = await read(stream(lane, upstream, model))
            assert type(error) is expected, (kind, at)
            assert whole.startswith(text_of(told)), (kind, at)
            assert bool(text_of(told)) == bool(at), "before the first byte another may answer"
            assert len(upstream.log()) == 1


@pytest.mark.parametrize("model", ["openai/sim", "hosted_vllm/sim", TEXT])
async def test_a_chunk_without_end_is_an_error(
    upstream: Upstream, lane: LiteLLMProvider, model: str
) -> None:
    upstream.script(malformed_at=2, malformed="huge")
    _, error = await read(stream(lane, upstream, model))
    assert type(error) is ProviderError


@pytest.mark.parametrize("model", ROUTES)
@pytest.mark.parametrize("words", [{"cut": "abort"}, {"cut": "clean"}], ids=["cut", "ended early"])
async def test_half_an_answer_is_never_taken_for_a_whole_one(
    upstream: Upstream, lane: LiteLLMProvider, model: str, words: dict[str, Any]
) -> None:
    whole = answer_text(PROMPT, TOKENS)
    for after in (0, 1, 7):
        upstream.script(cut_after=after, tokens=TOKENS, **words)
        told, error = await read(stream(lane, upstream, model))
        assert isinstance(error, ProviderConnectionError), after
        assert whole.startswith(text_of(told)), after


@pytest.mark.parametrize("model", ROUTES)
async def test_silence_is_a_stall(upstream: Upstream, lane: LiteLLMProvider, model: str) -> None:
    for after in (5, 9):  # some dialects begin with chunks that hold nothing
        upstream.script(stall_after=after, tokens=TOKENS)
        _, error = await read(stream(lane, upstream, model, stall_s=0.2))
        assert isinstance(error, GatewayTimeout), after
        assert error.code == STALLED


async def test_a_model_may_think_before_its_first_token(
    upstream: Upstream, lane: LiteLLMProvider
) -> None:
    upstream.script(stall_after=0, stall=0.5)
    told, error = await read(stream(lane, upstream, "openai/sim", stall_s=0.2))
    assert error is None
    assert text_of(told) == answer_text(PROMPT)


async def test_one_key_may_be_refused_and_another_not(
    upstream: Upstream, lane: LiteLLMProvider
) -> None:
    upstream.script(status=401, key="sk-another", count=1)
    upstream.script(status=429, retry_after="date+7", key="sk-123456789", count=1)
    _, error = await read(stream(lane, upstream, "openai/sim"))
    assert isinstance(error, RateLimitError)
    assert error.retry_after_s is not None
    assert 5.0 <= error.retry_after_s <= 7.0


# --- what is left behind ----------------------------------------------------------------------

WAYS = ("closed", "cancelled", "closed early", "cut", "stalled", "malformed", "whole")


async def cut(chunks: LiteLLMChunks, way: str, after: int) -> None:
    """Read `after` chunks, then let the stream end the given way."""
    if way == "cancelled":
        reading = asyncio.ensure_future(read(chunks))
        await asyncio.sleep(after / 100)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
    elif way == "closed":
        for _ in range(after):
            await anext(chunks, None)
        await chunks.aclose()
    elif way == "closed early":
        await anext(chunks)
        await chunks.aclose()
    else:
        _, error = await read(chunks)
        assert (error is None) == (way == "whole"), way


WORDS = {"cut": "cut-after={}", "stalled": "stall-after={}", "malformed": "malformed-at={}"}


@pytest.mark.usefixtures("_pool_of_two")
@pytest.mark.parametrize("model", ROUTES)
async def test_streams_that_are_cut_leave_nothing_behind(
    upstream: Upstream, lane: LiteLLMProvider, model: str
) -> None:
    dice = random.Random(model)
    upstream.script(tokens=TOKENS, interval=0.005)
    before = asyncio.all_tasks()
    others = (await asyncio.to_thread(upstream.stats))["connections"]

    async def one(way: str) -> int:
        after = dice.randrange(5 if way == "stalled" else 1, 12)
        prompt = f"{PROMPT} [[{WORDS[way].format(after)}]]" if way in WORDS else PROMPT
        stall_s = 0.2 if way == "stalled" else 9.0
        await cut(stream(lane, upstream, model, prompt, stall_s=stall_s), way, after)
        return time.monotonic_ns()

    over_ns: list[int] = []
    for _ in range(2):
        for number, way in enumerate(WAYS):
            over_ns += await asyncio.gather(one(way), one(WAYS[number - 3]))
    # A call that is cancelled before it is sent never arrives.
    await asyncio.sleep(0.05)
    records = await asyncio.to_thread(
        upstream.wait_log, lambda log: all(record.finished for record in log), 1.0
    )
    assert len(records) >= len(over_ns) - 6
    assert max(record.end_mono_ns or 0 for record in records) < max(over_ns) + 1_000_000_000
    stats = await asyncio.to_thread(upstream.stats)
    assert stats["running"] == 0
    assert stats["connections_max"] <= others + POOL + 1, "the pool, and who asks for figures"
    assert asyncio.all_tasks() == before

    async with asyncio.timeout(5.0):
        answers = await asyncio.gather(*(read(stream(lane, upstream, model)) for _ in range(6)))
    for told, error in answers:
        assert error is None
        assert text_of(told) == answer_text(PROMPT, TOKENS)


@pytest.mark.parametrize("model", ROUTES)
async def test_the_upstream_is_told_within_a_second_that_nobody_listens(
    upstream: Upstream, lane: LiteLLMProvider, model: str
) -> None:
    upstream.script(tokens=TOKENS, stall_after=5)
    chunks = stream(lane, upstream, model)
    await anext(chunks)
    await chunks.aclose()
    (record,) = await asyncio.to_thread(upstream.wait_log, 1, 1.0)
    assert record.disconnected
