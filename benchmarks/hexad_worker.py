"""hexad as a user runs it, through `LLM`; see benchmarks.worker."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from benchmarks.worker import serve
from hexad import LLM, SamplingParams

CONTEXT = 1024


class _Engine:
    llm: LLM


def load(model: str, threads: int, backend: str = "cpu") -> dict[str, str]:
    """Opens the model with the default settings and a context as long as the work needs."""
    _Engine.llm = LLM(model, backend=backend, threads=threads, max_model_len=CONTEXT)
    if backend != "cpu":
        return {"version": version("hexad"), "system": backend}
    from hexad import _native

    return {"version": version("hexad"), "system": f"isa = {_native.isa()}"}


def generate(tokens: list[int], count: int) -> dict[str, Any]:
    """`count` greedy tokens after `tokens`, end of generation ignored: seconds and the tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    begin = time.perf_counter()
    [output] = _Engine.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    return {"seconds": time.perf_counter() - begin, "tokens": output.outputs[0].token_ids}


if __name__ == "__main__":
    serve(load, generate)
