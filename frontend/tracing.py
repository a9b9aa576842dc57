"""Traces of requests, exported over OTLP (HTTP with protobuf).

    client's span ─▶ llm_request (frontend) ─▶ core ─┬─▶ queue, prefill, decode
                                                     └─▶ worker ─▶ worker.prefill, worker.decode

The traceparent of `llm_request` travels with the request; core and worker measure their own spans and send them
back, and this frontend exports them with a resource of their own. Attributes are vLLM's.

OpenTelemetry is imported when a tracer is made, and only then: it is the extra `otlp`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from tercet.errors import ConfigError
from tercet.frontend.sampling_params import SamplingParams
from tercet.ipc.telemetry import Spans
from tercet.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

    from tercet.frontend.output_processor import RequestState

TRACE_HEADERS: Final = ("traceparent", "tracestate")
_NS: Final = 1_000_000_000
_EXPORT_TIMEOUT_S: Final = 5


class RequestTracer:
    """Makes and exports the spans of one frontend's requests. `close` exports what is left."""

    def __init__(self, endpoint: str) -> None:
        """
        Args:
            endpoint: URL of a collector's traces, `http://host:4318/v1/traces`; that path is the default.

        Raises:
            ConfigError: it is no URL, or OpenTelemetry is not installed.
        """
        url = check_endpoint(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            problem = f"needs OpenTelemetry ({error.name} is missing): pip install 'tercet[otlp]'"
            raise ConfigError("otlp_traces_endpoint", problem) from None
        self._processor: SpanProcessor = BatchSpanProcessor(
            OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT_S)
        )
        provider = TracerProvider(resource=_resource("frontend", os.getpid()), shutdown_on_exit=False)
        provider.add_span_processor(self._processor)
        self._provider = provider
        self._tracer = provider.get_tracer("tercet", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._resources: dict[tuple[str, int], Resource] = {}

    # ---- this frontend's span

    def begin(
        self,
        request: RequestState,
        params: SamplingParams,
        model: str,
        headers: Mapping[str, str] | None,
    ) -> None:
        """Open a request's span; it is closed when the request ends. Sets `request.trace`.

        Args:
            headers: of the caller, whose `traceparent` becomes the span's parent.
        """
        from opentelemetry.trace import SpanKind

        lower = {name.lower(): value for name, value in (headers or {}).items()}
        parent = self._propagator.extract({name: lower[name] for name in TRACE_HEADERS if name in lower})
        span = self._tracer.start_span(
            "llm_request",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=_request_attributes(request, params, model),
            start_time=int(request.stats.arrival_time * _NS),
        )
        if span.is_recording():
            request.trace = _traceparent(span)
            request.on_finish = (*request.on_finish, lambda ended: _end(span, ended))

    # ---- the spans of core and worker

    def export(self, message: Spans) -> None:
        """Export what another process has measured."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, TraceFlags

        key = message.process, message.pid
        resource = self._resources.get(key)
        if resource is None:
            resource = self._resources[key] = _resource(*key)
        flags = TraceFlags(TraceFlags.SAMPLED)
        for span in message.spans:
            trace_id = int(span.trace_id, 16)
            readable = ReadableSpan(
                name=span.name,
                context=SpanContext(trace_id, int(span.span_id, 16), is_remote=False, trace_flags=flags),
                parent=SpanContext(trace_id, int(span.parent_id, 16), is_remote=True, trace_flags=flags),
                resource=resource,
                attributes=span.attributes,
                start_time=int(span.start_s * _NS),
                end_time=int(span.end_s * _NS),
                instrumentation_scope=_scope(),
            )
            self._processor.on_end(readable)

    def flush(self, timeout_s: float = _EXPORT_TIMEOUT_S) -> None:
        """Export everything that has ended. Blocks."""
        self._provider.force_flush(int(timeout_s * 1000))

    def close(self) -> None:
        """Export what is left and end the exporting thread. Blocks. Idempotent."""
        self._provider.shutdown()


def make_tracer(endpoint: str | None) -> RequestTracer | None:
    """A tracer for this endpoint; None for none. Raises as RequestTracer."""
    return None if endpoint is None else RequestTracer(endpoint)


def check_endpoint(endpoint: str) -> str:
    """The URL that traces are sent to.

    Raises:
        ConfigError: it is no URL of HTTP.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        problem = f"must be a URL such as http://127.0.0.1:4318/v1/traces; got {endpoint!r:.80}"
        raise ConfigError("otlp_traces_endpoint", problem)
    return parts._replace(path="/v1/traces").geturl() if parts.path in ("", "/") else endpoint


def _resource(process: str, pid: int) -> Resource:
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    found = Resource.create({"process.pid": pid, "tercet.process": process, "tercet.version": __version__})
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: "tercet"}))
    return found


def _scope() -> Any:
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    return InstrumentationScope("tercet", __version__)


def _traceparent(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _request_attributes(
    request: RequestState, params: SamplingParams, model: str
) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.model": model,
    }
    if params.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = params.max_tokens
    return attributes


def _end(span: Span, request: RequestState) -> None:
    from opentelemetry.trace import StatusCode

    stats = request.stats
    num_tokens = sum(len(child.token_ids) for child in request.children)
    e2e_s = stats.e2e_latency or time.time() - stats.arrival_time
    attributes: dict[str, str | int | float] = {
        "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.completion_tokens": num_tokens,
        "gen_ai.usage.num_sequences": len(request.children),
        "gen_ai.latency.e2e": e2e_s,
    }
    if stats.first_token_latency:
        decode_s = e2e_s - stats.first_token_latency
        attributes |= {
            "gen_ai.latency.time_in_queue": stats.queue_s,
            "gen_ai.latency.time_to_first_token": stats.first_token_latency,
            "gen_ai.latency.time_in_model_prefill": stats.prefill_s,
            "gen_ai.latency.time_in_model_decode": decode_s,
            "gen_ai.latency.time_in_model_inference": stats.prefill_s + decode_s,
        }
    span.set_attributes(attributes)
    if request.error is not None:
        span.set_status(StatusCode.ERROR, type(request.error).__name__)
    span.end(int((stats.arrival_time + e2e_s) * _NS))
