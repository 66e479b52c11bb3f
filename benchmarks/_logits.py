"""The logits of every position of a window of tokens, straight from a backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hexad.backends.backend import Batch, CompileOptions, Limits
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.config import BLOCK_TOKENS
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.runner.model_runner import make_backend


class WindowLogits:
    """A compiled model that is asked one window at a time; nothing is remembered between windows.

    window: most tokens in a window.
    """

    def __init__(self, checkpoint: Checkpoint, backend: str, options: CompileOptions, window: int) -> None:
        blocks = window // BLOCK_TOKENS + 1
        graph = build_graph(checkpoint.config, checkpoint.weights)
        if backend != "reference":
            graph = fuse(graph)
        # Every row has logits, as if each belonged to a sequence of its own.
        limits = Limits(max_rows=window, max_seqs=window, max_model_len=window, kv_blocks=blocks)
        self._executable = make_backend(backend).compile(graph, checkpoint.weights, options, limits)
        self._block_tables = np.arange(blocks, dtype=np.int32)[None]

    def __call__(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Float32 [tokens, vocab]."""
        count = len(tokens)
        self._executable.forward(
            Batch(
                tokens=np.array(tokens, np.int32),
                row_starts=np.array([0, count], np.int32),
                starts=np.zeros(1, np.int32),
                block_tables=self._block_tables,
                sample_rows=np.arange(count, dtype=np.int32),
            )
        )
        return self._executable.logits()
