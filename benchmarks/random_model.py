"""A GGUF file of a real shape with random weights, to measure any tensor type with.

    scripts/bench random_model TYPE … [--folder FOLDER]

Writes FOLDER/1b-TYPE.gguf for each TYPE, a tensor type of GGUF or Q4_K_M. The shape is Llama 3.2 1B's, the
vocabulary Llama 3's with all its merges, the head tied to the embedding. Weights are random codes under sane
scales: right for speed, and no text comes of it. In Q4_K_M half of attn_v and ffn_down, and the embedding,
are Q6_K, as llama.cpp's own files have it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tests.gguf_writer import TYPES, Tensor, random_blocks, write
from tests.vocabularies import byte_level_bpe, every_merge_of, tiktoken_ranks

from hexad.checkpoint.tokenizer import CONTROL, NORMAL

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 16, 2048, 8192, 32, 8, 64
VOCABULARY = 128_256
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
CHUNK = 1 << 20
"""Weights made at a time; a tensor repeats them, which no engine can profit from."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="+", metavar="TYPE")
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    for name in options.types:
        path = options.folder / f"1b-{name}.gguf"
        write_model(path, name)
        print(f"{path}  {path.stat().st_size / 1e6:,.0f} MB")


def write_model(path: Path, type_name: str) -> None:
    """Writes the file, a tensor at a time."""
    metadata = {
        "general.architecture": "llama",
        "general.name": f"random 1B {type_name}",
        "llama.block_count": LAYERS,
        "llama.context_length": 8192,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        **_vocabulary(),
    }
    tensors, offset = [], 0
    for name, shape, stored in _tensors(type_name):
        tensors.append(Tensor(name, shape, stored, b"", offset))
        size = int(np.prod(shape)) // TYPES[stored][1] * TYPES[stored][2]
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


def _tensors(type_name: str) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and type id of every tensor."""
    ids = {name: type_id for type_id, (name, _, _) in TYPES.items()}
    names = ("Q4_K", "Q6_K") if type_name == "Q4_K_M" else (type_name, type_name)
    most, better = (ids[name] for name in names)
    yield "token_embd.weight", (VOCABULARY, HIDDEN), better
    yield "output_norm.weight", (HIDDEN,), ids["F32"]
    kv = KV_HEADS * HEAD_DIM
    for i in range(LAYERS):
        for name, shape in {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }.items():
            yield (
                f"blk.{i}.{name}.weight",
                shape,
                better if name in ("attn_v", "ffn_down") and i % 2 else most,
            )
        yield f"blk.{i}.attn_norm.weight", (HIDDEN,), ids["F32"]
        yield f"blk.{i}.ffn_norm.weight", (HIDDEN,), ids["F32"]


def _vocabulary() -> dict[str, object]:
    words, merges = byte_level_bpe(tiktoken_ranks("llama3"), every_merge_of)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*words, *SPECIAL],
        "tokenizer.ggml.token_type": [*(NORMAL for _ in words), *(CONTROL for _ in SPECIAL)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": len(words),
        "tokenizer.ggml.eos_token_id": len(words) + 1,
    }


if __name__ == "__main__":
    main()
