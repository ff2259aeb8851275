"""Health, metrics, usage and the description of it all."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from actors.ledger.owner import Ledger
from actors.ledger.policy import GROUPS
from deployments.http import build_asgi
from deployments.http.app import PATHS
from deployments.http.openapi import document
from forebay.usage import report
from tests.support.scripted_service import Answered, Client, ScriptedService, keys_of
from tests.unit.test_ledger_owner import entry

KEYS = keys_of(acme="fb-acme", ops="fb-ops", admins=("ops",))


async def get(service: ScriptedService, path: str, key: str | None = None) -> Answered:
    return await Client(build_asgi(service), key).get(path)


async def test_health_is_live() -> None:
    answered = await get(ScriptedService(), "/health")

    assert (answered.status, answered.json()) == (200, {"status": "healthy"})


async def test_readiness_is_honest() -> None:
    ready = await get(ScriptedService(), "/health/ready")
    starting = await get(ScriptedService(is_ready=False), "/health/ready")

    assert (ready.status, ready.json()["status"]) == (200, "ready")
    assert (starting.status, starting.json()["status"]) == (503, "not ready")
    assert starting.json()["message"] == "owners are starting"


async def test_details_show_more() -> None:
    assert "owners" in (await get(ScriptedService(), "/health/detail")).json()


async def test_metrics_are_prometheus_text() -> None:
    answered = await get(ScriptedService(), "/metrics")

    assert answered.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answered.body == b"forebay_requests_total 1\n"


async def usage(query: str, key: str = "fb-acme") -> tuple[Answered, list[dict[str, Any]]]:
    service = ScriptedService(keys=KEYS)
    return await get(service, "/v1/usage" + query, key), service.queries


async def test_a_tenant_sees_its_own_usage() -> None:
    _, queries = await usage("?group_by=model&start=2026-01-01&end=2026-01-02T00:00:00%2B00:00")

    assert queries == [
        {"tenant": "acme", "group_by": ["model"], "since_s": 1767225600, "until_s": 1767312000}
    ]


async def test_usage_is_grouped_by_several_at_once() -> None:
    _, queries = await usage("?group_by=model,%20day,,hour")

    assert queries[0]["group_by"] == ["model", "day", "hour"]


async def test_usage_without_groups_has_none() -> None:
    _, queries = await usage("")

    assert queries == [{"tenant": "acme", "group_by": [], "since_s": None, "until_s": None}]


async def test_a_tenant_cannot_see_anothers_usage() -> None:
    answered, queries = await usage("?tenant=ops")

    assert answered.status == 403
    assert answered.error["type"] == "permission_error"
    assert not queries


@pytest.mark.parametrize(("query", "tenant"), [("", None), ("?tenant=acme", "acme")])
async def test_an_admin_sees_all_or_any(query: str, tenant: str | None) -> None:
    _, queries = await usage(query, "fb-ops")

    assert queries[0]["tenant"] == tenant


FAR = ("?start=1e18", "?end=-1e18", "?end=253402300800")
UNKNOWN = ("?group_by=key", "?group_by=model,key", "?groupby=model", "?since=2026-01-01")
DIGITS = ("?start=2026", "?start=20260131", "?end=202601")


@pytest.mark.parametrize(
    "query",
    [*UNKNOWN, "?start=yesterday", "?end=nan", "?start=inf", *FAR, *DIGITS],
)
async def test_a_wrong_query_is_named(query: str) -> None:
    answered, queries = await usage(query)

    assert answered.status == 400
    assert answered.error["param"] == query[1:].partition("=")[0]
    assert not queries


async def test_a_wrong_group_is_answered_with_the_right_ones() -> None:
    answered, _ = await usage("?group_by=day,colour")

    assert answered.error["message"] == (
        "group_by takes model, day, tenant, deployment, route, hour, one or more with commas,"
        " not 'colour'."
    )


async def test_epoch_seconds_are_taken_too() -> None:
    _, queries = await usage("?start=1767225600.5")

    assert queries[0]["since_s"] == 1767225600.5


# --- the description --------------------------------------------------------------------------


def described() -> dict[str, Any]:
    return document()


def test_every_path_that_is_served_is_described_and_no_other() -> None:
    served = {
        (path.replace("{id:path}", "{id}"), method.lower())
        for path, handlers in PATHS.items()
        for method in handlers
    }
    told = {(path, method) for path, item in described()["paths"].items() for method in item}

    assert told == served


def test_every_reference_leads_somewhere() -> None:
    whole = described()

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            here = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return here + [ref for item in value.values() for ref in references(item)]
        return (
            [ref for item in value for ref in references(item)] if isinstance(value, list) else []
        )

    for reference in references(whole):
        place = whole
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]

    assert len(references(whole)) > 50


def test_the_document_has_the_structure_of_openapi_3_1() -> None:
    whole = described()
    operations = [operation for item in whole["paths"].values() for operation in item.values()]

    assert whole["openapi"] == "3.1.0"
    assert {"title", "version"} <= whole["info"].keys()
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["responses"]
        for response in operation["responses"].values():
            assert response["description"]
        for parameter in operation["parameters"]:
            assert parameter["in"] in ("path", "query", "header")
            assert parameter["required"] == (parameter["in"] == "path")


async def test_a_report_is_as_it_is_described() -> None:
    ledger = Ledger()
    await ledger.append("h", 1, [entry(n, model=f"m{n}") for n in range(3)])
    told = await report(ledger, 0.0, since_s=0.0, until_s=9.0, group_by=GROUPS)
    await ledger.close()
    schema = described()["components"]["schemas"]["UsageReport"]

    assert set(told) == set(schema["properties"])
    assert set(told["data"][0]) == set(schema["properties"]["data"]["items"]["properties"])
    Draft202012Validator({**schema, "additionalProperties": False}).validate(told)


def test_the_schemas_are_json_schemas() -> None:
    for schema in described()["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_probes_are_described_as_open() -> None:
    paths = described()["paths"]

    assert paths["/health"]["get"]["security"] == []
    assert paths["/v1/models"]["get"]["security"] != []


async def test_the_description_is_served() -> None:
    assert (await get(ScriptedService(), "/openapi.json")).json() == described()
