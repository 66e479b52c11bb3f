"""CTranslate2 with int8 weights, from a folder that benchmarks.compare.convert makes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ctranslate2

from benchmarks.worker import serve


class _Engine:
    generator: ctranslate2.Generator
    words: list[str]
    ids: dict[str, int]


def load(model: str, threads: int, context: int, batch: int, batch_context: int) -> dict[str, str]:
    """It takes and gives words of the vocabulary, which are translated outside of the time measured."""
    _Engine.generator = ctranslate2.Generator(
        model, device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
    )
    _Engine.words = json.loads((Path(model) / "vocabulary.json").read_text(encoding="utf-8"))
    return {"version": ctranslate2.__version__, "settings": _Engine.generator.compute_type}


def generate(prompts: list[list[int]], count: int) -> dict[str, Any]:
    """See benchmarks.compare.engines."""
    words = [[_Engine.words[token] for token in prompt] for prompt in prompts]
    begin = time.perf_counter()
    results = _Engine.generator.generate_batch(
        words,
        max_length=count,
        min_length=count,
        include_prompt_in_result=False,
        sampling_topk=1,
        end_token=[],
    )
    return {"seconds": time.perf_counter() - begin, "tokens": [result.sequences_ids[0] for result in results]}


if __name__ == "__main__":
    serve(load, generate)
