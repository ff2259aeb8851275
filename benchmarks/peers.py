"""The projects that Forebay is compared with, each in an environment of its own under `.peers`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import Child

PEERS = Path(__file__).with_name(".peers")
LITELLM_PROXY = "litellm[proxy]==1.106.2"
MASTER_KEY = "sk-bench-master"


def install(name: str, requirements: Sequence[str]) -> Path:
    """The bin directory of the peer's environment, made on first use."""
    place = PEERS / name
    stamp = place / "installed"
    if stamp.exists() and stamp.read_text() == "\n".join(requirements):
        return place / "bin"
    shutil.rmtree(place, ignore_errors=True)
    PEERS.mkdir(exist_ok=True)
    print(f"installing {', '.join(requirements)} into {place}", file=sys.stderr, flush=True)
    uv = shutil.which("uv")
    python = str(place / "bin" / "python")
    if uv is not None:
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(place)], check=True)
        command = [uv, "pip", "install", "-q", "--python", python, *requirements]
    else:
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        command = [python, "-m", "pip", "install", "-q", *requirements]
    subprocess.run(command, check=True)
    stamp.write_text("\n".join(requirements))
    return place / "bin"


def litellm_proxy(
    upstream_url: str, port: int, scratch: Path, *, cache_ttl_s: int | None = None
) -> Child:
    """LiteLLM Proxy: one worker, one model, a master key, no database.

    With `cache_ttl_s` its in-memory cache is on, which holds 200 answers at most.
    """
    bin_dir = install("litellm-proxy", [LITELLM_PROXY])
    settings: dict[str, Any] = {"num_retries": 0, "telemetry": False}
    if cache_ttl_s is not None:
        settings |= {"cache": True, "cache_params": {"type": "local", "ttl": cache_ttl_s}}
    document = {
        "model_list": [
            {
                "model_name": "sim",
                "litellm_params": {
                    "model": "openai/sim",
                    "api_base": f"{upstream_url}/v1",
                    "api_key": "sk-upstream",
                },
            }
        ],
        "general_settings": {"master_key": MASTER_KEY},
        "litellm_settings": settings,
    }
    path = scratch / "litellm-proxy.yaml"
    path.write_text(yaml.safe_dump(document))
    command = [str(bin_dir / "litellm"), "--config", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1"]
    environ = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return Child(command, scratch / "litellm-proxy.log", environ)
