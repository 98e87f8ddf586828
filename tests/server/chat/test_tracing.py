"""Spans: what they say, whose children they are, and that nothing of them is there when off."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from feedback.db import Database
from server.chat.tracing import build_tracer
from server.settings import TracingSettings
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import MAX_LORAS, RunningGateway, start_gateway

SECRET = "the colour of my door is ochre"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
BODY: dict[str, Any] = {
    "model": "assistant",
    "messages": [{"role": "user", "content": SECRET}],
    "temperature": 0.5,
    "top_p": 0.9,
    "max_tokens": 7,
    "seed": 3,
    "stop": [SECRET[:5]],
    "user": "end-user-anna",
    "metadata": {"conversation_id": "conv-1"},
}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Takes the spans of gateways that are started from now on."""
    found = InMemorySpanExporter()
    processor = SimpleSpanProcessor(found)
    monkeypatch.setattr("server.gateway.build_tracer", lambda name: build_tracer(name, processor))
    return found


@pytest.fixture
def traced(
    sqlite_database: Database,
    gateway_engine: FakeEngine,
    exporter: InMemorySpanExporter,
    tmp_path: Path,
) -> Iterator[RunningGateway]:
    with start_gateway(
        sqlite_database, tmp_path / "data", [gateway_engine.address], tracing=True
    ) as running:
        yield running


def spans_of(exporter: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    """The spans, once so many have ended: a reply reaches its client before its span does."""
    until = time.monotonic() + 5
    while len(exporter.get_finished_spans()) < count:
        assert time.monotonic() < until, exporter.get_finished_spans()
        time.sleep(0.01)  # another thread's loop ends them, and tells nobody
    found = list(exporter.get_finished_spans())
    assert len(found) == count
    exporter.clear()
    return found


def facts_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_a_server_span_with_the_engines_below_it(
    traced: RunningGateway, exporter: InMemorySpanExporter, stream: bool
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
    body = {**BODY, "stream": stream}
    reply = traced.client().post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200
    asking, answering = spans_of(exporter, 2)

    assert (answering.name, answering.kind) == ("chat assistant", SpanKind.SERVER)
    assert (asking.name, asking.kind) == ("ask engine", SpanKind.CLIENT)
    assert answering.parent is not None
    assert answering.context is not None
    assert asking.parent is not None
    assert f"{answering.context.trace_id:032x}" == TRACE_ID
    assert f"{answering.parent.span_id:016x}" == PARENT_ID
    assert asking.parent.span_id == answering.context.span_id
    facts = facts_of(answering)
    number = reply.headers["x-request-id"]
    measured = {
        name: facts.pop(name)
        for name in ("burnish.commit_wait_seconds", "burnish.time_to_first_token_seconds")
        if name in facts
    }
    assert all(0 < seconds < 5 for seconds in measured.values())
    assert ("burnish.time_to_first_token_seconds" in measured) is stream
    tokens = (facts.pop("gen_ai.usage.input_tokens"), facts.pop("gen_ai.usage.output_tokens"))
    assert all(isinstance(number, int) and number > 0 for number in tokens)
    (reason,) = facts.pop("gen_ai.response.finish_reasons")
    assert reason in ("stop", "length")
    assert (facts.pop("server.address"), facts.pop("server.port")) == (
        "127.0.0.1",
        int(traced.url.rpartition(":")[2]),
    )
    assert facts == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "burnish",
        "gen_ai.request.model": "assistant",
        "gen_ai.request.stream": stream,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": f"chatcmpl-{number}",
        "gen_ai.response.model": "assistant@0",
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "burnish.request_id": number,
        "burnish.release": "assistant@0",
        "burnish.deployment": "assistant",
        "burnish.arm": "production",
        "burnish.generation": 0,
        "burnish.kind": "chat",
        "burnish.engine": "engine-0",
    }
    assert answering.status.status_code == asking.status.status_code == StatusCode.UNSET
    assert not [name for name in facts_of(asking) if name.startswith("gen_ai")]
    assert facts_of(asking)["burnish.engine"] == "engine-0"
    assert answering.start_time < asking.start_time < asking.end_time < answering.end_time
    said = answering.to_json() + asking.to_json()
    for secret in (SECRET, SECRET[:5], "anna", "conv-1", "person", traced.admin_key):
        assert secret not in said


def test_the_engine_gets_the_trace_of_the_span_that_asks_it(
    traced: RunningGateway, gateway_engine: FakeEngine, exporter: InMemorySpanExporter
) -> None:
    seen: list[dict[str, str]] = []
    replica = next(iter(traced.gateway.chooser.replicas.values()))
    post = replica.engine.post

    def watch(path: str, body: bytes, **options: Any) -> Any:
        seen.append(dict(options["headers"]))
        return post(path, body, **options)

    replica.engine.post = watch  # type: ignore[method-assign] - its arguments are what is asked
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "baggage": "user=anna"}
    traced.client().post("/v1/completions", json={"model": "assistant", "prompt": "Hi"},
                         headers=headers)  # fmt: skip
    asking, answering = spans_of(exporter, 2)
    assert answering.name == "text_completion assistant"
    assert asking.context is not None
    assert seen == [{"traceparent": f"00-{TRACE_ID}-{asking.context.span_id:016x}-01"}]

    # A caller who doesn't sample is followed, and the engine hears of it.
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    traced.client().post("/v1/chat/completions", json=BODY, headers=headers)
    assert seen[1]["traceparent"].startswith(f"00-{TRACE_ID}-")
    assert seen[1]["traceparent"].endswith("-00")
    assert exporter.get_finished_spans() == ()


def test_what_is_refused_has_a_span_that_says_why(
    traced: RunningGateway, exporter: InMemorySpanExporter
) -> None:
    client = traced.client()
    for change, headers, status, error in (
        ({"model": SECRET}, {}, 404, "model_not_found"),
        ({}, {"authorization": "Bearer sk-none"}, 401, "invalid_api_key"),
        ({"temperature": 9}, {}, 400, "400"),
    ):
        reply = client.post("/v1/chat/completions", json={**BODY, **change}, headers=headers)
        (span,) = spans_of(exporter, 1)
        facts = facts_of(span)
        assert (reply.status_code, facts["http.response.status_code"]) == (status, status)
        assert (span.name, facts["error.type"]) == ("chat", error)
        assert span.status.status_code == StatusCode.UNSET  # the caller's doing
        assert facts["burnish.request_id"] == reply.headers["x-request-id"]
        assert SECRET not in span.to_json()
    client.get("/v1/models")
    client.post("/v1/feedback", json={})
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("stream", "faults", "status", "error"),
    [
        (False, Faults(error_status=500), 502, "engine_error"),
        (True, Faults(dies_after_tokens=2), 200, "engine_failed"),
    ],
)
def test_an_engine_that_fails_is_a_failed_span(
    traced: RunningGateway,
    gateway_engine: FakeEngine,
    exporter: InMemorySpanExporter,
    stream: bool,
    faults: Faults,
    status: int,
    error: str,
) -> None:
    gateway_engine.faults = faults
    body = {**BODY, "stream": stream}
    assert traced.client().post("/v1/chat/completions", json=body).status_code == status
    asking, answering = spans_of(exporter, 2)
    assert facts_of(answering)["error.type"] == facts_of(asking)["error.type"] == error
    assert facts_of(answering)["http.response.status_code"] == status
    assert answering.status.status_code == asking.status.status_code == StatusCode.ERROR


def test_each_engine_that_is_asked_is_a_span(
    sqlite_database: Database, exporter: InMemorySpanExporter, tmp_path: Path
) -> None:
    with (
        FakeEngine(api_key="secret", max_loras=MAX_LORAS) as bad,
        FakeEngine(api_key="secret", max_loras=MAX_LORAS) as good,
        start_gateway(
            sqlite_database, tmp_path / "data", [bad.address, good.address], tracing=True
        ) as running,
    ):
        running.reconcile()
        bad.faults = Faults(error_status=500)
        assert running.client().post("/v1/chat/completions", json=BODY).status_code == 200
        failed, asked, answering = spans_of(exporter, 3)
    assert (facts_of(failed)["burnish.engine"], failed.status.status_code) == (
        "engine-0",
        StatusCode.ERROR,
    )
    assert facts_of(failed)["error.type"] == "engine_failed"
    assert facts_of(asked)["burnish.engine"] == facts_of(answering)["burnish.engine"] == "engine-1"
    assert asked.status.status_code == answering.status.status_code == StatusCode.UNSET


def test_a_client_that_leaves_is_no_failed_span(
    traced: RunningGateway, gateway_engine: FakeEngine, exporter: InMemorySpanExporter
) -> None:
    gateway_engine.faults = Faults(endless=True, token_seconds=0.02)
    body = {**BODY, "stream": True, "max_tokens": 1000}
    with traced.client().stream("POST", "/v1/chat/completions", json=body) as reply:
        assert next(reply.iter_lines())
    _, answering = spans_of(exporter, 2)
    assert facts_of(answering)["error.type"] == "client_left"
    assert answering.status.status_code == StatusCode.UNSET


def test_a_broken_traceparent_begins_a_trace(
    traced: RunningGateway, exporter: InMemorySpanExporter
) -> None:
    for broken in ("no", "00-" + "0" * 32 + f"-{PARENT_ID}-01", "é" * 600, "ff-" + "a" * 53):
        headers = {"traceparent": broken.encode("latin-1")}
        reply = traced.client().post("/v1/chat/completions", json=BODY, headers=headers)
        assert reply.status_code == 200
        answering = spans_of(exporter, 2)[1]
        assert answering.parent is None


@pytest.mark.processes
def test_without_the_setting_opentelemetry_is_not_imported() -> None:
    script = (
        "import sys, server.app, server.gateway, server.chat.tracing\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_without_the_setting_there_is_no_tracer(sqlite_gateway: RunningGateway) -> None:
    assert sqlite_gateway.gateway.tracer is None
    assert TracingSettings().enabled is False


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(SystemExit, match=r"pip install 'burnish\[otel\]'"):
        build_tracer("gw_1")


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(SystemExit, match="found 'grpc'"):
        build_tracer("gw_1")


class Collector(http.server.ThreadingHTTPServer):
    """Takes what is exported to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Collecting)
        self.taken: list[tuple[str, str | None, ExportTraceServiceRequest]] = []
        self.hangs = threading.Event()


class Collecting(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        if self.server.hangs.is_set():
            threading.Event().wait(30)
        found = ExportTraceServiceRequest.FromString(raw)
        self.server.taken.append((self.path, self.headers.get("x-team"), found))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{found.server_address[1]}"
        )
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=birds")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield found
        found.shutdown()
        thread.join()


def test_spans_travel_by_otlp_to_where_the_environment_says(
    sqlite_database: Database, gateway_engine: FakeEngine, collector: Collector, tmp_path: Path
) -> None:
    addresses = [gateway_engine.address]
    with start_gateway(sqlite_database, tmp_path / "data", addresses, tracing=True) as running:
        number = running.client().post("/v1/chat/completions", json=BODY).headers["x-request-id"]
    # The gateway has ended, so it has handed on all it had.
    (taken,) = collector.taken
    path, team, request = taken
    assert (path, team) == ("/v1/traces", "birds")
    (resource,) = request.resource_spans
    about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert about["service.name"] == "burnish"
    assert about["deployment.environment.name"] == "test"
    assert about["service.instance.id"] == running.gateway.id
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    (answering,) = [span for span in spans if span.name == "chat assistant"]
    facts = {pair.key: pair.value for pair in answering.attributes}
    assert facts["gen_ai.response.id"].string_value == f"chatcmpl-{number}"
    assert facts["gen_ai.usage.output_tokens"].int_value > 0
    assert SECRET.encode() not in request.SerializeToString()


@pytest.mark.processes
def test_a_collector_that_hangs_holds_neither_answers_nor_the_end(
    sqlite_database: Database, gateway_engine: FakeEngine, collector: Collector, tmp_path: Path
) -> None:
    collector.hangs.set()
    addresses = [gateway_engine.address]
    with start_gateway(sqlite_database, tmp_path / "data", addresses, tracing=True) as running:
        client = running.client()
        replies = [client.post("/v1/chat/completions", json=BODY) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 200]
        ending = time.monotonic()
    assert time.monotonic() - ending < 10
    assert collector.taken == []
