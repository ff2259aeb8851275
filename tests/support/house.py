"""A whole system of real owners in this process, and a provider that does as it is told."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from actors.batcher.policy import Text, Vectors
from actors.circuit_breaker.policy import State
from actors.ledger.policy import Entry
from forebay import replay
from forebay.call import Call
from forebay.codec import Answer
from forebay.config import SystemConfig
from forebay.errors import GatewayError, GatewayTimeout
from forebay.pipeline import Pipeline
from forebay.providers.base import Chunks, Resolve
from forebay.providers.prices import PriceBound, PromptCaching, Rate
from forebay.reckoning import Reckoner
from forebay.routing import Deployment
from forebay.system import System, open_inline
from tests.support.fake_time import settle

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def vector_of(text: Text) -> np.ndarray:
    """The vector that the provider has for a text, or for token ids."""
    numbers = text.encode() if isinstance(text, str) else text
    return np.array([len(text), sum(numbers), 1.0, 0.5], np.float32)


Step = (
    GatewayError | asyncio.Event | tuple[asyncio.Event, GatewayError] | Callable[[], object] | None
)


class Scripted:
    """A provider that answers "fine" unless told what to do, by deployment model.

    What it is told is a list of steps, one for each call: an error to raise, an event to wait
    for, or both; or a function to call. For streams, `between` is called and `cut` is raised after
    each chunk, and a word waits for its gate, where it has one. An answer costs `cost_nano`, and
    a token `token_nano` at most.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.bodies: list[Mapping[str, Any]] = []
        self.texts: list[list[Text]] = []
        self.cost_nano: int | None = 7
        self.token_nano: int | None = 1000
        self.usage: dict[str, int] | None = USAGE
        self.finish_reason: str | None = "stop"
        self.choices: list[dict[str, Any]] | None = None  # whole, in place of what is above
        self.words: tuple[str, ...] = ("one", "two")
        self.gates: list[asyncio.Event] = []
        self.steps: dict[str, list[Step]] = {}
        self.between: Callable[[], object] | None = None
        self.cut: GatewayError | None = None
        self.streams_open = 0

    async def chat(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Answer:
        self.bodies.append(body)
        try:
            async with asyncio.timeout(timeout_s):
                await self._step(deployment)
        except TimeoutError as error:
            if isinstance(error, GatewayError):
                raise
            raise GatewayTimeout("no answer", model=deployment.group) from None
        message = {"role": "assistant", "content": "fine"}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        choices = [choice] if self.choices is None else self.choices
        whole = {"id": "1", "object": "chat.completion", "choices": choices, "usage": self.usage}
        return Answer(whole, self.usage, self.cost_nano, deployment.model)

    completion = chat

    async def _chunks(self, deployment: Deployment) -> AsyncIterator[dict[str, Any]]:
        self.streams_open += 1
        try:
            await self._step(deployment)
            if self.choices is not None:
                whole = {"id": "1", "choices": self.choices}
                for chunk in replay.chunks("chat", Answer(whole, USAGE, 7, deployment.model)):
                    yield chunk
                return
            for number, word in enumerate(self.words):
                if number < len(self.gates):
                    await self.gates[number].wait()
                yield {"choices": [{"index": 0, "delta": {"content": word}}]}
                if self.between is not None:
                    self.between()
                if self.cut is not None:
                    raise self.cut
            if self.finish_reason is not None:
                end = {"index": 0, "delta": {}, "finish_reason": self.finish_reason}
                yield {"choices": [end]}
            yield {"choices": [], "usage": USAGE}
        finally:
            self.streams_open -= 1

    def chat_stream(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
        stall_s: float = 30.0,
    ) -> Chunks:
        self.bodies.append(body)
        return self._chunks(deployment)  # type: ignore[return-value]

    completion_stream = chat_stream

    async def embed(
        self,
        deployment: Deployment,
        texts: Sequence[Text],
        params: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Vectors:
        self.texts.append(list(texts))
        await self._step(deployment)
        array = np.stack([vector_of(text) for text in texts])
        return Vectors(array, len(texts), 9, deployment.model)

    def price(
        self,
        deployment: Deployment,
        usage: Mapping[str, Any] | None,
        *,
        model: str | None = None,
    ) -> int | None:
        return self.cost_nano

    def prompt_caching(self, deployment: Deployment) -> PromptCaching | None:
        return PromptCaching(None, 1024)

    def price_version(self, deployment: Deployment) -> str:
        return "list 1"

    def price_bound(self, deployment: Deployment) -> PriceBound | None:
        if self.token_nano is None:
            return None
        rate = Rate(Decimal(self.token_nano), Decimal(self.token_nano))
        return PriceBound(rate, rate)

    def count_tokens(self, deployment: Deployment, text: str) -> int | None:
        return None

    async def warm(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def _step(self, deployment: Deployment) -> None:
        self.asked.append(deployment.model)
        steps = self.steps.get(deployment.model) or []
        step = steps.pop(0) if steps else None
        if callable(step):
            step()
        gate, error = step if isinstance(step, tuple) else (step, step)
        if isinstance(gate, asyncio.Event):
            await gate.wait()
        if isinstance(error, GatewayError):
            raise error


class House:
    """A system, its scripted provider, and its books."""

    def __init__(self, system: System, provider: Scripted) -> None:
        self.system = system
        self.provider = provider
        self.pipeline: Pipeline = system.pipeline
        self._number = 0

    def call(
        self,
        text: str = "hello",
        model: str = "m",
        *,
        max_tokens: int | None = None,
        **details: Any,
    ) -> Call:
        self._number += 1
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        return Call("chat", body, "acme", f"req_{self._number}", **details)

    def texts(self, text: str, model: str = "e", **details: Any) -> Call:
        self._number += 1
        body = {"model": model, "input": [text]}
        return Call("embedding", body, "acme", f"req_{self._number}", **details)

    def deployment(self, model: str, group: str = "m") -> Deployment:
        """A group's deployment that asks for this model."""
        (found,) = [d for d in self.system.table.group(group).deployments if d.model == model]
        return found

    def outcomes(self) -> dict[str, int]:
        """How many provider calls were metered, by outcome."""
        counts: Counter[str] = Counter()
        for series, (count, *_) in self.system.meter.figures().items():
            if series[0] == "forebay_provider_calls":
                counts[series[2]] += count
        return dict(counts)

    async def state(self, model: str, group: str = "m") -> State:
        """How the breaker stands when all that was reported has come back."""
        await self.system.breaker.flush()
        await settle()
        return self.system.breaker.standing(self.deployment(model, group).circuit).state

    async def entries(self, call: Call) -> list[Entry]:
        await self.system._ledger.flush()
        found: list[Entry] = await self.system._refs["ledger"].ask("entries", call.request_id)
        return found

    @property
    def at_rest(self) -> bool:
        """Whether nothing is held for anybody: slots, open entries, flights, streams."""
        return (
            self.system.limiter.stats()["slots_used"] == 0
            and self.system._ledger.stats()["open"] == 0
            and self.system.cache.stats()["leading"] == 0
            and self.system.cache.stats()["following"] == 0
            and self.provider.streams_open == 0
        )


async def open_house(
    data_dir: Path,
    *,
    own: Mapping[str, int] | None = None,
    own_spare: Mapping[str, int] | None = None,
    **gateway: Any,
) -> House:
    """A house of its own; close its `system`.

    `own` are the limits of every deployment but those of `spare`, which has `own_spare`.
    """
    groups = {"m": ["a"], "two": ["a", "b"], "spare": ["c"], "e": ["text-embedding-x"]}
    groups |= {"ee": ["text-embedding-x", "text-embedding-y"], "any/*": ["*"]}
    entries = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"openai/{model}",
                "api_key": "k",
                **((own if name != "spare" else own_spare) or {}),
            },
        }
        for name, models in groups.items()
        for model in models
    ]
    whole = {"model_list": entries, "retry_delay": 0.1, **gateway}
    config = SystemConfig.model_validate({"gateway": whole, "data_dir": str(data_dir)})
    system = await open_inline(config)
    system.provider = provider = Scripted()
    system.bounds = Reckoner(provider, system._candidates)
    return House(system, provider)
