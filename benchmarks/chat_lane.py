"""Chat completions in a loop, in one process: `litellm.acompletion` bare, or a lane of Forebay's.

python -m benchmarks.chat_lane bare --url http://127.0.0.1:9000/v1 -c 8 -t 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.apart import ms_at
from forebay.errors import GatewayError
from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels
from forebay.providers.relay.lanes import Lanes
from forebay.routing import Deployment

PROMPT = "Question %s: what does a forebay do for the turbines behind it?"
KEY = "sk-upstream"
TIMEOUT_S = 60.0
WARMUP = 100

Ask = Callable[[list[dict[str, str]]], Awaitable[bool]]
"""One call; whether an answer came."""


def bare(url: str) -> Ask:
    import litellm

    async def ask(messages: list[dict[str, str]]) -> bool:
        try:
            await litellm.acompletion(
                model="openai/sim",
                api_base=url,
                api_key=KEY,
                messages=messages,
                max_tokens=64,
                num_retries=0,
                max_retries=0,
            )
        except litellm.exceptions.APIError:
            return False
        return True

    return ask


def forebay(url: str, *, relay: bool) -> Ask:
    litellm = LiteLLMProvider(InProcessModels())
    lane = Lanes(litellm) if relay else litellm
    params = {"api_base": url, "api_key": KEY}
    deployment = Deployment(
        id="bench", group="bench", model="openai/sim", provider="openai", params=params, info={}
    )

    async def ask(messages: list[dict[str, str]]) -> bool:
        body = {"model": "bench", "messages": messages, "max_tokens": 64}
        try:
            await lane.chat(deployment, body, timeout_s=TIMEOUT_S, resolve=dict)
        except GatewayError:
            return False
        return True

    return ask


async def measure(ask: Ask, concurrency: int, seconds: float) -> dict[str, Any]:
    """A closed loop of `concurrency` callers for `seconds`, after WARMUP calls."""
    run_id = uuid.uuid4().hex[:12]
    latencies_s: list[float] = []
    failed = 0
    sent = 0

    async def call() -> None:
        nonlocal sent, failed
        sent += 1
        content = PROMPT % f"{run_id}-{sent:09d}"
        begun_s = time.perf_counter()
        failed += not await ask([{"role": "user", "content": content}])
        latencies_s.append(time.perf_counter() - begun_s)

    async def caller(until_s: float) -> None:
        while time.perf_counter() < until_s:
            await call()

    for _ in range(WARMUP):
        await call()
    latencies_s.clear()
    failed = 0
    cpu_from_s = time.process_time()
    begun_s = time.perf_counter()
    await asyncio.gather(*(caller(begun_s + seconds) for _ in range(concurrency)))
    took_s = time.perf_counter() - begun_s
    cpu_s = time.process_time() - cpu_from_s
    ordered = sorted(latencies_s)
    return {
        "requests": len(ordered),
        "sent": sent,
        "failed": failed,
        "requests_per_s": len(ordered) / took_s,
        "p50_ms": ms_at(ordered, 0.5),
        "p99_ms": ms_at(ordered, 0.99),
        "cpu_s": cpu_s,
    }


async def run(given: argparse.Namespace) -> dict[str, Any]:
    if given.lane == "bare":
        ask = bare(given.url)
    else:
        ask = forebay(given.url, relay=given.lane == "relay")
    return await measure(ask, given.concurrency, given.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="chat_lane", description=__doc__)
    parser.add_argument("lane", choices=("bare", "litellm", "relay"))
    parser.add_argument("--url", required=True)
    parser.add_argument("-c", "--concurrency", type=int, default=1)
    parser.add_argument("-t", "--seconds", type=float, default=10.0)
    given = parser.parse_args()
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ.setdefault("DEFAULT_MAX_RETRIES", "0")
    print(json.dumps(asyncio.run(run(given))))


if __name__ == "__main__":
    main()
