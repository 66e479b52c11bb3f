"""Tokenizer: SmolLM2 against transformers, splitting rules, streaming, end of generation, malformed files."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexad.checkpoint.gguf import GGUFFile
from hexad.checkpoint.gguf_tokenizer import supported_kind, tokenizer_from_gguf
from hexad.checkpoint.tokenizer import Tokenizer, byte_alphabet
from hexad.errors import PromptError, TokenizerError, UnsupportedError

BYTES = byte_alphabet()
FILE = Path("model.gguf")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

# SmolLM2's ids, recorded from transformers (see `oracle`, which checks them again where it is installed).
# fmt: off
GOLDEN: dict[str, list[int]] = {
    "": [],
    " ": [216],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
    "def add(a, b):\n    return a + b\n\n\n": [
        1604, 803, 24, 81, 28, 278,
        727, 472, 1003, 253, 1232, 278, 16506,
    ],
    "I'm sure they'll say we'd DON'T": [
        57, 5248, 2090, 502, 3060, 1643,
        392, 6737, 422, 2154, 23, 68,
    ],
    "日本語と한국어 🦊👩\u200d👧": [
        23274, 115, 40993, 179, 120, 248, 7365, 118, 33085, 246, 181, 130, 251,
        183, 240, 129, 15107, 116, 228, 10813, 235, 119, 321, 231, 10813, 235, 117,
    ],
    "x²+½y=1,000.50\t\r\n": [
        104, 19133, 27, 16738, 105, 45, 33, 28,
        32, 32, 32, 30, 37, 32, 197, 2738,
    ],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "a<|endoftext|> b": [81, 0, 278],
    "<repo_name>hexad <|im_": [3, 18367, 344, 2067, 108, 306, 79],
}
# fmt: on


def spelled(text: str) -> str:
    """A text as byte-level BPE writes it."""
    return "".join(BYTES[byte] for byte in text.encode())


def metadata(
    words: tuple[str, ...] = (),
    *,
    special: dict[str, int] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A small valid vocabulary: all bytes, `words` with the merges that build them, `special` by token type.

    `changes` set `tokenizer.ggml.<name>`; None takes the key out.
    """
    tokens, merges = list(BYTES), []
    for word in words:
        characters = spelled(word)
        for end in range(2, len(characters) + 1):
            if characters[:end] not in tokens:
                tokens.append(characters[:end])
                merges.append(f"{characters[: end - 1]} {characters[end - 1]}")
    types = [NORMAL] * len(tokens)
    for token, kind in (special or {}).items():
        tokens.append(token)
        types.append(kind)
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
    } | changes
    return {
        "general.architecture": "llama",
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None},
    }


def build(*words: str, special: dict[str, int] | None = None, **changes: Any) -> Tokenizer:
    return tokenizer_from_gguf(metadata(words, special=special, **changes), FILE)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    with GGUFFile(smollm2_path) as file:
        return tokenizer_from_gguf(file.metadata, smollm2_path)


@pytest.fixture(scope="session")
def oracle(smollm2_path: Path) -> Any:
    """transformers' tokenizer of the same file. It takes GPT-2's split for every file; SmolLM's is put in."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    oracle = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return oracle


def random_texts(count: int) -> Iterator[str]:
    """Texts that mix scripts, digits, white space, emoji, code and special tokens; the same at every run."""
    rng = random.Random(7)
    pools = [
        lambda: rng.choice(
            ["the", "don't", "It's", " THEY'LL", "naïve", "Straße", "ﬁne", "e\u0301", "I'm'd"]
        ),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 9))),
        lambda: rng.choice(["²", "Ⅷ", "½", "٣", "१२", "3.14", "1,000", "0x1F"]),
        lambda: rng.choice(" \t\n\r\u00a0\u3000\u2028") * rng.randrange(1, 6),
        lambda: rng.choice(["🦊", "👩‍👩‍👧", "🇫🇷", "😀😀", "❤️"]),
        lambda: rng.choice(["日本語", "한국어", "العربية", "עברית", "ไทย", "Русский", "हिन्दी", "ελληνικά"]),
        lambda: rng.choice(
            ["def f(x):\n    return x**2", "a+=b;", "// ok", "</p>", "{'k': [1]}", "$\\alpha_1$"]
        ),
        lambda: rng.choice(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_", "_end|>"]),
        lambda: "".join(rng.choice("!?.,;:-—'\"()[]<>|`~@#%^&*") for _ in range(rng.randrange(1, 6))),
        lambda: chr(rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    for _ in range(count):
        yield "".join(rng.choice(pools)() + rng.choice(["", "", " "]) for _ in range(rng.randrange(1, 25)))


class TestSmolLM2:
    @pytest.mark.parametrize("text", GOLDEN)
    def test_golden_ids(self, smollm2: Tokenizer, text: str) -> None:
        assert smollm2.encode(text) == GOLDEN[text]
        assert smollm2.decode(GOLDEN[text], skip_special=False) == text

    def test_facts(self, smollm2: Tokenizer) -> None:
        assert smollm2.vocab_size == 49152
        assert smollm2.bos_id == 1
        assert smollm2.eos_ids == {0, 2}  # <|endoftext|> by its name, <|im_end|> as the file's eos

    def test_chat_template(self, smollm2: Tokenizer) -> None:
        text = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}])
        assert text == (
            "<|im_start|>system\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = smollm2.encode(text, add_special=False)
        assert [i for i in ids if i < 17] == [1, 2, 1, 2, 1]
        assert "<|im" not in smollm2.decode(ids)

    @pytest.mark.parametrize("name", ["story", "encyclopaedia", "technical"])
    def test_evaluation_texts(self, smollm2: Tokenizer, name: str) -> None:
        """The committed texts are long enough to evaluate on, and survive the round trip."""
        text = (Path(__file__).parents[1] / "golden" / "texts" / f"{name}.txt").read_text("utf-8")
        ids = smollm2.encode(text)
        assert len(ids) >= 1100
        assert smollm2.decode(ids) == text

    def test_streaming(self, smollm2: Tokenizer) -> None:
        for text in random_texts(50):
            ids = smollm2.encode(text)
            stream = smollm2.stream(skip_special=False)
            pieces = [stream.push(i) for i in ids]
            assert "".join(pieces) + stream.flush() == smollm2.decode(ids, skip_special=False)

    @pytest.mark.oracle
    def test_ids_equal_transformers(self, smollm2: Tokenizer, oracle: Any) -> None:
        for text in [*GOLDEN, *random_texts(600)]:
            assert smollm2.encode(text) == oracle.encode(text, add_special_tokens=False), text

    @pytest.mark.oracle
    def test_text_equals_transformers(self, smollm2: Tokenizer, oracle: Any) -> None:
        rng = random.Random(11)
        for _ in range(300):
            ids = rng.choices(range(300), k=rng.randrange(40)) + rng.choices(
                range(49152), k=rng.randrange(40)
            )
            for skip in (False, True):
                assert smollm2.decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip)

    @pytest.mark.oracle
    @pytest.mark.parametrize("spaces", [False, True])
    def test_shown_special_tokens_equal_transformers(
        self, smollm2: Tokenizer, oracle: Any, spaces: bool
    ) -> None:
        """Special tokens have no spaces around them, whatever `spaces_between_special_tokens` says."""
        ids = smollm2.encode("<|im_start|>user\nHi<|im_end|><|im_end|>\n a<|endoftext|>b", add_special=False)
        stream = smollm2.stream(skip_special=False, spaces_between_special=spaces)
        expected = oracle.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert "".join(map(stream.push, ids)) + stream.flush() == expected

    @pytest.mark.oracle
    def test_token_texts_equal_transformers(self, smollm2: Tokenizer, oracle: Any) -> None:
        for token_id in [*range(1000), *range(1000, smollm2.vocab_size, 97)]:
            assert smollm2.token_text(token_id) == oracle.decode([token_id]), token_id

    def test_tokens_containing(self, smollm2: Tokenizer) -> None:
        texts = ["\n", ":", '"', "é"]
        found = smollm2.tokens_containing(texts)
        every = range(smollm2.vocab_size)
        assert found == [i for i in every if any(text in smollm2.token_text(i) for text in texts)]
        assert len(found) > 300

    @pytest.mark.oracle
    def test_chat_equals_transformers(self, smollm2: Tokenizer, oracle: Any) -> None:
        talk = [
            {"role": "user", "content": "What is 12 × 3?"},
            {"role": "assistant", "content": "It is 36.\n"},
            {"role": "user", "content": "<b>Thanks</b> 🦊"},
        ]
        for messages in (talk, talk[:1], [{"role": "system", "content": "Rhyme."}, *talk]):
            for more in (False, True):
                expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
                assert smollm2.apply_chat_template(messages, add_generation_prompt=more) == expected


def test_nfc_only_where_the_model_has_it() -> None:
    decomposed = "e\u0301"
    assert build(pre="qwen2").decode(build(pre="qwen2").encode(decomposed)) == "é"
    assert build(pre="smollm").decode(build(pre="smollm").encode(decomposed)) == decomposed


def test_ignore_merges() -> None:
    """llama-bpe takes a word that is a token whole, even if no merges lead to it."""
    tokens = [*BYTES, "hey"]
    fields: dict[str, Any] = {
        "tokens": tokens,
        "token_type": [NORMAL] * 257,
        "merges": [],
        "add_bos_token": False,
    }
    assert build(pre="llama-bpe", **fields).encode("hey") == [256]
    assert build(pre="gpt-2", **fields).encode("hey") == [tokens.index(c) for c in "hey"]


@pytest.mark.parametrize("pre", ["no-such-split", None])
def test_unknown_split_is_logged(pre: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = build("ab", pre=pre)
    assert "model.gguf" in caplog.text
    assert (pre or "names no") in caplog.text
    assert tokenizer.encode("ab 12") == build("ab", pre="gpt-2").encode("ab 12")


def test_special_tokens_come_before_the_split() -> None:
    tokenizer = build("ab", special={"<|x|>": CONTROL, "b<": USER_DEFINED})
    x, user = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert tokenizer.encode("<|x|>ab<|x|>") == [x, BYTES.index("a"), user, *map(BYTES.index, "|x|>")]
    assert tokenizer.encode(" <|x|> ")[1] == x
    assert tokenizer.decode([x, user, x]) == "b<"
    assert tokenizer.decode([x, user, x], skip_special=False) == "<|x|>b<<|x|>"


def test_special_token_text_is_itself() -> None:
    """Its characters are not read as byte-level BPE's: é is no byte E9."""
    tokenizer = build(special={"<é>": USER_DEFINED})
    assert tokenizer.decode(tokenizer.encode("a<é>é")) == "a<é>é"


@pytest.mark.parametrize(
    ("pre", "add_bos", "add_eos", "expected"),
    [
        ("gpt-2", None, None, ""),
        ("smollm", None, None, ""),
        ("llama-bpe", None, None, "b"),
        ("tekken", None, None, "b"),
        ("llama-bpe", False, None, ""),
        ("gpt-2", True, None, "b"),
        ("gpt-2", True, True, "be"),
        ("gpt-2", None, True, "e"),
    ],
)
def test_bos_and_eos(pre: str, add_bos: bool | None, add_eos: bool | None, expected: str) -> None:
    special = {"<b>": CONTROL, "<e>": CONTROL}
    tokenizer = build(
        special=special,
        pre=pre,
        bos_token_id=256,
        eos_token_id=257,
        add_bos_token=add_bos,
        add_eos_token=add_eos,
    )
    x = BYTES.index("x")
    assert tokenizer.encode("x") == [256] * ("b" in expected) + [x] + [257] * ("e" in expected)
    assert tokenizer.encode("x", add_special=False) == [x]
    assert tokenizer.encode("<b>x", add_special=False) == [256, x]


def test_end_of_generation() -> None:
    special = {
        "<end>": CONTROL,
        "<turn>": CONTROL,
        "<|im_end|>": CONTROL,
        "</s>": NORMAL,
        "<|eot_id|>": CONTROL,
    }
    tokenizer = build(special=special, eos_token_id=256, eot_token_id=257)
    assert tokenizer.eos_ids == {256, 257, 258, 260}
    assert build().eos_ids == frozenset()


def test_end_of_generation_harmony() -> None:
    special = dict.fromkeys(["<|return|>", "<|call|>", "<|end|>"], CONTROL)
    assert build(special=special, eos_token_id=256).eos_ids == {256, 257}
    assert build(special={"<|end|>": CONTROL}).eos_ids == {256}


def test_without_token_types_the_named_tokens_are_special() -> None:
    tokenizer = build(special={"<e>": CONTROL}, token_type=None, eos_token_id=256)
    assert tokenizer.encode("a<e>") == [BYTES.index("a"), 256]
    assert tokenizer.decode([256]) == ""


@cache
def small() -> Tokenizer:
    return build("the", " the", "é", "🦊", "🦊a", special={"<|x|>": CONTROL, "<é>": USER_DEFINED})


@given(st.lists(st.integers(0, 275)), st.booleans())
def test_stream_equals_decode(ids: list[int], skip_special: bool) -> None:
    tokenizer = small()
    ids = [i % tokenizer.vocab_size for i in ids]
    stream = tokenizer.stream(skip_special=skip_special)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip_special)


@given(st.text())
def test_round_trip(text: str) -> None:
    tokenizer = small()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_stream_holds_back_incomplete_characters() -> None:
    tokenizer = build()
    stream = tokenizer.stream()
    ids = tokenizer.encode("🦊")
    assert [stream.push(i) for i in ids] == ["", "", "", "🦊"]
    assert [stream.push(i) for i in ids[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(BYTES.index("a")) == "a"
    assert stream.push(ids[2]) == "\ufffd"  # can begin no character, so nothing is to be waited for


def test_byte_alphabet() -> None:
    assert len(set(BYTES)) == 256
    assert (BYTES[ord("A")], BYTES[ord(" ")], BYTES[ord("\n")], BYTES[0xAD], BYTES[0xFF]) == (
        "A",
        "Ġ",
        "Ċ",
        "Ń",
        "ÿ",
    )


@pytest.mark.parametrize("text", [None, 1, b"ab", ["ab"], ("ab", "cd"), "\ud800"])
def test_encode_refuses(text: Any) -> None:
    with pytest.raises(PromptError, match="valid Unicode"):
        small().encode(text)


@pytest.mark.parametrize("token_id", [-1, small().vocab_size, 10**6])
def test_ids_outside_the_vocabulary_have_no_text(token_id: int) -> None:
    """A model with padded embeddings may draw them."""
    a, fox = BYTES.index("a"), [BYTES.index(c) for c in spelled("🦊")]
    assert small().decode([a, token_id, a]) == "aa"
    stream = small().stream()
    assert [stream.push(i) for i in (a, *fox[:2], token_id, *fox[2:])] == ["a", "", "", "", "", "🦊"]


def test_token_text() -> None:
    """What logprobs show: special tokens too, and U+FFFD for what is only a part of a character."""
    tokenizer = small()
    ids = {tokenizer.token_text(i): i for i in range(256, tokenizer.vocab_size)}
    assert {"the", " the", "é", "🦊", "🦊a", "<|x|>", "<é>", "\ufffd"} <= ids.keys()
    assert tokenizer.token_text(BYTES.index(spelled("é")[0])) == "\ufffd"
    assert tokenizer.token_text(tokenizer.vocab_size) == ""


@pytest.mark.parametrize(
    "text", ["t", "e", "é", "🦊", "<", "|x", "\n", " ", "", "Ġ", "no such text", "\ud800"]
)
def test_tokens_containing(text: str) -> None:
    tokenizer = small()
    expected = [i for i in range(tokenizer.vocab_size) if text in tokenizer.token_text(i)]
    assert tokenizer.tokens_containing([text]) == expected
    with_the = {*expected, *tokenizer.tokens_containing(["the"])}
    assert tokenizer.tokens_containing(["the", text]) == sorted(with_the)
    tokenizer.tokens_containing(["the", text]).clear()  # the caller's own
    assert tokenizer.tokens_containing(["the", text]) == sorted(with_the)


def test_names_of_hugging_face() -> None:
    """Scripts written for vLLM use the tokenizer by these."""
    special = {"<b>": CONTROL, "<e>": CONTROL}
    tokenizer = build(special=special, pre="llama-bpe", bos_token_id=256, eos_token_id=257)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (256, 257, 258)
    assert tokenizer.special_ids == {256, 257}
    x = BYTES.index("x")
    assert tokenizer.encode("x", add_special_tokens=False) == [x]
    assert tokenizer.encode("x", add_special_tokens=True) == [256, x]
    assert tokenizer.decode([256, x, 257], skip_special_tokens=False) == "<b>x<e>"
    assert tokenizer.decode([256, x, 257], skip_special_tokens=True) == "x"


def test_another_chat_template() -> None:
    tokenizer = build(special={"<b>": CONTROL, "<e>": CONTROL}, bos_token_id=256, eos_token_id=257)
    user = [{"role": "user", "content": "x"}]
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ more }}"
    assert tokenizer.apply_chat_template(user, chat_template=template) == "<b>x<e>"
    assert tokenizer.apply_chat_template(user, chat_template=template, more="!") == "<b>x<e>!"
    ids = tokenizer.apply_chat_template(user, chat_template=template, tokenize=True)
    assert ids == [256, BYTES.index("x"), 257]
    with pytest.raises(TokenizerError, match=r"model\.gguf.*caller's.*does not parse"):
        tokenizer.apply_chat_template(user, chat_template="{% if %}")


def test_no_chat_template() -> None:
    assert small().chat_template is None
    with pytest.raises(TokenizerError, match=r"model\.gguf.*no chat template.*--raw"):
        small().apply_chat_template([{"role": "user", "content": "Hi"}])


def test_chat_template_sees_bos_and_eos() -> None:
    data = metadata(special={"<b>": CONTROL, "<e>": CONTROL}, bos_token_id=256, eos_token_id=257)
    data["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = tokenizer_from_gguf(data, FILE)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "<b>x<e>"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, "no tokenizer"),
        ({"model": 2}, "tokenizer.ggml.model is int, not str"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, "empty"),
        ({"tokens": "abc"}, "not an array"),
        ({"tokens": [1, 2]}, "holds int"),
        ({"tokens": [*BYTES, "a"], "token_type": None}, "'a' is in the vocabulary twice"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": [1]}, "holds int"),
        ({"merges": ["ab"]}, "merge 0 is 'ab'"),
        ({"merges": ["a b c"]}, "merges do not fit"),
        ({"merges": ["a nowhere"]}, "nowhere"),
        ({"merges": ["a b"]}, "ab"),
        ({"token_type": [1]}, "token_type has 1 elements, not 256"),
        ({"token_type": ["1"] * 256}, "holds str"),
        ({"token_type": [True] * 256}, "holds bool"),
        ({"token_type": [1] * 255 + [7]}, "token type 7"),
        ({"token_type": [0] + [1] * 255}, "token type 0"),
        ({"pre": 1}, "tokenizer.ggml.pre is int"),
        ({"eos_token_id": 256}, "tokenizer.ggml.eos_token_id is 256"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id is -1"),
        ({"eot_token_id": "1"}, "eot_token_id is str"),
        ({"eom_token_id": True}, "eom_token_id is bool"),
        ({"add_bos_token": 1}, "add_bos_token is int"),
        ({"add_bos_token": True}, "bos_token_id is missing"),
        ({"add_eos_token": True}, "eos_token_id is missing"),
    ],
)
def test_malformed(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason) as caught:
        build(**changes)
    assert str(caught.value).startswith("model.gguf: ")


def test_vocabulary_of_another_size() -> None:
    with pytest.raises(TokenizerError, match=r"256 tokens but llama\.vocab_size is 300"):
        tokenizer_from_gguf(metadata() | {"llama.vocab_size": 300}, FILE)


def test_chat_template_of_another_type() -> None:
    with pytest.raises(TokenizerError, match="chat_template is list"):
        tokenizer_from_gguf(metadata() | {"tokenizer.chat_template": ["a"]}, FILE)


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "no-such"])
def test_other_kinds_are_unsupported(model: str) -> None:
    with pytest.raises(UnsupportedError, match=f"model.gguf.*'{model}'.*byte-level BPE"):
        build(model=model)
    with pytest.raises(UnsupportedError, match=f"model.gguf.*'{model}'.*byte-level BPE"):
        supported_kind({"tokenizer.ggml.model": model}, FILE)


def test_supported_kind_looks_at_nothing_else() -> None:
    supported_kind({"tokenizer.ggml.model": "gpt2"}, FILE)
    with pytest.raises(TokenizerError, match=r"model\.gguf.*no tokenizer"):
        supported_kind({}, FILE)


def test_absent_special_tokens() -> None:
    """An id of 2**32 - 1 means that the model has no such token."""
    absent = dict.fromkeys(["bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"], 0xFFFFFFFF)
    tokenizer = build(**absent)
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == frozenset()


class Lazy(Sequence[Any]):
    """As an array of a GGUF file; without `values`, one that must not be decoded."""

    @property
    def kind(self) -> type[Any]:
        assert self.values is not None
        return type(self.values[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __init__(self, values: list[Any] | None, length: int) -> None:
        self.values, self.length = values, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("element by element is too slow")

    def tolist(self) -> list[Any]:
        assert self.values is not None
        return self.values


@pytest.mark.parametrize(
    ("name", "length"), [("token_type", 257), ("token_type", 2**27), ("tokens", 2**27), ("merges", 2**27)]
)
def test_refuses_arrays_by_length_before_decoding(name: str, length: int) -> None:
    with pytest.raises(TokenizerError, match=f"{name} has {length:,} elements"):
        build(**{name: Lazy(None, length)})


def test_reads_lazy_arrays() -> None:
    plain = metadata(("the",))
    lazy = {
        key: Lazy(value, len(value)) if isinstance(value, list) else value for key, value in plain.items()
    }
    assert tokenizer_from_gguf(lazy, FILE).encode("the x") == tokenizer_from_gguf(plain, FILE).encode("the x")
