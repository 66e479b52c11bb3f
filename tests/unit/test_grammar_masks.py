"""Grammar: masks, the end of a text, control tokens, limits, and masks filled in the background."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.grammars import (
    ANY,
    BOOLEAN,
    END,
    EXTRA,
    TOKENIZER,
    TOOL,
    WORDS_OF_MASK,
    allowed,
    compiled,
    drawn,
    make_tokenizer,
    structural,
    tag,
    takes,
)
from tests.schemas import schemas

from hexad.checkpoint.tokenizer import (
    NORMAL,
    Tokenizer,
)
from hexad.errors import ParamsError
from hexad.params import StructuredOutputsParams
from hexad.runner import grammar as module
from hexad.runner.gbnf import escaped
from hexad.runner.grammar import Grammar, GrammarCompiler, MaskPool


def test_masks_hold_only_tokens_that_may_come_next() -> None:
    grammar = compiled(regex="(ab)+é?")
    ids = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
    assert allowed(grammar) == {ids[b"a"], ids[b"ab"], ids[b"aba"], ids[b"abab"]}
    grammar.accept(ids[b"aba"])
    assert not grammar.finished
    assert allowed(grammar) == {ids[b"b"], ids[b"ba"]}
    grammar.accept(ids[b"b"])
    assert not grammar.finished
    more = {ids[token] for token in (b"a", b"ab", b"aba", b"abab", "é".encode(), "é".encode()[:1])}
    assert allowed(grammar) == more | TOKENIZER.eos_ids
    other = grammar.copy()
    grammar.accept(ids["é".encode()])
    assert grammar.finished
    assert allowed(grammar) == TOKENIZER.eos_ids
    assert allowed(other) == more | TOKENIZER.eos_ids


@pytest.mark.parametrize("end", sorted(TOKENIZER.eos_ids))
def test_every_end_of_generation_token_ends_the_text(end: int) -> None:
    for spec in ({"regex": "ab?"}, {"regex": "a"}):
        grammar = compiled(**spec)
        grammar.accept(ord("a"))
        assert allowed(grammar) >= TOKENIZER.eos_ids
        grammar.accept(end)
        assert grammar.finished
        assert grammar.error is None
        assert allowed(grammar) == TOKENIZER.eos_ids
        grammar.accept(end)
        assert grammar.copy().finished


def test_control_tokens_are_not_text() -> None:
    grammar = compiled(regex="(?s:.*)")
    assert allowed(grammar) & TOKENIZER.special_ids == TOKENIZER.eos_ids
    assert TOKENIZER.encode("<think>")[0] in allowed(grammar)  # user-defined tokens are
    # Their names may be, spelled in other tokens.
    assert drawn(0, choice=["a<|end|>b"]) == "a<|end|>b"
    assert drawn(0, choice=["<|tool|>"]) == "<|tool|>"
    grammar = compiled(choice=["<|end|>"])
    assert not allowed(grammar) & TOKENIZER.special_ids


def test_tags_name_control_tokens() -> None:
    spec = structural(
        {"type": "triggered_tags", "triggers": ["<|tool|>"], "tags": [tag("<|tool|>a", BOOLEAN, "<|end|>")]}
    )
    grammar = compiled(**spec)
    for text in ("so ", "<|tool|>", "atrue"):
        for token_id in TOKENIZER.encode(text):
            assert token_id in allowed(grammar), text
            grammar.accept(token_id)
    assert allowed(grammar) == {END}
    assert not takes("<|tool|>b", **structural(tag("<|tool|>a", ANY, "")))
    assert TOOL in allowed(compiled(grammar="root ::= <|tool|>"))
    assert TOOL in allowed(compiled(grammar=f"start: <[{TOOL}]>"))


def test_text_that_the_tokenizer_would_normalise_stays_as_it_is() -> None:
    tokenizer = make_tokenizer("qwen2")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"
    grammar = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size).compile(
        StructuredOutputsParams(choice=["e\u0301"])
    )
    tokens = []
    while not grammar.finished:
        tokens.append(min(allowed_by(grammar, tokenizer)))
        grammar.accept(tokens[-1])
    assert tokenizer.decode(tokens) == "e\u0301"


def allowed_by(grammar: Grammar, tokenizer: Tokenizer) -> set[int]:
    mask = np.empty((tokenizer.vocab_size + 31) // 32, np.uint32)
    grammar.fill_mask(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_a_forbidden_token_leaves_nothing_to_draw() -> None:
    grammar = compiled(regex="ab")
    assert grammar.error is None
    grammar.accept(TOKENIZER.encode("true")[0])
    assert not grammar.finished
    assert grammar.error
    assert allowed(grammar) == set()
    grammar.accept(END)
    assert not grammar.finished
    assert allowed(grammar) == set()


def test_a_grammar_that_outgrows_its_limits_leaves_nothing_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STEP_ITEMS", 60)
    compiler = GrammarCompiler(lambda: TOKENIZER, TOKENIZER.vocab_size + EXTRA)
    grammar = compiler.compile(
        StructuredOutputsParams(grammar='start: "a" (b | c)\nb: x* "b"\nc: x* "c"\nx: /[a-z]/')
    )
    grammar.accept(TOKENIZER.encode("a")[0])
    for _ in range(100):
        if not allowed(grammar):
            break
        grammar.accept(TOKENIZER.encode("t")[0])
    assert grammar.error is not None
    assert "Too many items" in grammar.error
    assert not grammar.finished


def test_nothing_is_loaded_before_the_first_grammar() -> None:
    program = (
        "import sys; from hexad.runner.grammar import GrammarCompiler, MaskPool; "
        "GrammarCompiler(lambda: 1 / 0, 100), MaskPool(); assert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_vocabulary_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer(eos_token_id=None, token_type=[NORMAL] * TOKENIZER.vocab_size)
    assert not tokenizer.eos_ids
    with pytest.raises(ParamsError, match="token that ends the text"):
        GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size).compile(StructuredOutputsParams(regex="a"))


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[str] = []
    compile = module._compile
    monkeypatch.setattr(module, "_compile", lambda *args: (compilations.append(args[0]), compile(*args))[1])
    compiler = GrammarCompiler(lambda: TOKENIZER, TOKENIZER.vocab_size + EXTRA)
    first = compiler.compile(StructuredOutputsParams(json={"type": "boolean"}))
    first.accept(TOKENIZER.encode("true")[0])
    second = compiler.compile(StructuredOutputsParams(json={"type": "boolean"}))
    assert first.finished
    assert not second.finished
    assert compilations == ["json"]
    for i in range(module.CACHED_GRAMMARS + 1):
        compiler.compile(StructuredOutputsParams(regex=f"a{{{i + 1}}}"))
    compiler.compile(StructuredOutputsParams(json={"type": "boolean"}))
    assert compilations.count("json") == 2


def test_compiling_in_many_threads() -> None:
    loads: list[int] = []
    compiler = GrammarCompiler(lambda: (loads.append(1), TOKENIZER)[1], TOKENIZER.vocab_size + EXTRA)
    before = threading.stack_size()
    specs = [StructuredOutputsParams(json=schema) for schema in schemas(12, seed=3)] * 3
    with ThreadPoolExecutor(6) as pool:
        masks = [allowed(grammar) for grammar in pool.map(compiler.compile, specs)]
    assert (
        masks[:12] == masks[12:24] == masks[24:] == [allowed(compiled(json=spec.json)) for spec in specs[:12]]
    )
    assert loads == [1]
    assert threading.stack_size() == before


def test_the_pool_fills_masks_beside_the_caller() -> None:
    grammars = [compiled(json=schema) for schema in schemas(8, seed=5)]
    masks = np.full((8, WORDS_OF_MASK), 0xFFFFFFFF, np.uint32)
    expected = np.zeros_like(masks)
    for grammar, row in zip(grammars, expected, strict=True):
        grammar.copy().fill_mask(row)
    threads = threading.active_count()
    pool = MaskPool()
    pool.start([], masks[:0])
    pool.wait()
    assert threading.active_count() == threads
    for _ in range(3):
        masks[:] = 0xFFFFFFFF
        pool.start(grammars, masks)
        pool.wait()
        assert (masks == expected).all()
        assert threading.active_count() == threads + 1
    pool.close()
    assert threading.active_count() == threads
    pool.start(grammars[:1], masks[:1])
    pool.close()


def test_the_pool_works_while_the_caller_does() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Grammar):
        def __init__(self) -> None:
            pass

        def fill_mask(self, out: Any) -> None:
            entered.set()
            assert leave.wait(10)
            raise ValueError("broken")

    pool = MaskPool()
    pool.start([Slow()], np.zeros((1, 1), np.uint32))
    assert entered.wait(10)
    leave.set()
    with pytest.raises(ValueError, match="broken"):
        pool.wait()
    pool.wait()
    pool.close()


@given(st.characters(codec="utf-8"))
def test_escaped_characters_are_themselves(char: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9]|\\x\{[0-9a-f]+\}", escaped(char))
    assert len(escaped(char)) == 1 or chr(int(escaped(char)[3:-1], 16)) == char
