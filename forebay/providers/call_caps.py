"""How much providers take in one embedding call.

Rule 1: `model_info` has the last word: `max_texts_per_call`, `max_tokens_per_call`,
        `max_bytes_per_call`.
Rule 2: `batch_size` lowers what a provider is known to take, and is all that is known of others.
Rule 3: what is written here may be out of date; the Batcher learns less from refusals, never more.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from actors.batcher.policy import Caps
from forebay.model_list import CALL_CAPS

if TYPE_CHECKING:
    from forebay.routing import Deployment

UNKNOWN = Caps(items_max=96, tokens_max=16_384)
LOCAL = Caps(items_max=256, tokens_max=65_536)
"""Embedded models: 256 texts take 10 ms, and nobody behind them waits longer."""

OPENAI = Caps(items_max=2048, tokens_max=300_000)
_TABLE: tuple[tuple[str, str, Caps], ...] = (
    # provider, model (regular expressions, whole), most of one call
    ("local", ".*", LOCAL),
    ("openai|azure|azure_ai|github_copilot", ".*", OPENAI),
    ("cohere.*", ".*", Caps(items_max=96, tokens_max=128_000)),
    ("bedrock.*", ".*cohere.*", Caps(items_max=96, tokens_max=49_152)),
    ("bedrock.*", ".*", Caps(items_max=1)),  # LiteLLM asks for one text after the other
    ("voyage", ".*(-4-large|-3-large|code-3|finance-2|law-2).*", Caps(1000, 120_000)),
    ("voyage", ".*lite.*", Caps(1000, 1_000_000)),
    ("voyage", ".*", Caps(1000, 320_000)),
    ("gemini", ".*", Caps(items_max=100, tokens_max=204_800)),
    ("vertex_ai.*", ".*gemini-embedding.*", Caps(items_max=1)),
    ("vertex_ai.*", ".*", Caps(items_max=250, tokens_max=20_000)),
    ("mistral", ".*", Caps(items_max=1024, tokens_max=16_384)),
    ("deepinfra", ".*", Caps(items_max=1024, tokens_max=300_000)),
    ("cloudflare", ".*", Caps(items_max=100, tokens_max=51_200)),
    ("hosted_vllm|infinity|nvidia_nim|ollama", ".*", Caps(items_max=512, tokens_max=300_000)),
    ("huggingface", ".*", Caps(items_max=32, tokens_max=16_384)),
)
_COMPILED = [
    (re.compile(provider), re.compile(model, re.IGNORECASE), caps)
    for provider, model, caps in _TABLE
]


def call_caps(deployment: Deployment, batch_size: int | None) -> Caps:
    """Most of one call to a deployment; `batch_size` as configured for all."""
    known = _known(deployment)
    caps = known or UNKNOWN
    items_max = caps.items_max
    if batch_size is not None:
        items_max = batch_size if known is None else min(batch_size, items_max)
    items, tokens, size = (deployment.info.get(name) for name in CALL_CAPS)
    return Caps(items or items_max, tokens or caps.tokens_max, size or caps.bytes_max)


def _known(deployment: Deployment) -> Caps | None:
    for provider, model, caps in _COMPILED:
        if provider.fullmatch(deployment.provider) and model.fullmatch(deployment.model):
            return caps
    return None
