"""Hugging Face transformers on PyTorch, with the GGUF file's weights dequantised."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.worker import serve


class _Engine:
    model: Any


def load(model: str, threads: int, context: int, batch: int, batch_context: int) -> dict[str, str]:
    """float32, as bfloat16 makes prefill slower on CPUs without instructions for it."""
    torch.set_num_threads(threads)
    path = Path(model)
    _Engine.model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    return {"version": transformers.__version__, "settings": f"float32, torch {torch.__version__}"}


def generate(prompts: list[list[int]], count: int) -> dict[str, Any]:
    """See benchmarks.compare.engines. Shorter prompts are padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    begin = time.perf_counter()
    with torch.inference_mode():
        made = _Engine.model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
        )
    return {"seconds": time.perf_counter() - begin, "tokens": made[:, longest:].tolist()}


if __name__ == "__main__":
    serve(load, generate)
