"""`forebay health`, against the HTTP app on a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deployments.http import build_asgi
from forebay import cli
from tests.support.scripted_service import Client, ScriptedService, keys_of

CHECKS = {
    "router": {"status": "healthy", "message": "every model has a deployment"},
    "circuit_breaker": {"status": "degraded", "message": "not closed: d-1", "open": {"d-1": {}}},
}


@dataclass
class Told(ScriptedService):
    """A service that is as the test says."""

    told: dict[str, Any] = field(default_factory=dict)

    async def health(self, detail: bool) -> dict[str, Any]:
        return self.told


@pytest.fixture
def service() -> Told:
    return Told(keys=keys_of(ops="fb-ops", acme="fb-acme", admins=("ops",)))


@pytest.fixture
def url(service: Told) -> Iterator[str]:
    app = build_asgi(service)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = dict(self.headers.items())
            answered = asyncio.run(Client(app).request("GET", self.path, b"", headers))
            self.send_response(answered.status)
            for name, value in answered.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answered.body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code"), [("healthy", 0), ("degraded", 0), ("unhealthy", 1), ("unknown", 1)]
)
def test_the_exit_code_says_whether_requests_are_served(
    service: Told, url: str, status: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    service.told = {"status": status, "message": "why", "details": {"checks": CHECKS}}

    assert cli.main(["health", "--url", url, "--key", "fb-ops", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == service.told


def test_people_read_one_line_for_each_check(
    service: Told, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.told = {"status": "degraded", "message": "…", "details": {"checks": CHECKS}}
    cli.main(["health", "--url", url, "--key", "fb-ops"])

    assert capsys.readouterr().out.splitlines() == [
        "degraded",
        "  router           healthy   every model has a deployment",
        "  circuit_breaker  degraded  not closed: d-1",
    ]


def test_where_nothing_is_monitored_it_says_so(
    service: Told, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.told = {"status": "unknown", "message": "monitoring is off", "details": {"checks": {}}}

    assert cli.main(["health", "--url", url, "--key", "fb-ops"]) == 1
    assert capsys.readouterr().out == "unknown: monitoring is off\n"


def test_a_tenant_is_told_that_it_takes_an_admin(
    service: Told, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["health", "--url", url, "--key", "fb-acme"]) == 1
    assert "admin" in capsys.readouterr().err
