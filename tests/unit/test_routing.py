"""Which deployments answer for a name, and in which order they are tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.circuit_breaker.policy import CLEAN, Standing, State
from forebay.config import GatewayConfig
from forebay.errors import ConfigurationError, ModelNotFound
from forebay.routing import Group, ModelTable, allows, nearest, order, provider_of


def entry(name: str, model: str = "openai/gpt-4o", /, **params: Any) -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": model, **params}}


def table(*entries: dict[str, Any], **fields: Any) -> ModelTable:
    return ModelTable.build(GatewayConfig(model_list=list(entries), **fields))


def group(*params: dict[str, Any]) -> Group:
    """A group whose deployments are called 0, 1, 2, …"""
    entries = [
        {**entry("g", f"openai/m{n}", **given), "model_info": {"id": str(n)}}
        for n, given in enumerate(params)
    ]
    return table(*entries).group("g")


def clean(_: str) -> Standing:
    return CLEAN


def standings(**by_id: Standing) -> Callable[[str], Standing]:
    return lambda deployment: by_id.get(f"d{deployment}", CLEAN)


def tried(of: Group, standing: Callable[[str], Standing] = clean, seed: int = 1) -> list[str]:
    return [deployment.id for deployment in order(of, standing, Random(seed))]


class TestGroups:
    def test_entries_of_one_name_are_one_group(self) -> None:
        models = table(entry("a", "openai/x"), entry("b"), entry("a", "azure/x"))
        assert models.names() == ["a", "b"]
        assert [d.model for d in models.group("a").deployments] == ["openai/x", "azure/x"]
        assert [d.provider for d in models.group("a").deployments] == ["openai", "azure"]

    def test_what_routing_uses_is_taken_out_of_the_parameters(self) -> None:
        given = {"weight": 2, "order": 1, "rpm": 3, "tpm": 4, "api_base": "http://h"}
        (deployment,) = table(entry("a", **given)).group("a").deployments
        assert deployment.params == {"api_base": "http://h"}
        assert (deployment.weight, deployment.order) == (2, 1)
        assert (deployment.rpm, deployment.tpm) == (3, 4)

    def test_weights_beside_litellm_params_count_too(self) -> None:
        (deployment,) = table({**entry("a"), "rpm": 5, "weight": 1}).group("a").deployments
        assert (deployment.rpm, deployment.weight) == (5, 1)

    def test_an_unknown_name_names_those_that_exist(self) -> None:
        models = table(entry("gpt-4o"), entry("claude-3"))
        with pytest.raises(ModelNotFound, match=r"did you mean 'gpt-4o'\?.*gpt-4o, claude-3") as e:
            models.group("gpt4o")
        assert (e.value.status, e.value.param, e.value.code) == (404, "model", "model_not_found")

    def test_a_name_without_end_is_cut(self) -> None:
        with pytest.raises(ModelNotFound) as caught:
            table(*(entry(f"m{n}") for n in range(99))).group("x" * 10_000)
        assert len(str(caught.value)) < 400
        assert "and 79 more" in str(caught.value)

    def test_parameters_are_allowed_only_if_every_deployment_takes_them(self) -> None:
        models = table(
            {**entry("a", "openai/x"), "allowed_params": ["top_k", "min_p"]},
            entry("a", "openai/y", allowed_params=["top_k"]),
        )
        assert models.group("a").allowed_params == {"top_k"}

    def test_a_table_without_models_says_so(self) -> None:
        models = ModelTable.build(GatewayConfig())
        with pytest.raises(ModelNotFound, match="model_list is empty"):
            models.group("a")
        with pytest.raises(ModelNotFound, match="set default_model"):
            models.default("chat")

    def test_a_description_is_what_openai_clients_expect(self) -> None:
        models = table(entry("a", api_key="sk-canary"))
        assert models.describe("a") == {
            "id": "a",
            "object": "model",
            "created": 0,
            "owned_by": "openai",
            "mode": "chat",
        }

    def test_names_are_checked_when_the_table_is_built(self) -> None:
        with pytest.raises(ConfigurationError, match="nope"):
            ModelTable.build(GatewayConfig(fallbacks=["nope"]))


class TestIds:
    def ids(self, *entries: dict[str, Any], **fields: Any) -> list[str]:
        models = table(*entries, **fields)
        names = dict.fromkeys(e["model_name"] for e in entries)
        return [d.id for name in names for d in models.group(name).deployments]

    def test_they_are_the_same_in_every_process(self) -> None:
        assert self.ids(entry("a", api_key="os.environ/A")) == ["62a176ef9318faab"]

    def test_weights_and_the_group_do_not_matter(self) -> None:
        first, second = self.ids(entry("a", weight=1), entry("b", weight=2, order=3))
        assert first == second

    def test_everything_that_makes_another_upstream_matters(self) -> None:
        found = self.ids(
            entry("a", "openai/x"),
            entry("a", "openai/y"),
            entry("a", "openai/x", api_base="http://h"),
            entry("a", "openai/x", api_key="os.environ/A"),
            entry("a", "openai/x", api_key="os.environ/B"),
        )
        assert len(set(found)) == 5

    def test_literal_keys_tell_deployments_apart_without_being_in_the_id(self) -> None:
        one, other, again = self.ids(
            entry("a", api_key="sk-1"), entry("b", api_key="sk-2"), entry("c", api_key="sk-1")
        )
        assert one == again != other
        assert [one, other] == self.ids(entry("a", api_key="new-1"), entry("b", api_key="new-2"))

    def test_an_id_of_the_users_is_kept(self) -> None:
        assert self.ids({**entry("a"), "model_info": {"id": 7}}) == ["7"]

    def test_a_deployment_is_found_by_its_id(self) -> None:
        models = table(entry("a"), entry("openai/*", "openai/*"))
        for name in ("a", "openai/gpt-4o:free"):
            (deployment,) = models.group(name).deployments
            assert models.deployment(deployment.id) == deployment
        assert len(models.deployments()) == 2
        with pytest.raises(ModelNotFound):
            models.deployment("nope")


class TestApiKeys:
    def key(self, model: str, keys: dict[str, str], **params: Any) -> Any:
        (deployment,) = table(entry("a", model, **params), api_keys=keys).group("a").deployments
        key = deployment.params.get("api_key")
        return key.get_secret_value() if hasattr(key, "get_secret_value") else key

    def test_a_providers_key_goes_to_its_deployments_that_have_none(self) -> None:
        keys = {"openai": "sk-o", "anthropic": "os.environ/A"}
        assert self.key("openai/x", keys) == "sk-o"
        assert self.key("gpt-4o", keys) == "sk-o"
        assert self.key("claude-3", keys) == "os.environ/A"
        assert self.key("mistral/x", keys) is None
        assert self.key("openai/x", keys, api_key="own") == "own"
        assert self.key("x", {"openai": "sk-o"}, custom_llm_provider="openai") == "sk-o"

    def test_a_family_of_providers_shares_a_key(self) -> None:
        assert self.key("cohere_chat/command-r", {"cohere": "c"}) == "c"
        assert self.key("gemini/x", {"google": "g"}) == "g"

    def test_a_pattern_gets_the_key_of_what_it_is_filled_with(self) -> None:
        models = table(entry("*", "*"), api_keys={"openai": "os.environ/O"})
        (deployment,) = models.group("openai/gpt-4o").deployments
        assert (deployment.provider, deployment.params["api_key"]) == ("openai", "os.environ/O")
        assert models.group("mistral/x").deployments[0].params == {}


class TestPatterns:
    def test_the_star_is_filled_in(self) -> None:
        models = table(entry("openai/*", "openai/*"), entry("eu/*", "azure/eu-*"))
        found = models.group("openai/gpt-4o")
        assert (found.name, found.pattern) == ("openai/gpt-4o", "openai/*")
        assert found.deployments[0].model == "openai/gpt-4o"
        assert models.group("eu/gpt-4o").deployments[0].model == "azure/eu-gpt-4o"
        assert models.names() == []
        assert models.patterns() == ["openai/*", "eu/*"]

    def test_several_stars_are_filled_in_order(self) -> None:
        models = table(entry("a/*::static::*", "openai/*::static::*"))
        assert models.group("a/x::static::y").deployments[0].model == "openai/x::static::y"

    def test_a_model_without_a_star_stays_as_it_is(self) -> None:
        assert table(entry("gpt-*", "openai/gpt-4o")).group("gpt-9").deployments[0].model == (
            "openai/gpt-4o"
        )

    def test_an_exact_name_goes_before_a_pattern_and_a_longer_pattern_before_a_shorter(
        self,
    ) -> None:
        models = table(
            entry("*", "a/*"), entry("openai/gpt-*", "b/*"), entry("openai/*", "c/*"),
            entry("openai/gpt-4o", "d/x"),
        )  # fmt: skip
        found = [
            models.group(name).deployments[0].model.partition("/")[0]
            for name in ("other", "openai/gpt-4", "openai/o1", "openai/gpt-4o")
        ]
        assert found == ["a", "b", "c", "d"]

    def test_a_bare_name_finds_its_providers_pattern(self) -> None:
        models = table(entry("openai/*", "openai/*"), entry("anthropic/*", "anthropic/*"))
        assert models.group("gpt-4o").deployments[0].model == "openai/gpt-4o"
        assert models.group("claude-3").deployments[0].model == "anthropic/claude-3"
        with pytest.raises(ModelNotFound):
            models.group("llama")

    @pytest.mark.parametrize(
        "name",
        ["openai/*", "openai/", "openai/http://evil", "openai/../x", "openai/a b", "openai/a\nb",
         "openai/" + "x" * 300, "openai/é", "", "*"],
    )  # fmt: skip
    def test_what_is_no_name_of_a_model_is_not_filled_in(self, name: str) -> None:
        models = table(entry("openai/*", "openai/*"))
        with pytest.raises(ModelNotFound):
            models.group(name)

    def test_a_pattern_counts_for_names_in_the_configuration(self) -> None:
        models = table(
            entry("a"), entry("openai/*", "openai/*"), fallbacks=["openai/gpt-4o"],
            default_model="openai/o1", tenants=[{"id": "t", "models": ["openai/*", "openai/x"]}],
        )  # fmt: skip
        assert models.fallbacks("a") == ["openai/gpt-4o"]
        assert models.default("chat") == "openai/o1"


class TestFallbacks:
    def test_a_list_of_names_is_for_every_group_but_itself(self) -> None:
        models = table(entry("a"), entry("b"), entry("c"), fallbacks=["b", "c", "b"])
        assert models.fallbacks("a") == ["b", "c"]
        assert models.fallbacks("b") == ["c"]

    def test_a_mapping_is_for_its_group_alone(self) -> None:
        models = table(entry("a"), entry("b"), entry("c"), fallbacks=[{"a": ["c", "b"]}])
        assert models.fallbacks("a") == ["c", "b"]
        assert models.fallbacks("b") == []

    def test_a_star_is_for_every_group_without_a_list_of_its_own(self) -> None:
        models = table(
            entry("a"), entry("b"), entry("x/*", "x/*"), entry("y/*", "y/*"),
            fallbacks=[{"*": ["b"]}, {"a": []}, {"x/*": ["a"]}],
        )  # fmt: skip
        assert models.fallbacks("a") == []
        assert models.fallbacks("b") == []
        assert models.fallbacks("x/1") == ["a"]
        assert models.fallbacks("y/1") == ["b"]


class TestDefaults:
    def test_they_are_the_first_that_can(self) -> None:
        models = table(
            entry("whisper", "openai/whisper-1"),
            entry("*", "openai/*"),
            entry("e", "openai/text-embedding-3-small"),
            entry("a"),
            {**entry("odd", "my/thing"), "model_info": {"mode": "embedding"}},
        )
        assert (models.default_chat, models.default_embedding) == ("a", "e")
        assert models.default("completion") == "a"
        assert models.default("embedding") == "e"

    def test_what_the_model_info_says_goes_before_the_name(self) -> None:
        models = table(
            {**entry("e", "openai/text-embedding-3"), "model_info": {"mode": "chat"}},
            {**entry("o", "my/thing"), "model_info": {"mode": "embedding"}},
        )
        assert (models.default_chat, models.default_embedding) == ("e", "o")

    def test_settings_go_before_all(self) -> None:
        models = table(entry("a"), entry("b"), default_model="b", default_embedding_model="a")
        assert (models.default("chat"), models.default("embedding")) == ("b", "a")

    def test_there_may_be_none(self) -> None:
        assert table(entry("a")).default_embedding is None


class TestOrder:
    def test_lower_orders_come_first_and_those_without_one_last(self) -> None:
        of = group({}, {"order": 2}, {"order": 1}, {"order": 2})
        for seed in range(20):
            found = tried(of, seed=seed)
            assert (found[0], set(found[1:3]), found[3]) == ("2", {"1", "3"}, "0")

    def test_a_weight_is_a_share_of_first_tries(self) -> None:
        of = group({"weight": 3}, {"weight": 1})
        firsts = Counter(tried(of, seed=seed)[0] for seed in range(4000))
        assert 2850 < firsts["0"] < 3150

    @pytest.mark.parametrize("figure", ["rpm", "tpm"])
    def test_without_weights_rpm_or_else_tpm_are_the_shares(self, figure: str) -> None:
        of = group({figure: 9000}, {figure: 1000})
        firsts = Counter(tried(of, seed=seed)[0] for seed in range(4000))
        assert 3480 < firsts["0"] < 3720

    def test_weights_go_before_rpm_and_one_without_comes_last(self) -> None:
        of = group({"rpm": 10**6}, {"weight": 1}, {"weight": 0})
        assert {tried(of, seed=seed)[0] for seed in range(50)} == {"1"}

    def test_without_any_figure_all_are_alike(self) -> None:
        firsts = Counter(tried(group({}, {}, {}), seed=seed)[0] for seed in range(3000))
        assert all(850 < count < 1150 for count in firsts.values())

    def test_what_the_breaker_holds_back_comes_last_soonest_first(self) -> None:
        standing = standings(
            d0=Standing(State.OPEN, retry_after_s=9),
            d1=Standing(State.CLOSED, retry_after_s=2),  # throttled
            d2=Standing(State.FORCED_OPEN),
        )
        of = group({"order": 1}, {"order": 1}, {"order": 1}, {"order": 2})
        assert tried(of, standing) == ["3", "1", "0", "2"]

    def test_one_that_may_be_probed_keeps_its_place(self) -> None:
        standing = standings(d0=Standing(State.HALF_OPEN), d1=Standing(State.FORCED_CLOSED))
        assert tried(group({"order": 1}, {"order": 2}), standing) == ["0", "1"]

    def test_a_deployment_listed_twice_is_tried_once(self) -> None:
        models = table(entry("g", "openai/x"), entry("g", "openai/x"), entry("g", "openai/y"))
        found = order(models.group("g"), clean, Random(1))
        assert sorted(d.model for d in found) == ["openai/x", "openai/y"]

    @settings(deadline=None)
    @given(
        st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "weight": st.floats(0, 1e6),
                    "order": st.integers(-3, 3),
                    "rpm": st.integers(1, 10**6),
                },
            ),
            min_size=1,
            max_size=6,
        ),
        st.integers(0, 2**16),
    )
    def test_nothing_is_lost_or_tried_twice(self, given: list[dict[str, Any]], seed: int) -> None:
        assert sorted(tried(group(*given), seed=seed)) == [str(n) for n in range(len(given))]


class TestNames:
    def test_a_tenants_models_may_be_patterns(self) -> None:
        assert allows(None, "anything")
        assert allows(["a", "openai/*"], "openai/gpt-4o")
        assert allows(["a"], "a")
        assert not allows(["a", "openai/*"], "b")
        assert not allows([], "a")
        assert not allows(["gpt.4"], "gpt-4")

    @pytest.mark.parametrize(
        ("model", "provider"),
        [
            ("openai/gpt-4o", "openai"),
            ("gpt-4o-mini", "openai"),
            ("o3-mini", "openai"),
            ("text-embedding-3-small", "openai"),
            ("claude-haiku-4-5", "anthropic"),
            ("command-r", "cohere_chat"),
            ("bedrock/us.anthropic.claude", "bedrock"),
            ("mystery", "unknown"),
        ],
    )
    def test_a_provider_is_inferred_as_litellm_does(self, model: str, provider: str) -> None:
        assert provider_of(model) == provider

    def test_the_nearest_name_is_near(self) -> None:
        assert nearest("Timeot", ["timeout", "tpm"]) == "timeout"
        assert nearest("zzz", ["timeout"]) is None
        assert nearest("a", []) is None
