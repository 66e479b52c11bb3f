"""config.json and generation_config.json: every way in which they were ever written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_models import dense

from hexad.checkpoint.hf_config import (
    FAMILIES,
    ROPE_KEYS,
    check_biases,
    read_config,
    read_generation_defaults,
)
from hexad.errors import CheckpointError, UnsupportedError
from hexad.params import SamplingParams

PATH = Path("some/config.json")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def read(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return read_config({"model_type": model_type, **SIZES, **changes}, PATH)


def test_what_is_left_out_has_transformers_defaults() -> None:
    assert read() == {
        "model_type": "llama",
        **SIZES,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "rotary_dim": 16,
        "rope_scaling": None,
        "sliding_window": None,
        "layer_types": None,
        "use_sliding_window": False,
    }
    assert read("qwen3")["head_dim"] == 128
    assert read("mistral", num_attention_heads=32)["num_key_value_heads"] == 8
    assert read("qwen2", num_key_value_heads=None)["num_key_value_heads"] == 4


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CONFIG_MAPPING[model_type](**SIZES)
    ours = read(model_type)
    for key in ("max_position_embeddings", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        assert ours[key] == getattr(theirs, key), key
    assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or 16)
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert ours["sliding_window"] == getattr(theirs, "sliding_window", None)


# What transformers makes of a config.json, and what hexad does, for these changes to one.
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 5e5}),
    ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5}),
    (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
            },
        },
    ),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 1000}),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 20, "truncate": False}}),
    ("qwen2", {"sliding_window": 100}),
    ("qwen2", {"sliding_window": 100, "use_sliding_window": True}),
    ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 3}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
    (
        "qwen3",
        {
            "use_sliding_window": True, "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    ("mistral", {"sliding_window": 100}),
    ("mistral", {"sliding_window": None, "head_dim": 24}),
    ("ministral", {"sliding_window": 100}),
    ("ministral", {"sliding_window": 100, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    ("llama", {"head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": True}),
]  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize(("model_type", "changes"), CHANGES)
def test_reads_as_transformers_does(model_type: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CONFIG_MAPPING[model_type].from_dict({**SIZES, **changes})
    ours = read(model_type, **changes)
    rope = dict(theirs.rope_parameters)
    assert ours["rope_theta"] == rope.pop("rope_theta")
    rope.pop("type", None)
    assert (ours["rope_scaling"] or {"rope_type": "default"}) == rope
    for key in ("num_key_value_heads", "tie_word_embeddings"):
        assert ours[key] == getattr(theirs, key)
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * 4
    assert (ours["layer_types"] or ["full_attention"] * 4) == types
    assert ours["sliding_window"] == (window if "sliding_attention" in types else None)
    assert ours["use_sliding_window"] is ("sliding_attention" in types)


@pytest.mark.parametrize(("model_type", "changes"), CHANGES)
def test_what_transformers_writes_again_is_read_alike(model_type: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CONFIG_MAPPING[model_type].from_dict({**SIZES, **changes}).to_dict()
    assert read_config(theirs, PATH) == read(model_type, **changes)


def test_part_of_the_features_rotated() -> None:
    assert read(partial_rotary_factor=0.5)["rotary_dim"] == 8
    assert read(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25})["rotary_dim"] == 4


def test_a_stretched_context_is_as_long_as_it_was_stretched_to() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert read(rope_scaling=yarn, max_position_embeddings=1024)["max_position_embeddings"] == 4096
    assert read(rope_scaling=yarn, max_position_embeddings=4096)["max_position_embeddings"] == 4096
    linear = {"type": "linear", "factor": 2.5}
    assert read(rope_scaling=linear, max_position_embeddings=1024)["max_position_embeddings"] == 2560
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert read(rope_scaling=llama3, max_position_embeddings=1024)["max_position_embeddings"] == 1024


HARMLESS = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "dtype": "float16",
    "transformers_version": "4.40.0",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "_name_or_path": "x",
    "_attn_implementation_autoset": True,
    "auto_map": {"AutoModel": "m.M"},
    "id2label": {"0": "a"},
    "task_specific_params": {},
    "eos_token_id": [1, 2],
    "use_cache": False,
    "hidden_act": "silu",
    "pretraining_tp": 2,
    "mlp_bias": False,
    "attention_bias": True,
    "sliding_window": 512,
    "temperature": 0.5,
    "rope_interleaved": False,
    "is_llama_config": True,
    "logits_scaling": None,
    "quantization_config": None,
}


def test_what_does_not_change_the_numbers_is_ignored() -> None:
    assert read(**HARMLESS) == read()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; hexad knows llama, mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
        ({"architectures": ["LlamaForCausalLM", "LlamaModel"]}, "'LlamaModel'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by 'gptq'"),
        ({"quantization_config": {"bits": 4}}, "quantised by None"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantised by 'compressed-tensors'"),
        ({"hidden_act": "gelu"}, "sets 'hidden_act' to 'gelu'"),
        ({"logits_scaling": 8.0}, "sets 'logits_scaling' to 8.0"),
        ({"residual_multiplier": 0.2}, "sets 'residual_multiplier'"),
        ({"rope_interleaved": True}, "sets 'rope_interleaved' to True"),
        ({"no_rope_layers": [1, 1]}, "sets 'no_rope_layers'"),
        ({"is_encoder_decoder": True}, "sets 'is_encoder_decoder'"),
        ({"original_max_position_embeddings": 512}, "sets 'original_max_position_embeddings'"),
        ({"use_rope": False}, "sets 'use_rope' to False"),
        ({"model_type": "qwen2", "use_mrope": True}, "sets 'use_mrope'"),
        ({"model_type": "mistral", "attention_bias": True}, "sets 'attention_bias'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "sets 'mrope_section'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differs between layers"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "without the sliding_window",
        ),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "'chunked_attention'"),
    ],
)
def test_what_hexad_does_not_compute_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        read(**{"model_type": "llama", **changes})
    assert str(caught.value).startswith("some/config.json: ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"architectures": "LlamaForCausalLM"}, "a list of names expected"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"num_hidden_layers": 4097}, "up to 4096|to 4096"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"head_dim": []}, r"head_dim is \[\]"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; true or false"),
        ({"attention_bias": "no"}, "attention_bias is 'no'"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
        ({"rope_scaling": {"type": 7}}, "rope_type is 7"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling's factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling's factor is '2'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "rope_scaling's truncate is 1"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters's rope_theta is -1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor is missing"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"partial_rotary_factor": 0.2}, "RoPE turns 3 features"),
        ({"partial_rotary_factor": 0.01}, "RoPE turns 0 features"),
        ({"head_dim": 15}, "RoPE turns 15 features"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window is 1"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers is -1",
        ),
        ({"layer_types": ["full_attention"]}, "a list of 4 names expected"),
        ({"layer_types": ["sliding_attention"] * 4}, "there is no sliding_window"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(**{"model_type": "llama", **changes})
    assert type(caught.value) is CheckpointError
    assert str(caught.value).startswith("some/config.json: ")


NUMBERS = st.integers(-1, 2**70) | st.sampled_from([0, 1, 2, 64, 0.5, 1e300, float("nan"), float("inf")])
VALUES = NUMBERS | st.sampled_from([None, True, False, "", "linear", "yarn", [], [1], {}, {"factor": {}}])
ROPE = st.dictionaries(
    st.sampled_from(["type", "rope_type", "factor", "truncate", "beta_fast", *ROPE_KEYS["llama3"]]), VALUES
)
KEYS = [
    *SIZES, *HARMLESS, "rope_scaling", "rope_parameters", "layer_types", "sliding_window",
    "max_window_layers", "use_sliding_window", "head_dim", "rope_theta", "partial_rotary_factor",
    "num_key_value_heads",
]  # fmt: skip


@given(st.sampled_from(list(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), VALUES | ROPE, max_size=4))
def test_any_values_raise_nothing_but_our_errors(model_type: str, changes: dict[str, Any]) -> None:
    message = "some/config.json: "
    try:
        read(model_type, **changes)
    except CheckpointError as error:
        message = str(error)
    assert message.startswith("some/config.json: ")


def biases(*names: str) -> dict[str, Any]:
    return {f"model.layers.{i}.{name}.bias": dense(np.zeros(4)) for name in names for i in range(4)}


ATTENTION = [f"self_attn.{p}_proj" for p in "qkvo"]
MLP = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("model_type", "changes", "names"),
    [
        ("llama", {}, []),
        ("llama", {"attention_bias": True}, ATTENTION),
        ("llama", {"mlp_bias": True}, MLP),
        ("llama", {"attention_bias": True, "mlp_bias": True}, ATTENTION + MLP),
        ("mistral", {}, []),
        ("qwen2", {}, ATTENTION[:3]),
        ("qwen3", {"attention_bias": False}, []),
        ("qwen3", {"attention_bias": True}, ATTENTION),
    ],
)
def test_biases_are_those_the_config_says(model_type: str, changes: dict[str, Any], names: list[str]) -> None:
    raw = {"model_type": model_type, **SIZES, **changes}
    read_config(raw, PATH)
    check_biases(raw, biases(*names), PATH)
    for name in ATTENTION + MLP:
        weights = biases(*names)
        changed = f"model.layers.2.{name}.bias"
        if name in names:
            del weights[changed]
        else:
            weights[changed] = dense(np.zeros(4))
        with pytest.raises(CheckpointError, match=changed):
            check_biases(raw, weights, PATH)


def test_generation_defaults() -> None:
    raw = {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "max_new_tokens": 2048, "do_sample": True, "eos_token_id": [1, 2], "bos_token_id": 0, "num_beams": 1,
    }  # fmt: skip
    defaults = read_generation_defaults(raw)
    assert defaults == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "max_tokens": 2048,
    }  # fmt: skip
    SamplingParams(**defaults)
    assert read_generation_defaults({}) == {}
    assert read_generation_defaults({"temperature": 0.6, "do_sample": False}) == {"temperature": 0.0}
    wrong = {"temperature": -1, "top_k": 2.5, "top_p": "0.9", "min_p": None, "max_new_tokens": 0}
    assert read_generation_defaults({**wrong, "repetition_penalty": 1.2}) == {"repetition_penalty": 1.2}
