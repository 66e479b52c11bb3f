"""hexad as a user runs it, through `LLM`; see benchmarks.worker."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from benchmarks.worker import serve
from hexad import LLM, SamplingParams

CONTEXT = 1024
CACHE = 16 * CONTEXT
"""Tokens of KV cache: room for a whole batch."""


class _Engine:
    llm: LLM


def load(model: str, threads: int, backend: str = "cpu") -> dict[str, str]:
    """Opens the model with the default settings, a context as long as the work needs, and no prefix cache:
    rounds repeat prompts, and the others compute them again."""
    _Engine.llm = LLM(
        model,
        backend=backend,
        threads=threads,
        max_model_len=CONTEXT,
        kv_cache_tokens=CACHE,
        enable_prefix_caching=False,
    )
    if backend != "cpu":
        return {"version": version("hexad"), "system": backend}
    from hexad import _native

    return {"version": version("hexad"), "system": f"isa = {_native.isa()}"}


def generate(tokens: list[int], count: int) -> dict[str, Any]:
    """`count` greedy tokens after `tokens`, end of generation ignored: seconds and the tokens."""
    result = generate_batch([tokens], count)
    return {"seconds": result["seconds"], "tokens": result["tokens"][0]}


def generate_batch(prompts: list[list[int]], count: int) -> dict[str, Any]:
    """`generate` for several prompts at once: seconds, and the tokens of each."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    begin = time.perf_counter()
    outputs = _Engine.llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False
    )
    return {
        "seconds": time.perf_counter() - begin,
        "tokens": [output.outputs[0].token_ids for output in outputs],
    }


if __name__ == "__main__":
    serve(load, generate, generate_batch)
