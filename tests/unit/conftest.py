"""What unit tests of several files stand on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.house import House, open_house


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
