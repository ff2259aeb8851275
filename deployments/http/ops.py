"""What operators ask: is it alive, is it ready, what is used, what is counted."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Literal, cast

from deployments.http.exchange import Exchange
from deployments.http.openapi import rendered
from forebay.errors import InvalidRequest

GROUPS = ("model", "day", "tenant")
GroupBy = Literal["model", "day", "tenant"]
FIRST_S, LAST_S = -62_135_596_800, 253_402_300_799
"""Epoch seconds where the year 1 begins and the year 9999 ends; a date is between them, too."""


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
    group_by = query.get("group_by")
    if group_by is not None and group_by not in GROUPS:
        raise InvalidRequest.about("group_by", f"group_by must be one of {', '.join(GROUPS)}.")
    totals = await exchange.service.usage(
        tenant=tenant,
        group_by=cast("GroupBy | None", group_by),
        since_s=_moment("start", query.get("start")),
        until_s=_moment("end", query.get("end")),
    )
    await exchange.send_json(totals)


async def openapi(exchange: Exchange) -> None:
    """GET /openapi.json. No key needed."""
    await exchange.send(200, rendered())


def _moment(name: str, given: str | None) -> float | None:
    """UTC epoch seconds of a date, a date and time (ISO 8601), or epoch seconds."""
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        try:
            moment = datetime.fromisoformat(given)
        except ValueError:
            seconds = math.nan
        else:
            seconds = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    if not FIRST_S <= seconds <= LAST_S:  # which nan is not, either
        raise InvalidRequest.about(
            name, f"{name} must be an ISO 8601 date or epoch seconds, before the year 10000."
        )
    return seconds
