"""`litellm.acompletion` in a loop: one process, one core, nothing around it.

python -m benchmarks.bare_litellm --url http://127.0.0.1:9000/v1 -c 8 -t 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import uuid
from typing import Any

PROMPT = "Question %s: what does a forebay do for the turbines behind it?"


async def measure(url: str, concurrency: int, seconds: float, warmup: int) -> dict[str, Any]:
    """A closed loop of `concurrency` callers for `seconds`, after `warmup` calls."""
    import litellm

    run_id = uuid.uuid4().hex[:12]
    latencies_s: list[float] = []
    failed = 0
    sent = 0

    async def call() -> None:
        nonlocal sent, failed
        sent += 1
        content = PROMPT % f"{run_id}-{sent:09d}"
        begun_s = time.perf_counter()
        try:
            await litellm.acompletion(
                model="openai/sim",
                api_base=url,
                api_key="sk-upstream",
                messages=[{"role": "user", "content": content}],
                max_tokens=64,
                num_retries=0,
                max_retries=0,
            )
        except litellm.exceptions.APIError:
            failed += 1
        latencies_s.append(time.perf_counter() - begun_s)

    async def caller(until_s: float) -> None:
        while time.perf_counter() < until_s:
            await call()

    for _ in range(warmup):
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
        "p50_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000,
        "cpu_s": cpu_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bare_litellm", description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("-c", "--concurrency", type=int, default=1)
    parser.add_argument("-t", "--seconds", type=float, default=10.0)
    parser.add_argument("--warmup", type=int, default=100)
    given = parser.parse_args()
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ.setdefault("DEFAULT_MAX_RETRIES", "0")
    result = asyncio.run(measure(given.url, given.concurrency, given.seconds, given.warmup))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
