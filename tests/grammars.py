"""A small tokenizer, and what grammars make of texts in it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from hexad.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from hexad.checkpoint.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer, byte_alphabet
from hexad.params import StructuredOutputsParams
from hexad.runner.grammar import Grammar, GrammarCompiler

BYTES = byte_alphabet()
WORDS = [
    '{"',
    '": ',
    '", "',
    '"}',
    "true",
    "false",
    "null",
    " the",
    "abab",
    "ba",
    "\n\n",
    "  ",
    "ß",
    "é",
    "日本",
    "</",
]
SPECIAL = {"<|end|>": CONTROL, "<|eot_id|>": CONTROL, "<|tool|>": CONTROL, "<think>": USER_DEFINED}
EXTRA = 70  # how much wider the logits are than the vocabulary


def make_tokenizer(pre: str = "gpt-2", **changes: Any) -> Tokenizer:
    """All bytes, some words, and SPECIAL; the first two of these end a generation."""
    tokens, merges = list(BYTES), []
    for word in WORDS:
        spelled = "".join(BYTES[byte] for byte in word.encode())
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in tokens:
                tokens.append(spelled[:end])
                merges.append(f"{spelled[: end - 1]} {spelled[end - 1]}")
    types = [NORMAL] * len(tokens) + list(SPECIAL.values())
    tokens += SPECIAL
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": tokens.index("<|end|>"),
    } | changes
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}
    return tokenizer_from_gguf({"general.architecture": "llama", **metadata}, Path("model.gguf"))


TOKENIZER = make_tokenizer()
COMPILER = GrammarCompiler(lambda: TOKENIZER, TOKENIZER.vocab_size + EXTRA)
WORDS_OF_MASK = (TOKENIZER.vocab_size + EXTRA + 31) // 32
END, TOOL = (TOKENIZER.encode(name)[0] for name in ("<|end|>", "<|tool|>"))


def compiled(**spec: Any) -> Grammar:
    return COMPILER.compile(StructuredOutputsParams(**spec))


def allowed(grammar: Grammar) -> set[int]:
    mask = np.full(WORDS_OF_MASK, 0xFFFFFFFF, np.uint32)
    grammar.fill_mask(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def takes(text: str, **spec: Any) -> bool:
    """Whether the text may be generated, by any tokens: where the grammar leaves no choice of text, only one
    spelling of it is allowed."""
    states = {0: compiled(**spec)}
    data = text.encode()
    for at in range(len(data)):
        if at not in states:
            continue
        for token_id in allowed(states[at]) - TOKENIZER.special_ids:
            piece = TOKENIZER.token_bytes(token_id)
            if at + len(piece) not in states and data.startswith(piece, at):
                states[at + len(piece)] = states[at].copy()
                states[at + len(piece)].accept(token_id)
    return len(data) in states and TOKENIZER.eos_ids <= allowed(states[len(data)])


def drawn(seed: int, most: int = 2000, **spec: Any) -> str | None:
    """A text of tokens drawn from those allowed; None if it does not end."""
    rng, grammar, tokens = random.Random(seed), compiled(**spec), []
    for _ in range(most):
        token_id = rng.choice(sorted(allowed(grammar)))
        grammar.accept(token_id)
        if token_id in TOKENIZER.eos_ids:
            assert grammar.finished
            return TOKENIZER.decode(tokens, skip_special=False)
        tokens.append(token_id)
    return None


def tag(begin: str, content: dict[str, Any], end: str) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def structural(format: Any) -> dict[str, str]:
    return {"structural_tag": json.dumps({"type": "structural_tag", "format": format})}


ANY, BOOLEAN = {"type": "any_text"}, {"type": "json_schema", "json_schema": {"type": "boolean"}}
