"""Weights packed out of their file are those packed out of memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.gguf_writer import TYPES, llama, write
from tests.hf_writer import llama as hf_llama
from tests.hf_writer import save
from tests.tiny_models import limits_for, one_sequence

from hexad.backends.backend import CompileOptions
from hexad.backends.cpu import CpuBackend
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.open import open_checkpoint
from hexad.errors import CheckpointError
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.weights import Weight
from hexad.weights.ggml import FORMATS

TOKENS = list(range(1, 20))


def logits(checkpoint: Checkpoint, weights: Mapping[str, Weight], threads: int = 2) -> NDArray[np.float32]:
    """Of the last of TOKENS."""
    graph = fuse(build_graph(checkpoint.config, weights, checkpoint.path))
    executable = CpuBackend().compile(graph, weights, CompileOptions(threads=threads), limits_for())
    executable.forward(one_sequence(TOKENS))
    return executable.logits()


def in_memory(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Weights that know of no file."""
    return {name: replace(weight, place=None) for name, weight in weights.items()}


@pytest.mark.parametrize("type_id", FORMATS, ids=lambda type_id: FORMATS[type_id].name)
def test_gguf(tmp_path: Path, type_id: int) -> None:
    """With queries and keys reordered: 5 heads of 48 rows in panels of 32."""
    path = tmp_path / "model.gguf"
    path.write_bytes(
        write(*llama(hidden=256, intermediate=512, heads=10, kv_heads=5, head_dim=48, type_id=type_id))
        if TYPES[type_id][1] < 256
        else write(*llama(hidden=256, intermediate=512, heads=16, kv_heads=4, head_dim=16, type_id=type_id))
    )
    with open_checkpoint(path) as checkpoint:
        assert all(weight.place for weight in checkpoint.weights.values())
        expected = logits(checkpoint, in_memory(checkpoint.weights))
        assert np.isfinite(expected).all()
        for threads in (1, 2, 3):
            assert np.array_equal(logits(checkpoint, checkpoint.weights, threads), expected)


def test_far_reordered_rows(tmp_path: Path) -> None:
    """Rows from far apart are read one by one."""
    path = tmp_path / "model.gguf"
    path.write_bytes(write(*llama(hidden=1024, intermediate=4096, heads=16, kv_heads=4, head_dim=64)))
    with open_checkpoint(path) as checkpoint:
        name = "model.layers.0.mlp.gate_proj.weight"
        weight = checkpoint.weights[name]
        assert weight.place is not None
        order = np.random.default_rng(0).permutation(weight.shape[0])
        shuffled = replace(weight, place=replace(weight.place, order=order))
        expected = logits(checkpoint, {**checkpoint.weights, name: weight.take_rows(order)})
        assert np.array_equal(logits(checkpoint, {**checkpoint.weights, name: shuffled}), expected)


def test_safetensors(tmp_path: Path) -> None:
    save(tmp_path, *hf_llama())
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(weight.place for weight in checkpoint.weights.values())
        expected = logits(checkpoint, in_memory(checkpoint.weights))
        assert np.array_equal(logits(checkpoint, checkpoint.weights), expected)


def test_a_file_stays_open_as_long_as_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(write(*llama()))
    with open_checkpoint(path) as checkpoint:
        weights = checkpoint.weights
        expected = logits(checkpoint, weights)
    path.unlink()
    assert np.array_equal(logits(checkpoint, weights), expected)


def test_a_file_that_was_cut_off_since(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(write(*llama(hidden=1024, intermediate=2048, heads=16, kv_heads=4, head_dim=64)))
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 4096)
        with pytest.raises(CheckpointError, match=r"model\.gguf: the file ends.*fetch it again"):
            logits(checkpoint, checkpoint.weights)
