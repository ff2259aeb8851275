"""Who exists, with what limits, models and keys."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from actors.registry.policy import Access, KeyRecord, Revocation, TenantRecord
from forebay.config import GatewayConfig, hash_key
from forebay.errors import InvalidRequest, ModelNotFound
from forebay.tenants import Tenants

HASHES = [hash_key(f"key {n}", b"secret") for n in range(4)]


def key(tenant: str, number: int, *, admin: bool = False) -> KeyRecord:
    return KeyRecord(f"k{number}", tenant, HASHES[number], admin, 1000 + number)


def access(
    *keys: KeyRecord, version: int = 0, revoked: tuple[int, ...] = (), **tenants: dict[str, Any]
) -> Access:
    return Access(
        version,
        {record.hash: record for record in keys},
        {name: TenantRecord(name, settings) for name, settings in tenants.items()},
        {HASHES[n]: Revocation(f"k{n}", "acme", HASHES[n], 0) for n in revoked},
    )


def tenants(
    *configured: dict[str, Any], given: Access | None = None, version: int = 1, **gateway: Any
) -> Tenants:
    config = GatewayConfig(tenants=list(configured), **gateway)
    return Tenants(config, given or Access(), version)


class TestWhoExists:
    def test_without_any_tenant_every_name_is_one(self) -> None:
        nobody = tenants()
        assert nobody.exists("whoever")
        nobody.require("whoever")
        assert list(nobody) == []

    def test_with_one_only_those_and_default_exist(self) -> None:
        both = tenants({"id": "acme"}, given=access(globex={}))
        assert [both.exists(n) for n in ("acme", "globex", "default", "acne")] == [1, 1, 1, 0]
        assert {tenant.id for tenant in both} == {"acme", "globex"}

    def test_an_unknown_name_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(InvalidRequest, match="did you mean 'acme'") as caught:
            tenants({"id": "acme"}).require("acne", param="tenant", status=404)
        assert (caught.value.param, caught.value.code) == ("tenant", "unknown_tenant")
        assert caught.value.status == 404

    def test_an_endless_name_is_not_told_back(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            tenants({"id": "acme"}).require("x" * 10**6)
        assert len(str(caught.value)) < 300

    def test_the_configuration_goes_before_what_was_made_at_run_time(self) -> None:
        both = tenants(
            {"id": "acme", "limits": {"requests_per_minute": 5}},
            given=access(acme={"limits": {"requests_per_minute": 9}}),
        )
        limits = both.limits_for("acme")
        assert limits is not None
        assert limits.requests_per_minute == 5

    def test_settings_that_are_refused_by_now_open_nothing(self) -> None:
        broken = tenants(given=access(acme={"limits": {"requests_per_minute": 0}}))
        assert broken.exists("acme")
        assert not broken.allows("acme", "gpt")


class TestModels:
    def test_a_tenant_uses_its_models_and_others_use_all(self) -> None:
        models = [{"model_name": n, "litellm_params": {"model": f"openai/{n}"}} for n in ("a", "b")]
        some = tenants({"id": "acme", "models": ["a"]}, {"id": "other"}, model_list=models)
        assert [some.allows("acme", n) for n in ("a", "b")] == [True, False]
        assert some.allows("other", "b")
        some.require_model("acme", "a")
        with pytest.raises(ModelNotFound):
            some.require_model("acme", "b")


class TestLimits:
    def test_own_ones_go_before_those_of_all(self) -> None:
        both = tenants(
            {"id": "acme", "limits": {"tokens_per_minute": 600}},
            {"id": "other"},
            rate_limit_config={"requests_per_minute": 7},
        )
        own, shared = both.limits_for("acme"), both.limits_for("other")
        assert own is not None
        assert shared is not None
        assert (own.tokens_per_minute, shared.tokens_per_minute) == (600, None)
        assert shared.requests_per_minute == 7

    def test_where_none_are_set_nothing_limits(self) -> None:
        assert tenants().limits_for("whoever") is None
        off = {"enable_rate_limiting": False, "rate_limit_config": {"requests_per_minute": 7}}
        assert tenants({"id": "a", "limits": {"burst_size": 1}}, **off).limits_for("a") is None

    def test_they_are_of_the_version_of_both_configuration_and_access(self) -> None:
        limits = tenants(given=access(version=3), version=4, rate_limit_config={}).limits_for("x")
        assert limits is not None
        assert limits.version == 7

    def test_they_are_made_once(self) -> None:
        some = tenants(rate_limit_config={})
        assert some.limits_for("x") is some.limits_for("x")

    def test_waiting_and_counting_are_as_the_limits_say(self) -> None:
        some = tenants(
            {"id": "a", "limits": {"queue_timeout": 3, "max_queue_size": 4}},
            {"id": "b", "limits": {"enable_queuing": False, "count_cache_hits": False}},
            {"id": "c"},
        )
        assert [some.queue_for(n) for n in "abc"] == [(3.0, 4), (0.0, 0), (0.0, 0)]
        assert [some.counts_cache_hits(n) for n in "abc"] == [True, False, True]


CONFIGURED = {"id": "acme", "admin": True, "keys": [{"id": "ci", "hash": HASHES[0]}]}


class TestKeys:
    def test_all_in_force_are_told_with_where_they_come_from(self) -> None:
        given = access(key("acme", 1), key("default", 2), key("globex", 3, admin=True), globex={})
        found = tenants(CONFIGURED, given=given).keys_in_force()
        assert [(k.tenant, k.id, k.admin, k.source, k.created_ms) for k in found] == [
            ("acme", "ci", True, "config", None),
            ("acme", "k1", True, "runtime", 1001),
            ("default", "k2", False, "runtime", 1002),
            ("globex", "k3", True, "runtime", 1003),
        ]

    def test_a_revoked_key_opens_nothing_wherever_it_stands(self) -> None:
        given = access(key("acme", 1), revoked=(0, 1))
        assert tenants(CONFIGURED, given=given).keys_in_force() == []

    def test_a_key_of_a_tenant_that_is_gone_opens_nothing(self) -> None:
        found = tenants({"id": "other"}, given=access(key("acme", 1))).keys_in_force()
        assert found == []

    def test_keyless_means_that_there_was_never_a_key(self) -> None:
        assert tenants({"id": "acme"}).keyless
        assert not tenants(CONFIGURED).keyless
        assert not tenants(given=access(key("acme", 1))).keyless
        assert not tenants(given=access(revoked=(1,))).keyless

    def test_a_key_in_force_survives_pickling(self) -> None:
        (found,) = tenants(CONFIGURED).keys_in_force()
        assert pickle.loads(pickle.dumps(found)) == found
