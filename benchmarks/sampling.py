"""What sampling costs beside the rest of a step, on the shape of a 0.5B model with a vocabulary of 151,936.

    scripts/bench sampling [--threads N] [--rounds N]

Weights are random: their values do not matter to the time of a matrix product, and the logits that they make
have more likely tokens than a model's. A step is a forward pass over 1 or 32 sequences of one token each, 200
tokens in, the logits of each, and a draw from each. Sampling is what `sample` takes beyond the product that
makes the logits. The exit status is 1 if it takes more than BOUND of the step with the settings of BOUNDED.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.report import table, write
from hexad.backends.backend import Batch, CompileOptions, Limits
from hexad.backends.cpu import CpuBackend
from hexad.backends.cpu.backend import CpuExecutable
from hexad.backends.sampling import ROW_DTYPE, SAMPLER_IDS, SampleBatch
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.weights import F32, Q4_1, Weight

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 896, 24, 14, 2, 64, 4864, 151_936
CONTEXT = 200
LOGIT_STD = 3.0
BOUND = 0.05
BOUNDED = "T 0.8, top-k 40, top-p 0.95, min-p 0.05"
SETTINGS: dict[str, dict[str, Any]] = {
    BOUNDED: {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "greedy": {"temperature": 0.0},
    "T 0.8": {},
    "T 0.8, top-p 0.95": {"top_p": 0.95},
    "T 0.8, min-p 0.05": {"min_p": 0.05},
    "T 0.8, top-k 1000": {"top_k": 1000},
    "T 0.8, typical-p 0.9": {"typical_p": 0.9},
    "T 0.8, mirostat 2": {"mirostat": 2},
    "T 0.8, penalties of 200 tokens": {"repetition_penalty": 1.1, "history": True},
    "T 0.8, a mask": {"mask": 0},
    "T 0.8, 20 logprobs": {"num_logprobs": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    executable = compile_model(options.threads)
    results = []
    for rows in (1, 32):
        forward, logits, beyond = measure(executable, rows, options.rounds)
        for name, seconds in beyond.items():
            results.append(
                {
                    "rows": rows, "settings": name, "forward_ms": 1e3 * forward, "logits_ms": 1e3 * logits,
                    "sampling_ms": 1e3 * seconds, "share": seconds / (forward + logits + seconds),
                }
            )  # fmt: skip
    header = ["rows", "settings", "forward, ms", "logits, ms", "sampling, ms", "of the step, %"]
    print(
        table(header, [[*list(result.values())[:-1], f"{100 * result['share']:.2f}"] for result in results])
    )
    settings = {"threads": options.threads, "rounds": options.rounds, "isa": executable.program.isa}
    print(f"\nwritten to {write('sampling', settings, results)}")
    over = [
        f"{result['rows']} rows: {100 * result['share']:.1f} % of the step, over {100 * BOUND:g} %"
        for result in results
        if result["settings"] == BOUNDED and result["share"] > BOUND
    ]
    sys.exit("\n".join(over) or 0)


def measure(executable: CpuExecutable, rows: int, rounds: int) -> tuple[float, float, dict[str, float]]:
    """Seconds of the forward pass, of the logits, and of sampling beyond the logits with each of SETTINGS.

    The product is timed right before each sampling, and the difference is a median over rounds, since the
    machine's pace drifts by more than sampling takes.
    """
    batch = decode_batch(rows)
    out = np.empty((rows, VOCAB), np.float32)
    wanted = {name: sample_batch(rows, dict(settings)) for name, settings in SETTINGS.items()}
    forward, logits = [], []
    beyond: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        forward.append(seconds(lambda: executable.forward(batch)))
        for name, sample in wanted.items():
            logits.append(seconds(lambda: executable.program.logits(out)))
            both = seconds(lambda: executable.sample(sample))  # noqa: B023 - called at once
            beyond[name].append(both - logits[-1])
    return (
        statistics.median(forward),
        statistics.median(logits),
        {name: statistics.median(times) for name, times in beyond.items()},
    )


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compile_model(threads: int) -> CpuExecutable:
    """A model of the shape, with room for 32 sequences."""
    rng = np.random.default_rng(0)
    weights = {
        "model.norm.weight": _ones(HIDDEN),
        "model.embed_tokens.weight": _matrix(rng, VOCAB, HIDDEN, LOGIT_STD),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = _ones(HIDDEN)
        for name, rows, columns in (
            ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN), ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN), ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
            ("mlp.gate_proj", MLP, HIDDEN), ("mlp.up_proj", MLP, HIDDEN), ("mlp.down_proj", HIDDEN, MLP),
        ):  # fmt: skip
            weights[f"{layer}.{name}.weight"] = _matrix(rng, rows, columns, 1.0)
    config = {
        "model_type": "llama", "name": "0.5B", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rotary_dim": HEAD_DIM,
        "vocab_size": VOCAB, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    limits = Limits(max_rows=64, max_seqs=32, max_model_len=4096, kv_blocks=32 * _blocks())
    graph = fuse(build_graph(config, weights))
    return CpuBackend().compile(graph, weights, CompileOptions(threads=threads), limits)


def _matrix(rng: np.random.Generator, rows: int, columns: int, gain: float) -> Weight:
    """Random Q4_1: outputs have `gain` times the inputs' standard deviation."""
    raw = rng.integers(0, 256, (rows, columns // 32, Q4_1.block_bytes), dtype=np.uint8)
    scale = np.float16(gain * columns**-0.5 / 4.6)  # 4.6: the standard deviation of 0 … 15
    raw[..., :4] = np.array([scale, np.float16(-7.5 * scale)]).view(np.uint8)
    return Weight(Q4_1, (rows, columns), {"blocks": raw.reshape(rows, -1)})


def _ones(n: int) -> Weight:
    return Weight(F32, (n,), {"data": np.ones(n, np.float32)})


def _blocks() -> int:
    return -(-(CONTEXT + 1) // 32)


def decode_batch(rows: int) -> Batch:
    """One token of each of so many sequences, each CONTEXT tokens in."""
    return Batch(
        tokens=np.arange(rows, dtype=np.int32),
        row_starts=np.arange(rows + 1, dtype=np.int32),
        starts=np.full(rows, CONTEXT, np.int32),
        block_tables=np.arange(rows * _blocks(), dtype=np.int32).reshape(rows, -1),
        sample_rows=np.arange(rows, dtype=np.int32),
    )


def sample_batch(n: int, settings: dict[str, Any]) -> SampleBatch:
    """The same settings for every row. history: each row has CONTEXT random tokens of it."""
    rows = np.zeros(n, ROW_DTYPE)
    history = CONTEXT if settings.pop("history", False) else 0
    neutral = {
        "temperature": 0.8, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "repeat_last_n": -1,
        "dynatemp_exponent": 1.0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "mirostat_mu": 10.0,
        "dry_breakers": -1, "mask": -1, "draw": 1, "num_logprobs": -1,
    }  # fmt: skip
    for name, value in (neutral | settings).items():
        rows[name] = value
    rows["position"] = np.arange(n)
    rows["order"][:, : len(SAMPLER_IDS)] = list(SAMPLER_IDS.values())
    rng = np.random.default_rng(1)
    nothing = SampleBatch(
        rows=rows,
        history=rng.integers(0, VOCAB, n * history, dtype=np.int32),
        history_starts=np.arange(n + 1, dtype=np.int64) * history,
        bias_ids=np.zeros(0, np.int32), bias_values=np.zeros(0, np.float32),
        bias_starts=np.zeros(n + 1, np.int64),
        ask_ids=np.zeros(0, np.int32), ask_starts=np.zeros(n + 1, np.int64),
        masks=np.zeros((0, -(-VOCAB // 32)), np.uint32),
    )  # fmt: skip
    if settings.get("mask", -1) < 0:
        return nothing
    return replace(nothing, masks=rng.integers(0, 2**32, (1, -(-VOCAB // 32)), dtype=np.uint32))


if __name__ == "__main__":
    main()
