"""Tokenizer: text to token ids and back, built from a checkpoint's own vocabulary.

Encoding is the `tokenizers` library's. Decoding is ours: a token stands for bytes, and a text is its tokens'
bytes read as UTF-8, so that a streamed text is the whole text by construction.
"""

from __future__ import annotations

import codecs
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from hexad.checkpoint.chat_template import ChatTemplate
from hexad.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    import tokenizers

# One text is encoded at a time: the library's threads would do nothing but warn of forks. It looks here at
# each call.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF. Unknown, control and user-defined tokens are looked for in a text before it is split
into words; unknown and control tokens have no text of their own; a byte token, "<0x0A>", is that byte."""

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

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""How byte tokens are written."""


class Spelling(Protocol):
    """How a vocabulary's tokens are written.

    space_prefix: encoding puts a space before a text, which decoding takes away again.
    """

    space_prefix: bool

    def read(self, token: str, kind: int) -> bytes:
        """The bytes that a token of a type with text in it (normal, unused or byte) stands for."""

    def write(self, text: str) -> str:
        """What the token would look like that stands for this text."""


class ByteLevel:
    """Byte-level BPE's way: each character is a byte, by `byte_alphabet`."""

    space_prefix = False

    def __init__(self) -> None:
        self._alphabet = byte_alphabet()
        self._byte_of = {char: byte for byte, char in enumerate(self._alphabet)}

    def read(self, token: str, kind: int) -> bytes:
        try:
            return bytes([self._byte_of[char] for char in token])
        except KeyError:
            return token.encode()

    def write(self, text: str) -> str:
        return "".join(self._alphabet[byte] for byte in text.encode("utf-8", "surrogatepass"))


class SentencePiece:
    """SentencePiece's way: characters are themselves, ▁ is a space, and there may be byte tokens."""

    def __init__(self, *, space_prefix: bool) -> None:
        self.space_prefix = space_prefix

    def read(self, token: str, kind: int) -> bytes:
        return bytes.fromhex(token[3:5]) if kind == BYTE else token.replace("▁", " ").encode()

    def write(self, text: str) -> str:
        return text.replace(" ", "▁")


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


class _Texts(Sequence[str]):
    """Many short texts in little memory: strings of their own would take ten times as much."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._bytes = b"".join(encoded)
        self._starts = array("q", accumulate(map(len, encoded), initial=0))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._text(self._starts[i], self._starts[i + 1])

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._starts):
            yield self._text(start, end)

    def _text(self, start: int, end: int) -> str:
        return self._bytes[start:end].decode("utf-8", "surrogatepass")


class Tokenizer:
    """A model's vocabulary and how text becomes tokens of it.

    encoder: of the `tokenizers` library; its post-processor adds the tokens around every text.
    tokens, types: text and GGUF's type of each token, by id.
    chat_templates: by name; "default" is for conversations, and "tool_use", where there is one, for those
        with tools.

    vocab_size: number of tokens; ids are 0 … vocab_size - 1.
    bos_id: the token that begins a sequence, if the vocabulary names one.
    eos_id: the token that ends a text, if the vocabulary names one.
    eos_ids: the tokens that end a generation, any of them.
    special_ids: unknown and control tokens, which have no text of their own.
    chat_template: the default one, if the checkpoint has it.
    """

    def __init__(
        self,
        encoder: tokenizers.Tokenizer,
        tokens: Sequence[str],
        types: Sequence[int],
        *,
        spelling: Spelling | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        chat_templates: Mapping[str, ChatTemplate] | None = None,
        source: object,
    ) -> None:
        self.vocab_size = len(tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.eos_ids = eos_ids
        self.special_ids = frozenset(i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL))
        self._templates = dict(chat_templates or {})
        self.chat_template = self._templates.get("default")
        self._encoder = encoder
        self._tokens = _Texts(tokens)
        self._types = bytes(types)
        self._spelling = spelling or ByteLevel()
        self._source = source
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
        if add_special_tokens is not None:
            add_special = add_special_tokens
        try:
            if not isinstance(text, str):
                raise TypeError
            # A batch of one: unlike `encode`, it lets other threads run meanwhile, and is twice as fast.
            (encoded,) = self._encoder.encode_batch_fast([text], add_special_tokens=add_special)
            ids: list[int] = encoded.ids
        except (TypeError, UnicodeError) as error:
            what = "has unpaired surrogates" if isinstance(text, str) else f"is {type(text).__name__}"
            raise PromptError(f"A prompt must be a string of valid Unicode; this one {what}.") from error
        except BaseException as error:
            if not from_library(error):
                raise
            raise PromptError(
                f"{self._source}: the tokenizer gives up on this prompt of {len(text):,} characters: {error}"
            ) from error
        return ids

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special: bool = True,
        skip_special_tokens: bool | None = None,
        continuation: bool = False,
    ) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary, "".

        skip_special: leave special tokens out. skip_special_tokens: Hugging Face's name for it.
        continuation: the text goes on from another one, so that a space which begins it belongs to it. It is
            dropped otherwise where the vocabulary is one whose `encode` puts a space before every text.
        """
        if skip_special_tokens is not None:
            skip_special = skip_special_tokens
        pieces = [self.token_bytes(token_id, skip_special=skip_special) for token_id in ids]
        text = b"".join(pieces).decode("utf-8", "replace")
        return text if continuation or not self._spelling.space_prefix else text.removeprefix(" ")

    def stream(self, *, skip_special: bool = True, spaces_between_special: bool = True) -> TextStream:
        """A decoder for tokens that come one by one, after those of a prompt: its pushes and its flush join
        to `decode` of all of them as a continuation.

        spaces_between_special: makes no difference here, nor in transformers and vLLM: special tokens are
            shown without spaces either way.
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
        # By how they are written first: bytes take a while to make of all the tokens.
        needles = [text.encode("utf-8", "surrogatepass") for text in texts]
        written = {*texts, *map(self._spelling.write, texts)}
        return tuple(
            i
            for i, token in enumerate(self._tokens)
            if (self._types[i] == BYTE or any(text in token for text in written))
            and any(needle in self.token_bytes(i) for needle in needles)
        )

    def _spell(self, token_id: int) -> bytes:
        token, kind = self._tokens[token_id], self._types[token_id]
        return self._spelling.read(token, kind) if kind in (NORMAL, UNUSED, BYTE) else token.encode()

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

        chat_template: the name of one of the checkpoint's templates, or the text of another.
        tokenize: return the token ids.

        Raises TokenizerError where there is no chat template, and what `render` raises.
        """
        template = self._find_template(chat_template, with_tools=bool(tools))
        text = template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )
        return self.encode(text, add_special=False) if tokenize else text

    def _find_template(self, given: str | None, *, with_tools: bool) -> ChatTemplate:
        if given is not None:
            return self._templates.get(given) or self._other_template(given)
        template = (with_tools and self._templates.get("tool_use")) or self.chat_template
        if not template:
            names = ", ".join(map(repr, sorted(self._templates)))
            raise TokenizerError(
                f"{self._source}: the checkpoint has no default chat template, only {names}; name one with "
                "chat_template."
                if names
                else f"{self._source}: the checkpoint has no chat template, so it takes no conversations. "
                "Use a plain prompt (--raw) instead."
            )
        return template

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


def from_library(error: BaseException) -> bool:
    """Whether an error may be one of the `tokenizers` library's, whose panics are not Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def surround(encoder: tokenizers.Tokenizer, bos: int | None, eos: int | None) -> None:
    """Has the encoder add these tokens before and after every text, and no others."""
    from tokenizers import processors

    special = [(name, i) for name, i in (("bos", bos), ("eos", eos)) if i is not None]
    single = [*(["bos"] if bos is not None else []), "$A", *(["eos"] if eos is not None else [])]
    encoder.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def end_of_generation(tokens: Sequence[str], types: Sequence[int], named: Iterable[int]) -> frozenset[int]:
    """The tokens that end a generation: those that the model's files name, and the well-known ones."""
    ends = {i: tokens[i] for i in named}
    for i, kind in enumerate(types):
        if kind == CONTROL and tokens[i] in END_OF_GENERATION:
            ends[i] = tokens[i]
    # In the Harmony format (gpt-oss) a turn is several messages, and <|end|> only ends one of them.
    if {"<|return|>", "<|call|>"} <= set(ends.values()):
        ends = {i: token for i, token in ends.items() if token != "<|end|>"}
    return frozenset(ends)
