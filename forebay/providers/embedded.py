"""The embedded models as LiteLLM's custom provider `local`.

LiteLLM's interface loses some of a request on the way (embedding dimensions, whether it is a chat
or a text, several choices of a stream) and some of the answer (usage of a stream, vectors as
arrays). So a call of the lane also travels beside it, in a context variable: the handler takes the
request from there and leaves the answer there. Without one (somebody calls LiteLLM directly), it
does with what LiteLLM hands over.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebay.errors import ProviderError
from forebay.providers.local import LocalModels

LOCAL = "local"


@dataclass(slots=True)
class Beside:
    """A call of the lane: what was asked, and what was answered."""

    models: LocalModels
    body: dict[str, Any]
    answer: dict[str, Any] | None = None
    chunks: AsyncIterator[dict[str, Any]] | None = None
    vectors: tuple[np.ndarray, int] | None = None


BESIDE: ContextVar[Beside | None] = ContextVar("forebay_local_call", default=None)


def register(litellm: Any, models: LocalModels) -> None:
    """Make `local/…` known to LiteLLM in this process. `models` serve calls that no lane makes."""
    if any(item["provider"] == LOCAL for item in litellm.custom_provider_map):
        return
    litellm.custom_provider_map.append(
        {"provider": LOCAL, "custom_handler": _handler(litellm, models)}
    )
    litellm.utils.custom_llm_setup()


def _handler(litellm: Any, models: LocalModels) -> Any:
    """An instance of LiteLLM's `CustomLLM`, whose class is known only once it is imported."""

    class Handler(litellm.CustomLLM):  # type: ignore[misc]
        async def acompletion(
            self, model: str, messages: list[Any], optional_params: dict[str, Any], **_: Any
        ) -> Any:
            call = BESIDE.get() or _from_outside(models, messages, optional_params)
            answer = call.answer = await call.models.chat(model, call.body)
            return litellm.ModelResponse(**_as_chat(answer))

        def astreaming(
            self, model: str, messages: list[Any], optional_params: dict[str, Any], **_: Any
        ) -> AsyncIterator[Any]:
            call = BESIDE.get() or _from_outside(models, messages, optional_params)
            call.chunks = call.models.chat_stream(model, call.body)
            return _litellm_chunks(litellm, call.chunks)

        async def aembedding(
            self, model: str, optional_params: dict[str, Any], **given: Any
        ) -> Any:
            beside = BESIDE.get()
            call = beside or Beside(models, optional_params)
            call.vectors = await call.models.embed(
                model, given["input"], call.body.get("dimensions")
            )
            array, tokens = call.vectors
            data = [
                {"object": "embedding", "index": n, "embedding": _base64(row)}
                for n, row in enumerate(array if beside is None else ())
            ]
            usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
            return litellm.EmbeddingResponse(model=model, data=data, usage=usage)

    return Handler()


def _from_outside(
    models: LocalModels, messages: list[Any], optional_params: Mapping[str, Any]
) -> Beside:
    params = {name: value for name, value in optional_params.items() if name != "max_retries"}
    return Beside(models, {**params, "messages": messages})


def _as_chat(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A text completion in a chat's shape, which LiteLLM turns back; a chat as it is."""
    if answer["object"] != "text_completion":
        return dict(answer)
    choices = [
        {
            "index": choice["index"],
            "finish_reason": choice["finish_reason"],
            "message": {"role": "assistant", "content": choice["text"]},
        }
        for choice in answer["choices"]
    ]
    return {**answer, "object": "chat.completion", "choices": choices}


async def _litellm_chunks(
    litellm: Any, chunks: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[Any]:
    """Our chunks as those that LiteLLM's stream wrapper takes from a custom provider."""
    end: dict[str, Any] = {"text": "", "is_finished": True, "index": 0, "tool_use": None}
    end |= {"finish_reason": None, "usage": None}
    async for chunk in chunks:
        end["usage"] = chunk.get("usage") or end["usage"]
        for choice in chunk["choices"]:
            end["finish_reason"] = choice["finish_reason"] or end["finish_reason"]
            delta = choice["delta"] if "delta" in choice else {"content": choice["text"]}
            if delta:
                whole = {**choice, "delta": delta, "finish_reason": None}
                whole.pop("text", None)
                fields = {**chunk, "object": "chat.completion.chunk", "choices": [whole]}
                yield litellm.ModelResponseStream(**fields)
    if end["finish_reason"] is None:
        raise ProviderError("the embedded model broke off its answer", provider=LOCAL)
    yield end


def _base64(row: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(row, "<f4").tobytes()).decode()
