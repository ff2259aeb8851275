"""In what form a deployment is asked for its vectors.

Base64 of little-endian float32 costs a thirtieth of what lists of numbers do, but not everybody
means that by `encoding_format: base64`: Bedrock and Cohere mean quantised vectors, Perplexity int8.

Rule 1: TRUSTED providers are asked for base64 at once. PROBED ones, and servers that speak OpenAI's
        language at an address of their own, are asked for it by one call, and by all after that
        has shown what came; calls beside it ask for floats. Nobody else is asked.
Rule 2: a deployment that has once answered with something else is asked for floats from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from forebay.routing import Deployment

TRUSTED = frozenset(
    {"openai", "azure", "hosted_vllm", "infinity", "voyage", "openrouter", "nvidia_nim"}
)
"""Providers whose documentation says float32; of `openai`, OpenAI's own address."""
PROBED = frozenset(
    {
        *("together_ai", "litellm_proxy", "nebius", "wandb", "mistral", "xinference", "dashscope"),
        *("qwencloud", "qwen_ai_platform", "volcengine", "vercel_ai_gateway", "cometapi", "edenai"),
        "github_copilot",
    }
)
"""Providers to whom LiteLLM hands the word on as it is."""
KNOWN_MAX = 1_000
"""Deployments that something is known of; above it all are forgotten, and asked again."""

BASE64, FLOAT = "base64", "float"


class Encodings:
    """Owns what is known of the deployments' base64. Bounded by KNOWN_MAX.

    Failure behaviour: of a first call that fails for another reason nothing is learnt, and the next
    one is the first. Usable from several event loops: each step is one look-up.
    """

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}  # whether base64 is float32 there
        self._asked: set[str] = set()

    def begin(self, deployment: Deployment) -> tuple[str | None, bool]:
        """The `encoding_format` to ask for, None for nothing, and whether it is looked at closely.

        A call that is told so ends with `learn` or `end`.
        """
        own, known = deployment.params.get("encoding_format"), self._known.get(deployment.id)
        if known is False or own == FLOAT:
            return FLOAT, False
        if own == BASE64 or (deployment.provider in TRUSTED and not _is_elsewhere(deployment)):
            return BASE64, known is None
        if deployment.provider not in PROBED | {"openai"}:
            return None, False
        if known:
            return BASE64, False
        if deployment.id in self._asked:
            return FLOAT, False
        self._asked.add(deployment.id)
        return BASE64, True

    def learn(self, deployment: Deployment, *, float32: bool) -> None:
        """What was asked for in base64 has come, and was float32 or something else."""
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[deployment.id] = float32
        self._asked.discard(deployment.id)

    def end(self, deployment: Deployment) -> None:
        """The call is over. If it has taught nothing, the next one may."""
        self._asked.discard(deployment.id)


def _is_elsewhere(deployment: Deployment) -> bool:
    """Whether OpenAI's language is spoken by somebody else."""
    if deployment.provider != "openai":
        return False
    base = deployment.params.get("api_base") or deployment.params.get("base_url")
    if base is None:
        return False
    host = urlsplit(str(base)).hostname or ""
    return host != "openai.com" and not host.endswith(".openai.com")
