"""What a process takes beside its weights: nothing of the file they came from, and no second copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.gguf_writer import TYPE_Q8_0, llama, write

from hexad.checkpoint.tokenizer import byte_alphabet

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")

BESIDE = 150e6
"""Bytes that a process may take beside packed weights and the KV cache asked for."""
MEASURED = """
import json, sys
from pathlib import Path
from hexad import LLM, SamplingParams

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

llm = LLM(sys.argv[1], max_model_len=544, kv_cache_tokens=544)
mapped = memory("RssFile")
prompt = {"prompt_token_ids": [i % 250 + 1 for i in range(512)]}
llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
print(json.dumps([memory("VmHWM"), mapped, llm.plan.weight_bytes, llm.plan.kv_bytes]))
"""


def measured(model: Path) -> tuple[int, int, int, int]:
    """Of a process that loads a model and answers: peak memory, mapped memory, bytes of weights and cache."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(model)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, mapped, weights, cache = json.loads(done.stdout)
    return peak, mapped, weights, cache


@pytest.fixture
def large_model(tmp_path: Path) -> Path:
    """302 MB of Q8_0 weights, with a vocabulary of the 256 bytes."""
    tokens = byte_alphabet()
    metadata, tensors = llama(
        layers=8, hidden=2048, intermediate=4096, heads=32, kv_heads=8, head_dim=64, vocab=256,
        type_id=TYPE_Q8_0, llama__context_length=1024, tokenizer__ggml__model="gpt2",
        tokenizer__ggml__pre="gpt-2", tokenizer__ggml__tokens=tokens, tokenizer__ggml__merges=["a b"],
    )  # fmt: skip
    metadata["tokenizer.ggml.tokens"] = [*tokens[:-1], "ab"]
    path = tmp_path / "large.gguf"
    path.write_bytes(write(metadata, tensors))
    return path


def test_peak_of_a_large_model(large_model: Path) -> None:
    """As little beside the weights as with a small one: nothing of the file is left, and no second copy."""
    peak, mapped, weights, cache = measured(large_model)
    assert weights > 300e6
    assert peak <= weights + cache + BESIDE
    assert mapped <= 60e6


def test_peak_of_the_default_model(smollm2_path: Path) -> None:
    peak, mapped, weights, cache = measured(smollm2_path)
    assert peak <= weights + cache + BESIDE
    assert mapped <= 60e6  # libraries; the file has 98 MB
