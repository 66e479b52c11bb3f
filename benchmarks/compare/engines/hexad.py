"""hexad as a user runs it, through `LLM`."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from benchmarks.worker import serve
from hexad import LLM, SamplingParams


class _Engine:
    llm: LLM


def load(
    model: str, threads: int, context: int, batch: int, batch_context: int, backend: str = "cpu"
) -> dict[str, str]:
    """Default settings, but for no prefix cache: decoding is measured with the same prompt twice."""
    cache = max(context, batch * batch_context)
    _Engine.llm = LLM(
        model,
        backend=backend,
        threads=threads,
        max_model_len=max(context, batch_context),
        kv_cache_tokens=cache,
        enable_prefix_caching=False,
    )
    if backend != "cpu":
        return {"version": version("hexad"), "settings": backend}
    from hexad import _native

    return {"version": version("hexad"), "settings": f"{_native.isa()}, defaults"}


def load_seconds() -> dict[str, float]:
    """What the phases of loading took."""
    return dict(_Engine.llm.load_seconds)


def generate(prompts: list[list[int]], count: int) -> dict[str, Any]:
    """See benchmarks.compare.engines."""
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
    serve(load, generate, load_seconds)
