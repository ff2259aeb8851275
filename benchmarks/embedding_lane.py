"""Embedding calls in a loop, in one process: Forebay's LiteLLM lane, or `litellm.aembedding` bare.

python -m benchmarks.embedding_lane forebay --url http://127.0.0.1:9000/v1 -t 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels
from forebay.routing import Deployment
from tests.support.simulator.truth import vectors

MODEL = "openai/text-embedding-3-small"
DIMENSIONS = 1536
KEY = "sk-upstream"
WARMUP_S = 1.0

Embed = Callable[[list[str]], Awaitable[NDArray[np.float32]]]


def forebay(url: str) -> Embed:
    lane = LiteLLMProvider(InProcessModels())
    params = {"api_base": url, "api_key": KEY}
    deployment = Deployment(
        id="bench", group="bench", model=MODEL, provider="openai", params=params, info={}
    )

    async def embed(texts: list[str]) -> NDArray[np.float32]:
        asked = {"dimensions": DIMENSIONS}
        came = await lane.embed(deployment, texts, asked, timeout_s=60.0, resolve=dict)
        return came.array

    return embed


def litellm(url: str) -> Embed:
    import litellm

    async def embed(texts: list[str]) -> NDArray[np.float32]:
        came: Any = await litellm.aembedding(
            model=MODEL, input=texts, dimensions=DIMENSIONS, api_base=url, api_key=KEY
        )
        return np.array([one["embedding"] for one in came.data], dtype=np.float32)

    return embed


async def measure(embed: Embed, texts_per_call: int, seconds: float) -> dict[str, Any]:
    """One call after the other for `seconds`. Checking what came is not measured."""
    calls, wrong, cpu_s, took_s = 0, 0, 0.0, 0.0
    warm_until_s = time.perf_counter() + WARMUP_S
    while took_s < seconds:
        warm = time.perf_counter() >= warm_until_s and calls > 0
        calls += 1
        texts = [f"Text {n} of call {calls}, on forebays" for n in range(texts_per_call)]
        cpu_from_s, begun_s = time.process_time(), time.perf_counter()
        array = await embed(texts)
        if warm:
            cpu_s += time.process_time() - cpu_from_s
            took_s += time.perf_counter() - begun_s
        else:
            cpu_s = took_s = 0.0
            measured_from = calls
        wrong += not np.allclose(array, vectors(texts, DIMENSIONS), atol=1e-6)
    measured = (calls - measured_from) * texts_per_call
    return {
        "vectors": measured,
        "wrong": wrong,
        "vectors_per_s": measured / took_s,
        "vectors_per_cpu_s": measured / cpu_s,
        "ms_per_call": cpu_s / (calls - measured_from) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="embedding_lane", description=__doc__)
    parser.add_argument("lane", choices=("forebay", "litellm"))
    parser.add_argument("--url", required=True)
    parser.add_argument("-n", "--texts", type=int, default=128, help="texts per call")
    parser.add_argument("-t", "--seconds", type=float, default=5.0)
    given = parser.parse_args()
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    embed = (forebay if given.lane == "forebay" else litellm)(given.url)
    print(json.dumps(asyncio.run(measure(embed, given.texts, given.seconds))))


if __name__ == "__main__":
    main()
