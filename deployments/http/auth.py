"""Who is asking: from a key to a tenant.

Rule 1: a key is compared by its HMAC only; the table holds no key, and nothing here keeps one.
Rule 2: unknown, revoked, malformed and missing keys get one and the same answer.
Rule 3: a tenant's name is taken from a header only where no keys exist at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from forebay.errors import AuthenticationError, ConfigurationError, InvalidRequest
from forebay.pipeline import DEFAULT_TENANT
from forebay.secrets import hash_key

KEY_CHARS_MAX = 512

_TENANT = re.compile(rb"[A-Za-z0-9._:@-]{1,128}")


class KeyConfig(Protocol):
    """A key as the configuration holds it."""

    @property
    def id(self) -> str: ...
    @property
    def hash(self) -> str: ...


class TenantKeys(Protocol):
    """The part of a tenant's configuration that says who it is."""

    @property
    def id(self) -> str: ...
    @property
    def keys(self) -> Sequence[KeyConfig]: ...
    @property
    def admin(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class TenantIdentity:
    """Whom a request speaks for. `key_id` is None where no keys are configured."""

    tenant: str
    key_id: str | None = None
    admin: bool = False


class Keys:
    """The key table of one configuration: immutable, replaced as a whole when it changes.

    Bounded by the configuration. Failure behaviour: without any key every caller is the tenant
    `default` (or the one that `X-Tenant-ID` names) and may do everything; that such a system
    listens on loopback only is checked where it starts.
    """

    def __init__(self, tenants: Iterable[TenantKeys], secret: bytes) -> None:
        self._secret = secret
        self._by_hash: dict[str, TenantIdentity] = {}
        for tenant in tenants:
            for key in tenant.keys:
                identity = TenantIdentity(tenant.id, key.id, tenant.admin)
                if self._by_hash.setdefault(key.hash, identity) != identity:
                    raise ConfigurationError(f"key {key.id!r} of {tenant.id!r} is given twice")

    @property
    def none_configured(self) -> bool:
        return not self._by_hash

    def tenant_for(self, key: str) -> TenantIdentity | None:
        """The owner of `key`, or None. The look-up is by digest, so its time tells nothing."""
        if not 0 < len(key) <= KEY_CHARS_MAX:
            return None
        return self._by_hash.get(hash_key(key, self._secret))

    def identify(self, headers: Mapping[bytes, bytes]) -> TenantIdentity:
        """The caller of a request with these headers (lower-case names).

        Raises AuthenticationError (401), or InvalidRequest (400) for a tenant's name that is none.
        """
        if not self._by_hash:
            return _named(headers.get(b"x-tenant-id"))
        identity = self.tenant_for(_key(headers))
        if identity is None:
            raise AuthenticationError("Incorrect or missing API key.")
        return identity

    def __repr__(self) -> str:
        return f"<Keys: {len(self._by_hash)}>"


def _key(headers: Mapping[bytes, bytes]) -> str:
    """The key as sent, "" when there is none."""
    given = headers.get(b"authorization")
    if given is None:
        return headers.get(b"x-api-key", b"").decode("latin-1")
    scheme, _, key = given.partition(b" ")
    return key.strip().decode("latin-1") if scheme.lower() == b"bearer" else ""


def _named(tenant: bytes | None) -> TenantIdentity:
    if tenant is None:
        return TenantIdentity(DEFAULT_TENANT, admin=True)
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest.about(
            "X-Tenant-ID", "X-Tenant-ID must be 1 to 128 letters, digits or ._:@-"
        )
    return TenantIdentity(tenant.decode(), admin=True)
