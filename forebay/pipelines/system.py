"""What a job asks of the system behind its gateway: answers, limits, prices, and a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from forebay.pipelines.estimate import FOREIGN, Rates

if TYPE_CHECKING:
    from forebay.call import Result
    from forebay.gateway import LiteLLMGateway
    from forebay.routing import Deployment

Route = Literal["chat", "embedding"]
CHAT_OVERHEAD_TOKENS = 32
"""What a chat format adds to one message, at most."""
BYTES_PER_TOKEN = 4
"""Of English text; what is gone by where there is no tokenizer at all."""


async def answer(
    gateway: LiteLLMGateway,
    route: Route,
    body: Mapping[str, Any],
    *,
    partial: bool = False,
    anew: bool = False,
) -> Result:
    """One request of a job: others' requests go before it. To be awaited on the gateway's loop.

    `partial`: texts that the provider refuses fail alone, in `Facts.failed`. `anew`: neither a
    stored answer nor a refusal of late counts.

    Raises:
        GatewayError: every failure.
    """
    from forebay.call import Call

    call = Call.of(route, body)
    call.bulk, call.partial, call.anew = True, partial, anew
    call.cache_read = not anew
    return await gateway._system.pipeline.answer(call)


def warm(gateway: LiteLLMGateway) -> None:
    """See to it that prices and tokenizers are there."""
    gateway.run(gateway._system.provider.warm())


def deployments_of(gateway: LiteLLMGateway, model: str | None, route: Route) -> list[Deployment]:
    """Those that answer for a model group; None is the default one.

    Raises:
        ModelNotFound: there is no such group.
    """
    table = gateway._system.table
    return list(table.group(model or table.default(route)).deployments)


def rates_of(gateway: LiteLLMGateway, model: str | None, route: Route) -> Rates:
    """The group's dearest price, and its deployments' limits together."""
    deployments = deployments_of(gateway, model, route)
    provider = gateway._system.provider
    warm(gateway)
    bounds = [provider.price_bound(deployment) for deployment in deployments]
    known = [bound for bound in bounds if bound is not None]
    whole = len(known) == len(deployments)
    rpm, tpm = [d.rpm for d in deployments], [d.tpm for d in deployments]
    caps = [gateway._system.caps_for(deployment) for deployment in deployments]
    return Rates(
        float(max(bound.plain.prompt for bound in known)) if whole else None,
        float(max(bound.plain.completion for bound in known)) if whole else None,
        None if None in rpm else sum(filter(None, rpm)),
        None if None in tpm else sum(filter(None, tpm)),
        min(cap.items_max for cap in caps),
        min(cap.tokens_max for cap in caps),
    )


def counts_of(
    gateway: LiteLLMGateway, model: str | None, route: Route, texts: Sequence[str]
) -> tuple[list[tuple[int, int]], bool]:
    """(bytes, tokens) of texts, and whether the tokens are the model's own count."""
    from forebay.providers.tokenizers import encoding_of

    deployment = deployments_of(gateway, model, route)[0]
    provider = gateway._system.provider
    counts, exact = [], encoding_of(deployment) is not None
    for text in texts:
        size = len(text.encode("utf-8", "surrogatepass"))
        tokens = provider.count_tokens(deployment, text)
        if tokens is None:
            tokens, exact = math.ceil(size / BYTES_PER_TOKEN * FOREIGN), False
        counts.append((size, tokens))
    return counts, exact


def most_nano_of_texts(
    gateway: LiteLLMGateway, model: str | None, texts: Sequence[str | None]
) -> int:
    """What it costs at most to embed texts, in nano-USD."""
    words = [text for text in texts if text]
    if not words:
        return 0
    costs = [0]
    for deployment in deployments_of(gateway, model, "embedding"):
        bound = gateway._system.provider.price_bound(deployment)
        if bound is not None:
            tokens = gateway._system.bounds.of_texts(deployment, words)
            costs.append(bound.plain.nano(tokens, 0))
    return max(costs)


def most_nano_of_chat(
    gateway: LiteLLMGateway, model: str | None, prompts: Sequence[str], max_tokens: int
) -> int:
    """What it costs at most to ask each prompt, in nano-USD."""
    deployments = deployments_of(gateway, model, "chat")
    costs = [0]
    for deployment in deployments:
        bound = gateway._system.provider.price_bound(deployment)
        if bound is not None:
            tokens = gateway._system.bounds.of_texts(deployment, prompts)
            tokens += CHAT_OVERHEAD_TOKENS * len(prompts)
            costs.append(bound.plain.nano(tokens, max_tokens * len(prompts)))
    return max(costs)
