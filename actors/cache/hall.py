"""Where held messages wait for news."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class Hall:
    """Owns who waits for news of which name: one future per message, under each of its names.

    Bounded by what its owner lets in. Failure behaviour: none of its own; who leaves is forgotten.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    async def wait(self, names: Iterable[str], timeout_s: float) -> None:
        """Until somebody tells one of the names, or for `timeout_s` seconds."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        names = list(names)
        for name in names:
            self._waiting.setdefault(name, set()).add(told)
        self._count += 1
        try:
            await asyncio.wait([told], timeout=timeout_s)
        finally:
            self._count -= 1
            for name in names:
                waiting = self._waiting.get(name)
                if waiting is not None:
                    waiting.discard(told)
                    if not waiting:
                        del self._waiting[name]

    def tell(self, name: str) -> None:
        for told in self._waiting.pop(name, ()):
            if not told.done():
                told.set_result(None)

    def tell_all(self) -> None:
        for name in list(self._waiting):
            self.tell(name)
