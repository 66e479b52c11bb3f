"""onnxruntime-genai with int4 weights, from a folder that benchmarks.compare.convert makes."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from benchmarks.worker import serve


class _Engine:
    model: onnxruntime_genai.Model
    pad: int


def load(model: str, threads: int, context: int, batch: int, batch_context: int) -> dict[str, str]:
    """Without a number of threads it runs on one."""
    config = onnxruntime_genai.Config(model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    _Engine.model = onnxruntime_genai.Model(config)
    _Engine.pad = json.loads((Path(model) / "genai_config.json").read_text())["model"]["pad_token_id"]
    return {"version": version("onnxruntime-genai"), "settings": "int4, accuracy level 4"}


def generate(prompts: list[list[int]], count: int) -> dict[str, Any]:
    """See benchmarks.compare.engines. Shorter prompts are padded on the right,
    where its attention kernel leaves them out."""
    longest = max(len(prompt) for prompt in prompts)
    padded = [prompt + [_Engine.pad] * (longest - len(prompt)) for prompt in prompts]
    length = longest + count
    begin = time.perf_counter()
    params = onnxruntime_genai.GeneratorParams(_Engine.model)
    params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
    generator = onnxruntime_genai.Generator(_Engine.model, params)
    generator.append_tokens(np.array(padded, np.int32))
    for _ in range(count):
        generator.generate_next_token()
    tokens = [generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))]
    return {"seconds": time.perf_counter() - begin, "tokens": tokens}


if __name__ == "__main__":
    serve(load, generate)
