"""The response cache as operators see it: figures of the whole system, and what is to be forgotten.

Rule 1: what is acknowledged holds for every process: no look-up from then on finds what was to go,
        but for a process that had just been served it, which may serve it for one second more.
Rule 2: who is named wrongly is refused: a slip must not pass for an empty cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from actors.cache.policy import Scope
from actors.ref import OwnerUnavailable
from forebay.errors import InvalidRequest, Overloaded
from forebay.health import redis_of, stored_in

if TYPE_CHECKING:
    from forebay.call import Call
    from forebay.kv_cache import Figures
    from forebay.system import System

KEY = re.compile(r"[0-9a-f]{80}")
Run = Callable[[Coroutine[Any, Any, Any]], Any]


async def stats(system: System) -> dict[str, Any]:
    """What is stored, and how look-ups ended, in all processes; asks each owner.

    Returns:
        `entries`, `bytes` of `max_bytes`, `evicted`, `flights`: calls under way that others may
        join; `hits`, `misses` and `joined` look-ups, and `hit_rate`, the share of those that cost
        nothing; `redis`, None without one; `process`: the figures of this one's desk. `scope`:
        `system`, or `process` where look-ups of others are not known because an owner is away.
    """
    try:
        hits, misses, joined = (await system.tallies.sums())["cache"]
        scope = "system"
    except OwnerUnavailable:
        hits, misses, joined = system.meter.lookups()
        scope = "process"
    told = await system.cache_owners()
    here = [one for one in told if one["reachable"]]
    asked = hits + misses + joined
    return {
        **stored_in(here),
        "max_bytes": sum(one["max_bytes"] for one in here),
        "flights": sum(one["flights"] for one in here),
        "hits": hits,
        "misses": misses,
        "joined": joined,
        "hit_rate": (hits + joined) / asked if asked else 0.0,
        "redis": redis_of(here),
        "away": len(told) - len(here),
        "scope": scope,
        "process": system.cache.stats(),
    }


async def prefix_figures(system: System) -> Figures | None:
    """The prompt-prefix cache's figures of all processes; None where the owner is away."""
    try:
        return await system.tallies.sums()
    except OwnerUnavailable:
        return None


async def invalidate(
    system: System, *, tenant: str | None = None, model: str | None = None, key: str | None = None
) -> int:
    """Forget stored answers: a tenant's, a model's, the one of a key, or whichever are all of it.

    None is any; nothing given forgets everything. `model` is a group's name; `key` 80 hex digits.

    Returns:
        How many entries that were in memory; those of a Redis go too, and are not counted.

    Raises:
        InvalidRequest: 404 `unknown_tenant`; 409 `cache_is_shared`: answers are no tenant's own;
            400: the key is none, or something is no text.
        ModelNotFound: there is no such group.
        Overloaded: an owner does not answer; asking again is safe.
    """
    for name, value in (("tenant", tenant), ("model", model), ("key", key)):
        if not isinstance(value, str | None):
            raise InvalidRequest.about(name, f"{name!r} must be text", code="invalid_type")
    if tenant is not None:
        system.tenants.require(tenant, param="tenant", status=404)
        shared = system.config.gateway.cache_config
        if shared is not None and shared.scope == "shared":
            raise InvalidRequest.about(
                "tenant",
                "cache_config.scope is shared, so answers are no single tenant's; name a model or"
                " a key, or clear everything",
                code="cache_is_shared",
                status=409,
            )
    group = None if model is None else system.table.group(model).name
    if key is not None and not KEY.fullmatch(key):
        raise InvalidRequest.about(
            "key",
            "'key' must be 80 hexadecimal digits in lower case, as gateway.cache.key gives them",
            code="invalid_value",
        )
    scope = None if tenant is None else Scope(tenant)
    named = None if key is None else bytes.fromhex(key)
    try:
        return await system.cache.invalidate(scope, group, named)
    except OwnerUnavailable as error:
        raise Overloaded(f"the cache was not cleared: {error}", retry_after_s=1.0) from None


class ResponseCache:
    """`gateway.cache`: the cache of answers, for all processes of the system.

    Sync methods may be called from any thread; each has an async one beside it.
    """

    def __init__(
        self,
        system: System,
        run: Run,
        hand_over: Run,
        call_of: Callable[[str | None, str | None, dict[str, Any]], Call],
    ) -> None:
        self._system = system
        self._run = run
        self._hand_over = hand_over
        self._call_of = call_of

    def stats(self) -> dict[str, Any]:
        """See `forebay.cache.stats`."""
        return dict(self._run(stats(self._system)))

    async def stats_async(self) -> dict[str, Any]:
        """As `stats`."""
        return dict(await self._hand_over(stats(self._system)))

    def key(self, prompt: str | None = None, model: str | None = None, **keywords: Any) -> str:
        """The key that the answer to `generate` with the same arguments is stored under."""
        call = self._call_of(prompt, model, keywords)
        return self._system.pipeline.key_of(call).hex()

    def invalidate(
        self, tenant: str | None = None, model: str | None = None, key: str | None = None
    ) -> int:
        """Forget what is a tenant's, a model's and a key's, as far as they are given.

        See `forebay.cache.invalidate`; to forget everything is `clear`.
        """
        return int(self._run(self._invalidation(tenant, model, key)))

    async def invalidate_async(
        self, tenant: str | None = None, model: str | None = None, key: str | None = None
    ) -> int:
        """As `invalidate`."""
        return int(await self._hand_over(self._invalidation(tenant, model, key)))

    def clear(self) -> int:
        """Forget everything, of all tenants; how many entries that were."""
        return int(self._run(invalidate(self._system)))

    async def clear_async(self) -> int:
        """As `clear`."""
        return int(await self._hand_over(invalidate(self._system)))

    def _invalidation(
        self, tenant: str | None, model: str | None, key: str | None
    ) -> Coroutine[Any, Any, int]:
        if tenant is model is key is None:
            raise InvalidRequest("say what is to be forgotten: tenant, model or key; or clear()")
        return invalidate(self._system, tenant=tenant, model=model, key=key)
