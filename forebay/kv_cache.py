"""The prompt-prefix cache: what providers compute once for prompts that begin alike.

The attention's keys and values are the provider's, and so is the cache of them. What a gateway can
do is to recognise beginnings that come again, to say so in the provider's words, and to send them
where they were sent before.

Rule 1: a beginning gets a hint when its tenant has sent it before, not so long ago that the
        provider has dropped it, and not below the length from which providers cache.
Rule 2: hints change no answer. Who has marks or a key of its own gets none of ours.
Rule 3: what is told of the cache's worth is what providers report in their usage, priced.
"""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from forebay import prefixes
from forebay.prefixes import Edge, Place, Prompt
from forebay.strategies import Affinity

if TYPE_CHECKING:
    from actors.ref import Clock
    from forebay.call import Call
    from forebay.routing import Deployment

KEYED = frozenset({"openai", "azure"})
"""Providers that take `prompt_cache_key`: they cache by themselves, and find it sooner by a key."""

MARKED = frozenset({"anthropic"})
"""Providers that cache up to a mark, and only there."""

KEY_DIGITS = 32  # OpenAI takes 64 characters in all
MARKS_MAX = 4
TOKENS_MIN = 1024
HINTED_BYTES_MIN = TOKENS_MIN * prefixes.BYTES_PER_TOKEN
PROVIDERS_KEEP_S = 300.0
"""Anthropic and OpenAI keep a prefix for five minutes after its last use."""

NOTED_EDGES = 4  # of a prompt's last: what the next prompts share with it ends at one of these
KNOWN_MAX = 50_000
HOME_SHARE_MIN = 0.4  # of a prompt: where only less of it was sent, its anchor decides
MODELS_MAX = 200

Price = Callable[["Deployment", Mapping[str, Any]], int | None]


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


@dataclass(frozen=True, slots=True)
class Hint:
    """What a prompt gets in one group: Anthropic's marks, and what OpenAI's key is made of."""

    places: tuple[Place, ...]
    key_of: bytes | None


NO_HINT = Hint((), None)


@dataclass(slots=True)
class _Worth:
    """What providers reported: calls and tokens, how many of those came from their caches."""

    calls: int = 0
    calls_cached: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    saved_nano: int = 0
    unpriced: int = 0  # calls with cached tokens whose worth nobody knows
    hinted: int = 0

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


@dataclass(slots=True)
class _Totals:
    whole: _Worth = field(default_factory=_Worth)
    models: dict[str, _Worth] = field(default_factory=dict)


class KVCacheManager:
    """Knows the beginnings of prompts that this process sent, and what providers' caches saved.

    Owns `known_max` entries, by tenant, group and digest; the one not sent for longest goes first,
    and none is believed after `kv_cache_ttl` seconds. Figures are of this process, since it began,
    in MODELS_MAX groups and `other`. `price_of` says what usage costs, in nano-USD or None;
    `secret_of` gives what keys for the provider are derived from: the credential that calls are
    made with, so that no tenant can guess another's key, and all processes agree.

    Failure behaviour: a process that restarts knows nothing, so beginnings are new to it once; each
    process has to see one itself before it says so. Nothing here fails a request.
    """

    def __init__(
        self,
        enable_kv_cache: bool = True,
        kv_cache_ttl: float = 3600,
        *,
        clock: Clock = time.monotonic,
        price_of: Price = lambda deployment, usage: None,
        secret_of: Callable[[Deployment], bytes] = lambda deployment: b"",
        known_max: int = KNOWN_MAX,
    ) -> None:
        self._clock = clock
        self._price_of = price_of
        self._secret_of = secret_of
        self._known_max = known_max
        self._known: OrderedDict[tuple[str, str, bytes], KVCacheEntry] = OrderedDict()
        self._totals = _Totals()
        self.configure(enable_kv_cache, kv_cache_ttl)

    def configure(self, hints: bool, ttl_s: float, *, affinity: bool = False) -> None:
        """Give hints or not, find homes or not, and remember for so long, from now on."""
        self.enable_kv_cache = hints
        self.kv_cache_ttl = ttl_s
        self._affinity = affinity

    # ---------------------------------------------------------------- on the way of a request

    def read(self, call: Call) -> Prompt | None:
        """The prompt of a request; None where it is too short for anything to be done."""
        if not self.enable_kv_cache and not self._affinity:
            return None
        least = prefixes.STEP_FIRST_BYTES if self._affinity else HINTED_BYTES_MIN
        return prefixes.read(
            call.route, call.body, call.tenant, least_bytes=least, steps=self._affinity
        )

    def affinity(self, prompt: Prompt | None, group: str) -> Affinity | None:
        """Where most of the prompt was sent before, and what names it where nothing was."""
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
        self, prompt: Prompt | None, body: dict[str, Any], deployment: Deployment
    ) -> dict[str, Any]:
        """The body as it goes to the deployment: with a hint, where one pays.

        Takes note of the prompt and of where it goes; a retry does not make it a known one.
        """
        if prompt is None:
            return body
        group = deployment.group
        hint: Hint | None = prompt.decided.get(group)
        if hint is None:
            hint = prompt.decided[group] = self._decide(prompt, group)
            self._note(prompt, group)
        for digest, _ in prompt.steps:
            known = self._known.get((prompt.tenant, group, digest))
            if known is not None:
                known.home = deployment.circuit
        if hint is NO_HINT or not _takes_hints(deployment):
            return body
        if deployment.provider in MARKED and hint.places:
            hinted = prefixes.marked(body, list(hint.places))
        elif deployment.provider in KEYED and hint.key_of is not None:
            key = hmac.digest(self._secret_of(deployment), hint.key_of, "sha256")
            hinted = {**body, "prompt_cache_key": f"forebay-{key.hex()[:KEY_DIGITS]}"}
        else:
            return body
        for worth in self._worths(group):
            worth.hinted += 1
        return hinted

    def learn(self, deployment: Deployment, usage: Mapping[str, Any] | None) -> None:
        """What the provider says of a call, cached tokens among it."""
        if usage is None or "completion_tokens" not in usage or usage.get("estimated"):
            return  # texts for vectors have no cache; and an estimate knows nothing of one
        prompt_tokens = _count(usage, "prompt_tokens")
        details = usage.get("prompt_tokens_details") or {}
        cached = _count(details, "cached_tokens") or _count(usage, "cache_read_input_tokens")
        written = _count(usage, "cache_creation_input_tokens")
        saved = self._saved(deployment, usage) if cached or written else 0
        for worth in self._worths(deployment.group):
            worth.calls += 1
            worth.calls_cached += cached > 0
            worth.prompt_tokens += prompt_tokens
            worth.cached_tokens += cached
            worth.written_tokens += written
            worth.saved_nano += saved or 0
            worth.unpriced += saved is None

    # ------------------------------------------------------------------------- for operators

    def get_cache_stats(self) -> dict[str, Any]:
        """What providers' prefix caches were worth to this process's calls, and what is known here.

        Returns:
            `requests` whose usage was reported, `hits` of them with cached tokens, `hit_rate`;
            `prompt_tokens`, `cached_tokens` of them and `cached_share`; `written_tokens`;
            `saved_usd`: the usual price of these prompts less what was paid (below 0 while more
            was written than read), without those of `unpriced` calls; `hinted` calls; `by_model`;
            `enabled`, `ttl_seconds`, `memory_entries`, `memory_entries_max`.
        """
        models = dict(self._totals.models)
        return {
            "enabled": self.enable_kv_cache,
            "ttl_seconds": self.kv_cache_ttl,
            "memory_entries": len(self._known),
            "memory_entries_max": self._known_max,
            **self._totals.whole.told(),
            "by_model": {model: worth.told() for model, worth in models.items()},
        }

    def stats(self) -> dict[str, Any]:
        """As `get_cache_stats`."""
        return self.get_cache_stats()

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
        count = len(self._known)
        self._known.clear()
        return count

    # ----------------------------------------------------------------------------------------

    def _decide(self, prompt: Prompt, group: str) -> Hint:
        if not self.enable_kv_cache or prompt.hinted:
            return NO_HINT
        ttl_s = min(self.kv_cache_ttl, PROVIDERS_KEEP_S)
        long = [edge for edge in prompt.edges if edge.size_bytes >= HINTED_BYTES_MIN]
        known = [edge for edge in long if self._fresh(prompt, group, edge.digest, ttl_s)]
        if not known:
            return NO_HINT
        # The shortest names it: as a conversation grows, its key stays.
        return Hint(self._places(prompt, group, known), known[0].digest)

    def _places(self, prompt: Prompt, group: str, known: list[Edge]) -> tuple[Place, ...]:
        """Where the longest known beginning ends, and where shorter ones do that others share.

        A conversation is marked at its end too: its next prompt begins with this one.
        """
        markable = [edge for edge in known if edge.place is not None]
        if not markable:
            return ()
        last = prompt.edges[-1]
        wanted = [edge for edge in markable if edge.place == prefixes.TOOLS]
        wanted += [edge for edge in markable if edge == prompt.instructions]
        wanted.append(markable[-1])
        longest = self._known[prompt.tenant, group, known[-1].digest]
        if longest.is_end and last.place is not None:
            wanted.append(last)
        places = dict.fromkeys(edge.place for edge in wanted if edge.place is not None)
        assert len(places) <= MARKS_MAX
        return tuple(places)

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
                if size_bytes >= HINTED_BYTES_MIN:
                    entry = self._touch((prompt.tenant, group, digest), size_bytes, now)
                    entry.is_end |= digest == prompt.edges[-1].digest
        for digest, size_bytes in prompt.steps:
            self._touch((prompt.tenant, group, digest), size_bytes, now)

    def _touch(self, key: tuple[str, str, bytes], size_bytes: int, now: float) -> KVCacheEntry:
        entry = self._known.get(key)
        if entry is None:
            if len(self._known) >= self._known_max:
                self._known.popitem(last=False)
            entry = self._known[key] = KVCacheEntry(size_bytes)
        else:
            self._known.move_to_end(key)
        entry.times += 1
        entry.seen_s = now
        return entry

    def _worths(self, group: str) -> tuple[_Worth, _Worth]:
        models = self._totals.models
        if group not in models:
            group = group if len(models) < MODELS_MAX else "other"
        return self._totals.whole, models.setdefault(group, _Worth())

    def _saved(self, deployment: Deployment, usage: Mapping[str, Any]) -> int | None:
        """What the call would have cost without a cache, less what it costs, in nano-USD."""
        details = usage.get("prompt_tokens_details") or {}
        plain = {name: value for name, value in usage.items() if not name.startswith("cache_")}
        plain["prompt_tokens_details"] = {n: v for n, v in details.items() if "cach" not in n}
        usual = self._price_of(deployment, plain)
        paid = self._price_of(deployment, usage)
        return None if usual is None or paid is None else usual - paid


def _takes_hints(deployment: Deployment) -> bool:
    """Not where its configuration says that it does not, or has LiteLLM set marks of its own."""
    is_willing = deployment.info.get("supports_prompt_caching") is not False
    return is_willing and "cache_control_injection_points" not in deployment.params


def _count(usage: Mapping[str, Any], name: str) -> int:
    return int(usage.get(name) or 0)


def _parsed(cache_key: str) -> tuple[str, bytes]:
    """Group and digest of a key; what is no key names nothing."""
    model, _, digest = cache_key.removeprefix("kv_cache:").rpartition(":")
    try:
        return model, bytes.fromhex(digest)
    except ValueError:
        return model, b"?"
