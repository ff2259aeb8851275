"""Ray Serve answering a constant, behind the HAProxy and the profile that Forebay uses.

    python -m benchmarks.noop --port 8100

What is left of a request's cost when the gateway itself costs nothing: the rig's own ceiling.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import threading
from typing import Any

from deployments import ingress

ANSWER = (
    b'{"id":"chatcmpl-0","object":"chat.completion","created":0,"model":"sim","choices":[{"index":'
    b'0,"message":{"role":"assistant","content":"nothing"},"finish_reason":"stop"}],"usage":'
    b'{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
)
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]


class NoOp:
    """One replica that reads the body and answers ANSWER."""

    def __serve_build_asgi_app__(self) -> Any:
        return answer


async def answer(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


def main() -> None:
    parser = argparse.ArgumentParser(prog="noop", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    ingress.prepare(os.environ)
    os.environ.setdefault("RAY_AUTH_MODE", "token")

    from ray.serve.schema import LoggingConfig

    ray: Any = importlib.import_module("ray")
    serve: Any = importlib.import_module("ray.serve")
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        logging_level=logging.ERROR,
    )
    try:
        serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": given.port}
        )
        deployment = serve.deployment(
            max_ongoing_requests=1000,
            ray_actor_options={"num_cpus": 0.1},
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        )(serve.ingress(None)(NoOp))
        serve.run(deployment.bind(), name="noop", route_prefix="/")
        over.wait()
        serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
