"""Tokenizers against transformers', family by family, on random texts; real vocabularies throughout."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from tests.vocabularies import (
    byte_level_bpe,
    sentencepiece_pieces,
    tekken_ranks,
    tiktoken_ranks,
    vocabulary_file,
)

from hexad.checkpoint.gguf import GGUFFile
from hexad.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from hexad.checkpoint.hf_tokenizer import tokenizer_from_folder
from hexad.checkpoint.tokenizer import Tokenizer

pytestmark = pytest.mark.oracle

COUNT = 5000
FILE = Path("model.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

Pool = Callable[[random.Random], str]


def of(*texts: str) -> Pool:
    return lambda rng: rng.choice(texts)


def words_of(text: str) -> Pool:
    return of(*text.split())


POOLS: list[Pool] = [
    words_of("the of and Paris don't It's THEY'LL we'd I'm'd HTTPServer camelCase Ünïcode ALL"),
    words_of("naïve Straße ﬁne œuvre e\u0301te\u0301 A\u030a Å n\u0303o ĳs \u0301 \u0308x"),
    words_of("日本語 漢字かな交じり 한국어 ㅎㅎ 繁體中文，標點。 ｶﾀｶﾅ 𠮷野家"),
    words_of("العربيةُ עברית ไทยครับ Русский हिन्दी தமிழ் ελληνικά বাংলা ქართული አማርኛ"),
    words_of("🦊 👩\u200d👩\u200d👧 🇫🇷🇩🇪 😀😀 ❤\ufe0f 🤷🏽\u200d♀\ufe0f \u200d \ufe0f 1\ufe0f\u20e3"),
    words_of("² Ⅷ ½ ٣٤٥ १२३४ 3.14 1,000,000 0x1F １２３ ④"),
    words_of("▁ <0x0A> Ġ Ċ ##a < |> _end|> <|im_ <s [INST \\n ( [[ } « ” ‘ \" '"),
    of("def f(x):\n    return x**2", "a+=b;", "// ok", "</p>", "{'k': [1]}", "$\\alpha_1$"),
    of(" \n", "\r\n\r\n", "\n  \n", " \t ", "\n\n\n ", "  \u00a0 "),
    lambda rng: rng.choice(" \t\n\r\u00a0\u3000\u2028\u200b") * rng.randrange(1, 9),
    lambda rng: str(rng.randrange(10 ** rng.randrange(1, 9))),
    lambda rng: "".join(rng.choice("!?.,;:-—'\"()[]<>|`~@#%^&*=+/\\_$") for _ in range(rng.randrange(1, 7))),
    lambda rng: rng.choice("ab-=x ") * rng.randrange(2, 40),
    lambda rng: chr(rng.choice([rng.randrange(0x20), 0x7F, rng.randrange(0x80, 0xA0)])),
    lambda rng: chr(rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)])),
]


def random_texts(special: list[str]) -> Iterator[str]:
    """Texts that mix scripts, digits, white space, emoji, code, control characters and special tokens; the
    same at every run."""
    rng = random.Random(4)
    pools = [*POOLS, of(*special)]
    for _ in range(COUNT):
        yield "".join(rng.choice(pools)(rng) + rng.choice(["", "", " "]) for _ in range(rng.randrange(16)))


class Family(NamedTuple):
    """ours, and transformers' tokenizer of the same vocabulary. special: texts to mix in. exact: whether all
    of a text, as UTF-8, can be had back from its tokens."""

    ours: Tokenizer
    oracle: Any
    special: list[str]
    exact: Callable[[bytes], bool] = lambda text: True


@cache
def words_and_merges(name: str) -> tuple[list[str], list[str]]:
    ranks = tekken_ranks()[0] if name == "tekken" else tiktoken_ranks(name)
    words, merges = byte_level_bpe(ranks)
    return words, [" ".join(merge) for merge in merges]


def byte_level(
    name: str, pre: str, special: list[str], *, first: bool = False, **fields: Any
) -> dict[str, Any]:
    """A vocabulary as GGUF metadata: that of tiktoken's ranks, and special tokens after or before it."""
    words, merges = words_and_merges(name)
    tokens = special + words if first else words + special
    controls = set(special)
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [CONTROL if token in controls else NORMAL for token in tokens],
        "merges": merges,
    } | fields
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def sentencepiece(**fields: Any) -> dict[str, Any]:
    """Mistral 7B's vocabulary as GGUF metadata, with two user-defined tokens for rare characters."""
    tokens, scores, types = map(list, zip(*sentencepiece_pieces("mistral"), strict=True))
    fields = {
        "model": "llama",
        "tokens": [*tokens, "<think>", "[a b]"],
        "scores": [*scores, 0.0, 0.0],
        "token_type": [*types, USER_DEFINED, USER_DEFINED],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | fields
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


SENTENCEPIECE_SPECIAL = ["<s>", "</s>", "<unk>", "<think>", "[a b]"]


def by_transformers(metadata: dict[str, Any], architecture: str, **tokens: str) -> Any:
    """transformers' own reading of GGUF metadata."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    known = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in metadata
    }
    backend, _ = convert_gguf_tokenizer(architecture, known)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def by_tiktoken(name: str, special: list[str], **tokens: Any) -> Any:
    """transformers' conversion of tiktoken's ranks. By itself it reads them with the package tiktoken."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(vocab_file=name, extra_special_tokens=special)
    converter.load_tiktoken_bpe = tiktoken_ranks
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **tokens)


def in_folder(oracle: Any, folder: Path, **config: Any) -> Tokenizer:
    oracle.save_pretrained(folder)
    return tokenizer_from_folder(folder, config)


def nfc(text: bytes) -> bool:
    return unicodedata.is_normalized("NFC", text.decode())


LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
LLAMA3_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def smollm(folder: Path, smollm2_path: Path) -> Family:
    import transformers
    from tokenizers import pre_tokenizers

    with GGUFFile(smollm2_path) as file:
        ours = tokenizer_from_gguf(file.metadata, smollm2_path)
    oracle = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    # It takes GPT-2's split for every file whose own it does not know.
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokens = {ours.token_bytes(i) for i in range(ours.vocab_size)}  # those of some rare bytes are missing
    exact = [byte for byte in range(256) if bytes([byte]) in tokens]
    return Family(ours, oracle, [*QWEN_SPECIAL, "<repo_name>"], set(exact).issuperset)


def llama3(folder: Path, smollm2_path: Path) -> Family:
    data = byte_level("llama3", "llama-bpe", LLAMA3_SPECIAL, bos_token_id=128_000)
    oracle = by_tiktoken("llama3", LLAMA3_SPECIAL, add_bos_token=True, **LLAMA3_TOKENS)
    return Family(tokenizer_from_gguf(data, FILE), oracle, LLAMA3_SPECIAL)


def gguf_split(pre: str) -> Callable[[Path, Path], Family]:
    """Splits that transformers knows for GGUF files, on Llama 3's vocabulary."""

    def build(folder: Path, smollm2_path: Path) -> Family:
        data = byte_level("llama3", pre, LLAMA3_SPECIAL)
        return Family(tokenizer_from_gguf(data, FILE), by_transformers(data, "llama"), LLAMA3_SPECIAL)

    return build


def qwen(pre: str, name: str) -> Callable[[Path, Path], Family]:
    def build(folder: Path, smollm2_path: Path) -> Family:
        import transformers

        data = byte_level("qwen", pre, QWEN_SPECIAL, eos_token_id=151_645)
        vocab = {token: i for i, token in enumerate(data["tokenizer.ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in data["tokenizer.ggml.merges"]]
        oracle = getattr(transformers, name)(vocab=vocab, merges=merges)
        oracle.add_special_tokens({"additional_special_tokens": QWEN_SPECIAL})
        return Family(tokenizer_from_gguf(data, FILE), oracle, QWEN_SPECIAL, nfc)

    return build


def tekken(folder: Path, smollm2_path: Path) -> Family:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral.tokenizer import MistralConverter

    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    _, count = tekken_ranks()
    special = [*named, *(f"<SPECIAL_{i}>" for i in range(len(named), count))]
    data = byte_level("tekken", "tekken", special, first=True, bos_token_id=1)
    source = json.loads(vocabulary_file("tekken").read_bytes())
    source["special_tokens"] = [{"rank": i, "token_str": token} for i, token in enumerate(special)]
    (folder / "tekken.json").write_text(json.dumps(source))
    backend = MistralConverter(str(folder / "tekken.json")).converted()
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", add_bos_token=True
    )
    return Family(tokenizer_from_gguf(data, FILE), oracle, named)


def deepseek_vocabulary() -> tuple[dict[str, Any], list[str], Any]:
    from transformers import PreTrainedTokenizerFast

    source = json.loads(vocabulary_file("deepseek").read_bytes())
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(vocabulary_file("deepseek")),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        add_bos_token=True,
    )
    return source, ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜end▁of▁sentence｜>"], oracle


def deepseek(folder: Path, smollm2_path: Path) -> Family:
    source, special, oracle = deepseek_vocabulary()
    tokens = sorted(source["model"]["vocab"], key=source["model"]["vocab"].__getitem__)
    types = [NORMAL] * len(tokens)
    for added in sorted(source["added_tokens"], key=lambda added: added["id"]):
        if added["id"] == len(tokens):
            tokens.append(added["content"])
            types.append(NORMAL)
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]]
    fields = {"model": "gpt2", "pre": "deepseek-v3", "tokens": tokens, "token_type": types, "merges": merges}
    fields |= {"bos_token_id": 0, "add_bos_token": True}
    data = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return Family(tokenizer_from_gguf(data, FILE), oracle, special)


def llama_gguf(folder: Path, smollm2_path: Path) -> Family:
    """With the space before every stretch of text, which transformers has for "phi3" files."""
    data = sentencepiece()
    oracle = by_transformers(data, "phi3", bos_token="<s>", eos_token="</s>", add_bos_token=True)
    return Family(tokenizer_from_gguf(data, FILE), oracle, SENTENCEPIECE_SPECIAL, no_special)


def no_special(text: bytes) -> bool:
    """After special tokens, too, encoding adds spaces, which decoding leaves as they are."""
    return not any(token.encode() in text for token in SENTENCEPIECE_SPECIAL) and no_underline(text)


def no_underline(text: bytes) -> bool:
    return "▁".encode() not in text


def gemma4_gguf(folder: Path, smollm2_path: Path) -> Family:
    merges = [f"{left} {right}" for left, right in sentencepiece_merges()]
    data = sentencepiece(model="gemma4", merges=merges, add_bos_token=False)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    oracle = by_transformers(data, "gemma4", **tokens)
    return Family(tokenizer_from_gguf(data, FILE), oracle, SENTENCEPIECE_SPECIAL, no_underline)


def sentencepiece_merges() -> list[tuple[str, str]]:
    from transformers.tokenization_utils_base import generate_merges

    pieces = sentencepiece_pieces("mistral")
    return generate_merges({token: i for i, (token, *_) in enumerate(pieces)})


def llama_folder(folder: Path, smollm2_path: Path) -> Family:
    """transformers' LlamaTokenizer: Metaspace, which adds a space only where there is none."""
    from transformers import LlamaTokenizer

    vocab = {token: i for i, (token, *_) in enumerate(sentencepiece_pieces("mistral"))}
    oracle = LlamaTokenizer(vocab=vocab, merges=sentencepiece_merges(), add_bos_token=True)
    oracle.add_tokens(["<think>", "[a b]"])
    ours = in_folder(oracle, folder)
    return Family(
        ours, oracle, SENTENCEPIECE_SPECIAL, lambda text: no_special(text) and not text.startswith(b" ")
    )


def legacy_llama_folder(folder: Path, smollm2_path: Path) -> Family:
    """LlamaTokenizer as folders had it until 2024: Prepend and Replace."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import LlamaConverter

    pieces = sentencepiece_pieces("mistral")
    converter = object.__new__(LlamaConverter)
    converter.original_tokenizer = SimpleNamespace(
        legacy=True, add_prefix_space=True, convert_ids_to_tokens=lambda i: pieces[i][0], vocab_file=""
    )
    converter.SpmExtractor = lambda _: SimpleNamespace(extract=lambda scores: (None, sentencepiece_merges()))
    converter.proto = SimpleNamespace(
        trainer_spec=SimpleNamespace(model_type=2, unk_piece="<unk>"),
        normalizer_spec=SimpleNamespace(precompiled_charsmap=b""),
        pieces=[SimpleNamespace(piece=piece, score=score, type=kind) for piece, score, kind in pieces],
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    oracle = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), add_bos_token=True, **tokens)
    return Family(in_folder(oracle, folder), oracle, SENTENCEPIECE_SPECIAL, no_special)


def gemma_folder(folder: Path, smollm2_path: Path) -> Family:
    from transformers import GemmaTokenizer

    vocab = {token: i for i, (token, *_) in enumerate(sentencepiece_pieces("mistral"))}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "mask_token": "<unk>"}
    oracle = GemmaTokenizer(vocab=vocab, merges=sentencepiece_merges(), add_bos_token=True, **tokens)
    oracle.add_tokens(["▁▁▁▁▁", "<think>"])
    ours = in_folder(oracle, folder)
    return Family(ours, oracle, ["<s>", "</s>", "<think>", "     "], no_underline)


def unigram_folder(folder: Path, smollm2_path: Path) -> Family:
    """Unigram with Metaspace: T5's tokenizer, here with Mistral's pieces. It forgets white space."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(token, score / 1000) for token, score, kind in sentencepiece_pieces("mistral") if kind == 1]
    oracle = T5Tokenizer(vocab=pieces, extra_ids=3)
    return Family(in_folder(oracle, folder), oracle, ["</s>", "<extra_id_1>"], lambda text: False)


def llama3_folder(folder: Path, smollm2_path: Path) -> Family:
    oracle = by_tiktoken("llama3", LLAMA3_SPECIAL, add_bos_token=True, add_eos_token=True, **LLAMA3_TOKENS)
    return Family(in_folder(oracle, folder), oracle, LLAMA3_SPECIAL)


def qwen_folder(folder: Path, smollm2_path: Path) -> Family:
    _, oracle, special, _ = qwen("qwen2", "Qwen2Tokenizer")(folder, smollm2_path)
    oracle.add_tokens(["<think>", "</think>"])
    return Family(in_folder(oracle, folder), oracle, [*special, "<think>"], nfc)


def deepseek_folder(folder: Path, smollm2_path: Path) -> Family:
    _, special, oracle = deepseek_vocabulary()
    return Family(in_folder(oracle, folder), oracle, special)


FAMILIES = {
    "gguf-smollm": smollm,
    "gguf-llama-bpe": llama3,
    "gguf-default": gguf_split("gpt-2"),
    "gguf-gpt-4o": gguf_split("gpt-4o"),
    "gguf-qwen2": qwen("qwen2", "Qwen2Tokenizer"),
    "gguf-qwen35": qwen("qwen35", "Qwen3_5Tokenizer"),
    "gguf-tekken": tekken,
    "gguf-deepseek-v3": deepseek,
    "gguf-llama": llama_gguf,
    "gguf-gemma4": gemma4_gguf,
    "folder-llama3": llama3_folder,
    "folder-qwen2": qwen_folder,
    "folder-deepseek-v3": deepseek_folder,
    "folder-llama": llama_folder,
    "folder-llama-legacy": legacy_llama_folder,
    "folder-gemma": gemma_folder,
    "folder-unigram": unigram_folder,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers(name: str, tmp_path: Path, smollm2_path: Path) -> None:
    pytest.importorskip("transformers")
    ours, oracle, special, exact = FAMILIES[name](tmp_path, smollm2_path)
    texts = list(random_texts(special))
    for add_special in (True, False):
        expected = oracle(texts, add_special_tokens=add_special)["input_ids"]
        found = [ours.encode(text, add_special=add_special) for text in texts]
        different = [t for t, a, b in zip(texts, found, expected, strict=True) if a != b]
        assert not different, f"{len(different)} of {COUNT}, such as {different[0]!r}"
    round_trips = 0
    for text, ids in zip(texts, found, strict=True):
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip)
        if exact(text.encode()):
            assert ours.decode(ids, skip_special=False) == text
            round_trips += 1
        stream = ours.stream(skip_special=False)
        pieces = [stream.push(i) for i in ids]
        whole = b"".join(map(ours.token_bytes, ids))
        assert "".join(pieces) + stream.flush() == whole.decode("utf-8", "replace")
        assert whole.decode("utf-8", "replace") == ours.decode(ids, skip_special=False, continuation=True)
    assert round_trips > COUNT / 3 or not exact(b"")


@pytest.mark.parametrize("alphabet", ["words", "runs"])
def test_equals_sentencepiece(alphabet: str) -> None:
    """The definition itself, ties between merges included, of which runs of the same characters are full."""
    library = pytest.importorskip("sentencepiece")
    oracle = library.SentencePieceProcessor(model_file=str(vocabulary_file("mistral")))
    ours = tokenizer_from_gguf(sentencepiece(), FILE)
    rng = random.Random(5)
    if alphabet == "words":
        texts = [text for text in random_texts(["x"]) if "<0x" not in text]
    else:
        choices = [rng.sample("ab-=/ .\n#0e", rng.randrange(1, 4)) for _ in range(COUNT)]
        texts = [
            "".join(rng.choice(chars) * rng.randrange(1, 9) for _ in range(rng.randrange(1, 12)))
            for chars in choices
        ]
    assert len(texts) > 0.8 * COUNT
    for text in texts:
        ids = oracle.encode(text)
        assert ours.encode(text, add_special=False) == ids, text
        if "▁" not in text:
            assert ours.decode(ids) == text
