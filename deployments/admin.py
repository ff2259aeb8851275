"""What an admin may do to a running system: keys, the configuration, breakers, the cache.

Rule 1: what is acknowledged is durable, or, for breakers and the cache, in force at their owners;
        every process obeys it within a second.
Rule 2: no answer holds a secret, but a new key's own.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from actors.circuit_breaker.policy import State
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
from deployments.http.service import BreakerOrder
from forebay import cache as response_cache
from forebay.config import TenantConfig, parse
from forebay.errors import ConfigurationError, InvalidRequest, ModelNotFound, Overloaded
from forebay.health import by_group
from forebay.routing import Deployment, allows
from forebay.secrets import Vault, hash_key, new_key
from forebay.system import System
from forebay.validation import ValidationManager

UNWRITTEN = (OwnerUnavailable, RegistryUnavailable, RegistryFull)  # nothing was stored
FORCED: Mapping[BreakerOrder, State | None] = {
    "closed": State.FORCED_CLOSED,
    "open": State.FORCED_OPEN,
    "auto": None,
}
UNJUDGED: Mapping[str, Any] = {
    "generation": 0,
    "open_for_s": 0.0,
    "calls": 0,
    "failures": 0,
    "slow": 0,
    "failures_in_row": 0,
    "retries_left": None,
    "verdicts": {},
}
"""The figures of a deployment that its owner has heard nothing of, or is not there to tell."""

log = logging.getLogger(__name__)


class Admin:
    """The admin's half of a replica's service.

    `host` is the address that HTTP is served on; `secret` is what API keys are hashed with.
    Failure behaviour: what cannot be stored, or told its owner, is refused with `Overloaded` and
    has no effect, or, where no answer came, may have it: asking again is fine.
    """

    def __init__(self, system: System, secret: bytes, host: str | None) -> None:
        self._system = system
        self._secret = secret
        self._host = host

    # -------------------------------------------------------------------------- keys, tenants

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
        ValidationManager(config.gateway)  # what it cannot find, no replica would find
        vault = Vault(Path(system.config.data_dir))
        told = config.document(vault)
        has_keys = any(t.keys for t in config.gateway.tenants) or bool(system.access.keys)
        ingress.require_keys_or_loopback(self._host, has_keys)
        now = system.version
        if expected is not None and expected != now:
            raise _conflict(expected, now)
        before, after = system.config.server.limiter_shards, config.server.limiter_shards
        written = False
        try:
            if after != before:
                await system.spread(before, after, now + 1)
            version = await system.registry.put(told, "written over HTTP", now)
            written = True
        except VersionConflict as conflict:
            raise _conflict(now, conflict.current) from None
        except UNWRITTEN as error:
            raise Overloaded(f"nothing was changed: {error}", retry_after_s=1.0) from None
        finally:
            if after != before and not written:
                await self._take_back(before, after, now + 1)
        return version

    async def _take_back(self, before: int, after: int, version: int) -> None:
        """Leave the limiter's owners as many as they were, as far as they can be told.

        Where the configuration was stored after all, or is another one's, the owners learn it from
        whoever obeys it.
        """
        try:
            await self._system.spread(after, before, version)
        except OwnerUnavailable as error:
            log.warning(
                "limiter: %d owners were announced and %d hold; not all know it: %s",
                after,
                before,
                error,
            )

    # ------------------------------------------------------------------------------- breakers

    async def breakers(self) -> dict[str, Any]:
        system = self._system
        try:
            board, source = await system.breaker.board(), "owner"
        except OwnerUnavailable:
            board, source = {}, "replica"  # what this process heard last, without figures
        rows = [
            self._row(group, deployment, board.get(deployment.circuit))
            for group, deployments in by_group(system.table).items()
            for deployment in deployments
        ]
        return {"source": source, "data": rows}

    async def set_breaker(self, deployment: str, state: BreakerOrder) -> dict[str, Any]:
        system = self._system
        try:
            found = system.table.deployment(deployment)
        except ModelNotFound:
            known = ", ".join(dict.fromkeys(d.circuit for d in system.table.deployments()))
            raise InvalidRequest.about(
                "deployment",
                f"no deployment is called {deployment[:200]!r}; there are {known[:2000]}",
                code="deployment_not_found",
                status=404,
            ) from None
        if not system.config.gateway.enable_circuit_breaker:
            raise InvalidRequest(
                "enable_circuit_breaker is off, so no breaker is obeyed",
                code="circuit_breaker_off",
                status=409,
            )
        try:
            standing = await system.breaker.force(found.circuit, FORCED[state])
        except (OwnerUnavailable, ValueError) as error:  # away, or it has no room for one more
            raise Overloaded(f"the breaker was not set: {error}", retry_after_s=1.0) from None
        log.warning("breaker of %s: set to %s by an admin", found.circuit, state)
        return {
            "deployment": found.circuit,
            "state": standing.state.value,
            "reason": standing.reason.value,
            "retry_after_s": standing.retry_after_s,
        }

    # ------------------------------------------------------------------------------ the cache

    async def cache(self) -> dict[str, Any]:
        system = self._system
        figures = await response_cache.prefix_figures(system)
        return {
            "responses": await response_cache.stats(system),
            "prompts": system.kv_cache.told(figures),
        }

    async def clear_cache(self, *, tenant: str | None, model: str | None, key: str | None) -> int:
        count = await response_cache.invalidate(self._system, tenant=tenant, model=model, key=key)
        log.warning("cache: %d entries cleared by an admin", count)
        return count

    def _row(
        self, group: str, deployment: Deployment, told: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """One entry of the configuration, and how its breaker stands. Parameters are not told."""
        standing = self._system.breaker.standing(deployment.circuit)
        seen = {
            "state": standing.state.value,
            "reason": standing.reason.value,
            "retry_after_s": standing.retry_after_s,
        }
        return {
            "deployment": deployment.circuit,
            "group": group,
            "model": deployment.model,
            "provider": deployment.provider,
            **UNJUDGED,
            **seen,
            **(told or {}),
        }


def _key_exists(tenant: str, key_id: str) -> InvalidRequest:
    message = f"tenant {tenant!r} has a key {key_id!r} already"
    return InvalidRequest.about("id", message, code="key_exists", status=409)


def _conflict(expected: int, current: int) -> InvalidRequest:
    return InvalidRequest(
        f"version {expected} was expected, and the newest is {current}: read it, and try again",
        code="version_conflict",
        status=412,
    )
