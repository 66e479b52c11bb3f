"""Small random models in memory, and batches to run them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.gguf_writer import blocks_of

from hexad.backends.backend import Batch, Limits
from hexad.config import BLOCK_TOKENS
from hexad.graph import Graph
from hexad.models import build_graph
from hexad.weights import BF16, F16, F32, Weight, WeightFormat


@dataclass
class TinyModel:
    """A config with Hugging Face's keys and weights with Hugging Face's names."""

    config: dict[str, Any]
    weights: dict[str, Weight]

    def graph(self) -> Graph:
        return build_graph(self.config, self.weights)


def dense(array: NDArray[np.floating], format: WeightFormat = F32) -> Weight:
    """An F32, F16 or BF16 weight of these values; BF16 cuts their lower halves off."""
    values = np.ascontiguousarray(array, dtype="<f2" if format is F16 else "<f4")
    if format is BF16:
        return Weight(BF16, array.shape, {"data": (values.view("<u4") >> 16).astype("<u2")})
    return Weight(format, array.shape, {"data": values})


def random_weight(
    rng: np.random.Generator, shape: tuple[int, ...], format: WeightFormat = F32, std: float | None = None
) -> Weight:
    """Random values of mean about 0 and this standard deviation (default: 1/√columns), of any format.

    Blocks get random codes and random scales around the one that gives the deviation, no two alike.
    """
    std = shape[-1] ** -0.5 if std is None else std
    if format.block_size == 1:
        return dense(rng.normal(0, std, shape), format)
    rows, blocks = int(np.prod(shape[:-1])), shape[-1] // format.block_size
    return Weight(
        format, shape, {"blocks": blocks_of(rng, format.name, (rows, blocks), std).reshape(rows, -1)}
    )


def tiny_llama(
    *,
    hidden: int = 64,
    intermediate: int = 96,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 160,
    context: int = 256,
    tied: bool = True,
    attention_bias: bool = False,
    format: WeightFormat = F32,
    formats: dict[str, WeightFormat] | None = None,
    seed: int = 0,
    model_type: str = "llama",
) -> TinyModel:
    """A random llama. format: of all matrices; formats: of those whose name contains a key: {"v_proj": Q8_0}.

    Norm weights and biases are F32. Block formats need widths that are multiples of 32.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, Weight] = {}

    def matrix(name: str, rows: int, columns: int, std: float | None = None) -> None:
        chosen = next((value for key, value in (formats or {}).items() if key in name), format)
        weights[f"{name}.weight"] = random_weight(rng, (rows, columns), chosen, std)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = dense(rng.uniform(0.5, 1.5, hidden))

    matrix("model.embed_tokens", vocab, hidden, std=0.5)
    for i in range(layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm")
        for name, width in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            matrix(f"{layer}.self_attn.{name}_proj", width * head_dim, hidden)
            if attention_bias:
                weights[f"{layer}.self_attn.{name}_proj.bias"] = dense(rng.normal(0, 0.3, width * head_dim))
        matrix(f"{layer}.self_attn.o_proj", hidden, heads * head_dim)
        if attention_bias:
            weights[f"{layer}.self_attn.o_proj.bias"] = dense(rng.normal(0, 0.3, hidden))
        norm(f"{layer}.post_attention_layernorm")
        matrix(f"{layer}.mlp.gate_proj", intermediate, hidden)
        matrix(f"{layer}.mlp.up_proj", intermediate, hidden)
        matrix(f"{layer}.mlp.down_proj", hidden, intermediate)
    norm("model.norm")
    if not tied:
        matrix("lm_head", vocab, hidden)
    config = {
        "model_type": model_type,
        "name": f"tiny {model_type}",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rotary_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
    }
    return TinyModel(config, weights)


def limits_for(batch_rows: int = 512, seqs: int = 16, context: int = 256, kv_blocks: int = 64) -> Limits:
    """Limits generous enough for the tiny models."""
    return Limits(max_rows=batch_rows, max_seqs=seqs, max_model_len=context, kv_blocks=kv_blocks)


def make_batch(
    sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], *, sample: str = "last"
) -> Batch:
    """A batch of (tokens, start, block table) sequences; logits of each one's "last" row or of "all" rows."""
    counts = [len(tokens) for tokens, _, _ in sequences]
    row_starts = np.cumsum([0, *counts])
    width = max(len(table) for _, _, table in sequences)
    return Batch(
        tokens=np.array([token for tokens, _, _ in sequences for token in tokens], np.int32),
        row_starts=row_starts.astype(np.int32),
        starts=np.array([start for _, start, _ in sequences], np.int32),
        block_tables=np.array(
            [[*table, *[-1] * (width - len(table))] for _, _, table in sequences], np.int32
        ),
        sample_rows=(np.arange(row_starts[-1]) if sample == "all" else row_starts[1:] - 1).astype(np.int32),
    )


def one_sequence(tokens: Sequence[int], *, sample: str = "all") -> Batch:
    """A batch of one whole prompt in blocks 0, 1, …"""
    return make_batch([(tokens, 0, range(-(-len(tokens) // BLOCK_TOKENS)))], sample=sample)
