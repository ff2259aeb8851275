"""The embedded models as Serve deployments, seen from any process of the cluster.

Where the deployments do not run, the models are loaded in this process on first use.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from forebay.errors import ProviderConnectionError
from forebay.providers.local import InProcessModels

APP = "forebay"
GATEWAY_DEPLOYMENT = "gateway"
CHAT_DEPLOYMENT = "local-chat"
EMBED_DEPLOYMENT = "local-embed"


class ServedModels:
    """Reaches `local-chat` and `local-embed` over Serve handles, kept once per process.

    Failure behaviour: a deployment that is gone is looked up again on the next call; the call that
    met it fails as a connection failure, which the pipeline may retry.
    """

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._own = InProcessModels()

    async def chat(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        handle = await self._handle(CHAT_DEPLOYMENT)
        if handle is None:
            return await self._own.chat(model, body)
        try:
            answer: dict[str, Any] = await handle.chat.remote(model, body)
        except Exception as error:
            raise self._lost(CHAT_DEPLOYMENT, error) from error
        return answer

    async def chat_stream(self, model: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        handle = await self._handle(CHAT_DEPLOYMENT)
        if handle is None:
            async for chunk in self._own.chat_stream(model, body):
                yield chunk
            return
        chunks = handle.options(stream=True).chat_stream.remote(model, body)
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            raise self._lost(CHAT_DEPLOYMENT, error) from error
        finally:
            chunks.cancel()

    async def embed(
        self, model: str, texts: list[str], dimensions: int | None
    ) -> tuple[np.ndarray, int]:
        handle = await self._handle(EMBED_DEPLOYMENT)
        if handle is None:
            return await self._own.embed(model, texts, dimensions)
        try:
            array, tokens = await handle.embed.remote(model, texts, dimensions)
        except Exception as error:
            raise self._lost(EMBED_DEPLOYMENT, error) from error
        return array, tokens

    async def close(self) -> None:
        self._handles.clear()
        await self._own.close()

    async def _handle(self, deployment: str) -> Any:
        """The handle, None where no such deployment runs."""
        if deployment not in self._handles:
            look_up = asyncio.get_running_loop().run_in_executor(None, _look_up, deployment)
            handle = await look_up
            if handle is None:
                return None
            self._handles[deployment] = handle
        return self._handles[deployment]

    def _lost(self, deployment: str, error: Exception) -> Exception:
        """What to raise for a failed call: errors of ours as they are, Serve's as lost."""
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import RayServeException

        if isinstance(error, RayActorError | RayServeException):
            self._handles.pop(deployment, None)
            return ProviderConnectionError(
                f"{deployment} is not running: {error}", provider="local"
            )
        if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            return error.cause
        return error


def _look_up(deployment: str) -> Any:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        applications = serve.status().applications
        if deployment not in applications[APP].deployments:
            return None
    except (KeyError, RayServeException):
        return None
    # By reference: Serve's gRPC transport would cap a message at 4 MB.
    handle: Any = serve.get_deployment_handle(deployment, APP)
    return handle.options(_by_reference=True)
