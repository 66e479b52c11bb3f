"""tokenizer_from_gguf: the tokenizer that a GGUF file's metadata describes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hexad.checkpoint.chat_template import ChatTemplate
from hexad.checkpoint.pre_tokenizers import DEFAULT, SPLITS, Split
from hexad.checkpoint.tokenizer import (
    BYTE,
    BYTE_TOKEN,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    ByteLevel,
    SentencePiece,
    Tokenizer,
    end_of_generation,
    from_library,
    surround,
)
from hexad.errors import TokenizerError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")

logger = logging.getLogger(__name__)

KINDS = {
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece BPE with scores",
    "gemma4": "SentencePiece BPE with merges",
}
"""What `tokenizer.ggml.model` may say, and what it means."""

ABSENT = 0xFFFFFFFF
"""A special token's id in files of models that have no such token: -1, as an unsigned number."""

MAX_ELEMENTS = 1 << 22
"""Most tokens, and most merges, that a vocabulary may have: many times those of the largest models."""

MAX_PIECE = 512
"""Most characters in a token that merges are to be found for, which takes the square of it."""


MERGES_PER_TOKEN, SOME_MERGES = 8, 1 << 14
"""Most merges that are found for a vocabulary's tokens, on the average, and besides. Real ones have about 2,
but a token of n characters can have n - 1."""


def supported_kind(metadata: Mapping[str, Any], source: Path) -> None:
    """Raises what `tokenizer_from_gguf` would for a kind of tokenizer that hexad does not know, or for none.

    Costs nothing, so that such a file can be refused before its weights are loaded.
    """
    _GGUFTokenizer(metadata, source).kind()


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """Builds the tokenizer that a GGUF file's metadata describes.

    metadata: the file's key-value pairs; arrays are sequences, with a fast `tolist()` and their elements'
        type as `kind` where they have them.
    source: the file, for the errors.

    Raises UnsupportedError (a kind of tokenizer that is not one of KINDS) and TokenizerError (malformed).
    """
    return _GGUFTokenizer(metadata, source).build()


class _Merges(Sequence[tuple[str, str]]):
    """Merges, written "left right", as pairs that are made when they are read, which is once: a list of Llama
    3's 280,000 would take 50 MB."""

    def __init__(self, merges: Sequence[str], error: Callable[[str], TokenizerError]) -> None:
        self._merges, self._error = merges, error

    def __len__(self) -> int:
        return len(self._merges)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for i, merge in enumerate(self._merges):
            left, space, right = merge.partition(" ")
            if not space:
                raise self._error(f"merge {i} is {merge!r:.80}, not two tokens with a space between them")
            yield left, right


class _GGUFTokenizer:
    """Reads and checks `tokenizer.*` metadata."""

    def __init__(self, metadata: Mapping[str, Any], source: Path) -> None:
        self.metadata = metadata
        self.source = source

    def kind(self) -> str:
        kind = self._scalar("tokenizer.ggml.model", str)
        if kind is None:
            raise self._error("it has no tokenizer (tokenizer.ggml.model is missing)")
        if kind not in KINDS:
            known = ", ".join(f"{name!r} ({meaning})" for name, meaning in KINDS.items())
            raise UnsupportedError(
                f"{self.source}: its tokenizer is of kind {kind!r:.80}; hexad knows {known}."
            )
        return kind

    def build(self) -> Tokenizer:
        kind = self.kind()
        byte_level = kind == "gpt2"
        split = self._split() if byte_level else Split((), add_bos=True)
        tokens = self._tokens()
        ids = {name: self._token_id(name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown")}
        types = self._types(tokens, ids, byte_level)
        if not byte_level:  # newer files have it so, and these tokens are looked for in texts with spaces
            tokens = [
                token.replace("▁", " ") if kind == USER_DEFINED else token
                for token, kind in zip(tokens, types, strict=True)
            ]
        prefix = kind == "llama" and self._flag("add_space_prefix") is not False
        if byte_level:
            encoder = self._byte_level(tokens, split)
        else:
            merges = self._merges() if kind == "gemma4" else self._merges_by_score(tokens, types)
            encoder = self._sentencepiece(tokens, types, merges, ids["unknown"], prefix)
        self._add_tokens(encoder, tokens, types)
        surround(encoder, self._added("bos", ids, split.add_bos), self._added("eos", ids, False))
        named = [i for name in ("eos", "eot", "eom") if (i := ids[name]) is not None]
        return Tokenizer(
            encoder,
            tokens,
            types,
            spelling=ByteLevel() if byte_level else SentencePiece(space_prefix=prefix),
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            eos_ids=end_of_generation(tokens, types, named),
            chat_templates=self._chat_templates(tokens, ids),
            source=self.source,
        )

    def _byte_level(self, tokens: list[str], split: Split) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import normalizers, pre_tokenizers

        encoder = self._bpe(tokens, self._merges(), ignore_merges=split.ignore_merges)
        if split.nfc:
            encoder.normalizer = normalizers.NFC()
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in split.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return encoder

    def _sentencepiece(
        self,
        tokens: list[str],
        types: list[int],
        merges: Sequence[tuple[str, str]],
        unknown: int | None,
        prefix: bool,
    ) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import normalizers

        if wrong := [
            token
            for token, kind in zip(tokens, types, strict=True)
            if kind == BYTE and not BYTE_TOKEN.fullmatch(token)
        ]:
            raise self._error(f"byte token {wrong[0]!r:.80} is not written <0x00> to <0xFF>")
        if unknown is None:
            unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), None)
        encoder = self._bpe(
            tokens,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        steps: list[normalizers.Normalizer] = []
        if self._flag("remove_extra_whitespaces"):
            steps += [
                normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
                normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
            ]
        if prefix:  # before each stretch of text between special tokens, as llama.cpp has it
            steps.append(normalizers.Prepend("▁"))
        encoder.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        return encoder

    def _bpe(
        self, tokens: list[str], merges: Sequence[tuple[str, str]], **options: Any
    ) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models

        vocab = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(vocab) != len(tokens):
            first = next(i for i, token in enumerate(tokens) if vocab[token] != i)
            raise self._error(
                f"token {tokens[first]!r:.80} is in the vocabulary twice ({first}, {vocab[tokens[first]]})"
            )
        # Objects, not tokenizers' JSON: half the time for 49,000 tokens.
        try:
            return tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
        except BaseException as error:  # the library raises plain Exception for a merge of unknown tokens
            if not from_library(error):
                raise
            for _ in merges:  # raises what is wrong with one of them, which the library does not pass on
                pass
            raise self._error(f"the merges do not fit the vocabulary: {error!s:.200}") from error

    def _add_tokens(self, encoder: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
        import tokenizers

        encoder.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=kind != USER_DEFINED)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
        )

    def _merges(self) -> Sequence[tuple[str, str]]:
        return _Merges(self._elements("merges", (str,)), self._error)

    def _merges_by_score(self, tokens: list[str], types: list[int]) -> list[tuple[str, str]]:
        """SentencePiece's merges: of all neighbours that are a token together, those come first whose token
        has the best score. Ties are its leftmost pair, for which the longer left part comes first here."""
        scores = self._array("scores", (float, int), len(tokens))
        if any(score != score for score in scores):
            raise self._error("tokenizer.ggml.scores has a score that is not a number")
        normal = [kind == NORMAL for kind in types]
        words = {token: token for token in compress(tokens, normal)}  # for merges to share their strings
        limit = SOME_MERGES + MERGES_PER_TOKEN * len(tokens)
        merges: list[tuple[str, str]] = []
        for i in sorted(compress(range(len(tokens)), normal), key=lambda i: -scores[i]):
            token = tokens[i]
            if len(token) > MAX_PIECE:
                raise self._error(f"token {i} has {len(token):,} characters; at most {MAX_PIECE} are merged")
            for cut in range(len(token) - 1, 0, -1):
                left, right = words.get(token[:cut]), words.get(token[cut:])
                if left is not None and right is not None:
                    merges.append((left, right))
            if len(merges) > limit:
                raise self._error(f"its {len(tokens):,} tokens have more than {limit:,} merges")
        return merges

    def _tokens(self) -> list[str]:
        tokens = self._array("tokens", (str,))
        if not tokens:
            raise self._error("its vocabulary (tokenizer.ggml.tokens) is empty")
        key = f"{self.metadata.get('general.architecture')}.vocab_size"
        declared = self._scalar(key, int)
        if declared is not None and declared != len(tokens):
            raise self._error(f"its vocabulary has {len(tokens)} tokens but {key} is {declared}")
        return tokens

    def _types(self, tokens: list[str], ids: Mapping[str, int | None], byte_level: bool) -> list[int]:
        if self.metadata.get("tokenizer.ggml.token_type") is None:
            named = set(ids.values())
            return [
                CONTROL if i in named else NORMAL if byte_level or not BYTE_TOKEN.fullmatch(token) else BYTE
                for i, token in enumerate(tokens)
            ]
        types = self._array("token_type", (int,), len(tokens))
        if unknown := set(types).difference(range(NORMAL, BYTE + 1)):
            raise self._error(f"token type {min(unknown)} is not one of 1 to 6")
        return types

    def _split(self) -> Split:
        pre = self._scalar("tokenizer.ggml.pre", str)
        split = SPLITS.get(pre or "")
        if split is None:
            known = (
                "names no pre-tokenizer"
                if pre is None
                else f"has a pre-tokenizer unknown to hexad, {pre!r:.80}"
            )
            logger.warning(
                "%s %s; taking GPT-2's. Answers may be worse than the model's best.", self.source, known
            )
            return DEFAULT
        return split

    def _chat_templates(self, tokens: list[str], ids: Mapping[str, int | None]) -> dict[str, ChatTemplate]:
        bos, eos = (None if (i := ids[name]) is None else tokens[i] for name in ("bos", "eos"))
        key = "tokenizer.chat_template"
        return {
            name[len(key) + 1 :] or "default": ChatTemplate(
                text, bos_token=bos, eos_token=eos, source=self.source
            )
            for name in self.metadata
            if (name == key or name.startswith(f"{key}.")) and (text := self._scalar(name, str)) is not None
        }

    def _token_id(self, name: str, count: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._scalar(key, int)
        if value is None or value == ABSENT:
            return None
        if not 0 <= value < count:
            raise self._error(f"{key} is {value}, outside its vocabulary of {count} tokens")
        return value

    def _added(self, name: str, ids: Mapping[str, int | None], default: bool) -> int | None:
        """The id of a token if it is added to every text."""
        wanted = self._flag(f"add_{name}_token")
        if wanted and ids[name] is None:
            raise self._error(f"add_{name}_token is set but tokenizer.ggml.{name}_token_id is missing")
        return ids[name] if wanted or (wanted is None and default) else None

    def _flag(self, name: str) -> bool | None:
        return self._scalar(f"tokenizer.ggml.{name}", bool)

    def _scalar(self, key: str, kind: type[T]) -> T | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._error(f"{key} is {type(value).__name__}, not {kind.__name__}")
        return value

    def _array(self, name: str, kinds: tuple[type[T], ...], count: int | None = None) -> list[T]:
        """All elements. count: how many to insist on, one per token."""
        elements = self._elements(name, kinds, count)
        return elements.tolist() if hasattr(elements, "tolist") else list(elements)

    def _elements(self, name: str, kinds: tuple[type[T], ...], count: int | None = None) -> Sequence[T]:
        """The array itself, checked: decode it all at once or iterate."""
        key = f"tokenizer.ggml.{name}"
        value = self.metadata.get(key)
        if value is None:
            raise self._error(f"{key} is missing")
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self._error(f"{key} is {type(value).__name__}, not an array")
        if len(value) > MAX_ELEMENTS or count not in (None, len(value)):  # before decoding it: it may be huge
            wanted = f"at most {MAX_ELEMENTS:,}" if count is None else f"{count:,}, one per token"
            raise self._error(f"{key} has {len(value):,} elements, not {wanted}")
        # Where its kind is known, it is asked for: decoding takes many times the bytes of small integers.
        found = {value.kind} if hasattr(value, "kind") else set(map(type, value))
        if wrong := found.difference(kinds):
            raise self._error(f"{key} holds {min(t.__name__ for t in wrong)}, not only {kinds[0].__name__}")
        return value

    def _error(self, reason: str) -> TokenizerError:
        return TokenizerError(f"{self.source}: {reason}.")
