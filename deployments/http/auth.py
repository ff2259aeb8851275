"""Who is asking: from a key to a tenant.

Rule 1: a key is compared by a MAC of it only; no table holds a key, and nothing here keeps one.
Rule 2: unknown, revoked, malformed and missing keys get one and the same answer.
Rule 3: a tenant's name is taken from a header only where the system is open to all.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forebay.errors import AuthenticationError, InvalidRequest
from forebay.secrets import KeyHash, hash_key, operator_key
from forebay.tenants import DEFAULT_TENANT

KEY_CHARS_MAX = 512
SEEN_MAX = 10_000
OPERATOR = "operator"

_NAME = re.compile(r"[A-Za-z0-9._:@-]{1,128}")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key that is in force: whose it is, and its hash."""

    tenant: str
    id: str
    hash: str
    admin: bool = False


@dataclass(frozen=True, slots=True)
class TenantIdentity:
    """Whom a request speaks for. `key_id` is None where the system is open to all."""

    tenant: str
    key_id: str | None = None
    admin: bool = False


def is_name(text: str) -> bool:
    """Whether a text can be the name of a tenant or of a key."""
    return _NAME.fullmatch(text) is not None


class Keys:
    """The keys in force: immutable, replaced as a whole when one comes or goes.

    Of two entries with one hash the first one holds. The operator's key is always among them.
    `Authorization` headers that were good are known again by a quicker MAC of their own, whose key
    is this object's alone. Bounded by what it is made from, and by SEEN_MAX such headers. Failure
    behaviour: where `open_to_all` every caller is the tenant `default` (or the one that
    `X-Tenant-ID` names) and may do everything; that such a system can be reached from loopback only
    is for its maker to see to. Else whoever has no key in force is refused, even if there is none.
    """

    def __init__(self, entries: Iterable[KeyEntry], secret: bytes, *, open_to_all: bool) -> None:
        self._hash = KeyHash(secret)
        self._open_to_all = open_to_all
        operator = hash_key(operator_key(secret), secret)
        self._by_hash = {operator: TenantIdentity(DEFAULT_TENANT, OPERATOR, admin=True)}
        for entry in entries:
            identity = TenantIdentity(entry.tenant, entry.id, entry.admin)
            self._by_hash.setdefault(entry.hash, identity)
        self._seen: dict[bytes, TenantIdentity] = {}
        self._blank = hashlib.blake2b(key=os.urandom(32), digest_size=32)

    @property
    def open_to_all(self) -> bool:
        return self._open_to_all

    def tenant_for(self, key: str) -> TenantIdentity | None:
        """The owner of `key`, or None. The look-up is by digest, so its time tells nothing."""
        if not 0 < len(key) <= KEY_CHARS_MAX:
            return None
        return self._by_hash.get(self._hash(key))

    def identify(self, headers: Mapping[bytes, bytes]) -> TenantIdentity:
        """The caller of a request with these headers (lower-case names).

        Raises AuthenticationError (401), or InvalidRequest (400) for a tenant's name that is none.
        """
        if self._open_to_all:
            return _named(headers.get(b"x-tenant-id"))
        given = headers.get(b"authorization", b"")
        digest = self._blank.copy()
        digest.update(given)
        mac = digest.digest()
        identity = self._seen.get(mac)
        if identity is not None:
            return identity
        key = _bearer(given)
        identity = self.tenant_for(key or _text(headers.get(b"x-api-key", b"")))
        if identity is None:
            raise AuthenticationError("Incorrect or missing API key.")
        if key:
            if len(self._seen) >= SEEN_MAX:
                self._seen.clear()
            self._seen[mac] = identity
        return identity

    def __repr__(self) -> str:
        return f"<Keys: {len(self._by_hash)}>"


def _bearer(authorization: bytes) -> str:
    """The bearer's key as sent; "" when there is none."""
    scheme, _, key = authorization.partition(b" ")
    return _text(key) if scheme.lower() == b"bearer" else ""


def _text(key: bytes) -> str:
    return key.strip().decode("latin-1")


def _named(tenant: bytes | None) -> TenantIdentity:
    if tenant is None:
        return TenantIdentity(DEFAULT_TENANT, admin=True)
    name = tenant.decode("latin-1")
    if not is_name(name):
        raise InvalidRequest.about(
            "X-Tenant-ID", "X-Tenant-ID must be 1 to 128 letters, digits or ._:@-"
        )
    return TenantIdentity(name, admin=True)
