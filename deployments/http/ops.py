"""What operators ask: is it alive, is it ready, what is used, what is counted."""

from __future__ import annotations

from actors.ledger.policy import GROUPS
from deployments.http.exchange import Exchange
from deployments.http.openapi import rendered
from forebay.errors import InvalidRequest
from forebay.usage import moment

USAGE_QUERY = ("tenant", "group_by", "start", "end")


async def health(exchange: Exchange) -> None:
    """GET /health: the process answers. No key needed."""
    await exchange.send_json(await exchange.service.health(False))


async def health_ready(exchange: Exchange) -> None:
    """GET /health/ready: 200 when requests can be served here, else 503 and why. No key needed."""
    ready, reason = exchange.service.ready()
    answer = {"status": "ready" if ready else "not ready", "message": reason}
    await exchange.send_json(answer, 200 if ready else 503)


async def health_detail(exchange: Exchange) -> None:
    """GET /health/detail: a check of each concern, owners, desks, breakers. For admins."""
    exchange.admin()
    await exchange.send_json(await exchange.service.health(True))


async def metrics(exchange: Exchange) -> None:
    """GET /metrics: Prometheus text of the whole system. No key needed.

    503 while the sums of all processes cannot be had: a gap is right where a wrong sum is not.
    """
    text = await exchange.service.metrics()
    await exchange.send(200, text, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])


async def usage(exchange: Exchange) -> None:
    """GET /v1/usage: a tenant sees its own, an admin key any or all."""
    tenant = exchange.tenant_asked("usage")
    query = exchange.query()
    for name in query:
        if name not in USAGE_QUERY:
            known = ", ".join(USAGE_QUERY)
            raise InvalidRequest.about(name, f"Usage is not asked by {name!r}; there are {known}.")
    groups = [group.strip() for group in query.get("group_by", "").split(",") if group.strip()]
    if unknown := [group for group in groups if group not in GROUPS]:
        raise InvalidRequest.about(
            "group_by",
            f"group_by takes {', '.join(GROUPS)}, one or more with commas, not {unknown[0]!r}.",
        )
    totals = await exchange.service.usage(
        tenant=tenant,
        group_by=groups,
        since_s=_moment("start", query.get("start")),
        until_s=_moment("end", query.get("end")),
    )
    await exchange.send_json(totals)


async def openapi(exchange: Exchange) -> None:
    """GET /openapi.json. No key needed."""
    await exchange.send(200, rendered())


def _moment(name: str, given: str | None) -> float | None:
    try:
        return None if given is None else moment(given)
    except ValueError as error:
        raise InvalidRequest.about(name, f"{name} {error}") from None
