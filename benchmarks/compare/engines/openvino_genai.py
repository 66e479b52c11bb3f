"""OpenVINO GenAI's continuous batching on the CPU; it reads the GGUF file itself."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.worker import serve

BLOCK = 32
"""Tokens of a block of its KV cache on a CPU."""


class _Engine:
    pipeline: openvino_genai.ContinuousBatchingPipeline


def load(model: str, threads: int, context: int, batch: int, batch_context: int) -> dict[str, str]:
    """A step takes a whole prompt of `context` tokens, which is faster than chunks of the default 256."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = max(-(-context // BLOCK), batch * -(-batch_context // BLOCK)) + 1
    scheduler.max_num_seqs = batch
    scheduler.max_num_batched_tokens = max(context, 512)
    scheduler.enable_prefix_caching = False
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    _Engine.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)
    return {"version": version("openvino-genai"), "settings": "continuous batching"}


def generate(prompts: list[list[int]], count: int) -> dict[str, Any]:
    """See benchmarks.compare.engines."""
    config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
    inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
    begin = time.perf_counter()
    outputs = _Engine.pipeline.generate(inputs, [config] * len(inputs))
    return {
        "seconds": time.perf_counter() - begin,
        "tokens": [list(output.m_generation_ids[0]) for output in outputs],
    }


if __name__ == "__main__":
    serve(load, generate)
