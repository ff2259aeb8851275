"""The one deployment on the request path: ASGI for HTTP, plain methods for handles."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from starlette.types import ASGIApp

from actors.rate_limiter.terms import Figures, Limits
from actors.ref import OwnerUnavailable
from actors.registry.policy import (
    KeyExists,
    KeyRecord,
    RegistryFull,
    RegistryUnavailable,
    TenantRecord,
    VersionConflict,
)
from deployments import ingress
from deployments.http import build_asgi
from deployments.http.auth import KeyEntry, Keys
from deployments.http.service import HttpCall, Reply, StreamReply, Told
from forebay.config import SystemConfig, TenantConfig, parse
from forebay.errors import ConfigurationError, InvalidRequest, Overloaded
from forebay.gateway import health_result
from forebay.pipeline import Call, Facts, Route
from forebay.routing import allows
from forebay.secrets import Vault, hash_key, key_secret, new_key
from forebay.system import System, attach, create_owners

GARBAGE_PER_COLLECTION = 10_000  # new objects; Python's 700 is for small programs
CREATED_S = 1_700_000_000  # OpenAI's model objects carry a birthday; ours have none to tell
UNWRITTEN = (OwnerUnavailable, RegistryUnavailable, RegistryFull)  # nothing was stored

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
        self._secret = key_secret(os.environ, Path(boot.data_dir))
        self._service = PipelineService(self._system, self._secret, host)
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
        request = {name: value for name, value in request.items() if name != "stream"}
        stream = await self._system.pipeline.stream(Call.of("chat", request))
        counted = bool((request.get("stream_options") or {}).get("include_usage"))
        async with aclosing(stream.chunks) as chunks:
            async for chunk in chunks:
                if counted or chunk.get("choices"):  # the last chunk has usage and no choice
                    yield chunk


class PipelineService:
    """`deployments.http.service.Service` over this replica's pipeline.

    `host` is the address that HTTP is served on; `secret` is what API keys are hashed with.
    """

    def __init__(self, system: System, secret: bytes, host: str | None) -> None:
        self._system = system
        self._secret = secret
        self._host = host
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

    async def chat(self, call: HttpCall) -> Reply | StreamReply:
        return await self._run("chat", call)

    async def completion(self, call: HttpCall) -> Reply | StreamReply:
        return await self._run("completion", call)

    async def embedding(self, call: HttpCall) -> Reply:
        reply = await self._run("embedding", call)
        assert isinstance(reply, Reply), "embeddings are never streamed"
        return reply

    async def _run(self, route: Route, http: HttpCall) -> Reply | StreamReply:
        control = http.cache_control or ""
        call = Call(
            route,
            http.body,
            http.tenant,
            http.request_id,
            timeout_s=http.timeout_s,
            cache_read="no-cache" not in control and "no-store" not in control,
            cache_write="no-store" not in control,
            bulk=http.priority == "bulk",
        )
        if http.stream:
            stream = await self._system.pipeline.stream(call)
            told = self._told(stream.facts, http.tenant) | {"cost_nano": None}  # not known yet
            return StreamReply(chunks=stream.chunks, **told)
        result = await self._system.pipeline.answer(call)
        answer = result.answer
        return Reply(body=answer.body, array=answer.array, **self._told(result.facts, http.tenant))

    def _told(self, facts: Facts, tenant: str) -> dict[str, Any]:
        told = Told(
            model_group=facts.group,
            deployment=facts.deployment,
            attempts=facts.attempts,
            retries=facts.retries,
            fallbacks=facts.fallbacks,
            cache=facts.cache,
            cost_nano=facts.cost_nano,
            overhead_ms=facts.overhead_s * 1000,
            config_version=facts.config_version,
            figures=self.figures(tenant),
            clamped=facts.clamped,
            warnings=facts.warnings,
        )
        return {name: getattr(told, name) for name in Told.__slots__}

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
        return True, "ready"

    async def health(self, detail: bool) -> dict[str, Any]:
        if not detail:
            return {"status": "ok"}
        return health_result(await self._system.health(), 0.0).model_dump(mode="json")

    async def usage(
        self,
        *,
        tenant: str | None,
        group_by: Literal["model", "day", "tenant"] | None,
        since_s: float | None,
        until_s: float | None,
    ) -> dict[str, Any]:
        return await self._system.books.usage(
            tenant=tenant, since_s=since_s, until_s=until_s, group_by=group_by
        )

    async def metrics(self) -> bytes:
        return self._system.metrics()

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

    # ------------------------------------------------------------------------------- admins

    async def create_key(
        self,
        tenant: str,
        *,
        key_id: str | None,
        admin: bool,
        limits: dict[str, Any] | None,
        models: list[str] | None,
    ) -> dict[str, Any]:
        system = self._system
        made = None
        if limits is not None or models is not None:
            made = self._made(tenant, limits, models)
        else:
            system.tenants.require(tenant, param="tenant", status=404)
        key, created_s = new_key(), time.time()
        name = key_id or secrets.token_hex(4)
        if any(
            (known.tenant, known.id) == (tenant, name) for known in system.tenants.keys_in_force()
        ):
            raise _key_exists(tenant, name)
        hashed = hash_key(key, self._secret)
        record = KeyRecord(name, tenant, hashed, admin, int(created_s * 1000))
        try:
            await system.registry.add_key(record, made)
        except KeyExists:
            raise _key_exists(tenant, name) from None
        except UNWRITTEN as error:
            raise Overloaded(f"the key was not made: {error}", retry_after_s=1.0) from None
        created = datetime.fromtimestamp(created_s, UTC).isoformat(timespec="seconds")
        return {
            "id": name,
            "tenant": tenant,
            "key": key,
            "hash": hashed,
            "admin": admin,
            "created": created,
        }

    def _made(
        self, tenant: str, limits: dict[str, Any] | None, models: list[str] | None
    ) -> TenantRecord:
        """A tenant as it is made at run time, or changed.

        Raises:
            ConfigurationError: the configuration has this tenant, or a limit or model is wrong.
        """
        system = self._system
        if any(known.id == tenant for known in system.config.gateway.tenants):
            raise ConfigurationError(
                f"tenant {tenant!r} is in the configuration: change its limits and models there",
                param="tenant",
            )
        settings: dict[str, Any] = {}
        if limits is not None:
            settings["limits"] = limits
        if models is not None:
            settings["models"] = models
        TenantConfig(id=tenant, **settings)
        for model in models or ():
            if not any(allows([model], name) for name in system.table.names()):
                system.table.group(model)
        return TenantRecord(tenant, settings)

    async def list_keys(self) -> list[dict[str, Any]]:
        return [
            {
                "id": key.id,
                "tenant": key.tenant,
                "admin": key.admin,
                "source": key.source,
                "created": None if key.created_ms is None else key.created_ms / 1000,
            }
            for key in self._system.tenants.keys_in_force()
        ]

    async def revoke_key(self, key_id: str, tenant: str | None) -> dict[str, Any]:
        keys = self._system.tenants.keys_in_force()
        found = [k for k in keys if k.id == key_id and tenant in (None, k.tenant)]
        if not found:
            raise InvalidRequest(f"no key has the id {key_id!r}", code="key_not_found", status=404)
        if len(found) > 1:
            whose = ", ".join(key.tenant for key in found)
            raise InvalidRequest.about(
                "tenant",
                f"several tenants have a key {key_id!r} ({whose}); say which",
                code="key_ambiguous",
                status=409,
            )
        key = found[0]
        try:
            await self._system.registry.revoke_key(key.tenant, key.id, key.hash)
        except UNWRITTEN as error:
            raise Overloaded(f"the key was not revoked: {error}", retry_after_s=1.0) from None
        return {"id": key.id, "tenant": key.tenant, "revoked": True}

    async def read_config(self) -> dict[str, Any]:
        registry = self._system.registry
        return {"version": registry.version, "config": registry.document}

    async def write_config(self, document: dict[str, Any], expected: int | None) -> int:
        system = self._system
        config = parse(document)
        vault = Vault(Path(system.config.data_dir))
        told = config.document(vault)
        has_keys = any(t.keys for t in config.gateway.tenants) or bool(system.access.keys)
        ingress.require_keys_or_loopback(self._host, has_keys)
        now = system.version
        if expected is not None and expected != now:
            raise _conflict(expected, now)
        before, after = system.config.server.limiter_shards, config.server.limiter_shards
        try:
            if after != before:
                await system.spread(after)
            return await system.registry.put(told, "written over HTTP", now)
        except VersionConflict as conflict:
            if after != before:
                await system.spread(before)
            raise _conflict(now, conflict.current) from None
        except UNWRITTEN as error:
            raise Overloaded(f"nothing was changed: {error}", retry_after_s=1.0) from None


def _key_exists(tenant: str, key_id: str) -> InvalidRequest:
    message = f"tenant {tenant!r} has a key {key_id!r} already"
    return InvalidRequest.about("id", message, code="key_exists", status=409)


def _conflict(expected: int, current: int) -> InvalidRequest:
    return InvalidRequest(
        f"version {expected} was expected, and the newest is {current}: read it, and try again",
        code="version_conflict",
        status=412,
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
