"""Tokenizer: text to token ids and back, built from a checkpoint's own vocabulary.

Encoding is byte-level BPE by the `tokenizers` library. Decoding is ours: a token stands for bytes, and a text
is its tokens' bytes read as UTF-8, so that a streamed text is the whole text by construction.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from hexad.checkpoint.chat_template import ChatTemplate
from hexad.errors import PromptError, TokenizerError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")

logger = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF. Unknown, control and user-defined tokens are looked for in a text before it is split
into words; unknown and control tokens have no text of their own."""

ABSENT = 0xFFFFFFFF
"""A special token's id in files of models that have no such token: -1, as an unsigned number."""

MAX_ELEMENTS = 1 << 22
"""Most tokens, and most merges, that a vocabulary may have: many times those of the largest models."""

# fmt: off
END_OF_GENERATION = frozenset([
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|EOT|>", "<EOT>", "[EOT]", "[EOS]",
    "<eos>", "</s>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "<|end_of_text|>",
    "<|end_of_turn|>", "<end_of_turn>", "<end_of_utterance>", "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
])
# fmt: on
"""Control tokens that end a generation wherever a vocabulary has them: a model's metadata often names only
one of those it was trained to stop with."""


# How a text is split into words before BPE. Patterns apply in turn, each to the pieces the former left. They
# are the models' own (from their tokenizer.json), in the Oniguruma syntax that `tokenizers` uses.

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_CASED_REST}"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """One way of splitting, and what else goes with it in the models that use it.

    nfc: normalise to NFC first. ignore_merges: a word that is a token is that token, whatever the merges say.
    add_bos: what an absent `add_bos_token` means.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_DIGITS_FIRST = _Split((r"\p{N}", _GPT2))
_LLAMA_BPE = _Split((_LLAMA3,), ignore_merges=True, add_bos=True)
_SPLITS: dict[str, _Split] = {
    **dict.fromkeys(
        ("default", "gpt-2", "phi-2", "jais", "trillion", "exaone4", "gigachat"), _Split((_GPT2,))
    ),
    **dict.fromkeys(("mpt", "olmo"), _Split((_GPT2,), nfc=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS_FIRST),
    "command-r": _Split(_DIGITS_FIRST.patterns, nfc=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA_BPE
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _Split((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Split((_QWEN2,), nfc=True)),
    **dict.fromkeys(("stablelm2", "megrez", "hunyuan", "grok-2"), _Split((_QWEN2,))),
    "qwen35": _Split((_QWEN35,), nfc=True),
    "tekken": _Split((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Split((_GPT4O,))),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense"), _Split((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3))
    ),
    "falcon": _Split((r"[\p{P}$+<=>^`|~]+", _GPT2, r"[0-9][0-9][0-9]")),
}


class TextStream:
    """Decodes one token at a time, giving out text as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes: "" where it ends inside a character, or is outside the
        vocabulary (padded embeddings make a model's logits wider than that). Never raises."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def flush(self) -> str:
        """What is left: U+FFFD for a character that was never completed, or ""."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """A model's vocabulary and how text becomes tokens of it.

    vocab_size: number of tokens; ids are 0 … vocab_size - 1.
    bos_id: the token that begins a sequence, if the vocabulary names one.
    eos_id: the token that ends a text, if the vocabulary names one.
    eos_ids: the tokens that end a generation, any of them.
    special_ids: unknown and control tokens, which have no text of their own.
    chat_template: how the model wants a conversation written, if the checkpoint says so.
    """

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        tokens: Sequence[str],
        types: Sequence[int],
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        add_bos: bool = False,
        add_eos: bool = False,
        chat_template: ChatTemplate | None = None,
        source: object,
    ) -> None:
        self.vocab_size = len(tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.eos_ids = eos_ids
        self.special_ids = frozenset(i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL))
        self.chat_template = chat_template
        self._bpe = bpe
        self._tokens = tokens
        self._types = types
        self._prefix = [bos_id] if add_bos and bos_id is not None else []
        self._suffix = [eos_id] if add_eos and eos_id is not None else []
        self._source = source
        self._byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        self._bytes: dict[int, bytes] = {}
        self._containing = lru_cache(maxsize=16)(self._find_containing)
        self._other_template = lru_cache(maxsize=16)(self._make_template)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """`bos_id`, as Hugging Face calls it."""
        return self.bos_id

    @property
    def eos_token_id(self) -> int | None:
        """`eos_id`, as Hugging Face calls it."""
        return self.eos_id

    def encode(
        self, text: str, *, add_special: bool = True, add_special_tokens: bool | None = None
    ) -> list[int]:
        """The token ids of a text.

        add_special: add the tokens that the model wants around every text (beginning and end of sequence).
            False for a rendered chat template, which brings its own.
        add_special_tokens: Hugging Face's name for it.

        The text of a special token, wherever it stands, becomes that token in either case.

        Raises PromptError where `text` is no string or not valid Unicode.
        """
        try:
            ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            what = "has unpaired surrogates" if isinstance(text, str) else f"is {type(text).__name__}"
            raise PromptError(f"A prompt must be a string of valid Unicode; this one {what}.") from error
        if add_special_tokens is not None:
            add_special = add_special_tokens
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(
        self, ids: Sequence[int], *, skip_special: bool = True, skip_special_tokens: bool | None = None
    ) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary, "".

        skip_special: leave special tokens out. skip_special_tokens: Hugging Face's name for it.
        """
        if skip_special_tokens is not None:
            skip_special = skip_special_tokens
        pieces = [self.token_bytes(token_id, skip_special=skip_special) for token_id in ids]
        return b"".join(pieces).decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True, spaces_between_special: bool = True) -> TextStream:
        """A decoder for tokens that come one by one; its pushes and its flush join to `decode` of all ids.

        spaces_between_special: makes no difference here, nor in transformers and vLLM: special tokens of
            byte-level vocabularies are shown without spaces either way.
        """
        return TextStream(self, skip_special=skip_special)

    def token_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """The bytes a token stands for, perhaps part of a character; none if outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        if skip_special and token_id in self.special_ids:
            return b""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, special or not: U+FFFD for what is only part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def tokens_containing(self, texts: Sequence[str]) -> list[int]:
        """The tokens whose text has any of these texts in it, in ascending order. The last few answers are
        kept, as it looks through the vocabulary."""
        return list(self._containing(tuple(texts)))

    def _find_containing(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        # By spelling first, of which there are two kinds: bytes take a while to make of all the tokens.
        needles = [text.encode("utf-8", "surrogatepass") for text in texts]
        alphabet = byte_alphabet()
        spellings = {*texts, *("".join(alphabet[byte] for byte in needle) for needle in needles)}
        return tuple(
            i
            for i, token in enumerate(self._tokens)
            if any(spelling in token for spelling in spellings)
            and any(needle in self.token_bytes(i) for needle in needles)
        )

    def _spell(self, token_id: int) -> bytes:
        token = self._tokens[token_id]
        if self._types[token_id] in (NORMAL, UNUSED, BYTE) and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        return token.encode()

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        *,
        chat_template: str | None = ...,
        add_generation_prompt: bool = ...,
        continue_final_message: bool = ...,
        tokenize: Literal[False] = ...,
        **variables: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        *,
        chat_template: str | None = ...,
        add_generation_prompt: bool = ...,
        continue_final_message: bool = ...,
        tokenize: Literal[True],
        **variables: Any,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """The conversation as one prompt text; see `ChatTemplate.render`. Encode it with `add_special=False`.

        chat_template: the text of another template, in place of the checkpoint's.
        tokenize: return the token ids.

        Raises TokenizerError where there is no chat template, and what `render` raises.
        """
        template = self.chat_template if chat_template is None else self._other_template(chat_template)
        if template is None:
            raise TokenizerError(
                f"{self._source}: the checkpoint has no chat template, so it takes no conversations. "
                "Use a plain prompt (--raw) instead."
            )
        text = template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )
        return self.encode(text, add_special=False) if tokenize else text

    def _make_template(self, text: str) -> ChatTemplate:
        bos, eos = (None if i is None else self._tokens[i] for i in (self.bos_id, self.eos_id))
        source = f"{self._source}, with a chat_template of the caller's"
        return ChatTemplate(text, bos_token=bos, eos_token=eos, source=source)


def byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE writes bytes 0 … 255 (from GPT-2).

    Bytes that are printable in Latin-1 are themselves; the others, in order, are U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def supported_kind(metadata: Mapping[str, Any], source: Path) -> None:
    """Raises what `tokenizer_from_gguf` would for a kind of tokenizer that hexad does not know, or for none.

    Costs nothing, so that such a file can be refused before its weights are loaded.
    """
    _GGUFTokenizer(metadata, source).check_kind()


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """Builds the tokenizer that a GGUF file's metadata describes.

    metadata: the file's key-value pairs; arrays are sequences, with a fast `tolist()` and their elements'
        type as `kind` where they have them.
    source: the file, for the errors.

    Raises UnsupportedError (a kind of tokenizer other than byte-level BPE) and TokenizerError (malformed).
    """
    return _GGUFTokenizer(metadata, source).build()


class _GGUFTokenizer:
    """Reads and checks `tokenizer.*` metadata."""

    def __init__(self, metadata: Mapping[str, Any], source: Path) -> None:
        self.metadata = metadata
        self.source = source

    def check_kind(self) -> None:
        model = self._scalar("tokenizer.ggml.model", str)
        if model is None:
            raise self._error("it has no tokenizer (tokenizer.ggml.model is missing)")
        if model != "gpt2":
            raise UnsupportedError(
                f"{self.source}: its tokenizer is of kind {model!r:.80}; hexad knows 'gpt2' (byte-level BPE)."
            )

    def build(self) -> Tokenizer:
        self.check_kind()
        tokens = self._tokens()
        ids = {name: self._token_id(name, len(tokens)) for name in ("bos", "eos", "eot", "eom")}
        types = self._types(len(tokens), ids)
        split = self._split()
        add_bos = self._scalar("tokenizer.ggml.add_bos_token", bool)
        add_eos = self._scalar("tokenizer.ggml.add_eos_token", bool)
        for name, wanted in (("bos", add_bos), ("eos", add_eos)):
            if wanted and ids[name] is None:
                raise self._error(f"add_{name}_token is set but tokenizer.ggml.{name}_token_id is missing")
        return Tokenizer(
            self._bpe(tokens, types, split),
            tokens,
            types,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            eos_ids=_end_of_generation(tokens, types, ids),
            add_bos=split.add_bos if add_bos is None else add_bos,
            add_eos=bool(add_eos),
            chat_template=self._chat_template(tokens, ids),
            source=self.source,
        )

    def _bpe(self, tokens: list[str], types: list[int], split: _Split) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models, normalizers, pre_tokenizers

        vocab = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(vocab) != len(tokens):
            first = next(i for i, token in enumerate(tokens) if vocab[token] != i)
            raise self._error(
                f"token {tokens[first]!r:.80} is in the vocabulary twice ({first}, {vocab[tokens[first]]})"
            )
        merges = []
        for i, merge in enumerate(self._array("merges", str)):
            left, space, right = merge.partition(" ")
            if not space:
                raise self._error(f"merge {i} is {merge!r:.80}, not two tokens with a space between them")
            merges.append((left, right))
        # Objects, not tokenizers' JSON: half the time for 49,000 tokens.
        try:
            bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=split.ignore_merges))
        except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
            raise self._error(f"the merges do not fit the vocabulary: {error}") from error
        if split.nfc:
            bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in split.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=kind != USER_DEFINED)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
        )
        return bpe

    def _tokens(self) -> list[str]:
        tokens = self._array("tokens", str)
        if not tokens:
            raise self._error("its vocabulary (tokenizer.ggml.tokens) is empty")
        key = f"{self.metadata.get('general.architecture')}.vocab_size"
        declared = self._scalar(key, int)
        if declared is not None and declared != len(tokens):
            raise self._error(f"its vocabulary has {len(tokens)} tokens but {key} is {declared}")
        return tokens

    def _types(self, count: int, ids: Mapping[str, int | None]) -> list[int]:
        if self.metadata.get("tokenizer.ggml.token_type") is None:
            named = set(ids.values())
            return [CONTROL if i in named else NORMAL for i in range(count)]
        types = self._array("token_type", int, count)
        if unknown := set(types).difference(range(NORMAL, BYTE + 1)):
            raise self._error(f"token type {min(unknown)} is not one of 1 to 6")
        return types

    def _split(self) -> _Split:
        pre = self._scalar("tokenizer.ggml.pre", str)
        split = _SPLITS.get(pre or "")
        if split is None:
            known = (
                "names no pre-tokenizer"
                if pre is None
                else f"has a pre-tokenizer unknown to hexad, {pre!r:.80}"
            )
            logger.warning(
                "%s %s; taking GPT-2's. Answers may be worse than the model's best.", self.source, known
            )
            return _SPLITS["default"]
        return split

    def _chat_template(self, tokens: list[str], ids: Mapping[str, int | None]) -> ChatTemplate | None:
        text = self._scalar("tokenizer.chat_template", str)
        if text is None:
            return None
        bos, eos = (None if (i := ids[name]) is None else tokens[i] for name in ("bos", "eos"))
        return ChatTemplate(text, bos_token=bos, eos_token=eos, source=self.source)

    def _token_id(self, name: str, count: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._scalar(key, int)
        if value is None or value == ABSENT:
            return None
        if not 0 <= value < count:
            raise self._error(f"{key} is {value}, outside its vocabulary of {count} tokens")
        return value

    def _scalar(self, key: str, kind: type[T]) -> T | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._error(f"{key} is {type(value).__name__}, not {kind.__name__}")
        return value

    def _array(self, name: str, kind: type[T], count: int | None = None) -> list[T]:
        """count: how many elements to insist on, one per token."""
        key = f"tokenizer.ggml.{name}"
        value = self.metadata.get(key)
        if value is None:
            raise self._error(f"{key} is missing")
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self._error(f"{key} is {type(value).__name__}, not an array")
        if len(value) > MAX_ELEMENTS or count not in (None, len(value)):  # before decoding it: it may be huge
            wanted = f"at most {MAX_ELEMENTS:,}" if count is None else f"{count:,}, one per token"
            raise self._error(f"{key} has {len(value):,} elements, not {wanted}")
        elements: list[Any] = []
        found = getattr(value, "kind", kind)
        if found is kind:  # asked before decoding, which takes many times the bytes of small integers
            elements = value.tolist() if hasattr(value, "tolist") else list(value)
        if wrong := {found, *map(type, elements)} - {kind}:
            raise self._error(f"{key} holds {min(t.__name__ for t in wrong)}, not only {kind.__name__}")
        return elements

    def _error(self, reason: str) -> TokenizerError:
        return TokenizerError(f"{self.source}: {reason}.")


def _end_of_generation(tokens: list[str], types: list[int], ids: Mapping[str, int | None]) -> frozenset[int]:
    ends = {i: tokens[i] for name in ("eos", "eot", "eom") if (i := ids[name]) is not None}
    for i, kind in enumerate(types):
        if kind == CONTROL and tokens[i] in END_OF_GENERATION:
            ends[i] = tokens[i]
    # In the Harmony format (gpt-oss) a turn is several messages, and <|end|> only ends one of them.
    if {"<|return|>", "<|call|>"} <= set(ends.values()):
        ends = {i: token for i, token in ends.items() if token != "<|end|>"}
    return frozenset(ends)
