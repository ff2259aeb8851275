"""The prompt-prefix cache: what providers compute once for prompts that begin alike.

The attention's keys and values are the provider's, and so is the cache of them. What a gateway can
do is to recognise beginnings that come again, to say so in the provider's words, and to send them
where they were sent before.

Rule 1: a beginning gets a hint when its tenant has sent it before, not so long ago that the
        provider has dropped it, and not below the length from which providers cache.
Rule 2: hints change no answer. Who has marks or a key of its own gets none of ours.
Rule 3: what is told of the cache's worth is what providers report in their usage, priced.
Rule 4: who does not know a hint gets none: not where the price list says that a model's prompts are
        not cached, and no more where a provider has refused one.
"""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from forebay import prefixes
from forebay.codec import cached_in
from forebay.errors import GatewayError, InvalidRequest, ProviderError
from forebay.prefixes import Edge, Place, Prompt
from forebay.providers.base import NO_HINTS
from forebay.strategies import Affinity

if TYPE_CHECKING:
    from actors.ref import Clock
    from forebay.call import Call
    from forebay.providers.prices import PromptCaching
    from forebay.routing import Deployment

KEYED = frozenset({"openai", "azure"})
"""Providers that take `prompt_cache_key`: they cache by themselves, and find it sooner by a key."""

MARKED = frozenset({"anthropic"})
"""Providers that cache up to a mark, and only there."""

CLAUDES_ELSEWHERE = frozenset({"bedrock", "vertex_ai", "azure_ai"})
"""Where Claude is served too, with the same marks, and models that know nothing of them."""

KEY_BEGINS = "forebay-"
KEY_DIGITS = 32  # OpenAI takes 64 characters in all
MARKS_MAX = 4
TOKENS_MIN = 1024
HINTED_BYTES_MIN = TOKENS_MIN * prefixes.BYTES_PER_TOKEN
"""Shorter beginnings are cached by no provider, but where its list says so."""
PROVIDERS_KEEP_S = 300.0
"""Anthropic and OpenAI keep a prefix for five minutes after its last use."""

NOTED_EDGES = 4  # of a prompt's last: what the next prompts share with it ends at one of these
KNOWN_MAX = 50_000
HOME_SHARE_MIN = 0.4  # of a prompt: where only less of it was sent, its anchor decides
MODELS_MAX = 200
TENANTS_MAX = 200
DEPLOYMENTS_MAX = 1_000  # whose ways are remembered; above it all are forgotten
LONG_PROMPT_TOKENS = 100_000  # above this the dearer tiers of a price list may begin
SAMPLE_TOKENS = 1_000
OTHER = "other"
ALL = "all"

Price = Callable[["Deployment", Mapping[str, Any]], int | None]
Caching = Callable[["Deployment"], "PromptCaching | None"]
Kind = Literal["marks", "key"]
HINTS: Mapping[Kind, str] = {"marks": "cache_control", "key": "prompt_cache_key"}
"""What providers call them."""
Figures = Mapping[str, tuple[int, ...]]
"""`Worth` as numbers, by what they are of: `all`, `model NAME` and `tenant NAME`."""


@dataclass(slots=True)
class KVCacheEntry:
    """A beginning that was sent: how often, when last (by the process's clock), and where to.

    `is_end`: it was a whole prompt, so that those which go on from it are its conversation.
    """

    size_bytes: int
    times: int = 0
    seen_s: float = 0.0
    home: str | None = None
    is_end: bool = False

    @property
    def tokens(self) -> int:
        """An estimate."""
        return self.size_bytes // prefixes.BYTES_PER_TOKEN


class Reading:
    """A request's prompt, read once, and not before somebody needs it; None where it is short."""

    __slots__ = ("_call", "_least_bytes", "_prompt", "_steps")

    def __init__(self, call: Call, least_bytes: int, steps: bool) -> None:
        self._call: Call | None = call
        self._least_bytes = least_bytes
        self._steps = steps
        self._prompt: Prompt | None = None

    @property
    def prompt(self) -> Prompt | None:
        call, self._call = self._call, None
        if call is not None:
            self._prompt = prefixes.read(
                call.route,
                call.body,
                call.tenant,
                least_bytes=self._least_bytes,
                steps=self._steps,
            )
        return self._prompt


class _Known(NamedTuple):
    """A beginning of a prompt that was sent before. `is_end`: it was all of one."""

    edge: Edge
    is_end: bool


class CacheUse(NamedTuple):
    """What a call had of its provider's cache: tokens read, tokens written, nano-USD saved.

    The last is below 0 where more was written than read, and None where nobody knows a price.
    """

    cached_tokens: int
    written_tokens: int
    saved_nano: int | None


_NO_USE = CacheUse(0, 0, 0)


@dataclass(slots=True)
class Worth:
    """What providers reported: calls and tokens, how many of those came from their caches."""

    calls: int = 0
    calls_cached: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    saved_nano: int = 0
    unpriced: int = 0  # calls with cached tokens whose worth nobody knows
    hinted: int = 0

    @classmethod
    def of(cls, numbers: tuple[int, ...]) -> Worth:
        """Of a process that counts more than we do, what we know."""
        return cls(*numbers[: len(fields(cls))])

    def told(self) -> dict[str, Any]:
        return {
            "requests": self.calls,
            "hits": self.calls_cached,
            "hit_rate": self.calls_cached / self.calls if self.calls else 0.0,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "written_tokens": self.written_tokens,
            "cached_share": self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0,
            "saved_usd": self.saved_nano / 1e9,
            "unpriced": self.unpriced,
            "hinted": self.hinted,
        }


_numbers_of: Callable[[Worth], tuple[int, ...]] = attrgetter(*(one.name for one in fields(Worth)))


def told(figures: Figures, tenant: str | None = None) -> dict[str, Any]:
    """Figures in words: those of one tenant; or of all, `by_model` and `by_tenant` among them."""
    whole = figures.get(ALL if tenant is None else f"tenant {tenant}", ())
    answer = Worth.of(whole).told()
    if tenant is None:
        for kind in ("model", "tenant"):
            answer[f"by_{kind}"] = {
                name.removeprefix(f"{kind} "): Worth.of(numbers).told()
                for name, numbers in figures.items()
                if name.startswith(f"{kind} ")
            }
    return answer


class KVCacheManager:
    """Knows the beginnings of prompts that this process sent, and what providers' caches saved.

    Owns `known_max` entries, by tenant, group and digest; the one not sent for longest goes first,
    and none is believed after `kv_cache_ttl` seconds. Figures are of this process, since it began,
    in MODELS_MAX groups and TENANTS_MAX tenants and `other`; `system_figures`, where there are
    other processes, has the sums of all. Of DEPLOYMENTS_MAX deployments it is remembered how their
    providers cache.

    `price_of` says what usage costs, in nano-USD or None; `caching_of` what the price list says of
    a deployment's prompt cache, None while there is no list; `secret_of` gives what keys for the
    provider are derived from: the credential that calls are made with, so that no tenant can guess
    another's key, and all processes agree. `changed` is called when figures have.

    Failure behaviour: a process that restarts knows nothing, so beginnings are new to it once; each
    process has to see one itself before it says so. A provider that refuses a hint is sent the
    same prompt again without, as a retry, and gets none from then on.
    """

    def __init__(
        self,
        enable_kv_cache: bool = True,
        kv_cache_ttl: float = 3600,
        *,
        clock: Clock = time.monotonic,
        price_of: Price = lambda deployment, usage: None,
        caching_of: Caching = lambda deployment: None,
        secret_of: Callable[[Deployment], bytes] = lambda deployment: b"",
        changed: Callable[[], None] = lambda: None,
        known_max: int = KNOWN_MAX,
    ) -> None:
        self._clock = clock
        self._price_of = price_of
        self._caching_of = caching_of
        self._secret_of = secret_of
        self._changed = changed
        self._known_max = known_max
        self._known: OrderedDict[tuple[str, str, bytes], KVCacheEntry] = OrderedDict()
        self._all = Worth()
        self._models: dict[str, Worth] = {}
        self._tenants: dict[str, Worth] = {}
        self._savings: dict[str, tuple[int, int]] = {}
        self._ways: dict[str, tuple[Kind | None, int]] = {}
        self._refused: set[str] = set()
        self._bytes_min = HINTED_BYTES_MIN
        self.system_figures: Callable[[], Figures | None] = lambda: None
        self.configure(enable_kv_cache, kv_cache_ttl)

    def configure(self, hints: bool, ttl_s: float, *, affinity: bool = False) -> None:
        """Give hints or not, find homes or not, and remember for so long, from now on."""
        self.enable_kv_cache = hints
        self.kv_cache_ttl = ttl_s
        self._affinity = affinity
        self._ways.clear()
        self._savings.clear()

    # ---------------------------------------------------------------- on the way of a request

    def read(self, call: Call) -> Reading | None:
        """The prompt of a request, to be read when somebody needs it; None where nobody does, for
        it is short."""
        if not self.enable_kv_cache and not self._affinity:
            return None
        least = prefixes.STEP_FIRST_BYTES if self._affinity else self._bytes_min
        if prefixes.is_short(call.body, least):
            return None
        return Reading(call, least, self._affinity)

    def affinity(self, reading: Reading | None, group: str) -> Affinity | None:
        """Where most of the prompt was sent before, and what names it where nothing was."""
        prompt = reading.prompt if reading is not None and self._affinity else None
        if prompt is None or not prompt.steps:
            return None
        least_bytes = prompt.steps[-1][1] * HOME_SHARE_MIN
        for digest, size_bytes in reversed(prompt.steps):
            if size_bytes < least_bytes:
                break
            known = self._fresh(prompt, group, digest, self.kv_cache_ttl)
            if known is not None and known.home is not None:
                return Affinity(prompt.anchor, known.home)
        return Affinity(prompt.anchor, None)

    def sent(
        self, reading: Reading | None, body: dict[str, Any], deployment: Deployment
    ) -> dict[str, Any]:
        """The body as it goes to the deployment: with a hint, where one pays.

        Takes note of the prompt and of where it goes; a retry does not make it a known one.
        """
        if reading is None:
            if self.enable_kv_cache:
                self._way(deployment)  # the next one as short may be long enough for it
            return body
        kind, bytes_min = self._way(deployment)
        if kind is None and not self._affinity:
            return body  # what it caches it finds by itself
        prompt, group = reading.prompt, deployment.group
        if prompt is None:
            return body
        known_before: tuple[_Known, ...] | None = prompt.known.get(group)
        if known_before is None:
            known_before = prompt.known[group] = self._recognised(prompt, group)
            self._note(prompt, group)
        for digest, _ in prompt.steps:
            known = self._known.get((prompt.tenant, group, digest))
            if known is not None:
                known.home = deployment.circuit
        if not known_before:
            return body
        long = [known for known in known_before if known.edge.size_bytes >= bytes_min]
        if kind == "marks" and (places := _places(prompt, long)):
            hinted = prefixes.marked(body, places)
        elif kind == "key" and long:
            # The shortest names it: as a conversation grows, its key stays.
            named = long[0].edge.digest
            key = hmac.digest(self._secret_of(deployment), named, "sha256")
            hinted = {**body, "prompt_cache_key": KEY_BEGINS + key.hex()[:KEY_DIGITS]}
        else:
            return body
        for worth in self._worths_of(prompt.tenant, group):
            worth.hinted += 1
        self._changed()
        return hinted

    def blamed(
        self, reading: Reading | None, deployment: Deployment, error: GatewayError
    ) -> GatewayError:
        """What a call of this prompt failed with: a hint of ours, if the provider names it.

        It gets none from then on, and the failure is one that is tried again.
        """
        if not isinstance(error, InvalidRequest) or deployment.id in self._refused:
            return error
        prompt = None if reading is None else reading.prompt
        if prompt is None or not prompt.known.get(deployment.group):
            return error  # no hint was given
        kind, _ = self._way(deployment)
        if kind is None or HINTS[kind] not in f"{error.param} {error}":
            return error
        if len(self._refused) >= DEPLOYMENTS_MAX:
            self._refused.clear()
        self._refused.add(deployment.id)
        self._ways.pop(deployment.id, None)
        return ProviderError(
            f"{deployment.provider} refuses hints for its cache and is given none from now on:"
            f" {error}",
            code=NO_HINTS,
            provider=deployment.provider,
            model=deployment.group,
        )

    def learn(
        self, tenant: str, deployment: Deployment, usage: Mapping[str, Any] | None
    ) -> CacheUse | None:
        """What the provider says of a tenant's call, cached tokens among it; None: nothing."""
        if usage is None or "completion_tokens" not in usage or usage.get("estimated"):
            return None  # texts for vectors have no cache; and an estimate knows nothing of one
        prompt_tokens, cached = int(usage.get("prompt_tokens") or 0), cached_in(usage)
        written = int(usage.get("cache_creation_input_tokens") or 0)
        worths = self._worths_of(tenant, deployment.group)
        for worth in worths:
            worth.calls += 1
            worth.prompt_tokens += prompt_tokens
        self._changed()
        if not (cached or written):
            return _NO_USE
        saved = self._saved(deployment, usage, cached, written)
        for worth in worths:
            worth.calls_cached += cached > 0
            worth.cached_tokens += cached
            worth.written_tokens += written
            worth.saved_nano += saved or 0
            worth.unpriced += saved is None
        return CacheUse(cached, written, saved)

    # ------------------------------------------------------------------------- for operators

    def figures(self) -> Figures:
        """This process's figures since it began, as numbers; they can be added up."""
        models = {f"model {name}": worth for name, worth in self._models.copy().items()}
        tenants = {f"tenant {name}": worth for name, worth in self._tenants.copy().items()}
        worths = {ALL: self._all, **models, **tenants}
        return {name: _numbers_of(worth) for name, worth in worths.items()}

    def get_cache_stats(self, tenant_id: str | None = None) -> dict[str, Any]:
        """What providers' prefix caches were worth to all processes' calls, or a tenant's.

        Returns:
            `requests` whose usage was reported, `hits` of them with cached tokens, `hit_rate`;
            `prompt_tokens`, `cached_tokens` of them and `cached_share`; `written_tokens`;
            `saved_usd`: the usual price of these prompts less what was paid (below 0 while more
            was written than read), without those of `unpriced` calls; `hinted` calls; `by_model`
            and `by_tenant`, but for a tenant; `scope`: `process` where only this one's are known.
            Of this process: `enabled`, `ttl_seconds`, `memory_entries`, `memory_entries_max`.
        """
        return self.told(self.system_figures(), tenant_id)

    def stats(self) -> dict[str, Any]:
        """As `get_cache_stats`, of this process alone."""
        return self.told(None)

    def totals(self) -> dict[str, Any]:
        """Of all calls of this process together, as in `stats`."""
        return self._all.told()

    def told(self, figures: Figures | None, tenant_id: str | None = None) -> dict[str, Any]:
        """`get_cache_stats` over these figures; None: this process's."""
        return {
            "enabled": self.enable_kv_cache,
            "ttl_seconds": self.kv_cache_ttl,
            "memory_entries": len(self._known),
            "memory_entries_max": self._known_max,
            "scope": "process" if figures is None else "system",
            **told(self.figures() if figures is None else figures, tenant_id),
        }

    def generate_cache_key(
        self,
        prompt: str | None,
        model: str,
        messages: list[dict[str, Any]] | None = None,
        tenant_id: str = "default",
    ) -> str:
        """The name of a whole prompt, for the two methods below. `model` is a group's name.

        Prompts too short for a provider's cache have names too; nothing is ever known of them.
        """
        given = messages or [{"role": "user", "content": prompt or ""}]
        found = prefixes.read("chat", {"messages": given}, tenant_id, least_bytes=0, steps=False)
        digest = found.edges[-1].digest.hex() if found is not None and found.edges else ""
        return f"kv_cache:{model}:{digest}"

    async def get_kv_cache(self, cache_key: str, tenant_id: str = "default") -> KVCacheEntry | None:
        """What is known of a prompt of this tenant; None if it was not sent lately."""
        model, digest = _parsed(cache_key)
        known = self._known.get((tenant_id, model, digest))
        if known is None or self._clock() - known.seen_s > self.kv_cache_ttl:
            return None
        return replace(known)

    async def invalidate_kv_cache(
        self,
        cache_key: str | None = None,
        model: str | None = None,
        tenant_id: str | None = None,
    ) -> int:
        """Forget what was sent, by key, group and tenant, whichever are given; how many entries.

        They are new to this process then: no hints, no home. Providers keep what they have.
        """
        digest: bytes | None = None
        if cache_key is not None:
            model, digest = _parsed(cache_key)
        gone = [
            key
            for key in list(self._known)
            if tenant_id in (None, key[0]) and model in (None, key[1]) and digest in (None, key[2])
        ]
        return sum(self._known.pop(key, None) is not None for key in gone)

    def clear_cache(self) -> int:
        """Forget everything that was sent; how many entries that were. Figures stay."""
        # Another one in its place: a request may hold this one on another thread.
        gone, self._known = self._known, OrderedDict()
        return len(gone)

    # ----------------------------------------------------------------------------------------

    def _way(self, deployment: Deployment) -> tuple[Kind | None, int]:
        """Which hints a deployment is given, if any, and from how many bytes its provider caches.

        None where its configuration says that it takes none, or has LiteLLM set marks of its own.
        """
        way = self._ways.get(deployment.id)
        if way is not None:
            return way
        listed = self._caching_of(deployment)
        info = deployment.info
        pays = info.get("supports_prompt_caching")
        if pays is None and listed is not None:
            pays = listed.pays
        own_min = info.get("prompt_cache_min_tokens")
        tokens_min = own_min if isinstance(own_min, int) else TOKENS_MIN
        if listed is not None and not isinstance(own_min, int):
            tokens_min = listed.tokens_min
        kind = _kind(deployment, pays)
        if deployment.id in self._refused or "cache_control_injection_points" in deployment.params:
            kind = None
        way = kind, tokens_min * prefixes.BYTES_PER_TOKEN
        if kind is not None:
            self._bytes_min = min(self._bytes_min, way[1])
        if listed is not None:  # else the list may be there the next time
            if len(self._ways) >= DEPLOYMENTS_MAX:
                self._ways.clear()
            self._ways[deployment.id] = way
        return way

    def _recognised(self, prompt: Prompt, group: str) -> tuple[_Known, ...]:
        """The beginnings of a prompt that this tenant has sent before, shortest first."""
        if not self.enable_kv_cache or prompt.hinted:
            return ()
        ttl_s = min(self.kv_cache_ttl, PROVIDERS_KEEP_S)
        found = []
        for edge in prompt.edges:
            known = self._fresh(prompt, group, edge.digest, ttl_s)
            if known is not None:
                found.append(_Known(edge, known.is_end))
        return tuple(found)

    def _fresh(
        self, prompt: Prompt, group: str, digest: bytes, ttl_s: float
    ) -> KVCacheEntry | None:
        known = self._known.get((prompt.tenant, group, digest))
        if known is None or self._clock() - known.seen_s > ttl_s:
            return None
        return known

    def _note(self, prompt: Prompt, group: str) -> None:
        now = self._clock()
        shared = prompt.edges[-NOTED_EDGES:]
        first = [e for e in prompt.edges[:-NOTED_EDGES] if e.place == prefixes.TOOLS]
        if prompt.instructions is not None and prompt.instructions not in shared:
            first.append(prompt.instructions)
        noted = [(edge.digest, edge.size_bytes) for edge in (*first, *shared)]
        if self.enable_kv_cache:
            for digest, size_bytes in noted:
                if size_bytes >= self._bytes_min:
                    entry = self._touch((prompt.tenant, group, digest), size_bytes, now)
                    entry.is_end |= digest == prompt.edges[-1].digest
        for digest, size_bytes in prompt.steps:
            self._touch((prompt.tenant, group, digest), size_bytes, now)

    def _touch(self, key: tuple[str, str, bytes], size_bytes: int, now: float) -> KVCacheEntry:
        entries = self._known
        entry = entries.pop(key, None)
        if entry is None:
            if len(entries) >= self._known_max:
                entries.popitem(last=False)
            entry = KVCacheEntry(size_bytes)
        entries[key] = entry
        entry.times += 1
        entry.seen_s = now
        return entry

    def _worths_of(self, tenant: str, group: str) -> tuple[Worth, Worth, Worth]:
        """All figures that something of a tenant and a group is a part of."""
        return (
            self._all,
            _worth_of(group, self._models, MODELS_MAX),
            _worth_of(tenant, self._tenants, TENANTS_MAX),
        )

    def _saved(
        self, deployment: Deployment, usage: Mapping[str, Any], cached: int, written: int
    ) -> int | None:
        """What the call would have cost without a cache, less what it costs, in nano-USD."""
        if not _is_usual(usage):
            return self._difference(deployment, usage)
        # To look a price up takes longer than all the rest here.
        savings = self._savings.get(deployment.id)
        if savings is None:
            read = self._difference(deployment, _sample(read=SAMPLE_TOKENS))
            write = self._difference(deployment, _sample(written=SAMPLE_TOKENS))
            if read is None or write is None:
                return None
            if len(self._savings) >= DEPLOYMENTS_MAX:
                self._savings.clear()
            savings = self._savings[deployment.id] = read, write
        return round((cached * savings[0] + written * savings[1]) / SAMPLE_TOKENS)

    def _difference(self, deployment: Deployment, usage: Mapping[str, Any]) -> int | None:
        """The usual price of this usage less the one with the cache."""
        # Some say how many tokens were plain text, and mean: neither read nor written.
        details = usage.get("prompt_tokens_details") or {}
        plain = {name: value for name, value in usage.items() if not name.startswith("cache_")}
        plain["prompt_tokens_details"] = {
            name: value
            for name, value in details.items()
            if "cach" not in name and name != "text_tokens"
        }
        usual = self._price_of(deployment, plain)
        paid = self._price_of(deployment, usage)
        return None if usual is None or paid is None else usual - paid


def _is_usual(usage: Mapping[str, Any]) -> bool:
    """Whether each token is priced alike: a prompt of text, not so long that it is dearer, and
    cached for as long as usual."""
    details = usage.get("prompt_tokens_details") or {}
    kept = details.get("cache_creation_token_details") or {}
    dearer = any(details.get(f"{kind}_tokens") for kind in ("audio", "image", "video"))
    return (
        int(usage.get("prompt_tokens") or 0) <= LONG_PROMPT_TOKENS
        and not dearer
        and not kept.get("ephemeral_1h_input_tokens")
        and not any(usage.get(name) for name in ("service_tier", "inference_geo", "speed"))
    )


def _sample(read: int = 0, written: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": read + written,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": read},
        "cache_creation_input_tokens": written,
    }


def _kind(deployment: Deployment, pays: bool | None) -> Kind | None:
    """The hint that a deployment's provider knows. `pays`: its prompts are cached, if one knows.

    One that nobody knows is taken for what its provider's models usually are.
    """
    if pays is False:
        return None
    if deployment.provider in KEYED:
        return "key"
    if deployment.provider in MARKED:
        return "marks"
    is_claude = "claude" in deployment.model
    return "marks" if deployment.provider in CLAUDES_ELSEWHERE and is_claude and pays else None


def _places(prompt: Prompt, known: Sequence[_Known]) -> list[Place]:
    """Where the longest known beginning ends, and where shorter ones do that others share.

    A conversation is marked at its end too: its next prompt begins with this one.
    """
    markable = [one.edge for one in known if one.edge.place is not None]
    if not markable:
        return []
    last = prompt.edges[-1]
    wanted = [edge for edge in markable if edge.place == prefixes.TOOLS]
    wanted += [edge for edge in markable if edge == prompt.instructions]
    wanted.append(markable[-1])
    if known[-1].is_end and last.place is not None:
        wanted.append(last)
    places = list(dict.fromkeys(edge.place for edge in wanted if edge.place is not None))
    assert len(places) <= MARKS_MAX
    return places


def _worth_of(name: str, known: dict[str, Worth], most: int) -> Worth:
    """The figures of a name: its own, for as many as fit; those of OTHER beyond."""
    worth = known.get(name)
    if worth is None:
        if len(known) >= most:
            name = OTHER
        worth = known.setdefault(name, Worth())
    return worth


def _parsed(cache_key: str) -> tuple[str, bytes]:
    """Group and digest of a key; what is no key names nothing."""
    model, _, digest = cache_key.removeprefix("kv_cache:").rpartition(":")
    try:
        return model, bytes.fromhex(digest)
    except ValueError:
        return model, b"?"
