"""vLLM on the CPU, from a folder that benchmarks.compare.convert makes."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.worker import serve

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its memory is that of this process


class _Engine:
    llm: Any


def load(model: str, threads: int, context: int, batch: int, batch_context: int) -> dict[str, str]:
    """float32, as bfloat16 is slower on CPUs without instructions for it."""
    import torch

    torch.set_num_threads(threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "-".join(map(str, sorted({0, threads - 1})))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    import vllm

    _Engine.llm = vllm.LLM(
        model,
        dtype="float32",
        max_model_len=max(context, batch_context),
        max_num_seqs=batch,
        max_num_batched_tokens=max(context, batch_context, 2048),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    return {"version": vllm.__version__, "settings": "float32"}


def generate(prompts: list[list[int]], count: int) -> dict[str, Any]:
    """See benchmarks.compare.engines."""
    import vllm

    params = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = _Engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return {
        "seconds": time.perf_counter() - begin,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


if __name__ == "__main__":
    serve(load, generate)
