"""How many replicas answer, and what each of them asks Ray for.

`auto` goes by the cores of the Ray cluster. A replica turns one core's worth of requests; HAProxy
and the owners need a share of another one beside it. Where Ray adds nodes by itself, the number is
a range, from what fits now to what fits when all nodes are there, and each replica asks for the
cores that it needs, so that nodes come for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from forebay.config import Replicas, SystemConfig

CPU_SHARE = 0.1  # calls wait for providers; two cores must carry every process of the system
CORES_PER_REPLICA = 1.25
"""One for itself; beside it, at full load, HAProxy takes a tenth of one, the ledger's owner an
eighth, the other owners a twentieth."""
REPLICAS_MAX = 512  # of `auto`, whatever a cluster says that it may grow to


@dataclass(frozen=True, slots=True)
class Cores:
    """CPUs that Ray has now, and when it has added all nodes that it may; None: it adds none."""

    now: float
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """Replicas, the CPUs that each asks Ray for, and why it is so many, in a sentence."""

    replicas: Replicas
    cpus: float
    why: str


def fit(cores: Cores) -> Fleet:
    """The replicas that so many cores carry, at least one."""
    fewest, per = _carried(cores.now), CORES_PER_REPLICA
    beside = f"{per:g} for each, with what HAProxy and the owners need"
    most = fewest if cores.most is None else max(fewest, _carried(cores.most))
    if most == fewest:
        why = f"{_replicas(fewest)}, for {cores.now:g} cores of the Ray cluster ({beside})"
        return Fleet(Replicas(min=fewest, max=fewest), CPU_SHARE, why)
    why = (
        f"{fewest} to {_replicas(most)}, by load, for {cores.now:g} cores of the Ray cluster, "
        f"which may grow ({beside})"
    )
    return Fleet(Replicas(min=fewest, max=most), CORES_PER_REPLICA, why)


def fleet_of(config: SystemConfig) -> Fleet:
    """What the configuration says; where it leaves it to the machine, what fits Ray's cluster.

    Without a connection to Ray, as in the builder that `serve run` calls, this machine counts.
    """
    told = config.server.replicas
    if told == "auto":
        return fit(_cores())
    many = _replicas(told.max) if told.min == told.max else f"{told.min} to {_replicas(told.max)}"
    return Fleet(told, CPU_SHARE, f"{many}, as configured")


def _carried(cores: float) -> int:
    return max(1, min(REPLICAS_MAX, int(cores / CORES_PER_REPLICA)))


def _replicas(count: int) -> str:
    return "1 replica" if count == 1 else f"{count} replicas"


def _cores() -> Cores:
    import ray
    from ray._private.state import state

    if not ray.is_initialized():
        return Cores(float(len(os.sched_getaffinity(0))))
    now = float(ray.cluster_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]
    grown = state.get_max_resources_from_cluster_config()
    return Cores(now, None if grown is None else float(grown.get("CPU", 0.0)))
