"""The lane to every provider that LiteLLM knows. This is the only place that imports it.

LiteLLM is used bare: one attempt, no Router, no callbacks, no cache. What it would do on top of a
call (retries, fallbacks, budgets) belongs to the pipeline and its desks.

Rule 1: LiteLLM is imported on first use, in a thread: it takes 3–4 s and 250 MB.
Rule 2: where a provider is and as whom it is called comes from the deployment's `params` and from
        nowhere else; a body that names such a thing is refused.
Rule 3: `timeout_s` is kept by a clock of ours. LiteLLM is given a coarser one: its client pools are
        keyed by it, and an exact one would make a new pool for every call.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from actors.batcher.policy import Paid, Text, Vectors
from forebay.errors import GatewayError, InvalidRequest, ProviderError, ResponseValidationError
from forebay.providers import shapes
from forebay.providers.base import NO_BASE64, STALL_S, Answer, Resolve
from forebay.providers.calls import Call
from forebay.providers.embedded import BESIDE, LOCAL, Beside, register
from forebay.providers.encodings import BASE64, Encodings
from forebay.providers.prices import PriceBound, Prices, PromptCaching, version_of
from forebay.providers.relay.ear import EAR, Ear, listen
from forebay.providers.remaining import room_in
from forebay.providers.streams import LiteLLMChunks, Opened
from forebay.providers.tokenizers import Tokenizers
from forebay.providers.vectors import VectorsAside, decoded
from forebay.providers.wire import WatchedTexts
from forebay.tally import StreamTally

if TYPE_CHECKING:
    from forebay.providers.local import LocalModels
    from forebay.routing import Deployment

Route = Literal["chat", "completion"]
EmbedOnce = Callable[..., Awaitable[Vectors]]

BYTES_PER_TOKEN = 4  # an estimate, for providers that do not say how many tokens there were

SAY_END = frozenset(
    {
        *("openai", "azure", "azure_ai", "text-completion-openai", "hosted_vllm", "openrouter"),
        *("anthropic", "mistral", "groq", "deepseek", "xai", "together_ai", "fireworks_ai"),
        *("perplexity", "cerebras", "nvidia_nim"),
    }
)
"""Providers whose streams end with a finish reason that LiteLLM passes on. (Of others' it makes up
a "stop"; where they speak in events, `wire` looks for their own end.)"""


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Set what LiteLLM reads when it is imported; to be called before that.

    No retries of its own (on the embedding path 0 retries mean 2 unless the default is 0), no
    price list or headers from the network, and no `.env` file read into this process.
    """
    environ["DEFAULT_MAX_RETRIES"] = "0"
    for name in ("MODEL_COST_MAP", "ANTHROPIC_BETA_HEADERS", "BLOG_POSTS"):
        environ.setdefault(f"LITELLM_LOCAL_{name}", "True")
    environ.setdefault("LITELLM_MODE", "PRODUCTION")


class LiteLLMProvider:
    """Calls providers through LiteLLM.

    Owns what it has learnt about deployments: prices, and what they mean by base64 (see
    `encodings`). Connections are LiteLLM's, pooled per process and event loop. `environ` is
    where `prepare_environment` writes, just before the import.

    Failure behaviour: every failure is a GatewayError that says whether a provider answered. A
    cancelled call and a closed stream close their upstream connection. Usable from several event
    loops.
    """

    def __init__(self, models: LocalModels, environ: MutableMapping[str, str] = os.environ) -> None:
        self._models = models
        self._environ = environ
        self._litellm: Any = None
        self._is_internal: Any = None
        self._prices = Prices()
        self._encodings = Encodings()
        self._tokenizers: Tokenizers | None = None

    async def warm(self) -> None:
        """Import LiteLLM, off the event loop."""
        if self._litellm is None:
            litellm = await asyncio.to_thread(_imported, self._environ)
            version = await asyncio.to_thread(version_of, litellm.model_cost)
            register(litellm, self._models)
            self._prices.litellm, self._prices.listed_version = litellm, version
            self._is_internal = _internal_call()
            self._litellm = litellm

    async def close(self) -> None:
        """Let go of the embedded models. LiteLLM's connections end with their event loop."""
        await self._models.close()

    async def chat(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Answer:
        """One chat completion.

        Raises:
            GatewayError: see `failures`.
        """
        return await self.answer("chat", deployment, body, timeout_s, resolve)

    async def completion(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Answer:
        """One text completion. Where a provider has only chat, LiteLLM makes a chat of it.

        Raises:
            GatewayError: see `failures`.
        """
        return await self.answer("completion", deployment, body, timeout_s, resolve)

    def chat_stream(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
        stall_s: float = STALL_S,
    ) -> LiteLLMChunks:
        """One chat completion, in OpenAI's chunks; usage in the last, if `stream_options` ask.

        Raises (from `anext`):
            GatewayError: see `failures`.
        """
        return self._stream("chat", deployment, body, timeout_s, stall_s, resolve)

    def completion_stream(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
        stall_s: float = STALL_S,
    ) -> LiteLLMChunks:
        """One text completion, in chunks; as `chat_stream`."""
        return self._stream("completion", deployment, body, timeout_s, stall_s, resolve)

    async def embed(
        self,
        deployment: Deployment,
        texts: Sequence[Text],
        params: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
        once: EmbedOnce | None = None,
    ) -> Vectors:
        """One embedding call. `params` are OpenAI's without `input` and `encoding_format`.

        `once` makes it in the place of `embed_once`.

        Raises:
            ProviderError: with the code NO_BASE64 when base64 was asked for and not given; the
                next call of the deployment asks for floats. `paid` says what this one has cost.
            ResponseValidationError: vectors are missing, doubled, of the wrong length or not
                finite. `paid` says what the call has cost all the same.
            GatewayError: see `failures`.
        """
        encoding, doubted = self._encodings.begin(deployment)
        once = once or self.embed_once
        try:
            vectors = await once(deployment, texts, params, timeout_s, resolve, encoding, doubted)
        except (ResponseValidationError, InvalidRequest) as error:
            named = "encoding_format" in f"{error.param} {error}"
            spoilt = isinstance(error, ResponseValidationError) or named
            if encoding != BASE64 or not spoilt:
                raise
            raise self._no_base64(deployment, error) from None
        else:
            if doubted:
                self._encodings.learn(deployment, float32=True)
            return vectors
        finally:
            if doubted:
                self._encodings.end(deployment)

    def price(
        self,
        deployment: Deployment,
        usage: Mapping[str, Any] | None,
        *,
        model: str | None = None,
    ) -> int | None:
        """What `usage` costs, in nano-USD; None when no price is known.

        `model` is the name that the provider reported; it prices deployments whose own name does
        not tell the model.
        """
        return self._prices.of_usage(deployment, usage, model)

    def cost(
        self, deployment: Deployment, usage: Mapping[str, Any], model: str, usd: Any
    ) -> int | None:
        """The price of an answer for which the provider, where it says one, says `usd`."""
        told = float(usd) if isinstance(usd, (int, float)) else None
        return self._prices.of_answer(deployment, usage, model, told)

    def price_bound(self, deployment: Deployment) -> PriceBound | None:
        """What the deployment charges at most per token; None when no price is known.

        LiteLLM's list is known after `warm` only.
        """
        return self._prices.bound(deployment)

    def price_version(self, deployment: Deployment) -> str:
        """A name for the prices of the deployment's calls; of LiteLLM's list, empty before `warm`.

        The list is what it is when this process starts; its name, too.
        """
        return self._prices.version(deployment)

    def prompt_caching(self, deployment: Deployment) -> PromptCaching | None:
        """What LiteLLM's list says of the model's prompt cache; None before `warm`."""
        return self._prices.prompt_caching(deployment)

    def count_tokens(self, deployment: Deployment, text: str) -> int | None:
        """An upper bound of the tokens of a text; None before `warm`, and for embedded models."""
        if self._litellm is None or deployment.provider == LOCAL:
            return None
        if self._tokenizers is None:
            self._tokenizers = Tokenizers.bundled()
        return self._tokenizers.count(deployment, text)

    # ----------------------------------------------------------------- what the relay asks, too

    @property
    def module(self) -> Any:
        """LiteLLM itself; None before `warm`."""
        return self._litellm

    def ending(self, reason: str) -> str:
        """OpenAI's word for a provider's reason to end an answer; after `warm` only."""
        word: str = self._litellm.litellm_core_utils.core_helpers.map_finish_reason(reason)
        return word

    async def answer(
        self,
        route: Route,
        deployment: Deployment,
        body: Mapping[str, Any],
        timeout_s: float,
        resolve: Resolve,
        ear: Ear | None = None,
    ) -> Answer:
        """One answer. `ear` overhears the request, or answers it."""
        await self.warm()
        call = Call(self._litellm, deployment, resolve(deployment.params), timeout_s)
        asked = call.asked(body)
        beside = self._beside(deployment, asked)
        with self._bare(beside, ear), call.errors():
            async with asyncio.timeout(call.limit_s):
                response = await self._function(route)(**self._keywords(route, call, asked))
            if beside is not None and beside.answer is not None:
                told = beside.answer
            else:
                plain = shapes.plain_chat if route == "chat" else shapes.plain_text
                told = plain(response)
            if not told.get("choices"):
                raise ResponseValidationError(f"{deployment.provider} answered without choices")
        usage, model, usd = told.get("usage"), told.get("model") or deployment.model, _usd(response)
        estimated = not any(
            (usage or {}).get(f"{kind}_tokens") for kind in ("prompt", "completion")
        )
        if estimated:
            # LiteLLM says 0 for a provider that says nothing.
            usage = told["usage"] = {**_estimate(route, body, told), "estimated": True}
            usd = None
        cost_nano = self._prices.of_answer(deployment, usage, model, usd)
        return Answer(told, usage, cost_nano, model, estimated=estimated)

    def _stream(
        self,
        route: Route,
        deployment: Deployment,
        body: Mapping[str, Any],
        timeout_s: float,
        stall_s: float,
        resolve: Resolve,
    ) -> LiteLLMChunks:
        async def begin() -> Opened:
            return await self.open(route, deployment, body, timeout_s, resolve)

        return LiteLLMChunks(begin, timeout_s, stall_s, deployment.provider, deployment.group)

    async def open(
        self,
        route: Route,
        deployment: Deployment,
        body: Mapping[str, Any],
        timeout_s: float,
        resolve: Resolve,
        ear: Ear | None = None,
    ) -> Opened:
        """One stream. `ear` overhears the request, or answers it."""
        await self.warm()
        params = resolve(deployment.params)
        call = Call(self._litellm, deployment, params, timeout_s, "stream_timeout")
        asked = call.asked(body)
        asked["stream"] = True
        if body.get("stream_options") is not None:
            asked["stream_options"] = body["stream_options"]
        beside = self._beside(deployment, asked)
        keywords = self._keywords(route, call, asked)
        if "client" in keywords:
            keywords["client"] = WatchedTexts(keywords["client"], call.error, call.provider, ear)
        with self._bare(beside, ear), call.errors():
            async with asyncio.timeout(call.limit_s):
                stream = await self._function(route)(**keywords)
        if beside is not None and beside.chunks is not None:
            return Opened(beside.chunks, None, call.error)
        plain = shapes.plain_chat_chunk if route == "chat" else shapes.plain_text_chunk
        says_end = deployment.provider in SAY_END
        return Opened(stream, plain, call.error, says_end, call.limit_s)

    async def embed_once(
        self,
        deployment: Deployment,
        texts: Sequence[Text],
        params: Mapping[str, Any],
        timeout_s: float,
        resolve: Resolve,
        encoding: str | None,
        doubted: bool,
        ear: Ear | None = None,
    ) -> Vectors:
        """One embedding call in an encoding, which may be `doubted`: see `Encodings.begin`.

        `ear` overhears the request, or answers it.
        """
        await self.warm()
        call = Call(self._litellm, deployment, resolve(deployment.params), timeout_s)
        asked = call.asked({**params, "input": listed(texts)})
        asked.pop("encoding_format", None)
        dimensions = asked.get("dimensions")
        beside = self._beside(deployment, dict(asked))
        if beside is not None:
            asked = {"input": asked["input"]}  # LiteLLM refuses a custom provider all parameters
        elif encoding is not None:
            asked["encoding_format"] = encoding
        if dimensions is not None and deployment.provider == "openai":
            # LiteLLM knows of OpenAI's own models only; whoever speaks its language decides.
            asked["allowed_openai_params"] = ["dimensions"]
        keywords, aside = call.keywords(asked), None
        with self._bare(beside, ear), call.errors():
            if deployment.provider == "openai" and keywords.get("api_key"):
                aside = keywords["client"] = VectorsAside(self._openai_client(keywords))
            async with asyncio.timeout(call.limit_s):
                response = await self._litellm.aembedding(**keywords)
            tokens = int(getattr(response.usage, "prompt_tokens", 0) or 0)
            array = None
            if beside is not None and beside.vectors is not None:
                array, tokens = beside.vectors
            paid, estimated = self.paid(deployment, response.model, texts, tokens, _usd(response))
            if array is None:
                try:
                    data = response.data if aside is None else aside.data
                    array = decoded(data, len(texts), dimensions, doubted=doubted)
                except ResponseValidationError as error:
                    # Whatever came, it was answered, and so it costs.
                    error.paid = paid  # type: ignore[attr-defined]
                    raise
        room = room_in(_headers(response))
        return Vectors(array, paid.prompt_tokens, paid.cost_nano, paid.model, estimated, room)

    def paid(
        self,
        deployment: Deployment,
        model: str | None,
        texts: Sequence[Text],
        tokens: int,
        usd: float | None = None,
    ) -> tuple[Paid, bool]:
        """What an embedding call has cost, and whether its tokens are estimated."""
        estimated = tokens == 0 and any(texts)
        if estimated:
            tokens = -(-sum(map(_bytes, texts)) // BYTES_PER_TOKEN)
            usd = None
        model = model or deployment.model
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Paid(tokens, self._prices.of_answer(deployment, usage, model, usd), model), estimated

    def _no_base64(self, deployment: Deployment, error: GatewayError) -> ProviderError:
        """The failure of a call in base64; from now on the deployment is asked for floats.

        It means something else than float32 by base64, or does not know the word. Another call
        is another attempt, to be counted and paid for as such: it is not made here. No upstream
        status is told, for the texts are good.
        """
        self._encodings.learn(deployment, float32=False)
        failure = ProviderError(
            f"{deployment.provider} gave no vectors in base64 and is asked for floats from now on:"
            f" {error}",
            code=NO_BASE64,
            provider=deployment.provider,
            model=deployment.group,
        )
        paid: Paid | None = getattr(error, "paid", None)
        if paid is not None:
            failure.paid = paid  # type: ignore[attr-defined]
        return failure

    def _function(self, route: Route) -> Callable[..., Awaitable[Any]]:
        function: Callable[..., Awaitable[Any]] = (
            self._litellm.acompletion if route == "chat" else self._litellm.atext_completion
        )
        return function

    def _keywords(self, route: Route, call: Call, asked: Mapping[str, Any]) -> dict[str, Any]:
        keywords = call.keywords(asked)
        # Tools are the provider's business; LiteLLM would need the package `mcp` to look at them,
        # and would run those of type "mcp" itself.
        keywords["_skip_mcp_handler"] = True
        api_base = keywords.get("api_base") or keywords.get("base_url")
        known = keywords.get("api_key") and (api_base or call.provider == "openai")
        if route == "completion" and call.is_native_text and known:
            # For texts LiteLLM would make a client, and connect anew, for every call.
            keywords["client"] = self._openai_client(keywords)
        return keywords

    def _openai_client(self, keywords: Mapping[str, Any]) -> Any:
        """LiteLLM's own client for these keywords, which it keeps."""
        return self._litellm.main.openai_chat_completions.get_openai_client(
            is_async=True,
            api_key=keywords["api_key"],
            api_base=keywords.get("api_base") or keywords.get("base_url"),
            timeout=keywords["timeout"],
            max_retries=0,
            organization=keywords.get("organization"),
        )

    def _beside(self, deployment: Deployment, asked: dict[str, Any]) -> Beside | None:
        return Beside(self._models, asked) if deployment.provider == LOCAL else None

    @contextmanager
    def _bare(self, beside: Beside | None, ear: Ear | None) -> Iterator[None]:
        """A LiteLLM call without its success and failure logging, which costs 13 % of the call."""
        internal = self._is_internal
        marked = internal.set(True) if internal is not None else None
        placed, heard = BESIDE.set(beside), EAR.set(ear)
        try:
            yield
        finally:
            EAR.reset(heard)
            BESIDE.reset(placed)
            if internal is not None:
                internal.reset(marked)


def listed(texts: Sequence[Text]) -> list[str | list[int]]:
    """Texts as a provider's JSON has them."""
    return [text if isinstance(text, str) else list(text) for text in texts]


def _bytes(text: Text) -> int:
    """How long a text is; one of token ids is as long as that many tokens."""
    return len(text.encode()) if isinstance(text, str) else BYTES_PER_TOKEN * len(text)


@contextmanager
def _uncollected() -> Iterator[None]:
    """What is imported lasts: for Python's collector to walk over it takes half as long again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def _imported(environ: MutableMapping[str, str]) -> Any:
    """LiteLLM's module, imported and set up for bare calls."""
    prepare_environment(environ)
    litellm: Any = importlib.import_module("litellm")
    litellm.DEFAULT_MAX_RETRIES = 0  # for a process that had imported it before
    litellm.suppress_debug_info = True
    litellm.disable_streaming_logging = True
    litellm.telemetry = False
    litellm.disable_hf_tokenizer_download = True  # it counts words where a provider does not
    http = importlib.import_module("litellm.llms.custom_httpx.http_handler")
    http.AsyncHTTPHandler.single_connection_post_request = _fail_once
    listen(importlib.import_module(f"{http.__package__}.aiohttp_transport").LiteLLMAiohttpTransport)
    # LiteLLM's models of answers say list[float] where base64 is a str; that is how it is meant.
    warnings.filterwarnings(
        "ignore", "Pydantic serializer warnings", UserWarning, module=r"pydantic\.main"
    )
    # What LiteLLM and openai would otherwise import in the middle of the first call: 1.5 s; and of
    # the first failure: 0.2 s, during which nobody hears of a 429.
    importlib.import_module("openai.resources")
    with contextlib.suppress(ImportError):
        importlib.import_module("fastapi.exceptions")
    greeting = [{"role": "user", "content": "hello"}]
    for _ in litellm.completion("openai/gpt-4o", greeting, mock_response="hello", stream=True):
        pass
    return litellm


async def _fail_once(*_: Any, **__: Any) -> NoReturn:
    """In place of the second attempt that LiteLLM makes, unasked, when a connection breaks.

    It is called while the first one's failure is being handled, which is what the call ends with.
    """
    failure = sys.exception()
    assert failure is not None
    raise failure


def _internal_call() -> Any:
    """LiteLLM's context variable for calls that are not to be logged; None if it has gone."""
    try:
        module = importlib.import_module("litellm._internal_context")
    except ImportError:
        return None
    return getattr(module, "is_internal_call", None)


def _estimate(route: Route, body: Mapping[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Usage by the length of what was asked and answered, as for streams that were cut."""
    tally = StreamTally(route)
    for choice in told["choices"]:
        tally.add({"choices": [{**choice, "delta": choice.get("message")}]})
    usage: dict[str, Any] | None = tally.answer(dict(body), complete=True).usage
    return usage or {}


def _headers(response: Any) -> Mapping[str, Any]:
    """The provider's headers, as LiteLLM hands them on."""
    hidden = getattr(response, "_hidden_params", None)
    headers = hidden.get("additional_headers") if hidden is not None else None
    return headers if isinstance(headers, Mapping) else {}


def _usd(response: Any) -> float | None:
    """What LiteLLM says a response cost."""
    hidden = getattr(response, "_hidden_params", None)  # a dict, or a model with `get`
    usd = hidden.get("response_cost") if hidden is not None else None
    return float(usd) if isinstance(usd, int | float) else None
