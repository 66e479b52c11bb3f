"""Traces: which spans a request leaves. OpenTelemetry itself is played by stand-ins that note what they get."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hexad.errors import ConfigError
from hexad.server.tracing import Tracer

LOG = {
    "method": "POST", "path": "/v1/completions", "status": 200, "seconds": 0.5, "client": "10.0.0.1", "model": "m",
    "prompt_tokens": 3, "completion_tokens": 4, "finish_reasons": ["stop"], "time_to_first_token": 0.1,
}  # fmt: skip


class Span(SimpleNamespace):
    def set_status(self, status: str) -> None:
        self.status = status

    def end(self, at: int) -> None:
        self.end_time = at


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The endpoint, then the spans, as OpenTelemetry gets them."""
    found: list[Any] = []

    def start_span(name: str, **given: Any) -> Span:
        found.append(Span(name=name, status=None, **given))
        return found[-1]

    class Provider:
        def __init__(self, resource: Any) -> None:
            assert resource["service.name"] == "hexad"

        def add_span_processor(self, processor: Any) -> None:
            found.append(processor)

        def get_tracer(self, *_: str) -> Any:
            return SimpleNamespace(start_span=start_span)

        def shutdown(self) -> None:
            found.append("shut down")

    modules = {
        "trace": {
            "SpanKind": SimpleNamespace(SERVER="server"),
            "StatusCode": SimpleNamespace(ERROR="error"),
        },
        "trace.propagation.tracecontext": {
            "TraceContextTextMapPropagator": lambda: SimpleNamespace(extract=lambda carrier: carrier)
        },
        "sdk.resources": {"Resource": SimpleNamespace(create=lambda attributes: attributes)},
        "sdk.trace": {"TracerProvider": Provider},
        "sdk.trace.export": {"BatchSpanProcessor": lambda exporter: exporter},
        "exporter.otlp.proto.http.trace_exporter": {"OTLPSpanExporter": lambda endpoint: endpoint},
    }
    for name, attributes in modules.items():
        parts = f"opentelemetry.{name}".split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for name, attributes in modules.items():
        module = ModuleType(f"opentelemetry.{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, f"opentelemetry.{name}", module)
    return found


def test_a_request_is_a_span(sent: list[Any]) -> None:
    tracer = Tracer("http://collector:4318")
    tracer.record("/v1/completions", "id-1", LOG, "00-abc-def-01")
    tracer.close()
    endpoint, span, end = sent
    assert endpoint == "http://collector:4318/v1/traces"
    assert (span.name, span.kind, span.status, end) == ("POST /v1/completions", "server", None, "shut down")
    assert span.context == {"traceparent": "00-abc-def-01"}
    assert span.end_time - span.start_time == 500_000_000
    assert span.attributes["gen_ai.response.model"] == "m"
    assert span.attributes["gen_ai.usage.input_tokens"] == 3
    assert span.attributes["gen_ai.usage.output_tokens"] == 4
    assert span.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert span.attributes["gen_ai.latency.time_to_first_token"] == 0.1
    assert span.attributes["http.response.status_code"] == 200


def test_a_request_that_reached_no_model_says_nothing_of_one(sent: list[Any]) -> None:
    Tracer("http://collector:4318/own/path").record(
        None, "id-1", {"method": "GET", "path": "/x", "status": 503, "seconds": 0.1}, ""
    )
    endpoint, span = sent
    assert endpoint.endswith("/own/path")
    assert (span.name, span.status, span.context) == ("GET", "error", {})
    assert not [name for name in span.attributes if name.startswith("gen_ai")]


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match=r"pip install 'hexad\[otel\]'"):
        Tracer("http://collector:4318")
