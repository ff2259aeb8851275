"""Every owner killed under load, with and without Ray's restart: the system goes on."""

from __future__ import annotations

import os
import random
from typing import Any

import httpx
import pytest

from tests.support.owners import IN_FLIGHT_MIN, OWNERS, Load, alive_again, handle_of, identity
from tests.support.upstream import Upstream

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

FULL = bool(os.environ.get("FOREBAY_CHAOS_FULL"))
KILLS = 10 if FULL else 1
SEED = int(os.environ.get("FOREBAY_CHAOS_SEED") or random.SystemRandom().randrange(2**31))


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("for_good", [False, True], ids=["restarts", "for good"])
async def test_the_system_goes_on_when_an_owner_is_killed(
    ray_driver: Any,
    url: str,
    upstream: Upstream,
    capsys: pytest.CaptureFixture[str],
    owner: str,
    for_good: bool,
) -> None:
    """Everything answers as if nothing had happened, but for limits, which fail closed.

    While their owner is away 503 is right, and 429 when it is back with buckets that start empty:
    both say when to come back, and afterwards all is well again.
    """
    rng = random.Random(f"{SEED} {owner} {for_good}")
    upstream.script(latency=0.2)
    identities = {identity(ray_driver, owner)}
    load = Load(url, upstream)

    def kill() -> None:
        for _ in range(KILLS):
            load.pause(rng.uniform(0.0, 0.3))
            ray_driver.kill(handle_of(ray_driver, owner), no_restart=for_good)
            alive_again(ray_driver, owner)
            identities.add(identity(ray_driver, owner))
            load.pause(0.7)  # a new limiter lends nothing for one lease life

    await load.run(kill)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = {"model": "sim", "messages": [{"role": "user", "content": f"after {owner}"}]}
        after = await client.post("/v1/chat/completions", json=body)
    with capsys.disabled():
        print(
            f"\n  chaos: {owner} killed {KILLS} times ({'for good' if for_good else 'restarts'}), "
            f"seed {SEED}, at least {load.in_flight_min} in flight at each, "
            f"answers {dict(load.statuses)}"
        )

    allowed = {200, 429, 503} if owner.startswith("rate-limiter") else {200}
    assert set(load.statuses) <= allowed, load.details[:3]
    assert load.statuses[200] > IN_FLIGHT_MIN
    assert load.refused_without_retry_after == 0
    assert after.status_code == 200
    assert len(identities) == (1 + KILLS if for_good else 1)
