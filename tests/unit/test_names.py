"""GGUF's settings of RoPE and of sliding windows, and architectures other than llama, under our names."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.gguf_writer import (
    ARRAY,
    BOOL,
    TYPE_F16,
    TYPE_F32,
    U32,
    Tensor,
    Typed,
    llama,
    random_tensor,
    write,
)

from hexad.checkpoint import open_checkpoint
from hexad.errors import CheckpointError, UnsupportedError


@pytest.fixture
def save(tmp_path):
    """Writes a model's file; returns its path."""

    def save(metadata, tensors) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(write(metadata, tensors))
        return path

    return save


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 32}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear"}, None),
        ({"type": "linear", "factor": 0.0}, None),
        ({"type": "linear", "factor": 1.0, "attn_factor": 1.0}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 4.0, "finetuned": True}, {"rope_type": "linear", "factor": 4.0}),
        (YARN, {"attention_factor": 0.1 * math.log(4) + 1}),
        (YARN | {"original_context_length": 0}, {"original_max_position_embeddings": 128}),
        (YARN | {"attn_factor": 1.5}, {"attention_factor": 1.5 * (0.1 * math.log(4) + 1)}),
        (YARN | {"yarn_attn_factor": 1.25}, {"attention_factor": 1.25}),
        (YARN | {"yarn_attn_factor": 1.25, "attn_factor": 2.0}, {"attention_factor": 2.5}),
        (YARN | {"yarn_log_multiplier": 1.0}, {"attention_factor": 1.0}),
        (
            YARN | {"yarn_log_multiplier": 0.5},
            {"attention_factor": (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)},
        ),
        (YARN | {"factor": 0.5}, {"factor": 0.5, "attention_factor": 1.0}),
        (
            YARN | {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0},
            {"beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)
def test_rope_scaling(save, settings, expected):
    """YaRN's magnitude is what llama.cpp comes to: attn_factor multiplies all of it."""
    metadata, tensors = llama()
    metadata |= {f"llama.rope.scaling.{key}": value for key, value in settings.items()}
    found = open_checkpoint(save(metadata, tensors)).config["rope_scaling"]
    if settings.get("type") != "yarn":
        assert found == expected
        return
    expected = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.1 * math.log(4) + 1,
        "beta_fast": None,
        "beta_slow": None,
        **expected,
    }
    assert found.pop("attention_factor") == pytest.approx(expected.pop("attention_factor"), rel=1e-12)
    assert found == expected


def test_the_old_name_of_a_linear_factor(save):
    metadata, tensors = llama(llama__rope__scale_linear=2.0)
    config = open_checkpoint(save(metadata, tensors)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_rope_freqs_are_divisors(save):
    metadata, tensors = llama()
    values = np.linspace(1, 8, 8, dtype="<f4")
    freqs = Tensor("rope_freqs.weight", (8,), TYPE_F32, values.tobytes())
    checkpoint = open_checkpoint(save(metadata, [freqs, *tensors]))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "divisors", "divisors": tuple(values.tolist())}
    assert len(checkpoint.weights) == len(tensors)
    with pytest.raises(UnsupportedError, match="scales RoPE by 'yarn' and by tensor"):
        open_checkpoint(
            save(
                metadata | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
                [freqs, *tensors],
            )
        )
    for wrong in (replace(freqs, shape=(7,)), Tensor(freqs.name, (8,), TYPE_F16, bytes(16))):
        with pytest.raises(CheckpointError, match=r"rope_freqs.weight is .* F32 of shape \(8,\) expected"):
            open_checkpoint(save(metadata, [wrong, *tensors]))


@pytest.mark.parametrize(
    ("architecture", "window", "pattern", "expected"),
    [
        ("llama", 0, None, ("llama", None, None)),
        ("llama", 128, None, ("llama", None, None)),  # as long as the context
        ("llama", 32, None, ("mistral", 32, None)),
        ("llama", 32, [True, False], ("ministral", 32, ["sliding_attention", "full_attention"])),
        ("qwen2", 4096, None, ("qwen2", None, None)),
        ("qwen2", 32, [False, True], ("qwen2", 32, ["full_attention", "sliding_attention"])),
    ],
)
def test_sliding_windows(save, architecture, window, pattern, expected):
    metadata, tensors = llama(biases=True)
    metadata["llama.attention.sliding_window"] = window
    if pattern is not None:
        metadata["llama.attention.sliding_window_pattern"] = Typed(ARRAY, pattern, BOOL)
    config = open_checkpoint(save(renamed(metadata, architecture), tensors)).config
    assert (config["model_type"], config["sliding_window"], config["layer_types"]) == expected
    assert config.get("use_sliding_window", False) is (expected[0] == "qwen2" and expected[1] is not None)


def renamed(metadata, architecture):
    """The same for another `general.architecture`."""
    changed = {key.replace("llama.", f"{architecture}.", 1): value for key, value in metadata.items()}
    return changed | {"general.architecture": architecture}


@pytest.mark.parametrize(
    ("architecture", "key", "value", "reason"),
    [
        ("qwen2", "attention.sliding_window", 32, "qwen2.attention.sliding_window' to 32"),
        ("llama", "attention.sliding_window_pattern", 6, "sliding_window_pattern' to 6"),
        ("llama", "attention.sliding_window_pattern", Typed(ARRAY, [1, 0], U32), "sliding_window_pattern"),
        ("llama", "attention.sliding_window_pattern", Typed(ARRAY, [True], BOOL), "sliding_window_pattern"),
        ("qwen2", "rope.scaling.type", "longrope", "longrope"),
        ("qwen3", "rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor' to 0.5"),
        ("qwen3", "some.new.setting", 1, "some.new.setting"),
    ],
)
def test_unsupported_windows_and_scalings_are_named(save, architecture, key, value, reason):
    metadata, tensors = llama(biases=True, llama__attention__sliding_window=32)
    metadata["llama.rope.scaling.type"] = "yarn"
    if architecture != "llama":
        del metadata["llama.attention.sliding_window"]
    tensors += [
        random_tensor(np.random.default_rng(0), f"blk.{i}.attn_{n}_norm.weight", (16,))
        for i in (0, 1)
        for n in "qk"
    ]
    metadata = renamed(metadata, architecture) | {f"{architecture}.{key}": value}
    with pytest.raises(UnsupportedError, match=reason):
        open_checkpoint(save(metadata, tensors))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwens_rows_are_in_their_place(save, architecture):
    metadata, tensors = llama(layers=1, biases=True)
    norms = [
        random_tensor(np.random.default_rng(0), f"blk.0.attn_{name}_norm.weight", (16,)) for name in "qk"
    ]
    if architecture == "qwen3":
        with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q_norm\.weight is missing"):
            open_checkpoint(save(renamed(metadata, architecture), tensors))
        tensors += norms
    else:
        with pytest.raises(UnsupportedError, match=r"attn_q_norm.* not part of this model"):
            open_checkpoint(save(renamed(metadata, architecture), [*tensors, *norms]))
    checkpoint = open_checkpoint(save(renamed(metadata, architecture), tensors))
    assert checkpoint.config["model_type"] == architecture
    stored = {tensor.name: tensor.data for tensor in tensors}
    for name, place in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_q_norm", "q_norm")):
        for suffix in ("weight", "bias"):
            if f"blk.0.{name}.{suffix}" in stored:
                weight = checkpoint.weights[f"model.layers.0.self_attn.{place}.{suffix}"]
                assert (
                    b"".join(array.tobytes() for array in weight.arrays.values())
                    == stored[f"blk.0.{name}.{suffix}"]
                )
    assert len(checkpoint.weights) == len(tensors)
