"""Processes that attach to a system and keep asking, forked in a second from one that imported all.

    with Herd(up.env) as herd:          # imports in the background while the system starts
        herd.attach(up.ray_address)
        pids = herd.start(3, model="sim-heal", tenant="free")
        os.kill(pids[0], signal.SIGKILL)

Each says its process id in every prompt, so that the simulator's log tells whose call it was.
`python -m tests.support.herd` is the one that forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.stdin_child import StdinChild

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60.0
PAUSE_S = 0.02
CALL_S = 20.0


class Herd(StdinChild):
    """Owns one forking process and its children, which end with it or with this process.

    Failure behaviour: a child that does not get ready within READY_S fails `start`; one that is
    killed is gone, and nobody takes its place.
    """

    stop_s = 10.0

    def __init__(self, env: dict[str, str]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="herd-")
        self._address = ""
        self._made = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.herd"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def attach(self, address: str) -> None:
        """The Ray that children are to join."""
        self._address = address

    def start(self, count: int, *, model: str, tenant: str) -> list[int]:
        """So many more children; their process ids once each has had an answer."""
        ready = []
        for _ in range(count):
            self._made += 1
            ready.append(Path(self._scratch.name, str(self._made)))
            self._tell(address=self._address, model=model, tenant=tenant, ready=str(ready[-1]))
        deadline = time.monotonic() + READY_S
        while not all(path.exists() for path in ready):
            assert time.monotonic() < deadline, "a process of the herd did not get ready"
            time.sleep(0.02)
        return [int(path.read_text()) for path in ready]

    def close(self) -> None:
        super().close()
        self._scratch.cleanup()

    def _tell(self, **words: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()


# -------------------------------------------------------------------------------- the processes


def main() -> None:
    """Import, then fork a child for every line until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    import litellm  # noqa: F401 - what takes long, before there are threads
    import ray  # noqa: F401

    import forebay  # noqa: F401

    children = []
    for line in sys.stdin:
        words = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _child(words)
            os._exit(0)
        children.append(pid)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _child(words: dict[str, str]) -> None:
    import asyncio

    os.environ["RAY_ADDRESS"] = words["address"]
    asyncio.run(_ask_for_ever(words["model"], words["tenant"], Path(words["ready"])))


async def _ask_for_ever(model: str, tenant: str, ready: Path) -> None:
    """Ask, one call at a time, until killed or left alone by the parent."""
    import asyncio

    from forebay import LiteLLMGateway, errors

    parent, pid, asked = os.getppid(), os.getpid(), 0
    async with LiteLLMGateway(runtime="ray") as gateway:
        await gateway.generate_async(f"warming {pid}", model="sim", tenant_id=tenant)
        part = ready.with_suffix(".part")
        part.write_text(str(pid))
        part.rename(ready)
        while os.getppid() == parent:
            asked += 1
            with contextlib.suppress(errors.GatewayError):
                await gateway.generate_async(
                    f"pid={pid} asked={asked}", model=model, tenant_id=tenant, timeout=CALL_S
                )
            await asyncio.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
