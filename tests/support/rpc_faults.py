"""Entries handed in over a Ray that loses messages: how many of them the ledger has in the end.

    python -m tests.support.rpc_faults DIRECTORY --entries 100000 --percent 5

Starts a Ray of its own in which so many per cent of all messages to actors are lost before they
arrive, as many while they are worked on, and as many answers on their way back. The last line says,
in JSON, what the desks have written and what the ledger's owner, an actor, has in its store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DESKS = 4
NAMESPACE = "faulty"
FAULTS = "RAY_testing_rpc_failure"
COST_NANO = 7
PER_PAUSE, PAUSE_S = 25, 0.01
PATIENCE_S = 300.0


def faults(percent: int) -> str:
    """Ray's own setting for it."""
    lost = {"req_failure_prob": percent, "resp_failure_prob": percent}
    every = {"num_failures": -1, **lost, "in_flight_failure_prob": percent}
    return json.dumps({"CoreWorkerService.grpc_client.PushTask": every})


async def write(new_ref: Callable[[], Any], count: int, directory: Path) -> dict[str, Any]:
    """So many entries from DESKS desks, until all are acknowledged; what the owner has then."""
    from actors.ledger.desk import LedgerDesk

    desks = [LedgerDesk(new_ref(), f"desk-{n}", spools=directory) for n in range(DESKS)]
    for desk in desks:
        await desk.start()
    for number in range(count):
        desk = desks[number % DESKS]
        entry = desk.open(
            request_id=f"request-{number}",
            tenant=f"tenant-{number % DESKS}",
            route="chat",
            model="any",
            deployment="any",
            most_nano=2 * COST_NANO,
        )
        desk.post(entry, prompt_tokens=1, completion_tokens=1, cost_nano=COST_NANO)
        if number % PER_PAUSE == 0:
            await asyncio.sleep(PAUSE_S)
    deadline = time.monotonic() + PATIENCE_S
    for desk in desks:
        while await desk.flush() and time.monotonic() < deadline:
            continue
    told = [desk.stats() for desk in desks]
    for desk in desks:
        await desk.close()
    ref = new_ref()
    return {
        "written": count,
        "acknowledged": sum(one["acknowledged"] for one in told),
        "failures": sum(one["failures"] for one in told),
        "rows": await ref.ask("count", timeout_s=60.0),
        "usage": await ref.ask("usage", timeout_s=60.0),
        "owner": await ref.ask("stats", timeout_s=60.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.support.rpc_faults", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--percent", type=int, default=5)
    arguments = parser.parse_args()
    # Ray reads both when it is imported.
    os.environ[FAULTS] = faults(arguments.percent)
    os.environ["RAY_AUTH_MODE"] = "disabled"

    import ray

    from actors import spawn
    from actors.ledger.owner import Ledger

    spec = spawn.OwnerSpec("ledger", Ledger, {"path": str(arguments.directory / "ledger.db")})
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        new_ref = lambda: spawn.RayRef(spec, NAMESPACE)  # noqa: E731
        told = asyncio.run(write(new_ref, arguments.entries, arguments.directory))
        spawn.remove(spec, NAMESPACE)
    finally:
        ray.shutdown()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
