"""tokenizer_from_folder: the tokenizer of a Hugging Face folder, from its tokenizer.json.

What the folder's other files say is read as transformers reads it: tokenizer_config.json and the older
special_tokens_map.json name the special tokens, generation_config.json or config.json those that end a
generation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexad.checkpoint.chat_template import ChatTemplate
from hexad.checkpoint.files import parse_json
from hexad.checkpoint.tokenizer import (
    BYTE,
    BYTE_TOKEN,
    CONTROL,
    NORMAL,
    USER_DEFINED,
    ByteLevel,
    SentencePiece,
    Spelling,
    Tokenizer,
    end_of_generation,
    from_library,
    surround,
)
from hexad.checks import shown
from hexad.errors import CheckpointError, TokenizerError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 1 << 28
"""Largest tokenizer.json: many times that of the largest models."""

MAX_SETTINGS_BYTES = 1 << 24
"""Largest of the other files. tokenizer_config.json may list every added token."""

MAX_TOKENS = 1 << 22
"""Ids of tokens are below this, so that a table of them has a bound."""

MAX_GAPS = 1 << 16
"""Ids that no token has may be as many as the tokens, and this many more."""

MAX_EXPANSION = 1 << 10
"""By how much a normalizer may lengthen a text, at most, as the contents of its replacements multiply."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can escape and UTF-8 has no bytes for."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def check_folder_tokenizer(folder: Path) -> None:
    """Raises TokenizerError where a folder has no tokenizer.json. Costs nothing."""
    if not (folder / "tokenizer.json").is_file():
        raise TokenizerError(
            f"{folder}: it has no tokenizer.json. Where the folder has a tokenizer in another form, "
            "transformers can make one of it: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})."
        )


def tokenizer_from_folder(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer of a model in Hugging Face's form.

    config: what config.json holds; only its `eos_token_id` is looked at, where generation_config.json has
        none.

    Raises UnsupportedError (neither byte-level nor SentencePiece's) and TokenizerError (missing, malformed).
    Both name the file.
    """
    return _FolderTokenizer(folder, config).build()


class _FolderTokenizer:
    """Reads and checks the files of a folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.file = folder / "tokenizer.json"
        self.settings = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        self.bos, self.eos, *_ = (self._content(name, self.settings.get(name)) for name in _SPECIAL)

    def build(self) -> Tokenizer:
        check_folder_tokenizer(self.folder)
        encoder = self._encoder()
        spelling, has_bytes = self._spelling(encoder)
        special = self._add_tokens(encoder)
        vocab: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
        size = 1 + max(vocab.values(), default=-1)
        if not 0 < size <= MAX_TOKENS:
            raise self._error(f"it has ids of tokens up to {size - 1:,}, not from 0 to {MAX_TOKENS - 1:,}")
        if size > 2 * len(vocab) + MAX_GAPS:  # the table of them would be many times the file
            raise self._error(f"it has {len(vocab):,} tokens, but ids up to {size - 1:,}")
        tokens, types = [""] * size, [NORMAL] * size
        for token, i in vocab.items():
            tokens[i] = token
            if has_bytes and BYTE_TOKEN.fullmatch(token):
                types[i] = BYTE
        for i, added in encoder.get_added_tokens_decoder().items():
            types[i] = CONTROL if added.special or added.content in special else USER_DEFINED
            if types[i] == USER_DEFINED and isinstance(spelling, SentencePiece):
                tokens[i] = added.content.replace("▁", " ")
        bos, eos = (None if token is None else vocab.get(token) for token in (self.bos, self.eos))
        add_bos, add_eos = (self.settings.get(name) for name in ("add_bos_token", "add_eos_token"))
        if add_bos is not None or add_eos is not None:  # otherwise as tokenizer.json has it
            surround(encoder, bos if add_bos else None, eos if add_eos else None)
        named = [i for i in (eos, *self._end_ids()) if i is not None and 0 <= i < size]
        return Tokenizer(
            encoder,
            tokens,
            types,
            spelling=spelling,
            bos_id=bos,
            eos_id=eos,
            eos_ids=end_of_generation(tokens, types, named),
            chat_templates={
                name: ChatTemplate(text, bos_token=self.bos, eos_token=self.eos, source=self.folder)
                for name, text in self._chat_templates().items()
            },
            source=self.folder,
        )

    def _encoder(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models

        data = self._read(self.file, MAX_TOKENIZER_BYTES)
        try:
            encoder = tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:
            if not from_library(error):
                raise
            raise self._error(
                f"it is no tokenizer that the tokenizers library knows: {error!s:.300}"
            ) from error
        model = encoder.model
        if isinstance(model, models.BPE):
            if model.end_of_word_suffix or model.continuing_subword_prefix:
                raise self._unsupported("its BPE marks the ends or the insides of words")
            if model.unk_token is not None and model.token_to_id(model.unk_token) is None:
                raise self._error(f"its unk_token {model.unk_token!r:.80} is not in its vocabulary")
            model.dropout = None  # it is for training: a text has one encoding here
        elif isinstance(model, models.Unigram):
            if hasattr(model, "alpha"):  # tokenizers 0.21 has none
                model.alpha = model.nbest_size = None
        else:
            raise self._unsupported(f"its model is {type(model).__name__}")
        expansion = math.prod(
            max(1, len(part.get("content") or part.get("prepend") or ""))
            for part in _parts(encoder.normalizer)
        )
        if expansion > MAX_EXPANSION:
            raise self._unsupported(f"its normalizer can make a text {expansion:.3g} times as long")
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    def _spelling(self, encoder: tokenizers.Tokenizer) -> tuple[Spelling, bool]:
        """How tokens are written, by the decoder, and whether there are byte tokens."""
        parts = list(_parts(encoder.decoder))
        kinds = [part["type"] for part in parts]
        if "ByteLevel" in kinds:
            return ByteLevel(), False
        has_bytes = "ByteFallback" in kinds
        for part in parts:
            if part["type"] == "Metaspace" and part["replacement"] == "▁":
                return SentencePiece(space_prefix=part["prepend_scheme"] != "never"), has_bytes
            if part["type"] == "Replace" and part["pattern"] == {"String": "▁"} and part["content"] == " ":
                strips = any(p["type"] == "Strip" and p["content"] == " " and p["start"] > 0 for p in parts)
                return SentencePiece(space_prefix=strips), has_bytes
        raise self._unsupported(f"its decoder is {' and '.join(kinds) or 'missing'}")

    def _add_tokens(self, encoder: tokenizers.Tokenizer) -> set[str]:
        """Adds what tokenizer_config.json has besides tokenizer.json. Returns the texts of special tokens."""
        from tokenizers import AddedToken

        listed = self.settings.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            raise self._wrong("added_tokens_decoder", listed)
        known = {token.content for token in encoder.get_added_tokens_decoder().values()}
        more: dict[int, AddedToken] = {}
        for key, value in listed.items():
            content = self._content("added_tokens_decoder", value)
            if content and content not in known:
                if not key.isdecimal() or len(key) > 9:
                    raise self._wrong("added_tokens_decoder", key)
                flags = {name: bool(value.get(name)) for name in _FLAGS} if isinstance(value, dict) else {}
                more[int(key)] = AddedToken(content, **flags)
        encoder.add_tokens([more[i] for i in sorted(more)])
        for i, token in more.items():
            if (found := encoder.token_to_id(token.content)) != i:
                raise self._error(
                    f"token {token.content!r:.80} gets the id {found}; tokenizer_config.json says {i}"
                )
        named = [self.settings.get(name) for name in _SPECIAL]
        for name in ("additional_special_tokens", "extra_special_tokens"):
            values = self.settings.get(name) or []
            if not isinstance(values, list | dict):
                raise self._wrong(name, values)
            named += values.values() if isinstance(values, dict) else values
        special = {content for value in named if (content := self._content("a special token", value))}
        encoder.add_special_tokens(
            [
                AddedToken(content, normalized=False, special=True)
                for content in sorted(special - known)
                if encoder.token_to_id(content) is not None  # others would be tokens the model does not have
            ]
        )
        return special

    def _end_ids(self) -> list[int]:
        ends = self._json("generation_config.json").get("eos_token_id")
        if ends is None:
            ends = self.config.get("eos_token_id")
        ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if any(type(i) is not int for i in ids):
            raise self._wrong("eos_token_id", ends)
        return ids

    def _chat_templates(self) -> dict[str, str]:
        """Texts by name. Files of their own, which newer folders have, come before tokenizer_config.json."""
        given = self.settings.get("chat_template")
        if given is None:
            given = self._json("chat_template.json").get("chat_template")
        texts = {"default": given} if isinstance(given, str) else {}
        for entry in given if isinstance(given, list) else []:
            name, text = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "template"))
            if not isinstance(name, str) or not isinstance(text, str):
                raise self._wrong("chat_template", entry)
            texts[name] = text
        if not isinstance(given, str | list | None):
            raise self._wrong("chat_template", given)
        more = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
        for path, name in [(self.folder / "chat_template.jinja", "default"), *((p, p.stem) for p in more)]:
            if path.is_file():
                try:
                    texts[name] = self._read(path, MAX_SETTINGS_BYTES).decode()
                except UnicodeDecodeError as error:
                    raise TokenizerError(f"{path}: it is not UTF-8: {error}.") from error
        return texts

    def _content(self, name: str, value: Any) -> str | None:
        """The text of a token, given as such or in a mapping."""
        content = value.get("content") if isinstance(value, dict) else value
        if content is None or (isinstance(content, str) and not _SURROGATE.search(content)):
            return content
        raise self._wrong(name, value)

    def _json(self, name: str) -> dict[str, Any]:
        """The object in a file, empty where there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return parse_json(self._read(path, MAX_SETTINGS_BYTES), path, "it")
        except TokenizerError:
            raise
        except CheckpointError as error:
            raise TokenizerError(f"{error}.") from error

    def _read(self, path: Path, limit: int) -> bytes:
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise TokenizerError(f"{path}: it cannot be read: {error.strerror or error}.") from error
        if len(data) > limit:
            raise TokenizerError(f"{path}: it is larger than {limit:,} bytes, the most that is read.")
        return data

    def _error(self, reason: str) -> TokenizerError:
        return TokenizerError(f"{self.file}: {reason}.")

    def _wrong(self, name: str, value: Any) -> TokenizerError:
        return TokenizerError(f"{self.folder}: {name} must not be {shown(value)}.")

    def _unsupported(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.file}: {reason}; hexad knows byte-level BPE, and SentencePiece's BPE and Unigram."
        )


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer, or those of a sequence, as tokenizer.json has them."""
    if component is not None:
        state = json.loads(component.__getstate__())
        rest = [state]
        while rest:
            part = rest.pop(0)
            if part["type"] == "Sequence":
                rest = [*(part.get("decoders") or part.get("normalizers") or []), *rest]
            else:
                yield part
