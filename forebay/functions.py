"""Functions over a gateway, for scripts that want one line instead of an object.

Each takes an optional `gateway`; without one they share a gateway that `configure_gateway` sets, or
that is made with the defaults on first use and closed when the interpreter exits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from forebay.config import GatewayConfig
from forebay.errors import ConfigurationError
from forebay.gateway import LiteLLMGateway, Runtime
from forebay.schemas import EmbedResponse, GenerateResponse


class _Shared:
    """The gateway these functions use when they are given none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gateway: LiteLLMGateway | None = None
        # `atexit` would be too late: thread pools, and Ray, are shut down by then.
        threading._register_atexit(self.set, None)  # type: ignore[attr-defined]

    def get(self) -> LiteLLMGateway:
        with self._lock:
            if self._gateway is None:
                self._gateway = LiteLLMGateway()
            return self._gateway

    def set(self, gateway: LiteLLMGateway | None) -> None:
        with self._lock:
            old, self._gateway = self._gateway, gateway
        if old is not None and old is not gateway:
            old.close()


_shared = _Shared()


def create_gateway(
    providers: Sequence[str] | None = None,
    default_model: str | None = None,
    api_keys: Mapping[str, str] | None = None,
    *,
    runtime: Runtime = "auto",
    namespace: str = "forebay",
    **fields: Any,
) -> LiteLLMGateway:
    """A gateway from keyword arguments: every field of `GatewayConfig` is one.

    Args:
        providers: provider names (`"openai"`, …) whose usual models are made available; their
            keys come from `api_keys` or from the environment (`OPENAI_API_KEY`, …).
        default_model: the group that answers when no model is named.
        api_keys: provider name → key.

    Raises:
        ConfigurationError: a field is unknown, has a wrong value or is out of range.
    """
    config = GatewayConfig.for_providers(
        providers, default_model=default_model, api_keys=dict(api_keys or {}), **fields
    )
    return LiteLLMGateway(config, runtime=runtime, namespace=namespace)


def configure_gateway(
    config: GatewayConfig | None = None, *, runtime: Runtime = "auto", **fields: Any
) -> LiteLLMGateway:
    """Make the gateway that these functions share from now on, and return it.

    Raises:
        ConfigurationError: as `create_gateway`, or both `config` and fields are given.
    """
    if config is not None and fields:
        raise ConfigurationError(f"give config or fields, not both: {', '.join(sorted(fields))}")
    gateway = (
        create_gateway(runtime=runtime, **fields)
        if fields
        else LiteLLMGateway(config, runtime=runtime)
    )
    _shared.set(gateway)
    return gateway


def generate_text(
    prompt: str,
    model: str | None = None,
    *,
    gateway: LiteLLMGateway | None = None,
    **keywords: Any,
) -> str:
    """The text for a prompt."""
    response: GenerateResponse = (gateway or _shared.get()).generate(prompt, model, **keywords)
    return response.text


async def generate_text_async(
    prompt: str,
    model: str | None = None,
    *,
    gateway: LiteLLMGateway | None = None,
    **keywords: Any,
) -> str:
    """As `generate_text`."""
    chosen = gateway or _shared.get()
    response: GenerateResponse = await chosen.generate_async(prompt, model, **keywords)
    return response.text


def stream_text(
    prompt: str,
    model: str | None = None,
    *,
    gateway: LiteLLMGateway | None = None,
    **keywords: Any,
) -> AsyncIterator[str]:
    """The text for a prompt, piece by piece."""
    return (gateway or _shared.get()).generate_stream(prompt, model, **keywords)


def generate_embeddings(
    texts: str | Sequence[str],
    model: str | None = None,
    *,
    gateway: LiteLLMGateway | None = None,
    **keywords: Any,
) -> list[list[float]]:
    """One vector per text, in the order given."""
    response: EmbedResponse = (gateway or _shared.get()).embed(texts, model, **keywords)
    return response.embeddings


async def generate_embeddings_async(
    texts: str | Sequence[str],
    model: str | None = None,
    *,
    gateway: LiteLLMGateway | None = None,
    **keywords: Any,
) -> list[list[float]]:
    """As `generate_embeddings`."""
    response = await (gateway or _shared.get()).embed_async(texts, model, **keywords)
    return response.embeddings


async def batch_generate_async(
    prompts: Sequence[str],
    model: str | None = None,
    *,
    max_concurrent: int = 5,
    gateway: LiteLLMGateway | None = None,
    **keywords: Any,
) -> list[GenerateResponse | Exception]:
    """Answers to many prompts, in their order, at most `max_concurrent` at a time.

    A prompt that fails has its exception in its place; the others go on.

    Raises:
        ConfigurationError: `max_concurrent` is less than 1.
    """
    if max_concurrent < 1:
        raise ConfigurationError("max_concurrent must be at least 1", param="max_concurrent")
    chosen = gateway or _shared.get()
    places = asyncio.Semaphore(max_concurrent)

    async def one(prompt: str) -> GenerateResponse:
        async with places:
            response: GenerateResponse = await chosen.generate_async(prompt, model, **keywords)
            return response

    results = await asyncio.gather(*(one(prompt) for prompt in prompts), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
    return [r for r in results if isinstance(r, GenerateResponse | Exception)]


def batch_generate(
    prompts: Sequence[str],
    model: str | None = None,
    *,
    max_concurrent: int = 5,
    gateway: LiteLLMGateway | None = None,
    **keywords: Any,
) -> list[GenerateResponse | Exception]:
    """As `batch_generate_async`, for sync code."""
    chosen = gateway or _shared.get()
    return chosen.run(
        batch_generate_async(
            prompts, model, max_concurrent=max_concurrent, gateway=chosen, **keywords
        )
    )
