"""The Registry's desk: the configuration and the access that this process obeys."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

from actors.ref import Clock, OwnerRef
from actors.registry.policy import (
    ACCESS_KEY,
    CONFIG_KEY,
    LOCK_WAIT_S,
    Access,
    KeyRecord,
    TenantRecord,
    Version,
)
from actors.watch import ANSWER_S, Sleep, WatchClient

PUT_S = LOCK_WAIT_S + ANSWER_S  # an owner that has just begun may have to wait for its file first


class RegistryDesk:
    """Hands on each new configuration and each new access, and makes changes to both.

    `on_config(version, document)` is called once there is a version, `on_access(access)` from the
    first word of the Registry's on, and before `on_config` when both are new.
    Owns: what was taken last: `version` and `document` (0 before the first) are what `on_config`
    has accepted, `last_access` (None before the first) what `on_access` has.
    Bounds: one document, one access.
    Failure behaviour: with the Registry away the last version and the last access hold; neither is
    handed on again when it is known. What is refused by raising is logged, and what was before it
    stays in force here: an `on_access` that raises leaves revoked keys good.
    """

    def __init__(
        self,
        ref: OwnerRef,
        on_config: Callable[[int, dict[str, Any]], None],
        on_access: Callable[[Access], None] | None = None,
        clock: Clock = time.monotonic,
        random: Callable[[], float] = random.random,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.version = 0
        self.document: dict[str, Any] = {}
        self.last_access: Access | None = None
        self._ref = ref
        self._on_config = on_config
        self._on_access = on_access
        self._watch = WatchClient(ref, self._changed, clock, random, answer_s=PUT_S, sleep=sleep)

    async def start(self) -> None:
        """Take the access and the newest version, if there is one, then follow.

        Raises:
            OwnerUnavailable: the Registry could not be reached.
            RegistryUnavailable: the Registry cannot use its file.
            Exception: what `on_access` or `on_config` raised for the first ones.
        """
        await self._watch.start()

    async def close(self) -> None:
        """Stop following."""
        await self._watch.close()

    async def put(
        self, document: dict[str, Any], note: str = "", expected: int | None = None
    ) -> int:
        """Store a new version, durably; it arrives here, as everywhere, by being pushed.

        Raises:
            VersionConflict, InvalidDocument, RegistryUnavailable: see `Registry.put`.
            OwnerUnavailable: no answer; whether it was stored is seen by putting it again.
        """
        put_id = uuid.uuid4().hex
        version: int = await self._ref.ask("put", document, note, expected, put_id, timeout_s=PUT_S)
        return version

    async def add_key(
        self, record: KeyRecord, tenant: TenantRecord | None = None, op_id: str = ""
    ) -> int:
        """Give a key, durably; the access version that has it. It arrives here by being pushed.

        With the same `op_id` again it is given once; without one each call is one of its own.

        Raises:
            KeyExists, RegistryFull, InvalidRecord, RegistryUnavailable: see `Registry.add_key`.
            OwnerUnavailable: no answer; whether it was given is seen by asking with the same id.
        """
        version: int = await self._ref.ask(
            "add_key", record, tenant, op_id or uuid.uuid4().hex, timeout_s=PUT_S
        )
        return version

    async def revoke_key(self, tenant: str, key_id: str, key_hash: str, op_id: str = "") -> int:
        """Make a key void for ever, durably; the access version that has it so.

        Raises:
            RegistryFull, InvalidRecord, RegistryUnavailable: see `Registry.revoke_key`.
            OwnerUnavailable: no answer; revoking it again is fine.
        """
        version: int = await self._ref.ask(
            "revoke_key", tenant, key_id, key_hash, op_id or uuid.uuid4().hex, timeout_s=PUT_S
        )
        return version

    async def access(self) -> Access:
        """All that was given and revoked at run time, as the Registry has it now."""
        access: Access = await self._ref.ask("access", timeout_s=PUT_S)
        return access

    async def history(self, limit: int = 20) -> list[Version]:
        """The newest versions, newest first."""
        history: list[Version] = await self._ref.ask("history", limit, timeout_s=PUT_S)
        return history

    def stats(self) -> dict[str, Any]:
        access = None if self.last_access is None else self.last_access.version
        return {**self._watch.stats(), "version": self.version, "access": access}

    def _changed(self, key: str, value: Any) -> None:
        # An owner that lost its file has nothing to say; what was obeyed so far stays.
        if value is None:
            return
        if key == ACCESS_KEY:
            self._access_changed(value)
        elif key == CONFIG_KEY:
            self._config_changed(value["version"], value["document"])

    def _config_changed(self, version: int, document: dict[str, Any]) -> None:
        if (version, document) != (self.version, self.document):
            self._on_config(version, document)
            self.version, self.document = version, document

    def _access_changed(self, access: Access) -> None:
        last = self.last_access
        if access == last or (last is not None and access.version == 0):
            return
        if self._on_access is not None:
            self._on_access(access)
        self.last_access = access
