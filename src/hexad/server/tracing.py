"""Traces for OpenTelemetry, one span for each request, by its conventions for generative AI (gen_ai.*)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hexad import __version__
from hexad.errors import ConfigError

_ATTRIBUTES = {
    "method": "http.request.method",
    "status": "http.response.status_code",
    "client": "client.address",
    "model": "gen_ai.response.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "time_to_first_token": "gen_ai.latency.time_to_first_token",
}


class Tracer:
    """Sends spans to a collector in the background, by OTLP over HTTP.

    endpoint: such as "http://localhost:4318"; "/v1/traces" is added where it has no path of its own.

    Raises ConfigError where hexad[otel] is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            # Names in variables: these packages are there only for those who asked for them.
            self._api: Any = import_module("opentelemetry.trace")
            propagation: Any = import_module("opentelemetry.trace.propagation.tracecontext")
            resources: Any = import_module("opentelemetry.sdk.resources")
            sdk: Any = import_module("opentelemetry.sdk.trace")
            export: Any = import_module("opentelemetry.sdk.trace.export")
            otlp: Any = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        except ImportError as error:
            raise ConfigError(
                f"otlp_endpoint needs OpenTelemetry, which is not installed ({error}): pip install "
                "'hexad[otel]'."
            ) from error
        if "/" not in endpoint.partition("://")[2]:
            endpoint += "/v1/traces"
        resource = resources.Resource.create({"service.name": "hexad", "service.version": __version__})
        self._provider: Any = sdk.TracerProvider(resource=resource)
        # It queues a bounded number of spans and drops the rest: a collector that is away holds nobody up.
        self._provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint=endpoint)))
        self._tracer: Any = self._provider.get_tracer("hexad", __version__)
        self._parents: Any = propagation.TraceContextTextMapPropagator()

    def record(self, route: str | None, request_id: str, log: Mapping[str, Any], traceparent: str) -> None:
        """Sends the span of a request that ends now. log: what is logged of it. traceparent: its header,
        whose trace the span goes on with."""
        end = time.time_ns()
        attributes = {name: log[key] for key, name in _ATTRIBUTES.items() if log.get(key) is not None}
        attributes |= {"http.route": route or "", "http.request.header.x-request-id": request_id}
        if "model" in log:
            attributes |= {"gen_ai.operation.name": "generate_content", "gen_ai.provider.name": "hexad"}
        span = self._tracer.start_span(
            f"{log['method']} {route}" if route else log["method"],
            context=self._parents.extract({"traceparent": traceparent} if traceparent else {}),
            kind=self._api.SpanKind.SERVER,
            start_time=end - int(1e9 * log["seconds"]),
            attributes=attributes,
        )
        if log["status"] >= 500:
            span.set_status(self._api.StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Sends what waits; at most as long as OpenTelemetry's own timeout."""
        self._provider.shutdown()
