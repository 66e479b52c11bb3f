"""Structured output: microseconds per mask and milliseconds per grammar, at the vocabulary of a large model.

    scripts/bench masks [--schemas N] [--slack FACTOR]

The vocabulary is Qwen's, of 151,646 tokens.
Each of the schemas (those of tests/schemas.py) is followed for three texts of tokens drawn evenly from those
allowed, which visits more, and stranger, states than a model does. The exit status is 1 if a figure exceeds
its bound; --slack widens the bounds, for machines that are busy with other things.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tests.schemas import schemas
from tests.vocabularies import byte_level_bpe, tiktoken_ranks
from tokenizers import models, pre_tokenizers

from benchmarks.report import table, write
from hexad.checkpoint.tokenizer import CONTROL, NORMAL, Tokenizer
from hexad.params import StructuredOutputsParams
from hexad.runner.grammar import Grammar, GrammarCompiler, MaskPool

TEXTS, MAX_TOKENS, BATCH = 3, 400, 32
MEAN_BOUND, P99_BOUND = 100.0, 1000.0  # microseconds
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemas", type=int, default=50, metavar="N")
    parser.add_argument("--slack", type=float, default=1.0, metavar="FACTOR")
    options = parser.parse_args()
    tokenizer = qwen_tokenizer()
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)
    begin = time.perf_counter()
    compiler.compile(StructuredOutputsParams(json={"type": "integer"}))
    results: dict[str, dict[str, float]] = {}
    print(f"first grammar, with llguidance's index of {tokenizer.vocab_size:,} tokens: ", end="")
    print(f"{time.perf_counter() - begin:.2f} s")
    specs = [StructuredOutputsParams(json=schema) for schema in schemas(options.schemas)]
    results[f"{len(specs)} JSON schemas"] = measure(compiler, specs, tokenizer)
    results["any JSON object"] = measure(compiler, [StructuredOutputsParams(json_object=True)], tokenizer)
    results["regex"] = measure(compiler, [StructuredOutputsParams(regex=r"(\w{1,12}[ ,]){5,40}")], tokenizer)
    results["JSON as GBNF"] = measure(compiler, [StructuredOutputsParams(grammar=GBNF)], tokenizer)
    results[f"JSON schemas, {BATCH} at once"] = measure_batch(compiler, specs)
    columns = list(dict.fromkeys(name for figures in results.values() for name in figures))
    rows = [[name, *(figures.get(column, "") for column in columns)] for name, figures in results.items()]
    print(table(["", *columns], rows))
    settings = {"vocab": tokenizer.vocab_size, "schemas": len(specs), "texts": TEXTS, "batch": BATCH}
    print(f"\nwritten to {write('masks', settings, results)}")
    bounds = {"mask mean, µs": MEAN_BOUND * options.slack, "mask p99, µs": P99_BOUND * options.slack}
    figures = results[f"{len(specs)} JSON schemas"]
    over = [
        f"{name}: {figures[name]:.0f} is over {most:.0f}"
        for name, most in bounds.items()
        if figures[name] > most
    ]
    sys.exit("\n".join(over) or 0)


def qwen_tokenizer() -> Tokenizer:
    """Qwen's vocabulary: a byte-level BPE of 151,646 tokens, the last of them control tokens."""
    words, merges = byte_level_bpe(tiktoken_ranks("qwen"))
    vocabulary = {word: i for i, word in enumerate(words)}
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens(CONTROL_TOKENS)
    tokens = [*vocabulary, *CONTROL_TOKENS]
    types = [*(NORMAL for _ in vocabulary), *(CONTROL for _ in CONTROL_TOKENS)]
    ends = frozenset({len(vocabulary), len(vocabulary) + 2})
    return Tokenizer(bpe, tokens, types, eos_ids=ends, source="benchmark")


def measure(
    compiler: GrammarCompiler, specs: list[StructuredOutputsParams], tokenizer: Tokenizer
) -> dict[str, float]:
    """Figures of texts drawn at random, one after the other."""
    rng = random.Random(0)
    mask = np.empty((tokenizer.vocab_size + 31) // 32, np.uint32)
    compiled, copied, masks, accepted = [], [], [], []
    for spec in specs:
        compiled.append(_timed(lambda spec=spec: compiler.compile(spec)))
        for _ in range(TEXTS):
            begin = time.perf_counter()
            grammar = compiler.compile(spec)
            copied.append(time.perf_counter() - begin)
            for _ in range(MAX_TOKENS):
                masks.append(_timed(lambda grammar=grammar: grammar.fill_mask(mask)))
                token_id = _draw(mask, rng)
                accepted.append(_timed(lambda grammar=grammar, token_id=token_id: grammar.accept(token_id)))
                if grammar.finished:
                    break
    microseconds = np.array(masks) * 1e6
    return {
        "masks": len(masks),
        "mask mean, µs": float(microseconds.mean()),
        "mask p50, µs": float(np.median(microseconds)),
        "mask p99, µs": float(np.quantile(microseconds, 0.99)),
        "mask max, µs": float(microseconds.max()),
        "accept mean, µs": float(np.mean(accepted) * 1e6),
        "compile mean, ms": float(np.mean(compiled) * 1e3),
        "compile max, ms": float(np.max(compiled) * 1e3),
        "again mean, ms": float(np.mean(copied) * 1e3),
    }


def measure_batch(compiler: GrammarCompiler, specs: list[StructuredOutputsParams]) -> dict[str, float]:
    """Time of MaskPool per sequence, with a batch always full."""
    rng = random.Random(1)
    words = (compiler.vocab_size + 31) // 32
    masks = np.empty((BATCH, words), np.uint32)
    grammars: list[Grammar] = [compiler.compile(spec) for spec in rng.choices(specs, k=BATCH)]
    pool = MaskPool()
    times = []
    for _ in range(MAX_TOKENS):
        begin = time.perf_counter()
        pool.start(grammars, masks)
        pool.wait()
        times.append((time.perf_counter() - begin) / BATCH * 1e6)
        for i, grammar in enumerate(grammars):
            grammar.accept(_draw(masks[i], rng))
            if grammar.finished:
                grammars[i] = compiler.compile(rng.choice(specs))
    pool.close()
    return {
        "masks": len(times) * BATCH,
        "mask mean, µs": float(np.mean(times)),
        "mask p50, µs": float(np.median(times)),
        "mask p99, µs": float(np.quantile(times, 0.99)),
        "mask max, µs": float(np.max(times)),
    }


def _draw(mask: NDArray[np.uint32], rng: random.Random) -> int:
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(allowed[rng.randrange(len(allowed))])


def _timed(call: object) -> float:
    assert callable(call)
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
