"""What the CPU backend's arithmetic costs on SmolLM2: float32 next to nothing, int8 and a q8 KV cache within
stated bounds."""

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
from hexad.config import CacheDtype
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
def test_float(checkpoint: Checkpoint, windows: list[Window], kv_dtype: CacheDtype, bound: float) -> None:
    """One window of each text; logits are about 10."""
    executable = compiled(checkpoint, CompileOptions(compute="float", kv_dtype=kv_dtype))
    for window in windows[::PER_TEXT]:
        assert window.truth.std() > 1
        assert np.abs(logits(executable, window.tokens) - window.truth).max() <= bound


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_int8(checkpoint: Checkpoint, windows: list[Window], kv_dtype: CacheDtype) -> None:
    """KL(reference ‖ int8) in nats and agreement on the likeliest token, over at least 2,048 positions.

    The project promises 0.006 and 94.5 %; 0.002 and 97 % keep what has been reached, with either cache.
    """
    executable = compiled(checkpoint, CompileOptions(kv_dtype=kv_dtype))
    kl: dict[str, list[float]] = {text.stem: [] for text in TEXTS}
    agreed = []
    for window in windows:
        for p, q in zip(window.truth, logits(executable, window.tokens), strict=True):
            kl[window.text].append(divergence(log_softmax(p), log_softmax(q)))
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


def test_q8_cache(checkpoint: Checkpoint, windows: list[Window]) -> None:
    """KL(f16 cache ‖ q8 cache) in nats, in float arithmetic, and how much less likely the texts' own next
    tokens become (the logarithm of the ratio of perplexities).

    In int8 arithmetic any change, be it from an f32 to an f16 cache, rounds other activations: those two are
    KL 0.0017 apart while neither is further from the reference than 0.0012. So test_int8 compares with the
    reference.
    """
    f16, q8 = (compiled(checkpoint, CompileOptions(compute="float", kv_dtype=kv)) for kv in ("f16", "q8"))
    kl: dict[str, list[float]] = {text.stem: [] for text in TEXTS}
    lost = []
    for window in windows:
        rows = zip(logits(f16, window.tokens), logits(q8, window.tokens), strict=True)
        for (p, q), following in zip(rows, [*window.tokens[1:], None], strict=True):
            log_p, log_q = log_softmax(p), log_softmax(q)
            kl[window.text].append(divergence(log_p, log_q))
            if following is not None:
                lost.append(log_p[following] - log_q[following])
    by_text = {text: float(np.mean(values)) for text, values in kl.items()}
    mean = np.mean([value for values in kl.values() for value in values])
    print(f"KL {mean:.5f}, ln perplexity + {np.mean(lost):.5f}, by text {by_text}")
    assert 0 < mean <= 0.002
    assert mean <= 0.001  # what has been reached
    assert max(by_text.values()) <= 0.002
    assert abs(np.mean(lost)) <= 0.003


def divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> float:
    """KL(p ‖ q), in nats."""
    return float(np.exp(log_p) @ (log_p - log_q))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
