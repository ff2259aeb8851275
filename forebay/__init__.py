"""Forebay: an LLM gateway that is an actor system on Ray.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LiteLLMGateway": "gateway",
    "GatewayConfig": "config",
    "RateLimitConfig": "config",
    "CircuitBreakerConfig": "config",
    "CacheConfig": "config",
    "KVCacheManager": "kv_cache",
    "GenerateResponse": "schemas",
    "EmbedResponse": "schemas",
    "HealthCheckResult": "schemas",
    "FeedbackType": "feedback",
    "ValidationLevel": "validation",
    "create_gateway": "functions",
    "configure_gateway": "functions",
    "generate_text": "functions",
    "generate_text_async": "functions",
    "stream_text": "functions",
    "generate_embeddings": "functions",
    "generate_embeddings_async": "functions",
    "batch_generate": "functions",
    "batch_generate_async": "functions",
}

__all__ = [
    "CacheConfig",
    "CircuitBreakerConfig",
    "EmbedResponse",
    "FeedbackType",
    "GatewayConfig",
    "GenerateResponse",
    "HealthCheckResult",
    "KVCacheManager",
    "LiteLLMGateway",
    "RateLimitConfig",
    "ValidationLevel",
    "__version__",
    "batch_generate",
    "batch_generate_async",
    "configure_gateway",
    "create_gateway",
    "errors",
    "generate_embeddings",
    "generate_embeddings_async",
    "generate_text",
    "generate_text_async",
    "stream_text",
]

if TYPE_CHECKING:
    from forebay import errors
    from forebay.config import CacheConfig, CircuitBreakerConfig, GatewayConfig, RateLimitConfig
    from forebay.feedback import FeedbackType
    from forebay.functions import (
        batch_generate,
        batch_generate_async,
        configure_gateway,
        create_gateway,
        generate_embeddings,
        generate_embeddings_async,
        generate_text,
        generate_text_async,
        stream_text,
    )
    from forebay.gateway import LiteLLMGateway
    from forebay.kv_cache import KVCacheManager
    from forebay.schemas import EmbedResponse, GenerateResponse, HealthCheckResult
    from forebay.validation import ValidationLevel


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("forebay.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'forebay' has no attribute {name!r}")
    return getattr(importlib.import_module(f"forebay.{home}"), name)


def __dir__() -> list[str]:
    return __all__
