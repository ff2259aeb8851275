"""The composition root: which owners exist, with what arguments, and how a process reaches them.

Rule 1: owners and desks are put together here and nowhere else; nothing looks anything up.
Rule 2: what crosses to an owner's constructor (`Boot`) is plain, small and free of secrets.
Rule 3: ray is imported only where the runtime is `ray`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr

from actors.batcher.courier import Courier
from actors.batcher.desk import BatcherDesk
from actors.batcher.owner import Batcher
from actors.batcher.policy import Caps, Lane, NoPermit, Paid, Text, Vectors
from actors.cache.desk import CacheDesk
from actors.cache.owner import Cache
from actors.cache.tallies import NOW, TallyDesk
from actors.circuit_breaker.desk import CircuitBreakerDesk
from actors.circuit_breaker.owner import CircuitBreaker
from actors.circuit_breaker.policy import CLEAN, Rules, State, Verdict
from actors.circuit_breaker.policy import Refusal as BreakerRefusal
from actors.holders import holder_id
from actors.ledger.claims_desk import ClaimsDesk
from actors.ledger.desk import LedgerDesk
from actors.ledger.orphans import Orphans
from actors.ledger.owner import Ledger
from actors.ledger.policy import Rating, StoreFailed
from actors.rate_limiter.deaths import DeathWatch
from actors.rate_limiter.desk import RateLimiterDesk
from actors.rate_limiter.owner import RateLimiter
from actors.rate_limiter.pace import Pace
from actors.rate_limiter.terms import Amount, Layout, Refusal, Seed
from actors.ref import Clock, InlineRef, OwnerRef, OwnerUnavailable
from actors.registry.desk import RegistryDesk
from actors.registry.owner import Registry
from actors.registry.policy import Access, RegistryUnavailable
from actors.registry.sums import Figures, SumsDesk
from forebay import config as configuration
from forebay import health, running, secrets
from forebay.attempts import pass_unasked, refusal_error, spent_error, why_of
from forebay.books import Books
from forebay.cache_tier import FixedPlace, RayRegistry, RegisteredPlace, Setting
from forebay.codec import costs_of
from forebay.config import (
    CacheConfig,
    CircuitBreakerConfig,
    GatewayConfig,
    SystemConfig,
)
from forebay.ended import Ended
from forebay.errors import (
    ConfigurationError,
    DeploymentsBusy,
    GatewayError,
    GatewayTimeout,
    ModelNotFound,
    Overloaded,
    ProviderError,
)
from forebay.feedback import FeedbackLoop
from forebay.health import is_batcher, is_cache
from forebay.kv_cache import KVCacheManager, Reading
from forebay.ledger_place import LedgerUrl
from forebay.logs import RequestLog
from forebay.metrics import Meter, prompt_cache
from forebay.once import Once
from forebay.pipeline import Pipeline
from forebay.probing import Prober
from forebay.providers.base import NO_BASE64, STALLED, Provider, verdict_of
from forebay.providers.call_caps import call_caps
from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import InProcessModels, LocalModels
from forebay.providers.relay.lanes import Lanes
from forebay.reckoning import Quotas, Reckoner
from forebay.routing import Deployment, ModelTable
from forebay.secrets import Vault
from forebay.stalls import StallWatch
from forebay.strategies import USUAL_CALL, Router
from forebay.telemetry import Telemetry
from forebay.tenants import Tenants
from forebay.validation import Listener, ValidationManager

NAMESPACE = "forebay"
LIMITER = "rate-limiter-"
LIMITER_SHARDS_MAX = 64
LIMITER_PACE_S = (0.0, 0.05)  # a tenant that nobody saw lately waits so long at most, under load
CACHE_SHARDS_MAX = 64
BATCHER_SHARDS_MAX = 16
STATS_TIMEOUT_S = 2.0
ATTACH_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
PATIENT_SHARE = 0.9  # of the configured timeout: less than that is no fair trial
DEADLINE_MARGIN_S = 0.05  # a timeout no sooner before a deadline than this came from it

RuntimeName = Literal["ray", "inline"]


@dataclass(frozen=True, slots=True)
class Boot:
    """What it takes to create this system's owners again, wherever that becomes necessary."""

    namespace: str = NAMESPACE
    data_dir: str = ""
    registry_path: str | None = None
    ledger_path: str | None = None
    ledger_url: str | None = None
    limiter_shards: int = 1
    cache_shards: int = 1
    batcher_shards: int = 1
    cache_bytes_max: int = 256 * 1024 * 1024
    cache_url: str | None = None
    cache_namespace: str = "forebay"

    @classmethod
    def of(cls, config: SystemConfig, namespace: str, *, durable: bool) -> Boot:
        """The boot of a configuration. Not `durable`: everything in memory unless asked for.

        A durable one is known to other processes: a password in it goes to the vault.
        """
        gateway = config.gateway
        cache = gateway.cache_config or CacheConfig()
        data_dir = Path(config.data_dir).expanduser()
        url = secrets.refer(gateway.cache_url, Vault(data_dir)) if durable else None
        ledger = configuration.sqlite_path(config.ledger_url)
        if config.ledger_url is None and durable:
            ledger = data_dir / "ledger.db"
        elsewhere = config.ledger_url if ledger is None and durable else None
        return cls(
            namespace=namespace,
            data_dir=str(data_dir),
            registry_path=str(data_dir / "registry.db") if durable else None,
            ledger_path=None if ledger is None else str(ledger),
            ledger_url=secrets.refer(elsewhere, Vault(data_dir)),
            limiter_shards=config.server.limiter_shards,
            cache_shards=config.server.cache_shards,
            batcher_shards=config.server.batcher_shards,
            cache_bytes_max=cache.max_bytes,
            cache_url=url,
            cache_namespace=cache.namespace,
        )


@dataclass(frozen=True, slots=True)
class BatcherCalls:
    """The Batcher's way out: picklable, and opened inside the actor on first use."""

    boot: Boot

    def __call__(self) -> EmbedCalls:
        return EmbedCalls(self.boot)


class EmbedCalls:
    """Provider calls for the Batcher, from a system of its own that attaches on first use."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._opening: asyncio.Task[System] | None = None

    async def __call__(self, lane: Lane, texts: list[Text], timeout_s: float) -> Vectors:
        if self._opening is None:
            self._opening = asyncio.create_task(attach(self._boot))
        opening = self._opening
        try:
            system = await asyncio.shield(opening)
        except Exception:
            if self._opening is opening:
                self._opening = None  # the next call tries again
            raise
        return await system.embed_call(lane, texts, timeout_s)

    async def close(self) -> None:
        if self._opening is not None:
            await (await self._opening).close()


def owners(boot: Boot) -> dict[str, tuple[type, dict[str, Any]]]:
    """Every owner by actor name: its class and its arguments."""
    layout = Layout(shards=boot.limiter_shards)
    return {
        **{f"{LIMITER}{shard}": limiter(shard, layout) for shard in range(layout.shards)},
        "registry": (Registry, {"path": boot.registry_path}),
        "circuit-breaker": (CircuitBreaker, {}),
        **{name: _cache(boot) for name in cache_names(boot.cache_shards)},
        **dict.fromkeys(batcher_names(boot.batcher_shards), _batcher(boot)),
        "ledger": (Ledger, {"path": boot.ledger_path, "url": _ledger_url(boot, boot.ledger_url)}),
    }


def _ledger_url(boot: Boot, url: str | SecretStr | None) -> LedgerUrl | None:
    """None for a file, and for memory."""
    return None if url is None or boot.ledger_path is not None else LedgerUrl(url, boot.data_dir)


def cache_names(shards: int) -> list[str]:
    """The cache's owners, in the order that their keys are shared in. Only one has no number, so
    that those of another number of shards are never taken for these."""
    return ["cache"] if shards == 1 else [f"cache-{shard}" for shard in range(shards)]


def batcher_names(shards: int) -> list[str]:
    """The Batcher's owners, in the order that lanes are shared out in. Only one has no number."""
    return ["batcher"] if shards == 1 else [f"batcher-{shard}" for shard in range(shards)]


def _cache(boot: Boot) -> tuple[type, dict[str, Any]]:
    max_bytes = boot.cache_bytes_max // boot.cache_shards
    return Cache, {"max_bytes": max_bytes, "places": _cache_place(boot)}


def _cache_place(boot: Boot) -> RegisteredPlace | None:
    """None where the Registry is not for others, and the cache is told by whoever makes it."""
    if boot.registry_path is None:
        return None
    setting = Setting(boot.cache_url, boot.cache_namespace)
    return RegisteredPlace(setting, boot.data_dir, RayRegistry(boot.namespace, boot.registry_path))


def _batcher(boot: Boot) -> tuple[type, dict[str, Any]]:
    return Batcher, {"factory": BatcherCalls(boot)}


def _both(one: Paid | None, other: Paid | None) -> Paid | None:
    """What two calls have cost together, if any of them has."""
    if one is None or other is None:
        return one or other
    tokens = one.prompt_tokens + other.prompt_tokens
    return Paid(tokens, costs_of(one.cost_nano, other.cost_nano), other.model)


def _carried(ref: OwnerRef, clock: Clock) -> OwnerRef:
    """A line to the Batcher that puts lists together; not where a message costs nothing."""
    return ref if isinstance(ref, InlineRef) else Courier(ref, clock)


def limiter(shard: int, layout: Layout) -> tuple[type, dict[str, Any]]:
    """One of the limiter's owners: its class and its arguments."""
    return RateLimiter, {"shard": shard, "layout": layout}


class System:
    """One process's desks, its view of the configuration, and the pipeline over them.

    Bound to one event loop. Bounded by its desks. Failure behaviour: each desk's own; a
    configuration that cannot be applied is reported and the last good one stays in force.
    """

    def __init__(
        self,
        config: SystemConfig,
        refs: Mapping[str, OwnerRef],
        *,
        runtime: RuntimeName,
        holder: str,
        private: bool,
        models: LocalModels,
        more: Callable[[str, type, dict[str, Any]], OwnerRef],
        spools: Path | None = None,
        clock: Clock = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """`more` reaches an owner that `refs` lack, by name, class and arguments.

        `spools` is where this node's processes keep what the ledger has not taken yet; without it,
        a ledger in memory, they keep it in memory too.
        """
        self.runtime = runtime
        self.holder = holder
        self.clock = clock
        self.rng = rng or random.Random()
        self.version = 0
        self.boot: Boot | None = None
        self._refs = dict(refs)
        self._more = more
        self._private = private
        self._models = models
        self._vault = Vault(Path(config.data_dir))
        self.meter = Meter(self._refs.values)
        self._lanes = Lanes(LiteLLMProvider(models))
        self.provider: Provider = self._lanes
        limiters = [ref for name, ref in refs.items() if name.startswith(LIMITER)]
        pace = Pace(*LIMITER_PACE_S, clock, time.process_time, lambda: self.limiter.under_way)
        self.limiter = RateLimiterDesk(limiters, holder, clock, book=self, pace=pace)
        self._layout = Layout(shards=len(limiters))
        self._relaying: asyncio.Task[None] | None = None
        self._deaths = DeathWatch(self.limiter, holder, self._nodes_alive)
        self.breaker = CircuitBreakerDesk(refs["circuit-breaker"], holder, clock)
        caches = [name for name in refs if is_cache(name)]
        self.cache = CacheDesk([refs[name] for name in caches], holder, clock)
        batchers = [_carried(ref, clock) for name, ref in refs.items() if is_batcher(name)]
        self.batcher = BatcherDesk(batchers, holder)
        own_batcher = InlineRef("own-batcher", Batcher(factory=lambda: self.embed_call))
        self._own_batcher = BatcherDesk([own_batcher], holder)
        self._own_batcher_owner: Any = own_batcher.owner
        self._ledger = LedgerDesk(refs["ledger"], holder, clock, spools=spools)
        self._orphans = (
            None
            if spools is None
            else Orphans(spools, refs["ledger"], holder, clock, nodes_alive=self._nodes_alive)
        )
        self.registry = RegistryDesk(refs["registry"], self._configured, self._accessed)
        telling = self.meter.messages_of(refs["registry"].name, "tally")
        self.sums = SumsDesk(refs["registry"], holder, self.meter.figures, echoes=telling)
        self.bounds = Reckoner(self.provider, self._candidates)
        self.router = Router(self.rng, clock, self._usual_price)
        self.validation = ValidationManager()
        self.meter.add(self.validation.figures)
        self.meter.add(self._lanes.figures)
        self.feedback = FeedbackLoop(self._ledger, told=self._rated)
        self.feedback.forget = lambda key: self.cache.invalidate(None, None, key)
        self.kv_cache = KVCacheManager(
            clock=clock,
            price_of=self._price_of,
            caching_of=lambda deployment: self.provider.prompt_caching(deployment),
            secret_of=self._credential,
            changed=lambda: self.tallies.changed(),
        )
        self.tallies = TallyDesk(refs[caches[0]], holder, self._tally)
        self.meter.looked_up = self.tallies.changed
        self.meter.add(prompt_cache(self.kv_cache.totals))
        self.stalls = StallWatch(clock)
        self.once = Once(ClaimsDesk(refs["ledger"], holder, clock))
        self.pipeline = Pipeline(self)
        self.prober = Prober(self)
        self.problem: str | None = None
        self.telemetry: Telemetry | None = None
        self._told_to: str | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[System], None]] = []
        self._apply(config)

    # ------------------------------------------------------------------- the configuration

    def _apply(self, config: SystemConfig) -> None:
        table = ModelTable.build(config.gateway)
        self.validation.configure(config.gateway)
        self.config = config
        self.table = table
        self._lanes.lane = config.server.lane
        self.router.learn_table(table)
        self.kv_cache.configure(
            config.gateway.enable_kv_cache,
            float(config.gateway.kv_cache_ttl),
            affinity=table.routing == "prefix",
        )
        self.feedback.configure(
            enabled=config.gateway.enable_feedback_loop and config.gateway.enable_llmops,
            follows=table.routing == "feedback",
        )
        self.access = self.registry.last_access or Access()
        self.tenants = Tenants(config.gateway, self.access, self.version)
        self.quotas = Quotas(self.limiter, self.bounds, self.version)
        self.books = Books(
            self._ledger,
            enabled=config.gateway.enable_llmops,
            count_hits=self.tenants.counts_cache_hits,
            prices=lambda: self.provider,
            strict=config.gateway.ledger.durability == "strict",
        )
        self.request_log = RequestLog(config.telemetry.request_log)
        self._tell_to(config.telemetry.otlp_endpoint)
        if not self._private or self.runtime == "inline":
            self.breaker.set_rules(_rules(config.gateway), self.version)
        for listener in self._listeners:
            listener(self)

    def _configured(self, version: int, document: Mapping[str, Any]) -> None:
        """The Registry has a new version."""
        self.version = version
        shards = (document.get("server") or {}).get("limiter_shards", self._layout.shards)
        self._relay(Layout(version, int(shards)))
        if self._private or not document:
            return
        try:
            self._apply(SystemConfig.from_document(dict(document)))
            self.problem = None
        except ConfigurationError as error:
            self.problem = f"configuration version {version} was not applied: {error}"

    def _accessed(self, access: Access) -> None:
        """Keys or tenants were made or revoked at run time."""
        self.access = access
        self.tenants = Tenants(self.config.gateway, access, self.version)
        for listener in self._listeners:
            listener(self)

    # ---------------------------------------------------------------------- what is told of it

    def _tell_to(self, endpoint: str | None) -> None:
        """Where OpenTelemetry's spans and metrics go from now on."""
        if endpoint == self._told_to:
            return
        before, self._told_to = self.telemetry, endpoint
        self.telemetry = None if endpoint is None else Telemetry.open(endpoint, self.holder)
        self.tell_evaluations(None if self.telemetry is None else self.telemetry.evaluated)
        if before is not None:
            closing = asyncio.get_running_loop().create_task(before.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def tells(self, status: str) -> bool:
        """Whether anybody is to be told of a request that ended so."""
        return self.telemetry is not None or self.request_log.wants(status)

    def tell(self, ended: Ended) -> None:
        """A request is over."""
        trace_id = None if self.telemetry is None else self.telemetry.ended(ended)
        if self.request_log.wants(ended.status):
            self.request_log.ended(ended, trace_id)

    async def system_metrics(self) -> bytes:
        """The counts of all processes that are or were, in Prometheus text format.

        Raises:
            Overloaded: they cannot be had now. Others would go back, and then seem to jump.
        """
        try:
            figures = await self.sums.sums()
        except (OwnerUnavailable, RegistryUnavailable) as error:
            raise Overloaded(f"metrics cannot be read now: {error}", retry_after_s=1.0) from None
        self.meter.unsettled(await self._unsettled())
        return self.metrics(figures)

    async def _unsettled(self) -> int | None:
        if not self.books.enabled:
            return None
        try:
            return int(await self._refs["ledger"].ask("unsettled", timeout_s=STATS_TIMEOUT_S))
        except (OwnerUnavailable, StoreFailed):
            return None  # the ledger says itself what is wrong with it

    def metrics(self, figures: Figures | None = None) -> bytes:
        """Counts in Prometheus text format; None: this process's."""
        levels = {State.CLOSED: 0, State.FORCED_CLOSED: 0, State.HALF_OPEN: 1}
        for deployment in self.table.deployments():
            state = self.breaker.standing(deployment.circuit).state
            self.meter.breaker(deployment.circuit, levels.get(state, 2))
        return self.meter.render(figures)

    def on_change(self, listener: Callable[[System], None]) -> None:
        """Call `listener` now and after each change of the configuration."""
        self._listeners.append(listener)
        listener(self)

    def resolve(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A deployment's parameters with its secrets in place of the references to them."""
        resolved: dict[str, Any] = secrets.resolve(params, os.environ, self._vault)
        return resolved

    # --------------------------------------------------------------------- the limiter's owners

    def _relay(self, layout: Layout) -> None:
        """The tenants are spread over so many owners from now on."""
        if layout.version <= self._layout.version:
            return
        self._layout = layout
        before = self._relaying

        async def relay() -> None:
            if before is not None:
                await before
            await self.limiter.relayout(layout, self._limiters(layout))

        self._relaying = asyncio.get_running_loop().create_task(relay())

    def _limiters(self, layout: Layout) -> list[OwnerRef]:
        """The owners of a layout. Those of a smaller one before may go on; nobody asks them."""
        names = [f"{LIMITER}{shard}" for shard in range(layout.shards)]
        for shard, name in enumerate(names):
            if name not in self._refs:
                self._refs[name] = self._more(name, *limiter(shard, layout))
        return [self._refs[name] for name in names]

    async def spread(self, before: int, shards: int, version: int) -> None:
        """Make all owners of the limiter obey a new number of them, before anybody else does.

        The old owners let go of what moves first; the new ones lend nothing until every lease of
        the old is over. Call it just before the configuration that says so is put as `version`;
        with the numbers exchanged it is taken back. Owners that were told wrong obey the first
        desk that knows the configuration of that version.

        Raises:
            OwnerUnavailable: one of them does not answer; take it back.
        """
        layout = Layout(version, shards)
        old = self._limiters(Layout(shards=before))
        for ref in [*old, *self._limiters(layout)[len(old) :]]:
            await ref.ask("adopt", layout, timeout_s=ATTACH_TIMEOUT_S)
        if self.boot is not None:
            from actors import spawn

            self.boot = replace(self.boot, limiter_shards=shards)
            boot = asdict(self.boot)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, spawn.write_boot, self.boot.namespace, boot)

    async def _nodes_alive(self) -> set[str] | None:
        if self.runtime == "inline":
            return None
        from actors import spawn

        return await asyncio.get_running_loop().run_in_executor(None, spawn.nodes_alive)

    # What the limiter needs of the ledger; `books` changes with the configuration.

    def mark(self) -> int:
        return self.books.mark()

    def commit_of(self, mark: int) -> int | None:
        return self.books.commit_of(mark)

    async def seeds(self, tenants: list[str]) -> list[Seed]:
        if self._orphans is not None:
            await self._orphans.look()
        return await self.books.seeds(tenants)

    # ------------------------------------------------------------------------------ routing

    def order(self, group: str, prompt: Reading | None = None) -> list[Deployment]:
        """The group's deployments in the order to try them now, for this prompt."""
        affinity = self.kv_cache.affinity(prompt, group)
        return self.router.order(self.table.group(group), self.breaker.standing, affinity)

    def _rated(self, ratings: Mapping[str, Rating]) -> None:
        self.router.ratings = ratings

    def tell_evaluations(self, listener: Listener | None) -> None:
        """Have `listener` hear what validation and feedback say of each answer. It must be quick,
        and must not raise."""
        self.validation.listener = self.feedback.listener = listener

    def _usual_price(self, deployment: Deployment) -> int | None:
        return self.provider.price(deployment, USUAL_CALL)

    def _price_of(self, deployment: Deployment, usage: Mapping[str, Any]) -> int | None:
        return self.provider.price(deployment, usage)

    def _credential(self, deployment: Deployment) -> bytes:
        """The key that calls of the deployment are made with; empty where it has none."""
        try:
            key = self.resolve(deployment.params).get("api_key")
        except ConfigurationError:
            return b""  # the call itself will say so
        return str(key or "").encode()

    def _candidates(self, group: str) -> list[Deployment]:
        """Every deployment that may answer for the group, its fallbacks' included."""
        groups = self.table.reachable(group)
        return [d for name in groups for d in self.table.group(name).deployments]

    def batcher_for(self, deployment: Deployment, coalesce: bool) -> BatcherDesk:
        """The shared Batcher, or this process's own.

        Its own where nothing is to be shared, or where the shared one does not know the
        deployment: one with a configuration of our own, and keys that do not leave this process.
        """
        return self.batcher if coalesce and not self._private else self._own_batcher

    def caps_for(self, deployment: Deployment) -> Caps:
        """Most of one provider call, how long texts linger, and whether a late one is doubled."""
        config = self.config.gateway
        return replace(
            call_caps(deployment, config.batch_size),
            hedge=config.hedge_embeddings,
            linger_s=config.batch_timeout,
        )

    async def embed_call(self, lane: Lane, texts: list[Text], timeout_s: float) -> Vectors:
        """A batch's vectors, by one provider call; by two where base64 was asked for in vain.

        The second counts as any retry does, and both are paid by those who share the batch. Raises
        NoPermit where the deployment's own limits, or the pause it asked for, leave no room now.
        """
        until_s = self.clock() + timeout_s
        try:
            return await self._embed_once(lane, texts, timeout_s, is_retry=lane.retry)
        except ProviderError as error:
            if error.code != NO_BASE64:
                raise
            paid: Paid | None = getattr(error, "paid", None)
        try:
            vectors = await self._embed_once(lane, texts, until_s - self.clock(), is_retry=True)
        except GatewayError as error:
            again: Paid | None = getattr(error, "paid", None)
            error.paid = _both(paid, again)  # type: ignore[attr-defined]
            raise
        if paid is None:
            return vectors
        return replace(
            vectors,
            prompt_tokens=vectors.prompt_tokens + paid.prompt_tokens,
            cost_nano=costs_of(vectors.cost_nano, paid.cost_nano),
        )

    async def _embed_once(
        self, lane: Lane, texts: list[Text], timeout_s: float, *, is_retry: bool
    ) -> Vectors:
        """One provider call for a lane, judged once however many callers share it."""
        try:
            deployment = self.table.deployment(lane.deployment)
        except ModelNotFound:
            # Who asks has a newer configuration than we have: ours comes any moment.
            raise Overloaded(
                "this deployment's configuration has not come everywhere yet", retry_after_s=1.0
            ) from None
        if is_retry and self.breaker.standing(deployment.circuit).callable:
            granted = await self.breaker.may_retry(deployment.circuit)
            if not granted:
                raise spent_error(deployment)
        admitted = pass_unasked(deployment)
        if self.config.gateway.enable_circuit_breaker:
            passed = await self.breaker.admit(deployment.circuit)
            if isinstance(passed, BreakerRefusal):
                refused = refusal_error(deployment, passed)
                if why_of(passed) == "throttled":
                    raise NoPermit(passed.retry_after_s, refused)
                raise refused
            admitted = passed
        verdict, retry_after_s = Verdict.IGNORED, None
        used = Amount()
        quota = None
        asked_s: float | None = None
        deadline_s, fair = self.clock() + timeout_s, self.is_patient(timeout_s)
        try:
            quota = await self.quotas.take_texts(deployment, texts)
            if isinstance(quota, Refusal):
                busy = DeploymentsBusy(
                    f"{deployment.group!r} has used up its own rpm or tpm",
                    model=deployment.group,
                    retry_after_s=quota.retry_after_s,
                )
                raise NoPermit(quota.retry_after_s, busy)
            asked_s = self.clock()
            vectors = await self.provider.embed(
                deployment, texts, dict(lane.params), timeout_s=timeout_s, resolve=self.resolve
            )
            verdict, used = Verdict.SUCCESS, Amount(vectors.prompt_tokens)
            return vectors
        except OwnerUnavailable as error:
            raise Overloaded(f"limits cannot be checked: {error}", retry_after_s=1.0) from None
        except GatewayError as error:
            if asked_s is not None:
                verdict = self.verdict(error, asked_s, deadline_s, fair=fair)
                retry_after_s = error.retry_after_s
            raise
        except asyncio.CancelledError:
            # The Batcher's clock may strike a moment before the provider lane's own.
            if asked_s is not None and self.clock() >= deadline_s - DEADLINE_MARGIN_S:
                verdict = self.verdict(GatewayTimeout("too late"), asked_s, deadline_s, fair=fair)
            raise
        finally:
            if quota is not None and not isinstance(quota, Refusal):
                self.limiter.settle(quota, used)
            self.breaker.judge(admitted, verdict, retry_after_s)

    def is_patient(self, given_s: float) -> bool:
        """Whether a call that is given so many seconds has about all that is configured."""
        return given_s >= self.config.gateway.timeout * PATIENT_SHARE

    def verdict(
        self, error: GatewayError, since_s: float, deadline_s: float, *, fair: bool
    ) -> Verdict:
        """How far a deployment is to blame for a call that failed, awaited since `since_s`.

        Not for a timeout that came from a deadline which was not `fair`, because a client or what
        went before had made it short; and not for one while this process itself stood still.
        """
        if isinstance(error, GatewayTimeout):
            in_time = error.code == STALLED or self.clock() < deadline_s - DEADLINE_MARGIN_S
            if not (in_time or fair) or self.stalls.is_to_blame(since_s):
                return Verdict.IGNORED
        return verdict_of(error)

    # ------------------------------------------------------------------------ start and end

    async def start(self) -> None:
        """Connect the desks. Raises `Overloaded` when an owner that must answer does not."""
        try:
            await self.registry.start()
            await self.breaker.start()
        except OwnerUnavailable as error:
            await self.registry.close()
            raise Overloaded(f"cannot attach: {error}", retry_after_s=1.0) from None
        for desk in self._desks()[2:]:
            await desk.start()
        self.stalls.start(asyncio.get_running_loop().call_later)

    async def complete(self) -> None:
        """See to it that the owners which were left for later run too."""
        for name, ref in self._refs.items():
            if is_batcher(name):
                await ref.ask("protocol", timeout_s=ATTACH_TIMEOUT_S)

    async def close(self) -> None:
        """Hand in what the desks hold, then let go. Owners that are Ray actors go on.

        One that fails to close does not keep the others from it; the first failure is raised.
        """
        self.stalls.close()
        inline = [ref.owner for ref in self._refs.values() if isinstance(ref, InlineRef)]
        if self._relaying is not None:
            await asyncio.gather(self._relaying, return_exceptions=True)
        # `once` first, since the calls that it carries settle as those of the desks do.
        closing: list[Any] = [self.once, *reversed(self._desks()), self.provider, self._models]
        closing += [] if self.telemetry is None else [self.telemetry]
        await asyncio.gather(*self._closing, return_exceptions=True)
        failures: list[Exception] = []
        for part in [*closing, *inline, self._own_batcher_owner]:
            try:
                await part.close()
            except Exception as error:  # noqa: BLE001 - raised below, when all are closed
                failures.append(error)
        if failures:
            raise failures[0]

    def _desks(self) -> list[Any]:
        return [
            self.registry,
            self.breaker,
            self.sums,  # closed after all that count
            self.limiter,
            self.batcher,
            self._own_batcher,
            self._ledger,
            self.tallies,
            self.feedback,
            self._deaths,
            self.prober,
            *([] if self._orphans is None else [self._orphans]),
            self.cache,  # closed first: the streams that it carries settle holds and entries
        ]

    def _tally(self) -> Mapping[str, tuple[int, ...]]:
        """What this process has counted since it began, for the sums of all processes."""
        held = self.cache.held()
        return {**self.kv_cache.figures(), "cache": self.meter.lookups(), f"{NOW}cache": held}

    async def measure(self) -> None:
        """Ask owners for what only they know, for the next `metrics`."""
        here = [one for one in await self.cache_owners() if one["reachable"]]
        self.meter.stored(health.stored_in(here) if here else None)

    async def cache_owners(self) -> list[dict[str, Any]]:
        """The figures of each of the cache's owners; of one that is away, why."""
        names = [name for name in self._refs if is_cache(name)]
        return await asyncio.gather(*(self._stats_of(name) for name in names))

    async def health(self) -> dict[str, Any]:
        """Who answers, how each deployment stands, what each desk holds, and what is wrong.

        Takes as long as the slowest owner, STATS_TIMEOUT_S at the most. Calls no provider.
        """
        gateway = self.config.gateway
        monitored = gateway.enable_health_monitoring
        # The limiter's owners of a wider layout before may go on; nobody needs them.
        wanted = [f"{LIMITER}{shard}" for shard in range(self._layout.shards)]
        shards = [name for name in wanted if name in self._refs]
        names = [n for n in self._refs if n in shards or not n.startswith(LIMITER)]
        asked = names if monitored else []
        answers = await asyncio.gather(*(self._stats_of(name) for name in asked))
        heeded = gateway.enable_circuit_breaker
        standing = self.breaker.standing if heeded else lambda name: CLEAN
        seen = health.Seen(
            gateway,
            health.upstreams(self.table, standing),
            dict(zip(asked, answers, strict=True)),
            {
                "rate_limiter": self.limiter.stats(),
                "circuit_breaker": self.breaker.stats(),
                "cache": self.cache.stats(),
                "batcher": self.batcher.stats(),
                "ledger": {**self.books.stats(), "idempotency": self.once.stats()},
                "registry": self.registry.stats(),
            },
            shards=shards,
            config_version=self.version,
            problem=self.problem,
            shares_batches=gateway.enable_request_batching and not self._private,
        )
        made = health.checks(seen) if monitored else {}
        return {
            "runtime": self.runtime,
            "monitored": monitored,
            "config_version": self.version,
            "problem": self.problem,
            "models": self.table.names(),
            "checks": made,
            "owners": seen.owners,
            "open_breakers": list(health.not_closed(seen)),
            "desks": seen.desks,
        }

    async def _stats_of(self, name: str) -> dict[str, Any]:
        try:
            stats = await self._refs[name].ask("stats", timeout_s=STATS_TIMEOUT_S)
        except OwnerUnavailable as error:
            return {"reachable": False, "reason": error.reason}
        return {"reachable": True, **stats}


# --------------------------------------------------------------------------------------------


def _spools(boot: Boot, url: LedgerUrl | None) -> Path | None:
    """Where the spools for this ledger are, of the processes of this machine."""
    name = boot.ledger_path if url is None else url.name
    if name is None:
        return None
    ledger = hashlib.sha256(name.encode()).hexdigest()[:8]
    return Path(boot.data_dir) / "spool" / f"{socket.gethostname()}-{ledger}"


def _rules(gateway: GatewayConfig) -> Rules:
    told = gateway.circuit_breaker_config or CircuitBreakerConfig()
    rules = Rules(
        failure_threshold=told.failure_threshold,
        success_threshold=told.success_threshold,
        open_s=told.timeout,
        window_s=told.window_s,
        failure_rate=told.failure_rate,
        min_calls=told.min_calls,
        slow_call_rate=told.slow_call_rate,
    )
    share = gateway.retry_budget
    return rules if share is None else replace(rules, retry_share=share)


def ray_is_near(environ: Mapping[str, str]) -> bool:
    """Whether Ray is initialised in this process, or an address says where one runs."""
    ray = sys.modules.get("ray")
    return bool((ray is not None and ray.is_initialized()) or environ.get("RAY_ADDRESS"))


def choose_runtime(runtime: Literal["auto", "ray", "inline"]) -> RuntimeName:
    """`auto` is ray where Ray is initialised or `RAY_ADDRESS` is set, else inline."""
    if runtime != "auto":
        return runtime
    return "ray" if ray_is_near(os.environ) else "inline"


async def open_system(
    config: GatewayConfig | None, *, runtime: RuntimeName, namespace: str
) -> System:
    """The system of a `LiteLLMGateway`: attached, started, or inside this process."""
    if runtime == "inline":
        return await open_inline(_system_config(config))
    ray_ready(None, namespace)
    from actors import spawn

    loop = asyncio.get_running_loop()
    left = await loop.run_in_executor(None, spawn.read_boot, namespace)
    if left is not None:
        return await attach(
            Boot(**left), private=None if config is None else _system_config(config)
        )
    whole = _system_config(config)
    boot = await loop.run_in_executor(None, create_owners, whole, namespace)
    if config is not None:
        return await attach(boot, private=whole)
    document = whole.document(Vault(Path(whole.data_dir)))
    return await attach(boot, publish=(document, f"attached by {holder_id(namespace)}"))


def _system_config(config: GatewayConfig | None) -> SystemConfig:
    if config is None:
        return configuration.load(None, os.environ)
    return configuration.around(config, os.environ)


async def open_inline(config: SystemConfig) -> System:
    """A whole system in this process: the same owners and desks, without Ray."""
    boot = Boot.of(config, NAMESPACE, durable=False)
    ledger = _ledger_url(boot, config.ledger_url)
    refs: dict[str, OwnerRef] = {}
    for name, (cls, arguments) in owners(boot).items():
        if cls is Ledger:
            arguments = {**arguments, "url": ledger}
        if cls is RateLimiter:
            arguments = {**arguments, "fresh": True}
        if cls is Cache:
            place = FixedPlace(Setting.of(config.gateway), boot.data_dir)
            arguments = {**arguments, "places": place}
        if cls is not Batcher:
            refs[name] = InlineRef(name, cls(**arguments))
    # The Batcher calls providers through the very system that it is a part of.
    calls: list[System] = []

    async def call(lane: Lane, texts: list[Text], timeout_s: float) -> Vectors:
        return await calls[0].embed_call(lane, texts, timeout_s)

    for name in batcher_names(boot.batcher_shards):
        refs[name] = InlineRef(name, Batcher(factory=lambda: call))
    system = System(
        config,
        refs,
        runtime="inline",
        holder=holder_id("local"),
        private=True,
        models=InProcessModels(),
        more=lambda name, cls, arguments: InlineRef(name, cls(**arguments)),
        spools=_spools(boot, ledger),
    )
    calls.append(system)
    await system.start()
    return system


async def attach(
    boot: Boot,
    *,
    private: SystemConfig | None = None,
    publish: tuple[dict[str, Any], str] | None = None,
) -> System:
    """The desks of this process over the Ray actors that `boot` describes.

    `private` is a configuration of this process's own; without it the Registry's is followed.
    `publish` is a document and the name of the occasion: each occasion publishes once, so that a
    process that restarts does not undo what was configured since.

    Raises:
        Overloaded: an owner that must answer does not.
    """
    import ray

    from actors import spawn
    from forebay.providers.served import ServedModels

    def reach(name: str, cls: type, arguments: dict[str, Any]) -> OwnerRef:
        return spawn.RayRef(spawn.OwnerSpec(name, cls, arguments), boot.namespace)

    refs = {name: reach(name, *how) for name, how in owners(boot).items()}
    config, version = private, 0
    try:
        if publish is not None:
            document, occasion = publish
            await refs["registry"].ask(
                "put", document, occasion, None, occasion, timeout_s=ATTACH_TIMEOUT_S
            )
        if config is None:
            version, document = await refs["registry"].ask("current", timeout_s=ATTACH_TIMEOUT_S)
            config = SystemConfig.from_document(document)
    except OwnerUnavailable as error:
        raise Overloaded(f"cannot attach: {error}", retry_after_s=1.0) from None
    system = System(
        config,
        refs,
        runtime="ray",
        holder=holder_id(ray.get_runtime_context().get_node_id()[:12]),
        private=private is not None,
        models=ServedModels(),
        more=reach,
        spools=_spools(boot, _ledger_url(boot, boot.ledger_url)),
    )
    system.version = version
    system.boot = boot
    await system.start()
    return system


def boot_of(config: SystemConfig, namespace: str) -> Boot:
    """How the owners of a system on Ray are made: what must last is on disk."""
    return Boot.of(config, namespace, durable=True)


def create_owners(config: SystemConfig, namespace: str) -> Boot:
    """Create the owners that are missing, replace those of an older protocol. Blocking.

    Those that no first request needs are left to whoever misses them (`System.complete`), since
    two cores are busy enough while everything starts.
    """
    from concurrent.futures import ThreadPoolExecutor

    from actors import spawn

    boot = boot_of(config, namespace)
    Path(boot.data_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
    made = {name: spawn.OwnerSpec(name, *how) for name, how in owners(boot).items()}
    specs = [
        spec
        for name, spec in made.items()
        if not is_batcher(name) or spawn.running(spec, namespace)
    ]
    first = spawn.read_boot(namespace) is None
    spawn.write_boot(namespace, asdict(boot))
    with ThreadPoolExecutor(len(specs)) as threads:
        try:
            handles = list(threads.map(lambda spec: spawn.ensure(spec, namespace, True), specs))
        except (OwnerUnavailable, spawn.ProtocolMismatch) as error:
            raise Overloaded(str(error), retry_after_s=1.0) from None
    if first:
        for spec, handle in zip(specs, handles, strict=True):
            if spec.cls is RateLimiter:
                handle.vouch.remote()
    return boot


def remove_owners(boot: Boot) -> None:
    """End this system's owners for good and forget it. What is durable stays on disk. Blocking."""
    from actors import spawn

    # There may be more of the limiter's than at the start, or there may have been; and of the
    # cache's, if an earlier start was told of another number.
    widest = replace(
        boot,
        limiter_shards=LIMITER_SHARDS_MAX,
        cache_shards=CACHE_SHARDS_MAX,
        batcher_shards=BATCHER_SHARDS_MAX,
    )
    single = {"cache": _cache(boot), "batcher": _batcher(boot)}
    for name, made in {**owners(widest), **single}.items():
        spawn.remove(spawn.OwnerSpec(name, *made), boot.namespace)
    spawn.erase_boot(boot.namespace)


def ray_ready(address: str | None, namespace: str, *, alone: bool = False, **options: Any) -> bool:
    """Make sure that Ray is initialised in this process. True if this call started a local Ray.

    Without an address the Ray of this machine is joined, if one runs, unless `alone` asks for one
    of our own.

    Raises:
        ConfigurationError: `address` (or `RAY_ADDRESS`) names a Ray that cannot be reached.
    """
    running.prepare_ray(os.environ, configuration.data_dir(os.environ))
    import ray

    if ray.is_initialized():
        return False
    wanted = address or os.environ.get("RAY_ADDRESS")
    options = {"namespace": namespace, "log_to_driver": False, **options}
    try:
        if wanted is not None:
            _require_listener(wanted)
            ray.init(address=wanted, namespace=namespace, log_to_driver=False)
            return False
        if not alone:
            try:
                ray.init(address="auto", namespace=namespace, log_to_driver=False)
                return False
            except ConnectionError:
                pass  # none runs here: start one
        ray.init(address="local", **options)
        return True
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise ConfigurationError(
            f"Ray cannot be reached at {wanted or 'a local address'}: {reason}. Start it "
            "(`ray start --head`) or leave the address out to have one started.",
            param="address",
        ) from None


def _require_listener(address: str) -> None:
    """Fail at once where nothing listens; Ray itself would try for a minute or two."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S):
            pass
