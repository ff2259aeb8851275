"""What the Registry keeps, and how changing it can fail.

Two things, each with version numbers of its own: the configuration, and the access that is given
and taken while the system runs (keys, their tenants, revocations).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

CONFIG_KEY = "config"  # the keys under which the Registry publishes
ACCESS_KEY = "access"
LOCK_WAIT_S = 10.0  # the process of an owner that was replaced may still be dying
READ_WAIT_S = 0.2  # another reader is gone by then
DOCUMENT_BYTES_MAX = 8 * 2**20
NOTE_CHARS_MAX = 500
VERSIONS_MAX = 1_000  # versions kept; older ones are forgotten, their numbers never used again
PUTS_MAX = 10_000  # put ids kept
KEYS_MAX = 20_000  # keys made at run time
TENANTS_MAX = 20_000  # tenants made at run time
REVOKED_MAX = 100_000  # never forgotten: a revoked key that is forgotten would be good again
OPS_MAX = 10_000  # ids of changes of the access kept
TEXT_CHARS_MAX = 200  # an id, a hash
SETTINGS_BYTES_MAX = 16 * 2**10  # one tenant's settings


@dataclass(frozen=True, slots=True)
class Version:
    """One version in the history. `at_ms` is UTC epoch milliseconds; `digest` is of the document.

    The digest is blake2b-128 over the canonical JSON, in hex.
    """

    version: int
    at_ms: int
    note: str
    digest: str


@dataclass(frozen=True, slots=True)
class Head:
    """The newest version: its number (0 when there is none yet) and its canonical JSON."""

    version: int = 0
    text: str = "{}"

    def document(self) -> dict[str, Any]:
        """The document, each time a new object."""
        return dict(json.loads(self.text))


# Records have no slots: frozen ones with slots take twice as long to pickle.


@dataclass(frozen=True)
class KeyRecord:
    """A key made at run time, by its hash only. `created_ms` is UTC epoch milliseconds."""

    id: str
    tenant: str
    hash: str
    admin: bool
    created_ms: int


@dataclass(frozen=True)
class TenantRecord:
    """A tenant made at run time. `settings` is plain JSON that the Registry does not interpret."""

    id: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Revocation:
    """A key that is never good again, wherever it was made. `at_ms` is UTC epoch milliseconds."""

    id: str
    tenant: str
    hash: str
    at_ms: int


@dataclass(frozen=True)
class Access:
    """All that was given and taken at run time; `version` grows by one with each change.

    `keys` and `revoked` are by hash, `tenants` by id; all with the oldest first. Nobody changes
    them in place: `with_key` and `without_key` make the next access. A key is good when its hash
    is not in `revoked`, and is in `keys` or in the configuration.
    """

    version: int = 0
    keys: Mapping[str, KeyRecord] = field(default_factory=dict)
    tenants: Mapping[str, TenantRecord] = field(default_factory=dict)
    revoked: Mapping[str, Revocation] = field(default_factory=dict)

    def with_key(self, record: KeyRecord, tenant: TenantRecord | None) -> Access:
        """The access after this key was given; `tenant` is new or takes the place of its like.

        Raises:
            KeyExists: its hash is or was a key here, or its tenant has a key of its id.
            RegistryFull: there is no room for it, or for its tenant.
        """
        if record.hash in self.revoked:
            raise KeyExists(record.tenant, record.id, "this key was revoked, and stays so")
        if record.hash in self.keys:
            raise KeyExists(record.tenant, record.id, "this key is there already")
        if any(k.id == record.id and k.tenant == record.tenant for k in self.keys.values()):
            raise KeyExists(record.tenant, record.id, "the tenant has a key of this id")
        if len(self.keys) >= KEYS_MAX:
            raise RegistryFull("keys", KEYS_MAX)
        tenants = self.tenants
        if tenant is not None:
            if tenant.id not in tenants and len(tenants) >= TENANTS_MAX:
                raise RegistryFull("tenants", TENANTS_MAX)
            tenants = {**tenants, tenant.id: tenant}
        keys = {**self.keys, record.hash: record}
        return replace(self, version=self.version + 1, keys=keys, tenants=tenants)

    def without_key(self, revocation: Revocation) -> Access:
        """The access after this key was revoked; this very one when it was before.

        Raises:
            RegistryFull: there is no room for another revocation.
        """
        if revocation.hash in self.revoked:
            return self
        if len(self.revoked) >= REVOKED_MAX:
            raise RegistryFull("revoked keys", REVOKED_MAX)
        keys = {k.hash: k for k in self.keys.values() if k.hash != revocation.hash}
        revoked = {**self.revoked, revocation.hash: revocation}
        return replace(self, version=self.version + 1, keys=keys, revoked=revoked)


class VersionConflict(Exception):
    """The document was made for version `expected`, but the newest one is `current`."""

    def __init__(self, expected: int, current: int) -> None:
        super().__init__(expected, current)
        self.expected, self.current = expected, current

    def __str__(self) -> str:
        return (
            f"version {self.expected} was expected, but the newest is {self.current}: "
            "look at it, and put the document again for that version"
        )


class InvalidDocument(ValueError):
    """The document is not plain JSON, or it is too large. Nothing was stored."""


class KeyExists(Exception):
    """The key cannot be given: `reason` says what is in its way. Nothing was stored."""

    def __init__(self, tenant: str, key_id: str, reason: str) -> None:
        super().__init__(tenant, key_id, reason)
        self.tenant, self.id, self.reason = tenant, key_id, reason

    def __str__(self) -> str:
        return f"key {self.id!r} of tenant {self.tenant!r} cannot be made: {self.reason}"


class RegistryFull(Exception):
    """There are `most` `what` in the Registry, and it keeps no more. Nothing was stored."""

    def __init__(self, what: str, most: int) -> None:
        super().__init__(what, most)
        self.what, self.most = what, most

    def __str__(self) -> str:
        return f"the registry is full: it keeps at most {self.most} {self.what}"


class InvalidRecord(ValueError):
    """A key, a tenant or a revocation that cannot be kept as it is. Nothing was stored."""


class RegistryUnavailable(Exception):
    """The Registry's file cannot be used: somebody else has it, it is damaged, the disk is full.

    Whether a change that failed so was stored is known by making it again with the same id.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"the registry's file {self.path} cannot be used: {self.reason}"


def checked_text(what: str, text: str, most: int = TEXT_CHARS_MAX) -> str:
    """`text`, which can be stored and shown.

    Raises:
        InvalidRecord: it is no text, empty, over `most` characters, or has unprintable ones.
    """
    if not isinstance(text, str) or not 0 < len(text) <= most or not text.isprintable():
        raise InvalidRecord(f"{what} must be 1 to {most} printable characters")
    return text


def checked_key(record: KeyRecord) -> KeyRecord:
    """The record, with plain values only.

    Raises:
        InvalidRecord: a text of it cannot be kept.
    """
    return KeyRecord(
        checked_text("a key's id", record.id),
        checked_text("a key's tenant", record.tenant),
        checked_text("a key's hash", record.hash),
        bool(record.admin),
        int(record.created_ms),
    )


def checked_tenant(record: TenantRecord) -> TenantRecord:
    """The record, with settings that are nobody else's.

    Raises:
        InvalidRecord: its id cannot be kept; its settings are no JSON object, or too large.
    """
    try:
        text = canonical(record.settings)
    except InvalidDocument as error:
        raise InvalidRecord(f"the settings of a tenant cannot be kept: {error}") from None
    if len(text) > SETTINGS_BYTES_MAX:
        raise InvalidRecord(
            f"a tenant's settings of {len(text)} bytes are over {SETTINGS_BYTES_MAX}"
        )
    return TenantRecord(checked_text("a tenant's id", record.id), json.loads(text))


def canonical(document: Mapping[str, Any]) -> str:
    """The document as JSON, the same text for equal documents (keys sorted, ASCII, no spaces).

    Raises:
        InvalidDocument: it is no JSON object, or has more than `DOCUMENT_BYTES_MAX` bytes.
    """
    if not isinstance(document, Mapping):
        raise InvalidDocument(f"a configuration is a mapping, not {type(document).__name__}")
    try:
        text = json.dumps(dict(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDocument(f"a configuration must be plain JSON: {error}") from None
    if len(text) > DOCUMENT_BYTES_MAX:
        raise InvalidDocument(f"a configuration of {len(text)} bytes is over {DOCUMENT_BYTES_MAX}")
    return text


def digest(text: str) -> str:
    """blake2b-128 of canonical JSON, in hex."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
