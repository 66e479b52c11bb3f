"""Writes tiny llamas as Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.safetensors_writer import write
from tests.tiny_models import tiny_llama

Tensors = dict[str, NDArray[Any]]


def llama(*, tied: bool = True, **changes: Any) -> tuple[dict[str, Any], Tensors]:
    """What config.json says, and the tensors, of a random llama. changes: of the config, None leaves out."""
    model = tiny_llama(tied=tied, layers=2, vocab=40)
    config = {
        name: value
        for name, value in model.config.items()
        if name not in ("name", "rotary_dim", "rope_theta")
    }
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", **changes}
    tensors: Tensors = {name: np.asarray(w.arrays["data"]) for name, w in model.weights.items()}
    return {name: value for name, value in config.items() if value is not None}, tensors


def save(folder: Path, config: Mapping[str, Any], tensors: Tensors, *, shards: int = 1) -> dict[str, str]:
    """Saves a model; returns the index's weight_map, empty for one in a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(write(tensors))
        return {}
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::shards]}
        (folder / name).write_bytes(write(part))
        weight_map |= dict.fromkeys(part, name)
    save_index(folder, weight_map)
    return weight_map


def save_index(folder: Path, weight_map: Any) -> None:
    """Writes the index of a model in shards."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
