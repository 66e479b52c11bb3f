"""Tokenizers of Hugging Face folders: kinds, special tokens, what is added, chat templates and refusals.

Against transformers they are in tests/models/test_tokenizers.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder

from hexad.checkpoint.hf_tokenizer import check_folder_tokenizer, tokenizer_from_folder
from hexad.checkpoint.tokenizer import Tokenizer, byte_alphabet
from hexad.errors import PromptError, TokenizerError, UnsupportedError

BYTES = byte_alphabet()
USER = [{"role": "user", "content": "x"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def byte_level() -> Encoder:
    tokens = [*BYTES, "he", "hé"]
    encoder = Encoder(models.BPE({token: i for i, token in enumerate(tokens)}, [("h", "e")]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(["<b>", "<e>"])
    encoder.add_tokens(["<think>"])
    return encoder


def sentencepiece() -> Encoder:
    tokens = [
        "<unk>",
        "<b>",
        "<e>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "h",
        "e",
        "he",
        "▁he",
        "▁▁",
    ]
    merges = [("h", "e"), ("▁", "he"), ("▁", "▁")]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    encoder = Encoder(bpe)
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encoder.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    encoder.add_special_tokens(["<unk>", "<b>", "<e>"])
    return encoder


def metaspace(scheme: str = "always") -> Encoder:
    encoder = Encoder(
        models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("h", -3.0), ("e", -3.0), ("▁he", -4.0)], 0)
    )
    encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    encoder.decoder = decoders.Metaspace(prepend_scheme=scheme)
    encoder.add_special_tokens(["<unk>"])
    return encoder


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Writes a folder of these files, and reads it."""

    def load(encoder: Encoder | None = None, config: dict[str, Any] | None = None, **files: Any) -> Tokenizer:
        """files: by names without ".json"."""
        (tmp_path / "tokenizer.json").write_text((encoder or byte_level()).to_str())
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return tokenizer_from_folder(tmp_path, config or {})

    return load


Load = Callable[..., Tokenizer]


def test_byte_level(load: Load) -> None:
    tokenizer = load()
    assert tokenizer.encode("he<think>é") == [256, 260, *map(BYTES.index, "Ã©")]
    assert tokenizer.decode([256, 260, 258, BYTES.index("Ã"), BYTES.index("©")]) == "he<think>é"
    assert tokenizer.decode([256, 258], skip_special=False) == "he<b>"
    assert tokenizer.token_bytes(257) == b"h\xe9"  # é is a byte here, not a character
    assert tokenizer.special_ids == {258, 259}
    assert tokenizer.vocab_size == 261
    assert tokenizer.decode(tokenizer.encode(" he")) == " he"


def test_sentencepiece(load: Load) -> None:
    tokenizer = load(sentencepiece())
    ids = tokenizer.encode("he  é")
    assert [tokenizer._tokens[i] for i in ids] == ["▁he", "▁▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "he  é"
    assert tokenizer.decode(ids, continuation=True) == " he  é"
    assert b"".join(map(tokenizer.token_bytes, ids)) == " he  é".encode()
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == [" he", "  ", "", "é"]
    assert tokenizer.tokens_containing(["\n", "h"]) == [3 + 10, 3 + ord("h"), 260, 262, 263]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_unigram_with_metaspace(load: Load, scheme: str) -> None:
    tokenizer = load(metaspace(scheme))
    ids = tokenizer.encode("he he")
    assert tokenizer.decode(ids) == "he he"
    assert tokenizer.decode(ids, continuation=True) == ("he he" if scheme == "never" else " he he")


def test_spaces_of_added_tokens(load: Load) -> None:
    """Gemma writes runs of spaces as added tokens of ▁."""
    encoder = sentencepiece()
    encoder.add_tokens([AddedToken("▁▁▁", normalized=True), AddedToken("<a▁b>", special=True)])
    tokenizer = load(encoder)
    assert tokenizer.decode(tokenizer.encode("he   he")) == "he   he"
    assert tokenizer.token_text(265) == "   "
    assert tokenizer.token_text(266) == "<a▁b>"


def test_truncation_padding_and_dropout_are_for_training(load: Load) -> None:
    encoder = byte_level()
    encoder.enable_truncation(2)
    encoder.enable_padding(length=8)
    encoder.model.dropout = 0.9
    tokenizer = load(encoder)
    assert {tuple(tokenizer.encode("hehehe")) for _ in range(20)} == {(256, 256, 256)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "[{}]"),
        ({"add_bos_token": True}, "<b>{}"),
        ({"add_bos_token": True, "add_eos_token": True}, "<b>{}<e>"),
        ({"add_eos_token": True}, "{}<e>"),
        ({"add_bos_token": False}, "{}"),
        ({"add_bos_token": None}, "[{}]"),
        ({"add_bos_token": True, "bos_token": None}, "{}"),
    ],
)
def test_what_is_added_to_texts(load: Load, settings: dict[str, Any], expected: str) -> None:
    encoder = byte_level()
    encoder.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="[ $A ]", special_tokens=[("[", BYTES.index("[")), ("]", BYTES.index("]"))]
            ),
        ]
    )
    names = {"bos_token": "<b>", "eos_token": {"content": "<e>", "lstrip": False}}
    tokenizer = load(encoder, tokenizer_config=names | settings)
    assert tokenizer.decode(tokenizer.encode("he"), skip_special=False) == expected.format("he")
    assert tokenizer.encode("he", add_special=False) == [256]


def test_ends(load: Load) -> None:
    encoder = byte_level()
    encoder.add_special_tokens(["<|im_end|>"])  # 261
    named = {"bos_token": "<b>", "eos_token": "<e>"}

    def ends(config: dict[str, Any], **files: Any) -> frozenset[int]:
        return load(encoder, config, **files).eos_ids

    assert ends({}) == {261}
    assert ends({"eos_token_id": 258}) == {258, 261}
    assert ends({"eos_token_id": [258, 300, -1]}, special_tokens_map=named) == {258, 259, 261}
    assert ends({"eos_token_id": 258}, generation_config={"eos_token_id": [65]}) == {65, 259, 261}
    assert ends({"eos_token_id": 258}, generation_config={"eos_token_id": None}) == {258, 259, 261}
    tokenizer = load(encoder, special_tokens_map={"eos_token": "<b>"}, tokenizer_config=named)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (258, 259)


def test_special_tokens_of_the_configuration(load: Load) -> None:
    """Those that tokenizer.json has as ordinary tokens become special; unknown ones are not added."""
    settings = {
        "pad_token": "he",
        "unk_token": "<think>",
        "mask_token": "[MASK]",
        "additional_special_tokens": [{"content": "hé"}],
        "added_tokens_decoder": {
            "261": {"content": "<tool>", "special": False},
            "262": {"content": "<image>", "special": True, "rstrip": True},
            "258": {"content": "<b>", "special": True},
        },
    }
    tokenizer = load(tokenizer_config=settings)
    assert tokenizer.special_ids == {256, 257, 258, 259, 260, 262}
    assert tokenizer.vocab_size == 263
    assert tokenizer.encode("ahé<tool><image>  <tool>") == [BYTES.index("a"), 257, 261, 262, 261]
    assert tokenizer.decode([256, 261, 262]) == "<tool>"


def test_chat_templates(load: Load, tmp_path: Path) -> None:
    names = {"bos_token": "<b>", "eos_token": {"content": "<e>"}}
    text = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    assert load().chat_template is None
    assert load(chat_template={"chat_template": "old"}).apply_chat_template(USER) == "old"
    tokenizer = load(tokenizer_config=names | {"chat_template": text})
    assert tokenizer.apply_chat_template(USER) == "<b>x<e>"
    assert tokenizer.apply_chat_template(USER, tokenize=True) == [258, BYTES.index("x"), 259]
    assert tokenizer.apply_chat_template(USER, TOOLS) == "<b>x<e>"
    named = [{"name": "default", "template": text}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    tokenizer = load(tokenizer_config=names | {"chat_template": named})
    assert tokenizer.apply_chat_template(USER) == "<b>x<e>"
    assert tokenizer.apply_chat_template(USER, TOOLS) == "1"
    assert tokenizer.apply_chat_template(USER, TOOLS, chat_template="default") == "<b>x<e>"
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = load(tokenizer_config={"chat_template": named})
    assert tokenizer.apply_chat_template(USER) == "file"
    assert tokenizer.apply_chat_template(USER, TOOLS) == "1"
    assert tokenizer.apply_chat_template(USER, chat_template="rag") == "rag"


def test_only_tokenizer_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    for refuse in (check_folder_tokenizer, lambda folder: tokenizer_from_folder(folder, {})):
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json.*save_pretrained"):
            refuse(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    check_folder_tokenizer(tmp_path)


def changed(path: list[str], value: Any, encoder: Encoder | None = None) -> str:
    data = json.loads((encoder or byte_level()).to_str())
    *parents, last = path
    inner = data
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (changed(["decoder"], None), "its decoder is missing"),
        (
            changed(["decoder"], {"type": "WordPiece", "prefix": "##", "cleanup": True}),
            "decoder is WordPiece",
        ),
        (changed(["decoder"], {"type": "Fuse"}), "decoder is Fuse"),
        (changed(["model", "end_of_word_suffix"], "</w>"), "ends or the insides of words"),
        (
            changed(
                ["model"], {"type": "BPE", "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "##"}
            ),
            "ends or the insides of words",
        ),
        (
            changed(["model"], {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}),
            "its model is WordLevel",
        ),
    ],
)
def test_other_kinds_are_unsupported(load: Load, text: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"tokenizer\.json.*{reason}.*hexad knows byte-level"):
        load(tokenizer=text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no tokenizer that"),
        ("{", "no tokenizer that"),
        ("[" * 100_000, "no tokenizer that"),
        ("[]", "no tokenizer that"),
        (b"\xff\xfe".decode("latin-1"), "no tokenizer that"),
        (changed(["model", "merges"], [["h", "nowhere"]]), "nowhere"),
        (changed(["model", "vocab"], {"h": 0, "e": 2**32 - 1, "he": 1}), "ids of tokens up to 4,294,967,295"),
        (changed(["model", "unk_token"], "<nowhere>"), "unk_token '<nowhere>' is not in"),
        (changed(["pre_tokenizer"], {"type": "Unheard"}), "no tokenizer that"),
    ],
)
def test_malformed(load: Load, text: str, reason: str) -> None:
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json.*{reason}"):
        load(tokenizer=text)


@pytest.mark.parametrize(
    ("file", "value", "reason"),
    [
        ("tokenizer_config", "{", r"tokenizer_config\.json: it is not JSON"),
        ("tokenizer_config", "[" * 100_000, r"tokenizer_config\.json: it is nested too deeply"),
        ("tokenizer_config", [], "it is no JSON object, but a list"),
        ("tokenizer_config", {"bos_token": 5}, "bos_token must not be 5"),
        ("tokenizer_config", {"bos_token": {"content": 5}}, "bos_token must not be"),
        ("tokenizer_config", {"additional_special_tokens": "<a>"}, "additional_special_tokens must not be"),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "added_tokens_decoder must not be"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": "<n>"}}, "added_tokens_decoder must not be 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"400": "<n>"}}, "'<n>' gets the id 261"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template must not be 5"),
        ("tokenizer_config", {"chat_template": [{"name": "default"}]}, "chat_template must not be"),
        ("tokenizer_config", {"chat_template": ["x"]}, "chat_template must not be 'x'"),
        ("special_tokens_map", "5", "it is no JSON object, but a int"),
        ("generation_config", {"eos_token_id": "</s>"}, "eos_token_id must not be '</s>'"),
        ("generation_config", {"eos_token_id": [1, True]}, "eos_token_id must not be"),
        ("chat_template", "{", "not JSON"),
    ],
)
def test_malformed_settings(load: Load, file: str, value: Any, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        load(**{file: value})


def test_a_template_that_is_no_text(load: Load, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: it is not UTF-8"):
        load()


def test_files_have_bounds(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in (("MAX_TOKENIZER_BYTES", "tokenizer"), ("MAX_SETTINGS_BYTES", "tokenizer_config")):
        with monkeypatch.context() as patch:
            patch.setattr(f"hexad.checkpoint.hf_tokenizer.{name}", 10)
            with pytest.raises(TokenizerError, match=rf"{file}\.json: it is larger than 10 bytes"):
                load(tokenizer_config={"bos_token": "<b>"})


def test_what_makes_the_library_give_up_is_the_prompts_error(load: Load) -> None:
    """Its panics are no Exceptions, and would end a server's thread."""
    pattern = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    tokenizer = load(tokenizer=changed(["pre_tokenizer"], pattern))
    with pytest.raises(PromptError, match=r"gives up on this prompt of 40 characters.*retry-limit"):
        tokenizer.encode("x" * 40)
    assert tokenizer.encode("he") == [256]
