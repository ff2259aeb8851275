"""What a call costs: the deployment's own prices, else LiteLLM's list; None when neither knows.

Rule 1: money is integer nano-USD, added up in decimals.
Rule 2: unknown is None and never 0; only the embedded models are free.
Rule 3: a deployment's own prices never reach LiteLLM, which would change its list for the whole
        process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from actors.ledger.policy import nano

if TYPE_CHECKING:
    from forebay.routing import Deployment

LOCAL = "local"
NAMES_MAX = 10_000  # model names remembered as priced or not; above it the memory is emptied

INPUT, OUTPUT = "input_cost_per_token", "output_cost_per_token"
CACHE_READ, CACHE_WRITE = "cache_read_input_token_cost", "cache_creation_input_token_cost"
OWN = (INPUT, OUTPUT, CACHE_READ, CACHE_WRITE)


PROBE_TOKENS = 1_000
LONG_PROMPT_TOKENS = 100_000  # above this the dearer tiers of a price list may begin
LONG_PROBE_TOKENS = 1_500_000
TIER_ASKED = "asked_service_tier"  # goes to LiteLLM beside the usage, not in it
NANO = Decimal(10**9)


class Rate(NamedTuple):
    """The most that a token costs, in nano-USD."""

    prompt: Decimal
    completion: Decimal

    def nano(self, prompt: int, completion: int) -> int:
        """What so many tokens cost at most."""
        cost = self.prompt * prompt + self.completion * completion
        return int(cost.to_integral_value(ROUND_CEILING))

    def affords(self, nano: int, prompt: int) -> int:
        """Completion tokens that so much money buys beside the prompt."""
        left = nano - self.nano(prompt, 0)
        if left < 0:
            return -1
        return int(left // self.completion) if self.completion > 0 else 2**31


@dataclass(frozen=True, slots=True)
class PriceBound:
    """What a deployment charges at most per token: for plain text, and for anything else."""

    plain: Rate
    dearest: Rate

    def rate(self, prompt: int, is_plain: bool) -> Rate:
        """The rate of a request with so many prompt tokens."""
        return self.plain if is_plain and prompt <= LONG_PROMPT_TOKENS else self.dearest


class PromptCaching(NamedTuple):
    """How a provider caches the beginnings of a model's prompts.

    `pays`: cached tokens are cheaper; None where the list does not have the model. `tokens_min`:
    shorter beginnings are not cached.
    """

    pays: bool | None
    tokens_min: int


class Counts(NamedTuple):
    """A usage of nothing but text: prompt tokens, those of them that were cached, completion."""

    prompt: int
    cached: int
    completion: int


class Tariff(NamedTuple):
    """What a token of text costs, in USD: of the prompt, of its cached beginning, of the answer."""

    prompt: float
    cached: float
    completion: float

    def nano(self, counts: Counts) -> int:
        """What a usage costs, added up as LiteLLM adds."""
        prompt = (counts.prompt - counts.cached) * self.prompt + counts.cached * self.cached
        return nano(prompt + counts.completion * self.completion)


def dearest(bounds: Iterable[PriceBound | None]) -> PriceBound | None:
    """One that none of them exceeds; None if none is known."""
    known = [bound for bound in bounds if bound is not None]
    if not known:
        return None
    return PriceBound(
        _most(bound.plain for bound in known), _most(bound.dearest for bound in known)
    )


def _most(rates: Iterable[Rate]) -> Rate:
    prompts, completions = zip(*rates, strict=True)
    return Rate(max(prompts), max(completions))


def version_of(table: Any) -> str:
    """A name for a table of prices, the same for the same prices. LiteLLM's takes 6 ms."""
    told = orjson.dumps(table, option=orjson.OPT_SORT_KEYS, default=str)
    return hashlib.sha256(told).hexdigest()[:12]


def is_price(name: str) -> bool:
    """Whether a name of `litellm_params` or `model_info` says what something costs."""
    return "_cost" in name or name.startswith("cost_")


class Prices:
    """Prices of calls; reads LiteLLM's list through `litellm`, once that is imported.

    Owns what it has learnt about model names and deployments, bounded by NAMES_MAX each.
    `listed_version` names the list, once it is there. Failure behaviour: a model that LiteLLM
    cannot price, for whatever reason, has no price.
    """

    def __init__(self, litellm: Any = None, listed_version: str = "") -> None:
        self.litellm = litellm
        self.listed_version = listed_version
        self._versions: dict[str, tuple[Deployment, str]] = {}
        self._listed: dict[str, bool] = {}
        self._names: dict[tuple[str, str | None], tuple[Deployment, str | None]] = {}
        self._tariffs: dict[str, Tariff | None] = {}
        self._own: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {}
        self._bounds: dict[str, PriceBound | None] = {}

    def of_answer(
        self, deployment: Deployment, usage: Mapping[str, Any] | None, model: str, usd: float | None
    ) -> int | None:
        """The price of an answer for which LiteLLM says `usd`, in nano-USD."""
        if usd is None or self._has_own(deployment):
            return self.of_usage(deployment, usage, model)
        if usd == 0 and not self._is_listed(self._name(deployment)):
            return None
        return nano(usd)

    def of_usage(
        self, deployment: Deployment, usage: Mapping[str, Any] | None, model: str | None = None
    ) -> int | None:
        """The price of `usage`, in nano-USD. `model` is the name that the provider reported."""
        if self._has_own(deployment):
            return None if usage is None else _added_up(_own(deployment), usage)
        if deployment.provider == LOCAL:
            return 0
        if usage is None or self.litellm is None:
            return None
        name = self._listed_name(deployment, model)
        return None if name is None else self._priced(name, usage)

    def _listed_name(self, deployment: Deployment, model: str | None) -> str | None:
        """By which name the list has what answered; None where it has none."""
        known = self._names.get((deployment.id, model))
        if known is not None and known[0] is deployment:
            return known[1]
        names = [self._name(deployment)]
        if model:
            names.append(f"{deployment.provider}/{model.removeprefix(deployment.provider + '/')}")
        if deployment.provider == "openai":  # LiteLLM lists its models for texts apart
            names.append(f"text-completion-openai/{deployment.model.removeprefix('openai/')}")
        name = next(filter(self._is_listed, names), None)
        if len(self._names) >= NAMES_MAX:
            self._names.clear()
        self._names[deployment.id, model] = deployment, name
        return name

    def _priced(self, name: str, usage: Mapping[str, Any]) -> int | None:
        """LiteLLM takes 0.1 ms for a sum; of a usage of nothing but text it is made here."""
        counts = text_only(usage)
        tariff = None if counts is None else self._tariff(name)
        if counts is None or tariff is None:
            return self._from_list(name, usage)
        return tariff.nano(counts)

    def _tariff(self, name: str) -> Tariff | None:
        """Prices per token, asked of LiteLLM by example; None where they are no plain ones."""
        if name not in self._tariffs:
            if len(self._tariffs) >= NAMES_MAX:
                self._tariffs.clear()
            self._tariffs[name] = self._plain_tariff(name)
        return self._tariffs[name]

    def _plain_tariff(self, name: str) -> Tariff | None:
        usd = [self._usd_of(name, _usage_of(Counts(*one))) for one in _ONES]
        if any(one is None for one in usd):
            return None
        tariff = Tariff(*(float(one or 0.0) for one in usd))
        for counts in _SAMPLES:
            for thought in (0, counts.completion):
                if self._from_list(name, _usage_of(counts, thought)) != tariff.nano(counts):
                    return None
        return tariff

    def version(self, deployment: Deployment) -> str:
        """A name for the prices that the deployment's calls are priced by; empty if there are none.

        `own:` and a hash of its own ones, `litellm:` and a hash of the whole list, or `local`.
        """
        known = self._versions.get(deployment.id)
        if known is not None and known[0] is deployment:
            return known[1]
        version = self._version(deployment)
        if version:  # without one, the list may be still to come
            if len(self._versions) >= NAMES_MAX:
                self._versions.clear()
            self._versions[deployment.id] = deployment, version
        return version

    def _version(self, deployment: Deployment) -> str:
        if self._has_own(deployment):
            own = _own(deployment)
            if own is None:
                return ""
            return f"own:{version_of({name: own[name].normalize() for name in own})}"
        if deployment.provider == LOCAL:
            return LOCAL
        return self.listed_version and f"litellm:{self.listed_version}"

    def bound(self, deployment: Deployment) -> PriceBound | None:
        """What the deployment charges at most; None when no price is known.

        Prices that are not per token (per image, per search) are not in it.
        """
        if self._has_own(deployment):
            return _own_bound(_own(deployment))
        if deployment.provider == LOCAL:
            free = Rate(Decimal(0), Decimal(0))
            return PriceBound(free, free)
        if self.litellm is None:
            return None
        name = self._name(deployment)
        if name not in self._bounds:
            if len(self._bounds) >= NAMES_MAX:
                self._bounds.clear()
            self._bounds[name] = self._listed_bound(name)
        return self._bounds[name]

    def prompt_caching(self, deployment: Deployment) -> PromptCaching | None:
        """What LiteLLM's list says of the model's prompt cache; None while there is no list."""
        if self.litellm is None:
            return None
        name, pays = self._name(deployment), None
        with contextlib.suppress(Exception):  # "not mapped", in many ways
            listed = self.litellm.get_model_info(name)
            pays = bool(listed.get("supports_prompt_caching")) and self._reads_are_cheaper(name)
        return PromptCaching(pays, self.litellm.utils.get_prompt_cache_min_tokens(name))

    def _reads_are_cheaper(self, name: str) -> bool:
        plain = {"prompt_tokens": PROBE_TOKENS, "completion_tokens": 0}
        read = {**plain, "prompt_tokens_details": {"cached_tokens": PROBE_TOKENS}}
        return (self._from_list(name, read) or 0) < (self._from_list(name, plain) or 0)

    def _listed_bound(self, name: str) -> PriceBound | None:
        """Asked of LiteLLM by example: prompts of several lengths, and every kind of token."""
        if not self._is_listed(name):
            return None
        plain = self._dearest(name, (PROBE_TOKENS, LONG_PROMPT_TOKENS), _plain_kinds)
        lengths = (PROBE_TOKENS, LONG_PROMPT_TOKENS, LONG_PROBE_TOKENS)
        other = self._dearest(name, lengths, _all_kinds)
        return PriceBound(plain, _most((plain, other)))

    def _dearest(
        self, name: str, lengths: Iterable[int], kinds: Callable[[int], list[dict[str, Any]]]
    ) -> Rate:
        """The most per token of such usages, in nano-USD."""
        prompt = completion = Decimal(0)
        for length in lengths:
            for kind in kinds(length):
                tokens = {"prompt_tokens": length, "completion_tokens": 0}
                unsaid = {
                    field: v for field, v in kind.items() if not field.startswith("completion")
                }
                alone = self._from_list(name, {**tokens, **unsaid}) or 0
                tokens["completion_tokens"] = PROBE_TOKENS
                both = self._from_list(name, {**tokens, **kind}) or 0
                prompt = max(prompt, Decimal(alone) / length)
                completion = max(completion, Decimal(both - alone) / PROBE_TOKENS)
        return Rate(prompt, completion)

    def _name(self, deployment: Deployment) -> str:
        base = deployment.info.get("base_model") or deployment.params.get("base_model")
        return base if isinstance(base, str) else deployment.model

    def _has_own(self, deployment: Deployment) -> bool:
        # A new configuration makes new dicts, so these very ones are what is remembered.
        own = self._own.get(deployment.id)
        if own is None or own[0] is not deployment.params or own[1] is not deployment.info:
            if len(self._own) >= NAMES_MAX:
                self._own.clear()
            own = deployment.params, deployment.info, _has_prices(deployment)
            self._own[deployment.id] = own
        return own[2]

    def _is_listed(self, name: str) -> bool:
        known = self._listed.get(name)
        if known is None:
            known = self._from_list(name, {"prompt_tokens": 1, "completion_tokens": 1}) is not None
            if len(self._listed) >= NAMES_MAX:
                self._listed.clear()
            self._listed[name] = known
        return known

    def _from_list(self, name: str, usage: Mapping[str, Any]) -> int | None:
        usd = self._usd_of(name, usage)
        return None if usd is None else nano(usd)

    def _usd_of(self, name: str, usage: Mapping[str, Any]) -> float | None:
        usage = {**usage, "total_tokens": usage.get("total_tokens") or 0}
        tier = {"service_tier": usage[TIER_ASKED]} if TIER_ASKED in usage else {}
        try:
            prompt_usd, completion_usd = self.litellm.cost_calculator.cost_per_token(
                model=name,
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
                usage_object=self.litellm.Usage(
                    **{k: v for k, v in usage.items() if k != TIER_ASKED}
                ),
                **tier,
            )
        except Exception:  # noqa: BLE001 - LiteLLM says "not mapped" in many ways; None says it here
            return None
        return float(prompt_usd + completion_usd)


def _has_prices(deployment: Deployment) -> bool:
    params, info = deployment.params, deployment.info
    return any(is_price(name) and params[name] is not None for name in params) or any(
        info.get(name) is not None for name in (INPUT, OUTPUT)
    )


def text_only(usage: Mapping[str, Any]) -> Counts | None:
    """The counts of a usage of nothing but text at the usual prices; None for any other."""
    if not usage.keys() <= _TEXT_ONLY:
        return None
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or 0
    for name, count in details.items():
        if count and name not in ("cached_tokens", "text_tokens"):
            return None
    for name, count in (usage.get("completion_tokens_details") or {}).items():
        if count and name not in ("reasoning_tokens", "text_tokens"):
            return None
    if (usage.get("prompt_cache_hit_tokens") or cached) != cached:
        return None
    if not type(prompt) is type(cached) is type(completion) is int:
        return None
    return Counts(prompt, cached, completion) if cached <= prompt <= LONG_PROMPT_TOKENS else None


_TEXT_ONLY = frozenset(
    {"prompt_tokens", "completion_tokens", "total_tokens", "estimated"}
    | {"prompt_tokens_details", "completion_tokens_details"}
    | {"prompt_cache_hit_tokens", "prompt_cache_miss_tokens"}  # DeepSeek's
    | {"queue_time", "prompt_time", "completion_time", "total_time"}  # Groq's
)
_ONES = ((1, 0, 0), (1, 1, 0), (0, 0, 1))
_SAMPLES = (
    Counts(PROBE_TOKENS + 1, 0, 7),
    Counts(PROBE_TOKENS, 333, 0),
    Counts(LONG_PROMPT_TOKENS, 99_001, PROBE_TOKENS),
    Counts(3, 0, LONG_PROMPT_TOKENS),
)


def _usage_of(counts: Counts, thought: int = 0) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
    }
    if counts.cached:
        usage["prompt_tokens_details"] = {"cached_tokens": counts.cached}
    if thought:
        usage["completion_tokens_details"] = {"reasoning_tokens": thought}
    return usage


def _plain_kinds(length: int) -> list[dict[str, Any]]:
    """Usages of nothing but text: cached, thought about, and in the US, which may be dearer."""
    thinking = {"completion_tokens_details": {"reasoning_tokens": PROBE_TOKENS}}
    cached = {"cache_creation_input_tokens": length, "inference_geo": "us"}
    return [{}, {"inference_geo": "us"}, cached, thinking]


def _all_kinds(length: int) -> list[dict[str, Any]]:
    """The same, and audio, images, caches that live for an hour, and faster service."""
    kept = {"ephemeral_1h_input_tokens": length, "ephemeral_5m_input_tokens": 0}
    long_lived = {
        "cache_creation_input_tokens": length,
        "prompt_tokens_details": {
            "cache_creation_tokens": length,
            "cache_creation_token_details": kept,
        },
    }
    fast = {"speed": "fast", "inference_geo": "us"}
    return [
        *_plain_kinds(length),
        {
            "prompt_tokens_details": {"audio_tokens": length},
            "completion_tokens_details": {"audio_tokens": PROBE_TOKENS},
        },
        {"prompt_tokens_details": {"image_tokens": length}},
        {**long_lived, "inference_geo": "us"},
        fast,
        {**long_lived, **fast},
        {TIER_ASKED: "priority"},
        {"cache_creation_input_tokens": length, TIER_ASKED: "priority"},
    ]


def _own(deployment: Deployment) -> dict[str, Decimal] | None:
    """The deployment's own prices in USD per token; None when they are not all per token."""
    given = {name: value for name, value in deployment.info.items() if is_price(name)}
    given |= {name: value for name, value in deployment.params.items() if is_price(name)}
    prices = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in OWN:
            return None
        try:
            price = Decimal(str(getattr(value, "get_secret_value", lambda v=value: v)()))
        except InvalidOperation:
            return None
        if not price.is_finite() or price < 0:
            return None
        prices[name] = price
    return prices


def _own_bound(prices: dict[str, Decimal] | None) -> PriceBound | None:
    if prices is None:
        return None
    free = Decimal(0)
    prompt = max(prices.get(name, free) for name in (INPUT, CACHE_READ, CACHE_WRITE))
    rate = Rate(prompt * NANO, prices.get(OUTPUT, free) * NANO)
    return PriceBound(rate, rate)


def _added_up(prices: Mapping[str, Decimal] | None, usage: Mapping[str, Any]) -> int | None:
    if prices is None:
        return None
    details = usage.get("prompt_tokens_details") or {}
    prompt = int(usage.get("prompt_tokens") or 0)
    read = min(prompt, int(details.get("cached_tokens") or 0))
    written = min(prompt - read, int(usage.get("cache_creation_input_tokens") or 0))
    free = Decimal(0)
    usual = prices.get(INPUT, free)
    usd = (
        usual * (prompt - read - written)
        + prices.get(CACHE_READ, usual) * read
        + prices.get(CACHE_WRITE, usual) * written
        + prices.get(OUTPUT, free) * int(usage.get("completion_tokens") or 0)
    )
    return nano(usd)
