"""Who is asking: keys, their tenants, and one answer for everybody else."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.http import Keys, TenantIdentity, build_asgi
from forebay.errors import ConfigurationError
from tests.support.scripted_service import (
    SECRET,
    Answered,
    Client,
    Key,
    ScriptedService,
    Tenant,
    keys_of,
)

CHAT = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
KEYS = keys_of(acme="fb-acme", ops="fb-ops", admins=("ops",))


async def asked(headers: dict[str, str], keys: Keys = KEYS) -> tuple[Answered, ScriptedService]:
    service = ScriptedService(keys=keys)
    answered = await Client(build_asgi(service)).post("/v1/chat/completions", CHAT, **headers)
    return answered, service


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer fb-acme"},
        {"authorization": "bearer  fb-acme "},
        {"x-api-key": "fb-acme"},
    ],
)
async def test_a_key_decides_the_tenant(headers: dict[str, str]) -> None:
    answered, service = await asked({**headers, "x-tenant-id": "other"})

    assert answered.status == 200
    assert service.calls[0].tenant == "acme"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer fb-unknown"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer"},
        {"authorization": "Basic fb-acme"},
        {"authorization": "fb-acme"},
        {"authorization": "Bearer FB-ACME"},
        {"authorization": "Bearer " + "k" * 5000},
        {"authorization": "Bearer fb-acmé"},
        {"authorization": "Bearer ' OR 1=1 --"},
        {"x-api-key": ""},
        {"x-tenant-id": "acme"},
    ],
)
async def test_every_other_caller_gets_the_same_401(headers: dict[str, str]) -> None:
    answered, service = await asked(headers)

    assert answered.status == 401
    assert answered.headers["www-authenticate"] == "Bearer"
    assert answered.error == {
        "message": "Incorrect or missing API key.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert not service.calls


async def test_the_caller_is_known_before_the_body_is_read() -> None:
    service = ScriptedService(keys=KEYS)
    answered = await Client(build_asgi(service)).post("/v1/chat/completions", b"{not json")

    assert answered.status == 401


async def test_a_revoked_key_is_unknown_at_once() -> None:
    service = ScriptedService(keys=KEYS)
    app = build_asgi(service)
    before = await Client(app, "fb-acme").get("/v1/models")
    service.keys = keys_of(ops="fb-ops")
    after = await Client(app, "fb-acme").get("/v1/models")

    assert (before.status, after.status) == (200, 401)


async def test_without_keys_everybody_is_the_default_tenant() -> None:
    _, service = await asked({"authorization": "Bearer whatever"}, Keys([], SECRET))

    assert service.calls[0].tenant == "default"


async def test_without_keys_a_header_may_name_the_tenant() -> None:
    _, service = await asked({"x-tenant-id": "acme-1"}, Keys([Tenant("acme-1")], SECRET))

    assert service.calls[0].tenant == "acme-1"


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "a/b", "é"])
async def test_a_tenants_name_that_is_none_is_400(name: str) -> None:
    answered, _ = await asked({"x-tenant-id": name}, Keys([], SECRET))

    assert answered.status == 400
    assert answered.error["param"] == "X-Tenant-ID"


def test_the_table_knows_who_is_admin() -> None:
    assert KEYS.tenant_for("fb-ops") == TenantIdentity("ops", "ops-key", admin=True)
    assert KEYS.tenant_for("fb-acme") == TenantIdentity("acme", "acme-key")
    assert KEYS.tenant_for("fb-nobody") is None


def test_the_table_holds_no_key() -> None:
    held: list[Any] = [vars(KEYS), repr(KEYS)]

    assert "fb-acme" not in str(held)


def test_a_key_of_two_tenants_is_a_configuration_error() -> None:
    key = Key("k", "hmac-sha256:00")
    with pytest.raises(ConfigurationError):
        Keys([Tenant("a", [key]), Tenant("b", [key])], SECRET)


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/metrics", "/openapi.json"])
async def test_probes_need_no_key(path: str) -> None:
    assert (await Client(build_asgi(ScriptedService(keys=KEYS))).get(path)).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/health/detail",
        "/v1/models",
        "/v1/models/small",
        "/v1/usage",
        "/api/v1/gateway/providers",
        "/api/v1/gateway/rate-limits",
    ],
)
async def test_everything_else_needs_one(path: str) -> None:
    app = build_asgi(ScriptedService(keys=KEYS))

    assert (await Client(app).get(path)).status == 401
    assert (await Client(app, "fb-acme").get(path)).status == 200
