"""What unit tests of several files stand on."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.house import House, open_house
from tests.support.postgres_server import PostgresServer, postgres_server

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """What was imported by now lasts: Python's collector need not walk over it again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests of a run that need one; each takes a schema of its own."""
    with postgres_server() as server:
        yield server


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[House]]]:
    """Opens houses, as `open_house` does, and closes them in the end."""
    houses: list[House] = []

    async def build(**how: Any) -> House:
        houses.append(await open_house(tmp_path, **how))
        return houses[-1]

    yield build
    for one in houses:
        await one.system.close()
