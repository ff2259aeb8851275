"""`forebay keys` and whose key the command uses, against the HTTP app on a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from actors.registry.owner import Registry
from actors.registry.policy import KeyRecord
from deployments.http import build_asgi
from forebay import cli, running
from forebay.config import SystemConfig, TenantConfig
from forebay.errors import ConfigurationError, InvalidRequest
from forebay.secrets import hash_key, operator_key
from tests.support.scripted_service import SECRET, Client, ScriptedService, keys_of

Run = Callable[..., "Done"]


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Gateway:
    """An app that is served, and the keys that callers sent."""

    url: str
    service: ScriptedService
    keys_seen: list[str | None]


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FOREBAY_API_KEY", "FOREBAY_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FOREBAY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("FOREBAY_KEY_SECRET", SECRET.decode())
    return tmp_path


@pytest.fixture
def run(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Done:
        try:
            code = cli.main(arguments)
        except SystemExit as end:  # argparse's own word
            code = int(end.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def gateway(data_dir: Path) -> Iterator[Gateway]:
    """A gateway with keys that was started with this data directory."""
    service = ScriptedService(keys=keys_of(acme="fb-acme", ops="fb-ops", admins=("ops",)))
    app, seen = build_asgi(service), []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            seen.append(self.headers.get("authorization"))
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = dict(self.headers.items())
            work = Client(app).request(self.command, self.path, body, headers)
            answered = asyncio.run(work)
            self.send_response(answered.status)
            for name, value in answered.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answered.body)

        do_GET = do_POST = do_DELETE = answer  # noqa: N815 (the library's names)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        running.write(data_dir, url, "", "forebay")
        yield Gateway(url, service, seen)
        running.erase(data_dir)
        server.shutdown()


# --- with a gateway ---------------------------------------------------------------------------


def test_a_new_key_is_made_where_the_gateway_runs(run: Run, gateway: Gateway) -> None:
    done = run("keys", "new", "acme", "--id", "ci", "--admin", "--model", "small",
               "--model", "big/*", "--limit", "requests_per_minute=600",
               "--limit", "enable_queuing=false")  # fmt: skip

    assert done.code == 0, done.err
    assert done.out.count("sk-fb-new") == 2  # shown, and in the curl line
    assert f"curl {gateway.url}/v1/models -H 'authorization: Bearer sk-fb-new'" in done.out
    assert gateway.service.queries == [
        {
            "tenant": "acme",
            "key_id": "ci",
            "admin": True,
            "limits": {"requests_per_minute": 600, "enable_queuing": False},
            "models": ["small", "big/*"],
        }
    ]


def test_a_new_key_as_json(run: Run, gateway: Gateway) -> None:
    made = json.loads(run("keys", "new", "acme", "--json").out)

    assert made["key"] == "sk-fb-new"
    assert made["id"] == gateway.service.queries[0]["key_id"]


def test_keys_are_listed(run: Run, gateway: Gateway) -> None:
    table, listed = run("keys", "list"), run("keys", "list", "--json")

    assert [line.split()[:3] for line in table.out.splitlines()] == [
        ["ID", "TENANT", "SOURCE"],
        ["ci", "acme", "config"],
        ["k1", "acme", "runtime"],
    ]
    assert [key["id"] for key in json.loads(listed.out)] == ["ci", "k1"]


def test_a_key_is_revoked(run: Run, gateway: Gateway) -> None:
    done = run("keys", "revoke", "k1")
    named = run("keys", "revoke", "k1", "--tenant", "b@x")

    assert (done.code, done.out) == (0, "revoked: key k1 of acme\n")
    assert named.out == "revoked: key k1 of b@x\n"
    assert gateway.service.queries[1] == {"key_id": "k1", "tenant": "b@x"}


def test_what_the_gateway_refuses_is_one_line(run: Run, gateway: Gateway) -> None:
    gateway.service.refusal = InvalidRequest("two tenants have this key", status=409)
    done = run("keys", "revoke", "ci")

    assert (done.code, done.err) == (1, "forebay: two tenants have this key\n")


# --- whose key --------------------------------------------------------------------------------


def test_the_operators_key_is_used_for_the_gateway_of_this_data(run: Run, gateway: Gateway) -> None:
    run("models")
    run("health")
    run("keys", "list", "--url", f"{gateway.url}/")

    assert gateway.keys_seen == [f"Bearer {operator_key(SECRET)}"] * 3


def test_nobody_else_is_sent_it(run: Run, gateway: Gateway) -> None:
    other = gateway.url.replace("127.0.0.1", "localhost")  # another address, for all we know
    done = run("keys", "list", "--url", other)

    assert gateway.keys_seen == [None]
    assert done.code == 1
    assert "--key or FOREBAY_API_KEY" in done.err


def test_a_key_that_is_given_goes_first(
    run: Run, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_API_KEY", "fb-acme")
    by_environment = run("keys", "list")
    by_flag = run("keys", "list", "--key", "fb-ops")

    assert gateway.keys_seen == ["Bearer fb-acme", "Bearer fb-ops"]
    assert (by_environment.code, by_flag.code) == (1, 0)
    assert "admin" in by_environment.err


@pytest.mark.parametrize("key", ["sk-fb-é", "sk-fb-a\nb"])
def test_a_key_that_no_header_holds_is_bad_usage(run: Run, gateway: Gateway, key: str) -> None:
    done = run("models", "--key", key)

    assert done.code == 2
    assert key not in done.err


# --- without one ------------------------------------------------------------------------------


def test_without_a_gateway_a_key_is_for_the_configuration(run: Run, data_dir: Path) -> None:
    done = run("keys", "new", "acme", "--id", "ci", "--model", "small", "--admin",
               "--limit", "burst_size=3")  # fmt: skip
    key = done.out.splitlines()[0].removeprefix("key (shown once): ")
    snippet = "".join(done.out.partition("  tenants:")[1:])
    tenant = SystemConfig(**yaml.safe_load(snippet)).gateway.tenants[0]

    assert done.code == 0
    assert isinstance(tenant, TenantConfig)
    assert (tenant.id, tenant.admin, tenant.models) == ("acme", True, ["small"])
    assert tenant.limits is not None
    assert tenant.limits.burst_size == 3
    assert tenant.keys[0].hash == hash_key(key, SECRET)


def test_without_a_gateway_json_tells_key_and_hash(run: Run) -> None:
    told = json.loads(run("keys", "new", "acme", "--json").out)

    assert told["hash"] == hash_key(told["key"], SECRET)
    assert told.keys() == {"tenant", "id", "key", "hash"}


def test_a_name_that_yaml_would_take_for_a_number_stays_a_name(run: Run) -> None:
    out = run("keys", "new", "0123", "--id", "1e3").out
    tenant = yaml.safe_load("".join(out.partition("  tenants:")[1:]))["tenants"][0]

    assert (tenant["id"], tenant["keys"][0]["id"]) == ("0123", "1e3")


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "k1")])
def test_what_only_a_gateway_can_do_says_so(run: Run, arguments: tuple[str, ...]) -> None:
    done = run("keys", *arguments, "--url", "http://127.0.0.1:9")

    assert done.code == 1
    assert "forebay up" in done.err


# --- bad usage --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("acme", "--limit", "requests_per_minute"), "NAME=VALUE"),
        (("acme", "--limit", "=5"), "NAME=VALUE"),
        (("acme", "--limit", "requests_per_minut=5"), "did you mean 'requests_per_minute'"),
        (("acme", "--limit", "requests_per_minute=many"), "must be a whole number"),
        (("acme", "--limit", "requests_per_minute=-1"), "at least 1"),
        (("acme", "--limit", "burst_size=1", "--limit", "burst_size=2"), "given twice"),
        (("a b",), "id: "),
        (("acme", "--id", "a/b"), "id: "),
        ((), "tenant"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    run: Run, gateway: Gateway, arguments: tuple[str, ...], words: str
) -> None:
    done = run("keys", "new", *arguments)

    assert done.code == 2
    assert words in done.err
    assert not gateway.keys_seen


# --- may `forebay up` be reached from elsewhere? ----------------------------------------------


async def _made_here(data_dir: Path) -> Registry:
    registry = Registry(str(data_dir / "registry.db"))
    await registry.add_key(KeyRecord("k1", "acme", "hmac-sha256:" + "0" * 64, False, 1))
    return registry


def test_a_key_in_the_configuration_is_one(run: Run, data_dir: Path) -> None:
    key = {"id": "k", "hash": "hmac-sha256:" + "0" * 64}
    document = {"tenants": [{"id": "acme", "keys": [key]}], "data_dir": str(data_dir)}
    config = SystemConfig.from_document(document)

    assert cli.has_keys(config, data_dir)
    assert not cli.has_keys(SystemConfig(data_dir=data_dir), data_dir)


async def test_a_key_that_was_made_at_run_time_is_one(data_dir: Path) -> None:
    await (await _made_here(data_dir)).close()

    assert cli.has_keys(SystemConfig(data_dir=data_dir), data_dir)


async def test_a_registry_that_another_system_has_is_told(data_dir: Path) -> None:
    registry = await _made_here(data_dir)
    with pytest.raises(ConfigurationError, match="the system runs"):
        await asyncio.to_thread(cli.has_keys, SystemConfig(data_dir=data_dir), data_dir)
    await registry.close()
