"""The configuration: what can be set, what it means, and where it comes from.

Rule 1: YAML and the environment are read here and nowhere else.
Rule 2: whatever is wrong raises `ConfigurationError`, naming the place, the field and the remedy;
        no message holds a value that might be a secret.
Rule 3: a setting that has no effect yet is refused (`not_built.py` lists them all).
Rule 4: a configuration never changes. `replace` makes another one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    SerializerFunctionWrapHandler,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from actors.ledger.policy import nano
from actors.rate_limiter.terms import Limits
from forebay import routing, secrets, yaml_lines
from forebay.checks.finding import BuiltIn
from forebay.checks.patterns import Pattern
from forebay.defaults import USUAL, default_models, models_of
from forebay.errors import ConfigurationError
from forebay.faults import Fault, dotted, nearest, refusal, refuse, translated
from forebay.model_list import (
    ModelEntry,
    ModelName,
    Shape,
    entry_faults,
    hidden,
)
from forebay.not_built import not_built
from forebay.routing import ModelTable
from forebay.secrets import Vault, hash_key, is_malformed_reference, is_text, new_key
from forebay.validation import OWN_RULES_MAX, ValidationLevel
from forebay.yaml_lines import Lines, Unreadable

__all__ = [
    "CacheConfig",
    "CircuitBreakerConfig",
    "GatewayConfig",
    "KeyConfig",
    "Problem",
    "RateLimitConfig",
    "Replicas",
    "ServerConfig",
    "SystemConfig",
    "TenantConfig",
    "ValidationLevel",
    "around",
    "check",
    "config_schema",
    "data_dir",
    "hash_key",
    "load",
    "nearest",
    "new_key",
    "parse",
    "revealed",
    "show",
    "shown",
    "sqlite_path",
    "with_default_models",
]

PREFIX = "FOREBAY_"
OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
OTHER_VARIABLES = frozenset({"FOREBAY_CONFIG", "FOREBAY_KEY_SECRET", "FOREBAY_HAPROXY"})
TENANTS_MAX = 100_000
MODELS_MAX = 10_000
BATCH_TEXTS_MAX = 100_000
LIFETIME_S_MAX = 366 * 86_400
"""A year: Redis and the clocks take no lifetime that is endless."""
SLOW_CALL_RATE = 0.5
POSTGRES_SCHEMES = frozenset({"postgresql", "postgresql+psycopg", "postgres"})
REDIS_SCHEMES = frozenset({"redis", "rediss", "dragonfly", "unix"})
REDIS_TLS_OPTIONS = frozenset(
    {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
)


# ------------------------------------------------------------------------------------ vocabulary


def _ledger_url(url: str | SecretStr) -> str | SecretStr:
    """A reference, a file, or a server: hidden as a whole when there may be a password in it."""
    text = url.get_secret_value() if isinstance(url, SecretStr) else url
    if secrets.is_reference(text):
        return text
    if text.startswith("sqlite:///") and text not in ("sqlite:///", "sqlite:///:memory:"):
        return text
    try:
        parts = urlsplit(text)
        there = parts.scheme in POSTGRES_SCHEMES and "//" in text and parts.port != 0
    except ValueError:
        there = False
    if is_malformed_reference(text) or not there:
        raise ValueError(
            "must be sqlite:///PATH, postgresql://USER:PASSWORD@HOST/DATABASE, or os.environ/NAME; "
            "leave it out for the default"
        )
    if parts.fragment or "@" in parts.path:
        raise ValueError("has a password with signs that must be written as %XX, such as %23 for #")
    return SecretStr(text) if "@" in parts.netloc or parts.query else text


def _is_text(url: Any) -> Any:
    if not is_text(url):
        raise ValueError("must be text")
    return url


def _redis_url(url: str | SecretStr) -> str | SecretStr:
    """A reference, or a URL: hidden as a whole when there is a user or a password in it."""
    text = url.get_secret_value() if isinstance(url, SecretStr) else url
    if secrets.is_reference(text):
        return text
    try:
        parts = urlsplit(text)
        there = parts.path if parts.scheme == "unix" else parts.hostname and parts.port != 0
        options = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    except ValueError:
        there, options = None, set()
    if is_malformed_reference(text) or not there or parts.scheme not in REDIS_SCHEMES:
        raise ValueError(
            "must be redis://HOST:PORT, rediss://…, dragonfly://…, unix:///PATH, or os.environ/NAME"
        )
    if parts.fragment or "@" in parts.path:
        raise ValueError("has a password with signs that must be written as %XX, such as %23 for #")
    if not all(name == "db" or name in REDIS_TLS_OPTIONS for name in options):
        known = ", ".join(sorted(REDIS_TLS_OPTIONS))
        raise ValueError(f"takes db and {known} after '?'; a password goes before '@'")
    return SecretStr(text) if "@" in parts.netloc else text


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


Positive = Annotated[float, Field(gt=0)]
Usd = Annotated[float, Field(ge=1e-6, le=1e9)]
Count = Annotated[int, Field(ge=1)]
Lifetime = Annotated[int, Field(ge=1, le=LIFETIME_S_MAX)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:@-]+$")]
LedgerUrl = Annotated[
    str | SecretStr,
    BeforeValidator(_is_text),
    AfterValidator(_ledger_url),
    WithJsonSchema({"type": "string"}),
]
RedisUrl = Annotated[
    str | SecretStr,
    BeforeValidator(_is_text),
    AfterValidator(_redis_url),
    WithJsonSchema({"type": "string"}),
]

_BASE = ConfigDict(
    extra="forbid",
    frozen=True,
    hide_input_in_errors=True,
    allow_inf_nan=False,
    coerce_numbers_to_str=True,
    validate_default=False,
)


# -------------------------------------------------------------------------------------- settings


class Settings(BaseModel):
    """The base of all parts: nothing unknown, nothing changed later, one kind of error."""

    model_config = _BASE

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise refusal(translated(error, type(self)._schema())) from None

    # Pydantic then checks nested parts without calling `__init__`, and errors keep their place.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            raise ConfigurationError(
                f"{name}: a configuration does not change; make another with "
                f"config.replace({name}=…)",
                param=name,
            )
        super().__setattr__(name, value)

    @classmethod
    def _schema(cls) -> dict[str, Any]:
        return cls.model_json_schema()

    def replace(self, **changes: Any) -> Self:
        """The same with some fields changed, checked like a new one."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **changes})

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        if (
            isinstance(value, bool)
            and cls.model_fields[info.field_name or ""].annotation is not bool
        ):
            raise ValueError("must not be true or false")
        return value

    @model_validator(mode="after")
    def _only_what_is_built(self) -> Self:
        refuse(not_built(type(self).__name__, self.__dict__))
        return self


class RateLimitConfig(Settings):
    """Limits of one tenant, or of every tenant that has none of its own. None = no such limit."""

    requests_per_minute: Count | None = Field(
        default=60, description="Admitted in any interval of t minutes: burst_size + t times this."
    )
    requests_per_hour: Count | None = Field(default=1000, description="In any 3,600 s.")
    burst_size: Count = Field(default=10, description="Requests that may come at once.")
    max_queue_size: Annotated[int, Field(ge=0)] = Field(
        default=100, description="Most requests that wait their turn; more are refused at once."
    )
    queue_timeout: Annotated[float, Field(ge=0, le=300)] = Field(
        default=30.0, description="Longest wait, in seconds."
    )
    enable_queuing: bool = Field(
        default=True, description="Wait where the caller agrees to, not refuse."
    )
    tokens_per_minute: Annotated[int, Field(ge=1, le=10**12)] | None = Field(
        default=None, description="A sixth of them may be used at once."
    )
    concurrent_requests: Count | None = Field(default=None, description="Most requests in flight.")
    usd_per_day: Usd | None = Field(default=None, description="US dollars per UTC day.")
    usd_per_month: Usd | None = Field(default=None, description="US dollars per UTC month.")
    count_cache_hits: bool = Field(
        default=True,
        description="A cached answer counts as a request. Where it does not, it is given back once "
        "it is found: at the limit nobody gets as far as to look.",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Only what was said can contradict; a default gives way."""
        refuse(
            Fault((low,), f"is more than {high}, which is {most:g}, and would have no effect")
            for low, high in _WITHIN
            if {low, high} <= self.model_fields_set
            and (least := getattr(self, low)) is not None
            and (most := getattr(self, high)) is not None
            and least > most
        )
        return self

    @model_serializer(mode="wrap")
    def _said(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A default that gave way is left out: read again, it would count as said."""
        fields: dict[str, Any] = dump(self)
        for pair in _WITHIN:
            low, high = (getattr(self, name) for name in pair)
            if low is not None and high is not None and low > high:
                for name in set(pair) - self.model_fields_set:
                    fields.pop(name, None)
        return fields

    def limits(self, version: int = 0) -> Limits:
        """The same in the limiter's words: USD become whole nano-USD."""
        return Limits(
            requests_per_minute=self.requests_per_minute,
            burst=self.burst_size,
            requests_per_hour=self.requests_per_hour,
            concurrent=self.concurrent_requests,
            tokens_per_minute=self.tokens_per_minute,
            day_nano=None if self.usd_per_day is None else nano(self.usd_per_day),
            month_nano=None if self.usd_per_month is None else nano(self.usd_per_month),
            version=version,
        )


# Where the first exceeds the second, the first could never be reached.
_WITHIN = (
    ("burst_size", "requests_per_hour"),
    ("requests_per_minute", "requests_per_hour"),
    ("usd_per_day", "usd_per_month"),
)


class CircuitBreakerConfig(Settings):
    """When a deployment is taken out, and when it comes back."""

    failure_threshold: Count = Field(default=5, description="Failures in a row that open.")
    success_threshold: Count = Field(default=2, description="Probes in a row that close again.")
    timeout: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=60.0, description="Seconds spent open."
    )
    window_s: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=10, description="Seconds over which failure_rate is taken."
    )
    failure_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Share of failed calls that opens."
    )
    min_calls: Count = Field(default=20, description="Calls in the window before the rate counts.")
    slow_call_s: Positive | None = Field(
        default=None,
        description="Seconds to a stream's first token, or between two, that are slow. "
        "Absent = never.",
    )
    slow_call_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=SLOW_CALL_RATE, description="Share of slow calls that opens."
    )
    active_probe_s: Annotated[float, Field(ge=0.1, le=3600)] | None = Field(
        default=None,
        description="Every so many seconds, open deployments that are due are probed with a call "
        "of one token, which is paid for. Absent = only callers' own requests probe.",
    )

    @model_validator(mode="after")
    def _slow_is_said(self) -> Self:
        if self.slow_call_s is None and self.slow_call_rate != SLOW_CALL_RATE:
            refuse([Fault(("slow_call_rate",), "has no effect without slow_call_s; set that too")])
        return self


class CacheConfig(Settings):
    """Where answers are kept: in memory, and behind that in Redis or Dragonfly where one is named.

    A URL without a `backend` says which backend it is for.
    """

    backend: Literal["memory", "redis", "dragonfly"] = "memory"
    redis_url: RedisUrl | None = Field(
        default=None,
        repr=False,
        description="redis://, rediss:// (TLS), unix:// or dragonfly://; or os.environ/NAME.",
    )
    dragonfly_url: RedisUrl | None = Field(
        default=None, repr=False, description="The same for the backend 'dragonfly'."
    )
    default_ttl: Lifetime = Field(
        default=300, description="Seconds; cache_ttl goes first when it is set."
    )
    max_bytes: Annotated[int, Field(ge=1024 * 1024)] = Field(
        default=256 * 1024 * 1024, description="Bytes of memory; read when it starts."
    )
    namespace: Name = Field(
        default="forebay",
        description="First part of every key's name in Redis. Systems that share it share answers; "
        "each forgets what it has in memory by itself.",
    )
    scope: Literal["tenant", "shared"] = Field(
        default="tenant", description="Whether tenants see each other's cached answers."
    )

    @model_validator(mode="before")
    @classmethod
    def _backend_of_the_url(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "backend" in data:
            return data
        named = [name for name in ("redis", "dragonfly") if data.get(f"{name}_url") is not None]
        return {**data, "backend": named[0]} if named else data

    @model_validator(mode="after")
    def _urls_are_used(self) -> Self:
        used = {"memory": (), "redis": ("redis_url",), "dragonfly": ("dragonfly_url", "redis_url")}
        given = [name for name in ("dragonfly_url", "redis_url") if getattr(self, name) is not None]
        refuse(
            Fault((name,), f"has no effect with backend {self.backend!r}; leave one of them out")
            for name in given
            if name not in used[self.backend] or name != given[0]
        )
        return self

    @property
    def url(self) -> str | SecretStr | None:
        """Where the second tier is, if it is said here."""
        return self.dragonfly_url or self.redis_url


class KeyConfig(Settings):
    """An API key, by its hash only: `forebay keys new` prints the key once."""

    id: Name
    hash: str

    @field_validator("hash")
    @classmethod
    def _is_a_hash(cls, text: str) -> str:
        if not re.fullmatch(r"hmac-sha256:[0-9a-f]{64}", text):
            raise ValueError(
                "must be hmac-sha256: and 64 hexadecimal digits, as `forebay keys new` prints it; "
                "never the key itself"
            )
        return text


class TenantConfig(Settings):
    """Somebody who has keys, limits and a choice of models of their own."""

    id: Name
    keys: list[KeyConfig] = []
    limits: RateLimitConfig | None = None
    models: list[ModelName] | None = Field(
        default=None, description="Groups it may use, patterns included; absent = all."
    )
    admin: bool = Field(default=False, description="May use /admin and see every tenant's usage.")


class LedgerConfig(Settings):
    """How what calls cost is kept."""

    durability: Literal["spool", "strict"] = Field(
        default="spool",
        description="spool: a call is in a file of its process before it is made, which a killed "
        "process survives; strict: the ledger's store has it before it is made.",
    )


class ValidationConfig(Settings):
    """What answers are checked for, beside what is always checked."""

    off: list[BuiltIn] = Field(default=[], description="Rules that are not checked.")
    blocked_patterns: Annotated[dict[str, str], Field(max_length=OWN_RULES_MAX)] = Field(
        default={},
        description="Name → regular expression that no answer may hold, of the kind that takes "
        "linear time: no look-around, no back-references.",
    )
    validators: Annotated[list[Name], Field(max_length=OWN_RULES_MAX)] = Field(
        default=[],
        description="Names of validators that installed packages offer as entry points of "
        "'forebay.validators': f(text, request) -> what is wrong, or None.",
    )
    moderation_model: ModelName | None = Field(
        default=None,
        description="Group that is asked of each answer whether it is safe. Paid for by the "
        "tenant. Of a stream it is asked at the end, when its text is handed on already: what it "
        "says is told to metrics and telemetry, and decides whether the stream is stored.",
    )
    repair: bool = Field(
        default=False,
        description="Ask once more where an answer is not valid, saying what is wrong. Paid for "
        "by the tenant; what comes of it counts only if it is valid.",
    )

    @field_validator("blocked_patterns", mode="after")
    @classmethod
    def _take_linear_time(cls, patterns: dict[str, str]) -> dict[str, str]:
        refuse(
            Fault((name,), f"is {fault}")
            for name, text in patterns.items()
            if (fault := _pattern_fault(text)) is not None
        )
        return patterns


def _pattern_fault(text: str) -> str | None:
    try:
        Pattern(text)
    except ValueError as error:
        return str(error)
    return None


class GatewayConfig(Settings):
    """How requests are answered: models, retries, limits, and which concerns are on.

    Raises:
        ConfigurationError: on construction, for every unknown name and every wrong value.
    """

    model_list: Annotated[
        list[Annotated[dict[str, Any], Shape(ModelEntry)]], Field(max_length=MODELS_MAX)
    ] = Field(default=[], description="Deployments in LiteLLM's format. Empty = the defaults.")
    fallbacks: list[str | dict[str, list[str]]] | None = Field(
        default=None,
        description="Groups to try instead: names for every group, or {group: [names]}.",
    )
    context_window_fallbacks: list[dict[str, list[str]]] | None = Field(
        default=None,
        description="Groups to try where a prompt is too long: {group: [names]}, as LiteLLM's.",
    )
    content_policy_fallbacks: list[dict[str, list[str]]] | None = Field(
        default=None,
        description="Groups to try where the provider's filter refuses: {group: [names]}.",
    )
    timeout: Annotated[float, Field(ge=1, le=300)] = Field(
        default=60.0, description="Seconds a request may take, retries included."
    )
    stall_timeout: Annotated[float, Field(gt=0, le=300)] = Field(
        default=30.0, description="Seconds that a stream may pause after its first chunk."
    )
    max_retries: Annotated[int, Field(ge=0, le=10)] = 3
    retry_delay: Annotated[float, Field(ge=0.1, le=60)] = Field(
        default=1.0,
        description="Seconds before the first retry of a deployment; doubled each time.",
    )
    enable_circuit_breaker: bool = True
    enable_rate_limiting: bool = True
    enable_request_deduplication: bool = True
    deduplicate: Literal["repeatable", "all"] = Field(
        default="repeatable",
        description="Which equal requests under way share one call: those that ask for no variety "
        "(no temperature above 0, n of 1), or all.",
    )
    enable_request_batching: bool = Field(
        default=False,
        description="Send embedding texts of different callers together. On under `forebay up`.",
    )
    enable_health_monitoring: bool = True
    enable_llmops: bool = True
    enable_validation: bool = True
    enable_feedback_loop: bool = True
    enable_caching: bool = False
    cache_ttl: Lifetime = Field(default=3600, description="Seconds.")
    enable_kv_cache: bool = True
    kv_cache_ttl: Lifetime = Field(default=3600, description="Seconds.")
    rate_limit_config: RateLimitConfig | None = None
    circuit_breaker_config: CircuitBreakerConfig | None = None
    validation_level: ValidationLevel = ValidationLevel.MODERATE
    validation: ValidationConfig = ValidationConfig()
    cache: SkipJsonSchema[Any] = Field(default=None, exclude=True)
    cache_config: CacheConfig | None = None
    batch_size: Annotated[int, Field(ge=1, le=BATCH_TEXTS_MAX)] | None = Field(
        default=None,
        description="Most texts in one provider call; absent = the provider's own cap.",
    )
    batch_timeout: Annotated[float, Field(ge=0, le=60)] | None = Field(
        default=None, description="Longest time a text waits for company, in seconds."
    )
    default_model: ModelName | None = Field(
        default=None, description="Group for requests that name none; absent = the first for chat."
    )
    default_embedding_model: ModelName | None = Field(
        default=None, description="The same for embeddings; absent = the first for embeddings."
    )
    api_keys: dict[str, Any] = Field(
        default={},
        description="Provider → key, for its deployments that have no api_key of their own.",
    )
    tenants: Annotated[list[TenantConfig], Field(max_length=TENANTS_MAX)] = []
    ledger_url: LedgerUrl | None = Field(
        default=None,
        repr=False,
        description="sqlite:///PATH, postgresql://USER:PASSWORD@HOST/DATABASE, or os.environ/NAME "
        "of the latter; absent = ledger.db in the data directory.",
    )
    ledger: LedgerConfig = LedgerConfig()
    redis_url: RedisUrl | None = Field(
        default=None,
        repr=False,
        description="Redis or Dragonfly behind the cache, as cache_config.redis_url.",
    )
    retry_budget: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Retries of a deployment as a share of its requests, beside 3 per second; "
        "absent = 0.1, and 0 leaves the 3 per second.",
    )
    hedge_embeddings: bool = Field(
        default=False,
        description="Send an embedding call a second time when it takes longer than 95 in 100 do, "
        "for at most 5 % of them. Both are paid for.",
    )
    routing: Literal["weighted", "least_busy", "latency", "cost", "prefix", "feedback"] = Field(
        default="weighted",
        description="How a group's deployments of one order are ranked: by weight; fewest calls "
        "in flight; soonest first token or answer; cheapest; where the prompt's beginning was "
        "sent before; best rated by those who were answered. What is alike goes by weight.",
    )

    @classmethod
    def for_providers(
        cls,
        providers: Sequence[str] | None,
        *,
        api_keys: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> GatewayConfig:
        """A configuration with the usual models of these providers; None = as `GatewayConfig`.

        Their keys come from `api_keys`, else from the environment.

        Raises:
            ConfigurationError: a provider is unknown or has no key, or as `GatewayConfig`.
        """
        keys = dict(api_keys or {})
        if providers is None or fields.get("model_list"):
            return cls(api_keys=keys, **fields)
        names = [providers] if isinstance(providers, str) else providers
        entries = models_of(names, keys, os.environ if environ is None else environ)
        return cls(model_list=entries, api_keys=keys, **fields)

    @property
    def cache_ttl_s(self) -> int:
        """Seconds a cached answer lives: `cache_ttl`, unless only `default_ttl` of `cache_config`
        was set to something else than it is by default."""
        if self.cache_config is None or self.cache_ttl != GatewayConfig().cache_ttl:
            return self.cache_ttl
        own_s = self.cache_config.default_ttl
        return self.cache_ttl if own_s == CacheConfig().default_ttl else own_s

    @property
    def cache_url(self) -> str | SecretStr | None:
        """Where the cache's second tier is; None = there is no other than memory."""
        if not self.enable_caching:
            return None
        own = self.cache_config
        return self.redis_url if own is None or own.url is None else own.url

    @model_validator(mode="before")
    @classmethod
    def _redis_behind_the_cache(cls, data: Any) -> Any:
        """`redis_url` names the backend of a `cache_config` that says nothing of it."""
        if not isinstance(data, Mapping) or data.get("redis_url") is None:
            return data
        own = data.get("cache_config")
        if isinstance(own, CacheConfig) and "backend" not in own.model_fields_set:
            return {**data, "cache_config": own.replace(backend="redis")}
        if isinstance(own, Mapping) and not own.keys() & {"backend", "redis_url", "dragonfly_url"}:
            return {**data, "cache_config": {**own, "backend": "redis"}}
        return data

    @model_validator(mode="after")
    def _one_second_tier(self) -> Self:
        own = self.cache_config
        if own is None:
            return self
        if self.redis_url is None and own.backend != "memory" and own.url is None:
            remedy = f"needs a URL; set redis_url, such as {own.backend}://127.0.0.1:6379"
            refuse([Fault(("cache_config", "backend"), remedy)])
        if self.redis_url is not None and own.backend == "memory":
            refuse([Fault(("redis_url",), "has no effect with cache_config.backend 'memory'")])
        if self.redis_url is not None and own.url is not None:
            refuse([Fault(("redis_url",), "stands here and in cache_config; keep one")])
        return self

    @field_validator("model_list", mode="after")
    @classmethod
    def _hide_secrets(cls, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        refuse(
            fault.under(index)
            for index, entry in enumerate(entries)
            for fault in entry_faults(entry)
        )
        return [hidden(entry) for entry in entries]

    @field_validator("api_keys", mode="after")
    @classmethod
    def _hide_keys(cls, keys: dict[str, Any]) -> dict[str, Any]:
        refuse(
            Fault((name,), "must be the key as text, or os.environ/NAME")
            for name, key in keys.items()
            if not is_text(key) or is_malformed_reference(key)
        )
        return {name: secrets.hide(key, lambda *_: True) for name, key in keys.items()}

    @field_validator("fallbacks", mode="before")
    @classmethod
    def _fallback_forms(cls, value: Any) -> Any:
        """Two forms, not mixed: names, or LiteLLM's mappings of a group to names."""
        if value is not None and not (_are_names(value) or _are_mappings_to_names(value)):
            raise ValueError("must be a list of names, or a list of {group: [names]}")
        return value

    @field_validator("context_window_fallbacks", "content_policy_fallbacks", mode="before")
    @classmethod
    def _fallbacks_of_groups(cls, value: Any) -> Any:
        if value is not None and not _are_mappings_to_names(value):
            raise ValueError("must be a list of {group: [names]}; '*' is every other group")
        return value

    @field_validator("cache", mode="after")
    @classmethod
    def _is_a_cache(cls, cache: Any) -> Any:
        if cache is not None and not all(callable(getattr(cache, n, None)) for n in ("get", "set")):
            raise ValueError("must be an object with async get and set, or None")
        return cache

    @field_validator("tenants", mode="after")
    @classmethod
    def _tenants_differ(cls, tenants: list[TenantConfig]) -> list[TenantConfig]:
        refuse(_tenant_faults(tenants))
        return tenants

    @model_validator(mode="after")
    def _validation_is_on(self) -> Self:
        if not self.enable_validation and self.validation != ValidationConfig():
            refuse([Fault(("validation",), "has no effect with enable_validation: false")])
        if self.validation.repair and self.validation_level is ValidationLevel.LENIENT:
            refuse([Fault(("validation", "repair"), "has no effect with validation_level lenient")])
        return self

    @model_validator(mode="after")
    def _feedback_is_kept(self) -> Self:
        kept = self.enable_feedback_loop and self.enable_llmops
        if self.routing == "feedback" and not kept:
            remedy = "needs enable_feedback_loop and enable_llmops, which keep the ratings"
            refuse([Fault(("routing",), f"'feedback' {remedy}")])
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        """With an empty `model_list` the names are checked once the defaults are filled in."""
        if self.model_list:
            table = ModelTable(self)
            refuse([*table.faults(), *_provider_faults(self.api_keys, table)])
        return self


class Replicas(Settings):
    """How many replicas answer HTTP; between the two, load decides."""

    min: Count = 1
    max: Count = 1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max < self.min:
            refuse([Fault(("max",), f"must be at least min, which is {self.min}")])
        return self


def _both_ends(value: Any) -> Any:
    """`replicas: 2` means from 2 to 2."""
    if value == "auto" or not isinstance(value, int | str):
        return value
    if isinstance(value, str) and not value.isdigit():
        refuse([Fault((), "must be a number, {min, max}, or auto")])
    return {"min": value, "max": value}


def _branch(value: Any) -> str:
    """Which of the two forms of `replicas` is meant; `faults` leaves names with a bracket out."""
    return "[auto]" if value == "auto" else "[range]"


class ServerConfig(Settings):
    """Where `forebay up` listens."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas: Annotated[
        Annotated[Replicas, Tag("[range]")] | Annotated[Literal["auto"], Tag("[auto]")],
        Discriminator(_branch),
        BeforeValidator(_both_ends),
    ] = Field(
        default=Replicas(),
        description="Processes that answer HTTP: a number, {min, max}, or auto for as many as the "
        "cores of the Ray cluster carry.",
    )
    lane: Literal["auto", "litellm", "relay"] = Field(
        default="auto",
        description="The way to providers. auto relays what LiteLLM would send unchanged, for "
        "providers where both ways are known to be the same; relay does for any that speaks "
        "OpenAI's format.",
    )
    limiter_shards: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="Processes that share the limiting of tenants; may change while it runs.",
    )
    cache_shards: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="Processes that share the cache's keys and bytes; read when it starts.",
    )
    batcher_shards: Annotated[int, Field(ge=1, le=16)] = Field(
        default=1,
        description="Processes that send embedding texts; a lane spreads over more than one only "
        "while one is busy. Read when it starts.",
    )


def _otlp_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be the http:// or https:// address of an OTLP/HTTP receiver")
    if parts.username or parts.password or parts.query:
        raise ValueError("must have no credentials in it; OTEL_EXPORTER_OTLP_HEADERS takes them")
    return url


class TelemetryConfig(Settings):
    """What is told to whom, beside /metrics."""

    otlp_endpoint: Annotated[str, AfterValidator(_otlp_url)] | None = Field(
        default=None,
        description="Where OpenTelemetry's GenAI spans and metrics go by OTLP/HTTP, such as "
        "http://127.0.0.1:4318; OTEL_EXPORTER_OTLP_ENDPOINT where absent. OpenTelemetry's own "
        "variables hold for the rest.",
    )
    request_log: Literal["none", "failed", "all"] = Field(
        default="failed", description="Which requests have a line in the log; failed: 5xx."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="Least level of a replica's log. Failed requests are errors, others are info.",
    )


class SystemConfig(Settings):
    """A whole system: what a configuration file says.

    A field of `gateway` may also stand at the top level, as `model_list` usually does.
    """

    gateway: GatewayConfig = GatewayConfig()
    server: ServerConfig = ServerConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    data_dir: Annotated[Path, AfterValidator(_absolute)] = Field(
        default_factory=lambda: data_dir(os.environ),
        description="Holds ledger, registry, key secret and vault.",
    )

    @model_validator(mode="before")
    @classmethod
    def _gateway_at_top(cls, data: Any) -> Any:
        moved, faults = _gathered(data)
        refuse(faults)
        return moved

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> SystemConfig:
        """The configuration that `document` was made from, with references for its secrets.

        Raises:
            ConfigurationError: it is not such a document.
        """
        return cls(**document)

    def document(self, vault: Vault | None = None) -> dict[str, Any]:
        """This configuration as JSON-able values without a secret: literal ones go to the vault.

        Equal configurations have equal documents, as long as they share the vault.

        Raises:
            ConfigurationError: there is a literal secret and no vault.
        """
        plain: dict[str, Any] = _plain(secrets.refer(self.model_dump(), vault))
        return plain

    @classmethod
    def _schema(cls) -> dict[str, Any]:
        return config_schema()

    @property
    def ledger_url(self) -> str | SecretStr | None:
        """Where the ledger is; None = `ledger.db` in the data directory."""
        return self.gateway.ledger_url


# ------------------------------------------------------------------------- parts of the checking


def _tenant_faults(tenants: Sequence[TenantConfig]) -> Iterator[Fault]:
    """Two tenants of one id, two keys of one id in a tenant, one key for two."""
    ids: set[str] = set()
    hashes: set[str] = set()
    for index, tenant in enumerate(tenants):
        if tenant.id in ids:
            yield Fault((index, "id"), f"two tenants have the id {tenant.id!r}")
        ids.add(tenant.id)
        key_ids: set[str] = set()
        for place, key in enumerate(tenant.keys):
            if key.id in key_ids:
                yield Fault((index, "keys", place, "id"), f"two keys have the id {key.id!r}")
            if key.hash in hashes:
                yield Fault((index, "keys", place, "hash"), "this key is given twice")
            key_ids.add(key.id)
            hashes.add(key.hash)


def _provider_faults(keys: Mapping[str, Any], table: ModelTable) -> Iterator[Fault]:
    """Keys for providers that no deployment has and that nobody has heard of."""
    used = {routing.family(deployment.provider) for deployment in table.deployments()}
    for name in keys:
        if routing.family(name) not in used | USUAL.keys() and "*" not in used:
            close = nearest(name, used | USUAL.keys())
            hint = f"did you mean {close!r}?" if close else "no deployment has this provider"
            yield Fault(("api_keys", name), f"unknown provider; {hint}")


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _are_mappings_to_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(item, dict)
        and all(isinstance(group, str) and _are_names(names) for group, names in item.items())
        for item in value
    )


def _gathered(data: Any) -> tuple[Any, list[Fault]]:
    """A configuration with the gateway's fields under `gateway`, wherever they stood."""
    if not isinstance(data, Mapping):
        return data, []
    gateway = data.get("gateway")
    moved = {name: data[name] for name in data if name in GatewayConfig.model_fields}
    rest = {name: value for name, value in data.items() if name not in moved}
    if isinstance(gateway, GatewayConfig):
        return {**rest, "gateway": gateway.replace(**moved) if moved else gateway}, []
    if not isinstance(gateway, Mapping | None):
        return dict(data), []
    under = dict(gateway or {})
    twice = [Fault((n,), "stands here and under gateway; keep one") for n in moved if n in under]
    return {**rest, "gateway": {**under, **moved}}, twice


def _plain(value: Any) -> Any:
    """A copy of JSON-able values only."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# ------------------------------------------------------------------------ what is said about it


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    schema = SystemConfig.model_json_schema()
    gateway = schema["$defs"]["GatewayConfig"]["properties"]
    schema["properties"] = {**gateway, **schema["properties"]}
    schema["title"] = "forebay.yaml"
    return schema


def shown(config: SystemConfig | GatewayConfig) -> dict[str, Any]:
    """A configuration in the form of a file, JSON-able, with `***` for every secret."""
    plain: dict[str, Any] = _plain(secrets.mask(config.model_dump()))
    if "gateway" not in plain:
        return plain
    gateway = plain.pop("gateway")
    plain.pop("data_dir")  # the environment's
    top = ("model_list", "fallbacks", "tenants", "ledger_url")
    return {**{name: gateway.pop(name) for name in top}, "gateway": gateway, **plain}


def show(config: SystemConfig | GatewayConfig) -> str:
    """`shown`, as YAML."""
    text: str = yaml.safe_dump(shown(config), sort_keys=False, allow_unicode=True, width=100)
    return text


# ------------------------------------------------------------------------------ where it is read


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: in which file (or `environment`), on which line (0 = none), and what."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        field = f"{self.field}: " if self.field else ""
        return f"{self.file}{line}: {field}{self.message}"


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> SystemConfig:
    """The configuration of `forebay up`: the file, then the environment, then the defaults.

    Without `path` the file is the one that FOREBAY_CONFIG names, if any. `FOREBAY_<FIELD>` sets a
    field of the top level or of `gateway`, `FOREBAY_SERVER_<FIELD>` one of `server`; its value is
    YAML, and an empty one counts as not set. Without models the default ones are filled in, as by
    `with_default_models`.

    Raises:
        ConfigurationError: naming file, line and field, or the variable, one problem a line.
    """
    config, problems = _load(path, os.environ if environ is None else environ)
    if config is None:
        raise ConfigurationError("\n".join(map(str, problems)), param=problems[0].field or None)
    return config


def parse(document: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> SystemConfig:
    """A configuration given as a file's content, by somebody who is not at this machine.

    Raises:
        ConfigurationError: naming the fields, one problem a line.
    """
    data, faults = _gathered(document)
    if not isinstance(data, dict) or not isinstance(data.get("gateway"), Mapping):
        raise ConfigurationError("a configuration is a mapping, and so is its gateway")
    data.pop("data_dir", None)  # this machine's own
    _fill_in(data, os.environ if environ is None else environ)
    try:
        config = _SYSTEM.validate_python(data)
    except ValidationError as error:
        faults += translated(error, config_schema())
    if faults:
        raise refusal(faults)
    return config


def check(path: Path, environ: Mapping[str, str] | None = None) -> list[Problem]:
    """Everything that `load` would complain of, in the order of the file's lines."""
    _, problems = _load(path, os.environ if environ is None else environ)
    return sorted(problems, key=lambda problem: problem.line)


def around(config: GatewayConfig, environ: Mapping[str, str]) -> SystemConfig:
    """The system of a Python user's configuration, default models filled in.

    Raises:
        ConfigurationError: a name in it exists in no group.
    """
    return SystemConfig(
        gateway=with_default_models(config, environ),
        telemetry=TelemetryConfig(otlp_endpoint=environ.get(OTLP_VARIABLE) or None),
        data_dir=data_dir(environ),
    )


def with_default_models(config: GatewayConfig, environ: Mapping[str, str]) -> GatewayConfig:
    """A configuration that has models: its own, or else the default ones.

    The default ones are the usual models of every provider whose key is in `api_keys` or in the
    environment, and after them the embedded models.

    Raises:
        ConfigurationError: a name in it exists in no group.
    """
    if config.model_list:
        return config
    return config.replace(model_list=default_models(config.api_keys, environ))


def data_dir(environ: Mapping[str, str]) -> Path:
    """FOREBAY_DATA_DIR, or `~/.local/share/forebay`. Nothing is created."""
    return _absolute(Path(environ.get("FOREBAY_DATA_DIR") or "~/.local/share/forebay"))


def sqlite_path(url: str | SecretStr | None) -> Path | None:
    """The file of a `sqlite:///PATH` URL; `~` is the home directory, `sqlite:////` absolute.

    None if it is something else.
    """
    if not isinstance(url, str) or not url.startswith("sqlite:///"):
        return None
    return _absolute(Path(url.removeprefix("sqlite:///")))


def revealed(text: str | SecretStr, vault: Vault) -> str:
    """What a setting says, or what it refers to in this process's environment or in the vault.

    Raises:
        ConfigurationError: it refers to nothing; the message names the reference.
    """
    found: str = secrets.resolve(text, os.environ, vault)
    return found


class _Source:
    """Where values came from: lines of a file, or variables by the place that they set."""

    def __init__(self, file: str = "configuration", lines: Lines | None = None) -> None:
        self._file = file
        self._lines = lines
        self.variables: dict[tuple[str | int, ...], str] = {}

    def problem(self, fault: Fault) -> Problem:
        path = fault.path
        for length in range(len(path), 0, -1):
            variable = self.variables.get(path[:length])
            if variable is not None:
                place = dotted((variable, *path[length:]))
                return Problem("environment", 0, place, fault.message)
        if self._lines is None:
            return Problem(self._file, 0, dotted(path), fault.message)
        if path[:1] == ("gateway",) and self._lines.has(path[1:2]) and path[1:]:
            path = path[1:]  # it stands at the top level
        return Problem(self._file, self._lines.line(path), dotted(path), fault.message)


def _load(
    path: Path | None, environ: Mapping[str, str]
) -> tuple[SystemConfig | None, list[Problem]]:
    """The configuration, or None and what is wrong."""
    if path is None and environ.get("FOREBAY_CONFIG"):
        path = Path(environ["FOREBAY_CONFIG"]).expanduser()
    source, data = _Source(), {}
    if path is not None:
        lines, problems = _lines(path)
        if lines is None:
            return None, problems
        source, data = _Source(str(path), lines), lines.values
    stated = isinstance(data, dict) and "data_dir" in data
    data, faults = _gathered(data)
    if stated:
        faults.append(Fault(("data_dir",), "is set by FOREBAY_DATA_DIR, which all commands read"))
    faults += _overlay(data, environ, source)
    _fill_in(data, environ)
    try:
        config = _SYSTEM.validate_python(data)
    except ValidationError as error:
        faults += translated(error, config_schema())
    if faults:
        return None, [source.problem(fault) for fault in faults]
    return config, []


def _lines(path: Path) -> tuple[Lines | None, list[Problem]]:
    """A file's YAML, or None and why it cannot be had."""
    file = str(path)
    try:
        return Lines.of(path.read_text("utf-8")), []
    except OSError as error:
        return None, [Problem(file, 0, "", f"cannot be read: {error.strerror}")]
    except UnicodeDecodeError:
        return None, [Problem(file, 0, "", "is not text in UTF-8")]
    except Unreadable as error:
        return None, [Problem(file, *trouble) for trouble in error.troubles]


def _fill_in(data: dict[str, Any], environ: Mapping[str, str]) -> None:
    """What `forebay up` takes where nothing is said."""
    data.setdefault("data_dir", data_dir(environ))
    telemetry = data.setdefault("telemetry", {})
    if environ.get(OTLP_VARIABLE) and isinstance(telemetry, dict):
        telemetry.setdefault("otlp_endpoint", environ[OTLP_VARIABLE])
    gateway = data["gateway"]
    if not isinstance(gateway, dict):
        return  # a fault, and pydantic finds it
    gateway.setdefault("enable_request_batching", True)
    if gateway.get("model_list") in (None, []):
        keys = gateway.get("api_keys")
        gateway["model_list"] = default_models(keys if isinstance(keys, dict) else {}, environ)


def _overlay(data: dict[str, Any], environ: Mapping[str, str], source: _Source) -> list[Fault]:
    """Put `FOREBAY_…` variables over the file's values."""
    places: dict[str, tuple[str | int, ...]] = {f"{PREFIX}DATA_DIR": ("data_dir",)}
    parts: dict[str, type[Settings]] = {
        "gateway": GatewayConfig,
        "server": ServerConfig,
        "telemetry": TelemetryConfig,
    }
    for part, settings in parts.items():
        prefix = PREFIX if part == "gateway" else f"{PREFIX}{part.upper()}_"
        places |= {f"{prefix}{n.upper()}": (part, n) for n in settings.model_fields if n != "cache"}
    faults = []
    for variable, text in environ.items():
        # Kubernetes gives every pod FOREBAY_PORT=tcp://… and the like for a service `forebay`.
        if not variable.startswith(PREFIX) or not text or text.startswith(("tcp://", "udp://")):
            continue
        place = places.get(variable)
        if place is None:
            faults += _stray(variable, places, source)
            continue
        source.variables[place] = variable
        try:
            _put(data, place, text if place == ("data_dir",) else yaml_lines.value(text))
        except yaml.YAMLError:
            faults.append(Fault(place, "is not valid YAML"))
    return faults


def _put(data: dict[str, Any], place: Sequence[str | int], value: Any) -> None:
    part: Any = data
    for step in place[:-1]:
        part[step] = {} if part.get(step) is None else part[step]
        part = part[step]
    if isinstance(part, dict):  # if not, that is a fault of the file's, and pydantic finds it
        part[place[-1]] = value


def _stray(variable: str, places: Iterable[str], source: _Source) -> list[Fault]:
    """A variable that is probably misspelt. Others may use our prefix for ends of their own."""
    if variable in OTHER_VARIABLES or re.search(r"_SERVICE_(HOST|PORT)", variable):
        return []
    close = nearest(variable, places, 0.85)
    if close is None:
        return []
    source.variables[(variable,)] = variable
    return [Fault((variable,), f"unknown setting; did you mean {close!r}?")]


_SYSTEM: TypeAdapter[SystemConfig] = TypeAdapter(SystemConfig)
