"""Hugging Face folders: which files are the model, and that they are of one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import gguf_writer
from tests.hf_writer import llama, save, save_index
from tests.safetensors_writer import write

from hexad.checkpoint import open_checkpoint
from hexad.errors import CheckpointError, UnsupportedError
from hexad.models import build_graph


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_opens(tmp_path: Path, shards: int, tied: bool) -> None:
    config, tensors = llama(tied=tied)
    save(tmp_path / "my-model", config, tensors, shards=shards)
    (tmp_path / "my-model" / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": [1]}')
    with open_checkpoint(tmp_path / "my-model") as checkpoint:
        assert checkpoint.path == tmp_path / "my-model"
        assert checkpoint.config["name"] == "my-model"
        assert checkpoint.config["tie_word_embeddings"] is tied
        assert checkpoint.generation_defaults == {"temperature": 0.5}
        assert checkpoint.weights.keys() == tensors.keys()
        for name, array in tensors.items():
            (stored,) = checkpoint.weights[name].arrays.values()
            assert not stored.flags.owndata
            np.testing.assert_array_equal(stored, array)
        build_graph(checkpoint.config, checkpoint.weights)
    assert not checkpoint.weights


@pytest.mark.parametrize("shards", [1, 3])
def test_a_file_of_the_model_opens_its_folder(tmp_path: Path, shards: int) -> None:
    config, tensors = llama()
    save(tmp_path, config, tensors, shards=shards)
    for path in tmp_path.glob("*.safetensors"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.path == tmp_path
            assert checkpoint.weights.keys() == tensors.keys()


def test_a_file_beside_the_model_does_not_open_it(tmp_path: Path) -> None:
    config, tensors = llama()
    save(tmp_path, config, tensors)
    (tmp_path / "consolidated.safetensors").write_bytes(write(tensors))
    with pytest.raises(
        CheckpointError, match=r"consolidated.safetensors: no part of the model in its folder"
    ):
        open_checkpoint(tmp_path / "consolidated.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"safetensors file without config.json"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read: No such file"):
        open_checkpoint(tmp_path)


def test_the_single_file_comes_before_the_index(tmp_path: Path) -> None:
    """As in transformers."""
    config, tensors = llama()
    save(tmp_path, config, tensors)
    save_index(tmp_path, {"x": "absent.safetensors"})
    assert open_checkpoint(tmp_path).weights.keys() == tensors.keys()


def test_a_model_out_of_the_hubs_cache_has_its_repositorys_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--My-Model-1B" / "snapshots" / ("0" * 40)
    save(folder, *llama())
    assert open_checkpoint(folder).config["name"] == "My-Model-1B"


@pytest.mark.parametrize("shards", [1, 2])
def test_what_follows_from_the_config_is_ignored(tmp_path: Path, shards: int) -> None:
    config, tensors = llama()
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(8, "<f8")}
    save(tmp_path, config, tensors | extra, shards=shards)
    assert open_checkpoint(tmp_path).weights.keys() == tensors.keys()


@pytest.mark.parametrize("same", [True, False])
def test_a_head_stored_beside_a_tied_table(tmp_path: Path, same: bool) -> None:
    config, tensors = llama()
    table = tensors["model.embed_tokens.weight"]
    save(tmp_path, config, {**tensors, "lm_head.weight": table if same else 2 * table})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config["tie_word_embeddings"] is same
        assert ("lm_head.weight" in checkpoint.weights) is not same
        build_graph(checkpoint.config, checkpoint.weights)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "not part of this model"),
        ("model.layers.2.mlp.up_proj.weight", "not part of this model"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "not part of this model"),
        ("vision.weight", "not part of this model"),
    ],
)
def test_tensors_that_would_be_left_out_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    config, tensors = llama()
    save(tmp_path, config, {**tensors, name: np.ones((64, 64), "<f4")})
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(UnsupportedError, match=reason) as caught:
        build_graph(checkpoint.config, checkpoint.weights, checkpoint.path)
    assert str(caught.value).startswith(f"{tmp_path}: tensor '{name}'")


def test_each_missing_tensor_is_named(tmp_path: Path) -> None:
    config, tensors = llama(tied=False)
    for missing in tensors:
        save(tmp_path, config, {name: array for name, array in tensors.items() if name != missing})
        with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
            build_graph(checkpoint.config, checkpoint.weights, checkpoint.path)
        assert missing in str(caught.value)


def test_a_bias_the_config_does_not_speak_of_is_refused(tmp_path: Path) -> None:
    config, tensors = llama()
    save(tmp_path, config, {**tensors, "model.layers.1.mlp.up_proj.bias": np.ones(96, "<f4")})
    with pytest.raises(
        CheckpointError, match=r"config.json: says that there is no bias model.layers.1.mlp.up_"
    ):
        open_checkpoint(tmp_path)


def test_a_dtype_hexad_does_not_read_is_refused(tmp_path: Path) -> None:
    config, tensors = llama()
    name = "model.layers.0.mlp.up_proj.weight"
    save(tmp_path, config, {**tensors, name: tensors[name].astype("<f8")})
    with pytest.raises(UnsupportedError, match=f"tensor '{name}' is F64; hexad reads F32, F16, BF16"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model-00001-of-00002.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "x\0.safetensors", "config.json", "", ".safetensors/..", 7, None, ["a.safetensors"]],
)  # fmt: skip
def test_an_index_leads_nowhere_else(tmp_path: Path, name: Any) -> None:
    config, tensors = llama()
    weight_map = save(tmp_path / "m", config, tensors, shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(write(tensors))
    save_index(tmp_path / "m", {**weight_map, "model.norm.weight": name})
    with pytest.raises(CheckpointError, match="a safetensors file of this folder expected") as caught:
        open_checkpoint(tmp_path / "m")
    assert "'model.norm.weight'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": []}', "it has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' twice"),
        ('{"weight_map": ', "not JSON"),
        ("", "empty"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "there is no 'absent.safetensors' beside it"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    save(tmp_path, *llama(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(tmp_path)
    assert str(index) in str(caught.value)


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    config, tensors = llama()
    weight_map = save(tmp_path, config, tensors, shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    save_index(tmp_path, {**weight_map, "model.norm.weight": first.name, "elsewhere.weight": second.name})
    with pytest.raises(CheckpointError, match=r"tensor '(model.norm|elsewhere).weight' is not in model-0000"):
        open_checkpoint(tmp_path)
    save_index(tmp_path, weight_map)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"is also in model-00001-of-00002.safetensors"):
        open_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"there is no 'model-00002-of-00002.safetensors' beside it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"a":1,"a":2}', "\0", '{"a":' + "[" * 99_999, '"\\ud800"'])
def test_malformed_json_is_refused(tmp_path: Path, name: str, text: str) -> None:
    save(tmp_path, *llama())
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))) as caught:
        open_checkpoint(tmp_path)
    assert type(caught.value) is CheckpointError


def test_a_config_of_another_model_is_refused_with_its_path(tmp_path: Path) -> None:
    config, tensors = llama(model_type="gpt2")
    save(tmp_path, config, tensors)
    with pytest.raises(UnsupportedError, match=re.escape(f"{tmp_path / 'config.json'}: model_type 'gpt2'")):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "error", "reason"),
    [
        ([], CheckpointError, "holds no model: neither model.safetensors"),
        (["pytorch_model.bin"], UnsupportedError, r"pickles \(pytorch_model.bin\).*save_pretrained"),
        (["pytorch_model.bin.index.json"], UnsupportedError, "pickles"),
        (["consolidated.00.pth"], UnsupportedError, "pickles"),
        (["model.pt"], UnsupportedError, "pickles"),
        (["adapter_config.json", "adapter_model.safetensors"], UnsupportedError, "adapter"),
        (["mmproj-F16.gguf"], CheckpointError, "holds no model"),
        (["a.gguf", "b.gguf", "mmproj.gguf"], CheckpointError, r"several GGUF files.*a\.gguf\n.*b\.gguf$"),
    ],
)
def test_folders_without_a_model_say_why(
    tmp_path: Path, names: list[str], error: type[Exception], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama()[0]))
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(error, match=f"(?s){reason}") as caught:
        open_checkpoint(tmp_path)
    assert type(caught.value) is error
    assert str(tmp_path) in str(caught.value)


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    save(tmp_path, *llama())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert open_checkpoint(tmp_path).weights


def test_the_only_gguf_of_a_folder_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_writer.write(*gguf_writer.llama()))
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.path == path
