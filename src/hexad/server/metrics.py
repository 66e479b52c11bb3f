"""What /metrics says: the engine's figures under vLLM's names, HTTP's, and the process's, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest

from hexad.async_llm import AsyncLLM
from hexad.config import BLOCK_TOKENS
from hexad.engine.metrics import Counter, Gauge, Histogram, HistogramMetric, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})


class Metrics:
    """Counts requests over HTTP, and writes all figures down.

    active: requests being answered now, those that operators make not counted.
    """

    def __init__(self) -> None:
        self.active = 0
        self._requests: dict[tuple[str, str, int], int] = {}
        self._seconds: dict[tuple[str, str], Histogram] = {}
        self._llm: AsyncLLM | None = None
        self._model = ""
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    def serve(self, llm: AsyncLLM, model: str) -> None:
        """From now on the engine's figures are shown, with this model's name."""
        self._llm, self._model = llm, model

    def observe(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Counts a request that was answered. route: its template; None for a path that leads nowhere."""
        # There are no more series than routes: what a client writes never becomes a label.
        handler = "none" if route is None else route
        method = method if method in _METHODS else "other"
        key = method, handler, status
        self._requests[key] = self._requests.get(key, 0) + 1
        self._seconds.setdefault((method, handler), Histogram(_SECONDS)).observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        # By hand: prometheus_client takes ten times as long, in which no token is sent.
        figures = "\n".join([*_written(self._http()), *_written(self._engine()), ""])
        return generate_latest(self._process) + figures.encode()

    def _http(self) -> Iterator[Metric]:
        for (method, handler, status), count in self._requests.items():
            labels = {"method": method, "handler": handler, "status": str(status)}
            yield Counter("http_requests", labels, count)
        for (method, handler), histogram in self._seconds.items():
            buckets = dict(zip([*map(str, _SECONDS), "+Inf"], accumulate(histogram.counts), strict=True))
            labels = {"method": method, "handler": handler}
            yield HistogramMetric(
                "http_request_duration_seconds", labels, histogram.count, histogram.sum, buckets
            )
        yield Gauge("hexad:server_load", {}, self.active)

    def _engine(self) -> Iterator[Metric]:
        if self._llm is None:
            return
        plan, config = self._llm.plan, self._llm.config
        own = {"model_name": self._model}
        for metric in self._llm.get_metrics():
            metric.labels.update(own)
            yield metric
        yield Gauge("hexad:kv_cache_bytes", own, plan.kv_bytes)
        yield Gauge("hexad:weights_bytes", own, plan.weight_bytes)
        yield Gauge("hexad:workspace_bytes", own, plan.workspace_bytes)
        info = {
            "block_size": BLOCK_TOKENS,
            "cache_dtype": config.resolved_kv_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "num_gpu_blocks": plan.kv_blocks,  # vLLM's name, which dashboards ask for
            "max_model_len": plan.max_model_len,
        }
        yield Gauge("hexad:cache_config_info", own | {key: str(value) for key, value in info.items()}, 1)


def _written(metrics: Iterable[Metric]) -> Iterator[str]:
    """Lines of the text format (Prometheus, "Exposition formats"); metrics of one name are neighbours."""
    before = ""
    for metric in metrics:
        name, labels = metric.name, _labels(metric.labels)
        kind = {Counter: "counter", Gauge: "gauge", HistogramMetric: "histogram"}[type(metric)]
        shown = f"{name}_total" if isinstance(metric, Counter) else name
        if name != before:
            before = name
            text = _HELP.get(name) or name.rpartition(":")[2].replace("_", " ").capitalize() + "."
            yield f"# HELP {shown} {text}"
            yield f"# TYPE {shown} {kind}"
        if isinstance(metric, HistogramMetric):
            for bound, count in metric.buckets.items():
                yield f'{name}_bucket{{{labels}{"," if labels else ""}le="{bound}"}} {count}'
            yield f"{name}_count{{{labels}}} {metric.count}"
            yield f"{name}_sum{{{labels}}} {metric.sum}"
        else:
            assert isinstance(metric, Counter | Gauge)
            yield f"{shown}{{{labels}}} {metric.value}"


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())


_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})

_HELP = {
    "http_requests": "Requests answered; status 499: the client hung up.",
    "http_request_duration_seconds": "From a request's head to the end of its answer.",
    "hexad:server_load": "Requests being answered.",
    "hexad:kv_cache_bytes": "Memory planned for the KV cache.",
    "hexad:weights_bytes": "Memory planned for the weights.",
    "hexad:workspace_bytes": "Memory planned for all else of the model.",
    "hexad:cache_config_info": "How the KV cache is made.",
    "hexad:num_requests_running": "Requests in the steps now.",
    "hexad:num_requests_waiting": "Requests that wait for their first step, or for blocks.",
    "hexad:kv_cache_usage_perc": "Part of the KV cache that requests hold, 0 to 1; cached prefixes are free.",
    "hexad:prefix_cache_queries": "Tokens of prompts looked up in the prefix cache.",
    "hexad:prefix_cache_hits": "Tokens of prompts found there.",
    "hexad:num_preemptions": "Times that a request gave up its blocks for others, to be computed again.",
    "hexad:engine_steps": "Steps of the engine.",
    "hexad:prompt_tokens": "Tokens of prompts, computed or found in the prefix cache.",
    "hexad:generation_tokens": "Tokens generated.",
    "hexad:request_success": "Requests that ended, by how.",
    "hexad:iteration_tokens_total": "Tokens in a step.",
    "hexad:time_to_first_token_seconds": "From a request's arrival to its first token.",
    "hexad:inter_token_latency_seconds": "From one token of a request to the next.",
    "hexad:e2e_request_latency_seconds": "From a request's arrival to its end.",
}
