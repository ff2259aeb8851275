"""One Ray, one Forebay and one upstream for all system tests of a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import system as support
from tests.support.upstream import Upstream

SIM_KEY = "sk-simulated-key-that-must-never-be-seen"


def pytest_configure() -> None:
    """Whoever ends a run by SIGTERM, as `scripts/test` does, leaves no system behind either."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh_upstream(request: pytest.FixtureRequest) -> None:
    if "upstream" in request.fixturenames:
        request.getfixturevalue("upstream").reset()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forebay")


@pytest.fixture(scope="session")
def config_file(data_dir: Path, upstream: Upstream) -> Path:
    """What the session's Forebay runs with: the simulator's groups and the embedded models."""
    local = [
        {"model_name": "local-chat", "litellm_params": {"model": "local/smollm2-135m"}},
        {"model_name": "local-embed", "litellm_params": {"model": "local/wordllama-256"}},
    ]
    config: dict[str, Any] = {
        "model_list": local + support.groups(upstream.url),
        "fallbacks": [{"dead": ["sim"]}],
        "gateway": {
            "max_retries": 2,
            "retry_delay": 0.1,
            "circuit_breaker_config": {"failure_threshold": 5, "timeout": 1.0},
            "rate_limit_config": {
                "requests_per_minute": 600_000,
                "requests_per_hour": 10_000_000,
                "burst_size": 5_000,
                "concurrent_requests": 500,
            },
        },
        "server": {"port": support.free_port()},
    }
    path = data_dir / "forebay.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def up(data_dir: Path, config_file: Path) -> Iterator[support.UpProcess]:
    with support.UpProcess(
        data_dir, "--config", str(config_file), env={"SIM_KEY": SIM_KEY}
    ) as running:
        yield running


@pytest.fixture(scope="session")
def url(up: support.UpProcess) -> str:
    return up.url


@pytest.fixture(scope="session")
def ray_driver(up: support.UpProcess) -> Iterator[Any]:
    """This test process attached to the session's Ray, as a user's driver is."""
    for name in ("FOREBAY_DATA_DIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        os.environ[name] = up.env[name]
    os.environ["SIM_KEY"] = SIM_KEY
    import ray

    ray.init(address=up.ray_address, namespace="tests", log_to_driver=False)
    yield ray
    ray.shutdown()
