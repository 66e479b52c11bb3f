"""What an engine counts as it runs, and the metrics made of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

from hexad.outputs import FinishReason, RequestMetrics

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0,
    500.0, 1000.0, 2500.0,
)  # fmt: skip
"""Buckets of times: from a step of a tiny model to the longest patience."""

TOKENS = tuple(float(2**i) for i in range(18))
"""Buckets of numbers of tokens, 1 … 131,072."""

PREEMPTIONS = (0.0, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0)


class Histogram:
    """How often values fell into each bucket.

    bounds: the buckets' upper bounds, ascending; a value equal to one belongs to it. counts: one per bound,
    and one for what is above them all; not cumulative. sum: of all values.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Values observed."""
        return sum(self.counts)

    def observe(self, value: float, count: int = 1) -> None:
        """Takes a value, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric at one moment. name: "hexad:" and vLLM's name. labels: what tells it from its namesakes."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """Only ever grows."""

    value: int


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """Goes up and down."""

    value: float


@dataclass(frozen=True, slots=True)
class HistogramMetric(Metric):
    """count, sum: of all values. buckets: upper bound, the last "+Inf" → values not above it (Prometheus)."""

    count: int
    sum: float
    buckets: dict[str, int]


class EngineStats:
    """Counts of one engine since it began. The engine adds to them; others may read them at any time.

    At each step the engine counts steps, preemptions, prompt_tokens (computed or found in the cache),
    generation_tokens, prefix_queries and prefix_hits (tokens looked up in the prefix cache, and found there),
    and observes iteration_tokens (tokens of the step), time_to_first_token and inter_token_latency (seconds,
    once per token). `request_finished` observes the rest.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.iteration_tokens = Histogram(TOKENS)
        self.time_to_first_token = Histogram(SECONDS)
        self.inter_token_latency = Histogram(SECONDS)

        self.success: dict[FinishReason, int] = dict.fromkeys(get_args(FinishReason), 0)
        self.e2e_request_latency = Histogram(SECONDS)
        self.request_queue_time = Histogram(SECONDS)
        self.request_inference_time = Histogram(SECONDS)
        self.request_prefill_time = Histogram(SECONDS)
        self.request_decode_time = Histogram(SECONDS)
        self.request_time_per_output_token = Histogram(SECONDS)
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_generation_tokens = Histogram(TOKENS)
        self.request_num_preemptions = Histogram(PREEMPTIONS)

    def request_finished(
        self, metrics: RequestMetrics, num_prompt: int, num_generated: int, reason: FinishReason
    ) -> None:
        """Counts a request that has ended. Times that it did not live to see are not counted.

        num_prompt, num_generated: its tokens, the latter over all its sequences. `metrics.finished_time` must
        be set.
        """
        self.success[reason] += 1
        self.request_prompt_tokens.observe(num_prompt)
        self.request_generation_tokens.observe(num_generated)
        self.request_num_preemptions.observe(metrics.num_preemptions)
        finished, scheduled = metrics.finished_time, metrics.first_scheduled_time
        first, last = metrics.first_token_time, metrics.last_token_time
        assert finished is not None
        self.e2e_request_latency.observe(finished - metrics.arrival_time)
        if scheduled is None:
            return
        self.request_queue_time.observe(scheduled - metrics.arrival_time)
        self.request_inference_time.observe(finished - scheduled)
        if first is None or last is None:
            return
        self.request_prefill_time.observe(first - scheduled)
        self.request_decode_time.observe(last - first)
        if num_generated > 1:
            self.request_time_per_output_token.observe((last - first) / (num_generated - 1))

    def snapshot(self, *, num_running: int, num_waiting: int, kv_used_fraction: float) -> list[Metric]:
        """All metrics. num_running, num_waiting: requests now. kv_used_fraction: of the KV blocks."""
        return [
            Gauge("hexad:num_requests_running", {}, float(num_running)),
            Gauge("hexad:num_requests_waiting", {}, float(num_waiting)),
            Gauge("hexad:kv_cache_usage_perc", {}, kv_used_fraction),
            Counter("hexad:prefix_cache_queries", {}, self.prefix_queries),
            Counter("hexad:prefix_cache_hits", {}, self.prefix_hits),
            Counter("hexad:num_preemptions", {}, self.preemptions),
            Counter("hexad:engine_steps", {}, self.steps),
            Counter("hexad:prompt_tokens", {}, self.prompt_tokens),
            Counter("hexad:generation_tokens", {}, self.generation_tokens),
            *(
                Counter("hexad:request_success", {"finished_reason": reason}, count)
                for reason, count in self.success.items()
            ),
            _read("iteration_tokens_total", self.iteration_tokens),
            _read("time_to_first_token_seconds", self.time_to_first_token),
            _read("inter_token_latency_seconds", self.inter_token_latency),
            _read("e2e_request_latency_seconds", self.e2e_request_latency),
            _read("request_queue_time_seconds", self.request_queue_time),
            _read("request_inference_time_seconds", self.request_inference_time),
            _read("request_prefill_time_seconds", self.request_prefill_time),
            _read("request_decode_time_seconds", self.request_decode_time),
            _read("request_time_per_output_token_seconds", self.request_time_per_output_token),
            _read("request_prompt_tokens", self.request_prompt_tokens),
            _read("request_generation_tokens", self.request_generation_tokens),
            _read("request_num_preemptions", self.request_num_preemptions),
        ]


def _read(name: str, histogram: Histogram) -> HistogramMetric:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    # Counted once, so that the buckets and the count agree though the engine may be adding to them.
    buckets = list(accumulate(histogram.counts.copy()))
    return HistogramMetric(
        f"hexad:{name}", {}, buckets[-1], histogram.sum, dict(zip(bounds, buckets, strict=True))
    )
