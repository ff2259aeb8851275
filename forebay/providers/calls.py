"""One call in LiteLLM's words.

Rule 1: a deployment's parameters yield to the caller's, but what says where or as whom a provider
        is called comes from the deployment alone.
Rule 2: what is not for the provider is left out here, by name; nothing else is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from forebay import schemas
from forebay.errors import GatewayError, InvalidRequest
from forebay.providers.failures import error_of
from forebay.providers.prices import is_price
from forebay.providers.redaction import secrets_in

if TYPE_CHECKING:
    from forebay.routing import Deployment

LOCAL = "local"

TIMEOUTS_S = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1800.0, 7200.0)

NOT_HANDED_ON = frozenset(
    {
        # the Router's, and ours
        *("model", "weight", "order", "rpm", "tpm", "max_parallel_requests", "model_info", "tags"),
        *("timeout", "stream_timeout", "max_retries", "num_retries", "cooldown_time"),
        *("allowed_params", "encoding_format", "lane", "max_budget", "budget_duration"),
        *("fallbacks", "context_window_fallback_dict", "retry_policy", "model_list", "stream"),
        # what is off here
        *("cache", "caching", "ttl", "callbacks", "success_callback", "failure_callback"),
    }
)
"""Names of `litellm_params` that LiteLLM's own functions are not given; nor are prices."""

_PLAIN = frozenset({"prompt", "input"})  # texts and token ids, maybe a great many

MANY_PROMPTS = frozenset({"azure_text", LOCAL})
"""Providers that take several prompts at once; for all others LiteLLM would melt them into one."""


class Call:
    """One call in LiteLLM's words: a deployment, its resolved `params`, and how long it may take.

    `patience` names the parameter by which a deployment may shorten the time.
    """

    __slots__ = ("_deployment", "_litellm", "_params", "limit_s", "provider")

    def __init__(
        self,
        litellm: Any,
        deployment: Deployment,
        params: dict[str, Any],
        timeout_s: float,
        patience: str = "timeout",
    ) -> None:
        self.provider = deployment.provider
        self._litellm = litellm
        self._deployment = deployment
        self._params = params
        own = params.get(patience, params.get("timeout"))
        self.limit_s = timeout_s
        if isinstance(own, (int, float, str)) and _is_number(own):
            self.limit_s = min(timeout_s, float(own))

    def asked(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The caller's parameters, without those that are not for the provider: a copy that
        LiteLLM may change, as it does with messages and tools.

        Raises:
            InvalidRequest: one says where or as whom the provider is to be called, or LiteLLM
                would answer something else than was asked.
        """
        asked = {
            name: value if name in _PLAIN else _copied(value)
            for name, value in body.items()
            if value is not None
        }
        for name in asked:
            if schemas.connects(name):
                raise InvalidRequest.about(name, f"{name} may not be set by a caller")
        for name in ("model", "stream", "stream_options"):
            asked.pop(name, None)
        # LiteLLM takes `metadata` for its own; OpenAI wants it only with what it is to store.
        metadata = asked.pop("metadata", None)
        if metadata and asked.get("store") and self.provider in ("openai", "azure"):
            asked["extra_body"] = {"metadata": metadata}
        prompts = asked.get("prompt")
        one_by_one = not self.is_native_text or self.provider == "together_ai"
        if isinstance(prompts, list) and one_by_one and self.provider not in MANY_PROMPTS:
            if len(prompts) != 1:
                raise InvalidRequest.about(
                    "prompt",
                    f"{self._deployment.group} takes one prompt per request",
                    model=self._deployment.group,
                    provider=self.provider,
                )
            asked["prompt"] = prompts[0]
        return asked

    def keywords(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What LiteLLM's function is called with; the caller's parameters over the deployment's."""
        own = {
            name: value
            for name, value in self._params.items()
            if name not in NOT_HANDED_ON and not is_price(name)
        }
        allowed = own.pop("allowed_openai_params", None)
        if allowed and "allowed_openai_params" in asked:
            asked = {**asked, "allowed_openai_params": [*allowed, *asked["allowed_openai_params"]]}
        elif allowed:
            own["allowed_openai_params"] = allowed
        timeout_s = next((t for t in TIMEOUTS_S if t > self.limit_s), self.limit_s)
        return {
            **own,
            **asked,
            "model": self._deployment.model,
            "timeout": timeout_s,
            "num_retries": 0,
            "max_retries": 0,
        }

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever fails in here becomes an error of ours."""
        outer = sys.exception()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - all of it is raised again, translated
            raise self.error(error, outer) from None

    def error(self, error: BaseException, outer: BaseException | None = None) -> GatewayError:
        """What a failure becomes; of what lies behind it, all up to `outer`."""
        return error_of(
            error,
            provider=self.provider,
            model=self._deployment.group,
            secrets=secrets_in(self._params),
            outer=outer,
            filled=self._deployment.filled_from is not None,
        )

    @property
    def is_native_text(self) -> bool:
        """Whether LiteLLM asks OpenAI's own route for texts, and does not make a chat of them."""
        litellm = self._litellm
        if self.provider == "openai":
            name = self._deployment.model.removeprefix("openai/")
            return name not in litellm.open_ai_chat_completion_models
        own_route = litellm.openai_text_completion_compatible_providers
        return self.provider == "text-completion-openai" or self.provider in own_route


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def _is_number(value: Any) -> bool:
    try:
        return 0.0 < float(value) < float("inf")
    except ValueError:
        return False
