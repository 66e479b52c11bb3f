"""`hexad bench`: how fast a model runs here, and how near that is to what the machine allows."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexad.errors import ConfigError
from hexad.params import SamplingParams

if TYPE_CHECKING:
    from hexad.graph.cost import SpeedLimits
    from hexad.llm import LLM


@dataclass(frozen=True, slots=True)
class Timing:
    """One batch, in seconds. first_tokens: from its start to the first token of each sequence, ascending.
    steps: each step after the last of these, one token for each sequence."""

    first_tokens: list[float]
    steps: list[float]


def latency(
    model: str,
    settings: Mapping[str, Any],
    input_len: int,
    output_len: int,
    *,
    batch_size: int,
    iters: int,
    warmup: int,
    json_file: Path | None,
) -> None:
    """Prints medians of `iters` batches of random token ids, and writes them to `json_file`.

    Raises ConfigError if the batch cannot run all at once.
    """
    from hexad.llm import LLM

    max_num_seqs = max(batch_size, 64)
    settings = {
        **settings,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(max_num_seqs, 512),
    }
    with LLM(model, **settings) as llm:
        _check_fits(llm, batch_size, input_len + output_len)
        timings = [
            _time_batch(llm, batch_size, input_len, output_len, seed) for seed in range(warmup + iters)
        ]
        # The limits are of one sequence: a batch shares the reading of weights.
        limits = _speed_limits(llm, input_len, output_len) if batch_size == 1 else None
    figures = _figures(timings[warmup:], batch_size, input_len)
    if limits is not None:
        figures |= {"prefill_limit_tok_s": limits.prefill, "decode_limit_tok_s": limits.decode}
    if json_file is not None:
        setup = {"model": model, "input_len": input_len, "output_len": output_len, "batch_size": batch_size}
        record = {**setup, **settings, **figures, "timings": [asdict(timing) for timing in timings[warmup:]]}
        try:
            json_file.write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"The figures cannot be written to {json_file}: {error.strerror}.") from error
    _print(model, figures, batch_size, input_len, output_len, iters)


def _check_fits(llm: LLM, batch_size: int, length: int) -> None:
    """Sequences that wait for KV blocks would be measured as slow ones."""
    from hexad.engine.block_manager import blocks_for

    needed, blocks = batch_size * blocks_for(length), llm.plan.kv_blocks
    if length > llm.plan.max_model_len or needed > blocks:
        raise ConfigError(
            f"{batch_size} × {length} tokens do not fit: the context is {llm.plan.max_model_len} tokens, and "
            f"the batch needs {needed} KV cache blocks of {blocks}. "
            "Lower --input-len, --output-len or --batch-size."
        )


def _time_batch(llm: LLM, batch_size: int, input_len: int, output_len: int, seed: int) -> Timing:
    engine, rng = llm.engine, random.Random(seed)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    prompts = [rng.choices(range(engine.vocab_size), k=input_len) for _ in range(batch_size)]
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"bench-{i}", prompt, params)
    started: set[str] = set()
    first_tokens, steps = [], []
    previous = begin
    while engine.has_unfinished:
        advanced = engine.step()
        now = time.perf_counter()
        if len(started) == batch_size:
            steps.append(now - previous)
        for request in advanced:
            if request.request_id not in started:
                started.add(request.request_id)
                first_tokens.append(now - begin)
        previous = now
    return Timing(first_tokens, steps)


def _figures(timings: list[Timing], batch_size: int, input_len: int) -> dict[str, float]:
    """Medians over the batches; of single tokens, the median and 99th percentile over all steps."""
    steps = sorted(step for timing in timings for step in timing.steps)
    return {
        "prefill_tok_s": statistics.median(batch_size * input_len / t.first_tokens[-1] for t in timings),
        "decode_tok_s": statistics.median(batch_size * len(t.steps) / sum(t.steps) for t in timings),
        "ttft_s": statistics.median(first for t in timings for first in t.first_tokens),
        "token_median_s": statistics.median(steps),
        "token_p99_s": steps[round(0.99 * (len(steps) - 1))],
    }


def _speed_limits(llm: LLM, input_len: int, output_len: int) -> SpeedLimits:
    """What this machine's bandwidth and int8 rate allow this graph, in the middle of the generation."""
    from hexad.graph.cost import cost, limits
    from hexad.placement.hardware import probe
    from hexad.runner.executor import LocalExecutor

    executor = llm.engine.executor
    assert isinstance(executor, LocalExecutor)
    graph, kv_dtype = executor.runner.graph, llm.config.resolved_kv_dtype
    decode = cost(graph, graph.weights, rows=1, context=input_len + output_len // 2, kv_dtype=kv_dtype)
    prefill = cost(graph, graph.weights, rows=input_len, context=input_len, kv_dtype=kv_dtype)
    machine = probe(llm.config.threads, rates=True)
    assert machine.bandwidth is not None
    assert machine.int8_rate is not None
    return limits(decode, prefill, prompt=input_len, bandwidth=machine.bandwidth, int8_rate=machine.int8_rate)


def _print(
    model: str, figures: Mapping[str, float], batch_size: int, input_len: int, output_len: int, iters: int
) -> None:
    print(f"{model}: {batch_size} × ({input_len} tokens in, {output_len} out), medians of {iters}")
    for phase in ("prefill", "decode"):
        line = f"{phase:<12}{figures[f'{phase}_tok_s']:>10,.1f} tok/s"
        if limit := figures.get(f"{phase}_limit_tok_s"):
            line += f"  {figures[f'{phase}_tok_s'] / limit:.0%} of this machine's limit of {limit:,.0f}"
        print(line)
    print(f"{'first token':<12}{figures['ttft_s'] * 1e3:>10,.1f} ms")
    median, p99 = figures["token_median_s"] * 1e3, figures["token_p99_s"] * 1e3
    print(f"{'per token':<12}{median:>10,.2f} ms     99th percentile {p99:,.2f} ms")
