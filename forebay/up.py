"""Starting a whole system from one process, and stopping just what was started.

Ray, the owners and Serve start side by side where they can: on two cores most of the time goes into
a dozen Python processes importing Ray.
"""

from __future__ import annotations

import http.client
import importlib
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from forebay.config import SystemConfig
from forebay.errors import GatewayError
from forebay.routing import ModelTable

READY_TIMEOUT_S = 180.0
APP_MODULE = "deployments.app"
POLL_S = 0.05
OBJECT_STORE_BYTES = 256 * 1024 * 1024


class Up:
    """One started system. Leaving the context drains and stops what `start` started.

    Failure behaviour: a start that fails raises one sentence that says what to do, and what had
    been started by then is stopped all the same.
    """

    def __init__(
        self, config: SystemConfig, address: str | None, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._say = say
        self._undo: list[tuple[str, Callable[[], Any]]] = []
        self._doors: list[socket.socket] = []
        self.namespace = "forebay"
        self.url = f"http://{_reachable(config.server.host)}:{config.server.port}"
        self.models = ModelTable.build(config.gateway).names()
        self.ray_address = ""
        self.took_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as all_of_them:  # each, even where another one fails
            for words, undo in self._undo:
                all_of_them.callback(undo)
                all_of_them.callback(self._say, words)
            self._undo.clear()
        for door in self._doors:
            door.close()

    def start(self, stop: threading.Event) -> None:
        """Start everything, returning early when `stop` is set.

        Raises:
            GatewayError: something does not start; the message says what to do.
        """
        begun_s = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            self._start_ray(threads)
            if stop.is_set():
                return
            owners = threads.submit(self._start_owners)
            self._say("starting the owners, and Ray Serve")
            serving = threads.submit(self._start_serve)
            owners.result()
            self._say("owners are up")
            # Serve's controller comes first, then its proxies; a replica need not wait for those.
            while not (_serve_runs() or serving.done()):
                time.sleep(POLL_S)
            if stop.is_set():
                return
            deploying = threads.submit(self._deploy)
            serving.result()
            self._say("Ray Serve is up")
            self._await_ready(deploying, stop)
        self.took_s = time.monotonic() - begun_s

    def _start_owners(self) -> None:
        from actors import spawn
        from forebay.system import boot_of, create_owners, remove_owners

        if spawn.read_boot(self.namespace) is None:
            boot = boot_of(self._config, self.namespace)
            # Before they exist, so that those made before a failure are stopped too; and to be
            # done after Serve has stopped, when nobody needs them any more.
            self._undo.insert(1, ("stopping the owners", lambda: remove_owners(boot)))
        create_owners(self._config, self.namespace)

    def _start_ray(self, threads: ThreadPoolExecutor) -> None:
        ingress = importlib.import_module("deployments.ingress")
        if self._address is None:
            self._doors = ingress.prepare(os.environ)
            # Ray listens beyond loopback, whatever it is told; so it asks for a token.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            # Its import takes as long as Ray's processes take to start; it fits in between.
            threads.submit(importlib.import_module, APP_MODULE)
        from forebay.system import ray_ready

        self._say("starting Ray" if self._address is None else f"attaching to {self._address}")
        options = {
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "configure_logging": True,
            "logging_level": "ERROR",
        }
        started = ray_ready(self._address, self.namespace, alone=self._address is None, **options)
        import ray

        self.ray_address = ray.get_runtime_context().gcs_address
        self._undo.append(("stopping Ray" if started else "leaving Ray", ray.shutdown))
        if not started:
            self._adopt_profile()

    def _adopt_profile(self) -> None:
        """Use the Serve profile that the running Ray was started with; it cannot be changed now."""
        import ray

        @ray.remote(num_cpus=0)
        def profile() -> dict[str, str]:
            return {k: v for k, v in os.environ.items() if k.startswith("RAY_SERVE_")}

        theirs = ray.get(profile.remote())
        os.environ.update(theirs)
        if theirs.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
            self._say("this Ray was started without the ingress profile: HTTP is slower (see docs)")

    def _start_serve(self) -> None:
        from ray import serve

        if not _serve_runs():
            self._undo.append(("stopping Ray Serve", serve.shutdown))
        server = self._config.server
        serve.start(
            proxy_location="HeadOnly" if self._address is None else "EveryNode",
            http_options={"host": server.host, "port": server.port},
        )

    def _deploy(self) -> None:
        from ray import serve

        app = importlib.import_module(APP_MODULE)
        if app.APP not in serve.status().applications:
            self._undo.append(("draining the gateway", lambda: serve.delete(app.APP)))
        fleet = app.fleet_of(self._config)
        self._say(f"starting the gateway: {fleet.why}")
        gateway = app.application(self._config, self.namespace, fleet)
        try:
            serve.run(gateway, name=app.APP, route_prefix="/")
        except RuntimeError as error:
            raise GatewayError(f"the gateway did not start: {_why(app.APP) or error}") from None

    def _await_ready(self, deploying: Future[None], stop: threading.Event) -> None:
        """Until the gateway answers over HTTP; Serve's own word comes later than that."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not stop.is_set():
            if deploying.done():
                deploying.result()
            if _answers(f"{self.url}/health/ready"):
                return
            if time.monotonic() > deadline_s:
                raise GatewayError(
                    f"the gateway does not answer at {self.url} after {READY_TIMEOUT_S:.0f} s; "
                    "Ray's logs say why (`ray logs`, or /tmp/ray/session_latest/logs/serve)"
                )
            time.sleep(POLL_S)


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # whatever HTTP_PROXY says
    try:
        with direct.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
        return False


def _why(name: str) -> str:
    """The last line of what a failed deployment left behind: its error."""
    from ray import serve

    deployments = serve.status().applications[name].deployments.values()
    failed = [d.message for d in deployments if d.status.endswith("FAILED") and d.message]
    lines = [line.strip() for message in failed for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "errors." in line]
    return (errors or lines or [""])[-1]


def _reachable(host: str) -> str:
    """The host that a client on this machine uses for a server bound to `host`."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"[{host}]" if ":" in host else host


def _serve_runs() -> bool:
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True
