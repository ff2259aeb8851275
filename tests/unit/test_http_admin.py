"""What an admin changes over HTTP: keys, the configuration, breakers and the cache."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.http import build_asgi
from forebay.errors import ConfigurationError, InvalidRequest, Overloaded
from tests.support.scripted_service import Answered, Client, ScriptedService, keys_of

KEYS = keys_of(acme="fb-acme", ops="fb-ops", admins=("ops",))
DOCUMENT = {"gateway": {"timeout": 30}}
ROUTES = [
    ("POST", "/admin/keys"),
    ("GET", "/admin/keys"),
    ("DELETE", "/admin/keys/k1"),
    ("GET", "/admin/config"),
    ("PUT", "/admin/config"),
    ("GET", "/admin/cache"),
    ("DELETE", "/admin/cache"),
]


async def asked(
    method: str,
    path: str,
    body: Any = None,
    key: str | None = "fb-ops",
    service: ScriptedService | None = None,
    **headers: str,
) -> tuple[Answered, ScriptedService]:
    service = service or ScriptedService(keys=KEYS)
    client = Client(build_asgi(service), key)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return await client.request(method, path, body or b"", headers), service


async def new_key(**body: Any) -> tuple[Answered, ScriptedService]:
    return await asked("POST", "/admin/keys", body)


def refusing(error: Any) -> ScriptedService:
    return ScriptedService(keys=KEYS, refusal=error)


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_is_an_admins(method: str, path: str) -> None:
    nobody, _ = await asked(method, path, b"{not json", key=None)
    tenant, service = await asked(method, path, b"{not json", key="fb-acme")

    assert (nobody.status, nobody.error["type"]) == (401, "authentication_error")
    assert (tenant.status, tenant.error["type"]) == (403, "permission_error")
    assert not service.queries


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_page_of_another_site_does_nothing_where_no_key_is_needed(method: str) -> None:
    path = dict(ROUTES)[method]
    service = ScriptedService()
    foreign = {"origin": "https://evil.example", "host": "127.0.0.1:8000"}
    answered, _ = await asked(method, path, {"tenant": "a"}, None, service, **foreign)
    own = {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}
    same, _ = await asked(method, path, {"tenant": "a"}, None, service, **own)

    assert answered.status == 403
    assert same.status in (200, 201)
    assert len(service.queries) == 1


# --- keys -------------------------------------------------------------------------------------


async def test_a_new_key_is_told_once() -> None:
    answered, service = await new_key(tenant="acme")

    assert answered.status == 201
    assert answered.json().keys() == {"id", "tenant", "key", "hash", "admin", "created"}
    assert answered.headers["cache-control"] == "no-store"
    assert service.queries == [
        {"tenant": "acme", "key_id": None, "admin": False, "limits": None, "models": None}
    ]


async def test_everything_about_it_may_be_said() -> None:
    limits = {"requests_per_minute": 600, "usd_per_day": 0.5}
    _, service = await new_key(
        tenant="acme", id="ci.1", admin=True, limits=limits, models=["small", "openai/*"]
    )

    assert service.queries == [
        {
            "tenant": "acme",
            "key_id": "ci.1",
            "admin": True,
            "limits": limits,
            "models": ["small", "openai/*"],
        }
    ]


async def test_null_is_as_if_it_were_not_there() -> None:
    _, service = await new_key(tenant="acme", id=None, admin=None, limits=None, models=None)

    assert service.queries[0] == {
        "tenant": "acme",
        "key_id": None,
        "admin": False,
        "limits": None,
        "models": None,
    }


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "tenant", "missing_required_parameter"),
        ({"tenant": None}, "tenant", "missing_required_parameter"),
        ({"tenant": 5}, "tenant", "invalid_type"),
        ({"tenant": ""}, "tenant", "invalid_value"),
        ({"tenant": "a b"}, "tenant", "invalid_value"),
        ({"tenant": "a\n"}, "tenant", "invalid_value"),
        ({"tenant": "x" * 129}, "tenant", "invalid_value"),
        ({"tenant": "a", "id": "a/b"}, "id", "invalid_value"),
        ({"tenant": "a", "id": 7}, "id", "invalid_type"),
        ({"tenant": "a", "admin": "yes"}, "admin", "invalid_type"),
        ({"tenant": "a", "admin": 1}, "admin", "invalid_type"),
        ({"tenant": "a", "limits": [1]}, "limits", "invalid_type"),
        ({"tenant": "a", "models": "small"}, "models", "invalid_type"),
        ({"tenant": "a", "models": ["small", 5]}, "models", "invalid_type"),
        ({"tenant": "a", "key": "sk-fb-mine"}, "key", "unknown_parameter"),
        ({"tennant": "a"}, "tennant", "unknown_parameter"),
    ],
)
async def test_what_is_wrong_is_named(body: dict[str, Any], param: str, code: str) -> None:
    answered, service = await new_key(**body)

    assert answered.status == 400
    assert (answered.error["param"], answered.error["code"]) == (param, code)
    assert not service.queries


async def test_an_unknown_field_is_told_with_the_nearest_one() -> None:
    answered, _ = await new_key(tennant="a")

    assert "did you mean 'tenant'?" in answered.error["message"]


async def test_limits_that_make_no_sense_are_the_callers_mistake() -> None:
    fault = ConfigurationError(
        "limits.requests_per_minute: must be at least 1, not -5",
        param="limits.requests_per_minute",
    )
    answered, _ = await asked(
        "POST",
        "/admin/keys",
        {"tenant": "a", "limits": {"requests_per_minute": -5}},
        service=refusing(fault),
    )

    assert answered.status == 400
    assert answered.error["type"] == "invalid_request_error"
    assert answered.error["param"] == "limits.requests_per_minute"
    assert "-5" in answered.error["message"]


async def test_a_key_that_is_there_already_is_a_conflict() -> None:
    taken = InvalidRequest("there is one", code="key_exists", status=409, param="id")
    answered, _ = await asked("POST", "/admin/keys", {"tenant": "a"}, service=refusing(taken))

    assert (answered.status, answered.error["code"]) == (409, "key_exists")


async def test_a_registry_that_is_away_says_when_to_come_back() -> None:
    away = Overloaded("the Registry is away", retry_after_s=1)
    answered, _ = await asked("POST", "/admin/keys", {"tenant": "a"}, service=refusing(away))

    assert (answered.status, answered.headers["retry-after"]) == (503, "1")


async def test_the_list_names_keys_and_tells_none() -> None:
    answered, _ = await asked("GET", "/admin/keys")

    assert answered.status == 200
    assert [key["source"] for key in answered.json()["data"]] == ["config", "runtime"]
    assert "hmac" not in answered.body.decode()


@pytest.mark.parametrize(("query", "tenant"), [("", None), ("?tenant=b%40x", "b@x")])
async def test_a_key_is_revoked_by_its_id(query: str, tenant: str | None) -> None:
    answered, service = await asked("DELETE", f"/admin/keys/a:b@c{query}")

    assert (answered.status, answered.json()["revoked"]) == (200, True)
    assert service.queries == [{"key_id": "a:b@c", "tenant": tenant}]


@pytest.mark.parametrize(("status", "code"), [(404, "key_not_found"), (409, "key_ambiguous")])
async def test_which_key_is_meant_must_be_clear(status: int, code: str) -> None:
    unclear = InvalidRequest("which?", code=code, status=status)
    answered, _ = await asked("DELETE", "/admin/keys/ci", service=refusing(unclear))

    assert (answered.status, answered.error["code"]) == (status, code)


# --- the configuration ------------------------------------------------------------------------


async def test_the_configuration_is_told_with_its_version() -> None:
    answered, _ = await asked("GET", "/admin/config")

    assert answered.json() == {"version": 7, "config": {"gateway": {"timeout": 60}}}
    assert answered.headers["etag"] == '"7"'


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"if-match": "*"}, None),
        ({"if-match": "7"}, 7),
        ({"if-match": '"7"'}, 7),
        ({"if-match": 'W/"7"'}, 7),
    ],
)
async def test_a_configuration_is_put(headers: dict[str, Any], expected: int | None) -> None:
    answered, service = await asked("PUT", "/admin/config", DOCUMENT, **headers)

    assert (answered.status, answered.json()) == (200, {"version": 8})
    assert service.queries == [{"document": DOCUMENT, "expected": expected}]


@pytest.mark.parametrize("given", ["", "seven", "-1", '"1", "2"', "1.5", "9" * 40])
async def test_if_match_names_a_version(given: str) -> None:
    answered, service = await asked("PUT", "/admin/config", DOCUMENT, if_match=given)

    assert (answered.status, answered.error["param"]) == (400, "If-Match")
    assert not service.queries


async def test_who_comes_second_hears_so() -> None:
    late = InvalidRequest("the newest is 9", code="version_conflict", status=412)
    answered, _ = await asked(
        "PUT", "/admin/config", DOCUMENT, service=refusing(late), if_match="7"
    )

    assert (answered.status, answered.error["code"]) == (412, "version_conflict")


async def test_a_wrong_configuration_is_400_with_every_field() -> None:
    words = "gateway.timeout: must be from 1 to 300, not 0\ntenants[0].id: is required"
    fault = ConfigurationError(words, param="gateway.timeout")
    answered, _ = await asked("PUT", "/admin/config", DOCUMENT, service=refusing(fault))

    assert answered.status == 400
    assert answered.error["message"] == words
    assert answered.error["param"] == "gateway.timeout"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a":1,"a":2}', b"gateway: {}"])
async def test_a_body_that_is_no_json_object_is_400(body: bytes) -> None:
    answered, service = await asked("PUT", "/admin/config", body)

    assert answered.status == 400
    assert not service.queries


# --- breakers ---------------------------------------------------------------------------------


async def ordered(
    path: str, body: Any = None, key: str | None = "fb-ops", refusal: Any = None
) -> tuple[Answered, ScriptedService]:
    service = ScriptedService(keys=KEYS, refusal=refusal)
    client = Client(build_asgi(service), key)
    return await (client.get(path) if body is None else client.post(path, body)), service


async def test_every_breaker_is_told() -> None:
    answered, _ = await ordered("/admin/breakers")

    assert answered.json() == {
        "object": "list",
        "source": "owner",
        "data": [{"deployment": "d-1", "state": "closed"}],
    }


@pytest.mark.parametrize("state", ["open", "closed", "auto"])
async def test_a_breaker_is_set(state: str) -> None:
    answered, service = await ordered("/admin/breakers/my/d-1", {"state": state})

    assert answered.status == 200
    assert service.orders == [("my/d-1", state)]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "state", "missing_required_parameter"),
        ({"state": None}, "state", "missing_required_parameter"),
        ({"state": "ajar"}, "state", "invalid_value"),
        ({"state": ["open"]}, "state", "invalid_value"),
        ({"state": "open", "for": 5}, "for", "unknown_parameter"),
    ],
)
async def test_a_wrong_order_is_named_and_not_obeyed(body: Any, param: str, code: str) -> None:
    answered, service = await ordered("/admin/breakers/d-1", body)

    assert answered.status == 400
    assert (answered.error["param"], answered.error["code"]) == (param, code)
    assert not service.orders


async def test_breakers_are_an_admins() -> None:
    for path, body in (("/admin/breakers", None), ("/admin/breakers/d-1", {"state": "open"})):
        nobody, _ = await ordered(path, body, key=None)
        tenant, service = await ordered(path, body, key="fb-acme")

        assert (nobody.status, tenant.status) == (401, 403)
        assert not service.orders


async def test_a_breaker_that_was_not_set_says_so() -> None:
    away = Overloaded("the breaker was not set: its owner is away", retry_after_s=1.0)
    answered, _ = await ordered("/admin/breakers/d-1", {"state": "open"}, refusal=away)

    assert (answered.status, answered.headers["retry-after"]) == (503, "1")


# --- the cache --------------------------------------------------------------------------------

HEX = "0123456789abcdef" * 5


async def cleared(query: str = "", service: ScriptedService | None = None) -> Any:
    path = f"/admin/cache?{query}" if query else "/admin/cache"
    return await asked("DELETE", path, service=service)


async def test_what_is_named_is_cleared() -> None:
    answered, service = await cleared(f"tenant=acme&model=openai%2Fgpt-4o&key={HEX}")

    named = {"tenant": "acme", "model": "openai/gpt-4o", "key": HEX}
    assert (answered.status, answered.json()) == (200, {"invalidated": 3, **named})
    assert service.queries == [named]


async def test_nothing_named_is_all_of_it() -> None:
    answered, service = await cleared()

    assert answered.json() == {"invalidated": 3}
    assert service.queries == [{"tenant": None, "model": None, "key": None}]


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("tennant=acme", "tennant", "unknown_parameter"),
        ("tenant=", "tenant", "invalid_value"),
        ("tenant", "tenant", "invalid_value"),
        ("tenant=a&tenant=b", "tenant", "invalid_value"),
        ("model=&tenant=a", "model", "invalid_value"),
    ],
)
async def test_a_slip_clears_nothing(query: str, param: str, code: str) -> None:
    answered, service = await cleared(query)

    assert answered.status == 400
    assert (answered.error["param"], answered.error["code"]) == (param, code)
    assert not service.queries


async def test_who_is_not_known_is_said() -> None:
    error = InvalidRequest.about("tenant", "unknown tenant", code="unknown_tenant", status=404)
    answered, _ = await cleared("tenant=nobody", refusing(error))

    assert (answered.status, answered.error["code"]) == (404, "unknown_tenant")


async def test_what_everybody_shares_is_no_tenants_to_clear() -> None:
    error = InvalidRequest.about("tenant", "shared", code="cache_is_shared", status=409)
    answered, _ = await cleared("tenant=acme", refusing(error))

    assert answered.status == 409
    assert (answered.error["code"], answered.error["param"]) == ("cache_is_shared", "tenant")


async def test_the_caches_figures_are_told() -> None:
    answered, _ = await asked("GET", "/admin/cache")

    assert answered.json() == {"responses": {"entries": 3}, "prompts": {"hits": 1}}
