"""The Registry's desk: the configuration that this process obeys."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

from actors.ref import Clock, OwnerRef
from actors.registry.policy import LOCK_WAIT_S, Version
from actors.watch import ANSWER_S, Sleep, WatchClient

PUT_S = LOCK_WAIT_S + ANSWER_S  # an owner that has just begun may have to wait for its file first


class RegistryDesk:
    """Hands each new configuration to `on_config(version, document)`, and puts new ones.

    Owns: the last version taken (0 before the first). `version` and `document` are what
    `on_config` has accepted.
    Bounds: one document.
    Failure behaviour: with the Registry away the last version holds; it is not called again for
    a version that it has. A document that `on_config` refuses by raising is logged, and the
    version before it stays in force here.
    """

    def __init__(
        self,
        ref: OwnerRef,
        on_config: Callable[[int, dict[str, Any]], None],
        clock: Clock = time.monotonic,
        random: Callable[[], float] = random.random,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.version = 0
        self.document: dict[str, Any] = {}
        self._ref = ref
        self._on_config = on_config
        self._watch = WatchClient(ref, self._changed, clock, random, answer_s=PUT_S, sleep=sleep)

    async def start(self) -> None:
        """Take the newest version, if there is one, then follow.

        Raises:
            OwnerUnavailable: the Registry could not be reached.
            RegistryUnavailable: the Registry cannot use its file.
            Exception: what `on_config` raised for the first document.
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

    async def history(self, limit: int = 20) -> list[Version]:
        """The newest versions, newest first."""
        history: list[Version] = await self._ref.ask("history", limit, timeout_s=PUT_S)
        return history

    def stats(self) -> dict[str, Any]:
        return {**self._watch.stats(), "version": self.version}

    def _changed(self, _: str, value: dict[str, Any] | None) -> None:
        # An owner that lost its file has no version; what was obeyed so far stays.
        if value is None:
            return
        version, document = value["version"], value["document"]
        if (version, document) != (self.version, self.document):
            self._on_config(version, document)
            self.version, self.document = version, document
