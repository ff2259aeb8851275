"""Which deployments answer for a name, and which groups when they cannot."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.config import GatewayConfig
from forebay.errors import ConfigurationError, ModelNotFound
from forebay.routing import MATCHED_MAX, ModelTable, allows, nearest, provider_of


def entry(name: str, model: str = "openai/gpt-4o", /, **params: Any) -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": model, **params}}


def table(*entries: dict[str, Any], **fields: Any) -> ModelTable:
    return ModelTable.build(GatewayConfig(model_list=list(entries), **fields))


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

    @pytest.mark.parametrize(
        "model",
        [
            "anthropic/claude-sonnet-4-5",
            "claude-sonnet-4-5",
            "bedrock/us.anthropic.claude-sonnet-4-5-20250929-v1:0",
            "vertex_ai/claude-sonnet-4-5",
            "azure_ai/Claude-Sonnet-4-5",
        ],
    )
    def test_a_claude_takes_its_own_parameters(self, model: str) -> None:
        models = table(entry("a", model))
        assert models.group("a").allowed_params == {"top_k", "thinking"}

    @pytest.mark.parametrize("model", ["openai/claude-x", "bedrock/amazon.nova-lite-v1:0"])
    def test_a_group_with_another_model_takes_only_what_is_listed(self, model: str) -> None:
        listed = {**entry("a", model), "allowed_params": ["top_k"]}
        models = table(entry("a", "anthropic/claude-x"), listed, entry("b", model))
        assert models.group("a").allowed_params == {"top_k"}
        assert not models.group("b").allowed_params

    def test_a_claude_by_a_pattern_is_one_too(self) -> None:
        models = table(entry("anthropic/*", "anthropic/*"), entry("*", "*"))
        for name in ("anthropic/claude-x", "bedrock/claude-x"):
            assert models.group(name).allowed_params == {"top_k", "thinking"}
        assert not models.group("gpt-4o").allowed_params

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

    def test_a_given_id_does_not_hide_that_it_means_something_else_now(self) -> None:
        def meaning(model: str, **params: Any) -> str:
            given = {**entry("a", model, **params), "model_info": {"id": 7}}
            return table(given).group("a").deployments[0].meaning

        same = meaning("openai/x", api_key="one")
        assert meaning("openai/x", api_key="two") == same
        assert meaning("openai/y", api_key="one") != same
        assert meaning("openai/x", api_key="one", api_base="http://b") != same

    def test_a_deployment_is_found_by_its_id(self) -> None:
        models = table(entry("a"), entry("openai/*", "openai/*"))
        for name in ("a", "openai/gpt-4o:free"):
            (deployment,) = models.group(name).deployments
            assert models.deployment(deployment.id) == deployment
        assert len(models.deployments()) == 2
        with pytest.raises(ModelNotFound):
            models.deployment("nope")


class TestCircuits:
    def test_all_names_filled_into_a_pattern_share_one(self) -> None:
        models = table(entry("openai/*", "openai/*"))
        (pattern,) = models.deployments()
        for name in ("openai/gpt-4o", "openai/whatever:free"):
            (deployment,) = models.group(name).deployments
            assert deployment.circuit == pattern.circuit == pattern.id
            assert deployment.limited_as == f"deployment/{pattern.id}"
            assert deployment.id != pattern.id
        assert models.deployment(pattern.circuit) is pattern

    def test_every_other_deployment_has_its_own_whatever_its_id(self) -> None:
        models = table(
            {**entry("gpt-4", "azure/x"), "model_info": {"id": "azure:gpt-4"}},
            {**entry("gpt-5", "azure/y"), "model_info": {"id": "azure:gpt-5"}},
        )
        assert [d.circuit for d in models.deployments()] == ["azure:gpt-4", "azure:gpt-5"]


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

    def test_what_a_pattern_was_filled_in_for_is_kept_for_so_many_names(self) -> None:
        models = table(entry("openai/*", "openai/*"))
        found = models.group("openai/gpt-4o")
        assert models.group("openai/gpt-4o") is found

        for number in range(MATCHED_MAX):
            models.group(f"openai/{number}")
        again = models.group("openai/gpt-4o")
        assert again is not found
        assert again == found

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


class TestSpecialFallbacks:
    def test_they_are_for_their_kind_and_group_alone(self) -> None:
        models = table(
            entry("a"), entry("long"), entry("mild"), entry("other"),
            fallbacks=["other"],
            context_window_fallbacks=[{"a": ["long", "a", "long"]}],
            content_policy_fallbacks=[{"a": ["mild", "other"]}],
        )  # fmt: skip
        assert models.special_fallbacks("context_window", "a") == ["long"]
        assert models.special_fallbacks("content_policy", "a") == ["mild", "other"]
        assert models.special_fallbacks("context_window", "long") == []
        assert models.fallbacks("a") == ["other"]

    def test_without_any_the_refusal_is_the_answer(self) -> None:
        models = table(entry("a"), entry("b"), fallbacks=["b"])
        assert models.special_fallbacks("context_window", "a") == []
        assert models.special_fallbacks("content_policy", "not/there") == []

    def test_a_star_is_for_every_group_without_a_list_of_its_own(self) -> None:
        models = table(
            entry("a"), entry("b"), entry("x/*", "x/*"), entry("y/*", "y/*"),
            context_window_fallbacks=[{"*": ["b"]}, {"a": []}, {"x/*": ["a"]}],
        )  # fmt: skip
        found = [models.special_fallbacks("context_window", n) for n in ("a", "b", "x/1", "y/1")]
        assert found == [[], [], ["a"], ["b"]]

    def test_what_a_pattern_matches_may_be_named(self) -> None:
        models = table(
            entry("a"), entry("x/*", "x/*"), content_policy_fallbacks=[{"a": ["x/mild"]}]
        )
        assert models.special_fallbacks("content_policy", "a") == ["x/mild"]

    def test_all_that_an_answer_may_come_from_is_reachable(self) -> None:
        models = table(
            *(entry(name) for name in "abcdefg"),
            fallbacks=[{"a": ["b"]}, {"c": ["g"]}],
            context_window_fallbacks=[{"a": ["c"]}, {"c": ["d"]}, {"d": ["a", "c"]}],
            content_policy_fallbacks=[{"b": ["e"]}],
        )
        assert models.reachable("a") == ["a", "b", "c", "e", "d"]
        assert models.reachable("c") == ["c", "g", "d", "a"]
        assert models.reachable("f") == ["f"]


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
