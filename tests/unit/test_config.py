"""What can be set, what is refused and how that is said, and where it is read from."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rate_limiter.terms import Limits
from forebay.config import (
    CacheConfig,
    CircuitBreakerConfig,
    GatewayConfig,
    Problem,
    RateLimitConfig,
    Replicas,
    ServerConfig,
    SystemConfig,
    TenantConfig,
    around,
    check,
    config_schema,
    hash_key,
    load,
    parse,
    show,
    shown,
    sqlite_path,
    with_default_models,
)
from forebay.errors import ConfigurationError
from forebay.not_built import NOT_BUILT
from forebay.routing import ModelTable
from forebay.secrets import Vault

CANARY = "sk-canary-0123456789"
HASH = hash_key("key", b"secret")


def entry(name: str, model: str = "openai/gpt-4o", **params: Any) -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": model, **params}}


def refused(make: Callable[[], Any]) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert CANARY not in str(caught.value)
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "forebay.yaml"
        path.write_text(text, "utf-8")
        return path

    return write


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"FOREBAY_DATA_DIR": str(tmp_path / "data")}


class TestFields:
    def test_the_defaults_are_the_documented_ones(self) -> None:
        config = GatewayConfig()
        assert config.model_list == []
        assert config.tenants == []
        assert (config.timeout, config.max_retries, config.retry_delay) == (60.0, 3, 1.0)
        assert config.validation_level == "moderate"
        assert {n for n in GatewayConfig.model_fields if getattr(config, n) is True} == {
            "enable_circuit_breaker",
            "enable_rate_limiting",
            "enable_request_deduplication",
            "enable_health_monitoring",
            "enable_llmops",
            "enable_validation",
            "enable_feedback_loop",
            "enable_kv_cache",
        }
        limits = RateLimitConfig()
        assert (limits.requests_per_minute, limits.requests_per_hour) == (60, 1000)
        assert (limits.burst_size, limits.max_queue_size) == (10, 100)
        breaker = CircuitBreakerConfig()
        assert (breaker.failure_threshold, breaker.timeout, breaker.window_s) == (5, 60.0, 10)
        assert CacheConfig().max_bytes == 256 * 1024 * 1024

    @pytest.mark.parametrize(
        ("field", "least", "most"),
        [("timeout", 1, 300), ("max_retries", 0, 10), ("retry_delay", 0.1, 60)],
    )
    def test_ranges_include_their_ends_and_nothing_beyond(
        self, field: str, least: float, most: float
    ) -> None:
        for value in (least, most):
            assert getattr(GatewayConfig(**{field: value}), field) == value
        for value in (least - 1, most + 1):
            error = refused(lambda value=value: GatewayConfig(**{field: value}))
            assert str(error) == f"{field}: must be from {least:g} to {most:g}, not {value!r}"
            assert error.param == field

    @pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "soon", None, []])
    def test_a_number_must_be_one(self, value: Any) -> None:
        assert refused(lambda: GatewayConfig(timeout=value)).param == "timeout"

    def test_an_unknown_name_is_answered_with_the_nearest(self) -> None:
        error = refused(lambda: GatewayConfig(enable_cachng=True))
        assert str(error) == "enable_cachng: unknown setting; did you mean 'enable_caching'?"

    def test_an_unknown_name_like_no_other_is_answered_with_all(self) -> None:
        assert "requests_per_minute, requests_per_hour" in str(
            refused(lambda: RateLimitConfig(q=1))
        )

    def test_an_unknown_choice_is_answered_with_the_nearest(self) -> None:
        error = refused(lambda: GatewayConfig(validation_level="modrate"))
        assert "strict, moderate, lenient; did you mean 'moderate'?" in str(error)

    def test_every_fault_is_told_at_once_with_its_place(self) -> None:
        error = refused(
            lambda: GatewayConfig(
                timeout=0,
                rate_limit_config={"burst_sise": 1},
                model_list=[{"model_name": "a", "litellm_params": {}, "rmp": 1}],
            )
        )
        assert [line.partition(": ")[0] for line in str(error).splitlines()] == [
            "model_list[0].litellm_params.model",
            "model_list[0].rmp",
            "timeout",
            "rate_limit_config.burst_sise",
        ]

    def test_a_wrong_value_is_never_shown_when_it_is_text(self) -> None:
        refused(lambda: GatewayConfig(model_list=CANARY))
        refused(lambda: GatewayConfig(ledger_url=f"mysql://user:{CANARY}@host/db"))
        refused(lambda: TenantConfig(id="acme", keys=[{"id": "ci", "hash": CANARY}]))
        refused(lambda: GatewayConfig(api_keys={"openai": [CANARY]}))
        refused(lambda: GatewayConfig(model_list=[entry("a", api_key=CANARY, weight=-1)]))
        refused(lambda: GatewayConfig(timeout=CANARY))

    def test_errors_of_a_configuration_survive_pickling(self) -> None:
        error = refused(lambda: GatewayConfig(timeout=0))
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.param) == (str(error), error.param)

    def test_it_does_not_change_but_can_be_replaced(self) -> None:
        config = GatewayConfig(timeout=5, model_list=[entry("a", api_key=CANARY)])
        assert "config.replace(timeout=…)" in str(refused(lambda: setattr(config, "timeout", 9)))
        other = config.replace(timeout=9)
        assert (config.timeout, other.timeout, other.model_list) == (5, 9, config.model_list)
        refused(lambda: config.replace(timeout=999))

    def test_replicas_are_a_number_or_a_range(self, file: Any) -> None:
        assert ServerConfig(replicas=3).replicas == Replicas(min=3, max=3)
        assert ServerConfig(replicas=Replicas(min=1, max=8)).replicas.max == 8
        assert "at least min" in str(refused(lambda: ServerConfig(replicas={"min": 3, "max": 1})))
        assert "replicas.min: must be at least 1, not 0" in str(
            refused(lambda: load(file("server: {replicas: 0}"), {}))
        )

    def test_replicas_may_be_left_to_the_machine(self, file: Any) -> None:
        assert ServerConfig(replicas="auto").replicas == "auto"
        assert load(None, {"FOREBAY_SERVER_REPLICAS": "auto"}).server.replicas == "auto"
        with pytest.raises(ConfigurationError, match=r"replicas: must be a number, .* or auto"):
            load(file("server: {replicas: many}"), {})

    def test_the_cache_ttl_that_was_set_counts(self) -> None:
        assert GatewayConfig(cache_config=CacheConfig()).cache_ttl_s == 3600
        assert GatewayConfig(cache_config=CacheConfig(default_ttl=60)).cache_ttl_s == 60
        both = GatewayConfig(cache_ttl=7200, cache_config=CacheConfig(default_ttl=60))
        assert both.cache_ttl_s == 7200

    def test_a_literal_key_hash_must_be_a_hash(self) -> None:
        tenant = TenantConfig(id="acme", keys=[{"id": "ci", "hash": HASH}])
        assert tenant.keys[0].hash == HASH
        error = refused(lambda: TenantConfig(id="acme", keys=[{"id": "ci", "hash": CANARY}]))
        assert "never the key itself" in str(error)

    def test_tenants_and_keys_are_each_given_once(self) -> None:
        def tenants(*keys: dict[str, str]) -> Any:
            return lambda: GatewayConfig(tenants=[{"id": "a", "keys": list(keys)}])

        other = hash_key("other", b"secret")
        tenants({"id": "x", "hash": HASH}, {"id": "y", "hash": other})()
        same_id = refused(tenants({"id": "x", "hash": HASH}, {"id": "x", "hash": other}))
        assert same_id.param == "tenants[0].keys[1].id"
        same_key = refused(tenants({"id": "x", "hash": HASH}, {"id": "y", "hash": HASH}))
        assert same_key.param == "tenants[0].keys[1].hash"
        twice = refused(lambda: GatewayConfig(tenants=[{"id": "a"}, {"id": "a"}]))
        assert twice.param == "tenants[1].id"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("openai/*"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model_name", "litellm_params", "model", "id"]), inner)
    ),
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*GatewayConfig.model_fields, "x"]), ANYTHING, max_size=3))
def test_whatever_is_given_only_a_configuration_error_comes_of_it(fields: Any) -> None:
    try:
        config = GatewayConfig(**fields)
    except ConfigurationError:
        return
    assert config.replace() == config


class TestValidation:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"validation": {"off": ["jsn"]}}, "validation.off[0]"),
            ({"validation": {"off": ["blocked"]}}, "validation.off[0]"),
            (
                {"validation": {"blocked_patterns": {"a": "(?=x)"}}},
                "validation.blocked_patterns.a",
            ),
            ({"validation": {"repair": True}, "enable_validation": False}, "validation"),
            (
                {"validation": {"repair": True}, "validation_level": "lenient"},
                "validation.repair",
            ),
            (
                {"validation": {"moderation_model": "zz"}, "model_list": [entry("a")]},
                "validation.moderation_model",
            ),
            ({"routing": "feedback", "enable_llmops": False}, "routing"),
            ({"routing": "feedback", "enable_feedback_loop": False}, "routing"),
        ],
    )
    def test_what_would_have_no_effect_or_cannot_be_is_refused(
        self, fields: dict[str, Any], param: str
    ) -> None:
        assert refused(lambda: GatewayConfig(**fields)).param == param


class TestWhatIsNotBuilt:
    def test_limits_of_a_model_that_nothing_holds_are_refused(self) -> None:
        error = refused(lambda: GatewayConfig(model_list=[entry("a", max_budget=3)]))
        assert error.param == "model_list[0].litellm_params.max_budget"

    def test_a_lane_is_one_of_three_and_no_secret(self) -> None:
        config = GatewayConfig(model_list=[entry("a", lane="relay")])
        assert config.model_list[0]["litellm_params"]["lane"] == "relay"
        error = refused(lambda: GatewayConfig(model_list=[entry("a", lane="fast")]))
        assert error.param == "model_list[0].litellm_params.lane"
        assert ServerConfig(lane="relay").lane == "relay"

    def test_every_line_of_the_table_names_a_field_that_exists(self) -> None:
        definitions = config_schema()["$defs"]
        for rule in NOT_BUILT:
            if rule.owner == "litellm_params":
                continue
            if (rule.owner, rule.field) != ("GatewayConfig", "cache"):  # an object, not in files
                default = definitions[rule.owner]["properties"][rule.field]["default"]
                assert rule.accepts(default), rule

    def test_a_cache_of_ones_own_is_refused_until_it_has_an_effect(self) -> None:
        class OwnCache:
            async def get(self, key: str) -> Any: ...
            async def set(self, key: str, value: Any) -> None: ...

        assert "no effect yet" in str(refused(lambda: GatewayConfig(cache=OwnCache())))
        assert "get and set" in str(refused(lambda: GatewayConfig(cache=object())))

    def test_what_is_built_is_accepted(self) -> None:
        limits = RateLimitConfig(
            requests_per_minute=5, requests_per_hour=50, concurrent_requests=2,
            max_queue_size=0, queue_timeout=0, enable_queuing=False, count_cache_hits=False,
            tokens_per_minute=6000, usd_per_day=1, usd_per_month=10,
        )  # fmt: skip
        breaker = CircuitBreakerConfig(
            failure_rate=0.2, window_s=30, min_calls=5,
            slow_call_s=2, slow_call_rate=0.8, active_probe_s=5,
        )  # fmt: skip
        GatewayConfig(
            rate_limit_config=limits,
            circuit_breaker_config=breaker,
            enable_kv_cache=True,
            kv_cache_ttl=60,
            cache_config=CacheConfig(max_bytes=2**20, scope="shared"),
            ledger_url="sqlite:///~/ledger.db",
            retry_budget=0.2,
            hedge_embeddings=True,
            stall_timeout=5,
        )
        for strategy in ("weighted", "least_busy", "latency", "cost", "prefix"):
            GatewayConfig(routing=strategy)


class TestWhereAnswersAreKept:
    @pytest.mark.parametrize(
        "url",
        [
            "redis://127.0.0.1:6379",
            "redis://h/3?db=3",
            "rediss://h:6380?ssl_ca_certs=/etc/ca.pem",
            "unix:///run/redis.sock?db=1",
            "dragonfly://localhost:6379",
            "os.environ/REDIS_URL",
        ],
    )
    def test_a_url_without_a_password_is_shown(self, url: str) -> None:
        config = GatewayConfig(enable_caching=True, redis_url=url)
        assert config.cache_url == url
        assert shown(config)["redis_url"] == url

    @pytest.mark.parametrize(
        "url", [f"redis://:{CANARY}@h:6379", f"rediss://me:{CANARY}@h", f"unix://:{CANARY}@/r.sock"]
    )
    def test_one_with_a_password_is_hidden_and_goes_to_the_vault(self, url: str) -> None:
        vault = Vault()
        for gateway in (
            GatewayConfig(enable_caching=True, redis_url=url),
            GatewayConfig(enable_caching=True, cache_config=CacheConfig(redis_url=url)),
        ):
            system = SystemConfig(gateway=gateway)
            document = json.dumps(system.document(vault))
            told = [repr(gateway), str(gateway), repr(gateway.model_dump()), document]
            assert CANARY not in "".join([*told, str(shown(gateway))])
            again = SystemConfig.from_document(json.loads(document)).gateway.cache_url
            assert vault.get(str(again)) == url

    @pytest.mark.parametrize(
        "url",
        [
            CANARY,
            "",
            7,
            f"memcached://{CANARY}@h",
            f"redis://h?password={CANARY}",
            f"redis://:{CANARY}#more@h",
            f"redis://:{CANARY}/more@h",
            f"redis://h:{CANARY}",
            "redis://",
            "unix://",
            "redis://[",
            "$REDIS_URL",
            "os.environ/",
        ],
    )
    def test_what_is_no_such_url_is_refused_without_being_told(self, url: Any) -> None:
        for field in ("redis_url", "dragonfly_url"):
            assert refused(lambda field=field: CacheConfig(**{field: url})).param == field
        assert refused(lambda: GatewayConfig(redis_url=url)).param == "redis_url"

    def test_a_url_says_which_backend_it_is_for(self) -> None:
        assert CacheConfig().backend == "memory"
        assert CacheConfig(redis_url="redis://h").backend == "redis"
        assert CacheConfig(dragonfly_url="dragonfly://h").backend == "dragonfly"
        assert CacheConfig(backend="dragonfly", redis_url="redis://h").url == "redis://h"
        named = GatewayConfig(redis_url="redis://h", cache_config=CacheConfig(max_bytes=2**20))
        assert named.cache_config is not None
        assert (named.cache_config.backend, named.cache_config.max_bytes) == ("redis", 2**20)
        assert GatewayConfig(**named.model_dump()) == named

    def test_without_caching_there_is_nothing_to_keep(self) -> None:
        assert GatewayConfig(redis_url="redis://h").cache_url is None
        own = CacheConfig(dragonfly_url="dragonfly://h")
        assert GatewayConfig(cache_config=own, enable_caching=True).cache_url == "dragonfly://h"

    def test_what_would_have_no_effect_is_refused(self) -> None:
        url = "redis://h"
        memory = CacheConfig(backend="memory")
        for make, field in (
            (lambda: CacheConfig(backend="memory", redis_url=url), "redis_url"),
            (lambda: CacheConfig(backend="redis", dragonfly_url=url), "dragonfly_url"),
            (lambda: CacheConfig(redis_url=url, dragonfly_url=url), "dragonfly_url"),
            (lambda: GatewayConfig(redis_url=url, cache_config=memory), "redis_url"),
            (lambda: GatewayConfig(redis_url=url, cache_config={"redis_url": url}), "redis_url"),
        ):
            assert refused(make).param == field
        missing = refused(lambda: GatewayConfig(cache_config=CacheConfig(backend="dragonfly")))
        assert missing.param == "cache_config.backend"
        assert "dragonfly://127.0.0.1:6379" in str(missing)


class TestWhenProvidersFail:
    def test_a_rate_of_slow_calls_needs_to_know_what_is_slow(self) -> None:
        error = refused(lambda: CircuitBreakerConfig(slow_call_rate=0.3))
        assert error.param == "slow_call_rate"
        assert "slow_call_s" in str(error)
        assert CircuitBreakerConfig(slow_call_rate=0.3, slow_call_s=2).slow_call_rate == 0.3

    def test_the_default_rate_contradicts_nothing_however_it_is_said(self) -> None:
        breaker = CircuitBreakerConfig(slow_call_rate=0.5)
        assert CircuitBreakerConfig(**breaker.model_dump()) == breaker

    @pytest.mark.parametrize(
        ("field", "least", "most"), [("retry_budget", 0, 1), ("stall_timeout", 0.01, 300)]
    )
    def test_shares_and_pauses_have_their_ranges(
        self, field: str, least: float, most: float
    ) -> None:
        for value in (least, most):
            assert getattr(GatewayConfig(**{field: value}), field) == value
        for value in (least - 1, most + 1):
            assert refused(lambda value=value: GatewayConfig(**{field: value})).param == field

    def test_probes_that_are_paid_for_are_not_asked_for_without_pause(self) -> None:
        assert CircuitBreakerConfig().active_probe_s is None
        error = refused(lambda: CircuitBreakerConfig(active_probe_s=0.001))
        assert str(error) == "active_probe_s: must be from 0.1 to 3600, not 0.001"

    @pytest.mark.parametrize("setting", ["context_window_fallbacks", "content_policy_fallbacks"])
    @pytest.mark.parametrize("given", ["a", ["a"], [1], [{"a": "a"}], {"a": ["a"]}])
    def test_special_fallbacks_have_one_form(self, setting: str, given: Any) -> None:
        error = refused(lambda: GatewayConfig(model_list=[entry("a")], **{setting: given}))
        assert error.param == setting
        assert "a list of {group: [names]}" in str(error)

    def test_they_are_found_on_their_line(self, file: Any) -> None:
        path = file(
            "model_list: [{model_name: a, litellm_params: {model: openai/x}}]\n"
            "gateway:\n"
            "  context_window_fallbacks:\n"
            "    - a: [b]\n"
        )
        (problem,) = check(path, {})
        assert (problem.line, problem.field) == (4, "gateway.context_window_fallbacks[0].a[0]")

    def test_they_come_back_from_a_document(self) -> None:
        lists = [{"a": ["b"]}]
        models = [entry("a"), entry("b", "openai/x")]
        config = SystemConfig(gateway=GatewayConfig(
            model_list=models, context_window_fallbacks=lists, content_policy_fallbacks=lists
        ))  # fmt: skip
        assert SystemConfig.from_document(config.document()) == config


class TestLimits:
    def test_they_are_what_the_limiter_is_told_in_whole_units(self) -> None:
        given = RateLimitConfig(
            requests_per_minute=600, requests_per_hour=None, burst_size=20,
            concurrent_requests=8, tokens_per_minute=90_000, usd_per_day=0.1, usd_per_month=2.5,
        )  # fmt: skip
        limits = given.limits(4)
        assert limits == Limits(
            requests_per_minute=600, burst=20, requests_per_hour=None, concurrent=8,
            tokens_per_minute=90_000, day_nano=100_000_000, month_nano=2_500_000_000,
        )  # fmt: skip
        assert limits.version == 4
        assert not RateLimitConfig().limits().meters

    @pytest.mark.parametrize("field", ["requests_per_minute", "tokens_per_minute", "burst_size"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
    def test_a_limit_is_a_whole_number_above_zero(self, field: str, value: Any) -> None:
        assert refused(lambda: RateLimitConfig(**{field: value})).param == field

    @pytest.mark.parametrize("field", ["usd_per_day", "usd_per_month"])
    @pytest.mark.parametrize("value", [0, -0.01, "much", float("inf"), float("nan"), True])
    def test_a_budget_is_an_amount_above_zero(self, field: str, value: Any) -> None:
        assert refused(lambda: RateLimitConfig(**{field: value})).param == field

    @pytest.mark.parametrize(
        ("low", "high"),
        [
            ("burst_size", "requests_per_hour"),
            ("requests_per_minute", "requests_per_hour"),
            ("usd_per_day", "usd_per_month"),
        ],
    )
    def test_what_could_never_be_reached_is_refused(self, low: str, high: str) -> None:
        error = refused(lambda: RateLimitConfig(**{low: 9, high: 8}))
        assert str(error) == f"{low}: is more than {high}, which is 8, and would have no effect"
        RateLimitConfig(**{low: 8, high: 8})
        RateLimitConfig(**{low: 9, high: None})

    def test_a_default_contradicts_nothing(self) -> None:
        RateLimitConfig(requests_per_minute=5000)
        RateLimitConfig(requests_per_hour=5)
        error = refused(lambda: RateLimitConfig(requests_per_hour=5).replace(burst_size=6))
        assert error.param == "burst_size"

    @pytest.mark.parametrize(
        "given", [{"requests_per_minute": 5000}, {"requests_per_hour": 5}, {"burst_size": 2000}]
    )
    def test_nor_does_it_in_another_process_or_in_a_file(self, file: Any, given: Any) -> None:
        config = around(GatewayConfig(rate_limit_config=RateLimitConfig(**given)), {})
        again = SystemConfig.from_document(config.document())
        assert again == config
        assert again.document() == config.document()
        assert pickle.loads(pickle.dumps(config)) == config
        assert load(file(show(config)), {}).gateway.rate_limit_config == RateLimitConfig(**given)

    @pytest.mark.parametrize("name", ["rpm", "tpm"])
    def test_a_deployment_that_may_never_be_called_is_refused(self, name: str) -> None:
        for wrong in (
            entry("a", **{name: 0}),
            {**entry("a"), name: 0},
            {**entry("a"), "model_info": {name: 0}},
        ):
            error = refused(lambda wrong=wrong: GatewayConfig(model_list=[wrong]))
            assert error.param == f"model_list[0].{name}"
            assert "0 would never let a call through" in str(error)
        GatewayConfig(model_list=[entry("a", **{name: 1})])
        GatewayConfig(model_list=[entry("a", **{name: None})])

    def test_owners_are_from_1_to_64(self) -> None:
        assert ServerConfig().limiter_shards == 1
        assert ServerConfig(limiter_shards=64).limiter_shards == 64
        for wrong in (0, 65, True, 1.5):
            error = refused(lambda wrong=wrong: ServerConfig(limiter_shards=wrong))
            assert error.param == "limiter_shards"


class TestParse:
    def test_it_is_read_like_a_file(self) -> None:
        document = {"model_list": [entry("a")], "server": {"limiter_shards": 2}, "timeout": 9}
        before = json.dumps(document)
        config = parse(document, {})
        assert (config.gateway.timeout, config.server.limiter_shards) == (9, 2)
        assert config.gateway.enable_request_batching
        assert json.dumps(document) == before

    def test_where_data_are_is_this_machines_own(self) -> None:
        assert parse({"data_dir": "/theirs"}, {"FOREBAY_DATA_DIR": "/ours"}).data_dir == Path(
            "/ours"
        )

    def test_without_models_there_are_the_default_ones(self) -> None:
        names = [e["model_name"] for e in parse({}, {}).gateway.model_list]
        assert names == ["local-chat", "local-embed"]

    def test_all_that_is_wrong_is_told_and_no_secret(self) -> None:
        error = refused(
            lambda: parse(
                {
                    "model_list": [entry("a", api_key=CANARY)],
                    "timeout": 0,
                    "gateway": {"timeout": 9, "max_retries": 99},
                    "server": {"limiter_shards": 0},
                },
                {},
            )
        )
        for place in ("timeout: stands here", "gateway.max_retries: ", "server.limiter_shards: "):
            assert place in str(error)

    @pytest.mark.parametrize("document", [None, [], "text", 3, {"gateway": 3}, {"gateway": []}])
    def test_what_is_no_mapping_is_no_configuration(self, document: Any) -> None:
        assert "mapping" in str(refused(lambda: parse(document, {})))


class TestModelList:
    def test_litellms_format_loads_verbatim(self) -> None:
        model_list = [
            {
                "model_name": "gpt-4o",
                "litellm_params": {
                    "model": "azure/gpt-4o-eu",
                    "api_base": "os.environ/AZURE_API_BASE",
                    "api_key": "os.environ/AZURE_API_KEY",
                    "api_version": "2024-08-01-preview",
                    "rpm": 6,
                    "weight": 2,
                    "order": 1,
                    "timeout": 30,
                    "tags": ["eu"],
                },
                "model_info": {"id": "eu", "mode": "chat", "base_model": "azure/gpt-4o"},
            },
            {"model_name": "gpt-4o", "litellm_params": {"model": "openai/gpt-4o", "tpm": 1000}},
            {
                "model_name": "old-place",
                "litellm_params": {"model": "openai/x"},
                "tpm": 240000,
                "rpm": 1800,
            },
            {"model_name": "openai/*", "litellm_params": {"model": "openai/*"}},
        ]
        assert GatewayConfig(model_list=model_list).model_list == model_list

    def test_literal_keys_are_hidden_wherever_the_configuration_is_shown(self) -> None:
        config = GatewayConfig(
            model_list=[entry("a", api_key=CANARY, extra_headers={"X-Key": CANARY})],
            api_keys={"openai": CANARY},
        )
        assert CANARY not in repr(config)
        assert CANARY not in show(config)
        assert CANARY not in config.model_dump_json()

    @pytest.mark.parametrize("key", ["$OPENAI_API_KEY", "${OPENAI_API_KEY}", "os.environ/"])
    def test_a_reference_in_another_form_is_refused(self, key: str) -> None:
        error = refused(lambda: GatewayConfig(model_list=[entry("a", api_key=key)]))
        assert error.param == "model_list[0].litellm_params.api_key"
        assert "os.environ/NAME" in str(error)

    def test_callers_are_never_left_to_choose_whose_key_goes_where(self) -> None:
        for make in (
            lambda: GatewayConfig(model_list=[entry("a", allowed_params=["api_base"])]),
            lambda: GatewayConfig(model_list=[{**entry("a"), "allowed_params": ["api_key"]}]),
        ):
            assert "never left to callers" in str(refused(make))

    @pytest.mark.parametrize("fallbacks", ["a", [1], ["a", {"a": ["a"]}], [{"a": "a"}], {"a": []}])
    def test_fallbacks_have_two_forms(self, fallbacks: Any) -> None:
        error = refused(lambda: GatewayConfig(model_list=[entry("a")], fallbacks=fallbacks))
        assert "a list of names, or a list of {group: [names]}" in str(error)

    def test_a_name_that_no_group_has_is_an_error_at_construction(self) -> None:
        models = [entry("gpt-4"), entry("claude-3")]
        for fields, place in (
            ({"fallbacks": ["gpt4"]}, "fallbacks[0]"),
            ({"fallbacks": [{"gpt-4": ["claude"]}]}, "fallbacks[0].gpt-4[0]"),
            ({"fallbacks": [{"gpt": ["claude-3"]}]}, "fallbacks[0].gpt"),
            ({"fallbacks": [{"gpt/*": ["claude-3"]}]}, "fallbacks[0].gpt/*"),
            (
                {"context_window_fallbacks": [{"*": ["gpt-4"]}, {"gpt-4": ["claude"]}]},
                "context_window_fallbacks[1].gpt-4[0]",
            ),
            (
                {"content_policy_fallbacks": [{"gpt": ["claude-3"]}]},
                "content_policy_fallbacks[0].gpt",
            ),
            ({"default_model": "gpt4"}, "default_model"),
            ({"default_embedding_model": "ada"}, "default_embedding_model"),
            ({"tenants": [{"id": "a", "models": ["gpt-4", "gp4"]}]}, "tenants[0].models[1]"),
        ):
            error = refused(lambda fields=fields: GatewayConfig(model_list=models, **fields))
            assert error.param == place
            assert "gpt-4" in str(error)

    def test_a_key_for_a_provider_nobody_knows_is_an_error(self) -> None:
        models = [entry("a"), entry("b", "my_own/x")]
        GatewayConfig(model_list=models, api_keys={"my_own": "x", "anthropic": "y"})
        error = refused(lambda: GatewayConfig(model_list=models, api_keys={"opena": CANARY}))
        assert "did you mean 'openai'?" in str(error)

    def test_an_id_belongs_to_one_deployment(self) -> None:
        def models(*names: str) -> list[dict[str, Any]]:
            return [{**entry("g", name), "model_info": {"id": "same"}} for name in names]

        GatewayConfig(model_list=models("openai/a", "openai/a"))
        error = refused(lambda: GatewayConfig(model_list=models("openai/a", "openai/b")))
        assert "model_info.id 'same'" in str(error)


class TestDefaultModels:
    def test_without_keys_the_embedded_models_are_there(self) -> None:
        config = with_default_models(GatewayConfig(enable_caching=True), {})
        table = ModelTable.build(config)
        assert table.names() == ["local-chat", "local-embed"]
        assert (table.default_chat, table.default_embedding) == ("local-chat", "local-embed")
        assert config.enable_caching
        assert not config.enable_request_batching

    def test_a_key_in_the_environment_adds_its_providers_models_before_them(self) -> None:
        config = with_default_models(GatewayConfig(), {"OPENAI_API_KEY": CANARY})
        table = ModelTable.build(config)
        assert table.default_chat == "gpt-4o-mini"
        assert table.default_embedding == "text-embedding-3-small"
        assert table.names()[-2:] == ["local-chat", "local-embed"]
        assert table.group("gpt-4").deployments[0].model == "openai/gpt-4"
        params = table.group("gpt-4o-mini").deployments[0].params
        assert params == {"api_key": "os.environ/OPENAI_API_KEY"}
        assert CANARY not in repr(config)

    def test_a_key_in_api_keys_does_the_same(self) -> None:
        config = with_default_models(GatewayConfig(api_keys={"google": CANARY}), {})
        table = ModelTable.build(config)
        deployment = table.group("gemini-2.5-flash").deployments[0]
        assert (deployment.provider, set(deployment.params)) == ("gemini", {"api_key"})

    def test_models_of_ones_own_stay_alone(self) -> None:
        config = GatewayConfig(model_list=[entry("a")])
        assert with_default_models(config, {"OPENAI_API_KEY": "x"}) is config

    def test_names_are_checked_against_the_default_models(self) -> None:
        config = GatewayConfig(fallbacks=["local-chat"], default_model="gpt-4o")
        assert with_default_models(config, {"OPENAI_API_KEY": "x"}).default_model == "gpt-4o"
        assert refused(lambda: with_default_models(config, {})).param == "default_model"

    def test_around_makes_a_whole_system_of_it(self, home: dict[str, str]) -> None:
        config = around(GatewayConfig(timeout=9), home)
        assert config.gateway.timeout == 9
        assert str(config.data_dir) == home["FOREBAY_DATA_DIR"]
        assert [e["model_name"] for e in config.gateway.model_list] == ["local-chat", "local-embed"]

    def test_providers_can_be_asked_for_by_name(self) -> None:
        environ = {"OPENAI_API_KEY": CANARY}
        config = GatewayConfig.for_providers(
            ["openai", "anthropic"], api_keys={"anthropic": CANARY}, environ=environ,
            default_model="gpt-4", timeout=5,
        )  # fmt: skip
        table = ModelTable.build(config)
        assert table.group("claude-haiku-4-5").deployments[0].provider == "anthropic"
        assert (table.default_chat, config.timeout) == ("gpt-4", 5)
        assert GatewayConfig.for_providers(None, timeout=5).model_list == []
        local = GatewayConfig.for_providers(["local"], environ={})
        assert ModelTable.build(local).default_chat == "local-chat"

    def test_a_provider_without_a_key_or_unknown_is_an_error(self) -> None:
        error = refused(lambda: GatewayConfig.for_providers(["mistral"], environ={}))
        assert "set MISTRAL_API_KEY" in str(error)
        error = refused(lambda: GatewayConfig.for_providers(["anthropc"], environ={}))
        assert "did you mean 'anthropic'?" in str(error)


class TestFile:
    def test_every_part_may_be_given(self, file: Any, home: dict[str, str]) -> None:
        config = load(
            file(f"""
            model_list:
              - model_name: gpt
                litellm_params: {{model: openai/gpt-4o-mini, api_key: os.environ/OPENAI_API_KEY}}
            fallbacks: [gpt]
            tenants:
              - id: acme
                keys: [{{id: ci, hash: "{HASH}"}}]
                limits: {{requests_per_minute: 600, concurrent_requests: 32}}
                models: [gpt]
            gateway: {{timeout: 30, enable_caching: true, cache_config: {{max_bytes: 1048576}}}}
            server: {{host: 0.0.0.0, port: 9000, replicas: {{min: 1, max: 8}}, lane: auto}}
            ledger_url: sqlite:////tmp/ledger.db
            """),
            home,
        )
        assert config.gateway.timeout == 30
        assert config.gateway.fallbacks == ["gpt"]
        assert config.gateway.tenants[0].limits == RateLimitConfig(
            requests_per_minute=600, concurrent_requests=32
        )
        assert config.server.replicas.max == 8
        assert sqlite_path(config.ledger_url) == Path("/tmp/ledger.db")
        assert config.gateway.enable_request_batching, "on by default under `forebay up`"

    def test_nothing_given_is_the_embedded_default(self, file: Any, home: dict[str, str]) -> None:
        for config in (load(None, home), load(file(""), home), load(file("gateway:\n"), home)):
            assert ModelTable.build(config.gateway).names() == ["local-chat", "local-embed"]
            assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)
            assert config.gateway.enable_request_batching

    def test_a_gateway_field_may_stand_at_the_top_but_not_in_both(self, file: Any) -> None:
        assert load(file("timeout: 9"), {}).gateway.timeout == 9
        assert check(file("timeout: 9\ngateway:\n  timeout: 8\n"), {}) == [
            Problem(str(file("timeout: 9\ngateway:\n  timeout: 8\n")), 1, "timeout",
                    "stands here and under gateway; keep one")
        ]  # fmt: skip

    def test_problems_name_file_line_field_and_the_nearest_name(self, file: Any) -> None:
        path = file("""\
model_list:
  - model_name: gpt
    litellm_params:
      model: openai/gpt-4o
      weight: -1
gateway:
  timeot: 5
  max_retries: 99
  cache_config:
    backend: redsi
server:
  port: 80000
fallbacks: [gtp]
""")
        found = check(path, {})
        assert [(p.line, p.field) for p in found] == [
            (5, "model_list[0].litellm_params.weight"),
            (7, "gateway.timeot"),
            (8, "gateway.max_retries"),
            (10, "gateway.cache_config.backend"),
            (12, "server.port"),
        ]
        assert (
            str(found[1]) == f"{path}:7: gateway.timeot: unknown setting; did you mean 'timeout'?"
        )
        assert "from 0 to 10, not 99" in found[2].message
        assert "'redis'" in found[3].message
        error = refused(lambda: load(path, {}))
        assert f"{path}:7: gateway.timeot: unknown setting" in str(error)
        assert len(str(error).splitlines()) == 5

    def test_a_name_that_no_group_has_is_found_on_its_line(self, file: Any) -> None:
        path = file(
            "model_list:\n- model_name: gpt\n  litellm_params: {model: openai/x}\n"
            "fallbacks:\n- gpt\n- gtp\n"
        )
        (problem,) = check(path, {})
        assert (problem.line, problem.field) == (6, "fallbacks[1]")
        assert "did you mean 'gpt'?" in problem.message

    def test_a_key_that_is_missing_is_reported_where_it_belongs(self, file: Any) -> None:
        (problem,) = check(file("model_list:\n\n- model_name: gpt\n"), {})
        assert (problem.line, problem.field) == (3, "model_list[0].litellm_params")
        assert problem.message == "is required"

    @pytest.mark.parametrize(
        ("text", "line", "words"),
        [
            ("gateway: {timeout: 3", 1, "not valid YAML"),
            ("a: 1\n b: 2\n", 2, "not valid YAML"),
            ("- a\n- b\n", 1, "must be a mapping"),
            ("just text", 1, "must be a mapping"),
            ("timeout: 3\nserver: {}\ntimeout: 4\n", 3, "given twice"),
            ("gateway:\n  timeout: 3\n  timeout: 4\n", 3, "given twice"),
            ("gateway: 3\n", 1, "must be a mapping"),
            ("server: [1]\n", 1, "must be a mapping"),
            ("timeout: !!python/object/apply:os.system [ls]\n", 1, "not valid YAML"),
            ("gateway: \x00\n", 0, "not valid YAML"),
            ("a: &a [*a]\n", 1, "unknown setting"),
        ],
    )
    def test_what_is_no_configuration_is_told_so(
        self, file: Any, text: str, line: int, words: str
    ) -> None:
        (problem,) = check(file(text), {})
        assert (problem.line, words in problem.message) == (line, True), problem

    def test_names_are_texts_even_where_yaml_has_another_word_for_them(self, file: Any) -> None:
        text = "validation:\n  off: [pii]\n  blocked_patterns: {no: secret, 5: five}\n"
        told = load(
            file("gateway:\n  " + text.replace("\n", "\n  ").strip()), {}
        ).gateway.validation
        assert told.off == ["pii"]
        assert told.blocked_patterns == {"no": "secret", "5": "five"}
        told = load(None, {"FOREBAY_VALIDATION": "{off: [pii]}"}).gateway.validation
        assert told.off == ["pii"]

    def test_merged_keys_are_no_duplicates(self, file: Any) -> None:
        text = "server: &s {port: 1}\n"
        assert load(file(text + "gateway: {timeout: 3}\n"), {}).server.port == 1
        merged = file(
            "rate_limit_config: &l {burst_size: 3}\n"
            "tenants:\n- id: a\n  limits: {<<: *l, burst_size: 4}\n"
        )
        limits = load(merged, {}).gateway.tenants[0].limits
        assert limits is not None
        assert limits.burst_size == 4

    def test_a_file_that_cannot_be_read_is_told_so(self, tmp_path: Path) -> None:
        assert "No such file" in str(refused(lambda: load(tmp_path / "none.yaml", {})))
        assert "cannot be read" in str(refused(lambda: load(tmp_path, {})))
        (tmp_path / "latin").write_bytes(b"a: \xff\n")
        assert "UTF-8" in str(refused(lambda: load(tmp_path / "latin", {})))

    def test_the_schema_accepts_what_is_accepted_and_shows_bounds(self) -> None:
        schema = config_schema()
        assert {"model_list", "fallbacks", "tenants", "gateway", "server", "ledger_url"} <= set(
            schema["properties"]
        )
        timeout = schema["$defs"]["GatewayConfig"]["properties"]["timeout"]
        assert (timeout["minimum"], timeout["maximum"]) == (1, 300)
        assert schema["additionalProperties"] is False
        assert "cache" not in schema["properties"]
        json.dumps(schema)

    def test_what_is_shown_loads_again(self, file: Any, home: dict[str, str]) -> None:
        first = load(file("timeout: 9\nserver: {replicas: 2}\nfallbacks: [local-chat]\n"), home)
        assert load(file(show(first)), home) == first
        assert yaml.safe_load(show(first)) == shown(first) == json.loads(json.dumps(shown(first)))


class TestEnvironment:
    def test_variables_override_the_file(self, file: Any, home: dict[str, str]) -> None:
        path = file("timeout: 9\nserver: {port: 1, host: 127.0.0.2}\ngateway: {max_retries: 1}\n")
        config = load(
            None,
            {
                **home,
                "FOREBAY_CONFIG": str(path),
                "FOREBAY_TIMEOUT": "30",
                "FOREBAY_ENABLE_CACHING": "true",
                "FOREBAY_RATE_LIMIT_CONFIG": "{requests_per_minute: 5}",
                "FOREBAY_MODEL_LIST": '[{"model_name": "m", "litellm_params": {"model": "a/b"}}]',
                "FOREBAY_SERVER_PORT": "9000",
                "FOREBAY_MAX_RETRIES": "",
            },
        )
        gateway = config.gateway
        assert (gateway.timeout, gateway.max_retries, gateway.enable_caching) == (30, 1, True)
        assert gateway.rate_limit_config == RateLimitConfig(requests_per_minute=5)
        assert ModelTable.build(gateway).names() == ["m"]
        assert (config.server.port, config.server.host) == (9000, "127.0.0.2")

    def test_a_wrong_variable_is_named(self) -> None:
        error = refused(lambda: load(None, {"FOREBAY_TIMEOUT": "999"}))
        assert str(error) == "environment: FOREBAY_TIMEOUT: must be from 1 to 300, not 999"
        error = refused(lambda: load(None, {"FOREBAY_MODEL_LIST": "[{model_name: a}]"}))
        assert "FOREBAY_MODEL_LIST[0].litellm_params: is required" in str(error)
        error = refused(lambda: load(None, {"FOREBAY_FALLBACKS": "[a"}))
        assert str(error) == "environment: FOREBAY_FALLBACKS: is not valid YAML"

    def test_a_misspelt_variable_is_an_error_naming_the_nearest(self) -> None:
        error = refused(lambda: load(None, {"FOREBAY_SERVER_PROT": "1"}))
        assert "did you mean 'FOREBAY_SERVER_PORT'?" in str(error)

    def test_variables_of_others_are_left_alone(self, home: dict[str, str]) -> None:
        others = {
            "FOREBAY_SERVICE_HOST": "10.0.0.1",
            "FOREBAY_SERVICE_PORT": "8000",
            "FOREBAY_SERVER_PORT": "tcp://10.0.0.1:8000",
            "FOREBAY_KEY_SECRET": "x" * 32,
            "FOREBAY_HAPROXY": "/bin/haproxy",
        }
        assert load(None, {**home, **others}).server.port == 8000

    def test_the_data_directory_comes_from_the_environment_and_nowhere_else(
        self, file: Any
    ) -> None:
        assert load(None, {"FOREBAY_DATA_DIR": "/x"}).data_dir == Path("/x")
        with pytest.raises(ConfigurationError, match="FOREBAY_DATA_DIR"):
            load(file("data_dir: /y"), {})
        assert load(None, {}).data_dir == Path("~/.local/share/forebay").expanduser()


class TestDocument:
    def system(self, **fields: Any) -> SystemConfig:
        return SystemConfig(
            gateway=GatewayConfig(
                model_list=[entry("a", api_key=CANARY, api_base=f"https://u:{CANARY}@h/v1")],
                api_keys={"openai": "os.environ/KEY"},
                tenants=[TenantConfig(id="t", keys=[{"id": "k", "hash": HASH}])],
                **fields,
            ),
            server=ServerConfig(port=9),
            data_dir=Path("/data"),
        )

    def test_it_is_json_without_a_secret_and_comes_back_the_same(self) -> None:
        vault, config = Vault(), self.system(timeout=7)
        document = config.document(vault)
        assert CANARY not in json.dumps(document)
        again = SystemConfig.from_document(json.loads(json.dumps(document)))
        assert again.document(vault) == document
        assert (again.gateway.timeout, again.server.port) == (7, 9)
        assert again.gateway.api_keys == {"openai": "os.environ/KEY"}
        deployment = ModelTable.build(again.gateway).deployments()[0]
        assert vault.resolve(deployment.params, {})["api_key"] == CANARY

    def test_equal_configurations_have_equal_documents(self) -> None:
        vault = Vault()
        assert self.system().document(vault) == self.system().document(vault)

    def test_literal_secrets_need_a_vault(self) -> None:
        assert "no vault" in str(refused(lambda: self.system().document()))
        assert SystemConfig().document()["gateway"]["model_list"] == []

    def test_deployments_have_the_same_ids_on_both_sides(self) -> None:
        config = self.system()
        again = SystemConfig.from_document(config.document(Vault()))
        ids = [[d.id for d in ModelTable.build(c.gateway).deployments()] for c in (config, again)]
        assert ids[0] == ids[1]

    def test_another_shape_is_refused(self) -> None:
        refused(lambda: SystemConfig.from_document({"gatway": {}}))

    def test_it_survives_pickling(self) -> None:
        config = self.system()
        assert pickle.loads(pickle.dumps(config)) == config


def test_importing_the_configuration_loads_neither_ray_nor_litellm() -> None:
    code = "import sys, forebay.config; print({'ray', 'litellm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
