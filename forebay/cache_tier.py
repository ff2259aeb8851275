"""Where the cache's second tier is, as the configuration says now: followed inside its owner.

Rule 1: what crosses to the owner holds references. They are looked up there, in that process's
        environment and in the vault of its node.
Rule 2: small to import: the owner's process needs no provider and no pipeline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from actors.cache.redis_tier import Place, Tell
from actors.ref import OwnerRef, OwnerUnavailable
from actors.registry.desk import RegistryDesk
from actors.registry.owner import Registry
from actors.registry.policy import RegistryUnavailable
from forebay.config import CacheConfig, GatewayConfig, revealed
from forebay.errors import ConfigurationError
from forebay.secrets import Vault

ATTACH_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What the configuration says of it: a URL or a reference to one, and the keys' first part."""

    url: str | SecretStr | None
    namespace: str

    @classmethod
    def of(cls, config: GatewayConfig) -> Setting:
        return cls(config.cache_url, (config.cache_config or CacheConfig()).namespace)

    @classmethod
    def within(cls, document: Mapping[str, Any]) -> Setting:
        """The setting of a whole system's document; nothing else of it is looked at."""
        gateway = document.get("gateway") or {}
        named = ("enable_caching", "redis_url", "cache_config")
        return cls.of(GatewayConfig(**{name: gateway[name] for name in named if name in gateway}))

    def say(self, tell: Tell, vault: Vault) -> None:
        """Tell the place that is meant, or why it cannot be known."""
        if self.url is None:
            tell(None)
            return
        try:
            tell(Place(revealed(self.url, vault), self.namespace))
        except ConfigurationError as error:
            tell(None, str(error))


@dataclass(frozen=True, slots=True)
class FixedPlace:
    """For a system inside one process: what it was started with holds until it ends."""

    setting: Setting
    data_dir: str

    async def follow(self, tell: Tell) -> None:
        self.setting.say(tell, Vault(Path(self.data_dir)))


@dataclass(frozen=True, slots=True)
class RegisteredPlace:
    """What the Registry says; until it says something, `setting`, which holds no secret.

    `registry` reaches it, and is picklable. Failure behaviour: while it is away the last word
    holds; it is looked for each ATTACH_EVERY_S until it has answered once.
    """

    setting: Setting
    data_dir: str
    registry: Callable[[], OwnerRef]

    async def follow(self, tell: Tell) -> None:
        vault = Vault(Path(self.data_dir))
        self.setting.say(tell, vault)

        def configured(version: int, document: dict[str, Any]) -> None:
            Setting.within(document).say(tell, vault)

        desk = RegistryDesk(self.registry(), configured)
        try:
            await _attach(desk)
            await asyncio.Event().wait()  # until this is cancelled
        finally:
            await desk.close()


async def _attach(desk: RegistryDesk) -> None:
    while True:
        try:
            await desk.start()
        except (OwnerUnavailable, RegistryUnavailable):
            await asyncio.sleep(ATTACH_EVERY_S)
        else:
            return


@dataclass(frozen=True, slots=True)
class RayRegistry:
    """The way to the Registry from another owner's process."""

    namespace: str
    path: str | None

    def __call__(self) -> OwnerRef:
        from actors import spawn

        spec = spawn.OwnerSpec("registry", Registry, {"path": self.path})
        return spawn.RayRef(spec, self.namespace)
