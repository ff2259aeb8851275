"""How many replicas answer where the configuration leaves it to the machine."""

from __future__ import annotations

import pytest

from deployments.fleet import CORES_PER_REPLICA, CPU_SHARE, Cores, Fleet, fit, fleet_of
from forebay.config import Replicas, SystemConfig, load


def sized(replicas: str) -> SystemConfig:
    return load(None, {"FOREBAY_SERVER_REPLICAS": replicas})


@pytest.mark.parametrize(("cores", "replicas"), [(1, 1), (2, 1), (4, 3), (8, 6), (16, 12)])
def test_haproxy_and_the_owners_keep_their_share(cores: float, replicas: int) -> None:
    fleet = fit(Cores(cores))

    assert fleet.replicas == Replicas(min=replicas, max=replicas)
    assert fleet.cpus == CPU_SHARE


def test_a_head_without_cores_still_gets_one() -> None:
    assert fit(Cores(0)).replicas == Replicas(min=1, max=1)


def test_where_nodes_come_and_go_it_is_a_range_that_nodes_come_for() -> None:
    fleet = fit(Cores(4, most=32))

    assert fleet.replicas == Replicas(min=3, max=25)
    assert fleet.cpus == CORES_PER_REPLICA
    assert fleet.why.startswith("3 to 25 replicas, by load, for 4 cores of the Ray cluster")


def test_a_cluster_that_is_as_large_as_it_gets_has_a_number() -> None:
    assert fit(Cores(4, most=4)) == fit(Cores(4))


def test_a_cluster_without_a_bound_has_one_for_replicas() -> None:
    assert fit(Cores(4, most=float(2**63))).replicas.max == 512


def test_a_number_that_is_given_holds() -> None:
    assert fleet_of(sized("3")) == Fleet(
        Replicas(min=3, max=3), CPU_SHARE, "3 replicas, as configured"
    )
    assert fleet_of(sized("{min: 1, max: 8}")).why == "1 to 8 replicas, as configured"
