"""The builder's errors, the catalogue's shape rules, and the models that are built with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny_models import dense, tiny_llama

from hexad.errors import CheckpointError, UnsupportedError
from hexad.graph import Graph, Node, RopeSpec, ops
from hexad.graph.fuse import fuse
from hexad.models import build_graph, known_models


def test_llama_is_built_as_the_paper_has_it() -> None:
    layer = ["norm", "linear", "linear", "linear", "rope", "rope", "attention", "linear", "add"]
    layer += ["norm", "linear", "linear", "gated", "linear", "add"]
    graph = tiny_llama(layers=3).graph()
    assert [node.op for node in graph.nodes] == ["embed", *layer * 3, "take_rows", "norm", "logits"]
    assert graph.vocab_size == 160
    assert graph.nodes[-1].weights == ("model.embed_tokens.weight",)
    assert tiny_llama(tied=False).graph().nodes[-1].weights == ("lm_head.weight",)


def test_the_catalogue_defines_every_op() -> None:
    assert all(type(op).__doc__ for op in ops.OPS.values())
    graph = tiny_llama().graph()
    assert {node.op for node in (*graph.nodes, *fuse(graph).nodes)} == set(ops.OPS)


ROPE = RopeSpec(16, 16, 1e4)
HEADS = {"layer": 0, "heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25, "window": None}
FUSED = {**HEADS, "norms": (None, None), "norm_eps": 0.0}
ATTN = "model.layers.0.self_attn.{}_proj.weight".format
MLP = "model.layers.0.mlp.{}_proj.weight".format
NORM = "model.layers.0.input_layernorm.weight"
HEAD_NORM = "head_norm.weight"


def _after_qkv() -> Graph:
    """Values 0 … 4: the embedding, its norm, q [64], k [32] and v [32]."""
    graph = Graph(tiny_llama(attention_bias=True).weights | {HEAD_NORM: dense(np.ones(16))})
    h = graph.norm(graph.embed("model.embed_tokens"), "model.layers.0.input_layernorm", eps=1e-5)
    for name in "qkv":
        graph.linear(h, f"model.layers.0.self_attn.{name}_proj")
    return graph


def _fused(epilogue: str, *names: str, norm: str | None = None, act: str | None = None) -> dict[str, Any]:
    """attrs of a fused_linear."""
    projections = tuple((name, None) for name in names)
    return {"norm": norm, "eps": 0.0, "projections": projections, "epilogue": epilogue, "act": act}


@pytest.mark.parametrize(
    ("op", "inputs", "weights", "attrs", "features"),
    [
        ("linear", (1,), (MLP("up"),), {}, 96),
        ("linear", (1,), (ATTN("k"), ATTN("k").replace("weight", "bias")), {}, 32),
        ("rope", (3,), (), {"rope": ROPE}, 32),
        ("attention", (2, 3, 4), (), HEADS, 64),
        ("gated", (3, 4), (), {"act": "silu"}, 32),
        ("add", (0, 2), (), {}, 64),
        ("take_rows", (3,), (), {}, 32),
        ("logits", (0,), ("model.embed_tokens.weight",), {}, 160),
        ("fused_linear", (0,), (ATTN("q"), ATTN("k")), _fused("store", ATTN("q"), ATTN("k")), 96),
        ("fused_linear", (0, 2), (ATTN("o"),), _fused("add", ATTN("o")), 64),
        (
            "fused_linear",
            (0,),
            (MLP("gate"), MLP("up")),
            _fused("gated", MLP("gate"), MLP("up"), act="silu"),
            96,
        ),
        ("norm", (0,), (NORM,), {"eps": 1e-5, "heads": None}, 64),
        ("norm", (2,), (HEAD_NORM,), {"eps": 1e-5, "heads": 4}, 64),
        ("attention", (2, 3, 4), (), {**HEADS, "window": 7}, 64),
        ("fused_attention", (2, 2, 2), (), {**FUSED, "offsets": (0, 0, 32), "rope": ROPE}, 64),
        (
            "fused_attention",
            (2, 3, 4),
            (HEAD_NORM, HEAD_NORM),
            {**FUSED, "norms": (HEAD_NORM, HEAD_NORM), "offsets": (0, 0, 0), "rope": None},
            64,
        ),
        ("fused_logits", (0,), ("model.norm.weight", "model.embed_tokens.weight"), {}, 160),
    ],
)
def test_the_shape_rules_give_the_width(
    op: str, inputs: tuple[int, ...], weights: tuple[str, ...], attrs: dict[str, Any], features: int
) -> None:
    graph = _after_qkv()
    value = graph.append(op, inputs, weights, **attrs)
    assert value == 5
    assert graph.nodes[value] == Node(op, inputs, weights, features, attrs)


@pytest.mark.parametrize(
    ("op", "inputs", "weights", "attrs", "message"),
    [
        ("norm", (0,), ("gone",), {}, "tensor gone is missing"),
        ("norm", (0,), (MLP("up"),), {"heads": None}, rf"{MLP('up')} has shape \(96, 64\); \(64,\) expected"),
        ("norm", (2,), (NORM,), {"heads": 4}, rf"tensor {NORM} has shape \(64,\); \(16,\) expected"),
        ("norm", (2,), (NORM,), {"heads": 5}, "64 features are no 5 equal heads"),
        ("linear", (0,), (MLP("down"),), {}, f"tensor {MLP('down')} has 96 input features; 64 expected"),
        ("linear", (0,), ("model.norm.weight",), {}, r"model\.norm\.weight has shape \(64,\); 2 dimensions"),
        ("linear", (0,), (MLP("up"), "model.norm.weight"), {}, r"model\.norm\.weight .* \(96,\) expected"),
        ("logits", (3,), ("model.embed_tokens.weight",), {}, "has 64 input features; 32 expected"),
        (
            "rope",
            (3,),
            (),
            {"rope": RopeSpec(48, 48, 1e4)},
            f"after {ATTN('k')}: 32 features are no whole heads of 48",
        ),
        (
            "attention",
            (2, 3, 4),
            (),
            {**HEADS, "kv_heads": 4},
            "key projection makes 32 features; 4 heads of 16 need 64",
        ),
        ("attention", (2, 3, 2), (), HEADS, "value projection makes 64 features; 2 heads of 16 need 32"),
        (
            "attention",
            (2, 3, 4),
            (),
            {**HEADS, "heads": 3},
            "query projection makes 64 features; 3 heads of 16 need 48",
        ),
        (
            "attention",
            (3, 2, 2),
            (),
            {**HEADS, "heads": 2, "kv_heads": 4},
            "2 query heads do not share 4 KV heads",
        ),
        (
            "gated",
            (2, 3),
            (),
            {"act": "silu"},
            f"after {ATTN('q')}, {ATTN('k')}: gate has 64 features and up 32",
        ),
        (
            "add",
            (0, 3),
            (),
            {},
            f"after model.embed_tokens.weight, {ATTN('k')}: cannot add 64 to 32 features",
        ),
        (
            "fused_linear",
            (0,),
            (NORM, MLP("down")),
            _fused("store", MLP("down"), norm=NORM),
            f"tensor {MLP('down')} has 96 input features; 64 expected",
        ),
        (
            "fused_linear",
            (3,),
            (NORM, ATTN("q")),
            _fused("store", ATTN("q"), norm=NORM),
            rf"tensor {NORM} has shape \(64,\); \(32,\) expected",
        ),
        ("fused_linear", (0, 3), (ATTN("o"),), _fused("add", ATTN("o")), "cannot add 64 to 32 features"),
        (
            "fused_linear",
            (0,),
            (ATTN("q"), ATTN("k")),
            _fused("gated", ATTN("q"), ATTN("k"), act="silu"),
            "gate has 64 features and up 32",
        ),
        (
            "fused_attention",
            (2, 3, 4),
            (),
            {**FUSED, "offsets": (0, 0, 1), "rope": None},
            "columns 1…33 of 32",
        ),
        (
            "fused_attention",
            (2, 3, 4),
            (NORM,),
            {**FUSED, "norms": (NORM, None), "offsets": (0, 0, 0), "rope": None},
            rf"tensor {NORM} has shape \(64,\); \(16,\) expected",
        ),
        (
            "fused_attention",
            (2, 3, 4),
            (),
            {**FUSED, "offsets": (-1, 0, 0), "rope": None},
            "columns -1…63 of 64",
        ),
        (
            "fused_logits",
            (0,),
            ("model.embed_tokens.weight",) * 2,
            {},
            r"has shape \(160, 64\); \(64,\) expected",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    op: str, inputs: tuple[int, ...], weights: tuple[str, ...], attrs: dict[str, Any], message: str
) -> None:
    graph = _after_qkv()
    with pytest.raises(CheckpointError, match=message):
        graph.append(op, inputs, weights, **attrs)
    assert len(graph.nodes) == 5


def test_attrs_no_model_has_are_the_programmers_mistake() -> None:
    graph = _after_qkv()
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        graph.gated(3, 4, "tanh")
    with pytest.raises(ValueError, match="a window of 0 positions"):
        graph.attention(2, 3, 4, **{**HEADS, "window": 0})
    with pytest.raises(ValueError, match="unknown epilogue 'sum'"):
        graph.append("fused_linear", (0,), (ATTN("q"),), **_fused("sum", ATTN("q")))


def test_taken_rows_and_all_rows_do_not_mix() -> None:
    graph = Graph({"t.weight": dense(np.zeros((8, 4)))})
    x = graph.embed("t")
    taken = graph.take_rows(x)
    assert ops.taken_rows(graph) == [False, True]
    graph.add(x, taken)
    with pytest.raises(ValueError, match=r"node 2 \(add\): mixes all rows of the batch with the taken ones"):
        ops.taken_rows(graph)
    graph.nodes.pop()
    graph.take_rows(taken)
    with pytest.raises(ValueError, match=r"node 2 \(take_rows\): needs all rows of the batch"):
        ops.taken_rows(graph)


# Checkpoints that do not hold what they say.


def test_a_missing_tensor_is_named_with_its_file() -> None:
    model = tiny_llama()
    del model.weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"m\.gguf: tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"
    ):
        build_graph(model.config, model.weights, Path("m.gguf"))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "model.layers.0.self_attn.k_proj",
            (16, 64),
            "key projection makes 16 features; 2 heads of 16 need 32",
        ),
        ("model.layers.0.self_attn.q_proj", (64, 32), "has 32 input features; 64 expected"),
        ("model.layers.0.mlp.gate_proj", (64, 64), "gate has 64 features and up 96"),
        ("model.layers.0.mlp.down_proj", (32, 96), "cannot add 64 to 32 features"),
        ("model.norm", (63,), r"has shape \(63,\); \(64,\) expected"),
        ("model.embed_tokens", (160,), r"has shape \(160,\); 2 dimensions expected"),
    ],
)
def test_a_misshapen_tensor_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    model = tiny_llama()
    model.weights[f"{name}.weight"] = dense(np.zeros(shape))
    with pytest.raises(CheckpointError, match=message):
        model.graph()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None; a positive integer expected"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; a positive integer"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"num_key_value_heads": 3}, "key projection makes 32 features; 3 heads of 16 need 48"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; a positive number"),
        ({"rope_theta": 0.0}, r"rope_theta is 0\.0; a positive number"),
        ({"rotary_dim": 7}, "rotary_dim is 7; an even number of at most 16"),
        ({"rotary_dim": 18}, "rotary_dim is 18; an even number of at most 16"),
        ({"head_dim": None, "num_attention_heads": 5}, "hidden_size 64 is not divisible by"),
        ({"hidden_size": 32, "head_dim": 16}, "hidden_size is 32, but the tensors have 64"),
        ({"vocab_size": 161}, "vocab_size is 161, but the tensors have 160"),
        ({"intermediate_size": 97}, "intermediate_size is 97, but the tensors have 96"),
        ({"model_type": None}, "model_type is None; a name expected"),
    ],
)
def test_an_ill_config_value_is_named(change: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    model.config |= change
    with pytest.raises(CheckpointError, match=message):
        model.graph()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "hal9000"}, "unknown architecture 'hal9000'; known are llama, ministral, mistral"),
        ({"model_type": "llama.Config"}, "unknown architecture"),
        ({"model_type": "../errors"}, "unknown architecture"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic' is not supported"),
        (
            {"model_type": "ministral", "sliding_window": 8, "layer_types": ["chunked_attention"] * 2},
            "layer_types has 'chunked_attention'",
        ),
    ],
)
def test_what_is_not_built_is_unsupported(change: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    model.config |= change
    with pytest.raises(UnsupportedError, match=message):
        model.graph()


def test_mistral_is_llama_where_the_window_holds_the_context() -> None:
    model = tiny_llama()
    for window in (None, 256, 4096):
        config = model.config | {"model_type": "mistral", "sliding_window": window}
        assert build_graph(config, model.weights).nodes == model.graph().nodes
    assert {"llama", "mistral"} <= set(known_models())


MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("model_type", "config", "windows"),
    [
        ("llama", {"sliding_window": 8, "layer_types": MIXED}, [None] * 4),
        ("mistral", {"sliding_window": 8}, [8] * 4),
        ("mistral", {"sliding_window": 8, "layer_types": MIXED}, [8] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("ministral", {"sliding_window": 8}, [8] * 4),
        ("ministral", {"sliding_window": 8, "layer_types": MIXED}, [8, None, 8, None]),
        ("ministral", {"sliding_window": 256, "layer_types": MIXED}, [None] * 4),
        ("ministral", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, [None] * 4),
        ("qwen2", {"sliding_window": 8}, [None] * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0}, [None] * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, [None] * 4),
        (
            "qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            [*[None] * 3, 8],
        ),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, [8] * 4),
        (
            "qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": MIXED},
            [8, None, 8, None],
        ),
        (
            "qwen3",
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": MIXED},
            [8, None, 8, None],
        ),
    ],
)
def test_windows(model_type: str, config: dict[str, Any], windows: list[int | None]) -> None:
    model = tiny_llama(layers=4, attention_bias=True)
    if model_type == "qwen3":
        for layer in range(4):
            for name in "qk":
                model.weights[f"model.layers.{layer}.self_attn.{name}_norm.weight"] = dense(np.ones(16))
    graph = build_graph(model.config | config | {"model_type": model_type}, model.weights)
    assert [node.attrs["window"] for node in graph.nodes if node.op == "attention"] == windows
    assert [n.attrs["window"] for n in fuse(graph).nodes if n.op == "fused_attention"] == windows


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": MIXED}, "layer_types are .*; one for each of 2 layers expected"),
        ({"layer_types": "full"}, "layer_types are 'full'; one for each of 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 0}, "sliding_window is 0"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "sliding_window is None"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 4096 expected"),
    ],
)
def test_ill_windows_are_named(config: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(CheckpointError, match=message):
        build_graph(model.config | {"model_type": "ministral", "sliding_window": 8} | config, model.weights)


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_head_is_the_head(tied: bool) -> None:
    model = tiny_llama(tied=False)
    model.config["tie_word_embeddings"] = tied
    assert model.graph().nodes[-1].weights == ("lm_head.weight",)


def test_without_a_stored_head_it_must_be_tied() -> None:
    model = tiny_llama(tied=True)
    assert model.graph().nodes[-1].weights == ("model.embed_tokens.weight",)
    model.config["tie_word_embeddings"] = False
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        model.graph()


def test_what_tells_the_qwens_from_llama() -> None:
    """Qwen2 has biases and Qwen3 norms, and neither may be missing."""
    model = tiny_llama()
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.bias is missing"):
        build_graph(model.config | {"model_type": "qwen2"}, model.weights)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_norm\.weight is missing"):
        build_graph(model.config | {"model_type": "qwen3"}, model.weights)
    model = tiny_llama(attention_bias=True)
    assert build_graph(model.config | {"model_type": "qwen2"}, model.weights).nodes == model.graph().nodes


def test_config_defaults_are_hugging_faces() -> None:
    model = tiny_llama(kv_heads=4)
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rotary_dim"):
        del model.config[key]
    assert model.graph().nodes == tiny_llama(kv_heads=4).graph().nodes
