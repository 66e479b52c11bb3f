"""A tokenizer small enough for tiny models: a token for each byte, and three special ones."""

from __future__ import annotations

from pathlib import Path

from hexad.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from hexad.checkpoint.tokenizer import byte_alphabet

EOS, THINK, END_THINK = 256, 257, 258

TOKENIZER = tokenizer_from_gguf(
    {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*byte_alphabet(), "<|im_end|>", "<think>", "</think>"],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 4, 4],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": EOS,
    },
    Path("bytes"),
)


def ids(text: str) -> list[int]:
    """A text's tokens."""
    return TOKENIZER.encode(text)
