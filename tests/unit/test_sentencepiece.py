"""SentencePiece vocabularies of GGUF files: merges by score, spaces, byte tokens, streams, malformed ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexad.checkpoint.gguf_tokenizer import supported_kind, tokenizer_from_gguf
from hexad.checkpoint.tokenizer import Tokenizer
from hexad.errors import TokenizerError
from hexad.params import StructuredOutputsParams
from hexad.runner.grammar import GrammarCompiler

FILE = Path("model.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "a",
    "b",
    "h",
    "e",
    "l",
    "o",
    "▁",
    "é",
    "▁▁",
    "he",
    "ll",
    "hell",
    "hello",
    "▁hello",
    "lo",
    "ab",
    "▁a",
]


def metadata(
    words: list[str] = WORDS,
    *,
    user: tuple[str, ...] = (),
    word_scores: list[float] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A small valid vocabulary. Earlier words have better scores unless `word_scores` has others."""
    tokens = [*SPECIAL, *BYTES, *words, *user]
    worse = [-float(i) for i in range(len(words))] if word_scores is None else word_scores
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * (3 + 256) + worse + [0.0] * len(user),
        "token_type": [
            *SPECIAL.values(), *[BYTE] * 256, *[NORMAL] * len(words), *[USER_DEFINED] * len(user)
        ],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def build(words: list[str] = WORDS, **changes: Any) -> Tokenizer:
    return tokenizer_from_gguf(metadata(words, **changes), FILE)


def split(tokenizer: Tokenizer, text: str, **options: bool) -> list[str]:
    """The tokens of a text as the vocabulary writes them."""
    return [tokenizer._tokens[i] for i in tokenizer.encode(text, **options)]


def test_supported() -> None:
    supported_kind({"tokenizer.ggml.model": "llama"}, FILE)
    supported_kind({"tokenizer.ggml.model": "gemma4"}, FILE)


def test_facts() -> None:
    tokenizer = build()
    assert tokenizer.special_ids == {0, 1, 2}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, {2})
    assert tokenizer.vocab_size == 259 + len(WORDS)


def test_defaults_are_a_beginning_and_a_space() -> None:
    assert split(build(), "hello") == ["<s>", "▁hello"]
    assert split(build(), "hello", add_special=False) == ["▁hello"]
    assert split(build(add_bos_token=False, add_eos_token=True), "hello") == ["▁hello", "</s>"]
    assert split(build(add_space_prefix=False), "hello") == ["<s>", "hello"]
    assert build().encode("", add_special=False) == []


def test_the_best_score_merges_first() -> None:
    parts = ["a", "b", "c"]
    assert split(build([*parts, "ab", "bc"], add_space_prefix=False, add_bos_token=False), "abc") == [
        "ab",
        "c",
    ]
    assert split(build([*parts, "bc", "ab"], add_space_prefix=False, add_bos_token=False), "abc") == [
        "a",
        "bc",
    ]
    scores = [0.0, 0.0, 0.0, -2.0, -1.0]
    tokenizer = build([*parts, "ab", "bc"], word_scores=scores, add_space_prefix=False, add_bos_token=False)
    assert split(tokenizer, "abc") == ["a", "bc"]


def test_every_way_of_making_a_token_is_a_merge() -> None:
    tokenizer = build(["a", "b", "c", "bc", "ab", "abc"], add_space_prefix=False, add_bos_token=False)
    assert split(tokenizer, "abc") == ["abc"]
    assert split(tokenizer, "ababc") == ["ab", "abc"]


def test_unused_tokens_are_never_made() -> None:
    data = metadata(["a", "b", "ab"], add_space_prefix=False, add_bos_token=False)
    data["tokenizer.ggml.token_type"][-1] = UNUSED
    assert split(tokenizer_from_gguf(data, FILE), "ab") == ["a", "b"]


def test_bytes_of_what_has_no_token() -> None:
    tokenizer = build()
    assert split(tokenizer, "é\n🦊", add_special=False) == [
        "▁", "é", "<0x0A>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>",
    ]  # fmt: skip
    assert split(tokenizer, "<0x0A>", add_special=False)[:2] == ["▁", "<0x3C>"]  # text, not the token
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("🦊")] == ["", " ", "", "", "", "🦊"]


def test_unknown_where_there_are_no_bytes() -> None:
    data = metadata()
    for name in ("tokens", "scores", "token_type"):
        del data[f"tokenizer.ggml.{name}"][3:259]
    tokenizer = tokenizer_from_gguf(data, FILE)
    assert split(tokenizer, "a🦊🦊", add_special=False) == ["▁a", "<unk>"]
    assert tokenizer.decode(tokenizer.encode("a🦊🦊")) == "a"


def test_special_tokens_come_first() -> None:
    tokenizer = build(user=("[a b]", "▁▁▁"))
    assert split(tokenizer, "</s>hello[a b]</s>", add_special=False) == ["</s>", "▁hello", "[a b]", "</s>"]
    # Newer files write user-defined tokens with spaces.
    assert split(tokenizer, "a   b", add_special=False) == ["▁a", "   ", "▁", "b"]
    assert tokenizer.decode(tokenizer.encode("[a b]</s>")) == "[a b]"
    assert tokenizer.decode(tokenizer.encode("[a b]</s>"), skip_special=False) == "<s>[a b]</s>"


def test_a_continuation_keeps_its_space() -> None:
    tokenizer = build()
    hello = tokenizer.encode("hello", add_special=False)
    assert tokenizer.decode(hello) == "hello"
    assert tokenizer.decode([1, *hello]) == "hello"
    assert tokenizer.decode(hello, continuation=True) == " hello"
    assert tokenizer.stream().push(hello[0]) == " hello"
    assert tokenizer.token_bytes(hello[0]) == b" hello"
    assert tokenizer.token_text(hello[0]) == " hello"
    assert tokenizer.decode(tokenizer.encode("  hello")) == "  hello"
    without = build(add_space_prefix=False)
    assert without.decode(without.encode(" hello")) == " hello"


def test_extra_spaces_are_removed_if_the_file_says_so() -> None:
    tokenizer = build(remove_extra_whitespaces=True)
    assert tokenizer.decode(tokenizer.encode("  hello   a \n b ")) == "hello a \n b"
    assert build().decode(build().encode("  hello   a ")) == "  hello   a "


@cache
def small() -> Tokenizer:
    return build(user=("<think>",))


@given(st.text())
def test_round_trip(text: str) -> None:
    tokenizer = small()
    ids = tokenizer.encode(text)
    if "▁" not in text:
        assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, continuation=True)


@given(st.lists(st.integers(-1, 280)), st.booleans())
def test_stream_equals_decode(ids: list[int], skip_special: bool) -> None:
    tokenizer = small()
    stream = tokenizer.stream(skip_special=skip_special)
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special=skip_special, continuation=True)
    whole = b"".join(tokenizer.token_bytes(i, skip_special=skip_special) for i in ids)
    assert whole.decode("utf-8", "replace") == text
    assert tokenizer.decode(ids, skip_special=skip_special) == text.removeprefix(" ")


@pytest.mark.parametrize(
    "text", ["l", " ", "  ", "\n", "é", "<", "hello", "▁", "think", "0x0A", "\ud800", ""]
)
def test_tokens_containing(text: str) -> None:
    tokenizer = small()
    every = range(tokenizer.vocab_size)
    assert tokenizer.tokens_containing([text]) == [i for i in every if text in tokenizer.token_text(i)]


def test_grammars() -> None:
    """A text may begin with a token that has a space, if its grammar lets it."""
    tokenizer = build()
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)
    for regex, expected in ((" ?hello", {" hello", "hello"}), ("hello", {"hello"})):
        grammar = compiler.compile(StructuredOutputsParams(regex=regex))
        mask = np.zeros((tokenizer.vocab_size + 31) // 32, np.uint32)
        grammar.fill_mask(mask)
        allowed = {i for i in range(tokenizer.vocab_size) if mask[i // 32] >> (i % 32) & 1}
        texts = {tokenizer.token_text(i) for i in allowed}
        assert expected <= texts
        assert not {"a", " a", "o"} & texts


def test_without_token_types() -> None:
    """Bytes are known by their spelling, and special tokens by the file's ids."""
    tokenizer = build(token_type=None)
    assert split(tokenizer, "</s>\n", add_special=False) == ["</s>", "▁", "<0x0A>"]
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.decode(tokenizer.encode("\n")) == "\n"


def test_gemma4_has_merges_and_no_prefix() -> None:
    merges = ["h e", "l l", "he ll", "hell o", "▁ hello", "▁ ▁"]
    tokenizer = build(model="gemma4", merges=merges, scores=None, add_bos_token=True)
    assert split(tokenizer, "hello hello  ") == ["<s>", "hello", "▁hello", "▁▁"]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_several_chat_templates() -> None:
    data = metadata()
    data["tokenizer.chat_template"] = "plain {{ messages[0].content }}"
    data["tokenizer.chat_template.tool_use"] = "{{ tools | length }} tools"
    data["tokenizer.chat_template.rag"] = "rag {{ bos_token }}"
    data["tokenizer.chat_templates"] = ["tool_use", "rag"]
    tokenizer = tokenizer_from_gguf(data, FILE)
    user = [{"role": "user", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert tokenizer.apply_chat_template(user) == "plain x"
    assert tokenizer.apply_chat_template(user, tools) == "1 tools"
    assert tokenizer.apply_chat_template(user, chat_template="rag") == "rag <s>"
    assert tokenizer.apply_chat_template(user, tools, chat_template="{{ 1 }}") == "1"
    del data["tokenizer.chat_template"]
    with pytest.raises(
        TokenizerError, match=r"model\.gguf.*no default chat template, only 'rag', 'tool_use'"
    ):
        tokenizer_from_gguf(data, FILE).apply_chat_template(user)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scores": None}, "scores is missing"),
        ({"scores": [0.0]}, "scores has 1 elements, not 276"),
        ({"scores": ["0"] * 276}, "scores holds str, not only float"),
        ({"scores": [True] * 276}, "scores holds bool"),
        ({"scores": [float("nan")] * 276}, "not a number"),
        ({"token_type": [BYTE] * 276}, "byte token '<unk>' is not written"),
        ({"unknown_token_id": 276}, "unknown_token_id is 276"),
        ({"add_space_prefix": 1}, "add_space_prefix is int"),
        ({"remove_extra_whitespaces": "yes"}, "remove_extra_whitespaces is str"),
        ({"add_eos_token": True, "eos_token_id": None}, "eos_token_id is missing"),
        ({"model": "gemma4"}, "merges is missing"),
        ({"model": "gemma4", "merges": ["hello"]}, "merge 0 is 'hello'"),
        ({"model": "gemma4", "merges": ["h nowhere"]}, "merges do not fit"),
    ],
)
def test_malformed(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason) as caught:
        build(**changes)
    assert str(caught.value).startswith("model.gguf: ")


def test_refuses_a_token_too_long_to_look_for_merges_in() -> None:
    with pytest.raises(TokenizerError, match="600 characters"):
        build(["a" * 600])


def test_integer_scores() -> None:
    data = json.loads(json.dumps(metadata()))
    data["tokenizer.ggml.scores"] = [int(score) for score in data["tokenizer.ggml.scores"]]
    assert split(tokenizer_from_gguf(data, FILE), "hello") == ["<s>", "▁hello"]
