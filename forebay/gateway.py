"""`LiteLLMGateway`: one class for text and vectors from any provider.

The class is a door, not a place: each method turns its arguments into a `Call`, sends it through
the pipeline on the gateway's own loop, and shapes what comes back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from forebay.cache import ResponseCache, prefix_figures
from forebay.call import Call, Result
from forebay.config import GatewayConfig
from forebay.errors import ConfigurationError, InvalidRequest
from forebay.feedback import FeedbackLoop, FeedbackType
from forebay.health import HealthCheck
from forebay.loop import LoopThread
from forebay.schemas import EmbedResponse, GenerateResponse, HealthCheckResult, Usage
from forebay.system import System, choose_runtime, open_system
from forebay.tenants import DEFAULT_TENANT
from forebay.validation import ValidationManager

T = TypeVar("T")
Runtime = Literal["auto", "ray", "inline"]


class LiteLLMGateway:
    """Text and vectors from many providers, with the same limits, breakers, cache and ledger.

    Args:
        config: what to run with. None attaches to the Forebay system of this Ray cluster, if one
            runs, else uses the embedded default (or the providers whose keys are in the
            environment).
        runtime: `"ray"` attaches to Ray and starts a local one if none runs, `"inline"` runs the
            same owners in this process, `"auto"` is `"ray"` where Ray is initialised or
            `RAY_ADDRESS` is set, else `"inline"`.
        namespace: the Ray namespace of the Forebay system.

    Raises:
        ConfigurationError: the configuration is wrong or Ray cannot be reached.

    Sync methods may be called from any thread, inside a Ray task, and inside a running event loop
    (which they block; prefer the async ones there).

    Example:
        >>> with LiteLLMGateway() as gateway:
        ...     print(gateway.generate("Say hello").text)
    """

    def __init__(
        self,
        config: GatewayConfig | None = None,
        *,
        runtime: Runtime = "auto",
        namespace: str = "forebay",
    ) -> None:
        if config is not None and not isinstance(config, GatewayConfig):
            raise ConfigurationError(
                f"config must be a GatewayConfig, not {type(config).__name__}", param="config"
            )
        if runtime not in ("auto", "ray", "inline"):
            raise ConfigurationError(
                f"runtime must be 'auto', 'ray' or 'inline', not {runtime!r}", param="runtime"
            )
        self._given = (config, runtime, namespace)
        self._lock = threading.Lock()
        self._closed = False
        self._loop = LoopThread("forebay-gateway")
        try:
            self._system: System = self._loop.run(
                open_system(config, runtime=choose_runtime(runtime), namespace=namespace)
            )
        except BaseException:
            self._loop.close()
            raise
        self._health = HealthCheck(self._system.health)
        loop = self._loop
        self._cache = ResponseCache(self._system, loop.run, loop.hand_over, self._chat_call)
        self._system.kv_cache.system_figures = lambda: loop.run(prefix_figures(self._system))

    # -------------------------------------------------------------------------------- text

    def generate(self, prompt: str | None = None, model: str | None = None, **keywords: Any) -> Any:
        """Text for a prompt: a `GenerateResponse`, or with `stream=True` an iterator of str.

        Args:
            prompt: the user's message; `messages=` is sent verbatim in its place.
            model: a model group's name; None takes the default one.
            **keywords: `tenant_id`, `timeout` (seconds), `cache_ttl` (seconds), `cache` (False, or
                LiteLLM's `{"no-cache": True, "no-store": True}`), `idempotency_key` (calls with the
                same one and the same parameters are made once a day, and answered the same),
                `metadata`, and every OpenAI chat parameter (`temperature`, `max_tokens`, `tools`,
                …).

        Raises:
            GatewayError: every failure; see `forebay.errors`.
        """
        call = self._chat_call(prompt, model, keywords)
        if call.body.get("stream"):
            return self._stream_sync(call)
        return _generated(self._loop.run(self._system.pipeline.answer(call)))

    async def generate_async(
        self, prompt: str | None = None, model: str | None = None, **keywords: Any
    ) -> Any:
        """As `generate`; with `stream=True` an async iterator of str."""
        call = self._chat_call(prompt, model, keywords)
        if call.body.get("stream"):
            return self._stream(call)
        return _generated(await self._loop.hand_over(self._system.pipeline.answer(call)))

    def generate_stream(
        self, prompt: str | None = None, model: str | None = None, **keywords: Any
    ) -> AsyncIterator[str]:
        """Text for a prompt, piece by piece as the provider sends it.

        Raises:
            GatewayError: before the first piece, or after a later one if the provider fails then.
        """
        call = self._chat_call(prompt, model, keywords | {"stream": True})
        return self._stream(call)

    stream_async = generate_stream
    generate_stream_async = generate_stream

    async def _stream(self, call: Call) -> AsyncIterator[str]:
        stream = await self._loop.hand_over(self._system.pipeline.stream(call))
        async with aclosing(self._loop.iterate(stream.chunks)) as chunks:
            async for chunk in chunks:
                text = _text_of(chunk)
                if text:
                    yield text

    def _stream_sync(self, call: Call) -> Iterator[str]:
        stream = self._loop.run(self._system.pipeline.stream(call))
        for chunk in self._loop.iterate_sync(stream.chunks):
            text = _text_of(chunk)
            if text:
                yield text

    # ----------------------------------------------------------------------------- vectors

    def embed(
        self,
        text: str | Sequence[str] | None = None,
        model: str | None = None,
        **keywords: Any,
    ) -> EmbedResponse:
        """Vectors for one text or a list of them, in the order given.

        Args:
            text: str or list of str (`texts=` is accepted too).
            model: a model group's name; None takes the default embedding one.
            **keywords: `tenant_id`, `timeout` (seconds), `idempotency_key`, `dimensions`, …

        Returns:
            `.array` is float32 of shape (n, d); `.embeddings` the same as lists.

        Raises:
            GatewayError: every failure; see `forebay.errors`.
        """
        call = self._embed_call(text, model, keywords)
        return _embedded(self._loop.run(self._system.pipeline.answer(call)))

    async def embed_async(
        self,
        text: str | Sequence[str] | None = None,
        model: str | None = None,
        **keywords: Any,
    ) -> EmbedResponse:
        """As `embed`."""
        call = self._embed_call(text, model, keywords)
        return _embedded(await self._loop.hand_over(self._system.pipeline.answer(call)))

    # ------------------------------------------------------------------------------ health

    def check_health(self) -> HealthCheckResult:
        """How this gateway and the owners behind it are. Calls no provider.

        `details["checks"]` holds a check of each concern: `router`, `circuit_breaker`, `cache`,
        `rate_limiter`, `ledger`, `batcher`, `registry` and `providers`, each with a `status`
        (healthy, degraded or unhealthy), a `message` and its figures. The result's status is the
        worst of them, or `unknown` where `enable_health_monitoring` is off.
        """
        return self._loop.run(self._health.run())

    async def get_health(self) -> dict[str, Any]:
        """As `check_health`, as a plain dict."""
        result = await self._loop.hand_over(self._health.run())
        return result.model_dump(mode="json")

    def get_usage_stats(self, tenant_id: str | None = None) -> dict[str, Any]:
        """Totals from the ledger, of one tenant or of all.

        Returns:
            `total_requests`, `total_cost` (USD; `total_cost_nano` is exact), `total_tokens`,
            `success_rate` (0 to 1), `cache_hits`, `by_model`, and what they are made of.
        """
        _require_asked(tenant_id)
        return self._loop.run(self._system.books.usage(tenant=tenant_id))

    def get_llmops_metrics(
        self, tenant_id: str | None = None, time_range_hours: float = 24
    ) -> dict[str, Any]:
        """`get_usage_stats` over the last `time_range_hours`, and more.

        Returns:
            `start` and `end` (UTC, `start` None for all time), the totals with `latency_ms_mean`,
            `_p50`, `_p95` and `_p99`, and the same `by_model`, `by_deployment` and `by_hour`, or
            `by_day` where the range is longer than a week.
        """
        _require_asked(tenant_id, time_range_hours)
        told = self._system.books.metrics(tenant=tenant_id, hours=time_range_hours)
        return self._loop.run(told)

    def get_cost_summary(
        self, tenant_id: str | None = None, time_range_hours: float = 24
    ) -> dict[str, Any]:
        """Cost in USD over the last `time_range_hours`.

        Returns:
            `total_cost` (and `total_cost_nano`, exact), `by_model`, `by_day`, for all tenants
            `by_tenant`, `saved_cost` (by the cache and shared calls), `unsettled_cost` (the most
            that lost answers may have cost), `unpriced_entries` (of unknown price) and
            `cost_per_request`.
        """
        _require_asked(tenant_id, time_range_hours)
        since = max(0.0, time.time() - time_range_hours * 3600)
        return self._loop.run(self._system.books.cost(tenant=tenant_id, since_s=since))

    # ---------------------------------------------------------------------------- feedback

    def record_feedback(
        self,
        query: str | None,
        response: str | GenerateResponse | None,
        feedback_type: FeedbackType | str,
        content: Any = None,
        tenant_id: str | None = None,
        response_id: str | None = None,
    ) -> str | None:
        """Keep what somebody thinks of an answer; its id, or None where the feedback loop is off.

        Args:
            query: what was asked; kept beside the feedback, and may be None.
            response: the `GenerateResponse` itself, or its text.
            feedback_type: correction, rating, useful, improvement or error.
            content: a rating is 1 to 5, True or False, or "up" or "down"; else any text or JSON.
            tenant_id: whose answer it was.
            response_id: the answer's `id`; that of `response` if it is a `GenerateResponse`.
                Without either it counts for the tenant, and for no deployment.

        A correction takes the answer out of the cache.

        Raises:
            InvalidRequest: something is wrong with it (400), this tenant had no such answer (404).
            Overloaded: the ledger does not take it now; try again.
        """
        return self._loop.run(
            self._record(query, response, feedback_type, content, tenant_id, response_id)
        )

    async def record_feedback_async(
        self,
        query: str | None,
        response: str | GenerateResponse | None,
        feedback_type: FeedbackType | str,
        content: Any = None,
        tenant_id: str | None = None,
        response_id: str | None = None,
    ) -> str | None:
        """As `record_feedback`."""
        return await self._loop.hand_over(
            self._record(query, response, feedback_type, content, tenant_id, response_id)
        )

    async def _record(
        self,
        query: str | None,
        response: str | GenerateResponse | None,
        feedback_type: FeedbackType | str,
        content: Any,
        tenant_id: str | None,
        response_id: str | None,
    ) -> str | None:
        tenant = DEFAULT_TENANT if tenant_id is None else tenant_id
        self._system.tenants.require(tenant)
        recorded = await self._system.feedback.record(
            feedback_type,
            content,
            tenant=tenant,
            response_id=response_id,
            query=query,
            response=response,
        )
        return None if recorded is None else str(recorded["id"])

    def get_feedback_stats(self, tenant_id: str | None = None) -> dict[str, Any]:
        """How much feedback there is, of a tenant or of all; see `FeedbackLoop.statistics`."""
        _require_asked(tenant_id)
        return self._loop.run(self._system.feedback.statistics(tenant_id))

    async def get_feedback_stats_async(self, tenant_id: str | None = None) -> dict[str, Any]:
        """As `get_feedback_stats`."""
        _require_asked(tenant_id)
        return await self._loop.hand_over(self._system.feedback.statistics(tenant_id))

    # --------------------------------------------------------------------------- the desks

    @property
    def config(self) -> GatewayConfig:
        """The configuration in force."""
        return self._system.config.gateway

    @property
    def router(self) -> Any:
        """What orders the deployments of a model: its strategy, and what it knows of them."""
        return self._system.router

    @property
    def circuit_breaker(self) -> Any:
        """The breaker's desk, None where `enable_circuit_breaker` is off."""
        return self._system.breaker if self.config.enable_circuit_breaker else None

    @property
    def rate_limiters(self) -> Any:
        """The limiter's desk, None where `enable_rate_limiting` is off."""
        return self._system.limiter if self.config.enable_rate_limiting else None

    @property
    def deduplicator(self) -> Any:
        """The cache's desk, which joins identical requests; None where that is off."""
        return self._system.cache if self.config.enable_request_deduplication else None

    @property
    def batcher(self) -> Any:
        """The Batcher's desk, None where `enable_request_batching` is off."""
        return self._system.batcher if self.config.enable_request_batching else None

    @property
    def cache(self) -> Any:
        """The cache of answers: `stats`, `invalidate`, `clear`; None where `enable_caching` is off.

        See `forebay.cache.ResponseCache`.
        """
        return self._cache if self.config.enable_caching else None

    @property
    def kv_cache(self) -> Any:
        """What is known of prompts that begin alike and what providers' caches of them saved.

        `get_cache_stats` tells it of all processes of the system.
        None where `enable_kv_cache` is off.
        """
        return self._system.kv_cache if self.config.enable_kv_cache else None

    @property
    def llmops(self) -> Any:
        """The ledger's desk, None where `enable_llmops` is off."""
        return self._system.books if self.config.enable_llmops else None

    @property
    def validation_manager(self) -> ValidationManager | None:
        """The rules that answers are held against: `validate`, `add_validator`,
        `add_blocked_pattern`, `stats`. None where `enable_validation` is off."""
        return self._system.validation if self.config.enable_validation else None

    @property
    def feedback_loop(self) -> FeedbackLoop | None:
        """What takes feedback and hands ratings to routing, None where that is off."""
        return self._system.feedback if self._system.feedback.enabled else None

    @property
    def health_check(self) -> Any:
        """What `check_health` runs, None where `enable_health_monitoring` is off."""
        return self._health if self.config.enable_health_monitoring else None

    # ------------------------------------------------------------------------------- an end

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """A coroutine's result, run on the gateway's own loop and waited for here."""
        return self._loop.run(work)

    def close(self) -> None:
        """End calls and streams still under way, hand in what is buffered, and let go.

        Idempotent. Shared owners go on.
        """
        if self._begin_close():
            try:
                self._loop.run(self._close())
            finally:
                self._loop.close()

    async def aclose(self) -> None:
        """As `close`."""
        if self._begin_close():
            try:
                await self._loop.hand_over(self._close())
            finally:
                await asyncio.to_thread(self._loop.close)

    def _begin_close(self) -> bool:
        """Whether it is this caller who closes."""
        with self._lock:
            first, self._closed = not self._closed, True
        return first and self._loop.alive

    async def _close(self) -> None:
        await self._loop.end_work()
        await self._system.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = self._system.runtime if self._loop.alive else "closed"
        return f"<LiteLLMGateway {state}: {', '.join(self._system.table.names())}>"

    def __reduce__(self) -> Any:
        config, runtime, namespace = self._given
        if config is not None or self._system.runtime == "inline":
            raise TypeError(
                "a LiteLLMGateway with a configuration or owners of its own does not travel to "
                "another process; construct it there"
            )
        return (_attach, (runtime, namespace))

    # ----------------------------------------------------------------------------------------

    def _chat_call(
        self, prompt: str | None, model: str | None, keywords: Mapping[str, Any]
    ) -> Call:
        body = dict(keywords)
        if body.get("messages") is None:
            body.pop("messages", None)
            if not isinstance(prompt, str) or not prompt:
                raise InvalidRequest.about("prompt", "prompt must be a non-empty string")
            body["messages"] = [{"role": "user", "content": prompt}]
        return Call.of("chat", body | ({} if model is None else {"model": model}))

    def _embed_call(
        self, text: str | Sequence[str] | None, model: str | None, keywords: Mapping[str, Any]
    ) -> Call:
        body = dict(keywords)
        texts = body.pop("texts", None)
        given = text if texts is None else texts
        if given is None:
            raise InvalidRequest.about("text", "text must be a string or a list of strings")
        body["input"] = given if isinstance(given, str) else list(given)
        return Call.of("embedding", body | ({} if model is None else {"model": model}))


def _attach(runtime: Runtime, namespace: str) -> LiteLLMGateway:
    return LiteLLMGateway(runtime=runtime, namespace=namespace)


def _require_asked(tenant_id: Any, hours: Any = 0) -> None:
    """That what figures are asked by can be asked for."""
    if tenant_id is not None and not isinstance(tenant_id, str):
        raise InvalidRequest.about("tenant_id", "tenant_id must be a string, or None for all")
    if not isinstance(hours, int | float) or not hours >= 0:
        raise InvalidRequest.about(
            "time_range_hours", "time_range_hours must be a number that is not negative"
        )


def _generated(result: Result) -> GenerateResponse:
    answer, facts = result.answer, result.facts
    choice = (answer.body.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    return GenerateResponse(
        text=message.get("content") or "",
        model=answer.model,
        usage=None if answer.usage is None else Usage(answer.usage),
        finish_reason=choice.get("finish_reason"),
        raw_response=answer.body,
        id=answer.body.get("id") or "",
        cached=facts.cache == "hit",
        cost_usd=(facts.cost_nano or 0) / 1e9,
        warnings=list(facts.warnings),
    )


def _embedded(result: Result) -> EmbedResponse:
    answer, facts = result.answer, result.facts
    array = answer.array
    assert array is not None, "an embedding answer carries vectors"
    return EmbedResponse(
        array=array,
        model=answer.model,
        usage=None if answer.usage is None else Usage(answer.usage),
        cost_usd=(facts.cost_nano or 0) / 1e9,
        cached=facts.cached,
    )


def _text_of(chunk: Mapping[str, Any]) -> str:
    choices = chunk.get("choices") or []
    if not choices:
        return ""
    return (choices[0].get("delta") or {}).get("content") or ""
