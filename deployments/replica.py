"""The Serve replica around this process, as far as Forebay has to know it.

Nothing of it is public. Each name that is used is looked for when the replica starts; where one is
missing, Forebay does without, and says so in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.http.app import CALLS

log = logging.getLogger(__name__)


def this_replica() -> Any:
    """The replica that this process is; None in others."""
    from ray._private.worker import global_worker

    actor = global_worker.actors.get(global_worker.actor_id)
    return getattr(actor, "_replica_impl", None)


def drain_flag() -> Callable[[], bool]:
    """Whether Serve has begun to stop this replica.

    It tells the application only when the last request is over, so the replica around us is asked.
    """
    replica = this_replica()
    if not hasattr(replica, "_shutting_down"):
        log.warning("Serve does not say when this replica drains; /health/ready will not know")
        return lambda: False
    return lambda: bool(replica._shutting_down)


async def shorten_http() -> None:
    """Have the servers that this process starts from now on take calls by `CallProtocol`."""
    try:
        from uvicorn.config import HTTP_PROTOCOLS
        from uvicorn.protocols.http.auto import AutoHTTPProtocol

        from deployments.http.protocol import CallProtocol, works

        if not issubclass(CallProtocol, AutoHTTPProtocol) or "auto" not in HTTP_PROTOCOLS:
            raise AttributeError("it serves HTTP by something else")
        if not await works():
            raise AttributeError("a call was not answered as it should be")
    except Exception as error:  # noqa: BLE001 - what another uvicorn raises nobody knows
        log.warning("uvicorn is not as it was (%s): calls are served its own way", error)
        return
    table: dict[str, Any] = HTTP_PROTOCOLS  # of names, or classes
    table["auto"] = CallProtocol


class Door:
    """Takes calls straight to the application, past what Serve does for each request.

    Serve makes a context, a record, two ids, three managers of contexts and its log's line of every
    request, which costs a fifth of all that a call costs. A call needs of it that it is counted: a
    replica drains when none is under way, and is scaled by how many there are. So it is counted
    here; and where the replica has its fill, Serve's own way has the queue.

    Failure behaviour: whatever is not as it is expected, all requests go Serve's own way.
    """

    def __init__(self, app: ASGIApp, replica: Any, inner: ASGIApp, note: Any) -> None:
        """`app` is Serve's own way, `inner` the application, which answers with the request's id
        itself; `note` is what Serve's counts are told of a request."""
        self._app = app
        self._inner = inner
        self._replica = replica
        self._counts = replica._metrics_manager
        self._note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts = self._counts
        is_call = scope["type"] == "http" and scope["path"] in CALLS and not scope.get("root_path")
        if not is_call or counts.get_num_ongoing_requests() >= self._replica.max_ongoing_requests:
            await self._app(scope, receive, send)
            return
        begun_s = time.perf_counter()
        counts.inc_num_ongoing_requests(self._note)
        failed = True
        try:
            await self._inner(scope, receive, send)
            failed = False
        finally:
            counts.dec_num_ongoing_requests(self._note)
            counts.record_request_metrics(
                route=scope["path"],
                latency_ms=(time.perf_counter() - begun_s) * 1000,
                is_error=failed,
            )


def door(app: ASGIApp) -> ASGIApp:
    """A `Door` before `app` in a replica that has one; else `app` itself.

    There is none where a request's time is Serve's to keep (`request_timeout_s`), where Serve
    traces, where it runs the application in a thread of its own, or below a prefix.
    """
    replica = this_replica()
    if replica is None:
        return app
    try:
        from ray.serve._private.common import RequestMetadata, RequestProtocol
        from ray.serve._private.tracing_utils import is_tracing_enabled

        wrapper = replica._user_callable_wrapper
        inner: ASGIApp | None = getattr(wrapper.user_callable, "door", None)
        plain = replica._http_options.request_timeout_s is None and replica._route_prefix == "/"
        alone = not wrapper._run_user_code_in_separate_thread and not is_tracing_enabled()
        if inner is None or not plain or not alone:
            return app
        note = RequestMetadata(
            request_id="",
            internal_request_id="",
            app_name=replica._deployment_id.app_name,
            _request_protocol=RequestProtocol.HTTP,
            is_direct_ingress=True,
        )
        made = Door(app, replica, inner, note)
        made._counts.inc_num_ongoing_requests(note)
        made._counts.dec_num_ongoing_requests(note)
    except (ImportError, AttributeError, TypeError) as error:
        log.warning("Serve is not as it was (%s): each request goes all of its way", error)
        return app
    return made
