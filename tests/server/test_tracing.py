"""Traces: which spans a request leaves. OpenTelemetry itself sends them, to a collector that stands here."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

import pytest
from tests.server.process import ServerProcess

from hexad.server.tracing import Tracer

pytest.importorskip("opentelemetry.sdk", reason="needs hexad[otel]")
trace = pytest.importorskip("opentelemetry.proto.trace.v1.trace_pb2", reason="needs hexad[otel]")
service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

LOG = {
    "method": "POST", "path": "/v1/completions", "status": 200, "seconds": 0.5, "model": "m",
    "prompt_tokens": 3, "completion_tokens": 4, "finish_reasons": ["stop"], "time_to_first_token": 0.1,
}  # fmt: skip
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.services: list[str] = []
        self.spans: list[Any] = []
        super().__init__(("127.0.0.1", 0), Exported)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Exported(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.append(self.path)
        for resource in service.ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.services.append(attributes(resource.resource)["service.name"])
            for scope in resource.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def attributes(of: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        held = getattr(any_value, kind)
        return [value(one) for one in held.values] if kind == "array_value" else held

    return {item.key: value(item.value) for item in of.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_a_request_is_a_span(collector: Collector) -> None:
    tracer = Tracer(collector.url)
    tracer.record("/v1/completions", "id-1", LOG, TRACEPARENT)
    tracer.close()
    (span,) = collector.spans
    assert (collector.paths, collector.services) == (["/v1/traces"], ["hexad"])
    assert (span.name, span.kind) == ("POST /v1/completions", trace.Span.SPAN_KIND_SERVER)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.status.code == trace.Status.STATUS_CODE_UNSET
    assert span.end_time_unix_nano - span.start_time_unix_nano == 500_000_000
    found = attributes(span)
    assert found["gen_ai.response.model"] == "m"
    assert found["gen_ai.usage.input_tokens"] == 3
    assert found["gen_ai.usage.output_tokens"] == 4
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert found["gen_ai.latency.time_to_first_token"] == 0.1
    assert found["http.response.status_code"] == 200
    assert found["http.request.header.x-request-id"] == "id-1"


def test_a_request_that_reached_no_model_says_nothing_of_one(collector: Collector) -> None:
    tracer = Tracer(f"{collector.url}/own/path")
    tracer.record(None, "id-1", {"method": "GET", "path": "/x", "status": 503, "seconds": 0.1}, "")
    tracer.close()
    (span,) = collector.spans
    assert collector.paths == ["/own/path"]
    assert (span.name, span.status.code, span.parent_span_id) == ("GET", trace.Status.STATUS_CODE_ERROR, b"")
    assert not [name for name in attributes(span) if name.startswith("gen_ai")]


def test_a_server_sends_the_spans_of_its_requests_before_it_ends(collector: Collector) -> None:
    with ServerProcess("--otlp-endpoint", collector.url) as server:
        body = json.dumps(
            {"model": "smollm2:135m", "prompt": "Once upon", "max_tokens": 3, "ignore_eos": True}
        )
        headers = {"Content-Type": "application/json", "traceparent": TRACEPARENT}
        with urlopen(Request(f"{server.url}/v1/completions", body.encode(), headers)) as answer:
            usage = json.load(answer)["usage"]
        assert server.terminate() == 0
    (span,) = [span for span in collector.spans if span.name == "POST /v1/completions"]
    found = attributes(span)
    assert span.trace_id.hex() == TRACE
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 3
    assert found["gen_ai.response.finish_reasons"] == ["length"]


def test_a_collector_that_is_away_holds_nobody_up() -> None:
    with ServerProcess("--otlp-endpoint", "http://127.0.0.1:9") as server:
        assert server.get("/v1/models")[0] == 200
        assert server.terminate() == 0
