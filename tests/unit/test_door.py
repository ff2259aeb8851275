"""The door past Serve: who goes through, and that each is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.replica import Door, door

CALL = {"type": "http", "path": "/v1/chat/completions", "root_path": ""}


class Counts:
    """What Serve keeps of requests."""

    def __init__(self) -> None:
        self.ongoing = 0
        self.told: list[tuple[str, bool]] = []

    def get_num_ongoing_requests(self) -> int:
        return self.ongoing

    def inc_num_ongoing_requests(self, note: Any) -> None:
        assert note == "note"
        self.ongoing += 1

    def dec_num_ongoing_requests(self, note: Any) -> None:
        assert note == "note"
        self.ongoing -= 1

    def record_request_metrics(self, *, route: str, latency_ms: float, is_error: bool) -> None:
        assert latency_ms >= 0
        self.told.append((route, is_error))


class House:
    """A replica with a door; `ways` are those that requests took."""

    def __init__(self, fails: bool = False) -> None:
        self.counts = Counts()
        self.ways: list[tuple[str, int]] = []
        replica = SimpleNamespace(_metrics_manager=self.counts, max_ongoing_requests=2)
        self._fails = fails
        self.door = Door(self._serves, replica, self._own, "note")

    async def ask(self, **scope: Any) -> None:
        async def nothing(*_: Any) -> Any: ...

        await self.door({**CALL, **scope}, nothing, nothing)

    async def _serves(self, *_: Any) -> None:
        self.ways.append(("Serve's", self.counts.ongoing))

    async def _own(self, *_: Any) -> None:
        self.ways.append(("own", self.counts.ongoing))
        if self._fails:
            raise ConnectionError("cut")


async def test_a_call_goes_straight_on_and_is_counted_meanwhile() -> None:
    house = House()
    await house.ask()
    assert house.ways == [("own", 1)]
    assert house.counts.ongoing == 0
    assert house.counts.told == [("/v1/chat/completions", False)]


@pytest.mark.parametrize(
    "scope",
    [
        {"path": "/health"},
        {"path": "/-/healthz"},
        {"path": "/v1/models/x"},
        {"root_path": "/below"},
        {"type": "websocket"},
        {"type": "lifespan", "path": ""},
    ],
)
async def test_all_else_goes_serves_way(scope: dict[str, Any]) -> None:
    house = House()
    await house.ask(**scope)
    assert house.ways == [("Serve's", 0)]


async def test_a_replica_that_has_its_fill_leaves_the_queue_to_serve() -> None:
    house = House()
    house.counts.ongoing = 2
    await house.ask()
    assert house.ways == [("Serve's", 2)]


async def test_a_call_that_is_cut_is_counted_too() -> None:
    house = House(fails=True)
    with pytest.raises(ConnectionError):
        await house.ask()
    assert house.counts.ongoing == 0
    assert house.counts.told == [("/v1/chat/completions", True)]


def test_outside_a_replica_there_is_no_door() -> None:
    async def app(*_: Any) -> None: ...

    assert door(app) is app
