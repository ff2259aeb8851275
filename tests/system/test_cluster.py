"""The deployment files: cluster.yaml's own start commands as two local nodes, and serve.yaml."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import SIM_KEY
from tests.support import system as support
from tests.support.upstream import Upstream

pytestmark = pytest.mark.ray
ROOT = support.ROOT


def cluster_file() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def test_the_cluster_file_is_valid_against_rays_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = cluster_file()
    validate_config(prepare_config(config))


def test_its_setup_command_is_the_readmes() -> None:
    assert any("scripts/setup" in command for command in cluster_file()["setup_commands"])
    assert (ROOT / "scripts/setup").stat().st_mode & 0o100


class Nodes:
    """Two Ray nodes on this machine, started by cluster.yaml's own commands.

    What is changed: `ray stop` is left out, since it would stop every Ray of this machine; ports
    are free ones; `--block` keeps each node a child of ours, to be ended by its pid.
    """

    def __init__(self, data_dir: Path, env: dict[str, str]) -> None:
        self.env = env
        self.data_dir = data_dir
        self.port = support.free_port()
        self.dashboard_port = support.free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        config = cluster_file()
        head = self._adapted(config["head_start_ray_commands"])
        head = re.sub(r" --autoscaling-config=\S+", "", head)
        head += f" --include-dashboard=true --dashboard-port={self.dashboard_port}"
        self._spawn(head)
        self._await_port()
        worker = self._adapted(config["worker_start_ray_commands"])
        self._spawn(worker + " --num-cpus=2")
        self._await_nodes(2)

    def _adapted(self, commands: list[str]) -> str:
        (start,) = [command for command in commands if "ray start" in command]
        return (
            start.replace("cd ~/forebay", f"cd {ROOT}")
            .replace(".venv/bin/", f"{Path(sys.executable).parent}/")
            .replace("--port=6379", f"--port={self.port}")
            .replace("$RAY_HEAD_IP:6379", f"127.0.0.1:{self.port}")
            + " --block --object-store-memory=100000000"
        )

    def _spawn(self, command: str) -> None:
        log = (self.data_dir / f"node-{len(self.processes)}.log").open("wb")
        self.processes.append(
            subprocess.Popen(
                ["sh", "-c", f"exec_it() {{ {command}; }}; exec_it"],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    def run(self, code: str, timeout_s: float = 120) -> str:
        """Python in a driver of its own, attached to this cluster."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**self.env, "RAY_ADDRESS": f"127.0.0.1:{self.port}"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def serve(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Serve's own command line, against this cluster's dashboard."""
        address = f"http://127.0.0.1:{self.dashboard_port}"
        return subprocess.run(
            [str(Path(sys.executable).parent / "serve"), *arguments, "-a", address],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def await_status(self, wanted: str) -> str:
        """Serve's report, once the application's status is `wanted`."""
        deadline = time.monotonic() + 120
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        with httpx.Client(headers={"authorization": f"Bearer {token}"}, timeout=30) as http:
            while True:
                told = http.get(f"http://127.0.0.1:{self.dashboard_port}/api/serve/applications/")
                if told.is_success and wanted in [
                    one["status"] for one in told.json()["applications"].values()
                ]:
                    break
                assert time.monotonic() < deadline, told.text
                time.sleep(0.1)
        return self.serve("status").stdout

    def _await_port(self) -> None:
        """Until a worker may join."""
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline, (self.data_dir / "node-0.log").read_text()
            time.sleep(0.1)

    def _await_nodes(self, count: int) -> None:
        code = (
            "import ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR')\n"
            "print(sum(n['Alive'] for n in ray.nodes()))"
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                if int(self.run(code).split()[-1]) >= count:
                    return
            except (AssertionError, ValueError):
                pass
            assert time.monotonic() < deadline, (self.data_dir / "node-0.log").read_text()
            time.sleep(0.5)

    def stop(self) -> None:
        for process in reversed(self.processes):
            os.killpg(process.pid, 15)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait(10)
        # `ray stop` would have done it: a pointer to a dead head makes the next driver wait for it.
        # In a process of its own: Ray remembers how to prove who it is from when it is first used.
        self.run(
            "from ray._common.utils import reset_ray_address\n"
            "from ray._private.utils import read_ray_address\n"
            f"if str(read_ray_address()).endswith(':{self.port}'): reset_ray_address()\n"
        )


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Nodes]:
    data_dir = tmp_path_factory.mktemp("cluster")
    server = {"port": support.free_port(), "replicas": "auto"}
    config = {"model_list": support.groups(upstream.url), "server": server}
    (data_dir / "forebay.yaml").write_text(yaml.safe_dump(config))
    made = Nodes(data_dir, support.environment(data_dir, SIM_KEY=SIM_KEY))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def deploy(nodes: Nodes, name: str, **http_options: Any) -> int:
    """`serve deploy` of serve.yaml with another address and a configuration. The port."""
    config = nodes.data_dir / "forebay.yaml"
    spec = yaml.safe_load((ROOT / "serve.yaml").read_text())
    spec["http_options"] |= {
        "port": yaml.safe_load(config.read_text())["server"]["port"],
        **http_options,
    }
    spec["applications"][0]["args"] = {"config": str(config)}
    path = nodes.data_dir / name
    path.write_text(yaml.safe_dump(spec))
    done = nodes.serve("deploy", str(path))
    assert done.returncode == 0, done.stderr
    return int(spec["http_options"]["port"])


def test_serve_deploy_on_a_public_address_without_keys_is_refused(nodes: Nodes) -> None:
    deploy(nodes, "public.yaml", host="0.0.0.0")
    report = nodes.await_status("DEPLOY_FAILED")
    stopped = nodes.serve("shutdown", "-y")

    assert "no tenant has a key" in report
    assert stopped.returncode == 0


def test_two_nodes_answer_and_a_task_on_the_other_node_uses_the_gateway(
    nodes: Nodes, upstream: Upstream
) -> None:
    port = deploy(nodes, "serve.yaml")
    nodes.await_status("RUNNING")
    body = {"model": "sim", "messages": [{"role": "user", "content": "Hello, cluster"}]}
    deadline = time.monotonic() + 60
    while True:
        response = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=30)
        if response.status_code == 200 or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert response.status_code == 200, response.text

    told = json.loads(
        nodes.run(
            """
import json, ray
ray.init(address='auto', log_to_driver=False)
head = next(n['NodeID'] for n in ray.nodes() if n['Resources'].get('forebay_owner'))

@ray.remote(num_cpus=0.1)
def ask():
    from forebay import LiteLLMGateway
    with LiteLLMGateway() as gateway:
        text = gateway.generate('From a task', model='sim').text
    return text, ray.get_runtime_context().get_node_id()

text, node = ray.get(ask.remote())
from ray._private.state import actors
where = {}
for name in ('registry', 'ledger', 'cache', 'batcher', 'circuit-breaker', 'rate-limiter-0'):
    actor = ray.get_actor(name, namespace='forebay')
    where[name] = actors(actor._actor_id.hex())['Address']['NodeID']
print(json.dumps({'text': text, 'task_node': node, 'head': head, 'owners': where}))
"""
        ).splitlines()[-1]
    )

    assert told["text"]
    assert told["task_node"] != told["head"]
    assert set(told["owners"].values()) == {told["head"]}
