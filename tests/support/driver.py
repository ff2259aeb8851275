"""A Ray driver in a process of its own, told what to do by lines of JSON.

A test process can be attached to one Ray only; this is how a test reaches the owners, and runs
tasks, of a second system.

    with Driver(up) as driver:
        driver.kill("registry", for_good=True)
        pids = driver.storm("acme", go=go, stop=stop)

`python -m tests.support.driver` is the child. Its times are CLOCK_MONOTONIC, which is one clock for
all processes of a machine: they compare with those in the simulator's log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.stdin_child import StdinChild

NAMESPACE = "forebay"
ANSWER_S = 120.0
PROBE_S = 0.05
PROBE_TIMEOUT_S = 1.0
READY_S = 90.0
GONE_S = 10.0
ROOT = Path(__file__).resolve().parents[2]


class Driver(StdinChild):
    """Owns one driver process. Every call waits for its answer, ANSWER_S at most.

    Failure behaviour: what fails in the child is raised here as AssertionError with its words.
    """

    def __init__(self, address: str, env: dict[str, str]) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.driver"],
            cwd=ROOT,
            env={**env, "RAY_ADDRESS": address},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._call("ready")

    def _call(self, verb: str, **arguments: Any) -> Any:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with self._lock:
            guard = threading.Timer(arguments.pop("answer_s", ANSWER_S), process.kill)
            guard.start()
            try:
                process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            finally:
                guard.cancel()
        assert line, f"the driver died or took too long over {verb!r}"
        answer = json.loads(line)
        assert "error" not in answer, f"{verb}: {answer.get('error')}"
        return answer["value"]

    def kill(self, owner: str, *, for_good: bool) -> float:
        """Kill an owner; the moment at which it was told."""
        return float(self._call("kill", owner=owner, for_good=for_good))

    def back(self, owner: str, timeout_s: float = 30.0) -> float:
        """Wait until the owner answers; the moment at which it did."""
        return float(self._call("back", owner=owner, timeout_s=timeout_s))

    def pid(self, owner: str) -> int:
        return int(self._call("pid", owner=owner))

    def watch(self, owner: str) -> None:
        """Begin to ask the owner every 50 ms whether it is there."""
        self._call("watch", owner=owner)

    def outages(self) -> list[tuple[float, float]]:
        """The times in which it was not: from the last answer before to the first one after."""
        return [(begin, end) for begin, end in self._call("outages")]

    def storm(
        self, tenant: str, model: str, warm: str, go: Path, stop: Path, *, tasks: int, callers: int
    ) -> list[int]:
        """Start so many Ray tasks, each asking from so many callers from `go` to `stop`.

        Returns their process ids once all are warm: each has had an answer, as tenant `warm`.
        """
        return list(
            self._call(
                "storm", tenant=tenant, model=model, warm=warm, go=str(go), stop=str(stop),
                tasks=tasks, callers=callers,
            )
        )  # fmt: skip

    def results(self) -> list[dict[str, int]]:
        """What came of the storm, task by task: answers by the error's class, or "ok"."""
        return list(self._call("results"))

    def crowd(self, count: int) -> list[int]:
        """Start so many Ray actors with a gateway each; their process ids."""
        return list(self._call("crowd", count=count))

    def crowd_asks(
        self, what: str, given: Any, *, tenant: str, model: str, each: int, only: int | None = None
    ) -> None:
        """Each actor of the crowd, or `only` this one, asks the same so often at once.

        `what` is asked for: "answer" or "stream" of a prompt, or "vectors" of lists of texts, the
        n-th caller's of which is `given[n]`.
        """
        self._call(
            "crowd_asks", what=what, given=given, tenant=tenant, model=model, each=each, only=only
        )

    def crowd_heard(self) -> list[dict[str, Any]]:
        """What each caller of the crowd got: `ok` or an `error`; its text or vectors; when it began
        and when the first of it came (CLOCK_MONOTONIC)."""
        return list(self._call("crowd_heard"))

    def victim(self, tenant: str, model: str, prompt: str) -> int:
        """A Ray task that asks once; its process id, so that it can be killed meanwhile."""
        return int(self._call("victim", tenant=tenant, model=model, prompt=prompt))

    def asked(self, owner: str, method: str, *arguments: Any) -> Any:
        """An owner's answer, JSON-able."""
        return self._call("ask", owner=owner, method=method, arguments=arguments)


# ------------------------------------------------------------------------------------ the child


class Child:
    """What the driver process does for each verb."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._storm: list[Any] = []
        self._crowd: list[Any] = []
        self._asking: list[Any] = []
        self._victims: list[Any] = []
        self._watching: threading.Thread | None = None
        self._watched_until: threading.Event = threading.Event()
        self._outages: list[tuple[float, float]] = []

    def ready(self) -> bool:
        return True

    def _handle(self, owner: str) -> Any:
        return self._ray.get_actor(owner, namespace=NAMESPACE)

    def kill(self, owner: str, for_good: bool) -> float:
        pid = self.pid(owner)
        at_s = time.monotonic()
        self._ray.kill(self._handle(owner), no_restart=for_good)
        while _lives(pid):  # until then it might still answer
            if time.monotonic() > at_s + GONE_S:
                raise TimeoutError(f"{owner} lives on")
            time.sleep(0.005)
        return at_s

    def back(self, owner: str, timeout_s: float) -> float:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._ray.get(self._handle(owner).protocol.remote(), timeout=PROBE_TIMEOUT_S)
                return time.monotonic()
            except (ValueError, self._ray.exceptions.RayError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(PROBE_S / 2)

    def pid(self, owner: str) -> int:
        found = self._handle(owner).__ray_call__.remote(lambda _: os.getpid())
        return int(self._ray.get(found, timeout=10))

    def ask(self, owner: str, method: str, arguments: list[Any]) -> Any:
        return self._ray.get(getattr(self._handle(owner), method).remote(*arguments), timeout=10)

    def watch(self, owner: str) -> None:
        self._outages.clear()
        self._watched_until.clear()
        self._watching = threading.Thread(target=self._probe, args=(owner,), daemon=True)
        self._watching.start()

    def _probe(self, owner: str) -> None:
        well_s, away = time.monotonic(), False
        while not self._watched_until.is_set():
            asked_s = time.monotonic()
            try:
                self._ray.get(self._handle(owner).protocol.remote(), timeout=PROBE_TIMEOUT_S)
            except (ValueError, self._ray.exceptions.RayError):
                away = True
            else:
                now_s = time.monotonic()
                if away or now_s - asked_s > PROBE_TIMEOUT_S / 2:
                    self._outages.append((well_s, now_s))
                well_s, away = now_s, False
            time.sleep(PROBE_S)
        if away:
            self._outages.append((well_s, time.monotonic()))

    def outages(self) -> list[tuple[float, float]]:
        self._watched_until.set()
        if self._watching is not None:
            self._watching.join(10)
        return self._outages

    def storm(
        self, tenant: str, model: str, warm: str, go: str, stop: str, tasks: int, callers: int
    ) -> list[int]:
        ready = [Path(f"{go}.ready-{number}") for number in range(tasks)]
        hammer = self._ray.remote(num_cpus=0.05, max_retries=0)(_hammer)
        self._storm = [
            hammer.remote(tenant, model, warm, go, stop, str(path), callers) for path in ready
        ]
        return [int(text) for text in _await_files(ready, READY_S)]

    def results(self) -> list[dict[str, int]]:
        found: list[dict[str, int]] = self._ray.get(self._storm, timeout=90)
        return found

    def crowd(self, count: int) -> list[int]:
        caller = self._ray.remote(num_cpus=0.05)(_Caller)
        self._crowd = [caller.remote() for _ in range(count)]
        return list(self._ray.get([one.ready.remote() for one in self._crowd], timeout=READY_S))

    def crowd_asks(self, only: int | None, each: int, given: Any, **asked: Any) -> None:
        asking = self._crowd if only is None else [self._crowd[only]]
        lists = asked["what"] == "vectors"
        self._asking = [
            one.ask.remote(given=given[number * each :] if lists else given, each=each, **asked)
            for number, one in enumerate(asking)
        ]

    def crowd_heard(self) -> list[dict[str, Any]]:
        found: list[list[dict[str, Any]]] = self._ray.get(self._asking, timeout=90)
        return [one for told in found for one in told]

    def victim(self, tenant: str, model: str, prompt: str) -> int:
        path = Path(f"/tmp/forebay-victim-{os.getpid()}-{len(self._victims)}")
        ask = self._ray.remote(num_cpus=0.05, max_retries=0)(_ask_once)
        self._victims.append(ask.remote(tenant, model, prompt, str(path)))
        (text,) = _await_files([path], READY_S)
        path.unlink()
        return int(text)


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _await_files(paths: list[Path], timeout_s: float) -> list[str]:
    deadline = time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {timeout_s} s: {paths}")
        time.sleep(0.05)
    return [path.read_text() for path in paths]


def _ask_once(tenant: str, model: str, prompt: str, ready: str) -> str:
    """A Ray task: warms up, says who it is, then asks once."""
    import os
    from pathlib import Path

    from forebay import LiteLLMGateway

    with LiteLLMGateway(runtime="ray") as gateway:
        gateway.generate("warming up", model="sim", tenant_id="free")
        part = Path(f"{ready}.part")
        part.write_text(str(os.getpid()))
        part.rename(ready)
        return str(gateway.generate(prompt, model=model, tenant_id=tenant).text)


class _Caller:
    """A Ray actor that asks, through a gateway of its own."""

    async def ready(self) -> int:
        from forebay import LiteLLMGateway

        self._gateway: Any = LiteLLMGateway(runtime="ray")
        await self._gateway.generate_async(f"warming {os.getpid()}", model="sim", tenant_id="free")
        return os.getpid()

    async def ask(
        self, what: str, given: Any, tenant: str, model: str, each: int
    ) -> list[dict[str, Any]]:
        import asyncio

        asked = {"model": model, "tenant_id": tenant}
        callers = (
            self._vectors(given[place], asked)
            if what == "vectors"
            else self._stream(given, asked)
            if what == "stream"
            else self._answer(given, asked)
            for place in range(each)
        )
        heard: list[dict[str, Any] | BaseException]
        heard = await asyncio.gather(*callers, return_exceptions=True)
        return [
            {"ok": False, "error": repr(one)} if isinstance(one, BaseException) else one
            for one in heard
        ]

    async def _vectors(self, texts: list[str], asked: dict[str, Any]) -> dict[str, Any]:
        answer = await self._gateway.embed_async(texts, **asked)
        return {"ok": True, "vectors": answer.array.tolist()}

    async def _answer(self, prompt: str, asked: dict[str, Any]) -> dict[str, Any]:
        answer = await self._gateway.generate_async(prompt, **asked)
        return {"ok": True, "text": answer.text}

    async def _stream(self, prompt: str, asked: dict[str, Any]) -> dict[str, Any]:
        begun_s, first_s, text = time.monotonic(), 0.0, ""
        async for piece in await self._gateway.generate_async(prompt, stream=True, **asked):
            first_s = first_s or time.monotonic()
            text += piece
        return {"ok": True, "text": text, "begun_s": begun_s, "first_s": first_s}


def _hammer(
    tenant: str, model: str, warm: str, go: str, stop: str, ready: str, callers: int
) -> dict[str, int]:
    """A Ray task: asks as fast as it may, from `go` to `stop`, its pid in every prompt."""
    import asyncio
    import os
    import time
    from collections import Counter
    from pathlib import Path

    from forebay import LiteLLMGateway, errors

    outcomes: Counter[str] = Counter()
    pid = os.getpid()
    deadline = time.monotonic() + 1800.0

    async def over(path: Path) -> None:
        while not path.exists() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def caller(gateway: LiteLLMGateway, number: int) -> None:
        asked = 0
        while time.monotonic() < deadline:
            asked += 1
            try:
                prompt = f"pid={pid} caller={number} asked={asked}"
                await gateway.generate_async(prompt, model=model, tenant_id=tenant, timeout=20)
                outcomes["ok"] += 1
            except errors.GatewayError as error:
                outcomes[type(error).__name__] += 1
                await asyncio.sleep(min(error.retry_after_s or 0.1, 0.25))

    async def main() -> None:
        async with LiteLLMGateway(runtime="ray") as gateway:
            await gateway.generate_async(f"warming {pid}", model=model, tenant_id=warm)
            part = Path(f"{ready}.part")
            part.write_text(str(pid))
            part.rename(ready)
            await over(Path(go))
            running = [asyncio.create_task(caller(gateway, n)) for n in range(callers)]
            await over(Path(stop))
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    asyncio.run(main())
    return dict(outcomes)


def main() -> None:
    """Answer every line with a line: {"value": …} or {"error": …}."""
    import ray

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints must not look like an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ray.init(address=os.environ["RAY_ADDRESS"], namespace="tests", log_to_driver=False)
    child = Child(ray)
    for line in sys.stdin:
        asked = json.loads(line)
        verb: Callable[..., Any] = getattr(child, asked.pop("verb"))
        try:
            answer = {"value": verb(**asked)}
        except Exception as error:  # noqa: BLE001 - it is told to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()
    ray.shutdown()


if __name__ == "__main__":
    main()
