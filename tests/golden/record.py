"""Records what SmolLM2-135M-Instruct (Q4_1) answers, greedily and with default settings, on one ISA.

    python -m tests.golden.record

writes tests/golden/smollm2-135m.avx512vnni.json, which test_golden.py holds later builds to. Record anew only
for a deliberate change of the arithmetic, and read the new answers before committing them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tests.tiny_models import limits_for, one_sequence

from hexad import LLM, SamplingParams
from hexad.backends.backend import CompileOptions
from hexad.backends.cpu import CpuBackend
from hexad.checkpoint.open import open_checkpoint
from hexad.checkpoint.store import resolve
from hexad.graph.fuse import fuse
from hexad.models import build_graph

ISA = "avx512vnni"
GOLDEN = Path(__file__).with_name(f"smollm2-135m.{ISA}.json")

CHAT = ("What is the capital of France?", "Write three sentences about a lighthouse.", "Was ist 7 mal 8?")
RAW = ("def is_prime(n: int) -> bool:\n", "The three states of matter are")
MAX_TOKENS = 64
TOP = 5


def observe(path: Path) -> dict[str, Any]:
    """The answers of the model in this file on the ISA that HEXAD_ISA forces, as plain data.

    For each prompt its ids, the ids and text of the answer, and the TOP largest logits of its first token.
    """
    with LLM(str(path), max_model_len=256) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [
            tokenizer.encode(
                tokenizer.apply_chat_template([{"role": "user", "content": text}]), add_special=False
            )
            for text in CHAT
        ] + [tokenizer.encode(text) for text in RAW]
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
            use_tqdm=False,
        )
    answers = [output.outputs[0] for output in outputs]
    return {
        "model": "smollm2:135m",
        "isa": os.environ["HEXAD_ISA"],
        "answers": [
            {
                "prompt": text,
                "prompt_token_ids": ids,
                "token_ids": answer.token_ids,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "first_logits": logits,
            }
            for text, ids, answer, logits in zip(
                CHAT + RAW, prompts, answers, first_logits(path, prompts), strict=True
            )
        ],
    }


def first_logits(path: Path, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
    """(token, logit) of the TOP likeliest tokens after each prompt, straight from the CPU backend."""
    with open_checkpoint(path) as checkpoint:
        graph = fuse(build_graph(checkpoint.config, checkpoint.weights))
        limits = limits_for(batch_rows=256, context=256, kv_blocks=8)
        executable = CpuBackend().compile(graph, checkpoint.weights, CompileOptions(), limits)
        found = []
        for ids in prompts:
            executable.forward(one_sequence(ids, sample="last"))
            (logits,) = executable.logits()
            found.append([(int(i), float(logits[i])) for i in np.argsort(-logits, kind="stable")[:TOP]])
        return found


def main() -> None:
    os.environ["HEXAD_ISA"] = ISA
    observed = observe(resolve("smollm2:135m"))
    lines = ",\n".join(json.dumps(answer, ensure_ascii=False) for answer in observed.pop("answers"))
    head = json.dumps(observed)[1:-1]
    GOLDEN.write_text(f'{{{head}, "answers": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"written to {GOLDEN}")


if __name__ == "__main__":
    main()
