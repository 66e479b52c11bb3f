"""The builder's errors, the catalogue's shape rules, and the models that are built with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


@pytest.mark.parametrize(
    "shape", [{}, {"attention_bias": True}, {"kv_heads": 4}, {"head_dim": 32, "tied": False}]
)
def test_every_model_keeps_the_shape_rules(shape: dict[str, Any]) -> None:
    graph = tiny_llama(**shape).graph()
    ops.check(graph)
    ops.check(fuse(graph))


def test_the_catalogue_defines_every_op() -> None:
    assert all(type(op).__doc__ for op in ops.OPS.values())
    graph = tiny_llama().graph()
    assert {node.op for node in (*graph.nodes, *fuse(graph).nodes)} == set(ops.OPS)


def _change(op: str, /, **changes: Any) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        place = next(i for i, node in enumerate(graph.nodes) if node.op == op)
        node = graph.nodes[place]
        attrs = {**node.attrs, **changes.get("attrs", {})}
        graph.nodes[place] = replace(node, **{**changes, "attrs": attrs})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("norm", op="softmax"), r"node 1 \(softmax\): unknown op"),
        (_change("norm", inputs=()), r"node 1 \(norm\): 0 inputs; it takes 1"),
        (_change("norm", inputs=(7,)), r"node 1 \(norm\): reads \(7,\)"),
        (_change("norm", weights=("gone",)), r"node 1 \(norm\): tensor gone is missing"),
        (_change("norm", weights=("model.layers.0.mlp.up_proj.weight",)), r"norm weight \(96, 64\) for 64"),
        (_change("linear", weights=("model.layers.0.mlp.down_proj.weight",)), "96 input features on 64"),
        (_change("linear", weights=("model.norm.weight",)), r"a matrix of shape \(64,\)"),
        (_change("linear", features=65), "makes 64 features, not 65"),
        (_change("rope", attrs={"rope": RopeSpec(48, 48, 1e4)}), "64 features are no whole heads"),
        (_change("attention", attrs={"kv_heads": 4}), r"features, not \(64, 64, 64\)"),
        (_change("gated", attrs={"act": "tanh"}), "unknown activation 'tanh'"),
        (_change("add", inputs=(0, 2)), None),
        (_change("add", inputs=(0, 3)), "64 features plus 32"),
    ],
)
def test_a_broken_graph_names_the_node(change: Callable[[Graph], None], message: str | None) -> None:
    graph = tiny_llama().graph()
    change(graph)
    if message is None:
        ops.check(graph)
        return
    with pytest.raises(ValueError, match=message):
        ops.check(graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("fused_linear", attrs={"epilogue": "sum"}), "unknown epilogue 'sum'"),
        (_change("fused_linear", attrs={"epilogue": "add"}), "1 inputs for 'add'"),
        (
            _change("fused_linear", attrs={"epilogue": "gated"}),
            r"a gate and an up of \[64, 32, 32\] features",
        ),
        (_change("fused_attention", attrs={"offsets": (0, 64, 97)}), "columns 97…129 of 128"),
        (_change("fused_attention", attrs={"offsets": (-1, 64, 96)}), "columns -1…63 of 128"),
        (_change("fused_logits", weights=("model.embed_tokens.weight",) * 2), "norm weight"),
    ],
)
def test_a_broken_fused_graph_names_the_node(change: Callable[[Graph], None], message: str) -> None:
    graph = fuse(tiny_llama().graph())
    change(graph)
    with pytest.raises(ValueError, match=message):
        ops.check(graph)


def test_taken_rows_and_all_rows_do_not_mix() -> None:
    graph = Graph({"t.weight": dense(np.zeros((8, 4)))})
    x = graph.embed("t")
    taken = graph.take_rows(x)
    assert ops.taken_rows(graph) == [False, True]
    graph.nodes.append(Node("add", (x, taken), (), 4))
    with pytest.raises(ValueError, match="mixes all rows of the batch with the taken ones"):
        ops.check(graph)
    graph.nodes[-1] = Node("take_rows", (taken,), (), 4)
    with pytest.raises(ValueError, match="needs all rows of the batch"):
        ops.check(graph)


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
        ({"model_type": "hal9000"}, "unknown architecture 'hal9000'; known are llama, mistral"),
        ({"model_type": "llama.Config"}, "unknown architecture"),
        ({"model_type": "../errors"}, "unknown architecture"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling .* is not supported"),
        (
            {"model_type": "mistral", "sliding_window": 128},
            "sliding_window 128 is shorter than the context of 256",
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


def test_config_defaults_are_hugging_faces() -> None:
    model = tiny_llama(kv_heads=4)
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rotary_dim"):
        del model.config[key]
    assert model.graph().nodes == tiny_llama(kv_heads=4).graph().nodes
