"""Runs the jobs of `hexad bench` through the engine, and makes figures of what was seen."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from hexad.cli.bench_workload import Job
from hexad.errors import BackendError
from hexad.params import SamplingParams

if TYPE_CHECKING:
    from hexad.backends.backend import Profile
    from hexad.engine.engine import Engine
    from hexad.graph.cost import StepNumbers


class Step(NamedTuple):
    """end: seconds since the run began. computed: tokens, of prompts and streams. drawn: new tokens."""

    end: float
    computed: int
    drawn: int


@dataclass(frozen=True, slots=True)
class Run:
    """Jobs that began together, in the order given. token_times: of each job's tokens, in seconds since the
    run began. cached: prompt tokens of each job that the prefix cache had. profiles: if wanted, at the begin,
    once all jobs had their first token, and at the end."""

    jobs: Sequence[Job]
    steps: Sequence[Step]
    token_times: Sequence[Sequence[float]]
    cached: Sequence[int]
    preemptions: int
    profiles: Sequence[Profile] = ()

    @property
    def seconds(self) -> float:
        """From the first job's arrival to the last token."""
        return self.steps[-1].end

    @property
    def last_first_token(self) -> float:
        """When the last of the jobs got its first token."""
        return max(times[0] for times in self.token_times)


class Spread(NamedTuple):
    """Of many values, in seconds."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Percentiles are interpolated. There must be a value."""
        ascending = sorted(values)
        return cls(statistics.fmean(ascending), statistics.median(ascending), percentile(ascending, 99))


def percentile(ascending: Sequence[float], percent: float) -> float:
    """Interpolated linearly between the two values nearest to it. There must be a value."""
    low, part = divmod(percent / 100 * (len(ascending) - 1), 1)
    below, above = ascending[int(low)], ascending[min(int(low) + 1, len(ascending) - 1)]
    return below + part * (above - below)


class Work(NamedTuple):
    """What jobs need at best. steps: in which the weights are read. tokens: computed. draws: rows of logits.
    pairs: of a computed token and a position it looks at. positions: of KV, read by streams."""

    steps: int
    tokens: int
    draws: int
    pairs: int
    positions: int

    def moved(self, cost: StepNumbers) -> int:
        """Bytes read from memory."""
        return self.steps * cost.step_bytes + self.positions * cost.position_bytes

    def macs(self, cost: StepNumbers, *, attention: int = 1) -> int:
        """Multiply-adds, one of attention counting as so many."""
        linear = self.tokens * cost.token_macs + self.draws * cost.draw_macs
        return linear + attention * self.pairs * cost.pair_macs

    def seconds(self, cost: StepNumbers, *, bandwidth: float, int8_rate: float) -> float:
        """The least time that a machine takes: that of its memory [bytes/s] or, where longer, of its
        arithmetic [int8 multiply-adds/s], each kept busy throughout. Attention is float32."""
        from hexad.graph.cost import FLOAT_SHARE

        return max(self.moved(cost) / bandwidth, self.macs(cost, attention=FLOAT_SHARE) / int8_rate)


def run(engine: Engine, jobs: Sequence[Job], profile: Callable[[], Profile] | None = None) -> Run:
    """Generates all jobs' tokens, whatever they are, greedily, as `LLM.generate` does. Raises HexadErrors."""
    for job in jobs:
        engine.check(job.token_ids, _params(job))
    stats = engine.stats
    computed, preemptions = stats.iteration_tokens.sum, stats.preemptions
    steps: list[Step] = []
    times: dict[str, list[float]] = {}
    profiles = [profile()] if profile is not None else []
    begin = time.monotonic()
    requests = [
        engine.add_request(f"bench-{i}", job.token_ids, _params(job), watched=False, checked=True)
        for i, job in enumerate(jobs)
    ]
    for request in requests:
        times[request.request_id] = []
    while engine.has_unfinished:
        advanced = engine.step()
        now = time.monotonic() - begin
        for request in advanced:
            times[request.request_id].append(now)
        total = stats.iteration_tokens.sum
        steps.append(Step(now, round(total - computed), len(advanced)))
        computed = total
        if profile is not None and len(profiles) == 1 and all(times.values()):
            profiles.append(profile())
    if profile is not None:
        profiles.append(profile())
    for request in requests:
        if (error := request.sequences[0].error) is not None:
            raise BackendError(f"A step failed: {error}")
    return Run(
        jobs,
        steps,
        list(times.values()),
        [request.num_cached_tokens for request in requests],
        stats.preemptions - preemptions,
        profiles,
    )


def _params(job: Job) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=job.output_len, ignore_eos=True)


def figures(runs: Sequence[Run]) -> dict[str, float]:
    """Rates over the runs, one after another, and spreads over all their requests."""
    seconds = sum(run.seconds for run in runs)
    jobs = [job for run in runs for job in run.jobs]
    prompt = sum(len(job.token_ids) for job in jobs)
    output = sum(job.output_len for job in jobs)
    found = {
        "seconds": seconds,
        "requests": len(jobs),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_tokens": sum(sum(run.cached) for run in runs),
        "preemptions": sum(run.preemptions for run in runs),
        "steps": sum(len(run.steps) for run in runs),
        "requests_per_s": len(jobs) / seconds,
        "output_tok_s": output / seconds,
        "total_tok_s": (prompt + output) / seconds,
    }
    for name, values in latencies(runs).items():
        if values:
            found |= {f"{name}_{key}_s": value for key, value in Spread.of(values)._asdict().items()}
    return found


def latencies(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Seconds. ttft: of each request until its first token. tpot: of each per token after it. itl: between
    two tokens of a request. e2e: of each until its last token."""
    all_times = [times for run in runs for times in run.token_times]
    return {
        "ttft": [times[0] for times in all_times],
        "tpot": [(times[-1] - times[0]) / (len(times) - 1) for times in all_times if len(times) > 1],
        "itl": [b - a for times in all_times for a, b in pairwise(times)],
        "e2e": [times[-1] for times in all_times],
    }


def work(run: Run, *, max_num_seqs: int, max_num_batched_tokens: int) -> Work:
    """What a run needed at best, with so many sequences and tokens in a step and what it found cached."""
    tokens = draws = pairs = positions = longest = 0
    for job, cached in zip(run.jobs, run.cached, strict=True):
        prompt = len(job.token_ids)
        length = prompt + job.output_len - 1  # the last token drawn is not computed
        tokens += length - cached
        draws += job.output_len
        pairs += _sum_to(length) - _sum_to(cached)
        # What several share could be read for all at once.
        positions += _sum_to(length) - _sum_to(prompt) - (length - prompt) * cached
        longest = max(longest, job.output_len)
    steps = max(longest, -(-draws // max_num_seqs), -(-tokens // max_num_batched_tokens))
    return Work(steps, tokens, draws, pairs, positions)


def prefill_work(jobs: Sequence[Job], *, max_num_batched_tokens: int) -> Work:
    """What the jobs' prompts need."""
    tokens = sum(len(job.token_ids) for job in jobs)
    pairs = sum(_sum_to(len(job.token_ids)) for job in jobs)
    return Work(-(-tokens // max_num_batched_tokens), tokens, len(jobs), pairs, 0)


def decode_work(jobs: Sequence[Job]) -> Work:
    """What all tokens after the jobs' first ones need, with all jobs in every step."""
    draws = sum(job.output_len - 1 for job in jobs)
    looks = sum(
        _sum_to(len(job.token_ids) + job.output_len - 1) - _sum_to(len(job.token_ids)) for job in jobs
    )
    return Work(max(job.output_len for job in jobs) - 1, draws, draws, looks, looks)


def _sum_to(n: int) -> int:
    return n * (n + 1) // 2
