"""What a provider says of its calls is what the ledger has of the callers' requests, to the token.

A whole system of real owners in this process; the provider counts and charges as the dice fall.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batcher.policy import Paid, Text, Vectors
from forebay.call import Call
from forebay.codec import Answer
from forebay.errors import GatewayError, ProviderError
from forebay.providers.base import NO_BASE64, Resolve
from forebay.routing import Deployment
from tests.support.house import House, Scripted, open_house, vector_of

TENANTS = ("acme", "bolt", "coda")
TEXTS = ["a", "bb", "ccc", "日本", "a longer text than the others", *"defg"]


class Counting(Scripted):
    """Says a number of tokens that nobody could guess, and charges by the dice."""

    def __init__(self, seed: int, failing: float) -> None:
        super().__init__()
        self.dice = random.Random(seed)
        self.failing = failing
        self.tokens = self.charged_nano = 0

    async def embed(
        self,
        deployment: Deployment,
        texts: Sequence[Text],
        params: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Vectors:
        self.texts.append(list(texts))
        fails = self.dice.random() < self.failing
        for _ in range(self.dice.randrange(4)):
            await asyncio.sleep(0)
        if fails and self.dice.random() < 0.5:
            raise ProviderError("not today", upstream_status=500)
        tokens, cost_nano = self.dice.randrange(1, 1000), self.dice.randrange(10_000)
        self.tokens += tokens
        self.charged_nano += cost_nano
        if fails:
            error = ProviderError("no base64 here", code=NO_BASE64)
            error.paid = Paid(tokens, cost_nano, deployment.model)  # type: ignore[attr-defined]
            raise error
        array = np.stack([vector_of(text) for text in texts])
        return Vectors(array, tokens, cost_nano, deployment.model)


@given(
    lists=st.lists(
        st.tuples(
            st.sampled_from(TENANTS), st.lists(st.sampled_from(TEXTS), min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=10,
    ),
    seed=st.integers(0, 2**32),
    gateway=st.fixed_dictionaries(
        {
            "enable_caching": st.booleans(),
            "enable_request_deduplication": st.booleans(),
            "batch_size": st.sampled_from([1, 3, 64]),
        }
    ),
    failing=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=12, deadline=None)
def test_the_ledgers_sum_is_the_providers_figure(
    lists: list[tuple[str, list[str]]], seed: int, gateway: dict[str, Any], failing: float
) -> None:
    async def session(data_dir: Path) -> None:
        here = await open_house(data_dir, **gateway, max_retries=0)
        provider = here.system.provider = Counting(seed, failing)
        try:
            calls = [
                Call("embedding", {"model": "e", "input": texts}, tenant, f"req_{number}")
                for number, (tenant, texts) in enumerate(lists)
            ]
            answers = await asyncio.gather(*(ask(here, call, provider) for call in calls))
            entries = [entry for call in calls for entry in await here.entries(call)]
            assert sum(entry.prompt_tokens for entry in entries) == provider.tokens
            assert sum(entry.cost_nano or 0 for entry in entries) == provider.charged_nano
            for (_, texts), answer in zip(lists, answers, strict=True):
                if answer is not None:
                    want = np.stack([vector_of(text) for text in texts])
                    np.testing.assert_array_equal(answer.array, want)
            assert here.at_rest
        finally:
            await here.system.close()

    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(session(Path(scratch)))


async def ask(here: House, call: Call, provider: Counting) -> Answer | None:
    for _ in range(provider.dice.randrange(6)):
        await asyncio.sleep(0)
    try:
        return (await here.pipeline.answer(call)).answer
    except GatewayError:
        return None


async def test_who_comes_later_pays_nothing_for_what_is_there(
    house: Callable[..., Awaitable[House]],
) -> None:
    here = await house(enable_caching=True, max_retries=0)
    here.system.provider = provider = Counting(1, 0.0)
    first = Call("embedding", {"model": "e", "input": ["one", "two"]}, "acme", "req_1")
    later = Call("embedding", {"model": "e", "input": ["two", "three"]}, "acme", "req_2")
    again = Call("embedding", {"model": "e", "input": ["three", "one"]}, "acme", "req_3")
    for call in (first, later, again):
        await here.pipeline.answer(call)

    assert provider.texts == [["one", "two"], ["three"]]
    entries = [(await here.entries(call))[0] for call in (first, later, again)]
    assert sum(entry.cost_nano or 0 for entry in entries[:2]) == provider.charged_nano
    assert (entries[2].status, entries[2].cost_nano) == ("hit", 0)
