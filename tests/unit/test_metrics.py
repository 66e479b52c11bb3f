"""EngineStats: what is counted, and the metrics made of it."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexad.engine.metrics import Counter, EngineStats, Gauge, Histogram, HistogramMetric, Metric
from hexad.outputs import FinishReason, RequestMetrics


def metrics_of(stats: EngineStats) -> dict[str, Metric]:
    snapshot = stats.snapshot(num_running=0, num_waiting=0, kv_used_fraction=0.0)
    return {metric.name: metric for metric in snapshot if not metric.labels}


def observed(stats: EngineStats, name: str) -> tuple[int, float]:
    """Count and sum of a histogram."""
    metric = metrics_of(stats)[f"hexad:{name}"]
    assert isinstance(metric, HistogramMetric)
    return metric.count, metric.sum


@given(
    bounds=st.lists(st.integers(-50, 50), min_size=1, unique=True).map(sorted),
    values=st.lists(st.tuples(st.integers(-60, 60), st.integers(1, 4))),
)
def test_every_value_is_in_the_first_bucket_that_reaches_it(
    bounds: list[float], values: list[tuple[int, int]]
) -> None:
    histogram = Histogram(bounds)
    for value, count in values:
        histogram.observe(value, count)
    every = [value for value, count in values for _ in range(count)]
    edges = [float("-inf"), *bounds, float("inf")]
    assert histogram.counts == [
        sum(below < value <= edge for value in every) for below, edge in pairwise(edges)
    ]
    assert (histogram.count, histogram.sum) == (len(every), sum(every))


def test_buckets_are_cumulative_and_end_with_all() -> None:
    stats = EngineStats()
    for seconds in (0.0001, 0.03, 0.03, 99999.0):
        stats.time_to_first_token.observe(seconds)
    metric = metrics_of(stats)["hexad:time_to_first_token_seconds"]
    assert isinstance(metric, HistogramMetric)
    assert [metric.buckets[bound] for bound in ("0.001", "0.025", "0.05", "2500.0", "+Inf")] == [
        1,
        1,
        3,
        3,
        4,
    ]
    assert list(metric.buckets)[-1] == "+Inf"
    assert metric.count == 4
    assert metric.sum == pytest.approx(99999.0601)


def test_a_finished_request_is_taken_apart() -> None:
    stats = EngineStats()
    times = RequestMetrics(
        arrival_time=100.0, first_scheduled_time=101.0, first_token_time=103.0, last_token_time=111.0,
        finished_time=112.0, num_preemptions=3,
    )  # fmt: skip
    stats.request_finished(times, num_prompt=40, num_generated=5, reason="length")
    assert {
        name: observed(stats, name)
        for name in (
            "e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds",
            "request_prefill_time_seconds", "request_decode_time_seconds",
            "request_time_per_output_token_seconds", "request_prompt_tokens", "request_generation_tokens",
            "request_num_preemptions",
        )
    } == {
        "e2e_request_latency_seconds": (1, 12.0), "request_queue_time_seconds": (1, 1.0),
        "request_inference_time_seconds": (1, 11.0), "request_prefill_time_seconds": (1, 2.0),
        "request_decode_time_seconds": (1, 8.0), "request_time_per_output_token_seconds": (1, 2.0),
        "request_prompt_tokens": (1, 40.0), "request_generation_tokens": (1, 5.0),
        "request_num_preemptions": (1, 3.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scheduled", "first", "queued", "prefilled"),
    [(None, None, 0, 0), (11.0, None, 1, 0), (11.0, 12.0, 1, 1)],
    ids=["never scheduled", "no token", "one token"],
)
def test_times_that_a_request_did_not_see_are_not_counted(
    scheduled: float | None, first: float | None, queued: int, prefilled: int
) -> None:
    stats = EngineStats()
    times = RequestMetrics(10.0, scheduled, first, first, finished_time=13.0)
    stats.request_finished(times, num_prompt=4, num_generated=prefilled, reason="abort")
    assert observed(stats, "e2e_request_latency_seconds") == (1, 3.0)
    assert observed(stats, "request_queue_time_seconds")[0] == queued
    assert observed(stats, "request_prefill_time_seconds")[0] == prefilled
    assert observed(stats, "request_time_per_output_token_seconds")[0] == 0


def test_snapshot_has_every_count_under_its_name() -> None:
    stats = EngineStats()
    stats.steps, stats.preemptions, stats.prompt_tokens = 1, 2, 3
    stats.generation_tokens, stats.prefix_queries, stats.prefix_hits = 4, 5, 6
    stats.request_finished(RequestMetrics(0.0, finished_time=1.0), 1, 0, "error")
    snapshot = stats.snapshot(num_running=7, num_waiting=8, kv_used_fraction=0.25)
    assert {m.name.removeprefix("hexad:"): m.value for m in snapshot if isinstance(m, Gauge)} == {
        "num_requests_running": 7.0,
        "num_requests_waiting": 8.0,
        "kv_cache_usage_perc": 0.25,
    }
    counters = [m for m in snapshot if isinstance(m, Counter)]
    assert {m.name.removeprefix("hexad:"): m.value for m in counters if not m.labels} == {
        "engine_steps": 1,
        "num_preemptions": 2,
        "prompt_tokens": 3,
        "generation_tokens": 4,
        "prefix_cache_queries": 5,
        "prefix_cache_hits": 6,
    }
    success = {m.labels["finished_reason"]: m.value for m in counters if m.labels}
    assert success == {reason: int(reason == "error") for reason in get_args(FinishReason)}


def test_every_histogram_is_in_the_snapshot_once() -> None:
    stats = EngineStats()
    histograms = [value for value in vars(stats).values() if isinstance(value, Histogram)]
    for number, histogram in enumerate(histograms, 1):
        histogram.observe(0.0, number)
    read = [metric for metric in metrics_of(stats).values() if isinstance(metric, HistogramMetric)]
    assert sorted(metric.count for metric in read) == list(range(1, len(histograms) + 1))


def test_a_snapshot_stays_as_it_was() -> None:
    stats = EngineStats()
    before = stats.snapshot(num_running=0, num_waiting=0, kv_used_fraction=0.0)
    stats.steps += 1
    stats.inter_token_latency.observe(0.01, 5)
    assert before == EngineStats().snapshot(num_running=0, num_waiting=0, kv_used_fraction=0.0)


def test_a_copy_of_times_has_them_all() -> None:
    times = RequestMetrics(**{field.name: i for i, field in enumerate(fields(RequestMetrics))})  # type: ignore[arg-type]
    copied = times.copy()
    assert copied == times
    copied.num_preemptions += 1
    assert copied != times
