"""What int8 arithmetic and a q8 KV cache cost: KL divergence and top-1 agreement with float32 on three texts.

    scripts/bench quality [MODEL] [--peer-python PYTHON]

The reference backend (float32, dequantise-then-multiply) gives the distribution P over the next token at
every position of tests/golden/texts/*.txt, cut into windows of 512 tokens. The CPU backend gives Q from the
same file and tokens, with its default settings and with a q8 KV cache in int8 and in float arithmetic; and so
does llama.cpp, where --peer-python names an interpreter that has llama-cpp-python.

- KL: mean of Σ P·ln(P/Q) over all positions, in nats;
- top-1: share of the positions at which P and Q have the same most likely token.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks._logits import WindowLogits
from benchmarks.report import ROOT, describe_model, table, write
from benchmarks.worker import Worker
from hexad.backends.backend import CompileOptions
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.open import open_checkpoint
from hexad.checkpoint.store import DEFAULT_MODEL, resolve

WINDOW = 512
TEXTS = sorted((ROOT / "tests" / "golden" / "texts").glob("*.txt"))

Logits = Callable[[Sequence[int]], NDArray[np.float32]]


@dataclass
class Divergence:
    """Sums over positions; `kl` and `top1` are the means."""

    positions: int = 0
    kl_sum: float = 0.0
    agreed: int = 0

    def add(self, reference: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
        """Counts some positions, both float32 [positions, vocab]."""
        for p, q in zip(reference, logits, strict=True):
            log_p, log_q = _log_softmax(p), _log_softmax(q)
            self.kl_sum += float(np.exp(log_p) @ (log_p - log_q))
            self.agreed += int(p.argmax() == q.argmax())
        self.positions += len(reference)

    def __iadd__(self, other: Divergence) -> Divergence:
        self.positions += other.positions
        self.kl_sum += other.kl_sum
        self.agreed += other.agreed
        return self

    @property
    def kl(self) -> float:
        return self.kl_sum / self.positions

    @property
    def top1(self) -> float:
        return self.agreed / self.positions


def compare(checkpoint: Checkpoint, engines: dict[str, Logits]) -> dict[str, dict[str, Divergence]]:
    """Divergence from the reference backend, by text (and "all") and engine."""
    options = CompileOptions(compute="float", kv_dtype="f32")
    reference = WindowLogits(checkpoint, "reference", options, WINDOW)
    result = {
        name: {engine: Divergence() for engine in engines} for name in [*(t.stem for t in TEXTS), "all"]
    }
    for text in TEXTS:
        for tokens in windows(checkpoint, text):
            truth = reference(tokens)
            for engine, logits in engines.items():
                result[text.stem][engine].add(truth, logits(tokens))
        for engine in engines:
            result["all"][engine] += result[text.stem][engine]
    return result


def windows(checkpoint: Checkpoint, text: Path) -> Iterator[list[int]]:
    """The text's tokens in windows of WINDOW; the last may be shorter."""
    tokens = checkpoint.tokenizer().encode(text.read_text(encoding="utf-8"))
    for start in range(0, len(tokens), WINDOW):
        yield tokens[start : start + WINDOW]


def main() -> None:
    options = _options()
    path = resolve(options.model)
    checkpoint = open_checkpoint(path)
    with ExitStack() as stack:
        settings = {
            "hexad int8": CompileOptions(),
            "hexad int8, q8 KV": CompileOptions(kv_dtype="q8"),
            "hexad float, q8 KV": CompileOptions(compute="float", kv_dtype="q8"),
        }
        engines: dict[str, Logits] = {
            name: WindowLogits(checkpoint, "cpu", compiled, WINDOW) for name, compiled in settings.items()
        }
        if options.peer_python:
            peer = stack.enter_context(Worker(options.peer_python, "benchmarks.compare.engines.llama_cpp"))
            peer("load", model=str(path), threads=2)
            engines["llama.cpp"] = _PeerLogits(peer, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        result = compare(checkpoint, engines)
    rows = [
        [text, engine, divergence.positions, f"{divergence.kl:.5f}", f"{divergence.top1:.2%}"]
        for text, by_engine in result.items()
        for engine, divergence in by_engine.items()
    ]
    header = ["text", "engine", "tokens", "mean KL", "top-1"]
    print(table(header, rows))
    facts = {"model": describe_model(path), "window": WINDOW}
    print(f"\nwritten to {write('quality', facts, [dict(zip(header, row, strict=True)) for row in rows])}")


class _PeerLogits:
    def __init__(self, peer: Worker, folder: Path) -> None:
        self._peer = peer
        self._path = folder / "logits.npy"

    def __call__(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._peer("logits", tokens=list(tokens), path=str(self._path))
        logits: NDArray[np.float32] = np.load(self._path)
        return logits


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    parser.add_argument("--peer-python", default=os.environ.get("PEER_PYTHON"), help="default: $PEER_PYTHON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
