"""The default model's greedy answers are the recorded ones; record.py says how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.golden.record import GOLDEN, ISA, MAX_TOKENS, TOP, observe

from hexad import _native

pytestmark = pytest.mark.skipif(
    ISA not in _native.isas(), reason=f"the answers were recorded on {ISA}, which this machine or build lacks"
)


def test_answers(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token. Logits may be off by what the last bit of another libm's sine does to a rounding."""
    monkeypatch.setenv("HEXAD_ISA", ISA)
    recorded, found = json.loads(GOLDEN.read_text(encoding="utf-8")), observe(smollm2_path)
    assert recorded["isa"] == ISA
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
