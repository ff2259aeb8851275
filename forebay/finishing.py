"""The end of a request, however it came: who is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.call import Call
from forebay.ended import Ended
from forebay.request import Request

if TYPE_CHECKING:
    from forebay.system import System

UNKNOWN = "unknown"
"""The model and provider of a request that was not even understood."""


def finish(system: System, call: Call, request: Request | None, status: str) -> None:
    """A request is over: the books, the counts, and whoever wants to know are told.

    `request` is None where the call was not even understood.
    """
    system.books.end_call(call, None if request is None else request.facts, status)
    if request is None:
        system.meter.request(call.route, UNKNOWN, call.tenant, status, 0.0, 0.0)
        if system.tells(status):
            now = system.clock()
            system.tell(Ended(call, status, UNKNOWN, UNKNOWN, False, now, now))
        return
    facts = request.facts
    facts.total_s = system.clock() - request.started_s
    pattern = request.group.pattern  # a wildcard's filled-in name would be the client's choice
    system.meter.request(call.route, pattern, call.tenant, status, facts.total_s, facts.provider_s)
    if system.tells(status):
        system.tell(_ended(request, call, status))


def _ended(request: Request, call: Call, status: str) -> Ended:
    facts, group = request.facts, request.group
    last = [d for d in group.deployments if d.id == facts.deployment] or group.deployments
    provider = request.tried[-1].deployment.provider if request.tried else last[0].provider
    return Ended(
        call,
        status,
        group.pattern,
        provider,
        request.streams,
        request.started_s,
        request.started_s + facts.total_s,
        facts,
        request.answer,
        request.tried,
    )
