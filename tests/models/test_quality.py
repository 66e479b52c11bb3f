"""What the CPU backend's arithmetic costs on SmolLM2: float32 next to nothing, int8 within stated bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.tiny_models import one_sequence

from hexad.backends.backend import CompileOptions, Executable, Limits
from hexad.backends.cpu import CpuBackend
from hexad.backends.reference import ReferenceBackend
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.open import open_checkpoint
from hexad.graph.fuse import fuse
from hexad.models import build_graph

WINDOW = 512
TEXTS = sorted((Path(__file__).parents[1] / "golden" / "texts").glob("*.txt"))
PER_TEXT = 2  # whole windows of each text: 3,072 tokens in all


@dataclass
class Window:
    """Tokens of a text and the reference's logits for each, float32 [tokens, vocab]."""

    text: str
    tokens: list[int]
    truth: NDArray[np.float32]


@pytest.fixture(scope="module")
def checkpoint(smollm2_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(smollm2_path) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def windows(checkpoint: Checkpoint) -> list[Window]:
    graph = build_graph(checkpoint.config, checkpoint.weights)
    options = CompileOptions(compute="float", kv_dtype="f32")
    reference = ReferenceBackend().compile(graph, checkpoint.weights, options, LIMITS)
    found = []
    for text in TEXTS:
        tokens = checkpoint.tokenizer().encode(text.read_text(encoding="utf-8"))
        for start in range(0, PER_TEXT * WINDOW, WINDOW):
            part = tokens[start : start + WINDOW]
            assert len(part) == WINDOW
            found.append(Window(text.stem, part, logits(reference, part)))
    return found


LIMITS = Limits(max_rows=WINDOW, max_seqs=1, max_model_len=WINDOW, kv_blocks=WINDOW // 32)


def logits(executable: Executable, tokens: Sequence[int]) -> NDArray[np.float32]:
    executable.forward(one_sequence(tokens))
    return executable.logits()


def compiled(checkpoint: Checkpoint, options: CompileOptions) -> Executable:
    graph = fuse(build_graph(checkpoint.config, checkpoint.weights))
    return CpuBackend().compile(graph, checkpoint.weights, options, LIMITS)


@pytest.mark.parametrize(("kv_dtype", "bound"), [("f32", 2e-3), ("f16", 5e-2)])
def test_float(checkpoint: Checkpoint, windows: list[Window], kv_dtype: str, bound: float) -> None:
    """One window of each text; logits are about 10."""
    executable = compiled(checkpoint, CompileOptions(compute="float", kv_dtype=kv_dtype))
    for window in windows[::PER_TEXT]:
        assert window.truth.std() > 1
        assert np.abs(logits(executable, window.tokens) - window.truth).max() <= bound


def test_int8(checkpoint: Checkpoint, windows: list[Window]) -> None:
    """KL(reference ‖ int8) in nats and agreement on the likeliest token, over at least 2,048 positions.

    The project promises 0.006 and 94.5 %; 0.002 and 97 % keep what has been reached.
    """
    executable = compiled(checkpoint, CompileOptions())
    kl: dict[str, list[float]] = {text.stem: [] for text in TEXTS}
    agreed = []
    for window in windows:
        for p, q in zip(window.truth, logits(executable, window.tokens), strict=True):
            log_p, log_q = log_softmax(p), log_softmax(q)
            kl[window.text].append(float(np.exp(log_p) @ (log_p - log_q)))
            agreed.append(p.argmax() == q.argmax())
    everything = [value for values in kl.values() for value in values]
    assert len(everything) >= 2048
    assert len(kl) == 3
    mean, top1 = np.mean(everything), np.mean(agreed)
    print(f"KL {mean:.5f}, top-1 {top1:.2%}, by text { ({text: np.mean(v) for text, v in kl.items()}) }")
    assert mean <= 0.006
    assert top1 >= 0.945
    assert mean <= 0.002
    assert top1 >= 0.97
    assert max(np.mean(values) for values in kl.values()) <= 0.003  # no text pays for the others


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
