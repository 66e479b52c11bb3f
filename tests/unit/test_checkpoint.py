"""Opening checkpoints: config and tensor names, RoPE's row order, and what is refused rather than misread."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.gguf_writer import (
    ARRAY,
    F64,
    I32,
    TYPE_F16,
    TYPE_F32,
    TYPE_Q4_0,
    TYPE_Q4_1,
    TYPE_Q8_0,
    U32,
    Tensor,
    Typed,
    llama,
    random_tensor,
    write,
)

from hexad.checkpoint import Checkpoint, open_checkpoint
from hexad.checkpoint.names import half_split_rows
from hexad.errors import CheckpointError, HexadError, ModelNotFoundError, UnsupportedError
from hexad.params import SamplingParams

KEYS_OF_SAMPLING = {  # GGUF key: (stored, SamplingParams field, read)
    "temp": (0.6, "temperature", 0.6),
    "top_k": (Typed(I32, 20), "top_k", 20),
    "top_p": (0.95, "top_p", 0.95),
    "min_p": (0, "min_p", 0),
    "xtc_probability": (0.1, "xtc_probability", 0.1),
    "xtc_threshold": (0.2, "xtc_threshold", 0.2),
    "penalty_repeat": (1.05, "repetition_penalty", 1.05),
    "penalty_last_n": (Typed(I32, -1), "repeat_last_n", -1),
    "mirostat": (2, "mirostat", 2),
    "mirostat_tau": (4.5, "mirostat_tau", 4.5),
    "mirostat_eta": (0.2, "mirostat_eta", 0.2),
    "sequence": ("top-k;typ_p;nucleus;temp", "samplers", ("top_k", "typical_p", "top_p", "temperature")),
}


@pytest.fixture
def save(tmp_path):
    """Writes a model's file; returns its path."""

    def save(metadata, tensors) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(write(metadata, tensors))
        return path

    return save


def test_config_has_hugging_faces_keys(save):
    with open_checkpoint(save(*llama(layers=3, vocab=40))) as checkpoint:
        assert checkpoint.config == {
            "model_type": "llama",
            "name": "tiny",
            "num_hidden_layers": 3,
            "max_position_embeddings": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": float(np.float32(1e-5)),
            "rope_theta": 10000.0,
            "rotary_dim": 16,
            "vocab_size": 40,
            "tie_word_embeddings": True,
            "rope_scaling": None,
            "sliding_window": None,
            "layer_types": None,
        }


def test_absent_keys_take_ggufs_defaults(save):
    absent = ("attention__head_count_kv", "attention__key_length", "attention__value_length")
    absent += ("rope__freq_base", "rope__dimension_count", "vocab_size")
    metadata, tensors = llama(kv_heads=4, general__name=None, **{f"llama__{key}": None for key in absent})
    config = open_checkpoint(save(metadata, tensors)).config
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["head_dim"] == config["rotary_dim"] == 16
    assert config["rope_theta"] == 10000.0
    assert config["vocab_size"] == 40
    assert config["name"] == "model"


def test_per_layer_values_that_agree_are_one(save):
    same = Typed(ARRAY, [4, 4], U32)
    config = open_checkpoint(save(*llama(llama__attention__head_count=same))).config
    assert config["num_attention_heads"] == 4


def test_generation_defaults(save):
    """Recommended sampling parameters, by hexad's names; 32-bit floats become the decimal numbers meant."""
    metadata, tensors = llama()
    assert open_checkpoint(save(metadata, tensors)).generation_defaults == {}
    metadata |= {f"general.sampling.{key}": stored for key, (stored, _, _) in KEYS_OF_SAMPLING.items()}
    defaults = open_checkpoint(save(metadata, tensors)).generation_defaults
    assert defaults == {name: read for _, name, read in KEYS_OF_SAMPLING.values()}
    SamplingParams(**defaults)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temp", -1.0),
        ("temp", "0.6"),
        ("temp", float("nan")),
        ("top_k", 20.5),
        ("top_k", True),
        ("top_k", Typed(ARRAY, [40], U32)),
        ("top_p", 1.5),
        ("mirostat", 3),
        ("sequence", "top_k;no_such_sampler"),
        ("sequence", ";"),
        ("sequence", 7),
        ("penalty_freq", 0.5),
    ],
)
def test_wrong_generation_defaults_are_left_out(save, key, value):
    """They only advise: no model is refused for them."""
    metadata, tensors = llama()
    metadata |= {f"general.sampling.{key}": value, "general.sampling.min_p": 0.05}
    assert open_checkpoint(save(metadata, tensors)).generation_defaults == {"min_p": 0.05}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_tensors_have_hugging_faces_names(save, tied, biases):
    checkpoint = open_checkpoint(save(*llama(layers=2, tied=tied, biases=biases)))
    linears = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not tied:
        names.add("lm_head.weight")
    for layer in ("model.layers.0.", "model.layers.1."):
        names |= {layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight"}
        names |= {layer + linear + ".weight" for linear in linears}
        names |= {layer + linear + ".bias" for linear in linears} if biases else set()
    assert set(checkpoint.weights) == names
    assert checkpoint.config["tie_word_embeddings"] is tied


def converted(weight, heads):
    """What converters do to llama's q and k: each head's halves, row by row, become pairs."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("type_id", [TYPE_F32, TYPE_F16, TYPE_Q4_0, TYPE_Q4_1, TYPE_Q8_0])
def test_converters_row_permutation_is_undone(save, type_id):
    """Rows of whole blocks move as they are, so permuting the stored rows is permuting the weight's."""
    metadata, tensors = llama(layers=1, heads=4, kv_heads=2, biases=True, type_id=type_id)
    original = {}
    for i, tensor in enumerate(tensors):
        if tensor.name.startswith(("blk.0.attn_q.", "blk.0.attn_k.")):
            rows = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1)
            original[tensor.name] = tensor.data
            heads = 4 if "attn_q" in tensor.name else 2
            tensors[i] = replace(tensor, data=converted(rows, heads).tobytes())
            assert tensors[i].data != tensor.data
    checkpoint = open_checkpoint(save(metadata, tensors))
    assert len(original) == 4
    for stored, data in original.items():
        projection, suffix = stored.removeprefix("blk.0.attn_").split(".")
        weight = checkpoint.weights[f"model.layers.0.self_attn.{projection}_proj.{suffix}"]
        assert len(weight.arrays) == 1
        assert b"".join(array.tobytes() for array in weight.arrays.values()) == data
        assert weight.nbytes == len(data)


def test_other_tensors_are_views_and_unchanged(save):
    metadata, tensors = llama(layers=1)
    checkpoint = open_checkpoint(save(metadata, tensors))
    for stored, name in (
        ("blk.0.attn_v.weight", "self_attn.v_proj"),
        ("blk.0.attn_output.weight", "self_attn.o_proj"),
    ):
        (array,) = checkpoint.weights[f"model.layers.0.{name}.weight"].arrays.values()
        assert not array.flags.owndata
        assert array.tobytes() == next(tensor.data for tensor in tensors if tensor.name == stored)


def test_half_split_rows_turns_the_same_pairs_by_the_same_angles():
    """RoPE on adjacent pairs of the stored rows, then reordered = reordered, then RoPE on halves."""
    rng = np.random.default_rng(0)
    heads, head_dim, rotary_dim = 3, 8, 6
    x = rng.standard_normal((heads, head_dim))
    angles = rng.uniform(0, 3, rotary_dim // 2)
    cos, sin = np.cos(angles), np.sin(angles)

    def turn(x, first, second):
        turned = x.copy()
        turned[:, first] = x[:, first] * cos - x[:, second] * sin
        turned[:, second] = x[:, second] * cos + x[:, first] * sin
        return turned

    order = half_split_rows(heads, head_dim, rotary_dim)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(heads * head_dim))
    pairs = turn(x, np.arange(0, rotary_dim, 2), np.arange(1, rotary_dim, 2))
    halves = turn(
        x.ravel()[order].reshape(x.shape), np.arange(rotary_dim // 2), np.arange(rotary_dim // 2, rotary_dim)
    )
    np.testing.assert_array_equal(pairs.ravel()[order].reshape(x.shape), halves)


# Refused: what is missing or absurd (CheckpointError), what hexad cannot compute (UnsupportedError).

REQUIRED = (
    "general.architecture",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(save, key):
    metadata, tensors = llama()
    del metadata[key]
    path = save(metadata, tensors)
    with pytest.raises(CheckpointError, match=f"key {key} is missing") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


MALFORMED = {
    "general.architecture": (7, "a string expected"),
    "llama.block_count": (0, "positive int up to 4096"),
    "llama.context_length": (0, "positive int"),
    "llama.embedding_length": (64.0, "int expected"),
    "llama.feed_forward_length": (True, "int expected"),
    "llama.attention.head_count": (Typed(I32, -4), "positive int"),
    "llama.attention.head_count_kv": (3, "4 query heads do not share 3 KV heads"),
    "llama.attention.key_length": (15, "heads have 15 features"),
    "llama.rope.dimension_count": (18, "RoPE turns 18 of 16"),
    "llama.attention.layer_norm_rms_epsilon": (float("nan"), "positive float"),
    "llama.rope.freq_base": (float("inf"), "positive float"),
    "llama.vocab_size": (41, "token_embd.weight has 40 rows"),
}


@pytest.mark.parametrize("key", MALFORMED)
def test_malformed_value_is_named(save, key):
    value, reason = MALFORMED[key]
    metadata, tensors = llama()
    path = save(metadata | {key: value}, tensors)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path)
    assert type(caught.value) is CheckpointError
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.block_count", 4097, "up to 4096"),
        ("llama.block_count", Typed(ARRAY, [2], U32), "int expected"),
        ("llama.attention.head_count", Typed(ARRAY, [4, 4, 4], U32), "3 values for 2 layers"),
        ("llama.rope.dimension_count", 7, "RoPE turns 7"),
        ("llama.rope.freq_base", 0.0, "positive float"),
        ("llama.rope.freq_base", -1.0, "positive float"),
        ("llama.rope.freq_base", Typed(F64, 1e300), "up to 1e"),
        ("llama.attention.head_count", 128, "heads have|rows; 128 heads"),
    ],
)
def test_absurd_value_is_refused(save, key, value, reason):
    metadata, tensors = llama()
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(save(metadata | {key: value}, tensors))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("general.architecture", "mamba", "architecture 'mamba' .*; hexad knows llama, qwen2, qwen3"),
        ("general.type", "adapter", "holds 'adapter', not a model"),
        ("llama.rope.scaling.type", "longrope", "rope.scaling.type' to 'longrope'"),
        ("llama.rope.scaling.type", 7, "rope.scaling.type' to 7"),
        ("llama.rope.scaling.attn_factor", 1.5, "attn_factor"),  # which only YaRN has a use for
        ("llama.rope.dimension_sections", 2, "dimension_sections"),
        ("llama.expert_count", 8, "expert_count"),
        ("llama.expert_used_count", 2, "expert_used_count"),
        ("llama.final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("llama.some.new.setting", 1, "some.new.setting"),
        ("llama.attention.head_count_kv", Typed(ARRAY, [2, 4], U32), "differs between layers"),
        ("llama.feed_forward_length", Typed(ARRAY, [96, 64], U32), "differs between layers"),
        ("llama.attention.value_length", 32, "keys of 16 and values of 32"),
    ],
)
def test_unsupported_setting_is_named(save, key, value, reason):
    metadata, tensors = llama()
    path = save(metadata | {key: value}, tensors)
    with pytest.raises(UnsupportedError, match=reason) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_settings_that_mean_unused_are_accepted(save):
    unused = {
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.attention.sliding_window": 0,
        "llama.tensor_data_layout": "Meta AI original pth",
        "another.expert_count": 8,
    }
    metadata, tensors = llama()
    assert len(open_checkpoint(save(metadata | unused, tensors)).weights) == len(tensors)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rope_factors_long.weight", "not part of this model"),
        ("blk.0.ffn_gate_exps.weight", "experts"),
        ("blk.1.ffn_gate_inp.weight", "router"),
        ("blk.0.attn_q_norm.weight", "not part of this model"),
        ("blk.0.attn_norm.bias", "not part of this model"),
        ("output.bias", "not part of this model"),
        ("blk.2.attn_v.weight", "not part of this model"),
        ("blk.00.attn_v.weight", "not part of this model"),
    ],
)
def test_tensor_that_would_be_left_out_is_refused(save, name, reason):
    metadata, tensors = llama(layers=2)
    tensors.append(random_tensor(np.random.default_rng(0), name, (64,)))
    with pytest.raises(UnsupportedError, match=f"tensor '{name}' is not supported: .*{reason}"):
        open_checkpoint(save(metadata, tensors))


def test_harmless_tensor_is_ignored(save):
    metadata, tensors = llama()
    extra = random_tensor(np.random.default_rng(0), "blk.1.attn_rot_embd.weight", (8,))
    assert len(open_checkpoint(save(metadata, [*tensors, extra])).weights) == len(tensors)


def test_each_missing_tensor_is_named(save):
    metadata, tensors = llama(layers=1)
    for missing in tensors:
        path = save(metadata, [tensor for tensor in tensors if tensor is not missing])
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: tensor {missing.name} is missing")):
            open_checkpoint(path)


def test_projection_of_other_heads_is_refused(save):
    metadata, tensors = llama(layers=1)
    rng = np.random.default_rng(0)
    swapped = [
        random_tensor(rng, t.name, (48, 64), TYPE_F32) if t.name == "blk.0.attn_k.weight" else t
        for t in tensors
    ]
    with pytest.raises(CheckpointError, match=r"blk.0.attn_k.weight has 48 rows; 2 heads of 16"):
        open_checkpoint(save(metadata, swapped))
    bias = Tensor("blk.0.attn_q.bias", (64,), TYPE_Q8_0, bytes(68))
    with pytest.raises(UnsupportedError, match=r"attn_q\.bias is a vector in Q8_0"):
        open_checkpoint(save(metadata, [*tensors, bias]))


def test_paths_that_are_no_gguf_file(tmp_path):
    def file(name, raw):
        path = tmp_path / name
        path.write_bytes(raw)
        return path

    header = b'{"w":{}}'
    for path, error, reason in (
        (tmp_path / "absent.gguf", ModelNotFoundError, "no such file"),
        (tmp_path / ("n" * 5000), ModelNotFoundError, "no such file"),
        (tmp_path / "nul\0", ModelNotFoundError, "no such file"),
        (file("a.safetensors", b""), CheckpointError, "safetensors file without config.json"),
        (
            file("a.bin", len(header).to_bytes(8, "little") + header),
            CheckpointError,
            "safetensors file without",
        ),
        (file("b.bin", b"PK\x03\x04" + bytes(60)), UnsupportedError, "pickle"),
        (file("empty.gguf", b""), CheckpointError, "empty"),
        (file("text.gguf", b"<html>404</html>"), CheckpointError, "not a GGUF file: it begins with b'<htm'"),
    ):
        with pytest.raises(error, match=reason) as caught:
            open_checkpoint(path)
        assert type(caught.value) is error
        assert str(path) in str(caught.value)


def test_close_lets_go_of_weights_and_keeps_the_tokenizer(tmp_path):
    made, closed = [], []
    checkpoint = Checkpoint(
        tmp_path, {}, {"w": None}, lambda: made.append(1) or object(), lambda: closed.append(1)
    )
    with checkpoint:
        tokenizer = checkpoint.tokenizer()
        assert checkpoint.tokenizer() is tokenizer
    assert (made, closed) == ([1], [1])
    assert not checkpoint.weights
    assert checkpoint.tokenizer() is tokenizer
    late = Checkpoint(tmp_path, {}, {}, object, lambda: None)
    late.close()
    with pytest.raises(CheckpointError, match="before closing"):
        late.tokenizer()


LLAMA = write(*llama(layers=1, hidden=32, intermediate=32, heads=2, kv_heads=1, vocab=4))
HEAD = LLAMA.index(b"ffn_down.weight") + 64  # past it lie only weights, where any byte is as good


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(24, HEAD), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_mutated_models_raise_nothing_but_our_errors(tmp_path, edits):
    raw = bytearray(LLAMA)
    for position, byte in edits:
        raw[position] = byte
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    message = str(path)
    try:
        with open_checkpoint(path) as checkpoint:
            for weight in checkpoint.weights.values():
                weight.dequantise()
    except HexadError as error:
        message = str(error)
    assert str(path) in message


# The real model.


def test_smollm2_opens(smollm2_path):
    with open_checkpoint(smollm2_path) as checkpoint:
        config = checkpoint.config
        assert config["name"] == "Smollm2 135M 8k Lc100K Mix1 Ep2"
        assert config["model_type"] == "llama"
        assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (
            30,
            576,
            1536,
        )
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (
            9,
            3,
            64,
        )
        assert (config["vocab_size"], config["max_position_embeddings"]) == (49152, 8192)
        assert (config["rope_theta"], config["rotary_dim"]) == (100000.0, 64)
        assert config["rms_norm_eps"] == pytest.approx(1e-5, rel=1e-6)
        assert config["tie_word_embeddings"] is True
        assert len(checkpoint.weights) == 272
        formats = [weight.format.name for weight in checkpoint.weights.values()]
        assert {name: formats.count(name) for name in set(formats)} == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
        assert checkpoint.weights["model.layers.29.self_attn.k_proj.weight"].shape == (192, 576)
        assert np.isfinite(checkpoint.weights["model.layers.0.self_attn.q_proj.weight"].dequantise()).all()


@pytest.mark.oracle
def test_smollm2_weights_are_the_gguf_packages(smollm2_path):
    gguf = pytest.importorskip("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    with open_checkpoint(smollm2_path) as checkpoint:
        for stored, name, heads in (
            ("token_embd", "model.embed_tokens", None),
            ("blk.7.ffn_down", "model.layers.7.mlp.down_proj", None),
            ("blk.7.attn_q", "model.layers.7.self_attn.q_proj", 9),
            ("blk.7.attn_k", "model.layers.7.self_attn.k_proj", 3),
        ):
            tensor = tensors[f"{stored}.weight"]
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            actual = checkpoint.weights[f"{name}.weight"].dequantise()
            np.testing.assert_array_equal(actual if heads is None else converted(actual, heads), expected)
