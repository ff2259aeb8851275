"""Feedback over HTTP: what is taken, whose it is, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.http import build_asgi
from tests.support.scripted_service import Answered, Client, ScriptedService, keys_of

KEYS = keys_of(acme="fb-acme", ops="fb-ops", admins=("ops",))


async def told(
    body: dict[str, Any], query: str = "", key: str = "fb-acme"
) -> tuple[Answered, list[dict[str, Any]]]:
    service = ScriptedService(keys=KEYS)
    answered = await Client(build_asgi(service), key).post(f"/v1/feedback{query}", body)
    return answered, service.queries


async def test_a_rating_is_for_the_keys_own_tenant() -> None:
    answered, queries = await told({"response_id": "x1", "rating": 4, "content": "fine"})

    assert answered.status == 201
    assert answered.json() == {"id": "f1", "duplicate": False}
    assert queries == [
        {
            "tenant": "acme",
            "kind": "rating",
            "content": "fine",
            "rating": 4,
            "response_id": "x1",
            "feedback_id": None,
        }
    ]


async def test_a_type_stands_for_itself() -> None:
    _, queries = await told({"response_id": "x1", "type": "correction", "content": "it is 7"})

    assert (queries[0]["kind"], queries[0]["content"]) == ("correction", "it is 7")


async def test_what_was_there_before_is_not_created() -> None:
    answered, _ = await told({"response_id": "x1", "rating": True, "id": "again"})

    assert answered.status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rating": 5}, "response_id"),
        ({"response_id": 5, "rating": 5}, "response_id"),
        ({"response_id": "", "rating": 5}, "response_id"),
        ({"response_id": "x"}, "rating"),
        ({"response_id": "x", "rating": 5, "type": False}, "type"),
        ({"response_id": "x", "rating": 5, "type": {}}, "type"),
        ({"response_id": "x", "content": "y"}, "rating"),
        ({"response_id": "x", "rating": 1, "type": "error"}, "rating"),
        ({"response_id": "x", "rating": 1, "tenant": "ops"}, "tenant"),
    ],
)
async def test_what_is_wrong_is_named(body: dict[str, Any], param: str) -> None:
    answered, queries = await told(body)

    assert (answered.status, answered.error["param"]) == (400, param)
    assert not queries


async def test_a_tenant_speaks_for_no_other_and_an_admin_for_any() -> None:
    body = {"response_id": "x", "rating": 1}
    refused, _ = await told(body, "?tenant=ops")
    _, queries = await told(body, "?tenant=acme", "fb-ops")

    assert refused.status == 403
    assert queries[0]["tenant"] == "acme"


async def test_who_has_no_key_says_nothing() -> None:
    answered, queries = await told({"response_id": "x", "rating": 1}, key="fb-none")

    assert answered.status == 401
    assert not queries


@pytest.mark.parametrize(
    ("query", "key", "tenant"),
    [("", "fb-acme", "acme"), ("", "fb-ops", None), ("?tenant=acme", "fb-ops", "acme")],
)
async def test_a_tenant_sees_its_own_figures_and_an_admin_all(
    query: str, key: str, tenant: str | None
) -> None:
    service = ScriptedService(keys=KEYS)
    answered = await Client(build_asgi(service), key).get(f"/v1/feedback/stats{query}")

    assert answered.json() == {"tenant": tenant, "total": 0}


async def test_a_tenant_does_not_see_anothers_figures() -> None:
    service = ScriptedService(keys=KEYS)
    answered = await Client(build_asgi(service), "fb-acme").get("/v1/feedback/stats?tenant=ops")

    assert answered.status == 403
