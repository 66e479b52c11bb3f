"""Whatever a grammar for tool calls lets through, the parser reads back: random walks through the grammars,
in vocabularies that have the formats' markers as control tokens, as text of their own, or not at all."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from hexad.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from hexad.checkpoint.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer, byte_alphabet
from hexad.params import StructuredOutputsParams
from hexad.runner.grammar import GrammarCompiler
from hexad.server.parsers.deltas import Delta
from hexad.server.parsers.formats import TOOL_FORMATS, ToolFormat
from hexad.server.parsers.parser import MessageParser
from hexad.server.parsers.reasoning import THINK

SCHEMAS: dict[str, dict[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {
            "a": {"enum": ["</tool_call>", '"}]; [ARGS]', "é🦊\\", None, 1]},
            "b": {"type": "array", "items": {"enum": [{"c": "}"}, []]}, "maxItems": 2},
            "d": {"type": "string", "maxLength": 3},
        },
        "required": ["a"],
        "additionalProperties": False,
    },
    "f2": {"type": "object", "properties": {}, "additionalProperties": False},
    "an-other": {"properties": {"x": {"type": "boolean"}}, "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
MARKERS = sorted({m for format in TOOL_FORMATS.values() for m in format.markers} | {*THINK.markers})
EOS = 256

every_vocabulary = pytest.mark.parametrize(
    "kind", [CONTROL, USER_DEFINED, None], ids=["control", "own", "none"]
)
every_format = pytest.mark.parametrize("name", ["hermes", "llama3", "mistral", "mistral_v11"])


@cache
def tokenizer_of(kind: int | None) -> Tokenizer:
    """A token for each byte, and of this kind for each marker."""
    markers = MARKERS if kind is not None else []
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [*byte_alphabet(), "<|im_end|>", *markers],
            "tokenizer.ggml.token_type": [NORMAL] * 256 + [CONTROL] + [kind] * len(markers),
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": EOS,
        },
        Path("bytes"),
    )


@cache
def compiler_of(kind: int | None) -> GrammarCompiler:
    tokenizer = tokenizer_of(kind)
    return GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)


def walk(kind: int | None, spec: StructuredOutputsParams, seed: int, begin: str = "") -> tuple[str, bool]:
    """A random text that the grammar lets through, and whether it came to its end: half the time that where
    it may, and half the time a marker where one may come. begin: how the text begins."""
    tokenizer, draw = tokenizer_of(kind), random.Random(seed)
    grammar = compiler_of(kind).compile(spec)
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    tokens = tokenizer.encode(begin, add_special=False)
    for token in tokens:
        grammar.accept(token)
    assert grammar.error is None
    while len(tokens) < 600:
        grammar.fill_mask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert allowed, grammar.error
        if EOS in allowed and (len(allowed) == 1 or draw.random() < 0.5):
            return tokenizer.decode(tokens, skip_special=False), True
        others = [token for token in allowed if token != EOS]
        markers = [token for token in others if token > EOS]
        tokens.append(draw.choice(markers if markers and draw.random() < 0.5 else others))
        grammar.accept(tokens[-1])
        assert grammar.error is None
    return tokenizer.decode(tokens, skip_special=False), False


def read(
    format: ToolFormat, text: str, *, thinks: bool = False, started: bool = False
) -> tuple[Delta, Delta]:
    """What a text comes to, and what was held back at its end. All calls are valid."""
    parser = MessageParser(
        tools=format, reasoning=THINK if thinks else None, starts_in_reasoning=started, tool_names=SCHEMAS
    )
    delta, rest = parser.push(text), parser.finish()
    for call in delta.tool_calls:
        assert call.name is not None
        jsonschema.validate(json.loads(call.arguments), {"type": "object"} | SCHEMAS[call.name])
    return delta, rest


@every_format
@every_vocabulary
@pytest.mark.parametrize("parallel", [False, True])
def test_required(name: str, kind: int | None, parallel: bool) -> None:
    format = TOOL_FORMATS[name]
    spec = format.constraint(TOOLS, "required", parallel)
    counts = set()
    for seed in range(20):
        text, ended = walk(kind, spec, seed)
        assert ended
        delta, rest = read(format, text)
        assert not rest
        assert delta.content == ""
        counts.add(len(delta.tool_calls))
    assert min(counts) == 1
    assert (max(counts) > 1) is parallel


@every_format
@every_vocabulary
def test_named(name: str, kind: int | None) -> None:
    format = TOOL_FORMATS[name]
    for chosen in SCHEMAS:
        spec = format.constraint(TOOLS, chosen, True)
        for seed in range(10):
            text, ended = walk(kind, spec, seed)
            assert ended
            delta, rest = read(format, text)
            assert (delta.content, rest) == ("", Delta())
            assert [call.name for call in delta.tool_calls] == [chosen]


@every_format
@every_vocabulary
@pytest.mark.parametrize("started", [False, True])
def test_required_after_reasoning(name: str, kind: int | None, started: bool) -> None:
    format = TOOL_FORMATS[name]
    spec = format.constraint(TOOLS, "required", False, reasoning=THINK, starts_in_reasoning=started)
    thoughts = 0
    for seed in range(30):
        begin = ("" if started else "<think>") + "Hm.</think>" if seed % 2 else ""
        text, ended = walk(kind, spec, seed, begin)
        if not ended:
            continue
        delta, rest = read(format, text, thinks=True, started=started)
        assert (delta.content, rest) == ("", Delta())
        assert len(delta.tool_calls) == 1
        thoughts += bool(delta.reasoning)
    assert thoughts


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_v11"])
@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED], ids=["control", "own"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("thinks", [False, True])
def test_auto(name: str, kind: int, parallel: bool, thinks: bool) -> None:
    format = TOOL_FORMATS[name]
    spec = format.auto_constraint(TOOLS, parallel, reasoning=THINK if thinks else None)
    assert spec is not None
    counts, thoughts = {0}, 0
    for seed in range(60):
        text, ended = walk(kind, spec, seed, "<think>" if thinks and seed % 2 else "")
        late = not text.lstrip().startswith("<think>") and "<think>" in text
        if not ended or (thinks and late):  # see `auto_constraint`
            continue
        delta, _ = read(format, text, thinks=thinks)
        counts.add(len(delta.tool_calls))
        thoughts += bool(delta.reasoning)
        assert format.trigger not in delta.content
    assert max(counts) > 0
    assert parallel or max(counts) == 1
    assert bool(thoughts) is thinks
