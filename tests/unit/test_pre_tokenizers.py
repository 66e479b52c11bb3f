"""How texts are split into words before byte-level BPE."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest

from hexad.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from hexad.checkpoint.pre_tokenizers import SPLITS
from hexad.checkpoint.tokenizer import Tokenizer, byte_alphabet

BYTES = byte_alphabet()


def build(pre: str, longer: list[str], merges: list[str]) -> Tokenizer:
    """A vocabulary of all bytes and of longer tokens."""
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": BYTES + longer,
            "tokenizer.ggml.merges": merges,
        },
        Path("model.gguf"),
    )


# A text, and the words each rule makes of it, worked out by hand from the rule's definition.
WORDS = [
    (
        "gpt-2",
        "I'LL we'll 1234 x²\n\n y  z",
        ["I", "'", "LL", " we", "'ll", " 1234", " x", "²", "\n\n", " y", " ", " z"],
    ),
    ("smollm", "a 1234b 5", ["a", " ", "1", "2", "3", "4", "b", " ", "5"]),
    ("starcoder", "v10", ["v", "1", "0"]),
    (
        "llama-bpe",
        "I'LL 12345 $x\n\n y  (z)!\n",
        ["I", "'LL", " ", "123", "45", " $", "x", "\n\n", " y", " ", " (", "z", ")!\n"],
    ),
    (
        "qwen2",
        "I'LL 12345 $x (z)!\n",
        ["I", "'LL", " ", "1", "2", "3", "4", "5", " $", "x", " (", "z", ")!\n"],
    ),
    ("qwen35", "हिन्दी 12", ["हिन्दी", " ", "1", "2"]),
    ("tekken", "camelCase HTTPServer's 123", ["camel", "Case", " HTTPServer", "'s", " ", "1", "2", "3"]),
    ("gpt-4o", "camelCase HTTPServer's 1234", ["camel", "Case", " HTTPServer's", " ", "123", "4"]),
    ("deepseek-v3", "12345漢字かな a-b (c", ["123", "45", "漢字かな", " a", "-b", " (", "c"]),
    ("falcon", "don't pay $12345", ["don", "'", "t", " pay", " ", "$", "123", "45"]),
    ("jais-2", "a" + 7 * " " + "b", ["a", 4 * " ", 2 * " ", " b"]),
    ("minicpm5", "12345 I'LL", ["123", "45", " I", "'LL"]),
    ("laguna", "a!\nb", ["a", "!", "\n", "b"]),
    ("qwen2", "a!\nb", ["a", "!\n", "b"]),
    ("ufakzeka", "Ali'nin it's", ["Ali", "'nin", " it", "'s"]),
    ("seed-coder", "12 (a)!\n", ["1", "2", " (", "a", ")!", "\n"]),
    ("bailingmoe", "I'LL 12\n\nx", ["I", "'LL", " ", "1", "2", "\n\n", "x"]),
    ("exaone-moe", "as if it 12/\n", ["as if it", " ", "1", "2", "/\n"]),
    ("tiny_aya", "1234567 it's", ["1", "234", "567", " it's"]),
    ("kimi-k2", "hello漢字World's 1234", ["hello", "漢字", "World's", " ", "123", "4"]),
    ("youtu", "한국a12！漢", ["한국", "a", "1", "2", "！", "漢"]),
    ("spark2_5", "1234 a-b\n\n", ["1", "2", "3", "4", " a", "-b", "\n", "\n"]),
    ("deepseek-coder", "12 ab, 漢\n\n", ["1", "2", " ab", ",", " ", "漢", "\n", "\n"]),
    ("deepseek-llm", "12 abé, 漢字ж\n", ["1", "2", " ab", "é", ",", " ", "漢字", "ж", "\n"]),
    ("bloom", "it's 12, (a).", ["it's", " 12", ", (", "a", ")."]),
    ("viking", "it's 12", ["it's", " ", "1", "2"]),
    ("chameleon", "a-b 12    c", ["a", "-", "b", " ", "1", "2", "    ", "c"]),
]


@pytest.mark.parametrize(("pre", "text", "words"), WORDS, ids=[pre for pre, _, _ in WORDS])
def test_split(pre: str, text: str, words: list[str]) -> None:
    """With a vocabulary that has the text's every substring, a word is as long as the split lets it be.

    Merges that join any two neighbours are needed for that, so the words show as the token boundaries.
    """
    assert "".join(words) == text
    whole = "".join(BYTES[byte] for byte in text.encode())
    parts = {whole[i:j] for i in range(len(whole)) for j in range(i + 2, len(whole) + 1)}
    longer = sorted(parts, key=lambda part: (len(part), part))
    merges = [f"{part[:i]} {part[i:]}" for part in longer for i in range(1, len(part))]
    tokenizer = build(pre, longer, merges)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == words


@pytest.mark.parametrize("pre", SPLITS)
def test_every_split_takes_every_text(pre: str) -> None:
    """Its patterns compile, and no character gets lost between the words."""
    tokenizer = build(pre, ["Ġa", "ab"], ["Ġ a", "a b"])
    rng = random.Random(7)
    texts = [
        "def f(x):\n    return x**2 # it's 1,234",
        "e\u0301té 漢字かな 한국어 हिन्दी ไทย العربية",
        *("".join(chr(rng.randrange(0xD800)) for _ in range(50)) for _ in range(5)),
        *("".join(rng.choice(" \t\r\na'!1é漢\u0301") for _ in range(50)) for _ in range(20)),
    ]
    for text in texts:
        kept = unicodedata.normalize("NFC", text) if SPLITS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text)) == kept
