"""The default model's greedy answers are the recorded ones; record.py says how they were made.

Every AVX path has to give them: all sum in the same order and fuse the same multiply-adds.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.golden.record import GOLDEN, ISA, MAX_TOKENS, TOP, observe

from hexad import _native

AVX = [isa for isa in _native.isas() if isa.startswith("avx")]


@pytest.mark.skipif(not AVX, reason=f"the answers were recorded on {ISA}, and this machine has nothing alike")
@pytest.mark.parametrize("isa", AVX)
def test_answers(isa: str, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token. Logits may be off by what the last bit of another libm's sine does to a rounding."""
    monkeypatch.setenv("HEXAD_ISA", isa)
    recorded, found = json.loads(GOLDEN.read_text(encoding="utf-8")), observe(smollm2_path)
    assert (recorded["isa"], found["isa"]) == (ISA, isa)
    assert recorded["answers"][0]["text"].startswith("The capital of France is Paris")
    for then, now in zip(recorded["answers"], found["answers"], strict=True):
        assert 1 <= len(then["token_ids"]) <= MAX_TOKENS
        for key in ("prompt", "prompt_token_ids", "token_ids", "text", "finish_reason"):
            assert now[key] == then[key]
        assert len(then["first_logits"]) == TOP
        logits = dict(now["first_logits"])
        assert now["token_ids"][0] == next(iter(logits))
        for token, logit in then["first_logits"]:
            assert logits[token] == pytest.approx(logit, abs=0.02)
