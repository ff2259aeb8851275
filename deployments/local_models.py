"""The embedded models as Serve deployments: real small models, no key and no network.

Each loads its model in the background after the replica is ready, so that a gateway starts to
answer before they do; the first request for a model waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from forebay.providers.local import InProcessModels


class _Loaded:
    """One model of this process, loading since the replica started."""

    def __init__(self, model: str) -> None:
        self._models = InProcessModels()
        self._loading = asyncio.get_running_loop().create_task(self._models.load(model))

    async def get(self) -> InProcessModels:
        await asyncio.shield(self._loading)
        return self._models


class LocalChat:
    """SmolLM2-135M, answering in OpenAI's shape. Bounded by Serve's `max_ongoing_requests`."""

    async def __init__(self, model: str) -> None:  # type: ignore[misc]
        self._model = _Loaded(model)

    async def chat(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        """One whole answer."""
        return await (await self._model.get()).chat(model, body)

    async def chat_stream(self, model: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """OpenAI chunks, one per token."""
        async for chunk in (await self._model.get()).chat_stream(model, body):
            yield chunk


class LocalEmbed:
    """WordLlama vectors: float32 of shape (n, d), d one of 64, 128, 256."""

    async def __init__(self, model: str) -> None:  # type: ignore[misc]
        self._model = _Loaded(model)

    async def embed(
        self, model: str, texts: list[str], dimensions: int | None
    ) -> tuple[np.ndarray, int]:
        """The vectors and how many tokens the texts had."""
        return await (await self._model.get()).embed(model, texts, dimensions)
