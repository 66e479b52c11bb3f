"""Models as Hugging Face's libraries save them: a folder with config.json and safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.files import read_json
from hexad.checkpoint.hf_config import check_biases, read_config, read_generation_defaults
from hexad.checkpoint.safetensors import SafetensorsFile
from hexad.checks import shown
from hexad.errors import CheckpointError, UnsupportedError
from hexad.weights import Weight

if TYPE_CHECKING:
    from hexad.checkpoint.tokenizer import Tokenizer

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What old conversions store beside the weights, and follows from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def shards_of(index: Path) -> list[str]:
    """The names of the safetensors files an index speaks of. Raises CheckpointError."""
    return sorted(set(_weight_map(index).values()))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a folder's model is in, as transformers chooses: model.safetensors, or what the
    index names; empty if there is neither. Raises CheckpointError for a malformed index or an absent file."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        return []
    names = shards_of(index)
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: there is no {shown(name)} beside it; fetch the model again")
    return [folder / name for name in names]


def open_folder(folder: Path) -> Checkpoint:
    """The model in a folder that `weight_files` finds one in. Raises CheckpointError, UnsupportedError."""
    raw = read_json(folder / CONFIG)
    config = {"name": _name(folder), **read_config(raw, folder / CONFIG)}
    generation: Mapping[str, Any] = {}
    if (folder / "generation_config.json").exists():
        generation = read_json(folder / "generation_config.json")
    files: list[SafetensorsFile] = []

    def close() -> None:
        for file in files:
            file.close()

    def release() -> None:
        for file in files:
            file.release()

    try:
        files += [SafetensorsFile(path) for path in weight_files(folder)]
        weights = _read_weights(folder, files)
        check_biases(raw, weights, folder / CONFIG)
    except BaseException:
        close()
        raise
    if "lm_head.weight" in weights and config["tie_word_embeddings"]:
        # As transformers does: what is stored holds, unless it is the embedding once more.
        if _equal(weights["lm_head.weight"], weights.get("model.embed_tokens.weight")):
            del weights["lm_head.weight"]
        else:
            config["tie_word_embeddings"] = False

    def load_tokenizer() -> Tokenizer:
        from hexad.checkpoint.hf_tokenizer import tokenizer_from_folder  # late: it imports much

        return tokenizer_from_folder(folder, raw)

    def check_tokenizer() -> None:
        from hexad.checkpoint.hf_tokenizer import check_folder_tokenizer

        check_folder_tokenizer(folder)

    defaults = read_generation_defaults(generation)
    return Checkpoint(folder, config, weights, load_tokenizer, close, defaults, check_tokenizer, release)


def _weight_map(index: Path) -> Mapping[str, str]:
    """From tensors to the files in the index's own folder that they are in."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: it has no weight_map")
    for tensor, name in names.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise CheckpointError(
                f"{index}: tensor {tensor!r:.200} is in {shown(name)}; "
                "a safetensors file of this folder expected"
            )
    return names


def _read_weights(folder: Path, files: Sequence[SafetensorsFile]) -> dict[str, Weight]:
    """Every tensor of the files, but for those to ignore."""
    holders: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.infos:
            if name in holders:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r:.200} is also in {holders[name].path.name}"
                )
            holders[name] = file
    if files and files[0].path.name != SINGLE:
        for name, expected in _weight_map(folder / INDEX).items():
            if name not in holders or holders[name].path.name != expected:
                raise CheckpointError(
                    f"{folder / INDEX}: tensor {name!r:.200} is not in {expected}; "
                    "the files are of different models"
                )
    return {name: file.weight(name) for name, file in holders.items() if not _IGNORED.fullmatch(name)}


def _equal(head: Weight, table: Weight | None) -> bool:
    return (
        table is not None
        and (head.format, head.shape) == (table.format, table.shape)
        and np.array_equal(head.arrays["data"].view(np.uint8), table.arrays["data"].view(np.uint8))
    )


def _name(folder: Path) -> str:
    """What to call the model: in the Hub's cache, where folders are named by commits, as its repository."""
    folder = folder.absolute()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.resolve().name


def refuse_without_weights(folder: Path) -> None:
    """Raises what says best why there is no model to open in a folder without safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if re.search(r"\.(bin|bin\.index\.json|pt|pth|ckpt)$", name)]
    if pickles:
        raise UnsupportedError(
            f"{folder}: its weights are PyTorch pickles ({pickles[0]}), which could run code; hexad never "
            "opens these. Choose a revision with safetensors, or convert it where you trust it, with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another folder)."
        )
    if "adapter_config.json" in names:
        raise UnsupportedError(
            f"{folder}: an adapter (PEFT), not a whole model; merge it into its model first"
        )
    raise CheckpointError(f"{folder}: holds no model: neither {SINGLE} nor {INDEX} nor a GGUF file is in it")
