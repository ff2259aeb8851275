"""The HTTP application: which handler answers on which path."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.http import admin, anthropic, native, openai, ops
from deployments.http.exchange import (
    Endpoint,
    Exchange,
    Handler,
    Shape,
    openai_shape,
)
from deployments.http.service import Route as CallRoute
from deployments.http.service import Service
from deployments.request_ids import RequestIds
from forebay.errors import InvalidRequest

PATHS: Mapping[str, Mapping[str, Handler]] = {
    "/v1/chat/completions": {"POST": openai.chat_completions},
    "/v1/embeddings": {"POST": openai.embeddings},
    "/v1/messages": {"POST": anthropic.messages},
    "/v1/completions": {"POST": openai.completions},
    "/api/v1/gateway/generate": {"POST": native.generate},
    "/api/v1/gateway/generate/stream": {"POST": native.generate_stream},
    "/api/v1/gateway/embeddings": {"POST": native.embeddings},
    "/api/v1/gateway/providers": {"GET": native.providers},
    "/api/v1/gateway/rate-limits": {"GET": native.rate_limits},
    "/health": {"GET": ops.health},
    "/health/ready": {"GET": ops.health_ready},
    "/health/detail": {"GET": ops.health_detail},
    "/metrics": {"GET": ops.metrics},
    "/v1/models": {"GET": openai.list_models},
    "/v1/models/{id:path}": {"GET": openai.one_model},
    "/v1/usage": {"GET": ops.usage},
    "/v1/feedback": {"POST": native.record_feedback},
    "/v1/feedback/stats": {"GET": native.feedback_stats},
    "/admin/keys": {"GET": admin.list_keys, "POST": admin.create_key},
    "/admin/keys/{id}": {"DELETE": admin.revoke_key},
    "/admin/config": {"GET": admin.read_config, "PUT": admin.write_config},
    "/admin/breakers": {"GET": admin.list_breakers},
    "/admin/breakers/{id:path}": {"POST": admin.set_breaker},
    "/admin/cache": {"GET": admin.read_cache, "DELETE": admin.clear_cache},
    "/openapi.json": {"GET": ops.openapi},
}
CALLS: Mapping[str, CallRoute] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/embeddings": "embedding",
    "/v1/messages": "chat",
    "/api/v1/gateway/generate": "chat",
    "/api/v1/gateway/generate/stream": "chat",
    "/api/v1/gateway/embeddings": "embedding",
}
"""Paths that take calls, and of which kind: what comes there is counted, whatever it comes to."""
NATIVE = "/api/v1/gateway/"
ANTHROPIC = "/v1/messages"


def build_asgi(
    service: Service,
    *,
    clock: Callable[[], float] = time.monotonic,
    new_id: Callable[[], str] | None = None,
    echo_id: bool = True,
) -> ASGIApp:
    """The ASGI app over `service`.

    `clock` is monotonic seconds, for `HttpCall.arrived_s`; `new_id` names requests that come
    without a usable `x-request-id`; `echo_id` is off where the server around the app answers with
    `x-request-id` itself, as Ray Serve does.
    """
    ids = new_id or RequestIds()

    def endpoint(path: str, handlers: Mapping[str, Handler]) -> ASGIApp:
        made = Endpoint(
            service,
            handlers,
            clock=clock,
            new_id=ids,
            echo_id=echo_id,
            shape=_shape(path),
            route=CALLS.get(path),
        )
        if path.startswith(ANTHROPIC):
            return anthropic.WithRequestId(made)
        return made

    routes = [Route(path, endpoint(path, handlers), name=path) for path, handlers in PATHS.items()]
    return _Paths(routes, redirect_slashes=False, default=_Unknown(endpoint))


def _shape(path: str) -> Shape:
    if path.startswith(ANTHROPIC):
        return anthropic.error_shape
    return native.error_envelope if path.startswith(NATIVE) else openai_shape


class _Paths(Router):
    """Starlette's router, with one look-up for a path that is no pattern."""

    def __init__(self, routes: Sequence[Route], **options: Any) -> None:
        super().__init__(routes, **options)
        self._exact = {route.path: route.app for route in routes if "{" not in route.path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("root_path"):
            endpoint = self._exact.get(scope["path"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


class _Unknown:
    """Every other path: 404, in Anthropic's shape below its own; websockets are closed."""

    def __init__(self, endpoint: Callable[[str, Mapping[str, Handler]], ASGIApp]) -> None:
        methods = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        handlers = dict.fromkeys(methods, _unknown_path)
        self._anthropic = endpoint(ANTHROPIC, handlers)
        self._endpoint = endpoint("", handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["path"].startswith(f"{ANTHROPIC}/"):
            await self._anthropic(scope, receive, send)
        else:
            await self._endpoint(scope, receive, send)


async def _unknown_path(exchange: Exchange) -> None:
    raise InvalidRequest(
        f"Unknown path: {exchange.scope['method']} {exchange.scope['path'][:128]!r}.",
        code="unknown_url",
        status=404,
    )
