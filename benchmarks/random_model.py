"""A GGUF file of a real shape with random weights, to measure any tensor type with.

    scripts/bench random_model TYPE … [--shape 0.5b|1b|4b] [--folder FOLDER]

Writes FOLDER/SHAPE-TYPE.gguf for each TYPE, a tensor type of GGUF or Q4_K_M. Shapes are those of Qwen2.5
0.5B, Llama 3.2 1B and Qwen3 4B: layers, widths, heads, a real vocabulary, the head tied to the embedding; the
architecture is llama in all, so that every engine reads them. Weights are random codes under sane scales:
right for speed, and no text comes of it. In Q4_K_M half of attn_v and ffn_down, and the embedding, are Q6_K,
as llama.cpp's own files have it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tests.gguf_writer import TYPES, Tensor, random_blocks, write
from tests.vocabularies import byte_level_bpe, every_merge_of, merges_of, tiktoken_ranks

from hexad.checkpoint.tokenizer import CONTROL, NORMAL


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    ranks: str
    """The tiktoken vocabulary that the tokens come from; the rest are special."""
    pre: str
    merges: Callable[[Mapping[bytes, int]], list[tuple[bytes, bytes]]] = merges_of


SHAPES = {
    "0.5b": Shape(24, 896, 4864, 14, 2, 64, 151_936, "qwen", "qwen2"),
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128_256, "llama3", "llama-bpe", every_merge_of),
    "4b": Shape(36, 2560, 9728, 32, 8, 128, 151_936, "qwen", "qwen2"),
}
CHUNK = 1 << 20
"""Weights made at a time; a tensor repeats them, which no engine can profit from."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="+", metavar="TYPE")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    for name in options.types:
        path = options.folder / f"{options.shape}-{name}.gguf"
        write_model(path, SHAPES[options.shape], name)
        print(f"{path}  {path.stat().st_size / 1e6:,.0f} MB")


def write_model(path: Path, shape: Shape, type_name: str) -> None:
    """Writes the file, a tensor at a time."""
    metadata = {
        "general.architecture": "llama",
        "general.name": f"random {path.stem}",
        "llama.block_count": shape.layers,
        "llama.context_length": 8192,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.intermediate,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": shape.head_dim,
        **_vocabulary(shape),
    }
    tensors, offset = [], 0
    for name, dimensions, stored in _tensors(shape, type_name):
        tensors.append(Tensor(name, dimensions, stored, b"", offset))
        size = int(np.prod(dimensions)) // TYPES[stored][1] * TYPES[stored][2]
        offset += size + -size % 32
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(write(metadata, tensors))
        for tensor in tensors:
            left = int(np.prod(tensor.shape))
            data = random_blocks(rng, tensor.type, (min(left, CHUNK),))
            while left > 0:
                part = data[: min(left, CHUNK) * len(data) // min(CHUNK, int(np.prod(tensor.shape)))]
                file.write(part)
                left -= CHUNK
            file.write(bytes(-file.tell() % 32))


def _tensors(shape: Shape, type_name: str) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and type id of every tensor."""
    ids = {name: type_id for type_id, (name, _, _) in TYPES.items()}
    names = ("Q4_K", "Q6_K") if type_name == "Q4_K_M" else (type_name, type_name)
    most, better = (ids[name] for name in names)
    yield "token_embd.weight", (shape.vocabulary, shape.hidden), better
    yield "output_norm.weight", (shape.hidden,), ids["F32"]
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for i in range(shape.layers):
        for name, dimensions in {
            "attn_q": (q, shape.hidden),
            "attn_k": (kv, shape.hidden),
            "attn_v": (kv, shape.hidden),
            "attn_output": (shape.hidden, q),
            "ffn_gate": (shape.intermediate, shape.hidden),
            "ffn_up": (shape.intermediate, shape.hidden),
            "ffn_down": (shape.hidden, shape.intermediate),
        }.items():
            yield (
                f"blk.{i}.{name}.weight",
                dimensions,
                better if name in ("attn_v", "ffn_down") and i % 2 else most,
            )
        yield f"blk.{i}.attn_norm.weight", (shape.hidden,), ids["F32"]
        yield f"blk.{i}.ffn_norm.weight", (shape.hidden,), ids["F32"]


def _vocabulary(shape: Shape) -> dict[str, object]:
    words, merges = byte_level_bpe(tiktoken_ranks(shape.ranks), shape.merges)
    special = [f"<|special_{i}|>" for i in range(shape.vocabulary - len(words))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": shape.pre,
        "tokenizer.ggml.tokens": [*words, *special],
        "tokenizer.ggml.token_type": [*(NORMAL for _ in words), *(CONTROL for _ in special)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": len(words),
        "tokenizer.ggml.eos_token_id": len(words) + 1,
    }


if __name__ == "__main__":
    main()
