"""The one deployment on the request path: ASGI for HTTP, plain methods for handles."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.types import ASGIApp

from actors.rate_limiter.terms import Figures, Limits
from actors.ref import OwnerUnavailable
from deployments import ingress
from deployments.admin import Admin
from deployments.http import build_asgi
from deployments.http.auth import KeyEntry, Keys
from deployments.http.service import HttpCall, Reply, Route, StreamReply
from deployments.replica import drain_flag, shorten_http
from forebay import logs
from forebay.books import NOBODY
from forebay.call import Call, Facts, Result
from forebay.config import SystemConfig
from forebay.errors import ConfigurationError, InvalidRequest, Overloaded
from forebay.health import HealthCheck
from forebay.secrets import key_secret
from forebay.system import System, attach, create_owners

GARBAGE_PER_COLLECTION = 10_000  # new objects; Python's 700 is for small programs
CREATED_S = 1_700_000_000  # OpenAI's model objects carry a birthday; ours have none to tell

log = logging.getLogger(__name__)


class Gateway:
    """One replica: a `System` of desks, and HTTP and handle calls through its pipeline.

    Failure behaviour: the pipeline's. A replica that dies takes its in-flight requests with it;
    Serve starts another. `check_health` fails only when this replica itself cannot serve: a
    provider's outage must not restart the fleet.
    """

    async def __init__(  # type: ignore[misc]
        self, document: dict[str, Any], occasion: str, namespace: str, *models: Any
    ) -> None:
        """Attach, creating what is missing. `models` are here for Serve to start them.

        `document` is published to the Registry once per `occasion`, a deployment's name for itself.

        Raises:
            ConfigurationError: the address is reachable from elsewhere and nobody needs a key.
        """
        logs.install()
        config = SystemConfig.from_document(document)
        loop = asyncio.get_running_loop()
        host = await loop.run_in_executor(None, _serving_host)
        boot = await loop.run_in_executor(None, create_owners, config, namespace)
        self._system: System = await attach(boot, publish=(document, occasion))
        try:
            ingress.require_keys_or_loopback(host, not self._system.tenants.keyless)
        except ConfigurationError:
            await self._system.close()
            raise
        self._system.on_change(lambda system: logs.obey(system.config.telemetry.log_level))
        self._secret = key_secret(os.environ, Path(boot.data_dir))
        self._service = PipelineService(self._system, self._secret, host, drain_flag())
        self.door = build_asgi(self._service)  # see `deployments.replica.Door`
        await shorten_http()
        self._warming = loop.create_task(self._warm())

    async def _warm(self) -> None:
        """Import LiteLLM before anybody asks, and keep the collector from walking over it again.

        Its import leaves half a million objects that live for ever; every full collection would
        visit each of them.
        """
        await self._system.provider.warm()
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_PER_COLLECTION)
        try:
            await self._system.complete()
        except OwnerUnavailable as error:
            log.warning("%s; the first request that needs it will start it", error)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_asgi(self._service, echo_id=False)

    async def check_health(self) -> None:
        """Serve's probe: this replica's loop turns and its desks live."""

    async def __del__(self) -> None:
        await self._system.close()

    # ------------------------------------------------------------------------------- handles

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """One chat answer. `request` holds OpenAI's chat parameters and, optionally, `tenant_id`.

        Returns:
            OpenAI's chat completion object.
        """
        request = {name: value for name, value in request.items() if name != "stream"}
        result = await self._system.pipeline.answer(Call.of("chat", request))
        return result.answer.body

    async def embed(
        self,
        texts: str | Sequence[str],
        model: str | None = None,
        tenant_id: str | None = None,
        **parameters: Any,
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Vectors for texts: float32 of shape (n, d), and the usage."""
        body = {**parameters, "input": texts if isinstance(texts, str) else list(texts)}
        body |= {"model": model, "tenant_id": tenant_id}
        result = await self._system.pipeline.answer(Call.of("embedding", body))
        assert result.answer.array is not None, "an embedding answer carries vectors"
        return result.answer.array, dict(result.answer.usage or {})

    async def stream(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """One chat answer as OpenAI chunks. Call with `handle.options(stream=True)`."""
        request = {**request, "stream": True}
        stream = await self._system.pipeline.stream(Call.of("chat", request))
        counted = bool((request.get("stream_options") or {}).get("include_usage"))
        async with aclosing(stream.chunks) as chunks:
            async for chunk in chunks:
                if counted or chunk.get("choices"):  # the last chunk has usage and no choice
                    yield chunk


class PipelineService(Admin):
    """`deployments.http.service.Service` over this replica's pipeline.

    `host` is the address that HTTP is served on; `secret` is what API keys are hashed with;
    `draining` says whether this replica is about to stop.
    """

    def __init__(
        self,
        system: System,
        secret: bytes,
        host: str | None,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(system, secret, host)
        self._draining = draining
        self._health = HealthCheck(system.health)
        system.on_change(self._rebuild_keys)

    def _rebuild_keys(self, system: System) -> None:
        entries = (
            KeyEntry(k.tenant, k.id, k.hash, k.admin) for k in system.tenants.keys_in_force()
        )
        # Where a key was ever made, revoking the last one does not open the house.
        open_to_all = system.tenants.keyless and ingress.is_loopback(self._host)
        self._keys = Keys(entries, self._secret, open_to_all=open_to_all)

    @property
    def keys(self) -> Keys:
        return self._keys

    @property
    def config_version(self) -> int:
        return self._system.version

    def chat(self, call: HttpCall) -> Coroutine[Any, Any, Reply | StreamReply]:
        return self._run(call)

    completion = chat

    async def embedding(self, call: HttpCall) -> Reply:
        reply = await self._run(call)
        assert isinstance(reply, Reply), "embeddings are never streamed"
        return reply

    def refused(self, route: Route, tenant: str | None, request_id: str, status: int) -> None:
        call = Call(route, {}, NOBODY if tenant is None else tenant, request_id)
        self._system.pipeline.refused(call, status)

    def at_once(self, call: HttpCall) -> Reply | None:
        if call.stream or not self._system.config.gateway.enable_caching:
            return None
        result = self._system.pipeline.at_once(_call(call))
        return None if result is None else self._reply(result, call.tenant)

    async def _run(self, http: HttpCall) -> Reply | StreamReply:
        call = _call(http)
        if http.stream:
            stream = await self._system.pipeline.stream(call)
            told = self._told(stream.facts, http.tenant)
            if not stream.facts.replayed:
                told["cost_nano"] = None  # not known yet
            return StreamReply(chunks=stream.chunks, **told)
        return self._reply(await self._system.pipeline.answer(call), http.tenant)

    def _reply(self, result: Result, tenant: str) -> Reply:
        answer = result.answer
        body = answer.body if answer.json is None else answer.json
        return Reply(body=body, array=answer.array, **self._told(result.facts, tenant))

    def _told(self, facts: Facts, tenant: str) -> dict[str, Any]:
        """The fields of a `Told`."""
        return {
            "model_group": facts.group,
            "deployment": facts.deployment,
            "attempts": facts.attempts,
            "retries": facts.retries,
            "fallbacks": facts.fallbacks,
            "cache": facts.cache,
            "cost_nano": facts.cost_nano,
            "overhead_ms": facts.overhead_s * 1000,
            "config_version": facts.config_version,
            "figures": self.figures(tenant),
            "clamped": facts.clamped,
            "replayed": facts.replayed,
            "warnings": facts.warnings,
        }

    def models(self, tenant: str) -> list[dict[str, Any]]:
        tenants = self._system.tenants
        tenants.require(tenant)
        names = self._system.table.names()
        return [_model(name) for name in names if tenants.allows(tenant, name)]

    def model(self, model_id: str, tenant: str) -> dict[str, Any]:
        group = self._system.table.group(model_id)
        self._system.tenants.require_model(tenant, model_id)
        return _model(group.name)

    def figures(self, tenant: str) -> Mapping[str, Figures]:
        return self._system.limiter.figures(tenant)

    def ready(self) -> tuple[bool, str]:
        # Only what this replica itself cannot do: an outage of a provider, or of an owner, is
        # everybody's, and taking every replica out for it would make it worse.
        if self._draining():
            return False, "this replica is draining"
        if not self._system.table.deployments():
            return False, "no model is configured"
        if self._system.books.full:
            return False, "the ledger is away, and no further paid call may start here"
        return True, "ready"

    async def health(self, detail: bool) -> dict[str, Any]:
        if not detail:
            return {"status": "ok"}
        return (await self._health.run()).model_dump(mode="json")

    async def usage(
        self,
        *,
        tenant: str | None,
        group_by: Sequence[str],
        since_s: float | None,
        until_s: float | None,
    ) -> dict[str, Any]:
        return await self._system.books.usage(
            tenant=tenant, since_s=since_s, until_s=until_s, group_by=group_by
        )

    async def record_feedback(
        self,
        tenant: str,
        *,
        kind: str,
        content: Any,
        rating: Any,
        response_id: str,
        feedback_id: str | None,
    ) -> dict[str, Any]:
        self._system.tenants.require(tenant, param="tenant", status=404)
        recorded = await self._system.feedback.record(
            kind,
            content,
            tenant=tenant,
            response_id=response_id,
            rating=rating,
            feedback_id=feedback_id,
        )
        if recorded is None:
            raise InvalidRequest(
                "The feedback loop is off here (enable_feedback_loop, enable_llmops).",
                code="feedback_loop_off",
                status=409,
            )
        return recorded

    async def feedback_stats(self, tenant: str | None) -> dict[str, Any]:
        told = await self._system.feedback.statistics(tenant)
        return told | {"routing": self._system.table.routing}

    async def metrics(self) -> bytes:
        await self._system.measure()
        return await self._system.system_metrics()

    async def providers(self, tenant: str) -> list[dict[str, Any]]:
        table = self._system.table
        return [table.describe(name) for name in table.names()]

    async def rate_limits(self, tenant: str) -> dict[str, Any]:
        system = self._system
        system.tenants.require(tenant, param="tenant", status=404)
        limits = system.tenants.limits_for(tenant)
        if limits is None:
            return {"tenant": tenant, "limited": False, "limits": None, "now": None}
        try:
            now = await system.limiter.state(tenant)
        except OwnerUnavailable as error:
            raise Overloaded(f"limits cannot be read now: {error}", retry_after_s=1.0) from None
        return {"tenant": tenant, "limited": True, "limits": _limits(limits), "now": now}


def _call(http: HttpCall) -> Call:
    """What the pipeline is asked."""
    control = http.cache_control or ""
    return Call(
        http.route,
        http.body,
        http.tenant,
        http.request_id,
        timeout_s=http.timeout_s,
        cache_read="no-cache" not in control and "no-store" not in control,
        cache_write="no-store" not in control,
        bulk=http.priority == "bulk",
        trace_parent=http.trace_parent,
        idempotency_key=http.idempotency_key,
    )


def _limits(limits: Limits) -> dict[str, Any]:
    """A tenant's limits under the names of the configuration; those it has."""
    told = {
        "requests_per_minute": limits.requests_per_minute,
        "burst_size": limits.burst if limits.requests_per_minute is not None else None,
        "requests_per_hour": limits.requests_per_hour,
        "tokens_per_minute": limits.tokens_per_minute,
        "concurrent_requests": limits.concurrent,
        "usd_per_day": None if limits.day_nano is None else limits.day_nano / 1e9,
        "usd_per_month": None if limits.month_nano is None else limits.month_nano / 1e9,
    }
    return {name: value for name, value in told.items() if value is not None}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": CREATED_S, "owned_by": "forebay"}


def _serving_host() -> str | None:
    """The address that this Serve listens on."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "a replica has a Serve client"
    host: str | None = client.http_config.host
    return host
