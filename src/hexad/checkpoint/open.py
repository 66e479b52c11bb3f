"""open_checkpoint: finds out what a path holds, by its first bytes, and opens it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hexad.checkpoint import hf_folder
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.gguf_shards import open_gguf
from hexad.checkpoint.hub import gguf_models
from hexad.checkpoint.names import map_weights, read_config, read_generation_defaults
from hexad.errors import CheckpointError, ModelNotFoundError, UnsupportedError

if TYPE_CHECKING:
    from hexad.checkpoint.tokenizer import Tokenizer

_PICKLES = (b"PK\x03\x04", b"\x80\x02")  # torch.save, new and old


def open_checkpoint(path: Path) -> Checkpoint:
    """The model at this path: a GGUF file, or any one part of a model in several; a folder as Hugging Face's
    libraries save it (config.json and safetensors), or one of the safetensors files in it; or a folder whose
    only model is a GGUF file.

    Raises ModelNotFoundError if there is nothing, CheckpointError if it is malformed, and UnsupportedError if
    it is no such model, or of an architecture, type or setting hexad does not know. Each names the path.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, False for names no file can have
        raise ModelNotFoundError(f"{path}: no such file. Give the path of a GGUF file or a model's folder.")
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():  # the reader itself refuses what is empty, unreadable or no regular file
        head = _head(path)
        if path.suffix == ".safetensors" or (head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**27):
            return _open_shard(path)
        if head.startswith(_PICKLES):
            raise UnsupportedError(
                f"{path}: a PyTorch pickle, which could run code; hexad never opens these. Choose "
                "safetensors or a GGUF file."
            )
    return _open_gguf(path)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open_folder(folder: Path) -> Checkpoint:
    try:
        if hf_folder.weight_files(folder):
            return hf_folder.open_folder(folder)
        ggufs = gguf_models(sorted(path.name for path in folder.iterdir()))
        if len(ggufs) > 1:
            listing = "".join(f"\n  {folder / name}" for name in ggufs)
            raise CheckpointError(f"{folder}: has several GGUF files; give the path of one:{listing}")
        if not ggufs:
            hf_folder.refuse_without_weights(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error
    return _open_gguf(folder / ggufs[0])


def _open_shard(path: Path) -> Checkpoint:
    """The model that a safetensors file is, or is a part of."""
    if not (path.parent / hf_folder.CONFIG).exists():
        raise CheckpointError(f"{path}: a safetensors file without {hf_folder.CONFIG} beside it")
    if path.name not in [file.name for file in hf_folder.weight_files(path.parent)]:
        raise CheckpointError(
            f"{path}: no part of the model in its folder, which is {hf_folder.SINGLE} or what "
            f"{hf_folder.INDEX} names"
        )
    return hf_folder.open_folder(path.parent)


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)
    path = file.path  # the first part, if there are several
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

    return Checkpoint(
        path, config, weights, load_tokenizer, file.close, defaults, check_tokenizer, file.release
    )
