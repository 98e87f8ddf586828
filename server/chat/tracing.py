"""OpenTelemetry spans of chat and text completions.

A request has one span of the server and one for each attempt at an engine.

Owns: what a span says and when it ends, and the trace context on the way in (`traceparent`) and out
(to the engine, which has spans of its own). The names are those of OpenTelemetry's conventions for
generative AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/, in development) and
`burnish.…` for what they don't have. Where spans go is said by the standard `OTEL_…` variables.
Nothing that people wrote is in a span, no person and no conversation.

OpenTelemetry is the extra `otel`, imported where tracing is on and nowhere else.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import Scope

from feedback.recording import StartedAnswer
from server.http.request_ids import get_request_id
from server.machine import installed_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Span

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}

CLIENT_LEFT = "client_left"  #: an error of nobody's: the span says it, and is no failed one

_PROVIDER = "burnish"
_CLOSE_SECONDS = 5.0
_CONTEXT = ("traceparent", "tracestate")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "seed": int,
    "max_tokens": int,
    "max_completion_tokens": int,
}
_RENAMED = {"max_completion_tokens": "max_tokens"}


class Trace:
    """The spans of one request. All moments are of `time.perf_counter`."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._recording = span.is_recording()
        self._began = time.perf_counter()
        self._asking: Span | None = None
        self._committing = 0.0
        self._error: str | None = None

    def describe(self, started: StartedAnswer, *, stream: bool, choices: int) -> None:
        """What is asked, once it is known which release answers."""
        if not self._recording:
            return
        given = started.sampling
        operation = "text_completion" if started.id.startswith("cmpl-") else "chat"
        self._span.update_name(f"{operation} {started.requested_model}")
        facts: dict[str, Any] = {
            "gen_ai.request.model": started.requested_model,
            "gen_ai.request.stream": stream,
            "gen_ai.response.id": started.id,
            "gen_ai.response.model": started.release,
            "burnish.release": started.release,
            "burnish.arm": str(started.arm),
            "burnish.generation": started.generation,
            "burnish.kind": str(started.kind),
        }
        if started.deployment is not None:
            facts["burnish.deployment"] = started.deployment
        if choices != 1:
            facts["gen_ai.request.choice.count"] = choices
        for name, kind in _SAMPLING.items():
            value = given.get(name)
            # OTLP has 64 bits for a number: a larger one would cost the spans it travels with.
            if isinstance(value, int | float) and abs(value) < 2**63:
                facts[f"gen_ai.request.{_RENAMED.get(name, name)}"] = kind(value)
        self._span.set_attributes(facts)

    def asked(self, engine_id: str, url: str) -> dict[str, str]:
        """Start this attempt's span and mark the previous one failed; returns headers to send."""
        self._end_asking(failed=True)
        if self._recording:
            self._asking = self._tracer.start_asking(self._span, engine_id, url)
            self._span.set_attribute("burnish.engine", engine_id)
        return self._tracer.context_of(self._asking or self._span)

    def committed(self, seconds: float) -> None:
        """Add to the time that the request has waited for commits."""
        self._committing += seconds

    def answered(
        self,
        *,
        usage: Mapping[str, Any],
        finish_reasons: Sequence[str | None],
        first_token: float | None,
        heard: float,
    ) -> None:
        """What the engine said, as far as it got; `heard` when it had said all, else 0."""
        if heard:
            self._end_asking(at=heard)
        if not self._recording:
            return
        facts: dict[str, Any] = {}
        for ours, theirs in (("prompt_tokens", "input"), ("completion_tokens", "output")):
            if isinstance(usage.get(ours), int):
                facts[f"gen_ai.usage.{theirs}_tokens"] = usage[ours]
        if finish_reasons:
            facts["gen_ai.response.finish_reasons"] = [str(reason) for reason in finish_reasons]
        if first_token is not None:
            facts["burnish.time_to_first_token_seconds"] = first_token - self._began
        self._span.set_attributes(facts)

    def failed(self, code: str | None) -> None:
        """Something went wrong; the first reason is the one that stays."""
        self._error = self._error or code

    def end(self, status: int | None) -> None:
        """The reply is over; `status` is None where it never began."""
        self._end_asking(failed=True)
        if self._recording:
            failed = status is None or status >= 500
            error = self._error or (CLIENT_LEFT if status is None else None)
            if status is not None:
                self._span.set_attribute("http.response.status_code", status)
                if error is None and status >= 400:
                    error = str(status)
            if error is not None:
                self._span.set_attribute("error.type", error)
                # As for any server: what the caller did wrong, or gave up, is no failed span.
                if error != CLIENT_LEFT and (failed or (status or 0) < 400):
                    self._tracer.mark_failed(self._span)
            self._span.set_attribute("burnish.commit_wait_seconds", self._committing)
        self._span.end()

    def _end_asking(self, *, at: float | None = None, failed: bool = False) -> None:
        asking, self._asking = self._asking, None
        if asking is None:
            return
        if failed:
            self._tracer.mark_failed(asking)
            asking.set_attribute("error.type", self._error or "engine_failed")
        asking.end(None if at is None else _epoch_ns(at))


class Tracer:
    """Starts the spans of requests and hands them on when they have ended."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._otel = trace
        self._tracer = provider.get_tracer("burnish", installed_version("burnish"))
        # Not the propagators of the environment: baggage may hold whatever a caller likes.
        self._propagator = TraceContextTextMapPropagator()

    def start(self, scope: Scope) -> Trace:
        """The span of a request for a completion; part of the caller's trace where it has one."""
        carrier = {
            name: value.decode("latin-1")
            for name in _CONTEXT
            for key, value in scope["headers"]
            if key == name.encode("ascii")
        }
        operation = OPERATIONS[scope["path"]]
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _PROVIDER,
            "http.request.method": scope["method"],
            "http.route": scope["path"],
            "burnish.request_id": get_request_id(),
        }
        if scope.get("server") is not None:
            attributes["server.address"], attributes["server.port"] = scope["server"]
        span = self._tracer.start_span(
            operation,
            context=self._propagator.extract(carrier),
            kind=self._otel.SpanKind.SERVER,
            attributes=attributes,
        )
        return Trace(self, span)

    def start_asking(self, parent: Span, engine_id: str, url: str) -> Span:
        """The span of one request to an engine. It has no `gen_ai.…`: tokens are counted once."""
        found = urlsplit(url)
        attributes: dict[str, Any] = {
            "http.request.method": "POST",
            "server.address": found.hostname or "",
            "burnish.engine": engine_id,
        }
        if found.port is not None:
            attributes["server.port"] = found.port
        return self._tracer.start_span(
            "ask engine",
            context=self._otel.set_span_in_context(parent),
            kind=self._otel.SpanKind.CLIENT,
            attributes=attributes,
        )

    def context_of(self, span: Span) -> dict[str, str]:
        """The headers that make an engine's spans children of `span`."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._otel.set_span_in_context(span))
        return carrier

    def mark_failed(self, span: Span) -> None:
        span.set_status(self._otel.StatusCode.ERROR)

    def close(self) -> None:
        """Hand on what is left. A collector that doesn't answer holds nobody for long."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


def build_tracer(gateway_id: str, processor: SpanProcessor | None = None) -> Tracer:
    """A tracer that exports by OTLP over HTTP, or hands ended spans to `processor`.

    Raises SystemExit where the extra is missing or the environment asks for another protocol.
    """
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError:
        raise SystemExit(
            "burnish: tracing.enabled is true, but OpenTelemetry is not installed; install the "
            "extra: pip install 'burnish[otel]'"
        ) from None
    own = {
        "service.name": "burnish",
        "service.version": installed_version("burnish") or "0",
        "service.instance.id": gateway_id,
    }
    # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say comes before ours.
    resource = Resource.create(own).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(processor or _build_exporting_processor())
    return Tracer(provider)


def _build_exporting_processor() -> SpanProcessor:
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), None)
    if protocol not in (None, "http/protobuf"):
        raise SystemExit(
            f"burnish: spans are exported by http/protobuf, found {protocol!r} in the environment; "
            f"leave {' and '.join(_PROTOCOLS)} out"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SystemExit(
            "burnish: tracing.enabled is true, but the exporter is not installed; install the "
            "extra: pip install 'burnish[otel]'"
        ) from None
    return BatchSpanProcessor(OTLPSpanExporter())


def _epoch_ns(moment: float) -> int:
    return time.time_ns() - int((time.perf_counter() - moment) * 1e9)
