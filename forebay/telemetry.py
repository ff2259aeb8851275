"""OpenTelemetry's GenAI spans, metrics and events, over OTLP/HTTP, where it is configured.

Rule 1: the names are those of the semantic conventions (opentelemetry.io, GenAI, 1.41); what they
        have no name for is under `forebay.`. No prompt, no answer and no key is ever told.
Rule 2: opentelemetry is imported when an endpoint is configured, and else never.
Rule 3: its providers are ours alone: an application around us keeps its own, and its own settings.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from forebay.codec import tokens_in
from forebay.ended import Ended, Tried

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import LogRecordExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

    from forebay.validation import Evaluation

    Exporter = SpanExporter | MetricExporter | LogRecordExporter

SCOPE = "forebay"
SECONDS = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
TOKENS = tuple(4**power for power in range(14))
CLOSE_TIMEOUT_S = 2.0
NS_PER_S = 1_000_000_000

OPERATIONS: Mapping[str, str] = MappingProxyType(
    {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"}
)
PROVIDERS: Mapping[str, str] = MappingProxyType(
    {
        "azure": "azure.ai.openai",
        "azure_ai": "azure.ai.inference",
        "bedrock": "aws.bedrock",
        "bedrock_converse": "aws.bedrock",
        "cohere_chat": "cohere",
        "gemini": "gcp.gemini",
        "mistral": "mistral_ai",
        "text-completion-openai": "openai",
        "vertex_ai": "gcp.vertex_ai",
        "vertex_ai_beta": "gcp.vertex_ai",
        "watsonx": "ibm.watsonx.ai",
        "xai": "x_ai",
    }
)
"""LiteLLM's names of providers whom the conventions call otherwise."""

ASKED: Mapping[str, str] = MappingProxyType(
    {
        "max_tokens": "gen_ai.request.max_tokens",
        "max_completion_tokens": "gen_ai.request.max_tokens",
        "temperature": "gen_ai.request.temperature",
        "top_p": "gen_ai.request.top_p",
        "frequency_penalty": "gen_ai.request.frequency_penalty",
        "presence_penalty": "gen_ai.request.presence_penalty",
        "seed": "gen_ai.request.seed",
        "dimensions": "gen_ai.embeddings.dimension.count",
    }
)
"""Numbers of a request's body, and their attributes."""

Attributes = dict[str, Any]


class Telemetry:
    """Tells of each request by a span, with one for each attempt in it, and by three histograms;
    and of each evaluation of an answer by an event. The span is a part of the caller's trace, where
    the request names one (W3C `traceparent`), or where it comes from Python, out of a span.

    Bounded by OpenTelemetry's own queues of 2,048 spans and events, and by the configuration's
    models.
    Failure behaviour: with the endpoint away spans and events are dropped when a queue is full,
    histograms go on to count, and OpenTelemetry logs it; no request waits for any of it.
    """

    def __init__(
        self,
        traces: TracerProvider,
        metrics: MeterProvider,
        events: LoggerProvider,
        exporters: Sequence[Exporter],
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._w3c = TraceContextTextMapPropagator()
        self._providers = (traces, metrics, events)
        self._exporters = exporters
        self._wall_ns = wall_ns
        self._tracer = traces.get_tracer(SCOPE, version(SCOPE))
        self._events = events.get_logger(SCOPE, version(SCOPE))
        meter = metrics.get_meter(SCOPE, version(SCOPE))
        self._seconds = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._first_chunk = meter.create_histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            unit="s",
            description="Time to receive the first chunk.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=TOKENS,
        )

    @classmethod
    def open(cls, endpoint: str, instance: str) -> Telemetry:
        """Over OTLP/HTTP to `endpoint`/v1/traces, /v1/metrics and /v1/logs.

        `instance` names this process. OpenTelemetry's own variables hold for the rest:
        OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT, _CERTIFICATE and _COMPRESSION, OTEL_TRACES_SAMPLER,
        OTEL_METRIC_EXPORT_INTERVAL, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES.
        """
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        base = endpoint.rstrip("/")
        ours = {
            "service.name": SCOPE,
            "service.version": version(SCOPE),
            "service.instance.id": instance,
        }
        resource = Resource(ours).merge(OTELResourceDetector().detect())
        traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        spans = OTLPSpanExporter(f"{base}/v1/traces")
        traces.add_span_processor(BatchSpanProcessor(spans))
        figures = OTLPMetricExporter(f"{base}/v1/metrics")
        reader = PeriodicExportingMetricReader(figures)
        metrics = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        events = LoggerProvider(resource=resource, shutdown_on_exit=False)
        records = OTLPLogExporter(f"{base}/v1/logs")
        events.add_log_record_processor(BatchLogRecordProcessor(records))
        return cls(traces, metrics, events, [spans, figures, records])

    def ended(self, ended: Ended) -> str:
        """Tell of a request that is over; its trace's id, as 32 hex digits."""
        trace = self._trace
        offset_ns = self._wall_ns() - int(ended.ended_s * NS_PER_S)
        about = _about(ended)
        name = f"{about['gen_ai.operation.name']} {about['gen_ai.request.model']}"
        span = self._tracer.start_span(
            name,
            context=self._around(ended.call.trace_parent),
            kind=trace.SpanKind.CLIENT,
            attributes={**about, **_asked(ended)},
            start_time=offset_ns + int(ended.started_s * NS_PER_S),
        )
        inside = trace.set_span_in_context(span)
        for tried in ended.tried:
            attempt = self._tracer.start_span(
                "forebay.attempt",
                context=inside,
                attributes=_attempt(tried),
                start_time=offset_ns + int(tried.begun_s * NS_PER_S),
            )
            if tried.error is not None:
                attempt.set_status(trace.StatusCode.ERROR)
            attempt.end(offset_ns + int(tried.ended_s * NS_PER_S))
        span.set_attributes(dict(_told(ended)))
        if ended.failed:
            span.set_status(trace.StatusCode.ERROR)
        span.end(offset_ns + int(ended.ended_s * NS_PER_S))
        self._measure(ended, about)
        return f"{span.get_span_context().trace_id:032x}"

    def evaluated(self, evaluation: Evaluation) -> None:
        """Tell of what was found out about an answer."""
        from opentelemetry._logs import LogRecord

        told: Attributes = {
            "gen_ai.evaluation.name": evaluation.name,
            "gen_ai.evaluation.score.label": evaluation.label,
            "gen_ai.evaluation.score.value": evaluation.score,
            "gen_ai.evaluation.explanation": evaluation.explanation,
            "gen_ai.response.id": evaluation.response_id,
            "gen_ai.response.model": evaluation.model,
            "forebay.request.id": evaluation.request_id,
            "forebay.tenant": evaluation.tenant,
        }
        known = {name: value for name, value in told.items() if value not in (None, "")}
        event = LogRecord(
            timestamp=self._wall_ns(), event_name="gen_ai.evaluation.result", attributes=known
        )
        self._events.emit(event)

    async def close(self) -> None:
        """Send what is left, for CLOSE_TIMEOUT_S at the most."""
        loop = asyncio.get_running_loop()
        closing = [loop.run_in_executor(None, one.shutdown) for one in self._providers]
        _, late = await asyncio.wait(closing, timeout=CLOSE_TIMEOUT_S)
        if late:
            for exporter in self._exporters:
                exporter.shutdown()  # it gives up what it tries again and again

    def _around(self, trace_parent: str | None) -> Context | None:
        """The trace that the caller's `traceparent` names, a new one for a wrong one; without any,
        None, which is the trace of the span that we are called from, or a new one."""
        return None if trace_parent is None else self._w3c.extract({"traceparent": trace_parent})

    def _measure(self, ended: Ended, about: Attributes) -> None:
        labels = {**about, "gen_ai.request.model": ended.model}  # no client's choice
        if ended.answer is not None:
            sent, given = tokens_in(ended.answer.usage)
            self._tokens.record(sent, {**labels, "gen_ai.token.type": "input"})
            if given:
                self._tokens.record(given, {**labels, "gen_ai.token.type": "output"})
        if ended.first_chunk_s is not None:
            self._first_chunk.record(ended.first_chunk_s, labels)
        if ended.failed:
            labels["error.type"] = ended.status
        self._seconds.record(ended.ended_s - ended.started_s, labels)


def _about(ended: Ended) -> Attributes:
    return {
        "gen_ai.operation.name": OPERATIONS[ended.call.route],
        "gen_ai.provider.name": PROVIDERS.get(ended.provider, ended.provider),
        "gen_ai.request.model": ended.model if ended.facts is None else ended.facts.group,
    }


def _asked(ended: Ended) -> Attributes:
    body = ended.call.body if ended.facts is not None else {}
    numbers = {name: body.get(name) for name in ASKED}
    asked: Attributes = {
        ASKED[name]: number
        for name, number in numbers.items()
        if isinstance(number, int | float) and not isinstance(number, bool)
    }
    if isinstance(body.get("n"), int) and body["n"] != 1:
        asked["gen_ai.request.choice.count"] = body["n"]
    if ended.streams:
        asked["gen_ai.request.stream"] = True
    return asked


def _told(ended: Ended) -> Iterator[tuple[str, Any]]:
    """What is known of a request only when it is over."""
    yield "forebay.request.id", ended.call.request_id
    yield "forebay.tenant", ended.call.tenant
    yield "forebay.status", ended.status
    if ended.failed:
        yield "error.type", ended.status
    facts, answer = ended.facts, ended.answer
    if facts is not None:
        yield "forebay.cache", facts.cache
        yield "forebay.attempts", facts.attempts
        yield "forebay.retries", facts.retries
        yield "forebay.fallbacks", facts.fallbacks
        yield "forebay.overhead", facts.overhead_s
        if facts.deployment:
            yield "forebay.deployment.id", facts.deployment
        if facts.cost_nano is not None:
            yield "forebay.cost_usd", facts.cost_nano / 1e9
    if ended.first_chunk_s is not None:
        yield "gen_ai.response.time_to_first_chunk", ended.first_chunk_s
    if answer is None:
        return
    sent, given = tokens_in(answer.usage)
    yield "gen_ai.usage.input_tokens", sent
    yield "gen_ai.usage.output_tokens", given
    usage = answer.usage or {}
    for part, count, name in (
        ("prompt_tokens_details", "cached_tokens", "gen_ai.usage.cache_read.input_tokens"),
        ("completion_tokens_details", "reasoning_tokens", "gen_ai.usage.reasoning.output_tokens"),
    ):
        found = (usage.get(part) or {}).get(count)
        if found:
            yield name, found
    if answer.model:
        yield "gen_ai.response.model", answer.model
    if isinstance(answer.body.get("id"), str):
        yield "gen_ai.response.id", answer.body["id"]
    reasons = [choice.get("finish_reason") for choice in answer.body.get("choices") or ()]
    if any(reasons):
        yield "gen_ai.response.finish_reasons", [str(reason or "") for reason in reasons]


def _attempt(tried: Tried) -> Attributes:
    told = {
        "forebay.deployment.id": tried.deployment.id,
        "forebay.deployment.model": tried.deployment.model,
        "forebay.verdict": tried.verdict,
    }
    return told if tried.error is None else {**told, "error.type": tried.error}
