"""Tenants of one configuration: who exists, with what keys, limits and models.

Rule 1: a tenant comes from the configuration, or was made at run time; the configuration wins.
Rule 2: where any tenant exists, a name that none has is an error; `default` always exists.
Rule 3: a revoked key stays revoked, wherever it stands.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from actors.rate_limiter.terms import Limits
from actors.registry.policy import Access
from forebay.config import GatewayConfig, RateLimitConfig, TenantConfig
from forebay.errors import ConfigurationError, InvalidRequest, ModelNotFound
from forebay.faults import nearest
from forebay.routing import allows

DEFAULT_TENANT = "default"
LIMITS_REMEMBERED_MAX = 100_000
NAMES_COMPARED_MAX = 200

log = logging.getLogger(__name__)


class TenantKey(NamedTuple):
    """A key that opens a tenant, by its hash. `source` is config or runtime."""

    tenant: str
    id: str
    hash: str
    admin: bool
    source: str
    created_ms: int | None = None


class Tenants:
    """The tenants in force in this process; made anew whenever something changes.

    Bounded by the configuration, the Registry, and LIMITS_REMEMBERED_MAX names of tenants that
    exist nowhere, which are allowed where no tenant is configured.
    """

    def __init__(self, gateway: GatewayConfig, access: Access, version: int) -> None:
        self._gateway = gateway
        self._access = access
        self._version = version + access.version
        runtime = {name: _made(name, it.settings) for name, it in access.tenants.items()}
        self._by_id = {**runtime, **{tenant.id: tenant for tenant in gateway.tenants}}
        self._limits: dict[str, tuple[Limits, RateLimitConfig] | None] = {}

    def __iter__(self) -> Iterator[TenantConfig]:
        return iter(self._by_id.values())

    def get(self, name: str) -> TenantConfig | None:
        return self._by_id.get(name)

    def exists(self, name: str) -> bool:
        """Whether requests may be made for this tenant."""
        return not self._by_id or name in self._by_id or name == DEFAULT_TENANT

    def require(self, name: str, *, param: str = "tenant_id", status: int = 400) -> None:
        """Raises InvalidRequest, with the nearest name, where no such tenant exists."""
        if self.exists(name):
            return
        names = [known for known, _ in zip(self._by_id, range(NAMES_COMPARED_MAX), strict=False)]
        close = nearest(name[:64], names)
        hint = f"; did you mean {close!r}?" if close else ""
        raise InvalidRequest.about(
            param, f"unknown tenant {name[:128]!r}{hint}", code="unknown_tenant", status=status
        )

    def allows(self, name: str, model: str) -> bool:
        """Whether the tenant may use a model."""
        tenant = self._by_id.get(name)
        return tenant is None or allows(tenant.models, model)

    def require_model(self, name: str, model: str) -> None:
        if not self.allows(name, model):
            raise ModelNotFound(f"model {model!r} is not for this tenant", param="model")

    # ------------------------------------------------------------------------------- limits

    def limits_for(self, name: str) -> Limits | None:
        """The tenant's limits, None where nothing limits it."""
        found = self._limits_of(name)
        return None if found is None else found[0]

    def queue_for(self, name: str) -> tuple[float, int]:
        """Longest wait in seconds, and how many may wait, for callers that agree to wait."""
        found = self._limits_of(name)
        if found is None or not found[1].enable_queuing:
            return 0.0, 0
        return found[1].queue_timeout, found[1].max_queue_size

    def counts_cache_hits(self, name: str) -> bool:
        found = self._limits_of(name)
        return found is None or found[1].count_cache_hits

    def _limits_of(self, name: str) -> tuple[Limits, RateLimitConfig] | None:
        try:
            return self._limits[name]
        except KeyError:
            pass
        if len(self._limits) >= LIMITS_REMEMBERED_MAX:
            self._limits.clear()
        gateway = self._gateway
        known = self._by_id.get(name)
        told = (known.limits if known is not None else None) or gateway.rate_limit_config
        found = None
        if told is not None and gateway.enable_rate_limiting:
            found = (told.limits(self._version), told)
        self._limits[name] = found
        return found

    # --------------------------------------------------------------------------------- keys

    @property
    def keyless(self) -> bool:
        """Whether no key was ever made: nobody has one, and none was revoked."""
        access = self._access
        configured = any(tenant.keys for tenant in self._gateway.tenants)
        return not (configured or access.keys or access.revoked)

    def keys_in_force(self) -> list[TenantKey]:
        """Every key in force."""
        revoked = self._access.revoked
        found = [
            TenantKey(tenant.id, key.id, key.hash, tenant.admin, "config")
            for tenant in self._gateway.tenants
            for key in tenant.keys
        ]
        for record in self._access.keys.values():
            owner = self._by_id.get(record.tenant)
            if owner is None and self._by_id and record.tenant != DEFAULT_TENANT:
                continue  # its tenant was taken out of the configuration
            admin = record.admin or (owner is not None and owner.admin)
            key = TenantKey(record.tenant, record.id, record.hash, admin, "runtime")
            found.append(key._replace(created_ms=record.created_ms))
        return [key for key in found if key.hash not in revoked]


def _made(name: str, settings: Mapping[str, Any]) -> TenantConfig:
    """A tenant made at run time.

    What it may hold was checked when it was made. If a newer version of this code refuses it all
    the same, the tenant may use nothing, rather than everything.
    """
    try:
        return TenantConfig(id=name, **settings)
    except ConfigurationError as error:
        log.error("tenant %s was made at run time and may use no model now: %s", name, error)
        return TenantConfig(id=name, models=[])
