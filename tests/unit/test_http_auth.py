"""Who is asking: keys, their tenants, and one answer for everybody else."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.http import KeyEntry, Keys, TenantIdentity, auth, build_asgi
from deployments.ingress import require_keys_or_loopback
from forebay.errors import AuthenticationError, ConfigurationError, Overloaded
from forebay.secrets import hash_key, operator_key
from tests.support.scripted_service import (
    SECRET,
    Answered,
    Client,
    ScriptedService,
    keys_of,
    no_keys,
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
        {"authorization": "Basic dXNlcjpwYXNz", "x-api-key": "fb-acme"},
        {"authorization": "Bearer fb-acme", "x-api-key": "fb-ops"},
    ],
)
async def test_a_key_decides_the_tenant(headers: dict[str, str]) -> None:
    others = {"x-tenant-id": "other", "openai-organization": "other", "x-litellm-tenant": "other"}
    answered, service = await asked({**headers, **others})

    assert answered.status == 200
    assert service.calls[0].tenant == "acme"


async def test_a_field_of_the_body_never_chooses_the_tenant() -> None:
    service = ScriptedService(keys=KEYS)
    body = {**CHAT, "user": "ops", "metadata": {"tenant_id": "ops", "tenant": "ops"}}
    answered = await Client(build_asgi(service), "fb-acme").post("/v1/chat/completions", body)

    assert answered.status == 200
    assert service.calls[0].tenant == "acme"


@pytest.mark.parametrize("name", ["tenant_id", "tenant", "api_key"])
async def test_a_field_that_tries_to_is_no_parameter(name: str) -> None:
    service = ScriptedService(keys=KEYS)
    path = "/v1/chat/completions"
    answered = await Client(build_asgi(service), "fb-acme").post(path, {**CHAT, name: "ops"})

    assert answered.status == 400
    assert answered.error["param"] == name


async def test_a_wrong_bearer_is_not_made_good_by_the_other_header() -> None:
    answered, _ = await asked({"authorization": "Bearer fb-wrong", "x-api-key": "fb-acme"})

    assert answered.status == 401


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


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/gateway/providers", "/admin/keys"])
async def test_which_key_is_wrong_cannot_be_told_from_the_answer(path: str) -> None:
    app = build_asgi(ScriptedService(keys=KEYS))
    wrong = [{}, {"x-api-key": "sk-fb-unknown"}, {"authorization": "Bearer \x7f"},
             {"authorization": f"Bearer {'k' * 5000}"}]  # fmt: skip
    answers = [await Client(app).get(path, **headers, x_request_id="r1") for headers in wrong]
    told = [answer.json() for answer in answers]
    for body in told:
        body.pop("timestamp", None)

    assert all(answer.status == 401 for answer in answers)
    assert all(body == told[0] for body in told)
    assert len({tuple(answer.headers) for answer in answers}) == 1
    for answer in answers:
        answer.headers.pop("content-length")  # a timestamp has six digits after the point, or none
    assert all(answer.headers == answers[0].headers for answer in answers)


async def test_the_caller_is_known_before_the_body_is_read() -> None:
    service = ScriptedService(keys=KEYS)
    answered = await Client(build_asgi(service)).post("/v1/chat/completions", b"{not json")

    assert answered.status == 401


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/completions", "completion"),
        ("/v1/embeddings", "embedding"),
        ("/v1/messages", "chat"),
        ("/api/v1/gateway/generate", "chat"),
        ("/api/v1/gateway/generate/stream", "chat"),
        ("/api/v1/gateway/embeddings", "embedding"),
    ],
)
async def test_the_service_hears_of_requests_that_never_become_calls(path: str, route: str) -> None:
    service = ScriptedService(keys=KEYS)
    app = build_asgi(service)
    await Client(app).post(path, CHAT)
    await Client(app, "fb-acme").post(path, b"{not json")
    await Client(app, "fb-acme").get(path)

    assert service.refusals == [(route, None, 401), (route, "acme", 400), (route, None, 405)]


async def test_it_hears_of_nothing_else() -> None:
    service = ScriptedService(keys=KEYS, answer=Overloaded("not now"))
    app = build_asgi(service)
    await Client(app).get("/v1/models")
    await Client(app).post("/v1/nothing", CHAT)
    refused = await Client(app, "fb-acme").post("/v1/chat/completions", CHAT)

    assert refused.status == 503
    assert service.refusals == []


async def test_a_revoked_key_is_unknown_at_once() -> None:
    service = ScriptedService(keys=KEYS)
    app = build_asgi(service)
    before = await Client(app, "fb-acme").get("/v1/models")
    service.keys = keys_of(ops="fb-ops")
    after = await Client(app, "fb-acme").get("/v1/models")

    assert (before.status, after.status) == (200, 401)


async def test_where_nobody_ever_had_a_key_everybody_is_the_default_tenant() -> None:
    _, service = await asked({"authorization": "Bearer whatever"}, no_keys())

    assert service.calls[0].tenant == "default"


async def test_there_a_header_may_name_the_tenant() -> None:
    _, service = await asked({"x-tenant-id": "acme-1"}, no_keys())

    assert service.calls[0].tenant == "acme-1"


@pytest.mark.parametrize("headers", [{}, {"x-tenant-id": "acme"}, {"x-api-key": "any"}])
async def test_when_the_last_key_is_revoked_nobody_comes_in(headers: dict[str, str]) -> None:
    answered, service = await asked(headers, Keys([], SECRET, open_to_all=False))

    assert answered.status == 401
    assert not service.calls


async def test_who_can_read_the_secret_is_an_admin() -> None:
    for keys in (KEYS, Keys([], SECRET, open_to_all=False)):
        assert keys.tenant_for(operator_key(SECRET)) == TenantIdentity("default", "operator", True)
        assert keys.tenant_for(operator_key(b"another secret")) is None


def test_the_operators_key_tells_nothing_of_the_secret_and_stays_the_same() -> None:
    assert operator_key(SECRET).startswith("sk-fb-op-")
    assert operator_key(SECRET) == operator_key(SECRET)
    assert len({operator_key(secret) for secret in (SECRET, b"a" * 32, b"b" * 32)}) == 3


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "a/b", "é"])
async def test_a_tenants_name_that_is_none_is_400(name: str) -> None:
    answered, _ = await asked({"x-tenant-id": name}, no_keys())

    assert answered.status == 400
    assert answered.error["param"] == "X-Tenant-ID"


def test_the_table_knows_who_is_admin() -> None:
    assert KEYS.tenant_for("fb-ops") == TenantIdentity("ops", "ops-key", admin=True)
    assert KEYS.tenant_for("fb-acme") == TenantIdentity("acme", "acme-key")
    assert KEYS.tenant_for("fb-nobody") is None


def test_the_table_holds_no_key() -> None:
    held: list[Any] = [vars(KEYS), repr(KEYS)]

    assert "fb-acme" not in str(held)


def test_of_two_entries_for_one_key_the_first_holds() -> None:
    hashed = hash_key("fb-twice", SECRET)
    entries = [KeyEntry("a", "k", hashed), KeyEntry("b", "k", hashed, admin=True)]
    keys = Keys(entries, SECRET, open_to_all=False)

    assert keys.tenant_for("fb-twice") == TenantIdentity("a", "k")


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/metrics", "/openapi.json"])
async def test_probes_need_no_key(path: str) -> None:
    assert (await Client(build_asgi(ScriptedService(keys=KEYS))).get(path)).status == 200


@pytest.mark.parametrize(
    "path",
    [
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


@pytest.mark.parametrize(
    "path",
    [
        "/health/detail",
        "/admin/keys",
        "/admin/config",
        "/v1/usage?tenant=ops",
        "/api/v1/gateway/rate-limits?tenant=ops",
    ],
)
async def test_some_doors_are_for_admins(path: str) -> None:
    app = build_asgi(ScriptedService(keys=KEYS))

    assert (await Client(app).get(path)).status == 401
    refused = await Client(app, "fb-acme").get(path)
    assert refused.status == 403
    assert "permission_error" in refused.body.decode()
    assert (await Client(app, "fb-ops").get(path)).status == 200
    assert (await Client(app, operator_key(SECRET)).get(path)).status == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    require_keys_or_loopback(host, has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "gateway.example", None])
def test_any_other_host_needs_one(host: str | None) -> None:
    require_keys_or_loopback(host, has_keys=True)
    with pytest.raises(ConfigurationError, match="no tenant has a key") as caught:
        require_keys_or_loopback(host, has_keys=False)

    assert caught.value.param == "server.host"


# --- headers that were seen before --------------------------------------------------------------


def test_a_header_that_was_good_is_known_again_and_no_key_is_kept() -> None:
    keys = keys_of(acme="fb-acme", ops="fb-ops", admins=("ops",))
    headers = {b"authorization": b"Bearer fb-acme"}
    assert keys.identify(headers) is keys.identify(headers)
    assert keys.identify({**headers, b"x-api-key": b"fb-ops"}).tenant == "acme"
    assert "fb-acme" not in repr(vars(keys))


def test_another_header_says_nothing_of_who_sends_it_next() -> None:
    keys = keys_of(acme="fb-acme", ops="fb-ops")
    for authorization in (b"", b"Basic x", b"Bearer "):
        headers = {b"authorization": authorization}
        assert keys.identify({**headers, b"x-api-key": b"fb-acme"}).tenant == "acme"
        assert keys.identify({**headers, b"x-api-key": b"fb-ops"}).tenant == "ops"
        with pytest.raises(AuthenticationError):
            keys.identify(headers)


def test_a_wrong_header_is_wrong_each_time_and_is_not_kept() -> None:
    keys = keys_of(acme="fb-acme")
    for _ in range(2):
        with pytest.raises(AuthenticationError):
            keys.identify({b"authorization": b"Bearer fb-other", b"x-api-key": b"fb-acme"})
    assert keys._seen == {}


def test_headers_are_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "SEEN_MAX", 3)
    keys = keys_of(acme="fb-acme")
    for spaces in range(1, 20):
        assert keys.identify({b"authorization": b"Bearer" + b" " * spaces + b"fb-acme"})
        assert len(keys._seen) <= 3
