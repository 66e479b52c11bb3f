"""open_checkpoint: finds out what a path holds, by its first bytes, and opens it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.gguf import GGUFFile
from hexad.checkpoint.names import map_weights, read_config, read_generation_defaults
from hexad.errors import CheckpointError, ModelNotFoundError, UnsupportedError

if TYPE_CHECKING:
    from hexad.checkpoint.tokenizer import Tokenizer

_PICKLES = (b"PK\x03\x04", b"\x80\x02")  # torch.save, new and old


def open_checkpoint(path: Path) -> Checkpoint:
    """The model at this path: a GGUF file.

    Raises ModelNotFoundError if there is nothing, CheckpointError if it is malformed, and UnsupportedError if
    it is no GGUF file, or of an architecture, type or setting hexad does not know. Each names the path.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, False for names no file can have
        raise ModelNotFoundError(f"{path}: no such file. Give the path of a GGUF file.")
    if path.is_dir():
        raise UnsupportedError(
            f"{path}: a folder; only GGUF files can be opened for now. Give the path of one."
        )
    if path.is_file():  # the reader itself refuses what is empty, unreadable or no regular file
        _refuse_other_formats(path)
    return _open_gguf(path)


def _refuse_other_formats(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.suffix == ".safetensors" or (head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**27):
        raise UnsupportedError(f"{path}: a safetensors file; only GGUF files can be opened for now.")
    if head.startswith(_PICKLES):
        raise UnsupportedError(f"{path}: a PyTorch pickle, which could run code; hexad never opens these.")


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    try:
        config = read_config(file)
        weights = map_weights(file, config)
        defaults = read_generation_defaults(file)
    except BaseException:
        file.close()
        raise

    def load_tokenizer() -> Tokenizer:
        from hexad.checkpoint.gguf_tokenizer import tokenizer_from_gguf  # late: it imports much

        return tokenizer_from_gguf(file.metadata, path)

    def check_tokenizer() -> None:
        from hexad.checkpoint.gguf_tokenizer import supported_kind

        supported_kind(file.metadata, path)

    return Checkpoint(path, config, weights, load_tokenizer, file.close, defaults, check_tokenizer)
