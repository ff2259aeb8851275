"""Ray Data's own HttpRequestProcessor over a Parquet file: one request a row.

python -m benchmarks.http_request_job SRC --url http://127.0.0.1:9000/v1/embeddings --rows 400
"""

from __future__ import annotations

import argparse
import os
from typing import Any

CPUS = 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="http_request_job", description=__doc__)
    parser.add_argument("src")
    parser.add_argument("--url", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dimensions", type=int, required=True)
    parser.add_argument("-c", "--concurrency", type=int, default=4, help="workers")
    given = parser.parse_args()
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    import ray
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    dimensions = given.dimensions

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        return {"payload": {"model": "sim", "input": row["text"], "dimensions": dimensions}}

    def told(row: dict[str, Any]) -> dict[str, Any]:
        return {"vector": row["http_response"]["data"][0]["embedding"]}

    config = HttpRequestProcessorConfig(
        url=given.url, concurrency=given.concurrency, batch_size=max(1, given.rows // 16)
    )
    rows = ray.data.read_parquet(given.src).limit(given.rows)
    done = build_processor(config, preprocess=asked, postprocess=told)(rows)
    lengths = {len(row["vector"]) for row in done.take_all()}
    if lengths != {dimensions}:
        raise SystemExit(f"vectors of {lengths} numbers came")


if __name__ == "__main__":
    main()
