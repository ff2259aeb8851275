"""What a call costs: the deployment's own prices, else LiteLLM's list; None when neither knows.

Rule 1: money is integer nano-USD, added up in decimals.
Rule 2: unknown is None and never 0; only the embedded models are free.
Rule 3: a deployment's own prices never reach LiteLLM, which would change its list for the whole
        process.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from actors.ledger.policy import nano

if TYPE_CHECKING:
    from forebay.routing import Deployment

LOCAL = "local"
NAMES_MAX = 10_000  # model names remembered as priced or not; above it the memory is emptied

INPUT, OUTPUT = "input_cost_per_token", "output_cost_per_token"
CACHE_READ, CACHE_WRITE = "cache_read_input_token_cost", "cache_creation_input_token_cost"
OWN = (INPUT, OUTPUT, CACHE_READ, CACHE_WRITE)


def is_price(name: str) -> bool:
    """Whether a name of `litellm_params` or `model_info` says what something costs."""
    return "_cost" in name or name.startswith("cost_")


class Prices:
    """Prices of calls; reads LiteLLM's list through `litellm`, once that is imported.

    Owns what it has learnt about model names, bounded by NAMES_MAX. Failure behaviour: a model
    that LiteLLM cannot price, for whatever reason, has no price.
    """

    def __init__(self, litellm: Any = None) -> None:
        self.litellm = litellm
        self._listed: dict[str, bool] = {}

    def of_answer(
        self, deployment: Deployment, usage: Mapping[str, Any] | None, model: str, usd: float | None
    ) -> int | None:
        """The price of an answer for which LiteLLM says `usd`, in nano-USD."""
        if usd is None or self._has_own(deployment):
            return self.of_usage(deployment, usage, model)
        if usd == 0 and not self._is_listed(self._name(deployment)):
            return None
        return nano(usd)

    def of_usage(
        self, deployment: Deployment, usage: Mapping[str, Any] | None, model: str | None = None
    ) -> int | None:
        """The price of `usage`, in nano-USD. `model` is the name that the provider reported."""
        if self._has_own(deployment):
            return None if usage is None else _added_up(_own(deployment), usage)
        if deployment.provider == LOCAL:
            return 0
        if usage is None or self.litellm is None:
            return None
        names = [self._name(deployment)]
        if model:
            names.append(f"{deployment.provider}/{model.removeprefix(deployment.provider + '/')}")
        for name in names:
            if self._is_listed(name):
                return self._from_list(name, usage)
        return None

    def _name(self, deployment: Deployment) -> str:
        base = deployment.info.get("base_model") or deployment.params.get("base_model")
        return base if isinstance(base, str) else deployment.model

    def _has_own(self, deployment: Deployment) -> bool:
        return any(is_price(name) for name in deployment.params) or any(
            name in deployment.info for name in (INPUT, OUTPUT)
        )

    def _is_listed(self, name: str) -> bool:
        known = self._listed.get(name)
        if known is None:
            known = self._from_list(name, {"prompt_tokens": 1, "completion_tokens": 1}) is not None
            if len(self._listed) >= NAMES_MAX:
                self._listed.clear()
            self._listed[name] = known
        return known

    def _from_list(self, name: str, usage: Mapping[str, Any]) -> int | None:
        usage = {**usage, "total_tokens": usage.get("total_tokens") or 0}
        try:
            prompt_usd, completion_usd = self.litellm.cost_calculator.cost_per_token(
                model=name,
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
                usage_object=self.litellm.Usage(**usage),
            )
        except Exception:  # noqa: BLE001 - LiteLLM says "not mapped" in many ways; None says it here
            return None
        return nano(prompt_usd + completion_usd)


def _own(deployment: Deployment) -> dict[str, Decimal] | None:
    """The deployment's own prices in USD per token; None when they are not all per token."""
    given = {name: value for name, value in deployment.info.items() if is_price(name)}
    given |= {name: value for name, value in deployment.params.items() if is_price(name)}
    prices = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in OWN:
            return None
        try:
            prices[name] = Decimal(str(getattr(value, "get_secret_value", lambda v=value: v)()))
        except InvalidOperation:
            return None
    return prices


def _added_up(prices: Mapping[str, Decimal] | None, usage: Mapping[str, Any]) -> int | None:
    if prices is None:
        return None
    details = usage.get("prompt_tokens_details") or {}
    read = int(details.get("cached_tokens") or 0)
    written = int(usage.get("cache_creation_input_tokens") or 0)
    prompt = int(usage.get("prompt_tokens") or 0)
    free = Decimal(0)
    usual = prices.get(INPUT, free)
    usd = (
        usual * max(0, prompt - read - written)
        + prices.get(CACHE_READ, usual) * min(read, prompt)
        + prices.get(CACHE_WRITE, usual) * min(written, prompt)
        + prices.get(OUTPUT, free) * int(usage.get("completion_tokens") or 0)
    )
    return nano(usd)
